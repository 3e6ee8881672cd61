from __future__ import annotations

import uuid

import pytest

from tests.harness import ScriptedUpstream, Service, create_user, new_email, problem

FROM_UPSTREAM = b"HTTP/1.1 203 From Upstream\r\nContent-Length: 8\r\n\r\nupstream"

ALLOWED = {
    "/health": {"GET", "HEAD", "OPTIONS"},
    "/health/live": {"GET", "HEAD", "OPTIONS"},
    "/health/ready": {"GET", "HEAD", "OPTIONS"},
    "/users": {"GET", "HEAD", "POST", "OPTIONS"},
    "/users/{id}": {"GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"},
}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "QUERY", "get"]


def path_of(service: Service, route: str) -> str:
    """The path of a route, with the id of a new user."""
    made = create_user(service).json()["id"] if "{id}" in route else ""
    return route.replace("{id}", made)


def allowed(value: str | None) -> set[str]:
    return {method.strip() for method in (value or "").split(",")}


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/health", 200),
        ("/health?", 200),
        ("/health/", 200),
        ("/health/live", 200),
        ("/health/live/", 200),
        ("/health/ready/", 200),
        ("/%68ealth", 200),
        ("/health/%6Cive", 200),
        ("/health%2Flive", 200),
        ("/health/nothing", 404),
        ("/health/live/deep", 404),
        ("/health/../x", 404),
        ("/health/%FF", 404),
        ("/users", 200),
        ("/users/", 200),
        ("/%75sers", 200),
        ("/users/a/b", 404),
        ("/users/a%2Fb", 404),
        ("/users/../x", 404),
        ("http://elsewhere.example/health", 200),
        ("http://elsewhere.example/users", 200),
    ],
)
def test_a_path_in_an_owned_tree_never_reaches_the_upstream(
    service: Service, upstream: ScriptedUpstream, target: str, status: int
) -> None:
    upstream.script(FROM_UPSTREAM)
    reply = service.call("GET", target)
    assert reply.status == status
    if status == 404:
        problem(reply, 404, "not-found")
    assert upstream.seen == []


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/healthy",
        "/health.json",
        "/healthz/live",
        "/Health",
        "/HEALTH/live",
        "/health;v=1",
        "/health%3Fx=1",
        "/health%20",
        "/x/health",
        "/x/../health",
        "/./health",
        "/%2e/users",
        "/users.json",
        "/usersandmore",
        "/user",
        "/Users",
        "/api/users",
        "/x?/users",
    ],
)
def test_any_other_path_reaches_the_upstream_as_it_was_written(
    service: Service, upstream: ScriptedUpstream, target: str
) -> None:
    upstream.script(FROM_UPSTREAM)
    reply = service.call("GET", target)
    assert (reply.status, reply.body) == (203, b"upstream")
    assert [seen.target.decode() for seen in upstream.seen] == [target]


def test_a_trailing_slash_is_ignored_by_every_method(service: Service) -> None:
    body = {"email": new_email(), "name": "Ann"}
    created = service.call("POST", "/users/", body)
    assert created.status == 201
    path = f"/users/{created.json()['id']}"
    assert created.get("Location") == path
    assert service.call("GET", f"{path}/").json() == created.json()
    assert service.call("PUT", f"{path}/", body).status == 200
    assert service.call("PATCH", f"{path}/", {"name": "Bea"}).status == 200
    listed = service.call("GET", f"/users/?email={body['email']}&limit=1").json()
    assert [user["name"] for user in listed["users"]] == ["Bea"]
    assert service.call("DELETE", f"{path}/").status == 204


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("route", ALLOWED)
def test_head_is_the_get_without_its_body(service: Service, route: str, slash: str) -> None:
    path = path_of(service, route) + slash
    with service.client() as client:
        client.send(f"GET {path} HTTP/1.1\r\nHost: gatehouse\r\n\r\n".encode())
        got = client.reply()
        client.send(f"HEAD {path} HTTP/1.1\r\nHost: gatehouse\r\n\r\n".encode())
        head = client.reply("HEAD")
        # Where the HEAD had a body, this finds it in place of an answer.
        client.send(f"GET {path} HTTP/1.1\r\nHost: gatehouse\r\n\r\n".encode())
        assert client.reply().status == 200
    assert head.status == got.status == 200
    assert sorted(name for name, _ in head.headers) == sorted(name for name, _ in got.headers)
    each_its_own = {"date", "x-request-id"}
    if route == "/health":
        each_its_own.add("content-length")  # of an uptime and a latency
    assert [pair for pair in head.headers if pair[0].lower() not in each_its_own] == [
        pair for pair in got.headers if pair[0].lower() not in each_its_own
    ]


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/users/0e5f3ad4-6d0f-4f0e-8a53-7f3f6d0f8a53", 404),
        ("/users/a/b", 404),
        ("/health/nothing", 404),
        ("/users?limit=0", 422),
    ],
)
def test_head_of_an_error_is_its_status_and_headers(
    service: Service, target: str, status: int
) -> None:
    got = service.call("GET", target)
    with service.client() as client:
        client.send(f"HEAD {target} HTTP/1.1\r\nHost: gatehouse\r\n\r\n".encode())
        head = client.reply("HEAD")
        client.send(b"GET /health/live HTTP/1.1\r\nHost: gatehouse\r\n\r\n")
        assert client.reply().status == 200
    assert head.status == got.status == status
    assert head.get("Content-Type") == "application/problem+json"
    assert head.get("Content-Length") == got.get("Content-Length")


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("route", ALLOWED)
def test_options_is_204_with_what_is_allowed(service: Service, route: str, slash: str) -> None:
    path = route.replace("{id}", str(uuid.uuid4())) + slash
    with service.client() as client:
        client.send(f"OPTIONS {path} HTTP/1.1\r\nHost: gatehouse\r\n\r\n".encode())
        reply = client.reply("OPTIONS")
        assert reply.status == 204
        assert allowed(reply.get("Allow")) == ALLOWED[route]
        assert reply.get("Content-Length") is None
        assert reply.get("Content-Type") is None
        client.send(b"GET /health/live HTTP/1.1\r\nHost: gatehouse\r\n\r\n")
        assert client.reply().status == 200


@pytest.mark.parametrize(
    ("method", "route"),
    [
        (method, route)
        for route, methods in ALLOWED.items()
        for method in METHODS
        if method not in methods
    ],
)
def test_another_method_is_405_with_what_is_allowed(
    service: Service, upstream: ScriptedUpstream, method: str, route: str
) -> None:
    upstream.script(FROM_UPSTREAM)
    reply = service.call(method, route.replace("{id}", str(uuid.uuid4())))
    problem(reply, 405, "method-not-allowed")
    assert allowed(reply.get("Allow")) == ALLOWED[route]
    assert upstream.seen == []


def test_another_method_is_405_before_its_body_is_judged(service: Service) -> None:
    reply = service.call("POST", f"/users/{uuid.uuid4()}", b"not json")
    problem(reply, 405, "method-not-allowed")
    assert service.call("DELETE", "/users", {"x": 1}).status == 405


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", ["/users/a/b", "/health/nothing", "/health/live/deep"])
def test_a_path_that_is_owned_but_empty_is_404_whatever_the_method(
    service: Service, path: str, method: str
) -> None:
    body: dict[str, str] | None = {} if method in ("POST", "PUT", "PATCH") else None
    problem(service.call(method, path, body), 404, "not-found")
