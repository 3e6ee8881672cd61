"""Many users at once: what an import does with each row, and what an export gives."""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import json
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
import pytest

from services.fields import NAMES, Field
from services.transfer import COLUMNS, Entry
from tests.harness import (
    Databases,
    RawClient,
    Reply,
    ScriptedUpstream,
    Service,
    chunked,
    create_user,
    invalid_fields,
    new_email,
    problem,
    request,
    wait_for,
)
from wire.rows import MAX_LINE, READ_BYTES, Columns, Lines, rows_of

CSV, NDJSON = "text/csv", "application/x-ndjson"
SUMMARY = ("rows", "created", "replaced", "unchanged", "refused")
# Types of columns whose values are no strings in JSON.
NO_STRINGS = {"jsonb", "boolean", "smallint", "integer", "bigint", "real", "double precision"}
NO_STRINGS |= {"numeric"}


def send(service: Service, body: str | bytes, kind: str = CSV) -> Reply:
    data = body.encode() if isinstance(body, str) else body
    return service.call("POST", "/users", data, {"Content-Type": kind}, timeout=120)


def told(reply: Reply) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """The lines of an import's answer, and its counts in the order of SUMMARY."""
    assert reply.status == 200, reply
    assert reply.get("Content-Type") == NDJSON and reply.complete
    assert reply.body.endswith(b"\n")
    *lines, counts = [json.loads(line) for line in reply.body.splitlines()]
    assert tuple(counts) == SUMMARY
    assert counts["rows"] == len(lines) == sum(counts[name] for name in SUMMARY[1:])
    return lines, tuple(counts.values())


def export(service: Service, kind: str, query: str = "") -> Reply:
    reply = service.call("GET", f"/users{query}", headers={"Accept": kind}, timeout=120)
    assert reply.status == 200, reply
    assert (reply.get("Content-Type") or "").startswith(kind)
    assert reply.get("Vary") == "Accept"
    return reply


@pytest.fixture
def alone(databases: Databases, upstream: ScriptedUpstream) -> Iterator[Service]:
    """A service on an empty database of its own."""
    with Service(POSTGRES_URI=databases.create(), UPSTREAM_URL=upstream.url) as running:
        yield running


def test_imports_of_the_same_new_users_in_other_orders_do_not_wait_for_each_other(
    databases: Databases, upstream: ScriptedUpstream
) -> None:
    """They met in deadlocks, and hundreds of rows were 503."""
    database = databases.create()
    emails = sorted(new_email() for _ in range(99))
    with (
        Service(POSTGRES_URI=database, UPSTREAM_URL=upstream.url) as service,
        databases.admin(database) as cursor,
        databases.admin(database) as looking,
        ThreadPoolExecutor(2) as threads,
    ):
        # Both have begun, and neither can end, until the one in the middle is free.
        cursor.execute("BEGIN")
        cursor.execute(
            "INSERT INTO users (id, email, name) VALUES (%s, %s, 'Bob')",
            (str(uuid.uuid4()), emails[49]),
        )
        orders = [emails, emails[::-1]]
        bodies = ["\n".join(["email,name", *(f"{one},Ann" for one in order)]) for order in orders]
        replies = [threads.submit(send, service, body) for body in bodies]

        def waiting() -> bool:
            looking.execute(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            return bool(looking.fetchone() == (2,))

        wait_for(waiting, 10, "both to wait")
        cursor.execute("ROLLBACK")
        outcomes = sorted(told(reply.result())[1] for reply in replies)
        assert outcomes == [(99, 0, 0, 0, 99), (99, 99, 0, 0, 0)]
        assert "40P01" not in service.log


def test_a_spreadsheet_is_imported_and_found(service: Service) -> None:
    first, second = new_email(), new_email()
    body = f'name,email,metadata\r\n"Lee, Ann",{first},"{{""plan"": ""pro""}}"\r\nBob,{second},\r\n'
    lines, counts = told(send(service, body))
    assert counts == (2, 2, 0, 0, 0)
    assert [(line["line"], line["status"]) for line in lines] == [(2, 201), (3, 201)]
    ann = service.call("GET", f"/users/{lines[0]['id']}").json()
    assert (ann["name"], ann["email"], ann["metadata"]) == ("Lee, Ann", first, {"plan": "pro"})
    assert service.call("GET", f"/users/{lines[1]['id']}").json()["metadata"] == {}


def test_users_are_listed_in_the_order_of_the_file(alone: Service) -> None:
    names = [f"User {number:04}" for number in range(1200)]
    body = "name,email\n" + "".join(f"{name},u{name[5:]}@example.com\n" for name in names)
    told(send(alone, body))
    rows = csv.DictReader(io.StringIO(export(alone, CSV).body.decode()))
    assert [row["name"] for row in rows] == names


def test_lines_of_json_are_imported(service: Service) -> None:
    known, email = str(uuid.uuid4()), new_email()
    rows = [{"email": new_email(), "name": "Ann"}, {"id": known, "email": email, "name": "Bob"}]
    body = "\n".join(json.dumps(row) for row in rows)
    lines, counts = told(send(service, body, NDJSON))
    assert counts == (2, 2, 0, 0, 0)
    assert lines[1] == {"line": 2, "status": 201, "id": known}
    lines, counts = told(send(service, body, NDJSON))
    assert counts == (2, 0, 0, 1, 1)
    assert lines[0]["type"] == "urn:gatehouse:email-taken" and lines[0]["detail"]
    assert lines[1] == {"line": 2, "status": 200, "id": known}
    rows[1]["name"] = "Robert"
    lines, counts = told(send(service, json.dumps(rows[1]), NDJSON))
    assert counts == (1, 0, 1, 0, 0)
    assert service.call("GET", f"/users/{known}").json()["name"] == "Robert"


BAD_ROWS = {
    "no JSON": ('{"email": ', 400, "malformed-json"),
    "no object": ("[]", 422, "invalid-user"),
    "two documents": ("{} {}", 400, "malformed-json"),
    "not UTF-8": (b'{"email": "zo\xeb@example.com", "name": "Z"}', 400, "malformed-json"),
    "a bad address": ('{"email": "ann", "name": "Ann"}', 422, "invalid-user"),
    "no name": ('{"email": "ann@example.com"}', 422, "invalid-user"),
    "an unknown member": ('{"email": "a@example.com", "name": "A", "x": 1}', 422, "invalid-user"),
    "a bad id": ('{"id": "7", "email": "a@example.com", "name": "A"}', 422, "invalid-user"),
    "NUL in metadata": (
        '{"email": "a@example.com", "name": "A", "metadata": {"a": "\\u0000"}}',
        422,
        "invalid-user",
    ),
    "a line of a megabyte": ('{"email": "' + "a" * 1_000_000 + '"}', 400, "malformed-json"),
}


@pytest.mark.parametrize(("row", "status", "name"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_stops_no_other_and_is_named_by_its_line(
    service: Service, row: str | bytes, status: int, name: str
) -> None:
    # Before it there is more than is looked at before anything is written.
    filler = b"\n" * (1 << 20) if name == "malformed-json" and isinstance(row, bytes) else b""
    good = [json.dumps({"email": new_email(), "name": "Ann"}).encode() for _ in range(2)]
    bad = row if isinstance(row, bytes) else row.encode()
    lines, counts = told(send(service, filler + b"\n".join([good[0], bad, good[1]]), NDJSON))
    assert counts == (3, 2, 0, 0, 1)
    assert [line["status"] for line in lines] == [201, status, 201]
    assert lines[1]["line"] == len(filler) + 2
    assert lines[1]["type"] == f"urn:gatehouse:{name}"
    assert ("errors" in lines[1]) == (status == 422)
    assert " line 1" not in lines[1].get("detail", "") and " line 2" not in lines[1].get(
        "detail", ""
    )


BAD_CELLS = {
    "a cell too few": ("Ann", 400),
    "a cell too many": ("Ann,{email},,,", 400),
    "a quote in the middle": ('Ann,"{email}"x,', 400),
    "a half row at the end": ('Ann,"{email}', 400),
    "metadata that is no JSON": ("Ann,{email},{{", 422),
    "metadata that is no object": ("Ann,{email},[]", 422),
    "no name": (",{email},", 422),
    "a bad address": ("Ann,ann,", 422),
    "an address in two lines": ('Ann,"a\n@example.com",', 422),
}


@pytest.mark.parametrize(("row", "status"), BAD_CELLS.values(), ids=BAD_CELLS)
def test_a_bad_row_of_a_spreadsheet_is_named_by_its_line(
    service: Service, row: str, status: int
) -> None:
    row = row.format(email=new_email())
    body = f'name,email,metadata\n"A\nB",{new_email()},\nAnn,{new_email()},\n{row}'
    lines, counts = told(send(service, body))
    # A name in two lines is a bad row too; what follows it is counted on.
    assert counts == (3, 1, 0, 0, 2)
    assert [line["line"] for line in lines] == [2, 4, 5]
    assert lines[2]["status"] == status and lines[2]["detail"]


HEADERS = {
    "an unknown column": ("email,name,colour\n", ["colour"]),
    "a column twice": ("email,name,email\n", ["email"]),
    "a column that is missing": ("name\n", ["email"]),
    "both missing, one unknown": ("mail\n", ["email", "mail", "name"]),
    "no header": ("ann@example.com,Ann\n", ["Ann", "ann@example.com", "email", "name"]),
    "nothing": ("", ["email", "name"]),
    "semicolons": ("email;name\n", ["email", "email;name", "name"]),
}


WIDE = "x" * 131073
OPEN = {
    "a long line": (f"{WIDE}\n", 400),
    "a long line with marks": (f'{WIDE}""\n', 400),
    "a long cell": (("y" * 80000 + "\n") * 2, 422),
    "a long row": (("y" * 80000 + "\n") * 4, 400),
    "no UTF-8": ("\udcff\n", 400),
}


@pytest.mark.parametrize(("begin", "status"), OPEN.values(), ids=OPEN)
def test_no_line_of_a_cell_that_is_refused_is_taken_for_a_row(
    service: Service, begin: str, status: int
) -> None:
    """The rest of the cell was read as rows: one of them was a user that the file does not have."""
    first, last = new_email(), new_email()
    # So large that it is not looked at whole before.
    filler = f"@,{'x' * 1000}\n" * 1500
    cell = f"{begin}evil@example.com,Eve\n"
    body = f'email,name\n{filler}{first},A\nb@example.com,"{cell}"\n{last},C\n'
    lines, counts = told(send(service, body.encode(errors="surrogateescape")))
    assert [line["status"] for line in lines[-3:]] == [201, status, 201]
    assert counts[1] == 2
    assert service.call("GET", "/users?email=evil@example.com").json()["users"] == []


@pytest.mark.parametrize(
    "row", [b'a@b.c,19" R\xf6hre', b'5" nail,"x"y', b'a@b.c,5" n\rail'], ids=["utf-8", "mark", "cr"]
)
def test_a_mark_within_a_cell_opens_none(service: Service, row: bytes) -> None:
    """The rows behind it were passed over, and nothing told of them."""
    addresses = [new_email() for _ in range(3)]
    filler = f"@,{'x' * 1000}\n" * 1500
    rows = "".join(f"{address},A\n" for address in addresses)
    lines, _ = told(send(service, f"email,name\n{filler}".encode() + row + b"\n" + rows.encode()))
    assert [line["status"] for line in lines[-4:]] == [400, 201, 201, 201]


@pytest.mark.parametrize("tail", [",", ',"', ',""', ',"""', 'a"', 'a""', ',"a"', ',"a""'])
@pytest.mark.parametrize("rest", ["", '"', "z", '"z', ',"', '""'])
def test_marks_are_followed_where_a_long_line_is_cut(tail: str, rest: str) -> None:
    """A line that is too long is dropped piece by piece: the first ends behind `tail`."""
    assert READ_BYTES > MAX_LINE
    line = "b".ljust(READ_BYTES - len("a,b\n") - len(tail), "x") + tail + rest + "y\n"
    follows = "c,d\n"
    data = f"a,b\n{line}{follows * 3}".encode()
    environ = {"wsgi.input": io.BytesIO(data), "wsgi.input_terminated": True}
    columns = Columns(names=("a", "b"), required=("a",), objects=())
    found = list(rows_of("text/csv", Lines(environ), columns))
    # Where the csv module finds the cell closed, its rows behind it have to be there.
    expected = list(csv.reader(io.StringIO(line + follows * 3)))
    assert [row.members for row in found[1:]] == [{"a": "c", "b": "d"}] * (len(expected) - 1)
    assert found[0].problem is not None


def test_a_row_that_is_not_closed_is_the_last(service: Service) -> None:
    address = new_email()
    body = f'email,name\n{address},A\nb@example.com,"B\n' + "c@example.com,C\n" * 20000
    lines, counts = told(send(service, body))
    assert [line["status"] for line in lines] == [201, 400]
    assert "quotation mark" in lines[1]["detail"]
    assert lines[1]["detail"].endswith("The row goes on to line 20003.")


@pytest.mark.parametrize(("header", "fields"), HEADERS.values(), ids=HEADERS)
def test_a_file_without_the_right_columns_is_refused_before_anything_is_written(
    alone: Service, header: str, fields: list[str]
) -> None:
    reply = send(alone, header + f"{new_email()},Ann,x\n" if header else "")
    assert invalid_fields(problem(reply, 422, "invalid-user")) == fields
    assert alone.call("GET", "/users").json()["users"] == []


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_a_file_in_another_encoding_is_refused_before_anything_is_written(
    alone: Service, encoding: str
) -> None:
    rows = [f"{new_email()},Ann\n" for _ in range(3000)]
    body = "email,name\n" + "".join(rows) + f"{new_email()},Zo\u00eb\n"
    reply = send(alone, body.encode(encoding))
    assert "UTF-8" in problem(reply, 400, "bad-request")["detail"]
    assert alone.call("GET", "/users").json()["users"] == []


def test_a_short_file_in_chunks_is_looked_at_as_a_whole_too(alone: Service) -> None:
    """Its first row was written, for the second had not arrived when the first was read."""
    lines = [
        b"email,name\n",
        f"{new_email()},Ann\n".encode(),
        f"{new_email()},Zo\u00eb\n".encode("latin-1"),
    ]
    with alone.client() as client:
        head = [b"Content-Type: text/csv", b"Transfer-Encoding: chunked"]
        client.send(request(b"POST /users HTTP/1.1", *head))
        for line in lines:
            client.send(chunked(line)[:-5])
        client.send(b"0\r\n\r\n")
        reply = client.reply("POST")
    assert "UTF-8 (line 3)" in problem(reply, 400, "bad-request")["detail"]
    assert alone.call("GET", "/users").json()["users"] == []


def test_a_byte_order_mark_and_any_order_and_blank_lines_are_taken(service: Service) -> None:
    body = f"\ufeffid,updated_at,name,email\r\n\r\n,whenever,Ann,{new_email()}\r\n"
    lines, counts = told(send(service, body))
    assert counts == (1, 1, 0, 0, 0)
    assert lines[0]["line"] == 3
    body = "\ufeff" + json.dumps({"email": new_email(), "name": "Ann"})
    assert told(send(service, body, NDJSON))[1] == (1, 1, 0, 0, 0)


def test_a_file_may_say_that_it_has_a_header(service: Service) -> None:
    """RFC 4180 section 3: the media type's other parameter."""
    body = f"email,name\n{new_email()},Ann\n"
    assert told(send(service, body, 'text/csv; header=present; charset="UTF-8"'))[1][1] == 1
    reply = send(service, body, "text/csv; header=present; charset=latin-1")
    problem(reply, 415, "unsupported-media-type")


def test_lines_that_end_in_cr_alone_are_told_as_that(alone: Service) -> None:
    reply = send(alone, f"email,name\r{new_email()},Ann\r")
    detail = problem(reply, 400, "bad-request")["detail"]
    assert detail == "The header line is not CSV: a line must end in LF or CRLF."
    assert alone.call("GET", "/users").json()["users"] == []


def test_a_file_with_a_header_alone_is_no_rows(service: Service) -> None:
    assert told(send(service, "email,name\n"))[1] == (0, 0, 0, 0, 0)
    assert told(send(service, "", NDJSON))[1] == (0, 0, 0, 0, 0)


def test_a_row_that_comes_twice_is_one_user(service: Service) -> None:
    email, user = new_email(), str(uuid.uuid4())
    body = f"email,name\n{email},Ann\n{email.upper()},Bob\n"
    lines, counts = told(send(service, body))
    assert counts == (2, 1, 0, 0, 1) and lines[1]["status"] == 409
    body = f"id,email,name\n{user},{user}@example.com,Ann\n{user.upper()},{user}@example.com,Bob\n"
    lines, counts = told(send(service, body))
    assert counts == (2, 1, 1, 0, 0)
    assert service.call("GET", f"/users/{user}").json()["name"] == "Bob"


def test_addresses_may_change_hands_within_a_file(service: Service) -> None:
    """Each row is a call of its own, in order, though several hundred are one statement."""
    one, two = (create_user(service).json() for _ in range(2))
    spare = new_email()
    rows = [
        one | {"email": spare},
        two | {"email": one["email"]},
        {"email": two["email"], "name": "Cy"},
        {"email": spare, "name": "Dee"},
    ]
    lines, counts = told(send(service, "\n".join(map(json.dumps, rows)), NDJSON))
    assert [line["status"] for line in lines] == [200, 200, 201, 409]
    assert counts == (4, 1, 2, 0, 1)


def test_an_id_that_is_new_with_an_address_that_is_taken_is_refused(service: Service) -> None:
    taken = create_user(service).json()
    row = {"id": str(uuid.uuid4()), "email": taken["email"], "name": "Bob"}
    lines, counts = told(send(service, json.dumps(row), NDJSON))
    assert counts == (1, 0, 0, 0, 1) and lines[0]["status"] == 409
    assert service.call("GET", f"/users/{taken['id']}").json() == taken


def some_users(service: Service, count: int) -> None:
    rows = [
        {
            "email": f"{number}.{new_email()}",
            "name": f'Nö "{number}", x',
            "metadata": {"n": number, "list": [1.50, "a,b\n", None]},
        }
        for number in range(count)
    ]
    assert told(send(service, "\n".join(map(json.dumps, rows)), NDJSON))[1][1] == count


def all_users(service: Service) -> list[dict[str, Any]]:
    body = export(service, NDJSON).body
    return [json.loads(line) for line in body.splitlines()]


@pytest.mark.parametrize("kind", [CSV, NDJSON])
def test_importing_an_export_elsewhere_makes_the_same_users(
    alone: Service, databases: Databases, upstream: ScriptedUpstream, kind: str
) -> None:
    some_users(alone, 1203)  # not a multiple of a batch
    users = all_users(alone)
    assert [user["id"] for user in users] == sorted(user["id"] for user in users)
    assert len(users) == 1203
    body = export(alone, kind).body
    with Service(POSTGRES_URI=databases.create(), UPSTREAM_URL=upstream.url) as other:
        assert told(send(other, body, kind))[1] == (1203, 1203, 0, 0, 0)
        times = {"created_at": 0, "updated_at": 0}
        assert [user | times for user in all_users(other)] == [user | times for user in users]
        assert told(send(other, body, kind))[1] == (1203, 0, 0, 1203, 0)
    assert told(send(alone, body, kind))[1] == (1203, 0, 0, 1203, 0)


def default_in_json(field: Field) -> Any:
    """What a user has in JSON if the field is not given."""
    return json.loads(field.default) if field.kind == "jsonb" else field.default


def value_in_json(name: str, cell: str) -> Any:
    """What a cell of an export is in JSON."""
    field = NAMES.get(name)
    if field is None:
        return cell
    if not cell:
        return default_in_json(field)
    return json.loads(cell) if field.kind in NO_STRINGS else cell


def test_an_import_is_whole_though_its_client_has_ended_its_sending_half(alone: Service) -> None:
    """It was cut if the end was seen before the last bytes were read, which waited their turn."""
    pad = "x" * 4000
    rows = [{"email": new_email(), "name": "Ann", "metadata": {"pad": pad}} for _ in range(500)]
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    fields = [b"Content-Type: " + NDJSON.encode(), b"Content-Length: %d" % len(body)]
    with RawClient(alone.port, 60) as client:
        client.send(request(b"POST /users HTTP/1.1", *fields, body=body))
        client.sock.shutdown(socket.SHUT_WR)
        assert told(client.reply())[1] == (500, 500, 0, 0, 0)


@pytest.mark.parametrize("kind", [CSV, NDJSON])
def test_a_length_of_thousands_of_digits_is_refused(service: Service, kind: str) -> None:
    """Python makes no number of them: it was a 500, and a traceback in the log."""
    fields = [b"Content-Type: " + kind.encode(), b"Content-Length: " + b"1" * 5000]
    problem(service.exchange(request(b"POST /users HTTP/1.1", *fields)), 413, "body-too-large")


def test_a_length_may_begin_with_zeros(service: Service) -> None:
    """The application took more than 18 digits for no length; the server counts without zeros."""
    body = json.dumps({"email": new_email(), "name": "Ann"}).encode()
    length = b"Content-Length: " + str(len(body)).zfill(24).encode()
    kind = b"Content-Type: application/json"
    assert service.exchange(request(b"POST /users HTTP/1.1", kind, length, body=body)).status == 201


@pytest.mark.parametrize("count", [0, 1, 500, 1000])
def test_an_export_is_all_users(alone: Service, count: int) -> None:
    some_users(alone, count) if count else None
    text = export(alone, CSV).body.decode()
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    assert header[:4] == ["id", "email", "name", "metadata"]
    assert header == ["id", *NAMES, "created_at", "updated_at"]
    users = [
        {name: value_in_json(name, cell) for name, cell in zip(header, row, strict=True)}
        for row in rows
    ]
    assert users == all_users(alone)
    assert len(users) == count
    assert text.endswith("\r\n")


def test_an_export_is_of_those_that_match(service: Service) -> None:
    user = create_user(service, name=f"Zed {uuid.uuid4().hex}").json()
    word = user["name"].split()[1].upper()
    assert [json.loads(export(service, NDJSON, f"?q={word}").body)] == [user]
    assert export(service, CSV, f"?email={user['email']}").body.count(b"\r\n") == 2
    assert export(service, NDJSON, f"?after={'f' * 8}-ffff-ffff-ffff-{'f' * 12}").body == b""
    for query in ("limit=5", "count=true", "x=1"):
        reply = service.call("GET", f"/users?{query}", headers={"Accept": CSV})
        problem(reply, 422, "invalid-query")


def test_what_is_asked_for_may_be_one_of_several(service: Service) -> None:
    for accept, kind in {
        "": "application/json",
        "*/*": "application/json",
        "text/csv, */*;q=0.1": "text/csv",
        "text/csv;q=0.5, application/json": "application/json",
        "text/*": "text/csv",
        "application/*": "application/json",
        "image/png": "application/json",
        "application/x-ndjson": "application/x-ndjson",
        "text/csv;q=0": "application/json",
    }.items():
        reply = service.call("GET", "/users?q=nobody-has-this", headers={"Accept": accept})
        assert (reply.get("Content-Type") or "").split(";")[0] == kind, accept


def test_an_export_of_a_dead_database_is_503(start: Any) -> None:
    service = start()
    for kind in (CSV, NDJSON):
        reply = service.call("GET", "/users", headers={"Accept": kind})
        problem(reply, 503, "database-unavailable")


def test_a_dead_database_refuses_each_row_of_an_import(start: Any) -> None:
    lines, counts = told(send(start(), "email,name\na@example.com,A\nb,B\n"))
    assert counts == (2, 0, 0, 0, 2)
    assert [line["status"] for line in lines] == [503, 422]


@pytest.mark.parametrize("descending", [False, True])
def test_a_constraint_of_the_operators_own_refuses_the_second_row(
    alone: Service, databases: Databases, descending: bool
) -> None:
    """They are not created in the order of the file."""
    with databases.admin(alone.environ["POSTGRES_URI"]) as cursor:
        cursor.execute("CREATE UNIQUE INDEX one_of_a_name ON users (name) WHERE name = 'Bob'")
    names = ("Ann", "Bob", "Cy", "Bob", "Dee")
    emails = sorted((new_email() for _ in names), reverse=descending)
    rows = [f"{email},{name}\n" for email, name in zip(emails, names, strict=True)]
    lines, _ = told(send(alone, "email,name\n" + "".join(rows)))
    assert [line["status"] for line in lines] == [201, 201, 201, 409, 201]


def test_rows_that_are_replaced_are_locked_in_one_order(alone: Service) -> None:
    """Two imports of one list, one of them reversed, waited for each other."""
    uri = alone.environ["POSTGRES_URI"]
    kept = sorted(str(uuid.uuid4()) for _ in range(10))
    emails = {user: new_email() for user in kept}
    for user in reversed(kept):  # PostgreSQL may go through them as they are on the disk, too.
        body = {"email": emails[user], "name": "Ann"}
        assert alone.call("PUT", f"/users/{user}", body).status == 201
    rows = [
        json.dumps({"id": user, "email": emails[user], "name": "Bea"}) for user in reversed(kept)
    ]
    lock = "SELECT FROM users WHERE id = %s FOR UPDATE NOWAIT"
    with (
        contextlib.closing(psycopg2.connect(uri)) as holder,
        contextlib.closing(psycopg2.connect(uri)) as other,
        ThreadPoolExecutor(1) as threads,
    ):
        holder.cursor().execute(lock, kept[:1])
        sent = threads.submit(send, alone, "\n".join(rows) + "\n", NDJSON)
        waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        watch = other.cursor()

        def waits() -> bool:
            watch.execute(waiting)
            other.rollback()
            return watch.rowcount == 1

        wait_for(waits, 5, "the import to wait for the first")
        for user in kept[1:]:
            watch.execute(lock, [user])  # Raises LockNotAvailable if the import has it already.
        other.rollback()
        holder.rollback()
        assert told(sent.result())[1] == (10, 0, 10, 0, 0)


def test_a_client_without_a_token_imports_nothing(start: Any, database: str) -> None:
    service = start(POSTGRES_URI=database, USERS_TOKEN="t")
    problem(send(service, "email,name\n"), 401, "unauthorized")


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_flat_memory_and_less_than_a_minute(alone: Service) -> None:
    import psutil

    tag = uuid.uuid4().hex[:8]
    header = "id,email,name,metadata\n"
    rows = "".join(
        f'{uuid.uuid4()},{tag}.{n}@example.com,User {n},"{{""plan"": ""pro"", ""n"": {n}}}"\n'
        for n in range(100_000)
    )
    process = psutil.Process(alone.process.pid)
    worker = (process.children() or [process])[0]
    assert told(send(alone, header + rows[: rows.index("\n") + 1]))[1][1] == 1
    before = worker.memory_info().rss
    lines, counts = told(send(alone, header + rows))
    assert counts == (100_000, 99_999, 0, 1, 0)
    assert len(lines) == 100_000
    del lines
    assert len(export(alone, CSV).body) > 10_000_000
    # The old server keeps what a client has not read yet, about 20 MB here.
    assert worker.memory_info().rss - before < 100 << 20


@pytest.mark.parametrize("kind", [CSV, NDJSON])
def test_an_export_has_who_was_there_throughout_once_while_users_change(
    alone: Service, databases: Databases, kind: str
) -> None:
    """Some 24 MB, of which a client takes one, and the rest when nearly everything has changed."""
    import psutil

    uri = alone.environ["POSTGRES_URI"]
    with databases.admin(uri) as cursor:
        cursor.execute(
            "INSERT INTO users (id, email, name, metadata) SELECT gen_random_uuid(),"
            " n || '@example.com', 'Ann', jsonb_build_object('pad', repeat(md5(n::text), 125))"
            " FROM generate_series(1, 6000) n"
        )
    process = psutil.Process(alone.process.pid)
    worker = (process.children() or [process])[0]
    assert alone.call("GET", "/users", headers={"Accept": kind}).complete
    before = worker.memory_info().rss
    client = RawClient(alone.port, 60, room=65536)
    client.send(f"GET /users HTTP/1.1\r\nHost: a\r\nAccept: {kind}\r\n\r\n".encode())
    while len(client.buffer) < 1 << 20:
        assert client._more()
    with databases.admin(uri) as cursor:
        cursor.execute("DELETE FROM users WHERE right(id::text, 1) IN ('0', '1')")
        cursor.execute("UPDATE users SET name = 'Bob', updated_at = now()")
        cursor.execute(
            "INSERT INTO users (id, email, name) SELECT gen_random_uuid(),"
            " n || '@example.org', 'Cy' FROM generate_series(1, 1000) n"
        )
        cursor.execute("SELECT id::text FROM users WHERE name = 'Bob'")
        throughout = {user for (user,) in cursor.fetchall()}
    after = worker.memory_info().rss
    reply = client.reply()
    assert reply.complete
    text = reply.body.decode()
    if kind == CSV:
        users = list(csv.DictReader(io.StringIO(text, newline="")))
    else:
        users = [json.loads(line) for line in text.splitlines()]
    ids = [user["id"] for user in users]
    assert ids == sorted(set(ids))
    assert throughout <= set(ids)
    assert {"Ann", "Bob", "Cy"} == {user["name"] for user in users}
    assert max(after, worker.memory_info().rss) - before < 16 << 20


@pytest.mark.slow
def test_who_waits_for_eight_slow_transfers_is_told_so_and_leaves_nothing_behind(
    alone: Service,
) -> None:
    """A ninth import got no answer for as long as eight exports were read slowly. One that gave up
    left its body behind, or was carried out when nobody knew of it any more."""
    post = b"POST /users HTTP/1.1"
    slow = [alone.client() for _ in range(8)]
    for client in slow:
        lines = [b"Content-Type: text/csv", b"Content-Length: 1000"]
        client.send(request(post, *lines, b"Expect: 100-continue"))
        assert client.head().startswith(b"HTTP/1.1 100 "), "it comes before all that ask later"
    row = b"email,name\nann@example.com,Ann\n"
    lines = [b"Content-Type: text/csv", b"Content-Length: %d" % len(row)]
    with alone.client() as leaving:
        leaving.send(request(post, *lines, body=row))
        assert alone.call("GET", "/users").json()["users"] == []
    reply = send(alone, row)
    assert "imports and exports" in problem(reply, 503, "database-unavailable")["detail"]
    with alone.client() as patient:
        patient.send(request(b"GET /users HTTP/1.1", b"Accept: text/csv"))
        for client in slow:
            client.close()
        assert patient.reply().status == 200
    assert alone.call("GET", "/users").json()["users"] == []


def test_of_a_row_that_is_refused_only_the_reason_is_kept() -> None:
    """A megabyte of them became a hundred in objects, until the garbage collector came."""
    body = b'{"x": [1e1, 2e1]}\n{"x": 1, "x": 2}\n'
    lines = Lines({"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))})
    gc.disable()
    try:
        gone = []
        for read in rows_of(NDJSON, lines, COLUMNS):
            row = Entry(read.line, read.members, read.problem)
            if row.problem is None:
                row.check()
            assert row.problem is not None and row.told() and not row.members
            gone += [weakref.ref(row), weakref.ref(read)]
        del row, read
        assert [one() for one in gone] == [None] * 4
    finally:
        gc.enable()


# Behind a trusted proxy an answer waits for the end of the file: see Job in server/jobs.py.


@pytest.fixture(scope="module")
def behind(database: str, upstream: ScriptedUpstream) -> Iterator[Service]:
    settings = {"TRUSTED_PROXIES": "127.0.0.1", "CLIENT_TIMEOUT": 3}
    with Service(POSTGRES_URI=database, UPSTREAM_URL=upstream.url, **settings) as running:
        yield running


def begun(client: RawClient, rows: int) -> None:
    """The client has sent so many rows that are refused, in chunks, and no end."""
    body = b'{"email": "nobody", "name": "Ann"}\n' * rows
    lines = b"Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked"
    head = b"POST /users HTTP/1.1\r\nHost: a\r\n%b\r\n\r\n" % lines
    client.send(head + b"%x\r\n%b\r\n" % (len(body), body))


def test_behind_a_trusted_proxy_nothing_is_told_before_the_end_of_the_file(
    behind: Service,
) -> None:
    with behind.client() as client:
        begun(client, 2000)
        client.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.sock.recv(1)
        client.sock.settimeout(10)
        client.send(b"0\r\n\r\n")
        lines, counts = told(client.reply("POST"))
        assert (len(lines), counts) == (2000, (2000, 0, 0, 0, 2000))
        client.send(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.reply().status == 200


@pytest.mark.parametrize("end", [b"zz\r\n", b""])
def test_behind_a_trusted_proxy_what_was_done_is_told_though_the_file_is_cut(
    behind: Service, end: bytes
) -> None:
    """A bad chunk, or a pause that is too long: the rows are in the table, and nobody was told."""
    with behind.client() as client:
        begun(client, 2000)
        time.sleep(1.5)
        client.send(end)
        reply = client.reply("POST")
    assert not reply.complete
    numbers = [json.loads(line)["line"] for line in reply.body.splitlines()]
    assert numbers and numbers == [*range(1, len(numbers) + 1)]


@pytest.mark.parametrize("kind", [CSV, NDJSON])
def test_behind_a_trusted_proxy_an_export_is_whole_whatever_body_it_comes_with(
    behind: Service, kind: str
) -> None:
    """It was empty, and looked whole."""
    create_user(behind)
    expected = export(behind, kind).body
    assert expected
    with behind.client() as client:
        head = f"GET /users HTTP/1.1\r\nHost: a\r\nAccept: {kind}\r\nContent-Length: 5\r\n\r\n"
        client.send(head.encode())
        time.sleep(0.3)
        client.send(b"hello")
        reply = client.reply()
    assert (reply.status, reply.complete, reply.body) == (200, True, expected)


def test_behind_a_trusted_proxy_what_was_done_is_told_though_the_service_stops(
    databases: Databases, upstream: ScriptedUpstream
) -> None:
    settings = {"TRUSTED_PROXIES": "127.0.0.1", "SHUTDOWN_TIMEOUT": 1, "WORKERS": 1}
    with Service(POSTGRES_URI=databases.uri, UPSTREAM_URL=upstream.url, **settings) as running:
        with running.client() as client:
            begun(client, 2000)
            time.sleep(1.5)
            running.process.terminate()
            reply = client.reply("POST")
        assert not reply.complete and reply.body.count(b"\n") > 0


def test_behind_a_trusted_proxy_a_cut_answer_in_http_1_0_has_much_of_what_was_done(
    behind: Service,
) -> None:
    """It ends with a reset, which came before most of it had been taken."""
    rows = 40_000
    body = b'{"email": "nobody", "name": "%b"}\n' % (b"x" * 60) * rows
    with behind.client() as client:
        lines = b"Content-Type: application/x-ndjson\r\nContent-Length: %d" % (len(body) + 1)
        sender = threading.Thread(
            target=client.send, args=(b"POST /users HTTP/1.0\r\n%b\r\n\r\n" % lines + body,)
        )
        sender.start()
        taken = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := client.sock.recv(1 << 20):
                taken += piece
        sender.join()
    # A reset also drops what the kernel has not sent yet.
    assert taken.count(b"\n{") > rows // 4
