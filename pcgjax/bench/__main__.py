"""How fast: ours, a peer, the ratio pair by pair in one run, and the floor.

    python -m pcgjax.bench --suite=cnn --out=cnn.json [--prepared=DIR]

The peer of a suite is what people write without this package, mostly in PyTorch; the suite's file says what it is.
Both sides see the same recordings in the same batches.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import pathlib
import platform
from collections.abc import Callable

from absl import flags

import pcgjax
from pcgjax.runtime import files

SUITES = ("audio_llm", "classical", "cnn", "hinf_lstm", "scale", "selective_scan", "ssamba")
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    files.check_out(FLAGS.out)
    import torch  # before anything is measured: without it there is no peer

    measure, summary = suite_of(FLAGS.suite)
    result = measure()
    result["system"] = system(torch.__version__)
    files.write_text(pathlib.Path(FLAGS.out), json.dumps(result, indent=1))
    print(summary(result))
    print(f"wrote {FLAGS.out}")


def suite_of(name: str) -> tuple[Callable[[], dict], Callable[[dict], str]]:
    """(what measures a suite, its main figures for a terminal). A suite is imported when it is asked for."""
    if name == "audio_llm":
        from pcgjax.bench.audio_llm import audio_llm_suite, audio_llm_summary

        return audio_llm_suite, audio_llm_summary
    if name == "classical":
        from pcgjax.bench.classical import classical_suite, classical_summary

        return functools.partial(classical_suite, FLAGS.prepared), classical_summary
    if name == "cnn":
        from pcgjax.bench.cnn import cnn_suite, cnn_summary

        return functools.partial(cnn_suite, FLAGS.prepared, FLAGS.recordings), cnn_summary
    if name == "hinf_lstm":
        from pcgjax.bench.hinf_lstm import hinf_lstm_suite, hinf_lstm_summary

        return functools.partial(hinf_lstm_suite, FLAGS.prepared, FLAGS.recordings), hinf_lstm_summary
    if name == "scale":
        from pcgjax.bench.scale import scale_suite
        from pcgjax.bench.scale_goals import scale_summary

        return functools.partial(scale_suite, FLAGS.quick), scale_summary
    if name == "selective_scan":
        from pcgjax.bench.selective_scan import selective_scan_suite, selective_scan_summary

        return selective_scan_suite, selective_scan_summary
    import jax

    from pcgjax.bench.ssamba import BATCH, ssamba_suite, ssamba_summary

    # The batch's items on devices of their own; of no effect where there is a GPU.
    jax.config.update("jax_num_cpu_devices", BATCH)
    return ssamba_suite, ssamba_summary


def system(torch_version: str) -> dict:
    """{suite, device, cores, platform, versions} of this run."""
    import jax
    import numpy as np

    return {
        "suite": FLAGS.suite,
        "device": jax.devices()[0].device_kind,
        "cores": multiprocessing.cpu_count(),
        "platform": platform.platform(),
        "versions": {"pcgjax": pcgjax.__version__, "python": platform.python_version(), "jax": jax.__version__,
                     "torch": torch_version, "numpy": np.__version__},
    }  # fmt: skip


if __name__ == "__main__":
    flags.DEFINE_enum("suite", "cnn", SUITES, "What to measure.")
    flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
    flags.DEFINE_string("prepared", "", "A folder that pcgjax.prepare wrote; default: a simulated corpus.")
    flags.DEFINE_integer("recordings", 160, "How many recordings to use, in cnn and hinf_lstm.", 16)
    flags.DEFINE_bool("quick", False, "In scale: models and corpora so small that no figure counts.")
    files.run(main)
