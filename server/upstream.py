"""The upstream's side of the wire: what is plugged into requests' HTTPAdapter to be faithful.

requests keeps the connection pool, connecting, TLS and its CA bundle. Writing a request and reading
an answer are done here, because the layers below change what passes through them: urllib3 encodes
the target anew and adds User-Agent and Accept-Encoding; http.client takes a 103 for the answer and
gives the real one to the next caller, loses every header after a malformed line, and takes a body
that was cut inside its chunks for whole.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import requests
from requests.adapters import HTTPAdapter

from problems import UpstreamBroken, UpstreamTimeout
from server.connection import Connection
from wire.chunks import Chunks
from wire.fields import Field, listed

# RFC 9110 section 9.2.2.
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
# A request that must not be sent twice goes on a connection that was in use this many seconds ago
# at most: the shorter the idle time, the smaller the chance that the upstream is just closing it.
FRESH_SECONDS = 1.0

LENGTH = re.compile(r"[0-9]{1,18}")


class Client(Protocol):
    """Who a request is forwarded for: `on_gone` is called, once, when they have gone."""

    addr: tuple[str, int]
    gone: bool
    on_gone: Any


class ClientGone(Exception):
    """The client left while its request was with the upstream."""


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
        # One that has no body but announces one may be followed by it all the same, and that would
        # be the next caller's answer.
        stray = bodiless and bool(codings or lengths not in ([], ["0"]))
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
                # An end that is not the upstream's: of a request that it reset, or from this side.
                if connection.refused or connection.aborted:
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
