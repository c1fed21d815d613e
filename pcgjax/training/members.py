"""The members of a population as one program."""

from __future__ import annotations

import ast
import collections
import functools
import json
import math
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from absl import logging
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from pcgjax import tasks, thresholds
from pcgjax.data.batches import block_shapes, stream
from pcgjax.data.plan import evaluation_plan
from pcgjax.runs.config import Fields, plain_config, with_fields
from pcgjax.runs.judge import validation_scores
from pcgjax.runs.log import history, log_line, open_board, plot
from pcgjax.runs.streams import EVALUATION, STEP
from pcgjax.runtime import checkpoint, costs, distributed, files, goodput, sharding
from pcgjax.runtime.hlo import step_cost
from pcgjax.tasks.base import Task, TrainState, initial_state, merge_model
from pcgjax.training import optimizer, segmenter
from pcgjax.training.answers import answers_of, width_of
from pcgjax.training.experiment import set_up
from pcgjax.training.start import carried_over, with_encoder
from pcgjax.training.step import Totals, make_run, make_step, zero_totals

# Numbers that change no shape, so that one program takes them as data. A field that is not here is still swept, as
# programs of its own. Where such a number is off (0, or no noise), nothing of it is in the program, as in a lone run.
TRACED = (
    "features.noise_snr_db", "features.response_db", "features.stretch", "features.top_db", "loss.alpha", "loss.slope",
    "model.dropout", "optimizer.clip_norm", "optimizer.learning_rate", "optimizer.momentum", "optimizer.weight_decay",
)  # fmt: skip
FREE = ("seed", "train.start_from")  # and these are no part of a program
AXIS = "member"


def swept_values(config: ml_collections.ConfigDict) -> dict[str, list]:
    """The fields that `config.sweep` gives values, in order of the alphabet, and these; {} where nothing is swept.

    Raises:
      ValueError: values that the field cannot have, or one twice.
    """
    found = {}
    for field, text in flat_fields(config.get("sweep", {})).items():
        if not text:
            continue
        now = functools.reduce(lambda part, name: part[name], field.split("."), config)
        try:
            found[field] = _values(text, now)
        except (ValueError, SyntaxError, KeyError, TypeError):
            raise ValueError(f"sweep.{field}={text}: give values such as {now}, with commas between") from None
        if len(set(found[field])) < len(found[field]):
            raise ValueError(f"sweep.{field}={text}: the same value twice")
    return found


def flat_fields(value: Any, above: str = "") -> Fields:
    found: Fields = {}
    for key, inner in value.items():
        nested = isinstance(inner, Mapping | ml_collections.ConfigDict)
        found |= flat_fields(inner, f"{above}{key}.") if nested else {f"{above}{key}": inner}
    return found


def _values(text: str, like: Any) -> list:
    if isinstance(like, tuple | list):
        values = ast.literal_eval(f"[{text}]")
        if not all(isinstance(value, tuple) for value in values):
            raise ValueError("need tuples")
        return values
    words = [word.strip() for word in text.split(",")]
    if isinstance(like, bool):
        return [{"true": True, "false": False}[word.lower()] for word in words]
    return [type(like)(word) for word in words]


def programs(members: Sequence[Fields]) -> list[list[int]]:
    """The members, by number, that each program trains."""
    together = collections.defaultdict(list)
    for number, member in enumerate(members):
        own = lambda field, value: field not in FREE and not (field in TRACED and value not in (0.0, math.inf))
        together[repr([(f, v if own(f, v) else None) for f, v in member.items()])].append(number)
    return list(together.values())


def over_members(function: Callable, mesh: jax.sharding.Mesh, together: bool) -> Callable:
    """function(a member's own, what all share) -> a function of (own, leading with members; shared).

    A device takes its share of the members together, as one batch; or, not `together`, one after the other: on CPU
    they do not fit its caches all at once, and then each has batches of its own capacity.
    """

    def here(own, shared):
        one = lambda own: function(own, shared)
        return jax.vmap(one)(own) if together else jax.lax.map(one, own)

    if mesh.size == 1:
        return here
    own, everywhere = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(here, mesh=mesh, in_specs=(own, everywhere), out_specs=own, check_vma=False)


class Spread(NamedTuple):
    """Members dealt out to all devices, so many to each; the last one again where they do not come out even."""

    mesh: jax.sharding.Mesh
    members: int

    @property
    def layout(self) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(self.mesh, PartitionSpec(AXIS))

    @property
    def share(self) -> int:
        """How many a device has."""
        return -(-self.members // self.mesh.size)

    @property
    def rows(self) -> np.ndarray:
        """Which member this process' devices have in each of their places."""
        own = [np.arange(d * self.share, (d + 1) * self.share) for d in sharding.mine(self.mesh)]
        return np.concatenate(own).clip(max=self.members - 1)

    def put(self, values: Any) -> Any:
        """Host arrays that lead with the members, each member's on its device."""
        return sharding.put(self.mesh, jax.tree.map(lambda x: np.asarray(x)[self.rows], values), PartitionSpec(AXIS))

    def get(self, values: Any) -> Any:
        """The members' values on the host, on all processes."""
        whole = jax.jit(_same, out_shardings=sharding.replicated(self.mesh))(values)
        return jax.tree.map(lambda x: np.asarray(x)[: self.members], whole)

    def one(self, values: Any, member: int) -> Any:
        """One member's values, on every device."""
        return jax.jit(_take, out_shardings=sharding.replicated(self.mesh))(values, member)


def _same(values: Any) -> Any:
    return values


def _take(values: Any, member: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[member], values)


class Held(NamedTuple):
    """What a checkpoint holds of the members; every array leads with them."""

    state: TrainState
    totals: Totals
    kept: tuple[Any, Any]  # parameters and the rest of the best epoch so far


class Program:
    """Members that one compiled program trains: their data, their functions, and what is theirs alone."""

    def __init__(
        self, base: ml_collections.ConfigDict, members: Sequence[Fields], workdir: pathlib.Path, together: bool
    ):
        """base: the config without what is swept; members: the fields in which each differs from it."""
        self.members, self.together = members, together
        self.configs = [with_fields(base, member) for member in members]
        self.seeds = [config.seed for config in self.configs]
        # The split and what else is drawn of the data go by the base's seed.
        structure = {field: value for field, value in members[0].items() if field != "seed"}
        self.config = with_fields(base, structure)
        # Each member is a run on one device.
        devices = np.array(jax.devices())
        alone = jax.sharding.Mesh(np.array([[jax.local_devices()[0]]]), sharding.AXES)
        self.own_seeds = len(set(self.seeds)) > 1
        experiment = set_up(self.config, workdir, sorted(set(self.seeds)), alone)
        if self.own_seeds and experiment.pipeline == "stream":
            raise ValueError(
                f"data.pipeline={self.config.data.pipeline}: members with seeds of their own have orders of their own, "
                "which cannot be streamed at once; choose resident, or sweep no seed"
            )
        self.spread = Spread(jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,)), len(members))
        self.alone, self.experiment = experiment, experiment._replace(mesh=self.spread.mesh)
        self.last_step = self.config.train.epochs * experiment.steps_an_epoch
        # Each number is checked here, while it can be looked at; a model looks at its dropout.
        built = [self.built(config) for config in self.configs]
        self.task, self.update = built[0]
        models = {config.model.get("dropout"): one for config, (one, _) in zip(self.configs, built, strict=True)}
        models = {dropout: nnx.eval_shape(lambda one=one: one.init(nnx.Rngs(0))) for dropout, one in models.items()}
        self.graphdef = nnx.graphdef(models[self.configs[0].model.get("dropout")])
        self.sapt = thresholds.init(self.config.evaluation.threshold, **self.config.get("sapt", {"interval": 0}))
        varied = [f for f in members[0] if f in TRACED and len({member[f] for member in members}) > 1]
        self.varied = {f: np.array([member[f] for member in members], np.float32) for f in varied}
        seeds = {"seed": np.array(self.seeds, np.uint32)} if self.own_seeds else {}
        self.own = self.spread.put({"fields": self.varied, **seeds})
        self.shared = {} if self.own_seeds else {"seed": np.uint32(self.seeds[0])}
        self.order = functools.lru_cache(1)(self._order)
        self.steps = self._compiled(self._steps)
        self.judged = {part: self._judge(part) for part in ("validation", "test")}

    def built(self, config: ml_collections.ConfigDict) -> tuple[Task, Any]:
        task = tasks.make(config, self.experiment.corpus.sample_rate_hz)
        return task, optimizer.make(config.optimizer, self.last_step)

    def _compiled(self, function: Callable) -> Any:
        """function(all that a member is given) -> a compiled one of (carried and donated, own, shared)."""
        each = over_members(lambda own, shared: function({**shared, **own}), self.spread.mesh, self.together)
        return jax.jit(
            lambda carried, own, shared: each({**carried, **own}, shared), donate_argnums=0,
            out_shardings=self.spread.layout, compiler_options=sharding.compiler_options(),
        )  # fmt: skip

    def _of(self, given: dict) -> tuple[Task, Any, jax.Array]:
        """(task, update, key) of a member, where the numbers in which members differ are traced."""
        return *self.built(with_fields(self.configs[0], given["fields"])), jax.random.key(given["seed"])

    def _steps(self, given: dict) -> tuple[TrainState, Totals]:
        task, update, key = self._of(given)
        step = make_step(
            task, update, self.graphdef, jax.random.fold_in(key, STEP), self.experiment.groups,
            self.experiment.capacities, remat=self.config.train.remat,
        )  # fmt: skip
        # The step is the same for all, and so is then what depends on it and on no seed.
        state = given["state"]._replace(step=given["step"])
        batches = given["data"], given["ids"], given["capacity"], given["start"], given["stop"]
        return make_run(*step)(state, given["totals"], *batches)

    def _order(self, epoch: int) -> tuple[dict, dict]:
        """(own, shared) of an epoch: ids and capacity of each step of members with seeds of their own."""
        plans = {seed: self.experiment.plan(seed, epoch) for seed in set(self.seeds)}
        ids = np.stack([plans[seed].ids for seed in self.seeds])
        capacity = np.stack([plans[seed].capacity for seed in self.seeds])
        if self.together:
            # One that differs from member to member would have every capacity computed for all of them.
            return self.spread.put({"ids": ids}), {"capacity": capacity.max(0)}
        return self.spread.put({"ids": ids, "capacity": capacity}), {}

    def pieces(self, resident: dict | None, at: int, until: int) -> Iterator[tuple[dict, dict]]:
        """(own, shared) for `steps` from step `at` to `until` of one epoch."""
        epoch, within = divmod(at, self.experiment.steps_an_epoch)
        stop = within + until - at
        if self.own_seeds:
            own, shared = self.order(epoch)
            yield self.own | own, {**shared, "data": resident, "start": within, "stop": stop, "step": np.int32(at)}
            return
        plan = self.alone.plan(self.seeds[0], epoch)
        for data, ids, capacity, start, end in self.alone.pieces(resident, plan, within, stop):
            batches = {"data": data, "ids": ids, "capacity": capacity, "start": start, "stop": end}
            yield self.own, self.shared | batches | {"step": np.int32(at)}
            at += end - start

    def start(self) -> Held:
        """What the members are before the first step."""
        make = jax.jit(lambda seed: initial_state(self.task, self.update, seed, self.sapt))
        states = []
        # One by one: LAPACK's batched QR, of orthogonal kernels, can wait forever for the threads that it runs on.
        for config in self.configs:
            state = make(np.uint32(config.seed))
            if config.train.get("start_from"):
                state = carried_over(state, config.train.start_from, tuple(config.optimizer.frozen))
            if config.model.get("checkpoint"):
                state = with_encoder(state, self.graphdef, config.model.checkpoint)
            states.append(jax.device_get(state))
        state = jax.tree.map(lambda *x: np.stack(x), *states)
        # What is kept is apart from the state, which is donated.
        return Held(self.spread.put(state), self.no_totals(), self.spread.put((state.params, state.rest)))

    def no_totals(self) -> Totals:
        return self.spread.put(jax.tree.map(lambda x: np.stack([x] * len(self.members)), zero_totals()))

    def _judge(self, part: str) -> Callable[[Any, Any, dict | None], np.ndarray]:
        """A function (params, rest, resident) -> all members' answers (M, n, 2 or 3), as of `evaluate.make_predict`."""
        e = self.experiment
        indices, batch = e.parts[part], self.config.evaluation.batch_recordings
        plan = evaluation_plan(indices, e.corpus.lengths, e.task.geometry, batch, 1, e.task.shapes)
        width = width_of(e.task)

        def answer(given):
            task, _, key = self._of(given)

            def step(i, out):
                drawn = jax.random.fold_in(jax.random.fold_in(key, EVALUATION), given["done"] + i)
                own = jax.random.split(drawn, 1)[0]
                model = merge_model(task, self.graphdef, *given["model"])
                ids, choice = given["ids"][i, 0], given["capacity"][i]
                found = answers_of(task, model, plan.capacities, given["data"], ids, choice, own)
                return out.at[i].set(found[None])

            return jax.lax.fori_loop(0, given["steps"], step, jnp.zeros((*given["ids"].shape, width)))

        run = self._compiled(answer)

        def judge(params, rest, resident):
            if resident is not None:
                pieces = iter([(resident, plan.ids, plan.capacity, len(plan.ids))])
            else:
                pieces = stream(e.corpus, e.labels, plan, 0, len(plan.ids))
            out, done = np.zeros((len(self.members), len(e.corpus.rows), width), np.float32), 0
            for data, ids, capacity, steps in pieces:
                shared = {"data": data, "ids": ids, "capacity": capacity, "steps": steps, "done": done}
                answers = self.spread.get(run({}, self.own | {"model": (params, rest)}, self.shared | shared))
                asked = plan.ids[done : done + steps]
                out[:, asked[asked >= 0]] = answers[:, :steps][:, asked >= 0]
                done += steps
            return out[:, indices]

        return judge


def _pick(better: jax.Array, new: Any, kept: Any) -> Any:
    pick = lambda a, b: jnp.where(better.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
    return jax.tree.map(pick, new, kept)


class Trained(NamedTuple):
    """What a program's members came to."""

    program: Program
    kept: tuple[Any, Any]
    best: list[dict | None]  # as in the meta of a run's checkpoint
    diverged: list[int | None]  # the first step whose loss was not finite
    answers: dict[str, np.ndarray]  # part -> (M, n, 2 or 3) of the best epochs


def train_program(
    program: Program, numbers: Sequence[int], folder: pathlib.Path, workdir: pathlib.Path, clock: goodput.Clock
) -> Trained:
    """Trains the members `numbers` of a population, from the checkpoint in `folder` on where it holds one."""
    config, experiment, task = program.config, program.experiment, program.task
    t, spe, spread = config.train, experiment.steps_an_epoch, program.spread
    first_process, log = jax.process_index() == 0, workdir / "metrics.jsonl"
    count, y = len(numbers), experiment.labels[experiment.parts["validation"]]
    resident = experiment.resident()
    pick = jax.jit(_pick, donate_argnums=2, out_shardings=spread.layout)
    sapt_update = jax.jit(jax.vmap(thresholds.sapt_update, (0, 0, None)), out_shardings=spread.layout)
    meta: dict[str, Any] = {"order_sha256": experiment.digest, "best": [None] * count, "diverged": [None] * count}
    held, at = program.start(), 0
    found = checkpoint.restore(folder)
    if found:
        if found[2]["order_sha256"] != experiment.digest:
            raise checkpoint.CheckpointError(
                f"{workdir}: its checkpoint was trained in another order of data (data or split changed); give "
                "another --workdir, or what it was trained with"
            )
        at, values, saved = checkpoint.require(folder, held._asdict())
        held = Held(**values)
        meta |= {"best": saved["best"], "diverged": saved["diverged"]}
        logging.info("members %s: resuming at step %d", numbers, at)
    if first_process:
        others = [x for x in history(log) if x.get("member") not in numbers or x["step"] <= at]
        files.write_text(log, "".join(json.dumps(line) + "\n" for line in others))
    # Each member is a run to TensorBoard.
    boards = [open_board(workdir, at, f"member{number}") if first_process else None for number in numbers]

    def tell(place: int, split: str, values: dict) -> None:
        if first_process:
            log_line(log, at, split, {"member": numbers[place], **values})
            plot(boards[place], at, split, values)

    last = checkpoint.manager(folder)
    stopped: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    # So that a signal is heard as soon as by a lone run.
    stretch = max(t.checkpoint_steps // (1 if program.together else spread.share), 1)
    stop = 0
    bar = tqdm.tqdm(
        total=program.last_step, initial=at, desc=f"train {count}", unit="step", mininterval=1.0,
        disable=not first_process,
    )  # fmt: skip
    try:
        while at < program.last_step and not stop:
            epoch = at // spe
            to_save = t.checkpoint_steps - at % t.checkpoint_steps
            until = min((epoch + 1) * spe, at + to_save, at + stretch)
            pieces = program.pieces(resident, at, until)
            ahead: list[jax.Array] = []
            while True:
                with clock("wait"):
                    piece = next(pieces, None)
                if piece is None:
                    break
                with clock("train"):
                    state, totals = program.steps({"state": held.state, "totals": held.totals}, *piece)
                    ahead.append(totals.loss + 0)  # as in `train.train`
                    if len(ahead) > 1:
                        ahead.pop(0).block_until_ready()
                    held = held._replace(state=state, totals=totals)
            with clock("train"):
                counted = spread.get(held.totals)  # waits for the devices
            bar.update(until - at)
            at = until
            stop = distributed.stop_signal(stopped[0] if stopped else 0)
            for i in range(count):
                if counted.bad_step[i] >= 0 and meta["diverged"][i] is None:
                    meta["diverged"][i] = int(counted.bad_step[i])
                    logging.warning("member %d diverged at step %d", numbers[i], counted.bad_step[i])
            if at % spe == 0:
                with clock("validate"):
                    answers = program.judged["validation"](held.state.params, held.state.rest, resident)
                    before = spread.get(held.state.sapt.threshold)
                    held = held._replace(totals=program.no_totals())
                    if task.classifies:
                        p = spread.put(np.exp(answers[..., 0]).clip(0, 1))
                        held = held._replace(state=held.state._replace(sapt=sapt_update(held.state.sapt, p, y)))
                better = np.zeros(count, bool)
                for i, answer in enumerate(answers):
                    n, told = max(int(counted.samples[i]), 1), clock.told()
                    values = {"loss": float(counted.loss[i]) / n, "accuracy": float(counted.correct[i]) / n}
                    tell(i, "train", values | {"epoch": epoch + 1, "seconds": told["train"], "waited": told["wait"]})
                    if not np.isfinite(answer).all():  # the last step's update was too much
                        meta["diverged"][i] = at if meta["diverged"][i] is None else meta["diverged"][i]
                        continue
                    own = validation_scores(task, answer, y, float(before[i]))
                    score = -own[t.select] if t.select in ("loss", "brier") else own[t.select]
                    score = score if np.isfinite(score) else -np.inf
                    best = meta["best"][i]
                    better[i] = meta["diverged"][i] is None and (best is None or score > best["score"])
                    if better[i]:
                        meta["best"][i] = {
                            "score": score, "step": at, "epoch": epoch + 1, "metric": t.select,
                            "threshold": float(before[i]),
                        }  # fmt: skip
                    tell(i, "validation", own | {"epoch": epoch + 1})
                held = held._replace(kept=pick(spread.put(better), (held.state.params, held.state.rest), held.kept))
                bar.set_postfix(loss=f"{np.mean(counted.loss / np.maximum(counted.samples, 1)):.3f}")
            if at % t.checkpoint_steps == 0 or at % spe == 0 or stop:
                with clock("save"):
                    # A copy, for it is written while training goes on.
                    checkpoint.save(last, at, held._asdict(), json.loads(json.dumps(meta)))
    finally:
        bar.close()
        with clock("save"):
            last.wait_until_finished()
        for board in filter(None, boards):
            board.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    last.close()
    if stop:
        logging.info("%s", goodput.sentence(clock.told()))
        logging.warning("stopped by signal %d at step %d, saved; the same command goes on", stop, at)
        sys.exit(128 + stop)
    with clock("validate"):
        judged = {part: judge(*held.kept, resident) for part, judge in program.judged.items()}
    return Trained(program, held.kept, meta["best"], meta["diverged"], judged)


def look_ahead(program: Program) -> str:
    """What a device would hold of a program, which is compiled for it; nothing is put there or run."""
    e = program.experiment
    one = jax.eval_shape(lambda: initial_state(program.task, program.update, 0, program.sapt))
    places = program.spread.mesh.size * program.spread.share
    placed = lambda x: jax.ShapeDtypeStruct((places, *x.shape), x.dtype, sharding=program.spread.layout)
    carried = jax.tree.map(placed, {"state": one, "totals": jax.eval_shape(zero_totals)})
    resident = None
    if e.pipeline == "resident":
        everywhere = sharding.replicated(program.spread.mesh)
        shapes = block_shapes(e.corpus, e.labels, np.arange(len(e.corpus.rows)))
        resident = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    began = time.monotonic()
    compiled = program.steps.lower(carried, *next(program.pieces(resident, 0, 1))).compile()
    seconds = time.monotonic() - began
    states = {"all members": costs.state_bytes(carried["state"])}
    # Members send each other nothing; a device reads and writes the state of its own.
    least = 2 * states["all members"][1]
    facts = costs.summary(
        step_cost(compiled.as_text()), costs.memory(compiled), states, 0, least, (program.spread.mesh.size, 1),
        "bfloat16" if program.task.dtype == jnp.bfloat16 else "float32",
    )  # fmt: skip
    return (
        f"{len(program.members)} members, {program.spread.share} on each of {program.spread.mesh.size} devices; a step "
        f"is one of each; compiled in {seconds:.0f} s\n{costs.table(facts)}"
    )


def save_best(done: Trained, place: int, folder: pathlib.Path) -> tuple[dict, Any, Any]:
    """Writes a member's best model as a run's, to `folder`/checkpoints/best; returns (meta, params, rest)."""
    program, best = done.program, done.best[place]
    experiment = program.experiment
    assert best is not None
    meta = {
        "config": plain_config(program.configs[place]), "order_sha256": experiment.digest,
        "sample_rate_hz": experiment.corpus.sample_rate_hz, "best": best,
    }  # fmt: skip
    if program.config.task.name == "segmenter":
        step_s = program.config.features.step_s
        meta["log_duration"] = segmenter.log_durations(experiment.corpus, experiment.parts["train"], step_s).tolist()
    params, rest = program.spread.one(done.kept, place)
    if jax.process_index() == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # another member may have been the best
    distributed.stop_signal(0)  # all wait for the first
    kept = checkpoint.manager(folder / "checkpoints" / "best")
    checkpoint.save(kept, best["step"], {"params": params, "rest": rest}, meta)
    kept.wait_until_finished()
    kept.close()
    return meta, *jax.device_get((params, rest))
