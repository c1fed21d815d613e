"""Checkpoints of the PyTorch trainers: adapters, weights and moments as safetensors, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from absl import logging
from safetensors import SafetensorError, safe_open

import pcgjax
from pcgjax.audio_llm import batches
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm.weights import ModelError, first_and_more, not_finite, one_line
from pcgjax.audio_llm.weights import read as weights_of
from pcgjax.runs.config import refuse_changes
from pcgjax.runs.results import read_json
from pcgjax.runtime import files, hashes
from pcgjax.runtime.files import CheckpointError

# Of the audio LLM, where and how fast it is computed: a run may go on with other values.
FREE = (("parallel", "fsdp"), ("train", "accumulate"), ("train", "log_steps"), ("model", "checkpointing"),
        ("model", "compile"), ("model", "share_prefix"), ("front_end", "segments"))  # fmt: skip
_NAME = re.compile(r"(last|best)-([0-9]+)")
_HOLDS = ("meta.json", "hashes.json", "adapter", "model.safetensors")  # a folder without any of them is no checkpoint
_KEPT = 2
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of AdamW


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Of this step, counted from 0: linear warm-up, then half a cosine that ends at 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def folders(workdir: str | pathlib.Path, kind: str, told: bool = False) -> list[pathlib.Path]:
    """The folders checkpoints/KIND-STEP of a run that hold something, the newest first, kind last or best.

    told: warn of what else lies in checkpoints/ and is passed over.
    """
    found = []
    for path in sorted(pathlib.Path(workdir).glob("checkpoints/*")):
        name = _NAME.fullmatch(path.name)
        if name and any((path / file).exists() for file in _HOLDS):
            if name[1] == kind:
                found.append(path)
        elif told and not path.name.startswith("."):
            logging.warning("%s: no checkpoint, passed over; remove it", path)
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: pathlib.Path) -> int:
    return int(folder.name.rpartition("-")[2])


def newest(workdir: str | pathlib.Path, kind: str) -> pathlib.Path | None:
    """The newest folder checkpoints/KIND-STEP of a run; each is there whole or not at all."""
    return next(iter(folders(workdir, kind)), None)


def meta_of(folder: pathlib.Path) -> dict[str, Any]:
    """meta.json of a checkpoint whose every file is as it was written; {} where an adapter lies there without one.

    Raises:
      DamagedError: a file is not as it was written.
    """
    hashes.check(folder)
    path = folder / "meta.json"
    if not path.exists() and folder.name.startswith("best-"):
        logging.warning("%s: has no meta.json, so nothing says which run it is of", folder)
        return {}
    try:
        meta = dict(json.loads(path.read_bytes()))
        if meta["step"] != step_of(folder):
            raise files.DamagedError(f"{folder}: not the checkpoint of its name, but that of step {meta['step']}")
        for weights in (*folder.glob("*.safetensors"), *folder.glob("adapter/*.safetensors")):
            if not weights.name.startswith("."):
                with safe_open(weights, "pt"):  # a cut one, where hashes.json is not there to tell it
                    pass
        return meta
    except files.DamagedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise files.DamagedError(f"{path.parent}: damaged ({one_line(error)})") from None


@contextlib.contextmanager
def understood(folder: pathlib.Path) -> Iterator[None]:
    """DamagedError for what is not in a meta.json, of a version without hashes, that should be."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise files.DamagedError(f"{folder}/meta.json: damaged ({one_line(error)}); remove {folder.name}") from None


def intact(workdir: str | pathlib.Path, kind: str) -> tuple[pathlib.Path, dict[str, Any]] | None:
    """(the newest whole checkpoint of a kind, its meta.json), with a warning that names newer ones that are damaged;
    None where there is none of that kind.

    Raises:
      DamagedError: there are some, and all of them are damaged.
    """
    damaged: list[str] = []
    for folder in folders(workdir, kind, told=True):
        try:
            meta = meta_of(folder)
        except files.DamagedError as error:
            damaged.append(str(error))
            continue
        for line in damaged:
            logging.warning("%s; the checkpoint before it, %s, is used", line, folder.name)
        return folder, meta
    if damaged:
        fix = f"no other checkpoints/{kind}-* is whole, remove them to begin anew"
        raise files.DamagedError(f"{'; '.join(damaged)}; {fix}")
    return None


Changes = Iterable[tuple[str, str]]  # (part, field) of a config that may differ


def refuse_foreign(
    folder: pathlib.Path, meta: Mapping[str, Any], config: dict[str, Any], free: Changes, **more: str
) -> None:
    """Raises CheckpointError where a checkpoint's meta.json has another config, or another of `more` (base, order).

    config: plain; free: fields that may differ.
    """
    if "config" in meta:
        refuse_changes(meta["config"], config, folder, free)
    for name, now in more.items():
        if name in meta and meta[name] != now:
            what = "on other base weights" if name == "base" else "in another order of data"
            raise CheckpointError(f"{folder}: trained {what} ({meta[name]}, now {now}); give another --workdir")


def refuse_foreign_best(workdir: pathlib.Path, config: dict[str, Any], free: Changes, **more: str) -> None:
    """Raises CheckpointError for a best checkpoint of another run, which would be taken for that of a run in `workdir`:
    it may lie there without a `last` that says so."""
    for folder in folders(workdir, "best"):
        try:
            meta = meta_of(folder)
        except files.DamagedError:
            continue  # `best` will say so
        if not meta:
            raise CheckpointError(f"{folder}: nothing says which run it is of; give another --workdir, or remove it")
        refuse_foreign(folder, meta, config, free, **more)


def best(
    workdir: str | pathlib.Path, what: str, free: Changes, config: dict[str, Any] | None = None, **more: str
) -> tuple[pathlib.Path, dict[str, Any]]:
    """(the newest whole checkpoints/best-STEP of this very run, its meta.json).

    Args: what: is missing where there is none, "adapter"; free, more: as in `refuse_foreign`; config: plain, None for
      that of config.json.
    Raises:
      CheckpointError (also DamagedError): there is none, all are damaged, or it is of another run.
    """
    workdir = pathlib.Path(workdir)
    found = intact(workdir, "best")
    if found is None:
        raise CheckpointError(f"{workdir}: no trained {what} there (checkpoints/best-*); train one first")
    folder, meta = found
    name = (folder / "meta.json").relative_to(workdir).as_posix()
    hashes.check(workdir, [name], "it is not the checkpoint that this run wrote: put it back")
    path = workdir / "config.json"
    if config is None and hashes.intact(path):
        config = read_json(path)
    if config is not None:
        refuse_foreign(folder, meta, config, free, **more)
    if (wanted := best_step(workdir)) is not None and step_of(folder) < wanted:
        logging.warning("%s: its best is of step %d, which is not there; %s is used", workdir, wanted, folder.name)
    return folder, meta


def best_step(workdir: pathlib.Path) -> int | None:
    """The step of the best checkpoint as the newest readable checkpoints/last-* has it."""
    steps = [best_named(folder) for folder in folders(workdir, "last")]
    return next((step for step in steps if step is not None), None)


def best_named(folder: pathlib.Path) -> int | None:
    """The step of the best checkpoint that this one's meta.json names."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        return int((meta["best"] if "best" in meta else meta["state"]["best"])["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # before the first validation, or damaged


def best_adapter(workdir: str | pathlib.Path) -> pathlib.Path:
    """The folder with a run's best adapter by validation accuracy.

    Raises:
      CheckpointError (also DamagedError): as `best`.
    """
    return best(workdir, "adapter", FREE)[0] / "adapter"


def forget_later(workdir: pathlib.Path, step: int, best_step: int | None) -> None:
    """Removes what is of later steps than the checkpoint that a run goes on from, and what was half written.

    best_step: of the best validation up to there, None before the first.
    """
    for unfinished in workdir.glob("checkpoints/.*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for kind, until in (("last", step), ("best", -1 if best_step is None else best_step)):
        for folder in folders(workdir, kind):
            if step_of(folder) > until:
                logging.warning("%s: of a later step than the run goes on from; removed, it is trained again", folder)
                shutil.rmtree(folder)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter whole, on the CPU, where this process holds a part of it."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu().contiguous()


def save(workdir: pathlib.Path, kind: str, step: int, model: Any, weights: dict, optimizer: Any, meta: dict) -> None:
    """Writes checkpoints/KIND-STEP: adapter/, optimizer.safetensors, meta.json, hashes.json; see `write`.

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
    meta.json and hashes.json; then removes all but the last two, and those that a kept `last` names as its best. It is
    there whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    from safetensors.torch import save_file

    target = workdir / "checkpoints" / f"{kind}-{step:08d}"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        write_weights(temporary)
        if moments is not None:
            save_file(moments, temporary / "optimizer.safetensors")
        about = meta | {"step": step, "pcgjax": pcgjax.__version__}
        (temporary / "meta.json").write_text(json.dumps(about) + "\n")
        hashes.write(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except SafetensorError as error:  # a full disk, in safetensors' words
        raise OSError(f"{target}: cannot be written: {one_line(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for older in folders(workdir, "last")[_KEPT:]:
        shutil.rmtree(older)
    named = {best_named(last) for last in folders(workdir, "last")}  # a run that goes on from that `last` needs it
    for older in folders(workdir, "best")[_KEPT:]:
        if step_of(older) not in named:
            shutil.rmtree(older)


def read(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's file.

    Raises:
      CheckpointError: it cannot be read.
    """
    try:
        return weights_of(path)
    except ModelError as error:
        raise CheckpointError(f"{error}, or remove {path.parent}") from None


def put(weights: dict[str, Any], folder: pathlib.Path, optimizer: Any = None) -> None:
    """Sets adapter weights, and the optimizer's moments, to those of a checkpoint that `meta_of` found whole.

    Raises:
      CheckpointError: it cannot be read, or is of another configuration.
    """
    path = folder / "adapter" / "adapter_model.safetensors"
    saved = read(path)
    names = {name.replace(".default.", "."): name for name in weights}
    odd = sorted(saved.keys() ^ names.keys())
    odd += [name for name in saved.keys() & names.keys() if saved[name].shape != weights[names[name]].shape]
    odd += not_finite(saved.items())
    if odd:
        raise CheckpointError(f"{folder}: its adapter is not this configuration's: {first_and_more(odd)}")
    with torch.no_grad():
        for name, value in saved.items():
            weights[names[name]].copy_(like(weights[names[name]], value))
    if optimizer is not None:
        put_moments(weights, folder, optimizer)


def put_moments(weights: dict[str, Any], folder: pathlib.Path, optimizer: Any) -> None:
    """Sets the optimizer's moments to those of a checkpoint.

    Raises:
      CheckpointError: they cannot be read, or are of other weights.
    """
    moments = {tuple(key.rpartition("|")[::2]): value for key, value in read(folder / "optimizer.safetensors").items()}
    of = {name: {kind for other, kind in moments if other == name} for name, _ in moments}
    odd = [name for name, kinds in of.items() if name not in weights or kinds != _MOMENTS]
    odd += [
        name for (name, _), value in moments.items()
        if name in weights and value.ndim and value.shape != weights[name].shape
    ]  # fmt: skip
    if odd:
        raise CheckpointError(f"{folder}/optimizer.safetensors: not of this configuration: {first_and_more(odd)}")
    for (name, kind), value in moments.items():
        optimizer.state[weights[name]][kind] = like(weights[name], value)


def like(p: Any, value: torch.Tensor) -> torch.Tensor:
    """A whole tensor as this process holds `p`; a single number stays on the CPU."""
    if hasattr(p, "full_tensor") and value.shape == p.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
    return value.to(p.device) if value.ndim else value
