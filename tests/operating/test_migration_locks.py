"""No migration keeps anybody from `users` for as long as it takes to read or to write all of it.

Each statement of each migration is run on a table with users in it, and looked at: whether it read
the table while it held a lock that stops readers (or writers), and whether it wrote it anew.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from peewee_migrate import Router

from postgres.connect import Connector, Target
from postgres.migrating import Migrating
from tests.harness import Databases, checkout, wait_for
from tests.harness.system_postgres import INITDB, system_postgres

MIGRATIONS = checkout() / "migrations"
NAMES = sorted(path.stem for path in MIGRATIONS.glob("[0-9]*.py"))

# Readings of the table in this transaction, the file that it is in, the locks on it.
LOOK = """
    SELECT pg_stat_get_xact_numscans('users'::regclass), pg_relation_filenode('users'), array(
        SELECT mode FROM pg_locks WHERE relation = 'users'::regclass AND pid = pg_backend_pid())
"""
STOP_READERS = {"AccessExclusiveLock"}
STOP_WRITERS = {"ShareLock", "ShareRowExclusiveLock", "ExclusiveLock"}
USERS = """
    INSERT INTO users (id, email, name)
    SELECT gen_random_uuid(), n || '@example.com', 'Ann ' || n FROM generate_series(1, 100) AS n
"""


class Watched(Migrating):
    """Notes what each statement of a migration does to others."""

    def __init__(self, connector: Connector) -> None:
        super().__init__(connector)
        self.stopped: list[str] = []

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        before = self._look()
        cursor = super().execute_sql(sql, params)
        after = self._look()
        if before and after:
            locks, reads = set(after[2]), after[0] > before[0]
            if before[1] != after[1]:
                self.stopped.append(f"readers, by writing the table anew: {sql}")
            elif reads and locks & STOP_READERS:
                self.stopped.append(f"readers: {sql}")
            elif reads and locks & STOP_WRITERS:
                self.stopped.append(f"writers: {sql}")
        return cursor

    def _look(self) -> Any:
        if not self.in_transaction():
            return None
        with self.connection().cursor() as cursor:
            cursor.execute("SELECT to_regclass('users') IS NOT NULL")
            if not cursor.fetchone()[0]:
                return None
            cursor.execute(LOOK)
            return cursor.fetchone()


def stopped(uri: str, directory: Path, name: str) -> list[str]:
    """Whom the migration `name` stops, and with which statement; those before it are applied."""
    database = Watched(Connector(Target.of(uri), 10, {}))
    with database.connection_context():
        router = Router(database, migrate_dir=directory)
        for earlier in sorted(path.stem for path in directory.glob("[0-9]*.py")):
            if earlier == name:
                break
            router.run(earlier)
        if not database.execute_sql("SELECT to_regclass('users')").fetchone()[0]:
            return []  # nobody uses it yet
        database.execute_sql(USERS)
        database.stopped.clear()
        router.run(name)
    return database.stopped


@pytest.mark.parametrize("name", NAMES)
def test_a_migration_stops_nobody_for_as_long_as_the_table_is(
    databases: Databases, name: str
) -> None:
    """Where writers have to wait, the migration's own words say so ("writers wait")."""
    found = stopped(databases.create(migrated=False), MIGRATIONS, name)
    said = "writers wait" in " ".join((MIGRATIONS / f"{name}.py").read_text().lower().split())
    assert [line for line in found if not (said and line.startswith("writers"))] == []


@pytest.mark.parametrize(
    ("sql", "whom"),
    [
        ("ALTER TABLE users ALTER name TYPE varchar(300)", "readers"),
        ("ALTER TABLE users ADD COLUMN sample_1 uuid DEFAULT gen_random_uuid()", "readers"),
        ("ALTER TABLE users ADD CONSTRAINT sample_1 CHECK (name <> 'x')", "readers"),
        (
            "ALTER TABLE users ADD COLUMN sample_1 text GENERATED ALWAYS AS (lower(name)) STORED",
            "readers",
        ),
        ("CREATE INDEX sample_1 ON users (name)", "writers"),
        ("ALTER TABLE users ADD CONSTRAINT sample_1 UNIQUE (name)", "readers"),
        ("ALTER TABLE users ADD COLUMN sample_1 text", ""),
        ("ALTER TABLE users ADD COLUMN sample_1 text NOT NULL DEFAULT 'free'", ""),
        ("ALTER TABLE users ADD CONSTRAINT sample_1 CHECK (name <> 'x') NOT VALID", ""),
        ("CREATE INDEX CONCURRENTLY sample_1 ON users (name)", ""),
    ],
)
def test_what_stops_others_is_told(
    databases: Databases, tmp_path: Path, sql: str, whom: str
) -> None:
    """Guards the test above: it sees what it is there to see. A team may have columns of any likely
    name, so the sample has one that is not."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text((MIGRATIONS / f"{name}.py").read_text())
    (tmp_path / "999_more.py").write_text(
        f"def migrate(migrator, database, *, fake=False):\n    migrator.sql({sql!r})\n"
    )
    found = stopped(databases.create(migrated=False), tmp_path, "999_more")
    assert [line.partition(":")[0].partition(",")[0] for line in found] == ([whom] if whom else [])


class Crowded(Migrating):
    """Has somebody write to users, and wait for this transaction, from its first lock on."""

    def __init__(self, connector: Connector, uri: str) -> None:
        super().__init__(connector)
        self._uri = uri
        self.writers: list[threading.Thread] = []

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        cursor = super().execute_sql(sql, params)
        if sql.startswith("LOCK TABLE users"):
            thread = threading.Thread(target=self._write)
            thread.start()
            self.writers.append(thread)
            wait_for(self._somebody_waits, 10, "a writer that waits")
        return cursor

    def _write(self) -> None:
        connection = psycopg2.connect(self._uri)
        with connection, connection.cursor() as cursor:
            cursor.execute("UPDATE users SET name = 'Bob'")
        connection.close()

    def _somebody_waits(self) -> bool:
        with self.connection().cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_locks WHERE relation = 'users'::regclass AND NOT granted"
            )
            return bool(cursor.fetchone()[0])


def migrated_with_writers(databases: Databases) -> int:
    """How many writers waited for the migrations, on the way there and back."""
    uri = databases.create(migrated=False)
    database = Crowded(Connector(Target.of(uri), 10, {}), uri)
    with database.connection_context():
        router = Router(database, migrate_dir=MIGRATIONS)
        router.run(NAMES[0])
        database.execute_sql(USERS)
        for name in NAMES[1:]:
            router.run(name)
        for _ in NAMES[1:]:
            router.rollback()
    for thread in database.writers:
        thread.join(10)
        assert not thread.is_alive()
    return len(database.writers)


def test_a_writer_that_waits_keeps_no_migration_from_its_lock(databases: Databases) -> None:
    assert migrated_with_writers(databases)


@pytest.mark.skipif(INITDB is None, reason="no PostgreSQL is installed")
def test_nor_with_the_system_s_postgresql() -> None:
    """PostgreSQL 16 and older never gave a lock without waiting while a writer waited for the same
    transaction, so no migration went through while somebody wrote."""
    with system_postgres() as databases:
        assert migrated_with_writers(databases)
