"""Curves and tables of a classifier: ROC, precision-recall, reliability, confusion, training. All return HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax import metrics
from pcgjax.pages import page
from pcgjax.pages.page import BLUE, INK, MUTED, ORANGE, PURPLE
from pcgjax.pages.words import HEADLINE, word_of
from pcgjax.runs.results import overall_scores
from pcgjax.segmentation.scores import SEGMENTATION_HEADLINE


def decision_figures(test: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> page.Html:
    """Of a judgement and its rows of predictions.csv, what can be drawn of them."""
    parts = []
    if rows:
        y = np.array([row["label"] for row in rows])
        p = np.array([row["probability"] for row in rows])
        if 0 < y.sum() < len(y):
            parts += [roc_figure(test, y, p), _pr(test, y, p)]
        else:
            why = "ROC and precision-recall curves need both classes; the test set holds only one."
            parts.append(page.absent(why))
    else:
        why = "ROC and precision-recall curves are left out: predictions.csv has no test rows here."
        parts.append(page.absent(why))
    counts, bins = test.get("counts"), (test.get("calibration") or {}).get("bins")
    parts.append(confusion_table(test) if counts else page.absent("No confusion matrix: metrics.json has no counts."))
    none = "No reliability curve: metrics.json has no calibration."
    parts.append(_reliability(test) if bins else page.absent(none))
    return page.join(parts)


def roc_figure(test: Mapping[str, Any], y: np.ndarray, p: np.ndarray) -> page.Html:
    """The curve of labels `y` and probabilities `p`, both (N,), with the decision that was taken."""
    fpr, tpr, _ = metrics.roc_curve(y, p)
    auc, se, sp = (metrics.finite(overall_scores(test).get(k)) for k in ("auc", "sensitivity", "specificity"))

    def paint(figure: Any) -> None:
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
        ax.text(0.60, 0.565, "chance", color=MUTED, fontsize=10)
        ax.fill_between(fpr, tpr, color=BLUE, alpha=0.08, linewidth=0)
        ax.plot(fpr, tpr, color=BLUE)
        if se is not None and sp is not None:
            ax.plot([1 - sp], [se], "o", color=ORANGE, markersize=8)
            ax.annotate(f"at threshold {page.number(test.get('threshold'), 2)}", (1 - sp, se), (12, -14),
                        textcoords="offset points", color=ORANGE)  # fmt: skip
        _unit_square(ax, "1 − specificity", "sensitivity")

    at = f"at the threshold sensitivity {page.number(se)}, specificity {page.number(sp)}"
    figure = page.svg(420, 380, f"ROC curve of the test set, AUC {page.number(auc)}; {at}", paint)
    meaning = "of an abnormal and a normal recording, how often the abnormal one gets the higher probability"
    return page.card("ROC curve", figure, f"AUC {page.number(auc)}: {meaning}.")


def _pr(test: Mapping[str, Any], y: np.ndarray, p: np.ndarray) -> page.Html:
    recall, precision, _ = metrics.pr_curve(y, p)
    ap, re, pr = (metrics.finite(overall_scores(test).get(k)) for k in ("auprc", "recall", "precision"))
    share = float(y.mean())

    def paint(figure: Any) -> None:
        ax = figure.subplots()
        ax.axhline(share, color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
        ax.text(0.02, share + 0.02, f"chance: {share:.0%} are abnormal", color=MUTED, fontsize=10)
        ax.fill_between(recall, precision, step="pre", color=BLUE, alpha=0.08, linewidth=0)
        ax.plot(recall, precision, color=BLUE, drawstyle="steps-pre")
        if re is not None and pr is not None:
            ax.plot([re], [pr], "o", color=ORANGE, markersize=8)
        _unit_square(ax, "recall", "precision")

    scores = f"average precision {page.number(ap)}, share of abnormal {share:.3f}"
    figure = page.svg(420, 380, f"Precision-recall curve of the test set, {scores}", paint)
    caption = f"Average precision {page.number(ap)}. The orange point is the decision threshold."
    return page.card("Precision and recall", figure, caption)


def confusion_table(test: Mapping[str, Any]) -> page.Html:
    """The counts of a judgement, of `metrics.judge`."""
    counts = {key: int(test["counts"].get(key) or 0) for key in ("tn", "fp", "fn", "tp")}
    rows = []
    for truth, keys in (("normal", ("tn", "fp")), ("abnormal", ("fn", "tp"))):
        total = sum(counts[key] for key in keys)
        rows.append((truth, total, [
            ("right" if key in ("tn", "tp") else "wrong", counts[key], counts[key] / total if total else None)
            for key in keys
        ]))  # fmt: skip
    threshold = page.number(test.get("threshold"), 2)
    caption = f"Called abnormal when the probability is {threshold} or more."
    return page.card("Confusion matrix", page.confusion(rows), caption)


def _reliability(test: Mapping[str, Any]) -> page.Html:
    bins = test["calibration"]["bins"]
    used = [b for b in bins if b["recordings"]]
    ece, brier = metrics.finite(test["calibration"].get("ece")), metrics.finite(overall_scores(test).get("brier"))

    def paint(figure: Any) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        top.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
        x, share = [b["mean_probability"] for b in used], [b["share_abnormal"] for b in used]
        top.vlines(x, x, share, color=ORANGE, linewidth=1.5, alpha=0.7)
        top.plot(x, share, color=BLUE, marker="o", markersize=6)
        _unit_square(top, None, "share abnormal")
        edges, counts = [b["low"] for b in bins], [b["recordings"] for b in bins]
        bottom.bar(edges, counts, width=[b["high"] - b["low"] for b in bins], align="edge", color=BLUE, alpha=0.35,
                   edgecolor=BLUE, linewidth=0.8)  # fmt: skip
        bottom.set_xlabel("probability of abnormal")
        bottom.set_title("recordings", color=MUTED, fontweight="normal", fontsize=11)
        bottom.grid(False, axis="x")

    scores = f"expected calibration error {page.number(ece)}, Brier score {page.number(brier)}"
    alt = f"Reliability curve of the test set and histogram of its probabilities, {scores}"
    figure = page.svg(420, 380, alt, paint)
    return page.card("Reliability", figure, f"E{scores[1:]}. On the dashed line a probability is what it says.")


def training_curves(history: Sequence[Mapping[str, Any]] | None) -> page.Html:
    """Loss and validation score by step; history: of `runs.log.history`."""
    if not history:
        return page.absent("No curves: the run left no metrics.jsonl.")
    train, validation = (curve_of(history, split, "loss") for split in ("train", "validation"))
    scores = (*HEADLINE, *SEGMENTATION_HEADLINE, *metrics.METRICS)
    score = next((m for m in scores if len(curve_of(history, "validation", m)[0]) > 1), None)
    epochs = [h["epoch"] for h in history if isinstance(h.get("epoch"), int | float)]
    x_label = f"step ({len(set(epochs))} epochs)" if epochs else "step"
    if not len(train[0]) and not len(validation[0]) and score is None:
        return page.absent("No curves: metrics.jsonl holds no loss.")

    def marks(curve: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        return {"marker": "o", "markersize": 4} if len(curve[0]) < 60 else {}

    def paint(figure: Any) -> None:
        axes = np.atleast_1d(figure.subplots(1, 2 if score else 1))
        if len(train[0]):
            few = slice(None, None, max(1, len(train[0]) // 1500))
            axes[0].plot(train[0][few], train[1][few], color=BLUE, alpha=0.25, linewidth=0.8)
            axes[0].plot(*smoothed(train), color=BLUE, label="train")
        if len(validation[0]):
            axes[0].plot(*validation, color=ORANGE, **marks(validation), label="validation")
        axes[0].set_title("loss")
        axes[0].set_ylim(bottom=0)
        axes[0].legend(loc="upper right")
        if score:
            x, y = curve_of(history, "validation", score)
            axes[1].plot(x, y, color=ORANGE, **marks((x, y)))
            best = int(np.nanargmin(y) if score == "brier" else np.nanargmax(y)) if np.isfinite(y).any() else None
            if best is not None:
                axes[1].plot([x[best]], [y[best]], "o", color=PURPLE, markersize=8)
                axes[1].annotate(f"best {y[best]:.3f}", (x[best], y[best]), (0, 9), textcoords="offset points",
                                 color=PURPLE, ha="center")  # fmt: skip
            axes[1].set_title(f"{word_of(score)} on validation")
            axes[1].margins(y=0.18)
        for ax in axes:
            ax.set_xlabel(x_label)

    both = {"training": smoothed(train), "validation": validation}
    last = [f"{name} loss ends at {page.number(curve[1][-1])}" for name, curve in both.items() if len(curve[0])]
    caption = "; ".join(last).capitalize() + "." if last else ""
    return page.card("", page.svg(960, 300, f"Loss curves over steps. {caption}", paint), caption)


def curve_of(history: Iterable[Mapping[str, Any]], split: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(step, value) of one metric, NaN where it was not finite."""
    points = [(h["step"], h[metric]) for h in history if h["split"] == split and metric in h]
    values = [float(v) if isinstance(v, int | float) and math.isfinite(v) else math.nan for _, v in points]
    return np.array([step for step, _ in points], float), np.array(values, float)


def smoothed(curve: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Means of some 40 to 80 stretches, of a curve that has enough points for it."""
    width = len(curve[0]) // 40
    if width < 3:
        return curve
    step, value = (a[len(a) % width :].reshape(-1, width).mean(1) for a in curve)
    return step, value


def databases_table(test: Mapping[str, Any]) -> page.Html:
    """The scores inside each database, of `metrics.judge`."""
    per_database = test.get("per_database")
    if not per_database:
        return page.absent("metrics.json has no per_database.")
    mean = metrics.finite(test.get("mean_database_auc"))
    height = 70 + 46 * len(per_database)

    def paint(figure: Any) -> None:
        ax = figure.subplots()
        for i, (_, scores) in enumerate(per_database.items()):
            value, low, high = page.bounds(scores.get("auc"))
            if value is None:
                ax.text(0.505, i, "one class only", va="center", color=MUTED, fontsize=10)
            else:
                ax.barh(i, value - 0.5, left=0.5, height=0.5, color=BLUE, alpha=0.75)
                if low is not None:
                    ax.plot([low, high], [i, i], color=INK, linewidth=1.5, marker="|", markersize=8)
                ax.text(1.015, i - 0.14, page.number(value), va="center", fontweight="bold")
            recordings, people, abnormal = (scores.get(k) for k in ("recordings", "people", "positives"))
            counted = f"{recordings} recordings, {people} people, {abnormal} abnormal"
            ax.text(1.015, i + (0.2 if value is not None else 0), counted, va="center", color=MUTED, fontsize=9.5)
        ax.axvline(0.5, color=INK, linewidth=1)
        if mean is not None:
            ax.axvline(mean, color=ORANGE, linewidth=1.5, linestyle=(0, (4, 3)))
            ax.text(mean, -0.62, f"mean {mean:.3f}", color=ORANGE, ha="center", va="bottom")
        ax.set_yticks(range(len(per_database)), list(per_database))
        ax.tick_params(axis="y", colors=INK, length=0)
        ax.set_ylim(len(per_database) - 0.4, -0.6)
        lows = [v for s in per_database.values() if (v := metrics.finite(s.get("auc"), "low")) is not None]
        values = [v for s in per_database.values() if (v := metrics.finite(s.get("auc"))) is not None]
        ax.set_xlim(max(0, min([0.4, *(v - 0.03 for v in lows + values)])), 1.0)
        ax.grid(False, axis="y")
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("AUC (0.5 is chance)")
        figure.subplots_adjust(left=0.12, right=0.73, top=1 - 28 / height, bottom=42 / height)

    summary = "; ".join(f"{name} {page.number(metrics.finite(s.get('auc')))}" for name, s in per_database.items())
    figure = page.svg(960, height, f"AUC of each database with its interval: {summary}", paint, free=True)
    columns = ("auc", "mean_accuracy", "sensitivity", "specificity", "f1", "brier")
    head = ["Database", "Recordings", "People", "Abnormal", *(word_of(c) for c in columns)]
    body = [[name, *(page.text(s.get(k)) for k in ("recordings", "people", "positives")),
             *(page.score(s.get(c)) for c in columns)] for name, s in per_database.items()]  # fmt: skip
    return page.card("", figure, "Bars from chance; whiskers are 95 % intervals.") + page.table(head, body)


def _unit_square(ax: Any, x: str | None, y: str) -> None:
    ax.set_xlim(-0.01, 1.01)
    ax.set_ylim(-0.01, 1.03)
    ax.set_title(y, color=MUTED, fontweight="normal", fontsize=11)
    if x:
        ax.set_xlabel(x)
