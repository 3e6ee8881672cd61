"""Reading requests: a strict parser in place of waitress's, which keeps what came as it came."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import logging
import re
import time
from typing import Any

from waitress.buffers import OverflowableBuffer
from waitress.parser import HTTPRequestParser
from waitress.receiver import FixedStreamReceiver

from problems import BadRequest, BodyTooLarge, Problem
from wire.chunks import Chunks
from wire.fields import Field, listed

log = logging.getLogger("gatehouse")

MAX_HEAD_BYTES = 65536
MAX_HEADER_LINES = 200
# A request has this many seconds, plus one for each MIN_BYTES_PER_SECOND that have arrived.
REQUEST_SECONDS = 30.0
MIN_BYTES_PER_SECOND = 500

REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([^\x00-\x20\x7f]+) HTTP/(1\.[01])")
# One header line, from its beginning to its end: a line that is anything else is not found. Nothing
# is given back of the white space (`*+`), or a long run of it would be gone through again from each
# of its characters.
HEADER_LINE = re.compile(
    r"(?<=\r\n)([!#$%&'*+.^_`|~0-9A-Za-z-]++):[ \t]*+([^\x00-\x08\x0a-\x1f\x7f]*)\r\n"
)
# RFC 3986 section 3.2.2 host, with an optional port.
HOST = re.compile(
    r"(?:\[([0-9A-Fa-f:.]+)\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})++)(?::[0-9]*)?"
)
LONE_LINE_FEED = re.compile(rb"(?<!\r)\n")
DIGITS = re.compile(r"[0-9]+")
# No body and no chunk is as large as this; what says so only means to confuse.
ABSURD_BYTES = 1 << 60


def is_host(text: str) -> bool:
    """Whether this is a Host with an optional port, and what is in brackets an IPv6 address."""
    match = HOST.fullmatch(text)
    if match is None or match[1] is None:
        return match is not None
    try:
        ipaddress.IPv6Address(match[1])
    except ValueError:
        return False
    return True


class Small(io.BytesIO):
    """A buffer for a body that is known to fit into memory, without the ceremony of waitress's."""

    append = io.BytesIO.write

    def __len__(self) -> int:
        return self.getbuffer().nbytes

    def getfile(self) -> Small:
        self.seek(0)
        return self


class ChunkedReceiver(FixedStreamReceiver):  # type: ignore[misc]
    """Waitress's own takes empty lines before a size, lone line feeds, and any trailer."""

    def __init__(self, buffer: OverflowableBuffer) -> None:
        super().__init__(0, buffer)
        self.chunks = Chunks(exact=True)
        self._rest = b""  # the beginning of a line that is not whole yet

    def received(self, data: bytes) -> int:
        pieces, rest = self.chunks.feed(self._rest + data)
        self.buf.append(b"".join(pieces))  # tiny ones cost a file's ceremony each
        self.completed = self.chunks.complete
        if self.completed:
            return len(data) - len(rest)
        self._rest = rest
        return len(data)


class RequestParser(HTTPRequestParser):  # type: ignore[misc]
    """One request, with its header lines as they came.

    Waitress drops names with underscores, joins repeated lines with a comma (wrong for Cookie and
    for Host), up-cases methods, honours Transfer-Encoding in HTTP/1.1 only (in HTTP/1.0 its body
    would run as a second request) and takes Content-Length beside it. So the head is parsed here.

    `fields` are the header lines in order and `values` the same by lower-case name, `lane` says
    whose request it is, `error` is the Problem that it is refused with, if any: decided when the
    head is complete, before a body is read.
    """

    completed = False
    empty = False
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
        self.values: dict[str, list[str]] = {}
        self.started = time.monotonic()
        self.bytes_received = 0

    def received(self, data: bytes) -> int:
        """Take bytes from the connection and return how many of them belong to this request."""
        if self.completed:
            return 0
        consumed = self._head(data) if self.body_rcv is None else self._body(data)
        self.bytes_received += consumed
        if self.chunked and self.body_rcv is not None and self.error is None:
            self._check_chunks()
        return consumed

    def _head(self, data: bytes) -> int:
        # Empty lines before a request are ignored (RFC 9112 section 2.2), and alone are no request.
        head = self.header_plus + data if self.header_plus else data.lstrip(b"\r\n")
        self.completed = self.empty = not head
        if self.empty:
            return len(data)
        end = head.find(b"\r\n\r\n", max(0, len(self.header_plus) - 3))
        try:
            if (len(head) if end < 0 else end) > MAX_HEAD_BYTES:
                raise BadRequest(f"The head is larger than {MAX_HEAD_BYTES} bytes.")
            if end < 0:
                if LONE_LINE_FEED.search(head, max(0, len(self.header_plus) - 1)):
                    raise BadRequest("A line of the head ends with a line feed alone.")
                self.header_plus = head
                return len(data)
            self.headers_finished = True
            self.parse_header(head[:end])
        except Problem as problem:
            if head.startswith(b"HEAD "):
                self.command = "HEAD"  # whatever else is wrong, it gets no body
            self._refuse(problem)
        else:
            self.completed = self.body_rcv is None
        return len(data) if end < 0 else len(data) - (len(head) - end - 4)

    def _body(self, data: bytes) -> int:
        try:
            consumed: int = self.body_rcv.received(data)
        except OSError as error:  # a large body goes to a file
            log.error("a body cannot be kept: %s request_id=%s", error.strerror or error, self.id)
            self._refuse(Problem("There is no room to keep the body."))
            return len(data)
        self.completed = self.body_rcv.completed
        return consumed

    def _check_chunks(self) -> None:
        chunks, size = self.body_rcv.chunks, len(self.body_rcv)
        # Extensions are bounded by the line only, and there may be many.
        if chunks.malformed or self.bytes_received > 16 * size + 2 * MAX_HEAD_BYTES:
            self._refuse(BadRequest("The chunked body is malformed."))
        elif size + chunks.left > self.max_body:
            self._refuse(BodyTooLarge(f"The body is larger than {self.max_body} bytes."))

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
        text = head.decode("latin-1") + "\r\n"
        end = text.index("\r\n")
        line = REQUEST_LINE.fullmatch(text, 0, end)
        if line is None:
            raise BadRequest("The request line is malformed.")
        self.command, self.request_uri, self.version = line.groups()
        lines = HEADER_LINE.findall(text, end + 2)
        if len(lines) != text.count("\r\n", end + 2):
            raise BadRequest("A header line is malformed.")
        if len(lines) > MAX_HEADER_LINES:
            raise BadRequest(f"There are more than {MAX_HEADER_LINES} header lines.")
        self.fields = [(name, value.rstrip(" \t")) for name, value in lines]
        values = self.values
        for name, value in self.fields:
            key = name.lower()
            if key in values:
                values[key].append(value)
            else:
                values[key] = [value]
        hosts = self.values.get("host", [])
        if len(hosts) != 1 or not is_host(hosts[0]):
            raise BadRequest("There must be one valid Host header.")
        self._connection()
        self._framing()
        self.lane, self.max_body = self.adj.admit(self)
        if self.content_length > self.max_body:
            raise BodyTooLarge(f"The body is larger than {self.max_body} bytes.")
        if self.chunked:
            self.body_rcv = ChunkedReceiver(OverflowableBuffer(self.adj.inbuf_overflow))
        elif self.content_length:
            small = self.content_length <= self.adj.inbuf_overflow
            buffer = Small() if small else OverflowableBuffer(self.adj.inbuf_overflow)
            self.body_rcv = FixedStreamReceiver(self.content_length, buffer)
        # Only where a body is to come: waitress would wait for ever for one that is not.
        if self.body_rcv is not None and self.version == "1.1":
            self.expect_continue = self.values.get("expect", [""])[-1].lower() == "100-continue"

    def _connection(self) -> None:
        options = [option.lower() for option in listed(self.values.get("connection", []))]
        if self.version == "1.1":
            self.connection_close = "close" in options
        else:
            self.connection_close = "keep-alive" not in options or "close" in options

    def _framing(self) -> None:
        lengths = self.values.get("content-length", [])
        codings = self.values.get("transfer-encoding")
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

    def close(self) -> None:
        """Let go of the body."""
        with contextlib.suppress(OSError):  # what could not be written cannot be at the end either
            super().close()

    @property
    def body_size(self) -> int | None:
        """Bytes of the body; None where the request has no body (RFC 9112 section 6.3)."""
        if self.chunked:
            return len(self.body_rcv)
        return self.content_length if "content-length" in self.values else None

    def overdue(self, now: float) -> bool:
        """Whether the sender has taken longer than a request of this size may take."""
        return now - self.started > REQUEST_SECONDS + self.bytes_received / MIN_BYTES_PER_SECOND
