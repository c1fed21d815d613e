"""PhysioNet/CinC Challenge 2016 (Liu et al. 2016, doi:10.1088/0967-3334/37/12/2181): databases a to f, 2 kHz."""

from __future__ import annotations

import bisect
import collections
import itertools
import operator
import os
import pathlib
import re

from pcgjax.datasets import (
    DIASTOLE,
    S1,
    S2,
    SYSTOLE,
    UNANNOTATED,
    DatasetError,
    Problem,
    Recording,
    Span,
    audio,
    state_ans,
)
from pcgjax.datasets.sources import Folder, SourceError, read_bytes, text_of
from pcgjax.datasets.tables import read_rows, read_table, relative

LAYOUT = (
    "folders training-a .. training-f (any of them), each with REFERENCE.csv and <record>.wav; validation/ is not "
    "read, its files are copies of training recordings"
)
CLASSES = {"1": "abnormal", "-1": "normal"}  # some repositories invert these
STATES = {
    "S1": S1, "systole": SYSTOLE, "S2": S2, "diastole": DIASTOLE,
    "(N": UNANNOTATED, "N)": UNANNOTATED,  # where noise begins and ends; the next state follows later
}  # fmt: skip
APPENDIX = "online_appendix_training_set.csv"
APPENDIX_CLASS = "class (-1=normal 1=abnormal)"
APPENDIX_SITE = "transducer site on body"


def load(source: pathlib.Path) -> tuple[list[Recording], list[Problem]]:
    """The recordings of `source`, the challenge's folder or one training-x folder.

    Persons are the subjects of database b, the tapes of a, and the records of c. d, e and f do not say; what
    `_same_person` infers for d and e keeps recordings together, but the person counts as unknown.
    Labels: `class`, `abnormal`, and where the tables say `sqi` ("1" good, "0" bad), `diagnosis`, `site`.

    Raises:
      DatasetError: a table that is malformed as a whole.
    """
    source = pathlib.Path(os.path.abspath(source))
    if re.fullmatch("training-[a-f]", source.name):
        folders = [source]
    else:
        folders = sorted(folder for folder in source.glob("training-[a-f]") if folder.is_dir())
    problems: list[Problem] = []
    if not folders:
        return [], problems
    appendix = _appendix(source, problems)
    states = _state_files(source, folders)
    recordings = []
    for folder in folders:
        recordings += _database(folder, source, appendix, states, problems)
    return recordings, problems


def _database(
    folder: pathlib.Path,
    source: pathlib.Path,
    appendix: dict[str, dict[str, str]] | None,
    states: dict[str, pathlib.Path],
    problems: list[Problem],
) -> list[Recording]:
    """The recordings of one training-x folder; what is left out is added to `problems`."""
    there = Folder(folder)
    tables, sqi = _references(there, source, problems)
    primary, labels = next(iter(tables.items()))
    recordings = []
    for record, label in sorted(labels.items()):
        path = there[f"{record}.wav"]
        if label is None:
            continue  # its row is among the problems
        label_of_table = {name: table[record] for name, table in tables.items() if table.get(record)}
        if len(set(label_of_table.values())) > 1:
            verdicts = ", ".join(f"{name} says {label}" for name, label in label_of_table.items())
            problems.append(Problem(relative(path, source), f"mislabelled: {verdicts} (1 abnormal, -1 normal)"))
            continue
        try:
            if f"{record}.wav" not in there:
                raise audio.AudioError("missing: no such file")
            rate_hz, frames, _ = audio.header(path)
        except audio.AudioError as error:
            problems.append(Problem(relative(path, source), str(error)))
            continue
        row = (appendix or {}).get(record, {})
        # No published row differs. Should one, the challenge was scored by its reference tables, so these count.
        if row.get(APPENDIX_CLASS, label) not in (label, ""):
            reason = f"mislabelled: {record} is {row[APPENDIX_CLASS]!r} here and {label} in {primary}, which counts"
            problems.append(Problem(APPENDIX, reason))
        annotations: tuple[Span, ...] = ()
        notes: tuple[str, ...] = ()
        if record in states:
            try:
                annotations, notes = _annotations(states[record], rate_hz, frames)
                problems += [Problem(relative(states[record], source), note, True) for note in notes]
            except SourceError as error:
                problems.append(Problem(relative(states[record], source), f"{error}, so no annotations"))
            except ValueError as error:
                problems.append(Problem(relative(states[record], source), f"annotation: {error}"))
        extra = {"sqi": sqi.get(record), "diagnosis": row.get("diagnosis"), "site": row.get(APPENDIX_SITE)}
        database = folder.name[-1]
        person = _person(database, row) if appendix is not None else None
        if appendix is not None and database == "c":
            person = record  # one recording a subject
        recordings.append(
            Recording(
                id=record,
                person=person or _same_person(database, row) or record,
                person_known=person is not None,
                database=f"cinc2016-{database}",
                rate_hz=rate_hz,
                labels={"class": CLASSES[label], "abnormal": "1" if label == "1" else "0"}
                | {key: value for key, value in extra.items() if value},
                annotations=annotations,
                path=path,
                notes=notes,
            )
        )
    read = {there[f"{record}.wav"] for record in labels}
    for path in (path for path in there.ending(".wav") if path not in read):
        problems.append(Problem(relative(path, source), f"unlabelled: no label in {primary}"))
    return recordings


def _references(
    folder: Folder, source: pathlib.Path, problems: list[Problem]
) -> tuple[dict[str, dict[str, str | None]], dict[str, str]]:
    """({table: {record: "1", "-1", or None where the row is bad}}, {record: sqi}); the first table counts."""
    tables: dict[str, dict[str, str | None]] = {}
    sqi: dict[str, str] = {}
    for name in ("REFERENCE.csv", "REFERENCE_withSQI.csv"):
        path = folder[name]
        if name not in folder:
            continue
        rows = read_rows(path)
        _check_labels(path, rows)
        labels = tables.setdefault(name, {})
        for line, fields in rows:
            record, *values = fields
            label = values[0] if values else ""
            bad = None
            if label not in CLASSES:
                bad = f"label {label!r}, allowed are 1 (abnormal) and -1 (normal)"
            elif record in labels:
                bad = f"label {label} is the second for this record (first: {labels[record]})"
            if bad is None:
                labels[record] = label
            else:
                if labels.get(record) != label:
                    labels[record] = None
                problems.append(Problem(relative(path, source), f"mislabelled: line {line}, record {record}: {bad}"))
            if name == "REFERENCE_withSQI.csv" and len(values) > 1:
                if values[1] in ("0", "1"):
                    sqi[record] = values[1]
                else:
                    reason = f"mislabelled: line {line}, record {record}: sqi {values[1]!r}, allowed are 0 and 1"
                    problems.append(Problem(relative(path, source), reason))
    comments = {}
    for path in folder.ending(".hea"):
        try:
            if verdict := _header_label(path):
                comments[path.stem] = verdict
        except SourceError as error:
            problems.append(Problem(relative(path, source), str(error)))
    if not tables and not comments:
        raise DatasetError(
            f"{folder.path}: no labels; it needs REFERENCE.csv (rows such as a0001,1) or REFERENCE_withSQI.csv, "
            "or .hea files with a comment '# Normal' or '# Abnormal'"
        )
    tables["the .hea file"] = dict(comments)
    return tables, sqi


def _check_labels(path: pathlib.Path, rows: list[tuple[int, list[str]]]) -> None:
    """Raises DatasetError where a reference table as a whole does not hold the published labels."""
    if all(len(fields) < 2 for _, fields in rows):
        raise DatasetError(f"{path}: no row has two fields with a comma between; expected record,label as in a0001,1")
    labels = {fields[1] for _, fields in rows if len(fields) > 1}
    if labels <= {"0", "1"} and "0" in labels:
        raise DatasetError(
            f"{path}: column 2 (label) holds 0 and 1, so it was re-coded and may be inverted; "
            "put the published table back: 1 is abnormal, -1 is normal"
        )
    if not labels & CLASSES.keys():
        raise DatasetError(
            f"{path}: column 2 (label) holds {', '.join(map(repr, sorted(labels)[:4]))} and neither 1 nor -1; "
            "put the published table back: 1 is abnormal, -1 is normal"
        )


def _header_label(path: pathlib.Path) -> str | None:
    """The label in a WFDB header's comment, or None."""
    for line in text_of(read_bytes(path)).splitlines():
        word = line.lstrip("# \t").strip().lower()
        if line.startswith("#") and word in CLASSES.values():
            return "1" if word == "abnormal" else "-1"
    return None


def _appendix(source: pathlib.Path, problems: list[Problem]) -> dict[str, dict[str, str]] | None:
    """The rows of the online appendix by record; None, and a problem, where there is no such file."""
    for folder in (source / "annotations", source, source.parent / "annotations"):
        path = folder / APPENDIX
        if path.is_file():
            rows, bad = read_table(path, ("challenge record name", "original record name", "subject id"), source)
            problems += bad
            return {row["challenge record name"]: row for _, row in rows}
    reason = "no subjects: the appendix was not found, so every recording counts as an unknown person of its own"
    problems.append(Problem(f"annotations/{APPENDIX}", reason))
    return None


def _person(database: str, row: dict[str, str]) -> str | None:
    """Who was recorded, by the appendix: the subject of database b or the tape of a; None where it does not say."""
    subject = row.get("subject id", "")
    tape = re.match(r"(C\d+)S\d", row.get("original record name", ""))  # C45S1: tape 45, its recording 1
    if database == "b" and subject:
        return f"cinc2016-b-{subject}"
    if database == "a" and tape:
        return f"cinc2016-a-{tape[1]}"
    return None


def _same_person(database: str, row: dict[str, str]) -> str | None:
    """Who was recorded where the appendix does not say, inferred from its other columns; None where they do not tell.

    e: recordings of one class with one raw record's number agree in gender, age and state (at rest, after climbing
    steps), and their original names are at most a dozen numbers apart; normal and abnormal ones are numbered
    separately. d: C014PRAU and C014PRAU2 are one person, and the names of the six men of Mars-500 do not distinguish
    them, so they count as one.
    """
    raw = row.get("# raw record", "")
    if database == "e" and raw:
        return f"cinc2016-e-{'a' if row.get(APPENDIX_CLASS) == '1' else 'n'}{raw}"
    if database == "d" and row.get("diagnosis", "").endswith("MARS500"):
        return "cinc2016-d-MARS500"
    if database == "d" and (name := re.fullmatch(r"(C\d+[A-Za-z]+)\d?", row.get("original record name", ""))):
        return f"cinc2016-d-{name[1]}"
    return None


def _state_files(source: pathlib.Path, folders: list[pathlib.Path]) -> dict[str, pathlib.Path]:
    """The hand-corrected state files by record, from `annotations` next to, above or inside the training folders."""
    paths: dict[str, pathlib.Path] = {}
    for base in dict.fromkeys((source.parent, source, *folders)):
        for path in sorted((base / "annotations" / "hand_corrected").glob("[!.]*/[!.]*_StateAns.mat"), key=str):
            paths[path.name.removesuffix("_StateAns.mat")] = path
    return paths


def _annotations(path: pathlib.Path, rate_hz: int, frames: int) -> tuple[tuple[Span, ...], tuple[str, ...]]:
    """(spans, notes) of a file of (1-based sample index, state name) pairs; each state lasts until the next begins.

    Where an index is behind the one before (three of the published files), nobody knows when that state began: up to
    the next state that is in order the recording counts as not annotated.

    Raises:
      SourceError: the file is unreadable.
      ValueError: what is wrong with the file.
    """
    starts, names = state_ans.read(read_bytes(path))
    if unknown := set(names) - STATES.keys():
        raise ValueError(f"unknown state {min(unknown)!r}; known are {', '.join(STATES)}")
    if min(starts) < 1 or max(starts) > frames:
        raise ValueError(f"sample indices {min(starts)} to {max(starts)}, the recording has samples 1 to {frames}")
    states = [*map(STATES.__getitem__, names)]
    notes: tuple[str, ...] = ()
    if not all(map(operator.lt, starts, starts[1:])):
        before, after = next((a, b) for a, b in itertools.pairwise(starts) if a >= b)
        kept = _in_order(starts)
        if len(kept) < 0.75 * len(starts):
            raise ValueError(f"sample index {after} follows {before}; the indices must increase")
        next_kept = [*kept[1:], len(starts)]
        states = [states[i] if next_kept[place] == i + 1 else UNANNOTATED for place, i in enumerate(kept)]
        starts = [starts[i] for i in kept]
        notes = (f"annotation: sample index {after} follows {before}; what lies around them counts as not annotated",)
    edges_s = [(start - 1) / rate_hz for start in starts] + [frames / rate_hz]
    return tuple(zip(edges_s, edges_s[1:], states, strict=False)), notes


def _in_order(starts: list[int]) -> list[int]:
    """Places of the numbers that every longest rising subsequence of `starts` has: those that are surely in order."""

    def ranks(values: list[int]) -> list[int]:
        lowest: list[int] = []  # the smallest end of a rising subsequence of each length
        places = []
        for value in values:
            place = bisect.bisect_left(lowest, value)
            lowest[place : place + 1] = [value]
            places.append(place)
        return places

    before, after = ranks(starts), ranks([-start for start in reversed(starts)])[::-1]
    longest = max(map(operator.add, before, after))
    on_one = [i for i in range(len(starts)) if before[i] + after[i] == longest]
    of_rank = collections.Counter(before[i] for i in on_one)
    return [i for i in on_one if of_rank[before[i]] == 1]
