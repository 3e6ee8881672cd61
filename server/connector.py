"""Making connections to the upstream, by requests' adapter, on a helper thread.

requests has the pool that knows the host, and the bundle of certificates to trust; urllib3 does
TLS. Finding the addresses and connecting is done here, for each address has to have its share of
the time, and an attempt may be given up. Writing requests and reading answers is not left to
requests, because the layers below it change what passes. urllib3 encodes the target anew and adds
User-Agent and Accept-Encoding. http.client takes a 103 for the answer and gives the real one to the
next caller, loses every header after a malformed line, and takes a body that was cut inside its
chunks for a complete one.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util.connection import allowed_gai_family
from urllib3.util.ssl_ import create_urllib3_context

from problems import Problem, UpstreamTimeout, UpstreamUnreachable
from server.stream import PROBING, reset_at_close

# An address is tried for this many seconds at least.
LEAST_SECONDS = 0.05


class Attempt:
    """A connection that is being made on one thread, which another one may give up. If a name is
    just being looked up, that goes on to its end."""

    def __init__(self) -> None:
        self.given_up = False
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None

    def give_up(self) -> None:
        """End it: whoever waits for its socket is told of an error."""
        with self._lock:
            self.given_up = True
            if self._sock is not None:
                reset_at_close(self._sock)
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def using(self, sock: socket.socket) -> Iterator[None]:
        """While this lasts, the attempt is that of `sock`."""
        # Of a duplicate of it: TLS takes the descriptor out of a socket, and urllib3 may close it.
        with sock.dup() as own:
            with self._lock:
                self._sock = own
            try:
                if self.given_up:
                    raise ConnectionAbortedError(errno.ECONNABORTED, "given up")
                yield
            finally:
                with self._lock:
                    self._sock = None


class UpstreamConnector(HTTPAdapter):
    """requests' adapter for one upstream, which makes connections to it.

    `base_url` is an http or https URL, `ca_bundle` a file or folder of certificates to trust
    instead of requests' own.
    """

    def __init__(self, base_url: str, ca_bundle: str | None = None) -> None:
        super().__init__(pool_connections=1, pool_maxsize=1, max_retries=0)
        request = requests.Request("GET", base_url).prepare()
        verify = ca_bundle or True
        self._pool: Any = self.get_connection_with_tls_context(request, verify)
        self.cert_verify(self._pool, base_url, verify, None)  # type: ignore[no-untyped-call]
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def connect(self, seconds: float, attempt: Attempt) -> Any:
        """A connected socket that does not block. Raises UpstreamUnreachable, or UpstreamTimeout
        after `seconds`.

        Each address of the upstream's name has its share of the time that is left. urllib3 would
        give all of it to the first one, and nobody would wait any more for the second.
        """
        until = time.monotonic() + seconds
        host, port = self._pool.host, self._pool.port
        try:
            found = socket.getaddrinfo(host, port, allowed_gai_family(), socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            raise UpstreamUnreachable from error
        for left, (family, *_, address) in zip(range(len(found), 0, -1), found, strict=True):
            share = (until - time.monotonic()) / left
            try:
                connection = self._connected(family, address, max(share, LEAST_SECONDS), attempt)
                break
            except Problem:
                if left == 1:
                    raise
        sock, connection.sock = connection.sock, None
        if is_to_itself(sock):
            sock.close()
            raise UpstreamUnreachable from ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        if isinstance(sock, ssl.SSLSocket):
            # Otherwise a connection that is cut without TLS's own end would look like the end of a
            # body.
            sock.suppress_ragged_eofs = False  # type: ignore[attr-defined]
        sock.setblocking(False)
        return sock

    def _connected(self, family: int, address: Any, seconds: float, attempt: Attempt) -> Any:
        """A connection to one address, within `seconds`. TLS checks that it is the name's."""
        connection = self._pool._new_conn()
        connection.timeout = seconds
        try:
            if self._pool.scheme == "https":
                connection.ssl_context = self._trusting()
                connection.ca_certs = connection.ca_cert_dir = None
            with contextlib.ExitStack() as unless_made:
                sock = unless_made.enter_context(socket.socket(family, socket.SOCK_STREAM))
                for option in (*(connection.socket_options or ()), *PROBING):
                    sock.setsockopt(*option)
                sock.settimeout(seconds)
                with attempt.using(sock):
                    sock.connect(address)
                    connection._new_conn = lambda: sock  # urllib3's own would look the name up.
                    connection.connect()
                unless_made.pop_all()
        except TimeoutError:
            raise UpstreamTimeout("The upstream did not accept a connection in time.") from None
        except (HTTPError, OSError, ValueError) as error:
            raise UpstreamUnreachable from error
        return connection

    def _trusting(self) -> ssl.SSLContext:
        """What TLS trusts. It is read for the first connection. urllib3 would read it for each,
        also into a context that it is given, and a bundle of all authorities takes 30
        milliseconds."""
        with self._lock:
            if self._tls is None:
                context = create_urllib3_context(cert_reqs=ssl.CERT_REQUIRED)
                context.load_verify_locations(self._pool.ca_certs, self._pool.ca_cert_dir)
                self._tls = context
            return self._tls


def is_to_itself(sock: Any) -> bool:
    """Whether a socket is connected to itself. If nobody listens at a port of this machine, the
    kernel may choose that very port for our end of the connection. As long as that lasts, the
    application cannot listen there again."""
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:
        return False  # The other end has gone already. The first write finds that out.


def was_refused(problem: Problem) -> bool:
    """Whether nobody listened at the upstream's address, which may soon change."""
    error: BaseException | None = problem.__cause__
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ECONNREFUSED:
            return True
        error = error.__cause__ or error.__context__
    return False
