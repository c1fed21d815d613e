"""Wav2Vec2, HuBERT and DistilHuBERT on raw 16 kHz audio: baselines of the H-infinity LSTM paper.

`pcgjax.train`, `evaluate` and `predict` come here for a config whose task is audio_encoder, such as
configs/wav2vec2.py. A recording's clips go through the encoder, a linear layer on the mean over its frames gives each
clip's probability, and a recording's is the mean over its clips. The loss is over clips. One process, on a GPU where
there is one. Axes: C clips, T samples, P encoder frames, D features.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import torch
import tqdm
from absl import logging
from torch import nn

from pcgjax.audio_llm import batches
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm.checkpoints import best, learning_rate
from pcgjax.audio_llm.encoders.clips import FREE, answers, batch_of, clips_of, load_weights, save
from pcgjax.audio_llm.encoders.start import (
    Data,
    Progress,
    Run,
    build,
    check_config,
    facts_of,
    load,
    log,
    machine_of,
    start,
)
from pcgjax.runs import lock, schema
from pcgjax.runs.best import better_epoch
from pcgjax.runs.config import plain_config
from pcgjax.runs.judge import validation_scores
from pcgjax.runs.log import digest
from pcgjax.runs.seal import refuse_other_run
from pcgjax.runs.signals import collected, leave
from pcgjax.runs.streams import STEP
from pcgjax.runtime import files, goodput
from pcgjax.training.conclude import Finished, conclude

Portion = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]  # samples (C, T), mask (C, T) or None, labels (C,)


def train_encoder(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, dry_run: bool = False) -> dict:
    """Trains, judges and reports one run, as `training.loop.train` does; returns what it writes to metrics.json.

    dry_run: build the model, print sizes, and stop.
    Raises:
      ValueError (also ModelError, SplitError, LeakError, CheckpointError): what does not fit, by name.
      FloatingPointError: a loss or gradient that is not finite, naming the step and its recordings.
    """
    schema.check(config)
    check_config(config)
    with lock.held(workdir):
        return _train_encoder(config, pathlib.Path(workdir), dry_run)


def _train_encoder(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool) -> dict:
    clock = goodput.Clock()
    workdir.mkdir(parents=True, exist_ok=True)
    refuse_other_run(workdir, plain_config(config), FREE)
    data = load(config, workdir)
    model, extractor, optimizer = build(config)
    facts = facts_of(data, model)
    logging.info("%s", json.dumps(facts))
    if dry_run:
        files.write_text(workdir / "dry_run.json", json.dumps(facts, indent=1))
        print(*(f"{name} {value:,}" for name, value in facts.items()), f"wrote {workdir}/dry_run.json", sep="\n")
        return facts
    run, progress = start(config, workdir, data, model, extractor, optimizer)
    bar = tqdm.tqdm(total=run.last_step, initial=progress.step, desc="train", unit="step", mininterval=1.0)
    stop = 0
    with collected() as received, contextlib.closing(bar):
        model.train()
        steps = batches.prefetched(functools.partial(portions_of, run, progress.step), run.last_step - progress.step)
        while progress.step < run.last_step and not stop:
            with clock("wait"):
                portions = next(steps)
            with clock("train"):
                progress.totals += train_step(run, progress.step, portions)
            progress.step += 1
            bar.update()
            stop = received[0] if received else 0
            epoch_ended = progress.step % data.steps_an_epoch == 0
            if epoch_ended:
                log_train(run, progress, clock)
                scores = validate(run, progress, clock)
                bar.set_postfix({f"val_{config.train.select}": f"{scores[config.train.select]:.3f}"})
            # Totals of a part of an epoch travel with the checkpoint: the epoch's line is the same after a resume.
            if epoch_ended or stop or progress.step % config.train.checkpoint_steps == 0:
                with clock("save"):
                    save(workdir, "last", progress.step, model, optimizer, meta_of(run, progress))
    seconds = clock.spent()
    logging.info("%s", goodput.sentence(seconds))
    if stop:
        close_board(run)
        leave(stop, progress.step)
    return judge_best(run, facts, seconds, clock.began)


# -------------------------------------------------------------------------------------------------------- a step


def portions_of(run: Run, first: int, number: int) -> list[Portion]:
    """The clips of step `first + number`, in portions of train.portion_clips."""
    data, size = run.data, run.config.train.portion_clips
    clips = clips_of(data.corpus, recordings_of(data, first + number), data.geometry)
    portions = []
    for i in range(0, len(clips), size):
        piece = clips[i : i + size]
        labels = torch.from_numpy(data.labels[[clip.recording for clip in piece]])
        portions.append((*batch_of(data.corpus, piece, run.extractor, data.geometry.window), labels))
    return portions


def recordings_of(data: Data, step: int) -> np.ndarray:
    """(n,) indices into the corpus, in the order that the JAX systems train in."""
    epoch, nth = divmod(step, data.steps_an_epoch)
    ids = data.order_of(epoch)[nth]
    return ids[ids >= 0]


def train_step(run: Run, step: int, portions: Sequence[Portion]) -> np.ndarray:
    """One update of the weights; returns (3,) float64: summed loss, right answers, clips.

    Raises:
      FloatingPointError: a loss or gradient that is not finite, naming the step and its recordings.
    """
    model, optimizer, o = run.model, run.optimizer, run.config.optimizer
    words = batches.key_words(run.config.seed, STEP, step)
    torch.manual_seed(int(np.random.default_rng(words).integers(2**62)))  # of dropout
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, run.last_step, o.learning_rate, o.warmup_steps)
    clips = sum(len(y) for *_, y in portions)
    sums = torch.zeros(2, dtype=torch.float64)
    for samples, mask, y in portions:
        y = y.to(run.device)
        with llm.precision(run.config.model.dtype, run.device):
            logits = model(samples.to(run.device), None if mask is None else mask.to(run.device))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        (loss / clips).backward()
        right = ((logits > 0) == (y > 0)).sum()
        sums += torch.stack([loss.detach().double(), right.double()]).cpu()
    norm = float(nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], o.clip_norm))
    if not (math.isfinite(float(sums[0])) and math.isfinite(norm)):
        names = ", ".join(run.data.corpus.rows[i]["id"] for i in recordings_of(run.data, step))
        raise FloatingPointError(
            f"the loss ({float(sums[0]) / clips:g}) or its gradient ({norm:g}) was not finite at step {step}, "
            f"recordings {names}; lower optimizer.learning_rate={o.learning_rate} or look at those recordings"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return np.array([*sums.tolist(), clips])


# ------------------------------------------------------------------------------------------- log, validate, save


def log_train(run: Run, progress: Progress, clock: goodput.Clock) -> None:
    """The line of an epoch that has ended."""
    loss, right, clips = progress.totals
    seconds, epoch = clock.spent(), progress.step // run.data.steps_an_epoch
    values = {"loss": loss / clips, "accuracy": right / clips, "epoch": epoch}
    log(run, progress.step, "train", values | {"seconds": seconds["train"], "waited": seconds["wait"]})
    progress.totals = np.zeros(3)


def validate(run: Run, progress: Progress, clock: goodput.Clock) -> dict[str, float]:
    """The validation part's scores, of `runs.judge.validation_scores`; keeps the model if it is the best so far."""
    config, data = run.config, run.data
    threshold, epoch = config.evaluation.threshold, progress.step // data.steps_an_epoch
    with clock("validate"):
        ids = data.parts["validation"]
        log_p = answers(run.model, run.extractor, data.corpus, ids, config, run.device)
        scores = validation_scores(True, log_p, data.labels[ids], threshold)
        log(run, progress.step, "validation", scores | {"epoch": epoch})
    best = better_epoch(progress.best, scores, config.train.select, progress.step, epoch, threshold)
    if best is not None:
        progress.best = best
        with clock("save"):
            save(run.workdir, "best", progress.step, run.model, None, meta_of(run, progress))
    return scores


def meta_of(run: Run, progress: Progress) -> dict[str, Any]:
    """A checkpoint's meta.json: what `load_encoder` makes the model from, and what a resumed run is compared with."""
    return {
        "config": plain_config(run.config),
        "order_sha256": run.data.digest,
        "sample_rate_hz": run.data.corpus.sample_rate_hz,
        "best": progress.best,
        "totals": progress.totals.tolist(),
        "log": digest(run.workdir / "metrics.jsonl"),
        "encoder": json.loads(run.model.encoder.config.to_json_string(use_diff=False)),
        "extractor": json.loads(run.extractor.to_json_string()),
    }


# ----------------------------------------------------------------------------------------------------- the end


def judge_best(run: Run, facts: dict[str, int], seconds: dict[str, float], began: float) -> dict:
    """Judges the best model on validation and test, writes what a run leaves; returns what metrics.json says.

    facts: of `facts_of`; seconds: of the goodput clock; began: of `time.monotonic`, when the training was started.
    """
    data = run.data
    folder, meta = best(run.workdir, "encoder", FREE, plain_config(run.config), order_sha256=data.digest)
    load_weights(run.model, folder)
    log_p = {
        part: answers(run.model, run.extractor, data.corpus, data.parts[part], run.config, run.device)
        for part in ("validation", "test")
    }
    system = machine_of(run.device) | {
        "wall_s": time.monotonic() - began, "seconds": seconds, "goodput": goodput.share(seconds),
    }  # fmt: skip
    finished = Finished(
        config=run.config, workdir=run.workdir, corpus=data.corpus, parts=data.parts, split=data.split,
        labels=data.labels, classifies=True, step=run.last_step, meta=meta, answers=log_p, facts=facts, system=system,
        log=functools.partial(log, run),
    )  # fmt: skip
    results = conclude(finished)
    close_board(run)
    return results


def close_board(run: Run) -> None:
    if run.board is not None:
        run.board.close()
