"""Which recordings train, validate and test, and the check that nothing leaks between them.

A split is a dict, saved as JSON: lists of recording ids under train, validation, test and unlabelled, the arguments
it was made with, notes, and counts. It is made from the rows of a prepared folder; `python -m pcgjax.splits` is its
command.
"""

from __future__ import annotations

import collections
import csv
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pcgjax.data import Row
from pcgjax.runtime import files, hashes
from pcgjax.runtime.names import nearest

Split = dict[str, Any]
KINDS = ("person", "person_250", "person_kfold", "leave_database_out", "paper301", "column")
# Target -> its classes, of which the last counts as positive; "": no label, every recording is of class 0. Any other
# label that is 0 or 1 is a target, too.
CLASSES = {"murmur_status": ("Absent", "Unknown", "Present"), "": ("0",)}
TWO = ("0", "1")
PARTS = ("train", "validation", "test")
# Recordings with so many fingerprint hashes in common share audio. Hashes have 32 bits, so two of a corpus' 10^5 are
# now and then equal by chance: of the 8 * 10^5 pairs of recordings within CinC 2016, CirCor and PASCAL, 6 share one
# hash and none shares two. Two seconds of common audio share 16 on average.
COMMON_HASHES = 3


class SplitError(ValueError):
    """A split that cannot be made, read or used; the message names the reason and the fix."""


class LeakError(SplitError):
    """Parts of a split share a person or audio."""


def make(
    rows: Sequence[Row],
    kind: str,
    target: str,
    seed: int,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    fold: int = 0,
    folds: int = 5,
    database: str | None = None,
    names: str | pathlib.Path | None = None,
) -> Split:
    """Divides the recordings whose labels have `target`; the same for the same rows in any order.

    Args:
      kind: `person` by person; `person_250` by person too, where 250 recordings of each class validate (the
        H-infinity paper's set for tuning), or a third of the smaller class where that is less; `person_kfold` by
        person into `folds`, fold `fold` tests and the next validates; `leave_database_out` tests on `database`, the
        others' people train and validate; `paper301` as published for the 1D CNN, 301 recordings drawn without
        regard to people: those that the file `names` lists (first column, such as the challenge's
        validation/REFERENCE.csv), else 150 normal and 151 abnormal ones; `column` as the column `split` of one's own
        table says, where recordings without it are left out.
      target: a label that is 0 or 1, as `abnormal` and `murmur`, or `murmur_status`; "" for recordings whose label
        does not matter: all of them are dealt out.
      fractions: of train, validation and test, in recordings. Where the kind sets the test part, the first two
        are taken relative to each other; `column` sets all, but validation where the column names none.
    Returns: {kind, target, seed, parameters, content_sha256, train, validation, test, unlabelled, notes, counts};
      the parts are sorted lists of ids, counts[part][database or "all"] has recordings, people and positives.
      Each part gets its share of either class's recordings in each database, as far as people, who are never
      divided, allow. People whose recordings share audio are kept together.
    Raises:
      SplitError: unknown kind, target or database, fold out of range, too few people or recordings of a class.
    """
    _check_arguments(kind, target, fractions, fold, folds)
    rows = sorted(rows, key=lambda row: row["id"])
    if len({row["id"] for row in rows}) < len(rows):
        raise SplitError("the rows have an id twice: prepare the data set again")
    classes = classes_of(target)
    labelled = [row for row in rows if _label(row, target) in classes]
    if not labelled:
        there = {name for row in rows for name, value in row["labels"].items() if value in TWO}
        raise SplitError(
            f"no recording has the label {target!r}: choose another --target or data set; "
            f"{nearest(target, sorted(there), 'labels that are 0 or 1:')}"
        )
    databases = sorted({row["database"] for row in labelled})
    if kind == "leave_database_out" and database not in databases:
        raise SplitError(f"no database {database!r} with label {target!r}: choose one of {', '.join(databases)}")
    if kind == "leave_database_out" and len(databases) == 1:
        raise SplitError(f"{database} is the only database with label {target!r}, none is left to train on")

    rng = np.random.default_rng(seed)
    if kind == "paper301":
        parts, notes = _paper301(labelled, target, fractions, names, rng)
    else:
        parts, notes = _by_person(labelled, kind, target, fractions, fold, folds, database, rng)
        unknown = {row["database"] for row in labelled if not row["person_known"]}
        notes += [
            f"{name}: people are not known for all recordings, and one person may be in several parts"
            for name in sorted(unknown)
        ]
    for part, members in parts.items():
        if lacking := set(classes) - {_label(row, target) for row in members}:
            condition = f" with {target} {', '.join(sorted(lacking))}" if target else ""
            raise SplitError(f"{part} has no recording{condition}: choose other fractions, seed or kind")
    return {
        **arguments_of(kind, target, seed, fractions, fold, folds, database, names),
        "content_sha256": _content(rows),
        **{part: sorted(row["id"] for row in parts[part]) for part in PARTS},
        "unlabelled": [row["id"] for row in rows if _label(row, target) not in classes],
        "notes": notes,
        "counts": {part: _counts(parts[part], target) for part in PARTS},
    }


def arguments_of(
    kind: str, target: str, seed: int, fractions: Sequence[float] = (0.7, 0.15, 0.15), fold: int = 0, folds: int = 5,
    database: str | None = None, names: str | pathlib.Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a split says that it was made with: those arguments of `make` that its kind reads."""
    return {
        "kind": kind,
        "target": target,
        "seed": seed,
        "parameters": {
            "fractions": list(fractions),
            **({"fold": fold, "folds": folds} if kind == "person_kfold" else {}),
            **({"database": database} if kind == "leave_database_out" else {}),
            **({"names": str(names) if names else None} if kind == "paper301" else {}),
        },
    }


def classes_of(target: str) -> tuple[str, ...]:
    """The classes of a target, of which the last counts as positive."""
    return CLASSES.get(target, TWO)


def _label(row: Row, target: str) -> str | None:
    return row["labels"].get(target) if target else "0"


def _check_arguments(kind: str, target: str, fractions: Sequence[float], fold: int, folds: int) -> None:
    if kind not in KINDS:
        raise SplitError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
    if len(classes_of(target)) != 2 and kind in ("person_250", "paper301"):
        raise SplitError(f"kind {kind} draws recordings of two classes: it needs a target with two")
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise SplitError(f"fractions {fractions}: three positive numbers with sum 1 are needed")
    if kind == "person_kfold" and folds < 3:
        raise SplitError(f"folds {folds}: at least 3 are needed, one to test, one to validate, the rest to train")
    if kind == "person_kfold" and not 0 <= fold < folds:
        raise SplitError(f"fold {fold}: must lie between 0 and {folds - 1}")


def _by_person(
    rows: list[Row],
    kind: str,
    target: str,
    fractions: Sequence[float],
    fold: int,
    folds: int,
    database: str | None,
    rng: np.random.Generator,
) -> tuple[dict[str, list[Row]], list[str]]:
    groups, notes = _groups(rows)
    if kind == "column":
        return _by_column(rows, groups, target, fractions, rng), notes
    if kind == "person_kfold":
        dealt = _deal(groups, target, [1 / folds] * folds, rng)
        first, second, *others = dealt[fold:] + dealt[:fold]
        return {"train": [row for part in others for row in part], "validation": second, "test": first}, notes
    if kind == "leave_database_out":
        inside = [group for group in groups if any(row["database"] == database for row in group)]
        outside = [group for group in groups if all(row["database"] != database for row in group)]
        left_out = sorted(row["id"] for group in inside for row in group if row["database"] != database)
        if left_out:
            notes.append(
                f"left out: {len(left_out)} recordings of people who are also in {database}: {_some(left_out)}"
            )
        both = fractions[0] + fractions[1]
        train, validation = _deal(outside, target, [fractions[0] / both, fractions[1] / both], rng)
        test = [row for row in rows if row["database"] == database]
        return {"train": train, "validation": validation, "test": test}, notes
    if kind == "person_250":
        rest, test = _deal(groups, target, [fractions[0] + fractions[1], fractions[2]], rng)
        counts = [sum(row["labels"][target] == value for row in rest) for value in ("0", "1")]
        each = min(250, min(counts) // 3)
        if each < 250:
            notes.append(f"validation: {each} of each class are wanted, as 250 would leave too few to train")
        share = np.array([each / count for count in counts])
        rest_ids = {row["id"] for row in rest}
        rest_groups = [group for group in groups if group[0]["id"] in rest_ids]
        train, validation = _deal(rest_groups, target, [1 - share, share], rng)
        return {"train": train, "validation": validation, "test": test}, notes
    return dict(zip(PARTS, _deal(groups, target, fractions, rng), strict=True)), notes


def _by_column(
    rows: list[Row], groups: list[list[Row]], target: str, fractions: Sequence[float], rng: np.random.Generator
) -> dict[str, list[Row]]:
    """As the rows' label `split` says; people of training validate where no row says validation."""
    parts = {part: [row for row in rows if row["labels"].get("split") == part] for part in PARTS}
    if not (parts["train"] and parts["test"]):
        raise SplitError("kind column needs rows whose column `split` says train, and such that say test")
    if not parts["validation"]:
        both = fractions[0] + fractions[1]
        train = {row["id"] for row in parts["train"]}
        inner = [[row for row in group if row["id"] in train] for group in groups]
        dealt = _deal([group for group in inner if group], target, [fractions[0] / both, fractions[1] / both], rng)
        parts["train"], parts["validation"] = dealt
    return parts


def _groups(rows: list[Row]) -> tuple[list[list[Row]], list[str]]:
    """(recordings by person, notes); people whose recordings share audio count as one."""
    leader: dict[str, str] = {}

    def find(person: str) -> str:
        while leader.setdefault(person, person) != person:
            person = leader[person]
        return person

    notes = []
    by_id = {row["id"]: row for row in rows}
    for one, other, _ in overlaps(rows):
        a, b = sorted(find(by_id[name]["person"]) for name in (one, other))
        if a != b:
            leader[b] = a
            notes.append(f"{one} and {other} share audio: their people are kept together")
    groups = collections.defaultdict(list)
    for row in rows:
        groups[find(row["person"])].append(row)
    return [groups[name] for name in sorted(groups)], notes


def _deal(groups: list[list[Row]], target: str, fractions: Sequence[Any], rng: np.random.Generator) -> list[list[Row]]:
    """Deals whole groups into parts, database by database: each group to the part that lacks most of its classes.

    All classes are counted in recordings, for a person may have recordings of several. A part's fraction is one
    number, or one for each class.
    """
    classes = classes_of(target)
    wanted = np.array([np.broadcast_to(fraction, len(classes)) for fraction in fractions])
    strata = collections.defaultdict(list)
    for group in groups:
        counts = np.array([sum(_label(row, target) == label for row in group) for label in classes])
        strata[group[0]["database"]].append((group, counts))
    for column, label in enumerate(classes):
        people = sum(counts[column] > 0 for stratum in strata.values() for _, counts in stratum)
        if people < len(fractions):
            raise SplitError(
                f"{people} people with {target} {label}, too few for {len(fractions)} parts: "
                "use fewer folds, another kind, or more data"
            )
    parts: list[list[Row]] = [[] for _ in fractions]
    lacking = np.zeros((len(fractions), len(classes)))
    for _, stratum in sorted(strata.items()):
        total = np.maximum(sum(counts for _, counts in stratum), 1)
        # The imbalance that earlier databases left is made up here, but by one person at most: otherwise a person
        # with very many recordings would distort the next database.
        person = total / np.maximum(sum(counts > 0 for _, counts in stratum), 1)
        lacking = np.clip(lacking, -person, person) + wanted * total
        order = [stratum[i] for i in rng.permutation(len(stratum))]
        for group, counts in sorted(order, key=lambda pair: len(pair[0]), reverse=True):
            part = int(np.argmax(lacking @ (counts / total)))
            parts[part] += group
            lacking[part] -= counts
    return parts


def _paper301(
    rows: list[Row],
    target: str,
    fractions: Sequence[float],
    names: str | pathlib.Path | None,
    rng: np.random.Generator,
) -> tuple[dict[str, list[Row]], list[str]]:
    notes = ["split by recording, as published: one person's recordings are in several parts"]
    by_class = {value: [row for row in rows if row["labels"][target] == value] for value in ("0", "1")}
    if names is not None:
        listed = _read_names(names)
        test = {row["id"] for row in rows} & listed
        if not test:
            raise SplitError(f"{names}: none of its {len(listed)} names is a recording with label {target!r}")
        if len(test) < len(listed):
            notes.append(f"{len(listed) - len(test)} of the {len(listed)} names in {names} are not in this data set")
    else:
        test = set()
        for value, count in (("0", 150), ("1", 151)):
            if len(by_class[value]) < count + 2:
                raise SplitError(
                    f"{len(by_class[value])} recordings with {target} {value}; this split tests on {count} and needs "
                    "others to train: use --kind=person, or give --names"
                )
            test |= {by_class[value][i]["id"] for i in rng.permutation(len(by_class[value]))[:count]}
    rest = [[row] for row in rows if row["id"] not in test]
    both = fractions[0] + fractions[1]
    train, validation = _deal(rest, target, [fractions[0] / both, fractions[1] / both], rng)
    return {"train": train, "validation": validation, "test": [row for row in rows if row["id"] in test]}, notes


def _read_names(path: str | pathlib.Path) -> set[str]:
    try:
        with pathlib.Path(path).open(newline="", encoding="utf-8-sig") as file:
            names = {line[0].strip().removesuffix(".wav") for line in csv.reader(file) if line}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SplitError(f"{path}: cannot be read as a list of names: {error}") from None
    return names - {""}


def _content(rows: Iterable[Row]) -> str:
    """A digest of the recordings and their labels."""
    labels = sorted([row["id"], sorted(row["labels"].items())] for row in rows)
    return hashlib.sha256(json.dumps(labels).encode()).hexdigest()


def _counts(rows: list[Row], target: str) -> dict[str, dict[str, int]]:
    def count(rows: list[Row]) -> dict[str, int]:
        positives = sum(_label(row, target) == classes_of(target)[-1] for row in rows if target)
        return {"recordings": len(rows), "people": len({row["person"] for row in rows}), "positives": positives}

    databases = sorted({row["database"] for row in rows})
    counts = {name: count([row for row in rows if row["database"] == name]) for name in databases}
    return counts | {"all": count(rows)}


def overlaps(rows: Sequence[Row]) -> list[tuple[str, str, int]]:
    """Pairs of recordings that share a stretch of audio: (id, id, common fingerprint hashes), by id."""
    owners = collections.defaultdict(list)
    for row in rows:
        for value in set(row["fingerprint"].split()):
            owners[value].append(row["id"])
    common: collections.Counter[tuple[str, str]] = collections.Counter()
    for ids in owners.values():
        if len(ids) > 1:
            common.update(itertools.combinations(sorted(ids), 2))
    return sorted((one, other, count) for (one, other), count in common.items() if count >= COMMON_HASHES)


def leaks(split: Split, rows: Sequence[Row]) -> list[str]:
    """Messages about what two parts of a split have in common, each naming the recordings; [] where nothing leaks.

    Checked: an id, a person, the same audio, or overlapping audio (as far as `decode.fingerprint` detects it) in two
    parts.
    """
    messages = []
    part_of: dict[str, str] = {}
    for part in (*PARTS, "unlabelled"):
        ids: list[str] = split[part]
        for name, count in sorted(collections.Counter(ids).items()):
            if name in part_of or count > 1:
                messages.append(f"recording {name} is in {part_of.get(name, part)} and in {part}")
            part_of.setdefault(name, part)
    used = [row for row in rows if part_of.get(row["id"]) in PARTS]
    same_audio: set[tuple[str, ...]] = set()
    for field, what in (("person", "person"), ("sha256", "audio")):
        shared: dict[str, list[str]] = collections.defaultdict(list)
        for row in used:
            shared[row[field]].append(row["id"])
        for value, ids in sorted(shared.items()):
            by_part = {part: sorted(name for name in ids if part_of[name] == part) for part in PARTS}
            places = [f"{part} ({_some(members)})" for part, members in by_part.items() if members]
            if what == "audio":
                same_audio.update(itertools.combinations(sorted(ids), 2))
            if len(places) > 1:
                subject = f"person {value}" if what == "person" else "the same audio"
                messages.append(f"{subject} is in {' and in '.join(places)}")
    for one, other, count in overlaps(used):
        if part_of[one] != part_of[other] and (one, other) not in same_audio:
            messages.append(f"{one} in {part_of[one]} and {other} in {part_of[other]} share audio ({count} windows)")
    return messages


def check(split: Split, rows: Sequence[Row], allow: bool = False) -> list[str]:
    """The split's leaks, if `allow`; otherwise any leak raises.

    Raises:
      LeakError: listing the first ten.
    """
    messages = leaks(split, rows)
    if messages and not allow:
        more = f"\n  and {len(messages) - 10} more" if len(messages) > 10 else ""
        listed = "".join(f"\n  {message}" for message in messages[:10])
        raise LeakError(f"THE SPLIT LEAKS, scores on it would be too good: {len(messages)} findings{listed}{more}")
    return messages


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def save(split: Split, path: str | pathlib.Path) -> None:
    """Writes the split as JSON; the file is there as a whole or not at all."""
    sealed = split | {"sha256": hashes.of_json(split)}
    files.write_text(pathlib.Path(path), json.dumps(sealed, indent=1, ensure_ascii=False) + "\n")


def load(path: str | pathlib.Path, rows: Sequence[Row]) -> Split:
    """Reads a saved split for these rows.

    Raises:
      SplitError: no such file, not a split, damaged, or made for other recordings or labels.
    """
    split = read(path)
    known = {row["id"] for row in rows}
    unknown = sorted(id for part in (*PARTS, "unlabelled") for id in split[part] if id not in known)
    fix = "use the prepared folder that it was made from, or make it again with python -m pcgjax.splits"
    if unknown:
        raise SplitError(f"{path}: {len(unknown)} recordings are not in this data set ({_some(unknown)}): {fix}")
    if split["content_sha256"] != _content(rows):
        raise SplitError(f"{path}: made for a data set with other recordings or labels: {fix}")
    return split


def read(path: str | pathlib.Path) -> Split:
    """Reads a saved split, whatever it was made for.

    Raises:
      SplitError: no such file, not a split, or damaged.
    """
    fix = "make it with python -m pcgjax.splits"
    try:
        split = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SplitError(f"{path}: cannot be read as a split ({error}): {fix}") from None
    if not isinstance(split, dict):
        raise SplitError(f"{path}: not a split: {fix}")
    kinds: dict[str, type] = {"kind": str, "target": str, "content_sha256": str, "parameters": dict, "notes": list,
                              "counts": dict, **dict.fromkeys((*PARTS, "unlabelled"), list)}  # fmt: skip
    if missing := [name for name, kind in kinds.items() if not isinstance(split.get(name), kind)]:
        raise SplitError(f"{path}: not a split, it lacks {', '.join(missing)}: {fix}")
    # Files of earlier versions have none; they are checked by their recordings alone.
    digest = split.pop("sha256", None)
    if digest is not None and digest != hashes.of_json(split):
        raise SplitError(
            f"{path}: damaged, it is not the split that was saved; remove it to have it made anew (if it was changed "
            "on purpose, remove its field sha256)"
        )
    return split


def refuse_other(path: str | pathlib.Path, wanted: dict[str, Any], fix: str) -> None:
    """Raises SplitError where a saved split was made with other arguments than those in `wanted`, naming both.

    wanted: `arguments_of` the split that is asked for, or some of them.
    """

    def flat(arguments: dict[str, Any]) -> dict[str, Any]:
        fields = {name: arguments[name] for name in ("kind", "target", "seed") if name in arguments}
        return fields | arguments.get("parameters", {})

    there = flat(read(path))
    for field, value in flat(wanted).items():
        if field in there and there[field] != value:
            raise SplitError(f"{path}: was made with {field}={there[field]!r}, asked for is {value!r}; {fix}")


def summary(split: Split) -> str:
    """Counts and notes, for a terminal."""
    lines = []
    for part in PARTS:
        for name, counts in split["counts"][part].items():
            lines.append(
                f"{part:10s} {name:12s} {counts['recordings']:5d} recordings {counts['people']:5d} people "
                f"{counts['positives']:5d} {split['target']}"
            )
    lines.append(f"unlabelled {len(split['unlabelled'])}")
    return "\n".join(lines + [f"note: {note}" for note in split["notes"]])
