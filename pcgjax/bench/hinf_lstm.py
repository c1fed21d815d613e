"""Suite `hinf_lstm`: the recurrent kernel, a whole train step and ten seeds beside PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pcgjax import tasks
from pcgjax.ablation.arms import over_seeds, pretrain
from pcgjax.ablation.data import Clips
from pcgjax.bench import peers
from pcgjax.bench.corpora import some_recordings
from pcgjax.bench.ours import Ours
from pcgjax.bench.timing import paired, ratio_text, seconds, waiting
from pcgjax.data.corpus import Corpus
from pcgjax.kernels.hinf_lstm import hinf_lstm
from pcgjax.runs.config import load_config
from pcgjax.runtime import sharding
from pcgjax.tasks.base import split_model

HIDDEN = 128
# (batch, steps, inputs): the model's own, with inputs of 512 and more; and where only the recurrence counts.
KERNELS = (
    (32, 157, 512), (64, 20, 2048), (128, 157, 512), (8, 157, 512),
    (32, 500, 64), (256, 157, 64), (8, 20, 64), (512, 20, 64), (8, 1000, 64), (32, 1000, 64), (512, 157, 64),
)  # fmt: skip
PYTHON_LOOP = ((32, 157, 512), (8, 1000, 64))  # the model's own size, and many steps of few inputs


def hinf_lstm_suite(prepared: str, recordings: int) -> dict:
    """{corpus, kernel, python_loop, train: a whole step at 8 recordings, seeds: ten of them as one program}.

    prepared: a folder that `prepare` wrote, of which the first `recordings`, at most 48, are used; "": as many
      simulated ones.
    """
    corpus = some_recordings(prepared, min(recordings, 48), sample_rate_hz=2000)
    return {
        "corpus": {"recordings": len(corpus.rows), "seconds": float(corpus.lengths.sum() / corpus.sample_rate_hz)},
        "kernel": [_kernel(*size) for size in KERNELS],
        "python_loop": [_kernel(*size, loop=True) for size in PYTHON_LOOP],
        "train": _train_step(corpus),
        "seeds": _seeds(),
    }


def hinf_lstm_summary(result: dict) -> str:
    """The main figures for a terminal."""
    train, seeds = result["train"], result["seeds"]
    return "\n".join([
        "kernel, forward and all gradients, hidden 128",
        *map(_kernel_line, result["kernel"]),
        *map(_kernel_line, result["python_loop"]),
        f"train step, samples to update   {ratio_text(train['ratio'], train['ratio_range'], 'the peer')}   "
        f"ours {train['ours_clips_a_s']:.0f} clips/s",
        f"the same, the peer's network alone   {train['network_alone']['ratio']:.2f}x",
        f"ten seeds as one program        {ratio_text(seeds['ratio'], seeds['ratio_range'], 'ten runs in a row')}",
    ])  # fmt: skip


def _kernel_line(row: dict) -> str:
    return (
        f"B {row['batch']:3d}, T {row['steps']:4d}, D {row['inputs']:4d}   "
        f"{ratio_text(row['ratio'], row['range'], row['peer'], width=5)}   "
        f"ours {row['ours_ms']:.1f} ms, {row['ours_gflops']:.0f} GFLOP/s"
    )


def _kernel(batch: int, steps: int, inputs: int, loop: bool = False) -> dict:
    """The recurrent layer, forward and all gradients, against torch.nn.LSTM or a cell in a Python loop."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    x, weights = draw(batch, steps, inputs), draw(batch, steps, HIDDEN)
    parameters = draw(inputs, 3 * HIDDEN), draw(HIDDEN, 3 * HIDDEN), draw(3 * HIDDEN), draw(HIDDEN)
    compiled = functools.partial(jax.jit, compiler_options=sharding.compiler_options())
    gradient = compiled(jax.grad(lambda *a: (hinf_lstm(*a) * weights).sum(), range(5)))
    ours = waiting(gradient, *jax.device_put((x, *parameters)))
    peer = _torch_gradient(x, weights, loop)
    # Enough calls in a measurement that each takes some tens of milliseconds.
    ours()
    calls = max(1, int(0.05 / seconds(ours)))

    def repeated(function):
        def run():
            for _ in range(calls):
                function()

        return run

    name = "Python loop" if loop else "torch.nn.LSTM"
    times = paired(repeated(ours), repeated(peer), 7, f"B {batch}, T {steps}, D {inputs}: {name}")
    # Forward and twice backward; multiply-adds of the projection and of the recurrence.
    flops = 3 * 2 * batch * steps * (inputs + HIDDEN) * 3 * HIDDEN
    return {
        "batch": batch, "steps": steps, "inputs": inputs, "hidden": HIDDEN, "peer": name,
        "ours_ms": 1e3 * times["ours_s"] / calls, "peer_ms": 1e3 * times["peer_s"] / calls,
        "ratio": times["ratio"], "range": times["ratio_range"], "ours_gflops": flops * calls / times["ours_s"] / 1e9,
    }  # fmt: skip


def _torch_gradient(x: np.ndarray, weights: np.ndarray, loop: bool) -> Callable[[], None]:
    """The same of torch.nn.LSTM, or of a cell in a Python loop, on x (B, T, D); waits for the gradients."""
    import torch

    inputs = x.shape[-1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = peers.hinf_cell_layer(inputs, HIDDEN) if loop else torch.nn.LSTM(inputs, HIDDEN, batch_first=True)
    peer.to(device)
    leaf, factors = torch.tensor(x, device=device, requires_grad=True), torch.tensor(weights, device=device)

    def run() -> None:
        peer.zero_grad()
        leaf.grad = None
        out = peer(leaf)
        ((out if loop else out[0]) * factors).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _train_step(corpus: Corpus, batch: int = 8) -> dict:
    """An epoch's steps, from int16 samples to the updated parameters."""
    config = load_config("hinf_lstm", {"train.batch_recordings": batch})
    ours = Ours(corpus, config)
    peer = peers.Clipped(corpus, ours.labels, ours.plan.ids, config)
    steps = len(ours.plan.ids)
    ready = list(peer.loader)
    all_steps = functools.partial(ours.steps, 0, steps)
    network = paired(all_steps, lambda: [peer.step(*b) for b in ready], 5, "step against the peer's network alone")
    whole = paired(all_steps, peer.epoch, 7, "step, from samples")
    clips = int(ours.windows.sum())
    return {
        "meaning": "from int16 samples to the updated parameters; `network_alone` gives the peer clips that are ready",
        "batch_recordings": batch,
        "steps": steps,
        "clips": clips,
        **whole,
        "network_alone": network,
        "ours_clips_a_s": clips / whole["ours_s"],
        "peer_clips_a_s": clips / whole["peer_s"],
        "compile_s": ours.compile_s,
        "padding_waste": ours.waste,
    }


def _seeds(seeds: int = 10, clips: int = 256) -> dict:
    """Ten trainings of the ablation's CNN-LSTM, two epochs each, as one program, against ten runs of one in a row."""
    config = load_config("hinf_lstm:ablation", {"model.cell": "lstm", "ablation.epochs": (2, 0)})
    task = tasks.make(config, 2000)
    rng = np.random.default_rng(0)
    mel = jnp.asarray(rng.uniform(size=(clips, config.features.n_mels, 20)), jnp.float32)
    data = Clips(mel, jnp.ones((clips, 20)), jnp.ones((clips // 2, 2), bool))
    shared = data, jnp.asarray(rng.integers(0, 2, clips // 2), jnp.float32)
    keys = [jax.random.key(seed) for seed in range(seeds)]
    states = [split_model(task.init(nnx.Rngs(seed)))[1:] for seed in range(seeds)]
    each_seed = list(zip(keys, states, [jnp.arange(clips)] * seeds, strict=True))
    run = pretrain(config, task)
    compiled = functools.partial(jax.jit, compiler_options=sharding.compiler_options())
    one, all_seeds = compiled(run), compiled(over_seeds(run))
    together = jax.tree.map(lambda *x: jnp.stack(x), *each_seed)
    return paired(
        waiting(all_seeds, together, shared),
        lambda: [jax.block_until_ready(one(*arguments, *shared)) for arguments in each_seed],
        5, "ten seeds",
    )  # fmt: skip
