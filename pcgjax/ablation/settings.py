"""The settings of the ablation, each a corpus and a way to split it, and what a config of it must have."""

from __future__ import annotations

import math
from typing import NamedTuple

import ml_collections
import numpy as np
from absl import logging

from pcgjax.data.corpus import Corpus


class Setting(NamedTuple):
    """A corpus and a way to split it."""

    name: str  # of its file
    title: str
    group: str  # of runs.schema.ABLATION_SETTINGS
    snr_db: float
    database: str | None  # the one left out


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, naming the field, where a config that `schema.check` has passed cannot be compared here."""
    if "ablation" not in config or config.task.name != "hinf_lstm":
        raise ValueError(
            f"config: task.name={config.task.name} without a field ablation; use configs/hinf_lstm.py:ablation"
        )
    a = config.ablation
    if "synthetic" in a.settings and not len(a.snrs_db):
        raise ValueError(f"ablation.snrs_db={tuple(a.snrs_db)}: give decibels, or inf for no noise")
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
