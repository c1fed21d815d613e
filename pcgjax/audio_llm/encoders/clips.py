"""Clips of recordings for a raw-audio encoder, and a trained encoder's answers."""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import torch

from pcgjax.audio_llm import batches
from pcgjax.audio_llm.checkpoints import full, moments_of, newest, write
from pcgjax.audio_llm.encoders.model import Classifier, make_encoder
from pcgjax.audio_llm.model import RATE_HZ, precision
from pcgjax.data.corpus import Corpus
from pcgjax.data.plan import Geometry
from pcgjax.runtime.files import CheckpointError


class Clip(NamedTuple):
    recording: int  # index into the corpus
    begin: int  # samples
    end: int


def geometry_of(config: ml_collections.ConfigDict, corpus: Corpus) -> Geometry:
    """How recordings become clips, one after the other; the rest that does not fill a clip is left out.

    Raises:
      ValueError: data at another rate than 16 kHz, or a clip of less than 0.1 s.
    """
    if corpus.sample_rate_hz != RATE_HZ:
        raise ValueError(
            f"data.prepared is at {corpus.sample_rate_hz} Hz, {config.model.architecture} hears {RATE_HZ} Hz: prepare "
            f"it again with --sample_rate_hz={RATE_HZ}"
        )
    if config.features.window_s < 0.1:
        raise ValueError(f"features.window_s={config.features.window_s}: a clip needs at least 0.1 s")
    window = round(config.features.window_s * RATE_HZ)
    return Geometry(window, window, 0, 0)


def clips_of(corpus: Corpus, indices: Sequence[int] | np.ndarray, geometry: Geometry) -> list[Clip]:
    """The clips of these recordings, in order; one that is shorter than a clip is one."""
    return [
        Clip(int(i), n * geometry.hop, min(n * geometry.hop + geometry.window, int(corpus.lengths[i])))
        for i in indices
        for n in range(int(geometry.windows(corpus.lengths[i])))
    ]


def batch_of(
    corpus: Corpus, clips: Sequence[Clip], extractor: Any, window: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(samples (C, T), mask (C, T) or None) as the encoder takes them: each clip normalised over its own samples
    where the extractor does so, then padded with zeros to `window`, with a mask where the extractor gives one."""
    read = functools.lru_cache(1)(corpus.read)  # a recording's clips come one after another
    waves = [read(clip.recording)[clip.begin : clip.end].astype(np.float32) / 32767 for clip in clips]
    normalised = extractor(waves, sampling_rate=RATE_HZ, return_attention_mask=False)
    # Padded in a second step: without a mask the first would count the zeros in the mean and variance.
    padded = extractor.pad(normalised, padding="max_length", max_length=window, return_tensors="pt")
    return padded["input_values"].float(), padded.get("attention_mask")


def answers(
    model: Classifier,
    extractor: Any,
    corpus: Corpus,
    indices: np.ndarray,
    config: ml_collections.ConfigDict,
    device: torch.device,
) -> np.ndarray:
    """(n, 2) float64 log p, log (1 - p) of each of these recordings being positive, p the mean over its clips."""
    geometry = geometry_of(config, corpus)
    clips, size = clips_of(corpus, indices, geometry), config.train.portion_clips
    pieces = [clips[i : i + size] for i in range(0, len(clips), size)]
    training, logits = model.training, []
    model.eval()
    try:
        with torch.no_grad(), precision(config.model.dtype, device):
            steps = batches.prefetched(lambda n: batch_of(corpus, pieces[n], extractor, geometry.window), len(pieces))
            for samples, mask in steps:
                logits.append(model(samples.to(device), None if mask is None else mask.to(device)).cpu().numpy())
    finally:
        model.train(training)
    z = np.concatenate(logits).astype(np.float64)
    counts = geometry.windows(corpus.lengths[indices])
    log_pairs = np.stack([-np.logaddexp(0, -z), -np.logaddexp(0, z)], axis=-1)
    of_recording = np.split(log_pairs, np.cumsum(counts)[:-1])
    return np.stack([np.logaddexp.reduce(pairs, axis=0) - math.log(len(pairs)) for pairs in of_recording])


def torch_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save(workdir: pathlib.Path, kind: str, step: int, model: Classifier, optimizer: Any, meta: dict) -> None:
    """Writes checkpoints/KIND-STEP: model.safetensors, meta.json and, with an optimizer, optimizer.safetensors."""
    from safetensors.torch import save_file

    tensors = {name: full(p) for name, p in model.state_dict().items()}
    moments = moments_of(dict(model.named_parameters()), optimizer)
    write(workdir, kind, step, lambda folder: save_file(tensors, folder / "model.safetensors"), moments, meta)


def load_weights(model: Classifier, folder: pathlib.Path, optimizer: Any = None) -> dict:
    """Sets the weights, and the optimizer's moments, to those of a checkpoint; returns its meta.json.

    Raises:
      CheckpointError: it is damaged, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        if optimizer is not None:
            weights = dict(model.named_parameters())
            for key, value in load_file(folder / "optimizer.safetensors").items():
                name, kind = key.rsplit("|", 1)
                p = weights[name]
                optimizer.state[p][kind] = value.to(p.device) if value.ndim else value
        return json.loads((folder / "meta.json").read_text())
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: not a checkpoint of this run ({reason}); give another --workdir, or remove it"
        ) from None


def best_folder(workdir: str | pathlib.Path) -> pathlib.Path:
    """The folder with a run's best model by its validation score.

    Raises:
      CheckpointError: there is none.
    """
    folder = newest(workdir, "best")
    if folder is None:
        raise CheckpointError(f"{workdir}: no trained encoder there (checkpoints/best-*); train one first")
    return folder


def load_encoder(workdir: str | pathlib.Path) -> tuple[ml_collections.ConfigDict, int, Callable[[Corpus], np.ndarray]]:
    """A run's best model: (config, sample_rate_hz, a function of a corpus that returns `answers` for all of it).

    The folder that the weights came from is not needed.
    Raises:
      CheckpointError: there is none, or it is damaged.
    """
    import transformers

    folder = best_folder(workdir)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        config, kind = ml_collections.ConfigDict(meta["config"]), meta["encoder"].pop("model_type")
        encoder = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **meta["encoder"]))
        extractor = transformers.Wav2Vec2FeatureExtractor.from_dict(meta["extractor"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/meta.json: cannot be read ({error}); train again") from None
    model, device = Classifier(encoder), torch_device()
    load_weights(model, folder)
    model.to(device).eval()

    def answer(corpus: Corpus) -> np.ndarray:
        return answers(model, extractor, corpus, np.arange(len(corpus.rows)), config, device)

    return config, RATE_HZ, answer


def encoded_features(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, corpus: Corpus, indices: np.ndarray
) -> dict[str, np.ndarray]:
    """{"trained", "untrained": (n, D) float64}, the mean over a recording's clips of what the linear layer is given,
    by a run's best model, and by the model that training began with.

    Raises:
      CheckpointError: there is none, or it is damaged.
    """
    folder = best_folder(workdir)
    torch.manual_seed(config.seed)
    model, extractor = make_encoder(config.model)
    untrained = _embed(model, extractor, corpus, indices, config)
    load_weights(model, folder)
    return {"trained": _embed(model, extractor, corpus, indices, config), "untrained": untrained}


def _embed(
    model: Classifier, extractor: Any, corpus: Corpus, indices: np.ndarray, config: ml_collections.ConfigDict
) -> np.ndarray:
    """(n, D) float64, the mean over each recording's clips of the linear layer's input."""
    inputs: list[np.ndarray] = []

    def add(_: Any, arguments: tuple[torch.Tensor]) -> None:
        inputs.append(arguments[0].float().cpu().numpy())

    device = torch_device()
    hook = model.head.register_forward_pre_hook(add)
    try:
        answers(model.to(device), extractor, corpus, indices, config, device)
    finally:
        hook.remove()
    counts = geometry_of(config, corpus).windows(corpus.lengths[indices])
    begins = np.cumsum(counts) - counts
    return np.add.reduceat(np.concatenate(inputs), begins, axis=0) / counts[:, None]
