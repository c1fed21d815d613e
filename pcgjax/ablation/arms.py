"""The arms of the ablation: clips, parts and the training of all arms and seeds as one program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tqdm
from flax import nnx

from pcgjax import tasks, thresholds
from pcgjax.data import splits
from pcgjax.data.batches import block, gather_batch
from pcgjax.data.corpus import Corpus, in_memory
from pcgjax.data.plan import evaluation_plan
from pcgjax.models.hinf_lstm import UPDATES, Recurrent
from pcgjax.pages.ablation import ARMS, LOSSES, Arm
from pcgjax.pages.words import ARM_WORDS
from pcgjax.runtime import sharding
from pcgjax.tasks.base import Task, split_model
from pcgjax.tasks.clips import clip_loss
from pcgjax.training import optimizer

# The trainings of one recurrent layer: is its loss penalised, and is the penalty's threshold SAPT's?
PENALISED, ADAPTIVE = (False, True, True), (False, False, True)
# Streams of randomness, each folded into a seed's key first.
INIT, ORDER, DROPOUT, NOISE = range(4)


class Setting(NamedTuple):
    name: str  # of its file
    title: str
    group: str  # of SETTINGS
    snr_db: float
    database: str | None  # the one left out


class Clips(NamedTuple):
    """Log-mel clips of R recordings, C places each: clip n is number n % C of recording n // C."""

    mel: jax.Array  # (R * C, F, T)
    mask: jax.Array  # (R * C, T) frames of the recording
    real: jax.Array  # (R, C) whether the recording has that clip


class Parts(NamedTuple):
    """Splits of S seeds, filled up with -1 to one size."""

    clips: np.ndarray  # (S, K) int32 to train on
    validation: np.ndarray  # (S, V) int32 recordings
    test: list[np.ndarray]  # S of (n,) recordings


class State(NamedTuple):
    params: Any
    rest: Any
    opt_state: Any


def simulate_corpus(people: int, seed: int, sample_rate_hz: int = 2000, recordings_per_person: int = 2) -> Corpus:
    """Simulated recordings of 10 to 12 s, half of the people with a murmur, under sites where it is heard."""
    from pcgjax.datasets.simulate import audible_sites, draw_noise, draw_person, simulate_person

    rows, samples = [], []
    for number in tqdm.trange(people, desc="simulate", unit="person", leave=False):
        rng = np.random.default_rng([seed, number])
        person = draw_person(rng, number)
        # Normal people are recorded where a murmur of theirs would be heard: the site tells nothing of the class.
        likely = person if person.murmurs else draw_person(np.random.default_rng([seed, number]), 0, 1.0)
        sites = audible_sites(likely)
        for take in range(recordings_per_person):
            noise = draw_noise(rng, 25.0)
            site, duration_s = str(rng.choice(sites)), rng.uniform(10, 12)
            wave, _ = simulate_person(person, site, rng, duration_s, sample_rate_hz, noise)
            samples.append(np.round(wave * 32767).astype(np.int16))
            label = str(int(bool(person.murmurs)))
            rows.append({
                "id": f"p{number:04d}_{take}", "person": f"p{number:04d}", "person_known": True,
                "database": "synthetic", "sha256": f"{number}_{take}", "fingerprint": "",
                "labels": {"abnormal": label, "murmur": label},
            })  # fmt: skip
    return in_memory(rows, samples, sample_rate_hz)


def clip_features_of(config: ml_collections.ConfigDict, corpus: Corpus) -> Clips:
    """What the task's model is shown of each labelled recording: its first `ablation.clips_per_recording` clips.

    Deterministic: noise, where `features.noise_snr_db` asks for it, is one draw from `config.seed`.
    """
    task = tasks.make(config, corpus.sample_rate_hz)
    most = config.ablation.clips_per_recording
    labels = corpus.labels(config.task.target)
    labelled = np.flatnonzero(np.isfinite(labels))
    plan = evaluation_plan(labelled, corpus.lengths, task.geometry, config.evaluation.batch_recordings)
    data = jax.device_put(block(corpus, labels, np.arange(len(corpus.rows))))
    noise_key = jax.random.fold_in(jax.random.key(config.seed), NOISE)

    @jax.jit
    def shown(data, ids, capacity, step):
        def branch(size):
            seen: dict[str, jax.Array] = {}

            def look(mel, mask, *_):  # stands in the model's place
                seen.update(mel=mel, mask=mask)
                return jnp.zeros(len(mel))

            batch = gather_batch(data, ids[0], size, task.geometry)
            task.forward(look, batch, size, jax.random.fold_in(noise_key, step))
            fill = max(plan.capacities) - size
            return [jnp.pad(x, ((0, fill), *((0, 0),) * (x.ndim - 1))) for x in (seen["mel"], seen["mask"])]

        return jax.lax.switch(capacity, [lambda size=size: branch(size) for size in plan.capacities])

    mel: np.ndarray | None = None
    mask: np.ndarray | None = None
    real = np.zeros((len(corpus.rows), most), bool)
    for step in tqdm.trange(len(plan.ids), desc="features", unit="batch", leave=False):
        ids = plan.ids[step, 0]
        ids = ids[ids >= 0]
        windows = task.geometry.windows(corpus.lengths[ids])
        recording = np.repeat(ids, windows)
        nth = np.arange(len(recording)) - np.repeat(np.cumsum(windows) - windows, windows)
        batch_mel, batch_mask = shown(data, plan.ids[step], plan.capacity[step], step)
        if mel is None:
            mel = np.zeros((len(corpus.rows) * most, *batch_mel.shape[1:]), np.float32)
            mask = np.zeros((len(corpus.rows) * most, *batch_mask.shape[1:]), np.float32)
        kept = np.flatnonzero(nth < most)
        place = recording[kept] * most + nth[kept]
        assert mask is not None
        mel[place], mask[place] = np.asarray(batch_mel)[kept], np.asarray(batch_mask)[kept]
        real[recording[kept], nth[kept]] = True
    return Clips(jnp.asarray(mel), jnp.asarray(mask), jnp.asarray(real))


def draw_parts(config: ml_collections.ConfigDict, corpus: Corpus, setting: Setting, real: np.ndarray) -> Parts:
    """Each seed's split of a corpus whose recordings have the clips `real` (R, C).

    Raises:
      splits.SplitError: a split that cannot be made or that leaks, naming setting and seed.
    """
    kind = "leave_database_out" if setting.database else "person"
    place = {row["id"]: i for i, row in enumerate(corpus.rows)}
    drawn = []
    for seed in tqdm.trange(config.seed, config.seed + config.ablation.seeds, desc="splits", leave=False):
        try:
            split = splits.make(
                corpus.rows, kind, config.task.target, seed, tuple(config.split.fractions), database=setting.database
            )
            splits.check(split, corpus.rows)
        except splits.SplitError as error:
            raise splits.SplitError(f"{setting.name}, seed {seed}: {error}") from None
        drawn.append([np.array([place[id] for id in split[part]], np.int32) for part in splits.PARTS])
    clips = [np.flatnonzero(np.isin(np.arange(len(real)), part)[:, None] & real) for part, _, _ in drawn]
    return Parts(_filled(clips), _filled([part for _, part, _ in drawn]), [part for _, _, part in drawn])


def _filled(rows: Sequence[np.ndarray]) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def over_seeds(function: Callable) -> Callable:
    """function(*one seed's arrays, *shared) -> a function of (arrays that lead with S), (shared): one program.

    On CPU the seeds go through it one after the other: ten at once no longer fit its caches, and take longer.
    """

    def all_seeds(seeds, shared):
        one = lambda own: function(*own, *shared)
        return jax.lax.map(one, seeds) if jax.default_backend() == "cpu" else jax.vmap(one)(seeds)

    return all_seeds


def fold(key: jax.Array, *numbers: jax.Array | int) -> jax.Array:
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

    Raises:
      FloatingPointError: a training that came to values which are not finite.
    """
    labels_R = jnp.asarray(np.nan_to_num(labels))
    keys = [jax.random.key(config.seed + number) for number in range(config.ablation.seeds)]
    m = config.model

    def start(init):
        # One by one: LAPACK's batched QR, of orthogonal kernels, can wait forever for the threads that it runs on.
        made = [split_model(init(fold(key, INIT)))[1:] for key in keys]
        return jax.tree.map(lambda *x: jnp.stack(x), *made)

    def done(name):
        if bar is not None:
            bar.set_postfix_str(name)
            bar.update()

    compiled = functools.partial(jax.jit, compiler_options=sharding.compiler_options())
    first = compiled(over_seeds(pretrain(config, task)))
    own = jnp.stack(keys), start(lambda key: task.init(nnx.Rngs(key))), parts.clips
    extracted = first(own, (data, labels_R))
    inputs = jax.block_until_ready(extracted)[0].shape[-1]
    done("CNN-LSTM")
    arms: dict[Arm, tuple[np.ndarray, np.ndarray]] = {}
    for name in UPDATES:
        init = lambda key, name=name: Recurrent(inputs, m.hidden, name, rngs=nnx.Rngs(key))
        second = compiled(over_seeds(finetune(config, init)))
        layers, _ = start(init)
        answers = second((jnp.stack(keys), layers, parts.clips, parts.validation, extracted), (data.real, labels_R))
        p, threshold = (np.asarray(x) for x in answers)
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
        done(ARM_WORDS[name])
    return {arm: arms[arm] for arm in ARMS}
