"""Which epoch of a run is the best: the one whose validation score is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LESS_IS_BETTER = ("loss", "brier")


def selection_score(scores: Mapping[str, float], select: str) -> float:
    """The score by which epochs are compared, the larger the better: `scores[select]`, a loss with its sign turned.

    -inf where the score is not finite, so that any finite one is better.
    """
    score = -scores[select] if select in LESS_IS_BETTER else scores[select]
    return score if math.isfinite(score) else -math.inf


def better_epoch(
    best: Mapping[str, Any] | None, scores: Mapping[str, float], select: str, step: int, epoch: int, threshold: float
) -> dict[str, Any] | None:
    """What a checkpoint's meta keeps of this epoch as "best", where it is better than `best`; else None.

    best: of the best epoch so far, None before the first; threshold: the decision threshold in use at this epoch.
    Returns: {"score": of `selection_score`, "step", "epoch" (counted from 1), "metric", "threshold"} or None.
    """
    score = selection_score(scores, select)
    if best is not None and score <= best["score"]:
        return None
    return {"score": score, "step": step, "epoch": epoch, "metric": select, "threshold": threshold}


def more_accurate(best: Mapping[str, Any] | None, accuracy: float, loss: float, step: int) -> dict[str, Any] | None:
    """What the audio LLM's checkpoints keep of this epoch, {"accuracy", "loss", "step"}, where it is better than
    `best`: more accurate on validation, or as accurate with a smaller loss; else None."""
    if best is None or (accuracy, -loss) > (best["accuracy"], -best["loss"]):
        return {"accuracy": accuracy, "loss": loss, "step": step}
    return None
