"""Configs: loaded by name, changed by field, compared with a saved one."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from pcgjax.runs.base_config import base
from pcgjax.runtime.config_flag import config_of, path_of
from pcgjax.runtime.files import CheckpointError
from pcgjax.runtime.names import nearest


def flat_fields(value: Any, above: str = "") -> dict[str, Any]:
    """Nested fields as {"model.hidden": 64, ...}."""
    fields: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping | ml_collections.ConfigDict) and inner:
            fields |= flat_fields(inner, f"{above}{key}.")
        else:
            fields[f"{above}{key}"] = inner
    return fields


Fields = dict[str, Any]  # "optimizer.learning_rate" -> value


def with_fields(config: ml_collections.ConfigDict, changes: Fields) -> ml_collections.ConfigDict:
    """A copy of the config with the fields `changes`, which may have other types."""
    one = config.copy_and_resolve_references()
    with one.ignore_type():
        one.update_from_flattened_dict(changes)
    return one


def load_config(name: str, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config of a name that `pcgjax configs` lists, or of a file, or a variant of it (NAME:VARIANT), with the
    fields `changes` ("train.epochs": 2).

    Raises:
      ValueError: there is no such config, or it has no such field.
    """
    name, _, variant = name.partition(":")
    config = config_of(path_of(name), variant)
    fields = flat_fields(config)
    for field in changes:
        if field not in fields and not any(known.startswith(f"{field}.") for known in fields):
            raise ValueError(f"configs/{name}.py: has no field {field}; {nearest(field, fields)}")
    with config.ignore_type():
        config.update_from_flattened_dict(dict(changes))
    return config


def plain_config(config: ml_collections.ConfigDict) -> dict:
    """As JSON gives it back, without `sweep`, which is no part of a run."""
    plain = json.loads(config.to_json_best_effort())
    plain.pop("sweep", None)
    return plain


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config of the JAX trainer (config.json, a checkpoint's meta) with the fields that it lacks, all off.

    So a run of an earlier version, whose config had fewer fields, is loaded and resumed as any other.
    """
    task = saved.get("task", {}).get("name", "")
    return _filled(json.loads(base(task).to_json_best_effort()), saved)


def _filled(whole: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**whole, **saved}
    for name, inner in saved.items():
        if isinstance(inner, Mapping) and isinstance(whole.get(name), Mapping):
            filled[name] = _filled(whole[name], inner)
    return filled


def refuse_changes(saved: dict, now: dict, workdir: pathlib.Path, also_free: Iterable[tuple[str, str]] = ()) -> None:
    """A resumed run may train longer and log or stream otherwise, but must be the same experiment.

    A run of an earlier version goes on with the command that began it: what its config lacks was off.

    saved, now: plain configs; also_free: more (part, field) that may change.
    Raises:
      CheckpointError: naming the first field that differs.
    """
    if differs := difference(saved, now, also_free):
        field, before, after = differs
        raise CheckpointError(f"{workdir}: trained with {field}={before}, now {after}; give another --workdir")


def difference(saved: dict, now: dict, also_free: Iterable[tuple[str, str]] = ()) -> tuple[str, Any, Any] | None:
    """(field, its value in `saved`, in `now`) of the first by which two plain configs are other experiments."""
    saved = completed(saved)
    free = {("train", "epochs"), ("train", "checkpoint_steps"), ("data", "prepared"), ("data", "pipeline"),
            ("split", "file"), ("evaluation", "batch_recordings"), ("train", "start_from"),
            # Where it runs; the order of the data stays, and so does the arithmetic, up to rounding.
            ("parallel", "strategy"), ("parallel", "fsdp"), ("train", "accumulate"), ("train", "remat"),
            ("profile", "start"), ("profile", "steps")}  # fmt: skip
    free |= set(also_free)
    if now.get("optimizer", {}).get("schedule", "constant") != "constant":
        free.discard(("train", "epochs"))  # the schedule ends with them
    for part in now:
        old, new = saved.get(part), now[part]
        pairs = (
            [((part, k), (old or {}).get(k), v) for k, v in new.items()]
            if isinstance(new, dict)
            else [((part,), old, new)]
        )
        for name, before, after in pairs:
            # A field that the saved run's version had not yet is as good as off.
            if before != after and (before is not None or after) and name not in free:
                return ".".join(name), before, after
    return None


def refuse_other_order(saved: str, now: str, workdir: pathlib.Path) -> None:
    """A resumed run goes on in the order of data that its checkpoint was trained in. Both: digests of that order."""
    if saved != now:
        raise CheckpointError(
            f"{workdir}: its checkpoint was trained in another order of data (data or split changed); give another "
            "--workdir, or what it was trained with"
        )


def one_of(config: ml_collections.ConfigDict, overrides: Any, split_file: str) -> ml_collections.ConfigDict:
    """One variant, stage or member of a training: the config with `overrides`, and with the split that all share."""
    one = config.copy_and_resolve_references()
    with one.unlocked():
        for part in ("sweep", "variants", "stages"):
            if part in one:
                one[part] = ml_collections.ConfigDict()
    with one.ignore_type():
        one.update(overrides)
    one.split.file = config.split.file or split_file
    return one
