"""Several devices give what one gives. Eight CPU devices are simulated in a process of their own."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pcgjax import evaluate
from pcgjax.runtime import sharding
from pcgjax.training.loop import train
from pcgjax.training.step import REMAT

ROOT = pathlib.Path(__file__).resolve().parents[2]

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
        ({"strategy": "xmap"}, "parallel.strategy='xmap': choose one of jit, pmap"),
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
from pcgjax.runtime import sharding
from pcgjax.tasks.base import TrainState
shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in
          {"kernel": (6, 16), "tall": (16, 6), "odd": (5, 3), "scalar": (), "bias": (4,), "short": (2, 3)}.items()}
state = TrainState(shapes["scalar"], shapes, {"mean": shapes["kernel"]}, {"mu": shapes}, shapes["kernel"])
told = {}
for fsdp in (1, 4):
    mesh = sharding.make_mesh(ml_collections.ConfigDict({"strategy": "jit", "fsdp": fsdp}))
    assert dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp}
    assert sharding.local_devices(mesh) == list(range(8))
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


def assert_same_curve(workdir, expected, splits=("train", "validation", "test"), rel=1e-4):
    """The same losses at the same steps, up to the rounding of sums in another order."""
    lines, others = ([line for line in history(folder) if line["split"] in splits] for folder in (workdir, expected))
    assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in others]
    assert len(lines) >= 2
    for line, other in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=rel)


def assert_same_answers(workdir, expected, abs=1e-4):
    probabilities = answers(workdir / "predictions.csv")
    assert probabilities == pytest.approx(answers(expected / "predictions.csv"), abs=abs)
    assert np.std(list(probabilities.values())) > 1e-4


RUN = """
import json, sys
import jax, ml_collections
sys.modules["matplotlib"] = None  # no report: its figures take longer than the training
from pcgjax.training.loop import train
assert jax.device_count() == int(sys.argv[3])
results = train(ml_collections.ConfigDict(json.loads(sys.argv[1])), sys.argv[2])
assert results["system"]["devices"] == int(sys.argv[3])
"""


@pytest.fixture(scope="module")
def run_on(run_python):
    """run_on(8, config, workdir): trains in a process of its own that has so many devices."""

    def run(devices, config, workdir):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        done = run_python(RUN, config.to_json_best_effort(), str(workdir), str(devices), timeout=900, **flags)
        assert done.returncode == 0, done.stderr[-3000:]
        return workdir

    return run


@pytest.fixture(scope="module")
def on_one(make_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    train(make_config(SMALL), workdir)
    return workdir


@pytest.fixture(scope="module")
def on_eight(make_config, run_on, tmp_path_factory):
    """The same, the parameters split over eight devices."""
    return run_on(8, make_config({**SMALL, "parallel.fsdp": 8}), tmp_path_factory.mktemp("eight"))


def test_eight_devices_equal_one(on_eight, on_one, corpus_folder, tmp_path):
    assert_same_curve(on_eight, on_one)
    assert_same_answers(on_eight, on_one)
    # What eight devices saved, one device restores.
    evaluate.evaluate(str(on_eight), "cinc2016", str(corpus_folder / "source"), str(tmp_path / "scores.json"))
    restored, probabilities = answers(tmp_path / "scores.csv"), answers(on_eight / "predictions.csv")
    assert {id: restored[id] for id in probabilities} == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "pipeline"), itertools.product(LAYOUTS, ("resident", "stream")))
def test_every_layout_equals_one_device(layout, pipeline, on_one, make_config, run_on, tmp_path):
    run_on(8, make_config({**SMALL, **LAYOUTS[layout], "data.pipeline": pipeline}), tmp_path)
    assert_same_curve(tmp_path, on_one)
    assert_same_answers(tmp_path, on_one)


@pytest.mark.slow
def test_noise_goes_by_group_and_not_by_device(make_config, run_on, tmp_path):
    """Eight devices with one group each hear the noise that one device with eight groups hears."""
    noisy = {**SMALL, "features.noise_snr_db": 10.0, "train.epochs": 1}
    train(make_config({**noisy, "train.accumulate": 8}), tmp_path / "one")
    run_on(8, make_config({**noisy, "parallel.fsdp": 4}), tmp_path / "eight")
    loss, expected = (history(tmp_path / name)[0]["loss"] for name in ("eight", "one"))
    assert loss == pytest.approx(expected, rel=1e-4)
    assert_same_state(tmp_path / "eight", tmp_path / "one")


# What is random in a loss goes by group, so eight groups on one device are as eight devices; a normalisation over the
# batch goes over the groups that are computed at once, so that the CNN-LSTM is held to a whole batch. SSAMBA masks
# patches at random in evaluation too, there by device.
OTHERS = {
    "hinf_lstm": ({"train.accumulate": 1, "model.dropout": 0.0, "features.wavelet_level": 0, "loss.slope": 5.0,
                   "optimizer.learning_rate": 0.001}, 1e-3, ("train", "validation", "test")),
    "segmenter_small": ({"train.accumulate": 8}, 1e-3, ("train", "validation", "test")),
    "ssamba_pretrain": ({"train.accumulate": 8}, 1e-3, ("train",)),
    "mobilenet_v3": ({"train.accumulate": 1, "model.dropout": 0.0, "optimizer.learning_rate": 0.0003}, 1e-3,
                     ("train", "validation", "test")),
    "vit": ({"train.accumulate": 1, "model.dropout": 0.0}, 1e-3, ("train", "validation", "test")),
}  # fmt: skip


@pytest.fixture(scope="module")
def other_on_one(make_config, prepared_16k, tmp_path_factory):
    @functools.cache
    def made(name):
        workdir = tmp_path_factory.mktemp(name)
        train(other_config(make_config, prepared_16k, name), workdir)
        return workdir

    return made


def other_config(make_config, prepared_16k, name, **changes):
    changes |= {"data.prepared": str(prepared_16k)} if name == "ssamba_pretrain" else {}
    small = {"train.batch_recordings": 8, "train.epochs": 2, "train.checkpoint_steps": 100}
    return make_config({**small, **OTHERS[name][0], **changes}, name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_on_eight_devices(name, layout, other_on_one, make_config, prepared_16k, run_on, tmp_path):
    _, rel, splits = OTHERS[name]
    run_on(8, other_config(make_config, prepared_16k, name, **{"train.accumulate": 1}, **LAYOUTS[layout]), tmp_path)
    assert_same_curve(tmp_path, other_on_one(name), splits, rel)
    if name == "hinf_lstm":
        assert_same_answers(tmp_path, other_on_one(name), abs=1e-3)


# ------------------------------------------------------------------------------- going on where others left off


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_split_checkpoint_goes_on_elsewhere(devices, on_eight, on_one, make_config, run_on, tmp_path):
    """What eight devices saved in parts goes on on one, and on 2 x 2, as if nothing had happened."""
    elsewhere, expected = tmp_path / "elsewhere", tmp_path / "expected"
    shutil.copytree(on_eight, elsewhere)
    shutil.copytree(on_one, expected)
    longer = {**SMALL, "train.epochs": 4}
    train(make_config(longer), expected)
    if devices == 1:
        train(make_config(longer), elsewhere)
    else:
        run_on(devices, make_config({**longer, "parallel.fsdp": 2}), elsewhere)
    assert_same_curve(elsewhere, expected)
    assert_same_answers(elsewhere, expected)
    assert_same_state(elsewhere, expected)


# --------------------------------------------------------------------- what may change the memory and not the result


def state_of(workdir):
    """(step, the arrays) of the last checkpoint, whatever devices it was saved from."""
    folder = max((workdir / "checkpoints" / "last").iterdir(), key=lambda path: int(path.name))
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return int(folder.name), reader.restore(folder / "state", restore_args=as_numpy)


def assert_same_state(workdir, expected):
    (step, state), (other_step, other) = state_of(workdir), state_of(expected)
    assert step == other_step
    assert len(jax.tree.leaves(state)) >= 8
    # The optimizer's moments are sums of gradients: these are equal too.
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"train.accumulate": 4, "train.remat": "full"}, *(pytest.param(one, marks=pytest.mark.slow) for one in (
        {"train.accumulate": 4}, {"train.remat": "dots"}, {"train.remat": "full"}))],
    ids=str,
)  # fmt: skip
def test_portions_and_computing_again_change_nothing(changes, on_one, make_config, tmp_path):
    train(make_config({**SMALL, **changes}), tmp_path)
    assert_same_curve(tmp_path, on_one)
    assert_same_answers(tmp_path, on_one)
    assert_same_state(tmp_path, on_one)


@pytest.mark.slow
def test_remat_computes_again(make_config, tmp_path):
    flops = {}
    for remat in REMAT:
        facts = train(make_config({**SMALL, "train.remat": remat}), tmp_path / remat, dry_run=True)
        flops[remat] = facts["step"]["flops"]
    assert flops["none"] <= flops["dots"] < flops["full"]


BFLOAT16 = {"cnn": 1e-2, "hinf_lstm": 5e-2, "segmenter_small": 5e-2}  # how far probabilities may move


@pytest.mark.slow
@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16(name, make_config, on_one, tmp_path):
    small = SMALL if name == "cnn" else {"train.epochs": 3, "model.dropout": 0.0}
    make = lambda rounded: make_config({**small, "model.bfloat16": rounded}, name)
    exact, rounded = on_one, tmp_path / "bfloat16"
    if name != "cnn":
        exact = tmp_path / "float32"
        train(make(False), exact)
    train(make(True), rounded)
    lines, others = ([line for line in history(folder) if line["split"] == "train"] for folder in (rounded, exact))
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[0]["loss"] == pytest.approx(others[0]["loss"], rel=0.03)
    assert lines[0]["loss"] != others[0]["loss"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    kinds = {x.dtype for x in jax.tree.leaves(state_of(rounded)[1]) if x.dtype.kind not in "iub"}
    assert kinds == {np.dtype("float32")}  # bfloat16's kind is V
    if name != "segmenter_small":
        assert_same_answers(rounded, exact, abs=BFLOAT16[name])


# ------------------------------------------------------------------------------------------------ before a run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "hinf_lstm"])
def test_dry_run_for_64_devices(name, command, prepared, tmp_path):
    """The published models, on what a corpus of 3 s at 1000 Hz has room for."""
    fits = {
        "cnn": ["--config.features.window_s=2.5"],
        "hinf_lstm": ["--config.features.window_s=3.0", "--config.features.high_hz=400.0",
                      "--config.features.n_fft=1024", "--config.features.hop=256", "--config.split.kind=person",
                      "--config.stages.hinf_lstm.optimizer.frozen=()"],  # else some gradients need no sum
    }  # fmt: skip
    words = [sys.executable, "-m", "pcgjax.train", f"--config={ROOT}/configs/{name}.py", f"--workdir={tmp_path}"]
    words += [f"--config.data.prepared={prepared}", *fits[name]]
    words += ["--config.optimizer.name=adam", "--config.parallel.fsdp=8", "--config.train.batch_recordings=64"]
    words += ["--dry_run", "--devices=64"]
    done = subprocess.run(words, env=command("bench")[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "64 devices: data 8 x fsdp 8" in done.stdout
    facts = json.loads((tmp_path / "dry_run.json").read_text())
    assert facts["mesh"] == {"data": 8, "fsdp": 8, "devices": 64}
    for part in ("parameters", "optimizer"):
        assert 1 / 8 <= facts["state_bytes"][part]["share"] <= 1.1 / 8
    assert 0.99 <= facts["step"]["wire_over_minimum"] <= 1.1
    assert not facts["step"]["uncounted"]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices=64"], "--devices: for --dry_run alone"),
        (["--devices=64", "--dry_run", "--config.train.batch_recordings=96"],
         "train.batch_recordings=96 must be a multiple of the 64 groups"),
    ],
)  # fmt: skip
def test_devices_that_do_not_fit(flags, message, run_command, tmp_path):
    done = run_command("train", f"--workdir={tmp_path}", *flags)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert message in line


STATE = """
import json, runpy, sys
import jax
from pcgjax import tasks, thresholds
from pcgjax.runtime import costs, sharding
from pcgjax.tasks.base import initial_state
from pcgjax.training import optimizer
config = runpy.run_path(sys.argv[1])["get_config"]()
config.optimizer.name, config.parallel.fsdp = "adam", 8
task = tasks.make(config, 2000)
update = optimizer.make(config.optimizer, 100)
mesh = sharding.make_mesh(config.parallel)
init = lambda: initial_state(task, update, 0, thresholds.init(interval=0))
layout = sharding.state_sharding(mesh, jax.eval_shape(init))
state = jax.jit(init, out_shardings=layout)()
told = {}
for name in ("params", "opt_state"):
    part = getattr(state, name)
    held = [sum(s.data.nbytes for x in jax.tree.leaves(part) for s in x.addressable_shards if s.device == device)
            for device in jax.devices()]
    told[name] = [*costs.state_bytes(part), min(held), max(held)]
print(json.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", pytest.param("hinf_lstm", marks=pytest.mark.slow)])
def test_a_device_holds_its_part_of_the_state(name, run_python):
    done = run_python(STATE, str(ROOT / "configs" / f"{name}.py"), **EIGHT)
    assert done.returncode == 0, done.stderr[-3000:]
    for total, device, least, most in json.loads(done.stdout.splitlines()[-1]).values():
        assert device == least == most
        assert total / 8 <= device <= 1.1 * total / 8
        assert total > 2**20
