"""The page of a run: report.html from the files of a workdir."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pcgjax import metrics
from pcgjax.pages import page
from pcgjax.pages.curves import databases_table, decision_figures, training_curves
from pcgjax.pages.waveforms import example_figures, segmented_figures
from pcgjax.pages.words import HEADLINE, SEGMENTATION_WORDS, best_trivial, word_of
from pcgjax.runs import log
from pcgjax.runs.results import (
    overall_scores,
    read_examples,
    read_json,
    read_predictions,
    read_results,
    read_segmented,
)
from pcgjax.runtime import files
from pcgjax.segmentation.scores import SEGMENTATION_HEADLINE


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
        from pcgjax.pages.classical import write_report

        return write_report(workdir)
    results = read_results(workdir / "metrics.json")
    config = read_json(workdir / "config.json") if (workdir / "config.json").exists() else None
    history = log.history(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else None
    path = workdir / "report.html"
    if "segmentation" in results:
        segmented = read_segmented(workdir / "segments.npz") if (workdir / "segments.npz").exists() else None
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
    examples = read_examples(workdir / "examples.npz", rows) if rows and (workdir / "examples.npz").exists() else None

    sections = [
        ("scores", "Scores", _headline(test) + _honesty(results, rows)),
        ("curves", "Decisions and probabilities", decision_figures(test, test_rows)),
        ("training", "Training", training_curves(history)),
        ("databases", "Database by database", databases_table(test)),
        ("trivial", "Beside trivial answers", _trivial(results)),
        ("classes", "Class by class", _classes(test)),
        ("examples", "The surest answers", example_figures(examples)),
        ("setup", "Setup", _setup(results, config)),
    ]
    files.write_text(path, page.document(f"Run {workdir.resolve().name}", _subtitle(test), sections))
    return path


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
        value, low, high = (metrics.finite(overall[metric], key) for key in ("value", "low", "high"))
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
             page.number(metrics.finite(row.get("mean_probability"))), page.share(row.get("share_abnormal"))]
            for word, row in test["per_class"].items()
        ]  # fmt: skip
        parts.append(f"<div><h3>The data set's classes</h3>{page.table(head, body)}</div>")
    return f'<div class="grid two">{"".join(parts)}</div>' if parts else page.absent("metrics.json has no classes.")


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
        ("examples", "From the best to the worst recording", segmented_figures(examples)),
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
