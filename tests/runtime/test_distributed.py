"""Processes that start together, stop together, and say which of them is missing."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from pcgjax.runtime import distributed
from pcgjax.runtime import roll as roll_module

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Steps with a sum over all processes, until a signal or --steps; process 0 has more to do at the end.
TOY = """
import signal, sys, time
from absl import flags
from pcgjax.runtime import distributed, files

def main(argv):
    with distributed.together():
        import jax, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        got = []
        signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        ones = np.ones((jax.local_device_count(), 4), np.float32)
        x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), ones)
        total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))
        for step in range(10**9):
            s = float(total(x))
            if step == 0:
                print("sum", s, "of", jax.process_count(), flush=True)
            if stop := distributed.stop_signal(got[0] if got else 0):
                print("stopped by", stop, "at", step, flush=True)
                time.sleep(0 if jax.process_index() else 1)
                sys.exit(128 + stop)

distributed.define_flags()
files.run(main)
"""


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(flags: list[str], **environment: str) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, **environment}
    words = [sys.executable, "-c", TOY, *flags]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def started(processes: list[subprocess.Popen]) -> list[subprocess.Popen]:
    """Once all have made their first step."""
    for process in processes:
        line = process.stdout.readline()
        while line and not line.startswith("sum"):  # gloo prints too
            line = process.stdout.readline()
        assert line == f"sum {4.0 * len(processes)} of {len(processes)}\n", process.communicate(timeout=60)[1]
    return processes


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each."""
    try:
        told = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, told, strict=True)]


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_stop_when_one_is_killed(victim):
    flags = [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"]
    processes = started([start([*flags, f"--process_id={i}"]) for i in range(2)])
    processes[victim].kill()
    began = time.monotonic()
    ends = ended(processes)
    assert time.monotonic() - began < 20
    status, _, stderr = ends[1 - victim]
    assert f"error: process {victim} of 2 ({socket.gethostname()}) is gone; the same command" in stderr
    assert status == 1


def test_all_stop_at_the_step_where_one_got_a_signal():
    # As srun starts them: two tasks on one node, found without other flags.
    slurm = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    processes = started([start(["--multi_host"], SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **slurm) for i in range(2)])
    processes[1].send_signal(signal.SIGTERM)
    ends = ended(processes)
    steps = [re.findall(r"stopped by 15 at (\d+)", stdout) for _, stdout, _ in ends]
    assert len(steps[0]) == 1
    assert steps[0] == steps[1]
    # Process 1 waited for process 0, which took longer to end: neither took the other for lost.
    assert [(status, "error" in stderr) for status, _, stderr in ends] == [(143, False)] * 2


def test_flags_that_do_not_fit(run_python):
    code = f"""
from absl import flags
from pcgjax.runtime import distributed
distributed.define_flags()
with distributed.together():
    print("alone")
for words in {[words for words, _ in MISFITS]}:
    flags.FLAGS.unparse_flags()
    for name in ("coordinator_address", "num_processes", "process_id", "multi_host", "start_timeout_s"):
        flags.FLAGS[name].unparse()
    flags.FLAGS(["x", *words.split()])
    try:
        with distributed.together():
            print("alone")
    except ValueError as error:
        print(error)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "alone"
    for line, (_, message) in zip(lines[1:], MISFITS, strict=True):
        assert message in line


MISFITS = [
    ("", "alone"),
    ("--num_processes=2", "--num_processes without --coordinator_address and --process_id"),
    ("--coordinator_address=h:1 --process_id=0", "--coordinator_address and --process_id without --num_processes"),
    ("--coordinator_address=host --num_processes=2 --process_id=0", "--coordinator_address=host: must be HOST:PORT"),
    ("--coordinator_address=h:0 --num_processes=2 --process_id=0", "--coordinator_address=h:0: must be HOST:PORT"),
    ("--coordinator_address=h:1 --num_processes=0 --process_id=0", "--num_processes=0: must be at least 1"),
    ("--coordinator_address=h:1 --num_processes=2 --process_id=2", "--process_id=2: must lie between 0 and 1"),
    ("--coordinator_address=h:1 --num_processes=2 --process_id=-1", "--process_id=-1: must lie between 0 and 1"),
    ("--multi_host --process_id=1", "--multi_host finds --process_id itself"),
    ("--multi_host", "--multi_host: neither a SLURM step (srun), a TPU pod, a Kubernetes job nor Open MPI found"),
    ("--multi_host --start_timeout_s=0", "--start_timeout_s=0.0: must be above 0"),
]


def roll(calls: list[tuple[int, int]], timeout_s: float = 1.0, port: int | None = None, token: str = "") -> list:
    """What each (number of processes, process) is answered: its links and the hosts, or the error's text."""
    address = f"127.0.0.1:{port or free_port()}"

    def call(count: int, process: int):
        try:
            return roll_module.call(address, count, process, timeout_s, token)
        except (ValueError, OSError) as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda one: call(*one), calls))


def read_all(link: socket.socket) -> bytes:
    """What comes until the other side closes."""
    pieces = []
    try:
        while piece := link.recv(1 << 12):
            pieces.append(piece)
    except ConnectionError:
        pass
    return b"".join(pieces)


def test_roll():
    answers = roll([(3, 2), (3, 0), (3, 1)], timeout_s=20)
    hosts = dict.fromkeys(range(3), socket.gethostname())
    assert [(set(links), names) for links, names in answers] == [({0}, hosts), ({1, 2}, hosts), ({0}, hosts)]
    for links, _ in answers:
        for link in links.values():
            link.close()


def test_those_who_did_not_come_are_named():
    message = "processes 1, 3 of 4 did not come within 1 s"
    assert roll([(4, 0), (4, 2)]) == [message, message]
    (alone,) = roll([(2, 1)])
    assert alone.startswith("process 0 of 2 did not come within 1 s: no answer at 127.0.0.1:")


def test_a_roll_that_cannot_be():
    twice = roll([(3, 0), (3, 1), (3, 1)], timeout_s=5)
    assert all("--process_id=1 is given to two processes" in text for text in twice)
    differ = roll([(2, 0), (3, 1)], timeout_s=5)
    assert all("--num_processes=2 on process 0" in text and ", 3 on process 1" in text for text in differ)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (answer,) = roll([(2, 0)], port=port)
        assert f"process 0 cannot listen at port {port}" in answer


def test_a_port_that_is_not_process_0():
    with socket.create_server(("127.0.0.1", 0)) as other, concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(roll, [(2, 1)], 1.0, other.getsockname()[1])
        link, _ = other.accept()
        with link:
            link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            assert "is no process 0 that waits for others" in answer.result()[0]


def test_a_stranger_at_the_port_is_let_go():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(roll, [(2, 0)], 20, port)
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"hello\n")
            assert read_all(stranger).startswith(b'{"nonce"')
        second = pool.submit(roll, [(2, 1)], 20, port)
        for ((links, _),) in (first.result(), second.result()):
            assert len(links) == 1
            for link in links.values():
                link.close()


def hello(process=1, processes=2, host="a", **more) -> bytes:
    return json.dumps({"process": process, "processes": processes, "host": host, **more}).encode() + b"\n"


NO_HELLOS = [
    b"[1, 2]\n", b"1\n", b"null\n", b'"text"\n', b"{}\n", b"\n", b"\xff\xfe\n", b"[" * 5000 + b"\n", b"x" * 100_000,
    b'{"process": ' + b"9" * 900 + b', "processes": 2, "host": "a"}\n',
    hello(True), hello("1"), hello(1.0), hello([1]), hello(None), hello(0), hello(-1), hello(2), hello(10**30, 10**31),
    hello(processes=True), hello(processes="2"), hello(processes=None), hello(processes=10**30),
    hello(host=1), hello(host=""), hello(host="a" * 300), hello(host="a\nerror: b"), hello(host={}),
    hello(proof=1), hello(proof="x" * 100), hello(proof="\u00e9"), hello() + b"more", b"GET / HTTP/1.1\r\n\r\n",
]  # fmt: skip


def test_R14_what_is_no_hello_is_let_go():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(roll, [(2, 0)], 20, port)
        time.sleep(0.3)
        for words in NO_HELLOS:
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.settimeout(10)
                with contextlib.suppress(ConnectionError):
                    stranger.sendall(words)
                assert b"problem" not in read_all(stranger), words
        ((links, hosts),) = roll([(2, 1)], 20, port)
        assert hosts == dict.fromkeys(range(2), socket.gethostname())
        ((others, _),) = first.result()
        for link in (*links.values(), *others.values()):
            link.close()


def test_R14_a_byte_each_half_second_and_many_silent_ones_hold_up_nobody(monkeypatch):
    monkeypatch.setattr(roll_module, "STRANGERS", 20)
    port, began = free_port(), time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as open_ones:
        first = pool.submit(roll, [(2, 0)], 2.5, port)
        time.sleep(0.3)
        links = [open_ones.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(40)]

        def drip():
            with contextlib.suppress(OSError):
                for _ in range(12):
                    links[-1].sendall(b"x")
                    time.sleep(0.5)

        pool.submit(drip)
        assert first.result() == ["process 1 of 2 did not come within 2.5 s"]
        assert time.monotonic() - began < 5

    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as open_ones:
        first = pool.submit(roll, [(2, 0)], 20, port)
        time.sleep(0.3)
        for _ in range(40):
            open_ones.enter_context(socket.create_connection(("127.0.0.1", port)))
        began = time.monotonic()
        ((others, _),) = roll([(2, 1)], 20, port)
        assert time.monotonic() - began < 2
        ((members, _),) = first.result()
        for link in (*others.values(), *members.values()):
            link.close()


def listeners(port: int) -> set[str]:
    """The addresses that this machine's processes listen at, of one port, in the kernel's own words."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            address, _, its = line.split()[1].partition(":")
            if int(its, 16) == port and line.split()[3] == "0A":
                found.add(address)
    return found


@pytest.mark.skipif(not pathlib.Path("/proc/net/tcp").exists(), reason="not Linux")
@pytest.mark.parametrize(("host", "everywhere"), [("127.0.0.1", False), ("localhost", False), ("192.0.2.7", True),
                                                   ("no.such.host.invalid", True)])  # fmt: skip
def test_R14_the_roll_is_called_at_the_address_given(host, everywhere):
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(roll_module.call, f"{host}:{port}", 2, 0, 1.0)
        time.sleep(0.5)
        there = listeners(port)
        with pytest.raises(ValueError, match="process 1 of 2 did not come"):
            first.result()
    assert len(there) == 1
    assert there <= ({"0" * 32, "0" * 8} if everywhere else {"0100007F", "00000000000000000000000001000000"})


def test_R14_a_shared_token_is_proven_and_not_sent(caplog):
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(roll, [(2, 0)], 20, port, "hush-5577")
        time.sleep(0.3)
        for token in ("", "another"):
            (told,) = roll([(2, 1)], 5, port, token)
            assert "process 1 (" in told
            assert "has another --cluster_token or job than process 0" in told
        with socket.create_connection(("127.0.0.1", port)) as seen:
            nonce = json.loads(seen.makefile().readline())["nonce"]
            said = roll_module.proof("hush-5577", nonce, 1, 2, "a")
            assert "hush" not in said
        with socket.create_connection(("127.0.0.1", port)) as again:  # a proof is of its own nonce
            again.sendall(hello(proof=said))
            assert b"another --cluster_token" in read_all(again)
        ((links, _),) = roll([(2, 1)], 20, port, "hush-5577")
        ((others, _),) = first.result()
        for link in (*links.values(), *others.values()):
            link.close()


@pytest.mark.parametrize("answer", [
    b"[]\n", b"[" * 5000 + b"\n", b'{"hosts": 5}\n', b'{"hosts": {"0": "a"}}\n', b'{"hosts": {"0": "a", "1": 5}}\n',
    b'{"hosts": {"0": "a", "x": "b"}}\n', b'{"problem": 5}\n', b"x" * 100_000 + b"\n",
])  # fmt: skip
def test_R14_answers_of_process_0_are_typed(answer):
    with socket.create_server(("127.0.0.1", 0)) as other, concurrent.futures.ThreadPoolExecutor(1) as pool:
        told = pool.submit(roll, [(2, 1)], 2.0, other.getsockname()[1])
        link, _ = other.accept()
        with link:
            link.sendall(b'{"nonce": "1234"}\n')
            with contextlib.suppress(ConnectionError):
                link.sendall(answer)
            assert "is no process 0 that waits for others" in told.result()[0]


def test_one_process_asks_nobody():
    assert distributed.stop_signal(0) == 0
    assert distributed.stop_signal(15) == 15
