"""States of the cardiac cycle as frames and as spans, what a head learns of them, and CirCor's .tsv files.

A frame is `step_s` seconds long; frame i covers [i, i + 1) steps and has the state of its centre. States are
numbered as in `pcgjax.datasets`. Axes here and in `decoding` and `scores`: T frames; S the four states S1, systole,
S2, diastole, in this order; D durations of 1 to D frames.
"""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from pcgjax.datasets import S1, S2, SYSTOLE, UNANNOTATED, Span
from pcgjax.datasets.annotations import SLACK_S, read_annotations
from pcgjax.runtime import files

STATE_NAMES = ("unannotated", "S1", "systole", "S2", "diastole")
TARGETS = ("sounds", "cycle", "annotated", "states")


def frame_states(annotations: Iterable[Span], frames: int, step_s: float) -> np.ndarray:
    """(frames,) int8: the state at each frame's centre, 0 where there is no annotation."""
    states = np.zeros(frames, np.int8)
    for start_s, end_s, state in annotations:
        # The first frame whose centre is not before; rounded, as 0.03 / 0.02 must be 1.5 and not a hair more.
        first, stop = (max(0, math.ceil(round(edge / step_s - 0.5, 6))) for edge in (start_s, end_s))
        states[first:stop] = state
    return states


def state_spans(states_T: ArrayLike, step_s: float, duration_s: float = math.inf) -> list[Span]:
    """(start_s, end_s, state) of each run of equal frames, unannotated ones too.

    duration_s: the recording's; the last frame may reach past its end, a span must not.
    """
    states = np.asarray(states_T)
    edges = np.r_[0, np.flatnonzero(np.diff(states)) + 1, len(states)]
    spans = [
        (float(first * step_s), float(min(stop * step_s, duration_s)), int(states[first]))
        for first, stop in itertools.pairwise(edges)
        if first < stop
    ]
    return [span for span in spans if span[0] < span[1]]


def state_onsets(states_T: np.ndarray, state: int, cut: bool = False) -> np.ndarray:
    """Frames where `state` begins; with `cut`, without those where an annotated stretch begins too."""
    begins = (states_T[1:] == state) & (states_T[:-1] != state)
    if cut:
        begins &= states_T[:-1] != UNANNOTATED
    return np.flatnonzero(begins) + 1


def whole_cycles(onsets: np.ndarray, truth_T: np.ndarray) -> np.ndarray:
    """Frames from onset to onset, of those in one annotated stretch, and not at its cut beginning."""
    known = truth_T != UNANNOTATED
    return np.array([b - a for a, b in itertools.pairwise(onsets) if all_known(known, a - 1, b)])


def all_known(known_T: np.ndarray, first: int, last: int) -> bool:
    """Whether the frames `first` to `last`, both included, all exist and are annotated."""
    return bool(first >= 0 and last < len(known_T) and known_T[first : last + 1].all())


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
        learned = np.isin(states, (S1, S2))
    elif target == "cycle":
        learned = np.isin(states, (S1, SYSTOLE, S2))
    elif target == "states":
        learned = states - 1
    else:
        raise ValueError(f"target: need one of {', '.join(TARGETS)}, got {target!r}")
    return np.where(states == UNANNOTATED, -1, learned).astype(np.int8)


def threshold_spans(
    p_T: ArrayLike, threshold: float, shortest_on_s: float, shortest_off_s: float, step_s: float
) -> list[tuple[float, float]]:
    """(start_s, end_s) where a binary head's probability is >= threshold.

    Gaps shorter than shortest_off_s between two spans are closed, then spans shorter than shortest_on_s dropped.
    """
    on = np.asarray(p_T) >= threshold
    edges = np.flatnonzero(np.diff(on, prepend=False, append=False)).reshape(-1, 2)
    stretches: list[tuple[int, int]] = []
    for first, stop in edges.tolist():
        if stretches and (first - stretches[-1][1]) * step_s < shortest_off_s - 1e-9:
            first = stretches.pop()[0]
        stretches.append((first, stop))
    return [(a * step_s, b * step_s) for a, b in stretches if (b - a) * step_s >= shortest_on_s - 1e-9]


def write_tsv(spans: Iterable[Span], path: str | pathlib.Path) -> None:
    """Writes spans as CirCor does: start and end in seconds and state (0 for unannotated), separated by tabs."""

    def seconds(value: float) -> str:
        return f"{value:.5f}".rstrip("0").rstrip(".")

    lines = (f"{seconds(start_s)}\t{seconds(end_s)}\t{state}\n" for start_s, end_s, state in spans)
    files.write_text(pathlib.Path(path), "".join(lines))


def read_tsv(path: str | pathlib.Path) -> tuple[Span, ...]:
    """The spans of a file in CirCor's layout, read as its loader does, with the order of the states checked.

    The order is checked only where spans touch: after an unannotated stretch any state may follow.

    Raises:
      FileNotFoundError: no such file.
      ValueError: naming file and line, such as states that do not follow each other.
    """
    path = pathlib.Path(path)
    try:
        spans = read_annotations(path, math.inf)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    numbers = [n for n, line in enumerate(path.read_text("latin-1").splitlines(), 1) if _has_length(line)]
    for number, before, after in zip(numbers[1:], spans[:-1], spans[1:], strict=True):
        if touch(before, after) and UNANNOTATED not in (before[2], after[2]) and after[2] != before[2] % 4 + 1:
            raise ValueError(
                f"{path}, line {number}: {STATE_NAMES[after[2]]} follows {STATE_NAMES[before[2]]}; the order is "
                "S1, systole, S2, diastole: correct the state, or put an unannotated stretch (0) between"
            )
    return spans


def _has_length(line: str) -> bool:
    cells = line.split()
    return bool(cells) and float(cells[0]) < float(cells[1])


def touch(before: Span, after: Span) -> bool:
    """Whether `after` follows `before` without a gap, as far as the files' rounding lets one tell."""
    return after[0] - before[1] <= SLACK_S
