"""The best model of a run, judged; all files that a run leaves."""

from __future__ import annotations

import functools
import json
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from pcgjax.data.corpus import Corpus, order_digest
from pcgjax.pages import run as run_page
from pcgjax.runs.config import difference, plain_config, refuse_changes, refuse_other_order
from pcgjax.runs.judge import cross_entropy, judge_recordings, prediction_rows, validation_scores, write_table
from pcgjax.runs.record import versions
from pcgjax.runs.results import read_json, save_examples, surest
from pcgjax.runs.seal import seal
from pcgjax.runtime import checkpoint, files, goodput, hashes, sharding
from pcgjax.tasks.base import Judgement, Task, Trained, TrainState
from pcgjax.training.start import Run


class Finished(NamedTuple):
    """A run that is trained: what is judged, and what metrics.json says besides the scores."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    corpus: Corpus
    parts: dict[str, np.ndarray]  # indices into the corpus
    split: dict
    labels: np.ndarray  # of the whole corpus, as `Task.labels`
    classifies: bool
    step: int  # the last
    meta: dict  # of the best model's checkpoint
    answers: dict[str, np.ndarray]  # validation, test: of the best model, as of `answers.make_predict`
    facts: dict  # the size of model and data
    system: dict  # device and times, as of `system_facts`
    log: Callable[[int, str, dict], None]  # (step, split, values): a line of metrics


def system_facts(clock: goodput.Clock) -> dict[str, Any]:
    """What metrics.json says of the machine and of the time a run took."""
    seconds = clock.spent()
    return {
        "device": str(jax.devices()[0].device_kind),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "wall_s": time.monotonic() - clock.began,
        "seconds": seconds,
        "goodput": goodput.share(seconds),
    }


def conclude_run(run: Run, state: TrainState, facts: dict) -> dict:
    """Judges the best model of a run of `loop.train`; returns metrics.json, {} on all processes but the first."""
    experiment, mesh = run.experiment, run.experiment.mesh
    like = {"params": state.params, "rest": state.rest}
    _, best, meta = checkpoint.require(run.workdir / "checkpoints" / "best", like)
    refuse_changes(meta["config"], run.meta["config"], run.workdir)
    refuse_other_order(meta["order_sha256"], run.meta["order_sha256"], run.workdir)
    if meta["best"] != run.meta["best"]:
        logging.warning("%s: the best epoch is %s, its model that of %s", run.workdir, run.meta["best"], meta["best"])
    answers = {part: predict(best["params"], best["rest"]) for part, predict in run.predict.items()}
    everywhere = jax.jit(lambda *x: x, out_shardings=sharding.replicated(mesh))
    params, rest = jax.device_get(everywhere(best["params"], best["rest"]))
    if jax.process_index():
        return {}
    finished = Finished(
        run.config, run.workdir, experiment.corpus, experiment.parts, experiment.split, experiment.labels,
        experiment.task.classifies, run.last_step, meta, answers, facts, system_facts(run.clock), run.log,
    )  # fmt: skip
    results = conclude(finished, model_of(finished, experiment.task, run.compiled.graphdef, params, rest))
    if run.board:
        run.board.close()
    return results


def model_of(finished: Finished, task: Task, graphdef: Any, params: Any, rest: Any) -> Callable[[], Judgement]:
    """What `task.conclude` says of the best model, whose parameters are whole and on the host."""
    config = finished.config.copy_and_resolve_references()
    config.evaluation.threshold = finished.meta["best"]["threshold"]
    trained = Trained(config, finished.workdir, finished.corpus, finished.parts, graphdef, params, rest, finished.meta)
    return functools.partial(task.conclude, trained)


def conclude(finished: Finished, more: Callable[[], Judgement] | None = None) -> dict:
    """Judges a run's best model by its answers to validation and test; writes and returns metrics.json, and all that
    lies beside it.

    more: what the task says of the model besides, as of `model_of`.
    """
    config, workdir, corpus, meta = finished.config, finished.workdir, finished.corpus, finished.meta
    results, rows = answer_scores(finished)
    if more is not None:
        judgement = more()
        results |= judgement.results
        rows += judgement.rows
        if judgement.examples:
            save_examples(workdir, judgement.examples)
    if (control := _control(config, workdir / "control")) is not None:
        results["control"] = control
    results["best"], results["epochs"] = meta["best"], config.train.epochs
    results["split"] = {
        name: finished.split[name] for name in ("kind", "target", "notes", "counts", "people_apart", "leaks")
    }
    shuffled = config.data.shuffle_labels
    results["data"] = finished.facts | {"prepared": config.data.prepared, "shuffled_labels": shuffled}
    results["data"]["recordings_sha256"] = order_digest(corpus)
    results["system"] = finished.system | {
        "command": shlex.join(["python", "-m", "pcgjax.train", *sys.argv[1:]]),
        "platform": platform.platform(),
        "versions": versions(),
    }
    files.write_text(workdir / "metrics.json", json.dumps(results, indent=1))
    if rows:
        write_table(rows, workdir / "predictions.csv")
    if finished.classifies:
        _save_examples(workdir, corpus, [row for row in rows if row["split"] == "test"])
    try:
        run_page.write(workdir)
    except ImportError as error:
        logging.warning("no report.html: %s; install it, then python -m pcgjax.report %s", error, workdir)
    seal(workdir)
    return results


def _control(config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict | None:
    """The test scores of the run in WORKDIR/control, where it is this one with shuffled labels; None, and a warning
    where it is another, if there is none."""
    if not hashes.intact(folder / "metrics.json"):
        return None
    results = read_json(folder / "metrics.json")
    saved = read_json(folder / "config.json") if hashes.intact(folder / "config.json") else {}
    plain = plain_config(config)
    differs = difference(saved, plain, {("data", "shuffle_labels")})
    why = f"its {differs[0]} is {differs[1]}, this run's {differs[2]}" if differs else ""
    if not saved.get("data", {}).get("shuffle_labels"):
        why = "its labels are not shuffled"
    elif saved["data"].get("prepared") != plain["data"]["prepared"]:
        why = "it was trained on another prepared folder"
    elif not isinstance(results.get("test"), dict):
        why = "its metrics.json has no test scores"
    if why:
        logging.warning("%s: no control of this run: %s; its scores are left out", folder, why)
        return None
    return results["test"]


def answer_scores(finished: Finished) -> tuple[dict, list[dict]]:
    """(scores by part, rows of predictions.csv); logs the test scores."""
    config = finished.config.copy_and_resolve_references()  # the caller's stays as it is
    threshold = config.evaluation.threshold = finished.meta["best"]["threshold"]
    corpus, results, rows = finished.corpus, {}, []
    for part, answers in finished.answers.items():
        indices = finished.parts[part]
        labels = finished.labels[indices]
        if finished.classifies:
            results[part] = judge_recordings(corpus, indices, labels, answers, config)
            rows += prediction_rows(corpus, indices, labels, answers, threshold, part)
            line = {name: score["value"] for name, score in results[part]["overall"].items()}
            line["loss"] = cross_entropy(answers, labels)
        else:
            line = results[part] = validation_scores(False, answers, labels, 0.5)
        if part == "test":
            finished.log(finished.step, "test", line)
    return results, rows


def _save_examples(workdir: pathlib.Path, corpus, rows: list[dict]) -> None:
    """The waveforms that the report shows: of the surest right and wrong answers."""
    wanted = {row["id"] for kind in surest(rows, 4).values() for row in kind}
    waves = {r["id"]: corpus.read(i).astype(np.float32) / 32767 for i, r in enumerate(corpus.rows) if r["id"] in wanted}
    with files.replacing(workdir / "examples.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, sample_rate_hz=corpus.sample_rate_hz, **waves)
