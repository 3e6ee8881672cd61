from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest

from tests.harness import Databases, ScriptedUpstream, Service, embedded_postgres

# How long one example takes says nothing on a machine that does other things too.
hypothesis.settings.register_profile("gatehouse", deadline=None)
hypothesis.settings.load_profile("gatehouse")

# Folders and files whose tests are slow, all of them: for each a browser, a server or a pooler is
# started, a service or an import is stopped, a database falls silent, a log is not read, or thousands
# of messages are tried.
SLOW = {
    "pages",
    "test_database_faults.py",
    "test_fuzz.py",
    "test_handover.py",
    "test_import_cut.py",
    "test_isolation.py",
    "test_logs.py",
    "test_pgbouncer.py",
    "test_smuggling.py",
    "test_stopping.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {item.path.name, item.path.parent.name} & SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def databases() -> Iterator[Databases]:
    """The suite's own embedded PostgreSQL server, over a Unix socket."""
    with embedded_postgres() as databases:
        databases.migrate_once()
        yield databases


@pytest.fixture(scope="module")
def database(databases: Databases) -> str:
    """A migrated database of the test module's own."""
    return databases.create()


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    server = ScriptedUpstream()
    yield server
    server.close()


@pytest.fixture(scope="module")
def service(database: str, upstream: ScriptedUpstream) -> Iterator[Service]:
    """Gatehouse with default settings, on the module's database and upstream."""
    with Service(POSTGRES_URI=database, UPSTREAM_URL=upstream.url) as running:
        yield running


@pytest.fixture
def start() -> Iterator[Callable[..., Service]]:
    """Start services with settings of their own; all are killed at the end of the test."""
    running: list[Service] = []

    def start(**settings: Any) -> Service:
        running.append(Service(**settings))
        return running[-1]

    yield start
    for service in running:
        service.__exit__()
