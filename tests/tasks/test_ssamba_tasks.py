"""SSAMBA pre-trained on recordings without labels, and fine-tuned as a segmenter from what that leaves."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pcgjax import evaluate, prepare, tasks
from pcgjax.features import spectrogram
from pcgjax.models.segmenter import PatchSegmenter
from pcgjax.models.ssamba_checkpoint import load_torch_checkpoint
from pcgjax.tasks.base import TrainState, split_model
from pcgjax.tasks.frames import ssamba_input
from pcgjax.training.answers import load_segmenter
from pcgjax.training.experiment import set_up
from pcgjax.training.loop import train
from pcgjax.training.start import with_encoder

RATE_HZ = 16000


@pytest.fixture(scope="module")
def prepared_16k(corpus_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared_16k")
    prepare.prepare("cinc2016", corpus_folder / "source", out, sample_rate_hz=RATE_HZ, workers=1)
    return str(out)


@pytest.fixture(scope="module")
def pretrained(make_config, prepared_16k, tmp_path_factory):
    """The workdir of a short pre-training."""
    workdir = tmp_path_factory.mktemp("pretrained")
    train(make_config({"data.prepared": prepared_16k}, "ssamba_pretrain"), workdir)
    return workdir


def lines(workdir, split):
    history = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in history if line["split"] == split]


@pytest.mark.slow
def test_pretraining_learns_and_leaves_a_checkpoint(pretrained):
    losses = [line["loss"] for line in lines(pretrained, "train")]
    assert losses[-1] < losses[0]
    assert lines(pretrained, "validation")[-1]["loss"] < lines(pretrained, "validation")[0]["loss"]
    model = load_torch_checkpoint(pretrained / "ssamba.pth", 50, 16)
    assert model.grid == (8, 3)
    assert hasattr(model, "mask_token")


@pytest.mark.slow
def test_pretraining_has_no_predictions_but_a_report(pretrained, corpus_folder, tmp_path):
    written = {path.name for path in pretrained.iterdir()}
    assert "predictions.csv" not in written
    assert {"metrics.json", "report.html", "ssamba.pth"} <= written
    results = json.loads((pretrained / "metrics.json").read_text())
    assert 0 <= results["test"]["accuracy"] <= 1
    with pytest.raises(ValueError, match="'ssamba_pretrain' has no answers to judge"):
        evaluate.evaluate(str(pretrained), "cinc2016", str(corpus_folder / "source"), str(tmp_path / "out.json"))


def test_there_are_no_labels_to_shuffle(make_config, prepared_16k, tmp_path):
    with pytest.raises(ValueError, match="shuffle_labels=True: a control for classifiers"):
        set_up(make_config({"data.prepared": prepared_16k, "data.shuffle_labels": True}, "ssamba_pretrain"), tmp_path)


@pytest.mark.slow
def test_a_segmenter_starts_from_it(make_config, prepared_16k, pretrained, tmp_path):
    changes = {"data.prepared": prepared_16k, "model.checkpoint": str(pretrained / "ssamba.pth"), "train.epochs": 1}
    config = make_config(changes, "segmenter")
    task = tasks.make(config, RATE_HZ)
    model = task.init(nnx.Rngs(0))
    assert model.encoder.grid == (8, 25)  # a token each 20 ms
    graphdef, params, rest = split_model(model)
    state = TrainState(jnp.zeros((), jnp.int32), params, rest, None, None)
    begun = with_encoder(state, graphdef, str(pretrained / "ssamba.pth"))
    theirs = load_torch_checkpoint(pretrained / "ssamba.pth", model.encoder.frames, model.encoder.stride)
    np.testing.assert_array_equal(begun.params["encoder"]["patch_kernel"], theirs.patch_kernel[...])
    np.testing.assert_array_equal(begun.params["encoder"]["position"], theirs.position[...])
    assert begun.params["encoder"]["position"].shape == (1, 1 + 8 * 25, 16)
    np.testing.assert_array_equal(begun.params["head"]["kernel"], params["head"]["kernel"])

    results = train(config, tmp_path)
    assert results["segmentation"]["test"]["frame_accuracy"]["value"] > 0.15
    assert load_segmenter(tmp_path).frames == 25

    wider = make_config({**changes, "model.width": 32}, "segmenter")
    with pytest.raises(ValueError, match=r"ssamba.pth: .* has shape .* set model.width"):
        train(wider, tmp_path / "wider")


def test_tokens_are_at_the_frames_that_they_are_judged_by():
    """A click in the middle of frame t moves the logits of frame t most, of all frames."""
    model = PatchSegmenter(16, 2, 2 * 40 + 14, 2, 4, False, False, "reference", rngs=nnx.Rngs(0))
    # What the encoder embeds of a click, before its mixers spread it: the patches' energy.
    hop, halo = 320, 1240
    for t in (0, 7, 20, 39):
        x = np.zeros(40 * hop + 2 * halo, np.float32)
        x[halo + t * hop + hop // 2] = 1.0
        fbank = spectrogram.kaldi_fbank(x[None])
        energy = jnp.exp(fbank).sum(-1)[0]
        centre = np.arange(len(energy)) @ np.asarray(energy) / float(energy.sum())
        patches = np.arange(40) * 2 + 7.5  # the middle frame of each patch
        assert abs(int(np.argmin(abs(patches - centre))) - t) <= 1
    assert model(fbank).shape == (1, 40, 4)


@pytest.mark.parametrize(
    ("name", "changes", "rate_hz", "message"),
    [
        ("segmenter", {}, 2000, "hears 16000 Hz, the data are prepared at 2000"),
        ("segmenter", {"features.step_s": 0.025}, RATE_HZ, "features.step_s=0.025"),
        ("segmenter", {"features.stretch": 0.1}, RATE_HZ, "features.stretch=0.1"),
        ("segmenter", {"features.noise": True}, RATE_HZ, "features.noise=True"),
        ("ssamba_pretrain", {}, 2000, "hears 16000 Hz, the data are prepared at 2000"),
        ("ssamba_pretrain", {"features.window_s": 0.1}, RATE_HZ, "features.window_s=0.1: shorter than a patch"),
    ],
)
def test_bad_config_names_the_field(name, changes, rate_hz, message, make_config):
    with pytest.raises(ValueError, match=message):
        tasks.make(make_config(changes, name), rate_hz)


def test_input_is_the_published_one():
    x = jax.random.normal(jax.random.key(0), (2, 8000)) * 0.1 + 0.3
    expected = (spectrogram.kaldi_fbank(x - x.mean(-1, keepdims=True)) + 4.2677393) / (2 * 4.5689974)
    np.testing.assert_allclose(ssamba_input(x), expected, atol=1e-6)
