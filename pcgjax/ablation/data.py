"""What the ablation trains on: simulated people, every recording's log-mel clips, and each seed's split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

from pcgjax import tasks
from pcgjax.ablation.settings import Setting
from pcgjax.data import splits
from pcgjax.data.batches import block, gather_batch
from pcgjax.data.corpus import Corpus, in_memory
from pcgjax.data.plan import evaluation_plan
from pcgjax.datasets.simulate import audible_sites, draw_noise, draw_person, simulate_person

# Streams of randomness, each folded into a seed's key first.
INIT, ORDER, DROPOUT, NOISE = range(4)


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


def simulate_corpus(people: int, seed: int, sample_rate_hz: int = 2000, recordings_per_person: int = 2) -> Corpus:
    """Simulated recordings of 10 to 12 s, half of the people with a murmur, at sites where it can be heard."""
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
    """The input of the task's model for each labelled recording: its first `ablation.clips_per_recording` clips.

    Deterministic: noise, where `features.noise_snr_db` asks for it, is one draw from `config.seed`.
    """
    task = tasks.make(config, corpus.sample_rate_hz)
    make_inputs = task.inputs
    assert make_inputs is not None
    most = config.ablation.clips_per_recording
    labels = corpus.labels(config.task.target)
    labelled = np.flatnonzero(np.isfinite(labels))
    plan = evaluation_plan(labelled, corpus.lengths, task.geometry, config.evaluation.batch_recordings)
    data = jax.device_put(block(corpus, labels, np.arange(len(corpus.rows))))
    noise_key = jax.random.fold_in(jax.random.key(config.seed), NOISE)

    @jax.jit
    def clips_of(data, ids, capacity, step):
        def branch(size):
            batch = gather_batch(data, ids[0], size, task.geometry)
            values = make_inputs(batch, size, jax.random.fold_in(noise_key, step)).values
            fill = max(plan.capacities) - size
            return [jnp.pad(x, ((0, fill), *((0, 0),) * (x.ndim - 1))) for x in values]

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
        batch_mel, batch_mask = clips_of(data, plan.ids[step], plan.capacity[step], step)
        if mel is None:
            mel = np.zeros((len(corpus.rows) * most, *batch_mel.shape[1:]), np.float32)
            mask = np.zeros((len(corpus.rows) * most, *batch_mask.shape[1:]), np.float32)
        taken = np.flatnonzero(nth < most)
        place = recording[taken] * most + nth[taken]
        assert mask is not None
        mel[place], mask[place] = np.asarray(batch_mel)[taken], np.asarray(batch_mask)[taken]
        real[recording[taken], nth[taken]] = True
    return Clips(jnp.asarray(mel), jnp.asarray(mask), jnp.asarray(real))


def draw_parts(config: ml_collections.ConfigDict, corpus: Corpus, setting: Setting, real: np.ndarray) -> Parts:
    """Each seed's split of a corpus whose recordings have the clips `real` (R, C).

    Raises:
      splits.SplitError: a split that cannot be made or that leaks, naming setting and seed.
    """
    kind = "leave_database_out" if setting.database else "person"
    place = {row["id"]: i for i, row in enumerate(corpus.rows)}
    splits_of_seeds = []
    for seed in tqdm.trange(config.seed, config.seed + config.ablation.seeds, desc="splits", leave=False):
        try:
            split = splits.make(
                corpus.rows, kind, config.task.target, seed, tuple(config.split.fractions), database=setting.database
            )
            splits.check(split, corpus.rows)
        except splits.SplitError as error:
            raise splits.SplitError(f"{setting.name}, seed {seed}: {error}") from None
        splits_of_seeds.append([np.array([place[id] for id in split[part]], np.int32) for part in splits.PARTS])
    clips = [np.flatnonzero(np.isin(np.arange(len(real)), part)[:, None] & real) for part, _, _ in splits_of_seeds]
    return Parts(
        _padded(clips), _padded([part for _, part, _ in splits_of_seeds]), [part for _, _, part in splits_of_seeds]
    )


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The rows (n,) as one array (S, the longest's n), -1 where a row has ended."""
    out = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
