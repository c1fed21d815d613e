"""The bench's suite `audio_llm`: what the published model needs for a sample, and the usual recipe as the peer.

A sample is one question on one clip. Two ways of training LoRA on it are counted from the configuration:
plain: transformers and PEFT as documented. The encoder runs on 3000 mel frames however short the clip, each question is
  a sequence of its own with the clip's audio in it, and `labels=` makes logits of every position.
ours: the encoder on the clip alone and once a clip, a clip's questions behind one copy of prompt and audio, logits
  where an answer stands.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

RATE_HZ, FRAMES_A_SECOND, MOST_FRAMES = 16000, 100, 3000
# Dense bfloat16 with float32 sums, from the makers' data sheets, in FLOP/s.
GPUS = {"H200 SXM": 989e12, "H100 SXM": 989e12, "L40S": 362e12, "A100": 312e12}
SHARE_OF_PEAK = 0.4
# Tokens of a sample: system prompt and the words around the audio; a question with six options and its end.
PROMPT_TOKENS, QUESTION_TOKENS = 21, 90
RANK = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")


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
    count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
    inner = model.model
    return {
        "audio_tower": count(inner.audio_tower),
        "projector": count(inner.multi_modal_projector),
        "llm": count(inner.language_model, model.lm_head),
        "total": count(model),
    }


# ---------------------------------------------------------------------------------------------------------- FLOPs


def plain_flops(
    config: Any, audio_s: float, prompt_tokens: int, questions: Sequence[int], rank: int
) -> dict[str, dict[str, float]]:
    """`_flops` of a sample by the plain recipe, where one clip's `questions` have that many tokens each."""
    tokens = [prompt_tokens + _audio_tokens(audio_s) + own for own in questions]
    return _divided(
        _flops(config, len(tokens) * [MOST_FRAMES], tokens, sum(n * n for n in tokens), sum(tokens), rank), len(tokens)
    )


def our_flops(
    config: Any, audio_s: float, prompt_tokens: int, questions: Sequence[int], rank: int
) -> dict[str, dict[str, float]]:
    """`_flops` of a sample by ours: the clip and its prefix once, then each question, which sees itself and the
    prefix."""
    prefix = prompt_tokens + _audio_tokens(audio_s)
    seen = prefix * prefix + sum(own * (prefix + own) for own in questions)
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
    heard = sum((n - 2) // 2 + 1 for n in positions)
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

    found = {
        "audio_tower": part(sum(positions), audio.encoder_layers, tower, 4.0 * width * sum(n * n for n in positions)),
        "projector": part(heard, 1, [(width, d)], 0.0),
        "llm": part(sum(tokens), text.num_hidden_layers, layer, 4.0 * queries * seen),
    }
    convolutions = 3 * width * (sum(clips) * audio.num_mel_bins + sum(positions) * width)
    found["audio_tower"]["forward"] += 2.0 * convolutions
    for way in ("forward", "backward"):
        found["llm"][way] += 2.0 * heads * d * text.vocab_size
    return found


def total(flops: dict[str, dict[str, float]], *parts: str) -> float:
    """The sum over `parts`, all if none are named, forward, backward and LoRA."""
    return sum(sum(flops[name].values()) for name in parts or flops)


def _divided(flops: dict[str, dict[str, float]], samples: int) -> dict[str, dict[str, float]]:
    return {name: {way: value / samples for way, value in of.items()} for name, of in flops.items()}


def _frames(audio_s: float) -> int:
    return min(int(np.ceil(audio_s * FRAMES_A_SECOND)), MOST_FRAMES)


def _audio_tokens(audio_s: float) -> int:
    return ((_frames(audio_s) - 1) // 2 + 1 - 2) // 2 + 1


# --------------------------------------------------------------------------------------------------------- the peer


def plain_model(folder: str | pathlib.Path, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any, Any]:
    """(model with LoRA, processor, AdamW) as the libraries' guides set them up: `from_pretrained`, `get_peft_model`."""
    import peft
    import torch
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    model: Any = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[*TARGETS, "multi_modal_projector.linear"])
    model = peft.get_peft_model(model.to(device), lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    return model.train(), processor, optimizer


def plain_step(
    model: Any,
    processor: Any,
    optimizer: Any,
    clips: Sequence[np.ndarray],
    conversations: Sequence[list[dict[str, Any]]],
    letters: Sequence[str],
    half: bool = False,
) -> float:
    """A training step of the usual recipe, and its loss: processor, `labels=`, backward, AdamW.

    Args:
      clips: (samples,) float32 at 16 kHz, one a question: a clip asked four questions is there four times.
      conversations: what `apply_chat_template` takes, up to the user's question.
      letters: the right answers.
      half: products in bfloat16.
    """
    import torch

    prompts = processor.apply_chat_template(list(conversations), add_generation_prompt=True, tokenize=False)
    texts = [prompt + letter for prompt, letter in zip(prompts, letters, strict=True)]
    inputs = processor(text=texts, audio=list(clips), sampling_rate=RATE_HZ, padding=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    labels = inputs["input_ids"].clone()
    labels[:, :-1] = -100  # padded on the left: the last token is the letter
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# --------------------------------------------------------------------------------------------------------- the suite


def audio_llm_suite(pairs: int = 5) -> dict:
    """{published: parameters and rows of FLOPs and estimated rates, one for a clip's length and questions a clip;
    step: ours against the plain recipe with the tiny model; full_size: the same with the published model's size and
    random weights where there is a GPU}."""
    import torch

    from pcgjax.audio_llm.make_tiny import make_tiny

    config = published_config()
    rows = [_row(config, audio_s, asked) for audio_s in (10.0, 30.0) for asked in (1, 4)]
    found = {"published": {"parameters": parameters(config), "rank": RANK, "rows": rows}}
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_tiny(pathlib.Path(folder) / "tiny")
        steps = {"share_prefix": True, "separate": False}
        found["step"] = {name: _step(plain_model(tiny), shared, pairs, "cpu") for name, shared in steps.items()}
        if torch.cuda.is_available():
            found["full_size"] = full_size(config, tiny, pairs, "cuda")
    return found


def our_step(answerer: Any, processor: Any, optimizer: Any, clips: Sequence[np.ndarray],
             asked: Sequence[Sequence[tuple[str, int]]], share_prefix: bool, device: str,
             half: bool = False) -> float:  # fmt: skip
    """The same step as `plain_step`'s, by the fast pass; asked: (question, right option) of each clip."""
    import torch

    from pcgjax.audio_llm import model as llm

    letters = llm.letter_ids(processor)
    mels = [llm.mel_of_clip(processor.feature_extractor, clip) for clip in clips]
    questions = [[(llm.tokens_of(processor, text), letters[right]) for text, right in own] for own in asked]
    batch = llm.make_batch(
        mels, [len(clip) for clip in clips], questions, processor.audio_token_id, processor.tokenizer.pad_token_id,
        share_prefix,
    ).to(device)  # fmt: skip
    with torch.autocast(device, torch.bfloat16, enabled=half):
        logits = answerer(batch)
    loss = torch.nn.functional.cross_entropy(logits, batch.letters_Q)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _step(made: tuple[Any, Any, Any], share_prefix: bool, pairs: int, device: str, clips: int = 4,
          asked: int = 4, audio_s: float = 10.0, half: bool = False) -> dict:  # fmt: skip
    """Both ways to train on `clips` clips with `asked` questions each, from samples and words to changed weights."""
    from pcgjax.audio_llm import model as llm
    from pcgjax.audio_llm import questions as mc
    from pcgjax.bench.timing import paired

    model, processor, optimizer = made
    rng = np.random.default_rng(0)
    heard = [0.1 * rng.standard_normal(round(audio_s * RATE_HZ)).astype(np.float32) for _ in range(clips)]
    labels = {"murmur_status": "Present", "murmur_audible": "1", "systolic_pitch": "Low", "systolic_shape": "Plateau",
              "systolic_timing": "Holosystolic", "systolic_grading": "I/VI", "systolic_quality": "Harsh"}  # fmt: skip
    rows = [{"id": str(i), "person": str(i), "database": "", "labels": labels} for i in range(clips)]
    drawn = [mc.questions([row], [0])[:asked] for row in rows]
    own = [[(q.text, q.answer) for q in of] for of in drawn]
    flat = [(heard[i], q) for i, of in enumerate(drawn) for q in of]
    content = lambda q: [{"type": "audio", "audio_url": ""}, {"type": "text", "text": q.text}]
    chats = [[{"role": "user", "content": content(q)}] for _, q in flat]
    letters = [mc.LETTERS[q.answer] for _, q in flat]
    answerer = llm.Answerer(model)
    losses: dict[str, float] = {}

    def ours() -> None:
        losses["ours"] = our_step(answerer, processor, optimizer, heard, own, share_prefix, device, half)

    def plain() -> None:
        losses["plain"] = plain_step(model, processor, optimizer, [clip for clip, _ in flat], chats, letters, half)

    found = paired(ours, plain, pairs, f"a step of {clips} clips of {audio_s:g} s, {asked} questions each")
    memory = {"ours": _peak_gib(ours), "plain": _peak_gib(plain)} if device == "cuda" else None
    tokens = [llm.tokens_of(processor, text) for of in own for text, _ in of]
    prompt = tokens[0].index(processor.audio_token_id)
    return found | {
        "prompt_tokens": prompt, "question_tokens": [len(ids) - prompt - 1 for ids in tokens],
        "peak_memory_gib": memory,
        "samples": len(flat), "audio_s": audio_s, "ours_samples_a_s": len(flat) / found["ours_s"],
        "plain_samples_a_s": len(flat) / found["peer_s"], "losses": losses,
    }  # fmt: skip


def full_size(config: Any, tiny: pathlib.Path, pairs: int, device: str) -> dict:
    """`_step` with a model of this configuration and random weights in bfloat16, LoRA in float32 and products in
    bfloat16 as in training; FLOP/s achieved, peak memory. The words are the tiny model's."""
    import peft
    import torch
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    processor = AutoProcessor.from_pretrained(tiny)
    processor.tokenizer.padding_side = "left"
    config.audio_token_index, config._attn_implementation = processor.audio_token_id, "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            base: Any = Qwen2AudioForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[*TARGETS, "multi_modal_projector.linear"])
    model = peft.get_peft_model(base, lora).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    found = _step((model, processor, optimizer), True, pairs, device, half=True)
    # A clip has a quarter of the step's questions.
    words = (config, found["audio_s"], found["prompt_tokens"], found["question_tokens"][:4], RANK)
    for name, flops in (("ours", our_flops(*words)), ("plain", plain_flops(*words))):
        found[f"{name}_tflop_a_s"] = total(flops) / 1e12 * found[f"{name}_samples_a_s"]
    if device == "cuda":
        size = 8192
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16)

        def matmul() -> None:
            for _ in range(20):
                a @ a
            torch.cuda.synchronize()

        matmul()
        began = time.perf_counter()
        matmul()
        found["matmul_tflop_a_s"] = 20 * 2 * size**3 / (time.perf_counter() - began) / 1e12
    return found


def _peak_gib(run: Any) -> float:
    """The GPU's memory at most while this runs, the model's included."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**30


def _row(config: Any, audio_s: float, asked: int) -> dict:
    arguments = (config, audio_s, PROMPT_TOKENS, asked * [QUESTION_TOKENS], RANK)
    ours, plain = our_flops(*arguments), plain_flops(*arguments)
    needed, usual = total(ours), total(plain)
    return {
        "audio_s": audio_s, "questions_a_clip": asked, "prompt_tokens": PROMPT_TOKENS,
        "question_tokens": QUESTION_TOKENS, "ours": ours, "plain": plain, "ours_tflop": needed / 1e12,
        "plain_tflop": usual / 1e12, "ratio": usual / needed,
        "estimates": {
            name: {
                "peak_flop_a_s": peak, "share_of_peak": SHARE_OF_PEAK, "floor_ms": needed / peak * 1e3,
                "ours_samples_a_s": SHARE_OF_PEAK * peak / needed, "plain_samples_a_s": SHARE_OF_PEAK * peak / usual,
            }
            for name, peak in GPUS.items()
        },
    }  # fmt: skip


def audio_llm_summary(result: dict) -> str:
    """The main figures, for a terminal."""
    found = result["published"]
    count, rank = found["parameters"], found["rank"]
    lines = [
        f"the published model: {count['total']:,} parameters (audio tower {count['audio_tower']:,}, projector "
        f"{count['projector']:,}, LLM {count['llm']:,}), LoRA of rank {rank} on all three"
    ]
    for row in found["rows"]:
        plain = row["plain"]
        lines += [
            f"{row['audio_s']:.0f} s, {row['questions_a_clip']} questions a clip   TFLOP a sample, by formula: ours "
            f"{row['ours_tflop']:.1f}, plain {row['plain_tflop']:.1f} ({row['ratio']:.2f}x; its audio tower "
            f"{100 * total(plain, 'audio_tower') / total(plain):.0f} %)",
            *(
                f"    {name:9s} estimate, not measured: floor {e['floor_ms']:.1f} ms a sample; at "
                f"{100 * e['share_of_peak']:.0f} % of peak ours {e['ours_samples_a_s']:.1f} samples/s, plain "
                f"{e['plain_samples_a_s']:.1f}"
                for name, e in row["estimates"].items()
            ),
        ]
    for name, what in (("share_prefix", "tiny model"), ("separate", "tiny model, a sequence a question")):
        lines.append(_told(what, result["step"][name]))
    if "full_size" in result:
        own = result["full_size"]
        lines.append(_told("published size", own))
        rate, memory = own["matmul_tflop_a_s"], own["peak_memory_gib"]
        lines.append(f"    a matrix product here {rate:.0f} TFLOP/s")
        for name in ("ours", "plain"):
            reached = own[f"{name}_tflop_a_s"]
            lines.append(
                f"    {name:6s} {reached:.0f} TFLOP/s by formula, {100 * reached / rate:.0f} % of that; peak memory "
                f"{memory[name]:.0f} GiB"
            )
    return "\n".join(lines)


def _told(what: str, found: dict) -> str:
    low, high = found["ratio_range"]
    ours, plain = found["ours_samples_a_s"], found["plain_samples_a_s"]
    return (
        f"a step with the {what}, {found['samples']} samples of {found['audio_s']:g} s: {found['ratio']:.1f}x the "
        f"plain recipe  [{low:.1f}, {high:.1f}]  ({ours:.1f} and {plain:.1f} samples/s)"
    )
