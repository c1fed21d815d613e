"""What each experiment trains: features + model + loss, a few lines each."""

from __future__ import annotations

import ml_collections

from pcgjax.tasks.base import Task
from pcgjax.tasks.clips import hinf_lstm, image
from pcgjax.tasks.cnn import cnn
from pcgjax.tasks.segmenter import segmenter
from pcgjax.tasks.ssamba_pretrain import ssamba_pretrain

TASKS = {"cnn": cnn, "hinf_lstm": hinf_lstm, "image": image, "segmenter": segmenter, "ssamba_pretrain": ssamba_pretrain}


def make(config: ml_collections.ConfigDict, sample_rate_hz: int) -> Task:
    """The task that `config.task.name` names, for data prepared at `sample_rate_hz`."""
    if config.task.name not in TASKS:
        raise ValueError(f"task.name={config.task.name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[config.task.name](config, sample_rate_hz)
