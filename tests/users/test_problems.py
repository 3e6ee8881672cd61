"""Each problem type is provoked by a real request, and is what the contract's table says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

import problems as errors
from problems import Problem
from services.fields import NAMES
from tests.harness import (
    Databases,
    Reply,
    ScriptedUpstream,
    Seen,
    Service,
    create_user,
    free_port,
    invalid_fields,
    new_email,
    problem,
    wait_for,
)

CONTRACT = {
    "malformed-json": 400,
    "bad-request": 400,
    "unauthorized": 401,
    "no-such-user": 404,
    "not-found": 404,
    "method-not-allowed": 405,
    "email-taken": 409,
    "user-in-use": 409,
    "refused-by-database": 409,
    "precondition-failed": 412,
    "body-too-large": 413,
    "unsupported-media-type": 415,
    "invalid-user": 422,
    "invalid-query": 422,
    "internal-error": 500,
    "upstream-unreachable": 502,
    "upstream-broken": 502,
    "database-unavailable": 503,
    "schema-not-migrated": 503,
    "upstream-busy": 503,
    "upstream-timeout": 504,
    "http-version-not-supported": 505,
    "loop-detected": 508,
}
# What an answer of this status has to say besides.
HEADERS = {401: "WWW-Authenticate", 405: "Allow", 503: "Retry-After"}
NOWHERE = "/users/00000000-0000-4000-8000-000000000000"
# Of the code, the database and the settings below, none of which is a caller's business.
INNER = ["Traceback", 'File "', "psycopg2", "peewee", "urllib3", "SELECT", "INSERT", "UPDATE"]
INNER += ["relation", "column", "127.0.0.1", "s3cret", "ann_role", "people", "quux"]
DEAD = "postgresql://ann_role:s3cret@127.0.0.1:1/people"


@dataclass
class Parts:
    """What a request can be made to fail with."""

    service: Service
    upstream: ScriptedUpstream
    databases: Databases
    start: Callable[..., Service]


@pytest.fixture
def parts(
    service: Service,
    upstream: ScriptedUpstream,
    databases: Databases,
    start: Callable[..., Service],
) -> Parts:
    return Parts(service, upstream, databases, start)


Provoke = Callable[[Parts], Reply]
PROVOKED: dict[str, Provoke] = {}


def provokes(name: str) -> Callable[[Provoke], Provoke]:
    def register(provoke: Provoke) -> Provoke:
        PROVOKED[name] = provoke
        return provoke

    return register


@provokes("malformed-json")
def half_a_document(parts: Parts) -> Reply:
    return parts.service.call("POST", "/users", b"{", {"Content-Type": "application/json"})


@provokes("bad-request")
def a_tag_without_quotes(parts: Parts) -> Reply:
    return parts.service.call("DELETE", NOWHERE, headers={"If-Match": "abc"})


@provokes("unauthorized")
def a_wrong_token(parts: Parts) -> Reply:
    service = parts.start(USERS_TOKEN="quux")
    return service.call("GET", "/users", headers={"Authorization": "Bearer wrong"})


@provokes("no-such-user")
def an_id_that_nobody_has(parts: Parts) -> Reply:
    return parts.service.call("GET", NOWHERE)


@provokes("not-found")
def an_owned_path_with_nothing_there(parts: Parts) -> Reply:
    return parts.service.call("GET", "/health/nothing")


@provokes("method-not-allowed")
def a_method_that_the_path_has_not(parts: Parts) -> Reply:
    return parts.service.call("DELETE", "/health")


@provokes("email-taken")
def an_email_twice(parts: Parts) -> Reply:
    taken = create_user(parts.service).json()["email"]
    return parts.service.call("POST", "/users", {"email": taken, "name": "Ann"})


@provokes("precondition-failed")
def a_version_that_never_was(parts: Parts) -> Reply:
    path = f"/users/{create_user(parts.service).json()['id']}"
    return parts.service.call("DELETE", path, headers={"If-Match": '"never"'})


@provokes("body-too-large")
def a_user_of_70_kb(parts: Parts) -> Reply:
    return parts.service.call("POST", "/users", {"email": new_email(), "name": "x" * 70000})


@provokes("unsupported-media-type")
def a_form(parts: Parts) -> Reply:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    return parts.service.call("POST", "/users", b"name=Ann", form)


@provokes("invalid-user")
def a_user_without_an_email(parts: Parts) -> Reply:
    return parts.service.call("POST", "/users", {"name": "Ann"})


@provokes("invalid-query")
def a_page_of_none(parts: Parts) -> Reply:
    return parts.service.call("GET", "/users?limit=0")


@provokes("user-in-use")
def a_user_with_an_order(parts: Parts) -> Reply:
    uri = parts.databases.create()
    service = parts.start(POSTGRES_URI=uri)
    user = create_user(service).json()["id"]
    with parts.databases.admin(uri) as cursor:
        cursor.execute("CREATE TABLE quux (user_id uuid REFERENCES users)")
        cursor.execute("INSERT INTO quux VALUES (%s)", (user,))
    return service.call("DELETE", f"/users/{user}")


@provokes("refused-by-database")
def a_trigger_that_says_no(parts: Parts) -> Reply:
    uri = parts.databases.create()
    with parts.databases.admin(uri) as cursor:
        cursor.execute(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'quux s3cret'; END $$;"
            "CREATE TRIGGER fail BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION fail()"
        )
    service = parts.start(POSTGRES_URI=uri)
    return service.call("POST", "/users", {"email": new_email(), "name": "Ann"})


@provokes("internal-error")
def a_database_that_fails_in_a_way_nobody_thought_of(parts: Parts) -> Reply:
    uri = parts.databases.create()
    with parts.databases.admin(uri) as cursor:
        cursor.execute(
            "CREATE FUNCTION to_json(text) RETURNS text LANGUAGE sql AS"
            " $$ SELECT cursor_to_xml('quux s3cret', 1, false, false, '')::text $$"
        )
    service = parts.start(POSTGRES_URI=uri)
    with parts.databases.admin(uri) as cursor:
        cursor.execute(
            "INSERT INTO users (id, email, name) VALUES (gen_random_uuid(), 'a@example.com', 'A')"
        )
    reply = service.call("GET", "/users")
    # The operator is told what the caller is not.
    assert reply.json()["request_id"] in service.log
    return reply


@provokes("upstream-unreachable")
def an_upstream_that_is_down(parts: Parts) -> Reply:
    return parts.start(UPSTREAM_URL="http://127.0.0.1:1/quux").call("GET", "/x")


@provokes("upstream-broken")
def an_upstream_that_does_not_speak_http(parts: Parts) -> Reply:
    parts.upstream.script(b"220 mail.quux.example ESMTP\r\n\r\n")
    return parts.service.call("GET", "/x")


@provokes("database-unavailable")
def a_database_that_is_down(parts: Parts) -> Reply:
    return parts.start(POSTGRES_URI=DEAD).call("GET", "/users")


@provokes("schema-not-migrated")
def a_database_without_tables(parts: Parts) -> Reply:
    uri = parts.databases.create(migrated=False)
    return parts.start(POSTGRES_URI=uri).call("GET", "/users")


@provokes("upstream-busy")
def one_request_too_many(parts: Parts) -> Reply:
    release = threading.Event()

    def hold(sock: socket.socket, seen: Seen) -> None:
        release.wait(10)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    parts.upstream.script(hold)
    service = parts.start(UPSTREAM_URL=parts.upstream.url, UPSTREAM_MAX_IN_FLIGHT=1)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(service.call, "GET", "/held")
        try:
            wait_for(lambda: parts.upstream.seen, what="the request that is held")
            return service.call("GET", "/x")
        finally:
            release.set()
            assert held.result().status == 200


@provokes("upstream-timeout")
def an_upstream_that_does_not_answer(parts: Parts) -> Reply:
    asked = threading.Event()
    parts.upstream.script(lambda sock, seen: asked.wait(10) and False)
    try:
        service = parts.start(UPSTREAM_URL=parts.upstream.url, UPSTREAM_READ_TIMEOUT=0.5)
        return service.call("GET", "/x")
    finally:
        asked.set()


@provokes("http-version-not-supported")
def a_version_that_is_not_1(parts: Parts) -> Reply:
    return parts.service.exchange(b"GET /x HTTP/2.0\r\nHost: a\r\n\r\n")


@provokes("loop-detected")
def an_upstream_that_is_gatehouse_itself(parts: Parts) -> Reply:
    port = free_port()
    return parts.start(PORT=port, UPSTREAM_URL=f"http://127.0.0.1:{port}").call("GET", "/x")


def kinds() -> dict[str, type[Problem]]:
    """The problem types that problems.py defines, by name."""
    found = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    types = {kind.name: kind for kind in found if issubclass(kind, Problem)}
    assert len(types) == sum(issubclass(kind, Problem) for kind in found), "a name twice"
    return types


def test_there_are_the_problem_types_of_the_contract_and_no_others() -> None:
    assert {name: kind.status for name, kind in kinds().items()} == CONTRACT
    assert set(PROVOKED) == set(CONTRACT)


def test_no_two_problem_types_have_one_title() -> None:
    titles = [kind.title for kind in kinds().values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"HEAD / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"HEAD / HTTP/1.12\r\nHost: a\r\n\r\n", 400),
        (b"HEAD / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n", 400),
        (b"HEAD / HTTP/1.1\r\nHost: a\n\r\n", 400),
        (b"HEAD /" + b"a" * 66_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_head_that_is_refused_gets_no_body_either(
    service: Service, head: bytes, status: int
) -> None:
    with service.client() as client:
        client.send(head)
        reply = client.reply("HEAD")
        assert (reply.status, reply.get("Content-Type")) == (status, "application/problem+json")
        assert client.closed()


@pytest.mark.parametrize("line", [b"Content-Length: a", b"Host: b", b"Transfer-Encoding: gzip"])
def test_a_refusal_has_the_id_of_its_request(service: Service, line: bytes) -> None:
    reply = service.exchange(
        b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: mine-1\r\n" + line + b"\r\n\r\n"
    )
    assert problem(reply, 400, "bad-request")["request_id"] == "mine-1"


@pytest.mark.parametrize("name", CONTRACT)
def test_a_problem_is_told_as_it_is_defined(parts: Parts, name: str) -> None:
    reply = PROVOKED[name](parts)
    document = problem(reply, CONTRACT[name], name)
    assert document["title"] == kinds()[name].title
    assert reply.complete
    if header := HEADERS.get(reply.status):
        assert reply.get(header)
    # 422 means that fields are named, and nothing else does.
    assert ("errors" in document) == (reply.status == 422)
    assert "outcome" not in document
    text = f"{reply.body!r} {reply.headers!r}"
    assert [word for word in INNER if word in text] == []


def test_a_retry_is_asked_for_in_whole_seconds(parts: Parts) -> None:
    for name, status in CONTRACT.items():
        if status == 503:
            retry_after = PROVOKED[name](parts).get("Retry-After")
            assert retry_after is not None and 0 < int(retry_after) <= 60, name


def test_a_caller_can_name_its_request(service: Service) -> None:
    reply = service.call("GET", "/health/nothing", headers={"X-Request-Id": "ann-1"})
    assert problem(reply, 404, "not-found")["request_id"] == "ann-1"
    other = service.call("GET", "/health/nothing")
    assert problem(other, 404, "not-found")["request_id"] != "ann-1"


def test_all_that_is_wrong_is_named_at_once_with_the_field_it_is_in(service: Service) -> None:
    reply = service.call("POST", "/users", {"email": "nobody", "name": " ", "admin": True})
    document = problem(reply, 422, "invalid-user")
    assert invalid_fields(document) == ["admin", "email", "name"]
    messages: list[Any] = [error["message"] for error in document["errors"]]
    assert len(set(messages)) == 3


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (400, b"GET /health HTTP/1.1\r\n\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
        (400, b"POST /users HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n{"),
        (400, b"POST /users HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (400, b"nonsense\r\n\r\n"),
    ],
    ids=lambda value: value[:60].decode() if isinstance(value, bytes) else "",
)
def test_what_never_becomes_a_request_is_a_problem_too(
    service: Service, status: int, data: bytes
) -> None:
    with service.client() as client:
        client.send(data)
        problem(client.reply(), status, "bad-request")
        assert client.closed()


def test_a_dead_database_does_not_hide_what_is_wrong_with_a_request(parts: Parts) -> None:
    service = parts.start(POSTGRES_URI=DEAD)
    problem(service.call("POST", "/users", {}), 422, "invalid-user")
    problem(service.call("GET", "/users?limit=0"), 422, "invalid-query")
    problem(service.call("DELETE", "/users/nobody"), 404, "no-such-user")
    reply = service.call("POST", "/users", {"email": new_email(), "name": "Ann"})
    problem(reply, 503, "database-unavailable")


SAID = {
    "an empty body": (b"", "The body is empty; send a JSON object."),
    "a byte order mark": (
        b"\xef\xbb\xbf{}",
        "The body begins with a byte order mark; send it without.",
    ),
    "a member twice": (
        b'{"name": "A", "name": "B"}',
        'The member "name" is given twice; give it once.',
    ),
    "no number": (b'{"name": NaN}', "NaN is not a number in JSON."),
    "another encoding": (b'{"name": "\xeb"}', "The body is not in UTF-8 (byte 10)."),
    "a comma too many": (
        b'{"name": "A",}',
        "The body is not one JSON document: a name in double quotes is missing, at line 1,"
        " character 14.",
    ),
}


@pytest.mark.parametrize(("body", "detail"), SAID.values(), ids=SAID.keys())
def test_each_way_to_be_no_json_has_words_of_its_own(
    service: Service, body: bytes, detail: str
) -> None:
    reply = service.call("POST", "/users", body, {"Content-Type": "application/json"})
    assert problem(reply, 400, "malformed-json")["detail"] == detail


@pytest.mark.parametrize("name", ["If-Match", "If-None-Match"])
@pytest.mark.parametrize("value", ["abc", '"a" b', " ", " , ,", 'W/abc, "x"'])
def test_a_tag_without_quotes_is_told_from_a_version_that_is_gone(
    service: Service, name: str, value: str
) -> None:
    reply = service.call("DELETE", NOWHERE, headers={name: value})
    detail = problem(reply, 400, "bad-request")["detail"]
    assert detail == f"{name} must be * or what an ETag header said, with its double quotes."


def test_what_gatehouse_sets_itself_is_refused_with_words_of_its_own(service: Service) -> None:
    members = {"email": new_email(), "name": None, "id": NOWHERE[7:], "created_at": "now", "x": 1}
    document = problem(service.call("POST", "/users", members), 422, "invalid-user")
    assert {error["field"]: error["message"] for error in document["errors"]} == {
        "name": "must be a string, not null",
        "id": "is made by Gatehouse; leave it out, or choose one with PUT /users/{id}",
        "created_at": "is set by Gatehouse; leave it out",
        "x": f"is not a member of a user; you can set {', '.join(NAMES)}",
    }
