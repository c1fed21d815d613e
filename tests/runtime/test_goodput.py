"""Where a run's time goes, and traces of chosen steps."""

from __future__ import annotations

import collections
import contextlib
import gzip
import json
import shutil
import time

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from pcgjax.runtime import goodput
from pcgjax.training.loop import train

SMALL = {"train.batch_recordings": 8, "train.epochs": 2, "features.filter": "none", "train.checkpoint_steps": 100}


def test_parts_add_up_to_the_time():
    before = time.monotonic()
    clock = goodput.Clock()
    after = time.monotonic()
    for part, seconds in (("wait", 0.03), ("train", 0.05), ("save", 0.02), ("train", 0.05)):
        with clock(part):
            time.sleep(seconds)
    time.sleep(0.04)
    least = time.monotonic() - after
    told = clock.spent()
    assert least <= sum(told.values()) <= time.monotonic() - before
    assert list(told) == ["train", "wait", "compile", "validate", "save", "other"]
    assert told["train"] >= 0.1
    assert told["wait"] >= 0.03
    assert told["save"] >= 0.02
    assert told["other"] >= 0.04
    assert told["compile"] == told["validate"] == 0


def test_time_in_a_part_that_fails_counts():
    clock = goodput.Clock()
    with contextlib.suppress(KeyError), clock("train"):
        time.sleep(0.02)
        raise KeyError
    assert clock.spent()["train"] >= 0.02


def test_share():
    seconds = {"train": 6.0, "wait": 1.0, "compile": 2.0, "validate": 0.5, "save": 0.5, "other": 2.0}
    assert goodput.share(seconds) == 0.5
    assert goodput.share(dict.fromkeys(seconds, 0.0)) == 0
    assert goodput.sentence(seconds) == (
        "goodput 50%: 6.0 s training steps, 1.0 s waiting for data, 2.0 s compiling, 0.5 s validating, 0.5 s saving, "
        "2.0 s the rest, such as starting"
    )


def test_compiling_is_told_apart():
    """The first call of a jitted function compiles; the second trains."""

    @jax.jit
    def work(x):
        for _ in range(60):
            x = jnp.sin(x @ x) + x
        return x

    x = jnp.ones((8, 8))
    clock, walls, parts = goodput.Clock(), [], []
    for _ in range(2):
        began = time.monotonic()
        with clock("train"):
            work(x).block_until_ready()
        walls.append(time.monotonic() - began)
        told = clock.spent()
        parts.append((told["compile"], told["train"]))
    (compiled, trained), (compiled_in_all, _) = parts
    assert 0.1 * walls[0] < compiled < compiled + trained <= walls[0]
    assert compiled_in_all == compiled


@pytest.mark.parametrize(("start", "steps"), [(-1, 2), (2, -1)])
def test_a_profile_that_cannot_be(start, steps, make_config, tmp_path):
    config = make_config({"profile.start": start, "profile.steps": steps})
    with pytest.raises(ValueError, match=r"profile.st(art|eps)=-1: must be at least 0"):
        train(config, tmp_path)


def test_where_training_pauses_for_a_trace(tmp_path):
    trace = goodput.Trace(ml_collections.ConfigDict({"start": 5, "steps": 3}), tmp_path)
    assert [trace.until(step, most) for step, most in ((0, 20), (0, 4), (5, 20), (6, 7), (8, 20))] == [5, 4, 8, 7, 20]
    none = goodput.Trace(ml_collections.ConfigDict({"start": 5, "steps": 0}), tmp_path)
    assert none.until(0, 20) == 20
    none.before(5)
    assert not none.running


def events(workdir) -> list[list[dict]]:
    """The events of each trace in a run's folder."""
    found = []
    for path in sorted((workdir / "profile").rglob("perfetto_trace.json.gz")):
        with gzip.open(path, "rt") as file:
            found.append(json.load(file)["traceEvents"])
    return found


@pytest.fixture(scope="module")
def traced(make_config, tmp_path_factory):
    """A run of two epochs of three steps, the second and third of which are traced."""
    workdir = tmp_path_factory.mktemp("traced")
    train(make_config({**SMALL, "profile.start": 1, "profile.steps": 2}), workdir)
    return workdir


def test_a_run_tells_where_its_time_went(traced):
    system = json.loads((traced / "metrics.json").read_text())["system"]
    seconds = system["seconds"]
    assert set(seconds) == set(goodput.PARTS)
    assert all(seconds[part] > 0 for part in ("train", "compile", "validate", "save", "other"))
    assert sum(seconds.values()) <= system["wall_s"]
    assert system["goodput"] == goodput.share(seconds)
    assert 0 < system["goodput"] < 1
    line = [json.loads(line) for line in (traced / "metrics.jsonl").read_text().splitlines()][-3]
    assert (line["step"], line["split"]) == (6, "train")
    assert 0 < line["seconds"] <= seconds["train"]


def test_trace_of_a_run(traced):
    (trace,) = events(traced)
    names = collections.Counter(event.get("name", "") for event in trace)
    assert names["PjitFunction(run)"]
    # Each step chooses its batch's capacity once.
    assert sum(count for name, count in names.items() if name.startswith("end: cond")) == 2
    assert not [name for name in names if ".py:" in name]  # of Python's own calls there would be too many


def test_a_run_past_the_profiled_steps_does_not_trace(traced, make_config, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(traced, workdir)
    shutil.rmtree(workdir / "profile")
    train(make_config({**SMALL, "train.epochs": 3, "profile.start": 1, "profile.steps": 2}), workdir)
    assert json.loads((workdir / "metrics.json").read_text())["epochs"] == 3
    assert not events(workdir)
