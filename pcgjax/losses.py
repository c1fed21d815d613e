"""Losses: over whole recordings cut into segments, and over clips. Axes: S segments, R recordings, B clips."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pcgjax.runtime.traced import is_known, is_on

LOSSES = ("bce", "pwl")
NORMALIZATIONS = ("counts", "rates")


def one_share(x: jax.Array) -> jax.Array:
    """The sum over all devices' shares of a batch that lies on one device: `x` itself."""
    return x


def recording_log_probabilities(
    logits: jax.Array, recording_ids: jax.Array, mask: jax.Array, recordings: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log of each recording's mean segment probability, and of its complement.

    Computed in logs throughout, so that the result is finite for logits of any size.

    Args:
      logits, recording_ids, mask: (S,) a segment's logit, the recording it is cut from, and 1 where it is real.
      recordings: R, how many recordings there are.
    Returns: (log p (R,), log (1 - p) (R,), has a segment (R,) bool); zeros where there is no segment.
    """
    member = (recording_ids[None] == jnp.arange(recordings)[:, None]) & (mask > 0)[None]
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


def penalty(
    log_p: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    threshold: jax.Array | float,
    alpha: float = 0.87,
    normalize: str = "counts",
    slope: float = 0.0,
    total: Callable[[jax.Array], jax.Array] = one_share,
) -> tuple[jax.Array, jax.Array]:
    """The penalty of the penalty-weighted loss, P = 1 + alpha FN + (1 - alpha) FP (H-infinity paper, equations 9-11).

    Args:
      log_p, labels, mask: (B,) log probability of the positive class, 0 or 1, and 1 where the sample is real.
      threshold: tau, a sample is called positive from it on.
      normalize: "counts" as the paper has it, so that P, and with it the step, grows with the batch; "rates" divides
        FN by the positives and FP by the negatives of the batch, so that P lies between 1 and 2.
      slope: 0 for the indicator, through which no gradient flows; above it, each false call counts
        sigmoid(slope (p - tau)), whose gradient does.
      total: sums over all devices' shares of the batch.
    Returns: (P of the whole batch, this device's share of P - 1), scalars, the latter for gradients.
    Raises:
      ValueError: an unknown `normalize`, alpha outside [0, 1], or a negative slope.
    """
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"loss.normalize={normalize!r}: choose one of {', '.join(NORMALIZATIONS)}")
    if is_known(alpha) and not 0 <= alpha <= 1:
        raise ValueError(f"loss.alpha={alpha}: must lie between 0 and 1")
    if is_known(slope) and slope < 0:
        raise ValueError(f"loss.slope={slope}: must be at least 0")
    log_p = jnp.asarray(log_p, jnp.float32)
    positive = labels * mask
    negative = (1 - labels) * mask
    if is_on(slope):
        called = jax.nn.sigmoid(slope * (jnp.exp(log_p) - threshold))
    else:
        called = (jnp.exp(log_p) >= threshold).astype(log_p.dtype)
    missed, false = (positive * (1 - called)).sum(), (negative * called).sum()
    if normalize == "rates":
        missed, false = missed / jnp.maximum(total(positive.sum()), 1), false / jnp.maximum(total(negative.sum()), 1)
    share = alpha * missed + (1 - alpha) * false
    return 1 + total(share), share


def penalty_weighted_bce(
    probabilities: jax.Array,
    labels: jax.Array,
    threshold: jax.Array | float,
    alpha: float = 0.87,
    normalize: str = "counts",
) -> jax.Array:
    """The penalty-weighted loss: `penalty` times the mean binary cross-entropy (H-infinity paper, equations 12, 13).

    Args:
      probabilities: (B,) in [0, 1]; within 1e-7 of either end they count as that far from it.
      labels: (B,) 0 or 1.
      threshold, alpha, normalize: as in `penalty`.
    Returns: scalar.
    Raises:
      ValueError: as `penalty`.
    """
    p = jnp.clip(probabilities, 1e-7, 1 - 1e-7)
    log_p, log_q = jnp.log(p), jnp.log1p(-p)
    factor, _ = penalty(log_p, labels, jnp.ones_like(p), threshold, alpha, normalize)
    return -factor * (labels * log_p + (1 - labels) * log_q).mean()
