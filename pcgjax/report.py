"""Draws report.html: what a training run is worth, in one file without a single outside request.

    python -m pcgjax.report RUN                        draws RUN/report.html again
    python -m pcgjax.report RUN RUN ... [--out=FILE]   compares runs in one page (comparison.html beside the first)

RUN is a workdir of pcgjax.train, or for a comparison of pcgjax.audio_llm.train. What the pages show is in
pcgjax/pages/: that of a run in run.py, of several runs in comparison.py, of a population in population.py.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from pcgjax.runtime import files


def _check_run(workdir: pathlib.Path) -> None:
    if not workdir.is_dir():
        raise ValueError(f"{workdir}: no such folder; RUN is the --workdir of a run")
    if any((workdir / name).exists() for name in ("metrics.json", "population.json")):
        return
    if inner := sorted(str(path.parent) for path in workdir.glob("*/metrics.json")):
        raise ValueError(f"{workdir}: not a run but a folder of runs: give {' '.join(inner)}")
    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir}: the run has not ended, there is no metrics.json; its command goes on with it")
    raise ValueError(f"{workdir}: not a run, there is no metrics.json; RUN is the --workdir of a run")


def report(runs: Sequence[str], out: str | None = None) -> pathlib.Path:
    """Draws the page of one run, or of several beside each other, and returns its path.

    runs: workdirs; out: the page of several, by default comparison.html beside the first.
    Raises:
      ValueError: no run, or a folder that holds none, saying what it is.
    """
    if not runs:
        raise ValueError("no RUN given: python -m pcgjax.report RUN [RUN ...] [--out=FILE]; --help explains")
    for workdir in runs:
        _check_run(pathlib.Path(workdir))
    from pcgjax.pages import comparison, population, run

    if len(runs) == 1:
        if out:
            raise ValueError("--out is for the comparison of several runs; one run is drawn to RUN/report.html")
        if (pathlib.Path(runs[0]) / "population.json").exists():
            return population.write_population(runs[0])
        return run.write(runs[0])
    rows = [comparison.run_row(workdir) for workdir in runs]
    if len({row["name"] for row in rows}) < len(rows):  # a/cnn and b/cnn: the whole paths tell them apart
        rows = [{**row, "name": workdir.rstrip("/")} for row, workdir in zip(rows, runs, strict=True)]
    beside = pathlib.Path(runs[0]).resolve().parent
    return comparison.write(rows, out or beside / "comparison.html", "Comparison of runs")


def main(argv: list[str]) -> None:
    print(report(argv[1:], flags.FLAGS.out))


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The page that compares runs; default: comparison.html beside the first.")
    files.run(main)
