"""The bench's suite `scale`: devices and processes, populations, streams and, where there is one, a GPU.

    python -m pcgjax.bench --suite=scale --out=scale.json [--quick]

How many devices there are is settled when JAX starts, and a peak of memory is a process' own. So every measurement is
a process of its own, `python -m pcgjax.bench_scale --job=FILE --out=FILE`, and the suite sets their results beside the
goals. Models are those of configs/, in their sizes; the recordings are simulated.
"""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import itertools
import json
import math
import os
import pathlib
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from absl import flags
from flax import nnx

from pcgjax import distributed, files, input_pipeline, optimizer, peers, prepare, sharding, tasks, train_step
from pcgjax.experiment import set_up
from pcgjax.runs import STEP, load_config

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Model(NamedTuple):
    """How a model of configs/ is measured. Its recordings are equally long: one shape is compiled."""

    rate_hz: int
    duration_s: float
    steps: int  # of 8 recordings, compared between layouts
    batch: int  # a member's recordings a step, in a population
    member_steps: int  # of a population, measured as one
    # What a step draws goes by its groups of recordings: as many groups in all layouts then draw the same.
    same_groups: bool
    gpu_duration_s: float
    changes: dict[str, Any]
    short: dict[str, Any]  # and except on a GPU
    tiny: dict[str, Any]  # and with --quick


MODELS = {
    "cnn": Model(1000, 20.0, 4, 1, 24, False, 22.0, {}, {}, {"features.window_s": 0.5, "model.hidden": 8}),
    "hinf_lstm": Model(
        2000, 10.5, 3, 2, 2, False, 22.0, {}, {"model.dropout": 0.0},
        {"features.window_s": 1.0, "features.wavelet_level": 3, "features.n_fft": 128, "features.hop": 64,
         "features.n_mels": 16, "model.blocks": ((4,), (8,)), "model.hidden": 8},
    ),
    "segmenter_small": Model(
        2000, 10.5, 3, 2, 2, True, 10.5, {"optimizer.warmup_steps": 1}, {},
        {"features.window_s": 1.0, "model.width": 16, "model.depth": 1, "model.d_state": 2,
         "model.implementation": "reference"},
    ),
    # A quarter of the window: the parameters are but for the positions the same.
    "ssamba_pretrain": Model(
        16000, 2.7, 2, 1, 1, True, 10.5, {"optimizer.warmup_steps": 1},
        {"features.window_s": 2.56, "model.mask_patches": 100},
        {"features.window_s": 0.5, "model.width": 16, "model.depth": 2, "model.mask_patches": 8,
         "model.implementation": "reference"},
    ),
}  # fmt: skip
MOSTLY = (0.9, 0.05, 0.05)  # of people: train, validation, test
COMMON = {
    "data.pipeline": "resident", "split.kind": "person", "split.fractions": (0.8, 0.1, 0.1), "train.epochs": 4,
    "train.batch_recordings": 8,
}  # fmt: skip
MEMBERS = 16
EIGHT = 8
JOB_S = 1200  # after which a job is given up
# layout -> (devices of a process, processes, what differs in the config)
ONE = "1 device"
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    ONE: (1, 1, {}),
    "8 devices, data": (EIGHT, 1, {}),
    "8 devices, fsdp": (EIGHT, 1, {"parallel.fsdp": EIGHT}),
    "8 devices, data 2 x fsdp 4": (EIGHT, 1, {"parallel.fsdp": 4}),
    "8 devices, pmap": (EIGHT, 1, {"parallel.strategy": "pmap"}),
    "2 processes, data": (1, 2, {}),
    "2 processes, pmap": (1, 2, {"parallel.strategy": "pmap"}),
}
CINC = 3600  # recordings; nine tenths train, 3,240, as many as CinC 2016 has
DISTINCT = 24
LARGE = 22_300  # 20,070 of which train
MIBS = (8.0, 16.0, 32.0)  # sizes of a streamed block
NO_GPU = "not measured: no GPU"


def write_prepared(
    folder: pathlib.Path, recordings: int, duration_s: tuple[float, float], rate_hz: int, annotated: bool = False
) -> pathlib.Path:
    """What `prepare` would write for simulated recordings of these durations (from, to), DISTINCT of them different.

    Returns `folder`. Each recording is another person's, every second one abnormal.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    from pcgjax.datasets import synthetic

    folder.mkdir(parents=True)
    rng, heard = np.random.default_rng(0), []
    for i in range(min(DISTINCT, recordings)):
        wave, annotations = synthetic.simulate(synthetic.draw_person(rng, i), "MV", rng, duration_s[1], rate_hz)
        heard.append((np.round(wave / np.abs(wave).max() * 32767).astype("<i2"), annotations))
    rows = []
    for first in range(0, recordings, prepare.RECORDINGS_A_SHARD):
        shard = f"shard-{first // prepare.RECORDINGS_A_SHARD:05d}.array_record"
        writer = ArrayRecordWriter(str(folder / shard), "group_size:1,uncompressed")
        for i in range(first, min(first + prepare.RECORDINGS_A_SHARD, recordings)):
            wave, annotations = heard[i % len(heard)]
            samples = wave[: round(rng.uniform(*duration_s) * rate_hz)]
            writer.write(samples.tobytes())
            length_s = len(samples) / rate_hz if annotated else 0
            rows.append({
                "id": f"r{i:06d}", "person": str(i), "person_known": True, "database": "synthetic",
                "labels": {"abnormal": str(i % 2)}, "annotations": [a for a in annotations if a[1] <= length_s],
                "sha256": str(i), "fingerprint": "", "num_samples": len(samples), "shard": shard, "index": i - first,
                "path": f"r{i:06d}.wav",
            })  # fmt: skip
        writer.close()
    files.write_text(folder / "records.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    manifest = {
        "format": prepare.FORMAT,
        "parameters": {"sample_rate_hz": rate_hz},
        "counts": {"recordings": len(rows)},
    }
    files.write_text(folder / "manifest.json", json.dumps(manifest))
    return folder


class Training:
    """A config's training as `train` has it: the compiled program, its costs, the state and the first epoch's plan."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        self.config, self.experiment = config, set_up(config, workdir)
        e, key = self.experiment, jax.random.key(config.seed)
        update = optimizer.make(config.optimizer, config.train.epochs * e.steps_an_epoch)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: e.task.init(nnx.Rngs(config.seed))))
        init = functools.partial(tasks.initial_state, e.task, update, config.seed)
        abstract = jax.eval_shape(init)
        shardings = sharding.state_sharding(e.mesh, abstract)
        self.pmap = config.parallel.strategy == "pmap"
        self.run = train_step.compile_run(
            e.task, update, graphdef, jax.random.fold_in(key, STEP), e.capacities, e.mesh, shardings, e.groups,
            e.pipeline == "stream", self.pmap, config.train.remat,
        )  # fmt: skip
        # JAX lowers a pmap of several processes from arrays alone. Its program is that of as many devices of one.
        unknown = self.pmap and jax.process_count() > 1
        self.costs = {} if unknown else train_step.look_ahead(e, self.run, abstract, shardings, config.seed, self.pmap)
        self.plan = e.plan(config.seed, 0)
        self.resident = e.resident()
        self.state = self._spread(jax.jit(init, out_shardings=shardings)())
        self.totals = self.zeros()

    def _spread(self, tree: Any) -> Any:
        """Under pmap each of this process' devices has a copy."""
        copies = len(sharding.mine(self.experiment.mesh))
        return jax.tree.map(lambda a: np.stack([np.asarray(a)] * copies), tree) if self.pmap else tree

    def zeros(self) -> train_step.Totals:
        return self._spread(sharding.put(self.experiment.mesh, train_step.zero_totals()))

    def pieces(self, start: int, stop: int, mib: float | None = None) -> Iterator:
        """As `Experiment.pieces`; mib: on one device, streamed in blocks of so many MiB, wherever the corpus is."""
        e = self.experiment
        if mib is None:
            yield from e.pieces(self.resident, self.plan, start, stop, self.pmap)
            return
        for data, ids, capacity, steps in input_pipeline.stream(e.corpus, e.labels, self.plan, start, stop, mib=mib):
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


# --------------------------------------------------------------------------- jobs: (Training's arguments, their own)


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
    from pcgjax import population
    from pcgjax.bench import paired

    seeds = [{"seed": seed} for seed in range(members)]
    program = population.Program(config, seeds, workdir, together=jax.default_backend() != "cpu")
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
    from pcgjax.bench import paired, seconds

    training = Training(config, workdir)
    e, count = training.experiment, len(training.plan.ids)
    default = float(inspect.signature(input_pipeline.stream).parameters["mib"].default)
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
    ours = lambda mib: read(input_pipeline.stream(e.corpus, e.labels, training.plan, 0, count, mib=mib))
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
    from pcgjax.bench import paired

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
    small = input_pipeline.in_memory([e.corpus.rows[i] for i in used], [e.corpus.read(i) for i in used], rate_hz)
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
    from pcgjax.bench import seconds

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


# ---------------------------------------------------------------------------------------------------------- the suite


class Runner:
    """Starts jobs with files of their own in `folder`, and one cache of compiled programs for all."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.numbers = folder, itertools.count()

    def __call__(
        self, kind: str, config: str, changes: dict[str, Any], devices: int = 0, processes: int = 1, **own: Any
    ) -> dict:
        """What a job of JOBS returns, or {"failed": why}.

        devices: simulated on the CPU, of each process; 0: what there is.
        """
        number = next(self.numbers)
        job, out = (self.folder / f"{name}{number}.json" for name in ("job", "out"))
        workdir = str(self.folder / f"work{number}")
        own |= {"kind": kind, "config": config, "changes": changes, "workdir": workdir}
        job.write_text(json.dumps(own))
        words = [sys.executable, "-m", "pcgjax.bench_scale", f"--job={job}", f"--out={out}"]
        if processes > 1:
            words = ["bash", str(ROOT / "launch" / "local_cluster.sh"), str(processes), *words]
        failed = self.run(words, devices)
        return {"failed": failed} if failed else json.loads(out.read_text())

    def run(self, words: list[str], devices: int = 0) -> str:
        """Runs a command; what it said where it failed, else ""."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {
            "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        if devices:
            env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        pipe = subprocess.PIPE
        done = subprocess.Popen(
            words, env=env, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
        )
        try:
            stderr = done.communicate(timeout=JOB_S)[1]
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)
            done.communicate()
            return f"no end after {JOB_S} s: {shlex.join(words)}"
        said = stderr.strip().splitlines() or [f"status {done.returncode}"]
        # Of several processes the first to fail says why, the others that they stop.
        return next((line for line in said if "error: " in line), said[-1]) if done.returncode else ""


def scale_suite(quick: bool = False, models: tuple[str, ...] = tuple(MODELS)) -> dict:
    """{layouts, population, stream, memory, gpu, goals}; quick: models and corpora so small that no figure counts."""
    # This process only looks whether there is a GPU, and leaves its memory to the others.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    gpu = jax.default_backend() == "gpu"
    with tempfile.TemporaryDirectory() as name:
        folder, runner = pathlib.Path(name), Runner(pathlib.Path(name))
        corpora = {model: _corpus(folder, model, quick) for model in models}
        result: dict[str, Any] = {"quick": quick, "layouts": {}, "population": {}}
        bar = tqdm.tqdm(total=len(models) * (len(LAYOUTS) + 1) + 2, unit="job")

        def told(description: str, found: dict) -> dict:
            bar.set_description(description)
            bar.update()
            return found

        for model in models:
            # Two at a time: most of it is compiling, which one core does.
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                started = {layout: pool.submit(_layout, runner, model, layout, corpora[model], quick)
                           for layout in LAYOUTS}  # fmt: skip
                rows = {layout: told(f"{model}: {layout}", job.result()) for layout, job in started.items()}
            result["layouts"][model] = agreed(rows)
            found = _population(runner, model, corpora[model], quick)
            result["population"][model] = told(f"{model}: population", found)
        streamed = write_prepared(folder / "streamed", 240 if quick else 1000, (6, 36), 1000)
        result["stream"] = told("streaming", runner(
            "stream", "cnn", {**COMMON, "data.prepared": str(streamed), "split.fractions": MOSTLY},
            pairs=1 if quick else 3, mibs=MIBS,
        ))  # fmt: skip
        result["memory"] = told("streaming a large corpus", _large(runner, quick))
        bar.close()
        result["gpu"] = _gpu(runner, models) if gpu else NO_GPU
    result["goals"] = goals(result)
    return result


def _changes(model: str, prepared: pathlib.Path, quick: bool) -> dict[str, Any]:
    m = MODELS[model]
    return {**COMMON, **m.changes, **m.short, **(m.tiny if quick else {}), "data.prepared": str(prepared)}


def _corpus(folder: pathlib.Path, model: str, quick: bool) -> pathlib.Path:
    """Ten parts, eight of which train: as many steps of 8 recordings as the model's."""
    m = MODELS[model]
    duration_s = 2.0 if quick else m.duration_s
    return write_prepared(folder / model, 10 * m.steps, (duration_s, duration_s), m.rate_hz, annotated=True)


def _layout(runner: Runner, model: str, layout: str, prepared: pathlib.Path, quick: bool) -> dict:
    devices, processes, differs = LAYOUTS[layout]
    m = MODELS[model]
    groups = {"train.accumulate": EIGHT // (devices * processes)} if m.same_groups else {}
    return runner("layout", model, {**_changes(model, prepared, quick), **differs, **groups}, devices, processes,
                  steps=m.steps)  # fmt: skip


def agreed(rows: dict[str, dict]) -> dict[str, dict]:
    """The layouts' results, each with `difference`: the largest relative one of its losses from one device's."""
    if "failed" in rows[ONE]:
        return rows
    one = np.array(rows[ONE]["losses"])
    return {
        layout: row if "failed" in row else row | {"difference": float(np.abs(np.array(row["losses"]) / one - 1).max())}
        for layout, row in rows.items()
    }


def _population(runner: Runner, model: str, prepared: pathlib.Path, quick: bool) -> dict:
    m = MODELS[model]
    changes = {**_changes(model, prepared, quick), "train.batch_recordings": m.batch}
    return runner("population", model, changes, members=4 if quick else MEMBERS, steps=m.member_steps,
                  pairs=1 if quick else 3)  # fmt: skip


def _large(runner: Runner, quick: bool) -> dict:
    """A corpus of its own in a folder of its own, removed at once: it takes over a gigabyte."""
    count = 400 if quick else LARGE
    needed, free = count * 36 * 2000 * 1.2, shutil.disk_usage(runner.folder).free
    if free < needed:
        return {"failed": f"{runner.folder}: {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} needed; set TMPDIR"}
    prepared = write_prepared(runner.folder / "large", count, (24, 36), 1000)
    changes = {**COMMON, "data.prepared": str(prepared), "data.pipeline": "stream", "train.epochs": 1}
    found = runner("memory", "cnn", changes | {"split.fractions": MOSTLY, "features.filter": "none"}, devices=1)
    shutil.rmtree(prepared)
    return found


def _gpu(runner: Runner, models: tuple[str, ...]) -> dict:
    """Each model's step at its config's batch and, of the CNN, at 8 recordings; 50 epochs, whole."""
    rows = {}
    for model in models:
        m = MODELS[model]
        span_s = (m.gpu_duration_s, m.gpu_duration_s)
        prepared = write_prepared(runner.folder / f"{model} gpu", 10 * EIGHT, span_s, m.rate_hz, annotated=True)
        for batch in (1, 8) if model == "cnn" else (8,):
            changes = {**COMMON, **m.changes, "data.prepared": str(prepared), "train.batch_recordings": batch}
            row = runner("device", model, changes, pairs=5)
            counted = runner("flops", model, changes, devices=1)
            if "failed" not in row and "failed" not in counted:
                row["uncounted"] = counted["uncounted"]
                row["flops_a_s"] = counted["flops"] / row["step_s"]
                row["share_of_flops"] = row["flops_a_s"] / row["ceilings"]["float32_flops_a_s"]
                row["share_of_bytes"] = row["bytes_a_s"] / row["ceilings"]["bytes_a_s"]
            rows[f"{model}, {batch} recordings" if batch > 1 else f"{model}, 1 recording"] = row
    cinc = write_prepared(runner.folder / "cinc", CINC, (6, 36), 1000)
    return {"steps": rows, "fifty_epochs": fifty_epochs(runner, cinc)}


def fifty_epochs(runner: Runner, prepared: pathlib.Path, epochs: int = 50) -> dict:
    """`python -m pcgjax.train`, from its start to its end, with nothing compiled before; validation, checkpoints
    and the report are in it."""
    shutil.rmtree(runner.folder / "compiled", ignore_errors=True)
    workdir = runner.folder / "fifty"
    began = time.perf_counter()
    failed = runner.run([
        sys.executable, "-m", "pcgjax.train", f"--config={ROOT / 'configs' / 'cnn.py'}", f"--workdir={workdir}",
        f"--config.data.prepared={prepared}", f"--config.train.epochs={epochs}",
        f"--config.split.fractions={MOSTLY}",
    ])  # fmt: skip
    if failed:
        return {"failed": failed}
    told = json.loads((workdir / "metrics.json").read_text())
    return {
        "epochs": epochs, "wall_s": time.perf_counter() - began, "seconds": told["system"]["seconds"],
        "trained_recordings": told["split"]["counts"]["train"]["all"]["recordings"],
    }  # fmt: skip


def goals(result: dict) -> list[dict]:
    """[{what, goal, measured, met}] of a result; what was not measured has None and, in place of `met`, why."""
    found: list[dict] = []

    def add(what: str, row: Any, goal: float, value: Callable[[Any], float | None], least: bool = True) -> None:
        words = f"{'at least' if least else 'at most'} {goal:.3g}"
        reason = row if isinstance(row, str) else row.get("failed")
        measured = None if reason else value(row)
        met = (measured >= goal if least else measured <= goal) if measured is not None else (reason or "not measured")
        found.append({"what": what, "goal": words, "measured": measured, "met": met})

    gpu = result["gpu"]
    on_gpu = not isinstance(gpu, str)
    for model, rows in result["layouts"].items():
        for layout, row in rows.items():
            if layout != ONE:
                add(f"{model}, {layout}: loss, relative difference", row, 1e-3, lambda r: r.get("difference"), False)
                if "failed" in row or "wire_bytes" in row:
                    add(f"{model}, {layout}: bytes sent / minimum", row, 1.1, lambda r: r["wire_over_minimum"], False)
            if fsdp := LAYOUTS[layout][2].get("parallel.fsdp"):
                add(f"{model}, {layout}: share of parameters and optimiser state", row, 1.1 / fsdp,
                    lambda r: r["state_bytes"]["share"], False)  # fmt: skip
    for model, row in result["population"].items():
        add(f"{model}: population / runs in a row", row, 4.0 if on_gpu else 0.9, lambda r: r["ratio"])
    add("streamed / resident", result["stream"], 0.9,
        lambda r: r["training"]["rate_over_resident"])  # fmt: skip
    add("peak MiB, streaming a large corpus", result["memory"], 2048, lambda r: r["peak_rss_mib"], False)
    for model, row in gpu["steps"].items() if on_gpu else [("each model", NO_GPU)]:
        add(f"{model}: step / PyTorch eager", row, 3.0, lambda r: r["peers"]["eager"].get("ratio"))
        add(f"{model}: step / torch.compile", row, 1.5, lambda r: r["peers"]["compiled"].get("ratio"))
        add(f"{model}: idle share", row, 0.02, lambda r: r["busy"]["idle_share"], False)
    add("50 epochs, s", gpu["fifty_epochs"] if on_gpu else NO_GPU, 60, lambda r: r["wall_s"], False)
    return found


def scale_summary(result: dict) -> str:
    """The main figures for a terminal."""
    lines = [f"{'':46}{'loss differs':>13}{'share':>8}{'temp MiB':>10}{'sent KiB':>10}{'/ least':>9}{'steps/s':>9}"]
    for model, rows in result["layouts"].items():
        for layout, r in rows.items():
            name = f"{model + ', ' + layout:<46}"
            if "failed" in r:
                lines.append(f"{name} failed: {r['failed']}")
                continue
            cells = [""] * 4
            if "wire_bytes" in r:
                over = "-" if r["wire_over_minimum"] is None else f"{r['wire_over_minimum']:.3f}"
                cells = [f"{r['state_bytes']['share']:.3f}", f"{r['memory_bytes']['temporaries'] / 2**20:.1f}",
                         f"{r['wire_bytes'] / 1024:.1f}", over]  # fmt: skip
            share, memory, sent, over = cells
            lines.append(
                f"{name}{r.get('difference', math.nan):>13.1e}{share:>8}{memory:>10}{sent:>10}{over:>9}"
                f"{r['steps_a_s']:>9.2f}"
            )
    for model, r in result["population"].items():
        what = f"{model}: population"
        lines.append(f"{what:<46} " + (f"failed: {r['failed']}" if "failed" in r else
                     f"{r['members']} members {r['ratio']:.2f}x as many runs in a row  [{r['ratio_range'][0]:.2f}, "
                     f"{r['ratio_range'][1]:.2f}]"))  # fmt: skip
    s, m = result["stream"], result["memory"]
    if "failed" in s:
        lines.append(f"streaming failed: {s['failed']}")
    else:
        loader, rate = s["loader"], s["training"]["rate_over_resident"]
        lines.append(f"{'streamed / resident':<46} {rate:.2f}, in blocks of {s['default_mib']:g} MiB")
        lines.append(f"{'loader alone':<46} {loader['ours_recordings_a_s']:.0f} recordings/s, "
                     f"{loader['ratio']:.1f}x PyTorch's DataLoader")  # fmt: skip
    what = "streaming a large corpus"
    lines.append(f"{what:<46} " + (f"failed: {m['failed']}" if "failed" in m else
                 f"{m['recordings']} recordings, {m['corpus_mib']:.0f} MiB: peak {m['peak_rss_mib']:.0f} MiB, "
                 f"{m['recordings_a_s']:.0f} recordings/s"))  # fmt: skip
    if isinstance(result["gpu"], str):
        lines.append(f"{'GPU':<46} {result['gpu']}")
    else:
        for model, r in result["gpu"]["steps"].items():
            lines.append(f"{model:<46} " + (f"failed: {r['failed']}" if "failed" in r else
                         f"{r['segments_a_s']:.0f} segments/s, {r.get('share_of_flops', math.nan):.1%} of the FLOP/s, "
                         f"{r.get('share_of_bytes', math.nan):.1%} of the bytes/s"))  # fmt: skip
    missed = [g for g in result["goals"] if g["met"] is not True]
    lines += [f"goals met: {len(result['goals']) - len(missed)} of {len(result['goals'])}"]
    for g in missed:
        measured = "" if g["measured"] is None else f", measured {g['measured']:.3g}"
        lines.append(f"  {'missed' if g['met'] is False else g['met']}: {g['what']}: {g['goal']}{measured}")
    return "\n".join(lines)


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
