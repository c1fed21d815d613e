"""The cards of the site report, and its figures for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pcgjax import metrics
from pcgjax.pages import page
from pcgjax.pages.curves import databases_table

SITE_WORDS = {
    "trained": "the trained model's features", "untrained": "the same net before training",
    "statistics": "level and power in eight bands",
}  # fmt: skip


def counts_sentence(test: Mapping[str, Any]) -> str:
    people = page.count(test["people"], "person", "people")
    return f"{page.count(test['recordings'], 'test recording')} · {people} · {len(test['per_database'])} databases"


def databases_card(found: Mapping[str, Any]) -> str:
    """HTML: overall scores beside the mean over databases and the database alone, and the AUC of each database."""
    test, alone = found["test"], found["database_alone"]
    body = [
        ["AUC, all recordings", page.score(test["overall"]["auc"])],
        ["<b>AUC, mean over databases</b>", page.score(test["mean_database_auc"])],
        ["MAcc, all recordings", page.score(test["overall"]["mean_accuracy"])],
        ["<i>AUC of the database alone</i>: its share of abnormal in training", page.score(alone["auc"])],
        ["<i>the same</i>, told the test set's own shares", page.number(test["trivial"]["database_prior"]["auc"])],
    ]
    return page.table(["", "Score"], body) + databases_table(test)


def probe_card(found: Mapping[str, Any]) -> str:
    """HTML: how well the database can be told from the features, and the confusion between databases."""
    told = found["probed"]
    if not found["probes"]:
        return page.absent(told["note"].capitalize() + ".")
    body = []
    for name, one in found["probes"].items():
        value, low, high = (metrics.finite(one["balanced_accuracy"], key) for key in ("value", "low", "high"))
        drawn = page.score(one["balanced_accuracy"]) + page.gauge(value, low, high, one["chance"])
        numbers = (one["chance"], one["accuracy"], one["majority_accuracy"], one["features"])
        body.append([page.escape(SITE_WORDS[name].capitalize()), drawn, *map(_cell, numbers)])
    head = ["Database predicted from", "Balanced accuracy", "Chance", "Accuracy", "Commonest database", "Features"]
    first = found["probes"]["trained"]
    notes = [
        f"{first['recordings']} recordings of {page.count(first['people'], 'person', 'people')} whom the model was not "
        f"trained on, {first['folds']} folds with nobody in two."
    ]
    if told["unknown_people"]:
        notes.append(f"{told['unknown_people']} recordings of unknown people stand for a person each.")
    notes += [f"{name} is left out: {why}." for name, why in told["left_out"].items()]
    notes.append(told["note"])
    said = f'<p class="small">{page.escape(" ".join(filter(None, notes)))}</p>'
    return page.table(head, body) + said + _confusion(first)


def _cell(value: Any) -> str:
    return page.number(value) if isinstance(value, int) else page.score(value)


def _confusion(one: Mapping[str, Any]) -> str:
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
        ax.set_xlabel("said to be of")
        ax.grid(False)
        for side in ax.spines.values():
            side.set_visible(False)

    told = ", ".join(f"{name} {share[k, k]:.2f}" for k, name in enumerate(names))
    side = 130 + 90 * len(names)
    alt = f"Databases told apart by the trained model's features, share found: {told}"
    drawn = page.svg(side, side - 60, alt, paint)
    caption = "Each row is a database; how many of its recordings the probe takes for which database's."
    return page.card("", f'<div style="max-width:{side}px">{drawn}</div>', caption)


def _square(x: float, y: float, colour: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=colour, alpha=alpha, linewidth=0)


def summary(found: Mapping[str, Any]) -> str:
    """The site report for a terminal."""

    def text(score: Any) -> str:
        low, high = metrics.finite(score, "low"), metrics.finite(score, "high")
        return page.number(metrics.finite(score)) + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")

    test = found["test"]
    lines = [f"{'AUC, all recordings':42s}{text(test['overall']['auc'])}"]
    for name, one in test["per_database"].items():
        counted = f"{name}: {one['recordings']} recordings, {one['positives']} positive"
        lines.append(f"  {counted:40s}{'one class only' if one['auc']['value'] is None else text(one['auc'])}")
    lines += [
        f"{'AUC, mean over databases':42s}{text(test['mean_database_auc'])}",
        f"{'MAcc, all recordings':42s}{text(test['overall']['mean_accuracy'])}",
        f"{'AUC of the database alone':42s}{text(found['database_alone']['auc'])}",
    ]
    for name, one in found["probes"].items():
        lines.append(
            f"{'database from ' + SITE_WORDS[name]:50s}{text(one['balanced_accuracy'])}, chance {one['chance']:.3f}"
        )
    return "\n".join([*lines, *filter(None, [found["probed"]["note"]])])
