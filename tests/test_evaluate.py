"""A trained model on folders and files that it has not seen: evaluate and predict."""

from __future__ import annotations

import csv
import json
import os
import shutil

import numpy as np
import pytest
import soundfile
import soxr

from pcgjax import datasets, evaluate, metrics, predict, systems
from pcgjax.datasets import DatasetError, audio, synthetic
from pcgjax.runs.judge import PREDICTION_COLUMNS
from pcgjax.runs.results import PREDICTION_FIELDS
from pcgjax.runtime.checkpoint import CheckpointError


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def waves(corpus_folder):
    """Paths of the corpus's WAV files, by id."""
    recordings, _ = datasets.load("cinc2016", corpus_folder / "source")
    return {recording.id: recording.path for recording in recordings}


@pytest.fixture(scope="module")
def said(trained):
    """What training itself said of its test recordings, by id."""
    return {row["id"]: row for row in rows_of(trained / "predictions.csv") if row["split"] == "test"}


# ------------------------------------------------------------------------------------------------------- evaluate


def test_cinc2016_from_the_command_line(run_command, corpus_folder, trained, said, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(corpus_folder / "source", source)
    damaged = source / "training-a" / "a0001.wav"
    damaged.write_bytes(damaged.read_bytes()[:500])
    (source / "training-c" / "c0001.wav").write_bytes(b"no sound")
    out = tmp_path / "scores" / "cinc.json"
    done = run_command("evaluate", f"--workdir={trained}", "--dataset=cinc2016", f"--source={source}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    scores = json.loads(out.read_text())
    rows = rows_of(out.with_suffix(".csv"))
    recordings, _ = datasets.load("cinc2016", corpus_folder / "source")
    expected = {recording.id: recording for recording in recordings if recording.id not in ("a0001", "c0001")}

    assert [row["id"] for row in rows] == sorted(expected)
    assert tuple(rows[0]) == PREDICTION_COLUMNS == PREDICTION_FIELDS
    for row in rows:
        recording = expected[row["id"]]
        assert row["label"] == recording.labels["abnormal"]
        assert row["class"] == recording.labels["class"]
        assert (row["person"], row["database"], row["split"]) == (recording.person, recording.database, "cinc2016")
        assert row["decision"] == str(int(float(row["probability"]) >= 0.5))
    # The same files, prepared and judged while training, got the same answers.
    answers = {row["id"]: float(row["probability"]) for row in rows}
    assert {id: answers[id] for id in said if id in answers} == pytest.approx(
        {id: float(row["probability"]) for id, row in said.items() if id in answers}, abs=1e-5
    )
    assert np.std(list(answers.values())) > 0.01

    assert scores["recordings"] == len(rows)
    assert (scores["dataset"], scores["target"], scores["trained_on_target"]) == ("cinc2016", "abnormal", "abnormal")
    assert scores["without_label"] == 0
    assert {"overall", "per_database", "per_class", "report", "calibration", "trivial", "intervals"} <= scores.keys()
    assert set(scores["per_database"]) == {f"cinc2016-{letter}" for letter in "abcdef"}
    y, p = ([float(row[name]) for row in rows] for name in ("label", "probability"))
    for name, value in metrics.binary(y, p).items():
        if name in metrics.METRICS:
            assert scores["overall"][name]["value"] == pytest.approx(value, abs=1e-3)
    problems = {problem["path"].split("/")[-1]: problem["reason"] for problem in scores["problems"]}
    assert problems.keys() == {"a0001.wav", "c0001.wav"}
    assert problems["a0001.wav"].startswith("truncated")
    assert problems["c0001.wav"].startswith("not audio")
    assert "left out: " in done.stderr
    assert "AUC" in done.stdout
    assert "cinc2016-a" in done.stdout


def test_pascal_from_the_command_line(run_command, trained, tmp_path):
    synthetic.write(tmp_path / "pascal", layout="pascal", people=6, recordings_per_person=1, duration_s=(3.0, 3.1))
    out = tmp_path / "scores.json"
    done = run_command(
        "evaluate", f"--workdir={trained}", "--dataset=pascal", f"--source={tmp_path / 'pascal'}", f"--out={out}"
    )
    assert done.returncode == 0, done.stderr
    scores, rows = json.loads(out.read_text()), rows_of(out.with_suffix(".csv"))
    recordings, _ = datasets.load("pascal", tmp_path / "pascal")
    assert [row["id"] for row in rows] == [r.id for r in recordings if "abnormal" in r.labels]
    assert set(scores["per_database"]) == {"pascal-a", "pascal-b"}
    assert set(scores["per_class"]) == {row["class"] for row in rows}
    assert scores["problems"] == []


def test_another_target(corpus_folder, trained, tmp_path):
    source, out = tmp_path / "circor", tmp_path / "scores.json"
    synthetic.write(source, layout="circor", people=6, recordings_per_person=2, duration_s=(3.0, 3.1), seed=3)
    scores = evaluate.evaluate(str(trained), "circor", str(source), str(out), target="murmur")
    assert (scores["target"], scores["trained_on_target"]) == ("murmur", "abnormal")
    recordings, _ = datasets.load("circor", tmp_path / "circor")
    labelled = [r for r in recordings if "murmur" in r.labels]
    assert scores["recordings"] == len(labelled)
    assert scores["without_label"] == len(recordings) - len(labelled)
    assert [row["label"] for row in rows_of(tmp_path / "scores.csv")] == [r.labels["murmur"] for r in labelled]


def test_target_that_no_recording_has(corpus_folder, trained, tmp_path):
    with pytest.raises(DatasetError, match=r"source: no recording has the label 'murmur'; choose another --target"):
        evaluate.evaluate(
            str(trained), "cinc2016", str(corpus_folder / "source"), str(tmp_path / "scores.json"), target="murmur"
        )
    assert not (tmp_path / "scores.json").exists()


def test_no_file_can_be_decoded(corpus_folder, trained, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(corpus_folder / "source", source)
    for path in source.rglob("*.wav"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match=r"could be decoded|no usable"):
        evaluate.evaluate(str(trained), "cinc2016", str(source), str(tmp_path / "scores.json"))


def test_workdir_without_a_model(run_command, corpus_folder, waves, tmp_path):
    message = f"{tmp_path}/checkpoints/best: no checkpoint; --workdir takes a folder that pcgjax.train wrote"
    with pytest.raises(CheckpointError, match=message):
        evaluate.evaluate(str(tmp_path), "cinc2016", str(corpus_folder / "source"), str(tmp_path / "out.json"))
    done = run_command("predict", f"--workdir={tmp_path}", f"--out={tmp_path / 'out.csv'}", str(waves["a0001"]))
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {message}"


def test_damaged_model(trained, waves, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "best").rglob("*"):
        if path.is_file() and "ocdbt" in str(path):
            path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"checkpoints/best/\d+: damaged"):
        predict.predict(str(tmp_path / "run"), [str(waves["a0001"])], str(tmp_path / "out.csv"))


# -------------------------------------------------------------------------------------------------------- predict


def probabilities(rows):
    assert not any(row["error"] for row in rows), rows
    return [float(row["probability"]) for row in rows]


def test_predict_from_the_command_line(run_command, trained, waves, said, tmp_path):
    (tmp_path / "text.wav").write_text("not a sound")
    short = np.random.default_rng(0).standard_normal(300).astype(np.float32) / 10
    soundfile.write(tmp_path / "short.wav", short, 1000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(5000, np.float32), 1000)
    (tmp_path / "empty.wav").write_bytes(b"")
    good = sorted(said)[:3]
    paths = [tmp_path / "text.wav", waves[good[0]], tmp_path / "short.wav", tmp_path / "missing.wav", waves[good[1]],
             tmp_path / "silent.wav", tmp_path / "empty.wav", waves[good[2]]]  # fmt: skip
    out = tmp_path / "answers.csv"
    done = run_command("predict", f"--workdir={trained}", f"--out={out}", *map(str, paths))
    assert done.returncode == 1, done.stderr
    assert f"3 of 8 files answered; wrote {out}" in done.stdout
    rows = rows_of(out)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    kinds = ["not audio", None, "too short", "missing", None, "silent", "empty", None]
    for row, kind in zip(rows, kinds, strict=True):
        if kind is None:
            assert row["error"] == ""
        else:
            assert row["error"].startswith(kind)
            assert (row["probability"], row["decision"]) == ("", "")
    for row, id in zip((rows[1], rows[4], rows[7]), good, strict=True):
        assert float(row["probability"]) == pytest.approx(float(said[id]["probability"]), abs=1e-5)
        assert row["decision"] == said[id]["decision"]


def test_folders_patterns_and_lists(run_command, trained, waves, tmp_path):
    for name in ("in/a.wav", "in/deep/b.WAV", "in/.hidden.wav", "more/c.wav", "more/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(waves["b0001"], tmp_path / name)
    (tmp_path / "list").write_text(f"{waves['b0002']}\n\n{tmp_path}/more/c.wav\n")
    words = [str(tmp_path / name) for name in ("in", "more/*.wav", "no/*.wav", "more/d.txt")]
    paths = predict.named(words + predict.listed(str(tmp_path / "list")))
    names = [os.path.relpath(path, tmp_path) for path in paths]
    assert names[:5] == ["in/a.wav", "in/deep/b.WAV", "more/c.wav", "no/*.wav", "more/d.txt"]
    assert paths[5:] == [str(waves["b0002"]), str(tmp_path / "more" / "c.wav")]
    with pytest.raises(ValueError, match=r"--files_from=no: missing: no such file; give a file with a name a line"):
        predict.listed("no")
    out = tmp_path / "o.json"
    done = run_command("predict", f"--workdir={trained}", f"--out={out}", str(tmp_path / "in"), str(tmp_path / "more"))
    assert (done.returncode, done.stdout) == (0, f"3 of 3 files answered; wrote {out}\n"), done.stderr
    rows = json.loads(out.read_text())
    assert len({row["probability"] for row in rows}) == 1
    assert rows[0].keys() == {"path", "probability", "decision", "error", "notes"}


def test_the_same_sound_in_other_files(trained, waves, tmp_path):
    samples, rate_hz, _ = audio.read(waves["b0001"])
    other, _, _ = audio.read(waves["b0002"])
    assert rate_hz == 1000
    stereo = np.stack([samples, np.resize(other, len(samples))], axis=1)
    files = [waves["b0001"]]
    for name, data, rate, subtype in (
        ("float.wav", samples, 1000, "FLOAT"),
        ("24.wav", samples, 1000, "PCM_24"),
        ("plain.flac", samples, 1000, "PCM_16"),
        ("stereo.wav", stereo, 1000, "PCM_16"),
        ("quiet.wav", samples * 0.05, 1000, "FLOAT"),
        ("4000.wav", soxr.resample(samples, 1000, 4000), 4000, "FLOAT"),
        ("44100.flac", soxr.resample(samples, 1000, 44100), 44100, "PCM_24"),
    ):
        soundfile.write(tmp_path / name, np.clip(data, -1, 1), rate, subtype=subtype)
        files.append(tmp_path / name)
    files.append(waves["b0002"])
    rows = predict.predict(str(trained), list(map(str, files)), str(tmp_path / "o.csv"))
    first, *same, different = probabilities(rows)
    assert same == pytest.approx([first] * len(same), abs=1e-3)
    assert different != pytest.approx(first, abs=2e-3)


def test_answers_do_not_depend_on_the_other_files(trained, waves, tmp_path):
    long = np.concatenate([audio.read(path)[0] for path in waves.values()])
    soundfile.write(tmp_path / "long.wav", long, 1000)
    soundfile.write(tmp_path / "brief.wav", long[:600], 1000)
    names = [str(waves["b0001"]), str(tmp_path / "long.wav"), str(tmp_path / "brief.wav"), str(waves["e00001"])]
    together = probabilities(predict.predict(str(trained), names, str(tmp_path / "o.csv")))
    backwards = probabilities(predict.predict(str(trained), names[::-1] + names[:1], str(tmp_path / "o.csv")))
    alone = [probabilities(predict.predict(str(trained), [name], str(tmp_path / "o.csv")))[0] for name in names[2:]]
    assert backwards == pytest.approx([*together[::-1], together[0]], abs=1e-5)
    assert alone == pytest.approx(together[2:], abs=1e-5)
    assert len(set(together)) == 4


def test_nothing_can_be_answered(trained, tmp_path):
    rows = predict.predict(str(trained), [str(tmp_path / "missing.wav"), str(tmp_path)], str(tmp_path / "o.csv"))
    assert [row["error"].split(":")[0] for row in rows] == ["missing", "missing"]
    assert len(rows_of(tmp_path / "o.csv")) == 2


def test_W7_R3_one_file_that_no_model_can_answer_among_good_ones(trained, trained_segmenter, waves, tmp_path):
    samples, rate_hz, _ = audio.read(waves["b0001"])
    odd = tmp_path / os.fsdecode(b"n\xe9.wav")
    shutil.copy(waves["b0002"], odd)
    soundfile.write(tmp_path / "loud.wav", samples * 1e30, rate_hz, subtype="FLOAT")
    soundfile.write(tmp_path / "stereo.wav", np.stack([samples, samples], 1), rate_hz)
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "empty").mkdir()
    (tmp_path / "itself.wav").symlink_to("itself.wav")
    names = ("loud.wav", "stereo.wav", "pipe.wav", "itself.wav", odd.name, "x" * 300 + ".wav", "*.flac", "empty/")
    paths = [str(waves["b0001"]), *(str(tmp_path / name) for name in names)]
    for workdir in (trained, trained_segmenter):
        out = tmp_path / "out" / "answers.csv"
        predict.predict(str(workdir), paths, str(out))
        rows = rows_of(out)
        kinds = [row["error"].split(":")[0] for row in rows]
        assert kinds == ["", "too loud", "", "unreadable", "unreadable", "", "unreadable", "missing", "missing"]
        assert rows[2]["notes"] == "channels: the first of 2 is read"
        assert [row["notes"] for row in rows if row is not rows[2]] == [""] * 8
        assert rows[5]["path"] == str(tmp_path / "n\\xe9.wav")
        assert rows[7]["error"] == "missing: no such file fits this pattern"
        assert rows[8]["error"] == "missing: no .wav or .flac file below this folder"
    assert os.fsdecode(b"n\xe9.tsv") in os.listdir(out.parent)
    with pytest.raises(ValueError, match=r"--out=.*: a folder; give a file"):
        predict.predict(str(trained), paths[:1], str(tmp_path))


def test_W7_an_answer_that_is_not_finite(trained, trained_segmenter, waves, corpus_folder, tmp_path, monkeypatch):
    def broken(workdir):
        model = load(workdir)
        if model.segmenter is not None:
            whole = model.segmenter.whole
            model.segmenter.whole = lambda *arguments: whole(*arguments) * np.nan
            return model
        return model._replace(answer=lambda corpus: np.full((len(corpus.rows), 2), np.nan))

    load = systems.load
    monkeypatch.setattr(systems, "load", broken)
    source, out = str(corpus_folder / "source"), str(tmp_path / "o.json")
    for workdir, error in ((trained, datasets.DatasetError), (trained_segmenter, FloatingPointError)):
        rows = predict.predict(str(workdir), [str(waves["b0001"])], str(tmp_path / "o.csv"))
        assert [row["error"] for row in rows] == ["the model's answer is not finite"]
        with pytest.raises(error, match="the model's answer is not finite"):
            evaluate.evaluate(str(workdir), "cinc2016", source, out)


def test_notes_in_what_evaluate_leaves(trained, corpus_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(corpus_folder / "source", source)
    path = source / "training-a" / "a0001.wav"
    samples, rate_hz, _ = audio.read(path)
    soundfile.write(path, np.stack([samples, samples], 1), rate_hz)
    scores = evaluate.evaluate(str(trained), "cinc2016", str(source), str(tmp_path / "o.json"))
    assert scores["problems"] == [{"path": str(path), "reason": "channels: the first of 2 is read", "note": True}]
    assert "a0001" in {row["id"] for row in rows_of(tmp_path / "o.csv")}
