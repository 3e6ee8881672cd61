"""Connections to the upstream: how they are made, tried again, kept and given up."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness import (
    DEAD_DATABASE,
    RawClient,
    ScriptedUpstream,
    Seen,
    Service,
    call,
    chunked,
    free_port,
    message,
    ok,
    problem,
    request,
    unshared,
    wait_for,
)

Start = Callable[..., Service]

OK = b"HTTP/1.1 200 OK"


@pytest.fixture(scope="module")
def database() -> str:
    """No database: no proxied request may depend on one."""
    return DEAD_DATABASE


@pytest.fixture
def fresh() -> Iterator[ScriptedUpstream]:
    """An upstream of the test's own, whose first connection is number 0."""
    server = ScriptedUpstream()
    yield server
    server.close()


def in_flight(service: Service) -> int:
    return int(service.call("GET", "/health").json()["upstream"]["in_flight"])


def connections(service: Service, port: int) -> list[str]:
    """The states of the service's connections to a port, as the kernel has them."""
    found = psutil.Process(service.process.pid).net_connections("tcp")
    return [str(one.status) for one in found if one.raddr and one.raddr.port == port]


class Together:
    """Answers `count` requests when all of them are here, so that each has its own connection."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, action=self._note)
        self.answered = 0.0  # the moment, on the monotonic clock

    def _note(self) -> None:
        self.answered = time.monotonic()

    def __call__(self, sock: socket.socket, seen: Seen) -> None:
        self.barrier.wait(10)
        ok(sock, seen)


def open_connections(service: Service, upstream: ScriptedUpstream, count: int) -> float:
    """Have the service make and keep so many connections to its upstream. Returns the moment at which
    they were answered: they are idle from then on."""
    together = Together(count)
    upstream.script(together)
    with ThreadPoolExecutor(count) as threads:
        replies = threads.map(lambda _: service.call("GET", "/").status, range(count))
        assert list(replies) == [200] * count
    assert connections(service, upstream.port) == [psutil.CONN_ESTABLISHED] * count
    return together.answered


# Kept connections.


def test_an_idle_connection_is_closed_after_the_keepalive_timeout(
    start: Start, fresh: ScriptedUpstream
) -> None:
    """A firewall between may have forgotten it by then, and what is sent on it is lost."""
    service = start(UPSTREAM_URL=fresh.url, UPSTREAM_KEEPALIVE_TIMEOUT=1, WORKERS=1)
    idle = open_connections(service, fresh, 3)
    wait_for(lambda: not fresh.open, 5, "the connections to be closed")
    assert 0.8 < time.monotonic() - idle < 3
    assert connections(service, fresh.port) == []
    fresh.script(ok)
    assert service.call("GET", "/").body == b"ok"
    assert [seen.connection for seen in fresh.seen] == [3]


def test_no_connection_is_kept_for_no_time(start: Start, fresh: ScriptedUpstream) -> None:
    """Requests that had come together were sent on one."""
    service = start(UPSTREAM_URL=fresh.url, UPSTREAM_KEEPALIVE_TIMEOUT=0, WORKERS=1)
    fresh.script(ok)
    with service.client() as client:
        client.send(3 * request(b"GET /a HTTP/1.1"))
        assert [client.reply().body for _ in range(3)] == [b"ok"] * 3
    assert [seen.connection for seen in fresh.seen] == [0, 1, 2]


def test_a_connection_that_is_used_is_not_idle(start: Start, fresh: ScriptedUpstream) -> None:
    service = start(UPSTREAM_URL=fresh.url, UPSTREAM_KEEPALIVE_TIMEOUT=1, WORKERS=1)
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        assert service.call("GET", "/").body == b"ok"
        threading.Event().wait(0.2)
    assert {seen.connection for seen in fresh.seen} == {0}


class Alone(BaseHTTPRequestHandler):
    """Python's own server reads from one connection until that is closed, and accepts no other."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("workers", [1, 2])
def test_an_upstream_that_serves_one_connection_at_a_time_does_not_wait_for_idle_ones(
    start: Start, workers: int
) -> None:
    """It waited for UPSTREAM_KEEPALIVE_TIMEOUT, while requests waited on other connections."""
    with HTTPServer(("127.0.0.1", 0), Alone) as server, ThreadPoolExecutor(9) as threads:
        serving = threads.submit(server.serve_forever)
        try:
            service = start(UPSTREAM_URL=f"http://127.0.0.1:{server.server_port}", WORKERS=workers)
            for _ in range(2):
                replies = threads.map(lambda _: service.call("GET", "/").body, range(7))
                assert list(replies) == [b"ok"] * 7
            # Also while another client asks again and again.
            over = threading.Event()

            def poll() -> None:
                with service.client() as client:
                    while not over.wait(0.05):
                        client.send(request(b"GET / HTTP/1.1"))
                        assert client.reply().body == b"ok"

            polling = threads.submit(poll)
            try:
                replies = threads.map(lambda _: service.call("GET", "/").body, range(3))
                assert list(replies) == [b"ok"] * 3
            finally:
                over.set()
                polling.result()
        finally:
            service.stop()  # Otherwise the server might wait for one of its connections.
            server.shutdown()
            serving.result()


def test_an_upstream_that_keeps_connections_for_a_moment_only_loses_few_posts(
    start: Start, fresh: ScriptedUpstream
) -> None:
    """Of those that came while it was about to close one, each was 502: every second one here."""

    def answer_and_close_soon(sock: socket.socket, seen: Seen) -> bool:
        ok(sock, seen)
        threading.Event().wait(0.1)
        return False

    fresh.answer = answer_and_close_soon
    service = start(UPSTREAM_URL=fresh.url)
    statuses = []
    for _ in range(20):
        statuses.append(service.call("POST", "/", b"{}").status)
        threading.Event().wait(0.05)
    assert set(statuses) <= {200, 502} and statuses.count(502) <= 2, statuses


def test_connections_that_the_upstream_closes_are_closed_at_once(
    start: Start, fresh: ScriptedUpstream
) -> None:
    """20 of them stood in CLOSE-WAIT until somebody would have been sent on one."""
    service = start(UPSTREAM_URL=fresh.url, WORKERS=1)
    open_connections(service, fresh, 20)
    for sock in list(fresh.open):
        sock.shutdown(socket.SHUT_WR)
    wait_for(lambda: connections(service, fresh.port) == [], 1, "the connections to be closed")


def test_a_connection_on_which_something_comes_unasked_is_closed_at_once(
    start: Start, fresh: ScriptedUpstream
) -> None:
    """It would be the next caller's answer."""
    service = start(UPSTREAM_URL=fresh.url, WORKERS=1)
    open_connections(service, fresh, 3)
    for sock in list(fresh.open):
        with contextlib.suppress(OSError):
            sock.sendall(message(OK, b"Content-Length: 6", body=b"stray!"))
    wait_for(lambda: connections(service, fresh.port) == [], 1, "the connections to be closed")
    fresh.script(ok)
    assert service.call("GET", "/").body == b"ok"


# An upstream that restarts.


@contextlib.contextmanager
def listening(port: int) -> Iterator[list[bytes]]:
    """An application that has just started: the bodies that it got, one a request."""
    listener = socket.create_server(("127.0.0.1", port), backlog=512)
    got: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            buffer = b""
            while b"\r\n\r\n" not in buffer:
                buffer += sock.recv(65536)
            head, _, body = buffer.partition(b"\r\n\r\n")
            if b"Transfer-Encoding: chunked" in head:
                while not body.endswith(b"\r\n0\r\n\r\n"):
                    body += sock.recv(1 << 20)
            length = head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
            while length and len(body) < int(length):
                body += sock.recv(1 << 20)
            got.append(body)
            sock.sendall(message(OK, b"Connection: close", b"Content-Length: 2", body=b"up"))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield got
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


BODIES = {
    "none": request(b"GET /a HTTP/1.1"),
    "small": request(b"POST /a HTTP/1.1", b"Content-Length: 2", body=b"hi"),
    "small chunks": request(
        b"PATCH /a HTTP/1.1", b"Transfer-Encoding: chunked", body=chunked(b"hi")
    ),
    "large": request(b"PUT /a HTTP/1.1", b"Content-Length: 2000000", body=bytes(2_000_000)),
    "large chunks": request(
        b"CUSTOM /a HTTP/1.1", b"Transfer-Encoding: chunked", body=chunked(*[bytes(50_000)] * 40)
    ),
}


@pytest.mark.parametrize("body", BODIES)
def test_a_refused_connection_is_tried_again_while_the_application_restarts(
    start: Start, body: str
) -> None:
    """Whatever the method: nothing of the request has been with anybody."""
    port = free_port()
    service = start(UPSTREAM_URL=f"http://127.0.0.1:{port}", UPSTREAM_RETRY=10)
    with service.client(timeout=20) as client, ThreadPoolExecutor(1) as thread:
        sending = thread.submit(client.send, BODIES[body])
        client.sock.settimeout(0.8)
        with pytest.raises(TimeoutError):
            client.head()
        client.sock.settimeout(20)
        with listening(port) as got:
            began = time.monotonic()
            assert client.reply().body == b"up"
            # It is tried every quarter of a second.
            assert time.monotonic() - began < 1.5
            sending.result()
    [arrived] = got
    assert arrived.count(b"\0") == (2_000_000 if "large" in body else 0)
    assert (b"hi" in arrived) == ("small" in body)


def test_a_connection_is_tried_again_for_no_longer_than_the_setting_says(start: Start) -> None:
    service = start(UPSTREAM_URL=f"http://127.0.0.1:{free_port()}", UPSTREAM_RETRY=1)
    began = time.monotonic()
    problem(service.call("GET", "/a"), 502, "upstream-unreachable")
    assert 1 <= time.monotonic() - began < 2.5


def test_a_connection_is_tried_again_also_after_a_tenth_of_a_second(start: Start) -> None:
    service = start(UPSTREAM_URL=f"http://127.0.0.1:{free_port()}", UPSTREAM_RETRY=0.1)
    began = time.monotonic()
    problem(service.call("GET", "/a"), 502, "upstream-unreachable")
    assert time.monotonic() - began >= 0.1


def test_those_that_wait_for_the_application_hold_no_thread(start: Start) -> None:
    port = free_port()
    service = start(UPSTREAM_URL=f"http://127.0.0.1:{port}", UPSTREAM_RETRY=20, WORKERS=1)
    count = 300
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.client(timeout=30)) for _ in range(count)]
        for client in clients:
            client.send(request(b"POST /a HTTP/1.1", b"Content-Length: 2", body=b"hi"))
        wait_for(lambda: in_flight(service) == count, 10, "all of them to wait")
        assert psutil.Process(service.process.pid).num_threads() < count / 3
        began = time.monotonic()
        for _ in range(10):
            assert service.call("GET", "/health/live").status == 200
        assert time.monotonic() - began < 2
        with listening(port) as got:
            assert {client.reply().body for client in clients} == {b"up"}
        assert got == [b"hi"] * count


# Leaving, and time, while a connection is being made.


@contextlib.contextmanager
def mute_port() -> Iterator[int]:
    """A port that takes no connection and refuses none: its queue is full, as a dead host's."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as s:
        for _ in range(4):
            sock = s.enter_context(socket.socket())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(listener.getsockname())
        yield int(listener.getsockname()[1])


def towards(service: Service, port: int) -> list[str]:
    """The states of the service's connections to this port."""
    connections = psutil.Process(service.process.pid).net_connections("tcp")
    return [one.status for one in connections if one.raddr and one.raddr.port == port]


def leave(client: RawClient, how: str) -> None:
    if how == "half-close":
        client.sock.shutdown(socket.SHUT_WR)
        return
    if how == "reset":
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.sock.close()


LEAVERS = {
    "no body": request(b"GET /a HTTP/1.1"),
    "a body": request(b"POST /a HTTP/1.1", b"Content-Length: 2", body=b"hi"),
    # The end of a connection arrives after all bytes before it. What is not read here (more than
    # GATHERED_BYTES) must fit into the kernel's smallest window of 64 KiB, or the end does not come.
    "some of a large body": request(
        b"PUT /a HTTP/1.1", b"Content-Length: 1000000", body=bytes(100_000)
    ),
    "more requests": request(b"GET /a HTTP/1.1") * 3,
}


@pytest.mark.parametrize("leaving", ["close", "reset", "half-close"])
@pytest.mark.parametrize("retried", [False, True])
def test_a_client_that_leaves_while_its_connection_is_made_frees_its_place(
    start: Start, leaving: str, retried: bool
) -> None:
    """It was held until the time for connecting was over."""
    with mute_port() as port:
        service = start(
            UPSTREAM_URL=f"http://127.0.0.1:{free_port() if retried else port}",
            UPSTREAM_CONNECT_TIMEOUT=30,
            UPSTREAM_RETRY=30,
            WORKERS=1,
        )
        for data in LEAVERS.values():
            with service.client() as client:
                client.send(data)
                wait_for(lambda: in_flight(service) == 1, 5, "the request to be under way")
                leave(client, leaving)
                wait_for(lambda: in_flight(service) == 0, 1, "its place")
                wait_for(lambda: not towards(service, port), 1, "its connection")
        assert "Traceback" not in service.log


def test_a_client_that_leaves_during_a_tls_handshake_frees_its_connection(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        service = start(
            UPSTREAM_URL=f"https://127.0.0.1:{port}", UPSTREAM_CONNECT_TIMEOUT=30, WORKERS=1
        )
        with service.client() as client:
            client.send(request(b"GET /a HTTP/1.1"))
            made, _ = listener.accept()
            with made:
                made.settimeout(5)
                assert made.recv(4096)  # the first message of the handshake, which gets no answer
                leave(client, "close")
                left = time.monotonic()
                assert made.recv(4096) == b""
                assert time.monotonic() - left < 1
        wait_for(lambda: in_flight(service) == 0, 1, "its place")
        assert "Traceback" not in service.log


# The name of the upstream.


class NameServer:
    """A name server on 127.0.0.1 for one name, which can be made mute."""

    def __init__(self) -> None:
        self.mute = False
        self.asked = 0
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                query, address = self.sock.recvfrom(4096)
                self.asked += 1
                if not self.mute:
                    self.sock.sendto(self._answer(query), address)

    @staticmethod
    def _answer(query: bytes) -> bytes:
        """127.0.0.1, where an IPv4 address is asked for (RFC 1035 section 4)."""
        end = query.index(b"\0", 12) + 5
        has = query[end - 4 : end - 2] == b"\0\1"
        header = query[:2] + struct.pack("!5H", 0x8180, 1, has, 0, 0)
        record = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 0, 4) + bytes((127, 0, 0, 1))
        return header + query[12:end] + (record if has else b"")


@pytest.fixture
def name_server() -> Iterator[NameServer]:
    server = NameServer()
    yield server
    server.sock.close()


def test_a_mute_name_server_is_504_in_time_and_disturbs_nobody_else(
    start: Start, fresh: ScriptedUpstream, name_server: NameServer, tmp_path: Path
) -> None:
    """One look-up took 28 seconds, and 24 of them were all that could wait."""
    # The resolver waits for longer than Gatehouse does, as by default.
    options = "options timeout:10 attempts:1"
    (tmp_path / "resolv.conf").write_text(f"nameserver 127.0.0.1\n{options}\n")
    mount = f"mount --bind {tmp_path / 'resolv.conf'} /etc/resolv.conf"
    service = start(
        within=[*unshared("mount"), "sh", "-c", f'{mount} && exec "$0" "$@"'],
        UPSTREAM_URL=f"http://upstream.example:{fresh.port}",
        UPSTREAM_CONNECT_TIMEOUT=3,
        WORKERS=1,
    )
    go_on = threading.Semaphore(0)

    def answer(sock: socket.socket, seen: Seen) -> None:
        if seen.target != b"/events":
            return ok(sock, seen)
        sock.sendall(message(OK, b"Content-Type: text/event-stream", b"Content-Length: 30"))
        for _ in range(3):
            assert go_on.acquire(timeout=20)
            sock.sendall(b"data: abc\n")
        return None

    fresh.script(answer)
    with service.client() as stream, service.client() as other:
        stream.send(request(b"GET /events HTTP/1.1"))
        stream.head()
        other.send(request(b"GET /kept HTTP/1.1"))
        assert other.reply().body == b"ok"
        assert name_server.asked
        name_server.mute = True
        # One that may not be sent twice takes no connection that has been idle for over a second.
        threading.Event().wait(1.2)
        count = 100
        with ThreadPoolExecutor(count) as threads:
            began = time.monotonic()

            def post(_: int) -> float:
                reply = call(service.port, "POST", "/new", b"x")
                problem(reply, 504, "upstream-timeout")
                return time.monotonic() - began

            waiting = [threads.submit(post, number) for number in range(count)]
            wait_for(lambda: in_flight(service) == count + 1, 5, "all of them to wait")
            for _ in range(3):
                go_on.release()
                while b"data: abc\n" not in stream.buffer:
                    stream.buffer += stream.sock.recv(65536)
                stream.buffer = b""
                other.send(request(b"GET /kept HTTP/1.1"))
                assert other.reply().body == b"ok"
            assert time.monotonic() - began < 2.7, "not before they were told"
            seconds = [one.result() for one in waiting]
        assert min(seconds) > 2.7
        assert max(seconds) < 5
        name_server.mute = False
        wait_for(lambda: service.call("POST", "/new", b"x").status == 200, 10, "its recovery")
    assert {seen.connection for seen in fresh.seen if seen.target == b"/kept"} <= {0, 1}


# The limit.


def test_the_limit_is_told_and_what_it_refuses_is_said_once_in_a_while(
    start: Start, fresh: ScriptedUpstream
) -> None:
    service = start(UPSTREAM_URL=fresh.url, UPSTREAM_MAX_IN_FLIGHT=2, WORKERS=1)
    part = service.call("GET", "/health").json()["upstream"]
    assert part == {"status": "unknown", "in_flight": 0, "streams": 0, "limit": 2}
    release = threading.Event()

    def hold(sock: socket.socket, seen: Seen) -> None:
        release.wait(20)
        ok(sock, seen)

    fresh.script(hold)
    with service.client() as one, service.client() as two:
        for client in (one, two):
            client.send(request(b"GET /held HTTP/1.1"))
        wait_for(lambda: in_flight(service) == 2)
        assert "limit" not in service.log
        for _ in range(50):
            problem(service.call("GET", "/more"), 503, "upstream-busy")
        lines = [line for line in service.log.splitlines() if "limit" in line]
        assert len(lines) == 1
        assert "2 requests are with the upstream" in lines[0]
        release.set()
        assert one.reply().body == two.reply().body == b"ok"


def test_the_limit_of_all_workers_is_told_together(start: Start, fresh: ScriptedUpstream) -> None:
    service = start(UPSTREAM_URL=fresh.url, UPSTREAM_MAX_IN_FLIGHT=7, WORKERS=2)
    wait_for(lambda: service.call("GET", "/health").json()["upstream"]["limit"] == 14)
