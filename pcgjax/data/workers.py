"""A function over many jobs: in worker processes, its results in order, with a progress bar."""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pcgjax.data import PrepareError


def in_order(function: Callable, jobs: Sequence, recordings: int, workers: int | None) -> Iterator:
    """function(job) for each job, in order, over `workers` processes (default: one a core where that pays).

    Args: recordings: how many the jobs hold together, by which the default number of workers is chosen.
    Raises:
      PrepareError: a worker process was killed.
    """
    # A fork copies only the calling thread, so a lock that another thread holds would stay locked for ever.
    fork = sys.platform == "linux" and "jax" not in sys.modules and threading.active_count() == 1
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        # A forked worker starts in the time of a hundred recordings, a fresh interpreter in that of a thousand.
        workers = min(cores, recordings // (128 if fork else 1024))
    if min(workers, len(jobs)) <= 1:
        keep_memory()
        yield from map(function, jobs)
        return
    import concurrent.futures.process
    import multiprocessing

    context = multiprocessing.get_context("fork" if fork else "spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (os.getpid(),))
    try:
        running: collections.deque[concurrent.futures.Future] = collections.deque()
        for job in jobs:
            running.append(pool.submit(function, job))
            if len(running) > 4 * workers:  # bounds the memory that finished results take
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise PrepareError("a worker process was killed (out of memory?): run again with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def keep_memory() -> None:
    """Makes the C library reuse the memory of freed arrays for the next ones.

    Otherwise it maps each array of 128 KiB or more anew, and the kernel's page faults take longer than decoding.
    Freeing one large array, never touched, is what raises glibc's threshold (mallopt(3), M_MMAP_THRESHOLD).
    """
    np.empty(30 << 20, np.uint8)


def _begin_worker(parent: int) -> None:
    """Ends the worker when its parent was killed; otherwise it would wait for ever."""
    keep_memory()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def progress_bar(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """Yields advance(recordings done since the last call); work that takes longer than a second gets a bar."""
    started, done, bar = time.monotonic(), 0, None

    def advance(count: int) -> None:
        nonlocal done, bar
        done += count
        elapsed = time.monotonic() - started
        if bar is not None:
            bar.update(count)
        elif elapsed > 1:
            import tqdm  # later than this, as a small data set is prepared in the time of the import

            tqdm.tqdm.monitor_interval = 0  # no thread beside this one: see in_order
            interval = 0.2 if sys.stderr.isatty() else 30.0  # a log file wants a line now and then
            bar = tqdm.tqdm(total=total, desc=description, unit="recording", mininterval=interval, smoothing=0.1)
            bar.start_t -= elapsed
            bar.update(done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()
