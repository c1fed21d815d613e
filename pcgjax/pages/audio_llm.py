"""An audio LLM's results: in tables like the paper's, the same for a terminal, and the page.

All of it is drawn from the results alone, as metrics.json has them (`audio_llm.conclude.score_part`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pcgjax import metrics
from pcgjax.pages import page
from pcgjax.pages.curves import training_curves
from pcgjax.published import AUDIO_LLM_PAPER
from pcgjax.runs.log import history
from pcgjax.runtime import hashes

FEATURES = ("timing", "shape", "grading", "pitch", "quality")
LETTERS = "ABCDEF"
TASKS = ("murmur", *(f"{phase}_{feature}" for phase in ("systolic", "diastolic") for feature in FEATURES))
ZERO_SHOT_SCORES = ("accuracy", "precision_normal", "precision_abnormal", "mean_accuracy", "auc")
_MOST_S = 30  # that Qwen2-Audio hears of a clip
_TINY = 1e9  # parameters: Qwen2-Audio has 8.4e9


class Table(NamedTuple):
    """A cell is a text, a number, S = {"value", "low", "high"}, or None for what was not judged."""

    title: str
    head: tuple[str, ...]
    body: list[list[Any]]
    note: str


def tables(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The paper's Tables 1 to 3 with these runs side by side, and the Challenge's scores.

    Args: results: of `audio_llm.conclude.score_part`, one a run, the scores of `audio_llm.zero_shot` in "zero_shot".
    """
    names = [f"{one['name']}, {one['front_end']}" for one in results]
    columns = [name for run in names for name in (run, "shuffled audio", "majority")]
    shown = []
    for number, phase, quoted in ((1, "systolic", "Deep CardioSound"), (2, "diastolic", "M2D + AST")):
        body = [_task_row(f"{phase}_{feature}", feature.capitalize(), results) for feature in FEATURES]
        title, note = f"Table {number}: {phase} murmurs", "Majority: always the class of most people in training."
        if any("one class" in row[0] for row in body):
            note += " Where one class alone occurs among these people, 100 % means nothing."
        note = " ".join(filter(None, (note, differences(results))))
        if number == 2:
            title += ", and the murmur itself"
            note += " W.acc: patients, Present counting 5, Unknown 3, Absent 1; its majority is always Present."
            cells: list[Any] = []
            for one in results:
                cells += [_patients(one, part).get("weighted_accuracy") for part in ("test", "control")]
                cells.append(_patients(one, "test").get("trivial_weighted_accuracy", {}).get("always Present"))
            body += [_task_row("murmur", "Murmur", results), ["W.acc", *cells, *AUDIO_LLM_PAPER["weighted_accuracy"]]]
        shown.append(Table(title, ("", *columns, "paper N.S", "paper W.S", quoted), body, note))
    if any(one["test"]["patients"] for one in results):
        shown.append(_patients_table(results, names))
    if any(one["zero_shot"] for one in results):
        shown += _zero_shot_tables(results, names)
    return shown


def differences(results: Sequence[Mapping[str, Any]]) -> str:
    """A sentence to be said of runs that were not judged on the same people and questions, else nothing."""
    for what, words in (("people", "judged on different people"), ("questions", "asked different questions")):
        if len({one["test"]["asked"][what] for one in results}) > 1:
            return f"These runs were {words}: they cannot be compared with each other, only each with its own majority."
    return ""


def _task_row(task: str, name: str, results: Sequence[Mapping[str, Any]]) -> list[Any]:
    cells: list[Any] = []
    for one in results:
        test, control = ((one[part] or {"tasks": {}})["tasks"].get(task, {}) for part in ("test", "control"))
        cells += [test.get("accuracy"), control.get("accuracy"), test.get("majority_accuracy")]
        if test.get("informative") is False and "one class" not in name:
            name += " (one class)"
    return [name, *cells, *AUDIO_LLM_PAPER.get(task, (None, None, None))]


def _patients(result: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    return (result[part] or {}).get("patients") or {}


def _patients_table(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    body: list[list[Any]] = []
    for one, name in zip(results, names, strict=True):
        for part, who in (("test", name), ("control", f"{name}: shuffled audio")):
            if scores := _patients(one, part):
                cost = scores["cost"] or {}
                between = " to ".join(f"{cost[end]:,.0f}" for end in ("low", "high") if cost.get(end) is not None)
                money = f"{cost['value']:,.0f}" if cost else None
                money = f"{money} ({between})" if between else money
                body.append([who, scores["weighted_accuracy"], scores["excess"], money, scores["patients"]])
        scores = _patients(one, "test")
        for answer, value in scores.get("trivial_weighted_accuracy", {}).items():
            cost = scores["trivial_cost"][answer]
            money = None if cost is None else f"{cost:,.0f}"
            body.append([f"{name}: {answer}", value, None, money, scores["patients"]])
    note = (
        "The Challenge's formulas of 2022; of the cost less is better. A patient's murmur is the likeliest on the mean "
        "over all recordings of that patient, audible there or not. No outcome is asked for: Absent counts as Normal."
    )
    note = " ".join(filter(None, (note, differences(results))))
    head = ("", "W.acc", "Over always Present", "Cost a patient", "Patients")
    return Table("Patients, by the official formulas", head, body, note)


def _zero_shot_tables(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Table]:
    head = ("", *(name for run in names for name in (run, "majority")), "paper N.S", "paper W.S")
    databases = list(dict.fromkeys(name for one in results for name in one["zero_shot"]))
    first = [name for name in ("cinc2016", "pascal-a", "pascal-b") if name in databases]

    def body(shown: Sequence[str]) -> list[list[Any]]:
        rows = []
        for database in shown:
            known = [one["zero_shot"].get(database, {}) for one in results]
            count = next(scores["recordings"] for scores in known if scores)
            for score in ZERO_SHOT_SCORES:
                cells: list[Any] = []
                for one in known:
                    cells += [one.get(score), one.get("majority_accuracy") if score == "accuracy" else None]
                paper = AUDIO_LLM_PAPER.get(f"{database}/{score}", (None, None, None))[:2]
                rows.append([f"{database} ({count:,}): {score.replace('_', ' ')}", *cells, *paper])
        return rows

    note = (
        "Normal against abnormal by the murmur question alone; none of these people was trained on. Present or Unknown "
        "as the likeliest class means abnormal. Precision: how many of those called so are so. Majority: the commoner "
        "class of the same recordings; chance is a mean accuracy and an AUC of 0.5."
    )
    shown = [Table("Table 3: normal or abnormal, zero-shot", head, body(first), note)]
    # PASCAL's two sets are the paper's; of both together it says nothing.
    if rest := [name for name in databases if name not in (*first, "pascal")]:
        shown.append(Table("Zero-shot, the other databases one by one", head, body(rest), ""))
    return shown


def as_text(table: Table) -> str:
    """A table for a terminal."""

    def text(cell: Any) -> str:
        if cell is None or isinstance(cell, str):
            return cell or "-"
        return page.number(cell) if isinstance(cell, int) else page.spoken(cell)

    lines = [list(table.head), *([text(cell) for cell in row] for row in table.body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    rows = ("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join([table.title, *rows, *([table.note] if table.note else [])])


def summary(results: Mapping[str, Any]) -> str:
    """What metrics.json says, for a terminal."""
    judged = list(results["runs"].values())
    parts = [as_text(table) for table in tables(judged)]
    parts += [f"{one['name']}: " + " ".join(_remarks(one)) for one in judged]
    return "\n\n".join(parts)


def _remarks(result: Mapping[str, Any]) -> list[str]:
    """What else must be said of a run, as sentences."""
    test, mean, control = result["test"], result["test"]["mean"], result["control"]
    sentences = []
    if result["base"]["parameters"] < _TINY:
        sentences.append(
            f"The base model has {result['base']['parameters']:,} parameters, not the 8.4e9 of Qwen2-Audio: its "
            "weights are random, and accuracies say little."
        )
    sentences.append(
        f"{page.count(test['questions'], 'question')} about {page.count(test['recordings'], 'recording')} of "
        f"{page.count(test['people'], 'person', 'people')} ({result['part']})."
    )
    if mean["accuracy"]:
        shuffled = f", with shuffled audio {page.number(control['mean']['accuracy'])}" if control else ""
        sentences.append(
            f"Mean over the {len(mean['tasks'])} tasks with more than one class: {page.spoken(mean['accuracy'])}, "
            f"majority {page.number(mean['majority_accuracy'])}{shuffled}; "
            f"over the majority {page.spoken(mean['excess'])}."
        )
    else:
        sentences.append("No task has more than one class here: no accuracy means anything.")
    if control is None:
        sentences.append("No control with shuffled audio: it needs recordings of two people.")
    if any(scores["majority_from"] == "test" for scores in test["tasks"].values()):
        sentences.append("Without training questions the majority is that of the test questions themselves.")
    sentences.append(f"Probability on the six letters together: {page.number(test['letters']['share'])}.")
    generated = result["agreement"]
    if generated is None:
        sentences.append("generate was not asked: no device has the weights in one piece.")
    elif generated["questions"]:
        sentences.append(
            f"generate gave the same letter to {generated['same']:.0%} of {generated['questions']} questions, and any "
            f"letter to {generated['a_letter']:.0%}."
        )
    windows_of = {name: one["windows"] for name, one in result["zero_shot"].items() if "windows" in one}
    for name, windows in {result["part"]: result["windows"], **windows_of}.items():
        if windows["longer"]:
            sentences.append(
                f"{name}: {windows['longer']:,} of {windows['recordings']:,} recordings are longer than "
                f"{_MOST_S} s; each was divided into clips, of whose probabilities the mean counts."
            )
        if windows["whole"]:
            sentences.append(
                f"{name}: in {windows['whole']:,} of {windows['recordings']:,} recordings the front end found no "
                "heartbeat: they were heard whole."
            )
    for name, scores in result["zero_shot"].items():
        if scores.get("left_out"):
            sentences.append(
                f"{name}: {page.count(scores['left_out'], 'recording')} without a label or unreadable, left out."
            )
    if split := result.get("split"):
        if split["people_apart"] and result["part"] != "train":
            sentences.append("None of the people judged was in training.")
        else:
            sentences.append("People judged were in training, too.")
        if result["part"] == "validation":
            sentences.append("The adapter was chosen by its accuracy on these very people.")
        sentences += split["notes"]
    return sentences


def document(results: Sequence[Mapping[str, Any]], log: pathlib.Path) -> str:
    """The page of these runs, HTML in one file.

    Args:
      results: as metrics.json has them, one a run.
      log: the metrics.jsonl whose curves are shown; it need not be there.
    """
    people = results[0]["test"]["people"]
    return page.render(
        "audio_llm.html", heading="Audio LLM: eleven features of a murmur",
        subtitle=f"{page.count(len(results), 'run')} · {page.count(people, 'person', 'people')}",
        unlike=differences(results),
        runs=[(f"{one['name']}, {one['front_end']}", _cards(one), _remarks(one)) for one in results],
        task_rows=_task_by_task(results),
        tables=[(table.title, table.head, [[*map(_cell, row)] for row in table.body], table.note)
                for table in tables(results)],
        letter_head=["", *LETTERS], letter_rows=_letters(results),
        curves=training_curves(history(log)) if hashes.intact(log) else None,
        setups=[(one["name"], {"model": one["base"], "part": one["part"], "split": one.get("split"),
                               "windows": one["windows"], "intervals": one["test"]["intervals"]}) for one in results],
    )  # fmt: skip


def _cell(value: Any) -> page.Html | str:
    return value or "–" if value is None or isinstance(value, str) else page.score_or_count(value)


def _cards(result: Mapping[str, Any]) -> list[page.Html]:
    """The two headline scores, each beside its majority and shuffled audio."""
    test, control = result["test"], result["control"] or {"mean": {}}
    patients = _patients(result, "test")
    always = (patients.get("trivial_weighted_accuracy") or {}).get("always Present")
    headline = [
        ("Mean accuracy over tasks", test["mean"], "accuracy", test["mean"]["majority_accuracy"], "majority",
         control["mean"].get("accuracy")),
        ("Weighted murmur accuracy", patients, "weighted_accuracy", always, "always Present",
         _patients(result, "control").get("weighted_accuracy")),
    ]  # fmt: skip
    cards = []
    for title, scores, key, trivial, name, shuffled in headline:
        if metrics.finite(scores.get(key)) is None:
            continue
        # Of the excess: both are counted on the same people, which its interval knows and the accuracy's does not.
        excess, low, high = page.bounds(scores["excess"])
        verdict = page.verdict(low is not None and low > 0, name, trivial)
        notes = [verdict + f": {excess:+.3f}, 95 % interval {page.interval(low, high) or 'n/a'}",
                 f"with shuffled audio {page.number(shuffled)}"]  # fmt: skip
        cards.append(page.score_card(title, scores[key], trivial, notes))
    return cards


def _task_by_task(results: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Each task's accuracy as a gauge, whose tick is the majority."""
    body: list[list[Any]] = []
    for task in TASKS:
        for one in results:
            scores = one["test"]["tasks"].get(task)
            if scores is None:
                continue
            control = ((one["control"] or {"tasks": {}})["tasks"].get(task) or {}).get("accuracy")
            accuracy, majority = scores["accuracy"], scores["majority_accuracy"]
            above = (metrics.finite(scores["excess"], "low") or 0) > 0
            excess = page.marked("good" if above else "warn", page.score(scores["excess"]))
            body.append([
                page.noted(task.replace("_", " "), f"{one['name']}, {one['front_end']}"),
                page.score(accuracy) + page.gauge(*page.bounds(accuracy), majority),
                page.noted(page.number(majority), scores["majority"]),
                page.score(control),
                excess if scores["informative"] else "one class",
                page.noted(page.number(scores["questions"]), page.count(scores["people"], "person", "people")),
            ])  # fmt: skip
    return body


def _letters(results: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """How often each letter was answered, and how often it was right."""
    return [
        [f"{one['name']}: {kind}", *(page.number(one["test"]["letters"][kind][letter]) for letter in LETTERS)]
        for one in results for kind in ("answered", "right")
    ]  # fmt: skip
