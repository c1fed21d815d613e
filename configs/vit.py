"""A vision transformer on log-mel clips, a baseline of the H-infinity LSTM paper (its table II: F1 84.23).

    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=data/cinc2016_2k --sample_rate_hz=2000
    python -m pcgjax.train --config=configs/vit.py --workdir=runs/vit --config.data.prepared=data/cinc2016_2k

The paper trained for 50 epochs with Adam at 0.001, and says neither which transformer it took, nor how it made the
pictures, nor from what weights. Here: AdamW at 0.0001 after a warm-up; ViT-S/16, which is as large as the ResNet-50
that it is compared with; ViT-B/16 is --config.model.width=768. The clips of configs/resnet50.py, so 8 x 16 patches;
random weights, or with --config.model.checkpoint=FILE those of timm's vit_small_patch16_224 or vit_base_patch16_224
(a .safetensors or .pth).

Machine: a GPU: 21.4 million parameters.
Time: not measured.
Score: not measured; a smaller net after 2 epochs (pcgjax.reproduce --budget=small): AUC .698 [.57, .82].
"""

import ml_collections

from pcgjax.runs.base_config import log_mel_classifier, with_sweep


def get_config() -> ml_collections.ConfigDict:
    config = log_mel_classifier("image")
    config.model.name = "vit"  # resnet, mobilenet_v3, vit
    config.model.width = 384  # of a token; a head has 64
    config.model.blocks = 12  # model.dropout: before the head
    config.model.checkpoint = ""  # a file of ImageNet weights to start from; "": random
    config.optimizer.update(name="adamw", learning_rate=0.0001, schedule="cosine", warmup_steps=200)
    config.optimizer.update(weight_decay=0.05, clip_norm=1.0)
    return with_sweep(config)
