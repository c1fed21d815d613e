"""What the stages do: prepare a data set, train a config on some split, segment, and score the audio LLM."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pcgjax import datasets, predict, prepare, sites, systems
from pcgjax.data import splits
from pcgjax.data.shards import read_rows
from pcgjax.reproduce.job import LLM_RUNS, Job
from pcgjax.reproduce.stages import NotRun
from pcgjax.runs.config import load_config
from pcgjax.runtime import files


def prepare_dataset(job: Job, dataset: str, rate_hz: int) -> None:
    """Prepares a data set of SOURCE at this rate."""
    folder = job.source / dataset
    if not folder.is_dir():
        raise NotRun(f"no data set {dataset}: {folder} is not there")
    prepare.prepare(dataset, folder, job.prepared(dataset, rate_hz), rate_hz)


def train_config(name: str, changes: Mapping[str, Any], workdir: pathlib.Path, probed: bool = False) -> None:
    """Trains configs/NAME.py, all that it asks for; probed: with the site report of each run."""
    config = load_config(name, changes)
    systems.of(config.task.name).train(config, workdir, False)
    if probed:
        for path in sorted(workdir.rglob("metrics.json")):
            sites.write(path.parent)


def train_by_record(name: str, changes: Mapping[str, Any], workdir: pathlib.Path, job: Job, published: bool) -> None:
    """Trains on a split by recording: a fifth of either class tests.

    published: the 1D CNN's 301 instead, those of the Challenge's validation folder where SOURCE has it, else drawn;
      a fifth where there are too few for that.
    """
    fifth = job.run("by_record.csv")
    names = str(fifth)
    validation = job.source / "cinc2016" / "validation" / "REFERENCE.csv"
    _, rows = read_rows(changes["data.prepared"])
    of_class = [sorted(r["id"] for r in rows if r["labels"].get("abnormal") == value) for value in ("0", "1")]
    if published and validation.is_file():
        names = str(validation)
    elif published and min(map(len, of_class)) > 302:
        names = ""  # the split draws them
    elif not fifth.exists():
        rng = np.random.default_rng(0)
        drawn = [ids[i] for ids in of_class for i in rng.permutation(len(ids))[: max(round(0.2 * len(ids)), 1)]]
        files.write_text(fifth, "".join(f"{name}\n" for name in sorted(drawn)))
    split_file = "by_record_301.json" if published else "by_record.json"
    split = {"split.kind": "paper301", "split.names": names, "split.allow_leaks": True,
             "split.file": str(job.run(split_file))}  # fmt: skip
    train_config(name, {**changes, **split}, workdir)


def train_left_out(name: str, changes: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, str]:
    """Trains once for each database, which alone is then judged. Returns {database: why it could not be left out}."""
    _, rows = read_rows(changes["data.prepared"])
    reasons = {}
    for database in sorted({row["database"] for row in rows}):
        if (workdir / database / "metrics.json").exists():
            continue
        split = {"split.kind": "leave_database_out", "split.database": database}
        try:
            train_config(name, {**changes, **split}, workdir / database)
        except splits.SplitError as error:
            reasons[database] = str(error)
    if not any(workdir.glob("*/metrics.json")):
        raise NotRun("; ".join(f"{database}: {why}" for database, why in reasons.items()))
    return reasons


def make_tiny_llm(out: pathlib.Path) -> None:
    """Writes a tiny random audio LLM, where `out` has none."""
    from pcgjax.audio_llm import make_tiny

    if not (out / "config.json").exists():
        make_tiny.make_tiny(out)


def train_segmenter(job: Job, changes: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Trains the front end on the split of the audio LLM: on none of the people whom that is tested on."""
    config = load_config("audio_llm", {})
    _, llm_rows = read_rows(job.prepared("circor", 16000))
    _, rows = read_rows(job.prepared("circor", 2000))
    fractions = tuple(config.split.fractions)
    llm_split = job.run("llm_split.json")
    if not llm_split.exists():
        splits.save(splits.make(llm_rows, "person", config.task.target, config.seed, fractions), llm_split)
    llm_parts = splits.load(llm_split, llm_rows)
    annotated = [row for row in rows if any(start < end for start, end, _ in row["annotations"])]
    split = splits.make(annotated, "person", "", config.seed, fractions)
    ids = {row["id"] for row in annotated}
    parts = {part: sorted(ids & set(llm_parts[part])) for part in splits.PARTS}
    counts = {part: {"all": {"recordings": len(of_part)}} for part, of_part in parts.items()}
    rest = sorted(ids - {name for of_part in parts.values() for name in of_part})
    path = job.run("segmenter_split.json")
    notes = ["the parts are those of the audio LLM's split"]
    splits.save({**split, **parts, "unlabelled": rest, "counts": counts, "notes": notes}, path)
    train_config("segmenter_small", {**changes, "split.file": str(path)}, workdir)


def segment_dataset(job: Job, dataset: str, target: str) -> None:
    """A .tsv of each recording, or of those that have the label `target`; what is there already is kept."""
    if not (job.source / dataset).is_dir():
        raise NotRun(f"no data set {dataset}: {job.source / dataset} is not there")
    out = job.out / "segments" / dataset
    recordings, _ = datasets.load(dataset, job.source / dataset)
    paths = [str(r.path) for r in recordings if not target or r.labels.get(target)]
    todo = [path for path in paths if not (out / f"{pathlib.Path(path).stem}.tsv").exists()]
    if todo:
        predict.predict(str(job.run("segmenter")), todo, str(out / "answers.csv"))


def train_llm(job: Job, changes: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Trains configs/audio_llm.py on the job's audio LLM."""
    from pcgjax.audio_llm.loop import train

    train(load_config("audio_llm", changes), job.llm(), workdir)


def score_llm(job: Job) -> dict[str, str]:
    """Scores the honest runs on CirCor, and on data sets that were not trained on; returns {data set: why not}."""
    from pcgjax.audio_llm.comparison import score

    folders = {name: job.source / name for name in ("cinc2016", "pascal")}
    lacking = {name: f"no data set {name}" for name, folder in folders.items() if not folder.is_dir()}
    zero_shots = {name: str(folder) for name, folder in folders.items() if name not in lacking}
    segments = {name: str(job.out / "segments" / name) for name in zero_shots}
    workdirs = [str(job.run(f"llm_{run}_honest")) for run in LLM_RUNS]
    score(job.llm(), workdirs, job.run("llm_scores"), zero_shots=zero_shots, segments=segments)
    return lacking
