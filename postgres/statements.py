"""Running statements on the pool's connections: what is run again, and what callers are told."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from typing import Any

import psycopg2
from psycopg2.errors import DuplicatePreparedStatement, InvalidSqlStatementName

from postgres.pool import Connection, Pool
from problems import DatabaseUnavailable, EmailTaken, Problem, SchemaNotMigrated

Row = tuple[Any, ...]

# A connection that is lost may be followed by others that were lost with it.
ATTEMPTS = 3
# How much later than statement_timeout this side gives up on an answer.
GRACE_SECONDS = 0.5
# How far the clocks of two servers may be apart, and a statement's time on its way.
SKEW_SECONDS = 1.0

# SQLSTATE, or its first two characters, to what a caller is told. What is not here is a defect.
PROBLEMS: dict[str, type[Problem]] = {
    "08": DatabaseUnavailable,  # connection exceptions
    "22021": DatabaseUnavailable,  # its encoding is not UTF8, and has not this character
    "22P05": DatabaseUnavailable,  # the same
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


class Database(Pool):
    """A pool of connections, and statements run on them."""

    def run(
        self, statement: Statement, params: Mapping[str, Any], until: float = math.inf
    ) -> list[Row]:
        """Send one statement and return its rows: one round trip.

        `until`, on the monotonic clock, bounds the whole, where it is before the usual time-outs.
        Raises Lost or NotDone, or the Problem that the caller is to be told.
        """
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
        self._deadlines.end(connection, answered=True)
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
        """Run a statement that changes nothing; if its connection is lost, again on another.
        `within` bounds the whole in seconds."""
        until = math.inf if within is None else time.monotonic() + within
        for _ in range(ATTEMPTS):
            try:
                return self.run(statement, params, until)
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
        if problem is None:  # a defect; psycopg2's own message quotes values
            return RuntimeError(f"SQLSTATE {state}")
        if problem is not EmailTaken:
            self._note(error)
        return problem()

    def _note(self, error: psycopg2.Error) -> None:
        # Not the whole message: it quotes the statement, values and all.
        cause = error.diag.message_primary if error.pgcode else error
        self.say(f"{error.pgcode or 'connection lost'}: {cause}")


def unknown() -> DatabaseUnavailable:
    """A write of which nobody can say whether it was carried out."""
    return DatabaseUnavailable(
        "The connection to the database was lost during this write, and what became of it could"
        " not be found out. It may or may not have been carried out.",
        outcome="unknown",
    )
