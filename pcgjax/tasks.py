"""What each experiment trains: features + model + loss, a few lines each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from pcgjax import audio, segmentation, thresholds
from pcgjax.datasets import UNANNOTATED
from pcgjax.features import filters, spectrogram, wavelet
from pcgjax.input_pipeline import Corpus, Geometry
from pcgjax.losses import penalty, recording_log_probabilities
from pcgjax.models.cnn1d import CNN1D
from pcgjax.models.hinf_lstm import CNNLSTM
from pcgjax.models.image import ImageClassifier
from pcgjax.models.segmenter import PatchSegmenter, Segmenter
from pcgjax.models.ssamba import PATCH, RECONSTRUCTION_WEIGHT, SSAMBA, pretrain_losses
from pcgjax.traced import known, on

FILTERS = ("none", "zero_phase", "causal")


class Counts(NamedTuple):
    """Sums over a batch's samples: recordings or clips, whichever the loss is over."""

    loss: jax.Array
    correct: jax.Array
    samples: jax.Array


def no_counts() -> Counts:
    return Counts(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


Total = Callable[[jax.Array], jax.Array]  # sums an array over all device groups' shares of a batch


class Task(NamedTuple):
    """One experiment. A batch here is one device group's: samples (M, ALIGN) int16, lengths, labels, ids (R, ...)."""

    geometry: Geometry
    init: Callable[[nnx.Rngs], nnx.Module]
    # (model, batch, capacity, key) -> log p (R,), log (1 - p) (R,) of each recording being positive; of a task that
    # does not classify recordings, each recording's own Counts.
    forward: Callable[[Any, dict, int, jax.Array], tuple[jax.Array, ...]]
    # (model, batch, capacity, key, threshold, total) -> what to differentiate, Counts. The former is a sum: over all
    # groups, and divided by all their samples, it is the loss. The model's running averages change in place.
    loss: Callable[[Any, dict, int, jax.Array, jax.Array, Total], tuple[jax.Array, Counts]]
    labels: Callable[[Corpus], np.ndarray]  # (N, ...) of a corpus' recordings: what batch["labels"] holds
    classifies: bool = True  # recordings
    shapes: int = 8  # of batches, each compiled: more waste less, and take longer to compile
    dtype: Any = jnp.float32  # of the model's arithmetic; parameters, and all sums over time, stay float32
    # What `forward` takes -> logits (J,) of the clips, whose each is (J,), whether it counts (J,); of classifiers.
    clips: Callable[[Any, dict, int, jax.Array], tuple[jax.Array, jax.Array, jax.Array]] | None = None


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
    geometry, dtype = Geometry(window, hop, lead, gap), _dtype(config.model)

    def clips(model: CNN1D, batch: dict, capacity: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        where = filters.packing(batch["lengths"], batch["samples"].shape[0], lead, gap)
        x = _noisy(batch, where, f.noise_snr_db, key)
        if sos is not None:
            x = filters.filter_packed(sos, x, where, zero_phase=f.filter == "zero_phase")
        cut = _cut(filters.zscore_packed(x, where), where, geometry, capacity)
        recording = cut.recording
        if geometry.shared:
            logits = model.half_overlapping(cut.samples.astype(dtype))
            second = cut.real & (2 * cut.nth + 1 < cut.windows)
            mask = jnp.concatenate([cut.real & (2 * cut.nth < cut.windows), second[:-1]])
            recording = jnp.concatenate([recording, recording[:-1]])
        else:
            logits, mask = model(cut.samples.astype(dtype)), cut.real & (cut.nth < cut.windows)
        return logits.astype(jnp.float32), recording, mask

    def forward(model: CNN1D, batch: dict, capacity: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return recording_log_probabilities(*clips(model, batch, capacity, key), len(batch["lengths"]))[:2]

    def loss(model: CNN1D, batch: dict, capacity: int, key: jax.Array, threshold: jax.Array, total: Total):
        used, y = batch["lengths"] > 0, batch["labels"]
        log_p, log_q = forward(model, batch, capacity, key)
        correct = (((log_p > log_q) == (y > 0)) & used).sum(dtype=jnp.int32)
        summed = -((y * log_p + (1 - y) * log_q) * used).sum()
        return summed, Counts(summed, correct, used.sum(dtype=jnp.int32))

    def init(rngs: nnx.Rngs) -> CNN1D:
        m = config.model
        return CNN1D(window, tuple(m.filters), m.kernel_size, m.hidden, rngs=rngs)

    labels = lambda corpus: corpus.labels(config.task.target)
    return Task(geometry, init, forward, loss, labels, dtype=dtype, clips=clips)


def hinf_lstm(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """The CNN with a recurrent layer on 5 s clips (H-infinity LSTM paper): noise, wavelet denoising, low-pass, clips,
    log-mel in dB below the clip's peak, CNN-LSTM; the loss is over clips, a recording's probability their mean.

    A recording that is shorter than a clip is one, padded, whose padding changes nothing; the rest of a longer one that
    does not fill a clip is left out.

    Raises:
      ValueError: a field that does not fit the prepared data's rate or another field; the message names it.
    """

    def init(rngs: nnx.Rngs) -> CNNLSTM:
        m = config.model
        frozen = "cnn" in tuple(config.optimizer.frozen)
        blocks = tuple(tuple(block) for block in m.blocks)
        return CNNLSTM(config.features.n_mels, blocks, m.hidden, m.cell, m.dropout, frozen, m.implementation, rngs=rngs)

    return _of_clips(config, sample_rate_hz, init, len(config.model.blocks))


def image(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """An image net (H-infinity LSTM paper, table II) on the clips of `hinf_lstm`, judged by the same losses.

    Raises: as `hinf_lstm`.
    """
    m = config.model
    if known(m.dropout) and not 0 <= m.dropout < 1:
        raise ValueError(f"model.dropout={m.dropout}: must be at least 0 and below 1")

    def init(rngs: nnx.Rngs) -> ImageClassifier:
        f = config.features
        frames = spectrogram.frames(round(f.window_s * sample_rate_hz), f.hop)
        blocks = m.blocks if isinstance(m.blocks, int) else tuple(m.blocks)
        return ImageClassifier(m.name, f.n_mels, frames, m.width, blocks, rngs=rngs)

    return _of_clips(config, sample_rate_hz, init)


def _of_clips(config: ml_collections.ConfigDict, sample_rate_hz: int, init: Callable, poolings: int = 0) -> Task:
    """The task of a model that hears log-mel clips; poolings: by 2, along time, that it needs frames for."""
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
    if f.hop < 1 or clip < f.hop * 2**poolings:
        more = f" and {poolings} poolings" if poolings else ""
        raise ValueError(f"features.window_s={f.window_s}: {clip} samples are too few for features.hop={f.hop}{more}")
    geometry, dtype = Geometry(clip, clip, lead, gap), _dtype(config.model)

    def logits_of(model: Any, batch: dict, capacity: int, key: jax.Array, train: bool, total: Total):
        noise_key, drop_key = jax.random.split(key)
        where = filters.packing(batch["lengths"], batch["samples"].shape[0], lead, gap)
        x = _noisy(batch, where, f.noise_snr_db, noise_key)
        if f.wavelet_level:
            x = wavelet.denoise_packed(x, where, f.wavelet_level)
        if sos is not None:
            x = filters.filter_packed(sos, x, where, zero_phase=f.filter == "zero_phase")
        cut = _cut(x, where, geometry, capacity)
        mel, mask = clip_features(f, cut.samples, cut.own * cut.real, sample_rate_hz)
        logits = model(mel.astype(dtype), mask.astype(dtype), drop_key if train else None, total, config.model.dropout)
        return logits.astype(jnp.float32), cut.recording, cut.real

    def clips(model: Any, batch: dict, capacity: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return logits_of(model, batch, capacity, key, False, lambda x: x)

    def forward(model: Any, batch: dict, capacity: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return recording_log_probabilities(*clips(model, batch, capacity, key), len(batch["lengths"]))[:2]

    def loss(model: Any, batch: dict, capacity: int, key: jax.Array, threshold: jax.Array, total: Total):
        logits, recording, real = logits_of(model, batch, capacity, key, True, total)
        return clip_loss(loss_, logits, batch["labels"][recording], real, threshold, total)

    labels = lambda corpus: corpus.labels(config.task.target)
    return Task(geometry, init, forward, loss, labels, dtype=dtype, clips=clips)


def clip_features(f: ml_collections.ConfigDict, clips_BxT: jax.Array, own_B: jax.Array, sample_rate_hz: int):
    """Log-mel (B, n_mels, frames) and mask (B, frames) of clips (B, T) whose first own_B (B,) samples are real.

    1 is the loudest of the clip's own frames, 0 is `features.top_db` below it, and padding.
    """
    mel = spectrogram.log_mel(clips_BxT, sample_rate_hz, f.n_fft, f.hop, f.n_mels, htk=f.htk, ref=1.0, top_db=None)
    mask = (jnp.arange(mel.shape[-1])[None] * f.hop <= own_B[:, None]) & (own_B > 0)[:, None]
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
    if on(loss_.slope):  # the product rule's other half; its value is zero
        objective += jax.lax.stop_gradient(total(summed)) * (own - jax.lax.stop_gradient(own))
    return objective, counts._replace(loss=jax.lax.stop_gradient(factor * summed))


def segmenter(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """The heart-sound segmenter: windows, shifted anew each time, log-mel frames, a score a frame; the loss is over
    annotated frames (SSAMBA paper, Eq. 1, for a binary target; cross-entropy for the four states).

    Raises:
      ValueError: a field that does not fit the prepared data's rate or another field; the message names it.
    """
    f, target = config.features, config.task.frames
    if target not in segmentation.TARGETS:
        raise ValueError(f"task.frames={target!r}: choose one of {', '.join(segmentation.TARGETS)}")
    if known(f.stretch) and (not 0 <= f.stretch < 1 or (f.stretch and config.model.name == "ssamba")):
        raise ValueError(f"features.stretch={f.stretch}: at least 0 and below 1, and 0 with model.name=ssamba")
    quiet = known(f.response_db) and not (f.response_db or f.noise)
    if (known(f.response_db) and not f.response_db >= 0) or (config.model.name == "ssamba" and not quiet):
        raise ValueError(
            f"features.response_db={f.response_db}, features.noise={f.noise}: at least 0, and with model.name=ssamba 0 "
            "and False: they are of frames whose level was taken off"
        )
    hop, halo = frame_hop(config, sample_rate_hz)
    window = round(f.window_s * sample_rate_hz) // hop * hop
    if window < hop:
        raise ValueError(f"features.window_s={f.window_s} is shorter than features.step_s={f.step_s}")
    geometry = Geometry(window, window, halo, halo)
    # SSAMBA chooses by itself what it computes in bfloat16.
    dtype = jnp.float32 if config.model.name == "ssamba" else _dtype(config.model)
    wanted_of = segmentation.target_frames(np.arange(5), target).astype(np.int32)  # of each state

    def logits_of(model: Segmenter, batch: dict, capacity: int, key: jax.Array, train: bool):
        noise_key, shift_key, augment_key, drop_key, stretch_key, colour_key = jax.random.split(key, 6)
        where = filters.packing(batch["lengths"], batch["samples"].shape[0], halo, halo)
        x = _noisy(batch, where, f.noise_snr_db, noise_key)
        shift = None
        if train:  # what a recording has beyond its windows is where they may move to
            room = jnp.maximum(where.lengths - geometry.windows(where.lengths) * window, 0)
            shift = (jax.random.uniform(shift_key, room.shape) * (room + 1)).astype(jnp.int32)
        cut = _cut(x, where, geometry, capacity, halo, shift)
        at = jnp.arange(window // hop)[None] * hop + hop // 2  # the middle of a frame
        real = (at < cut.own[:, None]) & cut.real[:, None]
        features, _ = frame_features(config, cut.samples, real, sample_rate_hz)
        if train:
            features = recoloured(colour_key, features, real, f.response_db, f.noise)
            features = masked_bands(augment_key, features, f.masked_bands)
            if on(f.stretch):
                features, real, source = stretched(stretch_key, features, real, f.stretch)
                at = at[0, source]
        dropout = config.model.get("dropout", 0.0)  # SSAMBA has none
        logits = model(features.astype(dtype), drop_key if train else None, dropout).astype(jnp.float32)
        # An event is 8 * its sample + its state: the last one that is not after the frame's middle.
        events = batch["labels"][cut.recording]
        middle = 8 * (cut.begin[:, None] + at) + 7
        last = jax.vmap(lambda e, t: jnp.searchsorted(e, t, side="right"))(events, middle) - 1
        states = jnp.where(last >= 0, jnp.take_along_axis(events, jnp.maximum(last, 0), 1) & 7, UNANNOTATED)
        return logits, jnp.where(real, jnp.asarray(wanted_of)[states], -1), cut.recording

    def counts_of(logits: jax.Array, wanted: jax.Array) -> Counts:
        """(J, T) a frame; frames whose target is -1 do not count."""
        counted = wanted >= 0
        if target == "states":
            log_p = jax.nn.log_softmax(logits)
            loss = -jnp.take_along_axis(log_p, jnp.maximum(wanted, 0)[..., None], -1)[..., 0]
            correct = logits.argmax(-1) == wanted
        else:
            loss = optax.sigmoid_binary_cross_entropy(logits[..., 0], jnp.maximum(wanted, 0).astype(logits.dtype))
            correct = (logits[..., 0] > 0) == (wanted > 0)
        return Counts(jnp.where(counted, loss, 0), (correct & counted).astype(jnp.int32), counted.astype(jnp.int32))

    def forward(model: Segmenter, batch: dict, capacity: int, key: jax.Array) -> Counts:
        logits, wanted, recording = logits_of(model, batch, capacity, key, False)
        of = lambda x: jax.ops.segment_sum(x.sum(1), recording, len(batch["lengths"]))
        return jax.tree.map(of, counts_of(logits, wanted))

    def loss(model: Segmenter, batch: dict, capacity: int, key: jax.Array, threshold: jax.Array, total: Total):
        logits, wanted, _ = logits_of(model, batch, capacity, key, True)
        counts = jax.tree.map(jnp.sum, counts_of(logits, wanted))
        return counts.loss, counts

    def init(rngs: nnx.Rngs) -> Segmenter | PatchSegmenter:
        m = config.model
        outputs = 4 if target == "states" else 1
        if m.name == "ssamba":
            frames, stride = (window + 2 * halo - _FBANK_S[0]) // _FBANK_S[1] + 1, hop // _FBANK_S[1]
            return PatchSegmenter(
                m.width, m.depth, frames, stride, outputs, m.remat, m.bfloat16, m.implementation, rngs=rngs
            )
        return Segmenter(
            f.n_mels, outputs, m.width, m.depth, m.d_state, m.expand, m.dropout, m.bidirectional, m.implementation,
            rngs=rngs,
        )  # fmt: skip

    return Task(geometry, init, forward, loss, events, classifies=False, shapes=3, dtype=dtype)


def events(corpus: Corpus) -> np.ndarray:
    """(N, E) int32, where states begin: 8 * sample + state, in order of time, as many as the most of any recording.

    The end of a span after which none follows begins UNANNOTATED. Rows are filled up with the largest int32.
    """
    rate_hz, lists = corpus.sample_rate_hz, []
    for row in corpus.rows:
        found: dict[int, int] = {}
        for start_s, end_s, state in row["annotations"]:
            start, end = round(start_s * rate_hz), round(end_s * rate_hz)
            if start < end:
                found[start], found[end] = state, UNANNOTATED
        lists.append(sorted(8 * sample + state for sample, state in found.items()))
    out = np.full((len(lists), max(map(len, lists), default=0) or 1), np.iinfo(np.int32).max, np.int32)
    for i, listed in enumerate(lists):
        out[i, : len(listed)] = listed
    return out


_SSAMBA_RATE_HZ = 16000
_FBANK_S = (400, 160)  # samples of a filter bank's frame, and from one to the next


def frame_hop(config: ml_collections.ConfigDict, sample_rate_hz: int) -> tuple[int, int]:
    """(samples a frame, samples by which what it is computed from is longer on either side).

    Raises:
      ValueError: the step is no whole number of samples, or the analysis window or the mel bands do not fit.
    """
    f, name = config.features, config.model.name
    hop = round(f.step_s * sample_rate_hz)
    if hop < 1 or abs(hop - f.step_s * sample_rate_hz) > 1e-6:
        raise ValueError(f"features.step_s={f.step_s}: must be a whole number of samples at {sample_rate_hz} Hz")
    if name == "ssamba":
        if sample_rate_hz != _SSAMBA_RATE_HZ:
            raise ValueError(f"model.name=ssamba hears {_SSAMBA_RATE_HZ} Hz, the data are prepared at {sample_rate_hz}")
        if hop % _FBANK_S[1] or hop > PATCH * _FBANK_S[1]:
            raise ValueError(f"features.step_s={f.step_s}: of SSAMBA a multiple of 0.01, at most {PATCH / 100}")
        return hop, ((PATCH - 1) * _FBANK_S[1] + _FBANK_S[0] - hop) // 2
    if name != "frames":
        raise ValueError(f"model.name={name!r}: choose frames or ssamba")
    if f.n_fft < hop or (f.n_fft - hop) % 2:
        raise ValueError(f"features.n_fft={f.n_fft}: must be features.step_s, {hop} samples, and an even number more")
    try:
        spectrogram.mel_filterbank(sample_rate_hz, f.n_fft, f.n_mels, f.low_hz, f.high_hz)
    except ValueError as error:
        raise ValueError(f"features.n_fft, features.n_mels, features.low_hz, features.high_hz: {error}") from None
    return hop, (f.n_fft - hop) // 2


_LEVEL_FRAMES = 100  # time constant of the running level
_SILENCE = 1e-20  # mel power
_FEATURE_DB = 20 / math.log(10)  # of one unit of `frame_features`: 2 nats of power


def frame_features(
    config: ml_collections.ConfigDict,
    samples_BxS: jax.Array,
    real_BxT: jax.Array,
    sample_rate_hz: int,
    level: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Log-mel (B, T, n_mels) of T frames from their samples and `halo` more on either side, whatever the gain.

    Of SSAMBA its filter bank (B, T', 128), which depends on the gain as published.

    The level that is taken off is the mean of the window's real frames; causal, the running mean of the frames so far,
    (B,) sum and weight of which are `level`, and are returned for the next piece of the recording.
    """
    f = config.features
    before = (jnp.zeros(len(samples_BxS)), jnp.zeros(len(samples_BxS))) if level is None else level
    if config.model.name == "ssamba":
        return ssamba_input(samples_BxS), before
    hop, _ = frame_hop(config, sample_rate_hz)
    mel = spectrogram.mel_of_frames(samples_BxS, sample_rate_hz, f.n_fft, hop, f.n_mels, f.low_hz, f.high_hz)
    # Digital silence has no level to take off; all else is far above this floor.
    x = jnp.log(mel + _SILENCE)
    loud, real = x.mean(-1), (real_BxT & (mel.max(-1) > _SILENCE)).astype(x.dtype)
    if config.model.bidirectional:
        mean = ((loud * real).sum(1) / jnp.maximum(real.sum(1), 1))[:, None]
    else:

        def running(carry, now):
            total, weight = (c * (1 - 1 / _LEVEL_FRAMES) + n for c, n in zip(carry, now, strict=True))
            return (total, weight), total / jnp.maximum(weight, 1e-6)

        before, mean = jax.lax.scan(running, before, ((loud * real).T, real.T))
        mean = mean.T
    # 8 nats below the level is silence; 2 nats are about a standard deviation.
    return jnp.where(real_BxT[..., None], jnp.maximum(x - mean[..., None], -8) / 2, 0), before


def ssamba_input(samples_BxS: jax.Array) -> jax.Array:
    """Samples at 16 kHz -> what SSAMBA hears, (B, frames, 128): their mean taken off, filter bank, normalised."""
    fbank = spectrogram.kaldi_fbank(samples_BxS - samples_BxS.mean(-1, keepdims=True))
    return (fbank + 4.2677393) / (2 * 4.5689974)


class Encoder(nnx.Module):
    """SSAMBA under the name that it has in a segmenter."""

    def __init__(self, encoder: SSAMBA):
        self.encoder = encoder


def ssamba_pretrain(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """Self-supervised pre-training of SSAMBA on windows of recordings, labelled or not: masked patches are told apart
    and reconstructed (SSAST, algorithm 1); a window that is not full is padded with the quiet of its own mean.

    Raises:
      ValueError: a field that does not fit the prepared data's rate or another field; the message names it.
    """
    f, m = config.features, config.model
    if sample_rate_hz != _SSAMBA_RATE_HZ:
        raise ValueError(f"SSAMBA hears {_SSAMBA_RATE_HZ} Hz, the data are prepared at {sample_rate_hz}")
    frames = round(f.window_s * 100)
    if frames < PATCH:
        raise ValueError(f"features.window_s={f.window_s}: shorter than a patch of {PATCH} frames of 10 ms")
    window = (frames - 1) * _FBANK_S[1] + _FBANK_S[0]
    geometry = Geometry(window, window, 0, 0)

    def losses(model: Encoder, batch: dict, capacity: int, key: jax.Array):
        mask_key, shift_key = jax.random.split(key)
        where = filters.packing(batch["lengths"], batch["samples"].shape[0], 0, 0)
        room = jnp.maximum(where.lengths - geometry.windows(where.lengths) * window, 0)
        shift = (jax.random.uniform(shift_key, room.shape) * (room + 1)).astype(jnp.int32)
        cut = _cut(batch["samples"].astype(jnp.float32) / 32767, where, geometry, capacity, shift=shift)
        x = ssamba_input(cut.samples)
        one = lambda x, key: pretrain_losses(model.encoder, x[None], key, m.mask_patches)
        each = jax.vmap(one)(x.astype(jnp.bfloat16) if m.bfloat16 else x, jax.random.split(mask_key, capacity))
        return each, cut

    def counts_of(model: Encoder, batch: dict, capacity: int, key: jax.Array) -> tuple[Counts, Any]:
        """(J,) a window: its patches, and how many of them were told apart."""
        each, cut = losses(model, batch, capacity, key)
        total = (each.infonce + RECONSTRUCTION_WEIGHT * each.mse) * m.mask_patches
        correct = jnp.round(each.accuracy * m.mask_patches).astype(jnp.int32)
        counts = Counts(total, correct, jnp.full(capacity, m.mask_patches, jnp.int32))
        return jax.tree.map(lambda x: jnp.where(cut.real, x, 0), counts), cut.recording

    def forward(model: Encoder, batch: dict, capacity: int, key: jax.Array) -> Counts:
        counts, recording = counts_of(model, batch, capacity, key)
        return jax.tree.map(lambda x: jax.ops.segment_sum(x, recording, len(batch["lengths"])), counts)

    def loss(model: Encoder, batch: dict, capacity: int, key: jax.Array, threshold: jax.Array, total: Total):
        counts = jax.tree.map(jnp.sum, counts_of(model, batch, capacity, key)[0])
        return counts.loss, counts

    def init(rngs: nnx.Rngs) -> Encoder:
        return Encoder(
            SSAMBA(
                m.width, m.depth, frames, PATCH, pretraining=True, remat=m.remat, implementation=m.implementation,
                rngs=rngs,
            )
        )  # fmt: skip

    nothing = lambda corpus: np.zeros(len(corpus.rows), np.float32)
    return Task(geometry, init, forward, loss, nothing, classifies=False, shapes=3)


def stretched(
    key: jax.Array, x_BxTxF: jax.Array, real_BxT: jax.Array, share: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each item made slower or faster by up to `share`, about its middle: another heart rate, the same sounds.

    Returns: (frames, which of them are real, the frame (B, T) that each was).
    """
    frames = x_BxTxF.shape[1]
    middle = (frames - 1) / 2
    rate = jax.random.uniform(key, (len(x_BxTxF), 1), minval=1 - share, maxval=1 + share)
    source = jnp.round(middle + (jnp.arange(frames)[None] - middle) * rate).astype(jnp.int32)
    inside, source = (source >= 0) & (source < frames), source.clip(0, frames - 1)
    real = inside & jnp.take_along_axis(real_BxT, source, 1)
    return jnp.where(real[..., None], jnp.take_along_axis(x_BxTxF, source[..., None], 1), 0), real, source


def masked_bands(key: jax.Array, x_BxTxF: jax.Array, most: int) -> jax.Array:
    """SpecAugment's frequency mask (Park et al. 2019): in each item up to `most` neighbouring bands are set to 0."""
    if not most:
        return x_BxTxF
    batch, bands = x_BxTxF.shape[0], x_BxTxF.shape[2]
    one, two = jax.random.split(key)
    size = jax.random.randint(one, (batch, 1), 0, most + 1)
    first = (jax.random.uniform(two, (batch, 1)) * (bands - size + 1)).astype(jnp.int32)
    band = jnp.arange(bands)[None]
    return jnp.where(((band >= first) & (band < first + size))[:, None], 0, x_BxTxF)


def recoloured(key: jax.Array, x_BxTxF: jax.Array, real_BxT: jax.Array, response_db: float, noise: bool) -> jax.Array:
    """Log-mel frames as another stethoscope in another room would have given them, each item anew.

    A frequency response that varies slowly over the bands, `response_db` dB its standard deviation at the edges;
    with `noise`, stationary noise of another such colour, from inaudible to as loud as the mean frame.
    """
    if not on(response_db) and not noise:
        return x_BxTxF
    batch, _, bands = x_BxTxF.shape
    response_key, colour_key, level_key, power_key = jax.random.split(key, 4)
    order = jnp.arange(1, 4)
    shape = jnp.cos(jnp.pi * order[:, None] * (jnp.arange(bands)[None] + 0.5) / bands) / order[:, None]
    scale = response_db / _FEATURE_DB / 1.17  # sqrt(1 + 1/4 + 1/9)
    curve = lambda key: scale * (jax.random.normal(key, (batch, len(order))) @ shape)[:, None]
    x = x_BxTxF + curve(response_key)
    if noise:
        level = jax.random.uniform(level_key, (batch, 1, 1), minval=-5.0, maxval=0.0) + curve(colour_key)
        power = jnp.log(jax.random.exponential(power_key, x.shape) + 1e-6)
        x = jnp.logaddexp(2 * x, 2 * level + power) / 2
    real = real_BxT[..., None]
    mean = jnp.where(real, x, 0).sum((1, 2), keepdims=True) / (jnp.maximum(real.sum(1, keepdims=True), 1) * bands)
    return jnp.where(real, x - mean, 0)


# ------------------------------------------------------------------------------------------- shared by the tasks


def _filter(f: ml_collections.ConfigDict, cutoff_hz: Any, sample_rate_hz: int, kind: str):
    """(second-order sections or None, free samples before a recording, free samples after it)."""
    if f.filter not in FILTERS:
        raise ValueError(f"features.filter={f.filter!r}: choose one of {', '.join(FILTERS)}")
    if known(f.noise_snr_db) and not f.noise_snr_db > -float("inf"):
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
    return filters.add_white_noise(x, where, snr_db, key) if on(snr_db, off=float("inf")) else x


class Cut(NamedTuple):
    """Windows, or rows of half-overlapping ones, cut from a packed batch: (J, ...) for a capacity of J."""

    samples: jax.Array  # (J, T), zero after the recording's end
    own: jax.Array  # (J,) how many samples are the recording's
    begin: jax.Array  # (J,) the sample of the recording at which it begins
    recording: jax.Array  # (J,) whose it is
    nth: jax.Array  # (J,) its number within that recording
    windows: jax.Array  # (J,) how many windows that recording has
    real: jax.Array  # (J,) False where the batch does not fill its capacity


def _cut(
    x_MxA: jax.Array, where: filters.Packing, geometry: Geometry, capacity: int, halo: int = 0, shift: Any = None
) -> Cut:
    """`halo`: samples to add on either side; `shift` (R,): by how many samples a recording's windows start later."""
    x, lengths, window = x_MxA.reshape(-1), where.lengths, geometry.window
    # Window or row j of the batch is number `nth` of its recording's.
    units = geometry.units(lengths)
    ends = jnp.cumsum(units)
    j = jnp.arange(capacity)
    recording = jnp.searchsorted(ends, j, side="right", method="compare_all").clip(max=len(lengths) - 1)
    nth = j - (ends - units)[recording]
    begin = nth * (window if geometry.shared else geometry.hop)
    if shift is not None:
        begin += shift[recording]
    size = window + 2 * halo
    starts = where.starts[recording] + begin - halo
    samples = jax.vmap(lambda at: jax.lax.dynamic_slice(x, (at,), (size,)))(starts)
    # Where the recording ends within the row, the next one begins: blank it.
    place = begin[:, None] - halo + jnp.arange(size)[None]
    own = place < lengths[recording][:, None]
    samples = jnp.where(own & (place >= 0) if halo else own, samples, 0)
    own = (lengths[recording] - begin).clip(0, window)
    return Cut(samples, own, begin, recording, nth, geometry.windows(lengths)[recording], j < ends[-1])


def split(model: nnx.Module) -> tuple[Any, Any, Any]:
    """(graphdef, parameters, the rest) of a model, the latter two trees of plain arrays; `nnx.merge` undoes it."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return graphdef, nnx.as_pure(params), nnx.as_pure(rest)


def merged(task: Task, graphdef: Any, params: Any, rest: Any) -> Any:
    """The model, its parameters in the type in which it computes; gradients come back in their own."""
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(task.dtype), params), rest)


def _dtype(model: ml_collections.ConfigDict) -> Any:
    return jnp.bfloat16 if model.get("bfloat16", False) else jnp.float32  # runs of earlier versions say nothing


def embed(task: Task, model: Any, batch: dict, capacity: int, key: jax.Array) -> jax.Array:
    """(R, D) what a classifier's last unit is given, the mean over each recording's clips; zeros where it has none."""
    model = nnx.clone(model)  # the caller's keeps its last unit
    holder, name = _last_unit(model)
    seen = []

    def look(h_JxD: jax.Array) -> jax.Array:  # stands in the last unit's place
        seen.append(h_JxD.astype(jnp.float32))
        return jnp.zeros((len(h_JxD), 1), h_JxD.dtype)

    assert task.clips is not None
    setattr(holder, name, look)
    _, recording, mask = task.clips(model, batch, capacity, key)
    [h_JxD] = seen
    R = len(batch["lengths"])
    summed = jax.ops.segment_sum(jnp.where(mask[:, None], h_JxD, 0), recording, R)
    count = jax.ops.segment_sum(mask.astype(jnp.float32), recording, R)
    return summed / jnp.maximum(count, 1)[:, None]


def embedded(model: Any) -> int:
    """The D of `embed`."""
    holder, name = _last_unit(model)
    return getattr(holder, name).in_features


def _last_unit(model: Any) -> tuple[Any, str]:
    if isinstance(model, CNNLSTM):
        return model.recurrent, "output"
    return model, "head" if isinstance(model, ImageClassifier) else "output"


class TrainState(NamedTuple):
    """All that the next step depends on besides the data: what a checkpoint holds."""

    step: jax.Array
    params: Any
    rest: Any  # running averages
    opt_state: Any
    sapt: thresholds.State  # of the decision threshold


def initial_state(
    task: Task, update: optax.GradientTransformation, seed: int | jax.Array, sapt: thresholds.State | None = None
) -> TrainState:
    """The state before the first step; without `sapt`, the threshold stays at 0.5."""
    _, params, rest = split(task.init(nnx.Rngs(jax.random.key(seed))))
    return TrainState(jnp.zeros((), jnp.int32), params, rest, update.init(params), sapt or thresholds.init(interval=0))


TASKS = {"cnn": cnn, "hinf_lstm": hinf_lstm, "image": image, "segmenter": segmenter, "ssamba_pretrain": ssamba_pretrain}


def make(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """The task that `config.task.name` names, for data prepared at `sample_rate_hz`."""
    if config.task.name not in TASKS:
        raise ValueError(f"task.name={config.task.name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[config.task.name](config, sample_rate_hz)
