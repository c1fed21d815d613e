"""Times two functions in turn, so that a drift of the machine's speed cancels in the ratio."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tqdm


def seconds(function: Callable[[], object]) -> float:
    """The seconds that one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def fastest(function: Callable[[], object], calls: int) -> float:
    """The seconds of the fastest of so many calls."""
    return min(seconds(function) for _ in range(calls))


def waiting(function: Callable, *arguments: Any) -> Callable[[], Any]:
    """A call of a compiled JAX function on these arguments that returns when its results are there."""
    return lambda: jax.block_until_ready(function(*arguments))


def paired(ours: Callable[[], object], peer: Callable[[], object], repeats: int, description: str) -> dict:
    """Times both in turn, after one round unmeasured.

    Returns: {ours_s, peer_s: medians in seconds; ratio, ratio_range: median, lowest and highest of peer / ours in a
      pair; pairs}.
    """
    ours(), peer()
    pairs = []
    for i in tqdm.trange(repeats, desc=description, unit="pair"):
        # Who goes first changes, so that neither always finds the machine warm.
        if i % 2:
            second, first = seconds(peer), seconds(ours)
        else:
            first, second = seconds(ours), seconds(peer)
        pairs.append((first, second))
    ratios = np.sort([peer_s / ours_s for ours_s, peer_s in pairs])
    return {
        "ours_s": float(np.median([a for a, _ in pairs])),
        "peer_s": float(np.median([b for _, b in pairs])),
        "ratio": float(np.median(ratios)),
        "ratio_range": [float(ratios[0]), float(ratios[-1])],
        "pairs": len(pairs),
    }


def median_p95(times_s: Sequence[float]) -> dict:
    """{median, p95} of times in seconds, in milliseconds."""
    return {"median": float(np.median(times_s) * 1e3), "p95": float(np.quantile(times_s, 0.95) * 1e3)}


def ratio_text(ratio: float, ratio_range: Sequence[float], peer: str, digits: int = 2, width: int = 0) -> str:
    """A ratio of `paired` for a terminal: "2.40x the peer  [2.31, 2.52]"."""
    low, high = ratio_range
    return f"{ratio:{width}.{digits}f}x {peer}  [{low:.{digits}f}, {high:.{digits}f}]"
