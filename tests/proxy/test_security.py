"""What a hostile caller or upstream must not achieve: smuggling, spoofing, loops, mixed answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness import (
    DEAD_DATABASE,
    ScriptedUpstream,
    Seen,
    Service,
    chunked,
    forward,
    free_port,
    message,
    ok,
    problem,
    request,
)

CHUNKED = b"Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def database() -> str:
    """No database: no proxied request may depend on one."""
    return DEAD_DATABASE


@pytest.fixture(scope="module")
def trusting(upstream: ScriptedUpstream) -> Iterator[Service]:
    with Service(UPSTREAM_URL=upstream.url, TRUSTED_PROXIES="10.0.0.0/8, 127.0.0.1") as running:
        yield running


@pytest.fixture(scope="module")
def replacing(upstream: ScriptedUpstream) -> Iterator[Service]:
    with Service(UPSTREAM_URL=upstream.url, UPSTREAM_PRESERVE_HOST="off") as running:
        yield running


@pytest.fixture(scope="module")
def trap() -> Iterator[ScriptedUpstream]:
    """A server that nothing may ever connect to."""
    server = ScriptedUpstream()
    yield server
    server.close()


SMUGGLED = request(b"GET /smuggled HTTP/1.1")
HOST = b"Host: client.example"
POST = b"POST /first HTTP/1.1"


def framed(*lines: bytes, first_line: bytes = POST, body: bytes = SMUGGLED) -> bytes:
    """A request whose body, seen with other eyes, is a request of its own."""
    return message(first_line, HOST, *lines, body=body)


def length(value: bytes) -> bytes:
    return framed(b"Content-Length: " + value)


def coding(value: bytes) -> bytes:
    return framed(b"Transfer-Encoding: " + value, body=chunked(b"hi") + SMUGGLED)


AMBIGUOUS = {
    "a length and a coding": framed(b"Content-Length: 6", CHUNKED, body=chunked() + SMUGGLED),
    "a coding and a length": framed(CHUNKED, b"Content-Length: 5", body=chunked() + SMUGGLED),
    "a coding and a length of 0": framed(CHUNKED, b"Content-Length: 0", body=chunked() + SMUGGLED),
    "two lengths": framed(b"Content-Length: 0", b"Content-Length: %d" % len(SMUGGLED)),
    "one length twice": framed(b"Content-Length: 0", b"content-length: 0"),
    "a list of lengths": length(b"0, 0"),
    "an empty length": length(b""),
    "a length with a plus": length(b"+0"),
    "a negative length": length(b"-1"),
    "a length with an underscore": length(b"1_0"),
    "a hexadecimal length": length(b"0x10"),
    "a decimal point": length(b"1.0"),
    "a length with a space": length(b"1 0"),
    "a length with a vertical tab": length(b"\x0b10"),
    "a length of letters": length(b"ten"),
    "a length in other digits": length("١".encode()),
    "a superscript length": length(b"\xb2"),
    "a list in the coding": coding(b"gzip, chunked"),
    "chunked before another coding": coding(b"chunked, identity"),
    "chunked twice": coding(b"chunked, chunked"),
    "two codings": framed(CHUNKED, b"Transfer-encoding: cow", body=chunked() + SMUGGLED),
    "two times chunked": framed(CHUNKED, CHUNKED, body=chunked() + SMUGGLED),
    "identity": coding(b"identity"),
    "xchunked": coding(b"xchunked"),
    "quoted": coding(b'"chunked"'),
    "chunked with a parameter": coding(b"chunked;q=1"),
    "chunked with a vertical tab": coding(b"\x0bchunked"),
    "chunked with a NUL": coding(b"chunked\x00"),
    "an empty coding": coding(b""),
    "a coding in HTTP/1.0": framed(
        CHUNKED, first_line=b"POST /first HTTP/1.0", body=chunked() + SMUGGLED
    ),
    "a length and a coding in HTTP/1.0": framed(
        b"Content-Length: 5",
        CHUNKED,
        b"Connection: keep-alive",
        first_line=b"POST /first HTTP/1.0",
        body=chunked() + SMUGGLED,
    ),
    "a space before the length's colon": framed(b"Content-Length : 5"),
    "a space before the coding's colon": framed(
        b"Transfer-Encoding : chunked", body=chunked() + SMUGGLED
    ),
    "a tab before a colon": framed(b"X-A\t: 1"),
    "a line without a colon": framed(b"Content-Length"),
    "no name": framed(b": chunked"),
    "a space in a name": framed(b"X A: 1"),
    "a control in a name": framed(b"X\x00A: 1"),
    "a name beyond ASCII": framed(b"X-\xc3\xa9: 1"),
    "a NUL in a value": framed(b"X-A: a\x00b"),
    "a bare CR in a value": framed(b"X-A: a\rContent-Length: 5"),
    "a bare LF in a value": framed(b"X-A: a\nContent-Length : 5"),
    "a control in a value": framed(b"X-A: a\x01b"),
    "a folded line": framed(b"X-A: a", b" b: c"),
    "a folded coding": framed(b"Transfer-Encoding:", b" chunked", body=chunked() + SMUGGLED),
    "a fold before any line": message(POST, b" X-A: b", HOST, body=SMUGGLED),
    "no host": message(POST, b"X-A: b", body=SMUGGLED),
    "two hosts": framed(b"Host: other.example"),
    "one host twice": framed(HOST),
}
AMBIGUOUS |= {
    f"the host {host!r}": message(POST, b"Host: " + host, body=SMUGGLED)
    for host in (
        b"a b",
        b"a/b",
        b"a, b",
        b"user@a",
        b"a?b",
        b"a#b",
        b"a\\b",
        b"a:b",
        b"a:80:80",
        b"a:-1",
        b"[::1",
        b"::1",
        b"[::1]a",
        b"[zz]",
        b"[::::]",
        b"[.]:80",
        b"a\x00b",
        b"a\x7fb",
        b"\xc3\xa9.example",
        b"http://a",
        b"a%zz",
        b"a%2",
        b"<a>",
        b'"a"',
    )
}
AMBIGUOUS |= {
    f"the chunks {body!r}": message(POST, HOST, CHUNKED, body=body + SMUGGLED)
    for body in (
        b"\r\n",
        b"xyz\r\n",
        b"\r\n2\r\nhi\r\n0\r\n\r\n",
        b"2\r\nhi\r\n\r\n0\r\n\r\n",
        b"2\n\r\nhi\r\n0\r\n\r\n",
        b"2\r\nhi\r\n0\r\n\n",
        b"2\r\nhi\r\n0\r\nno field\r\n\r\n",
        b"0x0\r\n\r\n",
        b"+0\r\n\r\n",
        b"-1\r\n\r\n",
        b"0_0\r\n\r\n",
        b" 0\r\n\r\n",
        b"2 \r\nhi\r\n0\r\n\r\n",
        b"f" * 40 + b"\r\n",
        b"2\r\nhello\r\n0\r\n\r\n",
        b"2\r\nhi0\r\n\r\n",
        b"2\rhi\r\n0\r\n\r\n",
        b"2;a\rb\r\nhi\r\n0\r\n\r\n",
        b"2;a\x00b\r\nhi\r\n0\r\n\r\n",
        b"2\nhi\r\n0\r\n\r\n",
        b"2\r\nhi\n0\r\n\r\n",
    )
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_ambiguous_request_is_400_and_ends_its_connection(
    service: Service, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.script(ok)
    with service.client() as client:
        client.send(AMBIGUOUS[name])
        problem(client.reply(), 400, "bad-request")
        assert client.closed()
    # What comes after shows that nothing of it was on its way.
    assert service.exchange(request(b"GET /after HTTP/1.1")).status == 200
    assert [seen.target for seen in upstream.seen] == [b"/after"]


def test_an_ambiguous_request_is_400_on_owned_paths_too(
    service: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    for name in ("a length and a coding", "two lengths", "no host", "the host b'a b'"):
        with service.client() as client:
            client.send(AMBIGUOUS[name].replace(b"POST /first", b"POST /health/live"))
            problem(client.reply(), 400, "bad-request")
            assert client.closed()
    assert upstream.seen == []


def test_a_body_that_looks_like_a_request_is_only_a_body(
    service: Service, upstream: ScriptedUpstream
) -> None:
    for data in (
        framed(b"Content-Length: %d" % len(SMUGGLED)),
        framed(b"content-LENGTH:%d \t" % len(SMUGGLED)),
        framed(CHUNKED, body=chunked(SMUGGLED)),
        framed(
            b"Content-Length: %d" % len(SMUGGLED),
            b"Connection: Content-Length",
            b"Content_Length: 0",
            b"Transfer_Encoding: chunked",
        ),
    ):
        seen, _ = forward(service, upstream, data)
        assert (seen.target, seen.body) == (b"/first", SMUGGLED)


def test_the_body_of_a_refused_request_never_becomes_a_request(
    start: Callable[..., Service], upstream: ScriptedUpstream
) -> None:
    """What arrived in the read after the refusal's was parsed as requests, and the second of them
    forwarded while the connection lingered."""
    service = start(UPSTREAM_URL=upstream.url, MAX_BODY_BYTES=100_000_000)
    upstream.script(ok)
    head = request(b"POST /refused HTTP/1.1", b"Content-Length: 200000000")
    one_read = head + b"x" * (65536 - len(head))
    for _ in range(20):
        with service.client() as client:
            client.send(one_read + request(b"GET /1 HTTP/1.1") + SMUGGLED * 2)
            problem(client.reply(), 413, "body-too-large")
            assert client.closed()
    assert service.exchange(request(b"GET /after HTTP/1.1")).status == 200
    assert [seen.target for seen in upstream.seen] == [b"/after"]


@pytest.mark.parametrize(
    "target",
    [
        b"http://127.0.0.1:%d/p",
        b"HTTP://127.0.0.1:%d/p",
        b"https://127.0.0.1:%d/p",
        b"http://user:secret@127.0.0.1:%d/p",
        b"//127.0.0.1:%d/p",
        b"///127.0.0.1:%d/p",
        b"/@127.0.0.1:%d/p",
        b"/\\\\127.0.0.1:%d/p",
        b"/http://127.0.0.1:%d/p",
        b"/..//127.0.0.1:%d/p",
        b"127.0.0.1:%d",
        b"@127.0.0.1:%d/p",
        b":@127.0.0.1:%d/p",
        b".127.0.0.1:%d/p",
        b"?@127.0.0.1:%d/p",
        b"#@127.0.0.1:%d/p",
        b"\\\\127.0.0.1:%d\\p",
        b"http:127.0.0.1:%d/p",
        b"http:\\\\127.0.0.1:%d/p",
        b"ftp://127.0.0.1:%d/p",
        b"file:///127.0.0.1:%d/p",
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"POST", b"OPTIONS", b"CONNECT"])
def test_no_target_changes_which_host_is_called(
    replacing: Service,
    upstream: ScriptedUpstream,
    trap: ScriptedUpstream,
    method: bytes,
    target: bytes,
) -> None:
    upstream.script(ok)
    line = b"%s %s HTTP/1.1" % (method, target % trap.port)
    for host in (HOST, b"Host: 127.0.0.1:%d" % trap.port):
        reply = replacing.exchange(message(line, host))
        assert reply.status in (200, 400, 405)
        assert len(upstream.seen) == (1 if reply.status == 200 else 0)
        assert all(seen.get("Host") == f"127.0.0.1:{upstream.port}" for seen in upstream.seen)
        upstream.seen.clear()
    assert trap.connections == 0


def test_a_preserved_host_changes_only_the_host_line(
    start: Callable[..., Service], upstream: ScriptedUpstream, trap: ScriptedUpstream
) -> None:
    service = start(UPSTREAM_URL=upstream.url)
    host = f"127.0.0.1:{trap.port}"
    seen, reply = forward(service, upstream, message(b"GET / HTTP/1.1", f"Host: {host}".encode()))
    assert (seen.get("Host"), reply.status, trap.connections) == (host, 200, 0)


SPOOFED = [
    b"X-Forwarded-For: 6.6.6.6",
    b"x-forwarded-for: 7.7.7.7",
    b"X-Forwarded-Proto: https",
    b"X-Forwarded-Host: evil.example",
    b"X-Forwarded-Host: second.example",
    b"Forwarded: for=6.6.6.6;proto=https",
    b"X-Real-IP: 6.6.6.6",
]


@pytest.mark.parametrize("extra", [[], [b"Connection: X-Forwarded-For, X-Forwarded-Proto, Via"]])
def test_forwarding_headers_of_a_stranger_are_replaced(
    service: Service, upstream: ScriptedUpstream, extra: list[bytes]
) -> None:
    seen, _ = forward(service, upstream, request(b"GET / HTTP/1.1", *SPOOFED, *extra))
    assert seen.all("X-Forwarded-For") == ["127.0.0.1"]
    assert seen.all("X-Forwarded-Proto") == ["http"]
    assert seen.all("X-Forwarded-Host") == ["client.example"]
    assert seen.all("Forwarded") == seen.all("X-Real-IP") == []
    assert b"6.6.6.6" not in seen.head
    assert b"evil" not in seen.head


def test_names_that_become_forwarding_headers_further_on_are_dropped(
    service: Service, upstream: ScriptedUpstream
) -> None:
    # CGI, WSGI and Rack make HTTP_X_FORWARDED_FOR of either spelling.
    lines = [
        b"X_Forwarded_For: 6.6.6.6",
        b"x-forwarded_for: 6.6.6.6",
        b"X_FORWARDED_PROTO: 6.6.6.6",
        b"X_Forwarded-Host: 6.6.6.6",
        b"X_Request_Id: 6.6.6.6",
    ]
    seen, _ = forward(service, upstream, request(b"GET / HTTP/1.1", *lines, b"X_Other: 1"))
    assert b"6.6.6.6" not in seen.head
    assert seen.get("X_Other") == "1"


def test_forwarding_headers_of_a_trusted_proxy_are_extended(
    trusting: Service, upstream: ScriptedUpstream
) -> None:
    seen, _ = forward(trusting, upstream, request(b"GET / HTTP/1.1", *SPOOFED))
    assert seen.get("X-Forwarded-For") == "6.6.6.6, 7.7.7.7, 127.0.0.1"
    assert seen.all("X-Forwarded-Proto") == ["https"]
    assert seen.all("X-Forwarded-Host") == ["evil.example"]  # of two, the first
    assert seen.all("Forwarded") == ["for=6.6.6.6;proto=https"]
    assert seen.all("X-Real-IP") == ["6.6.6.6"]


def test_a_client_cannot_name_away_what_a_trusted_proxy_says_of_it(
    trusting: Service, upstream: ScriptedUpstream
) -> None:
    """Many proxies pass the client's Connection on. Without these lines an application takes the
    proxy's own address, and lets in who comes from there (CVE-2022-31813 was one of that kind)."""
    said = {"X-Real-IP": "6.6.6.6", "X-Forwarded-User": "bob", "Forwarded": "for=6.6.6.6"}
    lines = [f"{name}: {value}".encode() for name, value in said.items()]
    named = b"Connection: close, X-Hop, " + ", ".join(said).encode()
    seen, _ = forward(trusting, upstream, request(b"GET / HTTP/1.1", b"X-Hop: 1", *lines, named))
    assert {name: seen.get(name) for name in said} == said
    assert seen.get("X-Hop") is None


def test_a_trusted_proxy_that_says_nothing_is_taken_for_the_client(
    trusting: Service, upstream: ScriptedUpstream
) -> None:
    seen, _ = forward(trusting, upstream, request())
    assert seen.all("X-Forwarded-For") == ["127.0.0.1"]
    assert seen.all("X-Forwarded-Proto") == ["http"]
    assert seen.all("X-Forwarded-Host") == ["client.example"]


def test_proxies_of_another_network_are_not_trusted(
    start: Callable[..., Service], upstream: ScriptedUpstream
) -> None:
    service = start(UPSTREAM_URL=upstream.url, TRUSTED_PROXIES="10.0.0.0/8,::1,127.0.0.2")
    seen, _ = forward(service, upstream, request(b"GET / HTTP/1.1", *SPOOFED))
    assert seen.all("X-Forwarded-For") == ["127.0.0.1"]
    assert b"6.6.6.6" not in seen.head


def own_via(service: Service, upstream: ScriptedUpstream) -> str:
    seen, _ = forward(service, upstream, request())
    return (seen.get("Via") or "").removeprefix("1.1 ")


def test_a_request_that_has_been_here_before_is_508(
    service: Service, upstream: ScriptedUpstream
) -> None:
    own = own_via(service, upstream).encode()
    upstream.script(ok)
    for lines in (
        [b"Via: 1.1 " + own],
        [b"Via: 1.0 a, 1.1 " + own + b", 1.1 b (c)"],
        [b"Via: 1.0 a", b"via: HTTP/1.0 " + own],
        [b"Via: 1.1 " + own + b" (a comment)", b"Via: 1.1 b"],
        [b"Connection: Via", b"Via: 1.1 " + own],
    ):
        reply = service.exchange(request(b"GET / HTTP/1.1", *lines))
        problem(reply, 508, "loop-detected")
    assert upstream.seen == []


def test_a_request_that_has_been_at_another_instance_passes(
    service: Service, upstream: ScriptedUpstream
) -> None:
    own = own_via(service, upstream)
    for other in ("gatehouse-other", "gatehouse-", own + "x", own[:-1], f"a ({own})"):
        _, reply = forward(
            service, upstream, request(b"GET / HTTP/1.1", f"Via: 1.1 {other}".encode())
        )
        assert reply.status == 200


def test_a_service_that_is_its_own_upstream_answers_508(start: Callable[..., Service]) -> None:
    port = free_port()
    service = start(PORT=port, UPSTREAM_URL=f"http://127.0.0.1:{port}")
    problem(service.call("GET", "/a"), 508, "loop-detected")
    problem(service.call("POST", "/a", b"x" * 100_000), 508, "loop-detected")


def test_two_services_in_a_ring_answer_508(start: Callable[..., Service]) -> None:
    ports = free_port(), free_port()
    first = start(PORT=ports[0], UPSTREAM_URL=f"http://127.0.0.1:{ports[1]}")
    start(PORT=ports[1], UPSTREAM_URL=f"http://127.0.0.1:{ports[0]}")
    problem(first.call("GET", "/a"), 508, "loop-detected")


def test_cookies_stay_with_the_caller_they_were_set_for(
    service: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(
        b"HTTP/1.1 200 OK\r\nSet-Cookie: session=1; Path=/\r\nContent-Length: 0\r\n\r\n"
    )
    with service.client() as client:
        for _ in range(2):
            client.send(request())
            assert client.reply().all("Set-Cookie") == ["session=1; Path=/"]
    assert [seen.all("Cookie") for seen in upstream.seen] == [[], []]


def test_no_proxy_and_no_credential_is_taken_from_the_environment(
    start: Callable[..., Service],
    upstream: ScriptedUpstream,
    trap: ScriptedUpstream,
    tmp_path: Path,
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login netrc password netrc\ndefault login n password n\n")
    netrc.chmod(0o600)
    environ: dict[str, Any] = {"HOME": tmp_path, "NETRC": netrc}
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        environ[name] = f"http://user:secret@127.0.0.1:{trap.port}"
    service = start(UPSTREAM_URL=upstream.url, **environ)
    seen, reply = forward(service, upstream, request())
    assert (seen.target, reply.status, trap.connections) == (b"/", 200, 0)
    assert seen.get("Authorization") is seen.get("Proxy-Authorization") is None
    seen, _ = forward(service, upstream, request(b"GET / HTTP/1.1", b"Authorization: Bearer mine"))
    assert seen.all("Authorization") == ["Bearer mine"]


FINE = message(b"HTTP/1.1 200 OK", b"Content-Length: 2", body=b"ok")
POISON = message(b"HTTP/1.1 200 OK", b"X-Poison: 1", b"Content-Length: 6", body=b"poison")
# name: (method, an answer, what the upstream sends after its end)
POISONED = {
    "a second answer": ("GET", FINE, POISON),
    "a second answer after chunks": (
        "GET",
        message(b"HTTP/1.1 200 OK", CHUNKED, body=chunked(b"ok")),
        POISON,
    ),
    "a body longer than its length": ("GET", FINE, b" and more"),
    "an interim answer": ("GET", FINE, message(b"HTTP/1.1 103 Early Hints", b"Link: </a>")),
    "a body for HEAD": ("HEAD", message(b"HTTP/1.1 200 OK", b"Content-Length: 9"), b"0123456789"),
    "chunks for HEAD": ("HEAD", message(b"HTTP/1.1 200 OK", CHUNKED), chunked(POISON)),
    "a second answer for HEAD": ("HEAD", message(b"HTTP/1.1 200 OK"), POISON),
    "a body of a 204": ("GET", message(b"HTTP/1.1 204 No Content"), POISON),
    "a body of a 304": ("GET", message(b"HTTP/1.1 304 Not Modified"), b"x" + POISON),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", POISONED)
def test_bytes_after_an_answer_never_reach_the_next_caller(
    service: Service, upstream: ScriptedUpstream, name: str, late: bool
) -> None:
    method, data, rest = POISONED[name]
    answered = threading.Event()
    sent = threading.Event()

    def answer(sock: socket.socket, seen: Seen) -> None:
        if seen.target != b"/poisoned":
            sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: 5", body=b"clean"))
        elif late:
            sock.sendall(data)
            answered.wait(10)
            sock.sendall(rest)
        else:
            sock.sendall(data + rest)
        sent.set()

    upstream.script(answer)
    with service.client() as client:
        client.send(request(f"{method} /poisoned HTTP/1.1".encode()))
        reply = client.reply(method)
        assert reply.body in (b"", b"ok")
        answered.set()
        assert sent.wait(10)
        for _ in range(3):
            client.send(request(b"GET /next HTTP/1.1"))
            reply = client.reply()
            assert (reply.status, reply.body, reply.get("X-Poison")) == (200, b"clean", None)
    # More of it may be on its way: the connection is as little to be trusted as the bytes.
    assert upstream.seen[1].connection != upstream.seen[0].connection


# So large that Gatehouse reads exactly the answer at once; and that it is moved by the kernel.
READ_AT_ONCE = 65536 - len(message(b"HTTP/1.1 200 OK", b"Content-Length: 12345"))


@pytest.mark.parametrize("size", [READ_AT_ONCE, 300_000, 3_000_000])
def test_bytes_after_a_large_answer_never_reach_the_request_behind_it(
    service: Service, upstream: ScriptedUpstream, size: int
) -> None:
    """What follows such an answer was not read with it, so the connection was kept, given to the
    request that waited behind this one, and answered that."""
    length = message(b"HTTP/1.1 200 OK", b"Content-Length: %d" % size)

    def answer(sock: socket.socket, seen: Seen) -> None:
        clean = message(b"HTTP/1.1 200 OK", b"Content-Length: 5", body=b"clean")
        sock.sendall(length + b"x" * size + POISON if seen.target == b"/large" else clean)

    upstream.script(answer)
    with service.client() as client:
        client.send(request(b"GET /large HTTP/1.1") + request(b"GET /next HTTP/1.1"))
        assert client.reply().body == b"x" * size
        assert client.reply().body == b"clean"
    assert upstream.seen[0].connection != upstream.seen[1].connection


@pytest.mark.parametrize("status", [b"200 OK", b"408 Request Timeout"])
def test_an_answer_to_nothing_that_comes_with_a_request_is_not_the_answer_to_that(
    start: Callable[..., Service], status: bytes
) -> None:
    """Some servers say 408 before they close an idle connection. Where that came in the same turn
    of the loop as a request, it was given to that client."""
    upstream = ScriptedUpstream()
    service = start(UPSTREAM_URL=upstream.url, WORKERS=1)
    process = psutil.Process(service.process.pid)
    with service.client() as client:
        client.send(request(b"GET /first HTTP/1.1"))
        assert client.reply().body == b"ok"
        processes = [process, *process.children(recursive=True)]
        for one in processes:
            one.suspend()
        client.send(request(b"GET /second HTTP/1.1"))
        [idle] = upstream.open
        idle.sendall(message(b"HTTP/1.1 " + status, b"Content-Length: 6", body=b"poison"))
        for one in processes:
            one.resume()
        assert client.reply().body == b"ok"
    assert [seen.connection for seen in upstream.seen] == [0, 1]
    upstream.close()


def test_each_of_many_callers_gets_the_answer_to_its_own_request(
    service: Service, upstream: ScriptedUpstream
) -> None:
    def answer(sock: socket.socket, seen: Seen) -> bool:
        body = seen.target + b" " + seen.body
        number = int(seen.target[1:])
        if number % 3 == 0:
            sock.sendall(message(b"HTTP/1.1 200 OK", CHUNKED, body=chunked(body)))
        elif number % 3 == 1:
            sock.sendall(message(b"HTTP/1.1 103 Early Hints", b"Link: </x>"))
            sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), body=body))
        else:
            sock.sendall(message(b"HTTP/1.1 200 OK", b"Connection: close", body=body))
            return False
        return True

    upstream.script(answer)

    def caller(number: int) -> bool:
        with service.client() as client:
            for i in range(number * 25, number * 25 + 25):
                body = b"%d" % i * (i % 7 + 1)
                length = b"Content-Length: %d" % len(body)
                client.send(request(b"POST /%d HTTP/1.1" % i, length, body=body))
                assert client.reply().body == b"/%d " % i + body
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(caller, range(16)))


def test_an_answer_that_a_client_left_unread_reaches_nobody_else(
    service: Service, upstream: ScriptedUpstream
) -> None:
    started = threading.Semaphore(0)
    left = threading.Semaphore(0)

    def answer(sock: socket.socket, seen: Seen) -> None:
        if seen.target != b"/left":
            sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: 5", body=b"clean"))
            return
        sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: 100", body=b"secret" * 10))
        started.release()
        left.acquire(timeout=10)
        sock.sendall(b"secret" * 7)

    upstream.script(answer)
    for _ in range(5):
        with service.client() as client:
            client.send(request(b"GET /left HTTP/1.1"))
            assert started.acquire(timeout=10)
        left.release()
        assert service.call("GET", "/next").body == b"clean"


def test_problems_do_not_tell_where_the_upstream_is(start: Callable[..., Service]) -> None:
    upstream = ScriptedUpstream(message(b"HTTP/1.1 200 OK", b"garbage"))
    service = start(UPSTREAM_URL=f"http://localhost:{upstream.port}/secret-base")
    broken = service.call("GET", "/a")
    problem(broken, 502, "upstream-broken")
    upstream.close()
    unreachable = service.call("GET", "/a")
    problem(unreachable, 502, "upstream-unreachable")
    for reply in (broken, unreachable):
        text = str(reply.headers) + reply.body.decode()
        for secret in ("localhost", str(upstream.port), "secret-base", "Traceback", "garbage"):
            assert secret not in text


def test_nothing_long_that_a_caller_has_sent_is_remembered(
    service: Service, upstream: ScriptedUpstream
) -> None:
    """A thousand header names of 64 KB each were kept in lower case for ever: 128 MB, and as many
    names of hosts 16 MB."""
    upstream.script(ok)
    with service.client() as client:

        def ask(line: bytes) -> None:
            client.send(message(b"GET /health/live HTTP/1.1", line))
            assert client.reply().status == 200

        before = 0
        for number in range(350):
            if number == 50:
                before = service.memory
            ask(b"Host: %d." % number + b"a" * 60000)
            ask(b"Host: x\r\nX%d" % number + b"A" * 60000 + b": 1")
        assert service.memory - before < 16 << 20


def test_nor_is_the_long_status_line_of_an_upstream(
    service: Service, upstream: ScriptedUpstream
) -> None:
    """Sixty-four of them were kept for ever, which was 64 MB."""
    numbers = iter(range(100))

    def answer(sock: socket.socket, seen: Seen) -> None:
        reason = b"%d" % next(numbers) + b"a" * 250_000
        sock.sendall(message(b"HTTP/1.1 200 " + reason, b"Content-Length: 0"))

    upstream.script(answer)
    with service.client() as client:
        before = 0
        for number in range(80):
            if number == 10:
                before = service.memory
            client.send(request())
            assert client.reply().status == 200
        assert service.memory - before < 16 << 20
