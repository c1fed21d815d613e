"""Draws the page of pcgjax.reproduce: every paper's tables and figures, under its protocol and with held-out people."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax.metrics import finite
from pcgjax.pages import comparison, page
from pcgjax.pages.ablation import PAPER_NOTE
from pcgjax.pages.classical import envelope_figures, reading, spectra_figure
from pcgjax.pages.curves import confusion_table, roc_figure, training_curves
from pcgjax.pages.page import INK, ORANGE, SERIES
from pcgjax.pages.sites import databases_card, probe_card
from pcgjax.pages.words import LINES, word_of
from pcgjax.published import CNN_PAPER
from pcgjax.runs import log
from pcgjax.runs.results import read_json, read_predictions, read_results
from pcgjax.runtime import files

TITLES = {"classical": "Shannon energy, Burg spectrum, four classifiers", "cnn": "1D CNN with grouped BCE",
          "hinf_lstm": "CNN-H∞-LSTM with PWL and SAPT", "audio_llm": "Qwen2-Audio with LoRA"}  # fmt: skip
_HELD_OUT = "held-out people"
# A part of a paper's section: its heading and its HTML.
Block = tuple[str, Any]
# What differs between the two protocols, and why.
WHY = {
    "classical": [
        "As published: split by recording, ten runs, the best of which is reported. The best of ten is partly "
        "luck, and one person's clips are on both sides.",
        "Held out: split by person, the mean of ten runs, with an interval that allows for the recordings they share.",
    ],
    "cnn": [
        "As published: 301 recordings are judged, which is the size of the Challenge's validation folder, whose files "
        "are byte-identical copies of training recordings. Where the source has that folder its names are judged, else "
        "150 normal and 151 abnormal ones are drawn, or a fifth where there are too few. Either way people of the test "
        "recordings are in training, too.",
        "Held out: nobody is in two parts. With a database left out, the clinic is new as well.",
        "Classes and clinics go together in CinC 2016: a baseline that knows the database alone, and answers with its "
        "share of abnormal recordings, is hard to beat on all recordings together and is at 0.5 inside each. So beside "
        "each figure stands the mean AUC over databases, and how well the features predict the database.",
    ],
    "hinf_lstm": [
        "As published: a random 80:20 split. The paper says that no patient is on both sides, but for most of CinC "
        "2016 it is not published who was recorded; here that protocol is by recording. Its validation set of 250 "
        "normal and 250 abnormal recordings would leave too few of these to train on; here it is a share.",
        "Held out: nobody is in two parts, the same people for every system. Always answering normal gets an accuracy "
        "of the normals' share; the F1 of always answering abnormal is the baseline where it is best.",
        "The paper trains every system for 50 epochs with Adam at 0.001. Here the H-infinity LSTM and its CNN-LSTM "
        "have that; the other systems have the rate, optimizer and epochs of their config, on the same recordings and "
        "splits, and random weights without a file of other ones.",
        "Figures that the paper takes from other papers (its table III) are not reproduced: it ran none of them.",
    ],
    "audio_llm": [
        "As published: options padded to six with repeated wrong answers, so that the right one is the only one that "
        "stands there once: without the audio one gets most of them. Ours: padded with other classes.",
        "Both protocols divide people, not patient ids: 70 people have two of these. Timing and shape of diastolic "
        "murmurs have one class among the few who have one; there 100 % means nothing.",
        "N.S: without segmentation. W.S: heartbeats alone, cut out by a segmenter trained here on a third of the "
        "training people, none of whom the audio LLM is asked about.",
        "Zero-shot: the murmur question alone, Present or Unknown meaning abnormal, on data sets not trained on.",
    ],
}  # fmt: skip


def write(out: pathlib.Path, table: Mapping[str, Any]) -> pathlib.Path:
    """Draws OUT/report.html from what `reproduce.run.reproduce` left in OUT, and returns its path."""
    drawn = {"classical": _classical, "cnn": _cnn, "hinf_lstm": _hinf_lstm, "audio_llm": _audio_llm}
    papers = []
    for paper, title in TITLES.items():
        rows = [row for row in table["rows"] if row["experiment"] == paper]
        if rows:
            papers.append((paper, title, WHY[paper], _tables(rows), drawn[paper](out, table, rows)))
    states = table["stages"].values()
    done = sum(state["status"] == "done" for state in states)
    system_head, system_rows = _systems(table)
    html = page.render(
        "reproduce.html", heading="Every paper's table, twice",
        subtitle=f"budget {table['budget']} · {done} of {page.count(len(states), 'stage')} done",
        budget=table["budget"], model=table["model"], system_head=system_head, system_rows=system_rows,
        not_done=[state for state in states if state["status"] in ("failed", "not run")], papers=papers,
        stage_rows=[_stage_row(state) for state in states],
        minutes=sum(state.get("seconds", 0) for state in states) / 60,
        left_out=[(title, "; ".join(f"{one['id']} ({one['reason']})" for one in clips))
                  for title, clips in table["left_out"].items()],
        facts_of_run={"source": table["source"], "model": table["model"], "versions": table["versions"]},
    )  # fmt: skip
    path = out / "report.html"
    files.write_text(path, html)
    return path


def _stage_row(state: Mapping[str, Any]) -> list[Any]:
    status = state["status"] if state["status"] == "done" else page.marked("warn", state["status"])
    why = page.lines(textwrap.wrap(state.get("why", ""), 60))
    return [state["title"], status, f"{state.get('seconds', 0):.0f}", why]


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    """{(system, data set): {metric: row}}"""
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["system"], row["dataset"]), {})[row["metric"]] = row
    return groups


def summary(table: Mapping[str, Any]) -> str:
    """The rows for a terminal, and beside those of CinC 2016 the site report."""
    lines = []
    head = ("", "paper", "its protocol", "held-out people", "database left out", "baseline",
            "mean AUC in databases; probe")  # fmt: skip
    for named, by in _groups(table["rows"]).items():
        body = []
        for metric, row in by.items():
            beside = ""
            if site := row["site"]:
                probe = "zero-shot, not probed"
                if site["probe"]:
                    chance = page.number(site["probe_chance"])
                    probe = f"{page.number(finite(site['probe']['trained']))} (chance {chance})"
                beside = f"{page.number(finite(site['mean_database_auc']))} ({_inside(site)}); {probe}"
            body.append([metric, *(page.number(finite(row[key])) for key in LINES), beside])
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        first = next(iter(by.values()))
        lines.append(f"\n{' · '.join(named)}" + (f": {first['status']}, {first['why']}" if first["why"] else ""))
        lines += ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
                  for line in (head, *body)]  # fmt: skip
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- side by side


def _systems(table: Mapping[str, Any]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """A line for each system on CinC 2016: the paper's headline, ours, and the site report."""
    body = []
    keys = [key for key in LINES if key != "ours_database_left_out"]  # which few have; it is in the paper's own table
    for (system, dataset), by in _groups(table["rows"]).items():
        if dataset not in ("CinC 2016", "cinc2016"):  # the second is the audio LLM's, zero-shot
            continue
        first, site = by["accuracy"], by["accuracy"]["site"]
        cells: list[Any] = [page.number(first["paper"]), *(page.score(first[key]) for key in keys[1:])]
        if site:
            probe = site["probe"].get("trained")
            cells += [
                page.score(by["auc"]["ours_honest"]), page.bold(page.score(site["mean_database_auc"])),
                page.score(site["database_alone_auc"]),
                page.noted(page.score(probe), f"chance {page.number(site['probe_chance'], 2)}") if probe
                else "not probed",
            ]  # fmt: skip
        else:
            cells += ["n/a"] * 4
        name = page.noted(system, "" if first["status"] == "done" else first["status"], "warn")
        body.append([page.noted(name, first["epochs"]), *cells])
    head = ("CinC 2016", *(f"Accuracy: {LINES[key]}" for key in keys), f"AUC, {_HELD_OUT}",
            "Mean AUC inside databases", "AUC of the database alone",
            "Database predicted from the features")  # fmt: skip
    return head, body


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[page.Html]:
    """The rows of a paper: one table for those that have the same metrics, five lines a system."""
    tables: dict[tuple[str, ...], list[list[Any]]] = {}
    for (system, dataset), by in _groups(rows).items():
        body = tables.setdefault(tuple(by), [])
        body.append([_heading(system, dataset, next(iter(by.values()))), *[""] * len(by)])
        for key, word in LINES.items():
            if any(row[key] is not None for row in by.values()):
                label: Any = page.bold(word) if key == "ours_honest" else word
                if key == "trivial":
                    label = page.italic(", ".join(_trivial_words(by.values())))
                body.append([label, *(_cell(key, row) for row in by.values())])
    return [page.table(["", *map(word_of, names)], body) for names, body in tables.items()]


def _heading(system: str, dataset: str, row: Mapping[str, Any]) -> page.Html:
    """A system's name, and beneath it data set, budget, site report and what was not done."""
    heading = page.noted(page.bold(system), dataset)
    budget = "; ".join(filter(None, (row["epochs"], row["budget"], row["note"])))
    for text in filter(None, (budget, _site_text(row["site"]))):
        heading = page.noted(heading, textwrap.wrap(text, 40))
    state = f"{row['status']}: {row['why']}" if row["status"] != "done" else ""
    return page.noted(heading, textwrap.wrap(state, 40), "warn")


def _trivial_words(rows: Any) -> list[str]:
    return list(dict.fromkeys(row["trivial_answer"] for row in rows if row["trivial_answer"]))


def _cell(key: str, row: Mapping[str, Any]) -> page.Html | str:
    value = row[key]
    if value is None:
        return "–"
    if key == "ours_paper_protocol" and isinstance(value, Mapping) and "best" in value:
        return page.noted(page.number(value["best"]), f"mean {page.number(value['mean'])}")
    return page.score(value)


def _inside(site: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.removeprefix('cinc2016-')} {page.number(v)}" for name, v in site["auc"].items())


def _site_text(site: Mapping[str, Any] | None) -> str:
    if not site:
        return ""
    text = f"Sites: AUC inside {_inside(site)}; mean {page.number(site['mean_database_auc'])}."
    if site["database_alone_auc"]:
        text += f" The database alone {page.number(site['database_alone_auc'])} overall."
    if probe := site["probe"]:
        text += f" Database predicted from the features {page.number(probe['trained'])}"
        text += f", untrained {page.number(probe['untrained'])}" if "untrained" in probe else ""
        text += (
            f", from plain statistics {page.number(probe['statistics'])}; chance {page.number(site['probe_chance'])}."
        )
    return text


# ------------------------------------------------------------------------------------------------------- the papers


def _classical(out: pathlib.Path, table: Mapping[str, Any], rows: Any) -> list[Block]:
    workdir = out / "runs" / "classical"
    if not _done(table, "classical"):
        return []
    experiment, results = (read_json(workdir / name) for name in ("experiment.json", "metrics.json"))
    with np.load(workdir / "pictures.npz", allow_pickle=False) as file:
        shown = {name: file[name] for name in file.files}
    target = results["data"]["target"]
    figures = envelope_figures(shown, target) + spectra_figure(shown, target)
    return [("", reading(experiment)), ("S1 and S2 on the envelope; spectra", figures + _link(workdir, out))]


def _cnn(out: pathlib.Path, table: Mapping[str, Any], rows: Any) -> list[Block]:
    blocks = []
    for name, word in (("cnn_published", "its protocol"), ("cnn_person", _HELD_OUT)):
        folders = [path.parent for path in sorted((out / "runs" / name).glob("*/metrics.json"))
                   if _done(table, f"{name}/{path.parent.name}")]  # fmt: skip
        if folders:
            runs = [comparison.run_row(folder, folder.name.replace("_", " ").capitalize()) for folder in folders]
            blocks.append((f"Four configurations, {word}", comparison.bars_figure(runs, CNN_PAPER)))
    return blocks + _both(out, table, "cnn_published/filter", "cnn_person/filter", "Filter")


def _hinf_lstm(out: pathlib.Path, table: Mapping[str, Any], rows: Any) -> list[Block]:
    groups = [(system, by) for (system, _), by in _groups(rows).items() if by["f1"]["ours_honest"] is not None]
    blocks: list[Block] = []
    if groups:
        series = {LINES[key]: [by["f1"][key] for _, by in groups] for key in list(LINES)[1:3]}
        blocks.append(("F1 of all systems", bar_chart(
            [system for system, _ in groups], series, [by["f1"]["paper"] for _, by in groups],
            [by["f1"]["trivial"] for _, by in groups],
        )))  # fmt: skip
    blocks.append(("", page.small(PAPER_NOTE)))
    return blocks + _both(out, table, "hinf_lstm_published", "hinf_lstm_person", "CNN-H∞-LSTM")


def _both(out: pathlib.Path, table: Mapping[str, Any], published: str, honest: str, name: str) -> list[Block]:
    """A run's ROC curve, confusion and training under both protocols, and its site report."""
    blocks: list[Block] = []
    for path, word in ((published, "its protocol"), (honest, _HELD_OUT)):
        if not _done(table, path):
            continue
        workdir = out / "runs" / path
        test = read_results(workdir / "metrics.json")["test"]
        rows = [row for row in read_predictions(workdir / "predictions.csv") if row["split"] == "test"]
        y, p = (np.array([row[key] for row in rows]) for key in ("label", "probability"))
        figures = [roc_figure(test, y, p)] if 0 < y.sum() < len(y) else []
        curves = training_curves(log.history(workdir / "metrics.jsonl"))
        blocks.append((f"{name}, {word}", page.pair([*figures, confusion_table(test)]) + curves + _link(workdir, out)))
    sites = out / "runs" / honest / "sites.json"
    if sites.exists():
        report = read_json(sites)
        blocks.append((f"Sites: {name}, {_HELD_OUT}", databases_card(report) + probe_card(report)))
    return blocks


def _audio_llm(out: pathlib.Path, table: Mapping[str, Any], rows: Any) -> list[Block]:
    groups = [by for (_, dataset), by in _groups(rows).items() if dataset == "CirCor"]
    tasks = [m for m in dict.fromkeys(m for by in groups for m in by) if any(by[m]["ours_honest"] for by in groups)]
    blocks: list[Block] = []
    for key in ("ours_honest", "ours_paper_protocol"):
        if tasks and all(by[m][key] for by in groups for m in tasks):
            series = {by[tasks[0]]["system"]: [by[m][key] for m in tasks] for by in groups}
            last = groups[-1]
            chart = bar_chart([*map(word_of, tasks)], series, [last[m]["paper"] for m in tasks],
                              [last[m]["trivial"] for m in tasks])  # fmt: skip
            blocks.append((f"Task by task, {LINES[key]}", chart))
    return blocks + ([("", _link(out / "runs" / "llm_scores", out))] if _done(table, "llm_scores") else [])


def bar_chart(
    names: Sequence[str], series: Mapping[str, Sequence[Any]], paper: Sequence, trivial: Sequence
) -> page.Html:
    """Scores S of some systems or tasks side by side, with the paper's figures as diamonds and baselines as ticks;
    the lists are as long as `names`, with None for what is not known."""
    width = 0.8 / len(series)

    def paint(figure: Any) -> None:
        from matplotlib.lines import Line2D

        ax = figure.subplots()
        for i, (label, scores) in enumerate(series.items()):
            x = np.arange(len(names)) + (i - (len(series) - 1) / 2) * width
            ax.bar(x, [finite(s) or 0 for s in scores], width * 0.9, color=SERIES[2 * i], alpha=0.8, label=label)
            for at, s in zip(x, scores, strict=True):
                _, low, high = page.bounds(s)
                if low is not None:
                    ax.plot([at, at], [low, high], color=INK, linewidth=1.2, marker="_", markersize=5)
        for at, (published, constant) in enumerate(zip(paper, trivial, strict=True)):
            if published is not None:
                ax.plot([at], [published], marker="D", color=INK, markerfacecolor="none", markersize=8)
            if constant is not None:
                ax.plot([at - 0.42, at + 0.42], [constant, constant], color=ORANGE, linewidth=2)
        ax.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=9)
        ax.tick_params(axis="x", colors=INK, length=0)
        ax.set_ylim(0, 1.04)
        ax.grid(False, axis="x")
        handles, labels = ax.get_legend_handles_labels()
        handles.append(Line2D([], [], marker="D", color=INK, markerfacecolor="none", markersize=8, linewidth=0))
        handles.append(Line2D([], [], color=ORANGE, linewidth=2))
        figure.legend(handles, [*labels, "the paper", "baseline"], loc="outside upper left", ncols=4)

    summary = "; ".join(
        f"{label}: " + ", ".join(f"{n} {page.number(finite(s))}" for n, s in zip(names, scores, strict=True))
        for label, scores in series.items()
    )
    figure = page.svg(960, 380, f"Scores beside the paper's. {summary}", paint)
    return page.card("", figure, "Whiskers are 95 % intervals over people.")


# ----------------------------------------------------------------------------------------------------------- the end


def _done(table: Mapping[str, Any], run: str) -> bool:
    return table["stages"].get(run.replace("/", "_"), {}).get("status") == "done"


def _link(workdir: pathlib.Path, out: pathlib.Path) -> page.Html:
    return page.run_link((workdir / "report.html").relative_to(out))
