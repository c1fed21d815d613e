"""One training step for every topology, and the programs that are many of them.

`make_step` is what one device does and what is done with the sum; `make_run` puts steps in a row; `compile_run` places
them on a mesh under jit or under pmap; `look_ahead` says what a step costs before anything runs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from pcgjax import costs, input_pipeline, sharding, tasks
from pcgjax.experiment import Experiment
from pcgjax.features.filters import ALIGN


class Totals(NamedTuple):
    """Counts of a stretch of training, summed on the device."""

    loss: jax.Array  # sums over recordings, or over clips where the loss is over them
    correct: jax.Array
    samples: jax.Array
    bad_step: jax.Array  # the first step whose loss was not finite; -1: none


# What the forward pass keeps for the backward one; all else is computed again.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def zero_totals() -> Totals:
    return Totals(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32))


def make_step(
    task: tasks.Task,
    update: optax.GradientTransformation,
    graphdef: Any,
    key: jax.Array,
    groups: int,
    capacities: tuple[int, ...],
    axes: tuple[str, ...] = (),
    whole: Callable = lambda params: params,
    summed: Callable | None = None,
    remat: str = "none",
) -> tuple[Callable, Callable]:
    """One training step in two halves, the same for one device, a mesh and pmap.

    The first, of which every device does its part: (params, rest, step, threshold, data, ids (G', R), capacity) ->
    gradients, counts, rest; a device goes through its own groups G' one after the other. The second, of the whole
    state: ((state, totals), what the first returned) -> (state, totals).

    groups: device groups in all; axes: names of the device axes, over which is summed; `whole` and `summed`: as
      `sharding` has them, where a device holds a part of the parameters.
    """
    if remat not in REMAT:
        raise ValueError(f"train.remat={remat!r}: choose one of {', '.join(REMAT)}")
    total = (lambda x: jax.lax.psum(x, axes)) if axes else (lambda x: x)
    summed = summed or functools.partial(jax.tree.map, total)
    kept = REMAT[remat]

    def sums(params, rest, step, threshold, data, ids, choice):
        own = len(ids)
        first = jax.lax.axis_index(axes) * own if axes else 0
        keys = jax.lax.dynamic_slice_in_dim(jax.random.split(jax.random.fold_in(key, step), groups), first, own)
        full, own_part = jax.vjp(whole, params)

        def of_group(rest, ids_R, key):
            def compute(batch, capacity):
                def loss(params):
                    model = tasks.merged(task, graphdef, params, rest)
                    objective, counts = task.loss(model, batch, capacity, key, threshold, total)
                    return objective, (counts, tasks.split(model)[2])

                loss = loss if kept is None else jax.checkpoint(loss, policy=kept)
                (_, (counts, after)), grads = jax.value_and_grad(loss, has_aux=True)(full)
                return grads, counts, after

            return input_pipeline.at_capacity(compute, data, ids_R, choice, capacities, task.geometry)

        if own == 1:
            grads, counts, rest = of_group(rest, ids[0], keys[0])
        else:

            def add(i, carry):
                grads, counts, rest = carry
                more, counted, rest = of_group(rest, ids[i], keys[i])
                return *jax.tree.map(jnp.add, (grads, counts), (more, counted)), rest

            none = jax.tree.map(jnp.zeros_like, full), tasks.no_counts()
            grads, counts, rest = jax.lax.fori_loop(0, own, add, (*none, rest))
        return summed(own_part(grads)[0]), jax.tree.map(total, counts), rest

    def apply(carry, of_step):
        state, totals = carry
        grads, counts, rest = of_step
        grads = jax.tree.map(lambda g: g / jnp.maximum(counts.samples, 1), grads)
        updates, opt_state = update.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        bad = (totals.bad_step < 0) & ~jnp.isfinite(counts.loss)
        totals = Totals(
            totals.loss + counts.loss,
            totals.correct + counts.correct,
            totals.samples + counts.samples,
            jnp.where(bad, state.step, totals.bad_step),
        )
        return tasks.TrainState(state.step + 1, params, rest, opt_state, state.sapt), totals

    return sums, apply


def make_run(sums: Callable, apply: Callable) -> Callable:
    """Many steps as one program: (state, totals, data, ids, capacity, start, stop) -> (state, totals).

    `ids` and `capacity` are a plan's arrays on the device, and the number of steps is data.
    """

    def run(state, totals, data, ids, capacity, start, stop):
        def step(i, carry):
            s = carry[0]
            of_step = sums(s.params, s.rest, s.step, s.sapt.threshold, data, ids[i], capacity[i])
            return apply(carry, of_step)

        return jax.lax.fori_loop(start, stop, step, (state, totals))

    return run


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
    placed = lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)
    state = jax.tree.map(placed, abstract, shardings)
    totals = jax.tree.map(lambda x: placed(x, everywhere), jax.eval_shape(zero_totals))
    stacked = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct((mesh.size, *x.shape), x.dtype), tree)
    if experiment.pipeline == "resident":
        data = jax.tree.map(
            lambda x: placed(x, None if pmap else everywhere),
            input_pipeline.block_shapes(experiment.corpus, experiment.labels, np.arange(len(experiment.corpus.rows))),
        )
        ids = plan.ids
    else:
        first = next(input_pipeline.stream(experiment.corpus, experiment.labels, plan, 0, 1, mesh.size))
        layout = None if pmap else NamedSharding(mesh, PartitionSpec(sharding.AXES))
        of_all = lambda x: jax.ShapeDtypeStruct((mesh.size, *x.shape[1:]), x.dtype, sharding=layout)
        data, ids = jax.tree.map(of_all, first[0]), np.zeros((len(first[1]), *plan.ids.shape[1:]), np.int32)
        plan = plan._replace(capacity=first[2])
    if pmap:
        ids = ids.reshape(len(ids), mesh.size, -1, ids.shape[-1])
    began = time.monotonic()
    program = run.lower(*map(stacked, (state, totals)) if pmap else (state, totals), data, ids, plan.capacity, 0, 1)
    compiled = program.compile()
    parts = {"parameters": state.params, "optimizer": state.opt_state, "averages": state.rest}
    states = {name: costs.state_bytes(part) for name, part in parts.items()}
    parameters, rest = states["parameters"][0], states["averages"][0]
    rows = task.geometry.buffer_rows(max(experiment.capacities), plan.ids.shape[-1])
    batch_bytes = 2 * ALIGN * rows * experiment.groups // mesh.size
    shape = (mesh.shape["data"], mesh.shape["fsdp"])
    # Of each moment and parameter a device reads and writes its own; averages are summed forward and backward.
    return costs.summary(
        costs.step_cost(compiled.as_text()),
        costs.memory(compiled),
        states,
        costs.minimum(parameters, 2 * rest + _COUNTS_BYTES, shape),
        2 * sum(device for _, device in states.values()) + batch_bytes,
        shape,
        "bfloat16" if task.dtype == jnp.bfloat16 else "float32",
    ) | {"compile_s": time.monotonic() - began}


_COUNTS_BYTES = 4 * len(tasks.Counts._fields)


def compile_run(
    task: tasks.Task,
    update: optax.GradientTransformation,
    graphdef: Any,
    key: jax.Array,
    capacities: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    shardings: tasks.TrainState,
    groups: int,
    streamed: bool,
    pmap: bool = False,
    remat: str = "none",
) -> Callable:
    """`make_run` for a mesh, jitted, or under pmap; state and totals are donated."""
    if pmap:
        step = make_step(task, update, graphdef, key, groups, capacities, sharding.GROUP, remat=remat)
        # Each device is given its own groups of every batch; state and totals are one copy a device.
        return jax.pmap(
            make_run(*step), axis_name=sharding.GROUP[0], in_axes=(0, 0, 0 if streamed else None, 1, None, None, None),
            donate_argnums=(0, 1),
        )  # fmt: skip
    specs = sharding.specs_of(shardings.params)
    sums, apply = make_step(
        task, update, graphdef, key, groups, capacities, sharding.AXES if mesh.size > 1 else (),
        lambda params: sharding.whole(params, specs), lambda grads: sharding.summed(grads, specs, mesh), remat,
    )  # fmt: skip
    everywhere, spread = PartitionSpec(), PartitionSpec(sharding.AXES)
    own = (specs, everywhere, everywhere, everywhere, spread if streamed else everywhere, spread, everywhere)
    sums = sharding.over_devices(sums, mesh, own, (specs, everywhere, everywhere))
    return jax.jit(
        make_run(sums, apply), donate_argnums=(0, 1), compiler_options=sharding.compiler_options(),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )  # fmt: skip
