"""Checkpoints: state, data position, step and config in one, written whole or not at all. The only Orbax import."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from pcgjax.runtime.files import CheckpointError

__all__ = ["CheckpointError", "manager", "require", "restore", "save"]

TIMEOUT_S = 3600  # for the others at a barrier; one that is lost is found sooner, by `distributed`


def manager(folder: str | pathlib.Path) -> ocp.CheckpointManager:
    """Keeps the newest checkpoint of `folder`; what a killed run left half-written is removed."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(pathlib.Path(folder).resolve(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any, meta: dict) -> None:
    """Begins to write; training goes on meanwhile. `meta`: JSON. A step that is there already is left as it is."""
    if step not in manager.all_steps():
        manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)))


def restore(folder: str | pathlib.Path, like: Any = None) -> tuple[int, Any, dict] | None:
    """(step, state, meta) of the newest checkpoint, or None when there is none. Of many processes all call it.

    Args:
      like: a state whose shapes, dtypes and shardings the restored one takes; None restores meta alone.
    Raises:
      CheckpointError: the checkpoint is damaged or of another model.
    """
    folder = pathlib.Path(folder).resolve()
    there = folder.is_dir()
    # One that comes late would find the folder that another has just made for its first checkpoint. Nor is this a
    # collective, which on CPUs waits no longer than 30 s for a process that still compiles.
    ocp.multihost.get_barrier_sync_fn()(key=str(folder), timeout_ms=TIMEOUT_S * 1000)
    if not there:
        return None
    # Not `manager`, which would remove what a training that runs meanwhile has half-written.
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False)) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            return None
        items = {"meta": ocp.args.JsonRestore()}
        if like is not None:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
            items["state"] = ocp.args.StandardRestore(abstract)
        try:
            restored = checkpoints.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            # Orbax raises many kinds; each means that this folder cannot be gone on with.
            raise CheckpointError(
                f"{folder / str(step)}: not a checkpoint of this run ({type(error).__name__}: {error}); "
                "give another --workdir, or the config that it was trained with"
            ) from error
        return step, restored.get("state"), restored["meta"]


def require(folder: str | pathlib.Path, like: Any = None) -> tuple[int, Any, dict]:
    """`restore`, where there must be a checkpoint."""
    checkpoint = restore(folder, like)
    if checkpoint is None:
        raise CheckpointError(f"{folder}: no checkpoint; --workdir takes a folder that pcgjax.train wrote")
    return checkpoint
