"""FLOPs of a sample of the published audio LLM, by formula, for the two ways of training of suite `audio_llm`.

A sample is one question on one clip. Two ways of training LoRA on it are counted from the configuration:
plain: transformers and PEFT as documented. The encoder runs on 3000 mel frames however short the clip, each question is
  a sequence of its own with the clip's audio in it, and `labels=` makes logits of every position.
ours: the encoder on the clip alone and once a clip, a clip's questions behind one copy of prompt and audio, logits
  where an answer stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FRAMES_A_SECOND, MOST_FRAMES = 100, 3000


def published_config() -> Any:
    """The `Qwen2AudioConfig` of Qwen2-Audio-7B and -Instruct, 8,397,094,912 parameters; the class's defaults are not
    that model (its feed-forward layers would have 22016 units)."""
    from transformers import Qwen2AudioConfig

    return Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "max_source_positions": 1500, "d_model": 1280,
            "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
            "activation_function": "gelu", "scale_embedding": False,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": 156032, "hidden_size": 4096, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
            "bos_token_id": 151643, "eos_token_id": 151645,
        },
        audio_token_index=151646,
    )  # fmt: skip


def parameters(config: Any) -> dict[str, int]:
    """Parameters of the audio tower, projector and LLM (with its head), and in all, without allocating them."""
    import torch
    from transformers import Qwen2AudioForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration(config)

    def count(*modules: Any) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    inner = model.model
    return {
        "audio_tower": count(inner.audio_tower),
        "projector": count(inner.multi_modal_projector),
        "llm": count(inner.language_model, model.lm_head),
        "total": count(model),
    }


def plain_flops(
    config: Any, audio_s: float, prompt_tokens: int, questions: Sequence[int], rank: int
) -> dict[str, dict[str, float]]:
    """`_flops` of a sample by the plain recipe, where one clip's `questions` have that many tokens each."""
    tokens = [prompt_tokens + _audio_tokens(audio_s) + question for question in questions]
    return _divided(
        _flops(config, len(tokens) * [MOST_FRAMES], tokens, sum(n * n for n in tokens), sum(tokens), rank), len(tokens)
    )


def our_flops(
    config: Any, audio_s: float, prompt_tokens: int, questions: Sequence[int], rank: int
) -> dict[str, dict[str, float]]:
    """`_flops` of a sample by ours: the clip and its prefix once, then each question, which sees itself and the
    prefix."""
    prefix = prompt_tokens + _audio_tokens(audio_s)
    seen = prefix * prefix + sum(question * (prefix + question) for question in questions)
    counted = _flops(config, [_frames(audio_s)], [prefix, *questions], seen, len(questions), rank)
    return _divided(counted, len(questions))


def _flops(
    config: Any, clips: Sequence[int], tokens: Sequence[int], seen: int, heads: int, rank: int
) -> dict[str, dict[str, float]]:
    """Floating-point operations of a training step, two to a multiply-add: {forward, backward, lora} of
    {audio_tower, projector, llm}.

    Matrix products, convolutions and attention; what goes element by element is left out (below 1 %). Attention counts
    its rectangles of queries and keys whole, causal or not, as PyTorch's FlopCounterMode does. The backward pass goes
    through frozen weights: towards the activations alone, one product for each of the forward pass, two for each of
    attention's; nothing below the first layer of the tower needs it. LoRA stands at all matrices of `TARGETS` and at
    the projector; its own gradients make three products of each forward one.

    Args:
      clips: mel frames the encoder sees, one entry a clip.
      tokens: of the LLM's sequences, or of their parts.
      seen: pairs of a token and one that it attends to.
      heads: positions at which logits are computed.
    """
    audio, text = config.audio_config, config.text_config
    width, d = audio.d_model, text.hidden_size
    positions = [(frames - 1) // 2 + 1 for frames in clips]
    projected = sum((n - 2) // 2 + 1 for n in positions)
    head_width = getattr(text, "head_dim", None) or d // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_width, text.num_key_value_heads * head_width
    tower = 4 * [(width, width)] + [(width, audio.encoder_ffn_dim), (audio.encoder_ffn_dim, width)]
    layer = [(d, queries), (d, keys), (d, keys), (queries, d), *2 * [(d, text.intermediate_size)]]
    layer += [(text.intermediate_size, d)]

    def part(n: int, layers: int, matrices: list[tuple[int, int]], attention: float) -> dict[str, float]:
        products = 2.0 * n * layers * sum(a * b for a, b in matrices)
        return {
            "forward": products + layers * attention,
            "backward": products + 2 * layers * attention,
            "lora": 3 * 2.0 * n * layers * rank * sum(a + b for a, b in matrices),
        }

    flops = {
        "audio_tower": part(sum(positions), audio.encoder_layers, tower, 4.0 * width * sum(n * n for n in positions)),
        "projector": part(projected, 1, [(width, d)], 0.0),
        "llm": part(sum(tokens), text.num_hidden_layers, layer, 4.0 * queries * seen),
    }
    convolutions = 3 * width * (sum(clips) * audio.num_mel_bins + sum(positions) * width)
    flops["audio_tower"]["forward"] += 2.0 * convolutions
    for way in ("forward", "backward"):
        flops["llm"][way] += 2.0 * heads * d * text.vocab_size
    return flops


def total(flops: dict[str, dict[str, float]], *parts: str) -> float:
    """The sum over `parts`, all if none are named, forward, backward and LoRA."""
    return sum(sum(flops[name].values()) for name in parts or flops)


def _divided(flops: dict[str, dict[str, float]], samples: int) -> dict[str, dict[str, float]]:
    return {name: {way: value / samples for way, value in of.items()} for name, of in flops.items()}


def _frames(audio_s: float) -> int:
    return min(int(np.ceil(audio_s * FRAMES_A_SECOND)), MOST_FRAMES)


def _audio_tokens(audio_s: float) -> int:
    return ((_frames(audio_s) - 1) // 2 + 1 - 2) // 2 + 1
