"""A trained segmenter on whole recordings: windows stitched together, states decoded and judged.

Axes: T frames, K scores a frame.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from flax import nnx

from pcgjax import metrics
from pcgjax.data.corpus import Corpus
from pcgjax.runtime import sharding
from pcgjax.segmentation import decoding
from pcgjax.segmentation.decoding import viterbi
from pcgjax.segmentation.scores import best_median_worst, score_binary, score_rates, score_states, summarise
from pcgjax.segmentation.states import frame_states, state_spans, target_frames, threshold_spans
from pcgjax.tasks.frames import frame_features, frame_hop

MARGIN_S = 0.5  # at either end of a window, where a neighbour knows better
_WINDOWS = 8  # through the model at a time
NOT_FINITE = "the model's answer is not finite"
Pieces = Iterable[np.ndarray]  # a recording's samples, in order


class SegmenterModel:
    """A trained segmenter as one compiled function, and what decodes its scores."""

    def __init__(self, config: ml_collections.ConfigDict, graphdef: Any, params: Any, rest: Any, sample_rate_hz: int,
                 log_duration_KxSxD: np.ndarray):  # fmt: skip
        self.config, self.sample_rate_hz, self.log_duration_KxSxD = config, sample_rate_hz, log_duration_KxSxD
        self.step_s = config.features.step_s
        self.hop, self.halo = frame_hop(config, sample_rate_hz)
        self.frames = round(config.features.window_s * sample_rate_hz) // self.hop
        self.bidirectional = config.model.bidirectional

        def scores(logits: jax.Array) -> jax.Array:
            return jax.nn.log_softmax(logits) if config.task.frames == "states" else jax.nn.sigmoid(logits)

        # The parameters are arguments, as constants would be compiled into the program, and it anew for each model.
        @functools.partial(jax.jit, compiler_options=sharding.compiler_options())
        def whole(params: Any, rest: Any, samples_BxS: jax.Array, real_BxT: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, params, rest)
            x, _ = frame_features(config, samples_BxS, real_BxT, sample_rate_hz)
            return scores(model(x))

        @functools.partial(jax.jit, compiler_options=sharding.compiler_options())
        def piece(
            params: Any, rest: Any, samples_BxS: jax.Array, real_BxT: jax.Array, state: Any
        ) -> tuple[jax.Array, Any]:
            model, (level, carried) = nnx.merge(graphdef, params, rest), state
            x, level = frame_features(config, samples_BxS, real_BxT, sample_rate_hz, level)
            logits, carried = model.stream(x, carried)
            return scores(logits), (level, carried)

        self.whole, self.piece = (functools.partial(f, params, rest) for f in (whole, piece))
        if not self.bidirectional:
            self.start = ((jnp.zeros(1), jnp.zeros(1)), nnx.merge(graphdef, params, rest).initial_state(1))

    def frame_scores(self, recordings: Iterable[Pieces]) -> Iterator[np.ndarray]:
        """(T, K) of each recording: log-probabilities of the four states, or the probability of a binary target.

        In memory at a time: a few windows. Windows of several recordings go through the model together.
        """
        if not self.bidirectional:
            yield from map(self._stream, recordings)
            return
        waiting: list[tuple[np.ndarray, int, slice, bool]] = []
        done: list[np.ndarray] = []
        for recording in recordings:
            for window in self._windows(recording):
                waiting.append(window)
                if len(waiting) == _WINDOWS:
                    yield from self._answer(waiting, done)
                    waiting = []
        if waiting:
            yield from self._answer(waiting, done)

    def _answer(self, windows: list, done: list[np.ndarray]) -> Iterator[np.ndarray]:
        """The recordings that these windows complete; `done` holds the frames of the one that goes on."""
        samples = np.zeros((_WINDOWS, len(windows[0][0])), np.float32)
        real = np.zeros((_WINDOWS, self.frames), bool)
        for i, (x, frames, _, _) in enumerate(windows):
            samples[i], real[i, :frames] = x, True
        answers = np.asarray(self.whole(samples, real))
        for answer, (_, _, kept, last) in zip(answers, windows, strict=False):
            done.append(answer[kept])
            if last:
                yield np.concatenate(done)
                done.clear()

    def _windows(self, pieces: Pieces) -> Iterator[tuple[np.ndarray, int, slice, bool]]:
        """(samples with their halo, real frames, which frames to keep, the last one?) of a recording.

        Neighbours overlap by two margins; the last window ends with the recording.
        """
        size, margin = self.frames, min(round(MARGIN_S / self.step_s), self.frames // 4)
        kept_to = first = 0  # frames
        buffer = _Buffer(pieces, self.hop, self.halo)
        while True:
            end = buffer.frames_until(first + size + 1)
            if end > first + size:
                stop = first + size - margin
                yield buffer.take(first, size), size, slice(kept_to - first, stop - first), False
                kept_to, first = stop, stop - margin
                buffer.forget(first - size)  # the last window may begin as much earlier
            else:
                first = max(end - size, 0)
                yield buffer.take(first, size), end - first, slice(kept_to - first, end - first), True
                return

    def _stream(self, pieces: Pieces) -> np.ndarray:
        """A causal model's scores, by carrying its state from one piece to the next."""
        state, done, first = self.start, [], 0
        buffer = _Buffer(pieces, self.hop, self.halo)
        while True:
            end = min(buffer.frames_until(first + self.frames), first + self.frames)
            real = (np.arange(self.frames) < end - first)[None]
            answer, state = self.piece(buffer.take(first, self.frames)[None], real, state)
            done.append(np.asarray(answer)[0, : end - first])
            if end < first + self.frames:
                return np.concatenate(done)
            first = end
            buffer.forget(first)

    def decide(self, scores_TxK: np.ndarray) -> np.ndarray:
        """States (T,) from `frame_scores`: for a binary target 1 where it holds, else 0.

        Raises:
          FloatingPointError: a score is NaN.
        """
        if np.isnan(scores_TxK).any():
            raise FloatingPointError(NOT_FINITE)
        if self.config.task.frames == "states":
            return viterbi(scores_TxK, self.log_duration_KxSxD)
        e, out = self.config.evaluation, np.zeros(len(scores_TxK), np.int8)
        spans = threshold_spans(scores_TxK[:, 0], e.threshold, e.shortest_on_s, e.shortest_off_s, self.step_s)
        for start_s, end_s in spans:
            out[round(start_s / self.step_s) : round(end_s / self.step_s)] = 1
        return out


class _Buffer:
    """The samples of a recording that are still needed, counted in frames of `hop` with `halo` samples around."""

    def __init__(self, pieces: Pieces, hop: int, halo: int):
        self._pieces, self._hop, self._halo = iter(pieces), hop, halo
        self._samples, self._begin = np.zeros(halo, np.float32), -halo  # zeros before the first
        self._end = 0  # of what was read, in samples
        self._over = False

    def frames_until(self, frame: int) -> int:
        """How many frames there are, looking no further than `frame`. A frame counts when its middle is there."""
        while not self._over and self._end < frame * self._hop + self._halo:
            piece = next(self._pieces, None)
            if piece is None:
                self._over = True
            else:
                self._samples = np.concatenate([self._samples, np.asarray(piece, np.float32)])
                self._end += len(piece)
        return min((self._end + self._hop - self._hop // 2 - 1) // self._hop, frame)

    def take(self, first: int, frames: int) -> np.ndarray:
        """The samples of frames [first, first + frames) and their halo, zeros beyond the recording."""
        start = first * self._hop - self._halo - self._begin
        samples = self._samples[start : start + frames * self._hop + 2 * self._halo]
        return np.concatenate([samples, np.zeros(frames * self._hop + 2 * self._halo - len(samples), np.float32)])

    def forget(self, frame: int) -> None:
        """Lets go of what lies before `frame`'s halo."""
        unused = max(frame, 0) * self._hop - self._halo - self._begin
        if unused > 0:
            self._samples, self._begin = self._samples[unused:], self._begin + unused


FIELDS = ("id", "person", "database", "split", "path", "seconds")


def judge_segmentation(
    model: SegmenterModel, corpus: Corpus, indices: np.ndarray, split: str
) -> tuple[dict, list[dict], list[dict]]:
    """Decides on the recordings `indices`, which have annotations.

    Returns: (scores: of all and per database, ours and the trivial answer's, each as `segmentation.summarise` gives;
      rows of predictions.csv; examples for the report: the best, the median and the worst recording).
    """
    config, step_s, target = model.config, model.step_s, model.config.task.frames
    of_states = target == "states"
    ours, trivial, rows, decided = [], [], [], []
    scores = model.frame_scores([corpus.read(i) / np.float32(32767)] for i in indices)
    progress = tqdm.tqdm(zip(indices, scores, strict=True), desc=f"decode {split}", total=len(indices), mininterval=1.0)
    for i, scores_TxK in progress:
        row = corpus.rows[i]
        try:
            truth, states = frame_states(row["annotations"], len(scores_TxK), step_s), model.decide(scores_TxK)
        except FloatingPointError as error:
            raise FloatingPointError(f"recording {row['id']}: {error}") from None
        if of_states:
            ours.append(score_states(truth, states, step_s))
            metronome = decoding.metronome(truth, step_s, model.log_duration_KxSxD)
            trivial.append(score_states(truth, metronome, step_s))
        else:
            wanted = target_frames(truth, target)
            ours.append(score_binary(wanted, states))
            trivial.append(score_binary(wanted, np.ones_like(states)))
        decided.append((truth, states))
        shown = {name: "" if np.isnan(value) else f"{value:.6g}" for name, value in score_rates(ours[-1]).items()}
        facts = {"split": split, "seconds": round(float(corpus.lengths[i]) / corpus.sample_rate_hz, 3)}
        rows.append({name: row.get(name, facts.get(name)) for name in FIELDS} | shown)

    databases = [corpus.rows[i]["database"] for i in indices]
    e = config.evaluation

    def summed(of: list[int]) -> dict:
        people, strata = [corpus.rows[indices[j]]["person"] for j in of], [databases[j] for j in of]
        return {
            "recordings": len(of),
            "people": len(set(people)),
            **{
                name: summarise([sums[j] for j in of], people, e.resamples, config.seed, strata)
                for name, sums in (("test", ours), ("metronome" if of_states else "always", trivial))
            },
        }

    results = summed(list(range(len(indices))))
    results["intervals"] = {
        "level": metrics.LEVEL, "resamples": e.resamples, "seed": config.seed, "unit": "people, stratified by database"
    }  # fmt: skip
    results["per_database"] = {
        name: summed([j for j, database in enumerate(databases) if database == name]) for name in sorted(set(databases))
    }
    examples = [
        {
            "id": rows[j]["id"],
            "samples": corpus.read(indices[j]).astype(np.float32) / 32767,
            "sample_rate_hz": corpus.sample_rate_hz,
            "truth": state_spans(decided[j][0], step_s),
            "predicted": state_spans(decided[j][1], step_s),
            "score": score_rates(ours[j]),
        }
        for j in (best_median_worst(ours) if of_states else ())
    ]
    return results, rows, examples
