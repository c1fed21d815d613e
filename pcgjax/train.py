"""Trains what a config describes: the one loop.

    python -m pcgjax.train --config=configs/cnn.py --workdir=runs/cnn --config.data.prepared=DIR [--config.a.b=v]

The order is always the same: train an epoch (one compiled program where the corpus fits the device), validate, save.
WORKDIR receives config.json, split.json, metrics.jsonl, train.log and checkpoints/{last,best} on the way, and at the
end metrics.json, predictions.csv, examples.npz and report.html. A second start resumes where the first one was stopped.
"""

from __future__ import annotations

import pathlib

from absl import flags, logging
from ml_collections import config_flags

from pcgjax.runtime import distributed, files


def main(argv: list[str]) -> None:
    import jax

    from pcgjax import systems
    from pcgjax.runs import lock, schema
    from pcgjax.runs.log import log_to

    logging.set_verbosity(logging.INFO)
    workdir = pathlib.Path(FLAGS.workdir)
    if FLAGS.devices:
        if not FLAGS.dry_run:
            raise ValueError("--devices: for --dry_run alone; a run takes the devices that are there")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    schema.check(FLAGS.config)
    system = systems.of(FLAGS.config.task.name)
    if system.jax_platforms:
        jax.config.update("jax_platforms", system.jax_platforms)
    with distributed.together(), lock.held(workdir, jax.process_index() == 0):
        if jax.process_index():
            logging.set_verbosity(logging.WARNING)  # what all would say, process 0 says
        else:
            log_to(workdir)
        system.train(FLAGS.config, workdir, FLAGS.dry_run)


FLAGS = flags.FLAGS
if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "A name of `pcgjax configs`, or a file; with --help, its fields.")
    flags.DEFINE_string("workdir", None, "The run's folder; a run that was stopped there is resumed.", required=True)
    flags.DEFINE_bool("dry_run", False, "Compile, print sizes and costs, and stop.")
    flags.DEFINE_integer("devices", None, "With --dry_run: compile for so many devices, simulated on the CPU.", 1)
    distributed.define_flags()
    flags.mark_flag_as_required("config")
    files.run(main)
