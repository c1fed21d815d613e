"""The cards of the site report, its page, and its figures for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pcgjax.pages import page
from pcgjax.pages.curves import databases_table
from pcgjax.pages.words import SITE_WORDS


def document(report: Mapping[str, Any], heading: str) -> str:
    """The page of a site report, of `sites.measure`."""
    test = report["test"]
    people = page.count(test["people"], "person", "people")
    subtitle = f"{page.count(test['recordings'], 'test recording')} · {people} · {len(test['per_database'])} databases"
    parts = {"databases": databases_card(report), "probe": probe_card(report)}
    return page.render("sites.html", heading=heading, subtitle=subtitle, **parts)


def databases_card(report: Mapping[str, Any]) -> page.Html:
    """Overall scores beside the mean over databases and the database alone, and the AUC of each database."""
    test, alone = report["test"], report["database_alone"]
    body: list[list[Any]] = [
        ["AUC, all recordings", page.score(test["overall"]["auc"])],
        [page.bold("AUC, mean over databases"), page.score(test["mean_database_auc"])],
        ["MAcc, all recordings", page.score(test["overall"]["mean_accuracy"])],
        [page.italic("AUC of the database alone") + ": its share of abnormal in training", page.score(alone["auc"])],
        [page.italic("the same") + ", given the test set's own shares",
         page.number(test["trivial"]["database_prior"]["auc"])],
    ]  # fmt: skip
    return page.table(["", "Score"], body) + databases_table(test)


def probe_card(report: Mapping[str, Any]) -> page.Html:
    """How well the database can be predicted from the features, and the confusion between databases."""
    probed = report["probed"]
    if not report["probes"]:
        return page.absent(probed["note"].capitalize() + ".")
    body = []
    for name, one in report["probes"].items():
        balanced = one["balanced_accuracy"]
        drawn = page.score(balanced) + page.gauge(*page.bounds(balanced), one["chance"])
        numbers = (one["chance"], one["accuracy"], one["majority_accuracy"], one["features"])
        body.append([SITE_WORDS[name].capitalize(), drawn, *map(page.score_or_count, numbers)])
    head = ["Database predicted from", "Balanced accuracy", "Chance", "Accuracy", "Most common database", "Features"]
    first = report["probes"]["trained"]
    notes = [
        f"{first['recordings']} recordings of {page.count(first['people'], 'person', 'people')} whom the model was not "
        f"trained on, {first['folds']} folds with nobody in two."
    ]
    if probed["unknown_people"]:
        notes.append(f"{probed['unknown_people']} recordings of unknown people stand for a person each.")
    notes += [f"{name} is left out: {why}." for name, why in probed["left_out"].items()]
    notes.append(probed["note"])
    return page.table(head, body) + page.small(" ".join(filter(None, notes))) + _confusion(first)


def _confusion(one: Mapping[str, Any]) -> page.Html:
    names, counts = one["databases"], np.array(one["confusion"])
    share = counts / counts.sum(1, keepdims=True)

    def paint(figure: Any) -> None:
        ax = figure.subplots()
        for (i, j), value in np.ndenumerate(share):
            colour = page.TEAL if i == j else page.ORANGE
            ax.add_patch(_square(j, i, colour, 0.06 + 0.6 * value))
            ax.text(j, i, f"{value:.0%}", ha="center", va="center", fontweight="bold", fontsize=12)
            ax.text(j, i + 0.25, str(counts[i, j]), ha="center", va="center", color=page.MUTED, fontsize=9)
        ax.set_xlim(-0.5, len(names) - 0.5)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(colors=page.INK, length=0)
        ax.set_xlabel("predicted")
        ax.grid(False)
        for side in ax.spines.values():
            side.set_visible(False)

    diagonal = ", ".join(f"{name} {share[k, k]:.2f}" for k, name in enumerate(names))
    side = 130 + 90 * len(names)
    alt = f"Databases told apart by the trained model's features, share found: {diagonal}"
    drawn = page.svg(side, side - 60, alt, paint)
    caption = "Each row is a database; how many of its recordings the probe takes for which database's."
    return page.card("", page.narrow(side, drawn), caption)


def _square(x: float, y: float, colour: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=colour, alpha=alpha, linewidth=0)


def summary(report: Mapping[str, Any]) -> str:
    """The site report for a terminal."""

    test = report["test"]
    lines = [f"{'AUC, all recordings':42s}{page.spoken(test['overall']['auc'])}"]
    for name, one in test["per_database"].items():
        counted = f"{name}: {one['recordings']} recordings, {one['positives']} positive"
        lines.append(f"  {counted:40s}{'one class only' if one['auc']['value'] is None else page.spoken(one['auc'])}")
    lines += [
        f"{'AUC, mean over databases':42s}{page.spoken(test['mean_database_auc'])}",
        f"{'MAcc, all recordings':42s}{page.spoken(test['overall']['mean_accuracy'])}",
        f"{'AUC of the database alone':42s}{page.spoken(report['database_alone']['auc'])}",
    ]
    for name, one in report["probes"].items():
        accuracy = page.spoken(one["balanced_accuracy"])
        lines.append(f"{'database from ' + SITE_WORDS[name]:50s}{accuracy}, chance {one['chance']:.3f}")
    return "\n".join([*lines, *filter(None, [report["probed"]["note"]])])
