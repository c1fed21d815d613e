"""The CNN with the H-infinity LSTM: its parts against library ones, its chain against PyWavelets, SciPy and librosa,
its two stages."""

from __future__ import annotations

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_train import assert_same_run, lines_of, state_of, stop_in_mid_epoch

from pcgjax import losses, predict, tasks, thresholds
from pcgjax.data import batches
from pcgjax.data.corpus import from_prepared, in_memory
from pcgjax.data.plan import evaluation_plan
from pcgjax.models import hinf_lstm
from pcgjax.models.hinf_lstm import CNNLSTM, BatchNorm, conv3x3
from pcgjax.tasks.base import split_model
from pcgjax.tasks.clips import clip_loss
from pcgjax.training.answers import load_model
from pcgjax.training.loop import train
from pcgjax.training.stages import stages

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# --------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("shape", [(2, 7, 9, 3), (1, 1, 1, 1), (3, 2, 5, 32)])
def test_convolution_equals_the_library_s(shape):
    x, kernel, weights = normal(*shape), normal(3, 3, shape[-1], 5), normal(*shape[:-1], 5)

    def library(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    np.testing.assert_allclose(conv3x3(x, kernel), library(x, kernel), rtol=1e-4, atol=1e-5)
    gradients = jax.grad(lambda *a: (conv3x3(*a) * weights).sum(), (0, 1))(x, kernel)
    expected = jax.grad(lambda *a: (library(*a) * weights).sum(), (0, 1))(x, kernel)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_batch_norm_equals_the_library_s():
    x, mask = normal(4, 6, 3, 5) * 2 + 1, jnp.asarray(RNG.integers(0, 2, (4, 6, 1, 1)), jnp.float32)
    ours, theirs = BatchNorm(5), nnx.BatchNorm(5, momentum=0.9, rngs=nnx.Rngs(0))
    for part in (ours, theirs):
        part.scale[...], part.bias[...] = jnp.arange(5.0), jnp.ones(5)
    for train_ in (True, True, False):
        normed = ours(x, mask, train_, lambda x: x)
        other = theirs(x, use_running_average=not train_, mask=jnp.broadcast_to(mask, x.shape) > 0)
        np.testing.assert_allclose(normed, other, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours.mean[...], theirs.mean[...], rtol=1e-5)
        np.testing.assert_allclose(ours.var[...], theirs.var[...], rtol=1e-4)


def make_model(update="convex", blocks=((4,), (8,)), **fields):
    model = CNNLSTM(12, blocks, 8, update, rngs=nnx.Rngs(3), **fields)
    for norm in model.cnn.norms:  # as after some training
        norm.mean[...], norm.var[...] = norm.mean[...] + 0.1, norm.var[...] * 1.3
        norm.bias[...] = norm.bias[...] + 0.2
    return model


@pytest.mark.parametrize("update", hinf_lstm.UPDATES)
@pytest.mark.parametrize("blocks", [((4,), (8,)), ((4, 5), (6, 7))])
def test_padding_changes_nothing(update, blocks):
    """A clip with 11 frames of 20 real gives what its 11 frames alone give, whatever the others hold."""
    model, x = make_model(update, blocks), normal(3, 12, 20)
    answer = jax.jit(lambda x, mask: model(x, mask))
    mask = jnp.broadcast_to(jnp.arange(20) < 11, (3, 20)).astype(jnp.float32)
    alone = answer(x[..., :11], jnp.ones((3, 11)))
    np.testing.assert_allclose(answer(x, mask), alone, rtol=1e-5, atol=1e-5)
    assert np.abs(answer(x, jnp.ones((3, 20))) - alone).max() > 1e-3


def test_model_equals_a_textbook_one():
    model, x = make_model("forget", ((4, 5), (6,))), normal(3, 12, 9)
    h = x.swapaxes(1, 2)[..., None]
    layer, biases = 0, iter(model.cnn.biases)
    for norm, depth in zip(model.cnn.norms, (2, 1), strict=True):
        for i in range(depth):
            h = jax.lax.conv_general_dilated(
                h, model.cnn.kernels[layer][...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            h = jax.nn.relu(h + next(biases)[None, None, None]) if i + 1 < depth else h
            layer += 1
        scale = norm.scale[None, None, None] / jnp.sqrt(norm.var[None, None, None] + 1e-5)
        h = (h - norm.mean[None, None, None]) * scale + norm.bias[None, None, None]
        h = nnx.max_pool(jax.nn.relu(h), (2, 2), (2, 2))
    h = h.reshape(3, 2, 3 * 6)
    cell = model.recurrent
    state, memory = jnp.zeros((3, 8)), jnp.zeros((3, 8))
    for t in range(2):
        gates = h[:, t] @ cell.kernel_x[...] + state @ cell.kernel_h[...] + cell.bias[None]
        i, o, g = jnp.split(gates, 3, axis=1)
        memory = jax.nn.sigmoid(cell.theta[None]) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
        state = jax.nn.sigmoid(o) * jnp.tanh(memory)
    np.testing.assert_allclose(model(x, jnp.ones((3, 9))), cell.output(state)[:, 0], rtol=1e-4, atol=1e-5)


def test_dropout_is_of_training_only():
    model, x, mask = make_model(dropout=0.5), normal(2, 12, 8), jnp.ones((2, 8))
    np.testing.assert_array_equal(model(x, mask), model(x, mask))
    one, other = (model(x, mask, jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(one - other).max() > 1e-3


def test_frozen_cnn_has_no_gradient_and_keeps_its_averages():
    model, x, mask = make_model(frozen_cnn=True), normal(2, 12, 8), jnp.ones((2, 8))
    graphdef, params, rest = split_model(model)

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        return model(x, mask, jax.random.key(0)).sum(), split_model(model)[2]

    grads, after = jax.grad(loss, has_aux=True)(params)
    assert all((g == 0).all() for g in jax.tree.leaves(grads["cnn"]))
    assert all((g != 0).any() for g in jax.tree.leaves(grads["recurrent"]["kernel_x"]))
    jax.tree.map(np.testing.assert_array_equal, after, rest)


# ------------------------------------------------------------------------------------------------ loss over clips


@pytest.mark.parametrize("slope", [0.0, 5.0])
@pytest.mark.parametrize("normalize", ["counts", "rates"])
def test_loss_in_shares_equals_the_loss_of_the_whole(slope, normalize, make_config):
    config = make_config({"loss.slope": slope, "loss.normalize": normalize}, "hinf_lstm").loss
    logits, labels, real = normal(8), jnp.asarray([1, 0, 1, 1, 0, 0, 1, 0.0]), jnp.arange(8) != 5

    def whole(z):
        p = jax.nn.sigmoid(z)
        bce = -(labels * jnp.log(p) + (1 - labels) * jnp.log1p(-p))
        factor, _ = losses.penalty(jnp.log(p), labels, real.astype(float), 0.4, 0.87, normalize, slope)
        return factor * (bce * real).sum() / 7

    def shares(z):
        def one(z, y, r):
            return clip_loss(config, z, y, r, 0.4, lambda x: jax.lax.psum(x, "groups"))

        split = (x.reshape(2, 4) for x in (z, labels, real))
        objective, counts = jax.vmap(one, axis_name="groups")(*split)
        assert counts.samples.sum() == 7
        return objective.sum() / 7, counts.loss.sum() / 7

    value, gradient = jax.value_and_grad(whole)(logits)
    (objective, mean_loss), gradient_of_shares = jax.value_and_grad(shares, has_aux=True)(logits)
    assert [float(objective), float(mean_loss)] == pytest.approx([float(value)] * 2, rel=1e-5)
    np.testing.assert_allclose(gradient_of_shares, gradient, rtol=1e-4, atol=1e-6)
    if not slope and normalize == "counts":
        p, y = np.asarray(jax.nn.sigmoid(logits))[real], np.asarray(labels)[real]
        assert float(value) == pytest.approx(float(losses.penalty_weighted_bce(p, y, 0.4)), rel=1e-5)


# ------------------------------------------------------------------------------------------------- the whole chain


@pytest.mark.parametrize(
    "changes", [{}, {"features.wavelet_level": 0, "features.filter": "causal", "features.htk": True}], ids=str
)
def test_forward_equals_libraries_one_recording_at_a_time(changes, make_config):
    pywt, librosa = pytest.importorskip("pywt"), pytest.importorskip("librosa")
    import scipy.signal

    config = make_config(changes, "hinf_lstm")
    f, rate = config.features, 1000
    lengths = [2500, 713, 1000, 1999]  # two clips and a rest, a short one, one exactly, one and a rest
    samples = [np.int16(RNG.normal(size=n) * 3000 * (1 + np.sin(np.arange(n) / 40))) for n in lengths]
    rows = [{"id": str(i), "labels": {}} for i in range(4)]
    corpus = in_memory(rows, samples, rate)
    task = tasks.make(config, rate)
    model = task.init(nnx.Rngs(0))
    plan = evaluation_plan(np.arange(4), corpus.lengths, task.geometry, 4)
    one = batches.pack(corpus, np.zeros(4), plan.ids[0, 0], 7, task.geometry)
    log_p, _ = jax.jit(lambda b: task.forward(model, b, 7, jax.random.key(0)))(one)

    sos = scipy.signal.butter(f.filter_order, f.high_hz, fs=rate, output="sos")
    for place, index in enumerate(plan.ids[0, 0]):
        x = samples[index] / 32767
        if f.wavelet_level:
            approximation, *details = pywt.wavedec(x, "db4", "symmetric", f.wavelet_level)
            threshold = np.median(np.abs(details[-1])) / 0.6745 * np.sqrt(2 * np.log(len(x)))
            details = [pywt.threshold(d, threshold, "soft") for d in details]
            x = pywt.waverec([approximation, *details], "db4", "symmetric")[: len(x)]
        x = scipy.signal.sosfilt(sos, x) if f.filter == "causal" else scipy.signal.sosfiltfilt(sos, x)
        probabilities = []
        for begin in range(0, max(len(x) - 999, 1), 1000):
            power = librosa.feature.melspectrogram(
                y=x[begin : begin + 1000], sr=rate, n_fft=f.n_fft, hop_length=f.hop, n_mels=f.n_mels, htk=f.htk
            )
            db = librosa.power_to_db(power, ref=np.max, top_db=f.top_db)
            mel = jnp.asarray(db / f.top_db + 1, jnp.float32)[None]
            logit = model(mel, jnp.ones((1, mel.shape[-1])))
            probabilities.append(float(jax.nn.sigmoid(logit)[0]))
        assert float(jnp.exp(log_p[place])) == pytest.approx(np.mean(probabilities), abs=2e-4)


# ------------------------------------------------------------------------------------------------------ two stages


@pytest.fixture(scope="module")
def staged(make_config, tmp_path_factory):
    """The workdir of both stages, undisturbed. Not to be written to."""
    workdir = tmp_path_factory.mktemp("staged") / "run"
    stages(make_config({}, "hinf_lstm"), workdir)
    return workdir


@pytest.mark.slow
def test_second_stage_keeps_the_first_one_s_cnn(staged):
    _, first = state_of(staged / "cnn_lstm", "best")
    _, saved = state_of(staged, "last")
    last = saved["state"]
    for part in ("params", "rest"):
        jax.tree.map(np.testing.assert_array_equal, last[part]["cnn"], first[part]["cnn"])
    assert first["params"]["recurrent"]["kernel_x"].shape[1] == 4 * 8
    assert last["params"]["recurrent"]["kernel_x"].shape[1] == 3 * 8
    for folder in (staged, staged / "cnn_lstm"):
        assert [line["epoch"] for line in lines_of(folder) if line["split"] == "train"] == [1, 2, 3, 4]
    counts = [json.loads((f / "metrics.json").read_text())["split"] for f in (staged, staged / "cnn_lstm")]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_threshold_moves_and_is_used(staged, corpus_folder, tmp_path):
    lines = [line for line in lines_of(staged) if line["split"] == "validation"]
    assert lines[0]["threshold"] == lines[1]["threshold"] == 0.5  # in use before the first update after two epochs
    assert lines[2]["threshold"] == lines[3]["threshold"] != 0.5
    best = json.loads((staged / "metrics.json").read_text())["best"]
    used = lines[best["epoch"] - 1]["threshold"]
    assert best["threshold"] == used
    config = load_model(staged)[0]
    assert config.evaluation.threshold == used
    rows = (staged / "predictions.csv").read_text().splitlines()[1:]
    for cells in (row.split(",") for row in rows):
        assert int(cells[6]) == int(float(cells[5]) >= used)
    answered = predict.predict(str(staged), [rows[0].split(",")[8]], str(tmp_path / "answers.csv"))
    assert answered[0]["decision"] == int(float(answered[0]["probability"]) >= used)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["cnn_lstm", ""])
def test_killed_in_either_stage_and_resumed(stage, staged, command, make_config, tmp_path):
    workdir = tmp_path / "run"
    words, env = command("train", f"--workdir={workdir}", config="hinf_lstm")
    steps_an_epoch = lines_of(staged)[0]["step"]
    # In the third epoch, after the threshold has moved for the first time.
    assert stop_in_mid_epoch(words, env, workdir / stage, signal.SIGKILL, 2 * steps_an_epoch) == -signal.SIGKILL
    assert not (workdir / "metrics.json").exists()
    stages(make_config({}, "hinf_lstm"), workdir)
    assert_same_run(workdir, staged)
    assert_same_run(workdir / "cnn_lstm", staged / "cnn_lstm")


@pytest.mark.slow
def test_a_changed_first_stage_is_refused(staged, make_config, tmp_path):
    import shutil

    shutil.copytree(staged / "cnn_lstm", tmp_path / "cnn_lstm")
    shutil.copy(staged / "split.json", tmp_path)
    with pytest.raises(ValueError, match=r"cnn_lstm: trained with model.hidden=8, now 9"):
        stages(make_config({"model.hidden": 9}, "hinf_lstm"), tmp_path)


@pytest.mark.slow
def test_start_from_another_model_is_refused(staged, make_config, tmp_path):
    changes = {"model.blocks": ((4,), (9,)), "train.start_from": str(staged), "optimizer.frozen": ("cnn",)}
    with pytest.raises(ValueError, match=r"train.start_from=.*: its parameters 'cnn' are not those of this model"):
        train(make_config(changes, "hinf_lstm"), tmp_path)


@pytest.mark.slow
def test_validation_without_a_class_keeps_the_threshold_and_says_so(make_config, prepared, tmp_path, caplog):
    from pcgjax.data import splits

    rows = from_prepared(prepared).rows
    split = splits.make(rows, "person", "abnormal", 0, (0.65, 0.15, 0.20))
    by_id = {row["id"]: row for row in rows}
    split["validation"] = [id for id in split["validation"] if by_id[id]["labels"]["abnormal"] == "1"]
    splits.save(split, tmp_path / "split.json")
    config = make_config({"train.epochs": 3, "train.select": "loss"}, "hinf_lstm")
    train(config, tmp_path)
    assert "validation has one class only: the threshold stays at 0.5" in caplog.text
    assert {line["threshold"] for line in lines_of(tmp_path) if line["split"] == "validation"} == {0.5}


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features.high_hz": 500.0}, r"features.high_hz: cut-off 500.0 Hz does not fit a rate of 1000 Hz"),
        ({"features.filter": "median"}, "features.filter='median'"),
        ({"features.wavelet_level": 7}, "features.wavelet_level=7: "),
        ({"features.wavelet_level": -1}, "features.wavelet_level=-1"),
        ({"features.window_s": 0.05}, r"features.wavelet_level=3: spans 56 samples, the shortest clip has 50"),
        ({"features.window_s": 0.1}, r"features.window_s=0.1: 100 samples are too few for features.hop=64"),
        ({"features.n_mels": 128}, "n_mels"),
        ({"features.n_mels": 0}, "n_mels"),
        ({"features.hop": 0}, "hop"),
        ({"features.noise_snr_db": float("nan")}, "features.noise_snr_db=nan"),
        ({"model.cell": "gru"}, "model.cell='gru': choose one of lstm, convex, forget"),
        ({"model.blocks": ()}, r"model.blocks=\(\)"),
        ({"model.blocks": ((4,), ())}, r"model.blocks="),
        ({"model.hidden": 0}, "model.hidden=0"),
        ({"model.dropout": 1.0}, "model.dropout=1.0"),
        ({"model.implementation": "fast"}, "fast"),
        ({"features.n_mels": 2, "features.n_fft": 64}, "features.n_mels=2: too few for 2 poolings"),
        ({"loss.name": "mse"}, "loss.name='mse': choose one of bce, pwl"),
        ({"loss.alpha": -0.1}, "loss.alpha=-0.1"),
        ({"loss.normalize": "sums"}, "loss.normalize='sums'"),
        ({"loss.slope": -1.0}, "loss.slope=-1.0"),
        ({"sapt.interval": -1}, "sapt.interval=-1"),
        ({"sapt.factor": 2.0}, "sapt.factor=2.0"),
        ({"sapt.metric": "auc"}, "sapt.metric='auc'"),
        ({"evaluation.threshold": 1.5}, "evaluation.threshold=1.5"),
        ({"optimizer.frozen": ("lstm",)}, r"optimizer.frozen=\('lstm',\): no parameters 'lstm' among cnn, recurrent"),
        ({"train.start_from": "/no/such", "optimizer.frozen": ("cnn",)}, "/no/such.*no checkpoint"),
    ],
    ids=str,
)
def test_bad_config_names_the_field(changes, message, make_config, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(make_config(changes, "hinf_lstm"), tmp_path)


@pytest.mark.slow
def test_the_first_threshold_is_the_config_s(make_config, tmp_path):
    config = make_config({"evaluation.threshold": 0.3, "sapt.interval": 0, "train.epochs": 1}, "hinf_lstm")
    results = train(config, tmp_path)
    assert results["best"]["threshold"] == pytest.approx(0.3)
    assert isinstance(thresholds.init(0.3, interval=0), thresholds.State)
