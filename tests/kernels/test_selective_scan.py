"""The selective scan: every path against the textbook loop in float64, values and gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcgjax.kernels import selective_scan as module
from pcgjax.kernels.selective_scan import bidirectional_scan, selective_scan

ALONG = ("u", "delta", "B", "C", "z")
FAST = ("xla", "associative", "pallas")
# Batch, steps, channels, states: chunks and blocks that do not fit; several tiles of channels.
SIZE = (4, 13, 4, 3)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Two sequences at a time, chunks of 4 steps, in Pallas blocks of 4 and chunks of 2: several of each."""
    for name, value in {"_PIECE": 24, "_CHUNK": 4, "_SAVED": 2, "_BLOCK": 4, "_TILES": (2,)}.items():
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def draw(batch: int, length: int, channels: int, states: int, seed: int = 0, dtype: Any = np.float64) -> dict:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    arrays = {
        "u": normal(batch, length, channels), "delta": normal(batch, length, channels) - 1,
        "A": -np.exp(normal(channels, states) / 2), "B": normal(batch, length, states),
        "C": normal(batch, length, states), "D": normal(channels), "z": normal(batch, length, channels),
        "delta_bias": normal(channels),
    }  # fmt: skip
    return {name: array.astype(dtype) for name, array in arrays.items()}


def draw_initial(size: tuple[int, int, int, int], dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(size[0], size[3], size[2])).astype(dtype)


def draw_both(size: tuple[int, int, int, int], dtype: Any = np.float64) -> dict:
    ahead, back = draw(*size, dtype=dtype), draw(*size, seed=3, dtype=dtype)
    return {name: np.stack([ahead[name], back[name]]) for name in ahead}


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


@functools.partial(jax.jit, static_argnums=(1, 2))
def outputs_and_gradients(given, implementation, softplus=True):
    """((y, last), gradients) of a weighted sum of both outputs."""

    def loss(given):
        y, last = selective_scan(
            **given, delta_softplus=softplus, implementation=implementation, return_last_state=True
        )
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum() + (last**2).sum(), (y, last)

    gradients, out = jax.grad(loss, has_aux=True)(given)
    return out, gradients


@functools.partial(jax.jit, static_argnums=1)
def both_and_gradients(given, implementation):
    def loss(given):
        y = bidirectional_scan(**given, delta_softplus=True, implementation=implementation)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    gradients, y = jax.grad(loss, has_aux=True)(given)
    return y, gradients


def assert_close(got, want, tolerance: float = 1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("size", "implementations"), [(SIZE, FAST), ((1, 1, 1, 1), ("xla", "pallas"))])
def test_values_and_gradients(size, implementations):
    given = draw(*size) | {"initial": draw_initial(size)}
    out, gradients = outputs_and_gradients(given, "reference")
    assert_close(out, loop(**given))
    for implementation in implementations:
        got, slopes = outputs_and_gradients(given, implementation)
        assert_close(got, out)
        assert_close(slopes, gradients)


@pytest.mark.usefixtures("float64")
def test_both_directions():
    given = draw_both(SIZE)
    y, gradients = both_and_gradients(given, "reference")
    flipped = {name: array[1, :, ::-1] if name in ALONG else array[1] for name, array in given.items()}
    assert_close(y[0], loop(**{name: array[0] for name, array in given.items()})[0])
    assert_close(y[1], loop(**flipped)[0][:, ::-1])
    for implementation in ("xla", "pallas"):
        got, slopes = both_and_gradients(given, implementation)
        assert_close(got, y)
        assert_close(slopes, gradients)


@pytest.mark.usefixtures("float64")
def test_without_the_options_and_with_full_chunks():
    given = {name: array for name, array in draw(1, 8, 2, 2).items() if name not in ("D", "z", "delta_bias")}
    given["delta"] = np.abs(given["delta"])
    want = outputs_and_gradients(given, "reference", False)
    for implementation in ("xla", "pallas"):
        assert_close(outputs_and_gradients(given, implementation, False), want)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_a_cut_sequence_goes_on_from_its_state(implementation):
    given, initial = draw(2, 10, 4, 3, dtype=np.float32), draw_initial((2, 10, 4, 3), np.float32)

    @jax.jit
    def run(given, state):
        return selective_scan(**given, implementation=implementation, initial=state, return_last_state=True)

    cut = lambda part: {name: array[:, part] if name in ALONG else array for name, array in given.items()}
    whole, last = run(given, initial)
    first, state = run(cut(slice(0, 5)), initial)
    second, end = run(cut(slice(5, None)), state)
    assert_close((jnp.concatenate([first, second], 1), end), (whole, last), 1e-4)


def test_bfloat16_has_a_float32_state():
    given = draw(2, 40, 4, 3, dtype=np.float32)
    narrow = {k: v.astype(jnp.bfloat16) if k in ALONG else v for k, v in given.items()}
    widened = {k: v.astype(np.float32) for k, v in narrow.items()}
    (want, end), slopes = outputs_and_gradients(widened, "reference")
    for implementation in ("xla", "pallas"):
        (got, last), gradients = outputs_and_gradients(narrow, implementation)
        assert got.dtype == jnp.bfloat16
        assert last.dtype == jnp.float32
        np.testing.assert_allclose(got.astype(np.float32), want, rtol=1e-2, atol=1e-2)
        np.testing.assert_allclose(last, end, rtol=1e-4, atol=1e-4)
        for name, slope in slopes.items():
            assert gradients[name].dtype == narrow[name].dtype
            error = np.linalg.norm(gradients[name].astype(np.float32) - slope) / np.linalg.norm(slope)
            assert error < 1e-2, name


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_kernels_for_accelerators_interpreted(platform, monkeypatch):
    """As they are built for a TPU or a GPU: other blocks, another way from rows to columns."""
    plain = module.pl.pallas_call
    interpreted = lambda *a, **options: plain(*a, **(options | {"interpret": True, "compiler_params": None}))
    monkeypatch.setattr(module.pl, "pallas_call", interpreted)
    monkeypatch.setattr(module, "_TILES", (16,))
    size, row = (2, 9, 32, 4), ("D", "delta_bias")
    given = {k: v[:, None] if k in row else v for k, v in draw_both(size, np.float32).items()}
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    arrays: list[Any] = [given["A"].swapaxes(1, 2) if name == "A" else given[name] for name in order]
    arrays.append(np.stack([draw_initial(size, np.float32)] * 2))

    def run(platform):
        out, residuals = module._pallas_forward(True, *arrays, platform=platform)  # type: ignore[misc]
        return out, module._pallas_backward(True, residuals, jax.tree.map(jnp.cos, out), platform=platform)

    assert_close(jax.jit(run, static_argnums=0)(platform), jax.jit(run, static_argnums=0)("cpu"), 2e-4)


@pytest.mark.usefixtures("abstract_device")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("platform", "target", "name"), [("tpu", "tpu", "tpu_custom_call"), ("gpu", "cuda", "triton")])
def test_pallas_lowers_for_accelerators(platform, target, name, dtype, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 128)
    monkeypatch.setattr(module, "_TILES", (128,))
    batch, length, channels, states = 2, 300, 32, 16
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((2, *shape), dtype)
    steps, few = array(batch, length, channels, dtype=dtype), array(batch, length, states, dtype=dtype)
    row, state = array(1, channels), array(batch, states, channels)
    forward = jax.jit(functools.partial(module._pallas_forward, True, platform=platform))
    backward = jax.jit(functools.partial(module._pallas_backward, True, platform=platform))
    traced = forward.trace(steps, steps, array(states, channels), few, few, row, steps, row, state)
    out, saved = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), traced.out_info)
    assert (out[0].shape, out[0].dtype) == (steps.shape, dtype)
    for each in (traced, backward.trace(saved, out)):
        assert name in each.lower(lowering_platforms=(target,)).as_text()


def test_pallas_on_a_gpu_says_what_it_cannot_do():
    steps, few, row = jnp.zeros((1, 2, 5, 20)), jnp.zeros((1, 2, 5, 3)), jnp.zeros((1, 1, 20))
    arrays = steps, steps, jnp.zeros((1, 3, 20)), few, few, row, None, row, jnp.zeros((1, 2, 3, 20))
    with pytest.raises(ValueError, match=r"A has shape \(20, 3\); pallas on a GPU needs channels by the 16"):
        module._pallas_forward(True, *arrays, platform="gpu")


def test_auto_is_xla_on_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("the choice on a CPU")
    given = draw(1, 5, 3, 2, dtype=np.float32)
    trace = lambda name: str(jax.make_jaxpr(lambda given: selective_scan(**given, implementation=name))(given))
    assert "pallas_call" in trace("pallas")
    assert trace("auto") == trace("xla") != trace("reference")


def test_the_gradient_keeps_few_states(monkeypatch):
    """What the backward pass is handed and what it needs meanwhile grow with the inputs, not with them times N."""
    if jax.default_backend() != "cpu":
        pytest.skip("counts what the CPU's compiler allocates")
    monkeypatch.setattr(module, "_CHUNK", 16)
    given = draw(1, 2048, 8, 16, dtype=np.float32)

    def needed(implementation):
        run: Any = functools.partial(selective_scan, implementation=implementation)
        memory: Any = jax.jit(jax.grad(lambda given: run(**given).sum())).lower(given).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert 8 * needed("xla") < needed("reference")


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
    given = draw(2, 7, 4, 3, dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        selective_scan(**(given | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": jnp.zeros((4, 3))}, r"A has shape \(4, 3\); needs a leading axis of 2"),
        ({"delta": jnp.zeros((2, 2, 6, 4))}, r"delta has shape \(2, 6, 4\)"),
    ],
)
def test_bad_arguments_of_both_directions(change, message):
    given = draw_both((2, 7, 4, 3), np.float32)
    with pytest.raises(ValueError, match=message):
        bidirectional_scan(**(given | change))
