"""One training step for every topology, and the programs that are many of them.

`make_step` is what one device does and what is done with the sum; `make_run` puts steps in a row; `compile_run` places
them on a mesh under jit or under pmap; `look_ahead` says what a step costs before anything runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from pcgjax.data import batches
from pcgjax.runtime import goodput, sharding
from pcgjax.tasks.base import Task, TrainState, merge_model, no_counts, split_model


class Totals(NamedTuple):
    """Counts of a stretch of training, scalars summed on the device."""

    loss: Any  # sums over recordings, or over clips where the loss is over them
    correct: Any
    samples: Any
    bad_step: Any  # the first step whose loss was not finite; -1: none


# What the forward pass keeps for the backward one; all else is computed again.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def zero_totals() -> Totals:
    """Counts to start with, on the host."""
    return Totals(np.zeros((), np.float32), np.zeros((), np.int32), np.zeros((), np.int32), np.full((), -1, np.int32))


def make_step(
    task: Task,
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

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, axes) if axes else x

    summed = summed or functools.partial(jax.tree.map, total)
    policy = REMAT[remat]

    def sums(params, rest, step, threshold, data, ids, choice):
        local = len(ids)  # groups of this device
        first = jax.lax.axis_index(axes) * local if axes else 0
        keys = jax.lax.dynamic_slice_in_dim(jax.random.split(jax.random.fold_in(key, step), groups), first, local)
        full, own_part = jax.vjp(whole, params)

        def of_group(rest, ids_R, key):
            def compute(batch, capacity):
                def loss(params):
                    model = merge_model(task, graphdef, params, rest)
                    objective, counts = task.loss(model, batch, capacity, key, threshold, total)
                    return objective, (counts, split_model(model)[2])

                loss = loss if policy is None else jax.checkpoint(loss, policy=policy)
                (_, (counts, after)), grads = jax.value_and_grad(loss, has_aux=True)(full)
                return grads, counts, after

            return batches.at_capacity(compute, data, ids_R, choice, capacities, task.geometry)

        if local == 1:
            grads, counts, rest = of_group(rest, ids[0], keys[0])
        else:

            def add(i, carry):
                grads, counts, rest = carry
                more, counted, rest = of_group(rest, ids[i], keys[i])
                return *jax.tree.map(jnp.add, (grads, counts), (more, counted)), rest

            none = jax.tree.map(jnp.zeros_like, full), no_counts()
            grads, counts, rest = jax.lax.fori_loop(0, local, add, (*none, rest))
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
        return TrainState(state.step + 1, params, rest, opt_state, state.sapt), totals

    return sums, apply


def through(pieces: Iterator[tuple], advance: Callable, carry: tuple[Any, Totals], clock: goodput.Clock) -> Any:
    """Runs `advance(*carry, *piece)`, which gives the next carry (state, totals), over all pieces of an epoch.

    One piece is computed on while the next is made ready: all of an epoch's would wait in memory for the device.
    """
    ahead: list[jax.Array] = []
    while True:
        with clock("wait"):
            piece = next(pieces, None)
        if piece is None:
            return carry
        with clock("train"):
            carry = advance(*carry, *piece)
            ahead.append(jnp.copy(carry[1].loss))  # the carry itself is donated to the next piece
            if len(ahead) > 1:
                ahead.pop(0).block_until_ready()


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


def compile_run(
    task: Task,
    update: optax.GradientTransformation,
    graphdef: Any,
    key: jax.Array,
    capacities: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
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
    in_specs = (specs, everywhere, everywhere, everywhere, spread if streamed else everywhere, spread, everywhere)
    sums = sharding.over_devices(sums, mesh, in_specs, (specs, everywhere, everywhere))
    return jax.jit(
        make_run(sums, apply), donate_argnums=(0, 1), compiler_options=sharding.compiler_options(),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )  # fmt: skip
