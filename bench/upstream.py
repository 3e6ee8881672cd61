"""An upstream over raw sockets: `upstream.py PORT PROCESSES`, all on one listening socket.

Any path is a body of 1 KB, /large one of 64 MiB, /events one server-sent event and then silence.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys

SMALL = b"x" * 1024
LARGE_BYTES = 64 << 20
EVENT = b"data: hello\n\n"


def head(length: int) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % length


class Caller:
    """One connection: the bytes of its request so far and what is left to send."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        self.left = memoryview(b"")


def answer(request: bytes) -> bytes | memoryview:
    target = request.split(b" ", 2)[1]
    if target == b"/large":
        return large
    if target == b"/events":
        return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENT
    return small


def serve(listener: socket.socket) -> None:
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ, None)
    while True:
        for key, ready in waiting.select():
            if key.data is None:
                try:
                    sock, _ = listener.accept()
                except BlockingIOError:
                    continue
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                waiting.register(sock, selectors.EVENT_READ, Caller(sock))
                continue
            caller: Caller = key.data
            try:
                if ready & selectors.EVENT_READ:
                    data = caller.sock.recv(65536)
                    if not data:
                        raise ConnectionError("closed")
                    caller.received += data
                    if not caller.received.endswith(b"\r\n\r\n"):
                        continue
                    caller.left = memoryview(answer(caller.received))
                    caller.received = b""
                while caller.left:
                    caller.left = caller.left[caller.sock.send(caller.left[: 1 << 20]) :]
                waiting.modify(caller.sock, selectors.EVENT_READ, caller)
            except BlockingIOError:
                waiting.modify(caller.sock, selectors.EVENT_WRITE, caller)
            except OSError:
                waiting.unregister(caller.sock)
                caller.sock.close()


if __name__ == "__main__":
    small = head(len(SMALL)) + SMALL
    large = memoryview(head(LARGE_BYTES) + bytes(LARGE_BYTES))
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
    listener.setblocking(False)
    children: list[int] = []
    for _ in range(int(sys.argv[2]) - 1):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            children = []
            break
        children.append(child)
    if children:

        def stop(*_: object) -> None:
            for child in children:
                os.kill(child, signal.SIGTERM)
            os._exit(0)

        signal.signal(signal.SIGTERM, stop)
    serve(listener)
