"""Clips of recordings for a raw-audio encoder, and a trained encoder's answers."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import torch

from pcgjax.audio_llm import batches
from pcgjax.audio_llm.checkpoints import best, full, moments_of, put_moments, read, write
from pcgjax.audio_llm.encoders.model import Classifier, make_encoder
from pcgjax.audio_llm.model import RATE_HZ, precision
from pcgjax.audio_llm.weights import first_and_more, not_finite, one_line
from pcgjax.data.corpus import Corpus
from pcgjax.data.plan import Geometry
from pcgjax.runtime.files import CheckpointError

# How fast it is computed: a run may go on with another value.
FREE = (("train", "portion_clips"),)


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
    """(samples (C, T), mask (C, T) or None) of these clips as `as_heard` gives them."""
    read = functools.lru_cache(1)(corpus.read)  # a recording's clips come one after another
    waves = [read(clip.recording)[clip.begin : clip.end].astype(np.float32) / 32767 for clip in clips]
    return as_heard(waves, extractor, window)


def as_heard(waves: Sequence[np.ndarray], extractor: Any, window: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(samples (C, T), mask (C, T) or None) as the encoder takes them: each clip, float32 in [-1, 1], normalised over
    its own samples where the extractor does so, then padded with zeros to `window`, with a mask where the extractor
    gives one.

    Raises:
      ValueError: samples that are not finite, or so large that their squares are not.
    """
    normalised = extractor(waves, sampling_rate=RATE_HZ, return_attention_mask=False)
    # Padded in a second step: without a mask the first would count the zeros in the mean and variance.
    padded = extractor.pad(normalised, padding="max_length", max_length=window, return_tensors="pt")
    samples = padded["input_values"].float()
    if not bool(torch.isfinite(samples).all()):
        loudest = max(float(np.abs(wave).max(initial=0)) for wave in waves)
        raise ValueError(f"a clip whose samples reach {loudest:g} cannot be normalised: give samples in [-1, 1]")
    return samples, padded.get("attention_mask")


def answers(
    model: Classifier,
    extractor: Any,
    corpus: Corpus,
    indices: np.ndarray,
    config: ml_collections.ConfigDict,
    device: torch.device,
) -> np.ndarray:
    """(n, 2) float64 log p, log (1 - p) of each of these recordings being positive, p the mean over its clips.

    Raises:
      FloatingPointError: an answer that is not finite, naming its recording.
    """
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
    if len(bad := np.flatnonzero(~np.isfinite(z))):
        name = corpus.rows[clips[bad[0]].recording].get("id", clips[bad[0]].recording)
        raise FloatingPointError(f"the model's answer to {name} is not finite, nor to {len(bad) - 1} other clips")
    counts = geometry.windows(corpus.lengths[indices])
    log_pairs = np.stack([-np.logaddexp(0, -z), -np.logaddexp(0, z)], axis=-1)
    of_recording = np.split(log_pairs, np.cumsum(counts)[:-1])
    return np.stack([np.logaddexp.reduce(pairs, axis=0) - math.log(len(pairs)) for pairs in of_recording])


def torch_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save(workdir: pathlib.Path, kind: str, step: int, model: Classifier, optimizer: Any, meta: dict) -> None:
    """Writes checkpoints/KIND-STEP: model.safetensors, meta.json, hashes.json and, with an optimizer,
    optimizer.safetensors; see `checkpoints.write`."""
    from safetensors.torch import save_file

    tensors = {name: full(p) for name, p in model.state_dict().items()}
    moments = moments_of(dict(model.named_parameters()), optimizer)
    write(workdir, kind, step, lambda folder: save_file(tensors, folder / "model.safetensors"), moments, meta)


def load_weights(model: Classifier, folder: pathlib.Path, optimizer: Any = None) -> None:
    """Sets the weights, and the optimizer's moments, to those of a checkpoint that `checkpoints.meta_of` found whole.

    Raises:
      CheckpointError: it cannot be read, or is of another model.
    """
    state = read(folder / "model.safetensors")
    try:
        model.load_state_dict(state)
        if bad := not_finite(state.items()):
            raise ValueError(f"{first_and_more(bad)}: a NaN or an infinity")
        if optimizer is not None:
            put_moments(dict(model.named_parameters()), folder, optimizer)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not a checkpoint of this run ({one_line(error)}); give another --workdir, or remove it"
        ) from None


def load_encoder(workdir: str | pathlib.Path) -> tuple[ml_collections.ConfigDict, int, Callable[[Corpus], np.ndarray]]:
    """A run's best model: (config, sample_rate_hz, a function of a corpus that returns `answers` for all of it).

    The folder that the weights came from is not needed.
    Raises:
      CheckpointError (also DamagedError): there is none, it is damaged, or of another run than config.json says.
    """
    import transformers

    folder, meta = best(workdir, "encoder", FREE)
    try:
        config, kind = ml_collections.ConfigDict(meta["config"]), meta["encoder"].pop("model_type")
        encoder = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **meta["encoder"]))
        extractor = transformers.Wav2Vec2FeatureExtractor.from_dict(meta["extractor"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
      CheckpointError (also DamagedError): there is none, it is damaged, or of another run than config.json says.
    """
    folder, _ = best(workdir, "encoder", FREE)
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
