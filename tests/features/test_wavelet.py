"""Wavelet transform and denoising against PyWavelets in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt

from pcgjax.features import filters, wavelet


def oracle(x, level=4):
    """One recording: universal soft threshold by PyWavelets and NumPy, float64."""
    approximation, *details = pywt.wavedec(np.asarray(x, np.float64), "db4", "symmetric", level)
    threshold = np.median(np.abs(details[-1])) / 0.6745 * np.sqrt(2 * np.log(len(x)))
    shrunk = [np.sign(detail) * np.maximum(np.abs(detail) - threshold, 0) for detail in details]
    return pywt.waverec([approximation, *shrunk], "db4", "symmetric")[: len(x)]


def beats(samples, seed=0, loudness=1.0):
    """Noise with low tones that come and go: coefficients on both sides of the threshold."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 1000
    tones = np.sin(2 * np.pi * 40 * t) * np.maximum(0, np.sin(2 * np.pi * 1.3 * t + seed)) ** 8
    return (loudness * (tones + 0.1 * rng.standard_normal(samples) + 0.2)).astype(np.float32)


def close(got, expected, tolerance=3e-6):
    """Equal to within `tolerance` of the largest value."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-30))


ROWS, PLACES = 72, 7  # one shape for all, compiled once


def packed(recordings, level=4, fill=0.0):
    """(buffer, Packing): the recordings laid out with the level's margins, `fill` everywhere else."""
    lengths = np.zeros(PLACES, int)
    lengths[: len(recordings)] = [len(r) for r in recordings]
    margins = wavelet.margins(level)
    starts, rows = filters.starts_of(lengths, *margins)
    assert rows <= ROWS
    buffer = np.full(ROWS * filters.ALIGN, fill, np.float32)
    for start, r in zip(starts, recordings, strict=False):
        buffer[start : start + len(r)] = r
    return buffer.reshape(ROWS, filters.ALIGN), filters.packing(jnp.asarray(lengths), ROWS, *margins)


def unpacked(buffer, where):
    flat = np.asarray(buffer).reshape(-1)
    return [flat[s : s + n] for s, n in zip(np.asarray(where.starts), np.asarray(where.lengths), strict=True) if n]


run = jax.jit(wavelet.denoise_packed, static_argnames="level")
denoise = jax.jit(wavelet.denoise, static_argnames="level")
gradient = jax.jit(jax.grad(lambda b, where, w: (w * wavelet.denoise_packed(b, where, 2)).sum()))


def test_the_wavelet_is_daubechies_4():
    db4, low = pywt.Wavelet("db4"), np.array(wavelet._LOW)
    np.testing.assert_allclose(low, db4.rec_lo, rtol=0, atol=1e-16)
    np.testing.assert_allclose(wavelet._HIGH, db4.rec_hi, rtol=0, atol=1e-16)
    # What defines it: orthonormal to its even shifts, and four vanishing moments of the high-pass.
    np.testing.assert_allclose([low[: 8 - s] @ low[s:] for s in (0, 2, 4, 6)], [1, 0, 0, 0], atol=1e-12)
    moments = [np.arange(8.0) ** k @ np.array(wavelet._HIGH) for k in range(4)]
    np.testing.assert_allclose(moments, np.zeros(4), atol=1e-8)


@pytest.mark.parametrize(("samples", "level"), [(14, 1), (15, 1), (112, 4), (1001, 5)])
def test_transform_is_pywts(samples, level):
    x = np.stack([beats(samples, seed) for seed in range(6)]).reshape(2, 3, samples)
    got = jax.jit(lambda x: wavelet.wavedec(x, level))(x)
    expected = pywt.wavedec(x.astype(np.float64), "db4", "symmetric", level)
    assert len(got) == len(expected) == level + 1
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.float32
        close(a, b)
    # Any coefficients, not only those of a signal.
    rng = np.random.default_rng(1)
    coefficients = [rng.standard_normal(c.shape).astype(np.float32) for c in expected]
    back = jax.jit(wavelet.waverec)
    close(back(coefficients), pywt.waverec([c.astype(np.float64) for c in coefficients], "db4", "symmetric"))
    close(back(got)[..., :samples], x)


def test_too_short_for_the_level():
    for level in (1, 2, 4):
        needed = next(n for n in range(1, 1000) if pywt.dwt_max_level(n, "db4") == level)
        jax.eval_shape(lambda x, level=level: wavelet.wavedec(x, level), jnp.zeros(needed))
        with pytest.raises(ValueError, match=f"{needed - 1} samples are too few .* level {level}, .* needs {needed}"):
            wavelet.wavedec(jnp.zeros(needed - 1), level)
    with pytest.raises(ValueError, match=r"level 4, which needs 112; level 2 fits"):
        wavelet.denoise(jnp.zeros((3, 55)))
    with pytest.raises(ValueError, match=r"even level 1 needs 14"):
        wavelet.denoise(jnp.zeros(13))
    with pytest.raises(ValueError, match=r"level 0: must be at least 1"):
        wavelet.wavedec(jnp.zeros(100), 0)


@pytest.mark.parametrize("counts", [[5, 0, 8, 1], [40, 41, 0, 2]])
def test_median_is_numpys(counts):
    rng = np.random.default_rng(0)
    widths, rows, recording, values = 8, [], [], []
    for r, count in enumerate(counts):
        # Ties, zeros and a wide range of sizes.
        sizes = np.abs(rng.standard_normal(count) * 10.0 ** rng.integers(-30, 30, count)).astype(np.float32)
        sizes[::5], sizes[1::4] = 0, sizes[:1]
        table = np.full(-(-count // widths) * widths + widths, np.inf, np.float32)
        table[rng.permutation(len(table))[:count]] = sizes
        rows.append(table.reshape(-1, widths))
        recording += [r] * len(rows[-1])
        values.append(sizes)
    got = jax.jit(wavelet._median)(np.concatenate(rows), np.array(recording), np.array(counts))
    np.testing.assert_array_equal(got, [np.median(v) if len(v) else 0 for v in values])


@pytest.mark.parametrize(("samples", "level"), [(2001, 4), (1500, 5)])
def test_denoise_is_pywts(samples, level):
    x = np.stack([beats(samples, seed, 10.0**-seed) for seed in range(4)]).reshape(2, 2, samples)
    got = denoise(x, level=level)
    for i, j in np.ndindex(2, 2):
        close(got[i, j], oracle(x[i, j], level))
        # The test is one of thresholds that act, and not on everything.
        assert 0.05 < np.abs(got[i, j] - x[i, j]).max() / np.abs(x[i, j]).max() < 0.95


# 23 + 64 k samples: every level's number of coefficients is odd, and the margins of level 4 end with a row.
@pytest.mark.parametrize("lengths", [[2000, 343, 1111], [0, 333, 0, 0, 112, 2001, 0], [343] * 7, [1024, 128], []])
@pytest.mark.parametrize("level", [4, 1])
def test_packed_recordings_are_pywts_one_by_one(lengths, level):
    recordings = [beats(n, seed, 10.0 ** (seed % 3)) for seed, n in enumerate(lengths)]
    buffer, where = packed(recordings, level)
    got = run(buffer, where, level=level)
    assert got.dtype == jnp.float32
    for y, x in zip(unpacked(got, where), filter(len, recordings), strict=True):
        close(y, oracle(x, level))
    assert not np.asarray(got)[~np.asarray(where.inside)].any()


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_margins_are_the_widest_reach(level):
    reach = []
    for samples in range(1, 300):
        counts = [samples]
        for _ in range(level):
            counts.append((counts[-1] + 7) // 2)
        mirrored = [(n + 7) << j for j, n in enumerate(counts[:-1])]
        reach.append(max([*mirrored, counts[-1] << level]) - samples)
    assert wavelet.margins(level) == (max(6 << j for j in range(level)), max(reach))


def test_a_recording_does_not_depend_on_its_neighbours_or_on_what_lies_between():
    quiet, loud, after = beats(501, 0), beats(700, 1, 1e6), beats(343, 2)
    buffer, where = packed([quiet, loud, after])
    together = unpacked(run(buffer, where), where)
    for y, x in ((together[0], quiet), (together[2], after)):
        close(y, oracle(x))
    other, _ = packed([quiet, -3 * loud[::-1], after], fill=7.0)
    changed = unpacked(run(other, where), where)
    close(changed[0], together[0], 1e-7)
    close(changed[2], together[2], 1e-7)


@pytest.mark.filterwarnings("ignore:Level value of")
def test_recordings_too_short_for_the_level_stay_finite():
    recordings = [beats(n, n) for n in (1, 2, 3, 5, 13, 40, 111)]
    buffer, where = packed(recordings)
    for y, x in zip(unpacked(run(buffer, where), where), recordings, strict=True):
        close(y, oracle(x), 1e-5)


def test_silence_stays_silent():
    buffer, where = packed([np.zeros(300, np.float32), np.full(200, 0.25, np.float32)])
    silent, constant = unpacked(run(buffer, where), where)
    assert not silent.any()
    np.testing.assert_allclose(constant, 0.25, atol=1e-6)
    assert np.isfinite(gradient(buffer, where, np.ones_like(buffer))).all()


def test_gradients_are_right_and_stay_within_a_recording():
    recordings = [beats(n, n) for n in (160, 0, 343, 131)]
    buffer, where = packed(recordings)
    w = np.random.default_rng(5).standard_normal(buffer.shape).astype(np.float32)
    got = np.asarray(gradient(buffer, where, w))
    assert not got[~np.asarray(where.inside)].any()
    rng, step = np.random.default_rng(6), 1e-6
    for gradient_T, weights, x in zip(unpacked(got, where), unpacked(w, where), filter(len, recordings), strict=True):
        direction = rng.standard_normal(len(x))
        above, below = ((weights * oracle(x + side * direction, 2)).sum() for side in (step, -step))
        quotient = (above - below) / (2 * step)
        assert gradient_T @ direction == pytest.approx(quotient, rel=1e-3, abs=1e-3)


def test_inside_vmap_and_scan():
    sets = [[beats(400 + i, i), beats(901 - 7 * i, i + 4)] for i in range(4)]
    batches = [packed(recordings) for recordings in sets]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(2, 2, *leaves[0].shape), *batches)
    groups = jax.vmap(lambda x, where: wavelet.denoise_packed(x, where, 2))
    out = jax.lax.scan(lambda _, batch: (None, groups(*batch)), None, stacked)[1]
    for i, (recordings, (_, where)) in enumerate(zip(sets, batches, strict=True)):
        for y, x in zip(unpacked(out[i // 2, i % 2], where), recordings, strict=True):
            close(y, oracle(x, 2))


@pytest.mark.parametrize("level", [0, 5])
def test_levels_a_buffer_cannot_hold(level):
    with pytest.raises(ValueError, match=f"level {level}: choose 1 to 4"):
        wavelet.margins(level)
    buffer, where = packed([beats(500)])
    with pytest.raises(ValueError, match=f"level {level}: choose 1 to 4"):
        wavelet.denoise_packed(buffer, where, level)
