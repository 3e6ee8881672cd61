"""Ending conversations with PostgreSQL that nobody should wait for any longer.

libpq waits without end for a server that is frozen, because the server's kernel still acknowledges
what is sent, and for a server that the network no longer reaches. A deadline ends that, but cannot
tell such a server from a statement that waits for a lock. So a silent server is asked.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2

# If a conversation has had no answer for this many seconds, a second connection finds out whether
# its server answers at all. If it does, the statement only takes long.
SILENCE_SECONDS = 0.5
# libpq's SSLRequest: a server answers it with one byte, before any session is made.
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
# Errors that say only that this side has no route to the server.
NO_WAY = frozenset({errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH})


class Deadlines:
    """Ends conversations that outlive their deadline, or whose server answers nobody any more. It
    shuts down the connection's socket, so that libpq, which waits for an answer, reports a lost
    connection.

    A server that is asked whether it answers has `patience` seconds. An answer to another
    conversation meanwhile is enough: on a machine with too much work any one of them, and the
    question too, may wait for long. If neither comes, and no other server of the URI has answered
    anybody either, `on_silence` is called.
    """

    def __init__(self, patience: float, on_silence: Callable[[], None]) -> None:
        self._patience = patience
        self._on_silence = on_silence
        self._lock = threading.Lock()
        # By the connection's id: when the conversation began, its deadline, and the connection.
        self._running: dict[int, tuple[float, float, Any]] = {}
        self._started = False
        self._asking = False
        self._heard: dict[Any, float] = {}  # by server: when it last answered anybody

    def begin(self, connection: Any, seconds: float) -> None:
        now = time.monotonic()
        with self._lock:
            self._running[id(connection)] = now, now + seconds, connection
            if not self._started:
                with contextlib.suppress(RuntimeError):  # No more threads: the next call will try.
                    threading.Thread(target=self._watch, name="deadlines", daemon=True).start()
                    self._started = True

    def end(self, connection: Any, answered: bool = False) -> bool:
        """The conversation is over; returns whether it was cut."""
        with self._lock:
            if answered:
                self._heard[connection.server] = time.monotonic()
            return self._running.pop(id(connection), None) is None

    def _watch(self) -> None:
        tick = threading.Event()
        while not tick.wait(0.1):
            if self._running:
                self._look(time.monotonic())

    def _look(self, now: float) -> None:
        # The lock is held, because after the end of a conversation its descriptor may become that
        # of another connection.
        with self._lock:
            silent = None
            for key, (began, deadline, connection) in list(self._running.items()):
                heard = max(began, self._heard.get(connection.server, 0.0))
                if deadline <= now:
                    self._cut(key)
                elif heard + SILENCE_SECONDS <= now and not self._asking:
                    silent = connection.server
            if silent is None:
                return
            thread = threading.Thread(target=self._ask, args=silent, name="asking", daemon=True)
            with contextlib.suppress(RuntimeError):  # No more threads: the next tick tries again.
                thread.start()
                self._asking = True

    def _ask(self, family: int, address: Any) -> None:
        server, asked = (family, address), time.monotonic()
        try:
            answered = answers(family, address, self._patience)
        except OSError:  # This side has no descriptor left.
            with self._lock:
                self._asking = False
            return
        with self._lock:
            heard = {other for other, when in self._heard.items() if when > asked}
        answered = answered or server in heard
        if not answered and not heard:
            # Before anything is cut: a caller that is cut asks for another connection at once, and
            # must find out that the server is down.
            self._on_silence()
        with self._lock:
            self._asking, now = False, time.monotonic()
            if answered:
                self._heard[server] = now
                return
            for key, (began, _, connection) in list(self._running.items()):
                if began + SILENCE_SECONDS <= now and connection.server == server:
                    self._cut(key)

    def _cut(self, key: int) -> None:
        cut(self._running.pop(key)[2])


@contextlib.contextmanager
def ended_after(connection: Any, seconds: float) -> Iterator[None]:
    """End the conversation of a single connection where it takes longer: raises TimeoutError then.
    A pooler lets a statement wait for minutes, or for ever, for a server that is gone."""
    late = threading.Event()

    def give_up() -> None:
        late.set()
        cut(connection)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:  # psycopg2's own, or peewee's, if that ends a transaction first.
        if late.is_set():
            raise TimeoutError(f"no answer within {seconds:g} seconds") from None
        raise
    finally:
        timer.cancel()


def cut(connection: Any) -> None:
    """End the conversation of a connection: whoever waits for its answer gets an error."""
    # libpq may have dropped the socket already: then its descriptor is -1, which is a ValueError.
    with contextlib.suppress(OSError, ValueError, psycopg2.Error), borrowed(connection) as sock:
        sock.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def borrowed(connection: Any) -> Iterator[socket.socket]:
    """The socket of a connection, which stays the connection's. It is not duplicated: where no
    descriptor is free that would fail, and nothing would end the conversation any more."""
    sock = socket.socket(fileno=connection.fileno())
    try:
        yield sock
    finally:
        sock.detach()


def answers(family: int, server: Any, seconds: float) -> bool:
    """Whether the server at this address reacts in any way within `seconds`: an answer, a refusal
    and a closed connection are all signs of life. An error that says only that this side has no
    route to it is none. Raises OSError if there is no descriptor for a socket."""
    until = time.monotonic() + seconds
    with socket.socket(family) as sock:
        try:
            sock.settimeout(seconds)
            sock.connect(server)
            sock.sendall(SSL_REQUEST)
            sock.settimeout(max(0.001, until - time.monotonic()))
            sock.recv(1)
        except TimeoutError:
            return False
        except OSError as error:
            return error.errno not in NO_WAY
    return True
