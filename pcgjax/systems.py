"""All systems by the name of their task: how each is trained, loaded and asked for its features.

The one place that knows all of them: other code takes what `of` gives. What computes with PyTorch or scikit-learn is
imported where it is used.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from flax import nnx

from pcgjax.data.corpus import Corpus
from pcgjax.pages.terminal import run_summary
from pcgjax.runs.results import read_json
from pcgjax.runtime import hashes
from pcgjax.runtime.files import CheckpointError
from pcgjax.tasks.base import split_model
from pcgjax.tasks.segmenter_model import SegmenterModel
from pcgjax.training.answers import LoadedModel, load_model, load_segmenter, make_predict
from pcgjax.training.loop import train
from pcgjax.training.population import train_population
from pcgjax.training.stages import stages, variants
from pcgjax.training.start import carried_over, with_encoder
from pcgjax.training.sweep import swept_values


class Loaded(NamedTuple):
    """The best model of a workdir, whatever it computes with."""

    config: ml_collections.ConfigDict
    sample_rate_hz: int
    # Of a classifier: a corpus -> its (N, 2) log p, log (1 - p), NaN where it found nothing to judge by.
    answer: Callable[[Corpus], np.ndarray] | None = None
    segmenter: SegmenterModel | None = None
    classifier: LoadedModel | None = None  # of the JAX trainer


class System(NamedTuple):
    """What can be done with the systems of a task."""

    train: Callable[[ml_collections.ConfigDict, pathlib.Path, bool], None]  # (config, workdir, dry_run); prints results
    load: Callable[[pathlib.Path], Loaded]
    # (config, workdir, corpus, indices) -> as of `features`; None: it does not classify recordings.
    features: Callable[..., dict[str, np.ndarray]] | None = None
    jax_platforms: str = ""  # those that JAX may use, where another library computes


def of(name: str) -> System:
    """The system of a task.

    Raises:
      ValueError: there is none of that name.
    """
    if name == "audio_llm":
        command = "torchrun -m pcgjax.audio_llm.train --config=... --model=DIR"
        raise ValueError(f"task.name={name!r}: its trainer is another command, {command}")
    if name not in SYSTEMS:
        raise ValueError(f"task.name={name!r}: choose one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def load(workdir: str | pathlib.Path) -> Loaded:
    """The best model of a workdir.

    Raises:
      ValueError: a config.json of no known system.
      CheckpointError: no trained model there.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "config.json"
    inner = sorted(str(one.parents[1]) for one in workdir.glob("*/checkpoints/best"))
    if inner and not list(workdir.glob("checkpoints/best*")):
        raise CheckpointError(f"{workdir}: has no model itself; give one of the runs in it: {', '.join(inner)}")
    name = read_json(path).get("task", {}).get("name", "cnn") if hashes.intact(path) else "cnn"
    return of(name).load(workdir)


def features(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, corpus: Corpus, indices: np.ndarray
) -> dict[str, np.ndarray]:
    """{"trained", "untrained": (n, D) float}, what the last unit is given of these recordings by a run's best model,
    and by the net that training began with: of the same seed, and of the same pre-trained weights where there are any.

    Of the classical chain the features are its spectra, the same before and after: "untrained" is not there, and
    recordings without a cycle are NaN.
    Raises:
      ValueError: no trained classifier there (also CheckpointError).
    """
    system = of(config.task.name)
    if system.features is None:
        name = config.task.name
        raise ValueError(f"{workdir}: a model of task {name!r} does not classify recordings; it has no site report")
    return system.features(config, pathlib.Path(workdir), corpus, indices)


# ------------------------------------------------------------------------------------------------- the JAX trainer


def _train_jax(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool) -> None:
    """One run, stages of one, variants side by side, or a population."""
    with_variants = len(config.variants) > 0
    if swept_values(config):
        if with_variants:
            raise ValueError("config.sweep: this config has variants; sweep one that has none, such as configs/cnn.py")
        train_population(config, workdir, dry_run)
    elif with_variants:
        variants(config, workdir, dry_run)
        if not dry_run:
            print(f"wrote {workdir}/report.html and table.json")
    else:
        run = stages if len(config.stages) else train
        _print_results(run(config, workdir, dry_run), workdir, dry_run)


def _print_results(results: dict, workdir: pathlib.Path, dry_run: bool) -> None:
    if results and not dry_run:
        print(run_summary(results))
        print(f"wrote {workdir}: metrics.json, predictions.csv, report.html, checkpoints/")


def _load_classifier(workdir: pathlib.Path) -> Loaded:
    model = load_model(workdir)
    config, task, graphdef, params, rest, sample_rate_hz, _ = model
    batch, key = config.evaluation.batch_recordings, jax.random.key(config.seed)

    def answer(corpus: Corpus) -> np.ndarray:
        return make_predict(task, graphdef, corpus, np.arange(len(corpus.rows)), batch, key)(params, rest)

    return Loaded(config, sample_rate_hz, answer, classifier=model)


def _load_segmenter(workdir: pathlib.Path) -> Loaded:
    model = load_segmenter(workdir)
    return Loaded(model.config, model.sample_rate_hz, segmenter=model)


def _load_encoder_alone(workdir: pathlib.Path) -> Loaded:
    model = load_model(workdir)
    return Loaded(model.config, model.sample_rate_hz)


class _Weights(NamedTuple):
    """What of a training's first state a model is made of."""

    params: Any
    rest: Any


def _classifier_features(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, corpus: Corpus, indices: np.ndarray
) -> dict[str, np.ndarray]:
    config, task, graphdef, params, rest, *_ = load_model(workdir)
    batch, key = config.evaluation.batch_recordings, jax.random.key(config.seed)
    task = task._replace(shapes=2)  # of a single pass, more would take longer to compile than they save
    embed = make_predict(task, graphdef, corpus, indices, batch, key, embedding=True)
    _, *drawn = split_model(task.init(nnx.Rngs(jax.random.key(config.seed))))
    first: Any = _Weights(*drawn)
    if config.train.start_from:
        first = carried_over(first, config.train.start_from, tuple(config.optimizer.frozen))
    if config.model.get("checkpoint"):
        first = with_encoder(first, graphdef, config.model.checkpoint)
    return {"trained": embed(params, rest), "untrained": embed(first.params, first.rest)}


# ------------------------------------------------------------------------------------------------ the other systems


def _train_classical(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool) -> None:
    from pcgjax.classical.run import train_classical
    from pcgjax.pages.classical import classical_summary

    if results := train_classical(config, workdir, dry_run):
        print(classical_summary(results))


def _load_classical(workdir: pathlib.Path) -> Loaded:
    from pcgjax.classical.run import load_classical

    config, _, sample_rate_hz, answer = load_classical(workdir)
    return Loaded(config, sample_rate_hz, answer)


def _classical_features(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, corpus: Corpus, indices: np.ndarray
) -> dict[str, np.ndarray]:
    from pcgjax.classical.features import classical_features

    spectra = classical_features(corpus.subset(indices), config)
    values = np.full((len(indices), spectra.values.shape[1]), np.nan)
    values[spectra.indices] = spectra.values
    return {"trained": values}


def _train_audio_encoder(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool) -> None:
    from pcgjax.audio_llm.encoders.train import train_encoder

    _print_results(train_encoder(config, workdir, dry_run), workdir, dry_run)


def _load_audio_encoder(workdir: pathlib.Path) -> Loaded:
    from pcgjax.audio_llm.encoders.clips import load_encoder

    return Loaded(*load_encoder(workdir))


def _audio_encoder_features(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, corpus: Corpus, indices: np.ndarray
) -> dict[str, np.ndarray]:
    from pcgjax.audio_llm.encoders.clips import encoded_features

    return encoded_features(config, workdir, corpus, indices)


_CLASSIFIER = System(_train_jax, _load_classifier, _classifier_features)
SYSTEMS = {
    "cnn": _CLASSIFIER,
    "hinf_lstm": _CLASSIFIER,
    "image": _CLASSIFIER,
    "segmenter": System(_train_jax, _load_segmenter),
    "ssamba_pretrain": System(_train_jax, _load_encoder_alone),
    "classical": System(_train_classical, _load_classical, _classical_features),
    "audio_encoder": System(_train_audio_encoder, _load_audio_encoder, _audio_encoder_features, jax_platforms="cpu"),
}
