"""From a folder of recordings to batches.

Preparing: `decode` reads one recording, `workers` and `ray_cluster` spread that over processes and machines, `shards`
writes and reads the prepared folder. Training: `splits` divides its recordings, `corpus` holds them, `plan` says which
make which batch, `batches` makes the arrays.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]  # a recording of a prepared folder, as `decode.decode` describes it


class PrepareError(ValueError):
    """A prepared folder that cannot be written or read; the message names the file and the fix."""
