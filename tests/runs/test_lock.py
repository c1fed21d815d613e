"""One run a folder."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from pcgjax.runs import lock
from pcgjax.training.loop import train

ROOT = pathlib.Path(__file__).parents[2]
HOLDER = """
import sys, time
from pcgjax.runs import lock
try:
    with lock.held(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
except lock.LockedError as error:
    print(error)
"""


def holder(workdir: pathlib.Path) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(workdir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env=env, text=True)  # fmt: skip


def test_W9_a_second_process_is_refused_and_names_the_first(make_config, tmp_path):
    with holder(tmp_path) as first:
        assert first.stdout.readline() == "held\n"
        message = rf"{tmp_path}: in use by process {first.pid} on {re.escape(socket.gethostname())} since 2\d+-.*; wait"
        with pytest.raises(lock.LockedError, match=message):
            train(make_config(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]
        first.communicate("\n")
    with lock.held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_W9_what_a_killed_process_left_is_taken_over(tmp_path):
    with holder(tmp_path) as first:
        first.stdout.readline()
        first.send_signal(signal.SIGKILL)
    assert json.loads((tmp_path / lock.NAME).read_text())["process"] == first.pid
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_W9_of_many_at_once_one_holds_it(tmp_path):
    several = [holder(tmp_path) for _ in range(4)]
    first = [process.stdout.readline() for process in several]
    assert first.count("held\n") == 1
    assert all("in use by process" in line for line in first if line != "held\n")
    for process in several:
        process.communicate("\n")


def test_W9_again_in_one_process_is_no_error(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with lock.held(tmp_path), lock.held(str(tmp_path)), lock.held(tmp_path / "link"), lock.held(tmp_path / "inner"):
        assert (tmp_path / lock.NAME).exists()
    assert not (tmp_path / lock.NAME).exists()
    assert not lock._ours


def test_W9_only_the_first_process_of_a_training_takes_it(tmp_path):
    with lock.held(tmp_path), lock.held(tmp_path, first=False):
        pass
    with lock.held(tmp_path / "other", first=False):
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"5", b"{}", b'{"host": {}}', b"[" * 10000])
def test_W9_a_lock_that_says_nothing_is_still_one(content, tmp_path):
    with holder(tmp_path) as first:
        first.stdout.readline()
        (tmp_path / lock.NAME).write_bytes(content)
        with pytest.raises(lock.LockedError, match="in use by another process"), lock.held(tmp_path):
            pass
        first.communicate("\n")


def test_W9_a_lock_that_was_removed_is_made_anew(tmp_path):
    with lock.held(tmp_path):
        (tmp_path / lock.NAME).unlink()
    with lock.held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_W9_threads_of_one_process_share_it(tmp_path):
    def work():
        for _ in range(50):
            with lock.held(tmp_path):
                assert (tmp_path / lock.NAME).exists()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not list(tmp_path.iterdir())


def test_W9_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with caplog.at_level("WARNING"), lock.held(tmp_path):
        pass
    assert "no locks here (No locks available)" in caplog.text


def test_W9_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: a file, not a folder"), lock.held(tmp_path / "file"):
        pass
