"""Recordings -> fixed-shape batches, from device memory or streamed by Grain: the same batches either way.

A batch holds whole recordings, packed end to end in one int16 buffer (`features.filters` has the layout). Its shape
depends only on its capacity, the room for windows; a few capacities, chosen for the corpus, keep padding small and
every shape compiled once. A step's recordings are dealt out to G groups, one or several a device: a recording is never
split across devices. Labels are (N,) or (N, ...), one for each recording of the corpus.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pcgjax.data.corpus import Corpus
from pcgjax.data.plan import Geometry, Plan
from pcgjax.features.filters import ALIGN, starts_of
from pcgjax.runtime import sharding


def pack(corpus: Corpus, labels: np.ndarray, ids: np.ndarray, capacity: int, geometry: Geometry) -> dict:
    """A group's batch, made on the host one recording at a time: the oracle of `gather_batch`.

    Args: ids: (R,) indices into the corpus, -1 for an unused place.
    Returns: {samples (M, ALIGN) int16, lengths (R,), labels (R, ...), ids (R,)}.
    """
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


def gather_batch(data: dict, ids: jax.Array, capacity: int, geometry: Geometry) -> dict:
    """A group's batch, gathered on its device from a `block`: equal to `pack`. ids: (R,), places in the block."""
    lengths = jnp.where(ids >= 0, data["lengths"][ids], 0)
    row = jnp.arange(geometry.buffer_rows(capacity, len(ids)))
    starts, _ = starts_of(lengths, geometry.lead, geometry.gap)
    place = jnp.searchsorted(starts // ALIGN, row, side="right", method="compare_all") - 1
    offset = row - starts[place] // ALIGN
    filled = (place >= 0) & (offset * ALIGN < lengths[place])
    return {
        "samples": data["samples"][jnp.where(filled, data["first"][ids[place]] + offset, len(data["samples"]) - 1)],
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

    Each capacity is a branch of the program, since shapes differ. What a branch returns is copied, so `compute` should
    return what the caller adds to its carry, not the carry.

    Args:
      data: a `block` that all devices share, or this device's, with a leading axis of 1.
      ids: (R,) places in the block.
      choice: () index into `capacities`.
    """
    if data["samples"].ndim == 3:
        data = jax.tree.map(lambda x: x[0], data)

    def branch(capacity: int, ids: jax.Array) -> Any:
        return compute(gather_batch(data, ids, capacity, geometry), capacity)

    return jax.lax.switch(choice, [functools.partial(branch, capacity) for capacity in capacities], ids)


def stream(
    corpus: Corpus,
    labels: np.ndarray,
    plan_: Plan,
    start: int,
    stop: int,
    devices: int = 1,
    local_devices: Sequence[int] = (0,),
    mib: float = 8,
    steps: int = 256,
) -> Iterator[tuple[dict, np.ndarray, np.ndarray, int]]:
    """The steps [start, stop) of a plan in blocks, read by Grain's threads while the device works on earlier ones.

    Of the `devices` that share a plan's groups, `local_devices` belong to this process: it reads what they need and
    nothing else.

    Yields (blocks (D, ...), ids (steps, G, R), capacity (steps,), steps in it), D and G of this process' devices. The
    ids count within their device's block. All are of fixed shape (at most `steps` steps and about `mib` MiB in all),
    so that one compiled program runs them, with the same arithmetic as on a resident corpus.
    """
    import grain

    of_device = plan_.ids.reshape(len(plan_.ids), devices, -1)
    needed = np.where(of_device >= 0, -(-corpus.lengths[of_device] // ALIGN), 0).sum(-1)
    # By the fullest of all devices, so that every process has the same stretches and shapes.
    rows_of = needed.max(1)
    rows = max(int(mib * 2**20 / (2 * ALIGN * len(local_devices))), int(rows_of.max())) + 1
    stretches, begin = [], start
    while begin < stop:
        fits = int(np.searchsorted(np.cumsum(rows_of[begin:stop]), rows - 1, side="right"))
        end = min(begin + min(fits, steps), stop)
        stretches.append((begin, end))
        begin = end

    class Blocks:
        """The stretches as a data source for Grain."""

        def __len__(self):
            return len(stretches)

        def __getitem__(self, number):
            begin, end = stretches[int(number)]
            blocks, places = [], []
            for device in local_devices:
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
            if len(blocks) == 1:
                data = {name: array[None] for name, array in blocks[0].items()}
            else:
                data = {name: np.stack([block_[name] for block_ in blocks]) for name in blocks[0]}
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
    for data, ids, capacity, steps in stream(
        corpus, labels, plan_, start, stop, mesh.size, sharding.local_devices(mesh)
    ):
        yield (
            sharding.put(mesh, data, spread),
            sharding.put(mesh, ids, PartitionSpec(None, sharding.AXES)),
            capacity,
            steps,
        )
