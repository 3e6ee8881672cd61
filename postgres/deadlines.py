"""Ending conversations with PostgreSQL that nobody should wait for any longer.

libpq waits without end for a server that is frozen, because its kernel goes on acknowledging, and
for one behind a path that is lost. And a deadline alone cannot tell such a server from a statement
that waits for a lock.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg2

# If a conversation has had no answer for this many seconds, its server is asked whether it answers
# anyone: a statement may take long, but a server that is gone need not be waited for.
SILENCE_SECONDS = 0.5
# libpq's SSLRequest: a server answers it with one byte, before any session is made.
SSL_REQUEST = struct.pack("!ii", 8, 80877103)


class Deadlines:
    """Ends conversations that outlive their deadline, or whose server answers nobody any more, by
    shutting down the connection's socket: libpq, which is blocked in a read, then reports a lost
    connection.

    A server that is asked has `patience` seconds to answer. `on_silence` is called if it does not,
    and no other server has answered either. A server that answers others meanwhile is there: on a
    machine with too much work a single conversation, and the question too, may wait for long.
    """

    def __init__(self, patience: float, on_silence: Callable[[], None]) -> None:
        self._patience = patience
        self._on_silence = on_silence
        self._lock = threading.Lock()
        # When each began, its deadline, and the connection.
        self._running: dict[int, tuple[float, float, Any]] = {}
        self._started = False
        self._asking = False
        self._heard: dict[Any, float] = {}  # server: when it has last answered anybody

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
        # Under the lock: once a conversation is over its descriptor may be another connection's.
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
            self._on_silence()  # First: a caller that is cut asks for another connection at once.
        with self._lock:
            self._asking, now = False, time.monotonic()
            if answered:
                self._heard[server] = now
                return
            for key, (began, _, connection) in list(self._running.items()):
                if began + SILENCE_SECONDS <= now and connection.server == server:
                    self._cut(key)

    def _cut(self, key: int) -> None:
        connection = self._running.pop(key)[2]
        with contextlib.suppress(OSError, psycopg2.Error), borrowed(connection) as sock:
            sock.shutdown(socket.SHUT_RDWR)


def borrowed(connection: Any) -> socket.socket:
    """The socket of a connection, to be closed without closing the connection."""
    return socket.socket(fileno=os.dup(connection.fileno()))


def answers(family: int, server: Any, seconds: float) -> bool:
    """Whether the server at this address does anything at all within `seconds` when it is spoken
    to: an answer, a refusal and a closed connection are all signs of life. Raises OSError where no
    socket can be had."""
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
        except OSError:
            pass
    return True
