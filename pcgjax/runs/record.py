"""run.json: what must be known to run it again."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from absl import flags

import pcgjax
from pcgjax.runs.config import plain_config
from pcgjax.runtime import files


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
