"""ResNet-50, MobileNetV3-Large and a vision transformer over log-mel clips: the image nets that papers compare with.

A clip is a grey picture, frequency its height from the lowest band on, time its width. Attributes have the names of
the published files, so that `load_imagenet` needs no table: torchvision's for ResNet (timm's are the same) and
MobileNetV3, timm's for the transformer.

Padding after a short clip changes nothing, in any of the three: no pixel of it is seen by a convolution, a mean, batch
norm or attention. To a transformer a clip's last, partly filled patch ends in silence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pcgjax.models.cnn1d import larger
from pcgjax.models.hinf_lstm import BatchNorm, one_share
from pcgjax.models.imagenet import load_imagenet as load_imagenet  # callers import it from here
from pcgjax.runtime.traced import is_on

NETS = ("resnet", "mobilenet_v3", "vit")
GREY = 0.449, 0.226  # ImageNet's mean and deviation, its three channels' taken as one
PATCH, HEAD = 16, 64  # pixels on a side; units of an attention head
# MobileNetV3-Large (Howard et al. 2019, table 1): kernel, expanded, out, squeeze and excite, hard swish, stride.
MOBILENET = (
    (3, 16, 16, False, False, 1), (3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2), (5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2), (3, 200, 80, False, True, 1), (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1), (3, 480, 112, True, True, 1), (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2), (5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1),
)  # fmt: skip
Total = Callable[[jax.Array], jax.Array]


class ImageClassifier(nnx.Module):
    """An image net, `trunk`, and one dense unit, `head`, in place of its thousand."""

    def __init__(
        self, name: str, n_mels: int, frames: int, width: float, blocks: int | Sequence[int], *, rngs: nnx.Rngs
    ):
        """
        Args:
          name: resnet, mobilenet_v3 or vit.
          n_mels, frames: of a clip; only the transformer's positions depend on them.
          width: channels after the stem (ResNet-50: 64), what all channels are multiplied with (MobileNetV3: 1), or
            units of a token (ViT-S: 384, ViT-B: 768).
          blocks: bottlenecks in each stage (ResNet-50: 3, 4, 6, 3); the first so many of the published 15
            (MobileNetV3) or of the transformer's 12.
        Raises:
          ValueError: an unknown net, or a size that it cannot have; the message names the config's field.
        """
        if name == "resnet":
            self.trunk: nnx.Module = ResNet(width, blocks, rngs=rngs)
        elif name == "mobilenet_v3":
            self.trunk = MobileNetV3(width, blocks, rngs=rngs)
        elif name == "vit":
            self.trunk = ViT(n_mels, frames, width, blocks, rngs=rngs)
        else:
            raise ValueError(f"model.name={name!r}: choose one of {', '.join(NETS)}")
        self.head = nnx.Linear(self.trunk.outputs, 1, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)

    def __call__(
        self,
        x_BxFxT: jax.Array,
        mask_BxT: jax.Array,
        key: jax.Array | None = None,
        total: Total = one_share,
        dropout: float | jax.Array = 0.0,
    ) -> jax.Array:
        """Log-mel clips (B, F, T) between 0, silence, and 1 -> logits (B,).

        Args:
          mask_BxT: 1 on the frames of the recording, 0 on padding after it, which changes nothing.
          key: of the dropout before the head, and the sign of training: batch norm then uses the batch and updates
            its averages.
          total: sums over all devices' shares of the batch.
          dropout: the rate, which may be traced.
        """
        h_BxD = self._trunk(x_BxFxT, mask_BxT, key is not None, total)
        if key is not None and is_on(dropout):
            h_BxD = jnp.where(jax.random.bernoulli(key, 1 - dropout, h_BxD.shape), h_BxD / (1 - dropout), 0)
        return self.head(h_BxD)[:, 0]

    def features(self, x_BxFxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """What the last unit is given of clips (B, F, T) outside training, (B, D)."""
        return self._trunk(x_BxFxT, mask_BxT, False, None)

    @property
    def feature_count(self) -> int:
        """The length of `features`."""
        return self.head.in_features

    def _trunk(self, x_BxFxT: jax.Array, mask_BxT: jax.Array, train: bool, total: Total | None) -> jax.Array:
        return self.trunk(jnp.where(mask_BxT[:, None] > 0, x_BxFxT, 0), mask_BxT, train, total)


class Conv(nnx.Module):
    """Convolution without bias; outside the picture is 0. Kernel axes (time, frequency, in, out), in 1 if depthwise."""

    def __init__(
        self, inputs: int, outputs: int, size: int = 1, stride: int = 1, depthwise: bool = False, *, rngs: nnx.Rngs
    ):
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, as torchvision has it
        self.kernel = nnx.Param(init(rngs.params(), (size, size, 1 if depthwise else inputs, outputs)))
        self.stride, self.depthwise = stride, depthwise

    def __call__(self, x_BxTxFxC: jax.Array) -> jax.Array:
        """(B, T, F, C) -> (B, T / stride, F / stride, O), rounded up."""
        kernel, stride, x = self.kernel[...], self.stride, x_BxTxFxC
        size, outputs = len(kernel), kernel.shape[-1]
        if size == 1:
            return x[:, ::stride, ::stride] @ kernel[0, 0]
        if jax.default_backend() != "cpu":
            return jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), [(size // 2, size // 2)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=outputs if self.depthwise else 1,
            )  # fmt: skip
        # Inside a compiled loop XLA's gradients of convolutions are up to a hundred times slower (jax issue 12868).
        if self.depthwise:
            return _depthwise_on_cpu(x, kernel, stride)
        (_, time, frequency, _), x = x.shape, _padded(x, size // 2)
        rows = jnp.concatenate([x[:, :, j : j + frequency : stride] for j in range(size)], -1)
        products = (rows[:, i : i + time : stride] @ kernel[i].reshape(-1, outputs) for i in range(size))
        return functools.reduce(jnp.add, products)


def _taps(x_BxTxFxC: jax.Array, size: int, stride: int) -> list[jax.Array]:
    """What each pixel of a size x size window sees, as it moves by `stride`: size^2 arrays, row by row."""
    (_, time, frequency, _), x = x_BxTxFxC.shape, _padded(x_BxTxFxC, size // 2)
    return [x[:, i : i + time : stride, j : j + frequency : stride] for i in range(size) for j in range(size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise_on_cpu(x_BxTxFxC: jax.Array, kernel_KxKx1xC: jax.Array, stride: int) -> jax.Array:
    """A sum over the kernel's taps: a loop compiles in half the time of so many slices, and is quicker."""
    time, frequency = (-(-n // stride) for n in x_BxTxFxC.shape[1:3])
    taps = _tap_of(x_BxTxFxC, len(kernel_KxKx1xC), stride)
    seen = kernel_KxKx1xC.reshape(-1, 1, 1, 1, x_BxTxFxC.shape[-1])

    def add_tap(n, out):
        return out + taps(n) * seen[n]

    out = jnp.zeros((len(x_BxTxFxC), time, frequency, x_BxTxFxC.shape[-1]), x_BxTxFxC.dtype)
    return jax.lax.fori_loop(0, len(seen), add_tap, out)


def _depthwise_forward(x, kernel, stride):
    return _depthwise_on_cpu(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride, residuals, dy_BxTxFxC):
    x, kernel = residuals
    taps = _tap_of(x, len(kernel), stride)

    def gradient_of_tap(n):
        return (taps(n) * dy_BxTxFxC).sum((0, 1, 2))

    dkernel = jax.lax.map(gradient_of_tap, jnp.arange(len(kernel) ** 2))
    # The gradient where the kernel stood, zeros where it passed over; then the same with the kernel turned about.
    rest = ((pixels - 1) % stride for pixels in x.shape[1:3])
    spread = [(0, 0, 0), *((0, missing, stride - 1) for missing in rest), (0, 0, 0)]
    dy = jax.lax.pad(dy_BxTxFxC, jnp.zeros((), dy_BxTxFxC.dtype), spread)
    return _depthwise_on_cpu(dy, kernel[::-1, ::-1], 1), dkernel.reshape(kernel.shape)


_depthwise_on_cpu.defvjp(_depthwise_forward, _depthwise_backward)


def _tap_of(x_BxTxFxC: jax.Array, size: int, stride: int) -> Callable[[jax.Array], jax.Array]:
    """n -> `_taps` number n, which may be traced."""
    shape, x = x_BxTxFxC.shape, _padded(x_BxTxFxC, size // 2)

    def tap(n: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(x, (0, n // size, n % size, 0), shape)[:, ::stride, ::stride]

    return tap


def _padded(x_BxTxFxC: jax.Array, by: int) -> jax.Array:
    return jnp.pad(x_BxTxFxC, ((0, 0), (by, by), (by, by), (0, 0)))


def _grey(x_BxFxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """(B, F, T) -> (B, T, F, 1) as ImageNet's pictures are scaled, and 0 outside the clip as outside a picture."""
    return ((x_BxFxT - GREY[0]) / GREY[1] * mask_BxT[:, None]).swapaxes(1, 2)[..., None]


def _normed(norm: BatchNorm, x_BxTxFxC, mask_BxT, train: bool, total: Total) -> jax.Array:
    mask = mask_BxT[..., None, None].astype(x_BxTxFxC.dtype)
    return norm(x_BxTxFxC, mask, train, total) * mask  # the next convolution finds the clip ended, not a shift


def _mean(x_BxTxFxC: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """(B, C), over the clip's own pixels; the rest are 0."""
    pixels = jnp.maximum(mask_BxT.astype(jnp.float32).sum(1), 1) * x_BxTxFxC.shape[2]
    return (x_BxTxFxC.astype(jnp.float32).sum((1, 2)) / pixels[:, None]).astype(x_BxTxFxC.dtype)


class ResNet(nnx.Module):
    """Bottleneck residual net (He et al. 2016), its strides in the 3x3 convolutions as in torchvision."""

    def __init__(self, width: float, blocks: int | Sequence[int], *, rngs: nnx.Rngs):
        if isinstance(blocks, int) or len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"model.blocks={blocks}: four numbers from 1 on; ResNet-50 has 3, 4, 6, 3")
        if width < 1 or width != int(width):
            raise ValueError(f"model.width={width}: whole channels, at least 1; ResNet-50 has 64")
        inputs = width = int(width)
        self.conv1, self.bn1 = Conv(1, width, 7, 2, rngs=rngs), BatchNorm(width)
        stages: list[list[Bottleneck]] = [[], [], [], []]
        for stage, count in enumerate(blocks):
            for i in range(count):
                stages[stage].append(Bottleneck(inputs, width << stage, 2 if stage and not i else 1, rngs=rngs))
                inputs = 4 * (width << stage)
        self.layer1, self.layer2, self.layer3, self.layer4 = map(nnx.List, stages)
        self.outputs = inputs

    def __call__(self, x_BxFxT: jax.Array, mask_BxT: jax.Array, train: bool, total: Total) -> jax.Array:
        """-> (B, D)."""
        h = self.conv1(_grey(x_BxFxT, mask_BxT))
        mask = mask_BxT[:, ::2]
        h = jax.nn.relu(_normed(self.bn1, h, mask, train, total))
        h, mask = functools.reduce(larger, _taps(h, 3, 2)), mask[:, ::2]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                h, mask = block(h, mask, train, total)
        return _mean(h, mask)


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 convolutions with batch norms, and the input added: (B, T, F, C) -> (B, T', F', 4 width)."""

    def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1, self.bn1 = Conv(inputs, width, rngs=rngs), BatchNorm(width)
        self.conv2, self.bn2 = Conv(width, width, 3, stride, rngs=rngs), BatchNorm(width)
        self.conv3, self.bn3 = Conv(width, 4 * width, rngs=rngs), BatchNorm(4 * width)
        self.changes = stride > 1 or inputs != 4 * width
        if self.changes:
            conv = Conv(inputs, 4 * width, 1, stride, rngs=rngs)
            self.downsample: nnx.List[Any] = nnx.List([conv, BatchNorm(4 * width)])

    def __call__(self, x, mask, train, total):
        norm = functools.partial(_normed, train=train, total=total)
        h = jax.nn.relu(norm(self.bn1, self.conv1(x), mask))
        mask = mask[:, :: self.conv2.stride]
        h = jax.nn.relu(norm(self.bn2, self.conv2(h), mask))
        h = norm(self.bn3, self.conv3(h), mask)
        return jax.nn.relu(h + (norm(self.downsample[1], self.downsample[0](x), mask) if self.changes else x)), mask


class MobileNetV3(nnx.Module):
    """MobileNetV3-Large (Howard et al. 2019) with its dense layer of 1280, as in torchvision."""

    def __init__(self, width: float, blocks: int | Sequence[int], *, rngs: nnx.Rngs):
        if not isinstance(blocks, int) or not 1 <= blocks <= len(MOBILENET):
            raise ValueError(f"model.blocks={blocks}: from 1 to {len(MOBILENET)}, which is MobileNetV3-Large")
        if not width > 0:
            raise ValueError(f"model.width={width}: must be above 0; MobileNetV3-Large has 1.0")

        def channels(published: int) -> int:
            return _by_eight(published * width)

        outputs = channels(16)
        features: list[nnx.Module] = [_conv_norm(1, outputs, 3, 2, rngs=rngs)]
        for size, expanded, out, excite, swish, stride in MOBILENET[:blocks]:
            inputs, outputs = outputs, channels(out)
            features.append(
                InvertedResidual(inputs, channels(expanded), outputs, size, stride, excite, swish, rngs=rngs)
            )
        self.outputs = channels(1280)
        self.features: nnx.List[Any] = nnx.List([*features, _conv_norm(outputs, 6 * outputs, rngs=rngs)])
        init = nnx.initializers.normal(0.01)
        self.classifier = nnx.List([nnx.Linear(6 * outputs, self.outputs, kernel_init=init, rngs=rngs)])

    def __call__(self, x_BxFxT: jax.Array, mask_BxT: jax.Array, train: bool, total: Total) -> jax.Array:
        """-> (B, D)."""
        norm = functools.partial(_normed, train=train, total=total)
        (conv, first), *blocks, (last_conv, last) = self.features
        h, mask = conv(_grey(x_BxFxT, mask_BxT)), mask_BxT[:, ::2]
        h = jax.nn.hard_swish(norm(first, h, mask))
        for block in blocks:
            h, mask = block(h, mask, norm)
        h = jax.nn.hard_swish(norm(last, last_conv(h), mask))
        return jax.nn.hard_swish(self.classifier[0](_mean(h, mask)))


class InvertedResidual(nnx.Module):
    """Wide 1x1, depthwise, squeeze and excite, narrow 1x1; `block` holds them in this order."""

    def __init__(self, inputs, expanded, outputs, size, stride, excite, swish, *, rngs: nnx.Rngs):
        layers: list[nnx.Module] = [] if expanded == inputs else [_conv_norm(inputs, expanded, rngs=rngs)]
        layers.append(_conv_norm(expanded, expanded, size, stride, True, rngs=rngs))
        if excite:
            squeezed = _by_eight(expanded // 4)
            fc1, fc2 = (nnx.Linear(*sizes, rngs=rngs) for sizes in ((expanded, squeezed), (squeezed, expanded)))
            layers.append(nnx.Dict(fc1=fc1, fc2=fc2))
        self.block: nnx.List[Any] = nnx.List([*layers, _conv_norm(expanded, outputs, rngs=rngs)])
        self.residual, self.swish = stride == 1 and inputs == outputs, swish

    def __call__(self, x, mask, norm):
        act, h = jax.nn.hard_swish if self.swish else jax.nn.relu, x
        *layers, (narrow, narrow_norm) = self.block
        for layer in layers:
            if isinstance(layer, nnx.Dict):
                share = layer.fc2(jax.nn.relu(layer.fc1(_mean(h, mask))))
                h *= jax.nn.hard_sigmoid(share)[:, None, None]
            else:
                h, mask = layer[0](h), mask[:, :: layer[0].stride]
                h = act(norm(layer[1], h, mask))
        h = norm(narrow_norm, narrow(h), mask)
        return (x + h if self.residual else h), mask


def _conv_norm(inputs, outputs, size=1, stride=1, depthwise=False, *, rngs: nnx.Rngs) -> nnx.List:
    conv = Conv(inputs, outputs, size, stride, depthwise, rngs=rngs)
    return nnx.List([conv, BatchNorm(outputs, momentum=0.99, epsilon=1e-3)])


def _by_eight(channels: float) -> int:
    """The nearest multiple of 8, but not below nine tenths."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


class ViT(nnx.Module):
    """Vision transformer on 16x16 patches (Dosovitskiy et al. 2021); the class token's output. What does not fill a
    patch is filled with silence."""

    def __init__(self, n_mels: int, frames: int, width: float, blocks: int | Sequence[int], *, rngs: nnx.Rngs):
        if not isinstance(blocks, int) or blocks < 1:
            raise ValueError(f"model.blocks={blocks}: one number, at least 1; ViT-S and ViT-B have 12")
        if width < HEAD or width % HEAD:
            raise ValueError(f"model.width={width}: must be a multiple of {HEAD}; ViT-S has 384, ViT-B 768")
        self.outputs = width = int(width)
        self.grid = math.ceil(n_mels / PATCH), math.ceil(frames / PATCH)
        init = nnx.initializers.truncated_normal(0.02)
        self.patch_embed = nnx.Dict(proj=nnx.Linear(PATCH**2, width, rngs=rngs))
        self.cls_token = nnx.Param(nnx.initializers.normal(1e-6)(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(init(rngs.params(), (1, 1 + math.prod(self.grid), width)))
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(blocks)])
        self.norm = _layer_norm(width, rngs)

    def __call__(self, x_BxFxT: jax.Array, mask_BxT: jax.Array, train: bool, total: Total) -> jax.Array:
        """-> (B, D)."""
        batch, n_mels, frames = x_BxFxT.shape
        bands, steps = self.grid
        missing = ((0, 0), (0, bands * PATCH - n_mels), (0, steps * PATCH - frames))
        # Between -1 and 1, as the published nets have their pictures.
        x = (2 * jnp.pad(x_BxFxT, missing) - 1).reshape(batch, bands, PATCH, steps, PATCH)
        h = self.patch_embed.proj(x.swapaxes(2, 3).reshape(batch, bands * steps, PATCH**2))
        in_clip = jnp.tile(mask_BxT[:, ::PATCH] > 0, (1, bands))
        attended = jnp.concatenate([jnp.ones((batch, 1), bool), in_clip], 1)
        token = jnp.broadcast_to(self.cls_token[...], (batch, 1, self.outputs))
        h = jnp.concatenate([token, h], 1) + self.pos_embed[...]
        for block in self.blocks:
            h = block(h, attended)
        return self.norm(h[:, 0])


class Block(nnx.Module):
    """Self-attention and a two-layer perceptron, each after LayerNorm and added to its input; (B, N, D)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.truncated_normal(0.02), rngs=rngs)
        self.norm1, self.norm2 = _layer_norm(width, rngs), _layer_norm(width, rngs)
        self.attn = nnx.Dict(qkv=linear(width, 3 * width), proj=linear(width, width))
        self.mlp = nnx.Dict(fc1=linear(width, 4 * width), fc2=linear(4 * width, width))

    def __call__(self, x_BxNxD: jax.Array, attended_BxN: jax.Array) -> jax.Array:
        batch, tokens, width = x_BxNxD.shape
        qkv = self.attn.qkv(self.norm1(x_BxNxD)).reshape(batch, tokens, 3, width // HEAD, HEAD)
        h = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask=attended_BxN[:, None, None])
        x = x_BxNxD + self.attn.proj(h.reshape(batch, tokens, width))
        return x + self.mlp.fc2(jax.nn.gelu(self.mlp.fc1(self.norm2(x)), approximate=False))


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
