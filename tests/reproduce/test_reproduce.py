"""Every paper's tables: what is run, what is not and why, what a stopped command leaves, and what the table says."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from pcgjax import metrics
from pcgjax.datasets import synthetic
from pcgjax.pages import reproduce as reproduce_page
from pcgjax.pages.words import CLASSIFIER_WORDS
from pcgjax.published import HINF_PAPER
from pcgjax.reproduce.job import BUDGETS, CONFIGURATIONS, ENCODERS, PAPERS, Job
from pcgjax.reproduce.plan import plan
from pcgjax.reproduce.rows import left_out, rows_of
from pcgjax.reproduce.run import reproduce
from pcgjax.reproduce.stages import NotRun, Stage, carry_out, saved
from pcgjax.reproduce.work import train_by_record, train_config, train_left_out
from pcgjax.runs.config import load_config

TINY = {
    "classical": {"train.epochs": 30, "model.hidden": 8, "experiment.runs": 2, "evaluation.resamples": 20,
                  "features.nfft": 64},
    "cnn": {"features.window_s": 0.5, "model.filters": (4, 8), "model.hidden": 8, "train.epochs": 1,
            "train.batch_recordings": 8, "evaluation.resamples": 20},
    "hinf_lstm": {"features.window_s": 1.0, "features.n_fft": 128, "features.hop": 64, "features.n_mels": 16,
                  "model.blocks": ((4,), (8,)), "model.hidden": 8, "train.epochs": 2, "sapt.interval": 1,
                  "evaluation.resamples": 20},
    "segmenter_small": {"model.width": 8, "model.depth": 1, "model.d_state": 2, "train.epochs": 1,
                        "features.window_s": 1.0, "optimizer.warmup_steps": 0, "evaluation.resamples": 20},
    "audio_llm": {"optimizer.warmup_steps": 1, "data.clip_s": 1.5, "train.epochs": 1, "evaluation.resamples": 20},
}  # fmt: skip
for _name, _size in (("resnet50", {"model.width": 4, "model.blocks": (1, 1, 1, 1)}),
                     ("mobilenet_v3", {"model.width": 0.25, "model.blocks": 4}),
                     ("vit", {"model.width": 64, "model.blocks": 2, "optimizer.warmup_steps": 2})):  # fmt: skip
    TINY[_name] = {"features.window_s": 1.0, "features.n_fft": 128, "features.hop": 25, "features.n_mels": 20,
                   "train.epochs": 1, "evaluation.resamples": 20, **_size}  # fmt: skip
for _name in ENCODERS:
    TINY[_name] = {"features.window_s": 0.7, "model.size": "tiny", "optimizer.warmup_steps": 2, "train.epochs": 1,
                   "evaluation.resamples": 20}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(BUDGETS, "tiny", TINY)


def write_pascal(folder):
    synthetic.write(folder, people=32, recordings_per_person=2, duration_s=(3.0, 3.4), layout="pascal")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """pascal/ alone."""
    folder = tmp_path_factory.mktemp("source")
    write_pascal(folder / "pascal")
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """OUT of --paper=classical where there is PASCAL alone, and the table."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGETS, "tiny", TINY)
        return out, reproduce("classical", source, out, "tiny")


def rows_by(table):
    return {(row["system"], row["dataset"], row["metric"]): row for row in table["rows"]}


# -------------------------------------------------------------------------------------------------------- the stages


def stage(name, run, after=(), **settings):
    return Stage(name, f"stage {name}", settings, run, after)


def test_a_failure_stops_nothing_but_what_needs_it(tmp_path):
    ran = []

    def broken():
        ran.append("broken")
        raise ValueError("no such\nfield")

    def lacking():
        raise NotRun("no data set x")

    stages = [stage("broken", broken), stage("lacking", lacking), stage("next", lambda: ran.append("next")),
              stage("needs", lambda: ran.append("needs"), ("broken",)),
              stage("needs_too", lambda: ran.append("needs_too"), ("next", "lacking"))]  # fmt: skip
    states = carry_out(stages, tmp_path)
    assert ran == ["broken", "next"]
    assert {name: s["status"] for name, s in states.items()} == {
        "broken": "failed", "lacking": "not run", "next": "done", "needs": "not run", "needs_too": "not run",
    }  # fmt: skip
    assert states["broken"]["why"] == "ValueError: no such field"
    assert states["needs"]["why"] == "stage broken failed: ValueError: no such field"
    assert states["needs_too"]["why"] == "no data set x"
    # What is done is not done again; what failed is tried again, and what needed it then runs.
    stages[0] = stage("broken", lambda: ran.append("mended"))
    states = carry_out(stages, tmp_path)
    assert ran == ["broken", "next", "mended", "needs"]
    assert states["needs"]["status"] == "done"
    assert [path.name for path in tmp_path.iterdir()] == ["stages"]


def test_a_stage_that_named_what_it_lacked_is_tried_again(tmp_path):
    answers = [{"pascal": "no data set pascal"}, {}]
    ran = []
    for _ in range(3):
        carry_out([stage("a", lambda: ran.append(1) or answers[min(len(ran), 2) - 1])], tmp_path)
    assert len(ran) == 2


def test_changed_settings_are_an_error_that_names_them(tmp_path):
    carry_out([stage("a", lambda: None, epochs=3), stage("b", lambda: None, epochs=1)], tmp_path)
    ran = []
    changed = [stage("c", lambda: ran.append("c")), stage("b", lambda: ran.append("b"), epochs=2)]
    with pytest.raises(ValueError, match=r"stages/b\.json: made with epochs=1, now 2; give another --out"):
        carry_out(changed, tmp_path)
    assert ran == []  # nothing of it: the error comes first


def test_what_ends_the_process_is_no_failure_of_a_stage(tmp_path):
    def stopped():
        raise SystemExit(143)  # as a training that was told to stop and has saved

    with pytest.raises(SystemExit):
        carry_out([stage("a", stopped)], tmp_path)
    assert json.loads((tmp_path / "stages" / "a.json").read_text())["status"] == "begun"
    assert carry_out([stage("a", lambda: None)], tmp_path)["a"]["status"] == "done"


def test_every_paper_has_a_plan_whose_fields_exist(tmp_path):
    for budget in ("small", "full"):
        job = Job(tmp_path, tmp_path, budget, "")
        stages = plan(job, PAPERS)
        seen = set()
        for one in stages:
            assert set(one.after) <= seen, one.name  # each comes after what it needs
            seen.add(one.name)
            if one.run.func in (train_config, train_by_record, train_left_out):
                config = load_config(*one.run.args[:2])
                assert config.data.prepared.startswith(str(tmp_path / "prepared"))
        assert len(seen) == len(stages)
    with pytest.raises(ValueError, match=r"configs/cnn\.py: has no field train\.epoch; nearest: train\.epochs"):
        load_config("cnn", {"train.epoch": 3})


# ------------------------------------------------------------------------------------------------------ the table


def test_the_classical_rows_are_those_of_its_experiment(made):
    out, table = made
    assert json.loads((out / "table.json").read_text())["rows"] == table["rows"]
    experiment = json.loads((out / "runs" / "classical" / "experiment.json").read_text())
    rows = rows_by(table)
    for of in experiment["rows"]:
        row = rows[f"{CLASSIFIER_WORDS[of['classifier']]}, {of['set']}", "PASCAL B", "auc"]
        ours = row["ours_paper_protocol" if of["protocol"] == "record" else "ours_honest"]
        assert ours["value"] == of["scores"]["auc"]["best" if of["protocol"] == "record" else "mean"]
        assert row["status"] == "done"
        assert row["trivial"] == 0.5
    knn = rows["kNN, unbalanced", "PASCAL B", "sensitivity"]
    assert knn["paper"] == 0.60  # of murmurs: the paper calls it specificity
    page = (out / "report.html").read_text()
    assert "kNN, unbalanced" in page
    left = json.loads((out / "runs" / "classical" / "metrics.json").read_text())["features"]["left_out"]
    assert table["left_out"].get("classical chain, PASCAL B, both protocols", []) == left
    assert page.count("<svg") >= 3  # two envelopes, the spectra


def test_a_missing_data_set_is_said_and_no_failure(made):
    _, table = made
    state = table["stages"]["prepare_cinc2016_2000"]
    assert state["status"] == "not run"
    assert "no data set cinc2016" in state["why"]
    row = rows_by(table)["Classical chain", "CinC 2016", "auc"]
    assert row["status"] == "not run"
    assert "no data set cinc2016" in row["why"]
    assert row["ours_honest"] is None


def test_the_same_command_makes_nothing_again(made, source):
    out, table = made
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    again = reproduce("classical", source, out, "tiny")
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()} == before
    assert again["rows"] == table["rows"]


@pytest.mark.parametrize("paper", ["classical", "cnn"])
def test_another_budget_is_refused(made, source, paper):
    # Nor may another paper of the same OUT be made with it: the page would call both by one name.
    with pytest.raises(ValueError, match="made with budget=tiny, now small; give another --out"):
        reproduce(paper, source, made[0], "small")


def test_another_source_is_refused(made, source, tmp_path):
    shutil.copytree(source, tmp_path / "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGETS, "tiny", TINY)
        with pytest.raises(ValueError, match=r"made with source=.*, now .*other; give another --out"):
            reproduce("classical", tmp_path / "other", made[0], "tiny")


def test_what_was_stopped_is_not_done(made, source, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    path = out / "stages" / "classical.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: state[key] for key in ("title", "settings")} | {"status": "begun"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGETS, "tiny", TINY)
        job = Job(source.resolve(), out.resolve(), "tiny", "")
        stages = plan(job, ["classical"])
        row = rows_of(job, "classical", saved(stages, out))[0]
    assert row["status"] == "not run"
    assert row["why"].endswith("stopped before its end")


def test_the_command_says_what_is_wrong(run_command, made, source, tmp_path):
    common = ("reproduce", "--paper=classical")
    done = run_command(*common, f"--source={tmp_path / 'none'}", f"--out={tmp_path}")
    assert done.returncode == 1
    assert "no such folder; it holds cinc2016/, circor/ and pascal/" in done.stderr
    done = run_command(*common, f"--source={source}", f"--out={made[0]}", "--budget=small")
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1
    assert "made with budget=tiny, now small" in done.stderr


def test_a_failed_stage_makes_the_status_1(run_command, tmp_path):
    (tmp_path / "source" / "pascal").mkdir(parents=True)  # nothing in it
    done = run_command("reproduce", "--paper=classical", f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 1
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["stages"]["prepare_pascal_2000"]["status"] == "failed"
    assert "failed: prepare pascal at 2000 Hz: DatasetError" in done.stdout
    assert "DatasetError" in (tmp_path / "out" / "report.html").read_text()


# --------------------------------------------------------------------------------------------- databases left out


def test_runs_that_leave_a_database_out_are_judged_together(tmp_path):
    rng = np.random.default_rng(0)
    cuts = {"x": 0.5, "y": 0.9}
    truth, answers = {}, {}
    for database, cut in cuts.items():
        workdir = tmp_path / database
        workdir.mkdir()
        y = rng.integers(0, 2, 40)
        p = np.clip(0.3 * y + rng.uniform(0, 0.69, 40), 0, 1)
        truth[database], answers[database] = y, p
        with (workdir / "predictions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "person", "database", "class", "label", "probability", "decision", "split", "path"))
            for i in range(40):
                writer.writerow(
                    (f"{database}{i}", f"p{i // 2}", database, "", y[i], p[i], int(p[i] >= cut), "test", "")
                )
                writer.writerow((f"v{i}", f"v{i}", database, "", 1 - y[i], p[i], 0, "validation", ""))  # not judged
        test = {"threshold": cut, "intervals": {"resamples": 50}}
        (workdir / "metrics.json").write_text(json.dumps({"test": test}))
    judged = left_out(tmp_path)
    assert judged["recordings"] == 80
    for database, cut in cuts.items():
        expected = metrics.binary(truth[database], answers[database], cut)
        of_database = judged["per_database"][database]
        for name in ("auc", "accuracy", "f1", "sensitivity"):
            assert of_database[name]["value"] == pytest.approx(expected[name])
    mean = np.mean([metrics.binary(truth[d], answers[d])["auc"] for d in cuts])
    assert judged["mean_database_auc"]["value"] == pytest.approx(mean)
    assert judged["mean_database_auc"]["low"] < mean < judged["mean_database_auc"]["high"]


# ------------------------------------------------------------------------------------------------- whole papers, slow


@pytest.fixture(scope="module")
def all_sets(tmp_path_factory):
    """Simulated cinc2016/, circor/ and pascal/."""
    folder = tmp_path_factory.mktemp("sets")
    common = {"duration_s": (3.0, 3.4)}
    synthetic.write(folder / "cinc2016", people=72, recordings_per_person=2, **common)
    synthetic.write(folder / "circor", people=60, recordings_per_person=1, layout="circor", murmur_fraction=0.6,
                    **common)  # fmt: skip
    synthetic.write(folder / "pascal", people=32, recordings_per_person=2, layout="pascal", **common)
    return folder


@pytest.mark.slow
def test_the_cnn_paper_killed_and_started_again(all_sets, tmp_path, command):
    code = f"""
import sys
from pcgjax.reproduce.job import BUDGETS
from pcgjax.reproduce.run import reproduce
BUDGETS["tiny"] = {TINY!r}
sys.exit(0 if reproduce("cnn", sys.argv[1], sys.argv[2], "tiny") else 1)
"""
    words, environment = command("reproduce")
    words = [words[0], "-c", code, str(all_sets), str(tmp_path)]
    first = tmp_path / "stages" / "cnn_published_filter.json"
    running = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (first.exists() and json.loads(first.read_text())["status"] == "done"):
        assert running.poll() is None and time.monotonic() < deadline  # noqa: PT018
        time.sleep(0.2)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = (tmp_path / "runs" / "cnn_published" / "filter" / "metrics.json").stat().st_mtime_ns
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "cnn_published" / "filter" / "metrics.json").stat().st_mtime_ns == kept
    table = json.loads((tmp_path / "table.json").read_text())
    assert {state["status"] for state in table["stages"].values()} == {"done"}
    rows = rows_by(table)
    row = rows["1D CNN: Filter", "CinC 2016", "accuracy"]
    assert row["paper"] == 0.9734
    assert rows["1D CNN: Filter", "CinC 2016", "auc"]["ours_database_left_out"] is None  # of several models together
    assert "by the model that had not heard it" in row["note"]
    assert "databases were left out of" in rows["1D CNN: No filter", "CinC 2016", "accuracy"]["note"]
    for key in ("ours_paper_protocol", "ours_honest", "ours_database_left_out"):
        assert 0 <= row[key]["value"] <= 1
        assert row[key]["low"] <= row[key]["value"] <= row[key]["high"]
    assert row["site"]["probe"]["trained"]["value"] <= 1
    assert rows["1D CNN: No filter", "CinC 2016", "accuracy"]["paper"] is None
    # One split for all that are compared; the published one tests recordings of people that it trains on.
    runs = tmp_path / "runs"
    assert len({(runs / "cnn_person" / name / "config.json").read_text().count("cinc_people.json") for name in
                CONFIGURATIONS}) == 1  # fmt: skip
    split = json.loads((runs / "cnn_published" / "filter" / "metrics.json").read_text())["split"]
    assert split["leaks"]
    assert not split["people_apart"]
    assert json.loads((runs / "cnn_person" / "filter" / "metrics.json").read_text())["split"]["people_apart"]
    assert "Mean AUC inside databases" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_all_papers_on_simulated_recordings(all_sets, tmp_path):
    pytest.importorskip("peft")
    table = reproduce("all", all_sets, tmp_path, "tiny")
    bad = {name: state["why"] for name, state in table["stages"].items() if state["status"] != "done"}
    assert bad == {}
    assert {row["experiment"] for row in table["rows"]} == set(PAPERS)
    assert all(row["status"] == "done" for row in table["rows"])
    # The classical chain is judged on the people that the nets are judged on.
    people = json.loads((tmp_path / "runs" / "cinc_people.json").read_text())
    with (tmp_path / "runs" / "classical_person" / "predictions.csv").open(newline="") as file:
        judged = {row["id"] for row in csv.DictReader(file) if row["split"] == "test"}
    gone = {one["id"] for one in table["left_out"].get("classical chain, CinC 2016, people apart", [])}
    assert judged == set(people["test"]) - gone
    for system, _ in HINF_PAPER.values():
        row = rows_by(table)[system, "CinC 2016", "f1"]
        assert row["paper"] > 0.6
        assert row["ours_paper_protocol"] is not None
        assert row["ours_honest"] is not None
        assert row["site"]["auc"]
    llm = rows_by(table)["Qwen2-Audio, W.S", "CirCor", "weighted_accuracy"]
    assert "random weights" in llm["note"]
    assert llm["trivial_answer"] == "always Present"
    html = reproduce_page.write(tmp_path, table).read_text()
    for words in ("Task by task", "F1 of all systems", "Four configurations", "zero-shot", "Sites: "):
        assert words in html
    assert "http" not in html.replace("http-equiv", "")
    # The segmenter heard nobody of whom the audio LLM is asked.
    split = json.loads((tmp_path / "runs" / "segmenter_split.json").read_text())
    llm_split = json.loads((tmp_path / "runs" / "llm_split.json").read_text())
    assert not set(split["train"]) & set(llm_split["test"])
    assert set(split["train"]) <= set(llm_split["train"])


def test_a_preparation_that_is_done_is_looked_at_again(tmp_path, caplog):
    """Another source under the same name is refused; one that is gone is told, and its rows stay."""
    what: list[Exception] = []

    def run() -> None:
        if what:
            raise what[0]

    stage = Stage("prepare_x", "prepare x", {}, run, again=True)
    assert carry_out([stage], tmp_path)["prepare_x"]["status"] == "done"
    what.append(ValueError("of another source"))
    with pytest.raises(ValueError, match="prepare x: is done, and now: ValueError: of another source; give another"):
        carry_out([stage], tmp_path)
    assert "Traceback" not in caplog.text
    what[0] = NotRun("x/ is not there")
    assert carry_out([stage], tmp_path)["prepare_x"]["status"] == "done"
    assert "prepare x: is done, and now: x/ is not there; its rows are of what was there" in caplog.text
