"""The members of a population as one compiled program, each device its share of them."""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from pcgjax import tasks, thresholds
from pcgjax.data.batches import block_shapes, stream
from pcgjax.data.plan import evaluation_plan
from pcgjax.runs.config import Fields, with_fields
from pcgjax.runs.streams import EVALUATION, STEP
from pcgjax.runtime import costs, sharding
from pcgjax.runtime.hlo import step_cost
from pcgjax.tasks.base import Task, TrainState, initial_state, merge_model
from pcgjax.training import optimizer
from pcgjax.training.answers import answers_of, width_of
from pcgjax.training.experiment import set_up
from pcgjax.training.start import carried_over, with_encoder
from pcgjax.training.step import Totals, make_run, make_step, zero_totals
from pcgjax.training.sweep import TRACED

AXIS = "member"


def over_members(function: Callable, mesh: jax.sharding.Mesh, together: bool) -> Callable:
    """function(a member's own, what all share) -> a function of (own, leading with members; shared).

    A device takes its share of the members together, as one batch; or, not `together`, one after the other: on CPU
    they do not fit its caches all at once, and then each has batches of its own capacity.
    """

    def here(own, shared):
        def one(own):
            return function(own, shared)

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
        places = [np.arange(d * self.share, (d + 1) * self.share) for d in sharding.local_devices(self.mesh)]
        return np.concatenate(places).clip(max=self.members - 1)

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
        self.sapt = thresholds.init(self.config.evaluation.threshold, **self.config.sapt)
        varied = [f for f in members[0] if f in TRACED and len({member[f] for member in members}) > 1]
        self.varied = {f: np.array([member[f] for member in members], np.float32) for f in varied}
        seeds = {"seed": np.array(self.seeds, np.uint32)} if self.own_seeds else {}
        self.own = self.spread.put({"fields": self.varied, **seeds})
        self.shared = {} if self.own_seeds else {"seed": np.uint32(self.seeds[0])}
        self.order = functools.lru_cache(1)(self._order)
        self.steps = self._compiled(self._steps)
        self.judged = {part: self._judge(part) for part in ("validation", "test")}
        update_thresholds = jax.vmap(thresholds.sapt_update, (0, 0, None))
        self.update_thresholds = jax.jit(update_thresholds, out_shardings=self.spread.layout)
        self.pick = jax.jit(_pick, donate_argnums=2, out_shardings=self.spread.layout)

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

    def pieces(self, resident: dict | None, step: int, until: int) -> Iterator[tuple[dict, dict]]:
        """(own, shared) for `steps` from step `step` to `until` of one epoch."""
        epoch, within = divmod(step, self.experiment.steps_an_epoch)
        stop = within + until - step
        if self.own_seeds:
            own, shared = self.order(epoch)
            yield self.own | own, {**shared, "data": resident, "start": within, "stop": stop, "step": np.int32(step)}
            return
        plan = self.alone.plan(self.seeds[0], epoch)
        for data, ids, capacity, start, end in self.alone.pieces(resident, plan, within, stop):
            batches = {"data": data, "ids": ids, "capacity": capacity, "start": start, "stop": end}
            yield self.own, self.shared | batches | {"step": np.int32(step)}
            step += end - start

    def advance(self, state: TrainState, totals: Totals, own: dict, shared: dict) -> tuple[TrainState, Totals]:
        """The steps of one of `pieces`."""
        return self.steps({"state": state, "totals": totals}, own, shared)

    def first_states(self) -> TrainState:
        """The members before the first step, on the host; every array leads with them."""
        make = jax.jit(lambda seed: initial_state(self.task, self.update, seed, self.sapt))
        states = []
        # One by one: LAPACK's batched QR, of orthogonal kernels, can wait forever for the threads that it runs on.
        for config in self.configs:
            state = make(np.uint32(config.seed))
            if config.train.start_from:
                state = carried_over(state, config.train.start_from, tuple(config.optimizer.frozen))
            if config.model.get("checkpoint"):
                state = with_encoder(state, self.graphdef, config.model.checkpoint)
            states.append(jax.device_get(state))
        return jax.tree.map(lambda *x: np.stack(x), *states)

    def no_totals(self) -> Totals:
        return self.spread.put(jax.tree.map(lambda x: np.stack([x] * len(self.members)), zero_totals()))

    def _judge(self, part: str) -> Callable[[Any, Any, dict | None], np.ndarray]:
        """A function (params, rest, resident) -> all members' answers (M, n, 2 or 3), as of `answers.make_predict`."""
        e = self.experiment
        indices, batch = e.parts[part], self.config.evaluation.batch_recordings
        plan = evaluation_plan(indices, e.corpus.lengths, e.task.geometry, batch, 1, e.task.shapes)
        width = width_of(e.task)

        def answer(given):
            task, _, key = self._of(given)

            def step(i, out):
                step_key = jax.random.fold_in(jax.random.fold_in(key, EVALUATION), given["done"] + i)
                batch_key = jax.random.split(step_key, 1)[0]
                model = merge_model(task, self.graphdef, *given["model"])
                ids, choice = given["ids"][i, 0], given["capacity"][i]
                answers = answers_of(task, model, plan.capacities, given["data"], ids, choice, batch_key)
                return out.at[i].set(answers[None])

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
                ids = plan.ids[done : done + steps]
                out[:, ids[ids >= 0]] = answers[:, :steps][:, ids >= 0]
                done += steps
            return out[:, indices]

        return judge


def _pick(better_M: jax.Array, new: Any, best: Any) -> Any:
    """Arrays that lead with the members: a member's new ones where it is better."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(better_M.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, best)


def look_ahead(program: Program) -> str:
    """What a device would hold of a program, which is compiled for it; nothing is put there or run."""
    e = program.experiment
    one = jax.eval_shape(lambda: initial_state(program.task, program.update, 0, program.sapt))
    places = program.spread.mesh.size * program.spread.share

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((places, *x.shape), x.dtype, sharding=program.spread.layout)

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
