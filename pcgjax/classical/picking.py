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
    """The recordings that have annotated sounds, states or marks."""
    return [i for i, row in enumerate(corpus.rows) if row["annotations"]]


def picking_by_database(corpus: Corpus) -> list[str]:
    """A line for each database that has annotated recordings: how well the published settings find S1 and S2."""
    f = {"high_hz": 100.0, "filter_order": 4, "window_s": 0.02, "hop_s": 0.01, "threshold": float("inf")}
    config = ml_collections.ConfigDict({"features": f, "train": {"batch_recordings": 16}})
    keys = ("onset_f1_60ms", "onset_f1_100ms", "onset_recall_60ms", "onset_precision_60ms", "frame_accuracy")
    annotated = annotated_recordings(corpus)
    lines = []
    for database in sorted({corpus.rows[i]["database"] for i in annotated}):
        of_database = [i for i in annotated if corpus.rows[i]["database"] == database]
        result = picking(corpus.subset(np.array(of_database)), config)
        marks = result.get("marks", {})
        scores = {**marks, **{k: v["value"] for k, v in result.get("annotated", {}).items()}}
        values = ", ".join(f"{k} {v:.3f}" for k, v in scores.items() if k in (*keys, *marks))
        lines.append(
            f"{database}: {result['recordings']} recordings, {result['no_cycle_found']} without a cycle; {values}"
        )
    return lines


def picking(corpus: Corpus, config: ml_collections.ConfigDict, resamples: int = 0) -> dict[str, Any]:
    """The picked S1 and S2 beside the annotated ones, in the recordings that have any.

    Of annotated states: what `segmentation.scores.summarise` returns. Of marks without length, as PASCAL's set A has:
    F1 of S1 and S2, and of sounds whichever they are, within 60 and 100 ms from the middle of the picked sound to the
    mark, between the first and the last mark.
    Raises:
      ValueError: no recording is annotated.
    """
    annotated = annotated_recordings(corpus)
    if not annotated:
        raise ValueError("no recording is annotated: S1 and S2 cannot be judged")
    part = corpus.subset(np.array(annotated))
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
            picked = frame_states(envelope.states(sounds, cycle), frames, step_s)
            scores.append(score_states(truth, picked, step_s))
            persons.append(row["person"])
        else:
            marked.update(_mark_counts(spans, sounds))
    result: dict[str, Any] = {"recordings": len(annotated), "no_cycle_found": none}
    if scores:
        result["annotated"] = summarise(scores, persons, resamples)
    if marked:
        result["marks"] = {
            f"{what}_f1_{ms}ms": 2 * marked[what, ms] / (marked["called", ms] + marked["true", ms])
            for what in ("sound", "S1_S2") for ms in TOLERANCES_MS
        }  # fmt: skip
    return metrics.json_ready(result)


def _mark_counts(marks: Sequence[tuple], sounds: Sequence[envelope.Span]) -> dict[tuple[str, int], int]:
    """{(sound or S1_S2, ms): pairs; (true, ms), (called, ms): sounds} of one recording's marks and picked sounds."""
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    middles = [((start + end) / 2, sound) for start, end, sound in sounds]
    for ms in TOLERANCES_MS:
        near, true = ms / 1000, [(start, sound) for start, _, sound in marks]
        called = [m for m in middles if true[0][0] - near <= m[0] <= true[-1][0] + near]
        counts["true", ms], counts["called", ms] = len(true), len(called)
        for what, kinds in (("sound", [None]), ("S1_S2", [S1, datasets.S2])):
            for kind in kinds:
                a, b = ([t for t, sound in times if kind in (None, sound)] for times in (true, called))
                counts[what, ms] += _pairs(a, b, near)
    return counts


def _pairs(a: Sequence[float], b: Sequence[float], near: float) -> int:
    """How many of two sorted lists of times are within `near` of each other, each used once."""
    i = j = pairs = 0
    while i < len(a) and j < len(b):
        if abs(a[i] - b[j]) <= near:
            pairs, i, j = pairs + 1, i + 1, j + 1
        elif b[j] < a[i]:
            j += 1
        else:
            i += 1
    return pairs
