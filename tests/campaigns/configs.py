"""Damaged fields of every config: the check refuses each in one line that names it, or what it lets through works.

    python -m tests.campaigns.configs [--count=2400] [--seed=0]

What the check lets through of a small CNN is set up on a simulated corpus (data, split, batches, shapes of the model),
which may refuse it too, in one line.
"""

from __future__ import annotations

import difflib
import os
import pathlib
import sys
import tempfile
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import ml_collections
import numpy as np
from absl import app, flags
from flax import nnx

from pcgjax.data.prepare import prepare
from pcgjax.datasets import synthetic
from pcgjax.runs import schema
from pcgjax.runs.config import flat_fields, load_config
from pcgjax.runtime.config_flag import CONFIGS
from pcgjax.training import optimizer
from pcgjax.training.experiment import set_up
from tests.campaigns import Tally, outcome_of

VARIANTS = ("cnn:sweep", "hinf_lstm:small", "hinf_lstm:ablation", "segmenter_small:causal")
VALUES: dict[str, tuple[Any, ...]] = {
    "wrong type": (None, "", "x", "1", True, 1.5, 2, (), (1,), ("a",), [None], {}, {"a": 1}, b"x", object(), [[1]]),
    "extreme": (10**3, 10**6, 10**9, 2**31, 2**63, 10**30, 10**400, 1e30, 1e308, 1e-30, 5e-324, -(10**9), (10**9,) * 2),
    "not finite": (float("nan"), float("inf"), -float("inf"), (float("nan"),) * 3, (float("inf"), 1), np.float32(0)),
    "negative or empty": (-1, -0.5, -1e-9, 0, 0.0, "", (), " ", "\0", "\n", (0,), (-1, 1, 1), ((),), ((0,), (0,))),
    "text": ("none ", "None", "NONE", "../x", "/", "a\nb", "é", "\ud800", "x" * 5000, "nonne", "adamm", "jti"),
}  # fmt: skip
SMALL = {
    "features.window_s": 0.5, "model.filters": (4, 8), "model.hidden": 8, "train.epochs": 2,
    "train.batch_recordings": 3, "evaluation.resamples": 20, "split.fractions": (0.5, 0.25, 0.25),
}  # fmt: skip
MISSPELT = "misspelt or nested"
SET_UP = "set up"


def put(config: ml_collections.ConfigDict, field: str, value: Any) -> None:
    *parts, last = field.split(".")
    inner = config
    for part in parts:
        inner = inner[part]
    with config.unlocked(), config.ignore_type():
        if last in inner:
            del inner[last]  # or a whole number becomes a float where one was
        inner[last] = value


def damaged(config: ml_collections.ConfigDict, kind: str, rng: np.random.Generator) -> tuple[str, str, Any]:
    """Damages one field in place; returns (the field, what a message must name, the value)."""
    fields = [field for field in flat_fields(config) if not field.startswith("sweep.")]
    if kind == "sweep":
        fields = [field for field in flat_fields(config) if field.startswith("sweep.")] or ["seed"]
        kind = list(VALUES)[rng.integers(len(VALUES))]
    field = fields[rng.integers(len(fields))]
    if kind != MISSPELT:
        values = VALUES[kind]
        value = values[rng.integers(len(values))]
        put(config, field, value)
        return field, field.rpartition(".")[2], value
    *parts, last = field.split(".")
    way = int(rng.integers(4))
    if way == 0 and parts:  # a part becomes a value
        put(config, parts[0], 5)
        return field, parts[0], 5
    if way == 1:  # a value becomes a part
        put(config, field, {"x": {"y": 1}})
        return field, last, {"x": {"y": 1}}
    letter = chr(97 + int(rng.integers(26)))
    wrong = last[:-1] if way == 2 and len(last) > 3 else f"{last}{letter}"
    value = config
    for part in field.split("."):
        value = value[part]
    put(config, ".".join([*parts, wrong]), value)
    return field, wrong, value


def shapes(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
    """What a training begins with, up to its first compilation."""
    experiment = set_up(config, workdir)
    model = nnx.eval_shape(lambda: experiment.task.init(nnx.Rngs(jax.random.key(config.seed))))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    steps = config.train.epochs * experiment.steps_an_epoch
    jax.eval_shape(optimizer.make(config.optimizer, steps).init, params)
    return "set up"


def main(argv: list[str]) -> None:
    rng, tally = np.random.default_rng(FLAGS.seed), Tally()
    names = [path.stem for path in sorted(CONFIGS.glob("*.py"))] + list(VARIANTS)
    kinds = [*VALUES, MISSPELT, "sweep"]
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        os.chdir(scratch)  # a damaged split.file is a path that may be written
        synthetic.write(scratch / "source", people=16, recordings_per_person=1, duration_s=(3.0, 3.2), rate_hz=1000)
        prepare("cinc2016", scratch / "source", scratch / "prepared", workers=1)
        for n in range(FLAGS.count):
            kind, small = kinds[n % len(kinds)], n % 8 == 0
            changes = {**SMALL, "data.prepared": str(scratch / "prepared")} if small else {}
            config = load_config("cnn" if small else names[int(rng.integers(len(names)))], changes)
            if small:
                kind = kinds[int(rng.integers(len(kinds)))]
            field, name, value = damaged(config, kind, rng)
            about = f"{field}={schema.shown(value)}"
            outcome, said = outcome_of(lambda config=config: schema.check(config), None, 20)
            # The check lets it through (said is empty), or refuses it in one line that names the field.
            named = name in said or difflib.get_close_matches(name, said.split())
            if outcome == "survived" and said and not named:
                outcome = "silent"
            tally.add(kind, outcome, f"{about}: {said}")
            if small and outcome == "survived" and not said:
                outcome, said = outcome_of(
                    lambda config=config, n=n: shapes(config, scratch / f"run{n}"), "set up", 120
                )  # fmt: skip
                tally.add(SET_UP, outcome, f"{about}: {said}")
    sys.exit(tally.end())


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_integer("count", 2400, "How many damages to try.")
    flags.DEFINE_integer("seed", 0, "Of the places and kinds of damage.")
    app.run(main)
