"""Self-supervised pre-training of SSAMBA on heart sounds, labelled or not.

    python -m pcgjax.prepare --dataset=folder --source=DIR --out=data/own_16k --sample_rate_hz=16000
    python -m pcgjax.train --config=configs/ssamba_pretrain.py --workdir=runs/ssamba \
        --config.data.prepared=data/own_16k

`folder` takes any tree of .wav and .flac files; the other data sets serve as well, and several folders may be named
with commas between. WORKDIR/ssamba.pth, in the layout of the public code's checkpoints, is what configs/segmenter.py
and the public code start from.

Machine: a GPU. On 2 CPU cores the training step of `python -m pcgjax.bench --suite=ssamba` takes 3.4 s.
Time, Score: not measured.
"""

import ml_collections

from pcgjax.runs.base_config import base, with_sweep


def get_config() -> ml_collections.ConfigDict:
    config = base("ssamba_pretrain")
    config.split.fractions = (0.7, 0.1, 0.2)
    config.task.target = ""
    config.features.window_s = 10.24
    config.model.checkpoint = ""  # a .pth to start from
    config.model.update(width=192, depth=24)  # width 192: tiny; small 384, base 768
    config.model.mask_patches = 400  # of the 512 of a window, as published
    config.model.remat = True  # each pair of layers computed again in the backward pass: less memory
    config.model.implementation = "auto"  # of the selective scan: auto, xla, pallas, associative, reference
    config.optimizer.update(name="adamw", learning_rate=0.0003, schedule="cosine", warmup_steps=50)
    config.optimizer.update(weight_decay=0.01, clip_norm=1.0)
    config.train.epochs = 12
    config.train.select = "loss"  # or accuracy, of telling masked patches apart
    return with_sweep(config)
