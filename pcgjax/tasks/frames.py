"""What a segmenter is given of its samples: log-mel frames whatever the gain, or SSAMBA's filter bank."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections

from pcgjax.features import spectrogram
from pcgjax.models.ssamba import PATCH

SSAMBA_RATE_HZ = 16000
FBANK_S = (400, 160)  # samples of a filter bank's frame, and from one to the next


def frame_hop(config: ml_collections.ConfigDict, sample_rate_hz: int) -> tuple[int, int]:
    """(samples a frame, samples by which what it is computed from is longer on either side).

    Raises:
      ValueError: the step is no whole number of samples, or the analysis window or the mel bands do not fit.
    """
    f, name = config.features, config.model.name
    hop = round(f.step_s * sample_rate_hz)
    if hop < 1 or abs(hop - f.step_s * sample_rate_hz) > 1e-6:
        raise ValueError(f"features.step_s={f.step_s}: must be a whole number of samples at {sample_rate_hz} Hz")
    if name == "ssamba":
        if sample_rate_hz != SSAMBA_RATE_HZ:
            raise ValueError(f"model.name=ssamba hears {SSAMBA_RATE_HZ} Hz, the data are prepared at {sample_rate_hz}")
        if hop % FBANK_S[1] or hop > PATCH * FBANK_S[1]:
            raise ValueError(f"features.step_s={f.step_s}: of SSAMBA a multiple of 0.01, at most {PATCH / 100}")
        return hop, ((PATCH - 1) * FBANK_S[1] + FBANK_S[0] - hop) // 2
    if name != "frames":
        raise ValueError(f"model.name={name!r}: choose frames or ssamba")
    if f.n_fft < hop or (f.n_fft - hop) % 2:
        raise ValueError(f"features.n_fft={f.n_fft}: must be features.step_s, {hop} samples, and an even number more")
    try:
        spectrogram.mel_filterbank(sample_rate_hz, f.n_fft, f.n_mels, f.low_hz, f.high_hz)
    except ValueError as error:
        raise ValueError(f"features.n_fft, features.n_mels, features.low_hz, features.high_hz: {error}") from None
    return hop, (f.n_fft - hop) // 2


_LEVEL_FRAMES = 100  # time constant of the running level
_SILENCE = 1e-20  # mel power


def frame_features(
    config: ml_collections.ConfigDict,
    samples_BxS: jax.Array,
    real_BxT: jax.Array,
    sample_rate_hz: int,
    level: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Log-mel (B, T, n_mels) of T frames from their samples and `halo` more on either side, whatever the gain.

    Of SSAMBA its filter bank (B, T', 128), which depends on the gain as published.

    The level that is taken off is the mean of the window's real frames; causal, the running mean of the frames so far,
    (B,) sum and weight of which are `level`, and are returned for the next piece of the recording.
    """
    f = config.features
    before = (jnp.zeros(len(samples_BxS)), jnp.zeros(len(samples_BxS))) if level is None else level
    if config.model.name == "ssamba":
        return ssamba_input(samples_BxS), before
    hop, _ = frame_hop(config, sample_rate_hz)
    mel = spectrogram.mel_of_frames(samples_BxS, sample_rate_hz, f.n_fft, hop, f.n_mels, f.low_hz, f.high_hz)
    # Digital silence has no level to take off; all else is far above this floor.
    x = jnp.log(mel + _SILENCE)
    loud, real = x.mean(-1), (real_BxT & (mel.max(-1) > _SILENCE)).astype(x.dtype)
    if config.model.bidirectional:
        mean = ((loud * real).sum(1) / jnp.maximum(real.sum(1), 1))[:, None]
    else:

        def running(carry, now):
            total, weight = (c * (1 - 1 / _LEVEL_FRAMES) + n for c, n in zip(carry, now, strict=True))
            return (total, weight), total / jnp.maximum(weight, 1e-6)

        before, mean = jax.lax.scan(running, before, ((loud * real).T, real.T))
        mean = mean.T
    # 8 nats below the level is silence; 2 nats are about a standard deviation.
    return jnp.where(real_BxT[..., None], jnp.maximum(x - mean[..., None], -8) / 2, 0), before


def ssamba_input(samples_BxS: jax.Array) -> jax.Array:
    """Samples at 16 kHz -> what SSAMBA hears, (B, frames, 128): their mean taken off, filter bank, normalised."""
    fbank = spectrogram.kaldi_fbank(samples_BxS - samples_BxS.mean(-1, keepdims=True))
    return (fbank + 4.2677393) / (2 * 4.5689974)
