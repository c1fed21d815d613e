"""What a config makes of the data and the devices: corpus, split, task, and the order and size of every batch."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from pcgjax import metrics, tasks
from pcgjax.data import batches
from pcgjax.data.corpus import Corpus, order_digest
from pcgjax.data.plan import Plan, batch_units, choose_capacities, epoch_order, padding_waste, plan_batches
from pcgjax.runs.data import read_corpus, split_corpus
from pcgjax.runs.schema import BALANCES, PIPELINES
from pcgjax.runs.streams import ORDER
from pcgjax.runtime import sharding
from pcgjax.tasks.base import Task


def choose_pipeline(name: str, corpus_bytes: int) -> str:
    """resident or stream. auto: resident where the corpus takes at most a third of the device's free memory."""
    if name in ("resident", "stream"):
        return name
    if name != "auto":
        raise ValueError(f"data.pipeline={name!r}: choose one of {', '.join(PIPELINES)}")
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    else:
        import psutil

        # The host's copy and every device's are in one memory.
        free = psutil.virtual_memory().available // (1 + jax.local_device_count())
    fits = corpus_bytes < free / 3
    if jax.process_count() > 1:  # all must choose the same
        from jax.experimental import multihost_utils

        fits = bool(multihost_utils.process_allgather(np.array(fits)).all())
    return "resident" if fits else "stream"


def balance_groups(balance: str, corpus, labels: np.ndarray, indices: np.ndarray) -> np.ndarray | None:
    if balance == "none":
        return None
    classes = [str(int(labels[i])) for i in indices]
    if balance == "class":
        return np.array(classes)
    if balance == "database_class":
        return np.array([f"{corpus.rows[i]['database']} {c}" for i, c in zip(indices, classes, strict=True)])
    raise ValueError(f"train.balance={balance!r}: choose one of {', '.join(BALANCES)}")


def _by_device(ids: np.ndarray, devices: int) -> np.ndarray:
    """ids (steps, G, R) as (steps, devices, G', R)."""
    return ids.reshape(len(ids), devices, -1, ids.shape[-1])


class Experiment(NamedTuple):
    """What a config makes of the data and the devices, before any state."""

    corpus: Corpus
    parts: dict[str, np.ndarray]  # train, validation, test: indices into the corpus
    split: dict
    task: Task
    labels: np.ndarray
    mesh: jax.sharding.Mesh
    groups: int  # device groups that share a step's recordings, train.accumulate a device
    order_of: Callable[[int, int], np.ndarray]  # (seed, epoch) -> ids (steps, G, R)
    capacities: tuple[int, ...]
    steps_an_epoch: int
    digest: str  # of all that the order of the data depends on; not the number of devices
    pipeline: str  # resident or stream

    def plan(self, seed: int, epoch: int) -> Plan:
        order = self.order_of(seed, epoch)
        return plan_batches(order, self.corpus.lengths, self.task.geometry, self.capacities)

    def facts(self, parameters: Any, seed: int) -> dict[str, Any]:
        """What the log and metrics.json say of a run's size; parameters: the tree of them."""
        return {
            "parameters": sum(x.size for x in jax.tree.leaves(parameters)),
            "pipeline": self.pipeline,
            "corpus_mib": self.corpus.bytes / 2**20,
            "train_recordings": len(self.parts["train"]),
            "steps_an_epoch": self.steps_an_epoch,
            "capacities": list(self.capacities),
            "padding_waste": padding_waste(self.plan(seed, 0), self.corpus.lengths, self.task.geometry),
        }

    def resident(self) -> dict | None:
        """The whole corpus on every device, where the pipeline wants it there."""
        if self.pipeline != "resident":
            return None
        everything = batches.block(self.corpus, self.labels, np.arange(len(self.corpus.rows)))
        return sharding.put(self.mesh, everything)

    def pieces(self, resident: dict | None, plan: Plan, start: int, stop: int, pmap: bool = False) -> Iterator:
        """(data, ids, capacity, start, stop) of these steps of a plan: once when resident, else block by block.

        pmap: ids (steps, D, G', R) of this process' D devices, and blocks (D, ...), from the host.
        """
        local_devices, arguments = sharding.local_devices(self.mesh), (self.corpus, self.labels, plan, start, stop)
        if resident is not None:
            ids = _by_device(plan.ids, self.mesh.size)[:, local_devices] if pmap else plan.ids
            yield resident, ids, plan.capacity, start, stop
        elif pmap:
            for data, ids, capacity, steps in batches.stream(*arguments, self.mesh.size, local_devices):
                yield data, _by_device(ids, len(local_devices)), capacity, 0, steps
        else:
            for data, ids, capacity, steps in batches.streamed(*arguments, self.mesh):
                yield data, ids, capacity, 0, steps


def batch_capacities(
    config: ml_collections.ConfigDict, corpus: Corpus, train: np.ndarray, task: Task,
    order_of: Callable[[int, int], np.ndarray], seeds: Sequence[int], groups: int, balanced: bool,
) -> tuple[int, ...]:  # fmt: skip
    """The shapes, in windows, that the batches of all epochs fit into; each is compiled."""
    t = config.train
    epochs = min(t.epochs, max(50 // len(seeds), 1))  # that are looked at
    units = [
        batch_units(order_of(seed, epoch), corpus.lengths, task.geometry) for seed in seeds for epoch in range(epochs)
    ]
    capacities = choose_capacities(np.concatenate(units), task.shapes)
    if t.epochs == epochs:
        return capacities
    # The largest batch that any order can make, so that no later epoch finds its batches without a place.
    recordings = t.batch_recordings // groups
    largest = np.sort(task.geometry.units(corpus.lengths[train]))[-recordings:]
    # Balanced epochs repeat recordings, so that a batch may hold the longest one several times.
    most = int(largest[-1] * recordings if balanced else largest.sum())
    return (*capacities, most) if most > capacities[-1] else capacities


def set_up(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    seeds: Sequence[int] = (),
    mesh: jax.sharding.Mesh | None = None,
) -> Experiment:
    """Reads the data, makes or reuses the split, and plans the batches, for the config's seed or for all of `seeds`.

    mesh: the devices that share a batch; without it all there are, as `config.parallel` divides them.

    Raises: as `train`.
    """
    t = config.train
    for part, field in (("train", "epochs"), ("train", "batch_recordings"), ("train", "checkpoint_steps"),
                        ("train", "accumulate"), ("evaluation", "batch_recordings"),
                        ("evaluation", "resamples")):  # fmt: skip
        if config[part][field] < 1:
            raise ValueError(f"{part}.{field}={config[part][field]}: must be at least 1")
    if not 0 <= config.evaluation.threshold <= 1:
        raise ValueError(f"evaluation.threshold={config.evaluation.threshold}: must lie between 0 and 1")
    mesh = mesh or sharding.make_mesh(config.parallel)
    groups = mesh.size * t.accumulate
    corpus = read_corpus(config)
    task = tasks.make(config, corpus.sample_rate_hz)
    selectable = ("loss", *(metrics.METRICS if task.classifies else ("accuracy",)))
    if t.select not in selectable:
        raise ValueError(f"train.select={t.select!r}: choose one of {', '.join(selectable)}")
    if t.balance != "none" and not task.classifies:
        raise ValueError(f"train.balance={t.balance!r}: only a classifier has classes to balance; choose none")
    if config.data.shuffle_labels and not task.classifies:
        raise ValueError("data.shuffle_labels=True: a control for classifiers; this task learns from no labels")
    if task.geometry.window > corpus.lengths.max():
        raise ValueError(
            f"features.window_s={config.features.window_s}: longer than every recording of {config.data.prepared} "
            f"(at most {corpus.lengths.max() / corpus.sample_rate_hz:.1f} s)"
        )
    parts, split = split_corpus(config, workdir, corpus, task.usable)
    labels = task.labels(corpus)
    balance = balance_groups(t.balance, corpus, labels, parts["train"])

    @functools.lru_cache(64)
    def order_of(seed: int, epoch: int) -> np.ndarray:
        order_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ORDER), epoch)
        return epoch_order(parts["train"], balance, order_key, t.batch_recordings, groups)

    seeds = tuple(seeds) or (config.seed,)
    capacities = batch_capacities(config, corpus, parts["train"], task, order_of, seeds, groups, balance is not None)
    digest = order_digest(
        corpus, train=split["train"], seed=config.seed, batch=t.batch_recordings, balance=t.balance,
        target=config.task.target, shuffled=config.data.shuffle_labels,
    )  # fmt: skip
    return Experiment(
        corpus, parts, split, task, labels, mesh, groups, order_of, capacities, len(order_of(seeds[0], 0)), digest,
        choose_pipeline(config.data.pipeline, corpus.bytes),
    )  # fmt: skip
