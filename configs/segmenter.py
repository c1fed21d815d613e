"""SSAMBA as a heart-sound segmenter (BUILD_NOTES.md, "Segmenter"): a token every 20 ms, fine-tuned from a checkpoint.

    python -m pcgjax.prepare --dataset=circor --source=DIR --out=data/circor_16k --sample_rate_hz=16000
    python -m pcgjax.train --config=configs/segmenter.py --workdir=runs/segmenter \
        --config.data.prepared=data/circor_16k --config.model.checkpoint=ssamba_tiny.pth

The checkpoint is SSAMBA's own, or the ssamba.pth of configs/ssamba_pretrain.py; without one it starts from random
weights. The paper asks `cycle` (or sounds) of a third of the training set: --config.task.frames=cycle
--config.data.train_share=0.333. For a GPU: a window of 10 s is 4,000 tokens. Scores, times: BUILD_NOTES.md.
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
    config.data.train_share = 1.0  # of the people to train on; the SSAMBA paper's segmenter: 1 / 3

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
    config.task.name = "segmenter"
    config.task.target = ""  # a label to divide evenly between the parts: abnormal, murmur; "": none
    config.task.frames = "states"  # or sounds, cycle, annotated: what each frame is asked

    config.features = ml_collections.ConfigDict()
    config.features.window_s = 10.0
    config.features.step_s = 0.02
    config.features.noise_snr_db = float("inf")  # white noise added first; inf: none
    config.features.masked_bands = 0  # in training: up to so many neighbouring mel bands are hidden
    config.features.response_db = 0.0  # in training: deviation of a random frequency response
    config.features.noise = False  # in training: noise at random levels too
    config.features.stretch = 0.0  # windows made slower or faster in training: not of SSAMBA

    config.model = ml_collections.ConfigDict()
    config.model.name = "ssamba"
    config.model.width = 192  # tiny; small 384, base 768
    config.model.depth = 24
    config.model.checkpoint = ""  # a .pth to start from
    config.model.bidirectional = True
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
    config.optimizer.frozen = ()  # ("encoder",): the head alone learns

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 12
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
