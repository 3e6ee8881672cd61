"""Raw client connections, and the HTTP messages that they send and read."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Reply:
    """One parsed HTTP answer: `status`, `reason`, `headers` (pairs, as sent), `body`."""

    def __init__(self, head: bytes, body: bytes, complete: bool) -> None:
        lines = head.split(b"\r\n")
        self.status_line = lines[0]
        parts = lines[0].split(b" ", 2)
        self.status = int(parts[1])
        self.reason = parts[2].decode("latin-1") if len(parts) > 2 else ""
        self.headers: list[tuple[str, str]] = []
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            self.headers.append((name.decode("latin-1"), value.strip(b" \t").decode("latin-1")))
        self.body = body
        self.complete = complete

    def get(self, name: str) -> str | None:
        """The value of a header, its lines joined by a comma; None where it is absent."""
        values = self.all(name)
        return ", ".join(values) if values else None

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def json(self) -> Any:
        return json.loads(self.body)

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self.headers} {self.body[:300]!r} complete={self.complete}>"


class RawClient:
    """A client connection: sends bytes as they are given, parses answers strictly. `room` is how
    many bytes its kernel takes that are not read yet; the kernel decides unless it is given."""

    def __init__(self, port: int, timeout: float = 15, room: int | None = None) -> None:
        self.sock = socket.socket()
        self.sock.settimeout(timeout)
        if room is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        self.sock.connect(("127.0.0.1", port))
        self.buffer = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ConnectionError:
            return False
        self.buffer += data
        return bool(data)

    def head(self) -> bytes:
        """Read up to the end of an answer's head; the body's first bytes stay in `buffer`."""
        while b"\r\n\r\n" not in self.buffer:
            if not self._more():
                raise EOFError(f"closed before an answer's head was whole: {self.buffer!r}")
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        return head

    def reply(self, method: str = "GET") -> Reply:
        """Read one whole answer (interim ones are skipped); `complete` is False where it was cut."""
        head = self.head()
        while head.split(b" ", 2)[1].startswith(b"1"):
            head = self.head()
        reply = Reply(head, b"", True)
        coding = reply.all("Transfer-Encoding")
        lengths = reply.all("Content-Length")
        if method == "HEAD" or reply.status in (204, 304):
            return reply
        if coding:
            assert coding == ["chunked"] and not lengths, reply
            body = b""
            while True:
                while b"\r\n" not in self.buffer:
                    if not self._more():
                        return Reply(head, body, False)
                line, _, self.buffer = self.buffer.partition(b"\r\n")
                size = int(line.split(b";")[0], 16)
                while len(self.buffer) < size + 2:
                    if not self._more():
                        return Reply(head, body + self.buffer[:size], False)
                piece, end = self.buffer[:size], self.buffer[size : size + 2]
                assert end == b"\r\n", end
                self.buffer = self.buffer[size + 2 :]
                if size == 0:
                    return Reply(head, body, True)
                body += piece
        if lengths:
            assert len(lengths) == 1, reply
            size = int(lengths[0])
            pieces, left = [self.buffer[:size]], size - len(self.buffer[:size])
            self.buffer = self.buffer[size:]
            while left and self._more():
                pieces.append(self.buffer[:left])
                self.buffer = self.buffer[left:]
                left -= len(pieces[-1])
            return Reply(head, b"".join(pieces), not left)
        while True:
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                body, self.buffer = self.buffer, b""
                return Reply(head, body, False)
            if not data:
                body, self.buffer = self.buffer, b""
                return Reply(head, body, True)
            self.buffer += data

    def converse(self, data: bytes, method: str = "GET") -> Reply:
        """Send `data`, and read the answer meanwhile: where a body is answered while it is sent, a
        client that only sends would wait for itself."""
        with ThreadPoolExecutor(1) as thread:
            sending = thread.submit(self.send, data)
            reply = self.reply(method)
            sending.result()
        return reply

    def closed(self, seconds: float = 5) -> bool:
        """Whether the other side closes within `seconds` without sending another byte."""
        self.sock.settimeout(seconds)
        try:
            return self.sock.recv(1) == b"" and not self.buffer
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def exchange(port: int, data: bytes, method: str = "GET", timeout: float = 15) -> Reply:
    """Send raw bytes on a new connection and read one answer."""
    with RawClient(port, timeout) as client:
        client.send(data)
        return client.reply(method)


def call(
    port: int,
    method: str,
    target: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    timeout: float = 15,
) -> Reply:
    """One request on a new connection; a body that is not bytes is sent as JSON."""
    lines = {"Host": f"127.0.0.1:{port}"}
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        lines["Content-Type"] = "application/json"
    if body is not None:
        lines["Content-Length"] = str(len(body))
    lines.update(headers or {})
    head = f"{method} {target} HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    return exchange(port, head.encode("latin-1") + (body or b""), method, timeout)


def message(first_line: bytes, *lines: bytes, body: bytes = b"") -> bytes:
    """An HTTP message, request or answer, of exactly these bytes."""
    return b"\r\n".join((first_line, *lines)) + b"\r\n\r\n" + body


def request(first_line: bytes = b"GET / HTTP/1.1", *lines: bytes, body: bytes = b"") -> bytes:
    """A request with a Host line before `lines`; no framing is added for `body`."""
    return message(first_line, b"Host: client.example", *lines, body=body)


def chunked(*pieces: bytes, trailer: bytes = b"") -> bytes:
    """A body in the chunked coding, a chunk for each piece (RFC 9112 section 7.1)."""
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return chunks + b"0\r\n" + trailer + b"\r\n"


def problem(reply: Reply, status: int, name: str) -> dict[str, Any]:
    """The problem document of an answer, checked for what RFC 9457 and every problem here have."""
    assert reply.status == status, reply
    assert reply.get("Content-Type") == "application/problem+json", reply
    document: dict[str, Any] = reply.json()
    assert document["type"] == f"urn:gatehouse:{name}", reply
    assert document["status"] == status, reply
    assert document["title"] and document["detail"], reply
    assert document["request_id"] == reply.get("X-Request-Id"), reply
    known = {"type", "title", "status", "detail", "request_id", "errors", "outcome"}
    assert set(document) <= known, reply
    return document


def invalid_fields(document: dict[str, Any]) -> list[str]:
    """The names in a problem's `errors`, sorted; each has a message."""
    assert all(set(error) == {"field", "message"} for error in document["errors"]), document
    assert all(error["message"] for error in document["errors"]), document
    return sorted(error["field"] for error in document["errors"])
