"""The tiny Qwen2-Audio: both layouts load to the same model through from_pretrained, and it behaves as the real one."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from pcgjax.audio_llm import make_tiny as module
from pcgjax.audio_llm.make_tiny import MARKER, SPECIAL_TOKENS, make_tiny
from pcgjax.audio_llm.questions import ask

CONVERSATION = [
    {"role": "user", "content": [{"type": "audio", "audio_url": "clip"}, {"type": "text", "text": "Which? A. B."}]}
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{legacy: folder}."""
    parent = tmp_path_factory.mktemp("tiny")
    return {legacy: make_tiny(parent / str(legacy), legacy=legacy) for legacy in (False, True)}


@pytest.fixture(scope="module")
def processor(folders):
    return AutoProcessor.from_pretrained(folders[False])


@pytest.fixture(scope="module")
def models(folders):
    """{legacy: (model, what loading it told)}."""
    load = lambda folder: Qwen2AudioForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    return {legacy: load(folder) for legacy, folder in folders.items()}


def keys(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def test_both_layouts_hold_the_same_model(folders, models):
    for _, info in models.values():
        assert not any(info.values()), info
    current, legacy = (models[of][0].state_dict() for of in (False, True))
    assert current.keys() == legacy.keys()
    assert all(torch.equal(value, legacy[name]) for name, value in current.items())
    # and the layouts differ as those of the published checkpoint and of transformers 5 do
    assert {"lm_head.weight", "model.multi_modal_projector.linear.bias"} < keys(folders[False])
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight", "audio_tower.conv1.bias",
            "multi_modal_projector.linear.weight"} < keys(folders[True])  # fmt: skip
    names = {legacy: {path.name for path in folder.iterdir()} for legacy, folder in folders.items()}
    assert names[False] - names[True] == {"processor_config.json", "chat_template.jinja"}
    assert names[True] - names[False] == {"preprocessor_config.json", "chat_template.json"}


def test_configurations_agree(folders, models):
    current, legacy = (models[of][0].config.to_dict() for of in (False, True))
    assert legacy.pop("ignore_index") == -100
    assert legacy.pop("vocab_size") == current["text_config"]["vocab_size"]
    for config in (current, legacy):
        config.pop("_name_or_path", None)
    assert current == legacy
    current, legacy = (models[of][0].generation_config.to_dict() for of in (False, True))
    assert current == legacy


def test_special_tokens_are_where_the_model_looks_for_them(folders, models, processor):
    tokenizer, (model, _) = processor.tokenizer, models[False]
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    assert list(ids.values()) == list(range(len(tokenizer) - 6, len(tokenizer)))
    assert model.config.audio_token_index == ids["<|AUDIO|>"] == processor.audio_token_id
    assert model.generation_config.pad_token_id == ids["<|endoftext|>"] == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == [ids["<|im_end|>"], ids["<|endoftext|>"]]
    assert len(tokenizer) < len(model.get_input_embeddings().weight) == model.lm_head.out_features
    assert tokenizer.padding_side == "left"


def test_text_survives_and_letters_are_single_tokens(folders, processor):
    legacy = AutoProcessor.from_pretrained(folders[True])
    text = "<|im_start|>user\nIs the murmur holosystolic? 12 Hz, ½ é\n<|im_end|>"
    for tokenizer in (processor.tokenizer, legacy.tokenizer):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert ids == processor.tokenizer(text)["input_ids"]
        assert [len(tokenizer(letter)["input_ids"]) for letter in "ABCDEF"] == [1] * 6
        assert tokenizer("A")["input_ids"] != tokenizer(" A")["input_ids"]
        assert tokenizer.padding_side == "left"


def test_a_question_has_about_as_many_tokens_as_words(processor):
    row = {"id": "1_MV", "person": "1", "labels": {"murmur_status": "Present", "systolic_timing": "Holosystolic"}}
    text = ask(row, "systolic_timing", np.random.default_rng(0)).text
    ids = processor.tokenizer(text)["input_ids"]
    assert len(re.findall(r"\w+", text)) < len(ids) < 1.2 * len(re.findall(r"\w+|[^\w\s]|\n", text))
    assert len(processor.tokenizer(" Holosystolic")["input_ids"]) == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_a_clip_becomes_the_documented_number_of_tokens(folders, legacy):
    processor = AutoProcessor.from_pretrained(folders[legacy])
    for samples in (3200, 16_000, 16_160, 160_000, 480_000):
        frames = samples // 160
        text = "<|audio_bos|><|AUDIO|><|audio_eos|>"
        inputs = processor(text=[text], audio=[np.zeros(samples, np.float32)], sampling_rate=16000, padding=True)
        assert np.shape(inputs["input_features"]) == (1, 128, 3000)
        assert int(np.sum(inputs["feature_attention_mask"])) == frames
        expected = ((frames - 1) // 2 + 1 - 2) // 2 + 1
        assert inputs["input_ids"][0].count(processor.audio_token_id) == expected


@pytest.mark.parametrize("legacy", [False, True])
def test_chat_template_renders(folders, legacy):
    processor = AutoProcessor.from_pretrained(folders[legacy])
    assert processor.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nWhich? A. B.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_generates_and_hears(models, processor):
    model, _ = models[False]
    text = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    t = np.arange(16_000) / 16_000
    clips = [np.float32(np.sin(2 * np.pi * hz * t)) for hz in (60, 300)]
    inputs = processor(text=[text, text], audio=clips, sampling_rate=16000, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert out.shape == (2, inputs["input_ids"].shape[1] + 2)
    with torch.no_grad():
        first, second = model(**inputs).logits[:, -1].log_softmax(-1)
    # The audio reaches the answer, and the logits are not all alike: what the large matrices are for.
    assert (first - second).abs().max() > 0.1
    assert first.std() > 1


def test_same_seed_same_bytes(folders, tmp_path):
    bytes_of = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = make_tiny(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert bytes_of(again) == bytes_of(folders[False])
    make_tiny(again, seed=1)  # replaces its own
    assert bytes_of(again)["model.safetensors"] != bytes_of(folders[False])["model.safetensors"]
    assert json.loads((again / MARKER).read_text()) == {"seed": 1, "legacy": False}
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_leaves_what_it_did_not_write(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    with pytest.raises(ValueError, match="model: is there already and was not written by make_tiny"):
        make_tiny(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="give --out another"):
        make_tiny(tmp_path / "file")
    assert (tmp_path / "model" / "model.safetensors").read_text() == "weights"
    monkeypatch.setattr(module, "_save_model", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_tiny(tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "file"}


def test_command(run_command, tmp_path):
    done = run_command("audio_llm.make_tiny", f"--out={tmp_path / 'tiny'}", "--legacy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"wrote {tmp_path / 'tiny'}: a tiny random Qwen2-Audio"
    assert (tmp_path / "tiny" / "chat_template.json").is_file()
    done = run_command("audio_llm.make_tiny", f"--out={tmp_path}")
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "was not written by make_tiny" in done.stderr
