"""HuBERT on raw audio, fine-tuned: a baseline of the H-infinity LSTM paper (F1 71.21 there).

    python -m pcgjax.prepare --dataset=cinc2016 --source=DIR --out=data/cinc2016_16k --sample_rate_hz=16000
    python -m pcgjax.train --config=configs/hubert.py --workdir=runs/hubert \
        --config.data.prepared=data/cinc2016_16k --config.model.folder=DIR

model.folder is a local copy of facebook/hubert-base-ls960, its weights as safetensors; without it the weights are
random, and that is another experiment. The paper trained for 50 epochs with Adam at 0.001; here it is 10 with AdamW,
as such models are fine-tuned. Needs pip install "pcgjax[audio-llm]". 94.4 million parameters; time on a GPU: not
measured.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.prepared = ""  # the folder that pcgjax.prepare wrote, at 16 kHz
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
    config.task.name = "audio_encoder"
    config.task.target = "abnormal"  # or murmur

    config.features = ml_collections.ConfigDict()
    config.features.window_s = 5.0  # the clip

    config.model = ml_collections.ConfigDict()
    config.model.architecture = "hubert"
    config.model.folder = ""  # a checkpoint as transformers saves it; "": random weights
    config.model.size = "base"  # of random weights: base, as published, or tiny
    config.model.freeze_feature_encoder = True  # the convolutions before the transformer, as is usual
    config.model.dtype = "float32"  # of the arithmetic; bfloat16: PyTorch's autocast. Parameters stay float32

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-5
    config.optimizer.schedule = "cosine"  # after the warm-up, to 0; the only one
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 10
    config.train.batch_recordings = 8  # a step
    config.train.portion_clips = 16  # so many of a step's clips at most go through the model at once
    config.train.balance = "none"  # class imbalance as found; class, database_class: groups drawn equally often
    config.train.checkpoint_steps = 200
    config.train.select = "auc"  # the validation metric whose best epoch is kept

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.threshold = 0.5  # of a recording's mean probability
    config.evaluation.resamples = 1000  # of people, for the intervals

    config.parallel = ml_collections.ConfigDict()
    config.parallel.strategy = "torch"  # one process, on a GPU where there is one; jit and pmap are JAX's
    config.parallel.fsdp = 1
    return config
