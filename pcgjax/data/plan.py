"""Which recordings make which batch, in which order and shape.

A batch's capacity is the room it has for windows. Axes: G groups of a step, one or several a device; R recordings of
a group.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from pcgjax.features.filters import ALIGN, BLOCK


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
        """How many windows recordings of these lengths in samples give; too short ones give one, padded with zeros."""
        return ((lengths - self.window) // self.hop + 1).clip(1) * (lengths > 0)

    def units(self, lengths):
        """What recordings of these lengths take of a batch's capacity: rows of one window when shared, else windows."""
        windows = self.windows(lengths)
        return (windows + 2) // 2 * (lengths > 0) if self.shared else windows

    def buffer_rows(self, capacity: int, recordings: int) -> int:
        """Rows of a buffer that holds any `recordings` whose units add up to at most `capacity`."""
        # A recording of w windows is shorter than (w + 2) hops where they overlap by half, else than (w - 1) hops and
        # a window and a hop.
        if self.shared:
            samples = self.hop * (2 * capacity + recordings)
        else:
            samples = self.hop * capacity + recordings * self.window
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
    `devices` is G.

    Raises:
      ValueError: `batch` is no multiple of G.
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
    """(steps,) the capacity that each batch needs: that of its fullest group."""
    used = np.where(order >= 0, lengths[order], 0)
    return geometry.units(used).sum(-1).max(-1)


def choose_capacities(needed: np.ndarray, most: int = 8) -> tuple[int, ...]:
    """At most `most` capacities, rising, that pad batches which need `needed` (steps,) the least in all.

    By dynamic programming over the sizes that occur.
    """
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


def plan_batches(order: np.ndarray, lengths: np.ndarray, geometry: Geometry, capacities: tuple[int, ...]) -> Plan:
    """Assigns each batch the smallest capacity that holds it."""
    needed = batch_units(order, lengths, geometry)
    return Plan(order, np.searchsorted(capacities, needed).astype(np.int32), capacities)


def evaluation_plan(
    indices: np.ndarray, lengths: np.ndarray, geometry: Geometry, batch: int, devices: int = 1, shapes: int = 6
) -> Plan:
    """Every recording once, sorted by length so that a batch's recordings are alike, in at most `shapes` capacities."""
    batch = -(-min(batch, max(len(indices), 1)) // devices) * devices
    ordered = indices[np.argsort(lengths[indices], kind="stable")]
    steps = -(-len(ordered) // batch)
    padded = np.full(steps * batch, -1, np.int32)
    padded[: len(ordered)] = ordered
    # Dealt out in turn, so that the devices' shares of a batch are alike.
    order = padded.reshape(steps, batch // devices, devices).swapaxes(1, 2)
    capacities = choose_capacities(batch_units(order, lengths, geometry), most=min(shapes, 6))
    return plan_batches(order, lengths, geometry, capacities)


def padding_waste(plan_: Plan, lengths: np.ndarray, geometry: Geometry) -> float:
    """Share of the samples that the network computes on which lie in no window of any recording."""
    used = np.where(plan_.ids >= 0, lengths[plan_.ids], 0)
    windows = geometry.windows(used)
    if geometry.shared:
        useful = ((windows - 1) * geometry.hop + geometry.window) * (used > 0)
    else:
        useful = windows * geometry.window
    computed = np.asarray(plan_.capacities)[plan_.capacity].sum() * plan_.ids.shape[1] * geometry.window
    return 1 - float(useful.sum()) / float(computed)
