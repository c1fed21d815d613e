"""The device mesh and one table of rules: where parameters and batches live, and what crosses between devices."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
STRATEGIES = ("jit", "pmap")
GROUP = ("group",)  # pmap's one axis
# Path of an array in the state -> whether its longest axis that divides evenly is split over `fsdp`; the first that
# matches. Running averages and thresholds are read by every device in every step, and small.
RULES = ((r"^\.(step|rest|sapt)", False), (r"^\.(params|opt_state)", True), (r"", False))


def make_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """All devices of all processes as (data, fsdp). `config`: strategy, fsdp.

    Raises:
      ValueError: an unknown strategy, or fsdp does not divide the number of devices.
    """
    count = jax.device_count()
    check(config, count)
    return jax.make_mesh((count // config.fsdp, config.fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def check(config: ml_collections.ConfigDict, devices: int) -> None:
    """Raises what `make_mesh` raises, for so many devices."""
    if config.strategy not in STRATEGIES:
        raise ValueError(f"parallel.strategy={config.strategy!r}: choose one of {', '.join(STRATEGIES)}")
    if config.fsdp < 1 or devices % config.fsdp:
        raise ValueError(f"parallel.fsdp={config.fsdp} does not divide the {devices} devices")
    if config.strategy == "pmap" and config.fsdp > 1:
        raise ValueError("parallel.fsdp needs parallel.strategy=jit: pmap keeps a whole copy on each device")


def compiler_options() -> dict[str, str] | None:
    """XLA's options for large programs: on CPU by Eigen, not YNNPACK (docs/measured/cnn.md)."""
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.default_backend() == "cpu" else None


def local_devices(mesh: Mesh) -> list[int]:
    """Which of the mesh's devices, counted row by row, are this process'."""
    return [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put(mesh: Mesh, tree: Any, spec: PartitionSpec | None = None) -> Any:
    """Host arrays as arrays over the mesh: whole on every device, or, with a `spec`, this process' part of them."""
    layout = NamedSharding(mesh, spec or PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(layout, np.asarray(x)), tree)


def put_missing(mesh: Mesh, tree: Any) -> Any:
    """A tree in which host arrays and whole numbers are put on every device; what is there already stays."""

    def one(x):
        if isinstance(x, jax.Array):
            return x
        return put(mesh, np.int32(x) if isinstance(x, int) else x)

    return jax.tree.map(one, tree)


class Layout(NamedTuple):
    """Where a run's state is: one array laid out over the mesh under jit, a copy on each device under pmap."""

    mesh: Mesh
    pmap: bool

    def spread(self, tree: Any) -> Any:
        """Arrays over the mesh as the compiled steps take them: under pmap a copy for each of this process' devices."""
        if not self.pmap:
            return tree
        copies = len(local_devices(self.mesh))
        return jax.tree.map(lambda x: np.stack([np.asarray(x)] * copies), tree)

    def gather(self, tree: Any) -> Any:
        """Undoes `spread`: one copy, over the mesh."""
        return put(self.mesh, jax.tree.map(_first_copy, tree)) if self.pmap else tree


def _first_copy(x: Any) -> np.ndarray:
    return x[0] if isinstance(x, np.ndarray) else np.asarray(x.addressable_data(0)).reshape(x.shape[1:])


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Where each array of the state lives, by RULES."""
    size = mesh.shape["fsdp"]

    def layout(path, x):
        name = jax.tree_util.keystr(path)
        fits = [axis for axis, length in enumerate(x.shape) if length % size == 0 and length >= size]
        if size == 1 or not fits or not next(split for pattern, split in RULES if re.search(pattern, name)):
            return replicated(mesh)
        longest = max(fits, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == longest else None for axis in range(x.ndim))))

    return jax.tree_util.tree_map_with_path(layout, state)


# --------------------------------------------------------------------------- inside a program that each device runs


def over_devices(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`function` of each device's own part of its arguments, a collective over AXES wherever it asks for one."""
    if mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _axis(spec: PartitionSpec) -> int | None:
    return next((axis for axis, name in enumerate(spec) if name == "fsdp"), None)


def whole(params: Any, specs: Any) -> Any:
    """Parameters of which each device holds its part, as `specs` say, gathered over `fsdp`.

    Its transpose sums gradients over `fsdp` and leaves each device its own part of them.
    """

    def one(x, spec):
        axis = _axis(spec)
        return x if axis is None else jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True)

    return jax.tree.map(one, params, specs)


def summed(gradients: Any, specs: Any, mesh: Mesh) -> Any:
    """What is left of the sum over all devices after `whole`'s transpose: over all of them where it had no part."""

    def one(x, spec):
        over = AXES if _axis(spec) is None else AXES[:1]
        axes = tuple(axis for axis in over if mesh.shape[axis] > 1)
        return jax.lax.psum(x, axes) if axes else x

    return jax.tree.map(one, gradients, specs)


def specs_of(shardings: Any) -> Any:
    return jax.tree.map(lambda s: s.spec, shardings)
