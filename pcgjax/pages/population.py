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
from pcgjax.pages.comparison import LESS_IS_BETTER, field_text, metric_word, muted, varied_fields
from pcgjax.pages.page import BLUE, INK, MUTED, ORANGE, SERIES
from pcgjax.pages.words import HEADLINE, best_trivial
from pcgjax.runs.results import read_json, read_population
from pcgjax.runtime import files
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
    found = read_population(workdir / "population.json")
    members = found["members"]
    varied = varied_fields([member["fields"] for member in members])
    settings = [field for field in varied if field != "seed"]
    sections = [
        ("scores", "Scores", _summary(found)),
        ("training", "Learning curves", _member_curves(found, settings)),
        *([("swept", "What the settings do", _swept(found, settings))] if settings else []),
        ("members", "Members", _members(found, varied)),
    ]
    config = workdir / "config.json"
    if config.exists():
        text = json.dumps(read_json(config), indent=2, ensure_ascii=False)
        shown = f"<details><summary>config.json</summary><pre>{page.escape(text)}</pre></details>"
        sections.append(("setup", "Setup", shown))
    counted = page.count(len(members), "member") + (f" · {', '.join(varied)}" if varied else "")
    path = workdir / "report.html"
    files.write_text(path, page.document(f"Population {workdir.resolve().name}", counted, sections))
    return path


def _on_validation(found: Mapping[str, Any], member: Mapping[str, Any]) -> float | None:
    return metrics.finite(member["validation"].get(found["select"]))


def _shown(found: Mapping[str, Any]) -> list[str]:
    """The test metrics to show, at most eight."""
    first = (*HEADLINE, *SEGMENTATION_HEADLINE, "loss")
    return ([m for m in first if m in found["summary"]] or list(found["summary"]))[:8]


def _summary(found: Mapping[str, Any]) -> str:
    n = len(found["members"])
    best = found["members"][found["selected"]]
    cards = []
    for metric in _shown(found):
        s = found["summary"][metric]
        mean, deviation, low, high = (metrics.finite(s, key) for key in ("mean", "deviation", "low", "high"))
        trivial = best_trivial(found, metric) if metric not in LESS_IS_BETTER else None
        note = "&nbsp;"
        if trivial:
            clear = low is not None and low > trivial[1]
            kind, verdict = ("good", "clearly above") if clear else ("warn", "not clearly above")
            note = f'<span class="{kind}">{verdict}</span> {page.escape(trivial[0])} ({page.number(trivial[1])})'
        between = f"95 % interval {page.interval(low, high)}" if low is not None else "no interval"
        spread = f' <span class="small">± {page.number(deviation)}</span>' if deviation is not None else ""
        cards.append(
            f'<div class="card score"><h3>{page.escape(metric_word(metric))}</h3><p class="big">{page.number(mean)}{spread}'
            f"</p>{page.gauge(mean, low, high, trivial[1] if trivial else None)}"
            f'<p class="small">{between}</p><p class="small">best by validation '
            f'{page.number(metrics.finite(best["test"].get(metric)))}</p><p class="small">{note}</p></div>'
        )
    says = [
        f"Large numbers are means of the {n} members' test scores, ± their standard deviation.",
        "Intervals hold the mean with 95 % certainty when members are trained anew with other seeds, not when other "
        "people are judged: each member is judged on the same ones. Where members differ in more than the seed, they "
        "mix good settings and bad.",
        f"Member {found['selected']} is the best by {page.escape(metric_word(found['select']))} on validation. The best of "
        f"{n} is so partly by luck: its validation score is too high, its test score is not.",
    ]
    prose = "".join(f"<li>{said}</li>" for said in says)
    return (
        f'<div class="cards">{"".join(cards)}</div><div class="card prose"><h3>How to read this</h3><ul>{prose}</ul>'
        "</div>"
    )


def _setting(member: Mapping[str, Any], settings: Sequence[str]) -> str:
    """Such as "learning_rate 0.01, dropout 0.2"."""
    return ", ".join(f"{f.rpartition('.')[2]} {field_text(member['fields'].get(f))}" for f in settings)


def _member_curves(found: Mapping[str, Any], settings: Sequence[str]) -> str:
    members = found["members"]
    labels = list(dict.fromkeys(_setting(member, settings) for member in members))
    coloured = 1 < len(labels) <= len(SERIES)
    parts = []
    for key, title in (("loss", "Training loss"), ("validation", f"{metric_word(found['select'])} on validation")):
        curves = [np.array([math.nan if metrics.finite(v) is None else v for v in member["curve"].get(key) or ()], float)
                  for member in members]  # fmt: skip
        if not any(np.isfinite(curve).any() for curve in curves):
            parts.append(page.absent(f"No curves: the members have no `curve.{key}`."))
            continue

        def paint(figure: Any, curves: Sequence[np.ndarray] = curves, key: str = key) -> None:
            ax = figure.subplots()
            told = set()
            for i, curve in enumerate(curves):
                label = _setting(members[i], settings) if coloured else ""
                colour = SERIES[labels.index(label)] if coloured else BLUE
                x = np.arange(1, len(curve) + 1)
                ax.plot(x, curve, color=colour, linewidth=1.2, alpha=0.6, marker="o" if len(curve) == 1 else None,
                        label=label if label and label not in told else None)  # fmt: skip
                told.add(label)
            best, epoch = curves[found["selected"]], members[found["selected"]]["best"].get("epoch")
            ax.plot(np.arange(1, len(best) + 1), best, color=INK, linewidth=2.2, label="the best by validation")
            if isinstance(epoch, int) and 0 < epoch <= len(best):
                ax.plot([epoch], [best[epoch - 1]], "o", color=INK, markersize=7)
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
            if key == "loss":
                ax.set_ylim(bottom=0)
            figure.legend(loc="outside lower center", ncols=2)

        ends = [curve[-1] for curve in curves if len(curve) and math.isfinite(curve[-1])]
        told = f"Ends between {min(ends):.3f} and {max(ends):.3f}." if ends else "No curve ends in a number."
        figure = page.svg(460, 340, f"{title} of each member over epochs. {told}", paint)
        parts.append(page.card(title, figure, told))
    return f'<div class="grid two">{"".join(parts)}</div>'


def _swept(found: Mapping[str, Any], settings: Sequence[str]) -> str:
    """A scatter of each numeric field, and a table of the settings that several members share."""
    members = found["members"]
    y = np.array([math.nan if (v := _on_validation(found, m)) is None else v for m in members])
    title = f"{metric_word(found['select'])} on validation"
    parts = []
    for field in settings:
        x = [metrics.finite(member["fields"].get(field)) for member in members]
        if any(value is None for value in x):
            continue

        def paint(figure: Any, field: str = field, x: np.ndarray = np.array(x, float)) -> None:  # noqa: B008
            ax = figure.subplots()
            ax.plot(x, y, "o", color=BLUE, alpha=0.6, markersize=6)
            for value in np.unique(x):
                if (same := np.isfinite(y) & (x == value)).sum() > 1:
                    ax.plot([value], [y[same].mean()], "_", color=INK, markersize=20, markeredgewidth=2)
            best = found["selected"]
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

        alt = f"{title} of each member against {field}"
        caption = "Ringed: the best by validation. Dashes: means of one value."
        parts.append(page.card(field, page.svg(460, 300, alt, paint), caption))
    # An empty cell keeps a single figure at half the page.
    scatters = f'<div class="grid two">{"".join(parts)}<div></div></div>' if parts else ""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for member in members:
        groups.setdefault(_setting(member, settings), []).append(member)
    if len(groups) == len(members):
        return scatters or page.absent("No numeric field was swept.")
    columns = _shown(found)
    body = []
    for label, own in groups.items():
        numbers = [
            [_on_validation(found, m) for m in own],
            *([metrics.finite(m["test"].get(c)) for m in own] for c in columns),
        ]
        body.append([page.escape(label), str(len(own)), *map(_mean, numbers)])
    head = ["Setting", "Members", title, *(f"{metric_word(c)} on test" for c in columns)]
    return scatters + page.table(head, body) + '<p class="small">Means, and beneath them standard deviations.</p>'


def _mean(values: Sequence[float | None]) -> str:
    there = np.array([value for value in values if value is not None])
    if not len(there):
        return "n/a"
    return page.number(there.mean()) + (f"<small>± {there.std(ddof=1):.3f}</small>" if len(there) > 1 else "")


def _members(found: Mapping[str, Any], varied: Sequence[str]) -> str:
    members, columns = found["members"], _shown(found)
    sign = 1 if found["select"] in LESS_IS_BETTER else -1

    def rank(i: int) -> tuple[bool, bool, float]:
        value = _on_validation(found, members[i])
        return i != found["selected"], value is None, sign * (value or 0.0)

    body = []
    for i in sorted(range(len(members)), key=rank):
        member = members[i]
        name = f'<b>{i}</b> <span class="good">★ best by validation</span>' if i == found["selected"] else str(i)
        body.append([
            name, *(page.escape(field_text(member["fields"].get(field))) for field in varied),
            page.number(member["best"].get("epoch")), page.number(_on_validation(found, member)),
            *(page.number(metrics.finite(member["test"].get(m))) for m in columns),
        ])  # fmt: skip
    numbers = [[_on_validation(found, member) for member in members],
               *([metrics.finite(member["test"].get(m)) for member in members] for m in columns)]  # fmt: skip
    body.append(["<b>Mean</b>", *[""] * (len(varied) + 1), *map(_mean, numbers)])
    answers = {name: scores for name, scores in found["trivial"].items() if isinstance(scores, dict)}
    for name, scores in answers.items():
        scores = {"mean_database_auc": 0.5, **scores} if "auc" in scores else scores
        shown = (muted(page.number(metrics.finite(scores.get(m)))) for m in columns)
        body.append([muted(page.escape(metric_word(name))), *[""] * (len(varied) + 2), *shown])
    head = ["Member", *varied, "Best epoch", f"{metric_word(found['select'])} on validation",
            *(f"{metric_word(m)} on test" for m in columns)]  # fmt: skip
    note = "The best first. Beneath the mean is the standard deviation of the members."
    return page.table(head, body) + f'<p class="small">{note}</p>'
