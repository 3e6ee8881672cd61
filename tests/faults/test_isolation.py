"""Databases whose default isolation undoes statements that meet others, and deadlocks."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import Reply, Service, call, new_email, wait_for
from tests.harness.servers import Server

Start = Callable[..., Service]
PATCHES, CALLERS = 300, 16


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(deadlock_timeout="100ms") as server:
        yield server


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_300_changes_of_one_user_are_all_carried_out_in_the_order_of_their_answers(
    server: Server, start: Start, level: str, workers: int
) -> None:
    """164 of them were 503: the server undoes what meets another change (40001)."""
    name = server.create()
    server.sql(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")
    service = start(POSTGRES_URI=server.uri(name), WORKERS=workers)
    user = service.call("POST", "/users", {"email": new_email(), "name": "0"}).json()
    target = f"/users/{user['id']}"
    numbers = itertools.count(1)
    answers: list[tuple[float, float, Reply]] = []
    lock = threading.Lock()

    def change(_: int) -> None:
        with lock:
            number = next(numbers)
        began = time.monotonic()
        reply = call(service.port, "PATCH", target, {"name": str(number)}, timeout=30)
        with lock:
            answers.append((began, time.monotonic(), reply))

    with ThreadPoolExecutor(CALLERS) as threads:
        list(threads.map(change, range(PATCHES)))
    assert [reply for _, _, reply in answers if reply.status != 200] == []
    users = [reply.json() for _, _, reply in answers]
    assert sorted(int(user["name"]) for user in users) == list(range(1, PATCHES + 1))
    # Each has a time of its own, and one that was sent after another's answer has a later one.
    assert len({user["updated_at"] for user in users}) == PATCHES
    for (began, _, late), (_, ended, early) in itertools.product(answers, answers):
        if began > ended:
            assert late.json()["updated_at"] > early.json()["updated_at"]
    assert service.call("GET", target).json() == max(
        users, key=lambda user: str(user["updated_at"])
    )


@pytest.mark.slow
def test_creates_and_deletes_that_meet_are_carried_out(server: Server, start: Start) -> None:
    name = server.create()
    server.sql(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    service = start(POSTGRES_URI=server.uri(name))

    def life(number: int) -> None:
        for _ in range(10):
            body = {"email": new_email(), "name": str(number)}
            created = service.call("POST", "/users", body)
            assert created.status == 201, created
            assert service.call("GET", f"/users?email={body['email']}").status == 200
            assert service.call("DELETE", f"/users/{created.json()['id']}").status == 204

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(life, range(8)))
    assert service.call("GET", "/users").json()["users"] == []


def test_a_write_that_was_chosen_to_end_a_deadlock_is_run_again(
    server: Server, start: Start
) -> None:
    """Two transactions of somebody else's lock two users in the other order."""
    name = server.create()
    service = start(POSTGRES_URI=server.uri(name), DB_STATEMENT_TIMEOUT=10)
    first, second = (
        service.call("POST", "/users", {"email": new_email(), "name": "Ann"}).json()["id"]
        for _ in range(2)
    )
    # A change of the first changes the second too.
    server.sql(
        "CREATE FUNCTION lock_both() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" PERFORM FROM users WHERE id = '{second}' FOR UPDATE; RETURN NEW; END $$;"
        "CREATE TRIGGER lock_both AFTER UPDATE ON users FOR EACH ROW"
        f" WHEN (NEW.id = '{first}') EXECUTE FUNCTION lock_both()",
        database=name,
    )
    lock = "SELECT FROM users WHERE id = %s FOR UPDATE"
    with server.admin(name) as other, ThreadPoolExecutor(1) as threads:
        other.execute("SET deadlock_timeout = '1min'")  # so that it is not the one to be ended
        other.execute("BEGIN")
        other.execute(lock, (second,))
        changed = threads.submit(service.call, "PATCH", f"/users/{first}", {"name": "Bob"})
        wait_for(lambda: server.waiting(name) == 1, 10, "the write to wait")
        other.execute(lock, (first,))
        other.execute("COMMIT")
        reply = changed.result()
    assert reply.status == 200 and reply.json()["name"] == "Bob", reply
    assert "40P01" in service.log


def test_a_conflict_that_does_not_end_is_told_within_the_statement_timeout(
    server: Server, start: Start
) -> None:
    name = server.create()
    server.sql(
        "CREATE FUNCTION never() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE serialization_failure; END $$;"
        "CREATE TRIGGER never BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION never()",
        database=name,
    )
    service = start(POSTGRES_URI=server.uri(name), DB_STATEMENT_TIMEOUT=1)
    began = time.monotonic()
    reply = service.call("POST", "/users", {"email": new_email(), "name": "Ann"})
    assert time.monotonic() - began < 2
    assert reply.status == 503 and "outcome" not in reply.json(), reply
    assert int(server.sql("SELECT count(*) FROM users", database=name)[0][0]) == 0
