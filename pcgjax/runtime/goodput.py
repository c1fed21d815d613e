"""Where a run's time goes: seconds by what they were spent on, and a trace of chosen steps."""

from __future__ import annotations

import collections
import contextlib
import pathlib
import time
from collections.abc import Iterator

import jax
import ml_collections
from absl import logging

PARTS = {
    "train": "training steps", "wait": "waiting for data", "compile": "compiling", "validate": "validating",
    "save": "saving", "other": "the rest, such as starting",
}  # fmt: skip
_compiling = 0.0


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    global _compiling
    # Tracing and lowering happen on the way to a compiled program; a cache's hit is the time of reading it.
    if event.startswith("/jax/core/compile/"):
        _compiling += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


class Clock:
    """Adds up seconds by PARTS; what JAX compiles meanwhile counts as compiling, wherever it happens."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began, compiling = time.monotonic(), _compiling
        try:
            yield
        finally:
            compiled = _compiling - compiling
            self.seconds["compile"] += compiled
            self.seconds[part] += max(time.monotonic() - began - compiled, 0.0)

    def spent(self) -> dict[str, float]:
        """Seconds of every part so far; `other` is what is left of the time since the clock was made."""
        total = time.monotonic() - self.began
        seconds = {part: self.seconds[part] for part in PARTS if part != "other"}
        return seconds | {"other": max(total - sum(seconds.values()), 0.0)}


def share(seconds: dict[str, float]) -> float:
    """Goodput: the share of a run's time in which it trained."""
    return seconds["train"] / max(sum(seconds.values()), 1e-9)


def sentence(seconds: dict[str, float]) -> str:
    parts = ", ".join(f"{seconds[part]:.1f} s {words}" for part, words in PARTS.items())
    return f"goodput {share(seconds):.0%}: {parts}"


class Trace:
    """A profile of the steps [start, start + steps), for XProf or Perfetto, in `folder`; without steps, nothing.

    Of many processes the first writes its own: JAX makes one trace for Perfetto of what is in the folder.

    Raises:
      ValueError: a field below 0.
    """

    def __init__(self, config: ml_collections.ConfigDict, folder: pathlib.Path):
        if config.start < 0 or config.steps < 0:
            raise ValueError(f"profile.start={config.start}, profile.steps={config.steps}: must be at least 0")
        self.bounds = (config.start, config.start + config.steps) if config.steps else ()
        self.folder, self.running = folder, False

    def until(self, step: int, most: int) -> int:
        """How far training may go from `step`, at most to `most`, so that the trace holds its steps alone."""
        return min([most, *(bound for bound in self.bounds if bound > step)])

    def before(self, step: int) -> None:
        """To be called before each stretch of steps, with the first of them."""
        if jax.process_index():
            return  # its stretches of steps are those of the first nevertheless: all must run the same programs
        if self.bounds and not self.running and self.bounds[0] <= step < self.bounds[1]:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # each Python call would be an event: minutes to write, and slower steps
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
            self.running = True

    def after(self, step: int) -> None:
        """To be called after each stretch, when the device is done with it, with the step that comes next."""
        if self.bounds and step >= self.bounds[1]:
            self.stop()

    def stop(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
            logging.info("wrote a trace to %s: open its perfetto_trace.json.gz at ui.perfetto.dev", self.folder)
