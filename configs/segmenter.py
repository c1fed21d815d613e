"""SSAMBA as a heart-sound segmenter: a token every 20 ms, fine-tuned from a checkpoint.

    python -m pcgjax.prepare --dataset=circor --source=DIR --out=data/circor_16k --sample_rate_hz=16000
    python -m pcgjax.train --config=configs/segmenter.py --workdir=runs/segmenter \
        --config.data.prepared=data/circor_16k --config.model.checkpoint=ssamba_tiny.pth

The checkpoint is SSAMBA's own, or the ssamba.pth of configs/ssamba_pretrain.py; without one it starts from random
weights. The paper asks `cycle` (or sounds) of a third of the training set: --config.task.frames=cycle
--config.data.train_share=0.333.

Machine: a GPU, for a window of 10 s is 4,000 tokens.
Time, Score: not measured.
"""

import ml_collections

from pcgjax.runs.base_config import base, with_sweep


def get_config() -> ml_collections.ConfigDict:
    config = base("segmenter")
    config.data.train_share = 1.0  # of the people to train on; the SSAMBA paper's segmenter: 1 / 3
    config.split.fractions = (0.7, 0.1, 0.2)
    config.task.target = ""
    config.task.frames = "states"  # or sounds, cycle, annotated: what each frame is asked
    config.features.window_s, config.features.step_s = 10.0, 0.02
    config.features.noise_snr_db = float("inf")  # white noise added first; inf: none
    config.features.masked_bands = 0  # in training: up to so many neighbouring mel bands are hidden
    config.features.response_db = 0.0  # in training: deviation of a random frequency response
    config.features.noise = False  # in training: noise at random levels too
    config.features.stretch = 0.0  # windows made slower or faster in training: not of SSAMBA
    config.model.checkpoint = ""  # a .pth to start from
    config.model.name = "ssamba"
    config.model.update(width=192, depth=24)  # width 192: tiny; small 384, base 768
    config.model.bidirectional = True
    config.model.remat = True  # each pair of layers computed again in the backward pass: less memory
    config.model.implementation = "auto"  # of the selective scan: auto, xla, pallas, associative, reference
    config.optimizer.update(name="adamw", learning_rate=0.0003, schedule="cosine", warmup_steps=50)
    config.optimizer.update(weight_decay=0.01, clip_norm=1.0)  # frozen=("encoder",): the head alone learns
    config.train.epochs, config.train.select = 12, "accuracy"
    config.evaluation.shortest_on_s = 0.04  # of a binary target: shorter spans are dropped,
    config.evaluation.shortest_off_s = 0.04  # and shorter gaps closed before
    return with_sweep(config)
