"""A config's training as `pcgjax.train` has it, driven step by step to be measured."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np

from pcgjax.data.batches import stream
from pcgjax.runtime import sharding
from pcgjax.training.experiment import set_up
from pcgjax.training.look_ahead import look_ahead
from pcgjax.training.start import compile_steps
from pcgjax.training.step import Totals, zero_totals


class Training:
    """A config's training as `train` has it: the compiled program, its costs, the state and the first epoch's plan."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        self.config, self.experiment = config, set_up(config, workdir)
        e, compiled = self.experiment, compile_steps(config, self.experiment)
        self.layout, self.run = compiled.layout, compiled.steps
        # JAX lowers a pmap of several processes from arrays alone. Its program is that of as many devices of one.
        unknown = self.layout.pmap and jax.process_count() > 1
        arguments = compiled.steps, compiled.abstract, compiled.shardings, config.seed, self.layout.pmap
        self.costs = {} if unknown else look_ahead(e, *arguments)
        self.plan = e.plan(config.seed, 0)
        self.resident = e.resident()
        self.state = self.layout.spread(jax.jit(compiled.init, out_shardings=compiled.shardings)())
        self.totals = self.zeros()

    def zeros(self) -> Totals:
        """Counts to start a stretch of training with."""
        return self.layout.spread(sharding.put(self.experiment.mesh, zero_totals()))

    def pieces(self, start: int, stop: int, mib: float | None = None) -> Iterator:
        """As `Experiment.pieces`; mib: on one device, streamed in blocks of so many MiB, wherever the corpus is."""
        e = self.experiment
        if mib is None:
            yield from e.pieces(self.resident, self.plan, start, stop, self.layout.pmap)
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
