"""Waitress, run so that no request waits for another kind's trouble: the event loop, and lanes."""

from __future__ import annotations

import logging
import select
import selectors
import socket
import time
from collections.abc import Iterable
from typing import Any, Protocol

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.server import TcpWSGIServer

from metrics import AWAKE, CLIENTS, Board
from problems import Problem
from server.channel import Channel
from server.lanes import Lane
from server.listener import connection_limit, let_nobody_in
from server.logs import Output, access_line, quoted
from server.parser import RequestParser
from server.task import Task
from wire.fields import Field

log = logging.getLogger("gatehouse")

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

BACKLOG = 1024
# While it drains, a connection that has brought no request yet has this many seconds to bring one:
# its client was let in, and may have sent one already.
FIRST_REQUEST_SECONDS = 1.0
# A worker lets the others be first for this many seconds for each client that one of them has
# fewer, up to a limit: it may be starting, or waiting for the processor. Whichever woke first would
# take them all, and refuse what is over its share of the upstream's places.
GIVE_WAY_SECONDS = 0.005
MOST_GIVE_WAY_SECONDS = 0.025
# So often in a row, while the others' numbers of clients stay as they are: they may all be stopped.
MOST_IN_VAIN = 20
# A worker lets nobody in before the others are awake, or before this many seconds have passed.
WAKING_SECONDS = 1.0
# At its end a worker waits this many seconds for a log's reader.
LOG_SECONDS = 1.0


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
        self.access_log = Output(1) if access_log else None
        # With what logging writes to, which has lines of its own that may wait.
        streams = [getattr(handler, "stream", None) for handler in logging.root.handlers]
        outputs = {"access log": self.access_log, "log": next(iter(streams), None)}
        self.outputs = {name: one for name, one in outputs.items() if isinstance(one, Output)}
        self.watched = Watched(selectors.DefaultSelector())
        self._deadline = 0.0
        self._grace = 0.0
        self._tick_at = 0.0
        self._gives_way_until = 0.0
        self._others: tuple[int, ...] = ()
        self._in_vain = 0
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
        """Let a client in, or give way to a worker that has fewer. Once, for it may not be awake,
        and not for ever to workers that let nobody in."""
        clients, others = self._count_clients(), self.application.board.others(CLIENTS)
        if others != self._others:
            self._others, self._in_vain = others, 0
        elif self._gives_way_until:
            self._in_vain += 1
        fewer = clients - min(others, default=clients)
        giving = self._gives_way_until or self.draining or self._in_vain >= MOST_IN_VAIN
        if fewer > 0 and not giving:
            seconds = min(fewer * GIVE_WAY_SECONDS, MOST_GIVE_WAY_SECONDS)
            self._gives_way_until = time.monotonic() + seconds
            return
        self._gives_way_until = 0.0
        super().handle_accept()

    def accept(self) -> tuple[socket.socket, Any] | None:
        try:
            accepted: tuple[socket.socket, Any] | None = super().accept()
            return accepted
        except OSError:
            # No descriptor is free. Who waits goes on waiting, and the selector would go on saying
            # so: look again in a while.
            self._gives_way_until = time.monotonic() + MOST_GIVE_WAY_SECONDS
            return None

    def _count_clients(self) -> int:
        clients = len(self.active_channels)
        self.application.board.set(CLIENTS, clients)
        return clients

    def fix_addr(self, addr: tuple[str, int]) -> tuple[str, int]:
        # A socket that listens on IPv6 for both shows IPv4 clients in IPv6's clothes.
        return addr[0].removeprefix("::ffff:"), addr[1]

    def add_task(self, task: Channel) -> None:
        request = task.requests[0]
        request.arrived = request.arrived or time.monotonic()  # not again when it goes on
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
        self._await_others()
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
                self._see_to_logs()
            if self.draining:
                self._close_idle(now)
            elif self.stopping:
                self._drain(now)
        for channel in list(self.active_channels.values()):
            channel.reset_on_close()  # an answer that is cut here must not look whole
            channel.will_close = False
            channel.handle_close()
        self._see_to_logs(min(LOG_SECONDS, max(0.0, self._deadline - time.monotonic())))

    def _see_to_logs(self, seconds: float = 0.0) -> None:
        for name, output in self.outputs.items():
            output.finish(seconds)
            if dropped := output.dropped():
                log.warning("%d lines of the %s were dropped, for nobody took them", dropped, name)

    def _await_others(self) -> None:
        # Whoever knocks first knows nothing of workers: the first of them would take all.
        board, until = self.application.board, time.monotonic() + WAKING_SECONDS
        board.set(AWAKE, 1)
        while not (self.stopping or all(board.others(AWAKE)) or time.monotonic() > until):
            time.sleep(0.005)

    def _close_expired(self, now: float) -> None:
        for channel in list(self.active_channels.values()):
            if channel.will_close or channel.expired(now):
                if channel.stalled or channel.parked is not None:
                    channel.reset_on_close()  # or what it has of an answer may look whole
                channel.refused = False
                channel.will_close = True
                channel.handle_close()
            elif channel.has_left():
                channel.leave()

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
        while waiting.poll(0) and not self._gives_way_until:
            self.handle_accept()
        self._gives_way_until = 0.0
        wasyncore.dispatcher.close(self)
        for channel in list(self.active_channels.values()):
            if channel.readable():
                wasyncore.read(channel)  # a request that is here already is under way
        self._close_idle(now)

    def _close_idle(self, now: float) -> None:
        for channel in list(self.active_channels.values()):
            busy = channel.requests or channel.request is not None or channel.lingering
            if channel.connected and not busy and (channel.served or now >= self._grace):
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
            quoted(request.request_uri),
            error if unexpected is None else type(error).__name__,
            request.id,
            exc_info=unexpected,
        )

    def log_access(self, task: Task) -> None:
        """Write the access log's line of a request."""
        if self.access_log is not None:
            request = task.request
            caller = self.application.caller(request, task.channel.addr[0])
            self.access_log.write(access_line(request, task.status, task.bytes_sent, caller))
