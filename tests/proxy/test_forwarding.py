"""Who the client is and what it asked for, as the application is told: no caller can make it up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from services.proxy import BELIEVED, FRAMING, HOP_BY_HOP, SET
from tests.harness import (
    DEAD_DATABASE,
    PROXY_SETS,
    ScriptedUpstream,
    Service,
    chunked,
    forward,
    message,
    ok,
    problem,
    request,
    wait_for,
)

GET = b"GET / HTTP/1.1"


@pytest.fixture(scope="module")
def database() -> str:
    """No database: no proxied request may depend on one."""
    return DEAD_DATABASE


@pytest.fixture(scope="module")
def trusting(upstream: ScriptedUpstream) -> Iterator[Service]:
    trusted = "10.0.0.0/8, 127.0.0.1, 2001:db8:1::/48"
    with Service(UPSTREAM_URL=upstream.url, TRUSTED_PROXIES=trusted) as running:
        yield running


# What a stranger says of itself.

FORWARDED = [
    *("For", "Proto", "Host", "Port", "Prefix", "Ssl", "Scheme", "User", "Email", "Groups"),
    *("Server", "By", "Access-Token", "Preferred-Username", "Client-Cert", "Uri", "Tls", "Made-Up"),
]


@pytest.mark.parametrize("name", FORWARDED)
def test_no_forwarding_header_of_a_stranger_s_reaches_the_upstream(
    service: Service, upstream: ScriptedUpstream, name: str
) -> None:
    """Applications build links out of -Prefix and -Port, and log in whom -User names."""
    spellings = [
        f"X-Forwarded-{name}",
        f"x-forwarded-{name.lower()}",
        f"X-FORWARDED-{name.upper()}",
    ]
    spellings += [spelling.replace("-", "_") for spelling in spellings]
    spellings += [f"X_Forwarded-{name}", f"X-Forwarded_{name}", f"X.Forwarded.{name}"]
    lines = [f"{spelling}: mallory".encode() for spelling in spellings]
    seen, _ = forward(service, upstream, request(GET, b"X-Kept: 1", *lines))
    assert b"mallory" not in seen.head
    assert [one for one, _ in seen.headers[:2]] == ["Host", "X-Kept"]
    assert sorted(one for one, _ in seen.headers[2:]) == PROXY_SETS


@pytest.mark.parametrize(
    "name", ["X-Forwarded-", "X-Forwarded-X_Y", "x_forwarded_", "X-Forwarded--"]
)
def test_nor_does_one_of_an_odd_name(
    service: Service, upstream: ScriptedUpstream, name: str
) -> None:
    seen, _ = forward(service, upstream, request(GET, name.encode() + b": mallory"))
    assert b"mallory" not in seen.head


def test_names_that_only_look_alike_pass(service: Service, upstream: ScriptedUpstream) -> None:
    lines = [b"X-Forwarded: 1", b"X-ForwardedFor: 2", b"My-X-Forwarded-For: 3", b"X-Real-Ips: 4"]
    seen, _ = forward(service, upstream, request(GET, *lines))
    assert seen.head.split(b"\r\n")[2:6] == lines


# Host is the one whose line cannot be left out of what every client sends.
SPELLED = sorted((HOP_BY_HOP | SET | BELIEVED | FRAMING) - {"host"})


# The characters that a name may have besides letters and digits.
MARKS = "_.~!#$%&'*+^`|"


@pytest.mark.parametrize("name", [name for name in SPELLED if "-" in name])
def test_no_spelling_with_another_mark_of_what_is_framed_set_or_removed_passes(
    service: Service, upstream: ScriptedUpstream, name: str
) -> None:
    """CGI and WSGI have one name for both: cheroot's application read an empty body where a
    Content_Length of 0 stood beside the length. PHP has one name for X.Real.IP too, and lighttpd's
    CGI for every mark."""
    spellings = [name.replace("-", mark) for mark in MARKS]
    lines = [f"{one}: 0".encode() for spelled in spellings for one in (spelled, spelled.title())]
    if name.count("-") > 1:
        lines.append(name.replace("-", "_", 1).encode() + b": 0")
    for framing, body in (
        (b"Content-Length: 39", b"b" * 39),
        (b"Transfer-Encoding: chunked", chunked(b"b" * 39)),
    ):
        seen, reply = forward(
            service, upstream, request(b"POST / HTTP/1.1", *lines, framing, *lines, body=body)
        )
        assert (reply.status, seen.body) == (200, b"b" * 39)
        assert seen.all("Content-Length") == ["39"]
        assert sorted(one for one, _ in seen.headers) == sorted(
            ["Content-Length", "Host", *PROXY_SETS]
        )


def test_a_name_that_connection_lists_is_removed_in_every_spelling(
    service: Service, upstream: ScriptedUpstream
) -> None:
    lines = [b"Connection: X-Hop", b"X-Hop: 1", b"X_Hop: 2", b"x.hop: 3", b"X_O: 4", b"X.O: 5"]
    seen, _ = forward(service, upstream, request(GET, *lines))
    assert seen.head.split(b"\r\n")[2:4] == [b"X_O: 4", b"X.O: 5"]
    assert b"hop" not in seen.head.lower()


# What a trusted proxy says.


@pytest.mark.parametrize(
    ("value", "proto"),
    [
        (b"https", "https"),
        (b"HTTPS", "https"),
        (b"Https", "https"),
        (b"https,http", "https"),
        (b"https, http", "https"),
        (b"HTTPS , https", "https"),
        (b" https ", "https"),
        (b"http", "http"),
        (b"HTTP", "http"),
        (b"http,https", "http"),
        (b"", "http"),
        (b",", "http"),
        (b",https", "https"),
        (b"gopher", "http"),
        (b"httpss", "http"),
        (b"wss", "https"),
        (b"WSS,ws", "https"),
        (b"ws", "http"),
        (b"https;http", "http"),
    ],
)
def test_the_protocol_that_a_trusted_proxy_tells(
    trusting: Service, upstream: ScriptedUpstream, value: bytes, proto: str
) -> None:
    """Of several, the first is the client's own; `https,http` became http, and redirects a loop."""
    seen, _ = forward(trusting, upstream, request(GET, b"X-Forwarded-Proto: " + value))
    assert seen.all("X-Forwarded-Proto") == [proto]


def test_the_protocol_on_several_lines(trusting: Service, upstream: ScriptedUpstream) -> None:
    lines = [b"X-Forwarded-Proto: https", b"X-Forwarded-Proto: http"]
    seen, _ = forward(trusting, upstream, request(GET, *lines))
    assert seen.all("X-Forwarded-Proto") == ["https"]


def test_whatever_a_trusted_proxy_forwards_passes(
    trusting: Service, upstream: ScriptedUpstream
) -> None:
    lines = [
        b"X-Forwarded-Port: 8443",
        b"X-Forwarded-Prefix: /shop",
        b"x-forwarded-USER: ann",
        b"X-Forwarded-Server: front",
        b"Forwarded: for=203.0.113.7;proto=https",
        b"X-Real-IP: 203.0.113.7",
        # A name with another mark than a hyphen changes nothing for the others.
        b"X_Other: 1",
    ]
    for sent in (lines, lines[:-1]):
        seen, _ = forward(trusting, upstream, request(GET, *sent, b"X_Real_IP: mallory"))
        assert seen.head.split(b"\r\n")[2 : 2 + len(sent)] == sent
        assert b"mallory" not in seen.head
        seen, _ = forward(trusting, upstream, request(GET, *sent))
        assert seen.head.split(b"\r\n")[2 : 2 + len(sent)] == sent


@pytest.mark.parametrize(
    ("value", "caller"),
    [
        (b"203.0.113.7", "203.0.113.7"),
        (b"203.0.113.7:51008", "203.0.113.7"),
        (b"2001:db8::7", "2001:db8::7"),
        (b"[2001:db8::7]", "2001:db8::7"),
        (b"[2001:db8::7]:443", "2001:db8::7"),
        (b'"[2001:db8::7]:443"', "2001:db8::7"),
        (b"::ffff:203.0.113.7", "203.0.113.7"),
        (b"198.51.100.1, 203.0.113.7:51008", "203.0.113.7"),
        (b"203.0.113.7:51008, 10.1.2.3:80", "203.0.113.7"),
        (b"203.0.113.7, [2001:db8:1::5]:443", "203.0.113.7"),
        (b"10.0.0.1", "10.0.0.1"),
        (b"10.0.0.2, 10.0.0.1:80", "10.0.0.2"),
        (b"203.0.113.7,, 10.0.0.1", "203.0.113.7"),
        (b"203.0.113.7, ", "203.0.113.7"),
        (b" , ", "127.0.0.1"),
        (b"unknown", "127.0.0.1"),
        (b"203.0.113.7:port:", "127.0.0.1"),
        (b"", "127.0.0.1"),
    ],
)
def test_the_caller_is_the_nearest_address_that_is_no_trusted_proxy(
    trusting: Service, upstream: ScriptedUpstream, value: bytes, caller: str
) -> None:
    """One that had a port made the proxy itself the caller, in every line of the log."""
    data = request(GET, b"X-Forwarded-For: " + value)
    seen, _ = forward(trusting, upstream, data)
    asked = seen.get("X-Request-Id")
    # The line of the request before this one may come later than its answer.
    [line] = wait_for(lambda: [one for one in trusting.access_log if one["request_id"] == asked])
    assert line["caller"] == caller


def test_what_a_trusted_proxy_says_of_addresses_is_extended_as_it_is(
    trusting: Service, upstream: ScriptedUpstream
) -> None:
    value = b"203.0.113.7:51008, [2001:db8::7]:443"
    seen, _ = forward(trusting, upstream, request(GET, b"X-Forwarded-For: " + value))
    assert seen.all("X-Forwarded-For") == [value.decode() + ", 127.0.0.1"]


# The length, and the host.


@pytest.mark.parametrize("length", [b"031", b"31", b"00000000000000000000000000000031"])
def test_one_spelling_of_a_length_goes_out(
    service: Service, upstream: ScriptedUpstream, length: bytes
) -> None:
    """Some read an octal number where another reads a decimal one."""
    body = b"b" * 31
    with service.client() as client:
        upstream.script(ok)
        for _ in range(2):
            client.send(request(b"POST / HTTP/1.1", b"content-LENGTH: " + length, body=body))
            assert client.reply().body == b"ok"
    for seen in upstream.seen:
        assert seen.body == body
        assert seen.all("Content-Length") == ["31"]
    assert len(upstream.seen) == 2


def test_a_length_of_zeros_is_a_length_of_0(service: Service, upstream: ScriptedUpstream) -> None:
    seen, _ = forward(service, upstream, request(b"POST / HTTP/1.1", b"Content-Length: 000"))
    assert seen.all("Content-Length") == ["0"]


@pytest.mark.parametrize(
    ("target", "arrives"),
    [
        (b"http://other.example", b"*"),
        (b"HTTPS://other.example:444", b"*"),
        (b"http://other.example/", b"/"),
        (b"http://other.example?a", b"/?a"),
        (b"*", b"*"),
        (b"/", b"/"),
    ],
)
def test_options_of_an_authority_alone_is_of_the_whole_server(
    service: Service, upstream: ScriptedUpstream, target: bytes, arrives: bytes
) -> None:
    """RFC 9112 section 3.2.4."""
    seen, reply = forward(service, upstream, request(b"OPTIONS %s HTTP/1.1" % target))
    assert (seen.request_line, reply.status) == (b"OPTIONS %s HTTP/1.1" % arrives, 200)


@pytest.mark.parametrize(
    ("target", "host"),
    [
        (b"http://other.example/a", "other.example"),
        (b"http://other.example:8443/a", "other.example:8443"),
        (b"HTTPS://OTHER.example/a", "OTHER.example"),
        (b"http://user:secret@other.example:81/a", "other.example:81"),
        (b"http://[2001:db8::7]:81/a", "[2001:db8::7]:81"),
        (b"http://other.example?a", "other.example"),
    ],
)
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_the_authority_of_an_absolute_target_stands_for_host(
    service: Service, upstream: ScriptedUpstream, target: bytes, host: str, version: bytes
) -> None:
    """RFC 9112 section 3.2.2, whatever the Host line says."""
    seen, _ = forward(service, upstream, request(b"GET %s HTTP/%s" % (target, version)))
    assert seen.all("Host") == [host]
    assert seen.all("X-Forwarded-Host") == [host]
    assert b"client.example" not in seen.head
    assert b"secret" not in seen.head


@pytest.mark.parametrize("preserve", ["auto", "on", "off"])
@pytest.mark.parametrize("method", [b"GET", b"OPTIONS", b"POST"])
def test_http_1_0_without_a_host_is_served(
    start: Callable[..., Service], upstream: ScriptedUpstream, preserve: str, method: bytes
) -> None:
    """A load balancer's check. The application is asked for by its own name then."""
    service = start(UPSTREAM_URL=upstream.url, UPSTREAM_PRESERVE_HOST=preserve)
    seen, reply = forward(service, upstream, message(b"%s / HTTP/1.0" % method, b"X-A: 1"))
    assert (reply.status, reply.body) == (200, b"ok")
    assert seen.all("Host") == [f"127.0.0.1:{upstream.port}"]
    seen, reply = forward(service, upstream, method + b" / HTTP/1.0\r\n\r\n")
    assert (reply.status, reply.body) == (200, b"ok")
    live = service.exchange(b"GET /health/live HTTP/1.0\r\n\r\n")
    assert live.status == 200


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_an_empty_host_is_served(
    service: Service, upstream: ScriptedUpstream, version: bytes
) -> None:
    for line in (b"Host:", b"Host: ", b"host:\t"):
        seen, reply = forward(service, upstream, message(b"GET /a HTTP/" + version, line))
        assert reply.status == 200
        assert len(seen.all("Host")) == 1
        live = service.exchange(message(b"GET /health/live HTTP/" + version, line))
        assert live.status == 200


def test_http_1_0_with_two_hosts_is_400(service: Service, upstream: ScriptedUpstream) -> None:
    upstream.script(ok)
    for lines in ((b"Host: a", b"Host: b"), (b"Host: a", b"Host: a"), (b"Host:", b"Host: a")):
        with service.client() as client:
            client.send(message(b"GET / HTTP/1.0", *lines))
            problem(client.reply(), 400, "bad-request")
            assert client.closed()
    assert upstream.seen == []


def test_the_log_has_no_secret_of_an_absolute_target(
    service: Service, upstream: ScriptedUpstream
) -> None:
    before = len(service.log)
    forward(service, upstream, request(b"GET http://ann:s3cret@other.example/x HTTP/1.1"))
    wait_for(lambda: "other.example/x" in service.log[before:])
    assert "s3cret" not in service.log
    assert json.dumps("http://other.example/x") in service.log[before:]
