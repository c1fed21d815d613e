"""What answers are worth: by hand where a hand can count, and runs scored with a tiny random model."""

from __future__ import annotations

import collections
import csv
import json
import math
import shutil
import tracemalloc

import numpy as np
import pytest
import torch

from pcgjax import datasets, metrics
from pcgjax.audio_llm import batches, comparison, conclude
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm import questions as mc
from pcgjax.audio_llm.conclude import PREDICTION_FIELDS, Candidate, agreement, score_part, swapped
from pcgjax.audio_llm.judge import STATUS, class_log_p, judge, patients_of
from pcgjax.audio_llm.score import folders
from pcgjax.audio_llm.zero_shot import load_unheard, unheard_source, zero_shot
from pcgjax.data import splits
from pcgjax.data.corpus import decode_recordings, from_prepared, in_memory
from pcgjax.datasets import synthetic
from pcgjax.pages.audio_llm import summary, tables
from pcgjax.runs.config import plain_config
from pcgjax.runs.streams import EVALUATION
from pcgjax.segmentation.states import write_tsv


def row(recording: str, person: str, **labels: str) -> dict:
    return {"id": recording, "person": person, "database": "circor", "labels": {"murmur_audible": "1", **labels}}


def answer_of(recording: dict, task: str, word: str | None = None, p: float = 0.9, **others: float) -> batches.Answer:
    """An answer that gives `word`, else the right one, the probability p; all other options get a tenth of the rest."""
    question = mc.ask(recording, task, np.random.default_rng(len(recording["id"])))
    word = word or question.options[question.answer]
    q = [others.get(option, p if option == word else (1 - p) / 10) for option in question.options]
    return batches.Answer(question, tuple(np.log(q)), 1)


# ------------------------------------------------------------------------------------------------- the judgement


def test_accuracies_are_counted_by_task_beside_the_majority():
    present = {"murmur_status": "Present", "systolic_timing": "Holosystolic"}
    rows = [
        row("1_MV", "1", **present, systolic_pitch="Low"),
        row("2_MV", "2", **present, systolic_pitch="High"),
        row("3_MV", "3", **present, systolic_pitch="High"),
        row("4_MV", "4", murmur_status="Absent"),
    ]
    answers = [
        *(answer_of(one, "systolic_timing") for one in rows[:3]),
        *(answer_of(one, "systolic_pitch", "High") for one in rows[:3]),
        *(answer_of(one, "murmur", "Present") for one in rows),
    ]
    train = mc.questions([row("9_MV", "9", **present, systolic_pitch="Low")], [0])
    trivial = mc.trivial(train, [answer.question for answer in answers])
    scores = judge(answers, trivial, patients_of(rows), 200, 0)
    timing, pitch, murmur = (scores["tasks"][t] for t in ("systolic_timing", "systolic_pitch", "murmur"))
    assert timing["accuracy"]["value"] == 1
    assert not timing["informative"]
    assert pitch["accuracy"]["value"] == pytest.approx(2 / 3)
    assert (pitch["majority"], pitch["majority_from"], pitch["majority_accuracy"]) == (
        "Low",
        "train",
        pytest.approx(1 / 3),
    )
    assert pitch["excess"]["value"] == pytest.approx(1 / 3)
    assert murmur["accuracy"]["value"] == 0.75
    assert murmur["excess"]["value"] == 0  # Present is the majority itself
    assert murmur["excess"]["low"] == murmur["excess"]["high"] == 0
    assert scores["mean"]["tasks"] == ["murmur", "systolic_pitch"]
    assert scores["mean"]["accuracy"]["value"] == pytest.approx((0.75 + 2 / 3) / 2)
    assert scores["mean"]["majority_accuracy"] == pytest.approx((0.75 + 1 / 3) / 2)
    assert scores["letters"]["share"] == pytest.approx(0.9 + 5 * 0.01)
    assert sum(scores["letters"]["answered"].values()) == scores["questions"] == 10
    assert (scores["recordings"], scores["people"]) == (4, 4)
    with pytest.raises(ValueError, match="no question to judge"):
        judge([], trivial, {}, 10, 0)


def test_without_training_questions_the_test_majority_stands_in():
    rows = [row(f"{i}_MV", str(i), murmur_status=word) for i, word in enumerate(("Absent", "Absent", "Present"))]
    answers = [answer_of(one, "murmur") for one in rows]
    trivial = mc.trivial([], [answer.question for answer in answers])
    murmur = judge(answers, trivial, patients_of(rows), 0, 0)["tasks"]["murmur"]
    assert (murmur["majority"], murmur["majority_from"]) == ("Absent", "test")
    assert murmur["majority_accuracy"] == pytest.approx(2 / 3)
    assert murmur["accuracy"] == {"value": 1.0, "low": None, "high": None}


def test_intervals_are_over_people():
    rows = [row(f"{person}_{i}", person, murmur_status="Absent") for person in "12" for i in range(20)]
    answers = [answer_of(one, "murmur", "Absent" if one["person"] == "1" else "Present") for one in rows]
    trivial = mc.trivial([], [answer.question for answer in answers])
    scores = judge(answers, trivial, patients_of(rows), 400, 0)["tasks"]["murmur"]
    # Two people, one always right: drawn anew, one in four times only the one or only the other.
    assert scores["accuracy"] == {"value": 0.5, "low": 0, "high": 1}
    alone = judge(answers[:20], trivial, patients_of(rows), 400, 0)["tasks"]["murmur"]
    assert alone["accuracy"] == {"value": 1, "low": None, "high": None}


def test_a_patient_is_judged_by_the_mean_over_all_recordings():
    rows = [
        # One person, but two patients with two states.
        row("10_MV", "ten", murmur_status="Present", abnormal="1"),
        row("11_MV", "ten", murmur_status="Unknown", abnormal="1"),
        row("20_MV", "20", murmur_status="Present", abnormal="0"),
        row("20_AV", "20", murmur_status="Present", abnormal="0"),
        row("30_MV", "30", murmur_status="Absent", abnormal="0"),
        row("40_MV", "40", murmur_status="Absent"),
    ]
    patients = patients_of(rows)
    assert len(set(patients.values())) == 5
    answers = [
        answer_of(rows[0], "murmur", "Absent"),
        answer_of(rows[1], "murmur", "Unknown"),
        answer_of(rows[2], "murmur", "Present", 0.9),
        answer_of(rows[4], "murmur", "Absent"),
        answer_of(rows[5], "murmur", "Present"),
    ]
    other_site = answer_of(rows[3], "murmur", "Absent", 0.5)
    trivial = mc.trivial([], [answer.question for answer in answers])
    scores = judge(answers, trivial, patients, 100, 0, [other_site])
    assert scores["tasks"]["murmur"]["questions"] == 5  # the other site counts for its patient alone
    of = scores["patients"]
    # 10 Absent, 11 Unknown (right), 20 Present (log .9 + log .05 > log .01 + log .5), 30 Absent, 40 Present.
    assert of["called"]["Present"] == {"Present": 1, "Unknown": 0, "Absent": 1}
    assert of["called"]["Unknown"] == {"Present": 0, "Unknown": 1, "Absent": 0}
    assert of["called"]["Absent"] == {"Present": 1, "Unknown": 0, "Absent": 1}
    weight = 5 + 5 + 3 + 1 + 1
    assert of["weighted_accuracy"]["value"] == pytest.approx((5 + 3 + 1) / weight)
    assert of["trivial_weighted_accuracy"] == {
        "always Present": pytest.approx(10 / weight), "always Absent": pytest.approx(2 / weight),
    }  # fmt: skip
    # Of four patients with an outcome 11 and 20 are referred, of which 11 rightly, and 10 is missed.
    assert of["cost_patients"] == 4
    # Paired: the baseline is counted on the very patients that are drawn.
    assert of["excess"]["value"] == pytest.approx((5 + 3 + 1 - 10) / weight)
    assert of["excess"]["low"] < 0 < of["excess"]["high"]
    r = 2 / 4
    assert of["cost"]["value"] == pytest.approx(35 + 397 * r - 1718 * r**2 + 11296 * r**4 + 10_000 / 4 + 50_000 / 4)
    assert of["trivial_cost"]["always Absent"] == pytest.approx(35 + 50_000 * 2 / 4)
    assert of["weighted_accuracy"]["low"] < of["weighted_accuracy"]["value"] < of["weighted_accuracy"]["high"]

    # The other site, surer of Absent, turns patient 20.
    turned = judge(answers, trivial, patients, 0, 0, [answer_of(rows[3], "murmur", "Absent", 0.9, Present=1e-6)])
    assert turned["patients"]["called"]["Present"]["Absent"] == 2
    # No outcome, no cost.
    nobody = {name: patient._replace(abnormal=None) for name, patient in patients.items()}
    assert judge(answers, trivial, nobody, 10, 0)["patients"]["cost"] is None


def test_who_was_asked_what_is_told_apart():
    rows = [row(f"{i}_MV", str(i), murmur_status="Absent") for i in range(4)]
    rows.append(row("3_AV", "3", murmur_status="Absent"))

    def digests(answers: list[batches.Answer], *elsewhere: batches.Answer) -> dict:
        trivial = mc.trivial([], [answer.question for answer in answers])
        return judge(answers, trivial, patients_of(rows), 0, 0, elsewhere)["asked"]

    first = digests([answer_of(one, "murmur") for one in rows[:3]])
    # Neither what was answered matters, nor the order.
    assert digests([answer_of(one, "murmur", "Present") for one in rows[2::-1]]) == first
    others = digests([answer_of(one, "murmur") for one in rows[1:4]])
    assert others["people"] != first["people"]
    assert others["questions"] != first["questions"]
    once, twice = digests([answer_of(rows[3], "murmur")]), digests([answer_of(one, "murmur") for one in rows[3:]])
    assert once["people"] == twice["people"]
    assert once["questions"] != twice["questions"]
    assert digests([answer_of(rows[3], "murmur")], answer_of(rows[4], "murmur")) == twice
    question = mc.ask(rows[3], "murmur", np.random.default_rng(9))  # its options stand in another order
    assert digests([answer_of(rows[3], "murmur")._replace(question=question)])["questions"] != once["questions"]


def test_repeated_options_of_a_class_count_together():
    question = mc.ask(row("1_MV", "1", murmur_status="Absent"), "murmur", np.random.default_rng(0), padding="repeat")
    log_p = class_log_p(batches.Answer(question, (math.log(0.1),) * 6, 1))
    counts = [question.options.count(word) for word in STATUS]
    np.testing.assert_allclose(np.exp(log_p), np.array(counts) / 10)


# --------------------------------------------------------------------------------------------------- the control


@pytest.mark.parametrize("counts", [(1, 1), (3, 1, 2), (2,) * 7, (5, 2, 1, 1, 1), (1,) * 20])
def test_shuffled_audio_is_always_somebody_elses(counts):
    rows = [row(f"{p}_{i}", str(p)) for p, count in enumerate(counts) for i in range(count)]
    indices = np.random.default_rng(0).permutation(len(rows))
    swap = swapped(rows, indices.tolist(), 3)
    assert swap == swapped(rows, sorted(indices), 3)
    assert sorted(swap) == list(range(len(rows)))
    assert all(rows[i]["person"] != rows[j]["person"] for i, j in swap.items())
    if max(counts) * 2 <= len(rows):
        assert len(set(swap.values())) == len(rows)
    with pytest.raises(ValueError, match="two people"):
        swapped(rows, [0], 3)


# --------------------------------------------------------------------------------------- runs, with a tiny model


@pytest.fixture(scope="module")
def corpus(prepared_16k):
    return from_prepared(prepared_16k)


@pytest.fixture(scope="module")
def run_of(tiny_llm, make_config):
    """run_of({config field: value}) of the tiny model as it is."""

    def make(changes: dict | None = None) -> Candidate:
        config = make_config({"evaluation.resamples": 50, **(changes or {})}, "audio_llm")
        model, processor = llm.load(tiny_llm, "float32", "sdpa")
        return Candidate("tiny", llm.Answerer(model), processor, config, torch.device("cpu"))

    return make


def test_generate_says_what_one_forward_pass_says(run_of, corpus):
    run = run_of({"questions.tasks": ("murmur",)})
    letters = llm.letter_ids(run.processor)
    with torch.no_grad():  # a random model says anything but letters
        weight = run.answerer.model.lm_head.weight
        weight[[i for i in range(len(weight)) if i not in letters]] = 0
    source = batches.make_source(corpus, run.config.front_end)
    clips = batches.evaluation_clips(run.config, source, corpus.lengths, np.arange(6), llm.CLIP_S)
    tokenize = batches.Tokenizer(run.processor)
    answers = batches.ask_all(run.answerer, source, clips, tokenize, run.config, "cpu")
    shares = agreement(run.answerer.model, run.processor, source, clips, answers, 4)
    assert shares == {"questions": 4, "same": 1.0, "a_letter": 1.0}
    other = [answer._replace(log_p=tuple(np.roll(answer.log_p, 1))) for answer in answers]
    assert agreement(run.answerer.model, run.processor, source, clips, other, 64)["same"] == 0
    several = [answer._replace(windows=2) for answer in answers]
    assert agreement(run.answerer.model, run.processor, source, clips, several, 64)["questions"] == 0


def test_long_recordings_are_said_and_sites_unheard_count_for_patients(run_of):
    rng = np.random.default_rng(0)
    rows = [
        row("1_MV", "1", murmur_status="Present"),
        row("1_AV", "1", murmur_status="Present") | {"labels": {"murmur_status": "Present", "murmur_audible": "0"}},
        row("2_MV", "2", murmur_status="Absent"),
        row("3_MV", "3"),
    ]
    samples = [rng.integers(-9999, 9999, n).astype(np.int16) for n in (31 * 16000, 8000, 8000, 8000)]
    memory = in_memory(rows, samples, 16000)
    run = run_of()
    source = batches.make_source(memory, run.config.front_end)
    result, predictions = score_part(run, source, memory.lengths, {"test": np.arange(4)}, "test")
    assert result["windows"] == {"recordings": 3, "longer": 1, "clips": 4, "whole": 0}
    assert result["test"]["tasks"]["murmur"]["recordings"] == 2
    assert result["test"]["patients"]["patients"] == 2
    parts = collections.Counter(one["part"] for one in predictions)
    assert parts == {"test": 2, "test, murmur not heard at this site": 1, "shuffled audio": 2,
                     "shuffled audio, murmur not heard at this site": 1}  # fmt: skip
    assert {one["id"]: one["windows"] for one in predictions if one["part"] == "test"} == {
        "1_MV:murmur": 2, "2_MV:murmur": 1,
    }  # fmt: skip
    assert "test: 1 of 3 recordings are longer than 30 s" in summary({"runs": {"tiny": metrics.json_ready(result)}})
    with pytest.raises(ValueError, match="no recording of the test part has murmur_status"):
        score_part(run, source, memory.lengths, {"test": np.array([3])}, "test")


@pytest.fixture(scope="module")
def pascal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pascal") / "source"
    synthetic.write(folder, layout="pascal", people=8, recordings_per_person=2, duration_s=(3.0, 3.2), rate_hz=4000)
    return folder


def test_zero_shot_calls_present_and_unknown_abnormal(run_of, pascal):
    unheard = load_unheard("pascal", pascal)
    run = run_of()
    source = unheard_source(unheard, run.config.front_end, None)
    scores_of, predictions = zero_shot(run, source, unheard.left_out, "pascal")
    assert len(predictions) == len(source.corpus.rows) == scores_of["pascal"]["recordings"]
    truth = {one["id"]: "abnormal" if one["labels"]["abnormal"] == "1" else "normal" for one in source.corpus.rows}
    assert {one["recording"]: one["right"] for one in predictions} == truth
    words = mc.questions(
        [one | {"labels": {"murmur_status": "Absent"}} for one in source.corpus.rows],
        batches.key_words(run.config.seed, EVALUATION), ("murmur",),
    )  # fmt: skip
    for one, question in zip(predictions, words, strict=True):
        likeliest = max(STATUS, key=lambda w: float(one[f"log_p_{mc.LETTERS[question.options.index(w)]}"]))
        assert one["answered"] == ("normal" if likeliest == "Absent" else "abnormal")
    databases = {one["id"]: one["database"] for one in source.corpus.rows}
    for name, scores in scores_of.items():
        rows = [one for one in predictions if name in ("pascal", databases[one["recording"]])]
        right = [one["right"] == one["answered"] for one in rows]
        assert scores["accuracy"]["value"] == pytest.approx(np.mean(right))
        for word in ("normal", "abnormal"):
            called = [r for r, one in zip(right, rows, strict=True) if one["answered"] == word]
            wanted = pytest.approx(np.mean(called)) if called else None
            assert scores[f"precision_{word}"]["value"] == wanted
        abnormal = np.mean([one["right"] == "abnormal" for one in rows])
        assert scores["majority_accuracy"] == pytest.approx(max(abnormal, 1 - abnormal))
    assert set(scores_of) == {"pascal", "pascal-a", "pascal-b"}


def test_a_data_set_is_heard_recording_by_recording(pascal):
    recordings = [one for one in datasets.load("pascal", pascal)[0] if one.labels.get("abnormal") in ("0", "1")]
    whole, _ = decode_recordings(recordings, llm.RATE_HZ)
    load_unheard("pascal", pascal)  # what it imports is not to be counted
    tracemalloc.start()
    corpus = load_unheard("pascal", pascal).corpus
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < whole.bytes / 4
    assert corpus.rows == whole.rows
    np.testing.assert_array_equal(corpus.lengths, whole.lengths)
    for i in range(len(whole.rows)):
        np.testing.assert_array_equal(corpus.read(i), whole.read(i))


def test_segments_of_pascal_are_found_by_file_name(run_of, pascal, tmp_path):
    unheard = load_unheard("pascal", pascal)
    front_end = run_of({"front_end.kind": "crop"}).config.front_end
    with pytest.raises(ValueError, match=r"have no \.tsv there"):
        unheard_source(unheard, front_end, tmp_path)
    for path in pascal.glob("set_*/*.wav"):
        write_tsv([(0.0, 0.2, 4), (0.2, 0.3, 1), (0.3, 0.5, 2), (0.5, 0.6, 3)], tmp_path / f"{path.stem}.tsv")
    assert len(unheard_source(unheard, front_end, tmp_path).read(0)) == round(0.4 * llm.RATE_HZ)


@pytest.fixture(scope="module")
def workdirs(tiny_llm, prepared_16k, corpus, make_config, tmp_path_factory):
    """Two runs as training leaves them, plain and gated, but with an adapter that learnt nothing."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "segments").mkdir()
    for one in corpus.rows:
        write_tsv(one["annotations"], folder / "segments" / f"{one['id']}.tsv")
    base, _ = llm.load(tiny_llm, "float32", "sdpa")
    for name, changes in {
        "plain": {},
        "gated": {"front_end.kind": "gate", "front_end.segments": str(folder / "segments")},
    }.items():
        config = make_config({"data.prepared": str(prepared_16k), **changes}, "audio_llm")
        workdir = folder / name
        split = splits.make(corpus.rows, "person", "murmur_status", 0, tuple(config.split.fractions))
        splits.save(split, workdir / "split.json")
        (workdir / "config.json").write_text(json.dumps(plain_config(config)))
    adapted = llm.add_lora(base, config.lora)
    for name in ("plain", "gated"):
        llm.save_adapter(adapted, folder / name / "checkpoints" / "best-00000007" / "adapter")
    return folder


def test_runs_stand_side_by_side_with_the_papers_figures(workdirs, tiny_llm, pascal, tmp_path, monkeypatch):
    monkeypatch.setattr(conclude, "_GENERATED", 2)
    segments = tmp_path / "segments"
    segments.mkdir()
    for path in pascal.glob("set_*/*.wav"):
        write_tsv([(0.0, 0.1, 4), (0.1, 0.2, 1), (0.2, 0.5, 2), (0.5, 0.6, 3)], segments / f"{path.stem}.tsv")
    both = [str(workdirs / "plain"), str(workdirs / "gated")]
    results = comparison.score(
        str(tiny_llm), both, tmp_path / "out", zero_shots={"pascal": str(pascal)}, segments={"pascal": str(segments)}
    )
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == results
    plain, gated = results["runs"].values()
    assert (plain["front_end"], gated["front_end"]) == ("N.S", "W.S (gate)")
    assert plain["test"]["tasks"].keys() == gated["test"]["tasks"].keys()
    assert plain["test"]["letters"]["share"] != gated["test"]["letters"]["share"]  # they hear another thing
    assert plain["control"]["letters"]["share"] != plain["test"]["letters"]["share"]
    assert plain["split"]["people_apart"]
    assert plain["test"]["asked"] == gated["test"]["asked"]

    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == PREDICTION_FIELDS
    plain_rows = [one for one in rows if one["run"] == "plain"]
    test = [one for one in plain_rows if one["part"] == "test"]
    assert len(test) == plain["test"]["questions"]
    for task, scores in plain["test"]["tasks"].items():
        right = [one["right"] == one["answered"] for one in test if one["task"] == task]
        assert scores["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert {one["part"] for one in plain_rows} >= {"test", "shuffled audio", "pascal"}

    first, second, *_, third = tables([plain, gated])
    features = ["Timing", "Shape", "Grading", "Pitch", "Quality"]
    assert [line[0].removesuffix(" (one class)") for line in first.body] == features
    assert first.body[2][-3:] == [0.334, 0.334, 0.966]
    assert second.body[-1][-3:] == [0.637, 0.756, 0.832]
    assert second.body[-1][1] == plain["test"]["patients"]["weighted_accuracy"]
    assert second.body[-1][4] == gated["test"]["patients"]["weighted_accuracy"]
    assert third.title.startswith("Table 3")
    precision = next(line for line in third.body if line[0].startswith("pascal-b") and "precision abnormal" in line[0])
    assert precision[-2:] == [0.40, 0.625]
    for table in (first, second, third):
        assert {len(line) for line in table.body} == {len(table.head)}

    text = summary(results)
    assert "cannot be compared" not in text
    assert "its weights are random, and accuracies say little" in " ".join(text.split())
    assert "gated, W.S (gate)" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "weights are random" in page
    assert "Table 3: normal or abnormal, zero-shot" in page
    assert 'class="gauge"' in page
    assert "http" not in page.replace("http-equiv", "")


def test_runs_with_different_test_people_are_told_apart(workdirs, tiny_llm, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(conclude, "_GENERATED", 2)
    other = shutil.copytree(workdirs / "plain", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "seed": 1}))
    split = splits.make(corpus.rows, "person", "murmur_status", 1, tuple(config["split"]["fractions"]))
    splits.save(split, other / "split.json")
    results = comparison.score(str(tiny_llm), [str(workdirs / "plain"), str(other)], tmp_path / "out")
    sentence = "These runs were judged on different people: they cannot be compared with each other"
    assert summary(results).count(sentence) == 3  # tables 1, 2 and the patients'
    assert (tmp_path / "out" / "report.html").read_text().count(sentence) == 5  # scores and task by task, too


def test_the_checkpoint_itself_can_be_scored(prepared_16k, tiny_llm, tmp_path, monkeypatch):
    monkeypatch.setattr(conclude, "_GENERATED", 2)
    config = comparison.plain_config()
    config.questions.tasks, config.evaluation.resamples = ("murmur", "systolic_pitch"), 20
    monkeypatch.setattr(comparison, "plain_config", lambda: config)
    results = comparison.score(str(tiny_llm), [], tmp_path, prepared=str(prepared_16k))
    [(name, one)] = results["runs"].items()
    assert name == tiny_llm.name
    assert one["test"]["tasks"]["murmur"]["majority_from"] == "test"
    assert one["split"] is None
    assert "Without training questions the majority is that of the test questions" in summary(results)


def test_what_cannot_be_scored_is_named(workdirs, tiny_llm, pascal, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: not a run's config"):
        comparison.score(str(tiny_llm), [str(tmp_path)], tmp_path / "out")
    (tmp_path / "config.json").write_text('{"task": {"name": "cnn"}}')
    with pytest.raises(ValueError, match="a run of task 'cnn'"):
        comparison.score(str(tiny_llm), [str(tmp_path)], tmp_path / "out")
    with pytest.raises(ValueError, match=r"gated hears through front_end\.kind=gate; give --segments=pascal:DIR"):
        comparison.score(str(tiny_llm), [str(workdirs / "gated")], tmp_path / "out", zero_shots={"pascal": str(pascal)})
    with pytest.raises(ValueError, match="names a run twice"):
        comparison.score(str(tiny_llm), [str(workdirs / "gated")] * 2, tmp_path / "out")
    with pytest.raises(datasets.DatasetError, match="no such folder"):
        load_unheard("pascal", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["circor:DIR", "pascal", "pascal:"])
def test_a_bad_list_of_folders_is_named(word):
    assert folders("zero_shot", ["cinc2016:a:b"]) == {"cinc2016": "a:b"}
    with pytest.raises(ValueError, match=f"--zero_shot={word}: need DATASET:DIR with one of cinc2016, pascal"):
        folders("zero_shot", [word])


@pytest.mark.slow
def test_the_command_prints_tables_and_writes_the_files(workdirs, tiny_llm, tmp_path, run_command):
    words = (f"--model={tiny_llm}", f"--workdir={workdirs / 'plain'}", f"--out={tmp_path / 'out'}", "--part=validation")
    done = run_command("audio_llm.score", *words)
    assert done.returncode == 0, done.stderr
    assert "Table 1: systolic murmurs" in done.stdout
    assert "The adapter was chosen by its accuracy on these very people" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json", "predictions.csv", "report.html"}
