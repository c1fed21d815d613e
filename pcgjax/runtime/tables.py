"""CSV files that a spreadsheet opens as what they are: text that it would take for a formula is marked as text.

A file or a person may be named "=HYPERLINK(...)" or "-a"; an apostrophe before it makes it text, and `unmarked` takes
it off again.
"""

from __future__ import annotations

import csv
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pcgjax.runtime import files

# What makes a formula at the start of a cell, in full width too, behind apostrophes that are the text's own.
_FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)")


def write_csv(path: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a line of names and the rows, whole or not at all."""
    with files.replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([marked(name) for name in header])
        writer.writerows([marked(value) for value in row] for row in rows)


def marked(value: Any) -> Any:
    """A cell's value, text that would be a formula behind an apostrophe."""
    if not isinstance(value, str):
        return value
    value = value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # a file's name may be no text
    return f"'{value}" if _FORMULA.match(value) and not _NUMBER.fullmatch(value) else value


def unmarked(text: str) -> str:
    """What `marked` was given."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
