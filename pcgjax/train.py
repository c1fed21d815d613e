"""Trains what a config describes: the one loop.

    python -m pcgjax.train --config=configs/cnn.py --workdir=runs/cnn --config.data.prepared=DIR [--config.a.b=v]

The order is always the same: train an epoch (one compiled program where the corpus fits the device), validate, save.
WORKDIR receives config.json, split.json, metrics.jsonl, train.log and checkpoints/{last,best} on the way, and at the
end metrics.json, predictions.csv, examples.npz and report.html. A second start resumes where the first one was stopped.
"""

from __future__ import annotations

import functools
import json
import pathlib
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm
from absl import app, flags, logging
from flax import nnx
from ml_collections import config_flags

from pcgjax import (
    checkpoint,
    compare,
    costs,
    distributed,
    evaluate,
    files,
    goodput,
    input_pipeline,
    optimizer,
    report,
    runs,
    segment,
    sharding,
    tasks,
    thresholds,
)
from pcgjax.experiment import Experiment, set_up
from pcgjax.runs import EVALUATION, STEP
from pcgjax.train_step import compile_run, look_ahead, zero_totals


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
    init = functools.partial(tasks.initial_state, task, update, seed, sapt)
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
        "padding_waste": input_pipeline.padding_waste(example, corpus.lengths, task.geometry),
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
        part: evaluate.make_predict(
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
    plain = runs.plain_config(config)
    meta: dict[str, Any] = {
        "config": plain,
        "order_sha256": experiment.digest,
        "sample_rate_hz": corpus.sample_rate_hz,
        "best": None,
    }
    if config.task.name == "segmenter":
        meta["log_duration"] = segment.log_durations(corpus, parts["train"], config.features.step_s).tolist()
    nothing = lambda: sharding.put(mesh, zero_totals())
    totals = nothing()
    found = checkpoint.restore(workdir / "checkpoints" / "last")
    if found:
        saved = found[2]
        runs.refuse_changes(saved["config"], plain, workdir)
        if saved["order_sha256"] != experiment.digest:
            raise checkpoint.CheckpointError(
                f"{workdir}: its checkpoint was trained in another order of data (data or split "
                "changed); give another --workdir, or what it was trained with"
            )
        at, held, saved = checkpoint.require(workdir / "checkpoints" / "last", {"state": state, "totals": totals})
        state, totals = held["state"], held["totals"]
        meta["best"] = saved["best"]
        logging.info("resuming at step %d", at)
        kept = [line for line in runs.history(log) if line["step"] <= at and line["split"] != "test"]
        if first_process:
            files.write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
    elif log.exists() and first_process:
        log.unlink()
    at = int(state.step)
    board = runs.open_board(workdir, at) if first_process else None
    tell = functools.partial(runs.log_line, log, board=board) if first_process else (lambda *_: None)
    runs.record(workdir, config, at)
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
                    scores = evaluate.validation_scores(task, answers, y, threshold)
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


def conclude(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    experiment: Experiment,
    graphdef: Any,
    params: Any,
    rest: Any,
    saved: dict,
    answers: dict[str, np.ndarray],
    facts: dict,
    system: dict,
    tell: Callable,
) -> dict:
    """Judges a run's best model by its answers to validation and test; writes and returns metrics.json, and all that
    lies beside it.

    params, rest: whole, on the host; saved: the meta of its checkpoint; answers: of `evaluate.make_predict`;
    tell: (step, split, values), which writes a line of metrics.
    """
    corpus, parts, split, task, labels = experiment[:5]
    step = config.train.epochs * experiment.steps_an_epoch
    config = config.copy_and_resolve_references()  # the caller's stays as it is
    config.evaluation.threshold = saved["best"]["threshold"]
    results: dict = {}
    rows: list[dict] = []
    if config.task.name == "segmenter":
        log_duration = np.array(saved["log_duration"], np.float32)
        segmenter = segment.Model(config, graphdef, params, rest, corpus.sample_rate_hz, log_duration)
    for part, log_p in answers.items():
        y = labels[parts[part]]
        if not task.classifies:
            results[part] = evaluate.validation_scores(task, log_p, y, 0.5)
            if part == "test":
                tell(step, "test", results[part])
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
            tell(step, "test", overall | {"loss": evaluate.cross_entropy(log_p, y)})
    control = workdir / "control" / "metrics.json"
    if control.exists():
        results["control"] = json.loads(control.read_text())["test"]
    results["best"], results["epochs"] = saved["best"], config.train.epochs
    results["split"] = {k: split[k] for k in ("kind", "target", "notes", "counts", "people_apart", "leaks")}
    results["data"] = facts | {"prepared": config.data.prepared, "shuffled_labels": config.data.shuffle_labels}
    results["system"] = system | {
        "command": shlex.join(["python", "-m", "pcgjax.train", *sys.argv[1:]]),
        "platform": platform.platform(),
        "versions": runs.versions(),
    }
    files.write_text(workdir / "metrics.json", json.dumps(results, indent=1))
    if rows:
        evaluate.write_table(rows, workdir / "predictions.csv")
    if config.task.name == "ssamba_pretrain":
        from pcgjax.models import ssamba

        encoder = nnx.merge(graphdef, params, rest).encoder
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
            return np.asarray(there[path])  # on this process' device: each puts its copy where the state lies

        return jax.tree_util.tree_map_with_path(one, ours)

    return state._replace(params=take(state.params, params), rest=take(state.rest, rest))


def with_encoder(state: tasks.TrainState, graphdef: Any, path: str) -> tasks.TrainState:
    """The state with SSAMBA's parameters from a checkpoint of the public code's layout, its positions adapted; of an
    image net with ImageNet's weights and running averages.

    Raises:
      ValueError: as `ssamba.load_torch_checkpoint` or `image.load_imagenet`, or a checkpoint of another width or depth.
    """
    from pcgjax.models import image, ssamba

    model = nnx.merge(graphdef, state.params, state.rest)
    if isinstance(model, image.ImageClassifier):
        _, *loaded = tasks.split(image.load_imagenet(model, path))
        # As above, what was loaded; the rest, such as the head, is the state's.
        params, rest = jax.tree.map(lambda x: np.asarray(x) if x.is_fully_addressable else x, loaded)
        return state._replace(params=params, rest=rest)
    encoder = model.encoder
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
        return np.asarray(there[place])

    return state._replace(
        params=state.params | {"encoder": jax.tree_util.tree_map_with_path(take, state.params["encoder"])}
    )


def one_of(config: ml_collections.ConfigDict, overrides: Any, split_file: str) -> ml_collections.ConfigDict:
    """One variant, stage or member of a training: the config with `overrides`, and with the split that all share."""
    one = config.copy_and_resolve_references()
    with one.unlocked():
        for part in ("sweep", "variants", "stages"):
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


def variants(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool = False) -> list[dict]:
    """Runs each of `config.variants`' named overrides in a folder of its own and sets them side by side."""
    rows = []
    for name, overrides in config.variants.items():
        one = one_of(config, overrides, str(workdir / "split.json"))  # one split for all
        logging.info("variant: %s", name)
        # A finished run is only judged again, and refused if its config has changed.
        train(one, workdir / name, dry_run)
        if dry_run:
            continue
        rows.append(compare.row(workdir / name, name.replace("_", " ").capitalize()))
    if dry_run:
        return rows
    compare.write(rows, workdir / "report.html", "Four configurations", compare.CNN_PAPER)
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
    if FLAGS.devices:
        if not FLAGS.dry_run:
            raise ValueError("--devices: for --dry_run alone; a run takes the devices that are there")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    if FLAGS.config.task.name == "audio_encoder":  # PyTorch computes, JAX only draws the order
        jax.config.update("jax_platforms", "cpu")
    with distributed.together():
        if jax.process_index():
            logging.set_verbosity(logging.WARNING)  # what all would say, process 0 says
        else:
            runs.log_to(workdir)
        run_all(FLAGS.config, workdir, FLAGS.dry_run)


def run_all(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool) -> None:
    """What a config asks for: one run, stages of one, or several side by side."""
    from pcgjax import classical, population

    if config.task.name == "classical":
        if results := classical.run(config, workdir, dry_run):
            print(classical.summary(results))
        return
    if population.asked(config):
        if len(config.get("variants", ())):
            raise ValueError("config.sweep: this config has variants; sweep one that has none, such as configs/cnn.py")
        population.run(config, workdir, dry_run)
        return
    if len(config.get("variants", ())):
        variants(config, workdir, dry_run)
        if not dry_run:
            print(f"wrote {workdir}/report.html and table.json")
        return
    run: Callable = stages if len(config.get("stages", ())) else train
    if config.task.name == "audio_encoder":
        from pcgjax.audio_llm import encoders

        run = encoders.train
    results = run(config, workdir, dry_run)
    if results and not dry_run:
        print(evaluate.summary(results))
        print(f"wrote {workdir}: metrics.json, predictions.csv, report.html, checkpoints/")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The experiment: a file below configs/; --config.a.b=v overrides.")
    flags.DEFINE_string("workdir", None, "The run's folder; a run that was stopped there is resumed.", required=True)
    flags.DEFINE_bool("dry_run", False, "Compile, print sizes and costs, and stop.")
    flags.DEFINE_integer("devices", None, "With --dry_run: compile for so many devices, simulated on the CPU.", 1)
    distributed.define_flags()
    flags.mark_flag_as_required("config")
    files.run(main)
