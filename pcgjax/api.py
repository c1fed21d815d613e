"""A trained model in Python.

    import pcgjax
    model = pcgjax.load("runs/cnn")
    model.predict(samples, 4000).probability     # an array, and its rate in Hz
    model.predict("a.wav")                       # a file; a folder or a list gives a list
    model.embed(samples, 4000)                   # what the last unit is given, (D,)
    pcgjax.load("runs/segmenter").states("a.wav").spans

The first call of a kind (one recording or several, of about this length) compiles; the next ones do not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pcgjax import systems
from pcgjax.data.corpus import Corpus, in_memory
from pcgjax.data.decode import decode, to_int16
from pcgjax.datasets import S1, Recording, Span, audio
from pcgjax.datasets.folder import audio_files
from pcgjax.datasets.sources import printable
from pcgjax.runs.judge import NO_CYCLE
from pcgjax.segmentation.states import state_spans
from pcgjax.tasks.segmenter_model import NOT_FINITE
from pcgjax.training.answers import bucketed_answers

Sound = Any  # (n,) samples, float in [-1, 1] or signed integers of any width; or a path


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a classifier says of one recording."""

    probability: float  # of the model's target; NaN where there is an error
    decision: bool  # whether it reaches the model's threshold
    path: str = ""  # of a file
    error: str = ""  # why there is no answer
    notes: tuple[str, ...] = ()  # on what was read with a doubt


@dataclasses.dataclass(frozen=True)
class States:
    """What a segmenter says of one recording."""

    spans: tuple[Span, ...]  # (start_s, end_s, state): 1 S1, 2 systole, 3 S2, 4 diastole; of a binary target 1
    heart_rate_bpm: float  # from the median time between two S1; NaN where there is none
    path: str = ""
    error: str = ""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Read:
    """One recording at the model's rate, or why there is none."""

    samples: np.ndarray  # (n,) int16
    path: str = ""
    error: str = ""
    notes: tuple[str, ...] = ()


class Model:
    """The best model of a training's folder. config: its ml_collections config; sample_rate_hz: that it was trained at;
    target: what its probability is of; threshold: of its decision."""

    def __init__(self, workdir: str | os.PathLike):
        self.workdir = pathlib.Path(workdir)
        self._loaded = systems.load(self.workdir)
        self.config, self.sample_rate_hz = self._loaded.config, self._loaded.sample_rate_hz
        self.target: str = self.config.task.get("frames" if self._loaded.segmenter else "target", "")
        self.threshold = float(self.config.evaluation.get("threshold", math.nan))

    def __repr__(self) -> str:
        return f"<pcgjax model {self.workdir}: {self.config.task.name}, {self.target}, {self.sample_rate_hz} Hz>"

    def predict(self, sound: Sound | Sequence[Sound], sample_rate_hz: int | None = None) -> Answer | list[Answer]:
        """The answer to one array or file; a list of answers to a list of them, or to a folder's files.

        sample_rate_hz: of arrays. Of a list or a folder, a file that cannot be used has an answer with `error`.
        Raises:
          ValueError: samples of another shape, type, range or rate; nothing but silence; too short; a single file that
            cannot be used (AudioError); a model that decides nothing about recordings.
        """
        answer = self._answer
        several, reads = self._read(sound, sample_rate_hz)
        log_p = self._of_good(reads, answer)
        why = NO_CYCLE if self.config.task.name == "classical" else NOT_FINITE
        answers = []
        for read, row in zip(reads, log_p, strict=True):
            error = read.error or ("" if row[0] < np.inf else why)  # NaN is not below, either
            probability = math.nan if error else float(np.exp(row[0]))
            answers.append(Answer(probability, probability >= self.threshold, read.path, error, read.notes))
        return answers if several else _only(answers)

    def embed(self, sound: Sound | Sequence[Sound], sample_rate_hz: int | None = None) -> np.ndarray:
        """(D,) float32, what the model's last unit is given, the mean over a recording's windows; (N, D) of several.

        Raises:
          ValueError: as `predict`, but of any file that cannot be used; a model of another kind.
        """
        embed = self._embedder
        several, reads = self._read(sound, sample_rate_hz)
        for read in reads:
            if read.error:
                raise audio.AudioError(f"{read.path}: {read.error}")
        values = self._of_good(reads, embed)
        return values if several else values[0]

    def states(self, sound: Sound | Sequence[Sound], sample_rate_hz: int | None = None) -> States | list[States]:
        """A segmenter's states of one recording, or of each of several. Arguments and errors: as `predict`."""
        model = self._loaded.segmenter
        if model is None:
            raise ValueError(f"{self.workdir}: a model of task {self.config.task.name!r} has no states; use predict")
        several, reads = self._read(sound, sample_rate_hz)
        good = (([read.samples / np.float32(32767)]) for read in reads if not read.error)
        scores = model.frame_scores(good)
        found = []
        for read in reads:
            spans: list[Span] = []
            error = read.error
            if not error:
                try:
                    seconds = len(read.samples) / self.sample_rate_hz
                    spans = state_spans(model.decide(next(scores)), model.step_s, seconds)
                except FloatingPointError as problem:
                    error = str(problem)
            onsets = [start for start, _, state in spans if state == S1]
            beats = self.target == "states" and len(onsets) > 1
            rate_bpm = 60 / float(np.median(np.diff(onsets))) if beats else math.nan
            found.append(States(tuple(spans), rate_bpm, read.path, error, read.notes))
        return found if several else _only(found)

    @functools.cached_property
    def _answer(self) -> Callable[[Corpus], np.ndarray]:
        if self._loaded.classifier is not None:
            return bucketed_answers(self._loaded.classifier)
        if self._loaded.answer is None:
            more = "; use states" if self._loaded.segmenter else ""
            raise ValueError(
                f"{self.workdir}: a model of task {self.config.task.name!r} decides nothing about a recording{more}"
            )
        return self._loaded.answer

    @functools.cached_property
    def _embedder(self) -> Callable[[Corpus], np.ndarray]:
        if self._loaded.classifier is None:
            raise ValueError(f"{self.workdir}: a model of task {self.config.task.name!r} has no embedding here")
        return bucketed_answers(self._loaded.classifier, embedding=True)

    def _of_good(self, reads: list[_Read], compute: Callable[[Corpus], np.ndarray]) -> np.ndarray:
        """(N, K) what `compute` says of the recordings that could be read, NaN of the others."""
        good = [i for i, read in enumerate(reads) if not read.error]
        if not good:
            return np.full((len(reads), 1), np.nan, np.float32)
        rows = [{"id": str(i), "labels": {}, "annotations": [], "database": "", "person": str(i)} for i in good]
        values = compute(in_memory(rows, [reads[i].samples for i in good], self.sample_rate_hz))
        out = np.full((len(reads), values.shape[1]), np.nan, np.float32)
        out[good] = values
        return out

    def _read(self, sound: Sound | Sequence[Sound], sample_rate_hz: int | None) -> tuple[bool, list[_Read]]:
        """(whether several were given, each as read)."""
        if isinstance(sound, str | os.PathLike):
            if not os.path.isdir(sound):
                return False, [self._of_file(sound)]
            paths = audio_files(pathlib.Path(sound), [])
            if not paths:
                raise ValueError(f"{printable(os.fspath(sound))}: no sound file in this folder")
            return True, [self._of_file(path) for path in paths]
        if not isinstance(sound, list | tuple):
            return False, [self._of_array(sound, sample_rate_hz, "the samples")]
        if sound and isinstance(sound[0], int | float):
            return False, [self._of_array(np.asarray(sound), sample_rate_hz, "the samples")]
        return True, [
            self._of_file(one)
            if isinstance(one, str | os.PathLike)
            else self._of_array(one, sample_rate_hz, f"recording {i} of the list")
            for i, one in enumerate(sound)
        ]

    def _of_file(self, path: str | os.PathLike) -> _Read:
        shown = printable(os.fspath(path))
        try:
            row, samples = decode(
                Recording(shown, shown, False, "", 0, {}, (), pathlib.Path(path)), self.sample_rate_hz
            )
        except audio.AudioError as error:
            return _Read(np.zeros(0, np.int16), shown, str(error))
        return _Read(samples, shown, "", tuple(row["notes"]))

    def _of_array(self, samples: Any, sample_rate_hz: int | None, name: str) -> _Read:
        samples = np.asarray(samples)
        if sample_rate_hz is None:
            raise ValueError("sample_rate_hz: give the rate of the samples in Hz")
        low, high = audio.RATES_HZ
        if sample_rate_hz != int(sample_rate_hz) or not low <= sample_rate_hz <= high:
            raise ValueError(f"sample_rate_hz={sample_rate_hz}: need a whole number from {low} to {high}")
        if samples.ndim != 1:
            raise ValueError(f"{name} have shape {samples.shape}, need (n,): choose one channel")
        if samples.dtype.kind not in "fi":
            raise ValueError(f"{name} are {samples.dtype}; need floats in [-1, 1] or signed integers")
        if len(samples) < audio.SHORTEST_S * sample_rate_hz:
            seconds = len(samples) / sample_rate_hz
            raise ValueError(f"{name} last {seconds:.3f} s, at least {audio.SHORTEST_S} s is needed")
        low_sample, high_sample = float(samples.min()), float(samples.max())
        if not math.isfinite(low_sample + high_sample):
            raise ValueError(f"{name} have values that are NaN or infinite")
        if low_sample == high_sample:
            raise ValueError(f"{name} are silent: all are {low_sample:g}")
        if samples.dtype.kind == "f" and max(high_sample, -low_sample) > 1:
            raise ValueError(
                f"{name} reach {max(high_sample, -low_sample):.3g}, floats must lie in [-1, 1]; divide by full "
                "scale, as 32768 for int16, or by the peak"
            )
        try:
            return _Read(to_int16(samples, int(sample_rate_hz), self.sample_rate_hz)[0])
        except audio.AudioError as error:
            raise ValueError(f"{name}: {error}") from None


def _only(answers: list) -> Any:
    """The answer to a single sound.

    Raises:
      AudioError: it has none.
    """
    if answers[0].error:
        raise audio.AudioError(f"{answers[0].path}: {answers[0].error}" if answers[0].path else answers[0].error)
    return answers[0]
