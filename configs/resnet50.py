"""ResNet-50 on log-mel clips, a baseline of the H-infinity LSTM paper (its table II: F1 89.68, accuracy 88.94).

    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=data/cinc2016_2k --sample_rate_hz=2000
    python -m pcgjax.train --config=configs/resnet50.py --workdir=runs/resnet50 --config.data.prepared=data/cinc2016_2k

The paper trained for 50 epochs with Adam at 0.001, and says neither how it made the pictures nor from what weights.
Here: Adam at 0.0003; the clips of configs/hinf_lstm.py, 128 bands by 251 frames of 20 ms; random weights, or with
--config.model.checkpoint=FILE those of torchvision's resnet50 (a .pth, or timm's resnet50 as .safetensors).

Machine: a GPU: 23.5 million parameters.
Time: not measured.
Score: not measured; a smaller net after 2 epochs (pcgjax.reproduce --budget=small): AUC .780 [.65, .90].
"""

import ml_collections

from pcgjax.runs.base_config import log_mel_classifier, with_sweep


def get_config() -> ml_collections.ConfigDict:
    config = log_mel_classifier("image")
    config.model.name = "resnet"  # resnet, mobilenet_v3, vit
    config.model.width = 64  # channels after the stem
    config.model.blocks = (3, 4, 6, 3)  # in each stage; model.dropout: before the head
    config.model.checkpoint = ""  # a file of ImageNet weights to start from; "": random
    config.optimizer.learning_rate = 0.0003
    return with_sweep(config)
