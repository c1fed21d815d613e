"""Draws what several trainings are worth side by side: runs of any kind, or the members of a population.

`python -m pcgjax.report RUN RUN ...` sets runs beside each other, `python -m pcgjax.report RUN` draws a population's
page again.
"""

from __future__ import annotations

import csv
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax import metrics
from pcgjax.pages import page
from pcgjax.pages.curves import curve_of, smoothed
from pcgjax.pages.page import INK, SERIES
from pcgjax.pages.words import COMPARED, HEADLINE, LESS_IS_BETTER, LLM_HEADLINE, with_chance, word_of
from pcgjax.published import PAPER_METRICS
from pcgjax.runs import log
from pcgjax.runs.config import flat_fields
from pcgjax.runs.results import overall_scores, read_json, read_population, read_results
from pcgjax.runtime import files, hashes
from pcgjax.segmentation.scores import SEGMENTATION_HEADLINE

_DASHES = ("-", "--", ":", "-.")  # six colours, then the next kind of line


def run_row(workdir: str | pathlib.Path, name: str | None = None) -> dict[str, Any]:
    """A finished run, or a population, as a row of `write`, named after its folder unless a name is given.

    Reads metrics.json or population.json and, where they are there, config.json, run.json, predictions.csv and
    split.json.
    Raises:
      ValueError: there is neither of the first two, or a file is damaged.
    """
    workdir = pathlib.Path(workdir)
    name = name or workdir.resolve().name
    best: dict[str, Any] = {}
    system: dict[str, Any] = {}
    if hashes.intact(workdir / "population.json"):
        population = read_population(workdir / "population.json")
        scores = {m: {**s, "value": s.get("mean")} for m, s in population["summary"].items()}
        trivial, name = population["trivial"], f"{name} (mean of {len(population['members'])})"
        results: dict[str, Any] = {}
    elif "runs" in (results := read_json(workdir / "metrics.json")):
        scores, trivial = _llm_scores(workdir / "metrics.json", results["runs"])
    else:
        results = read_results(workdir / "metrics.json")
        scores, trivial = overall_scores(results["test"]), results["test"].get("trivial") or {}
        best, system = results.get("best") or {}, results.get("system") or {}
    starts = _json_of(workdir / "run.json").get("starts") or []
    last = {k: system[k] for k in ("versions", "device", "devices", "platform", "command") if k in system}
    data = results.get("data") or {}
    return {
        "name": name,
        "metrics": scores,
        "trivial": trivial,
        "history": workdir / "metrics.jsonl",
        "config": _json_of(workdir / "config.json"),
        "best": best,
        "epochs": results.get("epochs"),
        "system": system,
        "a_step": data["train_recordings"] / data["steps_an_epoch"] if data.get("steps_an_epoch") else None,
        "starts": starts or ([last] if last else []),
        "judged_on": _judged_on(workdir),
    }


def _json_of(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if hashes.intact(path) else {}


def write(
    rows: Sequence[Mapping[str, Any]], out: str | pathlib.Path, title: str, paper: Mapping[str, Any] | None = None
) -> pathlib.Path:
    """A page that sets runs side by side: scores, the fields in which they differ, curves, speed. Returns `out`.

    Args:
      rows: one a run, of `run_row`; or {"name", "metrics": {metric: {"value", "low", "high"}}} alone, the rest is left
        out.
      paper: the paper's numbers to set beside, {"source", "note", "results": {a row's name: {metric: number}}}.

    Raises:
      ValueError: no rows, two of one name, a field missing, or a damaged history.
    """
    if not rows:
        raise ValueError("rows: nothing to compare")
    for i, one in enumerate(rows):
        for field in ("name", "metrics"):
            if field not in one:
                raise ValueError(f"rows[{i}]: no field {field!r}")
    names = [str(one["name"]) for one in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"rows: two runs have one name among {', '.join(names)}; give each its own")
    histories = {}
    for name, one in zip(names, rows, strict=True):
        path = one.get("history")
        if path is not None and hashes.intact(pathlib.Path(path)):
            histories[name] = log.history(pathlib.Path(path))
    html = page.render(
        "comparison.html", heading=title, subtitle=page.count(len(rows), "run"), names=names, paper=paper,
        bars=bars_figure(rows, paper), **_people(rows), **_differences(rows), **_curves(rows, histories),
        **_table(rows, paper), **_speed(rows, histories), **_what_ran(rows),
    )  # fmt: skip
    files.write_text(pathlib.Path(out), html)
    return pathlib.Path(out)


def _llm_scores(path: pathlib.Path, judged: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two headline scores of an audio LLM, and what the baselines have of them."""
    if len(judged) != 1:
        raise ValueError(
            f"{path}, runs: holds {len(judged)} audio LLMs side by side already, see its report.html; give the "
            "workdirs of pcgjax.audio_llm.train"
        )
    try:
        test = next(iter(judged.values()))["test"]
        patients = test.get("patients") or {}
        scores = {"task_accuracy": test["mean"]["accuracy"], "weighted_accuracy": patients.get("weighted_accuracy")}
        trivial = {"majority": {"task_accuracy": test["mean"]["majority_accuracy"]}}
        for answer, value in (patients.get("trivial_weighted_accuracy") or {}).items():
            trivial.setdefault(answer, {})["weighted_accuracy"] = value
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}, runs: not what pcgjax.audio_llm.score writes ({error!r}); score again") from None
    return {m: s for m, s in scores.items() if metrics.finite(s) is not None}, trivial


def _judged_on(workdir: pathlib.Path) -> tuple[str, frozenset] | None:
    """("people" or "recordings", who they are) of the test set; None where no file says it."""
    path = workdir / "predictions.csv"
    if hashes.intact(path):
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.DictReader(file)
            part = "split" if "split" in (reader.fieldnames or ()) else "part"  # an audio LLM's rows are of a part
            who = frozenset((r.get("database"), r["person"]) for r in reader if r.get(part) == "test" and "person" in r)
        if who:
            return "people", who
    if hashes.intact(workdir / "split.json"):
        ids = read_json(workdir / "split.json").get("test")
        if isinstance(ids, list):
            return "recordings", frozenset(map(str, ids))
    return None


def varied_fields(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields of flat configs that are not the same in all, in their order."""
    fields = list(dict.fromkeys(field for config in configs for field in config))
    return [f for f in fields if len({json.dumps(c.get(f, "n/a"), sort_keys=True) for c in configs}) > 1]


def field_text(value: Any) -> str:
    """A field's value as a reader writes it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "(" + ", ".join(map(field_text, value)) + ")"
    return str(value)


def _known(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that at least one row has, in the order of a run's page; other tasks' loss last."""
    return [m for m in (*COMPARED, "loss") if any(metrics.finite(one["metrics"].get(m)) is not None for one in rows)]


def _style(i: int) -> dict[str, Any]:
    return {"color": SERIES[i % len(SERIES)], "linestyle": _DASHES[i // len(SERIES) % len(_DASHES)]}


def _people(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the runs were not judged on the same people or recordings: (kind, counts by run, how many in common)."""
    unlike = []
    known = {str(one["name"]): one["judged_on"] for one in rows if one.get("judged_on")}
    for kind in ("people", "recordings"):
        judged = {name: ids for name, (of, ids) in known.items() if of == kind}
        if len(set(judged.values())) > 1:
            counts = ", ".join(f"{name} on {len(ids):,}" for name, ids in judged.items())
            unlike.append((kind, counts, len(frozenset.intersection(*judged.values()))))
    unknown = [str(one["name"]) for one in rows if str(one["name"]) not in known] if known else []
    return {"unlike": unlike, "unknown": unknown}


def _paper_number(paper: Mapping[str, Any] | None, name: str, metric: str) -> float | None:
    return metrics.finite(((paper or {}).get("results") or {}).get(name, {}).get(metric))


def bars_figure(rows: Sequence[Mapping[str, Any]], paper: Mapping[str, Any] | None) -> page.Html:
    """The runs' test scores side by side, with the paper's where it gives them."""
    first = PAPER_METRICS if paper else (*HEADLINE, *SEGMENTATION_HEADLINE, *LLM_HEADLINE)
    known = [m for m in _known(rows) if m != "loss"]
    shown = [m for m in first if m in known] or known
    if not shown:
        return page.absent("None of the runs has a known score.")
    width = 0.8 / len(rows)

    def paint(figure: Any) -> None:
        from matplotlib.lines import Line2D

        ax = figure.subplots()
        for i, one in enumerate(rows):
            label: str | None = str(one["name"])
            for j, metric in enumerate(shown):
                value, low, high = page.bounds(one["metrics"].get(metric))
                x = j + (i - (len(rows) - 1) / 2) * width
                ax.bar(x, value or 0, width * 0.9, color=SERIES[i % len(SERIES)],
                       alpha=0.8 if i < len(SERIES) else 0.4, label=label)  # fmt: skip
                label = None
                if low is not None:
                    ax.plot([x, x], [low, high], color=INK, linewidth=1.2, marker="_", markersize=5)
                number = _paper_number(paper, str(one["name"]), metric)
                if number is not None:
                    ax.plot([x], [number], marker="D", color=INK, markerfacecolor="none", markersize=8, linewidth=0)
        ax.set_xticks(range(len(shown)), [word_of(m).replace(" over ", "\nover ") for m in shown])
        if len(shown) > len(HEADLINE):  # runs of several kinds
            ax.tick_params(axis="x", rotation=35)
        ax.tick_params(axis="x", colors=INK, length=0)
        ax.set_ylim(0, 1.04)
        ax.grid(False, axis="x")
        handles, labels = ax.get_legend_handles_labels()
        if paper:
            handles.append(Line2D([], [], marker="D", color=INK, markerfacecolor="none", markersize=8, linewidth=0))
            labels.append("the paper")
        figure.legend(handles, labels, loc="outside upper left", ncols=min(5, len(labels)))

    scores = []
    for one in rows:
        values = (f"{word_of(m)} {page.number(metrics.finite(one['metrics'].get(m)))}" for m in shown)
        scores.append(f"{one['name']}: {', '.join(values)}")
    figure = page.svg(960, 400, f"Scores of each run. {'; '.join(scores)}", paint)
    caption = (
        "Whiskers are 95 % intervals over people, of a population over its members. Where they overlap, the order of "
        "the bars may be chance."
    )
    return page.card("", figure, caption) + (page.paper_card(paper) if paper else "")


def _beside(rows: Sequence[Mapping[str, Any]], fields: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> page.Html:
    """A table of fields by runs, where a run lacks a field with a dash."""
    body = [[field, *(field_text(of[field]) if field in of else "–" for of in fields)] for field in shown]
    return page.table(["", *(str(one["name"]) for one in rows)], body)


def _differences(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    having = [one for one in rows if one.get("config")]
    configs = [flat_fields(one["config"]) for one in having]
    differing = varied_fields(configs)
    # Of runs of different kinds most fields are of one kind alone: they do not hide the others.
    shared = [field for field in differing if all(field in config for config in configs)]
    rest = [field for field in differing if field not in shared]
    return {
        "without_config": [str(one["name"]) for one in rows if not one.get("config")],
        "same_config": not differing and len(having) > 1,
        "differences": _beside(having, configs, shared) if shared else "",
        "lacking_count": len(rest),
        "lacking": _beside(having, configs, rest) if rest else "",
    }


def _curves(rows: Sequence[Mapping[str, Any]], histories: Mapping[str, Any]) -> dict[str, Any]:
    names = [str(one["name"]) for one in rows]
    lines = [line for history in histories.values() for line in history if line["split"] != "test"]
    by_epoch = all(metrics.finite(line.get("epoch")) is not None for line in lines)
    selected = [(one.get("best") or {}).get("metric") for one in rows]
    logged = {key for line in lines if line["split"] == "validation" for key in line}
    preferred = (*filter(None, selected), *HEADLINE, *SEGMENTATION_HEADLINE, "loss")
    # The metric by which most runs chose their best epoch, so far as it is not the loss, which is shown anyway.
    score = next((m for m in sorted(preferred, key=lambda m: -selected.count(m)) if m in logged and m != "loss"), None)
    wanted = [("train", "loss", "Training loss"), ("validation", "loss", "Validation loss")]
    wanted += [("validation", score, f"{word_of(score)} on validation")] if score else []
    figures = []
    for split, metric, title in wanted:
        curves = {name: _curve(history, split, metric, by_epoch) for name, history in histories.items()}
        curves = {name: curve for name, curve in curves.items() if np.isfinite(curve[1]).any()}
        if curves:
            figures.append(_curves_figure(title, names, curves, "epoch" if by_epoch else "step", metric == "loss"))
        else:
            figures.append(page.absent(f"No {split} {metric}: no metrics.jsonl has one."))
    return {"curves": figures, "without_history": [name for name in names if name not in histories]}


def _curve(
    history: Sequence[Mapping[str, Any]], split: str, metric: str, by_epoch: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(step or epoch, value) of a metric, smoothed where there are many."""
    if by_epoch:  # of an epoch its last line
        history = list({(h["split"], h["epoch"]): {**h, "step": h["epoch"]} for h in history if metric in h
                        and "epoch" in h}.values())  # fmt: skip
    return smoothed(curve_of(history, split, metric))


def _curves_figure(
    title: str, names: Sequence[str], curves: Mapping[str, tuple[np.ndarray, np.ndarray]], x_label: str, loss: bool
) -> page.Html:
    def paint(figure: Any) -> None:
        ax = figure.subplots()
        for name, curve in curves.items():
            marks = {"marker": "o", "markersize": 3} if len(curve[0]) < 40 else {}
            ax.plot(*curve, **_style(names.index(name)), **marks, label=name)
        ax.set_xlabel(x_label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if loss:
            ax.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=3)

    last = "; ".join(f"{name} ends at {page.number(curve[1][-1])}" for name, curve in curves.items())
    return page.card(title, page.svg(460, 320, f"{title} over {x_label}s. {last}", paint), f"{last}.")


def _table(rows: Sequence[Mapping[str, Any]], paper: Mapping[str, Any] | None) -> dict[str, Any]:
    shown = _known(rows)
    if paper:
        shown = [m for m in PAPER_METRICS if m in shown] + [m for m in shown if m not in PAPER_METRICS]

    def cells(scores: Mapping[str, Any]) -> list[Any]:
        return [page.score(scores[m]) if m in scores else "–" for m in shown]

    body: list[list[Any]] = []
    alike: dict[str, list[str]] = {}
    for one in rows:
        name = str(one["name"])
        body.append([page.bold(name), *cells(one["metrics"])])
        numbers = [_paper_number(paper, name, m) for m in shown]
        if any(number is not None for number in numbers):
            paper_cells = (page.muted(page.number(n, 4)) if n is not None else "" for n in numbers)
            body.append([page.muted("the paper"), *paper_cells])
        alike.setdefault(json.dumps(one.get("trivial") or {}, sort_keys=True), []).append(name)
    # Runs judged on the same recordings have the same baselines: those are shown once.
    for answers, names in alike.items():
        for answer, scores in json.loads(answers).items():
            label = word_of(answer) + (f" ({', '.join(names)})" if len(alike) > 1 else "")
            body.append([page.muted(label), *map(page.muted, cells(with_chance(scores)))])
    return {"score_head": ["Run", *(word_of(m) for m in shown)], "score_rows": body, "same_trivial": len(alike) == 1}


def _recordings_per_s(one: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> float | None:
    """Between the train lines of the log, so that what the first had to compile is not counted."""
    a_step = one.get("a_step") or metrics.finite(((one.get("config") or {}).get("train") or {}).get("batch_recordings"))
    lines = [line for line in history if line["split"] == "train" and metrics.finite(line.get("seconds")) is not None]
    steps = seconds = 0.0
    for before, after in itertools.pairwise(lines):
        if after["seconds"] > before["seconds"]:  # else the run was resumed in between, its clock began anew
            steps, seconds = steps + after["step"] - before["step"], seconds + after["seconds"] - before["seconds"]
    return a_step * steps / seconds if a_step and seconds else None


def _best_epoch(one: Mapping[str, Any]) -> Any:
    """Such as "7 of 9", and beneath it the score by which it was chosen."""
    best = one.get("best") or {}
    epoch, metric, score = best.get("epoch"), best.get("metric"), metrics.finite(best.get("score"))
    chosen = page.number(epoch) + (f" of {one['epochs']}" if one.get("epochs") else "") if epoch else "n/a"
    if not metric or score is None:
        return chosen
    shown = page.number(-score if metric in LESS_IS_BETTER else score)  # it is so turned that more is better
    return page.noted(chosen, f"{word_of(metric)} {shown} on validation")


def _speed(rows: Sequence[Mapping[str, Any]], histories: Mapping[str, Any]) -> dict[str, Any]:
    systems = [one.get("system") or {} for one in rows]
    parts = list(dict.fromkeys(part for system in systems for part in system.get("seconds") or {}))
    goodput = any(metrics.finite(system.get("goodput")) is not None for system in systems)
    body = []
    for one, system in zip(rows, systems, strict=True):
        rate = _recordings_per_s(one, histories.get(str(one["name"]), ()))
        seconds = system.get("seconds") or {}
        body.append([
            page.bold(one["name"]), _best_epoch(one), page.number(rate, 1 if rate and rate < 100 else 0),
            *(page.number(metrics.finite(seconds.get(part)), 1) for part in parts),
            page.number(metrics.finite(system.get("wall_s")), 1),
            *([page.share(system.get("goodput"))] if goodput else []),
            page.count(len(one.get("starts") or ()) or None, "time") or "n/a",
        ])  # fmt: skip
    spent = [f"{'Data wait' if part == 'wait' else part.capitalize()} (s)" for part in parts]
    shared = ["Goodput"] if goodput else []
    head = ["Run", "Best epoch", "Recordings/s trained", *spent, "In all (s)", *shared, "Started"]
    return {"speed_head": head, "speed_rows": body}


def _what_ran(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    apart = ("command", "config", "flags", "git", "step")
    facts: dict[str, dict[str, Any]] = {}
    commands = []
    for one in rows:
        starts = one.get("starts") or [{}]
        states = [start["git"] for start in starts if "git" in start]
        commits = [str(git["commit"])[:12] + (" and changes" if git.get("dirty") else "") for git in states]
        last = flat_fields({key: value for key, value in starts[-1].items() if key not in apart})
        facts[str(one["name"])] = ({"commit": ", then ".join(dict.fromkeys(commits))} if commits else {}) | last
        if command := starts[-1].get("command"):
            commands.append((one["name"], " ".join(map(str, command)) if isinstance(command, list) else command))
    having = [one for one in rows if facts[str(one["name"])]]
    known = [facts[str(one["name"])] for one in having]
    differing = varied_fields(known)
    return {
        "ran": _beside(having, known, differing) if differing else "",
        "ran_same": {key: value for key, value in known[0].items() if key not in differing} if known else {},
        "without_record": [name for name, values in facts.items() if not values],
        "commands": commands,
    }
