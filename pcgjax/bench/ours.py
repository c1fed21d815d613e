"""Our side of the benchmarks: the compiled training steps of a config, on a corpus in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
from flax import nnx

from pcgjax import tasks
from pcgjax.data import batches
from pcgjax.data.corpus import Corpus
from pcgjax.data.plan import batch_units, choose_capacities, epoch_order, padding_waste, plan_batches
from pcgjax.runtime import sharding
from pcgjax.tasks.base import initial_state
from pcgjax.training import optimizer
from pcgjax.training.step import make_run, make_step, zero_totals


class Ours:
    """Our training on a corpus: the compiled program, its state and plan.

    `waste`: the share of padding in the epoch's batches; `windows` (steps,): of the recordings in each step;
    `compile_s`: the seconds that compiling took.
    """

    def __init__(self, corpus: Corpus, config: ml_collections.ConfigDict):
        batch_recordings = config.train.batch_recordings
        self.corpus, self.labels = corpus, corpus.labels("abnormal")
        task = tasks.make(config, corpus.sample_rate_hz)
        self.geometry = task.geometry
        key = jax.random.key(0)
        order = epoch_order(np.arange(len(corpus.rows)), None, key, batch_recordings)
        needed = batch_units(order, corpus.lengths, task.geometry)
        capacities = choose_capacities(needed)
        self.plan = plan_batches(order, corpus.lengths, task.geometry, capacities)
        self.waste = padding_waste(self.plan, corpus.lengths, task.geometry)
        used = np.where(order >= 0, corpus.lengths[order], 0)
        self.windows = task.geometry.windows(used).sum((1, 2))
        update = optimizer.make(config.optimizer)
        graphdef = nnx.graphdef(task.init(nnx.Rngs(0)))
        self.state = initial_state(task, update, seed=0)
        self.totals = zero_totals()
        step = make_step(task, update, graphdef, key, 1, capacities)
        run = jax.jit(make_run(*step), donate_argnums=(0, 1), compiler_options=sharding.compiler_options())
        self.resident = jax.device_put(batches.block(corpus, self.labels, range(len(corpus.rows))))
        began = time.perf_counter()
        arguments = (self.state, self.totals, self.resident, self.plan.ids, self.plan.capacity, 0, 1)
        self.compiled = run.lower(*arguments).compile()
        self.compile_s = time.perf_counter() - began
        self.run = run

    def steps(self, start: int, stop: int) -> None:
        """Trains the steps [start, stop) of the plan, resident, and waits."""
        plan = (self.plan.ids, self.plan.capacity)
        self.state, self.totals = self.run(self.state, self.totals, self.resident, *plan, start, stop)
        jax.block_until_ready(self.totals)

    def streamed(self) -> None:
        """Trains an epoch from Grain, and waits."""
        for data, ids, capacity, steps in self.blocks():
            self.state, self.totals = self.run(self.state, self.totals, data, ids, capacity, 0, steps)
        jax.block_until_ready(self.totals)

    def blocks(self) -> Iterator:
        """The blocks of an epoch as Grain streams them: (data, ids, capacity, steps)."""
        return batches.stream(self.corpus, self.labels, self.plan, 0, len(self.plan.ids))
