"""Stages of one run after another, and variants side by side."""

from __future__ import annotations

import json
import math
import pathlib

import jax
import ml_collections
from absl import logging

from pcgjax.pages import comparison
from pcgjax.published import CNN_PAPER
from pcgjax.runs import lock, schema
from pcgjax.runs.config import flat_fields, one_of, plain_config, refuse_changes
from pcgjax.runs.data import read_corpus, refuse_other_recordings, refuse_other_split
from pcgjax.runs.results import read_json
from pcgjax.runtime import files
from pcgjax.training.loop import train


def stages(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool = False) -> dict:
    """Trains `config.stages`, one after the other, each from the best model of the one before; returns the last's.

    A stage is named overrides. All but the last have a folder of their own below `workdir`. What `optimizer.frozen`
    names in a stage is carried over to it from the stage before.
    """
    schema.check(config)
    with lock.held(workdir, jax.process_index() == 0):
        return _stages(config, workdir, dry_run)


def _stages(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool) -> dict:
    refuse_other_split(config, workdir)
    split_file, start_from = str(workdir / "split.json"), ""
    *earlier, (_, last) = config.stages.items()
    final = one_of(config, last, split_file)
    if dry_run:
        return train(final, workdir, dry_run, checked=True)
    for name, overrides in earlier:
        one, folder = one_of(config, overrides, split_file), workdir / name
        one.train.start_from = start_from if one.optimizer.frozen else ""
        done = folder / "metrics.json"
        if done.exists() and read_json(done)["epochs"] >= one.train.epochs:
            refuse_changes(read_json(folder / "config.json"), plain_config(one), folder)
            refuse_other_recordings(read_json(done), read_corpus(one), folder)
        else:
            logging.info("stage %s", name)
            train(one, folder, checked=True)
        start_from = str(folder)
    final.train.start_from = start_from if final.optimizer.frozen else ""
    return train(final, workdir, checked=True)


def is_the_papers(config: ml_collections.ConfigDict) -> bool:
    """Whether variants are the 1D CNN paper's four configurations: its net on its features, {no filter, filter} x
    {clean, noise}. What it was trained with, and how long, may differ."""
    f, m = config.features, config.model
    if config.task.name != "cnn" or config.task.target != "abnormal" or config.data.shuffle_labels:
        return False
    if (f.window_s, f.overlap, f.filter_order, f.low_hz, f.high_hz) != (2.5, 0.5, 4, 25.0, 400.0):
        return False
    if (tuple(m.filters), m.kernel_size, m.hidden) != ((16, 32), 5, 64):
        return False
    if set(config.variants) != {"no_filter", "no_filter_noise", "filter", "filter_noise"}:
        return False
    for name, overrides in config.variants.items():
        given = flat_fields(overrides)
        wanted = "none" if name.startswith("no_filter") else "zero_phase"
        noise = given.pop("features.noise_snr_db", f.noise_snr_db)
        if given.pop("features.filter", f.filter) != wanted or given:
            return False
        if math.isfinite(noise) != name.endswith("noise"):
            return False
    return True


def variants(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool = False) -> list[dict]:
    """Runs each of `config.variants`' named overrides in a folder of its own and sets them side by side."""
    schema.check(config)
    with lock.held(workdir, jax.process_index() == 0):
        return _variants(config, workdir, dry_run)


def _variants(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool) -> list[dict]:
    refuse_other_split(config, workdir)
    rows = []
    for name, overrides in config.variants.items():
        one = one_of(config, overrides, str(workdir / "split.json"))  # one split for all
        logging.info("variant: %s", name)
        # A finished run is only judged again, and refused if its config has changed.
        train(one, workdir / name, dry_run, checked=True)
        if dry_run:
            continue
        rows.append(comparison.run_row(workdir / name, name.replace("_", " ").capitalize()))
    if dry_run:
        return rows
    if is_the_papers(config):
        comparison.write(rows, workdir / "report.html", "Four configurations", CNN_PAPER)
    else:
        comparison.write(rows, workdir / "report.html", f"Variants of {config.task.name}")
    files.write_text(
        workdir / "table.json",
        json.dumps([{k: r[k] for k in ("name", "metrics", "trivial")} for r in rows], indent=1),
    )
    return rows
