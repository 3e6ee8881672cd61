"""Whatever is sent on a connection, the upstream sees the requests that Gatehouse saw, and each client
reads the answers to these.

`make smuggling` sends the same to other servers behind Gatehouse and through others in front of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.harness import ScriptedUpstream, Service
from tests.harness.smuggling import (
    cases,
    changed,
    check_answers,
    check_seen,
    converse_all,
    logged,
    say_which,
    sights,
)

CHANGED = int(os.environ.get("SMUGGLING_CASES", "500"))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_two_readers_may_take_for_two_things_is_one(
    start: Callable[..., Service], workers: int
) -> None:
    upstream = ScriptedUpstream(say_which)
    service = start(UPSTREAM_URL=upstream.url, WORKERS=workers)
    every = [*cases(), *map(changed, range(CHANGED))]
    assert len(every) > 1000
    held = converse_all(service.port, every)
    assert service.stop() == 0
    log = logged(service)
    seen = sights(upstream)
    check_seen(seen, log, check_answers(held, log))
    # Most of it has been somewhere: the first request of each is nothing special.
    assert len(seen) > len(every)
    upstream.close()
