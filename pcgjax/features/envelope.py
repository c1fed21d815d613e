"""Heart sounds by their Shannon energy: the envelope of Liang et al. (Computers in Cardiology 1997), S1 and S2 on it.

Envelopes are of padded batches and jit-able: B recordings, T samples, F frames. Picking is a sequence of decisions
about some ten peaks a recording, on the host:

- a peak is the highest frame of a stretch above the threshold; stretches less than 50 ms apart, Liang's widest normal
  split of a sound, are one;
- of two peaks too near each other the weaker one is an extra one, such as a third sound (Liang);
- in too long a gap the threshold is lowered until a lost peak shows (Liang);
- of the intervals that alternate the longer one is diastole (Liang).

Two points differ from Liang. "Too near", "too long" and "longer" are measured against the cycle, which comes from the
envelope's autocorrelation, and against systole, which follows from the cycle; Liang's limits come from the mean and
deviation of the intervals between the peaks. And S1 and S2 have the order that fits all intervals best; Liang labels
outwards from the longest interval, where one wrong peak puts all later ones out of step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pcgjax.datasets import DIASTOLE, S1, S2, SYSTOLE, Span
from pcgjax.features import filters

_SPLIT_S = 0.05
_CYCLE_S = (0.4, 1.5)  # 40 to 150 beats/min
_NEARLY = 0.85
_SPREAD = 0.15  # of an interval, in natural logarithms
_MISFIT = 3.0  # what an interval costs at most


class Frames(NamedTuple):
    """Where frames of the envelope lie: frame i has the samples [i hop, i hop + window)."""

    window: int
    hop: int
    sample_rate_hz: float

    @property
    def step_s(self) -> float:
        """Seconds from frame to frame."""
        return self.hop / self.sample_rate_hz

    def count(self, lengths):
        """Whole frames in recordings of so many samples; NumPy or JAX arrays alike."""
        return ((lengths - self.window) // self.hop + 1) * (lengths >= self.window)


def frames(window_s: float, hop_s: float, sample_rate_hz: float) -> Frames:
    """The frames of a window and a hop given in seconds, rounded to samples.

    Raises:
      ValueError: a hop below one sample, or a window that is no multiple of it.
    """
    hop, window = round(hop_s * sample_rate_hz), round(window_s * sample_rate_hz)
    if hop < 1 or window < hop or window % hop:
        raise ValueError(
            f"window_s={window_s}, hop_s={hop_s}: need a hop of at least a sample at {sample_rate_hz} Hz and a window "
            "that is a multiple of it, such as 0.02 and 0.01"
        )
    return Frames(window, hop, sample_rate_hz)


def lowpass(sos: np.ndarray, x_BxT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Zero-phase filter of each recording by itself, as `scipy.signal.sosfiltfilt`; zero after its end.

    lengths_B: at least `edge_samples(sos) + 1` each, or 0 for an unused place.
    """
    import scipy.fft
    import scipy.signal

    edge, settled = filters.edge_samples(sos), filters.settling_samples(sos)
    total = x_BxT.shape[1] + 2 * edge
    # One transform a row: clips are short, so blocks that overlap by the settling time would cost half as much again.
    size = scipy.fft.next_fast_len(total + settled, real=True)
    spectrum = np.fft.rfft(scipy.signal.sosfilt(sos, np.eye(1, settled)[0]), size).astype(np.complex64)
    gain = float(np.prod(sos[:, :3].sum(1) / sos[:, 3:].sum(1)))

    # As in `filters.filter_packed`: odd extension, and each pass starts in the steady state of its first sample.
    row, step = jnp.arange(len(x_BxT))[:, None], jnp.arange(1, edge + 1)[None]
    used = lengths_B > 0
    last = jnp.where(used, lengths_B - 1, 0)[:, None]
    left = 2 * x_BxT[:, :1] - x_BxT[:, edge:0:-1]
    right = 2 * x_BxT[row, last] - x_BxT[row, last - step]
    x = jnp.concatenate([left, x_BxT, jnp.zeros_like(left)], axis=1).at[row, edge + last + step].set(right)
    extended = (jnp.arange(total)[None] < lengths_B[:, None] + 2 * edge) & used[:, None]

    def one_way(x, first, response):
        x = jnp.where(extended, x - first, 0)
        return jnp.fft.irfft(jnp.fft.rfft(x, size) * response[None], size)[:, :total] + gain * first

    forward = one_way(x, x[:, :1], spectrum)
    backward = one_way(forward, forward[row, last + 2 * edge], spectrum.conj())
    inside = jnp.arange(x_BxT.shape[1])[None] < lengths_B[:, None]
    return jnp.where(inside, backward[:, edge : edge + x_BxT.shape[1]], 0)


def standardise(x_BxN: jax.Array, counts_B: jax.Array) -> jax.Array:
    """(x - mean) / standard deviation over each row's first `counts_B` values; zero after them and for constants."""
    inside = jnp.arange(x_BxN.shape[1])[None] < counts_B[:, None]
    count = jnp.maximum(counts_B, 1)[:, None]
    mean = jnp.where(inside, x_BxN, 0).sum(1, keepdims=True) / count
    centred = jnp.where(inside, x_BxN - mean, 0)
    variance = (centred**2).sum(1, keepdims=True) / count
    return centred * jnp.where(variance > 0, jax.lax.rsqrt(jnp.where(variance > 0, variance, 1)), 0)


def shannon_envelope(x_BxT: jax.Array, lengths_B: jax.Array, sos: np.ndarray, where: Frames) -> jax.Array:
    """(B, F) float32: the standardised average Shannon energy of low-passed recordings; zero after their last frame.

    Each recording is divided by its maximum, filtered, standardised, and divided by its maximum again: -y^2 log y^2
    grows with |y| only below 0.6 and is negative above 1, where a standardised heart sound has its peaks.

    Args: x_BxT: samples in any unit; lengths_B: how many of a row are its recording's, as `lowpass` wants them.
    """
    inside = jnp.arange(x_BxT.shape[1])[None] < lengths_B[:, None]
    x = jnp.where(inside, x_BxT.astype(jnp.float32), 0)
    y = standardise(lowpass(sos, _over_maximum(x), lengths_B), lengths_B)
    power = _over_maximum(y) ** 2
    energy = -power * jnp.log(jnp.where(power > 0, power, 1))
    count = where.count(x.shape[1])
    parts = energy[:, : x.shape[1] // where.hop * where.hop].reshape(len(x), -1, where.hop).sum(2)
    hops = jnp.stack([parts[:, i : i + count] for i in range(where.window // where.hop)])
    frames_BxF = hops.sum(0) / where.window
    return standardise(frames_BxF, where.count(lengths_B))


def _over_maximum(x_BxT: jax.Array) -> jax.Array:
    most = jnp.abs(x_BxT).max(1, keepdims=True)
    return x_BxT / jnp.where(most > 0, most, 1)


# ------------------------------------------------------------------------------------------------------- picking


def threshold(envelope_BxF: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
    """(B,) the automatic threshold: Otsu's, between the frames with a sound and those without.

    It parts a recording's values where the two groups' means differ most for their sizes, so it needs no level that
    would have to be set for each stethoscope. On the host, whose sort is much faster than XLA's on a CPU.
    """
    count = np.maximum(np.asarray(counts_B), 1)[:, None]
    inside = np.arange(np.shape(envelope_BxF)[1]) < count
    values = np.sort(np.where(inside, envelope_BxF, np.inf), axis=1)
    values = np.where(inside, values, 0).astype(np.float64)
    below = values.cumsum(1)
    k = np.arange(1, values.shape[1] + 1)
    excess = below - k * below[:, -1:] / count
    between = np.where(k < count, excess**2 / np.maximum(k * (count - k), 1), -1)
    i = between.argmax(1)[:, None]
    return np.take_along_axis(values, np.minimum(np.concatenate([i, i + 1], 1), values.shape[1] - 1), axis=1).mean(1)


def cycle_s(envelope_BxF: jax.Array, counts_B: jax.Array, step_s: float) -> jax.Array:
    """(B,) a heart cycle's length by the envelope's autocorrelation, 0.4 to 1.5 s; NaN where none shows.

    The shortest lag whose peak is nearly the highest: the multiples of a cycle have peaks too.
    """
    frames_ = envelope_BxF.shape[1]
    spectrum = jnp.fft.rfft(envelope_BxF, 2 * frames_)
    lag = jnp.arange(frames_)[None]
    together = jnp.maximum(counts_B[:, None] - lag, 1)  # pairs of frames so far apart
    r = jnp.fft.irfft(jnp.abs(spectrum) ** 2, 2 * frames_)[:, :frames_] / together
    shortest, longest = round(_CYCLE_S[0] / step_s), round(_CYCLE_S[1] / step_s)
    allowed = (lag >= shortest) & (lag <= jnp.minimum(longest, 2 * counts_B[:, None] // 3))
    near = jnp.pad(r, ((0, 0), (1, 1)), constant_values=jnp.inf)
    peak = allowed & (r >= near[:, :-2]) & (r >= near[:, 2:])
    highest = jnp.where(peak, r, -jnp.inf).max(1, keepdims=True)
    candidates = peak & (r >= _NEARLY * highest) & (highest > 0)
    return jnp.where(candidates.any(1), candidates.argmax(1) * step_s, jnp.nan)


def systole_s(cycle_s: float) -> float:
    """From the onset of S1 to that of S2: 0.2 s + 0.13 cycles, at most 0.45 cycles.

    The line fits the annotated cycles of CirCor (0.200 s + 0.134 cycles) and of CinC 2016 (0.201 s + 0.150 cycles). In
    children it makes systole as long as diastole: the bound keeps to Liang's rule that diastole is the longer one.
    """
    return min(0.2 + 0.13 * cycle_s, 0.45 * cycle_s)


def pick(envelope_F: np.ndarray, step_s: float, threshold: float, cycle_s: float) -> list[Span]:
    """S1 and S2 of one recording: [(start_s, end_s, S1 or S2)], in order; [] where no cycle is found.

    A sound lasts while the envelope is above the threshold, or above half of a peak that is lower.

    Args:
      envelope_F: the frames of one recording, without padding, `step_s` seconds apart.
      threshold, cycle_s: this recording's, as the functions of these names give them.
    """
    if not math.isfinite(cycle_s) or not len(envelope_F):
        return []
    systole = systole_s(cycle_s)
    near, far = 0.6 * systole / step_s, 1.35 * max(systole, cycle_s - systole) / step_s
    e = envelope_F
    peaks = [first + int(e[first:stop].argmax()) for first, stop in _above(e, threshold, _SPLIT_S / step_s)]
    while len(peaks) > 1:
        gaps = [b - a for a, b in itertools.pairwise(peaks)]
        i = gaps.index(min(gaps))
        if gaps[i] >= near:
            break
        del peaks[i if e[peaks[i]] < e[peaks[i + 1]] else i + 1]
    quiet, level_of = float(np.partition(e, len(e) // 2)[len(e) // 2]), e.tolist()
    lowest = quiet + (threshold - quiet) / 4
    i = 0
    while i < len(peaks) - 1:
        first, stop = int(peaks[i] + near), int(peaks[i + 1] - near) + 1
        if peaks[i + 1] - peaks[i] > far and first < stop:
            lost = first + int(e[first:stop].argmax())
            if e[lost] > lowest and e[lost] >= max(e[lost - 1], e[lost + 1]):
                peaks.insert(i + 1, lost)
                continue
        i += 1
    if len(peaks) < 3:
        return []
    middles = [(a + b) // 2 for a, b in itertools.pairwise(peaks)]
    sounds = []
    for peak, low, high, sound in zip(
        peaks, [0, *middles], [*middles, len(e)], _sounds(np.diff(peaks) * step_s, cycle_s), strict=True
    ):
        level = min(threshold, quiet + (level_of[peak] - quiet) / 2)
        first, stop = peak, peak + 1
        while first > low and level_of[first - 1] > level:
            first -= 1
        while stop < high and level_of[stop] > level:
            stop += 1
        sounds.append((first * step_s, stop * step_s, sound))
    return sounds


def _above(e: np.ndarray, threshold: float, gap: float) -> list[list[int]]:
    """[first, stop) of the stretches above the threshold; those less than `gap` frames apart are one."""
    above = np.concatenate([[False], e > threshold, [False]])
    edges = np.flatnonzero(above[1:] != above[:-1]).reshape(-1, 2)
    stretches: list[list[int]] = []
    for first, stop in edges.tolist():
        if stretches and first - stretches[-1][1] < gap:
            stretches[-1][1] = stop
        else:
            stretches.append([first, stop])
    return stretches


def _sounds(intervals_s: np.ndarray, cycle_s: float) -> list[int]:
    """S1 or S2 for each peak: the order in which the intervals between them are likeliest.

    S2 follows S1 after a systole and S1 follows S2 after a diastole; where a peak is wrong or missing, the same sound
    follows after a cycle, which costs as much as a badly wrong interval.
    """
    systole = systole_s(cycle_s)
    off = np.log(intervals_s[:, None] / np.array([systole, cycle_s - systole, cycle_s])) / _SPREAD
    fit = -np.minimum(off**2 / 2, _MISFIT) - [0, 0, _MISFIT]
    first, second, came = 0.0, 0.0, []  # the best of S1, of S2
    for as_systole, as_diastole, as_cycle in fit.tolist():
        from_first, from_second = first + as_cycle, second + as_diastole  # to S1
        and_first, and_second = first + as_systole, second + as_cycle  # to S2
        came.append((from_second > from_first, and_second > and_first))
        first = from_second if from_second > from_first else from_first
        second = and_second if and_second > and_first else and_first
    sound = int(second > first)
    path = [sound]
    for back in reversed(came):
        sound = back[sound]
        path.append(sound)
    return [(S1, S2)[sound] for sound in reversed(path)]


def states(sounds: Sequence[Span], cycle_s: float) -> list[Span]:
    """`sounds`, as of `pick`, with systole and diastole between neighbours that are S1 and S2, or S2 and S1.

    Nothing is put between two of the same sound, for one is missing there, nor into gaps longer than a cycle.
    """
    spans: list[Span] = []
    for i, sound in enumerate(sounds):
        if i:
            before = sounds[i - 1]
            if before[2] != sound[2] and 0 < sound[0] - before[1] < cycle_s:
                spans.append((before[1], sound[0], SYSTOLE if sound[2] == S2 else DIASTOLE))
        spans.append(sound)
    return spans
