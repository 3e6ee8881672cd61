"""What a team keeps of a user beside address and name, as a JSON object.

A column with a constant default rewrites no row. The constraint is not held against the rows that
are there, which would read them all under a lock; migration 004 does that, under one that stops
nobody.
"""

from __future__ import annotations

import os

import peewee as pw
from peewee_migrate import Migrator

# Whoever waits for this lock has all readers wait behind it, so it is asked for without waiting.
LOCK = """
    DO $$ BEGIN
        FOR attempt IN 1..60 LOOP
            BEGIN
                LOCK TABLE users IN ACCESS EXCLUSIVE MODE NOWAIT;
                RETURN;
            EXCEPTION WHEN lock_not_available THEN
                PERFORM pg_sleep(0.05);
            END;
        END LOOP;
        RAISE lock_not_available USING MESSAGE = 'another transaction does not let go of users';
    END $$
"""


def migrate(migrator: Migrator, database: pw.Database, *, fake: bool = False) -> None:
    migrator.sql(LOCK)
    migrator.sql("ALTER TABLE users ADD COLUMN metadata jsonb NOT NULL DEFAULT '{}'")
    migrator.sql(
        "ALTER TABLE users ADD CONSTRAINT users_metadata_object"
        " CHECK (jsonb_typeof(metadata) = 'object') NOT VALID"
    )


def keep_data(database: pw.Database) -> None:
    """Refuse to delete what somebody has written, unless that is said to be meant."""
    if os.environ.get("ROLLBACK_DELETES_DATA") == "yes":
        return
    (count,) = database.execute_sql("SELECT count(*) FROM users WHERE metadata <> '{}'").fetchone()
    if count:
        raise SystemExit(
            f"this would delete the metadata of {count} users:"
            " set ROLLBACK_DELETES_DATA=yes if that is meant"
        )


def rollback(migrator: Migrator, database: pw.Database, *, fake: bool = False) -> None:
    migrator.sql(LOCK)
    migrator.run(keep_data, database)
    migrator.sql("ALTER TABLE users DROP COLUMN metadata")
