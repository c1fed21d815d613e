"""Wav2Vec2 on raw audio, fine-tuned: a baseline of the H-infinity LSTM paper (F1 69.54 there).

    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=data/cinc2016_16k --sample_rate_hz=16000
    python -m pcgjax.train --config=configs/wav2vec2.py --workdir=runs/wav2vec2 \
        --config.data.prepared=data/cinc2016_16k --config.model.folder=DIR

model.folder is a local copy of facebook/wav2vec2-base, its weights as safetensors; without it the weights are random,
and that is another experiment. The paper trained for 50 epochs with Adam at 0.001; here it is 10 with AdamW, as such
models are fine-tuned. Needs pip install "pcgjax[audio-llm]".

Machine: a GPU: 94.4 million parameters.
Time: not measured.
Score: not measured; a tiny net of random weights after 2 epochs (pcgjax.reproduce --budget=small): AUC .710 [.60, .82].
"""

import ml_collections

from pcgjax.runs.base_config import raw_audio_encoder


def get_config() -> ml_collections.ConfigDict:
    return raw_audio_encoder("wav2vec2")
