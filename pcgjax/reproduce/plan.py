"""The plan of a paper's tables: which stages there are, what each needs, and with which settings it is carried out."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pcgjax.published import HINF_PAPER
from pcgjax.reproduce import work
from pcgjax.reproduce.job import CONFIGURATIONS, ENCODERS, LLM_RUNS, Job, stage_name
from pcgjax.reproduce.stages import Stage
from pcgjax.runs.config import load_config


def plan(job: Job, papers: Iterable[str]) -> list[Stage]:
    """The stages of these papers, in an order in which each comes after those it needs."""
    builder = _Plan(job)
    of_paper = {"classical": _classical, "cnn": _cnn, "hinf_lstm": _hinf_lstm, "audio_llm": _audio_llm}
    for paper in papers:
        of_paper[paper](builder)
    return list(builder.stages.values())


class _Plan:
    """The stages so far; of a stage that two papers share there is one."""

    def __init__(self, job: Job):
        self.job, self.stages = job, dict[str, Stage]()
        # The split by person that all systems of CinC 2016 share.
        self.person: dict[str, Any] = {"split.kind": "person", "split.fractions": (0.65, 0.15, 0.2),
                                       "split.file": str(job.run("cinc_people.json"))}  # fmt: skip

    def add(self, name: str, title: str, run: Callable, *arguments: Any, settings: Mapping[str, Any] | None = None,
            after: Sequence[str] = (), torch: bool = False, again: bool = False) -> str:  # fmt: skip
        """Adds run(*arguments) as a stage, and returns its name.

        settings: with which OUT must have been made, besides the budget; after: the stages that it needs.
        """
        plain = json.loads(json.dumps({"budget": self.job.budget, **(settings or {})}))
        self.stages.setdefault(
            name, Stage(name, title, plain, functools.partial(run, *arguments), tuple(after), torch, again)
        )
        return name

    def prepared(self, dataset: str, rate_hz: int) -> str:
        """The stage that prepares a data set."""
        title, settings = f"prepare {dataset} at {rate_hz} Hz", {"source": str(self.job.source)}
        arguments = (self.job, dataset, rate_hz)
        return self.add(f"prepare_{dataset}_{rate_hz}", title, work.prepare_dataset, *arguments, settings=settings,
                        again=True)  # fmt: skip

    def trained(self, config: str, run: str, title: str, dataset: str, rate_hz: int, how: Callable, *more: Any,
                fields: Mapping[str, Any] | None = None) -> str:  # fmt: skip
        """The stage that trains a config by how(config, its changed fields, workdir, *more)."""
        after = [self.prepared(dataset, rate_hz)]
        changes = {**self.job.changes(config), **(fields or {})}
        all_fields = {**changes, "data.prepared": str(self.job.prepared(dataset, rate_hz))}
        arguments = (config, all_fields, self.job.run(run), *more)
        settings = {name: value for name, value in changes.items() if name != "split.file"}  # OUT may be moved
        return self.add(stage_name(run), title, how, *arguments, settings=settings, after=after,
                        torch=config in ENCODERS)  # fmt: skip


def _classical(builder: _Plan) -> None:
    builder.trained("classical", "classical", "classical chain, PASCAL B, both protocols", "pascal", 2000,
                    work.train_config)  # fmt: skip
    builder.trained("classical", "classical_person", "classical chain, CinC 2016, people apart", "cinc2016", 2000,
                    work.train_config, True, fields={**builder.person, "experiment.runs": 0})  # fmt: skip


def _cnn(builder: _Plan) -> None:
    data = ("cinc2016", 1000)
    for name, overrides in load_config("cnn:sweep", {}).variants.items():
        title = f"1D CNN, {CONFIGURATIONS[name].lower()}"
        fields = {f"features.{field}": value for field, value in overrides["features"].items()}
        builder.trained("cnn", f"cnn_published/{name}", f"{title}, as published", *data, work.train_by_record,
                        builder.job, True, fields=fields)  # fmt: skip
        builder.trained("cnn", f"cnn_person/{name}", f"{title}, people apart", *data, work.train_config, True,
                        fields={**fields, **builder.person})  # fmt: skip
    builder.trained("cnn", "cnn_left_out", "1D CNN, each database left out", *data, work.train_left_out)


def _hinf_lstm(builder: _Plan) -> None:
    for config in dict.fromkeys(name.partition("/")[0] for name in HINF_PAPER):
        data = ("cinc2016", 16000 if config in ENCODERS else 2000)
        title = HINF_PAPER[config][0]
        builder.trained(config, f"{config}_published", f"{title}, as published", *data, work.train_by_record,
                        builder.job, False)  # fmt: skip
        builder.trained(config, f"{config}_person", f"{title}, people apart", *data, work.train_config, True,
                        fields=builder.person)  # fmt: skip
    title = "CNN-H∞-LSTM, each database left out"
    builder.trained("hinf_lstm", "hinf_lstm_left_out", title, "cinc2016", 2000, work.train_left_out)


def _audio_llm(builder: _Plan) -> None:
    job, add = builder.job, builder.add
    rates = [builder.prepared("circor", 2000), builder.prepared("circor", 16000)]
    model_given = {"model": job.model}
    model: list[str] = []
    if not job.model:
        model = [add("tiny_llm", "a tiny random audio LLM", work.make_tiny_llm, job.out / "tiny_llm", torch=True)]
    changes = {**job.changes("segmenter_small"), "data.prepared": str(job.prepared("circor", 2000)),
               "data.train_share": 1 / 3}  # fmt: skip
    segmenter = add("segmenter", "segmenter, CirCor", work.train_segmenter, job, changes, job.run("segmenter"),
                    settings=job.changes("segmenter_small"), after=rates)  # fmt: skip
    targets = {"circor": "", "cinc2016": "abnormal", "pascal": "abnormal"}
    segments = {
        name: add(f"segments_{name}", f"segments of {name}", work.segment_dataset, job, name, target, after=[segmenter])
        for name, target in targets.items()
    }
    for protocol, padding in (("published", "repeat"), ("honest", "other")):
        for run, kind in (("ns", "none"), ("ws", "crop")):
            fields = {**job.changes("audio_llm"), "questions.padding": padding, "front_end.kind": kind,
                      **({} if job.model else {"model.dtype": "float32"})}  # fmt: skip
            places = {"data.prepared": str(job.prepared("circor", 16000)),
                      "split.file": str(job.run("llm_split.json")),
                      "front_end.segments": str(job.out / "segments" / "circor") if kind == "crop" else ""}  # fmt: skip
            name = f"llm_{run}_{protocol}"
            after = [*model, segmenter, *([segments["circor"]] if kind == "crop" else [])]
            add(name, f"audio LLM, {LLM_RUNS[run]}, {protocol}", work.train_llm, job, {**fields, **places},
                job.run(name), settings={**model_given, **fields}, after=after, torch=True)  # fmt: skip
    after = ["llm_ns_honest", "llm_ws_honest", *(segments[name] for name in targets if (job.source / name).is_dir())]
    add("llm_scores", "audio LLM, scores and zero-shot", work.score_llm, job, settings=model_given, after=after,
        torch=True)  # fmt: skip
