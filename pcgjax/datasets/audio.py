"""Audio files -> float32 samples: WAV of any PCM width or float, FLAC, and what else libsndfile reads, at any rate.

What is read with a doubt has notes: short texts that begin with a kind, as in `size: ...`, `channels: ...`.
"""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from pcgjax.datasets import containers
from pcgjax.datasets.sources import SourceError, opened

SHORTEST_S = 0.5  # less than one cardiac cycle at any heart rate
ONE_CYCLE_S = 1.0
RATES_HZ = (100, 768_000)  # that can be read
USUAL_RATES_HZ = (1000, 48_000)
MOST_SAMPLES = 1 << 26  # that a file may be decoded or resampled to, unless its own bytes are a quarter as many
LOUDEST = 2.0**33  # full scale is 1; integers of 32 bits that were saved as floats reach 2**31
QUIETEST = 2.0**-100
QUIET = 2.0**-10  # below it float samples are raised for a segmenter, whose features have a floor
LOUDER_CHANNEL = 10  # times the range of the one that is read, from where on it is said
FAMILIES = {
    ".wav": ("WAV", "WAVEX", "RF64", "W64"), ".wave": ("WAV", "WAVEX", "RF64", "W64"), ".flac": ("FLAC",),
    ".aif": ("AIFF",), ".aiff": ("AIFF",), ".mp3": ("MP3", "MPEG"), ".ogg": ("OGG",),
}  # fmt: skip
WHOLE_OR_ERROR = {"WAV", "WAVEX", "RF64", "FLAC", "AIFF"}  # of these formats a cut file is noticed
LOSSLESS = ("PCM_", "FLOAT", "DOUBLE", "ALAC")


class AudioError(ValueError):
    """An audio file that cannot be used; the message begins with a short kind, as in `truncated: ...`."""


class Header(NamedTuple):
    """What is known of a file before its samples are read."""

    rate_hz: int
    frames: int
    channels: int
    notes: tuple[str, ...]
    length: int  # of the file, in bytes
    wav: containers.Wav | None = None
    flac: containers.Flac | None = None


def header(path: str | pathlib.Path) -> tuple[int, int, int]:
    """Returns (rate_hz, frames, channels) from the file's header.

    Raises:
      AudioError: `missing`, `unreadable`, `empty`, `not audio`, `rate`, `too long` or `truncated`.
    """
    with _open(path) as file:
        return _header(file)[:3]


def read(path: str | pathlib.Path) -> tuple[np.ndarray, int, int]:
    """Decodes a file; of several channels the first is taken (the caller says so).

    Returns: (samples float32 (n,) with full scale at 1, rate_hz, channels).
    Raises:
      AudioError: as `header`, and `damaged`, `not finite`, `too loud`, `silent`, `too short`.
    """
    samples, rate_hz, channels = read_steps(path)
    return samples * np.float32(1 / 32768), rate_hz, channels


def read_steps(path: str | pathlib.Path) -> tuple[np.ndarray, int, int]:
    """As `read`, with full scale at 32768: int16 where the file holds 16-bit integers, else float32."""
    return read_noted(path)[:3]


def read_noted(path: str | pathlib.Path) -> tuple[np.ndarray, int, int, tuple[str, ...]]:
    """As `read_steps`, and the notes on what was read with a doubt."""
    try:
        with _open(path) as file:
            found = _header(file)
            if found.wav and found.wav.plain:
                # Nearly all heart sounds come so: libsndfile would take longer to open the file than this to read it.
                file.seek(found.wav.begin)
                every = np.frombuffer(file.read(2 * found.frames * found.channels), "<i2").reshape(-1, found.channels)
                if len(every) < found.frames:
                    raise AudioError("truncated: the file became shorter while it was read")
            else:
                every = np.concatenate(list(_blocks(file, found, found.frames)))
    except OSError as error:
        raise AudioError(f"unreadable: {error.strerror or error}") from None
    samples = np.ascontiguousarray(every[:, 0])
    low, high = samples.min(), samples.max()
    notes = found.notes + _judged(every, low, high, found)
    if samples.dtype != np.int16:
        samples *= np.float32(32768)
    return samples, found.rate_hz, found.channels, notes


def pieces(
    path: str | pathlib.Path, sample_rate_hz: int, piece_s: float = 10.0, notes: list[str] | None = None
) -> Iterator[np.ndarray]:
    """A file's first channel at another rate, float32 with full scale at 1, a piece at a time: for files of any length.

    Samples that all lie far below full scale, as floats in volts may, are raised by a power of two.

    Args: notes: to which those on what is read with a doubt are added.
    Yields: (n,) samples of about `piece_s` seconds.
    Raises:
      AudioError: as `header`, and `not finite`, `too short`; with the last piece `damaged`, `too loud`, `silent`.
    """
    import soxr

    try:
        with _open(path) as file:
            found = _header(file)
            rate_hz, frames = found.rate_hz, found.frames
            if frames < SHORTEST_S * rate_hz:
                raise AudioError(f"too short: {frames / rate_hz:.3f} s, at least {SHORTEST_S} s is needed")
            check_resampled(frames, rate_hz, sample_rate_hz, found.length)
            resample = soxr.ResampleStream(rate_hz, sample_rate_hz, 1, dtype="float32", quality="HQ")
            done, ends, raised = 0, [], _raise_by(file, found)
            for every in _blocks(file, found, round(piece_s * rate_hz)):
                if not np.isfinite(every[:, 0]).all():
                    raise AudioError(f"not finite: a sample after {done / rate_hz:.1f} s is NaN or infinite")
                done += len(every)
                ends += [every.min(0), every.max(0)]
                samples = every[:, 0] * raised
                if abs(samples).max() > LOUDEST:
                    _judged(np.array(ends), ends[-2][0], ends[-1][0], found._replace(frames=frames))
                yield samples if rate_hz == sample_rate_hz else resample.resample_chunk(samples, last=done >= frames)
    except OSError as error:
        raise AudioError(f"unreadable: {error.strerror or error}") from None
    reach = np.array(ends)
    judged = _judged(reach, reach[:, 0].min(), reach[:, 0].max(), found)
    if notes is not None:
        notes += found.notes + judged


def _raise_by(file: BinaryIO, found: Header) -> np.float32:
    """What brings the peak of a float file's first channel, if it is below QUIET, to between 1/2 and 1; else 1."""
    if found.flac or (found.wav and found.wav.plain):
        return np.float32(1)
    peak = max((float(np.abs(every[:, 0]).max()) for every in _blocks(file, found, 1 << 18)), default=0.0)
    return np.float32(2.0 ** -math.floor(math.log2(peak) + 1) if 0 < peak < QUIET else 1)


def check_resampled(frames: int, rate_hz: int, sample_rate_hz: int, length: int) -> None:
    """Raises AudioError where a file of `length` bytes would become too many samples at another rate."""
    samples = frames * sample_rate_hz // rate_hz
    if samples > max(MOST_SAMPLES, 4 * length):
        raise AudioError(
            f"too long: {frames} samples at {rate_hz} Hz, as the header's rate says, are {samples} at "
            f"{sample_rate_hz} Hz; write the recorder's rate into the header, or cut the recording"
        )


def _open(path: str | pathlib.Path) -> BinaryIO:
    try:
        return opened(path)
    except SourceError as error:
        raise AudioError(str(error)) from None


def _header(file: BinaryIO) -> Header:
    length = os.fstat(file.fileno()).st_size
    if length == 0:
        raise AudioError("empty: the file has no bytes")
    containers.past_tags(file)
    wav = containers.wav(file, length)
    if wav and wav.missing:  # libsndfile reads a cut file without an error
        raise AudioError(
            f"truncated: the header declares {wav.size + wav.missing} bytes of samples, there are {wav.size}"
        )
    if wav and wav.plain:
        found = Header(wav.rate_hz, wav.size // (2 * wav.channels), wav.channels, wav.notes, length, wav)
    else:
        found = _as_libsndfile_reads_it(file, wav, length)
    rate_hz, frames = found.rate_hz, found.frames
    if frames == 0:
        raise AudioError("empty: the file holds no samples")
    if rate_hz <= 0:
        raise AudioError("not audio: the header declares a rate of 0 Hz")
    low_hz, high_hz = RATES_HZ
    if not low_hz <= rate_hz <= high_hz:
        raise AudioError(
            f"rate: the header declares {rate_hz} Hz, {low_hz} to {high_hz} can be read; write the recorder's rate "
            "into the header"
        )
    low_hz, high_hz = USUAL_RATES_HZ
    if not low_hz <= rate_hz <= high_hz or _odd(rate_hz) or found.channels > 1 or frames < ONE_CYCLE_S * rate_hz:
        return found._replace(notes=found.notes + _unusual(found))
    return found


def _odd(rate_hz: int) -> bool:
    """Whether no recorder has this rate; one wrong bit makes any usual rate such a one."""
    return rate_hz % 25 != 0 and rate_hz & (rate_hz - 1) != 0


def _unusual(found: Header) -> tuple[str, ...]:
    notes = []
    low_hz, high_hz = USUAL_RATES_HZ
    if found.rate_hz < low_hz:
        notes.append(f"rate: {found.rate_hz} Hz holds nothing above {found.rate_hz / 2:g} Hz, where murmurs reach")
    elif found.rate_hz > high_hz or _odd(found.rate_hz):
        notes.append(f"rate: {found.rate_hz} Hz is unusual for a stethoscope")
    if found.channels > 1:
        notes.append(f"channels: the first of {found.channels} is read")
    if SHORTEST_S * found.rate_hz <= found.frames < ONE_CYCLE_S * found.rate_hz:
        notes.append(f"short: {found.frames / found.rate_hz:.2f} s may not hold a heart cycle")
    return tuple(notes)


def _as_libsndfile_reads_it(file: BinaryIO, wav: containers.Wav | None, length: int) -> Header:
    import soundfile

    try:
        with soundfile.SoundFile(_source(file, wav)) as sound:
            rate_hz, frames, channels = int(sound.samplerate), int(sound.frames), int(sound.channels)
            kind, subtype = sound.format, sound.subtype
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:  # TypeError: no header, as of .raw
        raise AudioError(f"not audio: {getattr(error, 'error_string', error)}") from None
    notes = list(wav.notes) if wav else []
    suffix = os.path.splitext(os.fsdecode(file.name))[1].lower()
    if kind not in FAMILIES.get(suffix, (kind,)):
        notes.append(f"name: the file is named {suffix} and is {kind}")
    if not subtype.startswith(LOSSLESS):
        notes.append(f"lossy: {subtype} keeps only a part of the sound")
    elif kind not in WHOLE_OR_ERROR or (wav is None and kind in ("WAV", "WAVEX", "RF64")):
        notes.append(f"container: whether a file of format {kind} was cut cannot be told")
    containers.past_tags(file)
    flac = containers.flac(file) if kind == "FLAC" else None
    found = Header(rate_hz, frames, channels, (), length, wav, flac)
    if kind == "AIFF":
        declared = containers.aiff_frames(file) or 0
        if frames < declared:
            raise AudioError(f"truncated: the header declares {declared} samples, there are {frames}")
        if frames > declared:
            notes.append(f"size: the header declares {declared} samples, there are {frames}; all are read")
    if kind == "FLAC" and not (flac and flac.frames):
        found = found._replace(flac=None, frames=_counted(file, found))
        notes.append("size: the header leaves it open, as of an encoder that streams; read to the file's end")
    if found.frames * channels > max(MOST_SAMPLES, 4 * length):  # would ask for the memory before reading
        raise AudioError(
            f"too long: the header declares {found.frames} samples in {channels} channels, too many for "
            f"{length} bytes; encode the recording again, in parts if it is so long"
        )
    return found._replace(notes=tuple(notes))


def _source(file: BinaryIO, wav: containers.Wav | None) -> bytes | BinaryIO:
    """What libsndfile is given: the file's name, or the samples under a header of our own."""
    return os.fsencode(file.name) if wav is None or wav.canonical else containers.rewritten(file, wav)


def _counted(file: BinaryIO, found: Header) -> int:
    """The frames of a file that does not declare them."""
    import soundfile

    frames, most = 0, max(MOST_SAMPLES, 4 * found.length) // found.channels
    try:
        with soundfile.SoundFile(_source(file, found.wav)) as sound:
            sound.seekable = lambda: False  # seeking fails where the length is not known
            while frames <= most and (some := len(sound.read(1 << 16, dtype="int16", always_2d=True))):
                frames += some
    except soundfile.LibsndfileError as error:
        if not frames:
            raise AudioError(f"truncated: {error.error_string}") from None
    return frames


def _blocks(file: BinaryIO, found: Header, size: int) -> Iterator[np.ndarray]:
    """All samples, float32 (n, channels) with full scale at 1, `size` frames at a time.

    Raises:
      AudioError: `truncated` or `damaged`.
    """
    import soundfile

    done = 0
    if found.wav and found.wav.plain:
        file.seek(found.wav.begin)
        for done in range(0, found.frames, size):
            frames = min(size, found.frames - done)
            every = np.frombuffer(file.read(2 * frames * found.channels), "<i2").reshape(-1, found.channels)
            if len(every) < frames:
                raise AudioError("truncated: the file became shorter while it was read")
            yield every * np.float32(1 / 32768)
        return
    # FLAC carries a digest of its integers, which are exact as float32 up to 24 bits.
    flac = found.flac if found.flac and found.flac.bits in (8, 16, 24) and any(found.flac.md5) else None
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with soundfile.SoundFile(_source(file, found.wav)) as sound:
            sound.seekable = lambda: False  # seeking after each block takes time, and fails in a FLAC of open length
            while done < found.frames:
                frames = min(size, found.frames - done)
                every = sound.read(frames, dtype="int32" if flac else "float32", always_2d=True)
                done += len(every)
                if len(every) < frames:
                    raise AudioError(f"truncated: the header declares {found.frames} samples, {done} could be read")
                if flac:
                    used = every.view(np.uint8).reshape(*every.shape, 4)[..., 4 - flac.bits // 8 :]
                    digest.update(np.ascontiguousarray(used).data)
                    every = every.astype(np.float32) * np.float32(2**-31)
                yield every
    except soundfile.LibsndfileError as error:
        raise AudioError(f"truncated: {error.error_string}") from None
    if flac and digest.digest() != flac.md5:
        raise AudioError("damaged: the samples do not fit the FLAC's checksum; copy the file again")


def _judged(every: np.ndarray, low: float, high: float, found: Header) -> tuple[str, ...]:
    """Notes on decoded samples. every: (n, channels), or just the extremes of each; low, high: of the first channel.

    Raises:
      AudioError: `not finite`, `too loud`, `silent` or `too short`.
    """
    if not np.isfinite(low) or not np.isfinite(high):
        bad = np.count_nonzero(~np.isfinite(every[:, 0]))
        raise AudioError(f"not finite: {bad} samples are NaN or infinite")
    full_scale = 32768.0 if every.dtype == np.int16 else 1.0
    peak = max(float(high), -float(low)) / full_scale
    if peak > LOUDEST:
        raise AudioError(f"too loud: the samples reach {peak:.3g}, full scale is 1; save them as integers or within 1")
    ranges = every.max(0).astype(float) - every.min(0) if found.channels > 1 else np.zeros(1)
    if low == high or peak < QUIETEST:
        what = "every sample has the same value" if low == high else f"the samples reach no more than {peak:.0e}"
        others = f" in the first of {found.channels} channels" if found.channels > 1 else ""
        hint = "; another one has sound: save it alone" if ranges.max() > 0 else ""
        raise AudioError(f"silent: {what}{others}{hint}")
    if found.frames < SHORTEST_S * found.rate_hz:
        seconds = found.frames / found.rate_hz
        raise AudioError(f"too short: {seconds:.3f} s, at least {SHORTEST_S} s is needed")
    notes = []
    if peak > 1:
        notes.append(f"scale: the samples are floats that reach {peak:.5g}, where full scale is 1; read as they are")
    if ranges.max() > LOUDER_CHANNEL * ranges[0]:
        times = ranges.max() / ranges[0]
        notes.append(f"channels: number {ranges.argmax() + 1} is {times:.0f} times as loud as the first, which is read")
    return tuple(notes)
