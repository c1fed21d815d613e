"""MobileNetV3-Large on log-mel clips, a baseline of the H-infinity LSTM paper (its table II: F1 81.36, accuracy 81.27).

    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=data/cinc2016_2k --sample_rate_hz=2000
    python -m pcgjax.train --config=configs/mobilenet_v3.py --workdir=runs/mobilenet_v3 \
        --config.data.prepared=data/cinc2016_2k

The paper trained for 50 epochs with Adam at 0.001, and says neither how it made the pictures nor from what weights.
Here: Adam at 0.0003; the clips of configs/hinf_lstm.py, 128 bands by 251 frames of 20 ms; random weights, or with
--config.model.checkpoint=FILE those of torchvision's mobilenet_v3_large (a .pth, or the same names in a .safetensors).
4.2 million parameters: for a GPU.
"""

import ml_collections

from pcgjax.runs.config import fields


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.prepared = ""  # the folder that pcgjax.prepare wrote
    config.data.pipeline = "auto"  # resident, stream, or auto: resident where the corpus fits the device
    config.data.shuffle_labels = False  # a control: people's labels dealt out anew, nothing can be learned

    config.split = ml_collections.ConfigDict()
    config.split.kind = "person_250"  # person, person_250, person_kfold, leave_database_out, paper301
    config.split.fractions = (0.64, 0.16, 0.20)  # of people; person_250 takes the last only
    config.split.fold = 0  # person_kfold: the test fold
    config.split.folds = 5
    config.split.database = ""  # leave_database_out: the one left out
    config.split.names = ""  # paper301: a file that names the test recordings
    config.split.file = ""  # a split to reuse; default: WORKDIR/split.json
    config.split.allow_leaks = False

    config.task = ml_collections.ConfigDict()
    config.task.name = "image"
    config.task.target = "abnormal"  # or murmur

    config.features = ml_collections.ConfigDict()
    config.features.window_s = 5.0  # the clip
    config.features.noise_snr_db = float("inf")  # white noise added first; inf: none
    config.features.wavelet_level = 4  # of the db4 denoising; 0: none
    config.features.filter = "zero_phase"  # none, zero_phase, causal
    config.features.filter_order = 5
    config.features.high_hz = 500.0
    config.features.n_fft = 512
    config.features.hop = 40  # 20 ms at 2000 Hz
    config.features.n_mels = 128
    config.features.htk = False  # Slaney's mel scale, or HTK's
    config.features.top_db = 80.0  # what lies further below the clip's peak counts as that far below

    config.model = ml_collections.ConfigDict()
    config.model.name = "mobilenet_v3"  # resnet, mobilenet_v3, vit
    config.model.width = 1.0  # all channels are multiplied with it
    config.model.blocks = 15  # the first so many of the 15
    config.model.dropout = 0.2  # before the head
    config.model.checkpoint = ""  # a file of ImageNet weights to start from
    config.model.bfloat16 = False  # of the model's arithmetic; parameters stay float32

    config.loss = ml_collections.ConfigDict()
    config.loss.name = "bce"  # or pwl
    config.loss.alpha = 0.87
    config.loss.normalize = "counts"  # as published; rates: a penalty that does not grow with the batch
    config.loss.slope = 0.0  # 0: the indicator; else of the sigmoid in its place, which passes gradients

    config.sapt = ml_collections.ConfigDict()
    config.sapt.interval = 0  # epochs between two updates of the threshold; 0: it stays at evaluation.threshold
    config.sapt.factor = 0.3
    config.sapt.metric = "f1"  # or balanced_accuracy, recall
    config.sapt.smooth = "threshold"  # or scores: what the moving average is of

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.0003
    config.optimizer.momentum = 0.0

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 50
    config.train.batch_recordings = 8  # a step, over all devices
    config.train.accumulate = 1  # a device's recordings of a step go through the model in so many portions
    config.train.remat = "none"  # what the backward pass finds: none: all; dots: products; full: nothing
    config.train.balance = "none"  # class imbalance as found; class, database_class: groups drawn equally often
    config.train.checkpoint_steps = 500
    config.train.select = "auc"  # the validation metric whose best epoch is kept

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.batch_recordings = 16
    config.evaluation.threshold = 0.5  # of a recording's mean probability
    config.evaluation.resamples = 1000  # of people, for the intervals

    config.parallel = ml_collections.ConfigDict()
    config.parallel.strategy = "jit"  # jit over a (data, fsdp) mesh, or pmap
    config.parallel.fsdp = 1  # devices that share one copy of the parameters

    config.profile = ml_collections.ConfigDict()
    config.profile.start = 0  # the first step of a trace in WORKDIR/profile
    config.profile.steps = 0  # of the trace; 0: none

    config.sweep = fields(config)  # values with commas between: a member of a population for each
    return config
