"""Log-mel spectrograms and Kaldi's filter bank, jit-able and batched.

The mel bands are librosa's own; its spectrograms, and kaldi-native-fbank's, are the oracle
(tests/test_spectrogram.py).
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np


def mel_filterbank(
    sample_rate_hz: float,
    n_fft: int,
    n_mels: int,
    low_hz: float = 0.0,
    high_hz: float | None = None,
    htk: bool = False,
) -> np.ndarray:
    """Triangular mel bands of unit area over FFT bins, (n_mels, 1 + n_fft // 2) float32: `librosa.filters.mel`.

    In float64 and rounded once: librosa's float32 bank is rounded twice, and up to a quarter of its weights
    differ in the last bit. librosa is imported here, when a system first asks for mel bands: the 1D CNN and SSAMBA
    train without it.

    Args:
      high_hz: None for half the sample rate.
      htk: HTK's mel scale in place of that of Slaney's Auditory Toolbox.
    Raises:
      ValueError: sizes below 1, a band outside [0, sample_rate_hz / 2], or bands so narrow that no FFT bin is inside.
      ImportError: librosa is not installed.
    """
    if n_fft < 1 or n_mels < 1:
        raise ValueError(f"n_fft={n_fft}, n_mels={n_mels}: both must be at least 1")
    high = sample_rate_hz / 2 if high_hz is None else high_hz
    if not 0 <= low_hz < high <= sample_rate_hz / 2:
        raise ValueError(
            f"low_hz={low_hz}, high_hz={high} do not fit a rate of {sample_rate_hz} Hz: "
            f"0 <= low_hz < high_hz <= {sample_rate_hz / 2} is needed"
        )
    try:
        import librosa.filters
    except ImportError as error:
        raise ImportError(f"mel bands need librosa ({error}): pip install -c constraints.txt librosa") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bands without a bin are refused below
        bank = librosa.filters.mel(
            sr=sample_rate_hz, n_fft=n_fft, n_mels=n_mels, fmin=low_hz, fmax=high, htk=htk, dtype=np.float64
        )
    empty = np.flatnonzero(bank.max(1) == 0)
    if len(empty):
        raise ValueError(
            f"n_mels={n_mels} is too many for n_fft={n_fft} at {sample_rate_hz} Hz from {low_hz} to {high} Hz: "
            f"{len(empty)} bands (the first: {empty[0]}) hold no FFT bin; lower n_mels or raise n_fft"
        )
    return (bank + 0.0).astype(np.float32)  # librosa's weight at 0 Hz is -0.0


def frames(samples: int, hop: int) -> int:
    """Frames of a centred spectrogram of `samples` samples."""
    return 1 + samples // hop


def _power(x: jax.Array, n_fft: int, hop: int) -> jax.Array:
    """(..., T) -> (..., frames, 1 + n_fft // 2): |DFT|^2 of Hann windows centred at every `hop` samples."""
    count, views = frames(x.shape[-1], hop), -(-n_fft // hop)
    length = (count - 1 + views) * hop
    right = max(length - n_fft // 2 - x.shape[-1], 0)
    return _power_within(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(n_fft // 2, right)])[..., :length], n_fft, hop, count)


def _power_within(x: jax.Array, n_fft: int, hop: int, count: int) -> jax.Array:
    """The same of windows that start at 0, hop, ... (`count` of them); x must be whole hops long."""
    # A frame is `views` consecutive blocks of `hop` samples: slices, where indexing would gather sample by sample.
    views = -(-n_fft // hop)
    blocks = x.reshape(*x.shape[:-1], -1, hop)
    framed = jnp.concatenate([blocks[..., i : i + count, :] for i in range(views)], axis=-1)[..., :n_fft]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    spectrum = jnp.fft.rfft(framed * _last_axis(window.astype(np.float32), framed.ndim))
    return spectrum.real**2 + spectrum.imag**2


def _last_axis(row: np.ndarray, axes: int) -> np.ndarray:
    """(N,) -> (1, ..., 1, N) of so many axes."""
    return row.reshape((1,) * (axes - 1) + (-1,))


def log_mel(
    x: jax.Array,
    sample_rate_hz: float,
    n_fft: int = 2048,
    hop: int = 512,
    n_mels: int = 128,
    low_hz: float = 0.0,
    high_hz: float | None = None,
    htk: bool = False,
    ref: float | str = "max",
    amin: float = 1e-10,
    top_db: float | None = 80.0,
) -> jax.Array:
    """Log-mel spectrogram in dB of (..., T) samples: (..., n_mels, frames(T, hop)) float32.

    `librosa.power_to_db(librosa.feature.melspectrogram(...), ref)` of every item of the leading axes by itself:
    periodic Hann windows of n_fft samples, centred, zeros beyond the ends; powers below `amin` count as `amin`; 0 dB
    is the power `ref`, or the item's largest where it is "max"; nothing lies more than `top_db` (None: no limit)
    below an item's largest value.

    Raises:
      ValueError: as `mel_filterbank`; n_fft odd, hop below 1, amin or ref not positive, top_db negative.
      ImportError: as `mel_filterbank`.
    """
    if n_fft % 2 or n_fft < 2 or hop < 1:
        raise ValueError(f"n_fft={n_fft}, hop={hop}: n_fft must be even and at least 2, hop at least 1")
    if amin <= 0 or (top_db is not None and top_db < 0):
        raise ValueError(f"amin={amin}, top_db={top_db}: amin must be above 0, top_db at least 0 or None")
    if ref != "max" and (isinstance(ref, str) or ref <= 0):
        raise ValueError(f"ref={ref!r}: give 'max' or a power above 0")
    bank = mel_filterbank(sample_rate_hz, n_fft, n_mels, low_hz, high_hz, htk)
    # By default accelerators multiply float32 matrices at lower precision.
    power = _power(jnp.asarray(x, jnp.float32), n_fft, hop)
    mel = jnp.matmul(power, bank.T, precision=jax.lax.Precision.HIGHEST).swapaxes(-1, -2)

    def to_db(power):
        return 10 * jnp.log10(jnp.maximum(power, amin))

    # Of the powers, not of their logarithms: those may be computed twice and differ, and then none equals the largest,
    # whose gradient would be 0 / 0.
    top = to_db(mel.max((-2, -1), keepdims=True))
    reference = top if ref == "max" else to_db(jnp.float32(ref))
    decibels = to_db(mel) - reference
    return decibels if top_db is None else jnp.maximum(decibels, top - reference - top_db)


def mel_of_frames(
    x: jax.Array, sample_rate_hz: float, n_fft: int, hop: int, n_mels: int, low_hz: float, high_hz: float
) -> jax.Array:
    """Mel power (..., frames, n_mels) of the frames that lie wholly within (..., T) samples: 1 + (T - n_fft) // hop.

    Raises:
      ValueError, ImportError: as `mel_filterbank`.
    """
    bank = mel_filterbank(sample_rate_hz, n_fft, n_mels, low_hz, high_hz)
    count = 1 + (x.shape[-1] - n_fft) // hop
    length = (count - 1 - (-n_fft // hop)) * hop
    x = x[..., :length]
    if length > x.shape[-1]:
        x = jnp.concatenate([x, jnp.zeros((*x.shape[:-1], length - x.shape[-1]), x.dtype)], -1)
    return jnp.matmul(_power_within(x, n_fft, hop, count), bank.T, precision=jax.lax.Precision.HIGHEST)


_KALDI_FLOOR = float(np.finfo(np.float32).eps)  # of a band's energy before the logarithm


def _kaldi_bank(sample_rate_hz: float, n_fft: int, bands: int) -> np.ndarray:
    """(n_fft // 2, bands): Kaldi's bands from 20 Hz to half the rate, some of which may be empty.

    Triangles over mel, not over Hz as librosa's are, and without the bin at half the rate.
    """

    def mel(hz):
        return 1127 * np.log1p(np.asarray(hz, np.float64) / 700)

    edges = np.linspace(mel(20.0), mel(sample_rate_hz / 2), bands + 2)
    at = mel(np.arange(n_fft // 2) * sample_rate_hz / n_fft)[:, None]
    rising = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def kaldi_fbank(waveform: jax.Array, sample_rate_hz: int = 16000, num_mel_bins: int = 128) -> jax.Array:
    """Kaldi's natural log mel energies with SSAMBA's options: (..., samples) -> (..., frames, num_mel_bins) float32.

    Frames of 25 ms every 10 ms, whole ones only; each without its mean, pre-emphasised by 0.97, under a symmetric Hann
    window, filled with zeros to a power of two; no dither. The caller subtracts the waveform's mean (Gong et al. 2021,
    AST, whose front end SSAMBA's is).

    Raises:
      ValueError: fewer samples than a frame, a rate that 10 ms and 25 ms do not divide, num_mel_bins below 1.
    """
    if sample_rate_hz < 100 or sample_rate_hz % 200:
        raise ValueError(f"sample_rate_hz={sample_rate_hz}: 5 ms must be a whole number of samples")
    if num_mel_bins < 1:
        raise ValueError(f"num_mel_bins={num_mel_bins}: must be at least 1")
    waveform = jnp.asarray(waveform, jnp.float32)
    samples, block = waveform.shape[-1], sample_rate_hz // 200
    size, hop = 5 * block, 2 * block
    if samples < size:
        raise ValueError(f"{samples} samples are shorter than a frame of 25 ms, {size} samples at {sample_rate_hz} Hz")
    count = 1 + (samples - size) // hop
    # Slices of 5 ms blocks, where indexing would gather sample by sample.
    blocks = waveform[..., : samples // block * block].reshape(*waveform.shape[:-1], -1, block)
    framed = jnp.concatenate([blocks[..., i : i + 2 * count - 1 : 2, :] for i in range(5)], axis=-1)
    framed = framed - framed.mean(-1, keepdims=True)
    framed = framed - 0.97 * jnp.concatenate([framed[..., :1], framed[..., :-1]], axis=-1)
    n_fft = 1 << (size - 1).bit_length()
    window = np.hanning(size).astype(np.float32)
    spectrum = jnp.fft.rfft(framed * _last_axis(window, framed.ndim), n_fft)[..., :-1]
    power = spectrum.real**2 + spectrum.imag**2
    bank = _kaldi_bank(sample_rate_hz, n_fft, num_mel_bins)
    mel = jnp.matmul(power, bank, precision=jax.lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(mel, _KALDI_FLOOR))
