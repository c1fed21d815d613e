"""The H-infinity LSTM and the plain LSTM: one recurrence, several implementations.

Gates are `i` (input), `o` (output), `g` (candidate) and, in the plain LSTM, `f` (forget), in this order along the
last axis of every kernel and bias: sigmoid (i, o, f) or tanh (g) of x_t kernel_x + h_{t-1} kernel_h + bias. Then

    convex   c_t = (1 - rate) c_{t-1} + rate (i g)      rate = sigmoid(theta), the H-infinity paper's public code
    forget   c_t = rate c_{t-1} + i g                   the paper's "fixed learned coefficient"
    lstm     c_t = f c_{t-1} + i g                      Hochreiter and Schmidhuber with Gers' forget gate
    h_t = o tanh(c_t)

Only `h kernel_h` has to wait for the step before. Everything else is done for all steps at once: the projection of x
before the loop, and after the backward loop one matrix product for each weight's gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import rnn

IMPLEMENTATIONS = ("auto", "reference", "xla", "pallas", "cudnn")
_GATES = {"convex": 3, "forget": 3, "lstm": 4}
State = tuple[jax.Array, jax.Array]


def hinf_lstm(
    x: jax.Array,
    kernel_x: jax.Array,
    kernel_h: jax.Array,
    bias: jax.Array,
    theta: jax.Array,
    update: str = "convex",
    implementation: str = "auto",
    *,
    initial: State | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """The H-infinity LSTM over a batch of sequences.

    Args:
      x: (B, T, D) float32 or bfloat16. Its type is that of the matrix products and of the result; the state, the sums
        and the activations are float32 (float64 for a float64 x). `jax.default_matmul_precision` holds, as ever.
      kernel_x, kernel_h, bias: (D, 3H), (H, 3H), (3H,); gates in the order input, output, candidate.
      theta: (H,) the memory's rate before the sigmoid.
      update: "convex" or "forget", see the module's docstring.
      implementation: "reference", "xla", "pallas" (interpreted on a CPU, slowly; on several devices inside pmap or
        shard_map only), "cudnn" (an NVIDIA GPU, float32, "forget" only) or "auto".
      initial: (h, c) before the first step, each (B, H); zeros when None.
      mask: (B, T), 0 or False at padded steps, anywhere. Such a step keeps h and c and outputs that h, so that
        `[:, -1]` of the result is the last real step's.
    Returns: (B, T, H), every step's h.
    Raises:
      ValueError: shapes that do not fit, an unknown update or implementation.
      RuntimeError: "cudnn" without an NVIDIA GPU.
    """
    if update not in ("convex", "forget"):
        raise ValueError(f"update={update!r}: choose convex or forget")
    x, kernel_x, kernel_h, bias, theta = map(jnp.asarray, (x, kernel_x, kernel_h, bias, theta))
    hidden = _check(x, kernel_x, kernel_h, bias, initial, mask, gates=3)
    if theta.shape != (hidden,):
        raise ValueError(f"theta has shape {theta.shape}; kernel_h of {kernel_h.shape} needs ({hidden},)")
    return _run(implementation, update, x, kernel_x, kernel_h, bias, theta, initial, mask)


def lstm(
    x: jax.Array,
    kernel_x: jax.Array,
    kernel_h: jax.Array,
    bias: jax.Array,
    implementation: str = "auto",
    *,
    initial: State | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """The plain LSTM: as `hinf_lstm`, with a forget gate in place of theta.

    Args:
      kernel_x, kernel_h, bias: (D, 4H), (H, 4H), (4H,); gates in the order input, output, candidate, forget.
      x, implementation, initial, mask: as in `hinf_lstm`; "cudnn" is offered too.
    Returns, raises: as in `hinf_lstm`.
    """
    x, kernel_x, kernel_h, bias = map(jnp.asarray, (x, kernel_x, kernel_h, bias))
    hidden = _check(x, kernel_x, kernel_h, bias, initial, mask, gates=4)
    unused = jnp.zeros(hidden, bias.dtype)
    return _run(implementation, "lstm", x, kernel_x, kernel_h, bias, unused, initial, mask)


def _check(x, kernel_x, kernel_h, bias, initial, mask, gates: int) -> int:
    """H, or a ValueError naming the first argument that does not fit."""
    if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype} of shape {x.shape}; needs floats of (B, T, D)")
    batch, steps, inputs = x.shape
    if steps == 0:
        raise ValueError(f"x has shape {x.shape}; needs at least one step")
    if kernel_h.ndim != 2 or kernel_h.shape[1] != gates * kernel_h.shape[0]:
        raise ValueError(f"kernel_h has shape {kernel_h.shape}; needs (H, {gates}H)")
    hidden = kernel_h.shape[0]
    wanted = {"kernel_x": (kernel_x, (inputs, gates * hidden)), "bias": (bias, (gates * hidden,))}
    if initial is not None:
        if len(initial) != 2:
            raise ValueError(f"initial has {len(initial)} parts; needs (h, c)")
        wanted |= {"initial h": (initial[0], (batch, hidden)), "initial c": (initial[1], (batch, hidden))}
    if mask is not None:
        wanted["mask"] = (mask, (batch, steps))
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; x {x.shape}, kernel_h {kernel_h.shape} need {shape}")
    return hidden


def _run(implementation, update, x, kernel_x, kernel_h, bias, theta, initial, mask):
    """The one place that chooses an implementation."""
    if implementation == "auto":
        # GPU: nothing was timed on one yet, so "xla". TPU: jit cannot split a Pallas kernel over several devices.
        implementation = "pallas" if jax.default_backend() == "tpu" and jax.device_count() == 1 else "xla"
    wide = _wide(x.dtype)
    if initial is None:
        initial = (jnp.zeros((x.shape[0], kernel_h.shape[0]), wide),) * 2
    h, c = (s.astype(wide) for s in initial)
    mask = None if mask is None else mask > 0
    if implementation == "cudnn":
        return _cudnn(update, x, kernel_x, kernel_h, bias, theta, h, c, mask)
    rate = jax.nn.sigmoid(theta.astype(wide))
    if implementation == "reference":
        return _reference(update, x, kernel_x, kernel_h, bias, rate, h, c, mask)
    if implementation in ("xla", "pallas"):
        return _layer(update, implementation, x, kernel_x, kernel_h, bias, rate, h, c, mask)
    raise ValueError(f"implementation={implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")


def _wide(dtype):
    """The type of state and sums."""
    return jnp.promote_types(dtype, jnp.float32)


def _reference(update, x, kernel_x, kernel_h, bias, rate, h, c, mask):
    """The equations, a step at a time; differentiated by JAX. What the others are held against."""
    x, kernel_x, kernel_h, bias = (a.astype(h.dtype) for a in (x, kernel_x, kernel_h, bias))
    bias, rate = bias[None], rate[None]

    def step(state, inputs):
        h, c = state
        x_t, real = inputs
        gates = jnp.split(x_t @ kernel_x + h @ kernel_h + bias, _GATES[update], axis=-1)
        i, o, g = jax.nn.sigmoid(gates[0]), jax.nn.sigmoid(gates[1]), jnp.tanh(gates[2])
        if update == "convex":
            new_c = (1 - rate) * c + rate * (i * g)
        elif update == "forget":
            new_c = rate * c + i * g
        else:
            new_c = jax.nn.sigmoid(gates[3]) * c + i * g
        new_h = o * jnp.tanh(new_c)
        h, c = jnp.where(real[:, None], new_h, h), jnp.where(real[:, None], new_c, c)
        return (h, c), h

    mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
    out = jax.lax.scan(step, (h, c), (x.swapaxes(0, 1), mask.T))[1]
    return out.swapaxes(0, 1).astype(x.dtype)


# The cell, on values: shared by the XLA loops and the Pallas kernels. `act` are the gates after their activation.


def _activate(gates):
    i, o, g, *f = gates
    return [jax.nn.sigmoid(i), jax.nn.sigmoid(o), jnp.tanh(g), *map(jax.nn.sigmoid, f)]


def _remember(update, rate, act, c):
    """The new c."""
    i, _, g, *f = act
    if update == "convex":
        return (1 - rate) * c + rate * (i * g)
    return (f[0] if f else rate) * c + i * g


def _step_back(update, rate, act, c, dh, dc):
    """One step's gradients: by its gates before activation, by the c it started from and by the rate.

    Args: `c` that it started from; `dh`, `dc` by the h and c that it ended with.
    """
    i, o, g, *f = act
    tanh_c = jnp.tanh(_remember(update, rate, act, c))
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    new = dc * rate if update == "convex" else dc
    gates = [new * g * i * (1 - i), dh * tanh_c * o * (1 - o), new * i * (1 - g * g)]
    if update == "convex":
        return gates, dc * (1 - rate), dc * (i * g - c)
    if update == "forget":
        return gates, dc * rate, dc * c
    return [*gates, dc * c * f[0] * (1 - f[0])], dc * f[0], jnp.zeros_like(dc)


# The layer around the recurrence: projections, weight gradients.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _layer(update, implementation, x, kernel_x, kernel_h, bias, rate, h, c, mask):
    return _layer_forward(update, implementation, x, kernel_x, kernel_h, bias, rate, h, c, mask)[0]


def _layer_forward(update, implementation, x, kernel_x, kernel_h, bias, rate, h, c, mask):
    gates = _dot(x, kernel_x)
    out, saved = _FORWARD[implementation](update, gates, kernel_h.astype(x.dtype), bias, rate, h, c, mask)
    return out, (x, kernel_x, kernel_h, bias, rate, h, mask, out, saved)


def _layer_backward(update, implementation, residuals, dout):
    x, kernel_x, kernel_h, bias, rate, h, mask, out, saved = residuals
    d_gates, dh, dc, d_rate = _BACKWARD[implementation](update, saved, kernel_h.astype(x.dtype), rate, mask, dout)
    # As products of plain matrices: as contractions over two axes XLA's CPU code transposes the operands first.
    rows = d_gates.reshape(-1, d_gates.shape[-1])
    before = jnp.concatenate([h.astype(x.dtype)[:, None], out[:, :-1]], axis=1)
    return (
        _dot(rows, kernel_x.T, x.dtype).reshape(x.shape).astype(x.dtype),
        _dot(x.reshape(-1, x.shape[-1]).T, rows, x.dtype).astype(kernel_x.dtype),
        _dot(before.reshape(-1, before.shape[-1]).T, rows, x.dtype).astype(kernel_h.dtype),
        rows.sum(0).astype(bias.dtype),
        d_rate.sum(0),
        dh,
        dc,
        None,
    )


_layer.defvjp(_layer_forward, _layer_backward)


def _dot(a, b, dtype=None):
    """a @ b of `dtype` (that of `a` when None), summed and returned in the state's type."""
    dtype = dtype or a.dtype
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=_wide(dtype))


# XLA. Batch-major throughout, so that nothing is transposed, and as loops that overwrite one buffer of (B, T, gates):
# with projections, then activations, then gradients by the projections. A scan would hold all three, and on a CPU the
# first touch of fresh memory costs as much as the arithmetic.


def _at(buffer, t):
    return jax.lax.dynamic_index_in_dim(buffer, t, axis=1, keepdims=False)


def _put(buffer, value, t):
    return jax.lax.dynamic_update_index_in_dim(buffer, value.astype(buffer.dtype), t, axis=1)


def _xla_forward(update, gates, kernel_h, bias, rate, h, c, mask):
    bias, rate = bias[None], rate[None]

    def step(t, state):
        buffer, out, befores, h, c = state
        befores = _put(befores, c, t)
        act = _activate(jnp.split(_at(buffer, t) + bias + _dot(h, kernel_h, kernel_h.dtype), _GATES[update], axis=-1))
        new_c = _remember(update, rate, act, c)
        new_h = act[1] * jnp.tanh(new_c)
        if mask is not None:
            real = _at(mask, t)[:, None]
            new_h, new_c = jnp.where(real, new_h, h), jnp.where(real, new_c, c)
        return _put(buffer, jnp.concatenate(act, -1), t), _put(out, new_h, t), befores, new_h, new_c

    batch, steps, _ = gates.shape
    shape = (batch, steps, h.shape[-1])
    buffers = gates, jnp.zeros(shape, kernel_h.dtype), jnp.zeros(shape, c.dtype)
    act, out, befores, _, _ = jax.lax.fori_loop(0, steps, step, (*buffers, h, c))
    return out, (act, befores)


def _xla_backward(update, saved, kernel_h, rate, mask, dout):
    buffer, befores = saved
    steps = buffer.shape[1]
    transposed, rate = kernel_h.T, rate[None]

    def step(k, state):
        buffer, act, dh, dc, d_rate = state
        t = steps - 1 - k
        dh = dh + _at(dout, t)
        d_gates, new_dc, d_rate_t = _step_back(
            update, rate, jnp.split(act, _GATES[update], -1), _at(befores, t), dh, dc
        )
        d_gates = jnp.concatenate(d_gates, -1)
        if mask is not None:
            real = _at(mask, t)[:, None]
            d_gates, new_dc, d_rate_t = d_gates * real, jnp.where(real, new_dc, dc), d_rate_t * real
        new_dh = _dot(d_gates, transposed, kernel_h.dtype)
        if mask is not None:
            new_dh = jnp.where(real, new_dh, dh)
        buffer = _put(buffer, d_gates, t)
        # The next step's activations are read here, after the write: a read of the buffer in the step that overwrites
        # it makes XLA copy the whole buffer at every step.
        return buffer, _at(buffer, t - 1), new_dh, new_dc, d_rate + d_rate_t

    zero = jnp.zeros_like(befores[:, 0])
    d_gates, _, dh, dc, d_rate = jax.lax.fori_loop(0, steps, step, (buffer, _at(buffer, steps - 1), zero, zero, zero))
    return d_gates, dh, dc, d_rate


# Pallas. Time-major and the gates apart, (T, gates, B, H): on a TPU a gate is then whole registers, on a GPU a block
# has a power of two of columns. A program of the grid (batch tiles, time chunks) walks through its chunk's steps. The
# running state lies in output blocks that all chunks of a tile share, so it and kernel_h stay on the chip throughout.
# A GPU runs its grid's programs in any order: there a chunk is the whole sequence. Not run on either so far: only
# lowered for both, and interpreted.


_CHUNK_BYTES = 4 << 20  # of one chunk's blocks; they are buffered twice, in a TPU core's usual limit of 16 MiB


def _pallas_forward(update, gates, kernel_h, bias, rate, h, c, mask, platform=None):
    def body(first, count, z_ref, kernel_ref, rate_ref, h0_ref, c0_ref, *refs):
        *mask_ref, out_ref, act_ref, before_ref, h_ref, c_ref = refs

        def step(t, state):
            h, c = state
            before_ref[t] = c
            act = _activate([z_ref[t, k] + _dot(h, kernel_ref[k], kernel_ref.dtype) for k in range(gate_count)])
            for k in range(gate_count):
                act_ref[t, k] = act[k]
            new_c = _remember(update, rate_ref[...], act, c)
            new_h = act[1] * jnp.tanh(new_c)
            if mask_ref:
                real = jnp.broadcast_to(mask_ref[0][t], h.shape) > 0
                new_h, new_c = jnp.where(real, new_h, h), jnp.where(real, new_c, c)
            out_ref[t] = new_h.astype(out_ref.dtype)
            return new_h, new_c

        start = jax.lax.select(first, h0_ref[...], h_ref[...]), jax.lax.select(first, c0_ref[...], c_ref[...])
        h_ref[...], c_ref[...] = jax.lax.fori_loop(0, count, step, start)

    gate_count, wide = _GATES[update], gates.dtype
    inputs = [("gates", _apart(gates + bias[None, None], gate_count)), ("whole", _gate_kernels(kernel_h, gate_count))]
    inputs += [("whole", rate[None]), ("state", _pad_rows(h)), ("state", _pad_rows(c)), *_mask_input(mask)]
    outputs = [("steps", kernel_h.dtype), ("gates", wide), ("steps", wide), ("state", wide), ("state", wide)]
    out, act, befores, _, _ = _pallas_call(body, inputs, outputs, reverse=False, platform=platform)
    return out[:, : len(h)].swapaxes(0, 1), (act, befores)


def _pallas_backward(update, saved, kernel_h, rate, mask, dout, platform=None):
    act, befores = saved
    gate_count, wide = _GATES[update], act.dtype

    def body(first, count, act_ref, kernel_ref, rate_ref, before_ref, dout_ref, *refs):
        *mask_ref, gates_ref, dh_ref, dc_ref, rate_sum_ref = refs

        def step(k, state):
            dh, dc, rate_sum = state
            t = count - 1 - k
            dh = dh + dout_ref[t]
            act = [act_ref[t, k] for k in range(gate_count)]
            d_gates, new_dc, d_rate = _step_back(update, rate_ref[...], act, before_ref[t], dh, dc)
            new_dh = jnp.zeros_like(dh)
            if mask_ref:
                real = jnp.broadcast_to(mask_ref[0][t], dh.shape)
                d_gates, d_rate = [d * real for d in d_gates], d_rate * real
                new_dh, new_dc = jnp.where(real > 0, 0, dh), jnp.where(real > 0, new_dc, dc)
            for k in range(gate_count):
                gates_ref[t, k] = d_gates[k]
                new_dh += _dot(d_gates[k], kernel_ref[k], kernel_ref.dtype)
            return new_dh, new_dc, rate_sum + d_rate

        running = dh_ref, dc_ref, rate_sum_ref
        start = tuple(jax.lax.select(first, jnp.zeros(ref.shape, ref.dtype), ref[...]) for ref in running)
        dh_ref[...], dc_ref[...], rate_sum_ref[...] = jax.lax.fori_loop(0, count, step, start)

    batch = len(dout)
    inputs = [("gates", act), ("whole", _gate_kernels(kernel_h, gate_count).swapaxes(1, 2)), ("whole", rate[None])]
    inputs += [("steps", befores), ("steps", _pad_rows(dout.astype(wide)).swapaxes(0, 1)), *_mask_input(mask)]
    outputs = [("gates", wide)] + [("state", wide)] * 3
    d_gates, *sums = _pallas_call(body, inputs, outputs, reverse=True, platform=platform)
    d_gates = d_gates.transpose(2, 0, 1, 3)[:batch].reshape(*dout.shape[:2], -1)
    return d_gates, *(s[:batch] for s in sums)


def _pallas_call(body, inputs, outputs, reverse, platform):
    """body(is this a tile's first chunk, steps in this chunk, *refs) over the grid, in reverse order of time or not.

    Inputs are (kind, array), outputs (kind, type); a kind says how an array is cut into blocks. The first input has
    the kind "gates".
    """
    platform = platform or jax.default_backend()
    steps, gate_count, batch, hidden = inputs[0][1].shape
    if platform == "gpu":
        if hidden < 16 or hidden & (hidden - 1):
            raise ValueError(f"kernel_h has H={hidden}; pallas on a GPU needs a power of two from 16 on: use xla")
        tile, chunk = 16, steps
    else:
        tile = next(rows for rows in (64, 32, 16) if batch % rows == 0)
        chunk = max(1, min(steps, _CHUNK_BYTES // (4 * tile * hidden * (2 * gate_count + 3))))
    chunks = pl.cdiv(steps, chunk)
    place = (lambda j: chunks - 1 - j) if reverse else (lambda j: j)

    def spec(kind, shape):
        if kind == "gates":
            return pl.BlockSpec((chunk, gate_count, tile, hidden), lambda b, j: (place(j), 0, b, 0))
        if kind == "steps":
            return pl.BlockSpec((chunk, tile, shape[-1]), lambda b, j: (place(j), b, 0))
        if kind == "state":
            return pl.BlockSpec((tile, hidden), lambda b, j: (b, 0))
        return pl.BlockSpec(shape, lambda b, j: (0,) * len(shape))

    def kernel(*refs):
        j = pl.program_id(1)
        count = chunk if steps % chunk == 0 else jnp.minimum(chunk, steps - place(j) * chunk)
        body(j == 0, count, *refs)

    shapes = {"gates": (steps, gate_count, batch, hidden), "steps": (steps, batch, hidden), "state": (batch, hidden)}
    parameters: Any = None
    if platform == "tpu":
        from jax.experimental.pallas import tpu

        parameters = tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))
    elif platform == "gpu":
        # Deprecated in JAX 0.11, but there still the only backend of `pallas_call` for a GPU: Mosaic GPU needs kernels
        # of its own.
        from jax.experimental.pallas import triton

        parameters = triton.CompilerParams()
    call = pl.pallas_call(
        kernel,
        grid=(batch // tile, chunks),
        in_specs=[spec(kind, array.shape) for kind, array in inputs],
        out_specs=[spec(kind, shapes[kind]) for kind, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shapes[kind], dtype) for kind, dtype in outputs],
        interpret=platform == "cpu",
        compiler_params=parameters,
    )
    return call(*(array for _, array in inputs))


def _pad_rows(a):
    """Zero rows to a multiple of 16, the least that a block of bfloat16 takes on a TPU and a product on a GPU."""
    return jnp.pad(a, [(0, -len(a) % 16)] + [(0, 0)] * (a.ndim - 1))


def _apart(rows, gate_count):
    """(B, T, gates H) -> (T, gates, B rounded up, H)."""
    return _pad_rows(rows).reshape(-(-len(rows) // 16) * 16, rows.shape[1], gate_count, -1).transpose(1, 2, 0, 3)


def _gate_kernels(kernel_h, gate_count):
    """(H, gates H) -> (gates, H, H)."""
    return kernel_h.reshape(len(kernel_h), gate_count, -1).swapaxes(0, 1)


def _mask_input(mask):
    return [] if mask is None else [("steps", _pad_rows(mask.astype(jnp.float32)).T[..., None])]


_FORWARD: dict[str, Any] = {"xla": _xla_forward, "pallas": _pallas_forward}
_BACKWARD: dict[str, Any] = {"xla": _xla_backward, "pallas": _pallas_backward}


# cuDNN.


def _cudnn(update, x, kernel_x, kernel_h, bias, theta, h, c, mask):
    if update == "convex":
        raise ValueError("implementation='cudnn' computes an LSTM: choose update='forget' or another implementation")
    if x.dtype != jnp.float32:
        raise ValueError(f"x is {x.dtype}; implementation='cudnn' takes float32")
    if jax.default_backend() != "gpu":
        raise RuntimeError(f"implementation='cudnn' needs an NVIDIA GPU; JAX runs on {jax.default_backend()}")
    steps, hidden = x.shape[1], kernel_h.shape[0]
    lengths = jnp.full(len(x), steps, jnp.int32)
    if mask is not None:
        x, lengths, place = _pack(x, mask)
    weights = _cudnn_weights(update, kernel_x, kernel_h, bias, theta)
    out, _, _ = rnn.lstm(x, h[None], c[None], weights, lengths, x.shape[-1], hidden, 1, 0.0, False)
    return out if mask is None else _unpack(out, h, place)


def _cudnn_weights(update, kernel_x, kernel_h, bias, theta):
    """One vector in cuDNN's order: W_ih (4H, D), W_hh (4H, H), b_ih, b_hh; gates input, forget, candidate, output.

    The forget update is an LSTM whose forget gate has no weights, and theta for its bias.
    """

    def gates(kernel, forget):
        i, o, g, *f = jnp.split(kernel, _GATES[update], axis=-1)
        return jnp.concatenate([i, *(f or [forget]), g, o], axis=-1).T.ravel()

    hidden = len(kernel_h)
    biases = gates(bias, theta)
    matrices = [gates(kernel, jnp.zeros((len(kernel), hidden), kernel.dtype)) for kernel in (kernel_x, kernel_h)]
    return jnp.concatenate([*matrices, biases, jnp.zeros_like(biases)]).astype(jnp.float32)


def _pack(x, mask):
    """cuDNN knows lengths, not masks: each row's real steps moved to the front, their number (at least 1), and where
    step t's output is then to be found (-1 before the first real step)."""
    order = jnp.argsort(~mask, axis=1, stable=True)
    lengths = jnp.maximum(mask.sum(1), 1).astype(jnp.int32)
    return jnp.take_along_axis(x, order[..., None], axis=1), lengths, jnp.cumsum(mask, axis=1) - 1


def _unpack(out, h, place):
    out = jnp.take_along_axis(out, jnp.maximum(place, 0)[..., None], axis=1)
    return jnp.where(place[..., None] < 0, h[:, None], out)
