"""The listening socket that systemd hands over, and the messages that it wants: ready, stopping,
still alive.

Other service managers do the same. See sd_listen_fds(3) and sd_notify(3). Each variable is removed
from the environment when it is read, so that no child process takes it for its own.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, MutableMapping

from metrics import HEARTBEAT, Board

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
# A loop notes once a second that it turns. Without such a note for this many seconds it is taken to
# be stuck.
SILENT_SECONDS = 3.0


def handed_over(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The listening socket that was handed over to this process, or None.

    Raises ValueError, which says what is wrong with it.
    """
    count, process = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
    environ.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise ValueError(f"{count} sockets were handed over, and Gatehouse listens on one")
    try:
        os.set_inheritable(FIRST_DESCRIPTOR, False)
        sock = socket.socket(fileno=FIRST_DESCRIPTOR)
        stream = sock.type == socket.SOCK_STREAM
        listening = stream and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ValueError(f"descriptor 3 was handed over, and is no socket: {error}") from None
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or not listening:
        raise ValueError("the socket that was handed over must listen on TCP (and Accept=no)")
    return sock


class Notifier:
    """Sends messages to the program that started the service. It is false if that wants none.

    `interval` is how often it wants to hear that all is well, in seconds; 0.0 for never.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        microseconds = environ.pop("WATCHDOG_USEC", "")
        process = environ.pop("WATCHDOG_PID", str(os.getpid()))
        # A leading @ stands for the NUL of an abstract socket.
        self._address = address.replace("@", "\0", 1) if address.startswith("@") else address
        watched = address and microseconds.isdecimal() and process == str(os.getpid())
        # Half of the time after which systemd would restart it, as sd_watchdog_enabled(3) advises.
        self.interval = int(microseconds) / 2e6 if watched else 0.0
        self._next = 0.0

    def __bool__(self) -> bool:
        return bool(self._address)

    def tell(self, state: str) -> bool:
        """Send one message, such as READY=1, if anybody wants it. False if the receiver has not
        taken earlier ones, so that its queue is full, or if no descriptor is free: to wait here, or
        to fail, would be to do so in a signal handler, or in the supervisor."""
        if self._address:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                    sock.setblocking(False)
                    sock.connect(self._address)
                    sock.send(state.encode())
            except OSError as error:
                # Any other error says that nobody listens.
                return error.errno not in (errno.EAGAIN, errno.EMFILE, errno.ENFILE)
        return True

    def watch(self, turning: Callable[[], bool]) -> None:
        """Say that all is well, if it is time to and all loops turn."""
        now = time.monotonic()
        if self.interval and now >= self._next and turning() and self.tell("WATCHDOG=1"):
            self._next = now + self.interval


def ready(board: Board, workers: int) -> bool:
    """Whether every worker serves."""
    return sum(1 for beat in board.each(HEARTBEAT) if beat) >= workers


def turning(board: Board, numbers: list[int]) -> bool:
    """Whether the loops of these workers turn. A worker that has not begun to serve does not count:
    if it cannot start, the supervisor sees to that."""
    oldest = time.monotonic_ns() - SILENT_SECONDS * 1e9
    beats = board.each(HEARTBEAT)
    return all(not beats[number] or beats[number] > oldest for number in numbers)
