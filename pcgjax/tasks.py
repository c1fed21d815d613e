"""What each experiment trains: features + model + loss, a few lines each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from pcgjax import audio, thresholds
from pcgjax.features import filters, spectrogram, wavelet
from pcgjax.input_pipeline import Geometry
from pcgjax.losses import penalty, recording_log_probabilities
from pcgjax.models.cnn1d import CNN1D
from pcgjax.models.hinf_lstm import CNNLSTM

FILTERS = ("none", "zero_phase", "causal")


class Counts(NamedTuple):
    """Sums over a batch's samples: recordings or clips, whichever the loss is over."""

    loss: jax.Array
    correct: jax.Array
    samples: jax.Array


Total = Callable[[jax.Array], jax.Array]  # sums an array over all device groups' shares of a batch


class Task(NamedTuple):
    """One experiment. A batch here is one device group's: samples (M, ALIGN) int16, lengths, labels, ids (R,)."""

    geometry: Geometry
    init: Callable[[nnx.Rngs], nnx.Module]
    # (model, batch, capacity, key) -> log p (R,), log (1 - p) (R,) of each recording being positive
    forward: Callable[[Any, dict, int, jax.Array], tuple[jax.Array, jax.Array]]
    # (model, batch, capacity, key, threshold, total) -> what to differentiate, Counts. The former is a sum: over all
    # groups, and divided by all their samples, it is the loss. The model's running averages change in place.
    loss: Callable[[Any, dict, int, jax.Array, jax.Array, Total], tuple[jax.Array, Counts]]


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
    sos, lead, gap = _filter(f, (f.low_hz, f.high_hz), sample_rate_hz, "bandpass")
    geometry = Geometry(window, hop, lead, gap)

    def forward(model: CNN1D, batch: dict, capacity: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        where = filters.packing(batch["lengths"], batch["samples"].shape[0], lead, gap)
        x = _noisy(batch, where, f.noise_snr_db, key)
        if sos is not None:
            x = filters.filter_packed(sos, x, where, zero_phase=f.filter == "zero_phase")
        cut = _cut(filters.zscore_packed(x, where), where, geometry, capacity)
        recording = cut.recording
        if geometry.shared:
            logits = model.half_overlapping(cut.samples)
            second = cut.real & (2 * cut.nth + 1 < cut.windows)
            mask = jnp.concatenate([cut.real & (2 * cut.nth < cut.windows), second[:-1]])
            recording = jnp.concatenate([recording, recording[:-1]])
        else:
            logits, mask = model(cut.samples), cut.real & (cut.nth < cut.windows)
        log_p, log_q, _ = recording_log_probabilities(logits, recording, mask, len(batch["lengths"]))
        return log_p, log_q

    def loss(model: CNN1D, batch: dict, capacity: int, key: jax.Array, threshold: jax.Array, total: Total):
        used, y = batch["lengths"] > 0, batch["labels"]
        log_p, log_q = forward(model, batch, capacity, key)
        correct = (((log_p > log_q) == (y > 0)) & used).sum(dtype=jnp.int32)
        summed = -((y * log_p + (1 - y) * log_q) * used).sum()
        return summed, Counts(summed, correct, used.sum(dtype=jnp.int32))

    def init(rngs: nnx.Rngs) -> CNN1D:
        m = config.model
        return CNN1D(window, tuple(m.filters), m.kernel_size, m.hidden, rngs=rngs)

    return Task(geometry, init, forward, loss)


def hinf_lstm(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """The CNN with a recurrent layer on 5 s clips (H-infinity LSTM paper): noise, wavelet denoising, low-pass, clips,
    log-mel in dB below the clip's peak, CNN-LSTM; the loss is over clips, a recording's probability their mean.

    A recording that is shorter than a clip is one, padded, whose padding changes nothing; the rest of a longer one that
    does not fill a clip is left out.

    Raises:
      ValueError: a field that does not fit the prepared data's rate or another field; the message names it.
    """
    f, loss_ = config.features, config.loss
    if loss_.name not in ("bce", "pwl"):
        raise ValueError(f"loss.name={loss_.name!r}: choose bce or pwl")
    penalty(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), 0.5, loss_.alpha, loss_.normalize, loss_.slope)  # checks them
    clip = round(f.window_s * sample_rate_hz)
    sos, lead, gap = _filter(f, f.high_hz, sample_rate_hz, "lowpass")
    if f.wavelet_level:
        try:
            free = wavelet.margins(f.wavelet_level)
        except ValueError as error:
            raise ValueError(f"features.wavelet_level={f.wavelet_level}: {error}; 0 for no denoising") from None
        support = wavelet.shortest(f.wavelet_level)
        shortest = min(clip, audio.SHORTEST_S * sample_rate_hz)
        if shortest < support:
            raise ValueError(
                f"features.wavelet_level={f.wavelet_level}: spans {support} samples, the shortest clip has "
                f"{shortest:.0f}; lower the level, or prepare the data at a higher rate"
            )
        lead, gap = (max(pair) for pair in zip((lead, gap), free, strict=True))
    try:
        spectrogram.mel_filterbank(sample_rate_hz, f.n_fft, f.n_mels, 0.0, sample_rate_hz / 2, f.htk)
    except ValueError as error:
        raise ValueError(f"features.n_fft, features.n_mels: {error}") from None
    if f.hop < 1 or clip < f.hop * 2 ** len(config.model.blocks):
        raise ValueError(
            f"features.window_s={f.window_s}: {clip} samples are too few for features.hop={f.hop} and "
            f"{len(config.model.blocks)} poolings"
        )
    geometry = Geometry(clip, clip, lead, gap)

    def logits_of(model: CNNLSTM, batch: dict, capacity: int, key: jax.Array, train: bool, total: Total):
        noise_key, drop_key = jax.random.split(key)
        where = filters.packing(batch["lengths"], batch["samples"].shape[0], lead, gap)
        x = _noisy(batch, where, f.noise_snr_db, noise_key)
        if f.wavelet_level:
            x = wavelet.denoise_packed(x, where, f.wavelet_level)
        if sos is not None:
            x = filters.filter_packed(sos, x, where, zero_phase=f.filter == "zero_phase")
        cut = _cut(x, where, geometry, capacity)
        mel, mask = clip_features(f, cut.samples, cut.own * cut.real, sample_rate_hz)
        logits = model(mel, mask, drop_key if train else None, total)
        return logits, cut.recording, cut.real

    def forward(model: CNNLSTM, batch: dict, capacity: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, recording, real = logits_of(model, batch, capacity, key, False, lambda x: x)
        log_p, log_q, _ = recording_log_probabilities(logits, recording, real, len(batch["lengths"]))
        return log_p, log_q

    def loss(model: CNNLSTM, batch: dict, capacity: int, key: jax.Array, threshold: jax.Array, total: Total):
        logits, recording, real = logits_of(model, batch, capacity, key, True, total)
        return clip_loss(loss_, logits, batch["labels"][recording], real, threshold, total)

    def init(rngs: nnx.Rngs) -> CNNLSTM:
        m = config.model
        frozen = "cnn" in tuple(config.optimizer.frozen)
        blocks = tuple(tuple(block) for block in m.blocks)
        return CNNLSTM(f.n_mels, blocks, m.hidden, m.cell, m.dropout, frozen, m.implementation, rngs=rngs)

    return Task(geometry, init, forward, loss)


def clip_features(f: ml_collections.ConfigDict, clips_BxT: jax.Array, own_B: jax.Array, sample_rate_hz: int):
    """Log-mel (B, n_mels, frames) and mask (B, frames) of clips (B, T) whose first own_B (B,) samples are real.

    1 is the loudest of the clip's own frames, 0 is `features.top_db` below it, and padding.
    """
    mel = spectrogram.log_mel(clips_BxT, sample_rate_hz, f.n_fft, f.hop, f.n_mels, htk=f.htk, ref=1.0, top_db=None)
    mask = (jnp.arange(mel.shape[-1]) * f.hop <= own_B[:, None]) & (own_B > 0)[:, None]
    peak = jnp.where(mask[:, None], mel, -jnp.inf).max((1, 2), keepdims=True)
    level = jnp.maximum(mel - jnp.where(jnp.isfinite(peak), peak, 0), -f.top_db)
    return jnp.where(mask[:, None], level / f.top_db + 1, 0), mask.astype(jnp.float32)


def clip_loss(loss_: ml_collections.ConfigDict, logits, labels, real, threshold, total: Total):
    """BCE or penalty-weighted BCE over clips, as `Task.loss` gives it."""
    log_p, log_q = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    mask = real.astype(logits.dtype)
    summed = -(mask * (labels * log_p + (1 - labels) * log_q)).sum()
    correct = (((jnp.exp(log_p) >= threshold) == (labels > 0)) & real).sum(dtype=jnp.int32)
    counts = Counts(summed, correct, real.sum(dtype=jnp.int32))
    if loss_.name == "bce":
        return summed, counts
    factor, own = penalty(log_p, labels, mask, threshold, loss_.alpha, loss_.normalize, loss_.slope, total)
    factor = jax.lax.stop_gradient(factor)
    objective = factor * summed
    if loss_.slope:  # the product rule's other half; its value is zero
        objective += jax.lax.stop_gradient(total(summed)) * (own - jax.lax.stop_gradient(own))
    return objective, counts._replace(loss=jax.lax.stop_gradient(factor * summed))


# ------------------------------------------------------------------------------------------- shared by the tasks


def _filter(f: ml_collections.ConfigDict, cutoff_hz: Any, sample_rate_hz: int, kind: str):
    """(second-order sections or None, free samples before a recording, free samples after it)."""
    if f.filter not in FILTERS:
        raise ValueError(f"features.filter={f.filter!r}: choose one of {', '.join(FILTERS)}")
    if not f.noise_snr_db > -float("inf"):
        raise ValueError(f"features.noise_snr_db={f.noise_snr_db}: give decibels, or inf for no noise")
    if f.filter == "none":
        return None, 0, 0
    try:
        sos = filters.butterworth(f.filter_order, cutoff_hz, sample_rate_hz, kind)
    except ValueError as error:
        names = "features.low_hz, features.high_hz" if kind == "bandpass" else "features.high_hz"
        raise ValueError(f"features.filter_order, {names}: {error}") from None
    lead = filters.edge_samples(sos)
    return sos, lead, lead + filters.settling_samples(sos)


def _noisy(batch: dict, where: filters.Packing, snr_db: float, key: jax.Array) -> jax.Array:
    """A batch's samples as float32 with full scale at 1, and white noise where it is asked for."""
    x = batch["samples"].astype(jnp.float32) / 32767
    return x if snr_db == float("inf") else filters.add_white_noise(x, where, snr_db, key)


class Cut(NamedTuple):
    """Windows, or rows of half-overlapping ones, cut from a packed batch: (J, ...) for a capacity of J."""

    samples: jax.Array  # (J, T), zero after the recording's end
    own: jax.Array  # (J,) how many samples are the recording's
    recording: jax.Array  # (J,) whose it is
    nth: jax.Array  # (J,) its number within that recording
    windows: jax.Array  # (J,) how many windows that recording has
    real: jax.Array  # (J,) False where the batch does not fill its capacity


def _cut(x_MxA: jax.Array, where: filters.Packing, geometry: Geometry, capacity: int) -> Cut:
    x, lengths, window = x_MxA.reshape(-1), where.lengths, geometry.window
    # Window or row j of the batch is number `nth` of its recording's.
    units = geometry.units(lengths)
    ends = jnp.cumsum(units)
    j = jnp.arange(capacity)
    recording = jnp.searchsorted(ends, j, side="right", method="compare_all").clip(max=len(lengths) - 1)
    nth = j - (ends - units)[recording]
    begin = nth * (window if geometry.shared else geometry.hop)
    samples = jax.vmap(lambda at: jax.lax.dynamic_slice(x, (at,), (window,)))(where.starts[recording] + begin)
    # Where the recording ends within the row, the next one begins: blank it.
    samples = jnp.where(begin[:, None] + jnp.arange(window) < lengths[recording][:, None], samples, 0)
    own = (lengths[recording] - begin).clip(0, window)
    return Cut(samples, own, recording, nth, geometry.windows(lengths)[recording], j < ends[-1])


def split(model: nnx.Module) -> tuple[Any, Any, Any]:
    """(graphdef, parameters, the rest) of a model, the latter two trees of plain arrays; `nnx.merge` undoes it."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return graphdef, nnx.as_pure(params), nnx.as_pure(rest)


class TrainState(NamedTuple):
    """All that the next step depends on besides the data: what a checkpoint holds."""

    step: jax.Array
    params: Any
    rest: Any  # running averages
    opt_state: Any
    sapt: thresholds.State  # of the decision threshold


def initial_state(
    task: Task, update: optax.GradientTransformation, seed: int, sapt: thresholds.State | None = None
) -> TrainState:
    """The state before the first step; without `sapt`, the threshold stays at 0.5."""
    _, params, rest = split(task.init(nnx.Rngs(seed)))
    return TrainState(jnp.zeros((), jnp.int32), params, rest, update.init(params), sapt or thresholds.init(interval=0))


TASKS = {"cnn": cnn, "hinf_lstm": hinf_lstm}


def make(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """The task that `config.task.name` names, for data prepared at `sample_rate_hz`."""
    if config.task.name not in TASKS:
        raise ValueError(f"task.name={config.task.name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[config.task.name](config, sample_rate_hz)
