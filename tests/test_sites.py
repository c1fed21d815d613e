"""The site report: what a model's features tell of the database, and that the probe cannot cheat."""

from __future__ import annotations

import csv
import json
import operator
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from sklearn.metrics import balanced_accuracy_score

from pcgjax import metrics, prepare, sites, systems, tasks
from pcgjax.classical.run import train_classical
from pcgjax.data import batches
from pcgjax.data.corpus import from_prepared, in_memory
from pcgjax.data.plan import evaluation_plan
from pcgjax.datasets import synthetic
from pcgjax.pages.sites import probe_card, summary
from pcgjax.runs.config import load_config
from pcgjax.runs.sites import measure, probe, statistics
from pcgjax.tasks.base import split_model
from pcgjax.training.answers import embed, load_model, make_predict
from pcgjax.training.loop import train

RNG = np.random.default_rng(0)
PEOPLE, EACH = 30, 4  # in each of three databases, recordings each
DATABASES = np.repeat(["a", "b", "c"], PEOPLE * EACH)
PERSONS = np.repeat([f"p{i}" for i in range(PEOPLE)] * 3, EACH)


def probed(x):
    return probe(x, DATABASES.tolist(), PERSONS.tolist(), resamples=200)


# ---------------------------------------------------------------------------------------------------------- the probe


def test_the_probe_finds_the_database_in_features_that_carry_it():
    x = RNG.normal(size=(len(DATABASES), 5))
    x[:, 2] += 8 * (DATABASES == "b") - 8 * (DATABASES == "c")
    found = probed(x)
    assert found["balanced_accuracy"]["value"] > 0.98
    assert found["databases"] == ["a", "b", "c"]
    assert (found["recordings"], found["people"], found["features"], found["folds"]) == (360, 90, 5, 5)


def test_the_probe_is_near_chance_on_noise():
    found = probed(RNG.normal(size=(len(DATABASES), 5)))
    score = found["balanced_accuracy"]
    assert found["chance"] == pytest.approx(1 / 3)
    assert score["low"] < 1 / 3 < score["high"]
    assert score["high"] - score["low"] < 0.25


def test_features_that_tell_the_person_alone_do_not_help_the_probe():
    # Each person's recordings are exactly alike: a probe that met somebody in both parts would know the database.
    who = np.repeat(np.arange(3 * PEOPLE), EACH)
    x = RNG.normal(size=(3 * PEOPLE, 200))[who]
    assert probed(x)["balanced_accuracy"]["value"] < 0.5


def test_the_probe_scores_as_scikit_learn_does():
    x = RNG.normal(size=(len(DATABASES), 3))
    x[:, 0] += DATABASES == "c"
    keep = np.r_[:360:2, 240:300]  # databases of unequal size
    found = probe(x[keep], DATABASES[keep].tolist(), PERSONS[keep].tolist(), resamples=100)
    counts = np.array(found["confusion"])
    truth, said = (np.repeat(index.ravel(), counts.ravel()) for index in np.indices(counts.shape))
    assert found["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(truth, said))
    assert found["accuracy"]["value"] == pytest.approx((truth == said).mean())
    assert found["majority_accuracy"] == pytest.approx(counts.sum(1).max() / counts.sum())
    for score in (found["balanced_accuracy"], found["accuracy"]):
        assert score["low"] < score["value"] < score["high"]


def test_one_database_cannot_be_told_from_another():
    with pytest.raises(ValueError, match="two databases"):
        probe(np.zeros((4, 2)), ["a"] * 4, list("pqrs"))


def test_statistics_follow_level_and_band():
    time_s = np.arange(4000) / 2000
    waves = [np.int16(level * np.sin(2 * np.pi * f * time_s)) for level, f in ((20000, 50), (2000, 50), (20000, 300))]
    found = statistics(in_memory([{}] * 3, waves, 2000), np.arange(3))
    assert found[0, 0] - found[1, 0] == pytest.approx(20, abs=0.1)  # dB
    assert found[:, 1:].argmax(1).tolist() == [1, 1, 6]  # 40 to 60 Hz, 280 to 400 Hz


# ------------------------------------------------------------------------------------------------------- the features


@pytest.mark.parametrize("name", ["cnn", "hinf_lstm", "vit"])
def test_the_last_unit_of_the_mean_features_is_the_mean_logit(make_config, prepared, name):
    config = make_config({"features.window_s": 1.0}, name)
    corpus = from_prepared(prepared)
    task = tasks.make(config, corpus.sample_rate_hz)
    model = task.init(nnx.Rngs(3))
    key, labels, some = jax.random.key(0), corpus.labels("abnormal"), np.arange(5)
    plan = evaluation_plan(some, corpus.lengths, task.geometry, 8)
    data = jax.device_put(batches.block(corpus, labels, np.arange(len(corpus.rows))))
    size = plan.capacities[plan.capacity[0]]

    @jax.jit
    def both(ids):
        batch = batches.gather_batch(data, ids, size, task.geometry)
        values, recording, real = task.inputs(batch, size, key)
        logits = model.half_overlapping(*values) if task.geometry.shared else model(*values)
        return embed(task, model, batch, size, key), (logits, recording, real)

    ids = plan.ids[0, 0]
    h, (logits, recording, real) = jax.device_get(both(ids))
    unit = {"cnn": "output", "hinf_lstm": "recurrent.output", "vit": "head"}[name]
    unit = operator.attrgetter(unit)(model)
    ours = (h @ unit.kernel[...] + unit.bias[None])[:, 0]
    for place in range((ids >= 0).sum()):
        own = logits[real & (recording == place)]
        assert len(own) > 1
        np.testing.assert_allclose(ours[place], own.mean(), rtol=1e-4, atol=1e-5)
    assert h.shape == (len(ids), model.feature_count)


@pytest.fixture(scope="module")
def sited(tmp_path_factory):
    """48 people of six clinics, prepared."""
    folder = tmp_path_factory.mktemp("sited")
    synthetic.write(folder / "source", people=48, recordings_per_person=1, duration_s=(3.0, 3.2), rate_hz=1000)
    prepare.prepare("cinc2016", folder / "source", folder / "prepared", workers=1)
    return folder / "prepared"


@pytest.fixture(scope="module")
def run(make_config, sited, tmp_path_factory):
    """A short run that leaves most people unheard."""
    workdir = tmp_path_factory.mktemp("run")
    config = make_config({"data.prepared": str(sited), "train.epochs": 1, "split.fractions": (0.3, 0.3, 0.4)})
    train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def reported(run, run_command):
    """What the command said of that run, and its sites.json."""
    done = run_command("sites", f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((run / "sites.json").read_text())


def test_the_report_of_a_run(run, reported):
    said, found = reported
    results, split = (json.loads((run / name).read_text()) for name in ("metrics.json", "split.json"))
    assert found["test"] == results["test"]
    for name, one in found["test"]["per_database"].items():
        [line] = [line for line in said.splitlines() if f"{name}:" in line]
        value = one["auc"]["value"]
        assert ("one class only" if value is None else f"{value:.3f}") in line
    # Nobody is asked whom the model was trained on.
    assert found["probed"]["recordings"] == len(split["validation"]) + len(split["test"])
    assert set(found["probes"]) == {"trained", "untrained", "statistics"}
    assert found["probes"]["trained"]["features"] == found["probes"]["untrained"]["features"] == 8
    assert found["probes"]["trained"]["confusion"] != found["probes"]["statistics"]["confusion"]
    page = (run / "sites.html").read_text()
    assert page.count("<svg") >= 2
    assert "Database predicted from" in page


def test_the_untrained_net_is_that_of_the_seed(run):
    config, task, _, _, _, rate_hz, _ = load_model(run)
    corpus = from_prepared(config.data.prepared)
    some = np.arange(6)
    found = systems.features(config, run, corpus, some)
    _, params, rest = split_model(tasks.make(config, rate_hz).init(nnx.Rngs(jax.random.key(config.seed))))
    graphdef = split_model(task.init(nnx.Rngs(1)))[0]
    embed = make_predict(task, graphdef, corpus, some, 4, jax.random.key(0), embedding=True)
    np.testing.assert_allclose(found["untrained"], embed(params, rest), rtol=1e-4, atol=1e-6)
    assert np.abs(found["trained"] - found["untrained"]).max() > 1e-3


def test_the_database_alone_answers_with_its_share_in_training(run, reported):
    corpus = from_prepared(json.loads((run / "config.json").read_text())["data"]["prepared"])
    split = json.loads((run / "split.json").read_text())
    row_of = {row["id"]: row for row in corpus.rows}
    label = lambda row: int(row["labels"]["abnormal"])
    shares: dict = {}
    for name in split["train"]:
        shares.setdefault(row_of[name]["database"], []).append(label(row_of[name]))
    rows = [row_of[name] for name in split["test"]]
    everywhere = np.mean([value for own in shares.values() for value in own])
    p = [np.mean(shares.get(row["database"], [everywhere])) for row in rows]
    expected = metrics.binary([label(row) for row in rows], p)["auc"]
    assert reported[1]["database_alone"]["auc"]["value"] == pytest.approx(expected)


def test_people_who_were_heard_are_not_probed(run, tmp_path):
    # As a split by recording leaves it: most of the test part is of people of the training part.
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    split = json.loads((workdir / "split.json").read_text())
    with (workdir / "predictions.csv").open(newline="") as file:
        database = {row["id"]: row["database"] for row in csv.DictReader(file)}
    asked = [*split["validation"], *split["test"]]
    split["train"] += [name for name in asked if database[name] != "cinc2016-a"]
    split.pop("sha256")
    (workdir / "split.json").write_text(json.dumps(split))
    found = measure(workdir, systems.features)
    assert found["probed"]["recordings"] == sum(database[name] == "cinc2016-a" for name in asked) > 0
    assert found["probes"] == {}
    assert "no probe" in found["probed"]["note"]
    assert "No probe" in probe_card(found)
    assert "no probe" in summary(found)


@pytest.mark.slow
def test_the_classical_chain(sited, tmp_path):
    changes = {"data.prepared": str(sited), "experiment.runs": 0, "split.fractions": (0.3, 0.3, 0.4),
               "train.epochs": 50, "evaluation.resamples": 10, "features.nfft": 32}  # fmt: skip
    train_classical(load_config("classical", changes), tmp_path)
    found = sites.write(tmp_path)
    assert set(found["probes"]) == {"trained", "statistics"}
    assert found["probes"]["trained"]["features"] == 34


def test_a_run_that_is_no_classifier_is_refused(run_command, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"test": {"loss": 0.9, "accuracy": 0.5}}))
    (tmp_path / "config.json").write_text(json.dumps({"task": {"name": "ssamba_pretrain"}}))
    done = run_command("sites", f"--workdir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.endswith("a model of task 'ssamba_pretrain' does not classify recordings\n")


def test_a_run_that_has_not_ended_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a finished run has one"):
        measure(tmp_path, systems.features)


@pytest.mark.slow
def test_encoders_in_pytorch(sited, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from pcgjax.audio_llm.checkpoints import newest
    from pcgjax.audio_llm.encoders.clips import batch_of, clips_of, geometry_of, load_weights
    from pcgjax.audio_llm.encoders.model import make_encoder
    from pcgjax.audio_llm.encoders.train import train_encoder

    prepare.prepare("cinc2016", sited.parent / "source", tmp_path / "prepared", 16000, workers=1)
    changes = {"data.prepared": str(tmp_path / "prepared"), "split.kind": "person", "split.fractions": (0.3, 0.3, 0.4),
               "features.window_s": 0.7, "model.size": "tiny", "optimizer.learning_rate": 0.003,
               "optimizer.warmup_steps": 2, "train.epochs": 1, "train.batch_recordings": 5,
               "evaluation.resamples": 10}  # fmt: skip
    config = load_config("distilhubert", changes)
    train_encoder(config, tmp_path / "run")
    corpus = from_prepared(tmp_path / "prepared")
    some = np.arange(4)
    found = systems.features(config, tmp_path / "run", corpus, some)
    # The head on the mean features is the mean of the clips' logits, before training and after.
    torch.manual_seed(config.seed)
    model, extractor = make_encoder(config.model)
    geometry = geometry_of(config, corpus)
    for name, put in (("untrained", False), ("trained", True)):
        if put:
            load_weights(model, newest(tmp_path / "run", "best"))
        with torch.no_grad():
            for row, index in enumerate(some):
                clips = clips_of(corpus, [index], geometry)
                samples, mask = batch_of(corpus, clips, extractor, geometry.window)
                mean = float(model.eval()(samples, mask).mean())
                head = model.head(torch.from_numpy(found[name][row]).float())
                assert float(head) == pytest.approx(mean, abs=1e-4)
    assert np.abs(found["trained"] - found["untrained"]).max() > 1e-4
