"""The connections to the upstream, which the loop watches and keeps."""

from __future__ import annotations

import logging
import select
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from metrics import IN_FLIGHT, OUTCOME_AT, STREAMS, UNHEARD, Board
from problems import Problem, UpstreamBusy, UpstreamUnreachable
from server.connector import Attempt, UpstreamConnector, was_refused
from server.lanes import Lane
from server.logs import Seldom
from server.loop import NEVER, Loop, Timer
from server.stream import Stream, reset_at_close

log = logging.getLogger("gatehouse")

# A request that must not be sent twice goes on a kept connection only if that was in use at most
# this many seconds ago. The shorter it was idle, the less likely is the upstream just closing it.
FRESH_SECONDS: Final = 1.0
# An upstream may keep idle connections for less than that, or not at all, and say so nowhere. After
# it has closed one so early, it is not trusted to keep any for this many seconds.
WARY_SECONDS: Final = 60.0
NEVER_YET: Final = -WARY_SECONDS
# Whoever ends a connection first keeps its port: until the other side has ended it too, a minute at
# most, and for a minute after that (TIME_WAIT). To one address there are 28,000 ports. All workers
# together end so many first in PORT_SECONDS; more are reset, which leaves their ports free.
# Otherwise a client that asks and leaves, or asks with HEAD after HEAD, could use all of them up.
ENDED_FIRST: Final = 14000
PORT_SECONDS: Final = 120.0
# An upstream that has announced the end of a connection has this many seconds to end it first.
LEAVING_SECONDS: Final = 1.0


class Waiting(Protocol):
    """An exchange that waits for a connection."""

    def connected(self, connection: Connection) -> None:
        """The connection that was asked for."""

    def unconnected(self, problem: Problem, refused: bool) -> None:
        """No connection could be made, and why; `refused` says that nobody listens."""


class Carried(Protocol):
    """An exchange or a tunnel, as far as its connection to the upstream is concerned."""

    def from_upstream(self, data: bytes) -> None:
        """Bytes of the answer."""

    def upstream_ended(self) -> None:
        """No more bytes of the answer come."""

    def upstream_failed(self) -> None:
        """The connection is broken."""

    def upstream_progressed(self) -> None:
        """The upstream has taken some of what was sent."""

    def upstream_drained(self) -> None:
        """The upstream has taken all that was sent."""

    def abandon(self) -> None:
        """A method of it failed, which never should happen: end it."""


class Connection(Stream):
    """One connection to the upstream: an exchange's, or kept for the next one.

    `used` says whether it has been kept before, and `idle_for` for how many seconds; `heard` says
    whether anything has ever come on it, `stopped_reading` whether the upstream did so before it
    had all of a request. `client` is set if the connection was authenticated: then it carries only
    that client's requests.
    """

    __slots__ = (
        "_poller",
        "client",
        "exchange",
        "heard",
        "idle_for",
        "idle_since",
        "stopped_reading",
        "straight",
        "upstream",
        "used",
    )

    def __init__(self, loop: Loop, sock: Any, upstream: Upstream) -> None:
        super().__init__(loop, sock)
        self.upstream = upstream
        self.exchange: Carried | None = None
        self.client: object | None = None
        self.used = False
        self.heard = False
        self.stopped_reading = False
        # What passes on what arrives without looking at it, or is False if that cannot be done now.
        self.straight: Callable[[Connection], bool] | None = None
        self.idle_for = 0.0
        self.idle_since = 0.0
        self._poller: select.poll | None = None  # what tells whether the connection is silent
        self.watch()

    def _read(self) -> None:
        if self.straight is None or not self.straight(self):
            super()._read()

    def received(self, data: bytes) -> None:
        if not self.heard:
            self.heard = True
            self.upstream.heard(self)
        if self.exchange is None:
            # These bytes belong to no request: they would be taken for the answer to the next one.
            self.upstream.closed(self)
        else:
            self.exchange.from_upstream(data)

    def ended(self) -> None:
        if self.exchange is None:
            self.upstream.closed(self)  # No request may be sent on a closed connection.
        else:
            self.exchange.upstream_ended()

    def failed(self) -> None:
        if self.exchange is None:
            self.upstream.closed(self)
        else:
            self.exchange.upstream_failed()

    def abandon(self) -> None:
        if self.exchange is None:
            self.upstream.discard(self)
        else:
            self.exchange.abandon()

    def unsendable(self) -> None:
        """The upstream reads no more. Go on reading from it: it may have answered before that (RFC
        9112 section 9.3)."""
        self.stopped_reading = True
        self.stop_sending()

    def progressed(self) -> None:
        if self.exchange is not None:
            self.exchange.upstream_progressed()

    def drained(self) -> None:
        if self.exchange is not None:
            self.exchange.upstream_drained()

    @property
    def silent(self) -> bool:
        """Whether nothing has come since the last answer: no bytes, which would be taken for the
        next answer, and no end. The loop may not have reported them yet. What follows a large body
        is not read with it, and the next request may be in the same turn of the loop."""
        if self.closed or (self.tls and self.sock.pending()):
            return False
        if self._poller is None:
            self._poller = select.poll()
            self._poller.register(self._fd, select.POLLIN)
        return not self._poller.poll(0)

    @property
    def untouched(self) -> bool:
        """Whether neither side has ended its half."""
        return not (self.closed or self.ended_reading or self._ending)

    def _end_sending(self) -> None:
        # As `Upstream.discard` does: to end the half first costs the port too.
        if self.ended_reading or self.upstream.may_end_first():
            super()._end_sending()
        else:
            reset_at_close(self.sock)
            self._broke()

    def release(self, *, keep: bool, leaving: bool = False) -> None:
        """The exchange needs it no more: keep it for another, or close it. If the upstream is
        `leaving`, it has announced that it ends this connection."""
        self.exchange = None
        self.straight = None
        at_rest = not (
            self.closed or self.ended_reading or self.stopped_reading or self.queued or self.paused
        )
        if keep and at_rest:
            self.upstream.keep(self)
        elif leaving and at_rest:
            self.upstream.await_end(self)
        else:
            self.upstream.discard(self)


class Upstream:
    """The upstream's connections in this worker, and how many requests are with it.

    `limit` is how many may be with it at once. Times are in seconds: `connect_timeout` for the
    look-up of the name, connecting and TLS together, `keepalive` how long an idle connection is
    kept.
    """

    def __init__(
        self,
        loop: Loop,
        lane: Lane,
        connector: UpstreamConnector,
        *,
        limit: int,
        connect_timeout: float,
        keepalive: float,
        board: Board,
    ) -> None:
        self.loop = loop
        self.limit = limit
        self.connect_timeout = connect_timeout
        self.in_flight = 0
        self.streams = 0
        self.make_room: Callable[[], None] = lambda: None
        self._lane = lane
        self._connector = connector
        self._keepalive = keepalive
        self._board = board
        self._connections: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # the one that was used last is the last
        self._own: dict[object, Connection] = {}  # kept too, each for one client alone
        self._leaving: dict[Connection, None] = {}  # those that the upstream is to end
        self._expiry = Timer(loop, self._expire)
        self._at_limit = Seldom()
        self._closed_early = NEVER_YET  # when the upstream last closed one within FRESH_SECONDS
        self._early = 0.0  # and for how many seconds that one had been idle
        # Connections on which nothing has come yet, with the moment at which they were made.
        self._unheard: dict[Connection, float] = {}
        # When we last ended a connection before the upstream did, for as many as we may.
        workers = len(board.each(IN_FLIGHT))
        self._ended_first: deque[float] = deque(maxlen=max(1, ENDED_FIRST // workers))
        self._to_close = 0  # how many that become idle are to be closed: see `look`
        self._last_outcome = 0  # when a request was answered, or failed, as it was at the last look

    # How many requests are with it.

    def enter(self) -> None:
        """Count one more request. Raises UpstreamBusy if that is one too many."""
        if self.in_flight >= self.limit:
            if self._at_limit.due():
                log.warning(
                    "%d %s with the upstream, which is the limit: others are told 503",
                    self.limit,
                    "request is" if self.limit == 1 else "requests are",
                )
            raise UpstreamBusy
        self.in_flight += 1
        self._board.set(IN_FLIGHT, self.in_flight)

    def leave(self) -> None:
        """Count one less."""
        self.in_flight -= 1
        self._board.set(IN_FLIGHT, self.in_flight)

    def outcome(self, *, up: bool) -> None:
        """Note how a request went, for /health."""
        self._board.forwarded(up)

    def count_streams(self, change: int) -> None:
        """Count one event stream or tunnel more, or less."""
        self.streams += change
        self._board.set(STREAMS, self.streams)

    # Connections.

    def take(self, *, repeatable: bool, client: object = None) -> Connection | None:
        """A connection that was kept and that a request of `client` may use; None if there is none.
        One that was kept for this client alone comes first. Of the others, a request that is not
        `repeatable`, so that it must not be sent twice, gets only one that was in use a moment ago:
        see FRESH_SECONDS, and `is_wary`."""
        if self._own and (own := self._own.get(client)) is not None:
            if not own.silent or self.loop.now - own.idle_since >= self._keepalive:
                self.discard(own)
                return None
            del self._own[client]
            own.used = True
            own.idle_for = self.loop.now - own.idle_since
            return own
        while self._idle:
            connection = next(reversed(self._idle))
            idle = self.loop.now - connection.idle_since
            if idle >= self._keepalive:
                self._expire()
                continue
            if not repeatable and (idle > FRESH_SECONDS or self.is_wary()):
                return None
            if not connection.silent:
                self.closed(connection)
                continue
            del self._idle[connection]
            connection.used = True
            connection.idle_for = idle
            return connection
        return None

    def is_wary(self) -> bool:
        """Whether the upstream may just be closing a connection that was in use a moment ago. It is
        trusted again as soon as one was kept for longer than FRESH_SECONDS, or has answered after
        it was idle for longer than the one that was closed: a restart closes all at any age."""
        now = self.loop.now
        if now - self._closed_early >= WARY_SECONDS:
            return False
        oldest = next(iter(self._idle), None)
        if oldest is not None and now - oldest.idle_since > FRESH_SECONDS and oldest.silent:
            self._closed_early = NEVER_YET
            return False
        return True

    def learn(self, idle: float) -> None:
        """The upstream closed a connection that had been idle for so many seconds."""
        if idle <= FRESH_SECONDS:
            self._closed_early, self._early = self.loop.now, idle

    def closed(self, connection: Connection) -> None:
        """One that was kept is of no use any more: the upstream has closed it, or has sent bytes
        that nobody asked for."""
        if connection in self._idle:
            self.learn(self.loop.now - connection.idle_since)
        self.discard(connection)

    def connect(self, exchange: Waiting) -> Attempt:
        """Make a connection for an exchange, whose `connected` or `unconnected` is called then.

        Those that are kept count too, and those that the upstream is to end: there are never more
        than `limit`. Anybody may send a header that gives a client a connection of its own, and
        these could take all that there are."""
        while self.in_flight + self._without_exchange > self.limit:
            if not (self.drop_one() or self.drop_one(own=True)):
                break
        self.make_room()
        attempt = Attempt()
        self._lane.add(lambda: self._connect(exchange, attempt))
        return attempt

    def _connect(self, exchange: Waiting, attempt: Attempt) -> None:
        """On a helper thread: give the loop a connected socket, or the reason why there is none."""
        if attempt.given_up:
            return
        try:
            sock = self._connector.connect(self.connect_timeout, attempt)
        except Problem as problem:
            self.loop.call(exchange.unconnected, problem, was_refused(problem))
            return
        self.loop.call(self._connected, sock, exchange, attempt)

    def _connected(self, sock: Any, exchange: Waiting, attempt: Attempt) -> None:
        if attempt.given_up:  # Its client has left since. There may be as many as `limit` already.
            reset_at_close(sock)
            sock.close()
            return
        try:
            connection = Connection(self.loop, sock, self)
        except OSError as error:  # The kernel has no memory to watch it.
            sock.close()
            problem = UpstreamUnreachable()
            problem.__cause__ = error  # mypyc drops the cause of `raise ... from`.
            self.loop.attempt(exchange.unconnected, problem, False)
            return
        self._connections.add(connection)
        self._unheard[connection] = self.loop.now
        # A request that must not be sent twice makes a new connection though others are idle. One
        # of these goes instead. Otherwise a few such requests a second took all connections that
        # the upstream has.
        oldest = next(iter(self._idle), None)
        if oldest is not None and self.loop.now - oldest.idle_since > FRESH_SECONDS:
            self.discard(oldest)
        elif len(self._idle) > 1 and self.is_wary():
            # The oldest stays: it shows whether the upstream keeps it.
            self.discard(next(reversed(self._idle)))
        self.loop.attempt(exchange.connected, connection)

    def heard(self, connection: Connection) -> None:
        """Something has come on a connection for the first time."""
        self._unheard.pop(connection, None)

    @property
    def _without_exchange(self) -> int:
        """How many connections no request uses: those that are kept, and those that the upstream is
        to end."""
        return len(self._idle) + len(self._own) + len(self._leaving)

    @property
    def open(self) -> int:
        """How many connections there are, kept ones included."""
        return len(self._connections)

    def look(self) -> None:
        """Once a second, if a request has waited for longer on a connection on which nothing has
        ever come: for each request that waits so, of any worker, close a connection that is idle,
        or becomes idle next. If others are answered meanwhile, close one in all.

        A server that serves one connection at a time, or as many as it has processes, may read from
        an idle one while requests wait on others, which it has not accepted. But the upstream may
        also just take its time."""
        oldest = next(iter(self._unheard.values()), NEVER)
        self._board.set(UNHEARD, len(self._unheard) if oldest < self.loop.now - 1.0 else 0)
        unheard, last_outcome = self._board.total(UNHEARD), max(self._board.each(OUTCOME_AT))
        self._to_close = unheard if last_outcome == self._last_outcome else min(unheard, 1)
        self._last_outcome = last_outcome
        while self._to_close and (idle := next(iter(self._idle), None)) is not None:
            self.discard(idle)
            self._to_close -= 1

    def keep(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        connection.idle_since = self.loop.now
        if connection.idle_for > self._early:
            self._closed_early = NEVER_YET
        if connection.client is None:
            if self._to_close:
                self._to_close -= 1
                self.discard(connection)
                return
            self._idle[connection] = None
        else:
            self._own[connection.client] = connection
        self._expiry.set(min(self._expiry.when, self.loop.now + self._keepalive))

    def await_end(self, connection: Connection) -> None:
        """Leave it to the upstream to end a connection first."""
        connection.idle_since = self.loop.now
        self._leaving[connection] = None
        self._expiry.set(min(self._expiry.when, self.loop.now + LEAVING_SECONDS))

    def discard(self, connection: Connection) -> None:
        """Close a connection, kept or not. One that broke may be discarded twice: before its
        `failed` is called, and then by that."""
        if connection.client is not None:
            if self._own.get(connection.client) is connection:
                del self._own[connection.client]
        else:
            self._idle.pop(connection, None)
        connection.close(reset=connection.untouched and not self.may_end_first())
        self._leaving.pop(connection, None)
        self._connections.discard(connection)
        self._unheard.pop(connection, None)

    def may_end_first(self) -> bool:
        """Count one more connection that we end before the upstream does. False if there have been
        so many that it is to be reset: see ENDED_FIRST."""
        ended = self._ended_first
        if len(ended) == ended.maxlen and self.loop.now - ended[0] < PORT_SECONDS:
            return False
        ended.append(self.loop.now)
        return True

    def forget(self, client: object) -> None:
        """A client has left: close the connection that was kept for it alone."""
        if self._own and (own := self._own.get(client)) is not None:
            self.discard(own)

    def drop_one(self, *, own: bool = False) -> bool:
        """Close the one that has been idle longest, of those that the upstream is to end, then of
        those that are for any client; or of those that are each one client's `own`. False if there
        is none."""
        kept = next(iter(self._own.values() if own else self._leaving or self._idle), None)
        if kept is not None:
            self.discard(kept)
        return kept is not None

    def _expire(self) -> None:
        """Close the connections that have been idle for too long."""
        for idle, seconds in (
            (self._idle, self._keepalive),
            (self._own.values(), self._keepalive),
            (self._leaving, LEAVING_SECONDS),
        ):
            while (oldest := next(iter(idle), None)) is not None:  # It is the first, in all three.
                until = oldest.idle_since + seconds
                if self.loop.now < until:
                    self._expiry.set(min(self._expiry.when, until))
                    break
                self.discard(oldest)

    def close(self) -> None:
        """Close the connections that no request uses."""
        while self.drop_one() or self.drop_one(own=True):
            pass
