"""Imports that are cut, by whoever it may be and whenever, and sent again: as if sent once; and
exports that are."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import signal
import socket
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from services.fields import FIELDS
from tests.harness import RawClient, Service, wait_for
from tests.harness.servers import Server
from tests.users.test_transfer import default_in_json

Start = Callable[..., Service]
Rows = list[dict[str, Any]]
CSV, NDJSON = "text/csv", "application/x-ndjson"
COUNT = 2000
# How many lines of the answer the client has when it happens: none, some of the first statement's,
# some in the middle, nearly all.
MOMENTS = (0, 1, 900, COUNT - 300)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # Whoever is killed, the system lives on, and has all that was written.
    with Server(fsync="off") as server:
        yield server


@pytest.fixture(scope="module")
def template(server: Server) -> str:
    return server.create()


@pytest.fixture
def rows() -> Rows:
    """More than a megabyte, up to which a file is looked at whole before anything is written."""
    return [
        {
            "id": str(uuid.uuid4()),
            "email": f"{number}@example.com",
            "name": f'Zoë "{number}", x',
            "metadata": {"n": number, "list": ["a,b\n", None], "pad": "x" * 600},
        }
        for number in range(COUNT)
    ]


def written(rows: Rows, kind: str) -> bytes:
    if kind == NDJSON:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows([row | {"metadata": json.dumps(row["metadata"])} for row in rows])
    return buffer.getvalue().encode()


class Import:
    """An import under way: it is sent while its answer is read. `size` is how much of the body is
    sent, and then no more."""

    def __init__(self, service: Service, body: bytes, kind: str, size: int | None = None) -> None:
        self.client = RawClient(service.port, 60)
        self._head = (
            "POST /users HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        self._sender = threading.Thread(target=self._send, args=(body[:size],))
        self._sender.start()

    def _send(self, body: bytes) -> None:
        with contextlib.suppress(OSError):  # The other side may end it.
            self.client.send(self._head + body)

    def lines(self, count: int) -> list[dict[str, Any]]:
        """Wait for so many lines of the answer, or its end; all that are here."""
        while self.client.buffer.count(b'\n{"line"') < count and self.client._more():
            pass
        lines = self.client.buffer.replace(b"\r\n", b"\n").split(b"\n")[:-1]
        return [json.loads(line) for line in lines if line.startswith(b'{"line"')]

    def leave(self, *, reset: bool) -> None:
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        else:
            self.client.sock.shutdown(socket.SHUT_WR)
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.client.sock.shutdown(socket.SHUT_RDWR)
        self._sender.join()
        self.client.sock.close()


def assert_as_if_sent_once(
    service: Service, rows: Rows, kind: str, told: list[dict[str, Any]]
) -> None:
    """What was `told` before the cut is there; the file, sent again, makes what it says."""
    # Each worker finds out for itself that the database is back: so many callers meet all of them.
    wait_for(lambda: all(list_one(service) for _ in range(20)), 20, "all workers")
    done = {line["id"] for line in told if line["status"] in (200, 201)}
    assert done <= {user["id"] for user in everyone(service)}
    reply = service.call("POST", "/users", written(rows, kind), {"Content-Type": kind}, timeout=60)
    *_, counts = [json.loads(line) for line in reply.body.splitlines()]
    assert reply.complete and counts["rows"] == COUNT
    assert counts["refused"] == counts["replaced"] == 0, counts
    assert counts["unchanged"] >= len(done)
    found = everyone(service)
    assert all(user["created_at"] == user["updated_at"] for user in found)
    times = {"created_at": "", "updated_at": ""}
    absent = {field.name: default_in_json(field) for field in FIELDS}
    expected = {row["id"]: absent | row | times for row in rows}
    assert len(found) == COUNT
    assert {user["id"]: user | times for user in found} == expected


def list_one(service: Service) -> bool:
    with contextlib.suppress(ConnectionError):  # A worker that was killed has yet to be replaced.
        return service.call("GET", "/users?limit=1").status == 200
    return False


def everyone(service: Service) -> list[dict[str, Any]]:
    reply = service.call("GET", "/users", headers={"Accept": NDJSON}, timeout=60)
    assert reply.status == 200 and reply.complete, reply
    return [json.loads(line) for line in reply.body.splitlines()]


@pytest.mark.parametrize("kind", [CSV, NDJSON])
@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
def test_the_client_leaves(
    server: Server, template: str, start: Start, rows: Rows, kind: str, reset: bool
) -> None:
    body = written(rows, kind)
    for size in (1, len(body) // 3, len(body) - 1, len(body)):
        service = start(POSTGRES_URI=server.uri(server.create(template)))
        cut = Import(service, body, kind, size)
        cut.lines(0 if size == 1 else 1)
        cut.leave(reset=reset)
        assert_as_if_sent_once(service, rows, kind, cut.lines(0))
        # It is nothing that went wrong here.
        assert "Traceback" not in service.log and " ERROR " not in service.log, service.log
        assert service.stop() == 0


def kill_the_service(service: Service, server: Server) -> None:
    for process in psutil.Process(service.process.pid).children(recursive=True):
        process.kill()
    service.process.kill()
    service.process.wait()


def kill_the_workers(service: Service, server: Server) -> None:
    workers = psutil.Process(service.process.pid).children()
    assert workers
    for worker in workers:
        worker.kill()


def kill_the_database(service: Service, server: Server) -> None:
    server.crash()
    server.start()


def end_its_connections(service: Service, server: Server) -> None:
    name = service.environ["POSTGRES_URI"].rpartition("/")[2]
    assert server.terminate_backends(name)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "kill", [kill_the_service, kill_the_workers, kill_the_database, end_its_connections]
)
def test_somebody_is_killed(
    server: Server,
    template: str,
    start: Start,
    rows: Rows,
    kill: Callable[[Service, Server], None],
    moment: int,
) -> None:
    database = server.create(template)
    service = start(POSTGRES_URI=server.uri(database), WORKERS=2)
    assert everyone(service) == []
    cut = Import(service, written(rows, NDJSON), NDJSON)
    told = cut.lines(moment)
    kill(service, server)
    told = cut.lines(COUNT)
    cut.close()
    if kill is kill_the_service:
        service = start(POSTGRES_URI=server.uri(database))
    assert_as_if_sent_once(service, rows, NDJSON, told)


@pytest.mark.parametrize("how", [signal.SIGQUIT, signal.SIGINT, None], ids=str)
def test_the_database_dies_in_the_middle_of_a_statement(
    server: Server, template: str, start: Start, rows: Rows, how: signal.Signals | None
) -> None:
    """One that waits for another transaction's row, which may be committed or not."""
    database = server.create(template)
    service = start(POSTGRES_URI=server.uri(database))
    assert everyone(service) == []
    blocking = (
        "INSERT INTO users (id, email, name) VALUES (gen_random_uuid(), '1777@example.com', 'Ann')"
    )
    with server.holding(blocking, database=database):
        cut = Import(service, written(rows, NDJSON), NDJSON)
        assert cut.lines(1)
        wait_for(lambda: server.waiting(database) == 1, 10, "the import to wait")
        server.crash() if how is None else server.stop(how)
    server.start()
    told = cut.lines(COUNT)
    assert len(told) == COUNT
    assert {line["status"] for line in told} == {201, 503}
    cut.close()
    assert_as_if_sent_once(service, rows, NDJSON, told)


@pytest.mark.parametrize("kind", [CSV, NDJSON])
def test_an_export_that_fails_has_no_valid_end_and_no_traceback(
    server: Server, template: str, start: Start, kind: str
) -> None:
    database = server.create(template)
    server.sql(
        "INSERT INTO users (id, email, name, metadata) SELECT gen_random_uuid(),"
        " n || '@example.com', 'Ann', jsonb_build_object('pad', repeat(md5(n::text), 60))"
        " FROM generate_series(1, 4000) n",
        database=database,
    )
    service = start(POSTGRES_URI=server.uri(database))
    client = RawClient(service.port, 30, room=65536)
    client.send(f"GET /users HTTP/1.1\r\nHost: a\r\nAccept: {kind}\r\n\r\n".encode())
    while len(client.buffer) < 200_000:
        assert client._more()
    with server.down():
        reply = client.reply()
        assert reply.status == 200 and not reply.complete
        line = "cut: The database is not available at the moment."
        wait_for(lambda: line in service.log, 5, "the log")
    assert "Traceback" not in service.log, service.log
