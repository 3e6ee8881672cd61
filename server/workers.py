"""Workers: processes that share the listening socket.

A worker is one event loop and its threads. With more than one a supervisor holds the listening
socket, replaces those that die and passes signals on.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from metrics import REPLACED, STOPPING, Board
from server.listener import let_nobody_in
from server.systemd import Notifier, ready, turning

log = logging.getLogger("gatehouse")

# SIGHUP says that the terminal was closed.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A worker that ends by itself within START_SECONDS could not start. After START_ATTEMPTS such
# workers in a row the service gives up. If no worker runs, one that cannot be forked counts too.
START_SECONDS = 1.0
START_ATTEMPTS = 5
# How often to look whether all workers serve, until they do, in seconds.
READY_SECONDS = 0.02
# A worker that stops ends by itself after SHUTDOWN_TIMEOUT. If it has not ended this many seconds
# after that, the supervisor kills it.
LATE_SECONDS = 1.0


class Server(Protocol):
    """What serves in a worker."""

    alone: bool  # whether no other process listens on the same socket

    def run(self) -> None:
        """Serve until `stop` is called and what was under way is answered. Notes on the board that
        its loop turns, first when it lets clients in, then every second."""

    def stop(self) -> None:
        """Begin to drain; callable from a signal handler and from any thread."""


@dataclass(frozen=True)
class Service:
    """What is served, and how it stops. Times are in seconds.

    `make` makes the server of a worker, in that worker's process; `close` is called when that has
    ended. `handed_over` says that the next instance listens on the same socket, so that it is left
    as it is.
    """

    make: Callable[[], Server]
    close: Callable[[], None]
    listener: socket.socket
    board: Board
    notifier: Notifier
    workers: int
    handed_over: bool
    drain_delay: float
    shutdown_timeout: float


def hold_signals() -> None:
    """Have the signals that say to stop wait until `serve` listens for them, in this process or in
    a worker. Otherwise they would end it, and reset clients that have connected already."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)


def serve(service: Service) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP, and return an exit code."""
    if service.workers > 1:
        return Supervisor(service).run()
    server = begin(service, 0)
    on_signals(service, server, supervised=False)
    if service.notifier:
        threading.Thread(target=keep_told, args=(service,), name="notifier", daemon=True).start()
    server.run()
    service.close()
    return 0


def begin(service: Service, number: int) -> Server:
    """Become worker `number`, and make its server."""
    pin(number, service.workers)
    service.board.join(number)
    server = service.make()
    server.alone = service.workers == 1 and not service.handed_over
    return server


def pin(number: int, workers: int) -> None:
    """Keep this process on one core, if the workers can be spread evenly over all cores.

    With fewer workers than cores they stay free to move, because other services may have chosen the
    same cores: three containers with one worker each all ran on one core. See
    docs/decisions/0009-cores.md for what it brings.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1 and workers % len(cores) == 0:
        # A sandbox may refuse it. Everything works without it.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {cores[number % len(cores)]})


def on_signals(service: Service, server: Server, *, supervised: bool) -> None:
    """Stop at the first signal, after the drain's delay, and end at once at the second.

    A supervised worker leaves that to its supervisor, which sends it SIGTERM. It ignores the other
    signals: Ctrl-C in a terminal sends SIGINT to all processes, and so to the supervisor too.
    """
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if supervised:
            # Only the supervisor says that the service stops: this worker may be told to by itself.
            server.stop()
            return
        if seen:
            os._exit(1)
        seen.append(number)
        service.board.set(STOPPING, 1)
        service.notifier.tell("STOPPING=1")
        if service.drain_delay:
            signal.signal(signal.SIGALRM, lambda number, frame: server.stop())
            signal.setitimer(signal.ITIMER_REAL, service.drain_delay)
        else:
            server.stop()

    for number in STOPS:
        others = supervised and number != signal.SIGTERM
        signal.signal(number, signal.SIG_IGN if others else handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def keep_told(service: Service) -> None:
    """Tell, on a thread of the only worker, when it serves, and that it still does."""
    pause = threading.Event()
    while not (ready(service.board, 1) and service.notifier.tell("READY=1")):
        pause.wait(READY_SECONDS)
    while service.notifier.interval:
        service.notifier.watch(lambda: turning(service.board, [0]))
        pause.wait(service.notifier.interval / 2)


def stop_without(lifeline: int, server: Server) -> None:
    """Stop the worker when its supervisor ends. The supervisor alone has the other end of this pipe
    open, so that reading returns when it ends for whatever reason. Runs on a thread."""
    os.read(lifeline, 1)
    server.stop()


class Supervisor:
    """Keeps forked workers running until it is told to stop."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.notifier = service.notifier
        self.running: dict[int, tuple[int, float]] = {}  # process id: worker number, since when
        self.due: list[tuple[float, int]] = []  # a heap: when to start which worker
        self.failures = 0
        self.told_ready = False
        self.lifeline = os.pipe()
        self.signals = os.pipe()

    def run(self) -> int:
        """Supervise; returns the exit code."""
        os.set_blocking(self.signals[1], False)
        signal.set_wakeup_fd(self.signals[1], warn_on_full_buffer=False)
        for number in (*STOPS, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: None)
        for worker in range(self.service.workers):
            self.start(worker)
        while True:
            received = self.wait(self.due[0][0] if self.due else None)
            if told_to_stop(received):
                return self.stop()
            self.replace()
            if self.failures >= START_ATTEMPTS:
                log.error("the workers cannot start")
                self.kill()
                return 1
            self.start_due()

    def start_due(self) -> None:
        while self.due and self.due[0][0] <= time.monotonic():
            self.start(heapq.heappop(self.due)[1])

    def start(self, worker: int) -> None:
        hold_signals()
        try:
            process = os.fork()
        except OSError as error:  # There are too many processes, or too little memory, for now.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            log.error("worker %d cannot be started: %s", worker, error.strerror)
            heapq.heappush(self.due, (time.monotonic() + START_SECONDS, worker))
            self.failures += not self.running
            return
        if process == 0:
            code = 1
            try:
                self.work(worker)
                code = 0
            except BaseException:
                log.exception("a worker failed")
            finally:
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        self.running[process] = worker, time.monotonic()

    def work(self, worker: int) -> None:
        """Be worker number `worker`, in its own process."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self.lifeline[1])
        server = begin(self.service, worker)
        on_signals(self.service, server, supervised=True)
        watch = threading.Thread(
            target=stop_without, args=(self.lifeline[0], server), name="lifeline", daemon=True
        )
        watch.start()
        server.run()
        self.service.close()

    def wait(self, until: float | None) -> bytes:
        """Wait for signals until the time `until`, and return their numbers. Meanwhile tell systemd
        that all workers serve, and that they still do."""
        times = [] if until is None else [until]
        if not self.told_ready and self.notifier:
            if ready(self.service.board, self.service.workers):
                self.told_ready = self.notifier.tell("READY=1")
            times.append(time.monotonic() + READY_SECONDS)
        if self.notifier.interval and self.told_ready:
            numbers = [number for number, _ in self.running.values()]
            self.notifier.watch(lambda: turning(self.service.board, numbers))
            times.append(time.monotonic() + self.notifier.interval / 2)
        timeout = max(0.0, min(times) - time.monotonic()) if times else None
        if select.select([self.signals[0]], [], [], timeout)[0]:
            return os.read(self.signals[0], 4096)
        return b""

    def ended(self) -> Iterator[tuple[int, float, int]]:
        """The workers that have ended since: number, since when each ran, and exit code. Ask before
        each `wait`: their end may be told together with another signal, and only once."""
        while self.running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            # As the first process of a container it also gets the children of processes that ended.
            if process in self.running:
                worker, since = self.running.pop(process)
                self.service.board.left(worker)
                yield worker, since, os.waitstatus_to_exitcode(status)

    def replace(self) -> None:
        for worker, since, code in self.ended():
            log.error("worker %d ended (%s)", worker, way(code))
            self.service.board.add(REPLACED)
            now = time.monotonic()
            early = now - since < START_SECONDS
            # One that was killed may be able to start when there is memory again. So it counts
            # towards no giving up, and is started once in START_SECONDS at most.
            killed = code == -signal.SIGKILL
            if not killed:
                self.failures = self.failures + 1 if early else 0
            pause = 0.1 * 2**self.failures if self.failures else 0.0
            heapq.heappush(self.due, (since + START_SECONDS if killed else now + pause, worker))

    def stop(self) -> int:
        """Drain the workers, after the drain's delay, in which those that die are replaced as
        before; a second signal, or time running out, kills them. Returns the exit code."""
        self.service.board.set(STOPPING, 1)
        self.notifier.tell("STOPPING=1")
        until = time.monotonic() + self.service.drain_delay
        while True:
            self.replace()
            self.start_due()
            if time.monotonic() >= until:
                break
            if told_to_stop(self.wait(min(until, self.due[0][0]) if self.due else until)):
                self.kill()
                return 1
        if not self.running:  # Somebody has to answer those who wait in the socket's queue.
            self.start(heapq.heappop(self.due)[1])
        if not self.service.handed_over:
            let_nobody_in(self.service.listener)
        self.service.listener.close()
        for process in self.running:
            os.kill(process, signal.SIGTERM)
        failed = False
        until = time.monotonic() + self.service.shutdown_timeout + LATE_SECONDS
        while True:
            for worker, _, code in self.ended():
                if code:
                    failed = True
                    log.error("worker %d ended (%s)", worker, way(code))
            if not self.running or time.monotonic() >= until:
                break
            if told_to_stop(self.wait(until)):
                self.kill()
                return 1
        for worker, _ in self.running.values():
            failed = True
            log.error("worker %d does not end: it is killed", worker)
        self.kill()
        return 1 if failed else 0

    def kill(self) -> None:
        for process in self.running:
            os.kill(process, signal.SIGKILL)


def way(code: int) -> str:
    """How a process ended, by its exit code as Python has it."""
    return f"signal {-code}" if code < 0 else str(code)


def told_to_stop(received: bytes) -> bool:
    """Whether one of these signals says to stop."""
    return any(number in received for number in STOPS)
