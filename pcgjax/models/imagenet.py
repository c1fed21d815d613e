"""ImageNet weights from a local file of torchvision or timm, loaded into the image nets of `models.image`."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pcgjax.models.ssamba_checkpoint import read_tensors, refuse_not_finite

_STEMS = ("conv1.weight", "features.0.0.weight", "patch_embed.proj.weight")
_UNUSED = ("fc.", "classifier.3.", "head.")  # the heads for ImageNet's thousand classes
_ENDINGS = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def load_imagenet(model: Any, path: str | pathlib.Path) -> Any:
    """The model with its trunk's weights and running averages from a file of torchvision (resnet, mobilenet_v3) or
    timm (resnet, vit); its head stays. Changes `model`.

    A stem of three channels is summed into one: the same as the clip repeated over three. A transformer's positions
    are interpolated (bicubic, antialiased, as timm does) from the file's square grid to the clip's.

    Args:
      model: an `image.ImageClassifier`.
      path: a .safetensors, or a state dict of torch.save, which needs torch; code that the file may hold is not run.
    Raises:
      ValueError: not such a file, keys that are missing, unknown or of another shape, or a NaN; the message names them.
      OSError: no such file.
    """
    tensors = {
        name: array
        for name, array in _read(path).items()
        if not name.startswith(_UNUSED) and not name.endswith("num_batches_tracked")
    }
    grid = getattr(model.trunk, "grid", None)  # of a transformer
    filled, problems = [], []
    for place, variable in nnx.to_flat_state(nnx.state(model.trunk)):
        *above, last = map(str, place)
        name = ".".join([*above, _ENDINGS.get(last, last)])
        if name not in tensors:
            problems.append(f"missing {name}")
            continue
        array = tensors.pop(name)
        values = _as_ours(name, array, last, grid)
        if values is None or values.shape != variable.shape:
            problems.append(f"{name} has shape {array.shape}, which is not this model's")
        else:
            filled.append((place, variable.replace(jnp.asarray(values, variable.dtype))))
    problems += [f"unknown {name}" for name in tensors]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"{path}: {'; '.join(problems[:8])}{more}; model.name, model.width and model.blocks must be the file's"
        )
    nnx.update(model.trunk, nnx.from_flat_state(filled))
    return model


def _read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    if pathlib.Path(path).suffix != ".safetensors":
        return read_tensors(path)
    try:
        import safetensors.flax
    except ImportError as error:
        raise ImportError(f"{path}: reading it needs safetensors: pip install safetensors") from error
    try:
        arrays = {name: np.asarray(x, np.float32) for name, x in safetensors.flax.load_file(str(path)).items()}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a .safetensors file of arrays: {error}") from None
    refuse_not_finite(path, arrays)
    return arrays


def _as_ours(name: str, array: np.ndarray, last: str, grid: tuple[int, int] | None) -> np.ndarray | None:
    """An array of a file as the model has it; None where its number of axes tells that it is another."""
    if name == "pos_embed":
        return _positions(array, grid)
    if last != "kernel":
        return array
    if array.ndim not in (2, 4):
        return None
    if name in _STEMS:
        array = array.sum(1, keepdims=True)
    # Dense layers are 1x1 convolutions in some files; (out, in, frequency, time) -> (time, frequency, in, out).
    dense = ".fc" in name or name == _STEMS[2] or array.ndim == 2
    return array.reshape(len(array), -1).T if dense else array.T


def _positions(table: np.ndarray, grid: tuple[int, int] | None) -> np.ndarray | None:
    """(1, 1 + side^2, D) positions of a square picture, interpolated to (1, 1 + F'T', D); None for another table."""
    side = math.isqrt(max(table.shape[1] - 1, 0)) if table.ndim == 3 else 0
    if not side or grid is None or table.shape[:2] != (1, side**2 + 1):
        return None
    token, patches = table[:, :1], table[0, 1:].reshape(side, side, -1)
    if (side, side) != grid:
        patches = jax.image.resize(patches, (*grid, patches.shape[-1]), "cubic", antialias=True)
    return np.concatenate([token, np.reshape(patches, (1, -1, table.shape[-1]))], 1)
