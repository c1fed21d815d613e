"""The CNN with the H-infinity LSTM (BUILD_NOTES.md, "H-infinity LSTM"), trained in two stages as published.

    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=data/cinc2016_2k --sample_rate_hz=2000
    python -m pcgjax.train --config=configs/hinf_lstm.py --workdir=runs/hinf --config.data.prepared=data/cinc2016_2k

First the CNN with a plain LSTM, in WORKDIR/cnn_lstm; then its CNN, frozen, with the H-infinity LSTM, in WORKDIR.
configs/hinf_lstm.py:small is the public code's net, one convolution a block; configs/hinf_lstm.py:ablation
is for pcgjax.ablation. Scores, times: README.md, BUILD_NOTES.md.
"""

import ml_collections

from pcgjax.runs.config import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "small", "ablation"):
        raise ValueError(f"configs/hinf_lstm.py:{variant}: the variants are :small and :ablation")
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
    config.task.name = "hinf_lstm"
    config.task.target = "abnormal"  # or murmur

    config.features = ml_collections.ConfigDict()
    config.features.window_s = 5.0  # the clip
    config.features.noise_snr_db = float("inf")  # white noise added first; inf: none
    config.features.wavelet_level = 4  # of the db4 denoising; 0: none
    config.features.filter = "zero_phase"  # none, zero_phase, causal
    config.features.filter_order = 5
    config.features.high_hz = 500.0
    config.features.n_fft = 2048
    config.features.hop = 512
    config.features.n_mels = 128
    config.features.htk = False  # Slaney's mel scale, or HTK's
    config.features.top_db = 80.0  # what lies further below the clip's peak counts as that far below

    config.model = ml_collections.ConfigDict()
    config.model.cell = "convex"  # of the final stage: lstm, convex or forget
    config.model.blocks = ((32,), (64,)) if variant == "small" else ((32, 32), (64, 64))
    config.model.hidden = 128
    config.model.dropout = 0.3
    config.model.implementation = "auto"  # of the recurrent layer: auto, xla, pallas, cudnn, reference
    config.model.bfloat16 = False  # of the model's arithmetic; parameters stay float32

    config.loss = ml_collections.ConfigDict()
    config.loss.name = "pwl"  # or bce
    config.loss.alpha = 0.87
    config.loss.normalize = "counts"  # as published; rates: a penalty that does not grow with the batch
    config.loss.slope = 0.0  # 0: the indicator; else of the sigmoid in its place, which passes gradients

    config.sapt = ml_collections.ConfigDict()
    config.sapt.interval = 10  # epochs between two updates of the threshold; 0: it stays at evaluation.threshold
    config.sapt.factor = 0.3
    config.sapt.metric = "f1"  # or balanced_accuracy, recall
    config.sapt.smooth = "threshold"  # or scores: what the moving average is of

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.001
    config.optimizer.momentum = 0.0
    config.optimizer.frozen = ()  # top-level parameter groups: cnn, recurrent

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 50  # of each stage
    config.train.batch_recordings = 8  # a step, over all devices
    config.train.accumulate = 1  # a device's recordings of a step go through the model in so many portions
    config.train.remat = "none"  # what the backward pass finds: none: all; dots: products; full: nothing
    config.train.balance = "none"  # class imbalance as found; class, database_class: groups drawn equally often
    config.train.checkpoint_steps = 500
    config.train.select = "auc"  # the validation metric whose best epoch is kept
    config.train.start_from = ""  # a workdir, whose best model gives what optimizer.frozen names

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.batch_recordings = 16
    config.evaluation.threshold = 0.5  # of a recording's mean probability; SAPT starts there
    config.evaluation.resamples = 1000  # of people, for the intervals

    config.parallel = ml_collections.ConfigDict()
    config.parallel.strategy = "jit"  # jit over a (data, fsdp) mesh, or pmap
    config.parallel.fsdp = 1  # devices that share one copy of the parameters

    config.profile = ml_collections.ConfigDict()
    config.profile.start = 0  # the first step of a trace in WORKDIR/profile
    config.profile.steps = 0  # of the trace; 0: none

    config.sweep = fields(config)  # values with commas between: a member of a population for each
    config.stages = ml_collections.ConfigDict()  # trained one after the other, the last in WORKDIR itself
    config.stages.cnn_lstm = {"model": {"cell": "lstm"}}
    config.stages.hinf_lstm = {"optimizer": {"frozen": ("cnn",)}}

    if variant == "ablation":
        # A hundred trainings a setting are to take minutes on a CPU: half the bands, an eighth of the published net's
        # work, two clips a recording. Ten epochs instead of fifty: the threshold still moves five times.
        config.features.n_mels = 64
        config.model.blocks = ((16,), (32,))
        config.model.hidden = 64
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
    return config
