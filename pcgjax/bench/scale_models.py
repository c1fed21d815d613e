"""The models that suite `scale` measures, and the corpora that it writes for them."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from pcgjax.data.shards import FORMAT, RECORDINGS_A_SHARD
from pcgjax.runtime import files

ROOT = pathlib.Path(__file__).resolve().parents[2]


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
EIGHT = 8
DISTINCT = 24


def write_prepared(
    folder: pathlib.Path, recordings: int, duration_s: tuple[float, float], rate_hz: int, annotated: bool = False
) -> pathlib.Path:
    """What `prepare` would write for simulated recordings of these durations (from, to), DISTINCT of them different.

    Returns `folder`. Each recording is another person's, every second one abnormal.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    from pcgjax.datasets.simulate import draw_person, simulate_person

    folder.mkdir(parents=True)
    rng, heard = np.random.default_rng(0), []
    for i in range(min(DISTINCT, recordings)):
        wave, annotations = simulate_person(draw_person(rng, i), "MV", rng, duration_s[1], rate_hz)
        heard.append((np.round(wave / np.abs(wave).max() * 32767).astype("<i2"), annotations))
    rows = []
    for first in range(0, recordings, RECORDINGS_A_SHARD):
        shard = f"shard-{first // RECORDINGS_A_SHARD:05d}.array_record"
        writer = ArrayRecordWriter(str(folder / shard), "group_size:1,uncompressed")
        for i in range(first, min(first + RECORDINGS_A_SHARD, recordings)):
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
        "format": FORMAT,
        "parameters": {"sample_rate_hz": rate_hz},
        "counts": {"recordings": len(rows)},
    }
    files.write_text(folder / "manifest.json", json.dumps(manifest))
    return folder
