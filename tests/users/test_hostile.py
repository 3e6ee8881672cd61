from __future__ import annotations

import contextlib
import json
import time
import uuid
from typing import Any
from urllib.parse import quote

import pytest
from email_validator import validate_email
from hypothesis import given, settings
from hypothesis import strategies as st

from app import Gatehouse
from problems import Unauthorized
from settings import Settings
from tests.harness import (
    Databases,
    RawClient,
    Reply,
    Service,
    chunked,
    create_user,
    invalid_fields,
    new_email,
    problem,
    request,
    wait_for,
)
from wire.headers import authenticates_connection
from wire.request import Head

# The examples are the same in every run, so that a failure is everybody's.
PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)

CHUNKED = b"Transfer-Encoding: chunked"
VALID = '"email": "ann@example.com", "name": "Ann"'

NOT_JSON = {
    "an empty body": b"",
    "white space": b" \r\n\t ",
    "an open brace": b"{",
    "an open string": b'{"email',
    "no JSON at all": b"email=ann@example.com&name=Ann",
    "trailing garbage": b"{" + VALID.encode() + b"} x",
    "two documents": b"{" + VALID.encode() + b"}{}",
    "a closing brace too many": b"{" + VALID.encode() + b"}}",
    "a NUL after the document": b"{" + VALID.encode() + b"}\0",
    "a trailing comma": b"{" + VALID.encode() + b",}",
    "single quotes": b"{'email': 'ann@example.com', 'name': 'Ann'}",
    "a comment": b"{" + VALID.encode() + b"} // Ann",
    "an unquoted member": b'{email: "ann@example.com", "name": "Ann"}',
    "a raw newline in a string": b'{"email": "ann@example.com", "name": "A\nB"}',
    "a raw NUL in a string": b'{"email": "ann@example.com", "name": "A\0B"}',
    "a raw NUL between members": b'{"email": "ann@example.com",\0 "name": "Ann"}',
    "a bad escape": b'{"email": "ann@example.com", "name": "A\\xB"}',
    "a short escape": b'{"email": "ann@example.com", "name": "\\u12"}',
    "NaN": b'{"email": "ann@example.com", "name": NaN}',
    "Infinity": b'{"email": "ann@example.com", "name": Infinity}',
    "minus Infinity": b"-Infinity",
    "a leading zero": b'{"email": "ann@example.com", "name": 01}',
    "Python": b'{"email": None, "name": True}',
    "a byte order mark": b"\xef\xbb\xbf{" + VALID.encode() + b"}",
    "UTF-16": ("{" + VALID + "}").encode("utf-16"),
    "UTF-16 without a mark": ("{" + VALID + "}").encode("utf-16-le"),
    "UTF-32": ("{" + VALID + "}").encode("utf-32"),
    "Latin-1": b'{"email": "ann@example.com", "name": "Zo\xeb"}',
    "a cut UTF-8 sequence": b'{"email": "ann@example.com", "name": "Zo\xc3"}',
    "an overlong UTF-8 sequence": b'{"email": "ann@example.com", "name": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"email": "ann@example.com", "name": "\xed\xa0\x80"}',
    "beyond Unicode": b'{"email": "ann@example.com", "name": "\xf4\x90\x80\x80"}',
    "a member twice": b"{" + VALID.encode() + b', "name": "Bob"}',
    "a member twice, one escaped": b"{" + VALID.encode() + b', "n\\u0061me": "Bob"}',
    "an unknown member twice": b"{" + VALID.encode() + b', "x": 1, "x": 1}',
    "a member twice, deep inside": b"{" + VALID.encode() + b', "x": {"y": 1, "y": 2}}',
    "deep arrays": b"[" * 30000 + b"]" * 30000,
    "deep objects": b'{"a":' * 10000 + b"1" + b"}" * 10000,
    "a deep member": b'{"email": "ann@example.com", "name": ' + b"[" * 30000 + b"]" * 30000 + b"}",
    "deep and open": b"[" * 65000,
}

WRONG_TYPES: list[Any] = [None, True, False, 0, 1, -1.5, [], ["Ann"], {}, {"name": "Ann"}]


@pytest.fixture(autouse=True, scope="module")
def _nothing_fails_inside(service: Service, databases: Databases, database: str) -> Any:
    """After all that this module sends: no traceback in the log, and the table as it was made."""
    yield
    assert service.process.poll() is None
    assert "Traceback" not in service.log
    with databases.admin(database) as cursor:
        cursor.execute("SELECT count(*) FROM users WHERE email = 'ann@example.com'")
        assert cursor.fetchone() == (0,)


def send(service: Service, method: str, body: bytes, path: str = "") -> Reply:
    """A write of raw bytes: to `/users`, or to `path`, by default of an id that nobody has."""
    target = "/users" if method == "POST" else path or f"/users/{uuid.uuid4()}"
    return service.call(method, target, body, {"Content-Type": "application/json"})


def field(member: str, value: str) -> bytes:
    """A user whose only fault can be `member`, which has the JSON text `value`."""
    texts = {"email": f'"{new_email()}"', "name": '"Ann"', member: value}
    return ("{" + ", ".join(f'"{key}": {text}' for key, text in texts.items()) + "}").encode()


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_a_body_that_is_not_one_json_document_is_400(
    service: Service, method: str, body: bytes
) -> None:
    path = f"/users/{create_user(service).json()['id']}"
    document = problem(send(service, method, body, path), 400, "malformed-json")
    assert "errors" not in document


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_a_write_without_a_body_is_refused(service: Service, method: str) -> None:
    target = "/users" if method == "POST" else f"/users/{uuid.uuid4()}"
    typed = {"Content-Type": "application/json"}
    problem(service.call(method, target, headers=typed), 400, "malformed-json")


@pytest.mark.parametrize(
    "body", ["[]", "[{}]", '["email", "name"]', '"ann@example.com"', "1", "null", "true", "1e400"]
)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_a_document_that_is_not_an_object_is_refused(
    service: Service, method: str, body: str
) -> None:
    path = f"/users/{create_user(service).json()['id']}"
    document = problem(send(service, method, body.encode(), path), 422, "invalid-user")
    assert invalid_fields(document) == ["body"]


@pytest.mark.parametrize("value", WRONG_TYPES, ids=repr)
@pytest.mark.parametrize("member", ["email", "name"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_a_member_of_another_type_is_refused_by_name(
    service: Service, method: str, member: str, value: Any
) -> None:
    path = f"/users/{create_user(service).json()['id']}"
    reply = send(service, method, field(member, json.dumps(value)), path)
    assert invalid_fields(problem(reply, 422, "invalid-user")) == [member]


@pytest.mark.parametrize(
    "value",
    [
        '"\\u0000"',
        '"A\\u0000B"',
        '"A\\u001bB"',
        '"\\ud800"',
        '"A\\udfffB"',
        '"\\udc00\\ud800"',
        '"ann\\ud83d@example.com"',
        '"ann\\u0000@example.com"',
        "1e400",
        "-1e400",
        "1" * 4000,
        "0." + "1" * 20000,
        "[" * 50 + "]" * 50,
        f'"{"x" * 60000}"',
    ],
    ids=lambda value: value[:24],
)
@pytest.mark.parametrize("member", ["email", "name"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_a_hostile_value_is_refused_by_name(
    service: Service, method: str, member: str, value: str
) -> None:
    path = f"/users/{create_user(service).json()['id']}"
    reply = send(service, method, field(member, value), path)
    assert invalid_fields(problem(reply, 422, "invalid-user")) == [member]


def test_an_integer_of_twenty_thousand_digits_is_not_our_failure(service: Service) -> None:
    """Python refuses to read one past 4300 digits, with a ValueError of its own."""
    reply = send(service, "POST", field("name", "9" * 20000))
    assert invalid_fields(problem(reply, 422, "invalid-user")) == ["name"]


def test_an_escaped_surrogate_pair_is_one_character(service: Service) -> None:
    reply = send(service, "POST", field("name", '"\\ud83d\\ude00"'))
    assert reply.status == 201
    assert reply.json()["name"] == "😀"


@pytest.mark.parametrize(
    "member",
    ["x", "Name", "EMAIL", " name", "", "__proto__", "a.b", "na\0me", "é" * 1000, "\ud800", "$ne"],
    ids=lambda member: ascii(member[:12]),
)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_an_unknown_member_is_refused_by_name(service: Service, method: str, member: str) -> None:
    path = f"/users/{create_user(service).json()['id']}"
    body = {"email": new_email(), "name": "Ann", member: "Ann"}
    reply = send(service, method, json.dumps(body).encode(), path)
    assert invalid_fields(problem(reply, 422, "invalid-user")) == [member]


def test_every_invalid_field_is_named_in_one_answer(service: Service) -> None:
    body = {"email": "nobody", "name": "", "metadata": [], "id": 1, "x": None}
    for method, fields in (
        ("POST", ["email", "id", "metadata", "name", "x"]),
        ("PUT", ["email", "id", "metadata", "name", "x"]),
        ("PATCH", ["email", "id", "metadata", "name", "x"]),
    ):
        path = f"/users/{create_user(service).json()['id']}"
        reply = send(service, method, json.dumps(body).encode(), path)
        assert invalid_fields(problem(reply, 422, "invalid-user")) == fields


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_missing_members_are_named_with_unknown_ones(service: Service, method: str) -> None:
    reply = send(service, method, b'{"mail": "ann@example.com"}')
    assert invalid_fields(problem(reply, 422, "invalid-user")) == ["email", "mail", "name"]


def test_a_refused_write_changes_nothing(service: Service) -> None:
    created = create_user(service)
    path = f"/users/{created.json()['id']}"
    for method in ("PUT", "PATCH"):
        for body in (b'{"name": "Bea"', b'["Bea"]', b'{"name": "Bea", "x": 1}'):
            assert send(service, method, body, path).status in (400, 422)
    read = service.call("GET", path)
    assert (read.json(), read.get("ETag")) == (created.json(), created.get("ETag"))


@pytest.mark.parametrize(
    "name",
    ["'; DROP TABLE users; --", "%s %(x)s %", "$1", "\\", "\\x00", "{0}", "a\u2028b", "\ufeffa"],
    ids=ascii,
)
def test_text_that_means_something_to_others_is_kept_as_it_is(service: Service, name: str) -> None:
    assert create_user(service, name=name).json()["name"] == name


@pytest.mark.parametrize(
    "email", ["%s", "%", "'", "' OR ''='", "a@b.c'--", "\\", "_@example.com", "%@example.com"]
)
def test_an_email_query_is_a_value_and_never_sql_or_a_pattern(service: Service, email: str) -> None:
    reply = service.call("GET", f"/users?email={quote(email)}")
    assert reply.status == 200
    assert reply.json() == {"users": [], "next": None}


@pytest.mark.parametrize("email", ["%00", "a%00@example.com", "%FF", "%ED%A0%80"])
def test_an_email_query_that_no_text_column_can_hold_finds_nobody(
    service: Service, email: str
) -> None:
    reply = service.call("GET", f"/users?email={email}")
    assert reply.status == 200
    assert reply.json() == {"users": [], "next": None}


@pytest.mark.parametrize(
    ("method", "header", "value", "status"),
    [
        # Each took a regular expression of the first version seconds, and longer ones for ever.
        ("POST", "Content-Type", "application/json;" + " " * 2000 + "x", 201),
        (
            "POST",
            "Content-Type",
            "application/json" + "; charset=utf-8" * 2000 + "; charset=x",
            415,
        ),
        ("PUT", "If-Match", '"",' * 16000, 412),
        ("PATCH", "If-Match", '"a"' * 16000, 400),
        ("DELETE", "If-Match", "," * 50000 + "x", 400),
        ("GET", "If-None-Match", '"",' * 16000, 200),
        ("GET", "If-None-Match", '"' * 50000, 400),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_no_header_holds_the_process_up(
    service: Service, method: str, header: str, value: str, status: int
) -> None:
    """Guards against backtracking: it holds the interpreter, and so every other request, up."""
    path = f"/users/{create_user(service).json()['id']}"
    body = {"email": new_email(), "name": "Bea"} if method in ("POST", "PUT", "PATCH") else None
    target = "/users" if method == "POST" else path
    began = time.monotonic()
    reply = service.call(method, target, body, {header: value}, timeout=60)
    assert time.monotonic() - began < 2
    assert reply.status == status


@pytest.mark.parametrize("piece", [",", ";", "a,", "a/b,", "a/b;q=1,", '"', "1 a,", "%41", "\t"])
@pytest.mark.parametrize("name", ["Accept", "Content-Type", "Authorization", "Via", "Connection"])
def test_no_head_takes_long_to_decide_who_answers(name: str, piece: str) -> None:
    """No token has been asked for by then, and nobody else is served meanwhile: a Via of commas
    took eight milliseconds, an Accept of them thirty."""
    environ = {"POSTGRES_URI": "postgresql:///", "UPSTREAM_URL": "http://a"}
    gatehouse = Gatehouse(Settings.from_env(environ))
    value = piece * (65000 // len(piece))

    def decide(target: str) -> float:
        method = "POST" if name == "Content-Type" else "GET"
        head = Head(f"{method} {target} HTTP/1.1\r\nHost: a\r\n{name}: {value}".encode())
        began = time.thread_time()
        gatehouse.admit(head)
        return time.thread_time() - began

    for target in ("/users", "/other"):
        assert min(decide(target) for _ in range(5)) < 0.004


def test_a_via_that_has_the_instance_s_name_in_every_line_is_read_fast() -> None:
    """It was taken apart at each comma, in fourteen milliseconds."""
    environ = {"POSTGRES_URI": "postgresql:///", "UPSTREAM_URL": "http://a"}
    gatehouse = Gatehouse(Settings.from_env(environ))
    line = f"\r\nVia: {gatehouse.rules.name}" + "," * 270 + "a b" * 10
    head = Head(f"GET / HTTP/1.1\r\nHost: a{line * 195}".encode())

    def seconds() -> float:
        began = time.thread_time()
        gatehouse.admit(head)
        return time.thread_time() - began

    assert min(seconds() for _ in range(5)) < 0.004


HARD_TO_READ = {
    "percent signs": ("/" + "%" * 65000, ""),
    "percent signs in an owned path": ("/users/" + "%" * 65000, ""),
    "an encoded path": ("/%41%42%2f" * 6500, ""),
    "a name of marks": ("/", "\r\n" + "_" * 65000 + ": a"),
    "a scheme and commas": ("/", "\r\nAuthorization: xntlm" + "," * 65000),
    "addresses": ("/users", "\r\nX-Forwarded-For: ::1" + ",::1" * 16000),
    "addresses of Forwarded": ("/users", "\r\nForwarded: for=::1" + ",for=::1" * 8000),
    "schemes": ("/", "\r\nAuthorization: xntlm" + ",ntlmx" * 10000),
}


@pytest.mark.parametrize("what", HARD_TO_READ)
def test_no_head_takes_long_to_read_and_to_send_on(what: str) -> None:
    """64 KB of percent signs took twenty milliseconds, in which nobody else was served."""
    target, more = HARD_TO_READ[what]
    environ = {"POSTGRES_URI": "postgresql:///", "UPSTREAM_URL": "http://a"}
    gatehouse = Gatehouse(Settings.from_env(environ))

    def seconds() -> float:
        began = time.thread_time()
        head = Head(f"GET {target} HTTP/1.1\r\nHost: a{more}".encode())
        with contextlib.suppress(Unauthorized):
            gatehouse.admit(head)
        gatehouse.rules.request_head(head, "127.0.0.1", None)
        authenticates_connection(head.values.get("authorization", ()))
        return time.thread_time() - began

    assert min(seconds() for _ in range(5)) < 0.004


@given(name=st.text(max_size=210))
@PROPERTY
def test_any_text_is_kept_as_a_name_or_refused_by_name(service: Service, name: str) -> None:
    body = {"email": new_email(), "name": name}
    reply = service.call("POST", "/users", body)
    if reply.status == 201:
        assert reply.json()["name"] == name.strip()
        path = f"/users/{reply.json()['id']}"
        assert service.call("GET", path).json() == reply.json()
    else:
        assert invalid_fields(problem(reply, 422, "invalid-user")) == ["name"]


@given(email=st.one_of(st.text(max_size=60), st.emails()))
@PROPERTY
def test_any_text_is_kept_as_an_email_or_refused_by_name(service: Service, email: str) -> None:
    path = f"/users/{uuid.uuid4()}"
    reply = service.call("PUT", path, {"email": email, "name": "Ann"})
    if reply.status == 201:
        normalised = validate_email(email, check_deliverability=False, strict=True).normalized
        assert reply.json()["email"] == normalised
        found = service.call("GET", f"/users?email={quote(email, safe='')}")
        assert found.json()["users"] == [reply.json()]
        assert service.call("DELETE", path).status == 204
    else:
        assert invalid_fields(problem(reply, 422, "invalid-user")) == ["email"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["email", "name", "id", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(document=JSON)
@PROPERTY
def test_no_json_document_is_a_failure_of_ours(service: Service, document: Any) -> None:
    reply = send(service, "POST", json.dumps(document, allow_nan=False).encode())
    if isinstance(document, dict):
        fields = invalid_fields(problem(reply, 422, "invalid-user"))
        assert set(fields) >= set(document) - {"email", "name"}
        assert set(fields) <= set(document) | {"email", "name"}
    else:
        assert invalid_fields(problem(reply, 422, "invalid-user")) == ["body"]


@given(body=st.binary(max_size=60))
@PROPERTY
def test_no_bytes_are_a_failure_of_ours(service: Service, body: bytes) -> None:
    assert send(service, "POST", body).status in (400, 422)


def test_a_row_that_never_ends_takes_no_memory(service: Service) -> None:
    """Each of its lines ends a cell and begins the next. All were kept: twice what was sent."""
    lines = b'x","\n' * 13000
    with service.client(timeout=60) as client:
        client.send(
            request(b"POST /users HTTP/1.1", b"Content-Type: text/csv", CHUNKED)
            + chunked(b'email,name\n"')[:-5]
        )
        before = service.memory
        for _ in range(128):
            client.send(chunked(lines)[:-5])
        client.send(b"0\r\n\r\n")
        reply = client.reply()
        assert service.memory - before < 8 << 20
    first, *_, counts = [json.loads(line) for line in reply.body.splitlines()]
    assert (first["line"], first["status"]) == (2, 400)
    assert "longer than" in first["detail"]
    assert counts["rows"] == counts["refused"] == 1


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_megabyte_of_empty_lines_is_read_in_time(service: Service, framing: str) -> None:
    """Each line was taken off the front of what was left by a copy of all of it: 15 seconds of
    processor time, in which nobody else was served."""
    data, line = b"\n" * (1 << 20), b"Content-Length: %d" % (1 << 20)
    if framing == "chunked":
        data, line = chunked(data), CHUNKED
    kind = b"Content-Type: application/x-ndjson"
    used = sum(service.processes[0].cpu_times()[:2])
    reply = service.exchange(
        request(b"POST /users HTTP/1.1", kind, line, body=data), "POST", timeout=60
    )
    assert reply.json()["rows"] == 0
    assert sum(service.processes[0].cpu_times()[:2]) - used < 5


def test_an_export_that_nobody_reads_holds_no_connection_to_the_database(
    service: Service, databases: Databases, database: str
) -> None:
    """Nor a snapshot, which would keep PostgreSQL from cleaning up for as long as it lasts."""
    with databases.admin(database) as cursor:
        cursor.execute(
            "INSERT INTO users (id, email, name) SELECT gen_random_uuid(),"
            " 'export' || n || '@example.com', repeat('x', 200) FROM generate_series(1, 40000) n"
        )
    for accept in ("text/csv", "application/x-ndjson"):
        with RawClient(service.port, room=4096) as client:
            client.send(request(b"GET /users HTTP/1.1", b"Accept: " + accept.encode()))
            assert client.head().startswith(b"HTTP/1.1 200")

            def waits() -> bool:
                pool = service.call("GET", "/health").json()["database"]["pool"]
                with databases.admin(database) as cursor:
                    cursor.execute(
                        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                        " AND state <> 'idle' AND pid <> pg_backend_pid()"
                    )
                    [(busy,)] = cursor.fetchall()
                return bool(pool["in_use"] == 0 and busy == 0)

            # It is seen many times in a row: between two statements an export holds none either.
            for _ in range(20):
                wait_for(waits)
            held = [waits() for _ in range(20)]
            assert all(held), held


def test_a_page_of_the_largest_users_that_nobody_reads_costs_its_own_bytes(
    service: Service, databases: Databases, database: str
) -> None:
    with databases.admin(database) as cursor:
        cursor.execute(
            "INSERT INTO users (id, email, name, metadata) SELECT"
            " ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid,"
            " 'large' || n || '@example.com', 'Large', jsonb_build_object('a', repeat('x', 16370))"
            " FROM generate_series(1, 500) n"
        )
    asks = request(b"GET /users?limit=500 HTTP/1.1")
    with service.client(timeout=60) as client:
        client.send(asks)
        size = len(client.reply().body)
    assert size > 500 * 16384
    before = service.memory
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(RawClient(service.port, timeout=60, room=4096)) for _ in range(20)
        ]
        for client in readers:
            client.send(asks)
        for client in readers:
            assert client.head().startswith(b"HTTP/1.1 200")
        # A connection's own buffer in libpq keeps the size of the largest page, and while a page is
        # made there is one more.
        buffers = 9 * size + (16 << 20)
        assert service.memory - before < len(readers) * size + buffers
    wait_for(lambda: service.memory - before < buffers, 5, "the memory")
    with databases.admin(database) as cursor:
        cursor.execute("DELETE FROM users WHERE name = 'Large'")
