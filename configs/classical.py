"""Shannon energy, Burg spectrum and four classifiers (BUILD_NOTES.md, "The classical chain"), as published on PASCAL B.

    python -m pcgjax.prepare --dataset=pascal --source=DIR --out=data/pascal --sample_rate_hz=2000
    python -m pcgjax.train --config=configs/classical.py --workdir=runs/classical --config.data.prepared=data/pascal

trains the four on a split by person, and repeats the paper's experiment, by recording as published and by person:
report.html sets both beside the paper's table. On a CPU, about two minutes. Scores, times: BUILD_NOTES.md.
Of another data set all recordings are taken; --config.experiment.runs=0 leaves the paper's experiment out.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.prepared = ""  # the folder that pcgjax.prepare wrote
    config.data.database = ""  # the only one to take; "": pascal-b where the folder has it, else all
    config.data.noisy = False  # take clips that PASCAL marks as noisy too
    config.data.shuffle_labels = False  # a control: people's labels dealt out anew, nothing can be learned

    config.split = ml_collections.ConfigDict()
    config.split.kind = "person"  # person, person_kfold, leave_database_out
    config.split.fractions = (0.55, 0.15, 0.30)  # of people: train, validation, test
    config.split.fold = 0  # person_kfold: the test fold
    config.split.folds = 5
    config.split.database = ""  # leave_database_out: the one left out
    config.split.names = ""
    config.split.file = ""  # a split to reuse; default: WORKDIR/split.json
    config.split.allow_leaks = False

    config.task = ml_collections.ConfigDict()
    config.task.name = "classical"
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
    config.model.svm_tolerance = 0.002
    config.model.svm_degree = 3
    config.model.hidden = 150  # of the MLP
    config.model.mlp_regularisation = 0.5
    config.model.logistic_c = 1.30

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 5000  # iterations of the MLP at most
    config.train.batch_recordings = 16  # whose envelopes are computed at once
    config.train.select = "auc"  # the validation metric whose best classifier is kept

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.threshold = 0.5
    config.evaluation.resamples = 1000  # of people, for the intervals

    config.experiment = ml_collections.ConfigDict()
    config.experiment.runs = 10  # of each classifier, set and protocol; 0: none
    config.experiment.test_share = 0.3

    config.parallel = ml_collections.ConfigDict()
    config.parallel.strategy = "jit"  # as in the other configs; four small classifiers are fitted on the host
    config.parallel.fsdp = 1
    return config
