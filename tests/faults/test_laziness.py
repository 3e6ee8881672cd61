"""Promise 3: nothing connects before it is needed, and what is not there at start hurts nobody."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.harness import (
    DEAD_DATABASE,
    Databases,
    ScriptedUpstream,
    Service,
    create_user,
    problem,
    pw_migrate,
    wait_for,
)
from tests.harness.servers import unanswered_port

Start = Callable[..., Service]


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    """A listener whose kernel takes connections; nobody answers them."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener


def is_called(listener: socket.socket, within: float) -> bool:
    """Whether a connection was made, or is within some seconds."""
    return bool(select.select([listener], [], [], within)[0])


def uri_of(listener: socket.socket) -> str:
    return f"postgresql://ann@127.0.0.1:{listener.getsockname()[1]}/users?connect_timeout=1"


@pytest.fixture
def empty_uri(databases: Databases) -> str:
    """The URI of a database that is not there yet."""
    uri = databases.create(migrated=False)
    with databases.admin() as cursor:
        cursor.execute(f"DROP DATABASE {name_of(uri)}")
    return uri


def name_of(uri: str) -> str:
    return uri.rpartition("/test_")[0] and "test_" + uri.partition("/test_")[2].partition("?")[0]


def sessions(databases: Databases, uri: str) -> int:
    """Connections that are open to a database."""
    with databases.admin() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = %s AND backend_type = 'client backend'",
            (name_of(uri),),
        )
        return int(cursor.fetchone()[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_starting_connects_to_nothing(start: Start, workers: int) -> None:
    with listening() as database, listening() as upstream:
        service = start(
            POSTGRES_URI=uri_of(database),
            UPSTREAM_URL=f"http://127.0.0.1:{upstream.getsockname()[1]}",
            WORKERS=workers,
        )
        assert service.call("GET", "/health/live").status == 200
        # Nor a moment later, from a thread of its own.
        assert not is_called(database, within=1)
        assert not is_called(upstream, within=0)


def test_liveness_and_proxied_requests_open_no_database(
    start: Start, upstream: ScriptedUpstream
) -> None:
    with listening() as database:
        service = start(POSTGRES_URI=uri_of(database), UPSTREAM_URL=upstream.url)
        for _ in range(5):
            assert service.call("GET", "/health/live").status == 200
            assert service.call("GET", "/healthy").status == 200
            assert service.call("POST", "/users.json", {"name": "Ann"}).status == 200
        assert not is_called(database, within=0.5)


def test_what_needs_no_database_to_be_refused_opens_none(start: Start) -> None:
    with listening() as database:
        service = start(POSTGRES_URI=uri_of(database), USERS_TOKEN="open")
        assert service.call("GET", "/users").status == 401
        token = {"Authorization": "Bearer open"}
        calls: list[tuple[int, str, str, Any]] = [
            (204, "OPTIONS", "/users", None),
            (204, "OPTIONS", "/health", None),
            (405, "DELETE", "/users", None),
            (405, "POST", "/health", {}),
            (404, "GET", "/users/a/b", None),
            (404, "GET", "/health/nothing", None),
            (422, "GET", "/users?limit=0", None),
            (422, "POST", "/users", {}),
            (413, "POST", "/users", b"x" * 65537),
        ]
        for status, method, target, body in calls:
            assert service.call(method, target, body, token).status == status, target
        assert not is_called(database, within=0.5)


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/users"])
def test_the_first_call_that_needs_it_opens_the_database(
    databases: Databases, database: str, start: Start, path: str
) -> None:
    wait_for(lambda: sessions(databases, database) == 0)  # Those of other tests end some time.
    service = start(POSTGRES_URI=database)
    assert service.call("GET", "/health/live").status == 200
    assert sessions(databases, database) == 0
    assert service.call("GET", path).status == 200
    assert sessions(databases, database) == 1


def test_owned_paths_open_no_upstream_connection(database: str, start: Start) -> None:
    with listening() as upstream:
        service = start(
            POSTGRES_URI=database, UPSTREAM_URL=f"http://127.0.0.1:{upstream.getsockname()[1]}"
        )
        for path in ("/health", "/health/live", "/health/ready", "/users", "/users/x"):
            service.call("GET", path)
        create_user(service)
        assert not is_called(upstream, within=0.5)


@pytest.mark.parametrize("kind", ["refused", "unanswered"])
def test_a_dead_database_at_start_changes_nothing_for_the_upstream(
    start: Start, upstream: ScriptedUpstream, kind: str
) -> None:
    with unanswered_port() as port:
        uri = DEAD_DATABASE if kind == "refused" else f"postgresql://ann@127.0.0.1:{port}/users"
        service = start(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url, DB_CONNECT_TIMEOUT=1)
        for _ in range(2):
            assert service.call("GET", "/x").status == 200
            assert service.call("GET", "/health/live").status == 200
            reply = service.call("GET", "/users")
            problem(reply, 503, "database-unavailable")
            assert reply.get("Retry-After")


def test_a_dead_upstream_at_start_changes_nothing_for_users(database: str, start: Start) -> None:
    service = start(POSTGRES_URI=database, UPSTREAM_URL="http://127.0.0.1:1")
    for _ in range(2):
        user = create_user(service).json()
        problem(service.call("GET", "/x"), 502, "upstream-unreachable")
        assert service.call("GET", f"/users/{user['id']}").json() == user
        assert service.call("GET", "/health/ready").status == 200


def test_all_may_be_dead_at_start(start: Start) -> None:
    service = start()
    problem(service.call("GET", "/x"), 502, "upstream-unreachable")
    problem(service.call("GET", "/users"), 503, "database-unavailable")
    assert service.call("GET", "/health").status == 200
    assert service.call("GET", "/health/live").status == 200


def test_a_database_that_is_made_after_the_start_is_used(
    databases: Databases, empty_uri: str, start: Start
) -> None:
    service = start(POSTGRES_URI=empty_uri)
    problem(service.call("GET", "/users"), 503, "database-unavailable")
    with databases.admin() as cursor:
        cursor.execute(f"CREATE DATABASE {name_of(empty_uri)}")
    unmigrated = wait_for(
        lambda: (
            (reply := service.call("GET", "/users")).status == 503
            and reply.json()["type"] == "urn:gatehouse:schema-not-migrated"
            and reply
        ),
        what="a database without the schema",
    )
    problem(unmigrated, 503, "schema-not-migrated")
    assert pw_migrate("migrate", uri=empty_uri).returncode == 0
    wait_for(lambda: service.call("GET", "/users").status == 200, what="users")
    create_user(service)


def test_an_upstream_that_is_started_later_is_used(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    service = start(UPSTREAM_URL=f"http://127.0.0.1:{port}")
    problem(service.call("GET", "/x"), 502, "upstream-unreachable")
    with socket.create_server(("127.0.0.1", port)) as listener, service.client() as client:
        client.send(b"GET /x HTTP/1.1\r\nHost: gatehouse\r\n\r\n")
        assert is_called(listener, within=10)
        with listener.accept()[0] as sock:
            assert sock.recv(65536).startswith(b"GET /x HTTP/1.1\r\n")
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            assert client.reply().status == 200
