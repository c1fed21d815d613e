"""Checkpoints of the PyTorch trainers: adapters, weights and moments as safetensors, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pcgjax.audio_llm import batches
from pcgjax.audio_llm import model as llm
from pcgjax.runtime.files import CheckpointError


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Of this step, counted from 0: linear warm-up, then half a cosine that ends at 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def newest(workdir: str | pathlib.Path, kind: str) -> pathlib.Path | None:
    """The newest folder checkpoints/KIND-STEP of a run, kind last or best; each is there whole or not at all."""
    folders = pathlib.Path(workdir).glob(f"checkpoints/{kind}-*")
    return max(folders, key=lambda path: int(path.name.split("-")[1]), default=None)


def best_adapter(workdir: str | pathlib.Path) -> pathlib.Path:
    """The folder with a run's best adapter by validation accuracy.

    Raises:
      CheckpointError: there is none.
    """
    folder = newest(workdir, "best")
    if folder is None:
        raise CheckpointError(f"{workdir}: no trained adapter there (checkpoints/best-*); train one first")
    return folder / "adapter"


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter whole, on the CPU, where this process holds a part of it."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu().contiguous()


def save(workdir: pathlib.Path, kind: str, step: int, model: Any, weights: dict, optimizer: Any, meta: dict) -> None:
    """Writes checkpoints/KIND-STEP: adapter/, optimizer.safetensors, meta.json; then removes the one before.

    Every process calls it, for parameters that are divided between them; one writes, the others wait for it.
    """
    tensors, moments = {name: full(p) for name, p in weights.items()}, moments_of(weights, optimizer)
    rank, processes = batches.process()
    if rank == 0:
        write(workdir, kind, step, lambda folder: llm.save_adapter(model, folder / "adapter", tensors), moments, meta)
    if processes > 1:
        dist.barrier()


def moments_of(weights: dict[str, Any], optimizer: Any) -> dict[str, torch.Tensor] | None:
    """What the optimizer knows of each weight, as "name|moment"; None without one."""
    if optimizer is None:
        return None
    return {
        f"{name}|{key}": full(torch.as_tensor(value))
        for name, p in weights.items()
        for key, value in optimizer.state.get(p, {}).items()
    }


def write(
    workdir: pathlib.Path, kind: str, step: int, write_weights: Callable[[pathlib.Path], object],
    moments: dict[str, torch.Tensor] | None, meta: dict,
) -> None:  # fmt: skip
    """Writes checkpoints/KIND-STEP: what `write_weights(folder)` writes, moments as optimizer.safetensors (None: none),
    meta.json; then removes the one before. It is there whole or not at all."""
    from safetensors.torch import save_file

    target = workdir / "checkpoints" / f"{kind}-{step:08d}"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        write_weights(temporary)
        if moments is not None:
            save_file(moments, temporary / "optimizer.safetensors")
        (temporary / "meta.json").write_text(json.dumps(meta | {"step": step}) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for other in target.parent.glob(f"{kind}-*"):
        if other != target:
            shutil.rmtree(other)


def put(weights: dict[str, Any], folder: pathlib.Path, optimizer: Any = None) -> dict:
    """Sets adapter weights, and the optimizer's moments, to those of a checkpoint; returns its meta.json.

    Raises:
      CheckpointError: it cannot be read, or is of another configuration.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    def read(path: pathlib.Path) -> dict[str, torch.Tensor]:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); remove {folder.name}") from None

    def like(p: Any, value: torch.Tensor) -> torch.Tensor:
        if hasattr(p, "full_tensor") and value.shape == p.shape:
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
        return value.to(p.device) if value.ndim else value

    saved = read(folder / "adapter" / "adapter_model.safetensors")
    names = {name.replace(".default.", "."): name for name in weights}
    if saved.keys() != names.keys():
        odd = sorted(saved.keys() ^ names.keys())[0]
        raise CheckpointError(f"{folder}: its adapter is not this configuration's: {odd}")
    with torch.no_grad():
        for name, value in saved.items():
            weights[names[name]].copy_(like(weights[names[name]], value))
    if optimizer is not None:
        for key, value in read(folder / "optimizer.safetensors").items():
            name, kind = key.rsplit("|", 1)
            optimizer.state[weights[name]][kind] = like(weights[name], value)
    return json.loads((folder / "meta.json").read_text())
