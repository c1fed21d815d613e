"""Burg's model against librosa's, and against the same lattice in NumPy's float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from pcgjax.features import burg


@pytest.fixture(autouse=True, scope="module")
def optimized():
    """Not as other tests: unless they are vectorised, the sums here are exact to fewer places."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def lattice(x, order):
    """Reflection coefficients and variance in float64, as Burg 1975 has them."""
    forward, backward, k = x[1:], x[:-1], []
    for _ in range(order):
        k.append(-2 * (forward @ backward) / (forward @ forward + backward @ backward))
        forward, backward = (forward + k[-1] * backward)[1:], (backward + k[-1] * forward)[:-1]
    return np.array(k), np.mean(x**2) * np.prod(1 - np.array(k) ** 2)


@pytest.fixture(scope="module")
def ragged():
    """Resonances at 60 and 150 Hz, 4 kHz: spectra 60 dB deep; rows of 700 samples with 41 to 700 in use."""
    rng = np.random.default_rng(0)
    lengths = np.array([41, 256, 333, 511, 700])
    x = np.zeros((len(lengths), 700))
    t = np.arange(700) / 4000
    for row, n in zip(x, lengths, strict=True):
        tones = [np.sin(2 * np.pi * hz * t + rng.uniform(0, 6)) * np.exp(-t * 8) for hz in (60, 150)]
        row[:n] = (sum(tones) + 1e-3 * rng.normal(size=700))[:n]
    return x, lengths


@pytest.mark.parametrize("order", [1, 7, 30])
def test_coefficients_are_librosas(ragged, order):
    x, lengths = ragged
    k, variance = jax.jit(burg.burg, static_argnums=2)(x.astype(np.float32), lengths, order)
    a = jax.jit(burg.coefficients)(k)
    for row, n, own_k, own_a, own_variance in zip(x, lengths, k, a, variance, strict=True):
        expected_k, expected = lattice(row[:n], order)
        np.testing.assert_allclose(own_k, expected_k, atol=2e-4)
        np.testing.assert_allclose(own_variance, expected, rtol=2e-3)
        expected_a = librosa.lpc(row[:n], order=order)
        np.testing.assert_allclose(own_a, expected_a, atol=3e-4 * np.abs(expected_a).max())


@pytest.mark.parametrize("nfft", [512, 511])
def test_spectrum_is_float64s(ragged, nfft):
    x, lengths = ragged
    order = 10
    k, variance = burg.burg(x.astype(np.float32), jnp.asarray(lengths), order)
    spectra = np.asarray(burg.power_spectrum(k, variance, nfft, 4000.0))
    assert spectra.shape == (len(x), nfft // 2 + 1)
    for row, n, spectrum in zip(x, lengths, spectra, strict=True):
        _, expected = lattice(row[:n], order)
        power = expected / 4000 * 2 / np.abs(np.fft.rfft(librosa.lpc(row[:n], order=order), nfft)) ** 2
        power[0] /= 2
        if nfft % 2 == 0:
            power[-1] /= 2
        assert np.ptp(10 * np.log10(power)) > 40
        np.testing.assert_allclose(10 * np.log10(spectrum), 10 * np.log10(power), atol=0.05)


def test_spectrum_integrates_to_the_power():
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(1, 4000)))
    k, variance = burg.burg(x, jnp.array([4000]), 4)
    power = burg.power_spectrum(k, variance, 4096, 1000.0)
    np.testing.assert_allclose(power.sum() * 1000 / 4096, np.mean(x**2), rtol=2e-3)


def test_what_lies_after_a_stretch_does_not_count(ragged):
    x, lengths = ragged
    dirty = np.where(np.arange(x.shape[1]) < lengths[:, None], x, 1e3)
    for one, other in zip(burg.burg(x, lengths, 8), burg.burg(dirty, lengths, 8), strict=True):
        np.testing.assert_array_equal(one, other)


def test_gradients_are_finite_and_right(ragged):
    x, lengths = (jnp.asarray(v) for v in (np.float32(ragged[0]), ragged[1]))
    x = x.at[0].set(0)  # silence, whose gradient must not be NaN

    def power(x):
        k, variance = burg.burg(x, lengths, 6)
        return jnp.log(burg.power_spectrum(k, variance, 64, 4000.0)[1:]).sum()

    power = jax.jit(power)
    gradient = jax.jit(jax.grad(power))(x)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[1:]).max() > 0
    along = jnp.where(jnp.arange(x.shape[1])[None] < lengths[:, None], x, 0) * 1e-2
    by_steps = (power(x + along) - power(x - along)) / 2
    np.testing.assert_allclose((gradient * along).sum(), by_steps, rtol=2e-2)


@pytest.mark.parametrize(("order", "samples", "message"), [(0, 9, "at least 1"), (9, 9, "9 samples are too few")])
def test_order_and_samples_that_do_not_fit(order, samples, message):
    with pytest.raises(ValueError, match=message):
        burg.burg(jnp.ones((2, samples)), jnp.full(2, samples), order)


def test_constant_samples_have_no_power_left():
    x = np.full((2, 60), 0.25, np.float32)
    x[1, 40:] = 0
    k, variance = burg.burg(x, jnp.array([60, 40]), 10)
    np.testing.assert_array_equal(burg.power_spectrum(k, variance, 64, 1000.0), 0)
