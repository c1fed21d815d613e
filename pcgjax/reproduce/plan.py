"""What each paper's tables need: preparations, trainings, evaluations."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pcgjax import datasets, prepare, sites, systems
from pcgjax.data import splits
from pcgjax.data.shards import read_rows
from pcgjax.published import HINF_PAPER
from pcgjax.reproduce.stages import NotRun, Stage
from pcgjax.runs.config import load_config
from pcgjax.runtime import files

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
HEARING = ("wav2vec2", "hubert", "distilhubert")  # in PyTorch, at 16 kHz
CONFIGURATIONS = {"no_filter": "No filter", "no_filter_noise": "No filter, noise", "filter": "Filter",
                  "filter_noise": "Filter, noise"}  # fmt: skip
LLM_RUNS = {"ns": "N.S", "ws": "W.S"}


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


def _prepare(job: Job, dataset: str, rate_hz: int) -> None:
    folder = job.source / dataset
    if not folder.is_dir():
        raise NotRun(f"no data set {dataset}: {folder} is not there")
    prepare.prepare(dataset, folder, job.prepared(dataset, rate_hz), rate_hz)


def _train(name: str, changes: Mapping[str, Any], workdir: pathlib.Path, probed: bool = False) -> None:
    """Trains configs/NAME.py, all that it asks for; `probed`: with the site report of each run."""
    config = load_config(name, changes)
    systems.of(config.task.name).train(config, workdir, False)
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
    _, rows = read_rows(changes["data.prepared"])
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
    _, rows = read_rows(changes["data.prepared"])
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
    config = load_config("audio_llm", {})
    _, heard = read_rows(job.prepared("circor", 16000))
    _, rows = read_rows(job.prepared("circor", 2000))
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
    from pcgjax.audio_llm.loop import train

    train(load_config("audio_llm", changes), _model_of(job), workdir)


def _llm_score(job: Job) -> dict[str, str]:
    """Scores the honest runs, and asks them about the data sets that nobody trained on; {data set: why not}."""
    from pcgjax.audio_llm.comparison import score

    unheard = {name: str(job.source / name) for name in ("cinc2016", "pascal")}
    lacking = {name: f"no data set {name}" for name, folder in unheard.items() if not pathlib.Path(folder).is_dir()}
    unheard = {name: folder for name, folder in unheard.items() if name not in lacking}
    segments = {name: str(job.out / "segments" / name) for name in unheard}
    workdirs = [str(job.out / "runs" / f"llm_{run}_honest") for run in LLM_RUNS]
    score(_model_of(job), workdirs, job.out / "runs" / "llm_scores", zero_shots=unheard, segments=segments)
    return lacking


def _model_of(job: Job) -> str:
    return job.model or str(job.out / "tiny_llm")


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
        return add(stage_name(run), title, how, *arguments, settings=kept, after=after, torch=config in HEARING)

    person: dict[str, Any] = {"split.kind": "person", "split.fractions": (0.65, 0.15, 0.2),
              "split.file": str(job.out / "runs" / "cinc_people.json")}  # fmt: skip
    for paper in papers:
        if paper == "classical":
            trained("classical", "classical", "classical chain, PASCAL B, both protocols", "pascal", 2000, _train)
            trained("classical", "classical_person", "classical chain, CinC 2016, people apart", "cinc2016", 2000,
                    _train, True, fields={**person, "experiment.runs": 0})  # fmt: skip
        if paper == "cnn":
            data = ("cinc2016", 1000)
            for name, overrides in load_config("cnn:sweep", {}).variants.items():
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


def stage_name(run: str) -> str:
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
