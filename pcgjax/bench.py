"""How fast: ours, a peer, the ratio pair by pair in one run, and the floor.

    python -m pcgjax.bench --suite=cnn --out=cnn.json [--prepared=DIR]

The peer of `cnn` is what people write in PyTorch for the same net: a Dataset that filters with SciPy and cuts windows,
a DataLoader, Conv1d and MaxPool1d, SGD. Both see the same recordings in the same batches.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import pathlib
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from absl import app, flags
from flax import nnx

import pcgjax
from pcgjax import (
    bench_audio_llm,
    bench_classical,
    bench_scale,
    bench_scan,
    bench_ssamba,
    files,
    input_pipeline,
    optimizer,
    peers,
    sharding,
    tasks,
    train_step,
)
from pcgjax.input_pipeline import Corpus

SAMPLE_RATE_HZ = 1000


def make_corpus(recordings: int, seed: int = 0, sample_rate_hz: int = SAMPLE_RATE_HZ) -> Corpus:
    """Simulated recordings as long as CinC 2016's: a third 8 s, a third about 36 s, the rest 6 to 60 s."""
    from pcgjax.datasets import synthetic

    rng = np.random.default_rng(seed)
    rows, samples = [], []
    for i in tqdm.trange(recordings, desc="simulate", unit="recording"):
        duration_s = (8.0, rng.uniform(33, 36.5), rng.uniform(6, 60))[i % 3]
        person = synthetic.draw_person(rng, i)
        wave, _ = synthetic.simulate(person, "MV", rng, duration_s, sample_rate_hz)
        samples.append(np.round(wave / np.abs(wave).max() * 32767).astype(np.int16))
        label = str(int(bool(person.murmurs)))
        rows.append({"id": f"r{i:04d}", "person": str(i), "database": "synthetic", "sha256": str(i),
                     "labels": {"abnormal": label}})  # fmt: skip
    return input_pipeline.in_memory(rows, samples, sample_rate_hz)


def cnn_config(batch_recordings: int) -> ml_collections.ConfigDict:
    """The fields of configs/cnn.py that a step depends on."""
    return ml_collections.ConfigDict(
        {
            "task": {"name": "cnn"},
            "features": {
                "window_s": 2.5, "overlap": 0.5, "filter": "zero_phase", "filter_order": 4, "low_hz": 25.0,
                "high_hz": 400.0, "noise_snr_db": float("inf"),
            },
            "model": {"filters": (16, 32), "kernel_size": 5, "hidden": 64},
            "optimizer": {"name": "sgd", "learning_rate": 0.01, "momentum": 0.0},
            "train": {"batch_recordings": batch_recordings},
        }
    )  # fmt: skip


class Ours:
    """Our training on a corpus: the compiled program, its state and plan."""

    def __init__(self, corpus: Corpus, config: ml_collections.ConfigDict):
        batch_recordings = config.train.batch_recordings
        self.corpus, self.labels = corpus, corpus.labels("abnormal")
        task = tasks.make(config, corpus.sample_rate_hz)
        self.geometry = task.geometry
        key = jax.random.key(0)
        order = input_pipeline.epoch_order(np.arange(len(corpus.rows)), None, key, batch_recordings)
        needed = input_pipeline.batch_units(order, corpus.lengths, task.geometry)
        capacities = input_pipeline.choose_capacities(needed)
        self.plan = input_pipeline.plan(order, corpus.lengths, task.geometry, capacities)
        self.waste = input_pipeline.padding_waste(self.plan, corpus.lengths, task.geometry)
        used = np.where(order >= 0, corpus.lengths[order], 0)
        self.windows = task.geometry.windows(used).sum((1, 2))
        update = optimizer.make(config.optimizer)
        graphdef = nnx.graphdef(task.init(nnx.Rngs(0)))
        self.state = tasks.initial_state(task, update, seed=0)
        self.totals = train_step.zero_totals()
        step = train_step.make_step(task, update, graphdef, key, 1, capacities)
        run = jax.jit(train_step.make_run(*step), donate_argnums=(0, 1), compiler_options=sharding.compiler_options())
        self.resident = jax.device_put(input_pipeline.block(corpus, self.labels, range(len(corpus.rows))))
        began = time.perf_counter()
        arguments = (self.state, self.totals, self.resident, self.plan.ids, self.plan.capacity, 0, 1)
        self.compiled = run.lower(*arguments).compile()
        self.compile_s = time.perf_counter() - began
        self.run = run

    def steps(self, start: int, stop: int) -> None:
        """Trains the steps [start, stop) of the plan, resident, and waits."""
        p = self.plan
        self.state, self.totals = self.run(self.state, self.totals, self.resident, p.ids, p.capacity, start, stop)
        jax.block_until_ready(self.totals)

    def streamed(self) -> None:
        """Trains an epoch from Grain, and waits."""
        for data, ids, capacity, steps in self.blocks():
            self.state, self.totals = self.run(self.state, self.totals, data, ids, capacity, 0, steps)
        jax.block_until_ready(self.totals)

    def blocks(self) -> Iterator:
        return input_pipeline.stream(self.corpus, self.labels, self.plan, 0, len(self.plan.ids))


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def paired(ours: Callable[[], object], peer: Callable[[], object], repeats: int, description: str) -> dict:
    """Times both in turn, after one round unmeasured: {ours_s, peer_s, ratio: median and range of peer / ours}."""
    ours(), peer()
    pairs = []
    for i in tqdm.trange(repeats, desc=description, unit="pair"):
        # Who goes first changes, so that neither always finds the machine warm.
        if i % 2:
            second, first = seconds(peer), seconds(ours)
        else:
            first, second = seconds(ours), seconds(peer)
        pairs.append((first, second))
    ratios = np.sort([peer_s / ours_s for ours_s, peer_s in pairs])
    return {
        "ours_s": float(np.median([a for a, _ in pairs])),
        "peer_s": float(np.median([b for _, b in pairs])),
        "ratio": float(np.median(ratios)),
        "ratio_range": [float(ratios[0]), float(ratios[-1])],
        "pairs": len(pairs),
    }


def cnn(prepared: str, recordings: int) -> dict:
    """The suite `cnn`: one step at 8 recordings a batch, an epoch at 1, streaming, memory, prepare."""
    corpus = input_pipeline.from_prepared(prepared) if prepared else make_corpus(recordings)
    if prepared:  # what a run reads again and again lies in memory for both
        samples = [corpus.read(i) for i in range(min(recordings, len(corpus.rows)))]
        corpus = input_pipeline.in_memory(corpus.rows[: len(samples)], samples, corpus.sample_rate_hz)
    return {
        "corpus": {"recordings": len(corpus.rows), "seconds": float(corpus.lengths.sum() / corpus.sample_rate_hz)},
        **_step(corpus),
        **_epoch(corpus),
        "prepare": _prepare_rate(),
        "memory": _memory(),
    }


def _segmented(ours: Ours, workers: int = 0) -> peers.Segmented:
    return peers.Segmented(ours.corpus, ours.labels, ours.plan.ids, ours.geometry, workers)


def _step(corpus: Corpus, batch: int = 8) -> dict:
    ours = Ours(corpus, cnn_config(batch))
    peer = _segmented(ours)
    few = min(len(ours.plan.ids), 8)
    ready = [batch for _, batch in zip(range(few), peer.loader, strict=False)]
    step = paired(lambda: ours.steps(0, few), lambda: [peer.step(*b) for b in ready], 9, f"step, {batch} recordings")
    windows = int(ours.windows[:few].sum())
    singles = [seconds(functools.partial(ours.steps, i % few, i % few + 1)) for i in range(5 * few)]
    peers = [seconds(functools.partial(peer.step, *ready[i % few])) for i in range(5 * few)]
    cost = ours.compiled.cost_analysis() or {}
    step |= {
        "meaning": "ours: gather, filter, z-score, windows, forward, backward and update, in the epoch program; "
        "peer: forward, backward and update on windows that are ready",
        "batch_recordings": batch,
        "steps": few,
        "windows": windows,
        "ours_windows_a_s": windows / step["ours_s"],
        "peer_windows_a_s": windows / step["peer_s"],
        "ours_dispatched_alone_ms": _median_p95(singles),
        "peer_ms": _median_p95(peers),
        "compile_s": ours.compile_s,
        "capacities": list(ours.plan.capacities),
        "padding_waste": ours.waste,
        "flops_of_all_branches": cost.get("flops"),
        "bytes_of_all_branches": cost.get("bytes accessed"),
        "floor": _floor(ours, few, step["ours_s"]),
    }
    streamed = paired(ours.streamed, lambda: ours.steps(0, len(ours.plan.ids)), 7, f"streamed, {batch} recordings")
    total = int(ours.windows.sum())
    return {
        "step": step,
        "streamed": {
            "streamed_s": streamed["ours_s"],
            "resident_s": streamed["peer_s"],
            "rate_over_resident": streamed["ratio"],
            "range": streamed["ratio_range"],
        },
        "loader_only": {
            "ours_windows_a_s": total / seconds(lambda: list(ours.blocks())),
            "peer_windows_a_s": total / seconds(lambda: list(peer.loader)),
        },
    }


def _epoch(corpus: Corpus) -> dict:
    ours = Ours(corpus, cnn_config(1))
    of = {workers: _segmented(ours, workers) for workers in (0, 2)}
    times = {}
    for workers, peer in of.items():
        peer.epoch()  # starts its workers
        times[workers] = seconds(peer.epoch)
    best = of[min(times, key=times.__getitem__)]  # the peer's better choice on this machine
    epoch = paired(lambda: ours.steps(0, len(ours.plan.ids)), best.epoch, 5, "epoch, 1 recording")
    return {
        "epoch": epoch
        | {
            "meaning": "end to end: ours from resident int16, the peer from int16 in memory through its DataLoader",
            "batch_recordings": 1,
            "peer_epoch_s_by_workers": times,
            "ours_windows_a_s": int(ours.windows.sum()) / epoch["ours_s"],
            "ours_recordings_a_s": len(corpus.rows) / epoch["ours_s"],
            "peer_recordings_a_s": len(corpus.rows) / epoch["peer_s"],
            "compile_s": ours.compile_s,
            "capacities": list(ours.plan.capacities),
            "padding_waste": ours.waste,
        }
    }


def _median_p95(times_s: list[float]) -> dict:
    return {"median": float(np.median(times_s) * 1e3), "p95": float(np.quantile(times_s, 0.95) * 1e3)}


def _floor(ours: Ours, steps: int, measured_s: float) -> dict:
    """Multiply-adds that the net itself needs, and what share of this machine's matrix rate that makes."""
    window, g = ours.geometry.window, ours.geometry
    used = np.where(ours.plan.ids[:steps] >= 0, ours.corpus.lengths[ours.plan.ids[:steps]], 0)
    windows = g.windows(used)
    samples = float((((windows - 1) * g.hop + window) * (used > 0)).sum())
    pooled = ((window - 4) // 2 - 4) // 2
    forward = 2 * (samples * 5 * 16 + samples / 2 * 5 * 16 * 32 + float(windows.sum()) * (32 * pooled * 64 + 64))
    # Backward: twice forward, but nothing flows back into the samples.
    flops = 3 * forward - 2 * samples * 5 * 16
    n = 2048
    a = jnp.ones((n, n))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    rate = 2 * n**3 / min(seconds(lambda: product(a).block_until_ready()) for _ in range(5))
    floor_s = flops / rate
    return {"flops": flops, "matrix_flops_a_s": rate, "floor_s": floor_s, "share_of_floor": floor_s / measured_s}


def _prepare_rate() -> dict:
    """`prepare`, whole, against loops that only decode and resample the same files, one process each."""
    from pcgjax.datasets import synthetic

    result: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "corpus"
        synthetic.write(source, layout="circor", people=150, recordings_per_person=2, duration_s=(15, 30))
        paths = [str(path) for path in sorted(source.rglob("*.wav"))]
        context = multiprocessing.get_context("spawn")
        # A process for each, so that neither finds the other's memory settings.
        for name, loop in (("librosa.load", _librosa_load), ("soundfile and soxr", _decode_and_resample)):
            with context.Pool(1) as ours, context.Pool(1) as bare:
                timed = paired(
                    functools.partial(ours.apply, _prepare, (str(source), folder)),
                    functools.partial(bare.apply, loop, (paths,)), 15, f"prepare and {name}",
                )  # fmt: skip
            result[name] = {"files": len(paths), "prepare_s": timed["ours_s"], "loop_s": timed["peer_s"],
                            "rate_over_loop": timed["ratio"], "range": timed["ratio_range"]}  # fmt: skip
    return result


def _prepare(source: str, folder: str) -> None:
    from pcgjax.prepare import prepare

    prepare("synthetic", source, tempfile.mkdtemp(dir=folder), SAMPLE_RATE_HZ, workers=1)


def _librosa_load(paths: list[str]) -> None:
    import librosa

    for path in paths:
        librosa.load(path, sr=SAMPLE_RATE_HZ)


def _decode_and_resample(paths: list[str]) -> None:
    import soundfile
    import soxr

    for path in paths:
        samples, rate_hz = soundfile.read(path, dtype="float32")
        soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ, quality="HQ")


def _memory(mib: int = 512) -> dict:
    """Peak resident set of a process that trains on a resident corpus of `mib` MiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(_train_in_memory, (mib,))
    return {"corpus_mib": mib, "peak_rss_mib": peak, "limit_mib": 2 * mib + 1536}


def _train_in_memory(mib: int) -> float:
    length = 36_000
    count = mib * 2**20 // (2 * length)
    rng = np.random.default_rng(0)
    one = rng.integers(-9000, 9000, length, dtype=np.int16)
    rows = [{"id": str(i), "sha256": str(i), "labels": {"abnormal": str(i % 2)}} for i in range(count)]
    # Read on demand, as from the shards: the corpus itself is on the device alone.
    corpus = Corpus(rows, SAMPLE_RATE_HZ, np.full(count, length, np.int32), lambda i: np.roll(one, i))
    Ours(corpus, cnn_config(8)).steps(0, 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _cnn_summary(result: dict) -> str:
    s, e, m, p = (result[part] for part in ("step", "epoch", "memory", "prepare"))
    return "\n".join([
        f"step, 8 recordings       {s['ratio']:.2f}x the peer  [{s['ratio_range'][0]:.2f}, {s['ratio_range'][1]:.2f}]"
        f"   ours {s['ours_windows_a_s']:.0f} windows/s, {100 * s['floor']['share_of_floor']:.0f} % of the matrix rate",
        f"epoch, 1 recording       {e['ratio']:.2f}x the peer  [{e['ratio_range'][0]:.2f}, {e['ratio_range'][1]:.2f}]"
        f"   ours {e['ours_recordings_a_s']:.0f} recordings/s",
        f"streamed                 {result['streamed']['rate_over_resident']:.2f} of resident",
        *(f"prepare                  {loop['rate_over_loop']:.2f} of a loop of {name}" for name, loop in p.items()),
        f"padding                  {s['padding_waste']:.3f} at 8 recordings, {e['padding_waste']:.3f} at 1",
        f"memory                   {m['peak_rss_mib']:.0f} MiB, the corpus {m['corpus_mib']} (limit {m['limit_mib']})",
        f"compile                  {s['compile_s']:.1f} s at 8 recordings, {e['compile_s']:.1f} s at 1",
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------------ hinf_lstm

HIDDEN = 128
# (batch, steps, inputs): the model's own, with inputs of 512 and more; and where only the recurrence counts.
KERNELS = (
    (32, 157, 512), (64, 20, 2048), (128, 157, 512), (8, 157, 512),
    (32, 500, 64), (256, 157, 64), (8, 20, 64), (512, 20, 64), (8, 1000, 64), (32, 1000, 64), (512, 157, 64),
)  # fmt: skip
PYTHON_LOOP = ((32, 157, 512), (8, 1000, 64))  # the model's own size, and many steps of few inputs


def hinf_lstm_config(batch_recordings: int) -> ml_collections.ConfigDict:
    """The fields of configs/hinf_lstm.py that a step depends on."""
    return ml_collections.ConfigDict(
        {
            "task": {"name": "hinf_lstm"},
            "features": {
                "window_s": 5.0, "noise_snr_db": float("inf"), "wavelet_level": 4, "filter": "zero_phase",
                "filter_order": 5, "high_hz": 500.0, "n_fft": 2048, "hop": 512, "n_mels": 128, "htk": False,
                "top_db": 80.0,
            },
            "model": {
                "cell": "convex", "blocks": ((32, 32), (64, 64)), "hidden": HIDDEN, "dropout": 0.3,
                "implementation": "auto",
            },
            "loss": {"name": "pwl", "alpha": 0.87, "normalize": "counts", "slope": 0.0},
            "optimizer": {"name": "adam", "learning_rate": 0.001, "frozen": ()},
            "train": {"batch_recordings": batch_recordings},
        }
    )  # fmt: skip


def hinf_lstm(prepared: str, recordings: int) -> dict:
    """The suite `hinf_lstm`: the recurrent kernel, a whole step at 8 recordings, ten seeds as one program."""
    corpus = (
        input_pipeline.from_prepared(prepared) if prepared else make_corpus(min(recordings, 48), sample_rate_hz=2000)
    )
    samples = [corpus.read(i) for i in range(min(recordings, 48, len(corpus.rows)))]
    corpus = input_pipeline.in_memory(corpus.rows[: len(samples)], samples, corpus.sample_rate_hz)
    return {
        "corpus": {"recordings": len(corpus.rows), "seconds": float(corpus.lengths.sum() / corpus.sample_rate_hz)},
        "kernel": [_kernel(*size) for size in KERNELS],
        "python_loop": [_kernel(*size, loop=True) for size in PYTHON_LOOP],
        "train": _hinf_step(corpus),
        "seeds": _seeds(),
    }


def _kernel(batch: int, steps: int, inputs: int, loop: bool = False) -> dict:
    """The recurrent layer, forward and all gradients, against torch.nn.LSTM or a cell in a Python loop."""
    import torch

    from pcgjax.kernels.hinf_lstm import hinf_lstm as layer

    rng = np.random.default_rng(0)
    draw = lambda *shape: np.float32(rng.normal(size=shape) / np.sqrt(shape[0]))
    x, weights = draw(batch, steps, inputs), draw(batch, steps, HIDDEN)
    parameters = draw(inputs, 3 * HIDDEN), draw(HIDDEN, 3 * HIDDEN), draw(3 * HIDDEN), draw(HIDDEN)
    compiled = functools.partial(jax.jit, compiler_options=sharding.compiler_options())
    gradient = compiled(jax.grad(lambda *a: (layer(*a) * weights).sum(), range(5)))
    arguments = jax.device_put((x, *parameters))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = peers.hinf_cell_layer(inputs, HIDDEN) if loop else torch.nn.LSTM(inputs, HIDDEN, batch_first=True)
    peer.to(device)
    given, towards = torch.tensor(x, device=device, requires_grad=True), torch.tensor(weights, device=device)

    def torch_step():
        peer.zero_grad()
        given.grad = None
        out = peer(given)
        ((out if loop else out[0]) * towards).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    # Enough calls in a measurement that each takes some tens of milliseconds.
    ours = lambda: jax.block_until_ready(gradient(*arguments))
    ours()
    calls = max(1, int(0.05 / seconds(ours)))

    def repeated(function):
        def run():
            for _ in range(calls):
                function()

        return run

    name = "Python loop" if loop else "torch.nn.LSTM"
    timed = paired(repeated(ours), repeated(torch_step), 7, f"B {batch}, T {steps}, D {inputs}: {name}")
    # Forward and twice backward; multiply-adds of the projection and of the recurrence.
    flops = 3 * 2 * batch * steps * (inputs + HIDDEN) * 3 * HIDDEN
    return {
        "batch": batch, "steps": steps, "inputs": inputs, "hidden": HIDDEN, "peer": name,
        "ours_ms": 1e3 * timed["ours_s"] / calls, "peer_ms": 1e3 * timed["peer_s"] / calls,
        "ratio": timed["ratio"], "range": timed["ratio_range"], "ours_gflops": flops * calls / timed["ours_s"] / 1e9,
    }  # fmt: skip


def _hinf_step(corpus: Corpus, batch: int = 8) -> dict:
    ours = Ours(corpus, hinf_lstm_config(batch))
    peer = peers.Clipped(corpus, ours.labels, ours.plan.ids, hinf_lstm_config(batch))
    few = len(ours.plan.ids)
    ready = list(peer.loader)
    network = paired(
        lambda: ours.steps(0, few), lambda: [peer.step(*b) for b in ready], 5, "step against the peer's network alone"
    )
    whole = paired(lambda: ours.steps(0, few), peer.epoch, 7, "step, from samples")
    clips = int(ours.windows.sum())
    return {
        "meaning": "from int16 samples to the updated parameters; `network_alone` gives the peer clips that are ready",
        "batch_recordings": batch,
        "steps": few,
        "clips": clips,
        **whole,
        "network_alone": network,
        "ours_clips_a_s": clips / whole["ours_s"],
        "peer_clips_a_s": clips / whole["peer_s"],
        "compile_s": ours.compile_s,
        "padding_waste": ours.waste,
    }


def _seeds(seeds: int = 10, clips: int = 256) -> dict:
    """Ten trainings of the ablation's CNN-LSTM, two epochs each, as one program, against ten runs of one in a row."""
    from pcgjax import ablation

    config = hinf_lstm_config(8)
    config.features.n_mels = 64
    config.model.update({"cell": "lstm", "blocks": ((16,), (32,)), "hidden": 64})
    config.ablation = ml_collections.ConfigDict({"epochs": (2, 0), "batch_clips": 32})
    task = tasks.make(config, 2000)
    rng = np.random.default_rng(0)
    mel = jnp.asarray(rng.uniform(size=(clips, config.features.n_mels, 20)), jnp.float32)
    data = ablation.Clips(mel, jnp.ones((clips, 20)), jnp.ones((clips // 2, 2), bool))
    shared = data, jnp.asarray(rng.integers(0, 2, clips // 2), jnp.float32)
    keys = [jax.random.key(seed) for seed in range(seeds)]
    states = [tasks.split(task.init(nnx.Rngs(seed)))[1:] for seed in range(seeds)]
    own = list(zip(keys, states, [jnp.arange(clips)] * seeds, strict=True))
    run = ablation.pretrain(config, task)
    compiled = functools.partial(jax.jit, compiler_options=sharding.compiler_options())
    one, all_seeds = compiled(run), compiled(ablation.over_seeds(run))
    together = jax.tree.map(lambda *x: jnp.stack(x), *own)
    return paired(
        lambda: jax.block_until_ready(all_seeds(together, shared)),
        lambda: [jax.block_until_ready(one(*mine, *shared)) for mine in own],
        5, "ten seeds",
    )  # fmt: skip


def _hinf_summary(result: dict) -> str:
    def line(k):
        return (
            f"B {k['batch']:3d}, T {k['steps']:4d}, D {k['inputs']:4d}   {k['ratio']:5.2f}x {k['peer']}  "
            f"[{k['range'][0]:.2f}, {k['range'][1]:.2f}]   ours {k['ours_ms']:.1f} ms, {k['ours_gflops']:.0f} GFLOP/s"
        )

    t, s = result["train"], result["seeds"]
    return "\n".join([
        "kernel, forward and all gradients, hidden 128",
        *map(line, result["kernel"]),
        *map(line, result["python_loop"]),
        f"train step, samples to update   {t['ratio']:.2f}x the peer  [{t['ratio_range'][0]:.2f}, "
        f"{t['ratio_range'][1]:.2f}]   ours {t['ours_clips_a_s']:.0f} clips/s",
        f"the same, the peer's network alone   {t['network_alone']['ratio']:.2f}x",
        f"ten seeds as one program        {s['ratio']:.2f}x ten runs in a row  [{s['ratio_range'][0]:.2f}, "
        f"{s['ratio_range'][1]:.2f}]",
    ])  # fmt: skip


# suite -> (what measures it, the main figures for a terminal)
SUITES: dict[str, tuple[Callable[[str, int], dict], Callable[[dict], str]]] = {
    "cnn": (cnn, _cnn_summary),
    "hinf_lstm": (hinf_lstm, _hinf_summary),
    "selective_scan": (lambda *_: bench_scan.selective_scan_suite(), bench_scan.selective_scan_summary),
    "ssamba": (lambda *_: bench_ssamba.ssamba_suite(), bench_ssamba.ssamba_summary),
    "scale": (lambda *_: bench_scale.scale_suite(flags.FLAGS.quick), bench_scale.scale_summary),
    "classical": (lambda prepared, _: bench_classical.classical_suite(prepared), bench_classical.classical_summary),
    "audio_llm": (lambda *_: bench_audio_llm.audio_llm_suite(), bench_audio_llm.audio_llm_summary),
}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}")
    import torch

    if FLAGS.suite == "ssamba":  # the batch's items on devices of their own; of no effect where there is a GPU
        jax.config.update("jax_num_cpu_devices", bench_ssamba.BATCH)
    measure, summary = SUITES[FLAGS.suite]
    result = measure(FLAGS.prepared, FLAGS.recordings)
    result["system"] = {
        "suite": FLAGS.suite,
        "device": jax.devices()[0].device_kind,
        "cores": multiprocessing.cpu_count(),
        "platform": platform.platform(),
        "versions": {"pcgjax": pcgjax.__version__, "python": platform.python_version(), "jax": jax.__version__,
                     "torch": torch.__version__, "numpy": np.__version__},
    }  # fmt: skip
    files.write_text(pathlib.Path(FLAGS.out), json.dumps(result, indent=1))
    print(summary(result))
    print(f"wrote {FLAGS.out}")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_enum("suite", "cnn", sorted(SUITES), "What to measure.")
    flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
    flags.DEFINE_string("prepared", "", "A folder that pcgjax.prepare wrote; default: a simulated corpus.")
    flags.DEFINE_integer("recordings", 160, "How many recordings to use, in cnn and hinf_lstm.", 16)
    flags.DEFINE_bool("quick", False, "In scale: models and corpora so small that no figure counts.")
    files.run(main)
