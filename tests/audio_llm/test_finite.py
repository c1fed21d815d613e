"""Outputs and gradients of the raw-audio nets and of the audio LLM are finite on what a sensor may deliver, or an error
says what is out of range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm.encoders.clips import as_heard
from pcgjax.audio_llm.encoders.model import Classifier, make_encoder

SAMPLES = 8000
_TIME = np.arange(SAMPLES) / llm.RATE_HZ
SIGNALS = {
    "silence": np.zeros(SAMPLES),
    "DC": np.full(SAMPLES, 0.5),
    "full-scale square": np.where(np.arange(SAMPLES) // 40 % 2, 1.0, -1.0),
    "one spike": np.eye(1, SAMPLES, 4000)[0],
    "one spike at the edge": np.eye(1, SAMPLES, 0)[0],
    "tone": np.sin(2 * np.pi * 100 * _TIME),
    "tone at half the rate": np.cos(np.pi * np.arange(SAMPLES)),
    "1e-42": np.full(SAMPLES, 1e-42) * np.where(np.arange(SAMPLES) % 2, 1, -1),
    "1e30": 1e30 * np.sin(2 * np.pi * 100 * _TIME),
    "NaN": np.full(SAMPLES, np.nan),
}
OUT_OF_RANGE = ("1e30", "NaN")


def in_range(signal: str, hear: Callable[[], Any]) -> Any:
    """What `hear` gives of a signal; None where it says that the signal is out of range."""
    message = ""
    try:
        with np.errstate(all="ignore"):
            heard = hear()
    except ValueError as error:
        message = str(error)
    if not message:
        assert signal != "NaN"
        return heard
    assert signal in OUT_OF_RANGE
    assert "give samples in [-1, 1]" in message
    return None


def backward(loss: torch.Tensor, weights: list[torch.nn.Parameter]) -> None:
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    assert torch.isfinite(loss)
    assert any(gradient is not None for gradient in gradients)
    assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)


@pytest.fixture(scope="module", params=["wav2vec2", "hubert", "distilhubert", "wav2vec2 with masks"])
def encoder(request):
    name = request.param.split()[0]
    config = ConfigDict({"architecture": name, "folder": "", "size": "tiny", "freeze_feature_encoder": False})
    torch.manual_seed(0)
    model, extractor = make_encoder(config)
    if request.param.endswith("masks"):
        import transformers

        about = model.encoder.config.to_dict() | {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
        model = Classifier(transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**about)))
        extractor.return_attention_mask = True
    return model.train(), extractor


@pytest.mark.parametrize("signal", SIGNALS)
def test_an_encoder_is_finite(encoder, signal):
    model, extractor = encoder
    waves = [SIGNALS[signal].astype(np.float32), SIGNALS["tone"][:6000].astype(np.float32)]
    if heard := in_range(signal, lambda: as_heard(waves, extractor, SAMPLES)):
        backward(model(*heard).sum(), [*model.parameters()])


@pytest.fixture(scope="module")
def answerer(tiny_llm):
    base, processor = llm.load(tiny_llm, "float32", "sdpa")
    parts = {"audio_tower": True, "projector": True, "llm": True}
    lora = ConfigDict({"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ("q_proj", "v_proj", "fc1"), **parts})
    model = llm.add_lora(base, lora)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return llm.Answerer(model), processor


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_audio_tower_is_finite(answerer, signal):
    model, processor = answerer
    clip = SIGNALS[signal].astype(np.float32)
    mel = in_range(signal, lambda: llm.mel_of_clip(processor.feature_extractor, clip))
    if mel is None:
        return
    ids = llm.tokens_of(processor, "Is there a murmur?\nA. Present\nB. Absent")
    question = [(ids, llm.letter_ids(processor)[0])]
    batch = llm.make_batch([mel], [len(clip)], [question], processor.audio_token_id, processor.tokenizer.pad_token_id)
    with torch.no_grad():
        assert torch.isfinite(llm.encode(llm.base_of(model.model).model, batch)).all()
    loss = torch.nn.functional.cross_entropy(model(batch), batch.letters_Q)
    backward(loss, [weight for weight in model.parameters() if weight.requires_grad])
