"""The hand-corrected `<record>_StateAns.mat` of CinC 2016, read and written.

MATLAB 5 files with one cell array, `state_ans`, with a row (sample index, state name) for each state. Layout:
MathWorks, "MAT-File Format", level 5.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

_UINT8, _UINT16, _INT32, _UINT32, _MATRIX, _COMPRESSED, _UTF8 = 2, 4, 5, 6, 14, 15, 16  # data types
_CELL, _CHAR, _DOUBLE = 1, 4, 6  # array classes


def read(content: bytes) -> tuple[list[int], list[str]]:
    """(sample indices, state names) of a file's bytes.

    Raises:
      ValueError: what is wrong with the file.
    """
    return _as_published(content) or _as_scipy_reads_it(content)


def write(indices: Sequence[int], names: Sequence[str]) -> bytes:
    """The bytes of a file as published: small numbers for indices, each name a cell in a cell."""
    cells = [_matrix(_DOUBLE, (1, 1), _number(index)) for index in indices]
    cells += [_matrix(_CELL, (1, 1), _text(name)) for name in names]
    array = zlib.compress(_matrix(_CELL, (len(names), 2), b"".join(cells), b"state_ans"))
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + struct.pack("<2I", _COMPRESSED, len(array)) + array


def _element(kind: int, data: bytes) -> bytes:
    if 0 < len(data) <= 4:
        return struct.pack("<2H", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<2I", kind, len(data)) + data + bytes(-len(data) % 8)


def _matrix(array_class: int, shape: tuple[int, int], content: bytes, name: bytes = b"") -> bytes:
    flags, dimensions = struct.pack("<2I", array_class, 0), struct.pack("<2i", *shape)
    parts = (_element(_UINT32, flags), _element(_INT32, dimensions), _element(1, name), content)
    return _element(_MATRIX, b"".join(parts))


def _number(value: int) -> bytes:
    """A number in the smallest type, as MATLAB saves a double that is whole."""
    if value < 256:
        return _element(_UINT8, struct.pack("<B", value))
    if value < 65536:
        return _element(_UINT16, struct.pack("<H", value))
    return _element(_INT32, struct.pack("<i", value))


def _text(name: str) -> bytes:
    return _matrix(_CHAR, (1, len(name)), _element(_UTF8, name.encode()))


_NUMBER = np.frombuffer(_matrix(_DOUBLE, (1, 1), _number(1)), "<u4")  # the last two: type and value
_TYPES = {1 << 16 | _UINT8, 2 << 16 | _UINT16, 4 << 16 | _INT32}
_LARGEST = np.array([0, 2**8 - 1, 2**16 - 1, 0, 2**31 - 1], "<u4")  # by the bytes of a type
_NAMES = {
    cell: name
    for name in ("S1", "systole", "S2", "diastole", "(N", "N)")
    for cell in (_text(name), _matrix(_CELL, (1, 1), _text(name)))
}
_NAME = re.compile(b"|".join(map(re.escape, _NAMES)))


def _as_published(content: bytes) -> tuple[list[int], list[str]] | None:
    """Reads files as `write` writes them, with or without a cell around a name; None for any other file.

    All published files are such, and SciPy takes longer to read one than resampling its recording takes.
    """
    if len(content) < 136 or content[124:136] != b"\0\1IM" + struct.pack("<2I", _COMPRESSED, len(content) - 136):
        return None
    try:
        array = zlib.decompress(content[136:])
    except zlib.error:
        return None
    count = int.from_bytes(array[32:36], "little")
    head = _matrix(_CELL, (count & 0xFFFFFFF, 2), b"", b"state_ans")
    start, end = len(head), len(head) + count * _NUMBER.nbytes
    names = _NAME.findall(array, end)
    if (
        count == 0
        or array[: len(head)] != struct.pack("<2I", _MATRIX, len(array) - 8) + head[8:]
        or len(names) != count
        or sum(map(len, names)) != len(array) - end
    ):
        return None
    numbers = np.frombuffer(array, "<u4", count * len(_NUMBER), start).reshape(count, -1)
    types, values = numbers[:, -2], numbers[:, -1]
    if (numbers[:, :-2] != _NUMBER[:-2]).any() or not _TYPES.issuperset(types.tolist()):
        return None
    if (values > _LARGEST[types >> 16]).any():
        return None
    return values.tolist(), [_NAMES[name] for name in names]


def _as_scipy_reads_it(content: bytes) -> tuple[list[int], list[str]]:
    import io

    import scipy.io

    try:
        table = scipy.io.loadmat(io.BytesIO(content), variable_names=["state_ans"])["state_ans"]
    except KeyError:
        raise ValueError("the file has no variable 'state_ans'") from None
    except Exception as error:  # whatever the damage makes of the bytes
        raise ValueError(f"not a MATLAB file that can be read ({error})") from None
    if table.ndim != 2 or table.shape[1] != 2 or not len(table):
        raise ValueError(f"'state_ans' has shape {table.shape}, expected (n, 2): sample index, state name")
    indices = [_innermost(cell) for cell in table[:, 0]]
    names = [str(_innermost(cell)).strip() for cell in table[:, 1]]
    for index in indices:
        if not isinstance(index, np.integer | np.floating) or not float(index).is_integer():
            raise ValueError(f"sample index {index} is not a whole number")
    return list(map(int, indices)), names


def _innermost(cell: Any) -> Any:
    """A MATLAB cell's value: some cells hold cells, since the hand corrections were saved by different programs."""
    while isinstance(cell, np.ndarray):
        if cell.size != 1:
            raise ValueError(f"a cell of 'state_ans' holds {cell.size} values, expected one")
        cell = cell.item() if cell.dtype == object else cell.ravel()[0]
    return cell
