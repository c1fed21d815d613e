"""A run of the audio LLM, judged: its answers to a part of its recordings, a control, and the files that say so."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import torch

from pcgjax import metrics
from pcgjax.audio_llm import batches
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm import questions as mc
from pcgjax.audio_llm.judge import judge, patients_of
from pcgjax.pages import audio_llm as page
from pcgjax.runs.streams import EVALUATION
from pcgjax.runtime import files
from pcgjax.runtime.tables import write_csv

PREDICTION_FIELDS = (
    "run", "part", "id", "recording", "person", "task", "right", "answered",
    *(f"log_p_{letter}" for letter in mc.LETTERS), "share_on_letters", "windows",
)  # fmt: skip
_GENERATED = 64  # questions that are put to `generate` too


class Candidate(NamedTuple):
    """A model that is judged, and how it is asked."""

    name: str
    answerer: llm.Answerer
    processor: Any
    config: ml_collections.ConfigDict
    device: torch.device


def judge_run(
    candidate: Candidate,
    source: batches.Source,
    lengths: np.ndarray,
    parts: Mapping[str, np.ndarray],
    split: Mapping[str, Any],
    workdir: pathlib.Path,
) -> dict[str, Any]:
    """Judges a training run on its test part, in all its processes at once, of which the first writes metrics.json,
    predictions.csv and report.html to the workdir. Returns what metrics.json says."""
    result, rows = score_part(candidate, source, lengths, parts, "test")
    result["split"] = about(split)
    if batches.process()[0] > 0:
        return {"runs": {candidate.name: metrics.json_ready(result)}}
    return write(workdir, [result], rows)


def score_part(
    candidate: Candidate, source: batches.Source, lengths: np.ndarray, parts: Mapping[str, np.ndarray], part: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(a candidate's result, rows of predictions.csv) on one part of its recordings.

    Args: lengths: (N,) samples of each recording behind the front end; parts: {part: indices into the corpus}.
    The result: "name", "front_end" (N.S or W.S), "base", "part"; "test", as of `judge`; "control", the same with
    shuffled audio, None where it needs more people; "agreement"; "windows": how many recordings are longer than 30 s,
    and how many the front end passed whole.
    Raises:
      ValueError: nothing to ask about this part.
    """
    config, rows = candidate.config, source.corpus.rows
    clips = batches.evaluation_clips(config, source, lengths, parts[part], llm.CLIP_S)
    every = clips + _murmur_elsewhere(config, source, lengths, parts[part], clips)
    if not every:
        raise ValueError(
            f"data.prepared={config.data.get('prepared')}: no recording of the {part} part has murmur_status and "
            "what config.questions.tasks asks for, as circor's have"
        )
    patients = patients_of([rows[i] for i in sorted({clip.recording for clip in every})])
    questions = {question.id: question for clip in clips for question in clip.questions}
    trivial = _trivial(config, [rows[i] for i in parts.get("train", ())], list(questions.values()))

    def judged(name: str, answers: list[batches.Answer]) -> tuple[dict, list[dict], list[batches.Answer]]:
        here = [answer for answer in answers if answer.question.id in questions]
        elsewhere = [answer for answer in answers if answer.question.id not in questions]
        table = [prediction_row(candidate.name, name, answer) for answer in here]
        other_part = f"{name}, murmur not heard at this site"
        table += [prediction_row(candidate.name, other_part, answer) for answer in elsewhere]
        scores = judge(here, trivial, patients, config.evaluation.resamples, config.seed, elsewhere)
        return scores, table, here

    test, table, answers = judged(part, ask(candidate, source, every, part))
    control = None
    if shuffled := _ask_shuffled(candidate, source, every):
        control, more, _ = judged("shuffled audio", shuffled)
        table += more
    generated = None
    # `generate` needs the weights in one piece.
    if not any(hasattr(p, "full_tensor") for p in candidate.answerer.parameters()):
        with llm.precision(config.model.dtype, candidate.device):
            generated = agreement(candidate.answerer.model, candidate.processor, source, clips, answers, _GENERATED)
    result = {
        "name": candidate.name,
        "front_end": "N.S" if source.kind == "none" else f"W.S ({source.kind})",
        "base": _base(candidate.answerer.model),
        "part": part,
        "test": test,
        "control": control,
        "agreement": generated,
        "windows": windows_of(every, source),
        "zero_shot": {},
    }
    return result, table


# ------------------------------------------------------------------------------------------------ what is asked


def ask(
    candidate: Candidate,
    source: batches.Source,
    clips: Sequence[batches.Clip],
    describe: str,
    swap: Mapping[int, int] | None = None,
) -> list[batches.Answer]:
    """`batches.ask_all` in the precision that the model was trained in."""
    with llm.precision(candidate.config.model.dtype, candidate.device):
        return batches.ask_all(
            candidate.answerer, source, clips, batches.Tokenizer(candidate.processor), candidate.config,
            candidate.device, swap, describe,
        )  # fmt: skip


def _murmur_elsewhere(
    config: ml_collections.ConfigDict,
    source: batches.Source,
    lengths: np.ndarray,
    indices: np.ndarray,
    clips: Sequence[batches.Clip],
) -> list[batches.Clip]:
    """Where the murmur is asked for: clips with that question on the recordings that `clips` has not."""
    if "murmur" not in batches.tasks_of(config.questions.tasks):
        return []
    recordings = {clip.recording for clip in clips}
    everywhere = batches.evaluation_clips(murmur_alone(config), source, lengths, indices, llm.CLIP_S)
    return [clip for clip in everywhere if clip.recording not in recordings]


def _trivial(
    config: ml_collections.ConfigDict, rows: Sequence[Mapping[str, Any]], questions: Sequence[mc.Question]
) -> dict[str, dict[str, Any]]:
    """`questions.trivial` of these questions, beside those on the training recordings `rows`."""
    q, words = config.questions, batches.key_words(0, EVALUATION)
    return mc.trivial(mc.questions(rows, words, batches.tasks_of(q.tasks), q.sites, q.padding), questions)


def murmur_alone(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with which every recording is asked for its murmur and nothing else."""
    changed = config.copy_and_resolve_references()
    with changed.ignore_type():
        changed.questions.tasks, changed.questions.sites = ("murmur",), "all"
    return changed


def _ask_shuffled(candidate: Candidate, source: batches.Source, clips: Sequence[batches.Clip]) -> list[batches.Answer]:
    """The answers to the same questions on the audio of another person, where there is one: a murmur's features on
    that of somebody else who has a murmur, its presence on anybody else's."""
    rows = source.corpus.rows
    answers: list[batches.Answer] = []
    for name, murmur in (("shuffled audio, murmur", True), ("shuffled audio, features", False)):
        chosen = []
        for clip in clips:
            if questions := tuple(q for q in clip.questions if (q.task == "murmur") == murmur):
                chosen.append(dataclasses.replace(clip, questions=questions))
        recordings = sorted({clip.recording for clip in chosen})
        if len({(rows[i]["database"], rows[i]["person"]) for i in recordings}) > 1:
            answers += ask(candidate, source, chosen, name, swapped(rows, recordings, candidate.config.seed))
    return answers


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
    swap = {}
    for n, i in enumerate(order):
        # People stand in blocks: as many places further as the longest block has, another one begins.
        other = order[(n + most) % len(order)]
        if who[other] == who[i]:
            other = rng.choice([j for j in order if who[j] != who[i]])
        swap[i] = int(other)
    return swap


@torch.no_grad()
def agreement(
    model: Any,
    processor: Any,
    source: batches.Source,
    clips: Sequence[batches.Clip],
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
    clip_of = {question.id: clip for clip in clips for question in clip.questions}
    single = [answer for answer in answers if answer.windows == 1]
    chosen = [single[i] for i in np.unique(np.linspace(0, len(single) - 1, min(limit, len(single))).astype(int))]
    tokens = []
    for answer in chosen:
        clip = clip_of[answer.question.id]
        inputs = processor(
            text=[llm.conversation(processor, answer.question.text)],
            audio=[source.read(clip.recording)[clip.begin : clip.end]], sampling_rate=llm.RATE_HZ, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        tokens.append(int(base.generate(**inputs.to(base.device), max_new_tokens=1, do_sample=False)[0, -1]))
    same = [token == letters[int(np.argmax(answer.log_p))] for token, answer in zip(tokens, chosen, strict=True)]
    return {
        "questions": len(chosen),
        "same": float(np.mean(same)) if chosen else None,
        "a_letter": float(np.mean([token in letters for token in tokens])) if chosen else None,
    }


# ---------------------------------------------------------------------------------------------- what is written


def _base(model: Any) -> dict[str, Any]:
    base = llm.base_of(model)
    return {
        "folder": base.name_or_path,
        "parameters": sum(p.numel() for name, p in base.named_parameters() if ".lora_" not in name),
        "adapter_parameters": sum(p.numel() for name, p in base.named_parameters() if ".lora_" in name),
    }


def windows_of(clips: Sequence[batches.Clip], source: batches.Source) -> dict[str, int]:
    counts = collections.Counter(clip.recording for clip in clips)
    return {
        "recordings": len(counts),
        "longer": sum(n > 1 for n in counts.values()),
        "clips": len(clips),
        "whole": sum(source.passes_whole(i) for i in counts),
    }


def prediction_row(run: str, part: str, answer: batches.Answer) -> dict[str, Any]:
    """A row of predictions.csv."""
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
    runs = {"runs": {result["name"]: metrics.json_ready(result) for result in results}}
    files.write_text(out / "metrics.json", json.dumps(runs, indent=1) + "\n")
    rows = ([row.get(name, "") for name in PREDICTION_FIELDS] for row in predictions)
    write_csv(out / "predictions.csv", PREDICTION_FIELDS, rows)
    html = page.document(list(runs["runs"].values()), out / "metrics.jsonl")
    files.write_text(out / "report.html", html)
    return runs
