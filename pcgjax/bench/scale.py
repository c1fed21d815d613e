"""Suite `scale`: devices, populations, streams and goals, each measured in a process of its own."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm

from pcgjax.bench.scale_models import COMMON, EIGHT, MODELS, MOSTLY, ROOT, write_prepared

MEMBERS = 16
JOB_S = 1200  # after which a job is given up
# layout -> (devices of a process, processes, what differs in the config)
ONE = "1 device"
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    ONE: (1, 1, {}),
    "8 devices, data": (EIGHT, 1, {}),
    "8 devices, fsdp": (EIGHT, 1, {"parallel.fsdp": EIGHT}),
    "8 devices, data 2 x fsdp 4": (EIGHT, 1, {"parallel.fsdp": 4}),
    "8 devices, pmap": (EIGHT, 1, {"parallel.strategy": "pmap"}),
    "2 processes, data": (1, 2, {}),
    "2 processes, pmap": (1, 2, {"parallel.strategy": "pmap"}),
}
CINC = 3600  # recordings; nine tenths train, 3,240, as many as CinC 2016 has
LARGE = 22_300  # 20,070 of which train
MIBS = (8.0, 16.0, 32.0)  # sizes of a streamed block
NO_GPU = "not measured: no GPU"


class Runner:
    """Starts jobs with files of their own in `folder`, and one cache of compiled programs for all."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.numbers = folder, itertools.count()

    def __call__(
        self, kind: str, config: str, changes: dict[str, Any], devices: int = 0, processes: int = 1, **own: Any
    ) -> dict:
        """What a job of JOBS returns, or {"failed": why}.

        devices: simulated on the CPU, of each process; 0: what there is.
        """
        number = next(self.numbers)
        job, out = (self.folder / f"{name}{number}.json" for name in ("job", "out"))
        workdir = str(self.folder / f"work{number}")
        own |= {"kind": kind, "config": config, "changes": changes, "workdir": workdir}
        job.write_text(json.dumps(own))
        words = [sys.executable, "-m", "pcgjax.bench.scale_jobs", f"--job={job}", f"--out={out}"]
        if processes > 1:
            words = ["bash", str(ROOT / "launch" / "local_cluster.sh"), str(processes), *words]
        failed = self.run(words, devices)
        return {"failed": failed} if failed else json.loads(out.read_text())

    def run(self, words: list[str], devices: int = 0) -> str:
        """Runs a command; what it said where it failed, else ""."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {
            "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        if devices:
            env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        pipe = subprocess.PIPE
        done = subprocess.Popen(
            words, env=env, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
        )
        try:
            stderr = done.communicate(timeout=JOB_S)[1]
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)
            done.communicate()
            return f"no end after {JOB_S} s: {shlex.join(words)}"
        said = stderr.strip().splitlines() or [f"status {done.returncode}"]
        # Of several processes the first to fail says why, the others that they stop.
        return next((line for line in said if "error: " in line), said[-1]) if done.returncode else ""


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

        def told(description: str, found: dict) -> dict:
            bar.set_description(description)
            bar.update()
            return found

        for model in models:
            # Two at a time: most of it is compiling, which one core does.
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                started = {layout: pool.submit(_layout, runner, model, layout, corpora[model], quick)
                           for layout in LAYOUTS}  # fmt: skip
                rows = {layout: told(f"{model}: {layout}", job.result()) for layout, job in started.items()}
            result["layouts"][model] = agreed(rows)
            found = _population(runner, model, corpora[model], quick)
            result["population"][model] = told(f"{model}: population", found)
        streamed = write_prepared(folder / "streamed", 240 if quick else 1000, (6, 36), 1000)
        result["stream"] = told("streaming", runner(
            "stream", "cnn", {**COMMON, "data.prepared": str(streamed), "split.fractions": MOSTLY},
            pairs=1 if quick else 3, mibs=MIBS,
        ))  # fmt: skip
        result["memory"] = told("streaming a large corpus", _large(runner, quick))
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
    found = runner("memory", "cnn", changes | {"split.fractions": MOSTLY, "features.filter": "none"}, devices=1)
    shutil.rmtree(prepared)
    return found


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
            counted = runner("flops", model, changes, devices=1)
            if "failed" not in row and "failed" not in counted:
                row["uncounted"] = counted["uncounted"]
                row["flops_a_s"] = counted["flops"] / row["step_s"]
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
    told = json.loads((workdir / "metrics.json").read_text())
    return {
        "epochs": epochs, "wall_s": time.perf_counter() - began, "seconds": told["system"]["seconds"],
        "trained_recordings": told["split"]["counts"]["train"]["all"]["recordings"],
    }  # fmt: skip


def goals(result: dict) -> list[dict]:
    """[{what, goal, measured, met}] of a result; what was not measured has None and, in place of `met`, why."""
    found: list[dict] = []

    def add(what: str, row: Any, goal: float, value: Callable[[Any], float | None], least: bool = True) -> None:
        words = f"{'at least' if least else 'at most'} {goal:.3g}"
        reason = row if isinstance(row, str) else row.get("failed")
        measured = None if reason else value(row)
        met = (measured >= goal if least else measured <= goal) if measured is not None else (reason or "not measured")
        found.append({"what": what, "goal": words, "measured": measured, "met": met})

    gpu = result["gpu"]
    on_gpu = not isinstance(gpu, str)
    for model, rows in result["layouts"].items():
        for layout, row in rows.items():
            if layout != ONE:
                add(f"{model}, {layout}: loss, relative difference", row, 1e-3, lambda r: r.get("difference"), False)
                if "failed" in row or "wire_bytes" in row:
                    add(f"{model}, {layout}: bytes sent / minimum", row, 1.1, lambda r: r["wire_over_minimum"], False)
            if fsdp := LAYOUTS[layout][2].get("parallel.fsdp"):
                add(f"{model}, {layout}: share of parameters and optimiser state", row, 1.1 / fsdp,
                    lambda r: r["state_bytes"]["share"], False)  # fmt: skip
    for model, row in result["population"].items():
        add(f"{model}: population / runs in a row", row, 4.0 if on_gpu else 0.9, lambda r: r["ratio"])
    add("streamed / resident", result["stream"], 0.9,
        lambda r: r["training"]["rate_over_resident"])  # fmt: skip
    add("peak MiB, streaming a large corpus", result["memory"], 2048, lambda r: r["peak_rss_mib"], False)
    for model, row in gpu["steps"].items() if on_gpu else [("each model", NO_GPU)]:
        add(f"{model}: step / PyTorch eager", row, 3.0, lambda r: r["peers"]["eager"].get("ratio"))
        add(f"{model}: step / torch.compile", row, 1.5, lambda r: r["peers"]["compiled"].get("ratio"))
        add(f"{model}: idle share", row, 0.02, lambda r: r["busy"]["idle_share"], False)
    add("50 epochs, s", gpu["fifty_epochs"] if on_gpu else NO_GPU, 60, lambda r: r["wall_s"], False)
    return found


def scale_summary(result: dict) -> str:
    """The main figures for a terminal."""
    lines = [f"{'':46}{'loss differs':>13}{'share':>8}{'temp MiB':>10}{'sent KiB':>10}{'/ least':>9}{'steps/s':>9}"]
    for model, rows in result["layouts"].items():
        for layout, r in rows.items():
            name = f"{model + ', ' + layout:<46}"
            if "failed" in r:
                lines.append(f"{name} failed: {r['failed']}")
                continue
            cells = [""] * 4
            if "wire_bytes" in r:
                over = "-" if r["wire_over_minimum"] is None else f"{r['wire_over_minimum']:.3f}"
                cells = [f"{r['state_bytes']['share']:.3f}", f"{r['memory_bytes']['temporaries'] / 2**20:.1f}",
                         f"{r['wire_bytes'] / 1024:.1f}", over]  # fmt: skip
            share, memory, sent, over = cells
            lines.append(
                f"{name}{r.get('difference', math.nan):>13.1e}{share:>8}{memory:>10}{sent:>10}{over:>9}"
                f"{r['steps_a_s']:>9.2f}"
            )
    for model, r in result["population"].items():
        what = f"{model}: population"
        lines.append(f"{what:<46} " + (f"failed: {r['failed']}" if "failed" in r else
                     f"{r['members']} members {r['ratio']:.2f}x as many runs in a row  [{r['ratio_range'][0]:.2f}, "
                     f"{r['ratio_range'][1]:.2f}]"))  # fmt: skip
    s, m = result["stream"], result["memory"]
    if "failed" in s:
        lines.append(f"streaming failed: {s['failed']}")
    else:
        loader, rate = s["loader"], s["training"]["rate_over_resident"]
        lines.append(f"{'streamed / resident':<46} {rate:.2f}, in blocks of {s['default_mib']:g} MiB")
        lines.append(f"{'loader alone':<46} {loader['ours_recordings_a_s']:.0f} recordings/s, "
                     f"{loader['ratio']:.1f}x PyTorch's DataLoader")  # fmt: skip
    what = "streaming a large corpus"
    lines.append(f"{what:<46} " + (f"failed: {m['failed']}" if "failed" in m else
                 f"{m['recordings']} recordings, {m['corpus_mib']:.0f} MiB: peak {m['peak_rss_mib']:.0f} MiB, "
                 f"{m['recordings_a_s']:.0f} recordings/s"))  # fmt: skip
    if isinstance(result["gpu"], str):
        lines.append(f"{'GPU':<46} {result['gpu']}")
    else:
        for model, r in result["gpu"]["steps"].items():
            lines.append(f"{model:<46} " + (f"failed: {r['failed']}" if "failed" in r else
                         f"{r['segments_a_s']:.0f} segments/s, {r.get('share_of_flops', math.nan):.1%} of the FLOP/s, "
                         f"{r.get('share_of_bytes', math.nan):.1%} of the bytes/s"))  # fmt: skip
    missed = [g for g in result["goals"] if g["met"] is not True]
    lines += [f"goals met: {len(result['goals']) - len(missed)} of {len(result['goals'])}"]
    for g in missed:
        measured = "" if g["measured"] is None else f", measured {g['measured']:.3g}"
        lines.append(f"  {'missed' if g['met'] is False else g['met']}: {g['what']}: {g['goal']}{measured}")
    return "\n".join(lines)
