"""The 1D CNN for heart-sound windows (Lamperti, "Binary Classification of Heart Sounds Using a 1D CNN", section 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

POOL = 2


class CNN1D(nnx.Module):
    """Conv 16x5, ReLU, pool 2, conv 32x5, ReLU, pool 2, flatten, dense 64, ReLU, dense 1; convolutions unpadded.

    Convolutions are written as one matrix product each: XLA runs those at full speed inside the compiled epoch's
    loop on every platform, which it does not on CPU for the gradient of a convolution's kernel.
    `reference` is the textbook form.

    Raises:
      ValueError: an even kernel size, a size below 1, or a window too short for both convolutions and poolings.
    """

    def __init__(
        self,
        window: int,
        filters: tuple[int, int] = (16, 32),
        kernel_size: int = 5,
        hidden: int = 64,
        *,
        rngs: nnx.Rngs,
    ):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {kernel_size}")
        if len(filters) != 2 or min(*filters, hidden, kernel_size) < 1:
            raise ValueError(f"filters={filters}, hidden={hidden}: two numbers of filters and one of units, from 1 on")
        self.window, self.kernel_size = window, kernel_size
        self.pooled = _pooled(_pooled(window, kernel_size), kernel_size)
        if self.pooled < 1:
            raise ValueError(f"a window of {window} samples is too short for two convolutions of {kernel_size}")
        first, second = filters
        init = nnx.initializers.glorot_uniform()
        self.kernel1 = nnx.Param(init(rngs.params(), (kernel_size, 1, first)))
        self.bias1 = nnx.Param(jnp.zeros(first))
        self.kernel2 = nnx.Param(init(rngs.params(), (kernel_size, first, second)))
        self.bias2 = nnx.Param(jnp.zeros(second))
        self.kernel3 = nnx.Param(init(rngs.params(), (self.pooled * second, hidden)))
        self.bias3 = nnx.Param(jnp.zeros(hidden))
        self.output = nnx.Linear(hidden, 1, kernel_init=init, rngs=rngs)

    def __call__(self, x_BxT: jax.Array) -> jax.Array:
        """Windows (B, T) -> logits (B,)."""
        return self._logits(self.features(x_BxT))

    def features(self, x_BxT: jax.Array) -> jax.Array:
        """Windows (B, T) -> what the last unit is given, (B, hidden)."""
        h = x_BxT[..., None]
        for kernel, bias in ((self.kernel1, self.bias1), (self.kernel2, self.bias2)):
            batch, length, _ = h.shape
            pooled = larger(*_conv_pairs(h, kernel[...])).reshape(batch, length // 2, -1)
            h = jax.nn.relu(pooled[:, : _pooled(length, self.kernel_size)] + bias[None, None])
        return self._hidden(h)

    def half_overlapping(self, x_JxT: jax.Array) -> jax.Array:
        """Logits of windows that overlap by half, each sample convolved once instead of twice.

        The rows, laid end to end, are one signal; its windows start every T/2 samples. Both poolings see the same
        pairs of samples as they would in a window cut out, so the logits equal `__call__` on those windows.

        Args:
          x_JxT: (J, T) rows; T a multiple of 4.
        Returns: (2 J - 1,): of the J rows themselves, then of the J - 1 windows from the middle of one into the next.
        Raises:
          ValueError: T is no multiple of 4.
        """
        return self._logits(self.half_overlapping_features(x_JxT))

    def half_overlapping_features(self, x_JxT: jax.Array) -> jax.Array:
        """`features` of the windows of `half_overlapping`, (2 J - 1, hidden)."""
        rows, window = x_JxT.shape
        if window % 4:
            raise ValueError(f"half-overlapping windows need a multiple of 4 samples, not {window}")
        quarter = window // 4
        h = jax.nn.relu(larger(*_conv_pairs(x_JxT.reshape(1, -1, 1), self.kernel1[...])) + self.bias1[None])
        even, odd = _conv_pairs(h[None], self.kernel2[...])
        # In samples of the first pooling, a row is T/2 long and the window from its middle starts at T/4, which may be
        # odd: then its pooling pairs an odd sample with the even one after it.
        begin, count = quarter // 2, quarter * (rows - 1)
        first, second = (odd, even[1:]) if quarter % 2 else (even, odd)
        late = larger(first[begin : begin + count], second[begin : begin + count])
        pooled = [y.reshape(-1, quarter, y.shape[-1])[:, : self.pooled] for y in (larger(even, odd), late)]
        return self._hidden(jax.nn.relu(jnp.concatenate(pooled) + self.bias2[None, None]))

    @property
    def feature_count(self) -> int:
        """The length of `features`."""
        return self.output.in_features

    def _hidden(self, h_BxTxC: jax.Array) -> jax.Array:
        # Transposed, since a batch is few windows: XLA's CPU product is quicker with the long side first.
        flat_BxD = h_BxTxC.reshape(len(h_BxTxC), -1)
        hidden = (self.kernel3[...].T @ flat_BxD.T).T + self.bias3[None]
        return jax.nn.relu(hidden)

    def _logits(self, h_BxD: jax.Array) -> jax.Array:
        return self.output(h_BxD)[:, 0]


def reference(model: CNN1D, x_BxT: jax.Array) -> jax.Array:
    """`model(x)` with library convolutions and pooling: the oracle."""
    h = x_BxT[..., None]
    for kernel, bias in ((model.kernel1, model.bias1), (model.kernel2, model.bias2)):
        h = jax.lax.conv_general_dilated(h, kernel[...], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        h = nnx.max_pool(jax.nn.relu(h + bias[None, None]), (POOL,), (POOL,))
    return model._logits(model._hidden(h))


def _pooled(length: int, kernel_size: int) -> int:
    return (length - kernel_size + 1) // POOL


def larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.maximum`, except that a tie's gradient goes to the first, as in library poolings, without dividing it."""
    return jnp.where(b > a, b, a)


def _conv_pairs(x_BxTxC: jax.Array, kernel_KxCxF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The convolution's outputs at even and at odd positions, (B (T // 2), F) each, zeros assumed after the end.

    One product of (K + 1)-sample patches with the kernel written twice, one sample apart: two outputs a row keep the
    matrices wide, and pooling becomes the maximum of two arrays instead of a reduce-window. The product is of plain
    matrices: with a batch axis, even of size 1, XLA's CPU code for the gradients takes nearly twice as long.
    """
    size, channels, features = kernel_KxCxF.shape
    batch, length, _ = x_BxTxC.shape
    count, reach = length // 2, (size + 1) // 2
    pairs = x_BxTxC[:, : 2 * count].reshape(batch, count, 2 * channels)
    pairs = jnp.pad(pairs, ((0, 0), (0, reach - 1), (0, 0)))
    patches = jnp.concatenate([pairs[:, i : i + count] for i in range(reach)], axis=-1).reshape(batch * count, -1)
    early = jnp.pad(kernel_KxCxF, ((0, 1), (0, 0), (0, 0))).reshape(-1, features)
    late = jnp.pad(kernel_KxCxF, ((1, 0), (0, 0), (0, 0))).reshape(-1, features)
    out = patches @ jnp.concatenate([early, late], axis=1)
    return out[:, :features], out[:, features:]
