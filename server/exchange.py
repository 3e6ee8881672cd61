"""One proxied request, from its head to its last byte, in both directions.

Everything that can happen to it has a method: bytes or the end come from either side, either side
takes what was sent to it, a connection is there or cannot be made, a time is up. The methods are in
the order in which a request travels.
"""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass
from typing import Final, Protocol

from problems import Problem, UpstreamBroken, UpstreamTimeout
from server.connector import Attempt
from server.logs import LONGEST_TARGET
from server.loop import NEVER
from server.stream import HIGH_WATER, SPLICES, Stream
from server.tunnel import Tunnel, TunnelClient
from server.upstream import Connection, Upstream
from wire.answer import EVENT_ENDS, Answer, end_of_head
from wire.chunks import LAST_CHUNK, Chunks, Sized, UntilClose, chunk, fault_of
from wire.headers import answers_credentials, authenticates_connection
from wire.request import Head

log = logging.getLogger("gatehouse")

# How much of a body is gathered before the upstream is asked. Then a slow sender of an ordinary
# request costs the upstream nothing, and the request can be sent again if that is safe. The rest of
# a larger body streams on.
GATHERED_BYTES: Final = 65536
# An answer's body of more bytes than this goes from socket to socket, if the kernel can do that.
STRAIGHT_BYTES: Final = 262144
# How many bytes of interim answers may come before an answer. That is enough for a thousand 102s.
INTERIM_BYTES: Final = 65536
# RFC 9110 section 9.2.2, and the safe methods of WebDAV (RFC 3253, 4918 and 5323).
IDEMPOTENT: Final = frozenset(
    {"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "PROPFIND", "REPORT", "SEARCH"}
)
# A refused connection is tried again after this many seconds, if UPSTREAM_RETRY allows it.
RETRY_SECONDS: Final = 0.25
# A client that waits for a 100 before it sends a large body gets one after this many seconds, if
# the upstream has sent none: many upstreams do not know of it.
CONTINUE_SECONDS: Final = 1.0
KEEP_ALIVE: Final = b": keep-alive\n\n"
# How many characters of a stream's target are kept for the log. Python keeps small objects apart.
# A longer text lies among large ones for as long as the stream lasts, where the memory of heads
# cannot be used again because of it: it cost ten times its size.
STREAM_TARGET: Final = 200


class ExchangeClient(TunnelClient, Protocol):
    """The client's side, as far as an exchange is concerned."""

    head: Head | None

    def begin(
        self,
        status: str,
        lines: bytes,
        *,
        length: int | None,
        dated: bool,
        close: bool = False,
    ) -> None: ...
    def switch(self, status: str, lines: bytes, tunnel: Tunnel) -> None: ...
    def interim(self, status: str, lines: bytes) -> None: ...
    def ask_for_body(self) -> None: ...
    def comment(self, data: bytes) -> None: ...
    def pass_from(self, source: Stream) -> tuple[int, bytes] | None: ...
    def flush(self) -> None: ...
    def finish(self, *, more: bool = False) -> None: ...
    def refuse(self, problem: Problem) -> None: ...
    def cut(self, why: str = "") -> None: ...


class Rules(Protocol):
    """What the proxy does to heads."""

    def trusts(self, peer: str) -> bool:
        """Whether `peer` is a trusted proxy, whose connection carries requests of many clients."""

    def request_head(self, head: Head, peer: str, length: int | None) -> bytes:
        """The head to send to the upstream. `length` frames a body that came in chunks and has been
        gathered, in bytes; None keeps the framing that the body came with."""

    def answer_lines(self, answer: Answer, head: Head) -> bytes:
        """The header lines that go back to the client, each with its end."""

    def interim_lines(self, answer: Answer) -> bytes:
        """Those of an interim answer."""


@dataclass(frozen=True)
class Patience:
    """How long an exchange waits, in seconds. `head` is for the head of an answer, and between
    pieces of its body. `stream` is between pieces of an event stream, and in a tunnel. `retry` is
    how long a refused connection is tried again. `comment` is after how much silence of an event
    stream the client is sent a comment (0: never)."""

    head: float
    stream: float
    retry: float
    comment: float


class State(enum.Enum):
    """What an exchange is doing."""

    GATHERING = "the body, or the first of it, is arriving"
    CONNECTING = "a connection to the upstream is being made"
    RETRYING = "nobody listened at the upstream's address, which is tried again in a moment"
    ASKING = "the request is on its way, and the head of the answer has yet to come"
    ANSWERING = "the body of the answer passes"
    DELIVERING = "the answer is complete, the rest of the request is still on its way"
    FAILED = "no more comes of the answer, and the client is being told"
    ENDED = "all is over, or a tunnel has taken its place"


class Exchange:
    """One request that the upstream answers. `largest` is how many bytes its body may have (0: any
    number)."""

    __slots__ = (
        "_answer",
        "_attempt",
        "_connection",
        "_deadline",
        "_counted",
        "_gathered",
        "_head",
        "_head_arrived",
        "_heard",
        "_interim",
        "_largest",
        "_id",
        "_nudge_at",
        "_patience",
        "_peer",
        "_refused_since",
        "_repeated",
        "_rules",
        "_scanned",
        "_silent_since",
        "_partly_sent",
        "_is_stream",
        "_tail",
        "_timer",
        "_upgrades",
        "_upstream",
        "body",
        "client",
        "loop",
        "state",
    )

    def __init__(
        self,
        client: ExchangeClient,
        head: Head,
        peer: str,
        upstream: Upstream,
        rules: Rules,
        patience: Patience,
        largest: int,
    ) -> None:
        self.client = client
        self.loop = client.loop
        self.state = State.GATHERING
        self.body = head.body()
        self._head: Head | None = head
        self._id = head.id
        self._peer = peer
        self._upstream = upstream
        self._rules = rules
        self._patience = patience
        self._largest = largest
        self._upgrades = head.upgrade
        self._gathered = b""  # the part of the body that the upstream does not have yet
        self._partly_sent = False  # whether a part of the body has been sent and is not kept
        self._attempt: Attempt | None = None  # the connection that is being made
        self._connection: Connection | None = None
        self._counted = False  # whether it counts as a request that is with the upstream
        self._is_stream = False  # whether it counts as a stream
        self._repeated = False
        self._refused_since = NEVER
        self._head_arrived = b""  # the part of the answer's head that has arrived
        self._interim = 0  # bytes of interim answers
        self._scanned = 0
        self._heard = False  # whether a byte of an answer has arrived
        self._answer: Answer | None = None
        # The last bytes of an event stream. It begins as if an event had just ended, so that a
        # comment may come before the first one.
        self._tail = b"\n\n"
        self._silent_since = 0.0
        self._timer = client.deadline
        self._timer.action = self._expired
        self._deadline = NEVER  # when the upstream is late
        self._nudge_at = NEVER  # when the client is to be sent a 100 or a comment

    # The request arrives.

    def start(self) -> None:
        """Begin. Without a body the upstream is asked at once; else `from_client` is called next,
        with the bytes of the body that have come."""
        if self.body is None:
            self._ask()
        elif not self._large:
            # For a larger body the upstream is asked first: it may send a 100, or refuse.
            self.client.ask_for_body()

    @property
    def _large(self) -> bool:
        """Whether the body is known to be larger than GATHERED_BYTES."""
        return isinstance(self.body, Sized) and self.body.announced > GATHERED_BYTES

    @property
    def wants_body(self) -> bool:
        """Whether more of the body is to come from the client."""
        return self.body is not None and not self.body.complete and self.state is not State.ENDED

    @property
    def hurries_client(self) -> bool:
        """While the upstream answers, the two may be in a conversation, which is as slow as they
        like it. Only if both are silent is the upstream late."""
        return self.wants_body and self.state is not State.ANSWERING

    def from_client(self, data: bytes) -> bytes:
        """Bytes from the client; returns those that follow the request's body."""
        assert self.body is not None
        if data and self._head is not None:
            self._head.expects = False  # The client does not wait for a 100.
        piece, rest = self.body.feed(data)
        fault = fault_of(self.body, self._largest)
        if fault is not None and self.state is State.DELIVERING:
            self._finish(keep=False)  # The client has its answer already.
        elif fault is not None:
            self._refuse(fault)
        elif self._connection is not None:
            self._send_on(self._connection, piece)
        else:
            self._gathered = self._gathered + piece if self._gathered else piece
            if self.state is State.GATHERING:
                if self._large or self.body.complete or len(self._gathered) > GATHERED_BYTES:
                    self._ask()
            elif len(self._gathered) > GATHERED_BYTES:
                self.client.pause()
        return rest

    # A connection to the upstream.

    def _ask(self) -> None:
        """Ask the upstream, on a connection that was kept or on a new one."""
        try:
            self._upstream.enter()
        except Problem as busy:
            self._refuse(busy)
            return
        self._counted = True
        connection = self._upstream.take(repeatable=self._repeatable, client=self.client)
        if connection is None:
            self._connect()
        else:
            self.connected(connection)

    @property
    def _repeatable(self) -> bool:
        """Whether it is safe to send the request a second time, and all of it is kept."""
        head = self._head
        whole = self.body is None or self.body.complete
        return head is not None and head.method in IDEMPOTENT and whole and not self._partly_sent

    def _connect(self) -> None:
        self.state = State.CONNECTING
        self._deadline = self.loop.now + self._upstream.connect_timeout
        self._wait()
        attempt = self._upstream.connect(self)
        if self.state is State.CONNECTING:
            self._attempt = attempt
        else:
            attempt.give_up()  # It was this client that was closed to make room.

    def unconnected(self, problem: Problem, refused: bool) -> None:
        """No connection could be made, and why; `refused` says that nobody listened."""
        self._attempt = None
        if self.state is not State.CONNECTING:
            return
        now = self.loop.now
        self._refused_since = min(self._refused_since, now)
        until = self._refused_since + self._patience.retry
        if refused and now < until:
            self.state = State.RETRYING
            self._deadline = min(now + RETRY_SECONDS, until)
            self._wait()
            return
        self._fail(problem)

    def connected(self, connection: Connection) -> None:
        """Here is a connection: send the part of the request that has arrived."""
        self._attempt = None
        connection.exchange = self
        self._connection = connection  # If something fails from here on, `settled` lets go of it.
        head = self._head
        assert head is not None
        self.state = State.ASKING
        if authenticates_connection(head.values.get("authorization", ())):
            connection.client = self.client
        body = self._gathered
        whole = self.body is None or self.body.complete
        length = None
        if head.chunked and whole and len(body) <= GATHERED_BYTES:
            length = len(body)
        elif head.chunked:
            body = (chunk(body) if body else b"") + (LAST_CHUNK if whole else b"")
        if not whole:
            self._gathered, self._partly_sent = b"", True
        connection.send(self._rules.request_head(head, self._peer, length) + body)
        head.fold()  # It is only needed again if the request has to be sent once more.
        self._asked()
        if not whole:
            self._nudge_at = self.loop.now + CONTINUE_SECONDS if head.expects else NEVER
            self._wait()
            self._pace_client()

    def _asked(self) -> None:
        """A part of the request has been sent or taken: set a new time for the upstream."""
        if self._head_arrived:
            return  # A head that has begun must be complete in time, whatever else is to be sent.
        connection = self._connection
        unsent = self.body is not None and not self.body.complete
        if unsent and connection is not None and not connection.queued:
            self._deadline = NEVER  # The upstream has all that has come: it waits for the client.
        else:
            self._deadline = self.loop.now + self._patience.head
        self._wait()

    # The body streams on.

    def _send_on(self, connection: Connection, piece: bytes) -> None:
        if isinstance(self.body, Chunks):
            piece = (chunk(piece) if piece else b"") + (LAST_CHUNK if self.body.complete else b"")
        connection.send(piece)
        self.upstream_progressed()
        self._pace_client()
        self._end_if_delivered()

    def _pace_client(self) -> None:
        """Read from the client as fast as the upstream takes it."""
        connection = self._connection
        if connection is not None and connection.queued > HIGH_WATER:
            self.client.pause()
        else:
            self.client.resume()

    def upstream_progressed(self) -> None:
        """The upstream has been sent some of the request, or has taken some."""
        if self.state is State.ASKING or self.state is State.DELIVERING:
            self._asked()
        elif self.state is State.ANSWERING and self._deadline < NEVER:
            self._wait_for_piece()  # The two talk, and the upstream may have to hear all of it.

    def upstream_drained(self) -> None:
        """The upstream has taken all that was sent to it."""
        self.upstream_progressed()
        self._end_if_delivered()
        if self.state is not State.ENDED:
            self.client.resume()

    # The answer.

    def from_upstream(self, data: bytes) -> None:
        """Bytes of the answer."""
        if self.state is State.ANSWERING:
            self._answer_on(data)
        elif self.state is State.DELIVERING:
            self._finish(keep=False)  # Nobody asked for these bytes: the connection is of no use.
        elif self.state is State.ASKING:
            self._heard = True
            self._head_arrived = self._head_arrived + data if self._head_arrived else data
            if self._deadline == NEVER:
                self._deadline = self.loop.now + self._patience.head
                self._wait()
            try:
                self._read_heads()
            except Problem as problem:
                self._fail(problem)

    def _read_heads(self) -> None:
        """Read the head of the answer, and the interim ones before it. Raises UpstreamBroken."""
        head = self._head
        assert head is not None
        while self.state is State.ASKING:
            end, begin = end_of_head(self._head_arrived, self._scanned)
            if end < 0:
                self._scanned = len(self._head_arrived)
                break
            answer = Answer(self._head_arrived[:end], head.method)
            self._head_arrived, self._scanned = self._head_arrived[begin:], 0
            status = f"{answer.status} {answer.reason}"
            self._interim += begin
            if answer.status == 101:
                self._switch(answer, status, head)
            elif answer.status >= 200:
                self._begin_answer(answer, status, head)
            elif self._interim > INTERIM_BYTES:
                raise UpstreamBroken("The upstream sent interim answers without an end.")
            elif answer.status == 100:
                self.client.ask_for_body()
            elif answer.status == 103 and not self.client.queued:
                # A client that does not keep up gets no hints: they would pile up here.
                self.client.interim(status, self._rules.interim_lines(answer))
        if self.state is State.ASKING and self.body is not None and not self.body.complete:
            self._asked()  # After a 100 the client has to send next.

    def _switch(self, answer: Answer, status: str, head: Head) -> None:
        """The upstream agrees to go on as a WebSocket: a tunnel takes over. Raises UpstreamBroken
        if the client has not asked for that."""
        if not self._upgrades or answer.switches != ["websocket"]:
            raise UpstreamBroken("The upstream switched protocols unasked.")
        self._upstream.outcome(up=True)
        lines = self._rules.answer_lines(answer, head)
        connection, self._connection = self._connection, None
        assert connection is not None
        self.state = State.ENDED
        self._head = None
        first, self._head_arrived = self._head_arrived, b""
        tunnel = Tunnel(self.client, connection, self._upstream, self._patience.stream)
        self._counted = False  # From here on it is the tunnel's to count it off.
        self.client.switch(status, lines, tunnel)
        head.forget(STREAM_TARGET)
        tunnel.begin(first)

    def _begin_answer(self, answer: Answer, status: str, head: Head) -> None:
        self._upstream.outcome(up=True)
        self._answer = answer
        self.state = State.ANSWERING
        if answer.events:
            self._is_stream = True
            self._upstream.count_streams(1)
        connection = self._connection
        assert connection is not None
        challenges: list[str] = []
        if answer.status == 401:
            challenges = [one.value for one in answer.lines if one.key == "www-authenticate"]
        if authenticates_connection(challenges):
            # From here on the upstream takes all requests on this connection for this client's. And
            # the log-in can only go on here: its next request means nothing elsewhere.
            connection.client = self.client
        if connection.client is not None and not answers_credentials(challenges):
            # The log-in is over. The next request of a trusted proxy may be another client's.
            answer.reusable = answer.reusable and not self._rules.trusts(self._peer)
        unsent = self.body is not None and not self.body.complete
        self.client.begin(
            status,
            self._rules.answer_lines(answer, head),
            length=answer.length,
            dated=answer.dated,
            close=unsent,
        )
        answer.lines = []
        head.forget(STREAM_TARGET if answer.events else LONGEST_TARGET)
        if not unsent:
            self._head = None  # It is not needed any more, and a stream may last long.
            self._gathered = b""
        data, self._head_arrived = self._head_arrived, b""
        self._silent_since = self.loop.now
        self._wait_for_piece()
        if isinstance(answer.body, Sized) and answer.body.left > STRAIGHT_BYTES:
            connection.straight = self._pass_straight if SPLICES and not connection.tls else None
        self._answer_on(data)

    def _answer_on(self, data: bytes) -> None:
        """Pass on a piece of the answer's body."""
        answer = self._answer
        assert answer is not None
        body = answer.body
        if body is None:
            # Bytes after the end belong to no request: the connection cannot be used any more.
            self._end_answer(keep=not data)
            return
        piece, rest = body.feed(data)
        if piece:
            self._silent_since = self.loop.now
            if answer.events:
                self._tail = (self._tail + piece)[-4:]
            self.client.write(piece)
        else:
            self.client.flush()
        if body.complete:
            self._end_answer(keep=not rest)
        elif body.malformed:
            self._break("the upstream's answer is malformed in its body")
        elif self.client.queued > HIGH_WATER:
            self._pause_upstream()
        elif piece:  # The framing of the next piece may come without an end.
            self._wait_for_piece()

    def _pass_straight(self, connection: Connection) -> bool:
        """Pass on the bytes of a large body that have arrived, from socket to socket, without
        taking them into this process; False if that cannot be done now."""
        answer = self._answer
        if answer is None or not isinstance(answer.body, Sized):
            return False
        if self.client.queued:
            self._pause_upstream()  # The client does not keep up: more would be kept here.
            return True
        try:
            moved = self.client.pass_from(connection)
        except OSError:
            # An ordinary read finds out what is wrong, or takes what stands in the way: where an
            # urgent byte comes next, nothing can be moved, although there is something to read.
            return False
        if moved is None:
            return False
        answer.body.left -= moved[0]
        self._silent_since = self.loop.now
        if answer.body.complete:
            self._end_answer(keep=True)
        elif self.client.queued:
            self._pause_upstream()
        else:
            self._wait_for_piece()
        return True

    def _wait_for_piece(self) -> None:
        answer = self._answer
        assert answer is not None
        patience = self._patience
        self._deadline = self.loop.now + (patience.stream if answer.events else patience.head)
        self._nudge_at = self._comment_at()
        self._wait()

    def _comment_at(self) -> float:
        """When the client of an event stream is to be sent a comment, as a sign of life."""
        answer, seconds = self._answer, self._patience.comment
        if not seconds or answer is None or not answer.events or answer.coded:
            return NEVER
        if answer.length is not None or not self._tail.endswith(EVENT_ENDS):
            return NEVER
        return self._silent_since + seconds

    def _pause_upstream(self) -> None:
        """The client does not keep up: the upstream waits, and is not late meanwhile."""
        assert self._connection is not None
        self._connection.pause()
        self._deadline = self._nudge_at = NEVER
        self._wait()

    def client_drained(self) -> None:
        """The client has taken all that was written: more may come."""
        connection = self._connection
        if connection is not None and connection.paused:
            if self.state is State.ANSWERING:
                self._silent_since = self.loop.now  # Until now the client was receiving bytes.
                self._wait_for_piece()
            connection.resume()

    def _end_answer(self, *, keep: bool) -> None:
        """The answer is complete. Its connection is kept if it may carry another request."""
        connection, answer = self._connection, self._answer
        assert connection is not None and answer is not None
        # A client that waits for a 100 before it sends its body will not send it after this answer.
        # A connection that is kept would wait for it in vain.
        waits = self._head is not None and self._head.expects
        keep = keep and answer.reusable and not waits
        if keep and (self.wants_body or connection.queued):
            # An upstream that keeps its connection goes on reading the body that was announced.
            self.state = State.DELIVERING
            self._asked()
            self.client.finish(more=True)
            return
        self._finish(keep=keep)

    def _end_if_delivered(self) -> None:
        """The upstream has the rest of a request that it answered before its end."""
        connection = self._connection
        if self.state is not State.DELIVERING or connection is None:
            return
        if not self.wants_body and not connection.queued:
            self._finish(keep=True)

    def _finish(self, *, keep: bool) -> None:
        """All of the answer has been written, and no more of the request is passed on."""
        answer = self._answer
        assert answer is not None
        self._let_go(keep=keep, leaving=not (answer.persistent or self.wants_body))
        self.client.finish()

    # The upstream ends.

    def upstream_ended(self) -> None:
        """The upstream sends no more."""
        connection, answer = self._connection, self._answer
        if self.state is State.ANSWERING and answer is not None and connection is not None:
            # If the upstream stopped reading the request, this end may be that of a reset: it does
            # not say that the answer is complete.
            if isinstance(answer.body, UntilClose) and not connection.stopped_reading:
                self._end_answer(keep=False)
            else:
                self._break("the upstream's answer was cut in its body")
        elif self.state is State.ASKING:
            self._lost()
        elif self.state is State.DELIVERING:
            self._finish(keep=False)

    def upstream_failed(self) -> None:
        """The connection to the upstream is broken."""
        if self.state is State.ASKING:
            self._lost()
        elif self.state is State.ANSWERING:
            self._break("the connection to the upstream was broken in the answer's body")
        elif self.state is State.DELIVERING:
            self._finish(keep=False)

    def _lost(self) -> None:
        """The connection ended before there was an answer: send the request again, once, if that is
        safe."""
        connection = self._connection
        assert connection is not None
        in_vain = connection.used and not self._heard
        if in_vain and connection.client is None:
            self._upstream.learn(connection.idle_for)
        again = in_vain and self._repeatable and not self._repeated
        self._let_go()
        if again:
            self._repeated = True
            # On a new connection: another kept one may have died for the same reason.
            self._connect()
        else:
            self._fail(UpstreamBroken("The upstream closed the connection before it had answered."))

    def _fail(self, problem: Problem) -> None:
        """The upstream did not answer."""
        cause = " ".join(str(problem.__cause__ or problem.detail).split())
        log.warning("%s: %s request_id=%s", problem.name, cause, self._id)
        self._upstream.outcome(up=False)
        self._refuse(problem)

    def _break(self, why: str) -> None:
        """The answer cannot be completed."""
        self._let_go()
        self.state = State.FAILED
        self.client.cut(why)

    def _refuse(self, problem: Problem) -> None:
        """Answer the client with a problem, and end."""
        self._let_go()
        self.state = State.FAILED
        self.client.refuse(problem)

    def _let_go(self, *, keep: bool = False, leaving: bool = False) -> None:
        """Close the connection to the upstream, or keep it for another request, or leave it to the
        upstream, which is `leaving`. One that is just being made is given up."""
        if self._attempt is not None:
            self._attempt.give_up()
            self._attempt = None
        connection, self._connection = self._connection, None
        self._timer.cancel()
        if connection is not None:
            connection.release(keep=keep, leaving=leaving)

    # The client ends.

    def client_ended(self) -> None:
        """The client sends no more. It has gone, or has closed its sending half only, which looks
        the same: proxies take both for gone."""
        self.client.cut()

    def settled(self) -> None:
        """The client has all of its answer, or is gone: nothing is left to be done."""
        self.state = State.ENDED
        self._let_go()
        self._timer.action = None
        self._head = None
        self._gathered = b""  # It may still be in the queue of those for whom a connection is made.
        if self._is_stream:
            self._is_stream = False
            self._upstream.count_streams(-1)
        if self._counted:
            self._counted = False
            self._upstream.leave()

    def abandon(self) -> None:
        """A method of it failed, which never should happen: end it. The loop calls this."""
        try:
            self.client.hang_up(reset=True)
        finally:
            self.settled()

    # Time.

    def _wait(self) -> None:
        self._timer.set(min(self._deadline, self._nudge_at))

    def _expired(self) -> None:
        """A time is up: something is to be done for the client, or somebody is late."""
        late = self.loop.now >= self._deadline
        if not late:
            self._nudge()
        elif self.state is State.RETRYING:
            self._connect()
        elif self.state is State.CONNECTING:
            self._fail(UpstreamTimeout("The upstream did not accept a connection in time."))
        elif self.state is State.ASKING:
            self._fail(UpstreamTimeout())
        elif self.state is State.ANSWERING:
            self._break("the upstream stalled in the middle of a body")
        elif self.state is State.DELIVERING:
            self._finish(keep=False)

    def _nudge(self) -> None:
        """The upstream has been silent: ask the client for its body, or send it a comment."""
        self._nudge_at = NEVER
        if self.state is State.ASKING:
            self.client.ask_for_body()
        elif self.state is State.ANSWERING and self.loop.now >= self._comment_at():
            self.client.comment(KEEP_ALIVE)
            self._silent_since = self.loop.now
            self._nudge_at = self._comment_at()
        self._wait()
