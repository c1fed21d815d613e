"""The one loop: train an epoch (one compiled program where the corpus fits the device), validate, save."""

from __future__ import annotations

import functools
import json
import pathlib
import signal
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm
from absl import logging
from flax import nnx

from pcgjax import thresholds
from pcgjax.data.plan import padding_waste
from pcgjax.runs.config import plain_config, refuse_changes
from pcgjax.runs.judge import validation_scores
from pcgjax.runs.log import history, log_line, open_board
from pcgjax.runs.record import record
from pcgjax.runs.streams import EVALUATION, STEP
from pcgjax.runtime import checkpoint, costs, distributed, files, goodput, sharding
from pcgjax.tasks.base import initial_state
from pcgjax.training import optimizer, segmenter
from pcgjax.training.answers import make_predict
from pcgjax.training.conclude import conclude
from pcgjax.training.experiment import set_up
from pcgjax.training.look_ahead import look_ahead
from pcgjax.training.start import carried_over, with_encoder
from pcgjax.training.step import compile_run, zero_totals


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, dry_run: bool = False) -> dict:
    """Trains, evaluates and reports one run; returns what it writes to metrics.json.

    Raises:
      ValueError (also PrepareError, SplitError, LeakError, CheckpointError): a config field, a prepared folder, a
        split or a checkpoint that does not fit, naming it.
      FloatingPointError: a loss that is not finite, naming the step and its recordings.
    """
    clock, began = goodput.Clock(), time.monotonic()
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    t, seed = config.train, config.seed
    first_process = jax.process_index() == 0  # the one that writes what all of them know
    experiment = set_up(config, workdir)
    corpus, parts, _, task, labels, mesh, groups = experiment[:7]
    steps_an_epoch = experiment.steps_an_epoch
    last_step = t.epochs * steps_an_epoch
    trace = goodput.Trace(config.profile, workdir / "profile")

    # --------------------------------------------------------------------------------------------------- state
    key = jax.random.key(seed)
    update = optimizer.make(config.optimizer, last_step)
    graphdef = nnx.graphdef(task.init(nnx.Rngs(seed)))
    sapt = thresholds.init(config.evaluation.threshold, **config.get("sapt", {"interval": 0}))
    init = functools.partial(initial_state, task, update, seed, sapt)
    abstract = jax.eval_shape(init)
    shardings = sharding.state_sharding(mesh, abstract)

    # ---------------------------------------------------------------------------------------- compiled programs
    pmap, streamed = config.parallel.strategy == "pmap", experiment.pipeline == "stream"
    run = compile_run(
        task, update, graphdef, jax.random.fold_in(key, STEP), experiment.capacities, mesh, shardings, groups,
        streamed, pmap, t.remat,
    )  # fmt: skip
    example = experiment.plan(seed, 0)
    facts = {
        "parameters": sum(x.size for x in jax.tree.leaves(abstract.params)),
        "pipeline": experiment.pipeline,
        "corpus_mib": corpus.bytes / 2**20,
        "train_recordings": len(parts["train"]),
        "steps_an_epoch": steps_an_epoch,
        "capacities": list(experiment.capacities),
        "padding_waste": padding_waste(example, corpus.lengths, task.geometry),
    }
    logging.info("%s", json.dumps(facts))
    if dry_run:
        facts |= look_ahead(experiment, run, abstract, shardings, seed, pmap)
        files.write_text(workdir / "dry_run.json", json.dumps(facts, indent=1))
        print(costs.table(facts), f"\nwrote {workdir}/dry_run.json")
        return facts

    state = jax.jit(init, out_shardings=shardings)()
    if t.get("start_from"):
        state = jax.device_put(carried_over(state, t.start_from, tuple(config.optimizer.frozen)), shardings)
    if config.model.get("checkpoint"):
        state = jax.device_put(with_encoder(state, graphdef, config.model.checkpoint), shardings)
    resident = experiment.resident()
    # pmap has a copy of the state for each of this process' devices, all the rest one array laid out over the mesh.
    copies = len(sharding.mine(mesh))
    spread = (lambda x: jax.tree.map(lambda a: np.stack([np.asarray(a)] * copies), x)) if pmap else (lambda x: x)
    first = lambda a: a[0] if isinstance(a, np.ndarray) else np.asarray(a.addressable_data(0)).reshape(a.shape[1:])
    one_copy = lambda x: sharding.put(mesh, jax.tree.map(first, x))
    gathered = one_copy if pmap else (lambda x: x)
    predicts = {
        part: make_predict(
            task, graphdef, corpus, parts[part], config.evaluation.batch_recordings,
            jax.random.fold_in(key, EVALUATION), mesh, resident,
        )
        for part in ("validation", "test")
    }  # fmt: skip
    update_threshold = jax.jit(thresholds.sapt_update)
    if task.classifies and sapt.interval and len(set(labels[parts["validation"]])) < 2:
        logging.warning("validation has one class only: the threshold stays at %s", config.evaluation.threshold)

    # ------------------------------------------------------------------------------------------ start or resume
    log = workdir / "metrics.jsonl"
    plain = plain_config(config)
    meta: dict[str, Any] = {
        "config": plain,
        "order_sha256": experiment.digest,
        "sample_rate_hz": corpus.sample_rate_hz,
        "best": None,
    }
    if config.task.name == "segmenter":
        meta["log_duration"] = segmenter.log_durations(corpus, parts["train"], config.features.step_s).tolist()
    nothing = lambda: sharding.put(mesh, zero_totals())
    totals = nothing()
    found = checkpoint.restore(workdir / "checkpoints" / "last")
    if found:
        saved = found[2]
        refuse_changes(saved["config"], plain, workdir)
        if saved["order_sha256"] != experiment.digest:
            raise checkpoint.CheckpointError(
                f"{workdir}: its checkpoint was trained in another order of data (data or split "
                "changed); give another --workdir, or what it was trained with"
            )
        at, held, saved = checkpoint.require(workdir / "checkpoints" / "last", {"state": state, "totals": totals})
        state, totals = held["state"], held["totals"]
        meta["best"] = saved["best"]
        logging.info("resuming at step %d", at)
        kept = [line for line in history(log) if line["step"] <= at and line["split"] != "test"]
        if first_process:
            files.write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
    elif log.exists() and first_process:
        log.unlink()
    at = int(state.step)
    board = open_board(workdir, at) if first_process else None
    tell = functools.partial(log_line, log, board=board) if first_process else (lambda *_: None)
    record(workdir, config, at)
    if first_process:
        files.write_text(workdir / "config.json", json.dumps(plain, indent=1))
    last, best = (checkpoint.manager(workdir / "checkpoints" / name) for name in ("last", "best"))

    stopped: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}

    # ------------------------------------------------------------------------------------------------ the loop
    state, totals = spread(state), spread(totals)
    stop = 0
    bar = tqdm.tqdm(total=last_step, initial=at, desc="train", unit="step", mininterval=1.0, disable=not first_process)
    try:
        while at < last_step and not stop:
            epoch, within = divmod(at, steps_an_epoch)
            plan = experiment.plan(seed, epoch)
            trace.before(at)
            to_save = t.checkpoint_steps - at % t.checkpoint_steps
            until = trace.until(at, min((epoch + 1) * steps_an_epoch, at + to_save)) - epoch * steps_an_epoch
            pieces = experiment.pieces(resident, plan, within, until, pmap)
            ahead: list[jax.Array] = []
            while True:
                with clock("wait"):
                    piece = next(pieces, None)
                if piece is None:
                    break
                with clock("train"):
                    state, totals = run(state, totals, *piece)
                    # Or all blocks of an epoch would wait in memory for the device.
                    ahead.append(totals.loss + 0)
                    if len(ahead) > 1:
                        ahead.pop(0).block_until_ready()
            with clock("train"):
                counted = jax.device_get(gathered(totals))  # waits for the device
            bar.update(until - within)
            at += until - within
            trace.after(at)
            stop = distributed.stop_signal(stopped[0] if stopped else 0)
            if counted.bad_step >= 0:
                bad = divmod(int(counted.bad_step), steps_an_epoch)
                ids = experiment.order_of(seed, bad[0])[bad[1]].reshape(-1)
                names = ", ".join(corpus.rows[i]["id"] for i in ids if i >= 0)
                raise FloatingPointError(
                    f"the loss was not finite at step {int(counted.bad_step)}, recordings {names}; "
                    f"lower optimizer.learning_rate={config.optimizer.learning_rate} or look at those recordings"
                )
            if until == steps_an_epoch:
                n = max(int(counted.samples), 1)
                values = {"loss": float(counted.loss) / n, "accuracy": float(counted.correct) / n}
                told = clock.told()
                tell(at, "train", values | {"epoch": epoch + 1, "seconds": told["train"], "waited": told["wait"]})
                with clock("validate"):
                    totals = spread(nothing())
                    held = gathered(state)
                    answers = predicts["validation"](held.params, held.rest)
                    y = labels[parts["validation"]]
                    threshold = float(held.sapt.threshold)
                    scores = validation_scores(task, answers, y, threshold)
                    if task.classifies:
                        sapt = update_threshold(held.sapt, np.exp(answers[:, 0]).clip(0, 1), y)
                        state = state._replace(sapt=spread(sharding.put(mesh, sapt)))
                tell(at, "validation", scores | {"epoch": epoch + 1})
                bar.set_postfix(loss=f"{values['loss']:.3f}", **{f"val_{t.select}": f"{scores[t.select]:.3f}"})
                better = -scores[t.select] if t.select in ("loss", "brier") else scores[t.select]
                better = better if np.isfinite(better) else -np.inf
                if meta["best"] is None or better > meta["best"]["score"]:
                    meta["best"] = {
                        "score": better, "step": at, "epoch": epoch + 1, "metric": t.select, "threshold": threshold,
                    }  # fmt: skip
                    with clock("save"):
                        last.wait_until_finished()  # of two at once the processes' barriers get mixed up
                        checkpoint.save(best, at, {"params": held.params, "rest": held.rest}, meta)
                        best.wait_until_finished()
            # Totals of a part of an epoch travel with the checkpoint: the epoch's line is the same after a resume.
            if at % t.checkpoint_steps == 0 or until == steps_an_epoch or stop:
                with clock("save"):
                    checkpoint.save(last, at, {"state": gathered(state), "totals": gathered(totals)}, meta)
        trace.stop()
    finally:
        bar.close()
        with clock("save"):
            last.wait_until_finished()
        for number, handler in previous.items():
            signal.signal(number, handler)
    last.close()
    best.close()
    seconds = clock.told()
    logging.info("%s", goodput.sentence(seconds))
    if stop:
        if board:
            board.close()
        logging.warning("stopped by signal %d at step %d, saved; the same command goes on", stop, at)
        sys.exit(128 + stop)

    # ---------------------------------------------------------------------------------------- the best, judged
    held = gathered(state)
    _, kept, saved = checkpoint.require(workdir / "checkpoints" / "best", {"params": held.params, "rest": held.rest})
    judged = {part: predict(kept["params"], kept["rest"]) for part, predict in predicts.items()}
    params, rest = jax.device_get(jax.jit(lambda *x: x, out_shardings=sharding.replicated(mesh))(*kept.values()))
    if not first_process:
        return {}
    system = {
        "device": str(jax.devices()[0].device_kind),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "wall_s": time.monotonic() - began,
        "seconds": seconds,
        "goodput": goodput.share(seconds),
    }
    results = conclude(config, workdir, experiment, graphdef, params, rest, saved, judged, facts, system, tell)
    if board:
        board.close()
    return results
