"""The Shannon envelope against a loop of SciPy's, and S1 and S2 picked on simulated recordings whose truth is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from pcgjax.datasets import DIASTOLE, S1, S2, SYSTOLE
from pcgjax.datasets.simulate import draw_person, simulate_person
from pcgjax.features import envelope, filters
from pcgjax.segmentation.scores import score_rates, score_states
from pcgjax.segmentation.states import frame_states

RATE_HZ = 1000
SOS = filters.butterworth(4, 100.0, RATE_HZ, "lowpass")
FRAMES = envelope.frames(0.02, 0.01, RATE_HZ)


def loop(x):
    """The envelope of one recording, in float64."""
    y = scipy.signal.sosfiltfilt(SOS, x / np.abs(x).max())
    y = (y - y.mean()) / y.std()
    power = (y / np.abs(y).max()) ** 2
    energy = -power * np.log(np.where(power > 0, power, 1))
    e = np.array([energy[i : i + 20].mean() for i in range(0, len(x) - 19, 10)])
    return (e - e.mean()) / e.std()


def otsu(e):
    """The cut with the largest variance between its two sides, by trying all."""
    values = np.sort(e)
    sides = [(values[:k], values[k:]) for k in range(1, len(values))]
    between = [len(a) * len(b) * (a.mean() - b.mean()) ** 2 for a, b in sides]
    a, b = sides[int(np.argmax(between))]
    return (a[-1] + b[0]) / 2


@pytest.fixture(scope="module")
def simulated():
    """[(samples, states)] of simulated people at rest, lengths odd and even."""
    rng = np.random.default_rng(0)
    recordings = []
    for i, duration_s in enumerate((3.0, 5.237, 8.001, 6.4)):
        person = draw_person(rng, i)
        wave, states = simulate_person(person, "MV", rng, duration_s, RATE_HZ)
        recordings.append((np.asarray(wave, np.float64), states))
    return recordings


@pytest.fixture(scope="module")
def analysed(simulated):
    """envelope (B, F), counts, thresholds and cycles of `simulated` in one padded batch, with an unused place."""
    lengths = np.array([*(len(x) for x, _ in simulated), 0])
    x = np.zeros((len(lengths), 8203), np.float32)
    for row, (samples, _) in zip(x, simulated, strict=False):
        row[: len(samples)] = 250 * samples
    e = jax.jit(lambda x, n: envelope.shannon_envelope(x, n, SOS, FRAMES))(x, lengths)
    counts = jnp.asarray(FRAMES.count(lengths))
    return e, counts, envelope.threshold(np.asarray(e), np.asarray(counts)), envelope.cycle_s(e, counts, FRAMES.step_s)


def test_envelope_is_the_loops(simulated, analysed):
    e, counts, _, _ = analysed
    for frames, n, (samples, _) in zip(e, counts, simulated, strict=False):
        expected = loop(samples)
        assert n == len(expected)
        np.testing.assert_allclose(frames[:n], expected, atol=2e-4)
        assert not frames[n:].any()
    assert counts[-1] == 0
    assert not e[-1].any()


def test_threshold_is_otsus(simulated, analysed):
    for level, (samples, _) in zip(analysed[2], simulated, strict=False):
        assert level == pytest.approx(otsu(loop(samples)), abs=2e-3)


def test_cycle_is_the_simulated_one(simulated, analysed):
    for cycle, (_, states) in zip(analysed[3], simulated, strict=False):
        onsets = np.array([start for start, _, state in states if state == S1])
        assert cycle == pytest.approx(np.median(np.diff(onsets)), rel=0.08)
    assert np.isnan(analysed[3][-1])


def test_sounds_are_found_and_told_apart(simulated, analysed):
    e, counts, thresholds, cycles = map(np.asarray, analysed)
    scores = []
    for i, (samples, states) in enumerate(simulated):
        sounds = envelope.pick(e[i, : counts[i]], FRAMES.step_s, thresholds[i], cycles[i])
        frames = int(len(samples) / RATE_HZ / 0.005)
        truth = frame_states(states, frames, 0.005)
        picked = frame_states(envelope.states(sounds, cycles[i]), frames, 0.005)
        scores.append(score_states(truth, picked, 0.005))
    rates = score_rates({k: sum(s[k] for s in scores) for k in scores[0]})
    assert rates["onset_f1_60ms"] > 0.9


def bumps(times_s, heights, seconds=6.0):
    """An envelope of 100 frames a second with a sound 60 ms wide at each time."""
    t = np.arange(round(seconds * 100)) / 100
    return sum(h * np.exp(-0.5 * ((t - at) / 0.02) ** 2) for at, h in zip(times_s, heights, strict=True)) - 0.3


def rhythm(cycles=6, cycle_s=0.9, systole_s=0.31):
    return sorted([0.2 + cycle_s * i for i in range(cycles)] + [0.2 + systole_s + cycle_s * i for i in range(cycles)])


def middles(sounds):
    return [round((start + end) / 2, 1) for start, end, _ in sounds]


def test_longer_interval_is_diastole():
    times = rhythm()
    sounds = envelope.pick(bumps(times, [3] * 12), 0.01, 0.5, 0.9)
    assert [s for _, _, s in sounds] == [S1, S2] * 6
    assert middles(sounds) == pytest.approx(times, abs=0.051)
    shifted = envelope.pick(bumps(times[1:], [3] * 11), 0.01, 0.5, 0.9)  # begins with S2
    assert [s for _, _, s in shifted] == [S2, S1] * 5 + [S2]


def test_extra_peak_goes():
    times = rhythm()
    extra = sorted([*times, times[3] + 0.13])  # a third sound, weaker
    heights = [1.5 if t == times[3] + 0.13 else 3 for t in extra]
    sounds = envelope.pick(bumps(extra, heights), 0.01, 0.5, 0.9)
    assert [s for _, _, s in sounds] == [S1, S2] * 6
    assert middles(sounds) == pytest.approx(times, abs=0.051)


def test_lost_peak_is_found_below_the_threshold():
    heights = [3] * 12
    heights[5] = 0.65  # 0.35 above silence at -0.3, the threshold at 0.5
    sounds = envelope.pick(bumps(rhythm(), heights), 0.01, 0.5, 0.9)
    assert [s for _, _, s in sounds] == [S1, S2] * 6
    gone = [t for i, t in enumerate(rhythm()) if i != 5]  # nothing to find there
    sounds = envelope.pick(bumps(gone, [3] * 11), 0.01, 0.5, 0.9)
    assert [s for _, _, s in sounds] == [S1, S2, S1, S2, S1, S1, S2, S1, S2, S1, S2]
    states = [s for _, _, s in envelope.states(sounds, 0.9)]
    assert states[:8] == [S1, SYSTOLE, S2, DIASTOLE, S1, SYSTOLE, S2, DIASTOLE]
    assert states[8:10] == [S1, S1]  # between them neither is known


@pytest.mark.parametrize(
    ("e", "cycle_s"),
    [(bumps([1.0], [3]), 0.9), (bumps(rhythm(), [3] * 12), float("nan")), (np.zeros(300), 0.8), (np.zeros(0), 0.8)],
)
def test_no_cycle(e, cycle_s):
    assert envelope.pick(e, 0.01, 0.5, cycle_s) == []


def test_silence_has_no_cycle_and_no_nan():
    e = jax.jit(lambda x, n: envelope.shannon_envelope(x, n, SOS, FRAMES))(jnp.zeros((1, 2000)), jnp.array([2000]))
    assert not e.any()
    assert np.isnan(envelope.cycle_s(e, jnp.array([199]), 0.01)[0])
    assert np.isfinite(envelope.threshold(np.asarray(e), np.array([199]))[0])


@pytest.mark.parametrize(("window_s", "hop_s"), [(0.02, 0.0001), (0.025, 0.01), (0.005, 0.01)])
def test_frames_that_do_not_fit(window_s, hop_s):
    with pytest.raises(ValueError, match="multiple of it"):
        envelope.frames(window_s, hop_s, RATE_HZ)
