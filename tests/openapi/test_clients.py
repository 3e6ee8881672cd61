"""Linters find nothing in docs/openapi.yaml, and clients made of it can do every call.

`make openapi` installs what they need into .venv-openapi, and runs this.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, Databases, Service

HERE = Path(__file__).parent
DOCUMENT = ROOT / "docs" / "openapi.yaml"
TOOLS = ROOT / ".venv-openapi"
TOKEN = "openapi-token"

SAID = [
    *(201, "Ann", 409, "urn:gatehouse:email-taken"),
    *(201, "bob@example.com", 200, "Robert", 412, "Precondition failed"),
    *(200, "pro", 200, 1, 2, 200, True, 200, 4, 204),
    *("up", "ok", "ok", True),
]


def run(*command: Any, cwd: Path) -> str:
    """What a tool prints; AssertionError with that where it fails."""
    path = f"{TOOLS}/node_modules/.bin:{TOOLS}/bin:{os.environ['PATH']}"
    environ = {"PATH": path, "HOME": str(cwd), "REDOCLY_TELEMETRY": "off"}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def guarded(databases: Databases) -> Iterator[Service]:
    with Service(POSTGRES_URI=databases.create(), USERS_TOKEN=TOKEN) as service:
        yield service


def test_redocly_finds_nothing(tmp_path: Path) -> None:
    said = run("redocly", "lint", DOCUMENT, cwd=tmp_path)
    assert "Your API description is valid" in said and "warning" not in said.replace(
        "Deprecation warning", ""
    )


def test_spectral_finds_nothing(tmp_path: Path) -> None:
    rules = HERE / "spectral.yaml"
    run("spectral", "lint", "--fail-severity=hint", "-r", rules, DOCUMENT, cwd=tmp_path)


def test_a_client_in_strict_typescript_can_do_every_call(guarded: Service, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(TOOLS / "node_modules")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(HERE / "calls.ts", tmp_path)
    run("openapi-typescript", DOCUMENT, "-o", "gatehouse.d.ts", cwd=tmp_path)
    options = ["--strict", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom"]
    run("tsc", *options, "calls.ts", cwd=tmp_path)
    assert json.loads(run("node", "calls.js", guarded.url, TOKEN, cwd=tmp_path)) == SAID


def test_a_client_in_python_can_do_every_call(guarded: Service, tmp_path: Path) -> None:
    where = tmp_path / "gatehouse_client"
    command = ["openapi-python-client", "generate", "--path", DOCUMENT, "--meta", "none"]
    said = run(*command, "--output-path", where, cwd=tmp_path)
    # Of all types of bodies it leaves out those of imports, which its own httpx client can send.
    left_out = set(re.findall(r"Unsupported content type (\S+)", said))
    assert left_out <= {"text/csv", "application/x-ndjson"}, said
    warned = set(re.findall(r"WARNING parsing (.*)", said))
    assert warned <= {"POST /users within users."}, said
    shutil.copy(HERE / "calls.py", tmp_path)
    assert json.loads(run("python", "calls.py", guarded.url, TOKEN, cwd=tmp_path)) == SAID
