"""An audio LLM asked about another data set's recordings, without training on it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import logging

from pcgjax import datasets, metrics
from pcgjax.audio_llm import batches
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm.conclude import Candidate, ask, murmur_alone, prediction_row, windows_of
from pcgjax.audio_llm.judge import STATUS, class_log_p
from pcgjax.data.corpus import Corpus, in_rows
from pcgjax.data.decode import decode, decode_all


class Unheard(NamedTuple):
    """A data set that was not trained on."""

    corpus: Corpus
    left_out: int  # recordings without a label, or that cannot be decoded


def load_unheard(dataset: str, folder: str | pathlib.Path) -> Unheard:
    """The recordings of `folder` that have the label `abnormal`, at 16 kHz, decoded again whenever one is read.

    PASCAL's artifacts have none; its murmurs, extra sounds and extrasystoles are abnormal. In memory CinC 2016 would
    take 2.3 GB at this rate.

    Raises:
      DatasetError: as `datasets.load`, or nothing labelled can be decoded.
    """
    recordings, problems = datasets.load(dataset, folder)
    labelled = [recording for recording in recordings if recording.labels.get("abnormal") in ("0", "1")]
    decodable, rows = [], []
    for recording, row, _, reason in decode_all(labelled, llm.RATE_HZ, None, "decode"):
        if row is None:
            problems.append(datasets.Problem(str(recording.path), str(reason)))
        else:
            decodable.append(recording)
            rows.append(row)
    if not rows:
        raise datasets.DatasetError(f"{folder}: none of {len(recordings)} recordings has a label and can be decoded")
    for problem in (problem for problem in problems if not problem.note):
        logging.warning("left out: %s: %s", problem.path, problem.reason)
    lengths = np.array([row["num_samples"] for row in rows], np.int32)

    def read(index: int) -> np.ndarray:
        return decode(decodable[index], llm.RATE_HZ)[1]

    return Unheard(Corpus(rows, llm.RATE_HZ, lengths, read), len(recordings) - len(rows))


def unheard_source(
    unheard: Unheard, front_end: ml_collections.ConfigDict, segments: str | pathlib.Path | None
) -> batches.Source:
    """Its audio behind a run's front end; `segments` holds a .tsv named after each audio file.

    Raises:
      ValueError: as `batches.make_source`.
    """
    changed = front_end.copy_and_resolve_references()
    changed.segments = str(segments or "")
    corpus, rows = unheard.corpus, unheard.corpus.rows
    if changed.kind != "none":  # PASCAL's ids are not its files' names
        rows = [{**row, "id": pathlib.Path(row["path"]).stem} for row in rows]
    return batches.make_source(in_rows(corpus, rows), changed)


def zero_shot(
    candidate: Candidate, source: batches.Source, left_out: int, dataset: str
) -> tuple[dict[str, Any], list[dict]]:
    """({database, or the data set for all of them: scores}, rows of predictions.csv) of normal against abnormal.

    The model is asked the murmur question; Present or Unknown as the likeliest of its three classes means abnormal.
    Scores: {each of `pages.audio_llm.ZERO_SHOT_SCORES`: S, the precisions those of the answers normal and abnormal,
    mean_accuracy the mean of sensitivity and specificity; "majority_accuracy": of the commoner class; "recordings",
    "people", "positives"}; that of the whole also "left_out" and "windows". Intervals are over people.
    """
    rows = source.corpus.rows
    labels = np.array([row["labels"]["abnormal"] == "1" for row in rows])
    # A murmur stands in for abnormal, so that the question has an answer.
    with_status = [
        {**row, "labels": {"murmur_status": "Present" if label else "Absent"}}
        for row, label in zip(rows, labels, strict=True)
    ]
    questioned = batches.Source(
        in_rows(source.corpus, with_status), source.kind, source.segments, source.attenuation_db
    )
    clips = batches.evaluation_clips(
        murmur_alone(candidate.config), questioned, batches.lengths_heard(source), np.arange(len(rows)), llm.CLIP_S
    )
    answers = ask(candidate, source, clips, dataset)
    log_p = np.array([class_log_p(answer) for answer in answers])
    murmur, none = log_p[:, :2].max(1), log_p[:, STATUS.index("Absent")]
    abnormal = 1 / (1 + np.exp(none - murmur))  # 0.5 where the two are equally likely
    scores = _scores(candidate, rows, labels, abnormal, dataset)
    scores[dataset] |= {"left_out": left_out, "windows": windows_of(clips, source)}
    table = []
    for answer, label, called in zip(answers, labels, abnormal >= 0.5, strict=True):
        words = {name: "abnormal" if is_so else "normal" for name, is_so in (("right", label), ("answered", called))}
        table.append(prediction_row(candidate.name, dataset, answer) | words)
    return scores, table


def _scores(
    candidate: Candidate, rows: Sequence[Mapping[str, Any]], labels: np.ndarray, abnormal: np.ndarray, dataset: str
) -> dict[str, dict[str, Any]]:
    """{the data set, or one of its databases: its scores}.

    Args: labels: (N,) bool, whether a recording is abnormal; abnormal: (N,) the probability that was given to it.
    """
    persons, databases = ([row[name] for row in rows] for name in ("person", "database"))
    resamples, seed = candidate.config.evaluation.resamples, candidate.config.seed

    def judge_as(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, Any]:
        return metrics.judge(labels, probabilities, persons, databases, databases, threshold, resamples, seed)

    judged = judge_as(labels, abnormal, 0.5)
    # The other way round, so that no recording is called both where they are equal.
    mirrored = judge_as(~labels, 1 - abnormal, float(np.nextafter(0.5, 1)))

    def selected(one: dict, other: dict, counts: dict) -> dict[str, Any]:
        share = counts["positives"] / counts["recordings"]
        return {
            "accuracy": one["accuracy"],
            "precision_normal": other["precision"],
            "precision_abnormal": one["precision"],
            "mean_accuracy": one["mean_accuracy"],
            "auc": one["auc"],
            "majority_accuracy": max(share, 1 - share),
            **counts,
        }

    counts = {"recordings": len(rows), "people": judged["people"], "positives": int(labels.sum())}
    scores = {dataset: selected(judged["overall"], mirrored["overall"], counts)}
    for database, one in judged["per_database"].items():
        counts = {name: one[name] for name in ("recordings", "people", "positives")}
        scores[database] = selected(one, mirrored["per_database"][database], counts)
    return scores
