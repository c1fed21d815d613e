"""Augmentation of log-mel frames: rate, bands, response and noise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pcgjax.runtime.traced import is_on

_FEATURE_DB = 20 / math.log(10)  # of one unit of `frame_features`: 2 nats of power


def stretched(
    key: jax.Array, x_BxTxF: jax.Array, real_BxT: jax.Array, share: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each item made slower or faster by up to `share`, about its middle: another heart rate, the same sounds.

    Returns: (frames, which of them are real, the frame (B, T) that each was).
    """
    frames = x_BxTxF.shape[1]
    middle = (frames - 1) / 2
    rate = jax.random.uniform(key, (len(x_BxTxF), 1), minval=1 - share, maxval=1 + share)
    source = jnp.round(middle + (jnp.arange(frames)[None] - middle) * rate).astype(jnp.int32)
    inside, source = (source >= 0) & (source < frames), source.clip(0, frames - 1)
    real = inside & jnp.take_along_axis(real_BxT, source, 1)
    return jnp.where(real[..., None], jnp.take_along_axis(x_BxTxF, source[..., None], 1), 0), real, source


def masked_bands(key: jax.Array, x_BxTxF: jax.Array, most: int) -> jax.Array:
    """SpecAugment's frequency mask (Park et al. 2019): in each item up to `most` neighbouring bands are set to 0."""
    if not most:
        return x_BxTxF
    batch, bands = x_BxTxF.shape[0], x_BxTxF.shape[2]
    one, two = jax.random.split(key)
    size = jax.random.randint(one, (batch, 1), 0, most + 1)
    first = (jax.random.uniform(two, (batch, 1)) * (bands - size + 1)).astype(jnp.int32)
    band = jnp.arange(bands)[None]
    return jnp.where(((band >= first) & (band < first + size))[:, None], 0, x_BxTxF)


def recoloured(key: jax.Array, x_BxTxF: jax.Array, real_BxT: jax.Array, response_db: float, noise: bool) -> jax.Array:
    """Log-mel frames as another stethoscope in another room would have given them, each item anew.

    A frequency response that varies slowly over the bands, `response_db` dB its standard deviation at the edges;
    with `noise`, stationary noise of another such colour, from inaudible to as loud as the mean frame.
    """
    if not is_on(response_db) and not noise:
        return x_BxTxF
    batch, _, bands = x_BxTxF.shape
    response_key, colour_key, level_key, power_key = jax.random.split(key, 4)
    order = jnp.arange(1, 4)
    shape = jnp.cos(jnp.pi * order[:, None] * (jnp.arange(bands)[None] + 0.5) / bands) / order[:, None]
    scale = response_db / _FEATURE_DB / 1.17  # sqrt(1 + 1/4 + 1/9)

    def curve(key: jax.Array) -> jax.Array:
        return scale * (jax.random.normal(key, (batch, len(order))) @ shape)[:, None]

    x = x_BxTxF + curve(response_key)
    if noise:
        level = jax.random.uniform(level_key, (batch, 1, 1), minval=-5.0, maxval=0.0) + curve(colour_key)
        power = jnp.log(jax.random.exponential(power_key, x.shape) + 1e-6)
        x = jnp.logaddexp(2 * x, 2 * level + power) / 2
    real = real_BxT[..., None]
    mean = jnp.where(real, x, 0).sum((1, 2), keepdims=True) / (jnp.maximum(real.sum(1, keepdims=True), 1) * bands)
    return jnp.where(real, x - mean, 0)
