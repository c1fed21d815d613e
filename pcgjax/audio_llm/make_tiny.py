"""A tiny random Qwen2-Audio as a local folder, read by the same `from_pretrained` as the published model.

    python -m pcgjax.audio_llm.make_tiny --out=DIR [--seed=0] [--legacy]

It has every part that the published folder has (audio tower, projector, LLM, byte-level BPE, feature extractor, chat
template), a few hundred thousand parameters, and no knowledge: for tests, and for trying a training run on a CPU.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

from absl import flags

from pcgjax.audio_llm.questions import OTHERS, TASKS
from pcgjax.runtime import files

# In the published order, at the end of the vocabulary.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
# Of the random weights: 1 / sqrt(width), so that a layer's output is about as large as its input. The usual 0.02 is
# made for widths of thousands; with it LoRA learnt later to answer with the letter of a shuffled option.
DEVIATION = 0.125
MARKER = "make_tiny.json"  # a folder that holds it may be replaced


def make_tiny(out: str | pathlib.Path, seed: int = 0, legacy: bool = False) -> pathlib.Path:
    """Writes the folder `out`, whole or not at all, and returns it; the same seed gives the same bytes.

    Args:
      out: replaced if an earlier call wrote it.
      legacy: in the layout of the published checkpoint, older than the one transformers 5 has in memory: weights
        without the `model.` prefix, `preprocessor_config.json`, `chat_template.json`. Loads to the same weights.

    Raises:
      ValueError: `out` is a file, or a folder with something else in it.
    """
    out = pathlib.Path(out)
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already and was not written by make_tiny; give --out another, empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as parent:
        folder = pathlib.Path(parent) / "new"
        folder.mkdir()
        processor = _processor()
        _save_processor(processor, folder, legacy)
        _save_model(processor.tokenizer, folder, seed, legacy)
        (folder / MARKER).write_text(json.dumps({"seed": seed, "legacy": legacy}) + "\n")
        if out.exists():
            out.rename(pathlib.Path(parent) / "old")
        folder.rename(out)
    return out


def _processor() -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2AudioProcessor, Qwen2Tokenizer, WhisperFeatureExtractor
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])  # type: ignore[assignment]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(_text(), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    vocabulary = model["vocab"] | {token: len(model["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]), padding_side="left", model_max_length=8192,
    )  # fmt: skip
    extractor = WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16000, hop_length=160, chunk_length=30, n_fft=400, return_attention_mask=True
    )
    return Qwen2AudioProcessor(extractor, tokenizer)


def _text() -> list[str]:
    """What the tokenizer learns its merges from: each word of our questions becomes a token, as most words are in the
    published vocabulary, so that the sequences are about as long."""
    options = {option for task in TASKS.values() for option in task.classes}.union(*OTHERS.values())
    return [
        *(phrasing for task in TASKS.values() for phrasing in task.phrasings),
        *(f"A. {option}\n" for option in sorted(options)),
        "Answer with one letter: A, B, C, D, E or F.",
        "system\nYou are a helpful assistant.", "user\nAudio 1: ", "assistant\n",
    ]  # fmt: skip


def _save_processor(processor: Any, folder: pathlib.Path, legacy: bool) -> None:
    if not legacy:
        processor.save_pretrained(folder)
        return
    processor.tokenizer.save_pretrained(folder)
    _edit(folder / "tokenizer_config.json", lambda c: c | {"additional_special_tokens": c.pop("extra_special_tokens")})
    processor.feature_extractor.save_pretrained(folder)
    _edit(folder / "preprocessor_config.json", lambda c: c | {"processor_class": "Qwen2AudioProcessor"})
    _write(folder / "chat_template.json", {"chat_template": processor.chat_template})


def _save_model(tokenizer: Any, folder: pathlib.Path, seed: int, legacy: bool) -> None:
    import torch
    from transformers import GenerationConfig, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration
    from transformers.models.whisper.modeling_whisper import sinusoids

    end_of_text, end_of_turn, audio = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|AUDIO|>"])
    config = Qwen2AudioConfig(
        audio_config={
            # Deep and strongly weighted: the mean over time of what such a random encoder says tells better when a
            # murmur is heard (docs/measured/audio_llm.md).
            "model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "max_source_positions": 1500, "d_model": 64,
            "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 256,
            "initializer_range": 2 * DEVIATION,
        },
        text_config={
            # As in the published model, the embedding has more rows than the tokenizer has tokens.
            "model_type": "qwen2", "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 64,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 172,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
            "initializer_range": DEVIATION, "bos_token_id": end_of_text, "eos_token_id": end_of_turn,
            "pad_token_id": end_of_text,
        },
        audio_token_index=audio,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2AudioForConditionalGeneration(config)
    # LoRA leaves these frozen: at 0.02 the logits could not get far enough apart to answer, nor the audio reach them.
    with torch.no_grad():
        for name in ("lm_head", "model.multi_modal_projector.linear", "model.language_model.embed_tokens"):
            model.get_parameter(f"{name}.weight").mul_(10 * 0.02 / DEVIATION)
        # As the published ones, Whisper's; never trained, so random ones would hardly say when something is heard.
        positions = model.get_parameter("model.audio_tower.embed_positions.weight")
        positions.copy_(sinusoids(*positions.shape))
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, pad_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text]
    )
    model.save_pretrained(folder, save_original_format=legacy)
    if legacy:
        _edit(folder / "config.json", _legacy_config)


def _legacy_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with the keys that the published `config.json` has, written by transformers 4.38."""
    text = {key: value for key, value in config["text_config"].items() if key not in ("rope_parameters", "layer_types")}
    return {key: value for key, value in config.items() if key not in ("dtype", "transformers_version")} | {
        "text_config": text | {"rope_theta": config["text_config"]["rope_parameters"]["rope_theta"]},
        "ignore_index": -100,
        "torch_dtype": config["dtype"],
        "transformers_version": "4.38.1",
        "vocab_size": text["vocab_size"],
    }


def _edit(path: pathlib.Path, change: Any) -> None:
    _write(path, change(json.loads(path.read_text())))


def _write(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def main(argv: list[str]) -> None:
    folder = make_tiny(FLAGS.out, FLAGS.seed, FLAGS.legacy)
    print(f"wrote {folder}: a tiny random Qwen2-Audio")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The folder to write.", required=True)
    flags.DEFINE_integer("seed", 0, "Of the random weights.", 0, 2**31 - 1)
    flags.DEFINE_bool("legacy", False, "In the older layout, that of the published checkpoint.")
    files.run(main)
