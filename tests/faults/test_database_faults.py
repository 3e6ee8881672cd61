"""Whatever the database does: what callers of /users and /health are told, and how soon.

Times that are asserted come from the contract and from the settings given here; a second is
added to each for a busy machine.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import quote

import psutil
import psycopg2
import pytest

from postgres import schema
from postgres.pool import VERIFY_SECONDS
from postgres.statements import SKEW_SECONDS
from tests.harness import (
    DEAD_DATABASE,
    ROOT,
    Reply,
    ScriptedUpstream,
    Service,
    pw_migrate,
    run_app,
    wait_for,
)
from tests.harness.audit import is_refusal, is_unknown
from tests.harness.servers import Relay, Server, Standby, unanswered_port

ROLE = "gatehouse_app"
PASSWORD = "s3cret/%@:häß"
# The smallest deadlines that still leave room for a busy machine.
QUICK = {"DB_CONNECT_TIMEOUT": 1, "DB_STATEMENT_TIMEOUT": 0.5, "DB_POOL_TIMEOUT": 0.5}
CONNECT, STATEMENT, SLACK = 1.0, 0.5 + 0.5, 1.0
# For tests in which no deadline may strike, however busy the machine is.
PATIENT = {"DB_CONNECT_TIMEOUT": 10, "DB_STATEMENT_TIMEOUT": 10, "DB_POOL_TIMEOUT": 10}
RECOVERY = 2.0

Start = Callable[..., Service]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that asks the role of the service, and no other, for its password."""
    with Server(max_connections=40) as server:
        server.sql(f"CREATE ROLE {ROLE} LOGIN PASSWORD %s", PASSWORD)
        rules = server.data / "pg_hba.conf"
        rules.write_text(f"host all {ROLE} 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
        server.sql("SELECT pg_reload_conf()")
        yield server


@pytest.fixture(scope="module")
def template(server: Server) -> str:
    name = server.create()
    server.sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {ROLE}", database=name)
    return name


@pytest.fixture
def store(server: Server, template: str) -> str:
    """The name of a migrated database of the test's own."""
    return server.create(template)


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    with Relay(server.port) as relay:
        yield relay


@pytest.fixture
def gatehouse(upstream: ScriptedUpstream) -> Iterator[Start]:
    """Start services on a database; afterwards no log may hold the password or a stack trace."""
    running: list[Service] = []

    def start(uri: str, **settings: Any) -> Service:
        service = Service(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url, **{**QUICK, **settings})
        running.append(service)
        return service

    yield start
    logs = [service.log for service in running]
    for service in running:
        service.__exit__()
    for log in logs:
        assert "Traceback" not in log, log
        assert PASSWORD not in log and quote(PASSWORD, safe="") not in log, log


def app_uri(server: Server, database: str, port: int | None = None) -> str:
    return server.uri(database, ROLE, PASSWORD, port)


def new_user(name: str = "Ann") -> dict[str, str]:
    return {"email": f"{uuid.uuid4().hex}@example.com", "name": name}


def create(service: Service) -> dict[str, Any]:
    reply = service.call("POST", "/users", new_user())
    assert reply.status == 201, reply
    return dict(reply.json())


def assert_told(reply: Reply, name: str = "database-unavailable") -> dict[str, Any]:
    """The contract's problem, which says nothing of hosts, roles or SQL; returns the document."""
    assert reply.status == 503, reply
    assert (reply.get("Content-Type") or "").split(";")[0] == "application/problem+json"
    document = dict(reply.json())
    assert document["type"] == f"urn:gatehouse:{name}"
    assert document["status"] == 503
    assert document["title"] and document["detail"] and document["request_id"]
    assert int(reply.get("Retry-After") or 0) >= 1
    text = reply.body.decode()
    for secret in (ROLE, "s3cret", "127.0.0.1", "test_", "psycopg", "Traceback", "SELECT"):
        assert secret not in text
    return document


def assert_refused(reply: Reply) -> None:
    assert_told(reply)
    assert is_refusal(reply), reply


def assert_unknown(reply: Reply) -> None:
    assert_told(reply)
    assert is_unknown(reply), reply


def timed(call: Callable[[], Reply]) -> tuple[float, Reply]:
    began = time.monotonic()
    reply = call()
    return time.monotonic() - began, reply


def at_once(count: int, call: Callable[[], Reply]) -> list[tuple[float, Reply]]:
    """Make the same call from `count` threads at one moment; each answer with its seconds."""
    barrier = threading.Barrier(count)

    def one(_: int) -> tuple[float, Reply]:
        barrier.wait()
        return timed(call)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


def warm(service: Service, connections: int = 4) -> None:
    """Have a few connections open and idle in the pool."""
    for _, reply in at_once(connections, lambda: service.call("GET", "/users")):
        assert reply.status == 200, reply


def assert_recovers(service: Service, since: float) -> None:
    wait_for(lambda: service.call("GET", "/users").status == 200, 10, "recovery")
    assert time.monotonic() - since < RECOVERY + SLACK


@contextlib.contextmanager
def proxied(service: Service) -> Iterator[list[float]]:
    """Proxied requests one after another while the block runs; none may fail or take long."""
    times: list[float] = []
    wrong: list[Reply] = []
    stopping = threading.Event()

    def watch() -> None:
        while not stopping.is_set():
            seconds, reply = timed(lambda: service.call("GET", "/elsewhere"))
            times.append(seconds)
            if reply.status != 200 or reply.body != b"ok":
                wrong.append(reply)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield times
    finally:
        stopping.set()
        thread.join()
    assert wrong == []
    # Half of the smallest database timeout there is: waiting for one of them would show.
    assert times and max(times) < 0.5, max(times)


def assert_degraded(service: Service) -> None:
    """/health says so with 200 and in time, /health/ready is 503, /health/live is not concerned."""
    seconds, reply = timed(lambda: service.call("GET", "/health"))
    assert seconds < CONNECT + 0.5 + SLACK
    assert reply.status == 200, reply
    assert reply.json()["status"] == "degraded"
    assert reply.json()["database"]["status"] == "down"
    assert service.call("GET", "/health/ready").status == 503
    assert service.call("GET", "/health/live").status == 200


def test_nothing_connects_before_the_first_call_that_needs_the_database(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store, relay.port), **PATIENT)
    assert service.call("GET", "/health/live").status == 200
    assert service.call("GET", "/elsewhere").status == 200
    assert relay.accepted == 0
    assert service.call("GET", "/users").status == 200
    assert relay.accepted == 1


def test_a_database_that_is_down_at_start_is_used_once_it_is_up(
    server: Server, store: str, gatehouse: Start
) -> None:
    with server.down():
        service = gatehouse(app_uri(server, store))
        with proxied(service):
            for method, target, body in (
                ("GET", "/users", None),
                ("GET", f"/users/{uuid.uuid4()}", None),
                ("POST", "/users", new_user()),
                ("PUT", f"/users/{uuid.uuid4()}", new_user()),
                ("PATCH", f"/users/{uuid.uuid4()}", {"name": "Bob"}),
                ("DELETE", f"/users/{uuid.uuid4()}", None),
            ):
                assert_refused(service.call(method, target, body))
            assert_degraded(service)
    assert_recovers(service, time.monotonic())
    create(service)
    assert service.call("GET", "/health").json()["status"] == "ok"
    assert service.call("GET", "/health/ready").status == 200


def test_a_database_that_starts_to_refuse_connections(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store, relay.port))
    warm(service)
    relay.refuse()
    with proxied(service):
        for seconds, reply in at_once(12, lambda: service.call("POST", "/users", new_user())):
            assert_refused(reply)
            assert seconds < CONNECT + SLACK
        assert_degraded(service)
    relay.heal()
    assert_recovers(service, time.monotonic())
    assert service.call("GET", "/users").json()["users"] == []


@contextlib.contextmanager
def unanswered(server: Server) -> Iterator[int]:
    with unanswered_port() as port:
        yield port


@contextlib.contextmanager
def swallowing(server: Server) -> Iterator[int]:
    with Relay(server.port) as relay:
        relay.blackhole()
        yield relay.port


@pytest.mark.parametrize("blackhole", [unanswered, swallowing])
def test_25_callers_at_a_database_that_never_answers_are_told_within_3_seconds(
    server: Server,
    store: str,
    gatehouse: Start,
    blackhole: Callable[[Server], contextlib.AbstractContextManager[int]],
) -> None:
    """With the default timeouts; peewee's own pool had them wait for one another in turn."""
    with blackhole(server) as port:
        service = gatehouse(
            app_uri(server, store, port),
            DB_CONNECT_TIMEOUT=2,
            DB_STATEMENT_TIMEOUT=5,
            DB_POOL_TIMEOUT=2,
        )
        with proxied(service):
            for seconds, reply in at_once(25, lambda: service.call("POST", "/users", new_user())):
                assert_refused(reply)
                assert seconds < 3
            # After a failed connect one caller probes, the others are told at once.
            answers = at_once(8, lambda: service.call("GET", "/users"))
            assert sum(seconds < 0.5 for seconds, _ in answers) >= 7


def test_a_path_that_dies_after_the_handshake(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store, relay.port))
    warm(service, 8)
    relay.blackhole()
    with proxied(service):
        for seconds, reply in at_once(25, lambda: service.call("GET", "/users")):
            assert_told(reply)
            assert seconds < STATEMENT + CONNECT + SLACK
        assert_degraded(service)
    relay.heal()
    assert_recovers(service, time.monotonic())


def test_a_server_that_answers_others_is_not_taken_for_silent(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """Where a machine has more to do than it can, one backend may wait for seconds, and a new one
    too, while the others answer: all callers were told that the database is away."""
    service = gatehouse(
        app_uri(server, store, relay.port),
        **{**PATIENT, "DB_CONNECT_TIMEOUT": 1, "DB_POOL_SIZE": 2},
    )
    warm(service, 2)
    wait_for(lambda: len(server.backends(store)) == 2, 10, "both connections")
    relay.starve()
    with ThreadPoolExecutor(2) as threads:

        def hanging() -> set[Future[Reply]]:  # both may have had the same connection
            both = [threads.submit(service.call, "GET", "/users") for _ in range(2)]
            other = wait(both, return_when=FIRST_COMPLETED).not_done
            return wait(other, 0.3).not_done

        [starved] = wait_for(hanging, 10, "one of two to hang")
        began = time.monotonic()
        while time.monotonic() - began < 2.5:  # half a second of silence, one of asking
            assert service.call("GET", "/users").status == 200
        assert not starved.done()
        relay.heal()
        assert starved.result().status == 200
    assert "stopped answering" not in service.log


@pytest.mark.parametrize("callers", [1, 12])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_connections_that_a_nat_has_forgotten_are_given_up_in_time(
    server: Server, store: str, relay: Relay, gatehouse: Start, method: str, callers: int
) -> None:
    """What was idle is dropped without a word, new connections are not: once that was 503."""
    defaults = {"DB_CONNECT_TIMEOUT": 2, "DB_STATEMENT_TIMEOUT": 5, "DB_POOL_TIMEOUT": 2}
    service = gatehouse(app_uri(server, store, relay.port), DB_POOL_SIZE=4, **defaults)

    def idle() -> int:
        return int(service.call("GET", "/health").json()["database"]["pool"]["idle"])

    wait_for(lambda: warm(service, 12) or idle() == 4, 10, "a full pool")
    relay.stall()
    # As long as makes a connection one that was idle; the relay has no clock to wait for.
    assert not threading.Event().wait(VERIFY_SECONDS)
    for seconds, reply in at_once(
        callers, lambda: service.call(method, "/users", new_user() if method == "POST" else None)
    ):
        assert reply.status == (201 if method == "POST" else 200), reply
        assert seconds < 2 + 0.5
    made = server.sql("SELECT count(*) FROM users", database=store)
    assert made == [(callers if method == "POST" else 0,)]
    relay.heal()
    assert server.sql("SELECT count(*) FROM users", database=store) == made


def test_a_pool_timeout_means_what_it_says(server: Server, store: str, gatehouse: Start) -> None:
    """0.1 was also the mark of those who wait for what another finds, and waited 2.25 seconds."""
    service = gatehouse(
        app_uri(server, store), DB_POOL_SIZE=1, **{**PATIENT, "DB_POOL_TIMEOUT": 0.1}
    )
    target = f"/users/{create(service)['id']}"
    with ThreadPoolExecutor(1) as threads:
        with server.holding("SELECT FROM users FOR UPDATE", database=store):
            held = threads.submit(service.call, "PATCH", target, {"name": "changed"})
            wait_for(lambda: server.waiting(store) == 1, 10, "the connection to be busy")
            for _ in range(3):
                seconds, reply = timed(lambda: service.call("GET", target))
                assert_refused(reply)
                assert 0.1 <= seconds < 0.1 + 0.5
        assert held.result().status == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("fault", ["path", "server"])
def test_25_callers_of_a_warm_pool_are_told_within_3_seconds(
    server: Server, store: str, relay: Relay, gatehouse: Start, fault: str, method: str
) -> None:
    """With the default timeouts: who is in the middle of a statement need not wait for its own."""
    service = gatehouse(
        app_uri(server, store, relay.port),
        DB_CONNECT_TIMEOUT=2,
        DB_STATEMENT_TIMEOUT=5,
        DB_POOL_TIMEOUT=2,
    )
    warm(service, 8)
    with contextlib.ExitStack() as stack:
        if fault == "path":
            relay.blackhole()
        else:
            stack.enter_context(server.frozen())
        body = new_user if method == "POST" else lambda: None
        for seconds, reply in at_once(25, lambda: service.call(method, "/users", body())):
            assert_told(reply)
            assert seconds < 3
    relay.heal()
    assert_recovers(service, time.monotonic())


def test_a_statement_that_takes_long_is_not_taken_for_a_server_that_is_lost(
    server: Server, store: str, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store), **{**PATIENT, "DB_CONNECT_TIMEOUT": 1})
    user = create(service)
    target = f"/users/{user['id']}"
    lock = "SELECT FROM users WHERE id = %s FOR UPDATE"
    with ThreadPoolExecutor(1) as threads:
        with server.holding(lock, user["id"], database=store):
            held = threads.submit(lambda: service.call("PATCH", target, {"name": "changed"}))
            with pytest.raises(TimeoutError):
                held.result(2.5)
        assert held.result().status == 200


def test_health_answers_many_callers_in_time_where_the_path_is_dead(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store, relay.port))
    warm(service)
    relay.blackhole()
    for seconds, reply in at_once(20, lambda: service.call("GET", "/health")):
        assert reply.status == 200
        assert reply.json()["database"]["status"] == "down"
        assert seconds < CONNECT + 0.5 + SLACK


def test_callers_of_a_warm_pool_notice_nothing_of_a_restart(
    server: Server, store: str, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store), **PATIENT)
    for how in (signal.SIGINT, signal.SIGQUIT):
        user = create(service)
        warm(service, 8)
        server.restart(how)
        for _, reply in at_once(16, lambda u=user: service.call("GET", f"/users/{u['id']}")):
            assert reply.status == 200 and reply.json() == user
        server.restart(how)
        for _, reply in at_once(16, lambda: service.call("POST", "/users", new_user())):
            assert reply.status == 201, reply


def test_callers_notice_nothing_of_terminated_backends(
    server: Server, store: str, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store), **PATIENT)
    user = create(service)
    made: list[list[dict[str, Any]]] = [[], []]
    wrong: list[Reply] = []
    stopping = threading.Event()

    def read() -> None:
        while not stopping.is_set():
            reply = service.call("GET", f"/users/{user['id']}")
            if reply.status != 200 or reply.json() != user:
                wrong.append(reply)

    def write(made: list[dict[str, Any]]) -> None:
        while not stopping.is_set():
            reply = service.call("POST", "/users", new_user())
            if reply.status == 201:
                made.append(reply.json())
            else:
                wrong.append(reply)

    def reached(goals: list[int]) -> bool:
        return all(len(each) >= goal for each, goal in zip(made, goals, strict=True))

    with ThreadPoolExecutor(4) as threads:
        for work in (read, read, lambda: write(made[0]), lambda: write(made[1])):
            threads.submit(work)
        try:
            for _ in range(15):
                # A writer meets one termination in one request: this one is over.
                goals = [len(each) + 5 for each in made]
                wait_for(lambda goals=goals: wrong or reached(goals), 30, "writes")
                assert wrong == []
                server.terminate_backends(store)
        finally:
            stopping.set()
    assert wrong == []
    rows = server.sql("SELECT id::text, email FROM users", database=store)
    assert sorted(rows) == sorted(
        (each["id"], each["email"]) for each in [user, *made[0], *made[1]]
    )


def losing_the_answer(relay: Relay, statement: bytes, call: Callable[[], Reply]) -> Reply:
    relay.lose(statement, answer=True)
    reply = call()
    assert relay.lost
    return reply


def test_writes_whose_answer_is_lost_are_looked_up(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """The server has done them: "taken", "not found" and "changed" would be false failures."""
    service = gatehouse(app_uri(server, store, relay.port), **PATIENT)
    warm(service)

    reply = losing_the_answer(relay, b"INSERT", lambda: service.call("POST", "/users", new_user()))
    assert reply.status == 201, reply
    posted = reply.json()
    assert service.call("GET", f"/users/{posted['id']}").json() == posted

    target = f"/users/{uuid.uuid4()}"
    reply = losing_the_answer(relay, b"INSERT", lambda: service.call("PUT", target, new_user()))
    assert reply.status == 201, reply
    put = reply.json()
    assert service.call("GET", target).json() == put

    change = {"name": "changed"}
    reply = losing_the_answer(relay, b"UPDATE", lambda: service.call("PATCH", target, change))
    assert reply.status == 200 and reply.json()["name"] == "changed" or is_unknown(reply), reply
    if reply.status == 200:
        assert service.call("GET", target).json() == reply.json()

    match = {"If-Match": service.call("GET", target).get("ETag") or ""}
    reply = losing_the_answer(
        relay, b"UPDATE", lambda: service.call("PATCH", target, {"name": "again"}, match)
    )
    assert reply.status == 200 and reply.json()["name"] == "again" or is_unknown(reply), reply

    reply = losing_the_answer(relay, b"DELETE", lambda: service.call("DELETE", target))
    assert reply.status == 204 or is_unknown(reply), reply
    assert service.call("GET", target).status == 404
    assert [user["id"] for user in service.call("GET", "/users").json()["users"]] == [posted["id"]]


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_a_write_whose_answer_is_lost_does_not_undo_a_later_one(
    server: Server, store: str, relay: Relay, gatehouse: Start, method: str
) -> None:
    """Run again, it would be done twice: before the other caller's change, and over it."""
    service = gatehouse(app_uri(server, store, relay.port), **PATIENT)
    user = create(service)
    target = f"/users/{user['id']}"
    later = (
        "INSERT INTO users (id, email, name) VALUES (%s, 'later@example.com', 'later')"
        " ON CONFLICT (id) DO UPDATE SET name = 'later', updated_at = clock_timestamp()"
    )
    statement = {"PUT": b"INSERT", "PATCH": b"UPDATE", "DELETE": b"DELETE"}[method]
    relay.lose(statement, answer=True, then=lambda: server.sql(later, user["id"], database=store))
    body = {"PUT": new_user(), "PATCH": {"name": "first"}, "DELETE": None}[method]
    reply = service.call(method, target, body)
    assert relay.lost
    assert reply.status in (200, 204) or is_unknown(reply), reply
    assert service.call("GET", target).json()["name"] == "later"


def test_a_lost_write_that_waits_for_a_connection_does_not_undo_a_later_one(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """The time of that wait was missing in what counts as a newer change: it was overwritten."""
    seconds = round(SKEW_SECONDS + 1)
    uri = f"{app_uri(server, store, relay.port)}?options=-c%20post_auth_delay%3D{seconds}"
    service = gatehouse(uri, **PATIENT)
    target = f"/users/{create(service)['id']}"
    later = "UPDATE users SET name = 'later', updated_at = clock_timestamp()"
    relay.lose(b"UPDATE", answer=True, then=lambda: server.sql(later, database=store))
    assert_unknown(service.call("PATCH", target, {"name": "first"}))
    assert relay.lost
    assert service.call("GET", target).json()["name"] == "later"


def test_a_create_whose_answer_is_lost_is_not_taken_for_another_s(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """Run again it met its own row, which somebody had changed meanwhile: "taken"."""
    service = gatehouse(app_uri(server, store, relay.port), **PATIENT)
    warm(service)
    later = "UPDATE users SET name = 'later'"
    relay.lose(b"INSERT", answer=True, then=lambda: server.sql(later, database=store))
    assert_unknown(service.call("POST", "/users", new_user()))
    assert relay.lost
    assert server.sql("SELECT name FROM users", database=store) == [("later",)]


def imported(service: Service, *rows: dict[str, str]) -> list[dict[str, Any]]:
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    reply = service.call("POST", "/users", body, {"Content-Type": "application/x-ndjson"})
    return [json.loads(line) for line in reply.body.splitlines()[:-1]]


def test_rows_of_which_nobody_knows_are_not_told_as_refused(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """They were created, and the server went away before that could be found out."""
    service = gatehouse(app_uri(server, store, relay.port))
    warm(service)
    relay.lose(b"INSERT", answer=True)
    relay.lose(b"WITH", answer=False, times=50)
    lines = imported(service, new_user(), new_user())
    assert [(line["status"], line["outcome"]) for line in lines] == [(503, "unknown")] * 2
    assert server.sql("SELECT count(*) FROM users", database=store) == [(2,)]


def test_a_row_that_was_created_is_told_as_created(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """A row with an id was found to be there already, and told as unchanged."""
    service = gatehouse(app_uri(server, store, relay.port), **PATIENT)
    old = create(service)
    server.sql(
        "UPDATE users SET created_at = '2020-01-01', updated_at = '2020-01-01'", database=store
    )
    there = {name: old[name] for name in ("id", "email", "name")}
    new = create(service)
    renamed = {"id": new["id"], "email": new["email"], "name": "another"}
    relay.lose(b"INSERT", answer=True)
    lines = imported(service, new_user(), {"id": str(uuid.uuid4())} | new_user(), there, renamed)
    assert relay.lost
    assert [line["status"] for line in lines] == [201, 201, 200, 200]


def test_a_row_that_was_created_is_not_in_its_own_way(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """A rule refused another row, so that all were written once more: "taken"."""
    service = gatehouse(app_uri(server, store, relay.port), **PATIENT)
    other = create(service)
    server.sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE 'not this one'; END $$;"
        " CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION refuse()",
        database=store,
    )
    relay.lose(b"INSERT", answer=True)
    mine, named = new_user(), {"id": str(uuid.uuid4())} | new_user()
    changed = {"id": other["id"], "email": other["email"], "name": "changed"}
    lines = imported(service, mine, named, changed)
    assert relay.lost
    assert [line["status"] for line in lines] == [201, 201, 409]
    assert lines[2]["type"] == "urn:gatehouse:refused-by-database"
    assert service.call("GET", f"/users/{lines[0]['id']}").json()["email"] == mine["email"]


def test_a_write_that_cannot_be_looked_up_is_unknown(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """It was done, and the server went away before that could be found out."""
    service = gatehouse(app_uri(server, store, relay.port))
    warm(service)
    relay.lose(b"INSERT", answer=True)
    relay.lose(b"SELECT", b"UPDATE", answer=False, times=50)
    assert_unknown(service.call("POST", "/users", new_user()))
    assert server.sql("SELECT count(*) FROM users", database=store) == [(1,)]


def test_statements_that_are_lost_on_their_way_are_sent_again(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store, relay.port), **PATIENT)
    warm(service)
    target = f"/users/{uuid.uuid4()}"
    for statement, status, method, path, body in (
        (b"SELECT", 200, "GET", "/users", None),
        (b"INSERT", 201, "POST", "/users", new_user()),
        (b"INSERT", 201, "PUT", target, new_user()),
        (b"UPDATE", 200, "PATCH", target, {"name": "changed"}),
        (b"DELETE", 204, "DELETE", target, None),
    ):
        relay.lose(statement, answer=False)
        reply = service.call(method, path, body)
        assert relay.lost
        assert reply.status == status or is_unknown(reply), (method, reply)
        if method == "GET":
            assert reply.status == 200


def test_an_update_that_is_lost_on_its_way_is_no_false_412(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """Looking only at whether the version changed, one could blame the caller."""
    service = gatehouse(app_uri(server, store, relay.port), **PATIENT)
    user = create(service)
    target = f"/users/{user['id']}"
    match = {"If-Match": service.call("GET", target).get("ETag") or ""}
    relay.lose(b"UPDATE", answer=False)
    reply = service.call("PATCH", target, {"name": "changed"}, match)
    assert relay.lost
    name = service.call("GET", target).json()["name"]
    assert (reply.status, name) == (200, "changed") or is_unknown(reply), reply


def test_a_write_that_lands_after_its_deadline_was_not_told_as_refused(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """Its connection alone hangs: the statement is held by the network and runs on healing."""
    service = gatehouse(app_uri(server, store, relay.port))
    warm(service, 1)
    held = server.backends(store)
    relay.stall()
    body = new_user()
    seconds, reply = timed(lambda: service.call("POST", "/users", body))
    assert seconds < 2 * STATEMENT + CONNECT + SLACK
    relay.heal()
    wait_for(lambda: not set(held) & set(server.backends(store)), 10, "the held statement")
    rows = server.sql("SELECT id::text FROM users", database=store)
    if reply.status == 201:
        assert rows == [(reply.json()["id"],)]
    elif is_unknown(reply):
        assert len(rows) <= 1
    else:
        assert_refused(reply)
        assert rows == []


def test_an_update_that_lands_late_does_not_undo_a_later_one(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """Where the first was answered 200 it is done: once more, later, would be twice."""
    service = gatehouse(app_uri(server, store, relay.port))
    target = f"/users/{create(service)['id']}"
    held = server.backends(store)
    relay.stall()
    first = service.call("PATCH", target, {"name": "first"})
    second = service.call("PATCH", target, {"name": "second"})
    assert second.status == 200, second
    relay.heal()
    wait_for(lambda: not set(held) & set(server.backends(store)), 10, "the held statement")
    found = service.call("GET", target).json()
    if first.status == 200:
        assert found == second.json()
    else:
        assert is_unknown(first) or found == second.json(), (first, found)


def test_a_create_that_lands_late_does_not_bring_a_deleted_user_back(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """Its repeat was answered 201: done a second time, it would undo the deletion."""
    service = gatehouse(app_uri(server, store, relay.port))
    warm(service, 1)
    held = server.backends(store)
    relay.stall()
    reply = service.call("POST", "/users", new_user())
    if reply.status == 201:
        assert service.call("DELETE", f"/users/{reply.json()['id']}").status == 204
    else:
        assert_unknown(reply)
    relay.heal()
    wait_for(lambda: not set(held) & set(server.backends(store)), 10, "the held statement")
    if reply.status == 201:
        assert service.call("GET", "/users").json()["users"] == []


def test_any_number_may_ask_how_a_frozen_database_is(
    server: Server, store: str, gatehouse: Start
) -> None:
    """More than there are threads for: the last had to wait for a measurement of their own, and
    whether the process serves was told after them all."""
    service = gatehouse(app_uri(server, store))
    warm(service)
    callers = 100
    with server.frozen(), ThreadPoolExecutor(callers) as threads:
        asking = [
            threads.submit(timed, lambda: service.call("GET", "/health")) for _ in range(callers)
        ]
        wait_for(lambda: len(psutil.Process(service.process.pid).net_connections()) > callers)
        assert service.call("GET", "/health/live").status == 200
        assert not any(one.done() for one in asking)
        for one in asking:
            seconds, reply = one.result()
            assert reply.json()["database"]["status"] == "down"
            assert seconds < CONNECT + 0.5 + SLACK


def test_health_is_what_is_and_not_what_was(
    server: Server, store: str, relay: Relay, gatehouse: Start
) -> None:
    """After a failure, callers of /users are told of it for a moment: /health must not be."""
    service = gatehouse(app_uri(server, store, relay.port))
    for _ in range(5):
        relay.refuse()
        assert service.call("GET", "/health").json()["database"]["status"] == "down"
        relay.heal()
        assert service.call("GET", "/health").json()["database"]["status"] == "up"


def test_a_frozen_server_is_survived_and_used_again_when_it_thaws(
    server: Server, store: str, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store))
    body = new_user()
    warm(service, 8)
    with server.frozen(), proxied(service):
        seconds, reply = timed(lambda: service.call("POST", "/users", body))
        # It was sent and the kernel took it: it may well be done when the server goes on.
        assert_unknown(reply)
        assert seconds < STATEMENT + CONNECT + SLACK
        for seconds, reply in at_once(12, lambda: service.call("GET", "/users")):
            assert_told(reply)
            assert seconds < STATEMENT + CONNECT + SLACK
        assert_degraded(service)
    assert_recovers(service, time.monotonic())
    emails = [user["email"] for user in service.call("GET", "/users").json()["users"]]
    assert emails in ([], [body["email"]])


def test_a_row_that_is_locked_is_503_within_the_statement_timeout(
    server: Server, store: str, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store))
    user = create(service)
    target = f"/users/{user['id']}"
    with server.holding("SELECT FROM users WHERE id = %s FOR UPDATE", user["id"], database=store):
        seconds, reply = timed(lambda: service.call("PATCH", target, {"name": "late"}))
        document = assert_told(reply)
        assert seconds < STATEMENT + SLACK
        assert service.call("GET", target).json() == user
        # The server does not go on with what nobody waits for.
        wait_for(lambda: server.waiting(store) == 0, 5, "the abandoned statement to end")
    assert service.call("GET", target).json() == user or document["outcome"] == "unknown"
    assert service.call("PATCH", target, {"name": "later"}).status == 200


def test_reads_behind_a_table_lock_are_503_within_the_statement_timeout(
    server: Server, store: str, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store))
    warm(service)
    with server.holding("LOCK TABLE users", database=store), proxied(service):
        for seconds, reply in at_once(12, lambda: service.call("GET", "/users")):
            assert_told(reply)
            assert seconds < 2 * STATEMENT + SLACK
    assert_recovers(service, time.monotonic())


def test_an_exhausted_pool_is_a_bounded_wait(server: Server, store: str, gatehouse: Start) -> None:
    service = gatehouse(
        app_uri(server, store), DB_POOL_SIZE=2, **{**PATIENT, "DB_POOL_TIMEOUT": 0.3}
    )
    target = f"/users/{create(service)['id']}"
    with ThreadPoolExecutor(2) as threads:
        with server.holding("SELECT FROM users FOR UPDATE", database=store):
            held = [
                threads.submit(service.call, "PATCH", target, {"name": f"name {number}"})
                for number in range(2)
            ]
            wait_for(lambda: server.waiting(store) == 2, 10, "both connections to be busy")
            with proxied(service):
                for seconds, reply in at_once(8, lambda: service.call("GET", target)):
                    assert_refused(reply)
                    assert 0.2 < seconds < 0.3 + SLACK
            backends = server.backends(store)
            seconds, reply = timed(lambda: service.call("GET", "/health"))
            assert reply.status == 200
            measured = reply.json()["database"]
            assert (measured["pool"]["size"], measured["pool"]["in_use"]) == (2, 2)
            # Nobody else waits for it, so it is measured on a connection of its own…
            assert measured["status"] == "up" and measured["latency_ms"] is not None
            assert service.call("GET", "/health/ready").status == 200
            # …which is not kept.
            wait_for(lambda: server.backends(store) == backends, 10, "it to be closed")
        assert [future.result().status for future in held] == [200, 200]
    assert service.call("GET", target).status == 200


def test_a_busy_pool_never_has_more_connections_than_its_size(
    server: Server, store: str, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store), DB_POOL_SIZE=3, **PATIENT)
    most = 0
    stopping = threading.Event()

    def count() -> None:
        nonlocal most
        with server.admin() as cursor:
            while not stopping.is_set():
                cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = %s", (store,))
                most = max(most, cursor.fetchone()[0])

    thread = threading.Thread(target=count)
    thread.start()
    for _ in range(5):
        for _, reply in at_once(20, lambda: service.call("POST", "/users", new_user())):
            assert reply.status == 201, reply
    stopping.set()
    thread.join()
    assert 1 <= most <= 3


@contextlib.contextmanager
def filled(server: Server) -> Iterator[None]:
    """Take every connection that the server has left, while the block runs."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(psycopg2.OperationalError):
            while True:
                stack.callback(psycopg2.connect(server.uri()).close)
        yield


def test_a_server_that_is_full_is_503_until_it_has_room(
    server: Server, store: str, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store))
    with filled(server), proxied(service):
        assert_refused(service.call("POST", "/users", new_user()))
        assert_degraded(service)
    assert_recovers(service, time.monotonic())


def test_a_warm_service_lives_on_with_what_it_has_at_a_full_server(
    server: Server, store: str, gatehouse: Start
) -> None:
    service = gatehouse(app_uri(server, store), **PATIENT)
    warm(service, 1)
    with filled(server):
        assert service.call("GET", "/users").status == 200
        assert service.call("GET", "/health").json()["database"]["status"] == "up"


def test_a_wrong_password_is_logged_once_with_its_cause_and_told_to_nobody(
    server: Server, store: str, gatehouse: Start
) -> None:
    wrong = "wr0ng-s3cret"
    service = gatehouse(server.uri(store, ROLE, wrong))
    assert_refused(service.call("POST", "/users", new_user()))
    lines = [line for line in service.log.splitlines() if "password authentication" in line]
    assert len(lines) == 1, service.log
    assert_degraded(service)
    assert wrong not in service.log
    server.sql(f"ALTER ROLE {ROLE} PASSWORD %s", wrong)
    try:
        assert_recovers(service, time.monotonic())
    finally:
        server.sql(f"ALTER ROLE {ROLE} PASSWORD %s", PASSWORD)


def test_a_missing_permission_is_503_until_it_is_granted(
    server: Server, store: str, gatehouse: Start
) -> None:
    server.sql(f"REVOKE INSERT ON users FROM {ROLE}", database=store)
    service = gatehouse(app_uri(server, store), **PATIENT)
    assert service.call("GET", "/users").status == 200
    assert_refused(service.call("POST", "/users", new_user()))
    assert "permission denied" in service.log
    assert service.call("GET", "/health").json()["database"]["status"] == "down"
    assert service.call("GET", "/health/ready").status == 503
    assert "the role may not" in service.log
    server.sql(f"GRANT INSERT ON users TO {ROLE}", database=store)
    create(service)
    assert service.call("GET", "/health/ready").status == 200


def test_a_history_that_may_not_be_read_is_no_database_that_is_away(
    server: Server, store: str, gatehouse: Start
) -> None:
    server.sql(f"REVOKE SELECT ON migratehistory FROM {ROLE}", database=store)
    done = run_app("check", POSTGRES_URI=app_uri(server, store))
    assert done.returncode == 4
    assert done.stdout.splitlines()[1:3] == [
        "database: ok",
        "schema: cannot be read: permission denied for table migratehistory: GRANT that to the role"
        " (docs/operating.md, Permissions)",
    ]


def test_a_missing_column_is_a_schema_that_is_not_migrated(
    server: Server, store: str, gatehouse: Start
) -> None:
    server.sql("ALTER TABLE users RENAME COLUMN name TO full_name", database=store)
    service = gatehouse(app_uri(server, store), **PATIENT)
    assert_told(service.call("GET", "/users"), "schema-not-migrated")
    assert_told(service.call("POST", "/users", new_user()), "schema-not-migrated")
    server.sql("ALTER TABLE users RENAME COLUMN full_name TO name", database=store)
    create(service)


def test_a_database_that_is_migrated_while_the_service_runs(
    server: Server, gatehouse: Start
) -> None:
    store = server.create("template1")
    service = gatehouse(server.uri(store), **PATIENT)
    with proxied(service):
        assert_told(service.call("GET", "/users"), "schema-not-migrated")
        assert_told(service.call("POST", "/users", new_user()), "schema-not-migrated")
    reply = service.call("GET", "/health")
    assert reply.status == 200 and reply.json()["status"] == "degraded"
    assert reply.json()["database"]["status"] == "unmigrated"
    assert reply.json()["database"]["pending_migrations"]
    assert service.call("GET", "/health/ready").status == 503
    done = pw_migrate("migrate", uri=server.uri(store))
    assert done.returncode == 0, done.stderr
    create(service)
    reply = service.call("GET", "/health")
    assert reply.json()["status"] == "ok"
    assert reply.json()["database"]["status"] == "up"
    assert reply.json()["database"]["pending_migrations"] == []
    assert service.call("GET", "/health/ready").status == 200


def test_a_database_that_does_not_exist_is_503(server: Server, gatehouse: Start) -> None:
    service = gatehouse(app_uri(server, "test_nowhere"))
    assert_refused(service.call("POST", "/users", new_user()))
    assert_degraded(service)


def test_a_read_only_standby_answers_reads_and_takes_writes_once_promoted(
    gatehouse: Start,
) -> None:
    with Server() as primary:
        store = primary.create()
        standby = Standby(primary)
        try:
            standby.start()
            service = gatehouse(standby.uri(store), **PATIENT)
            warm(service)
            assert_refused(service.call("POST", "/users", new_user()))
            assert service.call("GET", "/users").json()["users"] == []
            promoted = standby.promote()
            wait_for(lambda: service.call("POST", "/users", new_user()).status == 201, 10)
            assert time.monotonic() - promoted < RECOVERY + SLACK
        finally:
            standby.close()


@contextlib.contextmanager
def dead(server: Server) -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("first", [dead, unanswered, swallowing])
def test_the_second_host_of_a_uri_is_used_where_the_first_is_lost(
    server: Server,
    store: str,
    gatehouse: Start,
    first: Callable[[Server], contextlib.AbstractContextManager[int]],
) -> None:
    with first(server) as port:
        uri = app_uri(server, store, port).replace(f":{port}/", f":{port},127.0.0.1:{server.port}/")
        service = gatehouse(uri + "?target_session_attrs=read-write", DB_CONNECT_TIMEOUT=2)
        for seconds, reply in at_once(8, lambda: service.call("POST", "/users", new_user())):
            assert reply.status == 201, reply
            assert seconds < 2 + SLACK
        with proxied(service):
            assert service.call("GET", "/health").json()["database"]["status"] == "up"


def test_the_proxy_needs_no_database_at_all(gatehouse: Start, upstream: ScriptedUpstream) -> None:
    """Under a load of /users calls that fail, bodies and headers pass as ever."""
    service = gatehouse(DEAD_DATABASE)
    upstream.seen.clear()
    body = bytes(range(256)) * 64
    with ThreadPoolExecutor(12) as threads:
        failing = [threads.submit(service.call, "POST", "/users", new_user()) for _ in range(60)]
        for _ in range(20):
            reply = service.call("POST", "/else?a=%2F", body, {"X-Kept": "as it is"})
            assert reply.status == 200 and reply.body == b"ok"
        for future in failing:
            assert_refused(future.result())
    assert [seen.body for seen in upstream.seen] == [body] * 20
    assert {seen.target for seen in upstream.seen} == {b"/else?a=%2F"}
    assert {seen.get("X-Kept") for seen in upstream.seen} == {"as it is"}


def test_check_does_not_wait_for_ever_for_a_server_that_falls_silent_while_it_compares(
    server: Server, store: str, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "COMPARE_SECONDS", 1)
    relay.lose(b"SET", answer=True, then=relay.stall)
    uri = server.uri(store, port=relay.port)
    code, database, _ = schema.verdict(
        uri, ROOT / "migrations", connect_timeout=30, statement_timeout=60
    )
    assert relay.lost
    assert (code, database) == (
        5,
        f"unreachable: 127.0.0.1:{relay.port}: no answer within 1 seconds",
    )
