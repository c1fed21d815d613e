"""The optimizer follows its formulas: schedule, weight decay, clipping, frozen groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from pcgjax.training import optimizer

PARAMS = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "b": {"scale": jnp.ones(())}}


def config(**fields):
    return ml_collections.ConfigDict({"name": "sgd", "learning_rate": 0.1, "momentum": 0.0} | fields)


def updates(cfg, gradients, steps=0, params=PARAMS):
    """What each of these gradients changes."""
    update = optimizer.make(cfg, steps)
    state, found = update.init(params), []
    for gradient in gradients:
        change, state = update.update(gradient, state, params)
        params = optax.apply_updates(params, change)
        found.append(change)
    return found


def ones(value=1.0):
    return jax.tree.map(lambda x: jnp.full_like(x, value), PARAMS)


def rates(cfg, steps):
    return [-float(change["b"]["scale"]) for change in updates(cfg, [ones()] * steps, steps)]


def test_constant():
    assert rates(config(), 5) == pytest.approx([0.1] * 5)
    assert rates(config(schedule="constant", warmup_steps=3), 5) == pytest.approx([0.1] * 5)


def test_cosine():
    found = rates(config(schedule="cosine", warmup_steps=4), 20)
    assert found[:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(16) / 16))
    assert found[4:] == pytest.approx(expected, abs=1e-6)
    assert found[-1] == pytest.approx(0.05 * (1 + np.cos(np.pi * 15 / 16)), abs=1e-6)  # the step after would be 0
    assert rates(config(schedule="cosine"), 20)[0] == pytest.approx(0.1)


def test_weight_decay_is_of_matrices():
    [change] = updates(config(name="adamw", weight_decay=0.5), [ones(0.0)])
    np.testing.assert_allclose(change["a"]["kernel"], -0.1 * 0.5)
    assert not change["a"]["bias"].any()
    assert not change["b"]["scale"].any()
    [plain] = updates(config(name="adamw", weight_decay=0.0), [ones()])
    [adam] = updates(config(name="adam"), [ones()])
    assert jax.tree.all(jax.tree.map(lambda x, y: jnp.allclose(x, y), plain, adam))


@pytest.mark.parametrize(("value", "factor"), [(1.0, 0.5 / np.sqrt(10)), (0.01, 1.0)])
def test_gradients_are_clipped_together(value, factor):
    [change] = updates(config(clip_norm=0.5), [ones(value)])  # ten parameters
    for leaf in jax.tree.leaves(change):
        np.testing.assert_allclose(leaf, -0.1 * value * factor, rtol=1e-5)


def test_momentum():
    first, second = updates(config(momentum=0.9), [ones(), ones()])
    assert float(second["b"]["scale"] / first["b"]["scale"]) == pytest.approx(1.9)


def test_frozen_groups_stay():
    [change] = updates(config(frozen=("a",), clip_norm=0.5), [ones()])
    assert not change["a"]["kernel"].any()
    assert float(change["b"]["scale"]) == pytest.approx(-0.05)  # what is frozen takes no part in the norm
    with pytest.raises(ValueError, match="no parameters 'c' among a, b"):
        updates(config(frozen=("c",)), [ones()])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "lion"}, "optimizer.name='lion': choose one of sgd, adam, adamw"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate=0.0: must be above 0"),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
        ({"momentum": 1.0}, "optimizer.momentum=1.0: must be at least 0 and below 1"),
        ({"name": "adamw", "weight_decay": -1.0}, "optimizer.weight_decay=-1.0: must be at least 0"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm=-1.0: must be at least 0"),
        ({"schedule": "linear"}, "optimizer.schedule='linear': choose one of constant, cosine"),
        ({"schedule": "cosine", "warmup_steps": 10}, "optimizer.warmup_steps=10: .* below the 10 steps"),
        ({"schedule": "cosine", "warmup_steps": -1}, "optimizer.warmup_steps=-1: must be at least 0"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        optimizer.make(config(**fields), 10)
