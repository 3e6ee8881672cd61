"""What the client receives: status line, headers, bodies, and each piece as soon as it is there."""

from __future__ import annotations

import gzip
import os
import re
import socket
import statistics
import struct
import threading
import time
from itertools import pairwise

import pytest

from tests.harness import (
    DEAD_DATABASE,
    RawClient,
    Reply,
    ScriptedUpstream,
    Seen,
    Service,
    chunked,
    echo_at_once,
    forward,
    message,
    request,
)

LENGTH_0 = b"Content-Length: 0"
CHUNKED = b"Transfer-Encoding: chunked"
# What belongs to this hop or is set by Gatehouse on an answer.
OWN = {"connection", "content-length", "date", "transfer-encoding", "x-request-id"}
IMF_DATE = re.compile(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT")


@pytest.fixture(scope="module")
def database() -> str:
    """No database: no proxied request may depend on one."""
    return DEAD_DATABASE


def lines(head: bytes) -> list[bytes]:
    """The header lines that are not this hop's own, as they were sent."""
    every = head.split(b"\r\n")[1:]
    return [line for line in every if line.partition(b":")[0].decode().lower() not in OWN]


def received(
    service: Service, upstream: ScriptedUpstream, answer: bytes, line: bytes = b"GET / HTTP/1.1"
) -> list[bytes]:
    """The header lines that a client receives of an answer without a body, as they are."""
    upstream.script(answer)
    with service.client() as client:
        client.send(request(line))
        return lines(client.head())


@pytest.mark.parametrize(
    "line",
    [
        b"200 OK",
        b"200 ok",
        b"200 ",
        b"201 Created",
        b"206 Partial Content",
        b"299 A reason: with (all) sorts, of / things",
        b"200 D\xc3\xa9j\xc3\xa0 vu",
        b"200 D\xe9j\xe0 vu",
        b"345 Unheard Of",
        b"401 Unauthorized",
        b"404 Not Found",
        b"418 I'm a teapot",
        b"500 Oops",
        b"503 Busy",
        b"599 ",
        b"999 Beyond",
    ],
)
def test_status_and_reason_come_back_as_they_were_sent(
    service: Service, upstream: ScriptedUpstream, line: bytes
) -> None:
    _, reply = forward(
        service, upstream, request(), message(b"HTTP/1.1 " + line, b"Content-Length: 2", body=b"hi")
    )
    assert reply.status_line == b"HTTP/1.1 " + line
    assert reply.body == b"hi"


def test_a_status_line_without_reason_is_accepted(
    service: Service, upstream: ScriptedUpstream
) -> None:
    _, reply = forward(service, upstream, request(), message(b"HTTP/1.1 404", LENGTH_0))
    assert (reply.status, reply.reason) == (404, "")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["/elsewhere?a=%zz", "http://127.0.0.1:1/a", ""])
def test_redirects_are_not_followed_nor_rewritten(
    service: Service, upstream: ScriptedUpstream, status: int, location: str
) -> None:
    answer = message(b"HTTP/1.1 %d Moved" % status, f"Location: {location}".encode(), LENGTH_0)
    _, reply = forward(service, upstream, request(), answer)
    assert (reply.status, reply.all("Location")) == (status, [location])


@pytest.mark.parametrize("framing", [[LENGTH_0], [CHUNKED]])
def test_header_lines_come_back_in_their_order_and_case(
    service: Service, upstream: ScriptedUpstream, framing: list[bytes]
) -> None:
    sent = [
        b"x-UPPER-lower: 1",
        b"Set-Cookie: a=1; Expires=Wed, 21 Oct 2015 07:28:00 GMT; Path=/",
        b"Server: upstream/1.0 (any, thing)",
        b"Set-Cookie: b=2",
        b"set-cookie: a=3",
        b'ETag: W/"x"',
        b"Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT",
        b"Vary: Accept",
        b"Vary: Cookie, Origin",
        b'WWW-Authenticate: Basic realm="a, b", Bearer',
        b"X-Bytes: \xc3\xa9\xff\x80",
        b'X-Inner: a  b \t c, "d, e" (f)',
        b"X_Under_Score: 1",
        b"!#$%&'*+-.^_`|~09: token",
        b"Via: 1.1 beyond",
        b"Trailers: not a hop-by-hop name",
        b"Refresh: 5; url=/",
        b"Strict-Transport-Security: max-age=1",
        b"Access-Control-Allow-Origin: *",
        b"Content-Encoding: br",
        b"Accept-Ranges: bytes",
    ]
    body = chunked() if framing == [CHUNKED] else b""
    answer = message(b"HTTP/1.1 200 OK", *sent, *framing, body=body)
    assert received(service, upstream, answer) == sent


def test_an_empty_value_and_surrounding_white_space(
    service: Service, upstream: ScriptedUpstream
) -> None:
    answer = message(b"HTTP/1.1 200 OK", b"X-A:1", b"X-B: \t2 \t", b"X-C:", LENGTH_0)
    _, reply = forward(service, upstream, request(), answer)
    assert reply.headers[:3] == [("X-A", "1"), ("X-B", "2"), ("X-C", "")]


@pytest.mark.parametrize("status", [b"200 OK", b"204 No Content", b"304 Not Modified", b"404 No"])
def test_no_header_is_invented(service: Service, upstream: ScriptedUpstream, status: bytes) -> None:
    framing = [LENGTH_0] if status[:1] != b"3" and status[:3] != b"204" else []
    _, reply = forward(service, upstream, request(), message(b"HTTP/1.1 " + status, *framing))
    extra = ["Content-Length"] if framing else []
    assert sorted(name for name, _ in reply.headers) == [*extra, "Date", "X-Request-Id"]
    assert IMF_DATE.fullmatch(reply.get("Date") or "")


@pytest.mark.parametrize("date", ["Tue, 15 Nov 1994 08:12:31 GMT", "not a date", ""])
def test_the_upstreams_date_is_kept(
    service: Service, upstream: ScriptedUpstream, date: str
) -> None:
    answer = message(b"HTTP/1.1 200 OK", f"date: {date}".encode(), LENGTH_0)
    _, reply = forward(service, upstream, request(), answer)
    assert reply.all("Date") == [date]


def test_the_request_id_replaces_the_upstreams(
    service: Service, upstream: ScriptedUpstream
) -> None:
    answer = message(b"HTTP/1.1 200 OK", b"x-request-id: theirs", b"X-Request-Id: too", LENGTH_0)
    seen, reply = forward(service, upstream, request(b"GET / HTTP/1.1"), answer)
    assert reply.all("X-Request-Id") == seen.all("X-Request-Id")
    assert reply.get("X-Request-Id") not in ("theirs", "too", None)


def test_many_and_long_header_lines_come_back_whole(
    service: Service, upstream: ScriptedUpstream
) -> None:
    sent = [b"X-%d: %s" % (i, b"v" * i) for i in range(300)] + [b"Set-Cookie: " + b"c" * 100_000]
    assert received(service, upstream, message(b"HTTP/1.1 200 OK", *sent, LENGTH_0)) == sent


@pytest.mark.parametrize(
    "line",
    [
        b"Connection: keep-alive",
        b"Connection:",
        b"Proxy-Connection: keep-alive",
        b"Keep-Alive: timeout=5, max=100",
        b"kEEP-aLIVE: 1",
        b"TE: trailers",
        b"Trailer: X-Sum",
        b"Upgrade: h2c",
        b"Proxy-Authenticate: Basic",
        b'Alt-Svc: h3=":443"; ma=86400',
        b"alt-svc: clear",
    ],
)
def test_hop_by_hop_lines_and_alt_svc_stop_here(
    service: Service, upstream: ScriptedUpstream, line: bytes
) -> None:
    answer = message(b"HTTP/1.1 200 OK", b"X-A: 1", line, b"X-B: 2", LENGTH_0)
    assert received(service, upstream, answer) == [b"X-A: 1", b"X-B: 2"]


@pytest.mark.parametrize(
    "connection",
    [
        [b"Connection: X-Hop, X-Other"],
        [b"Connection: x-hop, close, x-OTHER"],
        [b"Connection: X-Hop", b"connection: X-Other, close"],
        [b"Connection:", b"Connection: ,X-Other ,, \t X-Hop\t,"],
    ],
)
def test_lines_that_connection_names_stop_here(
    service: Service, upstream: ScriptedUpstream, connection: list[bytes]
) -> None:
    hop = [b"X-Hop: 1", b"x-other: 2"]
    answer = message(b"HTTP/1.1 200 OK", *hop, *connection, b"X-Kept: 1", *hop, LENGTH_0)
    assert received(service, upstream, answer) == [b"X-Kept: 1"]


def test_connection_cannot_remove_the_framing_of_an_answer(
    service: Service, upstream: ScriptedUpstream
) -> None:
    for framing, body in ((b"Content-Length: 2", b"hi"), (CHUNKED, chunked(b"hi"))):
        connection = b"Connection: Content-Length, Transfer-Encoding, X-Request-Id, Date"
        answer = message(b"HTTP/1.1 200 OK", connection, framing, body=body)
        _, reply = forward(service, upstream, request(), answer)
        assert (reply.body, reply.complete) == (b"hi", True)
        assert reply.get("Content-Length") == ("2" if body == b"hi" else None)
        assert len(reply.all("Date")) == len(reply.all("X-Request-Id")) == 1


def test_a_date_that_connection_names_stops_here_and_another_takes_its_place(
    service: Service, upstream: ScriptedUpstream
) -> None:
    """There was none then, and RFC 9110 section 6.6.1 wants one."""
    date = "Tue, 15 Nov 1994 08:12:31 GMT"
    answer = message(b"HTTP/1.1 200 OK", b"Connection: date", f"Date: {date}".encode(), LENGTH_0)
    _, reply = forward(service, upstream, request(), answer)
    [told] = reply.all("Date")
    assert IMF_DATE.fullmatch(told) and told != date


def test_lone_line_feeds_and_folded_lines_are_understood(
    service: Service, upstream: ScriptedUpstream
) -> None:
    folded = b"X-Fold: one\r\n \t two\r\n\tthree\n"
    answer = b"HTTP/1.1 200 OK\nX-A: 1\r\n" + folded + b"Content-Length: 2\n\nhi"
    _, reply = forward(service, upstream, request(), answer)
    assert (reply.get("X-A"), reply.body) == ("1", b"hi")
    assert reply.all("X-Fold") == ["one two three"]


def test_the_time_that_a_head_takes_is_in_proportion_to_its_size(
    service: Service, upstream: ScriptedUpstream
) -> None:
    """Folded lines and white space were gone through anew from each of them: minutes."""
    folded = b"X-Fold: 0" + b"\r\n 1" * 50_000
    _, reply = forward(service, upstream, request(), message(b"HTTP/1.1 200 OK", folded, LENGTH_0))
    assert (reply.status, reply.all("X-Fold")) == (200, ["0" + " 1" * 50_000])
    upstream.script(message(b"HTTP/1.1 200 OK", b"X:" + b" " * 200_000 + b"\0", LENGTH_0))
    assert service.call("GET", "/").status == 502


SIZES = [0, 1, 65_536, 1_000_003]


def framed(version: bytes, framing: str, body: bytes) -> bytes:
    """An answer with `body`, framed by length, by chunks or by closing the connection."""
    line = b"HTTP/%s 200 OK" % version
    if framing == "length":
        return message(line, b"Content-Length: %d" % len(body), body=body)
    if framing == "chunked":
        pieces = [body[i : i + 7919] for i in range(0, len(body), 7919)]
        return message(line, CHUNKED, body=chunked(*pieces))
    return message(line, body=body)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("version", "framing"),
    [
        (b"1.1", "length"),
        (b"1.1", "chunked"),
        (b"1.1", "close"),
        (b"1.0", "length"),
        (b"1.0", "close"),
    ],
)
@pytest.mark.parametrize("client_version", [b"1.1", b"1.0"])
def test_bodies_come_back_byte_for_byte(
    service: Service,
    upstream: ScriptedUpstream,
    client_version: bytes,
    version: bytes,
    framing: str,
    size: int,
) -> None:
    body = bytes(i * i % 251 for i in range(size))
    data = framed(version, framing, body)

    def answer(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(data)
        return framing != "close" and version == b"1.1"

    upstream.script(answer)
    with service.client() as client:
        client.send(request(b"GET / HTTP/" + client_version))
        reply = client.reply()
        assert (reply.status, reply.body == body, reply.complete) == (200, True, True)
        if framing == "length":
            assert reply.get("Content-Length") == str(size)
        elif client_version == b"1.1":
            assert reply.get("Transfer-Encoding") == "chunked"
        else:
            assert reply.get("Transfer-Encoding") is None
        if client_version == b"1.0":
            assert client.closed()
        else:
            # However the upstream framed it, the client's connection goes on.
            client.send(request())
            assert client.reply().body == body


@pytest.mark.parametrize(
    "body",
    [
        b"00000A\r\n0123456789\r\n0\r\n\r\n",
        b'a;x=y;z="q;\\""\r\n0123456789\r\n0;last\r\n\r\n',
        b"5\r\n01234\r\n5\r\n56789\r\n0\r\nX-Sum: 1\r\nContent-Length: 3\r\n\r\n",
        b"A \r\n0123456789\r\n000\r\n\r\n",
    ],
)
def test_chunk_extensions_and_trailers_of_an_answer_stop_here(
    service: Service, upstream: ScriptedUpstream, body: bytes
) -> None:
    upstream.script(message(b"HTTP/1.1 200 OK", CHUNKED, b"Trailer: X-Sum", body=body))
    with service.client() as client:
        for _ in range(2):
            client.send(request())
            reply = client.reply()
            assert (reply.body, reply.complete) == (b"0123456789", True)
            assert reply.get("X-Sum") is reply.get("Trailer") is None
        assert client.buffer == b""
    # Reading up to the end of the trailers leaves the connection fit for the next request.
    assert len({seen.connection for seen in upstream.seen}) == 1


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked", b"\tCHUNKED "])
def test_the_coding_is_read_without_regard_to_case(
    service: Service, upstream: ScriptedUpstream, coding: bytes
) -> None:
    answer = message(b"HTTP/1.1 200 OK", b"Transfer-Encoding:" + coding, body=chunked(b"hi"))
    _, reply = forward(service, upstream, request(), answer)
    assert (reply.body, reply.all("Transfer-Encoding")) == (b"hi", ["chunked"])


@pytest.mark.parametrize("asked", [[], [b"Accept-Encoding: gzip"], [b"Accept-Encoding: identity"]])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_a_compressed_answer_is_not_decompressed(
    service: Service, upstream: ScriptedUpstream, asked: list[bytes], framing: str
) -> None:
    packed = gzip.compress(b"hello" * 1000)
    data = framed(b"1.1", framing, packed).replace(b" OK", b" OK\r\nContent-Encoding: gzip", 1)

    def answer(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(data)
        return framing != "close"

    seen, reply = forward(service, upstream, request(b"GET / HTTP/1.1", *asked), answer)
    assert (reply.body, reply.get("Content-Encoding")) == (packed, "gzip")
    assert seen.get("Accept-Encoding") == (asked[0].decode()[17:] if asked else None)


BODILESS = [
    ("HEAD", [b"HTTP/1.1 200 OK", b"Content-Length: 12345"], {"Content-Length": "12345"}),
    ("HEAD", [b"HTTP/1.1 404 No", b"Content-Length: 0"], {"Content-Length": "0"}),
    ("HEAD", [b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked"], {"Content-Length": None}),
    ("HEAD", [b"HTTP/1.1 200 OK"], {"Content-Length": None}),
    ("HEAD", [b"HTTP/1.1 304 Not Modified", b'ETag: "a"'], {"ETag": '"a"'}),
    ("GET", [b"HTTP/1.1 204 No Content"], {"Content-Length": None, "Transfer-Encoding": None}),
    ("DELETE", [b"HTTP/1.1 204 No Content", b"X-A: 1"], {"X-A": "1"}),
    (
        "GET",
        [b"HTTP/1.1 304 Not Modified", b'ETag: "a"', b"Last-Modified: x", b"Content-Type: y/z"],
        {"ETag": '"a"', "Last-Modified": "x", "Content-Type": "y/z", "Transfer-Encoding": None},
    ),
    ("GET", [b"HTTP/1.1 304 Not Modified", b"Content-Length: 12345"], {"Content-Length": "12345"}),
]


@pytest.mark.parametrize("client_version", [b"1.1", b"1.0"])
@pytest.mark.parametrize(("method", "head", "expected"), BODILESS)
def test_answers_without_a_body_carry_no_body_byte(
    service: Service,
    upstream: ScriptedUpstream,
    method: str,
    head: list[bytes],
    expected: dict[str, str | None],
    client_version: bytes,
) -> None:
    upstream.script(message(head[0], *head[1:]))
    with service.client() as client:
        client.send(request(b"%s / HTTP/%s" % (method.encode(), client_version)))
        reply = Reply(client.head(), b"", True)
        assert {name: reply.get(name) for name in expected} == expected
        if client_version == b"1.1":
            # Whatever followed the head would be taken for the next answer.
            client.send(request(b"GET /health/live HTTP/1.1"))
            assert client.reply().status == 200
            client.send(request(b"%s / HTTP/1.1" % method.encode()))
            assert client.head().split(b"\r\n")[0] == head[0]
        assert client.buffer == b""


def test_a_205_with_an_empty_body_is_framed(service: Service, upstream: ScriptedUpstream) -> None:
    _, reply = forward(service, upstream, request(), message(b"HTTP/1.1 205 Reset", LENGTH_0))
    assert (reply.status, reply.get("Content-Length")) == (205, "0")


@pytest.mark.parametrize(
    "interim",
    [
        [b"HTTP/1.1 100 Continue"],
        [b"HTTP/1.1 102 Processing"],
        [b"HTTP/1.1 104 Upload Resumption Supported", b"Content-Length: 99"],
        [b"HTTP/1.1 199 Any", b"Transfer-Encoding: chunked", b"Set-Cookie: a=1"],
    ],
)
@pytest.mark.parametrize("times", [1, 30])
def test_interim_answers_are_skipped(
    service: Service, upstream: ScriptedUpstream, interim: list[bytes], times: int
) -> None:
    upstream.script(
        lambda sock, seen: sock.sendall(
            message(interim[0], *interim[1:]) * times
            + message(b"HTTP/1.1 200 OK", b"Content-Length: 2", b"X-To: " + seen.target, body=b"hi")
        )
    )
    with service.client() as client:
        for target in (b"/1", b"/2"):
            client.send(request(b"GET %s HTTP/1.1" % target))
            head = client.head()
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert lines(head) == [b"X-To: " + target]
            while len(client.buffer) < 2:
                client.buffer += client.sock.recv(10)
            assert client.buffer == b"hi"
            client.buffer = b""
    assert [seen.connection for seen in upstream.seen] == [upstream.seen[0].connection] * 2


@pytest.mark.parametrize(
    ("status", "version"),
    [(b"102 Processing", b"1.1"), (b"103 Early Hints", b"1.0"), (b"100 Continue", b"1.1")],
)
def test_an_interim_answer_that_comes_long_before_the_final_one_is_skipped(
    service: Service, upstream: ScriptedUpstream, status: bytes, version: bytes
) -> None:
    """HTTP/1.0 has none (RFC 9110 section 15.2), and nobody asked for a 100."""
    go_on = threading.Event()

    def answer(sock: socket.socket, seen: Seen) -> None:
        sock.sendall(message(b"HTTP/1.1 " + status, b"Link: </a.css>"))
        go_on.wait(10)
        sock.sendall(message(b"HTTP/1.1 200 OK", LENGTH_0))

    upstream.script(answer)
    with service.client() as client:
        client.send(request(b"GET / HTTP/" + version))
        client.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.head()
        go_on.set()
        client.sock.settimeout(15)
        assert client.head().startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("times", [1, 30])
def test_early_hints_pass_at_once_without_what_is_this_hop_s(
    service: Service, upstream: ScriptedUpstream, times: int
) -> None:
    """RFC 8297. They are with the client before the answer is there."""
    go_on = threading.Event()
    hints = [b"Link: </a.css>; rel=preload", b"link: </b.js>", b"X-Bytes: \xe9"]
    hop = [
        b"Connection: X-Hop",
        b"X-Hop: 1",
        b"Keep-Alive: 5",
        b"Alt-Svc: clear",
        b"X-Request-Id: a",
    ]
    hop += [b"Content-Length: 99"]  # which none may have (RFC 9110 section 8.6)

    def answer(sock: socket.socket, seen: Seen) -> None:
        sock.sendall(message(b"HTTP/1.1 103 Early Hints", *hints, *hop) * times)
        assert go_on.wait(10)
        go_on.clear()
        sock.sendall(
            message(b"HTTP/1.1 200 OK", b"Content-Length: 2", b"X-To: " + seen.target, body=b"hi")
        )

    upstream.script(answer)
    with service.client() as client:
        for target in (b"/1", b"/2"):
            client.send(request(b"GET %s HTTP/1.1" % target))
            for _ in range(times):
                assert client.head().split(b"\r\n") == [b"HTTP/1.1 103 Early Hints", *hints]
            assert client.buffer == b""
            go_on.set()
            reply = client.reply()
            assert (reply.status, reply.body, reply.get("X-To")) == (200, b"hi", target.decode())
            assert reply.get("Link") is None
    assert [seen.connection for seen in upstream.seen] == [upstream.seen[0].connection] * 2


def test_early_hints_are_not_sent_before_the_answers_before_theirs(
    service: Service, upstream: ScriptedUpstream
) -> None:
    answer = message(b"HTTP/1.1 103 Early Hints", b"Link: </a.css>")
    upstream.script(answer + message(b"HTTP/1.1 200 OK", b"Content-Length: 2", body=b"hi"))
    with service.client() as client:
        client.send(request() * 3)
        for _ in range(3):
            assert client.head().startswith(b"HTTP/1.1 103 ")
            assert client.reply().body == b"hi"


class Pieces:
    """An answer whose pieces are sent one by one, when the test says so."""

    def __init__(self, framing: str, pieces: list[bytes]) -> None:
        self.framing = framing
        self.pieces = pieces
        self.go_on = threading.Semaphore(0)
        self.sent: list[float] = []

    def __call__(self, sock: socket.socket, seen: Seen) -> bool:
        head = [b"HTTP/1.1 200 OK", b"Content-Type: text/event-stream"]
        if self.framing == "length":
            head.append(b"Content-Length: %d" % sum(map(len, self.pieces)))
        elif self.framing == "chunked":
            head.append(CHUNKED)
        sock.sendall(message(*head))
        for piece in self.pieces:
            if not self.go_on.acquire(timeout=10):
                return False
            self.sent.append(time.monotonic())
            sock.sendall(chunked(piece)[:-5] if self.framing == "chunked" else piece)
        if not self.go_on.acquire(timeout=10):
            return False
        sock.sendall(b"0\r\n\r\n" if self.framing == "chunked" else b"")
        return self.framing != "close"


def read_piece(client: RawClient, piece: bytes, is_chunked: bool) -> None:
    """Read exactly one piece, in a chunk of its own where the coding is chunked."""
    expected = chunked(piece)[:-5] if is_chunked else piece
    while len(client.buffer) < len(expected):
        data = client.sock.recv(65536)
        assert data, client.buffer
        client.buffer += data
    assert client.buffer == expected
    client.buffer = b""


@pytest.mark.parametrize("client_version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_each_piece_is_with_the_client_before_the_next_is_sent(
    service: Service, upstream: ScriptedUpstream, framing: str, client_version: bytes
) -> None:
    pieces = Pieces(framing, [b"data: %d\n\n" % i for i in range(10)] + [b"x", b"y" * 1000])
    upstream.script(pieces)
    is_chunked = framing != "length" and client_version == b"1.1"
    with service.client() as client:
        client.send(request(b"GET /events HTTP/" + client_version))
        # The head too is sent on before there is any body.
        head = client.head()
        assert (b"Transfer-Encoding: chunked" in head) is is_chunked
        for piece in pieces.pieces:
            pieces.go_on.release()
            read_piece(client, piece, is_chunked)
        pieces.go_on.release()
        if is_chunked:
            read_piece(client, b"", True)
        elif client_version == b"1.0":
            assert client.closed()


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_a_piece_leaves_within_20_ms_of_its_arrival(
    service: Service, upstream: ScriptedUpstream, framing: str
) -> None:
    pieces = Pieces(framing, [b"data: %d\n\n" % i for i in range(30)])
    upstream.script(pieces)
    delays = []
    with service.client() as client:
        client.send(request(b"GET /events HTTP/1.1"))
        client.head()
        for i, piece in enumerate(pieces.pieces):
            pieces.go_on.release()
            read_piece(client, piece, framing != "length")
            delays.append(time.monotonic() - pieces.sent[i])
        pieces.go_on.release()
    # The median: a single delay also tells of what else the machine had to do.
    assert statistics.median(delays) < 0.02, delays


def test_a_stream_does_not_wait_for_other_streams(
    service: Service, upstream: ScriptedUpstream
) -> None:
    streams = [Pieces("chunked", [b"first", b"last"]) for _ in range(8)]
    upstream.script(lambda sock, seen: streams[int(seen.target[1:])](sock, seen))
    clients = [service.client() for _ in streams]
    for i, client in enumerate(clients):
        client.send(request(b"GET /%d HTTP/1.1" % i))
        client.head()
    for piece in (b"first", b"last"):
        for client, stream in reversed(list(zip(clients, streams, strict=True))):
            stream.go_on.release()
            read_piece(client, piece, True)
    for client, stream in zip(clients, streams, strict=True):
        stream.go_on.release()
        read_piece(client, b"", True)
        client.close()


@pytest.mark.parametrize("slice_size", [1, 3])
def test_an_answer_that_arrives_in_slivers_is_put_together(
    service: Service, upstream: ScriptedUpstream, slice_size: int
) -> None:
    data = message(b"HTTP/1.1 200 OK", b"X-A: 1", CHUNKED, body=chunked(b"hello", b" ", b"world"))

    def answer(sock: socket.socket, seen: Seen) -> None:
        for start, end in pairwise(range(0, len(data) + slice_size, slice_size)):
            sock.sendall(data[start:end])

    _, reply = forward(service, upstream, request(), answer)
    assert (reply.get("X-A"), reply.body, reply.complete) == ("1", b"hello world", True)


@pytest.mark.parametrize("line", [b"Connection: close", b"connection: Foo, CLOSE"])
def test_a_client_that_asks_for_it_has_its_connection_closed(
    service: Service, upstream: ScriptedUpstream, line: bytes
) -> None:
    upstream.script(message(b"HTTP/1.1 200 OK", b"Content-Length: 2", body=b"hi"))
    with service.client() as client:
        client.send(request(b"GET / HTTP/1.1", line))
        reply = client.reply()
        assert (reply.body, (reply.get("Connection") or "").lower()) == (b"hi", "close")
        assert client.closed()


def test_the_upstream_closing_its_connection_does_not_close_the_clients(
    service: Service, upstream: ScriptedUpstream
) -> None:
    def answer(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(message(b"HTTP/1.1 200 OK", b"Connection: close", LENGTH_0))
        return False

    upstream.script(answer)
    with service.client() as client:
        for _ in range(3):
            client.send(request())
            reply = client.reply()
            assert (reply.status, reply.get("Connection")) == (200, None)


@pytest.mark.parametrize("rest", ["unread", "read"])
def test_an_answer_that_comes_before_the_body_was_read_is_passed_on(
    service: Service, upstream: ScriptedUpstream, rest: str
) -> None:
    done = threading.Event()

    def refuse(sock: socket.socket, seen: Seen) -> bool:
        head = [b"HTTP/1.1 413 Too Large", b"Connection: close", b"Content-Length: 4"]
        sock.sendall(message(*head, body=b"full"))
        if rest == "read":
            while sock.recv(65536):
                pass
        else:
            done.wait(10)
        return False

    upstream.script(b"")
    upstream.early = refuse
    body = b"x" * 20_000_000
    data = request(b"POST / HTTP/1.1", b"Content-Length: %d" % len(body), body=body)
    reply = service.exchange(data, "POST")
    done.set()
    assert (reply.status, reply.body, reply.complete) == (413, b"full", True)


def test_an_urgent_byte_in_a_large_body_stops_nothing(
    service: Service, upstream: ScriptedUpstream
) -> None:
    """The kernel moves nothing past it: the loop tried that as fast as it could, and the answer
    never came to its end."""
    body = os.urandom(4_000_000)

    def answer(sock: socket.socket, seen: Seen) -> None:
        sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body)))
        sock.sendall(body[:2_000_000])
        sock.send(b"!", socket.MSG_OOB)  # It is no part of the body.
        sock.sendall(body[2_000_000:])

    upstream.script(answer)
    reply = service.call("GET", "/")
    assert reply.complete and reply.body == body


def test_an_upstream_that_answers_as_it_reads_gets_all_of_the_body(
    service: Service, upstream: ScriptedUpstream
) -> None:
    """Its answer was taken for a refusal: the rest was not sent, and both waited for the other."""
    upstream.script(b"")
    upstream.early = echo_at_once
    body = os.urandom(20_000_000)
    head = request(b"POST /echo HTTP/1.1", b"Content-Length: %d" % len(body))
    with service.client() as client:
        reply = client.converse(head + body, "POST")
    assert (reply.status, reply.complete) == (200, True)
    assert reply.body == body


def test_a_reset_while_the_body_is_sent_never_looks_like_the_answer_s_end(
    service: Service, upstream: ScriptedUpstream
) -> None:
    def die(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(message(b"HTTP/1.1 200 OK", body=b"half"))
        sock.recv(65536)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        return False

    upstream.script(b"")
    upstream.early = die
    body = b"x" * 20_000_000
    head = request(b"POST / HTTP/1.1", b"Content-Length: %d" % len(body))
    for _ in range(10):
        with service.client() as client:
            client.send(head + body)
            reply = client.reply("POST")
            assert (reply.status, reply.complete) == (200, False)
