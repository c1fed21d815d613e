"""What tables and page say of results: when runs may not be compared, and when a score is clearly above a baseline."""

from __future__ import annotations

import numpy as np
import pytest

from pcgjax.audio_llm import batches
from pcgjax.audio_llm import questions as mc
from pcgjax.audio_llm.judge import judge, patients_of
from pcgjax.pages import audio_llm as page


def result_of(murmurs: list[str], right: list[list[bool]], name: str = "run", **labels: str) -> dict:
    """The result of a run: a list a person, in it whether each recording's murmur was answered rightly."""
    people = [str(i) for i in range(len(murmurs))]
    rows, answers = [], []
    for person, murmur, judged in zip(people, murmurs, right, strict=True):
        for i, is_right in enumerate(judged):
            one = {"id": f"{person}_{i}", "person": person, "database": "circor",
                   "labels": {"murmur_status": murmur, **labels}}  # fmt: skip
            question = mc.ask(one, "murmur", np.random.default_rng(len(rows)))
            wrong = next(word for word in ("Absent", "Present") if word != murmur)
            likely = question.answer if is_right else question.options.index(wrong)
            p = np.where(np.arange(6) == likely, 0.9, 0.01)
            rows.append(one)
            answers.append(batches.Answer(question, tuple(np.log(p)), 1))
    trivial = mc.trivial([answer.question for answer in answers], [answer.question for answer in answers])
    windows = {"recordings": len(rows), "longer": 0, "clips": len(rows), "whole": 0}
    return {
        "name": name, "front_end": "N.S", "base": {"folder": "model", "parameters": 10**10, "adapter_parameters": 0},
        "part": "test", "test": judge(answers, trivial, patients_of(rows), 1000, 0), "control": None,
        "agreement": None, "windows": windows, "zero_shot": {}, "split": None,
    }  # fmt: skip


def cards(result: dict, tmp_path) -> list[str]:
    return page.document([result], tmp_path / "metrics.jsonl").split('<div class="card score">')[1:]


def test_a_score_that_is_sure_above_an_unsure_baseline_is_not_clearly_above_it(tmp_path):
    """Three of four answers right with every person: the accuracy has an interval of no width, what is unsure is the
    majority, which among other people may be as good."""
    result = result_of(["Present"] * 5 + ["Absent"] * 3, [[True, True, True, False]] * 8)
    mean = result["test"]["mean"]
    assert mean["accuracy"]["low"] == 0.75 > mean["majority_accuracy"] == 0.625
    assert mean["excess"]["low"] < 0 < mean["excess"]["value"]
    drawn = cards(result, tmp_path)[0]
    assert '<span class="warn">not clearly above</span> majority (0.625): +0.125, 95 % interval' in drawn
    assert f"95 % interval {mean['excess']['low']:.3f}–{mean['excess']['high']:.3f}" in drawn


def test_what_the_front_end_passed_whole_is_said(tmp_path):
    result = result_of(["Present", "Absent"], [[True, True]] * 2)
    assert "heard whole" not in page.document([result], tmp_path / "metrics.jsonl")
    result["windows"]["whole"] = 3
    sentence = "test: in 3 of 4 recordings the front end found no heartbeat: they were heard whole."
    assert sentence in page.document([result], tmp_path / "metrics.jsonl")


def test_an_unsure_score_that_is_always_above_its_baseline_is_clearly_above_it(tmp_path):
    """All of the majority right and a little more: how many people have a murmur moves both alike."""
    some = [True] * 2 + [False] * 8
    result = result_of(["Present"] * 11 + ["Absent"] * 9, [[True] * 10] * 11 + [some] * 9)
    mean = result["test"]["mean"]
    assert mean["accuracy"]["low"] < mean["majority_accuracy"] == 0.55
    assert mean["excess"]["low"] > 0
    first, patients = cards(result, tmp_path)
    assert '<span class="good">clearly above</span> majority (0.550): +0.090' in first
    # The murmur of a person is the likeliest over all recordings: everybody is called Present.
    assert result["test"]["patients"]["excess"] == {"value": 0, "low": 0, "high": 0}
    assert '<span class="warn">not clearly above</span> always Present' in patients
    [table] = (one for one in page.tables([result]) if one.title.startswith("Patients"))
    assert table.head[2] == "Over always Present"
    assert table.body[0][2] == result["test"]["patients"]["excess"]


@pytest.mark.parametrize(("people", "recordings", "words"), [
    (4, 2, ""),
    (5, 2, "judged on different people"),
    (4, 3, "asked different questions"),
])  # fmt: skip
def test_runs_judged_on_something_else_are_not_to_be_compared(people, recordings, words, tmp_path):
    murmurs = ["Present", "Absent"] * 3
    one = result_of(murmurs[:4], [[True] * 2] * 4, "one")
    other = result_of(murmurs[:people], [[True] * recordings] * people, "other")
    assert words in page.differences([one, other])
    assert bool(page.differences([one, other])) == bool(words)
    assert page.differences([other]) == ""
    first, second, patients = page.tables([one, other])
    html = page.document([one, other], tmp_path / "metrics.jsonl")
    for text in (first.note, second.note, patients.note, html):
        assert ("cannot be compared with each other" in text) == bool(words)
