"""Training: it learns, resumes exactly, compiles once, refuses what does not fit."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcgjax import metrics, systems
from pcgjax.data import PrepareError, splits
from pcgjax.data.corpus import from_prepared
from pcgjax.data.plan import epoch_order
from pcgjax.data.shards import read_rows
from pcgjax.runs.config import load_config
from pcgjax.runs.data import load_data, shuffle_labels
from pcgjax.runs.results import PREDICTION_FIELDS
from pcgjax.runs.streams import ORDER
from pcgjax.runtime.checkpoint import CheckpointError
from pcgjax.training import loop
from pcgjax.training.experiment import balance_groups
from pcgjax.training.loop import train
from pcgjax.training.stages import is_the_papers, variants


def lines_of(workdir, without=("seconds", "waited", "check")):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in without} for line in lines]


def state_of(workdir, name):
    """(step, the arrays) of a checkpoint, read without knowing the model."""
    import orbax.checkpoint as ocp

    folder = max((workdir / "checkpoints" / name).iterdir(), key=lambda path: int(path.name))
    return int(folder.name), jax.tree.map(np.asarray, ocp.StandardCheckpointer().restore(folder / "state"))


def assert_same_run(one, other):
    """Bit for bit: parameters, optimizer, history and answers."""
    assert lines_of(one) == lines_of(other)
    for name in ("last", "best"):
        (step, state), (other_step, other_state) = state_of(one, name), state_of(other, name)
        assert step == other_step
        assert jax.tree.structure(state) == jax.tree.structure(other_state)
        assert len(jax.tree.leaves(state)) >= 8
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (one / "predictions.csv").read_text() == (other / "predictions.csv").read_text()


# ------------------------------------------------------------------------------------------------- what it writes


def test_it_learns(trained):
    history = [line for line in lines_of(trained) if line["split"] == "train"]
    assert [line["epoch"] for line in history] == list(range(1, 7))
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]


def test_what_a_run_writes(trained):
    written = {path.name for path in trained.iterdir()}
    assert written == {
        "checkpoints", "config.json", "examples.npz", "hashes.json", "metrics.json", "metrics.jsonl",
        "predictions.csv", "report.html", "run.json", "split.json", "tensorboard",
    }  # fmt: skip
    config = json.loads((trained / "config.json").read_text())
    assert config["model"] == {"filters": [4, 8], "kernel_size": 5, "hidden": 8, "bfloat16": False}
    split = json.loads((trained / "split.json").read_text())
    steps_an_epoch = -(-len(split["train"]) // 3)
    lines = lines_of(trained, without=())
    expected = [(steps_an_epoch * e, kind) for e in range(1, 7) for kind in ("train", "validation")]
    assert [(line["step"], line["split"]) for line in lines] == [*expected, (steps_an_epoch * 6, "test")]
    assert all({"loss", "accuracy", "epoch", "seconds"} <= line.keys() for line in lines if line["split"] == "train")
    assert all({"loss", "epoch", *metrics.METRICS} <= line.keys() for line in lines if line["split"] == "validation")

    with (trained / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == PREDICTION_FIELDS
    for part in ("validation", "test"):
        assert sorted(row["id"] for row in rows if row["split"] == part) == split[part]
    for row in rows:
        assert 0 <= float(row["probability"]) <= 1
        assert row["decision"] == str(int(float(row["probability"]) >= 0.5))

    results = json.loads((trained / "metrics.json").read_text())
    assert {"validation", "test", "best", "split", "data", "system"} <= results.keys()
    best = max((line["auc"], -line["epoch"]) for line in lines if line["split"] == "validation")
    assert results["best"]["score"] == best[0]
    assert results["best"]["epoch"] == -best[1]
    for part in ("validation", "test"):
        own = [row for row in rows if row["split"] == part]
        y, p = ([float(row[name]) for row in own] for name in ("label", "probability"))
        assert results[part]["overall"]["auc"]["value"] == pytest.approx(metrics.binary(y, p)["auc"], abs=1e-3)
    assert lines[-1]["auc"] == results["test"]["overall"]["auc"]["value"]
    assert results["data"]["pipeline"] == "resident"
    assert results["data"]["train_recordings"] == len(split["train"])
    assert results["system"]["devices"] == jax.device_count()
    assert "<svg" in (trained / "report.html").read_text()


def test_totals_of_an_epoch_are_those_of_its_steps(trained, make_config, tmp_path):
    # One checkpoint an epoch instead of one every two steps: the same numbers.
    train(make_config({"train.checkpoint_steps": 1000}), tmp_path)
    assert_same_run(trained, tmp_path)


# ------------------------------------------------------------------------------------------------------ resuming


def stop_in_mid_epoch(words, env, workdir, number, steps_an_epoch):
    """Starts a run and sends it signal `number` once a checkpoint from early in its second epoch is there."""
    wanted = [str(steps_an_epoch + step) for step in (1, 2, 3)]
    workdir.parent.mkdir(exist_ok=True)
    with (workdir.parent / f"{workdir.name}.txt").open("w") as log:
        process = subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 240
            folder = workdir / "checkpoints" / "last"
            while not any((folder / step).exists() for step in wanted):
                assert process.poll() is None, log.name
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(number)
            return process.wait(120)
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["resident", "stream"])
def test_killed_and_resumed_equals_uninterrupted(pipeline, command, make_config, trained, tmp_path):
    workdir = tmp_path / "run"
    words, env = command("train", f"--workdir={workdir}", f"--config.data.pipeline={pipeline}")
    steps_an_epoch = lines_of(trained)[0]["step"]
    assert stop_in_mid_epoch(words, env, workdir, signal.SIGKILL, steps_an_epoch) == -signal.SIGKILL
    stopped_at = max(int(p.name) for p in (workdir / "checkpoints" / "last").iterdir() if p.name.isdigit())
    assert steps_an_epoch < stopped_at < 6 * steps_an_epoch
    assert stopped_at % steps_an_epoch
    assert not (workdir / "metrics.json").exists()
    train(make_config({"data.pipeline": pipeline}), workdir)
    assert_same_run(workdir, trained)  # a streamed run is held to the resident one as well


def test_sigterm_saves_and_the_run_goes_on(command, make_config, trained, tmp_path):
    workdir = tmp_path / "run"
    words, env = command("train", f"--workdir={workdir}")
    steps_an_epoch = lines_of(trained)[0]["step"]
    assert stop_in_mid_epoch(words, env, workdir, signal.SIGTERM, steps_an_epoch) == 128 + signal.SIGTERM
    assert "stopped by signal 15 at step" in (workdir / "train.log").read_text()
    stopped_at = max(int(p.name) for p in (workdir / "checkpoints" / "last").iterdir())
    assert steps_an_epoch < stopped_at < 6 * steps_an_epoch
    train(make_config(), workdir)
    assert_same_run(workdir, trained)


def test_more_epochs_continue_a_finished_run(make_config, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    before = lines_of(workdir)
    train(make_config(), workdir)  # nothing left to do but to judge again
    assert_same_run(workdir, trained)
    train(make_config({"train.epochs": 8}), workdir)
    after = lines_of(workdir)
    assert after[:12] == before[:12]
    assert [(line["split"], line.get("epoch")) for line in after[12:]] == [
        ("train", 7), ("validation", 7), ("train", 8), ("validation", 8), ("test", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed=0, now 1"),
        ({"train.batch_recordings": 4}, "train.batch_recordings=3, now 4"),
        ({"split.kind": "person_kfold"}, "split.kind=person, now person_kfold"),
        ({"model.hidden": 9}, "model.hidden=8, now 9"),
        ({"features.overlap": 0.0}, "features.overlap=0.5, now 0.0"),
        ({"optimizer.name": "sgd"}, "optimizer.name=adam, now sgd"),
        ({"data.shuffle_labels": True}, "data.shuffle_labels=False, now True"),
    ],
)
def test_another_experiment_in_the_same_workdir(changes, named, make_config, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    with pytest.raises((CheckpointError, splits.SplitError), match=named):
        train(make_config(changes), workdir)
    assert lines_of(workdir) == lines_of(trained)


def test_other_split_in_the_same_workdir(make_config, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    split = json.loads((workdir / "split.json").read_text())
    split["train"], split["test"] = split["test"], split["train"]
    split.pop("sha256")
    (workdir / "split.json").write_text(json.dumps(split))
    with pytest.raises(CheckpointError, match=r"another order of data \(data or split"):
        train(make_config(), workdir)


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_checkpoint(damage, make_config, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for path in (workdir / "checkpoints" / "last").rglob("*"):
        if path.is_file() and "ocdbt" in str(path):
            path.write_bytes(path.read_bytes()[:40]) if damage == "cut" else path.unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints/last/\d+: damaged .* none before it is whole"):
        train(make_config(), workdir)


def test_half_written_checkpoint_is_passed_over(make_config, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    folder = workdir / "checkpoints" / "last"
    before = sorted(path.name for path in folder.iterdir())
    step = max(map(int, before))
    shutil.copytree(folder / str(step), folder / f"{step + 3}.orbax-checkpoint-tmp")
    (folder / f"{step + 3}.orbax-checkpoint-tmp" / "commit_success.txt").unlink(missing_ok=True)
    train(make_config(), workdir)
    assert sorted(path.name for path in folder.iterdir()) == before


# ----------------------------------------------------------------------------------------- numbers that go wrong


def test_loss_that_is_not_finite(make_config, prepared, tmp_path):
    config = make_config({"optimizer.name": "sgd", "optimizer.learning_rate": 1e30, "features.filter": "none"})
    with pytest.raises(FloatingPointError) as raised:
        train(config, tmp_path)
    text = str(raised.value)
    assert "optimizer.learning_rate=1e+30" in text
    step = int(text.split("at step ")[1].split(",")[0])
    # The recordings that it names are those of that step.
    _, parts, _ = load_data(config, tmp_path)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), ORDER), 0)
    ids = epoch_order(parts["train"], None, key, 3)[step].reshape(-1)
    _, rows = read_rows(prepared)
    assert f"recordings {', '.join(rows[i]['id'] for i in ids if i >= 0)};" in text
    assert not list((tmp_path / "checkpoints" / "last").glob("[0-9]*")) or step >= 2


# ------------------------------------------------------------------------------------------------------ compiling


@pytest.mark.parametrize("pipeline", ["resident", pytest.param("stream", marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_the_first_epoch(pipeline, make_config, tmp_path):
    log, lines = tmp_path / "metrics.jsonl", []

    def note(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":  # also where the cache on disk has it
            lines.append(len(log.read_text().splitlines()) if log.exists() else 0)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        train(make_config({"data.pipeline": pipeline, "features.filter": "none"}), tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    data = json.loads((tmp_path / "metrics.json").read_text())["data"]
    assert len(data["capacities"]) > 1  # several shapes took part
    assert 0 in lines  # the training program
    assert 1 in lines  # the validation program, after the first epoch's first line
    # The last epoch's second line is the twelfth; what judges the test part comes after it.
    assert not [count for count in lines if 2 <= count < 12]


# ------------------------------------------------------------------------------------------------ labels, balance


def test_shuffled_labels_keep_people_and_counts(prepared):
    _, rows = read_rows(prepared)
    dealt = shuffle_labels(rows, "abnormal", jax.random.key(0))
    assert [row["id"] for row in dealt] == [row["id"] for row in rows]
    label = {row["id"]: row["labels"]["abnormal"] for row in dealt}
    assert label != {row["id"]: row["labels"]["abnormal"] for row in rows}
    people = {}
    for row in rows:
        people.setdefault((row["database"], row["person"]), []).append(row)
    assert max(map(len, people.values())) > 1
    for database in {row["database"] for row in rows}:
        own = [members for (name, _), members in people.items() if name == database]
        assert all(len({label[row["id"]] for row in members}) == 1 for members in own)
        before = sorted(members[0]["labels"]["abnormal"] for members in own)
        assert sorted(label[members[0]["id"]] for members in own) == before
    again = shuffle_labels(rows, "abnormal", jax.random.key(0))
    assert again == dealt
    assert shuffle_labels(rows, "abnormal", jax.random.key(1)) != dealt


def test_shuffled_labels_leave_unlabelled_rows_alone():
    rows = [{"id": str(i), "person": str(i), "database": "d", "labels": {"abnormal": str(i % 2)}} for i in range(8)]
    rows.append({"id": "8", "person": "8", "database": "d", "labels": {"murmur": "1"}})
    assert shuffle_labels(rows, "abnormal", jax.random.key(0))[8] == rows[8]


def test_balance_groups(make_config, prepared):
    corpus = from_prepared(prepared)
    labels = corpus.labels("abnormal")
    indices = np.arange(len(labels))[::-1]
    assert balance_groups("none", corpus, labels, indices) is None
    assert list(balance_groups("class", corpus, labels, indices)) == [str(int(labels[i])) for i in indices]
    named = balance_groups("database_class", corpus, labels, indices)
    assert named[0] == f"{corpus.rows[indices[0]]['database']} {int(labels[indices[0]])}"
    assert len(set(named)) == 12  # six clinics, two classes


def test_balanced_training_runs(make_config, tmp_path):
    changes = {"train.balance": "class", "train.epochs": 1, "features.filter": "none"}
    results = train(make_config(changes), tmp_path)
    assert results["data"]["train_recordings"] == len(json.loads((tmp_path / "split.json").read_text())["train"])


# ----------------------------------------------------------------------------------------------------- bad input

BAD = [
    ({"data.prepared": ""}, "data.prepared is empty"),
    ({"data.prepared": "/no/such/folder"}, "/no/such/folder: no prepared data set"),
    ({"data.pipeline": "disk"}, "data.pipeline='disk': choose one of resident, stream, auto"),
    ({"split.kind": "random"}, "split.kind='random': choose one of person"),
    ({"split.kind": "leave_database_out", "split.database": "x"}, "no database 'x'"),
    ({"split.kind": "paper301"}, "this split tests on 150"),
    ({"split.kind": "person_kfold", "split.fold": 7}, "split.fold=7: must be below split.folds=5"),
    ({"split.fractions": (0.5, 0.5, 0.5)}, "fractions"),
    ({"task.name": "rnn"}, "task.name='rnn': choose one of cnn"),
    ({"task.target": "age"}, "no recording has the label 'age': .*nearest: abnormal"),
    ({"features.filter": "median"}, "features.filter='median': choose one of none, zero_phase, causal"),
    ({"features.overlap": 1.0}, r"features.overlap=1.0: must be at least 0 and below 1"),
    ({"features.overlap": -0.5}, r"features.overlap=-0.5"),
    ({"features.window_s": 0.001}, "features.window_s=0.001"),
    ({"features.window_s": -1.0}, "features.window_s=-1.0"),
    ({"features.window_s": 100.0}, r"features.window_s=100.0: longer than every recording of .* \(at most .* s\)"),
    ({"features.low_hz": 450.0}, "features.low_hz=450.0: must be below features.high_hz=400.0"),
    ({"features.high_hz": 500.0}, r"features.high_hz.*\(25.0, 500.0\) Hz does not fit a rate of 1000 Hz"),
    ({"features.low_hz": 0.0}, "features.low_hz=0.0: must be above 0"),
    ({"features.filter_order": 0}, "features.filter_order=0: must be at least 1"),
    ({"features.noise_snr_db": float("nan")}, "features.noise_snr_db=nan"),
    ({"model.kernel_size": 4}, "model.kernel_size=4: must be odd"),
    ({"model.filters": (4,)}, r"filters=\(4,\)"),
    ({"model.filters": (4, 0)}, r"filters=\(4, 0\)"),
    ({"model.hidden": 0}, "hidden=0"),
    ({"optimizer.name": "lion"}, "optimizer.name='lion': choose one of sgd, adam, adamw"),
    ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate=0.0: must be above 0"),
    ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate=-1.0"),
    ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
    ({"optimizer.name": "sgd", "optimizer.momentum": 1.5}, "optimizer.momentum=1.5"),
    ({"train.epochs": 0}, "train.epochs=0: must be at least 1"),
    ({"train.batch_recordings": 0}, "train.batch_recordings=0"),
    ({"train.checkpoint_steps": 0}, "train.checkpoint_steps=0"),
    ({"train.balance": "people"}, "train.balance='people': choose one of none, class, database_class"),
    ({"train.select": "auroc"}, "train.select='auroc': choose one of loss, "),
    ({"evaluation.batch_recordings": 0}, "evaluation.batch_recordings=0"),
    ({"evaluation.threshold": 2.0}, "evaluation.threshold=2.0"),
    ({"evaluation.resamples": 0}, "evaluation.resamples=0"),
    ({"parallel.strategy": "xmap"}, "parallel.strategy='xmap': choose one of jit, pmap"),
    ({"parallel.fsdp": 3}, "parallel.fsdp=3 does not divide"),
    ({"parallel.fsdp": 0}, "parallel.fsdp=0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_bad_config_names_the_field(changes, message, make_config, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(make_config(changes), tmp_path / "run")


def test_split_of_another_corpus(make_config, trained, tmp_path):
    split = json.loads((trained / "split.json").read_text())
    split["test"][0] = "x0001"
    split.pop("sha256")
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(splits.SplitError, match=r"1 recordings are not in this data set \(x0001"):
        train(make_config({"split.file": str(tmp_path / "split.json")}), tmp_path / "run")


def test_split_that_leaks(make_config, prepared, trained, tmp_path):
    split = json.loads((trained / "split.json").read_text())
    split["test"] = sorted({*split["test"], split["train"][0]})
    split.pop("sha256")
    (tmp_path / "split.json").write_text(json.dumps(split))
    config = make_config({"split.file": str(tmp_path / "split.json")})
    with pytest.raises(splits.LeakError, match=f"recording {split['train'][0]} is in train and in test"):
        train(config, tmp_path / "run")
    config.split.allow_leaks = True
    *_, checked = load_data(config, tmp_path / "run")
    assert checked["people_apart"] is False
    assert checked["leaks"]


def test_damaged_shard(make_config, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "prepared")
    shard = next((tmp_path / "prepared").glob("*.array_record"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(PrepareError, match=rf"{shard.name}: missing, cut or corrupt"):
        train(make_config({"data.prepared": str(tmp_path / "prepared")}), tmp_path / "run")


def test_damaged_history(make_config, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    (workdir / "hashes.json").unlink()  # it is there once a run has ended
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "spl')
    train(make_config(), workdir)  # a line that was being written when the disk was full
    assert_same_run(workdir, trained)
    (workdir / "hashes.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    (workdir / "metrics.jsonl").write_text("\n".join(["nonsense", *lines]))
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1: .*; remove that line"):
        train(make_config(), workdir)


# -------------------------------------------------------------------------------------------------- command line


def test_command_line_error_is_one_line(run_command, tmp_path):
    done = run_command("train", f"--workdir={tmp_path}", "--config.features.filter=median")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: features.filter='median': choose one of none, zero_phase, causal"]
    assert "Traceback" not in done.stderr


def test_help_explains_every_flag(run_command):
    done = run_command("train", "--help")
    for text in (
        "--config:",
        "A name of `pcgjax configs`, or",
        "--workdir:",
        "--[no]dry_run:",
        "Compile, print",
    ):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.epoch=3", "train has no part or field 'epoch'; nearest: epochs; it has "),
        ("--config.trian.epochs=3", "no part or field 'trian'"),
        ("--config=/no/such.py", "/no/such.py"),
    ],
)
def test_argument_that_does_not_exist(argument, message, run_command, tmp_path):
    done = run_command("train", f"--workdir={tmp_path}", argument)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("pipeline", ["resident", "stream"])
def test_dry_run(pipeline, make_config, tmp_path, capsys):
    facts = train(make_config({"features.filter": "none", "data.pipeline": pipeline}), tmp_path, dry_run=True)
    assert facts["parameters"] == 4 * 5 + 4 + 8 * 20 + 8 + 8 * (8 * 122 + 1) + 9
    assert facts["state_bytes"]["parameters"] == {"total": 32068, "device": 32068, "share": 1.0}
    assert facts["step"]["flops"] > 0
    assert facts["step"]["wire_bytes"] == facts["step"]["minimum_wire_bytes"] == 0
    assert json.loads((tmp_path / "dry_run.json").read_text()) == facts
    assert "1 devices: data 1 x fsdp 1" in capsys.readouterr().out
    assert not (tmp_path / "checkpoints").exists()


def test_a_sweep_does_not_drop_variants(make_config, tmp_path):
    config = make_config({"sweep.seed": "0,1"})
    with config.unlocked():
        config.variants = {"a": {"features": {"filter": "none"}}}
    with pytest.raises(ValueError, match="this config has variants"):
        systems.of(config.task.name).train(config, tmp_path, False)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_variants(make_config, tmp_path, capsys):
    config = make_config({"train.epochs": 1})
    with config.unlocked():
        config.variants = {"a": {"features": {"filter": "none"}}, "b": {"features": {"filter": "causal"}}}
    variants(config, tmp_path, dry_run=True)
    assert capsys.readouterr().out.count("1 devices: data 1 x fsdp 1") == 2
    assert not list(tmp_path.rglob("checkpoints"))
    rows = variants(config, tmp_path)
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in rows] == [row["name"] for row in table] == ["A", "B"]
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    assert "Lamperti" not in page
    for name, filter_ in (("a", "none"), ("b", "causal")):
        assert json.loads((tmp_path / name / "config.json").read_text())["features"]["filter"] == filter_
        scored = json.loads((tmp_path / name / "metrics.json").read_text())["test"]["overall"]["auc"]
        assert table["ab".index(name)]["metrics"]["auc"] == scored
    # Again: finished runs are judged, not trained; a changed config is refused.
    before = (tmp_path / "a" / "predictions.csv").read_text()
    variants(config, tmp_path)
    assert (tmp_path / "a" / "predictions.csv").read_text() == before
    assert len([line for line in lines_of(tmp_path / "a") if line["split"] == "train"]) == 1
    config.train.batch_recordings = 2
    with pytest.raises(CheckpointError, match=r"train.batch_recordings=3, now 2"):
        variants(config, tmp_path)


@pytest.mark.parametrize(("changes", "papers"), [
    ({}, True),
    ({"train.epochs": 12, "data.prepared": "x", "seed": 1, "optimizer.learning_rate": 0.1}, True),
    ({"model.hidden": 8}, False),
    ({"features.window_s": 5.0}, False),
    ({"task.target": "murmur"}, False),
    ({"data.shuffle_labels": True}, False),
    ({"task.name": "image"}, False),
    ({"variants.filter.features.filter": "none"}, False),
    ({"variants.filter.features.filter": "causal"}, False),
    ({"variants.filter.features.low_hz": 30.0}, False),
    ({"variants.no_filter_noise.features.noise_snr_db": float("inf")}, False),
    ({"variants.filter.features.filter_order": 2}, False),
])  # fmt: skip
def test_W10_the_papers_figures_are_beside_its_own_config_alone(changes, papers):
    config = load_config("cnn:sweep", {})
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(changes)
    assert is_the_papers(config) is papers


def test_nothing_crosses_to_or_from_the_devices_unasked(make_config, tmp_path, monkeypatch):
    """Training and validation under a transfer guard: what crosses is put or fetched by name."""
    train_epochs, guarded = loop.train_epochs, []

    def guard(*arguments):
        with jax.transfer_guard("disallow"):
            guarded.append(True)
            with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
                jnp.add(jnp.zeros(2), np.ones(2))  # the guard is on
            return train_epochs(*arguments)

    monkeypatch.setattr(loop, "train_epochs", guard)
    train(make_config(), tmp_path)
    assert guarded == [True]
