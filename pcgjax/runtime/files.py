"""Files that appear whole or not at all, and commands whose user errors are one clear line."""

from __future__ import annotations

import contextlib
import logging as std_logging
import os
import pathlib
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, logging


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not belong to this run; the message names the folder and the fix."""


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside `path`: renamed to it at the end, removed if the body raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def run(main: Callable[[list[str]], Any]) -> None:
    """`absl.app.run`, where what bad input raises here ends in its message and status 1."""

    def quiet(argv: list[str]) -> Any:
        try:
            return main(argv)
        except (ValueError, OSError, FloatingPointError) as error:
            logging.debug("the error's origin", exc_info=True)  # --verbosity=1 shows it
            print(f"error: {error}", file=sys.stderr)
            return 1

    logging.get_absl_handler().addFilter(own_or_warning)
    if jax := sys.modules.get("jax"):
        # What was compiled once is not compiled again: not by a resumed run, nor by the next one of the same shapes.
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pcgjax", "xla")
        jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache)
    app.run(quiet, flags_parser=_parsed)


def own_or_warning(record: std_logging.LogRecord) -> bool:
    """A log filter: Orbax and JAX tell the story of every checkpoint and backend otherwise."""
    return record.levelno > std_logging.INFO or "pcgjax" in record.pathname


def _parsed(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, OSError) as error:  # of config_flags: no such field or part, no such config
        said = str(error) if isinstance(error, OSError) else f"the config has no part or field {error.args[0]}"
        sys.exit(f"error: {' '.join(said.split())}{_fields_given(argv)}")


def _fields_given(argv: list[str]) -> str:
    given = [word.partition("=")[0] for word in argv if word.startswith("--config.")]
    return f"; of {', '.join(given)}" if given else ""
