"""The models of configs/ that suite `scale` measures, and the layouts of devices and processes it measures them on."""

from __future__ import annotations

from typing import Any, NamedTuple

EIGHT = 8  # devices, and recordings a step
ONE = "1 device"
# layout -> (devices of a process, processes, what differs in the config)
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    ONE: (1, 1, {}),
    "8 devices, data": (EIGHT, 1, {}),
    "8 devices, fsdp": (EIGHT, 1, {"parallel.fsdp": EIGHT}),
    "8 devices, data 2 x fsdp 4": (EIGHT, 1, {"parallel.fsdp": 4}),
    "8 devices, pmap": (EIGHT, 1, {"parallel.strategy": "pmap"}),
    "2 processes, data": (1, 2, {}),
    "2 processes, pmap": (1, 2, {"parallel.strategy": "pmap"}),
}


class Model(NamedTuple):
    """How a model of configs/ is measured. Its recordings are equally long: one shape is compiled."""

    rate_hz: int
    duration_s: float
    steps: int  # of 8 recordings, compared between layouts
    batch: int  # a member's recordings a step, in a population
    member_steps: int  # of a population, measured as one
    # What a step draws goes by its groups of recordings: as many groups in all layouts then draw the same.
    same_groups: bool
    gpu_duration_s: float
    changes: dict[str, Any]
    short: dict[str, Any]  # and except on a GPU
    tiny: dict[str, Any]  # and with --quick


MODELS = {
    "cnn": Model(1000, 20.0, 4, 1, 24, False, 22.0, {}, {}, {"features.window_s": 0.5, "model.hidden": 8}),
    "hinf_lstm": Model(
        2000, 10.5, 3, 2, 2, False, 22.0, {}, {"model.dropout": 0.0},
        {"features.window_s": 1.0, "features.wavelet_level": 3, "features.n_fft": 128, "features.hop": 64,
         "features.n_mels": 16, "model.blocks": ((4,), (8,)), "model.hidden": 8},
    ),
    "segmenter_small": Model(
        2000, 10.5, 3, 2, 2, True, 10.5, {"optimizer.warmup_steps": 1}, {},
        {"features.window_s": 1.0, "model.width": 16, "model.depth": 1, "model.d_state": 2,
         "model.implementation": "reference"},
    ),
    # A quarter of the window: the parameters are but for the positions the same.
    "ssamba_pretrain": Model(
        16000, 2.7, 2, 1, 1, True, 10.5, {"optimizer.warmup_steps": 1},
        {"features.window_s": 2.56, "model.mask_patches": 100},
        {"features.window_s": 0.5, "model.width": 16, "model.depth": 2, "model.mask_patches": 8,
         "model.implementation": "reference"},
    ),
}  # fmt: skip
MOSTLY = (0.9, 0.05, 0.05)  # of people: train, validation, test
COMMON = {
    "data.pipeline": "resident", "split.kind": "person", "split.fractions": (0.8, 0.1, 0.1), "train.epochs": 4,
    "train.batch_recordings": 8,
}  # fmt: skip
