"""Where `pw_migrate` works and how it behaves there; it executes this file at every command.

The target is POSTGRES_URI, from the environment or `.env`. Each command but `create` connects
here, before the history is read, so that only one of them at a time reads and changes it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from functools import partial
from pathlib import Path

import click
import peewee as pw
import psycopg2
from dotenv.parser import parse_stream
from peewee_migrate import router

# pw_migrate executes this text without a __file__, and with its own directory on sys.path.
CONTEXT = click.get_current_context()
MIGRATIONS = Path(CONTEXT.params["directory"]).resolve()
ROOT = MIGRATIONS.parent
sys.path.insert(0, str(ROOT))

from env_file import environment  # noqa: E402
from postgres.connect import Connector, Target, reason  # noqa: E402
from postgres.deadlines import ended_after  # noqa: E402
from postgres.migrating import Migrating, advice, explain, losses  # noqa: E402
from postgres.schema import ReplayFailed, applied, names, unsuitable  # noqa: E402
from settings import SettingsError, postgres_uri, value_of  # noqa: E402

CONNECT_SECONDS = 10
# A role's own limits are for requests, and a migration may take longer.
SETTINGS = {"statement_timeout": "0", "lock_timeout": "0"}


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
    connector = Connector(where, CONNECT_SECONDS, SETTINGS)
    database = Migrating(connector)
    try:
        database.connect()
        wrong = unsuitable(database.connection())
        if wrong:
            raise SystemExit(wrong)
        check_answers(database)
        database.lock(lambda: print("waiting for another pw_migrate to finish", file=sys.stderr))
        if CONTEXT.info_name == "rollback":
            check_schema(database)
            check_rollback(database, CONTEXT.params["count"])
        elif CONTEXT.info_name == "migrate":
            check_schema(database)
            check_migrate(database)
    except TimeoutError:
        raise SystemExit("another pw_migrate does not finish: see pg_stat_activity") from None
    except ReplayFailed as error:
        raise SystemExit(str(error)) from None
    except (pw.PeeweeException, psycopg2.Error) as error:
        told = f"the database cannot be used: {reason(error, where)}"
        raise SystemExit(": ".join((told, *advice(error)))) from None
    return database


def check_answers(database: Migrating) -> None:
    """Exits with one line where only a pooler answers, with no server behind it."""
    try:
        with ended_after(database.connection(), CONNECT_SECONDS):
            database.cursor().execute("SELECT 1")
    except TimeoutError as error:
        raise SystemExit(f"the database cannot be used: {error}") from None


def check_schema(database: Migrating) -> None:
    """Exits with one line if the migrated tables are in one schema and search_path begins with
    another. A new table would be made there, and an empty `users` would then hide the one in
    use."""
    migrated, first = database.execute_sql(
        "SELECT (SELECT relnamespace::regnamespace::text FROM pg_class"
        " WHERE oid = to_regclass('migratehistory')), quote_ident(current_schema())"
    ).fetchone()
    if migrated and first and migrated != first:
        raise SystemExit(
            f"schema {migrated} was migrated, and search_path begins with schema {first}: name only"
            " the one that is meant"
        )


def check_migrate(database: Migrating) -> None:
    """Exits with one line where the history has migrations that are not here, and others are
    pending: they would be applied to a database that is not known."""
    done, here = set(applied(database.connection())), set(names(MIGRATIONS))
    if here - done:
        demand_files(done - here)


def demand_files(missing: set[str]) -> None:
    """Exits with one line if there are any."""
    if missing:
        raise SystemExit(
            f"the files of {', '.join(sorted(missing))} are not here: use the version of Gatehouse"
            " that has them"
        )


def check_rollback(database: Migrating, count: int) -> None:
    """Exits with one line where a rollback is not possible, or would delete data and nobody has
    allowed that."""
    done = applied(database.connection())
    if count < 1:
        raise SystemExit(f"--count must be 1 or more, not {count}")
    if not done:
        raise SystemExit("there is nothing to roll back")
    if len(done) < count:
        applied_are = "1 migration is" if len(done) == 1 else f"{len(done)} migrations are"
        raise SystemExit(f"only {applied_are} applied: --count must be {len(done)} or less")
    undone = done[len(done) - count :]
    demand_files(set(undone) - set(names(MIGRATIONS)))
    # From the environment alone: in `.env` the permission would stay.
    if os.environ.get("ROLLBACK_DELETES_DATA") == "yes":
        return
    lost = losses(database, MIGRATIONS, undone)
    if lost:
        raise SystemExit(
            f"rolling back {', '.join(undone)} would delete {' and '.join(lost)}: to do that, set"
            " ROLLBACK_DELETES_DATA=yes in the environment"
        )


class OneLine(logging.Filter):
    """Turns the traceback of a failure, some ninety lines, into one that says what to do; and says
    what was rolled back as `list` does."""

    failure = "pw_migrate failed"

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            self.failure = record.getMessage()
            return False
        done, _, name = record.getMessage().partition(": ")
        if done == "Downgraded migration":
            # A warning of the library's, and all that it says when it has done what it should.
            print(f"- [ ] {name}")
            return False
        return True

    def tell(self, kind: type[BaseException], error: BaseException, _: object) -> None:
        print(f"{self.failure}: {explain(error)}", file=sys.stderr)


def name_the_new(before: set[str]) -> None:
    for name in sorted(set(names(MIGRATIONS)) - before):
        print(Path(CONTEXT.params["directory"]) / f"{name}.py")


one_line = OneLine()
logging.getLogger("peewee_migrate.logs").addFilter(one_line)
logging.getLogger("peewee_migrate.logs").setLevel(logging.WARNING)  # until the library does
sys.excepthook = one_line.tell

if CONTEXT.info_name == "create":
    # Its comparison is with replayed migrations, never with the database, and it does not see
    # constraints, defaults and expression indexes.
    if CONTEXT.params["auto"]:
        raise SystemExit("create --auto is not supported: write the migration by hand")
    if not re.fullmatch(r"[A-Za-z0-9_]+", CONTEXT.params["name"]):
        raise SystemExit("a migration's name is letters, digits and _")
    # The library's own offers operations on models, of which it knows none here.
    router.TEMPLATE = (MIGRATIONS / "template.txt").read_text()
    CONTEXT.call_on_close(partial(name_the_new, set(names(MIGRATIONS))))
    DATABASE = pw.PostgresqlDatabase(None)
elif CONTEXT.info_name == "merge":
    raise SystemExit("merge is not supported: it would forget what is applied")
elif CONTEXT.params.get("name") not in (None, *names(MIGRATIONS)):
    raise SystemExit(f"there is no migration {CONTEXT.params['name']}")
else:
    DATABASE = connected()
    if CONTEXT.info_name == "list":
        # The library would make its table first, and `list` is for a role that may make none too.
        router.BaseRouter.done = property(lambda _: applied(DATABASE.connection()))
