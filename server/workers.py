"""Workers: processes that share the listening socket.

A worker is one event loop and the threads of its jobs. With more than one a supervisor holds the
listening socket, replaces those that die and passes signals on.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from metrics import REPLACED, Board
from server.listener import let_nobody_in
from server.loop import READ
from server.server import Server

log = logging.getLogger("gatehouse")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A worker that ends by itself sooner than this many seconds could not start…
START_SECONDS = 1.0
# …and after so many of them in a row the service gives up.
START_ATTEMPTS = 5


def serve(
    make: Callable[[int], Server],
    listener: socket.socket,
    *,
    workers: int,
    shutdown_timeout: float,
) -> int:
    """Serve on `listener`, which is bound, until SIGTERM or SIGINT and return an exit code.

    `make` makes the server of a worker, given its number, in that worker's process;
    `shutdown_timeout` is how many seconds requests under way have to end.
    """

    # So that services of one worker each do not all choose the same core.
    first_core = os.getpid()

    def work(number: int, lifeline: int | None) -> None:
        pin(first_core + number)
        server = make(number)
        if lifeline is not None:
            Lifeline(lifeline, server)
            server.alone = False
        on_signals(server.stop, alone=server.alone)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        server.run()

    if workers == 1:
        work(0, None)
        return 0
    return Supervisor(work, workers, listener, shutdown_timeout, application.board).run()


def pin(number: int) -> None:
    """Keep this process on one core, each worker on another. Handing the interpreter's lock from a
    thread on one core to a thread on another costs as much as all the rest of a request."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def on_signals(stop: Callable[[], None], *, alone: bool) -> None:
    """Call `stop` at the first SIGTERM or SIGINT; end at once at the second. Where a worker is not
    `alone` its supervisor decides that: what is sent to the whole group comes from there once more,
    and an interrupt comes as SIGTERM."""
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if seen and alone:
            os._exit(1)
        seen.append(number)
        stop()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle if alone else signal.SIG_IGN)


class Lifeline:
    """The end of a pipe whose other end the supervisor holds: it ends when the supervisor does."""

    def __init__(self, descriptor: int, server: Server) -> None:
        self._descriptor = descriptor
        self._server = server
        server.loop.watch(descriptor, self, 0, READ)

    def on_event(self, events: int) -> None:
        self._server.loop.watch(self._descriptor, self, READ, 0)
        self._server.stop()


class Supervisor:
    """Keeps `count` forked workers running until it is told to stop."""

    def __init__(
        self,
        work: Callable[[int, int | None], None],
        count: int,
        listener: socket.socket,
        shutdown_timeout: float,
        board: Board,
    ) -> None:
        self.board = board
        self.work = work
        self.count = count
        self.listener = listener
        self.shutdown_timeout = shutdown_timeout
        self.running: dict[int, tuple[int, float]] = {}  # process id: worker number, since when
        self.due: list[tuple[float, int]] = []  # when to start which worker
        self.failures = 0
        self.lifeline = os.pipe()
        self.signals = os.pipe()

    def run(self) -> int:
        """Supervise; returns the exit code."""
        os.set_blocking(self.signals[1], False)
        signal.set_wakeup_fd(self.signals[1], warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: None)
        for worker in range(self.count):
            self.start(worker)
        while True:
            received = self.wait(self.due[0][0] if self.due else None)
            if signal.SIGTERM in received or signal.SIGINT in received:
                return self.stop()
            self.replace()
            if self.failures >= START_ATTEMPTS:
                log.error("the workers cannot start")
                self.kill()
                return 1
            while self.due and self.due[0][0] <= time.monotonic():
                self.start(self.due.pop(0)[1])

    def start(self, worker: int) -> None:
        # A signal that reaches the worker before it listens for it must wait, not be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        process = os.fork()
        if process == 0:
            code = 1
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(self.lifeline[1])
                self.work(worker, self.lifeline[0])
                code = 0
            except BaseException:
                log.exception("a worker failed")
            finally:
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self.running[process] = worker, time.monotonic()

    def wait(self, until: float | None) -> bytes:
        timeout = None if until is None else max(0.0, until - time.monotonic())
        if select.select([self.signals[0]], [], [], timeout)[0]:
            return os.read(self.signals[0], 4096)
        return b""

    def ended(self) -> Iterator[tuple[int, float, int]]:
        """The workers that have ended since: number, since when each ran, and exit code."""
        while self.running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            # Another's child may have come to this process, which is the first of a container, say.
            if process in self.running:
                yield *self.running.pop(process), os.waitstatus_to_exitcode(status)

    def replace(self) -> None:
        for worker, since, code in self.ended():
            log.error("worker %d ended (%s)", worker, f"signal {-code}" if code < 0 else code)
            self.board.left(worker)
            self.board.add(REPLACED)
            now = time.monotonic()
            early = now - since < START_SECONDS and -code not in (signal.SIGKILL, signal.SIGTERM)
            self.failures = self.failures + 1 if early else 0
            self.due.append((now + (0.1 * 2**self.failures if early else 0.0), worker))
            self.due.sort()

    def stop(self) -> int:
        """Drain the workers; a second signal, or time running out, kills them."""
        let_nobody_in(self.listener)
        self.listener.close()
        for process in self.running:
            os.kill(process, signal.SIGTERM)
        deadline = time.monotonic() + self.shutdown_timeout + 1.0
        while self.running and time.monotonic() < deadline:
            received = self.wait(deadline)
            if signal.SIGTERM in received or signal.SIGINT in received:
                self.kill()
                return 1
            for _ in self.ended():
                pass
        self.kill()
        return 0

    def kill(self) -> None:
        for process in self.running:
            os.kill(process, signal.SIGKILL)
