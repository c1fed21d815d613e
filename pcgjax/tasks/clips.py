"""Classifiers of log-mel clips: the CNN with the H-infinity LSTM, and the image nets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from pcgjax.data.plan import Geometry
from pcgjax.datasets import audio
from pcgjax.features import filters, spectrogram, wavelet
from pcgjax.losses import LOSSES, penalty, recording_log_probabilities
from pcgjax.models.hinf_lstm import CNNLSTM
from pcgjax.models.image import ImageClassifier
from pcgjax.runtime.traced import is_known, is_on
from pcgjax.tasks.base import (
    Counts,
    Inputs,
    Task,
    Total,
    arithmetic_dtype,
    cut_windows,
    design_filter,
    target_labels,
    with_noise,
)


def hinf_lstm(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """The CNN with a recurrent layer on 5 s clips (H-infinity LSTM paper): noise, wavelet denoising, low-pass, clips,
    log-mel in dB below the clip's peak, CNN-LSTM; the loss is over clips, a recording's probability their mean.

    A recording that is shorter than a clip is one, padded, whose padding changes nothing; the rest of a longer one that
    does not fill a clip is left out.

    Raises:
      ValueError: a field that does not fit the prepared data's rate or another field; the message names it.
    """

    def init(rngs: nnx.Rngs) -> CNNLSTM:
        m = config.model
        frozen = "cnn" in tuple(config.optimizer.frozen)
        blocks = tuple(tuple(block) for block in m.blocks)
        return CNNLSTM(config.features.n_mels, blocks, m.hidden, m.cell, m.dropout, frozen, m.implementation, rngs=rngs)

    return _of_clips(config, sample_rate_hz, init, len(config.model.blocks))


def image(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """An image net (H-infinity LSTM paper, table II) on the clips of `hinf_lstm`, judged by the same losses.

    Raises: as `hinf_lstm`.
    """
    m = config.model
    if is_known(m.dropout) and not 0 <= m.dropout < 1:
        raise ValueError(f"model.dropout={m.dropout}: must be at least 0 and below 1")

    def init(rngs: nnx.Rngs) -> ImageClassifier:
        f = config.features
        frames = spectrogram.frames(round(f.window_s * sample_rate_hz), f.hop)
        blocks = m.blocks if isinstance(m.blocks, int) else tuple(m.blocks)
        return ImageClassifier(m.name, f.n_mels, frames, m.width, blocks, rngs=rngs)

    return _of_clips(config, sample_rate_hz, init)


def _of_clips(config: ml_collections.ConfigDict, sample_rate_hz: int, init: Callable, poolings: int = 0) -> Task:
    """The task of a model that hears log-mel clips; poolings: by 2, along time, that it needs frames for."""
    f, loss_ = config.features, config.loss
    if loss_.name not in LOSSES:
        raise ValueError(f"loss.name={loss_.name!r}: choose one of {', '.join(LOSSES)}")
    penalty(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), 0.5, loss_.alpha, loss_.normalize, loss_.slope)  # checks them
    clip = round(f.window_s * sample_rate_hz)
    sos, lead, gap = design_filter(f, f.high_hz, sample_rate_hz, "lowpass")
    if f.wavelet_level:
        try:
            free = wavelet.margins(f.wavelet_level)
        except ValueError as error:
            raise ValueError(f"features.wavelet_level={f.wavelet_level}: {error}; 0 for no denoising") from None
        support = wavelet.shortest(f.wavelet_level)
        shortest = min(clip, audio.SHORTEST_S * sample_rate_hz)
        if shortest < support:
            raise ValueError(
                f"features.wavelet_level={f.wavelet_level}: spans {support} samples, the shortest clip has "
                f"{shortest:.0f}; lower the level, or prepare the data at a higher rate"
            )
        lead, gap = (max(pair) for pair in zip((lead, gap), free, strict=True))
    try:
        spectrogram.mel_filterbank(sample_rate_hz, f.n_fft, f.n_mels, 0.0, sample_rate_hz / 2, f.htk)
    except ValueError as error:
        raise ValueError(f"features.n_fft, features.n_mels: {error}") from None
    if f.hop < 1 or clip < f.hop * 2**poolings:
        more = f" and {poolings} poolings" if poolings else ""
        raise ValueError(f"features.window_s={f.window_s}: {clip} samples are too few for features.hop={f.hop}{more}")
    geometry, dtype = Geometry(clip, clip, lead, gap), arithmetic_dtype(config.model)

    def inputs(batch: dict, capacity: int, key: jax.Array) -> Inputs:
        noise_key, _ = jax.random.split(key)
        where = filters.packing(batch["lengths"], batch["samples"].shape[0], lead, gap)
        x = with_noise(batch, where, f.noise_snr_db, noise_key)
        if f.wavelet_level:
            x = wavelet.denoise_packed(x, where, f.wavelet_level)
        if sos is not None:
            x = filters.filter_packed(sos, x, where, zero_phase=f.filter == "zero_phase")
        cut = cut_windows(x, where, geometry, capacity)
        mel, mask = clip_features(f, cut.samples, cut.real_samples * cut.real, sample_rate_hz)
        return Inputs((mel.astype(dtype), mask.astype(dtype)), cut.recording, cut.real)

    def features(model: Any, mel: jax.Array, mask: jax.Array) -> jax.Array:
        return model.features(mel, mask)

    def forward(model: Any, batch: dict, capacity: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, recording, real = inputs(batch, capacity, key)
        logits = model(*values, None, dropout=config.model.dropout).astype(jnp.float32)
        return recording_log_probabilities(logits, recording, real, len(batch["lengths"]))[:2]

    def loss(model: Any, batch: dict, capacity: int, key: jax.Array, threshold: jax.Array, total: Total):
        values, recording, real = inputs(batch, capacity, key)
        _, drop_key = jax.random.split(key)
        logits = model(*values, drop_key, total, config.model.dropout).astype(jnp.float32)
        return clip_loss(loss_, logits, batch["labels"][recording], real, threshold, total)

    labels = target_labels(config.task.target)
    return Task(geometry, init, forward, loss, labels, dtype=dtype, inputs=inputs, features=features)


def clip_features(f: ml_collections.ConfigDict, clips_BxT: jax.Array, own_B: jax.Array, sample_rate_hz: int):
    """Log-mel (B, n_mels, frames) and mask (B, frames) of clips (B, T) whose first own_B (B,) samples are real.

    1 is the loudest of the clip's own frames, 0 is `features.top_db` below it, and padding.
    """
    mel = spectrogram.log_mel(clips_BxT, sample_rate_hz, f.n_fft, f.hop, f.n_mels, htk=f.htk, ref=1.0, top_db=None)
    mask = (jnp.arange(mel.shape[-1])[None] * f.hop <= own_B[:, None]) & (own_B > 0)[:, None]
    peak = jnp.where(mask[:, None], mel, -jnp.inf).max((1, 2), keepdims=True)
    level = jnp.maximum(mel - jnp.where(jnp.isfinite(peak), peak, 0), -f.top_db)
    return jnp.where(mask[:, None], level / f.top_db + 1, 0), mask.astype(jnp.float32)


def clip_loss(loss_: ml_collections.ConfigDict, logits, labels, real, threshold, total: Total):
    """BCE or penalty-weighted BCE over clips, as `Task.loss` gives it."""
    log_p, log_q = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    mask = real.astype(logits.dtype)
    summed = -(mask * (labels * log_p + (1 - labels) * log_q)).sum()
    correct = (((jnp.exp(log_p) >= threshold) == (labels > 0)) & real).sum(dtype=jnp.int32)
    counts = Counts(summed, correct, real.sum(dtype=jnp.int32))
    if loss_.name == "bce":
        return summed, counts
    factor, slope_term = penalty(log_p, labels, mask, threshold, loss_.alpha, loss_.normalize, loss_.slope, total)
    factor = jax.lax.stop_gradient(factor)
    objective = factor * summed
    if is_on(loss_.slope):  # the product rule's other half; its value is zero
        objective += jax.lax.stop_gradient(total(summed)) * (slope_term - jax.lax.stop_gradient(slope_term))
    return objective, counts._replace(loss=jax.lax.stop_gradient(factor * summed))
