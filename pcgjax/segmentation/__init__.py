"""Segmentation of phonocardiograms into S1, systole, S2 and diastole: frames, decoding, scores."""
