"""The small heart-sound segmenter (BUILD_NOTES.md, "Segmenter"): S1, systole, S2 and diastole in frames of 20 ms.

    python -m pcgjax.prepare --dataset=circor --source=DIR --out=data/circor_2k --sample_rate_hz=2000
    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=data/cinc2016_2k --sample_rate_hz=2000
    python -m pcgjax.train --config=configs/segmenter_small.py --workdir=runs/segmenter_small \
        --config.data.prepared=data/circor_2k,data/cinc2016_2k

configs/segmenter_small.py:causal hears the past only, and can be streamed. Scores, times: README.md, BUILD_NOTES.md.
"""

import ml_collections

from pcgjax.runs.config import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "causal"):
        raise ValueError(f"configs/segmenter_small.py:{variant}: the only variant is configs/segmenter_small.py:causal")
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.prepared = ""  # the folder that pcgjax.prepare wrote, or several, with commas between
    config.data.pipeline = "auto"  # resident, stream, or auto: resident where the corpus fits the device
    config.data.shuffle_labels = False  # a control for classifiers, refused here
    config.data.train_share = 1.0  # of the people to train on; the SSAMBA paper's segmenter: 1 / 3

    config.split = ml_collections.ConfigDict()
    config.split.kind = "person"  # person, person_kfold, leave_database_out
    config.split.fractions = (0.8, 0.05, 0.15)  # of people: train, validation, test
    config.split.fold = 0  # person_kfold: the test fold
    config.split.folds = 5
    config.split.database = ""  # leave_database_out: the one left out
    config.split.names = ""
    config.split.file = ""  # a split to reuse; default: WORKDIR/split.json
    config.split.allow_leaks = False

    config.task = ml_collections.ConfigDict()
    config.task.name = "segmenter"
    config.task.target = ""  # a label to divide evenly between the parts: abnormal, murmur; "": none
    config.task.frames = "states"  # or sounds, cycle, annotated: what each frame is asked

    config.features = ml_collections.ConfigDict()
    config.features.window_s = 10.0
    config.features.step_s = 0.02
    config.features.n_fft = 128
    config.features.n_mels = 32
    config.features.low_hz = 20.0
    config.features.high_hz = 1000.0
    config.features.noise_snr_db = float("inf")  # white noise added first; inf: none
    config.features.masked_bands = 6  # in training: up to so many neighbouring mel bands are hidden
    config.features.response_db = 6.0  # in training: deviation of a random frequency response
    config.features.noise = True  # in training: noise at random levels too
    config.features.stretch = 0.15  # in training: windows are made slower or faster by up to that share

    config.model = ml_collections.ConfigDict()
    config.model.name = "frames"
    config.model.width = 96
    config.model.depth = 4
    config.model.d_state = 8
    config.model.expand = 2
    config.model.dropout = 0.1
    config.model.bidirectional = variant != "causal"
    config.model.implementation = "auto"  # of the selective scan: auto, xla, pallas, associative, reference
    config.model.bfloat16 = False  # of the model's arithmetic; parameters stay float32

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.003
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.optimizer.momentum = 0.0
    config.optimizer.frozen = ()

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 16
    config.train.batch_recordings = 8  # a step, over all devices
    config.train.accumulate = 1  # a device's recordings of a step go through the model in so many portions
    config.train.remat = "none"  # what the backward pass finds: none: all; dots: products; full: nothing
    config.train.balance = "none"
    config.train.checkpoint_steps = 500
    config.train.select = "accuracy"  # the validation metric whose best epoch is kept

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.batch_recordings = 16
    config.evaluation.threshold = 0.5  # of a binary target's probability
    config.evaluation.shortest_on_s = 0.04  # of a binary target: shorter spans are dropped,
    config.evaluation.shortest_off_s = 0.04  # and shorter gaps closed before
    config.evaluation.resamples = 1000  # of people, for the intervals

    config.parallel = ml_collections.ConfigDict()
    config.parallel.strategy = "jit"  # jit over a (data, fsdp) mesh, or pmap
    config.parallel.fsdp = 1  # devices that share one copy of the parameters

    config.profile = ml_collections.ConfigDict()
    config.profile.start = 0  # the first step of a trace in WORKDIR/profile
    config.profile.steps = 0  # of the trace; 0: none

    config.sweep = fields(config)  # values with commas between: a member of a population for each
    return config
