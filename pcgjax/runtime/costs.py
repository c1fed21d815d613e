"""What a compiled training program costs: FLOPs, memory and bytes between devices, a step, and a floor for known chips.

`compiled.cost_analysis()` counts the body of every loop once, whatever its length, so that an LSTM over 500 frames
costs one frame, and says nothing of what crosses between devices. So the program's own text is read: loops of known
length are multiplied, of a conditional's branches the dearest counts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from pcgjax.runtime.hlo import Step, wire_bytes


class Chip(NamedTuple):
    bfloat16_flops: float  # dense products, a second
    float32_flops: float  # at JAX's default precision: TF32 on GPUs, one bfloat16 pass on TPUs
    memory_bytes_s: float
    memory_bytes: float
    network_bytes_s: float  # that one device can send within its NVLink domain or slice: half of "bidirectional"


# The vendors' figures; GPUs without sparsity. One float32 product: docs.jax.dev/en/latest/201/precision.html
CHIPS = {
    # nvidia.com/en-us/data-center/a100 (datasheet: A100 80GB SXM); NVLink 600 GB/s both ways
    "A100 80GB": Chip(312e12, 156e12, 2039e9, 80e9, 300e9),
    # nvidia.com/en-us/data-center/h100 and the H100 architecture white paper (SXM5); NVLink 900 GB/s both ways
    "H100 SXM": Chip(989.4e12, 494.7e12, 3350e9, 80e9, 450e9),
    # nvidia.com/en-us/data-center/h200 (SXM): H100's arithmetic
    "H200 SXM": Chip(989.4e12, 494.7e12, 4800e9, 141e9, 450e9),
    # nvidia.com/en-us/data-center/dgx-b200 (eight: 1,440 GB, 64 TB/s, 14.4 TB/s of NVLink both ways) and the Blackwell
    # architecture brief (HGX B200)
    "B200": Chip(2250e12, 1125e12, 8000e9, 180e9, 900e9),
    # docs.cloud.google.com/tpu/docs/v4; the network from its all-reduce bandwidth, 1.1 PB/s a pod of 4,096
    "TPU v4": Chip(275e12, 275e12, 1200e9, 32 * 2**30, 270e9),
    # docs.cloud.google.com/tpu/docs/v5e, v5p, v6e; ICI both ways 400, 1,200 and 800 GB/s
    "TPU v5e": Chip(197e12, 197e12, 819e9, 16e9, 200e9),
    "TPU v5p": Chip(459e12, 459e12, 2765e9, 95e9, 600e9),
    "TPU v6e": Chip(918e12, 918e12, 1638e9, 32e9, 400e9),
}


def minimum(parameters_bytes: float, other_synchronised_bytes: float, mesh_shape: tuple[int, int]) -> float:
    """The fewest bytes that each device must send a step, for a mesh of (data, fsdp) devices, N in all.

    parameters_bytes: P, of all trained parameters, which are also their gradients'.
    other_synchronised_bytes: of all else that is summed over the devices: the counts, and for each normalisation over
      the batch its sums, forward and, as many, backward.

    Whole copies (fsdp 1): one all-reduce of the gradients, 2 (N-1)/N P. Split over f = fsdp devices: the parameters are
    gathered, (f-1)/f P, once: they are kept for the backward pass, since a second gather would send as much again to
    save less than P bytes of memory. The gradients are reduced and scattered, (f-1)/f P, and the part that a device
    keeps, P/f, is reduced over d = data: 2 (d-1)/d P/f. Together 2P (df - d + d - 1)/(df) = 2 (N-1)/N P: the same,
    since an all-reduce is a scatter and a gather, here with the optimiser's update in between (as in ZeRO, Rajbhandari
    et al. 2020, section 7). So the mesh's shape does not matter, nor whether small parameters stay whole.
    """
    return wire_bytes("all-reduce", parameters_bytes + other_synchronised_bytes, math.prod(mesh_shape))


def memory(compiled: Any) -> dict[str, int]:
    """Bytes a device that a compiled program takes: arguments, outputs, temporaries, aliased (outputs that take a
    donated argument's place), code and their total. Temporaries are this compiler's: another chip's differ."""
    stats = compiled.memory_analysis()
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return sizes | {"total": sum(sizes.values()) - 2 * sizes["aliased"]}


def state_bytes(state: Any) -> tuple[int, int]:
    """(bytes of all arrays, the largest share of a device) of a tree of arrays, or of ShapeDtypeStructs with shardings.

    What is on every device counts once in the first. For pmap give the state of one device, not the stacked one.
    """
    total = largest = 0
    for x in jax.tree.leaves(state):
        sharding = getattr(x, "sharding", None)
        shape = sharding.shard_shape(x.shape) if sharding else x.shape
        total += math.prod(x.shape) * x.dtype.itemsize
        largest += math.prod(shape) * x.dtype.itemsize
    return total, largest


def floor(flops: float, bytes_accessed: float, wire: float, chip: Chip, dtype: str = "float32") -> dict[str, Any]:
    """Seconds that a step takes at least on a chip: {compute_s, memory_s, network_s, floor_s, binds}.

    Each as if it alone mattered, at the vendor's peak, and the three overlapped perfectly. `dtype`: of the products,
    float32 or bfloat16. For a true floor `bytes_accessed` is what any compiler must move: the state read and written
    once, and the batch; `Step.bytes_accessed` gives what this compiler's program moves.
    """
    peaks = {"float32": chip.float32_flops, "bfloat16": chip.bfloat16_flops}
    if dtype not in peaks:
        raise ValueError(f"dtype={dtype!r}: choose float32 or bfloat16")
    seconds = {
        "compute_s": flops / peaks[dtype],
        "memory_s": bytes_accessed / chip.memory_bytes_s,
        "network_s": wire / chip.network_bytes_s,
    }
    binds = max(seconds, key=lambda name: seconds[name])
    return seconds | {"floor_s": seconds[binds], "binds": binds.removesuffix("_s")}


def summary(
    step: Step,
    memory_bytes: dict[str, int],
    states: dict[str, tuple[int, int]],
    minimum_bytes: float,
    least_bytes: float,
    mesh_shape: tuple[int, int],
    dtype: str = "float32",
) -> dict[str, Any]:
    """All that is known before a run, ready for JSON; `table` prints it.

    memory_bytes: of `memory`. states: `state_bytes` of each part by name. minimum_bytes: of `minimum`. least_bytes:
    what a device must read and write a step whatever the compiler does, for the floors. mesh_shape: (data, fsdp).
    """
    kinds: dict[str, dict[str, float]] = {}
    for c in step.collectives:
        if c.counted and c.where == "step" and c.group_size > 1:
            kind = kinds.setdefault(c.kind, {"count": 0, "bytes": 0, "wire_bytes": 0.0})
            kind["count"] += c.times
            kind["bytes"] += c.times * c.bytes
            kind["wire_bytes"] += c.wire_bytes
    devices = math.prod(mesh_shape)
    return {
        "mesh": {"data": mesh_shape[0], "fsdp": mesh_shape[1], "devices": devices},
        "memory_bytes": memory_bytes,
        "state_bytes": {
            name: {"total": total, "device": device, "share": device / total if total else 0.0}
            for name, (total, device) in states.items()
        },
        "step": {
            "flops": step.flops,
            "bytes_accessed": step.bytes_accessed,
            "least_bytes": least_bytes,
            "wire_bytes": step.wire_bytes,
            "minimum_wire_bytes": minimum_bytes,
            "wire_over_minimum": step.wire_bytes / minimum_bytes if minimum_bytes else None,
            "outside_wire_bytes": sum(c.wire_bytes for c in step.collectives if c.counted and c.where == "outside"),
            "collectives": kinds,
            "branches": step.branches,
            "uncounted": step.uncounted,
        },
        "dtype": dtype,
        "chips": {
            name: floor(step.flops, least_bytes, step.wire_bytes, chip, dtype)
            | {"fits": memory_bytes["total"] <= chip.memory_bytes}
            for name, chip in CHIPS.items()
        },
    }


def _human(count: float, unit: str) -> str:
    step, prefixes = (1024, ("", "Ki", "Mi", "Gi", "Ti")) if unit == "B" else (1000, ("", "K", "M", "G", "T", "P"))
    power = min(int(math.log(count, step)), len(prefixes) - 1) if count >= 1 else 0
    return f"{count / step**power:.4g} {prefixes[power]}{unit}"


def _size(count: float) -> str:
    return _human(count, "B")


def table(facts: dict[str, Any]) -> str:
    """The text that --dry_run prints, of a `summary`."""
    mesh, step = facts["mesh"], facts["step"]
    lines = [f"{mesh['devices']} devices: data {mesh['data']} x fsdp {mesh['fsdp']}; all figures are per device"]
    lines += ["", "memory"] + [f"  {name:<14}{_size(count):>12}" for name, count in facts["memory_bytes"].items()]
    lines += ["  temporaries are this compiler's, another chip's differ", "", "state, of it"]
    for name, part in facts["state_bytes"].items():
        lines.append(f"  {name:<14}{_size(part['device']):>12}  {part['share']:.3f} of {_size(part['total'])}")
    lines += ["", "a step"]
    lines += [f"  {'FLOPs':<24}{_human(step['flops'], 'FLOP'):>12}"]
    lines += [f"  {'memory traffic, least':<24}{_size(step['least_bytes']):>12}"]
    lines += [f"  {'memory traffic, compiled':<24}{_size(step['bytes_accessed']):>12}"]
    lines += [f"  {'sent, least':<24}{_size(step['minimum_wire_bytes']):>12}"]
    ratio = "" if step["wire_over_minimum"] is None else f"  {step['wire_over_minimum']:.3f} of the least"
    lines += [f"  {'sent, compiled':<24}{_size(step['wire_bytes']):>12}{ratio}"]
    for kind, c in step["collectives"].items():
        lines.append(f"    {kind:<22}{_size(c['wire_bytes']):>12}  {c['count']:g} of {_size(c['bytes'])} together")
    if step["outside_wire_bytes"]:
        lines.append(f"  {'sent outside the steps':<24}{_size(step['outside_wire_bytes']):>12}  a call of many steps")
    for name, branch in step["branches"].items():
        lines.append(f"  branch {name}: {_human(branch['flops'], 'FLOP')}, sends {_size(branch['wire_bytes'])}")
    lines += [f"  not counted: {what}" for what in step["uncounted"]]
    lines += ["", f"floor of a step by the vendors' peaks, products in {facts['dtype']}, microseconds"]
    lines.append(f"  {'':<10}{'compute':>10}{'memory':>10}{'network':>10}{'floor':>10}  binds")
    for name, chip in facts["chips"].items():
        times = "".join(f"{chip[f'{what}_s'] * 1e6:>10.4g}" for what in ("compute", "memory", "network", "floor"))
        lines.append(f"  {name:<10}{times}  {chip['binds']}{'' if chip['fits'] else '; does not fit its memory'}")
    return "\n".join(lines)
