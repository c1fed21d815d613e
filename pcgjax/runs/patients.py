"""CirCor's patients: a classifier's answers to their recordings rolled up, and judged as the Challenge 2022 judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pcgjax import metrics
from pcgjax.data import Row

DATABASE = "circor"
RULES: dict[str, Callable[[np.ndarray], float]] = {"max": np.max, "mean": np.mean}  # of a patient's recordings
# Target -> (name of the Challenge's score, the score of (n,) labels and decisions, the baselines' names: all 1, all 0).
SCORES: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], float], tuple[str, str]]] = {
    "murmur": (
        "weighted_accuracy",
        lambda y, d: metrics.weighted_murmur_accuracy(_one_hot(y, 3), _one_hot(d, 3)),
        ("all_present", "all_absent"),
    ),
    "abnormal": (
        "cost",
        lambda y, d: metrics.challenge_cost(_one_hot(y, 2), _one_hot(d, 2)),
        ("all_abnormal", "all_normal"),
    ),
}  # fmt: skip


def judge_patients(
    rows: Sequence[Row], labels: ArrayLike, probabilities: ArrayLike, target: str, threshold: float, resamples: int,
    seed: int,
) -> dict[str, Any] | None:  # fmt: skip
    """The Challenge's score of CirCor's patients among the judged recordings; None where there are none, or no score.

    Args: rows, labels, probabilities: (n,) of the recordings, whose label is 0 or 1. A murmur that the data set calls
      Unknown has no label, so such patients are not judged, and a model of two classes never says Unknown.
    Returns (JSON-ready; S = {"value", "low", "high"}, the interval over resampled patients):
      {"score": its name, "patients", "recordings", "rules": {of RULES: {score: S, "auc": S}},
      "trivial": {baseline: {score: number}}}
    """
    inside = [i for i, row in enumerate(rows) if row["database"] == DATABASE]
    if not inside or target not in SCORES:
        return None
    name, score, constant = SCORES[target]
    people, person_of = np.unique([rows[i]["person"] for i in inside], return_inverse=True)
    y, p = np.asarray(labels)[inside], np.asarray(probabilities)[inside]
    members = [np.flatnonzero(person_of == person) for person in range(len(people))]
    patient_y = np.array([y[of].max() for of in members])
    drawn = np.random.default_rng(seed).integers(len(people), size=(resamples if len(people) > 1 else 0, len(people)))
    rules = {}
    for rule, roll_up in RULES.items():
        patient_p = np.array([roll_up(p[of]) for of in members])
        decided = (patient_p >= threshold).astype(float)
        auc = [metrics.binary(patient_y[of], patient_p[of], threshold)["auc"] for of in drawn]
        rules[rule] = {
            name: metrics.with_interval(score(patient_y, decided), [score(patient_y[of], decided[of]) for of in drawn]),
            "auc": metrics.with_interval(metrics.binary(patient_y, patient_p, threshold)["auc"], auc),
        }
    trivial = {
        baseline: {name: score(patient_y, np.full(len(people), value))}
        for baseline, value in zip(constant, (1.0, 0.0), strict=True)
    }
    return metrics.json_ready(
        {"score": name, "patients": len(people), "recordings": len(inside), "rules": rules, "trivial": trivial}
    )


def _one_hot(positive: np.ndarray, classes: int) -> np.ndarray:
    """(n, classes) with the positive class first and the negative one last."""
    out = np.zeros((len(positive), classes), int)
    out[:, 0], out[:, -1] = positive > 0, positive <= 0
    return out
