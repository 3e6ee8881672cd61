"""Connections: reuse, resending, the cap, clients that leave or do not read, and memory."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.harness import (
    DEAD_DATABASE,
    Answer,
    RawClient,
    ScriptedUpstream,
    Seen,
    Service,
    chunked,
    message,
    ok,
    problem,
    request,
    wait_for,
)
from tests.harness.upstream import read_chunks

OK = b"HTTP/1.1 200 OK"
CHUNKED = b"Transfer-Encoding: chunked"
IDEMPOTENT = ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "PROPFIND", "REPORT", "SEARCH"]
# A small cap, and in one worker: the cap, like a pool of connections, is a worker's own.
CAP = 3
# So many bytes of a body are gathered before the upstream is asked, and kept until it answers.
GATHERED = 65536


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


@pytest.fixture(scope="module")
def capped(upstream: ScriptedUpstream) -> Iterator[Service]:
    settings = {"WORKERS": 1, "THREADS": 6, "UPSTREAM_MAX_IN_FLIGHT": CAP}
    with Service(UPSTREAM_URL=upstream.url, **settings) as running:
        yield running


def in_flight(service: Service) -> int:
    return int(service.call("GET", "/health").json()["upstream"]["in_flight"])


REUSABLE = {
    "a length": ("GET", message(OK, b"Content-Length: 2", body=b"ok")),
    "a length of 0": ("POST", message(OK, b"Content-Length: 0")),
    "chunks": ("GET", message(OK, CHUNKED, body=chunked(b"o", b"k"))),
    "chunks and trailers": (
        "GET",
        message(OK, CHUNKED, body=chunked(b"ok", trailer=b"X-A: 1\r\n")),
    ),
    "HEAD": ("HEAD", message(OK)),
    "HEAD with a length of 0": ("HEAD", message(OK, b"Content-Length: 0")),
    "a 204": ("DELETE", message(b"HTTP/1.1 204 No Content")),
    "a 204 with a length of 0": ("PUT", message(b"HTTP/1.1 204 No Content", b"Content-Length: 0")),
    "a 304": ("GET", message(b"HTTP/1.1 304 Not Modified")),
    "an interim answer before": (
        "GET",
        message(b"HTTP/1.1 103 Early Hints") + message(OK, b"Content-Length: 0"),
    ),
    "an error": ("GET", message(b"HTTP/1.1 500 Oops", b"Content-Length: 0")),
    "a Connection line of names": (
        "GET",
        message(OK, b"Connection: X-Hop", b"X-Hop: 1", b"Content-Length: 0"),
    ),
}


@pytest.mark.parametrize("name", REUSABLE)
def test_an_upstream_connection_is_used_again(
    service: Service, upstream: ScriptedUpstream, name: str
) -> None:
    method, answer = REUSABLE[name]
    upstream.script(answer)
    # On one client connection: another might be another worker's, with a pool of its own.
    with service.client() as client:
        for _ in range(5):
            client.send(request(f"{method} / HTTP/1.1".encode()))
            client.reply(method)
    assert len({seen.connection for seen in upstream.seen}) == 1


CLOSING = {
    "Connection: close": message(OK, b"Connection: close", b"Content-Length: 2", body=b"ok"),
    "Connection: X-Hop, Close": message(
        OK, b"Connection: X-Hop, Close", b"Content-Length: 2", body=b"ok"
    ),
    "close on a second line": message(
        OK, b"Connection: X-Hop", b"Connection: close", CHUNKED, body=chunked(b"ok")
    ),
    "HTTP/1.0": message(b"HTTP/1.0 200 OK", b"Content-Length: 2", body=b"ok"),
}


@pytest.mark.parametrize("name", CLOSING)
def test_a_connection_that_the_upstream_gives_up_is_not_used_again(
    service: Service, upstream: ScriptedUpstream, name: str
) -> None:
    # The upstream announces it but leaves the connection open: only the announcement tells.
    upstream.script(CLOSING[name])
    with service.client() as client:
        for _ in range(3):
            client.send(request(b"POST / HTTP/1.1", b"Content-Length: 0"))
            assert client.reply().body == b"ok"
    assert len({seen.connection for seen in upstream.seen}) == 3


@pytest.mark.parametrize("announced", [b"Content-Length: 5", CHUNKED])
@pytest.mark.parametrize(
    ("method", "status"), [("HEAD", b"200 OK"), ("GET", b"204 None"), ("GET", b"304 Same")]
)
def test_a_body_that_may_not_be_there_is_never_the_next_caller_s_answer(
    service: Service, upstream: ScriptedUpstream, method: str, status: bytes, announced: bytes
) -> None:
    """Some send it all the same, and perhaps not at once."""
    upstream.script(message(b"HTTP/1.1 " + status, announced))
    with service.client() as client:
        for _ in range(3):
            client.send(request(f"{method} / HTTP/1.1".encode()))
            assert client.reply(method).status == int(status[:3])
    assert len({seen.connection for seen in upstream.seen}) == 3


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_connection_that_was_closed_while_idle_is_replaced(
    start: Callable[..., Service], fresh: ScriptedUpstream, method: str
) -> None:
    service = start(UPSTREAM_URL=fresh.url)

    def answer(sock: socket.socket, seen: Seen) -> bool:
        ok(sock, seen)
        sock.shutdown(socket.SHUT_RDWR)
        return False

    fresh.script(answer)
    with service.client() as client:
        for _ in range(5):
            client.send(request(f"{method} / HTTP/1.1".encode(), b"Content-Length: 0"))
            assert client.reply().status == 200
            wait_for(lambda: not fresh.open)
    assert len(fresh.seen) == 5


class FailsWhenReused:
    """Answers the first request on its first connection, then sends `part` and closes it.

    Requests on later connections are answered if `recovers`, else treated the same.
    """

    def __init__(self, part: bytes = b"", recovers: bool = True) -> None:
        self.part = part
        self.recovers = recovers
        self.first: int | None = None

    def __call__(self, sock: socket.socket, seen: Seen) -> bool:
        if self.first is None or (self.recovers and seen.connection != self.first):
            if self.first is None:
                self.first = seen.connection
            ok(sock, Seen(seen.head, b"", 0)) if seen.method != "HEAD" else sock.sendall(
                message(OK)
            )
            return True
        sock.sendall(self.part)
        return False


def failing_when_reused(
    service: Service, upstream: ScriptedUpstream, answer: Answer, data: bytes
) -> tuple[RawClient, list[Seen]]:
    """Send a first request that leaves a connection to reuse, then `data`."""
    upstream.script(answer)
    client = service.client()
    client.send(request(b"GET /first HTTP/1.1"))
    assert client.reply().body == b"ok"
    client.send(data)
    return client, upstream.seen


@pytest.mark.parametrize("method", IDEMPOTENT)
def test_an_idempotent_request_is_sent_again_when_its_reused_connection_dies(
    start: Callable[..., Service], fresh: ScriptedUpstream, method: str
) -> None:
    service = start(UPSTREAM_URL=fresh.url)
    body = b"" if method == "TRACE" else bytes(range(256)) * (GATHERED // 256)
    data = request(f"{method} /a?b HTTP/1.1".encode(), b"Content-Length: %d" % len(body), body=body)
    client, seen = failing_when_reused(service, fresh, FailsWhenReused(), data)
    with client:
        assert client.reply(method).status == 200
    first, died, again = seen
    assert first.connection == died.connection != again.connection
    assert (died.head, died.body) == (again.head, again.body)
    assert again.body == body


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("dies", ["in the body", "after the body"])
def test_a_request_whose_body_is_not_here_any_more_is_never_sent_twice(
    start: Callable[..., Service], fresh: ScriptedUpstream, framing: str, dies: str
) -> None:
    service = start(UPSTREAM_URL=fresh.url)
    body = bytes(GATHERED + 1)
    head = b"Content-Length: %d" % len(body) if framing == "length" else CHUNKED
    fresh.script(FailsWhenReused())
    targets: list[bytes] = []

    def note(sock: socket.socket, seen: Seen) -> bool:
        targets.append(seen.target)
        return dies == "after the body" or seen.target == b"/first"

    fresh.early = note
    with service.client() as client:
        client.send(request(b"GET /first HTTP/1.1"))
        assert client.reply().body == b"ok"
        data = body if framing == "length" else chunked(body)
        client.send(request(b"PUT /a HTTP/1.1", head))
        client.send(data[:-1])
        wait_for(lambda: targets[1:])
        if dies == "after the body":
            client.send(data[-1:])
        problem(client.reply(), 502, "upstream-broken")
    assert targets == [b"/first", b"/a"]


@pytest.mark.parametrize("method", ["POST", "PATCH", "CUSTOM", "get"])
def test_any_other_request_is_never_sent_twice(
    start: Callable[..., Service], fresh: ScriptedUpstream, method: str
) -> None:
    service = start(UPSTREAM_URL=fresh.url)
    data = request(f"{method} /a HTTP/1.1".encode(), b"Content-Length: 1", body=b"x")
    client, seen = failing_when_reused(service, fresh, FailsWhenReused(), data)
    with client:
        problem(client.reply(), 502, "upstream-broken")
    assert [one.target for one in seen] == [b"/first", b"/a"]


@pytest.mark.parametrize(
    "part",
    [b"H", b"HTTP/1.1 2", message(b"HTTP/1.1 100 Continue"), b"\r\n", b"HTTP/1.1 200 OK\r\n"],
)
def test_nothing_is_sent_again_once_a_byte_of_an_answer_arrived(
    start: Callable[..., Service], fresh: ScriptedUpstream, part: bytes
) -> None:
    service = start(UPSTREAM_URL=fresh.url)
    data = request(b"GET /a HTTP/1.1")
    client, seen = failing_when_reused(service, fresh, FailsWhenReused(part), data)
    with client:
        problem(client.reply(), 502, "upstream-broken")
    assert [one.target for one in seen] == [b"/first", b"/a"]


def test_a_request_is_sent_again_only_once(
    start: Callable[..., Service], fresh: ScriptedUpstream
) -> None:
    service = start(UPSTREAM_URL=fresh.url)
    answer = FailsWhenReused(recovers=False)
    client, seen = failing_when_reused(service, fresh, answer, request(b"GET /a HTTP/1.1"))
    with client:
        problem(client.reply(), 502, "upstream-broken")
    assert [one.target for one in seen] == [b"/first", b"/a", b"/a"]


def test_nothing_is_sent_again_on_a_connection_that_was_new(
    start: Callable[..., Service], fresh: ScriptedUpstream
) -> None:
    service = start(UPSTREAM_URL=fresh.url)
    fresh.script(lambda sock, seen: False)
    problem(service.call("GET", "/a"), 502, "upstream-broken")
    assert len(fresh.seen) == 1


def test_a_request_sent_again_after_several_connections_died_at_once(
    start: Callable[..., Service], fresh: ScriptedUpstream
) -> None:
    service = start(UPSTREAM_URL=fresh.url, WORKERS=1)
    together = threading.Barrier(4)
    dead: set[int] = set()

    def answer(sock: socket.socket, seen: Seen) -> bool:
        if seen.target == b"/first":
            together.wait(10)
            dead.add(seen.connection)
        elif seen.connection in dead:
            return False
        ok(sock, seen)
        return True

    fresh.script(answer)
    clients = [service.client() for _ in range(4)]
    for client in clients:
        client.send(request(b"GET /first HTTP/1.1"))
    for client in clients:
        assert client.reply().status == 200
    # A restarted upstream: all that the pool holds is dead, and nobody may notice.
    for client in clients:
        client.send(request(b"GET /second HTTP/1.1"))
        assert client.reply().status == 200
        client.close()


class Held:
    """Answers that wait until the test lets them go."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.go_on = threading.Event()

    def __call__(self, sock: socket.socket, seen: Seen) -> None:
        self.arrived.release()
        self.go_on.wait(20)
        ok(sock, seen)


def test_past_the_cap_a_caller_is_told_at_once_and_owned_paths_go_on(
    capped: Service, upstream: ScriptedUpstream
) -> None:
    held = Held()
    upstream.script(held)
    clients = [capped.client() for _ in range(CAP)]
    for client in clients:
        client.send(request(b"GET /held HTTP/1.1"))
        assert held.arrived.acquire(timeout=10)
    began = time.monotonic()
    for _ in range(20):
        reply = capped.call("POST", "/more", b"x")
        problem(reply, 503, "upstream-busy")
        assert (reply.get("Retry-After") or "").isdigit()
        assert capped.call("GET", "/health/live").status == 200
    assert in_flight(capped) == CAP
    assert capped.call("GET", "/users").status == 503
    assert time.monotonic() - began < 10
    held.go_on.set()
    assert [client.reply().body for client in clients] == [b"ok"] * CAP
    assert len(upstream.seen) == CAP
    wait_for(lambda: in_flight(capped) == 0)
    assert capped.call("GET", "/after").body == b"ok"
    for client in clients:
        client.close()


def test_a_client_that_has_its_answer_may_ask_again_at_once(
    start: Callable[..., Service], upstream: ScriptedUpstream
) -> None:
    """Its place is free by then, or one caller alone would be one too many for a cap of one."""
    service = start(UPSTREAM_URL=upstream.url, WORKERS=1, UPSTREAM_MAX_IN_FLIGHT=1)
    with service.client() as client:
        for method, answer in (REUSABLE[name] for name in ("a length", "chunks", "a 204", "HEAD")):
            upstream.script(lambda sock, seen, answer=answer: sock.sendall(answer))
            for _ in range(250):
                client.send(request(b"%s / HTTP/1.1" % method.encode()))
                assert client.reply(method).status in (200, 204)


def test_clients_are_shared_out_so_that_every_worker_s_places_are_used(
    start: Callable[..., Service], upstream: ScriptedUpstream
) -> None:
    """Whichever worker wakes first could take all, and refuse what is over its own cap."""
    service = start(UPSTREAM_URL=upstream.url, WORKERS=2, THREADS=16, UPSTREAM_MAX_IN_FLIGHT=12)
    held = Held()
    upstream.script(held)
    clients = [service.client() for _ in range(16)]
    for client in clients:
        client.send(request(b"GET /held HTTP/1.1"))
    for _ in clients:
        assert held.arrived.acquire(timeout=10)
    held.go_on.set()
    for client in clients:
        assert client.reply().body == b"ok"
        client.close()


def test_by_default_proxied_requests_take_no_thread_of_owned_paths(
    start: Callable[..., Service], fresh: ScriptedUpstream
) -> None:
    service = start(UPSTREAM_URL=fresh.url, WORKERS=1, THREADS=1)
    held = Held()
    fresh.script(held)
    clients = [service.client() for _ in range(40)]
    for client in clients:
        client.send(request(b"GET /held HTTP/1.1"))
    for _ in range(10):
        assert service.call("GET", "/health/live").status == 200
        assert service.call("GET", "/users").status == 503
    held.go_on.set()
    assert {client.reply().status for client in clients} == {200}
    for client in clients:
        client.close()


def test_a_request_that_arrives_slowly_takes_no_place(
    capped: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    slow = [capped.client() for _ in range(CAP * 4)]
    for client in slow:
        client.send(request(b"POST /slow HTTP/1.1", b"Content-Length: 2", body=b"x"))
    assert capped.call("GET", "/a").body == b"ok"
    for client in slow:
        client.send(b"y")
        assert client.reply().body == b"ok"
        client.close()


class Watched:
    """Sends `start` of an answer, then waits for the proxy to close the connection."""

    def __init__(self, start: bytes) -> None:
        self.start = start
        self.waiting = threading.Event()
        self.closed = threading.Event()

    def __call__(self, sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(self.start)
        self.waiting.set()
        with contextlib.suppress(ConnectionError):
            sock.recv(1)
        self.closed.set()
        return False


STARTS = {
    "before the answer": b"",
    "in its head": b"HTTP/1.1 200 OK\r\nX-A",
    "in a body with a length": message(OK, b"Content-Length: 100", body=b"hello"),
    "in a chunked body": message(OK, CHUNKED, body=b"5\r\nhello\r\n"),
    "in a body until the end": message(OK, body=b"hello"),
}


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("leaving", ["close", "reset", "half-close"])
@pytest.mark.parametrize("when", STARTS)
def test_a_client_that_leaves_frees_its_upstream_connection(
    capped: Service, upstream: ScriptedUpstream, when: str, leaving: str, version: bytes
) -> None:
    """One in HTTP/1.0 that was reset kept its place for ever: an error while its answer was cut
    went before that."""
    watched = Watched(STARTS[when])
    upstream.script(watched)
    target = f"/{uuid.uuid4()}"
    with capped.client() as client:
        client.send(request(b"GET %s HTTP/%s" % (target.encode(), version)))
        assert watched.waiting.wait(10)
        if b"hello" in watched.start:
            while b"hello" not in client.buffer:
                client.buffer += client.sock.recv(65536)
        left = time.monotonic()
        if leaving == "half-close":
            client.sock.shutdown(socket.SHUT_WR)
        elif leaving == "reset":
            linger = (1).to_bytes(4, "little") + bytes(4)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.sock.close()
        else:
            client.sock.close()
        assert watched.closed.wait(10)
        # A second is what is promised; the rest is for a busy machine.
        assert time.monotonic() - left < 2
        if leaving == "half-close" and b"hello" in watched.start:
            # It may still read: what it has must not look whole, however it is framed.
            assert not client.reply().complete
    wait_for(lambda: in_flight(capped) == 0)
    wait_for(lambda: f'"target": "{target}"' in capped.log, what="the access log's line")
    assert "Traceback" not in capped.log


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_more_requests_behind_frees_the_connection(
    capped: Service, upstream: ScriptedUpstream, reset: bool
) -> None:
    """What it sent after the one under way is not read, and its end stands behind that."""
    arrived, closed = threading.Event(), threading.Event()

    def wait_for_the_end(sock: socket.socket, seen: Seen) -> bool:
        arrived.set()
        sock.settimeout(10)
        with contextlib.suppress(ConnectionError):
            sock.recv(1)
        closed.set()
        return False

    upstream.script(wait_for_the_end)
    with capped.client() as client:
        client.send(request(b"GET /a HTTP/1.1") * 4)
        assert arrived.wait(10)
        if reset:
            linger = struct.pack("ii", 1, 0)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    assert closed.wait(5)
    wait_for(lambda: in_flight(capped) == 0)


def test_a_client_that_leaves_while_its_request_is_forwarded_frees_the_connection(
    capped: Service, upstream: ScriptedUpstream
) -> None:
    reading = threading.Event()
    closed = threading.Event()

    def never_read(sock: socket.socket, seen: Seen) -> bool:
        reading.set()
        left.wait(10)
        with contextlib.suppress(OSError):
            while sock.recv(1 << 20):
                pass
        closed.set()
        return False

    left = threading.Event()
    upstream.script(b"")
    upstream.early = never_read
    body = b"x" * 30_000_000
    with capped.client() as client:
        client.send(request(b"POST /a HTTP/1.1", b"Content-Length: %d" % len(body), body=body))
        assert reading.wait(10)
    left.set()
    assert closed.wait(10)
    wait_for(lambda: in_flight(capped) == 0)


class Pour:
    """Answers of `total` bytes, with their length, but for `ok` to a target other than /big.

    `sent` is how many bytes of all of them a kernel has taken so far.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.sent = 0

    def __call__(self, sock: socket.socket, seen: Seen) -> None:
        if seen.target != b"/big":
            return ok(sock, seen)
        block = memoryview(bytes(1 << 20))
        sock.sendall(message(OK, b"Content-Length: %d" % self.total))
        left = self.total
        while left:
            size = sock.send(block[:left])
            left -= size
            self.sent += size
        return None

    def stuck(self) -> None:
        """Wait until something has been sent, and nothing more is taken of it."""
        before = 0
        while not before or before < self.sent:
            before = self.sent
            threading.Event().wait(0.3)


def status_of(client: RawClient) -> int:
    """The status of the next answer, which stays to be read."""
    head = client.head()
    client.buffer = head + b"\r\n\r\n" + client.buffer
    return int(head.split(b" ")[1])


def test_clients_that_do_not_read_keep_their_places_until_their_last_byte(
    start: Callable[..., Service], fresh: ScriptedUpstream
) -> None:
    """60 of them made 60 connections to an upstream that was to have two requests at most."""
    pour = Pour(64 << 20)
    fresh.script(pour)
    service = start(UPSTREAM_URL=fresh.url, WORKERS=1, UPSTREAM_MAX_IN_FLIGHT=2)
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(service.client()) for _ in range(60)]
        began = time.monotonic()
        for reader in readers:
            reader.send(request(b"GET /big HTTP/1.1"))
        statuses = [status_of(reader) for reader in readers]
        assert sorted(statuses) == [200] * 2 + [503] * 58
        assert time.monotonic() - began < 10
        pour.stuck()
        assert (fresh.connections, in_flight(service)) == (2, 2)
        # Owned paths go on, and those that were refused may ask again: they are refused again.
        assert service.call("GET", "/health/live").status == 200
        admitted = [reader for reader in readers if status_of(reader) == 200]
        for reader in readers:
            if reader not in admitted:
                problem(reader.reply(), 503, "upstream-busy")
                reader.send(request(b"GET /more HTTP/1.1"))
                problem(reader.reply(), 503, "upstream-busy")
        # They are only slow, not gone: what they asked for is still theirs, and nobody else's.
        for left, reader in ((1, admitted[0]), (0, admitted[1])):
            reply = reader.reply()
            assert (len(reply.body), reply.complete) == (pour.total, True)
            assert reply.body.count(0) == pour.total
            assert in_flight(service) == left
        assert service.call("GET", "/small").body == b"ok"
    assert fresh.connections == 2


def test_a_client_that_does_not_read_and_leaves_gives_its_place_back(
    capped: Service, upstream: ScriptedUpstream
) -> None:
    pour = Pour(64 << 20)
    upstream.script(pour)
    readers = [capped.client() for _ in range(CAP)]
    for reader in readers:
        reader.send(request(b"GET /big HTTP/1.1"))
        assert status_of(reader) == 200
    pour.stuck()
    problem(capped.call("GET", "/small"), 503, "upstream-busy")
    for left, reader in zip(range(CAP - 1, -1, -1), readers, strict=True):
        reader.close()
        wait_for(lambda left=left: in_flight(capped) == left, 1, "its place")
        assert capped.call("GET", "/small").body == b"ok"


def test_the_log_counts_the_time_that_a_stream_waited_for_its_client(
    capped: Service, upstream: ScriptedUpstream
) -> None:
    pour = Pour(64 << 20)
    upstream.script(pour)
    with capped.client() as client:
        began = time.monotonic()
        client.send(request(b"GET /big HTTP/1.1", b"X-Request-Id: waits"))
        pour.stuck()
        waited = time.monotonic() - began
        assert client.reply().complete
    [line] = wait_for(lambda: [one for one in capped.access_log if one["request_id"] == "waits"])
    assert line["bytes"] == 64 << 20
    assert line["ms"] > waited * 1000


def test_a_body_is_asked_for_after_the_answers_before_it(
    capped: Service, upstream: ScriptedUpstream
) -> None:
    """Also where those have not been taken yet: the 100 came in the middle of one."""
    pour = Pour(64 << 20)
    upstream.script(pour)
    expecting = request(b"PUT /body HTTP/1.1", b"Content-Length: 2", b"Expect: 100-continue")
    with capped.client() as client:
        client.send(request(b"GET /big HTTP/1.1") + expecting)
        pour.stuck()
        first = client.reply()
        assert (len(first.body), first.body.strip(b"\0")) == (pour.total, b"")
        assert client.head() == b"HTTP/1.1 100 Continue"
        client.send(b"hi")
        assert client.reply().body == b"ok"
    assert [seen.body for seen in upstream.seen] == [b"", b"hi"]


def test_a_client_that_asks_and_does_not_read_is_not_answered_further(
    capped: Service, upstream: ScriptedUpstream
) -> None:
    """Each answer was kept for it, on a disk without end."""
    body = bytes(60_000)
    upstream.script(message(OK, b"Content-Length: %d" % len(body), body=body))
    times = 400
    with capped.client() as client:
        client.send(request(b"GET /a HTTP/1.1") * times)
        count = -1
        while count < len(upstream.seen):  # until no more are forwarded
            count = len(upstream.seen)
            threading.Event().wait(0.5)
        assert 0 < count < times / 2
        for _ in range(times):
            assert client.reply().body == body
    assert len(upstream.seen) == times


def test_memory_stays_flat_for_an_answer_of_any_size(
    service: Service, upstream: ScriptedUpstream
) -> None:
    total = 256 << 20
    upstream.script(Pour(total))
    with service.client() as client:
        client.send(request(b"GET /big HTTP/1.1"))
        client.head()
        before = peak = service.memory
        received = len(client.buffer)
        buffer = bytearray(1 << 20)
        while received < total:
            if received % (8 << 20) < len(buffer):
                peak = max(peak, service.memory)
            size = client.sock.recv_into(buffer)
            assert size
            received += size
    assert received == total
    assert peak - before < 24 << 20


def test_memory_stays_flat_when_the_client_does_not_read(
    capped: Service, upstream: ScriptedUpstream
) -> None:
    freed = threading.Event()
    pour = Pour(512 << 20)

    def answer(sock: socket.socket, seen: Seen) -> None:
        try:
            pour(sock, seen)
        finally:
            freed.set()

    upstream.script(answer)
    before = capped.memory
    with capped.client() as client:
        client.send(request(b"GET /big HTTP/1.1"))
        client.head()
        pour.stuck()
        assert in_flight(capped) == 1
        assert capped.memory - before < 24 << 20
        # The upstream has to wait: nothing has taken the rest of the body to keep it elsewhere.
        assert not freed.is_set()
    assert freed.wait(10)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_memory_stays_flat_for_a_request_of_any_size(
    service: Service, upstream: ScriptedUpstream, framing: str
) -> None:
    total, block = 96 << 20, bytes(1 << 20)
    received = threading.Event()
    counted = 0

    def count(sock: socket.socket, seen: Seen) -> bool:
        nonlocal counted
        counted = 0 if framing == "chunked" else len(seen.body)
        while counted < total and framing == "length":
            counted += len(sock.recv(1 << 20))
        if framing == "chunked":
            counted = len(read_chunks(sock, seen.body)[0])
        received.set()
        ok(sock, seen)
        return False

    upstream.script(b"")
    upstream.early = count
    with service.client(timeout=60) as client:
        client.send(request(b"GET /health/live HTTP/1.1"))
        assert client.reply().status == 200
        before = peak = service.memory
        head = b"Content-Length: %d" % total if framing == "length" else CHUNKED
        client.send(request(b"PUT /a HTTP/1.1", head))
        for i in range(total // len(block)):
            client.send(block if framing == "length" else chunked(block)[:-5])
            if i % 8 == 0:
                peak = max(peak, service.memory)
        client.send(b"" if framing == "length" else b"0\r\n\r\n")
        while not received.wait(0.1):
            peak = max(peak, service.memory)
        assert client.reply().status == 200
    assert counted == total
    assert peak - before < 24 << 20
