"""The service through PgBouncer in transaction mode, with PgBouncer's defaults otherwise.

Those defaults refuse the `options` startup parameter, and consecutive statements of one
connection may reach different servers' sessions.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg2
import pytest

from tests.harness import Service, free_port, pw_migrate, run_app, wait_for
from tests.harness.audit import Audit, is_unknown
from tests.harness.servers import Server

BINARY = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")

pytestmark = pytest.mark.skipif(
    BINARY is None, reason="pgbouncer is not installed (Debian: apt-get install pgbouncer)"
)

Start = Callable[..., Service]


class PgBouncer:
    """PgBouncer in front of a server, two server connections for all of its clients.

    `server_login_retry` is short only to keep the tests so: it is what PgBouncer waits, 15 s by
    default, before it knocks again at a server that was down.
    """

    def __init__(self, server: Server, *options: str) -> None:
        self.server = server
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="gatehouse-pgbouncer-"))
        users = self.folder / "users.txt"
        users.write_text('"postgres" "md5-is-not-asked-for"\n')
        (self.folder / "pgbouncer.ini").write_text(
            f"""
            [databases]
            * = host=127.0.0.1 port={server.port}
            [pgbouncer]
            listen_addr = 127.0.0.1
            listen_port = {self.port}
            unix_socket_dir =
            auth_type = trust
            auth_file = {users}
            pool_mode = transaction
            default_pool_size = 2
            server_login_retry = 1
            """.replace("            ", "")
            + "".join(option + "\n" for option in options)
        )
        if server.user is not None:
            # It refuses to run as root, as PostgreSQL does.
            shutil.chown(self.folder, server.user)
        self._log = (self.folder / "log").open("wb")
        self.start()

    def start(self) -> None:
        assert BINARY is not None
        self.process = subprocess.Popen(
            [BINARY, "pgbouncer.ini"],
            cwd=self.folder,
            user=self.server.user,
            stdout=self._log,
            stderr=self._log,
        )
        wait_for(self._answers, 10, "PgBouncer to answer")

    def _answers(self) -> bool:
        log = (self.folder / "log").read_text()
        assert self.process.poll() is None, log
        try:
            psycopg2.connect(self.uri("postgres"), connect_timeout=5).close()
        except psycopg2.OperationalError:
            return False
        return True

    def uri(self, database: str) -> str:
        return self.server.uri(database, port=self.port)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    def close(self) -> None:
        self.stop()
        self._log.close()
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def bouncer(server: Server) -> Iterator[PgBouncer]:
    bouncer = PgBouncer(server)
    yield bouncer
    bouncer.close()


@pytest.fixture(scope="module")
def store(server: Server) -> str:
    return server.create()


@pytest.fixture(scope="module")
def service(bouncer: PgBouncer, store: str) -> Iterator[Service]:
    with Service(POSTGRES_URI=bouncer.uri(store), DB_STATEMENT_TIMEOUT=1) as running:
        yield running


def test_the_config_refuses_startup_options(bouncer: PgBouncer, store: str) -> None:
    """Guards the tests below: with another config they would prove little."""
    with pytest.raises(psycopg2.OperationalError, match="unsupported startup parameter"):
        psycopg2.connect(bouncer.uri(store) + "?options=-cstatement_timeout%3D1000")


def life(service: Service, number: int) -> None:
    body = {"email": f"{number}-{uuid.uuid4().hex}@example.com", "name": f"Ann {number}"}
    reply = service.call("POST", "/users", body)
    assert reply.status == 201, reply
    user = reply.json()
    target = f"/users/{user['id']}"
    assert service.call("GET", target).json() == user
    assert service.call("GET", f"/users?email={body['email']}").json()["users"] == [user]
    reply = service.call("PATCH", target, {"name": f"Bob {number}"})
    assert reply.status == 200 and reply.json()["name"] == f"Bob {number}", reply
    assert service.call("POST", "/users", body).status == 409
    assert service.call("DELETE", target).status == 204
    assert service.call("GET", target).status == 404


def test_more_callers_than_server_connections_each_get_their_own_answer(service: Service) -> None:
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(lambda number: life(service, number), range(60)))
    health = service.call("GET", "/health").json()
    assert (health["status"], health["database"]["status"]) == ("ok", "up")


def test_statements_that_were_prepared_in_another_session_are_run_all_the_same(
    server: Server, store: str, start: Start
) -> None:
    """Where PgBouncer drops the `options`, nothing tells a service that it is there; what it
    prepares in one session is then missing from the next, or there already."""
    bouncer = PgBouncer(server, "ignore_startup_parameters = options")
    try:
        for _ in range(2):  # the second meets what the first has prepared
            service = start(POSTGRES_URI=bouncer.uri(store), DB_POOL_SIZE=4)
            with ThreadPoolExecutor(12) as threads:
                list(threads.map(lambda number: life(service, number), range(60)))  # noqa: B023
            service.stop()
    finally:
        bouncer.close()


def test_the_service_needs_no_more_than_statement_mode(
    server: Server, store: str, start: Start
) -> None:
    bouncer = PgBouncer(server, "pool_mode = statement")
    try:
        service = start(POSTGRES_URI=bouncer.uri(store))
        with ThreadPoolExecutor(12) as threads:
            list(threads.map(lambda number: life(service, number), range(60)))
        assert service.call("GET", "/health/ready").status == 200
    finally:
        bouncer.close()


def test_a_search_path_that_pgbouncer_drops_is_not_lost_without_a_word(
    server: Server, store: str, start: Start
) -> None:
    server.sql("CREATE SCHEMA IF NOT EXISTS app", database=store)
    before = server.sql("SELECT count(*) FROM users", database=store)
    bouncer = PgBouncer(server, "ignore_startup_parameters = options")
    try:
        given = {"POSTGRES_URI": bouncer.uri(store), "PGOPTIONS": "-c search_path=app"}
        done = run_app("check", **given)
        assert done.returncode == 5
        assert "drops the start-up options that are set (search_path)" in done.stdout
        service = start(**given)
        body = {"email": f"{uuid.uuid4().hex}@example.com", "name": "Ann"}
        assert service.call("POST", "/users", body).status == 503
        assert "search_path" in service.log
    finally:
        bouncer.close()
    assert server.sql("SELECT count(*) FROM users", database=store) == before


def test_migrators_take_turns_behind_pgbouncer_too(server: Server, bouncer: PgBouncer) -> None:
    """A session's lock was one that the next transaction did not have, or somebody else had."""
    name = server.create("template1")
    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(lambda _: pw_migrate("migrate", uri=bouncer.uri(name)), range(2)))
    assert [run.returncode for run in done] == [0, 0], [run.stderr for run in done]
    rows = server.sql("SELECT name, count(*) FROM migratehistory GROUP BY name", database=name)
    assert rows and {count for _, count in rows} == {1}
    assert run_app("check", POSTGRES_URI=bouncer.uri(name)).stdout.splitlines()[2] == "schema: ok"


def test_the_service_leaves_nothing_in_sessions_that_others_get(
    service: Service, server: Server, bouncer: PgBouncer, store: str
) -> None:
    assert service.call("GET", "/users").status == 200
    assert service.call("GET", "/health").status == 200
    connection = psycopg2.connect(bouncer.uri(store))
    try:
        for _ in range(4):
            with connection, connection.cursor() as cursor:
                cursor.execute("SHOW statement_timeout")
                assert cursor.fetchone() == ("0",)
                cursor.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
                assert cursor.fetchone() == (0,)
    finally:
        connection.close()


def test_a_locked_row_is_503_in_time_though_the_server_has_no_timeout(
    service: Service, server: Server, store: str
) -> None:
    body = {"email": f"{uuid.uuid4().hex}@example.com", "name": "before"}
    user = service.call("POST", "/users", body).json()
    target = f"/users/{user['id']}"
    with server.holding("SELECT FROM users WHERE id = %s FOR UPDATE", user["id"], database=store):
        began = time.monotonic()
        reply = service.call("PATCH", target, {"name": "after"})
        assert time.monotonic() - began < 1 + 0.5 + 1
        assert reply.status == 503, reply
    wait_for(lambda: server.waiting(store) == 0, 10, "the lock to be passed on")
    # Without a timeout of the server's own the statement may still be done, as the lock goes.
    assert is_unknown(reply) or service.call("GET", target).json() == user
    assert service.call("PATCH", target, {"name": "later"}).status == 200


def test_reads_are_503_in_time_while_the_server_behind_is_down(
    service: Service, server: Server
) -> None:
    assert service.call("GET", "/users").status == 200
    with server.down():
        began = time.monotonic()
        reply = service.call("GET", "/users")
        assert time.monotonic() - began < 2 * (1 + 0.5) + 2 + 1
        assert reply.status == 503, reply
        assert reply.json()["type"] == "urn:gatehouse:database-unavailable"
    wait_for(lambda: service.call("GET", "/users").status == 200, 20, "recovery")


def test_commands_do_not_wait_for_ever_behind_a_pooler_that_is_paused(
    server: Server, store: str
) -> None:
    """They waited for PgBouncer's `query_wait_timeout`, two minutes, which may also be off."""
    bouncer = PgBouncer(server, "query_wait_timeout = 0", "admin_users = postgres")
    try:
        uri = bouncer.uri(store)
        assert run_app("check", POSTGRES_URI=uri).stdout.splitlines()[1] == "database: ok"
        admin = psycopg2.connect(bouncer.uri("pgbouncer"))
        admin.autocommit = True
        with contextlib.closing(admin):
            admin.cursor().execute("PAUSE")
            done = run_app("check", POSTGRES_URI=uri, DB_STATEMENT_TIMEOUT=1)
            assert done.returncode == 5
            place = f"127.0.0.1:{bouncer.port}"
            assert f"database: unreachable: {place}: no answer within 1.5 seconds" in done.stdout
            listed = pw_migrate("list", uri=uri)
            told = "the database cannot be used: no answer within 10 seconds\n"
            assert (listed.returncode, listed.stderr) == (1, told)
            admin.cursor().execute("RESUME")
        assert run_app("check", POSTGRES_URI=uri).stdout.splitlines()[1] == "database: ok"
    finally:
        bouncer.close()


def test_no_write_is_lost_when_the_server_or_pgbouncer_restarts(
    server: Server, bouncer: PgBouncer, store: str, start: Start
) -> None:
    service = start(POSTGRES_URI=bouncer.uri(store), DB_CONNECT_TIMEOUT=1)
    with Audit(service.port) as audit:
        audit.more(50)
        bouncer.stop()
        bouncer.start()
        audit.more(50)
        server.crash()
        server.start()
        audit.more(50)
        server.terminate_backends(store)
        audit.more(50)
    assert audit.wrong == []
    assert audit.findings() == {"lost": [], "present": []}
