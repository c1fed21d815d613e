"""Training by several processes: the result of one, also where some are lost and others go on."""

from __future__ import annotations

import itertools
import pathlib
import re
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from test_distributed import free_port
from test_sharding import assert_same_answers, assert_same_curve, assert_same_state, history

from pcgjax.data import batches
from pcgjax.data.corpus import in_memory
from pcgjax.data.plan import Geometry, epoch_order, plan_batches
from pcgjax.training.loop import train
from pcgjax.training.stages import stages

ROOT = pathlib.Path(__file__).resolve().parents[2]

SMALL = {"train.batch_recordings": 8, "train.epochs": 2, "features.filter": "none", "train.checkpoint_steps": 2}
FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


# ---------------------------------------------------------------------------------------------- the same batches


def test_every_topology_has_the_same_batches():
    """A step's recordings are the same everywhere, each of them whole and on one device alone."""
    rng = np.random.default_rng(0)
    samples = [rng.integers(-99, 99, length, dtype=np.int16) for length in rng.integers(100, 900, 37)]
    corpus = in_memory([{"id": str(i)} for i in range(37)], samples, 1000)
    geometry = Geometry(100, 50, 0, 0)
    names = np.arange(37, dtype=np.float32)  # labels that say whose they are
    found = {}
    for processes, devices, accumulate in ((1, 1, 1), (1, 1, 8), (1, 8, 1), (2, 1, 4), (2, 4, 1), (4, 2, 2)):
        everywhere = processes * devices
        order = epoch_order(np.arange(37, dtype=np.int32), None, jax.random.key(0), 16, everywhere * accumulate)
        plan = plan_batches(order, corpus.lengths, geometry, (int(geometry.units(corpus.lengths).sum()),))
        steps = [[] for _ in order]
        for process in range(processes):
            mine = range(process * devices, (process + 1) * devices)
            done = 0
            for blocks, ids, _, count in batches.stream(
                corpus, names, plan, 0, len(order), everywhere, mine, mib=0.01, steps=2
            ):
                for step in range(count):
                    for device, of_device in enumerate(ids[step].reshape(devices, -1)):
                        block = {name: array[device] for name, array in blocks.items()}
                        for place in of_device[of_device >= 0]:
                            index, rows = int(block["labels"][place]), block["samples"][block["first"][place] :]
                            np.testing.assert_array_equal(rows.reshape(-1)[: len(samples[index])], samples[index])
                            steps[done + step].append(index)
                done += count
            assert done == len(order)
        assert sorted(itertools.chain(*steps)) == list(range(37))
        found[processes, devices, accumulate] = [sorted(step) for step in steps]
    first, *others = found.values()
    assert [len(step) for step in first] == [16, 16, 5]
    assert all(other == first for other in others)


# ------------------------------------------------------------------------------------------------ the same result


@pytest.fixture(scope="module")
def on_one(make_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    train(make_config(SMALL), workdir)
    return workdir


def as_flags(changes):
    return [f"--config.{name}={value}" for name, value in changes.items()]


def two_processes(command, workdir, changes, config="cnn", **environment):
    """`launch/local_cluster.sh 2 python -m pcgjax.train ...`, waited for."""
    words, env = command("train", f"--workdir={workdir}", *as_flags(changes), config=config, **environment)
    words = ["bash", str(ROOT / "launch" / "local_cluster.sh"), "2", *words]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "environment"),
    [
        ({"profile.start": 3, "profile.steps": 2}, {}),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                ({"data.pipeline": "stream"}, {}),
                ({"parallel.fsdp": 2}, {}),
                ({"parallel.strategy": "pmap"}, {}),
                ({"parallel.strategy": "pmap", "data.pipeline": "stream"}, {}),
                ({"train.accumulate": 4, "train.remat": "full"}, {}),
                ({}, FOUR),
                ({"parallel.fsdp": 8}, FOUR),
                ({"parallel.fsdp": 2, "data.pipeline": "stream"}, FOUR),
                ({"parallel.strategy": "pmap"}, FOUR),
            )
        ),
    ],
    ids=str,
)
def test_two_processes_equal_one(changes, environment, on_one, command, tmp_path):
    done = two_processes(command, tmp_path, {**SMALL, **changes}, **environment)
    assert_same_curve(tmp_path, on_one)
    assert_same_answers(tmp_path, on_one)
    # What process 0 says, the other does not say again.
    assert f"wrote {tmp_path}: metrics.json" in done.stdout
    assert "[1] wrote" not in done.stdout
    assert len([*tmp_path.rglob("perfetto_trace.json.gz")]) == ("profile.start" in changes)  # of the first process


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"parallel.fsdp": 2}, {"parallel.strategy": "pmap"}], ids=str)
def test_two_processes_where_averages_cross_them(changes, make_config, command, tmp_path):
    """The CNN-LSTM in its two stages, the second from the first's best model."""
    small = {
        "train.batch_recordings": 8, "train.epochs": 2, "features.wavelet_level": 0, "model.dropout": 0.0,
        "loss.slope": 5.0, "optimizer.learning_rate": 0.001,
    }  # fmt: skip
    stages(make_config(small, "hinf_lstm"), tmp_path / "one")
    two_processes(command, tmp_path / "two", {**small, **changes}, "hinf_lstm")
    for stage in ("cnn_lstm", "."):
        assert_same_curve(tmp_path / "two" / stage, tmp_path / "one" / stage, rel=1e-3)
    assert_same_answers(tmp_path / "two", tmp_path / "one", abs=1e-3)


# ---------------------------------------------------------------------------------------- stopped, lost, gone on

LONG = {**SMALL, "train.batch_recordings": 2, "train.epochs": 4}


def start(command, workdir, count, changes, **environment):
    """The processes of a training, each with its own pipe for what it says."""
    words, env = command("train", f"--workdir={workdir}", *as_flags(changes), **environment)
    words += [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    return [
        subprocess.Popen([*words, f"--process_id={i}"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                         text=True)
        for i in range(count)
    ]  # fmt: skip


def saved(workdir):
    folder = workdir / "checkpoints" / "last"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def struck(processes, workdir, victim, number, after):
    """Sends signal `number` to one of the processes once a checkpoint later than step `after` is there.

    Returns: (status, stderr) of each, and the seconds until the last had ended.
    """
    try:
        deadline = time.monotonic() + 240
        while saved(workdir) <= after:
            assert all(process.poll() is None for process in processes), [p.communicate()[1] for p in processes]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        processes[victim].send_signal(number)
        began = time.monotonic()
        told = [process.communicate(timeout=100)[1] for process in processes]
        took = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)], took


@pytest.fixture(scope="module")
def undisturbed(make_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(make_config(LONG), workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "last"), [(1, "one process"), (0, "one and then two")])
def test_stopped_and_lost_and_gone_on(victim, last, undisturbed, command, make_config, tmp_path):
    """Two processes are asked to stop in their second epoch, start again, and one is lost in their third; what is left
    is done by one process, or by one and then two. Other steps or another order would give other numbers."""
    workdir, epoch = tmp_path / "run", history(undisturbed)[0]["step"]
    ends, _ = struck(start(command, workdir, 2, LONG), workdir, 1, signal.SIGTERM, after=epoch)
    assert [status for status, _ in ends] == [128 + signal.SIGTERM] * 2
    steps = [re.findall(r"stopped by signal 15 at step (\d+), saved", text) for _, text in ends]
    assert steps[0] == steps[1] == [str(saved(workdir))]
    assert epoch < saved(workdir) < 2 * epoch

    ends, took = struck(start(command, workdir, 2, LONG), workdir, victim, signal.SIGKILL, after=2 * epoch)
    assert took < 60
    assert ends[victim][0] == -signal.SIGKILL
    status, text = ends[1 - victim]
    assert status == 1
    assert f"error: process {victim} of 2 ({socket.gethostname()}) is gone; the same command" in text
    assert 2 * epoch < saved(workdir) < 3 * epoch

    if last == "one process":
        train(make_config(LONG), workdir)
    else:
        ((status, _),), _ = struck(start(command, workdir, 1, LONG), workdir, 0, signal.SIGTERM, after=saved(workdir))
        assert status == 128 + signal.SIGTERM
        assert saved(workdir) < 4 * epoch
        two_processes(command, workdir, {**LONG, "parallel.fsdp": 2})
    assert_same_curve(workdir, undisturbed)
    assert_same_answers(workdir, undisturbed)
    assert_same_state(workdir, undisturbed)
