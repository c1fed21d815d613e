"""A probability and a decision for each audio file.

python -m pcgjax.predict --workdir=runs/cnn --out=answers.csv a.wav b.flac
"""

from __future__ import annotations

import csv
import pathlib

import jax
import numpy as np
from absl import app, flags, logging

from pcgjax import audio, datasets, evaluate, files


def predict(workdir: str, paths: list[str], out: str) -> list[dict]:
    """Writes `out` with path, probability, decision and error for each file, in order, and returns those rows.

    A file that cannot be used has an error and no probability.
    """
    config, task, graphdef, params, rest, sample_rate_hz = evaluate.load_model(workdir)
    rows: list[dict] = [{"path": path, "probability": "", "decision": "", "error": ""} for path in paths]
    recordings = []
    for i, path in enumerate(paths):
        try:
            rate_hz, _, _ = audio.header(path)
        except (audio.AudioError, OSError) as error:
            rows[i]["error"] = str(error)
            continue
        recordings.append(datasets.Recording(str(i), str(i), False, "", rate_hz, {}, (), pathlib.Path(path)))
    corpus, problems = evaluate.decode(recordings, sample_rate_hz)
    reasons = {problem.path: problem.reason for problem in problems}
    for row in rows:
        row["error"] = row["error"] or reasons.get(str(pathlib.Path(row["path"])), "")
    if corpus.rows:
        run = evaluate.make_predict(
            task, graphdef, corpus, np.arange(len(corpus.rows)), config.evaluation.batch_recordings,
            jax.random.key(config.seed),
        )  # fmt: skip
        for row, answer in zip(corpus.rows, run(params, rest), strict=True):
            probability = float(np.exp(answer[0]))
            decision = int(probability >= config.evaluation.threshold)
            rows[int(row["id"])] |= {"probability": f"{probability:.9g}", "decision": decision}
    with files.replacing(pathlib.Path(out)) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        raise app.UsageError("name at least one audio file")
    rows = predict(FLAGS.workdir, argv[1:], FLAGS.out)
    for row in rows:
        if row["error"]:
            logging.warning("%s: %s", row["path"], row["error"])
    print(f"{sum(not row['error'] for row in rows)} of {len(rows)} files answered; wrote {FLAGS.out}")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A folder that pcgjax.train wrote.", required=True)
    flags.DEFINE_string("out", None, "The CSV file to write.", required=True)
    files.run(main)
