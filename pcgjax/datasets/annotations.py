"""CirCor's .tsv annotations, read and checked: a line an interval, with start, end (seconds) and state."""

from __future__ import annotations

import math
import operator
import pathlib

from pcgjax.datasets import Span

STATES = frozenset(range(5))
SLACK_S = 0.005  # neighbours in the published .tsv files overlap by up to 1 ms, from rounding


def read_annotations(path: pathlib.Path, duration_s: float) -> tuple[Span, ...]:
    """The intervals of a .tsv file, state 0 where not annotated, clipped to the recording's `duration_s`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: what is wrong with the file, and in which line.
    """
    raw = read_bytes(path)
    if (quick := _sound_annotations(raw, duration_s)) is not None:
        return quick
    text = raw.decode("latin-1")
    lines = text.splitlines()
    intervals: list[Span] = []
    before_s = 0.0
    for number, line in enumerate(lines, 1):
        cells = line.split()
        if not cells:
            continue
        try:
            start_s, end_s, state = map(float, cells)
        except ValueError:
            raise ValueError(f"line {number} must be start, end and state as numbers, is {line.strip()!r}") from None
        if state not in STATES:
            raise ValueError(f"line {number}: unknown state {cells[2]!r}; known are 0 to 4")
        # A comparison with nan is false, so this chain refuses that too.
        if not before_s - SLACK_S <= start_s <= end_s <= duration_s + SLACK_S:
            if start_s < before_s - SLACK_S:
                why = f"it starts at {start_s} s, before the previous end at {before_s} s"
            elif duration_s + SLACK_S < end_s < math.inf:
                why = f"it ends at {end_s} s, the recording at {duration_s:.3f} s"
            else:
                why = f"the interval ends at {end_s} s, before its start at {start_s} s"
            raise ValueError(f"line {number}: {why}")
        if start_s < before_s:
            start_s = before_s
        if end_s > duration_s:
            end_s = duration_s
        if start_s < end_s:
            intervals.append((start_s, end_s, int(state)))
            before_s = end_s
    return tuple(intervals)


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


def read_bytes(path: pathlib.Path) -> bytes:
    """The file's bytes, read without buffering, which would take longer than reading them.

    Raises:
      FileNotFoundError: no such file.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except IsADirectoryError:
        raise FileNotFoundError(path) from None
