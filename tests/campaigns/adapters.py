"""Damages of what the PyTorch trainers write, and weight files of others with other names, shapes and values.

    python -m tests.campaigns.adapters [--count=600] [--seed=0]

Two thirds are damages of every file of the checkpoints of an audio LLM and of a raw-audio encoder and of a merged
model, each followed by a resume, a score, a merge's or a prediction's load. One third are changed files of others:
adapters, base models, encoders, SSAMBA and ImageNet weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from absl import app, flags
from safetensors.torch import load_file

from pcgjax.audio_llm import checkpoints, make_tiny
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm.encoders import clips
from pcgjax.audio_llm.encoders.model import make_encoder
from pcgjax.audio_llm.merge import merge
from pcgjax.data.corpus import in_memory
from pcgjax.runs.config import load_config, plain_config
from tests.campaigns import DAMAGES, Tally, damage, outcome_of


class Target(NamedTuple):
    """A folder whose files are damaged, and what a user does next with a copy of it."""

    name: str
    folder: pathlib.Path
    acts: dict[str, Callable[[pathlib.Path], object]]
    wanted: dict[str, object]


def digest(tensors: Iterable[tuple[str, Any]]) -> str:
    sha = hashlib.sha256()
    for name, x in sorted(tensors, key=lambda pair: pair[0]):
        sha.update(name.encode() + np.asarray(x.detach().float() if torch.is_tensor(x) else x, np.float32).tobytes())
    return sha.hexdigest()


def target(name: str, folder: pathlib.Path, acts: dict[str, Callable[[pathlib.Path], object]]) -> Target:
    return Target(name, folder, acts, {act: run(folder) for act, run in acts.items()})


# ----------------------------------------------------------------------------------------- what our trainers write


def random_(parameters: Iterable[tuple[str, torch.nn.Parameter]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in parameters:
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))


def stepped(weights: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(weights.values())
    for p in weights.values():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    return optimizer


def llm_run(folder: pathlib.Path, tiny: pathlib.Path) -> Target:
    config = load_config("audio_llm", {"lora.rank": 2, "lora.projector": True})
    model = llm.add_lora(llm.load(tiny, "float32", "sdpa")[0], config.lora)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    meta = {"config": plain_config(config), "base": model.base_fingerprint, "order": "o"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(plain_config(config)))
    for step in (10, 20):
        random_(weights.items(), step)
        optimizer = stepped(weights)
        state = {"state": {"best": {"step": step}, "sums": [0, 0, 0], "validated": step}}
        for kind, o in (("best", None), ("last", optimizer)):
            checkpoints.save(folder, kind, step, model, weights, o, meta | state)
    base = llm.load(tiny, "float32", "sdpa")[0]

    def resume(workdir: pathlib.Path) -> object:
        checkpoints.refuse_foreign_best(workdir, meta["config"], checkpoints.FREE, base=meta["base"], order="o")
        found = checkpoints.intact(workdir, "last")
        if found is None:
            return None
        optimizer = torch.optim.AdamW(weights.values())
        checkpoints.put(weights, found[0], optimizer)
        checkpoints.refuse_foreign(found[0], found[1], meta["config"], checkpoints.FREE, base=meta["base"], order="o")
        moments = checkpoints.moments_of(weights, optimizer) or {}
        return digest([*weights.items(), *moments.items()]), json.dumps(found[1])

    def attach(adapter: pathlib.Path) -> object:
        adapted = llm.with_adapter(base, adapter)
        found = digest((name, p) for name, p in adapted.named_parameters() if "lora_" in name)
        adapted.unload()
        return found

    return target("audio LLM", folder, {
        "resume": resume,
        "score": lambda workdir: attach(checkpoints.best_adapter(workdir)),
        "merge": lambda workdir: attach(workdir / "checkpoints" / "best-00000020" / "adapter"),
    })  # fmt: skip


def encoder_run(folder: pathlib.Path) -> Target:
    changes = {"model.size": "tiny", "features.window_s": 0.5, "train.portion_clips": 2}
    config = load_config("wav2vec2", changes)
    torch.manual_seed(0)
    model, extractor = make_encoder(config.model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(plain_config(config)))
    for step in (10, 20):
        random_(model.named_parameters(), step)
        optimizer = stepped(trained)
        meta = {
            "config": plain_config(config), "order_sha256": "o", "sample_rate_hz": 16000, "best": {"step": step},
            "totals": [0, 0, 0], "encoder": json.loads(model.encoder.config.to_json_string(use_diff=False)),
            "extractor": json.loads(extractor.to_json_string()),
        }  # fmt: skip
        for kind, o in (("best", None), ("last", optimizer)):
            clips.save(folder, kind, step, model, o, meta)
    corpus = in_memory([{"id": "a"}], [np.random.default_rng(0).normal(0, 3000, 9000).astype(np.int16)], 16000)

    def resume(workdir: pathlib.Path) -> object:
        found = checkpoints.intact(workdir, "last")
        if found is None:
            return None
        optimizer = torch.optim.AdamW(trained.values())
        clips.load_weights(model, found[0], optimizer)
        moments = checkpoints.moments_of(trained, optimizer) or {}
        return digest([*model.state_dict().items(), *moments.items()]), json.dumps(found[1])

    return target("encoder", folder, {
        "resume": resume, "predict": lambda workdir: clips.load_encoder(workdir)[2](corpus).tolist(),
    })  # fmt: skip


def load_model(folder: pathlib.Path) -> object:
    model, processor = llm.load(folder, "float32", "sdpa")
    heard = processor.feature_extractor(np.ones(4000, np.float32), sampling_rate=16000, return_tensors="np")
    return digest(model.named_parameters()), llm.tokens_of(processor, "A murmur?"), heard["input_features"].sum()


def damages(targets: list[Target], count: int, rng: np.random.Generator, tally: Tally, scratch: pathlib.Path) -> None:
    """`count` damages, each of one file of a copy of a target, each followed by one act."""
    pairs = [(one, path.relative_to(one.folder)) for one in targets for path in sorted(one.folder.rglob("*"))
             if path.is_file()]  # fmt: skip
    for n in range(count):
        one, path = pairs[n % len(pairs)]
        kind = DAMAGES[int(rng.integers(len(DAMAGES)))]
        act = list(one.acts)[int(rng.integers(len(one.acts)))]
        copy = shutil.copytree(one.folder, scratch / "copy")
        swapped = [other for other in copy.rglob(path.name) if other != copy / path]
        if kind == "exchange" and not swapped:
            kind = "flip"
        done = damage(kind, copy / path, swapped[int(rng.integers(len(swapped)))] if swapped else copy, rng)
        outcome, about = outcome_of(lambda one=one, act=act, copy=copy: one.acts[act](copy), one.wanted[act])
        tally.add(f"{one.name}: {path.name}", outcome, f"{path}, {done}, then {act}: {about}")
        shutil.rmtree(copy)


# ------------------------------------------------------------------------------------------------- files of others


def change(tensors: dict[str, torch.Tensor], rng: np.random.Generator) -> tuple[str, dict[str, torch.Tensor]]:
    """(what was done, the tensors with some names, shapes or values changed)."""
    names, kind = list(tensors), int(rng.integers(10))
    some = set(rng.choice(names, int(rng.integers(1, 1 + len(names))), replace=False))
    one = names[int(rng.integers(len(names)))]
    prefix = ["module.", "model.", "base_model.model.", "x.", "encoder."][int(rng.integers(5))]
    if kind == 0:
        return f"{prefix} before all", {prefix + name: x for name, x in tensors.items()}
    if kind == 1:
        return f"{prefix} before some", {prefix * (name in some) + name: x for name, x in tensors.items()}
    if kind == 2:
        return "some left out", {name: x for name, x in tensors.items() if name not in some}
    if kind == 3:
        return f"one more, {one}x", tensors | {f"{one}x": tensors[one].clone()}
    if kind == 4:
        return f"NaN in {one}", tensors | {
            one: put_first(tensors[one], [np.nan, np.inf, -np.inf][int(rng.integers(3))])
        }
    if kind == 5:
        return f"{one} cut", tensors | {one: tensors[one][:-1].clone()} if tensors[one].ndim else tensors
    if kind == 6:
        return f"{one} with an axis more", tensors | {one: tensors[one][None].clone()}
    if kind == 7:
        return f"{one} flat", tensors | {one: tensors[one].reshape(-1).clone()}
    if kind == 8:
        first = names[0].split(".")[0] + "."
        return f"without {first}", {name.removeprefix(first): x for name, x in tensors.items()}
    return f"{one} renamed", {name if name != one else name.replace("weight", "wait") + "_": x
                              for name, x in tensors.items()}  # fmt: skip


def put_first(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone().float()
    x.reshape(-1)[0] = value
    return x


class Others(NamedTuple):
    """Weight files of others: tensors, how they are written into a new folder, and how a user loads them."""

    name: str
    tensors: dict[str, torch.Tensor]
    write: Callable[[dict[str, torch.Tensor], pathlib.Path], None]
    load: Callable[[pathlib.Path], object]


def others(tiny: pathlib.Path, run: Target, scratch: pathlib.Path) -> list[Others]:
    from flax import nnx
    from safetensors.torch import save_file as save

    from pcgjax.models.image import ImageClassifier
    from pcgjax.models.imagenet import _ENDINGS, load_imagenet
    from pcgjax.models.ssamba import SSAMBA, load_torch_checkpoint, save_torch_checkpoint

    def beside(folder: pathlib.Path, left_out: str) -> Callable[[dict[str, torch.Tensor], pathlib.Path], None]:
        def write(tensors: dict[str, torch.Tensor], out: pathlib.Path) -> None:
            shutil.copytree(folder, out, ignore=shutil.ignore_patterns(left_out, "hashes.json", "base.json"))
            save(tensors, out / left_out, {"format": "pt"})

        return write

    def pth(tensors: dict[str, torch.Tensor], out: pathlib.Path) -> None:
        out.mkdir()
        torch.save(tensors, out / "net.pth")

    adapter = run.folder / "checkpoints" / "best-00000020" / "adapter"
    base = llm.load(tiny, "float32", "sdpa")[0]

    def attach(folder: pathlib.Path) -> object:
        adapted = llm.with_adapter(base, folder)
        found = digest((name, p) for name, p in adapted.named_parameters() if "lora_" in name)
        adapted.unload()
        return found

    config = load_config("wav2vec2", {"model.size": "tiny"})
    torch.manual_seed(0)
    encoder = scratch / "wav2vec2"
    make_encoder(config.model)[0].encoder.save_pretrained(encoder)

    def load_encoder(folder: pathlib.Path) -> object:
        config.model.folder = str(folder)
        return digest(make_encoder(config.model)[0].encoder.named_parameters())

    state = lambda model: digest((str(place), np.asarray(x)) for place, x in nnx.to_flat_state(nnx.state(model)))
    save_torch_checkpoint(SSAMBA(16, 2, 64, classes=3, rngs=nnx.Rngs(0)), scratch / "ssamba.pth")
    image = lambda: nnx.eval_shape(lambda: ImageClassifier("resnet", 32, 32, 8, (1, 1, 1, 1), rngs=nnx.Rngs(0)))
    resnet, generator = {}, torch.Generator().manual_seed(0)
    for place, variable in nnx.to_flat_state(nnx.state(image().trunk)):
        *above, last = map(str, place)
        shape = variable.shape[::-1] if last == "kernel" else variable.shape
        resnet[".".join([*above, _ENDINGS.get(last, last)])] = torch.rand(shape, generator=generator)
    return [
        Others("adapter of others", load_file(adapter / "adapter_model.safetensors"),
               beside(adapter, "adapter_model.safetensors"), attach),
        Others("base model of others", load_file(tiny / "model.safetensors"), beside(tiny, "model.safetensors"),
               load_model),
        Others("encoder of others", load_file(encoder / "model.safetensors"), beside(encoder, "model.safetensors"),
               load_encoder),
        Others("SSAMBA of others", torch.load(scratch / "ssamba.pth", weights_only=True), pth,
               lambda folder: state(load_torch_checkpoint(folder / "net.pth", 64))),
        Others("ImageNet of others", resnet, pth,
               lambda folder: state(load_imagenet(image(), folder / "net.pth").trunk)),
    ]  # fmt: skip


def changes(sources: list[Others], count: int, rng: np.random.Generator, tally: Tally, scratch: pathlib.Path) -> None:
    """`count` changed files of others, each loaded: refused with a message, or the same weights."""
    wanted = {}
    for n in range(count):
        one, out = sources[n % len(sources)], scratch / "theirs"
        if one.name not in wanted:
            one.write(one.tensors, out)
            wanted[one.name] = one.load(out)
            shutil.rmtree(out)
        done, tensors = change(one.tensors, rng)
        one.write({name: x.contiguous() for name, x in tensors.items()}, out)
        # A warning is not enough here: that nothing says of which base an adapter is, is said of the unchanged one too.
        outcome, about = outcome_of(lambda one=one, out=out: one.load(out), wanted[one.name], warned=False)
        tally.add(one.name, outcome, f"{done}: {about}")
        shutil.rmtree(out)


def main(argv: list[str]) -> None:
    rng, tally = np.random.default_rng(FLAGS.seed), Tally()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        tiny = make_tiny.make_tiny(scratch / "tiny")
        run = llm_run(scratch / "run", tiny)
        merged = merge(tiny, run.folder / "checkpoints" / "best-00000020" / "adapter", scratch / "merged")
        targets = [run, encoder_run(scratch / "encoder"), target("merged", merged, {"load": load_model})]
        damages(targets, FLAGS.count * 2 // 3, rng, tally, scratch)
        changes(others(tiny, run, scratch), FLAGS.count - FLAGS.count * 2 // 3, rng, tally, scratch)
    sys.exit(tally.end())


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_integer("count", 700, "How many damages and changes to try.")
    flags.DEFINE_integer("seed", 0, "Of the places and kinds of damage.")
    app.run(main)
