"""Every paper's tables, under the paper's protocol and under an honest one, on the same recordings, in one page.

    python -m pcgjax.reproduce --paper=all --source=DIR --out=DIR --budget=small

SOURCE holds cinc2016/, circor/ and pascal/, each in its official layout; what is missing is said in the table. OUT
receives prepared/, runs/ (the workdirs of all trainings, each with its own report), stages/ (what is done), table.json
and report.html. Another --paper of the same OUT is added to the page. A run that was stopped, by whatever, goes on with
the same command; settings that differ from those that OUT was made with are an error.

table.json: {"budget", "model", "source", "rows", "stages", "left_out", "versions"}. "left_out" has, by stage, the
files that could not be read and the clips in which no heartbeat was found: [{"id", "reason"}]. A row is a system's
score on a data set:
  experiment, system, dataset, metric
  paper                 its figure, None where it gives none
  ours_paper_protocol   S: ours under the paper's protocol
  ours_honest           S: ours on people who were not heard, with intervals over people
  ours_database_left_out  S: ours on databases that were not heard, each left out once; None where that was not run
  trivial, trivial_answer   what the best answer that does not listen scores on the honest test people, and which it is
  site                  of CinC 2016: mean AUC over databases, AUC of each, and the probe, of the honest run
  epochs, budget, note  of our training: how long, what is smaller than published, what else differs
  status, why           done, failed or not run, and why
S = {"value", "low", "high"}, of the classical chain also "best", "mean", "deviation" over ten runs.
"""

from __future__ import annotations

import pathlib

from absl import app, flags, logging

from pcgjax.pages import reproduce as reproduce_page
from pcgjax.reproduce.plan import BUDGETS, PAPERS
from pcgjax.reproduce.run import reproduce
from pcgjax.runs.log import log_to
from pcgjax.runtime import files


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: every setting is a --flag")
    logging.set_verbosity(logging.INFO)
    f = flags.FLAGS
    log_to(pathlib.Path(f.out))
    table = reproduce(f.paper, f.source, f.out, f.budget, f.model)
    print(reproduce_page.summary(table))
    bad = [state for state in table["stages"].values() if state["status"] == "failed"]
    for state in table["stages"].values():
        if state["status"] != "done":
            print(f"{state['status']}: {state['title']}: {state['why']}")
    print(f"wrote {f.out}: table.json, report.html")
    return 1 if bad else 0


if __name__ == "__main__":
    flags.DEFINE_enum("paper", None, [*PAPERS, "all"], "Whose tables.", required=True)
    flags.DEFINE_string("source", None, "The folder that holds cinc2016/, circor/ and pascal/.", required=True)
    flags.DEFINE_string("out", None, "The folder to write; what is there already is not made again.", required=True)
    budgets = "full: the configs as they are; small: what two CPU cores can do in hours."
    flags.DEFINE_enum("budget", "full", list(BUDGETS), budgets)
    flags.DEFINE_string("model", "", "A local copy of Qwen2-Audio; without it a tiny random one is asked.")
    files.run(main)
