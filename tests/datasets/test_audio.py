"""Audio files of every kind that users have, whole and damaged."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
import soxr

from pcgjax.datasets import audio


def heart_sound(seconds: float = 1.0, rate_hz: int = 4000) -> np.ndarray:
    """Bursts of 50 Hz, two a second, at half of full scale."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    return 0.5 * np.sin(2 * np.pi * 50 * t) * np.exp(-30 * (t % 0.5))


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("u8.wav", "PCM_U8", 2**-7),
        ("s16.wav", "PCM_16", 2**-15),
        ("s24.wav", "PCM_24", 2**-23),
        ("s32.wav", "PCM_32", 2**-23),  # float32 has 24 bits
        ("f32.wav", "FLOAT", 0),
        ("f64.wav", "DOUBLE", 2**-24),
        ("s16.flac", "PCM_16", 2**-15),
        ("s24.flac", "PCM_24", 2**-23),
    ],
)
def test_every_sample_format_gives_the_same_samples(
    tmp_path: pathlib.Path, name: str, subtype: str, tolerance: float
) -> None:
    expected = heart_sound().astype(np.float32)
    soundfile.write(tmp_path / name, heart_sound(), 4000, subtype=subtype)
    samples, rate_hz, channels = audio.read(tmp_path / name)
    assert samples.dtype == np.float32
    assert (rate_hz, channels) == (4000, 1)
    np.testing.assert_allclose(samples, expected, rtol=0, atol=tolerance)
    assert audio.header(tmp_path / name) == (4000, 4000, 1)


def test_full_scale_is_one(tmp_path: pathlib.Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.tile(np.array([-32768, 16384], np.int16), 4000), 4000)
    samples, _, _ = audio.read(tmp_path / "a.wav")
    assert set(samples.tolist()) == {-1.0, 0.5}


def test_steps_are_the_files_own_integers(tmp_path: pathlib.Path) -> None:
    values = np.random.default_rng(0).integers(-32768, 32768, (4000, 2)).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", values, 4000, subtype="PCM_16")
    soundfile.write(tmp_path / "b.flac", values, 4000, subtype="PCM_16")
    samples, rate_hz, channels = audio.read_steps(tmp_path / "a.wav")
    assert (samples.dtype, rate_hz, channels) == (np.int16, 4000, 2)
    assert samples.flags.c_contiguous
    np.testing.assert_array_equal(samples, values[:, 0])
    samples, _, _ = audio.read_steps(tmp_path / "b.flac")
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, values[:, 0])


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_of_several_channels_the_first_is_read(tmp_path: pathlib.Path, suffix: str) -> None:
    left = heart_sound()
    soundfile.write(tmp_path / f"a.{suffix}", np.stack([left, -left, 0 * left], axis=1), 4000, subtype="PCM_24")
    samples, _, channels = audio.read(tmp_path / f"a.{suffix}")
    assert channels == 3
    assert samples.flags.c_contiguous
    np.testing.assert_allclose(samples, left, atol=2**-22)


@pytest.mark.parametrize("rate_hz", [300, 1000, 2000, 4000, 8007, 11025, 22050, 44100, 96000])
def test_the_rate_is_the_files_own(tmp_path: pathlib.Path, rate_hz: int) -> None:
    soundfile.write(tmp_path / "a.wav", heart_sound(1.5, rate_hz), rate_hz)
    samples, found_hz, _ = audio.read(tmp_path / "a.wav")
    assert (found_hz, len(samples)) == (rate_hz, round(1.5 * rate_hz))


def test_chunks_before_the_samples_are_skipped(tmp_path: pathlib.Path) -> None:
    soundfile.write(tmp_path / "a.wav", heart_sound(), 4000)
    whole = (tmp_path / "a.wav").read_bytes()
    odd = b"LIST" + (5).to_bytes(4, "little") + b"INFOx" + b"\0"  # a chunk of odd size is padded by one byte
    (tmp_path / "b.wav").write_bytes(whole[:36] + odd + whole[36:])
    np.testing.assert_array_equal(audio.read(tmp_path / "b.wav")[0], audio.read(tmp_path / "a.wav")[0])
    (tmp_path / "c.wav").write_bytes((tmp_path / "b.wav").read_bytes()[:-100])
    with pytest.raises(audio.AudioError, match="truncated: the header declares"):
        audio.read(tmp_path / "c.wav")


def test_a_recorder_that_left_the_size_open_is_read_to_the_end(tmp_path: pathlib.Path) -> None:
    soundfile.write(tmp_path / "a.wav", heart_sound(), 4000)
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(whole[:40] + b"\xff" * 4 + whole[44:])
    assert len(audio.read(tmp_path / "b.wav")[0]) == 4000


def as_bytes(change: Callable[[bytes], bytes], suffix: str = "wav") -> Callable[[pathlib.Path], pathlib.Path]:
    """A maker of files: a good recording whose bytes are changed."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        path = folder / f"a.{suffix}"
        soundfile.write(path, heart_sound(), 4000, subtype="PCM_16")
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def as_samples(samples: np.ndarray, rate_hz: int = 4000, subtype: str = "PCM_16", suffix: str = "wav") -> Callable:
    def make(folder: pathlib.Path) -> pathlib.Path:
        soundfile.write(folder / f"a.{suffix}", samples, rate_hz, subtype=subtype)
        return folder / f"a.{suffix}"

    return make


def renamed(
    name: str, change: Callable[[bytes], bytes] = lambda whole: whole
) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(folder: pathlib.Path) -> pathlib.Path:
        return as_bytes(change)(folder).rename(folder / name)

    return make


def with_value(value: float) -> np.ndarray:
    samples = heart_sound()
    samples[17] = value
    return samples


# What is found from the header alone, and the first words of the message.
DAMAGED_HEADER = {
    "missing": (lambda folder: folder / "a.wav", "missing: no such file"),
    "a folder": (lambda folder: folder, "missing: no such file"),
    "empty file": (as_bytes(lambda _: b""), "empty: the file has no bytes"),
    "header only": (as_samples(np.zeros(0)), "empty: the file holds no samples"),
    "header only, flac": (as_samples(np.zeros(0), suffix="flac"), "(empty|truncated|not audio): "),
    "cut after the header": (as_bytes(lambda whole: whole[:44]), "truncated: .* 8000 bytes of samples, there are 0"),
    "cut in the middle": (as_bytes(lambda whole: whole[:4044]), "truncated: .* 8000 bytes .*, there are 4000"),
    "cut by a hundred bytes": (as_bytes(lambda whole: whole[:-100]), "truncated: .* there are 7900"),
    "cut in the header": (as_bytes(lambda whole: whole[:30]), "not audio: "),
    "flac cut in the header": (as_bytes(lambda whole: whole[:12], "flac"), "not audio: "),
    "text renamed": (as_bytes(lambda _: b"a0001,1\r\na0002,-1\r\n" * 50), "not audio: "),
    "html renamed": (as_bytes(lambda _: b"<!DOCTYPE html><title>404</title>" * 9, "flac"), "not audio: "),
    "zeros": (as_bytes(lambda whole: bytes(len(whole))), "not audio: "),
    "no rate": (as_bytes(lambda whole: whole[:24] + bytes(4) + whole[28:]), "not audio: "),
    "no channels": (as_bytes(lambda whole: whole[:22] + bytes(2) + whole[24:]), "not audio: "),
    "no header": (renamed("a.raw", lambda whole: whole[44:]), "not audio: "),
}
# What only the samples show.
DAMAGED_SAMPLES = {
    "flac cut in the middle": (as_bytes(lambda whole: whole[: len(whole) // 2], "flac"), "truncated: "),
    "flac cut at the end": (as_bytes(lambda whole: whole[:-40], "flac"), "truncated: "),
    "silent": (as_samples(np.zeros(4000)), "silent: "),
    "silent, 8 bit": (as_samples(np.zeros(4000), subtype="PCM_U8"), "silent: "),
    "constant": (as_samples(np.full(4000, 0.25)), "silent: "),
    "nan": (as_samples(with_value(np.nan), subtype="FLOAT"), "not finite: 1 samples"),
    "infinite": (as_samples(with_value(-np.inf), subtype="DOUBLE"), "not finite: 1 samples"),
    "too short": (as_samples(heart_sound(0.2)), "too short: 0.200 s"),
    "one sample short": (as_samples(heart_sound(1)[:1999]), "too short: "),
}


@pytest.mark.parametrize("kind", DAMAGED_HEADER)
def test_header_and_read_refuse(tmp_path: pathlib.Path, kind: str) -> None:
    make, message = DAMAGED_HEADER[kind]
    path = make(tmp_path)
    for function in (audio.header, audio.read):
        with pytest.raises(audio.AudioError, match=f"^{message}"):
            function(path)


@pytest.mark.parametrize("kind", DAMAGED_SAMPLES)
def test_read_refuses(tmp_path: pathlib.Path, kind: str) -> None:
    make, message = DAMAGED_SAMPLES[kind]
    path = make(tmp_path)
    audio.header(path)
    with pytest.raises(audio.AudioError, match=f"^({message})"):
        audio.read(path)


def test_half_a_second_is_enough(tmp_path: pathlib.Path) -> None:
    soundfile.write(tmp_path / "a.wav", heart_sound(0.5), 4000)
    assert len(audio.read(tmp_path / "a.wav")[0]) == 2000


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_any_damage_to_the_header_is_an_audio_error_or_audio(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, heart_sound(), 4000, subtype="PCM_16")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(48)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            samples, rate_hz, _ = audio.read(path)
        except audio.AudioError as error:
            refused.append(str(error))
        else:
            assert len(samples) >= audio.SHORTEST_S * rate_hz
    assert len(refused) > 20
    kinds = "(empty|not audio|truncated|damaged|rate|too long|not finite|silent|too short): "
    assert [reason for reason in refused if not re.match(kinds, reason)] == []


# ------------------------------------------------------------------------------------------------ piece by piece


@pytest.mark.parametrize(
    ("name", "subtype", "channels"),
    [("16.wav", "PCM_16", 1), ("24.wav", "PCM_24", 1), ("16.flac", "PCM_16", 2), ("float.wav", "FLOAT", 2)],
)
@pytest.mark.parametrize(("rate_hz", "wanted_hz"), [(2000, 2000), (4000, 1000), (44100, 2000), (1000, 4000)])
def test_pieces_are_the_whole(
    tmp_path: pathlib.Path, name: str, subtype: str, channels: int, rate_hz: int, wanted_hz: int
) -> None:
    sound = heart_sound(3.21, rate_hz)
    soundfile.write(tmp_path / name, np.stack([sound, -sound], axis=1)[:, :channels], rate_hz, subtype=subtype)
    whole, _, _ = audio.read(tmp_path / name)
    if rate_hz != wanted_hz:
        whole = soxr.resample(whole, rate_hz, wanted_hz, quality="HQ")
    for piece_s in (10.0, 1.07, 0.1):
        samples_of_pieces = list(audio.pieces(tmp_path / name, wanted_hz, piece_s))
        assert all(piece.dtype == np.float32 for piece in samples_of_pieces)
        assert max(map(len, samples_of_pieces)) <= (piece_s + 1) * wanted_hz
        joined = np.concatenate(samples_of_pieces)
        if rate_hz == wanted_hz:
            np.testing.assert_array_equal(joined, whole)
        assert abs(len(joined) - len(whole)) <= 1
        np.testing.assert_allclose(joined[: len(whole)], whole[: len(joined)], atol=1e-4)


@pytest.mark.parametrize("kind", DAMAGED_HEADER | DAMAGED_SAMPLES)
def test_pieces_refuse_what_read_refuses(tmp_path: pathlib.Path, kind: str) -> None:
    make, message = (DAMAGED_HEADER | DAMAGED_SAMPLES)[kind]
    path = make(tmp_path)
    with pytest.raises(audio.AudioError, match=f"^({message.replace('1 samples', 'a sample')})"):
        list(audio.pieces(path, 1000, 0.3))
