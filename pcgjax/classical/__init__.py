"""The classical chain (Kocuvan and Torkar, HEALTHINF 2015): Shannon energy, Burg spectra, four classifiers."""
