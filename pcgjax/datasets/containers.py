"""What the headers of sound files say, and how far it may be trusted: RIFF (WAV, RF64, BW64), FLAC and AIFF.

Recorders that stream, or that lost power, leave sizes that are zero, too large or too small; libsndfile believes them.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO, NamedTuple

STREAMED = 0x7FFF0000  # sizes from here on stand for "not known yet": 0x7FFFF000 of sox, all ones of ffmpeg
SLACK_BYTES = 64  # by which a whole file's declared size may be too large: a header counted as samples, a padding


class Wav(NamedTuple):
    """What a RIFF file's chunks say."""

    encoding: int  # 1: integer PCM
    channels: int
    rate_hz: int
    bits: int
    begin: int  # of the samples, in bytes
    size: int  # of the samples that are there, in bytes
    missing: int  # bytes that the header declares beyond the file's end, where the file was cut; else 0
    canonical: bool  # whether libsndfile reads the header rightly; else it needs `rewritten`
    format: bytes  # the body of the fmt chunk
    notes: tuple[str, ...]

    @property
    def plain(self) -> bool:
        """Whether the samples are little-endian 16-bit integers."""
        return self.encoding == 1 and self.bits == 16 and self.channels > 0


def wav(file: BinaryIO, length: int) -> Wav | None:
    """Reads the chunks of a RIFF file of `length` bytes; None for any other file, and where no samples are found."""
    head = file.read(12)
    if head[8:] != b"WAVE" or head[:4] not in (b"RIFF", b"RF64", b"BW64"):
        return None
    wide, body, canonical = 0, b"", head[:4] != b"BW64"
    while len(chunk := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", chunk)
        if name == b"data":
            if size == 0xFFFFFFFF and head[:4] != b"RIFF":
                size = wide
            return _checked(file, length, head, body, size, canonical)
        if size > length:
            return None
        if name in (b"fmt ", b"ds64"):
            content = file.read(size)
            if name == b"fmt ":
                body = content
            elif size >= 16:
                wide = int.from_bytes(content[8:16], "little")
        else:
            file.seek(size, 1)
        if size % 2 and (after := file.read(5)):  # some writers forget the padding of an odd chunk
            padded = after[:4] not in (b"data", b"fmt ", b"fact", b"LIST")
            canonical &= padded
            file.seek(1 - len(after) if padded else -len(after), 1)
    return None


def _checked(file: BinaryIO, length: int, head: bytes, body: bytes, declared: int, canonical: bool) -> Wav | None:
    if len(body) < 16:
        return None
    encoding, channels, rate_hz, a_second, a_frame, bits = struct.unpack("<HHIIHH", body[:16])
    begin = file.tell()
    present, riff = length - begin, int.from_bytes(head[4:8], "little")
    size, missing, notes = declared, 0, []
    if declared == 0 and present and not _chunks(file, length):
        size = present
        notes.append("size: the header declares no samples, as of a recorder that was stopped; read to the file's end")
    elif declared > present:
        size = present
        if declared >= STREAMED:
            notes.append("size: the header leaves it open, as of a recorder that streams; read to the file's end")
        elif abs(riff + 8 - length) <= 1 or declared - present <= max(SLACK_BYTES, begin):
            notes.append(f"size: the header declares {declared} bytes of samples, there are {present}; all are read")
        else:
            missing = declared - present
    elif present - declared > 1:
        file.seek(begin + declared + declared % 2)
        if not (_chunks(file, length) or (declared % 2 and file.seek(begin + declared) and _chunks(file, length))):
            more = present - declared
            notes.append(f"size: {more} bytes follow the {declared} that the header declares, and are not read")
    if encoding in (1, 3) and (a_frame != channels * -(-bits // 8) or a_second != rate_hz * a_frame):
        notes.append(
            f"header: {channels} channels of {bits} bits at {rate_hz} Hz contradict {a_frame} bytes a frame and "
            f"{a_second} a second; the former count"
        )
    return Wav(encoding, channels, rate_hz, bits, begin, size, missing, canonical and size == declared, body,
               tuple(notes))  # fmt: skip


def _chunks(file: BinaryIO, length: int) -> bool:
    """Whether whole chunks follow to the file's end, or nothing but zeros: what belongs behind the samples."""
    at, known = file.tell(), False
    while length - at >= 8:
        file.seek(at)
        name, size = struct.unpack("<4sI", file.read(8))
        if not (name.isascii() and name.decode().isprintable()) or name == b"data" or at + 8 + size > length:
            file.seek(at)
            return known and not any(file.read(1 << 16)) and length - at <= 1 << 16
        at, known = at + 8 + size + size % 2, True
    return known


def rewritten(file: BinaryIO, found: Wav) -> BinaryIO:
    """The same samples, in memory, under a header that libsndfile reads rightly."""
    file.seek(found.begin)
    samples = file.read(found.size)
    parts = [b"fmt ", struct.pack("<I", len(found.format)), found.format, bytes(len(found.format) % 2)]
    parts += [b"data", struct.pack("<I", len(samples)), samples, bytes(len(samples) % 2)]
    content = b"WAVE" + b"".join(parts)
    return io.BytesIO(b"RIFF" + struct.pack("<I", len(content)) + content)


class Flac(NamedTuple):
    """A FLAC file's STREAMINFO."""

    frames: int  # 0: not known
    bits: int
    md5: bytes  # of all samples; zeros: not known


def flac(file: BinaryIO) -> Flac | None:
    """Reads the first block of a FLAC file; None for any other file."""
    head = file.read(42)
    if head[:4] != b"fLaC" or len(head) < 42:
        return None
    packed = int.from_bytes(head[18:26], "big")
    return Flac(packed & (1 << 36) - 1, (packed >> 36 & 31) + 1, head[26:42])


def aiff_frames(file: BinaryIO) -> int | None:
    """How many frames an AIFF file declares; None for any other file."""
    head = file.read(12)
    if head[:4] != b"FORM" or head[8:] not in (b"AIFF", b"AIFC"):
        return None
    while len(chunk := file.read(8)) == 8:
        name, size = struct.unpack(">4sI", chunk)
        if name == b"COMM":
            return int.from_bytes(file.read(6)[2:], "big")
        file.seek(size + size % 2, 1)
    return None
