"""What the headers of sound files say, and how far it may be trusted: RIFF (WAV, RIFX, RF64, BW64), FLAC and AIFF.

Recorders that stream, or that lost power, leave sizes that are zero, too large or too small; libsndfile believes them.
"""

from __future__ import annotations

import io
import re
import struct
from typing import BinaryIO, NamedTuple

STREAMED = 0x7FFF0000  # sizes from here on stand for "not known yet": 0x7FFFF000 of sox, all ones of ffmpeg
SLACK_BYTES = 64  # by which a whole file's declared size may be too large: a header counted as samples, a padding
SEARCHED_BYTES = 1 << 20  # before the file's end, for chunks that follow samples of open length
SEARCHED_USUALLY = 1 << 10  # where the size that the header declares fits the file
OTHERS = (b"LIST", b"fact", b"bext", b"cue ", b"smpl", b"inst", b"plst", b"PEAK", b"JUNK", b"junk", b"PAD ", b"FLLR",
          b"id3 ", b"ID3 ", b"iXML", b"_PMX", b"axml", b"chna", b"cart", b"acid", b"umid", b"DISP", b"levl", b"mext",
          b"minf", b"regn", b"afsp")  # fmt: skip
NAMES_OF_OTHERS = re.compile(b"|".join(OTHERS))


class Wav(NamedTuple):
    """What a RIFF file's chunks say."""

    encoding: int  # 1: integer PCM
    channels: int
    rate_hz: int
    bits: int
    begin: int  # of the samples, in bytes
    size: int  # of the samples that are there, in bytes
    missing: int  # bytes that the header declares beyond the file's end, where the file was cut; else 0
    order: str  # of the bytes in a number: "<", or ">" in RIFX
    canonical: bool  # whether libsndfile reads the header rightly; else it needs `rewritten`
    format: bytes  # the body of the fmt chunk
    notes: tuple[str, ...]

    @property
    def plain(self) -> bool:
        """Whether the samples are little-endian 16-bit integers."""
        return self.encoding == 1 and self.bits == 16 and self.channels > 0 and self.order == "<"


def past_tags(file: BinaryIO) -> None:
    """Goes to the file's first byte behind ID3v2 tags, which libsndfile passes over in front of any format."""
    file.seek(0)
    at = 0
    while len(head := file.read(10)) == 10 and head[:3] == b"ID3":
        at += 10 + sum((byte & 127) << 7 * place for place, byte in enumerate(head[:5:-1]))
        file.seek(at)
    file.seek(at)


def wav(file: BinaryIO, length: int) -> Wav | None:
    """Reads the chunks of a RIFF file of `length` bytes, from where the file stands.

    Returns: None for any other file, and where no samples are found.
    """
    start = file.tell()
    head = file.read(12)
    if head[8:] != b"WAVE" or head[:4] not in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
        return None
    order = ">" if head[:4] == b"RIFX" else "<"
    riff_end = start + 8 + struct.unpack(order + "I", head[4:8])[0]
    wide, body, canonical = 0, b"", head[:4] != b"BW64" and start == 0
    while len(chunk := file.read(8)) == 8:
        name, size = struct.unpack(order + "4sI", chunk)
        if name == b"data":
            if size == 0xFFFFFFFF and head[:4] in (b"RF64", b"BW64"):
                size = wide
            return _checked(file, length, order, riff_end, body, size, canonical)
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
            unpadded = after[:4] in (b"data", b"fmt ", *OTHERS) or (_is_name(after[:4]) and not _is_name(after[1:]))
            canonical &= not unpadded
            file.seek(-len(after) if unpadded else 1 - len(after), 1)
    return None


def _checked(
    file: BinaryIO, length: int, order: str, riff_end: int, body: bytes, declared: int, canonical: bool
) -> Wav | None:
    if len(body) < 16:
        return None
    encoding, channels, rate_hz, a_second, a_frame, bits = struct.unpack(order + "HHIIHH", body[:16])
    begin = file.tell()
    present = length - begin
    size, missing, notes = declared, 0, []
    stopped = declared == 0 and present > 0 and not _chunks(file, length, order)
    if stopped or declared >= present:
        size = _end(file, begin, length, order, SEARCHED_USUALLY if declared == present else SEARCHED_BYTES) - begin
    to_the_end = "read to the file's end" + f" but for {present - size} bytes of other chunks" * (size < present)
    if stopped:
        notes.append(f"size: the header declares no samples, as of a recorder that was stopped; {to_the_end}")
    elif declared > present:
        if declared >= STREAMED:
            notes.append(f"size: the header leaves it open, as of a recorder that streams; {to_the_end}")
        elif abs(riff_end - length) <= 1 or declared - present <= max(SLACK_BYTES, begin):
            notes.append(f"size: the header declares {declared} bytes of samples, there are {size}; all are read")
        else:
            missing = declared - size
    elif declared == present and size < declared:
        notes.append(f"size: of {declared} bytes that the header declares the last {declared - size} are other chunks")
    elif present - declared > 1:
        file.seek(begin + declared + declared % 2)
        whole = _chunks(file, length, order)
        if not (whole or (declared % 2 and file.seek(begin + declared) and _chunks(file, length, order))):
            more = present - declared
            notes.append(f"size: {more} bytes follow the {declared} that the header declares, and are not read")
    of_samples = encoding
    if encoding == 0xFFFE and len(body) >= 26:  # the encoding proper stands further behind
        of_samples = struct.unpack(order + "H", body[24:26])[0]
    if of_samples in (1, 3) and (a_frame != channels * -(-bits // 8) or a_second != rate_hz * a_frame):
        notes.append(
            f"header: {channels} channels of {bits} bits at {rate_hz} Hz contradict {a_frame} bytes a frame and "
            f"{a_second} a second; the former count"
        )
    return Wav(encoding, channels, rate_hz, bits, begin, size, missing, order, canonical and size == declared, body,
               tuple(notes))  # fmt: skip


def _is_name(name: bytes) -> bool:
    return name.isascii() and name.decode().isprintable()


def _end(file: BinaryIO, begin: int, length: int, order: str, reach: int) -> int:
    """Where samples from `begin` end, if whole chunks of known names follow to the file's end; else `length`."""
    at = max(begin, length - reach)
    file.seek(at)
    last = file.read(length - at)
    ends = {len(last)}  # of chunks that others follow to the file's end
    for place in [match.start() for match in NAMES_OF_OTHERS.finditer(last)][::-1]:
        if len(last) - place >= 8:
            size = struct.unpack_from(order + "I", last, place + 4)[0]
            if ends & {place + 8 + size, place + 8 + size + size % 2}:
                ends.add(place)
    return at + min(ends)


def _chunks(file: BinaryIO, length: int, order: str) -> bool:
    """Whether whole chunks follow to the file's end, or nothing but zeros: what belongs behind the samples."""
    at, known = file.tell(), False
    while length - at >= 8:
        file.seek(at)
        name, size = struct.unpack(order + "4sI", file.read(8))
        if not _is_name(name) or name == b"data" or at + 8 + size > length:
            file.seek(at)
            return known and not any(file.read(1 << 16)) and length - at <= 1 << 16
        at, known = at + 8 + size + size % 2, True
    return known


def rewritten(file: BinaryIO, found: Wav) -> BinaryIO:
    """The same samples, in memory, under a header that libsndfile reads rightly."""
    file.seek(found.begin)
    samples, size = file.read(found.size), struct.Struct(found.order + "I")
    parts = [b"fmt ", size.pack(len(found.format)), found.format, bytes(len(found.format) % 2)]
    parts += [b"data", size.pack(len(samples)), samples, bytes(len(samples) % 2)]
    content = b"WAVE" + b"".join(parts)
    return io.BytesIO((b"RIFF" if found.order == "<" else b"RIFX") + size.pack(len(content)) + content)


class Flac(NamedTuple):
    """A FLAC file's STREAMINFO."""

    frames: int  # 0: not known
    bits: int
    md5: bytes  # of all samples; zeros: not known


def flac(file: BinaryIO) -> Flac | None:
    """Reads the first block of a FLAC file, from where the file stands; None for any other file."""
    head = file.read(42)
    if head[:4] != b"fLaC" or len(head) < 42:
        return None
    packed = int.from_bytes(head[18:26], "big")
    return Flac(packed & (1 << 36) - 1, (packed >> 36 & 31) + 1, head[26:42])


def aiff_frames(file: BinaryIO) -> int | None:
    """How many frames an AIFF file declares, from where the file stands; None for any other file."""
    head = file.read(12)
    if head[:4] != b"FORM" or head[8:] not in (b"AIFF", b"AIFC"):
        return None
    while len(chunk := file.read(8)) == 8:
        name, size = struct.unpack(">4sI", chunk)
        if name == b"COMM":
            return int.from_bytes(file.read(6)[2:], "big")
        file.seek(size + size % 2, 1)
    return None
