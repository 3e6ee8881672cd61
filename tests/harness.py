"""Real parts for tests: a Gatehouse process, a scripted upstream, raw sockets, PostgreSQL.

Everything listens on 127.0.0.1 and is stopped by its process id.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2

ROOT = Path(__file__).resolve().parent.parent
# A closed port: connecting to it is refused at once.
DEAD_DATABASE = "postgresql://nobody@127.0.0.1:1/none"


def copied(folder: Path) -> Path:
    """`folder`, with a copy of all that runs: a `.env` in it is nobody else's."""
    for name in ("app.py", "dev.py", "demo.py", "models.py", "settings.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("services", "migrations"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@functools.cache
def checkout() -> Path:
    """The copy that the tests run, where a developer's own `.env` has no say."""
    folder = tempfile.TemporaryDirectory(prefix="gatehouse-checkout-")
    atexit.register(folder.cleanup)
    return copied(Path(folder.name))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float = 10, what: str = "condition") -> Any:
    """Poll until `condition()` is true and return its value; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        threading.Event().wait(0.01)


class Reply:
    """One parsed HTTP answer: `status`, `reason`, `headers` (pairs, as sent), `body`."""

    def __init__(self, head: bytes, body: bytes, complete: bool) -> None:
        lines = head.split(b"\r\n")
        self.status_line = lines[0]
        parts = lines[0].split(b" ", 2)
        self.status = int(parts[1])
        self.reason = parts[2].decode("latin-1") if len(parts) > 2 else ""
        self.headers: list[tuple[str, str]] = []
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            self.headers.append((name.decode("latin-1"), value.strip(b" \t").decode("latin-1")))
        self.body = body
        self.complete = complete

    def get(self, name: str) -> str | None:
        """The value of a header, its lines joined by a comma; None where it is absent."""
        values = self.all(name)
        return ", ".join(values) if values else None

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def json(self) -> Any:
        return json.loads(self.body)

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self.headers} {self.body[:300]!r} complete={self.complete}>"


class RawClient:
    """A client connection: sends bytes as they are given, parses answers strictly."""

    def __init__(self, port: int, timeout: float = 15) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.buffer = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ConnectionError:
            return False
        self.buffer += data
        return bool(data)

    def head(self) -> bytes:
        """Read up to the end of an answer's head; the body's first bytes stay in `buffer`."""
        while b"\r\n\r\n" not in self.buffer:
            if not self._more():
                raise EOFError(f"closed before an answer's head was whole: {self.buffer!r}")
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        return head

    def reply(self, method: str = "GET") -> Reply:
        """Read one whole answer (interim ones are skipped); `complete` is False where it was cut."""
        head = self.head()
        while head.split(b" ", 2)[1].startswith(b"1"):
            head = self.head()
        reply = Reply(head, b"", True)
        coding = reply.all("Transfer-Encoding")
        lengths = reply.all("Content-Length")
        if method == "HEAD" or reply.status in (204, 304):
            return reply
        if coding:
            assert coding == ["chunked"] and not lengths, reply
            body = b""
            while True:
                while b"\r\n" not in self.buffer:
                    if not self._more():
                        return Reply(head, body, False)
                line, _, self.buffer = self.buffer.partition(b"\r\n")
                size = int(line.split(b";")[0], 16)
                while len(self.buffer) < size + 2:
                    if not self._more():
                        return Reply(head, body + self.buffer[:size], False)
                piece, end = self.buffer[:size], self.buffer[size : size + 2]
                assert end == b"\r\n", end
                self.buffer = self.buffer[size + 2 :]
                if size == 0:
                    return Reply(head, body, True)
                body += piece
        if lengths:
            assert len(lengths) == 1, reply
            size = int(lengths[0])
            pieces, left = [self.buffer[:size]], size - len(self.buffer[:size])
            self.buffer = self.buffer[size:]
            while left and self._more():
                pieces.append(self.buffer[:left])
                self.buffer = self.buffer[left:]
                left -= len(pieces[-1])
            return Reply(head, b"".join(pieces), not left)
        while True:
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                body, self.buffer = self.buffer, b""
                return Reply(head, body, False)
            if not data:
                body, self.buffer = self.buffer, b""
                return Reply(head, body, True)
            self.buffer += data

    def closed(self, seconds: float = 5) -> bool:
        """Whether the other side closes within `seconds` without sending another byte."""
        self.sock.settimeout(seconds)
        try:
            return self.sock.recv(1) == b"" and not self.buffer
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def exchange(port: int, data: bytes, method: str = "GET", timeout: float = 15) -> Reply:
    """Send raw bytes on a new connection and read one answer."""
    with RawClient(port, timeout) as client:
        client.send(data)
        return client.reply(method)


def call(
    port: int,
    method: str,
    target: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    timeout: float = 15,
) -> Reply:
    """One request on a new connection; a body that is not bytes is sent as JSON."""
    lines = {"Host": f"127.0.0.1:{port}"}
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        lines["Content-Type"] = "application/json"
    if body is not None:
        lines["Content-Length"] = str(len(body))
    lines.update(headers or {})
    head = f"{method} {target} HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    return exchange(port, head.encode("latin-1") + (body or b""), method, timeout)


def message(first_line: bytes, *lines: bytes, body: bytes = b"") -> bytes:
    """An HTTP message, request or answer, of exactly these bytes."""
    return b"\r\n".join((first_line, *lines)) + b"\r\n\r\n" + body


def request(first_line: bytes = b"GET / HTTP/1.1", *lines: bytes, body: bytes = b"") -> bytes:
    """A request with a Host line before `lines`; no framing is added for `body`."""
    return message(first_line, b"Host: client.example", *lines, body=body)


def chunked(*pieces: bytes, trailer: bytes = b"") -> bytes:
    """A body in the chunked coding, a chunk for each piece (RFC 9112 section 7.1)."""
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return chunks + b"0\r\n" + trailer + b"\r\n"


def problem(reply: Reply, status: int, name: str) -> dict[str, Any]:
    """The problem document of an answer, checked for what RFC 9457 and every problem here have."""
    assert reply.status == status, reply
    assert reply.get("Content-Type") == "application/problem+json", reply
    document: dict[str, Any] = reply.json()
    assert document["type"] == f"urn:gatehouse:{name}", reply
    assert document["status"] == status, reply
    assert document["title"] and document["detail"], reply
    assert document["request_id"] == reply.get("X-Request-Id"), reply
    known = {"type", "title", "status", "detail", "request_id", "errors", "outcome"}
    assert set(document) <= known, reply
    return document


def invalid_fields(document: dict[str, Any]) -> list[str]:
    """The names in a problem's `errors`, sorted; each has a message."""
    assert all(set(error) == {"field", "message"} for error in document["errors"]), document
    assert all(error["message"] for error in document["errors"]), document
    return sorted(error["field"] for error in document["errors"])


class Seen:
    """One request as the upstream received it, byte for byte."""

    def __init__(self, head: bytes, body: bytes, connection: int) -> None:
        self.head = head
        self.body = body
        self.connection = connection  # number of the connection it came on, from 0
        lines = head.split(b"\r\n")
        self.request_line = lines[0]
        method, self.target, self.version = lines[0].split(b" ")
        self.method = method.decode()
        self.headers = [
            (
                line.partition(b":")[0].decode("latin-1"),
                line.partition(b":")[2].strip().decode("latin-1"),
            )
            for line in lines[1:]
        ]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def get(self, name: str) -> str | None:
        values = self.all(name)
        return ", ".join(values) if values else None

    def __repr__(self) -> str:
        return f"<Seen {self.head!r} {self.body[:200]!r}>"


Answer = Callable[[socket.socket, Seen], Any]


def ok(sock: socket.socket, seen: Seen) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def echo_at_once(sock: socket.socket, seen: Seen) -> bool:
    """An `early` that answers at once and sends back each piece of the body as it comes."""
    left = int(seen.get("Content-Length") or 0)
    sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: %d" % left))
    piece = seen.body
    while piece:
        sock.sendall(piece)
        left -= len(piece)
        piece = sock.recv(65536) if left else b""
    return False


class ScriptedUpstream:
    """An upstream over raw sockets: records each request, answers what the test scripts.

    `answer` is bytes to send after each request, or a function of (socket, Seen); a function
    that returns False, or raises OSError, has the connection closed. `early` is such a function
    too, called when a request's head is there and before its body is read. With `tls` it is an
    https one; the end of an answer is then no orderly end of TLS, unless the test makes one.
    """

    def __init__(self, answer: bytes | Answer = ok, tls: ssl.SSLContext | None = None) -> None:
        self.answer: bytes | Answer = answer
        self.early: Answer | None = None
        self.seen: list[Seen] = []
        self.connections = 0
        self.open: set[socket.socket] = set()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = int(self.listener.getsockname()[1])
        self.tls = tls
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = self.connections
            self.connections += 1
            self.open.add(sock)
            threading.Thread(target=self._serve, args=(sock, number), daemon=True).start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        buffer = b""
        try:
            if self.tls is not None:
                sock = self.tls.wrap_socket(sock, server_side=True)
                self.open.add(sock)
            while True:
                while b"\r\n\r\n" not in buffer:
                    data = sock.recv(65536)
                    if not data:
                        return
                    buffer += data
                head, _, buffer = buffer.partition(b"\r\n\r\n")
                seen = Seen(head, b"", number)
                seen.body = buffer  # what has come of it
                if self.early and self.early(sock, seen) is False:
                    return
                length = seen.get("Content-Length")
                assert not seen.all("Transfer-Encoding"), seen
                while length and len(buffer) < int(length):
                    data = sock.recv(65536)
                    if not data:
                        return
                    buffer += data
                size = int(length or 0)
                seen.body, buffer = buffer[:size], buffer[size:]
                self.seen.append(seen)
                if isinstance(self.answer, bytes):
                    sock.sendall(self.answer)
                elif self.answer(sock, seen) is False:
                    return
        except OSError:
            return
        finally:
            self.open.discard(sock)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def script(self, answer: bytes | Answer) -> None:
        """Set the answer and forget what was seen."""
        self.answer = answer
        self.early = None
        self.seen.clear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for sock in list(self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Service:
    """A Gatehouse process, `python app.py`, with settings from keyword arguments."""

    def __init__(self, **settings: Any) -> None:
        self.port = int(settings.setdefault("PORT", free_port()))
        environ = {
            key: value
            for key, value in os.environ.items()
            if key in ("PATH", "HOME", "LANG", "TMPDIR")
        }
        environ |= {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"}
        if workers := os.environ.get("TEST_WORKERS"):
            environ["WORKERS"] = workers
        environ |= {name: str(value) for name, value in settings.items()}
        self.environ = environ
        self._log = tempfile.NamedTemporaryFile(prefix="gatehouse-test-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=checkout(),
            env=environ,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(self._listening, 20, "the service to listen")
        except AssertionError:
            self.process.kill()
            raise AssertionError(f"the service did not start:\n{self.log}") from None

    def _listening(self) -> bool:
        assert self.process.poll() is None, f"exit {self.process.returncode}:\n{self.log}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """All that the process has written so far."""
        return Path(self._log.name).read_text(errors="replace")

    @property
    def access_log(self) -> list[dict[str, Any]]:
        """The whole lines of the access log so far, oldest first."""
        lines = self.log.split("\n")[:-1]
        return [json.loads(line) for line in lines if line.startswith("{")]

    def call(self, method: str, target: str, *args: Any, **kwargs: Any) -> Reply:
        return call(self.port, method, target, *args, **kwargs)

    def client(self, timeout: float = 15) -> RawClient:
        return RawClient(self.port, timeout)

    def exchange(self, data: bytes, method: str = "GET", timeout: float = 15) -> Reply:
        return exchange(self.port, data, method, timeout)

    def stop(self, seconds: float = 35) -> int:
        """SIGTERM, wait, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()


def forward(
    service: Service, upstream: ScriptedUpstream, data: bytes, answer: bytes | Answer = ok
) -> tuple[Seen, Reply]:
    """Send one raw request through the service; what the upstream saw of it, and the answer."""
    upstream.script(answer)
    reply = service.exchange(data, data.split(b" ", 1)[0].decode())
    [seen] = upstream.seen
    return seen, reply


def run_app(*args: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run `python app.py` to its end, for commands and refusals; `stdout` has both streams."""
    environ = {
        key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ
    }
    environ |= {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"}
    environ |= {name: str(value) for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "app.py", *args],
        cwd=checkout(),
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=30,
    )


def new_email() -> str:
    return f"{uuid.uuid4().hex}@example.com"


def create_user(service: Service, email: str | None = None, name: str = "Ann") -> Reply:
    """The 201 answer of a new user; the email is one that nobody has unless given."""
    reply = service.call("POST", "/users", {"email": email or new_email(), "name": name})
    assert reply.status == 201, reply
    return reply


def pw_migrate(*args: str, uri: str) -> subprocess.CompletedProcess[str]:
    """Run pw_migrate as a user would, from the project's root."""
    command = [str(Path(sys.executable).with_name("pw_migrate")), *args]
    return subprocess.run(
        command,
        cwd=checkout(),
        env={**os.environ, "POSTGRES_URI": uri},
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

    def create(self, *, migrated: bool = True) -> str:
        """A new database's URI, migrated unless told otherwise."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        with self.admin() as cursor:
            cursor.execute(f"CREATE DATABASE {name}")
        uri = self.uri.replace("/postgres?", f"/{name}?")
        assert uri != self.uri
        if migrated:
            done = pw_migrate("migrate", uri=uri)
            assert done.returncode == 0, done.stdout + done.stderr
        return uri
