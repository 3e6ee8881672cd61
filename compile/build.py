"""Compiles what each request passes, with mypyc: the last step of `make install`.

    .venv/bin/python compile/build.py [again]

mypyc makes C of typed Python, and a C compiler makes modules of that. Python imports them instead
of the sources; compile/finder.py says when. They go into the virtual environment that this runs in.
The tools are fetched, and removed afterwards. If it cannot be done, because there is no C compiler
or no network, Gatehouse runs from its sources: it answers the same, and uses more CPU time.
After a failure nothing is tried before something changes, unless it is asked for with `again`, as
`make install` does. See docs/decisions/0011-compiled.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import py_compile
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

from finder import BUILT, LIBRARY, SOURCES, WHOLE, differing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# What each request passes, as far as it is in these folders and costs much. Not app.py: teams edit
# it. Not server/server.py: Python handles a signal only between two of its own instructions, and a
# compiled loop has none. Not problems.py: mypyc cannot compile several names that a class sets in
# one assignment. Not server/connector.py, which makes new connections: mypyc drops the cause of
# `raise ... from`. Not server/wsgi.py and server/inbox.py: mypyc crashes on subclasses of
# libraries' classes. Not postgres/: what it compiles of peewee and psycopg2 is checked against no
# types, so that an int that Python takes for a bool is a TypeError, and it saved a fortieth only.
MODULES = (
    "metrics.py",
    "server/client.py",
    "server/desk.py",
    "server/exchange.py",
    "server/jobs.py",
    "server/lanes.py",
    "server/logs.py",
    "server/loop.py",
    "server/stream.py",
    "server/tunnel.py",
    "server/upstream.py",
    "services/proxy.py",
    "wire/answer.py",
    "wire/chunks.py",
    "wire/environ.py",
    "wire/headers.py",
    "wire/ids.py",
    "wire/request.py",
    "wire/websocket.py",
)
# Compiled code relies on the types in these files too.
NEIGHBOURS = ("problems.py", *(f"{room}/*.py" for room in ("server", "wire")))
PACKAGE = "gatehouse_compiled"
# What was compiled, and by what. As long as that is the same, nothing is done.
MADE = "made.sha256"
FAILED = """\
Gatehouse was not compiled, for the reason above. It runs from its sources: it answers the same, and
uses more CPU time. To try again: make install"""
KEPT = """\
What was compiled before fits, and is used. It was not compiled again, for the reason above."""
# Python runs this line at each start.
START = f"import {PACKAGE}; {PACKAGE}.install()\n"
WHERE_TO_GET = """\
For the Python of Debian and Ubuntu the packages are gcc and python3-dev, for that of RHEL gcc and
python3.11-devel."""


def main(again: bool) -> int:
    """Compile, if that has not been done. Returns the exit code."""
    if sys.platform != "linux":  # mypy would report calls that only Linux has as errors.
        return 0
    found = {path for pattern in NEIGHBOURS for path in ROOT.glob(pattern)}
    paths = {*found, *(ROOT / path for path in MODULES)}
    tools = [HERE / name for name in ("build.py", "finder.py", "requirements.txt")]
    tools += [ROOT / "pyproject.toml", ROOT / "requirements.txt"]
    packages = Path(sysconfig.get_path("platlib"))
    package, failed = packages / PACKAGE, packages / f"{PACKAGE}.failed"
    sources = made = ""
    try:
        sources, of_tools = sums(paths, ROOT), "".join(f"{digest(path)}\n" for path in tools)
        made = sources + of_tools
        with alone(packages):
            started = read(package.with_suffix(".pth")) == START
            if read(package / MADE) == made and started and (not again or loads(package)):
                make_readable(package.with_suffix(".pth"), package)
                return 0
            if read(failed) == made and not again:
                print("Not compiled, as before. To try again: make install")
                return 0
            print(
                "Compiling. This takes half a minute, or minutes on a busy machine ...", flush=True
            )
            # It is made in site-packages: a file system for temporary files may forbid to run
            # what is there.
            with tempfile.TemporaryDirectory(prefix=f".{PACKAGE}-", dir=packages) as folder:
                new, start = Path(folder, PACKAGE), Path(folder, "start")
                compiled(new)
                (new / SOURCES).write_text(sources)
                shutil.copy(HERE / "finder.py", new / "__init__.py")
                files = [path for path in new.rglob("*") if path.is_file()]
                (new / BUILT).write_text(sums(files, new))
                (new / MADE).write_text(made)
                py_compile.compile(str(new / "__init__.py"))
                start.write_text(START)
                make_readable(start, new)
                # A process that runs keeps what it has loaded.
                if package.exists():
                    package.rename(Path(folder, "old"))
                new.rename(package)
                start.rename(package.with_suffix(".pth"))
            failed.unlink(missing_ok=True)
            print("Compiled.")
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "output", None) or str(error)
        lines = [line[:200] for line in output.splitlines()[-15:]]
        kept = False
        if made:  # Otherwise a source cannot be read, and nobody knows what fits.
            with contextlib.suppress(OSError), alone(packages):
                kept = read(package / SOURCES) == sources and loads(package)
                # What was compiled of other sources is of no use, and each start would say so.
                if not kept:
                    package.with_suffix(".pth").unlink(missing_ok=True)
                    shutil.rmtree(package, ignore_errors=True)
                failed.write_text(made)
        print(*lines, KEPT if kept else FAILED, sep="\n", file=sys.stderr)
    return 0


@contextlib.contextmanager
def alone(packages: Path) -> Iterator[None]:
    """Waits for another build, and has others wait. Removes what one that was killed has left."""
    descriptor = os.open(packages, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for left in packages.glob(f".{PACKAGE}-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def loads(package: Path) -> bool:
    """Whether what was compiled is there, as it was built, and can be loaded."""
    library = package / (LIBRARY + str(sysconfig.get_config_var("EXT_SUFFIX")))
    load = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r})"]
    try:
        whole = differing(package / BUILT, str(package)) is None
    except (OSError, ValueError):
        return False
    found = read(package.with_suffix(".pth")) == START
    return whole and found and subprocess.run(load, capture_output=True).returncode == 0


def sums(paths: Iterable[Path], root: Path) -> str:
    """The digests of files, as `finder.differing` reads them."""
    lines = (f"{digest(path)}  {path.relative_to(root)}\n" for path in sorted(paths))
    return "".join(lines) + WHOLE


def make_readable(*paths: Path) -> None:
    """Let whoever may read site-packages read these, whatever the umask is: the service seldom runs
    as the user who installed it."""
    mode = Path(sysconfig.get_path("platlib")).stat().st_mode & 0o777
    for path in (one for given in paths for one in (given, *given.rglob("*"))):
        wanted = mode if path.is_dir() else mode & 0o666
        if path.stat().st_mode & 0o777 != wanted:
            with contextlib.suppress(PermissionError):  # Another user's; he has to do it.
                path.chmod(wanted)


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def read(path: Path) -> str | None:
    return path.read_text(errors="replace") if path.is_file() else None


def compiled(package: Path) -> None:
    """Fetch the tools, and make the new package in a process that has them. Raises OSError or
    CalledProcessError."""
    # setuptools looks for it in the same places.
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(compiler) is None:
        raise OSError(f"There is no C compiler: {compiler}. {WHERE_TO_GET}")
    if not headers.is_file():
        raise OSError(f"Python's headers are missing: {headers}. {WHERE_TO_GET}")
    tools = package.parent / "tools"
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1")
    fetched = ("--no-deps", "--target", str(tools), "-r", str(HERE / "requirements.txt"))
    for arguments in (
        (*pip, *fetched),
        (__file__, "into", str(package)),
    ):
        subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(tools)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )


def compile_into(package: Path) -> None:
    """Compile the modules, with the tools that this process has."""
    from mypyc.build import mypycify
    from setuptools import setup

    extensions = mypycify(
        # Without a cache: another mypy may have left one.
        ["--config-file=pyproject.toml", "--cache-dir=/dev/null", *MODULES],
        opt_level="2",
        debug_level="0",
        target_dir=str(package.parent / "c"),
        group_name=LIBRARY.removesuffix("__mypyc"),
    )
    for extension in extensions:
        # What no other library can see and replace needs no table of addresses: the library is
        # loaded sooner, and a forwarded request takes 1.7 % fewer instructions.
        extension.extra_compile_args.append("-fvisibility=hidden")
    where = (f"--build-lib={package}", f"--build-temp={package.parent / 'o'}")
    setup(
        name=PACKAGE,
        packages=[],
        py_modules=[],
        ext_modules=extensions,
        script_args=["build_ext", *where],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["into"]:
        compile_into(Path(sys.argv[2]))
    else:
        try:
            sys.exit(main(again=sys.argv[1:] == ["again"]))
        except KeyboardInterrupt:  # Python would show where it was.
            sys.exit(130)
