"""A disk that is full at any moment: each command under a limit on the size of its files, then without one.

    python -m tests.campaigns.full_disk [--count=40] [--seed=0]

The first must end with status 1 and a line, not a traceback, or do all that it does without a limit; the second must
leave what an undisturbed command leaves, to the last bit. The limits lie between 100 bytes and the largest file.
"""

from __future__ import annotations

import math
import os
import pathlib
import shutil
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from absl import app, flags

from tests.campaigns import Tally
from tests.campaigns.kills import HANG_S, jobs_in, run_once, start

COMMANDS = ("prepare", "train", "population", "stages", "audio_llm")


def main(argv: list[str]) -> None:
    rng, tally = np.random.default_rng(FLAGS.seed), Tally()
    with tempfile.TemporaryDirectory(prefix="pcgjax-disk-") as folder:
        work = pathlib.Path(folder)
        jobs = jobs_in(work)
        for name in COMMANDS:
            (place := work / name).mkdir()
            words, result, _ = jobs[name]
            flag = "--out" if name == "prepare" else "--workdir"
            run_once([*words, f"{flag}={place / 'undisturbed'}"], 1, place, None, 0)
            wanted = result(place / "undisturbed")
            largest = max(path.stat().st_size for path in (place / "undisturbed").rglob("*") if path.is_file())
            for n in range(FLAGS.count // len(COMMANDS)):
                out, most = place / f"run{n}", int(math.exp(rng.uniform(math.log(100), math.log(largest))))
                (place / "output.txt").unlink(missing_ok=True)
                process = start([*words, f"{flag}={out}"], place, most)
                try:
                    status = process.wait(HANG_S)
                except TimeoutError:
                    process.kill()
                    tally.add(name, "hang", f"{most} bytes")
                    continue
                time.sleep(0.5)  # until what it said is written, too
                output = (place / "output.txt").read_text(errors="replace")
                whole = "silent" if status == 0 and result(out) != wanted else "survived"
                if "Traceback" in output or status not in (0, 1):
                    whole = "traceback"
                elif run_once([*words, f"{flag}={out}"], 1, place, None, 0) != "ended" or result(out) != wanted:
                    whole = "silent"
                tally.add(
                    name, whole, f"{most} bytes, status {status}: {output[-1500:] if whole != 'survived' else ''}"
                )
                shutil.rmtree(out, ignore_errors=True)
                print(f"{name}: {n + 1}", file=sys.stderr, flush=True)
    sys.exit(tally.end())


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_integer("count", 40, "How many limits.")
    flags.DEFINE_integer("seed", 0, "Of the limits.")
    app.run(main)
