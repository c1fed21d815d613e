"""Mutated files of every kind that is read: `python -m tests.campaigns.readers [--count=20000] [--seed=0]`.

Survived: an answer, or an error of a documented kind. Silent: an audio file gives another number of samples, with
neither error nor note. Another value of a sample, a digit or a letter cannot be known as damage where the format has
no checksum, so it is not counted. outside: something was written while reading.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

import numpy as np
import soundfile

from pcgjax import datasets
from pcgjax.data.decode import decode
from pcgjax.datasets import audio, state_ans
from tests.campaigns import HangError, Tally, deadline

LIMIT_S = 10  # a file
MEMORY = 3 << 30  # bytes of address space beyond what the process has at the start
EXTREMES = (0, 1, 2, 3, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0x7FFFF000, 0xFFFFFFFF)
WORDS = (b"-1", b"0", b"1e999", b"nan", b"-inf", b"9" * 20, b"9" * 5000, b"0x10", b"", b"4000000000", b"\xc2\xb2",
         b"1e-9", b"0,5", b"\xff")  # fmt: skip
Read = Callable[[pathlib.Path], tuple[int, bool]]  # path -> (what must not change unsaid, whether something was said)


def mutated(rng: np.random.Generator, whole: bytes, others: list[bytes], text: bool) -> bytes:
    """The file with one to three damages."""
    data = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        size = len(data)
        at = int(rng.integers(size)) if size else 0
        near = int(rng.integers(min(size, 64))) if size else 0  # headers are short
        length = int(rng.integers(1, 65))
        match rng.integers(7):
            case 0:
                for place in (at, near)[: rng.integers(1, 3)]:
                    if place < size:
                        data[place] ^= 1 << int(rng.integers(8))
            case 1:
                del data[near if rng.random() < 0.2 else at :]
            case 2:
                data[at:at] = rng.bytes(length)
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[max(0, at - length) : at]
            case 5 if text:
                numbers = list(re.finditer(rb"[0-9.]+", data))
                if numbers:
                    chosen = numbers[rng.integers(len(numbers))]
                    data[chosen.start() : chosen.end()] = WORDS[rng.integers(len(WORDS))]
            case 5:
                width = int(rng.choice([2, 4]))
                value = EXTREMES[rng.integers(len(EXTREMES))] & (1 << 8 * width) - 1
                order = "little" if rng.random() < 0.8 else "big"
                data[near // 2 * 2 : near // 2 * 2 + width] = value.to_bytes(width, order)
            case _:
                if rng.random() < 0.1:
                    data = bytearray(others[rng.integers(len(others))])
    return bytes(data)


def read_audio(path: pathlib.Path) -> tuple[int, bool]:
    row, _ = decode(datasets.Recording("a", "a", False, "d", 2000, {}, (), path), 1000)
    pieces = sum(map(len, audio.pieces(path, 1000, 0.3)))
    assert abs(pieces - row["num_samples"]) <= 1, (pieces, row["num_samples"])
    return row["num_samples"], bool(row["notes"])


def loaded(name: str, folder: pathlib.Path) -> Read:
    def read(_: pathlib.Path) -> tuple[int, bool]:
        datasets.load(name, folder)
        return 0, True

    return read


def corpus(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, Read, bool]]:
    """Whole files by kind: (path, how it is read, whether it is text)."""
    sound = np.random.default_rng(0).standard_normal(2400) / 8
    kinds: dict[str, tuple[pathlib.Path, Read, bool]] = {}
    encodings = ("wav PCM_U8", "wav PCM_16", "wav PCM_24", "wav PCM_32", "wav FLOAT", "wav DOUBLE", "wav ULAW",
                 "flac PCM_16", "flac PCM_24", "aiff PCM_16")  # fmt: skip
    for suffix, subtype in map(str.split, encodings):
        path = folder / f"{subtype}.{suffix}"
        soundfile.write(path, sound, 2000, subtype=subtype)
        kinds[f"{suffix} {subtype}"] = path, read_audio, False
    stereo = folder / "stereo.wav"
    soundfile.write(stereo, np.stack([sound, sound / 2], 1), 2000)
    kinds["wav stereo"] = stereo, read_audio, False

    circor, cinc, pascal = folder / "circor", folder / "cinc", folder / "pascal"
    for path in (circor / "1_AV.wav", circor / "2_MV.wav", cinc / "training-a/a1.wav", cinc / "training-a/a2.wav",
                 pascal / "set_a/normal__1.wav", pascal / "set_a/murmur__2.wav"):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, sound, 2000)
    for name in ("1_AV", "2_MV"):
        (circor / f"{name}.hea").write_text(f"{name} 1 2000 2400\n{name}.wav 16+44 1 16 0 0 0 0 {name[2:]}\n")
        (circor / f"{name}.tsv").write_text("0\t0.2\t0\n0.2\t0.3\t1\n0.3\t0.5\t2\n0.5\t0.6\t3\n0.6\t1.2\t4\n")
        (circor / f"{name[0]}.txt").write_text(
            f"{name[0]} 1 2000\n{name[2:]} {name}.hea {name}.wav {name}.tsv\n#Age: Child\n#Murmur: Absent\n"
            "#Outcome: Normal\n#Additional ID: 1234\n"
        )
    (circor / "training_data.csv").write_text(
        "Patient ID,Age,Murmur,Outcome\n1,Child,Absent,Normal\n2,Child,Absent,Normal\n"
    )
    mat = cinc / "annotations/hand_corrected/training-a_StateAns/a1_StateAns.mat"
    mat.parent.mkdir(parents=True)
    mat.write_bytes(state_ans.write([*range(1, 2400, 200)], ["S1", "systole", "S2", "diastole"] * 3))
    (cinc / "training-a/REFERENCE.csv").write_text("a1,1\na2,-1\n")
    (cinc / "training-a/a1.hea").write_text("a1 1 2000 2400\na1.wav 16+44 1 16 0 0 0 0 PCG\n# Abnormal\n")
    (cinc / "annotations/online_appendix_training_set.csv").write_text(
        "Challenge record name,Original record name,Subject ID\na1,C45S1,1\na2,C46S1,2\n"
    )
    (pascal / "set_a.csv").write_text(
        "dataset,fname,label,sublabel\na,set_a/normal__1.wav,normal,\na,set_a/murmur__2.wav,murmur,\n"
    )
    (pascal / "set_a_timing.csv").write_text("fname,cycle,sound,location\nset_a/normal__1.wav,1,S1,4410\n")
    for name, base, files in (
        ("circor", circor, ("1_AV.tsv", "1_AV.hea", "1.txt", "training_data.csv")),
        ("cinc2016", cinc, ("training-a/REFERENCE.csv", "training-a/a1.hea", str(mat.relative_to(cinc)),
                            "annotations/online_appendix_training_set.csv")),
        ("pascal", pascal, ("set_a.csv", "set_a_timing.csv")),
    ):  # fmt: skip
        for file in files:
            kind = f"{name} {os.path.basename(file)[-12:]}"
            kinds[kind] = base / file, loaded(name, base), not file.endswith(".mat")
    return kinds


WATCH = {"on": False, "writes": 0}


def watch(event: str, arguments: tuple) -> None:
    """An audit hook: counts what is written, made, moved or removed while a reader runs."""
    if WATCH["on"]:
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
        made = event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate")
        WATCH["writes"] += bool(made or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def outcome(read: Read, path: pathlib.Path, expected: int) -> tuple[str, str]:
    """(outcome, more about it) of reading one damaged file."""
    about = ""
    WATCH["on"], before = True, WATCH["writes"]
    try:
        with deadline(LIMIT_S):
            value, said = read(path)
        kind = "survived" if said or value == expected else "silent"
    except (audio.AudioError, datasets.DatasetError):
        kind = "survived"
    except HangError:
        kind = "hang"
    except Exception:
        kind, about = "traceback", traceback.format_exc()
    finally:
        WATCH["on"] = False
    return (kind, about) if WATCH["writes"] == before else ("outside", about)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, started = np.random.default_rng(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        kinds = corpus(pathlib.Path(name))
        whole = {kind: path.read_bytes() for kind, (path, _, _) in kinds.items()}
        expected = {kind: read(path)[0] for kind, (path, read, _) in kinds.items()}
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        sys.addaudithook(watch)
        tally = Tally()
        for number in range(options.count):
            kind = list(kinds)[number % len(kinds)]
            path, read, text = kinds[kind]
            damaged = mutated(rng, whole[kind], list(whole.values()), text)
            path.write_bytes(damaged)
            result, about = outcome(read, path, expected[kind])
            if result != "survived":
                kept = pathlib.Path(tempfile.gettempdir(), f"readers-{options.seed}-{number}{path.suffix}")
                kept.write_bytes(damaged)
                about = f"{kept} {about}"
            tally.add(kind, result, about)
            path.write_bytes(whole[kind])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{time.monotonic() - started:.0f} s, at most {most} MiB in memory, {WATCH['writes']} writes outside")
    return tally.end()


if __name__ == "__main__":
    sys.exit(main())
