"""Every common way to say where the database is, and that all who connect take it alike.

Each of these is how somebody runs PostgreSQL: schemas by `search_path`, service files, poolers, TLS.
"""

from __future__ import annotations

import contextlib
import getpass
import pwd
import re
import socket
import ssl
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from postgres import pool
from postgres.connect import Connector, Target, check_uri, reason, settings_in
from postgres.deadlines import Deadlines, borrowed, cut
from postgres.statements import Statement, Statements
from problems import RefusedByDatabase
from tests.harness import (
    ROOT,
    Service,
    no_descriptor_free,
    pw_migrate,
    run_app,
    unshared,
    wait_for,
)
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
    server = Server()
    server.options["unix_socket_directories"] = str(server.data)
    with server:
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


@pytest.mark.slow
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


def test_one_that_refuses_in_another_encoding_is_used_too(server: Server) -> None:
    """psycopg2 raises what nobody expects then: nothing was tried without the options."""
    words = "Startoptionen sind für Sie nicht verfügbar"
    with Pooler(server.port, "0A000", words, encoding="latin-1") as pooler:
        uri = server.uri(server.create(), port=pooler.port)
        assert check(POSTGRES_URI=uri)[1][1] == "database: ok"
        code, lines = check(POSTGRES_URI=uri + "?options=" + quote("-c work_mem=5MB"))
        assert code == 5 and "refuses the start-up options" in lines[1]


def test_the_order_of_dates_stays_that_of_the_database(server: Server) -> None:
    """It decides how a trigger of the operator's reads a date that callers have sent."""
    for style in ("ISO, DMY", "German, DMY"):
        name = server.create()
        server.sql(f'ALTER DATABASE "{name}" SET datestyle = {style}')
        connection = Connector(Target.of(server.uri(name)), 2.0, {"work_mem": "5MB"}).open()
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute("SHOW datestyle")
            assert cursor.fetchone() == ("ISO, DMY",)


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


@pytest.mark.parametrize("options", ["", "-c search_path=app"])
def test_behind_a_pooler_that_refuses_options_the_reason_is_the_other_one(
    server: Server, start: Start, role: str, options: str
) -> None:
    """With PgBouncer's defaults all that was told of a wrong password was `options`."""
    allow(server, f"host all {role} all scram-sha-256")
    server.sql(f"ALTER ROLE {role} PASSWORD 'right'")
    with Pooler(server.port, "08P01", "unsupported startup parameter: options") as pooler:

        def at(database: str, password: str) -> dict[str, str]:
            uri = server.uri(database, user=role, password=password, port=pooler.port)
            return {"POSTGRES_URI": uri, "PGOPTIONS": options}

        for given, told in (
            (at(server.create(), "wrong"), "password authentication failed for user"),
            (at("none", "right"), "database does not exist"),
        ):
            place = f"127.0.0.1:{pooler.port}"
            assert check(**given)[1][1] == f"database: unreachable: {place}: {told}"
            done = pw_migrate("list", uri=given["POSTGRES_URI"], PGOPTIONS=options)
            assert done.stderr == f"the database cannot be used: {place}: {told}\n"
            service = start(**given)
            assert service.call("GET", "/users").status == 503
            assert told.partition(" ")[2] in re.sub(r' "[^"]*"', "", service.log)
            assert "unsupported" not in service.log


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("FATAL:  no such database: nope", "no such database: nope"),
        ("FATAL:  no such user: ann", "no such user: …"),
        (
            "FATAL:  Rolle »ann« existiert nicht, Anna schon",
            "Rolle »…« existiert nicht, Anna schon",
        ),
        ("FATAL:  \x1b[31mred", r"\x1b[31mred"),
        ("SSL error: certificate verify failed", "SSL error: certificate verify failed"),
        (
            "received invalid response to SSL negotiation: H",
            "received invalid response to SSL negotiation: H",
        ),
    ],
)
def test_a_reason_is_told_whole_but_for_the_role_and_what_steers_a_terminal(
    said: str, told: str
) -> None:
    """`check` said `nope`, or `H`."""
    error = psycopg2.OperationalError(
        f'connection to server at "127.0.0.1", port 6432 failed: {said}\n'
    )
    target = Target.of("postgresql://ann@127.0.0.1:6432/users")
    assert reason(error, target) == f"127.0.0.1:6432: {told}"


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


def test_another_schema_than_the_migrated_one_is_as_operating_has_it(server: Server) -> None:
    name = server.create()
    server.sql("CREATE SCHEMA app", database=name)
    before = server.uri(name) + "?options=" + quote("-c search_path=app,public")
    assert check(POSTGRES_URI=before)[1][2] == "schema: ok"
    assert pw_migrate("migrate", uri=before).returncode == 1
    without = server.uri(name) + "?options=" + quote("-c search_path=app")
    assert check(POSTGRES_URI=without)[1][2].startswith("schema: migrations pending: ")
    assert pw_migrate("migrate", uri=without).returncode == 0
    assert count(server, name, "app.users") == 0


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


@pytest.mark.parametrize("password", ["12/abc", "ab/c", "1/2@3", "%zz"])
def test_a_password_that_is_not_encoded_is_told_at_the_start(password: str) -> None:
    """libpq took `u:12` for the host and the port, and they were named."""
    uri = f"postgresql://u:{password}@db.invalid/none"
    told = (
        "POSTGRES_URI is not a URI that libpq can read: in a password write %40 for @, %2F for / and"
        " %25 for %\n"
    )
    assert run_app("check", POSTGRES_URI=uri).stdout == told
    assert pw_migrate("list", uri=uri).stderr == told


@pytest.mark.parametrize(
    ("query", "told"),
    [
        (
            "sslmode=verify-full",
            "set sslrootcert in it, or PGSSLROOTCERT, to such a file, or sslrootcert=system",
        ),
        ("sslmode=verify-ca&sslrootcert=/not/there", "set sslrootcert in it"),
        ("sslcert=/not/there", "set sslcert in it, or PGSSLCERT, to such a file"),
        (
            "sslrootcert=system&sslcert=/not/there",
            "set sslcert in it, or PGSSLCERT, to such a file",
        ),
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


def test_a_key_with_a_passphrase_is_told_at_the_start(server: Server, tmp_path: Path) -> None:
    """libpq asked for it on the terminal, again and again, and the service could not be stopped."""
    pair = trustme.CA().issue_cert("gatehouse@example.com")
    (tmp_path / "client.pem").write_bytes(pair.cert_chain_pems[0].bytes())
    key = load_pem_private_key(pair.private_key_pem.bytes(), None)
    secret = BestAvailableEncryption(b"hush")
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret)
    (tmp_path / "client.key").write_bytes(locked)
    (tmp_path / "client.key").chmod(0o600)
    uri = f"{server.uri()}?sslcert={tmp_path}/client.pem&sslkey={tmp_path}/client.key"
    done = run_app("check", POSTGRES_URI=uri)
    assert done.returncode == 2
    assert done.stdout.startswith("POSTGRES_URI has a key with a passphrase: set sslpassword in it")
    assert run_app("check", POSTGRES_URI=f"{uri}&sslpassword=hush").returncode != 2


def allow(server: Server, *lines: str) -> None:
    """Put lines before all others in pg_hba.conf."""
    file = server.data / "pg_hba.conf"
    file.write_text("".join(f"{line}\n" for line in lines) + file.read_text())
    server.sql("SELECT pg_reload_conf()")


@pytest.fixture
def role(server: Server) -> Iterator[str]:
    """A role that owns nothing, and may do all with the users of databases made of `template1`."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    server.sql(f"CREATE ROLE {name} SUPERUSER LOGIN")
    yield name


def assert_works(start: Start, **given: str) -> Service:
    """That all who connect do, and that a user lives and dies."""
    done = pw_migrate("migrate", uri=given["POSTGRES_URI"], **given)
    assert done.returncode == 0, done.stderr
    assert check(**given)[1][1:3] == ["database: ok", "schema: ok"]
    service = start(**given)
    user = service.call("POST", "/users", new_user()).json()
    target = f"/users/{user['id']}"
    patched = service.call("PATCH", target, {"metadata": {"a": {"b": "\\"}}})
    assert patched.json()["metadata"] == {"a": {"b": "\\"}}, patched
    assert service.call("PUT", target, user).status == 200
    assert service.call("GET", "/users?q=_n%25").json()["users"] == []
    assert len(service.call("GET", "/users?q=ANN").json()["users"]) == 1
    assert service.call("GET", "/health/ready").status == 200
    assert service.call("DELETE", target).status == 204
    return service


def test_a_schema_that_a_role_has_by_itself(
    server: Server, tenants: str, start: Start, role: str
) -> None:
    server.sql(f"ALTER ROLE {role} SET search_path = app")
    service = assert_works(start, POSTGRES_URI=server.uri(tenants, user=role))
    service.call("POST", "/users", new_user())
    assert (count(server, tenants, "app.users"), count(server, tenants, "public.users")) == (1, 0)


def test_settings_that_a_role_has_by_itself_change_nothing(
    server: Server, start: Start, role: str
) -> None:
    for setting in (
        "\"DateStyle\" = 'German, DMY'",
        "\"TimeZone\" = 'Asia/Kolkata'",
        "client_encoding = 'latin1'",
        "default_transaction_isolation = 'serializable'",
        "idle_session_timeout = '300ms'",
        "bytea_output = 'escape'",
        "backslash_quote = 'off'",
        "transform_null_equals = 'on'",
        "plan_cache_mode = 'force_generic_plan'",
        "array_nulls = 'off'",
    ):
        server.sql(f"ALTER ROLE {role} SET {setting}")
    service = assert_works(start, POSTGRES_URI=server.uri(server.create("template1"), user=role))
    name = "Zoë ł"
    user = service.call("POST", "/users", new_user() | {"name": name}).json()
    assert user["name"] == name and user["created_at"].endswith("Z")


PASSWORDS = ["p%40ss", "p@ss:w/rd?#%&", 'Zoë\'s "pass" \\word']


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_with_marks_that_mean_something_in_a_uri(
    server: Server, start: Start, role: str, password: str
) -> None:
    allow(server, f"host all {role} all scram-sha-256")
    server.sql(f"ALTER ROLE {role} PASSWORD %s", password)
    name = server.create("template1")
    service = assert_works(start, POSTGRES_URI=server.uri(name, user=role, password=password))
    uri = server.uri(name, user=role)
    assert_works(start, POSTGRES_URI=uri, PGPASSWORD=password)
    code, lines = check(POSTGRES_URI=server.uri(name, user=role, password="wr@ng"))
    assert code == 5 and lines[1].endswith(": password authentication failed for user")
    assert password not in service.log and "wr@ng" not in "".join(lines)


def test_the_systems_own_user_over_a_unix_socket(server: Server, start: Start, role: str) -> None:
    allow(server, f"local all {role} peer map=gatehouse", "local all all reject")
    (server.data / "pg_ident.conf").write_text(f"gatehouse {getpass.getuser()} {role}\n")
    server.sql("SELECT pg_reload_conf()")
    place = f"host={quote(str(server.data))}&port={server.port}"
    name = server.create("template1")
    assert_works(start, POSTGRES_URI=f"postgresql://{role}@/{name}?{place}")
    code, lines = check(POSTGRES_URI=f"postgresql://postgres@/{name}?{place}")
    assert code == 5 and f"{server.data}/.s.PGSQL.{server.port}: pg_hba.conf rejects" in lines[1]


def test_a_role_that_may_connect_once_serves_a_crowd(
    server: Server, start: Start, role: str
) -> None:
    server.sql(f"ALTER ROLE {role} NOSUPERUSER CONNECTION LIMIT 1")
    name = server.create()
    server.sql("GRANT ALL ON users, migratehistory TO PUBLIC", database=name)
    service = start(POSTGRES_URI=server.uri(name, user=role))
    with ThreadPoolExecutor(20) as crowd:
        replies = crowd.map(lambda _: service.call("POST", "/users", new_user()).status, range(60))
        assert set(replies) == {201}
    assert "too many connections for role" in service.log


def test_a_client_certificate_is_shown_and_a_wrong_name_is_told(
    server: Server, authority: trustme.CA, start: Start, tmp_path: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    authority.issue_cert("localhost").configure_cert(context)
    ours = authority.issue_cert("gatehouse@example.com")
    files = {"sslrootcert": "ca.pem", "sslcert": "client.pem", "sslkey": "client.key"}
    paths = {name: tmp_path / file for name, file in files.items()}
    authority.cert_pem.write_to_path(str(paths["sslrootcert"]))
    ours.cert_chain_pems[0].write_to_path(str(paths["sslcert"]))
    ours.private_key_pem.write_to_path(str(paths["sslkey"]))
    paths["sslkey"].chmod(0o600)
    query = "?sslmode=verify-full&" + "&".join(f"{name}={path}" for name, path in paths.items())
    name = server.create("template1")
    with Pooler(server.port, tls=context) as secure:
        uri = server.uri(name, port=secure.port) + query
        assert_works(start, POSTGRES_URI=uri.replace("127.0.0.1", "localhost"))
        code, lines = check(POSTGRES_URI=uri)
        assert code == 5
        assert lines[1].startswith(f"database: unreachable: 127.0.0.1:{secure.port}: server certi")
        assert "does not match host name" in lines[1]
        paths["sslkey"].chmod(0o644)
        code, lines = check(POSTGRES_URI=uri)
        assert code == 5 and "private key file has group or world access" in lines[1]


class Older(Pooler):
    """A server that says that it is PostgreSQL 12."""

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(re.sub(rb"(server_version\0)[0-9]{2}", rb"\g<1>12", data))
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def test_a_postgresql_that_is_too_old_is_told(server: Server) -> None:
    """All that was told of PostgreSQL 12 was `type does not exist`."""
    with Older(server.port) as older:
        uri = server.uri(server.create(), port=older.port)
        told = "PostgreSQL 12 is too old: 13 or newer is needed"
        assert check(POSTGRES_URI=uri)[1][1:3] == ["database: ok", f"schema: {told}"]
        assert pw_migrate("migrate", uri=uri).stderr == f"{told}\n"


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
    # PostgreSQL ignores a backslash that nothing follows.
    assert settings_in("-c a=b\\\\\\") == {"a": "b\\"}


def test_a_conversation_is_cut_though_no_descriptor_is_free(server: Server) -> None:
    """It was forgotten then, and its caller waited for ever."""
    with (
        contextlib.closing(psycopg2.connect(server.uri(server.create()))) as connection,
        ThreadPoolExecutor(1) as thread,
    ):
        asleep = thread.submit(connection.cursor().execute, "SELECT pg_sleep(15)")
        wait_for(lambda: connection.info.transaction_status == 1)  # PQTRANS_ACTIVE
        with no_descriptor_free():
            cut(connection)
        with pytest.raises(psycopg2.OperationalError):
            asleep.result(10)


def test_a_connection_whose_socket_is_gone_is_cut_without_an_error() -> None:
    """The error ended the thread that watches all deadlines."""

    class Gone:
        def fileno(self) -> int:
            return -1

    cut(Gone())


def test_a_user_without_a_home_may_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as a number that no file of users has."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert check_uri("postgresql://ann@127.0.0.1/users") is None


def test_threads_that_are_first_after_a_fork_share_what_the_first_of_them_makes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each began with nothing, in the middle of another's work: a connection was not counted."""
    inside, done = threading.Event(), threading.Event()

    class Slow(Deadlines):
        def __init__(self, *arguments: Any) -> None:
            inside.set()
            done.wait(0.3)  # Until another caller has gone past, if it does.
            super().__init__(*arguments)

    database = Statements()
    database.configure(
        server.uri(server.create()), size=2, wait=5, connect_timeout=5, statement_timeout=5
    )
    monkeypatch.setattr(pool, "Deadlines", Slow)
    database._pid = -1  # as it is in a process that was forked since

    def second() -> Any:
        inside.wait(5)
        connection = database.acquire()
        done.set()
        return connection

    with ThreadPoolExecutor(2) as executor:
        callers = [executor.submit(call) for call in (database.acquire, second)]
        connections = [caller.result() for caller in callers]
    assert (database._count, database._connecting) == (2, 0)
    for connection in connections:
        database.release(connection)
    database.close_idle()


def test_a_connection_that_was_cut_as_an_error_came_is_not_kept(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next caller was given it, and lost it."""
    database = Statements()
    database.configure(
        server.uri(server.create()), size=1, wait=5, connect_timeout=5, statement_timeout=5
    )
    assert database.read(Statement("SELECT 1", {}), {}) == [(1,)] and len(database._ready) == 1
    monkeypatch.setattr(database._deadlines, "end", lambda *_, **__: True)
    with pytest.raises(RefusedByDatabase):
        database.run(Statement("SELECT 1 / 0", {}), {})
    assert (database._ready, database._count) == ([], 0)


def test_a_server_to_which_no_way_leads_gives_no_sign_of_life() -> None:
    """In a network that has nothing but a loopback that is down, connecting fails at once."""
    asked = "from postgres.deadlines import answers; print(answers(2, ('192.0.2.1', 5432), 5))"
    done = subprocess.run(
        [*unshared("net"), sys.executable, "-c", asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "False\n", done.stderr
