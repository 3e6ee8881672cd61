"""deploy/: each file is judged by the tool that it is for, where that runs here, and held against
what Gatehouse really has.

What is not run is a container: there is no registry to take its base image from. Its steps are run
instead, in a folder that has what the Dockerfile copies, as another user. Compose and Kubernetes
files are read, and their commands, paths, variables and secrets compared.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app import VERSION
from metrics import BOUNDS, Board
from settings import FROM_FILE, VARIABLES
from tests.harness import (
    DEAD_DATABASE,
    ROOT,
    ScriptedUpstream,
    call,
    free_port,
    ok,
    run_app,
    wait_for,
)
from tests.harness.servers import Server

DEPLOY = ROOT / "deploy"
SETTINGS = {*VARIABLES, *(f"{name}_FILE" for name in FROM_FILE)}


def needs(program: str) -> pytest.MarkDecorator:
    found = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
    return pytest.mark.skipif(found is None, reason=f"{program} is not installed")


def run(*command: str | Path, cwd: Path = DEPLOY) -> str:
    """What a command prints; it has to succeed."""
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# systemd


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, for a project that is in a folder of this test's."""
    project = tmp_path / "gatehouse"
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    for name in ("gatehouse.service", "gatehouse.socket"):
        text = (DEPLOY / name).read_text()
        assert "/srv/gatehouse" in text
        (tmp_path / name).write_text(text.replace("/srv/gatehouse", str(project)))
    return tmp_path


@needs("systemd-analyze")
def test_systemd_understands_every_line_of_the_units(units: Path) -> None:
    told = run("systemd-analyze", "verify", "./gatehouse.service", "./gatehouse.socket", cwd=units)
    # The units of other packages are read too: what is wrong with those is not ours.
    others = re.compile(r"/(usr/lib|lib|etc|run)/systemd/system/")
    assert [line for line in told.splitlines() if not others.match(line)] == []


@needs("systemd-analyze")
def test_the_service_is_exposed_to_little(units: Path) -> None:
    text = run(
        *("systemd-analyze", "security", "--offline=yes", "--no-pager", "./gatehouse.service"),
        cwd=units,
    )
    [level] = re.findall(r"Overall exposure level for gatehouse.service: ([0-9.]+)", text)
    assert float(level) < 3


def service_lines() -> list[tuple[str, str]]:
    return re.findall(r"(?m)^([A-Z][A-Za-z]+)=(.*)$", (DEPLOY / "gatehouse.service").read_text())


def test_the_service_sets_what_is_a_setting() -> None:
    given = [value for name, value in service_lines() if name == "Environment"]
    names = [pair.partition("=")[0] for value in given for pair in value.split()]
    assert names and set(names) <= SETTINGS


def test_the_service_has_the_time_that_a_stop_takes() -> None:
    lines = dict(service_lines())
    stop = float(VARIABLES["SHUTDOWN_TIMEOUT"][1] or 0) + float(VARIABLES["DRAIN_DELAY"][1] or 0)
    assert float(lines["TimeoutStopSec"]) > stop + 1
    assert (lines["Type"], lines["KillMode"], lines["User"]) == ("notify", "mixed", "gatehouse")
    assert lines["RestartPreventExitStatus"] == "2"


@needs("systemd-analyze")
def test_the_system_calls_that_are_let_through_are_all_that_it_makes() -> None:
    """Pinning a core, raising the limit of descriptors and filtering a socket are asked for by
    Gatehouse itself; with EPERM for one of them it would be slower, or refuse connections."""
    allowed: set[str] = set()
    for value in [value for name, value in service_lines() if name == "SystemCallFilter"]:
        for group in value.removeprefix("~").split():
            calls = system_calls(group)
            allowed = allowed - calls if value.startswith("~") else allowed | calls
    needed = {
        *("accept4", "epoll_wait", "epoll_ctl", "splice", "sendmsg", "recvfrom", "setsockopt"),
        *(
            "sched_setaffinity",
            "sched_getaffinity",
            "prlimit64",
            "mmap",
            "clone",
            "clone3",
            "wait4",
        ),
        *("kill", "pipe2", "socketpair", "poll", "rt_sigprocmask", "setitimer", "getrandom"),
    }
    assert needed <= allowed


def system_calls(group: str) -> set[str]:
    """All calls of a group of systemd's, with those of the groups in it."""
    found: set[str] = set()
    for line in run("systemd-analyze", "syscall-filter", "--no-pager", group).splitlines()[1:]:
        name = line.strip()
        if name.startswith("@"):
            found |= system_calls(name)
        elif name and not name.startswith("#"):
            found.add(name)
    return found


# The container


@needs("hadolint")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint") or Path(sys.executable).with_name("hadolint")
    assert run(hadolint, "Dockerfile") == ""


def dockerfile(instruction: str) -> list[str]:
    """Its lines with an instruction, without that."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
    return re.findall(rf"(?m)^{instruction} (.*)$", text)


def copied_files(stage: int) -> list[tuple[list[str], str]]:
    """What a stage copies out of the project: what, and to where."""
    text = re.split(r"(?m)^FROM ", (DEPLOY / "Dockerfile").read_text())[stage]
    words = [line.split() for line in re.findall(r"(?m)^COPY (?!--from)(.*)$", text)]
    return [(line[:-1], line[-1]) for line in words]


def sources(stage: int) -> set[str]:
    return {source for copied, _ in copied_files(stage) for source in copied}


def container_environment() -> dict[str, str]:
    pairs = [pair.split("=", 1) for line in dockerfile("ENV") for pair in line.split()]
    return dict(pairs)


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """A folder with what the Dockerfile copies into the image, that every user can read."""
    with tempfile.TemporaryDirectory(prefix="gatehouse-image-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for copied, target in copied_files(2):
            for source in copied:
                if (ROOT / source).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, folder / target, ignore=ignored)
                else:
                    (folder / target).mkdir(exist_ok=True)
                    shutil.copy(ROOT / source, folder / target)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        install(folder / ".venv" / "bin")
        yield folder


def other_user() -> int | None:
    """A user who may do nothing, where this one may become that."""
    return pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None


def install(folder: Path) -> None:
    """What `pip install` would put there: an interpreter that the other user may run, which sees
    the packages of this one, and pw_migrate."""
    packages = sysconfig.get_paths()["purelib"]
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    for python in (sys.executable, f"/usr/bin/python{ours}"):
        try:
            done = subprocess.run(
                [python, "-c", ask], user=other_user(), cwd="/", capture_output=True, text=True
            )
        except PermissionError:
            continue  # It is in a home folder.
        if done.stdout.strip() == ours:
            break
    else:
        pytest.skip(f"no Python {ours} that another user may run")
    folder.mkdir(parents=True)
    script = Path(sys.executable).with_name("pw_migrate").read_text().partition("\n")[2]
    (folder / "python").write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {python} "$@"\n')
    (folder / "pw_migrate.py").write_text(script)
    (folder / "pw_migrate").write_text(f'#!/bin/sh\nexec python {folder}/pw_migrate.py "$@"\n')
    for path in folder.iterdir():
        path.chmod(0o755)


def in_container(*command: str, cwd: Path, **settings: object) -> subprocess.Popen[str]:
    """A command as the container would run it: from the image's folder, with its environment, and
    as another user where this one may become one."""
    environ = container_environment() | {name: str(value) for name, value in settings.items()}
    path = f"{cwd}/.venv/bin:{os.environ['PATH']}"
    user = other_user()
    return subprocess.Popen(
        [shutil.which(command[0], path=path) or command[0], *command[1:]],
        cwd=cwd,
        env=environ | {"PATH": path},
        user=user,
        extra_groups=None if user is None else [],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_container_s_steps_serve_are_healthy_and_stop_within_docker_s_ten_seconds(
    image: Path, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    [start], [probe] = dockerfile("CMD"), dockerfile("HEALTHCHECK")
    port = free_port()
    settings = {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": upstream.url, "PORT": port}
    health = json.loads(probe.partition("CMD ")[2])
    process = in_container(*json.loads(start), cwd=image, USERS_TOKEN="one", **settings)
    try:

        def healthy() -> bool:
            return in_container(*health, cwd=image, **settings).wait(20) == 0

        wait_for(healthy, 20, "the container to be healthy")
        assert call(port, "GET", "/a").body == b"ok"
        assert call(port, "GET", "/users").status == 401
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()
    assert float(container_environment()["SHUTDOWN_TIMEOUT"]) < 9
    assert in_container(*health, cwd=image, **settings).wait(20) == 1


def test_a_container_without_a_token_says_so(image: Path) -> None:
    process = in_container(
        *json.loads(dockerfile("CMD")[0]),
        cwd=image,
        POSTGRES_URI=DEAD_DATABASE,
        UPSTREAM_URL="http://127.0.0.1:1",
    )
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 2
    assert output.startswith("USERS_TOKEN is required")


def test_the_container_migrates(image: Path) -> None:
    with Server() as server, tempfile.TemporaryDirectory() as secrets:
        server.sql("CREATE DATABASE gatehouse")
        secret = Path(secrets) / "uri"
        secret.write_text(server.uri("gatehouse") + "\n")
        Path(secrets).chmod(0o755)
        command = compose()["services"]["migrate"]["command"]
        process = in_container(*command, cwd=image, POSTGRES_URI_FILE=secret)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "001_users" in output


def test_what_the_image_is_made_of_passes_the_ignore_file_and_no_secret_does() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == sources(1) | sources(2)


def test_the_image_has_all_of_production() -> None:
    """Every module but those for development."""
    wanted = sources(2)
    modules = {path.name for path in ROOT.glob("*.py")} - {"dev.py", "demo.py"}
    assert {name for name in wanted if name.endswith(".py")} == modules
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert folders - {"tests", "bench", "docs", "deploy", "compile"} == wanted - modules


def test_the_image_is_compiled_with_all_that_compiling_reads() -> None:
    code = "import build; print(*build.MODULES, *build.NEIGHBOURS)"
    names = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT / "compile", text=True)
    wanted = {Path(name).parts[0] for name in names.split()}
    assert wanted | {"compile", "pyproject.toml", "requirements.txt"} == sources(1)


# Compose and Kubernetes


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return document


def kubernetes() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


def test_the_deployed_version_is_this_one() -> None:
    """A Job cannot be changed: with an older version's name the migration would not be run again."""
    assert kubernetes()["Job"]["metadata"]["name"].endswith(VERSION.replace(".", "-"))
    for name in ("compose.yaml", "kubernetes.yaml"):
        assert set(re.findall(r"image: gatehouse:(\S+)", (DEPLOY / name).read_text())) == {VERSION}


@needs("kubernetes-validate")
def test_kubernetes_knows_every_field_of_the_manifest() -> None:
    validate = Path(sys.executable).with_name("kubernetes-validate")
    assert run(validate, "--strict", "kubernetes.yaml").count(" passed ") == 3


def version() -> str:
    [found] = re.findall(r'(?m)^version = "(.+)"$', (ROOT / "pyproject.toml").read_text())
    return str(found)


def test_compose_s_services_have_the_settings_secrets_and_paths_that_exist() -> None:
    document = compose()
    for name in ("migrate", "gatehouse"):
        service = document["services"][name]
        assert set(service["environment"]) <= SETTINGS
        assert service["image"] == f"gatehouse:{version()}"
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        files = [v for k, v in service["environment"].items() if k.endswith("_FILE")]
        assert files == [f"/run/secrets/{secret}" for secret in service["secrets"]]
        assert set(service["secrets"]) <= set(document["secrets"])
    # The proxy waits for no database.
    assert "depends_on" not in document["services"]["gatehouse"]
    assert document["services"]["migrate"]["depends_on"] == {
        "database": {"condition": "service_healthy"}
    }


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document["spec"]["template"]["spec"]["containers"]
    return found


def test_kubernetes_s_pods_have_the_settings_probes_and_time_that_they_need() -> None:
    found = kubernetes()
    assert set(found) == {"Job", "Deployment", "Service"}
    for kind in ("Job", "Deployment"):
        [container] = containers(found[kind])
        assert {one["name"] for one in container["env"]} <= SETTINGS
        assert container["image"] == f"gatehouse:{version()}"
        pod = found[kind]["spec"]["template"]["spec"]
        [volume] = pod["volumes"]
        mounted = [one for one in container["volumeMounts"] if one["name"] == volume["name"]]
        assert mounted[0]["mountPath"] == "/secrets"
        assert pod["securityContext"]["runAsUser"] == int(dockerfile("USER")[0])
    [container] = containers(found["Deployment"])
    env = {one["name"]: one["value"] for one in container["env"]}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    stop = float(env["DRAIN_DELAY"]) + float(env["SHUTDOWN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] > stop + 1
    assert float(env["DRAIN_DELAY"]) > 0 and "lifecycle" not in container
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health/live"
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == {"app": "gatehouse"}
    assert found["Service"]["spec"]["selector"] == {"app": "gatehouse"}
    # The job's pod is none of those that are asked.
    assert found["Job"]["spec"]["template"]["metadata"]["labels"]["app"] != "gatehouse"
    assert containers(found["Job"])[0]["command"] == compose()["services"]["migrate"]["command"]


# Prometheus and Grafana


@needs("promtool")
def test_the_alerts_fire_when_they_should_and_not_before() -> None:
    run("promtool", "check", "config", "prometheus.yml")
    assert "SUCCESS: 8 rules found" in run("promtool", "check", "rules", "alerts.yml")
    assert "SUCCESS" in run("promtool", "test", "rules", "alerts-test.yml")


def rules() -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    """Every query of the alerts and of the dashboard, with the dashboard's variables put in."""
    board = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(asked) > 15
    shown = [one.replace("$instance", ".*").replace("$__rate_interval", "1m") for one in asked]
    return [rule["expr"] for rule in rules()] + shown


def test_alerts_dashboard_and_soak_ask_for_metrics_that_exist() -> None:
    board = Board(1)
    board.join(0)
    board.forwarded(up=True)
    text = board.exposition(version="1", database_up=True, pool_size=8)
    known = {*re.findall(r"(?m)^# TYPE (\S+)", text), "gatehouse_answer_head_seconds_bucket"}
    assert str(BOUNDS[0]) in text
    soak = (ROOT / "bench" / "soak.py").read_text()
    assert set(re.findall(r"\bgatehouse_[a-z_]+", soak)) <= known
    for one in expressions():
        asked = set(re.findall(r"\bgatehouse_[a-z_]+", one))
        assert asked <= known, one
        for label, value in re.findall(r'(owner|type)=~?"([^"]+)"', one):
            assert re.search(rf'{label}="{value}"', text), one


@needs("promtool")
def test_prometheus_understands_every_query_of_the_dashboard(tmp_path: Path) -> None:
    group = {
        "name": "all",
        "rules": [{"record": f"q{n}", "expr": e} for n, e in enumerate(expressions())],
    }
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [group]}))
    assert "SUCCESS" in run("promtool", "check", "rules", tmp_path / "rules.yml")


def test_every_alert_has_a_paragraph_of_what_to_do() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    for rule in rules():
        assert f"`{rule['alert']}`" in text


def test_the_panels_do_not_lie_on_each_other() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


# In front


@pytest.mark.parametrize(
    ("language", "name"), [("nginx", "nginx.conf"), ("caddyfile", "Caddyfile")]
)
def test_the_files_for_nginx_and_caddy_are_those_of_the_docs(language: str, name: str) -> None:
    """tests/proxy/test_behind_proxies.py runs those."""
    page = (ROOT / "docs" / "proxy.md").read_text()
    [text] = re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert (DEPLOY / name).read_text() == text


# The Makefile


def recipe(target: str) -> str:
    """What `make` would do on a fresh machine."""
    return run("make", "--dry-run", "--always-make", target, cwd=ROOT)


@needs("make")
def test_make_install_is_production_only() -> None:
    text = recipe("install")
    assert "-r requirements.txt" in text and "requirements-dev" not in text


@needs("make")
@pytest.mark.parametrize(
    "target", ["run", "test", "check", "bench", "bench-full", "faults", "fuzz", "audit"]
)
def test_the_other_targets_add_what_they_need(target: str) -> None:
    text = recipe(target)
    assert text.index("-r requirements.txt") < text.index("-r requirements-dev.txt")


@needs("make")
@pytest.mark.parametrize(
    "case", ["as it was", "moved", "without its Python", "another Python", "another project's"]
)
def test_a_venv_that_no_longer_works_is_made_anew(tmp_path: Path, case: str) -> None:
    """Its commands could not be executed after a move, and `make -B install` left them as they were.
    One that is a link to another project's is left alone: it was emptied for that project too."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    made_in = Path("/elsewhere") if case in ("moved", "another project's") else tmp_path
    (commands / "pw_migrate").write_text(f"#!{made_in}/.venv/bin/python3\n")
    (commands.parent / ".installed").touch()
    chosen = tmp_path / "python"
    answer = "other" if case in ("another Python", "another project's") else "same"
    for path, says in ((chosen, "same"), (commands / "python", answer)):
        path.write_text(f"#!/bin/sh\necho {says}\n")
        path.chmod(0o755)
    if case == "without its Python":
        (commands / "python").unlink()
        (commands / "python").symlink_to("/nowhere")
    elif case == "another project's":
        commands.parent.rename(tmp_path / "theirs")
        commands.parent.symlink_to("theirs")
    told = run("make", "--dry-run", "install", f"PYTHON={chosen}", cwd=tmp_path)
    works = case in ("as it was", "another project's")
    assert ("-m venv --clear .venv" in told) == (not works), told
    assert ("-m venv" in told) == (not works), told


@needs("make")
def test_a_venv_keeps_its_python_where_none_is_named(tmp_path: Path) -> None:
    """`make -B install` put the modules of `python3` beside the Python that had been named before."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    named = tmp_path / "python3.named"
    named.write_text("#!/bin/sh\n")
    named.chmod(0o755)
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    install = ("make", "--dry-run", "--always-make", "install")
    assert "\npython3 -m venv " in run(*install, cwd=tmp_path)
    (commands / "python").symlink_to(named)
    assert f"\n{named} -m venv  .venv\n" in run(*install, cwd=tmp_path)


# The page "from zero to production"


def test_check_says_what_the_page_promises(database: str, upstream: ScriptedUpstream) -> None:
    page = (ROOT / "docs" / "production.md").read_text()
    [told] = re.findall(r"(?ms)^```\n(configuration: .*?)^```$", page)
    done = run_app("check", "--verbose", POSTGRES_URI=database, UPSTREAM_URL=upstream.url)
    assert done.returncode == 0
    assert re.sub(r"\d+", "N", done.stdout) == re.sub(r"\d+", "N", told)


def test_the_units_for_the_move_from_1_0_0_differ_in_their_names_and_port_only(
    tmp_path: Path,
) -> None:
    page = (ROOT / "docs" / "upgrading.md").read_text()
    commands = re.findall(r"(?m)^ *(sed .* > /etc/systemd/system/.*)$", page)
    assert len(commands) == 2
    for command in commands:
        run("sh", "-c", command.replace("/etc/systemd/system", str(tmp_path)))
    for kind in ("service", "socket"):
        text = (DEPLOY / f"gatehouse.{kind}").read_text()
        text = text.replace("/srv/gatehouse", "/srv/gatehouse-2").replace(":8080", ":8081")
        text = text.replace("gatehouse.socket", "gatehouse-2.socket")
        assert (tmp_path / f"gatehouse-2.{kind}").read_text() == text


def test_the_way_back_to_1_0_0_undoes_all_migrations_but_its_own() -> None:
    page = (ROOT / "docs" / "upgrading.md").read_text()
    [count] = re.findall(r"pw_migrate rollback --count (\d+)", page)
    # The page says that a project undoes its own migrations, which come later, too.
    migrations = sorted(path.name for path in (ROOT / "migrations").glob("[0-9]*.py"))
    assert migrations[int(count)] == "004_search.py"


@pytest.mark.parametrize("name", ["production", "upgrading", "monitoring", "machines"])
def test_the_page_names_files_that_there_are_and_settings_that_there_are(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text()
    for name in re.findall(r"\bdeploy/([A-Za-z.-]+[a-zA-Z])\b", page):
        assert (DEPLOY / name).exists(), name
    for name in re.findall(r"\b([A-Z]+(?:_[A-Z]+)+)=", page):
        assert name in SETTINGS, name
