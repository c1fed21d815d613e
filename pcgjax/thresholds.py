"""Stochastic adaptive probe thresholding (SAPT): the decision threshold as training state.

H-infinity LSTM paper, section II-D2: a grid of thresholds is scored on the validation set, and at every interval of N
epochs the one in use follows the best. It names a smoothing factor but not what is smoothed, nor the grid. Here
`smooth` is the choice, and the grid is fixed instead of sampled: all of it costs less than one validation batch.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

METRICS = ("f1", "balanced_accuracy", "recall")
SMOOTHS = ("threshold", "scores")
GRID = tuple(round(0.01 * i, 2) for i in range(1, 100))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["threshold", "epoch", "scores"],
    meta_fields=["interval", "factor", "metric", "smooth", "grid"],
)
@dataclasses.dataclass(frozen=True)
class State:
    """A pytree of three arrays, its settings static fields; `init` makes it. K candidates in the grid."""

    threshold: jax.Array  # () in use until the next update
    epoch: jax.Array  # () int32, how many epochs were seen
    scores: jax.Array  # (K,) of the grid; smoothed where `smooth` is "scores"
    interval: int
    factor: float
    metric: str
    smooth: str
    grid: tuple[float, ...]


def init(
    start: float = 0.5,
    interval: int = 10,
    factor: float = 0.3,
    metric: str = "f1",
    smooth: str = "threshold",
    grid: tuple[float, ...] = GRID,
) -> State:
    """The state before training.

    Args:
      start: the threshold of the first epochs.
      interval: N, epochs between two updates; 0: the threshold stays at `start`.
      factor: weight of the new value in the exponentially weighted moving average, in (0, 1].
      metric: what a threshold is scored by, one of METRICS. Recall alone always favours the lowest threshold.
      smooth: "threshold" averages the one in use with the best of the grid, at each interval; "scores" averages every
        candidate's scores from epoch to epoch, and the best of these is used as it is.
      grid: candidates in [0, 1].
    Raises:
      ValueError: naming the field.
    """
    if not 0 <= start <= 1:
        raise ValueError(f"sapt.start={start}: must lie between 0 and 1")
    if interval < 0:
        raise ValueError(f"sapt.interval={interval}: must be at least 0 epochs")
    if not 0 < factor <= 1:
        raise ValueError(f"sapt.factor={factor}: must be above 0 and at most 1")
    if metric not in METRICS:
        raise ValueError(f"sapt.metric={metric!r}: choose one of {', '.join(METRICS)}")
    if smooth not in SMOOTHS:
        raise ValueError(f"sapt.smooth={smooth!r}: choose one of {', '.join(SMOOTHS)}")
    if not grid or min(grid) < 0 or max(grid) > 1:
        raise ValueError(f"sapt.grid={grid}: at least one threshold, all between 0 and 1")
    return State(
        jnp.full((), start, jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros(len(grid)), interval, factor, metric,
        smooth, tuple(grid),
    )  # fmt: skip


def sapt_update(state: State, probabilities: jax.Array, labels: jax.Array) -> State:
    """The state after an epoch's validation gave these probabilities; its `threshold` is in use from the next epoch on.

    Of equally good candidates the one nearest to the threshold in use is taken. Where the validation set lacks a class,
    only the count of epochs changes.

    Args:
      probabilities: (n,) in [0, 1].
      labels: (n,) 0 or 1, or NaN for a recording that counts as neither.
    """
    grid = jnp.asarray(state.grid, jnp.float32)
    called = probabilities[None] >= grid[:, None]
    positive, negative = (labels > 0), (labels <= 0)
    tp, fp = (called & positive[None]).sum(1), (called & negative[None]).sum(1)
    positives, negatives = positive.sum(), negative.sum()
    recall = tp / jnp.maximum(positives, 1)
    if state.metric == "f1":
        scores = 2 * tp / jnp.maximum(tp + fp + positives, 1)
    elif state.metric == "balanced_accuracy":
        scores = (recall + 1 - fp / jnp.maximum(negatives, 1)) / 2
    else:
        scores = recall
    both = (positives > 0) & (negatives > 0)
    epoch = state.epoch + 1
    if state.smooth == "scores":
        scores = jnp.where(state.epoch > 0, (1 - state.factor) * state.scores + state.factor * scores, scores)
    scores = jnp.where(both, scores, state.scores)
    distance = jnp.where(scores >= scores.max() - 1e-6, jnp.abs(grid - state.threshold), jnp.inf)
    best = grid[jnp.argmin(distance)]
    if state.smooth == "threshold":
        best = (1 - state.factor) * state.threshold + state.factor * best
    due = both & (epoch % state.interval == 0) if state.interval else jnp.zeros((), bool)
    return dataclasses.replace(state, threshold=jnp.where(due, best, state.threshold), epoch=epoch, scores=scores)
