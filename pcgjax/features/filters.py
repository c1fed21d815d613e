"""IIR filters as batched FFTs, and z-scores, over recordings laid end to end in one buffer.

An IIR filter run sample by sample is a chain of thousands of dependent steps. Its impulse response, though, fades
below float32 within a few hundred samples, so block-wise FFT convolution (overlap-save) gives the same numbers
with no dependent steps at all. The oracle is SciPy's float64 recursion (tests/test_filters.py).

A packed buffer is (M, ALIGN): M rows of ALIGN samples; each recording begins on a row, after `lead` samples kept
free for its left extension, and is followed by `gap` zeros so that it cannot leak into its neighbour.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ALIGN = 64
BLOCK = 32 * ALIGN  # samples that one transform of a convolution filters; buffers of a multiple need no padding


def butterworth(order: int, cutoff_hz: float | tuple[float, float], sample_rate_hz: float, kind: str) -> np.ndarray:
    """Second-order sections (sections, 6), float64, of SciPy's `butter`; kind: lowpass, highpass or bandpass.

    Raises:
      ValueError: an order below 1, a cut-off outside (0, sample_rate_hz / 2), or a band whose edges are not in order.
    """
    if order < 1:
        raise ValueError(f"order {order}: must be at least 1")
    edges = np.atleast_1d(np.asarray(cutoff_hz, np.float64))
    if edges.min() <= 0 or edges.max() >= sample_rate_hz / 2 or (np.diff(edges) <= 0).any():
        raise ValueError(
            f"cut-off {cutoff_hz} Hz does not fit a rate of {sample_rate_hz} Hz: edges must rise and lie between 0 and "
            f"{sample_rate_hz / 2} Hz; prepare the data at a higher rate or lower the cut-off"
        )
    import scipy.signal  # takes as long to import as JAX

    return scipy.signal.butter(order, cutoff_hz, kind, fs=sample_rate_hz, output="sos")


def settling_samples(sos: np.ndarray, tolerance: float = 1e-8) -> int:
    """Samples after which what is left of the impulse response sums to less than `tolerance`."""
    import scipy.signal

    length = 1024
    while True:
        response = scipy.signal.sosfilt(sos, np.eye(1, length)[0])
        tail = np.cumsum(np.abs(response[::-1]))[::-1]
        if tail[length // 2] < tolerance:
            return int(np.argmax(tail < tolerance))
        length *= 2
        if length > 1 << 22:
            raise ValueError("the filter does not settle: a pole lies on or outside the unit circle")


def edge_samples(sos: np.ndarray) -> int:
    """Samples of odd extension at each end: SciPy's default for `sosfiltfilt`."""
    taps = 2 * len(sos) + 1 - min((sos[:, 2] == 0).sum(), (sos[:, 5] == 0).sum())
    return int(3 * taps)


class Packing(NamedTuple):
    """Where R recordings lie in an (M, ALIGN) buffer."""

    starts: jax.Array  # (R,) position of the first sample
    lengths: jax.Array  # (R,) samples; 0 for an unused place
    recording: jax.Array  # (M,) whose row it is
    offset: jax.Array  # (M, ALIGN) position within that recording; negative in its lead

    @property
    def inside(self) -> jax.Array:
        """(M, ALIGN) where a recording's own samples are."""
        return (self.offset >= 0) & (self.offset < self.lengths[self.recording][:, None])


def starts_of(lengths, lead: int, gap: int):
    """(R,) lengths -> (R,) first samples in the buffer, and the rows used in all; NumPy or JAX arrays alike."""
    lead_rows = -(-lead // ALIGN)
    rows = (lengths > 0) * (lead_rows + -(-(lengths + gap) // ALIGN))
    ends = rows.cumsum()
    return (ends - rows + lead_rows) * ALIGN, ends[-1]


def packing(lengths: jax.Array, rows: int, lead: int, gap: int) -> Packing:
    """The layout of recordings of (R,) `lengths` in a buffer of `rows` rows."""
    starts, _ = starts_of(lengths, lead, gap)
    row = jnp.arange(rows)
    recording = jnp.searchsorted(starts // ALIGN - -(-lead // ALIGN), row, side="right", method="compare_all") - 1
    offset = row[:, None] * ALIGN + jnp.arange(ALIGN)[None] - starts[recording][:, None]
    return Packing(starts, lengths, recording, offset)


def _convolve(sos: np.ndarray, x_MxA: jax.Array, backward: bool = False) -> jax.Array:
    """The zero-state filter over the flattened buffer, from its beginning or from its end, by overlap-save."""
    import scipy.signal

    taps = settling_samples(sos)
    overlap = max(ALIGN, 1 << (taps - 1).bit_length())
    block = max(BLOCK, overlap)
    size = block + overlap  # a number with small factors
    response = scipy.signal.sosfilt(sos, np.eye(1, taps)[0])
    spectrum = np.fft.rfft(response, size).astype(np.complex64)
    flat = x_MxA.reshape(-1)
    now = jnp.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    if backward:
        frames = [now, jnp.pad(now[1:, :overlap], ((0, 1), (0, 0)))]
        spectrum, keep = spectrum.conj(), slice(0, block)
    else:
        frames = [jnp.pad(now[:-1, -overlap:], ((1, 0), (0, 0))), now]
        keep = slice(overlap, None)
    out = jnp.fft.irfft(jnp.fft.rfft(jnp.concatenate(frames, axis=1)) * spectrum[None], size)
    return out[:, keep].reshape(-1)[: len(flat)].reshape(x_MxA.shape)


def filter_packed(sos: np.ndarray, x_MxA: jax.Array, where: Packing, zero_phase: bool) -> jax.Array:
    """Filters every recording of a packed buffer by itself, as `scipy.signal.sosfilt` or `sosfiltfilt` would.

    The buffer's lead must be at least `edge_samples(sos)` and its gap `edge_samples(sos) + settling_samples(sos)`;
    recordings must be longer than `edge_samples(sos)`. Returns (M, ALIGN), zero outside the recordings.
    """
    if not zero_phase:
        return jnp.where(where.inside, _convolve(sos, jnp.where(where.inside, x_MxA, 0)), 0)
    # SciPy extends both ends oddly and starts each pass in the steady state of the first sample x0; that pass equals
    # the zero-state filter of x - x0, plus gain(0) x0.
    edge, size = edge_samples(sos), x_MxA.size
    gain = float(np.prod(sos[:, :3].sum(1) / sos[:, 3:].sum(1)))
    used = where.lengths > 0
    first = jnp.where(used, where.starts, 0)[:, None]
    last = jnp.where(used, where.starts + where.lengths - 1, 0)[:, None]
    step = jnp.arange(1, edge + 1)[None]
    flat = x_MxA.reshape(-1)
    left, right = 2 * flat[first] - flat[first + step], 2 * flat[last] - flat[last - step]
    drop = jnp.where(used[:, None], 0, size)
    flat = flat.at[first - step + drop].set(left, mode="drop").at[last + step + drop].set(right, mode="drop")

    x = flat.reshape(x_MxA.shape)
    extended = (where.offset >= -edge) & (where.offset < where.lengths[where.recording][:, None] + edge)

    def one_way(x, origin_R, backward):
        origin = origin_R[where.recording][:, None]
        x = jnp.where(extended, x - origin, 0)
        return _convolve(sos, x, backward) + gain * origin

    forward = one_way(x, flat[(first - edge)[:, 0]], backward=False)
    backward = one_way(forward, forward.reshape(-1)[(last + edge)[:, 0]], backward=True)
    return jnp.where(where.inside, backward, 0)


def sum_packed(x_MxA: jax.Array, where: Packing) -> jax.Array:
    """(R,) sums over each recording's own samples."""
    rows = jnp.where(where.inside, x_MxA, 0).sum(1)
    member = where.recording[None] == jnp.arange(len(where.lengths))[:, None]
    return jnp.where(member, rows[None], 0).sum(1)


def zscore_packed(x_MxA: jax.Array, where: Packing) -> jax.Array:
    """(x - mean) / standard deviation of each recording; zero outside the recordings and for constant ones."""
    count = jnp.maximum(where.lengths, 1)
    centred = x_MxA - (sum_packed(x_MxA, where) / count)[where.recording][:, None]
    variance = sum_packed(centred**2, where) / count
    scale = jnp.where(variance > 0, jax.lax.rsqrt(jnp.where(variance > 0, variance, 1)), 0)
    return jnp.where(where.inside, centred * scale[where.recording][:, None], 0)


def add_white_noise(x_MxA: jax.Array, where: Packing, snr_db: float, key: jax.Array) -> jax.Array:
    """Adds white Gaussian noise to each recording, `snr_db` below the power of the recording about its mean."""
    count = jnp.maximum(where.lengths, 1)
    mean = sum_packed(x_MxA, where) / count
    power = sum_packed((x_MxA - mean[where.recording][:, None]) ** 2, where) / count
    deviation = jnp.sqrt(power * 10 ** (-snr_db / 10))[where.recording][:, None]
    return jnp.where(where.inside, x_MxA + deviation * jax.random.normal(key, x_MxA.shape), 0)


def _per_row(sos: np.ndarray, x: jax.Array, zero_phase: bool) -> jax.Array:
    length, edge = x.shape[-1], edge_samples(sos)
    if zero_phase and length <= edge:
        raise ValueError(f"{length} samples are too few for this filter's zero-phase pass: it needs more than {edge}")
    gap = edge + settling_samples(sos)
    lengths = np.array([length])
    starts, rows = starts_of(lengths, edge, gap)
    where = packing(jnp.asarray(lengths), int(rows), edge, gap)
    begin = int(starts[0])

    def one(x_T):
        buffer = jnp.pad(x_T, (begin, int(rows) * ALIGN - begin - length)).reshape(-1, ALIGN)
        return filter_packed(sos, buffer, where, zero_phase).reshape(-1)[begin : begin + length]

    return jax.vmap(one)(x.reshape(-1, length)).reshape(x.shape)


def sosfilt(sos: np.ndarray, x: jax.Array) -> jax.Array:
    """Causal filter along the last axis of (..., T), zero initial state; equals `scipy.signal.sosfilt`."""
    return _per_row(sos, x, zero_phase=False)


def sosfiltfilt(sos: np.ndarray, x: jax.Array) -> jax.Array:
    """Zero-phase filter along the last axis of (..., T); equals `scipy.signal.sosfiltfilt` with its default padding.

    Raises:
      ValueError: T is not longer than the extension at each end.
    """
    return _per_row(sos, x, zero_phase=True)
