"""Trains what a config describes: the one loop.

    python -m pcgjax.train --config=configs/cnn.py --workdir=runs/cnn --config.data.prepared=DIR [--config.a.b=v]

The order is always the same: train an epoch (one compiled program where the corpus fits the device), validate, save.
WORKDIR receives config.json, split.json, metrics.jsonl, train.log and checkpoints/{last,best} on the way, and at the
end metrics.json, predictions.csv, examples.npz and report.html. A second start resumes where the first one was stopped.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import pathlib
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tqdm
from absl import app, flags, logging
from flax import nnx
from ml_collections import config_flags

import pcgjax
from pcgjax import (
    checkpoint,
    evaluate,
    files,
    input_pipeline,
    metrics,
    optimizer,
    report,
    runs,
    segment,
    sharding,
    tasks,
    thresholds,
)
from pcgjax.runs import EVALUATION, ORDER, STEP


class Totals(NamedTuple):
    """Counts of a stretch of training, summed on the device."""

    loss: jax.Array  # sums over recordings, or over clips where the loss is over them
    correct: jax.Array
    samples: jax.Array
    bad_step: jax.Array  # the first step whose loss was not finite; -1: none


def zero_totals() -> Totals:
    return Totals(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32))


def make_step(
    task: tasks.Task,
    update: optax.GradientTransformation,
    graphdef: Any,
    key: jax.Array,
    groups: int,
    axis: str | None = None,
) -> tuple[Callable, Callable]:
    """One training step in two halves, the same for jit and for pmap.

    groups: device groups in all; `axis`: pmap's axis, under which a batch holds this device's group alone.
    Returns: ((state, totals), batch, capacity, i) -> sums over the batch; ((state, totals), sums) -> (state, totals).
    """

    local = "local_groups"

    def sums(carry, batch, capacity, _):
        state, _ = carry
        keys = jax.random.split(jax.random.fold_in(key, state.step), groups)
        if axis:
            keys = keys[jax.lax.axis_index(axis)][None]
        axes = tuple(name for name, there in ((axis, axis), (local, len(keys) > 1)) if there)
        total = (lambda x: jax.lax.psum(x, axes)) if axes else (lambda x: x)

        def loss(params):
            def one(b, k):
                model = nnx.merge(graphdef, params, state.rest)
                objective, counts = task.loss(model, b, capacity, k, state.sapt.threshold, total)
                return objective, counts, tasks.split(model)[2]

            objective, counts, rest = input_pipeline.each_group(one, batch, keys, local)
            # Running averages come from sums over all groups: each has the same.
            first = jax.tree.map(lambda x: x[0], rest)
            return objective.sum(), (jax.tree.map(lambda x: x.sum(0), counts), first)

        (_, (counts, rest)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return grads, counts, rest

    def apply(carry, summed):
        state, totals = carry
        grads, counts, rest = summed
        grads, counts = jax.lax.psum((grads, counts), axis) if axis else (grads, counts)
        grads = jax.tree.map(lambda g: g / jnp.maximum(counts.samples, 1), grads)
        updates, opt_state = update.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        bad = (totals.bad_step < 0) & ~jnp.isfinite(counts.loss)
        totals = Totals(
            totals.loss + counts.loss,
            totals.correct + counts.correct,
            totals.samples + counts.samples,
            jnp.where(bad, state.step, totals.bad_step),
        )
        return tasks.TrainState(state.step + 1, params, rest, opt_state, state.sapt), totals

    return sums, apply


def make_run(
    step: tuple[Callable, Callable],
    geometry: input_pipeline.Geometry,
    capacities: tuple[int, ...],
    constrain: Callable = lambda batch: batch,
) -> Callable:
    """Many steps as one program: (state, totals, data, ids, capacity, start, stop) -> (state, totals)."""
    sums, apply = step

    def constrained(carry, batch, capacity, i):
        return sums(carry, constrain(batch), capacity, i)

    def run(state, totals, data, ids, capacity, start, stop):
        carry = (state, totals)
        return input_pipeline.loop(data, ids, capacity, capacities, geometry, constrained, apply, carry, start, stop)

    return run


def choose_pipeline(name: str, corpus_bytes: int) -> str:
    """resident or stream. auto: resident where the corpus takes at most a third of the device's free memory."""
    if name in ("resident", "stream"):
        return name
    if name != "auto":
        raise ValueError(f"data.pipeline={name!r}: choose resident, stream or auto")
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    else:
        import psutil

        free = psutil.virtual_memory().available // 2  # the host's copy and the device's are in one memory
    return "resident" if corpus_bytes < free / 3 else "stream"


def balance_groups(balance: str, corpus, labels: np.ndarray, indices: np.ndarray) -> np.ndarray | None:
    if balance == "none":
        return None
    classes = [str(int(labels[i])) for i in indices]
    if balance == "class":
        return np.array(classes)
    if balance == "database_class":
        return np.array([f"{corpus.rows[i]['database']} {c}" for i, c in zip(indices, classes, strict=True)])
    raise ValueError(f"train.balance={balance!r}: choose none, class or database_class")


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, dry_run: bool = False) -> dict:
    """Trains, evaluates and reports one run; returns what it writes to metrics.json.

    Raises:
      ValueError (also PrepareError, SplitError, LeakError, CheckpointError): a config field, a prepared folder, a
        split or a checkpoint that does not fit, naming it.
      FloatingPointError: a loss that is not finite, naming the step and its recordings.
    """
    began = time.monotonic()
    workdir = pathlib.Path(workdir)
    t = config.train
    for part, field in (("train", "epochs"), ("train", "batch_recordings"), ("train", "checkpoint_steps"),
                        ("evaluation", "batch_recordings"), ("evaluation", "resamples")):  # fmt: skip
        if config[part][field] < 1:
            raise ValueError(f"{part}.{field}={config[part][field]}: must be at least 1")
    if not 0 <= config.evaluation.threshold <= 1:
        raise ValueError(f"evaluation.threshold={config.evaluation.threshold}: must lie between 0 and 1")
    workdir.mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------------------------------------------- data
    mesh = sharding.make_mesh(config.parallel)
    groups = mesh.size
    key = jax.random.key(config.seed)
    corpus, parts, split = runs.load_data(config, workdir)
    task = tasks.make(config, corpus.sample_rate_hz)
    labels = task.labels(corpus)
    selectable = ("loss", *(metrics.METRICS if task.classifies else ("accuracy",)))
    if t.select not in selectable:
        raise ValueError(f"train.select={t.select!r}: choose one of {', '.join(selectable)}")
    if t.balance != "none" and not task.classifies:
        raise ValueError(f"train.balance={t.balance!r}: only a classifier has classes to balance; choose none")
    if task.geometry.window > corpus.lengths.max():
        raise ValueError(
            f"features.window_s={config.features.window_s}: longer than every recording of {config.data.prepared} "
            f"(at most {corpus.lengths.max() / corpus.sample_rate_hz:.1f} s)"
        )
    balance = balance_groups(t.balance, corpus, labels, parts["train"])

    @functools.cache
    def order_of(epoch: int) -> np.ndarray:
        order_key = jax.random.fold_in(jax.random.fold_in(key, ORDER), epoch)
        return input_pipeline.epoch_order(parts["train"], balance, order_key, t.batch_recordings, groups)

    needed = [input_pipeline.batch_units(order_of(e), corpus.lengths, task.geometry) for e in range(min(t.epochs, 50))]
    # The largest batch that any order can make, so that no later epoch finds its batches without a place.
    largest = np.sort(task.geometry.units(corpus.lengths[parts["train"]]))[-(t.batch_recordings // groups) :]
    # Balanced epochs repeat recordings, so that a batch may hold the longest one several times.
    units = largest.sum() if balance is None else largest[-1] * (t.batch_recordings // groups)
    capacities = input_pipeline.choose_capacities(np.concatenate(needed), task.shapes)
    capacities = (*capacities, int(units)) if t.epochs > 50 and units > capacities[-1] else capacities
    steps_an_epoch = len(order_of(0))
    last_step = t.epochs * steps_an_epoch
    digest = input_pipeline.order_digest(
        corpus, train=split["train"], seed=config.seed, batch=t.batch_recordings, groups=groups, balance=t.balance,
        target=config.task.target, shuffled=config.data.shuffle_labels,
    )  # fmt: skip
    pipeline = choose_pipeline(config.data.pipeline, corpus.bytes)
    resident = None
    if pipeline == "resident":
        everything = input_pipeline.block(corpus, labels, np.arange(len(corpus.rows)))
        resident = jax.device_put(everything, sharding.replicated(mesh))
        del everything

    # --------------------------------------------------------------------------------------------------- state
    update = optimizer.make(config.optimizer, last_step)
    graphdef = nnx.graphdef(task.init(nnx.Rngs(config.seed)))

    sapt = thresholds.init(config.evaluation.threshold, **config.get("sapt", {"interval": 0}))
    init = functools.partial(tasks.initial_state, task, update, config.seed, sapt)
    shardings = sharding.state_sharding(mesh, jax.eval_shape(init))
    state = jax.jit(init, out_shardings=shardings)()
    if t.get("start_from"):
        state = jax.device_put(carried_over(state, t.start_from, tuple(config.optimizer.frozen)), shardings)
    if config.model.get("checkpoint"):
        state = jax.device_put(with_encoder(state, graphdef, config.model.checkpoint), shardings)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))

    # ---------------------------------------------------------------------------------------- compiled programs
    pmap = config.parallel.strategy == "pmap"
    constrain = lambda batch: batch
    if groups > 1 and not pmap:
        constrain = functools.partial(jax.lax.with_sharding_constraint, shardings=sharding.batch_sharding(mesh))
    step_key = jax.random.fold_in(key, STEP)
    step = make_step(task, update, graphdef, step_key, groups, axis="group" if pmap else None)
    run = make_run(step, task.geometry, capacities, constrain)
    if pmap:
        # Each device is given its own group of every batch; state and totals are one copy a device.
        all_groups = run
        run = jax.pmap(
            lambda s, o, data, ids, *rest: all_groups(s, o, data, ids[:, None], *rest),
            axis_name="group", in_axes=(0, 0, None, 1, None, None, None), donate_argnums=(0, 1),
        )  # fmt: skip
    else:
        run = jax.jit(run, donate_argnums=(0, 1), compiler_options=sharding.compiler_options())
    # pmap wants its arrays from the host or laid out its own way; all the rest wants them laid out over the mesh.
    spread = (lambda x: jax.tree.map(lambda a: np.stack([a] * groups), x)) if pmap else (lambda x: x)
    one_copy = lambda x: jax.device_put(jax.tree.map(lambda a: a[0], x), sharding.replicated(mesh))
    gathered = one_copy if pmap else (lambda x: x)
    predicts = {
        part: evaluate.make_predict(
            task,
            graphdef,
            corpus,
            parts[part],
            config.evaluation.batch_recordings,
            jax.random.fold_in(key, EVALUATION),
            resident,
            1 if pmap else groups,
            constrain,
        )
        for part in ("validation", "test")
    }

    def pieces(plan, start, stop):
        """What `run` is called with for these steps of an epoch: once when resident, else block by block."""
        if resident is not None:
            yield resident, plan.ids, plan.capacity, start, stop
        else:
            for data, ids, capacity, steps in input_pipeline.stream(corpus, labels, plan, start, stop):
                yield data, ids, capacity, 0, steps

    example = input_pipeline.plan(order_of(0), corpus.lengths, task.geometry, capacities)
    facts = {
        "parameters": parameters,
        "pipeline": pipeline,
        "corpus_mib": corpus.bytes / 2**20,
        "train_recordings": len(parts["train"]),
        "steps_an_epoch": steps_an_epoch,
        "capacities": list(capacities),
        "padding_waste": input_pipeline.padding_waste(example, corpus.lengths, task.geometry),
    }
    logging.info("%s", json.dumps(facts))
    if dry_run:
        compiled = run.lower(spread(state), spread(zero_totals()), *next(pieces(example, 0, 1))).compile()
        memory = compiled.memory_analysis()
        facts |= {
            "flops": (compiled.cost_analysis() or {}).get("flops"),
            "argument_bytes": getattr(memory, "argument_size_in_bytes", None),
            "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
        }
        print(json.dumps(facts, indent=1))
        return facts

    update_threshold = jax.jit(thresholds.sapt_update)
    if task.classifies and sapt.interval and len(set(labels[parts["validation"]])) < 2:
        logging.warning("validation has one class only: the threshold stays at %s", config.evaluation.threshold)

    # ------------------------------------------------------------------------------------------ start or resume
    log = workdir / "metrics.jsonl"
    plain = runs.plain_config(config)
    meta = {"config": plain, "order_sha256": digest, "sample_rate_hz": corpus.sample_rate_hz, "best": None}
    if config.task.name == "segmenter":
        meta["log_duration"] = segment.log_durations(corpus, parts["train"], config.features.step_s).tolist()
    totals = jax.device_put(zero_totals(), sharding.replicated(mesh))
    found = checkpoint.restore(workdir / "checkpoints" / "last")
    if found:
        saved = found[2]
        runs.refuse_changes(saved["config"], plain, workdir)
        if saved["order_sha256"] != digest:
            raise checkpoint.CheckpointError(
                f"{workdir}: its checkpoint was trained in another order of data (data, split or device count "
                "changed); give another --workdir, or what it was trained with"
            )
        at, held, saved = checkpoint.require(workdir / "checkpoints" / "last", {"state": state, "totals": totals})
        state, totals = held["state"], held["totals"]
        meta["best"] = saved["best"]
        logging.info("resuming at step %d", at)
        kept = [line for line in runs.history(log) if line["step"] <= at and line["split"] != "test"]
        files.write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
    elif log.exists():
        log.unlink()
    files.write_text(workdir / "config.json", json.dumps(plain, indent=1))
    last, best = (checkpoint.manager(workdir / "checkpoints" / name) for name in ("last", "best"))

    stopped = []
    previous = {s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}

    # ------------------------------------------------------------------------------------------------ the loop
    at = int(state.step)
    state, totals = spread(state), spread(totals)
    bar = tqdm.tqdm(total=last_step, initial=at, desc="train", unit="step", mininterval=1.0)
    seconds = {"train": 0.0, "validate": 0.0, "save": 0.0}
    try:
        while at < last_step and not stopped:
            epoch, within = divmod(at, steps_an_epoch)
            plan = input_pipeline.plan(order_of(epoch), corpus.lengths, task.geometry, capacities)
            to_save = t.checkpoint_steps - at % t.checkpoint_steps
            until = min(steps_an_epoch, within + to_save)
            clock = time.monotonic()
            for piece in pieces(plan, within, until):
                state, totals = run(state, totals, *piece)
            counted = jax.device_get(gathered(totals))  # waits for the device
            seconds["train"] += time.monotonic() - clock
            bar.update(until - within)
            at += until - within
            if counted.bad_step >= 0:
                bad = divmod(int(counted.bad_step), steps_an_epoch)
                ids = order_of(bad[0])[bad[1]].reshape(-1)
                names = ", ".join(corpus.rows[i]["id"] for i in ids if i >= 0)
                raise FloatingPointError(
                    f"the loss was not finite at step {int(counted.bad_step)}, recordings {names}; "
                    f"lower optimizer.learning_rate={config.optimizer.learning_rate} or look at those recordings"
                )
            if until == steps_an_epoch:
                n = max(int(counted.samples), 1)
                values = {"loss": float(counted.loss) / n, "accuracy": float(counted.correct) / n}
                runs.log_line(log, at, "train", values | {"epoch": epoch + 1, "seconds": seconds["train"]})
                totals = spread(jax.device_put(zero_totals(), sharding.replicated(mesh)))
                clock = time.monotonic()
                held = gathered(state)
                answers = predicts["validation"](held.params, held.rest)
                y = labels[parts["validation"]]
                threshold = float(held.sapt.threshold)
                scores = evaluate.validation_scores(task, answers, y, threshold)
                if task.classifies:
                    sapt = update_threshold(held.sapt, np.exp(answers[:, 0]).clip(0, 1), y)
                    state = state._replace(sapt=spread(jax.device_put(sapt, sharding.replicated(mesh))))
                seconds["validate"] += time.monotonic() - clock
                runs.log_line(log, at, "validation", scores | {"epoch": epoch + 1})
                bar.set_postfix(loss=f"{values['loss']:.3f}", **{f"val_{t.select}": f"{scores[t.select]:.3f}"})
                clock = time.monotonic()
                better = -scores[t.select] if t.select in ("loss", "brier") else scores[t.select]
                better = better if np.isfinite(better) else -np.inf
                if meta["best"] is None or better > meta["best"]["score"]:
                    meta["best"] = {
                        "score": better, "step": at, "epoch": epoch + 1, "metric": t.select, "threshold": threshold,
                    }  # fmt: skip
                    checkpoint.save(best, at, {"params": held.params, "rest": held.rest}, meta)
                    best.wait_until_finished()
            clock = time.monotonic()
            # Totals of a part of an epoch travel with the checkpoint: the epoch's line is the same after a resume.
            if at % t.checkpoint_steps == 0 or until == steps_an_epoch or stopped:
                checkpoint.save(last, at, {"state": gathered(state), "totals": gathered(totals)}, meta)
            seconds["save"] += time.monotonic() - clock
    finally:
        bar.close()
        last.wait_until_finished()
        for number, handler in previous.items():
            signal.signal(number, handler)
    last.close()
    best.close()
    if stopped:
        logging.warning("stopped by signal %d at step %d, saved; the same command goes on", stopped[0], at)
        sys.exit(128 + stopped[0])

    # ---------------------------------------------------------------------------------------- the best, judged
    held = gathered(state)
    _, kept, saved = checkpoint.require(workdir / "checkpoints" / "best", {"params": held.params, "rest": held.rest})
    config = config.copy_and_resolve_references()  # the caller's stays as it is
    config.evaluation.threshold = saved["best"]["threshold"]
    results: dict = {}
    rows: list[dict] = []
    if config.task.name == "segmenter":
        log_duration = np.array(saved["log_duration"], np.float32)
        segmenter = segment.Model(config, graphdef, kept["params"], kept["rest"], corpus.sample_rate_hz, log_duration)
    for part in ("validation", "test"):
        log_p = predicts[part](kept["params"], kept["rest"])
        y = labels[parts[part]]
        if not task.classifies:
            results[part] = evaluate.validation_scores(task, log_p, y, 0.5)
            if part == "test":
                runs.log_line(log, at, "test", results[part])
            if config.task.name == "segmenter":
                judged, told, examples = segment.judge(segmenter, corpus, parts[part], part)
                rows += told
                if part == "test":
                    results["segmentation"] = judged | {"validation": results["validation"].pop("segmentation")}
                    report.save_examples(workdir, examples)
                else:
                    results[part]["segmentation"] = judged["test"]
            continue
        results[part] = evaluate.judge(corpus, parts[part], y, log_p, config)
        rows += evaluate.table(corpus, parts[part], y, log_p, config.evaluation.threshold, part)
        if part == "test":
            overall = {name: score["value"] for name, score in results[part]["overall"].items()}
            runs.log_line(log, at, "test", overall | {"loss": evaluate.cross_entropy(log_p, y)})
    control = workdir / "control" / "metrics.json"
    if control.exists():
        results["control"] = json.loads(control.read_text())["test"]
    results["best"], results["epochs"] = saved["best"], t.epochs
    results["split"] = {k: split[k] for k in ("kind", "target", "notes", "counts", "people_apart", "leaks")}
    results["data"] = facts | {"prepared": config.data.prepared, "shuffled_labels": config.data.shuffle_labels}
    results["system"] = {
        "command": shlex.join(["python", "-m", "pcgjax.train", *sys.argv[1:]]),
        "device": str(jax.devices()[0].device_kind),
        "devices": jax.device_count(),
        "platform": platform.platform(),
        "wall_s": time.monotonic() - began,
        "seconds": seconds,
        "versions": {"pcgjax": pcgjax.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")},
    }
    files.write_text(workdir / "metrics.json", json.dumps(results, indent=1))
    if rows:
        evaluate.write_table(rows, workdir / "predictions.csv")
    if config.task.name == "ssamba_pretrain":
        from pcgjax.models import ssamba

        encoder = nnx.merge(graphdef, kept["params"], kept["rest"]).encoder
        ssamba.save_torch_checkpoint(encoder, workdir / "ssamba.pth")
    if task.classifies:
        _save_examples(workdir, corpus, [row for row in rows if row["split"] == "test"])
    try:
        report.write(workdir)
    except ImportError as error:
        logging.warning("no report.html: %s; install it, then python -m pcgjax.report %s", error, workdir)
    return results


def _save_examples(workdir: pathlib.Path, corpus, rows: list[dict]) -> None:
    """The waveforms that the report shows: of the surest right and wrong answers."""
    wanted = {row["id"] for kind in report.surest(rows, 4).values() for row in kind}
    waves = {r["id"]: corpus.read(i).astype(np.float32) / 32767 for i, r in enumerate(corpus.rows) if r["id"] in wanted}
    with files.replacing(workdir / "examples.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, sample_rate_hz=corpus.sample_rate_hz, **waves)


def carried_over(state: tasks.TrainState, workdir: str, groups: tuple[str, ...]) -> tasks.TrainState:
    """The state with the parameter groups `groups`, and their running averages, of the best model of `workdir`.

    Raises:
      ValueError: that model has no such group, or one of another shape.
    """
    _, _, _, params, rest, _ = evaluate.load_model(workdir)

    def take(ours, theirs):
        there = {path: x for path, x in jax.tree_util.tree_leaves_with_path(theirs) if path[0].key in groups}

        def one(path, x):
            if path[0].key not in groups:
                return x
            if path not in there or there[path].shape != x.shape:
                name = path[0].key
                raise ValueError(f"train.start_from={workdir}: its parameters {name!r} are not those of this model")
            return there[path]

        return jax.tree_util.tree_map_with_path(one, ours)

    return state._replace(params=take(state.params, params), rest=take(state.rest, rest))


def with_encoder(state: tasks.TrainState, graphdef: Any, path: str) -> tasks.TrainState:
    """The state with SSAMBA's parameters from a checkpoint of the public code's layout, its positions adapted.

    Raises:
      ValueError: as `ssamba.load_torch_checkpoint`, or a checkpoint of another width or depth.
    """
    from pcgjax.models import ssamba

    encoder = nnx.merge(graphdef, state.params, state.rest).encoder
    loaded = tasks.split(ssamba.load_torch_checkpoint(path, encoder.frames, encoder.stride))[1]
    there = dict(jax.tree_util.tree_leaves_with_path(loaded))

    def take(place, x):
        # A segmenter has no use for a checkpoint's own head; the predictors of pre-training may be new.
        if place not in there:
            return x
        if there[place].shape != x.shape:
            raise ValueError(
                f"model.checkpoint={path}: {jax.tree_util.keystr(place)} has shape {there[place].shape}, this model "
                f"{x.shape}; set model.width and model.depth to the checkpoint's"
            )
        return there[place]

    return state._replace(
        params=state.params | {"encoder": jax.tree_util.tree_map_with_path(take, state.params["encoder"])}
    )


def one_of(config: ml_collections.ConfigDict, overrides: Any, split_file: str) -> ml_collections.ConfigDict:
    """One run of a sweep or stage of a training: the config with `overrides`, and with the split that all share."""
    one = config.copy_and_resolve_references()
    with one.unlocked():
        for part in ("sweep", "stages"):
            if part in one:
                one[part] = ml_collections.ConfigDict()
    with one.ignore_type():
        one.update(overrides)
    one.split.file = config.split.file or split_file
    return one


def stages(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool = False) -> dict:
    """Trains `config.stages`, one after the other, each from the best model of the one before; returns the last's.

    A stage is named overrides. All but the last have a folder of their own below `workdir`. What `optimizer.frozen`
    names in a stage is carried over to it from the stage before.
    """
    split_file, start_from = str(workdir / "split.json"), ""
    *earlier, (_, last) = config.stages.items()
    final = one_of(config, last, split_file)
    if dry_run:
        return train(final, workdir, dry_run)
    for name, overrides in earlier:
        one, folder = one_of(config, overrides, split_file), workdir / name
        one.train.start_from = start_from
        done = folder / "metrics.json"
        if done.exists() and json.loads(done.read_text())["epochs"] >= one.train.epochs:
            runs.refuse_changes(json.loads((folder / "config.json").read_text()), runs.plain_config(one), folder)
        else:
            logging.info("stage %s", name)
            train(one, folder)
        start_from = str(folder)
    final.train.start_from = start_from
    return train(final, workdir)


def sweep(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool = False) -> list[dict]:
    """Runs each of `config.sweep`'s named overrides in a folder of its own and sets them side by side."""
    rows = []
    for name, overrides in config.sweep.items():
        one = one_of(config, overrides, str(workdir / "split.json"))  # one split for all
        logging.info("sweep: %s", name)
        # A finished run is only judged again, and refused if its config has changed.
        train(one, workdir / name, dry_run)
        if dry_run:
            continue
        rows.append(report.compare_row(workdir / name, name.replace("_", " ").capitalize()))
    if dry_run:
        return rows
    report.compare(rows, workdir / "report.html", "Four configurations", report.CNN_PAPER)
    files.write_text(
        workdir / "table.json",
        json.dumps([{k: r[k] for k in ("name", "metrics", "trivial")} for r in rows], indent=1),
    )
    return rows


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}")
    logging.set_verbosity(logging.INFO)
    workdir = pathlib.Path(FLAGS.workdir)
    runs.log_to(workdir)
    if len(CONFIG.value.sweep):
        sweep(CONFIG.value, workdir, FLAGS.dry_run)
        if not FLAGS.dry_run:
            print(f"wrote {workdir}/report.html and table.json")
        return
    run = stages if len(CONFIG.value.get("stages", ())) else train
    results = run(CONFIG.value, workdir, FLAGS.dry_run)
    if not FLAGS.dry_run:
        print(evaluate.summary(results))
        print(f"wrote {workdir}: metrics.json, predictions.csv, report.html, checkpoints/")


FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: a file below configs/; --config.a.b=v overrides."
)
if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The run's folder; a run that was stopped there is resumed.", required=True)
    flags.DEFINE_bool("dry_run", False, "Compile, print sizes and costs, and stop.")
    flags.mark_flag_as_required("config")
    files.run(main)
