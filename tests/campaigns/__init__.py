"""Campaigns: damage many times what the project writes or reads, and do what a user would do next.

    python -m tests.campaigns.NAME [--count=N] [--seed=S]

Each prints a line a kind and at the end what was tried, survived and silent. Survived: the same result as without the
damage, or a message that names it. Silent: another result without a message.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import pathlib
import signal
import traceback
from collections.abc import Callable, Iterator

import numpy as np

OUTCOMES = ("survived", "silent", "traceback", "hang")
NAMED = (ValueError, OSError, FloatingPointError)  # what `files.run` ends in one line


class Tally:
    """How often each outcome came of each kind of damage."""

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def add(self, kind: str, outcome: str, about: str = "") -> None:
        self.counts[kind][outcome] += 1
        if outcome != "survived":
            print(f"{outcome}: {kind}: {about}", flush=True)

    def end(self) -> int:
        """Prints the table; returns the exit status."""
        for kind, counts in sorted(self.counts.items()):
            print(f"{kind}: tried {counts.total()}", *(f"{name} {counts[name]}" for name in OUTCOMES), sep="  ")
        total = sum(self.counts.values(), collections.Counter())
        tried, survived, silent, traced, hung = total.total(), *(total[name] for name in OUTCOMES)
        print(f"tried {tried}  survived {survived}  silent {silent}  (traceback {traced}, hang {hung})")
        return int(survived < tried)


class HangError(BaseException):
    pass


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """HangError where the body takes longer."""

    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def outcome_of(action: Callable[[], object], wanted: object, seconds: int = 60, warned: bool = True) -> tuple[str, str]:
    """(outcome, more about it) of an action whose result without damage is `wanted`.

    warned: a warning is message enough for another result.
    """
    heard = _Warnings()
    logger = logging.getLogger("absl")
    logger.addHandler(heard)
    try:
        with deadline(seconds):
            result = action()
    except NAMED as error:
        return ("survived", str(error)) if "\n" not in str(error) else ("traceback", f"several lines: {error}")
    except HangError:
        return "hang", ""
    except Exception:
        return "traceback", traceback.format_exc()
    finally:
        logger.removeHandler(heard)
    return ("survived" if result == wanted or (warned and heard.lines) else "silent"), "; ".join(heard.lines)


def damage(kind: str, path: pathlib.Path, other: pathlib.Path, rng: np.random.Generator) -> str:
    """Flips a bit of a file, cuts it, deletes it, or exchanges it with `other`; says what was done."""
    size = path.stat().st_size
    if kind == "flip":
        at, bit = int(rng.integers(size)), int(rng.integers(8))
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0] ^ (1 << bit)
            file.seek(at)
            file.write(bytes([byte]))
        return f"bit {bit} of byte {at} of {size}"
    if kind == "cut":
        at = int(rng.integers(size))
        os.truncate(path, at)
        return f"cut at {at} of {size}"
    if kind == "delete":
        path.unlink()
        return "deleted"
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"exchanged with {other}"


DAMAGES = ("flip", "flip", "flip", "cut", "delete", "exchange")
