"""Training of the audio LLM: one process or several, stopped and resumed, the same run; and what it leaves behind."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pcgjax.runs.best import more_accurate
from pcgjax.runtime.files import CheckpointError

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def words(tiny_llm, prepared_16k, make_config):
    """The command of a small run, without its --workdir."""
    config = make_config({}, "audio_llm")
    names = ("split.fractions", "data.clip_s", "model.dtype", "lora.rank", "lora.dropout",
             "optimizer.learning_rate", "train.epochs", "train.batch_recordings",
             "train.checkpoint_steps", "evaluation.resamples")  # fmt: skip
    values = {name: config[name.split(".")[0]][name.split(".")[1]] for name in names}
    return [
        "-m", "pcgjax.audio_llm.train", f"--config={ROOT / 'configs' / 'audio_llm.py'}", f"--model={tiny_llm}",
        f"--config.data.prepared={prepared_16k}", *(f"--config.{name}={value}" for name, value in values.items()),
    ]  # fmt: skip


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(words: list[str], workdir: pathlib.Path, processes: int = 1, *more: str) -> subprocess.CompletedProcess:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launch, *words, f"--workdir={workdir}", *more], env=environment(), capture_output=True, text=True, timeout=300
    )


def adapter(workdir: pathlib.Path, kind: str = "last") -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    from pcgjax.audio_llm.checkpoints import newest

    return load_file(newest(workdir, kind) / "adapter" / "adapter_model.safetensors")


def lines(workdir: pathlib.Path) -> list[dict]:
    history = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "check")} for line in history]


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory) -> pathlib.Path:
    """The workdir of the run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("llm") / "run"
    done = run(words, workdir)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


def test_a_run_leaves_what_others_read(trained):
    there = {path.name for path in trained.iterdir()}
    assert there >= {"config.json", "split.json", "metrics.jsonl", "metrics.json", "predictions.csv", "report.html",
                     "train.log", "tensorboard", "checkpoints"}  # fmt: skip
    history = lines(trained)
    assert [line["split"] for line in history] == ["train", "validation"] * 2 + ["test"]
    assert history[2]["loss"] < history[0]["loss"]
    assert (trained / "predictions.csv").read_text().count("\n") > 5
    split = json.loads((trained / "split.json").read_text())
    assert split["target"] == "murmur_status"
    assert not {p.name for p in (trained / "checkpoints").iterdir() if p.name.startswith(".")}
    assert {p.name.split("-")[0] for p in (trained / "checkpoints").iterdir()} == {"best", "last"}
    for weight in adapter(trained).values():
        assert np.isfinite(weight).all()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_resumed_it_is_the_same_run_to_the_last_bit(words, trained, number, tmp_path):
    from pcgjax.audio_llm.checkpoints import newest

    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *words, f"--workdir={workdir}"], env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for_a_checkpoint(workdir, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=100)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM, error[-3000:]
        assert "the same command goes on" in error
    assert not (workdir / "metrics.json").exists()
    (workdir / "checkpoints" / ".last-00000009.1.tmp").mkdir()  # as one that is killed while it writes leaves it
    done = run(words, workdir)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"resuming at step \d+", done.stderr)
    assert lines(workdir) == lines(trained)
    for kind in ("last", "best"):
        wanted, resumed = adapter(trained, kind), adapter(workdir, kind)
        assert wanted.keys() == resumed.keys()
        for name in wanted:
            np.testing.assert_array_equal(resumed[name], wanted[name])
    moments = [newest(folder, "last") / "optimizer.safetensors" for folder in (trained, workdir)]
    assert moments[0].read_bytes() == moments[1].read_bytes()
    assert not list((workdir / "checkpoints").glob(".*"))


def wait_for_a_checkpoint(workdir: pathlib.Path, process: subprocess.Popen) -> None:
    from pcgjax.audio_llm.checkpoints import newest

    deadline = time.monotonic() + 200
    while newest(workdir, "last") is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_two_processes_train_what_one_does_and_one_goes_on(words, fsdp, tmp_path):
    words = [*words, "--config.lora.dropout=0.0"]
    alone, two = tmp_path / "alone", tmp_path / "two"
    done = run(words, alone, 1, "--config.train.accumulate=2")
    assert done.returncode == 0, done.stderr[-3000:]
    # Two processes, stopped on the way; then one goes on with what they left.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    process = subprocess.Popen([*launch, f"--workdir={two}", f"--config.parallel.fsdp={fsdp}"], env=environment(),
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    wait_for_a_checkpoint(two, process)
    process.terminate()
    _, error = process.communicate(timeout=100)
    assert not (two / "metrics.json").exists()
    assert "the same command goes on" in error
    done = run(words, two, 1, "--config.train.accumulate=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"resuming at step \d+", done.stderr)
    assert len(lines(two)) == len(lines(alone))
    for line, other in zip(lines(two), lines(alone), strict=True):
        for name in line.keys() & {"loss", "gradient_norm"}:
            assert line[name] == pytest.approx(other[name], rel=2e-3), (line, other)
    wanted, resumed = adapter(alone), adapter(two)
    moved = max(np.abs(w).max() for name, w in wanted.items() if "lora_B" in name)
    assert moved > 1e-3
    for name in wanted:
        np.testing.assert_allclose(resumed[name], wanted[name], atol=0.05 * moved, err_msg=name)


@pytest.mark.slow
def test_divided_bfloat16_weights_stopped_and_resumed_are_the_same_run(words, tmp_path):
    """Two processes that hold half of every weight each, the frozen ones in bfloat16, the adapter's in float32."""
    from safetensors.numpy import load_file

    from pcgjax.audio_llm.checkpoints import newest

    words = [*words, "--config.parallel.fsdp=2", "--config.model.dtype=bfloat16"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    done = run(words, straight, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    history = lines(straight)
    assert history[2]["loss"] < history[0]["loss"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    process = subprocess.Popen([*launch, f"--workdir={stopped}"], env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_a_checkpoint(stopped, process)
    process.terminate()
    _, error = process.communicate(timeout=100)
    assert "the same command goes on" in error, error[-3000:]
    assert not (stopped / "metrics.json").exists()
    done = run(words, stopped, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"resuming at step \d+", done.stderr)
    assert lines(stopped) == lines(straight)
    for file in ("adapter/adapter_model.safetensors", "optimizer.safetensors"):
        wanted, same = (load_file(newest(folder, "last") / file) for folder in (straight, stopped))
        assert wanted.keys() == same.keys()
        for name in wanted:
            assert wanted[name].dtype == np.float32
            np.testing.assert_array_equal(same[name], wanted[name], err_msg=name)
    assert any(np.abs(weight).max() > 1e-3 for name, weight in adapter(straight).items() if "lora_B" in name)


@pytest.mark.slow
def test_when_a_process_dies_the_others_stop(words, tmp_path):
    workdir = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = [f"--workdir={workdir}", "--config.train.epochs=50"]
    process = subprocess.Popen([*launch, *words, *more], env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        wait_for_a_checkpoint(workdir, process)
        listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
        children = [int(a) for a, b in (line.split() for line in listed.splitlines()[1:]) if int(b) == process.pid]
        assert len(children) == 2
        os.kill(children[1], signal.SIGKILL)
        began = time.monotonic()
        _, error = process.communicate(timeout=100)
    finally:
        process.terminate()
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    assert "Signal 9" in error


@pytest.mark.slow
def test_an_error_in_one_process_ends_them_all_and_is_told(words, tmp_path):
    """The second process alone cannot read the model."""
    code = (
        "import os, sys, runpy\n"
        "if os.environ['RANK'] == '1': sys.argv = [a.replace('--model=', '--model=/nowhere') for a in sys.argv]\n"
        "runpy.run_module('pcgjax.audio_llm.train', run_name='__main__')\n"
    )
    (tmp_path / "one_fails.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = [str(tmp_path / "one_fails.py"), *words[2:], f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run([*launch, *more], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert re.search(r"error: /nowhere.*: no config.json there", done.stderr)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lora.rank": 8}, r"trained with lora.rank=4, now 8"),
        ({"train.epochs": 3}, r"trained with train.epochs=2, now 3"),  # the schedule ends with them
    ],
)
def test_another_experiment_is_refused(words, trained, change, match):
    [(name, value)] = change.items()
    done = run(words, trained, 1, f"--config.{name}={value}")
    assert done.returncode == 1
    assert re.search(match, done.stderr)


@pytest.mark.slow
def test_W3_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(words, trained, tmp_path):
    from pcgjax.audio_llm.checkpoints import newest

    workdir = shutil.copytree(trained, tmp_path / "run")
    path = newest(workdir, "last") / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    done = run(words, workdir)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"last-\d+/adapter/adapter_model.safetensors: damaged.*the checkpoint before it", done.stderr)
    assert lines(workdir) == lines(trained)
    for kind in ("last", "best"):
        wanted, resumed = adapter(trained, kind), adapter(workdir, kind)
        assert all(np.array_equal(wanted[name], resumed[name]) for name in wanted)


@pytest.mark.slow
def test_W2_an_old_best_is_not_taken_for_another_run_s(words, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    for folder in (workdir / "checkpoints").glob("last-*"):
        shutil.rmtree(folder)
    done = run(words, workdir, 1, "--config.optimizer.learning_rate=0.5")
    assert done.returncode == 1
    assert re.search(r"error: \S+: trained with optimizer.learning_rate=\S+, now 0.5; give", done.stderr)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train.batch_recordings": 3, "train.accumulate": 2}, "train.batch_recordings=3: must be a multiple"),
        ({"data.clip_s": 31.0}, "data.clip_s=31.0"),
        ({"parallel.fsdp": 2}, "parallel.fsdp=2: must divide the 1 processes"),
        ({"train.epochs": 0}, "train.epochs=0"),
        ({"optimizer.schedule": "constant"}, "only cosine is offered"),
        ({"model.compile": True}, "wrong gradients on CPUs"),
        ({"model.attention": "flash_attention_2"}, "needs model.share_prefix=False"),
    ],
)
def test_impossible_settings_are_named(changes, match, prepared_16k, tiny_llm, make_config, tmp_path):
    from pcgjax.audio_llm.loop import train

    config = make_config({"data.prepared": str(prepared_16k), **changes}, "audio_llm")
    with pytest.raises(ValueError, match=match):
        train(config, str(tiny_llm), tmp_path)


def test_a_part_with_nothing_to_ask_is_named(prepared_16k, tiny_llm, make_config, tmp_path):
    from pcgjax.audio_llm.loop import train
    from pcgjax.runs.data import load_data

    changes = {"data.prepared": str(prepared_16k), "questions.tasks": ("systolic_pitch",)}
    config = make_config(changes, "audio_llm")
    corpus, _, split = load_data(config, tmp_path)
    without = {row["id"] for row in corpus.rows if "systolic_pitch" not in row["labels"]}
    moved = set(split["validation"]) - without
    split["validation"] = sorted(set(split["validation"]) & without)
    split["train"] = sorted({*split["train"], *moved})
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match="nothing to ask of the validation part"):
        train(config, str(tiny_llm), tmp_path)


def test_a_loss_that_is_not_finite_names_step_and_recordings(prepared_16k, tiny_llm, make_config, tmp_path):
    from pcgjax.audio_llm.loop import train

    config = make_config({"data.prepared": str(prepared_16k), "optimizer.learning_rate": 1e30}, "audio_llm")
    config.optimizer.warmup_steps = 0
    with pytest.raises(FloatingPointError, match=r"step \d+: loss .*recordings: .*smaller --config.optimizer"):
        train(config, str(tiny_llm), tmp_path)


def test_a_run_without_a_model_is_named(tmp_path):
    from pcgjax.audio_llm.checkpoints import best_adapter

    with pytest.raises(CheckpointError, match="no trained adapter there"):
        best_adapter(tmp_path)


def test_the_best_epoch_is_the_most_accurate_then_the_surest():
    first = more_accurate(None, 0.5, 1.0, 4)
    assert first == {"accuracy": 0.5, "loss": 1.0, "step": 4}
    assert more_accurate(first, 0.6, 9.0, 8) == {"accuracy": 0.6, "loss": 9.0, "step": 8}
    assert more_accurate(first, 0.5, 0.9, 8) == {"accuracy": 0.5, "loss": 0.9, "step": 8}
    for accuracy, loss in ((0.5, 1.0), (0.4, 0.1), (0.5, float("nan"))):
        assert more_accurate(first, accuracy, loss, 8) is None


@pytest.mark.parametrize("name", ["train", "score", "questions", "merge", "make_tiny"])
def test_help_needs_no_large_library(name, run_python):
    code = f"""
import runpy, sys
sys.argv = ["{name}", "--help"]
try:
    runpy.run_module("pcgjax.audio_llm.{name}", run_name="__main__")
except SystemExit:
    print([name for name in ("jax", "torch", "transformers", "matplotlib") if name in sys.modules])
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout or "--workdir" in done.stdout
    assert done.stdout.endswith("[]\n")
