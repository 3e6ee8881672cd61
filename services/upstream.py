"""The upstream's side of the wire: what is plugged into requests' HTTPAdapter to be faithful.

requests keeps the connection pool, connecting, TLS and its CA bundle. Writing a request and reading
an answer are done here, because the layers below change what passes through them: urllib3 encodes
the target anew and adds User-Agent and Accept-Encoding; http.client takes a 103 for the answer and
gives the real one to the next caller, loses every header after a malformed line, and takes a body
that was cut inside its chunks for whole.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

from services.answers import parse_head
from services.chunks import Chunks
from services.errors import UpstreamBroken, UpstreamTimeout, UpstreamUnreachable
from services.fields import Field, listed

PIECE_BYTES = 65536
MAX_HEAD_BYTES = 262144
# RFC 9110 section 9.2.2.
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
# A request that must not be sent twice goes on a connection that was in use this many seconds ago
# at most: the shorter the idle time, the smaller the chance that the upstream is just closing it.
FRESH_SECONDS = 1.0

LENGTH = re.compile(r"[0-9]{1,18}")
# The beginning of a 1xx that is to be skipped, and how much of it is needed to tell.
INTERIM = re.compile(rb"HTTP/1\.[01] 1(?!01)[0-9]{2}")
INTERIM_BYTES = len("HTTP/1.1 100")


class Client(Protocol):
    """Who a request is forwarded for: `on_gone` is called, once, when they have gone."""

    addr: tuple[str, int]
    gone: bool
    on_gone: Any


class ClientGone(Exception):
    """The client left while its request was with the upstream."""


class Connection:
    """A connection of urllib3's, with what a forwarder needs to know of it."""

    _body: BinaryIO  # what the pieces of a request's body come from

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.buffer = b""
        self.heard = False  # whether a byte of an answer has arrived
        self._unsent = memoryview(b"")  # the piece of the body that is next
        self.refused = False  # whether the upstream would not take all of it
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
        except ConnectionError:
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

    def receive(self) -> bool:
        """Read what has arrived, or wait for it, and write meanwhile what is left of the body: an
        upstream that answers as it reads waits for both. False at the end of file."""
        while self._unsent:
            arrived = self._move()
            if arrived is not None:
                return arrived
        return self._arrived(self.sock.recv(PIECE_BYTES))

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
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            # Every recv has its own time-out: a head that trickles in would outlive any of them.
            self.sock.settimeout(left)
            if not self.receive():
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
        return min(candidates) if candidates else (-1, 0)


class Answer:
    """An answer: `status`, `reason` and `fields` as they came, and the body by `pieces`."""

    def __init__(self, upstream: Upstream, connection: Connection, method: str) -> None:
        self._upstream = upstream
        self._connection: Connection | None = connection
        version, self.status, self.reason, self.fields = self._final_head(connection)
        lengths: list[str] = []
        codings: list[str] = []
        options: list[str] = []
        for name, value in self.fields:
            match name.lower():
                case "content-length":
                    lengths.append(value)
                case "transfer-encoding":
                    codings.append(value.lower())
                case "connection":
                    options += listed([value.lower()])
        if any(not LENGTH.fullmatch(length) for length in lengths) or len(lengths) > 1:
            raise UpstreamBroken("The Content-Length of the upstream's answer is malformed.")
        if codings and (codings != ["chunked"] or lengths or version == "1.0"):
            raise UpstreamBroken("The Transfer-Encoding of the upstream's answer is malformed.")
        bodiless = method == "HEAD" or self.status in (204, 304)
        # RFC 9112 section 6.3: none, by chunks, by length, or until the connection closes.
        self._chunked = bool(codings) and not bodiless
        self._left: int | None = 0 if bodiless else int(lengths[0]) if lengths else None
        persistent = "keep-alive" in options if version == "1.0" else True
        framed = self._chunked or self._left is not None
        # One that must have no body but announces one may send it, as the next caller's answer.
        announced = bool(codings) or (self.status == 204 and lengths not in ([], ["0"]))
        stray = announced and self.status in (204, 304)
        self._keep = framed and persistent and not stray and "close" not in options

    def _final_head(self, connection: Connection) -> tuple[str, int, str, list[Field]]:
        deadline = time.monotonic() + self._upstream.read_timeout
        while True:
            head = connection.read_head(deadline)
            if head[1] >= 200:
                return head
            if head[1] == 101:
                raise UpstreamBroken("The upstream switched protocols unasked.")

    @property
    def more(self) -> bool:
        """Whether the end of the body has not arrived yet."""
        return self._connection is not None

    def pieces(self) -> Iterator[bytes]:
        """The body, piece by piece as it arrives; an empty piece first where none is here yet. The
        connection is let go before the last piece is given. Raises UpstreamBroken where the body
        ends before its end, UpstreamTimeout where nothing comes."""
        connection = self._connection
        assert connection is not None
        connection.sock.settimeout(self._upstream.read_timeout)
        try:
            if self._chunked:
                yield from self._by_chunks(connection)
            elif self._left is not None:
                yield from self._by_length(connection, self._left)
            else:
                yield from self._until_close(connection)
        except TimeoutError:
            raise UpstreamTimeout("The upstream stalled in the middle of a body.") from None
        except (OSError, EOFError) as error:
            raise UpstreamBroken("The upstream's answer was cut in its body.") from error
        self._done()

    def _by_length(self, connection: Connection, left: int) -> Iterator[bytes]:
        while left:
            piece, connection.buffer = connection.buffer[:left], connection.buffer[left:]
            left -= len(piece)
            if not left:
                self._done()
            yield piece
            if left and not connection.receive():
                raise EOFError

    def _until_close(self, connection: Connection) -> Iterator[bytes]:
        while True:
            piece, connection.buffer = connection.buffer, b""
            yield piece
            if not connection.receive():
                if connection.refused:  # which took the place of the error that tells a reset
                    raise EOFError
                return

    def _by_chunks(self, connection: Connection) -> Iterator[bytes]:
        # http.client takes a chunk size of `+5` or `0x5`, any two bytes after a chunk, and the end
        # of file for the end of the trailer. What has arrived is passed on at once, as one piece
        # however many chunks it came in, and what is malformed ends the body only after that.
        chunks = Chunks()
        while True:
            pieces, connection.buffer = chunks.feed(connection.buffer)
            if chunks.complete:
                self._done()
            yield b"".join(pieces)
            if chunks.complete:
                return
            if chunks.malformed or not connection.receive():
                raise EOFError

    def _done(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # Bytes after the end belong to no request: the connection is out of step.
            keep = self._keep and connection.whole and not connection.buffer
            self._upstream.release(connection, keep)

    def close(self) -> None:
        """Let the connection go; it is closed where the body was not read to its end."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._upstream.release(connection, keep=False)


class Upstream(HTTPAdapter):
    """requests' HTTPAdapter for one upstream, sending bytes as they are given.

    `base_url` is an http or https URL, time-outs are in seconds, `connections` is how many idle
    ones are kept at most, and `ca_bundle` a file of certificates to trust instead of requests' own.
    """

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout: float,
        read_timeout: float,
        connections: int,
        ca_bundle: str | None = None,
    ) -> None:
        super().__init__(pool_connections=1, pool_maxsize=connections, max_retries=0)
        self.connect_timeout = connect_timeout
        self.read_timeout = read_timeout
        request = requests.Request("GET", base_url).prepare()
        verify = ca_bundle or True
        self._pool: Any = self.get_connection_with_tls_context(request, verify)
        self.cert_verify(self._pool, base_url, verify, None)  # type: ignore[no-untyped-call]

    def probe(self) -> None:
        """Connect, and close. Raises UpstreamUnreachable or UpstreamTimeout."""
        connection = self._take(idempotent=True)
        try:
            connection.connect(self.connect_timeout)
        finally:
            self.release(connection, keep=False)

    def exchange(self, method: str, head: bytes, body: BinaryIO | None, client: Client) -> Answer:
        """Send one request and read the head of its answer.

        It is sent again, once, where that is safe: the method is idempotent and the connection,
        which had been used before, closed without a byte of an answer. Raises UpstreamUnreachable,
        UpstreamBroken, UpstreamTimeout, or ClientGone where the client left meanwhile.
        """
        connection = self._take(method in IDEMPOTENT)
        if connection.sock is not None:
            try:
                return self._attempt(connection, method, head, body, client)
            except EOFError:
                if method not in IDEMPOTENT or client.gone:
                    raise self._failure(client) from None
            connection = Connection(self._pool._get_conn())
            connection.close()  # not another one that may have died of the same cause
            if body is not None:
                body.seek(0)
        try:
            connection.connect(self.connect_timeout)
        except BaseException:
            self.release(connection, keep=False)
            raise
        try:
            return self._attempt(connection, method, head, body, client)
        except EOFError:
            raise self._failure(client) from None

    def _attempt(
        self,
        connection: Connection,
        method: str,
        head: bytes,
        body: BinaryIO | None,
        client: Client,
    ) -> Answer:
        # EOFError where the connection ended without a byte of an answer.
        client.on_gone = connection.abort
        try:
            if client.gone:
                raise ClientGone
            connection.send(head, body, self.read_timeout)
            return Answer(self, connection, method)
        except TimeoutError:
            self.release(connection, keep=False)
            raise UpstreamTimeout from None
        except (EOFError, OSError):
            self.release(connection, keep=False)
            if not connection.heard:
                raise EOFError from None
            raise self._failure(client) from None
        except BaseException:
            self.release(connection, keep=False)
            raise

    def _failure(self, client: Client) -> Exception:
        if client.gone:
            return ClientGone()
        return UpstreamBroken("The upstream closed the connection without an answer.")

    def _take(self, idempotent: bool) -> Connection:
        raw = self._pool._get_conn()  # closed by urllib3 if the upstream has closed it meanwhile
        idle = time.monotonic() - getattr(raw, "idle_since", 0.0)
        if raw.sock is not None and not idempotent and idle > FRESH_SECONDS:
            raw.close()
        return Connection(raw)

    def release(self, connection: Connection, keep: bool) -> None:
        """Give a connection back to the pool, or close it."""
        connection.disown()
        if keep:
            connection.raw.idle_since = time.monotonic()
        else:
            connection.close()
        self._pool._put_conn(connection.raw)
