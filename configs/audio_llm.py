"""Qwen2-Audio with LoRA on CirCor's eleven questions (BUILD_NOTES.md, "Audio LLM").

    python -m pcgjax.prepare --dataset=circor --source=DIR --out=data/circor_16k --sample_rate_hz=16000
    torchrun --nproc_per_node=8 -m pcgjax.audio_llm.train --config=configs/audio_llm.py --model=DIR \
        --workdir=runs/audio_llm --config.data.prepared=data/circor_16k

--model is a local copy of Qwen/Qwen2-Audio-7B-Instruct; memory and time on a GPU: not measured.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.prepared = ""  # the folder that pcgjax.prepare wrote, at 16 kHz
    config.data.clip_s = 10.0  # of a recording in training, drawn anew each time; at most 30
    config.data.shuffle_labels = False  # a control for classifiers, refused here: pcgjax.audio_llm.score has its own

    config.split = ml_collections.ConfigDict()
    config.split.kind = "person"  # or person_kfold
    config.split.fractions = (0.65, 0.1, 0.25)  # of people: train, validation, test; the paper tests on 0.25
    config.split.fold = 0
    config.split.folds = 4
    config.split.database = ""
    config.split.names = ""
    config.split.file = ""
    config.split.allow_leaks = False

    config.task = ml_collections.ConfigDict()
    config.task.name = "audio_llm"
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

    config.lora = ml_collections.ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.05
    config.lora.targets = (
        "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    config.lora.audio_tower = True
    config.lora.projector = False
    config.lora.llm = True  # the paper's section 3.3 says that the text side was frozen, its 3.1.2 that it was not

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "cosine"  # after the warm-up, to 0; the only one
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 3
    config.train.batch_recordings = 16  # a step, over all processes
    config.train.accumulate = 1  # a step's recordings go through the model in so many portions
    config.train.checkpoint_steps = 100
    config.train.log_steps = 10

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.batch_recordings = 8
    config.evaluation.resamples = 1000  # of people, for the intervals

    config.parallel = ml_collections.ConfigDict()
    config.parallel.strategy = "torch"  # its DistributedDataParallel, or fully_shard; jit and pmap are JAX's
    config.parallel.fsdp = 1  # processes that share one copy of the parameters
    return config
