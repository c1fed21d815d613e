"""metrics.jsonl, TensorBoard and train.log of a run."""

from __future__ import annotations

import json
import logging as std_logging
import pathlib
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from absl import logging

from pcgjax.runtime import files, hashes


def history(path: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl; a last one that was cut, as a full disk leaves it, is left out.

    Raises:
      ValueError (also DamagedError): a line that no run writes, by its number.
    """
    hashes.check(path.parent, [path.name], "put it back, or remove hashes.json to go on without its check")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); remove that line") from None
        step, split = (entry.get("step"), entry.get("split")) if isinstance(entry, dict) else (None, None)
        if not isinstance(step, int | float) or split not in ("train", "validation", "test"):
            raise ValueError(
                f"{path}, line {number}: need an object with `step`, a number, and `split`, one of train, validation "
                "or test; remove that line"
            )
        check = entry.pop("check", None)  # lines of earlier versions have none
        texts = [name for name, value in entry.items() if isinstance(value, str) and name != "split"]
        if texts or check not in (None, _check(entry)):
            raise files.DamagedError(f"{path}, line {number}: damaged, it is not what was written; remove that line")
        entries.append(entry)
    return entries


def every_line(line: dict) -> bool:
    return True


def rewind(
    path: pathlib.Path, keep: Callable[[dict], bool], written: str | None = None,
    of: Callable[[dict], bool] = every_line,
) -> None:  # fmt: skip
    """Leaves in metrics.jsonl only the lines that `keep` is true of: those of the checkpoint a run goes on from.

    written: `digest` of those of them that `of` is true of, as the checkpoint has it; where they are others, a warning
    says so.
    """
    kept = list(filter(keep, history(path)))
    found = _digest(filter(of, kept))
    if written is not None and written != found:
        logging.warning(
            "%s: the %s lines up to the checkpoint are not the %s that this run wrote; its curves show what is there",
            path, found.split()[0], written.split()[0],
        )  # fmt: skip
    write_lines(path, kept)


def digest(path: pathlib.Path, of: Callable[[dict], bool] = every_line) -> str:
    """How many lines metrics.jsonl has of those that `of` is true of, and the CRC-32 of them all."""
    return _digest(filter(of, history(path)))


def _digest(lines: Iterable[dict]) -> str:
    checks = [_check(line) for line in lines]
    return f"{len(checks)} {zlib.crc32(' '.join(checks).encode()):08x}"


def write_lines(path: pathlib.Path, lines: Iterable[dict]) -> None:
    """Replaces metrics.jsonl by these lines."""
    files.write_text(path, "".join(_text(line) for line in lines))


def _text(line: dict) -> str:
    return json.dumps(line | {"check": _check(line)}) + "\n"


def _check(line: dict) -> str:
    """The CRC-32 of a line without its check, by which a changed digit is found."""
    return f"{zlib.crc32(json.dumps(line).encode()):08x}"


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
        file.write(_text({"step": step, "split": split} | finite))
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
