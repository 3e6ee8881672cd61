"""Where `pw_migrate` works and how it behaves there; it executes this file at every command.

The target is POSTGRES_URI, from the environment or `.env`. Each command but `create` connects
here, before the history is read, so that only one of them at a time reads and changes it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import click
import peewee as pw
import psycopg2
from dotenv.parser import parse_stream

# pw_migrate executes this text without a __file__, and with its own directory on sys.path.
CONTEXT = click.get_current_context()
ROOT = Path(CONTEXT.params["directory"]).resolve().parent
sys.path.insert(0, str(ROOT))

from postgres.connect import Connector, Direct, Target, reason  # noqa: E402
from postgres.schema import ENCODING, applied, names  # noqa: E402
from settings import SettingsError, environment, postgres_uri, value_of  # noqa: E402

CONNECT_TIMEOUT = 10  # seconds
MIGRATORS_TIMEOUT = 600  # seconds to wait for other migrators to finish
# Seconds that a statement of a migration waits for a lock. While it waits behind a transaction
# that someone left open, all new readers and writers of that table wait behind it.
LOCK_TIMEOUT = 2
LOCK = 0x6761746568  # "gateh": any number that nobody else locks in this database


def target() -> Target:
    """The database that POSTGRES_URI names; exits with one line where it is unusable."""
    try:
        given = environment(ROOT / ".env", parse_stream, os.environ)
    except SettingsError as error:
        raise SystemExit(str(error)) from None
    try:
        uri = value_of("POSTGRES_URI", given)
        if not uri:
            raise ValueError("is required")
        return Target.of(postgres_uri(uri))
    except ValueError as error:
        raise SystemExit(f"POSTGRES_URI {error}") from None


def connected() -> pw.PostgresqlDatabase:
    """The database, connected and locked; exits with one line where that cannot be."""
    where = target()
    database: pw.PostgresqlDatabase = Direct(Connector(where, CONNECT_TIMEOUT, {}))
    try:
        database.connect()
        encoding = database.connection().info.parameter_status("server_encoding")
        if encoding != ENCODING:
            raise SystemExit(f"the database's encoding is {encoding}, and must be {ENCODING}")
        # A role's own statement_timeout is for requests; a migration takes what it takes.
        database.execute_sql("SET statement_timeout = 0")
        # A session's lock: it ends with this process, however that ends.
        if not database.execute_sql("SELECT pg_try_advisory_lock(%s)", (LOCK,)).fetchone()[0]:
            print("waiting for another pw_migrate to finish", file=sys.stderr)
            database.execute_sql(f"SET lock_timeout = '{MIGRATORS_TIMEOUT}s'")
            database.execute_sql("SELECT pg_advisory_lock(%s)", (LOCK,))
        database.execute_sql(f"SET lock_timeout = '{LOCK_TIMEOUT}s'")
        if CONTEXT.info_name == "rollback":
            done = applied(database.connection())
            if not done:
                raise SystemExit("there is nothing to roll back")
            if len(done) < CONTEXT.params["count"]:
                raise SystemExit(f"there is no more than {len(done)} to roll back")
            gone = set(done[-CONTEXT.params["count"] :]) - set(names(ROOT / "migrations"))
            if gone:
                raise SystemExit(f"the files of {', '.join(sorted(gone))} are not here")
    except (pw.PeeweeException, psycopg2.Error) as error:
        raise SystemExit(f"the database cannot be used: {reason(error, where)}") from None
    return database


if CONTEXT.info_name == "create":
    # Its comparison is with replayed migrations, never with the database, and it does not see
    # constraints, defaults and expression indexes.
    if CONTEXT.params["auto"]:
        raise SystemExit("create --auto is not supported: write the migration by hand")
    if not re.fullmatch(r"[A-Za-z0-9_]+", CONTEXT.params["name"]):
        raise SystemExit("a migration's name is letters, digits and _")
    DATABASE = pw.PostgresqlDatabase(None)
else:
    DATABASE = connected()
