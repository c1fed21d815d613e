"""What a trained model has learned of the place instead of the patient: the site report.

    python -m pcgjax.sites --workdir=runs/cnn

prints, and writes to WORKDIR as sites.json and sites.html: the AUC inside each database of the test people, their plain
mean and the overall scores, what the database alone scores, and a probe. The probe is a logistic regression that
predicts the database from the model's features of a recording: what its last unit is given, the mean over the
recording's clips. It is fitted and judged on people whom the model was not trained on, divided again by person, beside
the same net untrained and beside plain statistics of the signal, which say how much of it training has added.

WORKDIR is of any classifier that pcgjax.train makes; its prepared data must still be where they were.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import app, flags, logging

from pcgjax import metrics
from pcgjax.data.corpus import Corpus, from_prepared
from pcgjax.pages import page
from pcgjax.pages.sites import SITE_WORDS, counts_sentence, databases_card, probe_card, summary
from pcgjax.runs.results import read_json, read_results
from pcgjax.runtime import files
from pcgjax.systems import features_of_run

FOLDS = 5
FEWEST_PEOPLE = 3  # of a database that the probe is asked about
BANDS_HZ = (20, 40, 60, 90, 130, 190, 280, 400, 500)


def statistics(corpus: Corpus, indices: np.ndarray) -> np.ndarray:
    """(n, 9) float: level in dB, and the power in each of BANDS_HZ in dB below it, of whole recordings."""
    found = np.zeros((len(indices), len(BANDS_HZ)))
    for row, index in enumerate(indices):
        x = corpus.read(int(index)).astype(np.float64) / 32767
        power = np.abs(np.fft.rfft(x - x.mean())) ** 2
        f = np.fft.rfftfreq(len(x), 1 / corpus.sample_rate_hz)
        edges = np.searchsorted(f, BANDS_HZ)
        own = np.array([power[a:b].sum() for a, b in itertools.pairwise(edges)])
        found[row] = 10 * np.log10(np.r_[power.sum() / len(x) ** 2, own / max(power.sum(), 1e-20)] + 1e-12)
    return found


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
    hit, own = answer == truth, truth == np.arange(len(names))[:, None]
    drawn = metrics.draw_people(persons, databases, resamples, seed)
    recall = np.array([metrics.ratio(drawn @ (hit & k), drawn @ k.astype(float)) for k in own])
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (truth, answer), 1)
    return metrics.json_ready({
        "databases": names.tolist(),
        "balanced_accuracy": metrics.with_interval(np.mean([hit[k].mean() for k in own]), recall.mean(0)),
        "chance": 1 / len(names),
        "accuracy": metrics.with_interval(hit.mean(), metrics.ratio(drawn @ hit, drawn.sum(1))),
        "majority_accuracy": own.mean(1).max(),
        "confusion": confusion.tolist(),
        "features": int(x.shape[1]), "recordings": len(x), "people": len(set(who)), "folds": folds.n_splits,
    })  # fmt: skip


def measure(workdir: str | pathlib.Path) -> dict[str, Any]:
    """The site report of a run of `pcgjax.train`, JSON-ready:

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
    split = read_json(pathlib.Path(config.split.file or workdir / "split.json"))
    place = {row["id"]: i for i, row in enumerate(corpus.rows)}
    if lacking := [name for name in (*split["train"], *split["validation"], *split["test"]) if name not in place]:
        raise ValueError(f"data.prepared={config.data.prepared}: recording {lacking[0]} of the split is not there")
    heard = {corpus.rows[place[name]]["person"] for name in split["train"]}
    asked = [place[name] for part in ("validation", "test") for name in split[part]]
    asked = sorted(i for i in asked if corpus.rows[i]["person"] not in heard)
    found = {"test": results["test"], "database_alone": _database_alone(corpus, split, place, config)}
    return found | _probes(config, workdir, corpus, np.array(asked, int))


def _database_alone(corpus: Corpus, split: Mapping, place: Mapping[str, int], config: Any) -> dict[str, Any]:
    target = config.task.target
    label = lambda name: int(corpus.rows[place[name]]["labels"][target])
    of_train: dict[str, list[int]] = {}
    for name in split["train"]:
        of_train.setdefault(corpus.rows[place[name]]["database"], []).append(label(name))
    anywhere = float(np.mean([value for values in of_train.values() for value in values]))
    rows = [corpus.rows[place[name]] for name in split["test"]]
    p = [float(np.mean(of_train.get(row["database"], [anywhere]))) for row in rows]
    persons, databases = ([row[name] for row in rows] for name in ("person", "database"))
    judged = metrics.judge(
        [label(row["id"]) for row in rows], p, persons, databases, databases, 0.5, config.evaluation.resamples,
        config.seed,
    )  # fmt: skip
    return {"auc": judged["overall"]["auc"], "mean_accuracy": judged["overall"]["mean_accuracy"]}


def _probes(config: ml_collections.ConfigDict, workdir: pathlib.Path, corpus: Corpus, asked: np.ndarray) -> dict:
    people: dict[str, set] = {}
    for i in asked:
        people.setdefault(corpus.rows[i]["database"], set()).add(corpus.rows[i]["person"])
    left_out = {
        name: f"{page.count(len(who), 'person', 'people')} not trained on, {FEWEST_PEOPLE} are needed"
        for name, who in sorted(people.items()) if len(who) < FEWEST_PEOPLE
    }  # fmt: skip
    asked = np.array([i for i in asked if corpus.rows[i]["database"] not in left_out], int)
    told: dict[str, Any] = {"recordings": len(asked), "left_out": left_out, "note": ""}
    told["unknown_people"] = sum(not corpus.rows[i]["person_known"] for i in asked)
    if len(people) - len(left_out) < 2:
        told["note"] = "no probe: the people not trained on are of one database, or of too few people each"
        return {"probes": {}, "probed": told}
    kinds = features_of_run(config, workdir, corpus, asked) | {"statistics": statistics(corpus, asked)}
    # Where the classical chain finds no cycle there are no features.
    seen = np.isfinite(kinds["trained"]).all(1)
    if not seen.all():
        told["note"] = f"{page.count(int((~seen).sum()), 'recording')} without a heart cycle left out"
    rows = [corpus.rows[i] for i in asked[seen]]
    databases, persons = ([row[name] for row in rows] for name in ("database", "person"))
    resamples = config.evaluation.resamples
    probes = {name: probe(kinds[name][seen], databases, persons, resamples, config.seed) for name in SITE_WORDS
              if name in kinds}  # fmt: skip
    if "untrained" not in kinds:
        told["note"] = " ".join(filter(None, (told["note"], "These features are computed, not learned.")))
    return {"probes": probes, "probed": told}


def write(workdir: str | pathlib.Path) -> dict[str, Any]:
    """Measures a run and writes its sites.json and sites.html; returns what the former holds. Raises: as `measure`."""
    workdir = pathlib.Path(workdir)
    found = measure(workdir)
    files.write_text(workdir / "sites.json", json.dumps(found, indent=1) + "\n")
    sections = [("databases", "Inside each database", databases_card(found)), ("probe", "The probe", probe_card(found))]
    title = f"Sites: run {workdir.resolve().name}"
    files.write_text(workdir / "sites.html", page.document(title, counts_sentence(found["test"]), sections))
    return found


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: give --workdir=RUN")
    workdir = flags.FLAGS.workdir
    for name, why in (found := write(workdir))["probed"]["left_out"].items():
        logging.warning("%s is left out of the probe: %s", name, why)
    print(summary(found))
    print(f"wrote {workdir}: sites.json, sites.html")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A folder that pcgjax.train wrote.", required=True)
    files.run(main)
