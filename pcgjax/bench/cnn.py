"""Suite `cnn`: a train step, an epoch, preparation, memory and padding of the 1D CNN beside PyTorch."""

from __future__ import annotations

import functools
import multiprocessing
import pathlib
import resource
import tempfile

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pcgjax.bench.ours import SAMPLE_RATE_HZ, Ours, make_corpus
from pcgjax.bench.peers import Segmented
from pcgjax.bench.timing import median_p95, paired, seconds
from pcgjax.data.corpus import Corpus, from_prepared, in_memory


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


def cnn(prepared: str, recordings: int) -> dict:
    """The suite `cnn`: one step at 8 recordings a batch, an epoch at 1, streaming, memory, prepare."""
    corpus = from_prepared(prepared) if prepared else make_corpus(recordings)
    if prepared:  # what a run reads again and again lies in memory for both
        samples = [corpus.read(i) for i in range(min(recordings, len(corpus.rows)))]
        corpus = in_memory(corpus.rows[: len(samples)], samples, corpus.sample_rate_hz)
    return {
        "corpus": {"recordings": len(corpus.rows), "seconds": float(corpus.lengths.sum() / corpus.sample_rate_hz)},
        **_step(corpus),
        **_epoch(corpus),
        "prepare": _prepare_rate(),
        "memory": _memory(),
    }


def _segmented(ours: Ours, workers: int = 0) -> Segmented:
    return Segmented(ours.corpus, ours.labels, ours.plan.ids, ours.geometry, workers)


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
        "ours_dispatched_alone_ms": median_p95(singles),
        "peer_ms": median_p95(peers),
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


def cnn_summary(result: dict) -> str:
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
