"""A run's main figures for a terminal."""

from __future__ import annotations

from pcgjax.pages.words import word_of
from pcgjax.segmentation.scores import segmentation_summary


def run_summary(results: dict) -> str:
    """The main figures of metrics.json, for a terminal."""
    if "segmentation" in results:
        return segmentation_summary(results["segmentation"])
    scores = results["test"]
    if "overall" not in scores:
        return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())

    lines = [f"{'':18s}{'AUC':21s} {'AUPRC':20s} {'MAcc':20s} F1", _line("all", scores["overall"])]
    lines += [_line(f"{name} ({s['recordings']})", s) for name, s in scores["per_database"].items()]
    mean = scores["mean_database_auc"]
    if mean["value"] is not None:
        lines.append(f"mean of the databases' AUC: {mean['value']:.3f} over {mean['databases']}")
    if patients := scores.get("patients"):
        name, baselines = patients["score"], patients["trivial"]
        values = [f"{rule} {_cell(of[name]).strip()}" for rule, of in patients["rules"].items()]
        values += [f"{word_of(baseline)} {of[name]:.3f}" for baseline, of in baselines.items()]
        lines.append(f"CirCor's {patients['patients']} patients, {word_of(name)}: {', '.join(values)}")
    return "\n".join(lines)


def _line(name: str, scores: dict) -> str:
    return f"{name:18s}" + " ".join(_cell(scores[key]) for key in ("auc", "auprc", "mean_accuracy", "f1"))


def _cell(score: dict) -> str:
    """A score and its interval."""
    value, low, high = (score.get(key) for key in ("value", "low", "high"))
    if value is None:
        return "        -         "
    return f"{value:.3f} " + (f"[{low:.3f}, {high:.3f}]" if low is not None else " " * 14)
