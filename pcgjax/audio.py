"""Audio files -> float32 samples: WAV of any PCM width or float, and FLAC, at any rate."""

from __future__ import annotations

import pathlib
import struct

import numpy as np

SHORTEST_S = 0.5  # less than one cardiac cycle at any heart rate
MOST_SAMPLES_A_BYTE = 65535  # FLAC's largest block


class AudioError(ValueError):
    """An audio file that cannot be used; the message begins with a short kind, as in `truncated: ...`."""


def header(path: str | pathlib.Path) -> tuple[int, int, int]:
    """Returns (rate_hz, frames, channels) from the file's header.

    Raises:
      AudioError: `missing`, `empty`, `not audio` or `truncated`.
    """
    import soundfile

    path = pathlib.Path(path)
    if not path.is_file():
        raise AudioError("missing: no such file")
    if path.stat().st_size == 0:
        raise AudioError("empty: the file has no bytes")
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a headerless format, such as .raw
        raise AudioError(f"not audio: {getattr(error, 'error_string', error)}") from None
    declared = _declared_wav_bytes(path)
    if declared is not None and declared[0] > declared[1]:
        raise AudioError(f"truncated: the header declares {declared[0]} bytes of samples, there are {declared[1]}")
    if info.frames == 0:
        raise AudioError("empty: the file holds no samples")
    if info.frames > path.stat().st_size * MOST_SAMPLES_A_BYTE:  # would ask for the memory before reading
        raise AudioError(
            f"truncated: the header declares {info.frames} samples, more than {path.stat().st_size} bytes can hold"
            " (a FLAC written to a pipe declares no length: encode it again)"
        )
    return int(info.samplerate), int(info.frames), int(info.channels)


def read(path: str | pathlib.Path) -> tuple[np.ndarray, int, int]:
    """Decodes a file; of several channels the first is taken (the caller says so).

    Returns: (samples float32 (n,) with full scale at 1, rate_hz, channels).
    Raises:
      AudioError: as `header`, and `not finite`, `silent`, `too short`.
    """
    import soundfile

    rate_hz, frames, channels = header(path)
    try:
        samples, _ = soundfile.read(str(path), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"truncated: {error.error_string}") from None
    if len(samples) < frames:
        raise AudioError(f"truncated: the header declares {frames} samples, {len(samples)} could be read")
    samples = np.ascontiguousarray(samples[:, 0])
    if not np.isfinite(samples).all():
        raise AudioError(f"not finite: {np.count_nonzero(~np.isfinite(samples))} samples are NaN or infinite")
    if np.ptp(samples) == 0:
        raise AudioError("silent: every sample has the same value")
    if len(samples) < SHORTEST_S * rate_hz:
        raise AudioError(f"too short: {len(samples) / rate_hz:.3f} s, at least {SHORTEST_S} s is needed")
    return samples, rate_hz, channels


def _declared_wav_bytes(path: pathlib.Path) -> tuple[int, int] | None:
    """(declared, present) bytes of a RIFF file's data chunk: libsndfile reads a cut file without a word."""
    with path.open("rb") as file:
        if file.read(4) != b"RIFF":
            return None
        file.seek(12)
        while len(chunk := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", chunk)
            if name == b"data":
                # Recorders that stream leave 0 or 2^32-1 here: the size is then unknown, not wrong.
                return None if size in (0, 0xFFFFFFFF) else (size, path.stat().st_size - file.tell())
            file.seek(size + size % 2, 1)
    return None
