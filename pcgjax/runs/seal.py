"""hashes.json of a workdir: written when a run ends, compared whenever one of its files is read.

Before the end there is none: until then the checkpoints, split.json and the lines of metrics.jsonl are bound each by
itself.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from pcgjax.runs.config import refuse_changes
from pcgjax.runs.results import read_json
from pcgjax.runtime import hashes
from pcgjax.runtime.files import CheckpointError

# What judging a run leaves; a run that begins anew removes them.
RESULTS = ("metrics.json", "predictions.csv", "examples.npz", "segments.npz", "report.html", "population.json",
           "table.csv", "experiment.json", "pictures.npz")  # fmt: skip
INPUTS = ("config.json", "split.json", "run.json", "metrics.jsonl")


def seal(workdir: pathlib.Path) -> None:
    """Writes hashes.json of a run that has ended: of its results, inputs and checkpoints."""
    names = [name for name in (*INPUTS, *RESULTS) if (workdir / name).is_file()]
    below = (path for path in (workdir / "checkpoints").rglob("*") if path.is_file())
    hashes.write(workdir, [*names, *(path.relative_to(workdir).as_posix() for path in below)])


def unseal(workdir: pathlib.Path) -> None:
    """Compares what a run goes on from, then removes hashes.json: the run writes its files anew.

    Raises:
      DamagedError: naming the file.
    """
    if jax.process_index() == 0:
        hashes.check(workdir, INPUTS, "put it back, or give another --workdir")
        (workdir / hashes.NAME).unlink(missing_ok=True)


def refuse_other_run(
    workdir: pathlib.Path, config: Mapping[str, Any], also_free: Iterable[tuple[str, str]] = ()
) -> None:
    """Raises CheckpointError where a workdir holds a run of another config, naming the field; before anything is read
    or written. also_free: as in `refuse_changes`."""
    path = workdir / "config.json"
    if not path.exists():
        return
    begun = any((workdir / name).exists() for name in ("metrics.jsonl", *RESULTS))
    if begun or any(path.is_file() for path in (workdir / "checkpoints").rglob("*")):
        saved = read_json(path)
        if saved.get("sweep"):
            raise CheckpointError(f"{workdir}: holds a population (sweep: {saved['sweep']}); give another --workdir")
        refuse_changes(saved, dict(config), workdir, also_free)


def refuse_run_file(out: pathlib.Path) -> None:
    """Raises ValueError where an output would take the place of a run's or a prepared folder's own file."""
    of_run = out.name in (*INPUTS, *RESULTS) and (out.parent / "checkpoints").is_dir()
    if of_run or (out.name in ("manifest.json", "records.jsonl") and (out.parent / "manifest.json").exists()):
        raise ValueError(f"--out={out}: a file of what lies in that folder; give another name or folder")


def begin_anew(workdir: pathlib.Path) -> None:
    """Removes what an earlier run of the same config left in a workdir without a checkpoint."""
    for name in (*RESULTS, "metrics.jsonl", hashes.NAME):
        (workdir / name).unlink(missing_ok=True)
