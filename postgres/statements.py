"""Running statements on the pool's connections: which are run again after a failure, and which
Problem a caller is told."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Mapping
from typing import Any

import psycopg2
from psycopg2.errors import (
    DuplicatePreparedStatement,
    FeatureNotSupported,
    InvalidSqlStatementName,
)

from postgres.connect import Connection
from postgres.pool import Pool
from problems import (
    DatabaseUnavailable,
    EmailTaken,
    Problem,
    RefusedByDatabase,
    SchemaNotMigrated,
    UserInUse,
)

Row = tuple[Any, ...]

# A statement is run on at most this many connections: when one is lost, the next may be lost too.
ATTEMPTS = 3
# How much later than statement_timeout this side gives up on an answer.
GRACE_SECONDS = 0.5
# How far the clocks of two servers may be apart, and how long a statement may be on its way.
SKEW_SECONDS = 1.0

# Before a statement is run again that the server undid because of another's, there is a pause. Each
# is up to twice as long as the one before it. These are the shortest and the longest, in seconds.
FIRST_PAUSE, LAST_PAUSE = 0.005, 0.2

# A defect of Gatehouse's own, which should never happen: 500, and a stack trace in the log.
DEFECT = Problem

# What a caller is told, by SQLSTATE or its class (the first two characters). All classes of
# PostgreSQL's appendix A are here, and each state that differs from the rest of its class. Classes
# that only a trigger, rule or constraint of the operator's can raise are refusals.
PROBLEMS: dict[str, type[Problem]] = {
    "00": DEFECT,  # success, warnings and "no data": never an error
    "01": DEFECT,
    "02": DEFECT,
    "03": DEFECT,  # SQL statement not yet complete
    "08": DatabaseUnavailable,  # connection exceptions
    "09": RefusedByDatabase,  # triggered action exception
    "0A": DatabaseUnavailable,  # feature not supported: by a pooler or another kind of table
    "0B": DEFECT,  # invalid transaction initiation
    "0F": DEFECT,  # locator exception
    "0L": DatabaseUnavailable,  # invalid grantor
    "0P": DatabaseUnavailable,  # invalid role specification
    "0Z": RefusedByDatabase,  # diagnostics exception, of PL/pgSQL
    "10": RefusedByDatabase,  # XQuery error
    "20": RefusedByDatabase,  # case not found, of PL/pgSQL
    "21": RefusedByDatabase,  # cardinality violation
    "22": RefusedByDatabase,  # data exception: a column or an expression that was changed
    "22021": DatabaseUnavailable,  # its encoding is not UTF8, and has not this character
    "22P05": DatabaseUnavailable,  # the same
    "23": RefusedByDatabase,  # integrity constraint violation
    "24": DEFECT,  # invalid cursor state
    "25": DatabaseUnavailable,  # invalid transaction state: read-only, idle for too long, a pooler
    "25P02": DEFECT,  # in a failed transaction
    "26": DatabaseUnavailable,  # invalid SQL statement name, where a pooler changed the session
    "27": RefusedByDatabase,  # triggered data change violation
    "28": DatabaseUnavailable,  # wrong password or role
    "2B": DEFECT,  # dependent privilege descriptors still exist
    "2D": RefusedByDatabase,  # invalid transaction termination, by a trigger
    "2F": RefusedByDatabase,  # SQL routine exception
    "34": DEFECT,  # invalid cursor name
    "38": RefusedByDatabase,  # external routine exception
    "39": RefusedByDatabase,  # external routine invocation exception
    "3B": DEFECT,  # savepoint exception
    "3D": DatabaseUnavailable,  # no such database
    "3F": SchemaNotMigrated,  # no such schema
    "40": DatabaseUnavailable,  # transaction rollback, once it has been tried again for long enough
    "40002": RefusedByDatabase,  # transaction integrity constraint violation
    # The statements are fixed and tested. If one does not fit, the schema is not ours.
    "42": SchemaNotMigrated,
    "42501": DatabaseUnavailable,  # missing permission
    "42601": DEFECT,  # syntax error
    "42622": DEFECT,  # name too long
    "42P14": DatabaseUnavailable,  # invalid prepared statement definition, to a pooler
    "44": RefusedByDatabase,  # WITH CHECK OPTION violation
    "53": DatabaseUnavailable,  # too many connections, disk full, out of memory
    "54": DatabaseUnavailable,  # a limit of the server's
    "55": DatabaseUnavailable,  # lock not available, object not in the state for it
    "57": DatabaseUnavailable,  # statement timeout, shutdown, starting up
    "58": DatabaseUnavailable,  # system error
    "72": DatabaseUnavailable,  # snapshot too old
    "F0": DatabaseUnavailable,  # configuration file error
    "HV": DatabaseUnavailable,  # foreign data wrapper error
    "P0": RefusedByDatabase,  # PL/pgSQL: RAISE, ASSERT, no or too many rows
    "XX": DatabaseUnavailable,  # internal error
}
# If one of these functions of the server raises an error, a rule of the operator's refuses the
# statement, whatever the SQLSTATE says: a trigger's RAISE or ASSERT, row-level security (which has
# the state of a missing permission) or CREATE RULE (which has that of a missing feature).
RULES = frozenset({"exec_stmt_raise", "exec_stmt_assert", "ExecWithCheckOptions", "RewriteQuery"})
# Another row refers to the one that is deleted: NO ACTION, and RESTRICT since PostgreSQL 18.
REFERRED_TO = frozenset({"23503", "23001"})

# SQLSTATEs of a statement that was undone because of another's, and may succeed if it is run again:
# a serialization failure and a deadlock.
CONFLICTS = frozenset({"40001", "40P01"})
# SQLSTATEs by which the server says that it does not know what became of the statement.
UNKNOWN = frozenset({"08007", "40003"})
# SQLSTATEs of a statement that was certainly not carried out, so that it may be run elsewhere or
# later: a backend that is ended after it has committed sends no error any more.
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
    """The connection was lost after a statement was sent, and nobody knows what became of that. If
    the connection was `cut` on this side because no answer came, the server may even carry the
    statement out later."""

    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.cut = cut


class NotDone(Exception):
    """The server said that it did not carry the statement out: it is a standby, or was ending the
    connection."""


class Conflict(Exception):
    """The server undid the statement because of another's; it may be run again."""


class Retries:
    """Pauses before a statement that met a conflict is run again, until `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._pause = FIRST_PAUSE

    def wait(self) -> bool:
        """Wait a little longer than before. How long is left to chance, so that statements that met
        do not meet again. Returns False, without waiting, if there is not enough time."""
        pause = random.uniform(self._pause / 2, self._pause)
        self._pause = min(2 * self._pause, LAST_PAUSE)
        if time.monotonic() + pause > self._until:
            return False
        time.sleep(pause)
        return True


class Statement:
    """One statement. On each connection the server parses it once, at its first run, and may keep
    its plan.

    `sql` has parameters by name, in psycopg2's form; `types` says of which SQL type each is. A
    statement that is not `prepared` is planned at each run, for the values of that run.
    """

    def __init__(self, sql: str, types: Mapping[str, str], *, prepared: bool = True) -> None:
        self.plain = sql
        self.deletes = sql.startswith("DELETE")
        self.prepared = prepared
        body = sql % {name: f"${number}" for number, name in enumerate(types, 1)}
        # Clients of PgBouncer share sessions, so that one name must always be the same statement.
        digest = hashlib.sha256(body.encode()).hexdigest()[:16]
        self.name = f"gatehouse_{body.partition(' ')[0].lower()}_{digest}"
        kinds = f" ({', '.join(types.values())})" if types else ""
        values = f" ({', '.join(f'%({name})s' for name in types)})" if types else ""
        self.execute = f"EXECUTE {self.name}{values}"
        # Both in one round trip.
        self.prepare = f"PREPARE {self.name}{kinds} AS {body.replace('%', '%%')}; {self.execute}"


class Statements(Pool):
    """A pool of connections, and statements run on them.

    `taken` are the names of the unique indexes that keep two users from having one address.
    """

    taken: frozenset[str] = frozenset()

    def run(
        self,
        statement: Statement,
        params: Mapping[str, Any],
        until: float = math.inf,
        lost: float | None = None,
    ) -> list[Row]:
        """Send one statement and return its rows: one round trip.

        It ends at `until` on the monotonic clock, if that is before the usual time-outs. `lost` is
        when a run of it began whose answer was lost, if there was one: see `write`. Raises Lost,
        NotDone or Conflict, or the Problem that the caller is to be told.
        """
        connection = self.acquire(until)
        if lost is not None:
            # This is reckoned only now that there is a connection. Otherwise a change that was made
            # during the wait for one would count as older than the lost run.
            params = {**params, "untouched": time.monotonic() - lost + SKEW_SECONDS}
        seconds = min(self.statement_timeout + GRACE_SECONDS, until - time.monotonic())
        self._deadlines.begin(connection, seconds)
        try:
            rows = self._send(connection, statement, params)
        except psycopg2.Error as error:
            cut = self._deadlines.end(connection)
            raise self._translate(connection, statement, error, cut) from None
        except BaseException:
            self._deadlines.end(connection)
            self.release(connection, broken=True)
            raise
        # It may have been cut just as its answer came.
        broken = self._deadlines.end(connection, answered=True)
        self.release(connection, broken=broken)
        return rows

    def _send(
        self, connection: Connection, statement: Statement, params: Mapping[str, Any]
    ) -> list[Row]:
        # Not one cursor for all statements of a connection: it would keep what it found last.
        cursor, prepares = connection.cursor(), self._prepares
        while True:
            sql = statement.plain
            if prepares and statement.prepared:
                known = statement.name in connection.prepared
                sql = statement.execute if known else statement.prepare
            try:
                cursor.execute(sql, params)
                if sql is statement.prepare:
                    connection.prepared.add(statement.name)
                rows: list[Row] = cursor.fetchall()
                self._prepares = self._prepares and prepares
                return rows
            except DuplicatePreparedStatement:
                if sql is not statement.prepare:
                    raise
                # An earlier run prepared it, and then failed.
                connection.prepared.add(statement.name)
            except (InvalidSqlStatementName, FeatureNotSupported):
                # A pooler gives each transaction another of its sessions, and in this one the
                # statement is not prepared; or the pooler knows no prepared statements. In both
                # cases nothing has been done.
                if not prepares:
                    raise
                prepares = False

    def read(
        self, statement: Statement, params: Mapping[str, Any], within: float = math.inf
    ) -> list[Row]:
        """Run a statement that changes nothing. If its connection is lost, run it again on another.
        All of it takes at most `within` seconds. Raises DatabaseUnavailable and other Problems."""
        until = time.monotonic() + within
        attempts, retries = 0, Retries(min(self.statement_timeout, within))
        while attempts < ATTEMPTS:
            try:
                return self.run(statement, params, until)
            except NotDone:
                attempts += 1
            except Conflict:
                if not retries.wait():
                    break
            except Lost as lost:
                if lost.cut:  # It waited for as long as it may: another run would wait again.
                    break
                attempts += 1
            except RefusedByDatabase:
                break  # Nothing can be refused here. So a rule itself failed, and the log names it.
        raise DatabaseUnavailable

    def write(self, statement: Statement, params: Mapping[str, Any]) -> tuple[list[Row], bool]:
        """Run a statement that leads to the same state when it is run twice in a row.

        If its connection is lost it is run again, which either finds the work of the first run or
        does it. Returns the rows, and whether it was run again. The parameter `untouched` is None
        in the first run. In a later one it is a number of seconds: a row that was changed within
        these is left alone, because that may be a newer change than this one.

        Raises DatabaseUnavailable with `outcome="unknown"` if no run is answered, and Lost if a run
        was cut: the server may still carry that out, over newer changes.
        """
        began, lost = time.monotonic(), None
        attempts, retries = 0, Retries(self.statement_timeout)
        while attempts < ATTEMPTS:
            try:
                rows = self.run(statement, {**params, "untouched": None}, lost=lost)
                return rows, lost is not None
            except NotDone:
                attempts += 1
            except Conflict:
                if not retries.wait():
                    break
            except Lost as error:
                if error.cut:
                    raise
                attempts += 1
                lost = began
            except (EmailTaken, RefusedByDatabase):
                if lost is None:
                    raise
                return [], True  # Perhaps the work of the first run is in the way.
            except (DatabaseUnavailable, SchemaNotMigrated):
                if lost is not None:
                    break
                raise
        raise DatabaseUnavailable() if lost is None else unknown()

    def _translate(
        self, connection: Any, statement: Statement, error: psycopg2.Error, cut: bool
    ) -> Exception:
        state = error.pgcode or ""
        lost = connection.closed or (
            not state and isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)
        )
        rule = error.diag.source_function in RULES
        if lost or (not rule and state in NOT_DONE | UNKNOWN):
            self.release(connection, broken=True)
            self._distrust()
            if cut:  # libpq would say that the server closed the connection.
                self.say("no answer in time: this connection to the database was given up")
            else:
                self._note(error)
            return NotDone() if state in NOT_DONE else Lost(cut)
        self.release(connection, broken=cut)  # It may have been cut just as its answer came.
        if state in CONFLICTS:
            self._note(error)
            return Conflict()
        problem = RefusedByDatabase if rule else self._problem(statement, error)
        if problem is DEFECT:  # The message of psycopg2 quotes values, so it is not passed on.
            return RuntimeError(f"SQLSTATE {state}")
        if issubclass(problem, UserInUse | RefusedByDatabase):
            self._note_rule(error)
        elif problem is not EmailTaken:
            self._note(error)
        return problem()

    def _problem(self, statement: Statement, error: psycopg2.Error) -> type[Problem]:
        state = error.pgcode or ""
        if state == "23505" and error.diag.constraint_name in self.taken:
            return EmailTaken
        if state in REFERRED_TO and statement.deletes:
            return UserInUse
        if not state:  # psycopg2 itself could not send it.
            return DEFECT
        # A class that PostgreSQL does not have is a trigger's own.
        problem = PROBLEMS.get(state) or PROBLEMS.get(state[:2]) or RefusedByDatabase
        if error.diag.internal_query and problem in (SchemaNotMigrated, DEFECT):
            return RefusedByDatabase  # A statement inside a trigger does not fit, not ours.
        return problem

    def _note_rule(self, error: psycopg2.Error) -> None:
        # PostgreSQL's own message may quote a user's values, so it is left out. Names of tables and
        # constraints, and the words of a RAISE, are the operator's.
        diag = error.diag
        parts = [f"refused by the database: {error.pgcode}"]
        if diag.constraint_name:
            parts.append(f"constraint {diag.constraint_name}")
        if diag.column_name:
            parts.append(f"column {diag.column_name}")
        if diag.table_name:
            parts.append(f"of table {diag.table_name}")
        if diag.source_function in RULES:
            parts.append(diag.message_primary or "")
        if diag.context:  # its last line is the trigger's function
            parts.append(diag.context.splitlines()[-1])
        self.say(", ".join(parts))

    def _note(self, error: psycopg2.Error) -> None:
        # The whole message would quote the statement with its values.
        cause = error.diag.message_primary if error.pgcode else error
        self.say(f"{error.pgcode or 'connection lost'}: {cause}")


def unknown() -> DatabaseUnavailable:
    """A write of which nobody can say whether it was carried out."""
    return DatabaseUnavailable(
        "The connection to the database was lost during this write, and what became of it could"
        " not be found out. It may or may not have been carried out.",
        outcome="unknown",
    )
