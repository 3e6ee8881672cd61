"""The database as `pw_migrate` uses it: one migrator at a time, no long waits for locks, and no
data deleted unless that is allowed.

A pooler may give each transaction another session. So nothing here belongs to a session: a
transaction that stays open holds the lock, and limits are set inside each transaction.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peewee
import psycopg2

from postgres.connect import Connector, Direct, sqlstate
from postgres.schema import Parts, replayed

# A statement of a migration waits this many seconds for a lock. If somebody has left a transaction
# open, it waits behind that, and all new readers and writers of the table wait behind it.
LOCK_SECONDS = 2
MIGRATORS_SECONDS = 600  # how long to wait for other migrators to finish
POLL_SECONDS = 0.2
LOCK = 0x6761746568  # "gateh" as a number, which nobody else locks in this database
CONCURRENTLY = re.compile(
    r"\s*(CREATE\s+(UNIQUE\s+)?INDEX|DROP\s+INDEX|REINDEX\s+\w+)\s+CONCURRENTLY\b", re.IGNORECASE
)
# The limits that a role has are meant for requests, and a migration may take longer. Not all
# versions of PostgreSQL have all three.
UNLIMITED = """
    SELECT set_config(name, '0', true) FROM pg_settings WHERE name IN
        ('statement_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')
"""
ADVICE = {
    "25006": "name the primary in POSTGRES_URI, if this is a standby; else the role has"
    " default_transaction_read_only",
    "3F000": "create the schema that search_path names, and start again",
    "42501": "start it with the role that owns the tables, and may create in the schema",
    "42P07": "if another program made that, give Gatehouse a database or a schema of its own",
    "53100": "make room on the server's disk, and start again",
    "55P03": "end the transaction that holds the lock (see pg_stat_activity), and start again",
}


class Migrating(Direct):
    """The database of `pw_migrate`: every migration is a transaction of its own.

    PostgreSQL refuses CREATE, DROP and REINDEX INDEX CONCURRENTLY in a transaction. So they go over
    a connection of their own, where they would wait for ever for what the migration has locked.
    Therefore such a migration may have no other statement.
    """

    def __init__(self, connector: Connector) -> None:
        super().__init__(connector)
        self._lock_holder: Any = None
        self._alone = True

    def lock(self, tell: Callable[[], None]) -> None:
        """Keep other migrators out until this process ends, however it ends. Calls `tell` if it has
        to wait for one of them. Raises psycopg2.Error or TimeoutError.

        The lock is tried for again and again. A statement that waits for it would hold a snapshot,
        and a CREATE INDEX CONCURRENTLY of the other migrator would wait for the end of that.
        """
        until = time.monotonic() + MIGRATORS_SECONDS
        self._lock_holder = self.connector.open()
        cursor, told = self._lock_holder.cursor(), False
        while True:
            # At any other level the transaction would hold a snapshot between its statements.
            cursor.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
            cursor.execute(UNLIMITED)
            cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", (LOCK,))
            if cursor.fetchone()[0]:
                return
            cursor.execute("ROLLBACK")
            if not told:
                tell()
                told = True
            if time.monotonic() > until:
                raise TimeoutError
            time.sleep(POLL_SECONDS)

    def begin(self, isolation_level: str | None = None) -> None:
        if self._lock_holder is not None:
            self._lock_holder.cursor().execute("SELECT 1")  # This fails if the lock is lost.
        super().begin("READ COMMITTED")
        self._alone = True
        cursor = self.cursor()
        cursor.execute(UNLIMITED)
        cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        if not self.in_transaction():
            return super().execute_sql(sql, params)  # type: ignore[no-untyped-call]
        if not CONCURRENTLY.match(sql):
            # peewee's own SAVEPOINT does not count.
            self._alone = self._alone and sql.startswith("SAVEPOINT")
            return super().execute_sql(sql, params)  # type: ignore[no-untyped-call]
        if not self._alone:
            raise peewee.ProgrammingError("CONCURRENTLY needs a migration of its own")
        connection = self.connector.open()
        try:
            cursor = connection.cursor()
            cursor.execute(sql, params)
            return cursor
        finally:
            connection.close()


def losses(database: Migrating, directory: Path | str, undone: Sequence[str]) -> list[str]:
    """What a rollback of the migrations `undone` would delete, such as `122 users` or `the metadata
    of 3 users`. It is tried on temporary tables, to find the tables and columns that go."""
    before, after = replayed(database, directory, undone)
    found = []
    with database.transaction():
        for table, parts in before.items():
            if table not in after:
                count = _count(database, table, "true")
                found += [_counted(count, table)] if count else []
                continue
            for column in _columns(parts) - _columns(after[table]):
                count = _count(database, table, _was_given(database, table, column))
                found += [f"the {column} of {_counted(count, table)}"] if count else []
    return found


def _columns(parts: Parts) -> set[str]:
    return {name for kind, name in parts if kind == "column"}


def _was_given(database: Migrating, table: str, column: str) -> str:
    """The SQL condition that a column has another value than its default."""
    default = database.execute_sql(
        "SELECT pg_get_expr(adbin, adrelid) FROM pg_attribute"
        " LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum"
        " WHERE attrelid = to_regclass(quote_ident(%s)) AND attname = %s",
        (table, column),
    ).fetchone()
    if default is None:
        return "false"  # There is no such column.
    name = '"' + column.replace('"', '""') + '"'
    return f"{name} IS NOT NULL AND {name}::text IS DISTINCT FROM ({default[0] or 'NULL'})::text"


def _count(database: Migrating, table: str, condition: str) -> int:
    exists = "SELECT to_regclass(quote_ident(%s)) IS NOT NULL"
    if not database.execute_sql(exists, (table,)).fetchone()[0]:
        return 0
    name = '"' + table.replace('"', '""') + '"'
    condition = condition.replace("%", "%%")
    [count] = database.execute_sql(f"SELECT count(*) FROM {name} WHERE {condition}", ()).fetchone()
    return int(count)


def _counted(count: int, table: str) -> str:
    return f"{count} {table.removesuffix('s') if count == 1 else table}"


def advice(error: BaseException) -> list[str]:
    """What to do about an error, where that is known."""
    code = sqlstate(error)
    return [ADVICE[code]] if code in ADVICE else []


def explain(error: BaseException) -> str:
    """A line that says why a migration failed and what to do. It quotes no value of a statement."""
    error = getattr(error, "orig", None) or error
    if not isinstance(error, psycopg2.Error):
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"
    if not error.pgcode:
        return "the connection was lost: `pw_migrate list` tells what is applied; start again"
    [todo] = advice(error) or ["mend that, and start again"]
    return (
        f"{error.diag.message_primary} (SQLSTATE {error.pgcode}); its transaction was rolled back:"
        f" {todo}"
    )
