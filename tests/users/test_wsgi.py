"""The application alone, as any WSGI server has it: no server of ours, and nothing that it adds.

WebTest checks at every call that the application keeps to PEP 3333.
"""

from __future__ import annotations

import io
import json
import re
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from webtest import TestApp, TestRequest, TestResponse

from app import Gatehouse, Reply, create_app
from models import database as users_database
from problems import Unauthorized
from services import search
from services.search import PART_BYTES, Search, parts
from services.transfer import exported
from settings import Settings
from tests.harness import DEAD_DATABASE, new_email
from wire.request import Head
from wire.rows import CSV, NDJSON

TOKEN = "wsgi-token"
JSON = {"Content-Type": "application/json"}


def made(uri: str, **settings: str) -> TestApp:
    environ = {"POSTGRES_URI": uri, "UPSTREAM_URL": "http://127.0.0.1:1"} | settings
    return TestApp(create_app(Settings.from_env(environ)))


@pytest.fixture(scope="module")
def application(database: str) -> Iterator[TestApp]:
    yield made(database)
    users_database.close_all()


@pytest.fixture
def alone(database: str) -> Iterator[TestApp]:
    """An application whose database is not there, and that asks for a token."""
    yield made(DEAD_DATABASE, USERS_TOKEN=TOKEN)
    made(database)  # The models have one database, which is where it was again.


def user(application: TestApp) -> TestResponse:
    body = json.dumps({"email": new_email(), "name": "Ann"})
    return application.post("/users", body, headers=JSON, status=201)


def problem(reply: TestResponse, name: str) -> dict[str, Any]:
    assert reply.content_type == "application/problem+json"
    document: dict[str, Any] = reply.json
    assert document["type"] == f"urn:gatehouse:{name}"
    assert document["status"] == reply.status_int
    assert document["request_id"] == reply.headers["X-Request-Id"]
    return document


def test_a_user_is_created_read_changed_and_deleted(application: TestApp) -> None:
    created = user(application)
    path = created.headers["Location"]
    read = application.get(path)
    assert read.json == created.json
    assert read.headers["ETag"] == created.headers["ETag"]
    change = json.dumps({"name": "Bea"})
    changed = application.patch(path, change, headers=JSON | {"If-Match": read.headers["ETag"]})
    assert changed.json["name"] == "Bea"
    whole = json.dumps({"email": new_email(), "name": "Cy"})
    assert application.put(path, whole, headers=JSON).json["name"] == "Cy"
    gone = application.delete(path, status=204)
    assert gone.body == b""
    problem(application.get(path, status=404), "no-such-user")


def test_users_that_are_read_in_parts_are_all_there_and_in_order(
    application: TestApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones are: five hundred of the largest were one text of 120 MB."""
    monkeypatch.setattr(search, "PART_BYTES", 2000)
    name = uuid.uuid4().hex
    for _ in range(130):
        application.post("/users", json.dumps({"email": new_email(), "name": name}), headers=JSON)
    page = application.get(f"/users?limit=500&count=true&q={name}").json
    ids = [user["id"] for user in page["users"]]
    assert len(ids) == 130 and ids == sorted(ids)
    assert (page["total"], page["next"]) == (130, None)
    first = application.get(f"/users?limit=100&q={name}").json
    second = application.get(first["next"]).json
    assert [user["id"] for user in first["users"] + second["users"]] == ids
    assert len(first["users"]) == 100
    for kind, header in (("text/csv", 1), ("application/x-ndjson", 0)):
        lines = application.get(f"/users?q={name}", headers={"Accept": kind}).text.splitlines()
        assert [line for line in lines[header:] if name in line] == lines[header:]
        assert len(lines) == 130 + header


def test_large_users_behind_small_ones_are_read_in_small_parts_too(
    application: TestApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How large the next ones are cannot be told from those before: 27 MB came at once."""
    name = uuid.uuid4().hex
    for large in [False] * 60 + [True] * 120:
        metadata = {"a": "x" * 16000} if large else {}
        user = {"email": new_email(), "name": name, "metadata": metadata}
        application.post("/users", json.dumps(user), headers=JSON)
    found = Search(text=name)
    most = PART_BYTES + 30_000
    limits, read = [], search._read

    def noted(limit: int, *rest: Any) -> search.Page:
        limits.append(limit)
        return read(limit, *rest)

    monkeypatch.setattr(search, "_read", noted)
    pages = list(parts(1000, None, found))
    # What does not fit is read again, and so only once.
    assert limits[0] == 50 and limits[1] > 200 and all(limit < 100 for limit in limits[2:])
    assert sum(len(page.users) for page in pages) == 180
    assert all(sum(map(len, page.users)) < most for page in pages)
    assert [page.last is None for page in pages] == [False] * (len(pages) - 1) + [True]
    for kind, lines in ((CSV, 181), (NDJSON, 180)):
        pieces = list(exported(kind, None, found))
        assert all(len(piece) < most for piece in pieces), [len(piece) for piece in pieces]
        assert b"".join(pieces).count(b"\n") == lines


@pytest.mark.parametrize(
    ("peer", "status"),
    [
        ("127.0.0.1", 200),
        ("::1", 200),
        ("", 200),
        ("localhost", 200),
        ("192.0.2.1", 401),
        ("x", 401),
    ],
)
def test_without_a_token_other_machines_are_not_let_in(
    application: TestApp, peer: str, status: int
) -> None:
    """A server of another kind may listen for all of them."""
    reply = application.get("/users", extra_environ={"REMOTE_ADDR": peer}, status=status)
    assert status == 200 or problem(reply, "unauthorized")
    assert application.get("/health/live", extra_environ={"REMOTE_ADDR": peer}).status_int == 200


def test_health_is_told(application: TestApp) -> None:
    assert application.get("/health/live").json == {"status": "ok"}
    assert application.get("/health/ready").json == {"status": "ok"}
    assert application.get("/health").json["database"]["status"] == "up"


@pytest.mark.parametrize("path", ["/users", "/health", "/health/live", "/users/nobody", "/x"])
def test_every_answer_ends_in_a_newline_and_is_neither_stored_nor_sniffed(
    application: TestApp, path: str
) -> None:
    reply = application.get(path, expect_errors=True)
    assert reply.body.endswith(b"}\n")
    assert int(reply.headers["Content-Length"]) == len(reply.body)
    assert reply.headers["Cache-Control"] == "no-store"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert uuid.UUID(reply.headers["X-Request-Id"]).version == 7


@pytest.mark.parametrize(
    "path", ["/", "/healthy", "/users.json", "/Users", "//users", "/us\xffers"]
)
def test_a_path_that_is_not_gatehouses_is_404_and_says_who_forwards(
    application: TestApp, path: str
) -> None:
    environ = {"PATH_INFO": path, "REQUEST_METHOD": "GET"}
    reply = application.get("/", extra_environ=environ, status=404)
    assert "only its own server forwards" in problem(reply, "not-found")["detail"]


@pytest.mark.parametrize(
    "path",
    ["/users/\xff", "/users\n", "/users/{id}\n", "/users/{id}\xff", "/users/\x00{id}", "/users//"]
    + ["/health/live\n", "/health/\xe9live", "/users/{id}/more", "/health/nothing"],
)
def test_an_octet_that_bottle_would_drop_makes_a_path_another(
    application: TestApp, path: str
) -> None:
    made = path.replace("{id}", user(application).json["id"])
    reply = application.get("/", extra_environ={"PATH_INFO": made}, status=404)
    assert reply.json["type"] in ("urn:gatehouse:not-found", "urn:gatehouse:no-such-user")


@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/users", "GET, HEAD, OPTIONS, POST"),
        ("/users/", "GET, HEAD, OPTIONS, POST"),
        ("/users/x", "DELETE, GET, HEAD, OPTIONS, PATCH, PUT"),
        ("/health/live", "GET, HEAD, OPTIONS"),
    ],
)
def test_methods_are_told(application: TestApp, path: str, allow: str) -> None:
    options = application.options(path, status=204)
    assert options.headers["Allow"] == allow
    assert not {"Content-Type", "Content-Length"} & set(options.headers)
    for method in ("TRACE", "get", "PROXY", "ANY", "OTHER"):
        environ = {"REQUEST_METHOD": method}
        reply = application.get(path, extra_environ=environ, status=405)
        assert problem(reply, "method-not-allowed") and reply.headers["Allow"] == allow


def test_an_options_of_a_path_that_is_not_there_is_404(application: TestApp) -> None:
    problem(application.options("/users/a/b", status=404), "not-found")


def test_a_head_is_a_get_without_its_body(application: TestApp) -> None:
    path = user(application).headers["Location"]
    for target in (path, "/users", "/health/live", "/users/nobody", "/x"):
        get = application.get(target, expect_errors=True)
        head = application.head(target, expect_errors=True)
        assert (head.status, head.body) == (get.status, b"")
        for name in ("Content-Type", "Content-Length", "ETag"):
            assert head.headers.get(name) == get.headers.get(name)


def test_a_304_keeps_the_etag_and_has_no_type(application: TestApp) -> None:
    created = user(application)
    etag = created.headers["ETag"]
    reply = application.get(
        created.headers["Location"], headers={"If-None-Match": etag}, status=304
    )
    assert reply.headers["ETag"] == etag
    assert reply.body == b""
    assert not {"Content-Type", "Content-Length"} & set(reply.headers)


def test_a_header_that_is_not_utf8_is_no_failure_of_ours(application: TestApp) -> None:
    path = user(application).headers["Location"]
    for name in ("HTTP_IF_NONE_MATCH", "HTTP_X_REQUEST_ID", "HTTP_AUTHORIZATION"):
        assert application.get(path, extra_environ={name: '"\xff"'}, status=200)


def test_a_token_is_asked_for_before_the_body_is_read(alone: TestApp) -> None:
    class Untouched(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise AssertionError("the body was read")

    reply = posted(alone, CONTENT_LENGTH="10", **{"wsgi.input": Untouched()})
    assert reply.status_int == 401
    problem(reply, "unauthorized")
    assert reply.headers["WWW-Authenticate"] == 'Bearer realm="users"'
    for path in ("/users/", "/users/a/b"):
        problem(alone.get(path, status=401), "unauthorized")
        problem(alone.options(path, status=401), "unauthorized")
    reply = alone.get("/users", headers={"Authorization": "Bearer x"}, status=401)
    assert "invalid_token" in reply.headers["WWW-Authenticate"]
    reply = alone.get("/users", headers={"Authorization": f"bearer {TOKEN}"}, status=503)
    problem(reply, "database-unavailable")
    assert reply.headers["Retry-After"]


def test_a_request_id_of_the_servers_or_else_a_sane_one_of_the_callers_is_kept(
    application: TestApp,
) -> None:
    headers = {"X-Request-Id": "callers"}
    assert application.get("/health/live", headers=headers).headers["X-Request-Id"] == "callers"
    reply = application.get(
        "/x", headers=headers, extra_environ={"gatehouse.request_id": "servers"}, status=404
    )
    assert problem(reply, "not-found")["request_id"] == "servers"
    insane = application.get("/health/live", headers={"X-Request-Id": "two words"})
    assert uuid.UUID(insane.headers["X-Request-Id"])


class Pieces(io.RawIOBase):
    """A body as a server has it that reads from a socket: it ends when it ends, in short pieces."""

    def __init__(self, data: bytes) -> None:
        self.left = data

    def read(self, size: int = -1) -> bytes:
        assert size > 0, "nobody knows how much that would be"
        piece, self.left = self.left[: min(size, 7)], self.left[min(size, 7) :]
        return piece


def posted(application: TestApp, **environ: Any) -> TestResponse:
    """The answer to a POST with exactly this environ; WebTest's own `post` would mend it."""
    request = TestRequest.blank("/users", environ={"CONTENT_TYPE": "application/json"} | environ)
    request.method = "POST"
    return application.do_request(request, expect_errors=True)


def test_a_body_is_read_to_its_length_or_to_the_end_that_the_server_gives_it(
    application: TestApp,
) -> None:
    def document() -> bytes:
        return json.dumps({"email": new_email(), "name": "Ann"}).encode()

    def answer(body: bytes, **environ: Any) -> TestResponse:
        return posted(application, **{"wsgi.input": Pieces(body)} | environ)

    body = document()
    assert answer(body + b"next", CONTENT_LENGTH=str(len(body))).status_int == 201
    ended = {"CONTENT_LENGTH": "", "wsgi.input_terminated": True}
    chunked = ended | {"HTTP_TRANSFER_ENCODING": "chunked"}  # whose chunks are the server's
    assert answer(document(), **ended).status_int == 201
    assert answer(document(), **chunked).status_int == 201
    problem(answer(document(), CONTENT_LENGTH=""), "malformed-json")
    problem(answer(document() + b" " * 65536, **ended), "body-too-large")
    problem(answer(b"", CONTENT_LENGTH="65537"), "body-too-large")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_byte_order_mark_that_arrives_in_pieces_is_taken(application: TestApp, size: int) -> None:
    """Only one that was whole in the first piece was seen: the first column had another name."""
    body = f"\ufeffemail,name\n{new_email()},Ann\n".encode()

    class Arriving(Pieces):
        def read(self, _: int = -1) -> bytes:
            return super().read(size)

    ended = {"CONTENT_TYPE": "text/csv", "CONTENT_LENGTH": "", "wsgi.input_terminated": True}
    reply = posted(application, **ended, **{"wsgi.input": Arriving(body)})
    assert '"created": 1' in reply.text


def test_a_client_that_leaves_is_not_answered(application: TestApp) -> None:
    class Left(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        posted(application, CONTENT_LENGTH="10", **{"wsgi.input": Left()})


def test_a_failure_of_ours_is_a_problem_and_a_line_in_the_log(
    application: TestApp, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise LookupError("secret words")

    reply = posted(application, CONTENT_LENGTH="10", **{"wsgi.input": Broken()})
    assert "secret words" not in json.dumps(problem(reply, "internal-error"))
    assert "secret words" in caplog.text and reply.json["request_id"] in caplog.text


def test_who_waited_too_long_for_a_thread_is_told_so(application: TestApp) -> None:
    environ = {"gatehouse.arrived": time.monotonic() - 2.5}
    reply = application.get("/users", extra_environ=environ, status=503)
    assert "Too many requests wait" in problem(reply, "database-unavailable")["detail"]
    assert application.get("/health", extra_environ=environ).json["status"] == "ok"


def test_another_plugin_and_bottles_own_means_work() -> None:
    """A team that knows Bottle can use what it knows."""
    import bottle

    application = made(DEAD_DATABASE).app
    application.route("/health/more", "GET", lambda: {"more": 1})
    application.route("/health/none", "GET", lambda: bottle.abort(404, "none"))
    application.route("/health/odd", "GET", lambda: bottle.abort(418, "odd"))
    application.route("/health/wrong", "GET", lambda: 1)
    seen: list[str] = []

    def plugin(callback: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            seen.append(bottle.request.path)
            return callback(*args, **kwargs)

        return wrapped

    application.install(plugin)

    def tell(name: str, value: str) -> None:
        bottle.response.set_header(name, value)

    application.add_hook("before_request", lambda: bottle.response.set_cookie("seen", "1"))
    application.add_hook("after_request", lambda: tell("Access-Control-Allow-Origin", "x"))
    test = TestApp(application)
    more = test.get("/health/more")
    assert more.body == b'{"more": 1}\n'
    assert seen == ["/health/more"]
    for reply in (more, test.get("/health"), test.get("/users", headers={"Accept": "text/html"})):
        assert reply.headers["Access-Control-Allow-Origin"] == "x"
        assert reply.headers["Set-Cookie"] == "seen=1"
        assert len(reply.headers.getall("Content-Type")) == 1
    problem(test.get("/health/none", status=404), "not-found")
    problem(test.get("/health/odd", status=500), "internal-error")
    problem(test.get("/health/wrong", status=500), "internal-error")


def test_a_reply_is_sent_as_it_is_however_often() -> None:
    application = made(DEAD_DATABASE).app
    plain = [("Content-Type", "text/plain")]
    replies = {
        "/health/same": Reply(b"same", plain),
        "/health/empty": Reply(b"", plain, "202 Accepted"),
        "/health/none": Reply(b"", (), "204 No Content"),
        "/health/nothing": Reply(iter(()), plain),
        "/health/split": Reply(b"x", [("X-A", "a\r\nb")]),
        "/health/wide": Reply(b"x", [("X-A", "\u017e")]),
    }
    for path, reply in replies.items():
        application.route(path, "GET", lambda reply=reply: reply)
    test = TestApp(application)
    for _ in range(2):
        assert test.get("/health/same").headers.getall("Content-Length") == ["4"]
        assert test.head("/health/same").headers["Content-Length"] == "4"
        assert test.get("/health/empty", status=202).headers["Content-Length"] == "0"
        assert "Content-Length" not in test.get("/health/none", status=204).headers
        assert test.get("/health/nothing").headers["Content-Length"] == "0"
        problem(test.get("/health/split", status=500), "internal-error")
        problem(test.get("/health/wide", status=500), "internal-error")


def test_a_path_that_a_team_adds_asks_for_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was open to everyone."""
    owned = re.compile(r"/(users|health|teams)(?:/.*)?")
    monkeypatch.setattr("application.OWNED", owned)
    monkeypatch.setattr("app.OWNED", owned)
    environ = {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://a", "USERS_TOKEN": TOKEN}
    gatehouse = Gatehouse(Settings.from_env(environ))
    gatehouse.owned.route("/teams", "GET", lambda: "all of them")
    teams = TestApp(gatehouse.owned)
    problem(teams.get("/teams", status=401), "unauthorized")
    assert teams.get("/teams", headers={"Authorization": f"Bearer {TOKEN}"}).text == "all of them"
    with pytest.raises(Unauthorized):
        gatehouse.admit(Head(b"GET /teams HTTP/1.1\r\nHost: a"))
