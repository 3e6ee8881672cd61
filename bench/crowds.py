"""Many connections that have nothing to say: event streams and WebSocket tunnels."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator

from generator import HANDSHAKE

# A connection has one descriptor here, one in the upstream and two in the proxy between, all of
# which may be in one of its processes. The spare ones are for all else.
SPARE_DESCRIPTORS = 512
# So many are opened before their answers are read; more would be more than a backlog holds.
AT_ONCE = 200

EVENTS = b"GET /events HTTP/1.1\r\nHost: bench\r\n\r\n"
# What is sent, and what shows that it has been answered.
KINDS = {
    "event streams": (EVENTS, b"data: hello"),
    "WebSocket tunnels": (HANDSHAKE, b"\r\n\r\n"),
}


def most() -> int:
    """How many can be open, with the descriptors of this process, and of those that it starts,
    raised to what they may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > 65536:
        hard = 65536
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    return (hard - SPARE_DESCRIPTORS) // 2


@contextlib.contextmanager
def opened(port: int, kind: str, count: int) -> Iterator[None]:
    """So many of a kind, each of which has been answered."""
    request, answer = KINDS[kind]
    with contextlib.ExitStack() as stack:
        for first in range(0, count, AT_ONCE):
            some = []
            for _ in range(min(AT_ONCE, count - first)):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
                sock.sendall(request)
                some.append(sock)
            for sock in some:
                received = b""
                while answer not in received:
                    data = sock.recv(65536)
                    if not data:
                        raise ConnectionError(f"one of {kind} ended: {received!r}")
                    received += data
        yield
