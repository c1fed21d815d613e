"""The site report of a run: what its model has learned of the place instead of the patient."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from pcgjax import metrics
from pcgjax.data import splits
from pcgjax.data.corpus import Corpus, from_prepared
from pcgjax.runs.data import refuse_other_recordings
from pcgjax.runs.results import read_json, read_results

FEWEST_PEOPLE = 3  # of a database that the probe is asked about
FOLDS = 5
BANDS_HZ = (20, 40, 60, 90, 130, 190, 280, 400, 500)


def statistics(corpus: Corpus, indices: np.ndarray) -> np.ndarray:
    """(n, 9) float: level in dB, and the power in each of BANDS_HZ in dB below it, of whole recordings."""
    values = np.zeros((len(indices), len(BANDS_HZ)))
    for row, index in enumerate(indices):
        x = corpus.read(int(index)).astype(np.float64) / 32767
        power = np.abs(np.fft.rfft(x - x.mean())) ** 2
        f = np.fft.rfftfreq(len(x), 1 / corpus.sample_rate_hz)
        edges = np.searchsorted(f, BANDS_HZ)
        bands = np.array([power[a:b].sum() for a, b in itertools.pairwise(edges)])
        values[row] = 10 * np.log10(np.r_[power.sum() / len(x) ** 2, bands / max(power.sum(), 1e-20)] + 1e-12)
    return values


def probe(
    x: np.ndarray, databases: Sequence[str], persons: Sequence[str], resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """How well a logistic regression tells from features (n, D) which of K databases a recording is of.

    Attributes are standardised, databases count alike, and nobody is in the part it is fitted to and in the one it is
    judged on: each recording is answered once, in FOLDS folds or as many as the smallest database has people.
    Returns, JSON-ready: databases (K names); balanced_accuracy S, the mean of their recalls, of which chance and every
      constant answer get `chance` = 1 / K; accuracy S and majority_accuracy; confusion (K, K) recordings, truth by
      answer; features, recordings, people, folds. S = {"value", "low", "high"}: over people, as of `metrics.judge`, for
      the answers as they are.
    Raises:
      ValueError: fewer than two databases, or one of fewer than two people.
    """
    import threadpoolctl
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, truth = np.unique(np.asarray(databases, str), return_inverse=True)
    who = np.array([f"{database} {person}" for database, person in zip(databases, persons, strict=True)])
    people = [len(set(who[truth == k])) for k in range(len(names))]
    if len(names) < 2 or min(people) < 2:
        raise ValueError(f"a probe needs two databases of two people each, got {dict(zip(names, people, strict=True))}")
    folds = StratifiedGroupKFold(min(FOLDS, *people), shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced"))
    with threadpoolctl.threadpool_limits(1):  # a product here takes less than waking a second thread
        answer = cross_val_predict(model, x, truth, groups=who, cv=folds)
    hit, of_database = answer == truth, truth == np.arange(len(names))[:, None]
    drawn = metrics.draw_people(persons, databases, resamples, seed)
    recall = np.array([metrics.ratio(drawn @ (hit & k), drawn @ k.astype(float)) for k in of_database])
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (truth, answer), 1)
    return metrics.json_ready({
        "databases": names.tolist(),
        "balanced_accuracy": metrics.with_interval(np.mean([hit[k].mean() for k in of_database]), recall.mean(0)),
        "chance": 1 / len(names),
        "accuracy": metrics.with_interval(hit.mean(), metrics.ratio(drawn @ hit, drawn.sum(1))),
        "majority_accuracy": of_database.mean(1).max(),
        "confusion": confusion.tolist(),
        "features": int(x.shape[1]), "recordings": len(x), "people": len(set(who)), "folds": folds.n_splits,
    })  # fmt: skip


def measure(workdir: str | pathlib.Path, features: Callable[..., dict[str, np.ndarray]]) -> dict[str, Any]:
    """The site report of a run of `pcgjax.train`, JSON-ready; features: as `systems.features`.

      test             as in its metrics.json: overall, mean_database_auc, per_database, trivial, ...
      database_alone   {"auc": S} of answering each test recording with its database's share of abnormal in training
      probes           {name of WORDS: as of `probe`}; {} where there is nothing to tell apart
      probed           {"recordings", "people", "unknown_people", "left_out": {database: why}, "note"}; of them
                       recordings of unknown people stand for a person each
    Raises:
      ValueError: the run has not ended, is of no classifier, or its data or split are not there.
    """
    workdir = pathlib.Path(workdir)
    results = read_results(workdir / "metrics.json")
    config = ml_collections.ConfigDict(read_json(workdir / "config.json"))
    if "per_database" not in results["test"]:
        raise ValueError(f"{workdir}: a model of task {config.task.name!r} does not classify recordings")
    config.task.target = results["split"].get("target") or results["data"].get("target") or config.task.target
    corpus = from_prepared(config.data.prepared)
    refuse_other_recordings(results, corpus, workdir)
    split = splits.read(config.split.file or workdir / "split.json")
    place = {row["id"]: i for i, row in enumerate(corpus.rows)}
    if lacking := [name for name in (*split["train"], *split["validation"], *split["test"]) if name not in place]:
        raise ValueError(f"data.prepared={config.data.prepared}: recording {lacking[0]} of the split is not there")
    trained_on = {corpus.rows[place[name]]["person"] for name in split["train"]}
    held_out = [place[name] for part in ("validation", "test") for name in split[part]]
    held_out = sorted(i for i in held_out if corpus.rows[i]["person"] not in trained_on)
    report = {"test": results["test"], "database_alone": _database_alone(corpus, split, place, config)}
    return report | _probes(config, workdir, corpus, np.array(held_out, int), features)


def _database_alone(corpus: Corpus, split: Mapping, place: Mapping[str, int], config: Any) -> dict[str, Any]:
    """Scores of answering each test recording with its database's share of positives among the training recordings."""
    target = config.task.target
    train_labels: dict[str, list[int]] = {}
    for name in split["train"]:
        row = corpus.rows[place[name]]
        train_labels.setdefault(row["database"], []).append(int(row["labels"][target]))
    overall = float(np.mean([label for labels in train_labels.values() for label in labels]))
    rows = [corpus.rows[place[name]] for name in split["test"]]
    p = [float(np.mean(train_labels.get(row["database"], [overall]))) for row in rows]
    persons, databases = ([row[name] for row in rows] for name in ("person", "database"))
    judged = metrics.judge(
        [int(row["labels"][target]) for row in rows], p, persons, databases, databases, 0.5,
        config.evaluation.resamples, config.seed,
    )  # fmt: skip
    return {"auc": judged["overall"]["auc"], "mean_accuracy": judged["overall"]["mean_accuracy"]}


def _probes(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, corpus: Corpus, indices: np.ndarray, features: Callable
) -> dict[str, Any]:
    """The parts `probes` and `probed` of the report, on the recordings `indices`."""
    people: dict[str, set] = {}
    for i in indices:
        people.setdefault(corpus.rows[i]["database"], set()).add(corpus.rows[i]["person"])
    left_out = {
        name: f"{len(who)} {'person' if len(who) == 1 else 'people'} not trained on, {FEWEST_PEOPLE} are needed"
        for name, who in sorted(people.items()) if len(who) < FEWEST_PEOPLE
    }  # fmt: skip
    indices = np.array([i for i in indices if corpus.rows[i]["database"] not in left_out], int)
    unknown_people = sum(not corpus.rows[i]["person_known"] for i in indices)
    probed: dict[str, Any] = {
        "recordings": len(indices), "left_out": left_out, "note": "", "unknown_people": unknown_people
    }  # fmt: skip
    if len(people) - len(left_out) < 2:
        probed["note"] = "no probe: the people not trained on are of one database, or of too few people each"
        return {"probes": {}, "probed": probed}
    kinds = features(config, workdir, corpus, indices) | {"statistics": statistics(corpus, indices)}
    # Where the classical chain finds no cycle there are no features.
    complete = np.isfinite(kinds["trained"]).all(1)
    if not complete.all():
        lacking = int((~complete).sum())
        probed["note"] = f"{lacking} {'recording' if lacking == 1 else 'recordings'} without a heart cycle left out"
    rows = [corpus.rows[i] for i in indices[complete]]
    databases, persons = ([row[name] for row in rows] for name in ("database", "person"))
    probes = {
        name: probe(kinds[name][complete], databases, persons, config.evaluation.resamples, config.seed)
        for name in ("trained", "untrained", "statistics") if name in kinds
    }  # fmt: skip
    if "untrained" not in kinds:
        probed["note"] = " ".join(filter(None, (probed["note"], "These features are computed, not learned.")))
    return {"probes": probes, "probed": probed}
