"""The selective scan: every path against the textbook loop in float64, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcgjax.kernels.selective_scan import selective_scan

FAST = ("xla", "associative")


def draw(batch, length, channels, states, seed=0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {
        "u": normal(batch, length, channels), "delta": normal(batch, length, channels) - 1,
        "A": -jnp.exp(normal(channels, states) / 2), "B": normal(batch, length, states),
        "C": normal(batch, length, states), "D": normal(channels), "z": normal(batch, length, channels),
        "delta_bias": normal(channels),
    }  # fmt: skip


def loop(u, delta, A, B, C, D, z, delta_bias, initial=None):
    """NumPy, a step and a state at a time."""
    batch, length, channels = u.shape
    delta = np.logaddexp(0, delta + delta_bias)
    h = np.zeros((batch, A.shape[1], channels)) if initial is None else np.array(initial)
    y = np.zeros(u.shape)
    for t in range(length):
        for n in range(A.shape[1]):
            h[:, n] = np.exp(delta[:, t] * A[:, n]) * h[:, n] + delta[:, t] * B[:, t, n, None] * u[:, t]
            y[:, t] += C[:, t, n, None] * h[:, n]
    return (y + D * u) * z / (1 + np.exp(-z)), h


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("size", [(2, 37, 5, 3), (1, 1, 1, 1), (3, 32, 4, 2), (1, 97, 3, 16)])
def test_values(implementation, size):
    given = draw(*size)
    initial = jnp.asarray(np.random.default_rng(1).normal(size=(size[0], size[3], size[2])))
    got = selective_scan(
        **given, delta_softplus=True, implementation=implementation, initial=initial, return_last_state=True
    )
    for a, b in zip(got, loop(**{k: np.asarray(v) for k, v in given.items()}, initial=initial), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("size", [(2, 37, 5, 3), (3, 32, 4, 2), (1, 70, 3, 4)])
def test_gradients(implementation, size):
    given = draw(*size) | {"initial": jnp.asarray(np.random.default_rng(1).normal(size=(size[0], size[3], size[2])))}
    rng = np.random.default_rng(2)
    weights, last_weights = rng.normal(size=size[:3]), rng.normal(size=(size[0], size[3], size[2]))

    def loss(given, name):
        y, last = selective_scan(**given, delta_softplus=True, implementation=name, return_last_state=True)
        return (y * weights).sum() + (last * last_weights).sum()

    want = jax.grad(loss)(given, "reference")
    got = jax.grad(loss)(given, implementation)
    for name in given:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("implementation", FAST)
def test_a_cut_sequence_goes_on_from_its_state(implementation):
    given = draw(2, 50, 4, 3, dtype=jnp.float32)
    along = ("u", "delta", "B", "C", "z")
    run = lambda part, state: selective_scan(
        **{k: v[:, part] if k in along else v for k, v in given.items()},
        implementation=implementation, initial=state, return_last_state=True,
    )  # fmt: skip
    whole, last = run(slice(None), None)
    first, state = run(slice(0, 19), None)
    second, end = run(slice(19, None), state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(end, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_bfloat16_has_a_float32_state(implementation):
    given = draw(2, 300, 4, 3, dtype=jnp.float32)
    narrow = {k: v.astype(jnp.bfloat16) if k in ("u", "delta", "B", "C", "z") else v for k, v in given.items()}
    got, last = selective_scan(**narrow, delta_softplus=True, implementation=implementation, return_last_state=True)
    assert got.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32
    widened = {k: v.astype(jnp.float32) for k, v in narrow.items()}
    want, end = selective_scan(**widened, delta_softplus=True, implementation="reference", return_last_state=True)
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(last, end, rtol=1e-4, atol=1e-4)


def test_the_gradient_keeps_few_states():
    """What the backward pass is handed grows with the inputs, not with them times N."""
    batch, length, channels, states = 1, 512, 8, 16
    given = draw(batch, length, channels, states, dtype=jnp.float32)

    def kept(implementation):
        loss = lambda given: selective_scan(**given, implementation=implementation).sum()
        residuals = jax.eval_shape(lambda given: jax.vjp(loss, given)[1], given)
        return sum(x.size for x in jax.tree.leaves(residuals))

    every_state = batch * length * channels * states
    assert kept("xla") < every_state < kept("reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": jnp.zeros((2, 7, 4), jnp.int32)}, "u is int32"),
        ({"u": jnp.zeros((2, 0, 4))}, r"u is float32 of shape \(2, 0, 4\)"),
        ({"A": jnp.zeros(4)}, r"A has shape \(4,\)"),
        ({"delta": jnp.zeros((2, 6, 4))}, r"delta has shape \(2, 6, 4\)"),
        ({"B": jnp.zeros((2, 7, 4))}, "B has shape"),
        ({"delta_bias": jnp.zeros(3)}, "delta_bias has shape"),
        ({"initial": jnp.zeros((2, 4, 3))}, "initial has shape"),
        ({"implementation": "fast"}, "implementation='fast': choose one of auto"),
    ],
)
def test_bad_arguments(change, message):
    given = draw(2, 7, 4, 3, dtype=jnp.float32)
    with pytest.raises(ValueError, match=message):
        selective_scan(**(given | change))
