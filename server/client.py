"""One client connection: requests in, one after the other, and their answers out.

It reads heads, hands each request to a responder, writes answers, and ends the connection.
"""

from __future__ import annotations

import enum
import logging
import re
import time
from email.utils import formatdate
from functools import lru_cache
from typing import Any, Final, Protocol

from problems import BadRequest, Problem
from server.logs import asked
from server.loop import LEAVING, NEVER, Loop, Timer
from server.stream import Stream
from wire.chunks import LAST_CHUNK, chunk
from wire.headers import remembering_short, text_of
from wire.ids import request_id
from wire.refusal import own_headers, refusal
from wire.request import Head, end_of_head

log = logging.getLogger("gatehouse")

# A head has this many seconds, plus one for each MIN_BYTES_PER_SECOND that have arrived.
HEAD_SECONDS: Final = 30.0
MIN_BYTES_PER_SECOND: Final = 500
# How often it is looked at whether a client takes anything, in seconds: at least four times before
# it is cut.
READER_LOOK_SECONDS: Final = 15.0
# A client that has sent nothing of its body for this many seconds may be closed to make room.
STILL_SECONDS: Final = 1.0
# The rest of a request that nobody wants is read and thrown away: for LINGER_SECONDS at most, or
# until nothing has come for LINGER_IDLE_SECONDS. To close a socket with unread bytes resets the
# connection, which may destroy the answer before the client has read it (RFC 9112 section 9.6).
LINGER_SECONDS: Final = 30.0
LINGER_IDLE_SECONDS: Final = 2.0
EMPTY_LINES: Final = re.compile(rb"\A(?:\r?\n)++")
# How many requests of one client are begun in one turn, if each is answered at once, as a refused
# one is. 10,000 that came in one piece took half a second, in which nobody else was served.
REQUESTS_AT_ONCE: Final = 16
# If a client sends more bytes than this while it waits for an answer, it is not read until then.
AHEAD_BYTES: Final = 65536
# A piece of a body with more bytes is sent by itself, and not joined to the head before it: that
# would be one more copy of a page of thirty megabytes.
COPIED_BYTES: Final = 65536


class Responder(Protocol):
    """What answers a request: an Exchange with the upstream, which may become a Tunnel, or a Job of
    the application's."""

    @property
    def wants_body(self) -> bool:
        """Whether more of the request's body is to come."""

    @property
    def hurries_client(self) -> bool:
        """Whether the client has only a limited time to send the rest of the body."""

    def from_client(self, data: bytes) -> bytes:
        """Take bytes of the body; returns what follows it."""

    def client_drained(self) -> None:
        """The client has taken all that was written."""

    def client_ended(self) -> None:
        """The client has ended its sending half."""

    def settled(self) -> None:
        """The request is over: the client has all of its answer, or is gone. Called once."""


class ClientDesk(Protocol):
    """The desk of the worker, as far as a client connection is concerned.

    `keepalive` is how many seconds an idle connection is kept. For `client_timeout` seconds a
    client may send nothing of its body, or take nothing of an answer; one that sends slowly but
    steadily is served, as one that reads slowly is. `draining` says whether connections end with
    the present answer.
    """

    loop: Loop
    keepalive: float
    client_timeout: float
    draining: bool

    def respond(self, client: Client, head: Head) -> None:
        """Give the request to a responder. Raises the Problem to refuse it with."""

    def begun(self, client: Client, head: Head, status: int, seconds: float) -> None:
        """The head of an answer is about to be sent, `seconds` after the head of its request was
        complete."""

    def answered(self, client: Client, head: Head) -> None:
        """A request is over."""

    def refused(self, problem: Problem) -> None:
        """A request is about to be answered with a problem."""

    def left(self, client: Client) -> None:
        """The connection is closed."""


class Phase(enum.Enum):
    """What a client connection is doing."""

    READING = "a request is waited for, or its head is arriving"
    ANSWERING = "somebody answers a request, whose body may still be arriving"
    FLUSHING = "an answer is complete, or cut, and the client has yet to take the rest of it"
    LINGERING = "the last answer is sent; what still comes is read and thrown away"
    CLOSED = "the connection is closed"


class Client(Stream):
    """The loop calls `received`, `ended`, `drained` and `failed`; the responder of the present
    request calls `begin`, `write` and `finish`, or `refuse`, or `cut`.

    `arrived` is when the head of the present request was complete, in seconds on the monotonic
    clock. `status` is that of its answer, and `sent` how many bytes of the answer's body were sent.
    """

    __slots__ = (
        "_ahead",
        "_began",
        "_body_left",
        "_chunked",
        "_close",
        "_complete",
        "_desk",
        "_head_out",
        "_held",
        "_linger_until",
        "_moved",
        "_nested",
        "_paused_at",
        "_received",
        "_scanned",
        "_timer",
        "_torn",
        "_tunnel",
        "_unread",
        "_untaken",
        "arrived",
        "deadline",
        "head",
        "idle_since",
        "lane",
        "peer",
        "phase",
        "requests",
        "responder",
        "sent",
        "status",
    )

    def __init__(self, desk: ClientDesk, sock: Any, peer: tuple[str, int]) -> None:
        super().__init__(desk.loop, sock, LEAVING)
        self._desk = desk
        self.peer = peer
        self.phase = Phase.READING
        self.head: Head | None = None  # the request that is being answered
        self.responder: Responder | None = None
        self.lane = ""  # who answers the present request; empty if it is refused before that
        self.requests = 0  # how many are over
        self.arrived = 0.0
        self._ahead = b""  # bytes that have come and are not read yet
        self._scanned = 0  # how many of them have been searched for the end of a head
        # From when on the client's time counts: since the first byte of the present head, or the
        # last one of the present body, later by as long as it was paused or not asked for its body.
        # 0 between requests.
        self._began = 0.0
        self._received = 0  # bytes of the present head, or those that came ahead of it
        self._paused_at = 0.0
        self.idle_since = desk.loop.now
        self._linger_until = 0.0
        self._nested = False
        self._close = False  # whether the connection ends after the present answer
        self._unread = False  # whether bytes are still coming that nobody will read
        self._torn = False  # whether the answer was cut, and only a reset can show that
        self._tunnel = False  # whether the connection has become a tunnel
        self._moved = 0.0  # when the client last took something, or sent something while we linger
        self._untaken = 0
        self._forget_answer()
        # The responder's timer. All requests of a connection share it: none has to make its own.
        self.deadline = Timer(desk.loop)
        self._timer = Timer(desk.loop, self._look)
        self.watch()  # If it fails, nothing keeps this client: it comes before the timer.
        self._timer.set(self._next_look())

    def _forget_answer(self) -> None:
        self.status = ""
        self.sent = 0
        self._head_out = b""  # a head that waits for the first piece of its body
        self._held: bytearray | None = None  # the head and the pieces that are held back
        self._chunked = False
        self._body_left: int | None = None
        self._complete = False

    # What comes in.

    def received(self, data: bytes) -> None:
        if self.phase is Phase.LINGERING:
            self._moved = self.loop.now
            return
        responder = self.responder
        if self.phase is Phase.ANSWERING and responder is not None and responder.wants_body:
            # Many clients read only after they have sent all. So a client that sends is not cut as
            # one that takes nothing, but only for as long as so many bytes may take. Otherwise it
            # could keep its answer, and the upstream, for ever with a byte a minute.
            self._moved = min(self.loop.now, self._moved + len(data) / MIN_BYTES_PER_SECOND)
            self._began = self.loop.now
            waited = self.head is not None and self.head.expects
            data = responder.from_client(data)
            if self.phase is Phase.ANSWERING and (waited or not responder.wants_body):
                self._timer.set(self._next_look())
        self._received += len(data)
        if not data or self._unread or self.phase is Phase.CLOSED:
            return
        self._ahead = self._ahead + data if self._ahead else data
        if self.phase is Phase.READING:
            self._read_requests()
        elif len(self._ahead) > AHEAD_BYTES:
            self.pause()

    def take_ahead(self) -> bytes:
        """Take the bytes that have come behind the head: the first of the body, or of a tunnel."""
        ahead, self._ahead = self._ahead, b""
        return ahead

    def _read_requests(self) -> None:
        """Begin each request that has arrived, until one is not answered at once, or until other
        clients have to have their turn."""
        if self._nested:
            return  # A request was answered at once: the outer call goes on.
        self._nested = True
        try:
            for _ in range(REQUESTS_AT_ONCE):
                if not (self._ahead and self.phase is Phase.READING and self._read_head()):
                    return
        finally:
            self._nested = False
        if self._ahead and self.phase is Phase.READING:
            self.pause()
            self.loop.call(self._read_on_requests)

    def _read_on_requests(self) -> None:
        """Begin more of the requests that have arrived, now that others have had their turn."""
        if self.phase is Phase.READING:
            self.resume()
            self._read_requests()

    def _read_head(self) -> bool:
        """Begin the next request; False if its head is not complete yet."""
        data = self._ahead
        if data[0] in b"\r\n" and (empty := EMPTY_LINES.match(data)):
            # Empty lines before a request are ignored, but no CR alone (RFC 9112 section 2.2).
            data, self._scanned = data[empty.end() :], 0
            self._received = len(data)  # They are no part of the head, and earn no time for it.
        if not data:
            self._began = 0.0
        elif not self._began:
            self._began, self._received = self.loop.now, len(data)
        problem: Problem | None = None
        end = -1
        try:
            end = end_of_head(data, self._scanned)
        except BadRequest as error:
            problem = error
        if end < 0 and problem is None:
            self._ahead, self._scanned = data, len(data)
            self._timer.set(self._next_look())
            return False
        # Of a head that is refused unread only one thing matters: the answer to a HEAD has no body.
        head = self.head = Head(data[:end] if problem is None else data[:5])
        head.id = request_id(head.values.get("x-request-id"))
        self._ahead, self._scanned = data[end + 4 :] if problem is None else b"", 0
        self.arrived = self.loop.now
        self.lane = ""
        self.phase = Phase.ANSWERING
        self._timer.cancel()
        try:
            if problem := problem or head.problem:
                raise problem
            self._desk.respond(self, head)
        except Problem as refused:
            self.refuse(refused)
        responder = self.responder
        if self.phase is Phase.ANSWERING and responder is not None and responder.wants_body:
            self._began = self.loop.now
            self._timer.set(self._next_look())
            self.received(self.take_ahead())  # Even if it is empty: the responder may begin now.
            if responder.wants_body:
                head.fold()
        elif self.phase is Phase.ANSWERING and len(self._ahead) > AHEAD_BYTES:
            self.pause()  # Reading was resumed when the answer before ended.
        return True

    def pause(self) -> None:
        if not self.paused:
            self._paused_at = self.loop.now
        super().pause()

    def resume(self) -> None:
        paused = self.paused
        super().resume()
        if paused and self._began:
            # The pause was ours: its time is not the client's.
            self._began += self.loop.now - self._paused_at
            self._look_in_time()

    def ask_for_body(self) -> None:
        """Send the 100 that a client may wait for before it sends a body."""
        if self.head is not None and self.head.expects:
            self.head.expects = False
            self._began = self.loop.now  # Until now it had nothing to send.
            self._look_in_time()
            self.interim("100 Continue", b"")

    def interim(self, status: str, lines: bytes) -> None:
        """Pass on an interim answer; HTTP/1.0 has none."""
        if self.head is not None and self.head.version == "1.1":
            self._send(status_line(status) + lines + b"\r\n")

    # What goes out.

    def begin(
        self,
        status: str,
        lines: bytes,
        *,
        length: int | None,
        dated: bool,
        close: bool = False,
    ) -> None:
        """Begin an answer with a status ("200 OK") and header lines, each with its end, to which
        this hop's framing is added. It is sent with the first piece of the body, or by `flush`.

        `length` is how many bytes the body has by the header lines, None if they do not say it;
        `dated` says whether there is a Date among them, `close` that the connection ends with this
        answer.
        """
        head = self.head
        assert head is not None
        self.status = status
        self._desk.begun(self, head, int(status[:3]), self.loop.now - self.arrived)
        if close or self.ended_reading or self._desk.draining or not head.persistent:
            self._close = True
        out = status_line(status) + lines
        if head.method == "HEAD" or status.startswith(("204", "304")):
            self._body_left = 0
        elif length is not None:
            self._body_left = length
        elif head.version == "1.1":
            self._chunked = True
            out += b"Transfer-Encoding: chunked\r\n"
        else:
            self._close = True
        if self._close:
            out += b"Connection: close\r\n"
        elif head.version == "1.0":
            out += b"Connection: keep-alive\r\n"
        if not dated:
            out += date_line(int(time.time()))  # RFC 9110 section 6.6.1
        self._head_out = out + b"\r\n"

    def switch(self, status: str, lines: bytes, tunnel: Responder) -> None:
        """Answer that the protocol is switched. From here on nothing is framed, and `tunnel` takes
        over."""
        head = self.head
        assert head is not None
        self.status = status
        self._desk.begun(self, head, int(status[:3]), self.loop.now - self.arrived)
        self.responder = tunnel
        self._close = self._tunnel = True
        self._send(status_line(status) + lines + b"\r\n")

    def write(self, piece: bytes, *, hold: bool = False) -> None:
        """Send a piece of the body, and the head before the first; or `hold` it back until
        something else is sent."""
        if self._body_left is not None:
            piece = piece[: self._body_left]
            self._body_left -= len(piece)
        if not piece:
            return
        self.sent += len(piece)
        if self._chunked:
            piece = chunk(piece)
        if hold:
            self._held = self._held or bytearray()
            self._held += self._head_out
            self._held += piece
            self._head_out = b""
            return
        if len(piece) > COPIED_BYTES:
            self.flush()
        elif self._head_out:
            piece, self._head_out = self._head_out + piece, b""
        self._send(piece)

    @property
    def held(self) -> int:
        """How many bytes of the answer are held back."""
        return len(self._held or b"")

    def pass_from(self, source: Stream) -> tuple[int, bytes] | None:
        """Have the kernel pass on the bytes of the body that have arrived at the socket of
        `source`; see Stream.move_to."""
        assert self._body_left is not None
        moved = source.move_to(self, self._body_left)
        if moved is not None:
            taken, rest = moved
            self._body_left -= taken
            self.sent += taken
            if rest:
                self._send(rest)
        return moved

    def flush(self) -> None:
        """Send the head, if it still waits for the body, and what is held back."""
        if self._head_out or self._held:
            head, self._head_out = self._head_out, b""
            self._send(head)

    def comment(self, data: bytes) -> None:
        """Send bytes in the body that are not the upstream's; `sent` does not count them."""
        sent = self.sent
        self.write(data)
        self.sent = sent

    def _send(self, data: bytes) -> None:
        if self._held:
            data, self._held = b"".join((self._held, data)), None
        waited = bool(self.queued)
        self.send(data)
        if self.queued and not waited:
            self._moved = self.loop.now
            self._untaken = self.untaken()
            self._look_in_time()

    def finish(self, *, more: bool = False) -> None:
        """The answer is complete. If `more` of the request's body is still passed on, this is
        called again when that is done."""
        if self.phase is not Phase.ANSWERING:
            return
        if self._body_left:
            self.cut("it is shorter than its Content-Length")
            return
        if self._chunked and not self._complete:
            last, self._head_out = self._head_out + LAST_CHUNK, b""
            self._send(last)
        else:
            self.flush()
        self._complete = True
        if more:
            # From now on the client is no slower than one that has just begun.
            self._began = self._paused_at = self.loop.now
            self._timer.set(self._next_look())
        else:
            self._leave_unread()
            self._go_on()

    def _leave_unread(self) -> None:
        """If more of the request's body will come, end the connection after this answer: it would
        be taken for the next request."""
        if self.responder is not None and self.responder.wants_body:
            self._close = self._unread = True

    def refuse(self, problem: Problem) -> None:
        """Answer with a problem; if an answer has begun, cut that instead."""
        if self.phase is not Phase.ANSWERING:
            return
        if self.status:
            self.cut(str(problem))
            return
        head, responder = self.head, self.responder
        assert head is not None
        self._desk.refused(problem)
        status, headers, body = refusal(problem, head.id)
        headers += own_headers(head.id)
        # If the framing is in doubt, or if bytes of a body will come that nobody reads, what comes
        # next cannot be told from a request.
        to_come = responder.wants_body if responder is not None else head.chunked or head.length
        self._unread = bool(to_come) or isinstance(problem, BadRequest) or head.problem is not None
        self.begin(status, text_of(headers), length=len(body), dated=False, close=self._unread)
        self.write(body)
        self.flush()
        self._go_on()

    def cut(self, why: str = "", level: int = logging.ERROR) -> None:
        """End the connection so that the answer cannot be taken for a complete one. `why` is for
        the log; it is empty if the client has left."""
        if self.phase is not Phase.ANSWERING:
            return
        if why and self.head is not None:
            log.log(level, "%s cut: %s request_id=%s", asked(self.head), why, self.head.id)
        self.flush()
        self._leave_unread()
        self._settle()
        if self.closed:
            return
        self._close = True
        self._torn = bool(self.status) and not (self._framed or self._complete)
        self._go_on()

    def _go_on(self) -> None:
        """Nothing more is written of this answer: go on when the client has taken all of it."""
        if self.closed:
            return
        if self.queued:
            self.phase = Phase.FLUSHING
            return
        if self._torn:
            self.hang_up(reset=True)
            return
        try:
            self._settle()
            unread = self._unread or (self._close and (self._ahead or self.paused))
            if unread and not self.ended_reading:
                self._linger()
            elif self._close or (self.ended_reading and not self._ahead):
                self.hang_up()
            else:
                self.phase = Phase.READING
                self._forget_answer()
                if self.paused:
                    self.resume()  # It is first, because it adds the pause to a request's time.
                self._began = self.loop.now if self._ahead else 0.0
                self._received = len(self._ahead)
                self.idle_since = self.loop.now
                self._timer.set(self._next_look())
                self._read_requests()
        except Exception:
            # The responder may have let go of this client already: nobody else would end it.
            self.abandon()
            raise

    @property
    def _framed(self) -> bool:
        """Whether the answer says where it ends: else its end is that of the connection."""
        return self._chunked or self._body_left is not None

    def _settle(self) -> None:
        """The request is over: let go of its responder, and have the log written. Done once."""
        head, self.head = self.head, None
        responder, self.responder = self.responder, None
        if head is None:
            return
        self.requests += 1
        try:
            self._desk.answered(self, head)
        finally:
            if responder is not None:
                responder.settled()

    # The connection's end.

    def _linger(self) -> None:
        """End our sending half, and read what is still coming: see LINGER_SECONDS."""
        self.phase = Phase.LINGERING
        self._ahead = b""
        self._moved = self.loop.now
        self._linger_until = self.loop.now + LINGER_SECONDS
        self._timer.set(self.loop.now + LINGER_IDLE_SECONDS)
        self.end()
        self.resume()

    def hang_up(self, *, reset: bool = False, why: str = "") -> None:
        """Close the connection, whatever it is doing. If that cuts an answer or a tunnel, `why` is
        for the log."""
        if self.phase is Phase.CLOSED:
            return
        if why and self.head is not None:
            log.warning("%s cut: %s request_id=%s", asked(self.head), why, self.head.id)
        self.phase = Phase.CLOSED
        self.close(reset=reset)
        try:
            self._settle()
        finally:
            self._timer.drop()
            self.deadline.drop()
            self._desk.left(self)

    def ended(self) -> None:
        """The client has ended its sending half, or has gone: the two look the same."""
        if self.phase is Phase.ANSWERING and self.responder is not None:
            self.responder.client_ended()
        elif self.phase is Phase.FLUSHING:
            self._close = True
        else:
            self.hang_up()

    def leaving(self) -> None:
        # In a tunnel the end is passed on only after the bytes before it. Requests that came before
        # the end are read before it counts, so that all that are refused at once are answered.
        if not (self._tunnel or self.phase is Phase.READING):
            self.ended()

    def failed(self) -> None:
        self.hang_up()

    def abandon(self) -> None:
        self.hang_up(reset=True)  # The part of an answer that has been sent must not look whole.

    def progressed(self) -> None:
        self._moved = self.loop.now

    def drained(self) -> None:
        if self.phase is Phase.FLUSHING:
            self._go_on()
        elif self.responder is not None:
            if self._complete:  # From now on it has time for the rest of its body.
                self._began = self.loop.now
            self.responder.client_drained()

    # Time.

    def _next_look(self) -> float:
        """When to check next whether the client takes too long: to send, to read, or to ask."""
        when = NEVER
        if self.queued:
            when = self.loop.now + min(READER_LOOK_SECONDS, self._desk.client_timeout / 4)
        if self.phase is Phase.READING:
            least = 0.0 if self.requests else HEAD_SECONDS
            until = self.idle_since + max(self._desk.keepalive, least)
            if self._began:
                until = self._began + HEAD_SECONDS + self._received / MIN_BYTES_PER_SECOND
            when = min(when, until)
        elif self._hurried:
            when = min(when, self._began + self._desk.client_timeout)
        return when

    def _look_in_time(self) -> None:
        """Check that then, or earlier if it was to be checked earlier."""
        self._timer.set(min(self._timer.when, self._next_look()))

    @property
    def _hurried(self) -> bool:
        """Whether the client has only a limited time to send more of its body. While it still takes
        a complete answer it has not: `_reads` sees to that."""
        responder = self.responder
        if responder is None or not responder.hurries_client or self._waits:
            return False
        return not (self._complete and self.queued)

    @property
    def _waits(self) -> bool:
        """Whether it is not the client's fault that nothing comes of its body: it is made to wait,
        or waits to be asked."""
        return self.paused or (self.head is not None and self.head.expects)

    def _look(self) -> None:
        """Close the connection of a client that has used up its time."""
        now = self.loop.now
        if self.phase is Phase.LINGERING:
            until = min(self._linger_until, self._moved + LINGER_IDLE_SECONDS)
            if now >= until:
                self.hang_up()
            else:
                self._timer.set(until)
        elif self.queued and not self._reads(now):
            why = f"the client took nothing for {self._desk.client_timeout:g} s"
            self.hang_up(reset=True, why=why)
        elif self._next_look() > now:
            self._timer.set(self._next_look())
        elif self._held:
            self.cut(self._sent_nothing(), logging.WARNING)  # What is held back is sent first.
        else:
            # The part of an answer that ends with its connection must not look whole.
            complete = self._complete and not self.queued
            sent = self.phase is Phase.READING or self._complete
            why = "" if sent else self._sent_nothing()
            self.hang_up(reset=bool(self.status) and not self._framed and not complete, why=why)

    def _sent_nothing(self) -> str:
        return f"the client sent nothing for {self._desk.client_timeout:g} s"

    def _reads(self, now: float) -> bool:
        """Whether the client has taken something lately. The kernel may take no more from us for
        minutes, while a slow reader takes what the kernel holds. But that then becomes less."""
        untaken = self.untaken()
        if untaken < self._untaken:
            self._moved = now
        self._untaken = untaken
        return now - self._moved < self._desk.client_timeout

    @property
    def draining(self) -> bool:
        """Whether the service stops, so that connections end with what is under way."""
        return self._desk.draining

    @property
    def idle(self) -> bool:
        """Whether no byte of a request has come, and no byte of an answer is left to send."""
        return self.phase is Phase.READING and not self._began

    @property
    def spare(self) -> tuple[int, float] | None:
        """How early this connection makes room for another, and since when that is so. First are
        idle connections (0), then those whose last answer has been sent (1), then those whose head
        is arriving, and new ones that have sent nothing (2), then those that have stopped in the
        middle of a body (3). None if the client has just sent a piece of its body, waits for an
        answer, or takes one."""
        if self.phase is Phase.LINGERING:
            return 1, self._linger_until - LINGER_SECONDS
        if self.phase is not Phase.READING:
            head, responder = self.head, self.responder
            if head is None or responder is None or not responder.hurries_client:
                return None
            takes = self.status and (self.queued or not self._complete)
            still = not (self._waits or takes) and self._began + STILL_SECONDS < self.loop.now
            return (3, self._began) if still else None
        if self._began:
            return 2, self._began
        return (0 if self.requests else 2), self.idle_since


@remembering_short
def status_line(status: str) -> bytes:
    """The first line of an answer."""
    return b"HTTP/1.1 %b\r\n" % status.encode("latin-1")


@lru_cache(2)
def date_line(now: int) -> bytes:
    """Seconds since 1970 as a header line (RFC 9110 section 5.6.7)."""
    return b"Date: %b\r\n" % formatdate(now, usegmt=True).encode()
