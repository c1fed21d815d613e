"""Features of the classical chain: sounds picked by Shannon energy, Burg spectra of systole and diastole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from pcgjax.data.corpus import Corpus
from pcgjax.data.plan import choose_capacities
from pcgjax.datasets import DIASTOLE, SYSTOLE
from pcgjax.features import burg, envelope, filters

_LANES = 128  # stretches that go through the lattice together


class Features(NamedTuple):
    """Features of the n recordings in which systoles and diastoles were found."""

    values: np.ndarray  # (n, 2 * bins) float32: mean spectrum of its systoles, and of its diastoles
    indices: np.ndarray  # (n,) into the corpus
    left_out: list[dict[str, str]]  # id and reason of each of the others
    stretches: dict[str, int]  # systoles, diastoles, and those that were too short for the order


def classical_features(corpus: Corpus, config: ml_collections.ConfigDict) -> Features:
    """The published features: Burg power spectra of systole and diastole, mean over a recording's cycles.

    The spectra are those of the recording as it is (no low-pass) over its largest sample. A stretch of no more
    samples than the Burg order is left out and counted, and so is a recording in which that leaves no systole or no
    diastole.
    Raises:
      ValueError: a field of config.features that fits no data.
    """
    f = config.features
    burg.check(f.burg_order, f.burg_order + 1)
    if f.nfft < 2:
        raise ValueError(f"features.nfft={f.nfft}: must be at least 2")
    if not f.threshold > -np.inf:
        raise ValueError(f"features.threshold={f.threshold}: a level of the standardised envelope, or inf: found in it")
    stretches = _cut(corpus, f, config.train.batch_recordings)
    indices = np.array([i for i in range(len(corpus.rows)) if i not in stretches.reasons], np.int32)
    owner, kind = np.array(stretches.owner, int), np.array(stretches.kind, int)
    numbers = np.flatnonzero(np.isin(owner, indices))
    lengths = np.array([len(stretches.samples[i]) for i in numbers], np.int32)
    ordered = numbers[np.argsort(lengths, kind="stable")]
    values = np.zeros((len(indices), 2, f.nfft // 2 + 1))
    if len(ordered):
        spectra = _spectra_of([stretches.samples[i] for i in ordered], f, corpus.sample_rate_hz)
        # Recording by recording, its systoles before its diastoles; each of these recordings has both.
        group = 2 * owner[ordered] + kind[ordered]
        by_group = np.argsort(group, kind="stable")
        begins = np.flatnonzero(np.diff(group[by_group], prepend=-1))
        count = np.diff(begins, append=len(group))[:, None]
        values = np.add.reduceat(spectra[by_group], begins, axis=0, dtype=np.float64) / count
    values = 10 * np.log10(values + 1e-20) if f.decibels else values
    left_out = [{"id": corpus.rows[i]["id"], "reason": reason} for i, reason in sorted(stretches.reasons.items())]
    counts = {"systoles": int((kind[numbers] == 0).sum()), "diastoles": int(kind[numbers].sum()),
              "too_short": stretches.too_short}  # fmt: skip
    return Features(values.reshape(len(indices), 2 * (f.nfft // 2 + 1)).astype(np.float32), indices, left_out, counts)


class Stretches(NamedTuple):
    """Systoles and diastoles of recordings."""

    samples: list[np.ndarray]  # (n,) float32 each, over the largest sample of the recording
    owner: list[int]  # whose it is
    kind: list[bool]  # a diastole
    reasons: dict[int, str]  # why a recording is left out
    too_short: int


def _cut(corpus: Corpus, f: ml_collections.ConfigDict, batch: int) -> Stretches:
    """All systoles and diastoles of more samples than the Burg order."""
    order, rate = f.burg_order, corpus.sample_rate_hz
    samples, owner, kind = list[np.ndarray](), list[int](), list[bool]()
    reasons, short = {}, 0
    for index, (sounds, cycle, _) in enumerate(find_sounds(corpus, f, batch)):
        recording, lacking, before = None, {SYSTOLE: "systole", DIASTOLE: "diastole"}, short
        for start_s, end_s, state in envelope.states(sounds, cycle):
            if state in (SYSTOLE, DIASTOLE):
                first, stop = round(start_s * rate), round(end_s * rate)
                if stop - first <= order:
                    short += 1
                    continue
                if recording is None:
                    recording = corpus.read(index).astype(np.float32)
                    recording = recording / np.abs(recording).max()
                samples.append(recording[first:stop])
                owner.append(index)
                kind.append(state == DIASTOLE)
                lacking.pop(state, None)
        if lacking:
            why = f" of more than {order} samples" if short > before else " between the sounds found"
            reasons[index] = "no cycle found" if not sounds else f"no {' and no '.join(lacking.values())}{why}"
    return Stretches(samples, owner, kind, reasons, short)


def _spectra_of(stretches: Sequence[np.ndarray], f: ml_collections.ConfigDict, rate_hz: int) -> np.ndarray:
    """Burg power spectra (n, nfft / 2 + 1) of n stretches, which are in order of their lengths."""
    parts = [stretches[i : i + _LANES] for i in range(0, len(stretches), _LANES)]
    longest = np.array([len(part[-1]) for part in parts])
    widths = np.array(choose_capacities(longest, most=4))
    calls = []
    for part, samples in zip(parts, longest, strict=True):
        x = np.zeros((_LANES, widths[np.searchsorted(widths, samples)]), np.float32)
        n = np.zeros(_LANES, np.int32)
        for row, stretch in enumerate(part):
            n[row] = len(stretch)
            x[row, : n[row]] = stretch
        calls.append((x, n, f.burg_order, f.nfft, rate_hz))
    results = zip(parts, _ahead(_spectra, calls), strict=True)
    return np.concatenate([spectra[: len(part)] for part, spectra in results])


def find_sounds(
    corpus: Corpus, features: ml_collections.ConfigDict, batch: int
) -> list[tuple[list[envelope.Span], float, np.ndarray]]:
    """Of each recording, S1 and S2 as `envelope.pick` finds them, the cycle in seconds, and the envelope (F,).

    Recordings shorter than what the filter needs have no sounds, cycle NaN and an empty envelope.
    Raises:
      ValueError: features.high_hz, filter_order, window_s or hop_s do not fit the corpus' rate.
    """
    f = features
    sos = filters.butterworth(f.filter_order, f.high_hz, corpus.sample_rate_hz, "lowpass")
    where = envelope.frames(f.window_s, f.hop_s, corpus.sample_rate_hz)
    shortest = max(filters.edge_samples(sos) + 1, 3 * where.window)
    usable = np.flatnonzero(corpus.lengths >= shortest)
    order = usable[np.argsort(corpus.lengths[usable], kind="stable")]
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    sounds: list[tuple[list[envelope.Span], float, np.ndarray]] = [([], float("nan"), np.zeros(0))] * len(corpus.rows)
    if not parts:
        return sounds
    longest = np.array([corpus.lengths[part].max() for part in parts])
    widths = np.array(choose_capacities(longest, most=6))
    calls = []
    for part, samples in zip(reversed(parts), reversed(longest), strict=True):
        x = np.zeros((batch, widths[np.searchsorted(widths, samples)]), np.int16)
        lengths = np.zeros(batch, np.int32)
        for row, index in enumerate(part):
            lengths[row] = corpus.lengths[index]
            x[row, : lengths[row]] = corpus.read(int(index))
        calls.append((x, lengths, (f.filter_order, f.high_hz), where))
    for part, (_, lengths, *_), (e, cycles) in zip(reversed(parts), calls, _ahead(_envelopes, calls), strict=True):
        counts = where.count(lengths)
        thresholds = envelope.threshold(e, counts)
        for row, index in enumerate(part):
            curve, cycle = e[row, : counts[row]], float(cycles[row])
            level = float(thresholds[row]) if np.isinf(f.threshold) else f.threshold
            sounds[index] = envelope.pick(curve, where.step_s, level, cycle), cycle, curve
    return sounds


def _ahead(function: Callable, calls: Sequence[tuple]) -> Iterator[Any]:
    """The results of a jitted function for each call, on the host and in order; the next one is computed meanwhile.

    All calls are of this thread: on Python 3.12 with jaxlib 0.11.2 two threads that ran programs on a CPU at once were
    seen to wait for each other for ever.
    """
    waiting: list[Any] = []
    for arguments in calls:
        waiting.append(function(*arguments))
        if len(waiting) > 1:
            yield jax.tree.map(np.asarray, waiting.pop(0))
    for result in waiting:
        yield jax.tree.map(np.asarray, result)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _envelopes(x_BxT: Any, lengths_B: Any, lowpass: tuple[int, float], where: envelope.Frames) -> tuple[Any, Any]:
    """Shannon envelopes (B, F) and cycles (B,) in seconds of recordings (B, T) int16."""
    sos = filters.butterworth(*lowpass, where.sample_rate_hz, "lowpass")
    e = envelope.shannon_envelope(x_BxT, lengths_B, sos, where)
    return e, envelope.cycle_s(e, where.count(lengths_B), where.step_s)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _spectra(x_BxT: Any, lengths_B: Any, order: int, nfft: int, sample_rate_hz: int) -> jax.Array:
    """Burg power spectra (B, nfft / 2 + 1) of stretches (B, T)."""
    k, variance = burg.burg(x_BxT, lengths_B, order)
    return burg.power_spectrum(k, variance, nfft, sample_rate_hz)
