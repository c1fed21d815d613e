"""What is reproduced: the papers, the budgets, and the folders of a command."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

PAPERS = ("classical", "cnn", "hinf_lstm", "audio_llm")
# What --budget=small changes in configs/, so that two CPU cores can do --paper=all (time: docs/measured/papers.md);
# --budget=full is configs/ as they are. Both of a paper's protocols get the same.
_TENTH = {"features.hop": 100, "features.n_mels": 64, "train.epochs": 2}
_ENCODER = {"model.size": "tiny", "train.epochs": 2, "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 20}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "classical": {},
    "cnn": {"train.epochs": 4},
    "hinf_lstm": {"features.n_mels": 64, "model.blocks": ((16,), (32,)), "model.hidden": 64, "train.epochs": 4,
                  "sapt.interval": 2},
    "resnet50": {**_TENTH, "model.width": 16, "model.blocks": (1, 1, 1, 1), "optimizer.learning_rate": 1e-3},
    "mobilenet_v3": {**_TENTH, "model.width": 0.5, "optimizer.learning_rate": 1e-3},
    "vit": {**_TENTH, "model.width": 64, "model.blocks": 4, "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 50},
    "wav2vec2": _ENCODER, "hubert": _ENCODER, "distilhubert": _ENCODER,
    "segmenter_small": {"model.width": 48},
    "audio_llm": {"train.epochs": 1, "data.clip_s": 5.0, "optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 5},
}  # fmt: skip
BUDGETS: dict[str, dict[str, dict[str, Any]]] = {"small": SMALL, "full": {}}
ENCODERS = ("wav2vec2", "hubert", "distilhubert")  # in PyTorch, at 16 kHz
CONFIGURATIONS = {"no_filter": "No filter", "no_filter_noise": "No filter, noise", "filter": "Filter",
                  "filter_noise": "Filter, noise"}  # fmt: skip
LLM_RUNS = {"ns": "N.S", "ws": "W.S"}


class Job(NamedTuple):
    """What the command was given: all stages work by it."""

    source: pathlib.Path
    out: pathlib.Path
    budget: str
    model: str  # the folder of an audio LLM; "": a tiny random one

    def prepared(self, dataset: str, rate_hz: int) -> pathlib.Path:
        """The folder of a data set's prepared recordings."""
        return self.out / "prepared" / f"{dataset}_{rate_hz}"

    def changes(self, config: str) -> dict[str, Any]:
        """What the budget changes in a config: {field: value}."""
        return BUDGETS[self.budget].get(config, {})

    def llm(self) -> str:
        """The folder of the audio LLM: the one given, or the tiny random one."""
        return self.model or str(self.out / "tiny_llm")

    def run(self, name: str) -> pathlib.Path:
        """The workdir of a training."""
        return self.out / "runs" / name


def stage_name(run: str) -> str:
    """The name of the stage that trains the run of this name."""
    return run.replace("/", "_")
