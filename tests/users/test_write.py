from __future__ import annotations

import contextlib
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import psycopg2.extensions
import pytest

from tests.harness import (
    Reply,
    ScriptedUpstream,
    Service,
    create_user,
    invalid_fields,
    new_email,
    problem,
)

# RFC 9110 section 13.1.1 compares strongly in If-Match. But nginx with gzip makes a weak tag of ours,
# and who gives back what it got has read the version that it names.
UNMET = ['"other"', '"a", "b"', 'W/"other"', '""', '"*"']
MET = ["{etag}", "*", '"other", {etag}', '"a,b",{etag} ,"c"', "W/{etag}", '"other", W/{etag}']
MALFORMED = ["abc", '"abc', '"a" "b"', '*, "a"', 'w/"a"']


def put(service: Service, path: str, headers: dict[str, str] | None = None, **body: Any) -> Reply:
    return service.call("PUT", path, {"email": new_email(), "name": "Ann"} | body, headers)


def change(
    service: Service, method: str, path: str, headers: dict[str, str] | None = None
) -> Reply:
    """A write that would succeed and change the user, were it not for the headers."""
    body = {"PUT": {"email": new_email(), "name": "Bea"}, "PATCH": {"name": "Bea"}, "DELETE": None}
    return service.call(method, path, body[method], headers)


def read(service: Service, path: str) -> tuple[dict[str, Any], str]:
    """A user and its ETag."""
    reply = service.call("GET", path)
    assert reply.status == 200, reply
    etag = reply.get("ETag")
    assert etag is not None
    return reply.json(), etag


def new_user(service: Service) -> tuple[str, dict[str, Any], str]:
    """The path of a new user, the user and its ETag."""
    path = create_user(service).get("Location")
    assert path is not None
    return (path, *read(service, path))


def assert_replaced(reply: Reply, old: dict[str, Any], old_etag: str, **new: str) -> None:
    """200 and the user with `new` members, a later `updated_at` and another ETag."""
    assert reply.status == 200, reply
    user = reply.json()
    assert user == old | new | {"updated_at": user["updated_at"]}
    assert datetime.fromisoformat(user["updated_at"]) > datetime.fromisoformat(old["updated_at"])
    assert reply.get("ETag") not in (None, old_etag)


def assert_untouched(reply: Reply, old: dict[str, Any], old_etag: str) -> None:
    """200 and the user as it was, `updated_at` and ETag included."""
    assert reply.status == 200, reply
    assert reply.json() == old
    assert reply.get("ETag") == old_etag


def test_put_creates_a_user_with_the_id_of_the_path(service: Service) -> None:
    identifier = str(uuid.uuid4())
    email = new_email()
    reply = put(service, f"/users/{identifier}", email=email, name="  Ann ")
    assert reply.status == 201
    user = reply.json()
    assert (user["id"], user["email"], user["name"]) == (identifier, email, "Ann")
    assert user["created_at"] == user["updated_at"]
    assert reply.get("Location") == f"/users/{identifier}"
    assert read(service, f"/users/{identifier}") == (user, reply.get("ETag"))


def test_put_repeated_is_200_and_changes_nothing(service: Service) -> None:
    path, email = f"/users/{uuid.uuid4()}", new_email()
    created = put(service, path, email=email)
    assert created.status == 201
    for _ in range(2):
        repeated = put(service, path, email=email, name=" Ann ")
        assert_untouched(repeated, created.json(), str(created.get("ETag")))
        assert repeated.get("Location") is None


@pytest.mark.parametrize("members", [{"email"}, {"name"}, {"email", "name"}], ids=sorted)
def test_put_replaces_a_user(service: Service, members: set[str]) -> None:
    path, user, etag = new_user(service)
    fresh = {"email": new_email(), "name": "Bea"}
    body = {key: fresh[key] if key in members else user[key] for key in ("email", "name")}
    assert_replaced(service.call("PUT", path, body), user, etag, **body)
    assert read(service, path)[0]["name"] == body["name"]


def test_put_with_an_id_in_upper_case_is_the_same_user(service: Service) -> None:
    identifier, email = str(uuid.uuid4()), new_email()
    created = put(service, f"/users/{identifier.upper()}", email=email)
    assert created.status == 201
    assert created.json()["id"] == identifier
    assert created.get("Location") == f"/users/{identifier}"
    assert put(service, f"/users/{identifier}", email=email).json() == created.json()


@pytest.mark.parametrize(
    "identifier",
    [
        "1",
        "nobody",
        "01936f3e000070008000000000000000",
        "%7B01936f3e-0000-7000-8000-000000000000%7D",
    ],
)
def test_put_to_an_id_that_is_not_a_uuid_is_refused_by_name(
    service: Service, identifier: str
) -> None:
    reply = put(service, f"/users/{identifier}")
    assert invalid_fields(problem(reply, 422, "invalid-user")) == ["id"]


def test_put_names_a_bad_id_together_with_bad_members(service: Service) -> None:
    reply = put(service, "/users/1", email="nobody", name="", colour="red")
    fields = ["colour", "email", "id", "name"]
    assert invalid_fields(problem(reply, 422, "invalid-user")) == fields


@pytest.mark.parametrize("missing", [{"email"}, {"name"}, {"email", "name"}], ids=sorted)
def test_put_asks_for_every_member(service: Service, missing: set[str]) -> None:
    path, user, _ = new_user(service)
    whole = {"email": new_email(), "name": "Bea"}
    body = {key: value for key, value in whole.items() if key not in missing}
    document = problem(service.call("PUT", path, body), 422, "invalid-user")
    assert invalid_fields(document) == sorted(missing)
    assert read(service, path)[0] == user


MADE_HERE = ["id", "created_at", "updated_at"]


@pytest.mark.parametrize(
    ("method", "member"),
    [("POST", member) for member in MADE_HERE]
    + [(method, "Email") for method in ("POST", "PUT", "PATCH")],
)
def test_a_member_that_callers_do_not_set_is_refused_by_name(
    service: Service, method: str, member: str
) -> None:
    path, user, _ = new_user(service)
    body = {"email": user["email"], "name": user["name"], member: user.get(member, "x")}
    reply = service.call(method, "/users" if method == "POST" else path, body)
    assert invalid_fields(problem(reply, 422, "invalid-user")) == [member]


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_what_a_get_gave_may_be_sent_back_whole(service: Service, method: str) -> None:
    path, user, etag = new_user(service)
    unchanged = service.call(method, path, user)
    assert (unchanged.status, unchanged.json(), unchanged.get("ETag")) == (200, user, etag)
    others = {"created_at": "whatever", "updated_at": None, "id": user["id"].upper()}
    reply = service.call(method, path, user | others | {"name": "Bea"})
    assert_replaced(reply, user, etag, name="Bea")


@pytest.mark.parametrize(
    "given", ["0e5f3ad4-6d0f-4f0e-8a53-7f3f6d0f8a53", "x", 1, None, ["{id}"]], ids=repr
)
@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_an_id_in_a_body_is_the_paths(service: Service, method: str, given: Any) -> None:
    path, user, etag = new_user(service)
    reply = service.call(method, path, user | {"id": given, "name": "Bea"})
    assert invalid_fields(problem(reply, 422, "invalid-user")) == ["id"]
    assert read(service, path) == (user, etag)


@pytest.mark.parametrize("target", ["a new id", "another user"])
def test_put_of_an_email_that_another_has_is_409(service: Service, target: str) -> None:
    _, taken, _ = new_user(service)
    path, user, etag = new_user(service)
    if target == "a new id":
        path = f"/users/{uuid.uuid4()}"
    reply = put(service, path, email=taken["email"].upper(), name="Bea")
    problem(reply, 409, "email-taken")
    if target == "a new id":
        problem(service.call("GET", path), 404, "no-such-user")
    else:
        assert read(service, path) == (user, etag)


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_the_case_of_a_users_own_email_may_change(service: Service, method: str) -> None:
    path, user, etag = new_user(service)
    email = user["email"].upper()
    kept = email.replace("EXAMPLE.COM", "example.com")
    reply = service.call(method, path, {"email": email, "name": user["name"]})
    assert_replaced(reply, user, etag, email=kept)


def test_put_with_if_none_match_any_only_creates(service: Service) -> None:
    path, email = f"/users/{uuid.uuid4()}", new_email()
    only_create = {"If-None-Match": "*"}
    created = put(service, path, only_create, email=email)
    assert created.status == 201
    problem(put(service, path, only_create, email=email), 412, "precondition-failed")
    problem(put(service, path, only_create, name="Bea"), 412, "precondition-failed")
    assert read(service, path) == (created.json(), created.get("ETag"))


@pytest.mark.parametrize("condition", ["*", '"other"'])
def test_put_with_if_match_never_creates(service: Service, condition: str) -> None:
    path = f"/users/{uuid.uuid4()}"
    problem(put(service, path, {"If-Match": condition}), 412, "precondition-failed")
    problem(service.call("GET", path), 404, "no-such-user")


@pytest.mark.parametrize("condition", MET)
@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_a_write_whose_if_match_is_met_is_done(
    service: Service, method: str, condition: str
) -> None:
    path, user, etag = new_user(service)
    reply = change(service, method, path, {"If-Match": condition.format(etag=etag)})
    if method == "DELETE":
        assert reply.status == 204
        problem(service.call("GET", path), 404, "no-such-user")
    else:
        assert_replaced(reply, user, etag, email=reply.json()["email"], name="Bea")
        assert read(service, path) == (reply.json(), reply.get("ETag"))


@pytest.mark.parametrize("condition", UNMET)
@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_a_write_whose_if_match_is_not_met_is_412_and_not_done(
    service: Service, method: str, condition: str
) -> None:
    path, user, etag = new_user(service)
    reply = change(service, method, path, {"If-Match": condition.format(etag=etag)})
    problem(reply, 412, "precondition-failed")
    assert read(service, path) == (user, etag)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_a_version_that_was_replaced_is_412(service: Service, method: str) -> None:
    path, _, old = new_user(service)
    replaced = service.call("PATCH", path, {"name": "Cem"}, {"If-Match": old})
    assert replaced.status == 200
    problem(change(service, method, path, {"If-Match": old}), 412, "precondition-failed")
    assert read(service, path) == (replaced.json(), replaced.get("ETag"))


@pytest.mark.parametrize("condition", MALFORMED)
@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_a_malformed_if_match_is_400_and_nothing_is_done(
    service: Service, method: str, condition: str
) -> None:
    path, user, etag = new_user(service)
    problem(change(service, method, path, {"If-Match": condition}), 400, "bad-request")
    assert read(service, path) == (user, etag)


def test_a_malformed_if_none_match_on_put_is_400(service: Service) -> None:
    path = f"/users/{uuid.uuid4()}"
    problem(put(service, path, {"If-None-Match": "abc"}), 400, "bad-request")
    problem(service.call("GET", path), 404, "no-such-user")


@pytest.mark.parametrize("members", [{"email"}, {"name"}, {"email", "name"}], ids=sorted)
def test_patch_changes_what_it_names(service: Service, members: set[str]) -> None:
    path, user, etag = new_user(service)
    body = {"email": new_email(), "name": " Bea "}
    body = {key: value for key, value in body.items() if key in members}
    reply = service.call("PATCH", path, body)
    assert_replaced(reply, user, etag, **{key: value.strip() for key, value in body.items()})
    assert read(service, path) == (reply.json(), reply.get("ETag"))


@pytest.mark.parametrize("members", [set(), {"email"}, {"name"}, {"email", "name"}], ids=sorted)
@pytest.mark.parametrize("conditional", [False, True])
def test_patch_that_changes_nothing_leaves_updated_at(
    service: Service, members: set[str], conditional: bool
) -> None:
    path, user, etag = new_user(service)
    headers = {"If-Match": etag} if conditional else None
    reply = service.call("PATCH", path, {key: user[key] for key in members}, headers)
    assert_untouched(reply, user, etag)
    assert read(service, path) == (user, etag)


def test_patch_that_changes_nothing_still_honours_if_match(service: Service) -> None:
    path, _, _ = new_user(service)
    reply = service.call("PATCH", path, {}, {"If-Match": '"other"'})
    problem(reply, 412, "precondition-failed")


@pytest.mark.parametrize("members", [["email"], ["name"], ["email", "name"]], ids=str)
def test_patch_refuses_null_by_name(service: Service, members: list[str]) -> None:
    path, user, etag = new_user(service)
    reply = service.call("PATCH", path, dict.fromkeys(members))
    assert invalid_fields(problem(reply, 422, "invalid-user")) == members
    assert read(service, path) == (user, etag)


def test_patch_of_one_bad_member_changes_no_other(service: Service) -> None:
    path, user, etag = new_user(service)
    reply = service.call("PATCH", path, {"name": "Bea", "email": "nobody"})
    assert invalid_fields(problem(reply, 422, "invalid-user")) == ["email"]
    assert read(service, path) == (user, etag)


def test_patch_of_an_email_that_another_has_is_409(service: Service) -> None:
    _, taken, _ = new_user(service)
    path, user, etag = new_user(service)
    reply = service.call("PATCH", path, {"email": taken["email"].upper(), "name": "Bea"})
    problem(reply, 409, "email-taken")
    assert read(service, path) == (user, etag)


@pytest.mark.parametrize(
    "media_type",
    [
        "application/json",
        "application/merge-patch+json",
        "application/merge-patch+json; charset=utf-8",
    ],
)
def test_patch_reads_json_and_merge_patch(service: Service, media_type: str) -> None:
    path, user, etag = new_user(service)
    reply = service.call("PATCH", path, {"name": "Bea"}, {"Content-Type": media_type})
    assert_replaced(reply, user, etag, name="Bea")


@pytest.mark.parametrize(
    ("method", "media_type"),
    [
        ("PUT", "application/merge-patch+json"),
        ("PUT", "text/plain"),
        ("PATCH", "application/json-patch+json"),
        ("PATCH", "text/plain"),
        ("PATCH", "application/merge-patch+json; charset=latin-1"),
    ],
)
def test_a_write_of_another_media_type_is_415(
    service: Service, method: str, media_type: str
) -> None:
    path, user, etag = new_user(service)
    body = {"email": new_email(), "name": "Bea"}
    reply = service.call(method, path, body, {"Content-Type": media_type})
    problem(reply, 415, "unsupported-media-type")
    assert read(service, path) == (user, etag)


def test_patch_of_nobody_is_404(service: Service) -> None:
    reply = service.call("PATCH", f"/users/{uuid.uuid4()}", {"name": "Bea"})
    problem(reply, 404, "no-such-user")


def test_delete_is_204_without_a_body_and_again_404(service: Service) -> None:
    path, _, _ = new_user(service)
    with service.client() as client:
        client.send(f"DELETE {path} HTTP/1.1\r\nHost: gatehouse\r\n\r\n".encode())
        reply = client.reply("DELETE")
        assert reply.status == 204
        assert reply.get("Content-Length") is None  # RFC 9110 section 8.6
        assert reply.get("Content-Type") is None
        client.send(f"DELETE {path} HTTP/1.1\r\nHost: gatehouse\r\n\r\n".encode())
        problem(client.reply("DELETE"), 404, "no-such-user")
    problem(service.call("GET", path), 404, "no-such-user")
    problem(service.call("PATCH", path, {"name": "Bea"}), 404, "no-such-user")


def test_a_body_on_a_delete_is_ignored(service: Service) -> None:
    path, _, _ = new_user(service)
    assert service.call("DELETE", path, b"not json").status == 204


def test_a_deleted_users_email_and_id_are_free_again(service: Service) -> None:
    path, user, etag = new_user(service)
    assert service.call("DELETE", path).status == 204
    again = put(service, path, email=user["email"])
    assert again.status == 201
    assert again.get("ETag") != etag
    assert service.call("DELETE", path).status == 204
    assert create_user(service, user["email"]).json()["id"] != user["id"]


@contextlib.contextmanager
def overheard(uri: str) -> Iterator[tuple[str, list[str]]]:
    """A URI for the server behind a Unix socket, and the text of all statements sent to it."""
    parts = psycopg2.extensions.parse_dsn(uri)
    statements: list[str] = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client = stack.enter_context(listener.accept()[0])
                    server = stack.enter_context(socket.socket(socket.AF_UNIX))
                    server.connect(f"{parts['host']}/.s.PGSQL.5432")
                    threading.Thread(target=send, args=(client, server), daemon=True).start()
                    threading.Thread(target=answer, args=(client, server), daemon=True).start()

        def send(client: socket.socket, server: socket.socket) -> None:
            stream = client.makefile("rb")
            kind = b""  # the first message of protocol 3 has none
            with contextlib.suppress(OSError):
                while size := stream.read(4):
                    body = stream.read(int.from_bytes(size, "big") - 4)
                    if kind in (b"Q", b"P"):  # a simple query, or Parse
                        statements.append(body.strip(b"\0").decode())
                    server.sendall(kind + size + body)
                    kind = stream.read(1)

        def answer(client: socket.socket, server: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := server.recv(65536):
                    client.sendall(data)

        threading.Thread(target=accept, daemon=True).start()
        port = listener.getsockname()[1]
        plain = "sslmode=disable&gssencmode=disable"
        yield f"postgresql://postgres@127.0.0.1:{port}/{parts['dbname']}?{plain}", statements
        listener.shutdown(socket.SHUT_RDWR)


def test_every_write_is_one_statement(
    database: str, upstream: ScriptedUpstream, start: Callable[..., Service]
) -> None:
    """Guards promise 2: a write of several statements can be torn, and pays each round trip."""
    with overheard(database) as (uri, statements):
        service = start(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url)
        path, email = f"/users/{uuid.uuid4()}", new_email()
        # Opens the connection, with whatever a new one is told.
        assert service.call("GET", path).status == 404
        writes: list[tuple[int, str, str, dict[str, Any] | None]] = [
            (201, "POST", "/users", {"email": new_email(), "name": "Ann"}),
            (201, "PUT", path, {"email": email, "name": "Ann"}),
            (200, "PUT", path, {"email": email, "name": "Ann"}),
            (200, "PUT", path, {"email": email, "name": "Bea"}),
            (200, "PATCH", path, {"name": "Cem"}),
            (200, "PATCH", path, {"name": "Cem"}),
            (204, "DELETE", path, None),
        ]
        for status, method, target, body in writes:
            statements.clear()
            assert service.call(method, target, body).status == status
            assert len(statements) == 1, (method, statements)


def test_a_statement_that_fails_when_it_is_first_run_can_be_run_again(
    database: str, start: Callable[..., Service]
) -> None:
    """It has been prepared all the same, and a connection must not be told to do so again."""
    service = start(POSTGRES_URI=database, DB_POOL_SIZE=1)
    taken = create_user(service).json()["email"]
    for _ in range(2):
        reply = service.call("PUT", f"/users/{uuid.uuid4()}", {"email": taken, "name": "Ann"})
        problem(reply, 409, "email-taken")
    body = {"email": new_email(), "name": "Ann"}
    assert service.call("PUT", f"/users/{uuid.uuid4()}", body).status == 201
