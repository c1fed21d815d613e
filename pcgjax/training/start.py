"""What a training starts with: its compiled steps, its first state or that of a checkpoint, its log."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm
from absl import logging
from flax import nnx

from pcgjax import thresholds
from pcgjax.runs.config import plain_config, refuse_changes, refuse_other_order
from pcgjax.runs.log import digest, log_line, open_board, rewind
from pcgjax.runs.record import record
from pcgjax.runs.seal import begin_anew, unseal
from pcgjax.runs.streams import EVALUATION, STEP
from pcgjax.runtime import checkpoint, files, goodput, sharding
from pcgjax.tasks.base import TrainState, initial_state, split_model
from pcgjax.training import optimizer
from pcgjax.training.answers import load_model, make_predict
from pcgjax.training.experiment import Experiment
from pcgjax.training.step import Totals, compile_run, zero_totals


class Compiled(NamedTuple):
    """What a run computes with, before it has a state."""

    update: optax.GradientTransformation
    graphdef: Any
    init: Callable[[], TrainState]
    abstract: TrainState  # shapes and types
    shardings: TrainState
    layout: sharding.Layout
    steps: Callable  # (state, totals, data, ids, capacity, start, stop) -> (state, totals)


class Run(NamedTuple):
    """A training under way, but for its state."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    experiment: Experiment
    compiled: Compiled
    resident: dict | None  # the corpus on the devices
    predict: dict[str, Callable]  # validation, test: (params, rest) -> answers
    update_threshold: Callable
    meta: dict[str, Any]  # of the checkpoints
    log: Callable[[int, str, dict], None]  # (step, split, values): a line of metrics
    board: Any  # TensorBoard
    last: ocp.CheckpointManager
    best: ocp.CheckpointManager
    clock: goodput.Clock
    trace: goodput.Trace

    @property
    def last_step(self) -> int:
        return self.config.train.epochs * self.experiment.steps_an_epoch

    def progress(self, step: int) -> tqdm.tqdm:
        """The bar of the steps, in the first process."""
        hidden = jax.process_index() > 0
        return tqdm.tqdm(total=self.last_step, initial=step, desc="train", unit="step", mininterval=1.0, disable=hidden)

    def lines(self) -> str | None:
        """What a checkpoint says of metrics.jsonl, which the first process writes."""
        return None if jax.process_index() else digest(self.workdir / "metrics.jsonl")

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Waits for what is being written when training ends, however it does."""
        try:
            yield
        finally:
            with self.clock("save"):
                self.last.wait_until_finished()
        self.last.close()
        self.best.close()


def compile_steps(config: ml_collections.ConfigDict, experiment: Experiment) -> Compiled:
    """The steps of a config for the experiment's devices; they are compiled when they first run."""
    task, mesh, seed = experiment.task, experiment.mesh, config.seed
    update = optimizer.make(config.optimizer, config.train.epochs * experiment.steps_an_epoch)
    graphdef = nnx.graphdef(task.init(nnx.Rngs(seed)))
    sapt = thresholds.init(config.evaluation.threshold, **config.sapt)
    init = functools.partial(initial_state, task, update, seed, sapt)
    abstract = jax.eval_shape(init)
    shardings = sharding.state_sharding(mesh, abstract)
    pmap, streamed = config.parallel.strategy == "pmap", experiment.pipeline == "stream"
    steps = compile_run(
        task, update, graphdef, jax.random.fold_in(jax.random.key(seed), STEP), experiment.capacities, mesh, shardings,
        experiment.groups, streamed, pmap, config.train.remat,
    )  # fmt: skip
    return Compiled(update, graphdef, init, abstract, shardings, sharding.Layout(mesh, pmap), steps)


def first_state(config: ml_collections.ConfigDict, compiled: Compiled) -> TrainState:
    """The state before the first step, with what `train.start_from` and `model.checkpoint` give it."""
    state = jax.jit(compiled.init, out_shardings=compiled.shardings)()
    if config.train.start_from:
        carried = carried_over(state, config.train.start_from, tuple(config.optimizer.frozen))
        state = jax.device_put(carried, compiled.shardings)
    if config.model.get("checkpoint"):
        state = jax.device_put(with_encoder(state, compiled.graphdef, config.model.checkpoint), compiled.shardings)
    return state


def start(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, experiment: Experiment, compiled: Compiled,
    clock: goodput.Clock, trace: goodput.Trace,
) -> tuple[Run, TrainState, Totals]:  # fmt: skip
    """(run, state, totals): from the beginning, or from the last checkpoint of the workdir.

    Raises:
      CheckpointError: a checkpoint of another config or another order of data, or one that is damaged.
    """
    task, parts, mesh = experiment.task, experiment.parts, experiment.mesh
    state, totals = first_state(config, compiled), sharding.put(mesh, zero_totals())
    resident = experiment.resident()
    key = jax.random.fold_in(jax.random.key(config.seed), EVALUATION)
    predict = {
        part: make_predict(
            task, compiled.graphdef, experiment.corpus, parts[part], config.evaluation.batch_recordings, key, mesh,
            resident,
        )
        for part in ("validation", "test")
    }  # fmt: skip
    if task.classifies and state.sapt.interval and len(set(experiment.labels[parts["validation"]])) < 2:
        logging.warning("validation has one class only: the threshold stays at %s", config.evaluation.threshold)
    meta: dict[str, Any] = {
        "config": plain_config(config),
        "order_sha256": experiment.digest,
        "sample_rate_hz": experiment.corpus.sample_rate_hz,
        "best": None,
        **task.remember(experiment.corpus, parts["train"]),
    }
    state, totals = resume(workdir, state, totals, meta)
    step = int(state.step)
    board, log = open_log(workdir, step, meta["config"])
    record(workdir, config, step)
    last, best = (checkpoint.manager(workdir / "checkpoints" / name) for name in ("last", "best"))
    update_threshold = jax.jit(thresholds.sapt_update)
    run = Run(config, workdir, experiment, compiled, resident, predict, update_threshold, meta, log, board, last, best,
              clock, trace)  # fmt: skip
    return run, state, totals


def resume(workdir: pathlib.Path, state: TrainState, totals: Totals, meta: dict[str, Any]) -> tuple[TrainState, Totals]:
    """State and totals of the workdir's last checkpoint, and its best epoch in `meta`; or what is given.

    Lines of metrics.jsonl after that checkpoint are removed.
    Raises:
      CheckpointError: a checkpoint, or what an ended run left, is of another config or order of data, or damaged.
    """
    last, best = (workdir / "checkpoints" / name for name in ("last", "best"))

    def if_ours(saved: dict, like: Any = None) -> Any:
        refuse_changes(saved["config"], meta["config"], workdir)
        refuse_other_order(saved["order_sha256"], meta["order_sha256"], workdir)
        return like

    checkpoint_ = checkpoint.restore(last, lambda saved: if_ours(saved, {"state": state, "totals": totals}))
    unseal(workdir)
    if checkpoint_ is None:
        checkpoint.restore(best, if_ours)
        checkpoint.drop_after(best, -1, aside=False)
        if jax.process_index() == 0:
            begin_anew(workdir)
        return state, totals
    step, restored, saved = checkpoint_
    logging.info("resuming at step %d", step)
    checkpoint.drop_after(last, step, aside=True)
    checkpoint.drop_after(best, step, aside=False)  # the run comes there again
    model = {"params": restored["state"].params, "rest": restored["state"].rest}
    meta["best"] = saved["best"]
    if saved["best"] is not None:
        best_checkpoint = checkpoint.restore(best, lambda saved: if_ours(saved, model))
        meta["best"] = best_checkpoint and best_checkpoint[2]["best"]
        if meta["best"] != saved["best"]:
            logging.warning("%s: the best epoch's model is lost, %s is the best now", best, meta["best"])
    if jax.process_index() == 0:

        def kept(line: dict) -> bool:
            return line["step"] <= step and line["split"] != "test"

        rewind(workdir / "metrics.jsonl", kept, saved.get("log"))
    return restored["state"], restored["totals"]


def open_log(workdir: pathlib.Path, step: int, plain: dict) -> tuple[Any, Callable[[int, str, dict], None]]:
    """(TensorBoard's writer, (step, split, values) -> a line of metrics); of many processes the first writes."""
    if jax.process_index():
        return None, lambda *_: None
    board = open_board(workdir, step)
    files.write_text(workdir / "config.json", json.dumps(plain, indent=1))
    return board, functools.partial(log_line, workdir / "metrics.jsonl", board=board)


def carried_over(state: TrainState, workdir: str, groups: tuple[str, ...]) -> TrainState:
    """The state with the parameter groups `groups`, and their running averages, of the best model of `workdir`.

    Raises:
      ValueError: that model has no such group, or one of another shape.
    """
    model = load_model(workdir)
    params, rest = model.params, model.rest

    def take(tree, source):
        leaves = {path: x for path, x in jax.tree_util.tree_leaves_with_path(source) if path[0].key in groups}

        def one(path, x):
            if path[0].key not in groups:
                return x
            if path not in leaves or leaves[path].shape != x.shape:
                name = path[0].key
                raise ValueError(f"train.start_from={workdir}: its parameters {name!r} are not those of this model")
            return np.asarray(leaves[path])  # on this process' device: each puts its copy where the state lies

        return jax.tree_util.tree_map_with_path(one, tree)

    return state._replace(params=take(state.params, params), rest=take(state.rest, rest))


def with_encoder(state: TrainState, graphdef: Any, path: str) -> TrainState:
    """The state with SSAMBA's parameters from a checkpoint of the public code's layout, its positions adapted; of an
    image net with ImageNet's weights and running averages.

    Raises:
      ValueError: as `ssamba.load_torch_checkpoint` or `image.load_imagenet`, or a checkpoint of another width or depth.
    """
    from pcgjax.models import image
    from pcgjax.models.imagenet import load_imagenet
    from pcgjax.models.ssamba_checkpoint import load_torch_checkpoint

    model = nnx.merge(graphdef, state.params, state.rest)
    if isinstance(model, image.ImageClassifier):
        _, *loaded = split_model(load_imagenet(model, path))
        # As above, what was loaded; the rest, such as the head, is the state's.
        params, rest = jax.tree.map(lambda x: np.asarray(x) if x.is_fully_addressable else x, loaded)
        return state._replace(params=params, rest=rest)
    encoder = model.encoder
    loaded = split_model(load_torch_checkpoint(path, encoder.frames, encoder.stride))[1]
    leaves = dict(jax.tree_util.tree_leaves_with_path(loaded))

    def take(place, x):
        # A segmenter has no use for a checkpoint's own head; the predictors of pre-training may be new.
        if place not in leaves:
            return x
        if leaves[place].shape != x.shape:
            raise ValueError(
                f"model.checkpoint={path}: {jax.tree_util.keystr(place)} has shape {leaves[place].shape}, this model "
                f"{x.shape}; set model.width and model.depth to the checkpoint's"
            )
        return np.asarray(leaves[place])

    return state._replace(
        params=state.params | {"encoder": jax.tree_util.tree_map_with_path(take, state.params["encoder"])}
    )
