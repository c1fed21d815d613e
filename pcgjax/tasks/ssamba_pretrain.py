"""Self-supervised pre-training of SSAMBA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from pcgjax.data.corpus import Corpus
from pcgjax.data.plan import Geometry
from pcgjax.features import filters
from pcgjax.models.ssamba import PATCH, RECONSTRUCTION_WEIGHT, SSAMBA, pretrain_losses
from pcgjax.models.ssamba_checkpoint import save_torch_checkpoint
from pcgjax.tasks.base import Counts, Judgement, Task, Total, Trained, cut_windows
from pcgjax.tasks.frames import FBANK_S, SSAMBA_RATE_HZ, ssamba_input


class Encoder(nnx.Module):
    """SSAMBA under the name that it has in a segmenter."""

    def __init__(self, encoder: SSAMBA):
        self.encoder = encoder


def no_labels(corpus: Corpus) -> np.ndarray:
    """Zeros (N,): `Task.labels` of a task that learns from the audio alone."""
    return np.zeros(len(corpus.rows), np.float32)


def export(trained: Trained) -> Judgement:
    """`Task.conclude` of pre-training: writes the encoder to WORKDIR/ssamba.pth, in the public code's layout."""
    encoder = nnx.merge(trained.graphdef, trained.params, trained.rest).encoder
    save_torch_checkpoint(encoder, trained.workdir / "ssamba.pth")
    return Judgement({}, [], [])


def ssamba_pretrain(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """Self-supervised pre-training of SSAMBA on windows of recordings, labelled or not: masked patches are told apart
    and reconstructed (SSAST, algorithm 1); a window that is not full is padded with the quiet of its own mean.

    Raises:
      ValueError: a field that does not fit the prepared data's rate or another field; the message names it.
    """
    f, m = config.features, config.model
    if sample_rate_hz != SSAMBA_RATE_HZ:
        raise ValueError(f"SSAMBA hears {SSAMBA_RATE_HZ} Hz, the data are prepared at {sample_rate_hz}")
    frames = round(f.window_s * 100)
    if frames < PATCH:
        raise ValueError(f"features.window_s={f.window_s}: shorter than a patch of {PATCH} frames of 10 ms")
    window = (frames - 1) * FBANK_S[1] + FBANK_S[0]
    geometry = Geometry(window, window, 0, 0)

    def losses(model: Encoder, batch: dict, capacity: int, key: jax.Array):
        mask_key, shift_key = jax.random.split(key)
        where = filters.packing(batch["lengths"], batch["samples"].shape[0], 0, 0)
        room = jnp.maximum(where.lengths - geometry.windows(where.lengths) * window, 0)
        shift = (jax.random.uniform(shift_key, room.shape) * (room + 1)).astype(jnp.int32)
        cut = cut_windows(batch["samples"].astype(jnp.float32) / 32767, where, geometry, capacity, shift=shift)
        x = ssamba_input(cut.samples)

        def one(x: jax.Array, key: jax.Array):
            return pretrain_losses(model.encoder, x[None], key, m.mask_patches)

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

    return Task(geometry, init, forward, loss, no_labels, classifies=False, shapes=3, conclude=export)
