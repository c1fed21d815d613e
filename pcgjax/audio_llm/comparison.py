"""Runs of the audio LLM scored side by side, or a checkpoint as it is."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import torch

from pcgjax.audio_llm import batches
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm.checkpoints import FREE, best, best_adapter
from pcgjax.audio_llm.conclude import Candidate, about, score_part, write
from pcgjax.audio_llm.zero_shot import load_unheard, unheard_source, zero_shot
from pcgjax.data.corpus import Corpus, from_prepared
from pcgjax.runs.data import load_data, refuse_other_recordings
from pcgjax.runtime import hashes


class Entry(NamedTuple):
    """What is to be scored: a run's best adapter, or the base model without one."""

    name: str
    config: ml_collections.ConfigDict
    adapter: pathlib.Path | None


def plain_config() -> ml_collections.ConfigDict:
    """How a checkpoint that nobody trained is asked: as configs/audio_llm.py has it."""
    config = ml_collections.ConfigDict({"seed": 0, "data": {}, "front_end": {"kind": "none", "segments": ""}})
    config.questions = {"tasks": ("all",), "sites": "audible", "padding": "other"}
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    config.model = {"dtype": dtype, "attention": "sdpa", "share_prefix": True}
    config.evaluation = {"batch_recordings": 8, "resamples": 1000}
    return config


def read_config(workdir: str | pathlib.Path) -> ml_collections.ConfigDict:
    """The config of a run of pcgjax.audio_llm.train.

    Raises:
      ValueError: none there, or of another model.
    """
    path = pathlib.Path(workdir) / "config.json"
    hashes.check(path.parent, [path.name], "put it back, or train again")
    try:
        config = ml_collections.ConfigDict(json.loads(path.read_text()))
        name = config.task.name
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a run's config ({error}); --workdir takes what audio_llm.train wrote") from None
    if name != "audio_llm":
        raise ValueError(f"{path}: a run of task {name!r}; --workdir takes what pcgjax.audio_llm.train wrote")
    return config


def entries_of(model: str, workdirs: Sequence[str]) -> list[Entry]:
    """One of each workdir, named after its folder, or after its path where two folders have one name; without a
    workdir the checkpoint itself.

    Raises:
      ValueError (also CheckpointError): a workdir without a run or an adapter, or named twice.
    """
    if not workdirs:
        return [Entry(pathlib.Path(model).resolve().name, plain_config(), None)]
    names = [pathlib.Path(workdir).resolve().name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = [workdir.rstrip("/") for workdir in workdirs]
    entries = [
        Entry(name, read_config(workdir), best_adapter(workdir)) for name, workdir in zip(names, workdirs, strict=True)
    ]
    if len(set(names)) < len(names):
        raise ValueError(f"--workdir={','.join(workdirs)}: names a run twice")
    return entries


def score(
    model: str,
    workdirs: Sequence[str],
    out: str | pathlib.Path,
    part: str = "test",
    prepared: str = "",
    zero_shots: Mapping[str, str] | None = None,
    segments: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Scores runs, or without one the checkpoint itself on a prepared folder; writes `out`; returns metrics.json's.

    Args: zero_shots, segments: {data set: its folder in the official layout; the folder of its .tsv}.
    Raises:
      ValueError: what does not fit, by name.
    """
    zero_shots, segments = zero_shots or {}, segments or {}
    # All that can be wrong is looked at before the first model is loaded.
    entries = entries_of(model, workdirs)
    for dataset in zero_shots:
        for name, config, _ in entries:
            if config.front_end.kind != "none" and dataset not in segments:
                raise ValueError(
                    f"--zero_shot={dataset}: {name} hears through front_end.kind={config.front_end.kind}; give "
                    f"--segments={dataset}:DIR, a folder that python -m pcgjax.predict wrote .tsv files to"
                )
    data: list[tuple[Corpus, dict[str, np.ndarray], dict | None]]
    if workdirs:
        data = [load_data(one.config, pathlib.Path(path)) for one, path in zip(entries, workdirs, strict=True)]
        for workdir, (corpus, _, _) in zip(workdirs, data, strict=True):
            trained_on = best(workdir, "adapter", FREE)[1].get("recordings")
            refuse_other_recordings({"data": {"recordings_sha256": trained_on}}, corpus, pathlib.Path(workdir))
    else:
        corpus = from_prepared(prepared)
        data = [(corpus, {part: np.arange(len(corpus.rows))}, None)]
    pairs = list(zip(entries, data, strict=True))
    sources = [batches.make_source(corpus, one.config.front_end) for one, (corpus, _, _) in pairs]
    unheard = {dataset: load_unheard(dataset, folder) for dataset, folder in zero_shots.items()}
    unheard_sources = [
        {name: unheard_source(one, config.front_end, segments.get(name)) for name, one in unheard.items()}
        for _, config, _ in entries
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results, predictions = [], []
    for i, ((name, config, adapter), (_, parts, split)) in enumerate(pairs):
        base, processor = llm.load(model, config.model.dtype, config.model.attention)
        adapted = llm.with_adapter(base, adapter) if adapter else base
        candidate = Candidate(name, llm.Answerer(adapted.to(device)), processor, config, device)
        result, rows = score_part(candidate, sources[i], batches.lengths_heard(sources[i]), parts, part)
        result["split"] = about(split) if split else None
        for dataset, source in unheard_sources[i].items():
            scores, more_rows = zero_shot(candidate, source, unheard[dataset].left_out, dataset)
            result["zero_shot"] |= scores
            rows += more_rows
        results.append(result)
        predictions += rows
    return write(out, results, predictions)
