"""Jit-able signal processing, each function with a SciPy, PyWavelets or librosa oracle in tests/."""
