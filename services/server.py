"""Waitress, run so that no request waits for another kind's trouble: lanes, workers, draining.

A worker is one event loop and its lanes' threads. With more than one worker a supervisor holds the
listening socket, replaces those that die and passes signals on.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from json.encoder import encode_basestring_ascii as json_string
from queue import SimpleQueue
from typing import Any, Protocol

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.server import TcpWSGIServer

from services.board import CLIENTS, Board
from services.channel import Channel, Task
from services.errors import Problem
from services.fields import Field
from services.parser import RequestParser

log = logging.getLogger("gatehouse")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

BACKLOG = 1024
SO_ATTACH_FILTER = 26  # of Linux; the socket module does not have it
# Descriptors that are not client connections: upstream and database connections, spooled bodies.
SPARE_DESCRIPTORS = 256
# While it drains, a connection that has brought no request yet has this many seconds to bring one:
# its client was let in, and may have sent one already.
FIRST_REQUEST_SECONDS = 1.0
# A worker lets the others be first for this many seconds, where one has fewer clients. Whichever
# woke first would take them all, and refuse what is over its share of the upstream's places.
GIVE_WAY_SECONDS = 0.005
# A worker that ends by itself sooner than this many seconds could not start…
START_SECONDS = 1.0
# …and after so many of them in a row the service gives up.
START_ATTEMPTS = 5


class Application(Protocol):
    """What is served."""

    board: Board

    def answer(
        self, request: RequestParser, client: Channel
    ) -> tuple[str, list[Field], Iterable[bytes]]:
        """Answer a request: status line, header lines, body. Raises where nobody wants an answer
        any more."""

    def admit(self, request: RequestParser) -> tuple[str, int]:
        """The request's lane and the largest body it may have. Raises a Problem to refuse it."""

    def caller(self, request: RequestParser, peer: str) -> str:
        """The address that the access log names."""

    def join(self, worker: int) -> None:
        """Called in each worker before it serves."""

    def close(self) -> None:
        """Called when a worker has served its last request."""


class Lane:
    """Threads that serve one kind of request, started when none is idle, up to a limit. The kinds
    do not wait for each other's threads."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._queue: SimpleQueue[Channel] = SimpleQueue()
        self._lock = threading.Lock()
        self._spare = 0  # idle threads less queued channels
        self._threads = 0

    def add(self, channel: Channel) -> None:
        with self._lock:
            self._spare -= 1
            start = self._spare < 0 and self._threads < self._limit
            if start:
                self._threads += 1
                self._spare += 1
                name = f"{self._name}-{self._threads}"
        self._queue.put(channel)
        if start:
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while True:
            channel = self._queue.get()
            try:
                channel.service()
            except Exception:
                log.exception("a request could not be served")
                channel.will_close = True
            with self._lock:
                self._spare += 1


class Watched(dict[int, Any]):
    """Waitress's map of its sockets, which keeps the selector in step. Waitress itself asks every
    socket at every turn what it waits for; here a change is told when it happens, so that the
    connections that do nothing cost nothing."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        super().__init__()
        self.selector = selector

    def __setitem__(self, descriptor: int, watched: Any) -> None:
        super().__setitem__(descriptor, watched)
        watched.events = READ
        self.selector.register(descriptor, READ, watched)

    def __delitem__(self, descriptor: int) -> None:
        watched: Any = super().pop(descriptor)
        if watched.events:
            self.selector.unregister(descriptor)
        watched.events = 0

    def rearm(self, watched: Any) -> None:
        """Watch for what `watched` waits for now."""
        descriptor = watched._fileno
        if descriptor not in self:  # closed
            return
        events = (READ if watched.readable() else 0) | (WRITE if watched.writable() else 0)
        if events == watched.events:
            return
        if not watched.events:
            self.selector.register(descriptor, events, watched)
        elif not events:
            self.selector.unregister(descriptor)
        else:
            self.selector.modify(descriptor, events, watched)
        watched.events = events


class Server(TcpWSGIServer):  # type: ignore[misc]
    """One worker's event loop: accepts, reads, hands requests to lanes, and sends what is left."""

    channel_class = Channel
    draining = False
    stopping = False
    alone = True  # no other worker listens on the same socket

    def __init__(
        self,
        application: Application,
        listener: socket.socket,
        lanes: dict[str, int],
        shutdown_timeout: float,
        access_log: bool,
    ) -> None:
        adjustments = Adjustments(
            sockets=[],
            ident=None,
            clear_untrusted_proxy_headers=False,  # the proxy does that, for the headers it knows
            channel_request_lookahead=1,
            connection_limit=connection_limit(),
            inbuf_overflow=65536,
            outbuf_overflow=1 << 20,
            recv_bytes=65536,
            backlog=BACKLOG,
        )
        adjustments.admit = application.admit
        self.lanes = {name: Lane(name, limit) for name, limit in lanes.items()}
        self.shutdown_timeout = shutdown_timeout
        self.access_log = access_log
        self.watched = Watched(selectors.DefaultSelector())
        self._deadline = 0.0
        self._grace = 0.0
        self._tick_at = 0.0
        self._gives_way_until = 0.0
        super().__init__(
            application,
            map=self.watched,
            _sock=listener,
            dispatcher=self,  # never used: add_task is here
            adj=adjustments,
            sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
            bind_socket=False,
            _start=False,  # listening starts in `run`, when signals are heard
        )

    def set_reuse_addr(self) -> None:
        """The listening socket is bound already."""

    def readable(self) -> bool:
        return (
            self.accepting
            and not self._gives_way_until
            and len(self.active_channels) < self.adj.connection_limit
        )

    def handle_accept(self) -> None:
        """Let a client in, or give way to a worker that has fewer. Once: it may not be awake."""
        clients = self._count_clients()
        has_waited = self._gives_way_until or self.draining
        if not has_waited and self.application.board.least(CLIENTS) < clients:
            self._gives_way_until = time.monotonic() + GIVE_WAY_SECONDS
            return
        self._gives_way_until = 0.0
        super().handle_accept()

    def _count_clients(self) -> int:
        clients = len(self.active_channels)
        self.application.board.set(CLIENTS, clients)
        return clients

    def fix_addr(self, addr: tuple[str, int]) -> tuple[str, int]:
        # A socket that listens on IPv6 for both shows IPv4 clients in IPv6's clothes.
        return addr[0].removeprefix("::ffff:"), addr[1]

    def add_task(self, task: Channel) -> None:
        request = task.requests[0]
        request.arrived = time.monotonic()
        self.lanes[request.lane].add(task)

    def wake(self, channel: Channel) -> None:
        """Have the loop look after `channel`; callable from any thread."""
        self.trigger.pull_trigger(channel.advance)

    def rearm(self, channel: Channel) -> None:
        self.watched.rearm(channel)

    def stop(self) -> None:
        """Begin to drain; callable from a signal handler."""
        self.stopping = True
        self.trigger.pull_trigger()

    def run(self) -> None:
        """Serve until `stop` is called and what was under way is answered."""
        self.accept_connections()
        self.watched.rearm(self)
        while not (self.draining and self._drained()):
            patience = GIVE_WAY_SECONDS if self._gives_way_until else 0.1 if self.draining else 1.0
            for key, mask in self.watched.selector.select(patience):
                watched = key.data
                if mask & READ:
                    wasyncore.read(watched)
                if mask & WRITE and watched.events & WRITE:
                    wasyncore.write(watched)
                self.watched.rearm(watched)
            now = time.monotonic()
            if self._gives_way_until and now >= self._gives_way_until:
                self.handle_accept()
            self._count_clients()
            self.watched.rearm(self)
            if now >= self._tick_at:
                self._tick_at = now + 1.0
                self._close_expired(now)
            if self.draining:
                self._close_idle(now)
            elif self.stopping:
                self._drain(now)
        for channel in list(self.active_channels.values()):
            channel.reset_on_close()  # an answer that is cut here must not look whole
            channel.will_close = False
            channel.handle_close()

    def _close_expired(self, now: float) -> None:
        for channel in list(self.active_channels.values()):
            if channel.will_close or channel.expired(now):
                channel.refused = False
                channel.will_close = True
                channel.handle_close()

    def _drain(self, now: float) -> None:
        self.draining = True
        self._gives_way_until = 0.0
        self._deadline = now + self.shutdown_timeout
        self._grace = now + min(FIRST_REQUEST_SECONDS, self.shutdown_timeout)
        # Who is in the queue has been let in by the kernel, and closing would turn them out.
        if self.alone:
            let_nobody_in(self.socket)
        waiting = select.poll()
        waiting.register(self.socket, select.POLLIN)
        while waiting.poll(0):
            self.handle_accept()
        wasyncore.dispatcher.close(self)
        for channel in list(self.active_channels.values()):
            channel.handle_read_event()  # a request that is here already is under way
        self._close_idle(now)

    def _close_idle(self, now: float) -> None:
        for channel in list(self.active_channels.values()):
            idle = channel.connected and not channel.requests and channel.request is None
            if idle and (channel.served or now >= self._grace):
                channel.close_when_flushed = True
                self.watched.rearm(channel)

    def _drained(self) -> bool:
        return not self.active_channels or time.monotonic() >= self._deadline

    def log_failure(self, request: RequestParser, error: Exception) -> None:
        """Say why an answer that had begun was cut."""
        unexpected = None if isinstance(error, Problem) else error
        log.error(
            "%s %s cut: %s request_id=%s",
            request.command,
            json_string(request.request_uri),
            error if unexpected is None else type(error).__name__,
            request.id,
            exc_info=unexpected,
        )

    def log_access(self, task: Task) -> None:
        """One line of JSON for each request on standard output."""
        if not self.access_log:
            return
        request = task.request
        now = time.time_ns() // 1_000_000
        milliseconds = (time.monotonic() - request.arrived) * 1000
        line = (
            f'{{"time": "{second(now // 1000)}.{now % 1000:03}Z", "method": "{request.command}",'
            f' "target": {json_string(request.request_uri)}, "status": {task.status[:3] or 0},'
            f' "bytes": {task.bytes_sent}, "ms": {milliseconds:.3f},'
            f' "caller": "{self.application.caller(request, task.channel.addr[0])}",'
            f' "request_id": "{request.id}"}}\n'
        )
        try:
            os.write(1, line.encode())
        except OSError:  # nobody reads the log: no reason to stop serving
            self.access_log = False


class Lifeline:
    """The end of a pipe whose other end the supervisor holds: it ends when the supervisor does."""

    def __init__(self, descriptor: int, server: Server) -> None:
        self._fileno = descriptor
        self.events = 0
        self.server = server
        server.watched[descriptor] = self

    def handle_read_event(self) -> None:
        del self.server.watched[self._fileno]
        self.server.stop()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False


@lru_cache(2)
def second(now: int) -> str:
    """Seconds since 1970 as a date and a time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))


def connection_limit() -> int:
    """How many clients a worker lets in at once: as many as it may have descriptors for, each with
    one to the upstream."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard == resource.RLIM_INFINITY or hard > 65536:
            hard = 65536
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
        soft = max(soft, hard)
    except (ImportError, ValueError, OSError):
        soft = 1024
    return max(64, (soft - SPARE_DESCRIPTORS) // 2)


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, but does not listen before a worker is ready. Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
    try:
        sock.bind(address)
        return sock
    except OSError:
        sock.close()
        raise


def let_nobody_in(listener: socket.socket) -> None:
    """Have the kernel ignore new connections, so that the queue can be emptied before the socket is
    closed: who knocks then is refused when they knock again. Elsewhere than on Linux who comes
    between the two is turned out."""
    if sys.platform == "linux":
        # A packet filter of one instruction, BPF_RET 0: drop. See filter.txt of the kernel.
        drop = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
        program = struct.pack("HP", 1, ctypes.addressof(drop))
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def serve(
    application: Application,
    listener: socket.socket,
    *,
    workers: int,
    lanes: dict[str, int],
    shutdown_timeout: float,
    access_log: bool,
) -> int:
    """Serve on `listener`, which is bound, until SIGTERM or SIGINT and return an exit code.

    `lanes` says how many threads each kind of request has in a worker; `shutdown_timeout` is how
    many seconds requests under way have to end.
    """

    # So that services of one worker each do not all choose the same core.
    first_core = os.getpid()

    def work(number: int, lifeline: int | None) -> None:
        pin(first_core + number)
        application.join(number)
        server = Server(application, listener, lanes, shutdown_timeout, access_log)
        if lifeline is not None:
            Lifeline(lifeline, server)
            server.alone = False
        on_signals(server.stop, interrupt=lifeline is None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        server.run()
        application.close()

    if workers == 1:
        work(0, None)
        return 0
    return Supervisor(work, workers, listener, shutdown_timeout).run()


def pin(number: int) -> None:
    """Keep this process on one core, each worker on another. Handing the interpreter's lock from a
    thread on one core to a thread on another costs as much as all the rest of a request."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def on_signals(stop: Callable[[], None], *, interrupt: bool) -> None:
    """Call `stop` at the first SIGTERM; end at once at the second. SIGINT does the same where
    `interrupt`; in a worker it is ignored, for the terminal sends it to the supervisor too."""
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if seen:
            os._exit(1)
        seen.append(number)
        stop()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle if interrupt else signal.SIG_IGN)


class Supervisor:
    """Keeps `count` forked workers running until it is told to stop."""

    def __init__(
        self,
        work: Callable[[int, int | None], None],
        count: int,
        listener: socket.socket,
        shutdown_timeout: float,
    ) -> None:
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
                sys.stdout.flush()
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
            yield *self.running.pop(process), os.waitstatus_to_exitcode(status)

    def replace(self) -> None:
        for worker, since, code in self.ended():
            log.error("worker %d ended (%s)", worker, f"signal {-code}" if code < 0 else code)
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
