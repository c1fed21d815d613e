"""The small heart-sound segmenter: S1, systole, S2 and diastole in frames of 20 ms.

    python -m pcgjax.prepare --dataset=circor --source=DIR --out=data/circor_2k --sample_rate_hz=2000
    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=data/cinc2016_2k --sample_rate_hz=2000
    python -m pcgjax.train --config=configs/segmenter_small.py --workdir=runs/segmenter_small \
        --config.data.prepared=data/circor_2k,data/cinc2016_2k

:causal hears the past only, and can be streamed.

Machine: 2 CPU cores; a GPU: not measured.
Time: 46 CPU minutes, 63 by the clock beside another training of the same size; :causal not measured.
Score: held-out patients of both, 250 recordings: onset F1 (60 ms) .968 [.954, .980], frames right .930 [.918, .941]; a
  metronome at the right rate: .205, .344. :causal not measured.
"""

import ml_collections

from pcgjax.runs.base_config import base, with_sweep


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "causal"):
        raise ValueError(f"configs/segmenter_small.py:{variant}: the only variant is configs/segmenter_small.py:causal")
    config = base("segmenter")
    config.data.train_share = 1.0  # of the people to train on; the SSAMBA paper's segmenter: 1 / 3
    config.split.fractions = (0.8, 0.05, 0.15)
    config.task.target = ""
    config.task.frames = "states"  # or sounds, cycle, annotated: what each frame is asked
    config.features.window_s, config.features.step_s = 10.0, 0.02
    config.features.n_fft, config.features.n_mels = 128, 32
    config.features.low_hz, config.features.high_hz = 20.0, 1000.0
    config.features.noise_snr_db = float("inf")  # white noise added first; inf: none
    config.features.masked_bands = 6  # in training: up to so many neighbouring mel bands are hidden
    config.features.response_db = 6.0  # in training: deviation of a random frequency response
    config.features.noise = True  # in training: noise at random levels too
    config.features.stretch = 0.15  # in training: windows are made slower or faster by up to that share
    config.model.name = "frames"
    config.model.update(width=96, depth=4, d_state=8, expand=2, dropout=0.1)
    config.model.bidirectional = variant != "causal"
    config.model.implementation = "auto"  # of the selective scan: auto, xla, pallas, associative, reference
    config.optimizer.update(name="adamw", learning_rate=0.003, schedule="cosine", warmup_steps=50)
    config.optimizer.update(weight_decay=0.01, clip_norm=1.0)
    config.train.epochs, config.train.select = 16, "accuracy"
    config.evaluation.shortest_on_s = 0.04  # of a binary target: shorter spans are dropped,
    config.evaluation.shortest_off_s = 0.04  # and shorter gaps closed before
    return with_sweep(config)
