"""A load generator for where wrk is not installed: `generator.py PORT CONNECTIONS SECONDS CALL ARG`.

Keeps a request under way on each connection, without pipelining, and prints what load.lua prints.
"""

from __future__ import annotations

import itertools
import json
import selectors
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

HEADERS = "Host: 127.0.0.1\r\nAccept: */*\r\nUser-Agent: bench\r\n"


class Connection:
    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent = 0.0
        self.buffer = b""

    def send(self, request: bytes) -> None:
        self.sent = time.perf_counter()
        self.buffer = b""
        self.sock.sendall(request)

    def receive(self) -> int | None:
        """Read what is there; the status once the answer is whole, None before."""
        data = self.sock.recv(1 << 18)
        if not data:
            raise ConnectionError("closed")
        self.buffer += data
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


def requests(call: str, argument: str) -> Callable[[], bytes]:
    """The next request: from a file of targets, or a create with a new email."""
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
    start = time.perf_counter()
    for _ in range(connections):
        connection = Connection(port)
        connection.send(following())
        waiting.register(connection.sock, selectors.EVENT_READ, connection)
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
