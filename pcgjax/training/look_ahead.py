"""What a step costs before anything runs."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pcgjax.data import batches
from pcgjax.features.filters import ALIGN
from pcgjax.runtime import costs, files, sharding
from pcgjax.runtime.hlo import step_cost
from pcgjax.tasks.base import Counts
from pcgjax.training.experiment import Experiment
from pcgjax.training.start import Compiled
from pcgjax.training.step import zero_totals


def report_costs(workdir: pathlib.Path, experiment: Experiment, compiled: Compiled, facts: dict, seed: int) -> dict:
    """Compiles a step, prints what it costs and writes it, with `facts`, to WORKDIR/dry_run.json; returns all that."""
    pmap = compiled.layout.pmap
    facts = facts | look_ahead(experiment, compiled.steps, compiled.abstract, compiled.shardings, seed, pmap)
    files.write_text(workdir / "dry_run.json", json.dumps(facts, indent=1))
    print(costs.table(facts), f"\nwrote {workdir}/dry_run.json")
    return facts


def _placed(x: Any, layout: Any, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype, sharding=layout)


def look_ahead(experiment: Experiment, run: Any, abstract: Any, shardings: Any, seed: int, pmap: bool) -> dict:
    """What a step of the compiled program costs, as `costs.summary` has it; nothing is put on the devices or run.

    Raises:
      ValueError: pmap over several processes, which JAX does not compile ahead of time.
    """
    if pmap and jax.process_count() > 1:
        raise ValueError("--dry_run: pmap over several processes cannot be looked at; --devices=N in one process can")
    mesh, task = experiment.mesh, experiment.task
    plan = experiment.plan(seed, 0)
    everywhere = sharding.replicated(mesh)
    state = jax.tree.map(_placed, abstract, shardings)
    totals = jax.tree.map(lambda x: _placed(x, everywhere), jax.eval_shape(zero_totals))
    if experiment.pipeline == "resident":
        data = jax.tree.map(
            lambda x: _placed(x, None if pmap else everywhere),
            batches.block_shapes(experiment.corpus, experiment.labels, np.arange(len(experiment.corpus.rows))),
        )
        ids = plan.ids
    else:
        first = next(batches.stream(experiment.corpus, experiment.labels, plan, 0, 1, mesh.size))
        layout = None if pmap else NamedSharding(mesh, PartitionSpec(sharding.AXES))
        data = jax.tree.map(lambda x: _placed(x, layout, (mesh.size, *x.shape[1:])), first[0])
        ids = np.zeros((len(first[1]), *plan.ids.shape[1:]), np.int32)
        plan = plan._replace(capacity=first[2])
    if pmap:
        ids = ids.reshape(len(ids), mesh.size, -1, ids.shape[-1])
    carried = (state, totals)
    if pmap:  # a copy on each device
        carried = jax.tree.map(lambda x: _placed(x, None, (mesh.size, *x.shape)), carried)
    began = time.monotonic()
    compiled = run.lower(*carried, data, ids, plan.capacity, 0, 1).compile()
    parts = {"parameters": state.params, "optimizer": state.opt_state, "averages": state.rest}
    states = {name: costs.state_bytes(part) for name, part in parts.items()}
    parameters, rest = states["parameters"][0], states["averages"][0]
    rows = task.geometry.buffer_rows(max(experiment.capacities), plan.ids.shape[-1])
    batch_bytes = 2 * ALIGN * rows * experiment.groups // mesh.size
    shape = (mesh.shape["data"], mesh.shape["fsdp"])
    # Of each moment and parameter a device reads and writes its own; averages are summed forward and backward.
    return costs.summary(
        step_cost(compiled.as_text()),
        costs.memory(compiled),
        states,
        costs.minimum(parameters, 2 * rest + _COUNTS_BYTES, shape),
        2 * sum(device for _, device in states.values()) + batch_bytes,
        shape,
        "bfloat16" if task.dtype == jnp.bfloat16 else "float32",
    ) | {"compile_s": time.monotonic() - began}


_COUNTS_BYTES = 4 * len(Counts._fields)
