"""NTLM and Negotiate authenticate a connection, not a request (RFC 4559 section 6).

Were the connection to the upstream shared as others are, a log-in of several steps would be spread
over several connections, and whoever came next would be taken for the one who had logged in.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from tests.harness import (
    DEAD_DATABASE,
    ScriptedUpstream,
    Seen,
    Service,
    message,
    ok,
    request,
    wait_for,
)


@pytest.fixture(scope="module")
def database() -> str:
    """No database: no proxied request may depend on one."""
    return DEAD_DATABASE


def challenged(*values: bytes) -> bytes:
    lines = [b"WWW-Authenticate: " + value for value in values]
    return message(b"HTTP/1.1 401 Unauthorized", *lines, b"Content-Length: 0")


def asked(target: bytes, *lines: bytes) -> bytes:
    return request(b"GET %s HTTP/1.1" % target, *lines)


@pytest.mark.parametrize(
    "challenge",
    [
        [b"NTLM"],
        [b"Negotiate"],
        [b"ntlm TlRMTVNTUAACAAAA"],
        [b'Basic realm="a, b"', b"NTLM"],
        [b'Basic realm="a", Negotiate'],
    ],
)
def test_a_client_that_logs_in_has_a_connection_of_its_own(
    service: Service, upstream: ScriptedUpstream, challenge: list[bytes]
) -> None:
    upstream.script(challenged(*challenge))
    with service.client() as ann, service.client() as bob:
        ann.send(asked(b"/ann"))
        assert ann.reply().status == 401
        upstream.answer = ok
        for _ in range(3):
            for client, target in ((bob, b"/bob"), (ann, b"/ann")):
                client.send(asked(target))
                assert client.reply().status == 200
    by_target = {seen.target: set() for seen in upstream.seen}
    for seen in upstream.seen:
        by_target[seen.target].add(seen.connection)
    [[anns], [bobs]] = by_target[b"/ann"], by_target[b"/bob"]
    assert anns != bobs


@pytest.mark.parametrize("credentials", [b"Negotiate YII=", b"NTLM TlRMTVNTUAABAAAA"])
def test_credentials_of_a_connection_bind_it_without_a_challenge(
    service: Service, upstream: ScriptedUpstream, credentials: bytes
) -> None:
    upstream.script(ok)
    with service.client() as ann, service.client() as bob:
        ann.send(asked(b"/ann", b"Authorization: " + credentials))
        assert ann.reply().status == 200
        bob.send(asked(b"/bob"))
        assert bob.reply().status == 200
        ann.send(asked(b"/ann"))
        assert ann.reply().status == 200
    first, bobs, again = [seen.connection for seen in upstream.seen]
    assert first == again != bobs


def test_it_ends_with_its_client(service: Service, upstream: ScriptedUpstream) -> None:
    used: list[socket.socket] = []

    def challenge(sock: socket.socket, seen: Seen) -> None:
        used.append(sock)
        sock.sendall(challenged(b"NTLM"))

    upstream.script(challenge)
    with service.client() as ann:
        ann.send(asked(b"/ann"))
        assert ann.reply().status == 401
        assert used[0] in upstream.open
    wait_for(lambda: used[0] not in upstream.open, 2, "the client's connection to be closed")


def test_a_client_whose_connection_the_upstream_closed_gets_a_new_one(
    service: Service, upstream: ScriptedUpstream
) -> None:
    def close(sock: object, seen: object) -> bool:
        sock.sendall(challenged(b"NTLM"))  # type: ignore[attr-defined]
        return False

    upstream.script(close)
    with service.client() as ann:
        for answer, status in ((close, 401), (ok, 200), (ok, 200)):
            upstream.answer = answer
            ann.send(asked(b"/ann"))
            assert ann.reply().status == status
            if status == 401:
                used = upstream.seen[-1].connection
    assert used not in [seen.connection for seen in upstream.seen[1:]]


def test_other_schemes_bind_nothing(
    start: Callable[..., Service], upstream: ScriptedUpstream
) -> None:
    upstream.script(challenged(b'Basic realm="NTLM"', b"Bearer"))
    service = start(UPSTREAM_URL=upstream.url, WORKERS=1)  # A worker keeps its own connections.
    with service.client() as ann, service.client() as bob:
        ann.send(asked(b"/ann", b"Authorization: Basic bnRsbTpudGxt"))
        assert ann.reply().status == 401
        bob.send(asked(b"/bob"))
        assert bob.reply().status == 401
    assert upstream.seen[0].connection == upstream.seen[1].connection


def test_behind_a_trusted_proxy_a_connection_is_one_log_ins(
    start: Callable[..., Service], upstream: ScriptedUpstream
) -> None:
    """The proxy sends requests of many clients on one connection: the next one was taken for the
    client who had logged in."""
    service = start(UPSTREAM_URL=upstream.url, WORKERS=1, TRUSTED_PROXIES="127.0.0.1")
    log_in = [
        (b"Authorization: NTLM TlRMTVNTUAABAAAA", challenged(b"NTLM TlRMTVNTUAACAAAA"), 401),
        (b"Authorization: NTLM TlRMTVNTUAADAAAA", ok, 200),
        (b"X-Forwarded-For: 192.0.2.2", ok, 200),
        (b"Authorization: Negotiate YII=", challenged(b"Negotiate"), 401),
        (b"X-Forwarded-For: 192.0.2.2", ok, 200),
    ]
    upstream.script(ok)
    with service.client() as proxy:
        for line, answer, status in log_in:
            upstream.answer = answer
            proxy.send(asked(b"/", line))
            assert proxy.reply().status == status
    first, second, other, negotiating, last = [seen.connection for seen in upstream.seen]
    assert first == second
    assert len({second, other, negotiating, last}) > 2 and negotiating != last != second != other
