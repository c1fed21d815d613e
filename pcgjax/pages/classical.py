"""The page of the classical chain."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pcgjax import datasets
from pcgjax.datasets import DIASTOLE, S1, SYSTOLE
from pcgjax.pages import page
from pcgjax.published import PAPER_NOTE
from pcgjax.runtime import files

CLASSIFIERS = ("knn", "svm", "mlp", "logistic")
SETS, PROTOCOLS = ("unbalanced", "balanced"), ("record", "person")
SCORES = ("accuracy", "sensitivity", "specificity", "auc")
CLASSICAL_WORDS = {
    "knn": "kNN", "svm": "SVM, polynomial", "mlp": "MLP", "logistic": "Logistic regression", "accuracy": "Accuracy",
    "sensitivity": "Sensitivity", "specificity": "Specificity", "auc": "AUC",
    "mean_accuracy": "MAcc", "f1": "F1",
}  # fmt: skip
SHOWN_S = 5.0


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
    """Draws `workdir/report.html` from what `run` left there, and returns its path."""
    workdir = pathlib.Path(workdir)
    results = json.loads((workdir / "metrics.json").read_text())
    asked = json.loads((workdir / "experiment.json").read_text())
    with np.load(workdir / "pictures.npz", allow_pickle=False) as file:
        shown = {name: file[name] for name in file.files}
    positive = results["data"]["target"]
    sections = []
    if asked:
        sections.append(("experiment", "The paper's experiment", "".join(_tables(asked)) + reading(asked)))
    sections += [
        ("split", "On people not heard", _four(results)),
        ("sounds", "S1 and S2 on the envelope", envelope_figures(shown, positive) + _picked(results["picking"])),
        ("spectra", "Spectra of systole and diastole", spectra_figure(shown, positive)),
        ("setup", "Setup", _setup(results, (workdir / "config.json").read_text())),
    ]
    test = results["test"]
    counts = f"{test['recordings']} test recordings, {page.count(test['people'], 'person', 'people')}"
    files.write_text(workdir / "report.html", page.document(f"Run {workdir.resolve().name}", counts, sections))
    return workdir / "report.html"


def _tables(asked: Mapping[str, Any]) -> list[str]:
    parts = []
    for of_set in SETS:
        rows = {(r["classifier"], r["protocol"]): r for r in asked["rows"] if r["set"] == of_set}
        body = []
        for name in CLASSIFIERS:
            record, person = (rows[name, protocol] for protocol in PROTOCOLS)
            by_record, by_person = ([row["scores"][m] for m in SCORES] for row in (record, person))
            if "paper" in record:
                body.append([f"{CLASSICAL_WORDS[name]}: paper", *(page.number(record["paper"][m]) for m in SCORES)])
            body.append([f"{CLASSICAL_WORDS[name]}: by recording, best", *(page.number(s["best"]) for s in by_record)])
            means = (f"{page.number(s['mean'])}<small>± {page.number(s['deviation'])}</small>" for s in by_record)
            body.append([f"{CLASSICAL_WORDS[name]}: by recording", *means])
            honest = (
                f"<b>{page.number(s['mean'])}</b><small>{page.interval(s['low'], s['high'])}</small>" for s in by_person
            )
            body.append([f"<b>{CLASSICAL_WORDS[name]}: by person</b>", *honest])
        trivial = next(t["scores"] for t in asked["trivial"] if (t["set"], t["protocol"]) == (of_set, "person"))
        body.append(["<i>always the commoner class</i>", *(page.number(trivial[m]) for m in SCORES)])
        c = asked["counts"][of_set]
        counted = " and ".join(
            f"{n} {word} recordings of {page.count(p, 'person', 'people')}"
            for word, n, p in zip(("normal", asked["target"]), c["recordings"], c["people"], strict=True)
        )
        parts.append(
            f"<h3>{of_set.capitalize()} set: {counted}</h3>"
            f"{page.table(['', *(CLASSICAL_WORDS[m] for m in SCORES)], body)}"
        )
    return parts


def reading(asked: Mapping[str, Any]) -> str:
    """HTML that says how to read the tables of an experiment.json."""
    says = [
        f"{asked['runs']} random splits, {asked['test_share']:.0%} to test. “Best” is the run of best accuracy of "
        "those split by recording, what the paper reports; “by recording” is their mean and deviation.",
        "“By person” is the honest row: nobody is in training and in test. Its interval widens that of the runs' "
        "mean for the recordings that the runs share (Nadeau and Bengio 2003); it does not cover another stethoscope.",
    ]
    if any("paper" in row for row in asked["rows"]):
        says.append(PAPER_NOTE)
    left = asked["left_out"]
    names = ", ".join(f"{one['id']} ({one['reason']})" for one in left)
    says.append(f"Left out: {len(left)}{': ' + names if left else ''}.")
    s = asked["stretches"]
    says.append(
        f"{s['systoles']} systoles and {s['diastoles']} diastoles, {s['too_short']} shorter than the Burg order."
    )
    items = "".join(f"<li>{page.escape(text)}</li>" for text in says)
    return f'<div class="card prose"><h3>How to read this</h3><ul>{items}</ul></div>'


def _four(results: Mapping[str, Any]) -> str:
    chosen, judged = results["chosen"], results["test"]["overall"]
    shown = ("auc", "accuracy", "mean_accuracy", "f1", "sensitivity", "specificity")
    body = []
    for name, of in results["classifiers"].items():
        own = name == chosen
        cells = [page.score(judged[m]) if own else page.number(of["test"][m]) for m in shown]
        body.append(
            [
                f"<b>{CLASSICAL_WORDS[name]}</b><small>best on validation, kept</small>"
                if own
                else CLASSICAL_WORDS[name],
                *cells,
            ]
        )
    for name, of in results["test"]["trivial"].items():
        body.append([f"<i>{page.escape(name.replace('_', ' '))}</i>", *(page.number(of[m]) for m in shown)])
    note = "Intervals hold 95 % of the scores when people are drawn anew with replacement. One split: differences "
    return page.table(["Classifier", *(CLASSICAL_WORDS[m] for m in shown)], body) + (
        f'<p class="small">{note}between classifiers here are mostly chance.</p>'
    )


def envelope_figures(shown: Mapping[str, Any], positive: str) -> str:
    """HTML of a normal and a positive clip with the sounds that were found on their envelopes."""
    return "".join(
        _envelope_figure({k: shown[f"{name}_{k}"] for k in ("id", "samples", "envelope", "states")}, shown, word)
        for name, word in (("normal", "normal"), ("murmur", positive))
    )


def _envelope_figure(one: Mapping[str, Any], shown: Mapping[str, Any], word: str) -> str:
    from matplotlib.patches import Patch

    rate, name = float(shown["sample_rate_hz"]), str(one["id"])
    samples = one["samples"][: int(SHOWN_S * rate)]
    end_s = len(samples) / rate
    block = max(1, len(samples) // 1800)
    used = samples[: len(samples) // block * block].reshape(-1, block)
    e = one["envelope"][: int(end_s / shown["step_s"])]
    kinds = {"S1": (S1, page.BLUE), "systole": (SYSTOLE, page.TEAL), "S2": (datasets.S2, page.ORANGE),
             "diastole": (DIASTOLE, page.LINE)}  # fmt: skip

    def paint(figure: Any) -> None:
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[1.3, 1.3, 0.4])
        top.fill_between(np.arange(len(used)) * block / rate, used.min(1), used.max(1), color=page.MUTED, linewidth=0.7)
        middle.plot(np.arange(len(e)) * shown["step_s"] + shown["window_s"] / 2, e, color=page.INK, linewidth=1.2)
        for state, colour in kinds.values():
            bars = [(a, b - a) for a, b, s in one["states"] if s == state and a < end_s]
            bottom.broken_barh(bars, (0, 1), facecolors=colour, linewidth=0)
        for start, stop, state in one["states"]:
            if state in (S1, datasets.S2) and stop <= end_s:
                first = round(start / shown["step_s"])
                last = max(round(stop / shown["step_s"]), first + 1)
                at = first + int(np.argmax(e[first:last])) if first < len(e) else None
                if at is not None:
                    middle.plot([at * shown["step_s"] + shown["window_s"] / 2], [e[at]], "o", markersize=6,
                                color=page.BLUE if state == S1 else page.ORANGE)  # fmt: skip
        for ax in (top, bottom):
            ax.set_yticks([])
        for ax in (top, middle, bottom):
            ax.spines["left"].set_visible(False)
            ax.grid(False, axis="y")
        bottom.set_xlim(0, end_s)
        bottom.set_xlabel("s")
        handles = [Patch(color=colour, label=label) for label, (_, colour) in kinds.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=4)

    alt = f"Recording {name}, {word}: samples, Shannon envelope with the picked S1 and S2, and the states between them"
    caption = (
        f"<b>{page.escape(name)}</b>, {page.escape(word)}: samples, standardised Shannon envelope, what was picked."
    )
    return page.card("", page.svg(960, 300, alt, paint), caption)


def _picked(found: Mapping[str, Any] | None) -> str:
    if not found:
        return page.absent("These recordings have no annotated S1 and S2 to compare with.")
    return f'<div class="card"><h3>Beside the annotations</h3>{page.facts(found)}</div>'


def spectra_figure(shown: Mapping[str, Any], positive: str) -> str:
    """HTML of the mean Burg spectra of systole and diastole, normal beside positive."""
    f = shown["frequencies_hz"]

    def paint(figure: Any) -> None:
        for ax, part, title in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("systole", "diastole"), strict=True):
            for value, word, colour in ((0, "normal", page.BLUE), (1, positive, page.ORANGE)):
                ax.plot(f, shown["spectra_db"][value, part], color=colour, label=word)
            ax.set_title(f"{title}, dB")
            ax.set_xlabel("Hz")
            ax.legend(loc="upper right")

    alt = f"Mean Burg spectra of normal and {positive} recordings in systole and in diastole"
    return page.card("", page.svg(960, 320, alt, paint), "Mean over recordings of the spectra in dB of power a Hz.")


def _setup(results: Mapping[str, Any], config: str) -> str:
    system = dict(results["system"])
    command = system.pop("command")
    split = {k: v for k, v in results["split"].items() if k != "notes"}
    cards = "".join(
        f'<div class="card"><h3>{title}</h3>{page.facts(part)}</div>'
        for title, part in {"Data": results["data"], "Split": split, "System": system}.items()
    )
    return (
        f'<h3>Command</h3><pre>{page.escape(command)}</pre><div class="grid three">{cards}</div>'
        f"<details><summary>config.json</summary><pre>{page.escape(config)}</pre></details>"
    )


def classical_summary(results: Mapping[str, Any]) -> str:
    """The main figures, for a terminal."""
    lines = [f"{'test':22s}{'AUC':>8s}{'accuracy':>10s}{'MAcc':>8s}"]
    for name, of in results["classifiers"].items():
        t = of["test"]
        mark = " *" if name == results["chosen"] else ""
        lines.append(f"{CLASSICAL_WORDS[name] + mark:22s}" + "".join(
            f"{page.number(t[m]):>{width}s}" for m, width in (("auc", 8), ("accuracy", 10), ("mean_accuracy", 8))
        ))  # fmt: skip
    left = results["features"]["left_out"]
    return "\n".join([*lines, f"* best on validation; {len(left)} recordings left out"])
