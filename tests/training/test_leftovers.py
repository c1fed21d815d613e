"""What lies in a folder from another run, or takes a file's place, is named and never taken for this run's own."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from pcgjax import evaluate, predict, sites, systems
from pcgjax.classical.run import load_classical
from pcgjax.data.prepare import prepare
from pcgjax.datasets import synthetic
from pcgjax.runs.results import read_population
from pcgjax.runs.seal import seal
from pcgjax.runtime import files, hashes
from pcgjax.runtime.files import CheckpointError, DamagedError
from pcgjax.training import population
from pcgjax.training.answers import load_model
from pcgjax.training.loop import train
from pcgjax.training.stages import stages
from tests.conftest import SMALL_HINF_LSTM


@pytest.fixture
def workdir(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def other_audio(tmp_path_factory):
    """The small corpus with the same people and labels, and other sounds."""
    folder = tmp_path_factory.mktemp("other")
    synthetic.write(folder / "source", people=24, recordings_per_person=2, duration_s=(3.0, 3.2), rate_hz=1000, seed=7)
    prepare("cinc2016", folder / "source", folder / "prepared", workers=1)
    return folder / "prepared"


@pytest.mark.parametrize(("changes", "why"), [
    ({}, "its labels are not shuffled"),
    ({"data.shuffle_labels": True, "optimizer.learning_rate": 0.5}, "its optimizer.learning_rate is 0.5, this run's"),
    ({"data.shuffle_labels": True, "data.prepared": "elsewhere"}, "it was trained on another prepared folder"),
    ({"data.shuffle_labels": True, "metrics": {}}, "its metrics.json has no test scores"),
    ({"data.shuffle_labels": True}, ""),
])  # fmt: skip
def test_a_control_of_another_run(workdir, make_config, caplog, changes, why):
    """Only the same run with shuffled labels counts as the control."""
    control = workdir / "control"
    shutil.copytree(workdir, control)
    (control / "hashes.json").unlink()
    config = json.loads((control / "config.json").read_text())
    for field, value in changes.items():
        part, _, name = field.partition(".")
        if name:
            config[part][name] = value
        else:
            (control / "metrics.json").write_text(json.dumps(value))
    (control / "config.json").write_text(json.dumps(config))
    results = train(make_config(), workdir)
    assert ("control" in results) == (not why)
    assert why in caplog.text
    assert ("no control of this run" in caplog.text) == bool(why)


def test_a_best_checkpoint_that_was_removed_or_exchanged(workdir, trained, make_config, tmp_path, caplog):
    best = workdir / "checkpoints" / "best"
    [last] = [int(path.name) for path in best.iterdir()]
    steps = [last - 4, last]
    shutil.copytree(best / str(last), best / str(steps[0]))
    seal(workdir)
    shutil.rmtree(best / str(last))
    load_model(workdir)
    assert f"best/{steps[-1]}: missing, it was the best model; that of step {steps[0]} is used" in caplog.text
    train(make_config({"seed": 1}), tmp_path / "other")
    config = (workdir / "config.json").read_text()
    shutil.rmtree(best)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "best", best)
    with pytest.raises(CheckpointError):
        load_model(workdir)
    # Of the same config, on other data: only the hashes tell.
    shutil.rmtree(best)
    shutil.copytree(trained / "checkpoints" / "best", best)
    listed = json.loads((workdir / "hashes.json").read_text())["files"]
    name = f"checkpoints/best/{steps[-1]}/meta/metadata"
    hashes._write(workdir, listed | {name: {"bytes": listed[name]["bytes"], "sha256": "0" * 64}})
    assert (workdir / "config.json").read_text() == config
    with pytest.raises(DamagedError, match="it is not the checkpoint that this run wrote"):
        load_model(workdir)


def test_a_population_whose_members_changed(make_config, tmp_path):
    """Members of other fields do not go on from a checkpoint, though config.json is gone."""
    small = {"train.epochs": 1, "data.pipeline": "resident"}

    def swept(seeds, changes):
        config = make_config(small | changes)
        config.sweep.seed = seeds
        return config

    population.train_population(swept("0,1", {}), tmp_path)
    for name in ("config.json", "hashes.json"):
        (tmp_path / name).unlink()
    for seeds, changes, message in (("4,5", {}, "seed=0, now 4"), ("0,1", {"optimizer.learning_rate": 0.1}, "now 0.1"),
                                    ("0", {}, "is of 2 members, now 1")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            population.train_population(swept(seeds, changes), tmp_path)
    population.train_population(swept("0,1", {}), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a population \(sweep: seed=0,1\)"):
        train(make_config(small), tmp_path)
    assert (tmp_path / "population.json").exists()
    with pytest.raises(CheckpointError, match=f"has no model itself; give one of the runs in it: {tmp_path}/best"):
        systems.load(tmp_path)
    saved = json.loads((tmp_path / "population.json").read_text()) | {"trivial": {"x": "y"}}
    (tmp_path / "hashes.json").unlink()
    (tmp_path / "population.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="trivial, x: need an object of scores"):
        read_population(tmp_path / "population.json")


def test_a_stage_that_was_trained_on_other_recordings(make_config, prepared, other_audio, tmp_path):
    shutil.copytree(prepared, tmp_path / "prepared")
    config = make_config(SMALL_HINF_LSTM | {"data.prepared": str(tmp_path / "prepared")}, "hinf_lstm")
    stages(config, tmp_path / "run")
    for name in ("checkpoints", "metrics.json", "hashes.json", "metrics.jsonl", "config.json"):  # stage 2 not begun
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(tmp_path / "prepared")
    shutil.copytree(other_audio, tmp_path / "prepared")
    with pytest.raises(CheckpointError, match=r"trained on other recordings than data.prepared holds now"):
        stages(config, tmp_path / "run")


def test_sites_of_other_recordings(workdir, other_audio):
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["prepared"] = str(other_audio)
    (workdir / "hashes.json").unlink()
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"trained on other recordings than data.prepared holds now"):
        sites.write(workdir)


def test_a_split_file_that_is_not_there(make_config, tmp_path, caplog):
    path = tmp_path / "no.json"
    train(make_config({"split.file": str(path), "train.epochs": 1}), tmp_path / "run", dry_run=True)
    assert f"split.file={path}: no such file; a split is made now and kept there" in caplog.text
    assert path.exists()


def test_a_classifier_of_another_run(tmp_path):
    meta = {"config": {"task": {"name": "classical"}, "seed": 1, "features": {"nfft": 8}}, "classifier": "knn",
            "target": "murmur", "sample_rate_hz": 1000}  # fmt: skip
    (tmp_path / "checkpoints").mkdir()

    def write(x):
        np.savez(tmp_path / "checkpoints" / "best.npz", features=x, labels=np.zeros(2), meta=np.array(json.dumps(meta)))

    write(np.zeros((2, 10)))
    (tmp_path / "config.json").write_text(json.dumps(meta["config"] | {"seed": 0}))
    with pytest.raises(CheckpointError, match=r"config.json says seed=0, checkpoints/best.npz 1: they are of two runs"):
        load_classical(tmp_path)
    (tmp_path / "config.json").unlink()
    for x in (np.zeros((2, 5)), np.full((2, 10), np.nan)):
        write(x)
        with pytest.raises(CheckpointError, match=r"best.npz: features \(2, .*\), need \(2, 10\) finite numbers"):
            load_classical(tmp_path)


# ---------------------------------------------------------------------------------- outputs that take a file's place


def test_outputs_that_would_replace_something_else(workdir, corpus_folder, tmp_path):
    wav = tmp_path / "a.wav"
    shutil.copy(next((corpus_folder / "source").rglob("*.wav")), wav)
    before = wav.read_bytes()
    for out, message in (
        (str(wav), "a recording; give a .csv or .json"), (str(tmp_path / "new.flac"), "a recording; give a .csv"),
        (str(workdir / "predictions.csv"), "a file of what lies in that folder"),
        ("/dev/null", "not a place for files"), (str(tmp_path), "a folder; give a file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            predict.predict(str(workdir), [str(wav)], out)
    assert wav.read_bytes() == before
    link = tmp_path / "list.csv"
    link.symlink_to(wav)
    with pytest.raises(ValueError, match="a recording"):
        predict.predict(str(workdir), [str(wav)], str(link))
    scores = ((tmp_path / "s.csv", "the scores are JSON"), (workdir / "metrics.json", "a file of what lies"))
    for out, message in scores:
        with pytest.raises(ValueError, match=message):
            evaluate.evaluate(str(workdir), "cinc2016", str(corpus_folder / "source"), str(out))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a device or a pipe"), files.replacing(tmp_path / "pipe"):
        pass
    assert not (tmp_path / "pipe").is_file()


@pytest.mark.parametrize(("words", "message"), [
    (["prepare", "--dataset=synthetic", "--source=s", "--out="], "error: --out=: is empty; give a file or a folder"),
    (["train", "--workdir="], "error: --workdir=: is empty; give a file or a folder"),
    (["prepare", "extra", "--dataset=synthetic", "--source=s", "--out=o"], "unexpected argument 'extra'"),
])  # fmt: skip
def test_words_that_mean_nothing(run_command, words, message):
    done = run_command(*words)
    assert done.returncode == 1
    assert message in done.stderr + done.stdout
