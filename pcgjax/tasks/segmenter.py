"""The heart-sound segmenter: frames, their states, their loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging
from flax import nnx

from pcgjax.data.corpus import Corpus
from pcgjax.data.plan import Geometry
from pcgjax.datasets import UNANNOTATED
from pcgjax.features import filters
from pcgjax.models.segmenter import PatchSegmenter, Segmenter
from pcgjax.runtime.traced import is_known, is_on
from pcgjax.segmentation.decoding import durations
from pcgjax.segmentation.states import TARGETS, target_frames
from pcgjax.tasks.augment import masked_bands, recoloured, stretched
from pcgjax.tasks.base import Counts, Judgement, Task, Total, Trained, arithmetic_dtype, cut_windows, with_noise
from pcgjax.tasks.frames import FBANK_S, frame_features, frame_hop
from pcgjax.tasks.segmenter_model import SegmenterModel, judge_segmentation


def segmenter(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """The heart-sound segmenter: windows, shifted anew each time, log-mel frames, a score a frame; the loss is over
    annotated frames (SSAMBA paper, Eq. 1, for a binary target; cross-entropy for the four states).

    Raises:
      ValueError: a field that does not fit the prepared data's rate or another field; the message names it.
    """
    f, target = config.features, config.task.frames
    if target not in TARGETS:
        raise ValueError(f"task.frames={target!r}: choose one of {', '.join(TARGETS)}")
    if is_known(f.stretch) and (not 0 <= f.stretch < 1 or (f.stretch and config.model.name == "ssamba")):
        raise ValueError(f"features.stretch={f.stretch}: at least 0 and below 1, and 0 with model.name=ssamba")
    quiet = is_known(f.response_db) and not (f.response_db or f.noise)
    if (is_known(f.response_db) and not f.response_db >= 0) or (config.model.name == "ssamba" and not quiet):
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
    dtype = jnp.float32 if config.model.name == "ssamba" else arithmetic_dtype(config.model)
    wanted_of = target_frames(np.arange(5), target).astype(np.int32)  # of each state

    def logits_of(model: Segmenter, batch: dict, capacity: int, key: jax.Array, train: bool):
        noise_key, shift_key, augment_key, drop_key, stretch_key, colour_key = jax.random.split(key, 6)
        where = filters.packing(batch["lengths"], batch["samples"].shape[0], halo, halo)
        x = with_noise(batch, where, f.noise_snr_db, noise_key)
        shift = None
        if train:  # what a recording has beyond its windows is where they may move to
            room = jnp.maximum(where.lengths - geometry.windows(where.lengths) * window, 0)
            shift = (jax.random.uniform(shift_key, room.shape) * (room + 1)).astype(jnp.int32)
        cut = cut_windows(x, where, geometry, capacity, halo, shift)
        at = jnp.arange(window // hop)[None] * hop + hop // 2  # the middle of a frame
        real = (at < cut.real_samples[:, None]) & cut.real[:, None]
        features, _ = frame_features(config, cut.samples, real, sample_rate_hz)
        if train:
            features = recoloured(colour_key, features, real, f.response_db, f.noise)
            features = masked_bands(augment_key, features, f.masked_bands)
            if is_on(f.stretch):
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
        counts = counts_of(logits, wanted)
        return jax.tree.map(lambda x: jax.ops.segment_sum(x.sum(1), recording, len(batch["lengths"])), counts)

    def loss(model: Segmenter, batch: dict, capacity: int, key: jax.Array, threshold: jax.Array, total: Total):
        logits, wanted, _ = logits_of(model, batch, capacity, key, True)
        counts = jax.tree.map(jnp.sum, counts_of(logits, wanted))
        return counts.loss, counts

    def init(rngs: nnx.Rngs) -> Segmenter | PatchSegmenter:
        m = config.model
        outputs = 4 if target == "states" else 1
        if m.name == "ssamba":
            frames, stride = (window + 2 * halo - FBANK_S[0]) // FBANK_S[1] + 1, hop // FBANK_S[1]
            return PatchSegmenter(
                m.width, m.depth, frames, stride, outputs, m.remat, m.bfloat16, m.implementation, rngs=rngs
            )
        return Segmenter(
            f.n_mels, outputs, m.width, m.depth, m.d_state, m.expand, m.dropout, m.bidirectional, m.implementation,
            rngs=rngs,
        )  # fmt: skip

    def remember(corpus: Corpus, indices: np.ndarray) -> dict:
        """How long states last, for the decoding: `segmentation.decoding.durations` of the training annotations."""
        annotations = [corpus.rows[i]["annotations"] for i in indices]
        return {"log_duration": durations(annotations, f.step_s).tolist()}

    return Task(
        geometry, init, forward, loss, events, classifies=False, shapes=3, dtype=dtype, usable=annotated_rows,
        remember=remember, conclude=judge,
    )  # fmt: skip


def annotated_rows(rows: list[dict], prepared: str) -> list[dict]:
    """The recordings with annotated states, which a segmenter learns from.

    Raises:
      ValueError: there are none.
    """
    annotated = [row for row in rows if any(start < end for start, end, _ in row["annotations"])]
    if 0 < len(annotated) < len(rows):
        logging.info("%d of %d recordings have no annotation: left out", len(rows) - len(annotated), len(rows))
    if not annotated:
        raise ValueError(
            f"data.prepared={prepared}: no recording has annotated states; a segmenter learns from CirCor's .tsv, "
            "CinC 2016's StateAns.mat or synthetic recordings"
        )
    return annotated


def judge(trained: Trained) -> Judgement:
    """`Task.conclude` of a segmenter: its states on the validation and test recordings, decoded."""
    log_duration = np.array(trained.meta["log_duration"], np.float32)
    model = SegmenterModel(
        trained.config, trained.graphdef, trained.params, trained.rest, trained.corpus.sample_rate_hz, log_duration
    )
    validation, rows, _ = judge_segmentation(model, trained.corpus, trained.parts["validation"], "validation")
    test, test_rows, examples = judge_segmentation(model, trained.corpus, trained.parts["test"], "test")
    results = {"segmentation": test | {"validation": validation["test"]}}
    return Judgement(results, rows + test_rows, examples)


def events(corpus: Corpus) -> np.ndarray:
    """(N, E) int32, where states begin: 8 * sample + state, in order of time, as many as the most of any recording.

    The end of a span after which none follows begins UNANNOTATED. Rows are filled up with the largest int32.
    """
    rate_hz, lists = corpus.sample_rate_hz, []
    for row in corpus.rows:
        starts: dict[int, int] = {}
        for start_s, end_s, state in row["annotations"]:
            start, end = round(start_s * rate_hz), round(end_s * rate_hz)
            if start < end:
                starts[start], starts[end] = state, UNANNOTATED
        lists.append(sorted(8 * sample + state for sample, state in starts.items()))
    out = np.full((len(lists), max(map(len, lists), default=0) or 1), np.iinfo(np.int32).max, np.int32)
    for i, listed in enumerate(lists):
        out[i, : len(listed)] = listed
    return out
