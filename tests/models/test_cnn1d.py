"""The CNN against library convolutions and pooling: values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pcgjax.models.cnn1d import CNN1D, reference

WINDOWS = [36, 400, 2500, 2504]  # a quarter of them is odd, even, odd and even


def make(window, **changes):
    model = CNN1D(window, **{"filters": (6, 10), "hidden": 12, **changes}, rngs=nnx.Rngs(1))
    for bias in (model.bias1, model.bias2, model.bias3, model.output.bias):
        bias[...] = jax.random.normal(jax.random.key(bias.size), bias.shape) / 4
    return model


def logits_and_gradients(function, model, x):
    """The logits, and the gradients of a weighted sum of them by the parameters and by x."""
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params, x):
        logits = function(nnx.merge(graphdef, params), x)
        return (logits * jnp.cos(3 * jnp.arange(len(logits)))).sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return logits, gradients


def assert_equal_trees(one, other, tolerance=3e-5):
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(leaves) == len(others) > 0
    for a, b in zip(leaves, others, strict=True):
        scale = np.abs(np.asarray(b)).max()
        assert scale > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def cut(rows):
    """The windows of `half_overlapping`, cut out one by one, in its order."""
    flat, window = rows.reshape(-1), rows.shape[1]
    starts = [*range(0, len(flat), window), *range(window // 2, len(flat) - window, window)]
    return jnp.stack([flat[s : s + window] for s in starts])


@pytest.mark.parametrize("window", [*WINDOWS, 16, 37])
def test_call_equals_reference(window):
    model = make(window)
    x = jax.random.normal(jax.random.key(0), (3, window))
    got, expected = (logits_and_gradients(f, model, x) for f in (CNN1D.__call__, reference))
    assert got[0].shape == (3,)
    assert_equal_trees(got, expected)


@pytest.mark.parametrize(("window", "rows"), [(36, 4), (400, 2), (2500, 2), (2504, 3), (36, 1)])
def test_half_overlapping_equals_windows_cut_out(window, rows):
    model = make(window)
    x = jax.random.normal(jax.random.key(0), (rows, window))
    got = logits_and_gradients(CNN1D.half_overlapping, model, x)
    expected = logits_and_gradients(lambda m, x: reference(m, cut(x)), model, x)
    assert got[0].shape == (2 * rows - 1,)
    assert_equal_trees(got, expected)


def test_other_kernel_sizes():
    model = make(100, kernel_size=9)
    x = jax.random.normal(jax.random.key(0), (3, 100))
    assert_equal_trees(logits_and_gradients(CNN1D.__call__, model, x), logits_and_gradients(reference, model, x))
    expected = logits_and_gradients(lambda m, x: reference(m, cut(x)), model, x)
    assert_equal_trees(logits_and_gradients(CNN1D.half_overlapping, model, x), expected)


def test_published_size():
    # 16x5, 32x5, 64, 1 on 2500 samples: 96 + 2592 + 64 * (622 * 32 + 1) + 65 parameters.
    _, params = nnx.split(nnx.eval_shape(lambda: CNN1D(2500, rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(x.size for x in jax.tree.leaves(params)) == 96 + 2592 + 64 * (622 * 32 + 1) + 65


def test_errors():
    with pytest.raises(ValueError, match="kernel_size must be odd, not 4"):
        make(400, kernel_size=4)
    with pytest.raises(ValueError, match="15 samples is too short for two convolutions of 5"):
        make(15)
    with pytest.raises(ValueError, match="multiple of 4 samples, not 402"):
        make(402).half_overlapping(jnp.zeros((2, 402)))
