"""What a workdir holds, read: metrics.json, metrics.jsonl, predictions.csv, examples."""

from __future__ import annotations

import csv
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax import metrics
from pcgjax.runtime import files, hashes
from pcgjax.runtime.tables import unmarked
from pcgjax.segmentation.scores import SEGMENTATION_HEADLINE


def read_population(path: pathlib.Path) -> dict[str, Any]:
    population = read_json(path)
    fix = "write it again with pcgjax.train"
    kinds = {"members": list, "selected": int, "select": str, "trivial": dict, "summary": dict}
    for field, kind in kinds.items():
        if not isinstance(population.get(field), kind):
            raise ValueError(f"{path}, {field}: need a {kind.__name__}, found {population.get(field)!r:.60}; {fix}")
    for i, member in enumerate(population["members"]):
        for field in ("fields", "best", "validation", "test", "curve"):
            if not isinstance(member, dict) or not isinstance(member.get(field), dict):
                raise ValueError(f"{path}, members[{i}]: no object `{field}`; {fix}")
    for name, scores in population["trivial"].items():
        if not isinstance(scores, dict):
            raise ValueError(f"{path}, trivial, {name}: need an object of scores, found {scores!r:.60}; {fix}")
    if not 0 <= population["selected"] < len(population["members"]):
        raise ValueError(
            f"{path}, selected: {population['selected']} is none of {len(population['members'])} members; {fix}"
        )
    return population


PREDICTION_FIELDS = ("id", "person", "database", "class", "label", "probability", "decision", "split", "path")
EXAMPLE_FIELDS = ("id", "samples", "sample_rate_hz", "truth", "predicted", "score")


def save_examples(workdir: str | pathlib.Path, examples: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    """Writes `workdir/segments.npz`, what `write` draws of a segmenter's recordings, and returns its path.

    Args: examples: of each recording `id`; `samples` (n,); `sample_rate_hz`; `truth` and `predicted`, spans
      (start_s, end_s, state) as of `segmentation.spans`; `score`, as of `segmentation.rates`.
    Raises:
      ValueError: a field is missing.
    """
    facts: list[dict[str, Any]] = []
    arrays: dict[str, Any] = {}
    for i, example in enumerate(examples):
        for field in EXAMPLE_FIELDS:
            if field not in example:
                raise ValueError(f"examples[{i}]: no field {field!r}")
        arrays[f"samples_{i}"] = np.asarray(example["samples"], np.float32)
        score = {name: metrics.finite(value) for name, value in example["score"].items()}
        bands = {name: [list(span) for span in example[name]] for name in ("truth", "predicted")}
        facts.append({"id": example["id"], "sample_rate_hz": float(example["sample_rate_hz"]), "score": score, **bands})
    path = pathlib.Path(workdir) / "segments.npz"
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, examples=np.array(json.dumps(facts)), **arrays)
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
        seen = set()
        for row in sorted(rows, key=lambda row: (-sureness(row), str(row["id"]))):
            who = (row["database"], row["person"])
            if (int(row["label"]) == int(row["decision"])) == (kind == "right") and who not in seen:
                seen.add(who)
                queues[int(row["label"])].append(row)
        turn = 1
        while len(chosen[kind]) < count and any(queues):
            chosen[kind].append((queues[turn] or queues[1 - turn]).pop(0))
            turn = 1 - turn
    return chosen


def read_json(path: pathlib.Path) -> dict[str, Any]:
    hashes.intact(path)
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
        values = {name: metrics.finite(value) for name, value in segmentation[beside].items()}
        trivial = {name: value for name, value in values.items() if value is not None}
        rest = {k: v for k, v in segmentation.items() if k == "intervals" or not isinstance(v, dict)}
        results["test"] = {**rest, "overall": segmentation["test"], "trivial": {beside: trivial}}
    if not isinstance(results.get("test"), dict):
        raise ValueError(f"{path}: no object `test`; a finished run has one: let train end, or evaluate again")
    return results


def read_predictions(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a predictions.csv: label, decision int, probability float, the rest text."""
    fix = "write the file again with train or evaluate"
    rows: list[dict[str, Any]] = []
    hashes.intact(path)
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
            rows.append({name: unmarked(text) for name, text in row.items()} | numbers)
    return rows


def read_examples(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of predictions.csv whose waveform is kept, each with `waveform` and `sample_rate_hz`."""
    fix = "delete the file to leave the examples out, or write it again with train"
    hashes.intact(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # numpy and zipfile raise half a dozen kinds
        raise ValueError(f"{path}: not a readable .npz ({error}); {fix}") from None
    rate = arrays.pop("sample_rate_hz", None)
    if rate is None or rate.size != 1 or not rate > 0:
        raise ValueError(f"{path}, sample_rate_hz: need one positive number; {fix}")
    by_id = {row["id"]: row for row in rows}
    examples = []
    for name, waveform in arrays.items():
        if name not in by_id:
            raise ValueError(f"{path}: recording {name!r} is not in predictions.csv; {fix}")
        if waveform.ndim != 1 or len(waveform) < 2 or not np.isfinite(waveform).all():
            raise ValueError(f"{path}, {name}: need (n,) finite samples, found shape {waveform.shape}; {fix}")
        examples.append({**by_id[name], "waveform": waveform, "sample_rate_hz": float(rate)})
    return examples


def read_segmented(path: pathlib.Path) -> list[dict[str, Any]]:
    """What `save_examples` wrote, the best first."""
    fix = "delete the file to leave the examples out, or write it again with train"
    hashes.intact(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        facts = json.loads(str(arrays["examples"]))
        examples = [{**example, "samples": arrays[f"samples_{i}"]} for i, example in enumerate(facts)]
    except Exception as error:  # numpy and zipfile raise half a dozen kinds
        raise ValueError(f"{path}: not a readable .npz of segmented recordings ({error}); {fix}") from None
    for example in examples:
        lacking = [field for field in EXAMPLE_FIELDS if field not in example]
        if lacking:
            raise ValueError(f"{path}: an example has no {', '.join(lacking)}; {fix}")
        samples = example["samples"]
        if samples.ndim != 1 or len(samples) < 2 or not np.isfinite(samples).all():
            raise ValueError(f"{path}, {example['id']}: need (n,) finite samples, found shape {samples.shape}; {fix}")
        if not example["sample_rate_hz"] > 0:
            raise ValueError(f"{path}, {example['id']}, sample_rate_hz: need a positive number; {fix}")

    def worth(example: Mapping[str, Any]) -> list[float]:
        return [metrics.finite(example["score"].get(m)) or 0.0 for m in SEGMENTATION_HEADLINE[:2]]

    return sorted(examples, key=worth, reverse=True)


def overall_scores(test: Mapping[str, Any]) -> dict[str, Any]:
    """{metric: number or {"value", "low", "high"}}: a judgement's, or whatever scores another task left."""
    if "overall" not in test:
        return {k: v for k, v in test.items() if metrics.finite(v) is not None}
    overall = dict(test["overall"])
    if "mean_database_auc" in test:
        overall = {"mean_database_auc": test["mean_database_auc"], **overall}
    return overall
