"""The bench's suite `scale`: devices and processes, populations, streams and, where there is one, a GPU.

    python -m pcgjax.bench --suite=scale --out=scale.json [--quick]

How many devices there are is settled when JAX starts, and a peak of memory is a process' own. So every measurement is
a process of its own, `python -m pcgjax.bench.scale_jobs --job=FILE --out=FILE`, and the suite sets their results
beside the goals. Models are those of configs/, in their sizes; the recordings are simulated.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import pathlib
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from flax import nnx

from pcgjax.bench import peers
from pcgjax.data.batches import stream
from pcgjax.data.corpus import in_memory
from pcgjax.runs.config import load_config
from pcgjax.runs.streams import STEP
from pcgjax.runtime import distributed, files, sharding
from pcgjax.tasks.base import initial_state
from pcgjax.training import optimizer
from pcgjax.training.experiment import set_up
from pcgjax.training.look_ahead import look_ahead
from pcgjax.training.step import Totals, compile_run, zero_totals


class Training:
    """A config's training as `train` has it: the compiled program, its costs, the state and the first epoch's plan."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        self.config, self.experiment = config, set_up(config, workdir)
        e, key = self.experiment, jax.random.key(config.seed)
        update = optimizer.make(config.optimizer, config.train.epochs * e.steps_an_epoch)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: e.task.init(nnx.Rngs(config.seed))))
        init = functools.partial(initial_state, e.task, update, config.seed)
        abstract = jax.eval_shape(init)
        shardings = sharding.state_sharding(e.mesh, abstract)
        self.pmap = config.parallel.strategy == "pmap"
        self.run = compile_run(
            e.task, update, graphdef, jax.random.fold_in(key, STEP), e.capacities, e.mesh, shardings, e.groups,
            e.pipeline == "stream", self.pmap, config.train.remat,
        )  # fmt: skip
        # JAX lowers a pmap of several processes from arrays alone. Its program is that of as many devices of one.
        unknown = self.pmap and jax.process_count() > 1
        self.costs = {} if unknown else look_ahead(e, self.run, abstract, shardings, config.seed, self.pmap)
        self.plan = e.plan(config.seed, 0)
        self.resident = e.resident()
        self.state = self._spread(jax.jit(init, out_shardings=shardings)())
        self.totals = self.zeros()

    def _spread(self, tree: Any) -> Any:
        """Under pmap each of this process' devices has a copy."""
        copies = len(sharding.local_devices(self.experiment.mesh))
        return jax.tree.map(lambda a: np.stack([np.asarray(a)] * copies), tree) if self.pmap else tree

    def zeros(self) -> Totals:
        return self._spread(sharding.put(self.experiment.mesh, zero_totals()))

    def pieces(self, start: int, stop: int, mib: float | None = None) -> Iterator:
        """As `Experiment.pieces`; mib: on one device, streamed in blocks of so many MiB, wherever the corpus is."""
        e = self.experiment
        if mib is None:
            yield from e.pieces(self.resident, self.plan, start, stop, self.pmap)
            return
        for data, ids, capacity, steps in stream(e.corpus, e.labels, self.plan, start, stop, mib=mib):
            yield data, ids, capacity, 0, steps

    def steps(self, start: int, stop: int, mib: float | None = None) -> None:
        """Trains the plan's steps [start, stop) and waits."""
        for piece in self.pieces(start, stop, mib):
            self.state, self.totals = self.run(self.state, self.totals, *piece)
        jax.block_until_ready(self.totals)

    def losses(self, steps: int) -> tuple[list[float], list[float]]:
        """(the loss, the seconds) of each of the first steps, while they train."""
        found: list[float] = []
        times: list[float] = []
        here = lambda a: float(np.asarray(a.addressable_data(0)).reshape(-1)[0])
        for step in range(steps):
            self.totals = self.zeros()
            began = time.perf_counter()
            self.steps(step, step + 1)
            times.append(time.perf_counter() - began)
            found.append(here(self.totals.loss) / here(self.totals.samples))
        return found, times

    def windows(self, steps: int) -> int:
        """Windows of recordings in the plan's first steps."""
        e = self.experiment
        used = np.where(self.plan.ids[:steps] >= 0, e.corpus.lengths[self.plan.ids[:steps]], 0)
        return int(e.task.geometry.windows(used).sum())


def layout_job(config: ml_collections.ConfigDict, workdir: pathlib.Path, steps: int) -> dict:
    """Losses of the first steps, steps a second, and what the compiled program costs."""
    training = Training(config, workdir)
    losses, times = training.losses(steps)
    costs, found = training.costs, {"losses": losses, "steps_a_s": 1 / min(times[1:])}
    if not costs:
        return found
    states = [costs["state_bytes"][part] for part in ("parameters", "optimizer")]
    total, device = (sum(part[which] for part in states) for which in ("total", "device"))
    return found | {
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
    from pcgjax.bench.timing import paired
    from pcgjax.training.members import Program

    seeds = [{"seed": seed} for seed in range(members)]
    program = Program(config, seeds, workdir, together=jax.default_backend() != "cpu")
    held, resident = program.start(), program.experiment.resident()
    carried = {"state": held.state, "totals": held.totals}
    alone = Training(config, workdir)
    states = [jax.tree.map(jnp.copy, (alone.state, alone.totals)) for _ in range(members)]

    def together(until: int = steps) -> None:
        for piece in program.pieces(resident, 0, until):
            carried["state"], carried["totals"] = program.steps(dict(carried), *piece)
        jax.block_until_ready(carried["totals"])

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
    timed = paired(together, in_a_row, pairs, f"{config.task.name}: {members} members")
    return {"members": members, "steps": steps, "batch_recordings": config.train.batch_recordings,
            "first_call_s": first, **timed}  # fmt: skip


def stream_job(config: ml_collections.ConfigDict, workdir: pathlib.Path, pairs: int, mibs: list[float]) -> dict:
    """An epoch streamed against resident; the loader alone, by the size of a block, and against PyTorch's."""
    from pcgjax.bench.timing import paired, seconds

    training = Training(config, workdir)
    e, count = training.experiment, len(training.plan.ids)
    default = float(inspect.signature(stream).parameters["mib"].default)
    streamed = functools.partial(training.steps, 0, count, default)
    epoch = paired(streamed, lambda: training.steps(0, count), pairs, "streamed")
    batches = [[int(i) for i in step.reshape(-1) if i >= 0] for step in training.plan.ids]
    loaders = {workers: peers.recordings_loader(e.corpus.read, batches, workers) for workers in (0, 2)}

    def read(loader: Any) -> None:
        for _ in loader:
            pass

    for loader in loaders.values():
        read(loader)  # starts its workers
    times = {workers: seconds(functools.partial(read, loader)) for workers, loader in loaders.items()}
    best = loaders[min(times, key=times.__getitem__)]
    ours = lambda mib: read(stream(e.corpus, e.labels, training.plan, 0, count, mib=mib))
    loader = paired(lambda: ours(default), lambda: read(best), pairs, "loader alone")
    recordings = sum(map(len, batches))
    return {
        "recordings": recordings,
        "mib": e.corpus.bytes / 2**20,
        "default_mib": default,
        "training": {"streamed_s": epoch["ours_s"], "resident_s": epoch["peer_s"],
                     "rate_over_resident": epoch["ratio"], "range": epoch["ratio_range"]},
        "loader": loader | {
            "ours_recordings_a_s": recordings / loader["ours_s"],
            "peer_recordings_a_s": recordings / loader["peer_s"],
            "peer_s_by_workers": times,
            "ours_recordings_a_s_by_mib": {f"{x:g}": recordings / seconds(functools.partial(ours, x)) for x in mibs},
        },
    }  # fmt: skip


def memory_job(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
    """An epoch of a streamed corpus through the training step; peak resident set of the process."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    training = Training(config, workdir)
    training.steps(0, 1)
    before, began = peak(), time.perf_counter()
    count, stretch = len(training.plan.ids), config.train.checkpoint_steps
    for start in range(1, count, stretch):  # as `train` does: blocks that are not waited for pile up
        training.steps(start, min(start + stretch, count))
    spent_s = time.perf_counter() - began
    e = training.experiment
    recordings = int((training.plan.ids >= 0).sum())
    return {
        "recordings": len(e.corpus.rows), "corpus_mib": e.corpus.bytes / 2**20, "pipeline": e.pipeline,
        "trained_recordings": recordings, "peak_rss_mib": peak(), "before_mib": before,
        "recordings_a_s": recordings / spent_s,
    }  # fmt: skip


def flops_job(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
    """Operations a step, of the program as it is compiled for a CPU, whose text holds all of them."""
    step = Training(config, workdir).costs["step"]
    return {"flops": step["flops"], "uncounted": step["uncounted"]}


def device_job(config: ml_collections.ConfigDict, workdir: pathlib.Path, pairs: int, compiled: bool = True) -> dict:
    """A training step from int16 samples, against PyTorch's on features that are ready; and how busy the device is."""
    from pcgjax.bench.timing import paired

    training = Training(config, workdir)
    few = min(8, len(training.plan.ids))
    peer, batches = _peer(training, few)
    rounds = 10 if jax.default_backend() == "gpu" else 1

    def ours() -> None:
        for _ in range(rounds):
            training.steps(0, few)

    theirs = lambda: [peer.step(*batch) for _ in range(rounds) for batch in batches]
    found: dict[str, Any] = {"eager": _if_it_runs(lambda: paired(ours, theirs, pairs, "PyTorch eager"))}
    if compiled:
        _compile(peer)
        found["compiled"] = _if_it_runs(lambda: paired(ours, theirs, pairs, "torch.compile"))
    times = [timed["ours_s"] for timed in found.values() if "ours_s" in timed]
    step_s = float(np.median(times or [math.nan])) / (rounds * few)
    step = training.costs["step"]
    return {
        "meaning": "ours from int16 samples to the update; the peer forward, backward and update on features that are "
        "ready on the device, TF32 allowed for both",
        "batch_recordings": config.train.batch_recordings, "step_s": step_s,
        "segments_a_s": training.windows(few) / few / step_s,
        "bytes_a_s": step["bytes_accessed"] / step_s, "least_bytes_a_s": step["least_bytes"] / step_s,
        "peers": found, "ceilings": ceilings(), "busy": _traced(ours, workdir / "trace"),
    }  # fmt: skip


def _if_it_runs(measure: Callable[[], dict]) -> dict:
    """What a peer measures; where PyTorch or its compiler gives up, what it said."""
    try:
        return measure()
    except Exception as error:  # whatever the compiler raises
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}


def _compile(peer: Any) -> None:
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
    used = np.unique(ids[ids >= 0])  # the peers read all that they are given
    small = in_memory([e.corpus.rows[i] for i in used], [e.corpus.read(i) for i in used], rate_hz)
    places = np.where(ids >= 0, np.searchsorted(used, ids), -1)
    windows = [int(geometry.windows(np.where(row >= 0, e.corpus.lengths[row], 0)).sum()) for row in ids]
    generator = torch.Generator().manual_seed(0)
    peer: Any
    if name == "cnn":
        peer = peers.Segmented(small, e.labels[used], places, geometry)
        batches = list(peer.loader)
    elif name == "hinf_lstm":
        peer = peers.Clipped(small, e.labels[used], places, config)
        batches = list(peer.loader)
    elif name == "segmenter":
        bands, frames = config.features.n_mels, geometry.window // round(config.features.step_s * rate_hz)
        peer = peers.Framed(bands, 4, config.model)
        batches = [(torch.randn(n, frames, bands, generator=generator),
                    torch.randint(4, (n, frames), generator=generator)) for n in windows]  # fmt: skip
    else:
        m, frames = config.model, round(config.features.window_s * 100) // 16 * 16
        peer = peers.Patched(m.width, m.depth, frames)
        masked = lambda n: torch.rand(n, frames // 2, generator=generator).argsort(1)[:, : m.mask_patches]
        batches = [(torch.randn(n, frames, 128, generator=generator), masked(n)) for n in windows]
    return peer, [tuple(x.to(peer.device) for x in batch) for batch in batches]


def ceilings() -> dict[str, float]:
    """What this device reaches: a large product, a second in float32 (JAX's default) and bfloat16; a large copy."""
    from pcgjax.bench.timing import seconds

    n = 8192 if jax.default_backend() == "gpu" else 1024
    product, double = jax.jit(lambda a: a @ a), jax.jit(lambda x: 2 * x)
    best = lambda f, x: min(seconds(lambda: f(x).block_until_ready()) for _ in range(7))
    a, x = jnp.ones((n, n)), jnp.ones(4 * n * n)
    return {
        "float32_flops_a_s": 2 * n**3 / best(product, a),
        "bfloat16_flops_a_s": 2 * n**3 / best(product, a.astype(jnp.bfloat16)),
        "bytes_a_s": 2 * x.nbytes / best(double, x),
    }


def _traced(run: Callable[[], object], folder: pathlib.Path) -> dict:
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


JOBS: dict[str, Callable[..., dict]] = {
    "layout": layout_job, "population": population_job, "stream": stream_job, "memory": memory_job,
    "flops": flops_job, "device": device_job,
}  # fmt: skip


def main(argv: list[str]) -> None:
    """Runs one job; of several processes the first writes what it found."""
    job = json.loads(pathlib.Path(FLAGS.job).read_text())
    config = load_config(job.pop("config"), job.pop("changes"))
    measure, workdir = JOBS[job.pop("kind")], pathlib.Path(job.pop("workdir"))
    with distributed.together():
        found = measure(config, workdir, **job)
        if jax.process_index() == 0:
            files.write_text(pathlib.Path(FLAGS.out), json.dumps(found))


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_string(
        "job", None, "A JSON file: kind, config, changes, workdir, and what the kind wants.", required=True
    )
    flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
    distributed.define_flags()
    files.run(main)
