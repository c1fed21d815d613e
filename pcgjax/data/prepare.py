"""An official folder of recordings -> a prepared one: what `python -m pcgjax.prepare` does."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from pcgjax import datasets
from pcgjax.data import PrepareError
from pcgjax.data.ray_cluster import over_ray
from pcgjax.data.shards import (
    RECORDINGS_A_SHARD,
    finished_manifest,
    join_shards,
    problem_list,
    remove_prepared,
    unit_done,
    unit_key,
    write_unit,
)
from pcgjax.data.workers import in_order, progress_bar
from pcgjax.datasets import Problem
from pcgjax.datasets.sources import printable

ENGINES = ("local", "ray")


def prepare(
    dataset: str,
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    sample_rate_hz: int = 1000,
    *,
    strict: bool = False,
    workers: int | None = None,
    engine: str = "local",
    num_shards: int = 1,
    shard_index: int = 0,
    overwrite: bool = False,
    labels: str = "none",
    persons: str = "",
) -> dict[str, Any] | None:
    """Prepares data set `dataset` of folder `source` into folder `out`, or finds that this is done already.

    Args:
      strict: files that cannot be used are an error (after all were looked at).
      workers: processes; default one a core.
      engine: "local", or "ray": over the machines of a Ray cluster (see `over_ray`), with the same result.
      num_shards, shard_index: this machine does the shards with number % num_shards == shard_index. Whoever
        finds all shards done writes the manifest.
      overwrite: removes what an earlier call with other parameters wrote.
      labels, persons: of data set `folder`, as its loader has them.
    Returns: the manifest; None while other machines' shards are missing.
    Raises:
      DatasetError: as `datasets.load`.
      PrepareError: `out` holds another preparation, cannot be written, or `strict` found problems; Ray is missing,
        or one of its machines does not see the same source and `out`.
    """
    if engine not in ENGINES:
        raise PrepareError(f"--engine={engine}: must be one of {', '.join(ENGINES)}")
    if not 0 <= shard_index < num_shards:
        raise PrepareError(f"--shard_index={shard_index}: must be at least 0 and below --num_shards={num_shards}")
    if overwrite and num_shards > 1:
        raise PrepareError("--overwrite would remove other machines' shards: empty the folder, or use another --out")
    if not 100 <= sample_rate_hz <= 192_000:
        raise PrepareError(f"--sample_rate_hz={sample_rate_hz}: must lie between 100 and 192000")
    if not os.fspath(out).isascii() and printable(out) != os.fspath(out):
        raise PrepareError(f"--out={printable(out)}: the name is not UTF-8; choose another")
    source, out = os.path.abspath(source), pathlib.Path(os.path.abspath(out))
    recordings, problems = datasets.load(dataset, source, labels, persons)
    source = printable(source)
    units = [recordings[i : i + RECORDINGS_A_SHARD] for i in range(0, len(recordings), RECORDINGS_A_SHARD)]
    parameters = {"dataset": dataset, "sample_rate_hz": sample_rate_hz, "resampler": "soxr HQ"}
    if dataset == "folder" and (labels != "none" or persons):
        parameters |= {"labels": labels, "persons": persons}
    try:
        if overwrite:
            remove_prepared(out)
        elif (manifest := finished_manifest(out, source, parameters, units)) is not None:
            if strict and manifest["counts"]["left_out"]:
                raise PrepareError(problem_list([Problem(**problem) for problem in manifest["problems"]]))
            return manifest
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrepareError(f"{out}: {error.strerror or error}; choose another --out") from None

    jobs = [(out, n, units[n], parameters) for n in range(shard_index, len(units), num_shards)]
    count = sum(len(unit) for _, _, unit, _ in jobs)
    keys: dict[int, str] = {}
    with progress_bar(count, f"preparing {dataset}") as advance:
        written = over_ray(jobs, workers) if engine == "ray" else in_order(write_unit, jobs, count, workers)
        for number, key in written:
            keys[number] = key
            advance(len(units[number]))
    try:
        for number, unit in enumerate(units):
            if number not in keys:
                keys[number] = unit_key(unit, parameters)
                if not unit_done(out, number, keys[number]):
                    return finished_manifest(out, source, parameters, units)
        return join_shards(out, source, parameters, problems, [keys[number] for number in range(len(units))], strict)
    except FileNotFoundError:  # another machine joins at this moment
        return finished_manifest(out, source, parameters, units)


def summary(manifest: dict[str, Any]) -> str:
    """What a prepared folder holds and what was left out, as lines for a terminal. manifest: that of `prepare`."""
    counts = manifest["counts"]
    lines = []
    for name, part in [*counts["databases"].items(), ("all", counts)]:
        people = f"{part['people']} people" if part["people"] else "people unknown"
        if part["people"] and part["recordings_of_unknown_people"]:
            people += f" and {part['recordings_of_unknown_people']} recordings of unknown people"
        labels = [
            f"{label} {'/'.join(f'{k}:{n}' for k, n in values.items())}"
            for label, values in part["labels"].items()
            if set(values) != {"not said"}
        ]
        size = f"{part['recordings']} recordings, {people}, {part['hours']:.2f} h"
        lines.append(f"{name}: {size}, {', '.join(labels) or 'no labels'}")
    if counts["several_channels"]:
        lines.append(f"{counts['several_channels']} recordings have several channels: the first is used")
    for what, key in (("problems", "left_out"), ("read with a doubt", "notes")):
        listed = [problem for problem in manifest["problems"] if problem.get("note", False) == (key == "notes")]
        if listed:
            kinds = ", ".join(f"{kind} {n}" for kind, n in counts[key].items())
            lines.append(f"{what}: {len(listed)} ({kinds}); manifest.json lists them, the first are")
            lines += [f"  {problem['path']}: {problem['reason']}" for problem in listed[:10]]
    return "\n".join(lines)
