"""Damages of what `prepare` and the JAX trainers write: a bit, a cut, a deletion, an exchange with another run's file.

    python -m tests.campaigns.damages [--count=2000] [--seed=0]

Each damage is of one file of a copy of a finished or unfinished preparation, of a run, a population or a classical
run, and is followed by what a user would do next: prepare again, read, resume, load the model, draw the report, verify.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging

from pcgjax import report
from pcgjax.classical.run import load_classical, train_classical
from pcgjax.data.corpus import from_prepared
from pcgjax.data.prepare import prepare
from pcgjax.datasets import synthetic
from pcgjax.pages import population as population_page
from pcgjax.pages import run as run_page
from pcgjax.runs.config import load_config, with_fields
from pcgjax.runs.results import read_examples, read_json, read_population, read_predictions
from pcgjax.runtime import checkpoint
from pcgjax.runtime.digest import digests
from pcgjax.training.answers import load_model
from pcgjax.training.experiment import set_up
from pcgjax.training.loop import train
from pcgjax.training.population import train_population
from pcgjax.training.start import compile_steps
from pcgjax.training.step import zero_totals
from tests.campaigns import DAMAGES, Tally, damage, outcome_of
from tests.conftest import SMALL


class Target(NamedTuple):
    """A folder whose files are damaged, one of the same kind to exchange with, and what a user does next."""

    name: str
    folder: pathlib.Path
    other: pathlib.Path
    pattern: str
    act: Callable[[pathlib.Path], object]


# ----------------------------------------------------------------------------------------------- what a user does


def read_corpus(folder: pathlib.Path) -> object:
    corpus = from_prepared(folder)
    return corpus.rows, [corpus.read(i).tobytes() for i in range(len(corpus.rows))]


def prepare_again(source: pathlib.Path) -> Callable[[pathlib.Path], object]:
    def act(folder: pathlib.Path) -> object:
        manifest = prepare("cinc2016", source, folder, workers=1)
        return manifest, read_corpus(folder)

    return act


def read_run(folder: pathlib.Path) -> object:
    """What evaluate, predict and report read."""
    model = load_model(folder)
    rows = read_predictions(folder / "predictions.csv")
    examples = read_examples(folder / "examples.npz", rows)
    waves = [example["waveform"].tobytes() for example in examples]
    page = run_page.write(folder).read_text()
    return digests((model.params, model.rest)), float(model.config.evaluation.threshold), rows, waves, page


def resume(like: Any) -> Callable[[pathlib.Path], object]:
    def act(folder: pathlib.Path) -> object:
        step, state, meta = checkpoint.require(folder / "checkpoints" / "last", like)
        return step, digests(state), meta

    return act


def verify(folder: pathlib.Path) -> object:
    """As `--verify`: what was damaged is named."""
    if lines := report.verify(folder):
        raise ValueError("; ".join(lines))
    return "every file is as it was written"


def read_of_population(folder: pathlib.Path) -> object:
    population = read_population(folder / "population.json")
    return population, population_page.write_population(folder).read_text(), read_run(folder / "best")


def read_of_classical(prepared: pathlib.Path) -> Callable[[pathlib.Path], object]:
    corpus = from_prepared(prepared).subset(np.arange(4))

    def act(folder: pathlib.Path) -> object:
        config, _, rate_hz, answer = load_classical(folder)
        rows, results = read_predictions(folder / "predictions.csv"), read_json(folder / "metrics.json")
        return config.to_json_best_effort(), rate_hz, answer(corpus).tobytes(), rows, results

    return act


# ------------------------------------------------------------------------------------------------------- the campaign


def targets(work: pathlib.Path) -> list[Target]:
    """Makes all that is damaged, twice: of two sources, or of two seeds."""
    sources = []
    for name, seed in (("a", 0), ("b", 1)):
        synthetic.write(work / f"source_{name}", people=36, recordings_per_person=2, duration_s=(3.0, 3.0),
                        rate_hz=1000, seed=seed)  # fmt: skip
        sources.append(work / f"source_{name}")
        prepare("cinc2016", work / f"source_{name}", work / f"prepared_{name}", workers=1)
        # The first half of a preparation that several machines share: it goes on when the whole is asked for.
        prepare("cinc2016", work / f"source_{name}", work / f"parts_{name}", workers=1, num_shards=2, shard_index=0)
    small = SMALL | {"data.prepared": str(work / "prepared_a"), "train.epochs": 2, "features.window_s": 1.0}
    for name, seed in (("a", 0), ("b", 1)):
        train(with_fields(load_config("cnn", {}), small | {"seed": seed}), work / f"run_{name}")
    config = with_fields(load_config("cnn", {}), small)
    with config.ignore_type():
        config.sweep.seed = "0,1"
    for name in ("a", "b"):
        train_population(config, work / f"population_{name}")
        config.seed = 1
    classical = {"data.prepared": str(work / "prepared_a"), "evaluation.resamples": 20, "experiment.runs": 0}
    for name, seed in (("a", 0), ("b", 1)):
        config = with_fields(load_config("classical", {}), classical | {"seed": seed})
        train_classical(config, work / f"classical_{name}")
    state = _last_state(with_fields(load_config("cnn", {}), small), work / "run_a")

    def target(name: str, kind: str, pattern: str, act: Callable[[pathlib.Path], object]) -> Target:
        return Target(name, work / f"{kind}_a", work / f"{kind}_b", pattern, act)

    return [
        target("prepared, read", "prepared", "*", read_corpus),
        target("prepared, prepared again", "prepared", "*", prepare_again(sources[0])),
        target("unfinished preparation, gone on with", "parts", "*", prepare_again(sources[0])),
        target("run, results and best model", "run", "[!chr]*", read_run),
        target("run, config and results", "run", "[ch]*", read_run),
        target("run, best checkpoint", "run", "checkpoints/best/*", read_run),
        target("run, last checkpoint", "run", "checkpoints/last/*", resume(state)),
        target("run, verified", "run", "*", verify),
        target("population", "population", "*", read_of_population),
        target("classical", "classical", "*", read_of_classical(work / "prepared_a")),
    ]


def _last_state(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
    """The shapes of what a run's last checkpoint holds."""
    compiled = compile_steps(config, set_up(config, workdir))
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        compiled.abstract, compiled.shardings,
    )  # fmt: skip
    return {"state": state, "totals": jax.device_put(zero_totals(), jax.local_devices()[0])}


# Not of a result: logs, the lock, TensorBoard's files, and what only says how a run was started.
NOT_READ = ("train.log", ".lock", "tensorboard", "run.json")


def files_of(target: Target) -> list[pathlib.Path]:
    below = [path.relative_to(target.folder) for top in sorted(target.folder.glob(target.pattern))
             for path in ([top] if top.is_file() else sorted(top.rglob("*"))) if path.is_file()]  # fmt: skip
    return [path for path in below if path.parts[0] not in NOT_READ and path.parts[-1] not in NOT_READ]


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    rng, tally = np.random.default_rng(FLAGS.seed), Tally()
    with tempfile.TemporaryDirectory(prefix="pcgjax-damages-") as folder:
        work = pathlib.Path(folder)
        made = targets(work)
        wanted = {}
        for target in made:
            shutil.copytree(target.folder, work / "copy")
            wanted[target.name] = target.act(work / "copy")
            shutil.rmtree(work / "copy")
        for number in range(FLAGS.count):
            target = made[number % len(made)]
            kind = DAMAGES[int(rng.integers(len(DAMAGES)))]
            shutil.copytree(target.folder, work / "copy")
            shutil.copytree(target.other, work / "other")
            names = files_of(target)
            name = names[int(rng.integers(len(names)))]
            path, other = work / "copy" / name, work / "other" / name
            if kind == "exchange" and not other.is_file():
                kind = "delete"
            if not path.stat().st_size:
                kind = "delete"
            about = f"{name}: {damage(kind, path, other, rng)}"
            outcome, text = outcome_of(lambda t=target: t.act(work / "copy"), wanted[target.name])
            tally.add(target.name, outcome, f"{about}: {text}")
            for copy in ("copy", "other"):
                shutil.rmtree(work / copy, ignore_errors=True)
            if number % 50 == 49:
                print(f"{number + 1} of {FLAGS.count}", file=sys.stderr, flush=True)
    sys.exit(tally.end())


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_integer("count", 2000, "How many damages.")
    flags.DEFINE_integer("seed", 0, "Of what is damaged, and how.")
    app.run(main)
