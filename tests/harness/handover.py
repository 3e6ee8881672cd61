"""Who starts Gatehouse as systemd does: with a socket that listens, and one to be told on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.harness.service import DEAD_DATABASE, checkout

# Has this process be what systemd would have forked: the descriptor is 3, and the number its own.
AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2], LISTEN_FDNAMES="gatehouse")
if "WATCHDOG_USEC" in os.environ:
    os.environ["WATCHDOG_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "app.py"])
"""


class Listener:
    """A socket that listens, and is handed over to one Gatehouse after the other."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.sock = socket.create_server((host, 0), backlog=1024)
        self.port = int(self.sock.getsockname()[1])

    def hand_over(
        self, sock: socket.socket | None = None, count: int = 1, **settings: object
    ) -> subprocess.Popen[bytes]:
        descriptor = (sock or self.sock).fileno()
        environ = {"PATH": os.environ["PATH"], "POSTGRES_URI": DEAD_DATABASE}
        # What systemd never gives: a number that is not used where a socket is handed over.
        environ |= {"UPSTREAM_URL": "http://127.0.0.1:1", "PORT": "1", "ACCESS_LOG": "off"}
        return subprocess.Popen(
            [sys.executable, "-c", AS_SYSTEMD, str(descriptor), str(count)],
            cwd=checkout(),
            env=environ | {name: str(value) for name, value in settings.items()},
            pass_fds=[descriptor],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


class Told:
    """What a service tells on NOTIFY_SOCKET."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(self.path))

    def next(self, seconds: float = 20) -> str:
        """The next message. Raises TimeoutError where none comes."""
        self.sock.settimeout(seconds)
        return self.sock.recv(4096).decode()
