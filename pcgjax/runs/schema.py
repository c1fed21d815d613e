"""What each field of a config may hold, checked as a whole before anything is read or written.

    schema.check(config)

`rules` has the fields of a system and their rules; what goes beyond one field stands in `_RELATIONS` and `_UNREAD`.
The choices that only modules above this one read are stated here, and they read them here.
"""

from __future__ import annotations

import difflib
import functools
import math
import runpy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from pcgjax.runs.base_config import SWEPT, base
from pcgjax.runs.config import flat_fields, with_fields
from pcgjax.runtime.config_flag import CONFIGS
from pcgjax.runtime.names import nearest

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine")
PIPELINES = ("resident", "stream", "auto")
BALANCES = ("none", "class", "database_class")
REMATS = ("none", "dots", "full")
ABLATION_SETTINGS = ("synthetic", "person", "leave_database_out")
FRONT_ENDS = ("none", "crop", "gate")
QUESTION_SITES = ("audible", "all")
QUESTION_PADDINGS = ("other", "repeat")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
DTYPES = ("float32", "bfloat16")
ENCODERS = ("wav2vec2", "hubert", "distilhubert")
ENCODER_SIZES = ("base", "tiny")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")
_MANY = 10**6  # of what is counted; more is a slip of the hand, or does not fit into int32 or memory
_LARGE = 2**16  # a size of a net or a transform


Rule = Callable[[Any], str]  # of a field: what is wrong with a value; "": nothing


# ---------------------------------------------------------------------------------------------------- kinds of rule


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(least: int = 0, most: int = _MANY) -> Rule:
    def problem(value: Any) -> str:
        if not isinstance(value, int) or isinstance(value, bool):
            return "must be a whole number"
        if value < least:
            return f"must be at least {least}"
        return f"must be at most {most}" if value > most else ""

    return problem


def number(
    least: float | None = None, most: float | None = None, above: float | None = None, below: float | None = None,
    infinite: bool = False,
) -> Rule:  # fmt: skip
    """infinite: inf is allowed too, where it says that something is off."""
    if least is not None and most is not None:
        says = f"must lie between {least:g} and {most:g}"
    else:
        limits = {"at least": least, "above": above, "below": below, "at most": most}
        says = "must be " + " and ".join(f"{word} {x:g}" for word, x in limits.items() if x is not None)
    says += ", or inf" if infinite else ""

    def problem(value: Any) -> str:
        if not _real(value):
            return "must be a number"
        if infinite and value == math.inf:
            return ""
        if abs(value) > 3e38 or not math.isfinite(value):  # beyond float32; a whole number may fit no float either
            return f"must be a finite number; {says}" if says != "must be " else "must be a finite number"
        fits = (
            (least is None or value >= least) and (most is None or value <= most)
            and (above is None or value > above) and (below is None or value < below)
        )  # fmt: skip
        return "" if fits else says

    return problem


def flag() -> Rule:
    return lambda value: "" if isinstance(value, bool) else "must be True or False"


def text(least: int = 0) -> Rule:
    def problem(value: Any) -> str:
        if not isinstance(value, str) or len(value) < least:
            return "must be text" + " and not empty" * bool(least)
        return "has a NUL character" if "\0" in value else ""

    return problem


def choice(names: Iterable[str]) -> Rule:
    names = tuple(names)
    shown = ", ".join(repr(name) if name == "" else name for name in names)

    def problem(value: Any) -> str:
        if isinstance(value, str) and value in names:
            return ""
        if len(names) == 1:
            return f"only {names[0]} is offered here"
        like = difflib.get_close_matches(value, names, 1) if isinstance(value, str) else []
        return f"choose one of {shown}{'; nearest: ' + like[0] if like else ''}"

    return problem


def each(rule: Rule, least: int = 0, most: int = 1000, length: int | None = None) -> Rule:
    """A tuple or list of values that all follow `rule`."""
    least, most = (least, most) if length is None else (length, length)

    def problem(value: Any) -> str:
        if not isinstance(value, list | tuple):
            return "must be a tuple, as (1, 2)"
        if not least <= len(value) <= most:
            return f"must hold {length} values" if length is not None else f"must hold {least} to {most} values"
        found = [(one, rule(one)) for one in value]
        return next((f"{shown(one)} {what}" for one, what in found if what), "")

    return problem


def odd(rule: Rule) -> Rule:
    return lambda value: rule(value) or ("" if value % 2 else f"must be odd, not {value}")


def shown(value: Any) -> str:
    """A value in one short line."""
    try:
        words = " ".join(repr(value).split())
    except (ValueError, RecursionError) as error:  # a whole number of more than 4,300 digits; nesting without end
        words = f"<{type(value).__name__}: {error}>"
    return words if len(words) <= 80 else words[:77] + "..."


# ------------------------------------------------------------------------------------------------ the fields' rules


def rules(config: ml_collections.ConfigDict) -> dict[str, Rule]:
    """{field: rule} of the system that the config is of.

    Raises:
      ValueError: no system of that name.
    """
    task = config.get("task") if isinstance(config, ml_collections.ConfigDict | Mapping) else None
    name = task.get("name") if isinstance(task, ml_collections.ConfigDict | Mapping) else None
    if not isinstance(name, str) or name not in _SYSTEMS:
        raise ValueError(f"task.name={shown(name)}: {choice(_SYSTEMS)(name)}")
    return _common() | _SYSTEMS[name](config)


def _common() -> dict[str, Rule]:
    from pcgjax.data.splits import KINDS

    return {
        "seed": whole(0, 2**31 - 1),
        "data.prepared": text(), "data.shuffle_labels": flag(),
        "split.kind": choice(KINDS), "split.fractions": each(number(above=0, below=1), length=3),
        "split.fold": whole(), "split.folds": whole(3), "split.database": text(), "split.names": text(),
        "split.file": text(), "split.allow_leaks": flag(),
        "task.name": text(),
        "train.epochs": whole(1), "train.batch_recordings": whole(1),
        "evaluation.resamples": whole(1),
        "parallel.fsdp": whole(1),
    }  # fmt: skip


def _jax(classifies: bool) -> dict[str, Rule]:
    """The fields of every system of the JAX trainer."""
    from pcgjax import metrics, thresholds
    from pcgjax.runtime.sharding import STRATEGIES

    return {
        "data.pipeline": choice(PIPELINES), "data.train_share": number(above=0, most=1),
        "task.target": text(1 if classifies else 0),
        "model.bfloat16": flag(),
        "sapt.interval": whole(), "sapt.factor": number(above=0, most=1), "sapt.metric": choice(thresholds.METRICS),
        "sapt.smooth": choice(thresholds.SMOOTHS),
        "optimizer.name": choice(OPTIMIZERS), "optimizer.learning_rate": number(above=0),
        "optimizer.schedule": choice(SCHEDULES), "optimizer.warmup_steps": whole(),
        "optimizer.momentum": number(least=0, below=1), "optimizer.weight_decay": number(least=0),
        "optimizer.clip_norm": number(least=0), "optimizer.frozen": each(text()),
        "train.accumulate": whole(1), "train.remat": choice(REMATS), "train.balance": choice(BALANCES),
        "train.checkpoint_steps": whole(1), "train.start_from": text(),
        "train.select": choice(("loss", *(metrics.METRICS if classifies else ("accuracy",)))),
        "evaluation.batch_recordings": whole(1), "evaluation.threshold": number(least=0, most=1),
        "parallel.strategy": choice(STRATEGIES),
        "profile.start": whole(), "profile.steps": whole(),
    }  # fmt: skip


_WINDOW_S = number(above=0, most=600)
_SNR_DB = number(least=-300, most=300, infinite=True)
_HZ = number(above=0, most=1e6)


def _cnn(config: Any) -> dict[str, Rule]:
    from pcgjax.tasks.base import FILTERS

    return _jax(True) | {
        "features.window_s": _WINDOW_S, "features.overlap": number(least=0, below=1),
        "features.filter": choice(FILTERS), "features.filter_order": whole(1, 32),
        "features.low_hz": _HZ, "features.high_hz": _HZ, "features.noise_snr_db": _SNR_DB,
        "model.filters": each(whole(1, 4096), length=2), "model.kernel_size": odd(whole(1, 1023)),
        "model.hidden": whole(1, _LARGE),
    }  # fmt: skip


def _clips() -> dict[str, Rule]:
    """The fields of the log-mel clips and their losses."""
    from pcgjax.losses import LOSSES, NORMALIZATIONS
    from pcgjax.tasks.base import FILTERS

    return _jax(True) | {
        "features.window_s": _WINDOW_S, "features.noise_snr_db": _SNR_DB, "features.wavelet_level": whole(0, 4),
        "features.filter": choice(FILTERS), "features.filter_order": whole(1, 32), "features.high_hz": _HZ,
        "features.n_fft": whole(2, _LARGE), "features.hop": whole(1, _LARGE), "features.n_mels": whole(1, 4096),
        "features.htk": flag(), "features.top_db": number(above=0, most=1000),
        "model.dropout": number(least=0, below=1),
        "loss.name": choice(LOSSES), "loss.alpha": number(least=0, most=1),
        "loss.normalize": choice(NORMALIZATIONS), "loss.slope": number(least=0),
    }  # fmt: skip


def _hinf_lstm(config: Any) -> dict[str, Rule]:
    from pcgjax.kernels.hinf_lstm import IMPLEMENTATIONS
    from pcgjax.models.hinf_lstm import UPDATES

    fields = _clips() | {
        "model.cell": choice(UPDATES), "model.blocks": each(each(whole(1, 4096), 1, 100), 1, 16),
        "model.hidden": whole(1, _LARGE), "model.implementation": choice(IMPLEMENTATIONS),
    }  # fmt: skip
    if "ablation" in config:
        fields |= {
            "ablation.settings": each(choice(ABLATION_SETTINGS), 1), "ablation.seeds": whole(2, 10_000),
            "ablation.epochs": each(whole(1), length=2), "ablation.clips_per_recording": whole(1),
            "ablation.batch_clips": whole(1), "ablation.snrs_db": each(_SNR_DB),
            "ablation.synthetic_people": whole(1, 100_000),
        }  # fmt: skip
    return fields


def _image(config: Any) -> dict[str, Rule]:
    from pcgjax.models.image import NETS

    name = _text_at(config, "model", "name")
    sizes = {
        "resnet": (whole(1, _LARGE), each(whole(1, 100), length=4)),
        "mobilenet_v3": (number(above=0, most=100), whole(1, 15)),
        "vit": (whole(1, _LARGE), whole(1, 200)),
    }  # fmt: skip
    width, blocks = sizes.get(name, (number(above=0), lambda value: ""))
    return _clips() | {
        "model.name": choice(NETS), "model.width": width, "model.blocks": blocks, "model.checkpoint": text(),
    }  # fmt: skip


def _segmenter(config: Any) -> dict[str, Rule]:
    from pcgjax.kernels.selective_scan import IMPLEMENTATIONS
    from pcgjax.segmentation.states import TARGETS

    fields = _jax(False) | {
        "task.frames": choice(TARGETS),
        "features.window_s": _WINDOW_S, "features.step_s": number(above=0, most=10), "features.noise_snr_db": _SNR_DB,
        "features.masked_bands": whole(0, 4096), "features.response_db": number(least=0, most=200),
        "features.noise": flag(), "features.stretch": number(least=0, below=1),
        "model.name": choice(("frames", "ssamba")), "model.width": whole(1, _LARGE), "model.depth": whole(1, 1000),
        "model.bidirectional": flag(), "model.implementation": choice(IMPLEMENTATIONS),
        "evaluation.shortest_on_s": number(least=0, most=60), "evaluation.shortest_off_s": number(least=0, most=60),
    }  # fmt: skip
    if _text_at(config, "model", "name") == "ssamba":
        return fields | {"model.checkpoint": text(), "model.remat": flag()}
    return fields | {
        "features.n_fft": whole(2, _LARGE), "features.n_mels": whole(1, 4096),
        "features.low_hz": number(least=0, most=1e6), "features.high_hz": _HZ,
        "model.d_state": whole(1, 1024), "model.expand": whole(1, 64), "model.dropout": number(least=0, below=1),
    }  # fmt: skip


def _ssamba_pretrain(config: Any) -> dict[str, Rule]:
    from pcgjax.kernels.selective_scan import IMPLEMENTATIONS

    return _jax(False) | {
        "features.window_s": _WINDOW_S,
        "model.checkpoint": text(), "model.width": whole(1, _LARGE), "model.depth": whole(1, 1000),
        "model.mask_patches": whole(1), "model.remat": flag(), "model.implementation": choice(IMPLEMENTATIONS),
    }  # fmt: skip


def _classical(config: Any) -> dict[str, Rule]:
    from pcgjax import metrics
    from pcgjax.runtime.sharding import STRATEGIES

    return {
        "data.database": text(), "data.noisy": flag(), "task.target": text(1),
        "features.high_hz": _HZ, "features.filter_order": whole(1, 32),
        "features.window_s": number(above=0, most=10), "features.hop_s": number(above=0, most=10),
        "features.threshold": number(infinite=True), "features.burg_order": whole(1, 1000),
        "features.nfft": whole(2, _LARGE), "features.decibels": flag(),
        "model.neighbours": whole(1), "model.svm_tolerance": number(above=0), "model.svm_degree": whole(1, 20),
        "model.hidden": whole(1, _LARGE), "model.mlp_regularisation": number(least=0),
        "model.logistic_c": number(above=0),
        "train.select": choice(metrics.METRICS), "evaluation.threshold": number(least=0, most=1),
        "parallel.strategy": choice(STRATEGIES),
        "experiment.runs": whole(0, 10_000), "experiment.test_share": number(above=0, below=1),
    }  # fmt: skip


def _torch() -> dict[str, Rule]:
    """The fields that PyTorch's trainers share."""
    return {
        "task.target": text(1),
        "optimizer.name": choice(("adamw",)), "optimizer.schedule": choice(("cosine",)),
        "optimizer.learning_rate": number(above=0), "optimizer.warmup_steps": whole(),
        "optimizer.weight_decay": number(least=0), "optimizer.clip_norm": number(above=0),
        "train.checkpoint_steps": whole(1), "parallel.strategy": choice(("torch",)),
        "model.dtype": choice(DTYPES),
    }  # fmt: skip


def _audio_encoder(config: Any) -> dict[str, Rule]:
    from pcgjax import metrics

    return _torch() | {
        "task.target": text(1),
        "features.window_s": _WINDOW_S,
        "model.architecture": choice(ENCODERS), "model.folder": text(), "model.size": choice(ENCODER_SIZES),
        "model.freeze_feature_encoder": flag(),
        "train.portion_clips": whole(1), "train.balance": choice(BALANCES),
        "train.select": choice(("loss", *metrics.METRICS)), "evaluation.threshold": number(least=0, most=1),
    }  # fmt: skip


def _audio_llm(config: Any) -> dict[str, Rule]:
    return _torch() | {
        "data.clip_s": number(above=0.04, most=30),
        "questions.tasks": each(text(), 1), "questions.sites": choice(QUESTION_SITES),
        "questions.padding": choice(QUESTION_PADDINGS), "questions.a_clip": whole(1),
        "front_end.kind": choice(FRONT_ENDS), "front_end.segments": text(),
        "front_end.attenuation_db": number(least=0, most=300),
        "model.attention": choice(ATTENTIONS), "model.share_prefix": flag(), "model.checkpointing": flag(),
        "model.compile": flag(),
        "lora.rank": whole(1, _LARGE), "lora.alpha": number(above=0), "lora.dropout": number(least=0, below=1),
        "lora.targets": each(choice(LORA_TARGETS), 1), "lora.audio_tower": flag(), "lora.projector": flag(),
        "lora.llm": flag(),
        "train.accumulate": whole(1), "train.log_steps": whole(1), "evaluation.batch_recordings": whole(1),
    }  # fmt: skip


_SYSTEMS: dict[str, Callable[[Any], dict[str, Rule]]] = {
    "cnn": _cnn, "hinf_lstm": _hinf_lstm, "image": _image, "segmenter": _segmenter,
    "ssamba_pretrain": _ssamba_pretrain, "classical": _classical, "audio_encoder": _audio_encoder,
    "audio_llm": _audio_llm,
}  # fmt: skip
OPTIONAL = ("data.train_share",)


def _text_at(config: Any, part: str, field: str) -> str:
    inner = config.get(part)
    value = inner.get(field) if isinstance(inner, ml_collections.ConfigDict | Mapping) else None
    return value if isinstance(value, str) else ""


# --------------------------------------------------------------------------------- what fields need of each other

Values = Mapping[str, Any]


def _relations(v: Values) -> Iterator[str]:
    """What is wrong with fields that each are right; v: all fields."""
    if abs(sum(v["split.fractions"]) - 1) > 1e-6:
        yield f"split.fractions={shown(v['split.fractions'])}: must sum to 1"
    if v["split.kind"] == "person_kfold" and v["split.fold"] >= v["split.folds"]:
        yield f"split.fold={v['split.fold']}: must be below split.folds={v['split.folds']}"
    filtered = v.get("features.filter", "on") != "none"
    if filtered and "features.low_hz" in v and v["features.low_hz"] >= v["features.high_hz"]:
        yield f"features.low_hz={v['features.low_hz']}: must be below features.high_hz={v['features.high_hz']}"
    if v["parallel.strategy"] == "pmap" and v["parallel.fsdp"] > 1:
        yield f"parallel.fsdp={v['parallel.fsdp']}: must be 1 with parallel.strategy=pmap"
    if v.get("experiment.runs") == 1:
        yield "experiment.runs=1: one run has no deviation; choose 0, for none, or at least 2"


class _Unread(NamedTuple):
    """Fields that nothing reads with some values of others."""

    fields: tuple[str, ...]
    governing: tuple[str, ...]  # the fields that this goes by
    read: Callable[[Values], bool]


_UNREAD = (
    _Unread(("optimizer.momentum",), ("optimizer.name",), lambda v: v["optimizer.name"] == "sgd"),
    _Unread(("optimizer.weight_decay",), ("optimizer.name",), lambda v: v["optimizer.name"] == "adamw"),
    _Unread(("optimizer.warmup_steps",), ("optimizer.schedule",), lambda v: v["optimizer.schedule"] == "cosine"),
    _Unread(("sapt.factor", "sapt.metric", "sapt.smooth"), ("sapt.interval",), lambda v: v["sapt.interval"] > 0),
    _Unread(("sapt.interval",), ("task.name",), lambda v: v["task.name"] not in ("segmenter", "ssamba_pretrain")),
    # The ablation trains with both losses.
    _Unread(
        ("loss.alpha", "loss.normalize", "loss.slope"), ("loss.name",),
        lambda v: v["loss.name"] == "pwl" or "ablation.seeds" in v,
    ),
    _Unread(
        ("features.filter_order", "features.low_hz", "features.high_hz"), ("features.filter",),
        lambda v: v.get("features.filter", "on") != "none",
    ),
    _Unread(("split.fold", "split.folds"), ("split.kind",), lambda v: v["split.kind"] == "person_kfold"),
    _Unread(("split.database",), ("split.kind",), lambda v: v["split.kind"] == "leave_database_out"),
    _Unread(("split.names",), ("split.kind",), lambda v: v["split.kind"] == "paper301"),
    _Unread(
        ("evaluation.shortest_on_s", "evaluation.shortest_off_s"), ("task.frames",),
        lambda v: v["task.frames"] != "states",
    ),
    _Unread(("profile.start",), ("profile.steps",), lambda v: v["profile.steps"] > 0),
    _Unread(("train.start_from",), ("optimizer.frozen",), lambda v: len(v["optimizer.frozen"]) > 0),
    _Unread(("front_end.segments",), ("front_end.kind",), lambda v: v["front_end.kind"] != "none"),
    _Unread(("front_end.attenuation_db",), ("front_end.kind",), lambda v: v["front_end.kind"] == "gate"),
    _Unread(("model.size",), ("model.folder",), lambda v: not v["model.folder"]),
    _Unread(("experiment.test_share",), ("experiment.runs",), lambda v: v["experiment.runs"] > 0),
    _Unread(("parallel.fsdp",), ("task.name",), lambda v: v["task.name"] != "classical"),
)  # fmt: skip


def _unread(all_values: Sequence[Values], free: Iterable[str]) -> Iterator[str]:
    """The fields whose value none of the runs reads; all_values: of each run; free: fields that differ between runs."""
    free, first = set(free), all_values[0]
    for one in _UNREAD:
        if free & {*one.governing} or any(name not in first for name in one.governing):
            continue
        for field in one.fields:
            if field not in first or field in free or any(one.read(values) for values in all_values):
                continue
            usual = _usual(first["task.name"], field)
            if usual and first[field] not in usual:
                why = ", ".join(f"{name}={first[name]}" for name in one.governing)
                yield f"{field}={shown(first[field])}: nothing reads it with {why}; leave it at {shown(usual[0])}"


@functools.cache
def _usual(task: str, field: str) -> tuple[Any, ...]:
    """The values that a field has where nobody has changed it: of the base, then of the system's configs."""
    configs = [base(task), *(runpy.run_path(str(path))["get_config"]() for path in sorted(CONFIGS.glob("*.py")))]
    fields = [flat_fields(config) for config in configs]
    return tuple(one[field] for one in fields if one["task.name"] == task and field in one)


# ------------------------------------------------------------------------------------------------------- the check


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, `part.field=value: what is allowed`, for the first thing that is wrong with a config, its
    variants, stages and sweep included. Only configs/ are read, and nothing is written."""
    known = rules(config)
    values = _values(config, known)
    _refuse(values, known)
    # Each is a run: the config with what it says otherwise.
    others = {}
    for part in ("variants", "stages"):
        for name, overrides in _named(config, part):
            fields = {k: v for k, v in _walk(overrides, known, f"{part}.{name}.")}
            one = with_fields(config, fields) if fields else config
            whole_ = _values(one, rules(one), f"{part}.{name}: ")
            _refuse(whole_, rules(one), f"{part}.{name}: ")
            others[part, name] = whole_
    swept = _swept(config, known)
    runs = list(others.values()) or [values]
    differing = {field for one in runs for field in one if one[field] != runs[0].get(field)}
    for problem in _unread(runs, swept | (differing if len(runs) > 1 else set())):
        raise ValueError(problem)


def _refuse(values: Values, known: Mapping[str, Rule], where: str = "") -> None:
    for field, value in values.items():
        if what := known[field](value):
            raise ValueError(f"{where}{field}={shown(value)}: {what}")
    for problem in _relations(values):
        raise ValueError(f"{where}{problem}")


def _values(config: ml_collections.ConfigDict, known: Mapping[str, Rule], where: str = "") -> dict[str, Any]:
    """{field: value} of a config without its variants, stages and sweep.

    Raises:
      ValueError: a field that is not known, or one that is missing.
    """
    plain = {name: value for name, value in config.items() if name not in ("variants", "stages", "sweep")}
    values = dict(_walk(plain, known))
    for field in known:
        if field not in values and field not in OPTIONAL:
            raise ValueError(f"{where}the config has no {field}, which task.name={config.task.name} needs")
    return values


def _walk(tree: Any, known: Mapping[str, Rule], above: str = "") -> Iterator[tuple[str, Any]]:
    """(field, value) of nested fields; above: what stands before the names in messages."""

    def walk(inner: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        parts = {field.removeprefix(prefix).partition(".")[0] for field in known if field.startswith(prefix)}
        for name, value in inner.items():
            path = f"{prefix}{name}"
            if path in known:
                yield path, value
            elif not isinstance(name, str) or name not in parts:
                where = f"{above}{prefix}".rstrip(".") or "the config"
                what = f"{where} has no {'field' if prefix else 'part'} {name}"
                raise ValueError(f"{what}; {nearest(str(name), sorted(parts))}")
            elif isinstance(value, ml_collections.ConfigDict | Mapping):
                yield from walk(value, f"{path}.")
            else:
                fields = sorted(field.removeprefix(f"{path}.") for field in known if field.startswith(f"{path}."))
                raise ValueError(f"{above}{path}={shown(value)}: a part, which holds {', '.join(fields)}")

    yield from walk(tree, "")


def _named(config: ml_collections.ConfigDict, part: str) -> list[tuple[str, Any]]:
    """(name, overrides) of the config's variants or stages."""
    named = config.get(part)
    if named is None:
        return []
    if not isinstance(named, ml_collections.ConfigDict | Mapping):
        raise ValueError(f"{part}={shown(named)}: must be names with the fields in which each differs")
    found = list(named.items())
    for name, overrides in found:
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"{part}: {shown(name)} is no name of a folder")
        if not isinstance(overrides, ml_collections.ConfigDict | Mapping):
            raise ValueError(f"{part}.{name}={shown(overrides)}: must hold the fields in which it differs")
    return found


def _swept(config: ml_collections.ConfigDict, known: Mapping[str, Rule]) -> set[str]:
    """The fields that `config.sweep` gives values."""
    sweep = config.get("sweep")
    if sweep is None:
        return set()
    if not isinstance(sweep, ml_collections.ConfigDict | Mapping):
        raise ValueError(f"sweep={shown(sweep)}: must hold fields, each with values and commas between")
    can = {field: rule for field, rule in known.items() if field.partition(".")[0] in SWEPT}
    swept = set()
    for field, value in _walk(sweep, can, "sweep."):
        if not isinstance(value, str):
            raise ValueError(f"sweep.{field}={shown(value)}: must be text, values with commas between")
        if value:
            swept.add(field)
    return swept
