"""What the commands compute, written down to the last bit: run before and after a refactoring, and compared.

    python -m tests.golden --out=before.json [--only=cnn,hinf_lstm] [--jobs=2] [--keep=DIR]
    python -m tests.golden --compare before.json after.json

The first, started in the root of a checkout, runs that checkout's commands on small simulated corpora (nothing of
pcgjax is imported here) and collects what they print and write: losses, scores, predictions, splits and pages as they
are, arrays (of checkpoints, shards and sounds) as their number, norm and SHA-256. The second prints for each case
whether all is equal, or the first difference in each file, and exits with status 1 where there is one; what is written
on HTML pages counts as a case of its own. Each command computes in one thread, so the number of cores changes nothing.

Left out, because they differ from run to run: times, host, versions, TensorBoard's files and train.log.
Not run: `pcgjax.bench`, which measures times, and `pcgjax.reproduce` but for the classical paper.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import html
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path.cwd()
TIMEOUT_S = 1800  # of one command; on idle cores the longest takes half a minute
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
EIGHT = f"{ONE_THREAD} --xla_force_host_platform_device_count=8"
# Keys whose values are times, or say where and when something ran; source_keys are of files' times and full paths.
VOLATILE = {
    "check", "command", "compile_s", "coordinator_address", "git", "goodput", "host", "platform", "seconds",
    "source_keys", "started", "versions", "wall_s", "waited",
}  # fmt: skip
SYSTEM = ("device", "devices", "processes")  # all that is taken of a dictionary "system"
UNREAD = ("tensorboard", "profile", "train.log", "hashes.json")

# ------------------------------------------------------------------------------------------------- small experiments

CNN = {
    "data.pipeline": "resident", "features.window_s": 1.0, "model.filters": (4, 8), "model.hidden": 8,
    "optimizer.name": "adam", "optimizer.learning_rate": 0.003, "train.epochs": 2, "train.batch_recordings": 8,
    "train.checkpoint_steps": 2, "evaluation.resamples": 20,
}  # fmt: skip
CLIPS = {
    "data.pipeline": "resident", "split.kind": "person", "split.fractions": (0.65, 0.15, 0.2), "features.window_s": 1.0,
    "features.high_hz": 200.0, "features.n_fft": 128, "train.epochs": 2, "train.batch_recordings": 8,
    "train.checkpoint_steps": 2, "evaluation.resamples": 20,
}  # fmt: skip
HINF_LSTM = CLIPS | {
    "features.wavelet_level": 3, "features.hop": 64, "features.n_mels": 16, "model.blocks": ((4,), (8,)),
    "model.hidden": 8, "model.dropout": 0.1, "optimizer.learning_rate": 0.01, "sapt.interval": 1, "train.epochs": 3,
}  # fmt: skip
IMAGE = CLIPS | {
    "features.wavelet_level": 0, "features.filter": "none", "features.high_hz": 500.0, "features.hop": 50,
    "features.n_mels": 16,
    "optimizer.learning_rate": 0.003,
}  # fmt: skip
RESNET = IMAGE | {"model.width": 4, "model.blocks": (1, 1, 1, 1)}
MOBILENET = IMAGE | {"model.width": 0.25, "model.blocks": 4}
VIT = IMAGE | {"model.width": 64, "model.blocks": 1, "optimizer.warmup_steps": 2}
SEGMENTER_SMALL = {
    "data.pipeline": "resident", "split.fractions": (0.65, 0.15, 0.2), "features.window_s": 1.0, "features.n_fft": 64,
    "features.n_mels": 10, "features.low_hz": 25.0, "features.high_hz": 400.0, "features.masked_bands": 2,
    "model.width": 8, "model.depth": 1, "model.d_state": 2, "model.implementation": "reference",
    "optimizer.learning_rate": 0.02, "optimizer.warmup_steps": 2, "train.epochs": 2, "train.batch_recordings": 8,
    "train.checkpoint_steps": 2, "evaluation.resamples": 20,
}  # fmt: skip
SSAMBA = {
    "data.pipeline": "resident", "split.fractions": (0.65, 0.15, 0.2), "features.window_s": 0.5, "model.width": 16,
    "model.depth": 2, "model.implementation": "reference", "optimizer.learning_rate": 0.003,
    "optimizer.warmup_steps": 2, "train.epochs": 2, "train.batch_recordings": 8, "evaluation.resamples": 20,
}  # fmt: skip
RAW_AUDIO = {
    "split.kind": "person", "split.fractions": (0.5, 0.25, 0.25), "features.window_s": 0.7, "model.size": "tiny",
    "optimizer.learning_rate": 0.003, "optimizer.warmup_steps": 2, "train.epochs": 2, "train.batch_recordings": 8,
    "train.portion_clips": 8, "train.checkpoint_steps": 2, "evaluation.resamples": 10,
}  # fmt: skip
CLASSICAL = {"train.epochs": 30, "model.hidden": 8, "experiment.runs": 2, "evaluation.resamples": 20}
AUDIO_LLM = {
    "split.fractions": (0.5, 0.25, 0.25), "data.clip_s": 1.5, "model.dtype": "float32", "lora.rank": 4,
    "lora.dropout": 0.1, "optimizer.learning_rate": 0.02, "optimizer.warmup_steps": 2, "train.epochs": 2,
    "train.batch_recordings": 4, "train.checkpoint_steps": 2, "evaluation.resamples": 20,
}  # fmt: skip
ABLATION = {
    "features.window_s": 1.7, "features.high_hz": 200.0, "features.wavelet_level": 0, "features.n_fft": 512,
    "features.hop": 512, "features.n_mels": 8, "model.blocks": ((4,),), "model.hidden": 4, "sapt.interval": 1,
    "evaluation.batch_recordings": 28, "optimizer.learning_rate": 0.02, "ablation.seeds": 2, "ablation.epochs": (1, 2),
    "ablation.batch_clips": 8, "ablation.clips_per_recording": 2, "ablation.synthetic_people": 14,
    "ablation.snrs_db": (10.0,),
}  # fmt: skip


class Case:
    """One case's folder, and the commands that ran in it."""

    def __init__(self, name: str, work: pathlib.Path):
        self.folder, self.corpora, self.work = work / "cases" / name, work / "corpora", work
        self.folder.mkdir(parents=True)
        self.commands: list[dict[str, Any]] = []

    def run(self, module: str, *arguments: str, status: int = 0, launcher: tuple[str, ...] = (), **environment: str):
        """`python -m MODULE ...` in the checkout's root; raises where its exit status is not `status`."""
        words = [*(launcher or (sys.executable, "-m")), module, *arguments]
        done = subprocess.run(
            words, cwd=ROOT, env=environment_of(self.work) | environment, capture_output=True, text=True,
            timeout=TIMEOUT_S,
        )  # fmt: skip
        if done.returncode != status:
            raise RuntimeError(f"{' '.join(words)}: status {done.returncode}\n{done.stderr[-3000:]}")
        said = [line for line in plain(done.stdout, self.work).splitlines() if not TIMED.search(line)]
        errors = [line for line in plain(done.stderr, self.work).splitlines() if line.startswith("error: ")]
        self.commands.append({"module": module, "stdout": said, "errors": errors, "status": done.returncode})

    def train(
        self, config: str, fields: dict[str, Any], prepared: str, workdir: str = "run", module: str = "pcgjax.train",
        more: tuple[str, ...] = (), **how: Any,
    ) -> pathlib.Path:  # fmt: skip
        """Trains configs/CONFIG with these fields on the corpora `prepared`; the workdir."""
        name, _, variant = config.partition(":")
        path = f"configs/{name}.py" + (f":{variant}" if variant else "")
        folders = ",".join(str(self.corpora / one) for one in prepared.split(","))
        flags = [f"--config.{field}={value}" for field, value in fields.items()]
        flags += [f"--config.data.prepared={folders}"] if prepared else []
        self.run(module, f"--config={path}", f"--workdir={self.folder / workdir}", *flags, *more, **how)
        return self.folder / workdir

    def evaluate(self, workdir: pathlib.Path, dataset: str, *more: str, name: str = "") -> None:
        source = self.corpora / {"cinc2016": "cinc"}.get(dataset, dataset)
        out = self.folder / f"{name or dataset}.json"
        arguments = (f"--workdir={workdir}", f"--dataset={dataset}", f"--source={source}", f"--out={out}", *more)
        self.run("pcgjax.evaluate", *arguments)

    def predict(self, workdir: pathlib.Path, out: str, *paths: pathlib.Path) -> None:
        self.run("pcgjax.predict", f"--workdir={workdir}", f"--out={self.folder / out}", *map(str, paths))

    def sounds(self, corpus: str = "cinc", count: int = 3) -> list[pathlib.Path]:
        return sorted((self.corpora / corpus).rglob("*.wav"))[:count]


def environment_of(work: pathlib.Path) -> dict[str, str]:
    """Of every command: CPU, one thread, quick compilation, and this checkout's pcgjax."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": ONE_THREAD,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
    }


# ------------------------------------------------------------------------------------------------------------- cases


def corpora(case: Case) -> None:
    """Simulated people in three official layouts, prepared; all other cases read them."""
    folder = case.corpora
    write = ("--duration_s=3,3.4",)
    layouts = {
        "cinc": ("cinc2016", "--people=24", "--recordings_per_person=2", "--rate_hz=1000"),
        "circor": ("circor", "--people=30", "--recordings_per_person=1", "--murmur_fraction=0.6"),
        "pascal": ("pascal", "--people=32", "--recordings_per_person=2"),
    }
    for name, (layout, *arguments) in layouts.items():
        out = folder / name
        case.run("pcgjax.datasets.synthetic", f"--out={out}", f"--layout={layout}", *arguments, *write)
    for name, rate_hz in (("cinc", 1000), ("cinc", 16000), ("circor", 1000), ("circor", 16000), ("pascal", 1000)):
        out = folder / f"{name}_{rate_hz // 1000}k"
        prepare(case, layouts[name][0], folder / name, out, f"--sample_rate_hz={rate_hz}")


def prepare(case: Case, dataset: str, source: pathlib.Path, out: pathlib.Path, *more: str) -> None:
    case.run("pcgjax.prepare", f"--dataset={dataset}", f"--source={source}", f"--out={out}", "--workers=1", *more)


def prepare_damaged(case: Case) -> None:
    """A corpus with a damaged file, prepared in two parts; the same from a folder without labels."""
    source = case.folder / "source"
    shutil.copytree(case.corpora / "cinc", source)
    first, second, *_ = sorted(source.rglob("*.wav"))
    first.write_bytes(b"RIFF")
    second.write_bytes(second.read_bytes()[:500])
    for part in ("0", "1"):
        prepare(case, "cinc2016", source, case.folder / "prepared", "--num_shards=2", f"--shard_index={part}")
    prepare(case, "folder", source, case.folder / "folder")
    case.run(
        "pcgjax.prepare", "--dataset=cinc2016", f"--source={source}", f"--out={case.folder / 'strict'}", "--strict",
        status=1,
    )  # fmt: skip
    for folder in (source, case.folder / "strict"):  # the latter holds what a later call would go on with
        shutil.rmtree(folder)


def splits(case: Case) -> None:
    for name, corpus, *more in (
        ("person", "cinc_1k", "--kind=person", "--target=abnormal"),
        ("murmur", "circor_1k", "--kind=person", "--target=murmur", "--seed=1"),
        ("kfold", "cinc_1k", "--kind=person_kfold", "--target=abnormal", "--fold=1", "--folds=3"),
        ("left_out", "cinc_1k", "--kind=leave_database_out", "--target=abnormal", "--database=cinc2016-b"),
    ):
        out, prepared = case.folder / f"{name}.json", case.corpora / corpus
        case.run("pcgjax.splits", f"--prepared={prepared}", f"--out={out}", *more)
        case.run("pcgjax.splits", f"--prepared={prepared}", f"--check={out}")


def cnn(case: Case) -> None:
    """Batches of several sizes; judged on all layouts, asked about single files; its page written again."""
    workdir = case.train("cnn", CNN | {"features.window_s": 0.5}, "cinc_1k")
    case.evaluate(workdir, "cinc2016")
    case.evaluate(workdir, "circor")
    case.evaluate(workdir, "circor", "--target=murmur", name="circor_murmur")
    case.evaluate(workdir, "pascal", "--target=murmur")
    damaged = case.folder / "damaged.wav"
    damaged.write_bytes(b"RIFF")
    case.predict(workdir, "answers.csv", *case.sounds(), damaged, *case.sounds("circor", 2))
    case.run("pcgjax.report", str(workdir))


def cnn_stream(case: Case) -> None:
    case.train("cnn", CNN | {"data.pipeline": "stream"}, "cinc_1k")


def cnn_accumulate(case: Case) -> None:
    case.train("cnn", CNN | {"train.accumulate": 4, "train.remat": "full"}, "cinc_1k")


def cnn_noise(case: Case) -> None:
    """Noise, the causal filter, bfloat16, another split, selected by loss, SGD, one recording a step."""
    fields = {"features.noise_snr_db": 10.0, "features.filter": "causal", "model.bfloat16": True, "seed": 5,
              "split.kind": "leave_database_out", "split.database": "cinc2016-b", "train.select": "loss",
              "optimizer.name": "sgd", "optimizer.momentum": 0.9, "train.batch_recordings": 1}  # fmt: skip
    case.train("cnn", CNN | fields, "cinc_1k")


def cnn_resume(case: Case) -> None:
    """One epoch, then the second in the same workdir: equal to both at once. Then refused with other fields."""
    straight = collected(case.train("cnn", CNN, "cinc_1k", "straight"), case.work)
    case.train("cnn", CNN | {"train.epochs": 1}, "cinc_1k")
    resumed = collected(case.train("cnn", CNN, "cinc_1k"), case.work)
    same = ("metrics.jsonl", "predictions.csv", "split.json", "checkpoints/last/6")
    if found := [name for name in same if straight[name] != resumed[name]]:
        raise RuntimeError(f"a resumed run differs from one that was not stopped: {', '.join(found)}")
    case.train("cnn", CNN | {"model.hidden": 9}, "cinc_1k", status=1)


def cnn_shuffled(case: Case) -> None:
    case.train("cnn", CNN | {"data.shuffle_labels": True}, "cinc_1k")


def cnn_balance(case: Case) -> None:
    """Groups of a database and class drawn equally often, from two folders; what the model knows of the database."""
    fields = {"train.balance": "database_class", "split.fractions": (0.5, 0.2, 0.3)}
    workdir = case.train("cnn", CNN | fields, "cinc_1k,circor_1k")
    case.run("pcgjax.sites", f"--workdir={workdir}")
    case.train("cnn", CNN | {"train.balance": "class", "train.epochs": 1}, "cinc_1k", "by_class")


def cnn_fsdp_1(case: Case) -> None:
    case.train("cnn", CNN, "cinc_1k", XLA_FLAGS=EIGHT)


def cnn_fsdp_2(case: Case) -> None:
    """Also streamed, and noise that is drawn by recording."""
    case.train("cnn", CNN | {"parallel.fsdp": 2}, "cinc_1k", XLA_FLAGS=EIGHT)
    fields = {"parallel.fsdp": 2, "data.pipeline": "stream", "features.noise_snr_db": 5.0, "train.epochs": 1}
    case.train("cnn", CNN | fields, "cinc_1k", "streamed", XLA_FLAGS=EIGHT)


def cnn_pmap(case: Case) -> None:
    """Stopped after an epoch and gone on with; then streamed."""
    case.train("cnn", CNN | {"parallel.strategy": "pmap", "train.epochs": 1}, "cinc_1k", XLA_FLAGS=EIGHT)
    case.train("cnn", CNN | {"parallel.strategy": "pmap"}, "cinc_1k", XLA_FLAGS=EIGHT)
    fields = {"parallel.strategy": "pmap", "data.pipeline": "stream", "train.epochs": 1}
    case.train("cnn", CNN | fields, "cinc_1k", "streamed", XLA_FLAGS=EIGHT)


def cnn_processes(case: Case) -> None:
    """Two processes of one device each."""
    launcher = ("bash", "launch/local_cluster.sh", "2", sys.executable, "-m")
    case.train("cnn", CNN, "cinc_1k", launcher=launcher)


def cnn_dry_run(case: Case) -> None:
    more = ("--dry_run", "--devices=8")
    case.train("cnn", CNN | {"parallel.fsdp": 2}, "cinc_1k", more=more)


def cnn_sweep(case: Case) -> None:
    case.train("cnn:sweep", CNN | {"train.epochs": 1}, "cinc_1k")


def cnn_population(case: Case) -> None:
    """Two seeds and two learning rates, of which one diverges; stopped after an epoch and gone on with."""
    fields = CNN | {"sweep.seed": "0,1", "sweep.optimizer.learning_rate": "0.003,1e30"}
    case.train("cnn", fields | {"train.epochs": 1}, "cinc_1k")
    case.train("cnn", fields, "cinc_1k")
    case.run("pcgjax.report", str(case.folder / "run"))


def cnn_population_8(case: Case) -> None:
    case.train("cnn", CNN | {"sweep.seed": "0,1", "sweep.features.low_hz": "25,30"}, "cinc_1k", XLA_FLAGS=EIGHT)


def hinf_lstm(case: Case) -> None:
    """Two stages, the penalty-weighted loss, the adaptive threshold; judged elsewhere."""
    workdir = case.train("hinf_lstm", HINF_LSTM, "cinc_1k")
    case.evaluate(workdir, "pascal", "--target=murmur")
    case.predict(workdir, "answers.csv", *case.sounds())
    case.run("pcgjax.sites", f"--workdir={workdir}")


def hinf_lstm_small(case: Case) -> None:
    """The other forms of cell, loss and threshold."""
    fields = {"model.cell": "forget", "loss.normalize": "rates", "loss.slope": 5.0, "sapt.smooth": "scores",
              "sapt.metric": "balanced_accuracy", "model.bfloat16": True, "train.epochs": 2}  # fmt: skip
    case.train("hinf_lstm:small", HINF_LSTM | fields, "cinc_1k")


def hinf_lstm_pmap(case: Case) -> None:
    case.train("hinf_lstm", HINF_LSTM | {"parallel.strategy": "pmap", "train.epochs": 1}, "cinc_1k", XLA_FLAGS=EIGHT)


def hinf_lstm_population(case: Case) -> None:
    fields = {"sweep.loss.alpha": "0.5,0.87", "sweep.sapt.factor": "0.3,0.6", "train.epochs": 2}
    case.train("hinf_lstm", HINF_LSTM | fields, "cinc_1k")


def segmenter_small(case: Case) -> None:
    """Trained on two data sets, judged elsewhere; states of single files."""
    workdir = case.train("segmenter_small", SEGMENTER_SMALL, "cinc_1k,circor_1k")
    case.evaluate(workdir, "circor")
    case.predict(workdir, "states.csv", *case.sounds("circor"))
    case.predict(workdir, "one.tsv", *case.sounds("pascal", 1))


def segmenter_small_causal(case: Case) -> None:
    """Also a binary target, on eight devices."""
    case.train("segmenter_small:causal", SEGMENTER_SMALL, "circor_1k")
    fields = {"task.frames": "sounds", "data.pipeline": "stream", "data.train_share": 0.5, "parallel.fsdp": 2}
    case.train("segmenter_small", SEGMENTER_SMALL | fields, "circor_1k", "sounds", XLA_FLAGS=EIGHT)


def ssamba(case: Case) -> None:
    """Pre-trained, then fine-tuned as a segmenter from what that leaves."""
    pretrained = case.train("ssamba_pretrain", SSAMBA | {"model.mask_patches": 8}, "cinc_16k", "pretrained")
    fields = SSAMBA | {"model.checkpoint": pretrained / "ssamba.pth", "train.epochs": 1}
    workdir = case.train("segmenter", fields, "circor_16k")
    case.predict(workdir, "one.tsv", *case.sounds("circor", 1))


def resnet50(case: Case) -> None:
    case.evaluate(case.train("resnet50", RESNET, "cinc_1k"), "cinc2016")


def mobilenet_v3(case: Case) -> None:
    case.train("mobilenet_v3", MOBILENET, "cinc_1k")


def vit(case: Case) -> None:
    case.train("vit", VIT, "cinc_1k")


def wav2vec2(case: Case) -> None:
    """Trained, judged, asked about single files, probed."""
    workdir = case.train("wav2vec2", RAW_AUDIO, "cinc_16k")
    case.evaluate(workdir, "cinc2016")
    case.predict(workdir, "answers.csv", *case.sounds())
    case.run("pcgjax.sites", f"--workdir={workdir}")


def hubert(case: Case) -> None:
    case.train("hubert", RAW_AUDIO | {"train.balance": "class", "data.shuffle_labels": True}, "cinc_16k")


def distilhubert(case: Case) -> None:
    case.train("distilhubert", RAW_AUDIO, "cinc_16k")
    case.train("distilhubert", RAW_AUDIO, "cinc_16k")  # of a finished run only the judging
    case.train("distilhubert", RAW_AUDIO, "cinc_16k", "dry", more=("--dry_run",))


def classical(case: Case) -> None:
    workdir = case.train("classical", CLASSICAL, "pascal_1k")
    case.evaluate(workdir, "cinc2016", "--target=abnormal")
    case.predict(workdir, "answers.csv", *case.sounds("pascal"))
    case.run("pcgjax.classical", f"--prepared={case.corpora / 'circor_1k'}")
    fields = CLASSICAL | {"experiment.runs": 0, "features.decibels": True}
    case.run("pcgjax.sites", f"--workdir={case.train('classical', fields, 'cinc_1k', 'cinc')}")


def audio_llm(case: Case) -> None:
    """A tiny random one, trained, scored, merged; on sounds of data sets it was not trained on."""
    model = case.folder / "tiny"
    case.run("pcgjax.audio_llm.make_tiny", f"--out={model}")
    llm = (f"--model={model}",)
    workdir = case.train("audio_llm", AUDIO_LLM, "circor_16k", module="pcgjax.audio_llm.train", more=llm)
    zero_shot = f"--zero_shot=cinc2016:{case.corpora / 'cinc'},pascal:{case.corpora / 'pascal'}"
    out = f"--out={case.folder / 'scores'}"
    case.run("pcgjax.audio_llm.score", f"--workdir={workdir}", *llm, out, zero_shot)
    adapter = max(workdir.glob("checkpoints/best-*/adapter"))
    case.run("pcgjax.audio_llm.merge", *llm, f"--adapter={adapter}", f"--out={case.folder / 'merged'}")


def audio_llm_processes(case: Case) -> None:
    """Two processes, heartbeats cut out by annotations, no shared prefix, options padded as published."""
    model = case.folder / "tiny"
    case.run("pcgjax.audio_llm.make_tiny", f"--out={model}", "--seed=1", "--legacy")
    fields = {"front_end.kind": "crop", "front_end.segments": case.corpora / "circor" / "training_data",
              "model.share_prefix": False, "questions.padding": "repeat", "train.accumulate": 2,
              "train.epochs": 1, "questions.sites": "all", "parallel.fsdp": 2}  # fmt: skip
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    case.train("audio_llm", AUDIO_LLM | fields, "circor_16k", module="pcgjax.audio_llm.train",
               more=(f"--model={model}",), launcher=launcher)  # fmt: skip


def questions(case: Case) -> None:
    for layout in ("llama_factory", "ms_swift"):
        case.run(
            "pcgjax.audio_llm.questions", "--dataset=circor", f"--source={case.corpora / 'circor'}",
            f"--out={case.folder / layout}.jsonl", f"--layout={layout}",
        )  # fmt: skip


def ablation(case: Case) -> None:
    fields = ABLATION | {"ablation.settings": ("synthetic", "person")}
    case.train("hinf_lstm:ablation", fields, "cinc_1k", module="pcgjax.ablation")


def reproduce_classical(case: Case) -> None:
    source = case.folder / "source"
    source.mkdir()
    (source / "pascal").symlink_to(case.corpora / "pascal")
    arguments = ("--paper=classical", f"--source={source}", f"--out={case.folder / 'out'}", "--budget=small")
    case.run("pcgjax.reproduce", *arguments)


def comparison(case: Case) -> None:
    """Runs of several kinds side by side in one page."""
    one = case.train("cnn", CNN | {"train.epochs": 1}, "cinc_1k", "one")
    two = case.train("classical", CLASSICAL | {"experiment.runs": 0}, "cinc_1k", "two")
    case.run("pcgjax.report", f"--out={case.folder / 'comparison.html'}", str(one), str(two))


def refusals(case: Case) -> None:
    """What bad input is told."""
    case.train("cnn", CNN, "", status=1)
    case.train("cnn", CNN | {"train.nothing": 1}, "cinc_1k", status=1)
    case.train("cnn", CNN | {"parallel.fsdp": 3}, "cinc_1k", status=1)
    case.train("cnn", CNN | {"train.select": "nothing"}, "cinc_1k", status=1)
    case.train("segmenter_small", SEGMENTER_SMALL | {"data.shuffle_labels": True}, "cinc_1k", status=1)
    case.train("wav2vec2", RAW_AUDIO, "cinc_1k", status=1)
    missing = str(case.folder / "missing")
    case.run("pcgjax.predict", f"--workdir={missing}", f"--out={missing}.csv", "a.wav", status=1)
    case.run("pcgjax.sites", f"--workdir={missing}", status=1)
    case.run("pcgjax.prepare", "--dataset=circor", f"--source={missing}", f"--out={missing}", status=1)


CASES: dict[str, Callable[[Case], None]] = {
    case.__name__: case
    for case in (  # the longest first
        audio_llm, cnn_sweep, cnn_pmap, segmenter_small_causal, segmenter_small, hinf_lstm, ssamba, cnn, ablation,
        cnn_fsdp_2, audio_llm_processes, hinf_lstm_population, hinf_lstm_pmap, cnn_population, cnn_population_8,
        resnet50, mobilenet_v3, vit, wav2vec2, hubert, distilhubert, classical, reproduce_classical, comparison,
        cnn_fsdp_1, cnn_processes, cnn_resume, cnn_balance, cnn_stream, cnn_accumulate, cnn_noise, cnn_shuffled,
        cnn_dry_run, hinf_lstm_small, prepare_damaged, splits, questions, refusals,
    )
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- what is collected

TIMED = re.compile(r"\b\d[\d.,]* ?(s|ms|min|h|%)\b|goodput|it/s|MiB|\[Gloo\]")


def plain(text: str, work: pathlib.Path) -> str:
    """Without the paths of this run."""
    return text.replace(str(work), "WORK").replace(sys.executable, "PYTHON").replace(str(ROOT), "ROOT")


def cleaned(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        kept = {k: cleaned(v) for k, v in value.items() if k not in VOLATILE}
        if isinstance(system := kept.get("system"), dict):
            kept["system"] = {k: system[k] for k in SYSTEM if k in system}
        return kept
    return [cleaned(one) for one in value] if isinstance(value, list) else value


def arrays(named: dict[str, Any]) -> dict[str, Any]:
    """Number, norm and digest of arrays."""
    import numpy as np

    digest, squares = hashlib.sha256(), 0.0
    for name in sorted(named):
        array = np.asarray(named[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        if array.dtype.kind in "biuf" or array.dtype.name == "bfloat16":
            squares += float((np.nan_to_num(array.astype(np.float64)) ** 2).sum())
    return {"arrays": len(named), "norm": squares**0.5, "sha256": digest.hexdigest()}


def orbax_arrays(folder: pathlib.Path) -> dict[str, Any]:
    """All arrays of a checkpoint, on however many devices it was written."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=how))
    return {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(state)}


def written(page: str) -> dict[str, Any]:
    """What a reader of an HTML page sees: its words, times left out, and a digest of its drawings."""
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    page = re.sub(r"<(script|style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    lines = [" ".join(html.unescape(line).split()) for line in re.sub(r"<[^>]*>", "\n", page).splitlines()]
    words = [line for line in lines if line and not TIMED.search(line)]
    return {"words": words, "drawings": len(drawings), "sha256": sha256("".join(drawings).encode())}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read(path: pathlib.Path, work: pathlib.Path) -> Any:
    """What a file holds, as JSON can hold it."""
    import numpy as np

    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            # Of strings, the config in them holds paths.
            named = {name: file[name] for name in file.files}
        texts = {name: plain(str(x), work) for name, x in named.items() if x.dtype.kind in "US"}
        return {"text": texts, **arrays({name: x for name, x in named.items() if name not in texts})}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return arrays({name: x.float().numpy() for name, x in load_file(path).items()})
    if path.suffix == ".pth":
        import torch

        loaded = torch.load(path, map_location="cpu", weights_only=True)
        return arrays({name: x.float().numpy() for name, x in loaded.items()})
    if path.suffix not in (".json", ".jsonl", ".csv", ".tsv", ".html", ".txt", ".hea", ".md"):
        return {"sha256": sha256(path.read_bytes())}
    text = plain(path.read_text(), work)
    if path.suffix == ".json":
        return cleaned(json.loads(text))
    if path.suffix == ".jsonl":
        return {"lines": [cleaned(json.loads(line)) for line in text.splitlines()]}
    if path.suffix == ".html":
        return written(text)
    return {"sha256": sha256(text.encode()), "lines": text.splitlines()}


def collected(folder: pathlib.Path, work: pathlib.Path) -> dict[str, Any]:
    """Every file below `folder` by its path there."""
    values, sounds = {}, {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part in UNREAD for part in name.parts):
            continue
        step = next((p for p in path.parents if (p / "_CHECKPOINT_METADATA").exists()), None)
        if step is not None:  # of Orbax
            label = str(step.relative_to(folder))
            if label not in values:
                values[label] = arrays(orbax_arrays(step / "state"))
        elif path.suffix in (".wav", ".flac", ".mat", ".hea"):
            sounds[str(name)] = sha256(path.read_bytes())
        else:
            values[str(name)] = read(path, work)
    if sounds:
        values["sounds"] = {"files": len(sounds), "sha256": sha256(json.dumps(sounds).encode())}
    return values


# ------------------------------------------------------------------------------------------------------------ the two


def run_case(name: str, run: Callable[[Case], None], work: pathlib.Path) -> dict[str, Any]:
    """{"commands", "files", "pages", "took_s"}, or {"failed": why}."""
    began = time.monotonic()
    case = Case(name, work)
    try:
        run(case)
        files = collected(case.corpora if run is corpora else case.folder, work)
    except Exception:
        return {"failed": traceback.format_exc(), "took_s": time.monotonic() - began}
    pages = {path: files.pop(path) for path in list(files) if path.endswith(".html")}
    return {"commands": case.commands, "files": files, "pages": pages, "took_s": time.monotonic() - began}


def record(out: pathlib.Path, only: list[str], jobs: int, work: pathlib.Path) -> int:
    """Runs the cases and writes `out`; the exit status."""
    began, results = time.monotonic(), {}
    where = subprocess.run(
        [sys.executable, "-c", "import pcgjax; print(pcgjax.__file__)"], cwd=ROOT, env=environment_of(work),
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if pathlib.Path(where).parent != ROOT / "pcgjax":
        raise SystemExit(f"error: {where} is not below {ROOT}: start this in the root of a checkout")
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the reading of checkpoints
    chosen = {name: CASES[name] for name in CASES if not only or name in only}

    def report(name: str, result: dict[str, Any]) -> None:
        results[name] = result
        said = result["failed"] if "failed" in result else f"{len(result['files'])} files"
        print(f"[{len(results)}/{len(chosen) + 1}] {name}: {result['took_s']:.0f} s, {said}", flush=True)

    report("corpora", run_case("corpora", corpora, work))
    if "failed" not in results["corpora"]:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(run_case, name, run, work): name for name, run in chosen.items()}
            for future in concurrent.futures.as_completed(futures):
                report(futures[future], future.result())
    failed = [name for name, result in results.items() if "failed" in result]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({name: results[name] for name in sorted(results)}, indent=1) + "\n")
    print(f"wrote {out} in {time.monotonic() - began:.0f} s; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def differences(one: Any, two: Any, place: str = "") -> Iterator[str]:
    """The places where two JSON values differ, with both values."""
    if type(one) is not type(two):
        yield f"{place}: {shown(one)} | {shown(two)}"
    elif isinstance(one, dict):
        for name in sorted(one.keys() | two.keys()):
            if name not in one or name not in two:
                yield f"{place}/{name}: only in the {'first' if name in one else 'second'}"
            else:
                yield from differences(one[name], two[name], f"{place}/{name}")
    elif isinstance(one, list):
        if len(one) != len(two):
            yield f"{place}: {len(one)} values | {len(two)} values"
        for i, pair in enumerate(zip(one, two, strict=False)):
            yield from differences(*pair, f"{place}[{i}]")
    elif one != two and not (one != one and two != two):  # NaN is NaN
        yield f"{place}: {shown(one)} | {shown(two)}"


def by_file(found: list[str]) -> list[str]:
    """The first difference of each file, so that an expected one hides no other."""
    first: dict[str, str] = {}
    for difference in found:
        place = difference.partition(": ")[0]
        file = re.match(r".*?\.(jsonl?|csv|tsv|npz|pth|safetensors|html|array_record)\b", place)
        first.setdefault(file[0] if file else place, difference)
    return list(first.values())


def shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 300 else text[:297] + "..."


def compare(first: pathlib.Path, second: pathlib.Path) -> int:
    """Prints for each case equal or the first difference of each file; the exit status."""
    one, two = (cleaned(json.loads(path.read_text())) for path in (first, second))
    unequal = 0
    for name in sorted(one.keys() | two.keys()):
        if name not in one or name not in two:
            print(f"{name}: only in {first if name in one else second}")
            unequal += 1
            continue
        for what in ("", "pages"):
            pick = lambda case, what=what: {
                k: v for k, v in case.items() if k != "took_s" and (k == "pages") == (what == "pages")
            }
            found = list(differences(pick(one[name]), pick(two[name])))
            title = f"{name}, its pages" if what else name
            if "failed" in one[name] or "failed" in two[name]:
                found = found or ["failed in both"]
            print(f"{title}: equal" if not found else f"{title}: {len(found)} differences; the first of each file:")
            for difference in by_file(found):
                print(f"    {difference}")
            unequal += bool(found)
    print("all equal" if not unequal else f"{unequal} differ")
    return int(bool(unequal))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, help="the JSON file to write")
    parser.add_argument("--only", default="", help="names of cases, with commas between")
    parser.add_argument("--jobs", type=int, default=2, help="cases at once")
    parser.add_argument("--keep", type=pathlib.Path, help="the folder to work in, which is kept; it must be missing")
    parser.add_argument("--compare", type=pathlib.Path, nargs=2, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.compare:
        return compare(*arguments.compare)
    if not arguments.out:
        parser.error("--out=FILE.json or --compare A B")
    only = [name for name in arguments.only.split(",") if name]
    if unknown := set(only) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if arguments.keep:
        arguments.keep.mkdir(parents=True)
        return record(arguments.out, only, arguments.jobs, arguments.keep.resolve())
    with tempfile.TemporaryDirectory(prefix="pcgjax-golden-") as folder:
        return record(arguments.out, only, arguments.jobs, pathlib.Path(folder).resolve())


if __name__ == "__main__":
    sys.exit(main())
