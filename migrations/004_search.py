"""Find users by a part of a name or an address, from an index where PostgreSQL has pg_trgm.

Without it a search reads the whole table; the service works all the same. Where pg_trgm comes
later, make it and the index by hand: docs/migrations.md says how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peewee as pw
from peewee_migrate import Migrator

# Behind a statement that waits for this lock all readers wait too. So it waits for a moment only,
# again and again. NOWAIT would never get it from PostgreSQL 16 and older while a writer waits.
LOCK = """
    DO $$ DECLARE before text := current_setting('lock_timeout');
    BEGIN
        FOR attempt IN 1..30 LOOP
            BEGIN
                PERFORM set_config('lock_timeout', '50ms', true);
                LOCK TABLE users IN ACCESS EXCLUSIVE MODE;
                PERFORM set_config('lock_timeout', before, true);
                RETURN;
            EXCEPTION WHEN lock_not_available THEN
                PERFORM pg_sleep(0.05);
            END;
        END LOOP;
        RAISE lock_not_available USING MESSAGE = 'another transaction does not let go of users';
    END $$
"""


WITHOUT = "searching users goes without an index"


def make_index(database: pw.Database) -> None:
    """Make the index, and the extension before it, or say why not."""
    execute: Callable[..., Any] = database.execute_sql
    if execute(
        "SELECT relpersistence = 't' FROM pg_class WHERE oid = 'users'::regclass"
    ).fetchone()[0]:
        return  # `app.py check` compares with this table, and knows that either is right
    where = (
        "SELECT quote_ident(nspname) FROM pg_extension"
        " JOIN pg_namespace ON pg_namespace.oid = extnamespace WHERE extname = 'pg_trgm'"
    )
    if not execute(where).fetchone():
        offered = "SELECT name FROM pg_available_extensions WHERE name = 'pg_trgm'"
        if not execute(offered).fetchone():
            print(f"{WITHOUT}: this PostgreSQL has no pg_trgm")
            return
        try:
            with database.savepoint():
                execute("CREATE EXTENSION pg_trgm")
        except pw.ProgrammingError:
            print(f"{WITHOUT}: this role may not create pg_trgm")
            return
    schema = execute(where).fetchone()[0]
    usable = "SELECT has_schema_privilege(extnamespace, 'USAGE') FROM pg_extension"
    if not execute(f"{usable} WHERE extname = 'pg_trgm'").fetchone()[0]:
        print(f"{WITHOUT}: this role may not use the schema of pg_trgm, {schema}")
        return
    schema = schema.replace("%", "%%")
    execute(
        "CREATE INDEX IF NOT EXISTS users_search ON users USING gin"
        f" ((lower(name) || E'\\n' || lower(email)) {schema}.gin_trgm_ops)"
    )


def migrate(migrator: Migrator, database: pw.Database, *, fake: bool = False) -> None:
    migrator.sql("ALTER TABLE users VALIDATE CONSTRAINT users_metadata_object")
    migrator.run(make_index, database)


def rollback(migrator: Migrator, database: pw.Database, *, fake: bool = False) -> None:
    migrator.sql(LOCK)
    migrator.sql("DROP INDEX IF EXISTS users_search")
    migrator.sql(
        "ALTER TABLE users DROP CONSTRAINT users_metadata_object, ADD CONSTRAINT"
        " users_metadata_object CHECK (jsonb_typeof(metadata) = 'object') NOT VALID"
    )
