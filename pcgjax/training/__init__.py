"""The JAX trainer. Start with `loop.py`."""
