"""Which of the H-infinity paper's three ideas hold up: {LSTM, convex, forget} x {BCE, PWL} x {fixed, SAPT}.

    python -m pcgjax.ablation --config=configs/hinf_lstm.py:ablation --workdir=runs/ablation --config.data.prepared=DIR

A setting is a corpus and a way to split it: simulated recordings at several SNRs, the prepared data set by person, and
each of its databases left out; without a prepared data set, the simulated ones only. In each, every seed draws a split
and trains a CNN-LSTM with BCE; its CNN, frozen, is what all arms of that seed build on, each with a fresh recurrent
layer. All seeds train in one compiled program.

BCE does not know the threshold, so BCE with SAPT is the training of BCE with the fixed threshold, judged at SAPT's:
nine trainings give the twelve arms. What the last epoch leaves is judged; no epoch is chosen. Differences are paired
by seed: same split, same CNN, same order of clips. Seeds share one data set, so an interval over seeds tells what
another split and training would give, and nothing about another clinic.

WORKDIR receives a json for every setting, table.json and report.html. Settings found there are not trained again.
"""

from __future__ import annotations

import pathlib

from absl import flags, logging
from ml_collections import config_flags

from pcgjax.runtime import files

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    from pcgjax.ablation.run import run_ablation

    logging.set_verbosity(logging.INFO)
    workdir = pathlib.Path(FLAGS.workdir)
    table = run_ablation(FLAGS.config, workdir)
    for row in table["settings"]:
        arms = row["arms"]
        best = max(arms, key=lambda arm: arms[arm]["mean_accuracy"]["mean"])
        scores = arms[best]
        mean_accuracy, auc = (scores[name]["mean"] for name in ("mean_accuracy", "auc"))
        print(f"{row['title']}: best MAcc {mean_accuracy:.3f}, AUC {auc:.3f} ({best})")
    for sentence in table["verdicts"].values():
        print(sentence)
    print(f"wrote {workdir}: table.json, report.html")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/hinf_lstm.py:ablation; --config.a.b=v overrides.")
    flags.DEFINE_string("workdir", None, "The run's folder; settings found there are not run again.", required=True)
    flags.mark_flag_as_required("config")
    files.run(main)
