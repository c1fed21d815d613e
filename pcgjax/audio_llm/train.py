"""Trains LoRA adapters of Qwen2-Audio on questions about prepared recordings.

    torchrun --nproc_per_node=N -m pcgjax.audio_llm.train --config=configs/audio_llm.py --model=DIR --workdir=runs/llm \
        --config.data.prepared=DIR [--config.a.b=v]

One process a GPU; without torchrun one process, on a CPU where there is no GPU. WORKDIR receives config.json,
split.json, metrics.jsonl, train.log, tensorboard/ and checkpoints/{last,best}-STEP on the way, and at the end
metrics.json, predictions.csv and report.html. A second start resumes where the first one was stopped.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np
import torch
import torch.distributed as dist
import tqdm
from absl import app, flags, logging
from ml_collections import config_flags

from pcgjax.audio_llm import batches, questions
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm.checkpoints import best_adapter, full, learning_rate, newest, put, save
from pcgjax.audio_llm.judge import judge_run
from pcgjax.audio_llm.tables import summary
from pcgjax.data.corpus import order_digest
from pcgjax.runs.config import plain_config, refuse_changes
from pcgjax.runs.data import load_data
from pcgjax.runs.log import history, log_line, log_to, open_board
from pcgjax.runs.record import record
from pcgjax.runs.streams import STEP
from pcgjax.runtime import checkpoint, files

_PAD_MULTIPLE = 64  # tokens, where layers are compiled or run on a GPU
# Where and how fast it is computed: a run may go on with other values.
FREE = (("parallel", "fsdp"), ("train", "accumulate"), ("train", "log_steps"), ("model", "checkpointing"),
        ("model", "compile"), ("model", "share_prefix"), ("front_end", "segments"))  # fmt: skip
_PATIENCE = datetime.timedelta(minutes=10)  # with a process that no longer answers


def train(config: ml_collections.ConfigDict, model_folder: str, workdir: str | pathlib.Path) -> dict:
    """Trains, judges the best adapter on people not heard, writes the workdir; returns what metrics.json says.

    Raises:
      ValueError (also ModelError, SplitError, CheckpointError): what does not fit, by name.
      FloatingPointError: a loss or gradient that is not finite, naming the step and its recordings.
    """
    began, workdir = time.monotonic(), pathlib.Path(workdir)
    t, (rank, world) = config.train, batches.process()
    for part, field in (("train", "epochs"), ("train", "batch_recordings"), ("train", "accumulate"),
                        ("train", "checkpoint_steps"), ("train", "log_steps"), ("questions", "a_clip"),
                        ("evaluation", "batch_recordings"), ("evaluation", "resamples")):  # fmt: skip
        if config[part][field] < 1:
            raise ValueError(f"{part}.{field}={config[part][field]}: must be at least 1")
    for field, only in (("name", "adamw"), ("schedule", "cosine")):
        if config.optimizer[field] != only:
            raise ValueError(f"optimizer.{field}={config.optimizer[field]!r}: only {only} is offered here")
    if config.model.share_prefix and config.model.attention not in ("sdpa", "eager"):
        raise ValueError(f"model.attention={config.model.attention}: needs model.share_prefix=False")
    llm.check(model_folder, config.model.dtype)
    if t.batch_recordings % (portions := world * t.accumulate):
        raise ValueError(
            f"train.batch_recordings={t.batch_recordings}: must be a multiple of {world} processes times "
            f"train.accumulate={t.accumulate}"
        )
    if not 0.04 < config.data.clip_s <= llm.CLIP_S:
        raise ValueError(f"data.clip_s={config.data.clip_s}: above 0.04 and at most {llm.CLIP_S:g} s")
    if config.data.shuffle_labels:
        raise ValueError("data.shuffle_labels: pcgjax.audio_llm.score has a control of its own, shuffled audio")
    if not 1 <= config.parallel.fsdp <= world or world % config.parallel.fsdp:
        raise ValueError(f"parallel.fsdp={config.parallel.fsdp}: must divide the {world} processes")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if config.model.compile and device.type == "cpu":
        # Seen with torch 2.13: 6 % off in the encoder's first layer, where aot_eager's graphs agree to 1e-6.
        raise ValueError("model.compile=True: PyTorch's compiler gives wrong gradients on CPUs; use it on a GPU")

    # ------------------------------------------------------------------------------------------------------ data
    workdir.mkdir(parents=True, exist_ok=True)
    with first_process():  # it makes the split, the others read it
        corpus, parts, split = load_data(config, workdir)
    source = batches.make_source(corpus, config.front_end)
    lengths = batches.lengths_heard(source)
    q = config.questions
    asked_of = lambda i: len(questions.questions([corpus.rows[i]], [0], batches.tasks_of(q.tasks), q.sites, q.padding))
    held = np.array([asked_of(i) for i in range(len(corpus.rows))])
    counts = np.minimum(held, q.a_clip)
    train_ids = np.array([i for i in parts["train"] if counts[i]], np.int32)
    for part, ids in parts.items():
        if not counts[ids].any():
            raise ValueError(
                f"data.prepared={config.data.prepared}: nothing to ask of the {part} part, {len(ids)} recordings; "
                "choose another config.questions.tasks, split.fractions or seed"
            )
    order = order_digest(corpus, train=train_ids.tolist(), lengths=lengths.tolist(), front_end=source.digest())
    steps_an_epoch = -(-len(train_ids) // t.batch_recordings)
    last_step = steps_an_epoch * t.epochs

    # ----------------------------------------------------------------------------------------------------- model
    base, processor = llm.load(model_folder, config.model.dtype, config.model.attention)
    torch.manual_seed(config.seed)  # LoRA's first matrices: the same on every process
    model = llm.add_lora(base, config.lora)
    if config.model.checkpointing:
        llm.checkpoint_activations(model)
    if config.parallel.fsdp > 1:
        answerer = llm.Answerer(model, config.model.compile)
        shard(answerer, config.parallel.fsdp, world)  # moves to the device what each process keeps
    else:
        answerer = llm.Answerer(model.to(device), config.model.compile)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    o = config.optimizer
    optimizer = torch.optim.AdamW(weights.values(), lr=o.learning_rate, weight_decay=o.weight_decay)
    wrapped: Any = answerer
    if world > 1 and config.parallel.fsdp == 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(answerer)
    tokenize = batches.Tokenizer(processor)
    multiple = _PAD_MULTIPLE if config.model.compile or device.type == "cuda" else 1
    precision = (
        torch.autocast(device.type, torch.bfloat16) if config.model.dtype == "bfloat16" else contextlib.nullcontext()
    )

    # -------------------------------------------------------------------------------------------------- the start
    plain = plain_config(config)
    state: dict[str, Any] = {"best": None, "sums": [0.0, 0.0, 0.0], "validated": 0}
    at = 0
    if last := newest(workdir, "last"):
        saved = json.loads((last / "meta.json").read_text())
        refuse_changes(saved["config"], plain, workdir, FREE)
        if saved["base"] != model.base_fingerprint:
            raise checkpoint.CheckpointError(f"{workdir}: trained on other base weights than {model_folder} has")
        if saved["order"] != order:
            raise checkpoint.CheckpointError(
                f"{workdir}: the recordings, the split or the segments changed since; give another --workdir"
            )
        state, at = put(weights, last, optimizer)["state"], saved["step"]
        logging.info("resuming at step %d", at)
    elif rank == 0:
        files.write_text(workdir / "config.json", json.dumps(plain, indent=1) + "\n")
    log = workdir / "metrics.jsonl"
    if rank == 0:
        for unfinished in workdir.glob("checkpoints/.*.tmp"):  # of a process that was killed
            shutil.rmtree(unfinished)
        until = {"train": at, "validation": state["validated"], "test": -1}
        kept = [line for line in history(log) if line["step"] <= until[line["split"]]]
        files.write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
        logging.info("%s", json.dumps({
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in weights.values()),
            "train_recordings": len(train_ids), "steps_an_epoch": steps_an_epoch, "processes": world,
        }))  # fmt: skip
    board = None
    if rank == 0:
        board = open_board(workdir, at)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        record(workdir, config, at, {"device": name, "devices": world, "processes": world})

    def told(step: int, part: str, values: dict) -> None:
        if rank == 0:
            log_line(log, step, part, values, board)

    def keep(kind: str, step: int) -> None:
        meta = {"state": state, "config": plain, "base": model.base_fingerprint, "order": order}
        save(workdir, kind, step, model, weights, optimizer if kind == "last" else None, meta)

    def made(step: int) -> tuple[list, np.ndarray]:
        """This process' portions of a step, and all the step's recordings."""
        epoch, nth = divmod(step, steps_an_epoch)
        divided = batches.order_of_epoch(train_ids, lengths, config.seed, epoch, t.batch_recordings, portions)[nth]
        tensors = []
        for ids in divided[rank * t.accumulate : (rank + 1) * t.accumulate]:
            real = ids[ids >= 0]
            # A process without recordings goes through the motions, its loss counts nothing.
            clips = batches.training_clips(config, source, lengths, real if len(real) else train_ids[:1], step)
            batch = batches.batch_of(clips, source, tokenize, config.model.share_prefix, multiple)
            tensors.append((batch.pinned() if device.type == "cuda" else batch, bool(len(real))))
        return tensors, divided[divided >= 0]

    def validate(step: int, epoch: int) -> None:
        clips = batches.evaluation_clips(config, source, lengths, parts["validation"], config.data.clip_s)
        with precision:
            answers = batches.ask_all(answerer, source, clips, tokenize, config, device, describe="validate")
        right = np.mean([np.argmax(a.log_p) == a.question.answer for a in answers])
        loss = np.mean([-a.log_p[a.question.answer] for a in answers])
        told(step, "validation", {"loss": float(loss), "accuracy": float(right), "epoch": epoch})
        state["validated"] = step
        if state["best"] is None or (right, -loss) > (state["best"]["accuracy"], -state["best"]["loss"]):
            state["best"] = {"accuracy": float(right), "loss": float(loss), "step": step}
            keep("best", step)

    def agreed(flag: bool) -> bool:
        """Whether any process says so."""
        if world == 1:
            return flag
        said = torch.tensor([float(flag)], device=device)
        dist.all_reduce(said)
        return bool(said.item())

    # --------------------------------------------------------------------------------------------------- the loop
    stopped: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    bar = tqdm.tqdm(total=last_step, initial=at, desc="train", unit="step", disable=rank > 0, mininterval=1.0)
    sums = np.array(state["sums"])  # loss, right answers, questions, since the last line
    halted = False
    try:
        answerer.train()
        if at and at % steps_an_epoch == 0 and state["validated"] != at:  # it was stopped right after the epoch
            validate(at, at // steps_an_epoch)
        for tensors, ids in batches.prefetched(lambda n, first=at: made(first + n), last_step - at):
            asked = int(counts[ids].sum())
            words = batches.key_words(config.seed, STEP, at)
            torch.manual_seed(int(np.random.default_rng([*words, rank]).integers(2**62)))  # of dropout
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(at, last_step, o.learning_rate, o.warmup_steps)
            mine = torch.zeros(4, dtype=torch.float64)
            for n, (batch, asked_here) in enumerate(tensors):
                quiet = contextlib.nullcontext()
                if wrapped is not answerer and n + 1 < len(tensors):
                    quiet = wrapped.no_sync()
                with quiet:
                    batch = batch.to(device)
                    with precision:
                        logits = wrapped(batch)
                    loss = torch.nn.functional.cross_entropy(logits, batch.letters_Q, reduction="sum") * asked_here
                    # Processes average their gradients: the mean over all the step's questions.
                    (loss * (world / asked)).backward()
                right = (logits.argmax(-1) == batch.letters_Q).sum() * asked_here
                mine[:2] += torch.stack([loss.detach().double(), right.double()]).cpu()
            mine[2:] = torch.tensor([sum(len(b.letters_Q) * c for b, c in tensors), len(stopped)])
            if world > 1:
                mine = mine.to(device)
                dist.all_reduce(mine)
                mine = mine.cpu()
            norm = full(torch.nn.utils.clip_grad_norm_(list(weights.values()), o.clip_norm))
            if not (torch.isfinite(mine[0]) and torch.isfinite(norm)):
                names = ", ".join(corpus.rows[i]["id"] for i in ids)
                raise FloatingPointError(
                    f"step {at}: loss {float(mine[0]) / asked:g}, gradient norm {float(norm):g}; its recordings: "
                    f"{names}; try a smaller --config.optimizer.learning_rate, or model.dtype=float32"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            at += 1
            sums += mine[:3].numpy()
            bar.update()
            epoch, ended = -(-at // steps_an_epoch), at % steps_an_epoch == 0
            halted = bool(mine[3] > 0)
            if ended or at % t.log_steps == 0:
                shown = {"loss": sums[0] / sums[2], "accuracy": sums[1] / sums[2]}
                told(at, "train", shown | {"epoch": epoch, "gradient_norm": float(norm),
                                           "learning_rate": optimizer.param_groups[0]["lr"],
                                           "seconds": time.monotonic() - began})  # fmt: skip
                sums[:] = 0
                best = {"best_val_accuracy": f"{state['best']['accuracy']:.3f}"} if state["best"] else {}
                bar.set_postfix(loss=f"{shown['loss']:.3f}", **best)
            state["sums"] = sums.tolist()
            # Before the validation, which takes longer than a scheduler waits after its signal.
            if ended or halted or at % t.checkpoint_steps == 0:
                keep("last", at)
            if halted:
                break
            if ended:
                validate(at, epoch)
        if not halted and state["validated"] == at:
            keep("last", at)
        halted = agreed(halted or bool(stopped))
    finally:
        bar.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if halted:
        if board is not None:
            board.close()
        logging.warning("stopped by a signal at step %d, saved; the same command goes on", at)
        sys.exit(128 + (stopped[0] if stopped else signal.SIGTERM))

    # ------------------------------------------------------------------------------------------ the best, judged
    put(weights, best_adapter(workdir).parent)
    with precision:
        results = judge_run(answerer, processor, source, lengths, parts, config, device, workdir, split)
    scored = next(iter(results["runs"].values()))["test"]
    told(at, "test", {"accuracy": scored["mean"]["accuracy"]["value"]} if scored["mean"]["accuracy"] else {})
    if board is not None:
        board.close()
    if rank == 0:
        logging.info("done in %.0f s", time.monotonic() - began)
    return results


@contextlib.contextmanager
def first_process():
    """The first process runs the body alone, then the others."""
    rank, world = batches.process()
    if world > 1 and rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if world > 1 and rank == 0:
            dist.barrier()


def shard(answerer: llm.Answerer, size: int, world: int) -> None:
    """Divides the parameters, layer by layer, between `size` processes; each such group has a copy."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    shape, names = ((size,), ("fsdp",)) if size == world else ((world // size, size), ("data", "fsdp"))
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    inner = llm.base_of(answerer.model).model
    for layer in (*inner.audio_tower.layers, *inner.language_model.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(answerer, mesh=mesh)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}")
    logging.set_verbosity(logging.INFO)
    if "WORLD_SIZE" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    jax.config.update("jax_platforms", "cpu")  # it draws random numbers here; the GPU's memory is PyTorch's
    rank, _ = batches.process()
    if rank == 0:
        log_to(pathlib.Path(FLAGS.workdir))
    results = train(FLAGS.config, FLAGS.model, FLAGS.workdir)
    if rank == 0:
        print(summary(results))
        print(f"wrote {FLAGS.workdir}: metrics.json, predictions.csv, report.html, checkpoints/")
    # Not after an error: the others may wait for this process, which must end for torchrun to stop them.
    if dist.is_initialized():
        dist.destroy_process_group()


FLAGS = flags.FLAGS
if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/audio_llm.py; --config.a.b=v overrides its fields.")
    flags.DEFINE_string("model", None, "A local folder with a Qwen2-Audio checkpoint.", required=True)
    flags.DEFINE_string("workdir", None, "The run's folder; a run that was stopped there is resumed.", required=True)
    flags.mark_flag_as_required("config")
    files.run(main)
