"""One measurement of suite `scale`, in a process of its own.

    python -m pcgjax.bench.scale_jobs --job=FILE --out=FILE

How many devices there are is settled when JAX starts, and a peak of memory is a process' own: so the suite starts this
for every figure, with as many devices and processes as it is of. FILE, JSON, has the kind of job (`JOBS` of
`scale_measures`), the name of a config, the changes to it, a workdir, and the arguments of that kind.
"""

from __future__ import annotations

import json
import pathlib

from absl import flags

from pcgjax.runtime import distributed, files

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Runs one job; of several processes the first writes the result."""
    import jax

    from pcgjax.bench.scale_measures import JOBS
    from pcgjax.runs.config import load_config

    job = json.loads(pathlib.Path(FLAGS.job).read_text())
    config = load_config(job.pop("config"), job.pop("changes"))
    measure, workdir = JOBS[job.pop("kind")], pathlib.Path(job.pop("workdir"))
    with distributed.together():
        result = measure(config, workdir, **job)
        if jax.process_index() == 0:
            files.write_text(pathlib.Path(FLAGS.out), json.dumps(result))


if __name__ == "__main__":
    flags.DEFINE_string(
        "job", None, "A JSON file: kind, config, changes, workdir, and what the kind wants.", required=True
    )
    flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
    distributed.define_flags()
    files.run(main)
