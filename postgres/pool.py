"""PostgreSQL connections: a PooledPostgresqlDatabase that does its network work outside every lock.

peewee's own pool connects, and sends SELECT 1 at every checkout, under two locks that all threads
share: one server that does not answer stops them all, one after the other. Here

- connecting happens on a thread of its own, and callers wait in a queue, first come, first served,
  each no longer than it is allowed to;
- an idle connection is checked by asking the kernel whether the server has closed it, and by a
  round trip only after a while;
- every conversation has a deadline on this side (postgres/deadlines.py).
"""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import time
from collections import deque
from typing import Any

import peewee
import psycopg2
import psycopg2.extensions
from playhouse.pool import PooledPostgresqlDatabase
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from metrics import IDLE, IN_USE, Board
from postgres.connect import Connector, Target
from postgres.deadlines import Deadlines, borrowed
from problems import DatabaseUnavailable, Problem

log = logging.getLogger("gatehouse.database")

# An idle connection that has not been used for VERIFY_SECONDS is tested by a round trip. If that
# takes longer than ANSWER_SECONDS, it is given up for a new one. A NAT that has forgotten the
# connection drops all that is sent, without a word: callers waited for the whole time that
# connecting may take, and were then told that the database is down.
VERIFY_SECONDS = 1.0
ANSWER_SECONDS = 0.5
# After a failed connect, callers are told at once for this many seconds; then one of them tries. An
# urgent caller has a connect tried at once: /health tells what is, not what was.
RETRY_SECONDS = 0.25
# While one tries, the others wait this long for what it finds.
PROBE_SECONDS = 0.1
# How long it may take until those who wait for a connect are told that it failed, in seconds.
HEARSAY_SECONDS = 0.25
# The same cause is logged once in this many seconds.
LOG_SECONDS = 10.0


class Connection(psycopg2.extensions.connection):
    """A connection that knows its generation, its server, and what that has prepared for it."""

    generation = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prepared: set[str] = set()
        with borrowed(self) as sock:
            self.server = sock.family, sock.getpeername()
        self.reused = self.cursor()
        self.poller = select.poll()
        self.poller.register(self.fileno(), select.POLLIN)


class Waiter:
    """A caller that waits for a connection, or for the reason why there is none.

    One that is `urgent` is first in the queue. A connect is tried for it even if the last one has
    just failed, and if all connections are in use it gets one more than `size`.
    """

    def __init__(self, urgent: bool) -> None:
        self.urgent = urgent
        self.follows = False  # The database is down, and it waits for what another's try finds.
        self._ready = threading.Lock()
        self._ready.acquire()
        self.outcome: Any = None

    def give(self, outcome: Any) -> None:
        self.outcome = outcome
        self._ready.release()

    def wait(self, seconds: float) -> bool:
        return self._ready.acquire(timeout=max(0.0, seconds))


class Pool(PooledPostgresqlDatabase):  # type: ignore[misc]
    """A deferred database; `configure` says where it is, and the first use connects."""

    connect_timeout = 0.0

    def __init__(self) -> None:
        super().__init__(None)
        # peewee's lock guards thread-local state only, and was held while connecting.
        self._lock = peewee._NoopLock()
        self._mutex = threading.Lock()
        self._board: Board | None = None
        self._forget()

    def _forget(self) -> None:
        self._deadlines = Deadlines(self.connect_timeout, self._silent)
        self._ready: list[tuple[Any, float]] = []  # idle connections, and since when
        self._count = 0  # connections open, or being made
        self._connecting = 0
        self._verifying = 0  # of those that are open, idle ones that are being tested
        self._generation = 0
        self._queue: deque[Waiter] = deque()
        self._down = False  # whether the last attempt to connect failed
        self._mute = False  # whether the server has answered nobody since, on any connection
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

        At most `size` connections; `wait` is how many seconds a caller waits for one that others
        use, `connect_timeout` for a new one, whatever the number of hosts in the URI, and
        `statement_timeout` for an answer.
        """
        target = Target.of(uri)
        self.init(target.database)
        self.target = target
        self.size = size
        self.wait = wait
        self.connect_timeout = connect_timeout
        self.statement_timeout = statement_timeout
        self._forget()
        # How long a caller waits while a connection is being made: so long that it hears what
        # became of that.
        self._patience = max(wait, connect_timeout + HEARSAY_SECONDS)
        self._board = board
        self._connector = Connector(
            target,
            connect_timeout,
            {"statement_timeout": str(round(statement_timeout * 1000))},
            Connection,
        )

    # Checking out.

    def _acquire(self, until: float = math.inf) -> Any:
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
                self._parents = self._ready
                self._forget()

    def _enqueue(self, now: float, urgent: bool) -> Waiter:
        waiter = Waiter(urgent)
        none = self._mute or self._count == self._connecting  # is open, or of any use
        if self._down and none and not urgent:
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
        # As many as there are callers that wait. While the server refuses, one, and after a pause.
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
        # A caller that followed another's try may go on waiting if that has succeeded.
        more = not self._down if waiter.follows else bool(self._connecting or self._verifying)
        if not served and more:
            # Soon there will be a connection that nobody uses, or the reason why there is none.
            served = waiter.wait(min(began + self._patience, until) - time.monotonic())
        if not served:
            with self._mutex:
                if waiter in self._queue:
                    self._queue.remove(waiter)
            # Else it was given one between the two lines.
            if not waiter.wait(0):
                raise self._unavailable("no connection was free in time")
        if isinstance(waiter.outcome, Problem):
            raise waiter.outcome
        return waiter.outcome

    def _usable(self, connection: Any, since: float, until: float) -> bool:
        # Readable while idle: the server has closed it, or says that it is about to.
        if connection.closed or connection.poller.poll(0):
            self._release(connection, broken=True)
            return False
        now = time.monotonic()
        if now - since < VERIFY_SECONDS:
            return True
        if self._answers(connection, min(ANSWER_SECONDS, until - now)):
            return True
        self._release(connection, broken=True)
        self._distrust()
        return False

    def _answers(self, connection: Any, seconds: float) -> bool:
        with self._mutex:
            self._verifying += 1
        self._deadlines.begin(connection, seconds)
        try:
            connection.reused.execute("SELECT 1")
        except psycopg2.Error:
            self._deadlines.end(connection)
            return False
        else:
            self._deadlines.end(connection, answered=True)
            return True
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
                # Else nobody waited for this one any more: the next caller finds out anew.
                self._down = True
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._dismiss()

    def _silent(self) -> None:
        """The server answers nobody any more: from now on callers are told so at once."""
        self.say("the server has stopped answering")
        with self._mutex:
            self._down = self._mute = True
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._dismiss()
        self._distrust()

    def _dismiss(self) -> None:
        # Where the server is down and no connection is open, or being opened, nothing will ever
        # serve those who wait; where it is mute, most likely nothing.
        if self._down and (self._mute or not self._count):
            queue, self._queue = self._queue, deque()
            for waiter in queue:
                waiter.give(DatabaseUnavailable())

    # Checking in.

    def _release(self, connection: Any, broken: bool = False) -> None:
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
        """Give a connection to the first in the queue, or keep it; False if it is one too many."""
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
        """Log why something failed, without a secret, and the same at most once in LOG_SECONDS."""
        cause = " ".join(self.target.redacted(cause).split())
        now = time.monotonic()
        if now - self._logged.get(cause, -LOG_SECONDS) >= LOG_SECONDS:
            if len(self._logged) > 100:
                self._logged.clear()
            self._logged[cause] = now
            log.warning("%s", cause)

    def _distrust(self) -> None:
        # What ended one connection, a restart or a failover, has most likely ended the others too,
        # even if nothing shows yet: those that are open now are not used again.
        with self._mutex:
            self._generation += 1
        self.close_idle()

    # What peewee calls.

    def _connect(self) -> Any:
        return self._acquire()

    def _close(self, conn: Any, close_conn: bool = False) -> None:
        self._release(conn, broken=close_conn)

    def close_idle(self) -> None:
        """Close the connections that nobody uses."""
        with self._mutex:
            idle, self._ready = self._ready, []
            self._count -= len(idle)
            self._post()
        for connection, _ in idle:
            connection.close()

    def close_all(self) -> None:
        """Close the connections that nobody uses; the others are left to their users."""
        self.close_idle()
