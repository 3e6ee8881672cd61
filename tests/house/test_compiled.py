"""What is compiled runs in place of its source, and never when that is another one by now."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.harness import ROOT, ScriptedUpstream, Service, ok
from tests.harness.service import copied

BUILD = ROOT / "compile" / "build.py"
PACKAGE = Path(sysconfig.get_path("platlib")) / "gatehouse_compiled"

compiled = pytest.mark.skipif(
    not (PACKAGE / "sources.sha256").is_file(),
    reason="there is no C compiler, and nothing compiled",
)


def first_line(service: Service) -> str:
    return service.log.splitlines()[0]


@compiled
def test_what_the_tests_start_runs_compiled(upstream: ScriptedUpstream) -> None:
    upstream.script(ok)
    with Service(UPSTREAM_URL=upstream.url) as service:
        assert "(compiled)" in first_line(service)
        assert service.call("GET", "/").body == b"ok"


@compiled
def test_it_runs_from_source_if_that_is_asked_for(upstream: ScriptedUpstream) -> None:
    upstream.script(ok)
    with Service(UPSTREAM_URL=upstream.url, GATEHOUSE_INTERPRETED=1) as service:
        assert "(from source)" in first_line(service)
        assert service.call("GET", "/").body == b"ok"


@compiled
def test_a_source_that_was_changed_is_what_runs(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """And so are all others: what is compiled knows the others as they were."""
    upstream.script(ok)
    folder = copied(tmp_path)
    path = folder / "services" / "proxy.py"
    path.write_text(path.read_text().replace('f"Via: {via}', 'f"X-Changed: {via}'))
    with Service(folder=folder, UPSTREAM_URL=upstream.url) as service:
        assert service.call("GET", "/").body == b"ok"
        said, first = service.log.splitlines()[:2]
    assert "services/proxy.py is not as it was when it was compiled" in said
    assert "(from source)" in first
    assert upstream.seen[-1].get("X-Changed") is not None


@compiled
def test_the_finder_takes_a_missing_source_for_a_changed_one(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "server" / "tunnel.py").unlink()
    asked = "import server.loop as one; print(one.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(folder / "server" / "loop.py")


@compiled
def test_sha256sum_agrees_with_what_was_compiled() -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not installed")
    subprocess.run(
        ["sha256sum", "--check", "--quiet", PACKAGE / "sources.sha256"], cwd=ROOT, check=True
    )


@pytest.mark.slow
def test_without_a_compiler_it_says_so_and_installs_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "gatehouse"
    folder.mkdir()
    shutil.copytree(ROOT / "compile", folder / "compile")
    shutil.copy(ROOT / "pyproject.toml", folder)
    copied(folder)
    with (folder / "wire" / "ids.py").open("a") as source:
        source.write("# Changed.\n")
    before = sorted(path.stat().st_mtime_ns for path in PACKAGE.rglob("*"))
    done = subprocess.run(
        [sys.executable, "compile/build.py"],
        cwd=folder,
        env=os.environ | {"CC": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0
    assert "no-such-compiler" in done.stderr and "Gatehouse was not compiled." in done.stderr
    assert before == sorted(path.stat().st_mtime_ns for path in PACKAGE.rglob("*"))
