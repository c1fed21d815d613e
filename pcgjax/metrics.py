"""Scores of binary decisions on recordings, with intervals over people, and the official Challenge formulas.

A score that is undefined (AUC of one class, precision without a positive decision, ...) is NaN here and `None` (JSON
null) in what `judge` returns, never 0. A recording is decided abnormal when its probability >= threshold. Axes:
R resamples; n recordings; G groups of recordings with equal probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# The scores of one set of recordings, in the order in which tables show them. All lie in [0, 1]; a lower Brier score
# is better. `mean_accuracy` is CinC 2016's MAcc.
METRICS = (
    "accuracy", "auc", "auprc", "precision", "recall", "f1", "sensitivity", "specificity", "mean_accuracy", "brier",
)  # fmt: skip
_CHUNK = 2**21  # resamples x recordings computed at once: 16 MB an array
LEVEL = 0.95


# ---------------------------------------------------------------------------------------------------------------
# Official scores
# ---------------------------------------------------------------------------------------------------------------


def weighted_murmur_accuracy(labels: ArrayLike, outputs: ArrayLike) -> float:
    """Weighted accuracy of murmurs as the PhysioNet Challenge 2022 computes it.

    sum_c w_c A_cc / sum_c w_c N_c with weights 5, 3, 1 for Present, Unknown, Absent; A_cc patients of class c
    called c, N_c patients of class c. As in the official code a row with no positive or several counts as Present.

    Args: labels, outputs: (n, 3) of 0 and 1, classes in the order Present, Unknown, Absent.
    Returns: the score; NaN for n = 0.
    Raises:
      ValueError: another shape, or values other than 0 and 1.
    """
    labels, outputs = _one_hot("labels", labels, 3), _one_hot("outputs", outputs, 3)
    same_length(labels=labels, outputs=outputs)
    weight = np.array([5.0, 3.0, 1.0])
    return float(ratio(((labels & outputs).sum(0) * weight).sum(), (labels.sum(0) * weight).sum()))


def challenge_cost(outcomes: ArrayLike, outputs: ArrayLike) -> float:
    """Mean cost of a patient's screening, the PhysioNet Challenge 2022's outcome score; less is better.

    [10 n + n (25 + 397 r - 1718 r^2 + 11296 r^4) + 10000 TP + 50000 FN] / n with r = (TP + FP) / n, the share
    referred to an expert. As in the official code a row with no positive or both counts as Abnormal.

    Args: outcomes, outputs: (n, 2) of 0 and 1, classes in the order Abnormal, Normal.
    Returns: the cost a patient; NaN for n = 0.
    Raises:
      ValueError: another shape, or values other than 0 and 1.
    """
    outcomes, outputs = _one_hot("outcomes", outcomes, 2), _one_hot("outputs", outputs, 2)
    same_length(outcomes=outcomes, outputs=outputs)
    if not len(outcomes):
        return float("nan")
    abnormal, referred = outcomes[:, 0], outputs[:, 0]
    r, tp, fn = referred.mean(), (abnormal & referred).mean(), (abnormal & ~referred).mean()
    return float(10 + 25 + 397 * r - 1718 * r**2 + 11296 * r**4 + 10_000 * tp + 50_000 * fn)


def mean_accuracy(labels: ArrayLike, decisions: ArrayLike) -> float:
    """MAcc = (sensitivity + specificity) / 2, the score of the PhysioNet/CinC Challenge 2016 without `unsure`.

    Args: labels, decisions: (n,) of 0 (normal) and 1 (abnormal).
    Returns: the score; NaN when a class is absent from `labels`.
    Raises:
      ValueError: another shape, or values other than 0 and 1.
    """
    labels, decisions = _zero_one("labels", labels), _zero_one("decisions", decisions)
    same_length(labels=labels, decisions=decisions)
    tp, fn = (labels & decisions).sum(), (labels & ~decisions).sum()
    tn, fp = (~labels & ~decisions).sum(), (~labels & decisions).sum()
    return float((ratio(tp, tp + fn) + ratio(tn, tn + fp)) / 2)


# ---------------------------------------------------------------------------------------------------------------
# Binary scores
# ---------------------------------------------------------------------------------------------------------------


def binary(labels: ArrayLike, probabilities: ArrayLike, threshold: float = 0.5) -> dict[str, float]:
    """The METRICS, and the counts tp, fp, fn, tn, of one set of recordings.

    Args: labels (n,) of 0 and 1; probabilities (n,) in [0, 1] of being abnormal.
    Raises:
      ValueError: naming the argument that is not so.
    """
    ones = np.ones((1, np.size(labels)))
    return {k: float(v[0]) for k, v in binary_weighted(labels, probabilities, ones, threshold).items()}


def binary_weighted(
    labels: ArrayLike, probabilities: ArrayLike, weights: ArrayLike, threshold: float = 0.5
) -> dict[str, np.ndarray]:
    """As `binary`, for many weightings of the same recordings at once; equal to scikit-learn's `sample_weight`.

    AUC counts a tied pair as one half; AUPRC is the average precision, a sum over distinct probabilities.

    Args: weights (R, n), not negative.
    Returns: each of METRICS and the counts tp, fp, fn, tn: (R,).
    """
    y, p = _scored(labels, probabilities)
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 2 or weights.shape[1] != len(y) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"weights: need (resamples, {len(y)}) values, not negative, got shape {weights.shape}")
    rows = max(1, _CHUNK // max(1, len(y)))
    parts = [_weighted_chunk(y, p, weights[i : i + rows], threshold) for i in range(0, max(1, len(weights)), rows)]
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def _weighted_chunk(y: np.ndarray, p: np.ndarray, w: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    d = p >= threshold
    tp, fp, fn, tn = (w @ cell.astype(np.float64) for cell in (y & d, ~y & d, y & ~d, ~y & ~d))
    total, positive, negative = tp + fp + fn + tn, tp + fn, fp + tn
    sensitivity, specificity = ratio(tp, positive), ratio(tn, negative)
    return {
        "accuracy": ratio(tp + tn, total),
        **_ranking(y, p, w),
        "precision": ratio(tp, tp + fp),
        "recall": sensitivity,
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "mean_accuracy": (sensitivity + specificity) / 2,
        "brier": ratio(w @ (p - y) ** 2, total),
        "tp": tp, "fp": fp, "fn": fn, "tn": tn,
    }  # fmt: skip


def _ranking(y: np.ndarray, p: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    """Weighted AUC and average precision (R,), from one sort of the recordings shared by all weightings."""
    if not len(y):
        return {"auc": np.full(len(w), np.nan), "auprc": np.full(len(w), np.nan)}
    order = np.argsort(-p, kind="stable")
    starts = np.flatnonzero(np.diff(p[order], prepend=np.inf))  # first recording of each group of ties
    w = w[:, order]
    positive_RxG = np.add.reduceat(w * y[order], starts, axis=1)
    all_RxG = np.add.reduceat(w, starts, axis=1)
    negative_RxG = all_RxG - positive_RxG
    above_RxG = np.cumsum(positive_RxG, axis=1)  # positives at or above each probability
    called_RxG = np.cumsum(all_RxG, axis=1)
    positive, negative = positive_RxG.sum(1), negative_RxG.sum(1)
    pairs = (negative_RxG * (above_RxG - positive_RxG / 2)).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision_RxG = np.where(called_RxG > 0, above_RxG / called_RxG, 0.0)
    return {
        "auc": ratio(pairs, positive * negative),
        "auprc": ratio((positive_RxG * precision_RxG).sum(1), positive),
    }


def class_report(labels: ArrayLike, decisions: ArrayLike) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of both classes, and their plain mean, as scikit-learn's report.

    Returns: {"normal" | "abnormal" | "mean": {"precision", "recall", "f1", "support"}}.
    """
    labels, decisions = _zero_one("labels", labels), _zero_one("decisions", decisions)
    same_length(labels=labels, decisions=decisions)
    report = {}
    for name, y, d in (("normal", ~labels, ~decisions), ("abnormal", labels, decisions)):
        hit = (y & d).sum()
        report[name] = {
            "precision": float(ratio(hit, d.sum())),
            "recall": float(ratio(hit, y.sum())),
            "f1": float(ratio(2 * hit, d.sum() + y.sum())),
            "support": int(y.sum()),
        }
    both = [report["normal"], report["abnormal"]]
    mean = {k: sum(r[k] for r in both) / 2 for k in ("precision", "recall", "f1")}
    return report | {"mean": mean | {"support": len(labels)}}


def roc_curve(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(1 - specificity, sensitivity, threshold), each (G + 1,), from nothing called abnormal (inf) to all.

    NaN where the class is absent.
    """
    tp, fp, threshold, y = _counts_down(labels, probabilities)
    return ratio(fp, (~y).sum()), ratio(tp, y.sum()), threshold


def pr_curve(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(recall, precision, threshold), each (G + 1,), recall rising; begins at (0, 1) as is the convention."""
    tp, fp, threshold, y = _counts_down(labels, probabilities)
    precision = ratio(tp, tp + fp)
    precision[0] = 1.0
    return ratio(tp, y.sum()), precision, threshold


def _counts_down(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, ...]:
    y, p = _scored(labels, probabilities)
    order = np.argsort(-p, kind="stable")
    ends = np.flatnonzero(np.diff(p[order], append=-np.inf))
    tp, fp = np.cumsum(y[order])[ends], np.cumsum(~y[order])[ends]
    return np.r_[0, tp], np.r_[0, fp], np.r_[np.inf, p[order][ends]], y


def calibration(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> dict[str, Any]:
    """Reliability curve and expected calibration error over `bins` equal bins of [0, 1], the last one closed.

    ECE = sum_b n_b / n |share abnormal in b - mean probability in b| (Naeini 2015, for the positive class).
    Returns: {"ece", "bins": [{"low", "high", "recordings", "mean_probability", "share_abnormal"}]}; the two means
    of an empty bin are NaN.
    """
    y, p = _scored(labels, probabilities)
    which = np.minimum((p * bins).astype(int), bins - 1)
    count, mass, hits = (np.bincount(which, weights=v, minlength=bins) for v in (np.ones(len(p)), p, y))
    mean, share = ratio(mass, count), ratio(hits, count)
    rows = [
        {"low": b / bins, "high": (b + 1) / bins, "recordings": int(count[b]),
         "mean_probability": float(mean[b]), "share_abnormal": float(share[b])}
        for b in range(bins)
    ]  # fmt: skip
    return {"ece": float(ratio(np.abs(hits - mass).sum(), len(p))), "bins": rows}


# ---------------------------------------------------------------------------------------------------------------
# The judgement of a run
# ---------------------------------------------------------------------------------------------------------------


def draw_people(persons: ArrayLike, databases: ArrayLike, resamples: int, seed: int) -> np.ndarray:
    """Recording weights (resamples, n) of a bootstrap over people: how often the recording's person was drawn.

    Drawn with replacement and stratified by database: each resample has as many people of a database as there
    are. Names are unique within a database: ("circor", "1") and ("pascal-b", "1") are two people.

    Args: persons, databases: (n,) of each recording.
    """
    people, person_of = np.unique(_pairs(persons, databases), axis=0, return_inverse=True)
    person_of = person_of.reshape(-1)  # NumPy 2.0 alone returns another shape here
    times = np.zeros((resamples, len(people)))
    rng = np.random.default_rng(seed)
    for database in np.unique(people[:, 0]):
        members = np.flatnonzero(people[:, 0] == database)
        count = len(members)
        drawn = rng.integers(count, size=(resamples, count)) + count * np.arange(resamples)[:, None]
        times[:, members] = np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count)
    return times[:, person_of]


def judge(
    labels: ArrayLike,
    probabilities: ArrayLike,
    persons: ArrayLike,
    databases: ArrayLike,
    classes: ArrayLike,
    threshold: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The scores of a run: with 95 % intervals, of each database and class, and beside those of baselines.

    Intervals are percentiles over `draw_people`: people are drawn, not recordings, because recordings of one
    person are alike. A resample in which a score is undefined is left out of its interval; when that is more than
    half of them, or when there is one person only, the interval is null.

    Args:
      labels, probabilities, persons, databases, classes: (n,) each, of a recording: 0 or 1, in [0, 1], and text;
        `classes` are the data set's own words ("murmur", "MVP"), which need not be two.
      resamples: 0 for no intervals.

    Returns a JSON-ready dict, undefined numbers None; S = {"value", "low", "high"}:
      overall              {metric of METRICS: S}
      counts               tp, fp, fn, tn
      mean_database_auc    S with "databases": how many have both classes; plain mean of their AUC. A classifier
                           that knows only the database scores 0.5. No interval when one of them has one person
      per_database         {database: {metric: S, "recordings", "people", "positives"}}
      per_class            {class: {"recordings", "mean_probability", "share_abnormal"}}, of `share` decided abnormal
      report               as `class_report`
      calibration          as `calibration`
      trivial              {"all_abnormal" | "all_normal" | "majority" | "database_prior": {metric: number}};
                           baselines; majority and database_prior (probability = the database's share of
                           positives) are fitted on the judged recordings themselves: upper bounds of their kind
      recordings, people, threshold
      intervals            {"level", "resamples", "seed", "unit"}

    Raises:
      ValueError: no recordings, lengths that differ, or values out of range, naming the argument.
    """
    y, p = _scored(labels, probabilities)
    pairs = _pairs(persons, databases)
    words = np.asarray(classes, dtype=str)
    same_length(labels=y, persons=pairs, classes=words)
    if not len(y):
        raise ValueError("labels: no recordings to judge")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: need a probability, got {threshold}")
    weights = draw_people(persons, databases, resamples, seed)
    decided = p >= threshold

    per_database, mean_database_auc = _per_database(y, p, pairs, weights, threshold)
    people = len(np.unique(pairs, axis=0))
    value, drawn = _values_and_draws(y, p, weights if people > 1 else weights[:0], threshold)
    return json_ready(
        {
            "overall": {k: with_interval(value[k], drawn[k]) for k in METRICS},
            "counts": {k: int(value[k]) for k in ("tp", "fp", "fn", "tn")},
            "mean_database_auc": mean_database_auc,
            "per_database": per_database,
            "per_class": {
                str(word): {
                    "recordings": int((words == word).sum()),
                    "mean_probability": p[words == word].mean(),
                    "share_abnormal": decided[words == word].mean(),
                }
                for word in np.unique(words)
            },
            "report": class_report(y, decided),
            "calibration": calibration(y, p),
            "trivial": _baselines(y, pairs[:, 0], threshold),
            "recordings": len(y),
            "people": people,
            "threshold": float(threshold),
            "intervals": {"level": LEVEL, "resamples": resamples, "seed": seed,
                          "unit": "people, stratified by database"},
        }
    )  # fmt: skip


def _per_database(
    y: np.ndarray, p: np.ndarray, pairs: np.ndarray, weights: np.ndarray, threshold: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """`per_database` and `mean_database_auc` of `judge`; weights (R, n)."""
    per_database: dict[str, Any] = {}
    auc, resampled_auc = [], []
    for database in np.unique(pairs[:, 0]):
        inside = pairs[:, 0] == database
        people = len(np.unique(pairs[inside], axis=0))
        # One person drawn again and again would give an interval of no width: no interval then.
        resamples = len(weights) if people > 1 else 0
        value, drawn = _values_and_draws(y[inside], p[inside], weights[:resamples, inside], threshold)
        per_database[str(database)] = {
            **{k: with_interval(value[k], drawn[k]) for k in METRICS},
            "recordings": int(inside.sum()),
            "people": people,
            "positives": int(y[inside].sum()),
        }
        if not np.isnan(value["auc"]):
            auc.append(value["auc"])
            resampled_auc.append(drawn["auc"] if people > 1 else np.full(len(weights), np.nan))
    mean = float(np.mean(auc)) if auc else float("nan")
    drawn_mean = np.mean(resampled_auc, axis=0) if auc else []
    return per_database, {**with_interval(mean, drawn_mean), "databases": len(auc)}


def _baselines(y: np.ndarray, database_of: np.ndarray, threshold: float) -> dict[str, dict[str, float]]:
    """`trivial` of `judge`: the METRICS of each baseline."""
    prior = {database: y[database_of == database].mean() for database in np.unique(database_of)}
    probabilities = {
        "all_abnormal": np.ones(len(y)),
        "all_normal": np.zeros(len(y)),
        "majority": np.full(len(y), float(y.mean() >= 0.5)),
        "database_prior": np.array([prior[database] for database in database_of]),
    }
    # A constant baseline is a decision, not a probability: at any threshold "all normal" stays all normal.
    cut = {name: threshold if name == "database_prior" else 0.5 for name in probabilities}
    return {
        name: {k: v for k, v in binary(y, p, cut[name]).items() if k in METRICS} for name, p in probabilities.items()
    }


def _values_and_draws(
    y: np.ndarray, p: np.ndarray, weights: ArrayLike, threshold: float
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The scores of the recordings as they are, and of each resample (R,)."""
    scores = binary_weighted(y, p, np.concatenate([np.ones((1, len(y))), weights]), threshold)
    return {k: float(v[0]) for k, v in scores.items()}, {k: v[1:] for k, v in scores.items()}


def interval(values: ArrayLike) -> dict[str, float]:
    """Mean, standard deviation and 95 % t interval of the finite ones of some numbers: mean +- t(n - 1) s / sqrt(n).

    NaN for what needs more numbers than there are.
    """
    import scipy.stats

    x = np.asarray(values, float)
    x = x[np.isfinite(x)]
    n = len(x)
    mean = float(x.mean()) if n else math.nan
    deviation = float(x.std(ddof=1)) if n > 1 else math.nan
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n) if n > 1 else math.nan
    return {"mean": mean, "deviation": deviation, "low": mean - half, "high": mean + half, "n": n}


def with_interval(value: float, drawn: ArrayLike) -> dict[str, float]:
    """{"value", "low", "high"}: a score and the 95 % percentile interval of its resampled values `drawn` (R,).

    The bounds are NaN where the score is, or where more than half of the resampled values are.
    """
    drawn = np.asarray(drawn, np.float64)
    defined = drawn[np.isfinite(drawn)]
    if np.isnan(value) or not len(drawn) or len(defined) < len(drawn) / 2:
        low, high = float("nan"), float("nan")
    else:
        low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(value), "low": float(low), "high": float(high)}


def json_ready(value: Any) -> Any:
    """The same dicts and lists with plain numbers, and None for each that is not finite."""
    if isinstance(value, dict):
        return {k: json_ready(v) for k, v in value.items()}
    if isinstance(value, list):
        return [json_ready(v) for v in value]
    if isinstance(value, float):  # np.float64 too
        return float(value) if np.isfinite(value) else None
    return value


# ---------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------


def ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(denominator) > 0, np.asarray(numerator) / denominator, np.nan)


def _zero_one(name: str, values: ArrayLike, ndim: int = 1) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != ndim:
        raise ValueError(f"{name}: need {ndim} axis(es), got shape {values.shape}")
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name}: need only 0 and 1, got {np.unique(values)[:5].tolist()}")
    return values.astype(bool)


def _one_hot(name: str, values: ArrayLike, classes: int) -> np.ndarray:
    """(n, classes) bool with one True a row: the first class where the row has no positive or several."""
    rows = _zero_one(name, values, ndim=2)
    if rows.shape[1] != classes:
        raise ValueError(f"{name}: need (n, {classes}), got shape {rows.shape}")
    return np.where((rows.sum(1) == 1)[:, None], rows, np.arange(classes) == 0)


def _scored(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    y, p = _zero_one("labels", labels), np.asarray(probabilities, np.float64)
    if p.shape != y.shape:
        raise ValueError(f"probabilities: shape {p.shape}, but labels have {y.shape}")
    bad = np.flatnonzero(~((p >= 0) & (p <= 1)))
    if len(bad):
        first = f"first at index {bad[0]}: {p[bad[0]]}"
        raise ValueError(f"probabilities: {len(bad)} of {len(p)} are not in [0, 1], {first}")
    return y, p


def _pairs(persons: ArrayLike, databases: ArrayLike) -> np.ndarray:
    """(n, 2) text: database, person."""
    same_length(persons=persons, databases=databases)
    return np.stack([np.asarray(databases, dtype=str), np.asarray(persons, dtype=str)], axis=-1)


def same_length(**arrays: Any) -> None:
    """Raises ValueError, naming them, where the arrays' lengths differ."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError("lengths differ: " + ", ".join(f"{name} {length}" for name, length in lengths.items()))


def finite(score: Any, key: str = "value") -> float | None:
    """The finite number `key` of a score, which is a number or {"value", "low", "high"}; None where there is none."""
    if isinstance(score, Mapping):
        value = score.get(key)
    else:
        value = score if key == "value" else None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
