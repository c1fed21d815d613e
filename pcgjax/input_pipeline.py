"""Recordings -> fixed-shape batches, from device memory or streamed by Grain: the same batches either way.

A batch holds whole recordings, packed end to end in one int16 buffer (`features.filters` has the layout). Its shape
depends only on its capacity, the room for windows; a few capacities, chosen for the corpus, keep padding small and
every shape compiled once. A step's recordings are dealt out to G groups, one or several a device: a recording is never
split across devices.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pcgjax import sharding
from pcgjax.features.filters import ALIGN, BLOCK, starts_of


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Decoded recordings at one rate: `rows` as `prepare` writes them, and their samples on demand."""

    rows: list[dict]
    sample_rate_hz: int
    lengths: np.ndarray  # (N,) int32 samples
    read: Callable[[int], np.ndarray]  # index -> (n,) int16

    def labels(self, target: str) -> np.ndarray:
        """(N,) float32 0 or 1 of the label `target`; NaN where the data set does not say."""
        return np.array([float(row["labels"].get(target, "nan")) for row in self.rows], np.float32)

    @property
    def bytes(self) -> int:
        return int(self.lengths.sum()) * 2

    def subset(self, indices: Sequence[int] | np.ndarray) -> Corpus:
        """These recordings, in this order."""
        rows = [self.rows[i] for i in indices]
        return Corpus(rows, self.sample_rate_hz, self.lengths[indices], lambda i: self.read(int(indices[i])))


def from_prepared(folders: str | pathlib.Path) -> Corpus:
    """The corpus that `prepare` wrote to a folder, or to several of one rate, named with commas between them.

    Raises:
      ValueError: folders of different rates, or a recording that two of them hold.
    """
    from pcgjax import prepare

    corpora = []
    for folder in map(str.strip, str(folders).split(",")):
        manifest, rows = prepare.read_rows(folder)
        lengths = np.array([row["num_samples"] for row in rows], np.int32)
        rate_hz = manifest["parameters"]["sample_rate_hz"]
        corpora.append(Corpus(rows, rate_hz, lengths, prepare.open_records(folder, rows)))
    if len(rates := sorted({c.sample_rate_hz for c in corpora})) > 1:
        raise ValueError(f"data.prepared={folders}: prepared at different rates, {rates} Hz; prepare both at one")
    if len(corpora) == 1:
        return corpora[0]
    rows = [row for c in corpora for row in c.rows]
    if twice := [id for id, count in collections.Counter(row["id"] for row in rows).items() if count > 1]:
        raise ValueError(f"data.prepared={folders}: recording {twice[0]} is in two of these folders")
    ends = np.cumsum([len(c.rows) for c in corpora])

    def read(index: int) -> np.ndarray:
        which = int(np.searchsorted(ends, index, side="right"))
        return corpora[which].read(index - int(ends[which] - len(corpora[which].rows)))

    return Corpus(rows, rates[0], np.concatenate([c.lengths for c in corpora]), read)


def in_memory(rows: list[dict], samples: Sequence[np.ndarray], sample_rate_hz: int) -> Corpus:
    """A corpus of arrays already decoded."""
    lengths = np.array([len(s) for s in samples], np.int32)
    return Corpus(rows, sample_rate_hz, lengths, samples.__getitem__)


def in_rows(corpus: Corpus, rows: list[dict]) -> Corpus:
    """The same samples under changed rows."""
    return dataclasses.replace(corpus, rows=rows)


class Geometry(NamedTuple):
    """How recordings become windows, in samples."""

    window: int
    hop: int
    lead: int  # free samples before a recording, for the filter's extension
    gap: int  # zeros after it, for the filter to fade

    @property
    def shared(self) -> bool:
        """Whether windows overlap by half and share their convolutions (`CNN1D.half_overlapping`)."""
        return self.window == 2 * self.hop and self.window % 4 == 0

    def windows(self, lengths):
        """How many windows recordings of these lengths give; one that is too short gives one, padded with zeros."""
        return ((lengths - self.window) // self.hop + 1).clip(1) * (lengths > 0)

    def units(self, lengths):
        """What they take of a batch's capacity: rows of one window when shared, else windows."""
        windows = self.windows(lengths)
        return (windows + 2) // 2 * (lengths > 0) if self.shared else windows

    def buffer_rows(self, capacity: int, recordings: int) -> int:
        """Rows of a buffer that holds any `recordings` whose units add up to at most `capacity`."""
        # A recording of w windows is shorter than (w + 2) hops where they overlap by half, else than (w - 1) hops and
        # a window and a hop.
        samples = (
            self.hop * (2 * capacity + recordings) if self.shared else self.hop * capacity + recordings * self.window
        )
        return -(-(samples + recordings * (self.lead + self.gap + 3 * ALIGN)) // BLOCK) * (BLOCK // ALIGN)


class Plan(NamedTuple):
    """The batches of one pass over some recordings."""

    ids: np.ndarray  # (steps, G, R) int32 indices into the corpus; -1 where a batch is not full
    capacity: np.ndarray  # (steps,) int32 index into `capacities`
    capacities: tuple[int, ...]


def epoch_order(
    indices: np.ndarray, groups: np.ndarray | None, key: jax.Array, batch: int, devices: int = 1
) -> np.ndarray:
    """Shuffles `indices` into (steps, G, R) batches of `batch` recordings, the last one filled up with -1.

    With `groups` (one label an index), each group is drawn equally often: the smaller ones repeat within the epoch.
    """
    if batch % devices:
        raise ValueError(
            f"train.batch_recordings={batch} must be a multiple of the {devices} groups: devices times train.accumulate"
        )
    order = np.asarray(jax.random.permutation(key, len(indices)))
    chosen = indices[order]
    if groups is not None:
        names = np.unique(groups)
        share = -(-len(indices) // len(names))
        shuffled = groups[order]
        repeated = [np.resize(chosen[shuffled == name], share) for name in names]
        chosen = np.concatenate(repeated)
        chosen = chosen[np.asarray(jax.random.permutation(jax.random.fold_in(key, 1), len(chosen)))][: len(indices)]
    steps = -(-len(chosen) // batch)
    padded = np.full(steps * batch, -1, np.int32)
    padded[: len(chosen)] = chosen
    return padded.reshape(steps, devices, batch // devices)


def batch_units(order: np.ndarray, lengths: np.ndarray, geometry: Geometry) -> np.ndarray:
    """(steps,) the capacity that each batch needs: its fullest device's."""
    used = np.where(order >= 0, lengths[order], 0)
    return geometry.units(used).sum(-1).max(-1)


def choose_capacities(needed: np.ndarray, most: int = 8) -> tuple[int, ...]:
    """At most `most` capacities for batches that need these, wasting the least: dynamic programming over the sizes."""
    sizes, counts = np.unique(needed, return_counts=True)
    if len(sizes) > 256:  # the finest steps add nothing but time
        edges = np.quantile(needed, np.linspace(0, 1, 257)[1:], method="higher")
        needed = edges[np.searchsorted(edges, needed)]
        sizes, counts = np.unique(needed, return_counts=True)
    total = np.r_[0, np.cumsum(counts)]
    # cost[k][j]: capacity spent on the j smallest sizes with k capacities, the largest of them sizes[j - 1].
    cost, back = np.full((most + 1, len(sizes) + 1), np.inf), np.zeros((most + 1, len(sizes) + 1), int)
    cost[0, 0] = 0
    for k in range(1, most + 1):
        for j in range(1, len(sizes) + 1):
            spent = cost[k - 1, :j] + sizes[j - 1] * (total[j] - total[:j])
            back[k, j] = spent.argmin()
            cost[k, j] = spent[back[k, j]]
    k, j, chosen = int(cost[:, -1].argmin()), len(sizes), []
    while j:
        chosen.append(int(sizes[j - 1]))
        j, k = back[k, j], k - 1
    return tuple(sorted(chosen))


def plan(order: np.ndarray, lengths: np.ndarray, geometry: Geometry, capacities: tuple[int, ...]) -> Plan:
    """Assigns each batch the smallest capacity that holds it."""
    needed = batch_units(order, lengths, geometry)
    return Plan(order, np.searchsorted(capacities, needed).astype(np.int32), capacities)


def evaluation_plan(
    indices: np.ndarray, lengths: np.ndarray, geometry: Geometry, batch: int, devices: int = 1, shapes: int = 6
) -> Plan:
    """Every recording once, sorted by length so that batches are even."""
    batch = -(-min(batch, max(len(indices), 1)) // devices) * devices
    ordered = indices[np.argsort(lengths[indices], kind="stable")]
    steps = -(-len(ordered) // batch)
    padded = np.full(steps * batch, -1, np.int32)
    padded[: len(ordered)] = ordered
    # Dealt out in turn, so that the devices' shares of a batch are alike.
    order = padded.reshape(steps, batch // devices, devices).swapaxes(1, 2)
    capacities = choose_capacities(batch_units(order, lengths, geometry), most=min(shapes, 6))
    return plan(order, lengths, geometry, capacities)


def padding_waste(plan_: Plan, lengths: np.ndarray, geometry: Geometry) -> float:
    """Share of the samples that the network computes on which lie in no window of any recording."""
    used = np.where(plan_.ids >= 0, lengths[plan_.ids], 0)
    windows = geometry.windows(used)
    useful = (
        ((windows - 1) * geometry.hop + geometry.window) * (used > 0) if geometry.shared else windows * geometry.window
    )
    computed = np.asarray(plan_.capacities)[plan_.capacity].sum() * plan_.ids.shape[1] * geometry.window
    return 1 - float(useful.sum()) / float(computed)


def order_digest(corpus: Corpus, **facts) -> str:
    """A digest of all that the order of the data depends on: a resumed run must find it unchanged."""
    content = [[row["id"], row["sha256"]] for row in corpus.rows]
    return hashlib.sha256(json.dumps([content, facts], sort_keys=True, default=str).encode()).hexdigest()


# --- batches: dictionaries of samples (M, ALIGN) int16, lengths (R,), labels (R, ...) and ids (R,) of one group -------


def pack(corpus: Corpus, labels: np.ndarray, ids: np.ndarray, capacity: int, geometry: Geometry) -> dict:
    """A group's batch, made on the host one recording at a time: what `gather` must equal. ids: (R,)."""
    used = np.where(ids >= 0, corpus.lengths[ids], 0).astype(np.int32)
    buffer = np.zeros(geometry.buffer_rows(capacity, len(ids)) * ALIGN, np.int16)
    starts, _ = starts_of(used, geometry.lead, geometry.gap)
    for index, start, length in zip(ids, starts, used, strict=True):
        if length:
            buffer[start : start + length] = corpus.read(int(index))
    return {
        "samples": buffer.reshape(-1, ALIGN),
        "lengths": used,
        "labels": np.where((ids >= 0).reshape(ids.shape + (1,) * (labels.ndim - 1)), labels[ids], 0),
        "ids": ids,
    }


def block(corpus: Corpus, labels: np.ndarray, indices: Any, rows: int = 0, places: int = 0) -> dict:
    """Recordings as arrays to gather batches from: {samples (rows, ALIGN) int16, first, lengths, labels (places,)}.

    `rows` and `places`, when given, fix the shapes; the last row is always zeros, what a gather reads for padding.
    """
    lengths = corpus.lengths[indices]
    ends = np.cumsum(-(-lengths // ALIGN))
    first = np.r_[0, ends].astype(np.int32)
    samples = np.zeros((max(rows, first[-1] + 1), ALIGN), np.int16)
    for place, index in enumerate(indices):
        samples[first[place] : first[place + 1]].reshape(-1)[: lengths[place]] = corpus.read(int(index))
    fill = (0, max(places - len(lengths), 0))
    return {
        "samples": samples,
        "first": np.pad(first[:-1], fill),
        "lengths": np.pad(lengths, fill),
        "labels": np.pad(labels[indices], [fill] + [(0, 0)] * (labels.ndim - 1)),
    }


def block_shapes(corpus: Corpus, labels: np.ndarray, indices: np.ndarray) -> dict:
    """Shapes and types of what `block` gives for these recordings."""
    n, rows = len(indices), int((-(-corpus.lengths[indices] // ALIGN)).sum()) + 1
    return {
        "samples": jax.ShapeDtypeStruct((rows, ALIGN), np.int16),
        "first": jax.ShapeDtypeStruct((n,), np.int32),
        "lengths": jax.ShapeDtypeStruct((n,), corpus.lengths.dtype),
        "labels": jax.ShapeDtypeStruct((n, *labels.shape[1:]), labels.dtype),
    }


def gather(data: dict, ids: jax.Array, capacity: int, geometry: Geometry) -> dict:
    """A group's batch, gathered on its device from a `block`: equal to `pack`. ids: (R,), places in the block."""
    lengths = jnp.where(ids >= 0, data["lengths"][ids], 0)
    row = jnp.arange(geometry.buffer_rows(capacity, len(ids)))
    starts, _ = starts_of(lengths, geometry.lead, geometry.gap)
    place = jnp.searchsorted(starts // ALIGN, row, side="right", method="compare_all") - 1
    offset = row - starts[place] // ALIGN
    own = (place >= 0) & (offset * ALIGN < lengths[place])
    return {
        "samples": data["samples"][jnp.where(own, data["first"][ids[place]] + offset, len(data["samples"]) - 1)],
        "lengths": lengths,
        "labels": jnp.where((ids >= 0).reshape(ids.shape + (1,) * (data["labels"].ndim - 1)), data["labels"][ids], 0),
        "ids": ids,
    }


def at_capacity(
    compute: Callable[[dict, int], Any],
    data: dict,
    ids: jax.Array,
    choice: jax.Array,
    capacities: tuple[int, ...],
    geometry: Geometry,
) -> Any:
    """compute(batch, capacity) of a group's batch, at the capacity that its step was given.

    data: a `block` that all share, or one that leads with this device (1, ...), its own.

    Each capacity is a branch of the program, since shapes differ. What a branch returns is copied, so `compute` should
    return what the caller adds to its carry, not the carry.
    """
    if data["samples"].ndim == 3:
        data = jax.tree.map(lambda x: x[0], data)
    branches = [lambda i, size=size: compute(gather(data, i, size, geometry), size) for size in capacities]
    return jax.lax.switch(choice, branches, ids)


def stream(
    corpus: Corpus,
    labels: np.ndarray,
    plan_: Plan,
    start: int,
    stop: int,
    devices: int = 1,
    mine: Sequence[int] = (0,),
    mib: float = 8,
    steps: int = 256,
) -> Iterator[tuple[dict, np.ndarray, np.ndarray, int]]:
    """The steps [start, stop) of a plan in blocks, read by Grain's threads while the device works on earlier ones.

    Of the `devices` that share a plan's groups, `mine` are this process': it reads what they need and nothing else.

    Yields (blocks (D, ...), ids (steps, G, R), capacity (steps,), steps in it), D and G of this process' devices. The
    ids count within their device's block, all of fixed shape (at most `steps` steps and about `mib` MiB in all), so
    that one compiled program runs them, with the very arithmetic that it applies to a resident corpus.
    """
    import grain

    of_device = plan_.ids.reshape(len(plan_.ids), devices, -1)
    needed = np.where(of_device >= 0, -(-corpus.lengths[of_device] // ALIGN), 0).sum(-1)
    # Every process finds the same stretches and shapes, by the fullest of all devices.
    rows_of = needed.max(1)
    rows = max(int(mib * 2**20 / (2 * ALIGN * len(mine))), int(rows_of.max())) + 1
    stretches, begin = [], start
    while begin < stop:
        fits = int(np.searchsorted(np.cumsum(rows_of[begin:stop]), rows - 1, side="right"))
        end = min(begin + min(fits, steps), stop)
        stretches.append((begin, end))
        begin = end

    class Blocks:
        def __len__(self):
            return len(stretches)

        def __getitem__(self, number):
            begin, end = stretches[int(number)]
            blocks, places = [], []
            for device in mine:
                ids = np.full((steps, of_device.shape[-1]), -1, np.int32)
                ids[: end - begin] = of_device[begin:end, device]
                used = ids >= 0
                indices = ids[used]
                ids[used] = np.arange(len(indices))
                blocks.append(block(corpus, labels, indices, rows, ids.size))
                places.append(ids)
            capacity = np.zeros(steps, np.int32)
            capacity[: end - begin] = plan_.capacity[begin:end]
            groups = np.stack(places, 1).reshape(steps, -1, plan_.ids.shape[-1])
            # One device's block is not copied again.
            data = {k: blocks[0][k][None] if len(mine) == 1 else np.stack([b[k] for b in blocks]) for k in blocks[0]}
            return data, groups, capacity, end - begin

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    yield from grain.MapDataset.source(Blocks()).to_iter_dataset(options)


def streamed(
    corpus: Corpus, labels: np.ndarray, plan_: Plan, start: int, stop: int, mesh: jax.sharding.Mesh | None = None
) -> Iterator[tuple[dict, Any, np.ndarray, int]]:
    """`stream`, as arrays over a mesh: each device has its own groups' block and ids."""
    if mesh is None or mesh.size == 1:
        yield from stream(corpus, labels, plan_, start, stop)
        return
    spread = PartitionSpec(sharding.AXES)
    for data, ids, capacity, steps in stream(corpus, labels, plan_, start, stop, mesh.size, sharding.mine(mesh)):
        yield (
            sharding.put(mesh, data, spread),
            sharding.put(mesh, ids, PartitionSpec(None, sharding.AXES)),
            capacity,
            steps,
        )
