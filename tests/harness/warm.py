"""Services that start in a tenth of the time: a process that has imported all that Gatehouse imports
forks them.

Of the fifth of a second of the processor that a start takes nearly all are imports, and the tests start
some six hundred services. What such a process runs is app.py, as `python app.py` does; no module of ours
does any work, or looks at the environment, when it is imported (tests/house/test_laws.py).

Run as a program it is that process: it reads, from the socket whose number it is given, what to start.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

# What an interpreter, the C library, or the finder of what is compiled reads at the start and never
# again.
EARLY = ("PYTHON", "LD_", "LC_", "MALLOC_", "TZ", "GATEHOUSE_")
MOST_BYTES = 1 << 17


class Started:
    """A process that another has forked, used like a `subprocess.Popen`."""

    def __init__(self, status: socket.socket) -> None:
        self._status = status
        self._lock = threading.Lock()
        self.pid = int(status.recv(64))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or the negative number of the signal that ended it. TimeoutExpired where it
        has not ended in so many seconds."""
        with self._lock:
            if self.returncode is None:
                self._status.settimeout(timeout)
                try:
                    self.returncode = int(self._status.recv(64))
                except (TimeoutError, BlockingIOError):
                    raise subprocess.TimeoutExpired("app.py", timeout or 0) from None
                self._status.close()
            return self.returncode

    def poll(self) -> int | None:
        """The exit code, None where it still runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The process that forks services, in `folder`, which has app.py."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # It ends, with all that it has forked, when this process does, which closes the socket.
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), "app.py"],
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(self, *arguments: str, environ: dict[str, str], output: IO[Any]) -> Started:
        """Run app.py with this environment and no other; both of its streams are `output`."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = {"arguments": arguments, "environ": environ, "files": files}
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            descriptors = [output.fileno(), theirs.fileno()]
            socket.send_fds(self._socket, [json.dumps(wanted).encode()], descriptors)
        return Started(status)


def main(control: socket.socket) -> None:
    """Fork what is asked for until nobody can ask any more."""
    sys.path[0] = str(Path.cwd())
    __import__("app")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # what minds a service is reaped
    while True:
        wanted, descriptors, _, _ = socket.recv_fds(control, MOST_BYTES, 2)
        if not wanted:
            # Tests that were killed had no time to stop what they had started.
            os.killpg(0, signal.SIGKILL)
        if os.fork() == 0:
            control.close()
            mind(json.loads(wanted), *descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)


def mind(wanted: dict[str, Any], output: int, status: int) -> None:
    """Fork the service, tell its process id, and when it has ended its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        for stream in (1, 2):
            os.dup2(output, stream)
        os.closerange(3, max(output, status) + 1)
        resource.setrlimit(resource.RLIMIT_NOFILE, wanted["files"])
        os.environ.clear()
        os.environ.update(wanted["environ"])
        sys.argv = ["app.py", *wanted["arguments"]]
        runpy.run_path("app.py", run_name="__main__")
        return
    os.close(output)
    os.write(status, b"%d" % pid)
    _, ended = os.waitpid(pid, 0)
    os.write(status, b"%d" % os.waitstatus_to_exitcode(ended))
    os._exit(0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
