"""The classical chain on simulated PASCAL clips: features, the paper's experiment, a run, and its classifier again."""

from __future__ import annotations

import csv
import importlib.util
import json
import pathlib

import numpy as np
import pytest

from pcgjax.bench.classical import peer_features
from pcgjax.classical.classifiers import fit, make_classifier
from pcgjax.classical.experiment import _resampled, draw_test, experiment
from pcgjax.classical.features import classical_features
from pcgjax.classical.picking import picking
from pcgjax.classical.run import load_classical, train_classical
from pcgjax.classical.selection import selected
from pcgjax.data import splits
from pcgjax.data.corpus import from_prepared, in_memory, in_rows
from pcgjax.pages.classical import CLASSIFIERS, PROTOCOLS, SCORES

ROOT = pathlib.Path(__file__).resolve().parents[2]


def make_config(changes: dict | None = None):
    spec = importlib.util.spec_from_file_location("classical_config", ROOT / "configs" / "classical.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    small = {"train.epochs": 30, "model.hidden": 8, "experiment.runs": 2, "evaluation.resamples": 20}
    config.update_from_flattened_dict({**small, **(changes or {})})
    return config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """24 simulated people in PASCAL's layout at 1000 Hz, set A and its marks too."""
    from pcgjax import prepare
    from pcgjax.datasets import synthetic

    folder = tmp_path_factory.mktemp("pascal")
    synthetic.write(folder / "source", people=36, recordings_per_person=2, duration_s=(3.0, 4.0), layout="pascal")
    prepare.prepare("pascal", folder / "source", folder / "prepared", 1000, workers=1)
    return folder


@pytest.fixture(scope="module")
def corpus(prepared):
    return from_prepared(prepared / "prepared")


@pytest.fixture(scope="module")
def chosen(corpus):
    return selected(corpus, make_config())[0]


@pytest.fixture(scope="module")
def ran(prepared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = make_config({"data.prepared": str(prepared / "prepared")})
    return workdir, config, train_classical(config, workdir)


def test_selected_is_clean_set_b(corpus, chosen):
    assert {row["database"] for row in corpus.rows} == {"pascal-a", "pascal-b"}
    assert {row["database"] for row in chosen.rows} == {"pascal-b"}
    assert all(row["labels"]["noisy"] == "0" and "murmur" in row["labels"] for row in chosen.rows)
    clips = [i for i, row in enumerate(corpus.rows) if row["id"] == chosen.rows[3]["id"]]
    np.testing.assert_array_equal(chosen.read(3), corpus.read(clips[0]))
    everyone, target = selected(corpus, make_config({"data.database": "pascal-a", "task.target": "abnormal"}))
    assert {row["database"] for row in everyone.rows} == {"pascal-a"}
    assert target == "abnormal"


@pytest.mark.parametrize("changes", [{"data.database": "pascal-c"}, {"task.target": "mitral"}])
def test_selected_names_what_is_wrong(corpus, changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"{name}='{value}'"):
        selected(corpus, make_config(changes))


def test_features_are_those_of_a_scipy_and_librosa_loop(chosen):
    config = make_config()
    made = classical_features(chosen, config)
    expected = peer_features(chosen, config)
    assert made.values.shape == (len(made.indices), 2 * 257)
    assert sorted(expected) == made.indices.tolist()
    off = [np.abs(10 * np.log10(own / expected[i])).max() for i, own in zip(made.indices, made.values, strict=True)]
    # A stretch whose edge falls on another frame in float64 is another stretch: rare.
    assert np.quantile(off, 0.9) < 0.01
    config.features.decibels = True
    np.testing.assert_allclose(classical_features(chosen, config).values, 10 * np.log10(made.values), atol=1e-3)


def test_clips_without_a_cycle_are_left_out_and_named(chosen):
    config = make_config()
    rng = np.random.default_rng(0)
    clips = [chosen.read(0), np.zeros(3000, np.int16), np.ones(20, np.int16), np.int16(rng.normal(size=300) * 99)]
    rows = [{**chosen.rows[i], "id": f"clip{i}"} for i in range(4)]
    made = classical_features(in_memory(rows, clips, 1000), config)
    assert made.indices.tolist() == [0]
    assert made.left_out == [{"id": f"clip{i}", "reason": "no cycle found"} for i in (1, 2, 3)]
    config.features.burg_order = 400  # longer than any systole
    made = classical_features(in_memory(rows[:1], clips[:1], 1000), config)
    assert not len(made.values)
    assert made.stretches["too_short"] > 0
    assert made.left_out[0]["reason"].startswith("no systole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"features.burg_order": 0}, "Burg order 0"), ({"features.nfft": 1}, "features.nfft=1"),
     ({"features.threshold": float("nan")}, "features.threshold=nan"),
     ({"features.high_hz": 500.0}, "cut-off 500.0 Hz"), ({"features.hop_s": 0.015}, "multiple of it")],
)  # fmt: skip
def test_features_that_fit_no_data(chosen, changes, message):
    with pytest.raises(ValueError, match=message):
        classical_features(chosen, make_config(changes))


def test_people_are_apart_and_records_stratified(chosen):
    y = chosen.labels("murmur").astype(int)
    people = np.array([row["person"] for row in chosen.rows])
    for seed in range(3):
        test = draw_test(chosen.rows, y, "person", "murmur", 0.3, seed)
        assert not set(people[test]) & set(people[~test])
        assert 0.15 < test.mean() < 0.45
        test = draw_test(chosen.rows, y, "record", "murmur", 0.3, seed)
        assert [test[y == v].sum() for v in (0, 1)] == [round(0.3 * (y == v).sum()) for v in (0, 1)]
    assert set(people[test]) & set(people[~test])


def test_too_few_of_a_class(chosen):
    y = chosen.labels("murmur").astype(int)
    few = np.r_[np.flatnonzero(y == 0), np.flatnonzero(y == 1)[:2]]
    for protocol in PROTOCOLS:
        with pytest.raises(splits.SplitError, match="too few"):
            draw_test([chosen.rows[i] for i in few], y[few], protocol, "murmur", 0.3, 0)
    with pytest.raises(splits.SplitError, match="0 and 3 recordings"):
        fit("knn", make_config(), 0, np.ones((3, 2)), np.ones(3))


def test_classifiers_have_the_published_settings():
    config = make_config({"train.epochs": 5000, "model.hidden": 150})
    knn, svm, mlp, logistic = (make_classifier(name, config, 0)[-1] for name in CLASSIFIERS)
    assert (knn.n_neighbors, knn.metric, knn.p) == (5, "minkowski", 2)
    assert (svm.kernel, svm.tol) == ("poly", 0.002)
    assert (mlp.hidden_layer_sizes, mlp.alpha, mlp.max_iter) == ((150,), 0.5, 5000)
    assert logistic.C == 1.30


def test_svm_probability_has_the_order_of_its_margin():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), np.arange(60) % 2
    x[y == 1] += 1
    p = fit("svm", make_config(), 0, x, y)(x)
    model = make_classifier("svm", make_config(), 0).fit(x, y)
    np.testing.assert_array_equal(p >= 0.5, model.predict(x) == 1)


def test_experiment(chosen, ran):
    table = json.loads((ran[0] / "experiment.json").read_text())
    assert len(table["rows"]) == 16
    for row in table["rows"]:
        for s in row["scores"].values():
            assert s["low"] <= s["mean"] <= s["high"]
        assert set(row["paper"]) == set(SCORES)
    by = {(r["classifier"], r["set"], r["protocol"]): r for r in table["rows"]}
    # The paper's printed "Sens" is that of the normal clips.
    assert by["svm", "unbalanced", "record"]["paper"]["specificity"] == 0.9833
    n = len(chosen.rows)
    assert sum(table["counts"]["unbalanced"]["recordings"]) == n - len(table["left_out"])
    one, other = table["counts"]["balanced"]["recordings"]
    assert one == other
    normal, murmur = table["counts"]["unbalanced"]["recordings"]
    for t in table["trivial"]:
        assert t["scores"]["auc"] == 0.5
        if t["set"] == "unbalanced" and t["protocol"] == "record":
            n, m = round(0.3 * normal), round(0.3 * murmur)
            assert t["scores"]["accuracy"] == pytest.approx(max(n, m) / (n + m))
    assert experiment(chosen, ran[1]) == table


def test_experiment_on_features_that_tell_all_and_nothing(chosen):
    config = make_config()
    made = classical_features(chosen, config)
    y = chosen.labels("murmur")[made.indices]
    rng = np.random.default_rng(0)
    all_told = rng.normal(size=made.values.shape).astype(np.float32) / 9 + y[:, None]
    for row in experiment(chosen, config, made._replace(values=all_told))["rows"]:
        assert row["scores"]["auc"]["mean"] == row["scores"]["sensitivity"]["best"] == 1
    nothing = np.zeros_like(all_told)
    for row in experiment(chosen, config, made._replace(values=nothing))["rows"]:
        assert row["scores"]["auc"]["mean"] == 0.5


def test_widened_interval():
    values = [0.7, 0.8, 0.75, 0.85, 0.7]
    widened = _resampled(values, 0.3 / 0.7)
    half = 2.7764451 * np.std(values, ddof=1) * np.sqrt(1 / 5 + 0.3 / 0.7)  # t of 4 degrees of freedom
    assert widened["high"] - widened["mean"] == pytest.approx(half, rel=1e-6)


def test_workdir(ran):
    workdir, _, results = ran
    for name in ("config.json", "metrics.jsonl", "metrics.json", "predictions.csv", "report.html", "split.json"):
        assert (workdir / name).stat().st_size
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines} == {"train", "validation", "test"}
    assert all("loss" in line for line in lines)
    assert len(lines) == 12
    assert results["chosen"] in CLASSIFIERS
    assert results["split"]["people_apart"]
    page = (workdir / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "by person" in page
    assert not [path for path in workdir.rglob("*") if path.suffix in (".pkl", ".pickle", ".joblib")]


def test_run_again_is_the_same_run(ran, tmp_path):
    workdir, config, results = ran
    before = (workdir / "predictions.csv").read_bytes()
    again = train_classical(config, workdir)
    assert again["classifiers"] == results["classifiers"]
    assert (workdir / "predictions.csv").read_bytes() == before
    other = config.copy_and_resolve_references()
    other.features.burg_order = 5
    with pytest.raises(ValueError, match=r"features\.burg_order=10, now 5"):
        train_classical(other, workdir)


def test_classifier_again_from_plain_arrays(ran, chosen):
    workdir, _, _ = ran
    config, classifies, sample_rate_hz, answer = load_classical(workdir)
    assert (config.task.target, classifies, sample_rate_hz) == ("murmur", True, 1000)
    silence = in_memory(chosen.rows[:1], [np.zeros(3000, np.int16)], 1000)
    assert np.isnan(answer(silence)).all()
    log_p = answer(chosen)
    place = {row["id"]: i for i, row in enumerate(chosen.rows)}
    with (workdir / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert np.exp(log_p[place[row["id"]], 0]) == pytest.approx(float(row["probability"]), rel=1e-6)
    (workdir / "checkpoints" / "best.npz").rename(workdir / "checkpoints" / "away.npz")
    (workdir / "checkpoints" / "best.npz").write_bytes(b"cut")
    with pytest.raises(ValueError, match="train again"):
        load_classical(workdir)
    (workdir / "checkpoints" / "away.npz").replace(workdir / "checkpoints" / "best.npz")


def test_picking_beside_marks_and_states(corpus):
    scores = picking(corpus, make_config())
    assert scores["marks"]["S1_S2_f1_100ms"] > 0.8
    assert scores["marks"]["sound_f1_100ms"] >= scores["marks"]["S1_S2_f1_100ms"]
    states = [{**row, "annotations": [(t, t + 0.1, s) for t, _, s in row["annotations"]]} for row in corpus.rows]
    assert "annotated" in picking(in_rows(corpus, states), make_config())
    with pytest.raises(ValueError, match="no recording is annotated"):
        picking(in_rows(corpus, [{**r, "annotations": []} for r in corpus.rows]), make_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"train.epochs": 0}, "train.epochs=0"), ({"train.select": "loss"}, "train.select='loss'"),
     ({"parallel.strategy": "vmap"}, "parallel.strategy='vmap'"), ({}, "data.prepared is empty"),
     ({"evaluation.threshold": 2.0}, "evaluation.threshold=2.0")],
)  # fmt: skip
def test_bad_fields(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_classical(make_config(changes), tmp_path)
