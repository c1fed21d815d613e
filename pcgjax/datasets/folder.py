"""Any folder of audio files: without labels, for pre-training or to be segmented, or with a folder a class."""

from __future__ import annotations

import os
import pathlib
import re

from pcgjax.datasets import DatasetError, Problem, Recording
from pcgjax.datasets.own import UNKNOWN_PERSONS, binary, recording
from pcgjax.datasets.tables import relative

LAYOUT = "a tree of .wav and .flac files, a folder a person (with --labels=folders: a class) or all in one"
SUFFIXES = (".wav", ".flac")


def load(source: pathlib.Path, labels: str = "none", persons: str = "") -> tuple[list[Recording], list[Problem]]:
    """The recordings of `source` and the folders below it, `id` the path from `source` without suffix.

    labels: "none": each folder directly in `source` is one person, with all files below it, and who was recorded in the
    files of `source` itself is not known. "folders": each folder directly in `source` is a class; `abnormal` is what
    `own.binary` makes of its name, which is kept as `class`; who was recorded is not known but for `persons`.
    persons: a regular expression; what its first group (else all of it) finds in a file's path from `source` is the
    person. Annotations: of a .tsv file beside the audio file, in CirCor's layout.

    Raises:
      DatasetError: a bad regular expression, one that fits no file, or classes of which none is the normal one.
    """
    source = pathlib.Path(os.path.abspath(source))
    pattern = _pattern(persons)
    recordings: dict[str, Recording] = {}
    problems: list[Problem] = []
    paths = audio_files(source, problems)
    if persons and paths and not any(pattern.search(relative(path, source)) for path in paths):
        raise DatasetError(f"--persons={persons}: fits no path below {source}, as {relative(paths[0], source)}")
    words = {}
    if labels == "folders":
        tops = [pathlib.PurePosixPath(relative(path, source)).parts for path in paths]
        words = binary({parts[0] for parts in tops if len(parts) > 1}, f"{source}, its folders")
    for path in paths:
        where = pathlib.PurePosixPath(relative(path, source))
        record = str(where.with_suffix(""))
        if record in recordings:
            reason = f"duplicate: {recordings[record].path.name} has the same name and counts; rename one of the two"
            problems.append(Problem(str(where), reason))
            continue
        top = where.parts[0] if len(where.parts) > 1 else ""
        if persons:
            found = pattern.search(str(where))
            person = (found[1] if found.re.groups else found[0]) if found else ""
        else:
            person = "" if words else top
        one = recording(
            path, source, problems, id=record, database="folder", person=f"folder-{person}" if person else "",
            labels={"abnormal": words[top], "class": top} if top in words else None,
        )  # fmt: skip
        if one is not None:
            recordings[record] = one
    if words and not all(one.person_known for one in recordings.values()):
        fix = "--persons, a regular expression whose group is the person"
        problems.append(Problem(".", UNKNOWN_PERSONS.format(fix=fix), True))
    return list(recordings.values()), problems


def _pattern(persons: str) -> re.Pattern[str]:
    try:
        return re.compile(persons)
    except re.error as error:
        raise DatasetError(f"--persons={persons}: no regular expression: {error}") from None


def audio_files(source: pathlib.Path, problems: list[Problem]) -> list[pathlib.Path]:
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
