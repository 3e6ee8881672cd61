"""Event streams: how long they may be silent, and what their clients hear meanwhile."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.harness import (
    DEAD_DATABASE,
    ScriptedUpstream,
    Seen,
    Service,
    chunked,
    message,
    request,
    wait_for,
)

OK = b"HTTP/1.1 200 OK"
CHUNKED = b"Transfer-Encoding: chunked"
EVENTS = b"Content-Type: text/event-stream"
COMMENT = b": keep-alive\n\n"
KEEPALIVE, READ_TIMEOUT, STREAM_TIMEOUT = 0.4, 0.5, 2.0


@pytest.fixture(scope="module")
def database() -> str:
    """No database: no proxied request may depend on one."""
    return DEAD_DATABASE


@pytest.fixture(scope="module")
def patient(upstream: ScriptedUpstream) -> Iterator[Service]:
    settings = {"UPSTREAM_READ_TIMEOUT": READ_TIMEOUT, "UPSTREAM_STREAM_TIMEOUT": STREAM_TIMEOUT}
    with Service(UPSTREAM_URL=upstream.url, WORKERS=1, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def nudging(upstream: ScriptedUpstream) -> Iterator[Service]:
    settings = {"UPSTREAM_STREAM_TIMEOUT": 30, "SSE_KEEPALIVE": KEEPALIVE}
    with Service(UPSTREAM_URL=upstream.url, WORKERS=1, **settings) as running:
        yield running


class Script:
    """An answer in pieces: bytes to send, numbers of seconds to be silent for.

    It then waits for the client to leave, and notes whether and when that happened.
    """

    def __init__(self, *steps: bytes | float) -> None:
        self.steps = steps
        self.left = threading.Event()
        self.got = b""

    def __call__(self, sock: socket.socket, seen: Seen) -> bool:
        with contextlib.suppress(ConnectionError):
            for step in self.steps:
                if isinstance(step, bytes):
                    sock.sendall(step)
                else:
                    threading.Event().wait(step)
            sock.settimeout(20)
            self.got = sock.recv(65536)
        self.left.set()
        return False


def chunk(piece: bytes) -> bytes:
    return chunked(piece)[:-5]


MEDIA_TYPES = [
    b"text/event-stream",
    b"Text/Event-Stream; charset=utf-8",
    b"TEXT/EVENT-STREAM;charset=UTF-8",
    b"text/event-stream ; a=b",
]
OTHERS = [b"text/event-streams", b"text/plain; a=text/event-stream", b"application/x-ndjson", b""]


# How long the upstream may be silent.


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
def test_an_event_stream_may_be_silent_for_longer_than_another_answer(
    patient: Service, upstream: ScriptedUpstream, media_type: bytes
) -> None:
    head = message(OK, b"Content-Type: " + media_type, CHUNKED)
    upstream.script(
        Script(head, READ_TIMEOUT * 2, chunk(b"data: 1\n\n"), READ_TIMEOUT * 2, b"0\r\n\r\n")
    )
    reply = patient.call("GET", "/events")
    assert (reply.body, reply.complete) == (b"data: 1\n\n", True)


@pytest.mark.parametrize("media_type", OTHERS)
def test_any_other_answer_may_not(
    patient: Service, upstream: ScriptedUpstream, media_type: bytes
) -> None:
    head = message(OK, b"Content-Type: " + media_type, CHUNKED)
    upstream.script(Script(head, chunk(b"data: 1\n\n"), READ_TIMEOUT * 3, b"0\r\n\r\n"))
    began = time.monotonic()
    reply = patient.call("GET", "/other")
    assert (reply.body, reply.complete) == (b"data: 1\n\n", False)
    assert READ_TIMEOUT * 0.9 < time.monotonic() - began < READ_TIMEOUT + 0.9


@pytest.mark.parametrize("framing", [[CHUNKED], [b"Content-Length: 1000"], []])
def test_an_event_stream_that_is_silent_for_too_long_is_cut(
    patient: Service, upstream: ScriptedUpstream, framing: list[bytes]
) -> None:
    piece = chunk(b"data: 1\n\n") if framing == [CHUNKED] else b"data: 1\n\n"
    script = Script(message(OK, EVENTS, *framing), piece)
    upstream.script(script)
    began = time.monotonic()
    reply = patient.call("GET", "/events")
    assert (reply.body, reply.complete) == (b"data: 1\n\n", False)
    assert STREAM_TIMEOUT * 0.9 < time.monotonic() - began < STREAM_TIMEOUT + 1.5
    assert script.left.wait(1)


def test_the_head_of_an_event_stream_is_as_late_as_any_other(
    patient: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(Script(OK + b"\r\n" + EVENTS + b"\r\n"))
    began = time.monotonic()
    assert patient.call("GET", "/events").status == 504
    assert time.monotonic() - began < READ_TIMEOUT + 0.9


# What the client hears meanwhile.


def listen(
    service: Service, upstream: ScriptedUpstream, script: Script, seconds: float, line: bytes = b""
) -> bytes:
    """What a client receives of an answer in so many seconds, without its head."""
    upstream.script(script)
    with service.client() as client:
        client.send(request(line or b"GET /events HTTP/1.1"))
        client.head()
        until = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while (left := until - time.monotonic()) > 0:
                client.sock.settimeout(left)
                data = client.sock.recv(65536)
                if not data:
                    break
                client.buffer += data
    assert script.left.wait(1), "a client that leaves closes the stream at once"
    assert script.got == b"", "nothing of it is the upstream's business"
    return client.buffer


def hear(service: Service, upstream: ScriptedUpstream, script: Script, size: int) -> bytes:
    """The first `size` bytes that a client receives of an answer after its head, whenever they come."""
    upstream.script(script)
    with service.client() as client:
        client.send(request(b"GET /events HTTP/1.1"))
        client.head()
        heard, client.buffer = client.buffer, b""
        while len(heard) < size and (data := client.sock.recv(size - len(heard))):
            heard += data
    assert script.left.wait(1), "a client that leaves closes the stream at once"
    assert script.got == b"", "nothing of it is the upstream's business"
    return heard


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
def test_a_client_of_a_silent_stream_hears_that_it_lives(
    nudging: Service, upstream: ScriptedUpstream, media_type: bytes
) -> None:
    """From the first: a browser waits for what comes after the head."""
    script = Script(message(OK, b"Content-Type: " + media_type, CHUNKED))
    expected = chunk(COMMENT) * 3
    began = time.monotonic()
    assert hear(nudging, upstream, script, len(expected)) == expected
    assert time.monotonic() - began > KEEPALIVE * 3 * 0.9


def test_the_silence_is_counted_from_the_last_piece(
    nudging: Service, upstream: ScriptedUpstream
) -> None:
    pieces: list[bytes | float] = []
    for number in range(6):
        pieces += [chunk(b"data: %d\n\n" % number), KEEPALIVE * 0.6]
    script = Script(message(OK, EVENTS, CHUNKED), *pieces)
    heard = listen(nudging, upstream, script, KEEPALIVE * 0.6 * 6 + KEEPALIVE * 0.7)
    assert heard == b"".join(chunk(b"data: %d\n\n" % n) for n in range(6)) + chunk(COMMENT)


def test_a_stream_that_ends_with_its_connection_has_comments_too(
    nudging: Service, upstream: ScriptedUpstream
) -> None:
    """In chunks for HTTP/1.1, and as they are for HTTP/1.0."""
    for version, frame in ((b"1.1", chunk), (b"1.0", bytes)):
        script = Script(message(OK, EVENTS, body=b"data: 1\n\n"))
        line = b"GET /events HTTP/" + version
        heard = listen(nudging, upstream, script, KEEPALIVE * 1.5, line)
        assert heard == frame(b"data: 1\n\n") + frame(COMMENT)


@pytest.mark.parametrize(
    "end",
    [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n", b"\r\r\n"],
    ids=repr,
)
def test_an_event_ends_with_an_empty_line_of_any_kind(
    nudging: Service, upstream: ScriptedUpstream, end: bytes
) -> None:
    """HTML living standard, section 9.2.6. Also where its bytes come one by one."""
    pieces = [chunk(b"data: 1")] + [chunk(end[at : at + 1]) for at in range(len(end))]
    script = Script(message(OK, EVENTS, CHUNKED), *pieces)
    heard = listen(nudging, upstream, script, KEEPALIVE * 1.5)
    assert heard.endswith(chunk(COMMENT)) and heard.count(COMMENT) == 1
    assert unframed(heard) == b"data: 1" + end + COMMENT


def unframed(data: bytes) -> bytes:
    """The body in chunks that are all here, without a last one."""
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        body += data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]
    return body


@pytest.mark.parametrize(
    "part",
    [b"data: 1", b"data: 1\n", b"data: 1\r\n", b"data: 1\r", b"data: 1\n\ndata: 2\n", b": x\n"]
    + [b"data: \xe2\x82", b"\n\nid: 7\n"],
    ids=repr,
)
def test_nothing_is_put_into_the_middle_of_an_event(
    nudging: Service, upstream: ScriptedUpstream, part: bytes
) -> None:
    """Nor into a character. When the event has ended there is room again."""
    script = Script(message(OK, EVENTS, CHUNKED), chunk(part), KEEPALIVE * 2.5, chunk(b"\xac\n\n"))
    expected = chunk(part) + chunk(b"\xac\n\n") + chunk(COMMENT)
    assert hear(nudging, upstream, script, len(expected)) == expected


@pytest.mark.parametrize(
    "lines",
    [
        [EVENTS, b"Content-Length: 1000"],
        [EVENTS, CHUNKED, b"Content-Encoding: gzip"],
        [EVENTS, CHUNKED, b"content-encoding: BR"],
        *[[b"Content-Type: " + kind, CHUNKED] for kind in OTHERS],
        [CHUNKED],
    ],
    ids=repr,
)
def test_nothing_is_put_where_it_would_be_read_as_something_else(
    nudging: Service, upstream: ScriptedUpstream, lines: list[bytes]
) -> None:
    body = gzip.compress(b"data: 1\n\n") + b"\n\n"
    piece = chunk(body) if CHUNKED in lines else body
    script = Script(message(OK, *lines), piece)
    assert listen(nudging, upstream, script, KEEPALIVE * 2.5) == piece


def test_nothing_is_put_before_the_head_nor_into_the_answer_to_head(
    nudging: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(
        Script(KEEPALIVE * 2.5, message(OK, EVENTS, CHUNKED, body=chunked(b"data: 1\n\n")))
    )
    with nudging.client() as client:
        client.send(request(b"GET /events HTTP/1.1"))
        assert client.head().startswith(OK)
        while not client.buffer.endswith(b"0\r\n\r\n"):
            client.buffer += client.sock.recv(65536)
        assert client.buffer == chunked(b"data: 1\n\n")
    upstream.script(message(OK, EVENTS))
    with nudging.client() as client:
        client.send(request(b"HEAD /events HTTP/1.1"))
        client.head()
        threading.Event().wait(KEEPALIVE * 2)
        client.send(request(b"GET /health/live HTTP/1.1"))
        assert client.head().startswith(OK)


def test_by_default_nothing_is_put_in(patient: Service, upstream: ScriptedUpstream) -> None:
    script = Script(message(OK, EVENTS, CHUNKED), chunk(b"data: 1\n\n"))
    assert listen(patient, upstream, script, STREAM_TIMEOUT * 0.8) == chunk(b"data: 1\n\n")


def test_what_the_client_hears_is_no_life_of_the_upstream_s(
    start: Callable[..., Service], upstream: ScriptedUpstream
) -> None:
    """Such a stream would live for ever, whose upstream has long been dead."""
    service = start(
        UPSTREAM_URL=upstream.url, SSE_KEEPALIVE=0.5, UPSTREAM_STREAM_TIMEOUT=2, WORKERS=1
    )
    script = Script(message(OK, EVENTS, CHUNKED), chunk(b"data: 1\n\n"))
    upstream.script(script)
    began = time.monotonic()
    reply = service.call("GET", "/events")
    assert not reply.complete
    assert reply.body in [b"data: 1\n\n" + COMMENT * count for count in (3, 4)]
    assert 1.8 < time.monotonic() - began < 3.5
    assert script.left.wait(1)


# The end of either side.


@pytest.mark.parametrize("framing", [[CHUNKED], [b"Content-Length: 1000"]])
def test_a_stream_whose_upstream_ends_is_ended_at_once(
    nudging: Service, upstream: ScriptedUpstream, framing: list[bytes]
) -> None:
    piece = chunk(b"data: 1\n\n") if framing == [CHUNKED] else b"data: 1\n\n"
    end = threading.Event()

    def answer(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(message(OK, EVENTS, *framing, body=piece))
        assert end.wait(10)
        return False

    upstream.script(answer)
    with nudging.client() as client:
        client.send(request(b"GET /events HTTP/1.1"))
        client.head()
        wait_for(lambda: streams(nudging) == 1)
        end.set()
        began = time.monotonic()
        while client.sock.recv(65536):
            pass
        assert time.monotonic() - began < 1
    wait_for(lambda: streams(nudging) == 0, 1)


def streams(service: Service) -> int:
    part = service.call("GET", "/health").json()["upstream"]
    assert part["streams"] <= part["in_flight"]
    return int(part["streams"])
