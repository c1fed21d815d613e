"""Suite `audio_llm`: what the published model needs for a sample, and the usual recipe as the peer.

FLOPs of the published model are counted by formula (`audio_llm_flops`, which says what the two ways of training are);
a training step is measured with a tiny model, and where there is a GPU with one of the published size.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from pcgjax.audio_llm import questions as multiple_choice
from pcgjax.bench.audio_llm_flops import our_flops, parameters, plain_flops, published_config, total
from pcgjax.bench.timing import paired, ratio_text, seconds

RATE_HZ = 16000
# Dense bfloat16 with float32 sums, from the makers' data sheets, in FLOP/s.
GPUS = {"H200 SXM": 989e12, "H100 SXM": 989e12, "L40S": 362e12, "A100": 312e12}
SHARE_OF_PEAK = 0.4
# Tokens of a sample: system prompt and the words around the audio; a question with six options and its end.
PROMPT_TOKENS, QUESTION_TOKENS = 21, 90
RANK = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")


def audio_llm_suite(pairs: int = 5) -> dict:
    """{published: parameters and rows of FLOPs and estimated rates, one for a clip's length and questions a clip;
    step: ours against the plain recipe with the tiny model; full_size: the same with the published model's size and
    random weights where there is a GPU}."""
    import torch

    from pcgjax.audio_llm.make_tiny import make_tiny

    config = published_config()
    rows = [_row(config, audio_s, questions) for audio_s in (10.0, 30.0) for questions in (1, 4)]
    result = {"published": {"parameters": parameters(config), "rank": RANK, "rows": rows}}
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_tiny(pathlib.Path(folder) / "tiny")
        steps = {"share_prefix": True, "separate": False}
        result["step"] = {name: _step(plain_model(tiny), shared, pairs, "cpu") for name, shared in steps.items()}
        if torch.cuda.is_available():
            result["full_size"] = full_size(config, tiny, pairs, "cuda")
    return result


def audio_llm_summary(result: dict) -> str:
    """The main figures for a terminal."""
    published = result["published"]
    count, rank = published["parameters"], published["rank"]
    lines = [
        f"the published model: {count['total']:,} parameters (audio tower {count['audio_tower']:,}, projector "
        f"{count['projector']:,}, LLM {count['llm']:,}), LoRA of rank {rank} on all three"
    ]
    for row in published["rows"]:
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
        lines.append(_step_line(what, result["step"][name]))
    if "full_size" in result:
        full = result["full_size"]
        lines.append(_step_line("published size", full))
        rate, memory = full["matmul_tflop_a_s"], full["peak_memory_gib"]
        lines.append(f"    a matrix product here {rate:.0f} TFLOP/s")
        for name in ("ours", "plain"):
            reached = full[f"{name}_tflop_a_s"]
            lines.append(
                f"    {name:6s} {reached:.0f} TFLOP/s by formula, {100 * reached / rate:.0f} % of that; peak memory "
                f"{memory[name]:.0f} GiB"
            )
    return "\n".join(lines)


def _step_line(what: str, step: dict) -> str:
    ours, plain = step["ours_samples_a_s"], step["plain_samples_a_s"]
    return (
        f"a step with the {what}, {step['samples']} samples of {step['audio_s']:g} s: "
        f"{ratio_text(step['ratio'], step['ratio_range'], 'the plain recipe', 1)}  ({ours:.1f} and {plain:.1f} "
        "samples/s)"
    )


def our_step(answerer: Any, processor: Any, optimizer: Any, clips: Sequence[np.ndarray],
             questions: Sequence[Sequence[tuple[str, int]]], share_prefix: bool, device: str,
             half: bool = False) -> float:  # fmt: skip
    """The same step as `plain_step`'s, by the fast pass; questions: (text, right option) of each clip."""
    import torch

    from pcgjax.audio_llm import model as llm

    letters = llm.letter_ids(processor)
    mels = [llm.mel_of_clip(processor.feature_extractor, clip) for clip in clips]
    tokens = [[(llm.tokens_of(processor, text), letters[right]) for text, right in of_clip] for of_clip in questions]
    batch = llm.make_batch(
        mels, [len(clip) for clip in clips], tokens, processor.audio_token_id, processor.tokenizer.pad_token_id,
        share_prefix,
    ).to(device)  # fmt: skip
    with torch.autocast(device, torch.bfloat16, enabled=half):
        logits = answerer(batch)
    loss = torch.nn.functional.cross_entropy(logits, batch.letters_Q)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _step(recipe: tuple[Any, Any, Any], share_prefix: bool, pairs: int, device: str, clips: int = 4,
          questions: int = 4, audio_s: float = 10.0, half: bool = False) -> dict:  # fmt: skip
    """Both ways to train on `clips` clips with `questions` each, from samples and words to changed weights.

    recipe: as of `plain_model`.
    """
    from pcgjax.audio_llm import model as llm

    model, processor, optimizer = recipe
    rng = np.random.default_rng(0)
    samples = [0.1 * rng.standard_normal(round(audio_s * RATE_HZ)).astype(np.float32) for _ in range(clips)]
    labels = {"murmur_status": "Present", "murmur_audible": "1", "systolic_pitch": "Low", "systolic_shape": "Plateau",
              "systolic_timing": "Holosystolic", "systolic_grading": "I/VI", "systolic_quality": "Harsh"}  # fmt: skip
    rows = [{"id": str(i), "person": str(i), "database": "", "labels": labels} for i in range(clips)]
    drawn = [multiple_choice.questions([row], [0])[:questions] for row in rows]
    of_clips = [[(q.text, q.answer) for q in of_clip] for of_clip in drawn]
    flat = [(samples[i], q) for i, of_clip in enumerate(drawn) for q in of_clip]
    chats = [[{"role": "user", "content": [{"type": "audio", "audio_url": ""}, {"type": "text", "text": q.text}]}]
             for _, q in flat]  # fmt: skip
    letters = [multiple_choice.LETTERS[q.answer] for _, q in flat]
    answerer = llm.Answerer(model)
    losses: dict[str, float] = {}

    def ours() -> None:
        losses["ours"] = our_step(answerer, processor, optimizer, samples, of_clips, share_prefix, device, half)

    def plain() -> None:
        losses["plain"] = plain_step(model, processor, optimizer, [clip for clip, _ in flat], chats, letters, half)

    times = paired(ours, plain, pairs, f"a step of {clips} clips of {audio_s:g} s, {questions} questions each")
    memory = {"ours": _peak_gib(ours), "plain": _peak_gib(plain)} if device == "cuda" else None
    tokens = [llm.tokens_of(processor, text) for of_clip in of_clips for text, _ in of_clip]
    prompt = tokens[0].index(processor.audio_token_id)
    return times | {
        "prompt_tokens": prompt, "question_tokens": [len(ids) - prompt - 1 for ids in tokens],
        "peak_memory_gib": memory,
        "samples": len(flat), "audio_s": audio_s, "ours_samples_a_s": len(flat) / times["ours_s"],
        "plain_samples_a_s": len(flat) / times["peer_s"], "losses": losses,
    }  # fmt: skip


def full_size(config: Any, tiny: pathlib.Path, pairs: int, device: str) -> dict:
    """`_step` with a model of this configuration and random weights in bfloat16, LoRA in float32 and products in
    bfloat16 as in training; FLOP/s achieved, peak memory. The words are the tiny model's."""
    import torch
    from transformers import Qwen2AudioForConditionalGeneration

    processor = _processor(tiny)
    config.audio_token_index, config._attn_implementation = processor.audio_token_id, "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            base: Any = Qwen2AudioForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model, optimizer = _with_lora(base)
    result = _step((model, processor, optimizer), True, pairs, device, half=True)
    # A clip has a quarter of the step's questions.
    sizes = (config, result["audio_s"], result["prompt_tokens"], result["question_tokens"][:4], RANK)
    for name, flops in (("ours", our_flops(*sizes)), ("plain", plain_flops(*sizes))):
        result[f"{name}_tflop_a_s"] = total(flops) / 1e12 * result[f"{name}_samples_a_s"]
    if device == "cuda":
        size = 8192
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16)

        def matmul() -> None:
            for _ in range(20):
                a @ a
            torch.cuda.synchronize()

        matmul()
        result["matmul_tflop_a_s"] = 20 * 2 * size**3 / seconds(matmul) / 1e12
    return result


def _peak_gib(run: Any) -> float:
    """The GPU's memory at most while this runs, the model's included."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**30


def _row(config: Any, audio_s: float, questions: int) -> dict:
    arguments = (config, audio_s, PROMPT_TOKENS, questions * [QUESTION_TOKENS], RANK)
    ours, plain = our_flops(*arguments), plain_flops(*arguments)
    needed, usual = total(ours), total(plain)
    return {
        "audio_s": audio_s, "questions_a_clip": questions, "prompt_tokens": PROMPT_TOKENS,
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


def plain_model(folder: str | pathlib.Path, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any, Any]:
    """(model with LoRA, processor, AdamW) as the libraries' guides set them up: `from_pretrained`, `get_peft_model`."""
    import torch
    from transformers import Qwen2AudioForConditionalGeneration

    model: Any = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    model, optimizer = _with_lora(model.to(device))
    return model, _processor(folder), optimizer


def _with_lora(model: Any) -> tuple[Any, Any]:
    """(the model in training mode with LoRA at TARGETS and the projector, AdamW of what is trained)."""
    import peft
    import torch

    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[*TARGETS, "multi_modal_projector.linear"])
    model = peft.get_peft_model(model, lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    return model.train(), optimizer


def _processor(folder: str | pathlib.Path) -> Any:
    """The folder's processor, padding on the left."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    return processor


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
