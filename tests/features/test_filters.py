"""Filters and z-scores against SciPy and NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from pcgjax.features import filters

DESIGNS = {
    "band": (4, (25.0, 400.0), 1000.0, "bandpass"),
    "narrow band": (3, (20.0, 150.0), 2000.0, "bandpass"),
    "low": (2, 150.0, 1000.0, "lowpass"),
    "odd low": (5, 60.0, 1000.0, "lowpass"),
    "high": (4, 25.0, 2000.0, "highpass"),
    "odd high": (3, 40.0, 1000.0, "highpass"),
}
design = pytest.mark.parametrize("name", DESIGNS)


def close(got, expected, tolerance=2e-6):
    """Equal to within `tolerance` of the largest value: what float32 can say."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-30))


@design
def test_butterworth_is_scipys(name):
    order, cutoff_hz, rate_hz, kind = DESIGNS[name]
    np.testing.assert_array_equal(
        filters.butterworth(*DESIGNS[name]), scipy.signal.butter(order, cutoff_hz, kind, fs=rate_hz, output="sos")
    )


@design
def test_settling_is_where_the_response_ends(name):
    sos = filters.butterworth(*DESIGNS[name])
    settled = filters.settling_samples(sos)
    response = np.abs(scipy.signal.sosfilt(sos, np.eye(1, 20_000)[0]))
    assert response[settled:].sum() < 1e-8 <= response[settled - 1 :].sum()


def test_settling_of_a_filter_that_does_not():
    with pytest.raises(ValueError, match="does not settle"):
        filters.settling_samples(np.array([[1.0, 0, 0, 1, -1, 0]]))  # an integrator


@design
def test_edge_is_scipys(name):
    sos = filters.butterworth(*DESIGNS[name])
    edge = filters.edge_samples(sos)
    scipy.signal.sosfiltfilt(sos, np.ones(edge + 1))
    with pytest.raises(ValueError, match="padlen"):
        scipy.signal.sosfiltfilt(sos, np.ones(edge))


@design
@pytest.mark.parametrize("length", [64, 3333])
def test_equal_scipy(name, length):
    sos = filters.butterworth(*DESIGNS[name])
    # A large offset and a ramp show how the ends are treated.
    x = np.random.default_rng(length).standard_normal(length) + 3 + np.linspace(0, 2, length)
    x = x.astype(np.float32)
    one_way, both_ways = jax.jit(lambda x: (filters.sosfilt(sos, x), filters.sosfiltfilt(sos, x)))(x)
    close(one_way, scipy.signal.sosfilt(sos, x.astype(np.float64)))
    close(both_ways, scipy.signal.sosfiltfilt(sos, x.astype(np.float64)), 5e-6)


def test_batch_axes():
    sos = filters.butterworth(*DESIGNS["band"])
    x = np.random.default_rng(0).standard_normal((2, 3, 777)).astype(np.float32)
    one_way, both_ways = jax.jit(lambda x: (filters.sosfilt(sos, x), filters.sosfiltfilt(sos, x)))(x)
    close(one_way, scipy.signal.sosfilt(sos, x.astype(np.float64)))
    close(both_ways, scipy.signal.sosfiltfilt(sos, x.astype(np.float64)), 5e-6)


@pytest.mark.parametrize("zero_phase", [False, True])
@pytest.mark.parametrize("name", ["band", "odd low"])
def test_gradient_is_the_transpose(name, zero_phase):
    # The filter is linear, y = A x, so the gradient of sum(w y) is A' w.
    length = 203
    sos = filters.butterworth(*DESIGNS[name])
    oracle = scipy.signal.sosfiltfilt if zero_phase else scipy.signal.sosfilt
    ours = filters.sosfiltfilt if zero_phase else filters.sosfilt
    w, x = np.random.default_rng(1).standard_normal((2, length)).astype(np.float32)
    matrix = oracle(sos, np.eye(length), axis=0)
    close(jax.jit(jax.grad(lambda x: (w * ours(sos, x)).sum()))(x), matrix.T @ w.astype(np.float64), 1e-5)


def packed(recordings, lead, gap, extra_rows=0):
    """A buffer made by hand: each recording on a row of its own after `lead`, and its Packing."""
    lengths = np.array([len(r) for r in recordings])
    position, pieces = 0, []
    for r in recordings:
        if len(r):
            position += -(-lead // filters.ALIGN) * filters.ALIGN
            pieces.append((position, r))
            position += -(-(len(r) + gap) // filters.ALIGN) * filters.ALIGN
    buffer = np.zeros(position + extra_rows * filters.ALIGN, np.float32)
    for start, r in pieces:
        buffer[start : start + len(r)] = r
    buffer = buffer.reshape(-1, filters.ALIGN)
    return buffer, filters.packing(jnp.asarray(lengths), len(buffer), lead, gap), [start for start, _ in pieces]


def unpacked(buffer, where):
    flat = np.asarray(buffer).reshape(-1)
    return [flat[s : s + n] for s, n in zip(np.asarray(where.starts), np.asarray(where.lengths), strict=True) if n]


def recordings_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(n) + rng.standard_normal()).astype(np.float32) for n in lengths]


def test_packing_says_where_everything_is():
    recordings = recordings_of([100, 0, 64, 1, 129])
    buffer, where, starts = packed(recordings, lead=10, gap=70, extra_rows=3)
    assert list(np.asarray(where.starts)[[0, 2, 3, 4]]) == starts
    assert int(where.inside.sum()) == 294
    whose = np.repeat(np.asarray(where.recording)[:, None], filters.ALIGN, axis=1)
    for i in (0, 2, 3, 4):
        samples = np.asarray(where.inside) & (whose == i)
        np.testing.assert_array_equal(buffer[samples], recordings[i])
        np.testing.assert_array_equal(np.asarray(where.offset)[samples], np.arange(len(recordings[i])))


@pytest.mark.parametrize("zero_phase", [False, True])
@pytest.mark.parametrize("lengths", [[600, 91, 1500], [0, 333, 0, 0, 64, 2001, 0], [0], [128, 128, 128, 128]])
def test_packed_recordings_equal_scipy_one_by_one(lengths, zero_phase):
    sos = filters.butterworth(*DESIGNS["band"])
    lead = filters.edge_samples(sos)
    gap = lead + filters.settling_samples(sos)
    recordings = recordings_of(lengths)
    buffer, where, _ = packed(recordings, lead, gap, extra_rows=2)
    got = jax.jit(lambda b: filters.filter_packed(sos, b, where, zero_phase))(buffer)
    oracle = scipy.signal.sosfiltfilt if zero_phase else scipy.signal.sosfilt
    for y, x in zip(unpacked(got, where), filter(len, recordings), strict=True):
        close(y, oracle(sos, x.astype(np.float64)), 5e-6)
    assert not np.asarray(got)[~np.asarray(where.inside)].any()


@pytest.mark.parametrize("zero_phase", [False, True])
def test_a_loud_recording_does_not_leak_into_its_neighbours(zero_phase):
    sos = filters.butterworth(*DESIGNS["band"])
    lead = filters.edge_samples(sos)
    gap = lead + filters.settling_samples(sos)
    quiet, loud, after = recordings_of([501, 700, 333])
    run = jax.jit(lambda buffer, where: filters.filter_packed(sos, buffer, where, zero_phase))
    for gain in (100, 1e5):
        buffer, where, _ = packed([quiet, loud * np.float32(gain), after], lead, gap)
        outputs = unpacked(run(buffer, where), where)
        oracle = scipy.signal.sosfiltfilt if zero_phase else scipy.signal.sosfilt
        # They share transforms, whose float32 rounding is of the order of the louder one; nothing else may pass.
        for y, x in ((outputs[0], quiet), (outputs[2], after)):
            assert np.abs(y - oracle(sos, x.astype(np.float64))).max() < 2e-6 * gain + 2e-5


def test_packed_gradients_stay_within_a_recording():
    sos = filters.butterworth(*DESIGNS["band"])
    lead = filters.edge_samples(sos)
    gap = lead + filters.settling_samples(sos)
    recordings = recordings_of([205, 0, 160])
    buffer, where, starts = packed(recordings, lead, gap)
    w = np.random.default_rng(5).standard_normal(buffer.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda b: (w * filters.filter_packed(sos, b, where, True)).sum()))(buffer)
    gradient = np.asarray(gradient).reshape(-1)
    used = np.zeros(buffer.size, bool)
    for start, x in zip(starts, filter(len, recordings), strict=True):
        part = slice(start, start + len(x))
        used[part] = True
        matrix = scipy.signal.sosfiltfilt(sos, np.eye(len(x)), axis=0)
        close(gradient[part], matrix.T @ w.reshape(-1)[part].astype(np.float64), 1e-5)
    assert not gradient[~used].any()


def test_zscore_equals_numpy():
    recordings = [*recordings_of([300, 0, 77, 1001]), np.full(130, 0.25, np.float32)]
    recordings[0] = recordings[0] * 1e-4 + 0.01  # a quiet recording with an offset
    buffer, where, _ = packed(recordings, 5, 0)
    got = jax.jit(filters.zscore_packed)(buffer, where)
    for y, x in zip(unpacked(got, where)[:3], filter(len, recordings[:4]), strict=True):
        x = x.astype(np.float64)
        close(y, (x - x.mean()) / x.std(), 2e-5)
    assert not unpacked(got, where)[3].any()  # a constant recording has no deviation to divide by
    assert not np.asarray(got)[~np.asarray(where.inside)].any()


def test_zscore_gradient_is_finite_and_right():
    recordings = [*recordings_of([90, 0, 130]), np.full(70, 0.25, np.float32)]
    buffer, where, starts = packed(recordings, 0, 0)
    w = np.random.default_rng(2).standard_normal(buffer.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda b: (w * filters.zscore_packed(b, where)).sum()))(buffer)
    gradient = np.asarray(gradient).reshape(-1)
    assert np.isfinite(gradient).all()
    for start, x in zip(starts[:2], (recordings[0], recordings[2]), strict=True):
        part = slice(start, start + len(x))
        weights, z = w.reshape(-1)[part].astype(np.float64), (x - x.mean(dtype=np.float64)) / x.std(dtype=np.float64)
        close(gradient[part], (weights - weights.mean() - z * (weights * z).mean()) / x.std(dtype=np.float64), 1e-4)


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_noise_has_the_asked_power(snr_db):
    recordings = [x * scale for x, scale in zip(recordings_of([40_000, 0, 60_000]), (0.01, 1, 5), strict=True)]
    buffer, where, _ = packed(recordings, 5, 10)
    noisy = filters.add_white_noise(buffer, where, snr_db, jax.random.key(0))
    for y, x in zip(unpacked(noisy, where), filter(len, recordings), strict=True):
        assert 10 * np.log10(x.var() / (y - x).var()) == pytest.approx(snr_db, abs=0.15)
        assert abs((y - x).mean()) < 0.02 * (y - x).std()
    assert not np.asarray(noisy)[~np.asarray(where.inside)].any()
    other = filters.add_white_noise(buffer, where, snr_db, jax.random.key(1))
    assert not np.array_equal(noisy, other)


@pytest.mark.parametrize(
    ("cutoff_hz", "kind"),
    [
        ((25.0, 500.0), "bandpass"),
        ((0.0, 400.0), "bandpass"),
        ((400.0, 25.0), "bandpass"),
        (500.0, "lowpass"),
        (-1.0, "highpass"),
    ],
)
def test_cutoff_that_does_not_fit(cutoff_hz, kind):
    with pytest.raises(ValueError, match=r"cut-off .* Hz does not fit a rate of 1000"):
        filters.butterworth(4, cutoff_hz, 1000, kind)


def test_too_short_for_zero_phase():
    sos = filters.butterworth(*DESIGNS["band"])
    edge = filters.edge_samples(sos)
    with pytest.raises(ValueError, match=f"{edge} samples are too few .* more than {edge}"):
        filters.sosfiltfilt(sos, np.ones(edge, np.float32))
    x = np.random.default_rng(0).standard_normal(edge + 1).astype(np.float32)
    close(filters.sosfiltfilt(sos, x), scipy.signal.sosfiltfilt(sos, x.astype(np.float64)), 5e-6)
