"""Wav2Vec2, HuBERT and DistilHuBERT on raw 16 kHz audio: baselines of the H-infinity LSTM paper.

`pcgjax.train`, `evaluate` and `predict` come here for a config whose task is audio_encoder, such as
configs/wav2vec2.py. A recording's clips go through the encoder, a linear layer on the mean over its frames gives each
clip's probability, and a recording's is the mean over its clips. The loss is over clips. One process, on a GPU where
there is one. Axes: C clips, T samples, P encoder frames, D features.
"""

from __future__ import annotations

import functools
import json
import math
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
import tqdm
from absl import logging
from torch import nn

from pcgjax import metrics
from pcgjax.audio_llm import batches
from pcgjax.audio_llm.checkpoints import learning_rate, newest
from pcgjax.audio_llm.encoders.clips import (
    answers,
    batch_of,
    clips_of,
    geometry_of,
    load_weights,
    precision,
    save,
    torch_device,
)
from pcgjax.audio_llm.encoders.model import ARCHITECTURES, check, make_encoder
from pcgjax.audio_llm.model import RATE_HZ
from pcgjax.data.corpus import order_digest
from pcgjax.data.plan import epoch_order
from pcgjax.runs.config import plain_config, refuse_changes
from pcgjax.runs.data import load_data
from pcgjax.runs.judge import validation_scores
from pcgjax.runs.log import history, log_line, open_board
from pcgjax.runs.record import record
from pcgjax.runs.streams import ORDER, STEP
from pcgjax.runtime import checkpoint, files, goodput
from pcgjax.training.experiment import balance_groups

# How fast it is computed: a run may go on with another value.
FREE = (("train", "portion_clips"),)


def _refuse(config: ml_collections.ConfigDict) -> None:
    for part, field in (("train", "epochs"), ("train", "batch_recordings"), ("train", "checkpoint_steps"),
                        ("train", "portion_clips"), ("evaluation", "resamples")):  # fmt: skip
        if config[part][field] < 1:
            raise ValueError(f"{part}.{field}={config[part][field]}: must be at least 1")
    if not 0 <= config.evaluation.threshold <= 1:
        raise ValueError(f"evaluation.threshold={config.evaluation.threshold}: must lie between 0 and 1")
    for part, field, only in (("optimizer", "name", "adamw"), ("optimizer", "schedule", "cosine"),
                              ("parallel", "strategy", "torch"), ("parallel", "fsdp", 1)):  # fmt: skip
        if config[part][field] != only:
            raise ValueError(f"{part}.{field}={config[part][field]!r}: only {only!r} is offered here")
    if config.model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype={config.model.dtype!r}: choose float32 or bfloat16")
    selectable = ("loss", *metrics.METRICS)
    if config.train.select not in selectable:
        raise ValueError(f"train.select={config.train.select!r}: choose one of {', '.join(selectable)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or jax.process_count() > 1:
        raise ValueError(f"task.name={config.task.name}: trains in one process; start it without torchrun or hosts")


def train_encoder(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, dry_run: bool = False) -> dict:
    """Trains, judges and reports one run, as `pcgjax.train.train` does; returns what it writes to metrics.json.

    dry_run: build the model, print sizes, and stop.
    Raises:
      ValueError (also ModelError, SplitError, LeakError, CheckpointError): what does not fit, by name.
      FloatingPointError: a loss or gradient that is not finite, naming the step and its recordings.
    """
    from pcgjax.training.conclude import Finished, conclude

    clock, began, workdir = goodput.Clock(), time.monotonic(), pathlib.Path(workdir)
    t, o, device = config.train, config.optimizer, torch_device()
    _refuse(config)
    if config.model.folder and config.model.architecture in ARCHITECTURES:
        check(config.model.folder, config.model.architecture)  # before the data are read
    workdir.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------------- data and model
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
        """(steps, R): the order that the JAX systems train in."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), ORDER), epoch)
        return epoch_order(parts["train"], balance, key, t.batch_recordings)[:, 0]

    steps_an_epoch = len(order_of(0))
    last_step = t.epochs * steps_an_epoch
    digest = order_digest(
        corpus, train=split["train"], seed=config.seed, batch=t.batch_recordings, balance=t.balance,
        target=config.task.target, shuffled=config.data.shuffle_labels,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    model, extractor = make_encoder(config.model)
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=o.learning_rate, weight_decay=o.weight_decay)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trained),
        "train_recordings": len(parts["train"]),
        "train_clips": int(geometry.windows(corpus.lengths[parts["train"]]).sum()),
        "steps_an_epoch": steps_an_epoch,
    }
    logging.info("%s", json.dumps(facts))
    if dry_run:
        files.write_text(workdir / "dry_run.json", json.dumps(facts, indent=1))
        print(*(f"{name} {value:,}" for name, value in facts.items()), f"wrote {workdir}/dry_run.json", sep="\n")
        return facts

    # ------------------------------------------------------------------------------------------ start or resume
    plain, log = plain_config(config), workdir / "metrics.jsonl"
    meta: dict[str, Any] = {
        "config": plain, "order_sha256": digest, "sample_rate_hz": corpus.sample_rate_hz, "best": None,
        "totals": [0.0, 0.0, 0.0], "encoder": json.loads(model.encoder.config.to_json_string(use_diff=False)),
        "extractor": json.loads(extractor.to_json_string()),
    }  # fmt: skip
    at = 0
    if last := newest(workdir, "last"):
        saved = load_weights(model, last, optimizer)
        refuse_changes(saved["config"], plain, workdir, FREE)
        if saved["order_sha256"] != digest:
            raise checkpoint.CheckpointError(
                f"{workdir}: its checkpoint was trained in another order of data (data or split changed); give "
                "another --workdir, or what it was trained with"
            )
        at, meta["best"], meta["totals"] = saved["step"], saved["best"], saved["totals"]
        logging.info("resuming at step %d", at)
    for unfinished in workdir.glob("checkpoints/.*.tmp"):  # of a process that was killed
        shutil.rmtree(unfinished)
    kept = [line for line in history(log) if line["step"] <= at and line["split"] != "test"] if at else []
    files.write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
    board = open_board(workdir, at)
    tell = functools.partial(log_line, log, board=board)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    machine = {"device": name, "devices": 1, "processes": 1}
    record(workdir, config, at, machine)
    files.write_text(workdir / "config.json", json.dumps(plain, indent=1))

    def made(step: int) -> list[tuple]:
        """(samples, mask, labels) of a step's clips, in portions."""
        epoch, nth = divmod(step, steps_an_epoch)
        ids = order_of(epoch)[nth]
        clips = clips_of(corpus, ids[ids >= 0], geometry)
        pieces = [clips[i : i + t.portion_clips] for i in range(0, len(clips), t.portion_clips)]
        truth = [torch.from_numpy(labels[[clip.recording for clip in piece]]) for piece in pieces]
        return [(*batch_of(corpus, p, extractor, geometry.window), y) for p, y in zip(pieces, truth, strict=True)]

    def validate(step: int, epoch: int) -> None:
        of_validation = answers(model, extractor, corpus, parts["validation"], config, device)
        threshold = config.evaluation.threshold
        scores = validation_scores(True, of_validation, labels[parts["validation"]], threshold)
        tell(step, "validation", scores | {"epoch": epoch})
        bar.set_postfix({f"val_{t.select}": f"{scores[t.select]:.3f}"})
        better = -scores[t.select] if t.select in ("loss", "brier") else scores[t.select]
        better = better if np.isfinite(better) else -np.inf
        if meta["best"] is None or better > meta["best"]["score"]:
            meta["best"] = {
                "score": better, "step": step, "epoch": epoch, "metric": t.select, "threshold": threshold,
            }  # fmt: skip
            with clock("save"):
                save(workdir, "best", step, model, None, meta)

    # ------------------------------------------------------------------------------------------------- the loop
    stopped: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    bar = tqdm.tqdm(total=last_step, initial=at, desc="train", unit="step", mininterval=1.0)
    totals = np.array(meta["totals"])  # loss, right answers, clips, since the epoch began
    stop = 0
    try:
        model.train()
        steps = batches.prefetched(lambda n, first=at: made(first + n), last_step - at)
        while at < last_step and not stop:
            with clock("wait"):
                portions = next(steps)
            with clock("train"):
                words = batches.key_words(config.seed, STEP, at)
                torch.manual_seed(int(np.random.default_rng(words).integers(2**62)))  # of dropout
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(at, last_step, o.learning_rate, o.warmup_steps)
                clips = sum(len(y) for *_, y in portions)
                counted = torch.zeros(2, dtype=torch.float64)
                for samples, mask, y in portions:
                    y = y.to(device)
                    with precision(config, device):
                        logits = model(samples.to(device), None if mask is None else mask.to(device))
                    loss = nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
                    (loss / clips).backward()
                    right = ((logits > 0) == (y > 0)).sum()
                    counted += torch.stack([loss.detach().double(), right.double()]).cpu()
                norm = float(nn.utils.clip_grad_norm_(trained, o.clip_norm))
                if not (math.isfinite(float(counted[0])) and math.isfinite(norm)):
                    ids = order_of(at // steps_an_epoch)[at % steps_an_epoch]
                    names = ", ".join(corpus.rows[i]["id"] for i in ids if i >= 0)
                    raise FloatingPointError(
                        f"the loss ({float(counted[0]) / clips:g}) or its gradient ({norm:g}) was not finite at step "
                        f"{at}, recordings {names}; lower optimizer.learning_rate={o.learning_rate} or look at those "
                        "recordings"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                totals += [*counted.tolist(), clips]
            at += 1
            bar.update()
            stop = stopped[0] if stopped else 0
            epoch, ended = -(-at // steps_an_epoch), at % steps_an_epoch == 0
            if ended:
                told = clock.spent()
                values = {"loss": totals[0] / totals[2], "accuracy": totals[1] / totals[2], "epoch": epoch}
                tell(at, "train", values | {"seconds": told["train"], "waited": told["wait"]})
                totals[:] = 0
                with clock("validate"):
                    validate(at, epoch)
            # Totals of a part of an epoch travel with the checkpoint: the epoch's line is the same after a resume.
            if ended or stop or at % t.checkpoint_steps == 0:
                meta["totals"] = totals.tolist()
                with clock("save"):
                    save(workdir, "last", at, model, optimizer, meta)
    finally:
        bar.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    seconds = clock.spent()
    logging.info("%s", goodput.sentence(seconds))
    if stop:
        if board:
            board.close()
        logging.warning("stopped by signal %d at step %d, saved; the same command goes on", stop, at)
        sys.exit(128 + stop)

    # ---------------------------------------------------------------------------------------- the best, judged
    best = newest(workdir, "best")
    if best is None:
        raise checkpoint.CheckpointError(f"{workdir}: no checkpoints/best-* there any more; give another --workdir")
    saved = load_weights(model, best)
    found = {part: answers(model, extractor, corpus, parts[part], config, device) for part in ("validation", "test")}
    system = machine | {"wall_s": time.monotonic() - began, "seconds": seconds, "goodput": goodput.share(seconds)}
    finished = Finished(
        config, workdir, corpus, parts, split, labels, True, last_step, saved, found, facts, system, tell
    )  # fmt: skip
    results = conclude(finished)
    if board:
        board.close()
    return results
