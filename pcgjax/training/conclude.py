"""The best model of a run, judged; all files that a run leaves."""

from __future__ import annotations

import json
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
from absl import logging
from flax import nnx

from pcgjax.pages import run as run_page
from pcgjax.runs.judge import cross_entropy, judge_recordings, prediction_rows, validation_scores, write_table
from pcgjax.runs.record import versions
from pcgjax.runs.results import save_examples, surest
from pcgjax.runtime import files
from pcgjax.training.experiment import Experiment
from pcgjax.training.segmenter import SegmenterModel, judge_segmentation


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
        segmenter = SegmenterModel(config, graphdef, params, rest, corpus.sample_rate_hz, log_duration)
    for part, log_p in answers.items():
        y = labels[parts[part]]
        if not task.classifies:
            results[part] = validation_scores(task, log_p, y, 0.5)
            if part == "test":
                tell(step, "test", results[part])
            if config.task.name == "segmenter":
                judged, told, examples = judge_segmentation(segmenter, corpus, parts[part], part)
                rows += told
                if part == "test":
                    results["segmentation"] = judged | {"validation": results["validation"].pop("segmentation")}
                    save_examples(workdir, examples)
                else:
                    results[part]["segmentation"] = judged["test"]
            continue
        results[part] = judge_recordings(corpus, parts[part], y, log_p, config)
        rows += prediction_rows(corpus, parts[part], y, log_p, config.evaluation.threshold, part)
        if part == "test":
            overall = {name: score["value"] for name, score in results[part]["overall"].items()}
            tell(step, "test", overall | {"loss": cross_entropy(log_p, y)})
    control = workdir / "control" / "metrics.json"
    if control.exists():
        results["control"] = json.loads(control.read_text())["test"]
    results["best"], results["epochs"] = saved["best"], config.train.epochs
    results["split"] = {k: split[k] for k in ("kind", "target", "notes", "counts", "people_apart", "leaks")}
    results["data"] = facts | {"prepared": config.data.prepared, "shuffled_labels": config.data.shuffle_labels}
    results["system"] = system | {
        "command": shlex.join(["python", "-m", "pcgjax.train", *sys.argv[1:]]),
        "platform": platform.platform(),
        "versions": versions(),
    }
    files.write_text(workdir / "metrics.json", json.dumps(results, indent=1))
    if rows:
        write_table(rows, workdir / "predictions.csv")
    if config.task.name == "ssamba_pretrain":
        from pcgjax.models.ssamba_checkpoint import save_torch_checkpoint

        encoder = nnx.merge(graphdef, params, rest).encoder
        save_torch_checkpoint(encoder, workdir / "ssamba.pth")
    if task.classifies:
        _save_examples(workdir, corpus, [row for row in rows if row["split"] == "test"])
    try:
        run_page.write(workdir)
    except ImportError as error:
        logging.warning("no report.html: %s; install it, then python -m pcgjax.report %s", error, workdir)
    return results


def _save_examples(workdir: pathlib.Path, corpus, rows: list[dict]) -> None:
    """The waveforms that the report shows: of the surest right and wrong answers."""
    wanted = {row["id"] for kind in surest(rows, 4).values() for row in kind}
    waves = {r["id"]: corpus.read(i).astype(np.float32) / 32767 for i, r in enumerate(corpus.rows) if r["id"] in wanted}
    with files.replacing(workdir / "examples.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, sample_rate_hz=corpus.sample_rate_hz, **waves)
