from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Service
from tests.harness.applications import PYTHON, Application, Junction, Watchers, use

STREAMS = 60


@pytest.fixture
def both_ways(tmp_path: Path) -> Callable[..., Any]:
    """Run an application and let its client use it twice: directly, and through Gatehouse with two
    workers, default settings and sixty event streams open meanwhile. What the client found, where
    that is the same; AssertionError where it is not. `seconds` bound the start and each use."""
    assert PYTHON.exists(), "run by `make applications` or `make applications-light`"

    def both_ways(name: str, seconds: float = 60) -> Any:
        for folder in ("served", "direct", "through"):
            (tmp_path / folder).mkdir()
        application = Application(name, tmp_path / "served", seconds)
        try:
            url = f"http://127.0.0.1:{application.port}"
            direct = use(name, url, tmp_path / "direct", seconds)
            through = _through(name, application, tmp_path / "through", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\nThe application:\n{application.log}") from None
        finally:
            application.close()
        assert through == direct
        return direct

    return both_ways


def _through(name: str, application: Application, folder: Path, seconds: float) -> Any:
    junction = Junction(application.port)
    try:
        with Service(WORKERS=2, UPSTREAM_URL=junction.url) as service:
            watchers = Watchers(service, junction, STREAMS)
            try:
                found = use(name, service.url, folder, seconds)
                watchers.check()
            except AssertionError as error:
                raise AssertionError(f"{error}\nGatehouse:\n{service.log}") from None
            finally:
                watchers.close()
    finally:
        junction.close()
    return found
