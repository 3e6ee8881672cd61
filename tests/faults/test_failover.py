"""Crashes and failovers under write load, with an audit of every answer against the database."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import Service, wait_for
from tests.harness.audit import Audit, is_unknown
from tests.harness.servers import Relay, Server, Standby

pytestmark = pytest.mark.slow

# Writes are taken again within two seconds; one more for a busy machine.
RECOVERY = 2.0 + 1.0

Start = Callable[..., Service]


@pytest.fixture
def primary() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def standby(primary: Server) -> Iterator[Standby]:
    """A standby without which the primary acknowledges nothing."""
    standby = Standby(primary)
    try:
        standby.start()
        primary.await_standby()
        yield standby
    finally:
        standby.close()


def assert_kept(audit: Audit) -> None:
    """Every acknowledged write is there and no refused one is; unknown ones may be."""
    assert audit.wrong == []
    assert audit.findings() == {"lost": [], "present": []}


def test_no_acknowledged_write_is_lost_when_the_server_is_killed(
    primary: Server, start: Start
) -> None:
    service = start(POSTGRES_URI=primary.uri(primary.create()), WORKERS=2, DB_CONNECT_TIMEOUT=1)
    with Audit(service.port) as audit:
        for _ in range(3):
            audit.more(100)
            primary.crash()
            audit.more_refused(3)
            assert audit.resumed(primary.start()) < RECOVERY
        audit.more(50)
    assert_kept(audit)


def test_no_acknowledged_write_is_lost_in_a_failover(
    primary: Server, standby: Standby, start: Start
) -> None:
    """One URI names both servers; libpq finds the one that takes writes."""
    database = primary.create()
    hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
    uri = f"postgresql://postgres@{hosts}/{database}?target_session_attrs=read-write"
    service = start(POSTGRES_URI=uri, DB_CONNECT_TIMEOUT=2)
    with Audit(service.port) as audit:
        audit.more(200)
        primary.crash()
        audit.more_refused(3)
        assert audit.resumed(standby.promote()) < RECOVERY
        audit.more(100)
    assert_kept(audit)


def test_no_acknowledged_write_is_lost_when_the_primary_hangs_and_its_standby_is_promoted(
    primary: Server, standby: Standby, start: Start
) -> None:
    """The hanging host is the first in the URI, and still accepts connections."""
    database = primary.create()
    hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
    uri = f"postgresql://postgres@{hosts}/{database}?target_session_attrs=read-write"
    service = start(POSTGRES_URI=uri, DB_CONNECT_TIMEOUT=2, DB_STATEMENT_TIMEOUT=0.5)
    with Audit(service.port) as audit:
        audit.more(200)
        with primary.frozen():
            promoted = standby.promote()
            # One deadline of a statement that hangs and one connection past the dead host.
            assert audit.resumed(promoted) < RECOVERY + 1
            audit.more(50)
            audit.stop()
            assert_kept(audit)


def test_what_a_look_up_finds_is_acknowledged_only_when_the_standby_has_it_too(
    primary: Server, start: Start
) -> None:
    """A backend that is ended while it waits for the standby leaves its commit visible here, and
    here alone: who reads that row back and says 201 loses it in a failover."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    body = {"email": "ann@example.com", "name": "Ann"}
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(Relay(primary.port))
        standby = Standby(primary, source=path.port)
        stack.callback(standby.close)
        standby.start()
        primary.await_standby()
        database = primary.create()
        service = start(POSTGRES_URI=primary.uri(database), DB_STATEMENT_TIMEOUT=2)
        assert service.call("GET", "/users").status == 200
        path.blackhole()
        with ThreadPoolExecutor(1) as thread:
            posted = thread.submit(service.call, "POST", "/users", body)
            wait_for(lambda: primary.sql(waiting) == [(1,)], 10, "a commit that waits")
            primary.terminate_backends(database)
            reply = posted.result()
        primary.crash()
        standby.promote()
        found = standby.sql("SELECT id::text FROM users", database=database)
        if reply.status == 201:
            assert found == [(reply.json()["id"],)]
        else:
            assert is_unknown(reply), reply
