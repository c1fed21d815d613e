"""The classical chain of Kocuvan and Torkar (HEALTHINF 2015): S1 and S2 by Shannon energy, Burg spectra, classifiers.

`pcgjax.train --config=configs/classical.py` runs it; a workdir holds what others hold, and experiment.json: the paper's
ten random splits, by recording as published and by person. The checkpoint is the features that the classifiers were
fitted to, as plain arrays: scikit-learn's objects would have to be pickled, and fitting them again takes a second.

    python -m pcgjax.classical --prepared=DIR

says how well S1 and S2 are found in a prepared data set that has them annotated.
"""

from __future__ import annotations

import ml_collections
import numpy as np
from absl import app, flags

from pcgjax.classical.picking import annotated_recordings, picking
from pcgjax.data.corpus import from_prepared
from pcgjax.runtime import files


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}")
    f = {"high_hz": 100.0, "filter_order": 4, "window_s": 0.02, "hop_s": 0.01, "threshold": float("inf")}
    config = ml_collections.ConfigDict({"features": f, "train": {"batch_recordings": 16}})
    corpus = from_prepared(flags.FLAGS.prepared)
    for database in sorted({corpus.rows[i]["database"] for i in annotated_recordings(corpus)}):
        own = [i for i in annotated_recordings(corpus) if corpus.rows[i]["database"] == database]
        found = picking(corpus.subset(np.array(own)), config)
        told = {**found.get("marks", {}), **{k: v["value"] for k, v in found.get("annotated", {}).items()}}
        keys = ("onset_f1_60ms", "onset_f1_100ms", "onset_recall_60ms", "onset_precision_60ms", "frame_accuracy")
        values = ", ".join(f"{k} {v:.3f}" for k, v in told.items() if k in (*keys, *found.get("marks", ())))
        print(f"{database}: {found['recordings']} recordings, {found['no_cycle_found']} without a cycle; {values}")


if __name__ == "__main__":
    flags.DEFINE_string(
        "prepared", None, "A folder that pcgjax.prepare wrote, with annotated S1 and S2.", required=True
    )
    files.run(main)
