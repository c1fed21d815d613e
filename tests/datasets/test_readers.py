"""Files as recorders and archives really leave them: one test for each row of what once failed, named after it."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import struct

import numpy as np
import pytest
import soundfile

from pcgjax import datasets, prepare
from pcgjax.data.decode import decode
from pcgjax.data.shards import read_rows
from pcgjax.datasets import DIASTOLE, S1, S2, SYSTOLE, UNANNOTATED, audio, state_ans
from pcgjax.datasets.annotations import noted_annotations

ENCODINGS = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")


def noise(seconds: float = 1.5, rate_hz: int = 2000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(round(seconds * rate_hz)) / 8


def wav(path: pathlib.Path, samples: np.ndarray | None = None, rate_hz: int = 2000, subtype: str = "PCM_16",
        **options) -> pathlib.Path:  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, path.name))
    soundfile.write(path, noise(seed=seed) if samples is None else samples, rate_hz, subtype=subtype, **options)
    return path


def resized(whole: bytes, riff: int, data: int) -> bytes:
    """A WAV file under other sizes."""
    at = whole.index(b"data")
    return whole[:4] + struct.pack("<I", riff) + whole[8 : at + 4] + struct.pack("<I", data) + whole[at + 8 :]


def noted(path: pathlib.Path) -> tuple[np.ndarray, str]:
    """The samples, which `pieces` gives too, and the notes."""
    samples, rate_hz, _, notes = audio.read_noted(path)
    of_pieces: list[str] = []
    joined = np.concatenate(list(audio.pieces(path, rate_hz, 0.4, of_pieces)))
    np.testing.assert_array_equal(joined, samples.astype(np.float32) / 32768)
    assert tuple(of_pieces) == notes
    assert audio.header(path)[1] == len(samples)
    return samples, "; ".join(notes)


# ------------------------------------------------------------------------------------------------------------ sound


@pytest.mark.parametrize("subtype", ENCODINGS)
def test_R1_a_recorder_that_streams_or_was_killed(tmp_path: pathlib.Path, subtype: str) -> None:
    whole = wav(tmp_path / "a.wav", subtype=subtype).read_bytes()
    expected, _ = noted(tmp_path / "a.wav")
    for data in (0, 0x7FFFF000, 0xFFFFFFFF, 0xFFFFFF00):
        for riff in (0, 36, len(whole) - 8, 0xFFFFFFFF):
            (tmp_path / "b.wav").write_bytes(resized(whole, riff, data))
            samples, notes = noted(tmp_path / "b.wav")
            np.testing.assert_array_equal(samples, expected)
            assert "size: the header" in notes


def test_R1_a_flac_of_open_length(tmp_path: pathlib.Path) -> None:
    whole = wav(tmp_path / "a.flac").read_bytes()
    expected, notes = noted(tmp_path / "a.flac")
    assert notes == ""
    (tmp_path / "b.flac").write_bytes(whole[:21] + bytes([whole[21] & 0xF0]) + bytes(20) + whole[42:])
    samples, notes = noted(tmp_path / "b.flac")
    np.testing.assert_array_equal(samples, expected)
    assert notes.startswith("size: the header leaves it open")


def test_R1_a_file_without_samples_stays_empty(tmp_path: pathlib.Path) -> None:
    whole = wav(tmp_path / "a.wav", np.zeros(0)).read_bytes()
    (tmp_path / "b.wav").write_bytes(whole + b"LIST" + struct.pack("<I", 8) + b"INFOabcd")
    with pytest.raises(audio.AudioError, match="empty: "):
        audio.read(tmp_path / "b.wav")


@pytest.mark.parametrize("subtype", ENCODINGS)
@pytest.mark.parametrize("more", [1, 16, 44])
def test_R2_a_size_a_little_too_large(tmp_path: pathlib.Path, subtype: str, more: int) -> None:
    whole = wav(tmp_path / "a.wav", subtype=subtype).read_bytes()
    expected, _ = noted(tmp_path / "a.wav")
    size = len(whole) - whole.index(b"data") - 8
    (tmp_path / "b.wav").write_bytes(resized(whole, len(whole) - 8 + more, size + more))
    samples, notes = noted(tmp_path / "b.wav")
    np.testing.assert_array_equal(samples, expected)
    assert f"size: the header declares {size + more} bytes of samples, there are {size}" in notes
    (tmp_path / "b.wav").write_bytes(resized(whole, len(whole) - 8, size + 5000))  # whole, as the RIFF size says
    np.testing.assert_array_equal(noted(tmp_path / "b.wav")[0], expected)
    (tmp_path / "b.wav").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(audio.AudioError, match="truncated: "):
        audio.read(tmp_path / "b.wav")


def test_R2_what_follows_the_samples(tmp_path: pathlib.Path) -> None:
    whole = wav(tmp_path / "a.wav").read_bytes()
    expected, _ = noted(tmp_path / "a.wav")
    listed = b"LIST" + struct.pack("<I", 8) + b"INFOabcd"
    unpadded = whole[:36] + b"note" + struct.pack("<I", 3) + b"abc" + whole[36:]
    for content, doubt in (
        (whole + listed, ""),
        (whole[:12] + b"JUNK" + struct.pack("<I", 5) + bytes(6) + whole[12:], ""),
        (unpadded, ""),
        (whole + bytes(range(1, 200)), "size: 199 bytes follow the 6000"),
        (whole[:28] + b"\1" + whole[29:], "header: 1 channels of 16 bits"),
        (b"BW64" + wav(tmp_path / "c.wav", samples=expected, format="RF64").read_bytes()[4:], ""),
    ):
        (tmp_path / "b.wav").write_bytes(content)
        samples, notes = noted(tmp_path / "b.wav")
        np.testing.assert_array_equal(samples, expected)
        assert notes.startswith(doubt)
        assert bool(notes) == bool(doubt)


def chunk(name: bytes, content: bytes, order: str = "<", padded: bool = True) -> bytes:
    return name + struct.pack(order + "I", len(content)) + content + bytes(len(content) % 2 * padded)


@pytest.mark.parametrize("subtype", ENCODINGS)
def test_a_big_endian_wav_is_judged_as_any(tmp_path: pathlib.Path, subtype: str) -> None:
    expected, _ = noted(wav(tmp_path / "a.wav", noise(), subtype=subtype))
    whole = wav(tmp_path / "b.wav", noise(), subtype=subtype, endian="BIG").read_bytes()
    assert whole.startswith(b"RIFX")
    samples, notes = noted(tmp_path / "b.wav")
    np.testing.assert_array_equal(samples, expected)
    assert notes == ("lossy: ULAW keeps only a part of the sound" if subtype == "ULAW" else "")
    at, listed = whole.index(b"data") + 4, chunk(b"LIST", b"INFOabcd", ">")
    for content, doubt in (
        (whole + listed, ""),
        (whole[:12] + chunk(b"JUNK", b"abcde", ">", padded=False) + whole[12:], ""),
        (whole[:at] + bytes(4) + whole[at + 4 :], "size: the header declares no samples"),
        (whole[:at] + b"\xff" * 4 + whole[at + 4 :] + listed, "size: the header leaves it open"),
    ):
        (tmp_path / "b.wav").write_bytes(content)
        samples, notes = noted(tmp_path / "b.wav")
        np.testing.assert_array_equal(samples, expected)
        assert notes.startswith(doubt)
        assert ("size: " in notes) == bool(doubt)
    (tmp_path / "b.wav").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(audio.AudioError, match="truncated: "):
        audio.header(tmp_path / "b.wav")


@pytest.mark.parametrize(
    ("name", "subtype"),
    [("a.flac", "PCM_16"), ("a.flac", "PCM_24"), ("a.wav", "PCM_16"), ("a.wav", "FLOAT"), ("a.aiff", "PCM_16")],
)
@pytest.mark.parametrize("size", [20, 300])  # over 127 a tag's size takes two of its bytes
def test_an_ID3_tag_in_front(tmp_path: pathlib.Path, name: str, subtype: str, size: int) -> None:
    whole = wav(tmp_path / name, noise(8), subtype=subtype).read_bytes()
    expected, _ = noted(tmp_path / name)
    tag = b"ID3\3\0\0\0\0" + bytes([size >> 7, size & 127]) + bytes(size)
    (tmp_path / name).write_bytes(tag + whole)
    samples, notes = noted(tmp_path / name)
    np.testing.assert_array_equal(samples, expected)
    assert notes == ""
    (tmp_path / name).write_bytes((tag + whole)[: len(whole) // 2])
    with pytest.raises(audio.AudioError, match="truncated: "):
        audio.read(tmp_path / name)
    for cut in range(len(tag)):
        (tmp_path / name).write_bytes((tag + whole)[: cut + 1])
        with pytest.raises(audio.AudioError, match="not audio: "):
            audio.read(tmp_path / name)
    if name == "a.flac":
        (tmp_path / name).write_bytes(tag + whole[:30] + bytes([whole[30] ^ 1]) + whole[31:])  # of the checksum
        with pytest.raises(audio.AudioError, match="damaged: "):
            audio.read(tmp_path / name)


@pytest.mark.parametrize("subtype", ENCODINGS)
def test_chunks_behind_samples_of_open_length(tmp_path: pathlib.Path, subtype: str) -> None:
    whole = wav(tmp_path / "a.wav", subtype=subtype).read_bytes()
    expected, _ = noted(tmp_path / "a.wav")
    size = len(whole) - whole.index(b"data") - 8
    long = b"x" * 300_000
    for behind in (
        chunk(b"LIST", b"INFOabcd"), chunk(b"LIST", b"INFOabc"), chunk(b"LIST", b"INFOabc", padded=False),
        chunk(b"id3 ", long), chunk(b"bext", long) + chunk(b"LIST", b"INFO" + chunk(b"DISP", b"abcd")),
        chunk(b"cue ", bytes(4)) + chunk(b"JUNK", bytes(7)) + chunk(b"fact", bytes(4)),
    ):  # fmt: skip
        for data in (0, 0x7FFFF000, 0xFFFFFFFF, size + len(behind) + 16, size + len(behind)):
            if data == size + len(behind) and len(behind) > 1000:
                continue  # the header's size fits the file: only its last bytes are searched
            (tmp_path / "b.wav").write_bytes(resized(whole + behind, len(whole) + len(behind) - 8, data))
            samples, notes = noted(tmp_path / "b.wav")
            np.testing.assert_array_equal(samples, expected)
            assert "size: " in notes


def test_samples_that_look_like_a_chunk_are_kept(tmp_path: pathlib.Path) -> None:
    whole = wav(tmp_path / "a.wav").read_bytes()
    for behind in (
        chunk(b"LIST", b"INFOabcd") + bytes(2), chunk(b"LIST", b"INFOabcd")[:-2], chunk(b"XYZW", b"abcd"),
        chunk(b"LIST", b"INFOabcd") + chunk(b"XYZW", b"abcd"), b"LIST", b"LIST\0\0\0",
    ):  # fmt: skip
        for data in (0, 0xFFFFFFFF, 6000 + len(behind)):
            (tmp_path / "b.wav").write_bytes(resized(whole + behind, len(whole) + len(behind) - 8, data))
            assert len(noted(tmp_path / "b.wav")[0]) == 3000 + len(behind) // 2


@pytest.mark.parametrize("name", [b"LIST", b"bext", b"JUNK", b"id3 ", b"cue ", b"iXML", b"_PMX", b"fact", b"abcd"])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_an_odd_chunk_without_padding_before_any_other(tmp_path: pathlib.Path, name: bytes, subtype: str) -> None:
    whole = wav(tmp_path / "a.wav", subtype=subtype).read_bytes()
    expected, _ = noted(tmp_path / "a.wav")
    for odd in (b"LIST", b"bext", b"note"):
        for padded in (False, True):
            before = chunk(odd, b"abcde", padded=padded) + chunk(name, b"abcdefg", padded=padded) + chunk(name, b"abcd")
            for content in (whole[:36] + before + whole[36:], whole[:12] + before + whole[12:]):
                (tmp_path / "b.wav").write_bytes(content)
                samples, notes = noted(tmp_path / "b.wav")
                np.testing.assert_array_equal(samples, expected)
                assert notes == ""
                (tmp_path / "b.wav").write_bytes(content[:-1000])
                with pytest.raises(audio.AudioError, match="truncated: "):
                    audio.read(tmp_path / "b.wav")


def test_bits_that_contradict_an_extensible_header(tmp_path: pathlib.Path) -> None:
    for subtype in ("PCM_24", "PCM_32", "FLOAT", "ULAW", "PCM_16"):
        whole = wav(tmp_path / "a.wav", subtype=subtype, format="WAVEX").read_bytes()
        assert "header: " not in noted(tmp_path / "a.wav")[1]
    for bits in (17, 20, 24, 32):
        (tmp_path / "a.wav").write_bytes(whole[:34] + bytes([bits]) + whole[35:])
        assert noted(tmp_path / "a.wav")[1].startswith(f"header: 1 channels of {bits} bits at 2000 Hz contradict 2 ")


def test_R4_rates_and_durations_have_bounds(tmp_path: pathlib.Path) -> None:
    for rate_hz in (1, 99, 1_000_000):
        with pytest.raises(audio.AudioError, match=f"rate: the header declares {rate_hz} Hz, .*write the recorder's"):
            audio.header(wav(tmp_path / "a.wav", rate_hz=rate_hz))
    path = wav(tmp_path / "long.wav", np.tile(noise(1), 50), rate_hz=100)  # 100 kB, 1000 s
    with pytest.raises(audio.AudioError, match=r"too long: 100000 samples at 100 Hz.* are 192000000 at 192000 Hz"):
        decode(datasets.Recording("a", "a", False, "d", 100, {}, (), path), 192_000)
    with pytest.raises(audio.AudioError, match="too long: "):
        list(audio.pieces(path, 192_000))
    whole = bytearray(wav(tmp_path / "a.flac").read_bytes())
    whole[21:26] = whole[21] & 0xF0, 0xFF, 0xFF, 0xFF, 0xFF
    (tmp_path / "a.flac").write_bytes(whole)
    with pytest.raises(audio.AudioError, match="too long: the header declares"):
        audio.read(tmp_path / "a.flac")


def test_W6_the_fingerprint_is_of_the_samples_as_stored(tmp_path: pathlib.Path) -> None:
    steps = np.round(noise(6) * 20000).astype(np.int16)

    def prints(samples: np.ndarray, subtype: str) -> set[str]:
        path = wav(tmp_path / "a.wav", samples, subtype=subtype)
        row, _ = decode(datasets.Recording("a", "a", False, "d", 2000, {}, (), path), 2000)
        floats = subtype in ("FLOAT", "DOUBLE")
        assert any(note.startswith("scale: ") for note in row["notes"]) == (floats and np.abs(samples).max() > 1)
        return set(row["fingerprint"].split())

    whole = prints(steps, "PCM_16")
    assert len(whole) > 20
    assert prints(steps.astype(np.float32), "FLOAT") == whole  # as scipy writes a float copy of integers
    assert prints(steps.astype(np.float64), "DOUBLE") == whole
    assert prints(steps / 32768, "FLOAT") == whole
    assert len(prints(steps[4000:8000].astype(np.float32), "FLOAT") & whole) > 5
    for scale in (2.0**16, 1e-9, 3.3):  # 32-bit integers; volts; no unit
        loud = prints(steps * scale, "DOUBLE")
        assert len(loud & prints(steps[:8000] * scale, "DOUBLE")) > 5


def test_W7_what_is_beyond_all_sound(tmp_path: pathlib.Path) -> None:
    for factor in (1e30, 3e37):
        path = wav(tmp_path / "a.wav", noise() * factor, subtype="FLOAT")
        for function in (audio.read, lambda path: list(audio.pieces(path, 1000))):
            with pytest.raises(audio.AudioError, match="too loud: the samples reach"):
                function(path)
    with pytest.raises(audio.AudioError, match="silent: "):
        audio.read(wav(tmp_path / "a.wav", noise() * 1e-42, subtype="FLOAT"))


def test_U6_doubts_about_sound(tmp_path: pathlib.Path) -> None:
    for samples, rate_hz, options, doubt in (
        (noise(2, 500), 500, {}, "rate: 500 Hz holds nothing above 250 Hz"),
        (noise(2, 96000), 96000, {}, "rate: 96000 Hz is unusual"),
        (noise(0.6), 2000, {}, "short: 0.60 s"),
        (noise(), 2000, {"format": "FLAC"}, "name: the file is named .wav and is FLAC"),
        (noise(), 2000, {"subtype": "ULAW"}, "lossy: ULAW"),
        (np.stack([noise(), noise()], 1), 2000, {}, "channels: the first of 2 is read"),
        (np.stack([noise() / 1000, noise()], 1), 2000, {}, "channels: number 2 is .* times as loud as the first"),
    ):
        _, notes = noted(wav(tmp_path / "a.wav", samples, rate_hz, **options))
        assert any(np.char.find(notes.split("; "), doubt.split(".*")[0]) == 0), notes
    with pytest.raises(audio.AudioError, match=r"silent: .* first of 2 channels; another one has sound"):
        audio.read(wav(tmp_path / "a.wav", np.stack([0 * noise(), noise()], 1)))
    whole = bytearray(wav(tmp_path / "a.flac").read_bytes())
    whole[30] ^= 1  # of the checksum
    (tmp_path / "a.flac").write_bytes(whole)
    with pytest.raises(audio.AudioError, match="damaged: "):
        audio.read(tmp_path / "a.flac")


# -------------------------------------------------------------------------------------------------- tables and names


def circor(source: pathlib.Path, patient: str, lines: list[str]) -> None:
    """A patient's .txt of these lines, and the files that they name."""
    source.mkdir(parents=True, exist_ok=True)
    for name in " ".join(lines).split():
        if name.endswith(".wav"):
            wav(source / name)
        elif name.endswith(".hea"):
            (source / name).write_text(f"{name[:-4]} 1 2000 3000\n")
        elif name.endswith(".tsv"):
            (source / name).write_text("0\t0.5\t1\n0.5\t1\t2\n1\t1.5\t0\n")
    head = f"{patient} {len(lines)} 2000"
    (source / f"{patient}.txt").write_text("\n".join([head, *lines, "#Murmur: Absent", "#Additional ID: nan"]))


def names(patient: str, site: str) -> str:
    return f"{site} " + " ".join(f"{patient}_{site}{suffix}" for suffix in (".hea", ".wav", ".tsv"))


def loaded(name: str, source: pathlib.Path) -> tuple[dict[str, datasets.Recording], list[datasets.Problem]]:
    recordings, problems = datasets.load(name, source)
    return {recording.id: recording for recording in recordings}, problems


def test_R3_a_name_that_is_not_utf_8(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "source"
    wav(source / "a.wav")
    for name, content in ((b"\xe9.wav", (source / "a.wav").read_bytes()), (b"\xff.wav", b"text")):
        with open(os.path.join(os.fsencode(source), name), "wb") as file:
            file.write(content if name != b"\xe9.wav" else wav(tmp_path / "b.wav").read_bytes())
    wav(tmp_path / "c.flac", np.stack([noise(), noise()], 1)).rename(os.path.join(source, os.fsdecode(b"p\xe9.flac")))
    manifest = prepare.prepare("folder", source, tmp_path / "out", workers=1)
    assert manifest is not None
    assert [row["id"] for row in read_rows(tmp_path / "out")[1]] == ["\\xe9", "a", "p\\xe9"]
    listed = [(problem["path"], problem.get("note", False)) for problem in manifest["problems"]]
    assert listed == [("\\xff.wav", False), ("p\\xe9.flac", True)]
    json.loads((tmp_path / "out" / "manifest.json").read_bytes().decode("utf-8"))
    assert "\\xff.wav: not audio" in prepare.summary(manifest)
    assert prepare.prepare("folder", source, tmp_path / "out", workers=1) == manifest
    other = shutil.copytree(source, tmp_path / os.fsdecode(b"s\xe9"))
    named = prepare.prepare("folder", other, tmp_path / "other", workers=1)
    assert named is not None
    assert named["source"].endswith("s\\xe9")
    with pytest.raises(ValueError, match=r"--out=.*o\\xe9: the name is not UTF-8; choose another"):
        prepare.prepare("folder", source, tmp_path / os.fsdecode(b"o\xe9"), workers=1)


def unreadable(path: pathlib.Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "itself":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["itself", "folder", "pipe", "gone"])
def test_R9_one_unreadable_side_file(tmp_path: pathlib.Path, kind: str) -> None:
    c = tmp_path / "circor"
    circor(c, "1", [names("1", "AV"), names("1", "MV"), names("1", "TV")])
    circor(c, "2", [names("2", "AV")])
    for name in ("1_AV.tsv", "1_MV.hea", "1_TV.wav", "2.txt"):
        unreadable(c / name, kind)
    recordings, problems = loaded("circor", c)
    assert set(recordings) == {"1_AV", "1_MV"}
    assert recordings["1_AV"].annotations == ()
    assert len(recordings["1_MV"].annotations) == 3
    expected = {"1_AV.tsv", "1_MV.hea", "1_TV.wav"}
    if kind in ("itself", "pipe"):
        assert {problem.path for problem in problems} >= {*expected, "2.txt"}
        assert sum("unreadable: " in problem.reason for problem in problems) == 4
    else:
        assert {problem.path for problem in problems} >= expected
    assert all(":" in problem.reason for problem in problems)

    a = tmp_path / "cinc" / "training-a"
    for record in ("a1", "a2"):
        wav(a / f"{record}.wav")
        (a / f"{record}.hea").write_text(f"{record} 1 2000 3000\n# Normal\n")
        mat = tmp_path / "cinc/annotations/hand_corrected/training-a_StateAns" / f"{record}_StateAns.mat"
        mat.parent.mkdir(parents=True, exist_ok=True)
        mat.write_bytes(state_ans.write([1, 900], ["S1", "systole"]))
    (a / "REFERENCE.csv").write_text("a1,-1\na2,-1\n" + "x" * 300 + ",1\n../a1,1\n")
    unreadable(a / "a1.hea", kind)
    unreadable(mat.with_name("a1_StateAns.mat"), kind)
    recordings, problems = loaded("cinc2016", tmp_path / "cinc")
    assert [(one.id, len(one.annotations)) for one in recordings.values()] == [("a1", 0), ("a2", 2)]
    assert sum(problem.reason.startswith("missing: no such file") for problem in problems) >= 2

    f = tmp_path / "folder"
    wav(f / "p" / "a.wav")
    unreadable(f / "p" / "a.tsv", kind)
    unreadable(f / "p" / "b.wav", kind)
    recordings, problems = loaded("folder", f)
    assert list(recordings) == ["p/a"]
    wanted = {"p/a.tsv", "p/b.wav"} if kind in ("itself", "pipe") else set()
    assert {problem.path for problem in problems} == wanted


def test_R7_pascal_as_its_organisers_lay_it_out(tmp_path: pathlib.Path) -> None:
    for name in (
        "Atraining_normal/201101070538", "Atraining_murmur/201101051104", "Atraining_extrahls/201101070539",
        "Atraining_extrahs/201101070540", "Atraining_artifact/201105040918", "Aunlabelledtest/201012172010",
        "Btraining_normal/101_1305030823364_B", "Btraining_normal/Btraining_noisynormal/101_1305030823365_C",
        "Btraining_murmur/112_1306243000964_A", "Btraining_murmur/Btraining_noisymurmur/112_1306243000965_A",
        "Btraining_extrasystole/127_1306764300147_C2", "Btraining_extrastole/128_1306764300147_C2",
        "Bunlabelledtest/103_1305031931979_D1", "Btraining_normal/._101_1305030823364_B",
    ):  # fmt: skip
        wav(tmp_path / f"{name}.wav")
    (tmp_path / "set_a_timing.csv").write_text("fname,cycle,sound,location\nset_a/normal__201101070538.wav,1,S1,4410\n")
    recordings, problems = loaded("pascal", tmp_path)
    assert [(one.id, one.labels["class"], one.labels["noisy"]) for one in recordings.values()] == [
        ("a_artifact__201105040918", "artifact", "0"),
        ("a_extrahls__201101070539", "extrahls", "0"),
        ("a_extrahls__201101070540", "extrahls", "0"),
        ("a_murmur__201101051104", "murmur", "0"),
        ("a_normal__201101070538", "normal", "0"),
        ("b_extrastole__127_1306764300147_C2", "extrastole", "0"),
        ("b_extrastole__128_1306764300147_C2", "extrastole", "0"),
        ("b_murmur__112_1306243000964_A", "murmur", "0"),
        ("b_murmur_noisymurmur_112_1306243000965_A", "murmur", "1"),
        ("b_normal__101_1305030823364_B", "normal", "0"),
        ("b_normal_noisynormal_101_1305030823365_C", "normal", "1"),
    ]
    assert recordings["a_normal__201101070538"].annotations == ((0.1, 0.1, S1),)
    assert recordings["b_murmur__112_1306243000964_A"].person == "pascal-b-112"
    assert [problem.reason.split(" (")[0] for problem in problems] == ["unlabelled: 2 recordings have no label"]


def test_W11_a_line_that_names_no_tsv(tmp_path: pathlib.Path) -> None:
    lines = [names("50782", "AV"), "MV 50782_MV_1.hea 50782_MV_1.wav", names("50782", "PV")]
    circor(tmp_path, "50782", lines)
    (tmp_path / "50782_MV.tsv").write_text("0\t1\t1\n")
    recordings, problems = loaded("circor", tmp_path)
    assert {one.id: len(one.annotations) for one in recordings.values()} == {
        "50782_AV": 3, "50782_MV_1": 0, "50782_PV": 3,
    }  # fmt: skip
    (problem,) = problems
    assert problem.note
    assert "50782.txt names no .tsv for 50782_MV_1.wav" in problem.reason
    assert recordings["50782_MV_1"].notes == (problem.reason,)
    manifest = prepare.prepare("circor", tmp_path, tmp_path / "out", workers=1, strict=True)
    assert manifest is not None
    assert manifest["counts"]["left_out"] == {}
    assert manifest["counts"]["notes"] == {"annotation": 1}
    assert manifest["problems"] == [{"path": "50782_MV_1.tsv", "reason": problem.reason, "note": True}]
    assert "read with a doubt: 1 (annotation 1)" in prepare.summary(manifest)
    assert {row["id"]: row["notes"] for row in read_rows(tmp_path / "out")[1]}["50782_MV_1"] == [problem.reason]
    assert prepare.prepare("circor", tmp_path, tmp_path / "out", workers=1, strict=True) == manifest


def test_W12_tsv_lines_out_of_order(tmp_path: pathlib.Path) -> None:
    path, sound = tmp_path / "a.tsv", ["0\t1\t0", "1\t1.2\t1", "1.2\t1.5\t2", "1.5\t1.6\t3", "1.6\t2\t4", "2\t4\t0"]
    path.write_text("\n".join(sound))
    expected, notes = noted_annotations(path, 4.0)
    assert notes == ()
    path.write_text("\n".join([*sound[:5], *sound[1:]]))  # a second pass is appended, as in 50690_TV
    spans, (note,) = noted_annotations(path, 4.0)
    assert spans == expected
    assert "line 6: it starts at 1.0 s, before the previous end at 2.0 s; lines are sorted" in note
    path.write_text("\n".join([*sound[::-1], "1.1\t1.4\t4"]))
    spans, (note,) = noted_annotations(path, 4.0)
    assert spans == (*expected[:1], (1.0, 1.1, S1), (1.1, 1.4, UNANNOTATED), (1.4, 1.5, SYSTOLE), *expected[3:])
    assert "0.300 s in which lines contradict each other" in note
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(sound).replace(".", ",").encode())
    spans, (note,) = noted_annotations(path, 4.0)
    assert spans == expected
    assert "decimal commas" in note


def test_W12_a_state_index_behind_the_one_before(tmp_path: pathlib.Path) -> None:
    wav(tmp_path / "training-e" / "e1.wav", noise(3))
    (tmp_path / "training-e" / "REFERENCE.csv").write_text("e1,1\n")
    mat = tmp_path / "annotations/hand_corrected/training-e_StateAns/e1_StateAns.mat"
    mat.parent.mkdir(parents=True)
    indices, states = [201, 401, 801, 2001, 1801, 2201, 2601, 2801], ["S1", "systole", "S2", "diastole"] * 2
    mat.write_bytes(state_ans.write(indices, states))
    recordings, problems = loaded("cinc2016", tmp_path)
    assert recordings["e1"].annotations == (
        (0.1, 0.2, S1), (0.2, 0.4, SYSTOLE), (0.4, 1.1, UNANNOTATED), (1.1, 1.3, SYSTOLE), (1.3, 1.4, S2),
        (1.4, 3.0, DIASTOLE),
    )  # fmt: skip
    (problem,) = [problem for problem in problems if problem.note]
    assert "sample index 1801 follows 2001" in problem.reason
    assert recordings["e1"].notes == (problem.reason,)


def test_hidden_files_and_capitals(tmp_path: pathlib.Path) -> None:
    c, a, f = tmp_path / "circor", tmp_path / "cinc" / "training-a", tmp_path / "folder"
    circor(c, "1", [names("1", "AV")])
    for suffix in ("wav", "tsv", "hea"):
        (c / f"1_AV.{suffix}").rename(c / f"1_AV.{suffix.upper()}")
    wav(a / "a1.WAV")
    (a / "REFERENCE.csv").write_bytes(b"\xef\xbb\xbfa1,1\r\n\r\n")
    wav(f / "x" / "a.wav")
    (f / "empty").mkdir()
    (f / "link").symlink_to(tmp_path / "cinc")
    for folder in (c, a, f, f / "x"):
        for name in ("._1_AV.wav", "._a1.wav", "._1.txt", "._a1.hea", ".DS_Store", "Thumbs.db", ".hidden.wav"):
            (folder / name).write_bytes(b"\0\5\x16\7")
    recordings, problems = loaded("circor", c)
    assert (list(recordings), problems) == (["1_AV"], [])
    assert len(recordings["1_AV"].annotations) == 3
    recordings, problems = loaded("cinc2016", a)
    assert list(recordings) == ["a1"]
    assert [problem.reason.split(":")[0] for problem in problems] == ["no subjects"]
    recordings, problems = loaded("folder", f)
    assert list(recordings) == ["x/a"]
    assert [(problem.path, problem.reason.split(":")[0]) for problem in problems] == [("link", "link")]


@pytest.mark.parametrize("scale", [1e-4, 1e-9, 1e-25])
def test_quiet_floats_are_raised_piece_by_piece(tmp_path, scale):
    samples = 0.5 * np.random.default_rng(0).standard_normal(30_000).clip(-2, 2).astype(np.float32)
    soundfile.write(tmp_path / "loud.wav", samples, 2000, subtype="FLOAT")
    soundfile.write(tmp_path / "quiet.wav", samples * np.float32(scale), 2000, subtype="FLOAT")
    loud, quiet = (np.concatenate(list(audio.pieces(tmp_path / name, 1000, 5.0))) for name in ("loud.wav", "quiet.wav"))
    ratio = np.abs(quiet).max() / np.abs(loud).max()
    assert 0.2 < ratio <= 2
    np.testing.assert_allclose(quiet / ratio, loud, atol=1e-5)


def test_an_empty_annotation_is_a_problem(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(2000), 1000)
    (tmp_path / "a.tsv").write_text("\n")
    [recording], [problem] = datasets.load("folder", tmp_path)
    assert recording.annotations == ()
    assert (problem.path, problem.reason) == ("a.tsv", "annotation: the file is empty")
