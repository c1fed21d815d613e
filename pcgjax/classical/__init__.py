"""The classical chain: Shannon energy, Burg spectra, four scikit-learn classifiers."""
