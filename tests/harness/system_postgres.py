"""The system's own PostgreSQL, for what the embedded one is built without: ICU and pg_trgm."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.harness.postgres import Databases, running

# Debian's, newest first; elsewhere what is on the PATH.
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
INITDB = str(PROGRAMS[0]) if PROGRAMS else shutil.which("initdb")


@contextlib.contextmanager
def system_postgres() -> Iterator[Databases]:
    """A server of its own, over a Unix socket. As root it runs as the user `postgres`."""
    assert INITDB, "no PostgreSQL is installed on this system"
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="gatehouse-system-pg-"))
    if user:
        shutil.chown(folder, user)
    data = folder / "data"
    command = [INITDB, "-D", str(data), "-A", "trust", "-U", "postgres", "-E", "UTF8"]
    command += ["--locale=C.UTF-8", "-N"]
    subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with running(Path(INITDB).parent, data, user) as databases:
        yield databases
