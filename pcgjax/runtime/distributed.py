"""Many processes as one: they start together, each hears when another is gone, and they end together.

    with distributed.together():  # first in a command's main, before JAX is used
        ...

JAX ends a process from C++ when another one is missing or lost: a stack trace instead of an error, and often without
a name. So the processes call a roll first, at the coordinator's address, and keep these connections: one that breaks
says who is gone, at once, also while the main thread waits in a collective for the one that will not come.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from absl import flags

# A host that lost its power closes no connection: the kernel asks after 10 s of silence, and gives up after 20 s more.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
# JAX's own heartbeats, from C++, find what is left: a process that is there and does not run.
HEARTBEAT_TIMEOUT_S = 45
SHUTDOWN_TIMEOUT_S = 30
FLAGS = flags.FLAGS


def define_flags() -> None:
    """The flags of a command that can be one of many processes."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where all processes meet.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
    flags.DEFINE_bool("multi_host", False, "Find these three in the SLURM step, TPU pod, Kubernetes job or Open MPI.")
    flags.DEFINE_float("start_timeout_s", 300.0, "How long to wait for the other processes, s.")


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
    links, hosts = _call_roll(address, count, process, FLAGS.start_timeout_s)
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
        if isinstance(error, (ValueError, OSError, FloatingPointError)):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
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
        # With plain flags a process has all devices of its host, as it has alone.
        cluster_detection_method=None if FLAGS.multi_host else "deactivate",
        initialization_timeout=max(int(FLAGS.start_timeout_s), 1),
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )


# ------------------------------------------------------------------------------------------------------- messages
def _send(link: socket.socket, **message) -> None:
    with contextlib.suppress(OSError):  # the watch sees a broken connection too
        link.sendall(json.dumps(message).encode() + b"\n")


def _receive(link: socket.socket) -> dict | None:
    """The next message; None: the connection has ended. Raises ValueError for what is none of ours, TimeoutError."""
    line = bytearray()
    while not line.endswith(b"\n"):
        try:
            byte = link.recv(1)  # no buffer, so that `select` knows of all that is there
        except ConnectionError:
            byte = b""
        if not byte:
            return None
        line += byte
        if len(line) > 1 << 16:
            raise ValueError("too long")
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("no object")
    return message


def _keep_alive(link: socket.socket) -> None:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # Linux
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# ----------------------------------------------------------------------------------------------------------- start
def _call_roll(
    address: str, count: int, process: int, timeout_s: float
) -> tuple[dict[int, socket.socket], dict[int, str]]:
    """({process: connection}, {process: host name}): process 0 has a connection to each other one, these to it.

    Raises:
      ValueError: a process did not come in time, came twice, or was told of another number of processes.
      OSError: process 0 cannot listen.
    """
    host, _, port = address.rpartition(":")
    if process:
        return _answer_roll(host.strip("[]"), int(port), count, process, timeout_s)
    links: dict[int, socket.socket] = {}
    hosts = {0: socket.gethostname()}
    problem = ""
    deadline = time.monotonic() + timeout_s
    ipv6 = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", int(port)), family=socket.AF_INET6 if ipv6 else socket.AF_INET, dualstack_ipv6=ipv6, backlog=count
        )
    except OSError as error:
        raise OSError(
            f"--coordinator_address={address}: process 0 cannot listen at port {port} ({error.strerror}); "
            "choose another port"
        ) from error
    with server:
        while len(links) < count - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                link, _ = server.accept()
            except TimeoutError:
                missing = [i for i in range(1, count) if i not in links]
                problem = _did_not_come(missing, count, timeout_s)
                break
            link.settimeout(5)
            try:
                hello = _receive(link) or {}
                its, its_count, its_host = (hello[name] for name in ("process", "processes", "host"))
            except (ValueError, KeyError, TimeoutError):
                link.close()  # a port scan, or a process that has ended meanwhile
                continue
            if its_count != count:
                problem = (
                    f"--num_processes={count} on process 0 ({hosts[0]}), {its_count} on process {its} ({its_host})"
                )
            elif its in hosts:
                problem = f"--process_id={its} is given to two processes, on {hosts[its]} and on {its_host}"
            if problem:
                _send(link, problem=problem)
            else:
                links[its], hosts[its] = link, its_host
    for link in links.values():
        _keep_alive(link)
        _send(link, **({"problem": problem} if problem else {"hosts": hosts}))
    if problem:
        raise ValueError(problem)
    return links, hosts


def _answer_roll(
    host: str, port: int, count: int, process: int, timeout_s: float
) -> tuple[dict[int, socket.socket], dict[int, str]]:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            link = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.01))
            break
        except OSError as error:  # not there yet, or its name not known yet
            if time.monotonic() + 0.2 >= deadline:
                raise ValueError(
                    f"{_did_not_come([0], count, timeout_s)}: no answer at {host}:{port} ({error}); start process 0 "
                    "on that host, and see that the others can reach its port"
                ) from None
            time.sleep(0.2)
    _keep_alive(link)
    _send(link, process=process, processes=count, host=socket.gethostname())
    link.settimeout(timeout_s + 10)  # process 0, which may have begun last, waits for the rest
    try:
        answer = _receive(link)
    except ValueError:
        answer = {"problem": f"{host}:{port} is no process 0 that waits for others; choose another port, or end that"}
    except TimeoutError:
        answer = {"problem": f"{host}:{port} does not answer; choose another port"}
    if answer is None:
        raise ValueError(f"process 0 of {count} ended while it waited for the others; see what it printed")
    if "problem" in answer:
        raise ValueError(answer["problem"])
    _keep_alive(link)
    return {0: link}, {int(i): name for i, name in answer["hosts"].items()}


def _did_not_come(missing: list[int], count: int, timeout_s: float) -> str:
    names = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
    return f"process{'es' if len(missing) > 1 else ''} {names} of {count} did not come within {timeout_s:g} s"


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
                _send(link, left=True)
        self._perhaps_over()
        while not self.over.wait(1.0):  # in slices, so that signals come through
            pass

    def _all_left(self) -> bool:
        return self.process == 0 and all(event.is_set() for event in self.left.values())

    def _perhaps_over(self) -> None:
        if self._all_left() and not self.over.is_set():
            for link in self.links.values():
                _send(link, over=True)
            self.over.set()

    def give_up(self, gone: int, why: str) -> None:
        """Tells the others that process `gone` is gone, says so here unless it is this one, and ends the process."""
        self.ending.acquire()  # never given back: one thread ends the process
        for other, link in self.links.items():
            if other != gone:
                _send(link, gone=gone, why=why)
        if gone != self.process:
            text = f"error: process {gone} of {len(self.hosts)} ({self.hosts[gone]}) {why}\n"
            os.write(2, text.encode())  # not through Python's files, whose locks the main thread may hold
        if self.process == 0:
            # JAX's service ends with process 0, and then JAX ends the others, in its own words. They go first.
            deadline = time.monotonic() + 5
            for link in self.links.values():
                link.settimeout(max(deadline - time.monotonic(), 0.01))
                with contextlib.suppress(OSError, ValueError):
                    while _receive(link) is not None:
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
            message = _receive(link)
        except (ValueError, OSError):  # TimeoutError: its host does not answer any more
            message = None
        if message is None:
            ready.unregister(link)
            # Once all have left, process 0 tells each so in turn; the first may be off before the last has heard it.
            if not self.over.is_set() and not self._all_left():
                self.give_up(other, "is gone; the same command on all processes goes on from the last checkpoint")
        elif "gone" in message:
            self.give_up(message["gone"], message["why"])
        elif "left" in message:
            self.left[other].set()
            self._perhaps_over()
        elif "over" in message:
            self.over.set()
