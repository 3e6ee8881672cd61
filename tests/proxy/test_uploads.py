"""Bodies that stream to the upstream: what is gathered, what is not, and what becomes of a cut one."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from tests.harness import (
    DEAD_DATABASE,
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
CONTINUE = b"HTTP/1.1 100 Continue"
# A body of so many bytes is gathered before the upstream is asked, a larger one is not.
GATHERED = 65536
LIMIT = 1_000_000

framings = pytest.mark.parametrize("framing", ["length", "chunked"])


@pytest.fixture(scope="module")
def database() -> str:
    """No database: no proxied request may depend on one."""
    return DEAD_DATABASE


@pytest.fixture(scope="module")
def limited(upstream: ScriptedUpstream) -> Iterator[Service]:
    with Service(UPSTREAM_URL=upstream.url, MAX_BODY_BYTES=LIMIT, WORKERS=1) as running:
        yield running


@pytest.fixture(scope="module")
def service(upstream: ScriptedUpstream) -> Iterator[Service]:
    """In one worker, so that what is in flight is known to whoever is asked."""
    with Service(UPSTREAM_URL=upstream.url, WORKERS=1) as running:
        yield running


def in_flight(service: Service) -> int:
    return int(service.call("GET", "/health").json()["upstream"]["in_flight"])


def chunk(piece: bytes) -> bytes:
    return chunked(piece)[:-5]


class Reader:
    """An `early` that notes the head at once, then each piece of the body as it comes.

    `bare` is what has arrived, in the framing that it came in; `ended` is set when no more comes.
    """

    def __init__(self, total: int | None = None, answer: bytes = b"") -> None:
        self.head = threading.Event()
        self.ended = threading.Event()
        self.seen: Seen | None = None
        self.bare = b""
        self.total = total
        # It says that the connection ends, or the next test's request might still go there.
        ends = (b"Content-Length: 2", b"Connection: close")
        self.answer = answer or message(OK, *ends, body=b"ok")

    def __call__(self, sock: socket.socket, seen: Seen) -> bool:
        self.seen, self.bare = seen, seen.body
        self.head.set()
        sock.settimeout(30)
        with contextlib.suppress(OSError):
            while self.total is None or len(self.bare) < self.total:
                data = sock.recv(1 << 20)
                if not data:
                    break
                self.bare += data
            sock.sendall(self.answer)
        self.ended.set()
        return False

    def has(self, count: int) -> None:
        wait_for(lambda: len(self.bare) >= count, 10, f"{count} bytes with the upstream")


@framings
def test_a_large_body_streams_on_as_it_arrives_framed_as_it_came(
    service: Service, upstream: ScriptedUpstream, framing: str
) -> None:
    """The head is with the upstream before the body's end, and each piece before the next is sent."""
    pieces = [os.urandom(GATHERED + 1), b"a", b"\r\n0\r\n\r\n", os.urandom(3), os.urandom(300_000)]
    total = sum(map(len, pieces))
    reader = Reader()
    upstream.script(b"")
    upstream.early = reader
    head = b"Content-Length: %d" % total if framing == "length" else CHUNKED
    with service.client() as client:
        client.send(request(b"PUT /up HTTP/1.1", head))
        arrived = 0
        for piece in pieces:
            client.send(piece if framing == "length" else chunk(piece))
            assert reader.head.wait(10)
            arrived += len(piece)
            reader.has(arrived)  # At least: in chunks there is more.
        assert reader.seen is not None
        if framing == "length":
            assert reader.bare == b"".join(pieces)
            assert reader.seen.all("Content-Length") == [str(total)]
            assert reader.seen.all("Transfer-Encoding") == []
        else:
            client.send(b"0\r\n\r\n")
            wait_for(lambda: reader.bare.endswith(b"\r\n0\r\n\r\n"), 10, "the last chunk")
            assert unchunked(reader.bare) == b"".join(pieces)
            assert reader.seen.all("Transfer-Encoding") == ["chunked"]
            assert reader.seen.all("Content-Length") == []


def unchunked(data: bytes) -> bytes:
    """The body in a whole chunked message that nothing follows."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        mine.close()
        body, rest = read_chunks(theirs, data)
    assert rest == b""
    return body


@pytest.mark.parametrize("size", [GATHERED, GATHERED + 1])
def test_a_body_by_length_is_gathered_up_to_64_kib(
    service: Service, upstream: ScriptedUpstream, size: int
) -> None:
    """A slow sender of an ordinary request costs the upstream nothing; a large one asks at once."""
    reader = Reader(size)
    upstream.script(ok)
    upstream.early = lambda sock, seen: seen.target != b"/up" or reader(sock, seen)
    body = os.urandom(size)
    with service.client() as client:
        client.send(request(b"POST /up HTTP/1.1", b"Content-Length: %d" % size))
        if size > GATHERED:
            assert reader.head.wait(10)
        client.send(body[:-1])
        # What is answered after it shows that those bytes have been read.
        assert service.call("GET", "/other").body == b"ok"
        assert reader.head.is_set() == (size > GATHERED)
        client.send(body[-1:])
        assert client.reply().body == b"ok"
    assert reader.bare == body


def test_a_chunked_body_is_gathered_up_to_64_kib(
    service: Service, upstream: ScriptedUpstream
) -> None:
    reader = Reader(GATHERED + 1)
    upstream.script(ok)
    upstream.early = lambda sock, seen: seen.target != b"/up" or reader(sock, seen)
    with service.client() as client:
        client.send(request(b"POST /up HTTP/1.1", CHUNKED, body=chunk(bytes(GATHERED))))
        assert service.call("GET", "/other").body == b"ok"
        assert not reader.head.is_set()
        client.send(chunk(b"x"))
        assert reader.head.wait(10)
        client.send(b"0\r\n\r\n")
        assert client.reply().body == b"ok"


@pytest.mark.parametrize("size", [1, 1460, 65536, 1 << 20])
@framings
def test_a_large_body_arrives_byte_for_byte_however_it_is_cut_up(
    service: Service, upstream: ScriptedUpstream, framing: str, size: int
) -> None:
    body = os.urandom(5_000_000 if size > 1 else GATHERED + 5000)
    upstream.script(ok)
    with service.client(timeout=40) as client:
        if framing == "length":
            client.send(request(b"PUT /up HTTP/1.1", b"Content-Length: %d" % len(body)))
            for at in range(0, len(body), max(size, 100)):
                client.send(body[at : at + max(size, 100)])
        else:
            pieces = [body[at : at + size] for at in range(0, len(body), size)]
            client.send(request(b"PUT /up HTTP/1.1", CHUNKED, body=chunked(*pieces)))
        assert client.reply().body == b"ok"
        # Nothing of it is left over: the connections on both sides go on.
        client.send(request(b"GET /next HTTP/1.1"))
        assert client.reply().body == b"ok"
    first, second = upstream.seen
    assert first.body == body
    assert (second.target, second.connection) == (b"/next", first.connection)


def test_chunk_extensions_and_trailers_of_a_large_body_stop_here(
    service: Service, upstream: ScriptedUpstream
) -> None:
    piece = os.urandom(GATHERED)
    reader = Reader()
    upstream.script(b"")
    upstream.early = reader
    with service.client() as client:
        client.send(request(b"PUT /up HTTP/1.1", CHUNKED))
        for _ in range(3):
            client.send(b'%x;a=b;c="d"\r\n%s\r\n' % (len(piece), piece))
        client.send(b"000;last\r\nX-Sum: 1\r\nContent-Length: 7\r\n\r\n")
        wait_for(lambda: reader.bare.endswith(b"\r\n0\r\n\r\n"), 10, "the last chunk")
        assert b"X-Sum" not in reader.bare[-100:]
        assert unchunked(reader.bare) == piece * 3


def test_a_body_over_the_limit_is_413_in_mid_stream(
    limited: Service, upstream: ScriptedUpstream
) -> None:
    """The upstream must not take what it has for a whole body."""
    reader = Reader()
    upstream.script(b"")
    upstream.early = reader
    with limited.client() as client:
        client.send(request(b"PUT /up HTTP/1.1", CHUNKED))
        for _ in range(LIMIT // 100_000):
            client.send(chunk(bytes(100_000)))
        reader.has(LIMIT)
        client.send(b"1\r\n")  # It need not be here: it has been announced.
        problem(client.reply(), 413, "body-too-large")
        assert client.closed()
    assert reader.ended.wait(1)
    assert not reader.bare.endswith(b"0\r\n\r\n")
    wait_for(lambda: in_flight(limited) == 0, 1, "the place of what was refused")


def test_a_client_that_sends_far_too_much_in_chunks_still_reads_its_413(
    limited: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(b"")
    upstream.early = Reader()
    with limited.client() as client:
        client.send(request(b"PUT /up HTTP/1.1", CHUNKED))
        for _ in range(100):
            client.send(chunk(bytes(100_000)))
        client.send(b"0\r\n\r\n")
        problem(client.reply(), 413, "body-too-large")
        assert client.closed()


@pytest.mark.parametrize("bad", [b"xyz\r\n", b"5\r\nhello world", b"0\r\nno field\r\n\r\n"])
def test_chunks_that_are_malformed_in_mid_stream_are_400_and_never_look_whole(
    service: Service, upstream: ScriptedUpstream, bad: bytes
) -> None:
    reader = Reader()
    upstream.script(b"")
    upstream.early = reader
    piece = chunk(bytes(GATHERED + 1))
    with service.client() as client:
        client.send(request(b"PUT /up HTTP/1.1", CHUNKED, body=piece))
        reader.has(GATHERED + 1)
        client.send(bad)
        problem(client.reply(), 400, "bad-request")
        assert client.closed()
    assert reader.ended.wait(1)
    assert not reader.bare.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("leaving", ["close", "reset", "half-close"])
@framings
def test_a_client_that_leaves_in_its_body_frees_the_connection_within_a_second(
    service: Service, upstream: ScriptedUpstream, framing: str, leaving: str
) -> None:
    """And what the upstream has never looks whole."""
    reader = Reader()
    upstream.script(b"")
    upstream.early = reader
    head = b"Content-Length: 1000000" if framing == "length" else CHUNKED
    body = bytes(GATHERED + 1)
    with service.client() as client:
        client.send(request(b"POST /up HTTP/1.1", head))
        client.send(body if framing == "length" else chunk(body))
        reader.has(len(body))
        assert in_flight(service) == 1
        left = time.monotonic()
        leave(client, leaving)
        assert reader.ended.wait(1)
        assert time.monotonic() - left < 1
    wait_for(lambda: in_flight(service) == 0, 1, "its place")
    assert not reader.bare.endswith(b"0\r\n\r\n")
    assert len(reader.bare) < 1_000_000


def leave(client: RawClient, how: str) -> None:
    if how == "half-close":
        client.sock.shutdown(socket.SHUT_WR)
        return
    if how == "reset":
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.sock.close()


@pytest.mark.parametrize("how", ["end", "reset"])
@framings
def test_an_upstream_that_dies_in_a_body_is_502_and_the_client_reads_it(
    service: Service, upstream: ScriptedUpstream, framing: str, how: str
) -> None:
    def die(sock: socket.socket, seen: Seen) -> bool:
        sock.recv(65536)
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        return False

    upstream.script(b"")
    upstream.early = die
    body = bytes(3_000_000)
    head = b"Content-Length: %d" % len(body) if framing == "length" else CHUNKED
    with service.client() as client:
        client.send(request(b"PUT /up HTTP/1.1", head))
        client.send(body if framing == "length" else chunked(body))
        reply = client.reply()
        problem(reply, 502, "upstream-broken")
        # Where all of the body had gone to the upstream by then, the connection goes on.
        if reply.get("Connection") is None:
            client.send(request(b"GET /health/live HTTP/1.1"))
            assert client.reply().status == 200
        else:
            assert client.closed()


# Expect: 100-continue (RFC 9110 section 10.1.1).

EXPECT = b"Expect: 100-continue"
LARGE = GATHERED * 3


@pytest.mark.parametrize(
    ("size", "framing"),
    [(2, "length"), (GATHERED, "length"), (2, "chunked"), (LARGE, "chunked")],
)
@pytest.mark.parametrize("interim", [b"", message(CONTINUE)])
def test_whoever_waits_with_a_body_that_is_gathered_is_told_to_go_on_by_gatehouse(
    service: Service, upstream: ScriptedUpstream, size: int, framing: str, interim: bytes
) -> None:
    """At once, before the upstream is asked; and once, whatever the upstream says."""
    upstream.script(interim + message(OK, b"Content-Length: 2", body=b"ok"))
    body = os.urandom(size)
    head = b"Content-Length: %d" % size if framing == "length" else CHUNKED
    with service.client() as client:
        client.send(request(b"PUT /up HTTP/1.1", head, EXPECT))
        assert client.head() == CONTINUE
        assert upstream.seen == []
        client.send(body if framing == "length" else chunked(body))
        assert client.head().startswith(OK)
    [seen] = upstream.seen
    assert seen.body == body


def test_whoever_waits_with_a_large_body_is_told_to_go_on_by_the_upstream(
    service: Service, upstream: ScriptedUpstream
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def say_when(sock: socket.socket, seen: Seen) -> None:
        assert seen.get("Expect") == "100-continue"
        assert seen.body == b""
        asked.set()
        assert go_on.wait(10)
        sock.sendall(message(CONTINUE))

    upstream.script(ok)
    upstream.early = say_when
    body = os.urandom(LARGE)
    with service.client() as client:
        client.send(request(b"PUT /up HTTP/1.1", b"Content-Length: %d" % LARGE, EXPECT))
        assert asked.wait(10)
        client.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.head()
        client.sock.settimeout(15)
        go_on.set()
        assert client.head() == CONTINUE
        client.send(body)
        # The only one: its next word is the answer itself.
        assert client.head().startswith(OK)
    [seen] = upstream.seen
    assert seen.body == body


def test_an_upstream_that_knows_of_no_100_gets_the_large_body_all_the_same(
    service: Service, upstream: ScriptedUpstream
) -> None:
    """Many do not, and wait for the body: after a second its client is told to go on."""
    upstream.script(ok)
    body = os.urandom(LARGE)
    with service.client() as client:
        began = time.monotonic()
        client.send(request(b"PUT /up HTTP/1.1", b"Content-Length: %d" % LARGE, EXPECT))
        assert client.head() == CONTINUE
        assert 0.9 < time.monotonic() - began < 4
        client.send(body)
        assert client.head().startswith(OK)
    [seen] = upstream.seen
    assert seen.body == body


def test_a_client_that_does_not_wait_for_the_100_is_not_told_to_go_on(
    service: Service, upstream: ScriptedUpstream
) -> None:
    """RFC 9110 section 10.1.1: a server may omit it when it has received some of the body."""
    upstream.script(ok)
    body = os.urandom(LARGE)
    with service.client() as client:
        client.send(request(b"PUT /up HTTP/1.1", b"Content-Length: %d" % LARGE, EXPECT, body=body))
        reply = client.reply()
    assert (reply.status, reply.body) == (200, b"ok")
    [seen] = upstream.seen
    assert seen.body == body


@pytest.mark.parametrize("status", [b"401 Unauthorized", b"417 Expectation Failed", b"308 There"])
@pytest.mark.parametrize("closes", [False, True])
def test_an_upstream_may_refuse_a_large_body_before_it_is_sent(
    service: Service, upstream: ScriptedUpstream, status: bytes, closes: bool
) -> None:
    """The client gets the refusal, no 100 before it, and the end of its connection; the upstream's
    connection, which still waits for a body, carries no other request."""
    over = threading.Event()

    def refuse(sock: socket.socket, seen: Seen) -> bool:
        lines = [b"Content-Length: 4", *([b"Connection: close"] if closes else [])]
        sock.sendall(message(b"HTTP/1.1 " + status, *lines, body=b"stop"))
        if closes:
            return False
        sock.settimeout(10)
        with contextlib.suppress(ConnectionError):
            assert sock.recv(1) == b""
        over.set()
        return False

    upstream.script(b"")
    upstream.early = refuse
    with service.client() as client:
        client.send(request(b"PUT /up HTTP/1.1", b"Content-Length: %d" % LARGE, EXPECT))
        head = client.head()
        assert head.startswith(b"HTTP/1.1 " + status)
        assert b"\r\nConnection: close" in head
        while len(client.buffer) < 4:
            client.buffer += client.sock.recv(65536)
        assert client.buffer == b"stop"
        client.buffer = b""
        assert client.closed()
        assert closes or over.wait(1)
    wait_for(lambda: in_flight(service) == 0, 1, "its place")


def test_a_body_that_is_sent_all_the_same_after_a_refusal_is_no_request(
    service: Service, upstream: ScriptedUpstream
) -> None:
    def refuse(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(message(b"HTTP/1.1 401 No", b"Content-Length: 4", body=b"stop"))
        sock.settimeout(10)
        with contextlib.suppress(OSError):
            while sock.recv(65536):
                pass
        return False

    upstream.script(ok)
    upstream.early = lambda sock, seen: refuse(sock, seen) if seen.target == b"/up" else None
    smuggled = request(b"GET /smuggled HTTP/1.1")
    body = (smuggled * (LARGE // len(smuggled) + 1))[:LARGE]
    with service.client() as client:
        client.send(request(b"PUT /up HTTP/1.1", b"Content-Length: %d" % LARGE, EXPECT))
        assert client.reply().status == 401
        with contextlib.suppress(ConnectionError):
            client.send(body + smuggled)
        assert client.closed(10)
    assert service.call("GET", "/after").body == b"ok"
    assert [seen.target for seen in upstream.seen] == [b"/after"]


def test_an_expectation_in_http_1_0_is_ignored(
    service: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    with service.client() as client:
        client.send(request(b"PUT /up HTTP/1.0", b"Content-Length: 2", EXPECT))
        client.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.head()
        client.sock.settimeout(15)
        client.send(b"hi")
        assert client.head().startswith(OK)
