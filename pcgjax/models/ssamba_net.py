"""SSAMBA's net: Mamba in both directions over patches of a spectrogram.

Shams et al. 2024, "SSAMBA: Self-Supervised Audio Representation Learning with Mamba State Space Model"; equal to the
public PyTorch code and its checkpoints. `models.ssamba` is where callers import it from.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pcgjax.kernels.selective_scan import bidirectional_scan, selective_scan

SIZES = {"tiny": 192, "small": 384, "base": 768}  # width, all at depth 24
POOLINGS = ("avgtok", "cls")
PATCH = 16  # frames and mel bins
MEL_BINS = 128


class MixerState(NamedTuple):
    """What a causal mixer carries from one piece of a sequence to the next."""

    tail: jax.Array  # (B, d_conv - 1, E) the convolution's last inputs
    scan: jax.Array  # (B, N, E)


class Mixer(nnx.Module):
    """Mamba's mixer (Gu and Dao 2023, section 3.4), initialised as published; E = expand * width channels inside.

    `bidirectional` is Vision Mamba's "v2": each direction has its own convolution and scan, the gate and the
    projections in and out are shared, and the two are averaged. Parameters of the directions lie along a leading axis,
    [0] for the one from the first step to the last. Otherwise causal, and a sequence may come in pieces.
    """

    def __init__(
        self,
        width: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        *,
        bidirectional: bool = True,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ):
        if min(width, d_state, d_conv, expand) < 1:
            raise ValueError(f"width={width}, d_state={d_state}, d_conv={d_conv}, expand={expand}: at least 1 each")
        rank = math.ceil(width / 16) if dt_rank is None else dt_rank
        inner, ways = expand * width, 1 + bidirectional
        # (shape, inputs): uniform within 1 / sqrt(inputs), as torch.nn.Linear and Conv1d start.
        shapes = (
            ((width, 2 * inner), width), ((ways, d_conv, inner), d_conv), ((ways, inner), d_conv),
            ((ways, inner, rank + 2 * d_state), inner), ((ways, rank, inner), rank), ((inner, width), inner),
            ((ways, inner), 1),
        )  # fmt: skip
        # Drawn at once: for each shape of its own, JAX would compile for half a second.
        ends = np.cumsum([math.prod(shape) for shape, _ in shapes])
        flat = jnp.split(jax.random.uniform(rngs.params(), (ends[-1],), minval=-1, maxval=1), ends[:-1])
        drawn = [a.reshape(shape) * inputs**-0.5 for a, (shape, inputs) in zip(flat, shapes, strict=True)]
        self.in_proj, self.conv_kernel, self.conv_bias = map(nnx.Param, drawn[:3])
        self.x_proj, self.dt_proj, self.out_proj = map(nnx.Param, drawn[3:6])
        # The steps start out log-uniform in [0.001, 0.1]; the bias is what softplus makes them of.
        dt = jnp.exp(drawn[6] * math.log(10) + math.log(1e-2))
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))
        rates = np.log(np.arange(1, d_state + 1, dtype=np.float32))
        self.A_log = nnx.Param(jnp.asarray(np.tile(rates, (ways, inner, 1))))
        self.D = nnx.Param(jnp.ones((ways, inner)))
        self.bidirectional, self.implementation = bidirectional, implementation

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        """(B, L, D) -> (B, L, D), computed in the input's type, the state in float32 at least."""
        if not self.bidirectional:
            return self.stream(x_BxLxD, self.initial_state(len(x_BxLxD)))[0]
        u, gate = self._enter(x_BxLxD)
        kernel = self.conv_kernel[...].astype(u.dtype)[:, :, None, None]
        reach, length = self.conv_kernel.shape[1] - 1, u.shape[1]
        # Shifted sums: XLA's depthwise convolution is some fifty times slower on CPU.
        padded = jnp.pad(u, ((0, 0), (reach, reach), (0, 0)))
        ahead = sum(kernel[0, i] * padded[:, i : i + length] for i in range(reach + 1))
        back = sum(kernel[1, reach - i] * padded[:, reach + i : reach + i + length] for i in range(reach + 1))
        y = bidirectional_scan(**self._scanned(jnp.stack([ahead, back])))
        return self._leave((y[0] + y[1]) / 2, gate)

    def initial_state(self, batch: int) -> MixerState:
        """The state before the first step of `batch` sequences."""
        _, inner, states = self.A_log.shape
        return MixerState(jnp.zeros((batch, self.conv_kernel.shape[1] - 1, inner)), jnp.zeros((batch, states, inner)))

    def stream(self, x_BxLxD: jax.Array, state: MixerState) -> tuple[jax.Array, MixerState]:
        """The next piece of a sequence, (B, L, D) -> (B, L, D) and the state after it: pieces equal the whole.

        Raises:
          ValueError: the mixer is bidirectional, so that its first output waits for the last input.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional mixer needs the whole sequence; make it with bidirectional=False")
        u, gate = self._enter(x_BxLxD)
        kernel = self.conv_kernel[0].astype(u.dtype)[:, None, None]
        reach, length = self.conv_kernel.shape[1] - 1, u.shape[1]
        padded = jnp.concatenate([state.tail.astype(u.dtype), u], axis=1)
        scanned = self._scanned(sum((kernel[i] * padded[:, i : i + length] for i in range(reach + 1)), 0 * u)[None])
        scanned = {name: value[0] if isinstance(value, jax.Array) else value for name, value in scanned.items()}
        y, last = selective_scan(**scanned, initial=state.scan, return_last_state=True)
        return self._leave(y, gate), MixerState(padded[:, length:], last)

    def _enter(self, x):
        return jnp.split(x @ self.in_proj[...].astype(x.dtype), 2, axis=-1)

    def _scanned(self, convolved_RxBxLxE) -> dict[str, Any]:
        """What the scan takes, for R directions."""
        u = jax.nn.silu(convolved_RxBxLxE + self.conv_bias[...][:, None, None].astype(convolved_RxBxLxE.dtype))
        rank, states = self.dt_proj.shape[1], self.A_log.shape[2]
        dt, B, C = jnp.split(self._project(u, self.x_proj), (rank, rank + states), axis=-1)
        return {
            "u": u, "delta": self._project(dt, self.dt_proj), "A": -jnp.exp(self.A_log[...]), "B": B, "C": C,
            "D": self.D[...], "delta_bias": self.dt_bias[...], "delta_softplus": True,
            "implementation": self.implementation,
        }  # fmt: skip

    def _project(self, x_RxBxLxI, kernel_RxIxO):
        return jnp.einsum("rbli,rio->rblo", x_RxBxLxI, kernel_RxIxO[...].astype(x_RxBxLxI.dtype))

    def _leave(self, y, gate):
        return (y * jax.nn.silu(gate)) @ self.out_proj[...].astype(y.dtype)


class Layer(nnx.Module):
    """LayerNorm, then the mixer in the given type: (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, depth: int, rngs: nnx.Rngs, **mixer: Any):
        self.norm = _layer_norm(width, rngs)
        self.mixer = Mixer(width, rngs=rngs, **mixer)
        self.mixer.out_proj[...] /= math.sqrt(depth)  # so that the sum of all layers starts out as large as one

    def __call__(self, x, dtype):
        return self.mixer(self.norm(x).astype(dtype))


class Pair(nnx.Module):
    """Two layers over the same input, the second of which sees it reversed in the public code: there its "forward"
    direction runs from the last step to the first, and that is how it is stored here, so that nothing is reversed."""

    def __init__(self, width: int, depth: int, rngs: nnx.Rngs, **mixer: Any):
        self.first, self.second = Layer(width, depth, rngs, **mixer), Layer(width, depth, rngs, **mixer)

    def __call__(self, hidden_BxLxD: jax.Array, residual_BxLxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = residual_BxLxD + hidden_BxLxD
        hidden = self.first(x, hidden_BxLxD.dtype) + self.second(x, hidden_BxLxD.dtype)
        return hidden, 2 * x  # each layer returns a residual, and the public code adds both


class Predictor(nnx.Module):
    """Token (..., D) -> patch (..., 256)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.hidden, self.out = nnx.Linear(width, width, rngs=rngs), nnx.Linear(width, PATCH * PATCH, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.relu(self.hidden(x)))


class Unused(nnx.Variable):
    """What a checkpoint holds and no output depends on; kept for writing it again."""


class SSAMBA(nnx.Module):
    """Patch embedding, class token, position embedding, pairs of layers, and a head for classes or for pre-training.

    Args:
      width: D; `SIZES` has the published ones.
      frames: T of the input; stride: mel bins and frames from patch to patch, one number or (mel bins, frames).
      classes: K of the linear head after `pooling` ("avgtok": the mean over patches; "cls": the class token).
      pretraining: with the mask token and the two predictors of `pretrain_losses`.
      remat: compute each pair again in the backward pass instead of keeping its insides.
    Raises:
      ValueError: a size that cannot be; the message names it.
    """

    def __init__(
        self,
        width: int = 192,
        depth: int = 24,
        frames: int = 1024,
        stride: int | tuple[int, int] = PATCH,
        *,
        classes: int | None = None,
        pretraining: bool = False,
        pooling: str = "avgtok",
        remat: bool = False,
        rngs: nnx.Rngs,
        **mixer: Any,
    ):
        if width < 1 or depth < 2 or depth % 2:
            raise ValueError(f"width={width}, depth={depth}: layers come in pairs, so depth is even, and at least 2")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}: choose one of {', '.join(POOLINGS)}")
        self.frames, self.stride = frames, (stride, stride) if isinstance(stride, int) else tuple(stride)
        self.grid = patch_grid(frames, self.stride)
        self.pooling, self.remat = pooling, remat

        def draw(*shape: int) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, minval=-1 / PATCH, maxval=1 / PATCH)

        self.patch_kernel, self.patch_bias = nnx.Param(draw(PATCH * PATCH, width)), nnx.Param(draw(width))
        small = nnx.initializers.truncated_normal(0.02)
        self.class_token = nnx.Param(small(rngs.params(), (1, 1, width)))
        self.position = nnx.Param(small(rngs.params(), (1, 1 + math.prod(self.grid), width)))
        # All pairs in one, each parameter with a leading axis of depth / 2: one of them is compiled.
        pairs = [nnx.split(Pair(width, depth, rngs, **mixer)) for _ in range(depth // 2)]
        self.pairs = nnx.merge(pairs[0][0], jax.tree.map(lambda *x: jnp.stack(x), *[state for _, state in pairs]))
        self.norm = _layer_norm(width, rngs)
        self.unused_head: nnx.Dict[Unused] = nnx.Dict()
        if classes is not None:
            self.head_norm, self.head = make_head(width, classes, rngs)
        if pretraining:
            self.mask_token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, width)) * width**-0.5)
            self.contrast, self.reconstruction = Predictor(width, rngs=rngs), Predictor(width, rngs=rngs)

    def __call__(self, fbank_BxTxF: jax.Array) -> jax.Array:
        """Normalised filter bank (B, frames, 128) -> logits (B, K).

        Raises:
          ValueError: the model has no head for classes, or the input is not of that shape.
        """
        if not hasattr(self, "head"):
            raise ValueError("this model has no head for classes; make it with classes=K")
        tokens = self.encode(fbank_BxTxF)
        pooled = tokens[:, 1:].mean(1) if self.pooling == "avgtok" else tokens[:, 0]
        return self.head(self.head_norm(pooled))

    def encode(self, fbank_BxTxF: jax.Array, masked_BxP: jax.Array | None = None) -> jax.Array:
        """Normalised filter bank (B, frames, 128) -> tokens (B, 1 + F'T', D): the class token, then patch f T' + t.

        The mixers compute in the input's type, the residual and the norms in float32 at least. `grid` is (F', T').

        Args:
          masked_BxP: True where a patch gives way to the mask token.
        Raises:
          ValueError: the input is not of that shape.
        """
        x = self.patches(fbank_BxTxF) @ self.patch_kernel[...].astype(fbank_BxTxF.dtype) + self.patch_bias[None, None]
        if masked_BxP is not None:
            x = jnp.where(masked_BxP[..., None], self.mask_token[...], x)
        class_token = jnp.broadcast_to(self.class_token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([class_token.astype(x.dtype), x], axis=1) + self.position[...]
        graphdef, pairs = nnx.split(self.pairs)

        def pair(carry, params):
            hidden, residual = nnx.merge(graphdef, params)(*carry)
            return (hidden, residual), None

        carry = jnp.zeros_like(x, fbank_BxTxF.dtype), x
        (hidden, residual), _ = jax.lax.scan(jax.checkpoint(pair) if self.remat else pair, carry, pairs)
        return self.norm(self.norm(residual + hidden))  # twice, as the public code does

    def patches(self, fbank_BxTxF: jax.Array) -> jax.Array:
        """(B, frames, 128) -> (B, F'T', 256): patch f T' + t, mel bin by mel bin.

        Raises:
          ValueError: the input is not of that shape.
        """
        if fbank_BxTxF.ndim != 3 or fbank_BxTxF.shape[1:] != (self.frames, MEL_BINS):
            raise ValueError(f"fbank has shape {fbank_BxTxF.shape}; needs (B, {self.frames}, {MEL_BINS})")
        rows, columns = (
            np.arange(count)[:, None] * step + np.arange(PATCH)
            for count, step in zip(self.grid, self.stride, strict=True)
        )
        cut = jnp.asarray(fbank_BxTxF).swapaxes(1, 2)[:, rows][..., columns]  # (B, F', 16, T', 16)
        return cut.swapaxes(2, 3).reshape(len(cut), math.prod(self.grid), PATCH * PATCH)


def patch_grid(frames: int, stride: tuple[int, ...]) -> tuple[int, int]:
    """(F', T'), how many patches of a spectrogram of `frames` frames lie along frequency and along time.

    Args: stride: (mel bins, frames) from patch to patch.
    Raises:
      ValueError: a stride outside 1 to 16 or not of two numbers, or fewer frames than a patch has.
    """
    if len(stride) != 2 or not all(1 <= step <= PATCH for step in stride):
        raise ValueError(f"stride={stride}: 1 to {PATCH}, one number or (mel bins, frames)")
    if frames < PATCH:
        raise ValueError(f"frames={frames}: a patch has {PATCH}")
    return (MEL_BINS - PATCH) // stride[0] + 1, (frames - PATCH) // stride[1] + 1


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance loses digits where the mean is large, and the residual doubles with every pair.
    return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


def make_head(width: int, classes: int, rngs: nnx.Rngs) -> tuple[nnx.LayerNorm, nnx.Linear]:
    """LayerNorm and linear layer, (..., D) -> (..., K): what a fine-tuned SSAMBA classifies its pooled tokens with.

    Raises:
      ValueError: fewer than one class.
    """
    if classes < 1:
        raise ValueError(f"classes={classes}: at least 1")
    return _layer_norm(width, rngs), nnx.Linear(width, classes, rngs=rngs)
