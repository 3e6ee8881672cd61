"""`app.py check` and `health`, their lines and exit codes; the arguments that app.py has or not."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg2
import pytest

from settings import host_and_port
from tests.harness import (
    DEAD_DATABASE,
    ROOT,
    Databases,
    ScriptedUpstream,
    Service,
    checkout,
    free_port,
    run_app,
)


def check(**settings: str) -> tuple[int, list[str]]:
    run = run_app("check", **settings)
    return run.returncode, run.stdout.splitlines()


def test_all_well_is_0(database: str, upstream: ScriptedUpstream) -> None:
    code, lines = check(POSTGRES_URI=database, UPSTREAM_URL=upstream.url)
    assert (code, lines) == (0, ["configuration: ok", "database: ok", "schema: ok", "upstream: ok"])


def test_bad_configuration_is_2_with_a_line_for_each_problem() -> None:
    code, lines = check(POSTGRES_URI="mysql://x", PORT="eighty", WORKERS="-1")
    assert code == 2
    assert [line.split()[0] for line in sorted(lines)] == ["PORT", "POSTGRES_URI", "WORKERS"]


def test_pending_migrations_are_3(databases: Databases, upstream: ScriptedUpstream) -> None:
    uri = databases.create(migrated=False)
    code, lines = check(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url)
    assert code == 3
    steps = sorted(path.stem for path in (ROOT / "migrations").glob("0*.py"))
    todo = "run .venv/bin/pw_migrate migrate"
    assert lines[2] == f"schema: migrations pending: {', '.join(steps)}: {todo}"


def test_another_schema_is_4(databases: Databases, upstream: ScriptedUpstream) -> None:
    uri = databases.create()
    connection = psycopg2.connect(uri)
    with connection, connection.cursor() as cursor:
        cursor.execute("DROP INDEX users_mailbox")
    connection.close()
    code, lines = check(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url)
    assert code == 4
    assert "users_mailbox" in lines[2]


def test_an_unreachable_database_is_5_and_is_named(upstream: ScriptedUpstream) -> None:
    code, lines = check(POSTGRES_URI=DEAD_DATABASE, UPSTREAM_URL=upstream.url)
    assert code == 5
    assert lines == [
        "configuration: ok",
        "database: unreachable: 127.0.0.1:1: Connection refused",
        "schema: unknown",
        "upstream: ok",
    ]


@pytest.mark.parametrize(
    ("hosts", "told"),
    [
        ("[::1]:2", ["[::1]:2: "]),
        ("127.0.0.1:1,127.0.0.2:2", ["127.0.0.1:1: Connection refused", "127.0.0.2:2: "]),
        ("nowhere.invalid", ["nowhere.invalid:5432: "]),
        ("127.0.0.1:1,nowhere.invalid:7", ["127.0.0.1:1: ", "nowhere.invalid:7: "]),
    ],
)
def test_every_host_of_the_database_that_was_tried_is_named(
    upstream: ScriptedUpstream, hosts: str, told: list[str]
) -> None:
    uri = f"postgresql://ann:s3cret@{hosts}/users"
    code, lines = check(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url)
    assert code == 5
    assert all(address in lines[1] for address in told), lines[1]
    assert "s3cret" not in "".join(lines)


def test_a_database_that_refuses_says_why_without_names(
    database: str, upstream: ScriptedUpstream
) -> None:
    """The wrong database on the right server, over its socket."""
    uri = re.sub(r"/[^/?]*\?", "/s3cret?", database)
    code, lines = check(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url)
    assert code == 5
    assert ".s.PGSQL." in lines[1] and "database does not exist" in lines[1]
    assert "s3cret" not in "".join(lines)


def test_a_role_that_may_not_do_all_is_told(
    databases: Databases, database: str, upstream: ScriptedUpstream
) -> None:
    """As /health has it: it is degraded for such a role, and `check` said that all is well."""
    role = f"test_{uuid.uuid4().hex[:12]}"
    uri = database.replace("postgres:@", f"{role}:@")
    with databases.admin(database) as cursor:
        cursor.execute(f"CREATE ROLE {role} LOGIN")
        cursor.execute(f"GRANT SELECT ON migratehistory TO {role}")
        cursor.execute(f"GRANT SELECT, INSERT ON users TO {role}")
        code, lines = check(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url)
        assert (code, lines[1]) == (4, "database: ok")
        assert lines[2].endswith(": table users: the role may not UPDATE, DELETE")
        cursor.execute(f"GRANT UPDATE, DELETE ON users TO {role}")
        assert check(POSTGRES_URI=uri, UPSTREAM_URL=upstream.url)[0] == 0
        cursor.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_an_unreachable_upstream_is_6_and_is_named(database: str) -> None:
    port = free_port()
    code, lines = check(POSTGRES_URI=database, UPSTREAM_URL=f"http://127.0.0.1:{port}/base")
    assert code == 6
    assert lines[-1] == f"upstream: unreachable: 127.0.0.1:{port}: Connection refused"


def test_an_upstream_without_a_port_has_that_of_its_scheme(database: str) -> None:
    code, lines = check(POSTGRES_URI=database, UPSTREAM_URL="https://nowhere.invalid")
    assert code == 6
    assert lines[-1].startswith("upstream: unreachable: nowhere.invalid:443: ")


def test_an_upstream_without_tls_is_told(database: str) -> None:
    def answer() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(65536)
            client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        threads.submit(answer)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        code, lines = check(POSTGRES_URI=database, UPSTREAM_URL=f"https://{address}")
    assert code == 6
    todo = "it speaks no TLS: write http:// in UPSTREAM_URL"
    assert lines[-1] == f"upstream: unreachable: {address}: {todo}"


@pytest.mark.parametrize(
    ("host", "upstream"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "localhost"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("Localhost", "127.0.0.1"),
    ],
)
def test_an_upstream_that_is_gatehouse_itself_is_told(
    start: Callable[..., Service], host: str, upstream: str
) -> None:
    """It takes connections, and every forwarded request is 508."""
    port = free_port()
    given = {"HOST": host, "USERS_AUTH": "none", "UPSTREAM_URL": f"http://{upstream}:{port}/base"}
    service = start(PORT=port, **given)
    told = "UPSTREAM_URL is Gatehouse's own address: set it to that of your application"
    assert told in service.log
    run = run_app("check", PORT=port, **given)
    assert run.returncode == 5
    assert [run.stdout.splitlines()[at] for at in (0, -1)] == (
        ["configuration: ok", f"upstream: {told}"]
    )


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_another_address_at_the_same_port_is_an_upstream(database: str, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as other:
        port = other.getsockname()[1]
        url = f"http://{host_and_port(host, port)}"
        code, lines = check(POSTGRES_URI=database, PORT=str(port), UPSTREAM_URL=url)
    assert (code, lines[-1]) == (0, "upstream: ok")


def test_a_host_on_which_nobody_can_listen_is_told(
    database: str, upstream: ScriptedUpstream
) -> None:
    given = {"HOST": "192.0.2.1", "USERS_AUTH": "none", "PORT": str(free_port())}
    code, lines = check(POSTGRES_URI=database, UPSTREAM_URL=upstream.url, **given)
    told = f"cannot listen on 192.0.2.1:{given['PORT']}: Cannot assign requested address"
    assert (code, lines[:2]) == (0, ["configuration: ok", f"warning: {told}"])
    assert run_app(**given).stdout == f"{told}\n"


def test_check_says_on_a_terminal_what_the_configuration_comes_to(
    database: str, upstream: ScriptedUpstream
) -> None:
    ours, theirs = pty.openpty()
    environ = {"PATH": os.environ["PATH"], "POSTGRES_URI": database, "UPSTREAM_URL": upstream.url}
    process = subprocess.Popen(
        [sys.executable, "app.py", "check"], cwd=checkout(), env=environ, stdout=theirs
    )
    assert process.wait(30) == 0
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert text.startswith("configuration: ok\r\n  workers: 1; this process may use ")


@pytest.mark.parametrize(
    ("descriptors", "given", "told"),
    [
        (1024, "", "384 at once in each worker, as descriptors allow"),
        (100, "", "64 at once in each worker, as descriptors allow"),
        (
            1024,
            "10",
            "10 at once in each worker (UPSTREAM_MAX_IN_FLIGHT=10, and descriptors allow 384)",
        ),
        (
            1024,
            "500",
            "384 at once in each worker (UPSTREAM_MAX_IN_FLIGHT=500, and descriptors allow 384)",
        ),
    ],
)
def test_check_says_how_many_streams_descriptors_allow(
    descriptors: int, given: str, told: str
) -> None:
    command = f"ulimit -n {descriptors}; exec {sys.executable} app.py check --verbose"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=checkout(),
        env={
            "PATH": os.environ["PATH"],
            "POSTGRES_URI": DEAD_DATABASE,
            "UPSTREAM_URL": "http://127.0.0.1:1",
            "UPSTREAM_MAX_IN_FLIGHT": given,
        },
        capture_output=True,
        text=True,
    )
    *warnings, _, streams, _ = done.stdout.splitlines()[1:-3]
    assert streams == f"  streams: {told}"
    few = (
        "file descriptors may be open, which is too few for 64 requests at once: allow 384 at least"
    )
    assert warnings == ([f"warning: 100 {few}"] if descriptors == 100 else [])


@pytest.mark.parametrize(
    ("url", "preserve", "told"),
    [
        ("http://127.0.0.1:1", "auto", "the client's Host"),
        ("https://app.example:8443", "auto", "Host: app.example:8443"),
        ("http://127.0.0.1:1/base", "off", "Host: 127.0.0.1:1"),
    ],
)
def test_check_says_which_host_the_application_sees(url: str, preserve: str, told: str) -> None:
    settings = {"UPSTREAM_URL": url, "UPSTREAM_PRESERVE_HOST": preserve}
    run = run_app("check", "--verbose", **settings, UPSTREAM_CONNECT_TIMEOUT="0.5")
    assert run.stdout.splitlines()[3] == f"  host: the application sees {told}"


# health


@pytest.mark.parametrize("which", [[], ["live"]])
def test_health_of_a_running_instance_is_0(start: Callable[..., Service], which: list[str]) -> None:
    service = start()
    run = run_app("health", *which, PORT=service.port)
    assert run.returncode == 0
    assert json.loads(run.stdout)["status"] in ("ok", "degraded")


def test_health_is_1_where_the_instance_says_no(start: Callable[..., Service]) -> None:
    service = start()
    run = run_app("health", "ready", PORT=service.port)
    assert run.returncode == 1
    assert json.loads(run.stdout)["type"] == "urn:gatehouse:database-unavailable"


def test_health_is_1_where_nothing_answers() -> None:
    port = free_port()
    run = run_app("health", PORT=port)
    assert (run.returncode, run.stdout) == (
        1,
        f"127.0.0.1:{port} does not answer: Connection refused\n",
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_health_asks_this_machine_where_the_instance_listens_on_all_addresses(
    start: Callable[..., Service], host: str
) -> None:
    service = start(HOST=host, USERS_AUTH="none")
    assert run_app("health", "live", HOST=host, PORT=service.port).returncode == 0


def test_health_needs_no_other_setting() -> None:
    """A container's health check may run without the secrets."""
    run = run_app("health", POSTGRES_URI="", UPSTREAM_URL="", PORT=free_port())
    assert run.returncode == 1
    run = run_app("health", PORT=0)
    assert (run.returncode, run.stdout) == (
        1,
        "PORT must be the port of the running instance, not 0\n",
    )
    run = run_app("health", HOST="a b", PORT=0, DB_CONNECT_TIMEOUT="long")
    assert run.returncode == 1
    assert [line.partition(" ")[0] for line in run.stdout.splitlines()] == (
        ["HOST", "DB_CONNECT_TIMEOUT", "PORT"]
    )


# arguments


def test_the_version_is_that_of_the_project() -> None:
    run = run_app("--version", POSTGRES_URI="", UPSTREAM_URL="")
    [version] = re.findall(r'(?m)^version = "(.+)"$', (ROOT / "pyproject.toml").read_text())
    assert (run.returncode, run.stdout) == (0, f"gatehouse {version}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["check", "--help"]])
def test_help_names_every_command_and_exit_code(arguments: list[str]) -> None:
    run = run_app(*arguments, POSTGRES_URI="", UPSTREAM_URL="")
    assert run.returncode == 0
    for word in ("check", "health", "--dev", "--version", "docs/configuration.md"):
        assert word in run.stdout
    codes = run.stdout.partition("Exit codes:")[2]
    assert re.findall(r"\b[0-9]\b", codes) == [str(code) for code in range(7)]


def test_an_argument_that_is_not_known_is_2() -> None:
    run = run_app("--serve")
    assert run.returncode == 2
    assert run.stdout == (
        "usage: app.py [check | health [live | ready] | --dev | --version | --help]:"
        " unrecognized arguments: --serve\n"
    )


@pytest.mark.parametrize("arguments", [["check"], ["--help"], ["--version"], ["health"]])
@pytest.mark.parametrize(
    ("output", "code", "told"),
    [
        (">&{pipe}", 141, ""),
        (">/dev/full", 1, "standard output cannot be written: No space left on device\n"),
        (">&-", 1, "standard output cannot be written: Bad file descriptor\n"),
        ("</dev/null >&0", 1, "standard output cannot be written: Bad file descriptor\n"),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(
    start: Callable[..., Service], arguments: list[str], output: str, code: int, told: str
) -> None:
    """A pipe that nobody reads ends the command without a word, as it ends `cat`."""
    if "full" in output and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    given = {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"}
    reader, pipe = os.pipe()
    os.close(reader)
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {output.format(pipe=pipe)}', "bash"]
        + [sys.executable, "app.py", *arguments],
        cwd=checkout(),
        env=given | {"PATH": os.environ["PATH"], "PORT": str(start().port)},
        pass_fds=[pipe],
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
    )
    os.close(pipe)
    assert (done.returncode, done.stderr) == (code, told)
