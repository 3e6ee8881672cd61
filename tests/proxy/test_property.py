"""For any request and any answer: both arrive as they were sent, less the contract's own changes."""

from __future__ import annotations

import socket
import string
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness import (
    DEAD_DATABASE,
    PROXY_SETS,
    RawClient,
    Reply,
    ScriptedUpstream,
    Seen,
    Service,
    message,
    request,
)

TOKEN = "!#$%&'*+-.^_`|~" + string.digits + string.ascii_letters
# Names with a meaning for one hop, or that one side sets: the other files say what becomes of them.
SPECIAL = {
    *("alt-svc", "connection", "content-length", "date", "expect", "forwarded", "host"),
    *("keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te"),
    *("trailer", "transfer-encoding", "upgrade", "via", "x-forwarded-for", "x-forwarded-host"),
    *("x-forwarded-proto", "x-real-ip", "x-request-id"),
}
OWN = {"connection", "content-length", "date", "transfer-encoding", "x-request-id"}
SET = {"host", *map(str.lower, PROXY_SETS)}

# A chunked body up to this size is gathered and has a length then.
GATHERED = 65536

Line = tuple[bytes, bytes]


def of(alphabet: bytes, max_size: int, min_size: int = 0) -> st.SearchStrategy[bytes]:
    """Bytes out of `alphabet`."""
    octets = st.sampled_from(list(alphabet))
    return st.lists(octets, min_size=min_size, max_size=max_size).map(bytes)


VISIBLE = bytes(range(0x21, 0x7F)) + bytes(range(0x80, 0x100))
names = of(TOKEN.encode(), 12, 1).filter(
    lambda name: name.decode().lower().replace("_", "-") not in SPECIAL
)
# RFC 9110 section 5.5: visible or obs-text octets, with blanks between them but not around.
values = of(VISIBLE + b" \t" * 20, 40).map(lambda value: value.strip(b" \t"))
lines = st.lists(st.tuples(names, values), max_size=12)
tokens = of(TOKEN.encode(), 10, 1).filter(lambda token: token != b"CONNECT")
methods = st.sampled_from([b"GET", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"]) | tokens
# Under a segment of its own, so that no path is one of Gatehouse's.
targets = of(VISIBLE, 60).map(lambda rest: b"/p" + rest)
sizes = st.integers(0, 300_000) | st.integers(GATHERED - 2, GATHERED + 2)
bodies = st.binary(max_size=2000) | sizes.map(lambda size: (b"\0\r\n" * (size // 3 + 1))[:size])
cuts = st.lists(st.integers(0, 2000), max_size=5)
extensions = st.sampled_from([b"", b";a", b";a=b", b';a="b c"'])


@dataclass
class Sent:
    """A message as one side sends it: its header lines, its body, and how that is framed."""

    lines: list[Line]
    body: bytes
    framing: str
    cuts: list[int]
    extension: bytes
    trailer: list[Line]

    def fields(self) -> list[bytes]:
        sent = [b"%s: %s" % line for line in self.lines]
        if self.framing == "length":
            sent.append(b"Content-Length: %d" % len(self.body))
        elif self.framing == "chunked":
            sent.append(b"Transfer-Encoding: chunked")
        return sent

    def payload(self) -> bytes:
        if self.framing != "chunked":
            return self.body
        edges = sorted({0, len(self.body), *(min(cut, len(self.body)) for cut in self.cuts)})
        pieces = [self.body[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        chunks = b"".join(
            b"%X%s\r\n%s\r\n" % (len(piece), self.extension, piece) for piece in pieces
        )
        trailer = b"".join(b"%s: %s\r\n" % line for line in self.trailer)
        return chunks + b"0\r\n" + trailer + b"\r\n"


def sent(*framings: str) -> st.SearchStrategy[Sent]:
    return st.builds(
        lambda framing, body, *rest: Sent(rest[0], body if framing else b"", framing, *rest[1:]),
        st.sampled_from(framings),
        bodies,
        lines,
        cuts,
        extensions,
        st.lists(st.tuples(names, values), max_size=2),
    )


reasons = of(VISIBLE + b" \t" * 20, 20)
statuses = st.sampled_from([200, 201, 206, 301, 404, 500]) | st.integers(200, 999)


@pytest.fixture(scope="module")
def database() -> str:
    """No database: no proxied request may depend on one."""
    return DEAD_DATABASE


def arrived(head: bytes, own: set[str]) -> list[Line]:
    """The header lines that are neither framing nor set on the way, in their order."""
    pairs = [line.partition(b":") for line in head.split(b"\r\n")[1:]]
    return [
        (name, value.strip(b" \t")) for name, _, value in pairs if name.decode().lower() not in own
    ]


def raw_reply(client: RawClient, method: bytes) -> tuple[bytes, Reply]:
    """The next answer, and its head as it came."""
    head = client.head()
    client.buffer = head + b"\r\n\r\n" + client.buffer
    return head, client.reply(method.decode())


# The fixtures serve all examples: a service has no state that one request leaves for the next,
# which is itself part of what is tested.
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(method=methods, target=targets, asked=sent("", "length", "chunked"))
def test_any_request_arrives_as_it_was_sent(
    service: Service, upstream: ScriptedUpstream, method: bytes, target: bytes, asked: Sent
) -> None:
    upstream.script(message(b"HTTP/1.1 200 OK", b"Content-Length: 0"))
    line = b"%s %s HTTP/1.1" % (method, target)
    with service.client() as client:
        client.send(request(line, *asked.fields(), body=asked.payload()))
        assert client.reply(method.decode()).status == 200
    [seen] = upstream.seen
    assert seen.request_line == line
    assert arrived(seen.head, SET | {"content-length", "transfer-encoding"}) == asked.lines
    assert seen.body == asked.body
    streamed = asked.framing == "chunked" and len(asked.body) > GATHERED
    by_length = asked.framing and not streamed
    assert seen.all("Content-Length") == ([str(len(asked.body))] if by_length else [])
    assert seen.all("Transfer-Encoding") == (["chunked"] if streamed else [])
    assert {name.lower() for name, _ in seen.headers} >= SET


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    method=st.sampled_from([b"GET", b"HEAD", b"POST"]),
    client_version=st.sampled_from([b"1.1", b"1.1", b"1.0"]),
    version=st.sampled_from([b"1.1", b"1.1", b"1.0"]),
    status=statuses,
    reason=reasons,
    told=sent("length", "chunked", "close"),
    interim=st.lists(st.sampled_from([100, 102, 103]), max_size=3),
)
def test_any_answer_comes_back_as_it_was_sent(
    service: Service,
    upstream: ScriptedUpstream,
    method: bytes,
    client_version: bytes,
    version: bytes,
    status: int,
    reason: bytes,
    told: Sent,
    interim: list[int],
) -> None:
    if version == b"1.0" and told.framing == "chunked":
        told.framing = "close"  # HTTP/1.0 has no chunks
    bodiless = method == b"HEAD" or status in (204, 304)
    if status == 204:
        told.framing = "close"  # a 204 has no length (RFC 9110 section 8.6)
    head = b"HTTP/%s %d %s" % (version, status, reason)
    before = b"".join(message(b"HTTP/1.1 %d Interim" % code, b"X-A: 1") for code in interim)
    data = before + message(head, *told.fields(), body=b"" if bodiless else told.payload())

    def answer(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(data)
        return bodiless or (told.framing != "close" and version == b"1.1")

    upstream.script(answer)
    with service.client() as client:
        client.send(request(b"%s /p HTTP/%s" % (method, client_version)))
        for _ in range(interim.count(103) if client_version == b"1.1" else 0):
            assert client.head() == b"HTTP/1.1 103 Interim\r\nX-A: 1"
        came, reply = raw_reply(client, method)
        assert came.split(b"\r\n")[0] == b"HTTP/1.1 %d %s" % (status, reason)
        assert arrived(came, OWN) == told.lines
        assert reply.complete
        assert reply.body == (b"" if bodiless else told.body)
        if told.framing == "length":
            assert reply.all("Content-Length") == [str(len(told.body))]
        assert len(reply.all("Date")) == 1
        assert reply.all("X-Request-Id") == upstream.seen[0].all("X-Request-Id")
        if client_version == b"1.1":
            # A byte too many or too few would be taken for the next answer, or for part of it.
            client.send(request(b"GET /health/live HTTP/1.1"))
            assert client.reply().status == 200
            assert client.buffer == b""
