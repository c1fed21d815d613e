"""Qwen2-Audio with LoRA on CirCor's eleven questions.

    python -m pcgjax.prepare --dataset=circor --source=DIR --out=data/circor_16k --sample_rate_hz=16000
    torchrun --nproc_per_node=8 -m pcgjax.audio_llm.train --config=configs/audio_llm.py --model=DIR \
        --workdir=runs/audio_llm --config.data.prepared=data/circor_16k

--model is a local copy of Qwen/Qwen2-Audio-7B-Instruct.

Machine: eight GPUs; memory there: not measured.
Time: not measured. A tiny random model, float32, both with and without a front end: 7 minutes on 2 busy CPU cores.
Score: not measured. Random weights know nothing: mean over six tasks .163, the majority .574.
"""

import ml_collections

from pcgjax.runs.base_config import common


def get_config() -> ml_collections.ConfigDict:
    config = common("audio_llm")
    config.data.clip_s = 10.0  # of a recording in training, drawn anew each time; at most 30
    config.split.fractions = (0.65, 0.1, 0.25)  # the paper tests on 0.25; kinds: person, person_kfold
    config.split.folds = 4
    config.task.target = "murmur_status"  # divided evenly between the parts: Present, Unknown, Absent
    config.questions = ml_collections.ConfigDict()
    config.questions.tasks = ("all",)  # or some of the names of pcgjax.audio_llm.questions.TASKS
    config.questions.sites = "audible"  # a murmur's features are asked where it is audible; or all: at every site
    config.questions.padding = "other"  # to six options; repeat: as published, which tells the answer
    config.questions.a_clip = 4  # at most, drawn anew each time, in training
    config.front_end = ml_collections.ConfigDict()
    config.front_end.kind = "none"  # N.S in the paper; or crop, gate: W.S
    config.front_end.segments = ""  # the folder with a .tsv a recording, of states or cycle, that pcgjax.predict wrote
    config.front_end.attenuation_db = 20.0  # of gate, between heartbeats
    config.model = ml_collections.ConfigDict()
    config.model.dtype = "bfloat16"  # of the frozen weights; float32
    config.model.attention = "sdpa"  # eager, or flash_attention_2 with share_prefix=False
    config.model.share_prefix = True  # a clip's questions stand behind one copy of prompt and audio
    config.model.checkpointing = False  # recompute activations in the backward pass: less memory, more time
    config.model.compile = False  # torch.compile, a layer at a time
    config.lora = ml_collections.ConfigDict({"rank": 16, "alpha": 32.0, "dropout": 0.05})
    config.lora.targets = (
        "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    config.lora.audio_tower, config.lora.projector = True, False
    config.lora.llm = True  # the paper's section 3.3 says that the text side was frozen, its 3.1.2 that it was not
    config.optimizer = ml_collections.ConfigDict({"name": "adamw", "learning_rate": 1e-4, "weight_decay": 0.0})
    config.optimizer.schedule, config.optimizer.warmup_steps = "cosine", 50  # after the warm-up, to 0; the only one
    config.optimizer.clip_norm = 1.0
    config.train.epochs = 3
    config.train.batch_recordings = 16  # a step, over all processes
    config.train.accumulate = 1  # a step's recordings go through the model in so many portions
    config.train.checkpoint_steps, config.train.log_steps = 100, 10
    config.evaluation.batch_recordings = 8
    config.parallel.strategy = "torch"  # its DistributedDataParallel, or fully_shard; jit and pmap are JAX's
    return config
