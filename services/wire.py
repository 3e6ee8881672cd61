"""The client's side of the wire: waitress, strict in what it reads and exact in what it writes.

`RequestParser` reads a request, `Task` runs the application and writes its answer, `Channel` is one
client connection. Each replaces the part of waitress of the same name; the comments say what bit.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from waitress.buffers import OverflowableBuffer
from waitress.channel import ClientDisconnected, HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.receiver import ChunkedReceiver, FixedStreamReceiver

from services.errors import BadRequest, BodyTooLarge, Problem

Field = tuple[str, str]

MAX_HEAD_BYTES = 65536
MAX_HEADER_LINES = 200
# A request has this many seconds, plus one for each MIN_BYTES_PER_SECOND that have arrived.
REQUEST_SECONDS = 30.0
MIN_BYTES_PER_SECOND = 500
# A streamed answer gives up its thread when its client has taken nothing for this many seconds…
STALL_SECONDS = 0.1
# …and the connection of a client that has taken nothing for this many is closed.
READER_SECONDS = 60.0
# How much of a refused request is read and thrown away, so that the refusal is not lost: closing a
# socket with unread bytes resets it, which may destroy the answer (RFC 9112 section 9.6).
LINGER_BYTES = 1 << 20
LINGER_SECONDS = 2.0

REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([^\x00-\x20\x7f]+) HTTP/(1\.[01])")
HEADER_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
# RFC 3986 section 3.2.2 host, with an optional port.
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(:[0-9]*)?")
DIGITS = re.compile(r"[0-9]+")
# No body and no chunk is as large as this; what says so only means to confuse.
ABSURD_BYTES = 1 << 60


class RequestParser(HTTPRequestParser):  # type: ignore[misc]
    """One request, with its header lines as they came.

    Waitress drops names with underscores, joins repeated lines with a comma (wrong for Cookie and
    for Host), up-cases methods, honours Transfer-Encoding in HTTP/1.1 only (in HTTP/1.0 its body
    would run as a second request) and takes Content-Length beside it. So the head is parsed here.

    `fields` are the header lines in order, `lane` says whose request it is, `error` is the Problem
    that it is refused with, if any: decided when the head is complete, before a body is read.
    """

    completed = False
    header_plus = b""
    command = ""
    request_uri = ""
    id = ""
    target = ""
    arrived = 0.0
    path = ""
    query = ""
    lane = "quick"
    max_body = 0
    error: Problem | None = None
    body_unread = False

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.fields: list[Field] = []
        self.started = time.monotonic()
        self.bytes_received = 0

    def received(self, data: bytes) -> int:
        """Take bytes from the connection and return how many of them belong to this request."""
        if self.completed:
            return 0
        self.bytes_received += len(data)
        consumed = self._head(data) if self.body_rcv is None else self._body(data)
        # What follows a request that ends the connection belongs to none.
        return len(data) if self.body_unread else consumed

    def _head(self, data: bytes) -> int:
        # Empty lines before a request are ignored (RFC 9112 section 2.2).
        head = self.header_plus + data if self.header_plus else data.lstrip(b"\r\n")
        end = head.find(b"\r\n\r\n")
        try:
            if (len(head) if end < 0 else end) > MAX_HEAD_BYTES:
                raise BadRequest(f"The head is larger than {MAX_HEAD_BYTES} bytes.")
            if end < 0:
                self.header_plus = head
                return len(data)
            self.headers_finished = True
            self.parse_header(head[:end])
        except Problem as problem:
            self._refuse(problem)
        else:
            self.completed = self.body_rcv is None
        return len(data) - (len(head) - end - 4)

    def _body(self, data: bytes) -> int:
        consumed: int = self.body_rcv.received(data)
        size = len(self.body_rcv)
        announced = self.body_rcv.chunk_remainder if self.chunked else 0
        if (
            self.body_rcv.error
            or announced >= ABSURD_BYTES
            # Chunk extensions and trailers, which ChunkedReceiver does not bound.
            or self.bytes_received > 16 * size + 2 * MAX_HEAD_BYTES
        ):
            self._refuse(BadRequest("The chunked body is malformed."))
        elif size + announced > self.max_body:
            self._refuse(BodyTooLarge(f"The body is larger than {self.max_body} bytes."))
        elif self.body_rcv.completed:
            self.completed = True
        return consumed

    def _refuse(self, problem: Problem) -> None:
        # A problem that leaves the framing in doubt, or body bytes unread, ends the connection.
        self.error = problem
        self.lane = "quick"
        self.completed = True
        self.expect_continue = False
        self.body_unread = (
            isinstance(problem, BadRequest) or self.chunked or self.content_length > 0
        )

    def parse_header(self, head: bytes) -> None:
        """Parse a head (without its last empty line) and ask who owns the request.

        Raises the Problem that the request is to be refused with.
        """
        lines = head.decode("latin-1").split("\r\n")
        line = REQUEST_LINE.fullmatch(lines[0])
        if line is None:
            raise BadRequest("The request line is malformed.")
        if len(lines) > MAX_HEADER_LINES + 1:
            raise BadRequest(f"There are more than {MAX_HEADER_LINES} header lines.")
        self.command, self.request_uri, self.version = line.groups()
        hosts, lengths, codings, connection, expectation = [], [], [], "", ""
        for text in lines[1:]:
            match = HEADER_LINE.fullmatch(text)
            if match is None:
                raise BadRequest("A header line is malformed.")
            name, value = match[1], match[2].rstrip(" \t")
            self.fields.append((name, value))
            match name.lower():
                case "host":
                    hosts.append(value)
                case "content-length":
                    lengths.append(value)
                case "transfer-encoding":
                    codings.append(value)
                case "connection":
                    connection += "," + value
                case "expect":
                    expectation = value.lower()
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            raise BadRequest("There must be one valid Host header.")
        options = {option.strip(" \t").lower() for option in connection.split(",")}
        if self.version == "1.1":
            self.connection_close = "close" in options
        else:
            self.connection_close = "keep-alive" not in options or "close" in options
        if codings:
            if self.version == "1.0" or lengths or [c.lower() for c in codings] != ["chunked"]:
                raise BadRequest("Transfer-Encoding must be chunked, alone, and in HTTP/1.1.")
            self.chunked = True
        elif lengths:
            if len(lengths) > 1 or not DIGITS.fullmatch(lengths[0]):
                raise BadRequest("Content-Length must be one number.")
            # int() refuses thousands of digits.
            digits = lengths[0].lstrip("0")
            self.content_length = int(digits or 0) if len(digits) < 19 else ABSURD_BYTES
        self.lane, self.max_body = self.adj.admit(self)
        if self.content_length > self.max_body:
            raise BodyTooLarge(f"The body is larger than {self.max_body} bytes.")
        if self.chunked:
            self.body_rcv = ChunkedReceiver(OverflowableBuffer(self.adj.inbuf_overflow))
        elif self.content_length:
            buffer = OverflowableBuffer(self.adj.inbuf_overflow)
            self.body_rcv = FixedStreamReceiver(self.content_length, buffer)
        # Only where a body is to come: waitress would wait for ever for one that is not.
        self.expect_continue = (
            expectation == "100-continue" and self.version == "1.1" and self.body_rcv is not None
        )

    @property
    def body_size(self) -> int | None:
        """Bytes of the body; None where the request has no body (RFC 9112 section 6.3)."""
        if self.chunked:
            return len(self.body_rcv)
        has_length = any(name.lower() == "content-length" for name, _ in self.fields)
        return self.content_length if has_length else None

    def overdue(self, now: float) -> bool:
        """Whether the sender has taken longer than a request of this size may take."""
        return now - self.started > REQUEST_SECONDS + self.bytes_received / MIN_BYTES_PER_SECOND


class Task:
    """Runs the application for one request and writes what it answers.

    Waitress's own sorts and re-cases header names, adds `Via` and `Server`, refuses hop-by-hop
    names, gives HEAD a chunked body and closes after every 204 and 304. Here the header lines go
    out as the application gave them, and only this hop's framing is added.
    """

    status = ""
    close_on_finish = False
    body: Iterable[bytes] = ()

    def __init__(self, channel: Channel, request: RequestParser) -> None:
        self.channel = channel
        self.request = request
        self.environ = self._environ()
        self.headers: list[Field] = []
        self.bytes_sent = 0
        self.remaining: int | None = None
        self.chunked = False
        self.head: bytes | None = None
        self.pieces: Any = None

    def _environ(self) -> dict[str, Any]:
        request, channel = self.request, self.channel
        environ = {
            "REMOTE_ADDR": channel.addr[0],
            "REQUEST_METHOD": request.command,
            "SCRIPT_NAME": "",
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query,
            "SERVER_NAME": channel.server.server_name,
            "SERVER_PORT": str(channel.server.effective_port),
            "SERVER_PROTOCOL": "HTTP/" + request.version,
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
            "wsgi.input": request.get_body_stream(),
            "gatehouse.request": request,
            "gatehouse.client": channel,
        }
        if request.body_rcv is not None:
            environ["CONTENT_LENGTH"] = str(len(request.body_rcv))
        return environ

    def start_response(
        self, status: str, headers: list[Field], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        """PEP 3333's start_response; header lines are sent in the order they have here."""
        if exc_info and self.head is None and self.status:
            raise exc_info[1]
        self.status = status
        self.headers = headers
        return self.write

    def run(self) -> bool:
        """Start or go on with the answer. False where the client does not read: run it again
        when the client has taken what is waiting for it."""
        try:
            if self.pieces is None:
                self.body = self.channel.server.application(self.environ, self.start_response)
                self._begin()
                self.pieces = iter(self.body)
            for piece in self.pieces:
                self.write(piece)
                if self.channel.stalled and self.more:
                    self.body.pause()  # type: ignore[attr-defined]
                    return False
            self._end()
        except ClientDisconnected:
            self.close_on_finish = True
        except Exception as error:
            # Mid-body the status has gone: all that is left is an end that is visibly not one.
            if not self.channel.gone:
                self.channel.server.log_failure(self.request, error)
            self.cut()
        self.finish()
        return True

    def _begin(self) -> None:
        request, status = self.request, int(self.status[:3])
        length = next((v for n, v in self.headers if n.lower() == "content-length"), None)
        bodiless = request.command == "HEAD" or status in (204, 304)
        self.close_on_finish = (
            request.connection_close or request.body_unread or self.channel.server.draining
        )
        lines = [f"HTTP/1.1 {self.status}"]
        lines += [
            f"{n}: {v}" for n, v in self.headers if status != 204 or n.lower() != "content-length"
        ]
        if bodiless:
            self.remaining = 0
        elif length is not None:
            self.remaining = int(length)
        elif request.version == "1.1":
            self.chunked = True
            lines.append("Transfer-Encoding: chunked")
        else:
            self.close_on_finish = True
        if self.close_on_finish:
            lines.append("Connection: close")
        elif request.version == "1.0":
            lines.append("Connection: keep-alive")
        if not any(name.lower() == "date" for name, _ in self.headers):
            lines.append(f"Date: {http_date()}")  # RFC 9110 section 6.6.1
        self.head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    @property
    def more(self) -> bool:
        """Whether the body is a stream with more to come, which waits for a client that does not
        read. Its last piece, like a body that is here already, is left to the loop."""
        return getattr(self.body, "more", False)

    def write(self, piece: bytes) -> None:
        """Send a piece of the body, and the head before it if it has not gone yet. An empty piece
        sends the head alone, so that it does not wait for the body."""
        if self.remaining is not None:
            piece = piece[: self.remaining]
            self.remaining -= len(piece)
        self.bytes_sent += len(piece)
        if self.chunked and piece:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        if self.head:
            piece = self.head + piece
            self.head = b""
        if piece:
            self.channel.write_soon(piece, patient=self.more)

    def _end(self) -> None:
        if self.remaining:
            raise RuntimeError("the application's body is shorter than its Content-Length")
        last = b"0\r\n\r\n" if self.chunked else b""
        if self.head or last:
            self.channel.write_soon((self.head or b"") + last)
            self.head = b""

    def cut(self) -> None:
        """End the connection so that the answer cannot be taken for a whole one."""
        self.close_on_finish = True
        if self.remaining is None and not self.chunked:
            self.channel.reset_on_close()

    def finish(self) -> None:
        """Close the application's body and write the access log's line. Once."""
        with contextlib.suppress(Exception):
            getattr(self.body, "close", lambda: None)()
        self.channel.server.log_access(self)


class Channel(HTTPChannel):  # type: ignore[misc]
    """One client connection.

    The event loop's thread reads and parses; a lane's thread runs `service`. A lane's thread sends
    at once what it has, and leaves to the loop only what the client does not take.
    """

    parser_class = RequestParser
    requests: list[RequestParser]
    parked: Task | None = None
    resuming = False
    refused = False
    gone = False
    on_gone: Callable[[], None] | None = None
    served = 0
    lingering = 0.0
    lingered = 0

    @property
    def stalled(self) -> bool:
        """Whether the client has not yet taken all that was written."""
        return bool(self.total_outbufs_len)

    def readable(self) -> bool:
        # Read on while a request is served (waitress's lookahead), or a client that leaves in the
        # middle of one would go unnoticed.
        if self.lingering:
            return True
        return not self.gone and bool(super().readable())

    def handle_read(self) -> None:
        """Read what has arrived. An end of file while a request is under way means that the client
        has gone, though it may only have closed its sending half: the two look the same, and
        proxies take both for the former. Waitress would close at once, and an answer of ours
        that was nearly ready would be lost."""
        try:
            data = self.socket.recv(self.adj.recv_bytes)
        except BlockingIOError:
            return
        except OSError:
            self.handle_close()
            return
        if self.lingering:
            self.lingered += len(data)
            if not data or self.lingered > LINGER_BYTES:
                self.handle_close()
        elif data:
            self.last_activity = time.time()
            self.received(data)
        elif self.requests:
            self.leave()
        else:
            self.handle_close()

    def leave(self) -> None:
        """The client has gone: tell whoever works for it."""
        self.gone = True
        if self.on_gone is not None:
            self.on_gone()

    def handle_write(self) -> None:
        super().handle_write()
        self.advance()

    def handle_close(self) -> None:
        if not (self.will_close and self._linger()):
            super().handle_close()
            self.leave()
            self.advance()

    def _linger(self) -> bool:
        # After a refusal: see LINGER_BYTES.
        if self.lingering or not self.refused or self.gone:
            return False
        self.will_close = False
        self.lingering = time.monotonic()
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            return False
        return True

    def write_soon(self, data: bytes, patient: bool = False) -> int:
        """Send `data`; what the client does not take is kept, and the loop sends it. Where
        `patient`, wait STALL_SECONDS for the client to take more. Raises ClientDisconnected."""
        view = memoryview(data)
        while view:
            with self.outbuf_lock:
                if not self.connected:
                    raise ClientDisconnected
                if not self.total_outbufs_len:
                    view = view[self._send_now(view) :]
                if view and not (patient and not self.total_outbufs_len):
                    self._keep(view)
                    break
            if view and not self._writable_within(STALL_SECONDS):
                patient = False
        return len(data)

    def _send_now(self, view: memoryview) -> int:
        try:
            sent: int = self.socket.send(view)
        except BlockingIOError:
            return 0
        except OSError:
            raise ClientDisconnected from None
        self.last_activity = time.time()
        return sent

    def _keep(self, view: memoryview) -> None:
        self.outbufs[-1].append(bytes(view))
        self.total_outbufs_len += len(view)
        self.server.wake(self)

    def _writable_within(self, seconds: float) -> bool:
        poller = select.poll()
        try:
            poller.register(self.socket, select.POLLOUT)
        except (ValueError, AttributeError, OSError):  # closed by the loop meanwhile
            raise ClientDisconnected from None
        return bool(poller.poll(seconds * 1000))

    def service(self) -> None:
        """Serve the first request, or go on with it; called on a lane's thread."""
        task, self.parked, self.resuming = self.parked, None, False
        if task is None:
            task = Task(self, self.requests[0])
        if not task.run():
            self.parked = task
            self.server.wake(self)
            return
        self.on_gone = None
        self.served += 1
        with self.requests_lock:
            if task.close_on_finish or self.gone:
                self.refused = self.requests[0].body_unread if self.requests else False
                for request in self.requests:
                    request.close()
                self.requests = []
                self.close_when_flushed = True
            else:
                self.requests.pop(0).close()
                if self.requests:
                    self.server.add_task(self)
                elif self._owes_continue():
                    self.send_continue()
        self.last_activity = time.time()
        if self.close_when_flushed or self.requests or self.total_outbufs_len:
            self.server.wake(self)

    def _owes_continue(self) -> bool:
        request = self.request
        return bool(
            self.connected
            and request is not None
            and request.expect_continue
            and request.headers_finished
            and not self.sent_continue
        )

    def advance(self) -> None:
        """Do what is next, on the loop's thread: resume a stream whose client has caught up, give
        up one whose client has gone, and tell the selector what to watch for."""
        task = self.parked
        if task is not None and not self.resuming:
            if not self.connected:
                self.parked = None
                task.finish()
            elif not self.total_outbufs_len:
                self.resuming = True
                task.body.resume(lambda: self.server.add_task(self))  # type: ignore[attr-defined]
        self.server.rearm(self)

    def reset_on_close(self) -> None:
        """Make closing the socket send a reset, not an orderly end."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def expired(self, now: float) -> bool:
        """Whether this connection has used up its time: idle, sending or reading too slowly."""
        if self.lingering:
            return now - self.lingering > LINGER_SECONDS
        quiet = time.time() - self.last_activity
        if self.total_outbufs_len:
            return quiet > READER_SECONDS
        if self.request is not None:
            return bool(self.request.overdue(now))
        return not self.requests and quiet > self.adj.channel_timeout


def http_date() -> str:
    """The time now as RFC 9110 section 5.6.7 has it; composed once a second."""
    global _date
    now = int(time.time())
    if _date[0] != now:
        _date = now, formatdate(now, usegmt=True)
    return _date[1]


_date = (0, "")


def status_line(status: int) -> str:
    """A status code with its standard reason phrase."""
    return f"{status} {HTTPStatus(status).phrase}"
