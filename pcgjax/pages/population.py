"""The page of a population: members, settings, curves."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax import metrics
from pcgjax.pages import page
from pcgjax.pages.comparison import field_text, varied_fields
from pcgjax.pages.page import BLUE, INK, MUTED, ORANGE, SERIES
from pcgjax.pages.words import HEADLINE, LESS_IS_BETTER, best_trivial, with_chance, word_of
from pcgjax.runs.results import read_json, read_population
from pcgjax.runtime import files, hashes
from pcgjax.segmentation.scores import SEGMENTATION_HEADLINE


def write_population(workdir: str | pathlib.Path) -> pathlib.Path:
    """Draws `workdir/report.html` of a population from its population.json, and returns its path.

    population.json: {"members": [{"fields": {config field: value}, "best": {"epoch", "score"}, "validation": {metric:
    number}, "test": {metric: number}, "curve": {"loss": one an epoch, "validation": one an epoch, of `select`}}],
    "selected": the index of the best by validation, "select": a metric, "trivial": {answer: {metric: number}},
    "summary": {metric: {"mean", "deviation", "low", "high", "n"}} of the test scores over the members}.

    Raises:
      ValueError: the file is missing or damaged, naming the field.
    """
    workdir = pathlib.Path(workdir)
    population = read_population(workdir / "population.json")
    members = population["members"]
    varied = varied_fields([member["fields"] for member in members])
    settings = [field for field in varied if field != "seed"]
    config = workdir / "config.json"
    html = page.render(
        "population.html", heading=f"Population {workdir.resolve().name}",
        subtitle=page.count(len(members), "member") + (f" · {', '.join(varied)}" if varied else ""),
        n=len(members), selected=population["selected"], select=population["select"], settings=settings,
        config=json.dumps(read_json(config), indent=2, ensure_ascii=False) if hashes.intact(config) else None,
        cards=_cards(population), curves=_member_curves(population, settings), **_swept(population, settings),
        **_members(population, varied),
    )  # fmt: skip
    path = workdir / "report.html"
    files.write_text(path, html)
    hashes.update(path.parent, path.name)
    return path


def _on_validation(population: Mapping[str, Any], member: Mapping[str, Any]) -> float | None:
    return metrics.finite(member["validation"].get(population["select"]))


def _shown(population: Mapping[str, Any]) -> list[str]:
    """The test metrics to show, at most eight."""
    first = (*HEADLINE, *SEGMENTATION_HEADLINE, "loss")
    return ([m for m in first if m in population["summary"]] or list(population["summary"]))[:8]


def _cards(population: Mapping[str, Any]) -> list[page.Html]:
    best = population["members"][population["selected"]]
    cards = []
    for metric in _shown(population):
        mean = {**population["summary"][metric], "value": population["summary"][metric].get("mean")}
        low, trivial = metrics.finite(mean, "low"), None
        if metric not in LESS_IS_BETTER:
            trivial = best_trivial(population, metric)
        notes = [
            f"best by validation {page.number(metrics.finite(best['test'].get(metric)))}",
            page.verdict(low is not None and low > trivial[1], *trivial) if trivial else "\N{NO-BREAK SPACE}",
        ]
        deviation = metrics.finite(mean, "deviation")
        cards.append(page.score_card(word_of(metric), mean, trivial[1] if trivial else None, notes, deviation))
    return cards


def _setting(member: Mapping[str, Any], settings: Sequence[str]) -> str:
    """Such as "learning_rate 0.01, dropout 0.2"."""
    return ", ".join(f"{f.rpartition('.')[2]} {field_text(member['fields'].get(f))}" for f in settings)


def _floats(values: Sequence[Any]) -> np.ndarray:
    """(n,), NaN where a value is not finite."""
    return np.array([math.nan if metrics.finite(value) is None else value for value in values], float)


def _member_curves(population: Mapping[str, Any], settings: Sequence[str]) -> list[page.Html]:
    members = population["members"]
    labels = list(dict.fromkeys(_setting(member, settings) for member in members))
    coloured = 1 < len(labels) <= len(SERIES)
    parts = []
    for key, title in (("loss", "Training loss"), ("validation", f"{word_of(population['select'])} on validation")):
        curves = [_floats(member["curve"].get(key) or ()) for member in members]
        if not any(np.isfinite(curve).any() for curve in curves):
            parts.append(page.absent(f"No curves: the members have no `curve.{key}`."))
            continue

        def paint(figure: Any, curves: Sequence[np.ndarray] = curves, key: str = key) -> None:
            ax = figure.subplots()
            labelled = set()
            for i, curve in enumerate(curves):
                label = _setting(members[i], settings) if coloured else ""
                colour = SERIES[labels.index(label)] if coloured else BLUE
                x = np.arange(1, len(curve) + 1)
                ax.plot(x, curve, color=colour, linewidth=1.2, alpha=0.6, marker="o" if len(curve) == 1 else None,
                        label=label if label and label not in labelled else None)  # fmt: skip
                labelled.add(label)
            best, epoch = curves[population["selected"]], members[population["selected"]]["best"].get("epoch")
            ax.plot(np.arange(1, len(best) + 1), best, color=INK, linewidth=2.2, label="the best by validation")
            if isinstance(epoch, int) and 0 < epoch <= len(best):
                ax.plot([epoch], [best[epoch - 1]], "o", color=INK, markersize=7)
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
            if key == "loss":
                ax.set_ylim(bottom=0)
            figure.legend(loc="outside lower center", ncols=2)

        ends = [curve[-1] for curve in curves if len(curve) and math.isfinite(curve[-1])]
        caption = f"Ends between {min(ends):.3f} and {max(ends):.3f}." if ends else "No curve ends in a number."
        figure = page.svg(460, 340, f"{title} of each member over epochs. {caption}", paint)
        parts.append(page.card(title, figure, caption))
    return parts


def _swept(population: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A scatter of each numeric field, and a table of the settings that several members share."""
    members = population["members"]
    title = f"{word_of(population['select'])} on validation"
    y = np.array([math.nan if (v := _on_validation(population, m)) is None else v for m in members])
    scatters = []
    for field in settings:
        x = [metrics.finite(member["fields"].get(field)) for member in members]
        if all(value is not None for value in x):
            scatters.append(_scatter(field, title, np.array(x, float), y, population["selected"]))
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for member in members:
        groups.setdefault(_setting(member, settings), []).append(member)
    columns = _shown(population)
    body = []
    for label, group in groups.items():
        numbers = [
            [_on_validation(population, m) for m in group],
            *([metrics.finite(m["test"].get(c)) for m in group] for c in columns),
        ]
        body.append([label, str(len(group)), *map(_mean, numbers)])
    return {
        "scatters": scatters,
        "swept_head": ["Setting", "Members", title, *(f"{word_of(c)} on test" for c in columns)],
        "swept_rows": body if len(groups) < len(members) else [],
    }


def _scatter(field: str, title: str, x: np.ndarray, y: np.ndarray, best: int) -> page.Html:
    """Scores `y` (N,) of members against a field's values `x` (N,), with the mean of each value that several have."""

    def paint(figure: Any) -> None:
        ax = figure.subplots()
        ax.plot(x, y, "o", color=BLUE, alpha=0.6, markersize=6)
        for value in np.unique(x):
            if (same := np.isfinite(y) & (x == value)).sum() > 1:
                ax.plot([value], [y[same].mean()], "_", color=INK, markersize=20, markeredgewidth=2)
        ax.plot([x[best]], [y[best]], "o", color=ORANGE, markerfacecolor="none", markersize=12, markeredgewidth=2)
        if x.min() > 0 and x.max() >= 20 * x.min():
            ax.set_xscale("log")
            ax.minorticks_off()
            ax.xaxis.set_major_formatter("{x:g}")
        if len(np.unique(x)) <= 8:
            ax.set_xticks(np.unique(x))
        ax.set_xlabel(field)
        ax.set_title(title, color=MUTED, fontweight="normal", fontsize=11)
        ax.margins(0.08)

    figure = page.svg(460, 300, f"{title} of each member against {field}", paint)
    return page.card(field, figure, "Ringed: the best by validation. Dashes: means of one value.")


def _mean(values: Sequence[float | None]) -> page.Html | str:
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return "n/a"
    return page.noted(page.number(known.mean()), f"± {known.std(ddof=1):.3f}" if len(known) > 1 else "")


def _members(population: Mapping[str, Any], varied: Sequence[str]) -> dict[str, Any]:
    members, columns, selected = population["members"], _shown(population), population["selected"]
    sign = 1 if population["select"] in LESS_IS_BETTER else -1

    def rank(i: int) -> tuple[bool, bool, float]:
        value = _on_validation(population, members[i])
        return i != selected, value is None, sign * (value or 0.0)

    body: list[list[Any]] = []
    for i in sorted(range(len(members)), key=rank):
        member = members[i]
        star = page.marked("good", "★ best by validation")
        body.append([
            page.bold(i) + " " + star if i == selected else str(i),
            *(field_text(member["fields"].get(field)) for field in varied),
            page.number(member["best"].get("epoch")), page.number(_on_validation(population, member)),
            *(page.number(metrics.finite(member["test"].get(m))) for m in columns),
        ])  # fmt: skip
    numbers = [[_on_validation(population, member) for member in members],
               *([metrics.finite(member["test"].get(m)) for member in members] for m in columns)]  # fmt: skip
    body.append([page.bold("Mean"), *[""] * (len(varied) + 1), *map(_mean, numbers)])
    for name, scores in population["trivial"].items():
        if isinstance(scores, dict):
            cells = [page.muted(page.number(metrics.finite(with_chance(scores).get(m)))) for m in columns]
            body.append([page.muted(word_of(name)), *[""] * (len(varied) + 2), *cells])
    head = ["Member", *varied, "Best epoch", f"{word_of(population['select'])} on validation",
            *(f"{word_of(m)} on test" for m in columns)]  # fmt: skip
    return {"member_head": head, "member_rows": body}
