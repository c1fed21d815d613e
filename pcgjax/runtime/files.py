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


class DamagedError(CheckpointError):
    """A file whose bytes are not those that were written; the message names it and the fix."""


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
    """`absl.app.run`, where what bad input raises here ends in its message and status 1.

    A door (a module that is run as a command) defines its flags and calls this; its `main` imports what is heavy, so
    that --help answers at once.
    """

    def quiet(argv: list[str]) -> Any:
        try:
            return main(argv)
        except (ValueError, OSError, FloatingPointError) as error:
            logging.debug("the error's origin", exc_info=True)  # --verbosity=1 shows it
            print(f"error: {error}", file=sys.stderr)
            return 1

    logging.get_absl_handler().addFilter(own_or_warning)
    # What was compiled once is not compiled again: not by a resumed run, nor by the next one of the same shapes.
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pcgjax", "xla")
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # JAX looks there when `main` imports it, and no later
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_compilation_cache_dir", cache)
    app.run(quiet, flags_parser=_parsed)


PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


def own_or_warning(record: std_logging.LogRecord) -> bool:
    """A log filter: this package's own lines, and warnings; Orbax and JAX report every checkpoint and backend."""
    return record.levelno > std_logging.INFO or record.pathname.startswith(PACKAGE)


def _parsed(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, OSError) as error:  # of config_flags: no such field or part, no such config
        origin: Any = error
        while isinstance(origin, AttributeError | KeyError) and origin.args:
            origin = origin.args[0]
        message = str(error) if isinstance(error, OSError) else f"the config has no part or field {origin}"
        sys.exit(f"error: {' '.join(message.split())}{_config_flags(argv)}")


def _config_flags(argv: list[str]) -> str:
    names = [word.partition("=")[0] for word in argv if word.startswith("--config.")]
    return f"; of {', '.join(names)}" if names else ""
