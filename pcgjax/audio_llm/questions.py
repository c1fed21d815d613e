"""Eleven features of a murmur as six-option questions for an audio language model, drawn from a key.

After "Exploring Finetuned Audio-LLM on Heart Murmur Features", section 3.3: one question a recording and feature, in
one of three phrasings, six options, one right. What the paper leaves open is chosen here:

padding: the classes of a feature are three or four, and the paper pads "with additional instances of incorrect
  answers". Read literally (`repeat`) that prints the answer: wrong answers stand there twice or more, the right one
  once. `once_only`, which reads the options and hears nothing, then scores 100 % where there are three classes
  (murmur, grading of systolic murmurs, pitch, quality) and 50 % where there are four: 87 % of 1674 questions on 181
  patients of CirCor, of which each task's majority class answers 54 %. The default (`other`) fills up with the same
  words of other features every time, so that text and options are a function of task and draw alone: `once_only` is
  right in 1 of 6 there (16 % of those questions), and whoever tells the feature's words from the others in 1 of 3
  or 4.
sites: a murmur is described once a patient, but heard at some auscultation sites only. `audible` asks for it, and for
  its presence, where it was heard, `all` at every site.

    python -m pcgjax.audio_llm.questions --dataset=circor --source=DIR --out=circor.jsonl --layout=llama_factory

NumPy only: neither torch nor transformers is needed.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from pcgjax import datasets
from pcgjax.data import splits
from pcgjax.datasets import audio
from pcgjax.runs.schema import QUESTION_PADDINGS as PADDINGS
from pcgjax.runs.schema import QUESTION_SITES as SITES
from pcgjax.runtime import files

LETTERS = "ABCDEF"
LAYOUTS = ("llama_factory", "ms_swift")


class Task(NamedTuple):
    label: str  # key in a recording's labels
    classes: tuple[str, ...]  # what the label may say, in CirCor's words
    phrasings: tuple[str, str, str]


# The values are those of the published tables (Oliveira et al. 2022, doi:10.1109/JBHI.2021.3137048, Table V) and
# Late-diastolic and IV/IV, which the scheme has and no patient.
_CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "timing": {
        "systolic": ("Early-systolic", "Mid-systolic", "Late-systolic", "Holosystolic"),
        "diastolic": ("Early-diastolic", "Mid-diastolic", "Late-diastolic", "Holodiastolic"),
    },
    "shape": dict.fromkeys(("systolic", "diastolic"), ("Crescendo", "Decrescendo", "Diamond", "Plateau")),
    "grading": {"systolic": ("I/VI", "II/VI", "III/VI"), "diastolic": ("I/IV", "II/IV", "III/IV", "IV/IV")},
    "pitch": dict.fromkeys(("systolic", "diastolic"), ("Low", "Medium", "High")),
    "quality": dict.fromkeys(("systolic", "diastolic"), ("Blowing", "Harsh", "Musical")),
}
_PHRASINGS = {
    "timing": (
        "What is the timing of the {phase} murmur in this phonocardiogram?",
        "Listen to this heart sound recording. When is the {phase} murmur heard?",
        "Which part of the cardiac cycle does the {phase} murmur of this recording fill?",
    ),
    "shape": (
        "What is the shape of the {phase} murmur in this phonocardiogram?",
        "Listen to this heart sound recording. How does the loudness of the {phase} murmur develop while it lasts?",
        "Which envelope describes the {phase} murmur of this recording?",
    ),
    "grading": (
        "What is the grade of the {phase} murmur in this phonocardiogram{scale}?",
        "Listen to this heart sound recording. How is the intensity of the {phase} murmur graded{scale}?",
        "Which grade has the {phase} murmur of this recording{scale}?",
    ),
    "pitch": (
        "What is the pitch of the {phase} murmur in this phonocardiogram?",
        "Listen to this heart sound recording. How high is the {phase} murmur pitched?",
        "Which pitch has the {phase} murmur of this recording?",
    ),
    "quality": (
        "What is the quality of the {phase} murmur in this phonocardiogram?",
        "Listen to this heart sound recording. What does the {phase} murmur sound like?",
        "Which word describes the timbre of the {phase} murmur of this recording?",
    ),
}
# A thrill is felt, not heard: the annotators of CirCor left the grades above III together with III.
_SCALES = {"systolic": ", where III/VI stands for III/VI and above", "diastolic": " on the scale of four"}


def _phrasings(feature: str, phase: str) -> tuple[str, str, str]:
    first, second, third = (text.format(phase=phase, scale=_SCALES[phase]) for text in _PHRASINGS[feature])
    return first, second, third


# name -> (label, classes, phrasings)
TASKS: dict[str, Task] = {
    "murmur": Task(
        "murmur_status",
        ("Present", "Unknown", "Absent"),
        (
            "Is there a heart murmur in this phonocardiogram?",
            "Listen to this heart sound recording. Is a murmur present, absent, or can it not be told?",
            "What is the murmur status of this recording?",
        ),
    )
} | {
    f"{phase}_{feature}": Task(f"{phase}_{feature}", _CLASSES[feature][phase], _phrasings(feature, phase))
    for phase in ("systolic", "diastolic")
    for feature in _CLASSES
}
# What fills a task's options up to six: classes of another kind, so that they cannot be right. Not the free grades
# IV/VI to VI/VI, which III/VI may stand for, nor I/IV beside I/VI, which would ask for Roman numerals instead of
# hearing.
OTHERS: dict[str, tuple[str, ...]] = {
    "murmur": ("Crescendo", "Harsh", "Medium"),
    "systolic_timing": ("Diamond", "Harsh"),
    "diastolic_timing": ("Diamond", "Harsh"),
    "systolic_shape": ("Low", "Blowing"),
    "diastolic_shape": ("Low", "Blowing"),
    "systolic_grading": ("Plateau", "Low", "Harsh"),
    "diastolic_grading": ("Plateau", "Low"),
    "systolic_pitch": ("Crescendo", "Musical", "Holosystolic"),
    "diastolic_pitch": ("Crescendo", "Musical", "Holodiastolic"),
    "systolic_quality": ("Diamond", "Medium", "Mid-systolic"),
    "diastolic_quality": ("Diamond", "Medium", "Mid-diastolic"),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """One multiple-choice question about one recording."""

    id: str  # recording id + ":" + task
    recording: str
    person: str
    task: str  # of TASKS
    text: str  # the user's message after the audio; ends by asking for one letter
    options: tuple[str, ...]  # six; option i is letter LETTERS[i]
    answer: int  # index of the right option


def answer_of(row: Mapping[str, Any], task: str, sites: str = "audible") -> str | None:
    """The right class of a recording's question, or None where `task` is not asked of this recording.

    Patients without a murmur, or with an Unknown one, are asked for `murmur` only; patients with one at the sites
    where it is audible, or at all sites (see `SITES`). Where the label is left out nothing is asked.

    Args:
      row: as `prepare` writes it; `id` and `labels` are used.
    Raises:
      ValueError: unknown task or sites, or a label that is none of the task's classes.
    """
    _choose("task", task, tuple(TASKS))
    _choose("sites", sites, SITES)
    label, classes, _ = TASKS[task]
    labels = row["labels"]
    present = labels.get("murmur_status") == "Present"
    value: str | None = labels.get(label)
    if value is None or (task != "murmur" and not present):
        return None
    if value not in classes:
        raise ValueError(f"recording {row['id']}: label {label} is {value!r}, allowed are {', '.join(classes)}")
    if present and sites == "audible" and labels.get("murmur_audible") != "1":
        return None
    return value


def ask(row: Mapping[str, Any], task: str, rng: np.random.Generator, padding: str = "other") -> Question:
    """Draws phrasing and order of options (and with `repeat` the repeated ones) of one question, at any site.

    Args:
      row: as `prepare` writes it; `id`, `person` and `labels` are used.
      padding: see `PADDINGS` and the top of this file.
    Raises:
      ValueError: as `answer_of`, unknown padding, or the recording has no answer to this task.
    """
    _choose("padding", padding, PADDINGS)
    right = answer_of(row, task, "all")
    if right is None:
        raise ValueError(f"recording {row['id']}: its labels do not answer {task!r}: ask where answer_of says a class")
    _, classes, phrasings = TASKS[task]
    phrasing = phrasings[rng.integers(len(phrasings))]
    if padding == "other":
        pool = (*classes, *OTHERS[task])
    else:
        # In turn, so that each wrong answer is repeated as often as the others, to within one.
        wrong = [classes[i] for i in rng.permutation(len(classes)) if classes[i] != right]
        pool = (*classes, *itertools.islice(itertools.cycle(wrong), len(LETTERS) - len(classes)))
    options = tuple(pool[i] for i in rng.permutation(len(LETTERS)))
    lines = [phrasing, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))]
    text = "\n".join([*lines, "Answer with one letter: A, B, C, D, E or F."])
    return Question(f"{row['id']}:{task}", row["id"], row["person"], task, text, options, options.index(right))


def questions(
    rows: Sequence[Mapping[str, Any]],
    key_words: Sequence[int],
    tasks: Sequence[str] = tuple(TASKS),
    sites: str = "audible",
    padding: str = "other",
) -> list[Question]:
    """All questions of `tasks` that can be asked of the recordings, in the order of rows, then of tasks.

    What is drawn depends on `key_words` and the question's id alone: the same for any order or choice of rows.
    Evaluation uses one key for good, training that of the step.

    Args:
      key_words: non-negative integers, such as the two words of a JAX key.
    Raises:
      ValueError: as `answer_of` and `ask`.
    """
    _choose("sites", sites, SITES)
    _choose("padding", padding, PADDINGS)
    for task in tasks:
        _choose("task", task, tuple(TASKS))
    words = [int(word) for word in key_words]
    drawn = []
    for row, task in itertools.product(rows, tasks):
        if answer_of(row, task, sites) is not None:
            rng = np.random.default_rng([*words, zlib.crc32(f"{row['id']}:{task}".encode())])
            drawn.append(ask(row, task, rng, padding))
    return drawn


def _choose(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(choices)}")


# ------------------------------------------------------------------------------- baselines that need no audio


def once_only(question: Question) -> int:
    """The index of the first option that occurs exactly once: an answer that needs no audio."""
    counts = collections.Counter(question.options)
    return next(i for i, option in enumerate(question.options) if counts[option] == 1)


def trivial(
    questions_train: Sequence[Question], questions_test: Sequence[Question]
) -> dict[str, dict[str, int | float | bool | str | None]]:
    """What answers without hearing score on the test questions, for each task with a question in either part.

    Returns: task -> {
      questions, people, classes: of the test part, the last the number of classes that occur;
      questions_train, people_train;
      informative: more than one class occurs in the test part; where not, 100 % means nothing;
      majority: the class of most training people (a person counts once for each class that is theirs; of equal ones
        the first in TASKS), None without training questions;
      majority_accuracy: of always answering it;
      test_majority_accuracy: of always answering the class most frequent in the test questions, which no constant
        answer exceeds;
      once_only_accuracy: of `once_only` }.
      Accuracies are shares of questions; None without test questions (or without a majority).
    """
    results: dict[str, dict[str, int | float | bool | str | None]] = {}
    for task, (_, classes, _) in TASKS.items():
        train = [question for question in questions_train if question.task == task]
        test = [question for question in questions_test if question.task == task]
        if not train and not test:
            continue
        people = collections.Counter(word for _, word in {(one.person, one.options[one.answer]) for one in train})
        majority = max(classes, key=lambda word: people[word]) if train else None
        truth = collections.Counter(one.options[one.answer] for one in test)
        results[task] = {
            "questions": len(test),
            "people": len({one.person for one in test}),
            "classes": len(truth),
            "questions_train": len(train),
            "people_train": len({one.person for one in train}),
            "informative": len(truth) > 1,
            "majority": majority,
            "majority_accuracy": truth[majority] / len(test) if test and majority else None,
            "test_majority_accuracy": max(truth.values()) / len(test) if test else None,
            "once_only_accuracy": sum(once_only(one) == one.answer for one in test) / len(test) if test else None,
        }
    return results


# ---------------------------------------------------------------------------------------------------- export


def export(
    questions: Sequence[Question], audio_paths: Mapping[str, str], path: str | pathlib.Path, layout: str
) -> None:
    """Writes the questions for training elsewhere, one JSON object a line, as a whole or not at all.

    Each line has `messages` (user with `<audio>`, assistant with the letter) and `audios` (one path). The layouts
    differ in two points:
      llama_factory: LLaMA-Factory finds a data set by its name in dataset_info.json, so an entry named after the file
        is put there beside it, among those of other files (`dataset_dir` is this folder, `dataset` the file's name
        without .jsonl). It replaces `<audio>` by the audio tokens alone (template qwen2_audio), so the words that
        Qwen2-Audio's chat template has around them are written out.
      ms_swift: ms-swift takes the file itself (`--dataset FILE.jsonl`); its template adds these words.
    The model reads the same prompt either way. Both tools resample, and both cut audio after 30 s without a word.
    (LLaMA-Factory: data/README.md, Qwen2AudioPlugin; ms-swift: Custom-dataset.md, Qwen2AudioTemplate.)

    Args:
      audio_paths: recording id -> audio file; absolute, as the tools look for others in folders of their own.
    Raises:
      ValueError: unknown layout, no question, no path for a recording, a name without .jsonl (both tools choose the
        reader by it), or a dataset_info.json that is not a JSON object.
    """
    _choose("layout", layout, LAYOUTS)
    path = pathlib.Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"{path}: name it .jsonl, by which the tools tell how to read it")
    if not questions:
        raise ValueError(f"{path}: no question to write: none of the recordings has murmur_status, as circor's have")
    missing = sorted({question.recording for question in questions} - audio_paths.keys())
    if missing:
        raise ValueError(f"audio_paths has no file for {len(missing)} recordings, such as {missing[0]}")
    before = "Audio 1: <audio>\n" if layout == "llama_factory" else "<audio>"
    lines = []
    for question in questions:
        messages = [
            {"role": "user", "content": before + question.text},
            {"role": "assistant", "content": LETTERS[question.answer]},
        ]
        line = {"messages": messages, "audios": [str(audio_paths[question.recording])]}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    info = _dataset_info(path) if layout == "llama_factory" else None  # read first: if that fails nothing is written
    files.write_text(path, "".join(lines))
    if info is not None:
        files.write_text(path.parent / "dataset_info.json", json.dumps(info, indent=2, ensure_ascii=False) + "\n")


def _dataset_info(path: pathlib.Path) -> dict[str, Any]:
    """The contents of the dataset_info.json beside `path`, with the entry of `path`."""
    info_path = path.parent / "dataset_info.json"
    try:
        info = json.loads(info_path.read_text(encoding="utf-8")) if info_path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{info_path}: not JSON ({error}); repair it or choose another folder") from None
    if not isinstance(info, dict):
        raise ValueError(f"{info_path}: must hold a JSON object of data sets; repair it or choose another folder")
    entry = {
        "file_name": path.name,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "audios": "audios"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    return info | {path.stem: entry}


def main(argv: list[str]) -> None:
    if bool(FLAGS.split) != bool(FLAGS.part):
        raise app.UsageError("give --split and --part together, or neither for all recordings")
    recordings, problems = datasets.load(FLAGS.dataset, FLAGS.source)
    rows = [{"id": one.id, "person": one.person, "labels": dict(one.labels)} for one in recordings]
    if FLAGS.split:
        chosen = set(splits.load(FLAGS.split, rows)[FLAGS.part])
        rows = [row for row in rows if row["id"] in chosen]
    drawn = questions(rows, (0,), sites=FLAGS.sites, padding=FLAGS.padding)
    paths = {one.id: os.path.abspath(one.path) for one in recordings}
    export(drawn, paths, FLAGS.out, FLAGS.layout)
    names = sorted({question.recording for question in drawn})
    left_out = sum(not problem.note for problem in problems)
    too_long = sum(frames > 30 * rate_hz for rate_hz, frames, _ in (audio.header(paths[name]) for name in names))
    for task, count in collections.Counter(question.task for question in drawn).items():
        print(f"{task:18s} {count:6d}")
    print(f"{len(drawn)} questions about {len(names)} recordings in {FLAGS.out}; {left_out} files left out")
    if too_long:
        print(f"{too_long} recordings are longer than 30 s, of which the tools let the model hear the first 30 s only")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_enum("dataset", None, datasets.NAMES, "The data set in --source.", required=True)
    flags.DEFINE_string("source", None, "The folder that holds the data set.", required=True)
    flags.DEFINE_string("out", None, "The .jsonl file to write.", required=True)
    flags.DEFINE_enum("layout", None, LAYOUTS, "The tool to write for.", required=True)
    flags.DEFINE_string("split", None, "A split's JSON file; with --part.")
    flags.DEFINE_enum("part", None, splits.PARTS, "The part of --split to write.")
    flags.DEFINE_enum("sites", "audible", SITES, "Where murmurs are asked for.")
    flags.DEFINE_enum("padding", "other", PADDINGS, "What fills up to six options: see the top of the file.")
    files.run(main)
