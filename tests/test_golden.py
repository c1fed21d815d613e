"""One training step of every task, against numbers recorded before: what is computed has not changed.

    python -m tests.test_golden    # records tests/fixtures/golden.json anew, after a change meant to change the numbers

Each system trains for one step of all recordings it is given, is validated and judged. Compared are the losses and the
norms of parameters and of the optimizer's moments, which after one step are the gradient's.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import runpy
import sys
import tempfile

import ml_collections
import pytest

# All that is trained goes through these; nothing else of the package's inside is known here.
from pcgjax import systems
from pcgjax.tasks import TASKS

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDED = ROOT / "tests" / "fixtures" / "golden.json"
RECORDING = os.environ.get("PCGJAX_RECORD_GOLDEN", "")  # the file that __main__ wants the numbers in
RTOL = 1e-4  # between versions of JAX and PyTorch, and between processors

STEP = {"train.epochs": 1, "train.batch_recordings": 64, "evaluation.resamples": 2, "data.pipeline": "resident",
        "split.kind": "person", "split.fractions": (0.6, 0.2, 0.2)}  # fmt: skip
CLIPS = STEP | {"features.window_s": 1.0, "features.n_fft": 128, "features.n_mels": 8, "features.high_hz": 200.0}
IN_TORCH = {k: v for k, v in STEP.items() if k != "data.pipeline"} | {"optimizer.warmup_steps": 0}
SSAMBA = STEP | {"features.window_s": 0.5, "model.width": 16, "model.depth": 2, "model.implementation": "reference",
                 "optimizer.warmup_steps": 0}  # fmt: skip
CASES = {
    "cnn": ("cnn", STEP | {"features.window_s": 1.0, "model.filters": (4, 8), "model.hidden": 8}),
    "hinf_lstm": ("hinf_lstm", CLIPS | {
        "features.hop": 64, "features.wavelet_level": 3, "model.blocks": ((4,),), "model.hidden": 8, "sapt.interval": 1,
    }),
    "image": ("mobilenet_v3", CLIPS | {
        "features.hop": 100, "features.wavelet_level": 0, "features.filter": "none", "features.high_hz": 500.0,
        "model.width": 0.25, "model.blocks": 1,
    }),
    "segmenter": ("segmenter_small", STEP | {
        "features.window_s": 1.0, "features.n_fft": 64, "features.n_mels": 10, "features.low_hz": 25.0,
        "features.high_hz": 400.0, "model.width": 8, "model.depth": 1, "model.d_state": 2,
        "model.implementation": "reference", "optimizer.warmup_steps": 0,
    }),
    "ssamba_pretrain": ("ssamba_pretrain", SSAMBA | {"model.mask_patches": 8}),
    "classical": ("classical", {
        "train.epochs": 20, "model.hidden": 8, "experiment.runs": 0, "evaluation.resamples": 2,
        "split.fractions": (0.6, 0.2, 0.2),
    }),
    "audio_encoder": ("wav2vec2", IN_TORCH | {
        "features.window_s": 0.7, "model.size": "tiny", "train.portion_clips": 32, "optimizer.learning_rate": 0.003,
    }),
    "audio_llm": ("audio_llm", {
        "split.fractions": (0.4, 0.3, 0.3), "data.clip_s": 1.5, "model.dtype": "float32", "lora.rank": 4,
        "optimizer.learning_rate": 0.02, "optimizer.warmup_steps": 0, "train.epochs": 1, "train.batch_recordings": 64,
        "questions.a_clip": 1, "questions.tasks": ("murmur",), "evaluation.resamples": 2,
    }),
}  # fmt: skip
AT_16_KHZ = ("ssamba_pretrain", "audio_encoder", "audio_llm")


def config_of(name: str, fields: dict, prepared: pathlib.Path) -> ml_collections.ConfigDict:
    """configs/NAME.py with these fields, its stages left out: one training."""
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    with config.ignore_type():
        config.update_from_flattened_dict(fields | {"data.prepared": str(prepared)})
    if "stages" in config:
        config.stages = ml_collections.ConfigDict()
    return config


def norm(arrays: list) -> float:
    return math.sqrt(sum(float((array.astype("float64") ** 2).sum()) for array in arrays))


def norms(workdir: pathlib.Path) -> dict[str, float]:
    """Of the last checkpoint: parameters, and the optimizer's moments (of SGD none)."""
    folder = workdir / "checkpoints"
    if (folder / "last").exists():  # of Orbax
        state = read_orbax(max((folder / "last").glob("[0-9]*"), key=lambda path: int(path.name)) / "state")["state"]
        import jax

        moments = [x for x in jax.tree.leaves(state["opt_state"]) if x.dtype.kind == "f"]
        return {"parameters": norm(jax.tree.leaves(state["params"])), "moments": norm(moments)}
    values = {}
    for path in sorted(folder.glob("last-*/**/*.safetensors")):
        from safetensors.numpy import load_file

        values["moments" if path.stem == "optimizer" else "parameters"] = norm(list(load_file(path).values()))
    return values


def read_orbax(folder: pathlib.Path) -> dict:
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as reader:
        how = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree
        )
        return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=how))


def numbers(workdir: pathlib.Path) -> dict[str, float]:
    """What a run is compared by: losses by part, of a classifier its sum of probabilities, and `norms`."""
    values: dict[str, float] = {}
    log = workdir / "metrics.jsonl"
    for line in map(json.loads, log.read_text().splitlines() if log.exists() else ()):
        values |= {f"{line['split']} {name}": line[name] for name in ("loss", "gradient_norm") if name in line}
    table = workdir / "predictions.csv"
    if table.exists():
        head, *rows = (line.split(",") for line in table.read_text().splitlines())
        if "probability" in head:
            values["probabilities"] = sum(float(row[head.index("probability")]) for row in rows)
    return values | norms(workdir)


def test_every_task_is_here():
    assert set(TASKS) <= set(CASES)


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=[pytest.mark.slow] if task == "ssamba_pretrain" else []) for task in CASES]
)
def test_a_step_gives_the_recorded_numbers(task, prepared, request, tmp_path, monkeypatch):
    name, fields = CASES[task]
    if task in (*TASKS, "audio_encoder"):
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # without it a run leaves its page out: half of the time
    corpus = request.getfixturevalue("prepared_16k") if task in AT_16_KHZ else prepared
    config = config_of(name, fields, corpus)
    if task == "audio_llm":
        from pcgjax.audio_llm.loop import train as train_audio_llm

        train_audio_llm(config, str(request.getfixturevalue("tiny_llm")), tmp_path)
    else:
        systems.of(config.task.name).train(config, tmp_path, False)
    values = numbers(tmp_path)
    assert len(values) > (0 if task == "classical" else 3), sorted(values)
    assert all(math.isfinite(value) for value in values.values())
    if RECORDING:
        path = pathlib.Path(RECORDING)
        path.write_text(json.dumps(json.loads(path.read_text()) | {task: values}))
    else:
        assert values == pytest.approx(json.loads(RECORDED.read_text())["steps"][task], rel=RTOL)


def record() -> int:
    """Runs the test and writes what it saw to RECORDED, with the versions it saw it with."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "steps.json"
        path.write_text("{}")
        os.environ["PCGJAX_RECORD_GOLDEN"] = str(path)
        status = pytest.main([__file__, "-q", "-p", "no:cacheprovider"])
        steps = json.loads(path.read_text())
    if status == 0:
        names = ("jax", "flax", "optax", "numpy", "scikit-learn", "torch", "transformers", "peft")
        versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
        RECORDED.parent.mkdir(exist_ok=True)
        RECORDED.write_text(json.dumps({"recorded_with": versions, "steps": steps}, indent=1) + "\n")
        print(f"wrote {RECORDED}")
    return int(status)


if __name__ == "__main__":
    sys.exit(record())
