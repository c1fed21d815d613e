"""Populations: a member is the run alone, on one device or several; resuming, members that diverge, what is written."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import signal
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from pcgjax.runs.config import one_of, plain_config, with_fields
from pcgjax.runtime import goodput
from pcgjax.runtime.checkpoint import CheckpointError
from pcgjax.training import population
from pcgjax.training.answers import load_model
from pcgjax.training.loop import train
from pcgjax.training.member_loop import train_program
from pcgjax.training.members import Program
from pcgjax.training.sweep import TRACED, programs, swept_values

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Every recording has as many windows as the others, so that there is one shape to compile.
QUICK = {"train.epochs": 2, "train.batch_recordings": 8, "train.checkpoint_steps": 2, "features.window_s": 1.0,
         "features.filter": "none"}  # fmt: skip
SWEEP = {"seed": "0,1", "optimizer.learning_rate": "0.003,1e30"}


def swept(make_config, sweep, changes=None, name="cnn"):
    config = make_config({**(QUICK if name == "cnn" else {}), **(changes or {})}, name)
    config.update_from_flattened_dict({f"sweep.{field}": values for field, values in sweep.items()})
    return config


def lines_of(workdir, member=None):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    left_out = ("seconds", "waited", "member", "check")
    of = [line for line in lines if line["split"] != "test" and member in (None, line.get("member"))]
    return [{k: v for k, v in line.items() if k not in left_out} for line in of]


def alone(config, found, number, workdir, population_dir):
    """The run of one member's config, in a folder of its own."""
    fields = found["members"][number]["fields"] | {"split.file": str(population_dir / "split.json")}
    train(with_fields(config, fields), workdir)


def assert_close(workdir, member, other, **tolerance):
    ours, theirs = lines_of(workdir, member), lines_of(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, two in zip(ours, theirs, strict=True):
        for name in ("loss", "accuracy"):
            np.testing.assert_allclose(one[name], two[name], **tolerance)


def same_population(workdir, finished):
    """SWEEP's, trained elsewhere."""
    ours, theirs = (json.loads((w / "population.json").read_text()) for w in (workdir, finished))
    assert ours["selected"] == theirs["selected"]
    for one, two in zip(ours["members"], theirs["members"], strict=True):
        assert one["fields"] == two["fields"]
        assert ("diverged" in one) == ("diverged" in two)
        if "diverged" not in one:
            np.testing.assert_allclose(one["curve"]["loss"], two["curve"]["loss"], rtol=1e-5)
            assert one["test"]["auc"] == pytest.approx(two["test"]["auc"], abs=1e-6)
    return ours


@pytest.fixture(scope="module")
def finished(make_config, run_command, tmp_path_factory):
    """The workdir of SWEEP, trained by the command: two seeds that learn, and two members that diverge."""
    workdir = tmp_path_factory.mktemp("population")
    flags = [f"--config.{name}={value}" for name, value in QUICK.items()]
    flags += [f"--config.sweep.{field}={values}" for field, values in SWEEP.items()]
    done = run_command("train", f"--workdir={workdir}", *flags)
    assert done.returncode == 0, done.stderr
    (workdir / "told.txt").write_text(done.stdout)
    return workdir


def test_what_a_population_writes(finished):
    found = json.loads((finished / "population.json").read_text())
    assert [m["fields"] for m in found["members"]] == [
        {"optimizer.learning_rate": rate, "seed": seed} for rate in (0.003, 1e30) for seed in (0, 1)
    ]
    good, bad = found["members"][:2], found["members"][2:]
    for member in good:
        assert len(member["curve"]["loss"]) == len(member["curve"]["validation"]) == 2
        assert member["best"]["score"] == member["validation"]["auc"] == max(member["curve"]["validation"])
    assert all(m["diverged"] >= 1 and m["test"] == {} for m in bad)
    scores = [m["best"]["score"] for m in good]
    assert found["selected"] == int(np.argmax(scores))
    tested = [m["test"]["auc"] for m in good]
    assert found["summary"]["auc"]["n"] == 2
    assert found["summary"]["auc"]["mean"] == pytest.approx(np.mean(tested))
    assert found["summary"]["auc"]["deviation"] == pytest.approx(np.std(tested, ddof=1))

    with (finished / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["best_by_validation"] for row in rows].index("1") == found["selected"]
    assert [bool(row["diverged_at_step"]) for row in rows] == [False, False, True, True]
    assert float(rows[0]["test_auc"]) == tested[0]
    told = (finished / "told.txt").read_text()
    assert "mean of 2" in told
    assert told.count("diverged at step") == 2
    assert "4 members" in (finished / "report.html").read_text()
    assert "sweep" not in json.loads((finished / "best" / "config.json").read_text())
    # Four runs to TensorBoard.
    assert sorted(path.name for path in (finished / "tensorboard").iterdir()) == [f"member{i}" for i in range(4)]


def test_a_member_is_the_run_alone(finished, make_config, tmp_path):
    config = swept(make_config, SWEEP)
    found = json.loads((finished / "population.json").read_text())
    alone(config, found, found["selected"], tmp_path, finished)
    # One after the other on a CPU, with batches of the same capacities: bit for bit.
    assert lines_of(finished, found["selected"]) == lines_of(tmp_path)
    assert (finished / "best" / "predictions.csv").read_text() == (tmp_path / "predictions.csv").read_text()
    ours, theirs = (load_model(workdir) for workdir in (finished / "best", tmp_path))
    for one, two in zip(jax.tree.leaves(ours[3]), jax.tree.leaves(theirs[3]), strict=True):
        np.testing.assert_array_equal(one, two)
    ours, theirs = (json.loads((w / "metrics.json").read_text()) for w in (finished / "best", tmp_path))
    assert ours["test"] == theirs["test"]


@pytest.mark.slow
def test_members_as_one_batch(finished, make_config, tmp_path):
    """As on an accelerator: each step at the capacity of the member that needs the most."""
    config = swept(make_config, {})
    base = one_of(config, {}, str(finished / "split.json"))
    members = [m["fields"] for m in json.loads((finished / "population.json").read_text())["members"]]
    program = Program(base, members, tmp_path, together=True)
    done = train_program(program, range(4), tmp_path / "checkpoints", tmp_path, goodput.Clock())
    assert [step is None for step in done.diverged] == [True, True, False, False]
    for member in (0, 1):
        for one, two in zip(lines_of(tmp_path, member), lines_of(finished, member), strict=True):
            np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-4)


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted(finished, make_config, tmp_path):
    config, folder = swept(make_config, SWEEP), tmp_path / "checkpoints" / "program0"

    def stop():
        deadline = time.monotonic() + 240
        while not (folder / "2").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("came after training"))
    try:
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(SystemExit) as stopped:
            population.train_population(config, tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "population.json").exists()
    found = population.train_population(config, tmp_path)
    for member in range(4):
        assert lines_of(tmp_path, member) == lines_of(finished, member)
    assert (tmp_path / "best" / "predictions.csv").read_text() == (finished / "best" / "predictions.csv").read_text()
    uninterrupted = json.loads((finished / "population.json").read_text())
    assert json.loads(json.dumps(found["members"])) == uninterrupted["members"]

    with pytest.raises(CheckpointError, match=r"trained with sweep=.*seed=0,1, now .*seed=0,2"):
        population.train_population(swept(make_config, SWEEP | {"seed": "0,2"}), tmp_path)


@pytest.mark.parametrize(
    ("sweep", "changes", "message"),
    [
        ({"seed": "0,x"}, {}, "sweep.seed=0,x: give values such as 0"),
        ({"seed": "1,1"}, {}, "sweep.seed=1,1: the same value twice"),
        ({"optimizer.learning_rate": "0.1,-1"}, {}, "optimizer.learning_rate=-1.0: must be above 0"),
        ({"seed": "0,1"}, {"data.pipeline": "stream"}, "data.pipeline=stream: members with seeds of their own"),
        ({"seed": "0,1"}, {"parallel.strategy": "pmap"}, "parallel.strategy=pmap: a member"),
        ({"seed": "0,1"}, {"profile.steps": 1}, "profile.steps=1"),
    ],
)
def test_what_it_refuses(sweep, changes, message, make_config, tmp_path):
    with pytest.raises(ValueError, match=message):
        population.train_population(swept(make_config, sweep, changes), tmp_path)


def test_what_is_asked_for(make_config):
    assert swept_values(make_config()) == {}
    asked = swept_values(
        swept(make_config, {"seed": "0, 7", "model.filters": "(4, 8), (8, 16)", "features.filter": "none,causal",
                            "features.noise_snr_db": "inf,10", "model.bfloat16": "false,true"})
    )  # fmt: skip
    assert asked == {
        "features.filter": ["none", "causal"], "features.noise_snr_db": [np.inf, 10.0],
        "model.bfloat16": [False, True], "model.filters": [(4, 8), (8, 16)], "seed": [0, 7],
    }  # fmt: skip


def test_members_of_one_program():
    """Numbers that change no shape go together, and what is off has a program of its own."""
    members = [
        {"seed": seed, "model.hidden": hidden, "features.noise_snr_db": snr}
        for hidden in (4, 8)
        for snr in (np.inf, 5.0, 10.0)
        for seed in (0, 1)
    ]
    assert programs(members) == [[0, 1], [2, 3, 4, 5], [6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("name", "changes", "numbers"),
    [
        ("cnn", {"optimizer.name": "sgd"}, {"features.noise_snr_db": 5.0, "optimizer.momentum": 0.5}),
        pytest.param(
            "hinf_lstm", {"optimizer.name": "sgd"},
            {"features.top_db": 60.0, "loss.alpha": 0.5, "loss.slope": 10.0, "model.dropout": 0.2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "segmenter_small", {},
            {"features.response_db": 3.0, "features.stretch": 0.1, "model.dropout": 0.2, "optimizer.clip_norm": 0.5,
             "optimizer.learning_rate": 0.01, "optimizer.weight_decay": 0.1},
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_every_traced_field_can_be(name, changes, numbers, make_config, tmp_path):
    config = one_of(make_config(changes, name), {}, str(tmp_path / "split.json"))
    twice = [numbers, {field: value * 0.9 for field, value in numbers.items()}]
    assert programs(twice) == [[0, 1]]
    assert set(numbers) <= set(TRACED)
    program = Program(config, twice, tmp_path, together=True)
    states, totals = program.first_states(), program.no_totals()
    (_, shared), *_ = program.pieces(program.experiment.resident(), 0, 1)
    shared = jax.tree.map(jnp.asarray, shared)

    def after(fields):
        state, _ = program._steps({"state": first(states), "totals": first(totals), **shared, "fields": fields})
        return state.params

    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    jaxpr = jax.make_jaxpr(after)({field: jnp.float32(value) for field, value in numbers.items()})
    used = {str(v) for eqn in jaxpr.jaxpr.eqns for v in eqn.invars}
    assert all(str(v) in used for v in jaxpr.jaxpr.invars)  # none is read as if it were fixed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sweep", "changes"),
    [
        ("hinf_lstm", {"seed": "0,1", "model.dropout": "0.1,0.3", "loss.alpha": "0.6,0.87"}, {}),
        ("segmenter_small", {"seed": "0,1", "features.stretch": "0.1,0.2"}, {}),
        ("cnn", {"features.noise_snr_db": "5,10"}, {"data.pipeline": "stream"}),
        ("mobilenet_v3", {"seed": "0,1", "optimizer.learning_rate": "0.001,0.003"}, {}),
    ],
)
def test_members_of_other_models(name, sweep, changes, make_config, tmp_path):
    config = swept(make_config, sweep, changes | {"train.epochs": 2}, name)
    if "stages" in config:
        with config.unlocked():
            config.stages = ml_collections.ConfigDict()
    found = population.train_population(config, tmp_path / "all")
    last = len(found["members"]) - 1
    alone(config, found, last, tmp_path / "alone", tmp_path / "all")
    assert_close(tmp_path / "all", last, tmp_path / "alone", rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segmenter", "ssamba_pretrain"])
def test_members_with_ssamba(name, make_config, prepared_16k, tmp_path):
    changes = {"data.prepared": str(prepared_16k), "train.epochs": 1}
    config = swept(make_config, {"seed": "0,1", "optimizer.learning_rate": "0.001,0.003"}, changes, name)
    found = population.train_population(config, tmp_path / "all")
    alone(config, found, 3, tmp_path / "alone", tmp_path / "all")
    assert_close(tmp_path / "all", 3, tmp_path / "alone", rtol=1e-4)


@pytest.mark.slow
def test_stages(make_config, tmp_path):
    """Each member's last stage starts from its own first one."""
    config = swept(make_config, {"seed": "0,1"}, {"train.epochs": 1}, "hinf_lstm")
    found = population.train_population(config, tmp_path)
    number = found["selected"]
    before = load_model(tmp_path / "cnn_lstm" / "members" / str(number))
    after = load_model(tmp_path / "best")
    assert before[0].seed == after[0].seed == number
    for one, two in zip(jax.tree.leaves(before[3]["cnn"]), jax.tree.leaves(after[3]["cnn"]), strict=True):
        np.testing.assert_array_equal(one, two)
    one, two = (m["curve"]["loss"] for m in found["members"])
    assert one != two


def test_dry_run_says_what_a_device_would_hold(make_config, tmp_path, capsys):
    assert (
        population.train_population(swept(make_config, SWEEP | {"model.hidden": "8,16"}), tmp_path, dry_run=True) == {}
    )
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "sweep: 8 members, in programs of 4, 4"
    sizes = (line.split()[2:4] for line in said if line.startswith("  all members"))
    small, large = (float(number) * {"KiB": 2**10, "MiB": 2**20}[unit] for number, unit in sizes)
    assert 0 < small < large
    assert sum(line.startswith("4 members, 4 on each of 1 devices") for line in said) == 2
    assert sum("temporaries are" in line for line in said) == sum("H100 SXM" in line for line in said) == 2
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_members_in_two_processes(finished, command, tmp_path):
    """Each process has two of the four members, and both write one checkpoint."""
    flags = [f"--config.{name}={value}" for name, value in QUICK.items()]
    flags += [f"--config.sweep.{field}={values}" for field, values in SWEEP.items()]
    words, env = command("train", f"--workdir={tmp_path}", *flags)
    cluster = ["bash", str(ROOT / "launch" / "local_cluster.sh"), "2"]
    done = subprocess.run([*cluster, *words], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert same_population(tmp_path, finished)["system"]["processes"] == 2


@pytest.mark.slow
def test_members_on_several_devices(finished, run_command, tmp_path):
    """Four members on three devices, of which the last has one twice."""
    flags = [f"--config.{name}={value}" for name, value in QUICK.items()]
    flags += [f"--config.sweep.{field}={values}" for field, values in SWEEP.items()]
    done = run_command("train", f"--workdir={tmp_path}", *flags, XLA_FLAGS="--xla_force_host_platform_device_count=3")
    assert done.returncode == 0, done.stderr
    assert same_population(tmp_path, finished)["system"]["devices"] == 3


def test_no_skeleton_in_a_lone_run(make_config):
    assert "sweep" not in plain_config(make_config())
