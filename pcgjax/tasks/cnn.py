"""The 1D CNN with the grouped BCE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from pcgjax.data.plan import Geometry
from pcgjax.features import filters
from pcgjax.losses import recording_log_probabilities
from pcgjax.models.cnn1d import CNN1D
from pcgjax.tasks.base import (
    Counts,
    Inputs,
    Task,
    Total,
    arithmetic_dtype,
    cut_windows,
    design_filter,
    target_labels,
    with_noise,
)


def cnn(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """The 1D CNN with the grouped BCE: noise, band-pass, z-score, windows, CNN, mean probability a recording.

    Raises:
      ValueError: a feature field that does not fit the prepared data's rate; the message names it.
    """
    f = config.features
    if not 0 <= f.overlap < 1:
        raise ValueError(f"features.overlap={f.overlap}: must be at least 0 and below 1")
    window = round(f.window_s * sample_rate_hz)
    hop = round(window * (1 - f.overlap))
    if window < 16 or hop < 1:
        raise ValueError(f"features.window_s={f.window_s} with features.overlap={f.overlap} is shorter than 16 samples")
    sos, lead, gap = design_filter(f, (f.low_hz, f.high_hz), sample_rate_hz, "bandpass")
    geometry, dtype = Geometry(window, hop, lead, gap), arithmetic_dtype(config.model)

    def inputs(batch: dict, capacity: int, key: jax.Array) -> Inputs:
        where = filters.packing(batch["lengths"], batch["samples"].shape[0], lead, gap)
        x = with_noise(batch, where, f.noise_snr_db, key)
        if sos is not None:
            x = filters.filter_packed(sos, x, where, zero_phase=f.filter == "zero_phase")
        cut = cut_windows(filters.zscore_packed(x, where), where, geometry, capacity)
        values, recording = (cut.samples.astype(dtype),), cut.recording
        if not geometry.shared:
            return Inputs(values, recording, cut.real & (cut.nth < cut.windows))
        # The rows themselves, then the windows from the middle of one into the next.
        second = cut.real & (2 * cut.nth + 1 < cut.windows)
        real = jnp.concatenate([cut.real & (2 * cut.nth < cut.windows), second[:-1]])
        return Inputs(values, jnp.concatenate([recording, recording[:-1]]), real)

    def features(model: CNN1D, x_JxT: jax.Array) -> jax.Array:
        return model.half_overlapping_features(x_JxT) if geometry.shared else model.features(x_JxT)

    def forward(model: CNN1D, batch: dict, capacity: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        (x_JxT,), recording, real = inputs(batch, capacity, key)
        logits = (model.half_overlapping(x_JxT) if geometry.shared else model(x_JxT)).astype(jnp.float32)
        return recording_log_probabilities(logits, recording, real, len(batch["lengths"]))[:2]

    def loss(model: CNN1D, batch: dict, capacity: int, key: jax.Array, threshold: jax.Array, total: Total):
        used, y = batch["lengths"] > 0, batch["labels"]
        log_p, log_q = forward(model, batch, capacity, key)
        correct = (((log_p > log_q) == (y > 0)) & used).sum(dtype=jnp.int32)
        summed = -((y * log_p + (1 - y) * log_q) * used).sum()
        return summed, Counts(summed, correct, used.sum(dtype=jnp.int32))

    def init(rngs: nnx.Rngs) -> CNN1D:
        m = config.model
        return CNN1D(window, tuple(m.filters), m.kernel_size, m.hidden, rngs=rngs)

    labels = target_labels(config.task.target)
    return Task(geometry, init, forward, loss, labels, dtype=dtype, inputs=inputs, features=features)
