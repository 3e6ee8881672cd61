"""Compiles what each forwarded request passes, with mypyc: the last step of `make install`.

    .venv/bin/python compile/build.py

mypyc makes C of typed Python, and a C compiler makes modules of that, which Python imports in place
of the sources (compile/finder.py says when). They go into the virtual environment that this runs
in; the tools that are needed are fetched, and thrown away afterwards. Where it cannot be done, for
want of a C compiler, Gatehouse runs from its sources: it does the same, and needs more of the
processor for it. See docs/decisions/0011-compiled.md.
"""

from __future__ import annotations

import os
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
# What each forwarded request passes, but for four modules on its way. server/server.py: Python
# handles a signal only between two of its own instructions. server/connector.py: mypyc loses what
# an exception is raised `from`. metrics.py: an int that is given as a float becomes one, and is
# shown as one. problems.py: mypyc cannot compile names that a class declares without a value.
MODULES = (
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
PACKAGE = "gatehouse_compiled"
# What was compiled, and how: nothing is done where that is still the same.
MADE = "made.sha256"
FAILED = """\
Gatehouse was not compiled. It runs from its sources: it does the same, and needs about twice as
much of the processor for a forwarded request. Perhaps a C compiler or Python's headers are missing
(in Debian and Ubuntu the packages gcc and python3-dev). Install them, then: make install"""


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """Compile, if that has not been done. Returns the exit code."""
    package = Path(sysconfig.get_path("platlib")) / PACKAGE
    sources = "".join(f"{digest(ROOT / path)}  {path}\n" for path in MODULES)
    made = sources + "".join(f"{digest(path)}  {path.name}\n" for path in sorted(HERE.glob("*.*")))
    if (package / MADE).is_file() and (package / MADE).read_text() == made:
        return 0
    print("Compiling ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="gatehouse-compile-") as folder:
        tools, new = Path(folder, "tools"), Path(folder, PACKAGE)
        environ = os.environ | {"PYTHONPATH": str(tools)}
        fetch = (
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--target",
            tools,
        )
        for arguments in ((*fetch, "-r", HERE / "requirements.txt"), (__file__, folder)):
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                print(*done.stdout.splitlines()[-5:], FAILED, sep="\n", file=sys.stderr)
                return 0
        (new / SOURCES).write_text(sources)
        (new / MADE).write_text(made)
        shutil.copy(HERE / "finder.py", new / "__init__.py")
        # What runs keeps what it has loaded, although its files are gone.
        shutil.rmtree(package, ignore_errors=True)
        shutil.move(new, package)
    package.with_suffix(".pth").write_text(f"import {PACKAGE}; {PACKAGE}.install()\n")
    return 0


def compile_into(folder: str) -> None:
    """Compile the modules into the package in `folder`, with the tools that are there."""
    from mypyc.build import mypycify
    from setuptools import setup

    extensions = mypycify(
        # Without a cache: another mypy may have left one.
        ["--config-file=pyproject.toml", "--cache-dir=/dev/null", *MODULES],
        opt_level="2",
        debug_level="0",
        target_dir=folder,
        group_name=LIBRARY.removesuffix("__mypyc"),
    )
    setup(
        name=PACKAGE,
        packages=[],
        py_modules=[],
        ext_modules=extensions,
        script_args=["build_ext", f"--build-lib={folder}/{PACKAGE}", f"--build-temp={folder}"],
    )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(main())
    compile_into(sys.argv[1])
