"""Heart-sound data sets in their official layouts: a folder on disk -> list of `Recording`.

Every loader has the one signature `load(source) -> (recordings, problems)` and reads tables, annotations and
audio headers, never samples. What cannot be used is not dropped in silence: it becomes a `Problem`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from pcgjax.datasets.sources import printable

# The states of a cardiac cycle, numbered as in CirCor's .tsv files.
UNANNOTATED, S1, SYSTOLE, S2, DIASTOLE = range(5)
Span = tuple[float, float, int]  # start_s, end_s, state
NAMES = ("cinc2016", "circor", "pascal", "synthetic", "folder", "table")
LABELS = ("none", "folders")


class DatasetError(ValueError):
    """A folder or a table that cannot be read as the named data set; the message says file, field and fix."""


@dataclasses.dataclass(frozen=True, slots=True)
class Recording:
    """One phonocardiogram on disk.

    labels: what the data set says, as text. Two keys are common to all: `abnormal` ("0" or "1") and `murmur`
      ("0" or "1"), each left out where the data set does not say. `class` is the data set's own word.
    annotations: (start_s, end_s, state), in order; state as numbered above. Empty when there are none.
    notes: doubts about what the tables and annotations say, as in `annotation: ...`; those about the audio follow when
      it is read.
    """

    id: str  # unique within the data set, e.g. "a0001", "50782_MV_1"
    person: str  # who was recorded; the record's own id where the data set does not say
    person_known: bool
    database: str  # e.g. "cinc2016-a", "circor", "pascal-b": what "per database" means everywhere
    rate_hz: int
    labels: Mapping[str, str]
    annotations: tuple[Span, ...]
    path: pathlib.Path
    notes: tuple[str, ...] = ()
    excerpt_s: tuple[float, float] | None = None  # (start_s, end_s) of the file, where not all of it counts


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A file or table row that is left out, or with `note` one that is used with a doubt, and why."""

    path: str
    reason: str  # begins with a short kind: "truncated: ...", "silent: ...", "mislabelled: ..."
    note: bool = False


def define_flags() -> None:
    """The flags of commands that read a data set's folder."""
    from absl import flags

    flags.DEFINE_enum("labels", "none", LABELS, "Of --dataset=folder: folders: each folder in --source is a class.")
    flags.DEFINE_string("persons", "", "Of --dataset=folder: a regular expression for a path; its group is the person.")


def with_notes(problems: Iterable[Problem], rows: Iterable[Mapping[str, Any]]) -> list[Problem]:
    """The problems, and after them the notes of recordings' rows ("path", "notes") that are not among them."""
    problems = list(problems)
    listed = {problem.reason for problem in problems if problem.note}
    notes = [Problem(row["path"], note, True) for row in rows for note in row.get("notes", ()) if note not in listed]
    return problems + notes


def load(
    name: str, source: str | pathlib.Path, labels: str = "none", persons: str = ""
) -> tuple[list[Recording], list[Problem]]:
    """The recordings of data set `name` below `source`, sorted by id, and what was left out.

    labels, persons: of data set `folder`, as its loader has them.

    Raises:
      DatasetError: unknown name, missing folder or table, or no recording found.
    """
    if name not in NAMES:
        raise DatasetError(f"unknown dataset {name!r}: choose one of {', '.join(NAMES)}")
    source = pathlib.Path(source)
    loader = importlib.import_module(f"pcgjax.datasets.{name}")
    if name == "table" and not source.is_file():
        what = "a folder" if source.is_dir() else "no such file"
        raise DatasetError(f"{source}: {what}; --source takes the table that names the recordings")
    if not source.is_dir() and name not in ("synthetic", "table"):
        raise DatasetError(f"{source}: no such folder; --source takes the folder that holds the {name} files")
    if name != "folder" and (labels != "none" or persons):
        raise DatasetError(f"--labels, --persons: of --dataset=folder alone; {name} says both itself")
    more = {"labels": labels, "persons": persons} if name == "folder" else {}
    recordings, problems = loader.load(source, **more)
    if not recordings:
        listed = "".join(f"\n  {printable(p.path)}: {printable(p.reason)}" for p in problems[:5])
        raise DatasetError(f"{source}: no usable {name} recording; expected {loader.LAYOUT}{listed}")
    return sorted(map(_printable, recordings), key=lambda r: r.id), [
        dataclasses.replace(problem, path=printable(problem.path), reason=printable(problem.reason))
        for problem in problems
    ]


def _printable(recording: Recording) -> Recording:
    """The recording with names as text that a file can hold, as `printable` writes them; the path stays."""
    if recording.id.isascii() and recording.person.isascii():
        return recording
    return dataclasses.replace(recording, id=printable(recording.id), person=printable(recording.person))
