"""How well the picked sounds agree with annotations."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from pcgjax import datasets, metrics
from pcgjax.classical.features import find_sounds
from pcgjax.data.corpus import Corpus
from pcgjax.datasets import S1
from pcgjax.features import envelope
from pcgjax.segmentation.scores import TOLERANCES_MS, score_states, summarise
from pcgjax.segmentation.states import frame_states


def annotated_recordings(corpus: Corpus) -> list[int]:
    return [i for i, row in enumerate(corpus.rows) if row["annotations"]]


def picking(corpus: Corpus, config: ml_collections.ConfigDict, resamples: int = 0) -> dict[str, Any]:
    """The picked S1 and S2 beside the annotated ones, in the recordings that have any.

    Of annotated states: what `segmentation.summarise` says. Of marks without length, as PASCAL's set A has: F1 of S1
    and S2, and of sounds whichever they are, within 60 and 100 ms from the middle of the picked sound to the mark,
    between the first and the last mark.
    Raises:
      ValueError: no recording is annotated.
    """
    own = annotated_recordings(corpus)
    if not own:
        raise ValueError("no recording is annotated: S1 and S2 cannot be judged")
    part = corpus.subset(np.array(own))
    scores, persons, none, step_s = [], [], 0, 0.005
    marked: collections.Counter[tuple[str, int]] = collections.Counter()
    for row, (sounds, cycle, _), length in zip(
        part.rows, find_sounds(part, config.features, config.train.batch_recordings), part.lengths, strict=True
    ):
        none += not sounds
        spans = [tuple(span) for span in row["annotations"]]
        if any(start < end for start, end, _ in spans):
            frames = int(length / part.sample_rate_hz / step_s)
            truth = frame_states(spans, frames, step_s)
            found = frame_states(envelope.states(sounds, cycle), frames, step_s)
            scores.append(score_states(truth, found, step_s))
            persons.append(row["person"])
        else:
            marked.update(_mark_counts(spans, sounds))
    result: dict[str, Any] = {"recordings": len(own), "no_cycle_found": none}
    if scores:
        result["annotated"] = summarise(scores, persons, resamples)
    if marked:
        result["marks"] = {
            f"{what}_f1_{ms}ms": 2 * marked[what, ms] / (marked["called", ms] + marked["true", ms])
            for what in ("sound", "S1_S2") for ms in TOLERANCES_MS
        }  # fmt: skip
    return metrics.json_ready(result)


def _mark_counts(marks: Sequence[tuple], sounds: Sequence[envelope.Span]) -> dict[tuple[str, int], int]:
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    middles = [((start + end) / 2, sound) for start, end, sound in sounds]
    for ms in TOLERANCES_MS:
        near, true = ms / 1000, [(start, sound) for start, _, sound in marks]
        called = [m for m in middles if true[0][0] - near <= m[0] <= true[-1][0] + near]
        counts["true", ms], counts["called", ms] = len(true), len(called)
        for what, kinds in (("sound", [None]), ("S1_S2", [S1, datasets.S2])):
            for kind in kinds:
                a, b = ([t for t, sound in of if kind in (None, sound)] for of in (true, called))
                counts[what, ms] += _pairs(a, b, near)
    return counts


def _pairs(a: Sequence[float], b: Sequence[float], near: float) -> int:
    i = j = pairs = 0
    while i < len(a) and j < len(b):
        if abs(a[i] - b[j]) <= near:
            pairs, i, j = pairs + 1, i + 1, j + 1
        elif b[j] < a[i]:
            j += 1
        else:
            i += 1
    return pairs
