"""Databases on an embedded PostgreSQL, and pw_migrate as a user runs it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2

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
    """Databases on one embedded PostgreSQL server."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

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
        with self.admin() as cursor:
            cursor.execute(f"CREATE DATABASE {name} {options}")
        uri = self.uri.replace("/postgres?", f"/{name}?")
        assert uri != self.uri
        if migrated:
            done = pw_migrate("migrate", uri=uri)
            assert done.returncode == 0, done.stdout + done.stderr
        return uri
