"""The training of all arms and seeds: a CNN-LSTM for every seed, then the recurrent layers on its frozen CNN.

All seeds are one program, and so are the trainings of one kind of recurrent layer. `step` is not that of
`pcgjax.training`: that one cuts batches of whole recordings out of int16 samples, at one of several capacities, and
sums over devices; here all clips are features on one device already, seeds and trainings are axes of the program, and
a seed whose split is smaller than others' must pass over batches without clips unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from pcgjax import thresholds
from pcgjax.ablation.data import DROPOUT, INIT, ORDER, Clips, Parts
from pcgjax.models.hinf_lstm import UPDATES, Recurrent
from pcgjax.pages.ablation import ARMS, LOSSES, Arm
from pcgjax.pages.words import ARM_WORDS
from pcgjax.runtime import sharding
from pcgjax.tasks.base import Task, split_model
from pcgjax.tasks.clips import clip_loss
from pcgjax.training import optimizer

# The trainings of one recurrent layer: is its loss penalised, and is the penalty's threshold SAPT's?
PENALISED, ADAPTIVE = (False, True, True), (False, False, True)


class State(NamedTuple):
    """What a training step changes."""

    params: Any
    rest: Any
    opt_state: Any


def over_seeds(function: Callable) -> Callable:
    """function(*one seed's arrays, *shared) -> a function of (arrays that lead with S), (shared): one program.

    On CPU the seeds go through it one after the other: ten at once no longer fit its caches, and take longer.
    """

    def all_seeds(seeds, shared):
        def one_seed(arrays):
            return function(*arrays, *shared)

        return jax.lax.map(one_seed, seeds) if jax.default_backend() == "cpu" else jax.vmap(one_seed)(seeds)

    return all_seeds


def fold(key: jax.Array, *numbers: jax.Array | int) -> jax.Array:
    """The key with each of the numbers folded in, in turn."""
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def epoch_batches(key: jax.Array, epoch: jax.Array, clips_K: jax.Array, total: int, batch: int) -> tuple:
    """An epoch's steps: their numbers (steps,) and, shuffled, the clips that are not -1 (steps, batch); -1 fills up.

    total: of the corpus' clips. Random numbers go by clip, and numbers by `total`, so that neither depends on how far
    a split was filled up.
    """
    at = jnp.where(clips_K >= 0, jax.random.uniform(fold(key, ORDER, epoch), (total,))[clips_K], jnp.inf)
    order = jnp.pad(clips_K[jnp.argsort(at)], (0, -len(clips_K) % batch), constant_values=-1).reshape(-1, batch)
    return epoch * total + jnp.arange(len(order)), order


def step(objective: Callable, update: optax.GradientTransformation, state: State) -> State:
    """One training step; objective(params) -> what to differentiate, a sum over clips, and (their number, rest).

    A batch without a clip, as splits of other sizes leave at the end, changes nothing.
    """
    (_, (clips, rest)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    grads = jax.tree.map(lambda g: g / jnp.maximum(clips, 1), grads)
    updates, opt_state = update.update(grads, state.opt_state, state.params)
    new = State(optax.apply_updates(state.params, updates), rest, opt_state)
    return jax.tree.map(lambda a, b: jnp.where(clips > 0, a, b), new, state)


def pretrain(config: ml_collections.ConfigDict, task: Task) -> Callable:
    """Stage 1 for one seed: (key, params and rest of its CNN-LSTM, its training clips (K,), Clips, labels (R,)) -> what
    its CNN then makes of all clips, (R * C, T', D), and the mask. Trains with BCE for `ablation.epochs[0]` epochs.
    """
    loss = ml_collections.ConfigDict({**config.loss, "name": "bce"})
    update = optimizer.make(config.optimizer)
    graphdef = nnx.graphdef(task.init(nnx.Rngs(0)))
    batch = config.ablation.batch_clips

    def run(key, start, clips_K, data, labels_R):
        total, places = len(data.mel), data.real.shape[1]

        def train_step(state, at):
            number, ids = at

            def objective(params):
                real = ids >= 0
                model = nnx.merge(graphdef, params, state.rest)
                logits = model(data.mel[ids], data.mask[ids] * real[:, None], fold(key, DROPOUT, number))
                summed, counts = clip_loss(loss, logits, labels_R[ids // places], real, 0.5, _same)
                return summed, (counts.samples, split_model(model)[2])

            return step(objective, update, state), None

        def epoch(state, number):
            return jax.lax.scan(train_step, state, epoch_batches(key, number, clips_K, total, batch))[0], None

        params, rest = start
        first = State(params, rest, update.init(params))
        state, _ = jax.lax.scan(epoch, first, jnp.arange(config.ablation.epochs[0]))
        cnn = nnx.merge(graphdef, state.params, state.rest).cnn
        ids = jnp.pad(jnp.arange(total), (0, -total % batch)).reshape(-1, batch)
        out = jax.lax.map(lambda ids: cnn(data.mel[ids], data.mask[ids], None, _same), ids)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:total], out)

    return run


def finetune(config: ml_collections.ConfigDict, init: Callable[[jax.Array], Recurrent]) -> Callable:
    """Stage 2 for one seed: (key, parameters of its recurrent layer, its training clips (K,) and validation recordings
    (V,), what `pretrain` returned, Clips' `real`, labels (R,)) -> probabilities of all recordings (A, R) and the
    thresholds at which SAPT ends (A,), of the A trainings.

    These differ in the loss alone: they start from the same recurrent layer and see the same clips in the same order.
    """
    m, batch = config.model, config.ablation.batch_clips
    plain, weighted = (ml_collections.ConfigDict({**config.loss, "name": name}) for name in LOSSES)
    update = optimizer.make(config.optimizer)
    graphdef = nnx.graphdef(init(jax.random.key(0)))

    def run(key, start, clips_K, validation_V, extracted, real_RxC, labels_R):
        features, mask = extracted
        total, places = real_RxC.size, real_RxC.shape[1]

        def logits_of(params, ids, key=None):
            recurrent = nnx.merge(graphdef, params, {})
            return recurrent(features[ids], mask[ids], key, m.dropout, m.implementation)

        def recording_probabilities(params, recordings):
            ids = recordings[:, None] * places + jnp.arange(places)[None]
            p = jax.nn.sigmoid(logits_of(params, ids.reshape(-1))).reshape(ids.shape)
            real = real_RxC[recordings]
            return jnp.where(real, p, 0).sum(1) / jnp.maximum(real.sum(1), 1)

        def train_step(state, at, penalised, threshold):
            number, ids = at

            def objective(params):
                logits, labels = logits_of(params, ids, fold(key, DROPOUT, number)), labels_R[ids // places]
                bce, counts = clip_loss(plain, logits, labels, ids >= 0, threshold, _same)
                pwl, _ = clip_loss(weighted, logits, labels, ids >= 0, threshold, _same)
                return jnp.where(penalised, pwl, bce), (counts.samples, {})

            return step(objective, update, state)

        # A label that is not a number is of neither class, so that what fills up counts for nothing.
        validation_labels = jnp.where(validation_V >= 0, labels_R[validation_V], jnp.nan)

        def epoch(carry, number):
            state, sapt = carry
            threshold = jnp.where(jnp.array(ADAPTIVE), sapt.threshold, config.evaluation.threshold)
            all_trainings = jax.vmap(train_step, (0, None, 0, 0))

            def steps(state, at):
                return all_trainings(state, at, jnp.array(PENALISED), threshold), None

            state, _ = jax.lax.scan(steps, state, epoch_batches(key, number, clips_K, total, batch))
            p = jax.vmap(recording_probabilities, (0, None))(state.params, validation_V)
            return (state, jax.vmap(thresholds.sapt_update, (0, 0, None))(sapt, p, validation_labels)), None

        first = State(start, {}, update.init(start)), thresholds.init(config.evaluation.threshold, **config.sapt)
        first = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(PENALISED), *jnp.shape(x))), first)
        (state, sapt), _ = jax.lax.scan(epoch, first, jnp.arange(config.ablation.epochs[1]))
        everyone = jnp.arange(len(real_RxC))
        return jax.vmap(recording_probabilities, (0, None))(state.params, everyone), sapt.threshold

    return run


def _same(x: jax.Array) -> jax.Array:
    return x


def train_arms(
    config: ml_collections.ConfigDict, task: Task, data: Clips, labels: np.ndarray, parts: Parts, bar: Any = None
) -> dict[Arm, tuple[np.ndarray, np.ndarray]]:
    """Each arm's probabilities (S, R) of all recordings, and decision thresholds (S,).

    bar: a tqdm bar that counts the 1 + len(UPDATES) programs.
    Raises:
      FloatingPointError: a training that came to values which are not finite.
    """
    labels_R = jnp.asarray(np.nan_to_num(labels))
    keys = [jax.random.key(config.seed + number) for number in range(config.ablation.seeds)]
    m = config.model

    def count(name):
        if bar is not None:
            bar.set_postfix_str(name)
            bar.update()

    def new_cnn_lstm(key):
        return task.init(nnx.Rngs(key))

    compiled = functools.partial(jax.jit, compiler_options=sharding.compiler_options())
    first_stage = compiled(over_seeds(pretrain(config, task)))
    extracted = first_stage((jnp.stack(keys), _starts(new_cnn_lstm, keys), parts.clips), (data, labels_R))
    inputs = jax.block_until_ready(extracted)[0].shape[-1]
    count("CNN-LSTM")
    arms: dict[Arm, tuple[np.ndarray, np.ndarray]] = {}
    for name in UPDATES:

        def new_layer(key, name=name):
            return Recurrent(inputs, m.hidden, name, rngs=nnx.Rngs(key))

        second_stage = compiled(over_seeds(finetune(config, new_layer)))
        layers, _ = _starts(new_layer, keys)
        seeds = (jnp.stack(keys), layers, parts.clips, parts.validation, extracted)
        p, threshold = (np.asarray(x) for x in second_stage(seeds, (data.real, labels_R)))
        if not np.isfinite(p).all():
            raise FloatingPointError(
                f"model.cell={name}: probabilities that are not finite; lower optimizer.learning_rate="
                f"{config.optimizer.learning_rate}"
            )
        fixed = np.full(len(p), config.evaluation.threshold, np.float32)
        for training, loss in enumerate(("bce", "pwl", "pwl")):
            if not ADAPTIVE[training]:
                arms[name, loss, "fixed"] = p[:, training].clip(0, 1), fixed
            if ADAPTIVE[training] or not PENALISED[training]:
                arms[name, loss, "sapt"] = p[:, training].clip(0, 1), threshold[:, training]
        count(ARM_WORDS[name])
    return {arm: arms[arm] for arm in ARMS}


def _starts(new: Callable[[jax.Array], nnx.Module], keys: list[jax.Array]) -> tuple[Any, Any]:
    """Parameters and rest of a new model for every seed, with a leading axis S."""
    # One by one: LAPACK's batched QR, of orthogonal kernels, can wait forever for the threads that it runs on.
    models = [split_model(new(fold(key, INIT)))[1:] for key in keys]
    return jax.tree.map(lambda *x: jnp.stack(x), *models)
