"""Merging an adapter: the same answers from a folder that transformers loads alone, written whole or not at all."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import torch

from pcgjax.audio_llm import make_tiny
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm.merge import merge
from pcgjax.runtime import hashes
from pcgjax.runtime.files import DamagedError

QUESTIONS = ["What is the pitch of the murmur?\nA. Low\nB. High", "Is there a murmur?\nA. Present\nB. Absent"]


@pytest.fixture(scope="module")
def adapter(tiny_llm, make_config, tmp_path_factory):
    """An adapter of the tiny model that changes its answers."""
    base, _ = llm.load(tiny_llm, "float32", "sdpa")
    model = llm.add_lora(base, make_config({"lora.projector": True}, "audio_llm").lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    llm.save_adapter(model, folder)
    return folder


def logits(model, processor) -> np.ndarray:
    clips = [np.random.default_rng(seed).standard_normal(8000).astype(np.float32) * 0.1 for seed in range(2)]
    with torch.no_grad():
        return llm.plain_logits(model, processor, clips, QUESTIONS).numpy()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_merged_checkpoint_answers_as_the_adapter_does(legacy, tiny_llm, adapter, tmp_path, monkeypatch):
    import transformers

    folder = make_tiny.make_tiny(tmp_path / "base", legacy=True) if legacy else tiny_llm
    base, processor = llm.load(folder, "float32", "sdpa")
    before = logits(base, processor)
    wanted = logits(llm.with_adapter(base, adapter), processor)
    assert np.abs(wanted - before).max() > 0.1
    out = merge(folder, adapter, tmp_path / "merged")

    # By transformers alone, without PEFT.
    monkeypatch.setitem(sys.modules, "peft", None)
    loaded: Any = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
        out, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert next(model.parameters()).dtype == torch.float32
    processor = transformers.AutoProcessor.from_pretrained(out, local_files_only=True)
    processor.tokenizer.padding_side = "left"
    np.testing.assert_allclose(logits(model.eval(), processor), wanted, atol=1e-4)

    # In the layout that the base has, with its other files.
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", "pt") as merged, safe_open(folder / "model.safetensors", "pt") as base:
        assert set(merged.keys()) == set(base.keys())
    others = {path.name for path in folder.iterdir()} - {"model.safetensors", make_tiny.MARKER}
    assert {path.name for path in out.iterdir()} == {*others, "model.safetensors", "merged_from.json", "hashes.json"}
    for name in others:
        assert (out / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_merged_checkpoint_has_the_type_it_was_stored_in(dtype, tiny_llm, make_config, tmp_path):
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(tiny_llm, tmp_path / "base")  # its config.json goes on to say float32
    stored = {name: weight.to(dtype) for name, weight in load_file(tiny_llm / "model.safetensors").items()}
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    model = llm.add_lora(llm.load(base, "float32", "sdpa")[0], make_config({}, "audio_llm").lora)
    changes = {}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B["default"].weight.normal_(std=0.1)
                changes[name.removeprefix("base_model.model.") + ".weight"] = layer.get_delta_weight("default")
    llm.save_adapter(model, tmp_path / "adapter")

    merged = load_file(merge(base, tmp_path / "adapter", tmp_path / "merged") / "model.safetensors")
    assert merged.keys() == stored.keys()
    assert {weight.dtype for weight in merged.values()} == {dtype}
    assert changes.keys() < stored.keys()
    step = torch.finfo(dtype).eps
    for name, weight in merged.items():
        if name not in changes:
            assert torch.equal(weight, stored[name]), name
            continue
        wanted = stored[name].float() + changes[name]
        # Once the change, once the sum is rounded.
        torch.testing.assert_close(weight.float(), wanted, rtol=step, atol=step * float(changes[name].abs().max()))
        assert not torch.equal(weight, stored[name])


def test_what_does_not_fit_is_named_and_nothing_is_left(tiny_llm, adapter, tmp_path):
    other = make_tiny.make_tiny(tmp_path / "other", seed=1)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(llm.ModelError, match="trained on other base weights"):
        merge(other, adapter, tmp_path / "out")
    with pytest.raises(llm.ModelError, match=r"no adapter_config\.json"):
        merge(tiny_llm, tmp_path, tmp_path / "out")
    with pytest.raises(llm.ModelError, match=r"no config\.json"):
        merge(tmp_path, adapter, tmp_path / "out")
    with pytest.raises(ValueError, match="is there already"):
        merge(tiny_llm, adapter, other)
    assert sorted(tmp_path.iterdir()) == before
    assert json.loads((other / make_tiny.MARKER).read_text())["seed"] == 1


def test_an_empty_folder_may_be_written_to(tiny_llm, adapter, tmp_path):
    (tmp_path / "out").mkdir()
    assert (merge(tiny_llm, adapter, tmp_path / "out") / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_merged_folder_says_what_it_was_made_from_and_is_checked(tiny_llm, adapter, tmp_path):
    out = merge(tiny_llm, adapter, tmp_path / "merged")
    about = json.loads((out / "merged_from.json").read_text())
    base = llm.load(tiny_llm, "float32", "sdpa")[0]
    assert about["base"] == {"fingerprint": llm.fingerprint(base), "name": tiny_llm.name}
    assert about["adapter"]["adapter_model.safetensors"] == hashes.of_file(adapter / "adapter_model.safetensors")
    llm.load(out, "float32", "sdpa")
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DamagedError, match=r"model\.safetensors: damaged, its \d+ bytes are not those"):
        llm.load(out, "float32", "sdpa")


def test_R5_hidden_files_are_no_weights(tiny_llm, adapter, tmp_path):
    base = shutil.copytree(tiny_llm, tmp_path / "base")
    for name in ("._model.safetensors", ".DS_Store", "._config.json"):
        (base / name).write_bytes(b"Mac OS X")
    out = merge(base, adapter, tmp_path / "merged")
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    (base / "model.safetensors").unlink()
    with pytest.raises(llm.ModelError, match=r"need weights as \*\.safetensors, found none"):
        llm.load(base, "float32", "sdpa")


@pytest.mark.slow
def test_the_command(tiny_llm, adapter, tmp_path, run_command):
    done = run_command("audio_llm.merge", f"--model={tiny_llm}", f"--adapter={adapter}", f"--out={tmp_path / 'merged'}")
    assert done.returncode == 0, done.stderr
    assert "from_pretrained loads it" in done.stdout
    assert (tmp_path / "merged" / "model.safetensors").is_file()
