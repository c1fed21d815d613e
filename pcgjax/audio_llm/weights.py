"""Weight files of others, *.safetensors: which there are, what they hold, and what is wrong with it, by name."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import SafetensorError

# What transformers may raise, beside its own, at a JSON that is damaged.
ODD_FILE = (KeyError, TypeError, AttributeError, IndexError, RecursionError, ZeroDivisionError)


class ModelError(ValueError):
    """A model folder or an adapter that cannot be used; the message names it and the fix."""


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder's *.safetensors, sorted; hidden ones, as a Mac leaves beside each file, are no weights."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def read(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file by name, in the types they are stored in.

    Raises:
      ModelError: it is none, or is cut.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {one_line(error)}; copy or download it again") from None


def not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """The names of those that hold a NaN or an infinity."""
    return [name for name, tensor in tensors if not _finite(tensor)]


def _finite(tensor: torch.Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    # Both are NaN where any value is. One pass, and nothing of the tensor's size beside it.
    return all(math.isfinite(float(bound)) for bound in torch.aminmax(tensor.detach()))


def refuse_not_finite(where: Any, tensors: Iterable[tuple[str, torch.Tensor]], fix: str) -> None:
    """Raises ModelError naming the first tensor that holds a NaN or an infinity, and how many more do."""
    if names := not_finite(tensors):
        raise ModelError(f"{where}: {first_and_more([f'{name} holds a NaN or an infinity' for name in names])}; {fix}")


def first_and_more(lines: list[str]) -> str:
    """The first line, and how many more there are."""
    return f"{lines[0]} (and {len(lines) - 1} more)" if len(lines) > 1 else lines[0]


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's message as one line of at most `most` characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__
