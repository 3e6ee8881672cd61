"""docs/extending.md is carried out, on a copy of the project, and the tests of users run on that."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from postgres.schema import names as migrations
from services.fields import NAMES
from tests.harness import ROOT
from tests.harness.service import copied

TUTORIAL = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"(?ms)^```diff\n# (\S+)\n(.*?)^```$")
PHONES = """
import json, uuid
from tests.harness import Service, create_user, invalid_fields, new_email, problem

COUNT = "/users/reports/count"

def test_a_phone_may_be_absent_null_and_unique(service: Service) -> None:
    created = create_user(service).json()
    assert created["phone"] is None
    path, number = f"/users/{created['id']}", "+4930123456"
    assert service.call("PATCH", path, {"phone": number}).json()["phone"] == number
    etag = service.call("GET", path).get("ETag")
    assert service.call("PATCH", path, {"name": "Bea"}).json()["phone"] == number
    assert service.call("PATCH", path, {"phone": number}).json()["name"] == "Bea"
    assert service.call("GET", path).get("ETag") != etag
    other = {"email": new_email(), "name": "Bob", "phone": number}
    problem(service.call("POST", "/users", other), 409, "refused-by-database")
    problem(service.call("PUT", f"/users/{uuid.uuid4()}", other), 409, "refused-by-database")
    wrong = service.call("POST", "/users", other | {"phone": "030"})
    assert invalid_fields(problem(wrong, 422, "invalid-user")) == ["phone"]
    assert service.call("PATCH", path, {"phone": None}).json()["phone"] is None
    assert service.call("POST", "/users", other).status == 201
    whole = {"email": new_email(), "name": "Cy"}
    assert service.call("PUT", path, whole).json()["phone"] is None

def test_phones_go_in_and_out(service: Service) -> None:
    body = f"phone,email,name\\n+491,{new_email()},Ann\\n,{new_email()},Bob\\n+4915112345678,{new_email()},Cy\\n"
    headers = {"Content-Type": "text/csv"}
    reply = service.call("POST", "/users", body.encode(), headers)
    statuses = [json.loads(line).get("status") for line in reply.body.splitlines()]
    assert statuses == [422, 201, 201, None]
    out = service.call("GET", "/users?q=Cy", headers={"Accept": "text/csv"}).body.decode()
    assert out.splitlines()[0] == "id,email,name,metadata,phone,created_at,updated_at"
    assert ",+4915112345678," in out
    page = service.call("GET", "/users", headers={"Accept": "text/html"}).body.decode()
    assert '"phone"' in page

def test_users_are_counted(service: Service) -> None:
    before = service.call("GET", COUNT).json()["count"]
    create_user(service)
    assert service.call("GET", COUNT).json() == {"count": before + 1}

def test_users_can_be_made_read_only(database: str) -> None:
    with Service(POSTGRES_URI=database, USERS_READ_ONLY="on") as service:
        assert service.call("GET", "/users").status == 200
        refused = service.call("POST", "/users", {"email": new_email(), "name": "Ann"})
        problem(refused, 405, "method-not-allowed")
"""


def test_the_changes_touch_as_many_places_as_the_page_says() -> None:
    """What a change costs is the measure of the house: a longer one has to be seen."""
    page = TUTORIAL.read_text()
    told = re.findall(r"(?m)^\| \[a \w+\]\(.+?\) \| (\d+):.*\| (\d+) \| (\d+) \|$", page)
    *changes, problem = page.split("\n## ")[1:]
    real = []
    for section in changes:
        blocks = BLOCK.findall(section)
        files = {name for name, _ in blocks}
        lines = [line for _, block in blocks for line in re.findall(r"(?m)^\+.+$", block)]
        real.append((str(len(files)), str(len(blocks)), str(len(lines))))
    # A problem's places are a table: its lines cannot be counted here.
    names = re.findall(r"(?m)^\| `(\S+)` \|", problem)
    real.append((str(len(set(names))), str(len(names)), told[-1][2]))
    assert told == real
    assert [name for name in names if not (ROOT / name).is_file()] == []


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def added(block: str) -> str:
    """The block as it stands in the file when it is done."""
    return "".join(line[1:] + "\n" for line in block.splitlines() if not line.startswith("-"))


def extended(folder: Path) -> Path:
    """A copy of the project with all that the tutorial says done to it."""
    copied(folder)
    for name in ("docs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", ".env.example"):
        shutil.copy(ROOT / name, folder)
    steps = BLOCK.findall(TUTORIAL.read_text())
    assert len(steps) >= 8
    for name, block in steps:
        path, new = folder / name, added(block)
        old = "".join(line[1:] + "\n" for line in block.splitlines() if not line.startswith("+"))
        text = path.read_text() if path.exists() else ""
        assert text.count(old) == 1 or not text, f"{name}: where does this go?\n{block}"
        path.write_text(text.replace(old, new, 1) if text else new)
    (folder / "tests" / "users" / "test_phones.py").write_text(PHONES)
    return folder


def assert_pass(folder: Path, names: list[str]) -> None:
    """These tests pass there, but for the slow ones, which are not run. Some measure time: what
    fails is tried again, as the Makefile does."""
    paths = [f"tests/{name}" for name in names]
    for options in (["-n", "2"], ["--last-failed", "--last-failed-no-failures", "none"]):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *options, *paths],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=900,
        )
        if done.returncode == 0:
            return
    raise AssertionError(done.stdout[-4000:])


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    if list(NAMES) != ["email", "name", "metadata"] or len(migrations(ROOT / "migrations")) > 4:
        pytest.skip(
            "this project has fields or migrations of its own, and the blocks fit Gatehouse as it is"
        )
    steps = BLOCK.findall(TUTORIAL.read_text())
    made = [
        name for name, block in steps if (ROOT / name).exists() and added(block) in text_of(name)
    ]
    if made:
        pytest.skip("this project has done some of it already")
    folder = extended(tmp_path)
    migrating = [
        "operating/test_migrations.py",
        "operating/test_migration_locks.py",
        "operating/test_deploy.py::test_the_way_back_to_1_0_0_undoes_all_migrations_but_its_own",
        "faults/test_troubleshooting.py::test_what_pw_migrate_says",
    ]
    assert_pass(folder, ["users", *migrating, "operating/test_settings.py"])
    pages = [
        "test_docs.py::test_every_variable_is_in_the_configuration_and_nothing_else_is",
        "test_docs.py::test_every_variable_is_in_the_example_with_its_default_and_nothing_else_is",
        "test_docs.py::test_every_variable_of_the_example_has_a_line_of_meaning",
        "test_docs.py::test_every_route_is_documented_and_every_documented_route_exists",
        "test_openapi.py",
        "test_configuration.py",
    ]
    assert_pass(folder, [f"house/{name}" for name in pages])
    for command in (["ruff", "check"], ["ruff", "format", "--check"]):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                *command,
                "app.py",
                "models.py",
                "settings.py",
                "services",
                "migrations",
            ],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout
