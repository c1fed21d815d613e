"""What several test files share: a CPU, a small corpus on disk, a small experiment, and runs in fresh processes."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Before JAX is imported. Programs compiled by one test serve the others and the processes that they start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Each worker has a core; PyTorch would start threads for all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="pcgjax-compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most of the time here goes to compiling: without LLVM's optimization that takes half as long. Set to 0 for the rest.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# An array of fewer axes does not spread over another one unasked: a forgotten axis is an error, not other numbers.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


@pytest.fixture
def abstract_device(platform):
    """For a test with the parameter `platform`: what it traces is for a TPU or GPU that this machine may lack.

    Since JAX 0.11 Pallas reads from the mesh of the trace for which GPU it lowers; a mesh that is set around `lower`
    alone is not seen.
    """
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    kind, cores = {"tpu": ("TPU v5 lite", 1), "gpu": ("NVIDIA H100", None)}[platform]
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory) -> pathlib.Path:
    """source/: 24 simulated people in CinC 2016's layout; prepared/: the same at 1000 Hz."""
    from pcgjax import prepare
    from pcgjax.datasets import synthetic

    folder = tmp_path_factory.mktemp("corpus")
    synthetic.write(folder / "source", people=24, recordings_per_person=2, duration_s=(3.0, 3.2), rate_hz=1000)
    prepare.prepare("cinc2016", folder / "source", folder / "prepared", workers=1)
    return folder


@pytest.fixture(scope="session")
def prepared(corpus_folder) -> pathlib.Path:
    return corpus_folder / "prepared"


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory) -> pathlib.Path:
    """A tiny random Qwen2-Audio."""
    from pcgjax.audio_llm.make_tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def prepared_16k(tmp_path_factory) -> pathlib.Path:
    """30 simulated people in CirCor's layout, prepared at 16 kHz."""
    from pcgjax import prepare
    from pcgjax.datasets import synthetic

    folder = tmp_path_factory.mktemp("circor_16k")
    synthetic.write(folder / "source", people=30, recordings_per_person=1, duration_s=(3.0, 3.4), rate_hz=4000,
                    layout="circor", murmur_fraction=0.6)  # fmt: skip
    prepare.prepare("circor", folder / "source", folder / "prepared", 16000, workers=1)
    return folder / "prepared"


@pytest.fixture(scope="session")
def make_config(prepared):
    """make_config({"train.epochs": 2}, "cnn"): configs/cnn.py made small, on the small corpus."""

    def make(changes: dict | None = None, name: str = "cnn"):
        spec = importlib.util.spec_from_file_location(f"{name}_config", ROOT / "configs" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
        with config.ignore_type():
            config.update_from_flattened_dict({"data.prepared": str(prepared), **SMALL_ONES[name], **(changes or {})})
        return config

    return make


SMALL = {
    "data.pipeline": "resident",
    "features.window_s": 0.5,
    "model.filters": (4, 8),
    "model.hidden": 8,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 0.003,
    "train.epochs": 6,
    "train.batch_recordings": 3,
    "train.checkpoint_steps": 2,
    "evaluation.resamples": 20,
}

SMALL_HINF_LSTM = {
    "data.pipeline": "resident",
    "split.kind": "person",
    "split.fractions": (0.65, 0.15, 0.20),
    "features.window_s": 1.0,
    "features.high_hz": 200.0,
    "features.wavelet_level": 3,
    "features.n_fft": 128,
    "features.hop": 64,
    "features.n_mels": 16,
    "model.blocks": ((4,), (8,)),
    "model.hidden": 8,
    "model.dropout": 0.1,
    "optimizer.learning_rate": 0.01,
    "sapt.interval": 2,
    "train.epochs": 4,
    "train.batch_recordings": 6,
    "train.checkpoint_steps": 2,
    "evaluation.resamples": 20,
}

SMALL_IMAGE = {
    "data.pipeline": "resident",
    "split.kind": "person",
    "split.fractions": (0.65, 0.15, 0.20),
    "features.window_s": 1.0,
    "features.wavelet_level": 0,  # as the H-infinity LSTM's, which is tested there
    "features.filter": "none",
    "features.n_fft": 128,
    "features.hop": 25,
    "features.n_mels": 20,
    "optimizer.learning_rate": 0.003,
    "train.epochs": 4,
    "train.batch_recordings": 6,
    "train.checkpoint_steps": 2,
    "evaluation.resamples": 20,
}

SMALL_SEGMENTER = {
    "data.pipeline": "resident",
    "features.masked_bands": 0,
    "features.stretch": 0.0,
    "features.response_db": 0.0,
    "features.noise": False,
    "split.fractions": (0.65, 0.15, 0.2),  # 21 recordings to train: whole batches only, so one shape
    "features.window_s": 1.0,
    "features.n_fft": 64,
    "features.n_mels": 10,
    "features.low_hz": 25.0,
    "features.high_hz": 400.0,
    "model.width": 8,
    "model.depth": 1,
    "model.d_state": 2,
    "model.implementation": "reference",  # the quickest to compile
    "optimizer.learning_rate": 0.02,
    "optimizer.warmup_steps": 2,
    "train.epochs": 8,
    "train.batch_recordings": 7,
    "train.checkpoint_steps": 2,
    "evaluation.resamples": 20,
}

SMALL_SSAMBA = {
    "data.pipeline": "resident",
    "split.fractions": (0.65, 0.15, 0.2),
    "features.window_s": 0.5,
    "model.width": 16,
    "model.depth": 2,
    "model.implementation": "reference",
    "optimizer.learning_rate": 0.003,
    "optimizer.warmup_steps": 2,
    "train.epochs": 3,
    "train.batch_recordings": 7,
    "evaluation.resamples": 20,
}

SMALL_LLM = {
    "split.fractions": (0.5, 0.25, 0.25),
    "data.clip_s": 1.5,
    "model.dtype": "float32",
    "lora.rank": 4,
    "lora.dropout": 0.1,
    "optimizer.learning_rate": 0.02,
    "optimizer.warmup_steps": 2,
    "train.epochs": 2,
    "train.batch_recordings": 4,
    "train.checkpoint_steps": 2,
    "evaluation.resamples": 20,
}

SMALL_ONES = {
    "audio_llm": SMALL_LLM,
    "cnn": SMALL,
    "hinf_lstm": SMALL_HINF_LSTM,
    "resnet50": {**SMALL_IMAGE, "model.width": 4, "model.blocks": (1, 1, 1, 1)},
    "mobilenet_v3": {**SMALL_IMAGE, "model.width": 0.25, "model.blocks": 4},
    "vit": {**SMALL_IMAGE, "model.width": 64, "model.blocks": 2, "optimizer.warmup_steps": 2},
    "segmenter_small": SMALL_SEGMENTER,
    "segmenter": SMALL_SSAMBA,
    "ssamba_pretrain": {**SMALL_SSAMBA, "model.mask_patches": 8},
}


@pytest.fixture(scope="session")
def trained(make_config, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run of SMALL that nothing disturbed. Not to be written to."""
    from pcgjax.training.loop import train

    workdir = tmp_path_factory.mktemp("trained")
    train(make_config(), workdir)
    return workdir


@pytest.fixture(scope="session")
def trained_segmenter(make_config, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run of SMALL_SEGMENTER that nothing disturbed. Not to be written to."""
    from pcgjax.training.loop import train

    workdir = tmp_path_factory.mktemp("trained_segmenter")
    train(make_config(name="segmenter_small"), workdir)
    return workdir


@pytest.fixture(scope="session")
def command(prepared):
    """command("train", "--workdir=...", ...): the argument list and environment of a `python -m pcgjax.train`."""

    def make(module: str, *arguments: str, config: str = "cnn", **environment: str):
        if module == "train":
            flags = [f"--config.{name}={value}" for name, value in SMALL_ONES[config].items()]
            path = f"--config={ROOT / 'configs' / f'{config}.py'}"
            arguments = (path, *flags, f"--config.data.prepared={prepared}", *arguments)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, **environment}
        return [sys.executable, "-m", f"pcgjax.{module}", *arguments], environment

    return make


@pytest.fixture(scope="session")
def run_command(command):
    """run_command("train", ...) -> the finished process with its text output."""

    def run(module: str, *arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
        words, env = command(module, *arguments, **environment)
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def run_python():
    """run_python(code): a fresh interpreter with the repository on its path."""

    def run(code: str, *arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, **environment}
        words = [sys.executable, "-c", code, *arguments]
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=timeout)

    return run
