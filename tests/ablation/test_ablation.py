"""pcgjax.ablation: seeds and arms in one program, paired differences, resuming, the page."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pcgjax import losses, tasks
from pcgjax.ablation import arms as arms_module
from pcgjax.ablation import run
from pcgjax.ablation.arms import epoch_batches, finetune, train_arms
from pcgjax.ablation.data import NOISE, Parts, clip_features_of, draw_parts, simulate_corpus
from pcgjax.ablation.run import run_ablation
from pcgjax.ablation.settings import Setting, settings_of
from pcgjax.ablation.verdicts import differences, judge, summarise, verdict
from pcgjax.data import batches, splits
from pcgjax.data.corpus import from_prepared, in_rows
from pcgjax.data.plan import evaluation_plan
from pcgjax.metrics import interval
from pcgjax.models.hinf_lstm import Recurrent
from pcgjax.pages.ablation import ARMS, IDEAS, SCORES, draw
from pcgjax.runtime import checkpoint
from pcgjax.tasks.base import split_model
from pcgjax.training import optimizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = {
    "features.window_s": 1.7, "features.wavelet_level": 0, "features.n_fft": 512, "features.hop": 512,
    "features.n_mels": 8, "model.blocks": ((4,),), "model.hidden": 4, "sapt.interval": 1,
    "evaluation.batch_recordings": 28,
    # Adam would blow up what differs by rounding alone.
    "optimizer.name": "sgd", "optimizer.learning_rate": 0.2,
    "ablation.seeds": 2, "ablation.epochs": (2, 4), "ablation.batch_clips": 8, "ablation.clips_per_recording": 7,
    "ablation.synthetic_people": 14, "ablation.snrs_db": (10.0,), "ablation.settings": ("synthetic",),
}  # fmt: skip


def make_config(changes: dict | None = None):
    spec = importlib.util.spec_from_file_location("hinf_config", ROOT / "configs" / "hinf_lstm.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("ablation")
    with config.ignore_type():
        config.update_from_flattened_dict({**TINY, **(changes or {})})
    return config


@pytest.fixture(scope="module")
def corpus():
    return simulate_corpus(14, seed=0)


@pytest.fixture(scope="module")
def ready(corpus):
    """(config, task, clips, labels, parts) of the simulated people at 10 dB."""
    config = make_config({"features.noise_snr_db": 10.0})
    config.model.cell, config.loss.name = "lstm", "bce"
    data = clip_features_of(config, corpus)
    setting = Setting("synthetic", "Synthetic", "synthetic", 10.0, None)
    parts = draw_parts(config, corpus, setting, np.asarray(data.real))
    return config, tasks.make(config, corpus.sample_rate_hz), data, corpus.labels("abnormal"), parts


@pytest.fixture(scope="module")
def arms(ready):
    return train_arms(*ready)


def test_the_clips_are_what_the_task_shows_its_model(corpus, ready):
    config, task, data, labels, _ = ready
    counts = (corpus.lengths // 3400).clip(1)
    assert len(set(counts)) > 1
    np.testing.assert_array_equal(np.asarray(data.real).sum(1), counts)
    model = task.init(nnx.Rngs(0))
    logits = np.asarray(jax.jit(lambda mel, mask: model(mel, mask))(data.mel, data.mask)).reshape(data.real.shape)
    p = np.where(data.real, 1 / (1 + np.exp(-logits)), 0).sum(1) / counts

    # All recordings in one batch, packed on the host, with the same key.
    plan = evaluation_plan(np.arange(len(corpus.rows)), corpus.lengths, task.geometry, 28)
    (ids,), (size,) = plan.ids, plan.capacity
    batch = batches.pack(corpus, labels, ids[0], plan.capacities[size], task.geometry)
    batch = jax.tree.map(jnp.asarray, batch)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), NOISE), 0)
    forward = jax.jit(lambda batch, key: jnp.exp(task.forward(model, batch, plan.capacities[size], key)[0]))
    np.testing.assert_allclose(forward(batch, key), p[ids[0]], atol=2e-5)
    assert np.abs(forward(batch, jax.random.key(9)) - p[ids[0]]).max() > 1e-4  # other noise


@pytest.mark.slow
def test_all_seeds_at_once_are_one_after_the_other(ready, arms, monkeypatch):
    """vmap, which runs where there is no CPU, against a seed at a time; how far splits are filled up is the same."""
    config, task, data, labels, parts = ready
    monkeypatch.setattr(
        arms_module, "over_seeds", lambda f: lambda own, shared: jax.vmap(lambda x: f(*x, *shared))(own)
    )
    monkeypatch.setattr(arms_module, "UPDATES", ("forget",))
    monkeypatch.setattr(arms_module, "ARMS", tuple(arm for arm in ARMS if arm[0] == "forget"))
    longer = lambda ids, count: np.pad(ids, ((0, 0), (0, count)), constant_values=-1)
    filled = parts._replace(clips=longer(parts.clips, 21), validation=longer(parts.validation, 3))
    for arm, (p, threshold) in train_arms(config, task, data, labels, filled).items():
        np.testing.assert_allclose(p, arms[arm][0], atol=1e-5)
        np.testing.assert_allclose(threshold, arms[arm][1], atol=1e-6)
        assert np.abs(p[1] - p[0]).max() > 1e-3  # another seed, another training


@pytest.mark.slow
def test_arms_differ_where_they_should(arms):
    by_threshold = []
    for cell in ("lstm", "convex", "forget"):
        bce, pwl, pwl_sapt = (arms[cell, *rest][0] for rest in (("bce", "fixed"), ("pwl", "fixed"), ("pwl", "sapt")))
        np.testing.assert_array_equal(arms[cell, "bce", "sapt"][0], bce)  # the same training
        assert np.abs(pwl - bce).max() > 1e-4
        by_threshold.append(np.abs(pwl_sapt - pwl).max())
        for loss in ("bce", "pwl"):
            np.testing.assert_array_equal(arms[cell, loss, "fixed"][1], 0.5)
        assert (arms[cell, "bce", "sapt"][1] != 0.5).any()
    assert max(by_threshold) > 1e-5  # SAPT's threshold enters the penalty, once it has moved
    assert np.abs(arms["convex", "bce", "fixed"][0] - arms["forget", "bce", "fixed"][0]).max() > 1e-5


@pytest.mark.slow
def test_an_arm_is_a_plain_loop_of_the_penalty_weighted_loss(ready):
    """One seed of stage 2, PWL at a fixed threshold, against a loop over batches with the loss as the paper has it."""
    config, _, data, labels, parts = ready
    config = config.copy_and_resolve_references()
    config.model.dropout = 0.0
    places = data.real.shape[1]
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(len(data.mel), 3, 5)), jnp.float32)
    mask = jnp.ones(features.shape[:2])
    init = lambda key: Recurrent(5, 4, "convex", rngs=nnx.Rngs(key))
    key, clips = jax.random.key(3), jnp.asarray(parts.clips[1])
    graphdef, params, _ = split_model(init(key))
    run = jax.jit(finetune(config, init))
    p, _ = run(key, params, clips, jnp.asarray(parts.validation[1]), (features, mask), data.real, jnp.asarray(labels))

    def answer(params, ids):
        return jax.nn.sigmoid(nnx.merge(graphdef, params, {})(features[ids], mask[ids], None, 0.0, "auto"))

    def loss(params, ids):
        y = jnp.asarray(labels)[ids // places]
        return losses.penalty_weighted_bce(answer(params, ids), y, 0.5, config.loss.alpha)

    update = optimizer.make(config.optimizer)

    @jax.jit
    def step(params, state, ids):
        updates, state = update.update(jax.grad(loss)(params, ids), state, params)
        return optax.apply_updates(params, updates), state

    state, seen = update.init(params), []
    for epoch in range(config.ablation.epochs[1]):
        _, order = epoch_batches(key, jnp.asarray(epoch), clips, len(features), config.ablation.batch_clips)
        seen.append(np.asarray(order).reshape(-1))
        for ids in np.asarray(order):
            if (ids < 0).all():
                continue
            params, state = step(params, state, ids[ids >= 0])
    for order in seen:  # every clip once
        np.testing.assert_array_equal(np.sort(order[order >= 0]), np.sort(parts.clips[1][parts.clips[1] >= 0]))
    assert (seen[0] != seen[1]).any()
    each = np.asarray(answer(params, np.arange(len(features)))).reshape(-1, places)
    expected = (each * data.real).sum(1) / np.asarray(data.real).sum(1)
    np.testing.assert_allclose(p[1], expected, atol=1e-5)


def test_interval_by_hand():
    summary = interval([1.0, 2.0, 3.0, 4.0])
    # s = sqrt(5/3); t(0.975, 3) = 3.182446 from tables
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert summary["n"] == 4
    assert summary["mean"] == 2.5
    assert summary["deviation"] == pytest.approx(math.sqrt(5 / 3))
    assert (summary["low"], summary["high"]) == pytest.approx((2.5 - half, 2.5 + half))
    assert interval([0.5, math.nan])["n"] == 1
    assert math.isnan(interval([0.5])["low"])
    assert math.isnan(interval([])["mean"])


def made_up(group: str, database: str = "", effect: float = 0.0, seeds: int = 5, idea: str = "convex") -> dict:
    """A setting's json in which `idea` adds `effect` to every score, seeds differ widely, and all else is equal."""
    _, factor, new, _ = IDEAS[idea]
    wide = np.linspace(0.3, 0.7, seeds)
    near = np.linspace(-0.004, 0.004, seeds)
    arms = {
        " ".join(arm): {k: (wide + (effect + near) * (arm[factor] == new)).tolist() for k in SCORES} for arm in ARMS
    }
    trivial = {name: {k: [0.5] * seeds for k in SCORES} for name in ("majority", "database_prior")}
    name = f"{group}_{database}" if database else group
    return {
        "name": name, "title": name.replace("_", " ").capitalize(), "group": group, "recordings": 40, "people": 20,
        "databases": 1, "clips": 80, "test_recordings": 8.0, "arms": arms, "trivial": trivial,
    }  # fmt: skip


def test_differences_are_paired_by_seed():
    result = made_up("person", effect=0.02)
    changes = differences(result["arms"], "convex", "auc")
    np.testing.assert_allclose(changes, 0.02 + np.linspace(-0.004, 0.004, 5))
    np.testing.assert_allclose(differences(result["arms"], "pwl", "auc"), 0, atol=1e-12)
    # An interval of unpaired seeds, whose scores spread over 0.4, could not leave out 0.
    assert interval(changes)["low"] > 0


@pytest.mark.parametrize(
    ("effects", "says"),
    [((0.05, 0.05), "held up."), ((0.05, 0.0), "held up in part."), ((0.0, -0.05), "did not hold up."),
     ((0.05, -0.05), "mixed."), ((0.0, 0.0), "no clear difference.")],
)  # fmt: skip
def test_verdicts_come_from_the_intervals(effects, says):
    results = [made_up("synthetic", "clean", effects[0]), made_up("person", "", effects[1])]
    sentence = verdict("convex", summarise(results))
    assert f": {says}" in sentence
    assert "Of 6 comparisons" in sentence
    assert ("Synthetic clean: F1 +0.050" in sentence) == (effects[0] > 0)


def test_left_out_databases_count_once_and_all_settings_are_on_the_page():
    results = [
        made_up("synthetic", "clean"), made_up("person"), made_up("leave_database_out", "a", 0.1),
        made_up("leave_database_out", "b", 0.3),
    ]  # fmt: skip
    table = summarise(results)
    assert [row["name"] for row in table if row["counts"]] == ["synthetic_clean", "person", "leave_database_out"]
    together = next(row for row in table if row["name"] == "leave_database_out")
    assert together["ideas"]["convex"]["f1"]["mean"] == pytest.approx(0.2)
    verdicts = {idea: verdict(idea, table) for idea in IDEAS}
    html = draw(table, verdicts, {"ablation": {"seeds": 5}})
    for row in table:
        assert f"<h2>{row['title']}</h2>" in html
    for text in (*verdicts.values(), "0.9885", "0.9469", "the majority class"):
        assert text in html
    assert "<script" not in html


def test_judge_knows_databases_and_trivial_answers(corpus):
    rows = [{**corpus.rows[i], "database": "ab"[i >= 4]} for i in range(8)]
    small = dataclasses.replace(corpus, rows=rows, lengths=corpus.lengths[:8])
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1], np.float32)
    p = np.array([[0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1, 0.2]])
    parts = Parts(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32), [np.arange(8)])
    arm = ("lstm", "bce", "sapt")
    scores, trivial = judge(small, labels, parts, {arm: (p, np.array([0.65]))})
    of_arm = scores["lstm bce sapt"]
    assert of_arm["sensitivity"] == [0.75]
    assert of_arm["specificity"] == [1.0]
    assert of_arm["mean_accuracy"] == [0.875]
    assert of_arm["auc"] == [15 / 16]
    assert of_arm["mean_database_auc"] == [1.0]
    assert trivial["database_prior"]["accuracy"] == [0.75]
    assert trivial["database_prior"]["mean_database_auc"] == [0.5]
    assert trivial["all_abnormal"]["sensitivity"] == [1.0]


@pytest.mark.slow
def test_a_run_is_resumed_or_refused(tmp_path, monkeypatch):
    config = make_config()
    out = run_ablation(config, tmp_path)
    path = tmp_path / "synthetic_10_dB.json"
    before, result = path.stat().st_mtime_ns, json.loads(path.read_text())
    assert len(result["arms"]) == 12
    assert all(len(scores["auc"]) == 2 for scores in result["arms"].values())
    assert set(out["verdicts"]) == set(IDEAS)
    json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert "<h2>Synthetic, 10 dB</h2>" in (tmp_path / "report.html").read_text()
    assert config.model.cell == "convex"  # the caller's config is as it was

    monkeypatch.setattr(run, "run_setting", lambda *_: pytest.fail("trained again"))
    again = run_ablation(make_config({"ablation.snrs_db": (10.0,), "model.cell": "forget"}), tmp_path)
    assert again["verdicts"] == out["verdicts"]
    assert path.stat().st_mtime_ns == before
    with pytest.raises(checkpoint.CheckpointError, match=r"synthetic_10_dB.json.*model.hidden=4, now 5"):
        run_ablation(make_config({"model.hidden": 5}), tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"ablation.synthetic_people=14, now 15"):
        run_ablation(make_config({"ablation.synthetic_people": 15}), tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"synthetic_10_dB.json: damaged.*delete it"):
        run_ablation(config, tmp_path)


def test_settings_of_a_prepared_data_set(prepared):
    config = make_config({"ablation.settings": ("synthetic", "person", "leave_database_out"), "ablation.seeds": 3})
    corpus = from_prepared(prepared)
    names = [setting.name for setting in settings_of(config, corpus)]
    assert names == ["synthetic_10_dB", "person", *(f"leave_database_out_cinc2016-{name}" for name in "abcdef")]
    assert [setting.name for setting in settings_of(config, None)] == names[:1]

    left_out = settings_of(config, corpus)[2]
    real = np.ones((len(corpus.rows), 2), bool)
    real[::3, 1] = False
    parts = draw_parts(config, corpus, left_out, real)
    databases = np.array([row["database"] for row in corpus.rows])
    for seed in range(3):
        clips, validation = parts.clips[seed], parts.validation[seed]
        clips, validation = clips[clips >= 0], validation[validation >= 0]
        assert set(databases[parts.test[seed]]) == {"cinc2016-a"}
        assert "cinc2016-a" not in set(databases[clips // 2]) | set(databases[validation])
        assert not set(clips // 2) & set(validation)
        assert real.reshape(-1)[clips].all()
        assert len(clips) == real[np.unique(clips // 2)].sum()  # all clips of a recording that trains
    assert (parts.clips[0] != parts.clips[1]).any()

    few = Setting("few", "Few", "person", math.inf, None)
    with pytest.raises(splits.SplitError, match="few, seed 0: "):
        draw_parts(config, in_rows(corpus, corpus.rows[:3]), few, real[:3])


@pytest.mark.parametrize(
    ("field", "value"),
    [("ablation.settings", ("people",)), ("ablation.settings", ()), ("ablation.seeds", 1), ("ablation.epochs", (3,)),
     ("ablation.epochs", (3, 0)), ("ablation.clips_per_recording", 0), ("ablation.batch_clips", 0),
     ("ablation.synthetic_people", 0), ("ablation.snrs_db", (-math.inf,)), ("ablation.snrs_db", ()),
     ("evaluation.threshold", 1.5), ("train.balance", "class"), ("ablation.settings", ("person",)),
     ("sapt.factor", 0.0), ("features.hop", 0), ("evaluation.batch_recordings", 0), ("loss.alpha", 2.0)],
)  # fmt: skip
def test_bad_config_is_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=field):
        run_ablation(make_config({field: value}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_config_is_refused(tmp_path):
    config = make_config()
    with config.unlocked():
        del config.ablation
    with pytest.raises(ValueError, match=r"configs/hinf_lstm.py:ablation"):
        run_ablation(config, tmp_path)
