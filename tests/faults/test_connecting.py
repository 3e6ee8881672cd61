"""Every common way to say where the database is, and that all who connect take it alike.

Each of these is how somebody runs PostgreSQL: schemas by `search_path`, service files, poolers, TLS.
"""

from __future__ import annotations

import socket
import ssl
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme

from postgres.connect import Connector, Target, settings_in
from postgres.deadlines import borrowed
from tests.harness import Service, pw_migrate, run_app, wait_for
from tests.harness.servers import Pooler, Server

Start = Callable[..., Service]
WORDS = {
    "0A000": "this pooler doesn't support command-line options",
    "08P01": "unsupported startup parameter in options: statement_timeout",
    "42704": "неизвестный параметр",
    "XX000": "no",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def tenants(server: Server) -> str:
    """A database in which `public` is another tenant's, migrated and empty; `app` is ours."""
    name = server.create()
    server.sql("CREATE SCHEMA app", database=name)
    return name


def new_user() -> dict[str, str]:
    return {"email": f"{uuid.uuid4().hex}@example.com", "name": "Ann"}


def count(server: Server, database: str, table: str) -> int:
    [(found,)] = server.sql(f"SELECT count(*) FROM {table}", database=database)
    return int(found)


def check(**settings: str) -> tuple[int, list[str]]:
    done = run_app("check", **settings)
    return done.returncode, done.stdout.splitlines()


def in_the_environment(folder: Path, uri: str) -> dict[str, str]:
    return {"POSTGRES_URI": uri, "PGOPTIONS": "-c search_path=app"}


def in_the_uri(folder: Path, uri: str) -> dict[str, str]:
    # libpq's own rule: the URI's replace those of the environment.
    return {
        "POSTGRES_URI": uri + "?options=" + quote("-c search_path=app"),
        "PGOPTIONS": "-c search_path=nowhere",
    }


def in_a_service_file(folder: Path, uri: str) -> dict[str, str]:
    file = folder / "services.conf"
    file.write_text("[gatehouse]\noptions=-c search_path=app -c work_mem=5MB\n")
    return {"POSTGRES_URI": uri + "?service=gatehouse", "PGSERVICEFILE": str(file)}


def in_a_service_of_the_environment(folder: Path, uri: str) -> dict[str, str]:
    given = in_a_service_file(folder, uri)
    return given | {"POSTGRES_URI": uri, "PGSERVICE": "gatehouse"}


@pytest.mark.parametrize(
    "given",
    [in_the_environment, in_the_uri, in_a_service_file, in_a_service_of_the_environment],
)
def test_all_work_in_the_schema_that_was_migrated(
    server: Server,
    tenants: str,
    start: Start,
    tmp_path: Path,
    given: Callable[[Path, str], dict[str, str]],
) -> None:
    """Once the service alone replaced `options`: it wrote to the other tenant's table."""
    settings = given(tmp_path, server.uri(tenants))
    assert check(**settings)[0] == 4 or check(**settings)[0] == 3
    uri = settings["POSTGRES_URI"]
    done = pw_migrate(
        "migrate", uri=uri, **{k: v for k, v in settings.items() if k != "POSTGRES_URI"}
    )
    assert done.returncode == 0, done.stderr
    assert check(**settings)[1][1:3] == ["database: ok", "schema: ok"]
    service = start(**settings)
    assert service.call("POST", "/users", new_user()).status == 201
    assert (count(server, tenants, "app.users"), count(server, tenants, "public.users")) == (1, 0)
    # Ours is there as well.
    assert "statement_timeout" not in service.log
    with server.holding("LOCK TABLE app.users", database=tenants):
        reply = service.call("GET", "/users")
        assert reply.status == 503, reply
        wait_for(lambda: server.waiting(tenants) == 0, 5, "the server to give up too")


def test_a_users_table_outside_the_schema_that_was_migrated_is_told(server: Server) -> None:
    name = server.create()
    server.sql("CREATE SCHEMA app", database=name)
    server.sql("ALTER TABLE users SET SCHEMA app", database=name)
    uri = server.uri(name) + "?options=" + quote("-c search_path=app,public")
    code, lines = check(POSTGRES_URI=uri)
    assert code == 4
    assert "table users is in schema app, and schema public was migrated" in lines[2]


@pytest.mark.parametrize("sqlstate", WORDS)
def test_a_pooler_that_refuses_start_up_options_is_used_without(
    server: Server, start: Start, sqlstate: str
) -> None:
    name = server.create("template1")
    with Pooler(server.port, sqlstate, WORDS[sqlstate]) as pooler:
        uri = server.uri(name, port=pooler.port)
        done = pw_migrate("migrate", uri=uri)
        assert done.returncode == 0, done.stderr
        assert check(POSTGRES_URI=uri)[1][1:3] == ["database: ok", "schema: ok"]
        service = start(POSTGRES_URI=uri)
        created = service.call("POST", "/users", new_user())
        assert created.status == 201, created
        assert service.call("GET", "/users").json()["users"] == [created.json()]
        assert service.call("GET", "/health").json()["database"]["status"] == "up"
        assert pooler.refused
        # It is remembered: the next connections are made at once.
        refused = pooler.refused
        server.terminate_backends(name)
        assert service.call("GET", "/users").status == 200, service.log
        assert pooler.refused == refused


def test_a_pooler_that_comes_late_and_refuses_start_up_options_is_used(
    server: Server, start: Start
) -> None:
    name = server.create()
    with Pooler(server.port, "0A000", "no options") as pooler:
        uri = server.uri(name, port=pooler.port)
    service = start(POSTGRES_URI=uri)
    assert service.call("GET", "/users").status == 503
    with Pooler(server.port, "0A000", "no options") as pooler:
        uri = server.uri(name, port=pooler.port)
        service = start(POSTGRES_URI=uri)
        with server.down():
            assert service.call("GET", "/users").status == 503
        wait_for(lambda: service.call("GET", "/users").status == 200, 10, "recovery")


@pytest.mark.parametrize("sqlstate", ["0A000", "08P01"])
def test_a_search_path_that_a_pooler_refuses_is_not_lost_without_a_word(
    server: Server, tenants: str, start: Start, sqlstate: str
) -> None:
    with Pooler(server.port, sqlstate, WORDS[sqlstate]) as pooler:
        given = {
            "POSTGRES_URI": server.uri(tenants, port=pooler.port),
            "PGOPTIONS": "-c search_path=app",
        }
        code, lines = check(**given)
        assert code == 5
        assert lines[1].startswith(f"database: unreachable: 127.0.0.1:{pooler.port}: ")
        assert "refuses the start-up options that are set (search_path): set them with" in lines[1]
        service = start(**given)
        assert service.call("POST", "/users", new_user()).status == 503
        assert "ALTER ROLE" in service.log
    assert count(server, tenants, "public.users") == 0


def test_a_second_server_makes_up_for_a_first_that_is_away(
    server: Server, start: Start, tmp_path: Path
) -> None:
    """Two hosts in a service file share the time that one has."""
    name = server.create()
    file = tmp_path / "services.conf"
    file.write_text(
        f"[two]\nhost=127.0.0.1,127.0.0.1\nport=1,{server.port}\ndbname={name}\nuser=postgres\n"
    )
    given = {"POSTGRES_URI": "postgresql:///?service=two", "PGSERVICEFILE": str(file)}
    assert check(**given)[1][1:3] == ["database: ok", "schema: ok"]
    assert start(**given).call("GET", "/users").status == 200


def test_each_host_that_cannot_be_reached_is_named() -> None:
    uri = "postgresql://ann@127.0.0.1:1,localhost:2,nowhere.invalid:3/none"
    code, lines = check(POSTGRES_URI=uri)
    assert code == 5
    for place in ("127.0.0.1:1: Connection refused", "localhost:2: ", "nowhere.invalid:3: "):
        assert place in lines[1]
    assert "ann" not in lines[1]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def secure(server: Server, authority: trustme.CA) -> Iterator[Pooler]:
    """The server behind TLS, as `localhost`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with Pooler(server.port, tls=context) as pooler:
        yield pooler


def test_the_systems_certificates_are_found(
    server: Server, secure: Pooler, authority: trustme.CA, start: Start, tmp_path: Path
) -> None:
    name = server.create()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    uri = (
        server.uri(name, port=secure.port).replace("127.0.0.1", "localhost") + "?sslrootcert=system"
    )
    assert check(POSTGRES_URI=uri)[0] == 5  # this authority is none of the system's
    given = {"POSTGRES_URI": uri, "SSL_CERT_FILE": str(tmp_path / "ca.pem")}
    assert check(**given)[1][1] == "database: ok"
    assert start(**given).call("GET", "/users").status == 200
    named = {"POSTGRES_URI": uri.replace("?sslrootcert=system", "?sslmode=verify-full")}
    named["PGSSLROOTCERT"] = str(tmp_path / "ca.pem")
    assert check(**named)[1][1] == "database: ok"
    assert start(**named).call("GET", "/users").status == 200
    assert (
        pw_migrate(
            "list", uri=named["POSTGRES_URI"], PGSSLROOTCERT=named["PGSSLROOTCERT"]
        ).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("query", "told"),
    [
        (
            "sslmode=verify-full",
            "set sslrootcert in it, or PGSSLROOTCERT, to one, or sslrootcert=system",
        ),
        ("sslmode=verify-ca&sslrootcert=/not/there", "set sslrootcert in it"),
        ("sslcert=/not/there", "set sslcert in it, or PGSSLCERT, to one"),
        ("sslmode=require&sslrootcert=system", 'weak sslmode "require" may not be used with'),
        ("service=nobody", "definition of service … not found"),
        ("sslnegotiation=direct&sslmode=prefer", "may not be used with sslnegotiation=direct"),
    ],
)
def test_what_libpq_can_never_connect_with_is_told_at_the_start(query: str, told: str) -> None:
    for arguments in ([], ["check"]):
        done = run_app(
            *arguments, POSTGRES_URI=f"postgresql://ann@db.invalid/none?{query}", HOME="/"
        )
        assert done.returncode == 2, done.stdout
        assert done.stdout.startswith("POSTGRES_URI ") and told in done.stdout
        assert len(done.stdout.splitlines()) == 1
    done = pw_migrate("list", uri=f"postgresql://ann@db.invalid/none?{query}", HOME="/")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("POSTGRES_URI ") and told in done.stderr


def test_idle_connections_are_kept_alive(server: Server) -> None:
    """TCP asks after a minute, before the networks forget; the system alone would after two hours."""
    for query, seconds in (("", 60), ("?keepalives_idle=7", 7)):
        connection = Connector(Target.of(server.uri() + query), 5, {}).open()
        with borrowed(connection) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == seconds
        connection.close()


def test_settings_are_read_out_of_options_as_postgresql_does() -> None:
    assert settings_in(r"-c search_path=a,b -cwork_mem=5MB --my.own=a\ b -c") == {
        "search_path": "a,b",
        "work_mem": "5MB",
        "my.own": "a b",
    }
    assert settings_in("--statement-timeout=5 -F -c nothing") == {"statement_timeout": "5"}
    assert settings_in("""-c a.b='"x"'""") == {"a.b": """'"x"'"""}
