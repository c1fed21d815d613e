"""What the audio LLM hears and is asked: the front end, windows, order, batches."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from pcgjax.audio_llm import batches
from pcgjax.audio_llm import model as llm
from pcgjax.data.corpus import from_prepared, in_memory
from pcgjax.segmentation.states import write_tsv

RATE = llm.RATE_HZ
SPANS = [(0.0, 0.1, 4), (0.1, 0.2, 1), (0.2, 0.4, 2), (0.4, 0.5, 3), (0.5, 0.9, 4), (0.9, 1.0, 1), (1.0, 1.1, 2),
         (1.1, 1.2, 0)]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(prepared_16k):
    return from_prepared(prepared_16k)


@pytest.fixture(scope="module")
def tokenize(tiny_llm):
    return batches.Tokenizer(llm.load(tiny_llm, "float32", "sdpa")[1])


def test_heartbeats_last_from_s1_to_the_end_of_s2():
    assert batches.heartbeats(SPANS) == [(0.1, 0.5), (0.9, 1.1)]
    # The binary target `cycle` of a segmenter: 1 where it holds.
    assert batches.heartbeats([(0.0, 0.3, 0), (0.3, 0.6, 1), (0.6, 1.0, 0), (1.0, 1.4, 1)]) == [(0.3, 0.6), (1.0, 1.4)]
    # Two S1 that touch are two heartbeats.
    assert batches.heartbeats([(0.0, 0.3, 1), (0.3, 0.6, 1)]) == [(0.0, 0.3), (0.3, 0.6)]


def test_the_front_end_keeps_crops_or_softens():
    x = np.ones(round(1.3 * RATE), np.float32)
    assert batches.apply_front_end(x, SPANS, "none", RATE) is x
    cropped = batches.apply_front_end(x, SPANS, "crop", RATE)
    assert len(cropped) == round(0.6 * RATE)
    assert cropped[0] < 0.01
    assert cropped[round(0.2 * RATE)] == 1
    gated = batches.apply_front_end(x, SPANS, "gate", RATE, 20.0)
    assert gated.shape == x.shape
    at = lambda s: gated[round(s * RATE)]
    np.testing.assert_allclose([at(0.3), at(1.0)], 1, rtol=1e-6)
    np.testing.assert_allclose([at(0.05), at(0.7), at(1.25)], 0.1, rtol=1e-5)
    assert np.abs(np.diff(gated)).max() < 0.01  # no click
    for kind in ("crop", "gate"):
        np.testing.assert_array_equal(batches.apply_front_end(x, [(0.0, 1.0, 0)], kind, RATE), x)


def test_segments_are_read_by_recording(corpus, make_config, tmp_path):
    config = make_config({"front_end.kind": "crop", "front_end.segments": str(tmp_path)}, "audio_llm")
    with pytest.raises(ValueError, match=f"{len(corpus.rows)} of {len(corpus.rows)} recordings have no .tsv there"):
        batches.make_source(corpus, config.front_end)
    for row in corpus.rows:
        spans = [(0.0, 0.2, 4), (0.2, 0.3, 1), (0.3, 0.5, 2), (0.5, 0.6, 3)]
        write_tsv(spans, tmp_path / f"{row['id']}.tsv")
    source = batches.make_source(corpus, config.front_end)
    assert len(source.read(0)) == round(0.4 * RATE)
    assert set(batches.lengths_heard(source)) == {round(0.4 * RATE)}
    (tmp_path / f"{corpus.rows[0]['id']}.tsv").write_text("0.0\t0.2\t1\n0.2\t0.4\t4\n")
    with pytest.raises(ValueError, match="line 2: diastole follows S1"):
        batches.make_source(corpus, config.front_end)


def test_sounds_are_no_heartbeats(corpus, make_config, tmp_path):
    """What a segmenter of the target `sounds` writes: a murmur lies between them."""
    for row in corpus.rows:
        spans = [(0.0, 0.1, 1), (0.1, 0.3, 0), (0.3, 0.4, 1), (0.4, 0.9, 0)]
        write_tsv(spans, tmp_path / f"{row['id']}.tsv")
    config = make_config({"front_end.kind": "crop", "front_end.segments": str(tmp_path)}, "audio_llm")
    with pytest.raises(ValueError, match=r"0.10 s: sounds, not heartbeats"):
        batches.make_source(corpus, config.front_end)


def test_a_recording_without_heartbeats_is_heard_whole_and_counted(corpus, make_config, tmp_path):
    for i, row in enumerate(corpus.rows):
        write_tsv([(0.0, 2.0, 0)] if i == 0 else [(0.0, 0.2, 1), (0.2, 0.6, 2)], tmp_path / f"{row['id']}.tsv")
    config = make_config({"front_end.kind": "crop", "front_end.segments": str(tmp_path)}, "audio_llm")
    source = batches.make_source(corpus, config.front_end)
    assert [source.passes_whole(i) for i in (0, 1)] == [True, False]
    assert len(source.read(0)) == corpus.lengths[0] > len(source.read(1))
    assert not batches.make_source(corpus, make_config({}, "audio_llm").front_end).passes_whole(0)


def test_swapped_audio_is_as_long_as_ones_own(corpus, make_config):
    source = batches.make_source(corpus, make_config({}, "audio_llm").front_end)
    there = len(source.read(1))
    for begin, long in ((0, 20000), (30000, 20000), (0, there - 1), (0, there + 5)):
        clip = batches._swapped(batches.Clip(0, begin, begin + long, ()), 1, source)
        assert clip.recording == 1
        assert clip.end - clip.begin == min(long, there)
        assert 0 <= clip.begin < clip.end <= there


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"front_end.kind": "mute"}, "front_end.kind='mute'"),
        ({"front_end.kind": "gate"}, "front_end.segments=''"),
        ({"questions.tasks": ("pitch",)}, "'pitch' is none of"),
    ],
)
def test_wrong_choices_are_named(corpus, make_config, changes, match):
    config = make_config(changes, "audio_llm")
    check = lambda: (batches.make_source(corpus, config.front_end), batches.tasks_of(config.questions.tasks))
    with pytest.raises(ValueError, match=match):
        check()


def test_another_rate_and_too_short_recordings_are_refused(corpus, make_config):
    front_end = make_config({}, "audio_llm").front_end
    rows = corpus.rows[:1]
    with pytest.raises(ValueError, match=r"at 4000 Hz.*--sample_rate_hz=16000"):
        batches.make_source(in_memory(rows, [np.zeros(4000, np.int16)], 4000), front_end)
    short = batches.make_source(in_memory(rows, [np.zeros(320, np.int16)], RATE), front_end)
    with pytest.raises(ValueError, match=rows[0]["id"]):
        batches.lengths_heard(short)


@pytest.mark.parametrize("samples", [700, 30 * RATE, 30 * RATE + 1, 100 * RATE + 7])
def test_windows_cover_a_recording_evenly(samples):
    clips = batches.windows(samples, 30.0)
    assert clips[0][0] == 0
    assert clips[-1][1] == samples
    assert [b for _, b in clips[:-1]] == [a for a, _ in clips[1:]]
    lengths = [b - a for a, b in clips]
    assert max(lengths) <= 30 * RATE
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("count", [1, 7, 64, 101])
def test_an_epoch_hears_everyone_once_and_like_lengths_together(count):
    lengths = np.random.default_rng(0).integers(1000, 100_000, 200)
    ids = np.arange(50, 50 + count).astype(np.int32)
    order = batches.order_of_epoch(ids, lengths, 0, 0, 8, 2)
    assert order.shape[1:] == (2, 4)
    assert sorted(order[order >= 0]) == ids.tolist()
    assert (order == batches.order_of_epoch(ids, lengths, 0, 0, 8, 2)).all()
    if count == 101:
        assert (order != batches.order_of_epoch(ids, lengths, 0, 1, 8, 2)).any()
        spread = [np.ptp(lengths[step[step >= 0]]) for step in order if (step >= 0).all()]
        assert np.mean(spread) < 0.5 * np.ptp(lengths)


def test_a_steps_clips_and_questions_come_from_its_key(corpus, make_config):
    config = make_config({"data.clip_s": 1.0, "questions.a_clip": 2}, "audio_llm")
    source = batches.make_source(corpus, config.front_end)
    lengths = batches.lengths_heard(source)
    ids = np.arange(len(corpus.rows))
    one, again, other = (batches.training_clips(config, source, lengths, ids, step) for step in (3, 3, 4))
    assert one == again
    assert one != other
    assert {c.end - c.begin for c in one} == {RATE}
    assert max(len(c.questions) for c in one) == 2
    # A recording's clip does not depend on which others are in the step.
    assert batches.training_clips(config, source, lengths, ids[4:5], 3) == [one[4]]
    fixed = batches.evaluation_clips(config, source, lengths, ids, 1.0)
    assert fixed == batches.evaluation_clips(config, source, lengths, ids, 1.0)
    assert any(len(c.questions) > 2 for c in fixed)


def test_answers_of_windows_are_combined_and_swapped_audio_is_anothers(corpus, tokenize, make_config, tiny_llm):
    config = make_config({"evaluation.batch_recordings": 3}, "audio_llm")
    source = batches.make_source(corpus, config.front_end)
    lengths = batches.lengths_heard(source)
    answerer = llm.Answerer(llm.load(tiny_llm, "float32", "sdpa")[0])
    ask = lambda clips, **more: batches.ask_all(answerer, source, clips, tokenize, config, "cpu", **more)
    ids = np.arange(3)
    whole = ask(batches.evaluation_clips(config, source, lengths, ids, 30.0))
    halves = batches.evaluation_clips(config, source, lengths, ids, 2.0)
    both = ask(halves)
    assert [a.question for a in whole] == [a.question for a in both]
    assert {a.windows for a in whole} == {1}
    assert {a.windows for a in both} == {2}
    of_first = [ask([clip])[0].log_p for clip in halves[:2]]
    np.testing.assert_allclose(both[0].log_p, np.log(np.exp(of_first).mean(0)), atol=1e-5)
    assert all(sum(np.exp(a.log_p)) < 1 for a in whole)

    swapped = ask(batches.evaluation_clips(config, source, lengths, ids, 30.0), swap={0: 1, 1: 2, 2: 0})
    assert [a.question for a in swapped] == [a.question for a in whole]
    assert swapped[0].log_p != whole[0].log_p
    same = ask(batches.evaluation_clips(config, source, lengths, ids, 30.0), swap={0: 0, 1: 1, 2: 2})
    np.testing.assert_allclose([a.log_p for a in same], [a.log_p for a in whole], atol=1e-6)


def test_batches_are_made_ahead_and_come_in_order():
    made = [threading.Event() for _ in range(40)]

    def make(number: int) -> int:
        if number == 0:
            assert made[1].wait(20)  # two at a time: the first waits for the second here
        made[number].set()
        return number

    taken = batches.prefetched(make, 40)
    for number, item in enumerate(itertools.islice(taken, 20)):
        assert item == number
        assert made[number + 1].wait(20)  # while this one is still in use
    time.sleep(0.2)
    assert not made[39].is_set()  # a few ahead, not all: they would fill the memory
    assert list(taken) == list(range(20, 40))


def test_an_error_comes_at_its_batch():
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("the third cannot be read")
        return number

    taken = batches.prefetched(make, 5)
    assert [next(taken), next(taken)] == [0, 1]
    with pytest.raises(ValueError, match="the third cannot be read"):
        next(taken)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU takes batches from pinned memory")
def test_a_gpu_is_trained_from_pinned_memory(prepared_16k, tiny_llm, make_config, tmp_path, monkeypatch):
    from pcgjax.audio_llm.loop import train

    pinned, move = [], llm.Batch.to

    def moved(batch: llm.Batch, device: torch.device) -> llm.Batch:
        if torch.is_grad_enabled():  # a step of training
            pinned.extend(x.is_pinned() for x in batch if isinstance(x, torch.Tensor))
        return move(batch, device)

    monkeypatch.setattr(llm.Batch, "to", moved)
    config = make_config({"data.prepared": str(prepared_16k), "train.epochs": 1}, "audio_llm")
    train(config, str(tiny_llm), tmp_path)
    assert pinned
    assert all(pinned)


def test_learning_rate_rises_and_falls():
    from pcgjax.audio_llm.checkpoints import learning_rate

    rates = [learning_rate(step, 10, 1.0, 2) for step in range(10)]
    np.testing.assert_allclose(rates[:3], [0.5, 1.0, 1.0])
    assert (np.diff(rates[2:]) < 0).all()
    assert 0 < rates[-1] < 0.05
