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
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from absl import app, flags
from flax import nnx

import pcgjax
from pcgjax import files, input_pipeline, optimizer, tasks, train
from pcgjax.input_pipeline import Corpus

SAMPLE_RATE_HZ = 1000


def make_corpus(recordings: int, seed: int = 0) -> Corpus:
    """Simulated recordings as long as CinC 2016's: a third 8 s, a third about 36 s, the rest 6 to 60 s."""
    from pcgjax.datasets import synthetic

    rng = np.random.default_rng(seed)
    rows, samples = [], []
    for i in tqdm.trange(recordings, desc="simulate", unit="recording"):
        duration_s = (8.0, rng.uniform(33, 36.5), rng.uniform(6, 60))[i % 3]
        person = synthetic.draw_person(rng, i)
        wave, _ = synthetic.simulate(person, "MV", rng, duration_s, SAMPLE_RATE_HZ)
        samples.append(np.round(wave / np.abs(wave).max() * 32767).astype(np.int16))
        label = str(int(bool(person.murmurs)))
        rows.append({"id": f"r{i:04d}", "person": str(i), "database": "synthetic", "sha256": str(i),
                     "labels": {"abnormal": label}})  # fmt: skip
    return input_pipeline.in_memory(rows, samples, SAMPLE_RATE_HZ)


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

    def __init__(self, corpus: Corpus, batch_recordings: int):
        config = cnn_config(batch_recordings)
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
        self.totals = train.zero_totals()
        step = train.make_step(task, update, graphdef, key, 1)
        run = jax.jit(train.make_run(step, task.geometry, capacities), donate_argnums=(0, 1))
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


class Segments:
    """The peer's Dataset: one recording's filtered, z-scored windows (S, T) and its label."""

    def __init__(self, samples: list[np.ndarray], labels: np.ndarray, window: int, hop: int, sample_rate_hz: int):
        import scipy.signal

        self.samples, self.labels, self.window, self.hop = samples, labels, window, hop
        self.sos = scipy.signal.butter(4, [25, 400], "bandpass", fs=sample_rate_hz, output="sos")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        import scipy.signal
        import torch

        x = scipy.signal.sosfiltfilt(self.sos, self.samples[index] / 32767)
        x = (x - x.mean()) / x.std()
        count = max(1, (len(x) - self.window) // self.hop + 1)
        x = np.pad(x, (0, max(0, self.window - len(x))))
        cut = np.stack([x[i * self.hop : i * self.hop + self.window] for i in range(count)])
        return torch.tensor(cut, dtype=torch.float32), float(self.labels[index])


def collate(items):
    """Recordings -> (segments (S, 1, T), recording ids (S,), labels (R,))."""
    import torch

    segments = torch.cat([segments for segments, _ in items])[:, None]
    ids = torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(s) for s, _ in items]))
    return segments, ids, torch.tensor([label for _, label in items])


class Peer:
    """The same training in PyTorch, on the same batches."""

    def __init__(self, ours: Ours, workers: int = 0):
        import torch

        corpus, window = ours.corpus, ours.geometry.window
        samples = [corpus.read(i) for i in range(len(corpus.rows))]
        dataset: Any = Segments(samples, ours.labels, window, ours.geometry.hop, corpus.sample_rate_hz)
        self.loader: Any = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=[[int(i) for i in step.reshape(-1) if i >= 0] for step in ours.plan.ids],
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None,  # a fork of a process with JAX's threads can hang
        )
        pooled = ((window - 4) // 2 - 4) // 2
        self.net = torch.nn.Sequential(
            torch.nn.Conv1d(1, 16, 5), torch.nn.ReLU(), torch.nn.MaxPool1d(2),
            torch.nn.Conv1d(16, 32, 5), torch.nn.ReLU(), torch.nn.MaxPool1d(2),
            torch.nn.Flatten(), torch.nn.Linear(32 * pooled, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1),
        ).to("cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
        self.device = next(self.net.parameters()).device
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)
        self.torch = torch

    def step(self, segments, ids, labels) -> float:
        """One step on segments (S, 1, T) that are ready; waits for the loss."""
        torch = self.torch
        segments, ids, labels = (x.to(self.device) for x in (segments, ids, labels))
        self.optimizer.zero_grad()
        probability = torch.sigmoid(self.net(segments)[:, 0])
        total = torch.zeros(len(labels), device=self.device).index_add_(0, ids, probability)
        mean = total / torch.bincount(ids, minlength=len(labels))
        loss = torch.nn.functional.binary_cross_entropy(mean, labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def epoch(self) -> None:
        for batch in self.loader:
            self.step(*batch)


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


def _step(corpus: Corpus, batch: int = 8) -> dict:
    ours = Ours(corpus, batch)
    peer = Peer(ours)
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
    ours = Ours(corpus, 1)
    peers = {workers: Peer(ours, workers) for workers in (0, 2)}
    times = {}
    for workers, peer in peers.items():
        peer.epoch()  # starts its workers
        times[workers] = seconds(peer.epoch)
    best = peers[min(times, key=times.__getitem__)]  # the peer's better choice on this machine
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
                    functools.partial(bare.apply, loop, (paths,)), 9, f"prepare and {name}",
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
    Ours(corpus, 8).steps(0, 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def summary(result: dict) -> str:
    """The main figures, for a terminal."""
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


SUITES = {"cnn": cnn}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}")
    import torch

    result = SUITES[FLAGS.suite](FLAGS.prepared, FLAGS.recordings)
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
    flags.DEFINE_integer("recordings", 160, "How many recordings to use.", 16)
    files.run(main)
