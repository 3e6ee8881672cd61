"""What `pw_migrate` needs of the database: one at a time, bounded waits, no data deleted unasked.

Nothing here depends on a session, because a pooler may give each transaction another one: the lock
is a transaction's that stays open, and limits are set inside each transaction.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peewee
import psycopg2

from postgres.connect import Connector, Direct
from postgres.schema import Parts, replayed

# Seconds that a statement of a migration waits for a lock. While it waits behind a transaction
# that someone left open, all new readers and writers of that table wait behind it.
LOCK_TIMEOUT = 2
MIGRATORS_TIMEOUT = 600  # seconds to wait for other migrators to finish
POLL_SECONDS = 0.2
LOCK = 0x6761746568  # "gateh": any number that nobody else locks in this database
CONCURRENTLY = re.compile(
    r"\s*(CREATE\s+(UNIQUE\s+)?INDEX|DROP\s+INDEX|REINDEX\s+\w+)\s+CONCURRENTLY\b", re.IGNORECASE
)
# A role's own limits are for requests, and a migration may take longer. Not all versions of
# PostgreSQL have all three.
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

    CREATE, DROP and REINDEX INDEX CONCURRENTLY, which PostgreSQL refuses in a transaction, go over
    a connection of their own. They would wait for ever for what the migration itself has locked,
    so they stand alone in it.
    """

    def __init__(self, connector: Connector) -> None:
        super().__init__(connector)
        self._lock_holder: Any = None
        self._alone = True

    def lock(self, tell: Callable[[], None]) -> None:
        """Keep other migrators out until this process ends, however it ends; calls `tell` where
        it has to wait for one of them. Raises psycopg2.Error or TimeoutError.

        It is asked for again and again, never waited for: a statement that waits has a snapshot,
        and CREATE INDEX CONCURRENTLY of the one who has the lock waits until that is gone.
        """
        until = time.monotonic() + MIGRATORS_TIMEOUT
        self._lock_holder = self.connector.open()
        cursor, told = self._lock_holder.cursor(), False
        while True:
            # At any other level the transaction itself would keep a snapshot.
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
            self._lock_holder.cursor().execute("SELECT 1")  # fails where the lock is lost
        super().begin("READ COMMITTED")
        self._alone = True
        cursor = self.cursor()
        cursor.execute(UNLIMITED)
        cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}s'")

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        if not self.in_transaction():
            return super().execute_sql(sql, params)  # type: ignore[no-untyped-call]
        if not CONCURRENTLY.match(sql):
            self._alone = self._alone and sql.startswith("SAVEPOINT")  # peewee's own
            return super().execute_sql(sql, params)  # type: ignore[no-untyped-call]
        if not self._alone:
            raise peewee.ProgrammingError("what is CONCURRENTLY needs a migration of its own")
        connection = self.connector.open()
        try:
            cursor = connection.cursor()
            cursor.execute(sql, params)
            return cursor
        finally:
            connection.close()


def losses(database: Migrating, directory: Path | str, undone: Sequence[str]) -> list[str]:
    """What rolling back the migrations `undone` would delete, as `122 users` or `the metadata of 3
    users`. Which tables and columns go is found by doing it on temporary ones."""
    before, after = replayed(database, directory, undone)
    found = []
    with database.transaction():
        for table, parts in before.items():
            if table not in after:
                count = _count(database, table, "true")
                found += [f"{count} {table}"] if count else []
                continue
            for column in _columns(parts) - _columns(after[table]):
                count = _count(database, table, _set(database, table, column))
                found += [f"the {column} of {count} {table}"] if count else []
    return found


def _columns(parts: Parts) -> set[str]:
    return {name for kind, name in parts if kind == "column"}


def _set(database: Migrating, table: str, column: str) -> str:
    """The condition that a column has another value than by default."""
    default = database.execute_sql(
        "SELECT pg_get_expr(adbin, adrelid) FROM pg_attribute"
        " LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum"
        " WHERE attrelid = to_regclass(quote_ident(%s)) AND attname = %s",
        (table, column),
    ).fetchone()
    if default is None:
        return "false"  # it is not there
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


def advice(error: BaseException) -> list[str]:
    """What to do about an error, where that is known."""
    code = getattr(getattr(error, "orig", None) or error, "pgcode", None)
    return [ADVICE[code]] if code in ADVICE else []


def explain(error: BaseException) -> str:
    """Why a migration failed and what to do, in one line, without the values of a statement."""
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
