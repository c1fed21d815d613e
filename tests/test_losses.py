"""The grouped loss against a loop in float64, the penalty-weighted one against cases by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcgjax.losses import grouped_bce, penalty, penalty_weighted_bce, recording_log_probabilities

value_and_gradient = jax.jit(jax.value_and_grad(grouped_bce))


def by_loop(logits, recording_ids, labels, mask):
    """(loss, its gradient by the logits) in float64, one recording at a time, exact for logits of any size."""
    logits = np.asarray(logits, np.float64)
    total, present, gradient = 0.0, 0, np.zeros(len(logits))
    for r, label in enumerate(labels):
        segments = np.flatnonzero((np.asarray(recording_ids) == r) & (np.asarray(mask) > 0))
        if not len(segments):
            continue
        present += 1
        z = logits[segments] if label else -logits[segments]
        log_p = -np.logaddexp(0, -z)  # log of the probability of the true class
        log_sum = np.logaddexp.reduce(log_p)
        total -= log_sum - np.log(len(segments))
        # d log sum p / dz = p (1 - p) / sum p
        gradient[segments] -= np.exp(log_p - log_sum - np.logaddexp(0, z)) * (1 if label else -1)
    return total / max(present, 1), gradient / max(present, 1)


def check(logits, recording_ids, labels, mask, rtol=1e-5):
    logits, labels, mask = (np.asarray(a, np.float32) for a in (logits, labels, mask))
    value, gradient = value_and_gradient(logits, np.asarray(recording_ids), labels, mask)
    expected, slope = by_loop(logits, recording_ids, labels, mask)
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=1e-7)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)


def test_loop_agrees_with_finite_differences():
    logits, ids, labels, mask = np.array([0.3, -2.0, 1.5, 0.1]), [0, 0, 1, 1], [1, 0], [1, 1, 1, 0]
    _, slope = by_loop(logits, ids, labels, mask)
    for i in range(4):
        step = 1e-6 * np.eye(4)[i]
        rise = by_loop(logits + step, ids, labels, mask)[0] - by_loop(logits - step, ids, labels, mask)[0]
        assert rise / 2e-6 == pytest.approx(slope[i], abs=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_random_segments_in_any_order(seed):
    rng = np.random.default_rng(seed)
    check(3 * rng.standard_normal(50), rng.integers(0, 7, 50), rng.integers(0, 2, 7), rng.integers(0, 2, 50))


def test_one_segment_a_recording_is_plain_bce():
    logits, labels = np.array([2.0, -1.0, 0.0], np.float32), np.array([1.0, 1.0, 0.0], np.float32)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    plain = -np.where(labels > 0, np.log(p), np.log(1 - p)).mean()
    assert float(grouped_bce(logits, np.arange(3), labels, np.ones(3))) == pytest.approx(plain, rel=1e-6)


def test_it_is_the_bce_of_the_mean_not_the_mean_of_the_bces():
    logits = np.array([4.0, -4.0], np.float32)
    loss = float(grouped_bce(logits, np.zeros(2, int), np.ones(1), np.ones(2)))
    assert loss == pytest.approx(np.log(2), rel=1e-6)
    assert np.logaddexp(0, -logits.astype(np.float64)).mean() > 2


@pytest.mark.parametrize("labels", [[1, 1], [0, 0], [1, 0]])
@pytest.mark.parametrize("size", [80.0, 1000.0])
def test_extreme_logits(labels, size):
    check([size, size, -size, -size], [0, 0, 1, 1], labels, np.ones(4))
    check([size, -size, size, -size], [0, 0, 1, 1], labels, np.ones(4))


def test_recordings_without_segments_do_not_count():
    check([0.5, -0.5, 2.0, 7.0], [0, 0, 2, 3], [1, 0, 1, 1, 0], [1, 1, 1, 0])
    check([1.0, 2.0], [0, 1], [1, 0], [0, 0])
    value, gradient = value_and_gradient(np.ones(3, np.float32), np.zeros(3, int), np.ones(2), np.zeros(3))
    assert value == 0
    assert not np.asarray(gradient).any()


def test_log_probabilities_of_the_mean_and_its_complement():
    rng = np.random.default_rng(3)
    logits, ids = (4 * rng.standard_normal(30)).astype(np.float32), rng.integers(0, 4, 30)
    log_p, log_q, present = recording_log_probabilities(logits, ids, np.ones(30), 5)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    means = np.array([p[ids == r].mean() for r in range(4)])
    np.testing.assert_allclose(np.exp(log_p)[:4], means, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_q)[:4], 1 - means, rtol=1e-5)
    assert present.tolist() == [True] * 4 + [False]
    assert (log_p[4], log_q[4]) == (0, 0)


# ---------------------------------------------------------------------------------------- the penalty-weighted loss

PROBABILITIES = np.array([0.9, 0.4, 0.2, 0.7, 0.1], np.float32)
LABELS = np.array([1, 1, 1, 0, 0], np.float32)
BCE = -np.log([0.9, 0.4, 0.2, 0.3, 0.9]).mean()


@pytest.mark.parametrize(
    ("threshold", "normalize", "factor"),
    [
        (0.5, "counts", 1 + 0.87 * 2 + 0.13 * 1),  # missed 0.4 and 0.2, false call 0.7
        (0.3, "counts", 1 + 0.87 * 1 + 0.13 * 1),
        (0.05, "counts", 1 + 0.13 * 2),
        (0.95, "counts", 1 + 0.87 * 3),
        (0.5, "rates", 1 + 0.87 * 2 / 3 + 0.13 * 1 / 2),
        (0.95, "rates", 1 + 0.87),
    ],
)
def test_penalty_weighted_by_hand(threshold, normalize, factor):
    def loss(p):
        return penalty_weighted_bce(p, LABELS, threshold, normalize=normalize)

    assert float(jax.jit(loss)(PROBABILITIES)) == pytest.approx(factor * BCE, rel=1e-5)
    # The indicators carry no gradient: the loss' gradient is that of the cross-entropy, times the factor.
    slope = factor * np.where(LABELS > 0, -1 / PROBABILITIES, 1 / (1 - PROBABILITIES)) / 5
    np.testing.assert_allclose(jax.grad(loss)(PROBABILITIES), slope, rtol=1e-4)


def test_penalty_at_the_threshold_counts_as_positive():
    assert float(penalty(np.log([0.5, 0.5]), np.array([1.0, 0.0]), np.ones(2), 0.5)[0]) == pytest.approx(1.13)


def test_penalty_with_a_surrogate():
    log_p = jnp.log(PROBABILITIES)
    called = 1 / (1 + np.exp(-4 * (PROBABILITIES - 0.5)))
    expected = 1 + 0.87 * (LABELS * (1 - called)).sum() + 0.13 * ((1 - LABELS) * called).sum()
    value, share = penalty(log_p, LABELS, np.ones(5), 0.5, slope=4.0)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(share) == pytest.approx(expected - 1, rel=1e-5)
    gradient = jax.grad(lambda z: penalty(z, LABELS, np.ones(5), 0.5, slope=4.0)[0])(log_p)
    signs = np.where(LABELS > 0, -0.87, 0.13)
    np.testing.assert_allclose(gradient, signs * 4 * called * (1 - called) * PROBABILITIES, rtol=1e-4)
    steep, _ = penalty(log_p, LABELS, np.ones(5), 0.5, slope=1e3)
    assert float(steep) == pytest.approx(1 + 0.87 * 2 + 0.13, rel=1e-4)


def test_masked_samples_do_not_count_in_the_penalty():
    mask = np.array([1, 0, 1, 0, 1], np.float32)
    value, _ = penalty(jnp.log(PROBABILITIES), LABELS, mask, 0.5, normalize="rates")
    assert float(value) == pytest.approx(1 + 0.87 / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"normalize": "mean"}, "loss.normalize='mean'"), ({"alpha": 1.2}, "loss.alpha=1.2"), ({"slope": -1}, "slope=-1")],
)
def test_bad_penalty(changes, message):
    with pytest.raises(ValueError, match=message):
        penalty(np.log(PROBABILITIES), LABELS, np.ones(5), 0.5, **changes)


def test_certain_probabilities_give_a_finite_loss():
    p = np.array([0.0, 1.0], np.float32)
    loss, gradient = jax.value_and_grad(lambda p: penalty_weighted_bce(p, np.array([1.0, 0.0]), 0.5))(p)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
