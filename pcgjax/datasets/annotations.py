"""CirCor's .tsv annotations, read and checked: a line an interval, with start, end (seconds) and state."""

from __future__ import annotations

import itertools
import math
import operator
import pathlib

from pcgjax.datasets import DIASTOLE, S1, S2, SYSTOLE, UNANNOTATED, Span
from pcgjax.datasets.sources import SourceError, read_bytes, text_of

STATES = frozenset(range(5))
SLACK_S = 0.005  # neighbours in the published .tsv files overlap by up to 1 ms, from rounding


def read_annotations(path: pathlib.Path, duration_s: float) -> tuple[Span, ...]:
    """The intervals of a .tsv file, state 0 where not annotated, clipped to the recording's `duration_s`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: what is wrong with the file, and in which line.
    """
    try:
        raw = read_bytes(path)
    except SourceError as error:
        raise (FileNotFoundError(path) if str(error).startswith("missing") else error) from None
    spans, lines, _ = _spans(raw, duration_s)
    before_s = 0.0
    for number, start_s, end_s, _ in lines:
        if start_s < before_s - SLACK_S:
            raise ValueError(f"line {number}: it starts at {start_s} s, before the previous end at {before_s} s")
        if start_s < end_s:
            before_s = max(before_s, end_s)
    return spans


def noted_annotations(path: pathlib.Path, duration_s: float) -> tuple[tuple[Span, ...], tuple[str, ...]]:
    """As `read_annotations`, where lines may also be out of order, repeat and overlap: (spans, notes on this).

    Where lines contradict each other the recording counts as not annotated.

    Raises:
      SourceError: the file is missing or unreadable.
      ValueError: what is wrong with the file, and in which line.
    """
    spans, lines, notes = _spans(read_bytes(path), duration_s)
    lines = [line for line in lines if line[1] < line[2]]
    ends = [0.0, *itertools.accumulate((end_s for _, _, end_s, _ in lines), max)]
    early = [line for line, before_s in zip(lines, ends, strict=False) if line[1] < before_s - SLACK_S]
    if not early:
        return spans, notes
    number, start_s, _, _ = early[0]
    before_s = ends[lines.index(early[0])]
    spans, clash_s = _resolved(lines)
    clash = f"the {clash_s:.3f} s in which lines contradict each other count as not annotated" if clash_s else ""
    why = f"annotation: line {number}: it starts at {start_s} s, before the previous end at {before_s} s; "
    return spans, (*notes, f"{why}lines are sorted{', ' * bool(clash)}{clash}")


_Line = tuple[int, float, float, int]  # its number, start_s, end_s, state


def _spans(raw: bytes, duration_s: float) -> tuple[tuple[Span, ...], list[_Line], tuple[str, ...]]:
    """(spans, lines, notes) of a file; the spans are right where the lines are in order; no lines where all is sound.

    Raises:
      ValueError: a line that no order makes right.
    """
    if not raw.strip():
        raise ValueError("the file is empty")
    if (quick := _sound_annotations(raw, duration_s)) is not None:
        return quick, [], ()
    lines: list[_Line] = []
    intervals: list[Span] = []
    before_s, commas = 0.0, 0
    for number, line in enumerate(text_of(raw).splitlines(), 1):
        cells = line.split()
        if not cells:
            continue
        if "," in line and len(cells) == 3:
            cells = [cell.replace(",", ".") for cell in cells]
            commas += 1
        try:
            start_s, end_s, state = map(float, cells)
        except ValueError:
            raise ValueError(f"line {number} must be start, end and state as numbers, is {line.strip()!r}") from None
        if state not in STATES:
            raise ValueError(f"line {number}: unknown state {cells[2]!r}; known are 0 to 4")
        # A comparison with nan is false, so this chain refuses that too.
        if not -SLACK_S <= start_s <= end_s <= duration_s + SLACK_S:
            if start_s < -SLACK_S:
                why = f"it starts at {start_s} s, before the recording"
            elif duration_s + SLACK_S < end_s < math.inf:
                why = f"it ends at {end_s} s, the recording at {duration_s:.3f} s"
            else:
                why = f"the interval ends at {end_s} s, before its start at {start_s} s"
            raise ValueError(f"line {number}: {why}")
        start_s, end_s = max(start_s, 0.0), min(end_s, duration_s)
        lines.append((number, start_s, end_s, int(state)))
        if max(start_s, before_s) < end_s:
            intervals.append((max(start_s, before_s), end_s, int(state)))
            before_s = end_s
    notes = (f"annotation: {commas} lines have decimal commas, read as points",) if commas else ()
    return tuple(intervals), lines, notes


def _resolved(lines: list[_Line]) -> tuple[tuple[Span, ...], float]:
    """(spans in order, seconds in which lines contradict each other) of lines in any order that may overlap."""
    edges = sorted({time_s: None for _, start_s, end_s, _ in lines for time_s in (start_s, end_s)})
    changes: dict[float, list[tuple[int, int]]] = {edge: [] for edge in edges}
    for _, start_s, end_s, state in lines:
        if start_s < end_s:
            changes[start_s].append((state, 1))
            changes[end_s].append((state, -1))
    open_lines, spans, clash_s = [0] * 5, list[Span](), 0.0
    for start_s, end_s in itertools.pairwise(edges):
        for state, change in changes[start_s]:
            open_lines[state] += change
        states = [state for state in (S1, SYSTOLE, S2, DIASTOLE) if open_lines[state]]
        if len(states) > 1 and end_s - start_s <= SLACK_S and spans and spans[-1][1] == start_s:
            states = [spans[-1][2]]  # rounded
        elif len(states) > 1:
            clash_s, states = clash_s + end_s - start_s, [UNANNOTATED]
        elif not states and open_lines[UNANNOTATED]:
            states = [UNANNOTATED]
        for state in states:
            if spans and spans[-1][1:] == (start_s, state):
                spans[-1] = spans[-1][0], end_s, state
            else:
                spans.append((start_s, end_s, state))
    return tuple(spans), clash_s


_COMMAS = bytes.maketrans(b"\t\n", b",,")


def _sound_annotations(raw: bytes, duration_s: float) -> tuple[Span, ...] | None:
    """The intervals of a file without irregularities, all lines at once; None for any other."""
    import orjson

    raw = raw.rstrip(b"\n")
    lines = raw.count(b"\n") + 1
    if raw.translate(None, b"0123456789.") + b"\n" != b"\t\t\n" * lines:
        return None
    try:
        numbers = orjson.loads(b"[" + raw.translate(_COMMAS) + b"]")
    except ValueError:
        return None
    starts, ends, states = numbers[0::3], numbers[1::3], numbers[2::3]
    befores = [0.0, *ends[:-1]]
    if max(map(operator.sub, befores, starts)) > SLACK_S or max(ends) > duration_s or not STATES.issuperset(states):
        return None
    starts = [*map(max, starts, befores)]
    if not all(map(operator.lt, starts, ends)):
        return None
    return tuple(zip(map(float, starts), map(float, ends), map(int, states), strict=True))
