"""Files of a data set as they lie on disk: which count, what their names are, and their bytes.

What is wrong with one file is a `SourceError` here, for every loader: a link to itself, a folder in a file's place,
an over-long name, no permission, a device.
"""

from __future__ import annotations

import os
import pathlib
import stat
from collections.abc import Iterator
from typing import BinaryIO


class SourceError(ValueError):
    """A file that cannot be read; the message begins with `missing` or `unreadable`."""


def opened(path: str | pathlib.Path, buffering: int = -1) -> BinaryIO:
    """Opens a file for reading.

    Raises:
      SourceError: `missing` or `unreadable`.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb", buffering)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError("missing: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise SourceError(f"unreadable: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(mode):
        raise SourceError("missing: no such file (a folder has its name)")
    raise SourceError("unreadable: not a file but a pipe or device")


def read_bytes(path: str | pathlib.Path) -> bytes:
    """The file's bytes.

    Raises:
      SourceError: as `opened`.
    """
    try:
        with opened(path, buffering=0) as file:  # buffering would take longer than reading
            return file.read()
    except OSError as error:
        raise SourceError(f"unreadable: {error.strerror or error}") from None


def text_of(raw: bytes) -> str:
    """The text of a table or header: UTF-8, UTF-16 where it is marked so, else Latin-1; without the mark."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", "replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.removeprefix(b"\xef\xbb\xbf").decode("latin-1")


class Folder:
    """The visible files of one folder, found by name; another spelling in capitals counts where there is no exact one.

    Hidden files (`._a.wav` of macOS, `.DS_Store`) are passed over. The folder is listed once: asking for each file
    takes longer.

    Raises:
      SourceError: `unreadable`.
    """

    def __init__(self, folder: pathlib.Path):
        self.path = folder
        try:
            with os.scandir(folder) as entries:
                self.names = sorted(entry.name for entry in entries if entry.name[0] != "." and _is_file(entry))
        except OSError as error:
            raise SourceError(f"unreadable: {error.strerror or error}") from None
        self._there = frozenset(self.names)
        self._lower = {name.lower(): name for name in reversed(self.names)}

    def __contains__(self, name: str) -> bool:
        return name in self._there or name.lower() in self._lower

    def __getitem__(self, name: str) -> pathlib.Path:
        """The path of a file, whether or not it is there."""
        return self.path / (name if name in self._there else self._lower.get(name.lower(), name))

    def ending(self, suffix: str) -> Iterator[pathlib.Path]:
        """The files with this suffix, in any case, sorted by name."""
        return (self.path / name for name in self.names if name.lower().endswith(suffix))


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Links that lead nowhere count, so that whoever reads them says so."""
    try:
        return not entry.is_dir()
    except OSError:
        return True


def printable(name: str | pathlib.Path) -> str:
    r"""A file name as UTF-8 text: bytes that are none are written `\xff`."""
    name = os.fspath(name)
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")
