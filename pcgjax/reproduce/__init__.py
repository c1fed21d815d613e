"""Every paper's tables, under its protocol and under an honest one: `python -m pcgjax.reproduce`."""
