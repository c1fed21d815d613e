"""The 1D CNN with the grouped BCE, as published: SGD, one recording a batch.

    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=data/cinc2016
    python -m pcgjax.train --config=configs/cnn.py --workdir=runs/cnn --config.data.prepared=data/cinc2016
    python -m pcgjax.train --config=configs/cnn.py:sweep --workdir=runs/cnn_sweep --config.data.prepared=data/cinc2016

:sweep trains the paper's four configurations, {no filter, filter} x {clean, white noise}, each in a folder of its own,
and sets them beside the paper's numbers in report.html and table.json.

Machine: 2 CPU cores; on a GPU, and with all 30 epochs: not measured.
Time: 10 epochs of CinC 2016 (1,066 recordings of a, b, d, e) 83 s, with the preparation; :sweep, 12 epochs each: 530 s
  on a busy machine.
Score: 10 epochs, held-out patients: AUC .631 [.542, .722], mean over databases .589; knowing the database alone: .723.
  :sweep, 12 epochs, an earlier state of the code: AUC .646 to .732. Simulated patients (launch/quickstart.sh): .993.
"""

import ml_collections

from pcgjax.runs.base_config import base, with_sweep

NOISE_SNR_DB = 10.0  # of the sweep's noisy half; the paper does not state it


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "sweep"):
        raise ValueError(f"configs/cnn.py:{variant}: the only variant is configs/cnn.py:sweep")
    config = base("cnn")
    config.features.window_s, config.features.overlap = 2.5, 0.5
    config.features.filter = "zero_phase"  # none, zero_phase, causal
    config.features.filter_order = 4
    config.features.low_hz, config.features.high_hz = 25.0, 400.0
    config.features.noise_snr_db = float("inf")  # white noise added before the filter; inf: none
    config.model.filters = (16, 32)
    config.model.kernel_size = 5
    config.model.hidden = 64
    config.optimizer.update(name="sgd", learning_rate=0.01)
    config.train.batch_recordings = 1
    if variant == "sweep":
        noise, no_filter, zero_phase = {"noise_snr_db": NOISE_SNR_DB}, {"filter": "none"}, {"filter": "zero_phase"}
        config.variants.no_filter = {"features": no_filter}
        config.variants.no_filter_noise = {"features": no_filter | noise}
        config.variants.filter = {"features": zero_phase}
        config.variants.filter_noise = {"features": zero_phase | noise}
    return with_sweep(config)
