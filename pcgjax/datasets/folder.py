"""Any folder of audio files without labels, for pre-training or to be segmented."""

from __future__ import annotations

import os
import pathlib

from pcgjax.datasets import Problem, Recording, Span, audio
from pcgjax.datasets.annotations import read_annotations
from pcgjax.datasets.tables import relative

LAYOUT = "a tree of .wav and .flac files, a folder for each person or all beside each other"
SUFFIXES = (".wav", ".flac")


def load(source: pathlib.Path) -> tuple[list[Recording], list[Problem]]:
    """The recordings of `source` and the folders below it: no labels, `id` the path from `source` without suffix.

    Each folder directly in `source` is one person, with all files below it; who was recorded in the files of `source`
    itself is not known. Annotations: of a .tsv file beside the audio file, in CirCor's layout.
    """
    source = pathlib.Path(os.path.abspath(source))
    recordings: dict[str, Recording] = {}
    problems: list[Problem] = []
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.is_dir():
            continue
        where = pathlib.PurePosixPath(relative(path, source))
        record = str(where.with_suffix(""))
        if record in recordings:
            reason = f"duplicate: {recordings[record].path.name} has the same name and counts; rename one of the two"
            problems.append(Problem(str(where), reason))
            continue
        try:
            rate_hz, frames, _ = audio.header(path)
        except (audio.AudioError, OSError) as error:
            problems.append(Problem(str(where), str(error)))
            continue
        annotations: tuple[Span, ...] = ()
        tsv = path.with_suffix(".tsv")
        try:
            annotations = read_annotations(tsv, frames / rate_hz)
        except FileNotFoundError:
            pass
        except ValueError as error:
            problems.append(Problem(relative(tsv, source), f"annotation: {error}"))
        known = len(where.parts) > 1
        recordings[record] = Recording(
            id=record,
            person=f"folder-{where.parts[0]}" if known else record,
            person_known=known,
            database="folder",
            rate_hz=rate_hz,
            labels={},
            annotations=annotations,
            path=path,
        )
    return list(recordings.values()), problems
