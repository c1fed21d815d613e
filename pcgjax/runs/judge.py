"""A classifier's answers judged: scores with intervals, rows of predictions.csv."""

from __future__ import annotations

import pathlib

import numpy as np

from pcgjax import metrics
from pcgjax.data.corpus import Corpus
from pcgjax.runs.patients import judge_patients
from pcgjax.runtime.tables import write_csv

NO_CYCLE = "no heart cycle found"
PREDICTION_COLUMNS = ("id", "person", "database", "class", "label", "probability", "decision", "split", "path")


def cross_entropy(log_p: np.ndarray, labels: np.ndarray) -> float:
    """Mean binary cross-entropy from (n, 2) log p and log (1 - p)."""
    return float(-np.where(labels > 0, log_p[:, 0], log_p[:, 1]).mean())


def validation_scores(classifies: bool, answers: np.ndarray, labels: np.ndarray, threshold: float) -> dict:
    """What an epoch's validation line holds, from `make_predict`'s answers and the task's labels."""
    if not classifies:
        loss, correct, samples = answers.astype(np.float64).sum(0)
        return {"loss": loss / max(samples, 1), "accuracy": correct / max(samples, 1)}
    scores = metrics.binary(labels, np.exp(answers[:, 0]).clip(0, 1), threshold)
    scores = {name: scores[name] for name in metrics.METRICS}
    return scores | {"loss": cross_entropy(answers, labels), "threshold": threshold}


def judge_recordings(corpus: Corpus, indices: np.ndarray, labels: np.ndarray, log_p: np.ndarray, config) -> dict:
    """`metrics.judge` of the recordings `indices`, whose labels and answers are given in their order; with CirCor among
    them also `patients`, as of `judge_patients`."""
    rows = [corpus.rows[i] for i in indices]
    e, probabilities = config.evaluation, np.exp(log_p[:, 0]).clip(0, 1)
    scores = metrics.judge(
        labels,
        probabilities,
        [row["person"] for row in rows],
        [row["database"] for row in rows],
        [row["labels"].get("class", "") for row in rows],
        threshold=e.threshold,
        resamples=e.resamples,
        seed=config.seed,
    )
    patients = judge_patients(rows, labels, probabilities, config.task.target, e.threshold, e.resamples, config.seed)
    return scores | ({"patients": patients} if patients else {})


def prediction_rows(
    corpus: Corpus, indices: np.ndarray, labels: np.ndarray, log_p: np.ndarray, threshold: float, split: str
):
    """Rows of predictions.csv (FIELDS); a recording without a label has an empty one."""
    for i, label, answer in zip(indices, labels, log_p, strict=True):
        row, probability = corpus.rows[i], float(np.exp(answer[0]))
        yield {
            "id": row["id"],
            "person": row["person"],
            "database": row["database"],
            "class": row["labels"].get("class", ""),
            "label": "" if np.isnan(label) else int(label),
            "probability": f"{probability:.9g}",
            "decision": int(probability >= threshold),
            "split": split,
            "path": row["path"],
        }


def write_table(rows: list[dict], out: pathlib.Path) -> None:
    """Writes rows that all have the first one's names; none is an empty file."""
    names = list(rows[0]) if rows else []
    write_csv(out, names, ([row.get(name, "") for name in names] for row in rows))
