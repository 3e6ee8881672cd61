"""The head of a request, from bytes to values. It is read strictly, and its lines are kept as they
came.

A head that two readers may understand in two ways is refused here, so that the upstream is never
asked for something else than Gatehouse has checked (RFC 9112 sections 2, 3, 6 and 11.2).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import unquote_to_bytes

from problems import BadRequest, HttpVersionNotSupported, Problem
from wire.chunks import Chunks, Sized
from wire.headers import Line, line, listed, remembering, remembering_short

MAX_HEAD_BYTES: Final = 65536
MAX_HEADER_LINES: Final = 200
# How many commas Connection and Upgrade may have, over all their lines.
MOST_COMMAS: Final = 200

REQUEST_LINE: Final = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([^\x00-\x20\x7f]+) HTTP/([0-9])\.([0-9])"
)
HEADER_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]++):([^\x00-\x08\x0a-\x1f\x7f]*)")
# RFC 3986 section 3.2.2 host, with an optional port.
HOST: Final = re.compile(
    r"(?:\[([0-9A-Fa-f:.]+)\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})++)(?::[0-9]*)?"
)
ABSOLUTE_FORM: Final = re.compile(r"https?://([^/?#]+)", re.IGNORECASE)
# The user name and password that a target in absolute form may have.
USERINFO: Final = re.compile(r"//[^/?#]*@")
LONE_LINE_FEED: Final = re.compile(rb"(?<!\r)\n")
DIGITS: Final = re.compile(r"[0-9]+")
# How much of a path is decoded. Who answers is decided by its beginning, and no path of Gatehouse's
# own is so long. To decode 64 KB of percent signs takes twenty milliseconds.
DECODED_BYTES: Final = 1024
# A Content-Length of 19 digits or more counts as this. No body is so large.
ABSURD_BYTES: Final = 1 << 60


class Head:
    """The head of one request.

    `method`, `target` and `lines` are as they came; `values` are the header values by lower-case
    name; `version` is "1.0" or "1.1". `path` is the target's path, percent-decoded (the first
    DECODED_BYTES of it), as latin-1 text. `host` is the authority that is asked for.
    A body is framed by `chunked` or by `length` (in bytes; None if there is none). `persistent`
    says whether the client keeps its connection, `expects` whether it waits for a 100 before it
    sends the body. `problem` is what is wrong, if anything; after such a head nobody can tell a
    body from the next request.

    `id` is the request's id, and `caller` the client's address for the log; the server sets both.
    """

    __slots__ = (
        "_lines",
        "_raw",
        "_values",
        "caller",
        "chunked",
        "expects",
        "host",
        "id",
        "length",
        "method",
        "path",
        "persistent",
        "problem",
        "target",
        "version",
    )

    def __init__(self, head: bytes) -> None:
        """Take apart a head, without its last empty line."""
        self.method = self.target = self.path = self.host = ""
        self.id = self.caller = ""
        self.version = "1.1"
        self._raw = head
        self._lines: list[Line] | None = []
        self._values: dict[str, list[str]] | None = {}
        self.length: int | None = None
        self.chunked = self.persistent = self.expects = False
        self.problem: Problem | None = None
        try:
            self._parse(head.split(b"\r\n"))
        except Problem as problem:
            self.problem = problem
            if head.startswith(b"HEAD "):
                self.method = "HEAD"  # Whatever else is wrong with it, its answer has no body.

    def _parse(self, raw: list[bytes]) -> None:
        first = REQUEST_LINE.fullmatch(raw[0].decode("latin-1"))
        if first is None:
            raise BadRequest("The request line is malformed.")
        self.method, self.target, major, minor = first.groups()
        if major != "1":
            raise HttpVersionNotSupported
        if minor == "0":
            self.version = "1.0"
        del raw[0]
        if len(raw) > MAX_HEADER_LINES:
            raise BadRequest(f"There are more than {MAX_HEADER_LINES} header lines.")
        lines = self._lines = lines_of(raw)
        values = self._values = by_name(lines)
        hosts = values.get("host", [])
        if len(hosts) > 1 or (not hosts and self.version == "1.1"):
            raise BadRequest("There must be one Host header.")
        self.host = hosts[0] if hosts else ""
        if self.host and not is_host(self.host):
            raise BadRequest("The Host header is malformed.")
        self._target()
        self._connection()
        self._framing()

    @property
    def lines(self) -> list[Line]:
        lines = self._lines
        if lines is None:
            lines = self._lines = lines_of(self._raw.split(b"\r\n")[1:])
        return lines

    @property
    def values(self) -> dict[str, list[str]]:
        values = self._values
        if values is None:
            values = self._values = by_name(self.lines)
        return values  # Not what `_values` is now: a thread may read, and the loop fold.

    def fold(self) -> None:
        """Keep `lines` and `values` only as the bytes that came: they are read anew if they are
        asked for. Two hundred lines are 400 objects, which the garbage collector looks through
        again and again: five thousand clients whose body was still to come stopped the loop for two
        seconds."""
        self._lines = self._values = None

    def forget(self, most: int) -> None:
        """Keep what the log tells of the request, with at most so many characters of its target."""
        self._raw = b""
        self.fold()
        self.path = self.host = ""
        self.method = self.method[:most]
        if len(self.target) > most:
            if not self.target.startswith("/"):
                self.target = USERINFO.sub("//", self.target)
            if len(self.target) > most:
                self.target = self.target[:most] + "…"

    def _target(self) -> None:
        target = self.target
        if self.method == "CONNECT" and not target.startswith("/"):
            return  # It names a host for a tunnel, and no path. A reverse proxy refuses it.
        if not (target.startswith("/") or (target == "*" and self.method == "OPTIONS")):
            absolute = ABSOLUTE_FORM.match(target)
            # A user name in the authority is not part of the host (RFC 9110 section 4.2.4).
            host = absolute[1].rpartition("@")[2] if absolute else ""
            if absolute is None or not is_host(host):
                raise BadRequest("The request target is malformed.")
            self.host = host  # It replaces the Host header (RFC 9112 section 3.2.2).
        path = self.origin.partition("?")[0]
        if "%" in path:
            first, rest = path[:DECODED_BYTES], path[DECODED_BYTES:]
            path = unquote_to_bytes(first.encode("latin-1")).decode("latin-1") + rest
        self.path = path

    # These two are made when they are asked for. A target may have 64 KB, of which each would be
    # one more copy for as long as the request lasts.

    @property
    def origin(self) -> str:
        """The target in origin form (RFC 9112 section 3.2), otherwise byte for byte."""
        target = self.target
        absolute = None if target.startswith("/") else ABSOLUTE_FORM.match(target)
        if absolute is None:
            return target
        rest = target[absolute.end() :]
        if not rest and self.method == "OPTIONS":
            return "*"  # RFC 9112 section 3.2.4
        return rest if rest.startswith("/") else "/" + rest

    @property
    def query(self) -> str:
        """What follows the first `?` of the target."""
        return self.origin.partition("?")[2]

    def _connection(self) -> None:
        named = self._named("connection")
        self._named("upgrade")  # It must not be too long either: see `upgrade`.
        if self.method == "CONNECT":
            return  # Not persistent: the next bytes may be meant for the tunnel that is refused.
        if self.version == "1.1":
            self.persistent = "close" not in named
        else:
            self.persistent = "keep-alive" in named and "close" not in named

    def _named(self, name: str) -> list[str]:
        """The members of a list header, in lower case. Raises BadRequest if they are too many: to
        take 64 KB of commas apart takes ten milliseconds."""
        values = self.values.get(name)
        if not values:
            return []
        if sum(value.count(",") for value in values) > MOST_COMMAS:
            raise BadRequest(f"The {name.title()} header has more than {MOST_COMMAS} commas.")
        return [member.lower() for member in listed(values)]

    def _framing(self) -> None:
        lengths = self.values.get("content-length")
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
            self.length = int(digits or 0) if len(digits) < 19 else ABSURD_BYTES
        else:
            return
        if self.version == "1.1" and (self.chunked or self.length):
            self.expects = self.values.get("expect", [""])[-1].lower() == "100-continue"

    @property
    def upgrade(self) -> bool:
        """Whether the client asks to go on as a WebSocket (RFC 9110 section 7.8, RFC 6455 section
        4.1). A request with a body does not count: the end of the body would decide where the first
        frame begins."""
        values = self.values
        return (
            "upgrade" in values
            and self.method == "GET"
            and self.version == "1.1"
            and not self.chunked
            and not self.length
            and "upgrade" in [option.lower() for option in listed(values.get("connection", []))]
            and "websocket" in [name.lower() for name in listed(values["upgrade"])]
        )

    def value(self, name: str) -> str | None:
        """The value of a header that may stand on several lines; None if it is absent."""
        values = self.values.get(name)
        return None if values is None else ", ".join(values)

    def body(self) -> Chunks | Sized | None:
        """A reader that takes the body apart; None if there is no body."""
        if self.chunked:
            return Chunks(exact=True)
        return Sized(self.length) if self.length else None


def by_name(lines: list[Line]) -> dict[str, list[str]]:
    """The values of header lines, by name."""
    values: dict[str, list[str]] = {}
    for one in lines:
        key = one.key
        if key in values:
            values[key].append(one.value)
        else:
            values[key] = [one.value]
    return values


def line_of(raw: bytes) -> Line:
    """A header line. Raises BadRequest."""
    found = HEADER_LINE.fullmatch(raw)
    if found is None:
        raise BadRequest("A header line is malformed.")
    return line(found[1], found[2])


lines_of = remembering(line_of)


@remembering_short
def is_host(text: str) -> bool:
    """Whether this is a Host with an optional port, and the text in brackets, if any, is an IPv6
    address."""
    match = HOST.fullmatch(text)
    if match is None or match[1] is None:
        return match is not None
    try:
        ipaddress.IPv6Address(match[1])
    except ValueError:
        return False
    return True


def end_of_head(data: bytes | bytearray, scanned: int = 0) -> int:
    """Where the empty line that ends a head begins in `data`, or -1 if it has not arrived. The
    first `scanned` bytes have been searched before. Raises BadRequest if the head is too large, or
    if a line of it ends with a line feed alone."""
    end = data.find(b"\r\n\r\n", max(0, scanned - 3))
    # The last three bytes may be the beginning of the end that is searched for.
    if (len(data) - 3 if end < 0 else end) > MAX_HEAD_BYTES:
        raise BadRequest(f"The head is larger than {MAX_HEAD_BYTES} bytes.")
    if end < 0 and LONE_LINE_FEED.search(data, scanned):
        raise BadRequest("A line of the head ends with a line feed alone.")
    return end
