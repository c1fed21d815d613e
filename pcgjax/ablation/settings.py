"""The settings of the ablation, each a corpus and a way to split it, and what a config of it must have."""

from __future__ import annotations

import math
from typing import NamedTuple

import ml_collections
import numpy as np
from absl import logging

from pcgjax.data.corpus import Corpus

SETTINGS = ("synthetic", "person", "leave_database_out")


class Setting(NamedTuple):
    """A corpus and a way to split it."""

    name: str  # of its file
    title: str
    group: str  # of SETTINGS
    snr_db: float
    database: str | None  # the one left out


def check_config(config: ml_collections.ConfigDict) -> None:
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


def settings_of(config: ml_collections.ConfigDict, prepared: Corpus | None) -> list[Setting]:
    """What `ablation.settings` asks for; without a prepared data set the synthetic ones only."""
    settings = []
    for group in config.ablation.settings:
        if group == "synthetic":
            for snr in config.ablation.snrs_db:
                level = "clean" if snr == math.inf else f"{snr:g} dB"
                name = f"synthetic_{level.replace(' ', '_')}"
                settings.append(Setting(name, f"Synthetic, {level}", group, snr, None))
        elif prepared is None:
            logging.warning("setting %s is left out: it needs --config.data.prepared=DIR", group)
        elif group == "person":
            settings.append(Setting(group, "By person", group, config.features.noise_snr_db, None))
        else:
            labels = prepared.labels(config.task.target)
            databases = np.array([row["database"] for row in prepared.rows])
            for name in np.unique(databases):
                if len(set(labels[(databases == name) & np.isfinite(labels)])) < 2:
                    continue  # nothing to tell apart
                title = f"Database {name} left out"
                settings.append(Setting(f"{group}_{name}", title, group, config.features.noise_snr_db, str(name)))
    if not settings:
        raise ValueError(
            f"ablation.settings={tuple(config.ablation.settings)}: nothing to do without data.prepared; give "
            "--config.data.prepared=DIR, a folder that pcgjax.prepare wrote"
        )
    return settings
