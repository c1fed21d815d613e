"""A run's folder and data: the corpus and its split, the config that must not change, what ran, the lines of its log.

Shared by the trainers, `pcgjax.train` and `pcgjax.audio_llm.train`.
"""

from __future__ import annotations

import collections
import datetime
import importlib.metadata
import json
import logging as std_logging
import pathlib
import platform
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags, logging

import pcgjax
from pcgjax import checkpoint, files, input_pipeline, splits

# Streams of randomness, each folded into the seed's key first.
ORDER, STEP, EVALUATION, SHUFFLE = range(4)
# What `population` can sweep: parts of a config, and single fields.
SWEPT = ("seed", "features", "model", "loss", "sapt", "optimizer")
CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


def load_data(config: ml_collections.ConfigDict, workdir: pathlib.Path):
    """(corpus, {part: indices}, split), the split made or reused, and checked for leaks.

    A segmenter splits the recordings that have annotations, and leaves the others out.
    """
    if not config.data.prepared:
        raise ValueError("data.prepared is empty: give --config.data.prepared=DIR, a folder that pcgjax.prepare wrote")
    corpus = input_pipeline.from_prepared(config.data.prepared)
    target = config.task.target
    if config.data.shuffle_labels:
        if config.task.name in ("segmenter", "ssamba_pretrain"):
            raise ValueError("data.shuffle_labels=True: a control for classifiers; this task learns from no labels")
        key = jax.random.fold_in(jax.random.key(config.seed), SHUFFLE)
        corpus = input_pipeline.in_rows(corpus, shuffle_labels(corpus.rows, target, key))
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


def load_config(name: str, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """configs/NAME.py, or a variant of it (NAME:VARIANT), with the fields `changes` ("train.epochs": 2).

    Raises:
      ValueError: pcgjax was installed without configs/ beside it, or the config has no such field.
    """
    name, _, variant = name.partition(":")
    path = CONFIGS / f"{name}.py"
    if not path.exists():
        raise ValueError(f"{path}: not there; run this in a clone of the repository, which has configs/")
    config = runpy.run_path(str(path))["get_config"](*([variant] if variant else []))
    for field in changes:
        part, _, own = field.partition(".")
        if part not in config or own not in config[part]:
            raise ValueError(f"configs/{name}.py: has no field {field}")
    with config.ignore_type():
        config.update_from_flattened_dict(dict(changes))
    return config


def plain_config(config: ml_collections.ConfigDict) -> dict:
    """As JSON gives it back, without `sweep`, which is no part of a run."""
    plain = json.loads(config.to_json_best_effort())
    plain.pop("sweep", None)
    return plain


def fields(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A config's `sweep`: every field that can be swept, as an empty string."""
    names = {part: dict.fromkeys(config[part], "") for part in SWEPT if part in config and part != "seed"}
    return ml_collections.ConfigDict({"seed": "", **names})


def refuse_changes(saved: dict, now: dict, workdir: pathlib.Path, also_free: Iterable[tuple[str, str]] = ()) -> None:
    """A resumed run may train longer and log or stream otherwise, but must be the same experiment.

    also_free: more (part, field) that may change.
    """
    free = {("train", "epochs"), ("train", "checkpoint_steps"), ("data", "prepared"), ("data", "pipeline"),
            ("split", "file"), ("evaluation", "batch_recordings"), ("train", "start_from"),
            # Where it runs; the order of the data stays, and so does the arithmetic, up to rounding.
            ("parallel", "strategy"), ("parallel", "fsdp"), ("train", "accumulate"), ("train", "remat"),
            ("profile", "start"), ("profile", "steps")}  # fmt: skip
    free |= set(also_free)
    if now["optimizer"].get("schedule", "constant") != "constant":
        free.discard(("train", "epochs"))  # the schedule ends with them
    for part in now:
        old, new = saved.get(part), now[part]
        pairs = (
            [((part, k), (old or {}).get(k), v) for k, v in new.items()]
            if isinstance(new, dict)
            else [((part,), old, new)]
        )
        for name, before, after in pairs:
            # A field that the saved run's version had not yet is as good as off.
            if before != after and (before is not None or after) and name not in free:
                raise checkpoint.CheckpointError(
                    f"{workdir}: trained with {'.'.join(name)}={before}, now {after}; give another --workdir"
                )


def record(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    step: int = 0,
    devices: Mapping[str, Any] | None = None,
) -> None:
    """Adds this start to `workdir/run.json`, {"starts": [...]}, the newest last: what must be known to run it again.

    Of each start: when, at which step, the command and the flags given, the whole config, `git_state` where there is
    one, `versions`, device, devices, processes, platform and the first process' host. Nothing of the environment is
    kept: it may hold secrets. Of many processes the first writes.

    Args: step: that of the checkpoint from which the run goes on; devices: {"device": kind, "devices": n,
      "processes": n} where JAX does not compute.
    Raises:
      ValueError: a run.json that is none.
    """
    if jax.process_index():
        return
    path = workdir / "run.json"
    starts = _starts(path)
    git = git_state()
    start = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(sys.orig_argv),
        "flags": _given_flags(),
        **({"git": git} if git else {}),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        **(devices or {}),
        "platform": platform.platform(),
        "host": platform.node(),
        "config": plain_config(config),
    }
    files.write_text(path, json.dumps({"starts": [*starts, start]}, indent=1, default=str) + "\n")


def _starts(path: pathlib.Path) -> list[dict]:
    if not path.exists():
        return []
    try:
        starts = json.loads(path.read_text())["starts"]
        if not all(isinstance(start, dict) for start in starts):
            raise TypeError("need a list of objects")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}, starts: not what a run wrote ({error}); remove the file") from None
    return starts


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on; of PyTorch's packages where they are in use."""
    names = ["jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"]
    names += [name for name in ("torch", "transformers", "peft") if name in sys.modules]
    found = {"pcgjax": pcgjax.__version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in names}


def git_state() -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout that pcgjax is imported from; None where it is from none, or without git.

    dirty: a file that git knows differs from the commit, as of `git describe --dirty`.
    """
    file = pathlib.Path(__file__)

    def ask(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(file.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", file.name)  # site-packages may lie in somebody else's checkout
        changed = ask("status", "--porcelain", "--untracked-files=no")
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def _given_flags() -> dict[str, Any]:
    """The flags of the command line by name, and the path of a config instead of what is in it."""
    if not flags.FLAGS.is_parsed():
        return {}
    given = {name: flags.FLAGS[name] for name in flags.FLAGS if flags.FLAGS[name].present}
    return {name: getattr(flag, "config_filename", flag.value) for name, flag in given.items()}


def history(path: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl; a last one that was cut, as a full disk leaves it, is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number}: {error}; remove that line") from None
    return values


def open_board(workdir: pathlib.Path, step: int = 0, name: str = "") -> Any:
    """A TensorBoard writer to `workdir/tensorboard/name`, for `log_line`; None, and a warning, without tensorboardX.

    step: that of the checkpoint from which the run goes on; what was written of later ones is no longer shown.
    """
    # It would import PyTorch, two seconds of every run, only to recognise its tensors.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX
    except ImportError as error:
        logging.warning("no TensorBoard: %s; metrics.jsonl has the numbers", error)
        return None
    finally:
        if hidden:
            del sys.modules["torch"]
    # Its files are named after the second: one more start within it must not write over them.
    suffix = f".{time.time_ns()}"
    return tensorboardX.SummaryWriter(
        str(workdir / "tensorboard" / name), purge_step=step + 1, flush_secs=1, filename_suffix=suffix
    )


def log_line(path: pathlib.Path, step: int, split: str, values: dict, board: Any = None) -> None:
    """Adds a line to metrics.jsonl, and its finite numbers to the board (of `open_board`) as "split/name"."""
    finite = {k: (v if v is None or np.isfinite(v) else None) for k, v in values.items()}
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "split": split} | finite) + "\n")
    plot(board, step, split, values)


def plot(board: Any, step: int, split: str, values: dict) -> None:
    """Adds the finite numbers to the board, if there is one."""
    for name, value in values.items() if board is not None else ():
        if value is not None and np.isfinite(value):
            board.add_scalar(f"{split}/{name}", value, step)


def log_to(workdir: pathlib.Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    handler = std_logging.FileHandler(workdir / "train.log")
    handler.setFormatter(logging.PythonFormatter())
    handler.addFilter(files.own_or_warning)
    logging.get_absl_logger().addHandler(handler)
