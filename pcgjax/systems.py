"""All systems by the name of their task: how each is trained, loaded and embedded. Nothing else knows them all."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from flax import nnx

from pcgjax.data.corpus import Corpus
from pcgjax.pages.terminal import run_summary
from pcgjax.runs.results import read_json
from pcgjax.tasks.base import split_model
from pcgjax.training.answers import load_model, make_predict
from pcgjax.training.loop import train
from pcgjax.training.stages import stages, variants


def load_answerer(
    workdir: str | pathlib.Path,
) -> tuple[ml_collections.ConfigDict, bool, int, Callable[[Corpus], np.ndarray]]:
    """The best model of a workdir, whatever it computes with: (config, whether it classifies recordings,
    sample_rate_hz, a function from a corpus to its (N, 2) log p, log (1 - p), NaN where it found nothing to judge by).

    Raises: as `load_model`.
    """
    saved = pathlib.Path(workdir) / "config.json"
    name = read_json(saved).get("task", {}).get("name") if saved.exists() else ""
    if name == "classical":
        from pcgjax.classical.run import load_classical

        return load_classical(workdir)
    if name == "audio_encoder":
        from pcgjax.audio_llm.encoders.clips import load_encoder

        config, sample_rate_hz, answer = load_encoder(workdir)
        return config, True, sample_rate_hz, answer
    config, task, graphdef, params, rest, sample_rate_hz = load_model(workdir)
    batch, key = config.evaluation.batch_recordings, jax.random.key(config.seed)

    def answer_all(corpus: Corpus) -> np.ndarray:
        return make_predict(task, graphdef, corpus, np.arange(len(corpus.rows)), batch, key)(params, rest)

    return config, task.classifies, sample_rate_hz, answer_all


def features_of_run(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, corpus: Corpus, indices: np.ndarray
):
    """{"trained", "untrained": (n, D) float}, what the last unit is given of these recordings by a run's best model,
    and by the net that training began with: of the same seed, and of the same pre-trained weights where there are any.

    Of the classical chain the features are its spectra, the same before and after: "untrained" is not there, and
    recordings without a cycle are NaN.
    Raises:
      ValueError: no trained classifier there (also CheckpointError).
    """
    name = config.task.name
    if name == "classical":
        from pcgjax.classical.features import classical_features

        made = classical_features(corpus.subset(indices), config)
        found = np.full((len(indices), made.values.shape[1]), np.nan)
        found[made.indices] = made.values
        return {"trained": found}
    if name == "audio_encoder":
        from pcgjax.audio_llm.encoders.clips import encoded_features

        return encoded_features(config, workdir, corpus, indices)
    config, task, graphdef, params, rest, _ = load_model(workdir)
    if task.clips is None:
        raise ValueError(f"{workdir}: a model of task {name!r} does not classify recordings; it has no site report")
    batch, key = config.evaluation.batch_recordings, jax.random.key(config.seed)
    task = task._replace(shapes=2)  # of a single pass, more would take longer to compile than they save
    embed = make_predict(task, graphdef, corpus, indices, batch, key, embed=True)
    _, *begun = split_model(task.init(nnx.Rngs(jax.random.key(config.seed))))
    return {"trained": embed(params, rest), "untrained": embed(*begun)}


def run_all(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool) -> None:
    """What a config asks for: one run, stages of one, or several side by side."""
    from pcgjax.classical.run import train_classical
    from pcgjax.pages.classical import classical_summary
    from pcgjax.training import population
    from pcgjax.training.members import swept_values

    if config.task.name == "classical":
        if results := train_classical(config, workdir, dry_run):
            print(classical_summary(results))
        return
    if swept_values(config):
        if len(config.get("variants", ())):
            raise ValueError("config.sweep: this config has variants; sweep one that has none, such as configs/cnn.py")
        population.train_population(config, workdir, dry_run)
        return
    if len(config.get("variants", ())):
        variants(config, workdir, dry_run)
        if not dry_run:
            print(f"wrote {workdir}/report.html and table.json")
        return
    run: Callable = stages if len(config.get("stages", ())) else train
    if config.task.name == "audio_encoder":
        from pcgjax.audio_llm.encoders.train import train_encoder

        run = train_encoder
    results = run(config, workdir, dry_run)
    if results and not dry_run:
        print(run_summary(results))
        print(f"wrote {workdir}: metrics.json, predictions.csv, report.html, checkpoints/")
