"""python -m pcgjax.prepare: audio files -> checked, resampled int16 ArrayRecord shards and a manifest, once.

A prepared folder holds
  shard-00000.array_record ...  one record a recording: its samples as little-endian int16
  records.jsonl                 one row a recording (see `decode`), sorted by id
  manifest.json                 written last: a folder without it is unfinished
and, until the manifest is there, parts/: the rows of every finished shard. A run that was stopped takes up there,
and several machines that share the folder each do some of the shards.
"""

from __future__ import annotations

import os
import pathlib
import time
from typing import Any

from absl import flags

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
from pcgjax.runtime import files

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
) -> dict[str, Any] | None:
    """Prepares data set `dataset` of folder `source` into folder `out`, or finds that this is done already.

    Args:
      strict: files that cannot be used are an error (after all were looked at).
      workers: processes; default one a core.
      engine: "local", or "ray": over the machines of a Ray cluster (see `_over_ray`), with the same result.
      num_shards, shard_index: this machine does the shards with number % num_shards == shard_index. Whoever
        finds all shards done writes the manifest.
      overwrite: removes what an earlier call with other parameters wrote.
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
    source, out = os.path.abspath(source), pathlib.Path(os.path.abspath(out))
    recordings, problems = datasets.load(dataset, source)
    units = [recordings[i : i + RECORDINGS_A_SHARD] for i in range(0, len(recordings), RECORDINGS_A_SHARD)]
    parameters = {"dataset": dataset, "sample_rate_hz": sample_rate_hz, "resampler": "soxr HQ"}
    try:
        if overwrite:
            remove_prepared(out)
        elif (manifest := finished_manifest(out, source, parameters, units)) is not None:
            if strict and manifest["problems"]:
                raise PrepareError(problem_list([Problem(**problem) for problem in manifest["problems"]]))
            return manifest
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrepareError(f"{out}: {error.strerror or error}; choose another --out") from None

    mine = [(out, n, units[n], parameters) for n in range(shard_index, len(units), num_shards)]
    todo = sum(len(unit) for _, _, unit, _ in mine)
    keys: dict[int, str] = {}
    with progress_bar(todo, f"preparing {dataset}") as advance:
        written = over_ray(mine, workers) if engine == "ray" else in_order(write_unit, mine, todo, workers)
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
    """What a prepared folder holds and what was left out, for people."""
    counts = manifest["counts"]
    text = []
    for name, of in [*counts["databases"].items(), ("all", counts)]:
        people = f"{of['people']} people" if of["people"] else "people unknown"
        if of["people"] and of["recordings_of_unknown_people"]:
            people += f" and {of['recordings_of_unknown_people']} recordings of unknown people"
        said = [
            f"{label} {'/'.join(f'{k}:{n}' for k, n in values.items())}"
            for label, values in of["labels"].items()
            if set(values) != {"not said"}
        ]
        text.append(
            f"{name}: {of['recordings']} recordings, {people}, {of['hours']:.2f} h, {', '.join(said) or 'no labels'}"
        )
    if counts["several_channels"]:
        text.append(f"{counts['several_channels']} recordings have several channels: the first is used")
    if manifest["problems"]:
        kinds = ", ".join(f"{kind} {n}" for kind, n in counts["left_out"].items())
        text.append(f"problems: {len(manifest['problems'])} ({kinds}); manifest.json lists them, the first are")
        text += [f"  {problem['path']}: {problem['reason']}" for problem in manifest["problems"][:10]]
    return "\n".join(text)


def _main(flags_: Any) -> None:
    started = time.perf_counter()
    manifest = prepare(
        flags_.dataset, flags_.source, flags_.out, flags_.sample_rate_hz, strict=flags_.strict,
        workers=flags_.workers, engine=flags_.engine, num_shards=flags_.num_shards, shard_index=flags_.shard_index,
        overwrite=flags_.overwrite,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    if manifest is None:
        print(
            f"{flags_.out}: this machine's shards are done ({seconds:.1f} s), others' are missing: "
            "the machine that finishes last joins them, or a call without --num_shards"
        )
    else:
        print(summary(manifest))
        print(f"{flags_.out}: complete after {seconds:.1f} s")


if __name__ == "__main__":
    flags.DEFINE_enum("dataset", None, datasets.NAMES, "The data set in --source.", required=True)
    flags.DEFINE_string("source", None, "The folder that holds the data set.", required=True)
    flags.DEFINE_string("out", None, "The folder to write shards, records.jsonl and manifest.json to.", required=True)
    flags.DEFINE_integer("sample_rate_hz", 1000, "The rate to resample to, in Hz.", 100, 192_000)
    flags.DEFINE_bool("strict", False, "Fail when any file or table row cannot be used.")
    flags.DEFINE_integer("workers", None, "Processes that decode; default: one a core.", 1)
    flags.DEFINE_enum("engine", "local", ENGINES, "Where: on this machine, or over a Ray cluster (RAY_ADDRESS).")
    flags.DEFINE_integer("num_shards", 1, "How many machines share the work.", 1)
    flags.DEFINE_integer("shard_index", 0, "Which of them this is, from 0.", 0)
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier call with other parameters wrote to --out.")
    files.run(lambda _: _main(flags.FLAGS))
