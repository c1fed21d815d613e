"""The page of a run: report.html from the files of a workdir."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pcgjax import metrics
from pcgjax.pages import page
from pcgjax.pages.curves import databases_table, decision_figures, training_curves
from pcgjax.pages.waveforms import example_figure, segmented_figures
from pcgjax.pages.words import HEADLINE, SEGMENTATION_DETAILS, best_trivial, word_of
from pcgjax.runs import log
from pcgjax.runs.results import (
    overall_scores,
    read_examples,
    read_json,
    read_predictions,
    read_results,
    read_segmented,
)
from pcgjax.runtime import files, hashes
from pcgjax.segmentation.scores import SEGMENTATION_HEADLINE


def write(workdir: str | pathlib.Path) -> pathlib.Path:
    """Draws `workdir/report.html` from what a run left there, and returns its path.

    Reads metrics.json ({"test", "validation": what `metrics.judge` returns; optional "control", "system", "split",
    "data"}), config.json, metrics.jsonl, predictions.csv and examples.npz (a float32 waveform (n,) by recording id,
    and `sample_rate_hz`). Of "split", `notes` (a text or a list of them) are shown as sentences, and `people_apart`
    (bool) says whether people of the test set were kept out of training; of "system", `command` is how to run it
    again. Only metrics.json must be there: what else is missing is left out with a sentence.

    A segmenter's metrics.json has instead of "test" an object "segmentation": {"test", "metronome", optionally
    "validation" and other answers' names: what `segmentation.scores.summarise` returns; "recordings", "people";
    optionally "intervals", as of `metrics.judge`}; its examples are in segments.npz, of `runs.results.save_examples`.

    Raises:
      ValueError: metrics.json is missing or any of the files is damaged, naming file, line or field, and fix.
    """
    workdir = pathlib.Path(workdir)
    if hashes.intact(workdir / "experiment.json"):
        from pcgjax.pages.classical import write_report

        return write_report(workdir)
    results = read_results(workdir / "metrics.json")
    test = results["test"]
    values = {
        "heading": f"Run {workdir.resolve().name}",
        "subtitle": _subtitle(test),
        "curves": training_curves(log.history(workdir / "metrics.jsonl")),
    }
    config = read_json(workdir / "config.json") if hashes.intact(workdir / "config.json") else None
    rows: list[dict[str, Any]] = []
    if "segmentation" in results:
        segmented = read_segmented(workdir / "segments.npz") if hashes.intact(workdir / "segments.npz") else None
        values |= _segmenter_values(results) | {"examples": segmented_figures(segmented)}
    else:
        rows = read_predictions(workdir / "predictions.csv") if hashes.intact(workdir / "predictions.csv") else []
        test_rows = _test_rows(workdir, test, rows)
        has_examples = rows and hashes.intact(workdir / "examples.npz")
        examples = read_examples(workdir / "examples.npz", rows) if has_examples else []
        values |= _classifier_values(results, test_rows, examples)
    values |= _reading_values(results, rows) | page.setup_values(results, config)
    path = workdir / "report.html"
    files.write_text(path, page.render("run.html", **values))
    hashes.update(path.parent, path.name)
    return path


def _test_rows(
    workdir: pathlib.Path, test: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The test rows of predictions.csv. Raises ValueError: metrics.json judges another number of recordings."""
    test_rows = [row for row in rows if row["split"] == "test"]
    if test_rows and test.get("recordings", len(test_rows)) != len(test_rows):
        raise ValueError(
            f"{workdir}: predictions.csv has {len(test_rows)} test rows, but metrics.json judges "
            f"{test['recordings']} recordings; they are of different runs: evaluate again"
        )
    return test_rows


def _subtitle(test: Mapping[str, Any]) -> str:
    counts = [
        page.count(test.get("recordings"), "test recording"),
        page.count(test.get("people"), "person", "people"),
        page.count(len(test.get("per_database") or ()) or None, "database"),
    ]
    return " · ".join(filter(None, counts))


def _cards(test: Mapping[str, Any], shown: Sequence[str]) -> list[page.Html]:
    overall = overall_scores(test)
    cards = []
    for metric in [m for m in shown if m in overall] or list(overall)[:8]:
        low, trivial = metrics.finite(overall[metric], "low"), best_trivial(test, metric)
        note: Any = "\N{NO-BREAK SPACE}"
        if trivial:
            note = page.verdict(low is not None and low > trivial[1], *trivial)
        elif metric in ("sensitivity", "specificity"):
            note = f"at threshold {page.number(test.get('threshold'), 2)}"
        cards.append(page.score_card(word_of(metric), overall[metric], trivial[1] if trivial else None, [note]))
    return cards


def _reading_values(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page says of the numbers: who was judged, how intervals came about, how many databases count."""
    test, split = results["test"], results.get("split") or {}
    people: dict[str, set] = {"test": set(), "validation": set()}
    for row in rows:
        people.setdefault(row["split"], set()).add((row["database"], row["person"]))
    intervals, mean, notes = test.get("intervals"), test.get("mean_database_auc"), split.get("notes") or []
    return {
        "in_both": [person for _, person in sorted(people["test"] & people["validation"])],
        "apart": split.get("people_apart"),
        "resamples": intervals.get("resamples") if isinstance(intervals, dict) else None,
        "has_mean": "mean_database_auc" in test,
        "counted": mean.get("databases") if isinstance(mean, Mapping) else None,
        "notes_of_split": [notes] if isinstance(notes, str) else notes,
        "has_trivial": bool(test.get("trivial")),
    }


def _classifier_values(
    results: Mapping[str, Any], test_rows: Sequence[Mapping[str, Any]], examples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    test = results["test"]
    right = [e for e in examples if e["label"] == e["decision"]]
    wrong = [e for e in examples if e["label"] != e["decision"]]
    columns, control = _columns(results)
    order = [m for m in (*HEADLINE, "precision", "brier") if m in columns[0][1]] or list(columns[0][1])
    return {
        "segmentation": False,
        "cards": _cards(test, HEADLINE),
        "decisions": decision_figures(test, test_rows),
        "databases": databases_table(test),
        "score_head": ["Score", *(name for name, _ in columns)],
        "score_rows": [[word_of(m), *(page.score(scores.get(m)) for _, scores in columns)] for m in order],
        "control": control,
        **_patient_values(test.get("patients")),
        "decision_rows": [
            [name.capitalize(), *(page.score(row.get(k)) for k in ("precision", "recall", "f1")),
             page.text(row.get("support"))]
            for name, row in (test.get("report") or {}).items()
        ],
        "class_rows": [
            [word, page.text(row.get("recordings")), page.number(metrics.finite(row.get("mean_probability"))),
             page.share(row.get("share_abnormal"))]
            for word, row in (test.get("per_class") or {}).items()
        ],
        "examples": [
            ("Right and confident", [example_figure(e) for e in right]),
            ("Wrong and confident", [example_figure(e) for e in wrong]),
        ] if examples else [],
    }  # fmt: skip


def _patient_values(patients: Mapping[str, Any] | None) -> dict[str, Any]:
    """A table of CirCor's patients: the Challenge's score and the AUC, by each rule, and of the baselines."""
    if not patients:
        return {"patients": None}
    name = patients["score"]
    rules = {"max": "A patient's highest probability", "mean": "A patient's mean probability"}
    rows = [
        [rules[rule], *(page.score(of.get(key)) for key in (name, "auc"))] for rule, of in patients["rules"].items()
    ]
    rows += [[f"Baseline: {word_of(baseline)}", page.score(of[name]), page.score(0.5)]
             for baseline, of in patients["trivial"].items()]  # fmt: skip
    return {"patients": patients, "patient_head": ["", word_of(name), "AUC"], "patient_rows": rows}


def _columns(results: Mapping[str, Any]) -> tuple[list[tuple[str, Mapping[str, Any]]], dict[str, Any]]:
    """All scores: (title, scores) of test, validation, any control, and the baselines; the control's rest."""
    columns: list[tuple[str, Mapping[str, Any]]] = [("Test", overall_scores(results["test"]))]
    if isinstance(results.get("validation"), dict):
        columns.append(("Validation", overall_scores(results["validation"])))
    rest: dict[str, Any] = {}
    control = results.get("control")
    if isinstance(control, dict):
        named = {"Control": control} if "overall" in control else control
        judged = {name: v for name, v in named.items() if isinstance(v, dict) and "overall" in v}
        columns += [(word_of(name), overall_scores(v)) for name, v in judged.items()]
        rest = {k: v for k, v in control.items() if k not in judged and "overall" not in control}
    trivial = results["test"].get("trivial") or {}
    # Every baseline answers alike within a database, so its mean AUC over databases is 0.5.
    columns += [(word_of(name).capitalize(), {"mean_database_auc": 0.5, **scores}) for name, scores in trivial.items()]
    return columns, rest


def _segmenter_values(results: Mapping[str, Any]) -> dict[str, Any]:
    overall, segmentation = results["test"]["overall"], results["segmentation"]
    apart = ("intervals", "per_database")
    answers = {name: v for name, v in segmentation.items() if isinstance(v, dict) and name not in apart}
    first = ("test", "validation", "metronome")
    names = [name for name in first if name in answers] + [name for name in answers if name not in first]
    known = (*SEGMENTATION_HEADLINE, "onset_f1_100ms", *SEGMENTATION_DETAILS)
    order = [m for m in known if m in overall] + [m for m in overall if m not in known]
    trivial = {"metronome": "Baseline: a metronome", "always": "Baseline: always"}
    beside = next(name for name in trivial if name in segmentation)
    shown = [m for m in ("onset_f1_60ms", "frame_accuracy", "f1") if m in segmentation["test"]]
    return {
        "segmentation": True,
        "cards": _cards(results["test"], SEGMENTATION_HEADLINE),
        "score_head": ["Score", *(trivial.get(name) or word_of(name).capitalize() for name in names)],
        "score_rows": [[word_of(m), *(page.score(answers[name].get(m)) for name in names)] for m in order],
        "database_head": ["Database", "Recordings", "People",
                          *(h for m in shown for h in (word_of(m), trivial[beside]))],
        "database_rows": [
            [name, str(of["recordings"]), str(of["people"]),
             *(page.score(of[answer].get(m)) for m in shown for answer in ("test", beside))]
            for name, of in segmentation.get("per_database", {}).items()
        ],
    }  # fmt: skip
