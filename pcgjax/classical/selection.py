"""The recordings of a prepared folder that the classical chain works on, and the label it tells."""

from __future__ import annotations

import jax
import ml_collections
import numpy as np

from pcgjax.data.corpus import Corpus, in_rows
from pcgjax.runs.data import shuffle_labels
from pcgjax.runs.streams import SHUFFLE


def selected(corpus: Corpus, config: ml_collections.ConfigDict) -> tuple[Corpus, str]:
    """The recordings that config.data and the target choose, and the target's name.

    Raises:
      ValueError: none is left, or an unknown target.
    """
    database = config.data.database
    if not database and any(row["database"] == "pascal-b" for row in corpus.rows):
        database = "pascal-b"
    indices = [
        i
        for i, row in enumerate(corpus.rows)
        if (not database or row["database"] == database)
        and (config.data.noisy or row["labels"].get("noisy") != "1")
    ]  # fmt: skip
    target = config.task.target
    if target == "auto":
        target = "murmur" if any("murmur" in corpus.rows[i]["labels"] for i in indices) else "abnormal"
    if target not in ("murmur", "abnormal"):
        raise ValueError(f"task.target={target!r}: choose murmur, abnormal or auto")
    indices = [i for i in indices if corpus.rows[i]["labels"].get(target) in ("0", "1")]
    if not indices:
        databases = ", ".join(sorted({row["database"] for row in corpus.rows}))
        raise ValueError(
            f"data.database={database!r}: no recording with the label {target!r}; choose another of {databases}"
        )
    if config.data.shuffle_labels:
        key = jax.random.fold_in(jax.random.key(config.seed), SHUFFLE)
        corpus = in_rows(corpus, shuffle_labels(corpus.rows, target, key))
    return corpus.subset(np.array(indices)), target
