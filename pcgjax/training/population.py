"""Populations: seeds, and values of any swept fields, trained side by side, each device its share of the members.

    python -m pcgjax.train --config=configs/cnn.py --workdir=runs/cnn_seeds --config.data.prepared=data/cinc2016 \
        --config.sweep.seed=0,1,2,3 --config.sweep.optimizer.learning_rate=0.01,0.03

trains a member for each combination, here 8. A member is the run that its config would be alone on one device: same
parameters at the start, same order of recordings, same noise and dropout. What the data are, the split, a share of it
or shuffled labels, goes by the config's own seed and is the same for all.

Members that differ in their seeds and in TRACED fields are one compiled program; those that differ in others, such as
`model.hidden`, are further programs, which run one after the other. WORKDIR receives config.json, split.json,
metrics.jsonl (a line a member), checkpoints/ of all members on the way, and at the end population.json, table.csv,
report.html and best/, a workdir of the member that is best by validation. A second start resumes.
"""

from __future__ import annotations

import collections
import csv
import functools
import itertools
import json
import math
import pathlib
import shutil
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from pcgjax import metrics
from pcgjax.data.plan import padding_waste
from pcgjax.pages import population as population_page
from pcgjax.runs import log
from pcgjax.runs.config import Fields, one_of, plain_config, refuse_changes
from pcgjax.runs.judge import validation_scores
from pcgjax.runs.log import log_line
from pcgjax.runs.record import record
from pcgjax.runtime import files, goodput
from pcgjax.training.conclude import conclude
from pcgjax.training.members import (
    Program,
    Trained,
    flat_fields,
    look_ahead,
    programs,
    save_best,
    swept_values,
    train_program,
)


def train_population(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, dry_run: bool = False, together: bool | None = None
) -> dict:
    """Trains what `config.sweep` asks for and returns what it writes to population.json, of which `compare.population`
    has the details; a member whose loss was not finite has no scores there, but "diverged", the step.

    Where the config has stages, each is a population, and a member starts from its own best model of the one before.

    together: whether a device takes its members as one batch; default: unless it is a CPU.

    Raises:
      ValueError: as `train.train`, and for what a population cannot be.
      FloatingPointError: every member diverged, or one before the last stage.
    """
    clock, began = goodput.Clock(), time.monotonic()
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    swept, first_process = swept_values(config), jax.process_index() == 0
    if config.parallel.fsdp != 1 or config.parallel.strategy != "jit":
        raise ValueError(
            f"parallel.fsdp={config.parallel.fsdp}, parallel.strategy={config.parallel.strategy}: a member of a sweep "
            "is on one device; choose 1 and jit"
        )
    if config.profile.steps:
        raise ValueError(f"profile.steps={config.profile.steps}: a trace is of a lone run; sweep nothing, or give 0")
    together = jax.default_backend() != "cpu" if together is None else together
    members = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    text = " ".join(f"{field}={','.join(map(str, values))}" for field, values in swept.items())
    stages = list(config.get("stages", {}).items()) or [("", {})]
    start_from: list[Fields] = [{} for _ in members]
    for number, (name, overrides) in enumerate(stages, 1):
        folder = workdir if number == len(stages) else workdir / name
        base = one_of(config, overrides, str(workdir / "split.json"))
        fixed = flat_fields(overrides)  # what a stage says holds for all
        own = [{f: v for f, v in m.items() if f not in fixed} | s for m, s in zip(members, start_from, strict=True)]
        plain = plain_config(base) | {"sweep": text}
        groups = programs(own)
        if dry_run:
            print(f"{name or 'sweep'}: {len(members)} members, in programs of {', '.join(str(len(g)) for g in groups)}")
            for numbers in groups:
                print(look_ahead(Program(base, [own[i] for i in numbers], workdir, together)))
            continue
        if (folder / "config.json").exists():
            refuse_changes(json.loads((folder / "config.json").read_text()), plain, folder)
        record(folder, base)
        if first_process:
            files.write_text(folder / "config.json", json.dumps(plain, indent=1))
        trained: list[tuple[Trained, int]] = [None] * len(members)  # type: ignore[list-item]
        for group, numbers in enumerate(groups):
            program = Program(base, [own[i] for i in numbers], workdir, together)
            done = train_program(program, numbers, folder / "checkpoints" / f"program{group}", folder, clock)
            for place, i in enumerate(numbers):
                trained[i] = done, place
        if number < len(stages):
            for i, (done, place) in enumerate(trained):
                if done.diverged[place] is not None:
                    raise FloatingPointError(f"stage {name}: member {i} diverged at step {done.diverged[place]}")
                start_from[i] = {"train.start_from": str(folder / "members" / str(i))}
                save_best(done, place, folder / "members" / str(i))
    return {} if dry_run else _conclude(workdir, members, trained, clock, began)


def _conclude(
    workdir: pathlib.Path, members: list[Fields], trained: list[tuple[Trained, int]], clock: goodput.Clock, began: float
) -> dict:
    """Writes and returns population.json, and writes all that lies beside it."""
    best = [None if done.diverged[i] is not None else done.best[i] for done, i in trained]
    score = {number: one["score"] for number, one in enumerate(best) if one is not None}
    if not score:
        steps = ", ".join(str(done.diverged[i]) for done, i in trained)
        raise FloatingPointError(f"every member diverged, at the steps {steps}; lower optimizer.learning_rate")
    selected = max(score, key=lambda number: score[number])
    done, place = trained[selected]
    program = done.program
    config, experiment, select = program.configs[place], program.experiment, program.config.train.select
    meta, params, rest = save_best(done, place, workdir / "best")
    if jax.process_index():
        return {}
    history, told = log.history(workdir / "metrics.jsonl"), []
    for number, (asked_for, (done, i)) in enumerate(zip(members, trained, strict=True)):
        own = [line for line in history if line["member"] == number]
        curve = {"loss": [x["loss"] for x in own if x["split"] == "train"],
                 "validation": [x[select] for x in own if x["split"] == "validation"]}  # fmt: skip
        shown = {f: str(v) if v == math.inf else v for f, v in asked_for.items()}  # JSON has none
        one: dict[str, Any] = {"fields": shown, "best": {}, "validation": {}, "test": {}, "curve": curve}
        if (found := best[number]) is None:
            one["diverged"] = done.diverged[i]
        else:
            one["best"] = {"epoch": found["epoch"], "score": found["score"] if np.isfinite(found["score"]) else None}
            e = done.program.experiment
            for part, answers in done.answers.items():
                y = e.labels[e.parts[part]]
                scores = validation_scores(e.task, answers[i], y, found["threshold"])
                one[part] = {k: float(v) if np.isfinite(v) else None for k, v in scores.items()}
        told.append(one)

    best_folder = workdir / "best"
    files.write_text(best_folder / "config.json", json.dumps(meta["config"], indent=1))
    shutil.copy(workdir / "split.json", best_folder / "split.json")
    lines = [{k: v for k, v in line.items() if k != "member"} for line in history if line["member"] == selected]
    files.write_text(best_folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    plan = experiment.plan(config.seed, 0)
    facts = {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "pipeline": experiment.pipeline,
        "corpus_mib": experiment.corpus.bytes / 2**20,
        "train_recordings": len(experiment.parts["train"]),
        "steps_an_epoch": experiment.steps_an_epoch,
        "capacities": list(experiment.capacities),
        "padding_waste": padding_waste(plan, experiment.corpus.lengths, experiment.task.geometry),
    }
    seconds = clock.told()
    system = {
        "device": str(jax.devices()[0].device_kind), "devices": jax.device_count(), "processes": jax.process_count(),
        "wall_s": time.monotonic() - began, "seconds": seconds, "goodput": goodput.share(seconds),
    }  # fmt: skip
    done, place = trained[selected]
    results = conclude(
        config, best_folder, experiment, program.graphdef, params, rest, meta,
        {part: answers[place] for part, answers in done.answers.items()}, facts, system,
        functools.partial(log_line, best_folder / "metrics.jsonl"),
    )  # fmt: skip
    names = [name for name in told[selected]["test"] if name != "threshold"]
    spread = {name: metrics.interval([m["test"].get(name) for m in told]) for name in names}
    out = {
        "members": told, "selected": selected, "select": select, "trivial": results["test"].get("trivial", {}),
        "summary": {name: {k: v if np.isfinite(v) else None for k, v in x.items()} for name, x in spread.items()},
        "system": results["system"],
    }  # fmt: skip
    files.write_text(workdir / "population.json", json.dumps(out, indent=1))
    rows = _rows(out)
    with files.replacing(workdir / "table.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    try:
        population_page.write_population(workdir)
    except ImportError as error:
        logging.warning("no report.html: %s; install it, then python -m pcgjax.report %s", error, workdir)
    print(goodput.sentence(seconds))
    print(summary(out))
    print(f"wrote {workdir}: population.json, table.csv, report.html, and best/, a run's folder")
    return out


def _rows(found: dict) -> list[list]:
    """table.csv: a line of names, and one a member."""
    chosen = found["members"][found["selected"]]
    columns = [(part, name) for part in ("validation", "test") for name in chosen[part]]
    names = ["member", *chosen["fields"], "best_by_validation", "diverged_at_step", "best_epoch"]
    rows: list[list] = [[*names, *(f"{part}_{name}" for part, name in columns)]]
    for i, m in enumerate(found["members"]):
        first = [
            i,
            *m["fields"].values(),
            int(i == found["selected"]),
            m.get("diverged", ""),
            m["best"].get("epoch", ""),
        ]
        rows.append(first + [m[part].get(name) for part, name in columns])
    return rows


def summary(found: dict) -> str:
    """population.json for a terminal: a line a member, then the mean and deviation over seeds of each setting."""
    select, members = found["select"], found["members"]
    test = members[found["selected"]]["test"]
    names = [n for n in dict.fromkeys((select, "auc", "mean_accuracy", "f1", "accuracy", "loss")) if n in test]
    columns = [("validation", select), *(("test", name) for name in names)]
    say = lambda value: "-" if value is None else f"{value:.3f}"
    rows = [["", *members[0]["fields"], "epoch", *(" ".join(column) for column in columns)]]
    settings = collections.defaultdict(list)
    for i, m in enumerate(members):
        settings[tuple((f, v) for f, v in m["fields"].items() if f != "seed")].append(m)
        first = [f"{i}{' *' if i == found['selected'] else ''}", *map(str, m["fields"].values())]
        epoch = f"diverged at step {m['diverged']}" if "diverged" in m else str(m["best"]["epoch"])
        rows.append([*first, epoch, *(say(m[part].get(name)) for part, name in columns)])
    for setting, own in settings.items() if len(settings) < len(members) else ():
        cells = [str(dict(setting).get(f, f"mean of {len(own)}")) for f in members[0]["fields"]]
        spread = [metrics.interval([m[part].get(name) for m in own]) for part, name in columns]
        rows.append(["", *cells, "", *(f"{x['mean']:.3f} ± {x['deviation']:.3f}" if x["n"] else "-" for x in spread)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"* the best by validation {select}: its test scores are not what it was chosen by"])
