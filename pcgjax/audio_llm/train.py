"""Trains LoRA adapters of Qwen2-Audio on questions about prepared recordings.

    torchrun --nproc_per_node=N -m pcgjax.audio_llm.train --config=configs/audio_llm.py --model=DIR --workdir=runs/llm \
        --config.data.prepared=DIR [--config.a.b=v]

One process a GPU; without torchrun one process, on a CPU where there is no GPU. WORKDIR receives config.json,
split.json, metrics.jsonl, train.log, tensorboard/ and checkpoints/{last,best}-STEP on the way, and at the end
metrics.json, predictions.csv and report.html. A second start resumes where the first one was stopped.
"""

from __future__ import annotations

import datetime
import os
import pathlib

from absl import flags, logging
from ml_collections import config_flags

from pcgjax.runtime import files

_PATIENCE = datetime.timedelta(minutes=10)  # with a process that no longer answers


def main(argv: list[str]) -> None:
    # Not above: --help needs neither JAX nor PyTorch.
    import jax
    import torch
    import torch.distributed as dist

    from pcgjax.audio_llm import batches
    from pcgjax.audio_llm.loop import train
    from pcgjax.audio_llm.start import check_config
    from pcgjax.pages.audio_llm import summary
    from pcgjax.runs import lock
    from pcgjax.runs.log import log_to

    check_config(FLAGS.config)
    logging.set_verbosity(logging.INFO)
    if "WORLD_SIZE" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    jax.config.update("jax_platforms", "cpu")  # it draws random numbers here; the GPU's memory is PyTorch's
    rank, _ = batches.process()
    with lock.held(FLAGS.workdir, rank == 0):
        if rank == 0:
            log_to(pathlib.Path(FLAGS.workdir))
        results = train(FLAGS.config, FLAGS.model, FLAGS.workdir)
    if rank == 0:
        print(summary(results))
        print(f"wrote {FLAGS.workdir}: metrics.json, predictions.csv, report.html, checkpoints/")
    # Not after an error: the others may wait for this process, which must end for torchrun to stop them.
    if dist.is_initialized():
        dist.destroy_process_group()


FLAGS = flags.FLAGS
if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/audio_llm.py; --config.a.b=v overrides its fields.")
    flags.DEFINE_string("model", None, "A local folder with a Qwen2-Audio checkpoint.", required=True)
    flags.DEFINE_string("workdir", None, "The run's folder; a run that was stopped there is resumed.", required=True)
    flags.mark_flag_as_required("config")
    files.run(main)
