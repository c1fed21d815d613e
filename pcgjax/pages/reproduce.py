"""Draws the page of pcgjax.reproduce: every paper's tables and figures, under its protocol and under an honest one."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax.metrics import finite
from pcgjax.pages import comparison, page
from pcgjax.pages.ablation import PAPER_NOTE
from pcgjax.pages.classical import CLASSICAL_WORDS, envelope_figures, reading, spectra_figure
from pcgjax.pages.curves import confusion_table, roc_figure, training_curves
from pcgjax.pages.page import INK, ORANGE, SERIES
from pcgjax.pages.sites import databases_card, probe_card
from pcgjax.published import CNN_PAPER
from pcgjax.runs.log import history
from pcgjax.runs.results import read_json, read_predictions, read_results
from pcgjax.runtime import files

TITLES = {"classical": "Shannon energy, Burg spectrum, four classifiers", "cnn": "1D CNN with grouped BCE",
          "hinf_lstm": "CNN-H∞-LSTM with PWL and SAPT", "audio_llm": "Qwen2-Audio with LoRA"}  # fmt: skip
LINES = {
    "paper": "the paper", "ours_paper_protocol": "ours, its protocol", "ours_honest": "ours, people not heard",
    "ours_database_left_out": "ours, database not heard", "trivial": "without listening",
}  # fmt: skip
WORDS = {**CLASSICAL_WORDS, **comparison.WORDS}
# What differs between the two protocols, and why.
WHY = {
    "classical": [
        "As published: split by recording, ten runs, the best of which is reported. Best of ten adds what chance adds, "
        "and one person's clips are on both sides.",
        "Honest: split by person, the mean of ten runs, with an interval that allows for the recordings they share.",
    ],
    "cnn": [
        "As published: 301 recordings are judged, which is the size of the Challenge's validation folder, whose files "
        "are byte-identical copies of training recordings. Where the source has that folder its names are judged, else "
        "150 normal and 151 abnormal ones are drawn, or a fifth where there are too few. Either way people of the test "
        "recordings are in training, too.",
        "Honest: nobody is in two parts. With a database left out, not even the clinic was heard.",
        "Classes and clinics go together in CinC 2016: who is told the database alone, and answers with its share of "
        "abnormal recordings, is hard to beat on all recordings together and is at 0.5 inside each. So beside each "
        "figure stands the mean AUC over databases, and how well the database can be told from the model's features.",
    ],
    "hinf_lstm": [
        "As published: a random 80:20 split. The paper says that no patient is on both sides, but for most of CinC "
        "2016 it is not published who was recorded; here that protocol is by recording. Its validation set of 250 "
        "normal and 250 abnormal recordings would leave too few of these to train on; here it is a share.",
        "Honest: nobody is in two parts, the same people for every system. Always answering normal gets an accuracy of "
        "the normals' share; F1 of an answer that says abnormal to all is shown as the trivial one where it is best.",
        "The paper trains every system for 50 epochs with Adam at 0.001. Here the H-infinity LSTM and its CNN-LSTM "
        "have that; the baselines have the rate, optimizer and epochs of their config, on the same recordings and "
        "splits, and random weights without a file of other ones.",
        "Figures that the paper takes from other papers (its table III) are not reproduced: it ran none of them.",
    ],
    "audio_llm": [
        "As published: options padded to six with repeated wrong answers, so that the right one is the only one that "
        "stands there once: a reader who hears nothing gets most of them. Honest: padded with other classes.",
        "Both protocols divide people, not patient ids: 70 people have two of these. Timing and shape of diastolic "
        "murmurs have one class among the few who have one; there 100 % means nothing.",
        "N.S: without segmentation. W.S: heartbeats alone, cut out by a segmenter trained here on a third of the "
        "training people, on nobody of whom the model is then asked.",
        "Zero-shot: the murmur question alone, Present or Unknown meaning abnormal, on data sets not trained on.",
    ],
}  # fmt: skip


def write(out: pathlib.Path, table: Mapping[str, Any]) -> pathlib.Path:
    """Draws OUT/report.html from what `reproduce.reproduce` left in OUT, and returns its path."""
    sections = [("systems", "Side by side", _systems(table) + _reading(table))]
    for paper, title in TITLES.items():
        rows = [row for row in table["rows"] if row["experiment"] == paper]
        if rows:
            figures = {"classical": _classical, "cnn": _cnn, "hinf_lstm": _hinf_lstm, "audio_llm": _audio_llm}[paper]
            sections.append((paper, title, _prose("What differs, and why", WHY[paper]) + _pivot(rows) +
                             figures(out, table, rows)))  # fmt: skip
    sections.append(("stages", "What ran", _stages(table)))
    done = sum(state["status"] == "done" for state in table["stages"].values())
    subtitle = f"budget {table['budget']} · {done} of {page.count(len(table['stages']), 'stage')} done"
    path = out / "report.html"
    files.write_text(path, page.document("Every paper's table, twice", subtitle, sections))
    return path


def _prose(title: str, says: Sequence[str]) -> str:
    items = "".join(f"<li>{page.escape(said)}</li>" for said in says)
    return f'<div class="card prose"><h3>{page.escape(title)}</h3><ul>{items}</ul></div>'


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["system"], row["dataset"]), {})[row["metric"]] = row
    return found


def summary(table: Mapping[str, Any]) -> str:
    """The rows for a terminal, and beside those of CinC 2016 the site report."""
    lines = []
    head = ("", "paper", "its protocol", "honest", "database left out", "trivial", "mean AUC in databases; probe")
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


def _systems(table: Mapping[str, Any]) -> str:
    """A line for each system on CinC 2016: the paper's headline, ours, and the site report."""
    body = []
    keys = [key for key in LINES if key != "ours_database_left_out"]  # which few have; it is in the paper's own table
    for (system, dataset), by in _groups(table["rows"]).items():
        if dataset not in ("CinC 2016", "cinc2016"):  # the second is the audio LLM's, zero-shot
            continue
        first, site = by["accuracy"], by["accuracy"]["site"]
        cells = [page.number(first["paper"]), *(page.score(first[key]) for key in keys[1:])]
        if site:
            probe = site["probe"].get("trained")
            cells += [page.score(by["auc"]["ours_honest"]), f"<b>{page.score(site['mean_database_auc'])}</b>",
                      page.score(site["database_alone_auc"]),
                      f"{page.score(probe)}<small>chance {page.number(site['probe_chance'], 2)}</small>"
                      if probe else "not probed"]  # fmt: skip
        else:
            cells += ["n/a"] * 4
        body.append([_named(system, first), *cells])
    if not body:
        return ""
    head = ("CinC 2016", *(f"Accuracy: {LINES[key]}" for key in keys), "AUC, people not heard",
            "Mean AUC inside databases", "AUC of the database alone", "Database told from the features")  # fmt: skip
    note = (
        "The last is the balanced accuracy of a probe on people not trained on. Intervals hold 95 % of the scores when "
        "people are drawn anew."
    )
    return page.table(head, body) + f'<p class="small">{note}</p>'


def _named(system: str, row: Mapping[str, Any]) -> str:
    state = "" if row["status"] == "done" else f'<small class="warn">{page.escape(row["status"])}</small>'
    return f"{page.escape(system)}{state}<small>{page.escape(row['epochs'])}</small>"


def _reading(table: Mapping[str, Any]) -> str:
    says = [
        f"Budget: {table['budget']}. Under each system stands for how many epochs, of how many as published, it was "
        "trained, and what else was smaller. Fewer epochs and smaller nets lower both protocols' figures; they do not "
        "explain the distance between them.",
        f"Audio LLM: {table['model']}.",
    ]
    for state in table["stages"].values():
        if state["status"] in ("failed", "not run"):
            says.append(f"{state['status'].capitalize()}: {state['title']}: {state['why']}.")
    return _prose("How to read this", says)


def _pivot(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a paper: one table for those that have the same metrics, five lines a system."""
    tables: dict[tuple[str, ...], list] = {}
    for (system, dataset), by in _groups(rows).items():
        first = next(iter(by.values()))
        lines = []
        for key, word in LINES.items():
            if all(row[key] is None for row in by.values()):
                continue
            cells = [_cell(key, row) for row in by.values()]
            bold = f"<b>{word}</b>" if key == "ours_honest" else word
            if key == "trivial":
                bold = f"<i>{page.escape(', '.join(_trivial_words(by.values())))}</i>"
            lines.append([bold, *cells])
        what = "; ".join(filter(None, (first["epochs"], first["budget"],
                                       first["note"])))  # fmt: skip
        state = f"{first['status']}: {first['why']}" if first["status"] != "done" else ""
        head = f"<b>{page.escape(system)}</b><small>{page.escape(dataset)}</small>"
        tables.setdefault(tuple(by), []).append((head, what, state, lines, first["site"]))
    shown = ""
    for metrics, systems in tables.items():
        body = []
        for head, what, state, lines, site in systems:
            said = "".join(f"<small>{page.escape(_wrapped(text))}</small>".replace("\n", "<br>")
                           for text in (what, _site_text(site)) if text)  # fmt: skip
            warn = f'<small class="warn">{page.escape(_wrapped(state))}</small>'.replace("\n", "<br>") if state else ""
            body.append([head + said + warn, *[""] * len(metrics)])
            body += lines
        shown += page.table(["", *(WORDS.get(m, m.replace("_", " ")) for m in metrics)], body)
    return shown


def _wrapped(text: str, width: int = 40) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def _trivial_words(rows: Any) -> list[str]:
    return list(dict.fromkeys(row["trivial_answer"] for row in rows if row["trivial_answer"]))


def _cell(key: str, row: Mapping[str, Any]) -> str:
    value = row[key]
    if value is None:
        return "–"
    if key == "ours_paper_protocol" and isinstance(value, Mapping) and "best" in value:
        return f"{page.number(value['best'])}<small>mean {page.number(value['mean'])}</small>"
    return page.score(value)


def _inside(site: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.removeprefix('cinc2016-')} {page.number(v)}" for name, v in site["auc"].items())


def _site_text(site: Mapping[str, Any] | None) -> str:
    if not site:
        return ""
    said = f"Sites: AUC inside {_inside(site)}; mean {page.number(site['mean_database_auc'])}."
    if site["database_alone_auc"]:
        said += f" The database alone {page.number(site['database_alone_auc'])} overall."
    if probe := site["probe"]:
        said += f" Database told from the features {page.number(probe['trained'])}"
        said += f", untrained {page.number(probe['untrained'])}" if "untrained" in probe else ""
        said += (
            f", from plain statistics {page.number(probe['statistics'])}; chance {page.number(site['probe_chance'])}."
        )
    return said


# ------------------------------------------------------------------------------------------------------- the papers


def _classical(out: pathlib.Path, table: Mapping[str, Any], rows: Any) -> str:
    workdir = out / "runs" / "classical"
    if not _done(table, "classical"):
        return ""
    asked, results = (read_json(workdir / name) for name in ("experiment.json", "metrics.json"))
    with np.load(workdir / "pictures.npz", allow_pickle=False) as file:
        shown = {name: file[name] for name in file.files}
    target = results["data"]["target"]
    figures = envelope_figures(shown, target) + spectra_figure(shown, target)
    return reading(asked) + "<h3>S1 and S2 on the envelope; spectra</h3>" + figures + _link(workdir, out)


def _cnn(out: pathlib.Path, table: Mapping[str, Any], rows: Any) -> str:
    shown = ""
    for name, word in (("cnn_published", "its protocol"), ("cnn_person", "people not heard")):
        folders = [path for path in sorted((out / "runs" / name).glob("*/metrics.json"))
                   if _done(table, f"{name}/{path.parent.name}")]  # fmt: skip
        if folders:
            runs = [
                comparison.run_row(path.parent, f"{path.parent.name.replace('_', ' ').capitalize()}")
                for path in folders
            ]
            shown += f"<h3>Four configurations, {word}</h3>" + comparison.bars_figure(runs, CNN_PAPER)
    return shown + _both(out, table, "cnn_published/filter", "cnn_person/filter", "Filter")


def _hinf_lstm(out: pathlib.Path, table: Mapping[str, Any], rows: Any) -> str:
    groups = [(system, by) for (system, _), by in _groups(rows).items() if by["f1"]["ours_honest"] is not None]
    bars = ""
    if groups:
        series = {LINES[key]: [by["f1"][key] for _, by in groups] for key in list(LINES)[1:3]}
        bars = "<h3>F1 of all systems</h3>" + bar_chart(
            [system for system, _ in groups], series, [by["f1"]["paper"] for _, by in groups],
            [by["f1"]["trivial"] for _, by in groups],
        )  # fmt: skip
    note = f'<p class="small">{page.escape(PAPER_NOTE)}</p>'
    return bars + note + _both(out, table, "hinf_lstm_published", "hinf_lstm_person", "CNN-H∞-LSTM")


def _both(out: pathlib.Path, table: Mapping[str, Any], published: str, honest: str, name: str) -> str:
    """A run's ROC curve, confusion and training under both protocols, and its site report."""
    shown = ""
    for path, word in ((published, "its protocol"), (honest, "people not heard")):
        if not _done(table, path):
            continue
        workdir = out / "runs" / path
        test = read_results(workdir / "metrics.json")["test"]
        rows = [row for row in read_predictions(workdir / "predictions.csv") if row["split"] == "test"]
        y, p = (np.array([row[key] for row in rows]) for key in ("label", "probability"))
        drawn = roc_figure(test, y, p) if 0 < y.sum() < len(y) else ""
        drawn += confusion_table(test)
        shown += f'<h3>{page.escape(name)}, {word}</h3><div class="grid two">{drawn}</div>'
        shown += training_curves(history(workdir / "metrics.jsonl")) + _link(workdir, out)
    if (out / "runs" / honest / "sites.json").exists():
        found = json.loads((out / "runs" / honest / "sites.json").read_text())
        shown += f"<h3>Sites: {page.escape(name)}, people not heard</h3>"
        shown += databases_card(found) + probe_card(found)
    return shown


def _audio_llm(out: pathlib.Path, table: Mapping[str, Any], rows: Any) -> str:
    asked = [by for (_, dataset), by in _groups(rows).items() if dataset == "CirCor"]
    tasks = [m for m in dict.fromkeys(m for by in asked for m in by) if any(by[m]["ours_honest"] for by in asked)]
    shown = ""
    for key in ("ours_honest", "ours_paper_protocol"):
        if tasks and all(by[m][key] for by in asked for m in tasks):
            series = {by[tasks[0]]["system"]: [by[m][key] for m in tasks] for by in asked}
            figures = [asked[-1][m]["paper"] for m in tasks]
            words = [WORDS.get(m, m.replace("_", "\n")) for m in tasks]
            title = f"<h3>Task by task, {LINES[key]}</h3>"
            shown += title + bar_chart(words, series, figures, [asked[-1][m]["trivial"] for m in tasks])
    return shown + (_link(out / "runs" / "llm_scores", out) if _done(table, "llm_scores") else "")


def bar_chart(names: Sequence[str], series: Mapping[str, Sequence[Any]], paper: Sequence, trivial: Sequence) -> str:
    """Scores S of some systems or tasks side by side, with the paper's figures as diamonds and trivial answers as
    ticks; the lists are as long as `names`, with None for what is not known."""
    width = 0.8 / len(series)

    def paint(figure: Any) -> None:
        from matplotlib.lines import Line2D

        ax = figure.subplots()
        for i, (label, scores) in enumerate(series.items()):
            x = np.arange(len(names)) + (i - (len(series) - 1) / 2) * width
            ax.bar(x, [finite(s) or 0 for s in scores], width * 0.9, color=SERIES[2 * i], alpha=0.8, label=label)
            for at, s in zip(x, scores, strict=True):
                low, high = finite(s, "low"), finite(s, "high")
                if low is not None:
                    ax.plot([at, at], [low, high], color=INK, linewidth=1.2, marker="_", markersize=5)
        for at, (figure_, constant) in enumerate(zip(paper, trivial, strict=True)):
            if figure_ is not None:
                ax.plot([at], [figure_], marker="D", color=INK, markerfacecolor="none", markersize=8)
            if constant is not None:
                ax.plot([at - 0.42, at + 0.42], [constant, constant], color=ORANGE, linewidth=2)
        ax.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=9)
        ax.tick_params(axis="x", colors=INK, length=0)
        ax.set_ylim(0, 1.04)
        ax.grid(False, axis="x")
        handles, labels = ax.get_legend_handles_labels()
        handles.append(Line2D([], [], marker="D", color=INK, markerfacecolor="none", markersize=8, linewidth=0))
        handles.append(Line2D([], [], color=ORANGE, linewidth=2))
        figure.legend(handles, [*labels, "the paper", "without listening"], loc="outside upper left", ncols=4)

    told = "; ".join(
        f"{label}: " + ", ".join(f"{n} {page.number(finite(s))}" for n, s in zip(names, scores, strict=True))
        for label, scores in series.items()
    ).replace("\n", " ")
    drawn = page.svg(960, 380, f"Scores beside the paper's. {told}", paint)
    return page.card("", drawn, "Whiskers are 95 % intervals over people.")


# ----------------------------------------------------------------------------------------------------------- the end


def _done(table: Mapping[str, Any], run: str) -> bool:
    return table["stages"].get(run.replace("/", "_"), {}).get("status") == "done"


def _link(workdir: pathlib.Path, out: pathlib.Path) -> str:
    path = (workdir / "report.html").relative_to(out)
    return f'<p class="small">All of this run: <a href="{page.escape(path)}">{page.escape(path)}</a></p>'


def _stages(table: Mapping[str, Any]) -> str:
    body = [
        [page.escape(state["title"]), state["status"] if state["status"] == "done" else
         f'<span class="warn">{page.escape(state["status"])}</span>', f"{state.get('seconds', 0):.0f}",
         page.escape(_wrapped(state.get("why", ""), 60)).replace("\n", "<br>")]
        for state in table["stages"].values()
    ]  # fmt: skip
    spent = sum(state.get("seconds", 0) for state in table["stages"].values())
    note = f'<p class="small">{spent / 60:.1f} minutes together, of the starts that ended a stage.</p>'
    out = "".join(
        f"<p>{page.escape(title)}, left out: "
        + page.escape("; ".join(f"{one['id']} ({one['reason']})" for one in clips)) + ".</p>"
        for title, clips in table["left_out"].items()
    )  # fmt: skip
    out = f'<div class="card prose"><h3>What could not be used</h3>{out}</div>' if out else ""
    facts = {"source": table["source"], "model": table["model"], "versions": table["versions"]}
    shown = page.table(("Stage", "Status", "Seconds", "Why"), body)
    return f'{shown}{note}{out}<div class="card">{page.facts(facts)}</div>'
