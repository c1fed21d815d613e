"""Any folder of audio files without labels, for pre-training or to be segmented."""

from __future__ import annotations

import os
import pathlib

from pcgjax.datasets import Problem, Recording, Span, audio
from pcgjax.datasets.annotations import noted_annotations
from pcgjax.datasets.sources import SourceError
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
    for path in _audio_files(source, problems):
        where = pathlib.PurePosixPath(relative(path, source))
        record = str(where.with_suffix(""))
        if record in recordings:
            reason = f"duplicate: {recordings[record].path.name} has the same name and counts; rename one of the two"
            problems.append(Problem(str(where), reason))
            continue
        try:
            rate_hz, frames, _ = audio.header(path)
        except audio.AudioError as error:
            problems.append(Problem(str(where), str(error)))
            continue
        annotations: tuple[Span, ...] = ()
        notes: tuple[str, ...] = ()
        tsv = path.with_suffix(".tsv")
        if os.path.lexists(tsv) and not tsv.is_dir():
            try:
                annotations, notes = noted_annotations(tsv, frames / rate_hz)
                problems += [Problem(relative(tsv, source), note, True) for note in notes]
            except SourceError as error:
                problems.append(Problem(relative(tsv, source), f"{error}, so no annotations"))
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
            notes=notes,
        )
    return list(recordings.values()), problems


def _audio_files(source: pathlib.Path, problems: list[Problem]) -> list[pathlib.Path]:
    """All visible sound files below `source`; folders that cannot be listed, and links to folders, are problems."""

    def unlisted(error: OSError) -> None:
        reason = f"unreadable: {error.strerror or error}"
        problems.append(Problem(relative(pathlib.Path(error.filename or source), source), reason))

    paths = []
    for parent, folders, names in os.walk(source, onerror=unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                reason = "link: a link to a folder is not followed; give that folder as --source, or copy it"
                problems.append(Problem(relative(pathlib.Path(parent, name), source), reason))
        paths += [pathlib.Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
