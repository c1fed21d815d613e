"""The device mesh and one table of rules: where parameters and batches live."""

from __future__ import annotations

import jax
import ml_collections
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def make_mesh(config: ml_collections.ConfigDict, devices: int | None = None) -> Mesh:
    """All devices as (data, fsdp). `config`: strategy, fsdp.

    Raises:
      ValueError: an unknown strategy, or fsdp does not divide the number of devices.
    """
    count = devices or jax.device_count()
    if config.strategy not in ("jit", "pmap"):
        raise ValueError(f"parallel.strategy={config.strategy!r}: choose jit or pmap")
    if config.fsdp < 1 or count % config.fsdp:
        raise ValueError(f"parallel.fsdp={config.fsdp} does not divide the {count} devices")
    if config.strategy == "pmap" and config.fsdp > 1:
        raise ValueError("parallel.fsdp needs parallel.strategy=jit: pmap keeps a whole copy on each device")
    return jax.make_mesh((count // config.fsdp, config.fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def compiler_options() -> dict[str, str] | None:
    """XLA's options for large programs: on CPU products and convolutions by Eigen, not YNNPACK (BUILD_NOTES)."""
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.default_backend() == "cpu" else None


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches lead with G, the device groups: one group a device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, state):
    """Each array of the state split over `fsdp` along its longest axis that divides evenly, else replicated."""
    size = mesh.shape["fsdp"]

    def rule(x):
        fits = [axis for axis, length in enumerate(x.shape) if length % size == 0 and length >= size]
        if size == 1 or not fits:
            return replicated(mesh)
        longest = max(fits, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == longest else None for axis in range(x.ndim))))

    return jax.tree.map(rule, state)
