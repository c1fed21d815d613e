"""Draws report.html: what a training run is worth, in one file without a single outside request.

    python -m pcgjax.report RUN                        draws RUN/report.html again
    python -m pcgjax.report RUN RUN ... [--out=FILE]   compares runs in one page (comparison.html beside the first)

RUN is a workdir of pcgjax.train. Figures are inline SVG whose colours are the page's own CSS variables, so that
they follow the reader's light or dark theme.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax import metrics

# The CNN paper's Table 1 (Lamperti), for `compare`. 301 recordings are the size of the Challenge's `validation`
# folder, whose files are copies of training recordings.
CNN_PAPER = {
    "source": "Lamperti, Binary Classification of Heart Sounds Using a 1D CNN, Table 1",
    "note": "The paper judged 301 recordings (150 normal, 151 abnormal). That is the size of the Challenge's "
    "validation folder, whose files are byte-identical copies of training recordings: its numbers are "
    "probably contaminated and say little about people whom the model never heard.",
    "results": {"Filter": {"accuracy": 0.9734, "auc": 0.9993, "precision": 1.0, "recall": 0.9470, "f1": 0.9728}},
}

WORDS = {
    "mean_database_auc": "Mean AUC over databases", "auc": "AUC", "auprc": "Average precision",
    "mean_accuracy": "MAcc", "accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1",
    "sensitivity": "Sensitivity", "specificity": "Specificity", "brier": "Brier score",
    "all_abnormal": "always abnormal", "all_normal": "always normal", "majority": "the commoner class",
    "database_prior": "the database alone",
}  # fmt: skip
HEADLINE = ("mean_database_auc", "auc", "mean_accuracy", "f1", "accuracy", "auprc", "sensitivity", "specificity")
PAPER_METRICS = ("accuracy", "auc", "precision", "recall", "f1")
PREDICTION_FIELDS = ("id", "person", "database", "class", "label", "probability", "decision", "split", "path")
DECISIONS = ("normal", "abnormal")
_SHOWN_S = 5.0  # of an example: some five heartbeats

# The light theme's colours stand in the SVG for the CSS variables of the same name.
_COLOURS = {
    "ink": "#1b2430", "muted": "#667085", "line": "#e3e7ee", "blue": "#2f6bdb", "orange": "#d9650b",
    "teal": "#0f8f7e", "purple": "#8052cc", "pink": "#c93a78", "olive": "#86800f",
}  # fmt: skip
INK, MUTED, LINE, BLUE, ORANGE, TEAL, PURPLE, PINK, OLIVE = _COLOURS.values()
_SERIES = (BLUE, ORANGE, TEAL, PURPLE, PINK, OLIVE)


# ---------------------------------------------------------------------------------------------------------------
# What callers use
# ---------------------------------------------------------------------------------------------------------------


def write(workdir: str | pathlib.Path) -> pathlib.Path:
    """Draws `workdir/report.html` from what a run left there, and returns its path.

    Reads metrics.json ({"test", "validation": what `metrics.judge` returns; optional "control", "system", "split",
    "data"}), config.json, metrics.jsonl, predictions.csv and examples.npz (a float32 waveform (n,) by recording id,
    and `sample_rate_hz`). Of "split", `notes` (a text or a list of them) are shown as sentences, and `people_apart`
    (bool) says whether people of the test set were kept out of training; of "system", `command` is how to run it
    again. Only metrics.json must be there: what else is missing is left out with a sentence.

    Raises:
      ValueError: metrics.json is missing or any of the files is damaged, naming file, line or field, and fix.
    """
    workdir = pathlib.Path(workdir)
    results = _results(workdir / "metrics.json")
    config = _json(workdir / "config.json") if (workdir / "config.json").exists() else None
    history = _history(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else None
    rows = _predictions(workdir / "predictions.csv") if (workdir / "predictions.csv").exists() else None
    test_rows = [row for row in rows or [] if row["split"] == "test"]
    test = results["test"]
    if test_rows and test.get("recordings", len(test_rows)) != len(test_rows):
        raise ValueError(
            f"{workdir}: predictions.csv has {len(test_rows)} test rows, but metrics.json judges "
            f"{test['recordings']} recordings; they are of different runs: evaluate again"
        )
    examples = _examples(workdir / "examples.npz", rows) if rows and (workdir / "examples.npz").exists() else None

    sections = [
        ("scores", "Scores", _headline(test) + _honesty(results, rows)),
        ("curves", "Decisions and probabilities", _decision_figures(test, test_rows)),
        ("training", "Training", _training(history)),
        ("databases", "Database by database", _databases(test)),
        ("trivial", "Beside trivial answers", _trivial(results)),
        ("classes", "Class by class", _classes(test)),
        ("examples", "The surest answers", _example_figures(examples)),
        ("setup", "Setup", _setup(results, config)),
    ]
    counts = [_count(test.get("recordings"), "test recording"), _count(test.get("people"), "person", "people"),
              _count(len(test.get("per_database") or ()) or None, "database")]  # fmt: skip
    page = _page(f"Run {workdir.resolve().name}", " · ".join(c for c in counts if c), sections)
    return _save(workdir / "report.html", page)


def surest(rows: Sequence[Mapping[str, Any]], count: int) -> dict[str, list[Mapping[str, Any]]]:
    """The recordings to look at: those of whose answer the model was surest, right and wrong.

    Normal and abnormal ones alternate while there are both, and nobody comes twice in a list.

    Args: rows as in predictions.csv (numbers as text will do); count: how many of each, at most.
    Returns: {"right": rows, "wrong": rows}, the surest first within each truth.
    """
    if count < 0:
        raise ValueError(f"count: need 0 or more, got {count}")

    def sureness(row: Mapping[str, Any]) -> float:
        return float(row["probability"]) if int(row["decision"]) else 1 - float(row["probability"])

    chosen: dict[str, list[Mapping[str, Any]]] = {"right": [], "wrong": []}
    for kind in chosen:
        queues: tuple[list, list] = ([], [])
        heard = set()
        for row in sorted(rows, key=lambda row: (-sureness(row), str(row["id"]))):
            who = (row["database"], row["person"])
            if (int(row["label"]) == int(row["decision"])) == (kind == "right") and who not in heard:
                heard.add(who)
                queues[int(row["label"])].append(row)
        turn = 1
        while len(chosen[kind]) < count and any(queues):
            chosen[kind].append((queues[turn] or queues[1 - turn]).pop(0))
            turn = 1 - turn
    return chosen


def compare_row(workdir: str | pathlib.Path, name: str | None = None) -> dict[str, Any]:
    """A run as a row of `compare`, named after its folder unless a name is given.

    Raises:
      ValueError: metrics.json is missing or damaged.
    """
    workdir = pathlib.Path(workdir)
    test = _results(workdir / "metrics.json")["test"]
    return {
        "name": name or workdir.resolve().name,
        "metrics": _overall(test),
        "trivial": test.get("trivial") or {},
        "history": workdir / "metrics.jsonl",
    }


def compare(
    rows: Sequence[Mapping[str, Any]], out: str | pathlib.Path, title: str, paper: Mapping[str, Any] | None = None
) -> pathlib.Path:
    """A page that sets runs side by side: bars of each score, loss curves, a table. Returns `out`.

    Args:
      rows: one a run, {"name", "metrics": {metric: {"value", "low", "high"}}, and optional "trivial":
        {answer: {metric: number}} and "history": the path of its metrics.jsonl}.
      paper: the paper's numbers to set beside, {"source", "note", "results": {a row's name: {metric: number}}}.

    Raises:
      ValueError: no rows, two of one name, a field missing, or a damaged history.
    """
    if not rows:
        raise ValueError("rows: nothing to compare")
    for i, row in enumerate(rows):
        for field in ("name", "metrics"):
            if field not in row:
                raise ValueError(f"rows[{i}]: no field {field!r}")
    names = [str(row["name"]) for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"rows: two runs have one name among {', '.join(names)}; give each its own")
    known = [m for m in WORDS if any(_value(row["metrics"].get(m)) is not None for row in rows)]
    shown = [m for m in PAPER_METRICS if m in known] or known
    table_metrics = shown + [m for m in ("mean_accuracy", "mean_database_auc") if m in known and m not in shown]
    histories = {}
    missing = []
    for name, row in zip(names, rows, strict=True):
        path = row.get("history")
        if path is not None and pathlib.Path(path).exists():
            histories[name] = _history(pathlib.Path(path))
        else:
            missing.append(name)
    sections = [
        ("scores", "Scores", _compare_bars(rows, shown, paper)),
        ("training", "Loss curves", _compare_losses(names, histories, missing)),
        ("table", "All numbers", _compare_table(rows, table_metrics, paper)),
    ]
    return _save(pathlib.Path(out), _page(title, _count(len(rows), "run"), sections))


# ---------------------------------------------------------------------------------------------------------------
# Reading a workdir
# ---------------------------------------------------------------------------------------------------------------


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; a finished run has one: let `python -m pcgjax.train --workdir={path.parent}` end"
        ) from None
    except json.JSONDecodeError as error:
        fix = "the file is cut or was edited: write it again with train or evaluate"
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); {fix}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text ({error.reason} at byte {error.start}); write it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: need a JSON object, found {type(value).__name__}; write it again")
    return value


def _results(path: pathlib.Path) -> dict[str, Any]:
    results = _json(path)
    if not isinstance(results.get("test"), dict):
        raise ValueError(f"{path}: no object `test`; a finished run has one: let train end, or evaluate again")
    return results


def _history(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, checked."""
    history = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            entry, why = None, f"not JSON ({error.msg})"
        else:
            why = "need an object with `step`, a number, and `split`, one of train, validation or test"
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("step"), int | float)
            or entry.get("split") not in ("train", "validation", "test")
        ):
            raise ValueError(f"{path}, line {number}: {why}; delete that line and draw the report again")
        history.append(entry)
    return history


def _predictions(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a predictions.csv: label, decision int, probability float, the rest text."""
    fix = "write the file again with train or evaluate"
    rows: list[dict[str, Any]] = []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        lacking = [field for field in PREDICTION_FIELDS if field not in (reader.fieldnames or ())]
        if lacking:
            raise ValueError(f"{path}, line 1: no column {', '.join(lacking)}; {fix}")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if any(row[field] is None for field in PREDICTION_FIELDS) or None in row:
                raise ValueError(f"{where}: not {len(reader.fieldnames or ())} columns; {fix}")
            for field in ("label", "decision"):
                if row[field] not in ("0", "1"):
                    raise ValueError(f"{where}, {field}: need 0 or 1, found {row[field]!r}; {fix}")
            try:
                probability = float(row["probability"])
            except ValueError:
                probability = math.nan
            if not 0 <= probability <= 1:
                raise ValueError(f"{where}, probability: need 0 to 1, found {row['probability']!r}; {fix}")
            numbers = {"label": int(row["label"]), "decision": int(row["decision"]), "probability": probability}
            rows.append({**row, **numbers})
    return rows


def _examples(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of predictions.csv whose waveform is kept, each with `waveform` and `sample_rate_hz`."""
    fix = "delete the file to leave the examples out, or write it again with train"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # numpy and zipfile raise half a dozen kinds
        raise ValueError(f"{path}: not a readable .npz ({error}); {fix}") from None
    rate = arrays.pop("sample_rate_hz", None)
    if rate is None or rate.size != 1 or not rate > 0:
        raise ValueError(f"{path}, sample_rate_hz: need one positive number; {fix}")
    by_id = {row["id"]: row for row in rows}
    found = []
    for name, waveform in arrays.items():
        if name not in by_id:
            raise ValueError(f"{path}: recording {name!r} is not in predictions.csv; {fix}")
        if waveform.ndim != 1 or len(waveform) < 2 or not np.isfinite(waveform).all():
            raise ValueError(f"{path}, {name}: need (n,) finite samples, found shape {waveform.shape}; {fix}")
        found.append({**by_id[name], "waveform": waveform, "sample_rate_hz": float(rate)})
    return found


# ---------------------------------------------------------------------------------------------------------------
# Sections of a run's page
# ---------------------------------------------------------------------------------------------------------------


def _overall(test: Mapping[str, Any]) -> dict[str, Any]:
    """{metric: number or {"value", "low", "high"}}: a judgement's, or whatever scores another task left."""
    if "overall" not in test:
        return {k: v for k, v in test.items() if _value(v) is not None}
    overall = dict(test["overall"])
    if "mean_database_auc" in test:
        overall = {"mean_database_auc": test["mean_database_auc"], **overall}
    return overall


def _best_trivial(test: Mapping[str, Any], metric: str) -> tuple[str, float] | None:
    """The trivial answer that does best by a score; none for a score of which a trivial answer gets everything."""
    if metric == "mean_database_auc":
        return "the database alone", 0.5
    if metric in ("sensitivity", "specificity", "recall", "precision"):
        return None
    known = {name: _value(scores.get(metric)) for name, scores in (test.get("trivial") or {}).items()}
    scores = {name: value for name, value in known.items() if value is not None}
    if not scores:
        return None
    best = max(scores, key=lambda name: scores[name])
    return WORDS.get(best, best), scores[best]


def _headline(test: Mapping[str, Any]) -> str:
    overall = _overall(test)
    cards = []
    for metric in [m for m in HEADLINE if m in overall] or list(overall)[:8]:
        value, low, high = (_value(overall[metric], key) for key in ("value", "low", "high"))
        trivial = _best_trivial(test, metric)
        if trivial:
            clear = low is not None and low > trivial[1]
            kind, verdict = ("good", "clearly above") if clear else ("warn", "not clearly above")
            note = f'<span class="{kind}">{verdict}</span> {_e(trivial[0])} ({_number(trivial[1])})'
        elif metric in ("sensitivity", "specificity"):
            note = f"at threshold {_number(test.get('threshold'), 2)}"
        else:
            note = "&nbsp;"
        interval = f"95 % interval {_interval(low, high)}" if low is not None else "no interval"
        cards.append(
            f'<div class="card score"><h3>{_e(_word(metric))}</h3><p class="big">{_number(value)}</p>'
            f"{_gauge(value, low, high, trivial[1] if trivial else None)}"
            f'<p class="small">{interval}</p><p class="small">{note}</p></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _gauge(value: float | None, low: float | None, high: float | None, trivial: float | None) -> str:
    """A ruler from 0 to 1 with the interval, the value and a tick for the trivial answer."""
    if value is None or not 0 <= value <= 1:
        return ""
    parts = ['<line x1="0" y1="7" x2="200" y2="7" stroke="var(--line)" stroke-width="4" stroke-linecap="round"/>']
    if low is not None and high is not None:
        parts.append(
            f'<line x1="{low * 200:.1f}" y1="7" x2="{high * 200:.1f}" y2="7" stroke="var(--blue)" '
            'stroke-opacity="0.45" stroke-width="4" stroke-linecap="round"/>'
        )
    if trivial is not None:
        x = f"{trivial * 200:.1f}"
        parts.append(f'<line x1="{x}" y1="0" x2="{x}" y2="14" stroke="var(--orange)" stroke-width="2"/>')
    parts.append(f'<circle cx="{value * 200:.1f}" cy="7" r="5" fill="var(--blue)"/>')
    return f'<svg class="gauge" viewBox="-6 0 212 14" aria-hidden="true">{"".join(parts)}</svg>'


def _honesty(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] | None) -> str:
    """What the numbers do and do not say, in plain words."""
    test, split = results["test"], results.get("split") or {}
    says = []
    who: dict[str, set] = {"test": set(), "validation": set()}
    for row in rows or ():
        who.setdefault(row["split"], set()).add((row["database"], row["person"]))
    both = who["test"] & who["validation"]
    apart = split.get("people_apart")
    if both:
        names = ", ".join(_e(person) for _, person in sorted(both)[:5]) + (" …" if len(both) > 5 else "")
        says.append(
            f'<span class="warn">{_count(len(both), "person is", "people are")} both in validation and in '
            f"test:</span> {names}. The numbers may be higher than on people not heard."
        )
    elif apart is True:
        says.append("Judged on people not heard: nobody of the test set was in training or validation.")
    elif apart is False:
        says.append(
            '<span class="warn">Judged on people who were heard:</span> the split lets one person be in training and '
            "in test, so these numbers are higher than on new people."
        )
    else:
        says.append(
            "The run does not say whether people of the test set were kept out of training; only then do the "
            "numbers speak for people not heard."
        )
    how = test.get("intervals")
    if isinstance(how, dict) and how.get("resamples"):
        says.append(
            "Intervals hold 95 % of the scores when people, not recordings, are drawn anew with replacement within "
            f"their database ({_number(how['resamples'])} times): several recordings of one person say little more "
            "than one. They do not cover another training run, hospital or stethoscope; and where all of few people "
            "were answered alike, a narrow interval such as 1.000–1.000 is not certainty."
        )
    if "mean_database_auc" in test:
        counted = test["mean_database_auc"]
        counted = counted.get("databases") if isinstance(counted, Mapping) else None
        over = f", here over {_count(counted, 'database')} with both classes" if counted else ""
        says.append(
            "Databases differ in device, place and share of patients. A model that only recognises the database "
            "scores well on all recordings together; it gets 0.5 in each database. The mean AUC over databases is "
            f"therefore the number to trust{over}."
        )
    notes = split.get("notes") or []
    says += [_e(note) for note in ([notes] if isinstance(notes, str) else notes)]
    if test.get("trivial"):
        says.append(
            "The orange tick is the best answer that needs no listening. It is told the test set's own labels, so "
            "nothing of its kind can do better."
        )
    return f'<div class="card prose"><h3>How to read this</h3><ul>{"".join(f"<li>{s}</li>" for s in says)}</ul></div>'


def _decision_figures(test: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    if rows:
        y = np.array([row["label"] for row in rows])
        p = np.array([row["probability"] for row in rows])
        if 0 < y.sum() < len(y):
            parts += [_roc(test, y, p), _pr(test, y, p)]
        else:
            parts.append(_absent("ROC and precision-recall curves need both classes; the test set holds only one."))
    else:
        parts.append(_absent("ROC and precision-recall curves are left out: predictions.csv has no test rows here."))
    counts, bins = test.get("counts"), (test.get("calibration") or {}).get("bins")
    parts.append(_confusion(test) if counts else _absent("No confusion matrix: metrics.json has no counts."))
    parts.append(_reliability(test) if bins else _absent("No reliability curve: metrics.json has no calibration."))
    return f'<div class="grid two">{"".join(parts)}</div>'


def _roc(test: Mapping[str, Any], y: np.ndarray, p: np.ndarray) -> str:
    fpr, tpr, _ = metrics.roc_curve(y, p)
    auc, se, sp = (_value(_overall(test).get(k)) for k in ("auc", "sensitivity", "specificity"))

    def paint(figure: Any) -> None:
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
        ax.text(0.60, 0.565, "chance", color=MUTED, fontsize=10)
        ax.fill_between(fpr, tpr, color=BLUE, alpha=0.08, linewidth=0)
        ax.plot(fpr, tpr, color=BLUE)
        if se is not None and sp is not None:
            ax.plot([1 - sp], [se], "o", color=ORANGE, markersize=8)
            ax.annotate(f"at threshold {_number(test.get('threshold'), 2)}", (1 - sp, se), (12, -14),
                        textcoords="offset points", color=ORANGE)  # fmt: skip
        _unit_square(ax, "1 − specificity", "sensitivity")

    at = f"at the threshold sensitivity {_number(se)}, specificity {_number(sp)}"
    figure = _svg(420, 380, f"ROC curve of the test set, AUC {_number(auc)}; {at}", paint)
    said = "of an abnormal and a normal recording, how often the abnormal one gets the higher probability"
    return _card("ROC curve", figure, f"AUC {_number(auc)}: {said}.")


def _pr(test: Mapping[str, Any], y: np.ndarray, p: np.ndarray) -> str:
    recall, precision, _ = metrics.pr_curve(y, p)
    ap, re, pr = (_value(_overall(test).get(k)) for k in ("auprc", "recall", "precision"))
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

    alt = f"Precision-recall curve of the test set, average precision {_number(ap)}, share of abnormal {share:.3f}"
    caption = f"Average precision {_number(ap)}. The orange point is the decision threshold."
    return _card("Precision and recall", _svg(420, 380, alt, paint), caption)


def _confusion(test: Mapping[str, Any]) -> str:
    counts = test["counts"]
    cells = {key: int(counts.get(key) or 0) for key in ("tn", "fp", "fn", "tp")}
    body = []
    for truth, keys in (("normal", ("tn", "fp")), ("abnormal", ("fn", "tp"))):
        total = sum(cells[key] for key in keys)
        row = "".join(
            f'<td class="{"right" if key in ("tn", "tp") else "wrong"}" '
            f'style="--share:{100 * cells[key] / max(1, total):.0f}%">'
            f"<b>{cells[key]}</b><span>{f'{cells[key] / total:.0%}' if total else 'n/a'} of {truth}</span></td>"
            for key in keys
        )
        body.append(f'<tr><th scope="row">{truth}<small>{total} recordings</small></th>{row}</tr>')
    table = (
        '<table class="confusion"><thead><tr><td>truth</td><th scope="col">called normal</th>'
        f'<th scope="col">called abnormal</th></tr></thead><tbody>{"".join(body)}</tbody></table>'
    )
    threshold = _number(test.get("threshold"), 2)
    return _card("Confusion matrix", table, f"Called abnormal when the probability is {threshold} or more.")


def _reliability(test: Mapping[str, Any]) -> str:
    bins = test["calibration"]["bins"]
    used = [b for b in bins if b["recordings"]]
    ece, brier = _value(test["calibration"].get("ece")), _value(_overall(test).get("brier"))

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

    said = f"expected calibration error {_number(ece)}, Brier score {_number(brier)}"
    figure = _svg(420, 380, f"Reliability curve of the test set and histogram of its probabilities, {said}", paint)
    return _card("Reliability", figure, f"E{said[1:]}. On the dashed line a probability is what it says.")


def _training(history: Sequence[Mapping[str, Any]] | None) -> str:
    if not history:
        return _absent("No curves: the run left no metrics.jsonl.")
    train, validation = (_curve(history, split, "loss") for split in ("train", "validation"))
    score = next((m for m in (*HEADLINE, *metrics.METRICS) if len(_curve(history, "validation", m)[0]) > 1), None)
    epochs = [h["epoch"] for h in history if isinstance(h.get("epoch"), int | float)]
    x_label = f"step ({len(set(epochs))} epochs)" if epochs else "step"
    if not len(train[0]) and not len(validation[0]) and score is None:
        return _absent("No curves: metrics.jsonl holds no loss.")

    def marks(curve: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        return {"marker": "o", "markersize": 4} if len(curve[0]) < 60 else {}

    def paint(figure: Any) -> None:
        axes = np.atleast_1d(figure.subplots(1, 2 if score else 1))
        if len(train[0]):
            few = slice(None, None, max(1, len(train[0]) // 1500))
            axes[0].plot(train[0][few], train[1][few], color=BLUE, alpha=0.25, linewidth=0.8)
            axes[0].plot(*_smooth(train), color=BLUE, label="train")
        if len(validation[0]):
            axes[0].plot(*validation, color=ORANGE, **marks(validation), label="validation")
        axes[0].set_title("loss")
        axes[0].set_ylim(bottom=0)
        axes[0].legend(loc="upper right")
        if score:
            x, y = _curve(history, "validation", score)
            axes[1].plot(x, y, color=ORANGE, **marks((x, y)))
            best = int(np.nanargmin(y) if score == "brier" else np.nanargmax(y)) if np.isfinite(y).any() else None
            if best is not None:
                axes[1].plot([x[best]], [y[best]], "o", color=PURPLE, markersize=8)
                axes[1].annotate(f"best {y[best]:.3f}", (x[best], y[best]), (0, 9), textcoords="offset points",
                                 color=PURPLE, ha="center")  # fmt: skip
            axes[1].set_title(f"{_word(score)} on validation")
            axes[1].margins(y=0.18)
        for ax in axes:
            ax.set_xlabel(x_label)

    both = {"training": _smooth(train), "validation": validation}
    last = [f"{name} loss ends at {_number(curve[1][-1])}" for name, curve in both.items() if len(curve[0])]
    caption = "; ".join(last).capitalize() + "." if last else ""
    return _card("", _svg(960, 300, f"Loss curves over steps. {caption}", paint), caption)


def _curve(history: Iterable[Mapping[str, Any]], split: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(step, value) of one metric, NaN where it was not finite."""
    points = [(h["step"], h[metric]) for h in history if h["split"] == split and metric in h]
    values = [float(v) if isinstance(v, int | float) and math.isfinite(v) else math.nan for _, v in points]
    return np.array([step for step, _ in points], float), np.array(values, float)


def _smooth(curve: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Means of some 40 to 80 stretches, of a curve that has enough points for it."""
    width = len(curve[0]) // 40
    if width < 3:
        return curve
    step, value = (a[len(a) % width :].reshape(-1, width).mean(1) for a in curve)
    return step, value


def _databases(test: Mapping[str, Any]) -> str:
    per_database = test.get("per_database")
    if not per_database:
        return _absent("metrics.json has no per_database.")
    mean = _value(test.get("mean_database_auc"))
    height = 70 + 46 * len(per_database)

    def paint(figure: Any) -> None:
        ax = figure.subplots()
        for i, (_, scores) in enumerate(per_database.items()):
            value, low, high = (_value(scores.get("auc"), key) for key in ("value", "low", "high"))
            if value is None:
                ax.text(0.505, i, "one class only", va="center", color=MUTED, fontsize=10)
            else:
                ax.barh(i, value - 0.5, left=0.5, height=0.5, color=BLUE, alpha=0.75)
                if low is not None:
                    ax.plot([low, high], [i, i], color=INK, linewidth=1.5, marker="|", markersize=8)
                ax.text(1.015, i - 0.14, _number(value), va="center", fontweight="bold")
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
        lows = [v for s in per_database.values() if (v := _value(s.get("auc"), "low")) is not None]
        values = [v for s in per_database.values() if (v := _value(s.get("auc"))) is not None]
        ax.set_xlim(max(0, min([0.4, *(v - 0.03 for v in lows + values)])), 1.0)
        ax.grid(False, axis="y")
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("AUC (0.5 is chance)")
        figure.subplots_adjust(left=0.12, right=0.73, top=1 - 28 / height, bottom=42 / height)

    told = "; ".join(f"{name} {_number(_value(s.get('auc')))}" for name, s in per_database.items())
    figure = _svg(960, height, f"AUC of each database with its interval: {told}", paint, free=True)
    columns = ("auc", "mean_accuracy", "sensitivity", "specificity", "f1", "brier")
    head = ["Database", "Recordings", "People", "Abnormal", *(_word(c) for c in columns)]
    body = [[_e(name), *(_e(s.get(k)) for k in ("recordings", "people", "positives")),
             *(_score(s.get(c)) for c in columns)] for name, s in per_database.items()]  # fmt: skip
    return _card("", figure, "Bars from chance; whiskers are 95 % intervals.") + _table(head, body)


def _trivial(results: Mapping[str, Any]) -> str:
    """All scores in full: test, validation, any control, and the trivial answers on the test set."""
    columns: list[tuple[str, Mapping[str, Any]]] = [("Test", _overall(results["test"]))]
    if isinstance(results.get("validation"), dict):
        columns.append(("Validation", _overall(results["validation"])))
    said = ""
    control = results.get("control")
    if isinstance(control, dict):
        named = {"Control": control} if "overall" in control else control
        judged = {name: v for name, v in named.items() if isinstance(v, dict) and "overall" in v}
        columns += [(_word(name), _overall(v)) for name, v in judged.items()]
        rest = {k: v for k, v in control.items() if k not in judged and "overall" not in control}
        said = f"<h3>Control</h3>{_facts(rest)}" if rest else ""
    trivial = results["test"].get("trivial") or {}
    # An answer that is the same within a database has AUC 0.5 there, whatever it is.
    columns += [(_word(name).capitalize(), {"mean_database_auc": 0.5, **scores}) for name, scores in trivial.items()]
    order = [m for m in (*HEADLINE, "precision", "brier") if m in columns[0][1]] or list(columns[0][1])
    body = [[_e(_word(m)), *(_score(scores.get(m)) for _, scores in columns)] for m in order]
    note = (
        "MAcc is the mean of sensitivity and specificity. Of the Brier score less is better. n/a is a score that is "
        "undefined, such as the precision of an answer that never says abnormal. "
    )
    if trivial:
        note += "Trivial answers are told the test set's commoner class and its databases' shares of abnormal."
    else:
        note += "metrics.json has no trivial answers to compare with."
    note = f'<p class="small">{_e(note)}</p>'
    return _table(["Score", *(name for name, _ in columns)], body) + note + said


def _classes(test: Mapping[str, Any]) -> str:
    parts = []
    if test.get("report"):
        head = ["", "Precision", "Recall", "F1", "Recordings"]
        body = [[_e(name.capitalize()), *(_score(row.get(k)) for k in ("precision", "recall", "f1")),
                 _e(row.get("support"))] for name, row in test["report"].items()]  # fmt: skip
        parts.append(f"<div><h3>The two decisions</h3>{_table(head, body)}</div>")
    if test.get("per_class"):
        head = ["The data set's word", "Recordings", "Mean probability", "Called abnormal"]
        body = [[_e(word), _e(row.get("recordings")), _number(_value(row.get("mean_probability"))),
                 _share(row.get("share_abnormal"))] for word, row in test["per_class"].items()]  # fmt: skip
        parts.append(f"<div><h3>The data set's classes</h3>{_table(head, body)}</div>")
    return f'<div class="grid two">{"".join(parts)}</div>' if parts else _absent("metrics.json has no classes.")


def _example_figures(examples: Sequence[Mapping[str, Any]] | None) -> str:
    if not examples:
        return _absent("No waveforms: the run left no examples.npz, or no predictions.csv to name them.")
    parts = []
    for title, right in (("Right, and sure of it", True), ("Wrong, and sure of it", False)):
        own = [e for e in examples if (e["label"] == e["decision"]) == right]
        cards = "".join(_example(e, TEAL if right else ORANGE) for e in own)
        none = _absent("None were kept: every answer was of the other kind.")
        parts.append(f'<h3>{title}</h3><div class="grid two">{cards or none}</div>')
    return "".join(parts)


def _example(example: Mapping[str, Any], colour: str) -> str:
    from scipy import signal

    rate, waveform = example["sample_rate_hz"], np.asarray(example["waveform"], np.float64)
    shown = waveform[: max(2, int(_SHOWN_S * rate))]
    block = max(1, len(shown) // 900)
    used = shown[: len(shown) // block * block].reshape(-1, block)
    t = np.arange(len(used)) * block / rate
    length = min(len(shown), max(8, int(0.064 * rate)))
    f, _, power = signal.spectrogram(shown, rate, nperseg=length, noverlap=length * 3 // 4, nfft=2 * length)
    keep = f <= min(rate / 2, 600)
    level = 10 * np.log10(power[keep] + 1e-20)
    level = np.clip(level - level.max(), -60, 0)

    def paint(figure: Any) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.25])
        top.fill_between(t, used.min(1), used.max(1), color=colour, linewidth=0.7)
        top.set_yticks([])
        top.spines["left"].set_visible(False)
        edges = (0, len(shown) / rate, 0, f[keep][-1])
        bottom.imshow(level, origin="lower", aspect="auto", extent=edges, cmap="magma", interpolation="none")
        bottom.set_title("Hz", color=MUTED, fontweight="normal", fontsize=10)
        bottom.set_xlabel("s")
        bottom.grid(False)
        bottom.set_xlim(0, len(shown) / rate)

    truth, called = DECISIONS[example["label"]], DECISIONS[example["decision"]]
    alt = f"Waveform and spectrogram of recording {example['id']}: truth {truth}, called {called}"
    whole = f" First {len(shown) / rate:.0f} of {len(waveform) / rate:.0f} s." if len(shown) < len(waveform) else ""
    caption = (
        f"<b>{_e(example['id'])}</b> · {_e(example['database'])} · person {_e(example['person'])}<br>"
        f"Truth <b>{truth}</b> ({_e(example['class'])}), called <b>{called}</b> with probability of abnormal "
        f"<b>{_number(example['probability'])}</b>.{whole}"
    )
    return _card("", _svg(460, 250, alt, paint), caption)


def _setup(results: Mapping[str, Any], config: Mapping[str, Any] | None) -> str:
    system = dict(results.get("system") or {})
    command = system.pop("command", None)
    if isinstance(command, list):
        command = " ".join(map(str, command))
    said = f"<pre>{_e(command)}</pre>" if command else _absent("metrics.json does not hold the command of this run.")
    parts = [f"<h3>Command</h3>{said}"]
    split = {k: v for k, v in (results.get("split") or {}).items() if k != "notes"}
    facts = {"Data": results.get("data"), "Split": split, "System": system}
    cards = (f'<div class="card"><h3>{title}</h3>{_facts(part)}</div>' for title, part in facts.items() if part)
    parts.append(f'<div class="grid three">{"".join(cards)}</div>')
    if config is None:
        parts.append(_absent("No config: the run left no config.json."))
    else:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        parts.append(f"<details open><summary>config.json</summary><pre>{_e(text)}</pre></details>")
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------------------
# Sections of a comparison
# ---------------------------------------------------------------------------------------------------------------


def _paper_number(paper: Mapping[str, Any] | None, name: str, metric: str) -> float | None:
    return _value(((paper or {}).get("results") or {}).get(name, {}).get(metric))


def _compare_bars(rows: Sequence[Mapping[str, Any]], shown: Sequence[str], paper: Mapping[str, Any] | None) -> str:
    if not shown:
        return _absent("None of the runs has a known score.")
    width = 0.8 / len(rows)

    def paint(figure: Any) -> None:
        from matplotlib.lines import Line2D

        ax = figure.subplots()
        for i, row in enumerate(rows):
            for j, metric in enumerate(shown):
                s = row["metrics"].get(metric)
                value, low, high = (_value(s, key) for key in ("value", "low", "high"))
                x = j + (i - (len(rows) - 1) / 2) * width
                label = str(row["name"]) if j == 0 else None
                ax.bar(x, value or 0, width * 0.9, color=_SERIES[i % len(_SERIES)],
                       alpha=0.8 if i < len(_SERIES) else 0.4, label=label)  # fmt: skip
                if low is not None:
                    ax.plot([x, x], [low, high], color=INK, linewidth=1.2, marker="_", markersize=5)
                number = _paper_number(paper, str(row["name"]), metric)
                if number is not None:
                    ax.plot([x], [number], marker="D", color=INK, markerfacecolor="none", markersize=8, linewidth=0)
        ax.set_xticks(range(len(shown)), [_word(m) for m in shown])
        ax.tick_params(axis="x", colors=INK, length=0)
        ax.set_ylim(0, 1.04)
        ax.grid(False, axis="x")
        handles, labels = ax.get_legend_handles_labels()
        if paper:
            handles.append(Line2D([], [], marker="D", color=INK, markerfacecolor="none", markersize=8, linewidth=0))
            labels.append("the paper")
        figure.legend(handles, labels, loc="outside upper left", ncols=min(5, len(labels)))

    told = []
    for row in rows:
        scores = (f"{_word(m)} {_number(_value(row['metrics'].get(m)))}" for m in shown)
        told.append(f"{row['name']}: {', '.join(scores)}")
    figure = _svg(960, 400, f"Scores of each run. {'; '.join(told)}", paint)
    caption = "Whiskers are 95 % intervals over people. Where they overlap, the order of the bars may be chance."
    card = _card("", figure, caption)
    return card + _paper_note(paper)


def _paper_note(paper: Mapping[str, Any] | None) -> str:
    if not paper:
        return ""
    return (
        f'<div class="card prose"><h3>About the paper\'s numbers</h3><p>{_e(paper.get("note") or "")}</p>'
        f'<p class="small">{_e(paper.get("source") or "")}</p></div>'
    )


def _compare_losses(names: Sequence[str], histories: Mapping[str, Any], missing: Sequence[str]) -> str:
    parts = []
    for split in ("train", "validation"):
        curves = {name: _smooth(_curve(history, split, "loss")) for name, history in histories.items()}
        curves = {name: curve for name, curve in curves.items() if len(curve[0])}
        if not curves:
            parts.append(_absent(f"No {split} loss: no metrics.jsonl has one."))
            continue

        def paint(figure: Any, curves: Mapping[str, Any] = curves) -> None:
            ax = figure.subplots()
            for name, curve in curves.items():
                ax.plot(*curve, color=_SERIES[names.index(name) % len(_SERIES)], label=name)
            ax.set_xlabel("step")
            ax.set_ylim(bottom=0)
            ax.legend(loc="upper right")

        last = "; ".join(f"{name} ends at {_number(curve[1][-1])}" for name, curve in curves.items())
        title = {"train": "Training loss", "validation": "Validation loss"}[split]
        parts.append(_card(title, _svg(460, 320, f"{title} over steps. {last}", paint), f"{_e(last)}."))
    left_out = _absent(f"Without loss curves, as metrics.jsonl is missing: {', '.join(missing)}.") if missing else ""
    return f'<div class="grid two">{"".join(parts)}</div>{left_out}'


def _compare_table(rows: Sequence[Mapping[str, Any]], shown: Sequence[str], paper: Mapping[str, Any] | None) -> str:
    def muted(text: str) -> str:
        return f'<span class="muted">{text}</span>'

    body: list[list[str]] = []
    for row in rows:
        name = str(row["name"])
        body.append([f"<b>{_e(name)}</b>", *(_score(row["metrics"].get(m)) for m in shown)])
        numbers = [_paper_number(paper, name, m) for m in shown]
        if any(number is not None for number in numbers):
            body.append([muted("the paper"), *(muted(_number(n, 4)) if n is not None else "" for n in numbers)])
    # Runs judged on the same recordings have the same trivial answers: those are told once.
    trivial = {str(row["name"]): row.get("trivial") or {} for row in rows}
    same = len({json.dumps(t, sort_keys=True) for t in trivial.values()}) == 1
    for name, answers in list(trivial.items())[: 1 if same else None]:
        for answer, scores in answers.items():
            label = _word(answer) if same else f"{_word(answer)} ({name})"
            scores = {"mean_database_auc": 0.5, **scores}
            body.append([muted(_e(label)), *(muted(_score(scores.get(m))) for m in shown)])
    note = "" if same else (
        '<p class="small warn">The runs were not judged on the same recordings: their trivial answers differ, so '
        "compare each with its own.</p>"
    )  # fmt: skip
    return _table(["Run", *(_word(m) for m in shown)], body) + note


# ---------------------------------------------------------------------------------------------------------------
# Numbers, tables, figures, page
# ---------------------------------------------------------------------------------------------------------------


def _e(value: Any) -> str:
    return html.escape("n/a" if value is None else str(value), quote=True)


def _word(name: str) -> str:
    return WORDS.get(name, name.replace("_", " "))


def _value(score: Any, key: str = "value") -> float | None:
    """The finite number of a score, which is a number or {"value", "low", "high"}."""
    value = score.get(key) if isinstance(score, Mapping) else score if key == "value" else None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _number(value: Any, digits: int = 3) -> str:
    """As text for a page or a figure: counts whole with thousands apart, else `digits` decimals."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    value = _value(value)
    return "n/a" if value is None else f"{value:.{digits}f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f}–{high:.3f}"


def _score(score: Any) -> str:
    interval = _interval(_value(score, "low"), _value(score, "high"))
    return _number(_value(score)) + (f"<small>{interval}</small>" if interval else "")


def _share(value: Any) -> str:
    number = _value(value)
    if number is None:
        return "n/a"
    return f'<span class="meter" style="--share:{100 * number:.0f}%"></span>{number:.0%}'


def _count(number: int | None, one: str, many: str = "") -> str:
    return "" if number is None else f"{number:,} {one if number == 1 else many or one + 's'}"


def _absent(sentence: str) -> str:
    return f'<p class="absent">{_e(sentence)}</p>'


def _card(title: str, inside: str, caption: str) -> str:
    head = f"<h3>{_e(title)}</h3>" if title else ""
    return f'<figure class="card">{head}{inside}<figcaption>{caption}</figcaption></figure>'


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """`body` is HTML already, `head` is text."""
    columns = "".join(f'<th scope="col">{_e(h)}</th>' for h in head)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in body
    )
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>'


def _facts(facts: Mapping[str, Any], prefix: str = "") -> str:
    """Nested values as a list of names and texts."""

    def flat(value: Any, name: str) -> Iterable[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                yield from flat(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list):
            shown = ", ".join(json.dumps(v) if isinstance(v, dict | list) else str(v) for v in value[:12])
            yield name, shown + (f", … ({len(value)})" if len(value) > 12 else "")
        elif isinstance(value, float):
            yield name, f"{value:.6g}"
        else:
            yield name, "n/a" if value is None else str(value)

    items = "".join(f"<div><dt>{_e(name)}</dt><dd>{_e(text)}</dd></div>" for name, text in flat(facts, prefix))
    return f"<dl>{items}</dl>"


def _unit_square(ax: Any, x: str | None, y: str) -> None:
    ax.set_xlim(-0.01, 1.01)
    ax.set_ylim(-0.01, 1.03)
    ax.set_title(y, color=MUTED, fontweight="normal", fontsize=11)
    if x:
        ax.set_xlabel(x)


def _svg(width: int, height: int, alt: str, paint: Callable[[Any], None], free: bool = False) -> str:
    """What `paint(figure)` draws as inline SVG, `width` x `height` units of about a CSS pixel.

    Colours of `_COLOURS` become CSS variables, text stays text, ids are made the figure's own, and nothing in it
    refers outside. `free`: paint places the axes itself.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": alt, "text.parse_math": False, "font.size": 11, "text.color": INK,
        "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "axes.titlesize": 12, "axes.titlelocation": "left",
        "axes.titleweight": "bold", "axes.titlecolor": INK, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.8, "xtick.color": LINE,
        "ytick.color": LINE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "axes.facecolor": "none",
        "figure.facecolor": "none", "lines.linewidth": 2, "legend.frameon": False, "axes.unicode_minus": True,
    }  # fmt: skip
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own matplotlibrc must not change the page
        matplotlib.rcParams.update(style)
        figure = Figure((width / 72, height / 72), dpi=144, layout=None if free else "constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        buffer = io.StringIO()
        # No metadata: it would hold links and the date.
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    own = f"f{zlib.crc32(alt.encode()):08x}-"
    body = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{own}", body)
    for name, colour in _COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_e(alt)}">{body}'
    return f'<div class="wide">{svg}</div>' if width > 600 else svg  # on a phone a wide one scrolls


def _page(heading: str, subtitle: str, sections: Sequence[tuple[str, str, str]]) -> str:
    links = "".join(f'<a href="#{name}">{_e(title)}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{_e(title)}</h2>{inside}</section>' for name, title, inside in sections)
    # The policy makes the browser itself refuse anything from outside and any script.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{_e(heading)}</title><style>{_CSS}</style></head>'
        f"<body><header><p class=\"eyebrow\">pcgjax · phonocardiogram models</p><h1>{_e(heading)}</h1>"
        f'<p class="sub">{_e(subtitle)}</p><nav>{links}</nav></header><main>{body}</main></body></html>\n'
    )


def _save(path: pathlib.Path, text: str) -> pathlib.Path:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


_DARK = (
    "--ink:#e6eaf2;--muted:#98a2b5;--line:#2e3746;--blue:#7fa8ff;--orange:#ff9d52;--teal:#4fd0bb;--purple:#bb9bff;"
    "--pink:#ff84b4;--olive:#cfc65c;--page:#10151d;--card:#181f2a;--good:#4fd0bb"
)
_CSS = (
    ":root{color-scheme:light dark;" + "".join(f"--{k}:{v};" for k, v in _COLOURS.items())
    + "--page:#f5f7fa;--card:#fff;--good:#0b7d6e}@media(prefers-color-scheme:dark){:root{" + _DARK + "}}"
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
header,main{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:44px}
h1{font-size:2.1rem;line-height:1.2;margin:.1em 0;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:0 0 .8em;letter-spacing:-.01em}
h3{font-size:1rem;margin:0 0 .5em}
section{padding:28px 0 12px;scroll-margin-top:8px}
section>h3{margin-top:1.2em}
.eyebrow{margin:0;color:var(--muted);font-size:.82rem;letter-spacing:.04em}
.sub{margin:0 0 1em;color:var(--muted)}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;padding:10px 0;border-bottom:1px solid var(--line)}
a{color:var(--blue);text-decoration:none;font-size:.92rem}
a:hover{text-decoration:underline}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:16px}
.grid{display:grid;gap:16px;margin-bottom:16px}
.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
.three{grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin:0 0 16px;
min-width:0}
.grid .card,.cards .card{margin:0}
.cards+.card{margin-top:16px}
.score h3{color:var(--muted);font-weight:500;font-size:.92rem;margin:0}
.big{font-size:2.15rem;font-weight:650;line-height:1.15;margin:.1em 0 .2em;letter-spacing:-.02em}
.small,figcaption{color:var(--muted);font-size:.86rem;margin:.25em 0 0}
.muted{color:var(--muted)}
.good{color:var(--good);font-weight:600}.warn{color:var(--orange);font-weight:600}
.prose ul{margin:0;padding-left:1.2em}.prose li{margin:.4em 0;max-width:78ch}.prose p{max-width:78ch;margin:.3em 0}
.absent{color:var(--muted);font-style:italic;margin:0 0 16px}
svg{display:block;width:100%;height:auto}
.wide{overflow-x:auto}.wide svg{min-width:640px}
svg *{stroke-linejoin:round}
svg text{font-family:inherit!important}svg image{image-rendering:auto!important}
.gauge{height:14px;max-width:230px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:12px;margin-bottom:16px}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:right;padding:9px 14px;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-weight:500;font-size:.85rem;white-space:normal;vertical-align:bottom}
th:first-child{text-align:left}
tbody th{font-weight:500}
td small,th small{display:block;color:var(--muted);font-size:.8rem;font-weight:400}
.confusion{margin:12px 0 6px;table-layout:fixed;border-collapse:separate;border-spacing:6px}
.confusion th,.confusion td{border:0;white-space:normal;text-align:center;vertical-align:middle}
.confusion thead td{color:var(--muted);font-size:.85rem;text-align:left}
.confusion th[scope=row]{text-align:left;padding-left:4px}
.confusion tbody td{height:150px;border-radius:8px;font-size:.85rem}
.confusion b{display:block;font-size:1.7rem;line-height:1.3}
.confusion span{color:var(--muted)}
.right{background:color-mix(in srgb,var(--teal) calc(6% + var(--share)*.34),transparent)}
.wrong{background:color-mix(in srgb,var(--orange) calc(6% + var(--share)*.34),transparent)}
.meter{display:inline-block;width:90px;height:8px;border-radius:4px;margin-right:10px;vertical-align:middle;
background:linear-gradient(to right,var(--blue) var(--share),var(--line) var(--share))}
dl{margin:0;font-size:.9rem}
dl div{display:flex;gap:12px;justify-content:space-between;border-bottom:1px solid var(--line);padding:5px 0}
dl div:last-child{border:0}
dt{color:var(--muted)}dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0}
pre{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 18px;overflow-x:auto;
font:13px/1.5 ui-monospace,"Cascadia Mono",Menlo,Consolas,monospace;margin:0 0 16px}
summary{cursor:pointer;font-weight:600;margin-bottom:8px}
@media(max-width:600px){header,main{padding-left:14px;padding-right:14px}
.cards{grid-template-columns:1fr 1fr;gap:10px}.card{padding:14px}.big{font-size:1.6rem}}
@media print{nav{display:none}.card,figure{break-inside:avoid}}
"""
)


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------


def _main(runs: Sequence[str], out: str | None) -> int:
    try:
        if not runs:
            raise ValueError("no RUN given: python -m pcgjax.report RUN [RUN ...] [--out=FILE]; --help explains")
        if len(runs) == 1:
            if out:
                raise ValueError("--out is for the comparison of several runs; one run is drawn to RUN/report.html")
            path = write(runs[0])
        else:
            beside = pathlib.Path(runs[0]).resolve().parent
            rows = [compare_row(run) for run in runs]
            if len({row["name"] for row in rows}) < len(rows):  # a/cnn and b/cnn: the whole paths tell them apart
                rows = [{**row, "name": run.rstrip("/")} for row, run in zip(rows, runs, strict=True)]
            path = compare(rows, out or beside / "comparison.html", "Comparison of runs")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    from absl import app, flags

    flags.DEFINE_string("out", None, "The page that compares runs; default: comparison.html beside the first.")
    app.run(lambda argv: _main(argv[1:], flags.FLAGS.out))
