"""A trained model on recordings it has not heard.

    python -m pcgjax.evaluate --workdir=runs/cnn --dataset=pascal --source=DIR --out=scores.json

writes the scores of `metrics.judge` (per class and per database, intervals over people, what trivial answers score),
beside them OUT with .csv: a probability and decision for each recording.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time

import numpy as np
from absl import app, flags, logging

from pcgjax import datasets
from pcgjax.data.corpus import decode_recordings
from pcgjax.pages.terminal import run_summary
from pcgjax.runs.judge import NO_CYCLE, judge_recordings, prediction_rows, write_table
from pcgjax.runtime import files
from pcgjax.systems import load_answerer
from pcgjax.training import segmenter


def evaluate(workdir: str, dataset: str, source: str, out: str, target: str = "") -> dict:
    """Judges the model of `workdir` on a folder in an official layout; writes `out` and its .csv; returns the scores.

    Raises:
      datasets.DatasetError: the folder cannot be read, or no recording has the label `target`.
    """
    began = time.monotonic()
    config, classifies, sample_rate_hz, answer = load_answerer(workdir)
    recordings, problems = datasets.load(dataset, source)
    if config.task.name == "segmenter":
        if target:
            raise ValueError(f"--target={target}: a segmenter is judged by annotations; leave --target out")
        return _evaluate_segmenter(workdir, dataset, source, out, recordings, problems, began)
    if not classifies:
        raise ValueError(f"{workdir}: a model of task {config.task.name!r} has no answers to judge")
    target = target or config.task.target
    labelled = [r for r in recordings if r.labels.get(target) in ("0", "1")]
    if not labelled:
        raise datasets.DatasetError(f"{source}: no recording has the label {target!r}; choose another --target")
    corpus, undecoded = decode_recordings(labelled, sample_rate_hz)
    problems = problems + undecoded
    if not corpus.rows:
        raise datasets.DatasetError(f"{source}: none of the {len(labelled)} labelled recordings could be decoded")
    indices, labels = np.arange(len(corpus.rows)), corpus.labels(target)
    log_p = answer(corpus)
    found = np.isfinite(log_p[:, 0])
    problems += [datasets.Problem(corpus.rows[i]["path"], NO_CYCLE) for i in np.flatnonzero(~found)]
    if not found.any():
        raise datasets.DatasetError(f"{source}: {NO_CYCLE} in any of the {len(found)} recordings")
    indices, labels, log_p = indices[found], labels[found], log_p[found]
    scores = judge_recordings(corpus, indices, labels, log_p, config)
    scores |= {
        "dataset": dataset,
        "source": str(source),
        "workdir": str(workdir),
        "target": target,
        "trained_on_target": config.task.target,
        "without_label": len(recordings) - len(labelled),
        "problems": [dataclasses.asdict(problem) for problem in problems],
        "wall_s": time.monotonic() - began,
    }
    files.write_text(pathlib.Path(out), json.dumps(scores, indent=1))
    rows = list(prediction_rows(corpus, indices, labels, log_p, config.evaluation.threshold, dataset))
    write_table(rows, pathlib.Path(out).with_suffix(".csv"))
    return scores


def _evaluate_segmenter(workdir, dataset, source, out, recordings, problems, began) -> dict:
    model = segmenter.load_segmenter(workdir)
    annotated = [r for r in recordings if any(start < end for start, end, _ in r.annotations)]
    if not annotated:
        raise datasets.DatasetError(
            f"{source}: none of the {len(recordings)} recordings has annotated states to judge a segmenter by"
        )
    corpus, undecoded = decode_recordings(annotated, model.sample_rate_hz)
    if not corpus.rows:
        raise datasets.DatasetError(f"{source}: none of the {len(annotated)} annotated recordings could be decoded")
    judged, rows, _ = segmenter.judge_segmentation(model, corpus, np.arange(len(corpus.rows)), dataset)
    scores = {
        "segmentation": judged,
        "dataset": dataset,
        "source": str(source),
        "workdir": str(workdir),
        "target": model.config.task.frames,
        "without_annotation": len(recordings) - len(annotated),
        "problems": [dataclasses.asdict(problem) for problem in problems + undecoded],
        "wall_s": time.monotonic() - began,
    }
    files.write_text(pathlib.Path(out), json.dumps(scores, indent=1))
    write_table(rows, pathlib.Path(out).with_suffix(".csv"))
    return scores


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}")
    scores = evaluate(FLAGS.workdir, FLAGS.dataset, FLAGS.source, FLAGS.out, FLAGS.target)
    for problem in scores["problems"]:
        logging.warning("left out: %s: %s", problem["path"], problem["reason"])
    print(run_summary(scores if "segmentation" in scores else {"test": scores}))
    print(f"wrote {FLAGS.out} and {pathlib.Path(FLAGS.out).with_suffix('.csv')}")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_string(
        "workdir", None, "A folder that pcgjax.train wrote; its best checkpoint is judged.", required=True
    )
    flags.DEFINE_enum("dataset", None, datasets.NAMES, "The layout of --source.", required=True)
    flags.DEFINE_string("source", None, "A folder of recordings with labels, in the official layout.", required=True)
    flags.DEFINE_string(
        "out", None, "The JSON file to write; a .csv of the same name holds every answer.", required=True
    )
    flags.DEFINE_string("target", "", "abnormal or murmur: the label to judge against; default: the one trained on.")
    files.run(main)
