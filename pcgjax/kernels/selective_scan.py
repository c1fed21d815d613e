"""The selective scan of Mamba (Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces").

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t      for every channel D and state N
    y_t = C_t h_t + D u_t,  times silu(z_t) where there is a gate

`delta` may first pass through a bias and a softplus. Only the recurrence of h has to wait for the step before: it has
implementations to choose from, with plain JAX around it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "reference", "xla", "associative")
_CHUNK = 32  # steps whose states are in memory at a time


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
      implementation: "reference" (a step at a time, differentiated by JAX), "xla" (as fast, and its gradient keeps a
        state every few steps and computes the others again), "associative" (log L steps, all states in memory), "auto".
      initial: (B, N, D), the state before the first step; zeros when None.
    Returns: y (B, L, D) of u's type; with `return_last_state` also the state after the last step, (B, N, D).
    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    u, delta, A, B, C = map(jnp.asarray, (u, delta, A, B, C))
    _check(u, delta, A, B, C, D, z, delta_bias, initial)
    wide = jnp.promote_types(u.dtype, jnp.float32)
    wider = lambda x: x.astype(wide)
    steps = wider(delta) if delta_bias is None else wider(delta) + wider(delta_bias)
    if delta_softplus:
        steps = jax.nn.softplus(steps)
    state = jnp.zeros((u.shape[0], A.shape[1], A.shape[0]), wide) if initial is None else wider(initial)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    scan = {"reference": _reference, "associative": _associative}.get(implementation, _xla)
    y, last = scan(wider(u), steps, wider(A).T, wider(B), wider(C), state)
    if D is not None:
        y = y + wider(D) * wider(u)
    if z is not None:
        y = y * jax.nn.silu(wider(z))
    y = y.astype(u.dtype)
    return (y, last) if return_last_state else y


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


# The recurrence: u, delta (B, L, D), A (N, D), B, C (B, L, N), state (B, N, D) -> y (B, L, D), the last state. Channels
# are last in a state, so that a step is element by element over whole vectors.


def _reference(u, delta, A, B, C, state):
    def step(h, now):
        u_t, delta_t, B_t, C_t = now
        h = jnp.exp(delta_t[:, None] * A) * h + (delta_t * u_t)[:, None] * B_t[..., None]
        return h, (h * C_t[..., None]).sum(1)

    last, y = jax.lax.scan(step, state, [x.swapaxes(0, 1) for x in (u, delta, B, C)])
    return y.swapaxes(0, 1), last


def _associative(u, delta, A, B, C, state):
    decay = jnp.exp(delta[:, :, None] * A)
    inflow = (delta * u)[:, :, None] * B[..., None]
    inflow = inflow.at[:, 0].add(decay[:, 0] * state)
    after = lambda left, right: (left[0] * right[0], left[1] * right[0] + right[1])
    h = jax.lax.associative_scan(after, (decay, inflow), axis=1)[1]
    return (h * C[..., None]).sum(2), h[:, -1]


def _chunks(x, size):
    """(B, L, ...) -> (L / size, size, B, ...), zeros after the end: a step of delta 0 leaves the state as it is."""
    length = x.shape[1]
    x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2)).swapaxes(0, 1)
    return x.reshape(-1, size, *x.shape[1:])


def _unchunk(x, length):
    return x.reshape(-1, *x.shape[2:])[:length].swapaxes(0, 1)


@jax.custom_vjp
def _xla(u, delta, A, B, C, state):
    return _xla_forward(u, delta, A, B, C, state)[0]


def _xla_forward(u, delta, A, B, C, state):
    def step(h, now):
        u_t, delta_t, B_t, C_t = now
        h = jnp.exp(delta_t[:, None] * A) * h + (delta_t * u_t)[:, None] * B_t[..., None]
        return h, (h * C_t[..., None]).sum(1)

    def chunk(h, now):
        last, y = jax.lax.scan(step, h, now)
        return last, (y, h)

    size = min(_CHUNK, u.shape[1])
    last, (y, starts) = jax.lax.scan(chunk, state, [_chunks(x, size) for x in (u, delta, B, C)])
    return (_unchunk(y, u.shape[1]), last), (u, delta, A, B, C, starts)


def _xla_backward(residuals, towards):
    u, delta, A, B, C, starts = residuals
    dy, dlast = towards
    length, size = u.shape[1], min(_CHUNK, u.shape[1])

    def chunk(carry, now):
        dh, dA = carry
        u_KxBxD, delta_KxBxD, B_KxBxN, C_KxBxN, dy_KxBxD, start = now
        decay = jnp.exp(delta_KxBxD[:, :, None] * A)
        inflow = (delta_KxBxD * u_KxBxD)[:, :, None] * B_KxBxN[..., None]

        def again(h, now):
            h = now[0] * h + now[1]
            return h, h

        def back(d, now):  # d: of the state after this step, from the steps after it
            d = d + now[1]
            return now[0] * d, d

        _, h = jax.lax.scan(again, start, (decay, inflow))
        dh, d = jax.lax.scan(back, dh, (decay, dy_KxBxD[:, :, None] * C_KxBxN[..., None]), reverse=True)
        before = jnp.concatenate([start[None], h[:-1]])
        dexponent = d * decay * before
        dinflow = (d * B_KxBxN[..., None]).sum(2)
        return (dh, dA + (dexponent * delta_KxBxD[:, :, None]).sum((0, 1))), (
            delta_KxBxD * dinflow,
            u_KxBxD * dinflow + (dexponent * A).sum(2),
            (d * (delta_KxBxD * u_KxBxD)[:, :, None]).sum(3),
            (h * dy_KxBxD[:, :, None]).sum(3),
        )

    inputs = [_chunks(x, size) for x in (u, delta, B, C, dy)]
    (dh, dA), parts = jax.lax.scan(chunk, (dlast, jnp.zeros_like(A)), (*inputs, starts), reverse=True)
    du, ddelta, dB, dC = (_unchunk(x, length) for x in parts)
    return du, ddelta, dA, dB, dC, dh


_xla.defvjp(_xla_forward, _xla_backward)
