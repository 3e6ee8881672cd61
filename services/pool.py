"""PostgreSQL connections: a PooledPostgresqlDatabase that does its network work outside every lock.

peewee's own pool connects, and sends SELECT 1 at every checkout, under two locks that all threads
share: one server that does not answer stops them all, one after the other. Here

- connecting happens on a thread of its own, and callers wait in a queue, first come, first served,
  each no longer than it is allowed to;
- an idle connection is checked by asking the kernel whether the server has closed it, and by a
  round trip only after a while;
- every conversation has a deadline on this side (services/deadlines.py).
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import select
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import peewee
import psycopg2
import psycopg2.extensions
from playhouse.pool import PooledPostgresqlDatabase
from psycopg2.errors import DuplicatePreparedStatement, InvalidSqlStatementName
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, parse_dsn

from services.board import IDLE, IN_USE, Board
from services.deadlines import Deadlines
from services.errors import DatabaseUnavailable, EmailTaken, Problem, SchemaNotMigrated

log = logging.getLogger("gatehouse.database")

Row = tuple[Any, ...]

# An idle connection that has not been used for this many seconds is asked for a round trip first.
VERIFY_SECONDS = 1.0
# After a failed connect, callers are told at once for this many seconds; then one of them tries.
RETRY_SECONDS = 0.25
# While one tries, the others wait this long for what it finds.
PROBE_SECONDS = 0.1
# What it may take for a failed connect to be told to those who wait for it.
HEARSAY_SECONDS = 0.25
# A connection that is lost may be followed by others that were lost with it.
ATTEMPTS = 3
# How much later than statement_timeout this side gives up on an answer.
GRACE_SECONDS = 0.5
# How far the clocks of two servers may be apart, and a statement's time on its way.
SKEW_SECONDS = 1.0
# The same cause is logged once in this many seconds.
LOG_SECONDS = 10.0

# SQLSTATE, or its first two characters, to what a caller is told. What is not here is a defect.
PROBLEMS: dict[str, type[Problem]] = {
    "08": DatabaseUnavailable,  # connection exceptions
    "23505": EmailTaken,  # unique_violation: the only unique index beside the key
    "25006": DatabaseUnavailable,  # read_only_sql_transaction: a standby
    "28": DatabaseUnavailable,  # wrong password or role
    "3D000": DatabaseUnavailable,  # no such database
    "3F000": SchemaNotMigrated,  # no such schema
    "40": DatabaseUnavailable,  # deadlock, serialization failure
    "42501": DatabaseUnavailable,  # missing permission
    "42703": SchemaNotMigrated,  # no such column
    "42P01": SchemaNotMigrated,  # no such table
    "53": DatabaseUnavailable,  # too many connections, disk full, out of memory
    "54": DatabaseUnavailable,  # a limit of the server's
    "55": DatabaseUnavailable,  # lock not available
    "57": DatabaseUnavailable,  # statement timeout, shutdown, starting up
    "58": DatabaseUnavailable,  # system error
    "XX": DatabaseUnavailable,  # internal error
}


# What says that the statement was not carried out, and may be elsewhere or later. A backend that is
# ended after it committed says nothing any more.
NOT_DONE = frozenset(
    {
        "25006",  # a standby
        "57P01",  # ended by an administrator, or with the server
        "57P03",  # starting up
        "57P04",  # the database was dropped
        "57P05",  # idle for too long
    }
)


class Lost(Exception):
    """The connection was lost after a statement was sent: what became of it is not known. Where it
    was `cut` from this side, for want of an answer, the server may even carry it out later."""

    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.cut = cut


class NotDone(Exception):
    """The server said that it did not carry the statement out: it is a standby, or was ending the
    connection."""


def check_uri(uri: str) -> str | None:
    """What is wrong with a libpq URI, in words that quote nothing of it; None for nothing."""
    try:
        ports = parse_dsn(uri).get("port") or ""
    except psycopg2.ProgrammingError as error:
        if "option" in str(error) and (
            name := str(error).rpartition('option "')[2].partition('"')[0]
        ):
            return f"has an option that libpq does not know: {name}"
        return "is not a URI that libpq can read"
    if not re.fullmatch(r"[0-9,]*", ports):
        return "has a port that is not a number"
    return None


class Connection(psycopg2.extensions.connection):
    """A connection that knows since when it is, and which statements its server has prepared."""

    generation = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prepared: set[str] = set()
        self.reused = self.cursor()
        self.poller = select.poll()
        self.poller.register(self.fileno(), select.POLLIN)


class Statement:
    """One statement, which a connection's server parses and plans once, when it is first run.

    `sql` has its values by name, as psycopg2 does; `types` says of which SQL type each is.
    """

    def __init__(self, sql: str, types: Mapping[str, str]) -> None:
        self.plain = sql
        body = sql % {name: f"${number}" for number, name in enumerate(types, 1)}
        # The same name is the same statement, whoever shares the session (PgBouncer's clients do).
        digest = hashlib.sha256(body.encode()).hexdigest()[:16]
        self.name = f"gatehouse_{body.partition(' ')[0].lower()}_{digest}"
        kinds = f" ({', '.join(types.values())})" if types else ""
        values = f" ({', '.join(f'%({name})s' for name in types)})" if types else ""
        self.execute = f"EXECUTE {self.name}{values}"
        # Both in one round trip.
        self.prepare = f"PREPARE {self.name}{kinds} AS {body.replace('%', '%%')}; {self.execute}"


class Waiter:
    """A caller that waits for a connection, or for the reason why there is none."""

    def __init__(self) -> None:
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
        # Only thread-local state is guarded by it, and it was held while connecting.
        self._lock = peewee._NoopLock()
        self._mutex = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._deadlines = Deadlines(self.connect_timeout, self._silent)
        self._ready: list[tuple[Any, float]] = []  # idle connections, and since when
        self._count = 0  # connections open, or being made
        self._connecting = 0
        self._generation = 0
        self._queue: deque[Waiter] = deque()
        self._down = False  # whether the last attempt to connect failed
        self._retry_at = 0.0
        self._logged: dict[str, float] = {}
        self._board: Board | None = None
        self._without_options = False
        self._prepares = True

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
        parameters = parse_dsn(uri)
        self.init(parameters.get("dbname") or parameters.get("user") or "postgres")
        self.uri = uri
        self.size = size
        self.wait = wait
        self.connect_timeout = connect_timeout
        self.statement_timeout = statement_timeout
        self._forget()
        # How long a caller waits who may get a new connection: so long that it hears what became
        # of the attempt to make one.
        self._patience = max(wait, connect_timeout + HEARSAY_SECONDS)
        self._board = board
        hosts = len((parameters.get("host") or parameters.get("hostaddr") or "").split(","))
        # libpq's is in whole seconds and for each host in turn.
        self._libpq: dict[str, Any] = {
            "connect_timeout": max(1, math.ceil(connect_timeout / hosts)),
            "client_encoding": "UTF8",
            "fallback_application_name": "gatehouse",
            "options": f"-c statement_timeout={round(statement_timeout * 1000)} "
            + (parameters.get("options") or ""),
        }
        # A password with an @ or a / that should have been encoded ends up in what libpq takes
        # for the host or the database, and in its messages.
        userinfo = uri.partition("//")[2].rpartition("@")[0].partition(":")[2]
        parts = {parameters.get("password") or "", *re.split(r"[@/:?]", userinfo)}
        self._secrets = [part for part in {*parts, *map(unquote, parts)} if len(part) > 2]

    def run(
        self, statement: Statement, params: Mapping[str, Any], within: float | None = None
    ) -> list[Row]:
        """Send one statement and return its rows: one round trip.

        `within` bounds the whole in seconds, where it is less than the usual time-outs. Raises
        Lost or NotDone, or the Problem that the caller is to be told.
        """
        until = math.inf if within is None else time.monotonic() + within
        connection = self._acquire(until)
        seconds = min(self.statement_timeout + GRACE_SECONDS, until - time.monotonic())
        self._deadlines.begin(connection, seconds)
        try:
            rows = self._send(connection, statement, params)
        except psycopg2.Error as error:
            cut = self._deadlines.end(connection)
            raise self._translate(connection, error, cut) from None
        except BaseException:
            self._deadlines.end(connection)
            self._release(connection, broken=True)
            raise
        self._deadlines.end(connection)
        self._release(connection)
        return rows

    def _send(
        self, connection: Connection, statement: Statement, params: Mapping[str, Any]
    ) -> list[Row]:
        cursor = connection.reused
        while True:
            sql = statement.plain
            if self._prepares:
                known = statement.name in connection.prepared
                sql = statement.execute if known else statement.prepare
            try:
                cursor.execute(sql, params)
                connection.prepared.add(statement.name)
                rows: list[Row] = cursor.fetchall()
                return rows
            except DuplicatePreparedStatement:
                connection.prepared.add(statement.name)  # by a run that failed after it
            except InvalidSqlStatementName:
                # PgBouncer gives each transaction another of its servers, and this one has not
                # prepared it. Nothing has been done in either case.
                self._prepares = False

    def read(
        self, statement: Statement, params: Mapping[str, Any], within: float | None = None
    ) -> list[Row]:
        """Run a statement that changes nothing; if its connection is lost, again on another."""
        for _ in range(ATTEMPTS):
            try:
                return self.run(statement, params, within)
            except NotDone:
                continue
            except Lost as lost:
                if lost.cut:  # no answer for so long: another try would take as long again
                    break
        raise DatabaseUnavailable

    def write(self, statement: Statement, params: Mapping[str, Any]) -> tuple[list[Row], bool]:
        """Run a statement that leads to the same state when it is run twice in a row.

        If its connection is lost it is run again, which either finds the first run's work or does
        it; the second value tells whether that happened. `untouched` is among its parameters then:
        for how many seconds nobody may have changed what it changes, lest it be done once more
        over what came between; None in the first run. Raises DatabaseUnavailable with
        `outcome="unknown"` where no run is answered, and Lost where a run was cut: it may still
        come late, over what has happened since.
        """
        began, untouched = time.monotonic(), None
        for _ in range(ATTEMPTS):
            try:
                rows = self.run(statement, {**params, "untouched": untouched})
                return rows, untouched is not None
            except NotDone:
                continue
            except Lost as lost:
                if lost.cut:
                    raise
                untouched = time.monotonic() - began + SKEW_SECONDS
            except (DatabaseUnavailable, SchemaNotMigrated):
                if untouched is not None:
                    break
                raise
        raise DatabaseUnavailable() if untouched is None else unknown()

    # Checking out.

    def _acquire(self, until: float = math.inf) -> Any:
        if self._pid != os.getpid():
            # Forked: the parent's connections are its own. Not even closed here, for that would
            # tell the server that they are done with.
            self._parents = self._ready
            board = self._board
            self._forget()
            self._board = board
        began = time.monotonic()
        while True:
            with self._mutex:
                if self._ready:
                    connection, since = self._ready.pop()
                    waiter = None
                    self._post()
                else:
                    waiter, limit = self._enqueue(began)
            if waiter is None:
                if self._usable(connection, since, until):
                    return connection
                if time.monotonic() - began > self.connect_timeout:
                    raise self._unavailable("no answer from the server")
                continue
            return self._await(waiter, began, limit, until)

    def _enqueue(self, now: float) -> tuple[Waiter, float]:
        # How long a caller may wait depends on what it waits for.
        limit = self.wait
        if self._down and self._count == self._connecting:  # none is open
            if self._connecting:
                limit = PROBE_SECONDS
            elif now < self._retry_at:
                raise DatabaseUnavailable
        waiter = Waiter()
        self._queue.append(waiter)
        self._start_connecting()
        if self._connecting and limit != PROBE_SECONDS:
            limit = self._patience
        return waiter, limit

    def _start_connecting(self) -> None:
        # As many as callers wait; while the server refuses, one, and not at once again.
        wanted = len(self._queue)
        if self._down:
            wanted = min(wanted, int(time.monotonic() >= self._retry_at))
        while self._connecting < wanted and self._count < self.size:
            self._count += 1
            self._connecting += 1
            threading.Thread(target=self._connect_one, name="connecting", daemon=True).start()

    def _await(self, waiter: Waiter, began: float, limit: float, until: float) -> Any:
        served = waiter.wait(min(began + limit, until) - time.monotonic())
        if not served and limit == PROBE_SECONDS and not self._down:
            # The one who tried has got through, and there is a connection for all in time.
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
        self._deadlines.begin(connection, min(self.connect_timeout, until - now))
        try:
            connection.reused.execute("SELECT 1")
        except psycopg2.Error:
            self._deadlines.end(connection)
            self._release(connection, broken=True)
            self._distrust()
            return False
        self._deadlines.end(connection)
        return True

    # Connecting.

    def _connect_one(self) -> None:
        began, generation = time.monotonic(), self._generation
        try:
            try:
                connection = self._open()
            except psycopg2.OperationalError:
                # The first of a row, and at once, may be a backend that was ended as it started.
                if self._down or time.monotonic() - began > RETRY_SECONDS:
                    raise
                connection = self._open()
        except Exception as error:
            self._failed(error, time.monotonic() - began)
            return
        connection.generation = generation
        with self._mutex:
            self._connecting -= 1
            if self._down:
                self._down = False
                log.warning("the database is back")
            self._hand_over(connection)
            self._start_connecting()

    def _open(self) -> Any:
        options = dict(self._libpq)
        if self._without_options:
            del options["options"]
        try:
            connection = psycopg2.connect(self.uri, connection_factory=Connection, **options)
        except psycopg2.OperationalError as error:
            # PgBouncer does not know `options`. Deadlines on this side hold all the same.
            if self._without_options or "unsupported startup parameter" not in str(error):
                raise
            self._without_options = True
            self._prepares = False
            return self._open()
        connection.autocommit = True
        return connection

    def _failed(self, error: Exception, seconds: float) -> None:
        self._say(str(error) or type(error).__name__)
        with self._mutex:
            self._connecting -= 1
            self._count -= 1
            if self._queue or seconds >= self.connect_timeout:
                # Else nobody waited for this one any more: the next caller finds out anew.
                self._down = True
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._dismiss()

    def _silent(self) -> None:
        """The server that conversations wait for answers nobody: who asks is told so at once."""
        self._say("the server has stopped answering")
        with self._mutex:
            self._down = True
            self._retry_at = time.monotonic() + RETRY_SECONDS

    def _dismiss(self) -> None:
        # Where the server is down and no connection is open, or being opened, nothing will ever
        # serve those who wait.
        if self._down and not self._count:
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
                    self._dismiss()
                self._post()
            else:
                self._hand_over(connection)

    def _hand_over(self, connection: Any) -> None:
        if self._queue:
            self._queue.popleft().give(connection)
        else:
            self._ready.append((connection, time.monotonic()))
        self._post()

    def _post(self) -> None:
        if self._board is not None:
            self._board.set(IDLE, len(self._ready))
            self._board.set(IN_USE, self._count - self._connecting - len(self._ready))

    # What went wrong.

    def _translate(self, connection: Any, error: psycopg2.Error, cut: bool) -> Exception:
        state = error.pgcode
        lost = connection.closed or (
            state is None and isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)
        )
        if lost or state in NOT_DONE:
            self._release(connection, broken=True)
            self._distrust()
            self._note(error)
            return NotDone() if state in NOT_DONE else Lost(cut)
        self._release(connection)
        problem = PROBLEMS.get(state or "") or PROBLEMS.get((state or "")[:2])
        if problem is None:
            return error
        if problem is not EmailTaken:
            self._note(error)
        return problem()

    def _note(self, error: psycopg2.Error) -> None:
        self._say(f"{error.pgcode or 'connection lost'}: {error}")

    def _unavailable(self, cause: str) -> DatabaseUnavailable:
        self._say(cause)
        return DatabaseUnavailable()

    def _say(self, cause: str) -> None:
        for secret in self._secrets:
            cause = cause.replace(secret, "…")
        cause = " ".join(cause.split())
        now = time.monotonic()
        if now - self._logged.get(cause, -LOG_SECONDS) >= LOG_SECONDS:
            if len(self._logged) > 100:
                self._logged.clear()
            self._logged[cause] = now
            log.warning("%s", cause)

    def _distrust(self) -> None:
        # What ended one connection, or a failover, has most likely ended the others, noticed or
        # not: those that are open now are not used again.
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
        """Close the connections that nobody uses; the others are closed by their users' ending."""
        self.close_idle()


def unknown() -> DatabaseUnavailable:
    """A write of which nobody can say whether it was carried out."""
    return DatabaseUnavailable(
        "The connection to the database was lost during this write, and what became of it could"
        " not be found out. It may or may not have been carried out.",
        outcome="unknown",
    )
