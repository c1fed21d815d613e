"""One run a folder: a lock that names the host, the process and the time.

    with lock.held(workdir):
        ...

The lock is the kernel's, on WORKDIR/.lock, and so ends with its process, however that ends; what the file says is for
people. It is removed at the end, and one that a killed process left is taken over.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import pathlib
import shlex
import socket
import sys
import threading
from collections.abc import Iterator

from absl import logging

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
# What flock says on a file system that has no locks.
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}
_guard = threading.Lock()
_ours: dict[tuple[int, str], list[int]] = {}  # (process, folder) -> [how often it is held, the open file]


class LockedError(ValueError):
    """Another process works in the folder; the message names it."""


@contextlib.contextmanager
def held(workdir: str | pathlib.Path, first: bool = True) -> Iterator[None]:
    """Runs its body as the only process that works in `workdir`, which it makes where it is not there.

    Again within the same process it does nothing. first: False on all processes of a training but the first, which
    alone takes the lock.

    Raises:
      LockedError: another process holds it, with its host, number and time.
      OSError: the folder cannot be written.
    """
    if not first:
        yield
        return
    workdir = pathlib.Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir}: a file, not a folder; give another")
    workdir.mkdir(parents=True, exist_ok=True)
    key = (os.getpid(), os.path.realpath(workdir))
    with _guard:
        if key in _ours:
            _ours[key][0] += 1
        else:
            _ours[key] = [1, _taken(workdir)]
    try:
        yield
    finally:
        with _guard:
            _ours[key][0] -= 1
            if not _ours[key][0]:
                _release(workdir, _ours.pop(key)[1])


def _taken(workdir: pathlib.Path) -> int:
    """The open and locked file; -1 where there are no locks."""
    path = workdir / NAME
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _same(file, path):  # the one who held it has removed it meanwhile
                os.close(file)
                continue
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_holder()).encode() + b"\n", 0)
            return file
        except OSError as error:
            told = _read(file)
            os.close(file)
            if error.errno in _NO_LOCKS:
                logging.warning("%s: no locks here (%s); see that no other run works there", path, error.strerror)
                return -1
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LockedError(
                    f"{workdir}: in use by {told}; wait for its end, end it, or give another folder"
                ) from None
            raise


def _same(file: int, path: pathlib.Path) -> bool:
    """Whether the path is still that of the open file."""
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(file)
    return (mine.st_dev, mine.st_ino) == (now.st_dev, now.st_ino)


def _release(workdir: pathlib.Path, file: int) -> None:
    if file < 0:
        return
    with contextlib.suppress(OSError):
        path = workdir / NAME
        if _same(file, path):
            path.unlink()  # while it is locked: whoever waits for it sees that it is no longer the path's
    os.close(file)


def _holder() -> dict[str, str | int]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": now, "command": shlex.join(sys.orig_argv)}


def _read(file: int) -> str:
    """Who holds a lock, by what its file says."""
    try:
        said = json.loads(os.pread(file, 1 << 16, 0))
        command = f" ({said['command'][:120]})" if said.get("command") else ""
        return " ".join(f"process {said['process']} on {said['host']} since {said['since']}{command}".split())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"another process, which {NAME} does not name"
