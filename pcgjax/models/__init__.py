"""Flax NNX modules: no mesh, no data, no loss in them."""
