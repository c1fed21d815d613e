"""The classical chain of Kocuvan and Torkar (HEALTHINF 2015): S1 and S2 by Shannon energy, Burg spectra, classifiers.

`pcgjax.train --config=configs/classical.py` runs it; a workdir holds what others hold, and experiment.json: the paper's
ten random splits, by recording as published and by person. The checkpoint is the features that the classifiers were
fitted to, as plain arrays: scikit-learn's objects would have to be pickled, and fitting them again takes a second.

    python -m pcgjax.classical --prepared=DIR

says how well S1 and S2 are found in a prepared data set that has them annotated.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import pathlib
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import tqdm
from absl import app, flags, logging

from pcgjax import (
    checkpoint,
    datasets,
    evaluate,
    files,
    input_pipeline,
    metrics,
    page,
    runs,
    segmentation,
    splits,
)
from pcgjax.datasets import DIASTOLE, S1, SYSTOLE
from pcgjax.features import burg, envelope, filters
from pcgjax.input_pipeline import Corpus

CLASSIFIERS = ("knn", "svm", "mlp", "logistic")
SETS, PROTOCOLS = ("unbalanced", "balanced"), ("record", "person")
SCORES = ("accuracy", "sensitivity", "specificity", "auc")
WORDS = {
    "knn": "kNN", "svm": "SVM, polynomial", "mlp": "MLP", "logistic": "Logistic regression", "accuracy": "Accuracy",
    "sensitivity": "Sensitivity", "specificity": "Specificity", "auc": "AUC",
    "mean_accuracy": "MAcc", "f1": "F1",
}  # fmt: skip
# Its tables 1 and 2, as printed: CA, Sens, Spec, AUC.
PAPER = {
    "unbalanced": {
        "knn": (0.8625, 0.95, 0.60, 0.855), "svm": (0.8375, 0.9833, 0.40, 0.4367),
        "mlp": (0.8375, 0.9833, 0.40, 0.645), "logistic": (0.875, 1.0, 0.40, 0.4367),
    },
    "balanced": {
        "knn": (0.7679, 0.8947, 0.63, 0.7833), "svm": (0.62, 0.8167, 0.63, 0.5083),
        "mlp": (0.7225, 0.9333, 0.45, 0.8917), "logistic": (0.6825, 0.9333, 0.45, 0.675),
    },
}  # fmt: skip
PAPER_NOTE = (
    "The paper prints 100 normal and 166 murmur clips, best of ten runs. Its unbalanced test sets are 80 clips: 0.9833 "
    "is 59 of 60, 0.95 is 57 of 60, 0.60 is 12 of 20, 0.40 is 8 of 20, and 59 + 8 and 57 + 12 of 80 are its 0.8375 and "
    "0.8625. So 60 clips were of the class that it calls positive and 20 of the other: three tenths of 200 and of 66, "
    "which are the counts of clean normal and murmur clips in the published set. Its “Sens” is the share of normal "
    "clips found and its “Spec” that of murmurs; here murmur is positive, and the paper's two numbers are set "
    "accordingly. (Logistic regression: 60 + 8 of 80 would be 0.85, it prints 0.875.) Always answering “normal” "
    "gets 0.75 on such a test set. The balanced table's fractions fit no one test set."
)


class Features(NamedTuple):
    """Of the n recordings in which a cycle was found."""

    values: np.ndarray  # (n, 2 * bins) float32: mean spectrum of its systoles, and of its diastoles
    indices: np.ndarray  # (n,) into the corpus
    left_out: list[dict[str, str]]  # id and reason of each of the others
    stretches: dict[str, int]  # systoles, diastoles, and those that were too short for the order


# ------------------------------------------------------------------------------------------------------ features


def find_sounds(
    corpus: Corpus, features: ml_collections.ConfigDict, batch: int
) -> list[tuple[list[envelope.Span], float, np.ndarray]]:
    """Of each recording, S1 and S2 as `envelope.pick` finds them, the cycle in seconds, and the envelope (F,).

    Recordings shorter than what the filter needs have no sounds, cycle NaN and an empty envelope.
    Raises:
      ValueError: features.high_hz, filter_order, window_s or hop_s do not fit the corpus' rate.
    """
    f = features
    sos = filters.butterworth(f.filter_order, f.high_hz, corpus.sample_rate_hz, "lowpass")
    where = envelope.frames(f.window_s, f.hop_s, corpus.sample_rate_hz)
    shortest = max(filters.edge_samples(sos) + 1, 3 * where.window)
    usable = np.flatnonzero(corpus.lengths >= shortest)
    order = usable[np.argsort(corpus.lengths[usable], kind="stable")]
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    found: list[tuple[list[envelope.Span], float, np.ndarray]] = [([], float("nan"), np.zeros(0))] * len(corpus.rows)
    if not parts:
        return found
    longest = np.array([corpus.lengths[part].max() for part in parts])
    widths = np.array(input_pipeline.choose_capacities(longest, most=6))
    calls = []
    for part, samples in zip(reversed(parts), reversed(longest), strict=True):
        x = np.zeros((batch, widths[np.searchsorted(widths, samples)]), np.int16)
        lengths = np.zeros(batch, np.int32)
        for row, index in enumerate(part):
            lengths[row] = corpus.lengths[index]
            x[row, : lengths[row]] = corpus.read(int(index))
        calls.append((x, lengths, (f.filter_order, f.high_hz), where))
    for part, (_, lengths, *_), (e, cycles) in zip(
        reversed(parts), calls, _side_by_side(_envelopes, calls), strict=True
    ):
        counts = where.count(lengths)
        thresholds = envelope.threshold(e, counts)
        for row, index in enumerate(part):
            own, cycle = e[row, : counts[row]], float(cycles[row])
            level = float(thresholds[row]) if np.isinf(f.threshold) else f.threshold
            found[index] = envelope.pick(own, where.step_s, level, cycle), cycle, own
    return found


def _side_by_side(function: Callable, calls: Sequence[tuple]) -> Iterator[Any]:
    """What a jitted function answers to each call, on the host and in order. From one thread a CPU computes one call
    after the other, mostly on one core; the caller goes on with the first answers while others are computed."""
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda arguments: jax.tree.map(np.asarray, function(*arguments)), calls)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _envelopes(x_BxT: Any, lengths_B: Any, lowpass: tuple[int, float], where: envelope.Frames) -> tuple[Any, Any]:
    sos = filters.butterworth(*lowpass, where.sample_rate_hz, "lowpass")
    e = envelope.shannon_envelope(x_BxT, lengths_B, sos, where)
    return e, envelope.cycle_s(e, where.count(lengths_B), where.step_s)


_LANES = 128  # stretches that go through the lattice together


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _spectra(x_BxT: Any, lengths_B: Any, order: int, nfft: int, sample_rate_hz: int) -> jax.Array:
    k, variance = burg.burg(x_BxT, lengths_B, order)
    return burg.power_spectrum(k, variance, nfft, sample_rate_hz)


def features(corpus: Corpus, config: ml_collections.ConfigDict) -> Features:
    """The published features: Burg power spectra of systole and diastole, mean over a recording's cycles.

    The spectra are those of the recording as it is (no low-pass) over its largest sample. A stretch of no more
    samples than the Burg order is left out and counted, and so is a recording in which that leaves no systole or no
    diastole.
    Raises:
      ValueError: a field of config.features that fits no data.
    """
    f, rate = config.features, corpus.sample_rate_hz
    burg.check(f.burg_order, f.burg_order + 1)
    if f.nfft < 2:
        raise ValueError(f"features.nfft={f.nfft}: must be at least 2")
    if not f.threshold > -np.inf:
        raise ValueError(f"features.threshold={f.threshold}: a level of the standardised envelope, or inf: found in it")
    order, stretches = f.burg_order, list[np.ndarray]()
    owner, kind, reasons, short = [], [], {}, 0
    for index, (sounds, cycle, _) in enumerate(find_sounds(corpus, f, config.train.batch_recordings)):
        cut, lacking, before = None, {SYSTOLE: "systole", DIASTOLE: "diastole"}, short
        for start_s, end_s, state in envelope.states(sounds, cycle):
            if state in (SYSTOLE, DIASTOLE):
                first, stop = round(start_s * rate), round(end_s * rate)
                if stop - first <= order:
                    short += 1
                    continue
                if cut is None:
                    samples = corpus.read(index).astype(np.float32)
                    cut = samples / np.abs(samples).max()
                stretches.append(cut[first:stop])
                owner.append(index)
                kind.append(state == DIASTOLE)
                lacking.pop(state, None)
        if lacking:
            why = f" of more than {f.burg_order} samples" if short > before else " between the sounds found"
            reasons[index] = "no cycle found" if not sounds else f"no {' and no '.join(lacking.values())}{why}"
    kept = np.array([i for i in range(len(corpus.rows)) if i not in reasons], np.int32)
    used = np.isin(owner, kept) if owner else np.zeros(0, bool)
    numbers = np.flatnonzero(used)
    bins = f.nfft // 2 + 1
    lengths = np.array([len(stretches[i]) for i in numbers], np.int32)
    ordered = numbers[np.argsort(lengths, kind="stable")]
    parts = [ordered[i : i + _LANES] for i in range(0, len(ordered), _LANES)]
    longest = np.array([len(stretches[part[-1]]) for part in parts])
    widths = np.array(input_pipeline.choose_capacities(longest, most=4)) if parts else longest
    calls = []
    for part, samples in zip(parts, longest, strict=True):
        x = np.zeros((_LANES, widths[np.searchsorted(widths, samples)]), np.float32)
        n = np.zeros(_LANES, np.int32)
        for row, i in enumerate(part):
            n[row] = len(stretches[i])
            x[row, : n[row]] = stretches[i]
        calls.append((x, n, order, f.nfft, rate))
    owners, kinds = np.array(owner, int), np.array(kind, int)
    values = np.zeros((len(kept), 2, bins))
    if parts:
        answers = zip(parts, _side_by_side(_spectra, calls), strict=True)
        of_all = np.concatenate([spectra[: len(part)] for part, spectra in answers])
        # Recording by recording, its systoles before its diastoles; each kept one has both.
        group = 2 * owners[ordered] + kinds[ordered]
        by_group = np.argsort(group, kind="stable")
        begins = np.flatnonzero(np.diff(group[by_group], prepend=-1))
        count = np.diff(begins, append=len(group))[:, None]
        values = np.add.reduceat(of_all[by_group], begins, axis=0, dtype=np.float64) / count
    values = 10 * np.log10(values + 1e-20) if f.decibels else values
    left_out = [{"id": corpus.rows[i]["id"], "reason": reasons[i]} for i in sorted(reasons)]
    counted = {"systoles": int((kinds[numbers] == 0).sum()), "diastoles": int(kinds[numbers].sum()), "too_short": short}
    return Features(values.reshape(len(kept), 2 * bins).astype(np.float32), kept, left_out, counted)


# --------------------------------------------------------------------------------------------------- classifiers


def make_classifier(name: str, config: ml_collections.ConfigDict, seed: int) -> Any:
    """A scikit-learn pipeline: every attribute to [0, 1] by its range in training, then the classifier.

    Not published, and so as in Orange 2, which the paper used, or scikit-learn's default: the SVM's degree and C, the
    MLP's sigmoids and L-BFGS.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler
    from sklearn.svm import SVC

    m = config.model
    if name == "knn":
        chosen: Any = KNeighborsClassifier(m.neighbours)
    elif name == "svm":
        chosen = SVC(kernel="poly", degree=m.svm_degree, tol=m.svm_tolerance)
    elif name == "mlp":
        chosen = MLPClassifier(
            (m.hidden,), activation="logistic", solver="lbfgs", alpha=m.mlp_regularisation,
            max_iter=config.train.epochs, random_state=seed,
        )  # fmt: skip
    else:
        chosen = LogisticRegression(C=m.logistic_c, max_iter=5000)
    return make_pipeline(MinMaxScaler(), chosen)


def fit(name: str, config: ml_collections.ConfigDict, seed: int, x: np.ndarray, y: np.ndarray) -> Callable:
    """A fitted classifier as a function: (n, attributes) -> (n,) probabilities of class 1.

    The SVM's is the logistic function of its margin: right in order and at 0.5, but not calibrated.
    Raises:
      SplitError: fewer recordings of a class than kNN has neighbours to look at.
    """
    import scipy.special
    import sklearn.exceptions
    import threadpoolctl

    counts = np.bincount(np.asarray(y, int), minlength=2)
    if counts.min() < 1 or len(y) < config.model.neighbours:
        raise splits.SplitError(
            f"{counts[0]} and {counts[1]} recordings of the two classes to fit to: too few for "
            f"model.neighbours={config.model.neighbours}; use more data or other fractions"
        )
    # A product here takes less than waking a second thread.
    with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1):
        # The paper's own limit of iterations, and small ones asked for, are meant to be reached.
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        model = make_classifier(name, config, seed).fit(x, y)
    if name == "svm":
        return lambda x: scipy.special.expit(model.decision_function(x))
    return lambda x: model.predict_proba(x)[:, 1]


# -------------------------------------------------------------------------------------------- the paper's experiment


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
        key = jax.random.fold_in(jax.random.key(config.seed), runs.SHUFFLE)
        corpus = input_pipeline.in_rows(corpus, runs.shuffle_labels(corpus.rows, target, key))
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
    made = made or features(corpus, config)
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


# ---------------------------------------------------------------------------------------------------------- a run


def run(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, dry_run: bool = False) -> dict[str, Any]:
    """Fits the four classifiers on a split, keeps the one best on validation, judges it, and repeats the experiment.

    Returns what metrics.json holds, {} for a dry run. It has beside what every run's has: `classifiers`, validation
    and test scores of all four, and `features`, what was left out.
    Raises:
      ValueError: bad fields or data; SplitError: people or recordings of a class are too few.
      CheckpointError: the folder holds another experiment.
    """
    workdir = pathlib.Path(workdir)
    _check(config)
    if not config.data.prepared:
        raise ValueError("data.prepared is empty: give --config.data.prepared=DIR, a folder that pcgjax.prepare wrote")
    corpus, target = selected(input_pipeline.from_prepared(config.data.prepared), config)
    if dry_run:
        print(
            f"{len(corpus.rows)} recordings, {corpus.lengths.sum() / corpus.sample_rate_hz:.0f} s at "
            f"{corpus.sample_rate_hz} Hz; {2 * (config.features.nfft // 2 + 1)} attributes each; four classifiers on "
            "the host, nothing to compile for a mesh"
        )
        return {}
    now = runs.plain_config(config)
    if (workdir / "config.json").exists():
        saved = json.loads((workdir / "config.json").read_text())
        runs.refuse_changes(saved, {**now, "optimizer": {}}, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    files.write_text(workdir / "config.json", json.dumps(now, indent=1))
    runs.record(workdir, config)
    made = features(corpus, config)
    for one in made.left_out:
        logging.warning("left out: %s: %s", one["id"], one["reason"])
    if not len(made.indices):
        raise ValueError(
            f"data.prepared={config.data.prepared}: no cycle was found in any of {len(corpus.rows)} recordings"
        )
    rows = [corpus.rows[i] for i in made.indices]
    y = np.array([int(row["labels"][target]) for row in rows])
    # Divided with those left out, so that one split file serves other systems as well.
    split = _split(config, workdir, corpus.rows, target)
    place = {row["id"]: i for i, row in enumerate(rows)}
    parts = {part: np.array([place[id] for id in split[part] if id in place], np.int32) for part in splits.PARTS}

    history = workdir / "metrics.jsonl"
    history.unlink(missing_ok=True)  # a run is made anew as a whole
    fitted, results = {}, {}
    for step, name in enumerate(CLASSIFIERS, 1):
        answer = fit(name, config, config.seed, made.values[parts["train"]], y[parts["train"]])
        p = {part: np.clip(answer(made.values[i]), 1e-6, 1 - 1e-6) for part, i in parts.items()}
        scores = {part: metrics.binary(y[i], p[part], config.evaluation.threshold) for part, i in parts.items()}
        for part, i in parts.items():
            loss = float(-np.log(np.where(y[i] == 1, p[part], 1 - p[part])).mean())
            runs.log_line(history, step, part, {"loss": loss, **{m: scores[part][m] for m in metrics.METRICS}})
        fitted[name], results[name] = p, scores
    worth = {name: results[name]["validation"][config.train.select] for name in CLASSIFIERS}
    best = max(CLASSIFIERS, key=lambda name: -np.inf if np.isnan(worth[name]) else worth[name])

    own = corpus.subset(made.indices)
    judged, table = {}, []
    for part in ("validation", "test"):
        p, i = fitted[best][part], parts[part]
        log_p = np.log(np.stack([p, 1 - p], 1))
        judged[part] = evaluate.judge(own, i, y[i], log_p, config)
        table += evaluate.table(own, i, y[i], log_p, config.evaluation.threshold, part)
    evaluate.write_table(table, workdir / "predictions.csv")
    _save(workdir, config, best, target, corpus.sample_rate_hz, made.values[parts["train"]], y[parts["train"]])
    pictures = _pictures(corpus, config, made, y)
    with files.replacing(workdir / "pictures.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **pictures)
    asked = None
    if config.experiment.runs:
        asked = experiment(own, config, made._replace(indices=np.arange(len(rows), dtype=np.int32)))
    files.write_text(workdir / "experiment.json", json.dumps(asked, indent=1))
    result = metrics.json_ready({
        **judged,
        "classifiers": {name: {part: {m: s[m] for m in metrics.METRICS} for part, s in of.items()}
                        for name, of in results.items()},
        "chosen": best,
        "features": {"left_out": made.left_out, **made.stretches},
        "picking": picking(corpus, config) if _annotated(corpus) else None,
        "split": {k: split[k] for k in ("kind", "notes", "counts", "people_apart", "leaks")},
        "data": {"prepared": config.data.prepared, "recordings": len(corpus.rows), "sample_rate_hz":
                 corpus.sample_rate_hz, "target": target},
        "system": {"command": shlex.join(sys.orig_argv), **runs.versions(), "wall_s": time.monotonic() - began},
    })  # fmt: skip
    files.write_text(workdir / "metrics.json", json.dumps(result, indent=1))
    write_report(workdir)
    return result


def _check(config: ml_collections.ConfigDict) -> None:
    limits = {("train", "epochs"): 1, ("train", "batch_recordings"): 1, ("model", "neighbours"): 1,
              ("model", "hidden"): 1, ("evaluation", "resamples"): 1, ("experiment", "runs"): 0}  # fmt: skip
    for (part, field), least in limits.items():
        if config[part][field] < least:
            raise ValueError(f"{part}.{field}={config[part][field]}: must be at least {least}")
    if config.experiment.runs == 1:
        raise ValueError("experiment.runs=1: one run has no deviation; choose 0, for none, or at least 2")
    if not 0 <= config.evaluation.threshold <= 1:
        raise ValueError(f"evaluation.threshold={config.evaluation.threshold}: must lie between 0 and 1")
    if config.train.select not in metrics.METRICS:
        raise ValueError(f"train.select={config.train.select!r}: choose one of {', '.join(metrics.METRICS)}")
    if config.parallel.strategy not in ("jit", "pmap"):
        raise ValueError(f"parallel.strategy={config.parallel.strategy!r}: choose jit or pmap")


def _split(config: ml_collections.ConfigDict, workdir: pathlib.Path, rows: list[dict], target: str):
    s = config.split
    path = pathlib.Path(s.file or workdir / "split.json")
    if path.exists():
        split = splits.load(path, rows)
    else:
        split = splits.make(
            rows, s.kind, target, config.seed, tuple(s.fractions), s.fold, s.folds, s.database or None, s.names or None
        )
        splits.save(split, path)
    leaks = splits.check(split, rows, allow=s.allow_leaks)
    for leak in leaks:
        logging.warning("leak: %s", leak)
    return {**split, "leaks": leaks, "people_apart": not leaks and split["kind"] != "paper301"}


def _save(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, name: str, target: str, rate_hz: int, x: Any, y: Any
) -> None:
    meta = {"config": runs.plain_config(config), "classifier": name, "target": target, "sample_rate_hz": rate_hz}
    with files.replacing(workdir / "checkpoints" / "best.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, features=x, labels=y, meta=np.array(json.dumps(meta)))


def load(
    workdir: str | pathlib.Path,
) -> tuple[ml_collections.ConfigDict, bool, int, Callable[[Corpus], np.ndarray]]:
    """The classifier that `run` kept, as `evaluate.load_answerer` wants it; recordings without a cycle get NaN.

    Fitted again to the features that `run` saved: the same numbers in, the same classifier out.
    Raises:
      CheckpointError: not what `run` wrote.
    """
    path = pathlib.Path(workdir) / "checkpoints" / "best.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y, meta = file["features"], file["labels"], json.loads(str(file["meta"]))
    except Exception as error:  # numpy and zipfile raise half a dozen kinds
        raise checkpoint.CheckpointError(f"{path}: not what training wrote ({error}); train again") from None
    config = ml_collections.ConfigDict(meta["config"])
    config.task.target = meta["target"]
    probabilities = fit(meta["classifier"], config, config.seed, x, y)

    def answer(corpus: Corpus) -> np.ndarray:
        made = features(corpus, config)
        log_p = np.full((len(corpus.rows), 2), np.nan)
        if len(made.indices):
            p = np.clip(probabilities(made.values), 1e-6, 1 - 1e-6)
            log_p[made.indices] = np.log(np.stack([p, 1 - p], 1))
        return log_p

    return config, True, meta["sample_rate_hz"], answer


# ------------------------------------------------------------------------------------------- how well sounds are found


def _annotated(corpus: Corpus) -> list[int]:
    return [i for i, row in enumerate(corpus.rows) if row["annotations"]]


def picking(corpus: Corpus, config: ml_collections.ConfigDict, resamples: int = 0) -> dict[str, Any]:
    """The picked S1 and S2 beside the annotated ones, in the recordings that have any.

    Of annotated states: what `segmentation.summarise` says. Of marks without length, as PASCAL's set A has: F1 of S1
    and S2, and of sounds whichever they are, within 60 and 100 ms from the middle of the picked sound to the mark,
    between the first and the last mark.
    Raises:
      ValueError: no recording is annotated.
    """
    own = _annotated(corpus)
    if not own:
        raise ValueError("no recording is annotated: S1 and S2 cannot be judged")
    part = corpus.subset(np.array(own))
    scores, persons, none, step_s = [], [], 0, 0.005
    marked: collections.Counter[tuple[str, int]] = collections.Counter()
    for row, (sounds, cycle, _), length in zip(
        part.rows, find_sounds(part, config.features, config.train.batch_recordings), part.lengths, strict=True
    ):
        none += not sounds
        spans = [tuple(span) for span in row["annotations"]]
        if any(start < end for start, end, _ in spans):
            frames = int(length / part.sample_rate_hz / step_s)
            truth = segmentation.frame_states(spans, frames, step_s)
            found = segmentation.frame_states(envelope.states(sounds, cycle), frames, step_s)
            scores.append(segmentation.score(truth, found, step_s))
            persons.append(row["person"])
        else:
            marked.update(_mark_counts(spans, sounds))
    result: dict[str, Any] = {"recordings": len(own), "no_cycle_found": none}
    if scores:
        result["annotated"] = segmentation.summarise(scores, persons, resamples)
    if marked:
        result["marks"] = {
            f"{what}_f1_{ms}ms": 2 * marked[what, ms] / (marked["called", ms] + marked["true", ms])
            for what in ("sound", "S1_S2") for ms in segmentation.TOLERANCES_MS
        }  # fmt: skip
    return metrics.json_ready(result)


def _mark_counts(marks: Sequence[tuple], sounds: Sequence[envelope.Span]) -> dict[tuple[str, int], int]:
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    middles = [((start + end) / 2, sound) for start, end, sound in sounds]
    for ms in segmentation.TOLERANCES_MS:
        near, true = ms / 1000, [(start, sound) for start, _, sound in marks]
        called = [m for m in middles if true[0][0] - near <= m[0] <= true[-1][0] + near]
        counts["true", ms], counts["called", ms] = len(true), len(called)
        for what, kinds in (("sound", [None]), ("S1_S2", [S1, datasets.S2])):
            for kind in kinds:
                a, b = ([t for t, sound in of if kind in (None, sound)] for of in (true, called))
                counts[what, ms] += _pairs(a, b, near)
    return counts


def _pairs(a: Sequence[float], b: Sequence[float], near: float) -> int:
    i = j = pairs = 0
    while i < len(a) and j < len(b):
        if abs(a[i] - b[j]) <= near:
            pairs, i, j = pairs + 1, i + 1, j + 1
        elif b[j] < a[i]:
            j += 1
        else:
            i += 1
    return pairs


# ------------------------------------------------------------------------------------------------------ the page

_SHOWN_S = 5.0


def _pictures(corpus: Corpus, config: ml_collections.ConfigDict, made: Features, y: np.ndarray) -> dict[str, Any]:
    """Arrays for `write_report`: mean spectra in dB by class, and a recording's samples, envelope and sounds."""
    spectra = made.values if config.features.decibels else 10 * np.log10(made.values + 1e-20)
    shown: dict[str, Any] = {
        "frequencies_hz": np.fft.rfftfreq(config.features.nfft, 1 / corpus.sample_rate_hz),
        "spectra_db": np.stack([spectra[y == v].reshape((y == v).sum(), 2, -1).mean(0) for v in (0, 1)]),
        "sample_rate_hz": corpus.sample_rate_hz,
    }
    # Of each class the one nearest to the class' mean among those long enough to be seen.
    for value, name in enumerate(("normal", "murmur")):
        own = np.flatnonzero(y == value)
        off = ((spectra[own] - spectra[own].mean(0)) ** 2).sum(1)
        long = corpus.lengths[made.indices[own]] >= _SHOWN_S * corpus.sample_rate_hz
        index = int(made.indices[own[np.where(long.any() & ~long, np.inf, off).argmin()]])
        one = corpus.subset(np.array([index]))
        [(sounds, cycle, e)] = find_sounds(one, config.features, 1)
        shown |= {f"{name}_id": np.array(one.rows[0]["id"]), f"{name}_samples": one.read(0).astype(np.float32),
                  f"{name}_envelope": e, f"{name}_states": np.array(envelope.states(sounds, cycle))}  # fmt: skip
    step = envelope.frames(config.features.window_s, config.features.hop_s, corpus.sample_rate_hz)
    return shown | {"step_s": step.step_s, "window_s": step.window / corpus.sample_rate_hz}


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
    """Draws `workdir/report.html` from what `run` left there, and returns its path."""
    workdir = pathlib.Path(workdir)
    results = json.loads((workdir / "metrics.json").read_text())
    asked = json.loads((workdir / "experiment.json").read_text())
    with np.load(workdir / "pictures.npz", allow_pickle=False) as file:
        shown = {name: file[name] for name in file.files}
    positive = results["data"]["target"]
    sections = []
    if asked:
        sections.append(("experiment", "The paper's experiment", "".join(_tables(asked)) + reading(asked)))
    sections += [
        ("split", "On people not heard", _four(results)),
        ("sounds", "S1 and S2 on the envelope", envelope_figures(shown, positive) + _picked(results["picking"])),
        ("spectra", "Spectra of systole and diastole", spectra_figure(shown, positive)),
        ("setup", "Setup", _setup(results, (workdir / "config.json").read_text())),
    ]
    test = results["test"]
    counts = f"{test['recordings']} test recordings, {page.count(test['people'], 'person', 'people')}"
    files.write_text(workdir / "report.html", page.document(f"Run {workdir.resolve().name}", counts, sections))
    return workdir / "report.html"


def _tables(asked: Mapping[str, Any]) -> list[str]:
    parts = []
    for of_set in SETS:
        rows = {(r["classifier"], r["protocol"]): r for r in asked["rows"] if r["set"] == of_set}
        body = []
        for name in CLASSIFIERS:
            record, person = (rows[name, protocol] for protocol in PROTOCOLS)
            by_record, by_person = ([row["scores"][m] for m in SCORES] for row in (record, person))
            if "paper" in record:
                body.append([f"{WORDS[name]}: paper", *(page.number(record["paper"][m]) for m in SCORES)])
            body.append([f"{WORDS[name]}: by recording, best", *(page.number(s["best"]) for s in by_record)])
            means = (f"{page.number(s['mean'])}<small>± {page.number(s['deviation'])}</small>" for s in by_record)
            body.append([f"{WORDS[name]}: by recording", *means])
            honest = (
                f"<b>{page.number(s['mean'])}</b><small>{page.interval(s['low'], s['high'])}</small>" for s in by_person
            )
            body.append([f"<b>{WORDS[name]}: by person</b>", *honest])
        trivial = next(t["scores"] for t in asked["trivial"] if (t["set"], t["protocol"]) == (of_set, "person"))
        body.append(["<i>always the commoner class</i>", *(page.number(trivial[m]) for m in SCORES)])
        c = asked["counts"][of_set]
        counted = " and ".join(
            f"{n} {word} recordings of {page.count(p, 'person', 'people')}"
            for word, n, p in zip(("normal", asked["target"]), c["recordings"], c["people"], strict=True)
        )
        parts.append(
            f"<h3>{of_set.capitalize()} set: {counted}</h3>{page.table(['', *(WORDS[m] for m in SCORES)], body)}"
        )
    return parts


def reading(asked: Mapping[str, Any]) -> str:
    """HTML that says how to read the tables of an experiment.json."""
    says = [
        f"{asked['runs']} random splits, {asked['test_share']:.0%} to test. “Best” is the run of best accuracy of "
        "those split by recording, what the paper reports; “by recording” is their mean and deviation.",
        "“By person” is the honest row: nobody is in training and in test. Its interval widens that of the runs' "
        "mean for the recordings that the runs share (Nadeau and Bengio 2003); it does not cover another stethoscope.",
    ]
    if any("paper" in row for row in asked["rows"]):
        says.append(PAPER_NOTE)
    left = asked["left_out"]
    names = ", ".join(f"{one['id']} ({one['reason']})" for one in left)
    says.append(f"Left out: {len(left)}{': ' + names if left else ''}.")
    s = asked["stretches"]
    says.append(
        f"{s['systoles']} systoles and {s['diastoles']} diastoles, {s['too_short']} shorter than the Burg order."
    )
    items = "".join(f"<li>{page.escape(text)}</li>" for text in says)
    return f'<div class="card prose"><h3>How to read this</h3><ul>{items}</ul></div>'


def _four(results: Mapping[str, Any]) -> str:
    chosen, judged = results["chosen"], results["test"]["overall"]
    shown = ("auc", "accuracy", "mean_accuracy", "f1", "sensitivity", "specificity")
    body = []
    for name, of in results["classifiers"].items():
        own = name == chosen
        cells = [page.score(judged[m]) if own else page.number(of["test"][m]) for m in shown]
        body.append([f"<b>{WORDS[name]}</b><small>best on validation, kept</small>" if own else WORDS[name], *cells])
    for name, of in results["test"]["trivial"].items():
        body.append([f"<i>{page.escape(name.replace('_', ' '))}</i>", *(page.number(of[m]) for m in shown)])
    note = "Intervals hold 95 % of the scores when people are drawn anew with replacement. One split: differences "
    return page.table(["Classifier", *(WORDS[m] for m in shown)], body) + (
        f'<p class="small">{note}between classifiers here are mostly chance.</p>'
    )


def envelope_figures(shown: Mapping[str, Any], positive: str) -> str:
    """HTML of a normal and a positive clip with the sounds that were found on their envelopes."""
    return "".join(
        _envelope_figure({k: shown[f"{name}_{k}"] for k in ("id", "samples", "envelope", "states")}, shown, word)
        for name, word in (("normal", "normal"), ("murmur", positive))
    )


def _envelope_figure(one: Mapping[str, Any], shown: Mapping[str, Any], word: str) -> str:
    from matplotlib.patches import Patch

    rate, name = float(shown["sample_rate_hz"]), str(one["id"])
    samples = one["samples"][: int(_SHOWN_S * rate)]
    end_s = len(samples) / rate
    block = max(1, len(samples) // 1800)
    used = samples[: len(samples) // block * block].reshape(-1, block)
    e = one["envelope"][: int(end_s / shown["step_s"])]
    kinds = {"S1": (S1, page.BLUE), "systole": (SYSTOLE, page.TEAL), "S2": (datasets.S2, page.ORANGE),
             "diastole": (DIASTOLE, page.LINE)}  # fmt: skip

    def paint(figure: Any) -> None:
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[1.3, 1.3, 0.4])
        top.fill_between(np.arange(len(used)) * block / rate, used.min(1), used.max(1), color=page.MUTED, linewidth=0.7)
        middle.plot(np.arange(len(e)) * shown["step_s"] + shown["window_s"] / 2, e, color=page.INK, linewidth=1.2)
        for state, colour in kinds.values():
            bars = [(a, b - a) for a, b, s in one["states"] if s == state and a < end_s]
            bottom.broken_barh(bars, (0, 1), facecolors=colour, linewidth=0)
        for start, stop, state in one["states"]:
            if state in (S1, datasets.S2) and stop <= end_s:
                first = round(start / shown["step_s"])
                last = max(round(stop / shown["step_s"]), first + 1)
                at = first + int(np.argmax(e[first:last])) if first < len(e) else None
                if at is not None:
                    middle.plot([at * shown["step_s"] + shown["window_s"] / 2], [e[at]], "o", markersize=6,
                                color=page.BLUE if state == S1 else page.ORANGE)  # fmt: skip
        for ax in (top, bottom):
            ax.set_yticks([])
        for ax in (top, middle, bottom):
            ax.spines["left"].set_visible(False)
            ax.grid(False, axis="y")
        bottom.set_xlim(0, end_s)
        bottom.set_xlabel("s")
        handles = [Patch(color=colour, label=label) for label, (_, colour) in kinds.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=4)

    alt = f"Recording {name}, {word}: samples, Shannon envelope with the picked S1 and S2, and the states between them"
    caption = (
        f"<b>{page.escape(name)}</b>, {page.escape(word)}: samples, standardised Shannon envelope, what was picked."
    )
    return page.card("", page.svg(960, 300, alt, paint), caption)


def _picked(found: Mapping[str, Any] | None) -> str:
    if not found:
        return page.absent("These recordings have no annotated S1 and S2 to compare with.")
    return f'<div class="card"><h3>Beside the annotations</h3>{page.facts(found)}</div>'


def spectra_figure(shown: Mapping[str, Any], positive: str) -> str:
    """HTML of the mean Burg spectra of systole and diastole, normal beside positive."""
    f = shown["frequencies_hz"]

    def paint(figure: Any) -> None:
        for ax, part, title in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("systole", "diastole"), strict=True):
            for value, word, colour in ((0, "normal", page.BLUE), (1, positive, page.ORANGE)):
                ax.plot(f, shown["spectra_db"][value, part], color=colour, label=word)
            ax.set_title(f"{title}, dB")
            ax.set_xlabel("Hz")
            ax.legend(loc="upper right")

    alt = f"Mean Burg spectra of normal and {positive} recordings in systole and in diastole"
    return page.card("", page.svg(960, 320, alt, paint), "Mean over recordings of the spectra in dB of power a Hz.")


def _setup(results: Mapping[str, Any], config: str) -> str:
    system = dict(results["system"])
    command = system.pop("command")
    split = {k: v for k, v in results["split"].items() if k != "notes"}
    cards = "".join(
        f'<div class="card"><h3>{title}</h3>{page.facts(part)}</div>'
        for title, part in {"Data": results["data"], "Split": split, "System": system}.items()
    )
    return (
        f'<h3>Command</h3><pre>{page.escape(command)}</pre><div class="grid three">{cards}</div>'
        f"<details><summary>config.json</summary><pre>{page.escape(config)}</pre></details>"
    )


def summary(results: Mapping[str, Any]) -> str:
    """The main figures, for a terminal."""
    lines = [f"{'test':22s}{'AUC':>8s}{'accuracy':>10s}{'MAcc':>8s}"]
    for name, of in results["classifiers"].items():
        t = of["test"]
        mark = " *" if name == results["chosen"] else ""
        lines.append(f"{WORDS[name] + mark:22s}" + "".join(
            f"{page.number(t[m]):>{width}s}" for m, width in (("auc", 8), ("accuracy", 10), ("mean_accuracy", 8))
        ))  # fmt: skip
    left = results["features"]["left_out"]
    return "\n".join([*lines, f"* best on validation; {len(left)} recordings left out"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}")
    f = {"high_hz": 100.0, "filter_order": 4, "window_s": 0.02, "hop_s": 0.01, "threshold": float("inf")}
    config = ml_collections.ConfigDict({"features": f, "train": {"batch_recordings": 16}})
    corpus = input_pipeline.from_prepared(flags.FLAGS.prepared)
    for database in sorted({corpus.rows[i]["database"] for i in _annotated(corpus)}):
        own = [i for i in _annotated(corpus) if corpus.rows[i]["database"] == database]
        found = picking(corpus.subset(np.array(own)), config)
        told = {**found.get("marks", {}), **{k: v["value"] for k, v in found.get("annotated", {}).items()}}
        keys = ("onset_f1_60ms", "onset_f1_100ms", "onset_recall_60ms", "onset_precision_60ms", "frame_accuracy")
        values = ", ".join(f"{k} {v:.3f}" for k, v in told.items() if k in (*keys, *found.get("marks", ())))
        print(f"{database}: {found['recordings']} recordings, {found['no_cycle_found']} without a cycle; {values}")


if __name__ == "__main__":
    flags.DEFINE_string(
        "prepared", None, "A folder that pcgjax.prepare wrote, with annotated S1 and S2.", required=True
    )
    files.run(main)
