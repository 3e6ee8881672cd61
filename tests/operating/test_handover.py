"""What systemd hands over and wants to be told: the socket, READY=1, STOPPING=1, WATCHDOG=1."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from server.systemd import Notifier, handed_over
from tests.harness import (
    DEAD_DATABASE,
    ScriptedUpstream,
    Service,
    call,
    checkout,
    free_port,
    no_descriptor_free,
    ok,
    problem,
    wait_for,
)
from tests.harness.handover import Listener, Told

Start = Callable[..., Service]
Handed = Callable[..., subprocess.Popen[bytes]]

one_or_two_workers = pytest.mark.parametrize("workers", [1, 2])


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.sock.close()


@pytest.fixture
def handed(listener: Listener) -> Iterator[Handed]:
    """Start services on the listener; all are killed at the end of the test."""
    running: list[subprocess.Popen[bytes]] = []

    def start(**settings: object) -> subprocess.Popen[bytes]:
        running.append(listener.hand_over(**settings))  # type: ignore[arg-type]
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO of a listener is Linux's")
@one_or_two_workers
def test_the_queue_of_a_handed_over_socket_stays_as_long_as_it_was(
    handed: Handed, listener: Listener, workers: int
) -> None:
    """It is what systemd's Backlog= says, and holds those who connect during a restart."""
    listener.sock.listen(100)
    handed(WORKERS=workers)
    assert call(listener.port, "GET", "/health/live").status == 200
    info = listener.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    assert int.from_bytes(info[28:32], sys.byteorder) == 100  # tcpi_sacked


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    told = Told(tmp_path)
    yield told
    told.sock.close()


@one_or_two_workers
def test_a_socket_that_is_handed_over_is_served(
    listener: Listener, handed: Handed, workers: int
) -> None:
    """The clients were in its queue before the service began."""
    process = handed(WORKERS=workers)
    for _ in range(10):
        assert call(listener.port, "GET", "/health/live").status == 200
    process.terminate()
    assert process.wait(20) == 0


@one_or_two_workers
def test_the_next_instance_is_served_by_the_same_socket(
    listener: Listener, handed: Handed, workers: int
) -> None:
    """Whoever knocks in between waits in the queue, and is answered by the next one."""
    for _ in range(3):
        process = handed(WORKERS=workers)
        assert call(listener.port, "GET", "/health/live").status == 200
        process.terminate()
        assert process.wait(20) == 0
    with socket.create_connection(("127.0.0.1", listener.port), 10) as early:
        early.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        handed(WORKERS=workers)
        assert early.recv(100).startswith(b"HTTP/1.1 200 ")


@one_or_two_workers
def test_it_tells_when_it_serves_and_when_it_stops(
    listener: Listener, handed: Handed, told: Told, workers: int
) -> None:
    process = handed(WORKERS=workers, NOTIFY_SOCKET=told.path)
    assert told.next() == "READY=1"
    children = psutil.Process(process.pid).children()
    assert len(children) == (0 if workers == 1 else workers)
    process.terminate()
    assert told.next() == "STOPPING=1"
    assert process.wait(20) == 0
    with pytest.raises(TimeoutError):
        told.next(0.1)


def test_an_abstract_socket_is_told_too(listener: Listener, handed: Handed) -> None:
    name = f"gatehouse-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        sock.settimeout(20)
        handed(NOTIFY_SOCKET="@" + name)
        assert sock.recv(100) == b"READY=1"


def test_a_socket_that_nobody_listens_on_stops_nothing(
    listener: Listener, handed: Handed, tmp_path: Path
) -> None:
    process = handed(NOTIFY_SOCKET=tmp_path / "nowhere", WATCHDOG_USEC=1_000_000)
    assert call(listener.port, "GET", "/health/live").status == 200
    process.terminate()
    assert process.wait(20) == 0


@one_or_two_workers
def test_a_receiver_that_reads_nothing_does_not_hold_the_service_up(
    listener: Listener, handed: Handed, told: Told, workers: int
) -> None:
    """A send to its full queue waited, in a signal handler: the service neither served nor ended."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        other.connect(str(told.path))
        with contextlib.suppress(BlockingIOError):
            while True:
                other.send(b"X=1")
        other.setblocking(True)
        process = handed(WORKERS=workers, NOTIFY_SOCKET=told.path, WATCHDOG_USEC=1_000_000)
        assert call(listener.port, "GET", "/health/live").status == 200
        while told.next() == "X=1":  # It is told that all is ready once there is room for that.
            pass
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                other.send(b"X=1")
        process.terminate()
        assert process.wait(20) == 0


@one_or_two_workers
def test_the_watchdog_is_fed_while_every_loop_turns_and_not_longer(
    listener: Listener, handed: Handed, told: Told, workers: int
) -> None:
    process = handed(WORKERS=workers, NOTIFY_SOCKET=told.path, WATCHDOG_USEC=1_000_000)
    assert told.next() == "READY=1"
    for _ in range(3):
        assert told.next(5) == "WATCHDOG=1"
    if workers == 1:
        return  # A process that is stopped as a whole tells nobody anything.
    worker = psutil.Process(process.pid).children()[1]
    worker.suspend()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        while time.monotonic() - began < 15:
            assert told.next(2) == "WATCHDOG=1"
    worker.resume()
    assert told.next(10) == "WATCHDOG=1"


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None,
    reason="systemd-socket-activate is not installed",
)
@one_or_two_workers
def test_systemd_s_own_socket_activation_starts_it(
    upstream: ScriptedUpstream, workers: int
) -> None:
    upstream.script(ok)
    port = free_port()
    settings = {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": upstream.url, "WORKERS": workers}
    process = subprocess.Popen(
        [
            "systemd-socket-activate",
            f"--listen=127.0.0.1:{port}",
            *(f"--setenv={name}={value}" for name, value in settings.items()),
            *(sys.executable, "app.py"),
        ],
        cwd=checkout(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def answers() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            return call(port, "GET", "/a").body == b"ok"
        return False

    try:
        wait_for(answers, 20, "an answer")
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        output, _ = process.communicate()
    assert (
        f"listens on http://127.0.0.1:{port}, handed over, with {workers} worker".encode() in output
    )


def test_no_child_process_takes_the_socket_for_its_own() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a", "HOME": "/"}
    assert handed_over(environ) is None  # It is for process 1.
    assert environ == {"HOME": "/"}


def test_a_descriptor_that_is_not_open_is_no_socket() -> None:
    code = """
import os
from server.systemd import handed_over
try:
    handed_over({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
except ValueError as error:
    print(error)
"""
    told = subprocess.check_output([sys.executable, "-c", code], cwd=checkout(), text=True)
    assert told.startswith("descriptor 3 was handed over, and is no socket: ")


def test_where_no_descriptor_is_free_a_message_is_to_be_sent_again(tmp_path: Path) -> None:
    """The error left a signal handler, and the service did not stop."""
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "nowhere")})
    assert notifier.tell("READY=1")  # Nobody wants it.
    with no_descriptor_free():
        assert not notifier.tell("STOPPING=1")


@pytest.mark.parametrize(
    ("kind", "count", "line"),
    [
        ("two", 2, "2 sockets were handed over, and Gatehouse listens on one"),
        ("connected", 1, "the socket that was handed over must listen on TCP (and Accept=no)"),
        ("unix", 1, "the socket that was handed over must listen on TCP (and Accept=no)"),
        ("datagrams", 1, "the socket that was handed over must listen on TCP (and Accept=no)"),
        ("file", 1, "descriptor 3 was handed over, and is no socket: "),
    ],
)
def test_what_is_no_listening_socket_is_one_line(
    listener: Listener, tmp_path: Path, kind: str, count: int, line: str
) -> None:
    with contextlib.ExitStack() as stack:
        given: socket.socket
        if kind == "connected":
            given = stack.enter_context(socket.create_connection(("127.0.0.1", listener.port)))
        elif kind == "unix":
            given = stack.enter_context(socket.socket(socket.AF_UNIX))
            given.bind(str(tmp_path / "socket"))
            given.listen()
        elif kind == "datagrams":
            given = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        elif kind == "file":
            given = stack.enter_context((tmp_path / "file").open("w"))  # type: ignore[assignment]
        else:
            given = listener.sock
        process = listener.hand_over(given, count)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert output.decode().startswith(line) and len(output.splitlines()) == 1


def test_a_socket_open_to_the_network_asks_for_a_token() -> None:
    """HOST is not used then, so that its own check would let this pass."""
    listener = Listener("0.0.0.0")
    process = listener.hand_over()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 2
    assert output.startswith(b"USERS_TOKEN is required where the socket")
    process = listener.hand_over(USERS_AUTH="none")
    try:
        assert call(listener.port, "GET", "/health/live").status == 200
    finally:
        process.kill()
        process.communicate()
        listener.sock.close()


# The drain's delay


@one_or_two_workers
def test_a_delayed_drain_turns_readiness_and_accepts_everything(
    start: Start, database: str, upstream: ScriptedUpstream, workers: int
) -> None:
    """A balancer that asks every second has time to notice."""
    upstream.script(ok)
    service = start(
        POSTGRES_URI=database, UPSTREAM_URL=upstream.url, WORKERS=workers, DRAIN_DELAY=1.5
    )
    assert service.call("GET", "/health/ready").status == 200
    began = time.monotonic()
    service.process.terminate()
    wait_for(lambda: service.call("GET", "/health/ready").status == 503, 1, "readiness to turn")
    document = problem(service.call("GET", "/health/ready"), 503, "database-unavailable")
    assert document["detail"] == "The service is stopping."
    while time.monotonic() - began < 1:
        assert service.call("GET", "/a").body == b"ok"
        assert service.call("GET", "/users").status == 200
        assert service.call("GET", "/health/live").status == 200
    assert service.process.wait(20) == 0
    assert time.monotonic() - began > 1.5


@one_or_two_workers
def test_a_second_signal_ends_a_delayed_drain_at_once(start: Start, workers: int) -> None:
    service = start(WORKERS=workers, DRAIN_DELAY=60)
    service.process.terminate()
    wait_for(
        lambda: service.call("GET", "/health/ready").status == 503, 5, "the first to be noticed"
    )
    service.process.terminate()
    assert service.process.wait(3) == 1


# Cores


def cores(process: psutil.Process) -> set[int]:
    return os.sched_getaffinity(process.pid)


linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins nothing")


@linux
def test_services_of_one_worker_each_do_not_meet_on_one_core(start: Start) -> None:
    """Each was pinned to a core by the number of its process, which is 1 in every container."""
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("there is one core")
    for _ in range(3):
        service = start(WORKERS=1)
        assert cores(psutil.Process(service.process.pid)) == os.sched_getaffinity(0)


@linux
def test_workers_have_a_core_each_where_there_are_as_many(start: Start) -> None:
    mine = os.sched_getaffinity(0)
    service = start(WORKERS=len(mine))
    if len(mine) == 1:
        return
    workers = psutil.Process(service.process.pid).children()
    wait_for(lambda: all(len(cores(one)) == 1 for one in workers), what="the workers to be pinned")
    assert set().union(*map(cores, workers)) == mine


@linux
def test_more_workers_than_cores_are_left_to_the_system(start: Start) -> None:
    mine = os.sched_getaffinity(0)
    service = start(WORKERS=len(mine) + 1)
    if len(mine) > 1:
        for worker in psutil.Process(service.process.pid).children():
            assert cores(worker) == mine


# A sandbox's filter of system calls: sched_setaffinity fails with EPERM, all else passes. See
# seccomp(2); the number of the call is that of x86-64.
SANDBOX = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
filters = b"".join(struct.pack("HBBI", *one) for one in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 203), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7FFF0000)))
text = ctypes.create_string_buffer(filters)
program = ctypes.create_string_buffer(struct.pack("HP", 4, ctypes.addressof(text)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(program)) == 0
try:
    os.sched_setaffinity(0, os.sched_getaffinity(0))
except PermissionError:
    os.execv(sys.executable, [sys.executable, "app.py"])
"""


@linux
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of the call is x86-64's")
def test_a_sandbox_that_refuses_to_pin_is_no_end() -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", SANDBOX],
        cwd=checkout(),
        env={
            "PATH": os.environ["PATH"],
            "POSTGRES_URI": DEAD_DATABASE,
            "UPSTREAM_URL": "http://127.0.0.1:1",
            "PORT": str(port),
            "WORKERS": str(len(os.sched_getaffinity(0))),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def lives() -> bool:
        with contextlib.suppress(OSError):
            return call(port, "GET", "/health/live").status == 200
        return False

    try:
        wait_for(lives, 20, "the service to serve")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
