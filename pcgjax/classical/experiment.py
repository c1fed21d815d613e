"""The paper's experiment: ten draws of training and test recordings, each classifier on each."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import tqdm

from pcgjax import metrics
from pcgjax.classical.classifiers import fit
from pcgjax.classical.features import Features, classical_features
from pcgjax.classical.selection import selected
from pcgjax.data import splits
from pcgjax.data.corpus import Corpus
from pcgjax.pages.classical import CLASSIFIERS, PROTOCOLS, SCORES, SETS
from pcgjax.published import PAPER


def experiment(corpus: Corpus, config: ml_collections.ConfigDict, features: Features | None = None) -> dict[str, Any]:
    """The paper's experiment on a prepared corpus: four classifiers, two sets, two protocols, repeated random splits.

    Args: features: `classical_features` of `selected(corpus, config)[0]`, where they are there already.
    Returns a JSON-ready dict:
      rows       [{classifier, set: unbalanced or balanced, protocol: record or person, scores: {metric of SCORES:
                 {best, mean, deviation, low, high}}, paper: {metric: number}}]. `best` is of the run with the best
                 accuracy, as published; low and high are a 95 % t interval of the mean, its variance s^2 (1 / runs +
                 n_test / n_train) since the runs share their recordings (Nadeau and Bengio 2003)
      trivial    [{set, protocol, scores: {metric: mean}}] of always answering the class commoner in training
      counts     {set: {normal, murmur: recordings, people_normal, people_murmur}}, and `test` of both
      left_out   [{id, reason}]; stretches as in `Features`; runs, test_share, sample_rate_hz, target
    A murmur (or whatever the target is) is the positive class.
    Raises:
      SplitError: too few people or recordings of a class.
    """
    corpus, target = selected(corpus, config)
    features = features or classical_features(corpus, config)
    rows = [corpus.rows[i] for i in features.indices]
    y = np.array([int(row["labels"][target]) for row in rows])
    e = config.experiment
    if e.runs < 2 or not 0 < e.test_share < 1:
        raise ValueError(
            f"experiment.runs={e.runs}, test_share={e.test_share}: need 2 runs and a share between 0 and 1"
        )
    scores, trivial, sizes = _runs(config, features.values, y, rows, target)
    with_paper = target == "murmur" and any(row["database"] == "pascal-b" for row in rows)
    return metrics.json_ready({
        "rows": [_row(name, of_set, protocol, of_runs, sizes[of_set, protocol], with_paper)
                 for (name, of_set, protocol), of_runs in scores.items()],
        "trivial": [{"set": s, "protocol": p, "scores": {m: float(np.mean([v[m] for v in values])) for m in SCORES}}
                    for (s, p), values in trivial.items()],
        "counts": _counts(y, [row["person"] for row in rows], config.seed, sizes),
        "left_out": features.left_out, "stretches": features.stretches, "runs": e.runs,
        "test_share": e.test_share, "sample_rate_hz": corpus.sample_rate_hz, "target": target,
    })  # fmt: skip


def _runs(
    config: ml_collections.ConfigDict, values: np.ndarray, y: np.ndarray, rows: Sequence[dict], target: str
) -> tuple[dict[tuple, list[dict]], dict[tuple, list[dict]], dict[tuple, tuple[int, int]]]:
    """Fits every classifier to every draw: ({(classifier, set, protocol): [scores of a run]}, the same of the constant
    answer by (set, protocol), {(set, protocol): (training recordings, test recordings)})."""
    e = config.experiment
    scores: dict[tuple, list[dict]] = collections.defaultdict(list)
    trivial: dict[tuple, list[dict]] = collections.defaultdict(list)
    sizes: dict[tuple, tuple[int, int]] = {}
    cases = [(s, p, run) for s in SETS for p in PROTOCOLS for run in range(e.runs)]
    for of_set, protocol, run in tqdm.tqdm(cases, desc="experiment", unit="split", disable=None, leave=False):
        seed = config.seed + run
        drawn = np.arange(len(y)) if of_set == "unbalanced" else _balanced(y, seed)
        test = draw_test([rows[int(i)] for i in drawn], y[drawn], protocol, target, e.test_share, seed)
        train_i, test_i = drawn[~test], drawn[test]
        sizes[of_set, protocol] = len(train_i), len(test_i)
        common = float(y[train_i].mean() > 0.5)
        trivial[of_set, protocol].append(metrics.binary(y[test_i], np.full(len(test_i), common)))
        for name in CLASSIFIERS:
            p = fit(name, config, seed, values[train_i], y[train_i])(values[test_i])
            scores[name, of_set, protocol].append(metrics.binary(y[test_i], p.clip(0, 1), config.evaluation.threshold))
    return scores, trivial, sizes


def _row(
    name: str, of_set: str, protocol: str, scores: Sequence[dict], sizes: tuple[int, int], with_paper: bool
) -> dict[str, Any]:
    """A row of `experiment` from the scores of its runs; sizes: of the training and the test part."""
    best = int(np.argmax([s["accuracy"] for s in scores]))
    n_train, n_test = sizes
    row: dict[str, Any] = {"classifier": name, "set": of_set, "protocol": protocol, "scores": {}}
    for metric in SCORES:
        row["scores"][metric] = {"best": scores[best][metric]} | _resampled(
            [s[metric] for s in scores], n_test / n_train
        )
    if with_paper:
        accuracy, sensitivity, specificity, auc = PAPER[of_set][name]
        # The paper's positive class is the normal one.
        row["paper"] = {"accuracy": accuracy, "sensitivity": specificity, "specificity": sensitivity, "auc": auc}
    return row


def _counts(y: np.ndarray, people: Sequence[str], seed: int, sizes: Mapping[tuple, tuple[int, int]]) -> dict[str, dict]:
    """Of each set the recordings and the people of both classes, and the test recordings of each protocol."""
    counts = {}
    for of_set in SETS:
        drawn = np.arange(len(y)) if of_set == "unbalanced" else _balanced(y, seed)
        counts[of_set] = {"recordings": [int((y[drawn] == v).sum()) for v in (0, 1)],
                          "people": [len({people[int(i)] for i in drawn if y[i] == v}) for v in (0, 1)],
                          "test": {p: sizes[of_set, p][1] for p in PROTOCOLS}}  # fmt: skip
    return counts


def draw_test(rows: Sequence[dict], y: np.ndarray, protocol: str, target: str, share: float, seed: int) -> np.ndarray:
    """(n,) bool: who tests. By recording as published, stratified by class; by person as `splits` deals them.

    Raises:
      SplitError: too few recordings, or people, of a class.
    """
    if protocol == "person":
        # Two of its three parts test together.
        split = splits.make(rows, "person", target, seed, (1 - share, share / 2, share / 2))
        train = set(split["train"])
        return np.array([row["id"] not in train for row in rows])
    rng = np.random.default_rng(seed)
    test = np.zeros(len(y), bool)
    for value in (0, 1):
        of_class = np.flatnonzero(y == value)
        if len(of_class) < 4:
            raise splits.SplitError(
                f"{len(of_class)} recordings with {target} {value}: too few to train and to test on"
            )
        test[rng.permutation(of_class)[: max(round(share * len(of_class)), 1)]] = True
    return test


def _balanced(y: np.ndarray, seed: int) -> np.ndarray:
    """As many recordings of one class as of the other: all of the rarer one."""
    rng = np.random.default_rng(seed)
    each = np.bincount(y, minlength=2).min()
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == value))[:each] for value in (0, 1)]))


def _resampled(values: Sequence[float], test_over_train: float) -> dict[str, float]:
    """Mean, deviation and the widened 95 % interval, within [0, 1], of runs that share their recordings."""
    plain = metrics.interval(values)
    mean, wider = plain["mean"], np.sqrt(1 + plain["n"] * test_over_train)
    return {"mean": mean, "deviation": plain["deviation"], "low": max(mean - wider * (mean - plain["low"]), 0.0),
            "high": min(mean + wider * (plain["high"] - mean), 1.0)}  # fmt: skip
