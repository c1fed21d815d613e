"""The check of a config: what it says of each kind of mistake, and that it has one list of each choice."""

from __future__ import annotations

import math

import ml_collections
import pytest

from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm.encoders.model import ARCHITECTURES, SIZES
from pcgjax.runs import schema
from pcgjax.runs.config import load_config
from pcgjax.runtime.config_flag import CONFIGS, comments_of, config_of, help_of, refused, with_path
from pcgjax.runtime.names import nearest
from pcgjax.systems import SYSTEMS
from pcgjax.tasks import TASKS
from pcgjax.training.population import train_population
from pcgjax.training.step import REMAT

VARIANTS = ["cnn:sweep", "hinf_lstm:small", "hinf_lstm:ablation", "segmenter_small:causal"]
NAMES = [*(path.stem for path in sorted(CONFIGS.glob("*.py"))), *VARIANTS]


@pytest.mark.parametrize("name", NAMES)
def test_each_config_passes(name):
    schema.check(load_config(name, {}))


def test_choices_above_the_schema_are_its_own():
    assert set(REMAT) == set(schema.REMATS)
    assert tuple(ARCHITECTURES) == schema.ENCODERS
    assert tuple(SIZES) == schema.ENCODER_SIZES
    assert llm.TARGETS == schema.LORA_TARGETS
    assert set(schema._SYSTEMS) == {*SYSTEMS, "audio_llm"} > set(TASKS)


WRONG = [
    ("cnn", {"train.epochs": 1.5}, "train.epochs=1.5: must be a whole number"),
    ("cnn", {"train.epochs": True}, "train.epochs=True: must be a whole number"),
    ("cnn", {"train.epochs": "2"}, "train.epochs='2': must be a whole number"),
    ("cnn", {"train.epochs": 0}, "train.epochs=0: must be at least 1"),
    ("cnn", {"train.epochs": 10**12}, "train.epochs=1000000000000: must be at most 1000000"),
    ("cnn", {"seed": -1}, "seed=-1: must be at least 0"),
    ("cnn", {"optimizer.learning_rate": math.nan}, "optimizer.learning_rate=nan: must be a finite number"),
    ("cnn", {"optimizer.learning_rate": math.inf}, "optimizer.learning_rate=inf: must be a finite number"),
    ("cnn", {"optimizer.learning_rate": None}, "optimizer.learning_rate=None: must be a number"),
    ("cnn", {"features.noise_snr_db": -math.inf}, "features.noise_snr_db=-inf: must be a finite number; .* or inf"),
    ("cnn", {"model.bfloat16": 1}, "model.bfloat16=1: must be True or False"),
    ("cnn", {"data.prepared": 5}, "data.prepared=5: must be text"),
    ("cnn", {"data.prepared": "a\0b"}, "data.prepared=.*has a NUL character"),
    ("cnn", {"optimizer.name": "adamm"}, "optimizer.name='adamm': choose one of sgd, adam, adamw; nearest: adam"),
    ("cnn", {"split.kind": None}, "split.kind=None: choose one of person, "),
    ("cnn", {"split.fractions": (0.5, 0.5)}, r"split.fractions=\(0.5, 0.5\): must hold 3 values"),
    ("cnn", {"split.fractions": (0.5, 0.5, 0.5)}, r"split.fractions=.*: must sum to 1"),
    ("cnn", {"split.fractions": (1.5, -0.25, -0.25)}, r"split.fractions=.*: 1.5 must be above 0 and below 1"),
    ("cnn", {"split.fractions": 0.5}, "split.fractions=0.5: must be a tuple"),
    ("cnn", {"model.filters": (4, "8")}, r"model.filters=\(4, '8'\): '8' must be a whole number"),
    ("cnn", {"features.low_hz": 400.0}, "features.low_hz=400.0: must be below features.high_hz=400.0"),
    ("cnn", {"train": 5}, "train=5: a part, which holds "),
    ("cnn", {"train.epochs": {"x": 1}}, "train.epochs=.*: must be a whole number"),
    ("cnn", {"task.name": "cn"}, "task.name='cn': choose one of cnn, .*; nearest: cnn"),
    ("cnn", {"task": 5}, "task.name=None: choose one of"),
    ("image", {}, None),
    ("resnet50", {"model.blocks": (1, 2)}, r"model.blocks=\(1, 2\): must hold 4 values"),
    ("vit", {"model.blocks": (1, 2)}, r"model.blocks=\(1, 2\): must be a whole number"),
    ("hinf_lstm", {"model.cell": "gru"}, "model.cell='gru': choose one of lstm, convex, forget"),
    ("hinf_lstm:ablation", {"ablation.settings": ("x",)}, r"ablation.settings=\('x',\): 'x' choose one of synthetic"),
    ("segmenter_small", {"model.name": "ssamba"}, "the config has no |features has no field|model has no field"),
    ("classical", {"experiment.runs": 1}, "experiment.runs=1: one run has no deviation"),
    ("audio_llm", {"lora.targets": ("x",)}, "lora.targets=.*choose one of q_proj"),
    ("audio_llm", {"front_end.kind": "cut"}, "front_end.kind='cut': choose one of none, crop, gate"),
    ("wav2vec2", {"parallel.strategy": "jit"}, "parallel.strategy='jit': only torch is offered here"),
]


@pytest.mark.parametrize(("name", "changes", "message"), [w for w in WRONG if w[2]], ids=str)
def test_R11_a_wrong_value_is_one_line_that_names_the_field(name, changes, message):
    config = load_config(name, {})
    with config.unlocked(), config.ignore_type():
        for field, value in changes.items():
            part, _, last = field.rpartition(".")
            (config[part] if part else config)[last] = value
    with pytest.raises(ValueError, match=message) as caught:
        schema.check(config)
    assert "\n" not in str(caught.value)


UNREAD = [
    ("cnn", {"optimizer.name": "adam", "optimizer.momentum": 0.9}, "optimizer.momentum=0.9: nothing reads it with "
     "optimizer.name=adam; leave it at 0.0"),
    ("cnn", {"optimizer.weight_decay": 0.1}, "optimizer.weight_decay=0.1: nothing reads it with optimizer.name=sgd"),
    ("cnn", {"optimizer.warmup_steps": 5}, "optimizer.warmup_steps=5: .* optimizer.schedule=constant; leave it at 0"),
    ("cnn", {"sapt.factor": 0.5}, "sapt.factor=0.5: nothing reads it with sapt.interval=0"),
    ("segmenter_small", {"sapt.interval": 5}, "sapt.interval=5: nothing reads it with task.name=segmenter"),
    ("hinf_lstm", {"loss.name": "bce", "loss.alpha": 0.5}, "loss.alpha=0.5: nothing reads it with loss.name=bce"),
    ("cnn", {"features.filter": "none", "features.low_hz": 30.0}, "features.low_hz=30.0: nothing reads it with"),
    ("cnn", {"split.fold": 2}, "split.fold=2: nothing reads it with split.kind=person"),
    ("cnn", {"split.database": "x"}, "split.database='x': nothing reads it with split.kind=person; leave it at ''"),
    ("cnn", {"train.start_from": "runs/x"}, "train.start_from='runs/x': nothing reads it with optimizer.frozen"),
    ("classical", {"parallel.fsdp": 2}, "parallel.fsdp=2: nothing reads it with task.name=classical"),
    ("audio_llm", {"front_end.segments": "x"}, "front_end.segments='x': nothing reads it with front_end.kind=none"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), UNREAD, ids=str)
def test_a_field_that_nothing_reads_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        schema.check(load_config(name, changes))


def test_a_field_at_its_usual_value_may_be_unread():
    schema.check(load_config("segmenter", {"optimizer.name": "adam", "optimizer.schedule": "constant"}))
    schema.check(load_config("cnn", {"features.filter": "none"}))
    schema.check(load_config("vit", {"loss.name": "bce"}))
    config = load_config("cnn", {"optimizer.momentum": 0.9, "optimizer.name": "adam"})
    config.sweep.optimizer.name = "sgd,adam"  # one member reads it
    schema.check(config)
    config = load_config("cnn", {"optimizer.momentum": 0.9, "optimizer.name": "adam"})
    config.variants.a = {"optimizer": {"name": "sgd"}}  # so does one run
    config.variants.b = {"optimizer": {"name": "adamw"}}
    schema.check(config)


@pytest.mark.parametrize(("part", "value", "message"), [
    ("variants", {"a": {"features": {"filtr": "none"}}}, "variants.a.features has no field filtr; nearest: filter;"),
    ("variants", {"a": {"feature": {"filter": "none"}}}, "variants.a.* has no part feature; nearest: features"),
    ("variants", {"a": {"features": {"filter": "median"}}}, "variants.a: features.filter='median': choose one of none"),
    ("variants", {"a": {"features": 5}}, "variants.a.features=5: a part, which holds"),
    ("variants", {"a": 5}, "variants.a=5: must hold the fields in which it differs"),
    ("variants", {"a/b": {"seed": 1}}, "variants: 'a/b' is no name of a folder"),
    ("variants", {"": {"seed": 1}}, "variants: '' is no name of a folder"),
    ("stages", {"a": {"train": {"epochs": 0}}}, "stages.a: train.epochs=0: must be at least 1"),
    ("stages", 5, "stages=5: must be names with the fields"),
    ("sweep", {"optimizer": {"learning_rat": "1"}}, "optimizer has no field learning_rat; nearest: learning_rate"),
    ("sweep", {"train": {"epochs": "1"}}, "sweep has no part train"),
    ("sweep", {"seed": 5}, "sweep.seed=5: must be text"),
    ("sweep", 5, "sweep=5: must hold fields"),
])  # fmt: skip
def test_variants_stages_and_sweep(part, value, message):
    config = load_config("cnn", {})
    with config.unlocked(), config.ignore_type():
        config[part] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        schema.check(config)


def test_swept_values_are_checked_before_anything_is_written(make_config, tmp_path):
    config = make_config()
    config.sweep.optimizer.learning_rate = "0.1,-1"
    with pytest.raises(ValueError, match=r"optimizer.learning_rate=-1.0: must be above 0"):
        train_population(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nearest_first():
    assert nearest("optimiser", ["data", "split", "optimizer"]) == "nearest: optimizer; it has optimizer, split, data"
    with pytest.raises(ValueError, match=r"--config=cn: no config of this name; nearest: cnn; there are cnn, "):
        load_config("cn", {})
    with pytest.raises(ValueError, match=r"has no field train.epoch; nearest: train.epochs; it has train.epochs, "):
        load_config("cnn", {"train.epoch": 1})


@pytest.mark.parametrize(("content", "variant", "message"), [
    (None, "", r"c\.py: no such file"),
    ("def get_config(:", "", "c.py, line 1: not Python"),
    ("x = 1", "", "c.py: has no function get_config"),
    ("get_config = 5", "", "c.py: has no function get_config"),
    ("def get_config():\n    return 5", "", "get_config returns a int, not a ConfigDict"),
    ("def get_config():\n    return {}['a']", "", "get_config ends with KeyError: 'a'"),
    ("def get_config():\n    return 1 + 'a'", "", "get_config ends with TypeError"),
    ("raise KeyError('a')", "", "c.py: it ends with KeyError"),
    ("import no_such_package", "", "c.py: it ends with ModuleNotFoundError"),
    ("import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict()", "foo", "has no variants"),
    ("\0", "", "c.py"),
    (b"\xff\xfe", "", "c.py"),
])  # fmt: skip
def test_R11_a_config_file_that_is_none_is_one_line(content, variant, message, tmp_path):
    path = tmp_path / "c.py"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        config_of(path, variant)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("words", "message"), [
    (["--config=CNN", "--config.optimiser.lr=1"], "--config.optimiser.lr: the config has no part or field 'optimiser'; "
     "nearest: optimizer; it has optimizer, "),
    (["--config=CNN", "--config.optimizer.lr=1"], "the config's part optimizer has no part or field 'lr'; nearest: "),
    (["--config=CNN", "--config.train.epochs.x=1"], "--config.train.epochs.x: train.epochs is a field, not a part"),
    (["--config=CNN", "--config.train=1"], "--config.train: a part, not a field; it has "),
    (["--config=cnn", "--config.optimizer.lr=1"], "the config's part optimizer has no part or field 'lr'; nearest: "),
    (["--config=cn"], "--config=cn: no config of this name; nearest: cnn; there are cnn, "),
    (["--config=elsewhere/cnn.py"], "elsewhere/cnn.py: no such file; give --config=cnn"),
    (["--config=CNN:foo"], "configs/cnn.py:foo: the only variant is configs/cnn.py:sweep"),
    (["--config", "CNN", "--config.seeds", "1"], "no part or field 'seeds'; nearest: seed"),
    (["--config", "--config.parallel.fsdp=8"], "--config: give a name or a file, as --config=cnn"),
    (["--config.seed=1"], "--config.seed without --config"),
    (["--config=CNN", "--config.seed=1", "--config.model.filters[0]=4", "--noconfig.model.bfloat16"], ""),
    (["--workdir=x"], ""),
])  # fmt: skip
def test_R11_a_config_flag_that_does_not_fit_is_one_line(words, message):
    told = refused([word.replace("CNN", str(CONFIGS / "cnn.py")) for word in words], {"config": None})
    assert message in told
    assert bool(message) == bool(told)


def test_a_config_by_its_name():
    file = f"--config={CONFIGS / 'cnn.py'}"
    for words in (["--config=cnn:sweep", "--x"], ["--config", "cnn:sweep", "--x"]):
        assert with_path(words, {"config": None}) == [f"{file}:sweep", "--x"]
    for words in (["--config=a/b.py"], ["--config=b.py:c"], ["--x", "--config"], ["--x"]):
        assert with_path(words, {"config": None}) == words
    assert with_path(["--config=cnn"], {}) == ["--config=cnn"]  # of a command without a config


def test_help_shows_the_fields_of_a_config():
    told = help_of(["--config=cnn:sweep", "--help"], {"config": None}).splitlines()
    assert told[1] == "The fields of --config=cnn:sweep:"
    assert "  --config.train.epochs=30" in told
    assert "  --config.optimizer.name=sgd  # or sgd, adamw" in told  # of base_config.py, which it imports
    assert "  --config.features.filter=zero_phase  # none, zero_phase, causal" in told  # of cnn.py
    assert help_of(["--config=cnn"], {"config": None}) == help_of(["--help"], {"config": None}) == ""


def test_all_fields_of_the_base_that_need_one_have_a_comment():
    comments = comments_of(CONFIGS / "cnn.py")
    assert {"seed", "train.epochs"} & {*comments} == set()
    assert comments["parallel.fsdp"] == "devices that share one copy of the parameters"
