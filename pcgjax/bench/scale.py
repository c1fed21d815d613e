"""Suite `scale`: devices and processes, populations, streams and, where there is one, a GPU.

    python -m pcgjax.bench --suite=scale --out=scale.json [--quick]

Every measurement is a process of its own, `pcgjax.bench.scale_jobs`, and the suite sets their results beside the goals.
Models are those of configs/, in their sizes; the recordings are simulated.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
import tqdm

from pcgjax.bench.corpora import write_prepared
from pcgjax.bench.scale_goals import NO_GPU, goals
from pcgjax.bench.scale_models import COMMON, EIGHT, LAYOUTS, MODELS, MOSTLY, ONE

MEMBERS = 16
JOB_S = 1200  # after which a job is given up
CINC = 3600  # recordings; nine tenths train, 3,240, as many as CinC 2016 has
LARGE = 22_300  # 20,070 of which train
MIBS = (8.0, 16.0, 32.0)  # sizes of a streamed block
ROOT = pathlib.Path(__file__).resolve().parents[2]


class Runner:
    """Starts jobs with files of their own in `folder`, and one cache of compiled programs for all."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.numbers = folder, itertools.count()

    def __call__(
        self, kind: str, config: str, changes: dict[str, Any], devices: int = 0, processes: int = 1, **arguments: Any
    ) -> dict:
        """What a job of `scale_measures.JOBS` returns, or {"failed": why}.

        devices: simulated on the CPU, of each process; 0: what there is. arguments: of that kind of job.
        """
        number = next(self.numbers)
        job, out = (self.folder / f"{name}{number}.json" for name in ("job", "out"))
        workdir = str(self.folder / f"work{number}")
        arguments |= {"kind": kind, "config": config, "changes": changes, "workdir": workdir}
        job.write_text(json.dumps(arguments))
        words = [sys.executable, "-m", "pcgjax.bench.scale_jobs", f"--job={job}", f"--out={out}"]
        if processes > 1:
            words = ["bash", str(ROOT / "launch" / "local_cluster.sh"), str(processes), *words]
        failed = self.run(words, devices)
        return {"failed": failed} if failed else json.loads(out.read_text())

    def run(self, words: list[str], devices: int = 0) -> str:
        """Runs a command; the line that says why it failed, else ""."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {
            "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        if devices:
            env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            words, env=env, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
        )
        try:
            stderr = process.communicate(timeout=JOB_S)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return f"no end after {JOB_S} s: {shlex.join(words)}"
        if not process.returncode:
            return ""
        lines = stderr.strip().splitlines() or [f"status {process.returncode}"]
        # Of several processes the first to fail says why, the others that they stop.
        return next((line for line in lines if "error: " in line), lines[-1])


def scale_suite(quick: bool = False, models: tuple[str, ...] = tuple(MODELS)) -> dict:
    """{layouts, population, stream, memory, gpu, goals}; quick: models and corpora so small that no figure counts."""
    # This process only looks whether there is a GPU, and leaves its memory to the others.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    gpu = jax.default_backend() == "gpu"
    with tempfile.TemporaryDirectory() as name:
        folder, runner = pathlib.Path(name), Runner(pathlib.Path(name))
        corpora = {model: _corpus(folder, model, quick) for model in models}
        result: dict[str, Any] = {"quick": quick, "layouts": {}, "population": {}}
        bar = tqdm.tqdm(total=len(models) * (len(LAYOUTS) + 1) + 2, unit="job")

        def counted(description: str, measured: dict) -> dict:
            bar.set_description(description)
            bar.update()
            return measured

        for model in models:
            # Two at a time: most of it is compiling, which one core does.
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                started = {layout: pool.submit(_layout, runner, model, layout, corpora[model], quick)
                           for layout in LAYOUTS}  # fmt: skip
                rows = {layout: counted(f"{model}: {layout}", job.result()) for layout, job in started.items()}
            result["layouts"][model] = agreed(rows)
            population = _population(runner, model, corpora[model], quick)
            result["population"][model] = counted(f"{model}: population", population)
        streamed = write_prepared(folder / "streamed", 240 if quick else 1000, (6, 36), 1000)
        result["stream"] = counted("streaming", runner(
            "stream", "cnn", {**COMMON, "data.prepared": str(streamed), "split.fractions": MOSTLY},
            pairs=1 if quick else 3, mibs=MIBS,
        ))  # fmt: skip
        result["memory"] = counted("streaming a large corpus", _large(runner, quick))
        bar.close()
        result["gpu"] = _gpu(runner, models) if gpu else NO_GPU
    result["goals"] = goals(result)
    return result


def _changes(model: str, prepared: pathlib.Path, quick: bool) -> dict[str, Any]:
    m = MODELS[model]
    return {**COMMON, **m.changes, **m.short, **(m.tiny if quick else {}), "data.prepared": str(prepared)}


def _corpus(folder: pathlib.Path, model: str, quick: bool) -> pathlib.Path:
    """Ten parts, eight of which train: as many steps of 8 recordings as the model's."""
    m = MODELS[model]
    duration_s = 2.0 if quick else m.duration_s
    return write_prepared(folder / model, 10 * m.steps, (duration_s, duration_s), m.rate_hz, annotated=True)


def _layout(runner: Runner, model: str, layout: str, prepared: pathlib.Path, quick: bool) -> dict:
    devices, processes, differs = LAYOUTS[layout]
    m = MODELS[model]
    groups = {"train.accumulate": EIGHT // (devices * processes)} if m.same_groups else {}
    return runner("layout", model, {**_changes(model, prepared, quick), **differs, **groups}, devices, processes,
                  steps=m.steps)  # fmt: skip


def agreed(rows: dict[str, dict]) -> dict[str, dict]:
    """The layouts' results, each with `difference`: the largest relative one of its losses from one device's."""
    if "failed" in rows[ONE]:
        return rows
    one = np.array(rows[ONE]["losses"])
    return {
        layout: row if "failed" in row else row | {"difference": float(np.abs(np.array(row["losses"]) / one - 1).max())}
        for layout, row in rows.items()
    }


def _population(runner: Runner, model: str, prepared: pathlib.Path, quick: bool) -> dict:
    m = MODELS[model]
    changes = {**_changes(model, prepared, quick), "train.batch_recordings": m.batch}
    return runner("population", model, changes, members=4 if quick else MEMBERS, steps=m.member_steps,
                  pairs=1 if quick else 3)  # fmt: skip


def _large(runner: Runner, quick: bool) -> dict:
    """A corpus of its own in a folder of its own, removed at once: it takes over a gigabyte."""
    count = 400 if quick else LARGE
    needed, free = count * 36 * 2000 * 1.2, shutil.disk_usage(runner.folder).free
    if free < needed:
        return {"failed": f"{runner.folder}: {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} needed; set TMPDIR"}
    prepared = write_prepared(runner.folder / "large", count, (24, 36), 1000)
    changes = {**COMMON, "data.prepared": str(prepared), "data.pipeline": "stream", "train.epochs": 1}
    measured = runner("memory", "cnn", changes | {"split.fractions": MOSTLY, "features.filter": "none"}, devices=1)
    shutil.rmtree(prepared)
    return measured


def _gpu(runner: Runner, models: tuple[str, ...]) -> dict:
    """Each model's step at its config's batch and, of the CNN, at 8 recordings; 50 epochs, whole."""
    rows = {}
    for model in models:
        m = MODELS[model]
        span_s = (m.gpu_duration_s, m.gpu_duration_s)
        prepared = write_prepared(runner.folder / f"{model} gpu", 10 * EIGHT, span_s, m.rate_hz, annotated=True)
        for batch in (1, 8) if model == "cnn" else (8,):
            changes = {**COMMON, **m.changes, "data.prepared": str(prepared), "train.batch_recordings": batch}
            row = runner("device", model, changes, pairs=5)
            cpu_program = runner("flops", model, changes, devices=1)
            if "failed" not in row and "failed" not in cpu_program:
                row["uncounted"] = cpu_program["uncounted"]
                row["flops_a_s"] = cpu_program["flops"] / row["step_s"]
                row["share_of_flops"] = row["flops_a_s"] / row["ceilings"]["float32_flops_a_s"]
                row["share_of_bytes"] = row["bytes_a_s"] / row["ceilings"]["bytes_a_s"]
            rows[f"{model}, {batch} recordings" if batch > 1 else f"{model}, 1 recording"] = row
    cinc = write_prepared(runner.folder / "cinc", CINC, (6, 36), 1000)
    return {"steps": rows, "fifty_epochs": fifty_epochs(runner, cinc)}


def fifty_epochs(runner: Runner, prepared: pathlib.Path, epochs: int = 50) -> dict:
    """`python -m pcgjax.train`, from its start to its end, with nothing compiled before; validation, checkpoints
    and the report are in it."""
    shutil.rmtree(runner.folder / "compiled", ignore_errors=True)
    workdir = runner.folder / "fifty"
    began = time.perf_counter()
    failed = runner.run([
        sys.executable, "-m", "pcgjax.train", f"--config={ROOT / 'configs' / 'cnn.py'}", f"--workdir={workdir}",
        f"--config.data.prepared={prepared}", f"--config.train.epochs={epochs}",
        f"--config.split.fractions={MOSTLY}",
    ])  # fmt: skip
    if failed:
        return {"failed": failed}
    results = json.loads((workdir / "metrics.json").read_text())
    return {
        "epochs": epochs, "wall_s": time.perf_counter() - began, "seconds": results["system"]["seconds"],
        "trained_recordings": results["split"]["counts"]["train"]["all"]["recordings"],
    }  # fmt: skip
