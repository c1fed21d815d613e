"""What every config starts from; a file in configs/ states what it changes and what only it has.

A field with a name that says it is off ("none", "constant", "") or that is 0, 0.0 or () changes nothing.
"""

from __future__ import annotations

from ml_collections import ConfigDict

# What a population can sweep: parts of a config, and the seed.
SWEPT = ("seed", "features", "model", "loss", "sapt", "optimizer")


def common(task: str) -> ConfigDict:
    """The fields of every system: of the JAX trainer, of the classical chain, and of those that PyTorch computes."""
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    config.data.prepared = ""  # the folder that pcgjax.prepare wrote; several, with commas between, where that fits
    config.data.shuffle_labels = False  # a control of classifiers: labels permuted over people, nothing can be learned
    config.split = ConfigDict()
    config.split.kind = "person"  # person, person_250, person_kfold, leave_database_out, column, paper301
    config.split.fractions = (0.65, 0.15, 0.20)  # of people: train, validation, test; person_250 takes the last only
    config.split.fold = 0  # person_kfold: the test fold
    config.split.folds = 5
    config.split.database = ""  # leave_database_out: the one left out
    config.split.names = ""  # paper301: a file that names the test recordings
    config.split.file = ""  # a split to reuse; default: WORKDIR/split.json
    config.split.allow_leaks = False
    config.task = ConfigDict()
    config.task.name = task
    config.task.target = (
        "abnormal"  # or murmur, or a column of a table; without classes, what to divide evenly between the parts, or ""
    )
    config.train = ConfigDict()
    config.train.epochs = 30
    config.train.batch_recordings = 8  # a step, over all devices
    config.evaluation = ConfigDict()
    config.evaluation.resamples = 1000  # of people, for the intervals
    config.parallel = ConfigDict()
    config.parallel.strategy = "jit"  # jit over a (data, fsdp) mesh, or pmap
    config.parallel.fsdp = 1  # devices that share one copy of the parameters
    return config


def base(task: str) -> ConfigDict:
    """The fields of every system of the JAX trainer; `features` is empty, and `model` lacks the sizes of the net."""
    config = common(task)
    config.data.pipeline = "auto"  # resident, stream, or auto: resident where the corpus fits the device
    config.features = ConfigDict()
    config.model = ConfigDict()
    config.model.bfloat16 = False  # of the model's arithmetic; parameters stay float32
    config.sapt = ConfigDict()
    config.sapt.interval = 0  # epochs between two updates of the threshold; 0: it stays at evaluation.threshold
    config.sapt.factor = 0.3
    config.sapt.metric = "f1"  # or balanced_accuracy, recall
    config.sapt.smooth = "threshold"  # or scores: what the moving average is of
    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # or sgd, adamw
    config.optimizer.learning_rate = 0.001
    config.optimizer.schedule = "constant"  # or cosine: down to 0 at the last step
    config.optimizer.warmup_steps = 0  # of cosine
    config.optimizer.momentum = 0.0  # of sgd
    config.optimizer.weight_decay = 0.0  # of adamw, of matrices only
    config.optimizer.clip_norm = 0.0  # of the gradient; 0: not clipped
    config.optimizer.frozen = ()  # top-level parameter groups that stay as they are: cnn, encoder, ...
    config.train.accumulate = 1  # a device's recordings of a step go through the model in so many portions
    config.train.remat = "none"  # what the backward pass keeps: none: all; dots: products; full: nothing
    config.train.balance = "none"  # class imbalance as it is; class, database_class: groups drawn equally often
    config.train.checkpoint_steps = 500
    config.train.select = "auc"  # the validation metric whose best epoch is kept
    config.train.start_from = ""  # a workdir, whose best model gives what optimizer.frozen names
    config.evaluation.batch_recordings = 16
    config.evaluation.threshold = 0.5  # of a recording's mean probability, or a frame's; SAPT starts there
    config.profile = ConfigDict()
    config.profile.start = 0  # the first step of a trace in WORKDIR/profile
    config.profile.steps = 0  # of the trace; 0: none
    config.variants = ConfigDict()  # name of a run -> the fields in which it differs: trained side by side
    config.stages = ConfigDict()  # name of a stage -> the same: trained one after the other, the last in WORKDIR itself
    return config


def log_mel_classifier(task: str) -> ConfigDict:
    """`base` with the log-mel clips and losses of the H-infinity LSTM paper: its system, and its image baselines."""
    config = base(task)
    config.split.kind = "person_250"
    config.split.fractions = (0.64, 0.16, 0.20)
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
    config.model.dropout = 0.0
    config.loss = ConfigDict()
    config.loss.name = "bce"  # or pwl
    config.loss.alpha = 0.87
    config.loss.normalize = "counts"  # as published; rates: a penalty that does not grow with the batch
    config.loss.slope = 0.0  # 0: the indicator; else of the sigmoid in its place, which passes gradients
    config.train.epochs = 50
    return config


def raw_audio_encoder(architecture: str) -> ConfigDict:
    """The raw-audio baselines of the H-infinity LSTM paper, fine-tuned by PyTorch."""
    config = common("audio_encoder")
    config.split.kind = "person_250"
    config.split.fractions = (0.64, 0.16, 0.20)
    config.features = ConfigDict({"window_s": 5.0})  # the clip
    config.model = ConfigDict()
    config.model.architecture = architecture
    config.model.folder = ""  # a checkpoint as transformers saves it; "": random weights
    config.model.size = "base"  # of random weights: base, as published, or tiny
    config.model.freeze_feature_encoder = True  # the convolutions before the transformer, as is usual
    config.model.dtype = "float32"  # of the arithmetic; bfloat16: PyTorch's autocast. Parameters stay float32
    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-5
    config.optimizer.schedule = "cosine"  # after the warm-up, to 0; the only one
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.train.epochs = 10
    config.train.portion_clips = 16  # so many of a step's clips at most go through the model at once
    config.train.balance = "none"  # class imbalance as it is; class, database_class: groups drawn equally often
    config.train.checkpoint_steps = 200
    config.train.select = "auc"  # the validation metric whose best epoch is kept
    config.evaluation.threshold = 0.5  # of a recording's mean probability
    config.parallel.strategy = "torch"  # one process, on a GPU where there is one; jit and pmap are JAX's
    return config


def with_sweep(config: ConfigDict) -> ConfigDict:
    """The config with `sweep`: every field that a population can sweep, as a string that is empty for "not swept".

    `--config.sweep.optimizer.learning_rate=0.1,0.01` trains a member of a population for each of these values.
    """
    parts = {part: dict.fromkeys(config[part], "") for part in SWEPT if part in config and part != "seed"}
    config.sweep = ConfigDict({"seed": "", **parts})
    return config
