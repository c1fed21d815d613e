"""The recurrences against loops in float64, torch's LSTM and each other: values and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn

from pcgjax.kernels import hinf_lstm as module
from pcgjax.kernels.hinf_lstm import hinf_lstm, lstm

# 35 rows are 48 for Pallas: three tiles of 16.
BATCH, STEPS, INPUTS, HIDDEN = 35, 23, 5, 7
UPDATES = ("convex", "forget", "lstm")
FAST = ("xla", "pallas")
# Of the norm. Sums of some hundred products in float32 came out at 9e-7 at worst; a wrong sign or step is off by 0.1.
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of 5 steps for three gates, of 4 for four, so that Pallas needs several and the last one is not full."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * (5 * 16 * HIDDEN * 9))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def make(update: str, batch: int = BATCH, steps: int = STEPS, hidden: int = HIDDEN, seed: int = 0):
    """(x, kernel_x, kernel_h, bias, theta, h, c) and weights of the outputs (B, T, H), float64."""
    rng = np.random.default_rng(seed)
    wide = (4 if update == "lstm" else 3) * hidden
    sequence, state = (batch, steps, INPUTS), (batch, hidden)
    arrays = [rng.normal(size=s) for s in (sequence, (INPUTS, wide), (hidden, wide), wide, hidden, state, state)]
    arrays[2] *= 0.5
    return arrays, rng.normal(size=(batch, steps, hidden))


def make_mask(batch: int = BATCH, steps: int = STEPS):
    """(B, T): in turn all real, padded at the end, with holes."""
    mask = np.ones((batch, steps), bool)
    mask[1::3, steps // 2 :] = False
    mask[2::3] = np.random.default_rng(0).uniform(size=mask[2::3].shape) < 0.6
    return mask


def run(update, arrays, implementation, mask=None):
    x, kernel_x, kernel_h, bias, theta, h, c = arrays
    if update == "lstm":
        return lstm(x, kernel_x, kernel_h, bias, implementation, initial=(h, c), mask=mask)
    return hinf_lstm(x, kernel_x, kernel_h, bias, theta, update, implementation, initial=(h, c), mask=mask)


@functools.cache
def program(update, implementation):
    """Compiled once for each set of shapes: (arrays, weights, mask) -> (gradients of sum(out weights), out)."""

    def total(arrays, weights, mask):
        out = run(update, arrays, implementation, mask)
        return (out * weights).sum(), out

    return jax.jit(jax.grad(total, has_aux=True))


def outputs_and_gradients(update, arrays, weights, implementation, mask=None, dtype=np.float32):
    """{"out": ..., "x": the gradient by x, ...}"""
    inputs = [a.astype(dtype) for a in arrays]
    gradients, out = program(update, implementation)(inputs, weights.astype(dtype), mask)
    names = ("x", "kernel_x", "kernel_h", "bias", "theta", "h", "c")
    return {"out": np.asarray(out), **{name: np.asarray(g) for name, g in zip(names, gradients, strict=True)}}


@functools.cache
def expected(update, masked, batch=BATCH, steps=STEPS, hidden=HIDDEN):
    """The reference, in float64."""
    arrays, weights = make(update, batch, steps, hidden)
    mask = make_mask(batch, steps) if masked else None
    with jax.enable_x64(True):
        return outputs_and_gradients(update, arrays, weights, "reference", mask, np.float64)


def assert_close(got, want, tolerance=TOLERANCE):
    for name, value in want.items():
        error = np.linalg.norm(got[name] - value) / max(np.linalg.norm(value), 1e-30)
        assert error < tolerance, f"{name} off by {error:.1e}"


@pytest.mark.parametrize(("update", "masked"), [*((u, True) for u in UPDATES), ("convex", False)])
def test_reference_is_the_loop(update, masked):
    x, kernel_x, kernel_h, bias, theta, h, c = make(update)[0]
    mask, out = make_mask() if masked else np.ones((BATCH, STEPS), bool), []
    for t in range(STEPS):
        i, o, g, *f = np.split(x[:, t] @ kernel_x + h @ kernel_h + bias, kernel_h.shape[1] // HIDDEN, axis=-1)
        new, rate = sigmoid(i) * np.tanh(g), sigmoid(theta)
        keep = {"convex": 1 - rate, "forget": rate, "lstm": sigmoid(f[0]) if f else None}[update]
        new_c = keep * c + (rate * new if update == "convex" else new)
        real = mask[:, t, None]
        h, c = np.where(real, sigmoid(o) * np.tanh(new_c), h), np.where(real, new_c, c)
        out.append(h)
    assert expected(update, masked)["out"].dtype == np.float64
    np.testing.assert_allclose(expected(update, masked)["out"], np.stack(out, 1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("implementation", "update", "masked"),
    [*((i, u, True) for i in FAST for u in UPDATES), *((i, "convex", False) for i in FAST)],
)
def test_equals_the_reference_in_float64(implementation, update, masked):
    got = outputs_and_gradients(update, *make(update), implementation, make_mask() if masked else None)
    assert got["out"].dtype == np.float32
    if update == "lstm":
        assert not got["theta"].any()
    assert_close(got, expected(update, masked))


def test_xla_in_float64():
    with jax.enable_x64(True):
        got = outputs_and_gradients("convex", *make("convex"), "xla", make_mask(), np.float64)
    assert_close(got, expected("convex", True), 1e-13)


def test_one_step():
    got = outputs_and_gradients("convex", *make("convex", steps=1), "xla")
    assert_close(got, expected("convex", False, steps=1))


def test_zeros_are_the_initial_state():
    arrays, weights = make("convex")
    zeros = [*arrays[:5], np.zeros_like(arrays[5]), np.zeros_like(arrays[6])]
    out = jax.jit(hinf_lstm)(*(a.astype(np.float32) for a in arrays[:5]))
    want = outputs_and_gradients("convex", zeros, weights, "xla")["out"]
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("implementation", "update"), [("xla", "convex"), ("pallas", "lstm")])
def test_bfloat16_is_close(implementation, update):
    arrays, weights = make(update)
    got = outputs_and_gradients(update, arrays, weights, implementation, make_mask(), jnp.bfloat16)
    assert all(a.dtype == jnp.bfloat16 for a in got.values())
    # The same rounded numbers in float32: what is left is the rounding of h, outputs and gradients, 2^-9 each.
    rounded = [a.astype(jnp.bfloat16).astype(np.float32) for a in arrays]
    want = outputs_and_gradients(update, rounded, weights.astype(jnp.bfloat16), "xla", make_mask())
    assert_close({name: a.astype(np.float32) for name, a in got.items()}, want, 0.01)


def test_bfloat16_keeps_its_memory_in_float32():
    # 400 steps of 1/1000 of the way: a memory of 8 bits would stand still before it got there.
    steps, theta = 400, np.full(1, -7.0, np.float32)
    x, kernel = np.zeros((1, steps, 1), jnp.bfloat16), np.zeros((1, 3), jnp.bfloat16)
    out = jax.jit(hinf_lstm)(x, kernel, kernel, np.full(3, 9, jnp.bfloat16), theta)
    assert float(out[0, -1, 0]) == pytest.approx(np.tanh(1 - (1 - sigmoid(-7.0)) ** steps), rel=0.01)


@pytest.mark.parametrize("implementation", FAST)
def test_forget_is_an_lstm_with_a_constant_forget_gate(implementation):
    arrays, weights = make("forget")
    x, kernel_x, kernel_h, bias, theta, h, c = arrays
    without = lambda kernel: np.concatenate([kernel, np.zeros((len(kernel), HIDDEN))], axis=1)
    as_lstm = [x, without(kernel_x), without(kernel_h), np.concatenate([bias, theta]), theta, h, c]
    got = outputs_and_gradients("lstm", as_lstm, weights, implementation, make_mask())
    want = outputs_and_gradients("forget", arrays, weights, implementation, make_mask())
    got["theta"] = got["bias"][3 * HIDDEN :]
    for name in ("kernel_x", "kernel_h", "bias"):
        got[name] = got[name][..., : 3 * HIDDEN]
    assert_close(got, want)


def test_lstm_equals_torch():
    torch = pytest.importorskip("torch")
    arrays, weights = make("lstm")
    x, kernel_x, kernel_h, bias, _, h, c = (torch.tensor(a) for a in arrays)

    def torch_order(a):
        i, o, g, f = a.chunk(4, -1)
        return torch.cat([i, f, g, o], -1).T.contiguous()

    cell = torch.nn.LSTM(INPUTS, HIDDEN, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        cell.weight_ih_l0.copy_(torch_order(kernel_x))
        cell.weight_hh_l0.copy_(torch_order(kernel_h))
        cell.bias_ih_l0.copy_(torch_order(bias[None])[:, 0])
        cell.bias_hh_l0.zero_()
    for leaf in (x, h, c):
        leaf.requires_grad_()
    out, _ = cell(x, (h[None], c[None]))
    (out * torch.tensor(weights)).sum().backward()

    def own_order(a):
        i, f, g, o = np.split(a.numpy().T, 4, -1)
        return np.concatenate([i, o, g, f], -1)

    want = {
        "out": out.detach().numpy(),
        "x": x.grad.numpy(),
        "kernel_x": own_order(cell.weight_ih_l0.grad),
        "kernel_h": own_order(cell.weight_hh_l0.grad),
        "bias": own_order(cell.bias_ih_l0.grad),
        "h": h.grad.numpy(),
        "c": c.grad.numpy(),
    }
    assert_close(expected("lstm", False), want, 1e-12)


@pytest.mark.parametrize("implementation", FAST)
def test_seeds_as_one_vmapped_program(implementation):
    seeds = [make("convex", seed=seed) for seed in range(3)]
    masks = np.stack([np.roll(make_mask(), seed, axis=0) for seed in range(3)])
    arrays = [np.stack(same).astype(np.float32) for same in zip(*(a for a, _ in seeds), strict=True)]
    weights = np.stack([w for _, w in seeds]).astype(np.float32)
    gradients, out = jax.jit(jax.vmap(program("convex", implementation)))(arrays, weights, masks)
    for s, (own, w) in enumerate(seeds):
        alone = outputs_and_gradients("convex", own, w, implementation, masks[s])
        assert_close({"out": out[s], **dict(zip(list(alone)[1:], [g[s] for g in gradients], strict=True))}, alone)


def test_gradients_when_outputs_are_ignored():
    kept = np.s_[1:, ::4, :3]
    arrays, weights = make("convex")
    part = np.zeros_like(weights)
    part[kept] = weights[kept]
    with jax.enable_x64(True):
        want = outputs_and_gradients("convex", arrays, part, "reference", make_mask(), np.float64)
    single, w = [a.astype(np.float32) for a in arrays], weights[kept].astype(np.float32)
    total = lambda arrays: (run("convex", arrays, "xla", make_mask())[kept] * w).sum()
    del want["out"]
    assert_close(dict(zip(want, jax.jit(jax.grad(total))(single), strict=True)), want)


@pytest.mark.parametrize("implementation", FAST)
def test_a_padded_sequence_ends_with_its_last_real_step(implementation):
    arrays, weights = make("convex")
    lengths = np.random.default_rng(1).integers(1, STEPS + 1, BATCH)
    mask = np.arange(STEPS) < lengths[:, None]
    padded = [np.where(mask[..., None], arrays[0], 1e3), *arrays[1:]]
    out = outputs_and_gradients("convex", padded, weights, implementation, mask)["out"]
    whole = outputs_and_gradients("convex", arrays, weights, implementation)["out"]
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(out[row, -1], whole[row, length - 1], rtol=1e-5, atol=1e-6)
        assert (out[row, length:] == out[row, length - 1]).all()


@pytest.mark.parametrize("implementation", FAST)
def test_a_row_without_a_real_step_gives_its_initial_state(implementation):
    arrays, weights = make("convex")
    got = outputs_and_gradients("convex", arrays, weights, implementation, np.zeros((BATCH, STEPS), bool))
    np.testing.assert_array_equal(got["out"], np.repeat(arrays[5][:, None].astype(np.float32), STEPS, axis=1))
    np.testing.assert_allclose(got["h"], weights.sum(1), rtol=1e-4, atol=1e-5)
    assert all(not got[name].any() for name in ("x", "kernel_x", "kernel_h", "bias", "theta", "c"))


@pytest.mark.parametrize("implementation", FAST)
def test_saturated_gates_stay_finite(implementation):
    arrays, weights = make("convex")
    arrays[0] *= 1e4
    got = outputs_and_gradients("convex", arrays, weights, implementation)
    assert all(np.isfinite(a).all() for a in got.values())


def test_auto_is_xla_on_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("the choice on a CPU")
    arrays = [a.astype(np.float32) for a in make("convex")[0]]
    trace = lambda name: str(jax.make_jaxpr(lambda arrays: run("convex", arrays, name))(arrays))
    assert "pallas_call" in trace("pallas")
    assert "pallas_call" not in trace("auto")
    assert trace("auto") == trace("xla")


def test_the_xla_loops_work_in_place():
    """One buffer of gates serves all three uses: XLA copies it at each step if a read does not precede its write."""
    if jax.default_backend() != "cpu":
        pytest.skip("counts what the CPU's compiler allocates")
    arrays, weights = make("convex", batch=16, steps=200, hidden=16)
    arrays = [a.astype(np.float32) for a in arrays]
    step = jax.jit(jax.grad(lambda arrays: (run("convex", arrays, "xla") * weights.astype(np.float32)).sum()))
    memory = step.lower(arrays).compile().memory_analysis()
    gates = 16 * 200 * 3 * 16 * 4
    # The gates, and h twice and c once, a third of the gates each; a copy of the gates would make it three.
    assert memory.temp_size_in_bytes < 2.3 * gates


@pytest.mark.usefixtures("abstract_device")
@pytest.mark.parametrize(("update", "dtype"), [("convex", jnp.float32), ("lstm", jnp.bfloat16)])
@pytest.mark.parametrize(("platform", "target", "name"), [("tpu", "tpu", "tpu_custom_call"), ("gpu", "cuda", "triton")])
def test_pallas_lowers_for_accelerators(platform, target, name, update, dtype):
    batch, steps, hidden, count = 20, 40, 32, module._GATES[update]
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    kernel, rate, state = array(hidden, count * hidden, dtype=dtype), array(hidden), array(batch, hidden)
    gates, bias = array(batch, steps, count * hidden), array(count * hidden)
    mask = array(batch, steps, dtype=jnp.bool)
    forward = jax.jit(functools.partial(module._pallas_forward, update, platform=platform))
    backward = jax.jit(functools.partial(module._pallas_backward, update, platform=platform))
    traced = forward.trace(gates, kernel, bias, rate, state, state, mask)
    out, saved = jax.tree.map(lambda a: array(*a.shape, dtype=a.dtype), traced.out_info)
    assert (out.shape, out.dtype) == ((batch, steps, hidden), dtype)
    for each in (traced, backward.trace(saved, kernel, rate, mask, out)):
        assert name in each.lower(lowering_platforms=(target,)).as_text()


@pytest.mark.parametrize("update", ["forget", "lstm"])
def test_cudnn_weights_by_jax_own_reference(update):
    """jax.experimental.rnn reads our vector of weights; its CPU reference computes what cuDNN would."""
    arrays, _ = make(update)
    x, kernel_x, kernel_h, bias, theta, h, c = (jnp.asarray(a, jnp.float32) for a in arrays)
    weights = module._cudnn_weights(update, kernel_x, kernel_h, bias, theta)
    assert weights.shape == (rnn.get_num_params_in_lstm(INPUTS, HIDDEN, 1, False),)
    parts = rnn.unpack_lstm_weights(weights, INPUTS, HIDDEN, 1, False)
    lengths = jnp.full(BATCH, STEPS, jnp.int32)
    out, _, _ = rnn.lstm_ref(x, h[None], c[None], *parts, lengths, INPUTS, HIDDEN, 1, 0.0, False)
    # Every third row of the mask is all real.
    assert_close({"out": np.asarray(out[::3])}, {"out": expected(update, True)["out"][::3]})


def test_packing_turns_any_mask_into_lengths():
    arrays, weights = make("convex")
    mask = make_mask()
    mask[0] = False
    mask[1, :3] = False
    packed, lengths, place = module._pack(jnp.asarray(arrays[0], jnp.float32), jnp.asarray(mask))
    assert lengths.tolist() == np.maximum(mask.sum(1), 1).tolist()
    out = outputs_and_gradients("convex", [packed, *arrays[1:]], weights, "xla")["out"]
    want = outputs_and_gradients("convex", arrays, weights, "xla", mask)["out"]
    unpacked = module._unpack(out, jnp.asarray(arrays[5], jnp.float32), place)
    np.testing.assert_allclose(unpacked, want, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("update", ["forget", "lstm"])
def test_cudnn_on_a_gpu(update, masked):
    with jax.default_matmul_precision("highest"):
        got = outputs_and_gradients(update, *make(update), "cudnn", make_mask() if masked else None)
    assert_close(got, expected(update, masked), 1e-4)


def test_cudnn_says_what_it_cannot_do():
    arrays = [a.astype(np.float32) for a in make("forget")[0]]
    with pytest.raises(ValueError, match="update='forget'"):
        run("convex", arrays, "cudnn")
    with pytest.raises(ValueError, match="x is bfloat16"):
        run("forget", [arrays[0].astype(jnp.bfloat16), *arrays[1:]], "cudnn")
    if jax.default_backend() == "cpu":
        with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
            run("forget", arrays, "cudnn")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", dict(x=np.zeros((3, 5)))),
        ("x", dict(x=np.zeros((3, 4, 5), int))),
        ("x", dict(x=np.zeros((3, 0, 5)))),
        ("kernel_x", dict(kernel_x=np.zeros((6, 21)))),
        ("kernel_h", dict(kernel_h=np.zeros((7, 28)))),
        ("bias", dict(bias=np.zeros(7))),
        ("theta", dict(theta=np.zeros(21))),
        ("initial", dict(initial=(np.zeros((3, 7)),))),
        ("initial c", dict(initial=(np.zeros((3, 7)), np.zeros((1, 7))))),
        ("mask", dict(mask=np.ones((4, 3)))),
        ("update", dict(update="lstm")),
        ("implementation", dict(implementation="fast")),
    ],
)
def test_errors_name_the_argument(name, change):
    shapes = dict(x=(3, 4, 5), kernel_x=(5, 21), kernel_h=(7, 21), bias=(21,), theta=(7,))
    good = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        hinf_lstm(**{**good, **change})


def test_lstm_wants_four_gates():
    with pytest.raises(ValueError, match=r"kernel_h has shape \(7, 21\); needs \(H, 4H\)"):
        lstm(np.zeros((3, 4, 5)), np.zeros((5, 21)), np.zeros((7, 21)), np.zeros(21))


def test_pallas_on_a_gpu_wants_a_power_of_two():
    gates, state = jnp.zeros((3, 4, 21)), jnp.zeros((3, 7))
    with pytest.raises(ValueError, match="kernel_h has H=7"):
        module._pallas_forward(
            "convex", gates, jnp.zeros((7, 21)), jnp.zeros(21), jnp.zeros(7), state, state, None, platform="gpu"
        )
