"""The rows of table.json from what the stages left."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax import metrics
from pcgjax.pages.classical import CLASSIFIERS, PROTOCOLS, SCORES, SETS
from pcgjax.pages.words import CLASSIFIER_WORDS, WORDS, best_trivial
from pcgjax.published import CNN_PAPER, HINF_PAPER
from pcgjax.reproduce.plan import CONFIGURATIONS, LLM_RUNS, Job, stage_name
from pcgjax.runs.config import load_config
from pcgjax.runs.results import overall_scores, read_json, read_results

SHOWN = ("accuracy", "auc", "precision", "recall", "f1")
SCORED = ("f1", "accuracy", "sensitivity", "specificity")
SITE = ("mean_accuracy", "mean_database_auc")


def rows_of(job: Job, paper: str, states: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of table.json of one paper; see the top of the file."""
    if paper == "classical":
        return _classical_rows(job, states)
    if paper == "cnn":
        results: Any = CNN_PAPER["results"]
        rows = []
        for name, title in CONFIGURATIONS.items():
            paths = {"published": f"cnn_published/{name}", "person": f"cnn_person/{name}"}
            if name == "filter":
                paths["left_out"] = "cnn_left_out"
            published = results.get(title, {})
            rows += _cinc_rows(job, states, paper, f"1D CNN: {title}", "cnn", paths, SHOWN, published)
        return rows
    if paper == "hinf_lstm":
        rows = []
        for name, (system, figures) in HINF_PAPER.items():
            config, _, inner = name.partition("/")
            paths = {kind: f"{config}_{kind}" + (f"/{inner}" if inner else "") for kind in ("published", "person")}
            if name == "hinf_lstm":
                paths["left_out"] = "hinf_lstm_left_out"
            published = dict(zip(SCORED, figures, strict=True))
            rows += _cinc_rows(job, states, paper, system, config, paths, (*SCORED, "auc"), published)
        return rows
    return _llm_rows(job, states)


def _row(experiment: str, system: str, dataset: str, metric: str, **fields: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("paper", "ours_paper_protocol", "ours_honest", "ours_database_left_out", "trivial",
                           "trivial_answer", "site"))  # fmt: skip
    head = {"experiment": experiment, "system": system, "dataset": dataset, "metric": metric}
    return metrics.json_ready({**head, **empty, "epochs": "", "budget": "", "note": "", **fields})


def _status(states: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, str]:
    """The worst of these stages'."""
    known = [states[name] for name in names if name in states]
    for word, shown in (("failed", "failed"), ("not run", "not run"), ("begun", "not run")):
        if reasons := [f"{s['title']}: {s['why']}" for s in known if s["status"] == word]:
            return {"status": shown, "why": "; ".join(reasons)}
    return {"status": "done", "why": ""}


def _budget(job: Job, config: str) -> dict[str, str]:
    """How long and how large, in words."""
    changes = dict(job.changes(config))
    full = load_config(config, {}).train.epochs
    epochs = changes.pop("train.epochs", full)
    smaller = ", ".join(f"{name}={_plain(value)}" for name, value in changes.items())
    return {
        "epochs": "" if config == "classical" else f"{epochs} of {full} epochs",
        "budget": f"{job.budget}: {smaller}" if smaller else job.budget,
    }


def _plain(value: Any) -> str:
    return str(value).replace(" ", "")


def _cinc_rows(job: Job, states: Any, paper: str, system: str, config: str, paths: Mapping[str, str],
               shown: Sequence[str], published: Mapping[str, float]) -> list[dict[str, Any]]:  # fmt: skip
    folder = lambda kind: job.out / "runs" / paths[kind]
    # What another's first stage left has no stage of its own.
    stage_of = {kind: stage_name(path.removesuffix("/cnn_lstm")) for kind, path in paths.items()}
    ended = [kind for kind in paths if states.get(stage_of[kind], {}).get("status") == "done"]
    scores: dict[str, Mapping[str, Any]] = {}
    test: Mapping[str, Any] = {}
    left: Mapping[str, Any] = {}
    site = None
    for kind in ended:
        if kind == "left_out":
            judged = left = left_out(folder(kind))
        else:
            judged = read_results(folder(kind) / "metrics.json")["test"]
        scores[kind] = overall_scores(judged)
        if kind == "person":
            test, site = judged, site_of(read_json(folder(kind) / "sites.json"))
    why = states.get(stage_of.get("left_out", ""), {}).get("result") or {}
    notes = [f"{database} not left out: {reason}" for database, reason in why.items()]
    if "left_out" in scores:
        scores["left_out"] = {**scores["left_out"], "auc": None}  # of several models together it means nothing
        known = {name: one["auc"]["value"] for name, one in left["per_database"].items()}
        inside = ", ".join(f"{name.removeprefix('cinc2016-')} {v:.3f}" for name, v in known.items() if v is not None)
        notes.append(f"AUC inside each database left out, by the model that had not heard it: {inside}")
    elif "left_out" not in paths:
        notes.append("databases were left out of the CNN (filter) and of the CNN-H∞-LSTM only")
    if config not in ("classical", "cnn", "hinf_lstm"):
        notes.append("random weights; the paper's baselines had probably been pre-trained")
    note = "; ".join(notes)
    rows = []
    for metric in (*shown, *SITE):
        best = best_trivial(test, metric) if test else None
        if best is None and test:  # of sensitivity alone a constant answer gets everything
            best = WORDS["database_prior"], test["trivial"]["database_prior"][metric]
        fields = {"trivial": best[1], "trivial_answer": best[0]} if best else {}
        ours = {"ours_paper_protocol": "published", "ours_honest": "person", "ours_database_left_out": "left_out"}
        fields |= {key: scores.get(kind, {}).get(metric) for key, kind in ours.items()}
        rows.append(_row(paper, system, "CinC 2016", metric, paper=published.get(metric), site=site, note=note,
                         **fields, **_budget(job, config), **_status(states, stage_of.values())))  # fmt: skip
    return rows


def site_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """A site report in few numbers: what stands beside a CinC score."""
    probes = found["probes"]
    return {
        "mean_database_auc": found["test"]["mean_database_auc"],
        "auc": {name: one["auc"]["value"] for name, one in found["test"]["per_database"].items()},
        "database_alone_auc": found["database_alone"]["auc"],
        "probe": {name: one["balanced_accuracy"] for name, one in probes.items()},
        "probe_chance": probes["trained"]["chance"] if probes else None,
    }


def left_out(workdir: pathlib.Path) -> dict[str, Any]:
    """`metrics.judge` of all databases together, each by the run that had not heard it.

    Probabilities are moved so that each run's own decision threshold comes to 0.5, in each database in their order.
    """
    found: dict[str, list] = {name: [] for name in ("label", "probability", "person", "database")}
    resamples = 0
    for path in sorted(workdir.glob("*/predictions.csv")):
        test = read_results(path.with_name("metrics.json"))["test"]
        cut, resamples = test["threshold"], test["intervals"]["resamples"]
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["split"] == "test":
                    p = float(row["probability"])
                    moved = 0.5 * p / cut if p < cut else 1 - 0.5 * (1 - p) / max(1 - cut, 1e-9)
                    for name, value in (("label", int(row["label"])), ("probability", moved)):
                        found[name].append(value)
                    for name in ("person", "database"):
                        found[name].append(row[name])
    return metrics.judge(found["label"], found["probability"], found["person"], found["database"], found["database"],
                         0.5, resamples)  # fmt: skip


def left_out_clips(job: Job, states: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """{title of a stage: [{"id", "reason"}]}: what could not be read, and clips without a heartbeat."""
    found = {}
    for name, state in states.items():
        if state["status"] != "done":
            continue
        if name.startswith("prepare_"):
            manifest = read_json(job.out / "prepared" / name.removeprefix("prepare_") / "manifest.json")
            out = [{"id": one["path"], "reason": one["reason"]} for one in manifest["problems"]]
        elif name.startswith("classical"):
            out = read_json(job.out / "runs" / name / "metrics.json")["features"]["left_out"]
        else:
            continue
        if out:
            found[state["title"]] = out
    return found


def _classical_rows(job: Job, states: Any) -> list[dict[str, Any]]:
    rows, status = [], _status(states, ["classical"])
    if status["status"] != "done":
        rows.append(_row("classical", "classical chain", "PASCAL B", "accuracy", **status))
    else:
        asked = read_json(job.out / "runs" / "classical" / "experiment.json")
        by = {(r["set"], r["classifier"], r["protocol"]): r for r in asked["rows"]}
        for of_set in SETS:
            [trivial] = [t["scores"] for t in asked["trivial"] if (t["set"], t["protocol"]) == (of_set, "person")]
            for name in CLASSIFIERS:
                record, person = (by[of_set, name, protocol] for protocol in PROTOCOLS)
                for metric in SCORES:
                    best, mean = record["scores"][metric], person["scores"][metric]
                    best = {key: best[key] for key in ("best", "mean", "deviation")}  # the interval is the mean's
                    rows.append(_row(
                        "classical", f"{CLASSIFIER_WORDS[name]}, {of_set}", "PASCAL B", metric,
                        paper=record.get("paper", {}).get(metric), ours_paper_protocol={"value": best["best"], **best},
                        ours_honest={"value": mean["mean"], **mean}, trivial=trivial[metric],
                        trivial_answer="the commoner class of training", epochs=f"{asked['runs']} runs",
                        budget=job.budget, **status,
                        note="as published: best of the runs, split by recording; honest: their mean, by person",
                    ))  # fmt: skip
    # Not in its paper: the same features where the other systems are judged.
    paths = {"person": "classical_person"}
    return rows + _cinc_rows(job, states, "classical", "Classical chain", "classical", paths, SHOWN, {})


def _llm_rows(job: Job, states: Any) -> list[dict[str, Any]]:
    try:
        from pcgjax.audio_llm import tables
    except ImportError as error:
        why = f'{error}; pip install "pcgjax[audio-llm]"'
        return [_row("audio_llm", "Qwen2-Audio", "CirCor", "accuracy", status="not run", why=why)]
    tiny = "" if job.model else "figures of a tiny model with random weights, which knows nothing: no --model was given"
    told = {"note": tiny, **_budget(job, "audio_llm")}
    rows = []
    for column, (run, word) in enumerate(LLM_RUNS.items()):
        names = {"published": f"llm_{run}_published", "honest": "llm_scores"}
        status = _status(states, names.values())
        found = {}
        for kind, name in names.items():
            if states.get(name, {}).get("status") == "done":
                judged = read_json(job.out / "runs" / name / "metrics.json")["runs"]
                found[kind] = judged[f"llm_{run}_{kind}"]
        tests = {kind: _llm_scores(one["test"]) for kind, one in found.items()}
        if "published" in found:
            once = [one["once_only_accuracy"] for one in found["published"]["test"]["tasks"].values()]
            known_once = (
                f"with the paper's options, who takes the one that stands once gets {np.mean(once):.3f} unheard"
            )
            told["note"] = "; ".join(filter(None, (tiny, known_once)))
        system = f"Qwen2-Audio, {word}"
        known = dict.fromkeys(name for scores in tests.values() for name in scores)
        for metric in known or ("murmur",):
            values = [tests.get(kind, {}).get(metric, (None, None)) for kind in names]
            (published, majority), (honest, own) = values
            told["trivial_answer"] = "always Present" if metric == "weighted_accuracy" else "the commoner class"
            rows.append(_row(
                "audio_llm", system, "CirCor", metric, paper=tables.PAPER.get(metric, (None, None))[column],
                ours_paper_protocol=published, ours_honest=honest, trivial=majority if own is None else own, **told,
                **status,
            ))  # fmt: skip
        zero_shot = found["honest"]["zero_shot"] if "honest" in found else {}
        for database in ("cinc2016", "pascal-a", "pascal-b"):
            if (scores := zero_shot.get(database)) is None:
                continue
            site = _zero_shot_site(zero_shot) if database == "cinc2016" else None
            for metric in tables.ZERO_SHOT_SCORES:
                figure = tables.PAPER.get(f"{database}/{metric}", (None, None))[column]
                trivial = {"accuracy": scores["majority_accuracy"], "mean_accuracy": 0.5, "auc": 0.5}.get(metric)
                fields = {**told, "trivial_answer": "the commoner class" if trivial is not None else None}
                rows.append(_row("audio_llm", f"{system}, zero-shot", database, metric, paper=figure, site=site,
                                 ours_honest=scores[metric], trivial=trivial, **fields, **status))  # fmt: skip
        for database, why in (states.get("llm_scores", {}).get("result") or {}).items():
            rows.append(_row("audio_llm", f"{system}, zero-shot", database, "accuracy", status="not run", why=why))
    return rows


def _zero_shot_site(zero_shot: Mapping[str, Any]) -> dict[str, Any]:
    auc = {name: one["auc"]["value"] for name, one in zero_shot.items() if name.startswith("cinc2016-")}
    known = [value for value in auc.values() if value is not None]
    mean = float(np.mean(known)) if known else None
    return {"mean_database_auc": {"value": mean}, "auc": auc, "database_alone_auc": None, "probe": {},
            "probe_chance": None}  # fmt: skip


def _llm_scores(test: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{task or weighted_accuracy: (S, what the majority scores)}"""
    found = {task: (one["accuracy"], one["majority_accuracy"]) for task, one in test["tasks"].items()}
    if patients := test["patients"]:
        always = patients["trivial_weighted_accuracy"]["always Present"]
        found["weighted_accuracy"] = patients["weighted_accuracy"], always
    return found
