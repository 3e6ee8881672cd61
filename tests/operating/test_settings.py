from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values

from cpus import available_cpus, cpu_quotas
from env_file import doubtful, near_misses
from settings import (
    FILE_VARIABLES,
    VARIABLES,
    Settings,
    SettingsError,
)
from tests.harness import (
    DEAD_DATABASE,
    ROOT,
    Service,
    copied,
    free_port,
    run_app,
    unprivileged,
    wait_for,
)

REQUIRED = {
    "POSTGRES_URI": "postgresql://ann@db.example/users",
    "UPSTREAM_URL": "http://app.example",
}

DEFAULTS = {
    "host": "127.0.0.1",
    "port": 8080,
    "workers": 1,
    "threads": 16,
    "upstream_max_in_flight": None,
    "upstream_connect_timeout": 5,
    "upstream_read_timeout": 300,
    "upstream_stream_timeout": 3600,
    "upstream_keepalive_timeout": 50,
    "upstream_retry": 0,
    "upstream_preserve_host": True,
    "sse_keepalive": 0,
    "keepalive_timeout": 120,
    "client_timeout": 60,
    "db_pool_size": 8,
    "db_pool_timeout": 2,
    "db_connect_timeout": 2,
    "db_statement_timeout": 5,
    "users_token": (),
    "users_auth": "token",
    "trusted_proxies": (),
    "max_body_bytes": 0,
    "shutdown_timeout": 30,
    "drain_delay": 0,
    "access_log": True,
}

BAD = {
    "POSTGRES_URI": [
        "db.example",
        "host=db.example dbname=users",
        "mysql://db.example/users",
        "//",
        "postgresql://ann:p@ss@db.example/users",
        "postgresql://ann:pass@@db.example",
        "postgresql://ann@corp:pass@one:1,two:2?sslmode=require",
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
        "http://bücher.example",
    ],
    "HOST": [
        *("two words", "http://127.0.0.1", "a/b", "127.0.0.1:80", "999.1.1.1", "1", "a..b", "."),
        *("a" * 64, ".a", "[::1", "fe80::1::2", "a%b"),
    ],
    "PORT": ["-1", "65536", "eighty", "80.0", "0x50", "8_0", "٨٠", "+80"],
    "WORKERS": ["0", "-1", "many", "1.5", "257"],
    "THREADS": ["0", "-4", "few", "4097"],
    "UPSTREAM_MAX_IN_FLIGHT": ["0", "-1", "all"],
    "UPSTREAM_CONNECT_TIMEOUT": ["0", "-1", "soon", "nan", "inf", "1e3", "5s"],
    "UPSTREAM_READ_TIMEOUT": ["0", "-1", "soon", "nan", "inf"],
    "UPSTREAM_STREAM_TIMEOUT": ["0", "-1", "never", "604801"],
    "UPSTREAM_KEEPALIVE_TIMEOUT": ["-1", "soon"],
    "UPSTREAM_RETRY": ["-1", "twice"],
    "UPSTREAM_PRESERVE_HOST": ["maybe", "2", "onn"],
    "SSE_KEEPALIVE": ["-1", "on"],
    "KEEPALIVE_TIMEOUT": ["0", "-1", "off"],
    "CLIENT_TIMEOUT": ["0", "-1", "off"],
    "DB_POOL_SIZE": ["0", "-1", "8.0", "big"],
    "DB_POOL_TIMEOUT": ["0", "-1", "soon"],
    "DB_CONNECT_TIMEOUT": ["0", "-1", "0.5", "soon"],
    "DB_STATEMENT_TIMEOUT": ["0", "-1", "soon"],
    "USERS_TOKEN": [",", "one two", "tök", "a,,b", "one\ntwo"],
    "USERS_AUTH": ["basic", "off", "tokens"],
    "TRUSTED_PROXIES": ["proxy.example", "10.0.0.0/33", "10.0.0.256", "10.0.0.1;10.0.0.2"],
    "MAX_BODY_BYTES": ["-1", "100MB", "1e6"],
    "SHUTDOWN_TIMEOUT": ["-1", "soon"],
    "DRAIN_DELAY": ["-1", "soon"],
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
    assert set(settings) - set(DEFAULTS) == {"postgres_uri", "upstream_url"}


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


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("POSTGRES_URI", "postgresql://ann:p@ss@127.0.0.1/d", "write %40 for @"),
        ("POSTGRES_URI", "postgresql://ann:p@ss/w@127.0.0.1/d", "write %40 for @"),
        ("POSTGRES_URI", "postgresql://ann:p@ss/w@db.example:5432?x=y", "write %40 for @"),
        ("POSTGRES_URI", "postgresql://a/d\npostgresql://a/d", "has more than one line"),
        ("UPSTREAM_URL", "http://bücher.example", "must have the host in its ASCII form, xn--…"),
        ("USERS_TOKEN", "one\ntwo", "has more than one line"),
    ],
)
def test_a_problem_says_what_to_write_instead(variable: str, value: str, told: str) -> None:
    """The first passed, and then a host was not found that nobody had written; the others were told
    what a host and a token are."""
    [problem] = problems(**{variable: value})
    assert told in problem


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
        ("THREADS", "1", 1),
        ("UPSTREAM_MAX_IN_FLIGHT", "7", 7),
        ("UPSTREAM_READ_TIMEOUT", "0.5", 0.5),
        ("DB_CONNECT_TIMEOUT", "1", 1),
        ("USERS_AUTH", "NONE", "none"),
        ("USERS_TOKEN", "one, two ,three==", ("one", "two", "three==")),
        ("MAX_BODY_BYTES", "1000000000000000", 10**15),
        ("SHUTDOWN_TIMEOUT", "0", 0),
        ("POSTGRES_URI", "postgres://h/d", "postgresql://h/d"),
        ("POSTGRES_URI", "PostgreSQL://h/d", "postgresql://h/d"),
        (
            "POSTGRES_URI",
            "postgresql://ann:p%40ss%2F@h1:1,h2:2/d?target_session_attrs=read-write&sslmode=require",
            "postgresql://ann:p%40ss%2F@h1:1,h2:2/d?target_session_attrs=read-write&sslmode=require",
        ),
        *(
            ("POSTGRES_URI", uri, uri)
            for uri in (
                "postgresql://ann@h1:1,[::1]:2/d@x",
                "postgresql://h/d@x",
                "postgresql://ann@h/d@x:y",
                "postgresql://ann:p@/d@x:y?host=/tmp",
                "postgresql://ann:p@h:5/d@x/y",
                "postgresql://ann:p@[::1]/d@x:y",
                "postgresql://ann:p@%2Ftmp/d@x/y",
                "postgresql://ann:p?ss@h?application_name=a@b",
            )
        ),
        ("USERS_TOKEN", "one,\ntwo", ("one", "two")),
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


def test_trusted_proxies_of_ipv4_may_be_written_as_ipv6() -> None:
    """Clients are compared as IPv4: such a network was taken, and no proxy was ever in it."""
    trusted = load(TRUSTED_PROXIES="::ffff:10.1.2.3, ::ffff:10.0.0.0/104, ::/0").trusted_proxies
    names = ["10.1.2.3/32", "10.0.0.0/8", "::/0"]
    assert trusted == tuple(ipaddress.ip_network(name) for name in names)


@pytest.mark.parametrize(
    ("url", "text", "preserve"),
    [
        ("http://app.example", "auto", True),
        ("HTTP://app.example", "", True),
        ("https://app.example", "auto", False),
        ("HTTPS://app.example", "Auto", False),
        ("https://app.example", "on", True),
        ("http://app.example", "off", False),
    ],
)
def test_the_host_is_the_client_s_for_a_plain_upstream(url: str, text: str, preserve: bool) -> None:
    settings = load(UPSTREAM_URL=url, UPSTREAM_PRESERVE_HOST=text)
    assert settings.upstream_preserve_host is preserve


def test_workers_auto_is_one_for_each_cpu_that_may_be_used() -> None:
    assert load(WORKERS="auto").workers == available_cpus()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process")
def test_a_process_that_is_pinned_counts_its_own_cpus() -> None:
    command = "import os, cpus; print(cpus.available_cpus())"
    first = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{first}}}); {command}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1\n", done.stderr


V2 = "30 24 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
V1 = "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
OTHER = "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("mounts", "group", "files", "quotas"),
    [
        # A container with a namespace of its own, as Docker and Kubernetes make it.
        (V2.format(root="/"), "0::/\n", {"": "50000 100000"}, [0.5]),
        (V2.format(root="/"), "0::/\n", {"": "max 100000"}, []),
        (V2.format(root="/"), "0::/\n", {}, []),
        # A unit of systemd's, with CPUQuota= on its slice.
        (
            V2.format(root="/"),
            "0::/app.slice/gatehouse.service\n",
            {"app.slice": "150000 100000", "app.slice/gatehouse.service": "max 100000"},
            [1.5],
        ),
        # Version 1, where a container sees the paths of the host.
        (
            OTHER + V1.format(root="/docker/4f1c"),
            "5:memory:/docker/4f1c\n4:cpu,cpuacct:/docker/4f1c\n",
            {"": "50000 100000"},
            [0.5],
        ),
        (
            V1.format(root="/"),
            "4:cpu,cpuacct:/a/b\n",
            {"a/b": "-1 100000", "a": "300000 100000"},
            [3],
        ),
        # Both: the controller is with version 1.
        (V1.format(root="/") + HYBRID, "4:cpu,cpuacct:/\n0::/\n", {"": "50000 100000"}, [0.5]),
    ],
)
def test_a_container_s_quota_is_found(
    tmp_path: Path, mounts: str, group: str, files: dict[str, str], quotas: list[float]
) -> None:
    """The files are those of the kernel, laid out as it does: a test may make no control group."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group)
    (tmp_path / "proc/self/mountinfo").write_text(mounts)
    version1 = "cpu,cpuacct" in mounts
    for name, text in files.items():
        folder = tmp_path / "sys/fs/cgroup" / ("cpu,cpuacct" if version1 else "") / name
        folder.mkdir(parents=True, exist_ok=True)
        if version1:
            quota, period = text.split()
            (folder / "cpu.cfs_quota_us").write_text(quota + "\n")
            (folder / "cpu.cfs_period_us").write_text(period + "\n")
        else:
            (folder / "cpu.max").write_text(text + "\n")
    assert cpu_quotas(tmp_path) == quotas
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert cpus is not None
    assert available_cpus(tmp_path) == min([cpus, *(max(1, round(one + 0.49)) for one in quotas)])


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quotas(tmp_path) == []


@pytest.fixture
def quota_of_half_a_cpu() -> Iterator[Path]:
    """A real control group with half a CPU, where this system lets a test make one."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in mounts:
        kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
        group = Path(mount[4]) / "gatehouse-test"
        try:
            if kind == "cgroup2":
                group.mkdir()
                (group / "cpu.max").write_text("50000 100000")
            elif kind == "cgroup" and "cpu" in options:
                group.mkdir()
                (group / "cpu.cfs_quota_us").write_text("50000")
            else:
                continue
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("no control group with a quota can be made here")


def test_half_a_cpu_is_one_worker(quota_of_half_a_cpu: Path) -> None:
    code = "import cpus; print(cpus.cpu_quotas(), cpus.available_cpus())"
    enter = f"open('{quota_of_half_a_cpu}/cgroup.procs', 'w').write('0')"
    done = subprocess.run(
        [sys.executable, "-c", f"{enter}; {code}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "[0.5] 1\n", done.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("USERS_TOKENS", "USERS_TOKEN"),
        ("USER_TOKEN", "USERS_TOKEN"),
        ("users_token", "USERS_TOKEN"),
        ("USERS-TOKEN", "USERS_TOKEN"),
        ("USERSTOKEN", "USERS_TOKEN"),
        ("USERS_TOKEN_FILES", "USERS_TOKEN_FILE"),
        ("WORKER", "WORKERS"),
        ("POSTGRES_URL", "POSTGRES_URI"),
        ("TRUSTED_PROXY", "TRUSTED_PROXIES"),
        ("MAX_BYTES_BODY", "MAX_BODY_BYTES"),
        ("PROT", None),
        ("POTR", None),
        ("PORTS", "PORT"),
        ("DB_POOLSIZE", "DB_POOL_SIZE"),
        # Those of other programs that share the file.
        ("POSTGRES_USER", None),
        ("POSTGRES_PASSWORD", None),
        ("POSTGRES_DB", None),
        ("DB_HOST", None),
        ("HOSTNAME", None),
        ("HOME", None),
        ("PGPORT", None),
        ("SECRET_KEY", None),
        ("DEBUG", None),
        ("COMPOSE_PROJECT_NAME", None),
    ],
)
def test_a_name_close_to_a_setting_s_is_a_problem_that_names_it(
    name: str, meant: str | None
) -> None:
    """USERS_TOKENS= left /users open, and nobody was told."""
    found = near_misses([name, *VARIABLES])
    if meant is None:
        assert found == []
    else:
        assert found == [f"{name} in .env is no setting: write {meant}, or take the line out"]


def test_a_near_miss_in_the_env_file_is_told_beside_the_other_problems(checkout: Path) -> None:
    (checkout / ".env").write_text("USERS_TOKENS=one\nPORT=http\nWORKER=\nOTHER=1\n")
    assert named(run_there(checkout, **REQUIRED)) == ["PORT", "USERS_TOKENS", "WORKER"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("USERS_TOKENS", "USERS_TOKEN"),
        ("UPSTREAM_URI", "UPSTREAM_URL"),
        ("TRUSTED_PROXY", "TRUSTED_PROXIES"),
        (
            "UPSTREAM_TIMEOUT",
            "UPSTREAM_CONNECT_TIMEOUT, UPSTREAM_READ_TIMEOUT, UPSTREAM_STREAM_TIMEOUT,"
            " UPSTREAM_KEEPALIVE_TIMEOUT",
        ),
        # Those of other programs, which are common in an environment or in a file that is shared.
        ("POSTGRES_URL", None),
        ("DATABASE_URL", None),
        ("DB_POOL", None),
        ("POOL_SIZE", None),
        ("MAX_BODY_SIZE", None),
        ("TOKEN", None),
        ("PORTS", None),
        ("UPSTREAM_PORT", None),
        ("UPSTREAM_SERVICE_HOST", None),
        ("USERS_PORT_80_TCP_ADDR", None),
    ],
)
def test_a_name_that_may_be_meant_for_a_setting_is_a_warning(name: str, meant: str | None) -> None:
    told = [f"{name} is no setting, and has no effect. There is {meant}"] if meant else []
    assert doubtful([name, *VARIABLES, *FILE_VARIABLES]) == told


def test_a_doubtful_name_in_the_environment_or_the_env_file_is_told_and_no_error(
    checkout: Path,
) -> None:
    """The environment is shared with the whole system, which has names of its own."""
    (checkout / ".env").write_text("UPSTREAM_MAX=4\n")
    given = {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"}
    given |= {"WORKER": "4", "USERS_TOKENS": "one"}
    warnings = [
        "USERS_TOKENS is no setting, and has no effect. There is USERS_TOKEN",
        "UPSTREAM_MAX is no setting, and has no effect. There is UPSTREAM_MAX_IN_FLIGHT",
    ]
    said = run_there(checkout, "check", **given).stdout.splitlines()
    assert said[:3] == ["configuration: ok", *(f"warning: {line}" for line in warnings)]
    with Service(folder=checkout, ACCESS_LOG="off", **given) as service:
        told = re.compile(r"(?m) WARNING (.* is no setting.*)$")
        wait_for(lambda: told.findall(service.log) == warnings, what="the warnings")


@pytest.mark.parametrize("mode", [0, 0o111])
def test_migrations_that_cannot_be_read_are_told(checkout: Path, mode: int) -> None:
    """It started, and /health knew of no migration."""
    (checkout / "migrations").chmod(mode)
    for arguments in ([], ["check"]):
        done = subprocess.run(
            [*unprivileged(), sys.executable, "app.py", *arguments],
            cwd=checkout,
            env=REQUIRED,
            capture_output=True,
            text=True,
            timeout=30,
        )
        told = f"{checkout / 'migrations'} cannot be read: Permission denied\n"
        assert (done.returncode, done.stderr) == (2, told)


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_value_is_read_from_a_file(tmp_path: Path, end: str) -> None:
    uri, token = tmp_path / "uri", tmp_path / "token"
    uri.write_text(f"postgres://ann:p%40ss@db.example/users{end}")
    token.write_text(f"one,two{end}")
    settings = Settings.from_env(
        {
            "UPSTREAM_URL": "http://app.example",
            "POSTGRES_URI_FILE": str(uri),
            "USERS_TOKEN_FILE": str(token),
        }
    )
    assert settings.postgres_uri == "postgresql://ann:p%40ss@db.example/users"
    assert settings.users_token == ("one", "two")


def test_both_forms_of_a_setting_are_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one\n")
    assert problems(USERS_TOKEN="two", USERS_TOKEN_FILE=str(file)) == [
        "USERS_TOKEN and USERS_TOKEN_FILE are both set: unset one of them"
    ]
    assert load(USERS_TOKEN=" ", USERS_TOKEN_FILE=str(file)).users_token == ("one",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory"),
        (b"", "the file is empty"),
        (b"\n", "the file is empty"),
        (b"\xff\xfe", "it is no text in UTF-8"),
        (b"x" * 70000, "it is larger than 64 KB"),
    ],
)
def test_a_file_that_gives_no_value_is_a_problem_and_never_an_open_door(
    tmp_path: Path, content: bytes | None, why: str
) -> None:
    file = tmp_path / "s3cret"
    if content is not None:
        file.write_bytes(content)
    expected = [f"USERS_TOKEN cannot be read from USERS_TOKEN_FILE: {why}"]
    assert problems(USERS_TOKEN_FILE=str(file)) == expected


@pytest.mark.parametrize("name", ["POSTGRES_URI", "USERS_TOKEN"])
def test_a_bad_value_in_a_file_is_not_quoted(tmp_path: Path, name: str) -> None:
    file = tmp_path / "file"
    file.write_text("s3cret, two words\n")
    given = {"UPSTREAM_URL": "http://app.example"} | ({} if name == "POSTGRES_URI" else REQUIRED)
    with pytest.raises(SettingsError) as raised:
        Settings.from_env(given | {f"{name}_FILE": str(file)})
    [problem] = raised.value.problems
    assert problem.startswith(f"{name} ") and "s3cret" not in problem


def test_the_commands_read_the_uri_from_a_file(checkout: Path, tmp_path: Path) -> None:
    file = tmp_path / "uri"
    file.write_text(DEAD_DATABASE + "\n")
    given = {"POSTGRES_URI_FILE": str(file), "UPSTREAM_URL": "http://127.0.0.1:1"}
    done = run_there(checkout, "check", **given)
    assert done.returncode == 5 and "database: unreachable" in done.stdout
    migrate = subprocess.run(
        [Path(sys.executable).with_name("pw_migrate"), "migrate"],
        cwd=checkout,
        env={"PATH": os.environ["PATH"]} | given,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert migrate.returncode == 1
    assert migrate.stderr.startswith("the database cannot be used: ")


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["check", "now"],
        ["--dev", "--dev"],
        ["--dev", "check"],
        ["-x"],
        ["--vers"],
        ["health", "well"],
    ],
)
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
    done = run_app(UPSTREAM_URL="https://127.0.0.1:1", PORT="http", **given)
    assert done.returncode == 2
    assert done.stdout.startswith("PORT ") and done.stdout.endswith(line)
    # Nobody reads it for an upstream without TLS.
    assert run_app("check", UPSTREAM_URL="http://127.0.0.1:1", **given).returncode == 5


def test_certificates_that_may_not_be_read_are_told_so(checkout: Path) -> None:
    """It was said that they were no file."""
    (checkout / "bundle.pem").touch(mode=0)
    done = subprocess.run(
        [*unprivileged(), sys.executable, "app.py"],
        cwd=checkout,
        env=REQUIRED | {"UPSTREAM_URL": "https://127.0.0.1:1", "REQUESTS_CA_BUNDLE": "bundle.pem"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    told = "REQUESTS_CA_BUNDLE cannot be read: Permission denied\n"
    assert (done.returncode, done.stderr) == (2, told)


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
    told = ".env cannot be read at line 3: write NAME=value\n"
    assert (done.returncode, done.stdout) == (2, told)


@pytest.mark.parametrize("line", ["USERS_TOKEN", "export USERS_TOKEN", "POSTGRES_URI_FILE"])
def test_a_setting_without_a_value_in_the_env_file_is_named(checkout: Path, line: str) -> None:
    """/users was open. A name of another program's may stand alone."""
    (checkout / ".env").write_text(f"THREADS=8\nOTHER\n{line}\n")
    done = run_there(checkout, **REQUIRED)
    name = line.removeprefix("export ")
    assert (done.returncode, done.stdout) == (2, f".env has no = after {name} at line 3\n")


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
    shutil.copy(ROOT / ".env.example", checkout / ".env")
    # What it reaches depends on the machine: perhaps nothing, but it has no problem to tell.
    done = run_there(checkout, "check", PGCONNECT_TIMEOUT="1")
    assert done.stdout.splitlines()[0] == "configuration: ok"
    given = {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"}
    assert run_there(checkout, "check", **given).returncode == 5


def test_the_example_shows_the_defaults(checkout: Path) -> None:
    text = re.sub(r"(?m)^#([A-Z_]+=)", r"\1", (ROOT / ".env.example").read_text())
    (checkout / ".env").write_text(text)
    shown = dotenv_values(checkout / ".env", interpolate=False)
    assert Settings.from_env({k: v or "" for k, v in shown.items()} | REQUIRED) == load()
