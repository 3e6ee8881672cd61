"""From version 1.0.0 to this one and back, with traffic running, in the order of docs/upgrading.md."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import (
    ROOT,
    Databases,
    Reply,
    Service,
    call,
    checkout,
    new_email,
    pw_migrate,
    wait_for,
)

pytestmark = pytest.mark.slow

OLD = "6f3faf2"  # the last commit of version 1.0.0
MIGRATIONS = sorted(path.stem for path in (checkout() / "migrations").glob("[0-9]*.py"))
SINCE = len(MIGRATIONS) - 1  # version 1.0.0 had one
CALLERS = 4

Start = Callable[..., Service]


@pytest.fixture(scope="module")
def old() -> Iterator[Path]:
    """A checkout of version 1.0.0."""
    with tempfile.TemporaryDirectory(prefix="gatehouse-old-") as folder:
        archive = subprocess.run(["git", "archive", OLD], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


class Traffic:
    """Callers that create, read, list, change, replace and delete users at `port`, one after another,
    until the block ends; `replies` are all answers."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.replies: list[tuple[str, Reply]] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(CALLERS)]

    def _run(self) -> None:
        for number in itertools.count():
            body = {"email": new_email(), "name": "Ann"}
            created = self._call("POST", "/users", body)
            if created.status != 201:
                continue
            target = f"/users/{created.json()['id']}"
            self._call("GET", target)
            self._call("GET", f"/users?email={body['email']}")
            self._call("GET", "/users")
            self._call("PATCH", target, {"name": f"Bob {number}"})
            self._call("PUT", target, body)
            if number % 2:
                self._call("DELETE", target)
            if self._stopping.is_set():
                return

    def _call(self, method: str, target: str, body: object = None) -> Reply:
        reply = call(self.port, method, target, body, timeout=30)
        self.replies.append((f"{method} {target}", reply))
        return reply

    def go_on(self, count: int = 150) -> None:
        """Wait until so many more calls are answered."""
        goal = len(self.replies) + count
        wait_for(lambda: len(self.replies) >= goal, 30, f"{count} more answers")

    def wrong(self) -> list[tuple[str, Reply]]:
        return [each for each in self.replies if each[1].status not in (200, 201, 204)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)


def migrate(uri: str, count: int | None = None) -> None:
    """Forward to the newest, or back by `count`."""
    if count is None:
        done = pw_migrate("migrate", uri=uri)
    else:
        back = ("rollback", "--count", str(count))
        done = pw_migrate(*back, uri=uri, ROLLBACK_DELETES_DATA="yes")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def first(databases: Databases) -> str:
    """A database as version 1.0.0 left it, with users in it."""
    uri = databases.create(migrated=False)
    assert pw_migrate("migrate", "--name", MIGRATIONS[0], uri=uri).returncode == 0
    with databases.admin(uri) as cursor:
        cursor.execute(
            "INSERT INTO users (id, email, name) SELECT gen_random_uuid(), n || '@example.com', 'Ann'"
            " FROM generate_series(1, 5000) AS n"
        )
    return uri


def test_no_call_fails_on_the_way_there_and_back(first: str, old: Path, start: Start) -> None:
    """Migrate, start the new version, stop the old one; on the way back start the old version, stop
    the new one, roll back."""
    before = start(folder=old, POSTGRES_URI=first)
    with Traffic(before.port) as traffic:
        traffic.go_on()
        migrate(first)
        traffic.go_on()  # the old version on the new schema
        after = start(POSTGRES_URI=first)
        traffic.port = after.port
        traffic.go_on()
        assert before.stop() == 0
        again = start(folder=old, POSTGRES_URI=first)
        traffic.port = again.port
        traffic.go_on()
        assert after.stop() == 0
        if SINCE:
            migrate(first, SINCE)
        traffic.go_on()
    assert traffic.wrong() == []
    for service in (before, after, again):
        assert "Traceback" not in service.log


def test_the_new_version_on_the_old_schema_works_or_says_that_it_is_not_migrated(
    first: str, start: Start
) -> None:
    """Also where the schema goes away under it and comes back: its statements are prepared."""
    service = start(POSTGRES_URI=first)
    with Traffic(service.port) as traffic:
        traffic.go_on()
        migrate(first)
        wait_for(lambda: service.call("GET", "/health/ready").status == 200, 10, "readiness")
        traffic.go_on()
        if SINCE:
            migrate(first, SINCE)
            traffic.go_on()
            migrate(first)
        traffic.go_on()
        assert service.call("POST", "/users", {"email": new_email(), "name": "Ann"}).status == 201
    told = Counter((reply.status, reply.json()["type"]) for _, reply in traffic.wrong())
    assert set(told) <= {(503, "urn:gatehouse:schema-not-migrated")}, told
    assert "Traceback" not in service.log


@contextlib.contextmanager
def reading(uri: str, databases: Databases) -> Iterator[None]:
    """Somebody's transaction that has read users, and stays open."""
    with databases.admin(uri) as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT count(*) FROM users")
        yield
        cursor.execute("COMMIT")


def test_a_migration_that_cannot_have_its_lock_fails_no_call(
    first: str, databases: Databases, start: Start
) -> None:
    migrate(first)
    service = start(POSTGRES_URI=first)
    with Traffic(service.port) as traffic:
        traffic.go_on()
        with reading(first, databases):
            done = pw_migrate(
                "rollback", "--count", str(len(MIGRATIONS)), uri=first, ROLLBACK_DELETES_DATA="yes"
            )
            assert done.returncode == 1
            assert len(done.stderr.splitlines()) == 1
        traffic.go_on()
    allowed = [
        reply for _, reply in traffic.wrong() if reply.json()["type"].endswith("not-migrated")
    ]
    assert len(allowed) == len(traffic.wrong()), traffic.wrong()[:3]
