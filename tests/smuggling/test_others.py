"""Other servers behind Gatehouse and in front of it, which read what is sent in ways of their own.

Run by `make smuggling`. SMUGGLING_CASES is how many changed cases are tried beside those that are
written down.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.harness import ROOT, ScriptedUpstream, Service, free_port, wait_for
from tests.harness.smuggling import (
    Logged,
    cases,
    changed,
    check_answers,
    check_seen,
    converse_all,
    logged,
    origin,
    say_which,
    sights,
)

HERE = ROOT / "tests" / "smuggling"
BIN = ROOT / ".venv-smuggling" / "bin"
CHANGED = int(os.environ.get("SMUGGLING_CASES", "5000"))


class Program:
    """A program that listens on `port`, in `folder`, until it is closed; `lines` is what it has
    written, of JSON."""

    def __init__(self, folder: Path, port: int, command: list[Any], **environment: str) -> None:
        assert shutil.which(str(command[0])), f"{command[0]} is not installed"
        self.port = port
        self.folder = folder
        self._output = (folder / "output").open("wb")
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
            stdout=self._output,
            stderr=(folder / "errors").open("wb"),
        )
        wait_for(self._listening, 60, f"{command[0]} to listen")

    def _listening(self) -> bool:
        assert self.process.poll() is None, (self.folder / "errors").read_text()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(30)
        self._output.close()

    def lines(self, name: str = "output") -> list[Any]:
        text = (self.folder / name).read_text(errors="replace")
        return [json.loads(line) for line in text.split("\n") if line.startswith(("[", "{"))]


def go(folder: Path, port: int) -> list[Any]:
    environ = os.environ | {"GO111MODULE": "off", "GOCACHE": str(folder / "cache")}
    build = ["go", "build", "-o", str(folder / "server"), str(HERE / "server.go")]
    subprocess.run(build, check=True, env=environ, timeout=300)
    return [folder / "server", port]


def gunicorn(kind: str) -> Callable[[Path, int], list[Any]]:
    return lambda _, port: [
        *(BIN / "gunicorn", "--chdir", HERE, "--bind", f"127.0.0.1:{port}", "--workers", 1),
        *("--worker-class", kind, "--threads", 8, "wsgi:application"),
    ]


def uvicorn(parser: str) -> Callable[[Path, int], list[Any]]:
    return lambda _, port: [
        *(BIN / "uvicorn", "--app-dir", HERE, "--port", port, "--http", parser),
        *("--no-access-log", "asgi:application"),
    ]


BEHIND: dict[str, Callable[[Path, int], list[Any]]] = {
    "gunicorn": gunicorn("sync"),
    "gunicorn with threads": gunicorn("gthread"),
    "uvicorn with h11": uvicorn("h11"),
    "uvicorn with httptools": uvicorn("httptools"),
    "waitress": lambda _, port: [BIN / "python", HERE / "wsgi.py", "waitress", port],
    "cheroot": lambda _, port: [BIN / "python", HERE / "wsgi.py", "cheroot", port],
    "node": lambda _, port: ["node", HERE / "server.js", port],
    "go": go,
}


# Each of the servers answers in this time, on a machine that does other things too.
SECONDS = 2.0


def hold(port: int) -> list[tuple[str, bytes, bytes]]:
    return converse_all(port, [*cases(), *map(changed, range(CHANGED))], SECONDS)


@pytest.mark.parametrize("name", BEHIND)
def test_a_server_behind_sees_what_gatehouse_saw(tmp_path: Path, name: str) -> None:
    port = free_port()
    server = Program(tmp_path, port, BEHIND[name](tmp_path, port))
    try:
        with Service(UPSTREAM_URL=f"http://127.0.0.1:{port}", WORKERS=2) as service:
            held = hold(service.port)
            assert service.stop() == 0
            log = logged(service)
    finally:
        server.close()
    seen = [(str(one[0]), str(one[1]), str(one[2]), int(one[3])) for one in server.lines()]
    check_seen(seen, log, check_answers(held, log))
    assert len(seen) > len(held)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Run one of the servers in front, from its file with its ports and folder in it."""
    running: list[Program] = []

    def make(file: str, behind: int, *command: Any) -> Program:
        port = free_port()
        text = (HERE / file).read_text().replace("FOLDER", str(tmp_path))
        path = tmp_path / file
        path.write_text(text.replace("PORT", str(port)).replace("BEHIND", str(behind)))
        running.append(Program(tmp_path, port, [*command, path]))
        return running[-1]

    yield make
    for program in running:
        program.close()


def through(
    made: Callable[..., Program], how: signal.Signals, file: str, *command: Any
) -> tuple[Logged, Program]:
    """What Gatehouse has logged of all that was sent to a server in front of it, which has ended:
    `how` lets it write its last lines."""
    upstream = ScriptedUpstream(say_which)
    with Service(UPSTREAM_URL=upstream.url, TRUSTED_PROXIES="127.0.0.1", WORKERS=2) as service:
        front = made(file, service.port, *command)
        held = hold(front.port)
        front.close(how)
        assert service.stop() == 0
        log = logged(service)
    check_seen(sights(upstream), log, {})
    upstream.close()
    assert len(log) > len(held)
    return log, front


def understood(log: Logged) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of the log without those of requests that were refused, whatever they said."""
    return ((identity, line) for identity, line in log.items() if line["status"] not in (400, 505))


def test_gatehouse_sees_what_nginx_saw(made: Callable[..., Program]) -> None:
    log, front = through(
        made, signal.SIGQUIT, "nginx.conf", "nginx", "-e", "stderr", "-g", "daemon off;", "-c"
    )
    asked = {identity: method for identity, method, *_ in front.lines("requests")}
    for identity, line in understood(log):
        assert asked.get(identity) == line["method"], line


def test_gatehouse_sees_what_haproxy_saw(made: Callable[..., Program]) -> None:
    log, front = through(made, signal.SIGUSR1, "haproxy.cfg", "haproxy", "-db", "-f")
    asked = {identity: method for identity, method, *_ in front.lines()}
    for identity, line in understood(log):
        assert asked.get(identity) == line["method"], line


def test_gatehouse_sees_what_caddy_saw(made: Callable[..., Program]) -> None:
    log, front = through(
        made, signal.SIGTERM, "Caddyfile", "caddy", "run", "--adapter", "caddyfile", "--config"
    )

    def told(method: str, target: str) -> tuple[str, str]:
        # Caddy encodes what is beyond ASCII, and has other signs for it in its log.
        return method, re.sub("[^ -~]", "?", unquote(origin(target), "latin-1"))

    requests = [line["request"] for line in front.lines("requests")]
    asked = Counter(told(one["method"], one["uri"]) for one in requests)
    got = Counter(told(line["method"], line["target"]) for _, line in understood(log))
    assert got - asked == Counter()
