"""The fast pass of Qwen2-Audio against the documented one, adapters, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from pcgjax.audio_llm import model as llm

QUESTIONS = (
    "What is the pitch of the murmur?\nA. Low\nB. Medium\nC. High\nAnswer with one letter.",
    "Grade the systolic murmur.\nA. I/VI\nB. II/VI\nC. III/VI\nD. Harsh\nE. Low\nF. Plateau\nAnswer with one letter.",
    "Is there a murmur?\nA. Present\nB. Absent",
)
LORA = ConfigDict({"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ("q_proj", "v_proj", "fc1", "up_proj"),
                   "audio_tower": True, "projector": True, "llm": True})  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tiny_llm):
    return llm.load(tiny_llm, "float32", "sdpa")


def clips(*seconds: float) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [0.1 * rng.standard_normal(round(s * llm.RATE_HZ)).astype(np.float32) for s in seconds]


def batch_of(processor, heard, questions_each, share_prefix=True, multiple=1) -> llm.Batch:
    letters = llm.letter_ids(processor)
    return llm.make_batch(
        [llm.mel_of_clip(processor.feature_extractor, clip) for clip in heard], [len(clip) for clip in heard],
        [[(llm.tokens_of(processor, q), letters[i]) for i, q in enumerate(qs)] for qs in questions_each],
        processor.audio_token_id, processor.tokenizer.pad_token_id, share_prefix, multiple,
    )  # fmt: skip


def perturbed(model):
    """LoRA's second matrices are zero at first, which hides every mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("seconds", [0.0401, 0.07, 1.0, 1.23456, 29.98, 30.0])
def test_the_clips_own_mel_is_that_of_the_padded_clip(loaded, seconds):
    extractor, [clip] = loaded[1].feature_extractor, clips(seconds)
    padded = extractor([clip], sampling_rate=llm.RATE_HZ, padding="max_length", return_tensors="np")
    mel = llm.mel_of_clip(extractor, clip)
    assert mel.shape[1] == min(2 * llm.positions(len(clip)) + 2, 3000)
    np.testing.assert_allclose(mel, padded["input_features"][0][:, : mel.shape[1]], atol=1e-5)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize(
    ("attention", "seconds"),
    [
        *((kind, seconds) for kind in ("sdpa", "eager") for seconds in ((1.0,), (1.0, 1.0), (0.3, 1.27, 0.0401))),
        ("sdpa", (30.0, 0.5)),
    ],
)
def test_the_fast_pass_is_the_documented_one(tiny_llm, seconds, attention, share_prefix):
    model, processor = llm.load(tiny_llm, "float32", attention)
    heard = clips(*seconds)
    with torch.no_grad():
        fast = llm.Answerer(model)(batch_of(processor, heard, [QUESTIONS] * len(heard), share_prefix))
        plain = llm.plain_logits(
            model, processor, [clip for clip in heard for _ in QUESTIONS], list(QUESTIONS) * len(heard)
        )
    assert plain.abs().max() > 1
    torch.testing.assert_close(fast, plain, atol=1e-5 * float(plain.abs().max()), rtol=1e-5)
    assert (plain[0] - plain[1]).abs().max() > 0.01


@pytest.mark.parametrize("share_prefix", [True, False])
def test_adapter_gradients_are_those_of_the_usual_loss(tiny_llm, share_prefix):
    model, processor = llm.load(tiny_llm, "float32", "sdpa")
    model = perturbed(llm.add_lora(model, LORA))
    heard, letters = clips(0.5, 0.81), llm.letter_ids(processor)
    batch = batch_of(processor, heard, [QUESTIONS, QUESTIONS[:2]], share_prefix)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = ("audio_tower", "multi_modal_projector", "language_model")
    assert all(any(part in name for name in weights) for part in parts)

    torch.nn.functional.cross_entropy(llm.Answerer(model)(batch), batch.letters_Q).backward()
    fast = {name: p.grad.clone() for name, p in weights.items()}
    model.zero_grad()
    # The usual recipe: the whole chat with its answer, `labels` everywhere but at the letter masked.
    questions, clip = [*QUESTIONS, *QUESTIONS[:2]], [heard[i] for i in (0, 0, 0, 1, 1)]
    texts = [llm.conversation(processor, q) + "ABCDEF"[i] for q, i in zip(questions, (0, 1, 2, 0, 1), strict=True)]
    inputs = processor(text=texts, audio=clip, sampling_rate=llm.RATE_HZ, padding=True, return_tensors="pt")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = inputs["input_ids"][:, -1]
    assert labels[:, -1].tolist() == [letters[i] for i in (0, 1, 2, 0, 1)]
    model(**inputs, labels=labels).loss.backward()
    largest = max(p.grad.abs().max() for p in weights.values())
    assert largest > 1e-4
    for name, p in weights.items():
        torch.testing.assert_close(
            fast[name], p.grad, atol=float(largest) * 1e-4, rtol=1e-3, msg=lambda m, n=name: n + m
        )


def test_padding_to_a_multiple_and_other_clips_change_nothing(loaded):
    model, processor = loaded
    heard = clips(0.4, 0.9)
    with torch.no_grad():
        alone = llm.Answerer(model)(batch_of(processor, heard[:1], [QUESTIONS]))
        together = llm.Answerer(model)(batch_of(processor, heard, [QUESTIONS, QUESTIONS[:1]], multiple=64))
    torch.testing.assert_close(together[:3], alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["checkpointing", pytest.param("compiled", marks=pytest.mark.slow)])
def test_compiled_layers_and_checkpointing_change_nothing(tiny_llm, what):
    def gradients(changed: str):
        model, processor = llm.load(tiny_llm, "float32", "sdpa")
        torch.manual_seed(0)  # of LoRA's first matrices
        model = perturbed(llm.add_lora(model, LORA)).train()
        inner, passes = llm.base_of(model).model, []
        for layers in (inner.audio_tower.layers, inner.language_model.layers):
            if changed == "compiled":  # the graphs alone: see `train.train` on what this compiler makes of them on CPUs
                for layer in layers:
                    layer.compile(backend="aot_eager")
            else:
                # What a layer does within is done again; hooks of its own stay outside.
                layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
        if changed == "checkpointing":
            llm.checkpoint_activations(model)
        batch = batch_of(processor, clips(0.5), [QUESTIONS])
        loss = torch.nn.functional.cross_entropy(llm.Answerer(model)(batch), batch.letters_Q)
        loss.backward()
        assert len(passes) == {"checkpointing": 4, "compiled": 0, "": 2}[changed]
        return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]

    (loss, plain), (other, others) = gradients(""), gradients(what)
    torch.testing.assert_close(other, loss)
    for a, b in zip(others, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_compiled_answers_are_the_same(tiny_llm):
    model, processor = llm.load(tiny_llm, "float32", "sdpa")
    batch = batch_of(processor, clips(0.5), [QUESTIONS])
    with torch.no_grad():
        plain = llm.Answerer(model)(batch)
        torch.testing.assert_close(llm.Answerer(model, compile_layers=True)(batch), plain, atol=1e-4, rtol=1e-4)


def test_training_in_bfloat16_has_float32s_gradients(tiny_llm):
    """As the trainer does it: frozen weights in bfloat16, adapters in float32, autocast."""
    gradients = []
    for dtype in ("float32", "bfloat16"):
        model, processor = llm.load(tiny_llm, dtype, "sdpa")
        torch.manual_seed(0)
        model = perturbed(llm.add_lora(model, LORA)).train()
        batch = batch_of(processor, clips(0.5), [QUESTIONS])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = llm.Answerer(model)(batch)
        torch.nn.functional.cross_entropy(logits, batch.letters_Q).backward()
        weights = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in weights} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in weights]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98


def test_an_adapter_comes_back(tiny_llm, tmp_path):
    model, processor = llm.load(tiny_llm, "float32", "sdpa")
    trained = perturbed(llm.add_lora(model, LORA)).eval()
    batch = batch_of(processor, clips(0.5), [QUESTIONS])
    with torch.no_grad():
        wanted = llm.Answerer(trained)(batch)
    llm.save_adapter(trained, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "base.json"
    ]  # fmt: skip
    again = llm.with_adapter(llm.load(tiny_llm, "float32", "sdpa")[0], tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(llm.Answerer(again)(batch), wanted)
        plain = llm.Answerer(llm.load(tiny_llm, "float32", "sdpa")[0])(batch)
    assert (plain - wanted).abs().max() > 0.01


def test_an_adapter_of_another_base_is_refused(tiny_llm, tmp_path):
    from pcgjax.audio_llm.make_tiny import make_tiny

    llm.save_adapter(llm.add_lora(llm.load(tiny_llm, "float32", "sdpa")[0], LORA), tmp_path / "adapter")
    other = llm.load(make_tiny(tmp_path / "other", seed=1), "float32", "sdpa")[0]
    with pytest.raises(llm.ModelError, match="trained on other base weights"):
        llm.with_adapter(other, tmp_path / "adapter")
    # A checkpoint that an adapter was merged into is another one too, whatever that adapter was put into.
    with torch.no_grad():
        merged = llm.load(tiny_llm, "float32", "sdpa")[0]
        merged.model.language_model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    with pytest.raises(llm.ModelError, match="trained on other base weights"):
        llm.with_adapter(merged, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(llm.ModelError, match="pickled file, which is not opened"):
        llm.with_adapter(other, tmp_path / "adapter")


def test_each_part_can_be_left_out(tiny_llm):
    for part in ("audio_tower", "projector", "llm"):
        lora = ConfigDict({**LORA, **{name: name == part for name in ("audio_tower", "projector", "llm")}})
        model = llm.add_lora(llm.load(tiny_llm, "float32", "sdpa")[0], lora)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        of = {"audio_tower": "audio_tower", "projector": "multi_modal_projector", "llm": "language_model"}[part]
        assert names
        assert all(of in name for name in names)
    nothing = ConfigDict({**LORA, **dict.fromkeys(("audio_tower", "projector", "llm"), False)})
    with pytest.raises(llm.ModelError, match="nothing would be trained"):
        llm.add_lora(llm.load(tiny_llm, "float32", "sdpa")[0], nothing)


def test_folders_that_are_no_model_are_refused(tiny_llm, tmp_path):
    def refused(match: str, change) -> None:
        folder = tmp_path / "copy"
        shutil.copytree(tiny_llm, folder)
        change(folder)
        with pytest.raises(llm.ModelError, match=match):
            llm.load(folder, "float32", "sdpa")
        shutil.rmtree(folder)

    def config(**values):
        def change(folder):
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | values))

        return change

    def weights(edit):
        def change(folder):
            from safetensors.torch import load_file, save_file

            tensors = load_file(folder / "model.safetensors")
            edit(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

        return change

    with pytest.raises(llm.ModelError, match=r"no config\.json there"):
        llm.load(tmp_path / "nowhere", "float32", "sdpa")
    with pytest.raises(llm.ModelError, match="dtype='float64'"):
        llm.load(tiny_llm, "float64", "sdpa")
    refused("model_type is 'bert'", config(model_type="bert"))
    refused("as \\*.safetensors, found none", lambda f: (f / "model.safetensors").unlink())
    refused("only pytorch_model.bin, pickled", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"))
    refused("no JSON object", lambda f: (f / "config.json").write_text("[1]"))
    refused("cannot be loaded", lambda f: (f / "model.safetensors").write_bytes(b"cut"))
    name = "audio_tower.layers.0.fc1.weight"
    find = lambda tensors: next(key for key in tensors if key.endswith(name))
    refused("1 weights are missing.*layers.0.fc1", weights(lambda w: w.pop(find(w))))
    refused("cannot be loaded", weights(lambda w: w.update({find(w): torch.zeros(3, 3)})))
    refused("1 weights are missing, unknown .*: extra", weights(lambda w: w.update({"extra": torch.zeros(3)})))
    refused("layers.0.fc1.weight holds a NaN", weights(lambda w: w[find(w)].fill_(float("nan"))))


def test_a_letter_of_several_tokens_is_refused(loaded):
    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1, 2] if text == "C" else [3]}

    class Processor:
        tokenizer = Tokenizer()

    with pytest.raises(llm.ModelError, match="divides the letter 'C'"):
        llm.letter_ids(Processor())


def test_padding_on_the_right_is_refused(loaded):
    model, processor = loaded
    processor.tokenizer.padding_side = "right"
    try:
        with pytest.raises(llm.ModelError, match="padded on the right"):
            llm.plain_logits(model, processor, clips(0.5, 0.5), QUESTIONS[:2])
    finally:
        processor.tokenizer.padding_side = "left"


def test_clips_that_are_too_short_or_too_long_are_refused(loaded):
    assert llm.positions(llm.shortest()) == 2
    with pytest.raises(llm.TooShortError, match="20 ms: one audio token needs 20"):
        llm.positions(llm.shortest() - 1)
    with pytest.raises(ValueError, match=r"30.01 s: Qwen2-Audio hears 30 s"):
        llm.positions(round(30.01 * llm.RATE_HZ))
    with pytest.raises(ValueError, match="hears 30 s"):
        llm.plain_logits(*loaded, clips(31.0), QUESTIONS[:1])
