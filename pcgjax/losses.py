"""Losses over whole recordings."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def recording_log_probabilities(
    logits: jax.Array, recording_ids: jax.Array, mask: jax.Array, recordings: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log of each recording's mean segment probability, and of its complement.

    Kept in logs throughout, so that logits of any size stay finite.

    Args:
      logits, recording_ids, mask: (S,) a segment's logit, the recording it is cut from, and 1 where it is real.
      recordings: R, how many recordings there are.
    Returns: (log p (R,), log (1 - p) (R,), has a segment (R,) bool); zeros where there is no segment.
    """
    member = (recording_ids == jnp.arange(recordings)[:, None]) & (mask > 0)
    count = member.sum(1)
    present = count > 0

    def log_mean(log_p):
        # Rows without a segment get a harmless one, so that no gradient passes through log 0.
        usable = member | ~present[:, None]
        return jnp.where(
            present, jax.nn.logsumexp(log_p[None, :], axis=1, where=usable) - jnp.log(jnp.maximum(count, 1)), 0
        )

    return log_mean(jax.nn.log_sigmoid(logits)), log_mean(jax.nn.log_sigmoid(-logits)), present


def grouped_bce(logits: jax.Array, recording_ids: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Binary cross-entropy of each recording's mean segment probability, averaged over recordings.

    The 1D CNN paper's `custom_grouped_bce` (its section 4): the BCE of the mean, not the mean of the BCEs.

    Args:
      logits, recording_ids, mask: (S,) segments; ids index `labels`; mask 0 leaves a segment out.
      labels: (R,) 0 or 1.
    Returns: scalar mean over the recordings that have a segment; 0 when none has.
    """
    losses, present = recording_losses(logits, recording_ids, labels, mask)
    return losses.sum() / jnp.maximum(present.sum(), 1)


def recording_losses(
    logits: jax.Array, recording_ids: jax.Array, labels: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`grouped_bce` before averaging: (R,) losses, 0 where a recording has no segment, and (R,) bool which have."""
    log_p, log_q, present = recording_log_probabilities(logits, recording_ids, mask, len(labels))
    return -(labels * log_p + (1 - labels) * log_q) * present, present
