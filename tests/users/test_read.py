from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.harness import (
    Databases,
    Reply,
    ScriptedUpstream,
    Service,
    create_user,
    invalid_fields,
    new_email,
    problem,
)

SEEDED = 120


def test_a_user_is_read_with_its_etag(service: Service) -> None:
    created = create_user(service)
    reply = service.call("GET", f"/users/{created.json()['id']}")
    assert reply.status == 200
    assert reply.json() == created.json()
    assert reply.get("ETag") == created.get("ETag")
    assert reply.get("Content-Type") == "application/json"
    assert reply.get("Cache-Control") == "no-store"
    assert reply.get("X-Content-Type-Options") == "nosniff"


def test_an_id_in_upper_case_is_answered_in_lower_case(service: Service) -> None:
    created = create_user(service).json()
    reply = service.call("GET", f"/users/{created['id'].upper()}")
    assert reply.status == 200
    assert reply.json() == created


def test_an_id_that_nobody_has_is_404(service: Service) -> None:
    document = problem(service.call("GET", f"/users/{uuid.uuid4()}"), 404, "no-such-user")
    assert "errors" not in document


@pytest.mark.parametrize("method", ["GET", "HEAD", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    "spelling",
    [
        "{hex}",
        "{{{id}}}",
        "urn:uuid:{id}",
        "{id}x",
        "x{id}",
        "{short}",
        "{id}%0A",
        "%20{id}",
        "{id}%00",
        "nobody",
        "1",
        "null",
        "%FF",
        "%C3%A9",
        "00000000-0000-0000-0000-00000000000g",
        "..",
        "'%20OR%20'1'='1",
    ],
)
def test_an_id_that_is_not_a_canonical_uuid_names_no_user(
    service: Service, spelling: str, method: str
) -> None:
    made = create_user(service).json()["id"]
    target = "/users/" + spelling.format(id=made, hex=made.replace("-", ""), short=made[:-1])
    reply = service.call(method, target, {} if method == "PATCH" else None)
    assert reply.status == 404
    if method != "HEAD":
        problem(reply, 404, "no-such-user")
    assert service.call("GET", f"/users/{made}").status == 200


def test_a_body_on_a_read_is_ignored(service: Service) -> None:
    created = create_user(service).json()
    reply = service.call("GET", f"/users/{created['id']}", b"not json")
    assert reply.status == 200
    assert reply.json() == created


def tagged(service: Service) -> tuple[str, str]:
    """The path and the ETag of a new user."""
    reply = create_user(service)
    etag = reply.get("ETag")
    assert etag is not None
    return f"/users/{reply.json()['id']}", etag


@pytest.mark.parametrize(
    "condition",
    ["{etag}", "W/{etag}", '"other", {etag}', '"a,b",{etag} , "c"', "*", '{etag}, W/"other"'],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_if_none_match_with_the_version_held_is_304(
    service: Service, method: str, condition: str
) -> None:
    path, etag = tagged(service)
    line = f"If-None-Match: {condition.format(etag=etag)}"
    with service.client() as client:
        client.send(f"{method} {path} HTTP/1.1\r\nHost: g\r\n{line}\r\n\r\n".encode())
        reply = client.reply(method)
        assert reply.status == 304
        # RFC 9110 section 15.4.5: what a 200 would have had of these.
        assert reply.get("ETag") == etag
        assert reply.get("Cache-Control") == "no-store"
        assert reply.get("Content-Type") is None
        client.send(f"GET {path} HTTP/1.1\r\nHost: g\r\n\r\n".encode())
        assert client.reply().status == 200, "the 304 had a body, or closed the connection"


@pytest.mark.parametrize("condition", ['"other"', 'W/"other"', '"a", "b"', '""', '"*"'])
def test_if_none_match_with_another_version_is_200(service: Service, condition: str) -> None:
    path, etag = tagged(service)
    reply = service.call("GET", path, headers={"If-None-Match": condition})
    assert reply.status == 200
    assert reply.get("ETag") == etag


def test_if_none_match_in_two_header_lines_is_one_list(service: Service) -> None:
    path, etag = tagged(service)
    lines = f'If-None-Match: "other"\r\nIf-None-Match: {etag}\r\n'
    request = f"GET {path} HTTP/1.1\r\nHost: gatehouse\r\n{lines}\r\n"
    assert service.exchange(request.encode()).status == 304


def test_a_changed_user_is_no_longer_304(service: Service) -> None:
    path, etag = tagged(service)
    assert service.call("PATCH", path, {"name": "Bea"}).status == 200
    reply = service.call("GET", path, headers={"If-None-Match": etag})
    assert reply.status == 200
    assert reply.json()["name"] == "Bea"
    assert reply.get("ETag") != etag


@pytest.mark.parametrize("condition", ["abc", '"abc', 'abc"', '"a" "b"', '*, "a"', 'w/"a"', "'a'"])
def test_a_malformed_if_none_match_is_400(service: Service, condition: str) -> None:
    path, _ = tagged(service)
    problem(service.call("GET", path, headers={"If-None-Match": condition}), 400, "bad-request")


def test_if_none_match_on_nobody_is_404(service: Service) -> None:
    reply = service.call("GET", f"/users/{uuid.uuid4()}", headers={"If-None-Match": "*"})
    problem(reply, 404, "no-such-user")


@pytest.mark.parametrize("condition", ["{etag}", "W/{etag}", '"other", {etag}', "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_if_match_with_the_version_held_is_200(
    service: Service, method: str, condition: str
) -> None:
    path, etag = tagged(service)
    reply = service.call(method, path, headers={"If-Match": condition.format(etag=etag)})
    assert reply.status == 200 and reply.get("ETag") == etag


def test_if_match_with_another_version_is_412(service: Service) -> None:
    """RFC 9110 section 13.2.2: it is looked at before If-None-Match."""
    path, etag = tagged(service)
    headers = {"If-Match": '"other"', "If-None-Match": etag}
    problem(service.call("GET", path, headers=headers), 412, "precondition-failed")
    reply = service.call("GET", f"/users/{uuid.uuid4()}", headers={"If-Match": "*"})
    problem(reply, 404, "no-such-user")


Seeded = tuple[Service, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def seeded(databases: Databases, upstream: ScriptedUpstream) -> Iterator[Seeded]:
    """A service that holds SEEDED users and no others, and these users in their ids' order."""
    with Service(POSTGRES_URI=databases.create(), UPSTREAM_URL=upstream.url) as service:
        assert page(service, "/users").json() == {"users": [], "next": None}
        users = []
        for number in range(SEEDED):
            body = {"email": f"user{number}@example.com", "name": f"User {number}"}
            # Every second id is random, so that the order of ids is not that of creation.
            reply = (
                service.call("PUT", f"/users/{uuid.uuid4()}", body)
                if number % 2
                else service.call("POST", "/users", body)
            )
            assert reply.status == 201
            users.append(reply.json())
        yield service, sorted(users, key=lambda user: str(user["id"]))


def page(service: Service, target: str) -> Reply:
    """One page, checked for what all have: its `Link` tells the same target as its `next`."""
    reply = service.call("GET", target)
    assert reply.status == 200, reply
    assert reply.get("Content-Type") == "application/json"
    assert reply.get("Cache-Control") == "no-store"
    assert set(reply.json()) == {"users", "next"}
    following = reply.json()["next"]
    assert following is None or following.startswith("/users?")
    expected = None if following is None else f'<{following}>; rel="next"'
    assert reply.get("Link") == expected
    return reply


def walk(service: Service, target: str) -> list[list[dict[str, Any]]]:
    """Every page from `target` on, as `next` leads."""
    pages = []
    following: str | None = target
    while following is not None:
        document = page(service, following).json()
        pages.append(document["users"])
        following = document["next"]
        assert len(pages) <= SEEDED + 1, "the walk does not end"
    return pages


def test_a_list_has_fifty_users_in_the_order_of_their_ids(seeded: Seeded) -> None:
    service, users = seeded
    assert page(service, "/users").json()["users"] == users[:50]


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (1, [1] * SEEDED),
        (7, [7] * 17 + [1]),
        (40, [40, 40, 40]),
        (119, [119, 1]),
        (120, [120]),
        (500, [120]),
    ],
)
def test_pages_hold_every_user_once(seeded: Seeded, limit: int, sizes: list[int]) -> None:
    service, users = seeded
    pages = walk(service, f"/users?limit={limit}")
    assert [len(one) for one in pages] == sizes
    assert [user for one in pages for user in one] == users


def test_next_carries_the_limit_and_where_to_go_on(seeded: Seeded) -> None:
    service, users = seeded
    following = page(service, "/users?limit=3").json()["next"]
    path, _, query = following.partition("?")
    assert path == "/users"
    assert sorted(query.split("&")) == sorted([f"after={users[2]['id']}", "limit=3"])


def test_a_page_starts_after_an_id_that_nobody_has(seeded: Seeded) -> None:
    service, users = seeded
    between = str(uuid.UUID(int=uuid.UUID(users[9]["id"]).int + 1))
    assert page(service, f"/users?after={between}&limit=2").json()["users"] == users[10:12]
    lowest = "00000000-0000-0000-0000-000000000000"
    assert page(service, f"/users?after={lowest}&limit=1").json()["users"] == users[:1]


def test_nothing_is_after_the_last_id(seeded: Seeded) -> None:
    service, users = seeded
    empty: dict[str, Any] = {"users": [], "next": None}
    assert page(service, f"/users?after={users[-1]['id']}").json() == empty
    assert page(service, "/users?after=ffffffff-ffff-ffff-ffff-ffffffffffff").json() == empty


def test_after_is_read_in_upper_case_too(seeded: Seeded) -> None:
    service, users = seeded
    reply = page(service, f"/users?limit=1&after={users[0]['id'].upper()}")
    assert reply.json()["users"] == [users[1]]


def test_deleting_the_user_that_after_names_loses_nobody(service: Service) -> None:
    # Higher than any id that the service makes.
    before, first, second = (f"ffffffff-ffff-4fff-bfff-fffffffffff{digit}" for digit in "012")
    for identifier in (first, second):
        body = {"email": new_email(), "name": "Ann"}
        assert service.call("PUT", f"/users/{identifier}", body).status == 201
    following = page(service, f"/users?limit=1&after={before}").json()["next"]
    assert service.call("DELETE", f"/users/{first}").status == 204
    document = page(service, following).json()
    assert [user["id"] for user in document["users"]] == [second]
    assert document["next"] is None


@pytest.mark.parametrize("change", [str, str.upper, str.title], ids=["same", "upper", "title"])
def test_email_finds_one_user_without_regard_to_case(seeded: Seeded, change: Any) -> None:
    service, users = seeded
    email = change("user7@example.com")
    reply = page(service, f"/users?email={email}")
    assert reply.json() == {
        "users": [user for user in users if user["email"] == "user7@example.com"],
        "next": None,
    }


def test_email_that_nobody_has_is_an_empty_list(seeded: Seeded) -> None:
    service, _ = seeded
    empty: dict[str, Any] = {"users": [], "next": None}
    assert page(service, "/users?email=nobody@example.com").json() == empty
    # Not a pattern: each of these would match some address in LIKE.
    assert page(service, "/users?email=user_@example.com").json() == empty
    assert page(service, "/users?email=user%25@example.com").json() == empty


def test_octets_of_an_address_that_are_not_percent_encoded_find_it_too(service: Service) -> None:
    email = f"é{new_email()}"
    user = create_user(service, email=email).json()
    for spelled in (email, quote(email)):
        target = f"/users?email={spelled}".encode()
        reply = service.exchange(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert reply.json()["users"] == [user]


@pytest.mark.parametrize("email", ["ann+tag@look.example", "o'brien&co=%@look.example", "jö@b.de"])
def test_email_is_found_when_percent_encoded(service: Service, email: str) -> None:
    user = create_user(service, email).json()
    assert page(service, f"/users?email={quote(email, safe='')}").json()["users"] == [user]


def test_email_works_together_with_limit_and_after(seeded: Seeded) -> None:
    service, users = seeded
    wanted = users[60]
    query = f"email={wanted['email']}&limit=1"
    assert page(service, f"/users?{query}").json() == {"users": [wanted], "next": None}
    for after, found in ((users[59]["id"], [wanted]), (wanted["id"], [])):
        document = page(service, f"/users?{query}&after={after}").json()
        assert document == {"users": found, "next": None}


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ("limit=0", ["limit"]),
        ("limit=501", ["limit"]),
        ("limit=-1", ["limit"]),
        ("limit=", ["limit"]),
        ("limit=ten", ["limit"]),
        ("limit=1.0", ["limit"]),
        ("limit=1e2", ["limit"]),
        ("limit=%2B5", ["limit"]),
        ("limit=5_0", ["limit"]),
        ("limit=%205", ["limit"]),
        ("limit=%D9%A3", ["limit"]),
        ("limit=" + "9" * 5000, ["limit"]),
        ("after=", ["after"]),
        ("after=1", ["after"]),
        ("after=%7B01936f3e-0000-7000-8000-000000000000%7D", ["after"]),
        ("after=01936f3e000070008000000000000000", ["after"]),
        ("after=%FF", ["after"]),
        ("page=2", ["page"]),
        ("Limit=2", ["Limit"]),
        ("offset=0&sort=name", ["offset", "sort"]),
        ("limit=2&limit=2", ["limit"]),
        ("email=a@example.com&email=a@example.com", ["email"]),
        ("limit=0&after=x&page=2", ["after", "limit", "page"]),
        ("limit=0&after=x&email=a@b.co&email=a@b.co&x=", ["after", "email", "limit", "x"]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_bad_query_is_refused_by_name(seeded: Seeded, query: str, fields: list[str]) -> None:
    service, _ = seeded
    document = problem(service.call("GET", f"/users?{query}"), 422, "invalid-query")
    assert invalid_fields(document) == fields


def test_an_empty_query_is_no_query(seeded: Seeded) -> None:
    service, users = seeded
    assert page(service, "/users?").json()["users"] == users[:50]


def test_a_new_user_is_found_by_its_email_at_once(service: Service) -> None:
    email = new_email()
    assert page(service, f"/users?email={email}").json()["users"] == []
    user = create_user(service, email).json()
    assert page(service, f"/users?email={email}").json()["users"] == [user]
