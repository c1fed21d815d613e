"""SIGTERM and SIGINT end a training after its present stretch of steps, saved, with the shell's exit status."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from absl import logging

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """Within the body a signal's number is added to the list that is given, and nothing else happens."""
    received: list[int] = []

    def add(number: int, _: object) -> None:
        received.append(number)

    handlers = {number: signal.signal(number, add) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def leave(number: int, step: int) -> NoReturn:
    """Ends the process as a shell expects of one that the signal `number` ended; its checkpoint at `step` is saved."""
    logging.warning("stopped by signal %d at step %d, saved; the same command goes on", number, step)
    sys.exit(128 + number)
