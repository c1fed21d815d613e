"""A model's answers to recordings: compiled once, resident or streamed, on one device or a mesh."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import PartitionSpec

from pcgjax import tasks
from pcgjax.data import batches
from pcgjax.data.corpus import Corpus
from pcgjax.data.plan import evaluation_plan
from pcgjax.runs.config import completed, difference
from pcgjax.runs.results import read_json
from pcgjax.runtime import checkpoint, hashes, sharding
from pcgjax.runtime.files import DamagedError
from pcgjax.tasks.base import Counts, Task, merge_model, split_model
from pcgjax.tasks.segmenter_model import SegmenterModel


def width_of(task: Task) -> int:
    """How many numbers `task.forward` gives of a recording."""
    return 2 if task.classifies else len(Counts._fields)


def answers_of(
    task: Task,
    model: Any,
    capacities: tuple[int, ...],
    data: dict,
    ids: jax.Array,
    choice: jax.Array,
    key: jax.Array,
    embedding: bool = False,
) -> jax.Array:
    """`task.forward`'s answers (R, `width_of`) of one group's recordings, as `batches.at_capacity` has them;
    with `embedding`, what `embed` gives."""

    def answers(batch: dict, capacity: int) -> jax.Array:
        if embedding:
            return embed(task, model, batch, capacity, key)
        return jnp.stack(task.forward(model, batch, capacity, key), axis=-1).astype(jnp.float32)

    return batches.at_capacity(answers, data, ids, choice, capacities, task.geometry)


def make_predict(
    task: Task,
    graphdef: Any,
    corpus: Corpus,
    indices: np.ndarray,
    batch: int,
    key: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
    resident: dict | None = None,
    embedding: bool = False,
) -> Callable[[Any, Any], np.ndarray]:
    """A function (params, rest) -> `task.forward`'s answers, (n, 2 or 3) float32, of the recordings `indices`.

    embedding: what the last unit is given, (n, D) as of `embed`, instead of the answers.
    mesh: whose devices share each batch, all with the whole parameters; every process is given all answers.
    resident: the whole corpus on every device, from `batches.block`; None to stream it.
    """
    shapes: Any = nnx.eval_shape(lambda: task.init(nnx.Rngs(0)))
    width = shapes.feature_count if embedding else width_of(task)
    # A classifier does not look at them here.
    labels = np.zeros(len(corpus.rows), np.float32) if task.classifies else task.labels(corpus)
    devices = mesh.size if mesh else 1
    plan = evaluation_plan(indices, corpus.lengths, task.geometry, batch, devices, task.shapes)
    whole = sharding.replicated(mesh) if mesh else None

    def forward(params, rest, data, ids, choice, i):
        keys = jax.random.split(jax.random.fold_in(key, i), devices)
        device_key = keys[jax.lax.axis_index(sharding.AXES) if devices > 1 else 0]
        model = merge_model(task, graphdef, params, rest)
        return answers_of(task, model, plan.capacities, data, ids[0], choice, device_key, embedding)[None]

    @functools.partial(jax.jit, compiler_options=sharding.compiler_options(), out_shardings=whole)
    def run(params, rest, data, ids, capacity, steps, done):
        everywhere, spread = PartitionSpec(), PartitionSpec(sharding.AXES)
        specs = (everywhere, everywhere, everywhere if resident else spread, spread, everywhere, everywhere)
        each = sharding.over_devices(forward, mesh, specs, spread) if mesh else forward
        if mesh:
            params = jax.lax.with_sharding_constraint(params, whole)

        def step(i, out):
            return out.at[i].set(each(params, rest, data, ids[i], capacity[i], done + i))

        return jax.lax.fori_loop(0, steps, step, jnp.zeros((*ids.shape, width)))

    def predict(params, rest):
        pieces: Iterable
        if resident is not None:
            pieces = [(resident, plan.ids, plan.capacity, len(plan.ids))]
        else:
            pieces = batches.streamed(corpus, labels, plan, 0, len(plan.ids), mesh)
        out, done = np.zeros((len(corpus.rows), width), np.float32), 0
        for data, block_ids, capacity, steps in pieces:
            arguments = data, block_ids, capacity, steps, done
            arguments = sharding.put_missing(mesh, arguments) if mesh else jax.device_put(arguments)
            answers = np.asarray(run(params, rest, *arguments))[:steps]
            ids = plan.ids[done : done + steps]
            out[ids[ids >= 0]] = answers[ids >= 0]
            done += steps
        return out[indices]

    return predict


class LoadedModel(NamedTuple):
    """The best model of a workdir."""

    config: ml_collections.ConfigDict  # its evaluation.threshold is the one of that epoch (SAPT moves it)
    task: Task
    graphdef: Any
    params: Any
    rest: Any
    sample_rate_hz: int
    meta: dict[str, Any]  # of its checkpoint


def load_model(workdir: str | pathlib.Path) -> LoadedModel:
    """The best checkpoint of a workdir.

    Raises:
      checkpoint.CheckpointError: no trained model there, one of another run than config.json says, or a damaged one.
    """
    workdir = pathlib.Path(workdir)
    made: list[Any] = []

    def like(meta: dict) -> dict[str, Any]:
        path = workdir / "config.json"
        if hashes.intact(path) and (differs := difference(read_json(path), meta["config"])):
            field, before, after = differs
            raise checkpoint.CheckpointError(
                f"{workdir}: config.json says {field}={before}, the checkpoint {after}: they are of two "
                "runs; train again"
            )
        config = ml_collections.ConfigDict(completed(meta["config"]))
        config.evaluation.threshold = meta["best"]["threshold"]
        task = tasks.make(config, meta["sample_rate_hz"])
        # Shapes alone: to draw parameters first would take longer than all the rest.
        graphdef, params, rest = split_model(nnx.eval_shape(lambda: task.init(nnx.Rngs(config.seed))))
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        made.append((config, task, graphdef))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), {"params": params, "rest": rest}
        )

    step, model, meta = checkpoint.require(workdir / "checkpoints" / "best", like)
    _refuse_exchanged(workdir, step)
    config, task, graphdef = made[-1]
    return LoadedModel(config, task, graphdef, model["params"], model["rest"], meta["sample_rate_hz"], meta)


def _refuse_exchanged(workdir: pathlib.Path, step: int) -> None:
    """Where a run has ended: a warning if its best checkpoint is not there, DamagedError if `step` is another run's."""
    listed = hashes.read(workdir) or {}
    steps = {int(name.split("/")[2]) for name in listed if name.startswith("checkpoints/best/")}
    folder = workdir / "checkpoints" / "best"
    if steps and step != max(steps) and not (folder / str(max(steps))).is_dir():
        logging.warning("%s: missing, it was the best model; that of step %d is used", folder / str(max(steps)), step)
    hashes.check(
        workdir, [f"checkpoints/best/{step}/meta/metadata"], "it is not the checkpoint that this run wrote: put it back"
    )
    if steps and step not in steps:
        raise DamagedError(f"{folder / str(step)}: not a checkpoint that this run wrote; remove it")


RECORDINGS = (1, 16)  # a batch of `bucketed_answers` has room for


def bucketed_answers(model: LoadedModel, embedding: bool = False) -> Callable[[Corpus], np.ndarray]:
    """A function corpus -> as `make_predict` of all its recordings, which compiles once for all corpora.

    Batches have one of few shapes: room for 1 or 16 recordings, and for windows in steps of a half at most. So it pays
    where a few recordings come at a time, and `make_predict` where many do.
    """
    task, graphdef = model.task, model.graphdef
    key = jax.random.key(model.config.seed)

    @functools.partial(jax.jit, static_argnames="capacity", compiler_options=sharding.compiler_options())
    def run(params, rest, batch, capacity):
        net = merge_model(task, graphdef, params, rest)
        if embedding:
            return embed(task, net, batch, capacity, key)
        return jnp.stack(task.forward(net, batch, capacity, key), axis=-1).astype(jnp.float32)

    def answer(corpus: Corpus) -> np.ndarray:
        order = np.argsort(corpus.lengths, kind="stable")
        room = RECORDINGS[0] if len(order) == 1 else RECORDINGS[1]
        labels, out = np.zeros(len(order), np.float32), []
        for begin in range(0, len(order), room):
            ids = np.full(room, -1, np.int32)
            ids[: len(order[begin : begin + room])] = order[begin : begin + room]
            units = int(task.geometry.units(np.where(ids >= 0, corpus.lengths[ids], 0)).sum())
            half = 1 << max((units - 1).bit_length() - 1, 0)  # the next of 1, 2, 3, 4, 6, 8, 12, ...
            capacity = next(size for size in (half, 3 * half // 2, 2 * half) if size >= units)
            batch = batches.pack(corpus, labels, ids, capacity, task.geometry)
            out.append(np.asarray(run(model.params, model.rest, batch, capacity))[: len(order) - begin])
        return np.concatenate(out)[np.argsort(order, kind="stable")]

    return answer


def load_segmenter(workdir: str | pathlib.Path) -> SegmenterModel:
    """The best segmenter of a workdir.

    Raises:
      checkpoint.CheckpointError: as `load_model`.
    """
    model = load_model(workdir)
    log_duration = np.array(model.meta["log_duration"], np.float32)
    return SegmenterModel(model.config, model.graphdef, model.params, model.rest, model.sample_rate_hz, log_duration)


def embed(task: Task, model: Any, batch: dict, capacity: int, key: jax.Array) -> jax.Array:
    """(R, D) what a classifier's last unit is given, the mean over each recording's clips; zeros where it has none."""
    assert task.inputs is not None
    assert task.features is not None
    values, recording, real = task.inputs(batch, capacity, key)
    h_JxD = task.features(model, *values).astype(jnp.float32)
    R = len(batch["lengths"])
    summed = jax.ops.segment_sum(jnp.where(real[:, None], h_JxD, 0), recording, R)
    count = jax.ops.segment_sum(real.astype(jnp.float32), recording, R)
    return summed / jnp.maximum(count, 1)[:, None]
