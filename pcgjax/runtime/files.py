"""Files that appear whole or not at all, and commands whose user errors are one clear line."""

from __future__ import annotations

import _thread
import contextlib
import errno
import io
import logging as std_logging
import os
import pathlib
import select
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags, logging

from pcgjax.runtime import config_flag


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not belong to this run; the message names the folder and the fix."""


class DamagedError(CheckpointError):
    """A file whose bytes are not those that were written; the message names it and the fix."""


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside `path`: renamed to it at the end, removed if the body raises."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, where a file would be written", str(path))
    _refuse_device(path)
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


def _refuse_device(path: pathlib.Path) -> None:
    """Raises ValueError for what is no regular file, as /dev/null or a pipe: a file would take its place."""
    name = os.path.abspath(path)
    if name.startswith(("/dev/", "/proc/", "/sys/")) and not name.startswith("/dev/shm/"):
        raise ValueError(f"{path}: not a place for files; give the name of a file")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: a device or a pipe; give the name of a file")


def check_out(path: str | pathlib.Path, folder: bool = False) -> None:
    """Raises ValueError where a file, or a folder, cannot be written: to ask before hours of work."""
    path = pathlib.Path(path)
    _refuse_device(path)
    if path.exists() and path.is_dir() is not folder:
        raise ValueError(f"--out={path}: {'a folder; give a file' if path.is_dir() else 'a file; give a folder'}")
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir() and there != path:
        raise ValueError(f"--out={path}: {there} is no folder; give another")
    if not os.access(there, os.W_OK):
        raise ValueError(f"--out={path}: {there} cannot be written to; give another")


def run(main: Callable[[list[str]], Any], words: bool = False) -> None:
    """`absl.app.run`, where whatever ends `main` is one line and a status, never a traceback.

    1: an error, whose line says what, where and the fix; 130: Ctrl-C; 141: the reader of a pipe has gone. A mistake in
    this package is a line too, with the place; --verbosity=1 shows every error's traceback. A door (a module that is
    run as a command) defines its flags and calls this; its `main` imports what is heavy, so that --help answers at
    once. words: it takes words besides flags; else one is an error, as is a file or folder that is given empty.
    """

    def quiet(argv: list[str]) -> Any:
        try:
            if len(argv) > 1 and not words:
                raise app.UsageError(f"unexpected argument {argv[1]!r}: every setting is a --flag")
            for name in ("workdir", "out", "source", "prepared"):
                if name in flags.FLAGS and flags.FLAGS[name].present and flags.FLAGS[name].value == "":
                    raise ValueError(f"--{name}=: is empty; give a file or a folder")
            status = main(argv)
            if sys.stdout:  # None where a shell has closed it
                sys.stdout.flush()
            return status
        except app.UsageError:
            raise
        except KeyboardInterrupt:
            return _interrupted()
        except BrokenPipeError as error:
            return _pipe_broken() or _told(error)
        except Exception as error:
            return _interrupted() if _by_interrupt(error) else _told(error)

    logging.get_absl_handler().addFilter(own_or_warning)
    _quiet_threads()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
    # What was compiled once is not compiled again: not by a resumed run, nor by the next one of the same shapes.
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pcgjax", "xla")
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # JAX looks there when `main` imports it, and no later
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_compilation_cache_dir", cache)
    try:
        app.run(quiet, flags_parser=_parsed)
    except KeyboardInterrupt:  # before main
        sys.exit(130)
    except BrokenPipeError:  # of --help
        sys.exit(_pipe_broken() or 1)


def _interrupted() -> int:
    print("interrupted; the same command goes on from what is saved, if anything is", file=sys.stderr)
    return 130


def _by_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error, as behind the ImportError of a package whose import it stopped."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _told(error: Exception) -> int:
    logging.debug("the error's origin", exc_info=True)  # --verbosity=1 shows it
    print("error:", *problem(error).split(), file=sys.stderr)
    return 1


def problem(error: BaseException) -> str:
    """What ended a command, in one line: what, where, the fix."""
    words, kind = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in words or kind == "OutOfMemoryError":
        return f"out of memory ({words[:300] or kind}); take smaller batches, windows or nets, or a larger machine"
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "pcgjax":
        return f"needs the package {error.name.partition('.')[0]}, which is not installed here{_extra(error.name)}"
    if "Error writing" in words and "OCDBT" in words:  # the database that Orbax writes a checkpoint to
        fix = "make room on that disk; the same command goes on from the last whole checkpoint"
        return f"a checkpoint could not be written ({words[:300]}); {fix}"
    origin = traceback.extract_tb(error.__traceback__)[-1:]
    if origin and origin[0].filename.endswith("xla_bridge.py"):  # where JAX looks for devices
        platforms, why = os.environ.get("JAX_PLATFORMS", ""), f" ({words[:300]})" if words else ""
        given = f"JAX_PLATFORMS={platforms}: " if platforms else ""
        return f"{given}JAX finds no such device here{why}; unset JAX_PLATFORMS or give JAX_PLATFORMS=cpu"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename) if not isinstance(error.filename, int) else words}: {error.strerror}"
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return words or kind
    return f"{kind}: {words[:1000]}{_place(error)}; --verbosity=1 shows the traceback"


def _place(error: BaseException) -> str:
    """The last line of this package that an error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    ours = [f for f in frames if f.filename.startswith(PACKAGE)]
    return f" (at pcgjax/{ours[-1].filename.removeprefix(PACKAGE)}, line {ours[-1].lineno})" if ours else ""


def _extra(name: str) -> str:
    """How to install an optional package."""
    extra = {"torch": "audio-llm", "transformers": "audio-llm", "peft": "audio-llm", "ray": "ray"}
    wanted = extra.get(name.partition(".")[0])
    return f'; pip install "pcgjax[{wanted}]"' if wanted else f"; pip install {name.partition('.')[0]}"


def _pipe_broken() -> int:
    """141, as a shell has it, where whoever read our output is gone (as `| head`); 0: that is not what broke."""
    try:
        pipe, gone = sys.stdout.fileno(), select.poll()
    except (AttributeError, OSError, ValueError):  # no file
        return 0
    gone.register(pipe, 0)  # errors alone
    if not gone.poll(0):
        return 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), pipe)  # what is left goes nowhere, without a word
    return 141


PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


def own_or_warning(record: std_logging.LogRecord) -> bool:
    """A log filter: this package's own lines, and warnings; Orbax and JAX report every checkpoint and backend.

    Of others' lines the traceback is left out, as of a thread's error that ends the command with a line of its own.
    """
    ours = record.pathname.startswith(PACKAGE)
    if not ours and record.exc_info and logging.get_verbosity() < logging.DEBUG:
        record.exc_info = record.exc_text = None
        record.msg, record.args = " ".join(record.getMessage().split())[:300], ()
    return ours or record.levelno > std_logging.INFO


def _quiet_threads() -> None:
    """What ends a thread is a line, as what ends a command; what Python itself ignores, and a log that cannot be
    written, are none."""

    def told(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            logging.warning("a background thread ended: %s", problem(args.exc_value)[:300])

    def ignored(args: Any) -> None:
        logging.debug("ignored: %r in %r", args.exc_value, args.object)
        if issubclass(args.exc_type, KeyboardInterrupt):  # Ctrl-C while JAX collects garbage: once more, a little later
            threading.Timer(0.1, _thread.interrupt_main).start()

    threading.excepthook = told
    sys.unraisablehook = ignored
    std_logging.raiseExceptions = False


def _parsed(argv: list[str]) -> list[str]:
    wrong = config_flag.refused(argv[1:], list(flags.FLAGS))
    if not wrong:
        try:
            words = config_flag.with_path(argv[1:], list(flags.FLAGS))
            asked = config_flag.help_of(argv[1:], list(flags.FLAGS))
            try:
                return app.parse_flags_with_usage([argv[0], *words])
            finally:
                if asked:
                    print(asked)
        except BrokenPipeError:
            raise
        except Exception as error:  # of config_flags: half a dozen kinds, for what is wrong with a config file
            wrong = problem(error)
    sys.exit(f"error: {' '.join(wrong.split())}")
