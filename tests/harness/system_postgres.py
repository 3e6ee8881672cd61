"""The system's own PostgreSQL, for what the embedded one is built without: ICU and pg_trgm."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.harness.postgres import Databases

# Debian's, newest first; elsewhere what is on the PATH.
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
INITDB = str(PROGRAMS[0]) if PROGRAMS else shutil.which("initdb")


@contextlib.contextmanager
def system_postgres() -> Iterator[Databases]:
    """A server of its own, over a Unix socket. As root it runs as the user `postgres`."""
    assert INITDB, "no PostgreSQL is installed on this system"
    programs = Path(INITDB).parent
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="gatehouse-system-pg-") as folder:
        if user:
            shutil.chown(folder, user)
        data = f"{folder}/data"

        def run(program: str, *arguments: str) -> None:
            command = [str(programs / program), "-D", data, *arguments]
            subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)

        run("initdb", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8", "-N")
        options = f"-c listen_addresses='' -c fsync=off -k {folder}"
        run("pg_ctl", "start", "-w", "-l", f"{folder}/log", "-o", options)
        try:
            yield Databases(f"postgresql://postgres:@/postgres?host={folder}")
        finally:
            run("pg_ctl", "stop", "-m", "immediate")
