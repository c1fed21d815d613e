"""Segmentation of phonocardiograms into S1, systole, S2 and diastole: from frame probabilities to decisions and scores.

A frame is `step_s` seconds long; frame i covers [i, i + 1) steps and has the state of its centre. States are
numbered as in `pcgjax.datasets`. Axes: T frames; S the four states S1, systole, S2, diastole, in this order;
D durations of 1 to D frames.
"""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from pcgjax import files, metrics
from pcgjax.datasets import DIASTOLE, S1, S2, SYSTOLE, UNANNOTATED, circor

Span = tuple[float, float, int]  # start_s, end_s, state

STATE_NAMES = ("unannotated", "S1", "systole", "S2", "diastole")
TARGETS = ("sounds", "cycle", "annotated", "states")
TOLERANCES_MS = (60, 100)  # of an onset
_SMOOTHING_S = 0.02  # of counted durations; the reference labels lie on a grid this wide
_RHYTHM_WIDTH = 0.06  # of a rhythm, as a share of its cycle
_SHARED = 0.02  # of a rhythm's durations are those of all recordings
_LOG_CHANGE = math.log(0.01)  # of another rhythm from one cycle to the next
_FLOOR = 1e-3  # probability spread over all durations: a heart may beat as none in training did
_NEVER = -1e30  # a logarithm of 0 that can be added to and subtracted from
_PAD_FRAMES = (4096, 32768)  # one compilation each; longer recordings are padded to multiples of the last


# ---------------------------------------------------------------------------------------------------------------
# Annotations and frames
# ---------------------------------------------------------------------------------------------------------------


def frame_states(annotations: Iterable[Span], frames: int, step_s: float) -> np.ndarray:
    """(frames,) int8: the state at each frame's centre, 0 where there is no annotation."""
    states = np.zeros(frames, np.int8)
    for start_s, end_s, state in annotations:
        # The first frame whose centre is not before; rounded, as 0.03 / 0.02 must be 1.5 and not a hair more.
        first, stop = (max(0, math.ceil(round(edge / step_s - 0.5, 6))) for edge in (start_s, end_s))
        states[first:stop] = state
    return states


def spans(states_T: ArrayLike, step_s: float, duration_s: float = math.inf) -> list[Span]:
    """(start_s, end_s, state) of each run of equal frames, unannotated ones too.

    duration_s: the recording's; the last frame may reach past its end, a span must not.
    """
    states = np.asarray(states_T)
    edges = np.r_[0, np.flatnonzero(np.diff(states)) + 1, len(states)]
    found = [
        (float(first * step_s), float(min(stop * step_s, duration_s)), int(states[first]))
        for first, stop in itertools.pairwise(edges)
        if first < stop
    ]
    return [span for span in found if span[0] < span[1]]


def target_frames(states_T: ArrayLike, target: str) -> np.ndarray:
    """What a head learns, (T,) int8, -1 where a frame does not count.

    target: `sounds` (1 in S1 and S2), `cycle` (1 from the onset of S1 to the end of S2: a systolic murmur lies
      between the two), `annotated` (1 in any state; every frame counts) or `states` (0 to 3: S1, systole, S2,
      diastole). But for `annotated`, unannotated frames do not count.
    Raises:
      ValueError: another target.
    """
    states = np.asarray(states_T)
    if target == "annotated":
        return (states != UNANNOTATED).astype(np.int8)
    if target == "sounds":
        found = np.isin(states, (S1, S2))
    elif target == "cycle":
        found = np.isin(states, (S1, SYSTOLE, S2))
    elif target == "states":
        found = states - 1
    else:
        raise ValueError(f"target: need one of {', '.join(TARGETS)}, got {target!r}")
    return np.where(states == UNANNOTATED, -1, found).astype(np.int8)


def threshold_spans(
    p_T: ArrayLike, threshold: float, shortest_on_s: float, shortest_off_s: float, step_s: float
) -> list[tuple[float, float]]:
    """(start_s, end_s) where a binary head's probability is >= threshold.

    Gaps shorter than shortest_off_s between two spans are closed, then spans shorter than shortest_on_s dropped.
    """
    on = np.asarray(p_T) >= threshold
    edges = np.flatnonzero(np.diff(on, prepend=False, append=False)).reshape(-1, 2)
    found: list[tuple[int, int]] = []
    for first, stop in edges.tolist():
        if found and (first - found[-1][1]) * step_s < shortest_off_s - 1e-9:
            first = found.pop()[0]
        found.append((first, stop))
    return [(a * step_s, b * step_s) for a, b in found if (b - a) * step_s >= shortest_on_s - 1e-9]


def write_tsv(spans: Iterable[Span], path: str | pathlib.Path) -> None:
    """Writes spans as CirCor does: start and end in seconds, state (0 for unannotated), apart by tabs."""

    def seconds(value: float) -> str:
        return f"{value:.5f}".rstrip("0").rstrip(".")

    lines = (f"{seconds(start_s)}\t{seconds(end_s)}\t{state}\n" for start_s, end_s, state in spans)
    files.write_text(pathlib.Path(path), "".join(lines))


def read_tsv(path: str | pathlib.Path) -> tuple[Span, ...]:
    """The spans of a file in CirCor's layout, read as its loader does, with the order of the states checked.

    The order is looked at only where spans touch: after an unannotated stretch any state may follow.
    Raises:
      FileNotFoundError, or ValueError: naming file and line; such as states that do not follow each other.
    """
    path = pathlib.Path(path)
    try:
        found = circor.read_annotations(path, math.inf)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    numbers = [n for n, line in enumerate(path.read_text("latin-1").splitlines(), 1) if _has_length(line)]
    for number, before, after in zip(numbers[1:], found[:-1], found[1:], strict=True):
        if _touch(before, after) and UNANNOTATED not in (before[2], after[2]) and after[2] != before[2] % 4 + 1:
            raise ValueError(
                f"{path}, line {number}: {STATE_NAMES[after[2]]} follows {STATE_NAMES[before[2]]}; the order is "
                "S1, systole, S2, diastole: correct the state, or put an unannotated stretch (0) between"
            )
    return found


def _has_length(line: str) -> bool:
    cells = line.split()
    return bool(cells) and float(cells[0]) < float(cells[1])


def _touch(before: Span, after: Span) -> bool:
    return after[0] - before[1] <= circor.SLACK_S


# ---------------------------------------------------------------------------------------------------------------
# Decisions
# ---------------------------------------------------------------------------------------------------------------


def durations(
    annotations: Iterable[Sequence[Span]], step_s: float, longest_s: float = 1.5, rhythms: int = 10
) -> np.ndarray:
    """Log-probabilities of a state lasting 1 to D frames, (K, 4, D) float32, counted on training annotations.

    One set for each of K rhythms, cycle lengths evenly spaced between the shortest and the longest of the recordings'
    medians (without the outermost hundredth): of recordings whose median cycle is nearly that long. Only states with
    their neighbours on both sides count: the first and last of an annotated stretch are cut. The counts are smoothed by
    a Gaussian and mixed with those of all recordings, and every duration gets a small probability, so none is
    impossible.

    Args: annotations, of one recording each; longest_s: D steps; what lasts longer counts as that long.
    Raises:
      ValueError: a state never occurs whole.
    """
    longest = round(longest_s / step_s)
    counts, cycles_s = [], []
    for annotation in annotations:
        own, onsets_s = np.zeros((4, longest)), []
        triples = zip(annotation, annotation[1:], annotation[2:], strict=False)
        for before, (start_s, end_s, state), after in triples:
            this = (start_s, end_s, state)
            if state == UNANNOTATED or not (_touch(before, this) and _touch(this, after)):
                continue
            if before[2] == (state - 2) % 4 + 1 and after[2] == state % 4 + 1:
                own[state - 1, min(max(round((end_s - start_s) / step_s), 1), longest) - 1] += 1
                onsets_s += [start_s] if state == S1 else []
        cycles = [b - a for a, b in itertools.pairwise(onsets_s) if b - a < 2 * longest_s]
        counts.append(own)
        cycles_s.append(np.median(cycles) if cycles else np.nan)
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
    found = []
    for centre in centres:
        near = np.exp(-0.5 * ((log_cycle - centre) / _RHYTHM_WIDTH) ** 2)
        own = np.tensordot(near, np.array(counts)[known], axes=1) if known.any() else total
        own, everyone = (x @ kernel / np.maximum(x.sum(1, keepdims=True), 1e-9) for x in (own, total))
        p = (1 - _SHARED) * own + _SHARED * everyone
        found.append((1 - _FLOOR) * p / p.sum(1, keepdims=True) + _FLOOR / longest)
    return np.log(found).astype(np.float32)


def viterbi(log_p_TxS: ArrayLike, log_duration_KxSxD: ArrayLike, duration_weight: float = 1.0) -> np.ndarray:
    """The likeliest states (T,) int8 in the order S1, systole, S2, diastole, S1, ... with explicit durations.

    Maximises the sum over frames of log_p and over states of duration_weight times the log-probability of their
    duration in the rhythm of their cycle, one of K; a rhythm that changes where S1 begins costs -log _CHANGE. The
    recording cuts its first and last state, which lasted at least as long as is seen: those have the probability of
    that (in a stationary rhythm this is exact: a cut state's seen duration d has a probability proportional to
    P(D >= d), whatever the state).
    An explicit-duration HMM as Schmidt et al. 2010 (doi:10.1088/0967-3334/31/4/004) use for heart sounds, and as
    Springer et al. 2016 do with durations that depend on the heart rate, which is found here along with the states.

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
        # Kept near 0, so that float32 is as exact at the end of a long recording as at its beginning.
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
    """The trivial answer (T,) int8, for comparison: told the recording's own rate and nothing else.

    Cycles as long as the truth's median one, from the first frame on, divided as the training durations are on
    average; of a truth without a whole cycle, as long as the training's.
    """
    truth, p = np.asarray(truth_T), np.exp(np.asarray(log_duration_KxSxD, np.float64))
    p = p.reshape(-1, *p.shape[-2:]).mean(0)
    mean = (p * np.arange(1, p.shape[1] + 1)).sum(1) / p.sum(1)
    cycles = _cycles(_onsets(truth, S1), truth)
    length = np.median(cycles) if len(cycles) else mean.sum()
    phase = (np.arange(len(truth)) + 0.5) / length % 1
    ends = np.cumsum(mean)[:-1] / mean.sum()
    return (np.searchsorted(ends, phase, side="right") + 1).astype(np.int8)


# ---------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------


def score(truth_T: ArrayLike, predicted_T: ArrayLike, step_s: float) -> dict[str, float]:
    """What one recording adds to the scores: counts and sums over its annotated frames, for `rates`.

    An onset of S1 or S2 is right when one of the same sound is predicted within the tolerance; each is used once.
    The state with which an annotated stretch begins has no onset there, it is cut; a predicted onset outside the
    stretches, or as near to their edges as the tolerance, is neither right nor wrong unless it meets a true one.
    Cycles are those from S1 to S1 whose two onsets are both found within the wider tolerance.

    Args: truth_T, predicted_T: states of the same frames.
    Raises:
      ValueError: the lengths differ.
    """
    truth, predicted = np.asarray(truth_T), np.asarray(predicted_T)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise ValueError(f"predicted_T: need as many frames as truth_T, {truth.shape}, got {predicted.shape}")
    known = truth != UNANNOTATED
    sums: dict[str, float] = {"frames": known.sum(), "frames_right": (known & (truth == predicted)).sum()}
    for state in (S1, SYSTOLE, S2, DIASTOLE):
        is_so, called = known & (truth == state), known & (predicted == state)
        sums |= _counted(STATE_NAMES[state], (is_so & called).sum(), called.sum(), is_so.sum())
    for sound in (S1, S2):
        true, found = _onsets(truth, sound, cut=True), _onsets(predicted, sound)
        for tolerance_ms in TOLERANCES_MS:
            near = int(tolerance_ms / 1000 / step_s + 1e-6)
            pairs = _matched(true, found, near)
            wrong = [p for p in np.setdiff1d(found, list(pairs.values())) if _inside(known, p - near - 1, p + near)]
            name = f"{STATE_NAMES[sound]}_onset_{tolerance_ms}ms"
            sums |= _counted(name, len(pairs), len(pairs) + len(wrong), len(true))
    true, found = _onsets(truth, S1, cut=True), _onsets(predicted, S1)
    pairs = _matched(true, found, int(TOLERANCES_MS[-1] / 1000 / step_s + 1e-6))
    errors = [
        abs((pairs[b] - pairs[a]) - (b - a))
        for a, b in itertools.pairwise(true.tolist())
        if a in pairs and b in pairs and _inside(known, a, b)
    ]
    sums |= {"cycles": len(errors), "cycle_error_ms_sum": sum(errors) * step_s * 1000}
    medians = [np.median(cycles) * step_s for onsets in (true, found) if len(cycles := _cycles(onsets, truth))]
    both = len(medians) == 2
    sums |= {"heart_rates": both, "heart_rate_error_sum": abs(60 / medians[1] - 60 / medians[0]) if both else 0}
    return {name: float(value) for name, value in sums.items()}


def score_binary(wanted_T: ArrayLike, predicted_T: ArrayLike) -> dict[str, float]:
    """As `score`, for a binary target: wanted_T as `target_frames` gives it, predicted_T 0 or 1."""
    wanted, predicted = np.asarray(wanted_T), np.asarray(predicted_T) > 0
    known, on = wanted >= 0, wanted > 0
    sums = {"frames": known.sum(), "frames_right": (known & (on == predicted)).sum()}
    sums |= _counted("on", (on & predicted).sum(), (known & predicted).sum(), on.sum())
    return {name: float(value) for name, value in sums.items()}


def rates(sums: Mapping[str, Any]) -> dict[str, Any]:
    """The scores that the counts and sums of `score` give, of one recording or added up over many; NaN if undefined.

    frame_accuracy; f1_<state> and f1_mean over frames; onset_f1_<tolerance>, also of S1 and S2 alone, and their
    recall and precision at the narrower tolerance; cycle_error_ms, mean absolute error of a cycle's length;
    heart_rate_error, mean over recordings of the absolute error in beats/min of the median cycle's rate. Of a binary
    target: frame_accuracy, and f1, recall and precision of the frames where it holds.
    """

    def f1(*names: str) -> Any:
        right, called, true = (sum(sums[f"{name}_{k}"] for name in names) for k in ("right", "called", "true"))
        return metrics.ratio(2 * right, called + true)

    found = {"frame_accuracy": metrics.ratio(sums["frames_right"], sums["frames"])}
    if "on_true" in sums:
        found |= {"f1": f1("on"), "recall": metrics.ratio(sums["on_right"], sums["on_true"])}
        found |= {"precision": metrics.ratio(sums["on_right"], sums["on_called"])}
        return {name: value if np.ndim(value) else float(value) for name, value in found.items()}
    for ms in TOLERANCES_MS:
        found[f"onset_f1_{ms}ms"] = f1(*(f"{sound}_onset_{ms}ms" for sound in ("S1", "S2")))
    narrow = f"onset_{TOLERANCES_MS[0]}ms"
    right, called, true = (sums[f"S1_{narrow}_{k}"] + sums[f"S2_{narrow}_{k}"] for k in ("right", "called", "true"))
    name = f"{TOLERANCES_MS[0]}ms"
    found |= {f"onset_recall_{name}": metrics.ratio(right, true)}
    found |= {f"onset_precision_{name}": metrics.ratio(right, called)}
    found |= {f"{sound}_onset_f1_{name}": f1(f"{sound}_{narrow}") for sound in ("S1", "S2")}
    of_states = {f"f1_{state}": f1(state) for state in STATE_NAMES[1:]}
    found |= of_states | {"f1_mean": sum(of_states.values()) / 4}
    found["cycle_error_ms"] = metrics.ratio(sums["cycle_error_ms_sum"], sums["cycles"])
    found["heart_rate_error"] = metrics.ratio(sums["heart_rate_error_sum"], sums["heart_rates"])
    return {name: value if np.ndim(value) else float(value) for name, value in found.items()}


def summarise(
    scores: Sequence[Mapping[str, float]],
    persons: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    databases: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The scores of many recordings with 95 % intervals over people, {metric: {"value", "low", "high"}}, None for NaN.

    Metrics as in `rates`, of all recordings' counts together; `<metric>_by_recording` is the mean over recordings
    of their own frame accuracy and onset F1. Intervals as in `metrics.judge`.

    Args: scores: of `score`, one a recording; persons: who was recorded; databases: within which people are drawn.
    Raises:
      ValueError: no recordings, or lengths that differ.
    """
    if not scores:
        raise ValueError("scores: no recordings to judge")
    metrics.same_length(scores=scores, persons=persons)
    weights = metrics.draw_people(persons, databases or ["" for _ in persons], resamples, seed)
    if len(set(persons)) < 2:
        weights = weights[:0]
    weights = np.concatenate([np.ones((1, len(scores))), weights])
    drawn = rates({k: weights @ np.array([s[k] for s in scores]) for k in scores[0]})
    of_recordings = rates({k: np.array([s[k] for s in scores]) for k in scores[0]})
    for name in ("frame_accuracy", f"onset_f1_{TOLERANCES_MS[0]}ms"):
        if name not in of_recordings:
            continue
        own = of_recordings[name]
        defined = np.isfinite(own)
        drawn[f"{name}_by_recording"] = metrics.ratio(weights @ np.where(defined, own, 0), weights @ defined)
    return metrics.json_ready({k: metrics.with_interval(v[0], v[1:]) for k, v in drawn.items()})


def best_median_worst(scores: Sequence[Mapping[str, float]]) -> list[int]:
    """Which recordings to look at, by onset F1, then frame accuracy; of less than three recordings all."""
    found = rates({k: np.array([s[k] for s in scores]) for k in scores[0]}) if scores else {}
    if not found:
        return []
    accuracy, f1 = found["frame_accuracy"], found[f"onset_f1_{TOLERANCES_MS[0]}ms"]
    order = [int(i) for i in np.lexsort((-accuracy, -f1)) if np.isfinite(f1[i])]
    return order if len(order) < 3 else [order[0], order[len(order) // 2], order[-1]]


def _counted(name: str, right: Any, called: Any, true: Any) -> dict[str, float]:
    return {f"{name}_right": right, f"{name}_called": called, f"{name}_true": true}


def _onsets(states: np.ndarray, state: int, cut: bool = False) -> np.ndarray:
    """Frames where `state` begins; cut: not where the stretch does too."""
    begins = (states[1:] == state) & (states[:-1] != state)
    if cut:
        begins &= states[:-1] != UNANNOTATED
    return np.flatnonzero(begins) + 1


def _matched(true: np.ndarray, found: np.ndarray, near: int) -> dict[int, int]:
    """True -> found onset, as many pairs at most `near` frames apart as there can be."""
    pairs, i, j = {}, 0, 0
    while i < len(true) and j < len(found):
        if abs(true[i] - found[j]) <= near:
            pairs[int(true[i])] = int(found[j])
            i, j = i + 1, j + 1
        elif found[j] < true[i]:
            j += 1
        else:
            i += 1
    return pairs


def _inside(known: np.ndarray, first: int, last: int) -> bool:
    return bool(first >= 0 and last < len(known) and known[first : last + 1].all())


def _cycles(onsets: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Frames from onset to onset, of those in one annotated stretch, and not at its cut beginning."""
    known = truth != UNANNOTATED
    return np.array([b - a for a, b in itertools.pairwise(onsets) if _inside(known, a - 1, b)])
