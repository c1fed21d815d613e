"""A corpus: the rows of its recordings, their lengths, and their samples in memory or read from disk on demand."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from pcgjax.data import Row
from pcgjax.data.decode import decode_all
from pcgjax.data.shards import open_records, read_rows
from pcgjax.datasets import Problem, Recording
from pcgjax.datasets.sources import printable


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Decoded recordings at one rate: `rows` as `prepare` writes them, and their samples on demand."""

    rows: list[Row]
    sample_rate_hz: int
    lengths: np.ndarray  # (N,) int32 samples
    read: Callable[[int], np.ndarray]  # index -> (n,) int16

    def labels(self, target: str) -> np.ndarray:
        """(N,) float32 0 or 1 of the label `target`; NaN where the data set does not say."""
        values = [row["labels"].get(target) for row in self.rows]
        return np.array([float(value) if value in ("0", "1") else np.nan for value in values], np.float32)

    @property
    def bytes(self) -> int:
        """What all samples take as int16."""
        return int(self.lengths.sum()) * 2

    def subset(self, indices: Sequence[int] | np.ndarray) -> Corpus:
        """These recordings, in this order."""

        def read(place: int) -> np.ndarray:
            return self.read(int(indices[place]))

        rows = [self.rows[i] for i in indices]
        return Corpus(rows, self.sample_rate_hz, self.lengths[indices], read)


def from_prepared(folders: str | pathlib.Path) -> Corpus:
    """The corpus that `prepare` wrote to a folder, or to several of one rate, named with commas between them.

    Raises:
      PrepareError: as `shards.read_rows`.
      ValueError: folders of different rates, or a recording that two of them hold.
    """
    corpora = []
    for folder in map(str.strip, str(folders).split(",")):
        manifest, rows = read_rows(folder)
        lengths = np.array([row["num_samples"] for row in rows], np.int32)
        rate_hz = manifest["parameters"]["sample_rate_hz"]
        corpora.append(Corpus(rows, rate_hz, lengths, open_records(folder, rows)))
    if len(rates := sorted({c.sample_rate_hz for c in corpora})) > 1:
        raise ValueError(f"data.prepared={folders}: prepared at different rates, {rates} Hz; prepare both at one")
    if len(corpora) == 1:
        return corpora[0]
    rows = [row for c in corpora for row in c.rows]
    if twice := [id for id, count in collections.Counter(row["id"] for row in rows).items() if count > 1]:
        raise ValueError(f"data.prepared={folders}: recording {twice[0]} is in two of these folders")
    ends = np.cumsum([len(c.rows) for c in corpora])

    def read(index: int) -> np.ndarray:
        which = int(np.searchsorted(ends, index, side="right"))
        return corpora[which].read(index - int(ends[which] - len(corpora[which].rows)))

    return Corpus(rows, rates[0], np.concatenate([c.lengths for c in corpora]), read)


def in_memory(rows: list[Row], samples: Sequence[np.ndarray], sample_rate_hz: int) -> Corpus:
    """A corpus of arrays already decoded, int16 (n,) each, with full scale at 32767.

    Raises:
      ValueError: samples of another type or shape, naming the recording, or a rate that is none.
    """
    if not sample_rate_hz > 0:
        raise ValueError(f"sample_rate_hz={sample_rate_hz}: must be above 0")
    for row, wave in zip(rows, samples, strict=True):
        if wave.dtype != np.int16:
            raise ValueError(
                f"recording {row['id']}: samples of type {wave.dtype}, need int16: round 32767 times samples in [-1, 1]"
            )
        if wave.ndim != 1:
            raise ValueError(f"recording {row['id']}: samples of shape {wave.shape}, need (n,)")
    lengths = np.array([len(s) for s in samples], np.int32)
    return Corpus(rows, sample_rate_hz, lengths, samples.__getitem__)


def decode_recordings(recordings: list[Recording], sample_rate_hz: int) -> tuple[Corpus, list[Problem]]:
    """(recordings decoded to memory, those that cannot be used and why)."""
    rows, samples, problems = [], [], []
    for recording, row, audio, reason in decode_all(recordings, sample_rate_hz, None, "decode"):
        if row is None or audio is None:
            problems.append(Problem(printable(recording.path), str(reason)))
        else:
            rows.append(row)
            samples.append(audio)
    return in_memory(rows, samples, sample_rate_hz), problems


def in_rows(corpus: Corpus, rows: list[Row]) -> Corpus:
    """The same samples under changed rows."""
    return dataclasses.replace(corpus, rows=rows)


def order_digest(corpus: Corpus, **settings) -> str:
    """A digest of the recordings and of the settings on which their order depends; it is the same on resuming."""
    content = [[row["id"], row["sha256"]] for row in corpus.rows]
    return hashlib.sha256(json.dumps([content, settings], sort_keys=True, default=str).encode()).hexdigest()
