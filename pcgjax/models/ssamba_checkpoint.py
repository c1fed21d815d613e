"""SSAMBA checkpoints in the layout of the public PyTorch code: read into our net, and written from it.

Every array of theirs has its place in ours (`_entries`): the same loop checks shapes, reads and writes.
"""

from __future__ import annotations

import functools
import math
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pcgjax.models.ssamba_net import MEL_BINS, PATCH, SSAMBA, Unused, make_head, patch_grid

_PREFIX = "module."  # of torch.nn.DataParallel, which the public code wants to see
_WITHIN = ("state_dict", "model", "model_state_dict")  # where trainers' own files keep the state dict
_PRETRAIN_SIZES = ("p_input_fdim", "p_input_tdim")


class _Layout(NamedTuple):
    """How an array lies in a checkpoint and in our net."""

    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


def _unchanged(array: np.ndarray) -> np.ndarray:
    return array


def _taps_to_torch(kernel_KxE: np.ndarray) -> np.ndarray:
    return kernel_KxE.T[:, None]


def _taps_from_torch(kernel_Ex1xK: np.ndarray) -> np.ndarray:
    return kernel_Ex1xK[:, 0].T


def _patches_to_torch(kernel_PxD: np.ndarray) -> np.ndarray:
    return kernel_PxD.T.reshape(-1, 1, PATCH, PATCH)


def _patches_from_torch(kernel_Dx1xPxP: np.ndarray) -> np.ndarray:
    return kernel_Dx1xPxP.reshape(len(kernel_Dx1xPxP), -1).T


_SAME = _Layout(_unchanged, _unchanged)
_TRANSPOSED = _Layout(np.transpose, np.transpose)
_TAPS = _Layout(_taps_to_torch, _taps_from_torch)
_KERNEL = _Layout(_patches_to_torch, _patches_from_torch)


class _Entry(NamedTuple):
    """One array of a checkpoint."""

    name: str  # in the checkpoint
    variable: Any  # of our net
    part: tuple[int, ...]  # index of the array within the variable
    layout: _Layout


def _entries(model: SSAMBA) -> Iterator[_Entry]:
    """Every array of the public code's model and where it is in ours."""
    yield _Entry("v.cls_token", model.class_token, (), _SAME)
    yield _Entry("v.pos_embed", model.position, (), _SAME)
    yield _Entry("v.patch_embed.proj.weight", model.patch_kernel, (), _KERNEL)
    yield _Entry("v.patch_embed.proj.bias", model.patch_bias, (), _SAME)
    if model.unused_head:
        yield _Entry("v.head.weight", model.unused_head["weight"], (), _SAME)
        yield _Entry("v.head.bias", model.unused_head["bias"], (), _SAME)
    for number in range(2 * len(model.pairs.first.mixer.in_proj)):
        pair, second = divmod(number, 2)
        layer, name = (model.pairs.second if second else model.pairs.first), f"v.layers.{number}."
        mixer = layer.mixer
        yield _Entry(name + "mixer.in_proj.weight", mixer.in_proj, (pair,), _TRANSPOSED)
        for direction, b in enumerate(("_b", "") if second else ("", "_b")):
            for key, variable, layout in (
                (f"A{b}_log", mixer.A_log, _SAME), (f"D{b}", mixer.D, _SAME),
                (f"conv1d{b}.weight", mixer.conv_kernel, _TAPS), (f"conv1d{b}.bias", mixer.conv_bias, _SAME),
                (f"x_proj{b}.weight", mixer.x_proj, _TRANSPOSED), (f"dt_proj{b}.weight", mixer.dt_proj, _TRANSPOSED),
                (f"dt_proj{b}.bias", mixer.dt_bias, _SAME),
            ):  # fmt: skip
                yield _Entry(f"{name}mixer.{key}", variable, (pair, direction), layout)
        yield _Entry(name + "mixer.out_proj.weight", mixer.out_proj, (pair,), _TRANSPOSED)
        yield from _norm_entries(name + "norm", layer.norm, (pair,))
    yield from _norm_entries("v.norm_f", model.norm)
    if hasattr(model, "head"):
        yield from _norm_entries("mlp_head.0", model.head_norm)
        yield from _linear_entries("mlp_head.1", model.head)
    if hasattr(model, "mask_token"):
        yield _Entry("mask_embed", model.mask_token, (), _SAME)
        for name, predictor in (("cpredlayer", model.contrast), ("gpredlayer", model.reconstruction)):
            yield from _linear_entries(f"{name}.0", predictor.hidden)
            yield from _linear_entries(f"{name}.2", predictor.out)


def _norm_entries(name: str, norm: nnx.LayerNorm, part: tuple[int, ...] = ()) -> Iterator[_Entry]:
    yield _Entry(f"{name}.weight", norm.scale, part, _SAME)
    yield _Entry(f"{name}.bias", norm.bias, part, _SAME)


def _linear_entries(name: str, linear: nnx.Linear) -> Iterator[_Entry]:
    yield _Entry(f"{name}.weight", linear.kernel, (), _TRANSPOSED)
    yield _Entry(f"{name}.bias", linear.bias, (), _SAME)


def load_torch_checkpoint(
    path: str | pathlib.Path,
    frames: int = 1024,
    stride: int | tuple[int, int] = PATCH,
    *,
    classes: int | None = None,
    pooling: str = "avgtok",
    remat: bool = False,
    implementation: str = "auto",
) -> SSAMBA:
    """The model of a checkpoint that the public code wrote, pre-trained or fine-tuned; sizes come from the file.

    For another length or stride than the file's, the position embedding is cut around the middle of its time where it
    is longer and interpolated where it is shorter, as the public code does. Needs torch.

    Args:
      path: a state dict, with or without the prefix "module."; code that the file may hold is not run.
      frames, stride: of the model, as in `SSAMBA`.
      classes: K of a new linear head, where the file has none.
      pooling, remat, implementation: as in `SSAMBA` and its mixers.
    Returns: the model, parameters float32.
    Raises:
      ValueError: not such a file, keys that are missing, unknown or of another shape, or a size that cannot be; the
        message names the file and the keys.
    """
    tensors = read_tensors(path)

    def common(ending: str) -> tuple[int, ...]:
        """The shape of most keys of that ending, so that a damaged one is found and named below."""
        candidates = [array.shape for name, array in tensors.items() if name.endswith(ending) and array.ndim]
        if not candidates:
            raise ValueError(f"{path}: no key ends in {ending}; this is not a checkpoint of SSAMBA")
        return statistics.mode(candidates)

    layers = sum(name.endswith("mixer.in_proj.weight") for name in tensors)
    depth = layers + layers % 2  # an odd one lacks its other half, which is named below
    (width,), (inner, states) = common(".norm.weight")[-1:], ((1,) + common("mixer.A_log"))[-2:]
    pretraining = any(name.startswith(("mask_embed", *_PRETRAIN_SIZES, "cpredlayer", "gpredlayer")) for name in tensors)
    has_head = any(name.startswith("mlp_head") for name in tensors)
    if has_head and classes is not None:
        raise ValueError(f"{path}: has a head already; leave out classes")
    make = functools.partial(
        SSAMBA, width, depth, frames, stride,
        classes=common("mlp_head.1.weight")[0] if has_head else None, pretraining=pretraining, pooling=pooling,
        remat=remat, d_state=states, d_conv=common("mixer.conv1d.weight")[-1], expand=inner // width,
        dt_rank=common("mixer.dt_proj.weight")[-1], implementation=implementation,
    )  # fmt: skip
    try:
        model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))  # shapes alone: all values come from the file
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    head = [
        tensors[name].shape[0] for name in ("v.head.weight", "v.head.bias") if name in tensors and tensors[name].ndim
    ]
    if head:
        model.unused_head = nnx.Dict(weight=Unused(jnp.zeros((head[0], width))), bias=Unused(jnp.zeros(head[0])))
    entries = list(_entries(model))
    shapes = {entry.name: entry.layout.to_torch(np.empty(entry.variable.shape)[entry.part]).shape for entry in entries}
    shapes |= dict.fromkeys(_PRETRAIN_SIZES if pretraining else (), ())
    if "v.pos_embed" in tensors and tensors["v.pos_embed"].ndim == 3:
        shapes["v.pos_embed"] = (1, tensors["v.pos_embed"].shape[1], width)
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in shapes]
    problems += [
        f"{name} has shape {tensors[name].shape}, needs {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path}: {'; '.join(problems[:8])}{more}")
    tensors["v.pos_embed"] = _adapted(path, tensors, model.grid)
    arrays = {id(entry.variable): np.empty(entry.variable.shape, np.float32) for entry in entries}
    for entry in entries:
        arrays[id(entry.variable)][entry.part] = entry.layout.from_torch(tensors[entry.name])
    for entry in entries:
        entry.variable.set_value(jnp.asarray(arrays[id(entry.variable)]))
    if classes is not None:
        model.head_norm, model.head = make_head(width, classes, nnx.Rngs(0))
    return model


def save_torch_checkpoint(model: SSAMBA, path: str | pathlib.Path) -> None:
    """Writes a model as the public code would, under the same keys, with the prefix "module."; needs torch.

    Raises:
      ValueError: a model for pre-training with another stride than the patches' size, which the public code lacks.
    """
    import torch

    tensors = {}
    if hasattr(model, "mask_token"):
        if model.stride != (PATCH, PATCH):
            raise ValueError(f"{path}: stride={model.stride}; a checkpoint for pre-training has {PATCH}")
        tensors = {_PREFIX + n: torch.tensor(v) for n, v in zip(_PRETRAIN_SIZES, (MEL_BINS, model.frames), strict=True)}
    arrays = {id(entry.variable): np.asarray(entry.variable[...]) for entry in _entries(model)}
    for entry in _entries(model):
        array = entry.layout.to_torch(arrays[id(entry.variable)][entry.part])
        tensors[_PREFIX + entry.name] = torch.from_numpy(np.array(array, np.float32, order="C"))
    torch.save(tensors, path)


def read_tensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a state dict that `torch.save` wrote, by name, without the prefix "module."; needs torch.

    Floats of any width come as float32, integers as they are; parameters as their arrays; a state dict may lie beside
    other things under "state_dict", "model" or "model_state_dict". Code that the file may hold is not run.

    Raises:
      ImportError: torch is not installed.
      ValueError: not such a file, or a NaN or an infinity in an array; the message names both.
      OSError: no such file.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path}: reading a PyTorch checkpoint needs torch: pip install torch") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever the unpickler meets in a file that anyone wrote
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: not a PyTorch checkpoint of arrays alone, and nothing else in it was run ({reason}); "
            "give a state dict written by torch.save"
        ) from None
    if isinstance(state, dict) and len(within := [name for name in _WITHIN if isinstance(state.get(name), dict)]) == 1:
        state = state[within[0]]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: holds a {type(state).__name__}, needs a state dict")
    wrong = [name for name, value in state.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]!r} is not an array; give a state dict")
    while all(name.startswith(_PREFIX) for name in state):
        state = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    arrays = {}
    for name, value in state.items():
        try:
            arrays[name] = (value.float() if value.is_floating_point() else value).detach().numpy()
        except (RuntimeError, TypeError, ValueError) as error:  # sparse, quantised, without its values
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: {name} cannot be read ({reason}); give a state dict of plain arrays") from None
    refuse_not_finite(path, arrays)
    return arrays


def refuse_not_finite(path: str | pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Raises ValueError naming the first array that holds a NaN or an infinity, and how many more do."""
    names = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise ValueError(f"{path}: {names[0]} holds a NaN or an infinity{more}; copy or download the file again")


def _adapted(path: str | pathlib.Path, tensors: dict[str, np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    """The position embedding (1, 1 + F'T', D) of the file for another grid, as the public code changes it."""
    table = tensors["v.pos_embed"]
    patches, width = table.shape[1] - 1, table.shape[2]
    if _PRETRAIN_SIZES[1] in tensors:
        bins, frames = (int(tensors[name]) for name in _PRETRAIN_SIZES)
        file_grid = bins // PATCH, frames // PATCH
        if math.prod(file_grid) != patches:
            raise ValueError(
                f"{path}: v.pos_embed has {patches} patches, p_input_fdim and p_input_tdim give {file_grid}"
            )
    elif patches == math.prod(grid):
        file_grid = grid
    else:  # a fine-tuned model does not tell its stride: one of the two published
        rows = [patch_grid(PATCH, (step, step))[0] for step in (16, 10)]
        fitting = [count for count in rows if patches % count == 0]
        if len(fitting) != 1:
            raise ValueError(
                f"{path}: v.pos_embed has {patches} patches, frames and stride give {grid}, and a fine-tuned "
                "checkpoint does not say its own; give those of its training"
            )
        file_grid = fitting[0], patches // fitting[0]
    if file_grid == grid:
        return table
    image = table[0, 1:].reshape(*file_grid, width)
    for axis in (1, 0):  # time, then frequency
        size, count = image.shape[axis], grid[axis]
        if count < size:
            begin = size // 2 - count // 2
            image = image.take(range(begin, begin + count), axis)
        else:
            shape = tuple(count if i == axis else n for i, n in enumerate(image.shape))
            image = np.asarray(jax.image.resize(image, shape, "linear", antialias=False))
    return np.concatenate([table[:, :1], image.reshape(1, -1, width)], axis=1)
