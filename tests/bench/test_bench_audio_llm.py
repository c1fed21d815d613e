"""The bench's suite for the audio LLM: counts against PyTorch's own, and the usual recipe as a peer that trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pcgjax.audio_llm.make_tiny import make_tiny
from pcgjax.bench import audio_llm as bench
from pcgjax.bench.audio_llm_flops import our_flops, parameters, plain_flops, published_config, total

CONVERSATION = [
    {"role": "user", "content": [{"type": "audio", "audio_url": "clip"}, {"type": "text", "text": "Which? A. B."}]}
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(model with LoRA, processor, optimizer)."""
    torch.manual_seed(0)
    return bench.plain_model(make_tiny(tmp_path_factory.mktemp("bench") / "tiny"))


def clip(hz: float, seconds: float = 1.0) -> np.ndarray:
    t = np.arange(round(16_000 * seconds)) / 16_000
    return (0.5 * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def test_published_parameters():
    counts = parameters(published_config())
    assert counts.pop("total") == 8_397_094_912 == sum(counts.values())
    assert counts == {"audio_tower": 636_968_960, "projector": 1281 * 4096, "llm": 7_754_878_976}


def counted(model, inputs, labels=None) -> dict[str, int]:
    """What PyTorch counts, {part: forward, "backward": of all}; it overlooks the fused attention of CPUs."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        loss = model(**inputs, labels=labels).loss
        forward = counter.get_total_flops()
        if labels is not None:
            loss.backward()
    model.set_attn_implementation("sdpa")
    of = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = next(name for name in of if name.endswith("Qwen2AudioForConditionalGeneration"))
    inner = next(name for name in of if name.endswith("ForConditionalGeneration.model"))
    return {
        "audio_tower": of[f"{inner}.audio_tower"],
        "projector": of[f"{inner}.multi_modal_projector"],
        "llm": of[f"{inner}.language_model"] + of[f"{root}.lm_head"],
        "forward": forward,
        "backward": counter.get_total_flops() - forward,
    }


@pytest.fixture(scope="module")
def inputs(plain):
    _, processor, _ = plain
    text = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    return processor(text=[text + "A"], audio=[clip(100, 2.0)], sampling_rate=16000, padding=True, return_tensors="pt")


def test_forward_formula_is_what_pytorch_counts(plain, inputs):
    model, _, _ = plain
    base, text_tokens = model.get_base_model(), inputs["input_ids"].shape[1] - 50
    model.base_model.disable_adapter_layers()
    try:
        with torch.no_grad():
            counts = counted(base, inputs)
    finally:
        model.base_model.enable_adapter_layers()
    expected = plain_flops(base.config, 2.0, 20, [text_tokens - 20], bench.RANK)
    for part, of in expected.items():
        assert of["forward"] == pytest.approx(counts[part], rel=0.02), part


def test_training_formula_is_what_pytorch_counts(plain, inputs):
    model, _, _ = plain
    base, text_tokens = model.get_base_model(), inputs["input_ids"].shape[1] - 50
    counts = counted(base, inputs, inputs["input_ids"])
    model.zero_grad()
    of = plain_flops(base.config, 2.0, 20, [text_tokens - 20], bench.RANK)
    assert total(of) == pytest.approx(counts["forward"] + counts["backward"], rel=0.03)
    # Two thirds of LoRA's products are backward; they and the frozen weights' are counted in the right place.
    backward = sum(part["backward"] + part["lora"] * 2 / 3 for part in of.values())
    assert backward == pytest.approx(counts["backward"], rel=0.05)


def test_ours_counts_what_is_shared_once():
    config = published_config()
    one = our_flops(config, 10.0, 21, [90], 8)
    four = our_flops(config, 10.0, 21, 4 * [90], 8)
    plain = plain_flops(config, 10.0, 21, [90], 8)
    assert plain == plain_flops(config, 10.0, 21, 4 * [90], 8)
    assert four["audio_tower"]["forward"] == pytest.approx(one["audio_tower"]["forward"] / 4)
    # 271 tokens of prefix once, four times 90, against four times 361: products alone, attention is 2 % of them.
    assert four["llm"]["lora"] == pytest.approx(plain["llm"]["lora"] * (271 + 360) / (4 * 361))
    # One question of 30 s shares nothing and is cut nowhere: only the logits differ.
    ours, plain = (count(config, 30.0, 21, [90], 8) for count in (our_flops, plain_flops))
    assert ours["audio_tower"] == plain["audio_tower"]
    assert plain["llm"]["forward"] - ours["llm"]["forward"] > 2 * 859 * 4096 * 156_032


def test_step_is_the_documented_recipe(plain):
    model, processor, optimizer = plain
    clips, letters = [clip(80), clip(400, 1.5)], ["A", "B"]
    step = lambda: bench.plain_step(model, processor, optimizer, clips, 2 * [CONVERSATION], letters)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    text = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=2 * [text], audio=clips, sampling_rate=16000, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    wanted = torch.tensor([processor.tokenizer(letter)["input_ids"][0] for letter in letters])
    expected = torch.nn.functional.cross_entropy(logits, wanted)
    losses = [step() for _ in range(3)]
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)  # of the letters alone
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    trained = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {*bench.TARGETS, "linear"}


@pytest.mark.slow
def test_suite_and_summary():
    result = bench.audio_llm_suite(pairs=1)
    rows = result["published"]["rows"]
    assert [(row["audio_s"], row["questions_a_clip"]) for row in rows] == [(10, 1), (10, 4), (30, 1), (30, 4)]
    assert all(row["ratio"] > 1 for row in rows)
    assert rows[1]["ratio"] > 3
    for row in rows:
        for estimate in row["estimates"].values():
            at_peak = 1e3 / estimate["floor_ms"]
            assert estimate["ours_samples_a_s"] == pytest.approx(0.4 * at_peak)
            assert estimate["plain_samples_a_s"] == pytest.approx(0.4 * at_peak / row["ratio"])
    summary = bench.audio_llm_summary(result)
    assert "8,397,094,912 parameters" in summary
    assert summary.count("estimate, not measured") == len(rows) * len(bench.GPUS)
    for step in result["step"].values():
        assert step["samples"] == 16
        assert step["ratio"] == pytest.approx(step["ours_samples_a_s"] / step["plain_samples_a_s"])
        assert all(0 < loss < 20 for loss in step["losses"].values())


@pytest.mark.slow
def test_both_ways_have_one_loss(plain):
    model, processor, _ = plain
    nothing = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.0)
    for share_prefix in (True, False):
        measured = bench._step((model, processor, nothing), share_prefix, 1, "cpu", clips=2, questions=3, audio_s=0.5)
        assert measured["losses"]["ours"] == pytest.approx(measured["losses"]["plain"], rel=1e-4)


@pytest.mark.slow
def test_a_model_of_any_size_with_random_weights_is_measured(tmp_path):
    from transformers import AutoConfig

    tiny = make_tiny(tmp_path / "tiny")
    measured = bench.full_size(AutoConfig.from_pretrained(tiny), tiny, 1, "cpu")
    assert measured["ours_tflop_a_s"] > 0
    assert measured["ratio"] > 0
