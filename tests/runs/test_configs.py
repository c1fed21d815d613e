"""Configs: what each holds, that it loads light, and that a run of an earlier version is the same experiment."""

from __future__ import annotations

import json
import pathlib
import runpy
import subprocess
import sys

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from pcgjax.runs.base_config import base
from pcgjax.runs.config import completed, load_config, plain_config, refuse_changes
from pcgjax.runtime.files import CheckpointError

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.py"))
# Field -> its value, as Python writes it -> the configs that had it when they stood there in full, each on its own.
TABLE = json.loads((ROOT / "tests" / "fixtures" / "configs.json").read_text())
NAMES = sorted({name for values in TABLE.values() for names in values.values() for name in names.split()})
OFF = {
    "sapt.interval": 0, "sapt.factor": 0.3, "sapt.metric": "f1",
    "sapt.smooth": "threshold", "optimizer.schedule": "constant", "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0.0, "optimizer.clip_norm": 0.0, "optimizer.frozen": (), "train.start_from": "",
    "variants": {}, "stages": {},
}  # fmt: skip
LIGHT = """
import sys
heavy = {"jax", "jaxlib", "orbax", "flax", "optax", "torch", "scipy", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""


def flat(config: ml_collections.ConfigDict, above: str = "") -> dict:
    values = {}
    for name, value in config.items():
        nested = isinstance(value, ml_collections.ConfigDict)
        values |= flat(value, f"{above}{name}.") if nested and len(value) else {above + name: {} if nested else value}
    return values


@pytest.mark.parametrize("name", NAMES)
def test_every_field_has_the_value_that_it_had_before_the_configs_shared_a_base(name):
    before = {field: value for field, values in TABLE.items() for value, names in values.items()
              if name in names.split()}  # fmt: skip
    now = flat(load_config(name, {}))
    assert {field: repr(now[field]) for field in before} == before
    added = {field: value for field, value in now.items() if field not in before and not field.startswith("sweep.")}
    assert added == {field: OFF[field] for field in added}
    swept = {field: value for field, value in now.items() if field.startswith("sweep.")}
    assert set(swept.values()) <= {""}
    assert bool(swept) == ("data.pipeline" in now)  # what the JAX trainer trains can be swept


def test_the_table_names_every_config_and_variant():
    assert {name.partition(":")[0] for name in NAMES} == {path.stem for path in FILES}
    assert len(NAMES) == 17
    for name in ("cnn:wide", "hinf_lstm:tiny", "segmenter_small:future"):
        with pytest.raises(ValueError, match=r"the only variant is|the variants are"):
            load_config(name, {})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_docstring_says_command_machine_time_and_score(path):
    text = runpy.run_path(str(path))["__doc__"]
    assert f"--config=configs/{path.name}" in text
    for word in ("Machine:", "Time", "Score"):
        assert f"\n{word}" in text or f", {word}" in text, word


def test_the_configs_are_short():
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= 500


def parsed_config(monkeypatch, *words: str) -> ml_collections.ConfigDict:
    """configs/cnn.py as a command is given it with `words`."""
    values = flags.FlagValues()
    monkeypatch.setattr(sys, "argv", ["program", f"--config={ROOT}/configs/cnn.py", *words])  # config_flags looks there
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(sys.argv)
    return values.config


@pytest.mark.parametrize(("words", "field", "value"), [
    (["--config.train.epochs=2"], "train.epochs", 2),
    (["--config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
    (["--config.optimizer.clip_norm=0.5"], "optimizer.clip_norm", 0.5),
    (["--config.optimizer.frozen=('cnn',)"], "optimizer.frozen", ("cnn",)),
    (["--config.split.fractions=(0.5,0.25,0.25)"], "split.fractions", (0.5, 0.25, 0.25)),
    (["--config.features.noise_snr_db=10"], "features.noise_snr_db", 10.0),
    (["--config.model.filters=(4,8)"], "model.filters", (4, 8)),
    (["--config.model.bfloat16=true"], "model.bfloat16", True),
    (["--config.sweep.optimizer.learning_rate=0.1,0.01"], "sweep.optimizer.learning_rate", "0.1,0.01"),
])  # fmt: skip
def test_flags_parse_into_the_type_of_the_field(words, field, value, monkeypatch):
    parsed = flat(parsed_config(monkeypatch, *words))[field]
    assert (parsed, type(parsed)) == (value, type(value))


def test_a_misspelled_field_is_refused(monkeypatch):
    with pytest.raises(AttributeError):
        parsed_config(monkeypatch, "--config.train.epoch=2")


def test_a_saved_config_of_an_earlier_version_is_completed():
    saved = json.loads((ROOT / "tests" / "fixtures" / "saved_cnn_config.json").read_text())
    assert "sapt" not in saved
    assert "schedule" not in saved["optimizer"]
    whole = completed(saved)
    for part, values in saved.items():  # what it says stays
        for field, value in values.items() if isinstance(values, dict) else ():
            assert whole[part][field] == value
    now = plain_config(load_config("cnn", {}))
    assert flat(ml_collections.ConfigDict(whole)).keys() == flat(ml_collections.ConfigDict(now)).keys()
    assert completed(whole) == whole
    assert whole["sapt"] == now["sapt"]


def test_a_run_of_an_earlier_version_is_the_same_experiment(tmp_path):
    saved = json.loads((ROOT / "tests" / "fixtures" / "saved_cnn_config.json").read_text())
    config = ml_collections.ConfigDict(completed(saved))
    now = plain_config(config)
    refuse_changes(saved, now, tmp_path)
    for part in ("optimizer", "train", "model"):  # as the ablation compares parts
        refuse_changes({part: saved[part]}, {part: now[part]}, tmp_path)
    for field, value in (("sapt.interval", 2), ("optimizer.schedule", "cosine"), ("optimizer.clip_norm", 1.0),
                         ("model.dropout", 0.5), ("train.batch_recordings", 3), ("seed", 7)):  # fmt: skip
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({field: value})
        with pytest.raises(CheckpointError, match=f"trained with {field}="):
            refuse_changes(saved, plain_config(changed), tmp_path)


def test_other_systems_have_no_fields_of_the_jax_trainer(tmp_path):
    for name in ("classical", "audio_llm", "wav2vec2", "hubert", "distilhubert"):
        plain = plain_config(load_config(name, {}))
        refuse_changes(plain, plain, tmp_path)
        assert not {"profile", "sapt", "stages"} & set(plain)
    assert {"profile", "sapt", "stages"} <= set(base("cnn"))


def test_importing_a_config_loads_nothing_heavy():
    names = ", ".join(repr(str(path)) for path in FILES)
    code = f"import runpy\nfor path in ({names}):\n    runpy.run_path(path)['get_config']()\n{LIGHT}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
