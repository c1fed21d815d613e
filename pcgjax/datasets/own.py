"""What the readers of one's own recordings share: a file as a `Recording`, and words for classes as labels."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Collection, Mapping

from pcgjax.datasets import DatasetError, Problem, Recording, Span, audio
from pcgjax.datasets.annotations import noted_annotations
from pcgjax.datasets.sources import SourceError
from pcgjax.datasets.tables import relative

NEGATIVE = frozenset(("0", "-1", "no", "n", "false", "normal", "absent", "negative", "healthy", "none", "control"))
POSITIVE = frozenset(("1", "yes", "y", "true", "abnormal", "present", "positive", "pathological", "diseased", "sick"))
UNKNOWN_PERSONS = (
    "persons: who was recorded is not known, so each recording counts as another person; recordings of one person may "
    "lie in training and test, and scores may be too high: give {fix}"
)


def binary(words: Collection[str], where: str) -> dict[str, str]:
    """{word: "0" or "1"} of the words that one column or the names of folders use for classes; empty words are none.

    One word for normal (NEGATIVE) makes all others 1, one for abnormal (POSITIVE) makes the only other 0.

    Raises:
      DatasetError: which class is the positive one cannot be told.
    """
    words = sorted({word for word in words if word})
    negative = [word for word in words if word.lower() in NEGATIVE]
    positive = [word for word in words if word.lower() in POSITIVE]
    if not negative and len(words) == 2 and len(positive) == 1:
        negative = [word for word in words if word not in positive]
    if len(words) > 1 and not negative:
        shown = ", ".join(words[:8]) + (", ..." if len(words) > 8 else "")
        raise DatasetError(
            f"{where}: which of the classes {shown} is the normal one? Name it normal, absent, negative or 0"
        )
    if len(words) == 1 and not (negative or positive):
        raise DatasetError(f"{where}: every recording is of class {words[0]!r}; two classes are needed")
    return {word: "0" if word in negative else "1" for word in words}


def recording(
    path: pathlib.Path, source: pathlib.Path, problems: list[Problem], *, id: str, database: str, person: str = "",
    labels: Mapping[str, str] | None = None, annotation: pathlib.Path | None = None,
    excerpt_s: tuple[float, float] | None = None,
) -> Recording | None:  # fmt: skip
    """One file as a recording; None, and an entry in `problems`, where it cannot be used.

    source: the folder that paths in problems are relative to; person: "" where not known; annotation: a .tsv in
    CirCor's layout, by default the one beside the file, if any; excerpt_s: (start_s, end_s), the part that counts.
    """
    try:
        rate_hz, frames, _ = audio.header(path)
    except audio.AudioError as error:
        problems.append(Problem(relative(path, source), str(error)))
        return None
    duration_s = frames / rate_hz
    if excerpt_s is not None:
        start_s, end_s = excerpt_s[0], min(excerpt_s[1], duration_s)
        if not 0 <= start_s <= end_s - audio.SHORTEST_S:
            reason = (
                f"excerpt: from {start_s:g} to {excerpt_s[1]:g} s of a file of {duration_s:.3f} s: at least "
                f"{audio.SHORTEST_S} s are needed; mend the table"
            )
            problems.append(Problem(relative(path, source), reason))
            return None
        excerpt_s = (start_s, end_s)
    annotations, notes = _annotations(annotation or path.with_suffix(".tsv"), annotation is not None, duration_s,
                                      source, problems)  # fmt: skip
    if excerpt_s is not None:
        annotations = tuple(
            (max(start, excerpt_s[0]) - excerpt_s[0], min(end, excerpt_s[1]) - excerpt_s[0], state)
            for start, end, state in annotations if end > excerpt_s[0] and start < excerpt_s[1]
        )  # fmt: skip
    return Recording(
        id=id, person=person or id, person_known=bool(person), database=database, rate_hz=rate_hz,
        labels=dict(labels or {}), annotations=annotations, path=path, notes=notes, excerpt_s=excerpt_s,
    )  # fmt: skip


def _annotations(
    tsv: pathlib.Path, asked: bool, duration_s: float, source: pathlib.Path, problems: list[Problem]
) -> tuple[tuple[Span, ...], tuple[str, ...]]:
    if not asked and (not os.path.lexists(tsv) or tsv.is_dir()):
        return (), ()
    try:
        annotations, notes = noted_annotations(tsv, duration_s)
        problems += [Problem(relative(tsv, source), note, True) for note in notes]
        return annotations, notes
    except SourceError as error:
        problems.append(Problem(relative(tsv, source), f"{error}, so no annotations"))
    except ValueError as error:
        problems.append(Problem(relative(tsv, source), f"annotation: {error}"))
    return (), ()


def seconds(text: str) -> float:
    """A number of seconds as tables write it, with a point or a comma.

    Raises:
      ValueError: none, or not finite.
    """
    value = float(text.replace(",", "."))
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value
