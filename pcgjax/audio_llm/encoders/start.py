"""What comes before the first step of an encoder's training: checks, clips, model, optimizer, resume, log."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import torch
from absl import logging

from pcgjax.audio_llm.checkpoints import forget_later, intact, refuse_foreign_best, understood
from pcgjax.audio_llm.encoders.clips import FREE, geometry_of, load_weights, torch_device
from pcgjax.audio_llm.encoders.model import ARCHITECTURES, Classifier, check, make_encoder
from pcgjax.audio_llm.model import RATE_HZ
from pcgjax.data.corpus import Corpus, order_digest
from pcgjax.data.plan import Geometry, epoch_order
from pcgjax.runs.config import plain_config, refuse_changes, refuse_other_order
from pcgjax.runs.data import load_data
from pcgjax.runs.log import log_line, open_board, rewind
from pcgjax.runs.record import record
from pcgjax.runs.seal import begin_anew, unseal
from pcgjax.runs.streams import ORDER
from pcgjax.runtime import files
from pcgjax.training.experiment import balance_groups


class Data(NamedTuple):
    """The recordings, and the order in which they are trained on."""

    corpus: Corpus
    parts: dict[str, np.ndarray]  # indices into the corpus
    split: dict[str, Any]
    labels: np.ndarray  # (N,) float32, 1 of the positive class
    geometry: Geometry  # of clips, in samples
    order_of: Callable[[int], np.ndarray]  # of an epoch, counted from 0: (steps, R) recordings, -1 where not full
    steps_an_epoch: int
    digest: str  # of the order of all this, which a resumed run must share


class Run(NamedTuple):
    """All that the steps of a training share."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    data: Data
    model: Classifier
    extractor: Any
    optimizer: torch.optim.Optimizer
    device: torch.device
    board: Any  # TensorBoard writer, or None

    @property
    def last_step(self) -> int:
        return self.config.train.epochs * self.data.steps_an_epoch


@dataclasses.dataclass
class Progress:
    """How far a training is: what travels with its checkpoints."""

    step: int
    best: dict[str, Any] | None  # of `runs.best.better_epoch`
    totals: np.ndarray  # (3,) float64: loss, right answers, clips, since the epoch began
    log: str | None = None  # `runs.log.digest` of metrics.jsonl at the checkpoint that the run goes on from


def start(config: ml_collections.ConfigDict, workdir: pathlib.Path, data: Data, model: Classifier, extractor: Any,
          optimizer: torch.optim.Optimizer) -> tuple[Run, Progress]:  # fmt: skip
    """A new run, or one that goes on from its workdir's newest checkpoint.

    Raises:
      CheckpointError: the checkpoint is of another config, model or order of data, or damaged.
    """
    device = torch_device()
    progress = resume(config, workdir, data, model, optimizer)
    unseal(workdir)
    at = progress.step
    if not at:
        begin_anew(workdir)
    forget_later(workdir, at, progress.best["step"] if progress.best else None)
    rewind(workdir / "metrics.jsonl", lambda line: line["step"] <= at and line["split"] != "test", progress.log)
    board = open_board(workdir, at)
    record(workdir, config, at, machine_of(device))
    files.write_text(workdir / "config.json", json.dumps(plain_config(config), indent=1))
    return Run(config, workdir, data, model, extractor, optimizer, device, board), progress


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError (also ModelError) for a config, or the model folder in it, that cannot be trained here."""
    if config.parallel.fsdp != 1:
        raise ValueError(f"parallel.fsdp={config.parallel.fsdp}: only 1 is offered here")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or jax.process_count() > 1:
        raise ValueError(f"task.name={config.task.name}: trains in one process; start it without torchrun or hosts")
    if config.model.folder and config.model.architecture in ARCHITECTURES:
        check(config.model.folder, config.model.architecture)  # before the data are read


def load(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Data:
    """The recordings, their split, and the order that the JAX systems train in.

    Raises:
      ValueError (also SplitError, LeakError): as `load_data` and `geometry_of`, or a clip that is longer than every
        recording.
    """
    t = config.train
    corpus, parts, split = load_data(config, workdir)
    geometry, labels = geometry_of(config, corpus), corpus.labels(config.task.target)
    if geometry.window > corpus.lengths.max():
        raise ValueError(
            f"features.window_s={config.features.window_s}: longer than every recording of {config.data.prepared} "
            f"(at most {corpus.lengths.max() / RATE_HZ:.1f} s)"
        )
    balance = balance_groups(t.balance, corpus, labels, parts["train"])

    @functools.lru_cache(4)
    def order_of(epoch: int) -> np.ndarray:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), ORDER), epoch)
        return epoch_order(parts["train"], balance, key, t.batch_recordings)[:, 0]

    digest = order_digest(
        corpus, train=split["train"], seed=config.seed, batch=t.batch_recordings, balance=t.balance,
        target=config.task.target, shuffled=config.data.shuffle_labels,
    )  # fmt: skip
    return Data(corpus, parts, split, labels, geometry, order_of, len(order_of(0)), digest)


def build(config: ml_collections.ConfigDict) -> tuple[Classifier, Any, torch.optim.Optimizer]:
    """(the classifier on its device, its feature extractor, the optimizer).

    Raises:
      ModelError: as `make_encoder`.
    """
    torch.manual_seed(config.seed)
    model, extractor = make_encoder(config.model)
    model.to(torch_device())
    trained = [p for p in model.parameters() if p.requires_grad]
    o = config.optimizer
    return model, extractor, torch.optim.AdamW(trained, lr=o.learning_rate, weight_decay=o.weight_decay)


def facts_of(data: Data, model: Classifier) -> dict[str, int]:
    """How large the model and its data are, for the log, --dry_run and metrics.json."""
    train = data.parts["train"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_recordings": len(train),
        "train_clips": int(data.geometry.windows(data.corpus.lengths[train]).sum()),
        "steps_an_epoch": data.steps_an_epoch,
    }


def resume(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, data: Data, model: Classifier,
    optimizer: torch.optim.Optimizer,
) -> Progress:  # fmt: skip
    """Sets model and optimizer to the newest checkpoint, and says how far that is."""
    plain = plain_config(config)
    # Also where `last` was removed: then they would be taken for this run's.
    refuse_foreign_best(workdir, plain, FREE, order_sha256=data.digest)
    found = intact(workdir, "last")
    if found is None:
        return Progress(0, None, np.zeros(3))
    folder, meta = found
    with understood(folder):
        refuse_changes(meta["config"], plain, workdir, FREE)
        refuse_other_order(meta["order_sha256"], data.digest, workdir)
        progress = Progress(meta["step"], meta["best"], np.array(meta["totals"]), meta.get("log"))
    load_weights(model, folder, optimizer)
    logging.info("resuming at step %d", meta["step"])
    return progress


def machine_of(device: torch.device) -> dict[str, Any]:
    """What run.json and metrics.json say of where it is computed."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": name, "devices": 1, "processes": 1}


def log(run: Run, step: int, split: str, values: dict[str, Any]) -> None:
    """A line of metrics.jsonl and the board."""
    log_line(run.workdir / "metrics.jsonl", step, split, values, run.board)
