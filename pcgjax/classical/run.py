"""Trains, judges, saves and loads the classical chain: `WORKDIR` holds what every run's does, and experiment.json.

The checkpoint is the features that the best classifier was fitted to, as plain arrays: scikit-learn's objects would
have to be pickled, and fitting it again takes a second.
"""

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
from pcgjax.classical.experiment import experiment
from pcgjax.classical.features import Features, classical_features, find_sounds
from pcgjax.classical.picking import annotated_recordings, picking
from pcgjax.classical.selection import selected
from pcgjax.data.corpus import Corpus, from_prepared, order_digest
from pcgjax.features import envelope
from pcgjax.pages.classical import CLASSIFIERS, write_report
from pcgjax.pages.waveforms import SHOWN_S
from pcgjax.runs import lock, schema
from pcgjax.runs.best import selection_score
from pcgjax.runs.config import difference, plain_config, refuse_changes
from pcgjax.runs.data import split_corpus
from pcgjax.runs.judge import judge_recordings, prediction_rows, write_table
from pcgjax.runs.log import log_line
from pcgjax.runs.record import record, versions
from pcgjax.runs.results import read_json
from pcgjax.runs.seal import seal, unseal
from pcgjax.runtime import files, hashes


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
    schema.check(config)
    with lock.held(workdir):
        return _train_classical(config, pathlib.Path(workdir), dry_run)


def _train_classical(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool) -> dict[str, Any]:
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
    began = time.monotonic()
    _begin(config, workdir)
    features = classical_features(corpus, config)
    for recording in features.left_out:
        logging.warning("left out: %s: %s", recording["id"], recording["reason"])
    if not len(features.indices):
        raise ValueError(
            f"data.prepared={config.data.prepared}: no cycle was found in any of {len(corpus.rows)} recordings"
        )
    with_cycle = corpus.subset(features.indices)
    y = np.array([int(row["labels"][target]) for row in with_cycle.rows])
    # Divided with those left out, so that one split file serves other systems as well.
    resolved = config.copy_and_resolve_references()
    resolved.task.target = target
    parts, split = split_corpus(resolved, workdir, corpus)
    place = np.full(len(corpus.rows), -1, np.int32)
    place[features.indices] = np.arange(len(y))
    parts = {part: place[indices][place[indices] >= 0] for part, indices in parts.items()}

    probabilities, scores = _fit_all(config, workdir / "metrics.jsonl", features.values, y, parts)
    worth = {name: selection_score(scores[name]["validation"], config.train.select) for name in CLASSIFIERS}
    best = max(CLASSIFIERS, key=worth.__getitem__)
    judged, rows = {}, []
    for part in ("validation", "test"):
        p, i = probabilities[best][part], parts[part]
        log_p = np.log(np.stack([p, 1 - p], 1))
        judged[part] = judge_recordings(with_cycle, i, y[i], log_p, config)
        rows += prediction_rows(with_cycle, i, y[i], log_p, config.evaluation.threshold, part)
    write_table(rows, workdir / "predictions.csv")
    train_part = parts["train"]
    _save(workdir, config, best, target, corpus.sample_rate_hz, features.values[train_part], y[train_part])
    with files.replacing(workdir / "pictures.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **_pictures(corpus, config, features, y))
    table = None
    if config.experiment.runs:
        table = experiment(with_cycle, config, features._replace(indices=np.arange(len(y), dtype=np.int32)))
    files.write_text(workdir / "experiment.json", json.dumps(table, indent=1))
    result = metrics.json_ready({
        **judged,
        "classifiers": {name: {part: {m: s[m] for m in metrics.METRICS} for part, s in of.items()}
                        for name, of in scores.items()},
        "chosen": best,
        "features": {"left_out": features.left_out, **features.stretches},
        "picking": picking(corpus, config) if annotated_recordings(corpus) else None,
        "split": {k: split[k] for k in ("kind", "notes", "counts", "people_apart", "leaks")},
        "data": {"prepared": config.data.prepared, "recordings": len(corpus.rows), "sample_rate_hz":
                 corpus.sample_rate_hz, "target": target, "recordings_sha256": order_digest(corpus)},
        "system": {"command": shlex.join(sys.orig_argv), **versions(), "wall_s": time.monotonic() - began},
    })  # fmt: skip
    files.write_text(workdir / "metrics.json", json.dumps(result, indent=1))
    write_report(workdir)
    seal(workdir)
    return result


def load_classical(
    workdir: str | pathlib.Path,
) -> tuple[ml_collections.ConfigDict, bool, int, Callable[[Corpus], np.ndarray]]:
    """The classifier that `train_classical` kept: (config, that it classifies recordings, sample_rate_hz, a function
    from a corpus to its (N, 2) log p, log (1 - p), NaN where no cycle was found).

    Fitted again to the features that were saved: the same numbers in, the same classifier out.
    Raises:
      CheckpointError: not what `train_classical` wrote.
    """
    path = pathlib.Path(workdir) / "checkpoints" / "best.npz"
    hashes.check(pathlib.Path(workdir), ["checkpoints/best.npz"], "train again")
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y, meta = file["features"], file["labels"], json.loads(str(file["meta"]))
    except Exception as error:  # numpy and zipfile raise half a dozen kinds
        raise files.CheckpointError(f"{path}: not what training wrote ({error}); train again") from None
    given = pathlib.Path(workdir) / "config.json"
    if hashes.intact(given) and (differs := difference(read_json(given), meta["config"])):
        field, before, after = differs
        raise files.CheckpointError(
            f"{workdir}: config.json says {field}={before}, checkpoints/best.npz {after}: they are of two runs; "
            "train again"
        )
    config = ml_collections.ConfigDict(meta["config"])
    config.task.target = meta["target"]
    wanted = (len(y), 2 * (config.features.nfft // 2 + 1))
    if x.shape != wanted or not np.isfinite(x).all():
        raise files.CheckpointError(f"{path}: features {x.shape}, need {wanted} finite numbers; train again")
    fitted = fit(meta["classifier"], config, config.seed, x, y)

    def answer(corpus: Corpus) -> np.ndarray:
        features = classical_features(corpus, config)
        log_p = np.full((len(corpus.rows), 2), np.nan)
        if len(features.indices):
            p = _probabilities(fitted, features.values)
            log_p[features.indices] = np.log(np.stack([p, 1 - p], 1))
        return log_p

    return config, True, meta["sample_rate_hz"], answer


def _begin(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json and run.json, where WORKDIR holds no other experiment.

    Raises:
      CheckpointError: it holds one.
    """
    plain = plain_config(config)
    if (workdir / "config.json").exists():
        refuse_changes(read_json(workdir / "config.json"), {**plain, "optimizer": {}}, workdir)
    unseal(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_text(workdir / "config.json", json.dumps(plain, indent=1))
    record(workdir, config)


def _fit_all(
    config: ml_collections.ConfigDict, history: pathlib.Path, x: np.ndarray, y: np.ndarray, parts: dict[str, np.ndarray]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, dict[str, float]]]]:
    """Fits each classifier to the training part: ({classifier: {part: probabilities}}, {classifier: {part: scores}}).

    history: metrics.jsonl, written anew; a classifier is a step.
    """
    history.unlink(missing_ok=True)  # a run is made anew as a whole
    probabilities, scores = {}, {}
    for step, name in enumerate(CLASSIFIERS, 1):
        answer = fit(name, config, config.seed, x[parts["train"]], y[parts["train"]])
        p = {part: _probabilities(answer, x[i]) for part, i in parts.items()}
        scores[name] = {part: metrics.binary(y[i], p[part], config.evaluation.threshold) for part, i in parts.items()}
        for part, i in parts.items():
            loss = float(-np.log(np.where(y[i] == 1, p[part], 1 - p[part])).mean())
            log_line(history, step, part, {"loss": loss, **{m: scores[name][part][m] for m in metrics.METRICS}})
        probabilities[name] = p
    return probabilities, scores


def _probabilities(answer: Callable, x: np.ndarray) -> np.ndarray:
    """A classifier's answers (n,), away from 0 and 1, so that their logarithms are finite."""
    return np.clip(answer(x), 1e-6, 1 - 1e-6)


def _save(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, name: str, target: str, rate_hz: int, x: Any, y: Any
) -> None:
    """Writes checkpoints/best.npz: features x (n, attributes) and labels y (n,) of training, and what `name` needs."""
    meta = {"config": plain_config(config), "classifier": name, "target": target, "sample_rate_hz": rate_hz}
    with files.replacing(workdir / "checkpoints" / "best.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, features=x, labels=y, meta=np.array(json.dumps(meta)))


def _pictures(corpus: Corpus, config: ml_collections.ConfigDict, features: Features, y: np.ndarray) -> dict[str, Any]:
    """Arrays for `write_report`: mean spectra in dB by class, and a recording's samples, envelope and sounds."""
    spectra = features.values if config.features.decibels else 10 * np.log10(features.values + 1e-20)
    shown: dict[str, Any] = {
        "frequencies_hz": np.fft.rfftfreq(config.features.nfft, 1 / corpus.sample_rate_hz),
        "spectra_db": np.stack([spectra[y == v].reshape((y == v).sum(), 2, -1).mean(0) for v in (0, 1)]),
        "sample_rate_hz": corpus.sample_rate_hz,
    }
    # Of each class the one nearest to the class' mean among those long enough to be seen.
    for value, name in enumerate(("normal", "murmur")):
        of_class = np.flatnonzero(y == value)
        distance = ((spectra[of_class] - spectra[of_class].mean(0)) ** 2).sum(1)
        long = corpus.lengths[features.indices[of_class]] >= SHOWN_S * corpus.sample_rate_hz
        index = int(features.indices[of_class[np.where(long.any() & ~long, np.inf, distance).argmin()]])
        recording = corpus.subset(np.array([index]))
        [(sounds, cycle, e)] = find_sounds(recording, config.features, 1)
        shown |= {f"{name}_id": np.array(recording.rows[0]["id"]),
                  f"{name}_samples": recording.read(0).astype(np.float32),
                  f"{name}_envelope": e, f"{name}_states": np.array(envelope.states(sounds, cycle))}  # fmt: skip
    step = envelope.frames(config.features.window_s, config.features.hop_s, corpus.sample_rate_hz)
    return shown | {"step_s": step.step_s, "window_s": step.window / corpus.sample_rate_hz}
