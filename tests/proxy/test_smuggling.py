"""Whatever is sent on a connection, the upstream sees the requests that Gatehouse saw, and each client
reads the answers to these.

`make smuggling` sends the same to other servers behind Gatehouse and through others in front of it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from tests.harness import ScriptedUpstream, Seen, Service, message
from tests.harness.smuggling import (
    ANSWERS,
    POISON,
    answers,
    cases,
    changed,
    changed_answer,
    check_answers,
    check_seen,
    converse_all,
    logged,
    say_which,
    sights,
)

KEEP = b"Connection: keep-alive"
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


@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_the_upstream_answers_the_next_request_gets_its_own_answer(
    start: Callable[..., Service], workers: int
) -> None:
    def answer(sock: socket.socket, seen: Seen) -> bool:
        if not seen.target.startswith(b"/odd/"):
            say_which(sock, seen)
            return True
        data, ends = odd_answers[int(seen.target[5:])]
        sock.sendall(data)
        sock.settimeout(0.3)  # Who waits for more of it is told then that there is none.
        return not ends

    plain = [(data + more, ends) for data in ANSWERS for more in (b"", POISON) for ends in (0, 1)]
    odd_answers = [*plain, *map(changed_answer, range(CHANGED))]
    upstream = ScriptedUpstream(answer)
    service = start(UPSTREAM_URL=upstream.url, WORKERS=workers)
    asked = [
        (
            f"{method} {odd_answers[number]}",
            message(b"%b /odd/%d HTTP/%b" % (method, number, version), b"Host: h", KEEP)
            + message(b"GET /next HTTP/1.1", b"Host: h", b"Connection: close"),
        )
        for number in range(len(odd_answers))
        for method, version in ((b"GET", b"1.1"), (b"HEAD", b"1.1"), (b"GET", b"1.0"))
    ]
    held = converse_all(service.port, asked, seconds=10)
    assert service.stop() == 0
    log = logged(service)
    for name, _, received in held:
        first, *others = answers(received, log, f"{name}\n{received!r}")
        assert first[0]["target"].startswith("/odd/") and len(others) < 2, received
        for line, reply in others:
            assert first[1].complete and line["target"] == "/next", received
            assert reply.complete and reply.body == line["request_id"].encode(), received
    assert "Traceback" not in service.log
    upstream.close()
