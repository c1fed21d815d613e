"""Runs the ablation setting by setting; a setting that is finished is read, not trained again."""

from __future__ import annotations

import functools
import json
import pathlib
import time

import ml_collections
import numpy as np
import tqdm

from pcgjax import tasks, thresholds
from pcgjax.ablation.arms import train_arms
from pcgjax.ablation.data import Clips, clip_features_of, draw_parts, simulate_corpus
from pcgjax.ablation.settings import Setting, check_config, settings_of
from pcgjax.ablation.verdicts import judge, summarise, verdict
from pcgjax.data.corpus import Corpus, from_prepared, order_digest
from pcgjax.metrics import json_ready
from pcgjax.models.hinf_lstm import UPDATES
from pcgjax.pages.ablation import IDEAS, PAPER, draw
from pcgjax.runs import lock, schema
from pcgjax.runs.config import refuse_changes
from pcgjax.runtime import files, hashes


def run_ablation(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict:
    """Runs the settings that WORKDIR lacks and writes table.json and report.html; returns the former.

    Raises:
      ValueError (also SplitError, CheckpointError): a config field, a split that cannot be made, or a setting that
        WORKDIR holds under another config.
    """
    schema.check(config)
    check_config(config)
    with lock.held(workdir):
        return _run_ablation(config, pathlib.Path(workdir))


def _run_ablation(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
    config = config.copy_and_resolve_references()
    config.model.cell, config.loss.name, config.optimizer.frozen = "lstm", "bce", ()  # of the first stage
    prepared = from_prepared(config.data.prepared) if config.data.prepared else None
    settings = settings_of(config, prepared)
    thresholds.init(config.evaluation.threshold, **config.sapt)  # checks them

    @functools.cache
    def simulated() -> Corpus:
        return simulate_corpus(config.ablation.synthetic_people, config.seed)

    @functools.lru_cache(1)  # the splits of a prepared data set follow each other
    def data_of(synthetic: bool, snr_db: float) -> tuple[Corpus, Clips]:
        corpus = simulated() if synthetic else prepared
        assert corpus is not None
        noisy = config.copy_and_resolve_references()
        noisy.features.noise_snr_db = snr_db
        return corpus, clip_features_of(noisy, corpus)

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
        result = json_ready(result | {"config": identity})
        result["sha256"] = hashes.of_json(result)
        files.write_text(path, json.dumps(result, indent=1))
        result.pop("sha256")
        results.append(result)
    table = summarise(results)
    verdicts = {idea: verdict(idea, table) for idea in IDEAS}
    out = {"settings": table, "verdicts": verdicts, "paper": {" ".join(arm): v for arm, v in PAPER.items()}}
    files.write_text(workdir / "table.json", json.dumps(json_ready(out), indent=1))
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
    databases = [corpus.rows[i]["database"] for part in parts.test for i in part]
    labelled = [row for row, label in zip(corpus.rows, labels, strict=True) if np.isfinite(label)]
    return {
        "name": setting.name,
        "title": setting.title,
        "group": setting.group,
        "recordings": len(labelled),
        "people": len({(row["database"], row["person"]) for row in labelled}),
        "databases": len(set(databases)),
        "clips": int(data.real.sum()),
        "test_recordings": len(databases) / len(parts.test),
        "arms": scores,
        "trivial": trivial,
        "thresholds": {" ".join(arm): np.asarray(threshold).tolist() for arm, (_, threshold) in arms.items()},
        "seconds": time.monotonic() - began,
    }


def _identity(config: ml_collections.ConfigDict, setting: Setting, prepared: Corpus | None) -> dict[str, dict]:
    """All that a setting's result depends on, as JSON gives it back."""
    plain = json.loads(json.dumps(config.to_dict()))
    identity = {part: plain[part] for part in ("task", "features", "model", "loss", "sapt", "optimizer")}
    for part, varied in (("model", "cell"), ("loss", "name"), ("optimizer", "frozen")):
        del identity[part][varied]
    identity["features"]["noise_snr_db"] = setting.snr_db
    identity["split"] = {"fractions": plain["split"]["fractions"]}
    identity["evaluation"] = {"threshold": plain["evaluation"]["threshold"]}
    identity["ablation"] = {"seed": plain["seed"]} | {
        name: plain["ablation"][name] for name in ("seeds", "epochs", "clips_per_recording", "batch_clips")
    }
    if setting.group == "synthetic":
        identity["ablation"]["synthetic_people"] = plain["ablation"]["synthetic_people"]
    else:
        assert prepared is not None
        identity["data"] = {"sha256": order_digest(prepared, labels=[row["labels"] for row in prepared.rows])}
    return json_ready(identity)


def _finished(path: pathlib.Path, identity: dict[str, dict]) -> dict:
    """A setting's json, where it was made with this config.

    Raises:
      CheckpointError: made with another; ValueError: damaged.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        saved = result["config"]
        digest = result.pop("sha256", None)  # of an earlier version: None
        if digest not in (None, hashes.of_json(result)):
            raise ValueError("it is not what was written")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it, and the setting is run again") from None
    refuse_changes(saved, identity, path)
    return result
