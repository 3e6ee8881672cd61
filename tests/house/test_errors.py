"""docs/errors.md is true: each problem has its section, and each request in it that answer.

A section's commands are run from top to bottom, against a service that SETUPS starts where the
section tells of another state than that of a service on a migrated database with a working
upstream. A block marked `sql` is run in its database.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from problems import Problem
from tests.harness import (
    DEAD_DATABASE,
    ROOT,
    Databases,
    ScriptedUpstream,
    Seen,
    Service,
    free_port,
    message,
    wait_for,
)
from tests.house.test_docs import Reader, outside_code, rows, sessions
from tests.users.test_problems import CONTRACT, kinds

PAGE = ROOT / "docs" / "errors.md"
TEXT = PAGE.read_text()
SECTIONS = dict(re.findall(r"(?ms)^### ([a-z0-9-]+)\n(.*?)(?=^##|\Z)", TEXT))

Running = contextlib.AbstractContextManager[Service]
SETUPS: dict[str, Callable[[str, ScriptedUpstream], Running]] = {}


def sets_up(
    name: str,
) -> Callable[
    [Callable[[str, ScriptedUpstream], Running]], Callable[[str, ScriptedUpstream], Running]
]:
    def register(
        setup: Callable[[str, ScriptedUpstream], Running],
    ) -> Callable[[str, ScriptedUpstream], Running]:
        SETUPS[name] = setup
        return setup

    return register


@sets_up("unauthorized")
def a_token_is_set(uri: str, upstream: ScriptedUpstream) -> Running:
    return Service(POSTGRES_URI=uri, USERS_TOKEN="s3cret")


@sets_up("database-unavailable")
def the_database_is_down(uri: str, upstream: ScriptedUpstream) -> Running:
    return Service(POSTGRES_URI=DEAD_DATABASE)


@sets_up("schema-not-migrated")
def the_database_is_empty(uri: str, upstream: ScriptedUpstream) -> Running:
    return Service(POSTGRES_URI=uri)


@sets_up("upstream-unreachable")
def nobody_listens_at_the_upstream(uri: str, upstream: ScriptedUpstream) -> Running:
    return Service(UPSTREAM_URL="http://127.0.0.1:1")


@sets_up("upstream-broken")
def the_upstream_speaks_another_protocol(uri: str, upstream: ScriptedUpstream) -> Running:
    upstream.script(b"220 mail.example ESMTP\r\n\r\n")
    return Service(UPSTREAM_URL=upstream.url)


@sets_up("upstream-timeout")
@contextlib.contextmanager
def the_upstream_thinks_for_long(uri: str, upstream: ScriptedUpstream) -> Iterator[Service]:
    told = threading.Event()
    upstream.script(lambda sock, seen: told.wait(20) and False)
    try:
        with Service(UPSTREAM_URL=upstream.url, UPSTREAM_READ_TIMEOUT=0.5) as service:
            yield service
    finally:
        told.set()


@sets_up("upstream-busy")
@contextlib.contextmanager
def another_request_is_with_the_upstream(uri: str, upstream: ScriptedUpstream) -> Iterator[Service]:
    told = threading.Event()

    def hold(sock: socket.socket, seen: Seen) -> None:
        told.wait(20)
        sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: 0"))

    upstream.script(hold)
    with (
        Service(UPSTREAM_URL=upstream.url, UPSTREAM_MAX_IN_FLIGHT=1) as service,
        ThreadPoolExecutor(1) as pool,
    ):
        held = pool.submit(service.call, "GET", "/held")
        try:
            wait_for(lambda: upstream.seen, what="the request that is held")
            yield service
        finally:
            told.set()
            assert held.result().status == 200


@sets_up("loop-detected")
def the_upstream_is_gatehouse_itself(uri: str, upstream: ScriptedUpstream) -> Running:
    port = free_port()
    return Service(PORT=port, UPSTREAM_URL=f"http://127.0.0.1:{port}")


@sets_up("internal-error")
@contextlib.contextmanager
def a_defect(uri: str, upstream: ScriptedUpstream) -> Iterator[Service]:
    """Its database has a function of that name and kind, which fails in a way that a statement of
    Gatehouse's cannot."""
    with Service(POSTGRES_URI=uri) as service:
        yield service


def steps(section: str) -> list[tuple[str, str]]:
    """The SQL, as ("sql", text), and the commands with their output, in the order of a section."""
    found: list[tuple[str, str]] = []
    for kind, block in re.findall(r"(?ms)^```(console|sql)\n(.*?)^```$", section):
        if kind == "sql":
            found.append(("sql", block))
        else:
            found += sessions(f"```console\n{block}```\n")
    return found


def test_every_problem_has_a_section_and_every_section_is_of_a_problem() -> None:
    assert set(SECTIONS) == set(CONTRACT)


def test_the_tables_have_every_problem_under_its_status_once() -> None:
    told = [
        (name, int(cells[0]))
        for cells in rows(TEXT)
        if re.fullmatch(r"[45]\d\d", cells[0])
        for name in re.findall(r"\[`([a-z0-9-]+)`\]\(#\1\)", cells[1])
    ]
    assert dict(told) == CONTRACT and len(told) == len(CONTRACT)


@pytest.mark.parametrize("name", CONTRACT)
def test_a_section_says_its_status_and_title_and_what_to_do(name: str) -> None:
    kind: type[Problem] = kinds()[name]
    words = outside_code(SECTIONS[name])
    assert words.strip().startswith(f"**{kind.status} {kind.title}.**")
    assert "\n**What to do.** " in words


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("name", CONTRACT)
def test_each_request_of_a_section_gets_that_answer(
    name: str, databases: Databases, upstream: ScriptedUpstream
) -> None:
    commands = steps(SECTIONS[name])
    assert any(f"urn:gatehouse:{name}" in output for _, output in commands)
    uri = databases.create(migrated=name != "schema-not-migrated")
    if name == "internal-error":
        with databases.admin(uri) as cursor:
            cursor.execute(
                "CREATE FUNCTION to_json(text) RETURNS text LANGUAGE sql AS"
                " $$ SELECT cursor_to_xml('none', 1, false, false, '')::text $$"
            )
            cursor.execute(
                "INSERT INTO users (id, email, name)"
                " VALUES (gen_random_uuid(), 'ann@example.com', 'Ann')"
            )
    setup = SETUPS.get(name)
    running = setup(uri, upstream) if setup else Service(POSTGRES_URI=uri)
    with running as service:
        reader = Reader(service.port)
        complaints = []
        for command, output in commands:
            if command == "sql":
                with databases.admin(uri) as cursor:
                    cursor.execute(output)
            else:
                complaints.append(reader.complaint(command, output))
    wrong = [complaint for complaint in complaints if complaint]
    assert not wrong, "\n\n".join(wrong)
