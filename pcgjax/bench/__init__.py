"""Ours beside a PyTorch peer, the ratio and the floor: `python -m pcgjax.bench --suite=NAME --out=FILE.json`."""
