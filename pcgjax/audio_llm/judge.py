"""Judges an audio LLM: answers, scores by patient, baselines, and what it writes."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import torch

from pcgjax import metrics
from pcgjax.audio_llm import batches, tables
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm import questions as mc
from pcgjax.runs.streams import EVALUATION
from pcgjax.runtime import files

STATUS = mc.TASKS["murmur"].classes  # Present, Unknown, Absent: the order of the official formula
PREDICTION_FIELDS = (
    "run", "part", "id", "recording", "person", "task", "right", "answered",
    *(f"log_p_{letter}" for letter in mc.LETTERS), "share_on_letters", "windows",
)  # fmt: skip
_GENERATED = 64  # questions that are put to `generate` too


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


def judge(
    answers: Sequence[batches.Answer],
    trivial: Mapping[str, Mapping[str, Any]],
    patients: Mapping[str, Patient],
    resamples: int,
    seed: int,
    elsewhere: Sequence[batches.Answer] = (),
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
    asked = [answer.question for answer in answers]
    log_p = np.array([answer.log_p for answer in answers])
    chosen = log_p.argmax(1)
    right = chosen == [one.answer for one in asked]
    truth = np.array([one.options[one.answer] for one in asked])
    task_of = np.array([one.task for one in asked])
    persons = np.array([one.person for one in asked])
    recordings = np.array([one.recording for one in asked])
    weights = metrics.draw_people(persons, [patients[name].database for name in recordings], resamples, seed)

    tasks: dict[str, Any] = {}
    draws: dict[str, np.ndarray] = {}  # (2, resamples) of accuracy and excess
    for task in (name for name in mc.TASKS if name in task_of):
        own = task_of == task
        told = trivial[task]
        majority = told["majority"] or collections.Counter(truth[own].tolist()).most_common(1)[0][0]
        values = np.stack([right[own], right[own] * 1.0 - (truth[own] == majority)])
        people = len(set(persons[own]))
        drawn = metrics.ratio(values @ weights[:, own].T, weights[:, own].sum(1))
        # One person drawn again and again would give an interval of no width: no interval then.
        draws[task] = drawn if people > 1 else np.full_like(drawn, np.nan)
        tasks[task] = {
            "accuracy": metrics.with_interval(values[0].mean(), draws[task][0]),
            "excess": metrics.with_interval(values[1].mean(), draws[task][1]),
            "majority": majority,
            "majority_from": "train" if told["majority"] else "test",
            "majority_accuracy": float((truth[own] == majority).mean()),
            **{name: told[name] for name in ("test_majority_accuracy", "once_only_accuracy", "classes", "informative")},
            "questions": int(own.sum()),
            "recordings": len(set(recordings[own])),
            "people": people,
        }
    informative = [task for task, scores in tasks.items() if scores["informative"]]
    mean: dict[str, Any] = {"tasks": informative, "accuracy": None, "excess": None, "majority_accuracy": None}
    if informative:
        drawn = np.mean([draws[task] for task in informative], 0)
        for i, name in enumerate(("accuracy", "excess")):
            mean[name] = metrics.with_interval(np.mean([tasks[t][name]["value"] for t in informative]), drawn[i])
        mean["majority_accuracy"] = float(np.mean([tasks[task]["majority_accuracy"] for task in informative]))

    def letters(indices: Sequence[int]) -> dict[str, int]:
        return {letter: int(np.sum(np.array(indices) == i)) for i, letter in enumerate(mc.LETTERS)}

    murmur = [answer for answer in (*answers, *elsewhere) if answer.question.task == "murmur"]
    every = [answer.question for answer in (*answers, *elsewhere)]
    return metrics.json_ready(
        {
            "tasks": tasks,
            "mean": mean,
            "letters": {
                "share": float(np.exp(log_p).sum(1).mean()),
                "answered": letters(chosen.tolist()),
                "right": letters([one.answer for one in asked]),
            },
            "patients": patient_scores(murmur, patients, resamples, seed) if murmur else None,
            "asked": {
                "people": _digest(f"{who.database} {who.person}" for who in (patients[one.recording] for one in every)),
                "questions": _digest(f"{one.id} {one.text} {one.answer}" for one in every),
            },
            "questions": len(answers),
            "recordings": len(set(recordings)),
            "people": len(set(persons)),
            "intervals": {"level": metrics.LEVEL, "resamples": resamples, "seed": seed,
                          "unit": "people, stratified by database"},
        }
    )  # fmt: skip


def _digest(words: Iterable[str]) -> str:
    """Of a set of words, whatever their order."""
    return hashlib.sha256("\n".join(sorted(set(words))).encode()).hexdigest()[:16]


def class_log_p(answer: batches.Answer) -> np.ndarray:
    """(classes,) log-probability of each of the task's classes, summed over the letters that offer it."""
    options, log_p = np.array(answer.question.options), np.array(answer.log_p)
    return np.array([np.logaddexp.reduce(log_p[options == word]) for word in mc.TASKS[answer.question.task].classes])


def patient_scores(
    answers: Sequence[batches.Answer], patients: Mapping[str, Patient], resamples: int, seed: int
) -> dict[str, Any]:
    """The Challenge's two scores of 2022, from answers to the murmur question.

    A patient's murmur is the class with the largest mean log-probability over the questions on that patient's
    recordings. The model is not asked for the outcome: Absent counts as Normal, Present and Unknown as Abnormal.

    Returns: {"patients", "weighted_accuracy": S, "excess": S, over always Present on the same patients,
      "trivial_weighted_accuracy": {"always Present", "always Absent"},
      "cost": S, of the "cost_patients" whose outcome is known, else None; "trivial_cost": of the same two answers;
      "called": {murmur: {murmur called: patients}}}. Intervals are over people, stratified by database.
    """
    heard = collections.defaultdict(list)
    for answer in answers:
        heard[patients[answer.question.recording]].append(class_log_p(answer))
    who = list(heard)
    called = np.eye(3, dtype=int)[[np.mean(heard[one], 0).argmax() for one in who]]
    truth = np.eye(3, dtype=int)[[STATUS.index(one.murmur) for one in who]]
    present, absent = (
        np.tile(np.eye(3, dtype=int)[STATUS.index(word)], (len(who), 1)) for word in ("Present", "Absent")
    )
    people = len({(one.database, one.person) for one in who})
    times = metrics.draw_people(
        [one.person for one in who], [one.database for one in who], resamples if people > 1 else 0, seed
    )
    drawn = [np.repeat(np.arange(len(who)), row.astype(int)) for row in times]

    def costs(answers: np.ndarray, of: np.ndarray) -> float:
        of = of[np.array([who[i].abnormal is not None for i in of], bool)]
        abnormal = np.array([who[i].abnormal for i in of], bool)
        referred = answers[of, STATUS.index("Absent")] == 0
        return metrics.challenge_cost(*(np.stack([x, ~x], 1).reshape(-1, 2) for x in (abnormal, referred)))

    accuracy, everyone = metrics.weighted_murmur_accuracy, np.arange(len(who))
    over_present = lambda of: accuracy(truth[of], called[of]) - accuracy(truth[of], present[of])
    outcomes = sum(one.abnormal is not None for one in who)
    return {
        "patients": len(who),
        "weighted_accuracy": metrics.with_interval(
            accuracy(truth, called), [accuracy(truth[of], called[of]) for of in drawn]
        ),
        "excess": metrics.with_interval(over_present(everyone), [over_present(of) for of in drawn]),
        "trivial_weighted_accuracy": {
            "always Present": accuracy(truth, present),
            "always Absent": accuracy(truth, absent),
        },
        "cost_patients": outcomes,
        "cost": metrics.with_interval(costs(called, everyone), [costs(called, of) for of in drawn])
        if outcomes
        else None,
        "trivial_cost": {
            "always Present": costs(present, everyone),
            "always Absent": costs(absent, everyone),
        },
        "called": {
            word: dict(zip(STATUS, called[truth[:, i] == 1].sum(0).tolist(), strict=True))
            for i, word in enumerate(STATUS)
        },
    }


def swapped(rows: Sequence[Mapping[str, Any]], indices: Sequence[int], seed: int) -> dict[int, int]:
    """Whose audio is heard in place of each of the recordings `indices`: always another person's, among the same
    recordings; each is heard once unless one person has more than half of them.

    Raises:
      ValueError: recordings of one person only.
    """
    rng = np.random.default_rng(seed)
    who = {int(i): (rows[i]["database"], rows[i]["person"]) for i in indices}
    people = sorted(set(who.values()))
    if len(people) < 2:
        raise ValueError("shuffled audio needs recordings of two people at least")
    place = dict(zip(people, rng.permutation(len(people)), strict=True))
    order = sorted(rng.permutation(sorted(who)).tolist(), key=lambda i: place[who[i]])
    most = max(collections.Counter(who.values()).values())
    found = {}
    for n, i in enumerate(order):
        # People stand in blocks: as many places further as the longest block has, another one begins.
        other = order[(n + most) % len(order)]
        if who[other] == who[i]:
            other = rng.choice([j for j in order if who[j] != who[i]])
        found[i] = int(other)
    return found


@torch.no_grad()
def agreement(
    model: Any,
    processor: Any,
    source: batches.Source,
    asked: Sequence[batches.Asked],
    answers: Sequence[batches.Answer],
    limit: int,
) -> dict[str, Any]:
    """How often `generate` says the letter that was read from one forward pass.

    Asked along the documented path, with max_new_tokens=1 and do_sample=False: at most `limit` questions on recordings
    of one clip, evenly over `answers`.

    Returns: {"questions", "same": share where generate gave the most probable letter, "a_letter": share where it gave
      any of the six}; both None without such questions.
    """
    base, letters = llm.base_of(model), llm.letter_ids(processor)
    clip_of = {question.id: one for one in asked for question in one.questions}
    single = [answer for answer in answers if answer.windows == 1]
    chosen = [single[i] for i in np.unique(np.linspace(0, len(single) - 1, min(limit, len(single))).astype(int))]
    said = []
    for answer in chosen:
        one = clip_of[answer.question.id]
        clip = source.read(one.recording)[one.begin : one.end]
        inputs = processor(
            text=[llm.conversation(processor, answer.question.text)], audio=[clip], sampling_rate=llm.RATE_HZ,
            padding=True, return_tensors="pt",
        )  # fmt: skip
        said.append(int(base.generate(**inputs.to(base.device), max_new_tokens=1, do_sample=False)[0, -1]))
    same = [token == letters[int(np.argmax(answer.log_p))] for token, answer in zip(said, chosen, strict=True)]
    return {
        "questions": len(chosen),
        "same": float(np.mean(same)) if chosen else None,
        "a_letter": float(np.mean([token in letters for token in said])) if chosen else None,
    }


class Run(NamedTuple):
    """What was scored, and how."""

    name: str
    answerer: llm.Answerer
    processor: Any
    config: ml_collections.ConfigDict
    device: torch.device


def judge_run(
    answerer: llm.Answerer,
    processor: Any,
    source: batches.Source,
    lengths: np.ndarray,
    parts: Mapping[str, np.ndarray],
    config: ml_collections.ConfigDict,
    device: torch.device,
    workdir: str | pathlib.Path,
    split: Mapping[str, Any],
) -> dict[str, Any]:
    """Judges a training run on its test part, in all its processes at once, of which the first writes metrics.json,
    predictions.csv and report.html to the workdir. Returns what metrics.json says."""
    workdir = pathlib.Path(workdir)
    run = Run(workdir.resolve().name, answerer, processor, config, device)
    result, rows = score_part(run, source, lengths, parts, "test")
    result["split"] = about(split)
    if batches.process()[0] > 0:
        return {"runs": {run.name: metrics.json_ready(result)}}
    return write(workdir, [result], rows)


def score_part(
    run: Run, source: batches.Source, lengths: np.ndarray, parts: Mapping[str, np.ndarray], part: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(a run's result, rows of predictions.csv) on one part of its recordings.

    The result: "name", "front_end" (N.S or W.S), "base", "part"; "test", as of `judge`; "control", the same with
    shuffled audio, None where it needs more people; "agreement"; "windows": how many recordings are longer than 30 s,
    and how many the front end passed whole.
    """
    config, seed = run.config, run.config.seed
    corpus, resamples = source.corpus, config.evaluation.resamples
    asked = batches.evaluation_clips(config, source, lengths, parts[part], llm.CLIP_S)
    heard = {one.recording for one in asked}
    rest = []
    if "murmur" in batches.tasks_of(config.questions.tasks):
        everywhere = murmur_alone(config)
        rest = [
            one for one in batches.evaluation_clips(everywhere, source, lengths, parts[part], llm.CLIP_S)
            if one.recording not in heard
        ]  # fmt: skip
    every = asked + rest
    if not every:
        raise ValueError(
            f"data.prepared={config.data.get('prepared')}: no recording of the {part} part has murmur_status and "
            "what config.questions.tasks asks for, as circor's have"
        )
    patients = patients_of([corpus.rows[i] for i in sorted({one.recording for one in every})])
    words = batches.key_words(0, EVALUATION)
    q = config.questions
    tasks = batches.tasks_of(q.tasks)
    train = mc.questions([corpus.rows[i] for i in parts.get("train", ())], words, tasks, q.sites, q.padding)
    trivial = mc.trivial(train, list({question.id: question for one in asked for question in one.questions}.values()))
    own = {question.id for one in asked for question in one.questions}

    def ask(clips: Sequence[batches.Asked], name: str, swap: Mapping[int, int] | None) -> list[batches.Answer]:
        with precision(run):
            return batches.ask_all(
                run.answerer, source, clips, batches.Tokenizer(run.processor), config, run.device, swap, name
            )

    def judged(name: str, answers: list[batches.Answer]) -> tuple[dict, list[dict], list[batches.Answer]]:
        at = [answer for answer in answers if answer.question.id in own]
        elsewhere = [answer for answer in answers if answer.question.id not in own]
        rows = [prediction_row(run.name, name, answer) for answer in at]
        rows += [prediction_row(run.name, f"{name}, murmur not heard at this site", answer) for answer in elsewhere]
        return judge(at, trivial, patients, resamples, seed, elsewhere), rows, at

    test, rows, answers = judged(part, ask(every, part, None))
    # A murmur's features are asked on the audio of somebody else who has a murmur, its presence on anybody else's.
    of_murmur, of_features = (
        [dataclasses.replace(one, questions=kept) for one in every
         if (kept := tuple(q for q in one.questions if (q.task == "murmur") == murmur))]
        for murmur in (True, False)
    )  # fmt: skip
    control, told = None, []
    for clips, name in ((of_murmur, "shuffled audio, murmur"), (of_features, "shuffled audio, features")):
        recordings = sorted({one.recording for one in clips})
        if len({(corpus.rows[i]["database"], corpus.rows[i]["person"]) for i in recordings}) > 1:
            told += ask(clips, name, swapped(corpus.rows, recordings, seed))
    if told:
        control, more, _ = judged("shuffled audio", told)
        rows += more
    found = None
    # `generate` needs the weights in one piece.
    if not any(hasattr(p, "full_tensor") for p in run.answerer.parameters()):
        with precision(run):
            found = agreement(run.answerer.model, run.processor, source, asked, answers, _GENERATED)
    result = {
        "name": run.name,
        "front_end": "N.S" if source.kind == "none" else f"W.S ({source.kind})",
        "base": _base(run.answerer.model),
        "part": part,
        "test": test,
        "control": control,
        "agreement": found,
        "windows": windows_of(every, source),
        "zero_shot": {},
    }
    return result, rows


def precision(run: Run) -> Any:
    """As in training."""
    half = run.config.model.dtype == "bfloat16"
    return torch.autocast(run.device.type, torch.bfloat16) if half else contextlib.nullcontext()


def _base(model: Any) -> dict[str, Any]:
    base = llm.base_of(model)
    return {
        "folder": base.name_or_path,
        "parameters": sum(p.numel() for name, p in base.named_parameters() if ".lora_" not in name),
        "adapter_parameters": sum(p.numel() for name, p in base.named_parameters() if ".lora_" in name),
    }


def windows_of(asked: Sequence[batches.Asked], source: batches.Source) -> dict[str, int]:
    clips = collections.Counter(one.recording for one in asked)
    return {
        "recordings": len(clips),
        "longer": sum(n > 1 for n in clips.values()),
        "clips": len(asked),
        "whole": sum(source.passes_whole(i) for i in clips),
    }


def murmur_alone(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with which every recording is asked for its murmur and nothing else."""
    changed = config.copy_and_resolve_references()
    with changed.ignore_type():
        changed.questions.tasks, changed.questions.sites = ("murmur",), "all"
    return changed


def prediction_row(run: str, part: str, answer: batches.Answer) -> dict[str, Any]:
    question, log_p = answer.question, np.array(answer.log_p)
    return {
        "run": run, "part": part, "id": question.id, "recording": question.recording, "person": question.person,
        "task": question.task, "right": question.options[question.answer],
        "answered": question.options[int(log_p.argmax())],
        **{f"log_p_{letter}": f"{value:.6g}" for letter, value in zip(mc.LETTERS, log_p, strict=True)},
        "share_on_letters": f"{np.exp(log_p).sum():.6g}", "windows": answer.windows,
    }  # fmt: skip


def about(split: Mapping[str, Any]) -> dict[str, Any]:
    """What the report says of a run's split."""
    return {
        "kind": split["kind"],
        "people_apart": split["people_apart"],
        "notes": [*split.get("notes", ()), *split["leaks"]],
    }


def write(
    out: str | pathlib.Path, results: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Writes metrics.json, predictions.csv (PREDICTION_FIELDS, one row a question) and report.html to the folder `out`,
    each whole or not at all; returns what metrics.json says: {"runs": {name: result}}."""
    out = pathlib.Path(out)
    said = {"runs": {one["name"]: metrics.json_ready(one) for one in results}}
    files.write_text(out / "metrics.json", json.dumps(said, indent=1) + "\n")
    with files.replacing(out / "predictions.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, PREDICTION_FIELDS)
        writer.writeheader()
        writer.writerows(predictions)
    html = tables.document(list(said["runs"].values()), out / "metrics.jsonl")
    files.write_text(out / "report.html", html)
    return said
