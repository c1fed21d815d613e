"""A config's training as `pcgjax.train` has it, driven step by step to be measured."""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from pcgjax.data.batches import stream
from pcgjax.runs.streams import STEP
from pcgjax.runtime import sharding
from pcgjax.tasks.base import initial_state
from pcgjax.training import optimizer
from pcgjax.training.experiment import set_up
from pcgjax.training.look_ahead import look_ahead
from pcgjax.training.step import Totals, compile_run, zero_totals


class Training:
    """A config's training as `train` has it: the compiled program, its costs, the state and the first epoch's plan."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        self.config, self.experiment = config, set_up(config, workdir)
        e, key = self.experiment, jax.random.key(config.seed)
        update = optimizer.make(config.optimizer, config.train.epochs * e.steps_an_epoch)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: e.task.init(nnx.Rngs(config.seed))))
        init = functools.partial(initial_state, e.task, update, config.seed)
        abstract = jax.eval_shape(init)
        shardings = sharding.state_sharding(e.mesh, abstract)
        self.pmap = config.parallel.strategy == "pmap"
        self.run = compile_run(
            e.task, update, graphdef, jax.random.fold_in(key, STEP), e.capacities, e.mesh, shardings, e.groups,
            e.pipeline == "stream", self.pmap, config.train.remat,
        )  # fmt: skip
        # JAX lowers a pmap of several processes from arrays alone. Its program is that of as many devices of one.
        unknown = self.pmap and jax.process_count() > 1
        self.costs = {} if unknown else look_ahead(e, self.run, abstract, shardings, config.seed, self.pmap)
        self.plan = e.plan(config.seed, 0)
        self.resident = e.resident()
        self.state = self._spread(jax.jit(init, out_shardings=shardings)())
        self.totals = self.zeros()

    def _spread(self, tree: Any) -> Any:
        """Under pmap each of this process' devices has a copy."""
        copies = len(sharding.mine(self.experiment.mesh))
        return jax.tree.map(lambda a: np.stack([np.asarray(a)] * copies), tree) if self.pmap else tree

    def zeros(self) -> Totals:
        """Counts to start a stretch of training with."""
        return self._spread(sharding.put(self.experiment.mesh, zero_totals()))

    def pieces(self, start: int, stop: int, mib: float | None = None) -> Iterator:
        """As `Experiment.pieces`; mib: on one device, streamed in blocks of so many MiB, wherever the corpus is."""
        e = self.experiment
        if mib is None:
            yield from e.pieces(self.resident, self.plan, start, stop, self.pmap)
            return
        for data, ids, capacity, steps in stream(e.corpus, e.labels, self.plan, start, stop, mib=mib):
            yield data, ids, capacity, 0, steps

    def steps(self, start: int, stop: int, mib: float | None = None) -> None:
        """Trains the plan's steps [start, stop) and waits."""
        for piece in self.pieces(start, stop, mib):
            self.state, self.totals = self.run(self.state, self.totals, *piece)
        jax.block_until_ready(self.totals)

    def losses(self, steps: int) -> tuple[list[float], list[float]]:
        """(the loss, the seconds) of each of the first steps, while they train."""
        losses: list[float] = []
        times_s: list[float] = []
        for step in range(steps):
            self.totals = self.zeros()
            began = time.perf_counter()
            self.steps(step, step + 1)
            times_s.append(time.perf_counter() - began)
            losses.append(_local_value(self.totals.loss) / _local_value(self.totals.samples))
        return losses, times_s

    def windows(self, steps: int) -> int:
        """Windows of recordings in the plan's first steps."""
        e = self.experiment
        lengths = np.where(self.plan.ids[:steps] >= 0, e.corpus.lengths[self.plan.ids[:steps]], 0)
        return int(e.task.geometry.windows(lengths).sum())


def _local_value(array: jax.Array) -> float:
    """A number that all devices have, as this process' first device has it."""
    return float(np.asarray(array.addressable_data(0)).reshape(-1)[0])
