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

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from flax import nnx

from pcgjax import evaluate, files, input_pipeline, metrics, page, report, tasks
from pcgjax.input_pipeline import Corpus

FOLDS = 5
FEWEST_PEOPLE = 3  # of a database that the probe is asked about
BANDS_HZ = (20, 40, 60, 90, 130, 190, 280, 400, 500)
WORDS = {
    "trained": "the trained model's features", "untrained": "the same net before training",
    "statistics": "level and power in eight bands",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- features


def features(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, corpus: Corpus, indices: np.ndarray):
    """{"trained", "untrained": (n, D) float}, what the last unit is given of these recordings by a run's best model,
    and by the net that training began with: of the same seed, and of the same pre-trained weights where there are any.

    Of the classical chain the features are its spectra, the same before and after: "untrained" is not there, and
    recordings without a cycle are NaN.
    Raises:
      ValueError: no trained classifier there (also CheckpointError).
    """
    name = config.task.name
    if name == "classical":
        from pcgjax import classical

        made = classical.features(corpus.subset(indices), config)
        found = np.full((len(indices), made.values.shape[1]), np.nan)
        found[made.indices] = made.values
        return {"trained": found}
    if name == "audio_encoder":
        return _encoded(config, workdir, corpus, indices)
    config, task, graphdef, params, rest, _ = evaluate.load_model(workdir)
    if task.clips is None:
        raise ValueError(f"{workdir}: a model of task {name!r} does not classify recordings; it has no site report")
    batch, key = config.evaluation.batch_recordings, jax.random.key(config.seed)
    task = task._replace(shapes=2)  # of a single pass, more would take longer to compile than they save
    embed = evaluate.make_predict(task, graphdef, corpus, indices, batch, key, embed=True)
    _, *begun = tasks.split(task.init(nnx.Rngs(jax.random.key(config.seed))))
    return {"trained": embed(params, rest), "untrained": embed(*begun)}


def _encoded(config: ml_collections.ConfigDict, workdir: Any, corpus: Corpus, indices: np.ndarray) -> dict:
    import torch

    from pcgjax import checkpoint
    from pcgjax.audio_llm import encoders

    best = encoders.newest(workdir, "best")
    if best is None:
        raise checkpoint.CheckpointError(f"{workdir}: no trained encoder there (checkpoints/best-*); train one first")
    torch.manual_seed(config.seed)
    model, extractor = encoders.make(config.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen: list[np.ndarray] = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu().numpy()))

    def embed() -> np.ndarray:
        seen.clear()
        encoders.answers(model.to(device), extractor, corpus, indices, config, device)
        counts = encoders.geometry_of(config, corpus).windows(corpus.lengths[indices])
        begins = np.cumsum(counts) - counts
        return np.add.reduceat(np.concatenate(seen), begins, axis=0) / counts[:, None]

    begun = embed()
    encoders.put(model, best)
    return {"trained": embed(), "untrained": begun}


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


# ---------------------------------------------------------------------------------------------------------- probe


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


# --------------------------------------------------------------------------------------------------------- measure


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
    results = report.read_results(workdir / "metrics.json")
    config = ml_collections.ConfigDict(report.read_json(workdir / "config.json"))
    if "per_database" not in results["test"]:
        raise ValueError(f"{workdir}: a model of task {config.task.name!r} does not classify recordings")
    config.task.target = results["split"].get("target") or results["data"].get("target") or config.task.target
    corpus = input_pipeline.from_prepared(config.data.prepared)
    split = report.read_json(pathlib.Path(config.split.file or workdir / "split.json"))
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
    kinds = features(config, workdir, corpus, asked) | {"statistics": statistics(corpus, asked)}
    # Where the classical chain finds no cycle there are no features.
    seen = np.isfinite(kinds["trained"]).all(1)
    if not seen.all():
        told["note"] = f"{page.count(int((~seen).sum()), 'recording')} without a heart cycle left out"
    rows = [corpus.rows[i] for i in asked[seen]]
    databases, persons = ([row[name] for row in rows] for name in ("database", "person"))
    resamples = config.evaluation.resamples
    probes = {name: probe(kinds[name][seen], databases, persons, resamples, config.seed) for name in WORDS
              if name in kinds}  # fmt: skip
    if "untrained" not in kinds:
        told["note"] = " ".join(filter(None, (told["note"], "These features are computed, not learned.")))
    return {"probes": probes, "probed": told}


# ------------------------------------------------------------------------------------------------------- the report


def write(workdir: str | pathlib.Path) -> dict[str, Any]:
    """Measures a run and writes its sites.json and sites.html; returns what the former holds. Raises: as `measure`."""
    workdir = pathlib.Path(workdir)
    found = measure(workdir)
    files.write_text(workdir / "sites.json", json.dumps(found, indent=1) + "\n")
    sections = [("databases", "Inside each database", databases_card(found)), ("probe", "The probe", probe_card(found))]
    title = f"Sites: run {workdir.resolve().name}"
    files.write_text(workdir / "sites.html", page.document(title, _counts(found["test"]), sections))
    return found


def _counts(test: Mapping[str, Any]) -> str:
    people = page.count(test["people"], "person", "people")
    return f"{page.count(test['recordings'], 'test recording')} · {people} · {len(test['per_database'])} databases"


def databases_card(found: Mapping[str, Any]) -> str:
    """HTML: overall scores beside the mean over databases and the database alone, and the AUC of each database."""
    test, alone = found["test"], found["database_alone"]
    body = [
        ["AUC, all recordings", page.score(test["overall"]["auc"])],
        ["<b>AUC, mean over databases</b>", page.score(test["mean_database_auc"])],
        ["MAcc, all recordings", page.score(test["overall"]["mean_accuracy"])],
        ["<i>AUC of the database alone</i>: its share of abnormal in training", page.score(alone["auc"])],
        ["<i>the same</i>, told the test set's own shares", page.number(test["trivial"]["database_prior"]["auc"])],
    ]
    return page.table(["", "Score"], body) + report.databases_table(test)


def probe_card(found: Mapping[str, Any]) -> str:
    """HTML: how well the database can be told from the features, and the confusion between databases."""
    told = found["probed"]
    if not found["probes"]:
        return page.absent(told["note"].capitalize() + ".")
    body = []
    for name, one in found["probes"].items():
        value, low, high = (page.finite(one["balanced_accuracy"], key) for key in ("value", "low", "high"))
        drawn = page.score(one["balanced_accuracy"]) + page.gauge(value, low, high, one["chance"])
        numbers = (one["chance"], one["accuracy"], one["majority_accuracy"], one["features"])
        body.append([page.escape(WORDS[name].capitalize()), drawn, *map(_cell, numbers)])
    head = ["Database predicted from", "Balanced accuracy", "Chance", "Accuracy", "Commonest database", "Features"]
    first = found["probes"]["trained"]
    notes = [
        f"{first['recordings']} recordings of {page.count(first['people'], 'person', 'people')} whom the model was not "
        f"trained on, {first['folds']} folds with nobody in two."
    ]
    if told["unknown_people"]:
        notes.append(f"{told['unknown_people']} recordings of unknown people stand for a person each.")
    notes += [f"{name} is left out: {why}." for name, why in told["left_out"].items()]
    notes.append(told["note"])
    said = f'<p class="small">{page.escape(" ".join(filter(None, notes)))}</p>'
    return page.table(head, body) + said + _confusion(first)


def _cell(value: Any) -> str:
    return page.number(value) if isinstance(value, int) else page.score(value)


def _confusion(one: Mapping[str, Any]) -> str:
    names, counts = one["databases"], np.array(one["confusion"])
    share = counts / counts.sum(1, keepdims=True)

    def paint(figure: Any) -> None:
        ax = figure.subplots()
        for (i, j), value in np.ndenumerate(share):
            colour = page.TEAL if i == j else page.ORANGE
            ax.add_patch(_square(j, i, colour, 0.06 + 0.6 * value))
            ax.text(j, i, f"{value:.0%}", ha="center", va="center", fontweight="bold", fontsize=12)
            ax.text(j, i + 0.25, str(counts[i, j]), ha="center", va="center", color=page.MUTED, fontsize=9)
        ax.set_xlim(-0.5, len(names) - 0.5)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(colors=page.INK, length=0)
        ax.set_xlabel("said to be of")
        ax.grid(False)
        for side in ax.spines.values():
            side.set_visible(False)

    told = ", ".join(f"{name} {share[k, k]:.2f}" for k, name in enumerate(names))
    side = 130 + 90 * len(names)
    alt = f"Databases told apart by the trained model's features, share found: {told}"
    drawn = page.svg(side, side - 60, alt, paint)
    caption = "Each row is a database; how many of its recordings the probe takes for which database's."
    return page.card("", f'<div style="max-width:{side}px">{drawn}</div>', caption)


def _square(x: float, y: float, colour: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=colour, alpha=alpha, linewidth=0)


def summary(found: Mapping[str, Any]) -> str:
    """The site report for a terminal."""

    def text(score: Any) -> str:
        low, high = page.finite(score, "low"), page.finite(score, "high")
        return page.number(page.finite(score)) + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")

    test = found["test"]
    lines = [f"{'AUC, all recordings':42s}{text(test['overall']['auc'])}"]
    for name, one in test["per_database"].items():
        counted = f"{name}: {one['recordings']} recordings, {one['positives']} positive"
        lines.append(f"  {counted:40s}{'one class only' if one['auc']['value'] is None else text(one['auc'])}")
    lines += [
        f"{'AUC, mean over databases':42s}{text(test['mean_database_auc'])}",
        f"{'MAcc, all recordings':42s}{text(test['overall']['mean_accuracy'])}",
        f"{'AUC of the database alone':42s}{text(found['database_alone']['auc'])}",
    ]
    for name, one in found["probes"].items():
        lines.append(
            f"{'database from ' + WORDS[name]:50s}{text(one['balanced_accuracy'])}, chance {one['chance']:.3f}"
        )
    return "\n".join([*lines, *filter(None, [found["probed"]["note"]])])


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
