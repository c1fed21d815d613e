"""Adapters of others in PEFT's layout: every tensor of the file used and every adapted matrix given its pair, or an
error that names the first that is odd.

Names are translated where that is complete and unambiguous: transformers before 5 had Qwen2-Audio's parts without
`model.` before them and the language model's layers below `language_model.model.`; wrappers (DDP, FSDP, torch.compile,
a second PEFT) put prefixes before all names; some tools keep the adapter's own name before `.weight`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pathlib
import re
from collections import Counter
from typing import Any

import torch
from torch import nn

from pcgjax.audio_llm.weights import ModelError, first_and_more, not_finite, one_line, read

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
_PREFIX = "base_model.model."  # PEFT's, before the names that the model itself has
_WRAPPERS = r"(?:(?:base_model|model|module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)*"
_PARTS = re.compile(rf"{_WRAPPERS}(audio_tower|multi_modal_projector|language_model|lm_head)\.(.+)")
_WRAPPERS_WITHIN = re.compile(r"\.(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_ADAPTER_NAME = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+\.weight$")
# How LoRA begins: these also change the base weights, which a merge or a score here would not.
_CHANGE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_MOST_RANKS = 100_000


def translated(name: str) -> str:
    """A tensor's name in an adapter file as this version's PEFT and transformers write it, or the name itself."""
    found = _PARTS.fullmatch(_WRAPPERS_WITHIN.sub("", name))
    if not found:
        return name
    part, rest = found.groups()
    rest = _ADAPTER_NAME.sub(r".\1.weight", f".{rest}")[1:]
    if part == "language_model":
        rest = rest.removeprefix("model.")
        if rest.startswith("lm_head."):
            part, rest = "lm_head", rest.removeprefix("lm_head.")
    return f"{_PREFIX}{'' if part == 'lm_head' else 'model.'}{part}.{rest}"


def older(module: str) -> str:
    """The name that a module of Qwen2-Audio had in transformers before 5."""
    if module.startswith("lm_head"):
        return f"language_model.{module}"
    module = module.removeprefix("model.")
    return re.sub(r"^language_model(?=\.|$)", "language_model.model", module)


def attach(model: Any, folder: pathlib.Path) -> Any:
    """The model within the adapter of a folder, frozen, every tensor as in the file (float32 where that is shorter).

    Raises:
      ModelError: as the module's docstring says, or a config that cannot be understood; `model` is then as before.
    """
    weights, config = read(folder / WEIGHTS), read_config(folder)
    names = {name: translated(name) for name in weights}
    fix = "give the adapter's own base model, or the file as it was written"
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        both = [name for name in names if names[name] == twice[0]]
        raise ModelError(f"{folder / WEIGHTS}: {both[0]} and {both[1]} are the same tensor of this model; {fix}")
    by_name = {names[name]: (name, tensor) for name, tensor in weights.items()}
    problems: list[str] = []
    renamed = any(name != theirs for theirs, name in names.items())
    for candidate in (config, in_older_layout(config, model) if renamed else None):
        if candidate is None:
            continue
        try:
            adapted = _with_new(model, candidate)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, re.error) as error:
            problems = problems or [one_line(error)]
            continue
        odd = _fill(adapted, by_name)
        if not odd:
            return adapted
        adapted.unload()
        problems = min(problems or odd, odd, key=len)
    raise ModelError(f"{folder}: does not fit this model: {first_and_more(problems)}; {fix}")


def _with_new(model: Any, config: Any) -> Any:
    import peft

    try:
        return peft.get_peft_model(model, copy.deepcopy(config))
    except Exception:
        # PEFT puts layers in before it finds what is wrong.
        for name, layer in [*model.named_modules()]:
            if hasattr(layer, "base_layer"):
                above, _, last = name.rpartition(".")
                setattr(model.get_submodule(above), last, layer.base_layer)
        raise


def _fill(adapted: Any, by_name: dict[str, tuple[str, torch.Tensor]]) -> list[str]:
    """Sets the adapter's tensors; a line for each that is odd, and then sets none.

    by_name: name in this version's layout -> (name in the file, tensor).
    """
    import peft

    ours = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    odd = [f"{theirs} is no tensor of its adapter" for name, (theirs, _) in by_name.items() if name not in ours]
    odd += [f"{name} is missing, adapter_config.json adapts it" for name in ours if name not in by_name]
    both = [(*by_name[name], ours[name]) for name in ours if name in by_name]
    for name, tensor, mine in both:
        if tensor.shape != mine.shape:
            odd.append(f"{name} has shape {tuple(tensor.shape)}, needs {tuple(mine.shape)}")
        elif not tensor.is_floating_point():
            odd.append(f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, needs floats")
    bad = not_finite((name, tensor.to(mine.dtype)) for name, tensor, mine in both if tensor.is_floating_point())
    odd += [f"{name} holds a NaN or an infinity" for name in bad]
    if not odd:
        with torch.no_grad():
            for _, tensor, mine in both:
                mine.copy_(tensor)  # a state dict's tensors are the parameters' own memory
    return odd


def read_config(folder: pathlib.Path) -> Any:
    """The peft.LoraConfig of a folder's adapter_config.json, for use and not for training.

    Raises:
      ModelError: none, another method than LoRA, fields that this version of PEFT does not know, or numbers that
        cannot be.
    """
    import peft

    path = folder / CONFIG
    try:
        fields = dict(json.loads(path.read_bytes()))
        if fields.get("peft_type") != "LORA":
            raise ModelError(f"{path}: peft_type is {fields.get('peft_type')!r}; only LORA is understood here")
        known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
        if odd := [name for name, value in fields.items() if name not in known and value]:
            version = peft.__version__
            raise ModelError(f"{path}: PEFT {version} does not know {odd[0]}={fields[odd[0]]!r}; install a newer one")
        config: Any = peft.LoraConfig.from_pretrained(str(folder))
    except ModelError:
        raise
    except Exception as error:  # whatever PEFT meets in a file that anyone wrote
        raise ModelError(f"{path}: cannot be read: {one_line(error)}; copy or download it again") from None
    start = str(config.init_lora_weights).lower()
    if start.startswith(_CHANGE_BASE):
        raise ModelError(f"{path}: init_lora_weights={start} changed the base weights; convert it to LoRA in PEFT")
    ranks, scales = [config.r, *config.rank_pattern.values()], [config.lora_alpha, *config.alpha_pattern.values()]
    numbers = all(type(rank) is int and 1 <= rank <= _MOST_RANKS for rank in ranks)
    if not (numbers and all(type(scale) in (int, float) and math.isfinite(scale) for scale in scales)):
        raise ModelError(f"{path}: r={config.r!r}, lora_alpha={config.lora_alpha!r} (or their patterns): need numbers")
    config.init_lora_weights, config.inference_mode, config.revision = True, True, None
    config.base_model_name_or_path = None  # a path on somebody's machine: base.json says it better
    return config


def in_older_layout(config: Any, model: Any) -> Any:
    """The config with its module names, which transformers before 5 had, as this version has them; None where they
    name no module in the older layout, or need no translation."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    if config.target_modules in (None, "all-linear"):
        return None
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d)
    modules = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    try:
        chosen = [name for name in modules if check_target_module_exists(config, older(name))]
    except (re.error, TypeError, AttributeError):
        return None
    if not chosen:
        return None
    patterns = {}
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field) or {}
        keys = {name: get_pattern_key(list(pattern), older(name)) for name in chosen}
        patterns[field] = {re.escape(name): pattern[key] for name, key in keys.items() if key in pattern}
    changes: dict[str, Any] = {"target_modules": set(chosen)} | patterns
    changes |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    translated_config = copy.deepcopy(config)
    for field, value in changes.items():
        setattr(translated_config, field, value)
    return translated_config
