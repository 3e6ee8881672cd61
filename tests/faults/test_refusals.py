"""What the database itself refuses: constraints, triggers and policies that an operator added."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg2.errorcodes
import pytest

from postgres.statements import DEFECT, PROBLEMS
from problems import DatabaseUnavailable, RefusedByDatabase, SchemaNotMigrated
from tests.harness import Databases, Reply, Service, new_email, problem

Start = Callable[..., Service]
# What an operator's rule is called, or says: none of it is a caller's business.
INNER = ("the_rule", "SQLSTATE", "23", "quux", "users", "orders", "constraint", "trigger", "policy")


@pytest.fixture
def store(databases: Databases) -> str:
    return databases.create()


def prepare(databases: Databases, uri: str, *statements: str) -> None:
    with databases.admin(uri) as cursor:
        for statement in statements:
            cursor.execute(statement)


def assert_refused(reply: Reply, service: Service, name: str, *logged: str) -> None:
    problem(reply, 409, name)
    document = reply.json()
    for inner in INNER:
        assert inner not in document["title"] + document["detail"], inner
    assert set(document) == {"type", "title", "status", "detail", "request_id"}
    assert "Traceback" not in service.log, service.log
    for text in logged:
        assert text in service.log, service.log


def new_user(name: str = "Ann") -> dict[str, str]:
    return {"email": new_email(), "name": name}


def raising(sqlstate: str, when: str = "BEFORE INSERT OR UPDATE", words: str = "quux") -> str:
    return (
        "CREATE OR REPLACE FUNCTION the_rule() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION '{words}' USING ERRCODE = '{sqlstate}'; END $$;"
        "DROP TRIGGER IF EXISTS the_rule ON users;"
        f"CREATE TRIGGER the_rule {when} ON users FOR EACH ROW EXECUTE FUNCTION the_rule()"
    )


FORBIDDING = {
    "check": (
        "23514, constraint the_rule",
        "ALTER TABLE users ADD CONSTRAINT the_rule CHECK (name <> 'Bob')",
    ),
    "not null": (
        "23502, column badge, of table users",
        "CREATE FUNCTION the_rule() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.name <> 'Bob' THEN NEW.badge = 'yes'; END IF; RETURN NEW; END $$;"
        "ALTER TABLE users ADD badge text DEFAULT 'yes' NOT NULL;"
        "ALTER TABLE users ALTER badge DROP DEFAULT;"
        "CREATE TRIGGER t BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION the_rule();"
        "CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.name = 'Bob' THEN NEW.badge = NULL; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER u BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION forget()",
    ),
    "unique": (
        "23505, constraint the_rule",
        "CREATE UNIQUE INDEX the_rule ON users ((name = 'Bob')) WHERE name = 'Bob';"
        "INSERT INTO users (id, email, name) VALUES (gen_random_uuid(), 'bob@example.com', 'Bob')",
    ),
    "exclusion": (
        "23P01, constraint the_rule",
        "ALTER TABLE users ADD CONSTRAINT the_rule EXCLUDE USING btree (name WITH =)"
        " WHERE (name = 'Bob');"
        "INSERT INTO users (id, email, name) VALUES (gen_random_uuid(), 'bob@example.com', 'Bob')",
    ),
    "deferred": (
        "23503, constraint the_rule",
        "CREATE TABLE names (name text PRIMARY KEY); INSERT INTO names VALUES ('Ann');"
        "ALTER TABLE users ADD CONSTRAINT the_rule FOREIGN KEY (name) REFERENCES names"
        " DEFERRABLE INITIALLY DEFERRED",
    ),
    "raise": (
        "P0001, quux, PL/pgSQL function the_rule()",
        "CREATE FUNCTION the_rule() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.name = 'Bob' THEN RAISE EXCEPTION 'quux'; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER t BEFORE INSERT OR UPDATE ON users FOR EACH ROW EXECUTE FUNCTION the_rule()",
    ),
    "raise at commit": (
        "P0001, quux, PL/pgSQL function the_rule()",
        "CREATE FUNCTION the_rule() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.name = 'Bob' THEN RAISE EXCEPTION 'quux'; END IF; RETURN NEW; END $$;"
        "CREATE CONSTRAINT TRIGGER t AFTER INSERT OR UPDATE ON users DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION the_rule()",
    ),
    "a trigger that fails": (
        "22012, PL/pgSQL function the_rule()",
        "CREATE FUNCTION the_rule() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE n int; BEGIN"
        " IF NEW.name = 'Bob' THEN n = 1 / (length(NEW.name) - 3); END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER t BEFORE INSERT OR UPDATE ON users FOR EACH ROW EXECUTE FUNCTION the_rule()",
    ),
    "a trigger for a table that is gone": (
        "42P01, PL/pgSQL function the_rule()",
        "CREATE FUNCTION the_rule() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.name = 'Bob' THEN INSERT INTO nowhere VALUES (1); END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER t BEFORE INSERT OR UPDATE ON users FOR EACH ROW EXECUTE FUNCTION the_rule()",
    ),
    "a trigger that leaves the row as it is": (
        "a trigger or a policy",
        "CREATE FUNCTION the_rule() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.name = 'Bob' THEN RETURN NULL; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER t BEFORE INSERT OR UPDATE ON users FOR EACH ROW EXECUTE FUNCTION the_rule()",
    ),
    "a shorter column": (
        "22001",
        "ALTER TABLE users ADD COLUMN shouted varchar(2) GENERATED ALWAYS AS"
        " (CASE WHEN name = 'Bob' THEN 'quux' ELSE '' END) STORED",
    ),
}


@pytest.mark.parametrize("kind", FORBIDDING)
def test_a_write_that_a_rule_of_the_operator_forbids_is_409(
    databases: Databases, store: str, start: Start, kind: str
) -> None:
    logged, statements = FORBIDDING[kind]
    prepare(databases, store, statements)
    service = start(POSTGRES_URI=store)
    created = service.call("POST", "/users", new_user())
    assert created.status == 201, created
    user = created.json()
    target = f"/users/{user['id']}"
    answers = [
        service.call("POST", "/users", new_user("Bob")),
        service.call("PUT", f"/users/{uuid.uuid4()}", new_user("Bob")),
        service.call("PUT", target, {"email": user["email"], "name": "Bob"}),
        service.call("PATCH", target, {"name": "Bob"}),
    ]
    for reply in answers:
        assert_refused(reply, service, "refused-by-database", f"refused by the database: {logged}")
    rows = [new_user("Bob"), {**user, "name": "Bob"}, new_user() | {"id": str(uuid.uuid4())}]
    body = "\n".join(map(json.dumps, rows)).encode()
    imported = service.call("POST", "/users", body, {"Content-Type": "application/x-ndjson"})
    told = [json.loads(line) for line in imported.body.splitlines()]
    assert [row.get("status") for row in told] == [409, 409, 201, None], told
    assert {row["type"] for row in told[:2]} == {"urn:gatehouse:refused-by-database"}
    assert service.call("GET", target).json() == user
    assert service.call("GET", "/health").json()["database"]["status"] == "up"
    # Another user's address is told as before, whatever else is unique.
    taken = {"email": user["email"].upper(), "name": "Cleo"}
    prepare(databases, store, "INSERT INTO names VALUES ('Cleo')") if kind == "deferred" else None
    problem(service.call("POST", "/users", taken), 409, "email-taken")
    problem(service.call("PUT", f"/users/{uuid.uuid4()}", taken), 409, "email-taken")


@pytest.mark.parametrize("how", ["", "ON DELETE RESTRICT", "DEFERRABLE INITIALLY DEFERRED"])
def test_a_user_to_whom_another_table_refers_is_in_use(
    databases: Databases, store: str, start: Start, how: str
) -> None:
    prepare(
        databases,
        store,
        f"CREATE TABLE orders (user_id uuid CONSTRAINT the_rule REFERENCES users {how})",
    )
    service = start(POSTGRES_URI=store)
    user = service.call("POST", "/users", new_user()).json()
    target = f"/users/{user['id']}"
    prepare(databases, store, f"INSERT INTO orders VALUES ('{user['id']}')")
    reply = service.call("DELETE", target)
    assert_refused(reply, service, "user-in-use", "constraint the_rule, of table orders")
    match = {"If-Match": service.call("GET", target).get("ETag") or ""}
    assert_refused(service.call("DELETE", target, headers=match), service, "user-in-use")
    assert service.call("GET", target).json() == user
    assert service.call("PATCH", target, {"name": "Bob"}).status == 200
    prepare(databases, store, "DELETE FROM orders")
    assert service.call("DELETE", target).status == 204


def test_a_trigger_that_quotes_what_steers_a_terminal_cannot_do_so_in_the_log(
    databases: Databases, store: str, start: Start
) -> None:
    prepare(databases, store, raising("P0001", words="red \x1b[31m, \x9b31m \u202e and Zoë"))
    service = start(POSTGRES_URI=store)
    assert service.call("POST", "/users", new_user()).status == 409
    assert r"red \x1b[31m, \x9b31m \u202e and Zoë" in service.log


LEAVING = (
    "CREATE FUNCTION the_rule() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;"
    "CREATE TRIGGER t BEFORE DELETE ON users FOR EACH ROW EXECUTE FUNCTION the_rule()"
)


@pytest.mark.parametrize(
    ("rule", "logged"),
    [
        (raising("P0001", "BEFORE DELETE"), "P0001, quux"),
        (LEAVING, "a trigger or a policy left the row as it was"),
        ("CREATE RULE the_rule AS ON DELETE TO users DO INSTEAD NOTHING", "0A000"),
    ],
    ids=["raises", "returns NULL", "does something else instead"],
)
def test_a_deletion_that_a_trigger_or_a_rule_forbids_is_refused(
    databases: Databases, store: str, start: Start, rule: str, logged: str
) -> None:
    prepare(databases, store, rule)
    service = start(POSTGRES_URI=store)
    created = service.call("POST", "/users", new_user())
    target = f"/users/{created.json()['id']}"
    tag = {"If-Match": created.get("ETag") or ""}
    for headers in ({}, tag, {"If-Match": "*"}, {"If-None-Match": '"another"'}):
        reply = service.call("DELETE", target, headers=headers)
        assert_refused(reply, service, "refused-by-database", f"the database: {logged}")
    assert service.call("GET", target).json() == created.json()


def test_writers_that_meet_are_not_taken_for_a_rule_of_the_database(
    store: str, start: Start
) -> None:
    """A user that comes between a write that found none and the look for the reason why."""
    service = start(POSTGRES_URI=store)
    target = f"/users/{uuid.uuid4()}"
    user = new_user()

    def write(turn: int) -> tuple[str, int]:
        method = ("PUT", "DELETE", "PATCH")[turn % 3]
        body = {"PUT": user, "PATCH": {"name": str(turn)}}.get(method)
        return method, service.call(method, target, body).status

    with ThreadPoolExecutor(12) as crowd:
        found = set(crowd.map(write, range(600)))
    assert found == {
        ("PUT", 200),
        ("PUT", 201),
        ("DELETE", 204),
        ("DELETE", 404),
        ("PATCH", 200),
        ("PATCH", 404),
    }


def test_row_level_security_is_a_refusal_and_a_missing_permission_is_none(
    databases: Databases, store: str, start: Start
) -> None:
    """Both have SQLSTATE 42501."""
    role = f"test_{uuid.uuid4().hex[:12]}"
    prepare(
        databases,
        store,
        f"CREATE ROLE {role} LOGIN",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON users TO {role}",
        f"GRANT SELECT ON migratehistory TO {role}",
        "ALTER TABLE users ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY seen ON users FOR SELECT USING (true)",
        "CREATE POLICY gone ON users FOR DELETE USING (true)",
        "CREATE POLICY the_rule ON users FOR INSERT WITH CHECK (name <> 'Bob')",
        "CREATE POLICY the_rule_too ON users FOR UPDATE USING (true) WITH CHECK (name <> 'Bob')",
    )
    service = start(POSTGRES_URI=store.replace("postgres:@", f"{role}:@"))
    user = service.call("POST", "/users", new_user()).json()
    target = f"/users/{user['id']}"
    for reply in (
        service.call("POST", "/users", new_user("Bob")),
        service.call("PUT", f"/users/{uuid.uuid4()}", new_user("Bob")),
        service.call("PATCH", target, {"name": "Bob"}),
    ):
        assert_refused(reply, service, "refused-by-database", "refused by the database: 42501")
    # What the role may see, but not change.
    prepare(databases, store, "DROP POLICY gone ON users")
    prepare(databases, store, "ALTER POLICY the_rule_too ON users USING (false)")
    left = "a trigger or a policy left the row as it was"
    for reply in (
        service.call("PATCH", target, {"name": "Cleo"}),
        service.call("PUT", target, user, {"If-Match": "*"}),
        service.call("DELETE", target),
    ):
        assert_refused(reply, service, "refused-by-database", left)
    assert service.call("GET", target).json() == user
    prepare(databases, store, f"REVOKE UPDATE ON users FROM {role}")
    problem(service.call("PATCH", target, {"name": "Cleo"}), 503, "database-unavailable")
    prepare(databases, store, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_every_class_of_sqlstate_is_assigned() -> None:
    classes = {
        value for name, value in vars(psycopg2.errorcodes).items() if name.startswith("CLASS_")
    }
    assert len(classes) > 40
    assert {state for state in PROBLEMS if len(state) == 2} == classes
    assert all(re.fullmatch("[0-9A-Z]{2}|[0-9A-Z]{5}", state) for state in PROBLEMS)


def test_what_each_state_is_told_as() -> None:
    """The decisions, by the states that one meets."""
    told = {
        RefusedByDatabase: (
            "22001 22003 22012 22P02 23001 23502 23503 23505 23514 23P01 27000 38000 39000 44000"
            " P0001 P0002 P0003 P0004 2F000 20000 21000"
        ),
        DatabaseUnavailable: (
            "08000 08006 22021 25006 25P03 28000 28P01 3D000 40001 40P01 42501 53100 53200 53300"
            " 54000 55P03 55000 57014 57P01 57P03 58030 72000 XX000 XX001"
        ),
        SchemaNotMigrated: "3F000 42703 42P01 42883 42P10 42704 42804",
        DEFECT: "00000 01000 02000 24000 25P02 42601",
    }
    for kind, states in told.items():
        for state in states.split():
            assert (PROBLEMS.get(state) or PROBLEMS[state[:2]]) is kind, state


def test_a_trigger_that_raises_any_state_is_a_refusal_and_never_a_defect(
    databases: Databases, store: str, start: Start
) -> None:
    """Every state of the appendix that an error may have, and some that are an operator's own."""
    service = start(POSTGRES_URI=store, DB_STATEMENT_TIMEOUT=0.3)
    user = service.call("POST", "/users", new_user()).json()
    target = f"/users/{user['id']}"
    states = {
        value
        for name, value in vars(psycopg2.errorcodes).items()
        if isinstance(value, str) and re.fullmatch("[0-9A-Z]{5}", value)
    }
    assert len(states) > 200
    with databases.admin(store) as cursor:
        for state in sorted(states | {"QUUX1", "99999"}):
            if state == "00000":
                continue  # PL/pgSQL itself refuses to raise a success
            cursor.execute(raising(state, "BEFORE UPDATE"))
            reply = service.call("PATCH", target, {"name": f"Bob {state}"})
            if state in ("40001", "40P01"):  # which may be over in a moment, and is tried again
                problem(reply, 503, "database-unavailable")
            else:
                assert reply.status == 409, (state, reply)
                assert_refused(reply, service, "refused-by-database")
    assert service.call("GET", target).json() == user
    assert "refused by the database: QUUX1" in service.log
