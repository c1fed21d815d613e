"""Trains what a config describes: the one loop.

    python -m pcgjax.train --config=configs/cnn.py --workdir=runs/cnn --config.data.prepared=DIR [--config.a.b=v]

The order is always the same: train an epoch (one compiled program where the corpus fits the device), validate, save.
WORKDIR receives config.json, split.json, metrics.jsonl, train.log and checkpoints/{last,best} on the way, and at the
end metrics.json, predictions.csv, examples.npz and report.html. A second start resumes where the first one was stopped.
"""

from __future__ import annotations

import functools
import json
import pathlib
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tqdm
from absl import app, flags, logging
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags

from pcgjax import (
    checkpoint,
    compare,
    costs,
    distributed,
    evaluate,
    files,
    goodput,
    input_pipeline,
    metrics,
    optimizer,
    report,
    runs,
    segment,
    sharding,
    tasks,
    thresholds,
)
from pcgjax.features.filters import ALIGN
from pcgjax.runs import EVALUATION, ORDER, STEP


class Totals(NamedTuple):
    """Counts of a stretch of training, summed on the device."""

    loss: jax.Array  # sums over recordings, or over clips where the loss is over them
    correct: jax.Array
    samples: jax.Array
    bad_step: jax.Array  # the first step whose loss was not finite; -1: none


# What the forward pass keeps for the backward one; all else is computed again.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def zero_totals() -> Totals:
    return Totals(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32))


def make_step(
    task: tasks.Task,
    update: optax.GradientTransformation,
    graphdef: Any,
    key: jax.Array,
    groups: int,
    capacities: tuple[int, ...],
    axes: tuple[str, ...] = (),
    whole: Callable = lambda params: params,
    summed: Callable | None = None,
    remat: str = "none",
) -> tuple[Callable, Callable]:
    """One training step in two halves, the same for one device, a mesh and pmap.

    The first, of which every device does its part: (params, rest, step, threshold, data, ids (G', R), capacity) ->
    gradients, counts, rest; a device goes through its own groups G' one after the other. The second, of the whole
    state: ((state, totals), what the first returned) -> (state, totals).

    groups: device groups in all; axes: names of the device axes, over which is summed; `whole` and `summed`: as
      `sharding` has them, where a device holds a part of the parameters.
    """
    if remat not in REMAT:
        raise ValueError(f"train.remat={remat!r}: choose one of {', '.join(REMAT)}")
    total = (lambda x: jax.lax.psum(x, axes)) if axes else (lambda x: x)
    summed = summed or functools.partial(jax.tree.map, total)
    kept = REMAT[remat]

    def sums(params, rest, step, threshold, data, ids, choice):
        own = len(ids)
        first = jax.lax.axis_index(axes) * own if axes else 0
        keys = jax.lax.dynamic_slice_in_dim(jax.random.split(jax.random.fold_in(key, step), groups), first, own)
        full, own_part = jax.vjp(whole, params)

        def of_group(rest, ids_R, key):
            def compute(batch, capacity):
                def loss(params):
                    model = tasks.merged(task, graphdef, params, rest)
                    objective, counts = task.loss(model, batch, capacity, key, threshold, total)
                    return objective, (counts, tasks.split(model)[2])

                loss = loss if kept is None else jax.checkpoint(loss, policy=kept)
                (_, (counts, after)), grads = jax.value_and_grad(loss, has_aux=True)(full)
                return grads, counts, after

            return input_pipeline.at_capacity(compute, data, ids_R, choice, capacities, task.geometry)

        if own == 1:
            grads, counts, rest = of_group(rest, ids[0], keys[0])
        else:

            def add(i, carry):
                grads, counts, rest = carry
                more, counted, rest = of_group(rest, ids[i], keys[i])
                return *jax.tree.map(jnp.add, (grads, counts), (more, counted)), rest

            none = jax.tree.map(jnp.zeros_like, full), tasks.no_counts()
            grads, counts, rest = jax.lax.fori_loop(0, own, add, (*none, rest))
        return summed(own_part(grads)[0]), jax.tree.map(total, counts), rest

    def apply(carry, of_step):
        state, totals = carry
        grads, counts, rest = of_step
        grads = jax.tree.map(lambda g: g / jnp.maximum(counts.samples, 1), grads)
        updates, opt_state = update.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        bad = (totals.bad_step < 0) & ~jnp.isfinite(counts.loss)
        totals = Totals(
            totals.loss + counts.loss,
            totals.correct + counts.correct,
            totals.samples + counts.samples,
            jnp.where(bad, state.step, totals.bad_step),
        )
        return tasks.TrainState(state.step + 1, params, rest, opt_state, state.sapt), totals

    return sums, apply


def make_run(sums: Callable, apply: Callable) -> Callable:
    """Many steps as one program: (state, totals, data, ids, capacity, start, stop) -> (state, totals).

    `ids` and `capacity` are a plan's arrays on the device, and the number of steps is data.
    """

    def run(state, totals, data, ids, capacity, start, stop):
        def step(i, carry):
            s = carry[0]
            of_step = sums(s.params, s.rest, s.step, s.sapt.threshold, data, ids[i], capacity[i])
            return apply(carry, of_step)

        return jax.lax.fori_loop(start, stop, step, (state, totals))

    return run


def look_ahead(experiment: Experiment, run: Any, abstract: Any, shardings: Any, seed: int, pmap: bool) -> dict:
    """What a step of the compiled program costs, as `costs.summary` has it; nothing is put on the devices or run.

    Raises:
      ValueError: pmap over several processes, which JAX does not compile ahead of time.
    """
    if pmap and jax.process_count() > 1:
        raise ValueError("--dry_run: pmap over several processes cannot be looked at; --devices=N in one process can")
    mesh, task = experiment.mesh, experiment.task
    plan = experiment.plan(seed, 0)
    everywhere = sharding.replicated(mesh)
    placed = lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)
    state = jax.tree.map(placed, abstract, shardings)
    totals = jax.tree.map(lambda x: placed(x, everywhere), jax.eval_shape(zero_totals))
    stacked = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct((mesh.size, *x.shape), x.dtype), tree)
    if experiment.pipeline == "resident":
        data = jax.tree.map(
            lambda x: placed(x, None if pmap else everywhere),
            input_pipeline.block_shapes(experiment.corpus, experiment.labels, np.arange(len(experiment.corpus.rows))),
        )
        ids = plan.ids
    else:
        first = next(input_pipeline.stream(experiment.corpus, experiment.labels, plan, 0, 1, mesh.size))
        layout = None if pmap else NamedSharding(mesh, PartitionSpec(sharding.AXES))
        of_all = lambda x: jax.ShapeDtypeStruct((mesh.size, *x.shape[1:]), x.dtype, sharding=layout)
        data, ids = jax.tree.map(of_all, first[0]), np.zeros((len(first[1]), *plan.ids.shape[1:]), np.int32)
        plan = plan._replace(capacity=first[2])
    if pmap:
        ids = ids.reshape(len(ids), mesh.size, -1, ids.shape[-1])
    began = time.monotonic()
    program = run.lower(*map(stacked, (state, totals)) if pmap else (state, totals), data, ids, plan.capacity, 0, 1)
    compiled = program.compile()
    parts = {"parameters": state.params, "optimizer": state.opt_state, "averages": state.rest}
    states = {name: costs.state_bytes(part) for name, part in parts.items()}
    parameters, rest = states["parameters"][0], states["averages"][0]
    rows = task.geometry.buffer_rows(max(experiment.capacities), plan.ids.shape[-1])
    batch_bytes = 2 * ALIGN * rows * experiment.groups // mesh.size
    shape = (mesh.shape["data"], mesh.shape["fsdp"])
    # Of each moment and parameter a device reads and writes its own; averages are summed forward and backward.
    return costs.summary(
        costs.step_cost(compiled.as_text()),
        costs.memory(compiled),
        states,
        costs.minimum(parameters, 2 * rest + _COUNTS_BYTES, shape),
        2 * sum(device for _, device in states.values()) + batch_bytes,
        shape,
        "bfloat16" if task.dtype == jnp.bfloat16 else "float32",
    ) | {"compile_s": time.monotonic() - began}


_COUNTS_BYTES = 4 * len(tasks.Counts._fields)


def compile_run(
    task: tasks.Task,
    update: optax.GradientTransformation,
    graphdef: Any,
    key: jax.Array,
    capacities: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    shardings: tasks.TrainState,
    groups: int,
    streamed: bool,
    pmap: bool = False,
    remat: str = "none",
) -> Callable:
    """`make_run` for a mesh, jitted, or under pmap; state and totals are donated."""
    if pmap:
        step = make_step(task, update, graphdef, key, groups, capacities, sharding.GROUP, remat=remat)
        # Each device is given its own groups of every batch; state and totals are one copy a device.
        return jax.pmap(
            make_run(*step), axis_name=sharding.GROUP[0], in_axes=(0, 0, 0 if streamed else None, 1, None, None, None),
            donate_argnums=(0, 1),
        )  # fmt: skip
    specs = sharding.specs_of(shardings.params)
    sums, apply = make_step(
        task, update, graphdef, key, groups, capacities, sharding.AXES if mesh.size > 1 else (),
        lambda params: sharding.whole(params, specs), lambda grads: sharding.summed(grads, specs, mesh), remat,
    )  # fmt: skip
    everywhere, spread = PartitionSpec(), PartitionSpec(sharding.AXES)
    own = (specs, everywhere, everywhere, everywhere, spread if streamed else everywhere, spread, everywhere)
    sums = sharding.over_devices(sums, mesh, own, (specs, everywhere, everywhere))
    return jax.jit(
        make_run(sums, apply), donate_argnums=(0, 1), compiler_options=sharding.compiler_options(),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )  # fmt: skip


def choose_pipeline(name: str, corpus_bytes: int) -> str:
    """resident or stream. auto: resident where the corpus takes at most a third of the device's free memory."""
    if name in ("resident", "stream"):
        return name
    if name != "auto":
        raise ValueError(f"data.pipeline={name!r}: choose resident, stream or auto")
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    else:
        import psutil

        # The host's copy and every device's are in one memory.
        free = psutil.virtual_memory().available // (1 + jax.local_device_count())
    fits = corpus_bytes < free / 3
    if jax.process_count() > 1:  # all must choose the same
        from jax.experimental import multihost_utils

        fits = bool(multihost_utils.process_allgather(np.array(fits)).all())
    return "resident" if fits else "stream"


def balance_groups(balance: str, corpus, labels: np.ndarray, indices: np.ndarray) -> np.ndarray | None:
    if balance == "none":
        return None
    classes = [str(int(labels[i])) for i in indices]
    if balance == "class":
        return np.array(classes)
    if balance == "database_class":
        return np.array([f"{corpus.rows[i]['database']} {c}" for i, c in zip(indices, classes, strict=True)])
    raise ValueError(f"train.balance={balance!r}: choose none, class or database_class")


class Experiment(NamedTuple):
    """What a config makes of the data and the devices, before any state."""

    corpus: input_pipeline.Corpus
    parts: dict[str, np.ndarray]  # train, validation, test: indices into the corpus
    split: dict
    task: tasks.Task
    labels: np.ndarray
    mesh: jax.sharding.Mesh
    groups: int  # device groups that share a step's recordings, train.accumulate a device
    order_of: Callable[[int, int], np.ndarray]  # (seed, epoch) -> ids (steps, G, R)
    capacities: tuple[int, ...]
    steps_an_epoch: int
    digest: str  # of all that the order of the data depends on; not the number of devices
    pipeline: str  # resident or stream

    def plan(self, seed: int, epoch: int) -> input_pipeline.Plan:
        order = self.order_of(seed, epoch)
        return input_pipeline.plan(order, self.corpus.lengths, self.task.geometry, self.capacities)

    def resident(self) -> dict | None:
        """The whole corpus on every device, where the pipeline wants it there."""
        if self.pipeline != "resident":
            return None
        everything = input_pipeline.block(self.corpus, self.labels, np.arange(len(self.corpus.rows)))
        return sharding.put(self.mesh, everything)

    def pieces(
        self, resident: dict | None, plan: input_pipeline.Plan, start: int, stop: int, pmap: bool = False
    ) -> Iterator:
        """(data, ids, capacity, start, stop) of these steps of a plan: once when resident, else block by block.

        pmap: ids (steps, D, G', R) of this process' D devices, and blocks (D, ...), from the host.
        """
        own, arguments = sharding.mine(self.mesh), (self.corpus, self.labels, plan, start, stop)
        apart = lambda ids, devices: ids.reshape(len(ids), devices, -1, ids.shape[-1])
        if resident is not None:
            ids = apart(plan.ids, self.mesh.size)[:, own] if pmap else plan.ids
            yield resident, ids, plan.capacity, start, stop
        elif pmap:
            for data, ids, capacity, steps in input_pipeline.stream(*arguments, self.mesh.size, own):
                yield data, apart(ids, len(own)), capacity, 0, steps
        else:
            for data, ids, capacity, steps in input_pipeline.streamed(*arguments, self.mesh):
                yield data, ids, capacity, 0, steps


def set_up(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    seeds: Sequence[int] = (),
    mesh: jax.sharding.Mesh | None = None,
) -> Experiment:
    """Reads the data, makes or reuses the split, and plans the batches, for the config's seed or for all of `seeds`.

    mesh: the devices that share a batch; without it all there are, as `config.parallel` divides them.

    Raises: as `train`.
    """
    t = config.train
    for part, field in (("train", "epochs"), ("train", "batch_recordings"), ("train", "checkpoint_steps"),
                        ("train", "accumulate"), ("evaluation", "batch_recordings"),
                        ("evaluation", "resamples")):  # fmt: skip
        if config[part][field] < 1:
            raise ValueError(f"{part}.{field}={config[part][field]}: must be at least 1")
    if not 0 <= config.evaluation.threshold <= 1:
        raise ValueError(f"evaluation.threshold={config.evaluation.threshold}: must lie between 0 and 1")
    mesh = mesh or sharding.make_mesh(config.parallel)
    groups = mesh.size * t.accumulate
    corpus, parts, split = runs.load_data(config, workdir)
    task = tasks.make(config, corpus.sample_rate_hz)
    labels = task.labels(corpus)
    selectable = ("loss", *(metrics.METRICS if task.classifies else ("accuracy",)))
    if t.select not in selectable:
        raise ValueError(f"train.select={t.select!r}: choose one of {', '.join(selectable)}")
    if t.balance != "none" and not task.classifies:
        raise ValueError(f"train.balance={t.balance!r}: only a classifier has classes to balance; choose none")
    if task.geometry.window > corpus.lengths.max():
        raise ValueError(
            f"features.window_s={config.features.window_s}: longer than every recording of {config.data.prepared} "
            f"(at most {corpus.lengths.max() / corpus.sample_rate_hz:.1f} s)"
        )
    balance = balance_groups(t.balance, corpus, labels, parts["train"])

    @functools.lru_cache(64)
    def order_of(seed: int, epoch: int) -> np.ndarray:
        order_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ORDER), epoch)
        return input_pipeline.epoch_order(parts["train"], balance, order_key, t.batch_recordings, groups)

    seeds = tuple(seeds) or (config.seed,)
    looked_at = min(t.epochs, max(50 // len(seeds), 1))
    needed = [
        input_pipeline.batch_units(order_of(seed, epoch), corpus.lengths, task.geometry)
        for seed in seeds
        for epoch in range(looked_at)
    ]
    # The largest batch that any order can make, so that no later epoch finds its batches without a place.
    own = t.batch_recordings // groups
    largest = np.sort(task.geometry.units(corpus.lengths[parts["train"]]))[-own:]
    # Balanced epochs repeat recordings, so that a batch may hold the longest one several times.
    units = largest.sum() if balance is None else largest[-1] * own
    capacities = input_pipeline.choose_capacities(np.concatenate(needed), task.shapes)
    capacities = (*capacities, int(units)) if t.epochs > looked_at and units > capacities[-1] else capacities
    digest = input_pipeline.order_digest(
        corpus, train=split["train"], seed=config.seed, batch=t.batch_recordings, balance=t.balance,
        target=config.task.target, shuffled=config.data.shuffle_labels,
    )  # fmt: skip
    return Experiment(
        corpus, parts, split, task, labels, mesh, groups, order_of, capacities, len(order_of(seeds[0], 0)), digest,
        choose_pipeline(config.data.pipeline, corpus.bytes),
    )  # fmt: skip


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, dry_run: bool = False) -> dict:
    """Trains, evaluates and reports one run; returns what it writes to metrics.json.

    Raises:
      ValueError (also PrepareError, SplitError, LeakError, CheckpointError): a config field, a prepared folder, a
        split or a checkpoint that does not fit, naming it.
      FloatingPointError: a loss that is not finite, naming the step and its recordings.
    """
    clock, began = goodput.Clock(), time.monotonic()
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    t, seed = config.train, config.seed
    first_process = jax.process_index() == 0  # the one that writes what all of them know
    experiment = set_up(config, workdir)
    corpus, parts, _, task, labels, mesh, groups = experiment[:7]
    steps_an_epoch = experiment.steps_an_epoch
    last_step = t.epochs * steps_an_epoch
    trace = goodput.Trace(config.profile, workdir / "profile")

    # --------------------------------------------------------------------------------------------------- state
    key = jax.random.key(seed)
    update = optimizer.make(config.optimizer, last_step)
    graphdef = nnx.graphdef(task.init(nnx.Rngs(seed)))
    sapt = thresholds.init(config.evaluation.threshold, **config.get("sapt", {"interval": 0}))
    init = functools.partial(tasks.initial_state, task, update, seed, sapt)
    abstract = jax.eval_shape(init)
    shardings = sharding.state_sharding(mesh, abstract)

    # ---------------------------------------------------------------------------------------- compiled programs
    pmap, streamed = config.parallel.strategy == "pmap", experiment.pipeline == "stream"
    run = compile_run(
        task, update, graphdef, jax.random.fold_in(key, STEP), experiment.capacities, mesh, shardings, groups,
        streamed, pmap, t.remat,
    )  # fmt: skip
    example = experiment.plan(seed, 0)
    facts = {
        "parameters": sum(x.size for x in jax.tree.leaves(abstract.params)),
        "pipeline": experiment.pipeline,
        "corpus_mib": corpus.bytes / 2**20,
        "train_recordings": len(parts["train"]),
        "steps_an_epoch": steps_an_epoch,
        "capacities": list(experiment.capacities),
        "padding_waste": input_pipeline.padding_waste(example, corpus.lengths, task.geometry),
    }
    logging.info("%s", json.dumps(facts))
    if dry_run:
        facts |= look_ahead(experiment, run, abstract, shardings, seed, pmap)
        files.write_text(workdir / "dry_run.json", json.dumps(facts, indent=1))
        print(costs.table(facts), f"\nwrote {workdir}/dry_run.json")
        return facts

    state = jax.jit(init, out_shardings=shardings)()
    if t.get("start_from"):
        state = jax.device_put(carried_over(state, t.start_from, tuple(config.optimizer.frozen)), shardings)
    if config.model.get("checkpoint"):
        state = jax.device_put(with_encoder(state, graphdef, config.model.checkpoint), shardings)
    resident = experiment.resident()
    # pmap has a copy of the state for each of this process' devices, all the rest one array laid out over the mesh.
    copies = len(sharding.mine(mesh))
    spread = (lambda x: jax.tree.map(lambda a: np.stack([np.asarray(a)] * copies), x)) if pmap else (lambda x: x)
    first = lambda a: a[0] if isinstance(a, np.ndarray) else np.asarray(a.addressable_data(0)).reshape(a.shape[1:])
    one_copy = lambda x: sharding.put(mesh, jax.tree.map(first, x))
    gathered = one_copy if pmap else (lambda x: x)
    predicts = {
        part: evaluate.make_predict(
            task, graphdef, corpus, parts[part], config.evaluation.batch_recordings,
            jax.random.fold_in(key, EVALUATION), mesh, resident,
        )
        for part in ("validation", "test")
    }  # fmt: skip
    update_threshold = jax.jit(thresholds.sapt_update)
    if task.classifies and sapt.interval and len(set(labels[parts["validation"]])) < 2:
        logging.warning("validation has one class only: the threshold stays at %s", config.evaluation.threshold)

    # ------------------------------------------------------------------------------------------ start or resume
    log = workdir / "metrics.jsonl"
    plain = runs.plain_config(config)
    meta: dict[str, Any] = {
        "config": plain,
        "order_sha256": experiment.digest,
        "sample_rate_hz": corpus.sample_rate_hz,
        "best": None,
    }
    if config.task.name == "segmenter":
        meta["log_duration"] = segment.log_durations(corpus, parts["train"], config.features.step_s).tolist()
    nothing = lambda: sharding.put(mesh, zero_totals())
    totals = nothing()
    found = checkpoint.restore(workdir / "checkpoints" / "last")
    if found:
        saved = found[2]
        runs.refuse_changes(saved["config"], plain, workdir)
        if saved["order_sha256"] != experiment.digest:
            raise checkpoint.CheckpointError(
                f"{workdir}: its checkpoint was trained in another order of data (data or split "
                "changed); give another --workdir, or what it was trained with"
            )
        at, held, saved = checkpoint.require(workdir / "checkpoints" / "last", {"state": state, "totals": totals})
        state, totals = held["state"], held["totals"]
        meta["best"] = saved["best"]
        logging.info("resuming at step %d", at)
        kept = [line for line in runs.history(log) if line["step"] <= at and line["split"] != "test"]
        if first_process:
            files.write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
    elif log.exists() and first_process:
        log.unlink()
    at = int(state.step)
    board = runs.open_board(workdir, at) if first_process else None
    tell = functools.partial(runs.log_line, log, board=board) if first_process else (lambda *_: None)
    runs.record(workdir, config, at)
    if first_process:
        files.write_text(workdir / "config.json", json.dumps(plain, indent=1))
    last, best = (checkpoint.manager(workdir / "checkpoints" / name) for name in ("last", "best"))

    stopped: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}

    # ------------------------------------------------------------------------------------------------ the loop
    state, totals = spread(state), spread(totals)
    stop = 0
    bar = tqdm.tqdm(total=last_step, initial=at, desc="train", unit="step", mininterval=1.0, disable=not first_process)
    try:
        while at < last_step and not stop:
            epoch, within = divmod(at, steps_an_epoch)
            plan = experiment.plan(seed, epoch)
            trace.before(at)
            to_save = t.checkpoint_steps - at % t.checkpoint_steps
            until = trace.until(at, min((epoch + 1) * steps_an_epoch, at + to_save)) - epoch * steps_an_epoch
            pieces = experiment.pieces(resident, plan, within, until, pmap)
            ahead: list[jax.Array] = []
            while True:
                with clock("wait"):
                    piece = next(pieces, None)
                if piece is None:
                    break
                with clock("train"):
                    state, totals = run(state, totals, *piece)
                    # Or all blocks of an epoch would wait in memory for the device.
                    ahead.append(totals.loss + 0)
                    if len(ahead) > 1:
                        ahead.pop(0).block_until_ready()
            with clock("train"):
                counted = jax.device_get(gathered(totals))  # waits for the device
            bar.update(until - within)
            at += until - within
            trace.after(at)
            stop = distributed.stop_signal(stopped[0] if stopped else 0)
            if counted.bad_step >= 0:
                bad = divmod(int(counted.bad_step), steps_an_epoch)
                ids = experiment.order_of(seed, bad[0])[bad[1]].reshape(-1)
                names = ", ".join(corpus.rows[i]["id"] for i in ids if i >= 0)
                raise FloatingPointError(
                    f"the loss was not finite at step {int(counted.bad_step)}, recordings {names}; "
                    f"lower optimizer.learning_rate={config.optimizer.learning_rate} or look at those recordings"
                )
            if until == steps_an_epoch:
                n = max(int(counted.samples), 1)
                values = {"loss": float(counted.loss) / n, "accuracy": float(counted.correct) / n}
                told = clock.told()
                tell(at, "train", values | {"epoch": epoch + 1, "seconds": told["train"], "waited": told["wait"]})
                with clock("validate"):
                    totals = spread(nothing())
                    held = gathered(state)
                    answers = predicts["validation"](held.params, held.rest)
                    y = labels[parts["validation"]]
                    threshold = float(held.sapt.threshold)
                    scores = evaluate.validation_scores(task, answers, y, threshold)
                    if task.classifies:
                        sapt = update_threshold(held.sapt, np.exp(answers[:, 0]).clip(0, 1), y)
                        state = state._replace(sapt=spread(sharding.put(mesh, sapt)))
                tell(at, "validation", scores | {"epoch": epoch + 1})
                bar.set_postfix(loss=f"{values['loss']:.3f}", **{f"val_{t.select}": f"{scores[t.select]:.3f}"})
                better = -scores[t.select] if t.select in ("loss", "brier") else scores[t.select]
                better = better if np.isfinite(better) else -np.inf
                if meta["best"] is None or better > meta["best"]["score"]:
                    meta["best"] = {
                        "score": better, "step": at, "epoch": epoch + 1, "metric": t.select, "threshold": threshold,
                    }  # fmt: skip
                    with clock("save"):
                        checkpoint.save(best, at, {"params": held.params, "rest": held.rest}, meta)
                        best.wait_until_finished()
            # Totals of a part of an epoch travel with the checkpoint: the epoch's line is the same after a resume.
            if at % t.checkpoint_steps == 0 or until == steps_an_epoch or stop:
                with clock("save"):
                    checkpoint.save(last, at, {"state": gathered(state), "totals": gathered(totals)}, meta)
        trace.stop()
    finally:
        bar.close()
        with clock("save"):
            last.wait_until_finished()
        for number, handler in previous.items():
            signal.signal(number, handler)
    last.close()
    best.close()
    seconds = clock.told()
    logging.info("%s", goodput.sentence(seconds))
    if stop:
        if board:
            board.close()
        logging.warning("stopped by signal %d at step %d, saved; the same command goes on", stop, at)
        sys.exit(128 + stop)

    # ---------------------------------------------------------------------------------------- the best, judged
    held = gathered(state)
    _, kept, saved = checkpoint.require(workdir / "checkpoints" / "best", {"params": held.params, "rest": held.rest})
    judged = {part: predict(kept["params"], kept["rest"]) for part, predict in predicts.items()}
    params, rest = jax.device_get(jax.jit(lambda *x: x, out_shardings=sharding.replicated(mesh))(*kept.values()))
    if not first_process:
        return {}
    system = {
        "device": str(jax.devices()[0].device_kind),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "wall_s": time.monotonic() - began,
        "seconds": seconds,
        "goodput": goodput.share(seconds),
    }
    results = conclude(config, workdir, experiment, graphdef, params, rest, saved, judged, facts, system, tell)
    if board:
        board.close()
    return results


def conclude(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    experiment: Experiment,
    graphdef: Any,
    params: Any,
    rest: Any,
    saved: dict,
    answers: dict[str, np.ndarray],
    facts: dict,
    system: dict,
    tell: Callable,
) -> dict:
    """Judges a run's best model by its answers to validation and test; writes and returns metrics.json, and all that
    lies beside it.

    params, rest: whole, on the host; saved: the meta of its checkpoint; answers: of `evaluate.make_predict`;
    tell: (step, split, values), which writes a line of metrics.
    """
    corpus, parts, split, task, labels = experiment[:5]
    step = config.train.epochs * experiment.steps_an_epoch
    config = config.copy_and_resolve_references()  # the caller's stays as it is
    config.evaluation.threshold = saved["best"]["threshold"]
    results: dict = {}
    rows: list[dict] = []
    if config.task.name == "segmenter":
        log_duration = np.array(saved["log_duration"], np.float32)
        segmenter = segment.Model(config, graphdef, params, rest, corpus.sample_rate_hz, log_duration)
    for part, log_p in answers.items():
        y = labels[parts[part]]
        if not task.classifies:
            results[part] = evaluate.validation_scores(task, log_p, y, 0.5)
            if part == "test":
                tell(step, "test", results[part])
            if config.task.name == "segmenter":
                judged, told, examples = segment.judge(segmenter, corpus, parts[part], part)
                rows += told
                if part == "test":
                    results["segmentation"] = judged | {"validation": results["validation"].pop("segmentation")}
                    report.save_examples(workdir, examples)
                else:
                    results[part]["segmentation"] = judged["test"]
            continue
        results[part] = evaluate.judge(corpus, parts[part], y, log_p, config)
        rows += evaluate.table(corpus, parts[part], y, log_p, config.evaluation.threshold, part)
        if part == "test":
            overall = {name: score["value"] for name, score in results[part]["overall"].items()}
            tell(step, "test", overall | {"loss": evaluate.cross_entropy(log_p, y)})
    control = workdir / "control" / "metrics.json"
    if control.exists():
        results["control"] = json.loads(control.read_text())["test"]
    results["best"], results["epochs"] = saved["best"], config.train.epochs
    results["split"] = {k: split[k] for k in ("kind", "target", "notes", "counts", "people_apart", "leaks")}
    results["data"] = facts | {"prepared": config.data.prepared, "shuffled_labels": config.data.shuffle_labels}
    results["system"] = system | {
        "command": shlex.join(["python", "-m", "pcgjax.train", *sys.argv[1:]]),
        "platform": platform.platform(),
        "versions": runs.versions(),
    }
    files.write_text(workdir / "metrics.json", json.dumps(results, indent=1))
    if rows:
        evaluate.write_table(rows, workdir / "predictions.csv")
    if config.task.name == "ssamba_pretrain":
        from pcgjax.models import ssamba

        encoder = nnx.merge(graphdef, params, rest).encoder
        ssamba.save_torch_checkpoint(encoder, workdir / "ssamba.pth")
    if task.classifies:
        _save_examples(workdir, corpus, [row for row in rows if row["split"] == "test"])
    try:
        report.write(workdir)
    except ImportError as error:
        logging.warning("no report.html: %s; install it, then python -m pcgjax.report %s", error, workdir)
    return results


def _save_examples(workdir: pathlib.Path, corpus, rows: list[dict]) -> None:
    """The waveforms that the report shows: of the surest right and wrong answers."""
    wanted = {row["id"] for kind in report.surest(rows, 4).values() for row in kind}
    waves = {r["id"]: corpus.read(i).astype(np.float32) / 32767 for i, r in enumerate(corpus.rows) if r["id"] in wanted}
    with files.replacing(workdir / "examples.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, sample_rate_hz=corpus.sample_rate_hz, **waves)


def carried_over(state: tasks.TrainState, workdir: str, groups: tuple[str, ...]) -> tasks.TrainState:
    """The state with the parameter groups `groups`, and their running averages, of the best model of `workdir`.

    Raises:
      ValueError: that model has no such group, or one of another shape.
    """
    _, _, _, params, rest, _ = evaluate.load_model(workdir)

    def take(ours, theirs):
        there = {path: x for path, x in jax.tree_util.tree_leaves_with_path(theirs) if path[0].key in groups}

        def one(path, x):
            if path[0].key not in groups:
                return x
            if path not in there or there[path].shape != x.shape:
                name = path[0].key
                raise ValueError(f"train.start_from={workdir}: its parameters {name!r} are not those of this model")
            return there[path]

        return jax.tree_util.tree_map_with_path(one, ours)

    return state._replace(params=take(state.params, params), rest=take(state.rest, rest))


def with_encoder(state: tasks.TrainState, graphdef: Any, path: str) -> tasks.TrainState:
    """The state with SSAMBA's parameters from a checkpoint of the public code's layout, its positions adapted; of an
    image net with ImageNet's weights and running averages.

    Raises:
      ValueError: as `ssamba.load_torch_checkpoint` or `image.load_imagenet`, or a checkpoint of another width or depth.
    """
    from pcgjax.models import image, ssamba

    model = nnx.merge(graphdef, state.params, state.rest)
    if isinstance(model, image.ImageClassifier):
        _, params, rest = tasks.split(image.load_imagenet(model, path))
        return state._replace(params=params, rest=rest)
    encoder = model.encoder
    loaded = tasks.split(ssamba.load_torch_checkpoint(path, encoder.frames, encoder.stride))[1]
    there = dict(jax.tree_util.tree_leaves_with_path(loaded))

    def take(place, x):
        # A segmenter has no use for a checkpoint's own head; the predictors of pre-training may be new.
        if place not in there:
            return x
        if there[place].shape != x.shape:
            raise ValueError(
                f"model.checkpoint={path}: {jax.tree_util.keystr(place)} has shape {there[place].shape}, this model "
                f"{x.shape}; set model.width and model.depth to the checkpoint's"
            )
        return there[place]

    return state._replace(
        params=state.params | {"encoder": jax.tree_util.tree_map_with_path(take, state.params["encoder"])}
    )


def one_of(config: ml_collections.ConfigDict, overrides: Any, split_file: str) -> ml_collections.ConfigDict:
    """One variant, stage or member of a training: the config with `overrides`, and with the split that all share."""
    one = config.copy_and_resolve_references()
    with one.unlocked():
        for part in ("sweep", "variants", "stages"):
            if part in one:
                one[part] = ml_collections.ConfigDict()
    with one.ignore_type():
        one.update(overrides)
    one.split.file = config.split.file or split_file
    return one


def stages(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool = False) -> dict:
    """Trains `config.stages`, one after the other, each from the best model of the one before; returns the last's.

    A stage is named overrides. All but the last have a folder of their own below `workdir`. What `optimizer.frozen`
    names in a stage is carried over to it from the stage before.
    """
    split_file, start_from = str(workdir / "split.json"), ""
    *earlier, (_, last) = config.stages.items()
    final = one_of(config, last, split_file)
    if dry_run:
        return train(final, workdir, dry_run)
    for name, overrides in earlier:
        one, folder = one_of(config, overrides, split_file), workdir / name
        one.train.start_from = start_from
        done = folder / "metrics.json"
        if done.exists() and json.loads(done.read_text())["epochs"] >= one.train.epochs:
            runs.refuse_changes(json.loads((folder / "config.json").read_text()), runs.plain_config(one), folder)
        else:
            logging.info("stage %s", name)
            train(one, folder)
        start_from = str(folder)
    final.train.start_from = start_from
    return train(final, workdir)


def variants(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool = False) -> list[dict]:
    """Runs each of `config.variants`' named overrides in a folder of its own and sets them side by side."""
    rows = []
    for name, overrides in config.variants.items():
        one = one_of(config, overrides, str(workdir / "split.json"))  # one split for all
        logging.info("variant: %s", name)
        # A finished run is only judged again, and refused if its config has changed.
        train(one, workdir / name, dry_run)
        if dry_run:
            continue
        rows.append(compare.row(workdir / name, name.replace("_", " ").capitalize()))
    if dry_run:
        return rows
    compare.write(rows, workdir / "report.html", "Four configurations", compare.CNN_PAPER)
    files.write_text(
        workdir / "table.json",
        json.dumps([{k: r[k] for k in ("name", "metrics", "trivial")} for r in rows], indent=1),
    )
    return rows


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}")
    logging.set_verbosity(logging.INFO)
    workdir = pathlib.Path(FLAGS.workdir)
    if FLAGS.devices:
        if not FLAGS.dry_run:
            raise ValueError("--devices: for --dry_run alone; a run takes the devices that are there")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    if FLAGS.config.task.name == "audio_encoder":  # PyTorch computes, JAX only draws the order
        jax.config.update("jax_platforms", "cpu")
    with distributed.together():
        if jax.process_index():
            logging.set_verbosity(logging.WARNING)  # what all would say, process 0 says
        else:
            runs.log_to(workdir)
        run_all(FLAGS.config, workdir, FLAGS.dry_run)


def run_all(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool) -> None:
    """What a config asks for: one run, stages of one, or several side by side."""
    from pcgjax import classical, population

    if config.task.name == "classical":
        if results := classical.run(config, workdir, dry_run):
            print(classical.summary(results))
        return
    if population.asked(config):
        population.run(config, workdir, dry_run)
        return
    if len(config.get("variants", ())):
        variants(config, workdir, dry_run)
        if not dry_run:
            print(f"wrote {workdir}/report.html and table.json")
        return
    run: Callable = stages if len(config.get("stages", ())) else train
    if config.task.name == "audio_encoder":
        from pcgjax.audio_llm import encoders

        run = encoders.train
    results = run(config, workdir, dry_run)
    if results and not dry_run:
        print(evaluate.summary(results))
        print(f"wrote {workdir}: metrics.json, predictions.csv, report.html, checkpoints/")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The experiment: a file below configs/; --config.a.b=v overrides.")
    flags.DEFINE_string("workdir", None, "The run's folder; a run that was stopped there is resumed.", required=True)
    flags.DEFINE_bool("dry_run", False, "Compile, print sizes and costs, and stop.")
    flags.DEFINE_integer("devices", None, "With --dry_run: compile for so many devices, simulated on the CPU.", 1)
    distributed.define_flags()
    flags.mark_flag_as_required("config")
    files.run(main)
