"""Trains, saves and loads the classical chain as a run."""

from __future__ import annotations

import json
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from pcgjax import metrics
from pcgjax.classical.classifiers import fit
from pcgjax.classical.experiment import experiment, selected
from pcgjax.classical.features import Features, classical_features, find_sounds
from pcgjax.classical.picking import annotated_recordings, picking
from pcgjax.data import splits
from pcgjax.data.corpus import Corpus, from_prepared
from pcgjax.features import envelope
from pcgjax.pages.classical import CLASSIFIERS, write_report
from pcgjax.pages.waveforms import SHOWN_S
from pcgjax.runs.config import plain_config, refuse_changes
from pcgjax.runs.judge import judge_recordings, prediction_rows, write_table
from pcgjax.runs.log import log_line
from pcgjax.runs.record import record, versions
from pcgjax.runtime import checkpoint, files


def train_classical(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, dry_run: bool = False
) -> dict[str, Any]:
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
    corpus, target = selected(from_prepared(config.data.prepared), config)
    if dry_run:
        print(
            f"{len(corpus.rows)} recordings, {corpus.lengths.sum() / corpus.sample_rate_hz:.0f} s at "
            f"{corpus.sample_rate_hz} Hz; {2 * (config.features.nfft // 2 + 1)} attributes each; four classifiers on "
            "the host, nothing to compile for a mesh"
        )
        return {}
    now = plain_config(config)
    if (workdir / "config.json").exists():
        saved = json.loads((workdir / "config.json").read_text())
        refuse_changes(saved, {**now, "optimizer": {}}, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    files.write_text(workdir / "config.json", json.dumps(now, indent=1))
    record(workdir, config)
    made = classical_features(corpus, config)
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
            log_line(history, step, part, {"loss": loss, **{m: scores[part][m] for m in metrics.METRICS}})
        fitted[name], results[name] = p, scores
    worth = {name: results[name]["validation"][config.train.select] for name in CLASSIFIERS}
    best = max(CLASSIFIERS, key=lambda name: -np.inf if np.isnan(worth[name]) else worth[name])

    own = corpus.subset(made.indices)
    judged, table = {}, []
    for part in ("validation", "test"):
        p, i = fitted[best][part], parts[part]
        log_p = np.log(np.stack([p, 1 - p], 1))
        judged[part] = judge_recordings(own, i, y[i], log_p, config)
        table += prediction_rows(own, i, y[i], log_p, config.evaluation.threshold, part)
    write_table(table, workdir / "predictions.csv")
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
        "picking": picking(corpus, config) if annotated_recordings(corpus) else None,
        "split": {k: split[k] for k in ("kind", "notes", "counts", "people_apart", "leaks")},
        "data": {"prepared": config.data.prepared, "recordings": len(corpus.rows), "sample_rate_hz":
                 corpus.sample_rate_hz, "target": target},
        "system": {"command": shlex.join(sys.orig_argv), **versions(), "wall_s": time.monotonic() - began},
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
    meta = {"config": plain_config(config), "classifier": name, "target": target, "sample_rate_hz": rate_hz}
    with files.replacing(workdir / "checkpoints" / "best.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, features=x, labels=y, meta=np.array(json.dumps(meta)))


def load_classical(
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
        made = classical_features(corpus, config)
        log_p = np.full((len(corpus.rows), 2), np.nan)
        if len(made.indices):
            p = np.clip(probabilities(made.values), 1e-6, 1 - 1e-6)
            log_p[made.indices] = np.log(np.stack([p, 1 - p], 1))
        return log_p

    return config, True, meta["sample_rate_hz"], answer


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
        long = corpus.lengths[made.indices[own]] >= SHOWN_S * corpus.sample_rate_hz
        index = int(made.indices[own[np.where(long.any() & ~long, np.inf, off).argmin()]])
        one = corpus.subset(np.array([index]))
        [(sounds, cycle, e)] = find_sounds(one, config.features, 1)
        shown |= {f"{name}_id": np.array(one.rows[0]["id"]), f"{name}_samples": one.read(0).astype(np.float32),
                  f"{name}_envelope": e, f"{name}_states": np.array(envelope.states(sounds, cycle))}  # fmt: skip
    step = envelope.frames(config.features.window_s, config.features.hop_s, corpus.sample_rate_hz)
    return shown | {"step_s": step.step_s, "window_s": step.window / corpus.sample_rate_hz}
