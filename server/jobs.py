"""Jobs: requests that are answered on threads, which get values and give values back.

A `Job` is given the request's body, and what the application answers comes back to the loop, which
alone writes to the client. server/wsgi.py asks the application.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

from problems import DatabaseUnavailable, Problem
from server.inbox import Inbox, Left
from server.lanes import Lane
from server.logs import asked
from server.loop import NEVER, Loop, Timer
from server.stream import HIGH_WATER
from wire.chunks import fault_of
from wire.headers import Header, lowered, text_of
from wire.request import Head

log = logging.getLogger("gatehouse")

# How much of an answer may wait for a client that is still sending its body.
UNTAKEN_BYTES: Final = 33554432
# If a body is read while it arrives, and does not say how long it is, its job begins when it is
# complete, or after this many seconds. So the application sees all of a short one at once.
MOMENT_SECONDS: Final = 0.1
# What the client of a job is told that has waited for a thread for too long.
ALL_HELD: Final = "As many imports and exports as there may be are under way. Try again later."


class JobClient(Protocol):
    """The client, as far as its job is concerned."""

    loop: Loop
    peer: tuple[str, int]
    deadline: Timer

    @property
    def queued(self) -> int: ...
    @property
    def paused(self) -> bool: ...
    @property
    def held(self) -> int: ...
    @property
    def draining(self) -> bool: ...

    def begin(self, status: str, lines: bytes, *, length: int | None, dated: bool) -> None: ...
    def write(self, piece: bytes, *, hold: bool = False) -> None: ...
    def finish(self) -> None: ...
    def refuse(self, problem: Problem) -> None: ...
    def cut(self) -> None: ...
    def ask_for_body(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def hang_up(self, *, reset: bool = False) -> None: ...


def take(waiting: list[Callable[[], None]]) -> Callable[[], None] | None:
    """Take the work out of the list. The first caller gets it, all others None."""
    try:
        return waiting.pop()
    except IndexError:
        return None


def begin(waiting: list[Callable[[], None]]) -> None:
    """Do what waits in the list, unless it was given up."""
    work = take(waiting)
    if work is not None:
        work()


class Job:
    """One request that the application answers: it reads the body, and its answer comes by
    `give_whole`, or by `give_head`, `give_and_wait` and `give_end`.

    `answer` is called on a thread of the lane, with this job: it gives the answer, or raises Left,
    a Problem, or what else went wrong. `largest` is how many bytes the body may have (0: any
    number). If it is `streamed`, the application begins when the head is complete, or
    MOMENT_SECONDS later, and reads the body while it arrives. If it `holds`, nothing of its answer
    goes out before all of the body is there, or before UNTAKEN_BYTES of answer have gathered: once
    nginx has begun to pass an answer on, it sends no more of a body than fits into the sockets.
    `patience` is how many seconds it may wait for a thread. It is not begun when that time is over,
    or when its client has gone.
    """

    over = False

    def __init__(
        self,
        client: JobClient,
        head: Head,
        lane: Lane,
        answer: Callable[[Job], None],
        *,
        largest: int,
        streamed: bool,
        holds: bool,
        arrived: float,
        patience: float = NEVER,
    ) -> None:
        self.client = client
        self.head = head
        self.lane = lane
        # The work, until a thread begins it or it is given up: whoever takes it out of the list
        # first. The lane has only the list, so that it keeps nothing alive that was given up.
        self._waiting: list[Callable[[], None]] = []
        self._patience = patience
        self._answer = answer
        self.arrived = arrived
        self.body = head.body()
        self._largest = largest
        self._gathered = bytearray()  # Not a list of the pieces, for the same reason as in Inbox.
        self._holds = holds
        self.input: Any = None
        self._begun = False
        self._inbox: Inbox | None = None
        self._taken: threading.Event | None = None  # set when the client has taken what was written
        if streamed and self.body is not None:
            self._inbox = Inbox(lambda: client.loop.call(client.resume))
            self.input = io.BufferedReader(self._inbox, 65536)

    def start(self) -> None:
        """Begin, on the loop's thread."""
        if self.body is None or (self._inbox is not None and self.head.length is not None):
            self._run()
        elif self._inbox is not None:
            self.client.deadline.action = self._run
            self.client.deadline.set(self.client.loop.now + MOMENT_SECONDS)
        if self.body is not None and self.head.expects:
            self.client.ask_for_body()

    def from_client(self, data: bytes) -> bytes:
        """Take bytes of the body; returns what follows it."""
        assert self.body is not None
        piece, rest = self.body.feed(data)
        fault = fault_of(self.body, self._largest)
        if fault is not None:
            self._refuse(fault)
        elif self._inbox is not None:
            full = bool(piece) and not self._inbox.put(piece)
            if full:
                self.client.pause()
            if self.body.complete:
                self._inbox.put_end()
            if (full or self.body.complete) and not self._begun:
                self._run()
        else:
            self._gathered += piece
            if self.body.complete:
                self.arrived = self.client.loop.now
                self._run()
        return rest

    @property
    def length(self) -> int | None:
        """How many bytes the body has, if that is known: of one in chunks, when all are there."""
        body = self.body
        return body.announced if body is not None and body.complete else self.head.length

    @property
    def wants_body(self) -> bool:
        return self.body is not None and not self.body.complete

    @property
    def hurries_client(self) -> bool:
        """An import that has begun to answer holds a thread until it has all of its body."""
        return self.wants_body

    def client_drained(self) -> None:
        self._let_go_on()

    def _let_go_on(self) -> None:
        if self._taken is not None:
            self._taken.set()

    def client_ended(self) -> None:
        """The client sends no more. It may still read, and the answer is nearly ready."""
        # While the client is paused, its last bytes are not read yet. Its end comes again then.
        if self.wants_body and not self.client.paused:
            self.client.cut()

    def settled(self) -> None:
        """The client has its answer, or is gone."""
        self.over = True
        self._waiting.clear()
        if self._patience < NEVER or self._inbox is not None:
            self.client.deadline.cancel()
            self.client.deadline.action = None
        if self._inbox is not None:
            self._inbox.put_end(cut=True)
        self._let_go_on()

    def _refuse(self, problem: Problem) -> None:
        self.over = True
        self.client.refuse(problem)

    def _run(self) -> None:
        if self.over:
            return  # It was refused before the application began.
        self._begun = True
        if self.input is None:
            self.input = io.BytesIO(self._gathered)
            self._gathered = bytearray()
        self._waiting.append(self._work)
        self.lane.add(partial(begin, self._waiting))
        if self._patience < NEVER:
            self.client.deadline.action = self._give_up
            self.client.deadline.set(self.client.loop.now + self._patience)
        elif self._inbox is not None:
            self.client.deadline.cancel()

    def _give_up(self) -> None:
        """Its time is over. If it has not begun, it never will."""
        if take(self._waiting):
            self._refuse(DatabaseUnavailable(ALL_HELD))

    # On the lane's thread.

    def _work(self) -> None:
        try:
            self._answer(self)
        except Left:
            pass
        except Problem as problem:  # In the middle of an answer, which can only be cut.
            self.client.loop.call(self._told, self._refuse, (problem,))
        except BaseException:  # SystemExit too: nobody else would answer.
            log.exception("%s request_id=%s", asked(self.head), self.head.id)
            self.client.loop.call(self._told, self._refuse, (Problem(),))

    def tell(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the loop call a function for the client. Raises Left if the client has gone."""
        if self.over:
            raise Left
        self.client.loop.call(self._told, function, arguments)

    def _told(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if not self.over:
            function(*arguments)

    def abandon(self) -> None:
        """A method of it failed, which never should happen: end it. The loop calls this."""
        self.client.hang_up(reset=True)

    def give_whole(self, status: str, headers: list[Header], body: bytes) -> None:
        """The whole answer, on the loop's thread."""
        self.give_head(status, headers)
        self.client.write(body)
        self.give_end()

    def give_head(self, status: str, headers: list[Header]) -> None:
        length, dated = None, False
        for name, value in headers:
            key = lowered(name)
            if key == "content-length":
                length = int(value)
            elif key == "date":
                dated = True
        if length is not None and status.startswith("204"):  # RFC 9110 section 8.6
            headers = [one for one in headers if lowered(one[0]) != "content-length"]
        self.client.begin(status, text_of(headers), length=length, dated=dated)

    def give_piece(self, piece: bytes) -> None:
        client = self.client
        reads = self._inbox is not None and self._inbox.is_read and self.wants_body
        if not reads or client.draining or client.held >= UNTAKEN_BYTES:
            self._holds = False
        client.write(piece, hold=self._holds)
        # Many clients read only after they have sent all of their body. If the application waited
        # until such a client reads, it would not take the rest of the body: neither would go on.
        if client.queued < (UNTAKEN_BYTES if reads else HIGH_WATER):
            self._let_go_on()

    def give_end(self) -> None:
        self.over = True
        self.client.finish()

    def give_and_wait(self, piece: bytes) -> None:
        """Give a piece of the body to the loop, and wait until the client has taken enough of what
        was written. Raises Left."""
        self._taken = taken = self._taken or threading.Event()
        taken.clear()
        self.tell(self.give_piece, piece)
        taken.wait()  # A client that takes nothing is cut, and then it is `settled` that ends this.
        if self.over:
            raise Left
