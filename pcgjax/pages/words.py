"""One table of words: how metrics, baselines and decisions are called on every page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pcgjax import metrics

WORDS = {
    "mean_database_auc": "Mean AUC over databases", "auc": "AUC", "auprc": "Average precision",
    "mean_accuracy": "MAcc", "accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1",
    "sensitivity": "Sensitivity", "specificity": "Specificity", "brier": "Brier score",
    "all_present": "always present", "all_absent": "always absent",
    "all_abnormal": "always abnormal", "all_normal": "always normal", "majority": "the majority class",
    "database_prior": "the database alone", "metronome": "a metronome",
    "onset_f1_60ms": "Onset F1 (60 ms)", "onset_f1_100ms": "Onset F1 (100 ms)", "frame_accuracy": "Frame accuracy",
    "S1_onset_f1_60ms": "S1 onset F1 (60 ms)", "S2_onset_f1_60ms": "S2 onset F1 (60 ms)",
    "task_accuracy": "Mean accuracy over tasks", "weighted_accuracy": "Weighted murmur accuracy",
    "cost": "Cost a patient",
    "onset_recall_60ms": "Onset recall (60 ms)", "onset_precision_60ms": "Onset precision (60 ms)",
    "onset_f1_60ms_by_recording": "Onset F1 (60 ms), mean over recordings",
    "frame_accuracy_by_recording": "Frame accuracy, mean over recordings",
    **{f"f1_{name}": f"F1 of {name} over frames" for name in ("S1", "systole", "S2", "diastole")},
    "f1_mean": "Mean of the four", "cycle_error_ms": "Error of a cycle's length (ms)",
    "heart_rate_error": "Error of the heart rate (beats/min)",
}  # fmt: skip
HEADLINE = ("mean_database_auc", "auc", "mean_accuracy", "f1", "accuracy", "auprc", "sensitivity", "specificity")
# Of a segmenter, only in the table of its own page; what comes before them is compared between runs, too.
SEGMENTATION_DETAILS = tuple(WORDS)[list(WORDS).index("onset_recall_60ms") :]
COMPARED = tuple(name for name in WORDS if name not in SEGMENTATION_DETAILS)
LLM_HEADLINE = ("task_accuracy", "weighted_accuracy")
LESS_IS_BETTER = ("loss", "brier")
DECISIONS = ("normal", "abnormal")

# The classical chain's classifiers.
CLASSIFIER_WORDS = {"knn": "kNN", "svm": "SVM, polynomial", "mlp": "MLP", "logistic": "Logistic regression"}
# The parts of the ablation's arms: update of the cell, loss, threshold.
ARM_WORDS = {
    "lstm": "LSTM", "convex": "H∞ convex", "forget": "H∞ forget", "bce": "BCE", "pwl": "PWL", "fixed": "fixed",
    "sapt": "SAPT",
}  # fmt: skip
# The features from which the site report's probe predicts the database.
SITE_WORDS = {
    "trained": "the trained model's features", "untrained": "the same net before training",
    "statistics": "level and power in eight bands",
}  # fmt: skip
# The columns of scores that pcgjax.reproduce sets side by side.
LINES = {
    "paper": "the paper", "ours_paper_protocol": "ours, its protocol", "ours_honest": "ours, held-out people",
    "ours_database_left_out": "ours, held-out database", "trivial": "baseline",
}  # fmt: skip


def word_of(name: str) -> str:
    return WORDS.get(name, name.replace("_", " "))


def best_trivial(test: Mapping[str, Any], metric: str) -> tuple[str, float] | None:
    """(name, value) of the baseline that does best by a score; None for a score of which a baseline can get all."""
    if metric == "mean_database_auc":
        return "the database alone", 0.5
    if metric in ("sensitivity", "specificity", "recall", "precision"):
        return None
    known = {name: metrics.finite(scores.get(metric)) for name, scores in (test.get("trivial") or {}).items()}
    scores = {name: value for name, value in known.items() if value is not None}
    if not scores:
        return None
    best = max(scores, key=lambda name: scores[name])
    return WORDS.get(best, best), scores[best]


def with_chance(scores: Mapping[str, Any]) -> Mapping[str, Any]:
    """A baseline's scores; one that answers alike within a database has an AUC of 0.5 there."""
    return {"mean_database_auc": 0.5, **scores} if "auc" in scores else scores
