"""What hashing costs: this checkout beside one of an earlier version, in alternation.

    git worktree add ../before 3a9bc85
    python -m tests.campaigns.costs --before=../before [--pairs=5]

Prints, of CPU time, the median ratio over pairs (and its range) for an epoch of the quickstart (its corpus and config;
two trainings of 3 and 13 epochs are subtracted, so validating and saving count and compiling does not), and for
reading a prepared corpus, 900 recordings of 8 to 20 s, rows and samples. Each reads what its own version prepared.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from absl import app, flags

from pcgjax.datasets import synthetic
from tests.conftest import ROOT

PREPARE = """
import sys
from pcgjax.data.prepare import prepare
prepare("cinc2016", sys.argv[1], sys.argv[2], workers=1)
"""
READ = """
import sys, time
from pcgjax.data.corpus import from_prepared
times = []
for _ in range(15):
    begun = time.process_time()
    corpus = from_prepared(sys.argv[1])
    sum(len(corpus.read(i)) for i in range(len(corpus.rows)))
    times.append(time.process_time() - begun)
print(min(times))
"""
EPOCH = """
import sys, time, pathlib
from pcgjax.runs.config import load_config
from pcgjax.training.loop import train
times = []
for epochs in (1, 3, 13):
    begun = time.process_time()
    train(load_config("cnn", {"data.prepared": sys.argv[1], "train.epochs": epochs}),
          pathlib.Path(sys.argv[2]) / str(time.time_ns()))
    times.append(time.process_time() - begun)
print((times[2] - times[1]) / 10)
"""


def run(root: pathlib.Path, code: str, *arguments: pathlib.Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{root}: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def main(argv: list[str]) -> None:
    roots = {"before": pathlib.Path(FLAGS.before).resolve(), "now": ROOT}
    with tempfile.TemporaryDirectory(prefix="pcgjax-costs-") as folder:
        work = pathlib.Path(folder)
        synthetic.write(work / "quickstart", people=FLAGS.people)
        synthetic.write(work / "long", people=300, recordings_per_person=3, duration_s=(8.0, 20.0), rate_hz=2000)
        for name, root in roots.items():
            for source in ("quickstart", "long"):
                run(root, PREPARE, work / source, work / f"{source}_{name}")
        for what, code, source in (("reading", READ, "long"), ("an epoch", EPOCH, "quickstart")):
            pairs = []
            for _ in range(FLAGS.pairs):
                each = {name: float(run(root, code, work / f"{source}_{name}", work)) for name, root in roots.items()}
                pairs.append(each["now"] / each["before"])
                print(what, {name: f"{seconds:.4f} s" for name, seconds in each.items()}, flush=True)
            median = statistics.median(pairs)
            print(f"{what}: {median:.3f} of before ({min(pairs):.3f} to {max(pairs):.3f})", flush=True)


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_string("before", None, "A checkout of the version to compare with.", required=True)
    flags.DEFINE_integer("pairs", 5, "How often each is timed.")
    flags.DEFINE_integer("people", 1200, "Of the quickstart's corpus.")
    app.run(main)
