"""Burg's autoregressive model and its power spectrum, for many stretches of ragged lengths at once, jit-able.

The lattice works on prediction errors, not on an autocorrelation, whose float32 rounding would be that of the squared
signal: the spectra of heart sounds, 60 dB deep, come out as in float64 (tests/test_burg.py; the oracle of the
coefficients is `librosa.lpc`). Inside, time is the leading axis: sums over it then add whole vectors of stretches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def burg(x_BxT: jax.Array, lengths_B: jax.Array, order: int) -> tuple[jax.Array, jax.Array]:
    """Reflection coefficients (B, order) and the variance (B,) of what the model leaves unpredicted.

    J. P. Burg, "Maximum Entropy Spectral Analysis", thesis, Stanford 1975.

    Args: x_BxT: of row b the first `lengths_B[b]` samples count; each must have more than `order`, as `check` ensures.
    Raises:
      ValueError: an order below 1, or rows of no more samples than that.
    """
    check(order, x_BxT.shape[1])
    x = jnp.asarray(x_BxT, jnp.float32).T
    time = jnp.arange(len(x))[:, None]
    inside = time < lengths_B[None]
    x = jnp.where(inside, x, 0)
    count = jnp.maximum(lengths_B, 1)

    def stage(carry, m):
        forward, backward = carry  # errors of order m - 1; of the backward one the sample before
        used = inside & (time >= m)
        forward, backward = jnp.where(used, forward, 0), jnp.where(used, backward, 0)
        top, bottom = (forward * backward).sum(0), (forward**2 + backward**2).sum(0)
        k = jnp.where(bottom > 0, -2 * top / jnp.where(bottom > 0, bottom, 1), 0)
        return (forward + k[None] * backward, _later(backward + k[None] * forward)), k

    _, k_PxB = jax.lax.scan(stage, (x, _later(x)), jnp.arange(1, order + 1))
    power = (x**2).sum(0) / count
    return k_PxB.T, power * jnp.prod(1 - k_PxB**2, axis=0)


def _later(x: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


def check(order: int, samples: int) -> None:
    """Raises ValueError where a stretch of so many samples has no model of this order."""
    if order < 1:
        raise ValueError(f"Burg order {order}: must be at least 1")
    if samples <= order:
        raise ValueError(f"{samples} samples are too few for Burg order {order}: it needs more than {order}")


def coefficients(k_BxP: jax.Array) -> jax.Array:
    """(B, P + 1) prediction-error filters 1, a_1, ..., a_P of reflection coefficients, as `librosa.lpc` gives them."""
    a = jnp.ones((len(k_BxP), 1), k_BxP.dtype)
    for k in k_BxP.T:
        a = jnp.pad(a, ((0, 0), (0, 1)))
        a = a + k[:, None] * a[:, ::-1]
    return a


def power_spectrum(k_BxP: jax.Array, variance_B: jax.Array, nfft: int, sample_rate_hz: float) -> jax.Array:
    """(B, nfft // 2 + 1) one-sided power a Hz at the frequencies `np.fft.rfftfreq(nfft, 1 / sample_rate_hz)`."""
    a = coefficients(k_BxP)
    turns = np.outer(np.arange(a.shape[1]), np.arange(nfft // 2 + 1)) * (2 * np.pi / nfft)
    real, imaginary = (
        jnp.matmul(a, part.astype(np.float32), precision="highest") for part in (np.cos(turns), np.sin(turns))
    )
    sides = np.full(nfft // 2 + 1, 2.0, np.float32)
    sides[0] = 1
    if nfft % 2 == 0:
        sides[-1] = 1
    # Constant samples are predicted without error: no variance, and at 0 Hz nothing to divide by.
    gain = jnp.maximum(real**2 + imaginary**2, jnp.finfo(jnp.float32).tiny)
    return jnp.asarray(sides / sample_rate_hz)[None] * variance_B[:, None] / gain
