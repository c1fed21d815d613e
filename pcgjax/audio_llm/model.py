"""Qwen2-Audio with LoRA: loading, the documented forward pass, and one that gives the same for less.

What the fast pass leaves out (each against the plain one in tests/test_audio_llm_model.py): mel frames and encoder
positions after the clip's end (a shorter clip is padded to 30 s otherwise); the encoder, and the language model over
the system prompt and the audio, for all but the first question on a clip; logits where no answer stands. Axes: C clips,
M mel frames, P encoder positions, S sequences, L tokens, Q questions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import torch
import torch.nn.functional as F
from absl import logging
from safetensors import SafetensorError
from torch import nn

from pcgjax.audio_llm import adapter_files
from pcgjax.audio_llm.questions import LETTERS
from pcgjax.audio_llm.weights import ODD_FILE, one_line, refuse_not_finite, weight_files
from pcgjax.audio_llm.weights import ModelError as ModelError  # callers take it from here
from pcgjax.runtime import files, hashes

RATE_HZ = 16000
CLIP_S = 30.0  # what Qwen2-Audio hears at most; its processor cuts the rest off in silence
_HOP = 160  # samples of a mel frame
_MOST_FRAMES = 3000
_PREFIX = 0  # of `Batch.owner_SxL`: what all questions on a clip share
_PAD = -1
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")


# ------------------------------------------------------------------------------------------------------ loading


def check(folder: str | pathlib.Path, dtype: str) -> pathlib.Path:
    """The folder, when it looks like a checkpoint of Qwen2-Audio; nothing large is read.

    Raises:
      ModelError: as `load`.
    """
    folder = pathlib.Path(folder)
    if dtype not in ("float32", "bfloat16"):
        raise ModelError(f"model.dtype={dtype!r}: choose float32 or bfloat16")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json there; --model takes a local folder with a Qwen2-Audio checkpoint")
    try:
        kind = dict(json.loads((folder / "config.json").read_bytes())).get("model_type")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{folder}/config.json: no JSON object: {error}") from None
    if kind != "qwen2_audio":
        raise ModelError(f"{folder}/config.json: model_type is {kind!r}; only qwen2_audio is understood here")
    if not weight_files(folder):
        pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        others = f"only {', '.join(sorted(pickled))}, pickled files that are not opened here" if pickled else "none"
        raise ModelError(f"{folder}: need weights as *.safetensors, found {others}; download those of the checkpoint")
    return folder


def load(folder: str | pathlib.Path, dtype: str, attention: str, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """(Qwen2AudioForConditionalGeneration without gradients, its processor) of a local folder.

    Args: dtype: float32 or bfloat16; attention: transformers' name, such as sdpa, eager, flash_attention_2.
    Raises:
      ModelError: no folder, another architecture, no safetensors weights, weights that are missing, unknown, misshapen
        or not finite, letters that are not single tokens.
      DamagedError: a file of it is not as `merge` wrote it.
    """
    import transformers

    loaded: Any
    folder = check(folder, dtype)
    hashes.check(folder, fix="merge it again, or remove hashes.json where you changed it")
    try:
        loaded = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attention, local_files_only=True,
            use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, *ODD_FILE) as error:
        raise ModelError(f"{folder}: cannot be loaded: {one_line(error, 400)}") from None
    model, info = loaded
    if lacking := sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])}):
        raise ModelError(
            f"{folder}: {len(lacking)} weights are missing, unknown or of another shape than config.json says: "
            f"{', '.join(lacking[:5])}; download the checkpoint again"
        )
    refuse_not_finite(folder, model.named_parameters(), "download the checkpoint again")
    processor.tokenizer.padding_side = "left"
    letter_ids(processor)
    return model.requires_grad_(False).eval().to(device), processor


def letter_ids(processor: Any) -> list[int]:
    """The token of each of the letters A to F.

    Raises:
      ModelError: a letter that is several tokens.
    """
    tokens = [processor.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in LETTERS]
    if wrong := [letter for letter, ids in zip(LETTERS, tokens, strict=True) if len(ids) != 1]:
        raise ModelError(f"the tokenizer divides the letter {wrong[0]!r}: answers are read from one token a letter")
    return [ids[0] for ids in tokens]


def fingerprint(model: Any) -> str:
    """Which base weights a model without adapter has, whatever layout and type they were stored in."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(p.shape)}".encode())
        # Some numbers of every weight: a merged adapter may have changed any of them.
        some = p.detach().reshape(-1)[:: max(p.numel() // 256, 1)]
        digest.update(some.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------- LoRA


def add_lora(model: Any, lora: ml_collections.ConfigDict) -> Any:
    """The model with new LoRA matrices (Hu et al. 2021), in float32, that alone have gradients.

    lora: rank, alpha, dropout, targets (layer names, of `TARGETS`), and whether they are put into audio_tower,
      projector, llm.
    Raises:
      ModelError: nothing to train, or targets that are not there.
    """
    import peft

    unknown = sorted(set(lora.targets) - set(TARGETS))
    if unknown or not lora.targets:
        raise ModelError(f"lora.targets={unknown or '()'}: choose among {', '.join(TARGETS)}")
    if lora.rank < 1 or not 0 <= lora.dropout < 1:
        raise ModelError(f"lora.rank={lora.rank}, lora.dropout={lora.dropout}: need a rank of 1 or more and 0 <= p < 1")
    names = "|".join(lora.targets)
    parts = [
        *([rf"audio_tower\.layers\..*\.({names})"] if lora.audio_tower else []),
        *([r"multi_modal_projector\.linear"] if lora.projector else []),
        *([rf"language_model\.layers\..*\.({names})"] if lora.llm else []),
    ]
    if not parts:
        raise ModelError("lora.audio_tower, lora.projector and lora.llm are all False: nothing would be trained")
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=rf".*({'|'.join(parts)})",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    base = fingerprint(model)
    adapted: Any = peft.get_peft_model(model, config)
    adapted.base_fingerprint = base
    return adapted


def checkpoint_activations(model: Any) -> None:
    """Recomputes each layer in the backward pass instead of keeping what is within it."""
    base = base_of(model)
    new = getattr(base, "activation_checkpointing_enable", None)  # the name from transformers 5 on
    (new or base.gradient_checkpointing_enable)({"use_reentrant": False})


def save_adapter(model: Any, folder: pathlib.Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """PEFT's own layout, safetensors, and base.json, which says what weights it belongs to and what was written.

    tensors: full parameters by name, where the model itself holds parts of them.
    """
    model.save_pretrained(folder, state_dict=tensors, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's unfilled model card
    names = (adapter_files.CONFIG, adapter_files.WEIGHTS)
    about = {"fingerprint": model.base_fingerprint, "files": {name: hashes.of_file(folder / name) for name in names}}
    (folder / adapter_files.BASE).write_text(json.dumps(about | {"sha256": hashes.of_json(about)}) + "\n")


def check_adapter(folder: str | pathlib.Path) -> str | None:
    """The fingerprint of the base weights that an adapter belongs to; None where it does not say it.

    Raises:
      ModelError: no adapter there, or a pickled one.
      DamagedError: a file of it is not as training wrote it.
    """
    folder = pathlib.Path(folder)
    if not all((folder / name).is_file() for name in (adapter_files.CONFIG, adapter_files.WEIGHTS)):
        pickled = " (adapter_model.bin is a pickled file, which is not opened here)"
        raise ModelError(
            f"{folder}: need adapter_config.json and adapter_model.safetensors"
            f"{pickled if (folder / 'adapter_model.bin').exists() else ''}; give the folder that training wrote"
        )
    whole = folder.resolve()
    listed = hashes.read(whole.parent) or {}  # a checkpoint's
    fix = "use another checkpoint, or train again"
    hashes.check(whole.parent, [name for name in listed if name.startswith(f"{whole.name}/")], fix)
    path = folder / adapter_files.BASE
    if not path.exists():
        return None
    try:
        about = dict(json.loads(path.read_bytes()))
        written = about.pop("sha256", None)
        if written is not None and written != hashes.of_json(about):
            raise ValueError("not what was written")
        for name, digest in about.get("files", {}).items():
            if hashes.of_file(folder / name) != digest:
                raise files.DamagedError(f"{folder / name}: damaged, not the bytes that were written; {fix}")
        return about["fingerprint"]
    except files.DamagedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise files.DamagedError(f"{path}: damaged ({one_line(error)}); {fix}") from None


def with_adapter(model: Any, folder: str | pathlib.Path) -> Any:
    """The model with the adapter that `save_adapter` wrote, or another in PEFT's layout.

    Raises:
      ModelError: no adapter there, a pickled one, one of another base, or one of which a tensor does not fit.
      DamagedError: a file of it is not as training wrote it.
    """
    folder = pathlib.Path(folder)
    theirs, base = check_adapter(folder), fingerprint(model)
    if theirs is None:
        logging.warning("%s: has no base.json, so nothing says that --model is the one it was trained on", folder)
    elif theirs != base:
        raise ModelError(f"{folder}: trained on other base weights ({theirs}) than --model has ({base}); give its own")
    adapted = adapter_files.attach(model, folder)
    adapted.base_fingerprint = base
    return adapted.eval()


def base_of(model: Any) -> Any:
    """The Qwen2AudioForConditionalGeneration within an adapter, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def precision(dtype: str, device: torch.device) -> Any:
    """A context within which products are computed in bfloat16 where `config.model.dtype` is; else nothing changes."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------------ its input


class TooShortError(ValueError):
    """A clip that gives not one audio token."""


def positions(samples: int) -> int:
    """Encoder positions of a clip, 20 ms each; half as many audio tokens.

    Raises:
      TooShortError, or ValueError: a clip of no audio token, or of more than 30 s.
    """
    frames = -(-samples // _HOP)
    if samples > CLIP_S * RATE_HZ:
        raise ValueError(f"a clip of {samples / RATE_HZ:.2f} s: Qwen2-Audio hears {CLIP_S:g} s, divide it into windows")
    if frames < 3:
        raise TooShortError(f"a clip of {samples / RATE_HZ * 1000:.0f} ms: one audio token needs 20")
    return (frames - 1) // 2 + 1


def shortest() -> int:
    """Samples of the shortest clip that gives an audio token."""
    return 2 * _HOP + 1


def mel_of_clip(feature_extractor: Any, clip: np.ndarray) -> np.ndarray:
    """(128, M) of a clip at 16 kHz, float in [-1, 1]: what the padded clip's mel has there, and the frames after it
    that the convolutions before the encoder look at.

    Raises:
      ValueError: samples that are not finite, or so large that their squares are not.
    """
    frames = min(2 * positions(len(clip)) + 2, _MOST_FRAMES)
    # Two more frames, so that the reflection at the end reaches none of ours; of 30 s the documented path has one too.
    samples = np.zeros(min((frames + 2) * _HOP, _MOST_FRAMES * _HOP), np.float32)
    samples[: len(clip)] = clip
    features = feature_extractor(
        samples, sampling_rate=RATE_HZ, padding="do_not_pad", truncation=False, return_tensors="np"
    )
    mel = features["input_features"][0][:, :frames]
    if not np.isfinite(mel).all():
        raise ValueError(f"a clip whose samples reach {np.abs(clip).max():g} has no spectrum: give samples in [-1, 1]")
    return mel


def conversation(processor: Any, question: str) -> str:
    """The chat in which a question is asked about one clip, ready for the answer's letter."""
    content = [{"type": "audio", "audio_url": ""}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def tokens_of(processor: Any, question: str) -> list[int]:
    """Token ids of `conversation`, with one audio token that stands for all of a clip's."""
    ids = processor.tokenizer(conversation(processor, question), add_special_tokens=False)["input_ids"]
    if ids.count(processor.audio_token_id) != 1:
        raise ModelError("the chat template must show the audio once: a question names the audio token, or it does not")
    return ids


class Batch(NamedTuple):
    """Clips, and sequences that ask about them."""

    mel_CxFxM: torch.Tensor
    positions_C: torch.Tensor
    clip_S: torch.Tensor  # whose audio a sequence has
    tokens_SxL: torch.Tensor
    place_SxL: torch.Tensor  # position ids: every question goes on where the audio ended
    owner_SxL: torch.Tensor  # 0 for what its questions share, 1, 2, ... for each question's own tokens, -1 for padding
    last_Qx2: torch.Tensor  # sequence and place of the token after which the letter comes
    letters_Q: torch.Tensor  # the right letter's token
    positions: int  # of the longest clip, so that nobody has to ask the device
    ragged: bool  # whether some clips are shorter
    shared: bool  # whether a sequence holds several questions

    def to(self, device: torch.device | str) -> Batch:
        return self._replace(**{k: x.to(device, non_blocking=True) for k, x in self._tensors()})

    def pinned(self) -> Batch:
        return self._replace(**{k: x.pin_memory() for k, x in self._tensors()})

    def _tensors(self) -> list[tuple[str, Any]]:
        return [(name, x) for name, x in self._asdict().items() if isinstance(x, torch.Tensor)]


def make_batch(
    mels: Sequence[np.ndarray],
    samples: Sequence[int],
    questions: Sequence[Sequence[tuple[Sequence[int], int]]],
    audio_token: int,
    pad_token: int,
    share_prefix: bool = True,
    multiple: int = 1,
) -> Batch:
    """A batch of clips and of the questions on each, (token ids as `tokens_of` gives them, right letter's token).

    Args:
      mels: of `mel_of_clip`; samples: of each clip.
      share_prefix: a clip's questions stand in one sequence behind one copy of prompt and audio; else each in its own.
      multiple: sequences are padded to multiples of it, so that few shapes are compiled.
    Raises:
      ValueError: a clip's questions that differ before the audio.
    """
    clip_positions = np.array([positions(n) for n in samples])
    mel_CxFxM = np.zeros((len(mels), mels[0].shape[0], max(mel.shape[1] for mel in mels)), np.float32)
    for i, mel in enumerate(mels):
        mel_CxFxM[i, :, : mel.shape[1]] = mel
    rows: list[tuple[list[int], list[int], list[int]]] = []  # of each sequence tokens, places, owners
    clip, last, letters = [], [], []
    for c, of_clip in enumerate(questions):
        shared: list[int] | None = None
        for number, (ids, letter) in enumerate(of_clip, 1):
            at = list(ids).index(audio_token)
            # Everything up to the audio is the same for all; what follows it is the question's own.
            prefix = [*ids[:at], *[audio_token] * int(clip_positions[c] // 2)]
            rest = list(ids[at + 1 :])
            if shared is None or not share_prefix:
                shared = prefix
                rows.append((list(prefix), list(range(len(prefix))), [_PREFIX] * len(prefix)))
                clip.append(c)
            elif prefix != shared:
                raise ValueError("a clip's questions begin differently: the chat template must put the audio first")
            tokens, place, owner = rows[-1]
            tokens += rest
            place += range(len(prefix), len(prefix) + len(rest))
            owner += [number if share_prefix else _PREFIX] * len(rest)
            last.append((len(rows) - 1, len(tokens) - 1))
            letters.append(letter)
    return Batch(
        torch.from_numpy(mel_CxFxM), torch.from_numpy(clip_positions), torch.tensor(clip),
        *_padded(rows, pad_token, multiple), torch.tensor(last), torch.tensor(letters),
        positions=int(clip_positions.max()), ragged=bool(clip_positions.min() < clip_positions.max()),
        shared=share_prefix and len(last) > len(rows),
    )  # fmt: skip


def _padded(
    rows: Sequence[tuple[list[int], list[int], list[int]]], pad_token: int, multiple: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(S, L) int64 tokens, places and owners of these sequences, padded at the end to a multiple of `multiple`."""
    length = -(-max(len(tokens) for tokens, _, _ in rows) // multiple) * multiple
    arrays = [np.full((len(rows), length), value, np.int64) for value in (pad_token, 0, _PAD)]
    arrays[1][:] = np.arange(length)  # positions that began anew in the padding would be taken for packed sequences
    for i, row in enumerate(rows):
        for array, values in zip(arrays, row, strict=True):
            array[i, : len(values)] = values
    tokens, places, owners = map(torch.from_numpy, arrays)
    return tokens, places, owners


# ------------------------------------------------------------------------------------------------------- forward


class Answerer(nn.Module):
    """A model, with or without adapter, whose forward pass is the fast one."""

    def __init__(self, model: Any, compile_layers: bool = False):
        super().__init__()
        self.model = model
        inner = base_of(model).model
        if compile_layers:
            for layer in (*inner.audio_tower.layers, *inner.language_model.layers):
                layer.compile()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits (Q, V), float32, of the token that answers each question."""
        base = base_of(self.model)
        audio_CxAxD = encode(base.model, batch)
        x = base.model.language_model.embed_tokens(batch.tokens_SxL)
        is_audio = batch.tokens_SxL == base.config.audio_token_id
        # The audio's place is the same in all sequences: nothing is padded in front.
        nth = is_audio.cumsum(1).clamp(min=1, max=audio_CxAxD.shape[1]) - 1
        audio_SxLxD = audio_CxAxD[batch.clip_S[:, None], nth].to(x.dtype)
        x = torch.where(is_audio[..., None], audio_SxLxD, x)
        hidden = base.model.language_model(
            inputs_embeds=x, attention_mask=question_mask(base.config, batch, x.dtype),
            position_ids=batch.place_SxL, use_cache=False,
        ).last_hidden_state  # fmt: skip
        return base.lm_head(hidden[batch.last_Qx2[:, 0], batch.last_Qx2[:, 1]]).float()


def encode(model: Any, batch: Batch) -> torch.Tensor:
    """Audio tokens (C, P // 2, D) of clips, the encoder run over their positions alone; those after a shorter clip's
    own mean nothing."""
    from transformers.masking_utils import create_bidirectional_mask

    tower, count = model.audio_tower, batch.positions
    mel = batch.mel_CxFxM.to(tower.conv1.weight.dtype)
    x = F.gelu(tower.conv2(F.gelu(tower.conv1(mel))))[..., :count].transpose(1, 2)
    x = x + tower.embed_positions.weight[:count]
    mask = None
    if batch.ragged:
        real = torch.arange(count, device=x.device)[None] < batch.positions_C[:, None]
        mask = create_bidirectional_mask(config=tower.config, inputs_embeds=x, attention_mask=real.long())
    for layer in tower.layers:
        x = layer(x, mask)
    x = tower.layer_norm(tower.avg_pooler(x.transpose(1, 2)).transpose(1, 2))
    return model.multi_modal_projector(x)


def question_mask(config: Any, batch: Batch, dtype: torch.dtype) -> torch.Tensor | None:
    """Which tokens a token attends to: those before it that all questions share, and its own question's.

    None where each sequence has one question: causal attention never reaches the padding behind it.
    """
    if not batch.shared:
        return None
    owner_SxL = batch.owner_SxL
    kind = config.text_config._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise ModelError(f"model.attention={kind}: cannot share a clip's prefix; set model.share_prefix=False")
    same_question, L = owner_SxL[:, :, None] == owner_SxL[:, None], owner_SxL.shape[1]
    before = torch.ones(L, L, dtype=torch.bool, device=owner_SxL.device).tril()
    allowed = ((same_question | (owner_SxL == _PREFIX)[:, None]) & before)[:, None]
    return allowed if kind == "sdpa" else torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, -torch.inf)


def plain_logits(model: Any, processor: Any, clips: Sequence[np.ndarray], questions: Sequence[str]) -> torch.Tensor:
    """Logits (Q, V) as the model's documentation computes them, one clip a question: what the fast pass must equal.

    Raises:
      ModelError: a batch that is padded on the right, after whose last position no letter comes.
    """
    for clip in clips:
        positions(len(clip))
    texts = [conversation(processor, question) for question in questions]
    inputs = processor(text=texts, audio=list(clips), sampling_rate=RATE_HZ, padding=True, return_tensors="pt")
    refuse_right_padding(inputs["attention_mask"])
    return model(**inputs.to(base_of(model).device), use_cache=False).logits[:, -1].float()


def refuse_right_padding(attention_mask: torch.Tensor) -> None:
    if not bool(attention_mask[:, -1].all()):
        raise ModelError(
            'padded on the right: no letter comes after padding; set processor.tokenizer.padding_side="left"'
        )
