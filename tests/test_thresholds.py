"""SAPT against cases worked out by hand, and scikit-learn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcgjax import thresholds

# Two negatives below two positives, one negative above: by F1, 0.3 and 0.4 find both positives with one false call
# (F1 4/5); 0.2 and below with two or three; 0.6 and above misses one.
P = np.array([0.1, 0.25, 0.45, 0.55, 0.9])
Y = np.array([0, 0, 1, 1, 0])
GRID = (0.2, 0.3, 0.4, 0.5, 0.6)


def step(state, p=P, y=Y):
    return jax.jit(thresholds.sapt_update)(state, jnp.asarray(p, jnp.float32), jnp.asarray(y))


def test_only_every_interval_moves_the_threshold():
    state = thresholds.init(start=0.5, interval=3, factor=0.3, grid=GRID)
    seen = []
    for _ in range(7):
        state = step(state)
        seen.append(float(state.threshold))
    # The best is 0.4, the nearer of two: 0.7 * 0.5 + 0.3 * 0.4 = 0.47, then 0.7 * 0.47 + 0.3 * 0.4 = 0.449.
    assert seen == pytest.approx([0.5, 0.5, 0.47, 0.47, 0.47, 0.449, 0.449], abs=1e-6)
    assert int(state.epoch) == 7


def test_scores_by_hand():
    state = step(thresholds.init(interval=1, grid=GRID))
    # (tp, fp): 0.2 (2, 2), 0.3 (2, 1), 0.4 (2, 1), 0.5 (1, 1), 0.6 (0, 1)
    np.testing.assert_allclose(state.scores, [4 / 6, 4 / 5, 4 / 5, 2 / 4, 0], rtol=1e-6)
    state = step(thresholds.init(interval=1, grid=GRID, metric="balanced_accuracy"))
    np.testing.assert_allclose(
        state.scores, [(1 + 1 / 3) / 2, (1 + 2 / 3) / 2, (1 + 2 / 3) / 2, (0.5 + 2 / 3) / 2, 1 / 3], rtol=1e-6
    )
    state = step(thresholds.init(interval=1, grid=GRID, metric="recall"))
    np.testing.assert_allclose(state.scores, [1, 1, 1, 0.5, 0])


def test_smoothed_scores():
    state = thresholds.init(interval=2, factor=0.3, smooth="scores", grid=GRID)
    state = step(state)
    assert float(state.threshold) == 0.5
    first = np.array(state.scores)
    np.testing.assert_allclose(first, [4 / 6, 4 / 5, 4 / 5, 2 / 4, 0], rtol=1e-6)
    # Now all but the highest candidate make false calls only: F1 0 below 0.6, 1 at 0.6.
    other = np.array([0.55, 0.55, 0.95])
    state = step(state, other, [0, 0, 1])
    second = [2 / 4, 2 / 4, 2 / 4, 2 / 4, 1]
    np.testing.assert_allclose(state.scores, 0.7 * first + 0.3 * np.array(second), rtol=1e-6)
    # 0.71 at 0.3 and 0.4, the latter nearer to the 0.5 in use; taken as it is.
    assert float(state.threshold) == pytest.approx(0.4)


@pytest.mark.parametrize("metric", ["f1", "balanced_accuracy", "recall"])
def test_scores_equal_scikit_learn(metric):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    p, y = rng.uniform(size=57).astype(np.float32), rng.integers(0, 2, 57)
    state = step(thresholds.init(interval=1, metric=metric), p, y)
    score = {
        "f1": lambda y, d: sklearn_metrics.f1_score(y, d, zero_division=0),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score,
        "recall": sklearn_metrics.recall_score,
    }[metric]
    expected = [score(y, (p >= np.float32(t)).astype(int)) for t in thresholds.GRID]
    np.testing.assert_allclose(state.scores, expected, atol=1e-6)


@pytest.mark.parametrize("y", [[0] * 5, [1] * 5])
@pytest.mark.parametrize("smooth", ["threshold", "scores"])
def test_a_missing_class_keeps_the_threshold(y, smooth):
    state = step(thresholds.init(interval=1, grid=GRID, smooth=smooth))
    after = step(state, P, y)
    assert float(after.threshold) == float(state.threshold) != 0.5
    np.testing.assert_array_equal(after.scores, state.scores)
    assert int(after.epoch) == 2


def test_interval_of_zero_never_moves_it():
    state = thresholds.init(start=0.3, interval=0)
    for _ in range(3):
        state = step(state)
    assert float(state.threshold) == pytest.approx(0.3)


def test_many_seeds_at_once():
    states = jax.vmap(lambda s: thresholds.init(interval=1, grid=GRID))(jnp.arange(3))
    p = jnp.asarray(np.stack([P, P[::-1], 1 - P]), jnp.float32)
    together = jax.vmap(thresholds.sapt_update, (0, 0, None))(states, p, jnp.asarray(Y))
    for i in range(3):
        alone = step(thresholds.init(interval=1, grid=GRID), p[i], Y)
        assert float(together.threshold[i]) == float(alone.threshold)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 1.5}, "sapt.start=1.5"),
        ({"start": float("nan")}, "sapt.start=nan"),
        ({"interval": -1}, "sapt.interval=-1"),
        ({"factor": 0.0}, "sapt.factor=0.0"),
        ({"factor": 1.1}, "sapt.factor=1.1"),
        ({"metric": "accuracy"}, "sapt.metric='accuracy': choose one of f1, balanced_accuracy, recall"),
        ({"smooth": "both"}, "sapt.smooth='both'"),
        ({"grid": (0.5, 1.2)}, "sapt.grid="),
        ({"grid": ()}, "sapt.grid="),
    ],
)
def test_bad_settings_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        thresholds.init(**changes)
