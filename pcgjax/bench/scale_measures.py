"""What each kind of process of suite `scale` measures: the jobs of `pcgjax.bench.scale_jobs`."""

from __future__ import annotations

import functools
import inspect
import math
import pathlib
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pcgjax.bench import peers
from pcgjax.bench.device import busy, ceilings
from pcgjax.bench.scale_training import Training
from pcgjax.bench.timing import paired, seconds
from pcgjax.data.batches import stream
from pcgjax.data.corpus import in_memory
from pcgjax.training.members import Program


def layout_job(config: ml_collections.ConfigDict, workdir: pathlib.Path, steps: int) -> dict:
    """Losses of the first steps, steps a second, and what the compiled program costs."""
    training = Training(config, workdir)
    losses, times_s = training.losses(steps)
    costs, measured = training.costs, {"losses": losses, "steps_a_s": 1 / min(times_s[1:])}
    if not costs:
        return measured
    states = [costs["state_bytes"][part] for part in ("parameters", "optimizer")]
    total, device = (sum(part[which] for part in states) for which in ("total", "device"))
    return measured | {
        "state_bytes": {"total": total, "device": device, "share": device / total},
        "memory_bytes": costs["memory_bytes"],
        "wire_bytes": costs["step"]["wire_bytes"],
        "minimum_wire_bytes": costs["step"]["minimum_wire_bytes"],
        "wire_over_minimum": costs["step"]["wire_over_minimum"],
        "flops": costs["step"]["flops"],
        "uncounted": costs["step"]["uncounted"],
        "compile_s": costs["compile_s"],
    }


def population_job(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, members: int, steps: int, pairs: int
) -> dict:
    """Steps of so many members as one program, against the same steps of one run after the other."""
    seeds = [{"seed": seed} for seed in range(members)]
    program = Program(config, seeds, workdir, together=jax.default_backend() != "cpu")
    resident = program.experiment.resident()
    carry = [program.spread.put(program.first_states()), program.no_totals()]
    alone = Training(config, workdir)
    states = [jax.tree.map(jnp.copy, (alone.state, alone.totals)) for _ in range(members)]

    def together(until: int = steps) -> None:
        for piece in program.pieces(resident, 0, until):
            carry[:] = program.advance(carry[0], carry[1], *piece)
        jax.block_until_ready(carry[1])

    def in_a_row(until: int = steps) -> None:
        for member in range(members):
            alone.state, alone.totals = states[member]
            alone.steps(0, until)
            states[member] = alone.state, alone.totals

    began = time.perf_counter()
    together(1)
    between = time.perf_counter()
    in_a_row(1)
    first = {"population": between - began, "runs": time.perf_counter() - between}
    times = paired(together, in_a_row, pairs, f"{config.task.name}: {members} members")
    return {"members": members, "steps": steps, "batch_recordings": config.train.batch_recordings,
            "first_call_s": first, **times}  # fmt: skip


def stream_job(config: ml_collections.ConfigDict, workdir: pathlib.Path, pairs: int, mibs: list[float]) -> dict:
    """An epoch streamed against resident; the loader alone, by the size of a block, and against PyTorch's."""
    training = Training(config, workdir)
    e, count = training.experiment, len(training.plan.ids)
    default = float(inspect.signature(stream).parameters["mib"].default)
    streamed = functools.partial(training.steps, 0, count, default)
    epoch = paired(streamed, functools.partial(training.steps, 0, count), pairs, "streamed")
    batches = [[int(i) for i in step.reshape(-1) if i >= 0] for step in training.plan.ids]
    loaders = {workers: peers.recordings_loader(e.corpus.read, batches, workers) for workers in (0, 2)}

    def read(loader: Any) -> None:
        for _ in loader:
            pass

    for loader in loaders.values():
        read(loader)  # starts its workers
    times_s = {workers: seconds(functools.partial(read, loader)) for workers, loader in loaders.items()}
    fastest_loader = loaders[min(times_s, key=times_s.__getitem__)]

    def read_blocks(mib: float) -> None:
        read(stream(e.corpus, e.labels, training.plan, 0, count, mib=mib))

    alone = paired(functools.partial(read_blocks, default), functools.partial(read, fastest_loader), pairs,
                   "loader alone")  # fmt: skip
    recordings = sum(map(len, batches))
    return {
        "recordings": recordings,
        "mib": e.corpus.bytes / 2**20,
        "default_mib": default,
        "training": {"streamed_s": epoch["ours_s"], "resident_s": epoch["peer_s"],
                     "rate_over_resident": epoch["ratio"], "range": epoch["ratio_range"]},
        "loader": alone | {
            "ours_recordings_a_s": recordings / alone["ours_s"],
            "peer_recordings_a_s": recordings / alone["peer_s"],
            "peer_s_by_workers": times_s,
            "ours_recordings_a_s_by_mib": {
                f"{mib:g}": recordings / seconds(functools.partial(read_blocks, mib)) for mib in mibs
            },
        },
    }  # fmt: skip


def memory_job(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
    """An epoch of a streamed corpus through the training step; peak resident set of the process."""
    training = Training(config, workdir)
    training.steps(0, 1)
    before_mib, began = _peak_mib(), time.perf_counter()
    count, stretch = len(training.plan.ids), config.train.checkpoint_steps
    for start in range(1, count, stretch):  # as `train` does: blocks that are not waited for pile up
        training.steps(start, min(start + stretch, count))
    spent_s = time.perf_counter() - began
    e = training.experiment
    recordings = int((training.plan.ids >= 0).sum())
    return {
        "recordings": len(e.corpus.rows), "corpus_mib": e.corpus.bytes / 2**20, "pipeline": e.pipeline,
        "trained_recordings": recordings, "peak_rss_mib": _peak_mib(), "before_mib": before_mib,
        "recordings_a_s": recordings / spent_s,
    }  # fmt: skip


def _peak_mib() -> float:
    """The peak resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def flops_job(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
    """Operations a step, of the program as it is compiled for a CPU, whose text holds all of them."""
    step = Training(config, workdir).costs["step"]
    return {"flops": step["flops"], "uncounted": step["uncounted"]}


def device_job(config: ml_collections.ConfigDict, workdir: pathlib.Path, pairs: int, compiled: bool = True) -> dict:
    """A training step from int16 samples, against PyTorch's on features that are ready; and how busy the device is."""
    training = Training(config, workdir)
    steps = min(8, len(training.plan.ids))
    peer, batches = _peer(training, steps)
    rounds = 10 if jax.default_backend() == "gpu" else 1

    def ours() -> None:
        for _ in range(rounds):
            training.steps(0, steps)

    def peers_steps() -> None:
        for _ in range(rounds):
            for batch in batches:
                peer.step(*batch)

    times: dict[str, Any] = {"eager": _if_it_runs(functools.partial(paired, ours, peers_steps, pairs, "PyTorch eager"))}
    if compiled:
        _compile(peer)
        times["compiled"] = _if_it_runs(functools.partial(paired, ours, peers_steps, pairs, "torch.compile"))
    ours_s = [of_peer["ours_s"] for of_peer in times.values() if "ours_s" in of_peer]
    step_s = float(np.median(ours_s or [math.nan])) / (rounds * steps)
    costs = training.costs["step"]
    return {
        "meaning": "ours from int16 samples to the update; the peer forward, backward and update on features that are "
        "ready on the device, TF32 allowed for both",
        "batch_recordings": config.train.batch_recordings, "step_s": step_s,
        "segments_a_s": training.windows(steps) / steps / step_s,
        "bytes_a_s": costs["bytes_accessed"] / step_s, "least_bytes_a_s": costs["least_bytes"] / step_s,
        "peers": times, "ceilings": ceilings(), "busy": busy(ours, workdir / "trace"),
    }  # fmt: skip


def _if_it_runs(measure: Callable[[], dict]) -> dict:
    """What a peer measures; where PyTorch or its compiler gives up, what it said."""
    try:
        return measure()
    except Exception as error:  # whatever the compiler raises
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}


def _compile(peer: Any) -> None:
    """The peer's networks by torch.compile."""
    import torch

    for name in ("net", "cnn", "recurrent", "head"):
        if hasattr(peer, name):
            setattr(peer, name, torch.compile(getattr(peer, name)))


def _peer(training: Training, steps: int) -> tuple[Any, list]:
    """The model in PyTorch, and the batches of the plan's first steps on its device."""
    import torch

    torch.set_float32_matmul_precision("high")  # TF32, as JAX has it on a GPU
    config, e, ids = training.config, training.experiment, training.plan.ids[:steps]
    name, geometry, rate_hz = config.task.name, e.task.geometry, e.corpus.sample_rate_hz
    in_plan = np.unique(ids[ids >= 0])  # the peers read all that they are given
    small = in_memory([e.corpus.rows[i] for i in in_plan], [e.corpus.read(i) for i in in_plan], rate_hz)
    places = np.where(ids >= 0, np.searchsorted(in_plan, ids), -1)
    windows = [int(geometry.windows(np.where(row >= 0, e.corpus.lengths[row], 0)).sum()) for row in ids]
    generator = torch.Generator().manual_seed(0)
    peer: Any
    if name == "cnn":
        peer = peers.Segmented(small, e.labels[in_plan], places, geometry)
        batches = list(peer.loader)
    elif name == "hinf_lstm":
        peer = peers.Clipped(small, e.labels[in_plan], places, config)
        batches = list(peer.loader)
    elif name == "segmenter":
        bands, frames = config.features.n_mels, geometry.window // round(config.features.step_s * rate_hz)
        peer = peers.Framed(bands, 4, config.model)
        batches = [(torch.randn(n, frames, bands, generator=generator),
                    torch.randint(4, (n, frames), generator=generator)) for n in windows]  # fmt: skip
    else:
        m, frames = config.model, round(config.features.window_s * 100) // 16 * 16
        peer = peers.Patched(m.width, m.depth, frames)
        batches = [(torch.randn(n, frames, 128, generator=generator),
                    torch.rand(n, frames // 2, generator=generator).argsort(1)[:, : m.mask_patches])
                   for n in windows]  # fmt: skip
    return peer, [tuple(x.to(peer.device) for x in batch) for batch in batches]


JOBS: dict[str, Callable[..., dict]] = {
    "layout": layout_job, "population": population_job, "stream": stream_job, "memory": memory_job,
    "flops": flops_job, "device": device_job,
}  # fmt: skip
