"""Which ideas of the H-infinity LSTM paper hold up: `python -m pcgjax.ablation`."""
