"""Stages of a long work: carried out once, resumed, their failures named."""

from __future__ import annotations

import json
import multiprocessing.connection
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
from absl import logging

from pcgjax.runs.results import read_json
from pcgjax.runtime import files


class NotRun(ValueError):
    """A stage that lacks what it needs; the message says what."""


class Stage(NamedTuple):
    name: str  # of its file in OUT/stages
    title: str
    settings: dict[str, Any]  # with which OUT must have been made
    run: Callable[[], Any]  # goes on where it was stopped
    after: tuple[str, ...] = ()  # stages that must be done
    torch: bool = False
    again: bool = False  # looks quickly whether all is as it was, when it is done already


def saved(stages: Iterable[Stage], out: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The states of those of these stages that OUT has: {name: {"status", "why", "seconds", "result", ...}}.

    status: begun, done, failed or not run; result: of the stage's `run`.

    Raises:
      ValueError: one was made with other settings.
    """
    states: dict[str, dict[str, Any]] = {}
    for stage in stages:
        path = _state_path(out, stage.name)
        if stage.name not in states and path.exists():
            states[stage.name] = {"why": "stopped before its end", **read_json(path)}
            _refuse_changes(path, states[stage.name].get("settings", {}), stage.settings)
    return states


def _state_path(out: pathlib.Path, stage: str) -> pathlib.Path:
    return out / "stages" / f"{stage}.json"


def carry_out(stages: Sequence[Stage], out: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Runs the stages that OUT lacks; one that fails stops only those that need it. Returns what `saved` then would.

    Raises: as `saved`, before anything is run.
    """
    states = saved(stages, out)
    began = time.monotonic()
    for number, stage in enumerate(stages, 1):
        before = states.get(stage.name, {})
        if before.get("status") == "done" and not before["result"]:  # else it names what it lacked: there may be more
            _look_again(stage)
            continue
        start = time.monotonic()
        state: dict[str, Any] = {"title": stage.title, "settings": stage.settings, "status": "begun"}
        if lacking := [name for name in stage.after if states[name]["status"] != "done"]:
            reasons = dict.fromkeys(_reason(states[name]) for name in lacking)
            state |= {"status": "not run", "why": "; ".join(reasons), "seconds": 0.0}
        else:
            logging.info("[%d/%d] %s, %.0f s since the start", number, len(stages), stage.title, start - began)
            files.write_text(_state_path(out, stage.name), json.dumps(state, indent=1) + "\n")
            state |= _attempt(stage) | {"seconds": time.monotonic() - start}
            jax.clear_caches()  # of programs that no other stage has
        logging.info(
            "[%d/%d] %s: %s %s", number, len(stages), stage.title, state["status"],
            state["why"] or f"in {state['seconds']:.0f} s",
        )  # fmt: skip
        states[stage.name] = state
        files.write_text(_state_path(out, stage.name), json.dumps(state, indent=1) + "\n")
    return states


def _look_again(stage: Stage) -> None:
    """Raises ValueError where a stage that is done would now give something else, as of another source."""
    if not stage.again:
        return
    now = _attempt(stage)
    if now["status"] == "failed":
        raise ValueError(f"{stage.title}: is done, and now: {now['why']}; give another --out")
    if now["status"] == "not run":
        logging.warning("%s: is done, and now: %s; its rows are of what was there", stage.title, now["why"])


def _reason(state: Mapping[str, Any]) -> str:
    """Why a stage is not done."""
    return f"{state['title']} failed: {state['why']}" if state["status"] == "failed" else state["why"]


def _attempt(stage: Stage) -> dict[str, Any]:
    """{status, why} of running a stage, and its result."""
    try:
        result = _alone(stage.run) if stage.torch and jax.default_backend() != "cpu" else stage.run()
        return {"status": "done", "why": "", "result": result}
    except NotRun as error:
        return {"status": "not run", "why": str(error)}
    except Exception as error:  # the others go on; what it was is in the table
        if stage.torch and isinstance(error, ImportError):
            return {"status": "not run", "why": f'{error}; pip install "pcgjax[audio-llm]"'}
        logging.error("%s failed: %s", stage.title, files.problem(error))
        logging.debug("where it failed", exc_info=True)
        return {"status": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}


def _alone(run: Callable) -> Any:
    """In a process of its own, in which PyTorch has the accelerator that JAX holds here."""
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(1, context, _begin_alone) as pool:
        return pool.submit(run).result()


def _begin_alone() -> None:
    """In the process of `_alone`: JAX computes on the CPU, and the process ends with its parent."""
    jax.config.update("jax_platforms", "cpu")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:  # what ends the parent makes the training here save and end
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _refuse_changes(path: pathlib.Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, where a stage was made with other settings."""
    for name in dict.fromkeys([*now, *saved]):
        if saved.get(name) != now.get(name):
            raise ValueError(f"{path}: made with {name}={saved.get(name)}, now {now.get(name)}; give another --out")
