"""Whatever is sent, Gatehouse answers with a 2xx, 3xx or 4xx of its own and lives on.

FUZZ_CASES in the environment is how many cases are tried in all; the suite's own number is small.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, quote_from_bytes

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.harness import Reply, ScriptedUpstream, Seen, Service, call, problem

PARTS = 5
CASES = int(os.environ.get("FUZZ_CASES", "1000")) // PARTS
TOKEN = "t"
USER = "01936f3e-0000-7000-8000-000000000001"
fuzz = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))


def answer(sock: socket.socket, seen: Seen) -> None:
    body = b"" if seen.method == "HEAD" else b"ok"
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + body)


@pytest.fixture(scope="module")
def target(database: str, upstream: ScriptedUpstream) -> Iterator[Service]:
    upstream.script(answer)
    with Service(POSTGRES_URI=database, UPSTREAM_URL=upstream.url, USERS_TOKEN=TOKEN) as running:
        made = send(running, "PUT", f"/users/{USER}", b'{"email": "a@example.com", "name": "A"}')
        assert made.status == 201, made
        yield running


def send(
    service: Service,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    lines = {"Authorization": f"Bearer {TOKEN}"}
    if body is not None:
        lines["Content-Type"] = "application/json"
    return call(service.port, method, path, body, lines | (headers or {}))


def assert_sound(reply: Reply, method: str = "GET") -> None:
    """An answer of Gatehouse's own that blames the caller or nobody."""
    assert reply.status < 500 and reply.complete, reply
    if method == "HEAD":
        assert reply.body == b""
    elif reply.status >= 400:
        problem(reply, reply.status, reply.json()["type"].removeprefix("urn:gatehouse:"))
    elif reply.status not in (204, 304):
        assert reply.get("Content-Type") == "application/json", reply
        reply.json()


def assert_unharmed(service: Service) -> None:
    assert service.process.poll() is None, service.log
    assert "Traceback" not in service.log
    assert send(service, "GET", f"/users/{USER}").status in (200, 404)
    assert call(service.port, "GET", "/proxied").body == b"ok"
    assert call(service.port, "GET", "/health").json()["status"] == "ok"


TEXT = st.text(st.characters(), max_size=300)  # lone surrogates too
EMAILS = st.one_of(
    st.emails(),
    st.builds("{}@{}".format, TEXT, TEXT),
    st.integers(240, 250).map(lambda n: f"a@{'b' * 60}.{'c' * 60}.{'d' * 60}.{'e' * (n - 187)}.fr"),
    TEXT,
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
USERS = st.fixed_dictionaries(
    {}, optional={"email": EMAILS | VALUES, "name": TEXT | VALUES, "id": VALUES, "\0": VALUES}
)
PROBABLY_VALID = st.fixed_dictionaries(
    {
        "email": st.emails(),
        "name": st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=200),
    }
)
DOCUMENTS = st.one_of(PROBABLY_VALID, PROBABLY_VALID, USERS, VALUES).flatmap(
    lambda value: st.sampled_from(
        [
            json.dumps(value).encode(),
            json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"),
            json.dumps(value).encode("utf-16"),
            b"\xef\xbb\xbf" + json.dumps(value).encode(),
            json.dumps(value).encode() + b" x",
            json.dumps(value).encode()[:-1],
        ]
    )
)
ODD_BODIES = st.sampled_from(
    [
        b"",
        b"[" * 60_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b"1" * 60_000,
        b'{"name": 1e999999, "email": -0}',
        b'{"name": NaN, "email": Infinity}',
        b'{"name": "a", "name": "b", "email": "c@example.com"}',
        b'{"name": "\\ud800", "email": "d@example.com"}',
        b'{"name": "\\u0000", "email": "e@example.com"}',
        b'{"name": "a", "email": "f@example.com\\u0000"}',
        b'{"name": "a", "email": "' + b"x" * 60_000 + b'"}',
        b'{"name": "' + "\u0130".encode() * 200 + b'", "email": "\xc4\xb0@example.com"}',
        json.dumps(
            {"name": "a", "email": "g@example.com", **dict.fromkeys(map(str, range(3000)))}
        ).encode(),
    ]
)
BODIES = DOCUMENTS | st.binary(max_size=200) | ODD_BODIES
# Half are right: the rest of the service is to be reached too.
TYPES = st.just("application/json") | st.sampled_from(
    [
        "application/json; charset=utf-8",
        "application/json; charset=utf-16",
        'Application/JSON ;x="y;z"',
        "application/merge-patch+json",
        "application/problem+json",
        "text/plain",
        "",
        ";",
        "application/json, text/plain",
    ]
)


def test_bodies(target: Service) -> None:
    @fuzz
    @given(st.sampled_from(["POST", "PUT", "PATCH", "GET"]), BODIES, TYPES)
    def run(method: str, body: bytes, kind: str) -> None:
        path = "/users" if method == "POST" else f"/users/{USER}"
        assert_sound(send(target, method, path, body, {"Content-Type": kind}))

    run()
    assert_unharmed(target)


ODD_VALUES = st.sampled_from(
    ["", "\u0663", "1_0", " 1", "+1", "1e2", "0x1", "%", "9" * 5000, USER, "\0", "a\0b@example.com"]
)
ANY_PAIRS = st.lists(
    st.tuples(
        st.sampled_from(["limit", "after", "email", "LIMIT", "x", ""]) | TEXT,
        TEXT | EMAILS | st.integers().map(str) | st.uuids().map(str) | ODD_VALUES,
    ),
    max_size=4,
)
# One bad value hides what the others would have done, so most often only the address is odd.
ODD_ADDRESS = st.fixed_dictionaries(
    {"email": TEXT | EMAILS | ODD_VALUES},
    optional={"limit": st.integers(1, 500).map(str), "after": st.uuids().map(str)},
).map(lambda parameters: list(parameters.items()))


def query(pairs: list[tuple[str, str]]) -> str:
    return "&".join(
        f"{quote(name, errors='surrogatepass')}={quote(value, errors='surrogatepass')}"
        for name, value in pairs
    )


QUERIES = st.one_of(
    ODD_ADDRESS.map(query),
    ANY_PAIRS.map(query),
    st.binary(max_size=100).map(quote_from_bytes),
    st.text(
        st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_characters="\x7f"),
        max_size=60,
    ),
)


def test_queries(target: Service) -> None:
    paths = [*["/users"] * 5, "/users/", f"/users/{USER}", "/health", "/health/ready"]

    @fuzz
    @example("GET", "/users", "email=%00")
    @given(st.sampled_from(["GET", "GET", "HEAD", "POST"]), st.sampled_from(paths), QUERIES)
    def run(method: str, path: str, query: str) -> None:
        assert_sound(send(target, method, f"{path}?{query}"), method)

    run()
    assert_unharmed(target)


NAMES = st.sampled_from(
    [
        "If-Match",
        "If-None-Match",
        "If-Modified-Since",
        "If-Unmodified-Since",
        "If-Range",
        "Range",
        "Accept",
        "Accept-Charset",
        "Accept-Encoding",
        "Authorization",
        "Cookie",
        "Content-Type",
        "Content-Encoding",
        "Expect",
        "Via",
        "Forwarded",
        "Connection",
        "X-Forwarded-For",
        "X-Forwarded-Proto",
        "X-Forwarded-Host",
        "X-Request-Id",
        "TE",
        "Trailer",
        "Keep-Alive",
        "X_Under",
        "User-Agent",
        "Content-Length",
        "Transfer-Encoding",
        "Upgrade",
        "Host",
        "Origin",
        "Date",
        "Max-Forwards",
        "Proxy-Authorization",
    ]
) | st.from_regex(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,40}", fullmatch=True)
LINE = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=200
)
FIELD_VALUES = st.one_of(
    LINE,
    st.text(
        st.characters(min_codepoint=0, max_codepoint=0xFF, exclude_characters="\n"), max_size=50
    ),
    st.sampled_from(
        [
            '"x"',
            'W/"x"',
            "*",
            '"a", "b"',
            '"',
            '"a" "b"',
            ",",
            '"\xff"',
            "bytes=0-1",
            "100-continue",
            "5",
        ]
    ),
)


def test_headers(target: Service) -> None:
    methods = ["GET", "HEAD", "PUT", "PATCH", "DELETE", "POST", "OPTIONS"]
    body = b'{"email": "a@example.com", "name": "A"}'

    @fuzz
    @given(
        st.sampled_from(methods),
        st.sampled_from(["/users", *[f"/users/{USER}"] * 4, "/health", "/health/live"]),
        st.dictionaries(NAMES, FIELD_VALUES, max_size=5),
    )
    def run(method: str, path: str, headers: dict[str, str]) -> None:
        with_body = body if method in ("PUT", "PATCH", "POST") else None
        with target.client() as client:
            lines = {"Host": "x", "Authorization": f"Bearer {TOKEN}"}
            if with_body:
                lines |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
            lines |= {"Connection": "close"} | headers
            head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
            data = f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + (with_body or b"")
            client.send(data)
            # A length that lies would have the service wait for bytes that never come.
            client.sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(EOFError):
                assert_sound(client.reply(method), method)

    run()
    assert_unharmed(target)


SEGMENTS = st.one_of(
    st.binary(max_size=40).map(lambda data: quote_from_bytes(data, safe="/;=,.~%")),
    st.text(
        st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_characters="?\x7f"),
        max_size=40,
    ),
    st.sampled_from(
        ["", "..", ".", "%2e%2e", "%00", USER, USER.upper(), USER + "%0a", f"{{{USER}}}"]
    ),
    st.uuids().map(lambda value: value.urn),
    st.uuids().map(lambda value: value.hex),
)


def test_paths(target: Service) -> None:
    methods = ["GET", "HEAD", "PUT", "PATCH", "DELETE", "POST", "OPTIONS", "TRACE", "get", "X"]

    @fuzz
    @given(
        st.sampled_from(methods),
        st.sampled_from(["/users/", "/health/", "/%75sers/", "http://x/users/", "/users%2F"]),
        st.lists(SEGMENTS, max_size=3).map("/".join),
    )
    def run(method: str, start: str, rest: str) -> None:
        body = b'{"email": "%s@example.com", "name": "A"}' % uuid.uuid4().hex.encode()
        with_body = body if method in ("PUT", "PATCH", "POST") else None
        reply = send(target, method, start + rest, with_body)
        assert_sound(reply, method)

    run()
    assert_unharmed(target)


LAST = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
SEEDS = [
    b"GET /users HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\n\r\n",
    b"GET /x?y=%20z HTTP/1.1\r\nHost: x\r\nCookie: a=b\r\nX-Request-Id: r\r\n\r\n",
    b"GET http://other.example/users/?x HTTP/1.1\r\nHost: other.example\r\n\r\n",
    b"HEAD /health HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n",
    b"POST /users HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\nContent-Type: application/json\r\n"
    b'Content-Length: 38\r\n\r\n{"email":"raw@example.com","name":"R"}',
    b"PUT /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: T\r\n\r\n"
    b"5;e=1\r\nhello\r\n0\r\nT: 1\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
    b"OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\nVia: 1.1 other\r\nForwarded: for=x\r\n\r\n",
]
PIECES = [
    *(
        b"\r\n",
        b"\r",
        b"\n",
        b"\0",
        b" ",
        b"\t",
        b":",
        b"/",
        b"%",
        b"%2F",
        b"\xff",
        b"\x80",
        b";",
        b",",
    ),
    *(
        b"Content-Length: 5\r\n",
        b"Content-Length: 18446744073709551617\r\n",
        b"Content-Length:\r\n",
    ),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Host: y\r\n",
        b"\r\n\r\n",
    ),
    *(
        b"Connection: close, host\r\n",
        b" folded\r\n",
        b"HTTP/1.1",
        b"HTTP/2.0",
        b"HTTP/1.0",
        b"0\r\n\r\n",
    ),
    *(
        b"//",
        b"..",
        b"?",
        b"#",
        b"@",
        b"users",
        b"health",
        b"ffffffffffffffff\r\n",
        b"-1",
        b"A" * 70_000,
    ),
]
Mutation = Callable[[bytes], bytes]


def at(data: bytes, share: float) -> int:
    return int(share * len(data))


SHARE = st.floats(0, 1, exclude_max=True)
CHANGES: st.SearchStrategy[Mutation] = st.one_of(
    st.builds(
        lambda where, piece: lambda data: data[: at(data, where)] + piece + data[at(data, where) :],
        SHARE,
        st.sampled_from(PIECES) | st.binary(min_size=1, max_size=20),
    ),
    st.builds(
        lambda where, size: lambda data: data[: at(data, where)] + data[at(data, where) + size :],
        SHARE,
        st.integers(1, 30),
    ),
    st.builds(
        lambda where, size: lambda data: data[: at(data, where) + size] + data[at(data, where) :],
        SHARE,
        st.integers(1, 60),
    ),
    st.builds(
        lambda where, byte: (
            lambda data: data[: at(data, where)] + bytes([byte]) + data[at(data, where) + 1 :]
        ),
        SHARE,
        st.integers(0, 255),
    ),
)


@st.composite
def raw_requests(draw: st.DrawFn) -> bytes:
    """One to three requests, changed here and there; or mere bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = b"".join(draw(st.lists(st.sampled_from(SEEDS), min_size=1, max_size=3)))
    for change in draw(st.lists(CHANGES, max_size=4)):
        data = change(data)
    return data


def everything_answered(service: Service, data: bytes) -> bytes:
    """Send `data`, then a request that ends the connection, and read to its end."""
    received = b""
    with service.client(timeout=0.03) as client, contextlib.suppress(ConnectionError):
        client.send(data + LAST)
        try:
            while piece := client.sock.recv(65536):
                received += piece
        except TimeoutError:
            # The service waits for more of a body; there is none.
            client.sock.settimeout(10)
            client.sock.shutdown(socket.SHUT_WR)
            while piece := client.sock.recv(65536):
                received += piece
    return received


def test_raw_bytes(target: Service) -> None:
    @fuzz
    @given(raw_requests())
    def run(data: bytes) -> None:
        received = everything_answered(target, data)
        assert received[:9] in (b"", b"HTTP/1.1 "), received
        statuses = {int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)}
        # 505 is what another version of HTTP gets; no other failure is the service's.
        assert not [status for status in statuses if status >= 500 and status != 505], received

    run()
    assert_unharmed(target)
