"""Compiles what each forwarded request passes, with mypyc: the last step of `make install`.

    .venv/bin/python compile/build.py [again]

mypyc makes C of typed Python, and a C compiler makes modules of that. Python imports them instead
of the sources; compile/finder.py says when. They go into the virtual environment that this runs in.
The tools are fetched, and thrown away afterwards. If it cannot be done, because there is no C
compiler or no network, Gatehouse runs from its sources: it answers the same, and uses more of the
processor. A failure is remembered, and tried `again` only on demand. See
docs/decisions/0011-compiled.md.
"""

from __future__ import annotations

import os
import py_compile
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from hashlib import sha256
from pathlib import Path

from finder import LIBRARY, SOURCES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# What each forwarded request passes, with these exceptions. app.py is where a team changes
# something. server/server.py: Python handles a signal only between two of its own instructions, and
# a compiled loop has none. problems.py: mypyc cannot compile several names that a class sets in one
# assignment. server/connector.py, which makes new connections: mypyc loses what an exception is
# raised `from`. server/jobs.py: mypyc crashes on subclasses of waitress's task.
MODULES = (
    "metrics.py",
    "server/client.py",
    "server/exchange.py",
    "server/logs.py",
    "server/loop.py",
    "server/stream.py",
    "server/tunnel.py",
    "server/upstream.py",
    "services/proxy.py",
    "wire/answer.py",
    "wire/chunks.py",
    "wire/headers.py",
    "wire/ids.py",
    "wire/request.py",
    "wire/websocket.py",
)
# Compiled modules are made for these as they are too: for the types of what they call.
NEIGHBOURS = ("problems.py", *(f"{room}/*.py" for room in ("server", "wire")))
PACKAGE = "gatehouse_compiled"
# What was compiled, and by what. As long as that is the same, nothing is done.
MADE = "made.sha256"
FAILED = """\
Gatehouse was not compiled. It runs from its sources: it answers the same, and uses more of the
processor. Most often a C compiler or Python's headers are missing (in Debian and Ubuntu the
packages gcc and python3-dev), or there is no network. To try again: make install"""


def main(again: bool) -> int:
    """Compile, if that has not been done. Returns the exit code."""
    if sys.platform != "linux":  # What only Linux has would be an error in the types.
        return 0
    packages = Path(sysconfig.get_path("platlib"))
    found = {path for pattern in NEIGHBOURS for path in ROOT.glob(pattern)}
    paths = sorted({*found, *(ROOT / path for path in MODULES)})
    sources = "".join(f"{digest(path)}  {path.relative_to(ROOT)}\n" for path in paths)
    tools = [HERE / name for name in ("build.py", "finder.py", "requirements.txt")]
    made = sources + "".join(f"{digest(path)}\n" for path in [*tools, ROOT / "pyproject.toml"])
    failed = packages / f"{PACKAGE}.failed"
    if read(packages / PACKAGE / MADE) == made or (read(failed) == made and not again):
        return 0
    print("Compiling ...", flush=True)
    # It is made beside the other packages: a file system for temporary files may forbid to run what
    # is there.
    try:
        with tempfile.TemporaryDirectory(prefix=f".{PACKAGE}-", dir=packages) as folder:
            new = Path(folder, PACKAGE)
            compiled(new)
            (new / SOURCES).write_text(sources)
            (new / MADE).write_text(made)
            shutil.copy(HERE / "finder.py", new / "__init__.py")
            py_compile.compile(str(new / "__init__.py"))
            remove(packages)
            new.rename(packages / PACKAGE)
            line = f"import {PACKAGE}; {PACKAGE}.install()\n"
            (packages / f"{PACKAGE}.pth").write_text(line)
        failed.unlink(missing_ok=True)
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "output", None) or str(error)
        print(*output.splitlines()[-5:], FAILED, sep="\n", file=sys.stderr)
        remove(packages)
        failed.write_text(made)
    return 0


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def remove(packages: Path) -> None:
    """Remove what was compiled before. A process that runs keeps what it has loaded."""
    # First the line that has Python look for the rest.
    (packages / f"{PACKAGE}.pth").unlink(missing_ok=True)
    if (packages / PACKAGE).exists():
        with tempfile.TemporaryDirectory(prefix=f".{PACKAGE}-", dir=packages) as folder:
            (packages / PACKAGE).rename(Path(folder, PACKAGE))


def compiled(package: Path) -> None:
    """Fetch the tools into the folder of the new package, and compile it in a process that has
    them."""
    tools = package.parent / "tools"
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
    for arguments in (
        (*pip, "--target", str(tools), "-r", str(HERE / "requirements.txt")),
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
        sys.exit(main(again=sys.argv[1:] == ["again"]))
