"""What the upstream receives: request line and target, headers, bodies and their framing."""

from __future__ import annotations

import gzip
import select
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.harness import (
    DEAD_DATABASE,
    PROXY_SETS,
    ScriptedUpstream,
    Seen,
    Service,
    chunked,
    forward,
    message,
    ok,
    problem,
    request,
)


@pytest.fixture(scope="module")
def database() -> str:
    """No database: no proxied request may depend on one."""
    return DEAD_DATABASE


@pytest.fixture(scope="module")
def limited(upstream: ScriptedUpstream) -> Iterator[Service]:
    with Service(UPSTREAM_URL=upstream.url, MAX_BODY_BYTES=1000) as running:
        yield running


TARGETS = [
    b"/",
    b"//",
    b"/a//b///c",
    b"//evil.example/a",
    b"///",
    b"/a/../b/./c/..",
    b"/../../a",
    b"/./",
    b"/?",
    b"/a?",
    b"/a??b=?",
    b"/a?b=2&b=1&a=&&=;c;d",
    b"/a?next=http://evil.example/../x",
    b"/%7e~%7E%41",
    b"/%2F%2f%5c%2e%2E/",
    b"/%00%0a%0D%0AX-Injected:%20yes",
    b"/%",
    b"/%zz%4",
    b"/a%20b+c",
    b"/a|b^c`d{e}<f>\"g'h\\i[j]",
    b"/a;v=1/b,c:d@e!$&'()*=",
    b"/a#b",
    b"/@evil.example",
    b"/http://evil.example/",
    b"/\xc3\xa9/\xff\x80?\xe9=\xa0",
    b"/" + b"long/" * 1600,
]


@pytest.fixture(scope="module")
def replacing(upstream: ScriptedUpstream) -> Iterator[Service]:
    with Service(UPSTREAM_URL=upstream.url, UPSTREAM_PRESERVE_HOST="off") as running:
        yield running


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: repr(target[:40]))
def test_the_target_arrives_byte_for_byte(
    service: Service, upstream: ScriptedUpstream, target: bytes
) -> None:
    seen, reply = forward(service, upstream, request(b"GET %s HTTP/1.1" % target))
    assert seen.request_line == b"GET %s HTTP/1.1" % target
    assert (reply.status, reply.body) == (200, b"ok")


@pytest.mark.parametrize(
    ("target", "arrives"),
    [
        (b"http://other.example/a//b?c", b"/a//b?c"),
        (b"HTTPS://other.example:444/%7e/..?", b"/%7e/..?"),
        (b"http://user:secret@other.example/a@b", b"/a@b"),
        (b"http://[::1]:9/a", b"/a"),
        (b"http://other.example", b"/"),
        (b"http://other.example?a=/b", b"/?a=/b"),
        (b"http://other.example/users.json", b"/users.json"),
    ],
)
def test_an_absolute_target_arrives_as_its_path_and_query(
    replacing: Service, upstream: ScriptedUpstream, target: bytes, arrives: bytes
) -> None:
    seen, _ = forward(replacing, upstream, request(b"GET %s HTTP/1.1" % target))
    assert seen.target == arrives
    assert seen.get("Host") == f"127.0.0.1:{upstream.port}"


def test_options_of_the_whole_server_keeps_its_asterisk(
    service: Service, upstream: ScriptedUpstream
) -> None:
    seen, _ = forward(service, upstream, request(b"OPTIONS * HTTP/1.1"))
    assert seen.request_line == b"OPTIONS * HTTP/1.1"


@pytest.mark.parametrize(
    "target",
    [
        b"/healthy",
        b"/health.json",
        b"/users.json",
        b"/Users",
        b"/usersx/1",
        b"//users",
        b"/a/users",
        b"/a/../users",
        b"/?/users",
        b"/users%2",
        b"/users;v=1",
        b"/us%FFers",
    ],
)
def test_paths_that_only_look_like_owned_ones_are_the_upstreams(
    service: Service, upstream: ScriptedUpstream, target: bytes
) -> None:
    seen, _ = forward(service, upstream, request(b"GET %s HTTP/1.1" % target))
    assert seen.target == target


@pytest.mark.parametrize(
    "target",
    [
        b"/users?limit=1",
        b"/users/",
        b"/%75sers/1",
        b"/health/nothing",
        b"/users%2F1",
        b"/%68ealth/x?y",
        b"http://other.example/users",
    ],
)
def test_owned_paths_never_reach_the_upstream(
    service: Service, upstream: ScriptedUpstream, target: bytes
) -> None:
    upstream.script(b"HTTP/1.1 299 Upstream\r\nContent-Length: 0\r\n\r\n")
    assert service.exchange(request(b"GET %s HTTP/1.1" % target)).status != 299
    assert upstream.seen == []


@pytest.mark.parametrize("prefix", ["/base", "/base/", "/b%2Fa//se"])
def test_the_path_of_the_upstream_url_is_a_prefix(
    start: Callable[..., Service], upstream: ScriptedUpstream, prefix: str
) -> None:
    service = start(UPSTREAM_URL=upstream.url + prefix)
    joined = prefix.rstrip("/").encode()
    for target in (b"/", b"/a", b"//a", b"/../a", b"/?", b"/a%2fb?c=/d", b"/%zz"):
        seen, _ = forward(service, upstream, request(b"GET %s HTTP/1.1" % target))
        assert seen.target == joined + target
    seen, _ = forward(service, upstream, request(b"GET http://other.example?q HTTP/1.1"))
    assert seen.target == joined + b"/?q"
    seen, _ = forward(service, upstream, request(b"OPTIONS * HTTP/1.1"))
    assert seen.target == b"*"


METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"]


@pytest.mark.parametrize("method", [*METHODS, "PROPFIND", "M-SEARCH", "get", "!#$%&'*+-.^_`|~09"])
def test_any_method_token_is_forwarded_as_it_is(
    service: Service, upstream: ScriptedUpstream, method: str
) -> None:
    seen, reply = forward(service, upstream, request(b"%s /a HTTP/1.1" % method.encode()))
    assert (seen.method, reply.status) == (method, 200)


@pytest.mark.parametrize("target", [b"other.example:443", b"/a", b"http://other.example/"])
def test_connect_is_405(service: Service, upstream: ScriptedUpstream, target: bytes) -> None:
    upstream.script(b"")
    reply = service.exchange(request(b"CONNECT %s HTTP/1.1" % target))
    problem(reply, 405, "method-not-allowed")
    assert upstream.seen == []


@pytest.mark.parametrize("target", [b"other.example:443", b"/a", b"/users", b"/health/live"])
def test_what_follows_a_connect_is_no_request(
    service: Service, upstream: ScriptedUpstream, target: bytes
) -> None:
    """A client that does not wait for its tunnel sends what others may have given it to send."""
    upstream.script(ok)
    with service.client() as client:
        client.send(request(b"CONNECT %s HTTP/1.1" % target) + request(b"GET /b HTTP/1.1"))
        reply = client.reply()
        problem(reply, 405, "method-not-allowed")
        assert reply.get("Connection") == "close" and client.closed()
    assert upstream.seen == []


@pytest.mark.parametrize(
    "line",
    [
        b"GET a HTTP/1.1",
        b"GET other.example HTTP/1.1",
        b"GET other.example:80 HTTP/1.1",
        b"GET other.example/a HTTP/1.1",
        b"GET @other.example/ HTTP/1.1",
        b"GET :80/ HTTP/1.1",
        b"GET ?a HTTP/1.1",
        b"GET #a HTTP/1.1",
        b"GET \\\\other.example\\a HTTP/1.1",
        b"GET %2Fa HTTP/1.1",
        b"GET * HTTP/1.1",
        b"OPTIONS ** HTTP/1.1",
        b"GET ftp://other.example/ HTTP/1.1",
        b"GET http:/a HTTP/1.1",
        b"GET http:// HTTP/1.1",
        b"GET http:///a HTTP/1.1",
        b"GET /a b HTTP/1.1",
        b"GET  /a HTTP/1.1",
        b"GET /a  HTTP/1.1",
        b"GET /a HTTP/1.1 ",
        b"GET /a\tb HTTP/1.1",
        b"GET /a\x00b HTTP/1.1",
        b"GET /a\x01b HTTP/1.1",
        b"GET /a\x0bb HTTP/1.1",
        b"GET /a\x7f HTTP/1.1",
        b"GET /a\rb HTTP/1.1",
        b"G(ET /a HTTP/1.1",
        b"G\xc3\x89T /a HTTP/1.1",
        b"GET: /a HTTP/1.1",
        b"GET /a",
        b"GET",
        b"GET /a HTTP/1",
        b"GET /a HTTP/1.1x",
        b"GET /a HTTP/1.12",
        b"GET /a http/1.1",
        b"GET /a XTTP/1.1",
    ],
)
def test_a_malformed_request_line_is_400(
    service: Service, upstream: ScriptedUpstream, line: bytes
) -> None:
    upstream.script(b"")
    problem(service.exchange(request(line)), 400, "bad-request")
    assert upstream.seen == []


@pytest.mark.parametrize("version", [b"2.0", b"3.0", b"0.9", b"2.1", b"9.9"])
@pytest.mark.parametrize("target", [b"/a", b"/health/live"])
def test_a_version_of_http_that_is_not_1_is_505(
    service: Service, upstream: ScriptedUpstream, version: bytes, target: bytes
) -> None:
    """Also the preface of HTTP/2, whose rest is no request: the connection ends."""
    upstream.script(b"")
    for line in (b"GET %s HTTP/%s" % (target, version), b"PRI * HTTP/" + version):
        with service.client() as client:
            client.send(request(line) + b"SM\r\n\r\n")
            problem(client.reply(), 505, "http-version-not-supported")
            assert client.closed()
    assert upstream.seen == []


@pytest.mark.parametrize("version", [b"1.2", b"1.9"])
def test_a_later_version_of_http_1_is_served_as_1_1(
    service: Service, upstream: ScriptedUpstream, version: bytes
) -> None:
    """RFC 9110 section 2.5. So it has chunks, keeps its connection, and must name its host."""
    upstream.script(message(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked", body=chunked(b"ok")))
    data = request(
        b"POST /a HTTP/" + version, b"Transfer-Encoding: chunked", body=chunked(b"h", b"i")
    )
    with service.client() as client:
        for _ in range(2):
            client.send(data)
            reply = client.reply()
            assert reply.status_line == b"HTTP/1.1 200 OK"
            assert (reply.body, reply.get("Transfer-Encoding")) == (b"ok", "chunked")
            assert reply.get("Connection") is None
        client.send(message(b"GET /a HTTP/" + version, b"X-A: 1"))
        problem(client.reply(), 400, "bad-request")
        assert client.closed()
    assert [seen.request_line for seen in upstream.seen] == [b"POST /a HTTP/1.1"] * 2
    assert [seen.body for seen in upstream.seen] == [b"hi"] * 2
    assert {(seen.get("Via") or "").partition(" ")[0] for seen in upstream.seen} == {"1.1"}


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET / HTTP/1.1\nHost: h\n\n"],
        [b"GET / HTTP/1.1\r\nHost: h\r\n\n"],
        [b"GET / HTTP/1.1\r", b"\nHost: h\r\nX-A: 1", b"\n\r\n"],
    ],
)
def test_a_head_with_a_lone_line_feed_is_400_at_once(
    service: Service, upstream: ScriptedUpstream, pieces: list[bytes]
) -> None:
    """Its end would be waited for in vain."""
    upstream.script(b"")
    with service.client(timeout=5) as client:
        for piece in pieces:
            client.send(piece)
            threading.Event().wait(0.05)  # so that it is read by itself
        problem(client.reply(), 400, "bad-request")
        assert client.closed()
    assert upstream.seen == []


def test_header_lines_arrive_in_their_order_and_case_and_nothing_is_invented(
    replacing: Service, upstream: ScriptedUpstream
) -> None:
    lines = [
        b"x-UPPER-lower: 1",
        b"Cookie: a=1; b=2",
        b"Accept: text/html, */*;q=0.1",
        b"Cookie: c=3",
        b"accept: text/plain",
        b"Authorization: Basic dXNlcjpwYXNz",
        b"X-Empty:",
        b'X-Inner: a  b \t c, "d, e" (f)',
        b"X-Bytes: \xc3\xa9\xff\x80",
        b"X_Under_Score: 1",
        b"!#$%&'*+-.^_`|~09: token",
        b"Range: bytes=0-9",
        b'If-None-Match: W/"a"',
        b"Origin: null",
        b"Date: Tue, 15 Nov 1994 08:12:31 GMT",
        b"Max-Forwards: 0",
        b"Trailers: not a hop-by-hop name",
        b"Content-Type: text/plain",
        b"Content-Encoding: br",
    ]
    seen, _ = forward(replacing, upstream, request(b"GET / HTTP/1.1", *lines))
    head = [line.rstrip() for line in seen.head.split(b"\r\n")]
    assert head[: len(lines) + 2] == [
        b"GET / HTTP/1.1",
        b"Host: 127.0.0.1:%d" % upstream.port,
        *lines,
    ]
    rest = [line.partition(b":")[0].decode() for line in head[len(lines) + 2 :]]
    assert sorted(rest) == PROXY_SETS


def test_white_space_around_a_value_is_not_part_of_it(
    service: Service, upstream: ScriptedUpstream
) -> None:
    seen, _ = forward(
        service, upstream, request(b"GET / HTTP/1.1", b"X-A:1", b"X-B: \t 2 \t ", b"X-C:\t")
    )
    assert [line for line in seen.head.split(b"\r\n") if line.startswith((b"X-A", b"X-B"))] == [
        b"X-A: 1",
        b"X-B: 2",
    ]
    assert seen.all("X-C") == [""]


def test_many_and_long_header_lines_arrive_whole(
    service: Service, upstream: ScriptedUpstream
) -> None:
    lines = [b"X-%d: %s" % (i, b"v" * i) for i in range(150)] + [b"Cookie: " + b"c" * 50_000]
    seen, _ = forward(service, upstream, request(b"GET / HTTP/1.1", *lines))
    assert [line.rstrip() for line in seen.head.split(b"\r\n")[2 : -len(PROXY_SETS)]] == [
        line.rstrip() for line in lines
    ]


@pytest.mark.parametrize(
    "lines",
    [[b"Cookie: " + b"c" * 65_536], [b"X-A: " + b"a" * 40_000] * 2, [b"X-A: 1"] * 201],
    ids=["a long line", "long lines", "many lines"],
)
def test_a_head_over_64_kib_or_200_lines_is_400(
    service: Service, upstream: ScriptedUpstream, lines: list[bytes]
) -> None:
    upstream.script(b"")
    problem(service.exchange(request(b"GET / HTTP/1.1", *lines)), 400, "bad-request")
    assert upstream.seen == []


HOP_BY_HOP = [
    b"Connection: close",
    b"Connection:",
    b"Connection: ,, ,",
    b"Proxy-Connection: keep-alive",
    b"Keep-Alive: timeout=5",
    b"TE: trailers, deflate",
    b"Trailer: X-Sum",
    b"Upgrade: h2c",
    b"Upgrade: TLS/1.0, IRC/6.9",
    b"Proxy-Authorization: Basic dXNlcjpwYXNz",
    b"kEEP-aLIVE: 1",
]


@pytest.mark.parametrize("line", HOP_BY_HOP)
def test_hop_by_hop_lines_stop_here(
    service: Service, upstream: ScriptedUpstream, line: bytes
) -> None:
    seen, reply = forward(service, upstream, request(b"GET / HTTP/1.1", line, b"X-Kept: 1"))
    assert reply.status == 200
    assert [name for name, _ in seen.headers[:2]] == ["Host", "X-Kept"]
    assert sorted(name for name, _ in seen.headers[2:]) == PROXY_SETS


@pytest.mark.parametrize(
    "lines",
    [
        [b"Connection: X-Hop, X-Other"],
        [b"Connection: x-hop,close,x-OTHER"],
        [b"Connection: X-Hop", b"Connection: keep-alive, X-Other"],
        [b"Connection:", b"Connection: ,X-Other ,, \t X-Hop\t,"],
        [b"connection: HTTP2-Settings, upgrade, x-hop, x-other", b"Upgrade: h2c"],
        [b"Connection: x-hop, x-other, x_under", b"X_Under: 1"],
    ],
)
def test_lines_that_connection_names_stop_here(
    service: Service, upstream: ScriptedUpstream, lines: list[bytes]
) -> None:
    hop = [b"X-Hop: 1", b"X-OTHER: 2", b"x-hop: 3"]
    seen, _ = forward(
        service, upstream, request(b"GET / HTTP/1.1", b"X-Kept: 1", *hop, *lines, *hop)
    )
    assert [name for name, _ in seen.headers[:2]] == ["Host", "X-Kept"]
    assert sorted(name for name, _ in seen.headers[2:]) == PROXY_SETS


def test_connection_cannot_remove_the_host_the_framing_or_what_the_proxy_sets(
    service: Service, upstream: ScriptedUpstream
) -> None:
    named = ", ".join(["Host", "Content-Length", *PROXY_SETS])
    data = request(
        b"POST / HTTP/1.1", f"Connection: {named}".encode(), b"Content-Length: 2", body=b"hi"
    )
    seen, _ = forward(service, upstream, data)
    assert seen.body == b"hi"
    assert sorted(name for name, _ in seen.headers) == sorted(
        ["Host", "Content-Length", *PROXY_SETS]
    )


@pytest.mark.parametrize(
    "lines",
    [
        [b"Connection: Upgrade", b"Upgrade: websocket"],
        [b"connection: keep-alive, X-Hop, upgrade", b"X-Hop: 1", b"UPGRADE: WebSocket"],
        [b"Connection: keep-alive", b"Connection: UPGRADE", b"Upgrade: h2c, WebSocket"],
    ],
)
def test_a_websocket_upgrade_is_forwarded_with_both_lines(
    service: Service, upstream: ScriptedUpstream, lines: list[bytes]
) -> None:
    """Nothing else that was offered is; and any other answer than a 101 is an ordinary one."""
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    upstream.script(ok)
    with service.client() as client:
        for _ in range(2):
            client.send(request(b"GET /ws HTTP/1.1", *lines, key))
            reply = client.reply()
            assert (reply.status, reply.body, reply.get("Connection")) == (200, b"ok", None)
    for seen in upstream.seen:
        assert seen.all("Upgrade") == ["websocket"]
        assert [value.lower() for value in seen.all("Connection")] == ["upgrade"]
        assert seen.get("Sec-WebSocket-Key") == "dGhlIHNhbXBsZSBub25jZQ=="
        assert seen.get("X-Hop") is None
    assert len(upstream.seen) == 2


@pytest.mark.parametrize(
    ("first_line", "lines"),
    [
        (b"GET /ws HTTP/1.0", [b"Connection: Upgrade", b"Upgrade: websocket"]),
        (b"GET /ws HTTP/1.1", [b"Upgrade: websocket"]),
        (b"GET /ws HTTP/1.1", [b"Connection: keep-alive", b"Upgrade: websocket"]),
        (b"GET /ws HTTP/1.1", [b"Connection: Upgrade"]),
        (b"GET /ws HTTP/1.1", [b"Connection: Upgrade", b"Upgrade: websockets"]),
        (b"GET /ws HTTP/1.1", [b"Connection: Upgrade", b"Upgrade: h2c, TLS/1.0"]),
        (b"POST /ws HTTP/1.1", [b"Connection: Upgrade", b"Upgrade: websocket"]),
        (b"get /ws HTTP/1.1", [b"Connection: Upgrade", b"Upgrade: websocket"]),
    ],
)
def test_any_other_upgrade_is_dropped_and_the_request_goes_on(
    service: Service, upstream: ScriptedUpstream, first_line: bytes, lines: list[bytes]
) -> None:
    """RFC 9110 section 7.8. What switches all the same is broken."""
    data = request(first_line, *lines)
    seen, reply = forward(service, upstream, data)
    assert (reply.status, seen.get("Upgrade"), seen.get("Connection")) == (200, None, None)
    switched = message(b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket")
    upstream.script(switched)
    problem(service.exchange(data), 502, "upstream-broken")


def test_the_upstream_is_asked_for_by_its_own_host_where_the_setting_says_so(
    replacing: Service, upstream: ScriptedUpstream
) -> None:
    seen, _ = forward(replacing, upstream, message(b"GET / HTTP/1.1", b"Host: shop.example:81"))
    assert seen.all("Host") == [f"127.0.0.1:{upstream.port}"]
    assert seen.get("X-Forwarded-Host") == "shop.example:81"


@pytest.mark.parametrize("host", ["shop.example", "SHOP.example:81", "[::1]:8080", "127.0.0.1"])
def test_the_clients_host_is_kept(service: Service, upstream: ScriptedUpstream, host: str) -> None:
    seen, _ = forward(service, upstream, message(b"GET / HTTP/1.1", f"Host: {host}".encode()))
    assert seen.all("Host") == [host]
    assert seen.get("X-Forwarded-Host") == host


@pytest.mark.parametrize(("version", "hop"), [(b"1.1", "1.1"), (b"1.0", "1.0")])
def test_via_names_this_hop_after_those_before_it(
    service: Service, upstream: ScriptedUpstream, version: bytes, hop: str
) -> None:
    line = b"GET / HTTP/%s" % version
    seen, _ = forward(service, upstream, request(line, b"Via: 1.0 a, 2 b (c)", b"via: 1.1 d:80"))
    entries = (seen.get("Via") or "").split(", ")
    assert entries[:-1] == ["1.0 a", "2 b (c)", "1.1 d:80"]
    assert entries[-1].startswith(f"{hop} gatehouse-")


def test_an_empty_via_adds_no_empty_member(service: Service, upstream: ScriptedUpstream) -> None:
    seen, _ = forward(service, upstream, request(b"GET / HTTP/1.1", b"Via:", b"Via: 1.0 a"))
    assert (seen.get("Via") or "").startswith("1.0 a, 1.1 gatehouse-")


@pytest.mark.parametrize("value", ["a", "x" * 128, "01936f3e-A._~+/=:@-9"])
def test_a_request_id_that_is_well_formed_is_kept(
    service: Service, upstream: ScriptedUpstream, value: str
) -> None:
    seen, reply = forward(
        service, upstream, request(b"GET / HTTP/1.1", f"x-request-ID: {value}".encode())
    )
    assert seen.all("X-Request-Id") == [value]
    assert reply.all("X-Request-Id") == [value]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [b"X-Request-Id:"],
        [b"X-Request-Id: " + b"x" * 129],
        [b"X-Request-Id: a b"],
        [b"X-Request-Id: a,b"],
        [b'X-Request-Id: "a"'],
        [b"X-Request-Id: <a>"],
        [b"X-Request-Id: \xc3\xa9"],
        [b"X-Request-Id: a", b"X-Request-Id: b"],
    ],
)
def test_a_request_id_that_is_missing_or_malformed_is_made(
    service: Service, upstream: ScriptedUpstream, lines: list[bytes]
) -> None:
    ids = set()
    for _ in range(2):
        seen, reply = forward(service, upstream, request(b"GET / HTTP/1.1", *lines))
        assert len(seen.all("X-Request-Id")) == 1
        assert reply.all("X-Request-Id") == seen.all("X-Request-Id")
        ids.add(seen.get("X-Request-Id"))
    assert len(ids) == 2


EVERY_BYTE = bytes(range(256))
# So many bytes of a body are gathered before the upstream is asked.
GATHERED = 65536
BODIES = [
    b"x",
    EVERY_BYTE,
    b"\r\n0\r\n\r\n",
    EVERY_BYTE * (GATHERED // 256),
    EVERY_BYTE * (GATHERED // 256) + b"x",
    EVERY_BYTE * 4096,
]


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE", "OPTIONS", "QUERY"])
@pytest.mark.parametrize("body", BODIES, ids=len)
def test_a_body_with_a_length_arrives_with_that_length(
    service: Service, upstream: ScriptedUpstream, method: str, body: bytes
) -> None:
    line, length = f"{method} /a HTTP/1.1".encode(), b"Content-Length: %d" % len(body)
    seen, _ = forward(service, upstream, request(line, length, body=body))
    assert (seen.method, seen.body) == (method, body)
    assert seen.all("Content-Length") == [str(len(body))]


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked", b" CHUNKED\t"])
@pytest.mark.parametrize("body", BODIES, ids=len)
def test_a_chunked_body_arrives_with_its_length_or_where_it_is_large_in_chunks(
    service: Service, upstream: ScriptedUpstream, coding: bytes, body: bytes
) -> None:
    pieces = [body[i : i + 70_000] for i in range(0, len(body), 70_000)]
    data = request(b"POST / HTTP/1.1", b"Transfer-Encoding:" + coding, body=chunked(*pieces))
    seen, reply = forward(service, upstream, data)
    assert (seen.body == body, reply.body) == (True, b"ok")
    if len(body) <= GATHERED:
        assert seen.all("Content-Length") == [str(len(body))]
        assert seen.all("Transfer-Encoding") == []
    else:
        assert seen.all("Transfer-Encoding") == ["chunked"]
        assert seen.all("Content-Length") == []


@pytest.mark.parametrize(
    "body",
    [
        b"000002\r\nhi\r\n0\r\n\r\n",
        b'2;a=b;c="d;e"\r\nhi\r\n0;last\r\n\r\n',
        b"1\r\nh\r\n1\r\ni\r\n000\r\n\r\n",
        b"2\r\nhi\r\n0\r\nX-Sum: 1\r\nContent-Length: 99\r\nHost: x\r\n\r\n",
    ],
)
def test_chunk_extensions_and_trailers_stop_here(
    service: Service, upstream: ScriptedUpstream, body: bytes
) -> None:
    data = request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked", body=body)
    seen, _ = forward(service, upstream, data)
    assert seen.body == b"hi"
    assert sorted(name for name, _ in seen.headers) == sorted(
        ["Host", "Content-Length", *PROXY_SETS]
    )


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_no_framing_is_invented_where_there_is_no_body(
    service: Service, upstream: ScriptedUpstream, method: str
) -> None:
    seen, _ = forward(service, upstream, request(f"{method} / HTTP/1.1".encode()))
    assert seen.all("Content-Length") == []


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_empty_body_keeps_its_length(
    service: Service, upstream: ScriptedUpstream, method: str
) -> None:
    line = f"{method} / HTTP/1.1".encode()
    seen, _ = forward(service, upstream, request(line, b"Content-Length: 0"))
    assert seen.all("Content-Length") == ["0"]
    data = request(line, b"Transfer-Encoding: chunked", body=chunked())
    seen, _ = forward(service, upstream, data)
    assert seen.all("Content-Length") == ["0"]


def test_a_compressed_body_is_not_touched(service: Service, upstream: ScriptedUpstream) -> None:
    body = gzip.compress(b"hello")
    lines = [b"Content-Encoding: gzip", b"Content-Length: %d" % len(body)]
    seen, _ = forward(service, upstream, request(b"POST / HTTP/1.1", *lines, body=body))
    assert (seen.body, seen.get("Content-Encoding")) == (body, "gzip")


def test_a_body_sent_byte_by_byte_arrives_whole(
    service: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    data = request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked", body=chunked(b"ab", b"c"))
    with service.client() as client:
        for i in range(len(data)):
            client.send(data[i : i + 1])
        assert client.reply().status == 200
    assert [seen.body for seen in upstream.seen] == [b"abc"]


def test_pipelined_requests_are_answered_in_their_order(
    service: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(
        lambda sock, seen: sock.sendall(
            message(b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(seen.target), body=seen.target)
        )
    )
    with service.client() as client:
        client.send(
            request(b"POST /1 HTTP/1.1", b"Content-Length: 3", body=b"one")
            + request(b"GET /2 HTTP/1.1")
            + request(b"PUT /3 HTTP/1.1", b"Transfer-Encoding: chunked", body=chunked(b"three"))
            + request(b"GET /health/live HTTP/1.1")
            + request(b"GET /4 HTTP/1.1")
        )
        replies = [client.reply() for _ in range(5)]
    bodies = [reply.body for reply in replies]
    assert bodies[:3] + bodies[4:] == [b"/1", b"/2", b"/3", b"/4"]
    assert [seen.body for seen in upstream.seen] == [b"one", b"", b"three", b""]


def test_what_is_pipelined_behind_a_chunked_body_is_no_part_of_it(
    service: Service, upstream: ScriptedUpstream
) -> None:
    """It was counted as chunk extensions, of which there may not be too many: 400."""
    upstream.script(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    times = 2000
    head = request(b"PUT /1 HTTP/1.1", b"Transfer-Encoding: chunked", b"X-A: " + b"a" * 63_000)
    with service.client() as client:
        client.send(head[:-4])
        assert service.call("GET", "/health/live").status == 200  # those bytes have been read
        client.send(head[-4:] + chunked(b"x") + request(b"GET /health/live HTTP/1.1") * times)
        for _ in range(1 + times):
            assert client.reply().status == 200
    assert [seen.body for seen in upstream.seen] == [b"x"]


def test_blank_lines_before_a_request_are_ignored(
    service: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    with service.client() as client:
        client.send(b"\r\n" + request(b"POST /1 HTTP/1.1", b"Content-Length: 1", body=b"x"))
        assert client.reply().status == 200
        client.send(b"\r\n" + request(b"GET /2 HTTP/1.1"))
        assert client.reply().status == 200


def test_a_blank_line_may_arrive_in_two_pieces(
    service: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    with service.client() as client:
        for piece in (b"\r", b"\n\r", b"\n" + request(b"GET /1 HTTP/1.1")):
            client.send(piece)
            assert service.call("GET", "/health/live").status == 200  # it has been read
        assert client.reply().status == 200
    assert [seen.target for seen in upstream.seen] == [b"/1"]


@pytest.mark.parametrize("before", [b"\r", b"\r\r", b"\r\n\r", b"\n\r\r\n"])
def test_a_carriage_return_alone_before_a_request_is_no_blank_line(
    service: Service, upstream: ScriptedUpstream, before: bytes
) -> None:
    upstream.script(ok)
    with service.client() as client:
        client.send(before + request(b"GET /1 HTTP/1.1"))
        problem(client.reply(), 400, "bad-request")
        assert client.closed()
    assert upstream.seen == []


def test_an_http_1_0_request_is_forwarded_as_http_1_1(
    service: Service, upstream: ScriptedUpstream
) -> None:
    data = request(b"POST /a HTTP/1.0", b"Content-Length: 2", body=b"hi")
    seen, reply = forward(service, upstream, data)
    assert seen.request_line == b"POST /a HTTP/1.1"
    assert (seen.body, reply.body) == (b"hi", b"ok")


def test_expect_100_is_answered_before_the_body_is_sent(
    service: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    with service.client() as client:
        client.send(request(b"POST / HTTP/1.1", b"Content-Length: 2", b"Expect: 100-continue"))
        assert client.head().startswith(b"HTTP/1.1 100 ")
        client.send(b"hi")
        assert client.head().startswith(b"HTTP/1.1 200 ")
    [seen] = upstream.seen
    assert (seen.body, seen.get("Expect")) == (b"hi", "100-continue")


@pytest.mark.parametrize("interim", [b"100 Continue", b"102 Processing", b"103 Early Hints"])
def test_an_interim_answer_while_a_body_is_sent_does_not_end_it(
    service: Service, upstream: ScriptedUpstream, interim: bytes
) -> None:
    """It was taken for an early answer: both sides then waited for the other. The pieces of it
    come one by one, as they may."""

    def interim_first(sock: socket.socket, seen: Seen) -> None:
        for piece in (b"HT", b"TP/1.1 1", interim[1:] + b"\r\nX-A: 1", b"\r\n\r\n"):
            sock.sendall(piece)
            assert select.select([sock], [], [], 10)[0]  # more of the body is there

    upstream.script(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    upstream.early = interim_first
    body = b"x" * 5_000_000
    data = request(b"PUT / HTTP/1.1", b"Content-Length: %d" % len(body), body=body)
    reply = service.exchange(data, "PUT")
    assert (reply.status, reply.body) == (200, b"ok")
    [seen] = upstream.seen
    assert seen.body == body


@pytest.mark.parametrize("size", [999, 1000])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_up_to_the_limit_is_forwarded(
    limited: Service, upstream: ScriptedUpstream, size: int, framing: str
) -> None:
    body = b"x" * size
    data = request(b"POST / HTTP/1.1", b"Content-Length: %d" % size, body=body)
    if framing == "chunked":
        data = request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked", body=chunked(body))
    seen, reply = forward(limited, upstream, data)
    assert (seen.body, reply.status) == (body, 200)


@pytest.mark.parametrize("expect", [[], [b"Expect: 100-continue"]])
@pytest.mark.parametrize("length", [b"1001", b"5000000", b"9" * 40])
def test_a_length_over_the_limit_is_413_before_the_body_is_sent(
    limited: Service, upstream: ScriptedUpstream, expect: list[bytes], length: bytes
) -> None:
    upstream.script(b"")
    with limited.client() as client:
        client.send(request(b"POST / HTTP/1.1", b"Content-Length: " + length, *expect))
        # Neither a 100 first: it would ask for the body.
        assert client.head().startswith(b"HTTP/1.1 413 ")
    reply = limited.exchange(request(b"POST / HTTP/1.1", b"Content-Length: " + length, *expect))
    problem(reply, 413, "body-too-large")
    assert upstream.seen == []


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_client_that_sends_too_much_still_reads_its_413(
    limited: Service, upstream: ScriptedUpstream, framing: str
) -> None:
    upstream.script(b"")
    body = b"x" * 900_000
    data = request(b"POST / HTTP/1.1", b"Content-Length: %d" % len(body), body=body)
    if framing == "chunked":
        data = request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked", body=chunked(body))
    with limited.client() as client:
        client.send(data)
        problem(client.reply(), 413, "body-too-large")
        assert client.closed()
    assert upstream.seen == []


def test_a_body_that_is_cut_never_reaches_the_upstream(
    service: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    for framing, part in (
        (b"Content-Length: 10", b"12345"),
        (b"Transfer-Encoding: chunked", b"5\r\n12345\r\n"),
        (b"Transfer-Encoding: chunked", b"5\r\n12345\r\n0\r\n"),
    ):
        with service.client() as client:
            client.send(request(b"POST /cut HTTP/1.1", framing, body=part))
    # A later request shows that the service has read what came before it.
    assert service.exchange(request(b"GET /after HTTP/1.1")).status == 200
    assert [seen.target for seen in upstream.seen] == [b"/after"]
