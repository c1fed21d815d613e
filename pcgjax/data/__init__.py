"""A folder on disk to batches: decoding, shards, splits, corpus, plan, batches."""

from __future__ import annotations


class PrepareError(ValueError):
    """A prepared folder that cannot be written or read; the message names the file and the fix."""
