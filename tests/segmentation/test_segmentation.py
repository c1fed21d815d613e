"""Segmentation: the Viterbi against a slow oracle, frames and spans, scores by hand, files in CirCor's layout."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from pcgjax.datasets.annotations import read_annotations
from pcgjax.segmentation.decoding import _forward, durations, metronome, viterbi
from pcgjax.segmentation.scores import best_median_worst, score_rates, score_states, summarise
from pcgjax.segmentation.states import frame_states, read_tsv, state_spans, target_frames, threshold_spans, write_tsv

STEP_S = 0.02
BEAT = (5, 7, 4, 12)  # frames of S1, systole, S2, diastole


def rhythm(beats, lengths=BEAT):
    return np.tile(np.repeat([1, 2, 3, 4], lengths), beats).astype(np.int8)


def bell(means, longest, width=1.5):
    """Log-probabilities of durations (4, longest) around `means` frames."""
    d = np.arange(1, longest + 1)
    p = np.exp(-0.5 * ((d - np.array(means)[:, None]) / width) ** 2) + 1e-6
    return np.log(p / p.sum(1, keepdims=True)).astype(np.float32)


def noisy(states, strength, rng):
    """Log-probabilities (T, 4) that favour the state of each frame."""
    score = rng.normal(size=(len(states), 4))
    score[np.arange(len(states)), states - 1] += strength
    return score - np.logaddexp.reduce(score, axis=1, keepdims=True)


def worth(states, log_p, log_duration, weight=1.0):
    """The number that viterbi maximises, of one answer: the best of all ways to assign its cycles to rhythms."""
    frames = len(states)
    log_duration = weight * log_duration.reshape(-1, *log_duration.shape[-2:])
    rhythms, longest = len(log_duration), log_duration.shape[2]
    best = np.zeros(rhythms)  # of what is before this state, if it is in that rhythm
    for start_s, end_s, state in state_spans(states, 1.0):
        d = int(end_s - start_s)
        if d > longest:
            return -math.inf
        if state == 1 and start_s > 0:
            best = np.maximum(best, best.max() + math.log(0.01))
        rows, cut = log_duration[:, state - 1], start_s == 0 or end_s == frames
        best = best + (weight * np.logaddexp.reduce(rows[:, d - 1 :] / weight, axis=1) if cut else rows[:, d - 1])
    return float(best.max() + log_p[np.arange(frames), states - 1].sum())


def oracle(log_p, log_duration, weight=1.0):
    """The best worth of any answer: all ends, states, durations and rhythms, in float64 and without a ring."""
    log_duration = log_duration.reshape(-1, *log_duration.shape[-2:]).astype(np.float64)
    frames, (rhythms, _, longest) = len(log_p), log_duration.shape
    survival = np.logaddexp.accumulate(log_duration[:, :, ::-1], axis=2)[:, :, ::-1]
    sums = np.vstack([np.zeros(4), np.cumsum(log_p, axis=0)])
    best = np.full((frames + 1, rhythms, 4), -np.inf)  # of what ends with state s before frame t
    for t, k, s in itertools.product(range(1, frames + 1), range(rhythms), range(4)):
        for d in range(1, min(t, longest) + 1):
            first, last = d == t, t == frames
            before = 0.0 if first else best[t - d, k, s - 1]
            if s == 0 and not first:
                before = max(before, best[t - d, :, 3].max() + math.log(0.01))
            how_long = weight * (survival if first or last else log_duration)[k, s, d - 1]
            best[t, k, s] = max(best[t, k, s], before + how_long + sums[t, s] - sums[t - d, s])
    return best[frames].max()


# --- decisions


SLOW_AND_FAST = np.stack([bell((2, 3, 2, 5), 8), bell((3, 4, 3, 7), 8), bell((1, 1, 1, 2), 8)])


@pytest.mark.parametrize("frames", [1, 2, 7, 20, 21, 60])
@pytest.mark.parametrize(("seed", "log_duration"), [(0, SLOW_AND_FAST[0]), (1, SLOW_AND_FAST[0]), (2, SLOW_AND_FAST)])
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_viterbi_is_the_best_answer(frames, seed, log_duration, weight):
    rng = np.random.default_rng(seed)
    log_p = np.log(rng.dirichlet(np.ones(4), frames)) * rng.choice([0.3, 1.0, 5.0])
    states = viterbi(log_p, log_duration, weight)
    assert states.shape == (frames,)
    best = oracle(log_p, log_duration, weight)
    assert worth(states, log_p, log_duration, weight) == pytest.approx(best, abs=1e-3)
    order = [state for *_, state in state_spans(states, 1.0)]
    assert all(b == a % 4 + 1 for a, b in itertools.pairwise(order))


def test_viterbi_follows_a_rhythm_that_changes():
    slow, fast = (6, 10, 5, 20), (5, 7, 4, 8)
    states = [np.repeat([1, 2, 3, 4], beat).tolist() * 12 for beat in (slow, fast, slow)]
    truth = np.array(list(itertools.chain(*states)), np.int8)
    log_p = noisy(truth, 1.2, np.random.default_rng(0))
    both = np.stack([bell(slow, 30), bell(fast, 30)])

    def right(log_duration):
        return (viterbi(log_p, log_duration, 1.0) == truth).mean()

    assert right(both) > 0.95
    assert right(both) > max(right(both[0]), right(both[1])) + 0.02


def test_viterbi_finds_a_rhythm_in_noise():
    rng = np.random.default_rng(0)
    truth = rhythm(20)[9:-3]  # cut in the middle of a systole and of a diastole
    log_p = noisy(truth, 1.5, rng)
    alone = (log_p.argmax(1) + 1 == truth).mean()
    states = viterbi(log_p, bell(BEAT, 30), duration_weight=1.0)
    assert alone < 0.75
    assert (states == truth).mean() > 0.95
    assert (viterbi(log_p, bell(BEAT, 30), duration_weight=0.0) == truth).mean() < 0.9


def test_viterbi_with_durations_that_are_impossible():
    log_duration = np.full((4, 12), -np.inf)
    for state, d in enumerate(BEAT):
        log_duration[state, d - 1] = 0.0
    truth = rhythm(6)[3:]
    log_p = noisy(truth, 1.0, np.random.default_rng(1))
    assert viterbi(log_p, log_duration).tolist() == truth.tolist()
    log_p[40:60] = -np.inf  # a head that is wrong and sure of it
    assert viterbi(log_p, log_duration).tolist() == truth.tolist()


def test_ten_minutes_are_as_exact_as_one():
    rng = np.random.default_rng(0)
    truth = rhythm(1075)[:30000]
    log_p = 20 * noisy(truth, 1.0, rng)  # adds up to about -10^6
    log_duration = 20 * bell(BEAT, 30)
    whole = viterbi(log_p, log_duration, 1.0)
    end = viterbi(log_p[-3000:], log_duration, 1.0)
    assert (whole[-2900:] == end[-2900:]).all()
    assert (whole == truth).mean() > 0.9
    assert worth(whole, log_p, log_duration) >= worth(truth, log_p, log_duration)


def test_viterbi_compiles_once_for_recordings_of_many_lengths():
    log_duration = bell(BEAT, 31)  # a size that no other test uses
    forward: Any = _forward
    before = forward._cache_size()
    for frames in (10, 700, 4096):
        viterbi(np.zeros((frames, 4)), log_duration)
    assert forward._cache_size() == before + 1


@pytest.mark.parametrize(
    ("log_p", "log_duration", "message"),
    [
        (np.zeros((9, 5)), np.zeros((4, 9)), r"log_p_TxS: need \(frames, 4\), got shape \(9, 5\)"),
        (np.zeros((9, 4)), np.zeros((9, 4)), r"log_duration_KxSxD: need \(rhythms, 4, durations\)"),
        (np.where(np.arange(9)[:, None] == 6, np.nan, np.zeros((9, 4))), np.zeros((4, 9)), "NaN, first in frame 6"),
    ],
)
def test_viterbi_refuses(log_p, log_duration, message):
    with pytest.raises(ValueError, match=message):
        viterbi(log_p, log_duration)


def test_viterbi_of_nothing():
    assert viterbi(np.zeros((0, 4)), bell(BEAT, 30)).shape == (0,)


def test_durations():
    beat = [(0.0, 0.1, 1), (0.1, 0.24, 2), (0.24, 0.32, 3), (0.32, 0.56, 4)]
    annotation = [(a + 0.56 * i, b + 0.56 * i, s) for i in range(5) for a, b, s in beat]
    # The stretch's first S1 and last diastole are cut; the long S1 after a gap has no neighbour before it.
    annotation[0] = (0.04, 0.1, 1)
    annotation += [(2.8, 3.0, 0), (3.0, 3.4, 1), (3.4, 3.54, 2), (3.54, 3.62, 3)]
    log_p_KxSxD = durations([annotation, []], STEP_S, longest_s=1.0)
    assert log_p_KxSxD.shape == (10, 4, 50)
    assert log_p_KxSxD.dtype == np.float32
    np.testing.assert_allclose(log_p_KxSxD, log_p_KxSxD[:1].repeat(10, 0), atol=1e-5)  # one recording: one rhythm
    log_p = log_p_KxSxD[0]
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1, atol=1e-5)
    assert (log_p.argmax(1) + 1).tolist() == list(BEAT)
    assert np.isfinite(log_p).all()
    assert math.exp(log_p[0, 19]) < 1e-4  # 0.4 s
    short = durations([annotation], STEP_S, longest_s=0.2, rhythms=1)[0]  # the diastoles last longer
    assert short.shape == (4, 10)
    assert short[3].argmax() == 9


def test_durations_of_each_rhythm():
    def beats(*beat, count=6):
        edges = np.cumsum([0, *(count * beat)]) * STEP_S
        return [(a, b, i % 4 + 1) for i, (a, b) in enumerate(itertools.pairwise(edges.tolist()))]

    slow, fast = (6, 10, 5, 29), (5, 7, 4, 9)
    log_duration = durations([beats(*slow), beats(*fast)], STEP_S, rhythms=3)
    assert (log_duration[0].argmax(1) + 1).tolist() == list(fast)
    assert (log_duration[2].argmax(1) + 1).tolist() == list(slow)
    assert log_duration[0, 3, 8] - log_duration[2, 3, 8] > 2


def test_durations_need_whole_states():
    with pytest.raises(ValueError, match="no whole S1, S2, diastole between"):
        durations([[(0.0, 0.1, 1), (0.1, 0.3, 2), (0.3, 0.4, 3)]], STEP_S)


def test_threshold_spans():
    p = np.zeros(40)
    p[2:10] = p[12:20] = p[25] = p[30:40] = 0.9
    spans = threshold_spans(p, 0.5, shortest_on_s=0.06, shortest_off_s=0.06, step_s=STEP_S)
    np.testing.assert_allclose(spans, [(0.04, 0.4), (0.6, 0.8)])  # a gap closed, a blip dropped
    same = threshold_spans(p, 0.9, 0.02, 0.04, STEP_S)  # neither is shorter than that
    np.testing.assert_allclose(same, [(0.04, 0.2), (0.24, 0.4), (0.5, 0.52), (0.6, 0.8)])
    assert threshold_spans(p, 0.95, 0.02, 0.02, STEP_S) == []


# --- frames


def test_frames_have_the_state_of_their_centre():
    annotations = ((0.03, 0.07, 1), (0.07, 0.129, 2), (0.15, 0.5, 3))
    states = frame_states(annotations, 10, STEP_S)
    assert states.dtype == np.int8
    #                 centres .01 .03 .05 .07 .09 .11 .13 .15 .17 .19
    assert states.tolist() == [0, 1, 1, 2, 2, 2, 0, 3, 3, 3]
    assert frame_states((), 3, STEP_S).tolist() == [0, 0, 0]


def test_spans_undo_frames():
    states = np.array([0, 0, 1, 1, 1, 2, 4, 4], np.int8)
    spans = state_spans(states, STEP_S)
    np.testing.assert_allclose(spans, [(0, 0.04, 0), (0.04, 0.1, 1), (0.1, 0.12, 2), (0.12, 0.16, 4)])
    assert frame_states(spans, 8, STEP_S).tolist() == states.tolist()
    assert state_spans(states, STEP_S, duration_s=0.15)[-1] == (0.12, 0.15, 4)
    assert state_spans(states, STEP_S, duration_s=0.12)[-1][2] == 2
    assert state_spans([], STEP_S) == []


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("sounds", [-1, 1, 0, 1, 0]),
        ("cycle", [-1, 1, 1, 1, 0]),
        ("annotated", [0, 1, 1, 1, 1]),
        ("states", [-1, 0, 1, 2, 3]),
    ],
)
def test_targets(target, expected):
    frames = target_frames(np.arange(5, dtype=np.int8), target)
    assert frames.tolist() == expected
    assert frames.dtype == np.int8


def test_unknown_target():
    with pytest.raises(ValueError, match="need one of sounds, cycle, annotated, states, got 'beats'"):
        target_frames([0], "beats")


# --- files


def test_tsv_is_read_back_by_the_loader(tmp_path):
    states = np.r_[[0] * 3, rhythm(3), [0] * 5, rhythm(2)[9:]]
    duration_s = len(states) * STEP_S - 0.007
    spans = state_spans(states, STEP_S, duration_s)
    path = tmp_path / "a" / "1_AV.tsv"
    write_tsv(spans, path)
    assert path.read_text().startswith("0\t0.06\t0\n0.06\t0.16\t1\n")
    for read in (read_tsv(path), read_annotations(path, duration_s)):
        np.testing.assert_allclose(read, spans, atol=1e-5)
    assert frame_states(read_tsv(path), len(states), STEP_S).tolist() == states.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\t0.1\t1\n0.1\t0.3\t3\n", r"1_AV\.tsv, line 2: S2 follows S1; the order is S1, systole.*correct"),
        ("0 0.1 1\n\n0.1 0.1 4\n0.1 0.3 2\n0.3 0.5 2\n", r"line 5: systole follows systole"),
        ("0\t0.1\t1\n0.1\t0.05\t2\n", r"1_AV\.tsv, line 2: the interval ends"),
        ("0\t0.1\t7\n", r"1_AV\.tsv, line 1: unknown state '7'"),
    ],
)
def test_tsv_errors_name_file_and_line(tmp_path, text, message):
    path = tmp_path / "1_AV.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tsv(path)


def test_any_state_may_follow_a_gap(tmp_path):
    path = tmp_path / "1_AV.tsv"
    path.write_text("0\t0.1\t1\n0.1\t0.3\t0\n0.3\t0.5\t4\n0.7\t0.8\t4\n")
    assert [state for *_, state in read_tsv(path)] == [1, 0, 4, 4]


# --- scores


def test_the_truth_gets_everything():
    truth = np.r_[[0] * 10, rhythm(6)[2:], [0] * 10, rhythm(4)]
    scores = score_rates(score_states(truth, truth, STEP_S))
    for name, value in scores.items():
        assert value == (0 if "error" in name else 1), name


def test_scores_by_hand():
    truth = np.r_[np.zeros(8, np.int8), rhythm(4), np.zeros(12, np.int8)]
    predicted = np.r_[np.roll(np.r_[rhythm(5)[-8:], rhythm(4)], 3), rhythm(1)[:12]]  # 3 frames late
    predicted[:3] = 4
    s = score_states(truth, predicted, STEP_S)
    assert s["frames"] == 4 * 28
    # At each of a beat's four changes 3 frames are wrong.
    assert s["frames_right"] == 4 * 16
    # Of four S1 the first is cut by the edge; 60 ms late is within the tolerance.
    assert [s[f"S1_onset_60ms_{k}"] for k in ("right", "called", "true")] == [3, 3, 3]
    assert [s[f"S2_onset_60ms_{k}"] for k in ("right", "called", "true")] == [4, 4, 4]
    assert s["cycles"] == 2
    assert s["cycle_error_ms_sum"] == 0
    late = np.r_[np.full(1, 4, np.int8), predicted[:-1]]  # 4 frames: 80 ms
    s = score_states(truth, late, STEP_S)
    assert [s[f"S1_onset_60ms_{k}"] for k in ("right", "called", "true")] == [0, 4, 3]  # the cut one is too far in
    assert [s[f"S1_onset_100ms_{k}"] for k in ("right", "called", "true")] == [3, 3, 3]
    scores = score_rates(s)
    assert scores["onset_f1_60ms"] == 0
    assert scores["onset_f1_100ms"] == 1


def test_onsets_match_their_own_sound_and_once():
    truth = rhythm(5)
    swapped = np.array([0, 3, 4, 1, 2])[truth]
    s = score_states(truth, swapped, STEP_S)
    assert s["S1_onset_100ms_right"] == s["S2_onset_100ms_right"] == 0
    assert s["S1_onset_100ms_called"] > 0
    twice = truth.copy()
    onsets = np.flatnonzero((truth[1:] == 1) & (truth[:-1] == 4)) + 1
    twice[onsets + 1] = 2  # S1 begins, stops, and begins again two frames later
    s = score_states(truth, twice, STEP_S)
    assert [s[f"S1_onset_60ms_{k}"] for k in ("right", "called", "true")] == [4, 8, 4]


def test_onsets_count_only_inside_annotated_stretches():
    # Annotated from frame 20 to 61: one whole beat begins at 29 (S1) after 9 frames of diastole.
    truth = np.zeros(100, np.int8)
    truth[20:62] = np.r_[np.full(9, 4), rhythm(2)[:33]]
    predicted = truth.copy()
    predicted[5:8] = predicted[22:24] = predicted[70:73] = 1  # outside, as near to the edge as 60 ms, outside
    s = score_states(truth, predicted, STEP_S)
    assert [s[f"S1_onset_60ms_{k}"] for k in ("right", "called", "true")] == [2, 2, 2]
    predicted[24:26] = 4
    predicted[26:27] = 1  # 6 frames from the edge, and 3 from the true one, which the other meets
    predicted[22:24] = 4
    s = score_states(truth, predicted, STEP_S)
    assert [s[f"S1_onset_60ms_{k}"] for k in ("right", "called", "true")] == [2, 3, 2]


def test_rhythm_errors():
    truth = rhythm(8)
    slower = rhythm(8, (5, 7, 4, 13))[: len(truth)]
    s = score_states(truth, slower, STEP_S)
    # Onsets drift by one frame a beat: 5 are within 100 ms, with 4 cycles between them each 20 ms too long.
    assert s["cycles"] == 4
    assert s["cycle_error_ms_sum"] == pytest.approx(4 * 20)
    scores = score_rates(s)
    assert scores["cycle_error_ms"] == pytest.approx(20)
    assert scores["heart_rate_error"] == pytest.approx(60 / 0.56 - 60 / 0.58)
    assert math.isnan(score_rates(score_states(truth, np.full_like(truth, 4), STEP_S))["cycle_error_ms"])


def test_score_needs_equal_lengths():
    with pytest.raises(ValueError, match=r"as many frames as truth_T, \(28,\), got \(27,\)"):
        score_states(rhythm(1), rhythm(1)[1:], STEP_S)


def test_summary_pools_recordings_and_draws_people():
    rng = np.random.default_rng(0)
    scores, persons = [], []
    for i in range(12):
        truth = rhythm(4 + i % 3)
        predicted = np.where(rng.random(len(truth)) < 0.02 * i, 4, truth)
        scores.append(score_states(truth, predicted, STEP_S))
        persons.append(f"p{i // 2}")
    summary = summarise(scores, persons, resamples=200)
    right, frames = (sum(s[k] for s in scores) for k in ("frames_right", "frames"))
    accuracy = summary["frame_accuracy"]
    assert accuracy["value"] == pytest.approx(right / frames)
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    mean = np.mean([s["frames_right"] / s["frames"] for s in scores])
    assert summary["frame_accuracy_by_recording"]["value"] == pytest.approx(mean)
    # As if each recording were of another person: half of what is drawn together is drawn apart, so narrower.
    apart = summarise(scores, [str(i) for i in range(12)], resamples=200)["frame_accuracy"]
    assert apart["value"] == accuracy["value"]
    assert apart["high"] - apart["low"] < accuracy["high"] - accuracy["low"]
    assert summarise(scores, ["one"] * 12)["frame_accuracy"]["low"] is None
    none = summarise([score_states(np.zeros(9), np.ones(9), STEP_S)], ["a"])
    assert none["onset_f1_60ms"] == {"value": None, "low": None, "high": None}
    with pytest.raises(ValueError, match="lengths differ: scores 12, persons 1"):
        summarise(scores, ["a"])
    with pytest.raises(ValueError, match="no recordings"):
        summarise([], [])


def test_best_median_worst():
    truth = rhythm(6)
    scores = []
    for wrong in (40, 0, 120, 80, 20):
        predicted = truth.copy()
        predicted[:wrong] = 4
        scores.append(score_states(truth, predicted, STEP_S))
    assert best_median_worst(scores) == [1, 0, 2]
    assert best_median_worst(scores[:2]) == [1, 0]
    assert best_median_worst([]) == []


def test_metronome_knows_the_rate_and_nothing_else():
    log_duration = bell((10, 14, 8, 24), 40, width=0.3)  # half as fast as the truth
    truth = rhythm(10)[6:]
    baseline = metronome(truth, STEP_S, log_duration)
    assert baseline.tolist() == rhythm(10)[: len(truth)].tolist()
    scores = score_rates(score_states(truth, baseline, STEP_S))
    assert scores["heart_rate_error"] == 0
    assert scores["onset_f1_60ms"] == 0
    without_a_cycle = metronome(truth[:20], STEP_S, log_duration)
    assert without_a_cycle.tolist() == rhythm(1, (10, 14, 8, 24))[:20].tolist()
