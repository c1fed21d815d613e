"""Audio files decoded, checked, resampled and fingerprinted: one recording, or many over processes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np

from pcgjax.data import Row
from pcgjax.data.workers import in_order, progress_bar
from pcgjax.datasets import Recording, audio
from pcgjax.datasets.audio import AudioError
from pcgjax.datasets.sources import printable

Decoded = tuple[Row | None, np.ndarray | None, str | None]  # row, samples, or the reason why there are none
_FULL_SCALE = 32767
DATASET_FIELDS = ("id", "person", "person_known", "database", "labels", "annotations", "excerpt_s")


def decode(recording: Recording, sample_rate_hz: int) -> tuple[Row, np.ndarray]:
    """Decodes, checks and resamples one recording.

    The peak is scaled to full int16 range and kept as `scale`, so that quiet recordings lose no precision:
    `int16 * scale / 32767` are the samples with the file's full scale at 1.

    Returns: (row, int16 samples (row["num_samples"],)). A row is what json can hold: id, person, person_known,
      database, labels, annotations [[start_s, end_s, state], ...], excerpt_s where it is one, path, source_rate_hz,
      sample_rate_hz, channels, num_samples, scale, sha256 (of the int16 samples), fingerprint (as the function gives
      it), notes (what was read with a doubt, each a text with a kind before a colon).
    Raises:
      AudioError: as `audio.read`, the recording is silent below half the new rate, or too long at it.
    """
    samples, source_rate_hz, channels, notes = audio.read_noted(recording.path)
    if recording.excerpt_s is not None:
        start, end = (round(second * source_rate_hz) for second in recording.excerpt_s)
        samples = samples[start:end]
    audio.check_resampled(len(samples), source_rate_hz, sample_rate_hz, len(samples))
    native = samples if samples.dtype == np.int16 else as_stored(samples)
    scaled, peak = to_int16(samples, source_rate_hz, sample_rate_hz)
    row = dataset_fields(recording) | {
        "path": printable(recording.path),
        "source_rate_hz": source_rate_hz,
        "sample_rate_hz": sample_rate_hz,
        "channels": channels,
        "num_samples": len(scaled),
        "scale": peak / 32768,
        "sha256": hashlib.sha256(scaled.data).hexdigest(),
        "fingerprint": fingerprint(native, source_rate_hz),
        "notes": [*recording.notes, *notes],
    }
    return row, scaled


def to_int16(samples: np.ndarray, source_rate_hz: int, sample_rate_hz: int) -> tuple[np.ndarray, float]:
    """(samples at another rate, int16 with their peak at full scale; that peak before) of (n,) samples, int or float.

    Raises:
      AudioError: nothing is left at that rate.
    """
    import soxr

    samples = samples.astype(np.float32, copy=False)
    if source_rate_hz != sample_rate_hz:
        samples = soxr.resample(samples, source_rate_hz, sample_rate_hz, quality="HQ")
    peak = float(max(samples.max(), -samples.min()))
    if peak == 0:
        raise AudioError(f"silent: nothing is left at {sample_rate_hz} Hz")
    scaled = samples * np.float32(_FULL_SCALE / peak)
    return np.rint(scaled, out=scaled).astype("<i2"), peak


def as_stored(samples: np.ndarray) -> np.ndarray:
    """Samples as int16 for `fingerprint`; a copy of integers that was saved as floats has the integers' fingerprint.

    Args: samples: float32 (n,) with full scale at 32768. Integers saved as floats without scaling lie far beyond it,
      24-bit ones still farther, and physical units such as volts far below: these are scaled by powers of 256, which
      are the same for an excerpt of about the same peak.
    """
    peak = float(np.abs(samples).max())
    factor = 1.0
    if peak > 32768 and not (samples % 32768).any():  # whole numbers
        factor = 2.0 ** (-15 - 8 * max(0, math.ceil((math.log2(peak) - 30) / 8)))
    elif peak > 65536 or (0 < peak < 16 and (samples % 1).any()):
        factor = 2.0 ** (8 * math.floor((15 - math.log2(peak)) / 8))
    return np.clip(np.rint(samples * np.float32(factor)), -32768, 32767).astype("<i2")


def dataset_fields(recording: Recording) -> Row:
    """The part of a row that comes from the data set, not from the audio."""
    return {
        "id": recording.id,
        "person": recording.person,
        "person_known": recording.person_known,
        "database": recording.database,
        "labels": dict(sorted(recording.labels.items())),
        "annotations": recording.annotations,
        **({"excerpt_s": recording.excerpt_s} if recording.excerpt_s else {}),
    }


_WINDOW = 64  # samples of a fingerprint window, at about 2 kHz
_SELECT = np.array([40503, 60493, 44111], np.uint16)
_HASH = np.frombuffer(hashlib.shake_256(b"any odd numbers").digest(128), "<u8") | np.uint64(1)


def fingerprint(samples: np.ndarray, rate_hz: int) -> str:
    """Hashes of some 32 ms windows, chosen by what they hold: excerpts of one recording share theirs.

    About 8 windows a second are hashed, wherever an excerpt begins. A second of shared audio gives 8 common
    hashes on average (fewer than 3 in 1 of 70 cases), two seconds 16. Only equal samples have equal hashes: not
    the same audio at another gain, rate or channel. Windows that hardly change (silence, clipping) are left out.

    Args:
      samples: int16 (n,), as they are in the file.
    Returns: the hashes in rising order, 8 hexadecimal digits each, separated by blanks.
    """
    # Oversampled audio changes little from sample to sample, so a window has the same length in seconds at every rate.
    step = max(1, round(rate_hz / 2000))
    samples = np.ascontiguousarray(samples, "<i2")
    if len(samples) < _WINDOW * step:
        return ""
    # A multiply-add hash of 4 samples of every window chooses; 16-bit arithmetic is what makes this quick. Two samples
    # are too few: in quiet or periodic recordings that choice falls on one window in two, or on hardly any.
    chosen = samples.view(np.uint16) * _SELECT[0]
    for lag, factor in ((13 * step, _SELECT[1]), (37 * step, _SELECT[2])):
        later = chosen[lag:] * factor
        chosen = np.add(later, chosen[:-lag], out=later)
    count = len(samples) - (_WINDOW - 1) * step
    (starts,) = (chosen[:count] < max(1, round(65536 * 8 / rate_hz))).nonzero()
    every = np.ndarray((count, _WINDOW), samples.dtype, samples, strides=(2, 2 * step))
    windows = every[starts]
    windows = windows[(windows[:, 1:] != windows[:, :-1]).sum(axis=1, dtype=np.uint8) >= _WINDOW // 2]
    hashes = windows.view("<u8") @ _HASH >> np.uint64(32)
    hashes.sort()
    return hashes.astype(">u4").tobytes().hex(" ", 4)


def decode_all(
    recordings: Sequence[Recording], sample_rate_hz: int, workers: int | None = None, description: str = "decoding"
) -> Iterator[tuple[Recording, Row | None, np.ndarray | None, str | None]]:
    """Decodes recordings in order, in `workers` processes (default: one a core), with a progress bar.

    Yields: (recording, row, samples, None) as `decode` gives them, or (recording, None, None, reason).
    """
    chunks = [recordings[i : i + 8] for i in range(0, len(recordings), 8)]
    jobs = [(chunk, sample_rate_hz) for chunk in chunks]
    with progress_bar(len(recordings), description) as advance:
        for chunk, results in zip(chunks, in_order(_decode_many, jobs, len(recordings), workers), strict=True):
            for recording, (row, samples, reason) in zip(chunk, results, strict=True):
                yield recording, row, samples, reason
            advance(len(chunk))


def _decode_many(job: tuple[Sequence[Recording], int]) -> list[Decoded]:
    recordings, sample_rate_hz = job
    return [try_decode(recording, sample_rate_hz) for recording in recordings]


def try_decode(recording: Recording, sample_rate_hz: int) -> Decoded:
    """As `decode`: (row, samples, None), or (None, None, reason) where the file cannot be used."""
    try:
        return *decode(recording, sample_rate_hz), None
    except AudioError as error:
        return None, None, str(error)
    except OSError as error:
        return None, None, f"unreadable: {error.strerror or error}"
    except MemoryError:
        return None, None, "too long: the memory does not suffice to decode it; cut the recording"
