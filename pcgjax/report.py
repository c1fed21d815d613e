"""Draws report.html: what a training run is worth, in one file without a single outside request.

    python -m pcgjax.report RUN                        draws RUN/report.html again
    python -m pcgjax.report RUN RUN ... [--out=FILE]   compares runs in one page (comparison.html beside the first)

RUN is a workdir of pcgjax.train, or for a comparison of pcgjax.audio_llm.train. How such a page is made stands in
pcgjax/page.py, what that of a run shows here, and what that of several runs or of a population in pcgjax/compare.py.
"""

from __future__ import annotations

import csv
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax import files, metrics, page
from pcgjax.datasets import DIASTOLE, S1, S2, SYSTOLE
from pcgjax.page import BLUE, INK, LINE, MUTED, ORANGE, PURPLE, TEAL

WORDS = {
    "mean_database_auc": "Mean AUC over databases", "auc": "AUC", "auprc": "Average precision",
    "mean_accuracy": "MAcc", "accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1",
    "sensitivity": "Sensitivity", "specificity": "Specificity", "brier": "Brier score",
    "all_abnormal": "always abnormal", "all_normal": "always normal", "majority": "the commoner class",
    "database_prior": "the database alone", "metronome": "a metronome",
    "onset_f1_60ms": "Onset F1 (60 ms)", "onset_f1_100ms": "Onset F1 (100 ms)", "frame_accuracy": "Frame accuracy",
    "S1_onset_f1_60ms": "S1 onset F1 (60 ms)", "S2_onset_f1_60ms": "S2 onset F1 (60 ms)",
}  # fmt: skip
SEGMENTATION_HEADLINE = ("onset_f1_60ms", "frame_accuracy", "S1_onset_f1_60ms", "S2_onset_f1_60ms")
# What else is told of a segmenter, in a table only: comparisons of runs show WORDS.
SEGMENTATION_WORDS = {
    "onset_recall_60ms": "Onset recall (60 ms)", "onset_precision_60ms": "Onset precision (60 ms)",
    "onset_f1_60ms_by_recording": "Onset F1 (60 ms), mean over recordings",
    "frame_accuracy_by_recording": "Frame accuracy, mean over recordings",
    **{f"f1_{name}": f"F1 of {name} over frames" for name in ("S1", "systole", "S2", "diastole")},
    "f1_mean": "Mean of the four", "cycle_error_ms": "Error of a cycle's length (ms)",
    "heart_rate_error": "Error of the heart rate (beats/min)",
}  # fmt: skip
STATE_COLOURS = {"S1": (S1, BLUE), "systole": (SYSTOLE, TEAL), "S2": (S2, ORANGE), "diastole": (DIASTOLE, LINE)}
HEADLINE = ("mean_database_auc", "auc", "mean_accuracy", "f1", "accuracy", "auprc", "sensitivity", "specificity")
PREDICTION_FIELDS = ("id", "person", "database", "class", "label", "probability", "decision", "split", "path")
DECISIONS = ("normal", "abnormal")
EXAMPLE_FIELDS = ("id", "samples", "sample_rate_hz", "truth", "predicted", "score")
_SHOWN_S = 5.0  # of an example: some five heartbeats
_SHOWN_SEGMENTED_S = 8.0


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

    A segmenter's metrics.json has instead of "test" an object "segmentation": {"test", "metronome", optionally
    "validation" and other answers' names: what `segmentation.summarise` returns; "recordings", "people"; optionally
    "intervals", as of `metrics.judge`}; its examples are in segments.npz, of `save_examples`.

    Raises:
      ValueError: metrics.json is missing or any of the files is damaged, naming file, line or field, and fix.
    """
    workdir = pathlib.Path(workdir)
    if (workdir / "experiment.json").exists():
        from pcgjax import classical

        return classical.write_report(workdir)
    results = read_results(workdir / "metrics.json")
    config = read_json(workdir / "config.json") if (workdir / "config.json").exists() else None
    history = read_history(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else None
    path = workdir / "report.html"
    if "segmentation" in results:
        segmented = _segmented(workdir / "segments.npz") if (workdir / "segments.npz").exists() else None
        sections = _segmentation_sections(results, segmented)
        sections += [("training", "Training", training_curves(history)), ("setup", "Setup", _setup(results, config))]
        files.write_text(path, page.document(f"Run {workdir.resolve().name}", _subtitle(results["test"]), sections))
        return path
    rows = read_predictions(workdir / "predictions.csv") if (workdir / "predictions.csv").exists() else None
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
        ("training", "Training", training_curves(history)),
        ("databases", "Database by database", databases_table(test)),
        ("trivial", "Beside trivial answers", _trivial(results)),
        ("classes", "Class by class", _classes(test)),
        ("examples", "The surest answers", _example_figures(examples)),
        ("setup", "Setup", _setup(results, config)),
    ]
    files.write_text(path, page.document(f"Run {workdir.resolve().name}", _subtitle(test), sections))
    return path


def save_examples(workdir: str | pathlib.Path, examples: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    """Writes `workdir/segments.npz`, what `write` draws of a segmenter's recordings, and returns its path.

    Args: examples: of each recording `id`; `samples` (n,); `sample_rate_hz`; `truth` and `predicted`, spans
      (start_s, end_s, state) as of `segmentation.spans`; `score`, as of `segmentation.rates`.
    Raises:
      ValueError: a field is missing.
    """
    told: list[dict[str, Any]] = []
    arrays: dict[str, Any] = {}
    for i, example in enumerate(examples):
        for field in EXAMPLE_FIELDS:
            if field not in example:
                raise ValueError(f"examples[{i}]: no field {field!r}")
        arrays[f"samples_{i}"] = np.asarray(example["samples"], np.float32)
        score = {name: page.finite(value) for name, value in example["score"].items()}
        bands = {name: [list(span) for span in example[name]] for name in ("truth", "predicted")}
        told.append({"id": example["id"], "sample_rate_hz": float(example["sample_rate_hz"]), "score": score, **bands})
    path = pathlib.Path(workdir) / "segments.npz"
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, examples=np.array(json.dumps(told)), **arrays)
    return path


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


# ---------------------------------------------------------------------------------------------------------------
# Reading a workdir
# ---------------------------------------------------------------------------------------------------------------


def read_json(path: pathlib.Path) -> dict[str, Any]:
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


def read_results(path: pathlib.Path) -> dict[str, Any]:
    results = read_json(path)
    if "runs" in results:
        raise ValueError(f"{path}: of an audio LLM, whose page python -m pcgjax.audio_llm.score draws")
    segmentation = results.get("segmentation")
    if segmentation is not None:
        beside = "always" if isinstance(segmentation, dict) and "always" in segmentation else "metronome"
        for name in ("test", beside):
            if not isinstance(segmentation, dict) or not isinstance(segmentation.get(name), dict):
                raise ValueError(f"{path}: no object `{name}` in `segmentation`; let train end, or evaluate again")
        values = {name: page.finite(value) for name, value in segmentation[beside].items()}
        trivial = {name: value for name, value in values.items() if value is not None}
        rest = {k: v for k, v in segmentation.items() if k == "intervals" or not isinstance(v, dict)}
        results["test"] = {**rest, "overall": segmentation["test"], "trivial": {beside: trivial}}
    if not isinstance(results.get("test"), dict):
        raise ValueError(f"{path}: no object `test`; a finished run has one: let train end, or evaluate again")
    return results


def read_history(path: pathlib.Path) -> list[dict[str, Any]]:
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


def read_predictions(path: pathlib.Path) -> list[dict[str, Any]]:
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


def _segmented(path: pathlib.Path) -> list[dict[str, Any]]:
    """What `save_examples` wrote, the best first."""
    fix = "delete the file to leave the examples out, or write it again with train"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        told = json.loads(str(arrays["examples"]))
        found = [{**example, "samples": arrays[f"samples_{i}"]} for i, example in enumerate(told)]
    except Exception as error:  # numpy and zipfile raise half a dozen kinds
        raise ValueError(f"{path}: not a readable .npz of segmented recordings ({error}); {fix}") from None
    for example in found:
        lacking = [field for field in EXAMPLE_FIELDS if field not in example]
        if lacking:
            raise ValueError(f"{path}: an example has no {', '.join(lacking)}; {fix}")
        samples = example["samples"]
        if samples.ndim != 1 or len(samples) < 2 or not np.isfinite(samples).all():
            raise ValueError(f"{path}, {example['id']}: need (n,) finite samples, found shape {samples.shape}; {fix}")
        if not example["sample_rate_hz"] > 0:
            raise ValueError(f"{path}, {example['id']}, sample_rate_hz: need a positive number; {fix}")

    def worth(example: Mapping[str, Any]) -> list[float]:
        return [page.finite(example["score"].get(m)) or 0.0 for m in SEGMENTATION_HEADLINE[:2]]

    return sorted(found, key=worth, reverse=True)


# ---------------------------------------------------------------------------------------------------------------
# Sections of a run's page
# ---------------------------------------------------------------------------------------------------------------


def overall_scores(test: Mapping[str, Any]) -> dict[str, Any]:
    """{metric: number or {"value", "low", "high"}}: a judgement's, or whatever scores another task left."""
    if "overall" not in test:
        return {k: v for k, v in test.items() if page.finite(v) is not None}
    overall = dict(test["overall"])
    if "mean_database_auc" in test:
        overall = {"mean_database_auc": test["mean_database_auc"], **overall}
    return overall


def best_trivial(test: Mapping[str, Any], metric: str) -> tuple[str, float] | None:
    """The trivial answer that does best by a score; none for a score of which a trivial answer gets everything."""
    if metric == "mean_database_auc":
        return "the database alone", 0.5
    if metric in ("sensitivity", "specificity", "recall", "precision"):
        return None
    known = {name: page.finite(scores.get(metric)) for name, scores in (test.get("trivial") or {}).items()}
    scores = {name: value for name, value in known.items() if value is not None}
    if not scores:
        return None
    best = max(scores, key=lambda name: scores[name])
    return WORDS.get(best, best), scores[best]


def _subtitle(test: Mapping[str, Any]) -> str:
    counts = [
        page.count(test.get("recordings"), "test recording"),
        page.count(test.get("people"), "person", "people"),
        page.count(len(test.get("per_database") or ()) or None, "database"),
    ]
    return " · ".join(filter(None, counts))


def _headline(test: Mapping[str, Any], shown: Sequence[str] = HEADLINE) -> str:
    overall = overall_scores(test)
    cards = []
    for metric in [m for m in shown if m in overall] or list(overall)[:8]:
        value, low, high = (page.finite(overall[metric], key) for key in ("value", "low", "high"))
        trivial = best_trivial(test, metric)
        if trivial:
            clear = low is not None and low > trivial[1]
            kind, verdict = ("good", "clearly above") if clear else ("warn", "not clearly above")
            note = f'<span class="{kind}">{verdict}</span> {page.escape(trivial[0])} ({page.number(trivial[1])})'
        elif metric in ("sensitivity", "specificity"):
            note = f"at threshold {page.number(test.get('threshold'), 2)}"
        else:
            note = "&nbsp;"
        interval = f"95 % interval {page.interval(low, high)}" if low is not None else "no interval"
        cards.append(
            f'<div class="card score"><h3>{page.escape(word_of(metric))}</h3><p class="big">{page.number(value)}</p>'
            f"{page.gauge(value, low, high, trivial[1] if trivial else None)}"
            f'<p class="small">{interval}</p><p class="small">{note}</p></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


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
        names = ", ".join(page.escape(person) for _, person in sorted(both)[:5]) + (" …" if len(both) > 5 else "")
        says.append(
            f'<span class="warn">{page.count(len(both), "person is", "people are")} both in validation and in '
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
            f"their database ({page.number(how['resamples'])} times): several recordings of one person say little "
            "more than one. They do not cover another training run, hospital or stethoscope; and where all of few "
            "people were answered alike, a narrow interval such as 1.000–1.000 is not certainty."
        )
    if "mean_database_auc" in test:
        counted = test["mean_database_auc"]
        counted = counted.get("databases") if isinstance(counted, Mapping) else None
        over = f", here over {page.count(counted, 'database')} with both classes" if counted else ""
        says.append(
            "Databases differ in device, place and share of patients. A model that only recognises the database "
            "scores well on all recordings together; it gets 0.5 in each database. The mean AUC over databases is "
            f"therefore the number to trust{over}."
        )
    notes = split.get("notes") or []
    says += [page.escape(note) for note in ([notes] if isinstance(notes, str) else notes)]
    if "segmentation" in results:
        says.append(
            "The orange tick is a metronome: it does not listen, but is told each recording's own heart rate. Only "
            "annotated stretches are judged, and no onset as near to their edges as the tolerance."
        )
    elif test.get("trivial"):
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
    return f'<div class="grid two">{"".join(parts)}</div>'


def roc_figure(test: Mapping[str, Any], y: np.ndarray, p: np.ndarray) -> str:
    """HTML of the curve of labels `y` and probabilities `p`, both (N,), with the decision that was taken."""
    fpr, tpr, _ = metrics.roc_curve(y, p)
    auc, se, sp = (page.finite(overall_scores(test).get(k)) for k in ("auc", "sensitivity", "specificity"))

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
    said = "of an abnormal and a normal recording, how often the abnormal one gets the higher probability"
    return page.card("ROC curve", figure, f"AUC {page.number(auc)}: {said}.")


def _pr(test: Mapping[str, Any], y: np.ndarray, p: np.ndarray) -> str:
    recall, precision, _ = metrics.pr_curve(y, p)
    ap, re, pr = (page.finite(overall_scores(test).get(k)) for k in ("auprc", "recall", "precision"))
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

    said = f"average precision {page.number(ap)}, share of abnormal {share:.3f}"
    figure = page.svg(420, 380, f"Precision-recall curve of the test set, {said}", paint)
    caption = f"Average precision {page.number(ap)}. The orange point is the decision threshold."
    return page.card("Precision and recall", figure, caption)


def confusion_table(test: Mapping[str, Any]) -> str:
    """HTML of the counts that `metrics.judge` found."""
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
    threshold = page.number(test.get("threshold"), 2)
    return page.card("Confusion matrix", table, f"Called abnormal when the probability is {threshold} or more.")


def _reliability(test: Mapping[str, Any]) -> str:
    bins = test["calibration"]["bins"]
    used = [b for b in bins if b["recordings"]]
    ece, brier = page.finite(test["calibration"].get("ece")), page.finite(overall_scores(test).get("brier"))

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

    said = f"expected calibration error {page.number(ece)}, Brier score {page.number(brier)}"
    alt = f"Reliability curve of the test set and histogram of its probabilities, {said}"
    figure = page.svg(420, 380, alt, paint)
    return page.card("Reliability", figure, f"E{said[1:]}. On the dashed line a probability is what it says.")


def training_curves(history: Sequence[Mapping[str, Any]] | None) -> str:
    """Loss and validation score by step, as HTML; history: of `read_history`."""
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


def databases_table(test: Mapping[str, Any]) -> str:
    """HTML of what `metrics.judge` found inside each database."""
    per_database = test.get("per_database")
    if not per_database:
        return page.absent("metrics.json has no per_database.")
    mean = page.finite(test.get("mean_database_auc"))
    height = 70 + 46 * len(per_database)

    def paint(figure: Any) -> None:
        ax = figure.subplots()
        for i, (_, scores) in enumerate(per_database.items()):
            value, low, high = (page.finite(scores.get("auc"), key) for key in ("value", "low", "high"))
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
        lows = [v for s in per_database.values() if (v := page.finite(s.get("auc"), "low")) is not None]
        values = [v for s in per_database.values() if (v := page.finite(s.get("auc"))) is not None]
        ax.set_xlim(max(0, min([0.4, *(v - 0.03 for v in lows + values)])), 1.0)
        ax.grid(False, axis="y")
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("AUC (0.5 is chance)")
        figure.subplots_adjust(left=0.12, right=0.73, top=1 - 28 / height, bottom=42 / height)

    told = "; ".join(f"{name} {page.number(page.finite(s.get('auc')))}" for name, s in per_database.items())
    figure = page.svg(960, height, f"AUC of each database with its interval: {told}", paint, free=True)
    columns = ("auc", "mean_accuracy", "sensitivity", "specificity", "f1", "brier")
    head = ["Database", "Recordings", "People", "Abnormal", *(word_of(c) for c in columns)]
    body = [[page.escape(name), *(page.escape(s.get(k)) for k in ("recordings", "people", "positives")),
             *(page.score(s.get(c)) for c in columns)] for name, s in per_database.items()]  # fmt: skip
    return page.card("", figure, "Bars from chance; whiskers are 95 % intervals.") + page.table(head, body)


def _trivial(results: Mapping[str, Any]) -> str:
    """All scores in full: test, validation, any control, and the trivial answers on the test set."""
    columns: list[tuple[str, Mapping[str, Any]]] = [("Test", overall_scores(results["test"]))]
    if isinstance(results.get("validation"), dict):
        columns.append(("Validation", overall_scores(results["validation"])))
    said = ""
    control = results.get("control")
    if isinstance(control, dict):
        named = {"Control": control} if "overall" in control else control
        judged = {name: v for name, v in named.items() if isinstance(v, dict) and "overall" in v}
        columns += [(word_of(name), overall_scores(v)) for name, v in judged.items()]
        rest = {k: v for k, v in control.items() if k not in judged and "overall" not in control}
        said = f"<h3>Control</h3>{page.facts(rest)}" if rest else ""
    trivial = results["test"].get("trivial") or {}
    # An answer that is the same within a database has AUC 0.5 there, whatever it is.
    columns += [(word_of(name).capitalize(), {"mean_database_auc": 0.5, **scores}) for name, scores in trivial.items()]
    order = [m for m in (*HEADLINE, "precision", "brier") if m in columns[0][1]] or list(columns[0][1])
    body = [[page.escape(word_of(m)), *(page.score(scores.get(m)) for _, scores in columns)] for m in order]
    note = (
        "MAcc is the mean of sensitivity and specificity. Of the Brier score less is better. n/a is a score that is "
        "undefined, such as the precision of an answer that never says abnormal. "
    )
    if trivial:
        note += "Trivial answers are told the test set's commoner class and its databases' shares of abnormal."
    else:
        note += "metrics.json has no trivial answers to compare with."
    note = f'<p class="small">{page.escape(note)}</p>'
    return page.table(["Score", *(name for name, _ in columns)], body) + note + said


def _classes(test: Mapping[str, Any]) -> str:
    parts = []
    if test.get("report"):
        head = ["", "Precision", "Recall", "F1", "Recordings"]
        body = [[page.escape(name.capitalize()), *(page.score(row.get(k)) for k in ("precision", "recall", "f1")),
                 page.escape(row.get("support"))] for name, row in test["report"].items()]  # fmt: skip
        parts.append(f"<div><h3>The two decisions</h3>{page.table(head, body)}</div>")
    if test.get("per_class"):
        head = ["The data set's word", "Recordings", "Mean probability", "Called abnormal"]
        body = [
            [page.escape(word), page.escape(row.get("recordings")),
             page.number(page.finite(row.get("mean_probability"))), page.share(row.get("share_abnormal"))]
            for word, row in test["per_class"].items()
        ]  # fmt: skip
        parts.append(f"<div><h3>The data set's classes</h3>{page.table(head, body)}</div>")
    return f'<div class="grid two">{"".join(parts)}</div>' if parts else page.absent("metrics.json has no classes.")


def _example_figures(examples: Sequence[Mapping[str, Any]] | None) -> str:
    if not examples:
        return page.absent("No waveforms: the run left no examples.npz, or no predictions.csv to name them.")
    parts = []
    for title, right in (("Right, and sure of it", True), ("Wrong, and sure of it", False)):
        own = [e for e in examples if (e["label"] == e["decision"]) == right]
        cards = "".join(_example(e, TEAL if right else ORANGE) for e in own)
        none = page.absent("None were kept: every answer was of the other kind.")
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
    name, database, person, word = (page.escape(example[field]) for field in ("id", "database", "person", "class"))
    caption = (
        f"<b>{name}</b> · {database} · person {person}<br>"
        f"Truth <b>{truth}</b> ({word}), called <b>{called}</b> with probability of abnormal "
        f"<b>{page.number(example['probability'])}</b>.{whole}"
    )
    return page.card("", page.svg(460, 250, alt, paint), caption)


def _segmentation_sections(
    results: Mapping[str, Any], examples: Sequence[Mapping[str, Any]] | None
) -> list[tuple[str, str, str]]:
    test, segmentation = results["test"], results["segmentation"]
    apart = ("intervals", "per_database")
    answers = {name: v for name, v in segmentation.items() if isinstance(v, dict) and name not in apart}
    first = ("test", "validation", "metronome")
    names = [name for name in first if name in answers] + [name for name in answers if name not in first]
    known = (*SEGMENTATION_HEADLINE, "onset_f1_100ms", *SEGMENTATION_WORDS)
    order = [m for m in known if m in test["overall"]] + [m for m in test["overall"] if m not in known]
    trivial = {"metronome": "Trivial: a metronome", "always": "Trivial: always"}
    head = ["Score", *(trivial.get(name) or word_of(name).capitalize() for name in names)]
    body = [
        [page.escape(SEGMENTATION_WORDS.get(m, word_of(m))), *(page.score(answers[name].get(m)) for name in names)]
        for m in order
    ]
    note = (
        "All recordings' onsets and frames counted together, or where it says so the mean over recordings. An onset "
        "is right when one of the same sound is predicted within the tolerance. Of the errors less is better; n/a is "
        "a score that is undefined."
    )
    return [
        ("scores", "Scores", _headline(test, SEGMENTATION_HEADLINE) + _honesty(results, None)),
        ("trivial", "Beside a trivial answer", page.table(head, body) + f'<p class="small">{note}</p>'),
        ("databases", "Database by database", _segmented_databases(segmentation, trivial)),
        ("examples", "From the best to the worst recording", _segmented_figures(examples)),
    ]


def _segmented_databases(segmentation: Mapping[str, Any], trivial: Mapping[str, str]) -> str:
    own = segmentation.get("per_database", {})
    if not own:
        return page.absent("The run did not judge its databases one by one.")
    beside = next(name for name in trivial if name in segmentation)
    shown = [m for m in ("onset_f1_60ms", "frame_accuracy", "f1") if m in segmentation["test"]]
    head = ["Database", "Recordings", "People", *(h for m in shown for h in (word_of(m), trivial[beside]))]
    body = [
        [page.escape(name), str(of["recordings"]), str(of["people"])]
        + [page.score(of[answer].get(m)) for m in shown for answer in ("test", beside)]
        for name, of in own.items()
    ]
    return page.table(head, body)


def _segmented_figures(examples: Sequence[Mapping[str, Any]] | None) -> str:
    if not examples:
        return page.absent("No recordings: the run left no segments.npz.")
    kinds = ("Best", "Median", "Worst") if len(examples) == 3 else ("",) * len(examples)
    return "".join(map(_segmented_figure, examples, kinds))


def _segmented_figure(example: Mapping[str, Any], kind: str) -> str:
    rate, samples = example["sample_rate_hz"], np.asarray(example["samples"], np.float64)
    annotated = [start_s for start_s, _, state in example["truth"] if state]
    begin_s = min(annotated[0] if annotated else 0.0, max(0.0, len(samples) / rate - _SHOWN_SEGMENTED_S))
    first = int(begin_s * rate)
    shown = samples[first : first + int(_SHOWN_SEGMENTED_S * rate)]
    end_s = begin_s + len(shown) / rate
    block = max(1, len(shown) // 1800)
    used = shown[: len(shown) // block * block].reshape(-1, block)
    t = begin_s + np.arange(len(used)) * block / rate

    def paint(figure: Any) -> None:
        from matplotlib.patches import Patch

        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
        top.fill_between(t, used.min(1), used.max(1), color=MUTED, linewidth=0.7)
        top.set_yticks([])
        for y, name in enumerate(("predicted", "truth")):
            for state, colour in STATE_COLOURS.values():
                bars = [(a, b - a) for a, b, s in example[name] if s == state and a < end_s and b > begin_s]
                bottom.broken_barh(bars, (y - 0.4, 0.8), facecolors=colour, linewidth=0)
        bottom.set_yticks([0, 1], ["predicted", "truth"])
        bottom.tick_params(axis="y", colors=INK, length=0)
        bottom.set_xlim(begin_s, end_s)
        bottom.set_xlabel("s")
        for ax in (top, bottom):
            ax.spines["left"].set_visible(False)
            ax.grid(False, axis="y")
        handles = [Patch(color=colour, label=name) for name, (_, colour) in STATE_COLOURS.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=4)

    found = {word_of(m): page.finite(example["score"].get(m)) for m in SEGMENTATION_HEADLINE[:2]}
    told = ", ".join(f"{name} {page.number(value)}" for name, value in found.items())
    alt = f"Waveform of recording {example['id']} with its true and predicted states: {told}"
    part = f" {end_s - begin_s:.0f} of {len(samples) / rate:.0f} s, from where the annotation begins."
    caption = f"<b>{page.escape(example['id'])}</b> · {told}.{part if len(shown) < len(samples) else ''}"
    return page.card(kind, page.svg(960, 230, alt, paint), caption)


def _setup(results: Mapping[str, Any], config: Mapping[str, Any] | None) -> str:
    system = dict(results.get("system") or {})
    command = system.pop("command", None)
    if isinstance(command, list):
        command = " ".join(map(str, command))
    none = page.absent("metrics.json does not hold the command of this run.")
    said = f"<pre>{page.escape(command)}</pre>" if command else none
    parts = [f"<h3>Command</h3>{said}"]
    split = {k: v for k, v in (results.get("split") or {}).items() if k != "notes"}
    facts = {"Data": results.get("data"), "Split": split, "System": system}
    cards = (f'<div class="card"><h3>{title}</h3>{page.facts(part)}</div>' for title, part in facts.items() if part)
    parts.append(f'<div class="grid three">{"".join(cards)}</div>')
    if config is None:
        parts.append(page.absent("No config: the run left no config.json."))
    else:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        parts.append(f"<details open><summary>config.json</summary><pre>{page.escape(text)}</pre></details>")
    return "".join(parts)


def word_of(metric: str) -> str:
    return WORDS.get(metric, metric.replace("_", " "))


def _unit_square(ax: Any, x: str | None, y: str) -> None:
    ax.set_xlim(-0.01, 1.01)
    ax.set_ylim(-0.01, 1.03)
    ax.set_title(y, color=MUTED, fontweight="normal", fontsize=11)
    if x:
        ax.set_xlabel(x)


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------


def _check_run(workdir: pathlib.Path) -> None:
    if not workdir.is_dir():
        raise ValueError(f"{workdir}: no such folder; RUN is the --workdir of a run")
    if any((workdir / name).exists() for name in ("metrics.json", "population.json")):
        return
    if inner := sorted(str(path.parent) for path in workdir.glob("*/metrics.json")):
        raise ValueError(f"{workdir}: not a run but a folder of runs: give {' '.join(inner)}")
    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir}: the run has not ended, there is no metrics.json; its command goes on with it")
    raise ValueError(f"{workdir}: not a run, there is no metrics.json; RUN is the --workdir of a run")


def _main(runs: Sequence[str], out: str | None) -> None:
    from pcgjax import compare

    if not runs:
        raise ValueError("no RUN given: python -m pcgjax.report RUN [RUN ...] [--out=FILE]; --help explains")
    for run in runs:
        _check_run(pathlib.Path(run))
    if len(runs) == 1:
        if out:
            raise ValueError("--out is for the comparison of several runs; one run is drawn to RUN/report.html")
        population = (pathlib.Path(runs[0]) / "population.json").exists()
        path = compare.population(runs[0]) if population else write(runs[0])
    else:
        beside = pathlib.Path(runs[0]).resolve().parent
        rows = [compare.row(run) for run in runs]
        if len({row["name"] for row in rows}) < len(rows):  # a/cnn and b/cnn: the whole paths tell them apart
            rows = [{**row, "name": run.rstrip("/")} for row, run in zip(rows, runs, strict=True)]
        path = compare.write(rows, out or beside / "comparison.html", "Comparison of runs")
    print(path)


if __name__ == "__main__":
    from absl import flags

    flags.DEFINE_string("out", None, "The page that compares runs; default: comparison.html beside the first.")
    files.run(lambda argv: _main(argv[1:], flags.FLAGS.out))
