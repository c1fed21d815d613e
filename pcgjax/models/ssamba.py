"""SSAMBA: its masked pre-training, and, for callers, its net and the reader and writer of its PyTorch checkpoints.

The objectives are SSAST's (Gong et al. 2022, "SSAST: Self-Supervised Audio Spectrogram Transformer", section 2), as
SSAMBA's public code has them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pcgjax.models.ssamba_checkpoint import load_torch_checkpoint, read_tensors, save_torch_checkpoint
from pcgjax.models.ssamba_net import MEL_BINS, PATCH, POOLINGS, SIZES, SSAMBA, Mixer, MixerState, Unused

__all__ = [
    "MEL_BINS", "PATCH", "POOLINGS", "RECONSTRUCTION_WEIGHT", "SIZES", "SSAMBA", "Mixer", "MixerState",
    "PretrainLosses", "Unused", "load_torch_checkpoint", "masked_losses", "masked_patches", "pretrain_losses",
    "read_tensors", "save_torch_checkpoint",
]  # fmt: skip

RECONSTRUCTION_WEIGHT = 10  # pre-training minimises infonce + 10 mse (SSAST's lambda)


class PretrainLosses(NamedTuple):
    """Scalars, means over the masked patches of a batch."""

    infonce: jax.Array
    mse: jax.Array
    accuracy: jax.Array  # of telling a clip's masked patches apart


def pretrain_losses(model: SSAMBA, fbank_BxTxF: jax.Array, key: jax.Array, mask_patches: int = 400) -> PretrainLosses:
    """Both objectives over `mask_patches` masked patches of each clip; the loss is infonce + 10 mse.

    One pass and one mask serve both, as in SSAST's algorithm 1; the public code draws a mask and runs for each.

    Raises:
      ValueError: as `masked_losses` and `masked_patches`.
    """
    masked = masked_patches(key, len(fbank_BxTxF), model.grid, mask_patches)
    return masked_losses(model, fbank_BxTxF, masked)


def masked_patches(key: jax.Array, batch: int, grid: tuple[int, int], count: int) -> jax.Array:
    """Which patches to mask in each clip: (B, count) numbers, in rising order, none twice.

    Squares of C x C patches at random places, C of 3, 4 or 5 drawn for each clip (SSAST, section 2.2), until there are
    enough; the last square is cut. As in the public code, squares that cross the last frame go on in the next row, and
    patch 0 stays.

    Raises:
      ValueError: as many patches as there are, or none.
    """
    patches = math.prod(grid)
    if not 0 < count < patches:
        raise ValueError(f"mask_patches={count}: at least 1 and below the {patches} patches of a clip")

    def clip(key):
        side_key, key = jax.random.split(key)
        side = jax.random.randint(side_key, (), 3, 6)

        def too_few(carry):
            _, since = carry
            return (since < never).sum() < count

        def add_square(carry):
            drawn, since = carry
            start = jax.random.randint(jax.random.fold_in(key, drawn), (), 0, patches)
            row, column = (jnp.arange(patches) - start) // grid[1], (jnp.arange(patches) - start) % grid[1]
            inside = (row >= 0) & (row < side) & (column < side) & (jnp.arange(patches) > 0)
            return drawn + 1, jnp.where(inside, jnp.minimum(since, drawn), since)

        never = jnp.iinfo(jnp.int32).max  # `since` holds the number of the first square that covers a patch
        _, since = jax.lax.while_loop(too_few, add_square, (0, jnp.full(patches, never)))
        return jnp.sort(jnp.argsort(since, stable=True)[:count])

    return jax.vmap(clip)(jax.random.split(key, batch))


def masked_losses(model: SSAMBA, fbank_BxTxF: jax.Array, masked_BxM: jax.Array) -> PretrainLosses:
    """The losses for the patches that `masked_BxM` numbers.

    InfoNCE compares a clip's masked patches with its predictions by their inner products and, as the public code does
    and SSAST's equation 1 does not, sums over predictions.

    Raises:
      ValueError: a model without the predictors.
    """
    if not hasattr(model, "mask_token"):
        raise ValueError("this model has no predictors; make it with pretraining=True")
    patches = model.patches(fbank_BxTxF)
    target = jnp.take_along_axis(patches, masked_BxM[..., None], axis=1)
    masked = jnp.zeros(patches.shape[:2], bool).at[jnp.arange(len(patches))[:, None], masked_BxM].set(True)
    tokens = jnp.take_along_axis(model.encode(fbank_BxTxF, masked), 1 + masked_BxM[..., None], axis=1)
    log_p = jax.nn.log_softmax(jnp.einsum("bik,bjk->bij", target, model.contrast(tokens)), axis=-1)
    return PretrainLosses(
        infonce=-jnp.diagonal(log_p, axis1=1, axis2=2).mean(),
        mse=jnp.square(model.reconstruction(tokens) - target).mean(),
        accuracy=(log_p.argmax(1) == jnp.arange(masked_BxM.shape[1])[None]).mean(),
    )
