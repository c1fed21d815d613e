"""What comes before the first step of an audio LLM's training: checks, questions, model, optimizer, resume, log."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import torch
import torch.distributed as dist
from absl import logging

from pcgjax.audio_llm import batches, questions
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm.checkpoints import FREE, forget_later, intact, put, refuse_foreign_best, understood
from pcgjax.data.corpus import Corpus, order_digest
from pcgjax.runs import schema
from pcgjax.runs.config import plain_config, refuse_changes, refuse_other_order
from pcgjax.runs.data import load_data
from pcgjax.runs.log import log_line, open_board, rewind
from pcgjax.runs.record import record
from pcgjax.runs.seal import begin_anew, refuse_other_run, unseal
from pcgjax.runtime import files
from pcgjax.runtime.files import CheckpointError

_PAD_MULTIPLE = 64  # tokens, where layers are compiled or run on a GPU


class Data(NamedTuple):
    """The recordings, and what is asked about them."""

    corpus: Corpus
    parts: dict[str, np.ndarray]  # indices into the corpus
    split: dict[str, Any]
    source: batches.Source
    lengths: np.ndarray  # (N,) samples of each recording behind the front end
    question_counts: np.ndarray  # (N,) questions that a step asks about each recording
    train: np.ndarray  # (n,) int32, recordings of the train part about which something can be asked
    digest: str  # of the order of all this, which a resumed run must share


class Model(NamedTuple):
    """The model on this process' device, and what trains it."""

    peft: Any  # the base model within its adapter
    answerer: llm.Answerer
    averaged: Any  # the answerer as training calls it: its backward pass averages gradients over the processes
    weights: dict[str, Any]  # those that are trained, by name
    optimizer: torch.optim.Optimizer
    tokenize: batches.Tokenizer
    device: torch.device
    pad_multiple: int


class Run(NamedTuple):
    """All that the steps of a training share."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    data: Data
    model: Model
    board: Any  # TensorBoard writer; None without one, and on all processes but the first
    rank: int
    processes: int
    steps_an_epoch: int
    last_step: int


@dataclasses.dataclass
class Progress:
    """How far a training is: what travels with its checkpoints."""

    step: int
    best: dict[str, Any] | None  # {"accuracy", "loss", "step"} of the best validation so far
    sums: np.ndarray  # (3,) float64: loss, right answers and questions since the last line of the log
    validated: int  # the step of the last validation
    log: str | None = None  # `runs.log.digest` of metrics.jsonl at the checkpoint that the run goes on from

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "sums": self.sums.tolist(), "validated": self.validated}


def start(config: ml_collections.ConfigDict, model_folder: str, workdir: pathlib.Path) -> tuple[Run, Progress]:
    """A new run, or one that goes on from its workdir's newest checkpoint.

    Raises:
      ValueError (also ModelError, SplitError, CheckpointError): what does not fit, by name.
    """
    rank, processes = batches.process()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    check(config, model_folder, processes, device)
    workdir.mkdir(parents=True, exist_ok=True)
    refuse_other_run(workdir, plain_config(config), FREE)
    data = load(config, workdir)
    steps_an_epoch = -(-len(data.train) // config.train.batch_recordings)
    model = build(config, model_folder, device, processes)
    progress = resume(config, model_folder, workdir, data, model)
    board = None
    if rank == 0:
        clean(workdir, progress)
        facts = {
            "parameters": sum(p.numel() for p in model.peft.parameters()),
            "trained": sum(p.numel() for p in model.weights.values()),
            "train_recordings": len(data.train), "steps_an_epoch": steps_an_epoch, "processes": processes,
        }  # fmt: skip
        logging.info("%s", json.dumps(facts))
        board = open_board(workdir, progress.step)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        record(workdir, config, progress.step, {"device": name, "devices": processes, "processes": processes})
    last_step = steps_an_epoch * config.train.epochs
    return Run(config, workdir, data, model, board, rank, processes, steps_an_epoch, last_step), progress


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, naming the field, for a config of another system or one that cannot be."""
    schema.check(config)
    if config.task.name != "audio_llm":
        raise ValueError(f"task.name={config.task.name!r}: python -m pcgjax.train trains it; give configs/audio_llm.py")
    batches.tasks_of(config.questions.tasks)


def check(config: ml_collections.ConfigDict, model_folder: str, processes: int, device: torch.device) -> None:
    """Raises ValueError (also ModelError) for a config or a model folder that cannot be trained here."""
    check_config(config)
    t = config.train
    if config.model.share_prefix and config.model.attention not in ("sdpa", "eager"):
        raise ValueError(f"model.attention={config.model.attention}: needs model.share_prefix=False")
    llm.check(model_folder, config.model.dtype)
    if t.batch_recordings % (processes * t.accumulate):
        raise ValueError(
            f"train.batch_recordings={t.batch_recordings}: must be a multiple of {processes} processes times "
            f"train.accumulate={t.accumulate}"
        )
    if config.data.shuffle_labels:
        raise ValueError("data.shuffle_labels: pcgjax.audio_llm.score has a control of its own, shuffled audio")
    if not 1 <= config.parallel.fsdp <= processes or processes % config.parallel.fsdp:
        raise ValueError(f"parallel.fsdp={config.parallel.fsdp}: must divide the {processes} processes")
    if config.model.compile and device.type == "cpu":
        # Seen with torch 2.13: 6 % off in the encoder's first layer, where aot_eager's graphs agree to 1e-6.
        raise ValueError("model.compile=True: PyTorch's compiler gives wrong gradients on CPUs; use it on a GPU")


def load(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Data:
    """The recordings, their split (made by the first process, read by the others), and how much is asked of each.

    Raises:
      ValueError (also SplitError): as `load_data` and `batches.make_source`, or a part about which nothing can be
        asked.
    """
    q = config.questions
    with first_process():
        corpus, parts, split = load_data(config, workdir)
    source = batches.make_source(corpus, config.front_end)
    lengths = batches.lengths_heard(source)
    tasks = batches.tasks_of(q.tasks)
    possible = [len(questions.questions([row], [0], tasks, q.sites, q.padding)) for row in corpus.rows]
    question_counts = np.minimum(np.array(possible), q.a_clip)
    for part, ids in parts.items():
        if not question_counts[ids].any():
            raise ValueError(
                f"data.prepared={config.data.prepared}: nothing to ask of the {part} part, {len(ids)} recordings; "
                "choose another config.questions.tasks, split.fractions or seed"
            )
    train = np.array([i for i in parts["train"] if question_counts[i]], np.int32)
    digest = order_digest(corpus, train=train.tolist(), lengths=lengths.tolist(), front_end=source.digest())
    return Data(corpus, parts, split, source, lengths, question_counts, train, digest)


def build(config: ml_collections.ConfigDict, model_folder: str, device: torch.device, processes: int) -> Model:
    """The model with a new adapter on the device, whole or divided between processes, and its optimizer.

    Raises:
      ModelError: as `model.load` and `model.add_lora`.
    """
    base, processor = llm.load(model_folder, config.model.dtype, config.model.attention)
    torch.manual_seed(config.seed)  # LoRA's first matrices: the same on every process
    model = llm.add_lora(base, config.lora)
    if config.model.checkpointing:
        llm.checkpoint_activations(model)
    if config.parallel.fsdp > 1:
        answerer = llm.Answerer(model, config.model.compile)
        shard(answerer, config.parallel.fsdp, processes)  # moves to the device what each process keeps
    else:
        answerer = llm.Answerer(model.to(device), config.model.compile)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    o = config.optimizer
    optimizer = torch.optim.AdamW(weights.values(), lr=o.learning_rate, weight_decay=o.weight_decay)
    averaged: Any = answerer
    if processes > 1 and config.parallel.fsdp == 1:
        averaged = torch.nn.parallel.DistributedDataParallel(answerer)
    pad_multiple = _PAD_MULTIPLE if config.model.compile or device.type == "cuda" else 1
    return Model(model, answerer, averaged, weights, optimizer, batches.Tokenizer(processor), device, pad_multiple)


def resume(
    config: ml_collections.ConfigDict, model_folder: str, workdir: pathlib.Path, data: Data, model: Model
) -> Progress:
    """Sets adapter and optimizer to the newest checkpoint, and says how far that is; a new run writes config.json.

    Raises:
      CheckpointError: the checkpoint is of another config, base model or order of data, or damaged.
    """
    plain = plain_config(config)
    identity = {"base": model.peft.base_fingerprint, "order": data.digest}
    first = batches.process()[0] == 0
    if first:  # also where `last` was removed: then they would be taken for this run's
        refuse_foreign_best(workdir, plain, FREE, **identity)
    found = intact(workdir, "last")
    if found is None:
        if first:
            files.write_text(workdir / "config.json", json.dumps(plain, indent=1) + "\n")
        return Progress(0, None, np.zeros(3), 0)
    folder, meta = found
    with understood(folder):
        refuse_changes(meta["config"], plain, workdir, FREE)
        if meta["base"] != identity["base"]:
            raise CheckpointError(f"{workdir}: trained on other base weights than {model_folder} has")
        refuse_other_order(meta["order"], data.digest, workdir)
        put(model.weights, folder, model.optimizer)
        state = meta["state"]
        logging.info("resuming at step %d", meta["step"])
        return Progress(meta["step"], state["best"], np.array(state["sums"]), state["validated"], meta.get("log"))


def clean(workdir: pathlib.Path, progress: Progress) -> None:
    """Removes what is of later steps: checkpoints, results, and lines of the log."""
    unseal(workdir)
    if not progress.step:
        begin_anew(workdir)
    forget_later(workdir, progress.step, progress.best["step"] if progress.best else None)
    until = {"train": progress.step, "validation": progress.validated, "test": -1}
    rewind(workdir / "metrics.jsonl", lambda line: line["step"] <= until[line["split"]], progress.log)


def log(run: Run, step: int, split: str, values: dict[str, Any]) -> None:
    """A line of metrics.jsonl and the board, by the first process."""
    if run.rank == 0:
        log_line(run.workdir / "metrics.jsonl", step, split, values, run.board)


@contextlib.contextmanager
def first_process():
    """The first process runs the body alone, then the others."""
    rank, processes = batches.process()
    if processes > 1 and rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if processes > 1 and rank == 0:
            dist.barrier()


def shard(answerer: llm.Answerer, size: int, processes: int) -> None:
    """Divides the parameters, layer by layer, between `size` processes; each such group has a copy."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    shape, names = ((size,), ("fsdp",)) if size == processes else ((processes // size, size), ("data", "fsdp"))
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    inner = llm.base_of(answerer.model).model
    for layer in (*inner.audio_tower.layers, *inner.language_model.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(answerer, mesh=mesh)
