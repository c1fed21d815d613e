"""The selective scan of Mamba (Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces").

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t      for every channel D and state N
    y_t = C_t h_t + D u_t,  times silu(z_t) where there is a gate

`delta` may first pass through a bias and a softplus. Only the recurrence of h has to wait for the step before.
Both functions below run the same code, on arrays that lead with G: one direction of time, or two.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

IMPLEMENTATIONS = ("auto", "reference", "xla", "associative", "pallas")
_CHUNK = 16  # steps between the states that the gradient of "xla" starts again from
_PIECE = 1 << 14  # numbers in the states of those sequences that "xla" works on at a time on a CPU


def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    delta_softplus: bool = False,
    implementation: str = "auto",
    *,
    initial: jax.Array | None = None,
    return_last_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The scan over a batch of sequences.

    Args:
      u, delta, z: (B, L, D) float32 or bfloat16; the state and the sums are float32 (float64 for float64).
      A: (D, N), negative; B, C: (B, L, N); D, delta_bias: (D,).
      implementation: "reference" (a step at a time, differentiated by JAX), "xla" (a step at a time; the gradient keeps
        a state every few steps and computes the others again), "associative" (log L steps, all states in memory),
        "pallas" (as "xla", in one kernel for a GPU or TPU; interpreted on a CPU, slowly; on several devices inside
        shard_map only) or "auto". The gradients of "xla" and "pallas" cannot be differentiated again.
      initial: (B, N, D), the state before the first step; zeros when None.
    Returns: y (B, L, D) of u's type; with `return_last_state` also the state after the last step, (B, N, D).
    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    given = {name: None if array is None else jnp.asarray(array) for name, array in given.items()}
    _check(**given, initial=initial)
    lead = {name: None if array is None else array[None] for name, array in given.items()}
    state = None if initial is None else jnp.asarray(initial)[None]
    y, last = _run(implementation, delta_softplus, **lead, initial=state)
    return (y[0], last[0]) if return_last_state else y[0]


def bidirectional_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    delta_softplus: bool = False,
    implementation: str = "auto",
) -> jax.Array:
    """Two scans as one, [0] from the first step to the last, [1] from the last to the first.

    Args: as in `selective_scan`, each array with a leading axis of 2 and in natural order of time: u (2, B, L, D).
    Returns: (2, B, L, D) of u's type.
    Raises:
      ValueError: as in `selective_scan`, or a leading axis that is not 2.
    """
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    given = {name: None if array is None else jnp.asarray(array) for name, array in given.items()}
    for name, array in given.items():
        if array is not None and array.shape[:1] != (2,):
            raise ValueError(f"{name} has shape {array.shape}; needs a leading axis of 2, one for each direction")
    of_one_direction = {
        name: None if array is None else jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
        for name, array in given.items()
    }
    _check(**of_one_direction, initial=None)
    return _run(implementation, delta_softplus, **given, initial=None)[0]


def _check(u, delta, A, B, C, D, z, delta_bias, initial) -> None:
    """A ValueError naming the first argument that does not fit."""
    if u.ndim != 3 or not jnp.issubdtype(u.dtype, jnp.floating) or not u.shape[1]:
        raise ValueError(f"u is {u.dtype} of shape {u.shape}; needs floats of (B, L, D), at least one step")
    if A.ndim != 2:
        raise ValueError(f"A has shape {A.shape}; needs (D, N)")
    batch, length, channels = u.shape
    states = A.shape[1]
    wanted = {
        "delta": (delta, u.shape), "A": (A, (channels, states)), "B": (B, (batch, length, states)),
        "C": (C, (batch, length, states)), "D": (D, (channels,)), "z": (z, u.shape),
        "delta_bias": (delta_bias, (channels,)), "initial": (initial, (batch, states, channels)),
    }  # fmt: skip
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; u {u.shape} and A {A.shape} need {shape}")


def _run(implementation, delta_softplus, u, delta, A, B, C, D, z, delta_bias, initial):
    """y (G, B, L, D) and the last states (G, B, N, D), by the implementation that is asked for."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        implementation = _choose(A)
    wide = jnp.promote_types(u.dtype, jnp.float32)

    def wider(x: jax.Array) -> jax.Array:
        return x.astype(wide)

    def row(x: jax.Array | None) -> jax.Array:
        return jnp.zeros((directions, 1, channels), wide) if x is None else wider(x)[:, None]

    directions, batch, _, channels = u.shape
    A = wider(A).swapaxes(1, 2)
    state = jnp.zeros((directions, batch, *A.shape[1:]), wide) if initial is None else wider(initial)
    if implementation == "pallas":
        return _pallas(delta_softplus, u, delta, A, B, C, row(D), z, row(delta_bias), state)
    if implementation == "xla":
        return _xla(delta_softplus, u, delta, A, B, C, row(D), z, row(delta_bias), state)
    u, delta, B, C, z = (None if x is None else _turn(x) for x in (u, delta, B, C, z))
    u_, steps = wider(u), wider(delta) + row(delta_bias)[:, None]
    steps = jax.nn.softplus(steps) if delta_softplus else steps
    scan = {"reference": _reference, "associative": _associative}[implementation]
    y, last = scan(u_, steps, A, wider(B), wider(C), state)
    y = y + row(D)[:, None] * u_
    y = y if z is None else y * jax.nn.silu(wider(z))
    return _turn(y.astype(u.dtype)), last


def _choose(A) -> str:
    """What "auto" is.

    On a CPU "associative" was slower at every size (docs/measured/segmenter.md); accelerators are not measured.
    """
    backend = jax.default_backend()
    fits = backend == "tpu" or (backend == "gpu" and _fits_gpu(A.shape[1], A.shape[2]))
    # jit cannot split a Pallas kernel over several devices.
    return "pallas" if fits and jax.device_count() == 1 else "xla"


def _turn(x):
    """(G, B, L, ...): the second direction's steps in the opposite order."""
    return x if len(x) == 1 else jnp.stack([x[0], x[1, :, ::-1]])


# The recurrence alone: u, delta (G, B, L, D) and B, C (G, B, L, N), all in one order of time, A (G, N, D), state
# (G, B, N, D) -> y (G, B, L, D), the last state. Channels are last in a state, so that a step is element by element
# over whole vectors.


def _reference(u, delta, A, B, C, state):
    inputs = [jnp.moveaxis(x, 2, 0) for x in (u, delta, B, C)]
    last, y = jax.lax.scan(lambda h, now: _step(h, now, A[:, None]), state, inputs)
    return jnp.moveaxis(y, 0, 2), last


def _step(h, now, A):
    u_t, delta_t, B_t, C_t = now
    h = _decay(delta_t, A) * h + (delta_t * u_t)[..., None, :] * B_t[..., None]
    return h, _over_states(C_t[..., None], h)


def _decay(delta, A):
    """(..., D) and (..., N, D) -> (..., N, D)."""
    return jnp.exp(delta[..., None, :] * A)


def _over_states(*factors):
    """The sum over N of a product of (..., N, D), which is not kept as a whole."""
    slices = [[x[..., n, :] for x in factors] for n in range(factors[-1].shape[-2])]
    return _added([functools.reduce(jnp.multiply, each) for each in slices])


def _added(parts):
    """The sum over the first axis. Written out: XLA's CPU code can be ten times slower in a reduction."""
    return functools.reduce(jnp.add, [parts[i] for i in range(len(parts))])


def _associative(u, delta, A, B, C, state):
    decay = jnp.exp(delta[..., None, :] * A[:, None, None])
    inflow = (delta * u)[..., None, :] * B[..., None]
    inflow = inflow.at[:, :, 0].add(decay[:, :, 0] * state)

    def after(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    h = jax.lax.associative_scan(after, (decay, inflow), axis=2)[1]
    return (h * C[..., None]).sum(3), h[:, :, -1]


def _softplus(x):
    """Without the care for infinities of jax.nn.softplus, which takes longer than the rest."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


# XLA, a chunk of steps at a time. Each chunk is cut out of the whole arrays and widened when its turn comes, and what
# is made of it is written into its place: on a CPU copies of whole arrays cost as much as the arithmetic. So do states
# that its caches do not hold, so that there a few sequences follow a few others.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _xla(softplus, u, delta, A, B, C, D, z, bias, state):
    return _xla_forward(softplus, u, delta, A, B, C, D, z, bias, state)[0]


class _Chunks:
    """Where things are: in direction g, the sequences of piece p, the steps of chunk k in that direction's time.

    Chunks have `size` steps, out of which the first one may lend some to the second: those count there only.
    """

    def __init__(self, u, A):
        self.directions, batch, self.length, _ = u.shape
        fits = [b for b in range(1, batch + 1) if batch % b == 0 and b * A[0].size <= _PIECE]
        self.sequences = max(fits, default=1) if jax.default_backend() == "cpu" else batch
        self.pieces = batch // self.sequences
        even = [size for size in range(_CHUNK // 2, 2 * _CHUNK) if self.length % size == 0]
        self.size = min(even, key=lambda size: abs(size - _CHUNK), default=min(_CHUNK, self.length))
        self.count = -(-self.length // self.size)

    def start(self, g, p, k):
        step = jnp.maximum(0, self.length - (self.count - k) * self.size)
        return g, p * self.sequences, self.length - self.size - step if g else step, 0

    def cut(self, x, g, p, k, dtype):
        """(G, B, L, ...) -> (steps, sequences, ...)."""
        sizes = 1, self.sequences, self.size, x.shape[3]
        return jax.lax.dynamic_slice(x, self.start(g, p, k), sizes)[0].swapaxes(0, 1).astype(dtype)

    def put(self, x, value, g, p, k):
        """The inverse of `cut`."""
        return jax.lax.dynamic_update_slice(x, value.swapaxes(0, 1)[None].astype(x.dtype), self.start(g, p, k))

    def own(self, g, k):
        """Which steps count in this chunk (steps, 1, 1); None for all."""
        lent = self.count * self.size - self.length
        place = jnp.arange(self.size)[:, None, None]
        return None if not lent else (k > 0) | (place >= lent if g else place < self.size - lent)

    def over(self, body, carry, g, last_first=False):
        """body(t, carry) over a chunk's steps in the order of direction g's time, or against it."""
        turned = bool(g) != last_first
        return jax.lax.fori_loop(0, self.size, lambda i, c: body(self.size - 1 - i if turned else i, c), carry)


def _cut_piece(x, g, p, chunks):
    """(G, B, N, D) -> (sequences, N, D)."""
    return jax.lax.dynamic_slice(x, (g, p * chunks.sequences, 0, 0), (1, chunks.sequences, *x.shape[2:]))[0]


def _put_piece(x, value, g, p, chunks):
    return jax.lax.dynamic_update_slice(x, value[None], (g, p * chunks.sequences, 0, 0))


def _masked(x, own):
    return x if own is None else jnp.where(own, x, 0)


def _at(x, t):
    return jax.lax.dynamic_index_in_dim(x, t, keepdims=False)


def _xla_forward(softplus, u, delta, A, B, C, D, z, bias, state):
    chunks = _Chunks(u, A)
    starts = jnp.zeros((chunks.directions, chunks.pieces, chunks.count, chunks.sequences, *A.shape[1:]), state.dtype)

    def piece(g, p, carry):
        def chunk(k, carry):
            h, y, starts = carry
            u_k, delta_k, B_k, C_k = (chunks.cut(x, g, p, k, state.dtype) for x in (u, delta, B, C))
            given = delta_k + bias[g][None]
            sizes = _masked(_softplus(given) if softplus else given, chunks.own(g, k))
            starts = jax.lax.dynamic_update_slice(starts, h[None, None, None], (g, p, k, 0, 0, 0))

            def step(h, now, g=g):
                return _step(h, now, A[g][None])

            h, y_k = jax.lax.scan(step, h, (u_k, sizes, B_k, C_k), reverse=bool(g))
            y_k = y_k + D[g][None] * u_k
            y_k = y_k if z is None else y_k * jax.nn.silu(chunks.cut(z, g, p, k, state.dtype))
            return h, chunks.put(y, y_k, g, p, k), starts  # the second chunk writes over steps that the first one lent

        y, last, starts = carry
        h = _cut_piece(state, g, p, chunks)
        h, y, starts = jax.lax.fori_loop(0, chunks.count, chunk, (h, y, starts))
        return y, _put_piece(last, h, g, p, chunks), starts

    carry = jnp.zeros_like(u), state, starts
    for g in range(chunks.directions):
        carry = jax.lax.fori_loop(0, chunks.pieces, functools.partial(piece, g), carry)
    y, last, starts = carry
    return (y, last), (u, delta, A, B, C, D, z, bias, starts)


def _xla_backward(softplus, residuals, towards):
    u, delta, A, B, C, D, z, bias, starts = residuals
    dy, dlast = towards
    chunks, dtype = _Chunks(u, A), dlast.dtype
    over_channels = functools.partial(jnp.einsum, "kbnd,kbd->kbn", precision="highest")

    def after(f, before, last, x, g):
        """f(the states after each step, x) from those before it: they are those before the next one."""
        f_last = f(last[None], x[:1] if g else x[-1:])
        if g:
            return jnp.concatenate([f_last, f(before, jnp.roll(x, -1, axis=0))[:-1]])
        return jnp.concatenate([f(before, jnp.roll(x, 1, axis=0))[1:], f_last])

    def chunk(g, p, i, carry):
        dh, dA, dD, dbias, before, d, out = carry
        k = chunks.count - 1 - i
        u_k, given, B_k, C_k, dy_k = (chunks.cut(x, g, p, k, dtype) for x in (u, delta, B, C, dy))
        own, given = chunks.own(g, k), given + bias[g][None]
        sizes = _masked(_softplus(given) if softplus else given, own)
        # At once for the chunk: large enough for all cores. The barrier keeps the loops from computing it again.
        decay = jax.lax.optimization_barrier(_decay(sizes, A[g][None, None]))
        inflow = sizes * u_k

        def again(t, carry):
            h, before = carry
            new = _at(decay, t) * h + _at(inflow, t)[:, None] * _at(B_k, t)[..., None]
            return new, jax.lax.dynamic_update_index_in_dim(before, h, t, axis=0)

        start = jax.lax.dynamic_slice(starts, (g, p, k, 0, 0, 0), (1, 1, 1, *dh.shape))[0, 0, 0]
        last, before = chunks.over(again, (start, before), g)
        if z is not None:
            z_k = chunks.cut(z, g, p, k, dtype)
            gate = jax.nn.sigmoid(z_k)
            y_k = after(lambda h, C: _over_states(C[..., None], h), before, last, C_k, g) + D[g][None] * u_k
            dz_k = dy_k * y_k * gate * (1 + z_k * (1 - gate))
            dy_k = dy_k * z_k * gate
        dy_k = _masked(dy_k, own)

        def back(t, carry):
            dh, dA, d = carry  # dh: by the state after this step, from the steps after it alone
            d_t = dh + _at(dy_k, t)[:, None] * _at(C_k, t)[..., None]
            dh = _at(decay, t) * d_t
            dA = dA + dh * _at(before, t) * _at(sizes, t)[:, None]
            return dh, dA, jax.lax.dynamic_update_index_in_dim(d, d_t, t, axis=0)

        dh, dA, d = chunks.over(back, (dh, dA, d), g, last_first=True)
        dinflow = _over_states(B_k[..., None], d)
        ddelta = u_k * dinflow + _over_states(A[g][None, None], decay, before, d)
        ddelta = _masked(ddelta * jax.nn.sigmoid(given) if softplus else ddelta, own)
        dC = after(over_channels, before, last, dy_k, g)
        du = sizes * dinflow + D[g][None] * dy_k
        parts = [du, ddelta, over_channels(d, inflow), dC, *([] if z is None else [dz_k])]
        if own is not None:  # the second chunk has been here before
            parts = [jnp.where(own, part, chunks.cut(x, g, p, k, dtype)) for part, x in zip(parts, out, strict=True)]
        out = [chunks.put(x, part, g, p, k) for part, x in zip(parts, out, strict=True)]
        return dh, dA, dD + _added(dy_k * u_k), dbias + _added(ddelta), before, d, out

    def piece(g, p, carry):
        *sums, dstate, before, d, out = carry
        carry = _cut_piece(dlast, g, p, chunks), *sums, before, d, out
        dh, *sums, before, d, out = jax.lax.fori_loop(0, chunks.count, functools.partial(chunk, g, p), carry)
        return *sums, _put_piece(dstate, dh, g, p, chunks), before, d, out

    # `before` and `d` are the same two buffers in all chunks: fresh ones would be filled with zeros first.
    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros((*shape, chunks.sequences, *A.shape[1:]), dtype)

    before, d, dstate = zeros(chunks.size), zeros(chunks.size), dlast
    out, shared = [jnp.zeros_like(x) for x in (u, delta, B, C, *([] if z is None else [z]))], []
    for g in range(chunks.directions):
        carry = zeros(), zeros()[:, 0], zeros()[:, 0], dstate, before, d, out
        *sums, dstate, before, d, out = jax.lax.fori_loop(0, chunks.pieces, functools.partial(piece, g), carry)
        shared.append([x.sum(0) for x in sums])
    dA, dD, dbias = (jnp.stack(x) for x in zip(*shared, strict=True))
    du, ddelta, dB, dC, *dz = out
    return du, ddelta, dA, dB, dC, dD[:, None], dz[0] if dz else None, dbias[:, None], dstate


_xla.defvjp(_xla_forward, _xla_backward)
# Pallas: one kernel a pass, with the softplus, the skip and the gate in it. A program of the grid (direction, sequence,
# channels, time) walks through a block of steps and keeps its states (N, channels) on the chip; running values lie in
# output blocks that all blocks of time share. A GPU runs its grid's programs in any order: there a block is the whole
# sequence. Every few steps the forward pass saves a state, from which the backward pass computes the others again.
# Not run on either so far: only lowered for both, and interpreted.


_BLOCK = 128  # steps of a block, off a GPU
_SAVED = 8  # steps between saved states; written out, and their states held in registers
_TILES = (512, 384, 256, 128)  # channels of a program, off a GPU: the first that divides them, else all


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pallas(softplus, u, delta, A, B, C, D, z, bias, state):
    return _pallas_forward(softplus, u, delta, A, B, C, D, z, bias, state)[0]


def _pallas_forward(softplus, u, delta, A, B, C, D, z, bias, state, platform=None):
    """(y, last), residuals. A (G, N, D); D, bias (G, 1, D); z may be None; the others as in `bidirectional_scan`."""

    def body(
        first, chunks, steps_of, column, _, u_ref, delta_ref, A_ref, B_ref, C_ref, D_ref, bias_ref, state_ref, *refs
    ):
        *z_ref, y_ref, saved_ref, last_ref = refs
        A, D, bias, dtype = A_ref[...], D_ref[...], bias_ref[...], A_ref.dtype

        def chunk(k, h):
            saved_ref[k] = h
            for at, real in steps_of(k):
                u_t = u_ref[at].astype(dtype)
                delta_t = _size(delta_ref[at].astype(dtype) + bias, softplus, real)
                h = jnp.exp(delta_t * A) * h + column(B_ref[at].astype(dtype)) * (delta_t * u_t)
                y_t = (column(C_ref[at].astype(dtype)) * h).sum(0, keepdims=True) + D * u_t
                if z_ref:
                    y_t = y_t * jax.nn.silu(z_ref[0][at].astype(dtype))
                y_ref[at] = y_t.astype(y_ref.dtype)
            return h

        start = jax.lax.select(first, state_ref[...], last_ref[...])
        last_ref[...] = jax.lax.fori_loop(0, chunks, chunk, start)

    wide = state.dtype
    inputs = [("steps", u), ("steps", delta), ("channels", A), ("few", B), ("few", C), ("channels", D)]
    inputs += [("channels", bias), ("state", state), *([] if z is None else [("steps", z)])]
    outputs = [("steps", u.dtype), ("saved", wide), ("state", wide)]
    y, saved, last = _pallas_call(body, inputs, outputs, backward=False, platform=platform)
    return (y, last), (u, delta, A, B, C, D, z, bias, saved)


def _pallas_backward(softplus, residuals, towards, platform=None):
    u, delta, A, B, C, D, z, bias, saved = residuals
    dy, dlast = towards

    def body(
        first, chunks, steps_of, column, row, u_ref, delta_ref, A_ref, B_ref, C_ref, D_ref, bias_ref, saved_ref, *refs
    ):
        dy_ref, dlast_ref, *z_refs, du_ref, ddelta_ref, dB_ref, dC_ref, dA_ref, dD_ref, dbias_ref, dstate_ref = refs
        A, D, bias, dtype = A_ref[...], D_ref[...], bias_ref[...], A_ref.dtype

        def chunk(k, running):
            k = chunks - 1 - k
            dh, dA, dD, dbias = running
            h, steps = saved_ref[k], []
            for at, real in steps_of(k):
                u_t, given = u_ref[at].astype(dtype), delta_ref[at].astype(dtype) + bias
                delta_t, B_t = _size(given, softplus, real), column(B_ref[at].astype(dtype))
                decay, before = jnp.exp(delta_t * A), h
                h = decay * h + B_t * (delta_t * u_t)
                steps.append((at, real, u_t, given, delta_t, B_t, decay, before, h))
            for at, real, u_t, given, delta_t, B_t, decay, before, h in reversed(steps):
                dy_t, C_t = dy_ref[at].astype(dtype), column(C_ref[at].astype(dtype))
                if z_refs:
                    z_ref, dz_ref = z_refs
                    z_t = z_ref[at].astype(dtype)
                    y_t, gate = (C_t * h).sum(0, keepdims=True) + D * u_t, jax.nn.sigmoid(z_t)
                    dz_ref[at] = (dy_t * y_t * gate * (1 + z_t * (1 - gate))).astype(dz_ref.dtype)
                    dy_t = dy_t * z_t * gate
                dy_t = dy_t if real is None else jnp.where(real, dy_t, 0)
                d = dh + C_t * dy_t  # by this step's state
                dh = decay * d
                dexponent = dh * before
                dinflow = (d * B_t).sum(0, keepdims=True)
                ddelta_t = u_t * dinflow + (dexponent * A).sum(0, keepdims=True)
                if softplus:
                    ddelta_t = ddelta_t * jax.nn.sigmoid(given)
                ddelta_t = ddelta_t if real is None else jnp.where(real, ddelta_t, 0)
                du_ref[at] = (delta_t * dinflow + D * dy_t).astype(du_ref.dtype)
                ddelta_ref[at] = ddelta_t.astype(ddelta_ref.dtype)
                dB_ref[at] = row((d * (delta_t * u_t)).sum(1, keepdims=True))
                dC_ref[at] = row((h * dy_t).sum(1, keepdims=True))
                dA, dD, dbias = dA + dexponent * delta_t, dD + dy_t * u_t, dbias + ddelta_t
            return dh, dA, dD, dbias

        refs = dstate_ref, dA_ref, dD_ref, dbias_ref
        starts = dlast_ref[...], *(jnp.zeros(ref.shape, ref.dtype) for ref in refs[1:])
        running = tuple(jax.lax.select(first, start, ref[...]) for start, ref in zip(starts, refs, strict=True))
        running = jax.lax.fori_loop(0, chunks, chunk, running)
        for ref, value in zip(refs, running, strict=True):
            ref[...] = value

    wide, gate = dlast.dtype, [] if z is None else [("steps", z)]
    inputs = [("steps", u), ("steps", delta), ("channels", A), ("few", B), ("few", C), ("channels", D)]
    inputs += [("channels", bias), ("saved", saved), ("steps", dy), ("state", dlast), *gate]
    outputs = [*(("steps", a.dtype) for _, a in gate), ("steps", u.dtype), ("steps", delta.dtype), ("parts", wide)]
    outputs += [("parts", wide), ("state", wide), ("row", wide), ("row", wide), ("state", wide)]
    *dz, du, ddelta, dB, dC, dA, dD, dbias, dstate = _pallas_call(
        body, inputs, outputs, backward=True, platform=platform
    )
    dB, dC = dB.sum(2).astype(B.dtype), dC.sum(2).astype(C.dtype)
    return du, ddelta, dA.sum(1), dB, dC, dD.sum(1), dz[0] if dz else None, dbias.sum(1), dstate


_pallas.defvjp(_pallas_forward, _pallas_backward)


def _size(x, softplus, real):
    """The step's size after its softplus; 0, which leaves the state as it is, at what is no step."""
    x = _softplus(x) if softplus else x
    return x if real is None else jnp.where(real, x, 0)


def _pallas_call(body, inputs, outputs, backward, platform):
    """body(is this a program's first block, its chunks, steps_of, column, row, *refs) over the grid.

    steps_of(chunk) yields (where a step's row is in a block, whether it is a step at all: None for always), in that
    direction's order of time; column and row turn (1, N) into (N, 1) and back. Inputs are (kind, array), outputs (kind,
    type); a kind says how an array is cut into blocks. The first input has the kind "steps", the third is A.
    """
    platform = platform or jax.default_backend()
    A = inputs[2][1]
    (directions, batch, length, channels), states = inputs[0][1].shape, A.shape[1]
    if platform == "gpu":
        if not _fits_gpu(channels, states):
            raise ValueError(
                f"A has shape {(channels, states)}; pallas on a GPU needs channels by the 16 and a power of two of "
                "states: use xla"
            )
        tile, block = 16, length
    else:
        tile, block = next((t for t in _TILES if channels % t == 0), channels), min(_BLOCK, length)
    tiles, blocks, slots = channels // tile, pl.cdiv(length, block), pl.cdiv(block, _SAVED)

    def place(g, j):
        return jnp.where((g == 1) != backward, blocks - 1 - j, j)

    def spec(kind, rows):
        """The shape of a whole array of this kind, and its blocks."""
        shape, cut, where = {
            "steps": ((batch, length, channels), (None, block, tile), lambda b, d, p: (b, p, d)),
            "few": ((batch, length, states), (None, block, states), lambda b, d, p: (b, p, 0)),
            "parts": ((batch, tiles, length, states), (None, None, block, states), lambda b, d, p: (b, d, p, 0)),
            "saved": ((batch, blocks * slots, states, channels), (None, slots, states, tile),
                      lambda b, d, p: (b, p, 0, d)),
            "state": ((batch, states, channels), (None, states, tile), lambda b, d, p: (b, 0, d)),
            "row": ((batch, 1, channels), (None, 1, tile), lambda b, d, p: (b, 0, d)),
            "channels": ((rows, channels), (rows, tile), lambda b, d, p: (0, d)),
        }[kind]  # fmt: skip
        return (directions, *shape), pl.BlockSpec((None, *cut), lambda g, b, d, j: (g, *where(b, d, place(g, j))))

    def kernel(*refs):
        g, j = pl.program_id(0), pl.program_id(3)
        count, chunks = block, slots
        if rest := length % block:
            short = place(g, j) == blocks - 1
            count, chunks = (jnp.where(short, *pair) for pair in ((rest, block), (pl.cdiv(rest, _SAVED), slots)))

        def steps_of(chunk):
            for i in range(_SAVED):
                t, real = chunk * _SAVED + i, None
                if length % block or block % _SAVED:
                    # Past the end the last step comes again, with a size of 0, and writes what is there already.
                    real = t < count
                    t = jnp.minimum(t, count - 1)
                yield pl.ds(jnp.where(g == 1, count - 1 - t, t), 1), real

        # A TPU has no such transpose of a few numbers, but has a sum over a diagonal.
        square = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (states, states))
        diagonal = square(0) == square(1)

        def turned(x: jax.Array, axis: int) -> jax.Array:
            return jnp.where(diagonal, x, 0).sum(axis, keepdims=True)

        column: Any = (lambda x: turned(x, 1)) if platform == "tpu" else lambda x: x.reshape(states, 1)
        row: Any = (lambda x: turned(x, 0)) if platform == "tpu" else lambda x: x.reshape(1, states)
        body(j == 0, chunks, steps_of, column, row, *refs)

    parameters: Any = None
    arrays, types = [a for _, a in inputs], [dtype for _, dtype in outputs]
    if platform == "tpu":
        from jax.experimental.pallas import tpu

        parameters = tpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",))
        # A row of a block of bfloat16 cannot be had by itself.
        arrays, types = [a.astype(A.dtype) for a in arrays], [A.dtype] * len(types)
    elif platform == "gpu":
        # Deprecated in JAX 0.11, but there still the only backend of `pallas_call` for a GPU: Mosaic GPU needs kernels
        # of its own.
        from jax.experimental.pallas import triton

        parameters = triton.CompilerParams(num_warps=1)
    outs = pl.pallas_call(
        kernel,
        grid=(directions, batch, tiles, blocks),
        in_specs=[spec(kind, a.shape[1])[1] for kind, a in inputs],
        out_specs=[spec(kind, 0)[1] for kind, _ in outputs],
        out_shape=[
            jax.ShapeDtypeStruct(spec(kind, 0)[0], dtype) for (kind, _), dtype in zip(outputs, types, strict=True)
        ],
        interpret=platform == "cpu",
        compiler_params=parameters,
    )(*arrays)
    return [out.astype(dtype) for out, (_, dtype) in zip(outs, outputs, strict=True)]


def _fits_gpu(channels, states):
    return channels % 16 == 0 and states & (states - 1) == 0
