"""Carries out the plan of the papers asked for, and writes table.json and report.html."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from absl import logging

from pcgjax import metrics
from pcgjax.pages import reproduce as reproduce_page
from pcgjax.reproduce.job import BUDGETS, PAPERS, Job
from pcgjax.reproduce.plan import plan
from pcgjax.reproduce.rows import left_out_clips, rows_of
from pcgjax.reproduce.stages import carry_out, saved
from pcgjax.runs import lock
from pcgjax.runs.record import versions
from pcgjax.runtime import files


def reproduce(
    paper: str, source: str | pathlib.Path, out: str | pathlib.Path, budget: str = "full", model: str = ""
) -> dict[str, Any]:
    """Runs what OUT lacks of a paper, or of all; writes and returns what table.json holds.

    Raises:
      ValueError: an unknown paper or budget, no folder SOURCE, or an OUT that was made with other settings.
    """
    if paper not in (*PAPERS, "all") or budget not in BUDGETS:
        raise ValueError(
            f"paper={paper}, budget={budget}: choose of {', '.join((*PAPERS, 'all'))}; {', '.join(BUDGETS)}"
        )
    job = Job(pathlib.Path(source).resolve(), pathlib.Path(out).resolve(), budget, model and os.path.abspath(model))
    if not job.source.is_dir():
        raise ValueError(f"--source={source}: no such folder; it holds cinc2016/, circor/ and pascal/")
    with lock.held(job.out):
        return _reproduce(paper, source, job, model)


def _reproduce(paper: str, source: str | pathlib.Path, job: Job, model: str) -> dict[str, Any]:
    stages = plan(job, PAPERS if paper == "all" else [paper])
    # What an earlier command made of another paper stays on the page, and so must have been made alike.
    known = {p: plan(job, [p]) for p in PAPERS}
    others = saved((stage for of in known.values() for stage in of), job.out)
    states = others | carry_out(stages, job.out)
    shown = [p for p, of in known.items() if p in (paper, *(PAPERS if paper == "all" else ())) or
             all(stage.name in states for stage in of)]  # fmt: skip
    try:
        rows = [row for p in shown for row in rows_of(job, p, states)]
    except ValueError as error:  # a file of a stage that is done is damaged or gone
        fix = f"remove {job.out / 'stages'}, and the same command makes what is not whole"
        raise ValueError(f"{str(error).partition('; ')[0]}; {fix}") from error
    table = {
        "budget": job.budget, "model": model or "a tiny one with random weights", "source": str(source),
        "rows": rows,
        "stages": {name: {k: v for k, v in state.items() if k != "settings"} for name, state in states.items()},
        "left_out": left_out_clips(job, states),
        "versions": versions(),
    }  # fmt: skip
    files.write_text(job.out / "table.json", json.dumps(metrics.json_ready(table), indent=1) + "\n")
    try:
        reproduce_page.write(job.out, table)
    except ImportError as error:
        logging.warning("no report.html: %s; install it and give the same command again", error)
    return table
