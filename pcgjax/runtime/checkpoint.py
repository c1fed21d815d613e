"""Checkpoints: state, data position, step and config in one, written whole or not at all. The only Orbax import.

Each carries a digest of its arrays and of its meta, compared when it is read. The last two are kept: where the newest
is damaged, a warning names it and the one before it is used.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import time
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from pcgjax import __version__
from pcgjax.runtime import distributed, hashes
from pcgjax.runtime.digest import digests
from pcgjax.runtime.files import CheckpointError, DamagedError

__all__ = ["CheckpointError", "DamagedError", "drop_after", "manager", "require", "restore", "save"]

TIMEOUT_S = 3600  # for the others at a barrier; one that is lost is found sooner, by `distributed`
KEPT = 2


def manager(folder: str | pathlib.Path) -> ocp.CheckpointManager:
    """Keeps the newest two checkpoints of `folder`; what a killed run left half-written is removed."""
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(pathlib.Path(folder).resolve(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any, meta: dict) -> None:
    """Begins to write; training goes on meanwhile. `meta`: JSON. A step that is there already is written anew.

    Raises:
      CheckpointError: there is a newer one, so that Orbax would not write this one.
    """
    if step in manager.all_steps():
        manager.delete(step)
    meta = json.loads(json.dumps(meta)) | {"arrays": digests(state), "pcgjax": __version__}
    meta["sha256"] = hashes.of_json(meta)
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    if not manager.save(step, args=items):
        raise CheckpointError(
            f"{manager.directory}: step {step} was not written, since step {manager.latest_step()} is there; give "
            "another --workdir"
        )


def restore(folder: str | pathlib.Path, like: Any = None) -> tuple[int, Any, dict] | None:
    """(step, state, meta) of the newest checkpoint that is whole, or None when there is none. Of many processes all
    call it.

    Args:
      like: a state whose shapes, dtypes and shardings the restored one takes, or a function from the checkpoint's meta
        to it, which may refuse the checkpoint; None restores meta alone.
    Raises:
      CheckpointError: the checkpoint is of another model.
      DamagedError: every checkpoint there is damaged.
    """
    folder = pathlib.Path(folder).resolve()
    there = folder.is_dir()
    # One that comes late would find the folder that another has just made for its first checkpoint. Nor is this a
    # collective, which on CPUs waits no longer than 30 s for a process that still compiles.
    ocp.multihost.get_barrier_sync_fn()(key=str(folder), timeout_ms=TIMEOUT_S * 1000)
    if not there:
        return None
    steps = sorted((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True)
    damaged = []
    for step in steps:
        try:
            state, meta = _read(folder, step, like)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        for text in damaged:
            logging.warning("%s; step %d is used", text, step)
        return step, state, meta
    if damaged:
        raise DamagedError(f"{damaged[0]}; none before it is whole: remove {folder} to begin anew")
    return None


def _read(folder: pathlib.Path, step: int, like: Any) -> tuple[Any, dict]:
    """(state, meta) of one checkpoint; raises as `restore`."""
    meta = _attempt(folder, step, {"meta": ocp.args.JsonRestore()})["meta"]
    digest, arrays = meta.pop("sha256", None), meta.get("arrays")
    written = digest is not None or arrays is not None  # neither: by a version that wrote none
    if written and digest != hashes.of_json(meta):
        raise DamagedError(f"{folder / str(step)}: damaged, its meta is not what was written")
    meta.pop("arrays", None)
    if callable(like):
        like = like(meta)
    if like is None:
        return None, meta
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    if arrays is not None:
        _refuse_other_model(folder / str(step), arrays, abstract)
    state = _attempt(folder, step, {"state": ocp.args.StandardRestore(abstract)}, arrays is None)["state"]
    if arrays is not None and (now := digests(state)) != arrays:
        place = next(place for place in arrays if now.get(place) != arrays[place])
        raise DamagedError(f"{folder / str(step)}: damaged, the array {place} is not what was written")
    return state, meta


def _attempt(folder: pathlib.Path, step: int, items: dict, of_other: bool = False) -> Any:
    """What Orbax restores; of many processes all are told when one cannot.

    of_other: a failure may also mean that the checkpoint is of another model.
    """
    problem: Exception | None = None
    try:
        # Not `manager`, which would remove what a training that runs meanwhile has half-written.
        with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False)) as checkpoints:
            restored = checkpoints.restore(step, args=ocp.args.Composite(**items))
        for name in items:
            if restored.get(name) is None or (name == "meta" and not isinstance(restored[name], dict)):
                raise ValueError(f"no {name} in it")
    except Exception as error:  # Orbax raises many kinds
        problem = error
    if distributed.stop_signal(int(problem is not None)):
        reason = f"{type(problem).__name__}: {problem}" if problem else "another process cannot read it"
        reason = " ".join(reason.split())[:300]
        if of_other:
            raise CheckpointError(
                f"{folder / str(step)}: not a checkpoint of this run ({reason}); give another --workdir, or the config "
                "that it was trained with"
            ) from problem
        raise DamagedError(f"{folder / str(step)}: damaged or not a checkpoint ({reason})") from problem
    return restored


def _refuse_other_model(path: pathlib.Path, arrays: dict[str, list], abstract: Any) -> None:
    """Raises CheckpointError where a checkpoint's arrays have other places, shapes or types than this model's."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    now = {jax.tree_util.keystr(place): [list(x.shape), str(x.dtype)] for place, x in leaves}
    for place in sorted(now.keys() | arrays.keys()):
        there, here = arrays.get(place, ["", ""])[:2], now.get(place, ["", ""])
        if there != here:
            raise CheckpointError(
                f"{path}: not a checkpoint of this model: {place} is {there[1]}{there[0]} there, {here[1]}{here[0]} "
                "here; give another --workdir, or the config that it was trained with"
            )


def require(folder: str | pathlib.Path, like: Any = None) -> tuple[int, Any, dict]:
    """`restore`, where there must be a checkpoint."""
    checkpoint = restore(folder, like)
    if checkpoint is None:
        raise CheckpointError(f"{folder}: no checkpoint; --workdir takes a folder that pcgjax.train wrote")
    return checkpoint


def drop_after(folder: pathlib.Path, step: int, aside: bool) -> None:
    """Removes the checkpoints of later steps than `step`, from which a run goes on. Of many processes all call it.

    aside: rename them, to damaged-STEP beside the folder, and say so: they were passed over as damaged.
    """
    if jax.process_index() == 0 and folder.is_dir():
        for path in [path for path in folder.iterdir() if path.name.isdecimal() and int(path.name) > step]:
            if not aside:
                shutil.rmtree(path)
                continue
            target = folder.parent / f"damaged-{folder.name}-{path.name}-{time.time_ns()}"
            logging.warning("%s: put aside as %s", path, target)
            path.rename(target)
    distributed.stop_signal(0)  # all wait for the first
