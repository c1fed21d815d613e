"""Suite `selective_scan`: forward and all gradients, against PyTorch and the materialised scan.

The peers compute the same from the same arrays: the published formula as a loop over steps in PyTorch, mambapy's
parallel scan (PyTorch; Blelloch's two sweeps over all states), and `associative`, which is JAX's own.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pcgjax.bench.peers import mambapy_scan
from pcgjax.bench.timing import fastest, paired, ratio_text, seconds, waiting
from pcgjax.kernels.selective_scan import bidirectional_scan, selective_scan
from pcgjax.runtime import sharding

# (batch, steps, channels, states): the published tiny encoder's, a long one's, the segmenter's.
SIZES = ((2, 512, 384, 16), (2, 601, 384, 16), (1, 2048, 384, 16), (1, 4096, 384, 16), (1, 8192, 384, 16),
         (16, 500, 96, 8))  # fmt: skip
LOOP_STEPS = 601  # up to which the loop in PyTorch is waited for
MEMORY = (2, 4096, 384, 16)


def selective_scan_suite(sizes: tuple[tuple[int, int, int, int], ...] = SIZES, pairs: int = 5) -> dict:
    """{rows: one a size (batch, steps, channels, states), memory, rates, mambapy: whether it is installed}."""
    rates = _rates()
    return {
        "rows": [_row(*size, rates=rates, pairs=pairs) for size in sizes],
        "memory": _memory(*MEMORY),
        "rates": rates,
        "mambapy": importlib.util.find_spec("mambapy") is not None,
    }


def selective_scan_summary(result: dict) -> str:
    """The main figures for a terminal."""
    lines = ["forward and all gradients; ratios: the peer's time over ours, median and range of pairs"]
    for row in result["rows"]:
        size = "B {batch:2d}, L {steps:4d}, D {channels}, N {states:2d}".format(**row)
        lines.append(f"{size}   ours {row['forward_ms']:.1f} ms forward, {row['gradient_ms']:.1f} ms with gradients")
        for name, times in row["peers"].items():
            lines.append(f"    {ratio_text(times['ratio'], times['ratio_range'], name, 1, 6)}")
        lines.append(f"    {row['floor_ms']:.1f} ms for the exponentials and bytes alone: {row['share_of_floor']:.2f}")
    memory = result["memory"]
    lines.append(f"memory of the gradient at L {memory['steps']}: {memory['xla_mib']:.0f} MiB, " + ", ".join(
        f"1/{memory[name + '_mib'] / memory['xla_mib']:.0f} of {name}" for name in ("reference", "associative")
    ))  # fmt: skip
    return "\n".join(lines if result["mambapy"] else [*lines, "mambapy is not installed: no row has it"])


def _draw(
    batch: int, steps: int, channels: int, states: int, directions: tuple[int, ...] = ()
) -> tuple[dict, np.ndarray]:
    """The scan's arguments by name, and weights of its outputs (..., batch, steps, channels)."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(*directions, *shape)).astype(np.float32)

    of_channels, of_states = (batch, steps, channels), (batch, steps, states)
    arguments = {"u": normal(*of_channels), "delta": normal(*of_channels) - 1,
                 "A": -np.exp(normal(channels, states) / 2), "B": normal(*of_states), "C": normal(*of_states),
                 "D": normal(channels), "z": normal(*of_channels), "delta_bias": normal(channels)}  # fmt: skip
    return arguments, normal(*of_channels)


def _gradient(arguments: dict, weights: np.ndarray, implementation: str = "auto") -> Callable[[], Any]:
    """Forward and all gradients of sum(y * weights), of one scan or of one each way; waits for them."""
    scan = selective_scan if weights.ndim == 3 else bidirectional_scan

    def loss(arguments, weights):
        y: Any = scan(**arguments, delta_softplus=True, implementation=implementation)
        return (y * weights).sum()

    compiled = jax.jit(jax.grad(loss), compiler_options=sharding.compiler_options())
    return waiting(compiled, *jax.device_put((arguments, weights)))


def _forward(arguments: dict) -> Callable[[], Any]:
    run = functools.partial(selective_scan, delta_softplus=True)
    compiled = jax.jit(lambda arguments: run(**arguments), compiler_options=sharding.compiler_options())
    return waiting(compiled, jax.device_put(arguments))


def _row(batch: int, steps: int, channels: int, states: int, rates: dict, pairs: int) -> dict:
    """What is measured at one size."""
    arguments, weights = _draw(batch, steps, channels, states)
    ours, forward = _gradient(arguments, weights), _forward(arguments)
    peers = {"associative": _gradient(arguments, weights, "associative")}
    if importlib.util.find_spec("mambapy"):
        peers["mambapy"] = _torch_gradient(mambapy_scan, arguments, weights)
    if steps <= LOOP_STEPS:
        peers["PyTorch loop"] = _torch_gradient(_torch_loop, arguments, weights)
    both = _draw(batch, steps, channels, states, (2,))
    one_call = _gradient(*both)
    halves = [_gradient({name: array[i] for name, array in both[0].items()}, both[1][i]) for i in range(2)]
    name = f"B {batch}, L {steps}"
    times = {peer: paired(ours, run, pairs, f"{name}: {peer}") for peer, run in peers.items()}
    forward()
    gradient_s = float(np.median([t["ours_s"] for t in times.values()]))
    # Exponentials: forward, and again for the gradient. Bytes: u, delta, z, y; the same again, their gradients and dy.
    exponentials = 2 * batch * steps * channels * states
    floor_s = max(exponentials / rates["exponentials_a_s"], 4 * batch * steps * channels * 11 / rates["bytes_a_s"])
    return {
        "batch": batch, "steps": steps, "channels": channels, "states": states, "gradient_ms": 1e3 * gradient_s,
        "forward_ms": 1e3 * float(np.median([seconds(forward) for _ in range(2 * pairs)])), "peers": times,
        "both_directions": paired(one_call, lambda: [half() for half in halves], pairs, f"{name}: a call each way"),
        "floor_ms": 1e3 * floor_s, "share_of_floor": floor_s / gradient_s,
    }  # fmt: skip


def _torch_gradient(scan: Callable, arguments: dict, weights: np.ndarray) -> Callable[[], None]:
    """What `_gradient` measures, in PyTorch; scan(u, delta, A, B, C) -> y."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves = {name: torch.tensor(array, device=device, requires_grad=True) for name, array in arguments.items()}
    factors = torch.tensor(weights, device=device)

    def run() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        u, delta, A, B, C, D, z, bias = leaves.values()
        y = scan(u, torch.nn.functional.softplus(delta + bias), A, B, C)
        (((y + D * u) * torch.nn.functional.silu(z)) * factors).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _torch_loop(u, delta, A, B, C):
    """A step at a time, from what is computed for all steps at once: the reference path that came with Mamba."""
    import torch

    decay = torch.exp(delta[..., None] * A)
    inflow = (delta * u)[..., None] * B[:, :, None]
    h, y = torch.zeros_like(decay[:, 0]), []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + inflow[:, t]
        y.append((h * C[:, t, None]).sum(-1))
    return torch.stack(y, 1)


def _rates() -> dict:
    """Exponentials a second from a cache, and bytes a second through memory, as XLA's code has them here."""
    small, large, rounds = jnp.ones(1 << 15), jnp.ones(1 << 24), 200
    exponentials = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, h: jnp.exp(-h * x), x))
    double = jax.jit(lambda x: 2 * x)
    return {
        "exponentials_a_s": rounds * small.size / fastest(waiting(exponentials, small), 7),
        "bytes_a_s": 2 * large.nbytes / fastest(waiting(double, large), 7),
    }


def _memory(batch: int, steps: int, channels: int, states: int) -> dict:
    """MiB that the compiled gradient needs beside its arguments and results."""
    arguments, weights = _draw(batch, steps, channels, states)
    result: dict[str, Any] = {"batch": batch, "steps": steps, "channels": channels, "states": states}
    for implementation in ("xla", "reference", "associative"):

        def loss(arguments, implementation=implementation):
            y: Any = selective_scan(**arguments, delta_softplus=True, implementation=implementation)
            return (y * weights).sum()

        memory: Any = jax.jit(jax.grad(loss)).lower(arguments).compile().memory_analysis()
        result[f"{implementation}_mib"] = memory.temp_size_in_bytes / 2**20
    return result
