"""Stages of one run after another, and variants side by side."""

from __future__ import annotations

import json
import pathlib

import ml_collections
from absl import logging

from pcgjax.pages import comparison
from pcgjax.published import CNN_PAPER
from pcgjax.runs.config import one_of, plain_config, refuse_changes
from pcgjax.runs.data import refuse_other_split
from pcgjax.runtime import files
from pcgjax.training.loop import train


def stages(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool = False) -> dict:
    """Trains `config.stages`, one after the other, each from the best model of the one before; returns the last's.

    A stage is named overrides. All but the last have a folder of their own below `workdir`. What `optimizer.frozen`
    names in a stage is carried over to it from the stage before.
    """
    refuse_other_split(config, workdir)
    split_file, start_from = str(workdir / "split.json"), ""
    *earlier, (_, last) = config.stages.items()
    final = one_of(config, last, split_file)
    if dry_run:
        return train(final, workdir, dry_run)
    for name, overrides in earlier:
        one, folder = one_of(config, overrides, split_file), workdir / name
        one.train.start_from = start_from
        done = folder / "metrics.json"
        if done.exists() and json.loads(done.read_text())["epochs"] >= one.train.epochs:
            refuse_changes(json.loads((folder / "config.json").read_text()), plain_config(one), folder)
        else:
            logging.info("stage %s", name)
            train(one, folder)
        start_from = str(folder)
    final.train.start_from = start_from
    return train(final, workdir)


def variants(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool = False) -> list[dict]:
    """Runs each of `config.variants`' named overrides in a folder of its own and sets them side by side."""
    refuse_other_split(config, workdir)
    rows = []
    for name, overrides in config.variants.items():
        one = one_of(config, overrides, str(workdir / "split.json"))  # one split for all
        logging.info("variant: %s", name)
        # A finished run is only judged again, and refused if its config has changed.
        train(one, workdir / name, dry_run)
        if dry_run:
            continue
        rows.append(comparison.run_row(workdir / name, name.replace("_", " ").capitalize()))
    if dry_run:
        return rows
    comparison.write(rows, workdir / "report.html", "Four configurations", CNN_PAPER)
    files.write_text(
        workdir / "table.json",
        json.dumps([{k: r[k] for k in ("name", "metrics", "trivial")} for r in rows], indent=1),
    )
    return rows
