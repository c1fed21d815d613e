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
import functools
import json
import math
import pathlib
import shutil
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from pcgjax import metrics
from pcgjax.pages import population as population_page
from pcgjax.runs import lock, log, schema
from pcgjax.runs.config import Fields, flat_fields, one_of, plain_config, refuse_changes, with_fields
from pcgjax.runs.data import refuse_other_split
from pcgjax.runs.judge import validation_scores
from pcgjax.runs.record import record
from pcgjax.runs.results import read_json
from pcgjax.runs.seal import seal, unseal
from pcgjax.runtime import checkpoint, files, goodput
from pcgjax.runtime.files import CheckpointError
from pcgjax.runtime.tables import write_csv
from pcgjax.training.conclude import Finished, conclude, model_of, system_facts
from pcgjax.training.member_loop import Trained, save_best, train_program
from pcgjax.training.members import Program, look_ahead
from pcgjax.training.sweep import members_of, programs, swept_values


def train_population(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, dry_run: bool = False, together: bool | None = None
) -> dict:
    """Trains what `config.sweep` asks for and returns what it writes to population.json, of which
    `pages.population` has the details; a member whose loss was not finite has no scores there, but "diverged", the
    step.

    Where the config has stages, each is a population, and a member starts from its own best model of the one before.

    together: whether a device takes its members as one batch; default: unless it is a CPU.

    Raises:
      ValueError: as `loop.train`, and for what a population cannot be.
      FloatingPointError: every member diverged, or one before the last stage.
    """
    schema.check(config)
    refuse(config)
    for member in members_of(swept_values(config)):
        schema.check(with_fields(config, member))
    with lock.held(workdir, jax.process_index() == 0):
        return _train_population(config, pathlib.Path(workdir), dry_run, together)


def _train_population(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool, together: bool | None
) -> dict:
    refuse_other_split(config, workdir)
    clock = goodput.Clock()
    together = jax.default_backend() != "cpu" if together is None else together
    swept = swept_values(config)
    members = members_of(swept)
    text = " ".join(f"{field}={','.join(map(str, values))}" for field, values in swept.items())
    stages = list(config.stages.items()) or [("", {})]
    start_from: list[Fields] = [{} for _ in members]
    for number, (name, overrides) in enumerate(stages, 1):
        folder = workdir if number == len(stages) else workdir / name
        base = one_of(config, overrides, str(workdir / "split.json"))
        fixed = flat_fields(overrides)  # what a stage says holds for all
        fields = [
            {field: value for field, value in member.items() if field not in fixed} | start
            for member, start in zip(members, start_from, strict=True)
        ]
        if dry_run:
            report_costs(name, base, fields, workdir, together)
            continue
        trained = train_stage(base, text, fields, folder, workdir, together, clock)
        if number < len(stages):
            start_from = [hand_on(name, i, *trained[i], folder) for i in range(len(members))]
    return {} if dry_run else conclude_population(workdir, members, trained, clock)


def refuse(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for what a population cannot be, naming the field."""
    if config.parallel.fsdp != 1 or config.parallel.strategy != "jit":
        raise ValueError(
            f"parallel.fsdp={config.parallel.fsdp}, parallel.strategy={config.parallel.strategy}: a member of a sweep "
            "is on one device; choose 1 and jit"
        )
    if config.profile.steps:
        raise ValueError(f"profile.steps={config.profile.steps}: a trace is of a lone run; sweep nothing, or give 0")


def report_costs(
    name: str, base: ml_collections.ConfigDict, members: list[Fields], workdir: pathlib.Path, together: bool
) -> None:
    """Prints what the programs of a stage would cost; nothing is run."""
    groups = programs(members)
    print(f"{name or 'sweep'}: {len(members)} members, in programs of {', '.join(str(len(g)) for g in groups)}")
    for numbers in groups:
        print(look_ahead(Program(base, [members[i] for i in numbers], workdir, together)))


def train_stage(
    base: ml_collections.ConfigDict, swept: str, members: list[Fields], folder: pathlib.Path, workdir: pathlib.Path,
    together: bool, clock: goodput.Clock,
) -> list[tuple[Trained, int]]:  # fmt: skip
    """Trains all members, program by program; returns of each member its program and its place there."""
    plain, path = plain_config(base) | {"sweep": swept}, folder / "config.json"
    if path.exists():
        refuse_changes(read_json(path), plain, folder)
    refuse_other_members(base, members, folder)
    unseal(folder)
    record(folder, base)
    if jax.process_index() == 0:
        files.write_text(path, json.dumps(plain, indent=1))
    places: dict[int, tuple[Trained, int]] = {}
    for group, numbers in enumerate(programs(members)):
        program = Program(base, [members[i] for i in numbers], workdir, together)
        trained = train_program(program, numbers, folder / "checkpoints" / f"program{group}", folder, clock)
        places |= {number: (trained, place) for place, number in enumerate(numbers)}
    return [places[number] for number in range(len(members))]


def refuse_other_members(base: ml_collections.ConfigDict, members: list[Fields], folder: pathlib.Path) -> None:
    """Raises CheckpointError where the checkpoints in a population's folder are of other members than these."""
    for group, numbers in enumerate(programs(members)):
        found = checkpoint.restore(folder / "checkpoints" / f"program{group}")
        before = found[2].get("members") if found else None
        if before is None:  # none, or of an earlier version
            continue
        if len(before) != len(numbers):
            raise CheckpointError(
                f"{folder}: its checkpoint is of {len(before)} members, now {len(numbers)}; give another --workdir"
            )
        for was, number in zip(before, numbers, strict=True):
            refuse_changes(was, plain_config(with_fields(base, members[number])), folder)


def hand_on(stage: str, number: int, trained: Trained, place: int, folder: pathlib.Path) -> Fields:
    """Saves a member's best model of a stage; returns the field by which the next stage starts from it."""
    if trained.diverged[place] is not None:
        raise FloatingPointError(f"stage {stage}: member {number} diverged at step {trained.diverged[place]}")
    target = folder / "members" / str(number)
    save_best(trained, place, target)
    return {"train.start_from": str(target)}


def conclude_population(
    workdir: pathlib.Path, members: list[Fields], trained: list[tuple[Trained, int]], clock: goodput.Clock
) -> dict:
    """Writes and returns population.json, and writes all that lies beside it; {} on all processes but the first."""
    best = [None if one.diverged[place] is not None else one.best[place] for one, place in trained]
    scores = {number: epoch["score"] for number, epoch in enumerate(best) if epoch is not None}
    if not scores:
        steps = ", ".join(str(one.diverged[place]) for one, place in trained)
        raise FloatingPointError(f"every member diverged, at the steps {steps}; lower optimizer.learning_rate")
    selected = max(scores, key=scores.__getitem__)
    select = trained[selected][0].program.config.train.select
    meta, params, rest = save_best(*trained[selected], workdir / "best")
    if jax.process_index():
        return {}
    history = log.history(workdir / "metrics.jsonl")
    summaries = [
        member_summary(members[i], best[i], *trained[i], [line for line in history if line["member"] == i], select)
        for i in range(len(members))
    ]
    lines = [{k: v for k, v in line.items() if k != "member"} for line in history if line["member"] == selected]
    results = conclude_best(workdir, *trained[selected], meta, params, rest, lines, clock)
    names = [name for name in summaries[selected]["test"] if name != "threshold"]
    spread = {name: metrics.interval([member["test"].get(name) for member in summaries]) for name in names}
    population = {
        "members": summaries,
        "selected": selected,
        "select": select,
        "trivial": results["test"].get("trivial", {}),
        "summary": {name: {k: v if np.isfinite(v) else None for k, v in x.items()} for name, x in spread.items()},
        "system": results["system"],
    }
    files.write_text(workdir / "population.json", json.dumps(population, indent=1))
    names, *rows = _rows(population)
    write_csv(workdir / "table.csv", names, rows)
    try:
        population_page.write_population(workdir)
    except ImportError as error:
        logging.warning("no report.html: %s; install it, then python -m pcgjax.report %s", error, workdir)
    seal(workdir)
    print(goodput.sentence(results["system"]["seconds"]))
    print(summary(population))
    print(f"wrote {workdir}: population.json, table.csv, report.html, and best/, a run's folder")
    return population


def member_summary(
    fields: Fields, best: dict | None, trained: Trained, place: int, lines: list[dict], select: str
) -> dict[str, Any]:
    """A member as population.json has it: its fields, curve, best epoch and scores, or where it diverged."""
    curve = {
        "loss": [line["loss"] for line in lines if line["split"] == "train"],
        "validation": [line[select] for line in lines if line["split"] == "validation"],
    }
    shown = {field: str(value) if value == math.inf else value for field, value in fields.items()}  # JSON has none
    member: dict[str, Any] = {"fields": shown, "best": {}, "validation": {}, "test": {}, "curve": curve}
    if best is None:
        return member | {"diverged": trained.diverged[place]}
    member["best"] = {"epoch": best["epoch"], "score": best["score"] if np.isfinite(best["score"]) else None}
    experiment = trained.program.experiment
    for part, answers in trained.answers.items():
        labels = experiment.labels[experiment.parts[part]]
        scores = validation_scores(experiment.task.classifies, answers[place], labels, best["threshold"])
        member[part] = {name: float(score) if np.isfinite(score) else None for name, score in scores.items()}
    return member


def conclude_best(
    workdir: pathlib.Path, trained: Trained, place: int, meta: dict, params: Any, rest: Any, lines: list[dict],
    clock: goodput.Clock,
) -> dict:  # fmt: skip
    """Makes `workdir`/best the workdir of the best member; returns its metrics.json."""
    program, folder = trained.program, workdir / "best"
    config, experiment = program.configs[place], program.experiment
    unseal(folder)
    files.write_text(folder / "config.json", json.dumps(meta["config"], indent=1))
    shutil.copy(workdir / "split.json", folder / "split.json")
    log.write_lines(folder / "metrics.jsonl", lines)
    finished = Finished(
        config, folder, experiment.corpus, experiment.parts, experiment.split, experiment.labels,
        experiment.task.classifies, config.train.epochs * experiment.steps_an_epoch, meta,
        {part: answers[place] for part, answers in trained.answers.items()}, experiment.facts(params, config.seed),
        system_facts(clock), functools.partial(log.log_line, folder / "metrics.jsonl"),
    )  # fmt: skip
    return conclude(finished, model_of(finished, experiment.task, program.graphdef, params, rest))


def _rows(population: dict) -> list[list]:
    """table.csv: a line of names, and one a member."""
    chosen = population["members"][population["selected"]]
    columns = [(part, name) for part in ("validation", "test") for name in chosen[part]]
    names = ["member", *chosen["fields"], "best_by_validation", "diverged_at_step", "best_epoch"]
    rows: list[list] = [[*names, *(f"{part}_{name}" for part, name in columns)]]
    for i, m in enumerate(population["members"]):
        first = [
            i,
            *m["fields"].values(),
            int(i == population["selected"]),
            m.get("diverged", ""),
            m["best"].get("epoch", ""),
        ]
        rows.append(first + [m[part].get(name) for part, name in columns])
    return rows


def summary(population: dict) -> str:
    """population.json for a terminal: a line a member, then the mean and deviation over seeds of each setting."""
    select, members = population["select"], population["members"]
    test = members[population["selected"]]["test"]
    names = [n for n in dict.fromkeys((select, "auc", "mean_accuracy", "f1", "accuracy", "loss")) if n in test]
    columns = [("validation", select), *(("test", name) for name in names)]
    rows = [["", *members[0]["fields"], "epoch", *(" ".join(column) for column in columns)]]
    settings = collections.defaultdict(list)
    for i, m in enumerate(members):
        settings[tuple((f, v) for f, v in m["fields"].items() if f != "seed")].append(m)
        first = [f"{i}{' *' if i == population['selected'] else ''}", *map(str, m["fields"].values())]
        epoch = f"diverged at step {m['diverged']}" if "diverged" in m else str(m["best"]["epoch"])
        rows.append([*first, epoch, *(_number(m[part].get(name)) for part, name in columns)])
    repeated = settings if len(settings) < len(members) else {}
    for setting, repeats in repeated.items():
        cells = [str(dict(setting).get(f, f"mean of {len(repeats)}")) for f in members[0]["fields"]]
        spread = [metrics.interval([m[part].get(name) for m in repeats]) for part, name in columns]
        rows.append(["", *cells, "", *(f"{x['mean']:.3f} ± {x['deviation']:.3f}" if x["n"] else "-" for x in spread)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"* the best by validation {select}: its test scores are not what it was chosen by"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
