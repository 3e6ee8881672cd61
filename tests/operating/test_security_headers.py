"""Security headers: on what Gatehouse itself answers, and on nothing that the upstream answers."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.harness import Reply, ScriptedUpstream, Service, free_port, ok

TOKEN = "token"
JSON = "application/json"
PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def guarded(database: str, upstream: ScriptedUpstream) -> Iterator[Service]:
    with Service(POSTGRES_URI=database, UPSTREAM_URL=upstream.url, USERS_TOKEN=TOKEN) as running:
        yield running


def ask(service: Service, method: str, target: str, body: object = None, **more: str) -> Reply:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    headers |= {name.replace("_", "-"): value for name, value in more.items()}
    return service.call(method, target, body, headers)


def assert_safe(reply: Reply) -> None:
    """What holds for every answer that Gatehouse itself makes."""
    assert reply.all("X-Content-Type-Options") == ["nosniff"], reply
    if reply.body:
        assert reply.all("Content-Type") in ([JSON], [PROBLEM]), reply
    if reply.status >= 400:
        assert reply.all("Cache-Control") == ["no-store"], reply
        if reply.body:
            assert reply.all("Content-Type") == [PROBLEM], reply
    for name in ("Server", "X-Powered-By", "Set-Cookie", "Access-Control-Allow-Origin"):
        assert reply.all(name) == [], reply


def test_every_answer_about_users_is_kept_out_of_caches_and_sniffers(guarded: Service) -> None:
    body = {"email": f"{uuid.uuid4().hex}@example.com", "name": "Ann"}
    made = ask(guarded, "POST", "/users", body)
    one, other = f"/users/{made.json()['id']}", f"/users/{uuid.uuid4()}"
    tag = made.get("ETag") or ""
    answers = {
        "created": (made, 201),
        "read": (ask(guarded, "GET", one), 200),
        "head": (ask(guarded, "HEAD", one), 200),
        "not modified": (ask(guarded, "GET", one, If_None_Match=tag), 304),
        "listed": (ask(guarded, "GET", "/users?limit=1"), 200),
        "put": (ask(guarded, "PUT", one, body), 200),
        "patched": (ask(guarded, "PATCH", one, {"name": "Bo"}), 200),
        "options": (ask(guarded, "OPTIONS", one), 204),
        "malformed": (ask(guarded, "POST", "/users", b"{", Content_Type=JSON), 400),
        "unauthorized": (guarded.call("GET", one), 401),
        "unauthorized head": (guarded.call("HEAD", one), 401),
        "missing": (ask(guarded, "GET", other), 404),
        "not found": (ask(guarded, "GET", one + "/more"), 404),
        "method": (ask(guarded, "TRACE", one), 405),
        "taken": (ask(guarded, "POST", "/users", body), 409),
        "precondition": (ask(guarded, "PUT", one, body, If_Match='"other"'), 412),
        "large": (ask(guarded, "POST", "/users", b" " * 70_000, Content_Type=JSON), 413),
        "type": (ask(guarded, "POST", "/users", b"{}", Content_Type="text/plain"), 415),
        "invalid": (ask(guarded, "POST", "/users", {}), 422),
        "query": (ask(guarded, "GET", "/users?limit=0"), 422),
        "deleted": (ask(guarded, "DELETE", one), 204),
    }
    for name, (reply, status) in answers.items():
        assert reply.status == status, (name, reply)
        assert_safe(reply)
        assert reply.all("Cache-Control") == ["no-store"], (name, reply)
        if status in (204, 304):
            assert reply.all("Content-Type") == [], (name, reply)
        else:
            assert reply.all("Content-Type") == [JSON if status < 400 else PROBLEM], (name, reply)


def test_health_is_json_and_not_sniffed(guarded: Service) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        for method in ("GET", "HEAD"):
            reply = guarded.call(method, path)
            assert reply.status == 200
            assert reply.all("Content-Type") == [JSON]
            assert_safe(reply)
    for method, path in (("GET", "/health/other"), ("POST", "/health"), ("DELETE", "/health/live")):
        assert_safe(guarded.call(method, path))


REFUSED = [
    b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    b"GET /users HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 2\r\n\r\n",
    b"GET / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"CONNECT other.example:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
    b"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
]


@pytest.mark.parametrize("data", REFUSED, ids=lambda data: repr(data[:40]))
def test_what_is_refused_before_it_is_routed_is_no_exception(guarded: Service, data: bytes) -> None:
    reply = guarded.exchange(data)
    assert reply.status >= 400 and reply.body
    assert_safe(reply)


def test_what_is_answered_for_an_upstream_that_failed_is_no_exception(
    start: Callable[..., Service],
) -> None:
    service = start(UPSTREAM_URL=f"http://127.0.0.1:{free_port()}")
    for method in ("GET", "HEAD", "POST"):
        reply = service.call(method, "/x")
        assert reply.status == 502
        assert_safe(reply)


def test_what_is_answered_for_a_database_that_failed_is_no_exception(
    start: Callable[..., Service],
) -> None:
    service = start()
    for target in ("/users", f"/users/{uuid.uuid4()}", "/health/ready"):
        reply = service.call("GET", target)
        assert reply.status == 503 and reply.get("Retry-After")
        assert_safe(reply)
    assert_safe(service.call("GET", "/health"))


ADDED = """
    X-Content-Type-Options Cache-Control Content-Type X-Frame-Options Referrer-Policy Vary Server
    Strict-Transport-Security Content-Security-Policy Access-Control-Allow-Origin Pragma Expires
"""


@pytest.mark.parametrize("status", [200, 204, 301, 304, 401, 404, 500, 503])
def test_nothing_is_added_to_the_upstreams_answers(
    guarded: Service, upstream: ScriptedUpstream, status: int
) -> None:
    framing = b"" if status in (204, 304) else b"Content-Length: 2\r\n\r\nok"
    upstream.script(b"HTTP/1.1 %d Mine\r\nX-Mine: 1\r\n" % status + (framing or b"\r\n"))
    reply = guarded.call("GET", "/x")
    assert (reply.status, reply.reason) == (status, "Mine")
    assert not [name for name in ADDED.split() if reply.get(name) is not None], reply


def test_the_upstreams_own_security_headers_come_back_as_they_are(
    guarded: Service, upstream: ScriptedUpstream
) -> None:
    own = [
        ("cache-control", "public, max-age=60"),
        ("X-CONTENT-TYPE-OPTIONS", "sniff-all-you-like"),
        ("Content-Security-Policy", "default-src 'none'"),
        ("Server", "mine"),
    ]
    lines = "".join(f"{name}: {value}\r\n" for name, value in own)
    upstream.script(f"HTTP/1.1 200 OK\r\n{lines}Content-Length: 0\r\n\r\n".encode())
    reply = guarded.call("GET", "/x")
    names = {name.lower() for name, _ in own}
    assert [(name, value) for name, value in reply.headers if name.lower() in names] == own
    upstream.script(ok)
