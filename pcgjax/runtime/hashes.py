"""hashes.json: what the files of a folder were when they were written, and whether they still are.

A flipped bit, a cut file or two exchanged ones would give other numbers without an error. SHA-256 finds each of them.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from pcgjax.runtime import files

NAME = "hashes.json"


def of_file(path: str | pathlib.Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_json(value: Any) -> str:
    """The SHA-256 of a value that JSON can hold, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(folder: pathlib.Path, names: Iterable[str] | None = None) -> None:
    """Writes `folder`/hashes.json: of the files `names`, or of all files below the folder."""
    if names is None:
        below = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        names = (path.as_posix() for path in below if path.as_posix() != NAME)
    _write(folder, {name: _facts(folder / name) for name in names})


def update(folder: pathlib.Path, name: str) -> None:
    """Enters a file that was written anew, where the folder has hashes.json."""
    if (listed := read(folder)) is not None:
        _write(folder, listed | {name: _facts(folder / name)})


def _facts(path: pathlib.Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": of_file(path)}


def _write(folder: pathlib.Path, listed: dict[str, dict[str, Any]]) -> None:
    listed = dict(sorted(listed.items()))
    files.write_text(folder / NAME, json.dumps({"files": listed, "sha256": of_json(listed)}, indent=1) + "\n")


def read(folder: pathlib.Path) -> dict[str, dict[str, Any]] | None:
    """{name: {"bytes", "sha256"}} of `folder`/hashes.json; None where there is none, as in folders of earlier versions
    and of runs that have not ended.

    Raises:
      DamagedError: it is not what `write` wrote.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
        listed = content["files"]
        if content["sha256"] == of_json(listed):
            return listed
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise files.DamagedError(f"{path}: damaged, it is not what was written; remove it to go on without its check")


def damage(folder: pathlib.Path, names: Iterable[str] | None = None) -> list[str]:
    """A line for each file that is missing or has other bytes than hashes.json says; [] where all are as written.

    Args: names: look at these alone, as far as they are listed; None: at all.
    Raises:
      DamagedError: hashes.json itself is damaged.
    """
    listed = read(folder) or {}
    lines = []
    for name in listed if names is None else [name for name in names if name in listed]:
        path, written = folder / name, listed[name]
        if not path.is_file():
            lines.append(f"{path}: missing, it was written with {written['bytes']} bytes")
        elif (size := path.stat().st_size) != written["bytes"]:
            lines.append(f"{path}: damaged, {size} bytes and not the {written['bytes']} that were written")
        elif of_file(path) != written["sha256"]:
            lines.append(f"{path}: damaged, its {size} bytes are not those that were written (SHA-256)")
    return lines


def intact(path: pathlib.Path, fix: str = "let the run's command end again, which writes it anew") -> bool:
    """Whether a file is there, as it was written.

    Raises:
      DamagedError: its folder's hashes.json lists it, and it is missing or has other bytes.
    """
    check(path.parent, [path.name], fix)
    return path.exists()


def check(folder: pathlib.Path, names: Iterable[str] | None = None, fix: str = "") -> None:
    """Raises DamagedError where `damage` finds any, naming the first file, how many more, and the fix."""
    if lines := damage(folder, names):
        more = f" (and {len(lines) - 1} more files)" if len(lines) > 1 else ""
        raise files.DamagedError(f"{lines[0]}{more}{'; ' + fix if fix else ''}")
