"""Every paper's tables, under the paper's protocol and under an honest one, on the same recordings, in one page.

    python -m pcgjax.reproduce --paper=all --source=DIR --out=DIR --budget=small

SOURCE holds cinc2016/, circor/ and pascal/, each in its official layout; what is missing is said in the table. OUT
receives prepared/, runs/ (the workdirs of all trainings, each with its own report), stages/ (what is done), table.json
and report.html. Another --paper of the same OUT is added to the page. A run that was stopped, by whatever, goes on with
the same command; settings that differ from those that OUT was made with are an error.

table.json: {"budget", "model", "source", "rows", "stages", "left_out", "versions"}. `pcgjax.reproduce.rows` describes
a row; "left_out" has, by stage, the files that could not be read and the clips in which no heartbeat was found:
[{"id", "reason"}].
"""

from __future__ import annotations

import pathlib

from absl import flags, logging

from pcgjax.reproduce.job import BUDGETS, PAPERS
from pcgjax.runtime import files

FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    from pcgjax.pages import reproduce as reproduce_page
    from pcgjax.reproduce.run import reproduce
    from pcgjax.runs import lock
    from pcgjax.runs.log import log_to

    logging.set_verbosity(logging.INFO)
    if not pathlib.Path(FLAGS.source).is_dir():
        raise ValueError(f"--source={FLAGS.source}: no such folder; it holds cinc2016/, circor/ and pascal/")
    with lock.held(FLAGS.out):
        log_to(pathlib.Path(FLAGS.out))
        table = reproduce(FLAGS.paper, FLAGS.source, FLAGS.out, FLAGS.budget, FLAGS.model)
    print(reproduce_page.summary(table))
    states = table["stages"].values()
    for state in states:
        if state["status"] != "done":
            print(f"{state['status']}: {state['title']}: {state['why']}")
    print(f"wrote {FLAGS.out}: table.json, report.html")
    return 1 if any(state["status"] == "failed" for state in states) else 0


if __name__ == "__main__":
    flags.DEFINE_enum("paper", None, [*PAPERS, "all"], "Whose tables.", required=True)
    flags.DEFINE_string("source", None, "The folder that holds cinc2016/, circor/ and pascal/.", required=True)
    flags.DEFINE_string("out", None, "The folder to write; what is there already is not made again.", required=True)
    budgets = "full: the configs as they are; small: what two CPU cores can do in hours."
    flags.DEFINE_enum("budget", "full", list(BUDGETS), budgets)
    flags.DEFINE_string("model", "", "A local copy of Qwen2-Audio; without it a tiny random one.")
    files.run(main)
