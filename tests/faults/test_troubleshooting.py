"""docs/troubleshooting.md: each line that it explains is provoked, and really written.

One function for each row of its tables of lines, which are looked up by the row's first words. What
/health says is provoked in the same way, and each problem by tests/house/test_errors.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
import trustme

from postgres.migrating import LOCK
from tests.faults.test_database_faults import filled
from tests.harness import (
    DEAD_DATABASE,
    ROOT,
    Reply,
    ScriptedUpstream,
    Seen,
    Service,
    checkout,
    copied,
    free_port,
    ok,
    pw_migrate,
    run_app,
    unprivileged,
    wait_for,
)
from tests.harness.servers import Pooler, Relay, Server, unanswered_port
from tests.users.test_problems import kinds

ROLE = "gatehouse_app"
MIGRATIONS = len([*(ROOT / "migrations").glob("[0-9]*.py")])
QUICK = {"DB_CONNECT_TIMEOUT": 1, "DB_STATEMENT_TIMEOUT": 1, "DB_POOL_TIMEOUT": 0.5}
# No deadline may strike here, however busy the machine is.
PATIENT = {"DB_CONNECT_TIMEOUT": 10, "DB_STATEMENT_TIMEOUT": 10, "DB_POOL_TIMEOUT": 10}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(max_connections=20, unix_socket_directories=".") as server:
        rules = server.data / "pg_hba.conf"
        server.sql(f"CREATE ROLE {ROLE} LOGIN PASSWORD 'right'")
        rules.write_text(f"host all {ROLE} 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
        server.sql("SELECT pg_reload_conf()")
        yield server


class House:
    """What a row needs: a server, a migrated database on it, an upstream, and services that end."""

    def __init__(
        self,
        server: Server,
        template: str,
        upstream: ScriptedUpstream,
        stack: contextlib.ExitStack,
    ) -> None:
        self.server, self.upstream, self.stack = server, upstream, stack
        self.database = server.create(template)

    def sql(self, statement: str) -> None:
        self.server.sql(statement, database=self.database)

    def start(self, uri: str | None = None, **settings: Any) -> Service:
        chosen = {**QUICK, "UPSTREAM_URL": self.upstream.url, **settings}
        service = Service(POSTGRES_URI=uri or self.server.uri(self.database), **chosen)
        return self.stack.enter_context(service)

    def restricted(self) -> str:
        """A URI with a role that may not insert."""
        self.sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {ROLE}")
        return self.server.uri(self.database, ROLE, "right")


@pytest.fixture(scope="module")
def template(server: Server) -> str:
    return server.create()


@pytest.fixture
def house(server: Server, template: str, upstream: ScriptedUpstream) -> Iterator[House]:
    with contextlib.ExitStack() as stack:
        yield House(server, template, upstream, stack)


def create(service: Service, name: str = "Ann") -> Reply:
    body = {"email": f"{uuid.uuid4().hex}@example.com", "name": name}
    return service.call("POST", "/users", body)


def user(service: Service) -> str:
    reply = create(service)
    assert reply.status == 201, reply
    return f"/users/{reply.json()['id']}"


def refused_and_back(house: House) -> Service:
    with Relay(house.server.port) as relay:
        service = house.start(house.server.uri(house.database, port=relay.port))
        user(service)
        relay.refuse()
        wait_for(lambda: service.call("GET", "/users").status == 503, what="no database")
        relay.heal()
        wait_for(lambda: service.call("GET", "/users").status == 200, what="the database")
        wait_for(lambda: "the database is back" in service.log, what="the line")
    return service


def frozen(house: House) -> Service:
    service = house.start(DB_STATEMENT_TIMEOUT=8)
    user(service)
    with house.server.frozen():
        assert service.call("GET", "/users").status == 503
    return service


def frozen_for_long(house: House) -> Service:
    service = house.start()
    user(service)

    def ask(_: int) -> int:
        return service.call("GET", "/users").status

    with house.server.frozen(), ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            assert set(threads.map(ask, range(8))) == {503}
            if "made in time" in service.log:
                break
    return service


def cut_in_a_statement(house: House) -> Service:
    with Relay(house.server.port) as relay:
        service = house.start(house.server.uri(house.database, port=relay.port), **PATIENT)
        target = user(service)
        with (
            ThreadPoolExecutor(1) as threads,
            house.server.holding("SELECT FROM users FOR UPDATE", database=house.database),
        ):
            threads.submit(service.call, "PATCH", target, {"name": "Bea"})
            wait_for(lambda: house.server.waiting(house.database) == 1, what="a statement")
            relay.refuse()
            wait_for(lambda: "connection lost" in service.log, what="the line")
    return service


def busy_pool(house: House) -> Service:
    service = house.start(DB_POOL_SIZE=1, **{**PATIENT, "DB_POOL_TIMEOUT": 0.3})
    target = user(service)
    with (
        ThreadPoolExecutor(1) as threads,
        house.server.holding("SELECT FROM users FOR UPDATE", database=house.database),
    ):
        threads.submit(service.call, "PATCH", target, {"name": "Bea"})
        wait_for(lambda: house.server.waiting(house.database) == 1, what="a statement")
        assert service.call("GET", target).status == 503
    return service


def forbidden_name(house: House) -> Service:
    house.sql("ALTER TABLE users ADD CONSTRAINT no_bob CHECK (name <> 'Bob')")
    service = house.start()
    assert create(service, "Bob").status == 409
    return service


def role_without_permission(house: House) -> Service:
    service = house.start(house.restricted())
    assert service.call("GET", "/health").json()["database"]["status"] == "down"
    assert create(service).status == 503
    return service


def test_a_role_without_permission_is_told_so_where_a_migration_is_pending_too(
    house: House,
) -> None:
    """The metric said that the role may use the table."""
    house.sql("DELETE FROM migratehistory WHERE id = (SELECT max(id) FROM migratehistory)")
    service = house.start(house.restricted())
    database = service.call("GET", "/health").json()["database"]
    assert database["status"] == "down" and len(database["pending_migrations"]) == 1
    assert b"gatehouse_database_up 0" in service.call("GET", "/health/metrics").body


def full_upstream(house: House) -> Service:
    def silent(sock: socket.socket, seen: Seen) -> None:
        sock.recv(1)

    house.upstream.script(silent)
    service = house.start(UPSTREAM_MAX_IN_FLIGHT=1)
    with service.client() as client:
        client.send(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_for(lambda: house.upstream.seen, what="the request")
        assert service.call("GET", "/b").status == 503
        told = health(service)["upstream"]
        assert told["in_flight"] == told["limit"] == 1
    return service


def body_that_ends_too_soon(house: House) -> Service:
    def half(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        return False

    house.upstream.script(half)
    service = house.start()
    with service.client() as client:
        client.send(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_for(lambda: " cut: " in service.log, what="the line")
    return service


def killed_worker(house: House) -> Service:
    service = house.start(WORKERS=2)
    wait_for(lambda: len(workers(service)) == 2, what="two workers")
    workers(service)[0].send_signal(signal.SIGKILL)
    wait_for(lambda: "ended (signal 9)" in service.log, what="the line")
    return service


def workers(service: Service) -> list[psutil.Process]:
    return psutil.Process(service.process.pid).children()


def slow_log_reader(house: House) -> None:
    """tests/operating/test_logs.py does it: a pipe that nobody reads, and a mebibyte of lines."""


def nobody_listens(house: House) -> Service:
    service = house.start(DEAD_DATABASE)
    assert service.call("GET", "/users").status == 503
    return service


def silent_network(house: House) -> Service:
    port = house.stack.enter_context(unanswered_port())
    service = house.start(house.server.uri(house.database, port=port))
    assert service.call("GET", "/users").status == 503
    return service


def wrong_password(house: House) -> Service:
    service = house.start(house.server.uri(house.database, ROLE, "wrong"))
    assert service.call("GET", "/users").status == 503
    return service


def full_server(house: House) -> Service:
    service = house.start()
    with filled(house.server):
        assert service.call("GET", "/users").status == 503
    return service


def server_that_stops(house: House) -> Service:
    service = house.start()
    server = house.server
    assert server.process is not None
    with server.admin():
        server.process.send_signal(signal.SIGTERM)  # It waits until all sessions have ended.
        wait_for(lambda: service.call("GET", "/users").status == 503, what="the stop")
    server.process.wait(30)
    server.process = None
    server.start()
    return service


def no_primary(house: House) -> Service:
    house.sql(f"ALTER DATABASE {house.database} SET default_transaction_read_only = on")
    uri = house.server.uri(house.database)
    service = house.start(f"{uri}?target_session_attrs=read-write")
    assert service.call("GET", "/users").status == 503
    return service


def lock_that_is_held(house: House) -> Service:
    service = house.start()
    target = user(service)
    with house.server.holding("SELECT FROM users FOR UPDATE", database=house.database):
        assert service.call("PATCH", target, {"name": "Bea"}).status == 503
    return service


def no_table(house: House) -> Service:
    house.sql("DROP TABLE users CASCADE")
    service = house.start()
    assert service.call("GET", "/users").json()["type"] == "urn:gatehouse:schema-not-migrated"
    return service


def read_only(house: House) -> Service:
    house.sql(f"ALTER DATABASE {house.database} SET default_transaction_read_only = on")
    service = house.start()
    assert create(service).status == 503
    assert service.call("GET", "/users").status == 200
    return service


def conflict(house: House) -> Service:
    level = "default_transaction_isolation = 'repeatable read'"
    house.sql(f"ALTER DATABASE {house.database} SET {level}")
    service = house.start(**PATIENT)
    target = user(service)
    with (
        contextlib.closing(psycopg2.connect(house.server.uri(house.database))) as other,
        other.cursor() as cursor,
        ThreadPoolExecutor(1) as threads,
    ):
        cursor.execute("UPDATE users SET metadata = '{}'")
        changed = threads.submit(service.call, "PATCH", target, {"name": "Bea"})
        wait_for(lambda: house.server.waiting(house.database) == 1, what="a statement")
        other.commit()
        assert changed.result().status == 200
    return service


def compiled() -> Path:
    """The folder of what is compiled."""
    if "gatehouse_compiled" not in sys.modules:
        pytest.skip("nothing is compiled: tests/house/test_compiled.py says whether that is right")
    return Path(str(sys.modules["gatehouse_compiled"].__file__)).parent


def changed_source(house: House) -> Service:
    compiled()
    folder = copied(Path(house.stack.enter_context(tempfile.TemporaryDirectory())))
    with (folder / "wire" / "ids.py").open("a") as source:
        source.write("# Changed.\n")
    return house.start(folder=folder)


def spoilt(house: House, spoil: Callable[[Path], None]) -> Service:
    """With a copy of what is compiled, after `spoil` was called with its folder."""
    folder = Path(house.stack.enter_context(tempfile.TemporaryDirectory()))
    spoil(Path(shutil.copytree(compiled(), folder / compiled().name)))
    service = house.start(PYTHONPATH=folder)
    wait_for(lambda: "(from source)" in service.log, what="the line")
    return service


def damaged_library(house: House) -> Service:
    def spoil(folder: Path) -> None:
        [library] = folder.glob("gatehouse__mypyc*")
        library.write_bytes(b"no library")

    return spoilt(house, spoil)


def missing_finder(house: House) -> Service:
    return spoilt(house, lambda folder: (folder / "__init__.py").write_text(""))


PROVOKED: dict[str, Callable[[House], Service | None]] = {
    "the database is back": refused_and_back,
    "the server has stopped answering": frozen,
    "no answer in time: …": frozen,
    "connection lost: …": cut_in_a_statement,
    "no connection was free in time": busy_pool,
    "no connection was made in time": frozen_for_long,
    "refused by the database: …, constraint …": forbidden_name,
    "the role may not do all of SELECT, INSERT, UPDATE and DELETE in users": role_without_permission,
    "… with the upstream, which is the limit: others are told 503": full_upstream,
    "… cut: …": body_that_ends_too_soon,
    "worker … ended (…)": killed_worker,
    "… lines of the … were dropped, for nobody took them: …": slow_log_reader,
    "… was changed after the last make install: …": changed_source,
    "what was compiled cannot be loaded: …": damaged_library,
    "Error processing line 1 of …/gatehouse_compiled.pth": missing_finder,
    "Connection refused": nobody_listens,
    "timeout expired": silent_network,
    "the database system is shutting down": server_that_stops,
    "session is read-only": no_primary,
    "password authentication failed": wrong_password,
    "too many clients": full_server,
    "57014": lock_that_is_held,
    "42501": role_without_permission,
    "42P01": no_table,
    "25006": read_only,
    "40001": conflict,
    "23514": forbidden_name,
}


def first_cells(*headings: str) -> list[str]:
    """What the rows below these headings begin with."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    found = []
    for heading in headings:
        section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        found += re.findall(r"(?m)^\| `([^`]+)`", section)
    return found


def assert_each_is_provoked(rows: list[str], known: Iterable[str], name: str) -> None:
    """The page has the rows that `name` in this file has, in the same order."""
    differing = sorted(set(rows) ^ set(known)) or "their order"
    what = "the test that provokes it" if name == "ELSEWHERE" else "a function that provokes it"
    assert rows == list(known), (
        f"docs/troubleshooting.md and {name} in this file differ in {differing}: each row of the"
        f" page has a line in {name}, with {what}"
    )


def has(line: str, text: str) -> bool:
    """Whether a text has a line as the page writes it, with `…` for what differs."""
    return re.search(".*".join(re.escape(part) for part in line.split("…")), text) is not None


def test_every_line_of_the_log_is_provoked_here_and_no_other() -> None:
    log = first_cells("What the log says", "PostgreSQL's own words in the log")
    assert_each_is_provoked(log, PROVOKED, "PROVOKED")


@pytest.mark.parametrize("line", [line for line in PROVOKED if PROVOKED[line] != slow_log_reader])
def test_a_line_is_written_as_the_page_has_it(house: House, line: str) -> None:
    try:
        service = PROVOKED[line](house)
    finally:
        house.upstream.script(ok)
    assert service is not None
    assert has(line, service.log), service.log


def health(service: Service) -> Any:
    return service.call("GET", "/health").json()


def dead_database(house: House) -> None:
    told = health(house.start(DEAD_DATABASE))
    assert (told["status"], told["database"]["status"]) == ("degraded", "down")


def not_migrated(house: House) -> None:
    service = house.start(house.server.uri(house.server.create("template1")))
    assert health(service)["database"]["status"] == "unmigrated"


def all_connections_busy(house: House) -> None:
    service = house.start(DB_POOL_SIZE=1, **PATIENT)
    target = user(service)
    with (
        ThreadPoolExecutor(1) as threads,
        house.server.holding("SELECT FROM users FOR UPDATE", database=house.database),
    ):
        threads.submit(service.call, "PATCH", target, {"name": "Bea"})
        wait_for(lambda: house.server.waiting(house.database) == 1, what="a statement")
        pool = health(service)["database"]["pool"]
        assert pool["in_use"] == pool["size"] == 1


def nothing_forwarded(house: House) -> None:
    assert health(house.start())["upstream"]["status"] == "unknown"


def failed_upstream(house: House) -> None:
    service = house.start(UPSTREAM_URL=f"http://127.0.0.1:{free_port()}")
    assert service.call("GET", "/a").json()["type"] == "urn:gatehouse:upstream-unreachable"
    assert health(service)["upstream"]["status"] == "down"


def hung_upstream(house: House) -> None:
    def silent(sock: socket.socket, seen: Seen) -> None:
        sock.recv(1)

    service = house.start()
    assert service.call("GET", "/a").status == 200
    house.upstream.script(silent)
    with contextlib.ExitStack() as clients:
        for number in (1, 2):
            client = clients.enter_context(service.client())
            client.send(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_for(lambda n=number: health(service)["upstream"]["in_flight"] == n, what="it")
        assert health(service)["upstream"]["status"] == "up"


def only_readable(house: House) -> None:
    assert read_only(house).call("GET", "/health/ready").status == 200


def not_ready(house: House) -> None:
    service = house.start(DEAD_DATABASE)
    ready, whole = (service.call("GET", f"/health{which}").status for which in ("/ready", ""))
    assert (ready, whole) == (503, 200)


HEALTH: dict[str, Callable[[House], object]] = {
    '`"status": "degraded"`': dead_database,
    "`database.status` is `down`": dead_database,
    "`database.status` is `unmigrated`": not_migrated,
    "`pool.in_use` stays at `pool.size`": all_connections_busy,
    "`upstream.status` is `unknown`": nothing_forwarded,
    "`upstream.status` is `up`, and `in_flight` grows": hung_upstream,
    "`upstream.status` is `down`": failed_upstream,
    "`in_flight` near `limit`": full_upstream,
    "`/health/ready` is 200, and every write is 503": only_readable,
    "`/health/ready` is 503, `/health` is 200": not_ready,
}


def cells(heading: str) -> list[str]:
    """The first cells below a heading, as they are written."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"(?m)^\| (.+?) \|", section)[2:]


def test_everything_that_health_says_is_provoked_here() -> None:
    assert_each_is_provoked(cells("What /health says"), HEALTH, "HEALTH")


@pytest.mark.parametrize("row", HEALTH)
def test_health_says_what_the_page_has(house: House, row: str) -> None:
    try:
        HEALTH[row](house)
    finally:
        house.upstream.script(ok)


def test_every_problem_that_callers_get_has_its_status() -> None:
    """tests/house/test_errors.py makes each of them; the others are the caller's to mend."""
    told = [
        tuple(match.groups())
        for cell in cells("Callers get an error")
        if (match := re.fullmatch(r"(\d{3}) `([a-z-]+)`", cell))
    ]
    real = {name: str(kind.status) for name, kind in kinds().items()}
    assert told == [(real[name], name) for _, name in told]
    # What an operator can do something about: what is not the request's own fault.
    theirs = {name for name, status in real.items() if int(status) >= 500}
    missing = theirs - {name for _, name in told} - {"http-version-not-supported"}
    assert not missing, f"below Callers get an error, docs/troubleshooting.md lacks {missing}"


# What the other rows tell of, and the tests elsewhere that provoke it.
ELSEWHERE = {
    '400 or 403, "CSRF"; a redirect to an inner address': (
        "applications/test_light.py: test_one_logs_in_to_djangos_admin"
    ),
    '"host is not allowed", "invalid host" from an `http://` upstream': (
        "proxy/test_request.py: test_the_clients_host_is_kept"
    ),
    "redirects in a circle between http and https": (
        "proxy/test_forwarding.py: test_the_protocol_that_a_trusted_proxy_tells"
    ),
    "events arrive late, several at once": (
        "proxy/test_behind_proxies.py: test_each_piece_arrives_before_the_next_is_sent"
    ),
    "event streams end after a minute": (
        "proxy/test_event_streams.py: test_a_client_of_a_silent_stream_hears_that_it_lives"
    ),
    "events stop for good after the application has restarted": (
        "proxy/test_upstream_connections.py:"
        " test_a_refused_connection_is_tried_again_while_the_application_restarts"
    ),
    "answers are not compressed any more": (
        "proxy/test_before_nginx.py: test_nginx_compresses_for_a_proxy_only_if_it_is_told_to"
    ),
    "a slow upload, of small pieces over minutes, arrives late; or it is cut off, and the log has"
    ' `"status": 0`': (
        "server/test_client.py: test_a_body_that_stops_is_cut_however_much_of_it_has_come"
    ),
    "redirects lead to `/shop/shop/…`, which is 404": (
        "proxy/test_response.py: test_redirects_are_not_followed_nor_rewritten"
    ),
    "a WebSocket is refused": "proxy/test_behind_proxies.py: test_a_websocket_goes_through_both",
    "`docker attach`, `docker exec`, or another upgrade that is not a WebSocket's, does not work": (
        "proxy/test_upgrades.py: test_another_upgrade_is_dropped_and_the_request_goes_on"
    ),
    'a gRPC client, or another one that begins with HTTP/2, reports a protocol error; the access log has `"status": 505`': (
        "proxy/test_request.py: test_a_version_of_http_that_is_not_1_is_505"
    ),
    "paths below `/users` or `/health` do not reach the application": (
        "proxy/test_paths.py: test_a_path_in_an_owned_tree_never_reaches_the_upstream"
    ),
    "`gatehouse_loop_longest_turn_seconds` is over 0.1": (
        "operating/test_metrics.py: test_the_longest_turn_is_shown_until_the_next_scrape"
    ),
    "connections wait, also for `/health/live`": (
        "proxy/test_crowds.py: test_a_process_without_a_free_descriptor_waits_for_one_without_spinning"
    ),
    "forwarded requests take nearly three times as much CPU time as before": (
        "house/test_compiled.py: test_after_a_change_all_runs_from_source"
    ),
    "requests that come together wait for some seconds; one after the other they are fast": (
        "proxy/test_upstream_connections.py:"
        " test_an_upstream_that_serves_one_connection_at_a_time_does_not_wait_for_idle_ones"
    ),
    "calls of `/users` wait, and the log has `can't start new thread: …`": (
        "server/test_lanes.py: test_threads_that_cannot_be_started_are_told_of_once_and_tried_again"
    ),
    "it takes long to stop": (
        "operating/test_stopping.py: test_a_stream_that_never_ends_is_cut_at_the_shutdown_timeout"
    ),
    "`Gatehouse was not compiled`": (
        "house/test_compiled.py: test_what_cannot_be_compiled_is_said_once_and_runs_from_source"
    ),
    "`What was compiled before fits, and is used. …`": (
        "house/test_compiled.py: test_what_cannot_be_compiled_is_said_once_and_runs_from_source"
    ),
    "`Not compiled, as before. …`": (
        "house/test_compiled.py: test_what_cannot_be_compiled_is_said_once_and_runs_from_source"
    ),
}


def test_every_other_row_is_provoked_elsewhere() -> None:
    headings = (
        "The application behaves differently",
        "It is slow or stuck",
        "What make install says",
    )
    rows = [row for heading in headings for row in cells(heading)]
    assert_each_is_provoked(rows, ELSEWHERE, "ELSEWHERE")
    for name in ELSEWHERE.values():
        file, _, test = name.partition(": ")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), name


def misspelt(folder: Path) -> str:
    project = copied(folder)
    (project / ".env").write_text("USERS_TOKENS=a\n")
    command = [sys.executable, "app.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=30)
    return done.stderr


def unreadable(folder: Path) -> str:
    project = copied(folder)
    (project / ".env").mkdir()  # Root may read every file.
    command = [sys.executable, "app.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=30)
    return done.stdout + done.stderr


def not_in_utf_8(folder: Path) -> str:
    project = copied(folder)
    (project / ".env").write_bytes(b"# The database of M\xfcller\n")
    command = [sys.executable, "app.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=30)
    return done.stderr


def no_setting(folder: Path) -> str:
    project = copied(folder)
    (project / ".env").write_text("PORT 8081\n")
    command = [sys.executable, "app.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=30)
    return done.stderr


def no_equals_sign(folder: Path) -> str:
    project = copied(folder)
    (project / ".env").write_text("USERS_TOKEN\n")
    command = [sys.executable, "app.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=30)
    return done.stderr


def without_packages(folder: Path) -> str:
    command = [sys.executable, "-S", "app.py"]  # -S leaves out those of .venv.
    done = subprocess.run(command, cwd=checkout(), capture_output=True, text=True, timeout=30)
    return done.stderr


def code_of_root_alone(folder: Path) -> str:
    project = copied(folder)

    def said() -> str:
        command = [*unprivileged(), sys.executable, "app.py"]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True)
        return f"{done.returncode} {done.stderr}"

    (project / "wire").chmod(0)
    assert "ModuleNotFoundError: No module named 'wire." in said()
    (project / "wire").chmod(0o700)
    (project / "app.py").chmod(0)
    assert re.match("2 .*can't open file '.*app.py'", said())
    (project / "app.py").chmod(0o600)
    (project / "settings.py").chmod(0)
    return said()


def no_migrations(folder: Path) -> str:
    project = copied(folder)
    shutil.rmtree(project / "migrations")
    command = [sys.executable, "app.py"]
    environ = os.environ | {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"}
    done = subprocess.run(
        command, cwd=project, env=environ, capture_output=True, text=True, timeout=30
    )
    return done.stderr


def set_twice(folder: Path) -> str:
    (folder / "secret").write_text("postgresql:///")
    return run_app(POSTGRES_URI_FILE=folder / "secret").stdout


def empty_secret(folder: Path) -> str:
    (folder / "secret").touch()
    return run_app(POSTGRES_URI="", POSTGRES_URI_FILE=folder / "secret").stdout


def two_lines(folder: Path) -> str:
    (folder / "secret").write_text("one\ntwo\n")
    return run_app(USERS_TOKEN_FILE=folder / "secret").stdout


def port_in_use(folder: Path) -> str:
    with socket.create_server(("127.0.0.1", 0)) as other:
        return run_app(PORT=other.getsockname()[1]).stdout


def workers_without_descriptors(folder: Path) -> str:
    """With few file descriptors the supervisor can still start, and the workers cannot."""
    environ = os.environ | {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"}
    for limit in range(5, 20):
        done = subprocess.run(
            ["sh", "-c", f'ulimit -n {limit}; exec "$0" app.py', sys.executable],
            cwd=checkout(),
            env=environ | {"PORT": str(free_port()), "WORKERS": "2"},
            capture_output=True,
            text=True,
            timeout=30,
        )
        if "cannot start" in done.stderr:
            assert done.returncode == 1
            break
    return done.stderr


START: dict[str, Callable[[Path], str]] = {
    "… is required": lambda folder: run_app(POSTGRES_URI="").stdout,
    "… and …_FILE are both set: unset one of them": set_twice,
    "… in .env is no setting: write …": misspelt,
    ".env cannot be read at line …: write NAME=value": no_setting,
    ".env has no = after … at line …": no_equals_sign,
    ".env cannot be read: …": unreadable,
    ".env is not in UTF-8": not_in_utf_8,
    "… cannot be read from …: the file is empty": empty_secret,
    "POSTGRES_URI is not a URI that libpq can read: …": lambda _: (
        run_app(POSTGRES_URI="postgresql://ann:a/b@db.invalid/none").stdout
    ),
    "POSTGRES_URI has more than one @ before the database: …": lambda _: (
        run_app(POSTGRES_URI="postgresql://ann:p@ss@127.0.0.1/none").stdout
    ),
    "UPSTREAM_URL must have the host in its ASCII form, xn--…": lambda _: (
        run_app(UPSTREAM_URL="http://bücher.example").stdout
    ),
    "POSTGRES_URI has more than one line": lambda _: (
        run_app(POSTGRES_URI="postgresql://\n/d").stdout
    ),
    "USERS_TOKEN has more than one line: …": two_lines,
    "USERS_TOKEN is required where HOST is not loopback": lambda _: run_app(HOST="0.0.0.0").stdout,
    "cannot listen on …: …": port_in_use,
    "the workers cannot start": workers_without_descriptors,
    "ModuleNotFoundError: No module named 'bottle'": without_packages,
    "PermissionError: … Permission denied: '….py'": code_of_root_alone,
    "…migrations cannot be read: …": no_migrations,
}


# What `make run` says, and the tests in tests/operating/test_dev.py that provoke it.
DEV = {
    "another … is using .data/": "test_a_killed_run_is_no_trouble_for_the_next",
    "….data belongs to …: run … as that user": "test_root_leaves_another_users_data_alone",
    "….data belongs to …, and cannot be written: …": "test_a_folder_that_may_not_be_written_is_one_line",
    "….data cannot be made: …": "test_a_folder_that_may_not_be_written_is_one_line",
    "the migrations could not be applied; without … a database is started here": (
        "test_a_database_that_was_named_is_the_one_that_is_used"
    ),
    "Gatehouse ended by itself, with exit code …": "test_a_killed_run_is_no_trouble_for_the_next",
    "Others may enter … from now on: as root PostgreSQL runs as pgserver": (
        "test_root_lets_others_enter_and_see_nothing_else"
    ),
}


def test_every_line_of_a_start_is_provoked() -> None:
    known = [*START, *DEV]
    assert_each_is_provoked(first_cells("It does not start"), known, "START or DEV")
    tests = (ROOT / "tests" / "operating" / "test_dev.py").read_text()
    assert [name for name in DEV.values() if f"def {name}(" not in tests] == []


@pytest.mark.parametrize("line", START)
def test_a_start_that_fails_says_what_the_page_has(line: str, tmp_path: Path) -> None:
    said = START[line](tmp_path)
    assert has(line, said), said


def ruled(house: House, rule: str) -> str:
    """The URI with a new role, for which `rule` is the first line of pg_hba.conf. If that is empty, no
    line is for that role."""
    rules = house.server.data / "pg_hba.conf"
    before = rules.read_text()
    house.sql(f"CREATE ROLE {house.database} LOGIN")
    others = re.sub(r"(?m)^(host +all +)all", r"\1postgres", before)
    rules.write_text(rule.format(house.database) + "\n" + before if rule else others)
    house.sql("SELECT pg_reload_conf()")
    house.stack.callback(house.sql, "SELECT pg_reload_conf()")
    house.stack.callback(rules.write_text, before)
    return house.server.uri(house.database, house.database)


def over_the_socket(house: House) -> str:
    """Another role than the one that is called like the system's user."""
    ruled(house, "local all {} peer")
    where = f"host={house.server.data}&port={house.server.port}"
    return f"postgresql://{house.database}@/{house.database}?{where}"


def role_without_connections(house: House) -> str:
    house.sql(f"CREATE ROLE {house.database} LOGIN CONNECTION LIMIT 0")
    return house.server.uri(house.database, house.database)


def changed_by_hand(house: House) -> str:
    house.sql("DROP INDEX users_mailbox")
    return house.server.uri(house.database)


def without_rights(house: House) -> str:
    return house.server.uri(house.database, ROLE, "right")


def on_a_standby(house: House) -> str:
    house.sql(f"ALTER DATABASE {house.database} SET default_transaction_read_only = on")
    return house.server.uri(house.database)


def http_for_a_database(house: House) -> str:
    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                client.close()

    listener = house.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    threading.Thread(target=answer, daemon=True).start()
    return f"postgresql://127.0.0.1:{listener.getsockname()[1]}/none"


def with_tls(house: House, root: bytes) -> str:
    """A URI whose server's certificate is to be trusted by the authorities in `root`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    secure = house.stack.enter_context(Pooler(house.server.port, tls=context))
    file = house.stack.enter_context(trustme.Blob(root).tempfile())
    uri = house.server.uri(house.database, port=secure.port)
    return f"{uri}?sslmode=verify-full&sslrootcert={file}"


# What check is to say: makes the fault, and returns the database's URI.
CHECK: dict[str, Callable[[House], str]] = {
    "database does not exist": lambda house: house.server.uri("nowhere"),
    "pg_hba.conf rejects connection": lambda house: ruled(house, "host all {} all reject"),
    "no pg_hba.conf entry": lambda house: ruled(house, ""),
    "role does not exist": lambda house: house.server.uri(house.database, "nobody"),
    "Peer authentication failed": over_the_socket,
    "Ident authentication failed": lambda house: ruled(house, "host all {} all ident"),
    "no password supplied": lambda house: house.server.uri(house.database, ROLE),
    "too many connections for role": role_without_connections,
    "….s.PGSQL.…: No such file or directory": lambda _: "postgresql:///none?host=/nowhere",
    # No name server has to be asked for this one.
    "Name or service not known": lambda _: "postgresql://no..name/none",
    "server does not support SSL": lambda house: house.server.uri() + "?sslmode=require",
    "certificate verify failed": lambda house: with_tls(house, trustme.CA().cert_pem.bytes()),
    "no certificate or crl found": lambda house: with_tls(house, b"no certificate"),
    "received invalid response to SSL negotiation": http_for_a_database,
    "migrations pending: …": lambda house: house.server.uri(house.server.create("template1")),
    "not what the migrations make: …": changed_by_hand,
    "cannot be read: permission denied …": without_rights,
    "cannot be compared: … read-only transaction: …": on_a_standby,
}


def encrypted(house: House, pem: trustme.Blob) -> str:
    """The URL of an upstream with that key and certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with pem.tempfile() as file:
        context.load_cert_chain(file)
    upstream = ScriptedUpstream(tls=context)
    house.stack.callback(upstream.close)
    return upstream.url


def self_signed(house: House) -> dict[str, Any]:
    own = trustme.CA()
    pem = trustme.Blob(own.private_key_pem.bytes() + own.cert_pem.bytes())
    return {"UPSTREAM_URL": encrypted(house, pem)}


def unknown_authority(house: House) -> dict[str, Any]:
    issued = trustme.CA().issue_cert("127.0.0.1")
    return {"UPSTREAM_URL": encrypted(house, issued.private_key_and_cert_chain_pem)}


def another_name(house: House) -> dict[str, Any]:
    authority = trustme.CA()
    bundle = house.stack.enter_context(authority.cert_pem.tempfile())
    issued = authority.issue_cert("other.example")
    url = encrypted(house, issued.private_key_and_cert_chain_pem)
    return {"UPSTREAM_URL": url, "REQUESTS_CA_BUNDLE": bundle}


def without_tls(house: House) -> dict[str, Any]:
    def answer() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(65536)
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    listener = house.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    house.stack.enter_context(ThreadPoolExecutor(1)).submit(answer)
    return {"UPSTREAM_URL": f"https://127.0.0.1:{listener.getsockname()[1]}"}


def unanswered(house: House) -> dict[str, Any]:
    port = house.stack.enter_context(unanswered_port())
    return {"UPSTREAM_URL": f"http://127.0.0.1:{port}", "UPSTREAM_CONNECT_TIMEOUT": 0.5}


def few_descriptors(house: House) -> str:
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 300; exec "$0" app.py check', sys.executable],
        cwd=checkout(),
        env=os.environ | {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.stdout


# What check is to say of other things than the database: makes the fault, and returns settings, or
# what it said.
OTHERS: dict[str, Callable[[House], dict[str, Any] | str]] = {
    "upstream: unreachable: …: Connection refused": lambda _: {},
    "did not accept a connection in time": unanswered,
    "it speaks no TLS: …": without_tls,
    "self-signed certificate": self_signed,
    "unable to get local issuer certificate": unknown_authority,
    "certificate is not valid for …": another_name,
    "UPSTREAM_URL is Gatehouse's own address: …": lambda _: {"PORT": 1},
    "warning: … file descriptors may be open, which is too few for 64 requests at once: …": (
        few_descriptors
    ),
    "warning: … is no setting, and has no effect. There is …": lambda _: {"UPSTREAM_TIMEOUT": 9},
}


def test_every_line_of_check_is_provoked_here_and_no_other() -> None:
    told = [line for cell in cells("What check says") for line in re.findall("`([^`]+)`", cell)]
    assert_each_is_provoked(told, [*CHECK, *OTHERS], "CHECK or OTHERS")


@pytest.mark.parametrize("line", OTHERS)
def test_check_says_of_other_things_what_the_page_has(house: House, line: str) -> None:
    given = OTHERS[line](house)
    said = given if isinstance(given, str) else run_app("check", **given).stdout
    assert has(line, said), said


@pytest.mark.parametrize("line", CHECK)
def test_check_says_what_the_page_has(house: House, line: str) -> None:
    said = run_app("check", POSTGRES_URI=CHECK[line](house)).stdout
    assert has(line, said), said


def test_what_pw_migrate_says(server: Server, template: str) -> None:
    """What it cannot be made to say in a test's time is a wait of ten minutes. A connection that is
    lost has a test of its own, and so have a migration that fails and a folder that was moved."""
    page = first_cells("What pw_migrate says")
    database = server.create(template)
    uri = server.uri(database)
    server.sql(
        "INSERT INTO users (id, email, name) VALUES (gen_random_uuid(), 'a@example.com', 'A')",
        database=database,
    )
    said = [
        pw_migrate("migrate", uri=DEAD_DATABASE).stderr,
        pw_migrate("migrate", "--directory", "/nowhere", uri=DEAD_DATABASE).stderr,
        pw_migrate("rollback", "--count", str(MIGRATIONS), uri=uri).stderr,
    ]
    server.sql(
        "INSERT INTO migratehistory (name, migrated_at) VALUES ('999_later', now())",
        database=database,
    )
    said.append(pw_migrate("rollback", uri=uri).stderr)
    old = server.create(template)
    all_but_one = str(MIGRATIONS - 1)
    assert pw_migrate("rollback", "--count", all_but_one, uri=server.uri(old)).returncode == 0
    server.sql(
        "INSERT INTO users (id, email, name) VALUES"
        " (gen_random_uuid(), 'a@bücher.example', 'A'),"
        " (gen_random_uuid(), 'a@xn--bcher-kva.example', 'A')",
        database=old,
    )
    said.append(pw_migrate("migrate", uri=server.uri(old)).stderr)
    latin = f"test_{uuid.uuid4().hex[:12]}"
    server.sql(f"CREATE DATABASE {latin} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    said.append(pw_migrate("migrate", uri=server.uri(latin)).stderr)
    fresh = f"test_{uuid.uuid4().hex[:12]}"
    server.sql(f"CREATE DATABASE {fresh} TEMPLATE template0")
    migrated = pw_migrate("migrate", uri=server.uri(fresh))  # the embedded one has no pg_trgm
    said.append(migrated.stdout + migrated.stderr)
    server.sql("CREATE SCHEMA tenant", database=fresh)
    path = "-c search_path=tenant,public"
    said.append(pw_migrate("migrate", uri=server.uri(fresh), PGOPTIONS=path).stderr)
    server.sql("DROP TABLE migratehistory", database=fresh)
    failed = pw_migrate("migrate", uri=server.uri(fresh))
    said.append(failed.stderr)
    waits = "SELECT pid FROM pg_stat_activity WHERE query = 'ROLLBACK' AND datname = %s"
    database = server.create(template)
    with (
        ThreadPoolExecutor(1) as threads,
        server.holding(f"SELECT pg_advisory_xact_lock({LOCK})", database=database),
    ):
        waiting = threads.submit(pw_migrate, "migrate", uri=server.uri(database))
        wait_for(lambda: server.sql(waits, database), what="a second pw_migrate")
    said.append(waiting.result().stderr)
    unsaid = [line for line in page if not any(has(line, text) for text in said)]
    too_late = "another pw_migrate does not finish: see pg_stat_activity"
    lost, failing = "the connection was lost: ", " fails on temporary tables: "
    assert unsaid == [too_late, f"…{failing}…", f"{lost}…", "…: not found"], said
    assert too_late in (ROOT / "migrations" / "conf.py").read_text()
    others = (ROOT / "tests" / "operating" / "test_migrations.py").read_text()
    assert f'"{lost}' in others and f"{failing}{{reason}}" in others


def test_what_the_shell_says_of_pw_migrate_after_a_move(tmp_path: Path) -> None:
    """Its first line names a Python that is not there any more."""
    command = tmp_path / "pw_migrate"
    text = Path(sys.executable).with_name("pw_migrate").read_text()
    command.write_text(re.sub(r"/.*/bin/python", "/nowhere/.venv/bin/python", text))
    command.chmod(0o755)
    done = subprocess.run(["sh", "-c", f"{command} list"], capture_output=True, text=True)
    # Shells differ in their words: these are dash's, and those of a new and an old bash.
    words = ("…: not found", "cannot execute: required file not found", "bad interpreter: …")
    assert any(has(line, done.stderr) for line in words), done.stderr
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert all(f"`{line}`" in page for line in words)
