"""metrics.jsonl, TensorBoard and train.log of a run."""

from __future__ import annotations

import json
import logging as std_logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from absl import logging

from pcgjax.runtime import files


def history(path: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl; a last one that was cut, as a full disk leaves it, is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number}: {error}; remove that line") from None
    return values


def rewind(path: pathlib.Path, keep: Callable[[dict], bool]) -> None:
    """Leaves in metrics.jsonl only the lines that `keep` is true of: those of the checkpoint a run goes on from."""
    write_lines(path, filter(keep, history(path)))


def write_lines(path: pathlib.Path, lines: Iterable[dict]) -> None:
    """Replaces metrics.jsonl by these lines."""
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def open_board(workdir: pathlib.Path, step: int = 0, name: str = "") -> Any:
    """A TensorBoard writer to `workdir/tensorboard/name`, for `log_line`; None, and a warning, without tensorboardX.

    step: that of the checkpoint from which the run goes on; what was written of later ones is no longer shown.
    """
    # It would import PyTorch, two seconds of every run, only to recognise its tensors.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX
    except ImportError as error:
        logging.warning("no TensorBoard: %s; metrics.jsonl has the numbers", error)
        return None
    finally:
        if hidden:
            del sys.modules["torch"]
    # Its files are named after the second: one more start within it must not write over them.
    suffix = f".{time.time_ns()}"
    return tensorboardX.SummaryWriter(
        str(workdir / "tensorboard" / name), purge_step=step + 1, flush_secs=1, filename_suffix=suffix
    )


def log_line(path: pathlib.Path, step: int, split: str, values: dict, board: Any = None) -> None:
    """Adds a line to metrics.jsonl, and its finite numbers to the board (of `open_board`) as "split/name"."""
    finite = {k: (v if v is None or np.isfinite(v) else None) for k, v in values.items()}
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "split": split} | finite) + "\n")
    plot(board, step, split, values)


def plot(board: Any, step: int, split: str, values: dict) -> None:
    """Adds the finite numbers to the board, if there is one."""
    for name, value in values.items() if board is not None else ():
        if value is not None and np.isfinite(value):
            board.add_scalar(f"{split}/{name}", value, step)


def log_to(workdir: pathlib.Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    handler = std_logging.FileHandler(workdir / "train.log")
    handler.setFormatter(logging.PythonFormatter())
    handler.addFilter(files.own_or_warning)
    logging.get_absl_logger().addHandler(handler)
