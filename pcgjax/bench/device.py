"""What the device at hand reaches, and how busy a program keeps it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pcgjax.bench.timing import fastest, waiting


def ceilings() -> dict[str, float]:
    """What this device reaches a second: FLOPs of a large product in float32 (JAX's default) and bfloat16, bytes of a
    large copy."""
    n = 8192 if jax.default_backend() == "gpu" else 1024
    product, double = jax.jit(lambda a: a @ a), jax.jit(lambda x: 2 * x)
    a, x = jnp.ones((n, n)), jnp.ones(4 * n * n)
    return {
        "float32_flops_a_s": 2 * n**3 / fastest(waiting(product, a), 7),
        "bfloat16_flops_a_s": 2 * n**3 / fastest(waiting(product, a.astype(jnp.bfloat16)), 7),
        "bytes_a_s": 2 * x.nbytes / fastest(waiting(double, x), 7),
    }


def busy(run: Callable[[], object], folder: pathlib.Path) -> dict:
    """`idle` of the GPU while this runs, from a profile written to `folder`; without a GPU {idle_share: None, why}."""
    run()
    with jax.profiler.trace(str(folder)):
        run()
    spans = []
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:GPU:"):
                # The lines of streams hold what ran; others say to which program it belonged.
                lines = [line for line in plane.lines if line.name.startswith("Stream")]
                spans += [(e.start_ns, e.start_ns + e.duration_ns) for line in lines for e in line.events]
    return idle(spans) if spans else {"idle_share": None, "why": "no GPU's streams in the trace"}


def idle(spans_ns: list[tuple[float, float]]) -> dict:
    """From (begin, end) of all kernels and copies of a device: the share of the time from the first to the last in
    which none ran. {idle_share, kernels, wall_s}"""
    spans = sorted(spans_ns)
    busy, until = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(end - max(begin, until), 0)
        until = max(until, end)
    wall = until - spans[0][0]
    return {"idle_share": 1 - busy / wall, "kernels": len(spans), "wall_s": wall / 1e9}
