"""The loop of an audio LLM's training: a step, its line in the log, its checkpoint; after each epoch a validation."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
import torch
import torch.distributed as dist
import tqdm
from absl import logging

from pcgjax.audio_llm import batches
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm.checkpoints import FREE, best, full, learning_rate, put, save
from pcgjax.audio_llm.conclude import Candidate, judge_run
from pcgjax.audio_llm.start import Progress, Run, log, start
from pcgjax.data.corpus import order_digest
from pcgjax.runs import lock
from pcgjax.runs.best import more_accurate
from pcgjax.runs.config import plain_config
from pcgjax.runs.log import digest
from pcgjax.runs.seal import seal
from pcgjax.runs.signals import collected, leave
from pcgjax.runs.streams import STEP


def train(config: ml_collections.ConfigDict, model_folder: str, workdir: str | pathlib.Path) -> dict:
    """Trains, judges the best adapter on held-out people, writes the workdir; returns what metrics.json says.

    Raises:
      ValueError (also ModelError, SplitError, CheckpointError): what does not fit, by name.
      FloatingPointError: a loss or gradient that is not finite, naming the step and its recordings.
    """
    with lock.held(workdir, batches.process()[0] == 0):
        return _train(config, model_folder, pathlib.Path(workdir))


def _train(config: ml_collections.ConfigDict, model_folder: str, workdir: pathlib.Path) -> dict:
    began = time.monotonic()
    run, progress = start(config, model_folder, workdir)
    bar = tqdm.tqdm(total=run.last_step, initial=progress.step, desc="train", unit="step", disable=run.rank > 0,
                    mininterval=1.0)  # fmt: skip
    with collected() as received, contextlib.closing(bar):
        run.model.answerer.train()
        stopped = False
        if ends_epoch(run, progress.step) and progress.validated != progress.step:  # stopped right after the epoch
            validate(run, progress)
        for portions, recordings in steps_from(run, progress.step):
            result = train_step(run, progress.step, portions, recordings, bool(received))
            progress.step += 1
            progress.sums += result.sums
            stopped = result.stopped
            bar.update()
            epoch_ended = ends_epoch(run, progress.step)
            if epoch_ended or progress.step % config.train.log_steps == 0:
                log_train(run, progress, result.gradient_norm, time.monotonic() - began, bar)
            # Before the validation, which takes longer than a scheduler waits after its signal.
            if epoch_ended or stopped or progress.step % config.train.checkpoint_steps == 0:
                save_checkpoint(run, progress, "last")
            if stopped:
                break
            if epoch_ended:
                validate(run, progress)
        if not stopped and progress.validated == progress.step:
            save_checkpoint(run, progress, "last")
        stopped = any_process(run, stopped or bool(received))
    if stopped:
        close_board(run)
        leave(received[0] if received else signal.SIGTERM, progress.step)
    return judge_best(run, progress, began)


# -------------------------------------------------------------------------------------------------------- a step


class StepResult(NamedTuple):
    """Of a step, over all processes."""

    sums: np.ndarray  # (3,) float64: loss, right answers, questions
    gradient_norm: float
    stopped: bool  # whether a process received a signal


def ends_epoch(run: Run, step: int) -> bool:
    return step > 0 and step % run.steps_an_epoch == 0


def steps_from(run: Run, first: int) -> Iterator[tuple[list[tuple[llm.Batch, bool]], np.ndarray]]:
    """`portions_of` of each step from `first` to the last, made ahead of their use."""
    return batches.prefetched(lambda n: portions_of(run, first + n), run.last_step - first)


def portions_of(run: Run, step: int) -> tuple[list[tuple[llm.Batch, bool]], np.ndarray]:
    """(this process' portions of a step, each with whether it counts; all the step's recordings)."""
    t, data, model = run.config.train, run.data, run.model
    epoch, nth = divmod(step, run.steps_an_epoch)
    order = batches.order_of_epoch(
        data.train, data.lengths, run.config.seed, epoch, t.batch_recordings, run.processes * t.accumulate
    )[nth]
    portions = []
    for ids in order[run.rank * t.accumulate : (run.rank + 1) * t.accumulate]:
        recordings = ids[ids >= 0]
        counts = bool(len(recordings))
        # A process without recordings goes through the motions, its loss counts nothing.
        clips = batches.training_clips(
            run.config, data.source, data.lengths, recordings if counts else data.train[:1], step
        )
        batch = batches.batch_of(clips, data.source, model.tokenize, run.config.model.share_prefix, model.pad_multiple)
        portions.append((batch.pinned() if model.device.type == "cuda" else batch, counts))
    return portions, order[order >= 0]


def train_step(
    run: Run, step: int, portions: Sequence[tuple[llm.Batch, bool]], recordings: np.ndarray, signalled: bool
) -> StepResult:
    """One update of the weights, by all processes together.

    Args: portions, recordings: of `portions_of`; signalled: whether this process received a signal.
    Raises:
      FloatingPointError: a loss or gradient that is not finite, naming the step and its recordings.
    """
    model, o = run.model, run.config.optimizer
    questions = int(run.data.question_counts[recordings].sum())
    words = batches.key_words(run.config.seed, STEP, step)
    torch.manual_seed(int(np.random.default_rng([*words, run.rank]).integers(2**62)))  # of dropout
    for group in model.optimizer.param_groups:
        group["lr"] = learning_rate(step, run.last_step, o.learning_rate, o.warmup_steps)
    sums = backward(run, portions, questions)
    sums[2:] = torch.tensor([sum(len(batch.letters_Q) * counts for batch, counts in portions), signalled])
    if run.processes > 1:
        sums = sums.to(model.device)
        dist.all_reduce(sums)
        sums = sums.cpu()
    norm = full(torch.nn.utils.clip_grad_norm_(list(model.weights.values()), o.clip_norm))
    if not (torch.isfinite(sums[0]) and torch.isfinite(norm)):
        names = ", ".join(run.data.corpus.rows[i]["id"] for i in recordings)
        raise FloatingPointError(
            f"step {step}: loss {float(sums[0]) / questions:g}, gradient norm {float(norm):g}; its recordings: "
            f"{names}; try a smaller --config.optimizer.learning_rate, or model.dtype=float32"
        )
    model.optimizer.step()
    model.optimizer.zero_grad(set_to_none=True)
    return StepResult(sums[:3].numpy(), float(norm), bool(sums[3] > 0))


def backward(run: Run, portions: Sequence[tuple[llm.Batch, bool]], questions: int) -> torch.Tensor:
    """Adds up the gradients of this process' portions, averaged over processes with the last one; returns (4,) float64
    on the CPU: summed loss, right answers, and two zeros.

    questions: how many the step asks in all processes.
    """
    model = run.model
    sums = torch.zeros(4, dtype=torch.float64)
    for n, (batch, counts) in enumerate(portions):
        without_average = contextlib.nullcontext()
        if model.averaged is not model.answerer and n + 1 < len(portions):
            without_average = model.averaged.no_sync()
        with without_average:
            batch = batch.to(model.device)
            with llm.precision(run.config.model.dtype, model.device):
                logits = model.averaged(batch)
            loss = torch.nn.functional.cross_entropy(logits, batch.letters_Q, reduction="sum") * counts
            # Processes average their gradients: the mean over all the step's questions.
            (loss * (run.processes / questions)).backward()
        right = (logits.argmax(-1) == batch.letters_Q).sum() * counts
        sums[:2] += torch.stack([loss.detach().double(), right.double()]).cpu()
    return sums


# ----------------------------------------------------------------------------------------- log, save, validate


def log_train(run: Run, progress: Progress, gradient_norm: float, seconds: float, bar: tqdm.tqdm) -> None:
    """A line on the questions since the last one."""
    loss, right, questions = progress.sums
    scores = {"loss": loss / questions, "accuracy": right / questions}
    log(run, progress.step, "train", scores | {
        "epoch": -(-progress.step // run.steps_an_epoch), "gradient_norm": gradient_norm,
        "learning_rate": run.model.optimizer.param_groups[0]["lr"], "seconds": seconds,
    })  # fmt: skip
    progress.sums = np.zeros(3)
    best = {"best_val_accuracy": f"{progress.best['accuracy']:.3f}"} if progress.best else {}
    bar.set_postfix(loss=f"{scores['loss']:.3f}", **best)


def save_checkpoint(run: Run, progress: Progress, kind: str) -> None:
    """checkpoints/KIND-STEP, kind last (with the optimizer's moments) or best; called by every process."""
    model = run.model
    meta = {
        "state": progress.state(), "config": plain_config(run.config), "base": model.peft.base_fingerprint,
        "order": run.data.digest, "recordings": order_digest(run.data.corpus),
        "log": None if run.rank else digest(run.workdir / "metrics.jsonl"),
    }  # fmt: skip
    optimizer = model.optimizer if kind == "last" else None
    save(run.workdir, kind, progress.step, model.peft, model.weights, optimizer, meta)


def validate(run: Run, progress: Progress) -> None:
    """Asks all questions on the validation part, and keeps the adapter if it is the best so far."""
    data, model, config = run.data, run.model, run.config
    clips = batches.evaluation_clips(config, data.source, data.lengths, data.parts["validation"], config.data.clip_s)
    with llm.precision(config.model.dtype, model.device):
        answers = batches.ask_all(
            model.answerer, data.source, clips, model.tokenize, config, model.device, describe="validate"
        )
    accuracy = float(np.mean([np.argmax(a.log_p) == a.question.answer for a in answers]))
    loss = float(np.mean([-a.log_p[a.question.answer] for a in answers]))
    epoch = progress.step // run.steps_an_epoch
    log(run, progress.step, "validation", {"loss": loss, "accuracy": accuracy, "epoch": epoch})
    progress.validated = progress.step
    if best := more_accurate(progress.best, accuracy, loss, progress.step):
        progress.best = best
        save_checkpoint(run, progress, "best")


# ----------------------------------------------------------------------------------------------------- the end


def any_process(run: Run, flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask."""
    if run.processes == 1:
        return flag
    total = torch.tensor([float(flag)], device=run.model.device)
    dist.all_reduce(total)
    return bool(total.item())


def close_board(run: Run) -> None:
    if run.board is not None:
        run.board.close()


def judge_best(run: Run, progress: Progress, began: float) -> dict:
    """Judges the best adapter on the test part; returns what metrics.json says.

    began: of `time.monotonic`, when the training was started.
    """
    data, model = run.data, run.model
    identity = {"base": model.peft.base_fingerprint, "order": data.digest}
    folder, _ = best(run.workdir, "adapter", FREE, plain_config(run.config), **identity)
    put(model.weights, folder)
    name = run.workdir.resolve().name
    candidate = Candidate(name, model.answerer, model.tokenize.processor, run.config, model.device)
    results = judge_run(candidate, data.source, data.lengths, data.parts, data.split, run.workdir)
    mean = next(iter(results["runs"].values()))["test"]["mean"]
    log(run, progress.step, "test", {"accuracy": mean["accuracy"]["value"]} if mean["accuracy"] else {})
    close_board(run)
    if run.rank == 0:
        seal(run.workdir)
        logging.info("done in %.0f s", time.monotonic() - began)
    return results
