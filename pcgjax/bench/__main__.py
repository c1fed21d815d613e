"""How fast: ours, a peer, the ratio pair by pair in one run, and the floor.

    python -m pcgjax.bench --suite=cnn --out=cnn.json [--prepared=DIR]

The peer of `cnn` is what people write in PyTorch for the same net: a Dataset that filters with SciPy and cuts windows,
a DataLoader, Conv1d and MaxPool1d, SGD. Both see the same recordings in the same batches.
"""

from __future__ import annotations

import json
import multiprocessing
import pathlib
import platform
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

import pcgjax
from pcgjax.bench import audio_llm, classical, selective_scan, ssamba
from pcgjax.bench.cnn import cnn, cnn_summary
from pcgjax.bench.hinf_lstm import hinf_lstm, hinf_summary
from pcgjax.bench.scale import scale_suite, scale_summary
from pcgjax.runtime import files

# suite -> (what measures it, the main figures for a terminal)
SUITES: dict[str, tuple[Callable[[str, int], dict], Callable[[dict], str]]] = {
    "cnn": (cnn, cnn_summary),
    "hinf_lstm": (hinf_lstm, hinf_summary),
    "selective_scan": (lambda *_: selective_scan.selective_scan_suite(), selective_scan.selective_scan_summary),
    "ssamba": (lambda *_: ssamba.ssamba_suite(), ssamba.ssamba_summary),
    "scale": (lambda *_: scale_suite(flags.FLAGS.quick), scale_summary),
    "classical": (lambda prepared, _: classical.classical_suite(prepared), classical.classical_summary),
    "audio_llm": (lambda *_: audio_llm.audio_llm_suite(), audio_llm.audio_llm_summary),
}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}")
    import torch

    if FLAGS.suite == "ssamba":  # the batch's items on devices of their own; of no effect where there is a GPU
        jax.config.update("jax_num_cpu_devices", ssamba.BATCH)
    measure, summary = SUITES[FLAGS.suite]
    result = measure(FLAGS.prepared, FLAGS.recordings)
    result["system"] = {
        "suite": FLAGS.suite,
        "device": jax.devices()[0].device_kind,
        "cores": multiprocessing.cpu_count(),
        "platform": platform.platform(),
        "versions": {"pcgjax": pcgjax.__version__, "python": platform.python_version(), "jax": jax.__version__,
                     "torch": torch.__version__, "numpy": np.__version__},
    }  # fmt: skip
    files.write_text(pathlib.Path(FLAGS.out), json.dumps(result, indent=1))
    print(summary(result))
    print(f"wrote {FLAGS.out}")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_enum("suite", "cnn", sorted(SUITES), "What to measure.")
    flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
    flags.DEFINE_string("prepared", "", "A folder that pcgjax.prepare wrote; default: a simulated corpus.")
    flags.DEFINE_integer("recordings", 160, "How many recordings to use, in cnn and hinf_lstm.", 16)
    flags.DEFINE_bool("quick", False, "In scale: models and corpora so small that no figure counts.")
    files.run(main)
