"""What the ablation's scores say: differences between arms over seeds, and a sentence for each idea."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax import metrics
from pcgjax.ablation.data import Parts
from pcgjax.data.corpus import Corpus
from pcgjax.metrics import interval
from pcgjax.pages.ablation import ARMS, COMPARED, IDEAS, SCORES, Arm
from pcgjax.pages.words import WORDS


def score(labels: np.ndarray, probabilities: np.ndarray, threshold: float, databases: np.ndarray) -> dict[str, float]:
    """SCORES of recordings (n,) in databases (n,); NaN where undefined. The mean AUC is of those with both classes."""
    scores = metrics.binary(labels, probabilities, threshold)
    members = [databases == name for name in np.unique(databases)]
    auc = [metrics.binary(labels[of], probabilities[of])["auc"] for of in members]
    auc = [value for value in auc if np.isfinite(value)]
    scores["mean_database_auc"] = float(np.mean(auc)) if auc else math.nan
    return {name: scores[name] for name in SCORES}


def judge(
    corpus: Corpus, labels: np.ndarray, parts: Parts, arms: Mapping[Arm, tuple[np.ndarray, np.ndarray]]
) -> tuple[dict, dict]:
    """Scores of every arm, and of baselines that use no sound, on each seed's test part: {name: {score: [S]}} twice.

    The baselines know the test part's own labels, so they are the best of their kind.
    """
    databases = np.array([row["database"] for row in corpus.rows])
    scored: dict[str, list[dict]] = {" ".join(arm): [] for arm in arms}
    trivial: dict[str, list[dict]] = {"all_abnormal": [], "majority": [], "database_prior": []}
    for seed, test in enumerate(parts.test):
        y, of = labels[test], databases[test]
        for arm, (p, threshold) in arms.items():
            scored[" ".join(arm)].append(score(y, p[seed, test], float(threshold[seed]), of))
        prior = {name: y[of == name].mean() for name in np.unique(of)}
        answers = {
            "all_abnormal": np.ones(len(y)),
            "majority": np.full(len(y), float(y.mean() >= 0.5)),
            "database_prior": np.array([prior[name] for name in of]),
        }
        for name, answer in answers.items():
            trivial[name].append(score(y, answer, 0.5, of))
    return _by_score(scored), _by_score(trivial)


def _by_score(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """{name: [scores of a seed]} as {name: {score: [of each seed]}}."""
    return {name: {k: [scores[k] for scores in seeds] for k in SCORES} for name, seeds in rows.items()}


def differences(arms: Mapping[str, Mapping[str, Sequence[float]]], idea: str, metric: str) -> np.ndarray:
    """(S,) what an idea changes in a score, seed by seed: its arms' mean minus the mean of the same arms without it."""
    _, factor, new, old = IDEAS[idea]

    def mean_of(value):
        return np.mean([np.asarray(arms[" ".join(arm)][metric], float) for arm in ARMS if arm[factor] == value], axis=0)

    return mean_of(new) - mean_of(old)


def summarise(results: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Mean, deviation and interval of each arm, idea and trivial answer in each setting, the databases that were left
    out also together (their mean, seed by seed): [{name, title, group, arms, ideas, trivial, ...}].
    """
    left_out = [r for r in results if r["group"] == "leave_database_out"]
    everything = list(results)
    if len(left_out) > 1:
        together = {
            "name": "leave_database_out", "title": f"Databases left out, mean of {len(left_out)}",
            "group": "leave_database_out", "together": True,
            "recordings": left_out[0]["recordings"], "people": left_out[0]["people"], "databases": 1,
            "test_recordings": float(np.sum([r["test_recordings"] for r in left_out])),
        }  # fmt: skip
        for kind in ("arms", "trivial"):
            together[kind] = {
                name: {k: np.mean(np.array([r[kind][name][k] for r in left_out], float), axis=0) for k in SCORES}
                for name in left_out[0][kind]
            }
        everything.insert(everything.index(left_out[0]), together)
    table = []
    for r in everything:
        in_mean = r["group"] == "leave_database_out" and len(left_out) > 1 and not r.get("together")
        table.append({
            **{k: r[k] for k in ("name", "title", "group", "recordings", "people", "databases", "test_recordings")},
            "counts": not in_mean,  # whether the sentences on what held up count it: no database twice
            **{kind: {name: {k: interval(v) for k, v in scores.items()} for name, scores in r[kind].items()}
               for kind in ("arms", "trivial")},
            "ideas": {idea: {k: interval(differences(r["arms"], idea, k)) for k in COMPARED} for idea in IDEAS},
        })  # fmt: skip
    return table


def verdict(idea: str, table: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on whether an idea held up, from the paired intervals: a difference is clear where 0 is outside."""
    clear: dict[str, list[str]] = {"better": [], "worse": []}
    judged = [row for row in table if row["counts"]]
    for row in judged:
        for metric in COMPARED:
            d = row["ideas"][idea][metric]
            words = f"{row['title']}: {WORDS[metric]} {d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
            if d["low"] > 0:
                clear["better"].append(words)
            elif d["high"] < 0:
                clear["worse"].append(words)
    better, worse, n = len(clear["better"]), len(clear["worse"]), len(judged) * len(COMPARED)
    if better and worse:
        word = "mixed"
    elif better:
        word = "held up" if better > n / 2 else "held up in part"
    else:
        word = "did not hold up" if worse else "no clear difference"
    sentence = f"{IDEAS[idea][0]}: {word}. Of {n} comparisons {better} are clearly better and {worse} clearly worse"
    listed = "; ".join(f"{kind}: {', '.join(lines)}" for kind, lines in clear.items() if lines)
    return sentence + (f" ({listed})." if listed else ".")
