"""Suite `classical`: the features of all clips, against a loop over clips with SciPy and librosa.

Both do the same: filter, envelope, threshold, cycle, S1 and S2, Burg's spectrum of every systole and diastole, means.
What picks S1 and S2 on the envelope is the same function; the peer computes all else as one would for a single clip.
"""

from __future__ import annotations

import functools

import ml_collections
import numpy as np
import scipy.signal

from pcgjax.bench.corpora import pascal_like
from pcgjax.bench.timing import paired, ratio_text
from pcgjax.classical.features import classical_features
from pcgjax.classical.selection import selected
from pcgjax.data.corpus import Corpus, from_prepared, in_memory
from pcgjax.datasets import DIASTOLE, SYSTOLE
from pcgjax.features import envelope


def classical_suite(prepared: str = "", clips: int = 195, pairs: int = 15) -> dict:
    """{features: as of `timing.paired`, clips, seconds, sample_rate_hz, stretches, heartbeats_found_by_one_alone,
    difference_db}.

    prepared: a folder of PASCAL's; "": as many simulated clips, of like lengths.
    """
    config = _config()
    corpus = selected(from_prepared(prepared), config)[0] if prepared else pascal_like(clips)
    samples = [corpus.read(i) for i in range(len(corpus.rows))]
    corpus = in_memory(corpus.rows, samples, corpus.sample_rate_hz)
    features, peers = classical_features(corpus, config), peer_features(corpus, config)
    ours = dict(zip(features.indices.tolist(), features.values, strict=True))
    both = sorted(ours.keys() & peers.keys())
    differences = [np.abs(10 * np.log10(ours[i] / peers[i])).max() for i in both]
    return {
        "clips": len(corpus.rows),
        "seconds": float(corpus.lengths.sum() / corpus.sample_rate_hz),
        "sample_rate_hz": corpus.sample_rate_hz,
        "stretches": features.stretches,
        "heartbeats_found_by_one_alone": len(ours.keys() ^ peers.keys()),  # the other rounds otherwise
        "difference_db": {"median": float(np.median(differences)), "largest": float(max(differences))},
        "features": paired(
            functools.partial(classical_features, corpus, config), functools.partial(peer_features, corpus, config),
            pairs, "features",
        ),
    }  # fmt: skip


def classical_summary(result: dict) -> str:
    """The main figures, for a terminal."""
    times, difference = result["features"], result["difference_db"]
    return (
        f"features of {result['clips']} clips ({result['seconds']:.0f} s at {result['sample_rate_hz']} Hz)   "
        f"{ratio_text(times['ratio'], times['ratio_range'], 'the loop', 1)}  ours {times['ours_s']:.2f} s, it "
        f"{times['peer_s']:.2f} s\n"
        f"difference of a clip's spectra at most: median {difference['median']:.1e} dB, largest "
        f"{difference['largest']:.1e} dB; "
        f"clips in which one alone found heartbeats: {result['heartbeats_found_by_one_alone']}"
    )


def _config() -> ml_collections.ConfigDict:
    """The fields of configs/classical.py that the features depend on."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "data": {"database": "", "noisy": False, "shuffle_labels": False},
            "task": {"target": "auto"},
            "features": {
                "high_hz": 100.0, "filter_order": 4, "window_s": 0.02, "hop_s": 0.01, "threshold": float("inf"),
                "burg_order": 10, "nfft": 512, "decibels": False,
            },
            "train": {"batch_recordings": 16},
        }
    )  # fmt: skip


def peer_features(corpus: Corpus, config: ml_collections.ConfigDict) -> dict[int, np.ndarray]:
    """{index: (2 * bins,)} of the clips with a cycle, one clip and one stretch after the other, in float64."""
    import librosa

    f, rate = config.features, corpus.sample_rate_hz
    sos = scipy.signal.butter(f.filter_order, f.high_hz, fs=rate, output="sos")
    features = {}
    for index in range(len(corpus.rows)):
        x = corpus.read(index).astype(np.float64)
        x /= np.abs(x).max()
        spectra: dict[int, list] = {SYSTOLE: [], DIASTOLE: []}
        for start_s, end_s, state in peer_states(x, rate, sos, f.window_s, f.hop_s):
            stretch = x[round(start_s * rate) : round(end_s * rate)]
            if state in spectra and len(stretch) > f.burg_order:
                a = librosa.lpc(stretch, order=f.burg_order)
                _, response = scipy.signal.freqz(1, a, worN=f.nfft // 2 + 1, include_nyquist=True)
                sides = np.where(np.arange(len(response)) % (len(response) - 1), 2, 1)
                spectra[state].append(sides / rate * _residual_power(stretch, a) * np.abs(response) ** 2)
        if all(spectra.values()):
            features[index] = np.concatenate([np.mean(each, axis=0) for each in spectra.values()])
    return features


def _residual_power(stretch: np.ndarray, a: np.ndarray) -> float:
    """Burg's variance, from the filter by Levinson's recursion backwards: librosa keeps it to itself."""
    power = np.mean(stretch**2)
    while len(a) > 1:
        k = a[-1]
        power *= 1 - k**2
        a = (a - k * a[::-1])[:-1] / (1 - k**2)
    return float(power)


def peer_states(x: np.ndarray, rate: int, sos: np.ndarray, window_s: float, hop_s: float) -> list[envelope.Span]:
    """S1, systole, S2 and diastole of one clip, as SciPy and NumPy have it."""
    y = scipy.signal.sosfiltfilt(sos, x)
    y = (y - y.mean()) / y.std()
    power = (y / np.abs(y).max()) ** 2
    energy = -power * np.log(np.where(power > 0, power, 1))
    window, hop = round(window_s * rate), round(hop_s * rate)
    e = np.array([energy[i : i + window].mean() for i in range(0, len(energy) - window + 1, hop)])
    e = (e - e.mean()) / e.std()
    values, n = np.sort(e), len(e)
    k = np.arange(1, n)
    cut = int(((np.cumsum(values)[:-1] - k * values.mean()) ** 2 / (k * (n - k))).argmax())
    r = scipy.signal.correlate(e, e)[n - 1 :] / np.arange(n, 0, -1)
    peaks = scipy.signal.find_peaks(r)[0] * hop_s
    peaks = peaks[(peaks > 0.4 - hop_s / 2) & (peaks < min(1.5, 2 * n // 3 * hop_s) + hop_s / 2)]
    level = r[np.rint(peaks / hop_s).astype(int)]
    cycle_s = float(peaks[level >= 0.85 * level.max()][0]) if len(peaks) and level.max() > 0 else float("nan")
    threshold = (values[cut] + values[cut + 1]) / 2
    return envelope.states(envelope.pick(e, hop / rate, threshold, cycle_s), cycle_s)
