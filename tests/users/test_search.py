"""`q`, `count` and `email` of GET /users."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import psycopg2
import pytest

from commands import MIGRATIONS
from postgres.schema import names
from services import search
from tests.harness import (
    Databases,
    ScriptedUpstream,
    Service,
    create_user,
    invalid_fields,
    new_email,
    problem,
    pw_migrate,
    run_app,
)
from tests.harness.system_postgres import INITDB, system_postgres


def found(service: Service, **query: Any) -> list[str]:
    reply = service.call("GET", f"/users?{urlencode(query)}")
    assert reply.status == 200, reply
    return [user["name"] for user in reply.json()["users"]]


@pytest.fixture(scope="module")
def people(databases: Databases, upstream: ScriptedUpstream) -> Iterator[Service]:
    with Service(POSTGRES_URI=databases.create(), UPSTREAM_URL=upstream.url) as running:
        for name, email in (
            ("Ann Lee", "ann.lee@example.com"),
            ("Bob O'Neil", "bob@annex.example"),
            ("100% \\ _sure_", "sure@example.com"),
            ("Zoë Ångström", "zoe@bücher.example"),
            ("tab$& (.*) [a]", "regex+plus@example.com"),
            ("ΟΔΥΣΣΕΥΣ ΜΕΓΑΣ", "odysseus@example.com"),
        ):
            create_user(running, email, name)
        yield running


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("lee", ["Ann Lee"]),
        ("LEE", ["Ann Lee"]),
        ("ann", ["Ann Lee", "Bob O'Neil"]),
        ("ANNEX.", ["Bob O'Neil"]),
        ("o'ne", ["Bob O'Neil"]),
        ("ZOË", ["Zoë Ångström"]),
        ("BÜCHER", ["Zoë Ångström"]),
        ("%", ["100% \\ _sure_"]),
        ("\\", ["100% \\ _sure_"]),
        ("_", ["100% \\ _sure_"]),
        ("0% \\ _s", ["100% \\ _sure_"]),
        ("a_n", []),
        ("a%n", []),
        ("(.*)", ["tab$& (.*) [a]"]),
        ("lee ann", []),
        ("nn lee", ["Ann Lee"]),
        ("NN.LEE@EXAMPLE.C", ["Ann Lee"]),
        ("n.lee@example.com", ["Ann Lee"]),
        ("ann.leexample", []),  # Each three of these letters are in that address, in this order.
        ("100% \\ _sur", ["100% \\ _sure_"]),
        ("100_ \\ %sur", []),
        ("tab$& (.*) [a", ["tab$& (.*) [a]"]),
        ("ΟΔΥΣΣΕΥΣ ΜΕΓ", ["ΟΔΥΣΣΕΥΣ ΜΕΓΑΣ"]),
        ("lee\nann", []),
        ("\0", []),
        ("\r", []),
        ("' OR ''='", []),
        ("x" * 3000, []),
        ("%" * 3000, []),
    ],
    ids=lambda value: repr(value)[:16],
)
def test_a_text_finds_those_whose_name_or_address_contains_it(
    people: Service, text: str, names: list[str]
) -> None:
    assert found(people, q=text) == names
    reply = people.call("GET", f"/users?{urlencode({'q': text, 'count': 'true'})}")
    assert reply.json()["total"] == len(names)


def test_no_text_and_no_utf8_are_searches_too(people: Service) -> None:
    assert len(found(people, q="")) == 6
    assert found(people, q="ann" * 1000) == found(people, q="%" * 9000) == []
    for query in ("q=%FF%FE", "q=%ED%A0%80", "q=%00"):
        assert people.call("GET", f"/users?{query}").json()["users"] == []


def test_a_search_has_pages_that_keep_it(people: Service) -> None:
    first = people.call("GET", "/users?q=example&count=true&limit=2").json()
    names, total, target = [], first["total"], first["next"]
    assert total == 6
    names += [user["name"] for user in first["users"]]
    while target:
        page = people.call("GET", target).json()
        names += [user["name"] for user in page["users"]]
        target = page["next"]
        assert page["total"] == 6
    assert len(names) == len(set(names)) == 6


def test_a_total_is_told_where_it_is_asked_for(people: Service) -> None:
    assert "total" not in people.call("GET", "/users").json()
    assert "total" not in people.call("GET", "/users?count=false").json()
    assert people.call("GET", "/users?count=true&limit=1").json()["total"] == 6
    assert people.call("GET", "/users?count=true&email=nobody").json()["total"] == 0
    for value in ("", "1", "yes", "TRUE"):
        document = problem(people.call("GET", f"/users?count={value}"), 422, "invalid-query")
        assert invalid_fields(document) == ["count"]


@pytest.mark.parametrize(
    "query", ["email=regex+plus@example.com", "email=regex%2Bplus@example.com"]
)
def test_a_plus_in_an_address_is_a_plus(people: Service, query: str) -> None:
    [user] = people.call("GET", f"/users?{query}").json()["users"]
    assert user["email"] == "regex+plus@example.com"


def test_an_address_and_a_text_are_both_asked_for(people: Service) -> None:
    assert found(people, email="ann.lee@example.com", q="bob") == []
    assert found(people, email="ANN.lee@example.com", q="lee") == ["Ann Lee"]


def test_an_answer_names_at_most_twenty_errors(service: Service) -> None:
    for query in ("&".join(["a"] * 20000), "&".join(f"a{n}=1" for n in range(5000))):
        reply = service.call("GET", f"/users?{query}")
        assert len(problem(reply, 422, "invalid-query")["errors"]) == 20
        assert len(reply.body) < 4000
    body = {f"m{number}": 1 for number in range(3000)}
    reply = service.call("POST", "/users", body)
    errors = problem(reply, 422, "invalid-user")["errors"]
    assert len(errors) == 20
    assert [error["field"] for error in errors[:2]] == ["email", "name"]


def test_a_page_may_end_with_metadata_that_no_reader_of_json_takes(
    database: str, databases: Databases, start: Any
) -> None:
    """The operator may write what a call may not, and the page was 500."""
    with databases.admin(database) as cursor:
        for number in range(3):
            cursor.execute(
                "INSERT INTO users (id, email, name, metadata)"
                " VALUES (%s, %s, 'A', jsonb_build_object('n', repeat('9', 5000)::numeric))",
                (f"00000000-0000-0000-0000-00000000000{number}", f"nines{number}@example.com"),
            )
    service = start(POSTGRES_URI=database)
    reply = service.call("GET", "/users?limit=2")
    assert reply.status == 200
    assert b"after=00000000-0000-0000-0000-000000000001" in reply.body
    with databases.admin(database) as cursor:
        cursor.execute("DELETE FROM users WHERE email LIKE 'nines%'")


def test_a_search_that_takes_too_long_says_what_would_help(
    databases: Databases, start: Any
) -> None:
    uri = databases.create()
    with databases.admin(uri) as cursor:
        cursor.execute(
            "INSERT INTO users (id, email, name) SELECT gen_random_uuid(),"
            " 'u' || n || '@example.com', repeat('x', 190) || n FROM generate_series(1, 200000) n"
        )
    service = start(POSTGRES_URI=uri, DB_STATEMENT_TIMEOUT="0.1")
    reply = service.call("GET", f"/users?q={quote('nobody has this')}&count=true")
    assert "pg_trgm" in problem(reply, 503, "database-unavailable")["detail"]
    assert len(found(service, limit=5)) == 5


@pytest.mark.skipif(INITDB is None, reason="no PostgreSQL with pg_trgm is installed")
def test_with_pg_trgm_a_search_goes_by_an_index() -> None:
    with system_postgres() as databases:
        uri = databases.create()
        assert "schema: ok" in run_app("check", POSTGRES_URI=uri).stdout
        with databases.admin(uri) as cursor:
            cursor.execute(
                "INSERT INTO users (id, email, name) SELECT gen_random_uuid(), n || '@example.com',"
                " md5(n::text) FROM generate_series(1, 50000) n"
            )
            cursor.execute("VACUUM ANALYZE users")
        few = search.Search(text="c4ca4238a0b9")
        for asked, index in ((few, "users_search"), (search.Search(text="example"), "users_pkey")):
            sql = search._page(frozenset({"text"}), False, True).plain
            assert index in explained(uri, sql, asked.values())
        with Service(POSTGRES_URI=uri) as service:
            assert found(service, q="C4CA4238a0b9") == ["c4ca4238a0b923820dcc509a6f75849b"]
        # Either is right: with the index, and without.
        with databases.admin(uri) as cursor:
            cursor.execute("DROP INDEX users_search")
        assert "schema: ok" in run_app("check", POSTGRES_URI=uri).stdout
        rolled_back_before_search(uri)
        assert pw_migrate("migrate", uri=uri).returncode == 0
        with databases.admin(uri) as cursor:
            cursor.execute("SELECT to_regclass('users_search') IS NOT NULL")
            assert cursor.fetchone() == (True,)


@pytest.mark.skipif(INITDB is None, reason="no PostgreSQL with pg_trgm is installed")
def test_who_may_not_create_pg_trgm_does_without() -> None:
    with system_postgres() as databases:
        role = f"r{uuid.uuid4().hex[:8]}"
        uri = databases.create(migrated=False)
        with databases.admin(uri) as cursor:
            cursor.execute(f"CREATE ROLE {role} LOGIN")
            cursor.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
        own = uri.replace("postgres:@", f"{role}:@")
        done = pw_migrate("migrate", uri=own)
        assert done.returncode == 0, done.stderr
        assert "may not create pg_trgm" in done.stdout
        assert "schema: ok" in run_app("check", POSTGRES_URI=own).stdout
        with Service(POSTGRES_URI=own) as service:
            create_user(service, new_email(), "Ann Lee")
            assert found(service, q="n l") == ["Ann Lee"]


@pytest.mark.skipif(INITDB is None, reason="no PostgreSQL with pg_trgm is installed")
def test_pg_trgm_in_a_schema_of_its_own() -> None:
    """Migration 004 failed where the role may not use that schema, and at a `%` in its name."""
    with system_postgres() as databases:
        role = f"r{uuid.uuid4().hex[:8]}"
        uri = databases.create(migrated=False)
        with databases.admin(uri) as cursor:
            cursor.execute('CREATE SCHEMA "100%"; CREATE EXTENSION pg_trgm SCHEMA "100%"')
            cursor.execute(f"CREATE ROLE {role} LOGIN")
            cursor.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
            own = uri.replace("postgres:@", f"{role}:@")
            done = pw_migrate("migrate", uri=own)
            assert done.returncode == 0, done.stderr
            assert 'may not use the schema of pg_trgm, "100%"' in done.stdout
            rolled_back_before_search(own)
            cursor.execute(f'GRANT USAGE ON SCHEMA "100%" TO {role}')
            done = pw_migrate("migrate", uri=own)
            assert done.returncode == 0 and "without" not in done.stdout, done.stderr
            cursor.execute("SELECT to_regclass('users_search') IS NOT NULL")
            assert cursor.fetchone()[0]
        assert "schema: ok" in run_app("check", POSTGRES_URI=own).stdout


def rolled_back_before_search(uri: str) -> None:
    since = [name for name in names(MIGRATIONS) if name >= "004_search"]
    assert pw_migrate("rollback", "--count", str(len(since)), uri=uri).returncode == 0


def explained(uri: str, sql: str, values: dict[str, Any]) -> str:
    connection = psycopg2.connect(uri)
    try:
        with connection.cursor() as cursor:
            cursor.execute("EXPLAIN " + sql, values)
            return "\n".join(line for (line,) in cursor.fetchall())
    finally:
        connection.close()
