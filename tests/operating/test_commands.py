"""`app.py check`, its lines and exit codes; the arguments that app.py does not have."""

from __future__ import annotations

import psycopg2

from tests.harness import DEAD_DATABASE, Databases, ScriptedUpstream, free_port, run_app


def check(**settings: str) -> tuple[int, list[str]]:
    run = run_app("check", **settings)
    return run.returncode, run.stdout.splitlines()


def test_all_well_is_0(database: str, upstream: ScriptedUpstream) -> None:
    code, lines = check(POSTGRES_URI=database, UPSTREAM_URL=upstream.url)
    assert (code, lines) == (0, ["configuration: ok", "database: ok", "schema: ok", "upstream: ok"])


def test_bad_configuration_is_2_with_a_line_for_each_problem() -> None:
    code, lines = check(POSTGRES_URI="mysql://x", PORT="eighty", WORKERS="-1")
    assert code == 2
    assert [line.split()[0] for line in sorted(lines)] == ["PORT", "POSTGRES_URI", "WORKERS"]


def test_pending_migrations_are_3(databases: Databases, upstream: ScriptedUpstream) -> None:
    uri = databases.create(migrated=False)
    code, lines = check(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url)
    assert code == 3
    assert lines[2] == "schema: migrations pending: 001_users"


def test_another_schema_is_4(databases: Databases, upstream: ScriptedUpstream) -> None:
    uri = databases.create()
    connection = psycopg2.connect(uri)
    with connection, connection.cursor() as cursor:
        cursor.execute("DROP INDEX users_email_lower")
    connection.close()
    code, lines = check(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url)
    assert code == 4
    assert "users_email_lower" in lines[2]


def test_an_unreachable_database_is_5(upstream: ScriptedUpstream) -> None:
    code, lines = check(POSTGRES_URI=DEAD_DATABASE, UPSTREAM_URL=upstream.url)
    assert code == 5
    assert lines == [
        "configuration: ok",
        "database: unreachable: Connection refused",
        "schema: unknown",
        "upstream: ok",
    ]


def test_an_unreachable_upstream_is_6(database: str) -> None:
    code, lines = check(POSTGRES_URI=database, UPSTREAM_URL=f"http://127.0.0.1:{free_port()}")
    assert code == 6
    assert lines[-1].startswith("upstream: unreachable: ")


def test_an_argument_that_is_not_known_is_2() -> None:
    run = run_app("--serve")
    assert run.returncode == 2
    assert run.stdout == "usage: app.py [check | --dev]\n"
