"""pcgjax.prepare: shards, manifest, resuming, sharing the work, damaged files, reading back."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import wave

import numpy as np
import pytest
import soundfile
import soxr

from pcgjax import datasets, prepare
from pcgjax.data import PrepareError
from pcgjax.data.decode import decode, decode_all, fingerprint
from pcgjax.data.ray_cluster import _write_unit_there
from pcgjax.data.shards import _doubles, decoder_versions, open_records, read_rows, unit_key
from pcgjax.data.workers import progress_bar
from pcgjax.datasets import audio

RATE_HZ = 2000


def noise(seed: int, seconds: float = 1.0, rate_hz: int = RATE_HZ) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(round(seconds * rate_hz)) * 3000).astype(np.int16)


def write_corpus(folder: pathlib.Path, samples: dict[str, np.ndarray], rate_hz: int = RATE_HZ) -> pathlib.Path:
    """A data set in CinC 2016's layout (database e), normal and abnormal in turn."""
    training = folder / "training-e"
    training.mkdir(parents=True, exist_ok=True)
    for name, values in samples.items():
        with wave.open(str(training / f"{name}.wav"), "wb") as file:
            file.setparams((values.shape[1] if values.ndim > 1 else 1, 2, rate_hz, 0, "NONE", ""))
            file.writeframes(values.astype("<i2").tobytes())
    names = sorted(path.stem for path in training.glob("*.wav"))
    (folder / "online_appendix_training_set.csv").write_text(
        "Challenge record name,Original record name,Subject ID\n" + "".join(f"{name},,\n" for name in names)
    )
    table = "".join(f"{name},{1 if i % 2 else -1}\n" for i, name in enumerate(names))
    (training / "REFERENCE.csv").write_text(table)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """140 recordings: three shards."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), {f"e{i:05d}": noise(i) for i in range(140)})


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pcgjax.prepare", "--dataset=cinc2016", *map(str, arguments)]


def test_samples_come_back_as_librosa_would_resample_them(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    manifest = prepare.prepare("cinc2016", corpus, tmp_path / "out", 1000, workers=1, strict=True)
    assert manifest is not None
    assert manifest["problems"] == []
    assert manifest["counts"]["recordings"] == 140
    assert manifest["counts"]["databases"]["cinc2016-e"]["labels"]["abnormal"] == {"0": 70, "1": 70}
    assert manifest["counts"]["hours"] == pytest.approx(140 / 3600, abs=1e-4)
    assert [shard["records"] for shard in manifest["shards"]] == [64, 64, 12]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "records.jsonl",
        *(f"shard-{n:05d}.array_record" for n in range(3)),
    ]

    read_manifest, rows = read_rows(tmp_path / "out")
    assert read_manifest == manifest
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    for row, samples in zip(rows, open_records(tmp_path / "out", rows), strict=True):
        expected = soxr.resample(noise(int(row["id"][1:])) / np.float32(32768), RATE_HZ, 1000, quality="HQ")
        assert samples.dtype == np.int16
        assert abs(samples.astype(int)).max() == 32767
        assert len(samples) == row["num_samples"] == 1000
        np.testing.assert_allclose(samples * (row["scale"] / 32767), expected, atol=row["scale"] / 65534 * 1.01)


def test_reading_at_random_by_threads_and_after_pickling(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    prepare.prepare("cinc2016", corpus, tmp_path, workers=1)
    _, rows = read_rows(tmp_path)
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    in_order = list(open_records(tmp_path, rows))
    records = open_records(tmp_path, rows)
    assert len(records) == 140
    indices = np.random.default_rng(1).integers(-140, 140, 400).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for index, samples in zip(indices, pool.map(records, indices), strict=True):
            np.testing.assert_array_equal(samples, in_order[index])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(records))[7], in_order[7])
    with pytest.raises(IndexError):
        records[140]


def test_a_killed_run_is_taken_up(tmp_path: pathlib.Path) -> None:
    source = write_corpus(tmp_path / "source", {f"e{i:05d}": noise(i, 0.6) for i in range(640)})  # ten shards
    whole = prepare.prepare("cinc2016", source, tmp_path / "whole", workers=1)
    out = tmp_path / "killed"
    arguments = command(f"--source={source}", f"--out={out}", "--workers=1")
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    while not list(out.glob("parts/*.jsonl")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.jsonl")}
    assert 1 <= len(done) < 10
    assert not (out / "manifest.json").exists()
    with pytest.raises(PrepareError, match="unfinished"):
        read_rows(out)
    shards = {name: (out / name.replace(".jsonl", ".array_record")).stat().st_mtime_ns for name in done}

    resumed = prepare.prepare("cinc2016", source, out, workers=1)
    assert resumed == whole
    assert (out / "records.jsonl").read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()
    assert resumed is not None
    assert len({path.read_bytes() for path in out.glob("shard-*.array_record")}) == 10
    for name, written in shards.items():  # not written again
        assert (out / name.replace(".jsonl", ".array_record")).stat().st_mtime_ns == written
    assert not list(out.rglob("*.tmp*"))


def test_workers_end_with_a_killed_parent(tmp_path: pathlib.Path) -> None:
    program = (
        "import os, time; from pcgjax.data.workers import in_order\n"
        "def job(_): os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)\n"  # one write: two workers share the pipe
        "list(in_order(job, [1, 2], 10_000, 2))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if _alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_two_machines_share_the_work(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    single = prepare.prepare("cinc2016", corpus, tmp_path / "single", workers=1)
    out = tmp_path / "shared"
    assert prepare.prepare("cinc2016", corpus, out, workers=1, num_shards=2, shard_index=0) is None
    assert sorted(path.name for path in out.glob("*.array_record")) == [
        "shard-00000.array_record",
        "shard-00002.array_record",
    ]
    assert prepare.prepare("cinc2016", corpus, out, workers=1, num_shards=2, shard_index=1) == single
    assert prepare.prepare("cinc2016", corpus, out, workers=1) == single  # and a join that is not needed any more

    third = tmp_path / "third"
    for index in (0, 1):  # a machine more than the work has shares for, joined by a call without the flags
        assert prepare.prepare("cinc2016", corpus, third, workers=1, num_shards=3, shard_index=index) is None
    assert prepare.prepare("cinc2016", corpus, third, workers=2) == single
    with pytest.raises(PrepareError, match="shard_index"):
        prepare.prepare("cinc2016", corpus, out, num_shards=2, shard_index=2)
    with pytest.raises(PrepareError, match="overwrite"):
        prepare.prepare("cinc2016", corpus, out, num_shards=2, shard_index=0, overwrite=True)


# ------------------------------------------------------------------------------------------------------- Ray


def same_files(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two prepared folders hold the same files, byte for byte."""
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    return contents[0] == contents[1] and "manifest.json" in contents[0]


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's processes start Ray clusters of their own, whatever the machine is part of."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip('Ray is not installed: pip install -c constraints.txt -e ".[ray]"')
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


@pytest.mark.slow
def test_ray_writes_the_same_bytes_and_takes_up_the_rest(ray_cluster, run_python, corpus, tmp_path) -> None:
    prepare.prepare("cinc2016", corpus, tmp_path / "local", workers=1)
    out = tmp_path / "ray"
    prepare.prepare("cinc2016", corpus, out, workers=1, num_shards=2, shard_index=1)  # the second of three shards
    written = (out / "shard-00001.array_record").stat().st_mtime_ns
    program = """
import pathlib, sys
import ray
from pcgjax import prepare
from pcgjax.data import PrepareError
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
source, out, blocked = sys.argv[1:]
prepare.prepare("cinc2016", source, out, engine="ray")
assert ray.is_initialized()  # the caller's cluster stays
(pathlib.Path(blocked) / "shard-00001.array_record").mkdir(parents=True)
try:
    prepare.prepare("cinc2016", source, blocked, engine="ray")
except PrepareError as error:
    print(error)
"""
    done = run_python(program, str(corpus), str(out), str(tmp_path / "blocked"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "shard-00001.array_record: could not be written" in done.stdout
    assert "(on " in done.stdout  # the machine
    assert not (tmp_path / "blocked" / "manifest.json").exists()
    assert same_files(tmp_path / "local", out)
    assert (out / "shard-00001.array_record").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_killed_ray_run_is_taken_up(ray_cluster, tmp_path: pathlib.Path) -> None:
    source = write_corpus(tmp_path / "source", {f"e{i:05d}": noise(i, 3) for i in range(640)})  # ten shards
    prepare.prepare("cinc2016", source, tmp_path / "local", workers=1)
    out = tmp_path / "ray"
    arguments = command(f"--source={source}", f"--out={out}", "--engine=ray", "--workers=1")
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    while not list(out.glob("parts/*.jsonl")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert same_files(tmp_path / "local", out)


def test_a_ray_machine_that_sees_something_else_says_what(tmp_path: pathlib.Path) -> None:
    source = write_corpus(tmp_path / "source", {f"e{i:05d}": noise(i) for i in range(3)})
    recordings, _ = datasets.load("cinc2016", source)
    parameters = {"dataset": "cinc2016", "sample_rate_hz": 1000, "resampler": "soxr HQ"}
    out = tmp_path / "out"

    def there(versions: dict[str, str]) -> str:
        job = out, 0, recordings, parameters
        return _write_unit_there({"job": pickle.dumps((job, key, versions))})["problem"]

    key = unit_key(recordings, parameters)
    assert re.search(r"/out: not there on .*--out must be a folder that all machines share", there(decoder_versions()))
    (out / "parts").mkdir(parents=True)
    assert "'soxr': '0'" in there({**decoder_versions(), "soxr": "0"})
    os.utime(source / "training-e" / "e00000.wav", (0, 0))
    assert re.search(r"e00000.wav to .*e00002.wav: other sizes or times on ", there(decoder_versions()))
    (source / "training-e" / "e00001.wav").unlink()
    problem = there(decoder_versions())
    assert re.search(r"e00001.wav: not there on .*--source must be a folder that all machines share", problem)
    assert not list(out.glob("shard*"))


def test_without_ray_the_error_says_how_to_have_it(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as when it is not installed
    with pytest.raises(PrepareError, match=r"--engine=ray needs Ray Data.*pip install .*\[ray\]"):
        prepare.prepare("cinc2016", corpus, tmp_path, engine="ray")
    with pytest.raises(PrepareError, match="--engine=beam: must be one of local, ray"):
        prepare.prepare("cinc2016", corpus, tmp_path, engine="beam")


def test_command_line_is_idempotent_and_workers_do_not_matter(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    one = prepare.prepare("cinc2016", corpus, tmp_path / "one", workers=1)
    out = tmp_path / "two"
    run = subprocess.run(command(f"--source={corpus}", f"--out={out}", "--workers=2"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "140 recordings" in run.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest.pop("sha256")
    assert manifest == one
    before = (out / "manifest.json").stat().st_mtime_ns
    assert prepare.prepare("cinc2016", corpus, out) == manifest
    assert (out / "manifest.json").stat().st_mtime_ns == before
    run = subprocess.run(
        command(f"--source={corpus}", f"--out={out}", "--sample_rate_hz=500"), capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "sample_rate_hz is 1000 there, 500 here" in run.stderr
    assert "--overwrite" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_folder_with_other_content_is_kept(tmp_path: pathlib.Path) -> None:
    source = write_corpus(tmp_path / "source", {f"e{i:05d}": noise(i) for i in range(3)})
    out = tmp_path / "out"
    first = prepare.prepare("cinc2016", source, out, workers=1)
    assert first is not None
    with pytest.raises(PrepareError, match="sample_rate_hz is 1000 there, 500 here"):
        prepare.prepare("cinc2016", source, out, 500, workers=1)
    other = shutil.copytree(source, tmp_path / "other")
    with pytest.raises(PrepareError, match=r"source is .*source' there, .*other' here"):
        prepare.prepare("cinc2016", other, out, workers=1)
    write_corpus(source, {"e00001": noise(77)})
    with pytest.raises(PrepareError, match=r"e00000 to e00002.*--overwrite"):
        prepare.prepare("cinc2016", source, out, workers=1)
    assert read_rows(out)[0] == first

    (out / "mine.txt").write_text("not prepare's")
    second = prepare.prepare("cinc2016", source, out, 500, workers=1, overwrite=True)
    assert second is not None
    assert second["parameters"]["sample_rate_hz"] == 500
    assert second["content_sha256"] != first["content_sha256"]
    assert (out / "mine.txt").exists()

    (source / "training-e" / "REFERENCE.csv").write_text("e00000,1\ne00001,1\ne00002,-1\n")
    with pytest.raises(PrepareError, match="labels"):
        prepare.prepare("cinc2016", source, out, 500, workers=1)


def test_an_unfinished_folder_with_other_parameters_is_kept(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    prepare.prepare("cinc2016", corpus, tmp_path, workers=1, num_shards=2, shard_index=0)
    with pytest.raises(PrepareError, match="sample_rate_hz is 1000 there, 2000 here"):
        prepare.prepare("cinc2016", corpus, tmp_path, 2000, workers=1)
    manifest = prepare.prepare("cinc2016", corpus, tmp_path, 2000, workers=1, overwrite=True)
    assert manifest is not None
    assert manifest["parameters"]["sample_rate_hz"] == 2000


def damaged_corpus(folder: pathlib.Path) -> dict[str, str]:
    """Writes good and damaged files; returns what is wrong, by id."""
    write_corpus(
        folder,
        {
            "e00001": noise(1),
            "e00002": noise(2),
            "e00003": noise(3),
            "e00004": np.zeros(2000),
            "e00005": noise(5, 0.3),
        },
    )
    training = folder / "training-e"
    whole = (training / "e00003.wav").read_bytes()
    (training / "e00003.wav").write_bytes(whole[: len(whole) // 2])
    soundfile.write(training / "e00006.wav", np.append(np.zeros(1999, np.float32), np.nan), RATE_HZ, subtype="FLOAT")
    (training / "e00007.wav").write_text("this is no audio")
    (training / "e00008.wav").write_bytes(b"")
    write_corpus(folder, {})  # the table with all names
    return {
        "e00003": "truncated",
        "e00004": "silent",
        "e00005": "too short",
        "e00006": "not finite",
        "e00007": "not audio",
        "e00008": "empty",
    }


def test_damaged_files_are_left_out_and_listed(tmp_path: pathlib.Path) -> None:
    damaged = damaged_corpus(tmp_path / "source")
    manifest = prepare.prepare("cinc2016", tmp_path / "source", tmp_path / "out", workers=1)
    assert manifest is not None
    reasons = {pathlib.Path(problem["path"]).stem: problem["reason"].split(":")[0] for problem in manifest["problems"]}
    assert reasons == damaged
    assert all(problem["path"].startswith("training-e/") for problem in manifest["problems"])
    assert manifest["counts"]["left_out"] == {kind: 1 for kind in sorted(damaged.values())}
    _, rows = read_rows(tmp_path / "out")
    assert [row["id"] for row in rows] == ["e00001", "e00002"]
    assert [len(samples) for samples in open_records(tmp_path / "out", rows)] == [1000, 1000]
    text = prepare.summary(manifest)
    assert "problems: 6" in text
    assert "training-e/e00004.wav: silent" in text


def test_strict_lists_all_and_completes_nothing(tmp_path: pathlib.Path) -> None:
    damaged = damaged_corpus(tmp_path / "source")
    out = tmp_path / "out"
    with pytest.raises(PrepareError) as error:
        prepare.prepare("cinc2016", tmp_path / "source", out, workers=1, strict=True)
    assert all(f"training-e/{name}.wav: {kind}" in str(error.value) for name, kind in damaged.items())
    assert not (out / "manifest.json").exists()
    assert not (out / "records.jsonl").exists()
    assert prepare.prepare("cinc2016", tmp_path / "source", out, workers=1) is not None
    with pytest.raises(PrepareError, match="6 files"):  # also where the folder is complete
        prepare.prepare("cinc2016", tmp_path / "source", out, workers=1, strict=True)


def test_no_usable_recording_is_an_error(tmp_path: pathlib.Path) -> None:
    write_corpus(tmp_path / "source", {"e00001": np.zeros(2000)})
    with pytest.raises(PrepareError, match=r"no recording can be used.*\n.*e00001.wav: silent"):
        prepare.prepare("cinc2016", tmp_path / "source", tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(datasets.DatasetError, match="no such folder"):
        prepare.prepare("cinc2016", tmp_path / "nowhere", tmp_path / "out", workers=1)


def test_doubled_audio(tmp_path: pathlib.Path) -> None:
    # The names alternate between normal and abnormal: 1 and 3 agree, 2 and 5 do not, 4 is alone.
    audio_of = {"e00001": noise(1), "e00002": noise(2), "e00003": noise(1), "e00004": noise(4), "e00005": noise(2)}
    manifest = prepare.prepare("cinc2016", write_corpus(tmp_path / "source", audio_of), tmp_path / "out", workers=1)
    assert manifest is not None
    assert {pathlib.Path(problem["path"]).stem: problem["reason"] for problem in manifest["problems"]} == {
        "e00003": "doubled: same audio as e00001",
        "e00002": "doubled: same audio as e00005 with another label",
        "e00005": "doubled: same audio as e00002 with another label",
    }
    _, rows = read_rows(tmp_path / "out")
    assert [row["id"] for row in rows] == ["e00001", "e00004"]
    expected = [decode(recording, 1000)[1] for recording in datasets.load("cinc2016", tmp_path / "source")[0]]
    for samples, index in zip(open_records(tmp_path / "out", rows), (0, 3), strict=True):
        np.testing.assert_array_equal(samples, expected[index])


def test_doubled_audio_of_two_people() -> None:
    known = {"labels": {"abnormal": "1"}, "sha256": "s", "path": "x.wav", "person_known": True}
    rows = [known | {"id": "a", "person": "p"}, known | {"id": "b", "person": "q"}]
    assert {name: problem.reason for name, problem in _doubles(rows).items()} == {
        "a": "doubled: same audio as b of another person",
        "b": "doubled: same audio as a of another person",
    }
    rows[1]["person_known"] = False  # then nothing contradicts
    assert list(_doubles(rows)) == ["b"]


def recording(path: pathlib.Path) -> datasets.Recording:
    return datasets.Recording(path.stem, "p", True, "cinc2016-e", RATE_HZ, {"abnormal": "1"}, ((0.1, 0.2, 1),), path)


def test_first_channel_of_stereo_is_taken_and_said(tmp_path: pathlib.Path) -> None:
    both = np.stack([noise(1), noise(2)], axis=1)
    manifest = prepare.prepare(
        "cinc2016", write_corpus(tmp_path / "source", {"e00001": both}), tmp_path / "out", workers=1
    )
    assert manifest is not None
    assert manifest["counts"]["several_channels"] == 1
    assert "1 recordings have several channels" in prepare.summary(manifest)
    _, (row,) = read_rows(tmp_path / "out")
    assert row["channels"] == 2
    write_corpus(tmp_path / "mono", {"e00001": noise(1)})
    mono_row, mono = decode(recording(tmp_path / "mono" / "training-e" / "e00001.wav"), 1000)
    np.testing.assert_array_equal(open_records(tmp_path / "out", [row])[0], mono)
    assert row["sha256"] == mono_row["sha256"]


@pytest.mark.parametrize(("subtype", "suffix"), [("PCM_16", "flac"), ("PCM_24", "wav"), ("FLOAT", "wav")])
def test_the_same_audio_in_other_containers_is_the_same(tmp_path: pathlib.Path, subtype: str, suffix: str) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1), RATE_HZ, subtype="PCM_16")
    soundfile.write(tmp_path / f"b.{suffix}", noise(1) / 32768, RATE_HZ, subtype=subtype)
    a, a_samples = decode(recording(tmp_path / "a.wav"), 1000)
    b, b_samples = decode(recording(tmp_path / f"b.{suffix}"), 1000)
    assert a["sha256"] == b["sha256"]
    assert a["fingerprint"] == b["fingerprint"]
    np.testing.assert_allclose(a_samples, b_samples, atol=1)


def test_quiet_recordings_keep_their_precision_and_are_not_taken_for_doubles(tmp_path: pathlib.Path) -> None:
    values = np.random.default_rng(0).standard_normal((2, 2000)).astype(np.float32) * 1e-6  # far below one int16 step
    rows = []
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", values[i], RATE_HZ, subtype="FLOAT")
        row, samples = decode(recording(tmp_path / f"{i}.wav"), RATE_HZ)
        np.testing.assert_allclose(samples * (row["scale"] / 32767), values[i], atol=1e-10)
        rows.append(row)
    assert rows[0]["sha256"] != rows[1]["sha256"]
    assert len(set(rows[0]["fingerprint"].split()) - set(rows[1]["fingerprint"].split())) > 3


def test_nothing_left_below_half_the_new_rate(tmp_path: pathlib.Path) -> None:
    alternating = np.tile(np.array([3000, -3000], np.int16), 4000)
    soundfile.write(tmp_path / "a.wav", alternating, 8000)
    row, _ = decode(recording(tmp_path / "a.wav"), 1000)
    assert row["scale"] < 0.01  # the filter's edges are all that is left
    soundfile.write(tmp_path / "short.wav", alternating[:100], 8000)
    with pytest.raises(audio.AudioError, match="too short"):
        decode(recording(tmp_path / "short.wav"), 1000)


def test_decode_all_is_in_order_with_reasons(corpus: pathlib.Path) -> None:
    recordings, _ = datasets.load("cinc2016", corpus)
    gone = recording(corpus / "training-e" / "gone.wav")
    wanted = [*recordings[:50], gone, *recordings[50:90]]
    decoded = list(decode_all(wanted, 500, workers=2))
    assert [got.id for got, *_ in decoded] == [want.id for want in wanted]
    for got, row, samples, reason in decoded:
        if got is gone:
            assert (row, samples, reason) == (None, None, "missing: no such file")
        else:
            expected_row, expected = decode(got, 500)
            assert reason is None
            assert row == expected_row
            np.testing.assert_array_equal(samples, expected)


def test_only_what_takes_long_gets_a_progress_bar(capsys: pytest.CaptureFixture) -> None:
    with progress_bar(8, "quick") as advance:
        advance(8)
    assert capsys.readouterr().err == ""
    with progress_bar(8, "long") as advance:
        time.sleep(1.01)
        advance(3)
        advance(5)
    assert "long: 100%" in (shown := capsys.readouterr().err)
    assert "8/8 [00:01<00:00" in shown


def test_a_worker_that_is_killed_is_an_error(tmp_path: pathlib.Path) -> None:
    program = (
        "import os, signal; from pcgjax.data.workers import in_order\n"
        "def job(_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "list(in_order(job, range(4), 10_000, 2))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert run.returncode != 0
    assert "PrepareError: a worker process was killed" in run.stderr


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "bits"])
def test_a_damaged_shard_is_named(corpus: pathlib.Path, tmp_path: pathlib.Path, damage: str) -> None:
    prepare.prepare("cinc2016", corpus, tmp_path, workers=1)
    shard = tmp_path / "shard-00001.array_record"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "bits":
        content[2000] ^= 1
        shard.write_bytes(content)
    else:
        shard.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    _, rows = read_rows(tmp_path)
    with pytest.raises(PrepareError, match=r"shard-00001.array_record: missing, cut or corrupt.*--overwrite"):
        list(open_records(tmp_path, rows))
    records = open_records(tmp_path, rows)
    assert len(records[0]) == 1000  # the other shards can be read
    with pytest.raises(PrepareError, match=r"shard-00001.array_record.*--overwrite"):
        [records[i] for i in range(64, 128)]
    with pytest.raises(PrepareError, match=r"shard-00001.array_record.*--overwrite"):
        prepare.prepare("cinc2016", corpus, tmp_path, workers=1)


def test_shards_and_rows_of_different_runs_are_not_mixed(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    prepare.prepare("cinc2016", corpus, tmp_path / "a", 1000, workers=1)
    prepare.prepare("cinc2016", corpus, tmp_path / "b", 500, workers=1)
    shutil.copy(tmp_path / "b" / "shard-00000.array_record", tmp_path / "a")
    _, rows = read_rows(tmp_path / "a")
    with pytest.raises(PrepareError, match=r"record 0 holds 500 samples, records.jsonl says 1000"):
        open_records(tmp_path / "a", rows)(0)


def test_W4_exchanged_shards_of_equal_recordings(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    manifest = prepare.prepare("cinc2016", corpus, tmp_path, workers=1)
    one, other = (tmp_path / shard["file"] for shard in manifest["shards"][:2])
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    _, rows = read_rows(tmp_path)
    with pytest.raises(PrepareError, match=r"shard-00000.array_record: record 0 is another recording's audio"):
        open_records(tmp_path, rows)(0)
    with pytest.raises(PrepareError, match=r"shard-00000.array_record: (missing or cut|damaged)"):
        prepare.prepare("cinc2016", corpus, tmp_path, workers=1)
    # A folder of an earlier version has no probes: the whole audio is compared.
    older = [{name: value for name, value in row.items() if name != "probe"} for row in rows]
    with pytest.raises(PrepareError, match=r"its record 0 is not the audio of .* \(SHA-256\)"):
        open_records(tmp_path, older)(0)


def test_W4_flipped_bits_are_found(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    prepare.prepare("cinc2016", corpus, tmp_path, workers=1)
    rng = np.random.default_rng(0)
    for name in ("records.jsonl", "manifest.json", "shard-00000.array_record"):
        content = (tmp_path / name).read_bytes()
        for at in rng.integers(len(content), size=12):
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(rng.integers(8))
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(PrepareError, match=r"--overwrite|prepare into another"):
                prepare.prepare("cinc2016", corpus, tmp_path, workers=1)
        (tmp_path / name).write_bytes(content)
    assert prepare.prepare("cinc2016", corpus, tmp_path, workers=1)


def test_W4_a_damaged_unfinished_preparation_is_written_anew(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    whole = prepare.prepare("cinc2016", corpus, tmp_path / "whole", workers=1)
    for name in ("parts/shard-00000.jsonl", "shard-00000.array_record"):
        out = tmp_path / name.replace("/", "_")
        assert prepare.prepare("cinc2016", corpus, out, workers=1, num_shards=3, shard_index=0) is None
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 4
        (out / name).write_bytes(content)
        assert prepare.prepare("cinc2016", corpus, out, workers=1) == whole
        assert (out / "records.jsonl").read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()


def test_read_rows_names_what_is_wrong(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(PrepareError, match="no prepared data set"):
        read_rows(tmp_path)
    prepare.prepare("cinc2016", corpus, tmp_path, workers=1)
    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(PrepareError, match=r"records.jsonl: damaged"):
        read_rows(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    older = {name: value for name, value in manifest.items() if name not in ("sha256", "records_sha256")}
    (tmp_path / "manifest.json").write_text(json.dumps(older))
    with pytest.raises(PrepareError, match=r"records.jsonl: 139 rows, manifest.json says 140"):
        read_rows(tmp_path)
    (tmp_path / "records.jsonl").write_text(lines[0][:50])
    with pytest.raises(PrepareError, match=r"records.jsonl: .*--overwrite"):
        read_rows(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(PrepareError, match="format 99, this version reads"):
        read_rows(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(PrepareError, match="not a manifest"):
        read_rows(tmp_path)


def test_out_that_cannot_be_written(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PrepareError, match="file/out"):
        prepare.prepare("cinc2016", corpus, tmp_path / "file" / "out", workers=1)
    # A folder where the shard should go: renaming fails, as it does where nothing may be written.
    (tmp_path / "out" / "shard-00001.array_record").mkdir(parents=True)
    with pytest.raises(PrepareError, match=r"shard-00001.array_record: could not be written"):
        prepare.prepare("cinc2016", corpus, tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert sorted(path.name for path in (tmp_path / "out" / "parts").iterdir()) == ["shard-00000.jsonl"]
    os.rmdir(tmp_path / "out" / "shard-00001.array_record")
    assert prepare.prepare("cinc2016", corpus, tmp_path / "out", workers=1) is not None


def test_a_full_disk_leaves_no_named_file(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    program = (  # a limit on the size of files fails as a full disk does, while it is being written
        "import resource, signal, sys; from pcgjax import prepare\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))\n"
        "prepare.prepare('cinc2016', sys.argv[1], sys.argv[2], workers=1)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, corpus, tmp_path / "out"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode != 0
    assert "shard-00000.array_record: could not be written" in run.stderr
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_fingerprint_finds_shared_audio_at_any_offset() -> None:
    for rate_hz in (2000, 4000, 44100):
        whole = noise(1, 8, rate_hz)
        first = set(fingerprint(whole[: 5 * rate_hz + 7], rate_hz).split())
        second = set(fingerprint(whole[3 * rate_hz + 1 :], rate_hz).split())
        assert 20 < len(first) < 70  # about 8 a second
        assert len(first & second) >= 3
        assert all(len(value) == 8 and int(value, 16) >= 0 for value in first)
        assert not first & set(fingerprint(noise(2, 8, rate_hz), rate_hz).split())


@pytest.mark.parametrize(("steps", "tone_hz"), [(3, 25), (5, 50), (20, 50), (10, 37)])
def test_fingerprint_of_a_quiet_recording_is_neither_empty_nor_long(steps: int, tone_hz: int) -> None:
    """About 8 windows a second, though a tone a few steps high has few different samples to choose by."""
    rng = np.random.default_rng(0)
    tone = steps * np.sin(2 * np.pi * tone_hz * np.arange(60_000) / 2000)
    quiet = np.int16(np.rint(tone + rng.normal(size=len(tone)) * 0.7))
    assert 4 < len(fingerprint(quiet, 2000).split()) / 30 < 15


def test_fingerprint_ignores_what_many_recordings_have() -> None:
    silence = np.zeros(20_000, np.int16)
    clipped = np.repeat(np.array([32767, -32768] * 500, np.int16), 20)
    assert fingerprint(silence, RATE_HZ) == ""
    assert fingerprint(clipped, RATE_HZ) == ""
    assert fingerprint(noise(1)[:63], RATE_HZ) == ""
    assert fingerprint(np.repeat(silence, 2), 44100) == ""
