"""The CNN with the H-infinity LSTM, trained in two stages as published.

    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=data/cinc2016_2k --sample_rate_hz=2000
    python -m pcgjax.train --config=configs/hinf_lstm.py --workdir=runs/hinf --config.data.prepared=data/cinc2016_2k

First the CNN with a plain LSTM, in WORKDIR/cnn_lstm; then its CNN, frozen, with the H-infinity LSTM, in WORKDIR.
:small is the public code's net, one convolution a block; :ablation is for pcgjax.ablation.

Machine: a GPU; not measured there. On 2 CPU cores 12 of the 50 epochs, and :ablation.
Time: some 7 minutes for 12 epochs a stage (--config.train.epochs=12 --config.sapt.interval=4), killed and started again
  twice on the way; :ablation 12 minutes; :small not measured.
Score: 12 epochs, held-out patients of CinC 2016: AUC .678 [.552, .818], mean over databases .483; the CNN-LSTM before
  it .686, .568; knowing the database alone: .723. :ablation, held-out patients, ten seeds: AUC .799 to .810, MAcc .694
  to .727; database alone: MAcc .700.
"""

import ml_collections

from pcgjax.runs.base_config import log_mel_classifier, with_sweep


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "small", "ablation"):
        raise ValueError(f"configs/hinf_lstm.py:{variant}: the variants are :small and :ablation")
    config = log_mel_classifier("hinf_lstm")
    config.features.n_fft, config.features.hop = 2048, 512
    config.model.cell = "convex"  # of the final stage: lstm, convex or forget
    config.model.blocks = ((32,), (64,)) if variant == "small" else ((32, 32), (64, 64))
    config.model.hidden = 128
    config.model.dropout = 0.3
    config.model.implementation = "auto"  # of the recurrent layer: auto, xla, pallas, cudnn, reference
    config.loss.name = "pwl"
    config.sapt.interval = 10
    config.stages.cnn_lstm = {"model": {"cell": "lstm"}}
    config.stages.hinf_lstm = {"optimizer": {"frozen": ("cnn",)}}
    if variant == "ablation":
        # A hundred trainings a setting are to take minutes on a CPU: half the bands, an eighth of the published net's
        # work, two clips a recording. Ten epochs instead of fifty: the threshold still moves five times.
        config.features.n_mels = 64
        config.model.blocks, config.model.hidden = ((16,), (32,)), 64
        config.sapt.interval = 2
        config.stages = ml_collections.ConfigDict()
        config.ablation = ml_collections.ConfigDict()
        config.ablation.settings = ("synthetic", "person", "leave_database_out")
        config.ablation.seeds = 10
        config.ablation.epochs = (8, 10)  # of the CNN-LSTM, whose CNN all arms share; of each arm's recurrent layer
        config.ablation.clips_per_recording = 2  # the first ones
        config.ablation.batch_clips = 32
        config.ablation.snrs_db = (float("inf"), 10.0, 0.0)  # of the synthetic settings, as features.noise_snr_db
        config.ablation.synthetic_people = 120  # two recordings each
    return with_sweep(config)
