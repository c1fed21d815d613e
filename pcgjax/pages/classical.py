"""The page of the classical chain."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pcgjax.datasets import S1, S2
from pcgjax.pages import page
from pcgjax.pages.waveforms import SHOWN_S, draw_states, draw_waveform, state_legend
from pcgjax.pages.words import CLASSIFIER_WORDS, word_of
from pcgjax.published import PAPER_NOTE
from pcgjax.runs.results import read_json
from pcgjax.runtime import files, hashes

CLASSIFIERS = tuple(CLASSIFIER_WORDS)
SETS, PROTOCOLS = ("unbalanced", "balanced"), ("record", "person")
SCORES = ("accuracy", "sensitivity", "specificity", "auc")
_COMPARED = ("auc", "accuracy", "mean_accuracy", "f1", "sensitivity", "specificity")


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
    """Draws `workdir/report.html` from what `run` left there, and returns its path."""
    workdir = pathlib.Path(workdir)
    hashes.check(workdir, ("config.json", "experiment.json", "pictures.npz"))
    results = read_json(workdir / "metrics.json")
    experiment = json.loads((workdir / "experiment.json").read_text())
    with np.load(workdir / "pictures.npz", allow_pickle=False) as file:
        shown = {name: file[name] for name in file.files}
    positive, test = results["data"]["target"], results["test"]
    html = page.render(
        "classical.html", heading=f"Run {workdir.resolve().name}",
        subtitle=f"{test['recordings']} test recordings, {page.count(test['people'], 'person', 'people')}",
        experiment=[_experiment_table(experiment, name) for name in SETS] if experiment else [],
        reading=reading(experiment) if experiment else "", classifier_head=["Classifier", *map(word_of, _COMPARED)],
        classifier_rows=_classifier_rows(results), envelopes=envelope_figures(shown, positive),
        picking=results["picking"], spectra=spectra_figure(shown, positive), **page.setup_values(results, None) | {
            "config": (workdir / "config.json").read_text()},
    )  # fmt: skip
    files.write_text(workdir / "report.html", html)
    hashes.update(workdir, "report.html")
    return workdir / "report.html"


def _experiment_table(experiment: Mapping[str, Any], name: str) -> tuple[str, list[str], list[list[Any]]]:
    """(title, head, rows) of one of the paper's two sets."""
    rows = {(r["classifier"], r["protocol"]): r for r in experiment["rows"] if r["set"] == name}
    body: list[list[Any]] = []
    for classifier in CLASSIFIERS:
        record, person = (rows[classifier, protocol] for protocol in PROTOCOLS)
        by_record, by_person = ([row["scores"][m] for m in SCORES] for row in (record, person))
        word = CLASSIFIER_WORDS[classifier]
        if "paper" in record:
            body.append([f"{word}: paper", *(page.number(record["paper"][m]) for m in SCORES)])
        body.append([f"{word}: by recording, best", *(page.number(s["best"]) for s in by_record)])
        means = (page.noted(page.number(s["mean"]), f"± {page.number(s['deviation'])}") for s in by_record)
        body.append([f"{word}: by recording", *means])
        held_out = (page.score({**s, "value": s["mean"]}, strong=True) for s in by_person)
        body.append([page.bold(f"{word}: by person"), *held_out])
    trivial = next(t["scores"] for t in experiment["trivial"] if (t["set"], t["protocol"]) == (name, "person"))
    body.append([page.italic("always the majority class"), *(page.number(trivial[m]) for m in SCORES)])
    counts = experiment["counts"][name]
    counted = " and ".join(
        f"{n} {word} recordings of {page.count(p, 'person', 'people')}"
        for word, n, p in zip(("normal", experiment["target"]), counts["recordings"], counts["people"], strict=True)
    )
    return f"{name.capitalize()} set: {counted}", ["", *map(word_of, SCORES)], body


def reading(experiment: Mapping[str, Any]) -> page.Html:
    """How to read the tables of an experiment.json."""
    sentences = [
        f"{experiment['runs']} random splits, {experiment['test_share']:.0%} to test. “Best” is the run of best "
        "accuracy of those split by recording, what the paper reports; “by recording” is their mean and deviation.",
        "“By person” is the row to trust: nobody is in both training and test. Its interval widens that of the runs' "
        "mean for the recordings that the runs share (Nadeau and Bengio 2003); it does not cover another stethoscope.",
    ]
    if any("paper" in row for row in experiment["rows"]):
        sentences.append(PAPER_NOTE)
    left_out = experiment["left_out"]
    names = ", ".join(f"{one['id']} ({one['reason']})" for one in left_out)
    sentences.append(f"Left out: {len(left_out)}{': ' + names if left_out else ''}.")
    s = experiment["stretches"]
    sentences.append(
        f"{s['systoles']} systoles and {s['diastoles']} diastoles, {s['too_short']} shorter than the Burg order."
    )
    return page.notes("How to read this", sentences)


def _classifier_rows(results: Mapping[str, Any]) -> list[list[Any]]:
    judged = results["test"]["overall"]
    body: list[list[Any]] = []
    for name, of in results["classifiers"].items():
        word = CLASSIFIER_WORDS[name]
        if name == results["chosen"]:
            label = page.noted(page.bold(word), "best on validation, kept")
            body.append([label, *(page.score(judged[m]) for m in _COMPARED)])
        else:
            body.append([word, *(page.number(of["test"][m]) for m in _COMPARED)])
    for name, of in results["test"]["trivial"].items():
        body.append([page.italic(name.replace("_", " ")), *(page.number(of[m]) for m in _COMPARED)])
    return body


def envelope_figures(shown: Mapping[str, Any], positive: str) -> page.Html:
    """A normal and a positive clip with the sounds that were found on their envelopes."""
    figures = []
    for name, word in (("normal", "normal"), ("murmur", positive)):
        one = {k: shown[f"{name}_{k}"] for k in ("id", "samples", "envelope", "states")}
        figures.append(_envelope_figure(one, shown, word))
    return page.join(figures)


def _envelope_figure(one: Mapping[str, Any], shown: Mapping[str, Any], word: str) -> page.Html:
    rate, name = float(shown["sample_rate_hz"]), str(one["id"])
    samples = one["samples"][: int(SHOWN_S * rate)]
    end_s = len(samples) / rate
    e = one["envelope"][: int(end_s / shown["step_s"])]

    def paint(figure: Any) -> None:
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[1.3, 1.3, 0.4])
        draw_waveform(top, samples, rate, 1800, page.MUTED)
        middle.plot(np.arange(len(e)) * shown["step_s"] + shown["window_s"] / 2, e, color=page.INK, linewidth=1.2)
        draw_states(bottom, one["states"], 0.0, end_s, 0, 1)
        for start, stop, state in one["states"]:
            if state in (S1, S2) and stop <= end_s:
                first = round(start / shown["step_s"])
                last = max(round(stop / shown["step_s"]), first + 1)
                if first < len(e):
                    peak = first + int(np.argmax(e[first:last]))
                    middle.plot([peak * shown["step_s"] + shown["window_s"] / 2], [e[peak]], "o", markersize=6,
                                color=page.BLUE if state == S1 else page.ORANGE)  # fmt: skip
        for ax in (top, bottom):
            ax.set_yticks([])
        for ax in (top, middle, bottom):
            ax.spines["left"].set_visible(False)
            ax.grid(False, axis="y")
        bottom.set_xlim(0, end_s)
        bottom.set_xlabel("s")
        state_legend(figure)

    alt = f"Recording {name}, {word}: samples, Shannon envelope with the picked S1 and S2, and the states between them"
    caption = page.bold(name) + f", {word}: samples, standardised Shannon envelope, what was picked."
    return page.card("", page.svg(960, 300, alt, paint), caption)


def spectra_figure(shown: Mapping[str, Any], positive: str) -> page.Html:
    """The mean Burg spectra of systole and diastole, normal beside positive."""
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


def classical_summary(results: Mapping[str, Any]) -> str:
    """The main figures, for a terminal."""
    lines = [f"{'test':22s}{'AUC':>8s}{'accuracy':>10s}{'MAcc':>8s}"]
    for name, of in results["classifiers"].items():
        t = of["test"]
        mark = " *" if name == results["chosen"] else ""
        lines.append(f"{CLASSIFIER_WORDS[name] + mark:22s}" + "".join(
            f"{page.number(t[m]):>{width}s}" for m, width in (("auc", 8), ("accuracy", 10), ("mean_accuracy", 8))
        ))  # fmt: skip
    left = results["features"]["left_out"]
    return "\n".join([*lines, f"* best on validation; {len(left)} recordings left out"])
