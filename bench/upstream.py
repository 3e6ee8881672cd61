"""An upstream over raw sockets: `upstream.py PORT PROCESSES`, all on one listening socket.

Any path is a body of 1 KB, /large one of 64 MiB, /events one server-sent event and then silence.
/echo is a WebSocket that sends each message back. Its client masks with zeros, which saves this
process from unmasking: no proxy that passes frames on looks at them.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import selectors
import signal
import socket
import sys

SMALL = b"x" * 1024
LARGE_BYTES = 64 << 20
EVENT = b"data: hello\n\n"
ACCEPTED = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
MASK = bytes(4)


def head(length: int) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % length


class Caller:
    """One connection: the bytes received and not yet answered, and what is left to send."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        self.left = memoryview(b"")
        self.is_websocket = False

    def take(self, data: bytes) -> None:
        """Set what is to be sent, where the request or the message is whole."""
        self.received += data
        if self.is_websocket:
            self.left = memoryview(self.echo())
        elif self.received.endswith(b"\r\n\r\n"):
            self.left = memoryview(self.answer())

    def answer(self) -> bytes | memoryview:
        request, self.received = self.received, b""
        target = request.split(b" ", 2)[1]
        if target == b"/large":
            return large
        if target == b"/events":
            return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENT
        if target == b"/echo":
            accepted = handshake(request)
            self.is_websocket = accepted.startswith(b"HTTP/1.1 101 ")
            return accepted
        return small

    def echo(self) -> bytes:
        """The frame that has been received, without its mask; nothing before it is whole."""
        frame = self.received
        length, size = (frame[1] & 0x7F, 2) if len(frame) > 1 else (0, 2)
        if length == 126:
            length, size = int.from_bytes(frame[2:4], "big"), 4
        elif length == 127:
            length, size = int.from_bytes(frame[2:10], "big"), 10
        end = size + len(MASK) + length
        if len(frame) < end:
            return b""
        if frame[size : size + len(MASK)] != MASK or len(frame) > end:
            raise ConnectionError("one message at a time, masked with zeros")
        self.received = b""
        return frame[:1] + bytes([frame[1] & 0x7F]) + frame[2:size] + frame[size + len(MASK) :]


def handshake(request: bytes) -> bytes:
    key = re.search(rb"(?i)\r\nsec-websocket-key:[ \t]*(\S+)", request)
    if key is None:
        return b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
    accept = base64.b64encode(hashlib.sha1(key[1] + ACCEPTED).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %s\r\n\r\n" % accept
    )


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
                    caller.take(data)
                while caller.left:
                    caller.left = caller.left[caller.sock.send(caller.left[: 1 << 20]) :]
                if ready & selectors.EVENT_WRITE:
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
