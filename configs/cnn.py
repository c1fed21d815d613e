"""The 1D CNN with the grouped BCE (BUILD_NOTES.md, "1D CNN"), as published: SGD, one recording a batch.

    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=data/cinc2016
    python -m pcgjax.train --config=configs/cnn.py --workdir=runs/cnn --config.data.prepared=data/cinc2016

    python -m pcgjax.train --config=configs/cnn.py:sweep --workdir=runs/cnn_sweep --config.data.prepared=data/cinc2016

The second trains the paper's four configurations, {no filter, filter} x {clean, white noise}, each in a folder of its
own, and sets them beside the paper's numbers in report.html and table.json. Scores, times: README.md, BUILD_NOTES.md.
"""

import ml_collections

from pcgjax.runs.config import fields

NOISE_SNR_DB = 10.0  # of the sweep's noisy half; the paper does not state it


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "sweep"):
        raise ValueError(f"configs/cnn.py:{variant}: the only variant is configs/cnn.py:sweep")
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.prepared = ""  # the folder that pcgjax.prepare wrote
    config.data.pipeline = "auto"  # resident, stream, or auto: resident where the corpus fits the device
    config.data.shuffle_labels = False  # a control: people's labels dealt out anew, nothing can be learned

    config.split = ml_collections.ConfigDict()
    config.split.kind = "person"  # person, person_250, person_kfold, leave_database_out, paper301
    config.split.fractions = (0.65, 0.15, 0.20)  # of people: train, validation, test
    config.split.fold = 0  # person_kfold: the test fold
    config.split.folds = 5
    config.split.database = ""  # leave_database_out: the one left out
    config.split.names = ""  # paper301: a file that names the test recordings
    config.split.file = ""  # a split to reuse; default: WORKDIR/split.json
    config.split.allow_leaks = False

    config.task = ml_collections.ConfigDict()
    config.task.name = "cnn"
    config.task.target = "abnormal"  # or murmur

    config.features = ml_collections.ConfigDict()
    config.features.window_s = 2.5
    config.features.overlap = 0.5
    config.features.filter = "zero_phase"  # none, zero_phase, causal
    config.features.filter_order = 4
    config.features.low_hz = 25.0
    config.features.high_hz = 400.0
    config.features.noise_snr_db = float("inf")  # white noise added before the filter; inf: none

    config.model = ml_collections.ConfigDict()
    config.model.filters = (16, 32)
    config.model.kernel_size = 5
    config.model.hidden = 64
    config.model.bfloat16 = False  # of the model's arithmetic; parameters stay float32

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.0

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 30
    config.train.batch_recordings = 1  # a step, over all devices
    config.train.accumulate = 1  # a device's recordings of a step go through the model in so many portions
    config.train.remat = "none"  # what the backward pass finds: none: all; dots: products; full: nothing
    config.train.balance = "none"  # none, class, database_class: groups drawn equally often
    config.train.checkpoint_steps = 500
    config.train.select = "auc"  # the validation metric whose best epoch is kept

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.batch_recordings = 16
    config.evaluation.threshold = 0.5  # of a recording's mean probability (section 5.2)
    config.evaluation.resamples = 1000  # of people, for the intervals

    config.parallel = ml_collections.ConfigDict()
    config.parallel.strategy = "jit"  # jit over a (data, fsdp) mesh, or pmap
    config.parallel.fsdp = 1  # devices that share one copy of the parameters

    config.profile = ml_collections.ConfigDict()
    config.profile.start = 0  # the first step of a trace in WORKDIR/profile
    config.profile.steps = 0  # of the trace; 0: none

    config.sweep = fields(config)  # values with commas between: a member of a population for each
    config.variants = ml_collections.ConfigDict()  # name of a run -> the fields in which it differs
    if variant == "sweep":
        noise, none = {"noise_snr_db": NOISE_SNR_DB}, {"filter": "none"}
        config.variants.no_filter = {"features": none}
        config.variants.no_filter_noise = {"features": none | noise}
        config.variants.filter = {"features": {"filter": "zero_phase"}}
        config.variants.filter_noise = {"features": {"filter": "zero_phase"} | noise}
    return config
