"""What each experiment trains: features + model + loss, a few lines each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from pcgjax.features import filters
from pcgjax.input_pipeline import Geometry
from pcgjax.losses import recording_log_probabilities
from pcgjax.models.cnn1d import CNN1D

FILTERS = ("none", "zero_phase", "causal")


class Task(NamedTuple):
    """One experiment. A batch here is one device group's: samples (M, ALIGN) int16, lengths, labels, ids (R,)."""

    geometry: Geometry
    init: Callable[[nnx.Rngs], nnx.Module]
    # (model, batch, capacity, key) -> log p (R,), log (1 - p) (R,) of each recording being positive
    forward: Callable[[Any, dict, int, jax.Array], tuple[jax.Array, jax.Array]]


def cnn(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """The 1D CNN with the grouped BCE: noise, band-pass, z-score, windows, CNN, mean probability a recording.

    Raises:
      ValueError: a feature field that does not fit the prepared data's rate; the message names it.
    """
    f = config.features
    if f.filter not in FILTERS:
        raise ValueError(f"features.filter={f.filter!r}: choose one of {', '.join(FILTERS)}")
    if not 0 <= f.overlap < 1:
        raise ValueError(f"features.overlap={f.overlap}: must be at least 0 and below 1")
    if not f.noise_snr_db > -float("inf"):
        raise ValueError(f"features.noise_snr_db={f.noise_snr_db}: give decibels, or inf for no noise")
    window = round(f.window_s * sample_rate_hz)
    hop = round(window * (1 - f.overlap))
    if window < 16 or hop < 1:
        raise ValueError(f"features.window_s={f.window_s} with features.overlap={f.overlap} is shorter than 16 samples")
    lead = gap = 0
    if f.filter != "none":
        try:
            sos = filters.butterworth(f.filter_order, (f.low_hz, f.high_hz), sample_rate_hz, "bandpass")
        except ValueError as error:
            raise ValueError(f"features.filter_order, features.low_hz, features.high_hz: {error}") from None
        lead = filters.edge_samples(sos)
        gap = lead + filters.settling_samples(sos)
    geometry = Geometry(window, hop, lead, gap)

    def signal(batch: dict, where: filters.Packing, key: jax.Array) -> jax.Array:
        x = batch["samples"].astype(jnp.float32) / 32767
        if f.noise_snr_db != float("inf"):
            x = filters.add_white_noise(x, where, f.noise_snr_db, key)
        if f.filter != "none":
            x = filters.filter_packed(sos, x, where, zero_phase=f.filter == "zero_phase")
        return filters.zscore_packed(x, where)

    def forward(model: CNN1D, batch: dict, capacity: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        lengths, rows = batch["lengths"], batch["samples"].shape[0]
        where = filters.packing(lengths, rows, lead, gap)
        x = signal(batch, where, key).reshape(-1)
        # Window or row j of the batch is number `nth` of its recording's.
        units = geometry.units(lengths)
        ends = jnp.cumsum(units)
        j = jnp.arange(capacity)
        recording = jnp.searchsorted(ends, j, side="right", method="compare_all").clip(max=len(lengths) - 1)
        nth = j - (ends - units)[recording]
        begin = nth * (window if geometry.shared else hop)
        cut = jax.vmap(lambda at: jax.lax.dynamic_slice(x, (at,), (window,)))(where.starts[recording] + begin)
        # Where the recording ends within the row, the next one begins: blank it.
        cut = jnp.where(begin[:, None] + jnp.arange(window) < lengths[recording][:, None], cut, 0)
        windows = geometry.windows(lengths)[recording]
        real = j < ends[-1]
        if geometry.shared:
            logits = model.half_overlapping(cut)
            mask = jnp.concatenate([real & (2 * nth < windows), (real & (2 * nth + 1 < windows))[:-1]])
            recording = jnp.concatenate([recording, recording[:-1]])
        else:
            logits, mask = model(cut), real & (nth < windows)
        log_p, log_q, _ = recording_log_probabilities(logits, recording, mask, len(lengths))
        return log_p, log_q

    def init(rngs: nnx.Rngs) -> CNN1D:
        m = config.model
        return CNN1D(window, tuple(m.filters), m.kernel_size, m.hidden, rngs=rngs)

    return Task(geometry, init, forward)


def split(model: nnx.Module) -> tuple[Any, Any, Any]:
    """(graphdef, parameters, the rest) of a model, the latter two trees of plain arrays; `nnx.merge` undoes it."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return graphdef, nnx.as_pure(params), nnx.as_pure(rest)


class TrainState(NamedTuple):
    """All that the next step depends on besides the data: what a checkpoint holds."""

    step: jax.Array
    params: Any
    rest: Any
    opt_state: Any


def initial_state(task: Task, update: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    _, params, rest = split(task.init(nnx.Rngs(seed)))
    return TrainState(jnp.zeros((), jnp.int32), params, rest, update.init(params))


TASKS = {"cnn": cnn}


def make(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """The task that `config.task.name` names, for data prepared at `sample_rate_hz`."""
    if config.task.name not in TASKS:
        raise ValueError(f"task.name={config.task.name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[config.task.name](config, sample_rate_hz)
