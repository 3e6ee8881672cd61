"""Who gets at /users, what the upstream is told of a caller, and no way round either."""

from __future__ import annotations

import contextlib
import re
import socket
import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.harness import Reply, ScriptedUpstream, Service, ok, problem, run_app, wait_for

TOKENS = ("first-token.1~+/==", "second_token", "third")
NOT_LOOPBACK = "192.0.2.1"  # TEST-NET-1 (RFC 5737): no machine has it, so nothing can listen there
SANE_ID = re.compile(r"[A-Za-z0-9._~+/=:@-]{1,128}")


def bearer(token: str = TOKENS[0]) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def assert_unauthorized(reply: Reply) -> None:
    problem(reply, 401, "unauthorized")
    assert (reply.get("WWW-Authenticate") or "").startswith('Bearer realm="users"'), reply


@pytest.fixture(scope="module")
def guarded(database: str, upstream: ScriptedUpstream) -> Iterator[Service]:
    """Gatehouse that asks for one of three tokens."""
    tokens = ", ".join(TOKENS)
    with Service(POSTGRES_URI=database, UPSTREAM_URL=upstream.url, USERS_TOKEN=tokens) as running:
        yield running


@pytest.fixture(scope="module")
def user(guarded: Service) -> dict[str, str]:
    body = {"email": "secret-person@example.com", "name": "Secret Person"}
    reply = guarded.call("POST", "/users", body, bearer())
    assert reply.status == 201, reply
    return dict(reply.json())


@pytest.fixture
def untouchable() -> Iterator[socket.socket]:
    """A listening socket in place of the database; whoever connects to it is seen by `accept`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


@pytest.mark.parametrize("token", TOKENS)
def test_each_of_several_tokens_opens_users(guarded: Service, token: str) -> None:
    assert guarded.call("GET", "/users", headers=bearer(token)).status == 200


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "bEaReR"])
def test_the_scheme_is_case_insensitive(guarded: Service, scheme: str) -> None:
    """RFC 9110 section 11.1."""
    reply = guarded.call("GET", "/users", headers={"Authorization": f"{scheme} {TOKENS[0]}"})
    assert reply.status == 200


WRONG = [
    "Bearer wrong",
    "Bearer",
    "Bearer ",
    f"Bearer {TOKENS[0][:-1]}",
    f"Bearer {TOKENS[0]}=",
    f"Bearer {TOKENS[2].upper()}",
    f"Bearer {TOKENS[0]},{TOKENS[1]}",
    f"Bearer {TOKENS[0]}, Bearer wrong",
    f"Bearer {', '.join(TOKENS)}",
    f"Bearer {TOKENS[2]} {TOKENS[2]}",
    f'Bearer "{TOKENS[2]}"',
    f"Bearer token={TOKENS[2]}",
    f"Bearer{TOKENS[2]}",
    f"Basic {TOKENS[2]}",
    f"Token {TOKENS[2]}",
    f"X Bearer {TOKENS[2]}",
    TOKENS[2],
    "Bearer \xe9\xff",
    "Bearer " + "x" * 5000,
    "None",
]


@pytest.mark.parametrize("credentials", WRONG)
def test_no_other_credentials_open_users(
    guarded: Service, user: dict[str, str], credentials: str
) -> None:
    reply = guarded.call("GET", "/users", headers={"Authorization": credentials})
    assert_unauthorized(reply)
    assert user["email"] not in reply.body.decode()


def test_a_missing_token_is_told_apart_from_a_wrong_one(guarded: Service) -> None:
    """RFC 6750 section 3.1: no error code where there were no credentials, or of another scheme."""
    wrong = guarded.call("GET", "/users", headers=bearer("wrong"))
    for headers in ({}, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer"}):
        missing = guarded.call("GET", "/users", headers=headers)
        assert missing.get("WWW-Authenticate") == 'Bearer realm="users"'
    assert wrong.get("WWW-Authenticate") == 'Bearer realm="users", error="invalid_token"'


@pytest.mark.parametrize("order", [(TOKENS[0], "wrong"), ("wrong", TOKENS[0]), TOKENS[:2]])
def test_two_authorization_lines_open_nothing(guarded: Service, order: tuple[str, str]) -> None:
    lines = "".join(f"Authorization: Bearer {token}\r\n" for token in order)
    reply = guarded.exchange(f"GET /users HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
    assert_unauthorized(reply)


def test_a_token_elsewhere_opens_nothing(guarded: Service) -> None:
    token = TOKENS[2]
    assert_unauthorized(guarded.call("GET", f"/users?access_token={token}"))
    for name in ("X-Authorization", "Proxy-Authorization", "X-Api-Key", "Cookie"):
        for value in (token, f"Bearer {token}", f"access_token={token}"):
            assert_unauthorized(guarded.call("GET", "/users", headers={name: value}))
    body = b"access_token=" + token.encode()
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert_unauthorized(guarded.call("POST", "/users", body, form))


def test_a_token_counts_for_its_own_request_only(guarded: Service) -> None:
    line = b"GET /users HTTP/1.1\r\nHost: x\r\n"
    known = line + f"Authorization: Bearer {TOKENS[0]}\r\n\r\n".encode()
    with guarded.client() as client:
        client.send(known + line + b"\r\n" + known)
        assert [client.reply().status for _ in range(2)] == [200, 401]


METHODS = [
    *("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY", "PROPFIND"),
    *("get", "Get", "options", "FOO", "M-SEARCH", "GET!", "*", "users"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", ["/users", "/users/", "/users/{id}", "/users/no-id", "/users/a/b"])
def test_no_method_gets_round_the_token(
    guarded: Service, user: dict[str, str], method: str, path: str
) -> None:
    reply = guarded.call(method, path.format(id=user["id"]))
    if method == "HEAD":
        assert (reply.status, reply.body) == (401, b"")
    else:
        assert_unauthorized(reply)


OVERRIDES = [
    "X-HTTP-Method-Override: DELETE",
    "X-HTTP-Method: DELETE",
    "X-Method-Override: DELETE",
    "X-Original-URL: /health/live",
    "X-Rewrite-URL: /health/live",
    "X-Forwarded-Uri: /health/live",
    "X-Forwarded-Prefix: /health",
    "Script-Name: /health",
    "X-Forwarded-For: 127.0.0.1",
    "X-Real-IP: 127.0.0.1",
    "Forwarded: for=127.0.0.1",
    "Connection: Authorization",
    "Upgrade: websocket\r\nConnection: upgrade",
    "Expect: 100-continue",
    "Transfer-Encoding: chunked",
    "Content-Length: 65537",
    "Content-Type: nonsense",
    "If-Match: nonsense",
]


@pytest.mark.parametrize("line", OVERRIDES)
def test_no_header_gets_round_the_token(guarded: Service, user: dict[str, str], line: str) -> None:
    target = f"/users/{user['id']}"
    reply = guarded.exchange(f"GET {target} HTTP/1.1\r\nHost: x\r\n{line}\r\n\r\n".encode())
    assert_unauthorized(reply)
    assert guarded.call("GET", target, headers=bearer()).status == 200


OWNED = """
    /users /users/ /users? /users?limit=1 /users/?limit=1 /users?/health/live /users// /users//x
    /users/./x /users/.. /users/../health/live /users/%2e%2e /users/%00 /users/%0a /users/%FF
    /users/%zz /users/;x /users/a%2Fb /users%2F /users%2f1 /%75sers /user%73 /%75%73%65%72%73
    /%75%73%65%72%73/1 http://127.0.0.1/users HTTP://other.example/users
    https://other.example:1/users/ http://name:word@other.example/users
    http://other.example/%75sers?x=http://y/
"""


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("target", OWNED.split())
def test_no_spelling_of_an_owned_path_gets_round_the_token(
    guarded: Service, upstream: ScriptedUpstream, target: str, version: str
) -> None:
    upstream.seen.clear()
    reply = guarded.exchange(f"GET {target} HTTP/{version}\r\nHost: x\r\n\r\n".encode())
    assert_unauthorized(reply)
    assert upstream.seen == []


FORWARDED = """
    /Users /USERS/ /%55sers /users.json /usersx /users%2Ejson /users;x=1 /users%3Flimit=1 /users%20
    /users%09 /users%252F1 /%2575sers /user /users%5C1 /x/../users /x/%2e%2e/users /./users
    /%2e/users /x/..%2Fusers /healthy /health.json /a?/users /%EF%BC%8Fusers /users%C2%A0
    /us%C3%A9rs /users%E2%80%8B
"""


@pytest.mark.parametrize("target", FORWARDED.split())
def test_what_only_looks_like_an_owned_path_is_the_upstreams(
    guarded: Service, upstream: ScriptedUpstream, target: str
) -> None:
    upstream.script(b"HTTP/1.1 203 From Upstream\r\nContent-Length: 8\r\n\r\nupstream")
    reply = guarded.call("GET", target)
    assert (reply.status, reply.reason, reply.body) == (203, "From Upstream", b"upstream")
    assert [seen.target.decode() for seen in upstream.seen] == [target]


DOUBTFUL = [
    *rb"""
        //users ///users/1 /%2Fusers /%2F%2Fusers /us%FFers /users%FF /users%00 /users%0d%0a
        /%00users /users#x /users\1 \users users users/1 %2Fusers @other/users * ?/users
        /?/../users /%u0075sers //other.example/users other.example:80 http:/users http:users
        http:///users http://x http://x//users http://x:y:z/users http://[/users http://x?/users
        http://x#/users ftp://x/users
    """.split(),
    *(b"/us\xc3\xa9rs", b"/users\xff", b"/users\x01", b"/users\x0b1", b"/users\t"),
]


def test_connect_is_refused_as_any_other_method_that_a_path_does_not_have(
    guarded: Service, service: Service
) -> None:
    data = b"CONNECT /users HTTP/1.1\r\nHost: x\r\n\r\n"
    problem(guarded.exchange(data), 401, "unauthorized")
    reply = service.exchange(data)
    problem(reply, 405, "method-not-allowed")
    assert reply.get("Allow") == service.call("TRACE", "/users").get("Allow")


@pytest.mark.parametrize("method", [b"GET", b"OPTIONS", b"CONNECT"])
@pytest.mark.parametrize("target", DOUBTFUL)
def test_a_doubtful_spelling_is_refused_or_the_upstreams(
    guarded: Service, user: dict[str, str], upstream: ScriptedUpstream, method: bytes, target: bytes
) -> None:
    """Whatever it is taken for, no user is read with it."""
    upstream.script(b"HTTP/1.1 203 From Upstream\r\nContent-Length: 8\r\n\r\nupstream")
    reply = guarded.exchange(method + b" " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    if reply.status == 203:
        assert reply.body == b"upstream" and len(upstream.seen) == 1
    else:
        assert reply.status in (400, 401, 405), reply
        assert reply.get("Content-Type") == "application/problem+json"
        assert upstream.seen == []
    assert user["email"].encode() not in reply.body


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/health/"])
def test_health_asks_for_no_token(guarded: Service, path: str) -> None:
    assert guarded.call("GET", path).status == 200
    assert guarded.call("GET", path, headers=bearer("wrong")).status == 200
    assert guarded.call("OPTIONS", path).status == 204


def test_options_on_users_needs_the_token(guarded: Service) -> None:
    assert_unauthorized(guarded.call("OPTIONS", "/users"))
    reply = guarded.call("OPTIONS", "/users", headers=bearer())
    assert reply.status == 204 and reply.get("Allow")


UNREAD = [
    "Content-Length: 100",
    "Content-Length: 100\r\nContent-Type: application/json",
    "Content-Length: 100\r\nExpect: 100-continue",
    "Content-Length: 10000000",
    "Transfer-Encoding: chunked",
]


@pytest.mark.parametrize("framing", UNREAD)
@pytest.mark.parametrize("target", ["/users", "/users/x"])
def test_a_401_comes_before_the_body_is_read(guarded: Service, target: str, framing: str) -> None:
    with guarded.client() as client:
        client.send(f"POST {target} HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
        head = client.head()
        assert head.startswith(b"HTTP/1.1 401 "), head
        assert b"\r\nconnection: close" in head.lower()


def test_a_body_that_follows_a_401_does_not_cost_the_answer(guarded: Service) -> None:
    """A connection closed with unread bytes in it is reset, and a reset can overtake the answer."""
    head = b"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n"
    for _ in range(5):
        with guarded.client() as client:
            client.send(head)
            for _ in range(50):
                with contextlib.suppress(ConnectionError):
                    client.send(b"x" * 10_000)
            assert_unauthorized(client.reply())


def test_a_401_does_not_touch_the_database(
    start: Callable[..., Service], untouchable: socket.socket
) -> None:
    uri = f"postgresql://nobody@127.0.0.1:{untouchable.getsockname()[1]}/none"
    service = start(POSTGRES_URI=uri, USERS_TOKEN=TOKENS[0])
    body = {"email": "ann@example.com", "name": "Ann"}
    someone = f"/users/{uuid.uuid4()}"
    assert_unauthorized(service.call("GET", "/users"))
    assert_unauthorized(service.call("GET", someone))
    assert_unauthorized(service.call("POST", "/users", body))
    assert_unauthorized(service.call("PUT", someone, body, bearer("wrong")))
    assert_unauthorized(service.call("PATCH", someone, body, bearer("wrong")))
    assert_unauthorized(service.call("DELETE", someone, headers=bearer("wrong")))
    with pytest.raises(BlockingIOError):
        untouchable.accept()


def test_a_dead_database_is_not_shown_to_a_stranger(start: Callable[..., Service]) -> None:
    service = start(USERS_TOKEN=TOKENS[0])
    assert_unauthorized(service.call("GET", "/users"))
    assert service.call("GET", "/users", headers=bearer()).status == 503


def test_users_are_open_on_loopback_where_no_token_is_set(service: Service) -> None:
    assert service.call("GET", "/users").status == 200
    assert service.call("GET", "/users", headers=bearer("anything")).status == 200


def test_users_auth_none_lets_everyone_in(start: Callable[..., Service], database: str) -> None:
    service = start(POSTGRES_URI=database, USERS_TOKEN=TOKENS[0], USERS_AUTH="none")
    assert service.call("GET", "/users").status == 200


@pytest.mark.parametrize("host", [NOT_LOOPBACK, "0.0.0.0", "::", "gatehouse.example"])
def test_it_refuses_to_start_open_to_the_world(host: str) -> None:
    done = run_app(HOST=host)
    assert done.returncode == 2
    assert [line for line in done.stdout.splitlines() if "USERS_TOKEN" in line], done.stdout


@pytest.mark.parametrize(
    "settings",
    [
        {"HOST": NOT_LOOPBACK, "USERS_AUTH": "none"},
        {"HOST": NOT_LOOPBACK, "USERS_TOKEN": "t"},
        {"HOST": "localhost"},
        {"HOST": "::1"},
        {"HOST": "127.8.8.8"},
    ],
    ids=str,
)
def test_it_starts_where_that_was_chosen_or_only_this_machine_can_reach_it(
    settings: dict[str, str],
) -> None:
    done = run_app("check", **settings)
    # The configuration is right; only the database is not there.
    assert done.returncode == 5, done.stdout
    assert "USERS_TOKEN" not in done.stdout


@pytest.mark.parametrize("tokens", [",", "good,", ",good", "two words", "good,,good", "caf\u00e9"])
def test_tokens_that_nobody_could_send_are_refused_at_start(tokens: str) -> None:
    done = run_app(USERS_TOKEN=tokens)
    assert done.returncode == 2
    assert [line for line in done.stdout.splitlines() if "USERS_TOKEN" in line], done.stdout


@pytest.mark.parametrize(
    "value", [f"Bearer {TOKENS[0]}", "Basic YTpi", 'Digest x="y", z', "odd", ""]
)
def test_the_upstreams_own_authorization_passes_untouched(
    guarded: Service, upstream: ScriptedUpstream, value: str
) -> None:
    challenge = b'Basic realm="upstream", charset="UTF-8"'
    upstream.script(
        b"HTTP/1.1 401 Mine\r\nWWW-Authenticate: " + challenge + b"\r\nContent-Length: 0\r\n\r\n"
    )
    reply = guarded.call("GET", "/private", headers={"Authorization": value})
    assert upstream.seen[0].all("Authorization") == [value]
    assert (reply.status, reply.reason) == (401, "Mine")
    assert reply.all("WWW-Authenticate") == [challenge.decode()]


@pytest.fixture(scope="module")
def behind(upstream: ScriptedUpstream) -> Iterator[Service]:
    """Gatehouse that believes what this machine and one network say of their callers."""
    networks = "127.0.0.0/8, 10.1.0.0/16"
    with Service(UPSTREAM_URL=upstream.url, TRUSTED_PROXIES=networks) as running:
        yield running


CLAIMS = {
    "X-Forwarded-For": "203.0.113.7",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "shop.example",
    "Forwarded": "for=203.0.113.7;proto=https",
    "X-Real-IP": "203.0.113.7",
}


def test_a_stranger_is_not_believed_about_where_it_comes_from(
    guarded: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    guarded.call("GET", "/x", headers=CLAIMS)
    seen = upstream.seen[0]
    assert seen.all("X-Forwarded-For") == ["127.0.0.1"]
    assert seen.all("X-Forwarded-Proto") == ["http"]
    assert seen.all("X-Forwarded-Host") == [f"127.0.0.1:{guarded.port}"]
    assert seen.all("Forwarded") == seen.all("X-Real-IP") == []
    assert b"203.0.113.7" not in seen.head and b"shop.example" not in seen.head


@pytest.mark.parametrize("name", list(CLAIMS))
def test_a_stranger_cannot_repeat_respell_or_hide_a_claim(
    guarded: Service, upstream: ScriptedUpstream, name: str
) -> None:
    """Many applications cannot tell X_Forwarded_For from X-Forwarded-For."""
    upstream.script(ok)
    claim = CLAIMS[name]
    spellings = [name, name.lower(), name.upper(), name.replace("-", "_")]
    lines = [f"{spelling}: {claim}" for spelling in spellings]
    lines += [f"Connection: {name}", f"connection: close, {name.lower()}"]
    head = "\r\n".join(["GET /x HTTP/1.1", "Host: x", *lines])
    assert guarded.exchange(f"{head}\r\n\r\n".encode()).status == 200
    seen = upstream.seen[0]
    assert claim.encode() not in seen.head
    assert len(seen.all(name)) == (1 if name.startswith("X-Forwarded-") else 0)


def test_a_trusted_proxy_is_believed_and_extended(
    behind: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    behind.call("GET", "/x", headers=CLAIMS)
    seen = upstream.seen[0]
    assert seen.get("X-Forwarded-For") == "203.0.113.7, 127.0.0.1"
    assert seen.all("X-Forwarded-Proto") == ["https"]
    assert seen.all("X-Forwarded-Host") == ["shop.example"]


def test_a_trusted_proxy_that_says_nothing_gets_what_was_seen(
    behind: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    behind.call("GET", "/x")
    seen = upstream.seen[0]
    assert seen.all("X-Forwarded-For") == ["127.0.0.1"]
    assert seen.all("X-Forwarded-Proto") == ["http"]
    assert seen.all("X-Forwarded-Host") == [f"127.0.0.1:{behind.port}"]


def logged_caller(service: Service, marker: str) -> str:
    def callers() -> list[str]:
        return [line["caller"] for line in service.access_log if marker in line["target"]]

    (caller,) = wait_for(callers, 5, "the access log")
    return str(caller)


@pytest.mark.parametrize(
    ("chain", "caller"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("198.51.100.1, 203.0.113.7", "203.0.113.7"),
        ("198.51.100.1, 203.0.113.7, 10.1.2.3", "203.0.113.7"),
        ("2001:db8::7", "2001:db8::7"),
        ("198.51.100.1, 203.0.113.7, ::ffff:10.1.2.3", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("", "127.0.0.1"),
        ("nonsense", "127.0.0.1"),
        ('127.0.0.1", "status": 200', "127.0.0.1"),
        ('2001:db8::7%"\\', "2001:db8::7"),
        # Of a chain of trusted proxies without an end, the last fifty are looked at.
        ("203.0.113.7" + ", 10.1.2.3" * 49, "203.0.113.7"),
        ("203.0.113.7" + ", 10.1.2.3" * 50, "10.1.2.3"),
    ],
)
def test_the_log_names_the_nearest_caller_that_is_not_a_trusted_proxy(
    behind: Service, chain: str, caller: str
) -> None:
    """What stands further left in X-Forwarded-For is whatever that caller chose to write."""
    marker = uuid.uuid4().hex
    behind.call("GET", f"/{marker}", headers={"X-Forwarded-For": chain})
    assert logged_caller(behind, marker) == caller


def test_a_stranger_cannot_choose_its_name_in_the_log(guarded: Service) -> None:
    marker = uuid.uuid4().hex
    guarded.call("GET", f"/{marker}", headers=CLAIMS)
    assert logged_caller(guarded, marker) == "127.0.0.1"


SANE = ["a", "0", "x" * 128, "req-1.2_3~4+5/6=7:8@9", "01936f3e-0000-7000-8000-000000000000"]
INSANE = ["", "x" * 129, "two words", "a,b", "a;b", '"a"', "a\\b", "{}", "<b>", "a\tb", "caf\xe9"]


@pytest.mark.parametrize("request_id", SANE)
def test_a_sane_request_id_is_kept_everywhere(
    guarded: Service, upstream: ScriptedUpstream, request_id: str
) -> None:
    upstream.script(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    headers = {"X-Request-Id": request_id}
    proxied = guarded.call("GET", "/x", headers=headers)
    assert upstream.seen[0].all("X-Request-Id") == [request_id]
    assert proxied.all("X-Request-Id") == [request_id]
    assert guarded.call("GET", "/users", headers=headers).json()["request_id"] == request_id
    wait_for(
        lambda: [line["request_id"] for line in guarded.access_log].count(request_id) == 2,
        what="both in the access log",
    )


@pytest.mark.parametrize("request_id", INSANE)
def test_any_other_request_id_is_replaced(
    guarded: Service, upstream: ScriptedUpstream, request_id: str
) -> None:
    upstream.script(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    headers = {"X-Request-Id": request_id}
    proxied = guarded.call("GET", "/x", headers=headers)
    (sent,) = upstream.seen[0].all("X-Request-Id")
    assert SANE_ID.fullmatch(sent) and sent != request_id
    assert proxied.all("X-Request-Id") == [sent]
    own = guarded.call("GET", "/users", headers=headers).json()["request_id"]
    assert SANE_ID.fullmatch(own) and own not in (sent, request_id)


def test_two_request_ids_are_neither(guarded: Service, upstream: ScriptedUpstream) -> None:
    upstream.script(ok)
    ids = b"X-Request-Id: one\r\nX-Request-Id: two\r\n"
    guarded.exchange(b"GET /x HTTP/1.1\r\nHost: x\r\n" + ids + b"\r\n")
    (sent,) = upstream.seen[0].all("X-Request-Id")
    assert SANE_ID.fullmatch(sent) and sent not in ("one", "two")


def test_requests_without_an_id_get_one_each(guarded: Service, upstream: ScriptedUpstream) -> None:
    upstream.script(ok)
    replies = [guarded.call("GET", "/x") for _ in range(20)]
    sent = [seen.get("X-Request-Id") for seen in upstream.seen]
    assert sent == [reply.get("X-Request-Id") for reply in replies]
    assert len(set(sent)) == 20


OWN_NAMES = ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.9.9.9", "[::1]:80", "a.localhost"]
OTHER_NAMES = ["evil.example", "localhost.evil.example:8080", "127.0.0.1.evil.example", "notlocalhost", "10.0.0.1", "127.0.0.1%25evil.example", "127.0.0.1,127.0.0.1"]  # fmt: skip
BROWSERS = [{"Accept-Language": "en"}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Mode": "cors"}, {"Sec-Fetch-Site": "same-origin"}]  # fmt: skip


@pytest.mark.parametrize("browser", BROWSERS, ids=lambda headers: next(iter(headers)))
def test_without_a_token_a_browser_has_to_call_this_machine_by_its_own_name(
    service: Service, browser: dict[str, str]
) -> None:
    """A page in it may have its own name lead to 127.0.0.1, and would be one with all users to the
    browser (DNS rebinding)."""
    for host in OWN_NAMES:
        assert service.call("GET", "/users", headers={"Host": host} | browser).status == 200
    body = {"email": f"{uuid.uuid4().hex}@example.com", "name": "Eve"}
    for host in OTHER_NAMES:
        for method, target in (("GET", "/users"), ("POST", "/users"), ("PUT", f"/users/{uuid.uuid4()}")):  # fmt: skip
            given = None if method == "GET" else body
            reply = service.call(method, target, given, {"Host": host} | browser)
            problem(reply, 401, "unauthorized")
            assert "USERS_TOKEN" in reply.json()["detail"]
    found = service.call("GET", f"/users?email={body['email']}").json()
    assert found["users"] == []


AFAR = [
    ("X-Forwarded-For", "203.0.113.7"),
    ("X-Forwarded-For", "127.0.0.1, 203.0.113.7"),
    ("X-Forwarded-For", "203.0.113.7, 127.0.0.1"),
    ("X-Forwarded-For", "unknown"),
    ("X-Real-IP", "2001:db8::7"),
    ("Forwarded", "for=203.0.113.7;proto=https"),
    ("Forwarded", 'for="[::1]:80", for=10.0.0.1'),
    ("Forwarded", "proto=https"),
    ("Forwarded", "for=127.0.0.1, for = 8.8.8.8"),
    ("Forwarded", "for=127.0.0.1, proto=https;by=_proxy"),
    ("Forwarded", 'x="a,for=127.0.0.1"'),
    ("X-Forwarded-For", "127.0.0.1:6.6.6.6"),
    ("X-Forwarded-For", "[::1]6.6.6.6"),
    ("X-Forwarded-For", ",".join(["127.0.0.1"] * 1000)),
]


@pytest.mark.parametrize(("name", "value"), AFAR, ids=str)
def test_without_a_token_a_proxy_lets_no_other_machine_in(
    service: Service, behind: Service, name: str, value: str
) -> None:
    """nginx on this machine forwarded the whole world's requests, and Gatehouse answered them."""
    body = {"email": f"{uuid.uuid4().hex}@example.com", "name": "Eve"}
    for running in (service, behind):
        for method, target in (("GET", "/users"), ("POST", "/users"), ("PUT", f"/users/{uuid.uuid4()}")):  # fmt: skip
            given = None if method == "GET" else body
            reply = running.call(method, target, given, {name: value})
            problem(reply, 401, "unauthorized")
            assert "USERS_TOKEN" in reply.json()["detail"]
    assert service.call("GET", f"/users?email={body['email']}").json()["users"] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Forwarded-For", "127.0.0.1, ,"),
        ("X-Forwarded-For", ""),
        ("X-Forwarded-For", "::1, ::ffff:127.0.0.1, 127.0.0.1:5000"),
        ("X-Real-IP", "::1"),
        ("Forwarded", 'for="[::1]:5000";proto=http, for=127.0.0.1'),
    ],
)
def test_without_a_token_a_proxy_may_forward_what_is_this_machines_own(
    service: Service, name: str, value: str
) -> None:
    """A development server does that."""
    assert service.call("GET", "/users", headers={name: value}).status == 200


def test_who_is_no_browser_may_call_it_as_it_likes(service: Service) -> None:
    for host in (*OTHER_NAMES, *OWN_NAMES):
        assert service.call("GET", "/users", headers={"Host": host}).status == 200


def test_a_browser_may_use_any_name_where_a_token_is_asked_for_or_nobody_is(
    guarded: Service, start: Callable[..., Service], database: str
) -> None:
    headers = {"Host": "app.example", "Accept-Language": "en"}
    assert guarded.call("GET", "/users", headers=headers | bearer()).status == 200
    open_to_all = start(POSTGRES_URI=database, USERS_AUTH="none")
    assert open_to_all.call("GET", "/users", headers=headers).status == 200


# What a page of another site may have a browser send without asking first (Fetch, "CORS-safelisted
# request-header"): forms, images, beacons, fetch with no-cors.
SIMPLE_TYPES = [None, "text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]  # fmt: skip


@pytest.mark.parametrize("kind", SIMPLE_TYPES)
def test_a_page_of_another_site_writes_nothing(service: Service, kind: str | None) -> None:
    email = f"{uuid.uuid4().hex}@example.com"
    for body in (
        f'{{"email": "{email}", "name": "Eve"}}',
        f"email,name\n{email},Eve\n",
        f"email={email}&name=Eve&_method=PUT",
    ):
        headers = {"Origin": "http://evil.example"} | ({"Content-Type": kind} if kind else {})
        reply = service.call("POST", "/users", body.encode(), headers)
        problem(reply, 415, "unsupported-media-type")
    assert service.call("GET", f"/users?email={email}").json()["users"] == []


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "POST"])
def test_a_page_of_another_site_is_allowed_nothing_when_it_asks(
    service: Service, method: str
) -> None:
    headers = {
        "Origin": "http://evil.example",
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "content-type",
    }
    for target in ("/users", f"/users/{uuid.uuid4()}"):
        reply = service.call("OPTIONS", target, headers=headers)
        assert reply.status == 204
        assert not [name for name, _ in reply.headers if name.lower().startswith("access-control")]
