"""A run's folder: run.json, which says what ran, and TensorBoard's numbers, which are those of metrics.jsonl."""

import json
import math
import pathlib
import shutil
import struct
import subprocess
import sys

import jax
import pytest

from pcgjax.runs import record as record_module
from pcgjax.runs.config import plain_config
from pcgjax.runs.log import history, log_line, open_board
from pcgjax.runs.record import git_state, record

GIT = shutil.which("git")


def starts(workdir):
    return json.loads((workdir / "run.json").read_text())["starts"]


# --- run.json


def test_a_start_is_recorded_whole(make_config, tmp_path):
    config = make_config({"optimizer.learning_rate": 0.5})
    record(tmp_path, config)
    (start,) = starts(tmp_path)
    assert start["config"] == plain_config(config)
    assert start["config"]["optimizer"]["learning_rate"] == 0.5
    assert start["versions"]["jax"] == jax.__version__
    assert start["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert start["device"] == jax.devices()[0].device_kind
    assert (start["devices"], start["processes"], start["step"]) == (jax.device_count(), 1, 0)
    assert start["started"].endswith("+00:00")
    assert not list(tmp_path.glob(".*"))


def test_a_resumed_run_adds_a_start(make_config, tmp_path):
    record(tmp_path, make_config())
    record(tmp_path, make_config({"train.epochs": 9}), 40, {"device": "H200", "devices": 8, "processes": 8})
    first, second = starts(tmp_path)
    assert (first["step"], second["step"]) == (0, 40)
    assert (first["config"]["train"]["epochs"], second["config"]["train"]["epochs"]) == (6, 9)
    assert (second["device"], second["devices"], second["processes"]) == ("H200", 8, 8)


@pytest.mark.parametrize("text", ["", "[]", '{"starts": [1]}', '{"begun": []}'])
def test_a_run_json_that_is_none_is_named(make_config, tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json, starts: not what a run wrote .*; remove the file"):
        record(tmp_path, make_config())
    assert (tmp_path / "run.json").read_text() == text


COMMAND = """
import pathlib
from absl import app, flags
from ml_collections import config_flags
from pcgjax.runs.record import record
flags.DEFINE_string("workdir", None, "")
flags.DEFINE_bool("dry_run", False, "")
CONFIG = config_flags.DEFINE_config_file("config", None, "")
app.run(lambda _: record(pathlib.Path(flags.FLAGS.workdir), CONFIG.value))
"""


def test_the_command_and_its_flags_are_kept_and_no_secrets(run_python, tmp_path):
    path = str(pathlib.Path(record_module.__file__).parents[2] / "configs" / "cnn.py")
    given = [f"--config={path}", "--config.train.epochs=3", f"--workdir={tmp_path}"]
    done = run_python(COMMAND, *given, MY_API_TOKEN="hush-5577")
    assert done.returncode == 0, done.stderr[-3000:]
    (start,) = starts(tmp_path)
    assert start["flags"] == {"config": path, "config.train.epochs": 3, "workdir": str(tmp_path)}
    assert start["command"].endswith(" ".join(given))
    assert "torch" not in start["versions"]
    assert "hush-5577" not in (tmp_path / "run.json").read_text()


@pytest.mark.skipif(GIT is None, reason="no git on this machine")
def test_the_commit_of_the_checkout_that_ran(monkeypatch, tmp_path):
    (tmp_path / "pcgjax").mkdir()
    shutil.copy(record_module.__file__, tmp_path / "pcgjax")
    monkeypatch.setattr(record_module, "__file__", str(tmp_path / "pcgjax" / "record.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state() is None
    git("init", "-q")
    (tmp_path / "other.py").write_text("")
    git("add", "other.py")
    git("commit", "-q", "-m", "somebody else's")
    assert git_state() is None  # pcgjax lies in a checkout, but is not of it
    git("add", "pcgjax")
    git("commit", "-q", "-m", "ours")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("a file that git does not know")
    assert git_state() == {"commit": commit, "dirty": False}
    (tmp_path / "other.py").write_text("x = 1")
    assert git_state() == {"commit": commit, "dirty": True}


# --- TensorBoard


def events(workdir):
    """The events of all files of a board, in TensorBoard's order."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        assert "tfevents" in path.name
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def shown(workdir):
    """{tag: {step: value}} as TensorBoard shows it: a start drops what was written of its step and later ones."""
    found: dict[str, dict[int, float]] = {}
    for event in events(workdir):
        if event.session_log.status == event.session_log.START:
            found = {tag: {s: v for s, v in of.items() if s < event.step} for tag, of in found.items()}
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_the_board_has_the_numbers_of_the_log(tmp_path):
    log, board = tmp_path / "metrics.jsonl", open_board(tmp_path)
    for step in (10, 20):
        log_line(log, step, "train", {"loss": 1 / step, "epoch": step // 10}, board)
        log_line(log, step, "validation", {"auc": math.nan if step == 10 else 0.75, "f1": None}, board)
    board.close()
    assert shown(tmp_path) == {
        "train/loss": {10: pytest.approx(0.1), 20: pytest.approx(0.05)},
        "train/epoch": {10: 1, 20: 2},
        "validation/auc": {20: 0.75},
    }
    assert [line["auc"] for line in history(log) if line["split"] == "validation"] == [None, 0.75]


def test_a_resumed_run_shows_no_later_steps_from_before_the_stop(tmp_path):
    for start, values in ((0, {10: 1.0, 20: 2.0, 30: 3.0}), (20, {30: 3.5}), (0, {10: 7.0})):
        board = open_board(tmp_path, start)
        for step, value in values.items():
            log_line(tmp_path / "metrics.jsonl", step, "train", {"loss": value}, board)
        board.close()
        want = {0: values, 20: {10: 1.0, 20: 2.0, 30: 3.5}}[start]
        assert shown(tmp_path) == {"train/loss": want}


def test_what_a_killed_process_logged_is_there(run_python, tmp_path):
    code = """
import os, pathlib, sys, time
from pcgjax.runs.log import log_line, open_board
workdir = pathlib.Path(sys.argv[1])
board = open_board(workdir)
for step in (1, 2, 3):
    log_line(workdir / "metrics.jsonl", step, "train", {"loss": step}, board)
assert "torch" not in sys.modules, "tensorboardX has imported PyTorch"
time.sleep(2)  # the board's own thread writes within one
os.kill(os.getpid(), 9)
"""
    assert run_python(code, str(tmp_path)).returncode == -9
    assert shown(tmp_path) == {"train/loss": {1: 1, 2: 2, 3: 3}}


def test_without_tensorboardx_a_run_goes_on(run_python, tmp_path):
    code = """
import pathlib, sys
sys.modules["tensorboardX"] = None
from pcgjax.runs.log import log_line, open_board
board = open_board(pathlib.Path(sys.argv[1]))
log_line(pathlib.Path(sys.argv[1]) / "metrics.jsonl", 1, "train", {"loss": 0.5}, board)
"""
    done = run_python(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "no TensorBoard: " in done.stderr
    assert history(tmp_path / "metrics.jsonl") == [{"step": 1, "split": "train", "loss": 0.5}]
