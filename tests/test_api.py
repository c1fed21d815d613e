"""Models from Python: what the commands say, for arrays, files, lists and folders, compiled once."""

from __future__ import annotations

import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
import soundfile

import pcgjax
from pcgjax import predict, systems
from pcgjax.data.corpus import from_prepared
from pcgjax.datasets import audio


@pytest.fixture(scope="module")
def model(trained):
    return pcgjax.load(trained)


@pytest.fixture
def paths(corpus_folder):
    return [str(path) for path in sorted((corpus_folder / "source").rglob("*.wav"))[:5]]


@pytest.fixture
def compiled():
    """A list that grows with every compilation."""
    events: list[str] = []

    def listen(event: str, duration_s: float, **_) -> None:
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_answers_are_those_of_the_command(model, trained, paths, tmp_path):
    rows = predict.predict(str(trained), paths, str(tmp_path / "o.csv"))
    wanted = [float(row["probability"]) for row in rows]
    answers = model.predict(paths)
    assert [answer.probability for answer in answers] == pytest.approx(wanted, abs=1e-6)
    assert [answer.decision for answer in answers] == [row["decision"] == 1 for row in rows]
    assert [answer.path for answer in answers] == paths
    assert model.predict(paths[0]).probability == pytest.approx(wanted[0], abs=1e-6)
    samples, rate_hz = soundfile.read(paths[0], dtype="int16")
    for array in (samples, samples / 32768, samples.astype(np.int32) * 65536, (samples / 65536).astype(np.float16) * 2,
                  list(samples / 32768)):  # fmt: skip
        assert model.predict(array, rate_hz).probability == pytest.approx(wanted[0], abs=2e-3)
    assert model.predict([samples, paths[1]], rate_hz)[1].probability == pytest.approx(wanted[1], abs=1e-6)
    assert (model.target, model.threshold) == ("abnormal", 0.5)
    assert repr(model) == f"<pcgjax model {trained}: cnn, abnormal, 1000 Hz>"


def test_a_folder_and_a_file_that_cannot_be_used(model, paths, tmp_path):
    shutil.copy(paths[0], tmp_path / "good.wav")
    (tmp_path / "text.wav").write_text("not a sound")
    samples, rate_hz = soundfile.read(paths[1])
    soundfile.write(tmp_path / "two.wav", np.stack([samples, samples], 1), rate_hz)
    good, text, two = model.predict(tmp_path)
    assert (good.error, text.error[:9], two.notes) == ("", "not audio", ("channels: the first of 2 is read",))
    assert math.isnan(text.probability)
    assert not text.decision
    with pytest.raises(audio.AudioError, match=r"text.wav: not audio"):
        model.predict(tmp_path / "text.wav")
    with pytest.raises(audio.AudioError, match=r"text.wav: not audio"):
        model.embed(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no sound file in this folder"):
        model.predict(str(tmp_path / "empty"))
    assert model.predict([]) == []
    assert model.predict(["a"])[0].error.startswith("missing")


@pytest.mark.parametrize(("samples", "rate_hz", "message"), [
    (np.ones(1000), None, "sample_rate_hz: give the rate"),
    (np.ones(1000), 10, "sample_rate_hz=10: need a whole number from 100 to 768000"),
    (np.ones((2, 1000)), 1000, r"the samples have shape \(2, 1000\), need \(n,\)"),
    (np.ones(1000, np.uint8), 1000, "the samples are uint8; need floats in"),
    (np.ones(1000, complex), 1000, "the samples are complex128"),
    (np.ones(100), 1000, r"the samples last 0.100 s, at least 0.5 s is needed"),
    (np.full(1000, np.nan), 1000, "NaN or infinite"),
    (np.zeros(1000), 1000, "the samples are silent: all are 0"),
    (np.arange(1000.0), 1000, r"the samples reach 999, floats must lie in \[-1, 1\]; divide by full scale"),
    ([np.arange(1000), np.ones((2, 2))], 1000, "recording 1 of the list have shape"),
])  # fmt: skip
def test_what_is_no_sound_is_named(model, samples, rate_hz, message):
    with pytest.raises(ValueError, match=message):
        model.predict(samples, rate_hz)


def test_a_second_call_of_a_kind_does_not_compile(model, compiled):
    rng = np.random.default_rng(0)
    for seconds in (4.0, 3.9, 4.1):
        before = len(compiled)
        model.predict(0.1 * rng.standard_normal(round(4000 * seconds)), 4000)
    assert len(compiled) == before
    assert before > 0


def test_embeddings_are_what_the_site_report_has(model, trained, prepared, paths):
    corpus = from_prepared(prepared)
    wanted = systems.features(model.config, trained, corpus, np.arange(4))["trained"]
    sounds = [corpus.read(i) for i in range(4)]
    np.testing.assert_allclose(model.embed(sounds, 1000), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.embed(sounds[2], 1000), wanted[2], rtol=1e-4, atol=1e-5)


def test_states_are_those_of_the_command(trained_segmenter, model, paths, tmp_path):
    segmenter = pcgjax.load(trained_segmenter)
    found = segmenter.states(paths[:2])
    rows = predict.predict(str(trained_segmenter), paths[:2], str(tmp_path / "o.csv"))
    for states, row in zip(found, rows, strict=True):
        lines = [tuple(map(float, line.split())) for line in pathlib.Path(row["tsv"]).read_text().splitlines()]
        np.testing.assert_allclose(states.spans, lines, atol=0.021)
        assert f"{states.heart_rate_bpm:.1f}" == (row["heart_rate_bpm"] or "nan")
    assert segmenter.states(paths[0]) == found[0]
    with pytest.raises(ValueError, match="decides nothing about a recording; use states"):
        segmenter.predict(paths[0])
    with pytest.raises(ValueError, match="no embedding here"):
        segmenter.embed(paths[0])
    with pytest.raises(ValueError, match="has no states; use predict"):
        model.states(paths[0])
