"""Draws report.html: what a training run is worth, in one file without a single outside request.

    python -m pcgjax.report RUN                        draws RUN/report.html again
    python -m pcgjax.report RUN RUN ... [--out=FILE]   compares runs in one page (comparison.html beside the first)
    python -m pcgjax.report --verify DIR ...           draws nothing: compares every file with its hash, bit by bit

RUN is a workdir of pcgjax.train, or for a comparison of pcgjax.audio_llm.train. What the pages show is in
pcgjax/pages/: that of a run in run.py, of several runs in comparison.py, of a population in population.py.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from pcgjax.runtime import files, hashes


def _check_run(workdir: pathlib.Path) -> None:
    if not workdir.is_dir():
        raise ValueError(f"{workdir}: no such folder; RUN is the --workdir of a run")
    if hashes.intact(workdir / "population.json"):
        return
    if hashes.intact(workdir / "metrics.json"):
        from pcgjax.runs.results import read_json

        results = read_json(workdir / "metrics.json")
        config = read_json(workdir / "config.json") if hashes.intact(workdir / "config.json") else {}
        wanted = config.get("train", {}).get("epochs", 0)
        if isinstance(results.get("epochs"), int) and results["epochs"] < wanted:
            raise ValueError(
                f"{workdir}: metrics.json is of {results['epochs']} epochs and the run goes on to {wanted}; its "
                "command ends it"
            )
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


def verify(folder: pathlib.Path) -> list[str]:
    """What is wrong with a run's folder, those below it included, or with a prepared one: a line a file; [] where every
    file is as it was written.

    Raises:
      ValueError: a folder that has no hashes: no run, one that has not ended, or one of an earlier version.
    """
    from pcgjax.data import shards

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; --verify takes the --workdir of a run or a prepared folder")
    if (folder / "manifest.json").exists():
        try:
            shards.verify(folder)
        except shards.PrepareError as error:
            return [str(error)]
        return []
    folders = sorted(path.parent for path in folder.rglob(hashes.NAME))
    if folder not in folders:
        raise ValueError(f"{folder}: no {hashes.NAME}: not a run, one that has not ended, or one of an earlier version")
    bare = sorted({path.parent for path in folder.rglob("metrics.json")} - {*folders})
    lines = [f"{one / hashes.NAME}: missing; the files beside it were not compared" for one in bare]
    for one in folders:
        try:
            lines += hashes.damage(one)
        except files.DamagedError as error:
            lines.append(str(error))
    return lines


def main(argv: list[str]) -> int:
    if not flags.FLAGS.verify:
        print(report(argv[1:], flags.FLAGS.out))
        return 0
    if not argv[1:]:
        raise ValueError("no DIR given: python -m pcgjax.report --verify DIR [DIR ...]")
    lines = [line for folder in argv[1:] for line in verify(pathlib.Path(folder))]
    print("\n".join(lines) or "every file is as it was written")
    return int(bool(lines))


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The page that compares runs; default: comparison.html beside the first.")
    flags.DEFINE_bool("verify", False, "Draw nothing; compare the files of runs or prepared folders with their hashes.")
    files.run(main, words=True)
