"""pcgjax.datasets.state_ans: the quick reader agrees with SciPy, or leaves the file to it."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib

import numpy as np
import pytest
import scipy.io

from pcgjax.datasets import state_ans

INDICES = [1, 255, 256, 65535, 65536, 2**31 - 1]
NAMES = ["S1", "systole", "S2", "diastole", "(N", "N)"]


def cells(*values: object) -> np.ndarray:
    """A MATLAB cell array (1, n)."""
    array = np.empty((1, len(values)), object)
    array[0, :] = values
    return array


def saved(rows: list[tuple[object, object]], compressed: bool = True, variable: str = "state_ans") -> bytes:
    table = np.empty((len(rows), 2), object)
    for row, pair in enumerate(rows):
        table[row, :] = pair
    file = io.BytesIO()
    scipy.io.savemat(file, {variable: table}, do_compression=compressed)
    return file.getvalue()


def by_scipy(content: bytes) -> tuple[list[int], list[str]] | str:
    try:
        return state_ans._as_scipy_reads_it(content)
    except ValueError as error:
        return str(error)


def test_what_is_written_is_read_by_both() -> None:
    content = state_ans.write(INDICES, NAMES)
    assert state_ans._as_published(content) == (INDICES, NAMES)
    assert by_scipy(content) == (INDICES, NAMES)


def as_matlab(rows: list[tuple[object, object]]) -> bytes:
    """As `saved`, where MATLAB says that an index saved in few bytes is a double."""
    content = saved(rows)
    array = bytearray(zlib.decompress(content[136:]))
    for start in range(64, 64 + 56 * len(rows), 56):
        array[start + 16] = state_ans._DOUBLE
    packed = zlib.compress(bytes(array))
    return content[:132] + len(packed).to_bytes(4, "little") + packed


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("number", [float, int, np.uint8, np.int32, cells, lambda n: cells(cells(float(n)))])
@pytest.mark.parametrize("name", [str, cells, lambda word: cells(cells(word)), lambda word: f" {word} "])
def test_any_nesting_and_type(number, name, compressed: bool) -> None:
    content = saved([(number(n), name(word)) for n, word in zip(range(1, 7), NAMES, strict=True)], compressed)
    assert state_ans.read(content) == ([1, 2, 3, 4, 5, 6], NAMES)


@pytest.mark.parametrize("name", [str, cells])
def test_matlabs_own_form_is_read_quickly(name) -> None:
    indices, kinds = [1, 255, 256, 65535, 65536, 2**31 - 1], ["u1", "u1", "u2", "u2", "i4", "i4"]
    content = as_matlab([(np.array(n, k), name(w)) for n, k, w in zip(indices, kinds, NAMES, strict=True)])
    assert state_ans._as_published(content) == (indices, NAMES)
    assert by_scipy(content) == (indices, NAMES)


UNEXPECTED = {
    "an unknown name": saved([(1.0, "S1"), (2.0, "S9")]),
    "two values": saved([(np.array([1.0, 2.0]), "S1")]),
    "not whole": saved([(1.5, "S1")]),
    "negative": as_matlab([(np.array(-1, "i4"), "S1")]),
    "another variable": saved([(1.0, "S1")], variable="states"),
    "no row": saved([]),
    "nothing": b"",
    "text": b"not found" * 99,
}


@pytest.mark.parametrize("kind", UNEXPECTED)
def test_what_is_not_as_published_is_left_to_scipy(kind: str) -> None:
    assert state_ans._as_published(UNEXPECTED[kind]) is None


def test_whatever_bytes_are_changed_both_agree() -> None:
    content = state_ans.write(INDICES, NAMES)
    array = zlib.decompress(content[136:])
    rng = np.random.default_rng(0)
    quick = 0
    for position in [*range(len(array)), *rng.integers(0, 300, 400)]:
        changed = bytearray(array)
        changed[position] = rng.integers(256)
        packed = zlib.compress(bytes(changed))
        file = content[:132] + len(packed).to_bytes(4, "little") + packed
        if (quickly_read := state_ans._as_published(file)) is not None:
            assert quickly_read == by_scipy(file)
            quick += 1
    assert quick > 20  # an index may take many values
    for position in range(len(content)):  # of the packed file: nothing but ValueError
        try:
            state_ans.read(content[:position] + bytes([rng.integers(256)]) + content[position + 1 :])
            state_ans.read(content[:position])
        except ValueError:
            pass


def test_a_published_file_is_read_without_scipy() -> None:
    program = (
        "import sys; from pcgjax.datasets import state_ans\n"
        "state_ans.read(state_ans.write([1, 300], ['S1', 'systole'])); assert 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
