"""The roll call of the processes that start together: who is there, told at one port, by messages of a line each.

A process that comes to process 0 is sent a nonce, and answers with a hello: its number, how many there are, its host,
and, where a secret is shared, a proof of it (an HMAC over the nonce and the rest), so that the secret itself does not
travel. What is no hello is a stranger's: it is let go and logged, and delays nobody.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import json
import secrets
import selectors
import socket
import time
from typing import Any, NamedTuple

from absl import logging

# A host that lost its power closes no connection: the kernel asks after 10 s of silence, and gives up after 20 s more.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
HELLO_BYTES = 1024  # of a hello: a stranger's may not be long, nor nested deeply
MESSAGE_BYTES = 1 << 20  # of an answer, which names all hosts
HELLO_S = 5.0  # to send a hello in, after the connection
STRANGERS = 256  # that may be half-way through a hello at once; the oldest goes
Links = dict[int, socket.socket]
Hosts = dict[int, str]


# ------------------------------------------------------------------------------------------------------- messages


def send(link: socket.socket, **message: Any) -> None:
    with contextlib.suppress(OSError):  # the watch sees a broken connection too
        link.sendall(json.dumps(message).encode() + b"\n")


def receive(link: socket.socket, deadline: float | None = None, most: int = MESSAGE_BYTES) -> dict | None:
    """The next message; None: the connection has ended. Raises ValueError for what is none of ours, TimeoutError."""
    line = bytearray()
    while not line.endswith(b"\n"):
        if deadline is not None:
            link.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            byte = link.recv(1)  # no buffer, so that `select` knows of all that is there
        except ConnectionError:
            byte = b""
        if not byte:
            return None
        line += byte
        if len(line) > most:
            raise ValueError("too long")
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError
    return _message(bytes(line))


def _message(line: bytes) -> dict:
    """Raises ValueError for what is no JSON object."""
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("no object")
    return message


def _keep_alive(link: socket.socket) -> None:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # Linux
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_host(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()


def proof(token: str, nonce: str, process: int, processes: int, host: str) -> str:
    """That a process knows the token; "" where there is none."""
    if not token:
        return ""
    text = json.dumps([nonce, process, processes, host]).encode()
    return hmac.new(token.encode(), text, hashlib.sha256).hexdigest()


class Hello(NamedTuple):
    process: int
    processes: int
    host: str
    proof: str


def hello_of(message: dict) -> Hello:
    """Raises ValueError for what is no hello of a process of ours."""
    process: Any = message.get("process")
    processes: Any = message.get("processes")
    host: Any = message.get("host")
    said: Any = message.get("proof", "")
    if not (is_whole(process) and is_whole(processes) and 1 <= process < processes <= 1 << 20):
        raise ValueError("process, processes: no numbers of a process that calls")
    if not is_host(host) or not isinstance(said, str) or len(said) > 64 or not said.isascii():
        raise ValueError("host or proof: no short text")
    return Hello(process, processes, host, said)


# ------------------------------------------------------------------------------------------------------ process 0


def call(address: str, count: int, process: int, timeout_s: float, token: str = "") -> tuple[Links, Hosts]:
    """({process: connection}, {process: host name}): process 0 has a connection to each other one, these to it.

    Raises:
      ValueError: a process did not come in time, came twice, was told of another number of processes, or another token.
      OSError: process 0 cannot listen.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    if process:
        return _answer(host.strip("[]"), int(port), count, process, timeout_s, token)
    hosts: Hosts = {0: socket.gethostname()}
    links: Links = {}
    problem = ""
    with _listening(host.strip("[]"), int(port), address, count) as server:
        door = _Door(server, deadline)
        try:
            while len(links) < count - 1 and not problem:
                came = door.next_hello()
                if came is None:
                    missing = [i for i in range(1, count) if i not in links]
                    problem = _did_not_come(missing, count, timeout_s)
                    break
                link, nonce, hello = came
                problem, known = _judged(hello, count, hosts, nonce, token)
                link.settimeout(HELLO_S)
                if not known:
                    send(link, problem=f"process {hello.process} ({hello.host}) has another --cluster_token or job "
                         f"than process 0 ({hosts[0]}) at {address}; give all processes the same")  # fmt: skip
                    link.close()
                    logging.warning("process %d on %s called at %s without proof of the shared token: passed over",
                                    hello.process, hello.host, address)  # fmt: skip
                elif problem:
                    send(link, problem=problem)
                    link.close()
                else:
                    links[hello.process], hosts[hello.process] = link, hello.host
        finally:
            door.close()
    for link in links.values():
        _keep_alive(link)
        send(link, **({"problem": problem} if problem else {"hosts": hosts}))
    if problem:
        raise ValueError(problem)
    return links, hosts


def _judged(hello: Hello, count: int, hosts: Hosts, nonce: str, token: str) -> tuple[str, bool]:
    """(why the start cannot be, or "", whether it is a process of ours)."""
    its, its_host = hello.process, hello.host
    mine = proof(token, nonce, its, hello.processes, its_host)
    if not hmac.compare_digest(mine, hello.proof):
        return "", False
    if hello.processes != count:
        differ = f"--num_processes={count} on process 0 ({hosts[0]}), {hello.processes} on process {its} ({its_host})"
        return differ, True
    if its in hosts:
        return f"--process_id={its} is given to two processes, on {hosts[its]} and on {its_host}", True
    return "", True


def own_address(host: str) -> tuple[socket.AddressFamily, str] | None:
    """The first of a host's addresses that is this machine's; None: there is none that others know it by.

    A router before this machine may have the address that the others were given; and a machine's own name may be
    127.0.1.1 to itself alone.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    for family, _, _, _, place in found:
        name = str(place[0])
        if ipaddress.ip_address(name.partition("%")[0]).is_loopback and host not in (name, "localhost"):
            continue
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((name, 0))
            return family, name
    return None


def _listening(host: str, port: int, address: str, count: int) -> socket.socket:
    """A server at the address given, so that it is reached by no other; without such an address at all there are."""
    own, dual = own_address(host), socket.has_dualstack_ipv6()
    backlog = max(count, 128)
    try:
        if own:
            return socket.create_server((own[1], port), family=own[0], backlog=backlog)
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=backlog)
    except OSError as error:
        raise OSError(
            f"--coordinator_address={address}: process 0 cannot listen at port {port} ({error.strerror}); "
            "choose another port"
        ) from error
    logging.warning("--coordinator_address=%s: no address of this machine's; process 0 listens at port %d of all its "
                    "addresses", address, port)  # fmt: skip
    return server


class _Visitor(NamedTuple):
    link: socket.socket
    nonce: str
    until: float
    line: bytearray


class _Door:
    """Takes connections and their hellos, many at once, until a deadline: none of them can hold up another."""

    def __init__(self, server: socket.socket, deadline: float):
        self.server, self.deadline = server, deadline
        self.visitors: dict[int, _Visitor] = {}  # by file number, the oldest first
        self.ready = selectors.DefaultSelector()
        server.setblocking(False)
        self.ready.register(server, selectors.EVENT_READ)

    def next_hello(self) -> tuple[socket.socket, str, Hello] | None:
        """(connection, the nonce it was sent, its hello); None: nobody more came in time."""
        while (now := time.monotonic()) < self.deadline:
            for visitor in [one for one in self.visitors.values() if one.until <= now]:
                self._let_go(visitor, "said nothing whole in time")
            soonest = min([self.deadline, *(one.until for one in self.visitors.values())])
            for key, _ in self.ready.select(max(soonest - now, 0)):
                if key.fileobj is self.server:
                    self._welcome()
                elif (speaker := self.visitors.get(key.fd)) and (hello := self._hear(speaker)):
                    self._forget(speaker)
                    speaker.link.setblocking(True)
                    return speaker.link, speaker.nonce, hello
        return None

    def _welcome(self) -> None:
        try:
            link, _ = self.server.accept()
        except OSError:  # gone already
            return
        if len(self.visitors) >= STRANGERS:
            self._let_go(next(iter(self.visitors.values())), "gave way to others")
        nonce = secrets.token_hex(16)
        link.setblocking(False)
        send(link, nonce=nonce)
        visitor = _Visitor(link, nonce, min(time.monotonic() + HELLO_S, self.deadline), bytearray())
        self.visitors[link.fileno()] = visitor
        self.ready.register(link, selectors.EVENT_READ)

    def _hear(self, visitor: _Visitor) -> Hello | None:
        """The visitor's hello, once it is whole."""
        try:
            piece = visitor.link.recv(HELLO_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            piece = b""
        visitor.line.extend(piece)
        if not piece or len(visitor.line) > HELLO_BYTES:
            self._let_go(visitor, "said too much" if piece else "left")
            return None
        if b"\n" not in visitor.line:
            return None
        try:
            line, _, more = bytes(visitor.line).partition(b"\n")
            if more:
                raise ValueError("more than a hello")
            return hello_of(_message(line))
        except ValueError as error:
            self._let_go(visitor, f"no hello ({' '.join(str(error).split())[:60]})")
            return None

    def _forget(self, visitor: _Visitor) -> None:
        del self.visitors[visitor.link.fileno()]
        self.ready.unregister(visitor.link)

    def _let_go(self, visitor: _Visitor, why: str) -> None:
        self._forget(visitor)
        visitor.link.close()
        logging.info("a stranger at the port of process 0: %s", why)

    def close(self) -> None:
        for visitor in list(self.visitors.values()):
            self._forget(visitor)
            visitor.link.close()
        self.ready.close()


# ------------------------------------------------------------------------------------------------------- the others


def _answer(host: str, port: int, count: int, process: int, timeout_s: float, token: str) -> tuple[Links, Hosts]:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            link = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.01))
            break
        except (OSError, UnicodeError) as error:  # not there yet, or its name not known yet
            if time.monotonic() + 0.2 >= deadline:
                raise ValueError(
                    f"{_did_not_come([0], count, timeout_s)}: no answer at {host}:{port} ({error}); start process 0 "
                    "on that host, and see that the others can reach its port"
                ) from None
            time.sleep(0.2)
    _keep_alive(link)
    try:
        hosts = _told(link, host, port, count, process, deadline, timeout_s, token)
    except BaseException:
        link.close()
        raise
    _keep_alive(link)
    return {0: link}, hosts


def _told(
    link: socket.socket, host: str, port: int, count: int, process: int, deadline: float, timeout_s: float, token: str
) -> Hosts:
    """The hosts of all, by process 0's answer to this one's hello."""
    stranger = f"{host}:{port} is no process 0 that waits for others; choose another port, or end that"
    ended = f"process 0 of {count} ended while it waited for the others; see what it printed"
    try:
        greeting = receive(link, max(deadline, time.monotonic() + HELLO_S), HELLO_BYTES)
        if greeting is None:
            raise ValueError(ended)
        nonce, name = greeting.get("nonce"), socket.gethostname()
        if not isinstance(nonce, str):
            raise ValueError(stranger)
        said = proof(token, nonce, process, count, name)
        link.settimeout(HELLO_S)
        send(link, process=process, processes=count, host=name, proof=said)
        # Process 0, which may have begun last, waits for the rest.
        answer = receive(link, time.monotonic() + timeout_s + 10)
    except TimeoutError:
        raise ValueError(f"{host}:{port} does not answer; choose another port") from None
    except ValueError as error:
        raise ValueError(ended if str(error) == ended else stranger) from None
    if answer is None:
        raise ValueError(ended)
    if isinstance(answer.get("problem"), str):
        raise ValueError(" ".join(answer["problem"].split())[:1000])
    hosts = answer.get("hosts")
    if (
        not isinstance(hosts, dict)
        or set(hosts) != set(map(str, range(count)))
        or not all(map(is_host, hosts.values()))
    ):
        raise ValueError(stranger)
    return {i: hosts[str(i)] for i in range(count)}


def _did_not_come(missing: list[int], count: int, timeout_s: float) -> str:
    names = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
    return f"process{'es' if len(missing) > 1 else ''} {names} of {count} did not come within {timeout_s:g} s"
