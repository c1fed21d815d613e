"""Scores against scikit-learn and the official Challenge evaluation, and the judgement of a run."""

import json
import math
import pathlib
import time

import numpy as np
import pytest
import sklearn.metrics as sk

from pcgjax import metrics

CHALLENGE = json.loads((pathlib.Path(__file__).parent / "fixtures" / "challenge2022.json").read_text())


def one_hot(words, classes):
    return np.array([[c == word for c in classes] for word in words], int)


def scored(rng, n, levels):
    """Labels and probabilities with ties; `levels` distinct probabilities, both ends and 0.5 among them."""
    labels = (rng.random(n) < rng.uniform(0.1, 0.9)).astype(int)
    probabilities = rng.integers(levels, size=n) / (levels - 1)
    return labels, probabilities


def sklearn_scores(y, p, w, threshold):
    """Every score of METRICS by scikit-learn; NaN where undefined (scikit-learn warns and returns 0 or NaN)."""
    d = (p >= threshold).astype(int)
    positive, negative = w[y == 1].sum() > 0, w[y == 0].sum() > 0
    nan = float("nan")
    prf = {"sample_weight": w, "zero_division": np.nan}
    sensitivity = sk.recall_score(y, d, **prf) if positive else nan
    specificity = sk.recall_score(y, d, pos_label=0, **prf) if negative else nan
    return {
        "accuracy": sk.accuracy_score(y, d, sample_weight=w),
        "auc": sk.roc_auc_score(y, p, sample_weight=w) if positive and negative else nan,
        "auprc": sk.average_precision_score(y, p, sample_weight=w) if positive else nan,
        "precision": sk.precision_score(y, d, **prf),
        "recall": sensitivity,
        "f1": sk.f1_score(y, d, **prf),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "mean_accuracy": (sensitivity + specificity) / 2,
        "brier": np.average((p - y) ** 2, weights=w),
    }


# --- official scores


def test_weighted_murmur_accuracy_is_the_official_one():
    cases, classes = CHALLENGE["cases"], CHALLENGE["murmur_classes"]
    labels = one_hot([case["murmur"] for case in cases], classes)
    outputs = np.array([case["murmur_output"] for case in cases])
    assert set(outputs.sum(1).tolist()) == {0, 1}  # some patients were given no class
    got = metrics.weighted_murmur_accuracy(labels, outputs)
    assert got == pytest.approx(CHALLENGE["official"]["murmur"]["weighted_accuracy"], abs=1e-12)


def test_challenge_cost_is_the_official_one():
    cases, classes = CHALLENGE["cases"], CHALLENGE["outcome_classes"]
    labels = one_hot([case["outcome"] for case in cases], classes)
    outputs = np.array([case["outcome_output"] for case in cases])
    assert set(outputs.sum(1).tolist()) == {1, 2}  # some patients were given both classes
    got = metrics.challenge_cost(labels, outputs)
    assert got == pytest.approx(CHALLENGE["official"]["outcome"]["cost"], abs=1e-9)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_one_class_auc_and_auprc_are_the_official_ones(k):
    cases, official = CHALLENGE["cases"], CHALLENGE["official"]["murmur"]
    labels = one_hot([case["murmur"] for case in cases], CHALLENGE["murmur_classes"])[:, k]
    got = metrics.binary(labels, np.array([case["murmur_prob"][k] for case in cases]))
    assert got["auc"] == pytest.approx(official["auroc_classes"][k], abs=1e-12)
    assert got["auprc"] == pytest.approx(official["auprc_classes"][k], abs=1e-12)


def test_ambiguous_outputs_count_as_present_and_abnormal():
    present, unknown, absent = np.eye(3, dtype=int)
    for row in ([0, 0, 0], [0, 1, 1], [1, 1, 1]):
        assert metrics.weighted_murmur_accuracy([present], [row]) == 1
        assert metrics.weighted_murmur_accuracy([unknown], [row]) == 0
    # 5 of 5 + 3 + 1 when all are called Present
    assert metrics.weighted_murmur_accuracy([present, unknown, absent], np.ones((3, 3))) == pytest.approx(5 / 9)
    missed, referred = metrics.challenge_cost([[1, 0]], [[0, 1]]), metrics.challenge_cost([[1, 0]], [[1, 0]])
    assert missed == 10 + 25 + 50_000
    assert referred == 10 + 25 + 397 - 1718 + 11296 + 10_000
    assert metrics.challenge_cost([[1, 0]], [[1, 1]]) == metrics.challenge_cost([[1, 0]], [[0, 0]]) == referred


def test_mean_accuracy_is_balanced_accuracy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        y, d = rng.integers(2, size=(2, 30))
        assert metrics.mean_accuracy(y, d) == pytest.approx(sk.balanced_accuracy_score(y, d))
    assert math.isnan(metrics.mean_accuracy([1, 1], [1, 0]))


def test_official_scores_refuse_what_is_not_zero_one():
    with pytest.raises(ValueError, match=r"outputs.*0 and 1.*0\.5"):
        metrics.weighted_murmur_accuracy([[1, 0, 0]], [[0.5, 0, 0]])
    with pytest.raises(ValueError, match=r"labels.*\(n, 3\)"):
        metrics.weighted_murmur_accuracy([[1, 0]], [[1, 0, 0]])
    with pytest.raises(ValueError, match="outcomes 1, outputs 2"):
        metrics.challenge_cost([[1, 0]], [[1, 0], [0, 1]])
    with pytest.raises(ValueError, match=r"labels.*-1"):
        metrics.mean_accuracy([1, -1], [1, 0])  # CinC 2016's file says -1 for normal
    assert math.isnan(metrics.weighted_murmur_accuracy(np.zeros((0, 3)), np.zeros((0, 3))))
    assert math.isnan(metrics.challenge_cost(np.zeros((0, 2)), np.zeros((0, 2))))


# --- binary scores


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.filterwarnings("ignore")
def test_scores_equal_sklearn(seed):
    rng = np.random.default_rng(seed)
    y, p = scored(rng, int(rng.integers(1, 60)), levels=int(rng.choice([2, 3, 11, 1001])))
    threshold = float(rng.choice([0, 0.3, 0.5, 1]))
    got, want = metrics.binary(y, p, threshold), sklearn_scores(y, p, np.ones(len(y)), threshold)
    assert {k: got[k] for k in want} == pytest.approx(want, nan_ok=True, abs=1e-12)
    cells = sk.confusion_matrix(y, p >= threshold, labels=[0, 1])
    assert [[got["tn"], got["fp"]], [got["fn"], got["tp"]]] == cells.tolist()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_weighted_scores_equal_sklearns_sample_weight(whole):
    rng = np.random.default_rng(int(whole))
    for _ in range(6):
        y, p = scored(rng, 40, levels=7)
        w = rng.integers(4, size=(5, 40)) if whole else rng.random((5, 40)) * (rng.random((5, 40)) < 0.7)
        w[0, y == 1] = 0  # a resample without positives
        got = metrics.binary_weighted(y, p, w, 0.4)
        for r in range(5):
            want = sklearn_scores(y, p, w[r].astype(float), 0.4)
            assert {k: got[k][r] for k in want} == pytest.approx(want, nan_ok=True, abs=1e-12)


def test_chunks_do_not_change_the_scores(monkeypatch):
    rng = np.random.default_rng(0)
    y, p = scored(rng, 30, levels=9)
    w = rng.integers(3, size=(17, 30))
    whole = metrics.binary_weighted(y, p, w)
    monkeypatch.setattr(metrics, "_CHUNK", 100)
    for k, v in metrics.binary_weighted(y, p, w).items():
        np.testing.assert_array_equal(v, whole[k])


def test_undefined_is_nan_never_zero():
    healthy = metrics.binary([0, 0, 0], [0.1, 0.2, 0.3])
    for k in ("auc", "auprc", "precision", "recall", "f1", "sensitivity", "mean_accuracy"):
        assert math.isnan(healthy[k]), k
    assert healthy["specificity"] == healthy["accuracy"] == 1
    quiet = metrics.binary([0, 1], [0.1, 0.2])
    assert math.isnan(quiet["precision"])
    assert quiet["f1"] == quiet["recall"] == 0  # defined: the one positive was missed
    assert all(math.isnan(metrics.binary([], [])[k]) for k in metrics.METRICS)


def test_bad_scores_are_refused_by_name():
    with pytest.raises(ValueError, match=r"probabilities: 1 of 2.*index 1: nan"):
        metrics.binary([0, 1], [0.1, np.nan])
    with pytest.raises(ValueError, match=r"probabilities: 1 of 2.*1\.5"):
        metrics.binary([0, 1], [1.5, 0.1])
    with pytest.raises(ValueError, match="labels"):
        metrics.binary([0, 2], [0.5, 0.1])
    with pytest.raises(ValueError, match="weights"):
        metrics.binary_weighted([0, 1], [0.5, 0.1], np.array([[1.0, -1.0]]))


def test_curves_equal_sklearn():
    rng = np.random.default_rng(3)
    y, p = scored(rng, 80, levels=21)
    for got, want in zip(metrics.roc_curve(y, p), sk.roc_curve(y, p, drop_intermediate=False), strict=True):
        np.testing.assert_allclose(got, want)
    precision, recall, threshold = sk.precision_recall_curve(y, p)
    curve = metrics.pr_curve(y, p)
    np.testing.assert_allclose(curve[0], recall[::-1])
    np.testing.assert_allclose(curve[1], precision[::-1])
    np.testing.assert_allclose(curve[2][1:], threshold[::-1])


def test_class_report_equals_sklearn():
    rng = np.random.default_rng(4)
    y, d = rng.integers(2, size=(2, 50))
    want = sk.classification_report(y, d, output_dict=True)
    got = metrics.class_report(y, d)
    for name, sklearn_name in (("normal", "0"), ("abnormal", "1"), ("mean", "macro avg")):
        for key in ("precision", "recall", "f1", "support"):
            assert got[name][key] == pytest.approx(want[sklearn_name]["f1-score" if key == "f1" else key])


def test_calibration_by_hand():
    got = metrics.calibration([0, 1, 1, 1], [0.05, 0.05, 0.92, 1.0])
    first = {"low": 0.0, "high": 0.1, "recordings": 2, "mean_probability": 0.05, "share_abnormal": 0.5}
    assert got["bins"][0] == first
    assert got["bins"][9]["recordings"] == 2  # 1.0 belongs to the last bin
    assert math.isnan(got["bins"][4]["share_abnormal"])
    assert got["ece"] == pytest.approx(0.5 * 0.45 + 0.5 * 0.04)


def test_properties_of_auc():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    rows = st.lists(
        st.tuples(st.booleans(), st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 3)),
        min_size=1, max_size=25,
    )  # fmt: skip

    @hypothesis.given(rows)
    @hypothesis.settings(max_examples=150, deadline=None)
    def check(rows):
        y, p, w = (np.array(column) for column in zip(*rows, strict=True))
        got = metrics.binary_weighted(y, p, w[None])
        pairs = [(wi * wj, (pi > pj) + 0.5 * (pi == pj))
                 for yi, pi, wi in rows for yj, pj, wj in rows if yi and not yj]  # fmt: skip
        total = sum(weight for weight, _ in pairs)
        want = sum(weight * win for weight, win in pairs) / total if total else float("nan")
        assert got["auc"][0] == pytest.approx(want, nan_ok=True, abs=1e-12)
        # A weight is nothing but repetition.
        again = metrics.binary(np.repeat(y, w), np.repeat(p, w))
        for k in metrics.METRICS:
            assert got[k][0] == pytest.approx(again[k], nan_ok=True, abs=1e-12), k

    check()


# --- the judgement


@pytest.fixture(scope="module")
def run():
    """60 recordings of some 30 people in three databases; database c holds normal ones only."""
    rng = np.random.default_rng(7)
    databases = np.repeat(["a", "b", "c"], [30, 20, 10])
    persons = np.array([f"p{i}" for i in rng.integers(12, size=60)])
    labels = (rng.random(60) < np.where(databases == "a", 0.7, np.where(databases == "b", 0.3, 0))).astype(int)
    probabilities = np.round(np.clip(0.3 * labels + rng.random(60) * 0.7, 0, 1), 2)  # with ties
    classes = np.where(labels == 1, rng.choice(["murmur", "MVP"], 60), "normal")
    return {
        "labels": labels, "probabilities": probabilities,
        "persons": persons, "databases": databases, "classes": classes,
    }  # fmt: skip


def test_intervals_equal_a_plain_loop_over_sklearn(run):
    y, p, databases = run["labels"], run["probabilities"], run["databases"]
    got = metrics.judge(**run, threshold=0.45, resamples=60, seed=5)
    weights = metrics.draw_people(run["persons"], databases, 60, 5)
    auc, f1, mean = [], [], []
    for w in weights:
        index = np.repeat(np.arange(60), w.astype(int))
        auc.append(sk.roc_auc_score(y[index], p[index]))
        f1.append(sk.f1_score(y[index], p[index] >= 0.45))
        each = [index[databases[index] == d] for d in "ab"]
        if all(len(set(y[i])) == 2 for i in each):
            mean.append(np.mean([sk.roc_auc_score(y[i], p[i]) for i in each]))
    for ours, values in ((got["overall"]["auc"], auc), (got["overall"]["f1"], f1), (got["mean_database_auc"], mean)):
        np.testing.assert_allclose([ours["low"], ours["high"]], np.percentile(values, [2.5, 97.5]), atol=1e-12)
    assert got["mean_database_auc"]["databases"] == 2
    assert got["mean_database_auc"]["value"] == pytest.approx(
        np.mean([sk.roc_auc_score(y[databases == d], p[databases == d]) for d in "ab"])
    )


def test_people_are_drawn_whole_and_within_their_database(run):
    weights = metrics.draw_people(run["persons"], run["databases"], 50, 0)
    keys = [f"{d}/{p}" for d, p in zip(run["databases"], run["persons"], strict=True)]
    first = {key: keys.index(key) for key in keys}
    for i, key in enumerate(keys):
        np.testing.assert_array_equal(weights[:, i], weights[:, first[key]])
    for database in "abc":
        members = [i for key, i in first.items() if key.startswith(database)]
        np.testing.assert_array_equal(weights[:, members].sum(1), len(members))
    np.testing.assert_array_equal(weights, metrics.draw_people(run["persons"], run["databases"], 50, 0))
    assert (weights != metrics.draw_people(run["persons"], run["databases"], 50, 1)).any()


def test_recordings_of_one_person_do_not_narrow_the_interval():
    """Ten copies of everybody's recording say no more than one."""
    rng = np.random.default_rng(0)
    y, p = scored(rng, 40, levels=101)
    people = np.array([str(i) for i in range(40)])
    once = metrics.judge(y, p, people, ["d"] * 40, y.astype(str), seed=3)
    y, p, people = (np.repeat(v, 10) for v in (y, p, people))
    ten = metrics.judge(y, p, people, ["d"] * 400, y.astype(str), seed=3)
    assert ten["overall"]["auc"] == pytest.approx(once["overall"]["auc"])


def test_judge_counts_and_is_json(run):
    got = metrics.judge(**run, resamples=50)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert (got["recordings"], got["people"]) == (60, len({*zip(run["databases"], run["persons"], strict=True)}))
    assert sum(d["recordings"] for d in got["per_database"].values()) == 60
    assert sum(d["people"] for d in got["per_database"].values()) == got["people"]
    assert got["per_database"]["c"]["auc"] == {"value": None, "low": None, "high": None}
    assert got["per_database"]["c"]["positives"] == 0
    assert set(got["per_class"]) == set(run["classes"])
    share = sum(c["share_abnormal"] * c["recordings"] for c in got["per_class"].values())
    assert share == pytest.approx((run["probabilities"] >= 0.5).sum())
    assert sum(got["counts"].values()) == 60
    for k in metrics.METRICS:
        s = got["overall"][k]
        assert s["low"] <= s["value"] <= s["high"], k


def test_trivial_answers(run):
    y, databases = run["labels"], run["databases"]
    got = metrics.judge(**run, threshold=0.9, resamples=0)["trivial"]
    share = y.mean()
    assert got["all_abnormal"]["accuracy"] == pytest.approx(share)
    assert got["all_normal"]["accuracy"] == pytest.approx(1 - share)
    assert got["majority"]["accuracy"] == pytest.approx(max(share, 1 - share))
    assert got["all_normal"]["precision"] is None
    assert got["all_abnormal"]["auc"] == got["all_normal"]["auc"] == 0.5
    prior = np.array([y[databases == d].mean() for d in databases])
    assert got["database_prior"]["auc"] == pytest.approx(sk.roc_auc_score(y, prior))
    assert got["database_prior"]["auc"] > 0.6  # knowing the database alone is worth something here


def test_no_interval_where_nothing_can_be_resampled():
    rng = np.random.default_rng(1)
    y, p = np.tile([0, 1], 10), rng.random(20)
    alone = metrics.judge(y, p, ["one"] * 20, ["d"] * 20, y.astype(str), resamples=30)
    assert alone["overall"]["auc"]["value"] == pytest.approx(sk.roc_auc_score(y, p))
    for s in (alone["overall"]["auc"], alone["per_database"]["d"]["auc"], alone["mean_database_auc"]):
        assert (s["low"], s["high"]) == (None, None)
    none = metrics.judge(y, p, [str(i) for i in range(20)], ["d"] * 20, y.astype(str), resamples=0)
    assert none["overall"]["accuracy"]["low"] is None


def test_judge_refuses_bad_input(run):
    with pytest.raises(ValueError, match="no recordings"):
        metrics.judge([], [], [], [], [])
    with pytest.raises(ValueError, match="persons 59, databases 60"):
        metrics.judge(**{**run, "persons": run["persons"][1:]})
    with pytest.raises(ValueError, match="classes 59"):
        metrics.judge(**{**run, "classes": run["classes"][1:]})
    with pytest.raises(ValueError, match="threshold"):
        metrics.judge(**run, threshold=1.5)


def test_a_thousand_resamples_of_a_thousand_recordings_are_quick():
    rng = np.random.default_rng(0)
    y, p = scored(rng, 1000, levels=1001)
    databases, persons = rng.integers(6, size=1000).astype(str), rng.integers(500, size=1000).astype(str)
    start = time.process_time()
    metrics.judge(y, p, persons, databases, y.astype(str))
    assert time.process_time() - start < 5  # 0.5 s measured; a loop over resamples takes 20 s
