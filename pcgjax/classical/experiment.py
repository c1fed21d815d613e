"""Ten draws of training and test recordings, each classifier on each."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm

from pcgjax import metrics
from pcgjax.classical.classifiers import fit
from pcgjax.classical.features import Features, classical_features
from pcgjax.data import splits
from pcgjax.data.corpus import Corpus, in_rows
from pcgjax.pages.classical import CLASSIFIERS, PROTOCOLS, SCORES, SETS
from pcgjax.published import PAPER
from pcgjax.runs.data import shuffle_labels
from pcgjax.runs.streams import SHUFFLE


def selected(corpus: Corpus, config: ml_collections.ConfigDict) -> tuple[Corpus, str]:
    """The recordings that config.data and the target choose, and the target's name.

    Raises:
      ValueError: none is left, or an unknown target.
    """
    database = config.data.database
    if not database and any(row["database"] == "pascal-b" for row in corpus.rows):
        database = "pascal-b"
    kept = [
        i
        for i, row in enumerate(corpus.rows)
        if (not database or row["database"] == database)
        and (config.data.noisy or row["labels"].get("noisy") != "1")
    ]  # fmt: skip
    target = config.task.target
    if target == "auto":
        target = "murmur" if any("murmur" in corpus.rows[i]["labels"] for i in kept) else "abnormal"
    if target not in ("murmur", "abnormal"):
        raise ValueError(f"task.target={target!r}: choose murmur, abnormal or auto")
    kept = [i for i in kept if corpus.rows[i]["labels"].get(target) in ("0", "1")]
    if not kept:
        known = ", ".join(sorted({row["database"] for row in corpus.rows}))
        raise ValueError(
            f"data.database={database!r}: no recording with the label {target!r}; choose another of {known}"
        )
    if config.data.shuffle_labels:
        key = jax.random.fold_in(jax.random.key(config.seed), SHUFFLE)
        corpus = in_rows(corpus, shuffle_labels(corpus.rows, target, key))
    return corpus.subset(np.array(kept)), target


def draw(rows: Sequence[dict], y: np.ndarray, protocol: str, target: str, share: float, seed: int) -> np.ndarray:
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
        own = np.flatnonzero(y == value)
        if len(own) < 4:
            raise splits.SplitError(f"{len(own)} recordings with {target} {value}: too few to train and to test on")
        test[rng.permutation(own)[: max(round(share * len(own)), 1)]] = True
    return test


def experiment(corpus: Corpus, config: ml_collections.ConfigDict, made: Features | None = None) -> dict[str, Any]:
    """The paper's experiment on a prepared corpus: four classifiers, two sets, two protocols, repeated random splits.

    Args: made: `features` of `selected(corpus, config)[0]`, where they are there already.
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
    made = made or classical_features(corpus, config)
    rows = [corpus.rows[i] for i in made.indices]
    y = np.array([int(row["labels"][target]) for row in rows])
    e = config.experiment
    if e.runs < 2 or not 0 < e.test_share < 1:
        raise ValueError(
            f"experiment.runs={e.runs}, test_share={e.test_share}: need 2 runs and a share between 0 and 1"
        )
    found: dict[tuple, list[dict]] = collections.defaultdict(list)
    trivial: dict[tuple, list[dict]] = collections.defaultdict(list)
    sizes: dict[tuple, tuple[int, int]] = {}
    cases = [(s, p, run) for s in SETS for p in PROTOCOLS for run in range(e.runs)]
    for of_set, protocol, run in tqdm.tqdm(cases, desc="experiment", unit="split", disable=None, leave=False):
        seed = config.seed + run
        chosen = np.arange(len(y)) if of_set == "unbalanced" else _balanced(y, seed)
        test = draw([rows[i] for i in chosen], y[chosen], protocol, target, e.test_share, seed)
        train_i, test_i = chosen[~test], chosen[test]
        sizes[of_set, protocol] = len(train_i), len(test_i)
        common = float(y[train_i].mean() > 0.5)
        trivial[of_set, protocol].append(metrics.binary(y[test_i], np.full(len(test_i), common)))
        for name in CLASSIFIERS:
            p = fit(name, config, seed, made.values[train_i], y[train_i])(made.values[test_i])
            found[name, of_set, protocol].append(metrics.binary(y[test_i], p.clip(0, 1), config.evaluation.threshold))
    pascal = any(row["database"] == "pascal-b" for row in rows)
    table = []
    for (name, of_set, protocol), scores in found.items():
        best = int(np.argmax([s["accuracy"] for s in scores]))
        n_train, n_test = sizes[of_set, protocol]
        row: dict[str, Any] = {"classifier": name, "set": of_set, "protocol": protocol, "scores": {}}
        for metric in SCORES:
            row["scores"][metric] = {"best": scores[best][metric]} | _resampled(
                [s[metric] for s in scores], n_test / n_train
            )
        if pascal and target == "murmur":
            ca, sens, spec, auc = PAPER[of_set][name]
            row["paper"] = {"accuracy": ca, "sensitivity": spec, "specificity": sens, "auc": auc}
        table.append(row)
    people = [row["person"] for row in rows]
    counts = {}
    for of_set in SETS:
        chosen = np.arange(len(y)) if of_set == "unbalanced" else _balanced(y, config.seed)
        counts[of_set] = {"recordings": [int((y[chosen] == v).sum()) for v in (0, 1)],
                          "people": [len({people[i] for i in chosen if y[i] == v}) for v in (0, 1)],
                          "test": {p: sizes[of_set, p][1] for p in PROTOCOLS}}  # fmt: skip
    return metrics.json_ready({
        "rows": table,
        "trivial": [{"set": s, "protocol": p, "scores": {m: float(np.mean([v[m] for v in values])) for m in SCORES}}
                    for (s, p), values in trivial.items()],
        "counts": counts, "left_out": made.left_out, "stretches": made.stretches, "runs": e.runs,
        "test_share": e.test_share, "sample_rate_hz": corpus.sample_rate_hz, "target": target,
    })  # fmt: skip


def _balanced(y: np.ndarray, seed: int) -> np.ndarray:
    """As many recordings of one class as of the other: all of the rarer one."""
    rng = np.random.default_rng(seed)
    each = np.bincount(y, minlength=2).min()
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == value))[:each] for value in (0, 1)]))


def _resampled(values: Sequence[float], test_over_train: float) -> dict[str, float]:
    plain = metrics.interval(values)
    mean, wider = plain["mean"], np.sqrt(1 + plain["n"] * test_over_train)
    return {"mean": mean, "deviation": plain["deviation"], "low": max(mean - wider * (mean - plain["low"]), 0.0),
            "high": min(mean + wider * (plain["high"] - mean), 1.0)}  # fmt: skip
