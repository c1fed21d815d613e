"""MobileNetV3-Large on log-mel clips, a baseline of the H-infinity LSTM paper (its table II: F1 81.36, accuracy 81.27).

    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=data/cinc2016_2k --sample_rate_hz=2000
    python -m pcgjax.train --config=configs/mobilenet_v3.py --workdir=runs/mobilenet_v3 \
        --config.data.prepared=data/cinc2016_2k

Settings and clips as of configs/resnet50.py; random weights, or with --config.model.checkpoint=FILE those of
torchvision's mobilenet_v3_large (a .pth, or the same names in a .safetensors).

Machine: a GPU: 4.2 million parameters.
Time: not measured.
Score: not measured; a narrower net after 2 epochs (pcgjax.reproduce --budget=small): AUC .448 [.39, .50].
"""

import ml_collections

from pcgjax.runs.base_config import log_mel_classifier, with_sweep


def get_config() -> ml_collections.ConfigDict:
    config = log_mel_classifier("image")
    config.model.name = "mobilenet_v3"  # resnet, mobilenet_v3, vit
    config.model.width = 1.0  # all channels are multiplied with it
    config.model.blocks = 15  # the first so many of the 15
    config.model.checkpoint = ""  # a file of ImageNet weights to start from; "": random
    config.model.dropout = 0.2  # before the head
    config.optimizer.learning_rate = 0.0003
    return with_sweep(config)
