"""What an audio LLM's answers are worth, beside what needs no hearing, in tables like the paper's.

    python -m pcgjax.audio_llm.score --workdir=RUN[,RUN2] --model=DIR --out=DIR [--part=test]
        [--zero_shot=cinc2016:DIR,pascal:DIR] [--segments=cinc2016:DIR,pascal:DIR]
    python -m pcgjax.audio_llm.score --model=DIR --prepared=DIR --out=DIR

The first scores the best adapter of each run on its own front end, the second a checkpoint as it is. The answer to a
question is the most probable of the six letters, read from one forward pass. Three things stand beside it: the class of
most people in training (the majority), the same questions on the audio of somebody else (shuffled audio), and the
figures of the paper, "Exploring Finetuned Audio-LLM on Heart Murmur Features", Tables 1 to 3.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import torch
from absl import app, flags

from pcgjax.audio_llm import batches
from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm.judge import Run, about, score_part, write
from pcgjax.audio_llm.tables import summary
from pcgjax.audio_llm.zero_shot import load_unheard, unheard_source, zero_shot
from pcgjax.data import splits
from pcgjax.data.corpus import from_prepared
from pcgjax.runs.data import load_data
from pcgjax.runtime import files

ZERO_SHOT = ("cinc2016", "pascal")


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
    try:
        config = ml_collections.ConfigDict(json.loads(path.read_text()))
        name = config.task.name
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a run's config ({error}); --workdir takes what audio_llm.train wrote") from None
    if name != "audio_llm":
        raise ValueError(f"{path}: a run of task {name!r}; --workdir takes what pcgjax.audio_llm.train wrote")
    return config


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

    Args: zero_shots, segments: {data set of ZERO_SHOT: its folder in the official layout; the folder of its .tsv}.
    Raises:
      ValueError: what does not fit, by name.
    """
    from pcgjax.audio_llm.checkpoints import best_adapter  # which imports this module

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    segments = segments or {}
    # All that can be wrong is looked at before the first model is loaded.
    found: list[tuple[str, ml_collections.ConfigDict, pathlib.Path | None]] = []
    for workdir in workdirs:
        names = [pathlib.Path(one).resolve().name for one in workdirs]
        name = names[workdirs.index(workdir)] if len(set(names)) == len(names) else workdir.rstrip("/")
        found.append((name, read_config(workdir), best_adapter(workdir)))
    if not workdirs:
        found = [(pathlib.Path(model).resolve().name, plain_config(), None)]
    if len({name for name, _, _ in found}) < len(found):
        raise ValueError(f"--workdir={','.join(workdirs)}: names a run twice")
    for dataset in zero_shots or {}:
        for name, config, _ in found:
            if config.front_end.kind != "none" and dataset not in segments:
                raise ValueError(
                    f"--zero_shot={dataset}: {name} hears through front_end.kind={config.front_end.kind}; give "
                    f"--segments={dataset}:DIR, a folder that python -m pcgjax.predict wrote .tsv files to"
                )
    sources, parts, splits_ = [], [], []
    for i, (_, config, _) in enumerate(found):
        if workdirs:
            corpus, own, split = load_data(config, pathlib.Path(workdirs[i]))
        else:
            corpus, split = from_prepared(prepared), None
            own = {part: np.arange(len(corpus.rows))}
        sources.append(batches.make_source(corpus, config.front_end))
        parts.append(own)
        splits_.append(split)
    unheard = {dataset: load_unheard(dataset, folder) for dataset, folder in (zero_shots or {}).items()}
    more = [
        {name: unheard_source(one, config.front_end, segments.get(name)) for name, one in unheard.items()}
        for _, config, _ in found
    ]
    results, predictions = [], []
    for i, (name, config, adapter) in enumerate(found):
        base, processor = llm.load(model, config.model.dtype, config.model.attention)
        adapted = llm.with_adapter(base, adapter) if adapter else base
        run = Run(name, llm.Answerer(adapted.to(device)), processor, config, device)
        result, rows = score_part(run, sources[i], batches.lengths_heard(sources[i]), parts[i], part)
        result["split"] = about(splits_[i]) if splits_[i] else None
        for dataset, source in more[i].items():
            scores, asked = zero_shot(run, source, unheard[dataset].left_out, dataset)
            result["zero_shot"] |= scores
            rows += asked
        results.append(result)
        predictions += rows
    return write(out, results, predictions)


def _folders(flag: str, words: Sequence[str]) -> dict[str, str]:
    """{data set: folder} from words such as cinc2016:DIR."""
    found = {}
    for word in words:
        dataset, colon, folder = word.partition(":")
        if not colon or not folder or dataset not in ZERO_SHOT:
            raise ValueError(f"--{flag}={word}: need DATASET:DIR with one of {', '.join(ZERO_SHOT)}")
        found[dataset] = folder
    return found


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: every setting is a --flag")
    if bool(FLAGS.workdir) == bool(FLAGS.prepared):
        raise app.UsageError("give --workdir=RUN to score a run, or --prepared=DIR to score the checkpoint itself")
    results = score(
        FLAGS.model, FLAGS.workdir, FLAGS.out, FLAGS.part, FLAGS.prepared, _folders("zero_shot", FLAGS.zero_shot),
        _folders("segments", FLAGS.segments),
    )  # fmt: skip
    print(summary(results))
    print(f"wrote {FLAGS.out}: metrics.json, predictions.csv, report.html")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A local folder with the Qwen2-Audio checkpoint.", required=True)
    flags.DEFINE_list("workdir", [], "Folders that pcgjax.audio_llm.train wrote; the best adapter of each is scored.")
    flags.DEFINE_string(
        "prepared", "", "Without --workdir: a folder that pcgjax.prepare wrote; all of it is asked about."
    )
    flags.DEFINE_string("out", None, "The folder for metrics.json, predictions.csv and report.html.", required=True)
    flags.DEFINE_enum("part", "test", splits.PARTS, "The part of each run's split to score.")
    flags.DEFINE_list(
        "zero_shot", [], "cinc2016:DIR, pascal:DIR, official layouts: normal or abnormal, never trained on."
    )
    flags.DEFINE_list(
        "segments", [], "cinc2016:DIR, pascal:DIR: their .tsv files, for runs with another front end than none."
    )
    files.run(main)
