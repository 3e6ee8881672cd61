"""The desk of a worker, to which its clients come: it gives each request to its responder, counts
it, and makes its line of the access log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from metrics import CLIENTS, Board
from problems import BodyTooLarge, Problem
from server.client import Client
from server.exchange import Exchange, Rules
from server.jobs import Job
from server.lanes import Lane
from server.logs import access_line
from server.loop import NEVER, Loop
from server.options import Options
from server.upstream import Upstream
from wire.request import ABSURD_BYTES, Head

# After an answer of the application's with more bytes than this, freed memory is given back.
LARGE_ANSWER_BYTES: Final = 1 << 20


class Served(Protocol):
    """What is served: a WSGI application, and the rules by which the server treats each request."""

    board: Board

    @property
    def rules(self) -> Rules:
        """What the proxy does to heads."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """The application itself, for the requests that are not proxied."""

    def admit(self, head: Head) -> tuple[str, int]:
        """The lane of a request ("proxy", or one of the threads'), and how many bytes its body may
        have (0: any number). Raises the Problem to refuse it with."""

    def owner(self, head: Head) -> str:
        """The name under which the metrics count a request: one of metrics.OWNERS."""

    def caller(self, head: Head, peer: str) -> str:
        """The client's address as the access log names it."""


class Desk:
    """`clients` are the connections that are open. If `logs`, `lines` are those of the access log
    that have yet to be written. `was_large` says that the application has given a large answer. The
    rest is what its clients know of it: see `client.ClientDesk`. `answer` asks the application, on
    a thread of the job's lane."""

    def __init__(
        self,
        loop: Loop,
        served: Served,
        options: Options,
        upstream: Upstream,
        lanes: dict[str, Lane],
        answer: Callable[[Job], None],
    ) -> None:
        self.loop = loop
        self.keepalive = options.keepalive
        self.client_timeout = options.client_timeout
        self.draining = False
        self.clients: set[Client] = set()
        self.logs = options.access_log
        self.lines: list[str] = []
        self.was_large = False
        self._served = served
        self._rules = served.rules
        self._board = served.board
        self._upstream = upstream
        self._patience = options.patience
        self._lanes = lanes
        self._streamed = options.streamed
        self._waits = options.waits
        self._answer = answer

    def came(self, client: Client) -> None:
        """A client has connected."""
        self.clients.add(client)
        self._board.set(CLIENTS, len(self.clients))

    def respond(self, client: Client, head: Head) -> None:
        """Give a request to a responder: an Exchange or a Job. Raises the Problem to refuse it
        with."""
        lane, largest = self._served.admit(head)
        client.lane = lane
        if self.logs:
            head.caller = self._served.caller(head, client.peer[0])
        most = largest or ABSURD_BYTES - 1
        if head.length is not None and head.length > most:
            raise BodyTooLarge(most)
        if lane == "proxy":
            exchange = Exchange(
                client, head, client.peer[0], self._upstream, self._rules, self._patience, largest
            )
            client.responder = exchange
            exchange.start()
            return
        streamed = lane in self._streamed
        job = Job(
            client,
            head,
            self._lanes[lane],
            self._answer,
            largest=largest,
            streamed=streamed,
            holds=streamed and self._rules.trusts(client.peer[0]),
            arrived=client.arrived,
            patience=self._waits.get(lane, NEVER),
        )
        client.responder = job
        job.start()

    def begun(self, client: Client, head: Head, status: int, seconds: float) -> None:
        """Count a request just before its answer is sent: a client that has it finds it counted."""
        owner = "proxy" if client.lane == "proxy" else self._served.owner(head)
        self._board.request(owner, head.method, status, seconds)

    def answered(self, client: Client, head: Head) -> None:
        """A request is over: make its line of the access log."""
        if client.sent > LARGE_ANSWER_BYTES and client.lane != "proxy":
            self.was_large = True
        if self.logs:
            caller = head.caller or self._served.caller(head, client.peer[0])
            seconds = time.monotonic() - client.arrived
            self.lines.append(access_line(head, client.status, client.sent, seconds, caller))

    def take_lines(self) -> list[str]:
        """The lines that have yet to be written: whoever takes them writes them."""
        lines, self.lines = self.lines, []
        return lines

    def refused(self, problem: Problem) -> None:
        """A request is about to be answered with a problem."""
        self._board.problem(problem.name)

    def left(self, client: Client) -> None:
        """A client's connection is closed."""
        self.clients.discard(client)
        self._upstream.forget(client)
        self._board.set(CLIENTS, len(self.clients))
