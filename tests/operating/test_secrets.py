"""What is never told, in an answer or in the log, and that the log cannot be made to lie."""

from __future__ import annotations

import datetime
import json
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import (
    DEAD_DATABASE,
    ROOT,
    Databases,
    Reply,
    ScriptedUpstream,
    Seen,
    Service,
    call,
    checkout,
    free_port,
    ok,
    problem,
    pw_migrate,
    run_app,
    wait_for,
)

PASSWORD = "pa55marker"
TOKEN = "t0kenmarker"
OTHER_TOKEN = "other-t0kenmarker"
CREDENTIALS = {
    "Authorization": "Basic YXV0aG1hcmtlcg==",
    "Proxy-Authorization": "Basic cHJveHltYXJrZXI=",
    "Cookie": "session=c00kiemarker",
    "X-Api-Key": "apikeymarker",
}
SECRETS = [PASSWORD, TOKEN, OTHER_TOKEN, "YXV0aG1hcmtlcg", "cHJveHltYXJrZXI", "c00kiemarker"]
INTERNALS = [
    *("Traceback", 'File "', ".py", "psycopg", "peewee", "urllib3", "waitress", "Exception"),
    *("SELECT", "INSERT", "FROM users", "127.0.0.1:1", "nobody", "rolemarker", "hostmarker"),
    *("libpq", "server closed", "connection to server"),
]


def everything(reply: Reply) -> str:
    lines = [reply.status_line.decode("latin-1"), *(f"{n}: {v}" for n, v in reply.headers)]
    return "\n".join([*lines, reply.body.decode("latin-1")])


def assert_tells_nothing(reply: Reply) -> None:
    text = everything(reply)
    assert not [word for word in SECRETS + INTERNALS if word in text], text


def assert_no_secret(text: str) -> None:
    assert not [word for word in SECRETS if word in text], text


def ask_everything(service: Service, headers: dict[str, str]) -> list[Reply]:
    """One request of every kind, each with `headers`."""
    body = {"email": "ann@example.com", "name": "Ann"}
    someone = f"/users/{uuid.uuid4()}"
    return [
        *(service.call("GET", path, headers=headers) for path in ("/health", "/health/live")),
        service.call("GET", "/health/ready", headers=headers),
        *(service.call("GET", path, headers=headers) for path in ("/users", someone, "/proxied")),
        service.call("POST", "/users", body, headers),
        service.call("POST", "/users", b"{broken", headers),
        service.call("PUT", someone, body, headers),
        service.call("PATCH", someone, body, headers),
        service.call("DELETE", someone, headers=headers),
        service.call("TRACE", "/users", headers=headers),
        service.call("TRACE", "/health", headers=headers),
        service.call("GET", "/users?nonsense=1", headers=headers),
        service.call("POST", "/proxied", b"x" * 100, headers),
        service.call("GET", "/x", headers={**headers, "Upgrade": "websocket"}),
        service.call("GET", "/x", headers={**headers, "Host": "two words"}),
        service.call("GET", "/x", headers={**headers, "Content-Length": "nonsense"}),
        service.call("GET", "/x", headers={**headers, "bad name": "1"}),
    ]


@pytest.fixture(scope="module")
def telltale() -> Iterator[int]:
    """The port of a PostgreSQL server that refuses everyone and says why, password and all."""

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                refuse(client)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


def refuse(client: socket.socket) -> None:
    """Answer a start-up message with FATAL (protocol 3, ErrorResponse)."""
    try:
        if client.recv(65536)[4:8] == (80877103).to_bytes(4, "big"):  # SSLRequest
            client.sendall(b"N")
            client.recv(65536)
        text = f'password "{PASSWORD}" of role "rolemarker" is wrong on hostmarker'
        fields = f"SFATAL\0VFATAL\0C28P01\0M{text}\0D{text}\0\0".encode()
        client.sendall(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)
    except OSError:
        return


DATABASES = {
    "refused": f"postgresql://rolemarker:{PASSWORD}@127.0.0.1:1/none",
    "unknown host": f"postgresql://rolemarker:{PASSWORD}@hostmarker.invalid/none",
    "wrong password": f"postgresql://rolemarker:{PASSWORD}@127.0.0.1:%d/none",
    "password as a parameter": f"postgresql://127.0.0.1:1/none?user=rolemarker&password={PASSWORD}",
}


@pytest.mark.parametrize("name", DATABASES)
def test_a_database_that_fails_gives_no_secret_away(
    start: Callable[..., Service], telltale: int, name: str
) -> None:
    uri = DATABASES[name].replace("%d", str(telltale))
    for output in (run_app("check", POSTGRES_URI=uri).stdout, migrate_output(uri)):
        assert_no_secret(output)
    service = start(POSTGRES_URI=uri, USERS_TOKEN=f"{TOKEN},{OTHER_TOKEN}")
    for headers in (CREDENTIALS, {**CREDENTIALS, "Authorization": f"Bearer {TOKEN}"}):
        for reply in ask_everything(service, headers):
            assert_tells_nothing(reply)
    ready = service.call("GET", "/health/ready")
    assert ready.status == 503
    assert service.stop() == 0
    assert_no_secret(service.log)
    assert "Traceback" not in service.log


def migrate_output(uri: str) -> str:
    done = pw_migrate("migrate", uri=uri)
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_credentials_are_neither_answered_nor_logged(
    start: Callable[..., Service], database: str, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    service = start(POSTGRES_URI=database, UPSTREAM_URL=upstream.url, USERS_TOKEN=TOKEN)
    for authorization in (f"Bearer {TOKEN}", f"Bearer {OTHER_TOKEN}", f"Basic {TOKEN}"):
        for reply in ask_everything(service, {**CREDENTIALS, "Authorization": authorization}):
            assert_tells_nothing(reply)
    broken = f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nAuthorization {TOKEN}"
    assert_tells_nothing(service.exchange(f"{broken}\r\n\r\n".encode()))
    assert_tells_nothing(service.exchange(f"{TOKEN} {TOKEN} {TOKEN}\r\n\r\n".encode()))
    assert service.stop() == 0
    assert_no_secret("\n".join(line for line in service.log.splitlines() if TOKEN * 3 not in line))


BROKEN_UPSTREAMS = [
    b"c00kiemarker is not HTTP\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nSet-Cookie: c00kiemarker\r\nBroken c00kiemarker\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: c00kiemarker\r\n\r\n",
    b"HTTP/1.1 101 c00kiemarker\r\nUpgrade: c00kiemarker\r\n\r\n",
]


@pytest.mark.parametrize("answer", BROKEN_UPSTREAMS)
def test_a_broken_upstream_is_not_quoted(
    start: Callable[..., Service], upstream: ScriptedUpstream, answer: bytes
) -> None:
    upstream.script(answer)
    service = start(UPSTREAM_URL=upstream.url)
    # An id of its own, for one that is made may have the port's digits in it.
    reply = service.call("GET", "/x", headers={**CREDENTIALS, "X-Request-Id": "mine"})
    problem(reply, 502, "upstream-broken")
    assert_tells_nothing(reply)
    assert str(upstream.port) not in everything(reply)
    service.stop()
    assert_no_secret(service.log)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_upstream_that_cannot_be_reached_is_not_named(
    start: Callable[..., Service], upstream: ScriptedUpstream, scheme: str
) -> None:
    """The https one finds a server that does not speak TLS, and waits for it to."""
    port = free_port() if scheme == "http" else upstream.port
    url = f"{scheme}://127.0.0.1:{port}/prefixmarker"
    service = start(UPSTREAM_URL=url, UPSTREAM_CONNECT_TIMEOUT=1)
    reply = service.call("GET", "/x", headers={**CREDENTIALS, "X-Request-Id": "mine"})
    assert reply.status == {"http": 502, "https": 504}[scheme]
    assert_tells_nothing(reply)
    assert str(port) not in everything(reply) and "prefixmarker" not in everything(reply)
    service.stop()
    assert_no_secret(service.log)


BAD_SETTINGS = [
    {"POSTGRES_URI": f"mysql://u:{PASSWORD}@h/d"},
    {"POSTGRES_URI": f"u:{PASSWORD}@h/d"},
    {"POSTGRES_URI": f"host=h password={PASSWORD}"},
    {"POSTGRES_URI": f"postgresql://u:{PASSWORD}@h:{PASSWORD}/d"},
    {"POSTGRES_URI": f"postgresql://u:{PASSWORD}%zz@h/d"},
    {"POSTGRES_URI": f"postgresql://u:%00{PASSWORD}@h/d"},
    {"POSTGRES_URI": f"postgresql://u:{PASSWORD}@[::1/d"},
    {"POSTGRES_URI": f"postgresql://u:first@{PASSWORD}@h/d"},
    {"POSTGRES_URI": f"postgresql://u:{PASSWORD}@h/d?{PASSWORD}=1"},
    {"POSTGRES_URI": f"postgresql://u:{PASSWORD}@h/d?sslmode"},
    {"POSTGRES_URI": f"postgresql://u:{PASSWORD}@h:70000/d", "PORT": "x"},
    {"UPSTREAM_URL": f"http://u:{PASSWORD}@h/"},
    {"UPSTREAM_URL": f"http://{PASSWORD}@h/"},
    {"UPSTREAM_URL": f"ftp://u:{PASSWORD}@h/"},
    {"UPSTREAM_URL": f"http://u:{PASSWORD}@[h/"},
    {"UPSTREAM_URL": f"http://h/?key={PASSWORD}"},
    {"USERS_TOKEN": f"{TOKEN} {OTHER_TOKEN}"},
    {"USERS_TOKEN": f"{TOKEN},,{OTHER_TOKEN}"},
    {"USERS_TOKEN": f"{TOKEN}\n{OTHER_TOKEN}"},
    {"USERS_TOKEN": f'"{TOKEN}"'},
    {"USERS_TOKEN": TOKEN, "POSTGRES_URI": f"postgresql://u:{PASSWORD}@h/d", "PORT": "none"},
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=str)
def test_a_bad_setting_is_named_but_not_echoed(settings: dict[str, str]) -> None:
    done = run_app(**{"PORT": str(free_port()), **settings})
    assert done.returncode == 2, done.stdout
    assert [name for name in settings if name in done.stdout]
    assert_no_secret(done.stdout)
    assert "Traceback" not in done.stdout


LOG_KEYS = {"time", "method", "target", "status", "bytes", "ms", "caller", "request_id"}


def logged(service: Service, marker: str, count: int = 1) -> list[dict[str, object]]:
    """The access log's lines whose target has `marker`, when there are `count` of them."""

    def lines() -> list[dict[str, object]] | None:
        found = [line for line in service.access_log if marker in (line["target"] or "")]
        return found if len(found) >= count else None

    found: list[dict[str, object]] = wait_for(lines, 5, "the access log")
    assert len(found) == count, found
    assert all(set(line) == LOG_KEYS for line in found), found
    return found


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET", "/x/%41%2f?a=%20&a=b", {}),
        ("POST", "/x?", {}),
        ("HEAD", "/x?", {}),
        ("brew", "//x/../y?", {}),
        ("GET", "/users?limit=1&", {}),
        ("GET", "/users/nobody?", {}),
        ("DELETE", "/users?", {}),
        ("OPTIONS", "/health?", {}),
        ("GET", "/health/live?", {}),
        ("GET", "/x?", {"Transfer-Encoding": "gzip"}),
        ("GET", "/x?", {"Upgrade": "websocket", "Connection": "upgrade"}),
        ("GET", "http://other.example/x?", {}),
    ],
)
def test_the_access_log_has_one_line_for_each_request(
    service: Service,
    upstream: ScriptedUpstream,
    method: str,
    target: str,
    headers: dict[str, str],
) -> None:
    upstream.script(ok if method != "HEAD" else b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
    marker = uuid.uuid4().hex
    begun = datetime.datetime.now(datetime.UTC)
    reply = service.call(method, target + marker, headers=headers)
    (line,) = logged(service, marker)
    moment = datetime.datetime.fromisoformat(str(line["time"]))
    assert begun - datetime.timedelta(seconds=1) < moment
    assert moment < datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
    assert isinstance(line["ms"], int | float) and 0 <= line["ms"] < 15_000
    assert (line["method"], line["target"]) == (method, target + marker)
    assert (line["status"], line["bytes"]) == (reply.status, len(reply.body))
    assert line["caller"] == "127.0.0.1"
    assert line["request_id"] == reply.get("X-Request-Id")


def test_the_logged_time_is_that_of_the_whole_answer(
    service: Service, upstream: ScriptedUpstream
) -> None:
    go_on = threading.Event()

    def slow(sock: socket.socket, seen: Seen) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        go_on.wait(10)
        sock.sendall(b"world")

    upstream.script(slow)
    marker = uuid.uuid4().hex
    with service.client() as client:
        client.send(f"GET /{marker} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        client.head()
        assert marker not in service.log
        threading.Timer(0.3, go_on.set).start()
        (line,) = logged(service, marker)
    assert line["bytes"] == 10
    assert isinstance(line["ms"], int | float) and line["ms"] >= 250


def test_each_request_on_a_connection_has_its_line(
    service: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    marker = uuid.uuid4().hex
    with service.client() as client:
        for number in range(20):
            client.send(f"GET /{marker}?{number} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert [client.reply().status for _ in range(20)] == [200] * 20
    lines = logged(service, marker, 20)
    assert [line["target"] for line in lines] == [f"/{marker}?{n}" for n in range(20)]
    assert len({line["request_id"] for line in lines}) == 20


def test_long_lines_of_two_workers_do_not_run_into_each_other(
    start: Callable[..., Service], upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    service = start(UPSTREAM_URL=upstream.url, WORKERS=2)
    marker = uuid.uuid4().hex

    def ask(number: int) -> None:
        for _ in range(25):
            service.call("GET", f"/{marker}?" + str(number) * 20_000)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(logged(service, marker, 200)) == 200


# Without a space, which would keep it out of a request target.
FORGED = '{"time":"t","method":"FORGED","target":"/","status":200}'
EVIL = [
    *("\n", "\r", "\r\n", "\x0b", "\x0c", "\x1b[2J\x1b[31m", "\x00", "\x08", "\x7f", "\x1c", "\t"),
    *(
        "\x85",
        "\x9b2J",
        "\xe2\x80\xa8",
        "\xff",
        '"',
        '", "status": 200, "x": "',
        "\\",
        "\\n",
        "\\u000a",
    ),
    *("%0d%0a", "%1b[31m", "%00", "${jndi:x}", "%s%n%(x)s{0}", "</script>"),
]
EVIL_PLACES = [
    "GET /{} HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /users?{} HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET http://x/{} HTTP/1.1\r\nHost: x\r\n\r\n",
    "G{} /x HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /x HTTP/1.1{}\r\nHost: x\r\n\r\n",
    "GET /x HTTP/1.1\r\nHost: {}\r\n\r\n",
    "GET /x HTTP/1.1\r\nHost: x\r\nX-Request-Id: {}\r\n\r\n",
    "GET /users HTTP/1.1\r\nHost: x\r\nX-Request-Id: {}\r\n\r\n",
    "GET /x HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: {}\r\n\r\n",
    "GET /x HTTP/1.1\r\nHost: x\r\nUser-Agent: {}\r\nReferer: {}\r\n\r\n",
    "GET /x HTTP/1.1\r\nHost: x\r\n{}: 1\r\n\r\n",
    "POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
]


@pytest.mark.parametrize("trusted", ["", "127.0.0.1"])
@pytest.mark.parametrize("workers", [1, 2])
def test_no_request_can_forge_or_colour_a_line_of_the_log(
    start: Callable[..., Service], upstream: ScriptedUpstream, trusted: str, workers: int
) -> None:
    upstream.script(ok)
    service = start(UPSTREAM_URL=upstream.url, TRUSTED_PROXIES=trusted, WORKERS=workers)
    for place in EVIL_PLACES:
        for evil in EVIL:
            data = place.replace("{}", evil + FORGED + evil).encode("latin-1")
            reply = service.exchange(data)
            assert reply.status != 500
            for name, value in reply.headers:
                assert "FORGED" not in name + value, reply
    service.stop()
    raw = Path(service._log.name).read_bytes()
    assert not [byte for byte in set(raw) if not 0x20 <= byte < 0x7F and byte != 0x0A]
    assert b"Traceback" not in raw
    assert not [line for line in raw.splitlines() if line.startswith(FORGED.encode())]
    lines = service.access_log
    assert all(set(line) == LOG_KEYS for line in lines)
    assert not [line for line in lines if line["method"] == "FORGED"]
    assert not [line for line in lines if "FORGED" in str(line["caller"]) + line["request_id"]]


def test_the_access_log_can_be_turned_off(
    start: Callable[..., Service], database: str, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    service = start(POSTGRES_URI=database, UPSTREAM_URL=upstream.url, ACCESS_LOG="off")
    marker = uuid.uuid4().hex
    for target in ("/", "/users?x=", "/users/", "/health?", "/health/live?"):
        service.call("GET", target + marker)
    service.exchange(f"GET /{marker} HTTP/1.1\r\n\r\n".encode())
    assert service.stop() == 0
    assert marker not in service.log
    assert service.access_log == []


def test_standard_output_has_the_access_log_and_nothing_else(tmp_path: Path) -> None:
    """So that it can be piped into whatever reads JSON lines."""
    port = free_port()
    settings = {
        "POSTGRES_URI": DEAD_DATABASE,
        "UPSTREAM_URL": "http://127.0.0.1:1",
        "PORT": str(port),
    }
    output = tmp_path / "stdout"
    with output.open("wb") as stdout, (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=checkout(), env=settings, stdout=stdout, stderr=stderr
        )
    try:
        wait_for(lambda: answers(port), 20, "the service to answer")
        # A line is written after its answer, so one lane's may come after the next one's.
        for target in (b"/x", b"/users", b"/health"):
            call(port, "GET", target.decode())
            line = b'"target": "%s"' % target
            wait_for(lambda line=line: line in output.read_bytes(), 5, "the access log, unbuffered")
        process.terminate()
        assert process.wait(35) == 0
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["target"] for line in lines][-3:] == ["/x", "/users", "/health"]
    assert all(set(line) == LOG_KEYS for line in lines)


def answers(port: int) -> bool:
    try:
        return call(port, "GET", "/health/live").status == 200
    except OSError:
        return False


def test_a_statement_that_fails_is_logged_without_its_values_and_once(
    databases: Databases, start: Callable[..., Service]
) -> None:
    """PostgreSQL quotes the statement that it fails to run, and one that is prepared is all
    values."""
    uri = databases.create()
    service = start(POSTGRES_URI=uri, DB_POOL_SIZE=1)
    target = f"/users/{uuid.uuid4()}"
    fragile = {"If-Match": '"fragile-tag"'}

    def calls(number: int) -> list[Reply]:
        user = {"email": f"fragile{number}@example.com", "name": "Fragile Ann"}
        return [
            service.call("PUT", target, user),
            service.call("PATCH", target, user, fragile),
            service.call("DELETE", target, headers=fragile),
            service.call("POST", "/users", user | {"email": f"again-{user['email']}"}),
        ]

    assert [reply.status for reply in calls(0)] == [201, 412, 412, 201]
    steps = str(len(list((ROOT / "migrations").glob("[0-9]*.py"))))
    back = pw_migrate("rollback", "--count", steps, uri=uri, ROLLBACK_DELETES_DATA="yes")
    assert back.returncode == 0, back.stdout + back.stderr
    for number in range(3):
        assert {reply.status for reply in calls(number)} == {503}
    lines = [line for line in service.log.splitlines() if not line.startswith("{")]
    assert "fragile" not in "\n".join(lines).lower()
    assert len([line for line in lines if "42P01" in line]) == 1
