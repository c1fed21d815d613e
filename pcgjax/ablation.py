"""Which of the H-infinity paper's three ideas hold up: {LSTM, convex, forget} x {BCE, PWL} x {fixed, SAPT}.

    python -m pcgjax.ablation --config=configs/hinf_lstm.py:ablation --workdir=runs/ablation --config.data.prepared=DIR

A setting is a corpus and a way to split it: simulated recordings at several SNRs, the prepared data set by person, and
each of its databases left out; without a prepared data set, the simulated ones only. In each, every seed draws a split
and trains a CNN-LSTM with BCE; its CNN, frozen, is what all arms of that seed build on, each with a fresh recurrent
layer. All seeds train in one compiled program.

BCE does not know the threshold, so BCE with SAPT is the training of BCE with the fixed threshold, judged at SAPT's:
nine trainings give the twelve arms. What the last epoch leaves is judged; no epoch is chosen. Differences are paired
by seed: same split, same CNN, same order of clips. Seeds share one data set, so an interval over seeds tells what
another split and training would give, and nothing about another clinic.

WORKDIR receives a json for every setting, table.json and report.html. Settings found there are not trained again.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tqdm
from absl import app, flags, logging
from flax import nnx
from ml_collections import config_flags

from pcgjax import (
    files,
    input_pipeline,
    metrics,
    optimizer,
    page,
    runs,
    sharding,
    splits,
    tasks,
    thresholds,
)
from pcgjax.input_pipeline import Corpus
from pcgjax.metrics import interval
from pcgjax.models.hinf_lstm import UPDATES, Recurrent

LOSSES, THRESHOLDS = ("bce", "pwl"), ("fixed", "sapt")
Arm = tuple[str, str, str]
ARMS: tuple[Arm, ...] = tuple(itertools.product(UPDATES, LOSSES, THRESHOLDS))
# The trainings of one recurrent layer: is its loss penalised, and is the penalty's threshold SAPT's?
PENALISED, ADAPTIVE = (False, True, True), (False, False, True)
SETTINGS = ("synthetic", "person", "leave_database_out")
SCORES = ("f1", "mean_accuracy", "auc", "mean_database_auc", "accuracy", "sensitivity", "specificity")
COMPARED = ("f1", "mean_accuracy", "auc")
# Streams of randomness, each folded into a seed's key first.
INIT, ORDER, DROPOUT, NOISE = range(4)

WORDS = {
    "lstm": "LSTM", "convex": "H∞ convex", "forget": "H∞ forget", "bce": "BCE", "pwl": "PWL", "fixed": "fixed",
    "sapt": "SAPT", "f1": "F1", "mean_accuracy": "MAcc", "auc": "AUC", "mean_database_auc": "Mean AUC over databases",
    "accuracy": "Accuracy", "sensitivity": "Sensitivity", "specificity": "Specificity",
    "all_abnormal": "always abnormal", "majority": "the commoner class", "database_prior": "the database alone",
}  # fmt: skip
# name -> (title, which of an arm's factors it changes, to what, from what)
IDEAS = {
    "convex": ("H∞ LSTM, convex update, instead of the LSTM", 0, "convex", "lstm"),
    "forget": ("H∞ LSTM, forget update, instead of the LSTM", 0, "forget", "lstm"),
    "pwl": ("Penalty-weighted loss instead of BCE", 1, "pwl", "bce"),
    "sapt": ("SAPT instead of a fixed threshold", 2, "sapt", "fixed"),
}
# The paper's section IV, the two rows with SAPT; MAcc is the mean of its sensitivity and specificity.
PAPER = {
    ("convex", "pwl", "sapt"): {"f1": 0.9885, "accuracy": 0.9942, "sensitivity": 0.9923, "specificity": 0.9949},
    ("lstm", "pwl", "sapt"): {"f1": 0.9619, "accuracy": 0.9816, "sensitivity": 0.9469, "specificity": 0.9929},
}
for _row in PAPER.values():
    _row["mean_accuracy"] = (_row["sensitivity"] + _row["specificity"]) / 2
PAPER_NOTE = (
    "The paper's protocol: CinC 2016, 80:20, by patient as it says, 250 normal and 250 abnormal recordings to tune on, "
    "50 epochs, one run. For most of that data set it is not published who was recorded."
)


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


# ------------------------------------------------------------------------------------------------------- the data


def simulate(people: int, seed: int, sample_rate_hz: int = 2000, recordings_per_person: int = 2) -> Corpus:
    """Simulated recordings of 10 to 12 s, half of the people with a murmur, under sites where it is heard."""
    from pcgjax.datasets import synthetic

    rows, samples = [], []
    for number in tqdm.trange(people, desc="simulate", unit="person", leave=False):
        rng = np.random.default_rng([seed, number])
        person = synthetic.draw_person(rng, number)
        # Normal people are recorded where a murmur of theirs would be heard: the site tells nothing of the class.
        likely = person if person.murmurs else synthetic.draw_person(np.random.default_rng([seed, number]), 0, 1.0)
        sites = synthetic.audible_sites(likely)
        for take in range(recordings_per_person):
            noise = synthetic.draw_noise(rng, 25.0)
            site, duration_s = str(rng.choice(sites)), rng.uniform(10, 12)
            wave, _ = synthetic.simulate(person, site, rng, duration_s, sample_rate_hz, noise)
            samples.append(np.round(wave * 32767).astype(np.int16))
            label = str(int(bool(person.murmurs)))
            rows.append({
                "id": f"p{number:04d}_{take}", "person": f"p{number:04d}", "person_known": True,
                "database": "synthetic", "sha256": f"{number}_{take}", "fingerprint": "",
                "labels": {"abnormal": label, "murmur": label},
            })  # fmt: skip
    return input_pipeline.in_memory(rows, samples, sample_rate_hz)


def features(config: ml_collections.ConfigDict, corpus: Corpus) -> Clips:
    """What the task's model is shown of each labelled recording: its first `ablation.clips_per_recording` clips.

    Deterministic: noise, where `features.noise_snr_db` asks for it, is one draw from `config.seed`.
    """
    task = tasks.make(config, corpus.sample_rate_hz)
    most = config.ablation.clips_per_recording
    labels = corpus.labels(config.task.target)
    labelled = np.flatnonzero(np.isfinite(labels))
    plan = input_pipeline.evaluation_plan(labelled, corpus.lengths, task.geometry, config.evaluation.batch_recordings)
    data = jax.device_put(input_pipeline.block(corpus, labels, np.arange(len(corpus.rows))))
    noise_key = jax.random.fold_in(jax.random.key(config.seed), NOISE)

    @jax.jit
    def shown(data, ids, capacity, step):
        def branch(size):
            seen: dict[str, jax.Array] = {}

            def look(mel, mask, *_):  # stands in the model's place
                seen.update(mel=mel, mask=mask)
                return jnp.zeros(len(mel))

            batch = input_pipeline.gather(data, ids[0], size, task.geometry)
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


# ------------------------------------------------------------------------------------------------------- training


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


def batches(key: jax.Array, epoch: jax.Array, clips_K: jax.Array, total: int, batch: int) -> tuple:
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


def pretrain(config: ml_collections.ConfigDict, task: tasks.Task) -> Callable:
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
                summed, counts = tasks.clip_loss(loss, logits, labels_R[ids // places], real, 0.5, _same)
                return summed, (counts.samples, tasks.split(model)[2])

            return step(objective, update, state), None

        def epoch(state, number):
            return jax.lax.scan(train_step, state, batches(key, number, clips_K, total, batch))[0], None

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
                bce, counts = tasks.clip_loss(plain, logits, labels, ids >= 0, threshold, _same)
                pwl, _ = tasks.clip_loss(weighted, logits, labels, ids >= 0, threshold, _same)
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

            state, _ = jax.lax.scan(steps, state, batches(key, number, clips_K, total, batch))
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
    config: ml_collections.ConfigDict, task: tasks.Task, data: Clips, labels: np.ndarray, parts: Parts, bar: Any = None
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
        made = [tasks.split(init(fold(key, INIT)))[1:] for key in keys]
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
        done(WORDS[name])
    return {arm: arms[arm] for arm in ARMS}


# ------------------------------------------------------------------------------------------------------- judging


def score(labels: np.ndarray, probabilities: np.ndarray, threshold: float, databases: np.ndarray) -> dict[str, float]:
    """SCORES of recordings (n,) in databases (n,); NaN where undefined. The mean AUC is of those with both classes."""
    scores = metrics.binary(labels, probabilities, threshold)
    own = [databases == name for name in np.unique(databases)]
    auc = [metrics.binary(labels[of], probabilities[of])["auc"] for of in own]
    auc = [value for value in auc if np.isfinite(value)]
    scores["mean_database_auc"] = float(np.mean(auc)) if auc else math.nan
    return {name: scores[name] for name in SCORES}


def judge(
    corpus: Corpus, labels: np.ndarray, parts: Parts, arms: Mapping[Arm, tuple[np.ndarray, np.ndarray]]
) -> tuple[dict, dict]:
    """Scores of every arm, and of answers that need no listening, on each seed's test part: {name: {score: [S]}} twice.

    The trivial answers are told the test part's own labels, so they are the best of their kind.
    """
    databases = np.array([row["database"] for row in corpus.rows])
    scored: dict[str, list[dict]] = {" ".join(arm): [] for arm in arms}
    trivial: dict[str, list[dict]] = {"all_abnormal": [], "majority": [], "database_prior": []}
    for seed, test in enumerate(parts.test):
        y, of = labels[test], databases[test]
        for arm, (p, threshold) in arms.items():
            scored[" ".join(arm)].append(score(y, p[seed, test], float(threshold[seed]), of))
        prior = {name: y[of == name].mean() for name in np.unique(of)}
        answers = {
            "all_abnormal": np.ones(len(y)),
            "majority": np.full(len(y), float(y.mean() >= 0.5)),
            "database_prior": np.array([prior[name] for name in of]),
        }
        for name, answer in answers.items():
            trivial[name].append(score(y, answer, 0.5, of))
    turned = lambda found: {name: {k: [one[k] for one in rows] for k in SCORES} for name, rows in found.items()}
    return turned(scored), turned(trivial)


def differences(arms: Mapping[str, Mapping[str, Sequence[float]]], idea: str, metric: str) -> np.ndarray:
    """(S,) what an idea changes in a score, seed by seed: its arms' mean minus the mean of the same arms without it."""
    _, factor, new, old = IDEAS[idea]

    def mean_of(value):
        return np.mean([np.asarray(arms[" ".join(arm)][metric], float) for arm in ARMS if arm[factor] == value], axis=0)

    return mean_of(new) - mean_of(old)


def summarise(results: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Mean, deviation and interval of each arm, idea and trivial answer in each setting, the databases that were left
    out also together (their mean, seed by seed): [{name, title, group, arms, ideas, trivial, ...}].
    """
    left_out = [r for r in results if r["group"] == "leave_database_out"]
    everything = list(results)
    if len(left_out) > 1:
        together = {
            "name": "leave_database_out", "title": f"Databases left out, mean of {len(left_out)}",
            "group": "leave_database_out", "together": True,
            "recordings": left_out[0]["recordings"], "people": left_out[0]["people"], "databases": 1,
            "test_recordings": float(np.sum([r["test_recordings"] for r in left_out])),
        }  # fmt: skip
        for kind in ("arms", "trivial"):
            together[kind] = {
                name: {k: np.mean(np.array([r[kind][name][k] for r in left_out], float), axis=0) for k in SCORES}
                for name in left_out[0][kind]
            }
        everything.insert(everything.index(left_out[0]), together)
    table = []
    for r in everything:
        alone = r["group"] == "leave_database_out" and len(left_out) > 1 and not r.get("together")
        table.append({
            **{k: r[k] for k in ("name", "title", "group", "recordings", "people", "databases", "test_recordings")},
            "counts": not alone,  # whether the sentences on what held up count it: no database twice
            **{kind: {name: {k: interval(v) for k, v in scores.items()} for name, scores in r[kind].items()}
               for kind in ("arms", "trivial")},
            "ideas": {idea: {k: interval(differences(r["arms"], idea, k)) for k in COMPARED} for idea in IDEAS},
        })  # fmt: skip
    return table


def verdict(idea: str, table: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on whether an idea held up, from the paired intervals: a difference is clear where 0 is outside."""
    clear: dict[str, list[str]] = {"better": [], "worse": []}
    judged = [row for row in table if row["counts"]]
    for row in judged:
        for metric in COMPARED:
            d = row["ideas"][idea][metric]
            said = f"{row['title']}: {WORDS[metric]} {d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
            if d["low"] > 0:
                clear["better"].append(said)
            elif d["high"] < 0:
                clear["worse"].append(said)
    better, worse, n = len(clear["better"]), len(clear["worse"]), len(judged) * len(COMPARED)
    if better and worse:
        word = "mixed"
    elif better:
        word = "held up" if better > n / 2 else "held up in part"
    else:
        word = "did not hold up" if worse else "no clear difference"
    sentence = f"{IDEAS[idea][0]}: {word}. Of {n} comparisons {better} are clearly better and {worse} clearly worse"
    listed = "; ".join(f"{kind}: {', '.join(said)}" for kind, said in clear.items() if said)
    return sentence + (f" ({listed})." if listed else ".")


# -------------------------------------------------------------------------------------------------------- the page


def draw(table: Sequence[Mapping[str, Any]], verdicts: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """The page as HTML."""
    n, comparisons = config["ablation"]["seeds"], len(COMPARED) * sum(row["counts"] for row in table)
    notes = [
        f"Differences are paired by seed ({n} seeds: same split, same frozen CNN, same order of clips) and averaged "
        "over the other two factors. The interval is a 95 % t interval over the seeds.",
        "All seeds share one data set: the intervals tell what another split and training would give, and nothing "
        "about another clinic. Test parts of different seeds overlap, so they are, if anything, too narrow.",
        f"An idea without any effect would look clear in one comparison of twenty: in about {comparisons / 20:.1f} of "
        f"the {comparisons} here.",
        "BCE does not know the threshold: BCE with SAPT is the training of BCE with the fixed threshold, judged at "
        "SAPT's, so their AUC is the same.",
        "What the last epoch leaves is judged; no epoch is chosen on validation.",
    ]
    held = "".join(f"<li>{page.escape(sentence)}</li>" for sentence in verdicts.values())
    read = "".join(f"<li>{page.escape(note)}</li>" for note in notes)
    sections = [
        ("verdicts", "What held up", f'<div class="card prose"><ul>{held}</ul></div>'
         f'<div class="card prose"><h3>How to read this</h3><ul>{read}</ul></div>'),
        ("ideas", "What each idea changes", _draw_ideas([row for row in table if row["counts"]])),
        ("paper", "Beside the paper", _draw_paper(table)),
        *((row["name"], row["title"], _draw_setting(row)) for row in table),
        ("setup", "Setup", f'<div class="card">{page.facts(config)}</div>'),
    ]  # fmt: skip
    shown = page.count(len(table), "setting")
    return page.document("Which ideas hold up", f"{shown} · {len(ARMS)} arms · {n} seeds", sections)


COLOUR = {"lstm": page.BLUE, "convex": page.TEAL, "forget": page.PURPLE}


def _draw_ideas(table: Sequence[Mapping[str, Any]]) -> str:
    lines = [(idea, row) for idea in IDEAS for row in table]
    # A row of space above each idea holds its title.
    y = {(idea, row["name"]): i * (len(table) + 1.4) + j for i, idea in enumerate(IDEAS) for j, row in enumerate(table)}
    height = round(70 + 19 * (len(IDEAS) * (len(table) + 1.4)))

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, len(COMPARED), sharey=True)
        for ax, metric in zip(axes, COMPARED, strict=True):
            ax.axvline(0, color=page.INK, linewidth=1)
            for idea, row in lines:
                d, at = row["ideas"][idea][metric], y[idea, row["name"]]
                clear = d["low"] > 0 or d["high"] < 0
                colour = page.MUTED if not clear else page.TEAL if d["mean"] > 0 else page.ORANGE
                ax.plot([d["low"], d["high"]], [at, at], color=colour, linewidth=2)
                ax.plot([d["mean"]], [at], "o", color=colour, markersize=6)
            ax.set_title(WORDS[metric])
            ax.set_xlabel("difference")
            ax.margins(x=0.08)
            ax.locator_params(axis="x", nbins=5)
            ax.grid(False, axis="y")
        axes[0].set_yticks([y[idea, row["name"]] for idea, row in lines], [row["title"] for _, row in lines])
        axes[0].set_ylim(max(y.values()) + 0.7, -1.5)
        for ax in axes:
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        for idea, (title, *_) in IDEAS.items():
            axes[0].annotate(title, (0, y[idea, table[0]["name"]] - 0.95), (-6, 0), xycoords=("axes fraction", "data"),
                             textcoords="offset points", ha="right", va="center", fontweight="bold")  # fmt: skip

    figure = page.svg(1060, height, "What each idea changes in each setting, with paired intervals", paint)
    caption = "Right of the line is better with the idea. Green and orange: the 95 % interval leaves out 0."
    head = ["Difference", "Setting", *(WORDS[metric] for metric in COMPARED), "Seeds"]
    body = [
        [f"{WORDS[IDEAS[idea][2]]} − {WORDS[IDEAS[idea][3]]}", page.escape(row["title"]),
         *(_cell(row["ideas"][idea][metric], sign=True) for metric in COMPARED),
         str(row["ideas"][idea][COMPARED[0]]["n"])]
        for idea, row in lines
    ]  # fmt: skip
    return page.card("", figure, caption) + page.table(head, body)


def _draw_setting(row: Mapping[str, Any]) -> str:
    names = [" ".join(arm) for arm in ARMS]
    from_paper = row["group"] != "synthetic"
    trivial = {}
    for m in COMPARED:
        best = max(row["trivial"], key=lambda name: np.nan_to_num(row["trivial"][name][m]["mean"]))
        trivial[m] = row["trivial"][best][m]["mean"], best

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, len(COMPARED), sharey=True)
        for ax, metric in zip(axes, COMPARED, strict=True):
            ax.axvline(trivial[metric][0], color=page.ORANGE, linewidth=1.5, linestyle=(0, (4, 3)))
            for at, (arm, name) in enumerate(zip(ARMS, names, strict=True)):
                s, colour = row["arms"][name][metric], COLOUR[arm[0]]
                ax.plot([s["low"], s["high"]], [at, at], color=colour, linewidth=2)
                ax.plot([s["mean"]], [at], "o", color=colour, markersize=6)
                if from_paper and metric in PAPER.get(arm, ()):
                    ax.plot([PAPER[arm][metric]], [at], "D", color=page.PINK, markersize=6)
            ax.set_title(WORDS[metric])
            ax.margins(x=0.08)
            ax.locator_params(axis="x", nbins=6)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        axes[0].set_yticks(range(len(ARMS)), [_words(arm) for arm in ARMS])
        axes[0].set_ylim(len(ARMS) - 0.4, -0.6)

    figure = page.svg(1060, 360, f"Scores of the arms: {row['title']}", paint)
    said = ", ".join(f"{WORDS[m]} {value:.3f} ({WORDS[n]})" for m, (value, n) in trivial.items())
    caption = f"Mean and 95 % t interval over seeds. Dashed: the best trivial answer: {said}."
    if from_paper:
        caption += " Diamonds: the paper's."
    shown = [k for k in SCORES if k != "mean_database_auc" or row["databases"] > 1]
    head = ["", *(WORDS[k] for k in shown)]
    body = [[page.escape(_words(arm)), *(_cell(row["arms"][name][k]) for k in shown)]
            for arm, name in zip(ARMS, names, strict=True)]  # fmt: skip
    body += [[f"Trivial: {WORDS[name]}", *(_cell(s[k]) for k in shown)] for name, s in row["trivial"].items()]
    if from_paper:
        body += [[f"The paper: {page.escape(_words(arm))}", *(page.number(scores.get(k), 4) for k in shown)]
                 for arm, scores in PAPER.items()]  # fmt: skip
    counts = (
        f"{row['recordings']:,} recordings of {row['people']:,} people; {row['test_recordings']:.0f} recordings test, "
        "on average over seeds."
    )
    return f'<p class="sub">{counts}</p>' + page.card("", figure, page.escape(caption)) + page.table(head, body)


def _draw_paper(table: Sequence[Mapping[str, Any]]) -> str:
    shown = ("f1", "accuracy", "sensitivity", "specificity", "mean_accuracy")
    body = []
    judged = [row for row in table if row["counts"] and row["group"] != "synthetic"]
    for arm, scores in PAPER.items():
        system = "CNN-H∞-LSTM with SAPT" if arm[0] == "convex" else "CNN-LSTM with SAPT"
        body.append([f"{system}: the paper", *(page.number(scores[k], 4) for k in shown)])
        body += [[f"{system}: {page.escape(row['title'].lower())}",
                  *(_cell(row["arms"][" ".join(arm)][k]) for k in shown)]
                 for row in judged]  # fmt: skip
    for row in judged:
        alone = row["trivial"]["database_prior"]
        body.append([f"The database alone: {page.escape(row['title'].lower())}", *(_cell(alone[k]) for k in shown)])
    return page.table(["", *(WORDS[k] for k in shown)], body) + f'<p class="small">{page.escape(PAPER_NOTE)}</p>'


def _words(arm: Arm) -> str:
    return " · ".join(WORDS[value] for value in arm)


def _cell(s: Mapping[str, float], sign: bool = False) -> str:
    if not np.isfinite(s["mean"]):
        return "n/a"
    if sign:
        return f"{s['mean']:+.3f}<small>{s['low']:+.3f} to {s['high']:+.3f}</small>"
    return f"{s['mean']:.3f}<small>± {s['deviation']:.3f}</small>"


# -------------------------------------------------------------------------------------------------------- a run


def settings_of(config: ml_collections.ConfigDict, prepared: Corpus | None) -> list[Setting]:
    """What `ablation.settings` asks for; without a prepared data set the synthetic ones only."""
    found = []
    for group in config.ablation.settings:
        if group == "synthetic":
            for snr in config.ablation.snrs_db:
                name = "clean" if snr == math.inf else f"{snr:g} dB"
                found.append(Setting(f"synthetic_{name.replace(' ', '_')}", f"Synthetic, {name}", group, snr, None))
        elif prepared is None:
            logging.warning("setting %s is left out: it needs --config.data.prepared=DIR", group)
        elif group == "person":
            found.append(Setting(group, "By person", group, config.features.noise_snr_db, None))
        else:
            labels = prepared.labels(config.task.target)
            databases = np.array([row["database"] for row in prepared.rows])
            for name in np.unique(databases):
                if len(set(labels[(databases == name) & np.isfinite(labels)])) < 2:
                    continue  # nothing to tell apart
                found.append(Setting(f"{group}_{name}", f"Database {name} left out", group,
                                     config.features.noise_snr_db, str(name)))  # fmt: skip
    if not found:
        raise ValueError(
            f"ablation.settings={tuple(config.ablation.settings)}: nothing to do without data.prepared; give "
            "--config.data.prepared=DIR, a folder that pcgjax.prepare wrote"
        )
    return found


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, naming the field, where a config cannot be what is compared here."""
    if "ablation" not in config or config.task.name != "hinf_lstm":
        raise ValueError("config: no field ablation for task.name=hinf_lstm; use configs/hinf_lstm.py:ablation")
    a = config.ablation
    unknown = [name for name in a.settings if name not in SETTINGS]
    if unknown or not a.settings:
        raise ValueError(f"ablation.settings={tuple(a.settings)}: choose among {', '.join(SETTINGS)}")
    if a.seeds < 2:
        raise ValueError(f"ablation.seeds={a.seeds}: an interval needs at least 2")
    if len(a.epochs) != 2 or min(a.epochs) < 1:
        raise ValueError(f"ablation.epochs={tuple(a.epochs)}: two numbers, each at least 1: of the CNN, of the arms")
    for field in ("clips_per_recording", "batch_clips", "synthetic_people"):
        if a[field] < 1:
            raise ValueError(f"ablation.{field}={a[field]}: must be at least 1")
    if "synthetic" in a.settings and not (len(a.snrs_db) and all(snr > -math.inf for snr in a.snrs_db)):
        raise ValueError(f"ablation.snrs_db={tuple(a.snrs_db)}: give decibels, or inf for no noise")
    if not 0 <= config.evaluation.threshold <= 1:
        raise ValueError(f"evaluation.threshold={config.evaluation.threshold}: must lie between 0 and 1")
    if config.evaluation.batch_recordings < 1:
        raise ValueError(f"evaluation.batch_recordings={config.evaluation.batch_recordings}: must be at least 1")
    if config.train.balance != "none" or config.data.shuffle_labels:
        raise ValueError("train.balance, data.shuffle_labels: the ablation takes clips and labels as they are")


def run(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict:
    """Runs the settings that WORKDIR lacks and writes table.json and report.html; returns the former.

    Raises:
      ValueError (also SplitError, CheckpointError): a config field, a split that cannot be made, or a setting that
        WORKDIR holds under another config.
    """
    check(config)
    workdir = pathlib.Path(workdir)
    config = config.copy_and_resolve_references()
    config.model.cell, config.loss.name, config.optimizer.frozen = "lstm", "bce", ()  # of the first stage
    prepared = input_pipeline.from_prepared(config.data.prepared) if config.data.prepared else None
    settings = settings_of(config, prepared)
    thresholds.init(config.evaluation.threshold, **config.sapt)

    @functools.cache
    def simulated() -> Corpus:
        return simulate(config.ablation.synthetic_people, config.seed)

    @functools.lru_cache(1)  # the splits of a prepared data set follow each other
    def data_of(synthetic: bool, snr_db: float) -> tuple[Corpus, Clips]:
        corpus = simulated() if synthetic else prepared
        assert corpus is not None
        one = config.copy_and_resolve_references()
        one.features.noise_snr_db = snr_db
        return corpus, features(one, corpus)

    results = []
    bar = tqdm.tqdm(settings, desc="settings", unit="setting")
    for setting in bar:
        bar.set_postfix_str(setting.title)
        path = workdir / f"{setting.name}.json"
        identity = _identity(config, setting, prepared)
        if path.exists():
            results.append(_finished(path, identity))
            continue
        result = run_setting(config, setting, *data_of(setting.group == "synthetic", setting.snr_db))
        result = _finite(result | {"config": identity})
        files.write_text(path, json.dumps(result, indent=1))
        results.append(result)
    table = summarise(results)
    verdicts = {idea: verdict(idea, table) for idea in IDEAS}
    out = {"settings": table, "verdicts": verdicts, "paper": {" ".join(arm): v for arm, v in PAPER.items()}}
    files.write_text(workdir / "table.json", json.dumps(_finite(out), indent=1))
    shared = {part: values for part, values in identity.items() if part != "data"}  # of all settings
    shared["features"] = {k: v for k, v in shared["features"].items() if k != "noise_snr_db"}
    files.write_text(workdir / "report.html", draw(table, verdicts, shared))
    return out


def run_setting(config: ml_collections.ConfigDict, setting: Setting, corpus: Corpus, data: Clips) -> dict:
    """Trains and judges all arms of one setting: what its json holds."""
    began = time.monotonic()
    labels = corpus.labels(config.task.target)
    parts = draw_parts(config, corpus, setting, np.asarray(data.real))
    task = tasks.make(config, corpus.sample_rate_hz)
    with tqdm.tqdm(total=1 + len(UPDATES), desc=setting.title, unit="program", leave=False) as bar:
        arms = train_arms(config, task, data, labels, parts, bar)
    scores, trivial = judge(corpus, labels, parts, arms)
    tested = [corpus.rows[i]["database"] for part in parts.test for i in part]
    used = [row for row, label in zip(corpus.rows, labels, strict=True) if np.isfinite(label)]
    return {
        "name": setting.name,
        "title": setting.title,
        "group": setting.group,
        "recordings": len(used),
        "people": len({(row["database"], row["person"]) for row in used}),
        "databases": len(set(tested)),
        "clips": int(data.real.sum()),
        "test_recordings": len(tested) / len(parts.test),
        "arms": scores,
        "trivial": trivial,
        "thresholds": {" ".join(arm): np.asarray(threshold).tolist() for arm, (_, threshold) in arms.items()},
        "seconds": time.monotonic() - began,
    }


def _identity(config: ml_collections.ConfigDict, setting: Setting, prepared: Corpus | None) -> dict[str, dict]:
    """All that a setting's result depends on, as JSON gives it back."""
    plain = json.loads(json.dumps(config.to_dict()))
    kept = {part: plain[part] for part in ("task", "features", "model", "loss", "sapt", "optimizer")}
    for part, varied in (("model", "cell"), ("loss", "name"), ("optimizer", "frozen")):
        del kept[part][varied]
    kept["features"]["noise_snr_db"] = setting.snr_db
    kept["split"] = {"fractions": plain["split"]["fractions"]}
    kept["evaluation"] = {"threshold": plain["evaluation"]["threshold"]}
    kept["ablation"] = {"seed": plain["seed"]} | {
        name: plain["ablation"][name] for name in ("seeds", "epochs", "clips_per_recording", "batch_clips")
    }
    if setting.group == "synthetic":
        kept["ablation"]["synthetic_people"] = plain["ablation"]["synthetic_people"]
    else:
        assert prepared is not None
        said = [row["labels"] for row in prepared.rows]
        kept["data"] = {"sha256": input_pipeline.order_digest(prepared, labels=said)}
    return _finite(kept)


def _finished(path: pathlib.Path, identity: dict[str, dict]) -> dict:
    """A setting's json, where it was made with this config.

    Raises:
      CheckpointError: made with another; ValueError: damaged.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        saved = result["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it, and the setting is run again") from None
    runs.refuse_changes(saved, identity, path)
    return result


def _finite(value: Any) -> Any:
    """With None for what is not a finite number, as JSON wants it."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}")
    logging.set_verbosity(logging.INFO)
    workdir = pathlib.Path(flags.FLAGS.workdir)
    out = run(flags.FLAGS.config, workdir)
    for row in out["settings"]:
        best = max(row["arms"], key=lambda name: row["arms"][name]["mean_accuracy"]["mean"])
        s = row["arms"][best]
        print(f"{row['title']}: best MAcc {s['mean_accuracy']['mean']:.3f}, AUC {s['auc']['mean']:.3f} ({best})")
    for sentence in out["verdicts"].values():
        print(sentence)
    print(f"wrote {workdir}: table.json, report.html")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/hinf_lstm.py:ablation; --config.a.b=v overrides.")
    flags.DEFINE_string("workdir", None, "The run's folder; settings found there are not run again.", required=True)
    flags.mark_flag_as_required("config")
    files.run(main)
