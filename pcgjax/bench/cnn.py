"""Suite `cnn`: a train step, an epoch, preparation, memory and padding of the 1D CNN beside PyTorch.

The peer is what people write in PyTorch for the same net: a Dataset that filters with SciPy and cuts windows, a
DataLoader, Conv1d and MaxPool1d, SGD.
"""

from __future__ import annotations

import functools
import multiprocessing
import pathlib
import resource
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from pcgjax.bench.corpora import SAMPLE_RATE_HZ, some_recordings
from pcgjax.bench.ours import Ours
from pcgjax.bench.peers import Segmented
from pcgjax.bench.timing import fastest, median_p95, paired, ratio_text, seconds, waiting
from pcgjax.data.corpus import Corpus
from pcgjax.datasets import synthetic
from pcgjax.prepare import prepare
from pcgjax.runs.config import load_config


def cnn_suite(prepared: str, recordings: int) -> dict:
    """{corpus, step: at 8 recordings a batch, streamed, loader_only, epoch: at 1, prepare, memory}.

    prepared: a folder that `prepare` wrote, of which the first `recordings` are used; "": as many simulated ones.
    """
    corpus = some_recordings(prepared, recordings)
    return {
        "corpus": {"recordings": len(corpus.rows), "seconds": float(corpus.lengths.sum() / corpus.sample_rate_hz)},
        **_step(corpus),
        **_epoch(corpus),
        "prepare": _prepare_rate(),
        "memory": _memory(),
    }


def cnn_summary(result: dict) -> str:
    """The main figures for a terminal."""
    step, epoch, memory, prepare_rates = (result[part] for part in ("step", "epoch", "memory", "prepare"))
    return "\n".join([
        f"step, 8 recordings       {ratio_text(step['ratio'], step['ratio_range'], 'the peer')}"
        f"   ours {step['ours_windows_a_s']:.0f} windows/s, {100 * step['floor']['share_of_floor']:.0f} % of the "
        "matrix rate",
        f"epoch, 1 recording       {ratio_text(epoch['ratio'], epoch['ratio_range'], 'the peer')}"
        f"   ours {epoch['ours_recordings_a_s']:.0f} recordings/s",
        f"streamed                 {result['streamed']['rate_over_resident']:.2f} of resident",
        *(f"prepare                  {loop['rate_over_loop']:.2f} of a loop of {name}"
          for name, loop in prepare_rates.items()),
        f"padding                  {step['padding_waste']:.3f} at 8 recordings, {epoch['padding_waste']:.3f} at 1",
        f"memory                   {memory['peak_rss_mib']:.0f} MiB, the corpus {memory['corpus_mib']} (limit "
        f"{memory['limit_mib']})",
        f"compile                  {step['compile_s']:.1f} s at 8 recordings, {epoch['compile_s']:.1f} s at 1",
    ])  # fmt: skip


def _segmented(ours: Ours, workers: int = 0) -> Segmented:
    return Segmented(ours.corpus, ours.labels, ours.plan.ids, ours.geometry, workers)


def _step(corpus: Corpus, batch: int = 8) -> dict:
    """{step, streamed, loader_only}: steps on ready windows, an epoch streamed against resident, the loaders alone."""
    ours = Ours(corpus, load_config("cnn", {"train.batch_recordings": batch}))
    peer = _segmented(ours)
    steps = min(len(ours.plan.ids), 8)
    ready = [batch for _, batch in zip(range(steps), peer.loader, strict=False)]
    few_steps = functools.partial(ours.steps, 0, steps)
    step = paired(few_steps, lambda: [peer.step(*b) for b in ready], 9, f"step, {batch} recordings")
    windows = int(ours.windows[:steps].sum())
    ours_alone_s = [seconds(functools.partial(ours.steps, i % steps, i % steps + 1)) for i in range(5 * steps)]
    peer_alone_s = [seconds(functools.partial(peer.step, *ready[i % steps])) for i in range(5 * steps)]
    cost = ours.compiled.cost_analysis() or {}
    step |= {
        "meaning": "ours: gather, filter, z-score, windows, forward, backward and update, in the epoch program; "
        "peer: forward, backward and update on windows that are ready",
        "batch_recordings": batch,
        "steps": steps,
        "windows": windows,
        "ours_windows_a_s": windows / step["ours_s"],
        "peer_windows_a_s": windows / step["peer_s"],
        "ours_dispatched_alone_ms": median_p95(ours_alone_s),
        "peer_ms": median_p95(peer_alone_s),
        "compile_s": ours.compile_s,
        "capacities": list(ours.plan.capacities),
        "padding_waste": ours.waste,
        "flops_of_all_branches": cost.get("flops"),
        "bytes_of_all_branches": cost.get("bytes accessed"),
        "floor": _floor(ours, steps, step["ours_s"]),
    }
    resident_epoch = functools.partial(ours.steps, 0, len(ours.plan.ids))
    streamed = paired(ours.streamed, resident_epoch, 7, f"streamed, {batch} recordings")
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
    """{epoch}: from int16 samples in memory, a recording a step."""
    ours = Ours(corpus, load_config("cnn", {"train.batch_recordings": 1}))
    peers = {workers: _segmented(ours, workers) for workers in (0, 2)}
    times_s = {}
    for workers, peer in peers.items():
        peer.epoch()  # starts its workers
        times_s[workers] = seconds(peer.epoch)
    fastest_peer = peers[min(times_s, key=times_s.__getitem__)]  # the peer's better choice on this machine
    epoch = paired(functools.partial(ours.steps, 0, len(ours.plan.ids)), fastest_peer.epoch, 5, "epoch, 1 recording")
    return {
        "epoch": epoch
        | {
            "meaning": "end to end: ours from resident int16, the peer from int16 in memory through its DataLoader",
            "batch_recordings": 1,
            "peer_epoch_s_by_workers": times_s,
            "ours_windows_a_s": int(ours.windows.sum()) / epoch["ours_s"],
            "ours_recordings_a_s": len(corpus.rows) / epoch["ours_s"],
            "peer_recordings_a_s": len(corpus.rows) / epoch["peer_s"],
            "compile_s": ours.compile_s,
            "capacities": list(ours.plan.capacities),
            "padding_waste": ours.waste,
        }
    }


def _floor(ours: Ours, steps: int, measured_s: float) -> dict:
    """Multiply-adds that the net itself needs, and what share of this machine's matrix rate that makes."""
    window, geometry = ours.geometry.window, ours.geometry
    lengths = np.where(ours.plan.ids[:steps] >= 0, ours.corpus.lengths[ours.plan.ids[:steps]], 0)
    windows = geometry.windows(lengths)
    samples = float((((windows - 1) * geometry.hop + window) * (lengths > 0)).sum())
    pooled = ((window - 4) // 2 - 4) // 2
    forward = 2 * (samples * 5 * 16 + samples / 2 * 5 * 16 * 32 + float(windows.sum()) * (32 * pooled * 64 + 64))
    # Backward: twice forward, but nothing flows back into the samples.
    flops = 3 * forward - 2 * samples * 5 * 16
    n = 2048
    a = jnp.ones((n, n))
    product = waiting(jax.jit(lambda a: a @ a), a)
    product()
    rate = 2 * n**3 / fastest(product, 5)
    floor_s = flops / rate
    return {"flops": flops, "matrix_flops_a_s": rate, "floor_s": floor_s, "share_of_floor": floor_s / measured_s}


def _prepare_rate() -> dict:
    """`prepare`, whole, against loops that only decode and resample the same files, one process each."""
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
    Ours(corpus, load_config("cnn", {"train.batch_recordings": 8})).steps(0, 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
