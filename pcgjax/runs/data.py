"""A run's folder and data: the corpus and its split, the config that must not change, what ran, the lines of its log.

Shared by the trainers, `pcgjax.train` and `pcgjax.audio_llm.train`.
"""

from __future__ import annotations

import collections
import pathlib

import jax
import ml_collections
import numpy as np
from absl import logging

from pcgjax.data import splits
from pcgjax.data.corpus import from_prepared, in_rows
from pcgjax.runs.streams import SHUFFLE


def load_data(config: ml_collections.ConfigDict, workdir: pathlib.Path):
    """(corpus, {part: indices}, split), the split made or reused, and checked for leaks.

    A segmenter splits the recordings that have annotations, and leaves the others out.
    """
    if not config.data.prepared:
        raise ValueError("data.prepared is empty: give --config.data.prepared=DIR, a folder that pcgjax.prepare wrote")
    corpus = from_prepared(config.data.prepared)
    target = config.task.target
    if config.data.shuffle_labels:
        if config.task.name in ("segmenter", "ssamba_pretrain"):
            raise ValueError("data.shuffle_labels=True: a control for classifiers; this task learns from no labels")
        key = jax.random.fold_in(jax.random.key(config.seed), SHUFFLE)
        corpus = in_rows(corpus, shuffle_labels(corpus.rows, target, key))
    rows = corpus.rows
    if config.task.name == "segmenter":
        rows = [row for row in rows if any(start < end for start, end, _ in row["annotations"])]
        if 0 < len(rows) < len(corpus.rows):
            logging.info(
                "%d of %d recordings have no annotation: left out", len(corpus.rows) - len(rows), len(corpus.rows)
            )
        if not rows:
            raise ValueError(
                f"data.prepared={config.data.prepared}: no recording has annotated states; a segmenter learns from "
                "CirCor's .tsv, CinC 2016's StateAns.mat or synthetic recordings"
            )
    path = pathlib.Path(config.split.file or workdir / "split.json")
    if path.exists():
        split = splits.load(path, rows)
    else:
        s = config.split
        split = splits.make(
            rows, s.kind, target, config.seed, tuple(s.fractions), s.fold, s.folds, s.database or None,
            s.names or None,
        )  # fmt: skip
        splits.save(split, path)
    leaks = splits.check(split, rows, allow=config.split.allow_leaks)
    for leak in leaks:
        logging.warning("leak: %s", leak)
    split["people_apart"] = not leaks and split["kind"] != "paper301"
    split["leaks"] = leaks
    place = {row["id"]: i for i, row in enumerate(corpus.rows)}
    parts = {part: np.array([place[id] for id in split[part]], np.int32) for part in splits.PARTS}
    share = kept_share(corpus.rows, split["train"], config.data.get("train_share", 1.0), config.seed)
    parts["train"] = np.array([place[id] for id in share], np.int32)
    return corpus, parts, split


def kept_share(rows: list[dict], ids: list[str], share: float, seed: int) -> list[str]:
    """The recordings among `ids` of a share of their people in each database (SSAMBA paper: a third)."""
    if not 0 < share <= 1:
        raise ValueError(f"data.train_share={share}: must be above 0 and at most 1")
    wanted, databases = set(ids), collections.defaultdict(set)
    for row in rows:
        if row["id"] in wanted:
            databases[row["database"]].add(row["person"])
    rng, kept = np.random.default_rng(seed), set()
    for _, people in sorted(databases.items()):
        kept |= set(rng.permutation(sorted(people))[: max(round(share * len(people)), 1)])
    person = {row["id"]: row["person"] for row in rows}
    return [id for id in ids if person[id] in kept]


def shuffle_labels(rows: list[dict], target: str, key: jax.Array) -> list[dict]:
    """The rows with `target` dealt out anew among the people of each database: a control that nothing can learn."""
    people: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["labels"].get(target) in ("0", "1"):
            people.setdefault((row["database"], row["person"]), []).append(row)
    dealt = {row["id"]: row for row in rows}
    for number, database in enumerate(sorted({name for name, _ in people})):
        own = sorted(person for person in people if person[0] == database)
        labels = [max(row["labels"][target] for row in people[person]) for person in own]
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, number), len(own)))
        for person, source in zip(own, order, strict=True):
            for row in people[person]:
                dealt[row["id"]] = row | {"labels": row["labels"] | {target: labels[source]}}
    return [dealt[row["id"]] for row in rows]
