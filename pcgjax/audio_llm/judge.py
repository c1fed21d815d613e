"""Scores of an audio LLM's answers: by task, beside the majority; by patient, as the Challenge has it; over people."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pcgjax import metrics
from pcgjax.audio_llm import questions as mc
from pcgjax.audio_llm.batches import Answer

STATUS = mc.TASKS["murmur"].classes  # Present, Unknown, Absent: the order of the official formula


class Patient(NamedTuple):
    """Of whom a recording is. A person whom CirCor's `Additional ID` links is two patients, often with two states."""

    id: str
    person: str
    database: str
    murmur: str  # Present, Unknown or Absent
    abnormal: bool | None  # the outcome; None where the data set does not say


def patients_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Patient]:
    """The patient of each recording that has murmur_status, by the recording's id, which in CirCor begins with his."""
    return {
        row["id"]: Patient(
            row["id"].split("_")[0], row["person"], row["database"], row["labels"]["murmur_status"],
            {"1": True, "0": False}.get(row["labels"].get("abnormal", "")),
        )
        for row in rows if "murmur_status" in row["labels"]
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- all scores


def judge(
    answers: Sequence[Answer],
    trivial: Mapping[str, Mapping[str, Any]],
    patients: Mapping[str, Patient],
    resamples: int,
    seed: int,
    elsewhere: Sequence[Answer] = (),
) -> dict[str, Any]:
    """Accuracies and the official scores with 95 % intervals over people (`metrics.draw_people`).

    Args:
      trivial: of `questions.trivial`; where its majority is None the test questions' own commonest class stands in.
      patients: of `patients_of`, for every recording asked about.
      elsewhere: answers to the murmur question at sites where `answers` does not ask it. They count for patients only:
        as in the Challenge a patient is judged by all recordings, for which to hear would else depend on the label.

    Returns a JSON-ready dict, undefined numbers None, S = {"value", "low", "high"}:
      tasks      {task: {"accuracy": S, "excess": S, over the majority's accuracy on the same questions, "majority",
                 "majority_from" train or test, "majority_accuracy", "test_majority_accuracy", "once_only_accuracy",
                 "questions", "recordings", "people", "classes", "informative"}}
      mean       the plain mean over the tasks with more than one class: {"accuracy": S, "excess": S,
                 "majority_accuracy", "tasks"}
      letters    {"share": mean probability on the six letters together, "answered": {letter: questions}, "right"}
      patients   `patient_scores`, or None where the murmur is not asked for
      asked      {"people", "questions"}: digests, by which runs can be told to have been judged on the same
      questions, recordings, people, intervals

    Raises:
      ValueError: no answers.
    """
    if not answers:
        raise ValueError("no question to judge: none of the recordings has an answer to config.questions.tasks")
    tasks, draws = task_scores(answers, trivial, patients, resamples, seed)
    questions = [answer.question for answer in answers]
    log_p = np.array([answer.log_p for answer in answers])
    murmur = [answer for answer in (*answers, *elsewhere) if answer.question.task == "murmur"]
    every = [answer.question for answer in (*answers, *elsewhere)]
    return metrics.json_ready(
        {
            "tasks": tasks,
            "mean": _mean(tasks, draws),
            "letters": {
                "share": float(np.exp(log_p).sum(1).mean()),
                "answered": _letter_counts(log_p.argmax(1).tolist()),
                "right": _letter_counts([question.answer for question in questions]),
            },
            "patients": patient_scores(murmur, patients, resamples, seed) if murmur else None,
            "asked": {
                "people": _digest(f"{who.database} {who.person}" for who in (patients[one.recording] for one in every)),
                "questions": _digest(f"{one.id} {one.text} {one.answer}" for one in every),
            },
            "questions": len(answers),
            "recordings": len({question.recording for question in questions}),
            "people": len({question.person for question in questions}),
            "intervals": {"level": metrics.LEVEL, "resamples": resamples, "seed": seed,
                          "unit": "people, stratified by database"},
        }
    )  # fmt: skip


def task_scores(
    answers: Sequence[Answer],
    trivial: Mapping[str, Mapping[str, Any]],
    patients: Mapping[str, Patient],
    resamples: int,
    seed: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """({task: its scores, as `judge` returns them}, {task: (2, resamples) its accuracy and excess when people are drawn
    anew, NaN of one person}). Arguments as of `judge`."""
    questions = [answer.question for answer in answers]
    right = np.array([answer.log_p for answer in answers]).argmax(1) == [question.answer for question in questions]
    truth = np.array([question.options[question.answer] for question in questions])
    task_of = np.array([question.task for question in questions])
    persons = np.array([question.person for question in questions])
    recordings = np.array([question.recording for question in questions])
    weights = metrics.draw_people(persons, [patients[name].database for name in recordings], resamples, seed)
    tasks: dict[str, dict[str, Any]] = {}
    draws: dict[str, np.ndarray] = {}
    for task in (name for name in mc.TASKS if name in task_of):
        chosen = task_of == task
        baseline = trivial[task]
        majority = baseline["majority"] or collections.Counter(truth[chosen].tolist()).most_common(1)[0][0]
        values = np.stack([right[chosen], right[chosen] * 1.0 - (truth[chosen] == majority)])
        people = len(set(persons[chosen]))
        drawn = metrics.ratio(values @ weights[:, chosen].T, weights[:, chosen].sum(1))
        # One person drawn again and again would give an interval of no width: no interval then.
        draws[task] = drawn if people > 1 else np.full_like(drawn, np.nan)
        tasks[task] = {
            "accuracy": metrics.with_interval(values[0].mean(), draws[task][0]),
            "excess": metrics.with_interval(values[1].mean(), draws[task][1]),
            "majority": majority,
            "majority_from": "train" if baseline["majority"] else "test",
            "majority_accuracy": float((truth[chosen] == majority).mean()),
            **{
                name: baseline[name]
                for name in ("test_majority_accuracy", "once_only_accuracy", "classes", "informative")
            },
            "questions": int(chosen.sum()),
            "recordings": len(set(recordings[chosen])),
            "people": people,
        }
    return tasks, draws


def _mean(tasks: Mapping[str, Mapping[str, Any]], draws: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Over the tasks with more than one class, of `task_scores`."""
    informative = [task for task, scores in tasks.items() if scores["informative"]]
    mean: dict[str, Any] = {"tasks": informative, "accuracy": None, "excess": None, "majority_accuracy": None}
    if informative:
        drawn = np.mean([draws[task] for task in informative], 0)
        for i, name in enumerate(("accuracy", "excess")):
            mean[name] = metrics.with_interval(np.mean([tasks[t][name]["value"] for t in informative]), drawn[i])
        mean["majority_accuracy"] = float(np.mean([tasks[task]["majority_accuracy"] for task in informative]))
    return mean


def _letter_counts(indices: Sequence[int]) -> dict[str, int]:
    return {letter: int(np.sum(np.array(indices) == i)) for i, letter in enumerate(mc.LETTERS)}


def _digest(words: Iterable[str]) -> str:
    """Of a set of words, whatever their order."""
    return hashlib.sha256("\n".join(sorted(set(words))).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ patients


def class_log_p(answer: Answer) -> np.ndarray:
    """(classes,) log-probability of each of the task's classes, summed over the letters that offer it."""
    options, log_p = np.array(answer.question.options), np.array(answer.log_p)
    return np.array([np.logaddexp.reduce(log_p[options == word]) for word in mc.TASKS[answer.question.task].classes])


def patient_scores(
    answers: Sequence[Answer], patients: Mapping[str, Patient], resamples: int, seed: int
) -> dict[str, Any]:
    """The Challenge's two scores of 2022, from answers to the murmur question.

    A patient's murmur is the class with the largest mean log-probability over the questions on that patient's
    recordings. The model is not asked for the outcome: Absent counts as Normal, Present and Unknown as Abnormal.

    Returns: {"patients", "weighted_accuracy": S, "excess": S, over always Present on the same patients,
      "trivial_weighted_accuracy": {"always Present", "always Absent"},
      "cost": S, of the "cost_patients" whose outcome is known, else None; "trivial_cost": of the same two answers;
      "called": {murmur: {murmur called: patients}}}. Intervals are over people, stratified by database.
    """
    by_patient = collections.defaultdict(list)
    for answer in answers:
        by_patient[patients[answer.question.recording]].append(class_log_p(answer))
    who = list(by_patient)
    called = np.eye(3, dtype=int)[[np.mean(by_patient[one], 0).argmax() for one in who]]
    truth = np.eye(3, dtype=int)[[STATUS.index(one.murmur) for one in who]]
    present, absent = (
        np.tile(np.eye(3, dtype=int)[STATUS.index(word)], (len(who), 1)) for word in ("Present", "Absent")
    )
    people = len({(one.database, one.person) for one in who})
    times = metrics.draw_people(
        [one.person for one in who], [one.database for one in who], resamples if people > 1 else 0, seed
    )
    draws = [np.repeat(np.arange(len(who)), row.astype(int)) for row in times]
    everyone = np.arange(len(who))
    accuracy = metrics.weighted_murmur_accuracy

    def excess(of: np.ndarray) -> float:
        return accuracy(truth[of], called[of]) - accuracy(truth[of], present[of])

    def cost(calls: np.ndarray, of: np.ndarray) -> float:
        of = of[np.array([who[i].abnormal is not None for i in of], bool)]
        abnormal = np.array([who[i].abnormal for i in of], bool)
        referred = calls[of, STATUS.index("Absent")] == 0
        return metrics.challenge_cost(*(np.stack([x, ~x], 1).reshape(-1, 2) for x in (abnormal, referred)))

    outcomes = sum(one.abnormal is not None for one in who)
    costs = metrics.with_interval(cost(called, everyone), [cost(called, of) for of in draws]) if outcomes else None
    return {
        "patients": len(who),
        "weighted_accuracy": metrics.with_interval(
            accuracy(truth, called), [accuracy(truth[of], called[of]) for of in draws]
        ),
        "excess": metrics.with_interval(excess(everyone), [excess(of) for of in draws]),
        "trivial_weighted_accuracy": {
            "always Present": accuracy(truth, present),
            "always Absent": accuracy(truth, absent),
        },
        "cost_patients": outcomes,
        "cost": costs,
        "trivial_cost": {
            "always Present": cost(present, everyone),
            "always Absent": cost(absent, everyone),
        },
        "called": {
            word: dict(zip(STATUS, called[truth[:, i] == 1].sum(0).tolist(), strict=True))
            for i, word in enumerate(STATUS)
        },
    }
