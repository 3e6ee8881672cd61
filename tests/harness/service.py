"""A Gatehouse process, and what tests run and ask of it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.client import RawClient, Reply, call, exchange
from tests.harness.upstream import Answer, ScriptedUpstream, Seen, ok
from tests.harness.warm import EARLY, Nursery, Started

ROOT = Path(__file__).resolve().parent.parent.parent


# A closed port: connecting to it is refused at once.
DEAD_DATABASE = "postgresql://nobody@127.0.0.1:1/none"


def copied(folder: Path) -> Path:
    """`folder`, with a copy of all that runs: a `.env` in it is nobody else's."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("services", "postgres", "server", "wire", "migrations"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@functools.cache
def checkout() -> Path:
    """The copy that the tests run, where a developer's own `.env` has no say."""
    folder = tempfile.TemporaryDirectory(prefix="gatehouse-checkout-")
    atexit.register(folder.cleanup)
    return copied(Path(folder.name))


@functools.cache
def nursery() -> Nursery:
    """What forks the services of this process."""
    return Nursery(checkout(), inherited())


def inherited() -> dict[str, str]:
    """What a service gets of the environment of the tests."""
    keys = ("PATH", "HOME", "LANG", "TMPDIR", "GATEHOUSE_INTERPRETED")
    return {key: os.environ[key] for key in keys if key in os.environ}


def unshared(what: str) -> list[str]:
    """What to begin a command with, so that it has a `what` (see unshare(1)) of its own. Skips the
    test where that cannot be had."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip(f"only root may give a process a {what} of its own")
    return ["unshare", f"--{what}"]


def unprivileged() -> list[str]:
    """What to begin a command with, so that it may read and write only what its files' modes say: root
    may do all, except in a user namespace where it is nobody. Skips the test where there is none."""
    return unshared("user") if os.geteuid() == 0 else []


def free_port() -> int:
    """A free port below the range that outgoing connections take theirs from.

    Such a port is still free when somebody binds it, or comes back to it, a moment later, and a
    client that knocks on it meanwhile can never end up connected to itself.
    """
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port


def refuses(port: int) -> bool:
    """Whether nobody is let in at a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return True
    return False


def wait_for(condition: Callable[[], Any], seconds: float = 10, what: str = "condition") -> Any:
    """Poll until `condition()` is true and return its value; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        threading.Event().wait(0.01)


class Service:
    """A Gatehouse process, `python app.py`, with settings from keyword arguments.

    `within` is a command that runs it, for a process with limits or name servers of its own; it has
    to become that process. `folder` is a checkout of another version.
    """

    def __init__(
        self, *, within: Sequence[str] = (), folder: Path | None = None, **settings: Any
    ) -> None:
        self.port = int(settings.setdefault("PORT", free_port()))
        environ = inherited()
        environ |= {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"}
        if workers := os.environ.get("TEST_WORKERS"):
            environ["WORKERS"] = workers
        environ |= {name: str(value) for name, value in settings.items()}
        self.environ = environ
        self._log = tempfile.NamedTemporaryFile(prefix="gatehouse-test-", suffix=".log")  # noqa: SIM115
        self.process: Started | subprocess.Popen[bytes]
        if within or folder or any(name.startswith(EARLY) for name in settings):
            self.process = subprocess.Popen(
                [*within, sys.executable, "app.py"],
                cwd=folder or checkout(),
                env=environ,
                stdout=self._log,
                stderr=subprocess.STDOUT,
            )
        else:
            self.process = nursery().start(environ=environ, output=self._log)
        try:
            wait_for(self._serving, 20, "the service to serve")
        except AssertionError:
            self.process.kill()
            raise AssertionError(f"the service did not start:\n{self.log}") from None

    def _serving(self) -> bool:
        """Whether a worker has taken a connection: the socket listens before there is one."""
        assert self.process.poll() is None, f"exit {self.process.returncode}:\n{self.log}"
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), 1) as sock,
        ):
            sock.shutdown(socket.SHUT_WR)
            return not sock.recv(1)
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

    @property
    def processes(self) -> list[psutil.Process]:
        """Its own process and its workers'."""
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    @property
    def memory(self) -> int:
        """Bytes of memory that are all its processes' own."""
        return sum(process.memory_full_info().uss for process in self.processes)

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
    environ = inherited()
    environ |= {"POSTGRES_URI": DEAD_DATABASE, "UPSTREAM_URL": "http://127.0.0.1:1"}
    environ |= {name: str(value) for name, value in settings.items()}
    command = [sys.executable, "app.py", *args]
    if any(name.startswith(EARLY) for name in settings):
        return subprocess.run(
            command,
            cwd=checkout(),
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=30,
        )
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = nursery().start(*args, environ=environ, output=output)
        try:
            code = process.wait(30)
        finally:
            process.kill()
        output.seek(0)
        return subprocess.CompletedProcess(command, code, output.read())


@contextlib.contextmanager
def no_descriptor_free() -> Iterator[None]:
    """For a moment this process can open nothing."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest number that is free
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(OSError):
            os.dup(0)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def new_email() -> str:
    return f"{uuid.uuid4().hex}@example.com"


def create_user(service: Service, email: str | None = None, name: str = "Ann") -> Reply:
    """The 201 answer of a new user; the email is one that nobody has unless given."""
    reply = service.call("POST", "/users", {"email": email or new_email(), "name": name})
    assert reply.status == 201, reply
    return reply
