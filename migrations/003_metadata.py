"""What a team keeps of a user beside address and name, as a JSON object.

PATCH merges it (RFC 7396), for which PostgreSQL itself has nothing but the first level. The
function is given the row's own column, so it is evaluated again where another writer was faster.

A column with a constant default rewrites no row. The constraint is not held against the rows that
are there, which would read them all under a lock; migration 004 does that, under one that stops
nobody.
"""

from __future__ import annotations

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

# What is not there, or is no object, counts as an empty one.
MERGED = """
    CREATE FUNCTION users_merged(target jsonb, patch jsonb) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
        IF jsonb_typeof(target) IS DISTINCT FROM 'object' THEN
            target := '{}';
        END IF;
        RETURN (target - ARRAY(SELECT jsonb_object_keys(patch))) || (
            SELECT coalesce(jsonb_object_agg(key, CASE jsonb_typeof(value)
                WHEN 'object' THEN users_merged(target -> key, value) ELSE value END), '{}')
            FROM jsonb_each(patch) WHERE jsonb_typeof(value) <> 'null'
        );
    END $$
"""


def migrate(migrator: Migrator, database: pw.Database, *, fake: bool = False) -> None:
    migrator.sql(MERGED)
    migrator.sql(LOCK)
    migrator.sql("ALTER TABLE users ADD COLUMN metadata jsonb NOT NULL DEFAULT '{}'")
    migrator.sql(
        "ALTER TABLE users ADD CONSTRAINT users_metadata_object"
        " CHECK (jsonb_typeof(metadata) = 'object') NOT VALID"
    )


def rollback(migrator: Migrator, database: pw.Database, *, fake: bool = False) -> None:
    migrator.sql(LOCK)
    migrator.sql("ALTER TABLE users DROP COLUMN metadata")
    # Where a rollback is tried on temporary tables, this one's name is not looked for.
    migrator.sql("DROP FUNCTION IF EXISTS users_merged(jsonb, jsonb)")
