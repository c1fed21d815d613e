"""Several devices give what one gives. Eight CPU devices are simulated in a process of their own."""

from __future__ import annotations

import csv
import itertools
import json

import ml_collections
import numpy as np
import pytest

from pcgjax import evaluate, sharding, train

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
SMALL = {"train.batch_recordings": 8, "train.epochs": 2, "features.filter": "none", "train.checkpoint_steps": 2}
LAYOUTS = {
    "data": {},
    "fsdp": {"parallel.fsdp": 2},
    "pmap": {"parallel.strategy": "pmap"},
}


def config_of(**changes) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({"strategy": "jit", "fsdp": 1} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "xmap"}, "parallel.strategy='xmap': choose jit or pmap"),
        ({"fsdp": 3}, "parallel.fsdp=3 does not divide the 8 devices"),
        ({"fsdp": 16}, "parallel.fsdp=16 does not divide the 8 devices"),
        ({"fsdp": 0}, "parallel.fsdp=0"),
        ({"fsdp": -2}, "parallel.fsdp=-2"),
        ({"strategy": "pmap", "fsdp": 2}, "parallel.fsdp needs parallel.strategy=jit"),
    ],
)
def test_mesh_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        sharding.check(config_of(**changes), 8)


def test_mesh_of_one_device():
    mesh = sharding.make_mesh(config_of())
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1}
    assert sharding.replicated(mesh).is_fully_replicated


def test_where_parameters_live(run_python):
    done = run_python(
        """
import jax, json, ml_collections
from jax.sharding import PartitionSpec
from pcgjax import sharding, tasks
shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in
          {"kernel": (6, 16), "tall": (16, 6), "odd": (5, 3), "scalar": (), "bias": (4,), "short": (2, 3)}.items()}
state = tasks.TrainState(shapes["scalar"], shapes, {"mean": shapes["kernel"]}, {"mu": shapes}, shapes["kernel"])
told = {}
for fsdp in (1, 4):
    mesh = sharding.make_mesh(ml_collections.ConfigDict({"strategy": "jit", "fsdp": fsdp}))
    assert dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp}
    assert sharding.mine(mesh) == list(range(8))
    layout = sharding.state_sharding(mesh, state)
    told[fsdp] = {name: list(s.spec) for name, s in layout.params.items()}
    assert {name: list(s.spec) for name, s in layout.opt_state["mu"].items()} == told[fsdp]
    assert not any(s.spec for s in (layout.step, layout.rest["mean"], layout.sapt))
print(json.dumps(told))
""",
        **EIGHT,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert not any(told["1"].values())
    assert told["4"] == {
        "kernel": [None, "fsdp"], "tall": ["fsdp", None], "odd": [], "scalar": [], "bias": ["fsdp"], "short": [],
    }  # fmt: skip


def history(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def answers(path):
    with path.open(newline="") as file:
        return {row["id"]: float(row["probability"]) for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def on_one(make_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    train.train(make_config(SMALL), workdir)
    return workdir


RUN = """
import json, sys
import jax, ml_collections
from pcgjax import train
assert jax.device_count() == 8
results = train.train(ml_collections.ConfigDict(json.loads(sys.argv[1])), sys.argv[2])
assert results["system"]["devices"] == 8
"""


@pytest.mark.parametrize(
    ("layout", "pipeline"),
    [("fsdp", "resident")]
    + [
        pytest.param(layout, pipeline, marks=pytest.mark.slow)
        for layout, pipeline in itertools.product(LAYOUTS, ("resident", "stream"))
        if (layout, pipeline) != ("fsdp", "resident")
    ],
)
def test_eight_devices_equal_one(layout, pipeline, on_one, make_config, corpus_folder, run_python, tmp_path):
    config = make_config({**SMALL, **LAYOUTS[layout], "data.pipeline": pipeline})
    workdir = tmp_path / "eight"
    done = run_python(RUN, config.to_json_best_effort(), str(workdir), **EIGHT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines, expected = history(workdir), history(on_one)
    assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    probabilities, others = answers(workdir / "predictions.csv"), answers(on_one / "predictions.csv")
    assert probabilities == pytest.approx(others, abs=1e-4)
    # What eight devices saved, one device restores.
    evaluate.evaluate(str(workdir), "cinc2016", str(corpus_folder / "source"), str(tmp_path / "scores.json"))
    restored = answers(tmp_path / "scores.csv")
    assert {id: restored[id] for id in probabilities} == pytest.approx(probabilities, abs=1e-5)
    assert np.std(list(probabilities.values())) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_devices_equal_one_where_averages_cross_them(layout, make_config, run_python, tmp_path):
    """The CNN-LSTM: batch norm over all devices' clips, a penalty that counts all of them."""
    small = {
        "train.batch_recordings": 8, "train.epochs": 2, "features.wavelet_level": 0, "model.dropout": 0.0,
        "loss.slope": 5.0, "train.start_from": "", "optimizer.learning_rate": 0.001,
    }  # fmt: skip
    one = tmp_path / "one"
    train.train(make_config(small, "hinf_lstm"), one)
    config = make_config({**small, **LAYOUTS[layout]}, "hinf_lstm")
    workdir = tmp_path / "eight"
    done = run_python(RUN, config.to_json_best_effort(), str(workdir), timeout=600, **EIGHT)
    assert done.returncode == 0, done.stderr[-3000:]
    for line, other in zip(history(workdir), history(one), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert answers(workdir / "predictions.csv") == pytest.approx(answers(one / "predictions.csv"), abs=1e-3)
