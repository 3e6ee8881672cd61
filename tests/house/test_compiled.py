"""What is compiled runs instead of its sources, and never after one of them was changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, ScriptedUpstream, Service, ok
from tests.harness.service import copied

PACKAGES = Path(sysconfig.get_path("platlib"))
PACKAGE = PACKAGES / "gatehouse_compiled"
LIBRARY = "gatehouse__mypyc" + sysconfig.get_config_var("EXT_SUFFIX")
WHERE = "import server.loop as one; print(one.__file__)"

compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
headers = Path(sysconfig.get_path("include"), "Python.h")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(compiler) is None or not headers.is_file(),
    reason="nothing can be compiled here",
)


@pytest.fixture(autouse=True, scope="module")
def compiled_as_they_are() -> None:
    try:
        used: Any = import_module("gatehouse_compiled")
        changed = used.differing(PACKAGE / "sources.sha256", str(ROOT))
    except (ImportError, OSError, ValueError) as error:
        changed = str(error)
    if changed:
        pytest.fail(f"To run these tests, `make compiled` first: {changed} is not as it was then.")


def project(folder: Path) -> Path:
    """A copy of what runs and of what compiles it."""
    shutil.copytree(ROOT / "compile", folder / "compile")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "requirements.txt", folder)
    return copied(folder)


def run(
    *arguments: str, folder: Path, python: str = sys.executable, umask: int = -1, **environ: str
) -> str:
    """What Python prints; it has to succeed."""
    done = subprocess.run(
        [python, *arguments],
        cwd=folder,
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        umask=umask,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_what_the_tests_start_runs_compiled(upstream: ScriptedUpstream) -> None:
    upstream.script(ok)
    with Service(UPSTREAM_URL=upstream.url) as service:
        assert "(compiled)" in service.log.splitlines()[0]
        assert service.call("GET", "/").body == b"ok"


def test_it_runs_from_source_if_that_is_asked_for(upstream: ScriptedUpstream) -> None:
    upstream.script(ok)
    with Service(UPSTREAM_URL=upstream.url, GATEHOUSE_INTERPRETED=1) as service:
        assert "(from source)" in service.log.splitlines()[0]
        assert service.call("GET", "/").body == b"ok"


@pytest.mark.parametrize(
    "path", ["services/proxy.py", "problems.py", "server/jobs.py", "wire/media_types.py"]
)
def test_after_a_change_all_runs_from_source(
    tmp_path: Path, upstream: ScriptedUpstream, path: str
) -> None:
    """Also where what was changed is not compiled itself: what is compiled relies on it."""
    upstream.script(ok)
    folder = copied(tmp_path)
    for changed in (path, "services/proxy.py"):
        text = (folder / changed).read_text().replace('f"Via: {via}', 'f"X-Changed: {via}')
        (folder / changed).write_text(text + "# Changed.\n")
    with Service(folder=folder, UPSTREAM_URL=upstream.url) as service:
        assert service.call("GET", "/").body == b"ok"
        said, first = service.log.splitlines()[:2]
    assert ".py was changed after the last make install: Gatehouse runs from source." in said
    assert "(from source)" in first
    assert upstream.seen[-1].get("X-Changed") is not None


def test_python_looks_for_what_is_compiled_once() -> None:
    """It reads a .pth file twice in a virtual environment, and then looked twice."""
    count = "print(sum(type(one).__module__ == 'gatehouse_compiled' for one in sys.meta_path))"
    assert run("-c", "import sys; " + count, folder=ROOT) == "1\n"


def test_a_missing_source_is_a_change(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "server" / "tunnel.py").unlink()
    assert run("-c", WHERE, folder=folder).strip() == str(folder / "server" / "loop.py")


def test_a_source_that_cannot_be_read_is_no_change(tmp_path: Path) -> None:
    """It was said to be changed, and what to do about that did not help."""
    used: Any = import_module("gatehouse_compiled")
    folder = copied(tmp_path)
    (folder / "server" / "tunnel.py").unlink()
    (folder / "server" / "tunnel.py").mkdir()  # Root may read any file.
    with pytest.raises(IsADirectoryError):
        used.differing(PACKAGE / "sources.sha256", str(folder))


def test_a_library_that_cannot_be_loaded_is_not_used(tmp_path: Path) -> None:
    """As it is after .venv was copied to a machine with another C library."""
    shutil.copytree(PACKAGE, tmp_path / "packages" / PACKAGE.name)
    (tmp_path / "packages" / PACKAGE.name / LIBRARY).write_bytes(b"no library")
    assert "what was compiled cannot be loaded: " in unusable(tmp_path)


def unusable(tmp_path: Path) -> str:
    """Why a project runs from source with the package that lies in this folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    copied(folder)
    use = "import gatehouse_compiled as used; used.install(); "
    told = run(
        "-S",
        "-c",
        use + WHERE + "; print(used.finder.unusable)",
        folder=folder,
        PYTHONPATH=f"{tmp_path / 'packages'}:{sysconfig.get_path('purelib')}",
    )
    assert told.startswith(str(folder / "server" / "loop.py"))
    return told


@pytest.mark.parametrize("name", ["sources.sha256", "built.sha256"])
@pytest.mark.parametrize("left", [b"", b"no digest\n# These are all.\n", b"\xff", None])
def test_without_all_digests_it_runs_from_source(
    tmp_path: Path, name: str, left: bytes | None
) -> None:
    """A machine that loses its power may lose what was written last."""
    shutil.copytree(PACKAGE, tmp_path / "packages" / PACKAGE.name)
    sums = tmp_path / "packages" / PACKAGE.name / name
    sums.write_bytes(sums.read_bytes()[:-100] if left is None else left)
    assert "what was compiled cannot be loaded: " in unusable(tmp_path)


def test_a_library_that_was_damaged_is_not_loaded(tmp_path: Path) -> None:
    """Python ended with a bus error or a segmentation fault."""
    shutil.copytree(PACKAGE, tmp_path / "packages" / PACKAGE.name)
    library = tmp_path / "packages" / PACKAGE.name / LIBRARY
    whole = library.read_bytes()
    middle = len(whole) // 2
    library.write_bytes(whole[:middle] + bytes(4000) + whole[middle + 4000 :])
    assert f"{LIBRARY} is not as it was built" in unusable(tmp_path)


def test_sha256sum_agrees_with_what_was_compiled() -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not installed")
    for folder, name in ((ROOT, "sources.sha256"), (PACKAGE, "built.sha256")):
        sums = ["sha256sum", "--check", "--strict", "--quiet", str(PACKAGE / name)]
        subprocess.run(sums, cwd=folder, check=True)


@pytest.mark.slow
def test_bytes_mean_the_same_compiled() -> None:
    """tests/wire once more: splits of every message at every byte."""
    run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/wire", folder=ROOT, TEST_COMPILED="1"
    )


@pytest.mark.slow
def test_what_cannot_be_compiled_is_said_once_and_runs_from_source(tmp_path: Path) -> None:
    """In a virtual environment of its own."""
    environment = tmp_path / "venv"
    run("-m", "venv", str(environment), folder=tmp_path)
    folder = tmp_path / "project"
    folder.mkdir()
    project(folder)
    python = str(environment / "bin" / "python")
    packages = Path(
        sysconfig.get_path("platlib", vars={"base": environment, "platbase": environment})
    )

    def make(*arguments: str, umask: int = -1, **environ: str) -> str:
        return run(
            "compile/build.py", *arguments, folder=folder, python=python, umask=umask, **environ
        )

    # What the compiled modules import is taken from the environment of the tests.
    (packages / "theirs.pth").write_text(sysconfig.get_path("purelib"))
    told = make(CC="no-such-compiler")
    assert "no-such-compiler" in told and "Gatehouse was not compiled, " in told
    assert make() == "Not compiled, as before. To try again: make install\n"
    compiled = packages / "gatehouse_compiled"
    left = packages / ".gatehouse_compiled-of-one-that-was-killed"
    left.mkdir()
    # Hardened servers have this umask for root.
    assert make("again", umask=0o077).splitlines()[1:] == ["Compiled."]
    assert not left.exists()
    made = [packages / "gatehouse_compiled.pth", compiled, *compiled.rglob("*")]
    assert compiled / LIBRARY in made
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {0o755}
    assert {path.stat().st_mode & 0o777 for path in made if not path.is_dir()} == {0o644}
    kept = shutil.copytree(compiled, tmp_path / "kept")

    def restore() -> None:
        shutil.rmtree(compiled, ignore_errors=True)
        shutil.copytree(kept, compiled)
        made[0].write_text("import gatehouse_compiled; gatehouse_compiled.install()\n")
        (packages / "gatehouse_compiled.failed").unlink(missing_ok=True)

    with (compiled / LIBRARY).open("r+b") as library:
        library.seek(500_000)
        library.write(bytes(100_000))  # It can still be loaded, and crashes.
    assert make() == ""  # To look at it would take time at each start.
    assert "Gatehouse was not compiled, " in make("again", CC="no-such-compiler")
    assert not compiled.exists()
    restore()
    made[0].write_text("")  # as a machine that loses its power may leave it
    assert "Gatehouse was not compiled, " in make(CC="no-such-compiler")
    assert not compiled.exists()
    restore()
    (folder / "wire" / "ids.py").rename(folder / "ids.py")
    assert "ids.py" in make("again") and compiled.exists()  # Nobody knows whether it fits.
    (folder / "ids.py").rename(folder / "wire" / "ids.py")
    made[0].chmod(0o600)
    assert make() == make("again") == ""
    assert made[0].stat().st_mode & 0o777 == 0o644
    with (folder / "pyproject.toml").open("a") as settings:
        settings.write("# Changed.\n")
    assert "What was compiled before fits, and is used." in make(CC="no-such-compiler")
    assert compiled.exists()  # It is still of the same sources.
    with (folder / "wire" / "ids.py").open("a") as source:
        source.write("# Changed.\n")
    assert "Gatehouse was not compiled, " in make("again", CC="no-such-compiler")
    assert not compiled.exists() and not (packages / "gatehouse_compiled.pth").exists()
    assert not list(packages.glob(".gatehouse_compiled-*"))
