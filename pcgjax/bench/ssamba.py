"""Suite `ssamba`: the encoder and a training step against the public model's reference path in PyTorch.

The public SSAMBA runs its kernels on CUDA alone. Elsewhere it is its reference path, written here as it computes: each
direction a loop over the steps, the sequence reversed for half of them, every layer on its own.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pcgjax.bench.timing import fastest, paired, ratio_text, waiting
from pcgjax.models import ssamba
from pcgjax.models.ssamba_checkpoint import save_torch_checkpoint
from pcgjax.runtime import sharding

TINY: dict[str, Any] = {"width": ssamba.SIZES["tiny"], "depth": 24, "frames": 1200}  # 601 tokens
BATCH, CLASSES = 2, 2
LEARNING_RATE = 1e-4


def ssamba_suite(pairs: int = 1, **sizes: Any) -> dict:
    """Times of the encoder's forward pass and of a training step (forward, backward, AdamW), ours and the peer's.

    The peer's training step takes minutes, so that one pair is measured unless told otherwise, after one round that is
    not; its gradient of a slice is as long as the sequence. The floor is what the encoder cannot do without. `encoder`
    has the batch divided between JAX's devices (`pcgjax.bench` gives a CPU one for each item), `one_device` has not.
    `sizes` are of `SSAMBA`, those of the published tiny model where not given.
    """
    model = ssamba.SSAMBA(**{**TINY, **sizes}, classes=CLASSES, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    fbank = rng.normal(scale=0.5, size=(BATCH, model.frames, ssamba.MEL_BINS)).astype(np.float32)
    labels = rng.integers(0, CLASSES, BATCH)
    mesh = jax.make_mesh((min(jax.device_count(), BATCH),), ("data",), axis_types=(AxisType.Auto,))
    divided, alone, train, compile_s = _compiled(model, fbank, labels, mesh)
    peer = Peer(model)
    encode_peer = functools.partial(peer.encode, fbank)
    encoder_times = paired(divided, encode_peer, 5 * pairs, "encoder")
    one_device_times = paired(alone, encode_peer, 5 * pairs, "one device")
    floor_s = sum(fastest(program, 9) for program in _floor(model)) * peer.depth
    return {
        "width": model.patch_bias.shape[0], "depth": peer.depth, "tokens": model.position.shape[1], "batch": BATCH,
        "compile_s": compile_s,
        "devices": mesh.size,
        "one_device": one_device_times,
        "encoder": {**encoder_times, "floor_s": floor_s, "share_of_floor": floor_s / encoder_times["ours_s"]},
        "train": paired(train, functools.partial(peer.step, fbank, labels), pairs, "training step"),
    }  # fmt: skip


def ssamba_summary(result: dict) -> str:
    """The main figures for a terminal."""
    size = f"width {result['width']}, depth {result['depth']}, batch {result['batch']}, {result['tokens']} tokens"
    lines = [size]
    for name, what in (("encoder", f"encoder, {result['devices']} devices"), ("one_device", "encoder, one device"),
                       ("train", "train, one device")):  # fmt: skip
        times = result[name]
        lines.append(
            f"{what:20s} {ratio_text(times['ratio'], times['ratio_range'], 'the peer', width=6)}   "
            f"ours {times['ours_s']:.2f} s, peer {times['peer_s']:.1f} s"
        )
    compiled = ", ".join(f"{name} {s:.0f} s" for name, s in result["compile_s"].items())
    lines.append(f"{'compile':20s} {compiled}")
    floor_s = result["encoder"]["floor_s"]
    lines.append(f"{'floor':20s} {floor_s:.2f} s for the encoder's exponentials and products")
    return "\n".join(lines)


def _compiled(
    model: ssamba.SSAMBA, fbank: np.ndarray, labels: np.ndarray, mesh: jax.sharding.Mesh
) -> tuple[Callable, Callable, Callable, dict[str, float]]:
    """(the encoder with the batch divided over the mesh, the encoder on one device, a training step, seconds that
    compiling the last two took); each of the three is a call that waits for its result."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    compiled = functools.partial(jax.jit, compiler_options=sharding.compiler_options())
    update = optax.adamw(LEARNING_RATE)

    def encode(params, x):
        return nnx.merge(graphdef, params, rest).encode(x)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graphdef, params, rest)(x), y).mean()

    @compiled
    def step(params, state, x, y):
        gradient = jax.grad(loss)(params, x, y)
        change, state = update.update(gradient, state, params)
        return optax.apply_updates(params, change), state

    everywhere, of_device = PartitionSpec(), PartitionSpec("data")
    divided = jax.shard_map(encode, mesh=mesh, in_specs=(everywhere, of_device), out_specs=of_device, check_vma=False)
    params, resident = nnx.as_pure(params), jnp.asarray(fbank)
    arguments = params, update.init(params), resident, labels
    spread = (
        jax.device_put(params, NamedSharding(mesh, everywhere)),
        jax.device_put(resident, NamedSharding(mesh, of_device)),
    )
    divided_encoder = compiled(divided).lower(*spread).compile()
    began = time.perf_counter()
    encoder = compiled(encode).lower(params, resident).compile()
    between = time.perf_counter()
    train = step.lower(*arguments).compile()
    compile_s = {"encoder": between - began, "train": time.perf_counter() - between}
    return waiting(divided_encoder, *spread), waiting(encoder, params, resident), waiting(train, *arguments), compile_s


def _floor(model: ssamba.SSAMBA) -> list[Callable[[], Any]]:
    """A layer's exponentials, one for each direction, step, channel and state, and its two large products."""
    inner, states = model.pairs.first.mixer.A_log.shape[2:]
    width, tokens = model.patch_bias.shape[0], model.position.shape[1]
    compiled = functools.partial(jax.jit, compiler_options=sharding.compiler_options())
    delta, rates = jnp.ones((2, BATCH, tokens, inner)), -jnp.arange(1.0, states + 1)[None, None, None, :, None]
    exponentials = compiled(lambda delta: jnp.exp(delta[..., None, :] * rates).sum(-2))
    x, kernel_in, kernel_out = jnp.ones((BATCH * tokens, width)), jnp.ones((width, 2 * inner)), jnp.ones((inner, width))
    products = compiled(lambda x, a, b: (x @ a)[:, :inner] @ b)
    programs = [waiting(exponentials, delta), waiting(products, x, kernel_in, kernel_out)]
    for program in programs:
        program()  # compiles
    return programs


class Peer:
    """The public model's arithmetic in PyTorch, with the weights of one of ours as its checkpoint would hold them."""

    def __init__(self, model: ssamba.SSAMBA):
        import torch

        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "model.pth"
            save_torch_checkpoint(model, path)
            state = torch.load(path, weights_only=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.weights = {name.removeprefix("module."): w.to(device).requires_grad_() for name, w in state.items()}
        self.depth = sum(name.endswith("in_proj.weight") for name in self.weights)
        self.stride, self.device = model.stride, device
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=LEARNING_RATE, weight_decay=1e-4)

    def encode(self, fbank: np.ndarray) -> Any:
        """(B, T, 128) -> tokens (B, L, D)."""
        import torch

        with torch.no_grad():
            return self._tokens(torch.from_numpy(fbank).to(self.device))

    def logits(self, fbank: np.ndarray) -> Any:
        """(B, T, 128) -> (B, K)."""
        import torch
        from torch.nn import functional as F

        pooled = self._norm(self._tokens(torch.from_numpy(fbank).to(self.device))[:, 1:].mean(1), "mlp_head.0")
        return F.linear(pooled, self.weights["mlp_head.1.weight"], self.weights["mlp_head.1.bias"])

    def step(self, fbank: np.ndarray, labels: np.ndarray) -> None:
        """One step of AdamW on filter banks (B, T, 128) and labels (B,); waits for it."""
        import torch

        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.logits(fbank), torch.tensor(labels, device=self.device)).backward()
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _tokens(self, fbank):
        import torch
        from torch.nn import functional as F

        w = self.weights
        image = fbank.transpose(1, 2)[:, None]
        x = F.conv2d(image, w["v.patch_embed.proj.weight"], w["v.patch_embed.proj.bias"], self.stride)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([w["v.cls_token"].expand(len(x), -1, -1), x], dim=1) + w["v.pos_embed"]
        hidden, residual = x, torch.zeros_like(x)
        for i in range(0, self.depth, 2):
            forward, forward_residual = self._layer(hidden, residual, f"v.layers.{i}.")
            backward, backward_residual = self._layer(hidden.flip(1), residual.flip(1), f"v.layers.{i + 1}.")
            hidden, residual = forward + backward.flip(1), forward_residual + backward_residual.flip(1)
        return self._norm(self._norm(residual + hidden, "v.norm_f"), "v.norm_f")

    def _layer(self, hidden, residual, name):
        from torch.nn import functional as F

        residual = residual + hidden
        xz = F.linear(self._norm(residual, name + "norm"), self.weights[name + "mixer.in_proj.weight"])
        xz = xz.transpose(1, 2)
        forward = self._direction(xz, name + "mixer.", "")
        backward = self._direction(xz.flip(2), name + "mixer.", "_b")
        out = (forward + backward.flip(2)) / 2
        return F.linear(out.transpose(1, 2), self.weights[name + "mixer.out_proj.weight"]), residual

    def _direction(self, xz_BxExL, name, b):
        from torch.nn import functional as F

        def w(key: str) -> Any:
            return self.weights[name + key]

        x, z = xz_BxExL.chunk(2, dim=1)
        kernel, length = w(f"conv1d{b}.weight"), x.shape[2]
        u = F.silu(F.conv1d(x, kernel, w(f"conv1d{b}.bias"), padding=kernel.shape[2] - 1, groups=len(kernel)))
        u = u[..., :length]
        states, rank = w(f"A{b}_log").shape[1], w(f"dt_proj{b}.weight").shape[1]
        dt, B, C = F.linear(u.transpose(1, 2), w(f"x_proj{b}.weight")).split([rank, states, states], dim=2)
        delta = F.linear(dt, w(f"dt_proj{b}.weight"), w(f"dt_proj{b}.bias")).transpose(1, 2)
        y = torch_scan(u, F.softplus(delta), -w(f"A{b}_log").exp(), B.transpose(1, 2), C.transpose(1, 2))
        return (y + u * w(f"D{b}")[:, None]) * F.silu(z)

    def _norm(self, x, name):
        from torch.nn import functional as F

        return F.layer_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.weights[name + ".bias"], 1e-5)


def torch_scan(u_BxExL: Any, delta_BxExL: Any, A_ExN: Any, B_BxNxL: Any, C_BxNxL: Any) -> Any:
    """The selective scan as Mamba's reference writes it in PyTorch: -> (B, E, L)."""
    import torch

    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta_BxExL, A_ExN))
    inflow = torch.einsum("bdl,bnl,bdl->bdln", delta_BxExL, B_BxNxL, u_BxExL)
    state, ys = decay.new_zeros(decay[:, :, 0].shape), []
    for i in range(u_BxExL.shape[2]):
        state = decay[:, :, i] * state + inflow[:, :, i]
        ys.append(torch.einsum("bdn,bn->bd", state, C_BxNxL[:, :, i]))
    return torch.stack(ys, dim=2)
