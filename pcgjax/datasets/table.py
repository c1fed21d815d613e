"""One's own recordings, named in a table: a file and its label a line."""

from __future__ import annotations

import math
import os
import pathlib

from pcgjax.datasets import DatasetError, Problem, Recording
from pcgjax.datasets.own import UNKNOWN_PERSONS, binary, recording, seconds
from pcgjax.datasets.tables import column_name, read_rows

LAYOUT = "a table with the columns path and label, and, as far as they are known, person and database"
# What a column is called in tables; the first name is ours.
COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "fname", "recording", "wav", "audio"),
    "label": ("label", "class", "diagnosis", "outcome", "abnormal"),
    "person": ("person", "person_id", "patient", "patient_id", "subject", "subject_id"),
    "database": ("database", "site", "centre", "center"),
    "split": ("split", "part", "fold"),
    "start_s": ("start_s", "start"),
    "end_s": ("end_s", "end"),
    "annotation": ("annotation", "annotations", "tsv"),
}
PARTS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
         "dev": "validation", "test": "test", "testing": "test"}  # fmt: skip


def load(source: pathlib.Path) -> tuple[list[Recording], list[Problem]]:
    """The recordings that a table names: CSV with commas, semicolons or tabs, with a header or path, label[, person].

    Paths are relative to the table. Labels: `abnormal`, as `own.binary` makes it of the column label, whose word is
    kept as `class`; each other column by its own name, as "0" and "1" where it holds two such words, else as text.
    Empty fields are unknown. Rows of a column `split` say train, validation or test (`split.kind=column`).

    Raises:
      DatasetError: no table, no column `path`, or labels of which none is the normal one.
    """
    folder = pathlib.Path(os.path.abspath(source)).parent
    columns, rows = _rows(source, folder)
    problems: list[Problem] = []
    words = {
        column: binary({row[column] for _, row in rows}, f"{source}, column {column}")
        for column in ("label",) if column in columns
    }  # fmt: skip
    others = [column for column in columns if column not in COLUMNS]
    for column in others:
        try:
            words[column] = binary({row[column] for _, row in rows}, column)
        except DatasetError:
            words[column] = {}  # text: an age, a place
    recordings: dict[str, Recording] = {}
    for line, row in rows:
        path = folder / row["path"].replace("\\", "/")
        try:
            excerpt_s, record = _excerpt(row, _id(path, folder))
            part = _part(row)
        except ValueError as error:
            problems.append(Problem(row["path"], f"mislabelled: {source.name} line {line}: {error}"))
            continue
        if record in recordings:
            problems.append(Problem(row["path"], f"duplicate: {source.name} names it again in line {line}"))
            continue
        labels = {column: words[column].get(row[column], row[column]) for column in others if row[column]}
        if row.get("label"):
            labels |= {"abnormal": words["label"][row["label"]], "class": row["label"]}
        if part:
            labels["split"] = part
        person, database = row.get("person", ""), row.get("database") or "table"
        one = recording(
            path, folder, problems, id=record, person=f"{database}-{person}" if person else "", database=database,
            labels=labels, annotation=folder / row["annotation"] if row.get("annotation") else None,
            excerpt_s=excerpt_s,
        )  # fmt: skip
        if one is not None:
            recordings[record] = one
    if not all(one.person_known for one in recordings.values()):
        problems.append(Problem(source.name, UNKNOWN_PERSONS.format(fix="a column person"), True))
    return list(recordings.values()), problems


def _rows(source: pathlib.Path, folder: pathlib.Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """(names of the columns, ours where COLUMNS has them; (line, {column: field}) of the rows)."""
    fix = "give a CSV table"
    (line, header), *body = read_rows(source, delimiters=",;\t", fix=fix)
    ours = {name: column for column, names in COLUMNS.items() for name in names}
    spelt = [column_name(field).replace(" ", "_") for field in header]
    columns: list[str] = []
    for name in spelt:
        column = ours.get(name, name)
        columns.append(name if column in columns else column)  # the second of a kind keeps its own name
    if "path" not in columns:
        if not (folder / header[0].replace("\\", "/")).is_file() or len(header) > 3:
            raise DatasetError(
                f"{source}: no column path among {', '.join(spelt)}, and no file {header[0]} beside the table; "
                "name the column of the files path"
            )
        columns, body = ["path", "label", "person"][: len(header)], [(line, header), *body]
    if twice := {name for name in columns if columns.count(name) > 1}:
        raise DatasetError(f"{source}: two columns are named {sorted(twice)[0]}; rename one")
    wrong = next((line for line, fields in body if len(fields) != len(columns)), None)
    if wrong is not None:
        raise DatasetError(f"{source}, line {wrong}: not {len(columns)} fields as in the header; mend that line")
    return columns, [(line, dict(zip(columns, fields, strict=True))) for line, fields in body]


def _id(path: pathlib.Path, folder: pathlib.Path) -> str:
    """The path from the table's folder, or from the root where it lies elsewhere, without its suffix."""
    path = pathlib.Path(os.path.normpath(path))
    return str((path.relative_to(folder) if path.is_relative_to(folder) else path).with_suffix("").as_posix())


def _excerpt(row: dict[str, str], record: str) -> tuple[tuple[float, float] | None, str]:
    """((start_s, end_s) or None, the id of that excerpt).

    Raises:
      ValueError: no numbers.
    """
    if not (row.get("start_s") or row.get("end_s")):
        return None, record
    try:
        start_s = seconds(row.get("start_s") or "0")
        end_s = seconds(row["end_s"]) if row.get("end_s") else math.inf
    except ValueError:
        raise ValueError(f"start_s {row.get('start_s')!r}, end_s {row.get('end_s')!r}: need seconds") from None
    return (start_s, end_s), f"{record}@{start_s:g}"


def _part(row: dict[str, str]) -> str:
    if not row.get("split"):
        return ""
    part: str | None = PARTS.get(row["split"].lower())
    if part is None:
        raise ValueError(f"split is {row['split']!r}, need train, validation or test")
    return part
