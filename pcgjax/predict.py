"""A probability and a decision for each audio file; of a segmenter, its states.

    python -m pcgjax.predict --workdir=runs/cnn --out=answers.csv a.wav b.flac
    python -m pcgjax.predict --workdir=runs/cnn --out=answers.json clips/ 'more/*.wav' --files_from=list.txt
    python -m pcgjax.predict --workdir=runs/segmenter_small --out=a.tsv a.wav
    python -m pcgjax.predict --workdir=runs/segmenter_small --out=answers.csv a.wav b.flac

A segmenter writes CirCor's .tsv (start and end in seconds, state: 1 S1, 2 systole, 3 S2, 4 diastole; for a binary
target 1 where it holds, else 0): one file to --out, or one a recording beside --out, which lists them with their
heart rates. A folder stands for all sound files below it, a pattern for those it fits, and --files_from=- for a list of
names on standard input. --out=FILE.json has the same rows as --out=FILE.csv.

The exit status is 0 where every file has an answer, else 1.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import app, flags, logging

from pcgjax import datasets
from pcgjax.datasets import S1
from pcgjax.datasets.folder import SUFFIXES, audio_files
from pcgjax.datasets.sources import SourceError, printable, read_bytes
from pcgjax.runtime import files

if TYPE_CHECKING:
    from pcgjax.tasks.segmenter_model import SegmenterModel


def predict(workdir: str, paths: list[str], out: str) -> list[dict]:
    """Writes `out` with path, probability, decision, error and notes for each file, in order, and returns those rows.

    paths: files, folders and patterns, as `named` has them.

    A file that cannot be used has an error and no probability; what was read with a doubt has notes.

    Raises:
      ValueError: the model does not answer, or `out` cannot be written.
    """
    import numpy as np

    from pcgjax import systems
    from pcgjax.data.corpus import decode_recordings
    from pcgjax.datasets import audio
    from pcgjax.runs.judge import NO_CYCLE
    from pcgjax.runs.seal import refuse_run_file
    from pcgjax.tasks.segmenter_model import NOT_FINITE

    files.check_out(out)
    refuse_run_file(pathlib.Path(out))
    paths = named(paths)
    if pathlib.Path(out).suffix.lower() in audio.FAMILIES or os.path.realpath(out) in map(os.path.realpath, paths):
        raise ValueError(f"--out={out}: a recording; give a .csv or .json to write the answers to")
    model = systems.load(workdir)
    if model.segmenter is not None:
        return predict_states(model.segmenter, paths, out)
    if model.answer is None:
        raise ValueError(f"{workdir}: a model of task {model.config.task.name!r} decides nothing about a recording")
    rows: list[dict] = [
        {"path": printable(path), "probability": "", "decision": "", "error": "", "notes": ""} for path in paths
    ]
    recordings = []
    for i, path in enumerate(paths):
        try:
            rate_hz, _, _ = audio.header(path)
        except audio.AudioError as error:
            rows[i]["error"] = _named(path, error)
            continue
        recordings.append(datasets.Recording(str(i), str(i), False, "", rate_hz, {}, (), pathlib.Path(path)))
    corpus, problems = decode_recordings(recordings, model.sample_rate_hz)
    reasons = {problem.path: problem.reason for problem in problems}
    for row, path in zip(rows, paths, strict=True):
        row["error"] = row["error"] or reasons.get(printable(pathlib.Path(path)), "")
    if corpus.rows:
        for row, log_p in zip(corpus.rows, model.answer(corpus), strict=True):
            rows[int(row["id"])]["notes"] = "; ".join(row["notes"])
            if not log_p[0] < np.inf:  # NaN, too
                rows[int(row["id"])]["error"] = NO_CYCLE if model.config.task.name == "classical" else NOT_FINITE
                continue
            probability = float(np.exp(log_p[0]))
            decision = int(probability >= model.config.evaluation.threshold)
            rows[int(row["id"])] |= {"probability": f"{probability:.9g}", "decision": decision}
    _write(rows, pathlib.Path(out))
    return rows


def _write(rows: list[dict], out: pathlib.Path) -> None:
    from pcgjax.runs.judge import write_table

    if out.suffix == ".json":
        files.write_text(out, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    else:
        write_table(rows, out)


def listed(files_from: str) -> list[str]:
    """The names in a file, one a line; "-": on standard input.

    Raises:
      ValueError: the file cannot be read.
    """
    try:
        text = sys.stdin.buffer.read() if files_from == "-" else read_bytes(files_from)
    except SourceError as error:
        raise ValueError(f"--files_from={files_from}: {error}; give a file with a name a line") from None
    return [os.fsdecode(line) for line in text.splitlines() if line.strip()]


def named(words: list[str]) -> list[str]:
    """The files that words stand for, in order: files, folders (all sound files below them) and patterns as `*.wav`.

    What stands for no file stays as it is, and has no answer.
    """
    paths: list[str] = []
    for word in words:
        found = [word]
        if os.path.isdir(word):
            found = list(map(str, audio_files(pathlib.Path(word), []))) or [word]
        elif any(sign in word for sign in "*?[") and not os.path.lexists(word):
            found = sorted(glob.glob(word, recursive=True)) or [word]
        paths += found
    return paths


def predict_states(model: SegmenterModel, paths: list[str], out: str) -> list[dict]:
    """Writes a segmenter's .tsv for each file, read a piece at a time, and returns rows of path, tsv, heart_rate_bpm,
    error and notes, which `out` holds unless it is itself the .tsv of the only file.

    Raises:
      ValueError: two files would have the same .tsv, or one is there already beside its recording, whose annotation
        it may be.
    """
    import numpy as np
    import tqdm

    from pcgjax.datasets import audio
    from pcgjax.segmentation.states import state_spans, write_tsv

    target = pathlib.Path(out)
    tsvs = [target if target.suffix == ".tsv" else target.parent / f"{pathlib.Path(path).stem}.tsv" for path in paths]
    if len(set(tsvs)) < len(tsvs):
        twice = next(tsv for tsv in tsvs if tsvs.count(tsv) > 1)
        raise ValueError(f"{twice}: several files would be written there; give --out=FILE.csv and files of other names")
    for path, tsv in zip(paths, tsvs, strict=True):
        if os.path.exists(tsv) and tsv.resolve() == pathlib.Path(path).resolve().with_suffix(".tsv"):
            raise ValueError(f"{tsv}: is there already, beside its recording; give --out in another folder")
    rows: list[dict] = []
    for path, tsv in zip(paths, tsvs, strict=True):
        row = {"path": printable(path), "tsv": "", "heart_rate_bpm": "", "error": "", "notes": ""}
        rows.append(row)
        notes: list[str] = []
        try:
            rate_hz, samples, _ = audio.header(path)
            pieces = tqdm.tqdm(
                audio.pieces(path, model.sample_rate_hz, notes=notes),
                desc=pathlib.Path(row["path"]).name, unit="piece",
                total=-(-samples // (10 * rate_hz)), disable=None, leave=False, mininterval=1.0,
            )  # fmt: skip
            [scores] = model.frame_scores([pieces])
            row["notes"] = "; ".join(notes)
            spans = state_spans(model.decide(scores), model.step_s, samples / rate_hz)
        except (audio.AudioError, FloatingPointError) as error:
            row["error"] = _named(path, error)
            continue
        try:
            write_tsv(spans, tsv)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            row["error"] = f"unwritable: {printable(tsv.name)}: {error.strerror}; give the recording a shorter name"
            continue
        row["tsv"] = printable(tsv)
        onsets = np.array([start for start, _, state in spans if state == S1])
        if model.config.task.frames == "states" and len(onsets) > 1:
            row["heart_rate_bpm"] = f"{60 / np.median(np.diff(onsets)):.1f}"
    if target.suffix != ".tsv":
        _write(rows, target)
    return rows


def _named(path: str, error: Exception) -> str:
    """An error's message, with more where a folder or a pattern was named."""
    if os.path.isdir(path):
        return f"missing: no {' or '.join(SUFFIXES)} file below this folder"
    if str(error).startswith("missing") and any(sign in path for sign in "*?["):
        return f"{error} fits this pattern"
    return str(error)


def main(argv: list[str]) -> int:
    words = argv[1:] + (listed(FLAGS.files_from) if FLAGS.files_from else [])
    if not words:
        raise app.UsageError("name at least one audio file, folder or pattern, or --files_from")
    rows = predict(FLAGS.workdir, words, FLAGS.out)
    for row in rows:
        if row["error"] or row["notes"]:
            logging.warning("%s: %s", row["path"], row["error"] or row["notes"])
    answered = sum(not row["error"] for row in rows)
    print(f"{answered} of {len(rows)} files answered; wrote {printable(FLAGS.out)}")
    return int(answered < len(rows))


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A folder that pcgjax.train wrote.", required=True)
    flags.DEFINE_string(
        "out", None, "The .csv or .json file to write; of a segmenter also a .tsv, for one file.", required=True
    )
    flags.DEFINE_string("files_from", "", "A file with a name a line; -: standard input.")
    files.run(main, words=True)
