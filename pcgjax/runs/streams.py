"""Streams of randomness, each folded into the seed's key first."""

from __future__ import annotations

# Streams of randomness, each folded into the seed's key first.
ORDER, STEP, EVALUATION, SHUFFLE = range(4)
