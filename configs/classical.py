"""Shannon energy, Burg spectrum and four classifiers, as published on PASCAL B.

    python -m pcgjax.prepare --dataset=pascal --source=DIR --out=data/pascal --sample_rate_hz=2000
    python -m pcgjax.train --config=configs/classical.py --workdir=runs/classical --config.data.prepared=data/pascal

trains the four on a split by person, and repeats the paper's experiment, by recording as published and by person:
report.html sets both beside the paper's table. Of another data set all recordings are taken;
--config.experiment.runs=0 leaves the paper's experiment out.

Machine: 2 CPU cores.
Time: under a minute for 195 clean clips of PASCAL B.
Score: by person, mean of ten runs, from kNN to logistic regression: AUC .761 to .879, accuracy .812 to .867; always
  "normal": .5, .759.
"""

import ml_collections

from pcgjax.runs.base_config import common


def get_config() -> ml_collections.ConfigDict:
    config = common("classical")
    config.data.database = ""  # the only one to take; "": pascal-b where the folder has it, else all
    config.data.noisy = False  # take clips that PASCAL marks as noisy too
    config.split.fractions = (0.55, 0.15, 0.30)
    config.task.target = "auto"  # murmur, abnormal, or auto: murmur where the data set says it, else abnormal
    config.features = ml_collections.ConfigDict()
    config.features.high_hz = 100.0  # low-pass before the envelope
    config.features.filter_order = 4
    config.features.window_s = 0.02  # of the averaged Shannon energy
    config.features.hop_s = 0.01
    config.features.threshold = float("inf")  # of the standardised envelope; inf: automatic
    config.features.burg_order = 10
    config.features.nfft = 512
    config.features.decibels = False  # power a Hz, as published; True: in dB
    config.model = ml_collections.ConfigDict()
    config.model.neighbours = 5  # of kNN
    config.model.svm_tolerance, config.model.svm_degree = 0.002, 3
    config.model.hidden, config.model.mlp_regularisation = 150, 0.5
    config.model.logistic_c = 1.30
    config.train.epochs = 5000  # iterations of the MLP at most
    config.train.batch_recordings = 16  # whose envelopes are computed at once
    config.train.select = "auc"  # the validation metric whose best classifier is kept
    config.evaluation.threshold = 0.5
    config.experiment = ml_collections.ConfigDict()
    config.experiment.runs = 10  # of each classifier, set and protocol; 0: none
    config.experiment.test_share = 0.3
    return config  # parallel.* as in the other configs; four small classifiers are fitted on the host
