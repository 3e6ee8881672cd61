"""How the service starts and stops as a process: draining, signals, workers that die."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.harness import (
    DEAD_DATABASE,
    Databases,
    RawClient,
    ScriptedUpstream,
    Seen,
    Service,
    call,
    checkout,
    free_port,
    refuses,
    request,
    wait_for,
)
from tests.harness.service import inherited

Start = Callable[..., Service]

both_signals = pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
one_or_two_workers = pytest.mark.parametrize("workers", [1, 2])


class HeldUpstream(ScriptedUpstream):
    """An upstream that sends half of each answer, the other half only after `release`.

    /stream is chunked, /endless is chunked and never ends, anything else has a length and
    sends no byte before `release`.
    """

    def __init__(self) -> None:
        self.release = threading.Event()
        self.waiting = 0
        self._lock = threading.Lock()
        super().__init__(self._hold)

    def _hold(self, sock: socket.socket, seen: Seen) -> None:
        streamed = seen.target != b"/plain"
        if streamed:
            sock.sendall(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"5\r\nfirst\r\n"
            )
        with self._lock:
            self.waiting += 1
        if seen.target == b"/endless":
            while not self.release.wait(0.05):
                sock.sendall(b"4\r\nmore\r\n")
            return
        assert self.release.wait(60)
        if streamed:
            sock.sendall(b"6\r\nsecond\r\n0\r\n\r\n")
        else:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nfirstsecond")

    def close(self) -> None:
        self.release.set()
        super().close()


@pytest.fixture
def held() -> Iterator[HeldUpstream]:
    upstream = HeldUpstream()
    yield upstream
    upstream.close()


@contextlib.contextmanager
def under_way(
    service: Service, held: HeldUpstream, targets: list[str]
) -> Iterator[list[RawClient]]:
    """Clients with one request each that is with the upstream."""
    clients = [service.client(timeout=40) for _ in targets]
    try:
        for client, target in zip(clients, targets, strict=True):
            client.send(f"GET {target} HTTP/1.1\r\nHost: a.example\r\n\r\n".encode())
        wait_for(lambda: held.waiting == len(targets), 10, "the requests to be under way")
        yield clients
    finally:
        for client in clients:
            client.close()


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def workers_of(service: Service) -> list[psutil.Process]:
    return [child for child in psutil.Process(service.process.pid).children() if alive(child)]


@both_signals
@one_or_two_workers
def test_who_connects_at_the_first_moment_is_answered_though_a_stop_follows_at_once(
    upstream: ScriptedUpstream, how: signal.Signals, workers: int
) -> None:
    """The socket listened before the signals were, which ended the process and reset the client."""
    settings = {"UPSTREAM_URL": upstream.url, "WORKERS": str(workers), "PORT": str(free_port())}
    environ = {**inherited(), "POSTGRES_URI": DEAD_DATABASE, **settings}
    port = int(settings["PORT"])
    with subprocess.Popen([sys.executable, "app.py"], cwd=checkout(), env=environ) as process:
        try:
            wait_for(lambda: not refuses(port), what="the socket")
            with RawClient(port) as client:
                client.send(request(b"GET / HTTP/1.1"))
                process.send_signal(how)
                assert client.reply().status == 200
            assert process.wait(10) == 0
        finally:
            process.kill()


@both_signals
@one_or_two_workers
def test_requests_under_way_are_answered_and_no_new_ones_taken(
    start: Start, held: HeldUpstream, how: signal.Signals, workers: int
) -> None:
    service = start(UPSTREAM_URL=held.url, WORKERS=workers)
    kept = [service.client() for _ in range(4)]
    for client in kept:
        client.send(b"GET /health/live HTTP/1.1\r\nHost: a.example\r\n\r\n")
        reply = client.reply()
        assert (reply.status, reply.get("Connection")) == (200, None)
    kept[0].send(b"\r\n")  # which begins no request (RFC 9112 section 2.2)
    with under_way(service, held, ["/plain", "/stream"] * 6) as clients:
        service.process.send_signal(how)
        wait_for(lambda: refuses(service.port), 5, "new connections to be refused")
        # Whoever asks on a connection that was kept is answered, and told that it ends.
        for client, target in zip(kept[:3], ("/plain", "/plain", "/health/live"), strict=True):
            client.send(f"GET {target} HTTP/1.1\r\nHost: a.example\r\n\r\n".encode())
        reply = kept[2].reply()
        assert (reply.status, reply.get("Connection")) == (200, "close")
        assert kept[2].closed()
        assert kept[3].closed()  # It has asked for nothing.
        assert service.process.poll() is None
        held.release.set()
        released = time.monotonic()
        for client in [*clients, *kept[:2]]:
            reply = client.reply()
            assert (reply.status, reply.body, reply.complete) == (200, b"firstsecond", True), reply
            if client in kept:
                assert reply.get("Connection") == "close"
        # Nothing waits for idle connections, whatever they were told, or for the rest of
        # SHUTDOWN_TIMEOUT.
        assert service.process.wait(30) == 0
        assert time.monotonic() - released < 5
    assert held.waiting == 14


@one_or_two_workers
def test_no_request_is_lost_that_was_sent_while_the_service_stopped(
    start: Start, upstream: ScriptedUpstream, workers: int
) -> None:
    """Each on a connection of its own: it is answered in full, or was refused the connection."""
    service = start(UPSTREAM_URL=upstream.url, WORKERS=workers, ACCESS_LOG="off")
    answered: list[int] = []
    lost: list[str] = []

    def hammer() -> None:
        while True:
            try:
                client = service.client()
            except ConnectionRefusedError:
                return
            except OSError as error:
                lost.append(repr(error))
                return
            with client:
                try:
                    client.send(b"GET /plain HTTP/1.1\r\nHost: a.example\r\n\r\n")
                    reply = client.reply()
                except (OSError, EOFError) as error:
                    lost.append(repr(error))
                    return
                if reply.status != 200 or not reply.complete:
                    lost.append(repr(reply))
                answered.append(reply.status)

    threads = [threading.Thread(target=hammer) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(answered) > 300, 20, "some load")
    assert service.stop() == 0
    for thread in threads:
        thread.join(20)
    assert lost == []


def test_a_body_that_is_still_being_sent_is_a_request_under_way(
    start: Start, upstream: ScriptedUpstream
) -> None:
    service = start(UPSTREAM_URL=upstream.url)
    with service.client() as client:
        client.send(b"POST /up HTTP/1.1\r\nHost: a.example\r\nContent-Length: 10\r\n\r\n01234")
        # An answer on another connection: by now the service has read the bytes above.
        assert service.call("GET", "/health/live").status == 200
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: refuses(service.port), 5, "new connections to be refused")
        client.send(b"56789")
        reply = client.reply()
        assert (reply.status, reply.body) == (200, b"ok"), reply
    assert upstream.seen[-1].body == b"0123456789"
    assert service.process.wait(10) == 0


def test_a_refusal_is_read_also_while_the_service_stops(start: Start, held: HeldUpstream) -> None:
    """The rest of the refused body is read meanwhile: a reset would destroy the answer."""
    service = start(UPSTREAM_URL=held.url, MAX_BODY_BYTES=1000)
    with under_way(service, held, ["/plain"]) as [other], service.client() as client:
        client.send(b"POST /up HTTP/1.1\r\nHost: a.example\r\nContent-Length: 400000\r\n")
        assert service.call("GET", "/health/live").status == 200  # the service has read those
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: refuses(service.port), 5, "new connections to be refused")
        client.send(b"\r\n")
        for _ in range(40):
            client.send(b"x" * 10_000)
            threading.Event().wait(0.02)
        assert client.reply().status == 413
        held.release.set()
        assert other.reply().status == 200
    assert service.process.wait(10) == 0


def test_a_write_under_way_is_answered(start: Start, databases: Databases, database: str) -> None:
    service = start(POSTGRES_URI=database)
    body = {"email": f"{uuid.uuid4().hex}@example.com", "name": "before"}
    target = f"/users/{service.call('POST', '/users', body).json()['id']}"
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with databases.admin(database) as cursor, ThreadPoolExecutor(1) as thread:
        cursor.execute("BEGIN; SELECT FROM users FOR UPDATE")
        patched = thread.submit(service.call, "PATCH", target, {"name": "after"})

        def blocked() -> bool:
            with databases.admin(database) as other:
                other.execute(waiting)
                return bool(other.fetchone()[0])

        wait_for(blocked, 5, "the write to wait for the lock")
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: refuses(service.port), 5, "new connections to be refused")
        cursor.execute("COMMIT")
        reply = patched.result()
        assert reply.status == 200 and reply.json()["name"] == "after", reply
        assert service.process.wait(10) == 0
        cursor.execute("SELECT name FROM users WHERE email = %s", (body["email"],))
        assert cursor.fetchone() == ("after",)


@both_signals
@one_or_two_workers
def test_a_signal_that_reaches_every_process_at_once_is_one_signal(
    start: Start, held: HeldUpstream, how: signal.Signals, workers: int
) -> None:
    """Ctrl-C in a terminal goes to the whole process group, the workers included, and so does what
    a process manager sends. From their supervisor the workers then hear of it once more."""
    service = start(UPSTREAM_URL=held.url, WORKERS=workers)
    with under_way(service, held, ["/plain", "/stream"] * 2) as clients:
        for process in [psutil.Process(service.process.pid), *workers_of(service)]:
            process.send_signal(how)
        wait_for(lambda: refuses(service.port), 5, "new connections to be refused")
        held.release.set()
        for client in clients:
            reply = client.reply()
            assert (reply.body, reply.complete) == (b"firstsecond", True), reply
    assert service.process.wait(10) == 0


@one_or_two_workers
def test_a_stream_that_never_ends_is_cut_at_the_shutdown_timeout(
    start: Start, held: HeldUpstream, workers: int
) -> None:
    service = start(UPSTREAM_URL=held.url, WORKERS=workers, SHUTDOWN_TIMEOUT=1)
    with under_way(service, held, ["/endless", "/plain"]) as (stream, plain):
        began = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        reply = stream.reply()
        seconds = time.monotonic() - began
        # Cut means without a valid end of message: nothing truncated looks whole.
        assert reply.body.startswith(b"first") and not reply.complete
        assert 0.9 < seconds < 1 + 2
        with pytest.raises((EOFError, ConnectionError)):
            plain.reply()
    assert service.process.wait(5) == 0
    cut = re.findall(r"(1 request|2 requests) cut: SHUTDOWN_TIMEOUT is over", service.log)
    assert sum(int(number.split()[0]) for number in cut) == 2


@both_signals
@one_or_two_workers
def test_a_second_signal_stops_at_once(
    start: Start, held: HeldUpstream, how: signal.Signals, workers: int
) -> None:
    service = start(UPSTREAM_URL=held.url, WORKERS=workers)
    children = workers_of(service)
    with under_way(service, held, ["/plain", "/endless"]):
        service.process.send_signal(how)
        wait_for(lambda: refuses(service.port), 5, "the first signal to be noticed")
        assert service.process.poll() is None
        service.process.send_signal(how)
        service.process.wait(3)
    wait_for(lambda: not any(map(alive, children)), 5, "the workers' end")


def test_a_database_that_never_answers_does_not_hold_up_the_end(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/none"
        service = start(POSTGRES_URI=uri)
        with ThreadPoolExecutor(1) as thread:
            reply = thread.submit(service.call, "GET", "/users")
            connection, _ = silent.accept()
            began = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            assert reply.result().status == 503
            assert service.process.wait(20) == 0
            # DB_CONNECT_TIMEOUT is 2 s.
            assert time.monotonic() - began < 2 + 2
            connection.close()


def test_the_pools_are_closed_at_the_end(
    start: Start, databases: Databases, database: str, upstream: ScriptedUpstream
) -> None:
    """The server would else log a lost connection for each; the upstream sees an orderly close."""
    service = start(POSTGRES_URI=database, UPSTREAM_URL=upstream.url)
    assert service.call("GET", "/users").status == 200
    assert service.call("GET", "/plain").status == 200
    assert service.stop() == 0
    with databases.admin(database) as cursor:

        def connections() -> int:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            )
            return int(cursor.fetchone()[0])

        wait_for(lambda: connections() == 1, 5, "the connections to be gone")


def test_a_killed_worker_is_replaced(start: Start, upstream: ScriptedUpstream) -> None:
    service = start(UPSTREAM_URL=upstream.url, WORKERS=2)
    for _ in range(2):
        before = workers_of(service)
        assert len(before) == 2
        before[0].kill()

        def replaced(killed: int = before[0].pid) -> bool:
            # Looked at twice, the one that is just ending could count once, and then not.
            found = [worker.pid for worker in workers_of(service)]
            return len(found) == 2 and killed not in found

        wait_for(replaced, 10, "another worker")
        assert service.process.poll() is None
        for _ in range(20):
            assert service.call("GET", "/plain").status == 200
    assert service.stop() == 0


def test_a_worker_that_dies_while_the_service_stops_is_told(
    start: Start, held: HeldUpstream, database: str
) -> None:
    """Its requests were lost without a line, and the exit code said that all was well."""
    service = start(POSTGRES_URI=database, UPSTREAM_URL=held.url, WORKERS=2)
    with under_way(service, held, [f"/{number}" for number in range(8)]):
        service.process.terminate()
        wait_for(lambda: refuses(service.port), 10, "the drain")
        for worker in workers_of(service):
            worker.kill()
        assert service.process.wait(10) == 1
    assert service.log.count("ended (signal 9)") == 2


def test_a_worker_that_does_not_end_is_killed_and_told(start: Start) -> None:
    service = start(WORKERS=2, SHUTDOWN_TIMEOUT=1)
    workers_of(service)[0].suspend()
    service.process.terminate()
    assert service.process.wait(10) == 1
    assert service.log.count("does not end: it is killed") == 1


@pytest.mark.parametrize("delay", [0, 2])
def test_workers_that_died_just_before_a_stop_delay_nobody(start: Start, delay: int) -> None:
    """Their end was told together with the signal, and was not looked at: for the whole delay
    nobody answered, and without one the service waited for them until SHUTDOWN_TIMEOUT."""
    service = start(WORKERS=2, DRAIN_DELAY=delay, SHUTDOWN_TIMEOUT=20)
    supervisor = psutil.Process(service.process.pid)
    supervisor.suspend()
    for worker in workers_of(service):
        worker.kill()
    service.process.terminate()
    supervisor.resume()
    if delay:
        assert service.call("GET", "/health/live").status == 200
    assert service.process.wait(10) == 0


def test_a_worker_that_dies_during_the_delay_is_replaced(
    start: Start, upstream: ScriptedUpstream
) -> None:
    service = start(UPSTREAM_URL=upstream.url, WORKERS=2, DRAIN_DELAY=4)
    service.process.terminate()
    wait_for(lambda: service.call("GET", "/health/ready").status == 503, 3, "the delay")
    for worker in workers_of(service):
        worker.kill()
    wait_for(lambda: service.call("GET", "/plain").status == 200, 3, "other workers")
    assert service.process.wait(10) == 0


def test_a_worker_that_is_told_to_stop_by_itself_stops_nobody_else(
    start: Start, held: HeldUpstream, database: str
) -> None:
    """The whole service said that it was stopping, for as long as that worker had work."""
    service = start(POSTGRES_URI=database, UPSTREAM_URL=held.url, WORKERS=2)
    with under_way(service, held, [f"/{number}" for number in range(8)]) as clients:
        workers = workers_of(service)
        workers[0].terminate()
        for _ in range(20):
            assert service.call("GET", "/health/ready").status == 200
            threading.Event().wait(0.02)
        assert alive(workers[0])  # Some of these requests are its own.
        held.release.set()
        assert [client.reply().status for client in clients] == [200] * 8
    wait_for(lambda: workers[0] not in workers_of(service), 10, "the worker's end")
    assert service.stop() == 0


def test_workers_end_when_their_supervisor_is_killed(
    start: Start, upstream: ScriptedUpstream
) -> None:
    service = start(UPSTREAM_URL=upstream.url, WORKERS=2)
    children = workers_of(service)
    service.process.kill()
    service.process.wait(5)
    wait_for(lambda: not any(map(alive, children)), 5, "the orphans to end")
    assert refuses(service.port)


@one_or_two_workers
def test_a_port_in_use_is_one_clear_line_and_no_success(workers: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environ = {
            "PATH": os.environ["PATH"],
            "POSTGRES_URI": DEAD_DATABASE,
            "UPSTREAM_URL": "http://127.0.0.1:1",
            "PORT": str(port),
            "WORKERS": str(workers),
        }
        done = subprocess.run(
            [sys.executable, "app.py"],
            cwd=checkout(),
            env=environ,
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert done.returncode not in (0, 2)
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == 1, lines
    assert str(port) in lines[0] and "in use" in lines[0]


@one_or_two_workers
def test_the_port_is_free_again_for_the_next_start(
    start: Start, upstream: ScriptedUpstream, workers: int
) -> None:
    port = free_port()
    for _ in range(2):
        service = start(UPSTREAM_URL=upstream.url, WORKERS=workers, PORT=port)
        assert service.call("GET", "/plain").status == 200
        assert service.stop() == 0


@contextlib.contextmanager
def run_by_shell(before: str, **settings: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Gatehouse as the process that a shell has become, after `before`; killed at the end."""
    port = free_port()
    environ = {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"}
    process = subprocess.Popen(
        ["sh", "-c", f"{before} exec {sys.executable} app.py"],
        cwd=checkout(),
        env=environ | {"PATH": os.environ["PATH"], "PORT": str(port)} | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: not refuses(port), 20, "the service to listen")
        yield process, port
    finally:
        process.kill()
        process.wait()


def test_the_end_of_a_child_that_is_no_worker_is_no_matter() -> None:
    """The first process of a container inherits those whose parents end."""
    with run_by_shell("sleep 2 &", WORKERS="2") as (process, port):
        (stranger,) = (
            child for child in psutil.Process(process.pid).children() if child.name() == "sleep"
        )
        wait_for(lambda: not alive(stranger), 10, "the child to end")
        assert call(port, "GET", "/health/live").status == 200
        process.terminate()
        assert process.wait(20) == 0


def test_it_stops_in_time_with_more_clients_than_descriptors() -> None:
    with (
        run_by_shell("ulimit -n 128;", SHUTDOWN_TIMEOUT="2") as (process, port),
        contextlib.ExitStack() as stack,
    ):
        for _ in range(140):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        process.terminate()
        assert process.wait(10) == 0


def test_a_worker_that_is_stopped_delays_the_other_s_clients_no_longer_than_a_moment(
    start: Start, upstream: ScriptedUpstream
) -> None:
    service = start(UPSTREAM_URL=upstream.url, WORKERS=2)
    ask = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for number in range(12):
            if number == 6:  # and has fewer clients than the other from then on
                worker = workers_of(service)[0]
                worker.suspend()
            client = stack.enter_context(service.client())
            client.send(ask)
            assert client.reply().status == 200
        began = time.monotonic()
        for _ in range(200):
            with service.client() as one:
                one.send(ask)
                assert one.reply().status == 200
        assert time.monotonic() - began < 3  # 25 ms for each would be 5
        worker.resume()
