"""Every paper's tables, under the paper's protocol and under an honest one, on the same recordings, in one page.

    python -m pcgjax.reproduce --paper=all --source=DIR --out=DIR --budget=small

SOURCE holds cinc2016/, circor/ and pascal/, each in its official layout; what is missing is said in the table. OUT
receives prepared/, runs/ (the workdirs of all trainings, each with its own report), stages/ (what is done), table.json
and report.html. Another --paper of the same OUT is added to the page. A run that was stopped, by whatever, goes on with
the same command; settings that differ from those that OUT was made with are an error.

table.json: {"budget", "model", "source", "rows", "stages", "left_out", "versions"}. "left_out" has, by stage, the
files that could not be read and the clips in which no heartbeat was found: [{"id", "reason"}]. A row is a system's
score on a data set:
  experiment, system, dataset, metric
  paper                 its figure, None where it gives none
  ours_paper_protocol   S: ours under the paper's protocol
  ours_honest           S: ours on people who were not heard, with intervals over people
  ours_database_left_out  S: ours on databases that were not heard, each left out once; None where that was not run
  trivial, trivial_answer   what the best answer that does not listen scores on the honest test people, and which it is
  site                  of CinC 2016: mean AUC over databases, AUC of each, and the probe, of the honest run
  epochs, budget, note  of our training: how long, what is smaller than published, what else differs
  status, why           done, failed or not run, and why
S = {"value", "low", "high"}, of the classical chain also "best", "mean", "deviation" over ten runs.
"""

from __future__ import annotations

import csv
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

from pcgjax import (
    classical,
    compare,
    datasets,
    files,
    metrics,
    prepare,
    report,
    reproduce_page,
    runs,
    sites,
    splits,
    train,
)

PAPERS = ("classical", "cnn", "hinf_lstm", "audio_llm")
# What --budget=small changes in configs/, so that two CPU cores can do --paper=all (BUILD_NOTES.md has the time);
# --budget=full is configs/ as they are. Both of a paper's protocols get the same.
_TENTH = {"features.hop": 100, "features.n_mels": 64, "train.epochs": 2}
_HEARD = {"model.size": "tiny", "train.epochs": 2, "optimizer.learning_rate": 1e-3,
          "optimizer.warmup_steps": 20}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "classical": {},
    "cnn": {"train.epochs": 4},
    "hinf_lstm": {"features.n_mels": 64, "model.blocks": ((16,), (32,)), "model.hidden": 64, "train.epochs": 4,
                  "sapt.interval": 2},
    "resnet50": {**_TENTH, "model.width": 16, "model.blocks": (1, 1, 1, 1), "optimizer.learning_rate": 1e-3},
    "mobilenet_v3": {**_TENTH, "model.width": 0.5, "optimizer.learning_rate": 1e-3},
    "vit": {**_TENTH, "model.width": 64, "model.blocks": 4, "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 50},
    "wav2vec2": _HEARD, "hubert": _HEARD, "distilhubert": _HEARD,
    "segmenter_small": {"model.width": 48},
    "audio_llm": {"train.epochs": 1, "data.clip_s": 5.0, "optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 5},
}  # fmt: skip
BUDGETS: dict[str, dict[str, dict[str, Any]]] = {"small": SMALL, "full": {}}

SHOWN = ("accuracy", "auc", "precision", "recall", "f1")
SCORED = ("f1", "accuracy", "sensitivity", "specificity")
SITE = ("mean_accuracy", "mean_database_auc")
# config -> (system, the paper's tables I to III)
HINF_PAPER: dict[str, tuple[str, tuple[float, ...]]] = {
    "hinf_lstm": ("CNN-H∞-LSTM with SAPT", (0.9885, 0.9942, 0.9923, 0.9949)),
    "hinf_lstm/cnn_lstm": ("CNN-LSTM with SAPT", (0.9619, 0.9816, 0.9469, 0.9929)),
    "resnet50": ("ResNet-50", (0.8968, 0.8894, 0.9383, 0.8382)),
    "mobilenet_v3": ("MobileNetV3-Large", (0.8136, 0.8127, 0.7901, 0.8382)),
    "vit": ("Vision transformer", (0.8423, 0.9523, 0.8997, 0.9608)),
    "wav2vec2": ("Wav2Vec2", (0.6954, 0.6814, 0.6326, 0.6324)),
    "hubert": ("HuBERT", (0.7121, 0.7121, 0.7185, 0.7058)),
    "distilhubert": ("DistilHuBERT", (0.7445, 0.7823, 0.7247, 0.7654)),
}
HEARING = ("wav2vec2", "hubert", "distilhubert")  # in PyTorch, at 16 kHz
CONFIGURATIONS = {"no_filter": "No filter", "no_filter_noise": "No filter, noise", "filter": "Filter",
                  "filter_noise": "Filter, noise"}  # fmt: skip
LLM_RUNS = {"ns": "N.S", "ws": "W.S"}


class NotRun(ValueError):
    """A stage that lacks what it needs; the message says what."""


class Stage(NamedTuple):
    name: str  # of its file in OUT/stages
    title: str
    settings: dict[str, Any]  # with which OUT must have been made
    run: Callable[[], Any]  # goes on where it was stopped
    after: tuple[str, ...] = ()  # stages that must be done
    torch: bool = False


class Job(NamedTuple):
    """What all stages are told."""

    source: pathlib.Path
    out: pathlib.Path
    budget: str
    model: str  # the folder of an audio LLM; "": a tiny random one

    def prepared(self, dataset: str, rate_hz: int) -> pathlib.Path:
        return self.out / "prepared" / f"{dataset}_{rate_hz}"

    def changes(self, config: str) -> dict[str, Any]:
        return BUDGETS[self.budget].get(config, {})


# --------------------------------------------------------------------------------------------------- what stages do


def _prepare(job: Job, dataset: str, rate_hz: int) -> None:
    folder = job.source / dataset
    if not folder.is_dir():
        raise NotRun(f"no data set {dataset}: {folder} is not there")
    prepare.prepare(dataset, folder, job.prepared(dataset, rate_hz), rate_hz)


def _train(name: str, changes: Mapping[str, Any], workdir: pathlib.Path, probed: bool = False) -> None:
    """Trains configs/NAME.py, all that it asks for; `probed`: with the site report of each run."""
    train.run_all(runs.load_config(name, changes), workdir, False)
    if probed:
        for path in sorted(workdir.rglob("metrics.json")):
            sites.write(path.parent)


def _by_record(name: str, changes: Mapping[str, Any], workdir: pathlib.Path, job: Job, published: bool) -> None:
    """Trains on a split by recording: a fifth of either class tests.

    `published`: the 1D CNN's 301 instead, those of the Challenge's validation folder where SOURCE has it, else drawn;
    a fifth where there are too few for that.
    """
    names: pathlib.Path | str = job.out / "runs" / "by_record.csv"
    listed = job.source / "cinc2016" / "validation" / "REFERENCE.csv"
    _, rows = prepare.read_rows(changes["data.prepared"])
    own = [sorted(r["id"] for r in rows if r["labels"].get("abnormal") == value) for value in ("0", "1")]
    if published and listed.is_file():
        names = listed
    elif published and min(map(len, own)) > 302:
        names = ""  # the split draws them
    elif not pathlib.Path(names).exists():
        rng = np.random.default_rng(0)
        chosen = [ids[i] for ids in own for i in rng.permutation(len(ids))[: max(round(0.2 * len(ids)), 1)]]
        files.write_text(pathlib.Path(names), "".join(f"{one}\n" for one in sorted(chosen)))
    split = {"split.kind": "paper301", "split.names": str(names), "split.allow_leaks": True,
             "split.file": str(job.out / "runs" / f"by_record{'_301' * published}.json")}  # fmt: skip
    _train(name, {**changes, **split}, workdir)


def _left_out(name: str, changes: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, str]:
    """Trains once for each database, which alone is then judged. Returns {database: why it could not be left out}."""
    _, rows = prepare.read_rows(changes["data.prepared"])
    reasons = {}
    for database in sorted({row["database"] for row in rows}):
        if (workdir / database / "metrics.json").exists():
            continue
        split = {"split.kind": "leave_database_out", "split.database": database}
        try:
            _train(name, {**changes, **split}, workdir / database)
        except splits.SplitError as error:
            reasons[database] = str(error)
    if not any(workdir.glob("*/metrics.json")):
        raise NotRun("; ".join(f"{database}: {why}" for database, why in reasons.items()))
    return reasons


def _tiny(out: pathlib.Path) -> None:
    from pcgjax.audio_llm import make_tiny

    if not (out / "config.json").exists():
        make_tiny.make_tiny(out)


def _segmenter(job: Job, changes: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Trains the front end on people of whom the audio LLM is not asked: both have one split."""
    config = runs.load_config("audio_llm", {})
    _, heard = prepare.read_rows(job.prepared("circor", 16000))
    _, rows = prepare.read_rows(job.prepared("circor", 2000))
    shared = job.out / "runs" / "llm_split.json"
    if not shared.exists():
        fractions = tuple(config.split.fractions)
        splits.save(splits.make(heard, "person", config.task.target, config.seed, fractions), shared)
    parts = splits.load(shared, heard)
    annotated = [row for row in rows if any(start < end for start, end, _ in row["annotations"])]
    own = splits.make(annotated, "person", "", config.seed, tuple(config.split.fractions))
    wanted = {row["id"] for row in annotated}
    moved = {part: sorted(wanted & set(parts[part])) for part in splits.PARTS}
    counts = {part: {"all": {"recordings": len(ids)}} for part, ids in moved.items()}
    rest = sorted(wanted - {name for ids in moved.values() for name in ids})
    path = job.out / "runs" / "segmenter_split.json"
    notes = ["the parts are those of the audio LLM's split"]
    splits.save({**own, **moved, "unlabelled": rest, "counts": counts, "notes": notes}, path)
    _train("segmenter_small", {**changes, "split.file": str(path)}, workdir)


def _segments(job: Job, dataset: str, target: str) -> None:
    """A .tsv of each recording, or of those that have the label `target`; what is there already is kept."""
    from pcgjax import predict

    if not (job.source / dataset).is_dir():
        raise NotRun(f"no data set {dataset}: {job.source / dataset} is not there")
    out = job.out / "segments" / dataset
    recordings, _ = datasets.load(dataset, job.source / dataset)
    paths = [str(r.path) for r in recordings if not target or r.labels.get(target)]
    todo = [path for path in paths if not (out / f"{pathlib.Path(path).stem}.tsv").exists()]
    if todo:
        predict.predict(str(job.out / "runs" / "segmenter"), todo, str(out / "answers.csv"))


def _llm_train(job: Job, changes: Mapping[str, Any], workdir: pathlib.Path) -> None:
    from pcgjax.audio_llm import train as llm_train

    llm_train.train(runs.load_config("audio_llm", changes), _model_of(job), workdir)


def _llm_score(job: Job) -> dict[str, str]:
    """Scores the honest runs, and asks them about the data sets that nobody trained on; {data set: why not}."""
    from pcgjax.audio_llm import score

    unheard = {name: str(job.source / name) for name in ("cinc2016", "pascal")}
    lacking = {name: f"no data set {name}" for name, folder in unheard.items() if not pathlib.Path(folder).is_dir()}
    unheard = {name: folder for name, folder in unheard.items() if name not in lacking}
    segments = {name: str(job.out / "segments" / name) for name in unheard}
    workdirs = [str(job.out / "runs" / f"llm_{run}_honest") for run in LLM_RUNS]
    score.score(_model_of(job), workdirs, job.out / "runs" / "llm_scores", zero_shots=unheard, segments=segments)
    return lacking


def _model_of(job: Job) -> str:
    return job.model or str(job.out / "tiny_llm")


# -------------------------------------------------------------------------------------------------------- the stages


def plan(job: Job, papers: Iterable[str]) -> list[Stage]:
    """The stages of these papers, in an order in which each comes after those it needs."""
    found: dict[str, Stage] = {}

    def add(name: str, title: str, run: Callable, *arguments: Any, settings: Any = (), after: Sequence[str] = (),
            torch: bool = False) -> str:  # fmt: skip
        told = json.loads(json.dumps({"budget": job.budget, **dict(settings)}))
        # Of a stage that two papers share there is one.
        found.setdefault(name, Stage(name, title, told, functools.partial(run, *arguments), tuple(after), torch))
        return name

    def prepared(dataset: str, rate_hz: int) -> str:
        title = f"prepare {dataset} at {rate_hz} Hz"
        told = {"source": str(job.source)}
        return add(f"prepare_{dataset}_{rate_hz}", title, _prepare, job, dataset, rate_hz, settings=told)

    def trained(
        config: str, run: str, title: str, dataset: str, rate_hz: int, how: Callable, *more: Any, fields: Any = ()
    ):
        after = [prepared(dataset, rate_hz)]
        changes = {**job.changes(config), **dict(fields)}
        told = {**changes, "data.prepared": str(job.prepared(dataset, rate_hz))}
        arguments = (config, told, job.out / "runs" / run, *more)
        kept = {name: value for name, value in changes.items() if name != "split.file"}  # OUT may be moved
        return add(_stage_of(run), title, how, *arguments, settings=kept, after=after, torch=config in HEARING)

    person: dict[str, Any] = {"split.kind": "person", "split.fractions": (0.65, 0.15, 0.2),
              "split.file": str(job.out / "runs" / "cinc_people.json")}  # fmt: skip
    for paper in papers:
        if paper == "classical":
            trained("classical", "classical", "classical chain, PASCAL B, both protocols", "pascal", 2000, _train)
            trained("classical", "classical_person", "classical chain, CinC 2016, people apart", "cinc2016", 2000,
                    _train, True, fields={**person, "experiment.runs": 0})  # fmt: skip
        if paper == "cnn":
            data = ("cinc2016", 1000)
            for name, overrides in runs.load_config("cnn:sweep", {}).variants.items():
                title = f"1D CNN, {CONFIGURATIONS[name].lower()}"
                own = {f"features.{field}": value for field, value in overrides["features"].items()}
                trained("cnn", f"cnn_published/{name}", f"{title}, as published", *data, _by_record, job, True,
                        fields=own)  # fmt: skip
                trained("cnn", f"cnn_person/{name}", f"{title}, people apart", *data, _train, True,
                        fields={**own, **person})  # fmt: skip
            trained("cnn", "cnn_left_out", "1D CNN, each database left out", *data, _left_out)
        if paper == "hinf_lstm":
            for config in dict.fromkeys(name.partition("/")[0] for name in HINF_PAPER):
                data = ("cinc2016", 16000 if config in HEARING else 2000)
                title = HINF_PAPER[config][0]
                trained(config, f"{config}_published", f"{title}, as published", *data, _by_record, job, False)
                trained(config, f"{config}_person", f"{title}, people apart", *data, _train, True, fields=person)
            title = "CNN-H∞-LSTM, each database left out"
            trained("hinf_lstm", "hinf_lstm_left_out", title, "cinc2016", 2000, _left_out)
        if paper == "audio_llm":
            _plan_llm(job, add, prepared)
    return list(found.values())


def _stage_of(run: str) -> str:
    return run.replace("/", "_")


def _plan_llm(job: Job, add: Callable, prepared: Callable) -> None:
    rates = [prepared("circor", 2000), prepared("circor", 16000)]
    told = {"model": job.model}
    model = [] if job.model else [add("tiny_llm", "a tiny random audio LLM", _tiny, job.out / "tiny_llm", torch=True)]
    changes = {**job.changes("segmenter_small"), "data.prepared": str(job.prepared("circor", 2000)),
               "data.train_share": 1 / 3}  # fmt: skip
    cut = add("segmenter", "segmenter, CirCor", _segmenter, job, changes, job.out / "runs" / "segmenter",
              settings=job.changes("segmenter_small"), after=rates)  # fmt: skip
    targets = {"circor": "", "cinc2016": "abnormal", "pascal": "abnormal"}
    cuts = {name: add(f"segments_{name}", f"segments of {name}", _segments, job, name, target, after=[cut])
            for name, target in targets.items()}  # fmt: skip
    for protocol, padding in (("published", "repeat"), ("honest", "other")):
        for run, kind in (("ns", "none"), ("ws", "crop")):
            fields = {**job.changes("audio_llm"), "questions.padding": padding, "front_end.kind": kind,
                      **({} if job.model else {"model.dtype": "float32"})}  # fmt: skip
            places = {"data.prepared": str(job.prepared("circor", 16000)),
                      "split.file": str(job.out / "runs" / "llm_split.json"),
                      "front_end.segments": str(job.out / "segments" / "circor") if kind == "crop" else ""}  # fmt: skip
            name = f"llm_{run}_{protocol}"
            after = [*model, cut, *([cuts["circor"]] if kind == "crop" else [])]
            add(name, f"audio LLM, {LLM_RUNS[run]}, {protocol}", _llm_train, job, {**fields, **places},
                job.out / "runs" / name, settings={**told, **fields}, after=after, torch=True)  # fmt: skip
    after = ["llm_ns_honest", "llm_ws_honest", *(cuts[name] for name in targets if (job.source / name).is_dir())]
    add("llm_scores", "audio LLM, scores and zero-shot", _llm_score, job, settings=told, after=after, torch=True)


def saved(stages: Iterable[Stage], out: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What OUT has of these stages: {name: {"status", "why", "seconds", ...}}.

    Raises:
      ValueError: one was made with other settings.
    """
    states: dict[str, dict[str, Any]] = {}
    for stage in stages:
        path = _state_path(out, stage.name)
        if stage.name not in states and path.exists():
            states[stage.name] = {"why": "stopped before its end", **report.read_json(path)}
            _refuse_changes(path, states[stage.name].get("settings", {}), stage.settings)
    return states


def _state_path(out: pathlib.Path, stage: str) -> pathlib.Path:
    return out / "stages" / f"{stage}.json"


def carry_out(stages: Sequence[Stage], out: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Runs the stages that OUT lacks, whatever becomes of the others; returns what `saved` then would, and raises as it
    does before anything is run."""
    states = saved(stages, out)
    began = time.monotonic()
    for number, stage in enumerate(stages, 1):
        before = states.get(stage.name, {})
        if before.get("status") == "done" and not before["result"]:  # else it names what it lacked: there may be more
            continue
        start = time.monotonic()
        state: dict[str, Any] = {"title": stage.title, "settings": stage.settings, "status": "begun"}
        if lacking := [name for name in stage.after if states[name]["status"] != "done"]:
            reasons = [states[name] for name in lacking]
            failed = [
                f"{one['title']} failed: {one['why']}" if one["status"] == "failed" else one["why"] for one in reasons
            ]
            why = "; ".join(dict.fromkeys(failed))
            state |= {"status": "not run", "why": why, "seconds": 0.0}
        else:
            logging.info("[%d/%d] %s, %.0f s since the start", number, len(stages), stage.title, start - began)
            files.write_text(_state_path(out, stage.name), json.dumps(state, indent=1) + "\n")
            state |= _attempt(stage) | {"seconds": time.monotonic() - start}
            jax.clear_caches()  # of programs that no other stage has
        logging.info(
            "[%d/%d] %s: %s %s", number, len(stages), stage.title, state["status"],
            state["why"] or f"in {state['seconds']:.0f} s",
        )  # fmt: skip
        states[stage.name] = state
        files.write_text(_state_path(out, stage.name), json.dumps(state, indent=1) + "\n")
    return states


def _attempt(stage: Stage) -> dict[str, Any]:
    try:
        result = _alone(stage.run) if stage.torch and jax.default_backend() != "cpu" else stage.run()
        return {"status": "done", "why": "", "result": result}
    except NotRun as error:
        return {"status": "not run", "why": str(error)}
    except Exception as error:  # the others go on; what it was is in the table
        if stage.torch and isinstance(error, ImportError):
            return {"status": "not run", "why": f'{error}; pip install "pcgjax[audio-llm]"'}
        logging.exception("%s failed", stage.title)
        return {"status": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}


def _alone(run: Callable) -> Any:
    """In a process of its own, in which PyTorch has the accelerator that JAX holds here."""
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(1, context, _begin_alone) as pool:
        return pool.submit(run).result()


def _begin_alone() -> None:
    jax.config.update("jax_platforms", "cpu")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:  # what ends the parent makes the training here save and end
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _refuse_changes(path: pathlib.Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in dict.fromkeys([*now, *saved]):
        if saved.get(name) != now.get(name):
            raise ValueError(f"{path}: made with {name}={saved.get(name)}, now {now.get(name)}; give another --out")


# --------------------------------------------------------------------------------------------------------- the rows


def rows_of(job: Job, paper: str, states: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of table.json of one paper; see the top of the file."""
    if paper == "classical":
        return _classical_rows(job, states)
    if paper == "cnn":
        results: Any = compare.CNN_PAPER["results"]
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
    full = runs.load_config(config, {}).train.epochs
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
    stage_of = {kind: _stage_of(path.removesuffix("/cnn_lstm")) for kind, path in paths.items()}
    ended = [kind for kind in paths if states.get(stage_of[kind], {}).get("status") == "done"]
    scores: dict[str, Mapping[str, Any]] = {}
    test: Mapping[str, Any] = {}
    left: Mapping[str, Any] = {}
    site = None
    for kind in ended:
        if kind == "left_out":
            judged = left = left_out(folder(kind))
        else:
            judged = report.read_results(folder(kind) / "metrics.json")["test"]
        scores[kind] = report.overall_scores(judged)
        if kind == "person":
            test, site = judged, site_of(report.read_json(folder(kind) / "sites.json"))
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
        best = report.best_trivial(test, metric) if test else None
        if best is None and test:  # of sensitivity alone a constant answer gets everything
            best = report.WORDS["database_prior"], test["trivial"]["database_prior"][metric]
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
        test = report.read_results(path.with_name("metrics.json"))["test"]
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


def _left_out_clips(job: Job, states: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """{title of a stage: [{"id", "reason"}]}: what could not be read, and clips without a heartbeat."""
    found = {}
    for name, state in states.items():
        if state["status"] != "done":
            continue
        if name.startswith("prepare_"):
            manifest = report.read_json(job.out / "prepared" / name.removeprefix("prepare_") / "manifest.json")
            out = [{"id": one["path"], "reason": one["reason"]} for one in manifest["problems"]]
        elif name.startswith("classical"):
            out = report.read_json(job.out / "runs" / name / "metrics.json")["features"]["left_out"]
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
        asked = report.read_json(job.out / "runs" / "classical" / "experiment.json")
        by = {(r["set"], r["classifier"], r["protocol"]): r for r in asked["rows"]}
        for of_set in classical.SETS:
            [trivial] = [t["scores"] for t in asked["trivial"] if (t["set"], t["protocol"]) == (of_set, "person")]
            for name in classical.CLASSIFIERS:
                record, person = (by[of_set, name, protocol] for protocol in classical.PROTOCOLS)
                for metric in classical.SCORES:
                    best, mean = record["scores"][metric], person["scores"][metric]
                    best = {key: best[key] for key in ("best", "mean", "deviation")}  # the interval is the mean's
                    rows.append(_row(
                        "classical", f"{classical.WORDS[name]}, {of_set}", "PASCAL B", metric,
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
                judged = report.read_json(job.out / "runs" / name / "metrics.json")["runs"]
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


# ----------------------------------------------------------------------------------------------------- the command


def reproduce(paper: str, source: str | pathlib.Path, out: str | pathlib.Path, budget: str = "full", model: str = ""):
    """Runs what OUT lacks of a paper, or of all; writes and returns what table.json holds.

    Raises:
      ValueError: an unknown paper or budget, no folder SOURCE, or an OUT that was made with other settings.
    """
    if paper not in (*PAPERS, "all") or budget not in BUDGETS:
        raise ValueError(
            f"paper={paper}, budget={budget}: choose of {', '.join((*PAPERS, 'all'))}; {', '.join(BUDGETS)}"
        )
    job = Job(pathlib.Path(source).resolve(), pathlib.Path(out).resolve(), budget, model and os.path.abspath(model))
    if not job.source.is_dir():
        raise ValueError(f"--source={source}: no such folder; it holds cinc2016/, circor/ and pascal/")
    stages = plan(job, PAPERS if paper == "all" else [paper])
    # What an earlier command made of another paper stays on the page, and so must have been made alike.
    known = {p: plan(job, [p]) for p in PAPERS}
    others = saved((stage for of in known.values() for stage in of), job.out)
    states = others | carry_out(stages, job.out)
    shown = [p for p, of in known.items() if p in (paper, *(PAPERS if paper == "all" else ())) or
             all(stage.name in states for stage in of)]  # fmt: skip
    table = {
        "budget": budget, "model": model or "a tiny one with random weights", "source": str(source),
        "rows": [row for p in shown for row in rows_of(job, p, states)],
        "stages": {name: {k: v for k, v in state.items() if k != "settings"} for name, state in states.items()},
        "left_out": _left_out_clips(job, states),
        "versions": runs.versions(),
    }  # fmt: skip
    files.write_text(job.out / "table.json", json.dumps(metrics.json_ready(table), indent=1) + "\n")
    try:
        reproduce_page.write(job.out, table)
    except ImportError as error:
        logging.warning("no report.html: %s; install it and give the same command again", error)
    return table


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: every setting is a --flag")
    logging.set_verbosity(logging.INFO)
    f = flags.FLAGS
    runs.log_to(pathlib.Path(f.out))
    table = reproduce(f.paper, f.source, f.out, f.budget, f.model)
    print(reproduce_page.summary(table))
    bad = [state for state in table["stages"].values() if state["status"] == "failed"]
    for state in table["stages"].values():
        if state["status"] != "done":
            print(f"{state['status']}: {state['title']}: {state['why']}")
    print(f"wrote {f.out}: table.json, report.html")
    return 1 if bad else 0


if __name__ == "__main__":
    flags.DEFINE_enum("paper", None, [*PAPERS, "all"], "Whose tables.", required=True)
    flags.DEFINE_string("source", None, "The folder that holds cinc2016/, circor/ and pascal/.", required=True)
    flags.DEFINE_string("out", None, "The folder to write; what is there already is not made again.", required=True)
    budgets = "full: the configs as they are; small: what two CPU cores can do in hours."
    flags.DEFINE_enum("budget", "full", list(BUDGETS), budgets)
    flags.DEFINE_string("model", "", "A local copy of Qwen2-Audio; without it a tiny random one is asked.")
    files.run(main)
