"""The recordings that the suites measure on: simulated, in memory or as a folder that `prepare` would write."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import tqdm

from pcgjax.data.corpus import Corpus, from_prepared, in_memory
from pcgjax.data.shards import FORMAT, RECORDINGS_A_SHARD, probe
from pcgjax.datasets import Span
from pcgjax.datasets.simulate import Person, draw_person, simulate_person
from pcgjax.runtime import files

SAMPLE_RATE_HZ = 1000
DISTINCT = 24  # recordings of `write_prepared` that differ


def some_recordings(prepared: str, recordings: int, sample_rate_hz: int = SAMPLE_RATE_HZ) -> Corpus:
    """The first recordings of a prepared folder, or, where `prepared` is empty, so many simulated ones; in memory."""
    if not prepared:
        return cinc_like(recordings, sample_rate_hz=sample_rate_hz)
    corpus = from_prepared(prepared)
    count = min(recordings, len(corpus.rows))
    return in_memory(corpus.rows[:count], [corpus.read(i) for i in range(count)], corpus.sample_rate_hz)


def cinc_like(recordings: int, seed: int = 0, sample_rate_hz: int = SAMPLE_RATE_HZ) -> Corpus:
    """Simulated recordings as long as CinC 2016's: a third 8 s, a third about 36 s, the rest 6 to 60 s."""
    rng = np.random.default_rng(seed)
    rows, samples = [], []
    for i in tqdm.trange(recordings, desc="simulate", unit="recording"):
        duration_s = (8.0, rng.uniform(33, 36.5), rng.uniform(6, 60))[i % 3]
        person = draw_person(rng, i)
        samples.append(_simulated(person, rng, duration_s, sample_rate_hz)[0])
        label = str(int(bool(person.murmurs)))
        rows.append({"id": f"r{i:04d}", "person": str(i), "database": "synthetic", "sha256": str(i),
                     "labels": {"abnormal": label}})  # fmt: skip
    return in_memory(rows, samples, sample_rate_hz)


def pascal_like(clips: int, seed: int = 0, sample_rate_hz: int = 2000) -> Corpus:
    """Simulated clips as long as PASCAL B's: 1 to 25 s, half of them below 4.2 s."""
    rng = np.random.default_rng(seed)
    rows, samples = [], []
    for i in range(clips):
        person = draw_person(rng, i)
        duration_s = float(np.clip(np.exp(rng.normal(np.log(4.2), 0.75)), 1, 25))
        samples.append(_simulated(person, rng, duration_s, sample_rate_hz)[0])
        rows.append({"id": f"r{i:04d}", "person": str(i), "database": "synthetic", "annotations": [],
                     "labels": {"murmur": str(int(bool(person.murmurs)))}})  # fmt: skip
    return in_memory(rows, samples, sample_rate_hz)


def write_prepared(
    folder: pathlib.Path, recordings: int, duration_s: tuple[float, float], rate_hz: int, annotated: bool = False
) -> pathlib.Path:
    """What `prepare` would write for simulated recordings of these durations (from, to), DISTINCT of them different.

    Returns `folder`. Each recording is another person's, every second one abnormal.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    different = [_simulated(draw_person(rng, i), rng, duration_s[1], rate_hz) for i in range(min(DISTINCT, recordings))]
    rows = []
    for first in range(0, recordings, RECORDINGS_A_SHARD):
        shard = f"shard-{first // RECORDINGS_A_SHARD:05d}.array_record"
        writer = ArrayRecordWriter(str(folder / shard), "group_size:1,uncompressed")
        for i in range(first, min(first + RECORDINGS_A_SHARD, recordings)):
            wave, annotations = different[i % len(different)]
            samples = wave[: round(rng.uniform(*duration_s) * rate_hz)]
            samples = samples.astype("<i2")
            writer.write(samples.tobytes())
            length_s = len(samples) / rate_hz if annotated else 0
            rows.append({
                "id": f"r{i:06d}", "person": str(i), "person_known": True, "database": "synthetic",
                "labels": {"abnormal": str(i % 2)}, "annotations": [a for a in annotations if a[1] <= length_s],
                "sha256": str(i), "fingerprint": "", "num_samples": len(samples), "shard": shard, "index": i - first,
                "path": f"r{i:06d}.wav", "probe": probe(samples),
            })  # fmt: skip
        writer.close()
    files.write_text(folder / "records.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    manifest = {
        "format": FORMAT,
        "parameters": {"sample_rate_hz": rate_hz},
        "counts": {"recordings": len(rows)},
    }
    files.write_text(folder / "manifest.json", json.dumps(manifest))
    return folder


def _simulated(
    person: Person, rng: np.random.Generator, duration_s: float, rate_hz: int
) -> tuple[np.ndarray, list[Span]]:
    """(samples (n,) int16 at full scale, annotations) of a recording at the mitral site."""
    wave, annotations = simulate_person(person, "MV", rng, duration_s, rate_hz)
    return np.round(wave / np.abs(wave).max() * 32767).astype(np.int16), annotations
