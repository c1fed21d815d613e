"""Frame scores to states: durations of states, Viterbi decoding with the rhythm, and a metronome as the baseline.

Axes as in `states`; K rhythms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from pcgjax.datasets import S1, UNANNOTATED, Span
from pcgjax.segmentation.states import STATE_NAMES, state_onsets, touch, whole_cycles

_SMOOTHING_S = 0.02  # of counted durations; the reference labels lie on a grid this wide
_RHYTHM_WIDTH = 0.06  # of a rhythm, as a share of its cycle
_SHARED = 0.02  # share of all recordings' durations in those of a rhythm
_LOG_CHANGE = math.log(0.01)  # log-probability of another rhythm from one cycle to the next
_FLOOR = 1e-3  # probability spread over all durations: a heart may beat as none in training did
_NEVER = -1e30  # a logarithm of 0 that can be added to and subtracted from
_PAD_FRAMES = (4096, 32768)  # one compilation each; longer recordings are padded to multiples of the last


def durations(
    annotations: Iterable[Sequence[Span]], step_s: float, longest_s: float = 1.5, rhythms: int = 10
) -> np.ndarray:
    """Log-probabilities of a state lasting 1 to D frames, (K, 4, D) float32, counted on training annotations.

    One set for each of K rhythms, cycle lengths evenly spaced between the shortest and the longest of the recordings'
    medians (without the outermost hundredth): of recordings whose median cycle is nearly that long. Only states with
    their neighbours on both sides count: the first and last of an annotated stretch are cut. The counts are smoothed by
    a Gaussian and mixed with those of all recordings, and every duration gets a small probability, so none is
    impossible.

    Args: annotations: of one recording each; longest_s: D steps; what lasts longer counts as that long.
    Raises:
      ValueError: a state never occurs whole.
    """
    longest = round(longest_s / step_s)
    counts, cycles_s = [], []
    for annotation in annotations:
        durations_SxD, cycle_s = _counted(annotation, step_s, longest, longest_s)
        counts.append(durations_SxD)
        cycles_s.append(cycle_s)
    total = sum(counts, np.zeros((4, longest)))
    if not total.sum(1).all():
        lacking = ", ".join(STATE_NAMES[i + 1] for i in np.flatnonzero(total.sum(1) == 0))
        raise ValueError(f"annotations: no whole {lacking} between its neighbours; train on annotated recordings")
    d = np.arange(longest) * step_s
    kernel = np.exp(-0.5 * ((d[:, None] - d) / _SMOOTHING_S) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    known = np.isfinite(cycles_s)
    log_cycle = np.log(np.array(cycles_s)[known])
    shortest, longest_cycle = np.exp(np.quantile(log_cycle, (0.005, 0.995))) if known.any() else (1.0, 1.0)
    centres = np.log(np.linspace(shortest, longest_cycle, rhythms))
    probabilities = []
    for centre in centres:
        near = np.exp(-0.5 * ((log_cycle - centre) / _RHYTHM_WIDTH) ** 2)
        of_rhythm = np.tensordot(near, np.array(counts)[known], axes=1) if known.any() else total
        of_rhythm, of_all = (x @ kernel / np.maximum(x.sum(1, keepdims=True), 1e-9) for x in (of_rhythm, total))
        p = (1 - _SHARED) * of_rhythm + _SHARED * of_all
        probabilities.append((1 - _FLOOR) * p / p.sum(1, keepdims=True) + _FLOOR / longest)
    return np.log(probabilities).astype(np.float32)


def _counted(annotation: Sequence[Span], step_s: float, longest: int, longest_s: float) -> tuple[np.ndarray, float]:
    """(how often each whole state of one recording lasts 1 to D frames (4, D), its median cycle in s or NaN)."""
    durations_SxD, onsets_s = np.zeros((4, longest)), []
    for before, this, after in zip(annotation, annotation[1:], annotation[2:], strict=False):
        start_s, end_s, state = this
        if state == UNANNOTATED or not (touch(before, this) and touch(this, after)):
            continue
        if before[2] == (state - 2) % 4 + 1 and after[2] == state % 4 + 1:
            durations_SxD[state - 1, min(max(round((end_s - start_s) / step_s), 1), longest) - 1] += 1
            if state == S1:
                onsets_s.append(start_s)
    cycles = [b - a for a, b in itertools.pairwise(onsets_s) if b - a < 2 * longest_s]
    return durations_SxD, float(np.median(cycles)) if cycles else np.nan


def viterbi(log_p_TxS: ArrayLike, log_duration_KxSxD: ArrayLike, duration_weight: float = 1.0) -> np.ndarray:
    """The likeliest states (T,) int8 in the order S1, systole, S2, diastole, S1, ... with explicit durations.

    Maximises the sum over frames of log_p and over states of duration_weight times the log-probability of their
    duration in the rhythm of their cycle, one of K; a rhythm that changes where S1 begins costs -log _CHANGE. The
    recording cuts its first and last state, which lasted at least as long as is seen: those have the probability of
    that (in a stationary rhythm this is exact: a cut state's seen duration d has a probability proportional to
    P(D >= d), whatever the state).
    An explicit-duration HMM as Schmidt et al. 2010 (doi:10.1088/0967-3334/31/4/004) use for heart sounds, and as
    Springer et al. 2016 (doi:10.1109/TBME.2015.2475278) do with durations that depend on the heart rate, which is
    decoded here along with the states.

    Args: log_p_TxS: log-probabilities or scores; below -100 counts as -100. log_duration_KxSxD: as `durations` gives;
      (S, D) where there is one rhythm.
    Raises:
      ValueError: other shapes, or a log_p that is NaN.
    """
    log_p, log_duration = np.asarray(log_p_TxS, np.float32), np.asarray(log_duration_KxSxD, np.float64)
    if log_p.ndim != 2 or log_p.shape[1] != 4:
        raise ValueError(f"log_p_TxS: need (frames, 4), got shape {log_p.shape}")
    if log_duration.ndim not in (2, 3) or log_duration.shape[-2] != 4:
        raise ValueError(f"log_duration_KxSxD: need (rhythms, 4, durations), got shape {log_duration.shape}")
    if np.isnan(log_p).any():
        raise ValueError(f"log_p_TxS: NaN, first in frame {np.isnan(log_p).any(1).argmax()}")
    log_duration = log_duration.reshape(-1, *log_duration.shape[-2:])
    frames = len(log_p)
    if not frames:
        return np.zeros(0, np.int8)
    log_survival = np.logaddexp.accumulate(log_duration[:, :, ::-1], axis=2)[:, :, ::-1]
    whole, cut = (
        np.maximum(duration_weight * v.transpose(2, 1, 0), _NEVER).astype(np.float32)
        for v in (log_duration, log_survival)
    )  # (D, S, K): rhythms last, so that a step is over whole vectors
    sizes = [size for size in _PAD_FRAMES if size >= frames]
    padded = np.zeros((sizes[0] if sizes else -(-frames // _PAD_FRAMES[-1]) * _PAD_FRAMES[-1], 4), np.float32)
    padded[:frames] = np.clip(log_p, -100, 100)
    open_DxSxK, lasted_TxSxK, came_TxK = map(np.asarray, _forward(padded, frames, whole, cut))

    last, state, rhythm = np.unravel_index(np.argmax(open_DxSxK + cut), open_DxSxK.shape)
    states = np.zeros(frames, np.int8)
    stop, lasted = frames, int(last) + 1
    while True:
        states[max(0, stop - lasted) : stop] = state + 1
        stop -= lasted
        if stop <= 0:
            return states
        if state == 0:  # S1: which rhythm the diastole before it had
            rhythm = came_TxK[stop - 1, rhythm]
        state = (state - 1) % 4
        lasted = int(lasted_TxSxK[stop - 1, state, rhythm])


@jax.jit
def _forward(log_p_TxS: Any, frames: Any, whole_DxSxK: Any, cut_DxSxK: Any) -> tuple[Any, Any, Any]:
    """Returns (scores of the states still open after the last frame by how long they last so far (D, S, K);
    how long the best state that ends with a frame lasted (T, S, K); the rhythm before an S1 that begins after it
    (T, K))."""
    longest, _, rhythms = whole_DxSxK.shape
    so_far = jnp.arange(longest)[:, None, None]

    def step(t: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        open_DxSxK, begun_SxK, lasted_TxSxK, came_TxK = carry
        open_DxSxK = jnp.concatenate([begun_SxK[None], open_DxSxK[:-1]]) + log_p_TxS[t][None, :, None]
        # The state open since the first frame is cut there.
        scores = open_DxSxK + jnp.where(so_far == t, cut_DxSxK, whole_DxSxK)
        ended_SxK, lasted_SxK = scores.max(0), scores.argmax(0) + 1
        # The best is moved to 0, so that float32 is as exact at the end of a long recording as at its beginning.
        level = ended_SxK.max()
        level = jnp.where(level > _NEVER / 2, level, 0)
        before_SxK = jnp.roll(ended_SxK, 1, axis=0)
        other = before_SxK[0].argmax()
        changed = before_SxK[0, other] + _LOG_CHANGE > before_SxK[0]
        came_K = jnp.where(changed, other, jnp.arange(rhythms)).astype(jnp.int8)
        before_SxK = before_SxK.at[0].max(before_SxK[0, other] + _LOG_CHANGE)
        update = jax.lax.dynamic_update_index_in_dim
        lasted_TxSxK = update(lasted_TxSxK, lasted_SxK.astype(jnp.int16), t, 0)
        return open_DxSxK - level, before_SxK - level, lasted_TxSxK, update(came_TxK, came_K, t, 0)

    nothing = jnp.full(whole_DxSxK.shape, _NEVER, jnp.float32)
    frame_count = len(log_p_TxS)
    carry = (
        nothing, jnp.zeros((4, rhythms), jnp.float32), jnp.zeros((frame_count, 4, rhythms), jnp.int16),
        jnp.zeros((frame_count, rhythms), jnp.int8),
    )  # fmt: skip
    open_DxSxK, _, lasted_TxSxK, came_TxK = jax.lax.fori_loop(0, frames, step, carry)
    return open_DxSxK, lasted_TxSxK, came_TxK


def metronome(truth_T: ArrayLike, step_s: float, log_duration_KxSxD: ArrayLike) -> np.ndarray:
    """The baseline, states (T,) int8: it knows the recording's true heart rate and nothing else.

    Cycles as long as the truth's median one, from the first frame on, divided as the training durations are on
    average; as long as the training's where the truth has no whole cycle.

    Args: truth_T: annotated states; log_duration_KxSxD: as `durations` gives.
    """
    truth, p = np.asarray(truth_T), np.exp(np.asarray(log_duration_KxSxD, np.float64))
    p = p.reshape(-1, *p.shape[-2:]).mean(0)
    mean = (p * np.arange(1, p.shape[1] + 1)).sum(1) / p.sum(1)
    cycles = whole_cycles(state_onsets(truth, S1), truth)
    length = np.median(cycles) if len(cycles) else mean.sum()
    phase = (np.arange(len(truth)) + 0.5) / length % 1
    ends = np.cumsum(mean)[:-1] / mean.sum()
    return (np.searchsorted(ends, phase, side="right") + 1).astype(np.int8)
