"""Kills of the commands that take long, each at a random moment, each started again until it ends by itself.

    python -m tests.campaigns.kills [--count=200] [--only=prepare,train,...] [--seed=0]

What they leave in the end must be what an undisturbed command leaves, to the last bit: rows, samples, losses,
predictions, arrays. Of `processes` two train together and one of them is killed; the other must end by itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

from tests.campaigns import Tally
from tests.conftest import ROOT, SMALL, SMALL_HINF_LSTM, SMALL_LLM

HANG_S = 600
SHARES = {"prepare": 8, "train": 10, "population": 5, "stages": 5, "audio_llm": 5, "processes": 7}  # of 40 kills


def environment(work: pathlib.Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "OMP_NUM_THREADS": "1"}  # fmt: skip


def trained(config: str, prepared: pathlib.Path, fields: dict[str, Any], *more: str) -> list[str]:
    flags_ = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, "-m", "pcgjax.train", f"--config={ROOT / 'configs' / config}.py",
            f"--config.data.prepared={prepared}", *flags_, *more]  # fmt: skip


# -------------------------------------------------------------------------------------------- what must be the same


def lines_of(folder: pathlib.Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in ("seconds", "waited", "check")} for line in lines]
    return sorted(kept, key=lambda line: json.dumps(line, sort_keys=True))


def result_of_run(folder: pathlib.Path) -> object:
    """The losses, the answers, and the digests of the best model's arrays."""

    best = folder / "checkpoints" / "best"
    step = max(int(path.name) for path in best.iterdir() if path.name.isdecimal())
    meta = json.loads((best / str(step) / "meta" / "metadata").read_text())
    return lines_of(folder), (folder / "predictions.csv").read_text(), step, meta["arrays"]


def result_of_population(folder: pathlib.Path) -> object:
    return lines_of(folder), (folder / "table.csv").read_text(), result_of_run(folder / "best")[1:]


def result_of_stages(folder: pathlib.Path) -> object:
    return result_of_run(folder), [lines_of(path.parent) for path in sorted(folder.glob("*/metrics.jsonl"))]


def result_of_llm(folder: pathlib.Path) -> object:
    weights = sorted(folder.glob("checkpoints/best-*/adapter/adapter_model.safetensors"))[-1].read_bytes()
    answers = [line.partition(",")[2] for line in (folder / "predictions.csv").read_text().splitlines()]
    return lines_of(folder), answers, weights  # a row begins with the run's name


def result_of_prepare(folder: pathlib.Path) -> object:
    shards = [path.read_bytes() for path in sorted(folder.glob("shard-*"))]
    return (folder / "records.jsonl").read_bytes(), shards, sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------------------- processes


def start(words: list[str], work: pathlib.Path, most_bytes: int = 0) -> subprocess.Popen:
    """most_bytes: a write that makes a file longer fails, as on a full disk; 0: none does."""

    def limit() -> None:
        if most_bytes:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    with (work / "output.txt").open("a") as output:
        to = subprocess.PIPE if most_bytes else output  # the limit is of the command's own files alone
        process = subprocess.Popen(
            words, env=environment(work), stdout=to, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=limit
        )
    if process.stdout:
        copy = functools.partial(_copy, process.stdout, work / "output.txt")
        threading.Thread(target=copy, daemon=True).start()
    return process


def _copy(source: Any, target: pathlib.Path) -> None:
    with target.open("ab") as file:
        shutil.copyfileobj(source, file)


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_once(words: list[str], count: int, work: pathlib.Path, kill_after_s: float | None, victim: int) -> str:
    """Runs `count` processes of a command; returns "ended", "killed" or what went wrong."""
    together = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={count}",
                "--start_timeout_s=20"] if count > 1 else []  # fmt: skip
    processes = [start([*words, *together, *([f"--process_id={i}"] if together else [])], work) for i in range(count)]
    begun, killed = time.monotonic(), False
    while any(process.poll() is None for process in processes):
        now = time.monotonic() - begun
        if kill_after_s is not None and not killed and now > kill_after_s:
            killed = processes[victim].poll() is None
            kill(processes[victim])
            kill_after_s = None
        if now > HANG_S:
            for process in processes:
                kill(process)
            return "hang"
        time.sleep(0.02)
    if killed:
        return "killed"
    statuses = [process.returncode for process in processes]
    return "ended" if not any(statuses) else f"exit status {statuses}: {(work / 'output.txt').read_text()[-2000:]}"


def campaign(
    name: str, words: list[str], result: Callable[[pathlib.Path], object], work: pathlib.Path, kills: int, tally: Tally,
    rng: np.random.Generator, processes: int = 1,
) -> None:  # fmt: skip
    flag = "--out" if name == "prepare" else "--workdir"
    begun = time.monotonic()
    undisturbed = run_once([*words, f"{flag}={work / 'undisturbed'}"], processes, work, None, 0)
    if undisturbed != "ended":
        tally.add(name, "traceback", f"undisturbed: {undisturbed}")
        return
    wanted = result(work / "undisturbed")
    begun = time.monotonic()
    shutil.rmtree(work / "undisturbed")
    run_once([*words, f"{flag}={work / 'undisturbed'}"], processes, work, None, 0)  # with a warm compilation cache
    whole_s, done, round_ = time.monotonic() - begun, 0, 0
    while done < kills:
        folder, of_round = work / f"round{round_}", 0
        while True:
            after = float(rng.uniform(0.1, 1.0)) * whole_s if of_round < 6 and done + of_round < kills else None
            outcome = run_once([*words, f"{flag}={folder}"], processes, work, after, int(rng.integers(processes)))
            if outcome != "killed":
                break
            of_round += 1
        kind = {"ended": "silent", "hang": "hang"}.get(outcome, "traceback")
        if outcome == "ended" and result(folder) == wanted:
            kind = "survived"
        for _ in range(of_round):
            tally.add(name, kind, outcome)
        print(f"{name}: {done + of_round} of {kills} kills", file=sys.stderr, flush=True)
        done, round_ = done + of_round, round_ + 1
        shutil.rmtree(folder, ignore_errors=True)


def jobs_in(work: pathlib.Path) -> dict[str, tuple[list[str], Callable[[pathlib.Path], object], int]]:
    """{name: (command without its folder, what it must leave, how many processes)}; makes their data in `work`."""
    from pcgjax.audio_llm.make_tiny import make_tiny
    from pcgjax.data.prepare import prepare
    from pcgjax.datasets import synthetic

    synthetic.write(work / "source", people=24, recordings_per_person=2, duration_s=(3.0, 3.2), rate_hz=1000)
    synthetic.write(work / "many", people=300, recordings_per_person=3, duration_s=(4.0, 8.0), rate_hz=2000)
    synthetic.write(work / "circor", people=30, recordings_per_person=1, duration_s=(3.0, 3.4), rate_hz=4000,
                    layout="circor", murmur_fraction=0.6)  # fmt: skip
    prepare("cinc2016", work / "source", work / "prepared", workers=1)
    prepare("circor", work / "circor", work / "prepared_16k", 16000, workers=1)
    make_tiny(work / "tiny")
    small = SMALL | {"train.epochs": 4}
    train_words = trained("cnn", work / "prepared", small)
    llm = trained("audio_llm", work / "prepared_16k", SMALL_LLM, f"--model={work / 'tiny'}")
    llm[2] = "pcgjax.audio_llm.train"
    prepare_words = [sys.executable, "-m", "pcgjax.prepare", "--dataset=cinc2016", f"--source={work / 'many'}"]
    return {
        "prepare": (prepare_words, result_of_prepare, 1),
        "train": (train_words, result_of_run, 1),
        "population": ([*train_words, "--config.sweep.seed=0,1"], result_of_population, 1),
        "stages": (trained("hinf_lstm", work / "prepared", SMALL_HINF_LSTM), result_of_stages, 1),
        "audio_llm": (llm, result_of_llm, 1),
        "processes": ([*train_words, "--config.train.batch_recordings=4"], result_of_run, 2),
    }


def main(argv: list[str]) -> None:
    rng, tally = np.random.default_rng(FLAGS.seed), Tally()
    with tempfile.TemporaryDirectory(prefix="pcgjax-kills-") as folder:
        work = pathlib.Path(folder)
        jobs = jobs_in(work)
        for name in FLAGS.only:
            kills = round(FLAGS.count * SHARES[name] / sum(SHARES[name] for name in FLAGS.only))
            (work / name).mkdir()
            words, result, processes = jobs[name]
            campaign(name, words, result, work / name, kills, tally, rng, processes)
    sys.exit(tally.end())


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_integer("count", 200, "How many kills.")
    flags.DEFINE_list("only", list(SHARES), "Which commands.")
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    app.run(main)
