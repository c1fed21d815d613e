"""A trained model on recordings with labels or annotations.

    python -m pcgjax.evaluate --workdir=runs/cnn --dataset=pascal --source=DIR --out=scores.json

writes the scores of `metrics.judge` (per class and per database, with intervals over people, beside what trivial
answers score), beside them OUT with .csv: a probability and decision for each recording.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import TYPE_CHECKING

from absl import flags, logging

from pcgjax import datasets
from pcgjax.datasets.sources import printable
from pcgjax.runtime import files

if TYPE_CHECKING:
    from pcgjax.data.corpus import Corpus
    from pcgjax.systems import Loaded
    from pcgjax.tasks.segmenter_model import SegmenterModel


def evaluate(
    workdir: str, dataset: str, source: str, out: str, target: str = "", labels: str = "none", persons: str = ""
) -> dict:
    """Judges the model of `workdir` on a folder in an official layout; writes `out` and its .csv; returns the scores.

    labels, persons: as `datasets.load` has them.

    Raises:
      datasets.DatasetError: the folder cannot be read, or no recording has the label `target`.
      ValueError (also CheckpointError): no trained model there, or one that has no answers to judge.
    """
    from pcgjax import systems
    from pcgjax.data.shards import as_json
    from pcgjax.runs.judge import write_table
    from pcgjax.runs.seal import refuse_run_file

    files.check_out(out)
    for path in (pathlib.Path(out), pathlib.Path(out).with_suffix(".csv")):
        refuse_run_file(path)
    if pathlib.Path(out).suffix == ".csv":
        raise ValueError(f"--out={out}: the scores are JSON, and the .csv beside them has the answers; give a .json")
    began = time.monotonic()
    model = systems.load(workdir)
    recordings, problems = datasets.load(dataset, source, labels, persons)
    if model.segmenter is not None:
        if target:
            raise ValueError(f"--target={target}: a segmenter is judged by annotations; leave --target out")
        scores, rows, undecoded = judge_states(model.segmenter, recordings, dataset, source)
    elif model.answer is not None:
        scores, rows, undecoded = judge_answers(model, recordings, dataset, source, target or model.config.task.target)
    else:
        raise ValueError(f"{workdir}: a model of task {model.config.task.name!r} has no answers to judge")
    listed = {problem.reason for problem in problems if problem.note}
    problems += [problem for problem in undecoded if not (problem.note and problem.reason in listed)]
    scores |= {
        "dataset": dataset,
        "source": printable(source),
        "workdir": printable(workdir),
        "problems": [as_json(problem) for problem in problems],
        "wall_s": time.monotonic() - began,
    }
    files.write_text(pathlib.Path(out), json.dumps(scores, indent=1))
    write_table(rows, pathlib.Path(out).with_suffix(".csv"))
    return scores


def judge_answers(
    model: Loaded, recordings: list[datasets.Recording], dataset: str, source: str, target: str
) -> tuple[dict, list[dict], list[datasets.Problem]]:
    """(scores, rows of the .csv, recordings left out) of a classifier on the recordings that have the label `target`.

    Raises:
      datasets.DatasetError: no recording has the label, can be decoded, or has a heart cycle to judge by.
    """
    import numpy as np

    from pcgjax.runs.judge import NO_CYCLE, judge_recordings, prediction_rows
    from pcgjax.tasks.segmenter_model import NOT_FINITE

    assert model.answer is not None
    labelled = [r for r in recordings if r.labels.get(target) in ("0", "1")]
    if not labelled:
        raise datasets.DatasetError(f"{source}: no recording has the label {target!r}; choose another --target")
    corpus, problems = decode(labelled, model.sample_rate_hz, source, "labelled")
    log_p = model.answer(corpus)
    answered = np.isfinite(log_p[:, 0])
    why = NO_CYCLE if model.config.task.name == "classical" else NOT_FINITE
    problems = problems + [datasets.Problem(corpus.rows[i]["path"], why) for i in np.flatnonzero(~answered)]
    if not answered.any():
        raise datasets.DatasetError(f"{source}: {why} in any of the {len(answered)} recordings")
    indices, labels, log_p = np.flatnonzero(answered), corpus.labels(target)[answered], log_p[answered]
    scores = judge_recordings(corpus, indices, labels, log_p, model.config) | {
        "target": target,
        "trained_on_target": model.config.task.target,
        "without_label": len(recordings) - len(labelled),
    }
    rows = prediction_rows(corpus, indices, labels, log_p, model.config.evaluation.threshold, dataset)
    return scores, list(rows), problems


def judge_states(
    model: SegmenterModel, recordings: list[datasets.Recording], dataset: str, source: str
) -> tuple[dict, list[dict], list[datasets.Problem]]:
    """(scores, rows of the .csv, recordings left out) of a segmenter on the recordings that are annotated.

    Raises:
      datasets.DatasetError: no recording is annotated, or can be decoded.
    """
    import numpy as np

    from pcgjax.tasks.segmenter_model import judge_segmentation

    annotated = [r for r in recordings if any(start < end for start, end, _ in r.annotations)]
    if not annotated:
        raise datasets.DatasetError(
            f"{source}: none of the {len(recordings)} recordings has annotated states to judge a segmenter by"
        )
    corpus, problems = decode(annotated, model.sample_rate_hz, source, "annotated")
    segmentation, rows, _ = judge_segmentation(model, corpus, np.arange(len(corpus.rows)), dataset)
    scores = {
        "segmentation": segmentation,
        "target": model.config.task.frames,
        "without_annotation": len(recordings) - len(annotated),
    }
    return scores, rows, problems


def decode(
    recordings: list[datasets.Recording], sample_rate_hz: int, source: str, kind: str
) -> tuple[Corpus, list[datasets.Problem]]:
    """The recordings in memory, and those left out or read with a doubt; raises DatasetError where there are none."""
    from pcgjax.data.corpus import decode_recordings

    corpus, problems = decode_recordings(recordings, sample_rate_hz)
    if not corpus.rows:
        raise datasets.DatasetError(f"{source}: none of the {len(recordings)} {kind} recordings could be decoded")
    return corpus, datasets.with_notes(problems, corpus.rows)


def main(argv: list[str]) -> None:
    from pcgjax.pages.terminal import run_summary

    scores = evaluate(FLAGS.workdir, FLAGS.dataset, FLAGS.source, FLAGS.out, FLAGS.target, FLAGS.labels, FLAGS.persons)
    for problem in scores["problems"]:
        what = "read with a doubt" if problem.get("note") else "left out"
        logging.warning("%s: %s: %s", what, problem["path"], problem["reason"])
    print(run_summary(scores if "segmentation" in scores else {"test": scores}))
    print(f"wrote {FLAGS.out} and {pathlib.Path(FLAGS.out).with_suffix('.csv')}")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_string(
        "workdir", None, "A folder that pcgjax.train wrote; its best checkpoint is judged.", required=True
    )
    flags.DEFINE_enum("dataset", None, datasets.NAMES, "The layout of --source.", required=True)
    flags.DEFINE_string("source", None, "The recordings with labels; of table the CSV file.", required=True)
    flags.DEFINE_string(
        "out", None, "The JSON file to write; a .csv of the same name holds every answer.", required=True
    )
    flags.DEFINE_string("target", "", "The label to judge against, as abnormal or murmur; default: the one trained on.")
    datasets.define_flags()
    files.run(main)
