"""Clients that read slowly, for over a minute."""

from __future__ import annotations

import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import RawClient, ScriptedUpstream, Seen, Service, chunked, message, request

BODY = bytes(range(256)) * (32 << 12)  # 32 MiB
# A client that takes nothing for a minute is cut; those below read for longer than that.
SECONDS = 75.0


def answer(sock: socket.socket, seen: Seen) -> bool:
    """All of the body, framed as the target says."""
    line = b"HTTP/1.1 200 OK"
    if seen.target == b"/length":
        sock.sendall(message(line, b"Content-Length: %d" % len(BODY), body=BODY))
    elif seen.target == b"/chunked":
        pieces = [BODY[at : at + 65536] for at in range(0, len(BODY), 65536)]
        sock.sendall(message(line, b"Transfer-Encoding: chunked", body=chunked(*pieces)))
    else:
        sock.sendall(message(line, body=BODY))
    return seen.target != b"/close"


def begin(service: Service, target: bytes, room: int | None) -> RawClient:
    """A client that has asked, whose kernel takes so many bytes for it."""
    client = RawClient(service.port, 30, room)
    client.send(request(b"GET %s HTTP/1.1" % target))
    return client


def read_steadily(
    service: Service, target: bytes, rate: int, every: float, room: int | None
) -> None:
    """Read `rate` bytes a second, some of them every so many seconds, then all of the rest."""
    with begin(service, target, room) as client:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            threading.Event().wait(every)
            left = int(rate * every)
            while left:
                data = client.sock.recv(left)
                assert data, f"cut {until - time.monotonic():.0f} s too early: {target!r} {rate}"
                client.buffer += data
                left -= len(data)
        reply = client.reply()
        assert (reply.status, reply.complete, reply.body == BODY) == (200, True, True)


def read_after_a_while(service: Service) -> None:
    with begin(service, b"/length", 4096) as client:
        threading.Event().wait(45)
        reply = client.reply()
        assert (reply.complete, reply.body == BODY) == (True, True)


def never_read(service: Service, target: bytes) -> None:
    """Its connection is reset; what it has by then does not look whole."""
    with begin(service, target, 4096) as client:
        began = time.monotonic()
        closed = threading.Event()
        while not closed.is_set() and time.monotonic() - began < 95:
            threading.Event().wait(0.5)
            # Without reading: the kernel tells of a reset in an error of its own.
            if client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                closed.set()
        assert closed.is_set()
        assert 55 < time.monotonic() - began < 90


@pytest.mark.slow
def test_whoever_reads_steadily_is_served_to_the_end_and_whoever_does_not_is_cut() -> None:
    """A reader of 5 to 20 KB a second was reset after 61 to 77 seconds: what its kernel had taken
    from ours counted, which for a while is nothing, and not what it had read."""
    upstream = ScriptedUpstream(answer)
    with Service(UPSTREAM_URL=upstream.url) as service, ThreadPoolExecutor(16) as threads:
        readers = [
            threads.submit(read_steadily, service, target, rate, every, room)
            for target in (b"/length", b"/chunked", b"/close")
            for rate, every, room in (
                (5_000, 0.5, 4096),
                (5_000, 0.5, None),
                (20_000, 2.0, 65536),
            )
        ]
        readers.append(threads.submit(read_after_a_while, service))
        readers += [
            threads.submit(never_read, service, target) for target in (b"/length", b"/chunked")
        ]
        for reader in readers:
            reader.result()
        part = service.call("GET", "/health").json()["upstream"]
        assert part["in_flight"] == 0
        told = re.findall(r'GET "(.*)" cut: the client took nothing for 60 s', service.log)
        assert sorted(told) == ["/chunked", "/length"]
    upstream.close()
