"""Self-supervised pre-training of SSAMBA on heart sounds, labelled or not (BUILD_NOTES.md, "SSAMBA").

    python -m pcgjax.prepare --dataset=folder --source=DIR --out=data/own_16k --sample_rate_hz=16000
    python -m pcgjax.train --config=configs/ssamba_pretrain.py --workdir=runs/ssamba \
        --config.data.prepared=data/own_16k

`folder` takes any tree of .wav and .flac files; the other data sets serve as well, and several folders may be named
with commas between. WORKDIR/ssamba.pth, in the layout of the public code's checkpoints, is what configs/segmenter.py
and the public code start from. For a GPU. Scores, times: BUILD_NOTES.md.
"""

import ml_collections

from pcgjax.runs.config import fields


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.prepared = ""  # the folder that pcgjax.prepare wrote, or several, with commas between
    config.data.pipeline = "auto"  # resident, stream, or auto: resident where the corpus fits the device
    config.data.shuffle_labels = False  # a control for classifiers, refused here

    config.split = ml_collections.ConfigDict()
    config.split.kind = "person"  # person, person_kfold, leave_database_out
    config.split.fractions = (0.7, 0.1, 0.2)  # of people: train, validation, test
    config.split.fold = 0  # person_kfold: the test fold
    config.split.folds = 5
    config.split.database = ""  # leave_database_out: the one left out
    config.split.names = ""
    config.split.file = ""  # a split to reuse; default: WORKDIR/split.json
    config.split.allow_leaks = False

    config.task = ml_collections.ConfigDict()
    config.task.name = "ssamba_pretrain"
    config.task.target = ""  # a label to divide evenly between the parts: abnormal, murmur; "": none

    config.features = ml_collections.ConfigDict()
    config.features.window_s = 10.24

    config.model = ml_collections.ConfigDict()
    config.model.width = 192  # tiny; small 384, base 768
    config.model.depth = 24
    config.model.mask_patches = 400  # of the 512 of a window, as published
    config.model.checkpoint = ""  # a .pth to start from
    config.model.remat = True  # each pair of layers computed again in the backward pass: less memory
    config.model.bfloat16 = False  # of the mixers' products, on accelerators
    config.model.implementation = "auto"  # of the selective scan: auto, xla, pallas, associative, reference

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.0003
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.optimizer.momentum = 0.0
    config.optimizer.frozen = ()

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 12
    config.train.batch_recordings = 8  # a step, over all devices
    config.train.accumulate = 1  # a device's recordings of a step go through the model in so many portions
    config.train.remat = "none"  # what the backward pass finds: none: all; dots: products; full: nothing
    config.train.balance = "none"
    config.train.checkpoint_steps = 500
    config.train.select = "loss"  # or accuracy, of telling masked patches apart: whose best epoch is kept

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.batch_recordings = 16
    config.evaluation.threshold = 0.5  # has no meaning here
    config.evaluation.resamples = 1000  # of people, for the intervals

    config.parallel = ml_collections.ConfigDict()
    config.parallel.strategy = "jit"  # jit over a (data, fsdp) mesh, or pmap
    config.parallel.fsdp = 1  # devices that share one copy of the parameters

    config.profile = ml_collections.ConfigDict()
    config.profile.start = 0  # the first step of a trace in WORKDIR/profile
    config.profile.steps = 0  # of the trace; 0: none

    config.sweep = fields(config)  # values with commas between: a member of a population for each
    return config
