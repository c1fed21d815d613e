"""What a trained model has learned of the place instead of the patient: the site report.

    python -m pcgjax.sites --workdir=runs/cnn

prints, and writes to WORKDIR as sites.json and sites.html: the AUC inside each database of the test people, their plain
mean and the overall scores, what the database alone scores, and a probe. The probe is a logistic regression that
predicts the database from the model's features of a recording: what its last unit is given, the mean over the
recording's clips. It is fitted and judged on held-out people, divided again by person, beside the same net
untrained and beside plain statistics of the signal, which say how much of it training has added.

WORKDIR is of any classifier that pcgjax.train makes; its prepared data must still be where they were.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from absl import flags, logging

from pcgjax.runtime import files


def write(workdir: str | pathlib.Path) -> dict[str, Any]:
    """Measures a run and writes its sites.json and sites.html; returns what the former holds. Raises: as `measure`."""
    from pcgjax import systems
    from pcgjax.pages.sites import document
    from pcgjax.runs.sites import measure

    workdir = pathlib.Path(workdir)
    report = measure(workdir, systems.features)
    files.write_text(workdir / "sites.json", json.dumps(report, indent=1) + "\n")
    files.write_text(workdir / "sites.html", document(report, f"Sites: run {workdir.resolve().name}"))
    return report


def main(argv: list[str]) -> None:
    from pcgjax.pages.sites import summary

    workdir = flags.FLAGS.workdir
    report = write(workdir)
    for name, why in report["probed"]["left_out"].items():
        logging.warning("%s is left out of the probe: %s", name, why)
    print(summary(report))
    print(f"wrote {workdir}: sites.json, sites.html")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A folder that pcgjax.train wrote.", required=True)
    files.run(main)
