"""Audio files -> checked, resampled int16 ArrayRecord shards and a manifest, once.

    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=DIR [--sample_rate_hz=2000]

A prepared folder holds
  shard-00000.array_record ...  one record a recording: its samples as little-endian int16
  records.jsonl                 one row a recording (see `pcgjax.data.decode`), sorted by id
  manifest.json                 written last: a folder without it is unfinished
and, until the manifest is there, parts/: the rows of every finished shard. A run that was stopped takes up there,
and several machines that share the folder each do some of the shards.
"""

from __future__ import annotations

import time

from absl import flags

from pcgjax import datasets
from pcgjax.data.prepare import ENGINES, prepare, summary
from pcgjax.runtime import files

__all__ = ["prepare", "summary"]


def main(argv: list[str]) -> None:
    f = flags.FLAGS
    started = time.perf_counter()
    manifest = prepare(
        f.dataset, f.source, f.out, f.sample_rate_hz, strict=f.strict, workers=f.workers, engine=f.engine,
        num_shards=f.num_shards, shard_index=f.shard_index, overwrite=f.overwrite,
        labels=f.labels, persons=f.persons,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    if manifest is None:
        print(
            f"{f.out}: this machine's shards are done ({seconds:.1f} s), others' are missing: "
            "the machine that finishes last joins them, or a call without --num_shards"
        )
    else:
        print(summary(manifest))
        print(f"{f.out}: complete after {seconds:.1f} s")


if __name__ == "__main__":
    flags.DEFINE_enum("dataset", None, datasets.NAMES, "The data set in --source.", required=True)
    flags.DEFINE_string("source", None, "The folder that holds the data set; of table the CSV file.", required=True)
    flags.DEFINE_string("out", None, "The folder to write shards, records.jsonl and manifest.json to.", required=True)
    flags.DEFINE_integer("sample_rate_hz", 1000, "The rate to resample to, in Hz.", 100, 192_000)
    flags.DEFINE_bool("strict", False, "Fail when any file or table row cannot be used.")
    flags.DEFINE_integer("workers", None, "Processes that decode; default: one a core.", 1)
    flags.DEFINE_enum("engine", "local", ENGINES, "Where: on this machine, or over a Ray cluster (RAY_ADDRESS).")
    flags.DEFINE_integer("num_shards", 1, "How many machines share the work.", 1)
    flags.DEFINE_integer("shard_index", 0, "Which of them this is, from 0.", 0)
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier call with other parameters wrote to --out.")
    datasets.define_flags()
    files.run(main)
