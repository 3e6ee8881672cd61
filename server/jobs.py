"""Jobs: work that may have to wait, on threads that get values and give values back.

A lane is a set of threads for one kind of job, so that no kind waits for another. A `Job` is a
request that the WSGI application answers on such a thread: it is given the request's body, and what
the application answers comes back to the loop, which alone writes to the client.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from waitress.task import WSGITask

from problems import BadRequest, BodyTooLarge, DatabaseUnavailable, Problem
from server.inbox import Inbox, Left
from server.logs import asked
from server.loop import NEVER, Loop, Timer
from server.stream import HIGH_WATER
from wire.headers import Header, lowered, text_of
from wire.request import Head

log = logging.getLogger("gatehouse")

# A thread that has had nothing to do for this many seconds ends.
IDLE_SECONDS = 5.0
# A lane none of whose jobs has been taken for this many seconds gets more threads.
STALLED_SECONDS = 0.05
# These further threads stay for at least this many seconds.
RELIEF_SECONDS = 1.0
# How much of an answer may wait for a client that is still sending its body.
UNTAKEN_BYTES = 33554432
# What the client of a job is told that has waited for a thread for too long.
ALL_HELD = "As many imports and exports as there may be are under way. Try again later."


class Lane:
    """Threads for one kind of job, up to `limit`, started when none is idle and ended when there
    has been nothing to do for a while.

    The first `eager` of them are started as jobs come. More are only started if no job has been
    taken for a while, because all threads are held up, and they end when that is over. Many short
    jobs do not need many threads: these would take the interpreter and the processor from each
    other, and from PostgreSQL on the same machine.
    """

    def __init__(self, loop: Loop, name: str, limit: int, eager: int | None = None) -> None:
        self._loop = loop
        self.name = name
        self._limit = limit
        self._eager = limit if eager is None else min(eager, limit)
        self._relief = Timer(loop, self.relieve)
        self._relieved = 0.0  # when threads were last started because jobs waited
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._spare = 0  # idle threads minus queued jobs
        self._threads = 0
        self._moved = 0.0  # when a job was last taken, or came while none was waiting

    def add(self, job: Callable[[], None]) -> None:
        """Have a thread do a job; for the loop's own thread."""
        with self._lock:
            if self._spare >= 0:
                self._moved = time.monotonic()
            self._spare -= 1
            start = self._spare < 0 and self._threads < self._eager
            self._count(int(start))
        self._queue.put(job)
        if start:
            self._start()
        # After the start, which may have failed: then nobody else would look again.
        if self._spare < 0 and self._relief.when == NEVER:
            self._relief.set(self._loop.now + STALLED_SECONDS)

    def _start(self) -> None:
        try:
            threading.Thread(target=self._work, name=self.name, daemon=True).start()
        except RuntimeError:
            log.exception("no thread can be started; the job waits for another")
            with self._lock:
                self._count(-1)

    def relieve(self) -> None:
        """Start threads for all jobs that wait, if none has been taken for a while, and look again
        as long as jobs wait. The loop calls this, because the threads may all be held up."""
        with self._lock:
            waiting = -self._spare
            more = 0
            now = time.monotonic()
            if waiting > 0 and now - self._moved > STALLED_SECONDS:
                more = min(waiting, self._limit - self._threads)
                self._count(more)
                self._relieved = now
        for _ in range(more):
            self._start()
        if waiting > 0:
            self._relief.set(self._loop.now + STALLED_SECONDS)

    def _count(self, threads: int) -> None:
        self._threads += threads
        self._spare += threads

    def _work(self) -> None:
        while True:
            try:
                job = self._queue.get(timeout=IDLE_SECONDS)
            except Empty:
                with self._lock:
                    if self._spare > 0:  # Otherwise a job has just come, and counts on this thread.
                        self._count(-1)
                        return
                continue
            self._moved = time.monotonic()
            try:
                job()
            except Exception:
                log.exception("a job failed")
            del job  # The name would keep the job's client alive until the next job comes.
            with self._lock:
                self._spare += 1
                if self._threads > self._eager and self._relief_is_over():
                    self._count(-1)
                    return

    def _relief_is_over(self) -> bool:
        return time.monotonic() - self._relieved > RELIEF_SECONDS


class Asker(Protocol):
    """The client, as far as its job is concerned."""

    loop: Loop
    peer: tuple[str, int]
    deadline: Timer

    @property
    def queued(self) -> int: ...
    @property
    def paused(self) -> bool: ...

    def begin(self, status: str, lines: bytes, *, length: int | None, dated: bool) -> None: ...
    def write(self, piece: bytes) -> None: ...
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

    `largest` is how many bytes the body may have (0: any number). If it is `streamed`, the
    application begins when the head is complete, and reads the body while it arrives. `patience` is
    how many seconds it may wait for a thread. It is not begun when that time is over, or when its
    client has gone.
    """

    over = False

    def __init__(
        self,
        client: Asker,
        head: Head,
        lane: Lane,
        application: Any,
        *,
        largest: int,
        streamed: bool,
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
        self.application = application
        self.arrived = arrived
        self.body = head.body()
        self._largest = largest
        self._gathered = bytearray()  # Not a list of the pieces, for the same reason as in Inbox.
        self._input: Any = None
        self._inbox: Inbox | None = None
        self._taken: threading.Event | None = None  # set when the client has taken what was written
        if streamed and self.body is not None:
            self._inbox = Inbox(lambda: client.loop.call(client.resume))
            self._input = io.BufferedReader(self._inbox, 65536)

    def start(self) -> None:
        """Begin, on the loop's thread."""
        if self.body is None or self._inbox is not None:
            self._run()
        if self.body is not None and self.head.expects:
            self.client.ask_for_body()

    def from_client(self, data: bytes) -> bytes:
        """Take bytes of the body; returns what follows it."""
        assert self.body is not None
        piece, rest = self.body.feed(data)
        if self.body.malformed:
            self._refuse(BadRequest("The chunked body is malformed."))
        elif self._largest and self.body.announced > self._largest:
            self._refuse(BodyTooLarge(f"The body is larger than {self._largest} bytes."))
        elif self._inbox is not None:
            if piece and not self._inbox.put(piece):
                self.client.pause()
            if self.body.complete:
                self._inbox.put_end()
        else:
            self._gathered += piece
            if self.body.complete:
                self.arrived = self.client.loop.now
                self._run()
        return rest

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
        if self._patience < NEVER:
            self.client.deadline.cancel()
            self.client.deadline.action = None
        if self._inbox is not None:
            self._inbox.put_end(cut=True)
        self._let_go_on()

    def _refuse(self, problem: Problem) -> None:
        self.over = True
        self.client.refuse(problem)

    def _run(self) -> None:
        if self._input is None:
            self._input = io.BytesIO(self._gathered)
            self._gathered = bytearray()
        self._waiting.append(self._work)
        self.lane.add(partial(begin, self._waiting))
        if self._patience < NEVER:
            self.client.deadline.action = self._give_up
            self.client.deadline.set(self.client.loop.now + self._patience)

    def _give_up(self) -> None:
        """Its time is over. If it has not begun, it never will."""
        if take(self._waiting):
            self._refuse(DatabaseUnavailable(ALL_HELD))

    # On the lane's thread.

    def _work(self) -> None:
        task = Task(self)
        try:
            task.service()
        except Left:
            pass
        except Problem as problem:  # In the middle of an answer, which can only be cut.
            self.client.loop.call(self._told, self._failed, (problem,))
        except Exception:
            log.exception("%s request_id=%s", asked(self.head), self.head.id)
            self.client.loop.call(self._told, self._failed, (Problem(),))

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

    def _failed(self, problem: Problem) -> None:
        self.over = True
        self.client.refuse(problem)

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
        self.client.write(piece)
        # Many clients read only after they have sent all of their body. If the application waited
        # until such a client reads, it would not take the rest of the body: neither would go on.
        if self.client.queued < (UNTAKEN_BYTES if self.wants_body else HIGH_WATER):
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
        taken.wait()
        if self.over:
            raise Left


class _Channel:
    """What waitress's task asks of its channel."""

    def __init__(self, job: Job) -> None:
        self.addr = job.client.peer
        self.server = self
        self.application = job.application
        self.adj = self
        self._job = job

    # What the task asks of the server and of its adjustments, both of which this is.
    url_prefix = ""
    ident = "gatehouse"
    effective_port = 0
    server_name = "gatehouse"

    def check_client_disconnected(self) -> bool:
        return self._job.over


class _Request:
    """What waitress's task asks of its request."""

    url_scheme = "http"

    def __init__(self, job: Job) -> None:
        head = job.head
        self.version = head.version
        self.command = head.method
        self.path = head.path
        self.query = head.query
        self.request_uri = head.target
        # A name with an underscore is dropped, as waitress does: the environ has the same name for
        # it as for the one with a hyphen.
        self.headers = {
            name.upper().replace("-", "_"): ("; " if name == "cookie" else ", ").join(values)
            for name, values in head.values.items()
            if "_" not in name
        }
        self.get_body_stream = lambda: job._input


class Task(WSGITask):  # type: ignore[misc]
    """Waitress's WSGI task: it makes the environ, calls the application and checks what that
    answers. Only the writing of the answer is replaced.

    Waitress itself would sort and re-case header names, add `Via`, give HEAD a chunked body and
    close the connection after every 204 and 304; here the client's side writes all answers.
    """

    wrote_header = False

    def __init__(self, job: Job) -> None:
        super().__init__(_Channel(job), _Request(job))
        self._job = job

    def service(self) -> None:
        """Replaces waitress's own, which takes an OSError that the application raises for one of
        the client's socket."""
        self.execute()
        self.finish()

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ["REQUEST_METHOD"] = self._job.head.method  # Waitress makes it upper case.
        environ["gatehouse.request_id"] = self._job.head.id
        environ["gatehouse.arrived"] = self._job.arrived
        environ["gatehouse.lane"] = self._job.lane.name
        return environ

    def write(self, data: bytes) -> None:
        """Give a piece of the body to the loop, and the head before the first."""
        if not self.complete:
            raise RuntimeError("start_response was not called before the body was written")
        job = self._job
        whole = self.content_length is not None and len(data) == self.content_length
        if not self.wrote_header and whole:
            self.wrote_header = True
            self.content_bytes_written = len(data)
            job.tell(job.give_whole, self.status, self.response_headers, data)
            return
        if not self.wrote_header:
            self.wrote_header = True
            job.tell(job.give_head, self.status, self.response_headers)
        if data:
            self.content_bytes_written += len(data)
            job.give_and_wait(data)

    def finish(self) -> None:
        if not self.wrote_header:
            self.write(b"")
        if not self._job.over:
            self._job.tell(self._job.give_end)
