"""The users table, with the bounds of a user as constraints of the database's own.

Frozen: it says what was made then, and never imports models.py, which changes later.
"""

from __future__ import annotations

import peewee as pw
from peewee_migrate import Migrator


def migrate(migrator: Migrator, database: pw.Database, *, fake: bool = False) -> None:
    # A range in a regular expression goes by code point whatever the locale, [[:cntrl:]] does not.
    migrator.sql(r"""
        CREATE TABLE users (
            id uuid CONSTRAINT users_pkey PRIMARY KEY,
            email text NOT NULL,
            name text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT users_email_length CHECK (char_length(email) BETWEEN 3 AND 254),
            CONSTRAINT users_name_length CHECK (char_length(name) BETWEEN 1 AND 200),
            CONSTRAINT users_name_no_control CHECK (name !~ '[\u0001-\u001F\u007F-\u009F]')
        )
    """)
    migrator.sql("CREATE UNIQUE INDEX users_email_lower ON users (lower(email))")


def rollback(migrator: Migrator, database: pw.Database, *, fake: bool = False) -> None:
    migrator.sql("DROP TABLE users")
