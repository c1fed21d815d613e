"""A run's recordings and their split: made or reused, and checked for leaks. All trainers come here."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from pcgjax.data import splits
from pcgjax.data.corpus import Corpus, from_prepared, in_rows, order_digest
from pcgjax.runs.streams import SHUFFLE
from pcgjax.runtime.files import CheckpointError


def load_data(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[Corpus, dict[str, np.ndarray], dict]:
    """(corpus, {part: indices}, split) of a system that learns from all recordings; raises as `split_corpus`."""
    corpus = read_corpus(config)
    return corpus, *split_corpus(config, workdir, corpus)


def read_corpus(config: ml_collections.ConfigDict) -> Corpus:
    """The recordings of `data.prepared`, their labels shuffled where `data.shuffle_labels` asks for the control.

    Raises:
      ValueError (also PrepareError): no folder, or one that cannot be read, naming it.
    """
    if not config.data.prepared:
        raise ValueError("data.prepared is empty: give --config.data.prepared=DIR, a folder that pcgjax.prepare wrote")
    corpus = from_prepared(config.data.prepared)
    if config.data.shuffle_labels:
        key = jax.random.fold_in(jax.random.key(config.seed), SHUFFLE)
        corpus = in_rows(corpus, shuffle_labels(corpus.rows, config.task.target, key))
    return corpus


def refuse_other_recordings(results: Mapping[str, Any], corpus: Corpus, workdir: pathlib.Path) -> None:
    """Raises CheckpointError where a run's metrics.json is of other recordings than a corpus, by their samples."""
    trained_on = results.get("data", {}).get("recordings_sha256")  # earlier versions have none
    if trained_on not in (None, order_digest(corpus)):
        raise CheckpointError(
            f"{workdir}: trained on other recordings than data.prepared holds now; give another --workdir, or the "
            "folder that it was trained on"
        )


def split_corpus(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, corpus: Corpus, usable: Callable | None = None
) -> tuple[dict[str, np.ndarray], dict]:
    """({part: indices (n,) int32}, split): the split of `split.file`, reused, or made and written there.

    usable: (rows, data.prepared) -> the rows that can be learned from, as `Task.usable`; None: all.
    Raises:
      ValueError (also SplitError, LeakError): a split that cannot be made, is of other recordings, or leaks.
    """
    rows = usable(corpus.rows, config.data.prepared) if usable else corpus.rows
    path = pathlib.Path(config.split.file or workdir / "split.json")
    refuse_other_split(config, workdir)
    if path.exists():
        split = splits.load(path, rows)
    else:
        if config.split.file and path.name != "split.json":
            logging.warning("split.file=%s: no such file; a split is made now and kept there", path)
        split = splits.make(rows, *_split_arguments(config))
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
    return parts, split


def _split_arguments(config: ml_collections.ConfigDict) -> tuple:
    s = config.split
    return (s.kind, config.task.target, config.seed, tuple(s.fractions), s.fold, s.folds, s.database or None,
            s.names or None)  # fmt: skip


def refuse_other_split(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Raises SplitError where the split that a config would reuse was made otherwise than the config asks, naming both.

    Of a `split.file` only kind and target must be the config's: how else it was drawn is its own matter.
    """
    wanted = splits.arguments_of(*_split_arguments(config))
    if file := config.split.file:
        if pathlib.Path(file).exists():
            fix = "set split.kind and task.target to the file's, or give another split.file"
            splits.refuse_other(file, {name: wanted[name] for name in ("kind", "target")}, fix)
    elif (path := workdir / "split.json").exists():
        splits.refuse_other(path, wanted, "give another --workdir, or remove that file to have it made anew")


def kept_share(rows: list[dict], ids: list[str], share: float, seed: int) -> list[str]:
    """The recordings among `ids` of a share of their people in each database (SSAMBA paper: a third)."""
    if not 0 < share <= 1:
        raise ValueError(f"data.train_share={share}: must be above 0 and at most 1")
    wanted, databases = set(ids), collections.defaultdict(set)
    for row in rows:
        if row["id"] in wanted:
            databases[row["database"]].add(row["person"])
    rng, chosen = np.random.default_rng(seed), set()
    for _, people in sorted(databases.items()):
        chosen |= set(rng.permutation(sorted(people))[: max(round(share * len(people)), 1)])
    person = {row["id"]: row["person"] for row in rows}
    return [id for id in ids if person[id] in chosen]


def shuffle_labels(rows: list[dict], target: str, key: jax.Array) -> list[dict]:
    """The rows with `target` dealt out anew among the people of each database: a control that nothing can learn."""
    people: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["labels"].get(target) in ("0", "1"):
            people.setdefault((row["database"], row["person"]), []).append(row)
    dealt = {row["id"]: row for row in rows}
    for number, database in enumerate(sorted({name for name, _ in people})):
        members = sorted(person for person in people if person[0] == database)
        labels = [max(row["labels"][target] for row in people[person]) for person in members]
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, number), len(members)))
        for person, source in zip(members, order, strict=True):
            for row in people[person]:
                dealt[row["id"]] = row | {"labels": row["labels"] | {target: labels[source]}}
    return [dealt[row["id"]] for row in rows]
