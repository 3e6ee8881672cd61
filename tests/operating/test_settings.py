from __future__ import annotations

import dataclasses
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values

from settings import VARIABLES, Settings, SettingsError
from tests.harness import DEAD_DATABASE, ROOT, copied, free_port, run_app

REQUIRED = {
    "POSTGRES_URI": "postgresql://ann@db.example/users",
    "UPSTREAM_URL": "http://app.example",
}

DEFAULTS = {
    "host": "127.0.0.1",
    "port": 8080,
    "workers": 1,
    "threads": 32,
    "upstream_connect_timeout": 5,
    "upstream_read_timeout": 60,
    "upstream_preserve_host": False,
    "db_pool_size": 8,
    "db_pool_timeout": 2,
    "db_connect_timeout": 2,
    "db_statement_timeout": 5,
    "users_token": (),
    "users_auth": "token",
    "trusted_proxies": (),
    "max_body_bytes": 104857600,
    "shutdown_timeout": 30,
    "access_log": True,
}

BAD = {
    "POSTGRES_URI": [
        "db.example",
        "host=db.example dbname=users",
        "mysql://db.example/users",
        "//",
    ],
    "UPSTREAM_URL": [
        "app.example",
        "ftp://app.example",
        "http://",
        "http:///path",
        "http://app.example:0",
        "http://app.example:99999",
        "http://app.example:port",
        "http://ann:word@app.example",
        "http://app.example/?q=1",
        "http://app.example/#top",
        "http://app.example/a b",
        "http://[::1",
        "http://[::1]x",
        "http://[::g]",
        "http://[fe80::1%25eth0]",
        "http://[v1.x]",
        "http://*app.example",
        "http://.app.example",
        "http://app..example",
        "http://app%zz",
        "http://app\\example",
    ],
    "HOST": [
        *("two words", "http://127.0.0.1", "a/b", "127.0.0.1:80", "999.1.1.1", "1", "a..b", "."),
        *("a" * 64, ".a", "[::1", "fe80::1::2", "a%b"),
    ],
    "PORT": ["-1", "65536", "eighty", "80.0", "0x50", "8_0", "٨٠", "+80"],
    "WORKERS": ["0", "-1", "many", "1.5", "257"],
    "THREADS": ["0", "1", "-4", "few", "4097"],
    "UPSTREAM_MAX_IN_FLIGHT": ["0", "-1", "all"],
    "UPSTREAM_CONNECT_TIMEOUT": ["0", "-1", "soon", "nan", "inf", "1e3", "5s"],
    "UPSTREAM_READ_TIMEOUT": ["0", "-1", "soon", "nan", "inf"],
    "UPSTREAM_PRESERVE_HOST": ["maybe", "2", "onn"],
    "DB_POOL_SIZE": ["0", "-1", "8.0", "big"],
    "DB_POOL_TIMEOUT": ["0", "-1", "soon"],
    "DB_CONNECT_TIMEOUT": ["0", "-1", "0.5", "soon"],
    "DB_STATEMENT_TIMEOUT": ["0", "-1", "soon"],
    "USERS_TOKEN": [",", "one two", "tök", "a,,b"],
    "USERS_AUTH": ["basic", "off", "tokens"],
    "TRUSTED_PROXIES": ["proxy.example", "10.0.0.0/33", "10.0.0.256", "10.0.0.1;10.0.0.2"],
    "MAX_BODY_BYTES": ["-1", "100MB", "1e6"],
    "SHUTDOWN_TIMEOUT": ["-1", "soon"],
    "ACCESS_LOG": ["maybe", "2"],
}


def load(**variables: str) -> Settings:
    return Settings.from_env(REQUIRED | variables)


def problems(**variables: str) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        load(**variables)
    return raised.value.problems


def test_what_is_not_set_has_the_default_of_the_contract() -> None:
    settings = dataclasses.asdict(load())
    assert {key: settings[key] for key in DEFAULTS} == DEFAULTS
    assert set(settings) - set(DEFAULTS) == {
        "postgres_uri",
        "upstream_url",
        "upstream_max_in_flight",
    }


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().port = 1  # type: ignore[misc]


def test_every_variable_is_a_setting_and_the_other_way_round() -> None:
    fields = {field.name.upper() for field in dataclasses.fields(Settings)}
    assert fields == set(VARIABLES) == set(BAD)


@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_an_empty_value_is_no_value(empty: str) -> None:
    assert load(**{name: empty for name in VARIABLES if name not in REQUIRED}) == load()
    assert problems(POSTGRES_URI=empty, UPSTREAM_URL=empty) == [
        "POSTGRES_URI is required",
        "UPSTREAM_URL is required",
    ]


def test_white_space_around_a_value_is_none_of_it() -> None:
    assert load(PORT=" 81 ", HOST="\tlocalhost\n").port == 81


@pytest.mark.parametrize(
    ("variable", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_value_is_one_problem_that_names_its_variable(variable: str, value: str) -> None:
    [problem] = problems(**{variable: value})
    assert problem.startswith(f"{variable} ")
    assert "\n" not in problem


def test_all_that_is_bad_or_missing_is_named_at_once() -> None:
    values = {name: bad[0] for name, bad in BAD.items()}
    with pytest.raises(SettingsError) as raised:
        Settings.from_env(values)
    assert sorted(line.split(" ")[0] for line in raised.value.problems) == sorted(VARIABLES)


@pytest.mark.parametrize(
    ("variable", "value", "secret"),
    [
        ("POSTGRES_URI", "mysql://ann:s3cret@db.example/users", "s3cret"),
        ("UPSTREAM_URL", "http://ann:s3cret@app.example", "s3cret"),
        ("USERS_TOKEN", "s3cret,two words", "s3cret"),
    ],
)
def test_a_problem_quotes_no_secret(variable: str, value: str, secret: str) -> None:
    [problem] = problems(**{variable: value})
    assert secret not in problem


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("HOST", "::1", "::1"),
        ("HOST", "[::1]", "::1"),
        ("PORT", "0", 0),
        ("PORT", "65535", 65535),
        ("THREADS", "2", 2),
        ("UPSTREAM_MAX_IN_FLIGHT", "7", 7),
        ("UPSTREAM_READ_TIMEOUT", "0.5", 0.5),
        ("DB_CONNECT_TIMEOUT", "1", 1),
        ("USERS_AUTH", "NONE", "none"),
        ("USERS_TOKEN", "one, two ,three==", ("one", "two", "three==")),
        ("MAX_BODY_BYTES", "0", 0),
        ("SHUTDOWN_TIMEOUT", "0", 0),
        ("POSTGRES_URI", "postgres://h/d", "postgresql://h/d"),
        ("POSTGRES_URI", "PostgreSQL://h/d", "postgresql://h/d"),
        (
            "POSTGRES_URI",
            "postgresql://ann:p%40ss%2F@h1:1,h2:2/d?target_session_attrs=read-write&sslmode=require",
            "postgresql://ann:p%40ss%2F@h1:1,h2:2/d?target_session_attrs=read-write&sslmode=require",
        ),
        ("UPSTREAM_URL", "https://app.example:8443/base/", "https://app.example:8443/base/"),
        ("UPSTREAM_URL", "http://[::1]:3000", "http://[::1]:3000"),
        ("UPSTREAM_URL", "HTTP://My_App.example.", "HTTP://My_App.example."),
    ],
)
def test_a_good_value_is_taken(variable: str, text: str, value: Any) -> None:
    assert getattr(load(**{variable: text}), variable.lower()) == value


@pytest.mark.parametrize("text", ["on", "ON", "true", "yes", "1"])
def test_a_switch_is_on(text: str) -> None:
    assert load(UPSTREAM_PRESERVE_HOST=text).upstream_preserve_host is True


@pytest.mark.parametrize("text", ["off", "Off", "false", "no", "0"])
def test_a_switch_is_off(text: str) -> None:
    assert load(ACCESS_LOG=text).access_log is False


def test_trusted_proxies_are_addresses_and_networks_of_both_families() -> None:
    trusted = load(TRUSTED_PROXIES="10.1.2.3, 192.168.0.0/16,::1 ,fd00::/8").trusted_proxies
    names = ["10.1.2.3/32", "192.168.0.0/16", "::1/128", "fd00::/8"]
    assert trusted == tuple(ipaddress.ip_network(name) for name in names)


def test_workers_auto_is_one_for_each_cpu_that_may_be_used() -> None:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert load(WORKERS="auto").workers == usable


@pytest.mark.parametrize("threads", [2, 3, 8, 32, 500])
def test_proxied_requests_leave_a_reserve_of_the_threads(threads: int) -> None:
    settings = load(THREADS=str(threads))
    assert 1 <= settings.upstream_max_in_flight < threads


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gatehouse.example"])
def test_users_open_to_the_network_are_refused_unless_that_was_chosen(host: str) -> None:
    [problem] = problems(HOST=host)
    assert problem.startswith("USERS_TOKEN ")
    assert load(HOST=host, USERS_AUTH="none").host == host
    assert load(HOST=host, USERS_TOKEN="one").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"])
def test_users_on_loopback_need_no_token(host: str) -> None:
    assert load(HOST=host).users_token == ()


def test_the_service_exits_2_with_a_line_for_each_problem() -> None:
    done = run_app(POSTGRES_URI="", UPSTREAM_URL="", PORT="http", USERS_AUTH="basic", WORKERS=0)
    assert done.returncode == 2
    named = [line.split(" ")[0] for line in done.stdout.splitlines()]
    assert named == ["POSTGRES_URI", "UPSTREAM_URL", "PORT", "WORKERS", "USERS_AUTH"]


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://ann:s3cret@db.example/users?sslmod=require",
        "postgresql://ann:s3cret%zz@db.example/users",
        "postgres://ann:s3cret@[db.example/users",
        "postgres://ann:s3cret@db.example/users?options=-c%20search_path=s3cret",
        "postgres://ann:s3cret@db.example/users?sslmode=s3cret",
        "postgres://ann:s3cret@one,two/users?target_session_attrs=s3cret",
        "postgres://ann:s3cret@db.example/users?connect_timeout=s3cret",
        "postgres://ann:s3cret@db.example:65536/users",
    ],
)
def test_a_uri_that_libpq_cannot_read_is_a_bad_setting(uri: str) -> None:
    done = run_app(POSTGRES_URI=uri, THREADS="few")
    assert done.returncode == 2
    assert sorted(line.split(" ")[0] for line in done.stdout.splitlines()) == [
        "POSTGRES_URI",
        "THREADS",
    ]
    assert "s3cret" not in done.stdout


def test_a_bad_setting_is_told_before_a_socket_is_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_app(PORT=taken.getsockname()[1], THREADS="few")
    assert done.returncode == 2
    assert [line.split(" ")[0] for line in done.stdout.splitlines()] == ["THREADS"]


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_app(PORT=port)
    assert done.returncode not in (0, 2)
    assert len(done.stdout.splitlines()) == 1 and str(port) in done.stdout


@pytest.mark.parametrize("arguments", [["serve"], ["check", "now"], ["--dev", "--dev"], ["-x"]])
def test_an_unknown_command_is_one_line_of_usage(arguments: list[str]) -> None:
    done = run_app(*arguments)
    assert done.returncode == 2
    assert done.stdout.startswith("usage: ") and len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("made", [False, True])
def test_certificates_that_cannot_be_read_are_named(tmp_path: Path, made: bool) -> None:
    bundle = tmp_path / "bundle.pem"
    if made:
        bundle.write_text("no certificate")
    given: dict[str, Any] = {"REQUESTS_CA_BUNDLE": bundle}
    done = run_app(UPSTREAM_URL="https://127.0.0.1:1", **given)
    line = "REQUESTS_CA_BUNDLE must be a file or a folder of certificates\n"
    assert (done.returncode, done.stdout) == (2, line)
    # Nobody reads it for an upstream without TLS.
    assert run_app("check", UPSTREAM_URL="http://127.0.0.1:1", **given).returncode == 5


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copied(tmp_path)


def run_there(checkout: Path, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environ = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    return subprocess.run(
        [sys.executable, "app.py", *args],
        cwd=checkout,
        env=environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
    )


def named(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 2, done.stdout
    return [line.split(" ")[0] for line in done.stdout.splitlines()]


def test_settings_are_read_from_env_file(checkout: Path) -> None:
    assert named(run_there(checkout)) == ["POSTGRES_URI", "UPSTREAM_URL"]
    lines = f"# of ours\nPOSTGRES_URI='{DEAD_DATABASE}'\nexport UPSTREAM_URL=http://127.0.0.1:1\n"
    (checkout / ".env").write_text(lines)
    done = run_there(checkout, "check")
    assert done.returncode == 5, done.stdout
    assert done.stdout.splitlines()[0] == "configuration: ok"


def test_an_env_file_that_cannot_be_read_is_one_line_and_2(checkout: Path) -> None:
    (checkout / ".env").write_bytes("POSTGRES_URI=postgresql://pä@x".encode("latin-1"))
    done = run_there(checkout)
    assert (done.returncode, done.stdout) == (2, ".env is not in UTF-8\n")


@pytest.mark.parametrize("line", ["USERS_TOKEN='s3cret", "USERS_TOKEN: s3cret", "PORT 8081"])
def test_a_line_of_the_env_file_that_cannot_be_read_is_no_line_that_is_not_there(
    checkout: Path, line: str
) -> None:
    """It was skipped, and /users was open."""
    (checkout / ".env").write_text(f"# of ours\nTHREADS=8\n{line}\n")
    done = run_there(checkout, **REQUIRED)
    assert (done.returncode, done.stdout) == (2, ".env cannot be read at line 3\n")


def test_an_env_file_may_begin_with_a_byte_order_mark(checkout: Path) -> None:
    (checkout / ".env").write_bytes(b"\xef\xbb\xbfTHREADS=none\n")
    assert named(run_there(checkout, **REQUIRED)) == ["THREADS"]


def test_the_environment_wins_over_the_env_file(checkout: Path) -> None:
    (checkout / ".env").write_text("PORT=first\nTHREADS=second\n")
    done = run_there(checkout, **REQUIRED, PORT=str(free_port()))
    assert named(done) == ["THREADS"]


def test_an_empty_variable_of_the_environment_leaves_that_of_the_env_file(checkout: Path) -> None:
    (checkout / ".env").write_text("PORT=first\n")
    assert named(run_there(checkout, **REQUIRED, PORT="")) == ["PORT"]


def test_a_dollar_in_the_env_file_is_a_dollar(checkout: Path) -> None:
    """A password may hold one, and nobody wants a part of it replaced by nothing."""
    (checkout / ".env").write_text("HOST=a${HOME}b\n")
    done = run_there(checkout, **REQUIRED)
    assert named(done) == ["HOST"]
    assert "a${HOME}b" in done.stdout


def test_the_example_can_be_copied_as_it_is(checkout: Path) -> None:
    example = dotenv_values(ROOT / ".env.example", interpolate=False)
    assert Settings.from_env({k: v or "" for k, v in example.items()} | REQUIRED) == load()
    shutil.copy(ROOT / ".env.example", checkout / ".env")
    assert named(run_there(checkout)) == ["POSTGRES_URI", "UPSTREAM_URL"]
    given = {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"}
    assert run_there(checkout, "check", **given).returncode == 5
