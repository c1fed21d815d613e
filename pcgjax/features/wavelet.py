"""Wavelet denoising: Daubechies-4 transform, soft universal threshold; recordings by themselves or packed end to end.

The H-infinity LSTM's pipeline: transform to level 4, sigma = median|cD1| / 0.6745, every detail coefficient soft
thresholded at sigma sqrt(2 ln n) (Donoho and Johnstone 1994, "Ideal spatial adaptation by wavelet shrinkage"), and
back. The paper names only db4; level and rule are from public code said to be its authors'. The oracle is PyWavelets
in float64 (tests/test_wavelet.py), borders as its mode "symmetric": mirrored samples, the outermost one twice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pcgjax.features.filters import Packing

# The low-pass with four vanishing moments of least phase: Daubechies, "Ten Lectures on Wavelets", table 6.1, N = 4.
_LOW = (
    0.2303778133088965,
    0.7148465705529157,
    0.6308807679298589,
    -0.027983769416859854,
    -0.18703481171909309,
    0.030841381835560764,
    0.0328830116668852,
    -0.010597401785069032,
)
_HIGH = tuple((-1) ** k * h for k, h in enumerate(reversed(_LOW)))
_LEFT, _RIGHT = len(_LOW) - 2, len(_LOW) - 1  # mirrored samples that a transform reads before and after a signal
_AFTER = 3  # later coefficients that a sample is made of, besides the one beside it
_MAX_PACKED_LEVEL = 4  # where a row of 64 samples still has _AFTER coefficients
_INFINITY = 0x7F800000  # the bits of float32's


def _analyse(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(..., _LEFT + 2 K), mirrored samples included -> approximation and detail, each (..., K)."""
    even, odd = x[..., ::2], x[..., 1::2]
    k = even.shape[-1] - 3

    def correlate(h):
        return sum(h[2 * i] * even[..., i : i + k] + h[2 * i + 1] * odd[..., i : i + k] for i in range(4))

    return correlate(_LOW), correlate(_HIGH)


def _synthesise(approximation: jax.Array, detail: jax.Array) -> jax.Array:
    """Two (..., K) -> (..., 2 K - _LEFT) samples."""
    k = approximation.shape[-1] - _AFTER

    def phase(first):
        return sum(
            _LOW[first - 2 * i] * approximation[..., i : i + k] + _HIGH[first - 2 * i] * detail[..., i : i + k]
            for i in range(4)
        )

    return jnp.stack([phase(6), phase(7)], -1).reshape(*approximation.shape[:-1], 2 * k)


def shortest(level: int) -> int:
    """Samples that a signal must have at least, or no coefficient of this level would be free of the borders."""
    return (len(_LOW) - 1) << level


def wavedec(x: jax.Array, level: int) -> list[jax.Array]:
    """Multilevel transform along the last axis of (..., T): [cA_level, cD_level, ..., cD_1], as `pywt.wavedec`.

    Each level's coefficients number (n + 7) // 2 of the n before.

    Raises:
      ValueError: a level below 1, or T below 7 * 2 ** level: no coefficient would be free of the borders.
    """
    if level < 1:
        raise ValueError(f"wavelet level {level}: must be at least 1")
    samples = x.shape[-1]
    if samples < shortest(level):
        fits = (samples // shortest(0)).bit_length() - 1
        raise ValueError(
            f"{samples} samples are too few for wavelet level {level}, which needs {shortest(level)}; "
            + (f"level {fits} fits" if fits > 0 else f"even level 1 needs {shortest(1)}")
        )
    approximation, details = jnp.asarray(x, jnp.float32), []
    for _ in range(level):
        pad = [(0, 0)] * (approximation.ndim - 1) + [(_LEFT, _RIGHT)]
        extended = jnp.pad(approximation, pad, mode="symmetric")
        approximation, detail = _analyse(extended[..., : extended.shape[-1] // 2 * 2])
        details.append(detail)
    return [approximation, *reversed(details)]


def waverec(coefficients: list[jax.Array]) -> jax.Array:
    """The inverse of `wavedec`, as `pywt.waverec`: (..., T), or T + 1 samples where T was odd."""
    x = coefficients[0]
    for detail in coefficients[1:]:
        x = _synthesise(x[..., : detail.shape[-1]], detail)
    return x


def _middle_bits(values_MxW: jax.Array, recording_M: jax.Array, counts_R: jax.Array) -> jax.Array:
    """(2, R): the bits of each recording's two middle values, the same one twice where it has an odd number."""
    # Transposed, counting adds whole vectors of rows on a CPU: twice as fast.
    bits_WxM = jax.lax.bitcast_convert_type(values_MxW, jnp.int32).T
    ranks = jnp.stack([(counts_R - 1) // 2, counts_R // 2])

    def at_most(p_R):
        rows = (bits_WxM <= p_R[recording_M][None]).sum(0)
        return jax.ops.segment_sum(rows, recording_M, len(counts_R), indices_are_sorted=True)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.stack([at_most(middle[0]), at_most(middle[1])]) > ranks
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    bounds = jnp.full_like(ranks, -1), jnp.full_like(ranks, _INFINITY)
    return jnp.where((counts_R > 0)[None], jax.lax.fori_loop(0, 31, halve, bounds)[1], 0)


@jax.custom_jvp
def _median(values_MxW: jax.Array, recording_M: jax.Array, counts_R: jax.Array) -> jax.Array:
    """(R,) medians of non-negative values: `counts_R[r]` in recording r's rows are finite, the others infinite.

    The bit patterns of non-negative floats sort as integers do: bisection over the bits, counting at each of its 31
    steps, finds the middle values exactly, some 30 times as fast as sorting on a CPU. Without values: 0.
    """
    return jax.lax.bitcast_convert_type(_middle_bits(values_MxW, recording_M, counts_R), jnp.float32).mean(0)


@_median.defjvp
def _median_jvp(primals, tangents):
    values, recording, counts = primals
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    middle = _middle_bits(values, recording, counts)

    def total(x):
        return jax.ops.segment_sum(x.sum(1), recording, len(counts), indices_are_sorted=True)

    def tangent(p_R):  # equal values share it
        same = (bits == p_R[recording][:, None]) & (bits < _INFINITY)
        return total(jnp.where(same, tangents[0], 0)) / jnp.maximum(total(same), 1)

    return jax.lax.bitcast_convert_type(middle, jnp.float32).mean(0), (tangent(middle[0]) + tangent(middle[1])) / 2


def _threshold(median: jax.Array, lengths: jax.Array | int) -> jax.Array:
    """The universal threshold from median|cD1|; 0.6745 makes it the deviation of Gaussian noise."""
    return median / 0.6745 * jnp.sqrt(2 * jnp.log(jnp.maximum(lengths, 1)))


def _soft(detail: jax.Array, threshold: jax.Array) -> jax.Array:
    return detail - jnp.clip(detail, -threshold, threshold)


def denoise(x: jax.Array, level: int = 4) -> jax.Array:
    """Soft universal thresholding of every row of (..., T) by itself; float32 of x's shape.

    Raises:
      ValueError: as `wavedec`.
    """
    approximation, *details = wavedec(x.reshape(-1, x.shape[-1]), level)
    finest = jnp.abs(details[-1])
    rows, count = finest.shape
    finest = jnp.pad(finest, ((0, 0), (0, -count % 32)), constant_values=jnp.inf).reshape(-1, 32)
    median = _median(finest, jnp.repeat(jnp.arange(rows), len(finest) // rows), jnp.full(rows, count))
    threshold = _threshold(median, x.shape[-1])[:, None]
    out = waverec([approximation, *(_soft(detail, threshold) for detail in details)])
    return out[:, : x.shape[-1]].reshape(x.shape)


def margins(level: int) -> tuple[int, int]:
    """(lead, gap): free samples that `denoise_packed` needs before and after a recording.

    At level j a recording of n samples has n_j = (n_{j-1} + 7) // 2 <= (n + 7 (2^j - 1)) / 2^j coefficients, 2^j
    samples apart. On the way to level j + 1 they are mirrored 6 to the left and 7 to the right. The widest are the
    input of the last level, 6 * 2^(level - 1) before and up to 7 (2^level - 1) after, and the last level's output,
    up to as many after; both bounds are reached where every n_{j-1} is odd.

    Raises:
      ValueError: a level outside 1 to 4: deeper ones have too few coefficients in a buffer's row.
    """
    if not 1 <= level <= _MAX_PACKED_LEVEL:
        raise ValueError(f"wavelet level {level}: choose 1 to {_MAX_PACKED_LEVEL}")
    return _LEFT << (level - 1), _RIGHT * ((1 << level) - 1)


def _mirror(x_N: jax.Array, starts: jax.Array, lengths: jax.Array) -> jax.Array:
    """Writes each recording's mirrored samples before and after it into the buffer."""
    step = np.concatenate([np.arange(-_LEFT, 0), np.arange(_RIGHT)])[None]
    # to: positions relative to the recording; a mirrored signal repeats after twice its length.
    to = jnp.where(step < 0, step, lengths[:, None] + step)
    size = jnp.maximum(lengths, 1)[:, None]
    source = to % (2 * size)
    source = jnp.where(source < size, source, 2 * size - 1 - source)
    used = lengths[:, None] > 0
    values = x_N[jnp.where(used, starts[:, None] + source, 0)]
    return x_N.at[jnp.where(used, starts[:, None] + to, len(x_N))].set(values, mode="drop")


def denoise_packed(x_MxA: jax.Array, where: Packing, level: int = 4) -> jax.Array:
    """`denoise` of every recording of a packed buffer by itself; its lead and gap must be at least `margins(level)`.

    Returns (M, ALIGN) float32, zero outside the recordings. Recordings below 7 * 2 ** level samples are mirrored
    several times, as PyWavelets does with a warning: refusing them is up to the caller.

    Raises:
      ValueError: a level outside 1 to 4.
    """
    margins(level)
    rows = len(x_MxA)
    x = jnp.where(where.inside, x_MxA, 0).astype(jnp.float32)
    # Recordings start on rows, so every level is the whole buffer in rows of half as many values, starts included.
    starts, counts, details = where.starts, where.lengths, []
    for _ in range(level):
        x, detail = _analyse(jnp.pad(_mirror(x.reshape(-1), starts, counts), (_LEFT, 0)))
        x, detail = x.reshape(rows, -1), detail.reshape(rows, -1)
        starts, counts = starts // 2, jnp.where(counts > 0, (counts + 7) // 2, 0)
        details.append(detail)
        if len(details) == 1:
            at = where.offset[:, ::2] // 2
            inside = (at >= 0) & (at < counts[where.recording][:, None])
            median = _median(jnp.where(inside, jnp.abs(detail), jnp.inf), where.recording, counts)
    threshold = _threshold(median, where.lengths)[where.recording][:, None]

    def with_next(row_MxW):
        following = jnp.pad(row_MxW[1:, :_AFTER], ((0, 1), (0, 0)))
        return jnp.concatenate([row_MxW, following], axis=1)

    for detail in reversed(details):
        # A recording's samples depend on its own coefficients alone: no mirroring on the way back.
        x = _synthesise(with_next(x), with_next(_soft(detail, threshold)))
    return jnp.where(where.inside, x, 0)
