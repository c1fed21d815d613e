"""A raw-audio encoder with a linear head, from a local folder or random."""

from __future__ import annotations

import contextlib
import json
import logging as std_logging
import pathlib
from typing import Any

import ml_collections
import torch
from torch import nn

from pcgjax.audio_llm.model import RATE_HZ
from pcgjax.audio_llm.weights import ODD_FILE, ModelError, one_line, refuse_not_finite, weight_files

# config.model.architecture -> transformers' name of it, and what differs from that one's base size as published.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("wav2vec2", {}),
    "hubert": ("hubert", {}),
    "distilhubert": ("hubert", {"num_hidden_layers": 2, "feat_proj_layer_norm": False}),
}
# config.model.size, of random weights -> what is smaller.
SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "tiny": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
    },
}  # fmt: skip
# No layers or frames left out in training: a small head learns without, and all randomness is PyTorch's.
_NOT_LEFT_OUT = {"layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}


class Classifier(nn.Module):
    """A speech encoder of transformers with a linear layer on the mean over its frames."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 1)

    def forward(self, samples_CxT: torch.Tensor, mask_CxT: torch.Tensor | None = None) -> torch.Tensor:
        """(C,) float32 logits. mask: 1 where a clip is, 0 where it was padded; None where the encoder takes none."""
        frames_CxPxD = self.encoder(samples_CxT, attention_mask=mask_CxT).last_hidden_state
        if mask_CxT is None:
            mean_CxD = frames_CxPxD.mean(1)
        else:
            real = self.encoder._get_feature_vector_attention_mask(frames_CxPxD.shape[1], mask_CxT)[..., None]
            mean_CxD = (frames_CxPxD * real).sum(1) / real.sum(1)
        return self.head(mean_CxD)[:, 0].float()


def make_encoder(model: ml_collections.ConfigDict) -> tuple[Classifier, Any]:
    """(a classifier with a new head, the feature extractor) that `config.model` asks for, weights in float32.

    model: architecture; folder, with a checkpoint as transformers saves it, or empty for random weights of `size`;
      freeze_feature_encoder.
    Raises:
      ModelError: an unknown architecture or size; a folder with another architecture, without safetensors, with
        missing or misshapen weights, or that hears another rate than 16 kHz.
    """
    if model.architecture not in ARCHITECTURES:
        raise ModelError(f"model.architecture={model.architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
    encoder, extractor = _loaded(model) if model.folder else _random(model)
    classifier = Classifier(encoder)
    if model.freeze_feature_encoder:
        # As transformers does it: its input is then not marked for gradients either.
        classifier.encoder.feature_extractor._freeze_parameters()
    return classifier, extractor


def _random(model: ml_collections.ConfigDict) -> tuple[Any, Any]:
    import transformers

    if model.size not in SIZES:
        raise ModelError(f"model.size={model.size!r}: choose one of {', '.join(SIZES)}, or give model.folder")
    kind, differing = ARCHITECTURES[model.architecture]
    config = transformers.AutoConfig.for_model(kind, **{**_NOT_LEFT_OUT, **SIZES[model.size], **differing})
    return transformers.AutoModel.from_config(config), _extractor(config)


def _extractor(config: Any) -> Any:
    """Clips of zero mean and unit variance, and a mask for the models that were pre-trained with one."""
    import transformers

    with_mask = config.feat_extract_norm == "layer"
    return transformers.Wav2Vec2FeatureExtractor(
        sampling_rate=RATE_HZ, do_normalize=True, return_attention_mask=with_mask
    )


def check(folder: str | pathlib.Path, architecture: str) -> pathlib.Path:
    """The folder, when it looks like a checkpoint of this architecture; nothing large is read.

    Raises:
      ModelError: as `make_encoder`.
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model.folder={folder}: no config.json there; give a local folder with a checkpoint as transformers saves "
            "it, or leave it empty for random weights"
        )
    try:
        saved = dict(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{folder}/config.json: no JSON object: {error}") from None
    kind, differing = ARCHITECTURES[architecture]
    # The distilled model is a HuBERT of fewer layers, else of the same name and weights.
    wanted = {"model_type": kind} | {k: v for k, v in differing.items() if k == "num_hidden_layers"}
    for field, value in wanted.items():
        if saved.get(field) != value:
            raise ModelError(
                f"{folder}/config.json: {field} is {saved.get(field)!r}; model.architecture={architecture} needs "
                f"{value!r}: use the config of what the folder holds, or another folder"
            )
    if not weight_files(folder):
        if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")):
            raise ModelError(
                f"{folder}: only {', '.join(pickled)}, pickled weights, which are not opened here; convert them: "
                'python -c "from transformers import AutoModel, AutoFeatureExtractor; '
                f"AutoModel.from_pretrained('{folder}').save_pretrained('OUT'); "
                f"AutoFeatureExtractor.from_pretrained('{folder}').save_pretrained('OUT')\" and give "
                "--config.model.folder=OUT"
            )
        raise ModelError(f"{folder}: no weights there, need *.safetensors; download those of the checkpoint")
    return folder


def _loaded(model: ml_collections.ConfigDict) -> tuple[Any, Any]:
    import transformers
    from safetensors import SafetensorError

    folder = check(model.folder, model.architecture)
    loaded: Any
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        for name, value in _NOT_LEFT_OUT.items():
            setattr(config, name, value)
        with _quiet("transformers"):
            loaded = transformers.AutoModel.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
        extractor = _extractor(config)
        if (folder / "preprocessor_config.json").is_file():
            extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, *ODD_FILE) as error:
        raise ModelError(f"{folder}: cannot be loaded: {one_line(error, 400)}") from None
    encoder, info = loaded
    # What else the file holds belongs to the heads of its pre-training.
    if lacking := sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])}):
        raise ModelError(
            f"{folder}: {len(lacking)} weights are missing or of another shape than config.json says: "
            f"{', '.join(lacking[:5])}; download the checkpoint again"
        )
    refuse_not_finite(folder, encoder.named_parameters(), "download the checkpoint again")
    if extractor.sampling_rate != RATE_HZ:
        raise ModelError(
            f"{folder}/preprocessor_config.json: sampling_rate is {extractor.sampling_rate}; only {RATE_HZ} Hz is "
            "understood here"
        )
    return encoder, extractor


@contextlib.contextmanager
def _quiet(name: str):
    """Only errors of this logger: transformers lists the heads that it does not load."""
    logger = std_logging.getLogger(name)
    before = logger.level
    logger.setLevel(std_logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
