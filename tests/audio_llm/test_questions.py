"""Questions are drawn from a key, say nothing of their answers, and reach other tools as the model reads them."""

from __future__ import annotations

import collections
import json
import pathlib

import numpy as np
import pytest

from pcgjax import datasets, prepare
from pcgjax.audio_llm import questions as q
from pcgjax.data import splits
from pcgjax.data.shards import read_rows
from pcgjax.datasets import synthetic
from pcgjax.datasets.simulate import GRADES, PITCHES, QUALITIES, SHAPES, TIMINGS

FEATURES = tuple(task for task in q.TASKS if task != "murmur")
CASES = [(task, word) for task in q.TASKS for word in q.TASKS[task].classes]


def row(name: str = "50001_AV", status: str = "Present", audible: str | None = "1", **labels: str) -> dict:
    """A recording; with a murmur both phases are described, by the first class of each task unless said otherwise."""
    known = {"murmur_status": status, "site": name.split("_")[-1]}
    if status == "Present":
        known |= {q.TASKS[task].label: q.TASKS[task].classes[0] for task in FEATURES}
    if audible is not None:
        known["murmur_audible"] = audible
    return {"id": name, "person": f"circor-{name.split('_')[0]}", "database": "circor", "labels": known | labels}


def answered(task: str, word: str, name: str = "50001_AV") -> dict:
    return row(name, word) if task == "murmur" else row(name, **{q.TASKS[task].label: word})


def as_row(recording: datasets.Recording) -> dict:
    return {"id": recording.id, "person": recording.person, "database": "circor", "labels": dict(recording.labels)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    """Simulated people in CirCor's layout, two of each three with a murmur."""
    folder = tmp_path_factory.mktemp("circor")
    synthetic.write(
        folder, "circor", people=24, recordings_per_person=2, duration_s=(3.0, 3.1), rate_hz=1000, murmur_fraction=0.7
    )
    return folder


@pytest.fixture(scope="module")
def rows(corpus) -> list[dict]:
    return [as_row(recording) for recording in datasets.load("circor", corpus)[0]]


# ------------------------------------------------------------------------------------------------------- tasks


def test_eleven_tasks_of_six_options() -> None:
    assert len(q.TASKS) == 11
    every = {word for task in q.TASKS.values() for word in task.classes}
    for name, (_, classes, phrasings) in q.TASKS.items():
        assert len({*classes, *q.OTHERS[name]}) == len(classes) + len(q.OTHERS[name]) == 6
        assert every.issuperset(q.OTHERS[name])
        assert len(set(phrasings)) == 3
        assert not any("{" in text or "<" in text for text in phrasings)
    assert q.TASKS["murmur"].classes == ("Present", "Unknown", "Absent")  # the order of weighted_murmur_accuracy


def test_the_simulated_murmurs_use_the_words_of_the_tasks() -> None:
    words = {task: set(q.TASKS[task].classes) for task in q.TASKS}
    assert set(TIMINGS) <= words["systolic_timing"] | words["diastolic_timing"]
    for phase, number in (("systolic", datasets.SYSTOLE), ("diastolic", datasets.DIASTOLE)):
        assert set(SHAPES) == words[f"{phase}_shape"]
        assert set(GRADES[number]) == words[f"{phase}_grading"]
        assert set(PITCHES) == words[f"{phase}_pitch"]
        assert set(QUALITIES) == words[f"{phase}_quality"]


@pytest.mark.parametrize(
    ("recording", "audible", "everywhere"),
    [
        (row(), q.TASKS, q.TASKS),
        (row(audible="0"), [], q.TASKS),
        (row(audible=None), [], q.TASKS),  # CirCor does not say where it is heard
        (row(status="Absent", audible="0"), ["murmur"], ["murmur"]),
        (row(status="Unknown", audible=None), ["murmur"], ["murmur"]),
        (row(status="Absent", systolic_pitch="Low"), ["murmur"], ["murmur"]),
    ],
)
def test_what_is_asked_of_whom(recording, audible, everywhere) -> None:
    for sites, expected in (("audible", audible), ("all", everywhere)):
        assert [one.task for one in q.questions([recording], (0,), sites=sites)] == list(expected)
        for task in q.TASKS:
            assert (q.answer_of(recording, task, sites) is not None) == (task in expected)


def test_a_feature_left_out_is_not_asked() -> None:
    recording = row()
    del recording["labels"]["diastolic_pitch"]
    assert q.answer_of(recording, "diastolic_pitch") is None
    tasks = {one.task for one in q.questions([recording], (0,))}
    assert tasks == q.TASKS.keys() - {"diastolic_pitch"}


@pytest.mark.parametrize("padding", q.PADDINGS)
@pytest.mark.parametrize(("task", "word"), CASES)
def test_the_answer_is_the_label_and_stands_there_once(task, word, padding) -> None:
    for seed in range(5):
        one = q.ask(answered(task, word), task, np.random.default_rng(seed), padding)
        assert one.options[one.answer] == word
        assert one.options.count(word) == 1
        assert set(q.TASKS[task].classes) <= set(one.options)
        assert len(one.options) == 6
        phrasing, *options, last = one.text.split("\n")
        assert phrasing in q.TASKS[task].phrasings
        assert options == [f"{letter}. {option}" for letter, option in zip(q.LETTERS, one.options, strict=True)]
        assert last == "Answer with one letter: A, B, C, D, E or F."
        assert (one.id, one.recording, one.person, one.task) == (f"50001_AV:{task}", "50001_AV", "circor-50001", task)


# -------------------------------------------------------------------------------------- what the text gives away


@pytest.mark.parametrize("task", q.TASKS)
def test_the_text_is_the_same_whatever_the_answer(task) -> None:
    """So nothing that is computed from text and options tells the answer."""
    for seed in range(20):
        variants = [q.ask(answered(task, word), task, np.random.default_rng(seed)) for word in q.TASKS[task].classes]
        assert len({one.text for one in variants}) == 1
        assert {tuple(sorted(one.options)) for one in variants} == {
            tuple(sorted((*q.TASKS[task].classes, *q.OTHERS[task])))
        }
        assert len({one.answer for one in variants}) == len(variants)


def many(task: str, count: int, padding: str) -> list[q.Question]:
    classes = q.TASKS[task].classes
    drawn = [answered(task, classes[i % len(classes)], f"{60000 + i}_AV") for i in range(count)]
    return q.questions(drawn, (3,), (task,), padding=padding)


@pytest.mark.parametrize("task", q.TASKS)
def test_repeated_wrong_answers_print_the_right_one(task) -> None:
    repeated = many(task, 400, "repeat")
    score = np.mean([q.once_only(one) == one.answer for one in repeated])
    if len(q.TASKS[task].classes) == 3:
        assert score == 1
    else:
        assert score == pytest.approx(1 / 2, abs=0.1)  # four standard deviations
    others = many(task, 400, "other")
    assert np.mean([q.once_only(one) == one.answer for one in others]) == pytest.approx(1 / 6, abs=0.075)


def test_positions_and_phrasings_are_drawn_evenly() -> None:
    drawn = many("systolic_shape", 1200, "other")
    positions = collections.Counter(one.answer for one in drawn)
    assert all(positions[i] == pytest.approx(200, abs=52) for i in range(6))  # four standard deviations
    phrasings = collections.Counter(one.text.split("\n")[0] for one in drawn)
    assert all(phrasings[text] == pytest.approx(400, abs=66) for text in q.TASKS["systolic_shape"].phrasings)


# ------------------------------------------------------------------------------------------------------ drawing


def test_the_key_decides_and_the_order_of_recordings_does_not(rows) -> None:
    drawn = q.questions(rows, (1, 2))
    assert len({one.id for one in drawn}) == len(drawn) > 60
    assert q.questions(rows, (1, 2)) == drawn
    assert {one.id: one for one in q.questions(rows[::-1], (1, 2))} == {one.id: one for one in drawn}
    by_id = {one.id: one for one in drawn}
    assert all(by_id[one.id] == one for one in q.questions(rows[3:5], (1, 2), ("murmur", "systolic_pitch")))
    other = q.questions(rows, (1, 3))
    assert [one.id for one in other] == [one.id for one in drawn]
    assert np.mean([one.options != before.options for one, before in zip(other, drawn, strict=True)]) > 0.9


def test_the_questions_of_evaluation_are_these() -> None:
    """Scores of different days are on the same questions: across processes, and across versions of NumPy."""
    drawn = q.questions([row(), row("50002_MV", "Absent")], (0,), ("murmur", "systolic_grading"))
    assert [q.LETTERS[one.answer] for one in drawn] == ["B", "B", "C"]
    assert drawn[0].text.split("\n") == [
        "What is the murmur status of this recording?",
        "A. Crescendo",
        "B. Present",
        "C. Unknown",
        "D. Medium",
        "E. Harsh",
        "F. Absent",
        "Answer with one letter: A, B, C, D, E or F.",
    ]


# ----------------------------------------------------------------------------------------------------- bad input


def test_labels_that_are_no_class() -> None:
    wrong = r"recording 50001_AV: label systolic_pitch is 'Shrill', allowed are Low, Medium, High"
    with pytest.raises(ValueError, match=wrong):
        q.answer_of(row(systolic_pitch="Shrill"), "systolic_pitch")
    with pytest.raises(ValueError, match=wrong):  # also where it would not be asked
        q.questions([row(audible="0", systolic_pitch="Shrill")], (0,))
    with pytest.raises(ValueError, match="murmur_status is 'present', allowed are Present, Unknown, Absent"):
        q.questions([row(status="present")], (0,))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown task 'pitch': choose one of murmur, systolic_timing"):
        q.questions([], (0,), ("pitch",))
    with pytest.raises(ValueError, match="unknown task 'pitch'"):
        q.answer_of(row(), "pitch")
    with pytest.raises(ValueError, match="unknown sites 'AV': choose one of audible, all"):
        q.questions([], (0,), sites="AV")
    with pytest.raises(ValueError, match="unknown padding 'none': choose one of other, repeat"):
        q.questions([], (0,), padding="none")
    with pytest.raises(ValueError, match="50001_AV: its labels do not answer 'systolic_shape'"):
        q.ask(row(status="Absent"), "systolic_shape", np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------------- trivial


def test_trivial_answers_counted_by_hand() -> None:
    def pitch(name: str, word: str) -> dict:
        return row(name, systolic_pitch=word)

    # One person with many recordings outnumbers two others in questions, not in people.
    train = [pitch(f"1_{i}", "High") for i in range(5)] + [pitch("2_AV", "Low"), pitch("3_AV", "Low")]
    test = [pitch("4_AV", "Low"), pitch("5_AV", "Medium"), pitch("5_MV", "Medium"), pitch("6_AV", "Medium")]
    tasks = ("systolic_pitch", "systolic_shape")
    parts = [q.questions(part, (0,), tasks, padding="repeat") for part in (train, test)]
    scores = q.trivial(*parts)
    assert scores["systolic_pitch"] == {
        "questions": 4, "people": 3, "classes": 2, "questions_train": 7, "people_train": 3, "informative": True,
        "majority": "Low", "majority_accuracy": 1 / 4, "test_majority_accuracy": 3 / 4, "once_only_accuracy": 1.0,
    }  # fmt: skip
    shape = scores["systolic_shape"]
    assert (shape["classes"], shape["informative"], shape["majority_accuracy"]) == (1, False, 1.0)
    assert set(scores) == set(tasks)


def test_trivial_without_one_of_the_parts() -> None:
    drawn = q.questions([row()], (0,), ("systolic_pitch",))
    only_test = q.trivial([], drawn)["systolic_pitch"]
    assert (only_test["majority"], only_test["majority_accuracy"], only_test["test_majority_accuracy"]) == (
        None,
        None,
        1,
    )
    only_train = q.trivial(drawn, [])["systolic_pitch"]
    assert (only_train["majority"], only_train["questions"], only_train["informative"]) == ("Low", 0, False)
    assert only_train["majority_accuracy"] is only_train["once_only_accuracy"] is None


# -------------------------------------------------------------------------------------------------------- export


@pytest.fixture
def drawn() -> list[q.Question]:
    return q.questions([row(), row("50002_MV", "Absent")], (0,))


PATHS = {"50001_AV": "/data/50001_AV.wav", "50002_MV": "/data/ä b.wav"}
# What the templates of the tools put in the place of <audio>, and Qwen2-Audio's own chat template before the text.
IN_PLACE_OF_AUDIO = {
    "llama_factory": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    "ms_swift": "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n",
}
BEFORE_TEXT = "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n"


@pytest.mark.parametrize("layout", q.LAYOUTS)
def test_export_gives_the_prompt_of_the_chat_template(drawn, tmp_path, layout) -> None:
    path = tmp_path / "new" / "train.jsonl"
    q.export(drawn, PATHS, path, layout)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len(lines) == len(drawn) == 12
    for line, one in zip(lines, drawn, strict=True):
        user, assistant = line["messages"]
        assert user["content"].count("<audio>") == len(line["audios"]) == 1
        assert user["content"].replace("<audio>", IN_PLACE_OF_AUDIO[layout]) == BEFORE_TEXT + one.text
        assert (user["role"], assistant) == ("user", {"role": "assistant", "content": q.LETTERS[one.answer]})
        assert line["audios"] == [PATHS[one.recording]]
        assert set(line) == {"messages", "audios"}
    assert [file.name for file in path.parent.iterdir() if file.suffix == ".json"] == (
        ["dataset_info.json"] if layout == "llama_factory" else []
    )


def test_dataset_info_reads_the_file_and_keeps_other_entries(drawn, tmp_path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    for name in ("train", "test", "train"):
        q.export(drawn, PATHS, tmp_path / f"{name}.jsonl", "llama_factory")
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert list(info) == ["mine", "train", "test"]
    assert info["mine"] == {"file_name": "mine.json"}
    entry = info["train"]
    assert entry["formatting"] == "sharegpt"
    line = json.loads((tmp_path / entry["file_name"]).read_text("utf-8").splitlines()[0])
    tags = entry["tags"]
    messages = line[entry["columns"]["messages"]]
    assert [message[tags["role_tag"]] for message in messages] == [tags["user_tag"], tags["assistant_tag"]]
    assert messages[1][tags["content_tag"]] in q.LETTERS
    assert line[entry["columns"]["audios"]] == [PATHS["50001_AV"]]


def test_export_refuses(drawn, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match="unknown layout 'alpaca': choose one of llama_factory, ms_swift"):
        q.export(drawn, PATHS, path, "alpaca")
    with pytest.raises(ValueError, match=r"a\.json: name it \.jsonl"):
        q.export(drawn, PATHS, tmp_path / "a.json", "ms_swift")
    with pytest.raises(ValueError, match="no question to write"):
        q.export([], PATHS, path, "ms_swift")
    with pytest.raises(ValueError, match="no file for 1 recordings, such as 50002_MV"):
        q.export(drawn, {"50001_AV": "x.wav"}, path, "ms_swift")
    for damage in ("{", "[]"):
        (tmp_path / "dataset_info.json").write_text(damage)
        with pytest.raises(ValueError, match=r"dataset_info.json: .*repair it or choose another folder"):
            q.export(drawn, PATHS, path, "llama_factory")
        assert (tmp_path / "dataset_info.json").read_text() == damage
    assert not path.exists()


# ------------------------------------------------------------------------------------------------------- command


def test_command_writes_one_part_of_a_split(corpus, rows, tmp_path, run_command) -> None:
    prepare.prepare("circor", corpus, tmp_path / "prepared", workers=1)
    split = splits.make(read_rows(tmp_path / "prepared")[1], "person", "", seed=0)
    splits.save(split, tmp_path / "split.json")
    out = tmp_path / "test.jsonl"
    flags = ("--dataset=circor", f"--source={corpus}", f"--out={out}", "--layout=ms_swift")
    done = run_command("audio_llm.questions", *flags, f"--split={tmp_path / 'split.json'}", "--part=test")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    part = [row for row in rows if row["id"] in split["test"]]
    expected = q.questions(part, (0,))
    assert [line["messages"][0]["content"] for line in lines] == ["<audio>" + one.text for one in expected]
    assert [pathlib.Path(line["audios"][0]).stem for line in lines] == [one.recording for one in expected]
    assert all(pathlib.Path(line["audios"][0]).is_absolute() for line in lines)
    assert all(pathlib.Path(line["audios"][0]).is_file() for line in lines)
    assert f"{len(expected)} questions about " in done.stdout
    assert "longer than 30 s" not in done.stdout


def test_command_refuses_other_data_sets(corpus_folder, tmp_path, run_command) -> None:
    flags = (f"--source={corpus_folder / 'source'}", f"--out={tmp_path / 'a.jsonl'}", "--layout=llama_factory")
    done = run_command("audio_llm.questions", "--dataset=cinc2016", *flags)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "no question to write: none of the recordings has murmur_status" in done.stderr
    assert not list(tmp_path.iterdir())


def test_needs_neither_torch_nor_jax(run_python) -> None:
    heavy = ("torch", "transformers", "jax", "soundfile", "grain")
    code = f"import sys, pcgjax.audio_llm.questions\nprint([name for name in {heavy} if name in sys.modules])"
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stderr
