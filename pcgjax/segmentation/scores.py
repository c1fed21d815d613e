"""How well predicted states agree with annotated ones: onsets, frames, cycles, with intervals over people.

Axes as in `states`. An onset may lie off the annotated one by a tolerance, 60 or 100 ms.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pcgjax import metrics
from pcgjax.datasets import DIASTOLE, S1, S2, SYSTOLE, UNANNOTATED
from pcgjax.segmentation.states import STATE_NAMES, all_known, state_onsets, whole_cycles

TOLERANCES_MS = (60, 100)  # of an onset
SEGMENTATION_HEADLINE = ("onset_f1_60ms", "frame_accuracy", "S1_onset_f1_60ms", "S2_onset_f1_60ms")


def score_states(truth_T: ArrayLike, predicted_T: ArrayLike, step_s: float) -> dict[str, float]:
    """What one recording adds to the scores: counts and sums over its annotated frames, for `score_rates`.

    An onset of S1 or S2 is right when one of the same sound is predicted within the tolerance; each is used once.
    The state with which an annotated stretch begins has no onset there, it is cut; a predicted onset outside the
    stretches, or as near to their edges as the tolerance, is neither right nor wrong unless it meets a true one.
    Cycles are those from S1 to S1 whose two onsets are both predicted within the wider tolerance.

    Args: truth_T, predicted_T: states of the same frames, `step_s` seconds apart.
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
        sums |= _counts(STATE_NAMES[state], (is_so & called).sum(), called.sum(), is_so.sum())
    for sound in (S1, S2):
        true_onsets, onsets = state_onsets(truth, sound, cut=True), state_onsets(predicted, sound)
        for tolerance_ms in TOLERANCES_MS:
            near = int(tolerance_ms / 1000 / step_s + 1e-6)
            pairs = _matched(true_onsets, onsets, near)
            unmatched = np.setdiff1d(onsets, list(pairs.values()))
            wrong = [onset for onset in unmatched if all_known(known, onset - near - 1, onset + near)]
            name = f"{STATE_NAMES[sound]}_onset_{tolerance_ms}ms"
            sums |= _counts(name, len(pairs), len(pairs) + len(wrong), len(true_onsets))
    true_onsets, onsets = state_onsets(truth, S1, cut=True), state_onsets(predicted, S1)
    pairs = _matched(true_onsets, onsets, int(TOLERANCES_MS[-1] / 1000 / step_s + 1e-6))
    errors = [
        abs((pairs[b] - pairs[a]) - (b - a))
        for a, b in itertools.pairwise(true_onsets.tolist())
        if a in pairs and b in pairs and all_known(known, a, b)
    ]
    sums |= {"cycles": len(errors), "cycle_error_ms_sum": sum(errors) * step_s * 1000}
    true_cycles, cycles = whole_cycles(true_onsets, truth), whole_cycles(onsets, truth)
    both = len(true_cycles) > 0 and len(cycles) > 0
    rate, true_rate = (60 / float(np.median(x) * step_s) if both else 0.0 for x in (cycles, true_cycles))
    sums |= {"heart_rates": both, "heart_rate_error_sum": abs(rate - true_rate)}
    return {name: float(value) for name, value in sums.items()}


def score_binary(target_T: ArrayLike, predicted_T: ArrayLike) -> dict[str, float]:
    """As `score_states`, for a binary target: target_T as `target_frames` gives it, predicted_T 0 or 1."""
    target, predicted = np.asarray(target_T), np.asarray(predicted_T) > 0
    known, on = target >= 0, target > 0
    sums = {"frames": known.sum(), "frames_right": (known & (on == predicted)).sum()}
    sums |= _counts("on", (on & predicted).sum(), (known & predicted).sum(), on.sum())
    return {name: float(value) for name, value in sums.items()}


def score_rates(sums: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of one recording's counts and sums, or of many recordings' added up; NaN if undefined.

    Args: sums: as `score_states` or `score_binary` gives them.
    Returns: {metric: float, or an array where the sums are arrays}:

    frame_accuracy; f1_<state> and f1_mean over frames; onset_f1_<tolerance>, also of S1 and S2 alone, and their
    recall and precision at the narrower tolerance; cycle_error_ms, mean absolute error of a cycle's length;
    heart_rate_error, mean over recordings of the absolute error in beats/min of the median cycle's rate. Of a binary
    target: frame_accuracy, and f1, recall and precision of the frames where it holds.
    """

    def f1(*names: str) -> Any:
        right, called, true = (sum(sums[f"{name}_{k}"] for name in names) for k in ("right", "called", "true"))
        return metrics.ratio(2 * right, called + true)

    scores = {"frame_accuracy": metrics.ratio(sums["frames_right"], sums["frames"])}
    if "on_true" in sums:
        scores |= {"f1": f1("on"), "recall": metrics.ratio(sums["on_right"], sums["on_true"])}
        scores |= {"precision": metrics.ratio(sums["on_right"], sums["on_called"])}
        return {name: value if np.ndim(value) else float(value) for name, value in scores.items()}
    for ms in TOLERANCES_MS:
        scores[f"onset_f1_{ms}ms"] = f1(*(f"{sound}_onset_{ms}ms" for sound in ("S1", "S2")))
    narrow = f"onset_{TOLERANCES_MS[0]}ms"
    right, called, true = (sums[f"S1_{narrow}_{k}"] + sums[f"S2_{narrow}_{k}"] for k in ("right", "called", "true"))
    name = f"{TOLERANCES_MS[0]}ms"
    scores |= {f"onset_recall_{name}": metrics.ratio(right, true)}
    scores |= {f"onset_precision_{name}": metrics.ratio(right, called)}
    scores |= {f"{sound}_onset_f1_{name}": f1(f"{sound}_{narrow}") for sound in ("S1", "S2")}
    of_states = {f"f1_{state}": f1(state) for state in STATE_NAMES[1:]}
    scores |= of_states | {"f1_mean": sum(of_states.values()) / 4}
    scores["cycle_error_ms"] = metrics.ratio(sums["cycle_error_ms_sum"], sums["cycles"])
    scores["heart_rate_error"] = metrics.ratio(sums["heart_rate_error_sum"], sums["heart_rates"])
    return {name: value if np.ndim(value) else float(value) for name, value in scores.items()}


def summarise(
    scores: Sequence[Mapping[str, float]],
    persons: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    databases: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The scores of many recordings with 95 % intervals over people, {metric: {"value", "low", "high"}}, None for NaN.

    Metrics as in `score_rates`, of all recordings' counts together; `<metric>_by_recording` is the mean over recordings
    of their own frame accuracy and onset F1. Intervals as in `metrics.judge`.

    Args:
      scores: of `score_states` or `score_binary`, one a recording.
      persons, databases: who was recorded, and where; people are drawn within their database.
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
    drawn = score_rates({k: weights @ np.array([s[k] for s in scores]) for k in scores[0]})
    of_recordings = score_rates({k: np.array([s[k] for s in scores]) for k in scores[0]})
    for name in ("frame_accuracy", f"onset_f1_{TOLERANCES_MS[0]}ms"):
        if name not in of_recordings:
            continue
        values = of_recordings[name]
        defined = np.isfinite(values)
        drawn[f"{name}_by_recording"] = metrics.ratio(weights @ np.where(defined, values, 0), weights @ defined)
    return metrics.json_ready({k: metrics.with_interval(v[0], v[1:]) for k, v in drawn.items()})


def best_median_worst(scores: Sequence[Mapping[str, float]]) -> list[int]:
    """Indices of the best, median and worst recording, by onset F1, then frame accuracy; of less than three all."""
    if not scores:
        return []
    of_recordings = score_rates({k: np.array([s[k] for s in scores]) for k in scores[0]})
    accuracy, f1 = of_recordings["frame_accuracy"], of_recordings[f"onset_f1_{TOLERANCES_MS[0]}ms"]
    order = [int(i) for i in np.lexsort((-accuracy, -f1)) if np.isfinite(f1[i])]
    return order if len(order) < 3 else [order[0], order[len(order) // 2], order[-1]]


def segmentation_summary(scores: dict) -> str:
    """The main scores of a segmenter's evaluation as a table for a terminal, one line a database.

    Args: scores: as `training.segmenter.judge` writes them to metrics.json.
    """
    baseline = "metronome" if "metronome" in scores else "always"
    shown = ("onset_f1_60ms", "onset_f1_100ms", "frame_accuracy", "f1_mean", "f1")
    names = [name for name in shown if name in scores["test"]]

    def line(title: str, metrics_of: dict) -> str:
        cells = []
        for name in names:
            value, low, high = (metrics_of[name].get(k) for k in ("value", "low", "high"))
            text = "-" if value is None else f"{value:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")
            cells.append(f"{text:22s}")
        return f"{title:26s}" + "".join(cells).rstrip()

    lines = [" " * 26 + "".join(f"{name:22s}" for name in names).rstrip()]
    lines += [line(f"all ({scores['recordings']})", scores["test"]), line(baseline, scores[baseline])]
    for name, of_database in scores["per_database"].items():
        lines.append(line(f"{name} ({of_database['recordings']})", of_database["test"]))
    return "\n".join(lines)


def _counts(name: str, right: Any, called: Any, true: Any) -> dict[str, float]:
    return {f"{name}_right": right, f"{name}_called": called, f"{name}_true": true}


def _matched(true_onsets: np.ndarray, onsets: np.ndarray, near: int) -> dict[int, int]:
    """True onset -> predicted one, as many pairs at most `near` frames apart as there can be."""
    pairs, i, j = {}, 0, 0
    while i < len(true_onsets) and j < len(onsets):
        if abs(true_onsets[i] - onsets[j]) <= near:
            pairs[int(true_onsets[i])] = int(onsets[j])
            i, j = i + 1, j + 1
        elif onsets[j] < true_onsets[i]:
            j += 1
        else:
            i += 1
    return pairs
