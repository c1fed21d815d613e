"""CNN and recurrent layer over log-mel clips (H-infinity LSTM paper, section II-C and figure 7)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from pcgjax.kernels.hinf_lstm import hinf_lstm, lstm
from pcgjax.models.cnn1d import larger
from pcgjax.runtime.traced import is_on

UPDATES = ("lstm", "convex", "forget")
POOL = 2


def one_share(x: jax.Array) -> jax.Array:
    """The sum over all devices' shares of a batch that lies on one device: `x` itself."""
    return x


class CNNLSTM(nnx.Module):
    """Blocks of same-padded 3x3 convolutions, batch norm, ReLU and 2x2 max-pooling; a recurrent layer; dense 1.

    The paper has two convolutions a block; `blocks=((32,), (64,))` is the smaller public variant. Parameters are in
    two groups, `cnn` and `recurrent`, so that the first can be carried over and frozen (section III).

    Raises:
      ValueError: an unknown cell, a size or rate out of range, or too few mel bands for the poolings; the message
        names the config's field.
    """

    def __init__(
        self,
        n_mels: int,
        blocks: tuple[tuple[int, ...], ...] = ((32, 32), (64, 64)),
        hidden: int = 128,
        update: str = "convex",
        dropout: float = 0.3,
        frozen_cnn: bool = False,
        implementation: str = "auto",
        *,
        rngs: nnx.Rngs,
    ):
        if update not in UPDATES:
            raise ValueError(f"model.cell={update!r}: choose one of {', '.join(UPDATES)}")
        if not blocks or min(min(block, default=0) for block in blocks) < 1 or hidden < 1:
            raise ValueError(f"model.blocks={blocks}, model.hidden={hidden}: channels and units must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout={dropout}: must be at least 0 and below 1")
        if n_mels < POOL ** len(blocks):
            raise ValueError(f"features.n_mels={n_mels}: too few for {len(blocks)} poolings by {POOL}")
        self.cnn = CNN(blocks, dropout, frozen_cnn, rngs=rngs)
        self.recurrent = Recurrent((n_mels // POOL ** len(blocks)) * blocks[-1][-1], hidden, update, rngs=rngs)
        self.dropout, self.implementation = dropout, implementation

    def __call__(
        self,
        x_BxFxT: jax.Array,
        mask_BxT: jax.Array,
        key: jax.Array | None = None,
        total: Callable[[jax.Array], jax.Array] = one_share,
        dropout: float | jax.Array | None = None,
    ) -> jax.Array:
        """Log-mel clips (B, F, T), 0 where there is silence -> logits (B,).

        Args:
          mask_BxT: 1 on the frames of the recording, 0 on padding after it, which changes nothing.
          key: of the dropout, and the sign of training: batch norm then uses the batch and updates its averages.
          total: sums over all devices' shares of the batch.
          dropout: the rate, which may be traced; None: the model's, a Python number.
        """
        dropout = self.dropout if dropout is None else dropout
        keys = (None, None) if key is None else jax.random.split(key)
        h_BxTxD, mask_BxT = self.cnn(x_BxFxT, mask_BxT, keys[0], total, dropout)
        return self.recurrent(h_BxTxD, mask_BxT, keys[1], dropout, self.implementation)

    def features(self, x_BxFxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """What the last unit is given of clips (B, F, T) outside training: the recurrent layer's last state (B, D)."""
        h_BxTxD, mask_BxT = self.cnn(x_BxFxT, mask_BxT, None, None, self.dropout)
        return self.recurrent.last_state(h_BxTxD, mask_BxT, self.implementation)

    @property
    def feature_count(self) -> int:
        """The length of `features`."""
        return self.recurrent.output.in_features


class CNN(nnx.Module):
    """Log-mel (B, F, T) -> (B, T / 2^n, F / 2^n * C) and its mask."""

    def __init__(self, blocks: tuple[tuple[int, ...], ...], dropout: float, frozen: bool, *, rngs: nnx.Rngs):
        self.dropout, self.frozen = dropout, frozen
        init, channels = nnx.initializers.he_normal(), 1
        kernels, biases, norms = [], [], []
        for block in blocks:
            for i, features in enumerate(block):
                kernels.append(nnx.Param(init(rngs.params(), (3, 3, channels, features))))
                if i + 1 < len(block):  # the last one's bias would be what batch norm takes away
                    biases.append(nnx.Param(jnp.zeros(features)))
                channels = features
            norms.append(BatchNorm(channels))
        self.depths = tuple(len(block) for block in blocks)
        self.kernels, self.biases, self.norms = nnx.List(kernels), nnx.List(biases), nnx.List(norms)

    def __call__(self, x_BxFxT, mask_BxT, key, total, dropout=None):
        if self.frozen:
            key = None
        h = jnp.where(mask_BxT[:, None] > 0, x_BxFxT, 0).swapaxes(1, 2)[..., None]
        kernels, biases = iter(self.kernels), iter(self.biases)
        for number, depth in enumerate(self.depths):
            mask = mask_BxT[..., None, None].astype(h.dtype)
            # What comes after the end is kept at zero, as if the clip ended there.
            h = conv3x3(h * mask, next(kernels)[...])
            for _ in range(depth - 1):
                h = conv3x3(jax.nn.relu(h + next(biases)[None, None, None]) * mask, next(kernels)[...])
            h = jax.nn.relu(self.norms[number](h, mask, key is not None, total)) * mask
            h, mask_BxT = _pool(h), _pool_mask(mask_BxT)
            if key is not None:
                key, block_key = jax.random.split(key)
                h = _drop(h, self.dropout if dropout is None else dropout, block_key)
        h = h.reshape(*h.shape[:2], -1)
        return (jax.lax.stop_gradient(h) if self.frozen else h), mask_BxT


class Recurrent(nnx.Module):
    """The recurrent layer's last state, dropout and a dense unit: (B, T, D) -> logits (B,)."""

    def __init__(self, inputs: int, hidden: int, update: str, *, rngs: nnx.Rngs):
        self.update = update
        gates = 4 if update == "lstm" else 3
        self.kernel_x = nnx.Param(nnx.initializers.glorot_uniform()(rngs.params(), (inputs, gates * hidden)))
        orthogonal = nnx.initializers.orthogonal()
        self.kernel_h = nnx.Param(
            jnp.concatenate([orthogonal(rngs.params(), (hidden, hidden)) for _ in range(gates)], axis=1)
        )
        self.bias = nnx.Param(jnp.zeros(gates * hidden))
        if update == "lstm":
            self.bias[...] = self.bias[...].at[3 * hidden :].set(1)  # remembers at first (Jozefowicz et al. 2015)
        else:
            self.theta = nnx.Param(jnp.zeros(hidden))
        self.output = nnx.Linear(hidden, 1, rngs=rngs)

    def __call__(self, h_BxTxD, mask_BxT, key, dropout, implementation):
        last = self.last_state(h_BxTxD, mask_BxT, implementation)
        return self.output(last if key is None else _drop(last, dropout, key))[:, 0]

    def last_state(self, h_BxTxD: jax.Array, mask_BxT: jax.Array, implementation: str) -> jax.Array:
        """(B, T, D) -> the hidden state (B, H) after each clip's last real step."""
        weights = self.kernel_x[...], self.kernel_h[...], self.bias[...]
        if self.update == "lstm":
            h = lstm(h_BxTxD, *weights, implementation=implementation, mask=mask_BxT)
        else:
            theta = self.theta[...]
            h = hinf_lstm(h_BxTxD, *weights, theta, self.update, implementation, mask=mask_BxT)
        return h[:, -1]


class BatchNorm(nnx.Module):
    """Batch norm over what a mask leaves and over all devices, which `nnx.BatchNorm` does not do together."""

    def __init__(self, channels: int, momentum: float = 0.9, epsilon: float = 1e-5):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(channels)), nnx.BatchStat(jnp.ones(channels))
        self.momentum, self.epsilon = momentum, epsilon

    def __call__(self, x_BxTxFxC: jax.Array, mask_BxTx1x1: jax.Array, train: bool, total: Callable) -> jax.Array:
        if train:
            # In float32: a sum over thousands of steps has no place in bfloat16's eight bits.
            x, mask, axes = x_BxTxFxC.astype(jnp.float32), mask_BxTx1x1.astype(jnp.float32), (0, 1, 2)
            count = jnp.maximum(total(mask.sum() * x.shape[2]), 1)
            mean = total((x * mask).sum(axes)) / count
            var = total((jnp.square(x - mean[None, None, None]) * mask).sum(axes)) / count
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * jax.lax.stop_gradient(mean)
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * jax.lax.stop_gradient(var)
        else:
            mean, var = self.mean[...], self.var[...]
        scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        shift = self.bias[...] - mean * scale
        scale, shift = (a[None, None, None].astype(x_BxTxFxC.dtype) for a in (scale, shift))
        return x_BxTxFxC * scale + shift


def _convolve(x_BxTxFxC: jax.Array, kernel_3x3xCxO: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x_BxTxFxC, kernel_3x3xCxO, (1, 1), "SAME", dimension_numbers=layout)


@jax.custom_vjp
def _convolve_on_cpu(x_BxTxFxC, kernel_3x3xCxO):
    return _convolve(x_BxTxFxC, kernel_3x3xCxO)


def _convolve_forward(x_BxTxFxC, kernel_3x3xCxO):
    return _convolve(x_BxTxFxC, kernel_3x3xCxO), (x_BxTxFxC, kernel_3x3xCxO)


def _convolve_backward(residuals, dy_BxTxFxO):
    x, kernel = residuals
    _, time, frequency, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    patches = jnp.concatenate([padded[:, :, j : j + frequency] for j in range(3)], axis=-1)
    taps = []
    for late in (-1, 0, 1):  # the input's step less the output's
        inputs = patches[:, max(late, 0) : time + min(late, 0)].reshape(-1, 3 * channels)
        gradients = dy_BxTxFxO[:, max(-late, 0) : time + min(-late, 0)].reshape(-1, kernel.shape[-1])
        taps.append(inputs.T @ gradients)
    return _convolve(dy_BxTxFxO, kernel[::-1, ::-1].swapaxes(2, 3)), jnp.stack(taps).reshape(kernel.shape)


_convolve_on_cpu.defvjp(_convolve_forward, _convolve_backward)


def conv3x3(x_BxTxFxC: jax.Array, kernel_3x3xCxO: jax.Array) -> jax.Array:
    """Same-padded 3x3 convolution, kernel axes (time, frequency, in, out).

    On CPU the gradients are written out: inside a compiled loop XLA runs a convolution over whole images, which the
    kernel's gradient is, a hundred times slower than outside (jax issue 12868). As three products of patches along F
    it is as fast as the convolution itself, and the other two are convolutions by small kernels.
    """
    return (_convolve_on_cpu if jax.default_backend() == "cpu" else _convolve)(x_BxTxFxC, kernel_3x3xCxO)


def _pool(x_BxTxFxC: jax.Array) -> jax.Array:
    """2x2 max-pooling, an odd last row or column left out; maxima of slices, whose gradient needs no scatter."""
    time, frequency = (n // POOL * POOL for n in x_BxTxFxC.shape[1:3])
    x = x_BxTxFxC[:, :time, :frequency]
    x = larger(x[:, ::2], x[:, 1::2])
    return larger(x[:, :, ::2], x[:, :, 1::2])


def _pool_mask(mask_BxT: jax.Array) -> jax.Array:
    """Steps whose frames are all real; the first one also where only its first frame is, so that every clip has one."""
    time = mask_BxT.shape[1] // POOL * POOL
    return jnp.minimum(mask_BxT[:, :time:2], mask_BxT[:, 1:time:2]).at[:, 0].set(mask_BxT[:, 0])


def _drop(x: jax.Array, rate: float | jax.Array, key: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0) if is_on(rate) else x
