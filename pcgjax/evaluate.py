"""A trained model on recordings it has not heard.

    python -m pcgjax.evaluate --workdir=runs/cnn --dataset=pascal --source=DIR --out=scores.json

writes the scores of `metrics.judge` (per class and per database, intervals over people, what trivial answers score),
beside them OUT with .csv: a probability and decision for each recording.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging
from flax import nnx
from jax.sharding import PartitionSpec

from pcgjax import checkpoint, datasets, files, input_pipeline, metrics, report, segment, sharding, tasks
from pcgjax.input_pipeline import Corpus

NO_CYCLE = "no heart cycle found"
FIELDS = ("id", "person", "database", "class", "label", "probability", "decision", "split", "path")


def width_of(task: tasks.Task) -> int:
    """How many numbers `task.forward` gives of a recording."""
    return 2 if task.classifies else len(tasks.Counts._fields)


def answers_of(
    task: tasks.Task,
    model: Any,
    capacities: tuple[int, ...],
    data: dict,
    ids: jax.Array,
    choice: jax.Array,
    key: jax.Array,
    embed: bool = False,
) -> jax.Array:
    """`task.forward`'s answers (R, `width_of`) of one group's recordings, as `input_pipeline.at_capacity` has them;
    with `embed`, what `tasks.embed` gives."""

    def answers(batch: dict, capacity: int) -> jax.Array:
        if embed:
            return tasks.embed(task, model, batch, capacity, key)
        return jnp.stack(task.forward(model, batch, capacity, key), axis=-1).astype(jnp.float32)

    return input_pipeline.at_capacity(answers, data, ids, choice, capacities, task.geometry)


def make_predict(
    task: tasks.Task,
    graphdef: Any,
    corpus: Corpus,
    indices: np.ndarray,
    batch: int,
    key: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
    resident: dict | None = None,
    embed: bool = False,
) -> Callable[[Any, Any], np.ndarray]:
    """A function (params, rest) -> `task.forward`'s answers, (n, 2 or 3) float32, of the recordings `indices`.

    embed: what the last unit is given, (n, D) as `tasks.embed` has it, instead of the answers.
    mesh: whose devices share each batch, all with the whole parameters; every process is given all answers.
    resident: the whole corpus on every device, from `input_pipeline.block`; None to stream it.
    """
    width = tasks.embedded(nnx.eval_shape(lambda: task.init(nnx.Rngs(0)))) if embed else width_of(task)
    # A classifier does not look at them here.
    labels = np.zeros(len(corpus.rows), np.float32) if task.classifies else task.labels(corpus)
    devices = mesh.size if mesh else 1
    plan = input_pipeline.evaluation_plan(indices, corpus.lengths, task.geometry, batch, devices, task.shapes)
    whole = sharding.replicated(mesh) if mesh else None

    def forward(params, rest, data, ids, choice, i):
        keys = jax.random.split(jax.random.fold_in(key, i), devices)
        own = keys[jax.lax.axis_index(sharding.AXES) if devices > 1 else 0]
        model = tasks.merged(task, graphdef, params, rest)
        return answers_of(task, model, plan.capacities, data, ids[0], choice, own, embed)[None]

    @functools.partial(jax.jit, compiler_options=sharding.compiler_options(), out_shardings=whole)
    def run(params, rest, data, ids, capacity, steps, done):
        everywhere, spread = PartitionSpec(), PartitionSpec(sharding.AXES)
        own = (everywhere, everywhere, everywhere if resident else spread, spread, everywhere, everywhere)
        each = sharding.over_devices(forward, mesh, own, spread) if mesh else forward
        if mesh:
            params = jax.lax.with_sharding_constraint(params, whole)
        out = jnp.zeros((*ids.shape, width))
        step = lambda i, out: out.at[i].set(each(params, rest, data, ids[i], capacity[i], done + i))
        return jax.lax.fori_loop(0, steps, step, out)

    def predict(params, rest):
        pieces: Iterable
        if resident is not None:
            pieces = [(resident, plan.ids, plan.capacity, len(plan.ids))]
        else:
            pieces = input_pipeline.streamed(corpus, labels, plan, 0, len(plan.ids), mesh)
        out, done = np.zeros((len(corpus.rows), width), np.float32), 0
        for data, ids, capacity, steps in pieces:
            answers = np.asarray(run(params, rest, data, ids, capacity, steps, done))[:steps]
            asked = plan.ids[done : done + steps]
            out[asked[asked >= 0]] = answers[asked >= 0]
            done += steps
        return out[indices]

    return predict


def cross_entropy(log_p: np.ndarray, labels: np.ndarray) -> float:
    """Mean binary cross-entropy from (n, 2) log p and log (1 - p)."""
    return float(-np.where(labels > 0, log_p[:, 0], log_p[:, 1]).mean())


def validation_scores(task: tasks.Task, answers: np.ndarray, labels: np.ndarray, threshold: float) -> dict:
    """What an epoch's validation line holds, from `make_predict`'s answers and the task's labels."""
    if not task.classifies:
        loss, correct, samples = answers.astype(np.float64).sum(0)
        return {"loss": loss / max(samples, 1), "accuracy": correct / max(samples, 1)}
    scores = metrics.binary(labels, np.exp(answers[:, 0]).clip(0, 1), threshold)
    scores = {name: scores[name] for name in metrics.METRICS}
    return scores | {"loss": cross_entropy(answers, labels), "threshold": threshold}


def judge(corpus: Corpus, indices: np.ndarray, labels: np.ndarray, log_p: np.ndarray, config) -> dict:
    """`metrics.judge` of the recordings `indices`, whose labels and answers are given in their order."""
    rows = [corpus.rows[i] for i in indices]
    e = config.evaluation
    return metrics.judge(
        labels,
        np.exp(log_p[:, 0]).clip(0, 1),
        [row["person"] for row in rows],
        [row["database"] for row in rows],
        [row["labels"].get("class", "") for row in rows],
        threshold=e.threshold,
        resamples=e.resamples,
        seed=config.seed,
    )


def table(corpus: Corpus, indices: np.ndarray, labels: np.ndarray, log_p: np.ndarray, threshold: float, split: str):
    """Rows of predictions.csv (FIELDS); a recording without a label has an empty one."""
    for i, label, answer in zip(indices, labels, log_p, strict=True):
        row, probability = corpus.rows[i], float(np.exp(answer[0]))
        yield {
            "id": row["id"],
            "person": row["person"],
            "database": row["database"],
            "class": row["labels"].get("class", ""),
            "label": "" if np.isnan(label) else int(label),
            "probability": f"{probability:.9g}",
            "decision": int(probability >= threshold),
            "split": split,
            "path": row["path"],
        }


def write_table(rows: list[dict], out: pathlib.Path) -> None:
    with files.replacing(out) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def load_model(workdir: str | pathlib.Path) -> tuple[ml_collections.ConfigDict, tasks.Task, Any, Any, Any, int]:
    """The best checkpoint of a workdir: (config, task, graphdef, params, rest, sample_rate_hz).

    The config's `evaluation.threshold` is the one that was in use when the checkpoint was made (SAPT moves it).

    Raises:
      checkpoint.CheckpointError: no trained model there.
    """
    workdir = pathlib.Path(workdir)
    folder = workdir / "checkpoints" / "best"
    _, _, meta = checkpoint.require(folder)
    config = ml_collections.ConfigDict(meta["config"])
    config.evaluation.threshold = meta["best"]["threshold"]
    task = tasks.make(config, meta["sample_rate_hz"])
    # Shapes alone: to draw parameters first would take longer than all the rest.
    graphdef, params, rest = tasks.split(nnx.eval_shape(lambda: task.init(nnx.Rngs(config.seed))))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), (params, rest))
    _, model, _ = checkpoint.require(folder, {"params": like[0], "rest": like[1]})
    return config, task, graphdef, model["params"], model["rest"], meta["sample_rate_hz"]


def load_answerer(
    workdir: str | pathlib.Path,
) -> tuple[ml_collections.ConfigDict, bool, int, Callable[[Corpus], np.ndarray]]:
    """The best model of a workdir, whatever it computes with: (config, whether it classifies recordings,
    sample_rate_hz, a function from a corpus to its (N, 2) log p, log (1 - p), NaN where it found nothing to judge by).

    Raises: as `load_model`.
    """
    saved = pathlib.Path(workdir) / "config.json"
    name = report.read_json(saved).get("task", {}).get("name") if saved.exists() else ""
    if name == "classical":
        from pcgjax import classical

        return classical.load(workdir)
    if name == "audio_encoder":
        from pcgjax.audio_llm import encoders

        config, sample_rate_hz, answer = encoders.load(workdir)
        return config, True, sample_rate_hz, answer
    config, task, graphdef, params, rest, sample_rate_hz = load_model(workdir)
    batch, key = config.evaluation.batch_recordings, jax.random.key(config.seed)

    def answer_all(corpus: Corpus) -> np.ndarray:
        return make_predict(task, graphdef, corpus, np.arange(len(corpus.rows)), batch, key)(params, rest)

    return config, task.classifies, sample_rate_hz, answer_all


def decode(recordings: list[datasets.Recording], sample_rate_hz: int) -> tuple[Corpus, list[datasets.Problem]]:
    """Recordings decoded to memory, and those left out."""
    from pcgjax import prepare

    rows, samples, problems = [], [], []
    for recording, row, audio, reason in prepare.decode_all(recordings, sample_rate_hz, None, "decode"):
        if row is None or audio is None:
            problems.append(datasets.Problem(str(recording.path), str(reason)))
        else:
            rows.append(row)
            samples.append(audio)
    return input_pipeline.in_memory(rows, samples, sample_rate_hz), problems


def evaluate(workdir: str, dataset: str, source: str, out: str, target: str = "") -> dict:
    """Judges the model of `workdir` on a folder in an official layout; writes `out` and its .csv; returns the scores.

    Raises:
      datasets.DatasetError: the folder cannot be read, or no recording has the label `target`.
    """
    began = time.monotonic()
    config, classifies, sample_rate_hz, answer = load_answerer(workdir)
    recordings, problems = datasets.load(dataset, source)
    if config.task.name == "segmenter":
        if target:
            raise ValueError(f"--target={target}: a segmenter is judged by annotations; leave --target out")
        return _evaluate_segmenter(workdir, dataset, source, out, recordings, problems, began)
    if not classifies:
        raise ValueError(f"{workdir}: a model of task {config.task.name!r} has no answers to judge")
    target = target or config.task.target
    labelled = [r for r in recordings if r.labels.get(target) in ("0", "1")]
    if not labelled:
        raise datasets.DatasetError(f"{source}: no recording has the label {target!r}; choose another --target")
    corpus, undecoded = decode(labelled, sample_rate_hz)
    problems = problems + undecoded
    if not corpus.rows:
        raise datasets.DatasetError(f"{source}: none of the {len(labelled)} labelled recordings could be decoded")
    indices, labels = np.arange(len(corpus.rows)), corpus.labels(target)
    log_p = answer(corpus)
    found = np.isfinite(log_p[:, 0])
    problems += [datasets.Problem(corpus.rows[i]["path"], NO_CYCLE) for i in np.flatnonzero(~found)]
    if not found.any():
        raise datasets.DatasetError(f"{source}: {NO_CYCLE} in any of the {len(found)} recordings")
    indices, labels, log_p = indices[found], labels[found], log_p[found]
    scores = judge(corpus, indices, labels, log_p, config)
    scores |= {
        "dataset": dataset,
        "source": str(source),
        "workdir": str(workdir),
        "target": target,
        "trained_on_target": config.task.target,
        "without_label": len(recordings) - len(labelled),
        "problems": [dataclasses.asdict(problem) for problem in problems],
        "wall_s": time.monotonic() - began,
    }
    files.write_text(pathlib.Path(out), json.dumps(scores, indent=1))
    rows = list(table(corpus, indices, labels, log_p, config.evaluation.threshold, dataset))
    write_table(rows, pathlib.Path(out).with_suffix(".csv"))
    return scores


def _evaluate_segmenter(workdir, dataset, source, out, recordings, problems, began) -> dict:
    model = segment.load(workdir)
    annotated = [r for r in recordings if any(start < end for start, end, _ in r.annotations)]
    if not annotated:
        raise datasets.DatasetError(
            f"{source}: none of the {len(recordings)} recordings has annotated states to judge a segmenter by"
        )
    corpus, undecoded = decode(annotated, model.sample_rate_hz)
    if not corpus.rows:
        raise datasets.DatasetError(f"{source}: none of the {len(annotated)} annotated recordings could be decoded")
    judged, rows, _ = segment.judge(model, corpus, np.arange(len(corpus.rows)), dataset)
    scores = {
        "segmentation": judged,
        "dataset": dataset,
        "source": str(source),
        "workdir": str(workdir),
        "target": model.config.task.frames,
        "without_annotation": len(recordings) - len(annotated),
        "problems": [dataclasses.asdict(problem) for problem in problems + undecoded],
        "wall_s": time.monotonic() - began,
    }
    files.write_text(pathlib.Path(out), json.dumps(scores, indent=1))
    write_table(rows, pathlib.Path(out).with_suffix(".csv"))
    return scores


def summary(results: dict) -> str:
    """The main figures of metrics.json, for a terminal."""
    if "segmentation" in results:
        return segment.summary(results["segmentation"])
    scores = results["test"]
    if "overall" not in scores:
        return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())

    def line(name, s):
        def cell(key):
            value, low, high = (s[key].get(k) for k in ("value", "low", "high"))
            if value is None:
                return "        -         "
            return f"{value:.3f} " + (f"[{low:.3f}, {high:.3f}]" if low is not None else " " * 14)

        return f"{name:18s}" + " ".join(cell(key) for key in ("auc", "auprc", "mean_accuracy", "f1"))

    lines = [f"{'':18s}{'AUC':21s} {'AUPRC':20s} {'MAcc':20s} F1", line("all", scores["overall"])]
    lines += [line(f"{name} ({s['recordings']})", s) for name, s in scores["per_database"].items()]
    mean = scores["mean_database_auc"]
    if mean["value"] is not None:
        lines.append(f"mean of the databases' AUC: {mean['value']:.3f} over {mean['databases']}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}")
    scores = evaluate(FLAGS.workdir, FLAGS.dataset, FLAGS.source, FLAGS.out, FLAGS.target)
    for problem in scores["problems"]:
        logging.warning("left out: %s: %s", problem["path"], problem["reason"])
    print(summary(scores if "segmentation" in scores else {"test": scores}))
    print(f"wrote {FLAGS.out} and {pathlib.Path(FLAGS.out).with_suffix('.csv')}")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_string(
        "workdir", None, "A folder that pcgjax.train wrote; its best checkpoint is judged.", required=True
    )
    flags.DEFINE_enum("dataset", None, datasets.NAMES, "The layout of --source.", required=True)
    flags.DEFINE_string("source", None, "A folder of recordings with labels, in the official layout.", required=True)
    flags.DEFINE_string(
        "out", None, "The JSON file to write; a .csv of the same name holds every answer.", required=True
    )
    flags.DEFINE_string("target", "", "abnormal or murmur: the label to judge against; default: the one trained on.")
    files.run(main)
