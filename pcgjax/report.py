"""Draws report.html: what a training run is worth, in one file without a single outside request.

    python -m pcgjax.report RUN                        draws RUN/report.html again
    python -m pcgjax.report RUN RUN ... [--out=FILE]   compares runs in one page (comparison.html beside the first)

RUN is a workdir of pcgjax.train, or for a comparison of pcgjax.audio_llm.train. How such a page is made stands in
pcgjax/page.py, what that of a run shows here, and what that of several runs or of a population in pcgjax/compare.py.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from pcgjax.pages.run import write
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


def _main(runs: Sequence[str], out: str | None) -> None:
    from pcgjax.pages import comparison
    from pcgjax.pages import population as population_page

    if not runs:
        raise ValueError("no RUN given: python -m pcgjax.report RUN [RUN ...] [--out=FILE]; --help explains")
    for run in runs:
        _check_run(pathlib.Path(run))
    if len(runs) == 1:
        if out:
            raise ValueError("--out is for the comparison of several runs; one run is drawn to RUN/report.html")
        population = (pathlib.Path(runs[0]) / "population.json").exists()
        path = population_page.write_population(runs[0]) if population else write(runs[0])
    else:
        beside = pathlib.Path(runs[0]).resolve().parent
        rows = [comparison.run_row(run) for run in runs]
        if len({row["name"] for row in rows}) < len(rows):  # a/cnn and b/cnn: the whole paths tell them apart
            rows = [{**row, "name": run.rstrip("/")} for row, run in zip(rows, runs, strict=True)]
        path = comparison.write(rows, out or beside / "comparison.html", "Comparison of runs")
    print(path)


if __name__ == "__main__":
    from absl import flags

    flags.DEFINE_string("out", None, "The page that compares runs; default: comparison.html beside the first.")
    files.run(lambda argv: _main(argv[1:], flags.FLAGS.out))
