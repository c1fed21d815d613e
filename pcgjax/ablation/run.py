"""Runs the ablation setting by setting; a setting that is finished is read, not trained again."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import time

import ml_collections
import numpy as np
import tqdm
from absl import logging

from pcgjax import tasks, thresholds
from pcgjax.ablation.arms import Clips, Setting, clip_features_of, draw_parts, simulate_corpus, train_arms
from pcgjax.ablation.verdicts import finite_or_none, judge, summarise, verdict
from pcgjax.data.corpus import Corpus, from_prepared, order_digest
from pcgjax.models.hinf_lstm import UPDATES
from pcgjax.pages.ablation import IDEAS, PAPER, draw
from pcgjax.runs.config import refuse_changes
from pcgjax.runtime import files

SETTINGS = ("synthetic", "person", "leave_database_out")


def settings_of(config: ml_collections.ConfigDict, prepared: Corpus | None) -> list[Setting]:
    """What `ablation.settings` asks for; without a prepared data set the synthetic ones only."""
    found = []
    for group in config.ablation.settings:
        if group == "synthetic":
            for snr in config.ablation.snrs_db:
                name = "clean" if snr == math.inf else f"{snr:g} dB"
                found.append(Setting(f"synthetic_{name.replace(' ', '_')}", f"Synthetic, {name}", group, snr, None))
        elif prepared is None:
            logging.warning("setting %s is left out: it needs --config.data.prepared=DIR", group)
        elif group == "person":
            found.append(Setting(group, "By person", group, config.features.noise_snr_db, None))
        else:
            labels = prepared.labels(config.task.target)
            databases = np.array([row["database"] for row in prepared.rows])
            for name in np.unique(databases):
                if len(set(labels[(databases == name) & np.isfinite(labels)])) < 2:
                    continue  # nothing to tell apart
                found.append(Setting(f"{group}_{name}", f"Database {name} left out", group,
                                     config.features.noise_snr_db, str(name)))  # fmt: skip
    if not found:
        raise ValueError(
            f"ablation.settings={tuple(config.ablation.settings)}: nothing to do without data.prepared; give "
            "--config.data.prepared=DIR, a folder that pcgjax.prepare wrote"
        )
    return found


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, naming the field, where a config cannot be what is compared here."""
    if "ablation" not in config or config.task.name != "hinf_lstm":
        raise ValueError("config: no field ablation for task.name=hinf_lstm; use configs/hinf_lstm.py:ablation")
    a = config.ablation
    unknown = [name for name in a.settings if name not in SETTINGS]
    if unknown or not a.settings:
        raise ValueError(f"ablation.settings={tuple(a.settings)}: choose among {', '.join(SETTINGS)}")
    if a.seeds < 2:
        raise ValueError(f"ablation.seeds={a.seeds}: an interval needs at least 2")
    if len(a.epochs) != 2 or min(a.epochs) < 1:
        raise ValueError(f"ablation.epochs={tuple(a.epochs)}: two numbers, each at least 1: of the CNN, of the arms")
    for field in ("clips_per_recording", "batch_clips", "synthetic_people"):
        if a[field] < 1:
            raise ValueError(f"ablation.{field}={a[field]}: must be at least 1")
    if "synthetic" in a.settings and not (len(a.snrs_db) and all(snr > -math.inf for snr in a.snrs_db)):
        raise ValueError(f"ablation.snrs_db={tuple(a.snrs_db)}: give decibels, or inf for no noise")
    if not 0 <= config.evaluation.threshold <= 1:
        raise ValueError(f"evaluation.threshold={config.evaluation.threshold}: must lie between 0 and 1")
    if config.evaluation.batch_recordings < 1:
        raise ValueError(f"evaluation.batch_recordings={config.evaluation.batch_recordings}: must be at least 1")
    if config.train.balance != "none" or config.data.shuffle_labels:
        raise ValueError("train.balance, data.shuffle_labels: the ablation takes clips and labels as they are")


def run_ablation(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict:
    """Runs the settings that WORKDIR lacks and writes table.json and report.html; returns the former.

    Raises:
      ValueError (also SplitError, CheckpointError): a config field, a split that cannot be made, or a setting that
        WORKDIR holds under another config.
    """
    check(config)
    workdir = pathlib.Path(workdir)
    config = config.copy_and_resolve_references()
    config.model.cell, config.loss.name, config.optimizer.frozen = "lstm", "bce", ()  # of the first stage
    prepared = from_prepared(config.data.prepared) if config.data.prepared else None
    settings = settings_of(config, prepared)
    thresholds.init(config.evaluation.threshold, **config.sapt)

    @functools.cache
    def simulated() -> Corpus:
        return simulate_corpus(config.ablation.synthetic_people, config.seed)

    @functools.lru_cache(1)  # the splits of a prepared data set follow each other
    def data_of(synthetic: bool, snr_db: float) -> tuple[Corpus, Clips]:
        corpus = simulated() if synthetic else prepared
        assert corpus is not None
        one = config.copy_and_resolve_references()
        one.features.noise_snr_db = snr_db
        return corpus, clip_features_of(one, corpus)

    results = []
    bar = tqdm.tqdm(settings, desc="settings", unit="setting")
    for setting in bar:
        bar.set_postfix_str(setting.title)
        path = workdir / f"{setting.name}.json"
        identity = _identity(config, setting, prepared)
        if path.exists():
            results.append(_finished(path, identity))
            continue
        result = run_setting(config, setting, *data_of(setting.group == "synthetic", setting.snr_db))
        result = finite_or_none(result | {"config": identity})
        files.write_text(path, json.dumps(result, indent=1))
        results.append(result)
    table = summarise(results)
    verdicts = {idea: verdict(idea, table) for idea in IDEAS}
    out = {"settings": table, "verdicts": verdicts, "paper": {" ".join(arm): v for arm, v in PAPER.items()}}
    files.write_text(workdir / "table.json", json.dumps(finite_or_none(out), indent=1))
    shared = {part: values for part, values in identity.items() if part != "data"}  # of all settings
    shared["features"] = {k: v for k, v in shared["features"].items() if k != "noise_snr_db"}
    files.write_text(workdir / "report.html", draw(table, verdicts, shared))
    return out


def run_setting(config: ml_collections.ConfigDict, setting: Setting, corpus: Corpus, data: Clips) -> dict:
    """Trains and judges all arms of one setting: what its json holds."""
    began = time.monotonic()
    labels = corpus.labels(config.task.target)
    parts = draw_parts(config, corpus, setting, np.asarray(data.real))
    task = tasks.make(config, corpus.sample_rate_hz)
    with tqdm.tqdm(total=1 + len(UPDATES), desc=setting.title, unit="program", leave=False) as bar:
        arms = train_arms(config, task, data, labels, parts, bar)
    scores, trivial = judge(corpus, labels, parts, arms)
    tested = [corpus.rows[i]["database"] for part in parts.test for i in part]
    used = [row for row, label in zip(corpus.rows, labels, strict=True) if np.isfinite(label)]
    return {
        "name": setting.name,
        "title": setting.title,
        "group": setting.group,
        "recordings": len(used),
        "people": len({(row["database"], row["person"]) for row in used}),
        "databases": len(set(tested)),
        "clips": int(data.real.sum()),
        "test_recordings": len(tested) / len(parts.test),
        "arms": scores,
        "trivial": trivial,
        "thresholds": {" ".join(arm): np.asarray(threshold).tolist() for arm, (_, threshold) in arms.items()},
        "seconds": time.monotonic() - began,
    }


def _identity(config: ml_collections.ConfigDict, setting: Setting, prepared: Corpus | None) -> dict[str, dict]:
    """All that a setting's result depends on, as JSON gives it back."""
    plain = json.loads(json.dumps(config.to_dict()))
    kept = {part: plain[part] for part in ("task", "features", "model", "loss", "sapt", "optimizer")}
    for part, varied in (("model", "cell"), ("loss", "name"), ("optimizer", "frozen")):
        del kept[part][varied]
    kept["features"]["noise_snr_db"] = setting.snr_db
    kept["split"] = {"fractions": plain["split"]["fractions"]}
    kept["evaluation"] = {"threshold": plain["evaluation"]["threshold"]}
    kept["ablation"] = {"seed": plain["seed"]} | {
        name: plain["ablation"][name] for name in ("seeds", "epochs", "clips_per_recording", "batch_clips")
    }
    if setting.group == "synthetic":
        kept["ablation"]["synthetic_people"] = plain["ablation"]["synthetic_people"]
    else:
        assert prepared is not None
        said = [row["labels"] for row in prepared.rows]
        kept["data"] = {"sha256": order_digest(prepared, labels=said)}
    return finite_or_none(kept)


def _finished(path: pathlib.Path, identity: dict[str, dict]) -> dict:
    """A setting's json, where it was made with this config.

    Raises:
      CheckpointError: made with another; ValueError: damaged.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        saved = result["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it, and the setting is run again") from None
    refuse_changes(saved, identity, path)
    return result
