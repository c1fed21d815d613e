"""Many processes as one: they start together, each hears when another is gone, and they end together.

    with distributed.together():  # first in a command's main, before JAX is used
        ...

JAX ends a process from C++ when another one is missing or lost: a stack trace instead of an error, and often without
a name. So the processes call a roll first, at the coordinator's address, and keep these connections: one that breaks
says who is gone, at once, also while the main thread waits in a collective for the one that will not come.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import flags, logging

from pcgjax.runtime import files, roll

# JAX's own heartbeats, from C++, find what is left: a process that is there and does not run.
HEARTBEAT_TIMEOUT_S = 45
SHUTDOWN_TIMEOUT_S = 30
# Where schedulers say which job this is: Slurm, PBS, LSF, Open MPI.
JOB_NUMBERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "OMPI_MCA_ess_base_jobid")
FLAGS = flags.FLAGS


def define_flags() -> None:
    """The flags of a command that can be one of many processes."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where all processes meet.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
    flags.DEFINE_bool("multi_host", False, "Find these three in the SLURM step, TPU pod, Kubernetes job or Open MPI.")
    flags.DEFINE_float("start_timeout_s", 300.0, "How long to wait for the other processes, s.")
    flags.DEFINE_string(
        "cluster_token", None, "A secret that all processes share and prove; default: the scheduler's job number."
    )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs its body as one of the processes that the flags tell of; without such flags nothing happens.

    On the way in it waits for all processes and starts `jax.distributed`. When a process ends before the end of its
    body, all others print `error: process I of N (host) ...` and end with status 1, wherever they are. On the way
    out it waits for all others: what process 0 alone does at the end may take its time. `sys.exit` counts as an end, so
    all processes must come to it.

    Raises:
      ValueError: flags that do not fit, naming them; processes that did not come in time, naming them.
      OSError: process 0 cannot listen at the coordinator's port.
    """
    place = _place()
    if place is None:
        yield
        return
    address, count, process = place
    links, hosts = roll.call(address, count, process, FLAGS.start_timeout_s, _token())
    watch = _Watch(process, hosts, links)
    try:
        _start_jax(address, count, process)
        yield
    except SystemExit:  # a stop that all agreed on, its checkpoint written
        watch.leave()
        raise
    except BaseException as error:
        # JAX's own errors, of several types, most often tell of a process that is gone: then the watch names it and
        # ends this one meanwhile.
        time.sleep(2)
        logging.debug("the error's origin", exc_info=True)
        print(f"error: {files.problem(error)}", file=sys.stderr)
        # Not by way of JAX's clean-up at exit, which would wait for the others.
        sys.stdout.flush()
        watch.give_up(process, f"stopped: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    else:
        watch.leave()


def stop_signal(got: int) -> int:
    """The signal that a process has got, the same on all of them; 0: none has got any.

    got: this process's, 0 for none. A collective: all processes call it at the same steps, between which they train.
    """
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return got
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(got)).max())


def _place() -> tuple[str, int, int] | None:
    """(coordinator's address, number of processes, this one's) by the flags; None: this process is alone."""
    if "multi_host" not in FLAGS or not FLAGS.is_parsed():
        return None
    names = ("coordinator_address", "num_processes", "process_id")
    given: dict[str, Any] = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    if FLAGS.start_timeout_s <= 0:
        raise ValueError(f"--start_timeout_s={FLAGS.start_timeout_s}: must be above 0")
    if FLAGS.multi_host:
        if given:
            raise ValueError(f"--multi_host finds --{' and --'.join(given)} itself; give one or the other")
        return _detected()
    if not given:
        return None
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"--{' and --'.join(given)} without --{' and --'.join(missing)}; give all three or none")
    address, count, process = (given[name] for name in names)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator_address={address}: must be HOST:PORT, as 10.0.0.1:8476")
    if count < 1:
        raise ValueError(f"--num_processes={count}: must be at least 1")
    if not 0 <= process < count:
        raise ValueError(f"--process_id={process}: must lie between 0 and {count - 1}, below --num_processes={count}")
    return address, count, process


def _token() -> str:
    """What all processes of this start know and others do not; "": nothing.

    A job's number is no strong secret, but keeps apart the starts that meet at one port of a shared machine.
    """
    if FLAGS.cluster_token:
        return FLAGS.cluster_token
    return next((f"{name}={os.environ[name]}" for name in JOB_NUMBERS if os.environ.get(name)), "")


def _detected() -> tuple[str, int, int]:
    # Not public, but what jax.distributed.initialize() asks; the roll needs the answer before it.
    from jax._src.clusters import ClusterEnv

    timeout_s = int(FLAGS.start_timeout_s)
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout_s)
    except Exception as error:
        # Each cluster's detection raises its own kinds.
        raise ValueError(f"--multi_host: {type(error).__name__}: {' '.join(str(error).split())}") from error
    address, count, process, _ = found
    if address is None or count is None or process is None:
        raise ValueError(
            "--multi_host: neither a SLURM step (srun), a TPU pod, a Kubernetes job nor Open MPI found here; give "
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=I"
        )
    return address, count, process


def _start_jax(address: str, count: int, process: int) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would take SIGTERM from a process that does not train yet or any more; `stop_signal` serves.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        count,
        process,
        coordinator_bind_address=_bind_address(address),
        # With plain flags a process has all devices of its host, as it has alone.
        cluster_detection_method=None if FLAGS.multi_host else "deactivate",
        initialization_timeout=max(int(FLAGS.start_timeout_s), 1),
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )


def _bind_address(address: str) -> str | None:
    """Where JAX's service listens too: at the address given alone; None: at all there are."""
    host, _, port = address.rpartition(":")
    own = roll.own_address(host.strip("[]"))
    return None if own is None else f"[{own[1]}]:{port}" if ":" in own[1] else f"{own[1]}:{port}"


# ----------------------------------------------------------------------------------------------------------- watch
class _Watch:
    """A thread that listens to the other processes (process 0) or to process 0 (the others)."""

    def __init__(self, process: int, hosts: dict[int, str], links: dict[int, socket.socket]):
        self.process, self.hosts, self.links = process, hosts, links
        self.left = {process: threading.Event()} | {other: threading.Event() for other in links}
        self.over = threading.Event()
        self.ending = threading.Lock()
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def leave(self) -> None:
        """Says that this process is done, and waits until all are."""
        self.left[self.process].set()
        for link in self.links.values():
            if self.process:
                roll.send(link, left=True)
        self._perhaps_over()
        while not self.over.wait(1.0):  # in slices, so that signals come through
            pass

    def _all_left(self) -> bool:
        return self.process == 0 and all(event.is_set() for event in self.left.values())

    def _perhaps_over(self) -> None:
        if self._all_left() and not self.over.is_set():
            for link in self.links.values():
                roll.send(link, over=True)
            self.over.set()

    def give_up(self, gone: int, why: str) -> None:
        """Tells the others that process `gone` is gone, says so here unless it is this one, and ends the process."""
        self.ending.acquire()  # never given back: one thread ends the process
        for other, link in self.links.items():
            if other != gone:
                roll.send(link, gone=gone, why=why)
        if gone != self.process:
            text = f"error: process {gone} of {len(self.hosts)} ({self.hosts[gone]}) {why}\n"
            os.write(2, text.encode())  # not through Python's files, whose locks the main thread may hold
        if self.process == 0:
            # JAX's service ends with process 0, and then JAX ends the others, in its own words. They go first.
            deadline = time.monotonic() + 5
            for link in self.links.values():
                link.settimeout(max(deadline - time.monotonic(), 0.01))
                with contextlib.suppress(OSError, ValueError):
                    while roll.receive(link) is not None:
                        pass
        os._exit(1)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as ready:
            for other, link in self.links.items():
                ready.register(link, selectors.EVENT_READ, other)
            while not self.over.is_set():
                for key, _ in ready.select():
                    self._hear(key.data, ready)

    def _hear(self, other: int, ready: selectors.BaseSelector) -> None:
        link = self.links[other]
        try:
            message = roll.receive(link)
        except (ValueError, OSError):  # TimeoutError: its host does not answer any more
            message = None
        if message is None:
            ready.unregister(link)
            # Once all have left, process 0 tells each so in turn; the first may be off before the last has heard it.
            if not self.over.is_set() and not self._all_left():
                self.give_up(other, "is gone; the same command on all processes goes on from the last checkpoint")
        elif "gone" in message:
            gone, why = message["gone"], message.get("why")
            if roll.is_whole(gone) and gone in self.hosts and isinstance(why, str):
                self.give_up(gone, " ".join(why.split())[:1000])
        elif "left" in message:
            self.left[other].set()
            self._perhaps_over()
        elif "over" in message:
            self.over.set()
