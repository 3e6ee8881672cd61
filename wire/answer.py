"""The head of an upstream's answer, and how its body is framed."""

from __future__ import annotations

import re
from typing import Final

from problems import UpstreamBroken
from wire.chunks import Chunks, Sized, UntilClose
from wire.headers import Line, line, listed, remembering, remembering_short

MAX_HEAD_BYTES: Final = 262144
# No application sends as many. To read 35,000 lines takes a tenth of a second.
MAX_HEADER_LINES: Final = 2000
HTTP: Final = b"HTTP/1."
CARRIAGE_RETURN: Final = 13
NO_STATUS: Final = "The status line of the upstream's answer is malformed."
STATUS_LINE: Final = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: ([^\0\r\n]*))?")
HEADER_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]++):([^\0\r\n]*)")
SPACED: Final = re.compile(rb"(?<=\n)([^ \t\n:]+)[ \t]++:")
FOLD: Final = re.compile(rb"\n[ \t]++")
# How many digits a length may have. No body is longer, and int() refuses thousands of them.
MOST_DIGITS: Final = 18
# The header lines that a proxy has to understand.
TOLD: Final = frozenset(
    {
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "date",
        "transfer-encoding",
        "upgrade",
    }
)
WITHOUT_BODY: Final = frozenset({204, 304})
# The end of an event in an event stream: an empty line, with any of the three line ends.
EVENT_ENDS: Final = (b"\n\n", b"\r\r", b"\n\r\n", b"\n\r", b"\r\r\n")
EVENT_STREAM: Final = "text/event-stream"


class Answer:
    """The head of one answer.

    `status`, `reason` and `lines` are as they came, except for what RFC 9112 tells a proxy to mend.
    `length` is how long the body is, in bytes, None if no length frames it. `body` takes the body
    apart; it is None if there is no body. `options` are the members of Connection, `switches` those
    of Upgrade, in lower case. `persistent` says whether the upstream means to keep the connection,
    `reusable` whether that may carry another request after this answer, `events` whether the body
    is an event stream, `coded` whether it has a Content-Encoding, `dated` whether there is a Date.
    """

    __slots__ = (
        "body",
        "coded",
        "dated",
        "events",
        "length",
        "lines",
        "options",
        "persistent",
        "reason",
        "reusable",
        "status",
        "switches",
    )

    def __init__(self, head: bytes, method: str) -> None:
        """Take apart a head, without its last empty line; `method` is the request's. Raises
        UpstreamBroken."""
        spaced = False
        try:
            version = self._read(head.split(b"\r\n"))
        except UpstreamBroken:
            head, spaced = mended(head)
            version = self._read(head.split(b"\n"))
        kind = coding = ""
        lengths: list[str] = []
        codings: list[str] = []
        connection: list[str] = []
        upgrade: list[str] = []
        dated = False
        for one in self.lines:
            key = one.key
            if key not in TOLD:
                continue
            value = one.value
            if key == "content-length":
                lengths.append(value)
            elif key == "date":
                dated = True
            elif key == "content-type":
                kind = value.lower()
            elif key == "connection":
                connection.append(value.lower())
            elif key == "content-encoding":
                coding = value.lower()
            elif key == "transfer-encoding":
                codings.append(value.lower())
            elif key == "upgrade":
                upgrade.append(value.lower())
        self.events = (
            kind.startswith(EVENT_STREAM) and kind.partition(";")[0].strip() == EVENT_STREAM
        )
        self.coded = coding not in ("", "identity")
        self.options = listed(connection)
        # A line that `Connection` names goes no further than here.
        self.dated = dated and "date" not in self.options
        self.switches = listed(upgrade)
        self._frame(version, method, lengths, codings)
        if spaced:
            self.reusable = False

    def _read(self, raw: list[bytes]) -> str:
        """Read the status line and the header lines; returns the version. Raises UpstreamBroken."""
        version, self.status, self.reason = status_of(raw[0])
        self.lines = limited_lines(raw[1:])
        return version

    def _frame(self, version: str, method: str, lengths: list[str], codings: list[str]) -> None:
        """Decide how the body ends: not at all, by chunks, by its length, or with its connection
        (RFC 9112 section 6.3)."""
        # A length that is given twice is sent on once, and a length beside chunks is left out. In
        # both cases the connection is not used again.
        if len(lengths) > 1 or (lengths and "," in lengths[0]):
            lengths = listed(lengths)
        ambiguous = len(lengths) > 1 or bool(codings and lengths)
        # Of the characters of latin-1, only 0 to 9 are decimal.
        if lengths and not (
            lengths[0].isdecimal()
            and len(lengths[0]) <= MOST_DIGITS
            and lengths.count(lengths[0]) == len(lengths)
        ):
            raise UpstreamBroken("The Content-Length of the upstream's answer is malformed.")
        if codings and (codings != ["chunked"] or version == "1.0"):
            raise UpstreamBroken("The Transfer-Encoding of the upstream's answer is malformed.")
        # One spelling of a length goes out, because readers differ on 031.
        if ambiguous or (lengths and lengths[0].startswith("0") and lengths[0] != "0"):
            self._say_length(None if codings else str(int(lengths[0])))
        bodiless = method == "HEAD" or self.status in WITHOUT_BODY or self.status < 200
        self.length = int(lengths[0]) if lengths and not codings else None
        self.body: Chunks | Sized | UntilClose | None = None
        if bodiless or self.length == 0:
            pass
        elif codings:
            self.body = Chunks()
        elif self.length is not None:
            self.body = Sized(self.length)
        else:
            self.body = UntilClose()
        options = self.options
        self.persistent = "close" not in options and (version == "1.1" or "keep-alive" in options)
        # An answer that may not have a body but announces one may be followed by it all the same.
        # On a connection that is used again that would be taken for the next answer.
        stray = bodiless and bool(codings or self.length)
        ends = not isinstance(self.body, UntilClose)
        self.reusable = ends and self.persistent and not stray and not ambiguous

    def _say_length(self, length: str | None) -> None:
        """Leave one Content-Length line, with this value; none if it is None."""
        said = [one for one in self.lines if one.key == "content-length"]
        lines = [one for one in self.lines if one.key != "content-length"]
        if length is not None:
            name = said[0].text.partition(b":")[0]
            lines.insert(self.lines.index(said[0]), line(name, length.encode()))
        self.lines = lines


def mended(head: bytes) -> tuple[bytes, bool]:
    """A head with its lines ended by line feeds alone and none of them folded; and whether a name
    was followed by white space, which a proxy removes (RFC 9112 section 5.1). A server that sends
    that gets no other request on its connection.

    A line that begins with white space continues the one before it (section 5.2). The first header
    line cannot be such a line: it would continue the status line."""
    head = head.replace(b"\r\n", b"\n")
    end = head.find(b"\n")
    if head[end + 1 : end + 2] not in (b" ", b"\t"):
        head = head[:end] + FOLD.sub(b" ", head[end:])
    head, spaced = SPACED.subn(rb"\1:", head)
    return head, spaced > 0


@remembering_short
def status_of(raw: bytes) -> tuple[str, int, str]:
    """The version, status and reason of a status line. Raises UpstreamBroken."""
    found = STATUS_LINE.fullmatch(raw)
    if found is None:
        raise UpstreamBroken(NO_STATUS)
    minor, status, reason = found.groups(b"")
    # A later minor version is read as the last one that is known (RFC 9110 section 2.5).
    return "1.0" if minor == b"0" else "1.1", int(status), reason.decode("latin-1")


def line_of(raw: bytes) -> Line:
    """A header line. Raises UpstreamBroken."""
    found = HEADER_LINE.fullmatch(raw)
    if found is None:
        raise UpstreamBroken("A header line of the upstream's answer is malformed.")
    return line(found[1], found[2])


lines_of = remembering(line_of)


def limited_lines(raw: list[bytes]) -> list[Line]:
    """The header lines, of which there may be MAX_HEADER_LINES. Raises UpstreamBroken."""
    if len(raw) > MAX_HEADER_LINES:
        raise UpstreamBroken("The head of the upstream's answer has too many lines.")
    try:
        return lines_of(raw)
    except UpstreamBroken:
        # Its number is told, and nothing of it: it may be the rest of a value with a line feed.
        number = 1 + [HEADER_LINE.fullmatch(one) is None for one in raw].index(True)
        what = f"Header line {number} of the upstream's answer is malformed."
        raise UpstreamBroken(what) from None


def end_of_head(data: bytes, scanned: int = 0) -> tuple[int, int]:
    """The position in `data` where the head of an answer ends, and the position where what follows
    it begins; -1 and 0 if its end has not arrived. The first `scanned` bytes have been searched
    before. Raises UpstreamBroken if the head is too large."""
    start = scanned - 2 if scanned > 2 else 0
    # A line feed alone counts as a line end (RFC 9112 section 2.2).
    end = data.find(b"\n\r\n", start)
    alone = data.find(b"\n\n", start) if end < 0 else data.find(b"\n\n", start, end + 1)
    begin = end + 3 if end >= 0 else 0
    if alone >= 0:
        end, begin = alone, alone + 2
    if end > 0 and data[end - 1] == CARRIAGE_RETURN:
        end -= 1
    # Three bytes of an end that has not arrived may be there.
    if (len(data) - 3 if end < 0 else end) > MAX_HEAD_BYTES:
        raise UpstreamBroken("The head of the upstream's answer is too large.")
    # However much came: no head would begin so.
    if not (data.startswith(HTTP) or HTTP.startswith(data)):
        raise UpstreamBroken(NO_STATUS)
    return end, begin
