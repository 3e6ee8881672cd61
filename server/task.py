"""Having one request answered, and writing the answer: waitress's task, replaced."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from email.utils import formatdate
from functools import lru_cache
from typing import Any, Protocol

from waitress.channel import ClientDisconnected

from server.parser import RequestParser
from wire.fields import Field


class Writer(Protocol):
    """The client's connection, as far as an answer is concerned."""

    server: Any
    addr: tuple[str, int]
    gone: bool

    @property
    def stalled(self) -> bool:
        """Whether the client has not yet taken all that was written."""

    def write_soon(self, data: bytes, patient: bool = False) -> int:
        """Send `data`, now or later. Raises ClientDisconnected."""

    def reset_on_close(self) -> None:
        """Make closing the connection send a reset, not an orderly end."""


class Task:
    """Has one request answered and writes the answer.

    Waitress's own sorts and re-cases header names, adds `Via` and `Server`, refuses hop-by-hop
    names, gives HEAD a chunked body and closes after every 204 and 304. Here the header lines go
    out as the application gave them, and only this hop's framing is added.
    """

    status = ""
    close_on_finish = False
    body: Iterable[bytes] = ()
    head = b""
    pieces: Any = None
    bytes_sent = 0
    remaining: int | None = None
    chunked = False

    def __init__(self, channel: Writer, request: RequestParser) -> None:
        self.channel = channel
        self.request = request

    def run(self) -> bool:
        """Start or go on with the answer. False where the client does not read: run it again
        when the client has taken what is waiting for it."""
        try:
            if self.pieces is None:
                application = self.channel.server.application
                self.status, fields, self.body = application.answer(self.request, self.channel)
                self._begin(fields)
                self.pieces = iter(self.body)
            for piece in self.pieces:
                self.write(piece)
                if self.channel.stalled and self.more:
                    self.body.pause()  # type: ignore[attr-defined]
                    return False
            self._end()
        except ClientDisconnected:
            self.close_on_finish = True
        except Exception as error:
            # Mid-body the status has gone: all that is left is an end that is visibly not one.
            if not self.channel.gone:
                self.channel.server.log_failure(self.request, error)
            self.cut()
        self.finish()
        return True

    def _begin(self, fields: list[Field]) -> None:
        request, status = self.request, self.status[:3]
        lines = [f"HTTP/1.1 {self.status}"]
        length, dated = None, False
        for name, value in fields:
            match name.lower():
                case "content-length":
                    length = value
                    if status == "204":
                        continue
                case "date":
                    dated = True
            lines.append(f"{name}: {value}")
        self.close_on_finish = (
            request.connection_close or request.body_unread or self.channel.server.draining
        )
        if request.command == "HEAD" or status in ("204", "304"):
            self.remaining = 0
        elif length is not None:
            self.remaining = int(length)
        elif request.version == "1.1":
            self.chunked = True
            lines.append("Transfer-Encoding: chunked")
        else:
            self.close_on_finish = True
        if self.close_on_finish:
            lines.append("Connection: close")
        elif request.version == "1.0":
            lines.append("Connection: keep-alive")
        if not dated:
            lines.append(f"Date: {http_date(int(time.time()))}")  # RFC 9110 section 6.6.1
        self.head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    @property
    def more(self) -> bool:
        """Whether the body is a stream with more to come, which waits for a client that does not
        read. Its last piece, like a body that is here already, is left to the loop."""
        return getattr(self.body, "more", False)

    def write(self, piece: bytes) -> None:
        """Send a piece of the body, and the head before it if it has not gone yet. An empty piece
        sends the head alone, so that it does not wait for the body."""
        if self.remaining is not None:
            piece = piece[: self.remaining]
            self.remaining -= len(piece)
        self.bytes_sent += len(piece)
        if self.chunked and piece:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        if self.head:
            piece = self.head + piece
            self.head = b""
        if piece:
            self.channel.write_soon(piece, patient=self.more)

    def _end(self) -> None:
        if self.remaining:
            raise RuntimeError("the application's body is shorter than its Content-Length")
        last = b"0\r\n\r\n" if self.chunked else b""
        if self.head or last:
            self.channel.write_soon(self.head + last)
            self.head = b""

    def cut(self) -> None:
        """End the connection so that the answer cannot be taken for a whole one."""
        self.close_on_finish = True
        if self.remaining is None and not self.chunked:
            self.channel.reset_on_close()

    def finish(self) -> None:
        """Close the application's body and write the access log's line. Once."""
        with contextlib.suppress(Exception):
            getattr(self.body, "close", lambda: None)()
        self.channel.server.log_access(self)


@lru_cache(2)
def http_date(now: int) -> str:
    """Seconds since 1970 as RFC 9110 section 5.6.7 has them."""
    return formatdate(now, usegmt=True)
