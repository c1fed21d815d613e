"""Adapters of others: the older layout and harmless prefixes are translated, anything else that is odd is named."""

from __future__ import annotations

import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable

import pytest
import torch
from ml_collections import ConfigDict
from safetensors.torch import load_file, save_file

from pcgjax.audio_llm import adapter_files
from pcgjax.audio_llm import model as llm
from pcgjax.runtime.files import DamagedError

PARTS = {"audio_tower": True, "projector": True, "llm": True}
LORA = ConfigDict({"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ("q_proj", "v_proj", "fc1"), **PARTS})
OLDER = (
    r"(audio_tower\.layers\.\d+\.(self_attn\.[qv]_proj|fc1)|multi_modal_projector\.linear"
    r"|language_model\.model\..*[qv]_proj)"
)
NEWER = OLDER.replace(r"language_model\.model", r"language_model\.layers").replace("(audio", r"model\.(audio", 1)


@pytest.fixture(scope="module")
def base(tiny_llm):
    """The tiny model; a test leaves it as it was."""
    return llm.load(tiny_llm, "float32", "sdpa")[0]


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> pathlib.Path:
    """An adapter of it as training writes it; not to be written to."""
    model = llm.add_lora(base, LORA)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    llm.save_adapter(model, folder)
    model.unload()
    return folder


@pytest.fixture
def changed(adapter, tmp_path):
    """changed(rename, config): somebody's adapter, with each tensor renamed (None: left out) and config fields."""

    def make(rename: Callable[[str], str | None] = lambda name: name, **config) -> pathlib.Path:
        folder = tmp_path / "theirs"
        shutil.copytree(adapter, folder)
        (folder / "base.json").unlink()
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({rename(k): v for k, v in tensors.items() if rename(k)}, folder / "adapter_model.safetensors")
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return make


def older(name: str) -> str:
    name = name.removeprefix("base_model.model.model.")
    return "base_model.model." + re.sub("^language_model", "language_model.model", name)


def refused(base, folder: pathlib.Path, match: str, error: type[ValueError] = llm.ModelError) -> None:
    before = [name for name, _ in base.named_parameters()]
    with pytest.raises(error, match=match) as raised:
        llm.with_adapter(base, folder)
    assert "\n" not in str(raised.value)
    assert [name for name, _ in base.named_parameters()] == before


@pytest.mark.parametrize(
    ("rename", "config"),
    [
        (older, {}),
        (older, {"target_modules": ["q_proj", "v_proj", "fc1", "multi_modal_projector.linear"]}),
        (older, {"target_modules": OLDER}),
        (lambda name: name, {"target_modules": NEWER}),
        (lambda name: f"base_model.model.{name}", {}),
        (lambda name: name.removeprefix("base_model.model."), {}),
        (lambda name: f"module.{older(name)}", {}),
        (lambda name: name.replace("model.model.", "model.model.model."), {}),
        (lambda name: name.replace(".weight", ".default.weight"), {}),
    ],
    ids=["older", "older, list", "older, regex", "newer, regex", "twice", "bare", "DDP", "one more", "named"],
)
def test_W5_names_of_other_versions_and_wrappers_are_translated(rename, config, base, adapter, changed):
    wanted = load_file(adapter / "adapter_model.safetensors")
    adapted = llm.with_adapter(base, changed(rename, **config))
    have = {name.replace(".default", ""): p for name, p in adapted.named_parameters() if "lora_" in name}
    assert have.keys() == wanted.keys()
    assert all(torch.equal(have[name], wanted[name]) for name in wanted)
    assert not any(p.requires_grad for p in adapted.parameters())
    adapted.unload()


@pytest.mark.parametrize(
    ("rename", "config", "match"),
    [
        (lambda name: None if "audio_tower" in name else name, {}, r"audio_tower\S+ is missing.*\(and 23 more\)"),
        (lambda name: None if "0.fc1.lora_B" in name else name, {}, r"0\.fc1\.lora_B\.weight is missing, adapter_con"),
        (lambda name: name.replace("layers.0", "layers.9"), {}, r"layers\.9\S+ is no tensor of its adapter \(and 19"),
        (lambda name: f"visual.{name}", {}, r"visual\.base_model\S+ is no tensor"),
        (lambda name: name, {"target_modules": ["q_proj"]}, r"is no tensor of its adapter \(and 25 more"),
        (lambda name: name, {"r": 8}, r"lora_A.weight has shape \(4, 64\), needs \(8, 64\) \(and 41 more"),
        (lambda name: name, {"rank_pattern": {"fc1": 2}}, r"fc1\S+ has shape \(4, 64\), needs \(2, 64\) \(and 7 more"),
        (lambda name: name, {"use_dora": True}, r"lora_magnitude_vector is missing"),
        (lambda name: name, {"peft_type": "IA3"}, "only LORA is understood"),
        (lambda name: name, {"lora_alpha": math.nan}, "lora_alpha=nan .*need numbers"),
        (lambda name: name, {"init_lora_weights": "pissa"}, "changed the base weights"),
        (lambda name: name, {"of_a_later_version": True}, "does not know of_a_later_version=True"),
        (lambda name: name, {"target_modules": "(("}, "does not fit this model: missing"),
        (lambda name: name, {"target_modules": None}, "does not fit this model: .*target_modules"),
    ],
)
def test_W5_what_does_not_fit_is_named(rename, config, match, base, changed):
    refused(base, changed(rename, **config), match)


def test_W5_two_names_of_one_tensor_are_named(base, changed):
    folder = changed()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {older(name): tensors[name] + 1}, path)
    refused(base, folder, "are the same tensor of this model")


def test_R6_a_nan_and_a_type_without_fractions_are_named(base, changed):
    folder = changed()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * math.inf}, path)
    refused(base, folder, f"{re.escape(name)} holds a NaN or an infinity")
    save_file(tensors | {name: tensors[name].int()}, path)
    refused(base, folder, f"{re.escape(name)} holds int32, needs floats")
    path.write_bytes(path.read_bytes()[:-100])
    refused(base, folder, "adapter_model.safetensors: cannot be read")
    (folder / "adapter_config.json").write_text("[1]")
    refused(base, folder, "cannot be read")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "base.json"])
def test_W3_a_flipped_bit_in_an_adapter_is_found_where_only_its_folder_was_copied(name, base, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "alone")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    refused(base, folder, f"{name}: damaged", DamagedError)


def test_the_older_names_of_modules(base):
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            tensor = f"base_model.model.{name}.lora_A.weight"
            assert adapter_files.translated(f"base_model.model.{adapter_files.older(name)}.lora_A.weight") == tensor
            assert adapter_files.translated(tensor) == tensor
