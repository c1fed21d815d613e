"""PASCAL Classifying Heart Sounds Challenge 2011 (Bentley et al. 2011): set_a 44.1 kHz, set_b 4 kHz."""

from __future__ import annotations

import collections
import itertools
import os
import pathlib

from pcgjax.datasets import S1, S2, Problem, Recording, Span, audio
from pcgjax.datasets.sources import Folder
from pcgjax.datasets.tables import read_table, relative

LAYOUT = (
    "set_a.csv with the folder set_a/, or set_b.csv with set_b/, or both, and set_a_timing.csv; or a folder a class: "
    "Atraining_normal, Btraining_murmur and so on"
)
ABNORMAL = {"normal": "0", "murmur": "1", "extrastole": "1", "extrahls": "1", "artifact": None}
TIMING_RATE_HZ = 44100  # what the locations in set_a_timing.csv count, whatever the rate of the files on disk
SPELLINGS = {"extrahs": "extrahls", "extrasystole": "extrastole"}  # of the organisers' folders -> of the tables
PREFIXES = ("Atraining", "Btraining", "Aunlabelledtest", "Bunlabelledtest")


def load(source: pathlib.Path) -> tuple[list[Recording], list[Problem]]:
    """The labelled recordings of `source`; set_b's file names carry the subject, set_a's do not.

    Labels: `class`, `abnormal` (not of artifacts), `murmur` (of murmur and normal), `noisy` ("0", "1"), `sublabel`.
    Annotations: of some normal recordings in set_a, S1 and S2 as intervals of no length.

    Raises:
      DatasetError: a table that is malformed as a whole.
    """
    source = pathlib.Path(os.path.abspath(source))
    recordings: list[Recording] = []
    problems: list[Problem] = []
    unlabelled = 0
    for letter in "ab":
        table = source / f"set_{letter}.csv"
        folders = _class_folders(source, letter)
        if table.is_file() and ((source / f"set_{letter}").is_dir() or not folders):
            labelled, skipped = _set(table, letter, source, problems)
        else:
            labelled, skipped = _classes(folders, letter, source, problems)
        recordings += labelled
        unlabelled += skipped
    if unlabelled:
        reason = f"unlabelled: {unlabelled} recordings have no label (the challenge kept them for its test)"
        problems.append(Problem("set_a.csv, set_b.csv", reason))
    return recordings, problems


def _set(
    table: pathlib.Path, letter: str, source: pathlib.Path, problems: list[Problem]
) -> tuple[list[Recording], int]:
    """(the recordings of one set, how many have no label)."""
    rows, bad = read_table(table, ("fname", "label", "sublabel"), source)
    problems += bad
    timing = _timing(source, problems) if letter == "a" else {}
    folder = source / f"set_{letter}"
    files = list(Folder(folder).ending(".wav")) if folder.is_dir() else []
    by_name = {path.name: path for path in files}
    by_parts = {_parts(path.name): path for path in files}
    recordings: list[Recording] = []
    seen: dict[pathlib.Path, int] = {}
    unlabelled = 0
    for line, row in rows:
        name = row["fname"].replace("\\", "/").rsplit("/", 1)[-1]
        # The published tables name files as before they were renamed: Btraining_murmur_112_.. for murmur__112_..
        path = by_name.get(name) or by_parts.get(_parts(name)) or source / f"set_{letter}" / name
        where = relative(path, source)
        if path in seen:
            reason = f"duplicate: {table.name} names it in lines {seen[path]} and {line}; the first counts"
            problems.append(Problem(where, reason))
            continue
        seen[path] = line
        label = SPELLINGS.get(row["label"], row["label"])
        if not label:
            unlabelled += 1
            continue
        if label not in ABNORMAL:
            reason = f"mislabelled: {table.name} line {line} says {label!r}, allowed are {', '.join(ABNORMAL)}"
            problems.append(Problem(where, reason))
            continue
        named, noisy, tail = _parts(path.name)
        if named in ABNORMAL and named != label:
            reason = f"mislabelled: {table.name} line {line} says {label}, the file name {named}"
            problems.append(Problem(where, reason))
            continue
        one = _recording(path, f"{letter}_{path.stem}", label, row["sublabel"], noisy, tail, timing, source, problems)
        recordings += [one] if one else []
    for path in files:
        if path not in seen:
            if "unlabelledtest" in path.name:
                unlabelled += 1
            else:
                problems.append(Problem(relative(path, source), f"unlisted: {table.name} does not name this file"))
    return recordings, unlabelled


def _class_folders(source: pathlib.Path, letter: str) -> list[pathlib.Path]:
    """The organisers' folders of one set below `source`, as Btraining_noisynormal inside Btraining_normal."""
    found = []
    for parent, folders, _ in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefixes = tuple(f"{letter}{kind}" for kind in ("training_", "unlabelledtest"))
        found += [pathlib.Path(parent, name) for name in folders if name.lower().startswith(prefixes)]
    return found


def _classes(
    folders: list[pathlib.Path], letter: str, source: pathlib.Path, problems: list[Problem]
) -> tuple[list[Recording], int]:
    """(the recordings of one set as its organisers lay it out, how many have no label); ids are as `_set` has them."""
    timing = _timing(source, problems) if letter == "a" and folders else {}
    recordings: dict[str, Recording] = {}
    unlabelled = 0
    for folder in folders:
        files = list(Folder(folder).ending(".wav"))
        _, _, kind = folder.name.lower().partition("training_")
        label, noisy = SPELLINGS.get(kind.removeprefix("noisy"), kind.removeprefix("noisy")), kind.startswith("noisy")
        if not kind:
            unlabelled += len(files)
            continue
        if label not in ABNORMAL:
            reason = f"mislabelled: the folder's class is {label!r}, allowed are {', '.join(ABNORMAL)}"
            problems.append(Problem(relative(folder, source), reason))
            continue
        for path in files:
            named, named_noisy, tail = _parts(path.name)
            sublabel = f"noisy{label}" if noisy or named_noisy else ""
            record = f"{letter}_{label}_{sublabel}_{tail}"
            if named in ABNORMAL and named != label:
                reason = f"mislabelled: it lies in {folder.name}, the file name says {named}"
                problems.append(Problem(relative(path, source), reason))
            elif record in recordings:
                reason = f"duplicate: {relative(recordings[record].path, source)} has the same name, which counts"
                problems.append(Problem(relative(path, source), reason))
            elif one := _recording(path, record, label, sublabel, bool(sublabel), tail, timing, source, problems):
                recordings[record] = one
    return list(recordings.values()), unlabelled


def _recording(
    path: pathlib.Path,
    record: str,
    label: str,
    sublabel: str,
    noisy: bool,
    tail: str,
    timing: dict[tuple[str, bool, str], list[Span]],
    source: pathlib.Path,
    problems: list[Problem],
) -> Recording | None:
    """One labelled recording; None, and an entry in `problems`, where it cannot be used. tail: as of `_parts`."""
    try:
        rate_hz, frames, _ = audio.header(path)
    except audio.AudioError as error:
        problems.append(Problem(relative(path, source), str(error)))
        return None
    named, named_noisy, _ = _parts(path.name)
    annotations = tuple(timing.pop((named or label, named_noisy, tail), ()))
    if annotations and annotations[-1][1] > frames / rate_hz:
        last_s, end_s = annotations[-1][1], frames / rate_hz
        reason = f"annotation: {path.name} has a sound at {last_s:.3f} s and ends at {end_s:.3f} s"
        problems.append(Problem("set_a_timing.csv", reason))
        annotations = ()
    labels = {"class": label, "noisy": "1" if noisy or sublabel.startswith("noisy") else "0"}
    if sublabel:
        labels["sublabel"] = sublabel
    if (abnormal := ABNORMAL[label]) is not None:
        labels["abnormal"] = abnormal
    if label in ("normal", "murmur"):
        labels["murmur"] = "1" if label == "murmur" else "0"
    letter = record[0]
    subject = tail.split("_")[0] if letter == "b" and "_" in tail else None  # 112_1306243000964_A
    return Recording(
        id=record,
        person=f"pascal-b-{subject}" if subject else record,
        person_known=subject is not None,
        database=f"pascal-{letter}",
        rate_hz=rate_hz,
        labels=labels,
        annotations=annotations,
        path=path,
    )


def _parts(name: str) -> tuple[str, bool, str]:
    """(label or "", whether marked noisy, the rest) of a file name, the same for the table's and the disk's spelling.

    murmur_noisymurmur_162_1307101835989_B_1.wav, Btraining_murmur_noisymurmur_162_1307101835989_B_1.wav and
    Btraining_noisymurmur_162_1307101835989_B_1.wav give ("murmur", True, "162_1307101835989_B_1").
    """
    words = [word for word in os.path.splitext(name)[0].split("_") if word and word not in PREFIXES]
    kinds = list(itertools.takewhile(str.isalpha, words))
    noisy = any(kind.startswith("noisy") for kind in kinds)
    label = kinds[-1].removeprefix("noisy") if kinds else ""
    return SPELLINGS.get(label, label), noisy, "_".join(words[len(kinds) :])


def _timing(source: pathlib.Path, problems: list[Problem]) -> dict[tuple[str, bool, str], list[Span]]:
    """`set_a_timing.csv` by `_parts` of the file name: S1 and S2 in order; files with a bad row are left out."""
    path = source / "set_a_timing.csv"
    if not path.is_file():
        return {}
    rows, bad = read_table(path, ("fname", "sound", "location"), source)
    problems += bad
    sounds = collections.defaultdict(list)
    broken = set()
    for line, row in rows:
        name = row["fname"].replace("\\", "/").rsplit("/", 1)[-1]
        key = _parts(name)
        if row["sound"] not in ("S1", "S2"):
            broken.add(key)
            reason = f"sound is {row['sound']!r}, allowed are S1 and S2"
        elif not (row["location"].isdecimal() and len(row["location"]) < 12):
            broken.add(key)
            reason = f"location is {row['location']!r}, it must be a sample at {TIMING_RATE_HZ} Hz, as in 10021"
        else:
            time_s = int(row["location"]) / TIMING_RATE_HZ
            sounds[key].append((time_s, time_s, S1 if row["sound"] == "S1" else S2))
            continue
        problems.append(Problem(path.name, f"annotation: line {line}, {name}: {reason}; {name} gets no annotations"))
    return {key: sorted(marks) for key, marks in sounds.items() if key not in broken}
