"""The rows of table.json from what the stages left: a row is a system's score on a data set.

  experiment, system, dataset, metric
  paper                 its figure, None where it gives none
  ours_paper_protocol   S: ours under the paper's protocol
  ours_honest           S: ours on held-out patients, with intervals over patients
  ours_database_left_out  S: ours on held-out databases, each left out once; None where that was not run
  trivial, trivial_answer   what the best baseline without sound scores on the honest test part, and which it is
  site                  of CinC 2016: mean AUC over databases, AUC of each, and the probe, of the honest run
  epochs, budget, note  of our training: how long, what is smaller than published, what else differs
  status, why           done, failed or not run, and why
S = {"value", "low", "high"}, of the classical chain also "best", "mean", "deviation" over ten runs.
"""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax import metrics
from pcgjax.pages.audio_llm import ZERO_SHOT_SCORES
from pcgjax.pages.classical import CLASSIFIERS, PROTOCOLS, SCORES, SETS
from pcgjax.pages.words import CLASSIFIER_WORDS, WORDS, best_trivial
from pcgjax.published import AUDIO_LLM_PAPER, CNN_PAPER, HINF_PAPER
from pcgjax.reproduce.job import CONFIGURATIONS, LLM_RUNS, Job, stage_name
from pcgjax.runs.config import load_config
from pcgjax.runs.results import overall_scores, read_json, read_results

SHOWN = ("accuracy", "auc", "precision", "recall", "f1")
SCORED = ("f1", "accuracy", "sensitivity", "specificity")
SITE = ("mean_accuracy", "mean_database_auc")


def rows_of(job: Job, paper: str, states: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one paper, as the top of the file describes them; states: those of its stages, by `stages.saved`."""
    of_paper = {"classical": _classical_rows, "cnn": _cnn_rows, "hinf_lstm": _hinf_lstm_rows, "audio_llm": _llm_rows}
    return of_paper[paper](job, states)


def _cnn_rows(job: Job, states: Any) -> list[dict[str, Any]]:
    results: Any = CNN_PAPER["results"]
    rows = []
    for name, title in CONFIGURATIONS.items():
        runs = {"published": f"cnn_published/{name}", "person": f"cnn_person/{name}"}
        if name == "filter":
            runs["left_out"] = "cnn_left_out"
        published = results.get(title, {})
        rows += _cinc_rows(job, states, "cnn", f"1D CNN: {title}", "cnn", runs, SHOWN, published)
    return rows


def _hinf_lstm_rows(job: Job, states: Any) -> list[dict[str, Any]]:
    rows = []
    for name, (system, figures) in HINF_PAPER.items():
        config, _, inner = name.partition("/")
        runs = {kind: f"{config}_{kind}" + (f"/{inner}" if inner else "") for kind in ("published", "person")}
        if name == "hinf_lstm":
            runs["left_out"] = "hinf_lstm_left_out"
        published = dict(zip(SCORED, figures, strict=True))
        rows += _cinc_rows(job, states, "hinf_lstm", system, config, runs, (*SCORED, "auc"), published)
    return rows


def _row(experiment: str, system: str, dataset: str, metric: str, **fields: Any) -> dict[str, Any]:
    """A row with these fields, the others empty."""
    empty = dict.fromkeys(("paper", "ours_paper_protocol", "ours_honest", "ours_database_left_out", "trivial",
                           "trivial_answer", "site"))  # fmt: skip
    head = {"experiment": experiment, "system": system, "dataset": dataset, "metric": metric}
    return metrics.json_ready({**head, **empty, "epochs": "", "budget": "", "note": "", **fields})


def _status(states: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, str]:
    """{status, why}: the worst of these stages'."""
    known = [states[name] for name in names if name in states]
    for status, shown in (("failed", "failed"), ("not run", "not run"), ("begun", "not run")):
        if reasons := [f"{s['title']}: {s['why']}" for s in known if s["status"] == status]:
            return {"status": shown, "why": "; ".join(reasons)}
    return {"status": "done", "why": ""}


def _budget(job: Job, config: str) -> dict[str, str]:
    """How long and how large, in words."""
    changes = dict(job.changes(config))
    full = load_config(config, {}).train.epochs
    epochs = changes.pop("train.epochs", full)
    smaller = ", ".join(f"{name}={str(value).replace(' ', '')}" for name, value in changes.items())
    return {
        "epochs": "" if config == "classical" else f"{epochs} of {full} epochs",
        "budget": f"{job.budget}: {smaller}" if smaller else job.budget,
    }


def _cinc_rows(job: Job, states: Any, paper: str, system: str, config: str, runs: Mapping[str, str],
               shown: Sequence[str], published: Mapping[str, float]) -> list[dict[str, Any]]:  # fmt: skip
    """A system's rows on CinC 2016; runs: the name of each kind of run (published, person, left_out) that it has."""
    # What another's first stage left has no stage of its own.
    stage_of = {kind: stage_name(run.removesuffix("/cnn_lstm")) for kind, run in runs.items()}
    scores: dict[str, Mapping[str, Any]] = {}
    test: Mapping[str, Any] = {}
    databases: Mapping[str, Any] = {}
    site = None
    for kind, run in runs.items():
        if states.get(stage_of[kind], {}).get("status") != "done":
            continue
        if kind == "left_out":
            judged = left_out(job.run(run))
            databases = judged["per_database"]
        else:
            judged = read_results(job.run(run) / "metrics.json")["test"]
        scores[kind] = overall_scores(judged)
        if kind == "person":
            test, site = judged, site_of(read_json(job.run(run) / "sites.json"))
    if "left_out" in scores:
        scores["left_out"] = {**scores["left_out"], "auc": None}  # of several models together it means nothing
    why_not = states.get(stage_of.get("left_out", ""), {}).get("result") or {}
    note = _cinc_note(config, why_not, databases if "left_out" in scores else None, "left_out" in runs)
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


def _cinc_note(config: str, why_not: Mapping[str, str], databases: Mapping[str, Any] | None, planned: bool) -> str:
    """What else differs in a system's rows on CinC 2016.

    why_not: {database: why it could not be left out}; databases: scores of each that was left out, None where none
      was; planned: whether they were to be.
    """
    notes = [f"{database} not left out: {reason}" for database, reason in why_not.items()]
    if databases is not None:
        auc = {name: scores["auc"]["value"] for name, scores in databases.items()}
        inside = ", ".join(f"{name.removeprefix('cinc2016-')} {v:.3f}" for name, v in auc.items() if v is not None)
        notes.append(f"AUC within each held-out database, by the model trained without it: {inside}")
    elif not planned:
        notes.append("databases were left out of the CNN (filter) and of the CNN-H∞-LSTM only")
    if config not in ("classical", "cnn", "hinf_lstm"):
        notes.append("random weights; the paper's baselines had probably been pre-trained")
    return "; ".join(notes)


def site_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """A site report (sites.json) in few numbers: what stands beside a CinC score."""
    probes = report["probes"]
    return {
        "mean_database_auc": report["test"]["mean_database_auc"],
        "auc": {name: scores["auc"]["value"] for name, scores in report["test"]["per_database"].items()},
        "database_alone_auc": report["database_alone"]["auc"],
        "probe": {name: probe["balanced_accuracy"] for name, probe in probes.items()},
        "probe_chance": probes["trained"]["chance"] if probes else None,
    }


def left_out(workdir: pathlib.Path) -> dict[str, Any]:
    """`metrics.judge` of all databases together, each by the run that left it out.

    Probabilities are moved so that each run's own decision threshold comes to 0.5, in each database in their order.
    """
    columns: dict[str, list] = {name: [] for name in ("label", "probability", "person", "database")}
    resamples = 0
    for path in sorted(workdir.glob("*/predictions.csv")):
        test = read_results(path.with_name("metrics.json"))["test"]
        cut, resamples = test["threshold"], test["intervals"]["resamples"]
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["split"] == "test":
                    p = float(row["probability"])
                    moved = 0.5 * p / cut if p < cut else 1 - 0.5 * (1 - p) / max(1 - cut, 1e-9)
                    columns["label"].append(int(row["label"]))
                    columns["probability"].append(moved)
                    columns["person"].append(row["person"])
                    columns["database"].append(row["database"])
    return metrics.judge(columns["label"], columns["probability"], columns["person"], columns["database"],
                         columns["database"], 0.5, resamples)  # fmt: skip


def left_out_clips(job: Job, states: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """{title of a stage: [{"id", "reason"}]}: what could not be read, and clips without a heartbeat."""
    recordings = {}
    for name, state in states.items():
        if state["status"] != "done":
            continue
        if name.startswith("prepare_"):
            manifest = read_json(job.out / "prepared" / name.removeprefix("prepare_") / "manifest.json")
            left_out = [file for file in manifest["problems"] if not file.get("note")]
            out = [{"id": file["path"], "reason": file["reason"]} for file in left_out]
        elif name.startswith("classical"):
            out = read_json(job.run(name) / "metrics.json")["features"]["left_out"]
        else:
            continue
        if out:
            recordings[state["title"]] = out
    return recordings


def _classical_rows(job: Job, states: Any) -> list[dict[str, Any]]:
    rows, status = [], _status(states, ["classical"])
    if status["status"] != "done":
        rows.append(_row("classical", "classical chain", "PASCAL B", "accuracy", **status))
    else:
        experiment = read_json(job.run("classical") / "experiment.json")
        by = {(r["set"], r["classifier"], r["protocol"]): r for r in experiment["rows"]}
        for of_set in SETS:
            [trivial] = [t["scores"] for t in experiment["trivial"] if (t["set"], t["protocol"]) == (of_set, "person")]
            for name in CLASSIFIERS:
                record, person = (by[of_set, name, protocol] for protocol in PROTOCOLS)
                for metric in SCORES:
                    best, mean = record["scores"][metric], person["scores"][metric]
                    best = {key: best[key] for key in ("best", "mean", "deviation")}  # the interval is the mean's
                    rows.append(_row(
                        "classical", f"{CLASSIFIER_WORDS[name]}, {of_set}", "PASCAL B", metric,
                        paper=record.get("paper", {}).get(metric), ours_paper_protocol={"value": best["best"], **best},
                        ours_honest={"value": mean["mean"], **mean}, trivial=trivial[metric],
                        trivial_answer="the commoner class of training", epochs=f"{experiment['runs']} runs",
                        budget=job.budget, **status,
                        note="as published: best of the runs, split by recording; honest: their mean, by person",
                    ))  # fmt: skip
    # Not in its paper: the same features where the other systems are judged.
    runs = {"person": "classical_person"}
    return rows + _cinc_rows(job, states, "classical", "Classical chain", "classical", runs, SHOWN, {})


def _llm_rows(job: Job, states: Any) -> list[dict[str, Any]]:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        why = f'{error}; pip install "pcgjax[audio-llm]"'
        return [_row("audio_llm", "Qwen2-Audio", "CirCor", "accuracy", status="not run", why=why)]
    tiny = "" if job.model else "figures of a tiny model with random weights, which knows nothing: no --model was given"
    common = {"note": tiny, **_budget(job, "audio_llm")}
    rows = []
    for column, (run, word) in enumerate(LLM_RUNS.items()):
        names = {"published": f"llm_{run}_published", "honest": "llm_scores"}
        status = _status(states, names.values())
        results = {}
        for kind, name in names.items():
            if states.get(name, {}).get("status") == "done":
                results[kind] = read_json(job.run(name) / "metrics.json")["runs"][f"llm_{run}_{kind}"]
        tests = {kind: _llm_scores(result["test"]) for kind, result in results.items()}
        if "published" in results:
            once = [task["once_only_accuracy"] for task in results["published"]["test"]["tasks"].values()]
            shortcut = f"without sound, the option that the paper's padding leaves once scores {np.mean(once):.3f}"
            common["note"] = "; ".join(filter(None, (tiny, shortcut)))
        system = f"Qwen2-Audio, {word}"
        known = dict.fromkeys(name for scores in tests.values() for name in scores)
        for metric in known or ("murmur",):
            values = [tests.get(kind, {}).get(metric, (None, None)) for kind in names]
            (published, published_majority), (honest, honest_majority) = values
            common["trivial_answer"] = "always Present" if metric == "weighted_accuracy" else "the commoner class"
            rows.append(_row(
                "audio_llm", system, "CirCor", metric, paper=AUDIO_LLM_PAPER.get(metric, (None, None))[column],
                ours_paper_protocol=published, ours_honest=honest,
                trivial=published_majority if honest_majority is None else honest_majority, **common, **status,
            ))  # fmt: skip
        zero_shot = results["honest"]["zero_shot"] if "honest" in results else {}
        for database in ("cinc2016", "pascal-a", "pascal-b"):
            if (scores := zero_shot.get(database)) is None:
                continue
            site = _zero_shot_site(zero_shot) if database == "cinc2016" else None
            for metric in ZERO_SHOT_SCORES:
                figure = AUDIO_LLM_PAPER.get(f"{database}/{metric}", (None, None))[column]
                trivial = {"accuracy": scores["majority_accuracy"], "mean_accuracy": 0.5, "auc": 0.5}.get(metric)
                fields = {**common, "trivial_answer": "the commoner class" if trivial is not None else None}
                rows.append(_row("audio_llm", f"{system}, zero-shot", database, metric, paper=figure, site=site,
                                 ours_honest=scores[metric], trivial=trivial, **fields, **status))  # fmt: skip
        for database, why in (states.get("llm_scores", {}).get("result") or {}).items():
            rows.append(_row("audio_llm", f"{system}, zero-shot", database, "accuracy", status="not run", why=why))
    return rows


def _zero_shot_site(zero_shot: Mapping[str, Any]) -> dict[str, Any]:
    auc = {name: scores["auc"]["value"] for name, scores in zero_shot.items() if name.startswith("cinc2016-")}
    known = [value for value in auc.values() if value is not None]
    mean = float(np.mean(known)) if known else None
    return {"mean_database_auc": {"value": mean}, "auc": auc, "database_alone_auc": None, "probe": {},
            "probe_chance": None}  # fmt: skip


def _llm_scores(test: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{task or weighted_accuracy: (S, what the commoner class scores)}"""
    scores = {task: (of_task["accuracy"], of_task["majority_accuracy"]) for task, of_task in test["tasks"].items()}
    if patients := test["patients"]:
        always = patients["trivial_weighted_accuracy"]["always Present"]
        scores["weighted_accuracy"] = patients["weighted_accuracy"], always
    return scores
