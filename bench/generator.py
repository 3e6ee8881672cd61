"""A load generator: `generator.py PORT CONNECTIONS SECONDS CALL ARG`, where wrk is not installed
and for WebSockets.

Keeps a request or a message under way on each connection, without pipelining, and prints what
load.lua prints. CALL is get, with a file of targets; create, with a prefix of addresses; or echo,
with the bytes of a message.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

HEADERS = "Host: 127.0.0.1\r\nAccept: */*\r\nUser-Agent: bench\r\n"


class Connection:
    """A connection on which one request is under way; `receive` says how far its answer is."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent = 0.0
        self.buffer = b""

    def send(self, request: bytes) -> None:
        self.sent = time.perf_counter()
        self.buffer = b""
        self.sock.sendall(request)

    def received(self) -> bytes:
        data = self.sock.recv(1 << 18)
        if not data:
            raise ConnectionError("closed")
        return data

    def receive(self) -> int | None:
        """Read what is there; the status once the answer is whole, None before."""
        self.buffer += self.received()
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return None
        head = head.lower()
        if b"\r\ntransfer-encoding: chunked" in head:
            whole = body.endswith(b"0\r\n\r\n")
        else:
            length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
            whole = len(body) >= int(length or 0)
        return int(head.split(b" ", 2)[1]) if whole else None


class WebSocket(Connection):
    """The same for a message that is sent back; the first one is compared byte for byte."""

    def __init__(self, port: int, message: bytes) -> None:
        super().__init__(port)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        self.sock.sendall(HANDSHAKE)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.received()
        if not head.startswith(b"HTTP/1.1 101 "):
            raise ConnectionError(head.decode("latin-1"))
        self.awaited = len(message) - 4
        self.left = self.awaited
        self.sock.sendall(message)
        echo = b""
        while len(echo) < self.awaited:
            echo += self.received()
        if echo != message[:1] + bytes([message[1] & 0x7F]) + without_mask(message):
            raise ConnectionError("the message came back as another")

    def receive(self) -> int | None:
        self.left -= len(self.received())
        if self.left > 0:
            return None
        ok = self.left == 0
        self.left = self.awaited
        return 200 if ok else 500


HANDSHAKE = (
    b"GET /echo HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def frame(size: int) -> bytes:
    """A message of random bytes, masked with zeros."""
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 1 << 16:
        length = bytes([0x80 | 126]) + size.to_bytes(2, "big")
    else:
        length = bytes([0x80 | 127]) + size.to_bytes(8, "big")
    return b"\x82" + length + bytes(4) + os.urandom(size)


def without_mask(message: bytes) -> bytes:
    """What follows the first two bytes of a frame, without its four bytes of mask."""
    more = {126: 2, 127: 8}.get(message[1] & 0x7F, 0)
    return message[2 : 2 + more] + message[6 + more :]


def requests(call: str, argument: str) -> Callable[[], bytes]:
    """The next request: from a file of targets, a create with a new email, or a message."""
    if call == "echo":
        return itertools.repeat(frame(int(argument))).__next__
    if call == "create":
        numbers = itertools.count()

        def create() -> bytes:
            body = f'{{"email": "{argument}-{next(numbers)}@example.com", "name": "A new user"}}'
            return (
                f"POST /users HTTP/1.1\r\n{HEADERS}Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}"
            ).encode()

        return create
    targets = Path(argument).read_text().split()
    return itertools.cycle(
        [f"GET {target} HTTP/1.1\r\n{HEADERS}\r\n".encode() for target in targets]
    ).__next__


def run(port: int, connections: int, seconds: float, call: str, argument: str) -> dict[str, float]:
    following = requests(call, argument)
    waiting = selectors.DefaultSelector()
    latencies: list[float] = []
    failed = 0
    opened = []
    for _ in range(connections):
        connection = WebSocket(port, following()) if call == "echo" else Connection(port)
        opened.append(connection)
        waiting.register(connection.sock, selectors.EVENT_READ, connection)
    start = time.perf_counter()
    for connection in opened:
        connection.send(following())
    while (now := time.perf_counter()) < start + seconds:
        for key, _ in waiting.select(timeout=0.1):
            connection = key.data
            try:
                status = connection.receive()
                if status is None:
                    continue
                latencies.append(time.perf_counter() - connection.sent)
                failed += not 200 <= status < 300
                connection.send(following())
            except OSError:
                failed += 1
                waiting.unregister(key.fileobj)
                connection.sock.close()
    latencies.sort()

    def percentile(share: float) -> float:
        return latencies[int(len(latencies) * share)] * 1000 if latencies else 0.0

    return {
        "requests": len(latencies),
        "seconds": now - start,
        "failed": failed,
        "p50_ms": percentile(0.50),
        "p99_ms": percentile(0.99),
    }


if __name__ == "__main__":
    port, connections, seconds, call, argument = sys.argv[1:]
    print(json.dumps(run(int(port), int(connections), float(seconds), call, argument)))
