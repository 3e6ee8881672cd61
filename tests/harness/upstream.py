"""An upstream over raw sockets that records what it gets and answers what a test scripts."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

from tests.harness.client import message

# What the proxy sets on every request, whatever the client sent. Host is beside these.
PROXY_SETS = ["Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Request-Id"]


class Seen:
    """One request as the upstream received it, byte for byte."""

    def __init__(self, head: bytes, body: bytes, connection: int) -> None:
        self.head = head
        self.body = body
        self.connection = connection  # number of the connection it came on, from 0
        lines = head.split(b"\r\n")
        self.request_line = lines[0]
        method, self.target, self.version = lines[0].split(b" ")
        self.method = method.decode()
        self.headers = [
            (
                line.partition(b":")[0].decode("latin-1"),
                line.partition(b":")[2].strip().decode("latin-1"),
            )
            for line in lines[1:]
        ]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def get(self, name: str) -> str | None:
        values = self.all(name)
        return ", ".join(values) if values else None

    def __repr__(self) -> str:
        return f"<Seen {self.head!r} {self.body[:200]!r}>"


Answer = Callable[[socket.socket, Seen], Any]


def ok(sock: socket.socket, seen: Seen) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def echo_at_once(sock: socket.socket, seen: Seen) -> bool:
    """An `early` that answers at once and sends back each piece of the body as it comes."""
    left = int(seen.get("Content-Length") or 0)
    sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: %d" % left))
    piece = seen.body
    while left and (piece := piece or sock.recv(65536)):
        sock.sendall(piece)
        left -= len(piece)
        piece = b""
    return False


def read_chunks(sock: socket.socket, buffer: bytes) -> tuple[bytes, bytes]:
    """A body in chunks, the first of which is in `buffer`, and what follows it. OSError where it is
    cut; AssertionError where it is not as RFC 9112 section 7.1 has it."""

    def until(end: bytes) -> bytes:
        nonlocal buffer
        while end not in buffer:
            more(sock)
        line, _, buffer = buffer.partition(end)
        return line

    def more(sock: socket.socket) -> None:
        nonlocal buffer
        data = sock.recv(1 << 20)
        if not data:
            raise ConnectionError("the body was cut")
        buffer += data

    body = bytearray()
    while size := int(until(b"\r\n"), 16):
        while len(buffer) < size + 2:
            more(sock)
        body += buffer[:size]
        assert buffer[size : size + 2] == b"\r\n"
        buffer = buffer[size + 2 :]
    assert until(b"\r\n") == b""
    return bytes(body), buffer


class ScriptedUpstream:
    """An upstream over raw sockets: records each request, answers what the test scripts.

    `answer` is bytes to send after each request, or a function of (socket, Seen); a function
    that returns False, or raises OSError, has the connection closed. `early` is such a function
    too, called when a request's head is there and before its body is read. With `tls` it is an
    https one; the end of an answer is then no orderly end of TLS, unless the test makes one.
    """

    def __init__(
        self, answer: bytes | Answer = ok, tls: ssl.SSLContext | None = None, port: int = 0
    ) -> None:
        self.answer: bytes | Answer = answer
        self.early: Answer | None = None
        self.seen: list[Seen] = []
        self.connections = 0
        self.open: set[socket.socket] = set()
        # Whoever has a port for it has reserved that with a socket which shares it.
        address = ("127.0.0.1", port)
        self.listener = socket.create_server(address, backlog=512, reuse_port=port > 0)
        self.port = int(self.listener.getsockname()[1])
        self.tls = tls
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = self.connections
            self.connections += 1
            self.open.add(sock)
            threading.Thread(target=self._serve, args=(sock, number), daemon=True).start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        buffer = b""
        try:
            if self.tls is not None:
                sock = self.tls.wrap_socket(sock, server_side=True)
                self.open.add(sock)
            while True:
                while b"\r\n\r\n" not in buffer:
                    data = sock.recv(65536)
                    if not data:
                        return
                    buffer += data
                head, _, buffer = buffer.partition(b"\r\n\r\n")
                seen = Seen(head, b"", number)
                seen.body = buffer  # what has come of it
                if self.early and self.early(sock, seen) is False:
                    return
                length = seen.get("Content-Length")
                if codings := seen.all("Transfer-Encoding"):
                    assert codings == ["chunked"] and length is None, seen
                    seen.body, buffer = read_chunks(sock, buffer)
                    length = "0"
                while length and len(buffer) < int(length):
                    data = sock.recv(65536)
                    if not data:
                        return
                    buffer += data
                size = int(length or 0)
                if not codings:
                    seen.body, buffer = buffer[:size], buffer[size:]
                self.seen.append(seen)
                if isinstance(self.answer, bytes):
                    sock.sendall(self.answer)
                elif self.answer(sock, seen) is False:
                    return
        except OSError:
            return
        finally:
            self.open.discard(sock)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def script(self, answer: bytes | Answer) -> None:
        """Set the answer and forget what was seen."""
        self.answer = answer
        self.early = None
        self.seen.clear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for sock in list(self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
