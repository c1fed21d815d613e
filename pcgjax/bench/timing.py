"""Times two functions in turn, so that a drift of the machine's speed cancels in the ratio."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import tqdm


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def paired(ours: Callable[[], object], peer: Callable[[], object], repeats: int, description: str) -> dict:
    """Times both in turn, after one round unmeasured: {ours_s, peer_s, ratio: median and range of peer / ours}."""
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


def median_p95(times_s: list[float]) -> dict:
    return {"median": float(np.median(times_s) * 1e3), "p95": float(np.quantile(times_s, 0.95) * 1e3)}
