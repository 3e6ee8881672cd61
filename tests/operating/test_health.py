"""Bounds on time are the contract's: DB_CONNECT_TIMEOUT plus half a second, whatever happens."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
import pytest

from metrics import Board
from services.health import Health
from tests.harness import (
    DEAD_DATABASE,
    Databases,
    Reply,
    ScriptedUpstream,
    Seen,
    Service,
    call,
    create_user,
    problem,
    wait_for,
)
from tests.harness.servers import unanswered_port

Start = Callable[..., Service]

CONNECT_TIMEOUT = 1
BOUND = CONNECT_TIMEOUT + 0.5


@contextlib.contextmanager
def mute_port() -> Iterator[tuple[int, socket.socket]]:
    """A port whose kernel takes connections that nobody ever answers, and its listener."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.setblocking(False)
        yield listener.getsockname()[1], listener


def waiting(listener: socket.socket) -> int:
    """How many connections have been made to a mute port."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            count += 1
    return count


@pytest.fixture(params=["refused", "never connected", "never answered"])
def dead_uri(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "refused":
        yield DEAD_DATABASE
        return
    with unanswered_port() if request.param == "never connected" else mute_port() as found:
        port = found if isinstance(found, int) else found[0]
        yield f"postgresql://ann@127.0.0.1:{port}/users"


def health(service: Service) -> dict[str, Any]:
    reply = service.call("GET", "/health")
    assert reply.status == 200, reply
    document: dict[str, Any] = reply.json()
    return document


def upstream_part(document: dict[str, Any]) -> str:
    """The status of the upstream with which nothing is under way; the rest is asserted."""
    part = document["upstream"]
    # As many as there are descriptors for, for each of which a client has another.
    limit = (min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 65536) - 256) // 2
    limit *= int(os.environ.get("TEST_WORKERS", 1))
    assert part == {"status": part["status"], "in_flight": 0, "streams": 0, "limit": limit}
    return str(part["status"])


def test_health_tells_all_parts(service: Service) -> None:
    assert service.call("GET", "/users").status == 200
    reply = service.call("GET", "/health")
    assert reply.status == 200
    assert reply.get("Content-Type") == "application/json"
    document = reply.json()
    assert set(document) == {"status", "version", "uptime_seconds", "database", "upstream"}
    assert document["status"] == "ok"
    assert isinstance(document["version"], str) and document["version"]
    assert document["uptime_seconds"] > 0
    assert 0 < document["database"].pop("latency_ms") < 1500
    assert document["database"] == {
        "status": "up",
        "pool": {"size": 8, "in_use": 0, "idle": 1},
        "pending_migrations": [],
    }
    assert upstream_part(document) == "unknown"


def test_uptime_goes_on(service: Service) -> None:
    first = health(service)["uptime_seconds"]
    wait_for(lambda: health(service)["uptime_seconds"] > first, what="a later uptime")


def test_live_and_ready_are_200_where_all_is_well(service: Service) -> None:
    for path in ("/health/live", "/health/ready"):
        reply = service.call("GET", path)
        assert reply.status == 200
        assert reply.get("Content-Type") == "application/json"
        assert reply.json()["status"] == "ok"


def test_a_dead_database_is_told_in_time(start: Start, dead_uri: str) -> None:
    service = start(POSTGRES_URI=dead_uri, DB_CONNECT_TIMEOUT=CONNECT_TIMEOUT)
    # The first of each finds it out, the later ones may know of it.
    for _ in range(2):
        began = time.monotonic()
        document = health(service)
        assert time.monotonic() - began < BOUND
        assert document["status"] == "degraded"
        assert document["database"]["status"] == "down"
        assert document["database"]["pool"] == {"size": 8, "in_use": 0, "idle": 0}
        assert upstream_part(document) == "unknown"

        began = time.monotonic()
        ready = service.call("GET", "/health/ready")
        assert time.monotonic() - began < BOUND
        assert ready.status == 503
        assert ready.get("Retry-After")
        assert service.call("GET", "/health/live").json()["status"] == "ok"


def test_a_database_that_answers_with_conflicts_is_told_in_time(
    databases: Databases, start: Start
) -> None:
    """As one that recovers does. It was asked again for as long as a statement may take."""
    uri = databases.create()
    with databases.admin(uri) as cursor:
        cursor.execute(
            "CREATE FUNCTION conflict() RETURNS text LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'quux' USING ERRCODE = '40001'; END $$;"
            "ALTER TABLE migratehistory RENAME TO elsewhere;"
            "CREATE VIEW migratehistory AS SELECT conflict() AS name"
        )
    service = start(POSTGRES_URI=uri, DB_CONNECT_TIMEOUT=CONNECT_TIMEOUT, DB_STATEMENT_TIMEOUT=30)
    began = time.monotonic()
    assert health(service)["database"]["status"] == "down"
    assert time.monotonic() - began < BOUND


def test_the_first_call_after_start_may_be_ready(start: Start, dead_uri: str) -> None:
    service = start(POSTGRES_URI=dead_uri, DB_CONNECT_TIMEOUT=CONNECT_TIMEOUT)
    began = time.monotonic()
    problem(service.call("GET", "/health/ready"), 503, "database-unavailable")
    assert time.monotonic() - began < BOUND


def test_a_host_that_a_database_is_on_is_not_told(start: Start) -> None:
    uri = "postgresql://ann:s3cret@127.0.0.1:1/people"
    service = start(POSTGRES_URI=uri, UPSTREAM_URL="http://127.0.0.1:2/inner")
    service.call("GET", "/elsewhere")
    for path in ("/health", "/health/ready", "/health/live"):
        reply = service.call("GET", path)
        text = reply.body + repr(reply.headers).encode()
        for word in (b"ann", b"s3cret", b"127.0.0.1", b"people", b"inner"):
            assert word not in text, reply


def test_a_database_without_the_schema_is_unmigrated(
    databases: Databases, start: Start, upstream: ScriptedUpstream
) -> None:
    service = start(POSTGRES_URI=databases.create(migrated=False), UPSTREAM_URL=upstream.url)
    document = health(service)
    assert document["status"] == "degraded"
    assert document["database"]["status"] == "unmigrated"
    assert document["database"]["pending_migrations"][0].startswith("001_")
    ready = service.call("GET", "/health/ready")
    problem(ready, 503, "schema-not-migrated")
    assert ready.get("Retry-After")
    assert service.call("GET", "/health/live").status == 200


def test_a_migration_that_was_taken_back_is_pending(
    databases: Databases, start: Start, upstream: ScriptedUpstream
) -> None:
    """Guards against a schema that is judged once, at the first look, and not again."""
    uri = databases.create()
    service = start(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url)
    assert health(service)["database"]["status"] == "up"
    with databases.admin(uri) as cursor:
        cursor.execute("DELETE FROM migratehistory")
    assert health(service)["database"]["pending_migrations"] != []
    assert health(service)["status"] == "degraded"


def test_a_database_that_comes_and_goes_is_measured_each_time(
    databases: Databases, start: Start, upstream: ScriptedUpstream
) -> None:
    uri = databases.create()
    service = start(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url)
    name = uri.partition("/test_")[2].partition("?")[0]
    assert health(service)["status"] == "ok"
    with databases.admin() as cursor:
        cursor.execute(f"ALTER DATABASE test_{name} ALLOW_CONNECTIONS false")
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
            (f"test_{name}",),
        )
        assert health(service)["database"]["status"] == "down"
        cursor.execute(f"ALTER DATABASE test_{name} ALLOW_CONNECTIONS true")
    wait_for(lambda: health(service)["database"]["status"] == "up", what="a database that is back")


def test_callers_at_once_share_one_probe(start: Start) -> None:
    with mute_port() as (port, listener):
        service = start(
            POSTGRES_URI=f"postgresql://ann@127.0.0.1:{port}/users",
            DB_CONNECT_TIMEOUT=CONNECT_TIMEOUT,
        )
        callers = 16
        barrier = threading.Barrier(callers)

        def probe(_: int) -> tuple[float, Reply]:
            barrier.wait(10)
            began = time.monotonic()
            reply = service.call("GET", "/health")
            return time.monotonic() - began, reply

        with ThreadPoolExecutor(callers) as pool:
            answers = list(pool.map(probe, range(callers)))
        assert waiting(listener) == 1
    for seconds, reply in answers:
        assert reply.json()["database"]["status"] == "down"
        assert seconds < BOUND


def test_the_pool_is_told_as_it_is(service: Service, database: str) -> None:
    path = f"/users/{create_user(service).json()['id']}"
    connection = psycopg2.connect(database)
    try:
        with connection.cursor() as cursor, ThreadPoolExecutor(1) as pool:
            cursor.execute("SELECT 1 FROM users WHERE id = %s FOR UPDATE", (path[7:],))
            held = pool.submit(service.call, "PATCH", path, {"name": "Bea"})
            try:
                wait_for(
                    lambda: (
                        health(service)["database"]["pool"]
                        == {
                            "size": 8,
                            "in_use": 1,
                            "idle": 1,
                        }
                    ),
                    seconds=4,
                    what="one connection in use and one idle",
                )
            finally:
                connection.rollback()
            assert held.result().status == 200
    finally:
        connection.close()
    assert health(service)["database"]["pool"] == {"size": 8, "in_use": 0, "idle": 2}


def test_the_size_of_the_pool_is_that_of_the_settings(database: str, start: Start) -> None:
    service = start(POSTGRES_URI=database, DB_POOL_SIZE=3)
    assert health(service)["database"]["pool"]["size"] == 3


def test_the_upstream_is_told_from_forwarded_requests_only(database: str, start: Start) -> None:
    upstream = ScriptedUpstream()
    try:
        service = start(POSTGRES_URI=database, UPSTREAM_URL=upstream.url)
        for _ in range(3):
            assert health(service)["upstream"]["status"] == "unknown"
            assert service.call("GET", "/health/ready").status == 200
        assert upstream.connections == 0

        assert service.call("GET", "/x").status == 200
        assert upstream_part(health(service)) == "up"
        assert (upstream.connections, len(upstream.seen)) == (1, 1)
    finally:
        upstream.close()
    # Nothing was forwarded since, so nothing is known to have changed.
    assert health(service)["upstream"]["status"] == "up"
    assert service.call("GET", "/x").status == 502
    assert upstream_part(health(service)) == "down"


def test_an_upstream_that_is_back_is_up_with_the_next_request(database: str, start: Start) -> None:
    upstream = ScriptedUpstream(b"nonsense\r\n\r\n")
    try:
        service = start(POSTGRES_URI=database, UPSTREAM_URL=upstream.url)
        problem(service.call("GET", "/x"), 502, "upstream-broken")
        assert health(service)["upstream"]["status"] == "down"
        upstream.script(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        assert service.call("GET", "/x").status == 404
        assert health(service)["upstream"]["status"] == "up"
    finally:
        upstream.close()


def test_requests_with_the_upstream_are_counted(
    service: Service, upstream: ScriptedUpstream
) -> None:
    release = threading.Event()

    def hold(sock: socket.socket, seen: Seen) -> None:
        release.wait(10)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    upstream.script(hold)
    with ThreadPoolExecutor(3) as pool:
        held = [pool.submit(call, service.port, "GET", f"/held/{n}") for n in range(3)]
        try:
            wait_for(lambda: health(service)["upstream"]["in_flight"] == 3, what="three in flight")
        finally:
            release.set()
        assert [future.result().status for future in held] == [200] * 3
    wait_for(lambda: health(service)["upstream"]["in_flight"] == 0, what="none in flight")


def test_a_table_that_is_gone_is_unmigrated_whatever_the_history_says(
    start: Start, databases: Databases
) -> None:
    uri = databases.create()
    service = start(POSTGRES_URI=uri)
    assert health(service)["database"]["status"] == "up"
    with databases.admin(uri) as cursor:
        cursor.execute("ALTER TABLE users RENAME TO kept")
    document = health(service)["database"]
    assert (document["status"], document["pending_migrations"]) == ("unmigrated", [])
    problem(service.call("GET", "/health/ready"), 503, "schema-not-migrated")


def test_a_column_that_is_gone_is_unmigrated_whatever_the_history_says(
    start: Start, databases: Databases
) -> None:
    """Every call of /users said so, and /health that all was well."""
    uri = databases.create()
    service = start(POSTGRES_URI=uri)
    with databases.admin(uri) as cursor:
        cursor.execute("ALTER TABLE users RENAME COLUMN metadata TO kept")
    problem(service.call("GET", "/users"), 503, "schema-not-migrated")
    assert health(service)["database"]["status"] == "unmigrated"
    problem(service.call("GET", "/health/ready"), 503, "schema-not-migrated")


def test_who_waited_for_a_thread_has_what_was_measured_meanwhile() -> None:
    """Otherwise a crowd of callers would measure one after the other, each for longer."""
    measured = []

    class Measuring(Health):
        def _measure(self) -> dict[str, Any]:
            measured.append(time.monotonic())
            return {"status": "up", "latency_ms": 1.0}

    board = Board(1)
    health = Measuring(version="1", migrations=[], started=0.0, board=board, pool_size=8)
    asked = time.monotonic()
    assert health.database(asked)["status"] == health.database(asked)["status"] == "up"
    assert len(measured) == 1
    health.database(time.monotonic())
    assert len(measured) == 2
