"""python -m pcgjax.prepare: audio files -> checked, resampled int16 ArrayRecord shards and a manifest, once.

A prepared folder holds
  shard-00000.array_record ...  one record a recording: its samples as little-endian int16
  records.jsonl                 one row a recording (see `decode`), sorted by id
  manifest.json                 written last: a folder without it is unfinished
and, until the manifest is there, parts/: the rows of every finished shard. A run that was stopped takes up there,
and several machines that share the folder each do some of the shards.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import logging
import os
import pathlib
import pickle
import platform
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from pcgjax import __version__, audio, datasets, files
from pcgjax.audio import AudioError
from pcgjax.datasets import Problem, Recording

Row = dict[str, Any]
Job = tuple[pathlib.Path, int, Sequence[Recording], dict[str, Any]]  # out, number of the shard, its part, parameters
Decoded = tuple[Row | None, np.ndarray | None, str | None]  # row, samples, or the reason why there are none

FORMAT = 2
ENGINES = ("local", "ray")
RECORDINGS_A_SHARD = 64  # also the unit of work; fixed, so that the shards do not depend on who wrote them
_FULL_SCALE = 32767
_SAID = ("id", "person", "person_known", "database", "labels", "annotations")
_FOR_JOIN = (*_SAID[:-1], "path", "sample_rate_hz", "channels", "num_samples", "sha256")
# Noise-like int16 samples compress by a quarter only, and writing them compressed takes four times as long.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access, as ArrayRecord advises


class PrepareError(ValueError):
    """A prepared folder that cannot be written or read; the message names the file and the fix."""


# ---------------------------------------------------------------------------------------------- one recording


def decode(recording: Recording, sample_rate_hz: int) -> tuple[Row, np.ndarray]:
    """Decodes, checks and resamples one recording.

    The peak is scaled to full int16 range and kept as `scale`, so that quiet recordings lose no precision:
    `int16 * scale / 32767` are the samples with the file's full scale at 1.

    Returns: (row, int16 samples (row["num_samples"],)). A row is what json can hold: id, person, person_known,
      database, labels, annotations [[start_s, end_s, state], ...], path, source_rate_hz, sample_rate_hz,
      channels, num_samples, scale, sha256 (of the int16 samples), fingerprint (see there).
    Raises:
      AudioError: as `audio.read`, or nothing is left below half the new rate.
    """
    import soxr

    samples, source_rate_hz, channels = audio.read_steps(recording.path)
    native = samples
    if samples.dtype != np.int16:
        native = np.clip(np.rint(samples), -32768, 32767).astype("<i2")
    samples = samples.astype(np.float32, copy=False)
    if source_rate_hz != sample_rate_hz:
        samples = soxr.resample(samples, source_rate_hz, sample_rate_hz, quality="HQ")
    peak = float(max(samples.max(), -samples.min()))
    if peak == 0:
        raise AudioError(f"silent: nothing is left at {sample_rate_hz} Hz")
    scaled = samples * np.float32(_FULL_SCALE / peak)
    scaled = np.rint(scaled, out=scaled).astype("<i2")
    row = _said(recording) | {
        "path": str(recording.path),
        "source_rate_hz": source_rate_hz,
        "sample_rate_hz": sample_rate_hz,
        "channels": channels,
        "num_samples": len(scaled),
        "scale": peak / 32768,
        "sha256": hashlib.sha256(scaled.data).hexdigest(),
        "fingerprint": fingerprint(native, source_rate_hz),
    }
    return row, scaled


def _said(recording: Recording) -> Row:
    """The part of a row that comes from the data set, not from the audio."""
    return {
        "id": recording.id,
        "person": recording.person,
        "person_known": recording.person_known,
        "database": recording.database,
        "labels": dict(sorted(recording.labels.items())),
        "annotations": recording.annotations,
    }


_WINDOW = 64  # samples of a fingerprint window, at about 2 kHz
_SELECT = np.array([40503, 60493, 44111], np.uint16)
_HASH = np.frombuffer(hashlib.shake_256(b"any odd numbers").digest(128), "<u8") | np.uint64(1)


def fingerprint(samples: np.ndarray, rate_hz: int) -> str:
    """Hashes of some 32 ms windows, chosen by what they hold: excerpts of one recording share theirs.

    About 8 windows a second are kept, wherever an excerpt begins. A second of shared audio gives 8 common
    hashes on average (fewer than 3 in 1 of 70 cases), two seconds 16. Only equal samples are found: not
    another gain, rate or channel. Windows that hardly change (silence, clipping) are left out.

    Args:
      samples: int16 (n,), as they are in the file.
    Returns: the hashes in order, 8 hexadecimal digits each, with blanks between.
    """
    # Oversampled audio changes little from sample to sample, so the window's length in seconds is kept instead.
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
    with _progress(len(recordings), description) as advance:
        for chunk, results in zip(chunks, _in_order(_decode_many, jobs, len(recordings), workers), strict=True):
            for recording, (row, samples, reason) in zip(chunk, results, strict=True):
                yield recording, row, samples, reason
            advance(len(chunk))


def _decode_many(job: tuple[Sequence[Recording], int]) -> list[Decoded]:
    recordings, sample_rate_hz = job
    return [_try_decode(recording, sample_rate_hz) for recording in recordings]


def _try_decode(recording: Recording, sample_rate_hz: int) -> Decoded:
    try:
        return *decode(recording, sample_rate_hz), None
    except AudioError as error:
        return None, None, str(error)
    except OSError as error:
        return None, None, f"unreadable: {error.strerror or error}"


# ------------------------------------------------------------------------------------------------- processes


def _in_order(function: Callable, jobs: Sequence, recordings: int, workers: int | None) -> Iterator:
    """function(job) for each job, in order, over `workers` processes (default: one a core where that pays)."""
    # A fork copies only the calling thread, so locks that another one holds stay locked for ever.
    fork = sys.platform == "linux" and "jax" not in sys.modules and threading.active_count() == 1
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        # A forked worker starts in the time of a hundred recordings, a fresh interpreter in that of a thousand.
        workers = min(cores, recordings // (128 if fork else 1024))
    if min(workers, len(jobs)) <= 1:
        _keep_memory()
        yield from map(function, jobs)
        return
    import concurrent.futures.process
    import multiprocessing

    context = multiprocessing.get_context("fork" if fork else "spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (os.getpid(),))
    try:
        running: collections.deque[concurrent.futures.Future] = collections.deque()
        for job in jobs:
            running.append(pool.submit(function, job))
            if len(running) > 4 * workers:  # bounds the memory that finished results take
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise PrepareError("a worker process was killed (out of memory?): run again with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _keep_memory() -> None:
    """Has the C library keep the memory of freed arrays for the next ones.

    Otherwise it maps each array of 128 KiB or more anew, and the kernel's page faults take longer than decoding.
    Freeing one large array, never touched, is what raises glibc's threshold (mallopt(3), M_MMAP_THRESHOLD).
    """
    np.empty(30 << 20, np.uint8)


def _begin_worker(parent: int) -> None:
    """Ends the worker when its parent was killed, which otherwise leaves it waiting for ever."""
    _keep_memory()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _over_ray(jobs: Sequence[Job], workers: int | None) -> Iterator[tuple[int, str]]:
    """(number, key) of each shard as the machines of a Ray cluster finish them, in any order.

    The cluster is the one the caller is connected to, the one that RAY_ADDRESS names or that `ray start` began on
    this machine; without one, this machine alone. Each machine needs this package, the source and `out` at the
    same paths. `workers` limits how many shards are written at once; default: one a core of the cluster.
    """
    if not jobs:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here reports to nobody
    try:
        import ray.data
    except ImportError as error:
        fix = "pip install -c constraints.txt -e '.[ray]'"
        raise PrepareError(f"--engine=ray needs Ray Data ({error}): {fix}, on every machine") from None
    from pcgjax import prepare  # with -m this module is __main__, which the workers would get by value

    out, versions = jobs[0][0], _versions()
    rows = [{"job": pickle.dumps((job, _unit_key(job[2], job[3]), versions))} for job in jobs]
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised
    ray.data.DataContext.get_current().enable_progress_bars = False
    connected = ray.is_initialized()
    try:
        if not connected:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        many = ray.data.TaskPoolStrategy(size=workers)
        # A block is what one task gets. Ray runs those again whose machine was lost.
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(prepare._write_unit_there, compute=many)
        for row in data.iter_rows():
            if row["problem"]:
                raise PrepareError(row["problem"])
            number, key = row["number"], row["key"]
            if not _unit_done(out, number, key):
                shard, _ = _unit_paths(out, number)
                found = f"written on {row['machine']}, not found here"
                raise PrepareError(f"{shard}: {found}: --out must be a folder that all machines share")
            yield number, key
    except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
        why = (str(error).strip() or repr(error)).splitlines()[-1]
        raise PrepareError(f"--engine=ray: {why}; mend this and run again, what is done is kept") from error
    finally:
        if not connected:
            ray.shutdown()


def _write_unit_there(row: dict[str, Any]) -> dict[str, Any]:
    """`_write_unit` on a machine of a cluster, when that machine sees and has what the one that asks does."""
    job, key, versions = pickle.loads(row["job"])
    out, number, recordings, parameters = job
    machine, problem = socket.gethostname(), ""
    try:
        if not (out / "parts").is_dir():
            problem = f"{out}: not there on {machine}: --out must be a folder that all machines share"
        elif _versions() != versions:
            problem = f"{machine} has {_versions()}, the machine that asks {versions}: install the same on both"
        elif _unit_key(recordings, parameters) != key:
            paths = [recording.path for recording in recordings]
            missing = [path for path in paths if not os.path.exists(path)]
            differs = f"{missing[0]}: not there" if missing else f"{paths[0]} to {paths[-1]}: other sizes or times"
            problem = f"{differs} on {machine}: --source must be a folder that all machines share"
        else:
            _keep_memory()
            _write_unit(job)
    except PrepareError as error:
        problem = f"{error} (on {machine})"
    return {"number": number, "key": key, "machine": machine, "problem": problem}


@contextlib.contextmanager
def _progress(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """Yields what to call with the number of recordings done; what takes longer than a second gets a bar."""
    started, done, bar = time.monotonic(), 0, None

    def advance(count: int) -> None:
        nonlocal done, bar
        done += count
        elapsed = time.monotonic() - started
        if bar is not None:
            bar.update(count)
        elif elapsed > 1:
            import tqdm  # later than this, as a small data set is prepared in the time of the import

            tqdm.tqdm.monitor_interval = 0  # no thread beside this one: see _in_order
            interval = 0.2 if sys.stderr.isatty() else 30.0  # a log file wants a line now and then
            bar = tqdm.tqdm(total=total, desc=description, unit="recording", mininterval=interval, smoothing=0.1)
            bar.start_t -= elapsed
            bar.update(done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


# ---------------------------------------------------------------------------------------------------- shards


def prepare(
    dataset: str,
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    sample_rate_hz: int = 1000,
    *,
    strict: bool = False,
    workers: int | None = None,
    engine: str = "local",
    num_shards: int = 1,
    shard_index: int = 0,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Prepares data set `dataset` of folder `source` into folder `out`, or finds that this is done already.

    Args:
      strict: files that cannot be used are an error (after all were looked at).
      workers: processes; default one a core.
      engine: "local", or "ray": over the machines of a Ray cluster (see `_over_ray`), with the same result.
      num_shards, shard_index: this machine does the shards with number % num_shards == shard_index. Whoever
        finds all shards done writes the manifest.
      overwrite: removes what an earlier call with other parameters wrote.
    Returns: the manifest; None while other machines' shards are missing.
    Raises:
      DatasetError: as `datasets.load`.
      PrepareError: `out` holds another preparation, cannot be written, or `strict` found problems; Ray is missing,
        or one of its machines does not see the same source and `out`.
    """
    if engine not in ENGINES:
        raise PrepareError(f"--engine={engine}: must be one of {', '.join(ENGINES)}")
    if not 0 <= shard_index < num_shards:
        raise PrepareError(f"--shard_index={shard_index}: must be at least 0 and below --num_shards={num_shards}")
    if overwrite and num_shards > 1:
        raise PrepareError("--overwrite would remove other machines' shards: empty the folder, or use another --out")
    if not 100 <= sample_rate_hz <= 192_000:
        raise PrepareError(f"--sample_rate_hz={sample_rate_hz}: must lie between 100 and 192000")
    source, out = os.path.abspath(source), pathlib.Path(os.path.abspath(out))
    recordings, problems = datasets.load(dataset, source)
    units = [recordings[i : i + RECORDINGS_A_SHARD] for i in range(0, len(recordings), RECORDINGS_A_SHARD)]
    parameters = {"dataset": dataset, "sample_rate_hz": sample_rate_hz, "resampler": "soxr HQ"}
    try:
        if overwrite:
            _remove(out)
        elif (manifest := _finished(out, source, parameters, units)) is not None:
            if strict and manifest["problems"]:
                raise PrepareError(_listed([Problem(**problem) for problem in manifest["problems"]]))
            return manifest
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrepareError(f"{out}: {error.strerror or error}; choose another --out") from None

    mine = [(out, n, units[n], parameters) for n in range(shard_index, len(units), num_shards)]
    todo = sum(len(unit) for _, _, unit, _ in mine)
    keys: dict[int, str] = {}
    with _progress(todo, f"preparing {dataset}") as advance:
        written = _over_ray(mine, workers) if engine == "ray" else _in_order(_write_unit, mine, todo, workers)
        for number, key in written:
            keys[number] = key
            advance(len(units[number]))
    try:
        for number, unit in enumerate(units):
            if number not in keys:
                keys[number] = _unit_key(unit, parameters)
                if not _unit_done(out, number, keys[number]):
                    return _finished(out, source, parameters, units)
        return _join(out, source, parameters, problems, [keys[number] for number in range(len(units))], strict)
    except FileNotFoundError:  # another machine joins at this moment
        return _finished(out, source, parameters, units)


def _unit_key(recordings: Sequence[Recording], parameters: dict[str, Any], said: list[str] | None = None) -> str:
    """Changes with the parameters and with anything about the recordings: files, labels, annotations."""
    digest = hashlib.sha256(json.dumps([FORMAT, parameters], sort_keys=True).encode())
    for recording, text in zip(recordings, said or map(_json, map(_said, recordings)), strict=True):
        try:
            stat = os.stat(recording.path)
            file = f"{recording.path} {stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            file = f"{recording.path} missing"
        digest.update(f"{text}\n{file}\n".encode())
    return digest.hexdigest()


def _unit_paths(out: pathlib.Path, number: int) -> tuple[pathlib.Path, pathlib.Path]:
    """(shard, the file with its rows): the second is written last and says that the first is whole."""
    return out / f"shard-{number:05d}.array_record", out / "parts" / f"shard-{number:05d}.jsonl"


def _unit_done(out: pathlib.Path, number: int, key: str) -> bool:
    shard, side = _unit_paths(out, number)
    if not side.exists():
        return False
    with side.open(encoding="utf-8") as file:
        head = json.loads(file.readline())
    size = shard.stat().st_size if shard.exists() else 0
    return bool(head["key"] == key and head["bytes"] == size)


def _write_unit(job: Job) -> tuple[int, str]:
    """Writes one shard and its rows, unless a run before this one has; returns its number and key."""
    from array_record.python.array_record_module import ArrayRecordWriter

    out, number, recordings, parameters = job
    said = [_json(_said(recording)) for recording in recordings]
    key = _unit_key(recordings, parameters, said)
    if _unit_done(out, number, key):
        return number, key
    shard, side = _unit_paths(out, number)
    lines, count = [], 0
    try:
        side.unlink(missing_ok=True)
        with files.replacing(shard) as temporary:
            writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
            for recording, text in zip(recordings, said, strict=True):
                row, samples, reason = _try_decode(recording, parameters["sample_rate_hz"])
                if row is None or samples is None:
                    lines.append(_json({"problem": {"path": str(recording.path), "reason": reason}}) + "\t")
                    continue
                writer.write(samples.tobytes())
                heard = {name: value for name, value in row.items() if name not in _SAID}
                heard |= {"shard": shard.name, "index": count}
                # What the join needs stands before the whole row, which it need not parse.
                short = {name: row[name] for name in _FOR_JOIN}
                short["content"] = hashlib.sha256(f"{text} {row['sha256']}".encode()).hexdigest()
                lines.append(f"{_json(short)}\t{text[:-1]},{_json(heard)[1:]}")
                count += 1
            writer.close()
        head = {"key": key, "parameters": parameters, "bytes": shard.stat().st_size, "records": count}
        files.write_text(side, "\n".join([_json(head), *lines, ""]))
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError when the disk is full
        raise PrepareError(
            f"{shard}: could not be written: {error}; mend this and run again, what is done is kept"
        ) from None
    return number, key


def _json(value: Any) -> str:
    """One line. Annotations are most of a row, and `json` takes half as long for them as resampling the samples."""
    import orjson

    return orjson.dumps(value).decode()


def _remove(out: pathlib.Path) -> None:
    """Removes what `prepare` writes, the manifest first; other files in the folder stay."""
    for path in (out / "manifest.json", out / "records.jsonl", *_shards(out)):
        path.unlink(missing_ok=True)
    if (out / "parts").exists():
        shutil.rmtree(out / "parts")


def _shards(out: pathlib.Path) -> list[pathlib.Path]:
    """All shards in the folder, and what a killed run left of others."""
    return sorted([*out.glob("shard-*.array_record"), *out.glob(".shard-*.tmp")])


def _finished(
    out: pathlib.Path, source: str, parameters: dict[str, Any], units: list[list[Recording]]
) -> dict[str, Any] | None:
    """The manifest of this very preparation where `out` holds it. Raises PrepareError where it holds another."""
    asked: dict[str, Any] = {"source": source, **parameters}
    fix = "prepare into another --out, or replace it with --overwrite"
    if (out / "manifest.json").exists():
        manifest = _read_manifest(out)
        there: dict[str, Any] = {"source": manifest["source"], **manifest["parameters"]}
    else:
        manifest, there = None, asked
        for side in sorted((out / "parts").glob("shard-*.jsonl"))[:1]:
            with side.open(encoding="utf-8") as file:
                there = {"source": source, **json.loads(file.readline())["parameters"]}
    differ = [
        f"{name} is {there.get(name)!r} there, {value!r} asked"
        for name, value in asked.items()
        if there.get(name) != value
    ]
    if differ:
        raise PrepareError(f"{out}: holds another preparation ({'; '.join(differ)}): {fix}")
    if manifest is None:
        return None
    keys = [_unit_key(unit, parameters) for unit in units]
    for key, before, unit in itertools.zip_longest(keys, manifest["source_keys"], units):
        if key != before:
            where = f"among {unit[0].id} to {unit[-1].id} (of {source})" if unit else f"at the end of {source}"
            raise PrepareError(
                f"{out}: the source has changed since: recordings {where} were added, removed, or have other "
                f"bytes, labels or annotations: {fix}"
            )
    for shard in manifest["shards"]:
        path = out / shard["file"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            raise PrepareError(f"{path}: missing or cut: repair it by running prepare with --overwrite")
    if (out / "parts").exists():  # the run that wrote the manifest was killed before it could tidy up
        shutil.rmtree(out / "parts", ignore_errors=True)
    return manifest


def _join(
    out: pathlib.Path, source: str, parameters: dict[str, Any], problems: list[Problem], keys: list[str], strict: bool
) -> dict[str, Any]:
    """All shards are there: finds doubles, writes records.jsonl and the manifest, returns the manifest."""
    import orjson

    problems = list(problems)
    rows, lines, shards = [], {}, []
    for number in range(len(keys)):
        shard, side = _unit_paths(out, number)
        with side.open(encoding="utf-8") as file:
            head = json.loads(file.readline())
            for line in file:
                short, _, whole = line.partition("\t")
                row = orjson.loads(short)
                if "problem" in row:
                    problems.append(Problem(**row["problem"]))
                else:
                    rows.append(row)
                    lines[row["id"]] = whole
        if head["records"]:
            shards.append({"file": shard.name, "bytes": head["bytes"], "records": head["records"]})
    doubles = _doubles(rows)
    problems += doubles.values()
    # As the loaders name files: from the source on.
    problems = [Problem(problem.path.removeprefix(source + os.sep), problem.reason) for problem in problems]
    if strict and problems:
        raise PrepareError(_listed(problems))
    rows = [row for row in rows if row["id"] not in doubles]
    if not rows:
        raise PrepareError(f"{source}: no recording can be used; {_listed(problems)}")
    content = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
    for row in rows:
        content.update(row["content"].encode())
    manifest = {
        "format": FORMAT,
        "dataset": parameters["dataset"],
        "source": source,
        "parameters": parameters,
        "versions": _versions(),
        "counts": _counts(rows, problems),
        "problems": [{"path": problem.path, "reason": problem.reason} for problem in problems],
        "shards": shards,
        "source_keys": keys,
        "content_sha256": content.hexdigest(),
    }
    try:
        files.write_text(out / "records.jsonl", "".join(lines[row["id"]] for row in rows))
        for path in set(_shards(out)) - {out / shard["file"] for shard in shards}:
            path.unlink(missing_ok=True)  # of an unfinished run on a larger source
        files.write_text(out / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise PrepareError(f"{out}: the manifest could not be written: {error}; mend this and run again") from None
    shutil.rmtree(out / "parts", ignore_errors=True)
    return manifest


def _doubles(rows: list[Row]) -> dict[str, Problem]:
    """What to leave out where several recordings are the same audio: all but the first by id.

    All of them where labels or people contradict each other, since nobody knows which is right.
    """
    same = collections.defaultdict(list)
    for row in rows:
        same[row["sha256"]].append(row)
    found = {}
    for first, *others in same.values():
        group = [first, *others]
        labels = {tuple(row["labels"].get(name) for name in ("abnormal", "murmur", "class")) for row in group}
        people = {row["person"] for row in group if row["person_known"]}
        clash = " with another label" * (len(labels) > 1) + " of another person" * (len(people) > 1)
        for row in group if clash else others:
            other = first if row is not first else others[0]
            found[row["id"]] = Problem(row["path"], f"doubled: same audio as {other['id']}{clash}")
    return found


def _counts(rows: list[Row], problems: list[Problem]) -> dict[str, Any]:
    def of(rows: list[Row]) -> dict[str, Any]:
        known = {row["person"] for row in rows if row["person_known"]}
        hours = sum(row["num_samples"] / row["sample_rate_hz"] for row in rows) / 3600
        return {
            "recordings": len(rows),
            "people": len(known),
            "recordings_of_unknown_people": sum(not row["person_known"] for row in rows),
            "hours": round(hours, 4),
            "labels": {
                name: dict(sorted(collections.Counter(r["labels"].get(name, "not said") for r in rows).items()))
                for name in ("abnormal", "murmur", "class")
            },
        }

    databases = sorted({row["database"] for row in rows})
    return {
        **of(rows),
        "databases": {name: of([row for row in rows if row["database"] == name]) for name in databases},
        "several_channels": sum(row["channels"] > 1 for row in rows),
        "left_out": dict(sorted(collections.Counter(p.reason.split(":")[0] for p in problems).items())),
    }


def _versions() -> dict[str, str]:
    import soxr

    return {"pcgjax": __version__, "numpy": np.__version__, "soxr": soxr.__version__,
            "python": platform.python_version()}  # fmt: skip


def _listed(problems: list[Problem]) -> str:
    return f"{len(problems)} files or rows cannot be used:" + "".join(f"\n  {p.path}: {p.reason}" for p in problems)


# --------------------------------------------------------------------------------------------------- reading


def _read_manifest(prepared: pathlib.Path) -> dict[str, Any]:
    path = prepared / "manifest.json"
    if not path.exists():
        state = "an unfinished preparation" if (prepared / "parts").exists() else "no prepared data set"
        raise PrepareError(f"{prepared}: {state} (no manifest.json): run python -m pcgjax.prepare --out={prepared}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] == FORMAT:
            return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise PrepareError(f"{path}: not a manifest ({error!r}): run prepare again with --overwrite") from None
    raise PrepareError(
        f"{path}: format {manifest['format']}, this version reads {FORMAT}: run prepare again with --overwrite"
    )


def read_rows(prepared: str | pathlib.Path) -> tuple[dict[str, Any], list[Row]]:
    """(manifest, rows sorted by id) of a prepared folder; a row is as `decode` says, and `shard` and `index`.

    Raises:
      PrepareError: not prepared, unfinished, of another format, or records.jsonl does not belong to the manifest.
    """
    prepared = pathlib.Path(prepared)
    manifest = _read_manifest(prepared)
    path = prepared / "records.jsonl"
    try:
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise PrepareError(f"{path}: {error}: run prepare again with --overwrite") from None
    if len(rows) != manifest["counts"]["recordings"]:
        raise PrepareError(
            f"{path}: {len(rows)} rows, manifest.json says {manifest['counts']['recordings']}: "
            "run prepare again with --overwrite"
        )
    return manifest, rows


class Records:
    """Random access to prepared samples: records[i], or records(i), is the int16 (num_samples,) of rows[i].

    A data source as Grain wants it. Threads may share it; pickled, it opens its shards again.
    Raises PrepareError where a shard is missing, cut or corrupt.
    """

    def __init__(self, prepared: str | pathlib.Path, rows: Sequence[Row]):
        self._folder = pathlib.Path(prepared)
        self._where = [(row["shard"], row["index"], row["num_samples"]) for row in rows]
        self._readers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, index: int) -> np.ndarray:
        shard, position, num_samples = self._where[index]
        path = self._folder / shard
        fix = "run prepare again with --overwrite"
        try:
            samples = np.frombuffer(self._reader(path).read([position])[0], "<i2")
        except (RuntimeError, IndexError, ValueError) as error:
            raise PrepareError(f"{path}: missing, cut or corrupt ({error}): {fix}") from None
        if len(samples) != num_samples:
            found = f"record {position} holds {len(samples)} samples, records.jsonl says {num_samples}"
            raise PrepareError(f"{path}: {found}: {fix}")
        return samples

    __call__ = __getitem__

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_where": self._where}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _readers={}, _lock=threading.Lock())

    def _reader(self, path: pathlib.Path) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if path.name not in self._readers:
                reader = ArrayRecordReader(str(path), _READER_OPTIONS)
                if not reader.ok():  # reading is what gives the reason
                    reader.read([0])
                self._readers[path.name] = reader
            return self._readers[path.name]


def open_records(prepared: str | pathlib.Path, rows: Sequence[Row]) -> Records:
    """Random access to the samples of `rows` (from `read_rows`); shards are opened when first used."""
    return Records(prepared, rows)


# ---------------------------------------------------------------------------------------------- command line


def summary(manifest: dict[str, Any]) -> str:
    """What a prepared folder holds and what was left out, for people."""
    counts = manifest["counts"]
    text = []
    for name, of in [*counts["databases"].items(), ("all", counts)]:
        people = f"{of['people']} people" if of["people"] else "people unknown"
        if of["people"] and of["recordings_of_unknown_people"]:
            people += f" and {of['recordings_of_unknown_people']} recordings of unknown people"
        said = [
            f"{label} {'/'.join(f'{k}:{n}' for k, n in values.items())}"
            for label, values in of["labels"].items()
            if set(values) != {"not said"}
        ]
        text.append(
            f"{name}: {of['recordings']} recordings, {people}, {of['hours']:.2f} h, {', '.join(said) or 'no labels'}"
        )
    if counts["several_channels"]:
        text.append(f"{counts['several_channels']} recordings have several channels: the first is used")
    if manifest["problems"]:
        kinds = ", ".join(f"{kind} {n}" for kind, n in counts["left_out"].items())
        text.append(f"problems: {len(manifest['problems'])} ({kinds}); manifest.json lists them, the first are")
        text += [f"  {problem['path']}: {problem['reason']}" for problem in manifest["problems"][:10]]
    return "\n".join(text)


def _main(flags_: Any) -> None:
    started = time.perf_counter()
    manifest = prepare(
        flags_.dataset, flags_.source, flags_.out, flags_.sample_rate_hz, strict=flags_.strict,
        workers=flags_.workers, engine=flags_.engine, num_shards=flags_.num_shards, shard_index=flags_.shard_index,
        overwrite=flags_.overwrite,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    if manifest is None:
        print(
            f"{flags_.out}: this machine's shards are done ({seconds:.1f} s), others' are missing: "
            "the machine that finishes last joins them, or a call without --num_shards"
        )
    else:
        print(summary(manifest))
        print(f"{flags_.out}: complete after {seconds:.1f} s")


if __name__ == "__main__":
    flags.DEFINE_enum("dataset", None, datasets.NAMES, "The data set in --source.", required=True)
    flags.DEFINE_string("source", None, "The folder that holds the data set.", required=True)
    flags.DEFINE_string("out", None, "The folder to write shards, records.jsonl and manifest.json to.", required=True)
    flags.DEFINE_integer("sample_rate_hz", 1000, "The rate to resample to, in Hz.", 100, 192_000)
    flags.DEFINE_bool("strict", False, "Fail when any file or table row cannot be used.")
    flags.DEFINE_integer("workers", None, "Processes that decode; default: one a core.", 1)
    flags.DEFINE_enum("engine", "local", ENGINES, "Where: on this machine, or over a Ray cluster (RAY_ADDRESS).")
    flags.DEFINE_integer("num_shards", 1, "How many machines share the work.", 1)
    flags.DEFINE_integer("shard_index", 0, "Which of them this is, from 0.", 0)
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier call with other parameters wrote to --out.")
    files.run(lambda _: _main(flags.FLAGS))
