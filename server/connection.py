"""One connection to the upstream: writing a request, reading heads, and both at once.

What has arrived and is not taken yet is in `buffer`.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import ssl
import threading
import time
from typing import Any, BinaryIO

from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

from problems import UpstreamBroken, UpstreamTimeout, UpstreamUnreachable
from wire.answer import parse_head
from wire.fields import Field

PIECE_BYTES = 65536
MAX_HEAD_BYTES = 262144
# The beginning of a 1xx that is to be skipped, and how much of it is needed to tell.
INTERIM = re.compile(rb"HTTP/1\.[01] 1(?!01)[0-9]{2}")
INTERIM_BYTES = len("HTTP/1.1 100")


class Connection:
    """A connection of urllib3's, with what a forwarder needs to know of it."""

    _body: BinaryIO  # what the pieces of a request's body come from

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.buffer = b""
        self.heard = False  # whether a byte of an answer has arrived
        self._unsent = memoryview(b"")  # the piece of the body that is next
        self.refused = False  # whether the upstream would not take all of it
        self.aborted = False  # whether this side gave it up
        self._ours = threading.Lock()
        self._released = False

    @property
    def sock(self) -> Any:
        return self.raw.sock

    def connect(self, seconds: float) -> None:
        """Open it. Raises UpstreamUnreachable, or UpstreamTimeout after `seconds`."""
        self.raw.timeout = seconds
        try:
            self.raw.connect()
        except NewConnectionError as error:  # which is a ConnectTimeoutError too
            raise UpstreamUnreachable from error
        except (ConnectTimeoutError, TimeoutError):
            raise UpstreamTimeout("The upstream did not accept a connection in time.") from None
        except (HTTPError, OSError, ValueError) as error:
            raise UpstreamUnreachable from error
        if isinstance(self.sock, ssl.SSLSocket):
            # An end of file without TLS's own would pass for the end of the body.
            self.sock.suppress_ragged_eofs = False  # type: ignore[attr-defined]

    @property
    def whole(self) -> bool:
        """Whether all of the request has been written."""
        return not (self._unsent or self.refused)

    def close(self) -> None:
        self.raw.close()

    def abort(self) -> None:
        """Wake whichever thread is reading or writing; callable from any thread, and without
        effect once the connection is released, for then it may be another caller's."""
        with self._ours:
            sock = None if self._released else self.sock
            if sock is not None:
                self.aborted = True
                with contextlib.suppress(OSError):
                    # Not SSLSocket.shutdown, which would take the TLS layer from under that thread.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def disown(self) -> None:
        """It is not this exchange's any more."""
        with self._ours:
            self._released = True

    def send(self, head: bytes, body: BinaryIO | None, seconds: float) -> None:
        """Write a request up to its end, or to where the upstream begins its final answer: what is
        left then is written while that is read. Raises TimeoutError after `seconds` in which
        nothing could be written."""
        sock = self.sock
        sock.settimeout(seconds)
        try:
            if body is None:
                sock.sendall(head)
                return
            sock.sendall(head + body.read(PIECE_BYTES))
            self._body, self._unsent = body, memoryview(body.read(PIECE_BYTES))
            deadline = time.monotonic() + seconds
            while self._unsent:
                arrived = self._move()
                if arrived is None:
                    deadline = time.monotonic() + seconds
                elif not arrived or self._answered():
                    return
                elif time.monotonic() > deadline:  # nothing but interim answers
                    raise TimeoutError
        except (ConnectionError, ssl.SSLError):  # the latter is TLS's word for a broken pipe
            # It may have answered before (RFC 9112 section 9.3).
            self._stop_sending()

    def _stop_sending(self) -> None:
        self._unsent = memoryview(b"")
        self.refused = True

    def _move(self) -> bool | None:
        """Wait until something can be read, or more of the body be written, and do that. Returns
        whether anything arrived, False at the end of file, None where there was nothing to read.
        Raises TimeoutError where neither could be done within the socket's time-out."""
        sock = self.sock
        seconds = sock.gettimeout()
        poller = select.poll()
        poller.register(sock, select.POLLIN | select.POLLOUT)
        ready = poller.poll(seconds * 1000)
        if not ready:
            raise TimeoutError
        events = ready[0][1]
        sock.settimeout(0)  # with TLS, readable may mean a session ticket, and writable too little
        try:
            if events & ~select.POLLOUT:
                with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
                    return self._arrived(sock.recv(PIECE_BYTES))
            if events & select.POLLOUT:
                self._write(sock)
        finally:
            sock.settimeout(seconds)
        return None

    def _write(self, sock: Any) -> None:
        try:
            self._unsent = self._unsent[sock.send(self._unsent) :]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            self._stop_sending()
        if not self._unsent and not self.refused:
            self._unsent = memoryview(self._body.read(PIECE_BYTES))

    def _answered(self) -> bool:
        """Whether what has arrived is more than interim answers, which are dropped: the upstream
        that sends a 100 waits for the rest of the body."""
        while INTERIM.match(self.buffer):
            end, size = self._end_of_head(0)
            if end < 0:
                return len(self.buffer) > MAX_HEAD_BYTES
            parse_head(self.buffer[:end].decode("latin-1"))
            self.buffer = self.buffer[end + size :]
        # Fewer bytes do not yet tell an interim answer from a final one.
        return len(self.buffer) >= INTERIM_BYTES

    def receive(self, until: float | None = None) -> bool:
        """Read what has arrived, or wait for it, and write meanwhile what is left of the body: an
        upstream that answers as it reads waits for both. False at the end of file. Raises
        TimeoutError at `until`, on the monotonic clock, or after the socket's time-out."""
        while True:
            if until is not None:
                left = until - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self.sock.settimeout(left)
            if not self._unsent:
                return self._arrived(self.sock.recv(PIECE_BYTES))
            arrived = self._move()
            if arrived is not None:
                return arrived

    def _arrived(self, data: bytes) -> bool:
        self.buffer = self.buffer + data if self.buffer else data
        self.heard = self.heard or bool(data)
        return bool(data)

    def read_head(self, deadline: float) -> tuple[str, int, str, list[Field]]:
        """Read the head of one answer, which must be whole by `deadline`, on the monotonic clock:
        version, status, reason and header lines. Raises UpstreamBroken, EOFError or OSError."""
        scanned = 0
        while True:
            end, size = self._end_of_head(scanned)
            if (len(self.buffer) if end < 0 else end) > MAX_HEAD_BYTES:
                raise UpstreamBroken("The head of the upstream's answer is too large.")
            if end >= 0:
                break
            scanned = max(0, len(self.buffer) - 3)
            # Every recv has its own time-out: a head that trickles in would outlive any of them.
            if not self.receive(deadline):
                raise EOFError
        head, self.buffer = self.buffer[:end], self.buffer[end + size :]
        return parse_head(head.decode("latin-1"))

    def _end_of_head(self, scanned: int) -> tuple[int, int]:
        # Lone line feeds are taken for line ends (RFC 9112 section 2.2), the earlier end wins.
        end, bare = self.buffer.find(b"\r\n\r\n", scanned), self.buffer.find(b"\n\n", scanned)
        mixed = self.buffer.find(b"\n\r\n", scanned)
        if end >= 0 and (bare < 0 or end < bare) and mixed == end + 1:
            return end, 4
        candidates = [(at, size) for at, size in ((bare, 2), (mixed, 3)) if at >= 0]
        if not candidates:
            return -1, 0
        end, size = min(candidates)
        return (end - 1, size + 1) if self.buffer[end - 1 : end] == b"\r" else (end, size)
