"""The segmenter on whole recordings: windows, streaming, training, judging and the files that it writes."""

from __future__ import annotations

import csv
import itertools
import json
import pathlib
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx
from test_train import assert_same_run, lines_of

from pcgjax import datasets, evaluate, predict, prepare, tasks
from pcgjax.data import splits
from pcgjax.data.corpus import from_prepared
from pcgjax.data.shards import read_rows
from pcgjax.datasets import audio, synthetic
from pcgjax.datasets.annotations import read_annotations
from pcgjax.pages.terminal import run_summary
from pcgjax.runs.data import kept_share
from pcgjax.runtime import checkpoint
from pcgjax.runtime.checkpoint import CheckpointError
from pcgjax.segmentation.decoding import durations, viterbi
from pcgjax.segmentation.scores import segmentation_summary
from pcgjax.segmentation.states import frame_states, read_tsv, state_spans, target_frames
from pcgjax.tasks import segmenter_model
from pcgjax.tasks.base import split_model
from pcgjax.tasks.frames import frame_features
from pcgjax.training.answers import load_segmenter
from pcgjax.training.experiment import set_up
from pcgjax.training.loop import train

RATE_HZ = 1000
CYCLE = [(0.1, 1), (0.2, 2), (0.1, 3), (0.4, 4)]  # seconds, state


def beats(cycles=6):
    spans, at = [], 0.0
    for seconds, state in CYCLE * cycles:
        spans.append((round(at, 3), round(at + seconds, 3), state))
        at += seconds
    return spans


@pytest.fixture(scope="module")
def make_model(make_config):
    """make_model({"model.bidirectional": False}): an untrained segment.Model of SMALL_SEGMENTER at 1000 Hz."""

    def make(changes: dict | None = None) -> segmenter_model.SegmenterModel:
        config = make_config(changes, "segmenter_small")
        graphdef, params, rest = split_model(tasks.make(config, RATE_HZ).init(nnx.Rngs(3)))
        log_duration = durations([beats()], config.features.step_s)
        return segmenter_model.SegmenterModel(config, graphdef, params, rest, RATE_HZ, log_duration)

    return make


@pytest.fixture(scope="module")
def both_ways(make_model):
    return make_model()


@pytest.fixture(scope="module")
def causal(make_model):
    return make_model({"model.bidirectional": False})


@pytest.fixture(scope="module")
def waves(corpus_folder):
    """Recordings of the corpus, by id."""
    return {recording.id: recording for recording in datasets.load("cinc2016", corpus_folder / "source")[0]}


def noise(length, seed=0):
    return np.random.default_rng(seed).standard_normal(length).astype(np.float32) / 10


def in_pieces(samples, sizes):
    begin = 0
    while begin < len(samples):
        for size in sizes:
            if begin < len(samples):
                yield samples[begin : begin + size]
            begin += size


def frame_count(length, hop):
    return int((np.arange(length // hop + 2) * hop + hop // 2 < length).sum())


def direct(model, samples, total):
    """One pass over all of a recording, and zeros up to `total` frames, without windows or state."""
    padded = np.zeros((1, total * model.hop + 2 * model.halo), np.float32)
    own = samples[: padded.shape[1] - model.halo]
    padded[0, model.halo : model.halo + len(own)] = own
    real = np.arange(total)[None] < frame_count(len(samples), model.hop)
    graphdef, params, rest = split_model(tasks.make(model.config, RATE_HZ).init(nnx.Rngs(3)))

    @jax.jit
    def logits(params):
        x, _ = frame_features(model.config, jnp.asarray(padded), jnp.asarray(real), RATE_HZ)
        return nnx.merge(graphdef, params, rest)(x)

    return np.asarray(jax.nn.log_softmax(logits(params)))[0, : real.sum()]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("window_s", [0.02, 0.06, 1.0, 4.0])
def test_every_frame_is_kept_once_and_in_order(window_s, make_model):
    model = make_model({"features.window_s": window_s})
    size, hop, halo = model.frames, model.hop, model.halo
    window = size * hop
    lengths = {1, 9, 11, hop, window // 3, window - 1, window, window + 1, window + hop, 2 * window, 5 * window + 7}
    for length in sorted(lengths | {window * 3 - window // 2}):
        samples = np.arange(1, length + 1, dtype=np.float32)
        around = np.concatenate([np.zeros(halo, np.float32), samples, np.zeros(2 * window + 2 * halo, np.float32)])
        kept: list[int] = []
        lasts = []
        for cut, frames, keep, last in model._windows([samples]):
            assert len(cut) == window + 2 * halo
            assert 0 <= keep.start <= keep.stop <= frames <= size
            if length >= window:
                assert frames == size  # none but a short recording's only window has padding
            # Ends of a recording aside, what is kept lies within the margins.
            first = int(cut[halo : halo + 1][0] - 1) // hop if length > 0 else 0
            np.testing.assert_array_equal(cut, around[first * hop : first * hop + len(cut)])
            kept += range(first + keep.start, first + keep.stop)
            lasts.append(last)
        assert kept == list(range(frame_count(length, hop)))
        assert lasts == [False] * (len(lasts) - 1) + [True]


@pytest.mark.parametrize("sizes", [[1], [7, 13, 101], [997], [1000, 0, 1], [5000]])
def test_windows_do_not_depend_on_the_pieces(sizes, both_ways):
    samples = noise(4321)
    expected = list(both_ways._windows([samples]))
    found = list(both_ways._windows(in_pieces(samples, sizes)))
    assert len(found) == len(expected) > 4
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:] == other[1:]


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_long_recording_takes_no_more_memory(bidirectional, both_ways, causal, monkeypatch):
    held = []

    class Watched(segmenter_model._Buffer):
        def take(self, first, frames):
            held.append(len(self._samples))
            return super().take(first, frames)

    monkeypatch.setattr(segmenter_model, "_Buffer", Watched)
    pieces = (noise(700) for _ in range(60))
    if bidirectional:
        assert sum(keep.stop - keep.start for _, _, keep, _ in both_ways._windows(pieces)) == 60 * 700 // 20
    else:
        assert len(causal._stream(pieces)) == 60 * 700 // 20
    assert len(held) > 40
    assert max(held) <= 2 * 1000 + 700 + 4 * both_ways.halo


# -------------------------------------------------------------------------------------------------------- scores


def test_a_short_recording_is_one_window(both_ways):
    samples = noise(612)
    [found] = both_ways.frame_scores([[samples]])
    assert len(found) == 31
    np.testing.assert_allclose(found, direct(both_ways, samples, both_ways.frames), atol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(1), 1, atol=1e-5)


def test_recordings_do_not_meet(both_ways):
    recordings = [noise(n, n) for n in (300, 1000, 5003, 11, 2500, 8000)]
    together = list(both_ways.frame_scores([x] for x in recordings))
    assert [len(scores) for scores in together] == [frame_count(len(x), 20) for x in recordings]
    for scores, x in zip(together, recordings, strict=True):
        [alone] = both_ways.frame_scores([in_pieces(x, [313])])
        np.testing.assert_allclose(scores, alone, atol=1e-5)


@pytest.mark.parametrize("length", [2000, 2345])
def test_streaming_is_one_pass(length, causal):
    samples = noise(length)
    expected = direct(causal, samples, frame_count(length, causal.hop))
    for sizes in ([17, 301], [length]):
        [found] = causal.frame_scores([in_pieces(samples, sizes)])
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_causal_model_hears_the_past_only(causal, both_ways):
    one = noise(3000)
    other = np.concatenate([one[:1640], noise(1360, seed=1)])
    known = (1640 - causal.halo) // causal.hop  # frames that end, with what they are computed from, before the change
    before, after = causal.frame_scores([[one], [other]])
    np.testing.assert_array_equal(before[:known], after[:known])
    assert (abs(before - after).max(1)[known + 2 :] > 1e-4).all()
    before, after = both_ways.frame_scores([[one[:900]], [np.concatenate([one[:640], noise(260, seed=1)])]])
    assert (abs(before - after).max(1)[: known // 4] > 0).any()


@pytest.mark.parametrize("kind", ["both_ways", "causal"])
def test_the_gain_does_not_matter(kind, request, waves):
    model = request.getfixturevalue(kind)
    samples, rate_hz, _ = audio.read(waves["a0001"].path)
    assert rate_hz == RATE_HZ
    plain, *others = model.frame_scores([[samples * gain] for gain in np.array([1, 100, 0.1, 0.01], np.float32)])
    for scores in others:
        np.testing.assert_allclose(scores, plain, atol=1e-3)
    assert plain.std(0).max() > 0.01


def test_decisions(make_model):
    none = {"evaluation.shortest_on_s": 0.0, "evaluation.shortest_off_s": 0.0}
    model = make_model({"task.frames": "sounds", "evaluation.threshold": 0.5, **none})
    p = np.array([0.1, 0.6, 0.7, 0.2, 0.5, 0.1])[:, None]
    assert model.decide(p).tolist() == [0, 1, 1, 0, 1, 0]
    with model.config.unlocked():
        model.config.evaluation.shortest_off_s = 0.04
    assert model.decide(p).tolist() == [0, 1, 1, 1, 1, 0]


# ------------------------------------------------------------------------------------------------------ training


def test_it_learns(trained_segmenter):
    history = [line for line in lines_of(trained_segmenter) if line["split"] == "train"]
    assert [line["epoch"] for line in history] == list(range(1, 9))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    scores = json.loads((trained_segmenter / "metrics.json").read_text())["segmentation"]
    assert scores["test"]["frame_accuracy"]["value"] > scores["metronome"]["frame_accuracy"]["value"] + 0.1


def test_what_a_run_writes(trained_segmenter):
    assert {path.name for path in trained_segmenter.iterdir()} == {
        "checkpoints", "config.json", "metrics.json", "metrics.jsonl", "predictions.csv", "report.html", "run.json",
        "segments.npz", "split.json", "tensorboard", "hashes.json",
    }  # fmt: skip
    split = json.loads((trained_segmenter / "split.json").read_text())
    assert (split["target"], split["unlabelled"]) == ("", [])
    rows = rows_of(trained_segmenter / "predictions.csv")
    assert tuple(rows[0])[: len(segmenter_model.FIELDS)] == segmenter_model.FIELDS
    for part in ("validation", "test"):
        assert sorted(row["id"] for row in rows if row["split"] == part) == split[part]
    results = json.loads((trained_segmenter / "metrics.json").read_text())
    assert {"validation", "test", "segmentation", "best", "split"} <= results.keys()
    scores = results["segmentation"]
    assert scores["validation"].keys() == scores["test"].keys()
    assert scores["recordings"] == len(split["test"])
    assert set(scores["per_database"]) == {row["database"] for row in rows if row["split"] == "test"}
    assert sum(own["recordings"] for own in scores["per_database"].values()) == len(split["test"])
    own = [float(row["frame_accuracy"]) for row in rows if row["split"] == "test"]
    by_recording = scores["test"]["frame_accuracy_by_recording"]
    assert by_recording["value"] == pytest.approx(np.mean(own), abs=1e-5)
    assert by_recording["low"] <= by_recording["value"] <= by_recording["high"]
    # Frame by frame, before the decoding mends it.
    assert 0.4 < results["test"]["accuracy"] < scores["test"]["frame_accuracy"]["value"]
    lines = lines_of(trained_segmenter)
    best = max((line["accuracy"], -line["epoch"]) for line in lines if line["split"] == "validation")
    assert (results["best"]["score"], results["best"]["epoch"]) == (best[0], -best[1])
    assert "<svg" in (trained_segmenter / "report.html").read_text()


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(make_config, trained_segmenter, tmp_path, monkeypatch):
    save, steps_an_epoch = checkpoint.save, lines_of(trained_segmenter)[0]["step"]
    assert steps_an_epoch % 2

    def dies(manager, step, *rest):
        save(manager, step, *rest)
        if step > steps_an_epoch and step % steps_an_epoch:
            manager.wait_until_finished()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(name="segmenter_small"), tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "metrics.json").exists()
    train(make_config(name="segmenter_small"), tmp_path)
    assert_same_run(tmp_path, trained_segmenter)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.epochs": 9}, "train.epochs=8, now 9"),  # the cosine ends with the epochs
        ({"features.step_s": 0.04}, "features.step_s=0.02, now 0.04"),
        ({"optimizer.clip_norm": 2.0}, "optimizer.clip_norm=1.0, now 2.0"),
        ({"optimizer.schedule": "constant", "optimizer.warmup_steps": 0}, "optimizer.schedule=cosine, now constant"),
    ],
)
def test_another_experiment_in_the_same_workdir(changes, named, make_config, trained_segmenter, tmp_path):
    shutil.copytree(trained_segmenter, tmp_path / "run")
    with pytest.raises(CheckpointError, match=named):
        train(make_config(changes, "segmenter_small"), tmp_path / "run")
    assert lines_of(tmp_path / "run") == lines_of(trained_segmenter)


def test_binary_target_is_judged(make_model, prepared):
    model = make_model({"task.frames": "sounds"})
    corpus = from_prepared(prepared)
    scores, rows, examples = segmenter_model.judge_segmentation(model, corpus, np.arange(4), "test")
    assert examples == []
    assert [row["id"] for row in rows] == [row["id"] for row in corpus.rows[:4]]
    assert scores["always"]["recall"]["value"] == 1
    right = called = true = 0
    for i, found in enumerate(model.frame_scores([corpus.read(i)] for i in range(4))):
        assert found.shape[1] == 1
        truth = frame_states(corpus.rows[i]["annotations"], len(found), 0.02)
        wanted, decided = target_frames(truth, "sounds"), model.decide(found) > 0
        right += (decided & (wanted == 1)).sum()
        called += (decided & (wanted >= 0)).sum()
        true += (wanted == 1).sum()
    assert scores["test"]["recall"]["value"] == pytest.approx(right / true, abs=1e-9)
    assert scores["test"]["f1"]["value"] == pytest.approx(2 * right / (called + true), abs=1e-9)
    assert "always" in segmentation_summary(scores)


def test_judged_by_hand(both_ways, prepared):
    corpus = from_prepared(prepared)
    indices = np.array([5, 2, 9])
    scores, rows, examples = segmenter_model.judge_segmentation(both_ways, corpus, indices, "test")
    right = known = 0
    for i, row in zip(indices, rows, strict=True):
        [found] = both_ways.frame_scores([[corpus.read(i) / np.float32(32767)]])
        truth = frame_states(corpus.rows[i]["annotations"], len(found), 0.02)
        hits, own = (
            (viterbi(found, both_ways.log_duration_KxSxD) == truth)[truth > 0].sum(),
            (truth > 0).sum(),
        )
        assert (row["id"], row["person"]) == (corpus.rows[i]["id"], corpus.rows[i]["person"])
        assert float(row["frame_accuracy"]) == pytest.approx(hits / own, abs=1e-5)
        right, known = right + hits, known + own
    assert scores["test"]["frame_accuracy"]["value"] == pytest.approx(right / known)
    assert (scores["recordings"], len(examples)) == (3, 3)
    assert sorted(example["id"] for example in examples) == sorted(row["id"] for row in rows)
    assert abs(examples[0]["samples"]).max() == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def without_annotations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    for person in range(3):
        soundfile.write(folder / f"p{person}.wav", noise(3000, person), RATE_HZ)
    prepare.prepare("folder", folder, folder / "prepared", workers=1)
    return folder / "prepared"


def test_no_recording_is_annotated(make_config, without_annotations, tmp_path):
    config = make_config({"data.prepared": str(without_annotations)}, "segmenter_small")
    with pytest.raises(ValueError, match=r"data\.prepared=.*: no recording has annotated states"):
        set_up(config, tmp_path)


def test_recordings_without_annotations_are_set_aside(make_config, prepared, without_annotations, tmp_path):
    config = make_config({"data.prepared": f"{prepared},{without_annotations}"}, "segmenter_small")
    experiment = set_up(config, tmp_path)
    corpus, parts, split = experiment.corpus, experiment.parts, experiment.split
    assert len(corpus.rows) == 32 + 3
    used = {corpus.rows[i]["id"] for indices in parts.values() for i in indices}
    assert used == {row["id"] for row in corpus.rows if row["annotations"]}
    assert len(used) == 32
    assert splits.leaks(split, [row for row in corpus.rows if row["annotations"]]) == []


BAD = [
    ({"data.train_share": 0.0}, "data.train_share=0.0: must be above 0 and at most 1"),
    ({"data.train_share": 1.5}, "data.train_share=1.5"),
    ({"optimizer.schedule": "linear"}, "optimizer.schedule='linear': choose one of constant, cosine"),
    ({"optimizer.warmup_steps": 10_000}, "optimizer.warmup_steps=10000: .* below the .* steps of the run"),
    ({"optimizer.warmup_steps": -1}, "optimizer.warmup_steps=-1: must be at least 0"),
    ({"optimizer.weight_decay": -0.1}, "optimizer.weight_decay=-0.1: must be at least 0"),
    ({"optimizer.clip_norm": -1.0}, "optimizer.clip_norm=-1.0: must be at least 0"),
    ({"train.balance": "class"}, "train.balance='class': only a classifier"),
    ({"train.select": "auc"}, "train.select='auc': choose one of loss, accuracy"),
    ({"task.frames": "beats"}, "task.frames='beats'"),
    ({"features.window_s": 60.0}, "features.window_s=60.0: longer than every recording"),
    ({"split.kind": "paper301"}, "kind paper301 draws recordings of two classes"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_bad_config_names_the_field(changes, message, make_config, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(make_config(changes, "segmenter_small"), tmp_path / "run")


def test_a_share_of_the_people_trains(prepared):
    _, rows = read_rows(prepared)
    ids = [row["id"] for row in rows][:40]
    person = {row["id"]: (row["database"], row["person"]) for row in rows}
    kept = kept_share(rows, ids, 1 / 3, seed=0)
    people, chosen = {person[id] for id in ids}, {person[id] for id in kept}
    assert kept == [id for id in ids if person[id] in chosen]  # all of a person's recordings, in order
    for database in {name for name, _ in people}:
        count = sum(name == database for name, _ in people)
        assert sum(name == database for name, _ in chosen) == max(round(count / 3), 1)
    assert kept_share(rows, ids, 1.0, seed=0) == ids
    assert kept_share(rows, ids, 1 / 3, seed=0) == kept


# ------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate(corpus_folder, trained_segmenter, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(corpus_folder / "source", source)
    damaged = source / "training-a" / "a0001.wav"
    damaged.write_bytes(damaged.read_bytes()[:500])
    out = tmp_path / "scores" / "cinc.json"
    returned = evaluate.evaluate(str(trained_segmenter), "cinc2016", str(source), str(out))
    scores, rows = json.loads(out.read_text()), rows_of(out.with_suffix(".csv"))
    assert scores["segmentation"] == returned["segmentation"]
    assert scores["segmentation"]["recordings"] == len(rows) == 31
    assert (scores["target"], scores["without_annotation"]) == ("states", 0)
    assert [problem["path"].split("/")[-1] for problem in scores["problems"]] == ["a0001.wav"]
    # The same files, prepared and judged while training, got the same scores.
    said = {row["id"]: row for row in rows_of(trained_segmenter / "predictions.csv") if row["split"] == "test"}
    answers = {row["id"]: float(row["frame_accuracy"]) for row in rows}
    for id in said.keys() & answers.keys():
        assert answers[id] == pytest.approx(float(said[id]["frame_accuracy"]), abs=0.02)
    assert "metronome" in run_summary(returned)


def test_evaluate_without_annotations(trained_segmenter, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(3000), RATE_HZ)
    with pytest.raises(datasets.DatasetError, match="none of the 1 recordings has annotated states"):
        evaluate.evaluate(str(trained_segmenter), "folder", str(tmp_path), str(tmp_path / "o.json"))


# -------------------------------------------------------------------------------------------------------- predict


def test_predict_one_file(trained_segmenter, waves, tmp_path):
    path = waves["b0001"].path
    out = tmp_path / "new" / "b.tsv"
    [row] = predict.predict(str(trained_segmenter), [str(path)], str(out))
    assert (row["tsv"], row["error"]) == (str(out), "")
    assert [p.name for p in out.parent.iterdir()] == ["b.tsv"]
    rate_hz, frames, _ = audio.header(path)
    spans = read_tsv(out)
    assert spans == read_annotations(out, frames / rate_hz)
    assert spans[0][0] == 0
    assert spans[-1][1] == pytest.approx(frames / rate_hz, abs=0.02)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    # As the model itself says.
    model = load_segmenter(trained_segmenter)
    [scores] = model.frame_scores([[audio.read(path)[0]]])
    assert frame_states(spans, len(scores), 0.02).tolist() == model.decide(scores).tolist()
    onsets = [start for start, _, state in spans if state == datasets.S1]
    assert float(row["heart_rate_bpm"]) == pytest.approx(60 / np.median(np.diff(onsets)), abs=0.06)


def test_predict_several_files(trained_segmenter, waves, tmp_path):
    soundfile.write(tmp_path / "cut.flac", noise(4000), RATE_HZ)
    cut = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(cut[: len(cut) // 2])
    soundfile.write(tmp_path / "silent.wav", np.zeros(3000), RATE_HZ)
    (tmp_path / "text.wav").write_text("not a sound")
    stereo = np.repeat(audio.read(waves["a0001"].path)[0], 4)[:, None] * [1, 0]
    soundfile.write(tmp_path / "stereo.flac", stereo, 4 * RATE_HZ)
    paths = [tmp_path / "cut.flac", waves["a0001"].path, tmp_path / "silent.wav", tmp_path / "text.wav",
             tmp_path / "missing.wav", tmp_path / "stereo.flac"]  # fmt: skip
    out = tmp_path / "out" / "answers.csv"
    returned = predict.predict(str(trained_segmenter), list(map(str, paths)), str(out))
    rows = rows_of(out)
    assert rows == returned
    assert list(rows[0]) == ["path", "tsv", "heart_rate_bpm", "error", "notes"]
    assert [row["path"] for row in rows] == list(map(str, paths))
    assert [row["error"].split(":")[0] for row in rows] == ["truncated", "", "silent", "not audio", "missing", ""]
    assert [pathlib.Path(row["tsv"]).name for row in rows if row["tsv"]] == ["a0001.tsv", "stereo.tsv"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["a0001.tsv", "answers.csv", "stereo.tsv"]
    for row in rows:
        if row["tsv"]:
            assert len(read_tsv(row["tsv"])) > 8
            assert 20 < float(row["heart_rate_bpm"]) < 300


def test_files_of_one_name(trained_segmenter, tmp_path):
    for names, out in ((["x/a.wav", "y/a.flac"], "o.csv"), (["a.wav", "b.wav"], "o.tsv")):
        with pytest.raises(ValueError, match=r"\.tsv: several files would be written there; give --out=FILE\.csv"):
            predict.predict(str(trained_segmenter), names, str(tmp_path / out))
    assert not list(tmp_path.iterdir())


def test_ten_minutes(trained_segmenter, waves, tmp_path):
    seconds, rate_hz = 600, 8000
    sound = np.repeat(audio.read(waves["b0001"].path)[0], rate_hz // RATE_HZ)
    with soundfile.SoundFile(tmp_path / "long.wav", "w", rate_hz, 1, "PCM_16") as file:
        for _ in range(seconds * rate_hz // len(sound)):
            file.write(sound)
    duration_s = audio.header(tmp_path / "long.wav")[1] / rate_hz
    model = load_segmenter(trained_segmenter)
    list(model.frame_scores([[noise(3000)]]))  # compiles
    tracemalloc.start()
    try:
        [scores] = model.frame_scores([audio.pieces(tmp_path / "long.wav", RATE_HZ)])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(scores) == pytest.approx(duration_s / 0.02, abs=1)
    assert most < 4e6  # the samples alone are 19 MB, and 2.4 MB at the model's rate
    spans = state_spans(model.decide(scores), 0.02, duration_s)
    assert spans[-1][1] == pytest.approx(duration_s, abs=0.02)
    # The first minute and the last are as alike as the beats, which repeat.
    rate = [len([s for s in spans if s[2] == datasets.S1 and low <= s[0] < low + 60]) for low in (0, 530)]
    assert rate[0] == pytest.approx(rate[1], rel=0.1)  # the windows fall otherwise on the beats


def test_synthetic_circor_is_evaluated(trained_segmenter, tmp_path):
    synthetic.write(tmp_path / "c", layout="circor", people=2, recordings_per_person=1, duration_s=(3.0, 3.1))
    scores = evaluate.evaluate(str(trained_segmenter), "circor", str(tmp_path / "c"), str(tmp_path / "o.json"))
    assert scores["segmentation"]["recordings"] == 2
    assert list(scores["segmentation"]["per_database"]) == ["circor"]
