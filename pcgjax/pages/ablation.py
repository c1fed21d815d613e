"""The page of the ablation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax.models.hinf_lstm import UPDATES
from pcgjax.pages import page
from pcgjax.pages.words import ARM_WORDS, WORDS

LOSSES, THRESHOLDS = ("bce", "pwl"), ("fixed", "sapt")
Arm = tuple[str, str, str]
ARMS: tuple[Arm, ...] = tuple(itertools.product(UPDATES, LOSSES, THRESHOLDS))
SCORES = ("f1", "mean_accuracy", "auc", "mean_database_auc", "accuracy", "sensitivity", "specificity")
COMPARED = ("f1", "mean_accuracy", "auc")
# name -> (title, which of an arm's factors it changes, to what, from what)
IDEAS = {
    "convex": ("H∞ LSTM, convex update, instead of the LSTM", 0, "convex", "lstm"),
    "forget": ("H∞ LSTM, forget update, instead of the LSTM", 0, "forget", "lstm"),
    "pwl": ("Penalty-weighted loss instead of BCE", 1, "pwl", "bce"),
    "sapt": ("SAPT instead of a fixed threshold", 2, "sapt", "fixed"),
}
# The paper's section IV, the two rows with SAPT; MAcc is the mean of its sensitivity and specificity.
PAPER = {
    arm: {**scores, "mean_accuracy": (scores["sensitivity"] + scores["specificity"]) / 2}
    for arm, scores in {
        ("convex", "pwl", "sapt"): {"f1": 0.9885, "accuracy": 0.9942, "sensitivity": 0.9923, "specificity": 0.9949},
        ("lstm", "pwl", "sapt"): {"f1": 0.9619, "accuracy": 0.9816, "sensitivity": 0.9469, "specificity": 0.9929},
    }.items()
}
for _row in PAPER.values():
    _row["mean_accuracy"] = (_row["sensitivity"] + _row["specificity"]) / 2
PAPER_NOTE = (
    "The paper's protocol: CinC 2016, 80:20, by patient as it says, 250 normal and 250 abnormal recordings to tune on, "
    "50 epochs, one run. For most of that data set it is not published who was recorded."
)


def draw(table: Sequence[Mapping[str, Any]], verdicts: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """The page as HTML."""
    counted = [row for row in table if row["counts"]]
    return page.render(
        "ablation.html", heading="Which ideas hold up",
        subtitle=f"{page.count(len(table), 'setting')} · {len(ARMS)} arms · {config['ablation']['seeds']} seeds",
        seeds=config["ablation"]["seeds"], comparisons=len(COMPARED) * len(counted), verdicts=list(verdicts.values()),
        ideas=_ideas(counted), beside=_beside_paper(table), paper_note=PAPER_NOTE,
        settings=[(row, _setting(row)) for row in table], config=config,
    )  # fmt: skip


COLOUR = {"lstm": page.BLUE, "convex": page.TEAL, "forget": page.PURPLE}


def _ideas(table: Sequence[Mapping[str, Any]]) -> page.Html:
    lines = [(idea, row) for idea in IDEAS for row in table]
    # A row of space above each idea holds its title.
    y = {(idea, row["name"]): i * (len(table) + 1.4) + j for i, idea in enumerate(IDEAS) for j, row in enumerate(table)}
    height = round(70 + 19 * (len(IDEAS) * (len(table) + 1.4)))

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, len(COMPARED), sharey=True)
        for ax, metric in zip(axes, COMPARED, strict=True):
            ax.axvline(0, color=page.INK, linewidth=1)
            for idea, row in lines:
                d, at = row["ideas"][idea][metric], y[idea, row["name"]]
                clear = d["low"] > 0 or d["high"] < 0
                colour = page.MUTED if not clear else page.TEAL if d["mean"] > 0 else page.ORANGE
                ax.plot([d["low"], d["high"]], [at, at], color=colour, linewidth=2)
                ax.plot([d["mean"]], [at], "o", color=colour, markersize=6)
            ax.set_title(WORDS[metric])
            ax.set_xlabel("difference")
            ax.margins(x=0.08)
            ax.locator_params(axis="x", nbins=5)
            ax.grid(False, axis="y")
        axes[0].set_yticks([y[idea, row["name"]] for idea, row in lines], [row["title"] for _, row in lines])
        axes[0].set_ylim(max(y.values()) + 0.7, -1.5)
        for ax in axes:
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        for idea, (title, *_) in IDEAS.items():
            axes[0].annotate(title, (0, y[idea, table[0]["name"]] - 0.95), (-6, 0), xycoords=("axes fraction", "data"),
                             textcoords="offset points", ha="right", va="center", fontweight="bold")  # fmt: skip

    figure = page.svg(1060, height, "What each idea changes in each setting, with paired intervals", paint)
    caption = "Right of the line is better with the idea. Green and orange: the 95 % interval leaves out 0."
    head = ["Difference", "Setting", *(WORDS[metric] for metric in COMPARED), "Seeds"]
    body = [
        [f"{ARM_WORDS[IDEAS[idea][2]]} − {ARM_WORDS[IDEAS[idea][3]]}", row["title"],
         *(_cell(row["ideas"][idea][metric], sign=True) for metric in COMPARED),
         str(row["ideas"][idea][COMPARED[0]]["n"])]
        for idea, row in lines
    ]  # fmt: skip
    return page.card("", figure, caption) + page.table(head, body)


def _setting(row: Mapping[str, Any]) -> page.Html:
    names = [" ".join(arm) for arm in ARMS]
    from_paper = row["group"] != "synthetic"
    trivial = {}
    for m in COMPARED:
        best = max(row["trivial"], key=lambda name: np.nan_to_num(row["trivial"][name][m]["mean"]))
        trivial[m] = row["trivial"][best][m]["mean"], best

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, len(COMPARED), sharey=True)
        for ax, metric in zip(axes, COMPARED, strict=True):
            ax.axvline(trivial[metric][0], color=page.ORANGE, linewidth=1.5, linestyle=(0, (4, 3)))
            for at, (arm, name) in enumerate(zip(ARMS, names, strict=True)):
                s, colour = row["arms"][name][metric], COLOUR[arm[0]]
                ax.plot([s["low"], s["high"]], [at, at], color=colour, linewidth=2)
                ax.plot([s["mean"]], [at], "o", color=colour, markersize=6)
                if from_paper and metric in PAPER.get(arm, ()):
                    ax.plot([PAPER[arm][metric]], [at], "D", color=page.PINK, markersize=6)
            ax.set_title(WORDS[metric])
            ax.margins(x=0.08)
            ax.locator_params(axis="x", nbins=6)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        axes[0].set_yticks(range(len(ARMS)), [_words(arm) for arm in ARMS])
        axes[0].set_ylim(len(ARMS) - 0.4, -0.6)

    figure = page.svg(1060, 360, f"Scores of the arms: {row['title']}", paint)
    best_of = ", ".join(f"{WORDS[m]} {value:.3f} ({WORDS[n]})" for m, (value, n) in trivial.items())
    caption = f"Mean and 95 % t interval over seeds. Dashed: the best baseline: {best_of}."
    if from_paper:
        caption += " Diamonds: the paper's."
    shown = [k for k in SCORES if k != "mean_database_auc" or row["databases"] > 1]
    head = ["", *(WORDS[k] for k in shown)]
    body = [[_words(arm), *(_cell(row["arms"][name][k]) for k in shown)]
            for arm, name in zip(ARMS, names, strict=True)]  # fmt: skip
    body += [[f"Baseline: {WORDS[name]}", *(_cell(s[k]) for k in shown)] for name, s in row["trivial"].items()]
    if from_paper:
        body += [[f"The paper: {_words(arm)}", *(page.number(scores.get(k), 4) for k in shown)]
                 for arm, scores in PAPER.items()]  # fmt: skip
    return page.card("", figure, caption) + page.table(head, body)


def _beside_paper(table: Sequence[Mapping[str, Any]]) -> page.Html:
    shown = ("f1", "accuracy", "sensitivity", "specificity", "mean_accuracy")
    body = []
    judged = [row for row in table if row["counts"] and row["group"] != "synthetic"]
    for arm, scores in PAPER.items():
        system = "CNN-H∞-LSTM with SAPT" if arm[0] == "convex" else "CNN-LSTM with SAPT"
        body.append([f"{system}: the paper", *(page.number(scores[k], 4) for k in shown)])
        body += [[f"{system}: {row['title'].lower()}",
                  *(_cell(row["arms"][" ".join(arm)][k]) for k in shown)]
                 for row in judged]  # fmt: skip
    for row in judged:
        alone = row["trivial"]["database_prior"]
        body.append([f"The database alone: {row['title'].lower()}", *(_cell(alone[k]) for k in shown)])
    return page.table(["", *(WORDS[k] for k in shown)], body)


def _words(arm: Arm) -> str:
    return " · ".join(ARM_WORDS[value] for value in arm)


def _cell(s: Mapping[str, float], sign: bool = False) -> page.Html | str:
    if not np.isfinite(s["mean"]):
        return "n/a"
    if sign:
        return page.noted(f"{s['mean']:+.3f}", f"{s['low']:+.3f} to {s['high']:+.3f}")
    return page.noted(f"{s['mean']:.3f}", f"± {s['deviation']:.3f}")
