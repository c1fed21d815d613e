"""Reading the CSV tables that the data sets come with."""

from __future__ import annotations

import csv
import functools
import io
import os
import pathlib
from collections.abc import Iterable

from pcgjax.datasets import DatasetError, Problem
from pcgjax.datasets.sources import SourceError, read_bytes, text_of


def read_rows(
    path: pathlib.Path, delimiters: str = ",", fix: str = "put the published file back"
) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file as (line number, fields without blanks at either end); blank lines are left out.

    delimiters: of which the one that the first line has most often counts; fix: what to do about a bad file.

    Raises:
      DatasetError: not a CSV file, one that cannot be read, or no row.
    """
    try:
        text = text_of(read_bytes(path))
    except SourceError as error:
        raise DatasetError(f"{path}: {error}; {fix}") from None
    if "\0" in text:
        raise DatasetError(f"{path}: not a CSV table (it holds zero bytes); {fix}")
    first = text.lstrip().partition("\n")[0]
    delimiter = max(delimiters, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        rows = [(reader.line_num, [field.strip() for field in row]) for row in reader]
    except csv.Error as error:
        raise DatasetError(f"{path}: not a CSV table (line {reader.line_num}: {error})") from None
    rows = [(line, fields) for line, fields in rows if any(fields)]
    if not rows:
        raise DatasetError(f"{path}: the table is empty; {fix}")
    return rows


def read_table(
    path: pathlib.Path, required: Iterable[str], source: pathlib.Path
) -> tuple[list[tuple[int, dict[str, str]]], list[Problem]]:
    """A CSV file with a header: its rows as (line number, {column: field}), and the rows with too few or many fields.

    Columns are given as `column_name` spells them.

    Raises:
      DatasetError: as `read_rows`; a column of `required` is missing; no row fits the header.
    """
    (_, header), *body = read_rows(path)
    columns = [column_name(field) for field in header]
    for column in required:
        if column not in columns:
            raise DatasetError(f"{path}: no column {column!r} among {', '.join(columns)}; add or rename it")
    rows, problems = [], []
    for line, fields in body:
        if len(fields) == len(columns):
            rows.append((line, dict(zip(columns, fields, strict=True))))
        else:
            reason = f"mislabelled: line {line} has {len(fields)} fields, the header {len(columns)}"
            problems.append(Problem(relative(path, source), reason))
    if not rows:
        raise DatasetError(
            f"{path}: no row has the {len(columns)} fields {', '.join(columns)}; put the published file back"
        )
    return rows, problems


@functools.lru_cache(4096)
def column_name(text: str) -> str:
    """The name of a column or `#Key:` as releases agree on it: lower case, single blanks, no colon."""
    return " ".join(text.strip().rstrip(":").lower().split())


def relative(path: pathlib.Path, source: pathlib.Path) -> str:
    """`path` as seen from `source`, which need not contain it."""
    return pathlib.Path(os.path.relpath(path, source)).as_posix()
