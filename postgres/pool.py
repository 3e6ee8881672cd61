"""A pool of PostgreSQL connections that holds no lock while it uses the network.

peewee's own pool connects, and sends SELECT 1 at every checkout, under two locks that all threads
share. A server that does not answer then stops all threads, one after the other. In this pool

- a thread of its own makes a connection, and callers wait in a queue, first come, first served,
  each with a time limit;
- the kernel is asked whether the server has closed an idle connection, and the server itself only
  if the connection has not been used for a while;
- every conversation has a deadline on this side (postgres/deadlines.py).
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from typing import Any

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from metrics import IDLE, IN_USE, Board
from postgres.connect import Connection, Connector, Target, printable
from postgres.deadlines import Deadlines
from problems import DatabaseUnavailable, Problem

log = logging.getLogger("gatehouse.database")

# An idle connection that has not been used for VERIFY_SECONDS is tested by a round trip. If that
# takes longer than ANSWER_SECONDS, it is given up for a new one. A NAT that has forgotten the
# connection drops all that is sent, without a word: callers waited for the whole time that
# connecting may take, and were then told that the database is down.
VERIFY_SECONDS = 1.0
ANSWER_SECONDS = 0.5
# For this many seconds after a connect has failed, callers are told at once that the database is
# down. Then one of them tries again. For an urgent caller a connect is always tried: /health must
# not tell what was true before.
RETRY_SECONDS = 0.25
# While one caller tries, the others wait this many seconds for what it finds.
PROBE_SECONDS = 0.1
# Callers wait for a connect this many seconds longer than it may take, to be told that it failed.
HEARSAY_SECONDS = 0.25
# The same cause is logged once in this many seconds.
LOG_SECONDS = 10.0


class Waiter:
    """A caller that waits for a connection, or for the Problem that tells why there is none.

    An `urgent` one is first in the queue. A connect is tried for it even if the last one has just
    failed. If all connections are in use, one more than `size` is made for it.
    """

    def __init__(self, urgent: bool) -> None:
        self.urgent = urgent
        self.follows = False  # whether it waits for what another caller's attempt finds
        self._ready = threading.Lock()
        self._ready.acquire()
        self.outcome: Any = None

    def give(self, outcome: Any) -> None:
        self.outcome = outcome
        self._ready.release()

    def wait(self, seconds: float) -> bool:
        return self._ready.acquire(timeout=max(0.0, seconds))


class Pool:
    """Connections to the database that `configure` names. The first use connects."""

    connect_timeout = 0.0

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._board: Board | None = None
        self._forget()

    def _forget(self) -> None:
        self._deadlines = Deadlines(self.connect_timeout, self._silent)
        self._ready: list[tuple[Any, float]] = []  # idle connections, and since when
        self._count = 0  # connections open, or being made
        self._connecting = 0
        self._verifying = 0  # how many of the open ones are being tested after they were idle
        self._generation = 0
        self._queue: deque[Waiter] = deque()
        self._down = False  # whether the last attempt to connect failed, or the server is mute
        self._mute = False  # whether the server has stopped to answer on any connection
        self._retry_at = 0.0
        self._logged: dict[str, float] = {}
        self._prepares = True
        self._pid = os.getpid()  # Last: see _leave_parent.

    def configure(
        self,
        uri: str,
        *,
        size: int,
        wait: float,
        connect_timeout: float,
        statement_timeout: float,
        board: Board | None = None,
    ) -> None:
        """Say where the database is (any libpq URI), without connecting.

        There are at most `size` connections. A caller waits at most `wait` seconds for one that
        others use, `connect_timeout` for a new one, however many hosts the URI has, and
        `statement_timeout` for an answer.
        """
        self.target = target = Target.of(uri)
        self.size = size
        self.wait = wait
        self.connect_timeout = connect_timeout
        self.statement_timeout = statement_timeout
        self._forget()
        # While a connection is being made, a caller waits until it is told what became of that.
        self._patience = max(wait, connect_timeout + HEARSAY_SECONDS)
        self._board = board
        self._connector = Connector(
            target,
            connect_timeout,
            {"statement_timeout": str(round(statement_timeout * 1000))},
            Connection,
        )

    # Checking out.

    def acquire(self, until: float = math.inf) -> Any:
        """A connection for the caller alone, until `release`. Raises DatabaseUnavailable, not
        much later than `until` on the monotonic clock."""
        if self._pid != os.getpid():
            self._leave_parent()
        began = time.monotonic()
        while True:
            with self._mutex:
                if self._ready:
                    connection, since = self._ready.pop()
                    waiter = None
                    self._post()
                else:
                    waiter = self._enqueue(began, urgent=until < math.inf)
            if waiter is None:
                if self._usable(connection, since, until):
                    return connection
                if time.monotonic() - began > self.connect_timeout:
                    raise self._unavailable("no answer from the server")
                continue
            return self._await(waiter, began, until)

    def _leave_parent(self) -> None:
        """Begin with nothing in a process that was forked: the connections are its parent's. They
        are not even closed here, because that would tell the server that nobody needs them."""
        with self._mutex:
            # Several threads may come here at once, and the second one has nothing to forget.
            if self._pid != os.getpid():
                self._parents = self._ready  # Kept, or the garbage collector would close them.
                self._forget()

    def _enqueue(self, now: float, urgent: bool) -> Waiter:
        waiter = Waiter(urgent)
        useless = self._mute or self._count == self._connecting  # whether no open one can help
        if self._down and useless and not urgent:
            if self._connecting:
                waiter.follows = True
            elif now < self._retry_at:
                raise DatabaseUnavailable
        if urgent:
            self._queue.appendleft(waiter)
        else:
            self._queue.append(waiter)
        self._start_connecting()
        return waiter

    def _start_connecting(self) -> None:
        # One connection for each caller that waits; while the server is down only one, after a
        # pause.
        wanted, urgent = len(self._queue), any(waiter.urgent for waiter in self._queue)
        if self._down:
            wanted = min(wanted, int(urgent or time.monotonic() >= self._retry_at))
        size = self.size + urgent
        while self._connecting < wanted and self._count < size:
            try:
                threading.Thread(target=self._connect_one, name="connecting", daemon=True).start()
            except RuntimeError:
                self.say("no thread can be started to connect")
                return
            self._count += 1
            self._connecting += 1

    def _await(self, waiter: Waiter, began: float, until: float) -> Any:
        limit = PROBE_SECONDS if waiter.follows else self.wait
        served = waiter.wait(min(began + limit, until) - time.monotonic())
        # A caller that followed another's attempt may go on waiting if that has succeeded.
        more = not self._down if waiter.follows else bool(self._connecting or self._verifying)
        if not served and more:
            # Soon a connection will be free, or it is known why there is none.
            served = waiter.wait(min(began + self._patience, until) - time.monotonic())
        if not served:
            with self._mutex:
                if waiter in self._queue:
                    self._queue.remove(waiter)
                busy = not (self._down or self._connecting or self._verifying)
            # If it was not in the queue, it has been given its outcome after it stopped waiting.
            if not waiter.wait(0):
                raise self._unavailable(f"no connection was {'free' if busy else 'made'} in time")
        if isinstance(waiter.outcome, Problem):
            raise waiter.outcome
        return waiter.outcome

    def _usable(self, connection: Any, since: float, until: float) -> bool:
        # An idle connection is readable if the server has closed it, or says that it will.
        if connection.closed or connection.poller.poll(0):
            self.release(connection, broken=True)
            return False
        now = time.monotonic()
        if now - since < VERIFY_SECONDS:
            return True
        if self._answers(connection, min(ANSWER_SECONDS, until - now)):
            return True
        self.release(connection, broken=True)
        self._distrust()
        return False

    def _answers(self, connection: Any, seconds: float) -> bool:
        with self._mutex:
            self._verifying += 1
        self._deadlines.begin(connection, seconds)
        try:
            connection.cursor().execute("SELECT 1")
        except psycopg2.Error:
            self._deadlines.end(connection)
            return False
        else:
            return not self._deadlines.end(connection, answered=True)
        finally:
            with self._mutex:
                self._verifying -= 1

    # Connecting.

    def _connect_one(self) -> None:
        began, generation = time.monotonic(), self._generation
        try:
            connection = self._connector.open()
        except Exception as error:
            self._failed(error, time.monotonic() - began)
            return
        connection.generation = generation
        with self._mutex:
            self._connecting -= 1
            if self._down:
                self._down = self._mute = False
                log.warning("the database is back")
            kept = self._hand_over(connection)
            self._start_connecting()
        if not kept:
            connection.close()

    def _failed(self, error: Exception, seconds: float) -> None:
        self.say(str(error) or type(error).__name__)
        with self._mutex:
            self._connecting -= 1
            self._count -= 1
            if self._queue or seconds >= self.connect_timeout:
                # Otherwise nobody waited for it any more, and the next caller tries again.
                self._down = True
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._dismiss()

    def _silent(self) -> None:
        """The server answers nobody any more. From now on callers are told at once that it is
        down."""
        self.say("the server has stopped answering")
        with self._mutex:
            self._down = self._mute = True
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._dismiss()
        self._distrust()

    def _dismiss(self) -> None:
        # If the server is down and no connection is open or being made, nobody who waits will ever
        # get one. If the server is mute, the open ones will most likely not come back either.
        if self._down and (self._mute or not self._count):
            queue, self._queue = self._queue, deque()
            for waiter in queue:
                waiter.give(DatabaseUnavailable())

    # Checking in.

    def release(self, connection: Any, broken: bool = False) -> None:
        """Give a connection back, or close it if it is `broken`."""
        broken = (
            broken
            or connection.closed
            or connection.generation != self._generation
            or connection.get_transaction_status() != TRANSACTION_STATUS_IDLE
        )
        if broken:
            connection.close()
        with self._mutex:
            if broken:
                self._count -= 1
                if self._queue:
                    self._start_connecting()
                if not self._connecting:
                    self._dismiss()
                self._post()
                return
            kept = self._hand_over(connection)
        if not kept:
            connection.close()

    def _hand_over(self, connection: Any) -> bool:
        """Give a connection to the first in the queue, or keep it. Returns False if there are too
        many: then the caller closes it."""
        surplus = self._count > self.size
        kept = True
        if self._queue and (self._queue[0].urgent or not surplus):
            self._queue.popleft().give(connection)
        elif surplus:
            self._count -= 1
            kept = False
        else:
            self._ready.append((connection, time.monotonic()))
        self._post()
        return kept

    def _post(self) -> None:
        if self._board is not None:
            self._board.set(IDLE, len(self._ready))
            self._board.set(IN_USE, self._count - self._connecting - len(self._ready))

    def _unavailable(self, cause: str) -> DatabaseUnavailable:
        self.say(cause)
        return DatabaseUnavailable()

    def say(self, cause: str) -> None:
        """Log why something failed, without secrets, and each cause at most once in LOG_SECONDS."""
        cause = printable(" ".join(self.target.redacted(cause).split()))
        now = time.monotonic()
        if now - self._logged.get(cause, -LOG_SECONDS) >= LOG_SECONDS:
            if len(self._logged) > 100:
                self._logged.clear()
            self._logged[cause] = now
            log.warning("%s", cause)

    def _distrust(self) -> None:
        # What ended one connection, such as a restart or a failover, has most likely ended the
        # others too, even if nothing shows it yet. So none that is open now is used again.
        with self._mutex:
            self._generation += 1
        self.close_idle()

    def close_idle(self) -> None:
        """Close the connections that nobody uses; the others are left to their users."""
        with self._mutex:
            idle, self._ready = self._ready, []
            self._count -= len(idle)
            self._post()
        for connection, _ in idle:
            connection.close()
