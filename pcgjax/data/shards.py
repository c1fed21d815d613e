"""A prepared folder: ArrayRecord shards, their rows and the manifest; written a shard at a time, joined, read.

A unit is the recordings of one shard. Its rows lie in parts/ until all shards are there and `join_shards` writes
records.jsonl and manifest.json.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import platform
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from pcgjax import __version__
from pcgjax.data import PrepareError, Row
from pcgjax.data.decode import DATASET_FIELDS, dataset_fields, try_decode
from pcgjax.data.workers import progress_bar
from pcgjax.datasets import Problem, Recording, with_notes
from pcgjax.datasets.sources import printable
from pcgjax.runtime import files, hashes

Job = tuple[pathlib.Path, int, Sequence[Recording], dict[str, Any]]  # out, number of the shard, its part, parameters
FORMAT = 2
RECORDINGS_A_SHARD = 64  # also the unit of work; fixed, so that the shards do not depend on who wrote them
_FOR_JOIN = (*DATASET_FIELDS[:-2], "path", "sample_rate_hz", "channels", "num_samples", "sha256", "notes")
# Noise-like int16 samples compress by a quarter only, and writing them compressed takes four times as long.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access, as ArrayRecord advises


def unit_key(recordings: Sequence[Recording], parameters: dict[str, Any], texts: list[str] | None = None) -> str:
    """A digest that changes with the parameters and with the recordings' files, labels and annotations.

    Args: texts: the recordings' `dataset_fields` as JSON, where the caller has them.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, parameters], sort_keys=True).encode())
    for recording, text in zip(recordings, texts or map(_json, map(dataset_fields, recordings)), strict=True):
        try:
            stat = os.stat(recording.path)
            file = f"{recording.path} {stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            file = f"{recording.path} missing"
        digest.update(f"{text}\n{file}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def unit_paths(out: pathlib.Path, number: int) -> tuple[pathlib.Path, pathlib.Path]:
    """(shard, the file with its rows): the second is written last and says that the first is whole."""
    return out / f"shard-{number:05d}.array_record", out / "parts" / f"shard-{number:05d}.jsonl"


def unit_done(out: pathlib.Path, number: int, key: str) -> bool:
    """Whether the shard is there as it was written, from recordings and parameters of this `unit_key`."""
    shard, side = unit_paths(out, number)
    if not side.exists():
        return False
    try:
        head, _ = _read_side(side)
    except PrepareError:
        return False  # damaged: it is written anew
    return bool(head["key"] == key and shard.is_file() and hashes.of_file(shard) == head["sha256"])


def _read_side(side: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    """(head, lines of rows) of the file beside a shard.

    Raises:
      PrepareError: it is not what was written.
    """
    first, _, body = side.read_bytes().partition(b"\n")
    try:
        head = json.loads(first)
        if head.pop("head_sha256") != hashes.of_json(head):
            raise ValueError("its first line")
        if head["rows_sha256"] != hashlib.sha256(body).hexdigest():
            raise ValueError("its rows")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrepareError(f"{side}: damaged ({error}): remove it and run prepare again") from None
    return head, body.decode().splitlines(keepends=True)


def probe(samples: np.ndarray) -> str:
    """The CRC-32 of 64 samples, evenly spaced: tells recordings from each other at hardly any cost."""
    return f"{zlib.crc32(samples[:: max(len(samples) // 64, 1)].tobytes()):08x}"


def write_unit(job: Job) -> tuple[int, str]:
    """Writes one shard and its rows, unless an earlier run has; returns its number and key.

    Raises:
      PrepareError: the shard could not be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    out, number, recordings, parameters = job
    texts = [_json(dataset_fields(recording)) for recording in recordings]
    key = unit_key(recordings, parameters, texts)
    if unit_done(out, number, key):
        return number, key
    shard, side = unit_paths(out, number)
    lines, count = [], 0
    try:
        side.unlink(missing_ok=True)
        with files.replacing(shard) as temporary:
            writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
            for recording, text in zip(recordings, texts, strict=True):
                row, samples, reason = try_decode(recording, parameters["sample_rate_hz"])
                if row is None or samples is None:
                    lines.append(_json({"problem": {"path": printable(recording.path), "reason": reason}}) + "\t")
                    continue
                writer.write(samples.tobytes())
                audio_fields = {name: value for name, value in row.items() if name not in DATASET_FIELDS}
                audio_fields |= {"shard": shard.name, "index": count, "probe": probe(samples)}
                # What the join needs stands before the whole row, which it need not parse.
                short = {name: row[name] for name in _FOR_JOIN}
                short["content"] = hashlib.sha256(f"{text} {row['sha256']}".encode()).hexdigest()
                lines.append(f"{_json(short)}\t{text[:-1]},{_json(audio_fields)[1:]}")
                count += 1
            writer.close()
        body = "\n".join([*lines, ""])
        head = {"key": key, "parameters": parameters, "bytes": shard.stat().st_size, "records": count,
                "sha256": hashes.of_file(shard), "rows_sha256": hashlib.sha256(body.encode()).hexdigest()}  # fmt: skip
        files.write_text(side, f"{_json(head | {'head_sha256': hashes.of_json(head)})}\n{body}")
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError when the disk is full
        raise PrepareError(
            f"{shard}: could not be written: {error}; fix this and run again; finished shards are reused"
        ) from None
    return number, key


def _json(value: Any) -> str:
    """JSON in one line: with the standard library it would take half as long as resampling the recording."""
    import orjson

    return orjson.dumps(value).decode()


def remove_prepared(out: pathlib.Path) -> None:
    """Removes what `prepare` writes, the manifest first; other files in the folder stay."""
    for path in (out / "manifest.json", out / "records.jsonl", *_shards(out)):
        path.unlink(missing_ok=True)
    if (out / "parts").exists():
        shutil.rmtree(out / "parts")


def _shards(out: pathlib.Path) -> list[pathlib.Path]:
    """All shards in the folder, and the temporary files of those that a killed run did not finish."""
    return sorted([*out.glob("shard-*.array_record"), *out.glob(".shard-*.tmp")])


def finished_manifest(
    out: pathlib.Path, source: str, parameters: dict[str, Any], units: list[list[Recording]]
) -> dict[str, Any] | None:
    """The manifest where `out` holds this very preparation, finished; else None.

    Raises:
      PrepareError: `out` holds another preparation, its source has changed since, or a shard is missing or cut.
    """
    settings: dict[str, Any] = {"source": source, **parameters}
    fix = "prepare into another --out, or replace it with --overwrite"
    if (out / "manifest.json").exists():
        manifest = _read_manifest(out)
        if lacking := {"source", "problems", "shards", "source_keys"} - manifest.keys():
            raise PrepareError(f"{out / 'manifest.json'}: not a manifest, it lacks {min(lacking)}: {fix}")
        present: dict[str, Any] = {"source": manifest["source"], **manifest["parameters"]}
    else:
        manifest, present = None, settings
        for side in sorted((out / "parts").glob("shard-*.jsonl"))[:1]:
            with contextlib.suppress(PrepareError):  # a damaged one is written anew
                present = {"source": source, **_read_side(side)[0]["parameters"]}
    differ = [
        f"{name} is {present.get(name)!r} there, {value!r} here"
        for name, value in settings.items()
        if present.get(name) != value
    ]
    if differ:
        raise PrepareError(f"{out}: holds another preparation ({'; '.join(differ)}): {fix}")
    if manifest is None:
        return None
    keys = [unit_key(unit, parameters) for unit in units]
    for key, before, unit in itertools.zip_longest(keys, manifest["source_keys"], units):
        if key != before:
            where = f"among {unit[0].id} to {unit[-1].id} (of {source})" if unit else f"at the end of {source}"
            raise PrepareError(
                f"{out}: the source has changed since: recordings {where} were added, removed, or have other "
                f"bytes, labels or annotations: {fix}"
            )
    verify(out)
    if (out / "parts").exists():  # the run that wrote the manifest was killed before it could tidy up
        shutil.rmtree(out / "parts", ignore_errors=True)
    return manifest


def join_shards(
    out: pathlib.Path, source: str, parameters: dict[str, Any], problems: list[Problem], keys: list[str], strict: bool
) -> dict[str, Any]:
    """Leaves out doubled audio, writes records.jsonl and the manifest, and returns the manifest; all shards are there.

    Args:
      problems: files that the data set's loader left out.
      keys: `unit_key` of each shard.
      strict: files that cannot be used are an error.
    Raises:
      PrepareError: `strict` and there are problems, no recording is left, or the folder cannot be written.
    """
    import orjson

    problems = list(problems)
    rows, lines, shards = [], {}, []
    for number in range(len(keys)):
        shard, side = unit_paths(out, number)
        head, unit_lines = _read_side(side)
        for line in unit_lines:
            short, _, whole = line.partition("\t")
            row = orjson.loads(short)
            if "problem" in row:
                problems.append(Problem(**row["problem"]))
            else:
                rows.append(row)
                lines[row["id"]] = whole
        if head["records"]:
            facts = {name: head[name] for name in ("bytes", "records", "sha256")}
            shards.append({"file": shard.name, **facts})
    doubles = _doubles(rows)
    problems += doubles.values()
    rows = [row for row in rows if row["id"] not in doubles]
    # As the loaders name files: from the source on.
    problems = [
        dataclasses.replace(problem, path=problem.path.removeprefix(source + os.sep))
        for problem in with_notes(problems, rows)
    ]
    if strict and not all(problem.note for problem in problems):
        raise PrepareError(problem_list(problems))
    if not rows:
        raise PrepareError(f"{source}: no recording can be used; {problem_list(problems)}")
    content = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
    for row in rows:
        content.update(row["content"].encode())
    text = "".join(lines[row["id"]] for row in rows)
    manifest = {
        "format": FORMAT,
        "dataset": parameters["dataset"],
        "source": source,
        "parameters": parameters,
        "versions": decoder_versions(),
        "counts": _counts(rows, problems),
        "problems": [as_json(problem) for problem in problems],
        "shards": shards,
        "source_keys": keys,
        "content_sha256": content.hexdigest(),
        "records_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    sealed = manifest | {"sha256": hashes.of_json(manifest)}
    try:
        files.write_text(out / "records.jsonl", text)
        for path in set(_shards(out)) - {out / shard["file"] for shard in shards}:
            path.unlink(missing_ok=True)  # of an unfinished run on a larger source
        files.write_text(out / "manifest.json", json.dumps(sealed, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise PrepareError(f"{out}: the manifest could not be written: {error}; fix this and run again") from None
    shutil.rmtree(out / "parts", ignore_errors=True)
    return manifest


def _doubles(rows: list[Row]) -> dict[str, Problem]:
    """The recordings to leave out, by id, where several are the same audio: all but the first by id.

    All of them where labels or people contradict each other, since nobody knows which is right.
    """
    same = collections.defaultdict(list)
    for row in rows:
        same[row["sha256"]].append(row)
    doubles = {}
    for first, *others in same.values():
        group = [first, *others]
        labels = {tuple(row["labels"].get(name) for name in ("abnormal", "murmur", "class")) for row in group}
        people = {row["person"] for row in group if row["person_known"]}
        clash = ""
        if len(labels) > 1:
            clash += " with another label"
        if len(people) > 1:
            clash += " of another person"
        left_out = group if clash else others
        for row in left_out:
            other = first if row is not first else others[0]
            doubles[row["id"]] = Problem(row["path"], f"doubled: same audio as {other['id']}{clash}")
    return doubles


def _counts(rows: list[Row], problems: list[Problem]) -> dict[str, Any]:
    def count(rows: list[Row]) -> dict[str, Any]:
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
        **count(rows),
        "databases": {name: count([row for row in rows if row["database"] == name]) for name in databases},
        "several_channels": sum(row["channels"] > 1 for row in rows),
        "left_out": _kinds(problem for problem in problems if not problem.note),
        "notes": _kinds(problem for problem in problems if problem.note),
    }


def _kinds(problems: Iterable[Problem]) -> dict[str, int]:
    return dict(sorted(collections.Counter(problem.reason.split(":")[0] for problem in problems).items()))


def as_json(problem: Problem) -> dict[str, Any]:
    """A problem as manifests hold it; `note` only where it is true."""
    return {name: value for name, value in dataclasses.asdict(problem).items() if value is not False}


def decoder_versions() -> dict[str, str]:
    """The versions on which the prepared samples depend; all machines of a cluster must agree on them."""
    import soxr

    return {"pcgjax": __version__, "numpy": np.__version__, "soxr": soxr.__version__,
            "python": platform.python_version()}  # fmt: skip


def problem_list(problems: list[Problem]) -> str:
    """The files and rows that are left out, a line each, for messages."""
    problems = [problem for problem in problems if not problem.note]
    return f"{len(problems)} files or rows cannot be used:" + "".join(f"\n  {p.path}: {p.reason}" for p in problems)


def _read_manifest(prepared: pathlib.Path) -> dict[str, Any]:
    path = prepared / "manifest.json"
    if not path.exists():
        unfinished = (prepared / "parts").exists()
        state = "an unfinished preparation" if unfinished else "no prepared data set"
        raise PrepareError(f"{prepared}: {state} (no manifest.json): run python -m pcgjax.prepare --out={prepared}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] == FORMAT:
            return _checked(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PrepareError(f"{path}: not a manifest ({error!r}): run prepare again with --overwrite") from None
    raise PrepareError(
        f"{path}: format {manifest['format']}, this version reads {FORMAT}: run prepare again with --overwrite"
    )


def _checked(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest, if it is what was written (one of a first version has no hashes); else ValueError."""
    digest = manifest.pop("sha256", None)
    if (digest is not None or "records_sha256" in manifest) and digest != hashes.of_json(manifest):
        raise ValueError("damaged: it is not what was written")
    for part, name in (("counts", "recordings"), ("parameters", "sample_rate_hz")):
        if not isinstance(manifest.get(part), dict) or not isinstance(manifest[part].get(name), int):
            raise ValueError(f"{part}: no whole number {name}")
    return manifest


def verify(prepared: str | pathlib.Path) -> None:
    """Reads all bytes of a prepared folder and compares them with the hashes of the manifest.

    A folder of an earlier version has hashes of the samples alone, which are compared.
    Raises:
      PrepareError: a file is missing, or any bit of it is not as it was written.
    """
    prepared = pathlib.Path(prepared)
    manifest, rows = read_rows(prepared)
    fix = "repair it by running prepare with --overwrite"
    total = sum(shard["records"] for shard in manifest["shards"])
    with progress_bar(total, "verifying") as advance:
        for shard in manifest["shards"]:
            path = prepared / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise PrepareError(f"{path}: missing or cut: {fix}")
            if "sha256" in shard and hashes.of_file(path) != shard["sha256"]:
                raise PrepareError(f"{path}: damaged, it is not what was written (SHA-256): {fix}")
            advance(shard["records"])
    if not all("sha256" in shard for shard in manifest["shards"]):
        records = open_records(prepared, rows)
        for row, samples in zip(rows, records, strict=True):
            _refuse_other_samples(samples, row, prepared / row["shard"])


def _refuse_other_samples(samples: np.ndarray, row: Row, path: pathlib.Path) -> None:
    if hashlib.sha256(samples.tobytes()).hexdigest() != row["sha256"]:
        raise PrepareError(
            f"{path}: its record {row['index']} is not the audio of {row['id']} (SHA-256): run prepare again with "
            "--overwrite"
        )


def read_rows(prepared: str | pathlib.Path) -> tuple[dict[str, Any], list[Row]]:
    """(manifest, rows sorted by id) of a prepared folder; a row is as `decode.decode` says, with `shard` and `index`.

    Raises:
      PrepareError: not prepared, unfinished, of another format, or records.jsonl does not belong to the manifest.
    """
    prepared = pathlib.Path(prepared)
    manifest = _read_manifest(prepared)
    path = prepared / "records.jsonl"
    try:
        content = path.read_bytes()
        if manifest.get("records_sha256", digest := hashlib.sha256(content).hexdigest()) != digest:
            raise ValueError("damaged, it is not what was written (SHA-256)")
        rows = [json.loads(line) for line in content.decode().splitlines()]
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

    A data source as Grain wants it. Threads may share it; unpickled, it opens its shards again.

    Raises:
      PrepareError: on reading, a shard is missing, cut or corrupt.
    """

    def __init__(self, prepared: str | pathlib.Path, rows: Sequence[Row]):
        self._folder = pathlib.Path(prepared)
        self._where = [(row["shard"], row["index"], row["num_samples"]) for row in rows]
        # Two exchanged shards are each sound by themselves: whose audio a record is, its own samples say.
        self._probes = [row.get("probe") for row in rows]
        self._rows = None if all(self._probes) else rows  # of an earlier version: compared by SHA-256, which is slower
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
            raise PrepareError(
                f"{path}: record {position} holds {len(samples)} samples, records.jsonl says {num_samples}: {fix}"
            )
        if (expected := self._probes[index]) is None:
            assert self._rows is not None
            _refuse_other_samples(samples, self._rows[index], path)
        elif probe(samples) != expected:
            raise PrepareError(f"{path}: record {position} is another recording's audio: {fix}")
        return samples

    __call__ = __getitem__

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_folder", "_where", "_probes", "_rows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _readers={}, _lock=threading.Lock())

    def _reader(self, path: pathlib.Path) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if path.name not in self._readers:
                reader = ArrayRecordReader(str(path), _READER_OPTIONS)
                if not reader.ok():  # a read raises the reason
                    reader.read([0])
                self._readers[path.name] = reader
            return self._readers[path.name]


def open_records(prepared: str | pathlib.Path, rows: Sequence[Row]) -> Records:
    """Random access to the samples of `rows` (from `read_rows`); shards are opened when first used."""
    return Records(prepared, rows)
