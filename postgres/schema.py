"""What the migrations make, what of it is applied, and how the live schema differs from it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peewee
from psycopg2.errors import InsufficientPrivilege
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from postgres.connect import Connector, Direct, Target, reason, sqlstate
from postgres.deadlines import ended_after

# One row for each part of a table: kind, name, definition. Both sides of a comparison come from
# one server, so that they are spelled alike. NOT NULL is told with its column and not as a
# constraint, because only PostgreSQL 18 has it as one. The last argument of pg_get_indexdef leaves
# out the name of the schema, which is pg_temp_3 or the like on one side.
PARTS = """
    SELECT 'column', attname, format_type(atttypid, atttypmod)
        || CASE WHEN attcollation <> typcollation
            THEN ' COLLATE ' || attcollation::regcollation ELSE '' END
        || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
        || CASE WHEN attidentity <> '' THEN ' IDENTITY ' || attidentity::text ELSE '' END
        || CASE WHEN attgenerated <> '' THEN ' GENERATED ' || attgenerated::text ELSE '' END
        || coalesce(' DEFAULT ' || pg_get_expr(adbin, adrelid), '')
    FROM pg_attribute
    JOIN pg_type ON pg_type.oid = atttypid
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attrelid = %(table)s AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT 'constraint', conname, pg_get_constraintdef(oid)
    FROM pg_constraint WHERE conrelid = %(table)s AND contype <> 'n'
    UNION ALL
    SELECT 'index', relname, pg_get_indexdef(indexrelid, 0, true)
        || CASE WHEN indisvalid THEN '' ELSE ' INVALID' END
    FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE indrelid = %(table)s
        AND NOT EXISTS (
            SELECT FROM pg_constraint WHERE conindid = indexrelid AND conrelid = indrelid)
"""

# Migration 004 makes this only if the database has pg_trgm. The schema is right without it too.
OPTIONAL = {("index", "users_search")}
LOCK_SECONDS = 5  # how long a statement waits for a lock
# How long a comparison may take in all, in seconds. It is some forty statements.
COMPARE_SECONDS = 30
# No other encoding can hold all names and addresses.
ENCODING = "UTF8"
# The oldest version of PostgreSQL that can be asked the queries of this module.
OLDEST = 13
# `check` gives up this many seconds after PostgreSQL should have ended a statement.
MARGIN_SECONDS = 0.5
# How the SQLSTATE of an error begins that no migration is the cause of: of connections, read-only
# servers, privileges, resources, locks, an operator who intervenes, and the system.
ELSEWHERE = ("08", "25006", "42501", "53", "55P03", "57", "58")
LONGEST = 100  # characters of a definition in a message; the index of mailboxes has 4000
# What `check` says beside PostgreSQL's reason.
ADVICE = {
    "25006": "this is a standby, or the role has default_transaction_read_only",
    "42501": "GRANT that to the role (docs/operating.md, Permissions)",
}

Parts = dict[tuple[str, str], str]


def unsuitable(connection: Connection) -> str | None:
    """Why no migration can be applied to a database, or None."""
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != ENCODING:
        return (
            f"the database's encoding is {encoding}, and must be {ENCODING}: make a new database,"
            f" with createdb --encoding={ENCODING} --template=template0"
        )
    version = connection.server_version // 10000
    if version < OLDEST:
        return f"PostgreSQL {version} is too old: {OLDEST} or newer is needed"
    return None


def names(directory: Path | str) -> list[str]:
    """The names of the migrations in `directory`, in order. Raises OSError if it cannot be read."""
    files = (path.stem for path in Path(directory).iterdir() if path.suffix == ".py")
    return sorted(name for name in files if re.fullmatch(r"[0-9]{3}_[^.]+", name))


def applied(connection: Connection) -> list[str]:
    """The names of the migrations that the database says it has, in order."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass('migratehistory') IS NOT NULL")
        if not _value(cursor):
            return []
        cursor.execute("SELECT name FROM migratehistory ORDER BY id")
        return [name for (name,) in cursor]


def pending(connection: Connection, directory: Path | str) -> list[str]:
    """The names of the migrations in `directory` that the database does not have, in order. Raises
    psycopg2.Error."""
    done = applied(connection)
    return [name for name in names(directory) if name not in done]


def differences(database: Comparing, directory: Path | str, *, rights: bool = False) -> list[str]:
    """A line for each difference between the live tables and what all migrations make.

    A table that no migration makes is ignored. In the others a column, constraint or index that no
    migration makes is a difference. To find out what the migrations make, they are run on temporary
    tables, in a transaction that is rolled back. That changes nothing, and needs no privilege but
    TEMPORARY. With `rights`, a privilege that the role lacks is a difference too. Raises
    psycopg2.Error or peewee.DatabaseError, for instance if a table stays locked for LOCK_SECONDS.
    """
    with (
        database.connection().cursor() as cursor,
        database.transaction() as transaction,
    ):
        wrong = unsuitable(database.connection())
        if wrong:
            return [wrong]
        cursor.execute("SET LOCAL statement_timeout = 0")  # that is for requests
        # Since PostgreSQL 18 pg_get_expr waits for the lock of a reader.
        cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
        with database.savepoint() as temporary:
            expected, _ = _expected(database, cursor, directory, names(directory))
            temporary.rollback()
        live = {table: _parts(cursor, table) for table in expected}
        lines = [line for table in expected for line in _elsewhere(cursor, table)]
        if rights:
            lines += [line for table in expected for line in _forbidden(cursor, table)]
        transaction.rollback(begin=False)
    for table, parts in expected.items():
        if not live[table]:
            lines.append(f"table {table} is missing")
            continue
        for kind, name in sorted(parts.keys() | live[table].keys()):
            definition = live[table].get((kind, name), "")
            if (kind, name) in OPTIONAL and not definition.endswith("INVALID"):
                continue
            line = _difference(parts.get((kind, name)), definition or None)
            if line:
                lines.append(f"table {table}: {kind} {name} {line}")
    return lines


def verdict(
    uri: str, directory: Path | str, *, connect_timeout: float, statement_timeout: float
) -> tuple[int, str, str]:
    """How the database and its schema are: the exit code of `check`, and words for each of the two.
    The connection is made in the same way as the service makes its own. Times are in seconds."""
    target = Target.of(uri)
    settings = {"statement_timeout": str(round(statement_timeout * 1000))}
    database = Comparing(Connector(target, connect_timeout, settings))
    with contextlib.closing(database):
        try:
            database.connect()
            connection = database.connection()
            with ended_after(connection, statement_timeout + MARGIN_SECONDS):
                wrong, missing = unsuitable(connection), pending(connection, directory)
        except InsufficientPrivilege as error:
            return 4, "ok", f"cannot be read: {_advised(error, target)}"
        except Exception as error:
            return 5, f"unreachable: {reason(error, target)}", "unknown"
        if wrong:
            return 4, "ok", wrong
        if missing:
            todo = "run .venv/bin/pw_migrate migrate"
            return 3, "ok", f"migrations pending: {', '.join(missing)}: {todo}"
        try:
            with ended_after(connection, COMPARE_SECONDS):
                lines = differences(database, directory, rights=True)
        except TimeoutError as error:
            return 5, f"unreachable: {reason(error, target)}", "unknown"
        except Exception as error:  # It is a standby, or the role may not make temporary tables.
            return 4, "ok", f"cannot be compared: {_advised(error, target)}"
    if lines:
        return 4, "ok", f"not what the migrations make: {'; '.join(lines)}"
    return 0, "ok", "ok"


def _advised(error: Exception, target: Target) -> str:
    if isinstance(error, ReplayFailed):
        return str(error)
    return ": ".join(filter(None, (reason(error, target), ADVICE.get(sqlstate(error)))))


def _elsewhere(cursor: Cursor, table: str) -> list[str]:
    """A line if the service would work in a table of another schema than the one that was migrated;
    otherwise none."""
    cursor.execute(
        "SELECT relname, relnamespace::regnamespace::text FROM pg_class"
        " WHERE oid IN (to_regclass(quote_ident(%s)), to_regclass('migratehistory'))",
        (table,),
    )
    found = dict(cursor.fetchall())
    history, worked = found.get("migratehistory"), found.get(table)
    if worked and history and worked != history:
        return [f"table {table} is in schema {worked}, and schema {history} was migrated"]
    return []


def _forbidden(cursor: Cursor, table: str) -> list[str]:
    """A line if the role lacks a privilege on a table that the service needs; otherwise none."""
    cursor.execute(
        "SELECT string_agg(privilege, ', ') FROM unnest(%s) AS privilege"
        " WHERE NOT has_table_privilege(to_regclass(quote_ident(%s)), privilege)",
        (["SELECT", "INSERT", "UPDATE", "DELETE"], table),
    )
    missing = _value(cursor)
    return [f"table {table}: the role may not {missing}"] if missing else []


class ReplayFailed(Exception):
    """A migration cannot be run again: it has a mistake, or names a table with its schema."""


class Comparing(Direct):
    """A database on whose temporary tables migrations are run, in one transaction."""

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        sql = re.sub(r"(?i)\bCONCURRENTLY\b", "", sql)
        return super().execute_sql(sql, params)  # type: ignore[no-untyped-call]


def _expected(
    database: peewee.PostgresqlDatabase,
    cursor: Cursor,
    directory: Path | str,
    done: Sequence[str],
    undone: Sequence[str] = (),
) -> tuple[dict[str, Parts], dict[str, Parts]]:
    """The parts of each table that the migrations `done` make, and of what is left when those in
    `undone` are rolled back; leaves the transaction to be undone."""
    # It is imported here because that is slow, and the service itself does not need it.
    from peewee_migrate import Router

    # Unqualified names are made in the temporary schema, and found there and in pg_catalog.
    cursor.execute("SET LOCAL search_path TO pg_temp")
    router = Router(database, migrate_dir=Path(directory))
    migrator = router.migrator_class(database)
    for name in done:
        migrate, _ = router.read(name)
        with _replaying(f"migration {name}"):
            migrate(migrator, database, fake=False)
            migrator()
    made = _tables(cursor)
    for name in reversed(undone):
        _, rollback = router.read(name)
        with _replaying(f"the rollback of {name}"):
            rollback(migrator, database, fake=False)
            migrator()
    return made, _tables(cursor)


@contextlib.contextmanager
def _replaying(what: str) -> Iterator[None]:
    """Raises ReplayFailed if the migration is at fault, and not the connection, the server or what
    the role may do."""
    try:
        yield
    except Exception as error:
        code = sqlstate(error)
        if isinstance(error, peewee.PeeweeException) and (not code or code.startswith(ELSEWHERE)):
            raise
        [line, *_] = str(error).splitlines() or [type(error).__name__]
        raise ReplayFailed(f"{what} fails on temporary tables: {line}") from error


def _tables(cursor: Cursor) -> dict[str, Parts]:
    cursor.execute(
        "SELECT relname FROM pg_class"
        " WHERE relnamespace = pg_my_temp_schema() AND relkind IN ('r', 'p') ORDER BY relname"
    )
    return {table: _parts(cursor, table) for (table,) in cursor.fetchall()}


def replayed(
    database: Direct, directory: Path | str, undone: Sequence[str]
) -> tuple[dict[str, Parts], dict[str, Parts]]:
    """The tables that those migrations in `directory` make which are applied, and the tables that
    are left when the last ones, `undone`, are rolled back; found on temporary tables, which changes
    nothing. A pending one does not count: it may have dropped what is there."""
    known = applied(database.connection())
    done = [name for name in names(directory) if name in known]
    comparing: peewee.PostgresqlDatabase = Comparing(database.connector)
    with (
        comparing.connection_context(),
        comparing.connection().cursor() as cursor,
        comparing.transaction() as transaction,
    ):
        found = _expected(comparing, cursor, directory, done, undone)
        transaction.rollback(begin=False)
    return found


def _parts(cursor: Cursor, table: str) -> Parts:
    cursor.execute("SELECT to_regclass(quote_ident(%s))::oid", (table,))
    cursor.execute(PARTS, {"table": _value(cursor)})
    return {(kind, name): definition for kind, name, definition in cursor}


def _difference(expected: str | None, live: str | None) -> str | None:
    if expected == live:
        return None
    if live is None:
        return f"is missing ({_short(expected)})"
    if expected is None:
        return f"is not from the migrations ({_short(live)})"
    return f"is ({_short(live)}), not ({_short(expected)})"


def _short(definition: str | None) -> str:
    words = " ".join((definition or "").split())
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}…"


def _value(cursor: Cursor) -> Any:
    row = cursor.fetchone()
    return row[0] if row else None
