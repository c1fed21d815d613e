"""Audio files -> float32 samples: WAV of any PCM width or float, and FLAC, at any rate."""

from __future__ import annotations

import os
import pathlib
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, TypeGuard

import numpy as np

SHORTEST_S = 0.5  # less than one cardiac cycle at any heart rate
MOST_SAMPLES_A_BYTE = 65535  # FLAC's largest block


class AudioError(ValueError):
    """An audio file that cannot be used; the message begins with a short kind, as in `truncated: ...`."""


class _Wav(NamedTuple):
    """What a RIFF file's chunks say."""

    encoding: int  # 1: integer PCM
    channels: int
    rate_hz: int
    bits: int
    begin: int  # of the samples, in bytes
    size: int  # of the samples as the header declares it; -1 where a recorder that streams left it open


def header(path: str | pathlib.Path) -> tuple[int, int, int]:
    """Returns (rate_hz, frames, channels) from the file's header.

    Raises:
      AudioError: `missing`, `empty`, `not audio` or `truncated`.
    """
    with _opened(path) as file:
        return _header(file, _wav(file))


def read(path: str | pathlib.Path) -> tuple[np.ndarray, int, int]:
    """Decodes a file; of several channels the first is taken (the caller says so).

    Returns: (samples float32 (n,) with full scale at 1, rate_hz, channels).
    Raises:
      AudioError: as `header`, and `not finite`, `silent`, `too short`.
    """
    samples, rate_hz, channels = read_steps(path)
    return samples * np.float32(1 / 32768), rate_hz, channels


def read_steps(path: str | pathlib.Path) -> tuple[np.ndarray, int, int]:
    """As `read`, with full scale at 32768: int16 where the file holds 16-bit integers, else float32."""
    with _opened(path) as file:
        wav = _wav(file)
        rate_hz, frames, channels = _header(file, wav)
        if _plain(wav):
            # Nearly all heart sounds come so: libsndfile would take longer to open the file than this to read it.
            file.seek(wav.begin)
            samples = np.ascontiguousarray(np.frombuffer(file.read(2 * frames * channels), "<i2")[::channels])
        else:
            samples = _decode(file, frames)
            if not np.isfinite(samples).all():
                raise AudioError(f"not finite: {np.count_nonzero(~np.isfinite(samples))} samples are NaN or infinite")
            samples *= np.float32(32768)
    if samples.min() == samples.max():
        raise AudioError("silent: every sample has the same value")
    if len(samples) < SHORTEST_S * rate_hz:
        raise AudioError(f"too short: {len(samples) / rate_hz:.3f} s, at least {SHORTEST_S} s is needed")
    return samples, rate_hz, channels


def pieces(path: str | pathlib.Path, sample_rate_hz: int, piece_s: float = 10.0) -> Iterator[np.ndarray]:
    """A file's first channel at another rate, float32 with full scale at 1, a piece at a time: for files of any length.

    Yields: (n,) samples of about `piece_s` seconds.
    Raises:
      AudioError: as `header`, and `not finite`, `too short`; with the last piece `silent`.
    """
    import soundfile
    import soxr

    rate_hz, frames, _ = header(path)
    if frames < SHORTEST_S * rate_hz:
        raise AudioError(f"too short: {frames / rate_hz:.3f} s, at least {SHORTEST_S} s is needed")
    resample = soxr.ResampleStream(rate_hz, sample_rate_hz, 1, dtype="float32", quality="HQ")
    done, lowest, highest = 0, np.inf, -np.inf
    try:
        for block in soundfile.blocks(str(path), round(piece_s * rate_hz), dtype="float32", always_2d=True):
            samples = np.ascontiguousarray(block[:, 0])
            if not np.isfinite(samples).all():
                raise AudioError(f"not finite: a sample after {done / rate_hz:.1f} s is NaN or infinite")
            done += len(samples)
            lowest, highest = min(lowest, samples.min()), max(highest, samples.max())
            yield samples if rate_hz == sample_rate_hz else resample.resample_chunk(samples, last=done >= frames)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"truncated: {error.error_string}") from None
    if done < frames:
        raise AudioError(f"truncated: the header declares {frames} samples, {done} could be read")
    if lowest == highest:
        raise AudioError("silent: every sample has the same value")


def _opened(path: str | pathlib.Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except (FileNotFoundError, IsADirectoryError):
        raise AudioError("missing: no such file") from None


def _plain(wav: _Wav | None) -> TypeGuard[_Wav]:
    return wav is not None and wav.encoding == 1 and wav.bits == 16 and wav.channels > 0 and wav.size >= 0


def _wav(file: BinaryIO) -> _Wav | None:
    """The chunks of a RIFF file; None for any other file."""
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return None
    encoding = channels = rate_hz = bits = 0
    while len(chunk := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", chunk)
        if name == b"data":
            return _Wav(encoding, channels, rate_hz, bits, file.tell(), -1 if size in (0, 0xFFFFFFFF) else size)
        body = file.read(size + size % 2) if size < 65536 else b""
        if name == b"fmt " and len(body) >= 16:
            encoding, channels, rate_hz, _, _, bits = struct.unpack("<HHIIHH", body[:16])
        elif not body:
            file.seek(size + size % 2, 1)
    return None


def _header(file: BinaryIO, wav: _Wav | None) -> tuple[int, int, int]:
    import soundfile

    length = os.fstat(file.fileno()).st_size
    if length == 0:
        raise AudioError("empty: the file has no bytes")
    if wav and wav.size > length - wav.begin:  # libsndfile reads a cut file without an error
        present = length - wav.begin
        raise AudioError(f"truncated: the header declares {wav.size} bytes of samples, there are {present}")
    if _plain(wav):
        rate_hz, frames, channels = wav.rate_hz, wav.size // (2 * wav.channels), wav.channels
    else:
        try:
            info = soundfile.info(file.name)
        except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a headerless format, such as .raw
            raise AudioError(f"not audio: {getattr(error, 'error_string', error)}") from None
        rate_hz, frames, channels = int(info.samplerate), int(info.frames), int(info.channels)
    if frames == 0:
        raise AudioError("empty: the file holds no samples")
    if rate_hz <= 0:
        raise AudioError("not audio: the header declares a rate of 0 Hz")
    if frames > length * MOST_SAMPLES_A_BYTE:  # would ask for the memory before reading
        raise AudioError(
            f"truncated: the header declares {frames} samples, more than {length} bytes can hold"
            " (a FLAC written to a pipe declares no length: encode it again)"
        )
    return rate_hz, frames, channels


def _decode(file: BinaryIO, frames: int) -> np.ndarray:
    import soundfile

    try:
        samples, _ = soundfile.read(file.name, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"truncated: {error.error_string}") from None
    if len(samples) < frames:
        raise AudioError(f"truncated: the header declares {frames} samples, {len(samples)} could be read")
    return np.ascontiguousarray(samples[:, 0])
