"""Heart-sound segmenters: a spectrogram's frames -> a score for each target in each frame.

`Segmenter` has SSAMBA's mixers on the frames themselves, with no patches in between; `PatchSegmenter` is SSAMBA with
its patches moved on by 20 ms at a time, where the published ones move by 160, longer than a heart sound.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pcgjax.models.ssamba_net import SSAMBA, Mixer
from pcgjax.runtime.traced import is_on


class Segmenter(nnx.Module):
    """Linear, `depth` times x + mixer(LayerNorm(x)), LayerNorm, linear.

    Causal where not `bidirectional`: then `stream` takes a recording piece by piece.

    Raises:
      ValueError: a size below 1, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        bands: int,
        outputs: int,
        width: int = 96,
        depth: int = 4,
        d_state: int = 8,
        expand: int = 2,
        dropout: float = 0.0,
        bidirectional: bool = True,
        implementation: str = "auto",
        *,
        rngs: nnx.Rngs,
    ):
        if min(bands, outputs, width, depth, d_state, expand) < 1:
            raise ValueError(
                f"width={width}, depth={depth}, d_state={d_state}, expand={expand}: each must be at least 1"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
        self.dropout = dropout
        self.embed = nnx.Linear(bands, width, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs) for _ in range(depth)])
        self.mixers = nnx.List(
            [
                Mixer(
                    width, d_state, expand=expand, bidirectional=bidirectional, implementation=implementation, rngs=rngs
                )
                for _ in range(depth)
            ]
        )
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(
        self, x_BxTxF: jax.Array, key: jax.Array | None = None, dropout: float | jax.Array | None = None
    ) -> jax.Array:
        """(B, T, bands) -> logits (B, T, outputs); with a `key`, dropout of each mixer's output.

        dropout: the rate, which may be traced; None: the model's, a Python number.
        """
        dropout = self.dropout if dropout is None else dropout
        x = self.embed(x_BxTxF)
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            y = mixer(norm(x))
            if key is not None and is_on(dropout):
                passes = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout, y.shape)
                y = jnp.where(passes, y / (1 - dropout), 0)
            x = x + y
        return self.head(self.norm(x))

    def initial_state(self, batch: int) -> list:
        """What `stream` carries before the first frame."""
        return [mixer.initial_state(batch) for mixer in self.mixers]

    def stream(self, x_BxTxF: jax.Array, state: list) -> tuple[jax.Array, list]:
        """The next frames of a recording: (logits, state). Pieces give what the whole gives."""
        x, after = self.embed(x_BxTxF), []
        for norm, mixer, carried in zip(self.norms, self.mixers, state, strict=True):
            y, carried = mixer.stream(norm(x), carried)
            x = x + y
            after.append(carried)
        return self.head(self.norm(x)), after


class PatchSegmenter(nnx.Module):
    """SSAMBA, the mean over a step's tokens from low to high frequencies, linear."""

    def __init__(
        self, width: int, depth: int, frames: int, time_stride: int, outputs: int, remat: bool, bfloat16: bool,
        implementation: str = "auto", *, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.encoder = SSAMBA(
            width, depth, frames, (16, time_stride), remat=remat, implementation=implementation, rngs=rngs
        )
        self.head = nnx.Linear(width, outputs, rngs=rngs)
        self.bfloat16 = bfloat16

    def __call__(self, fbank_BxTxF: jax.Array, key: jax.Array | None = None, dropout: float = 0.0) -> jax.Array:
        """SSAMBA's normalised filter bank (B, frames, 128) -> logits (B, T', outputs). Nothing is dropped."""
        x = fbank_BxTxF.astype(jnp.bfloat16) if self.bfloat16 else fbank_BxTxF
        tokens = self.encoder.encode(x)[:, 1:]
        tokens = tokens.reshape(len(x), *self.encoder.grid, -1).mean(1)
        return self.head(tokens.astype(jnp.float32))
