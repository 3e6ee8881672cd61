"""The head of an upstream's answer, and how its body is framed."""

from __future__ import annotations

import re

from problems import UpstreamBroken
from wire.chunks import Chunks, Sized, UntilClose
from wire.fields import Field, listed, lowered, stripped

MAX_HEAD_BYTES = 262144
STATUS_LINE = re.compile(r"HTTP/(1\.[01]) ([1-9][0-9]{2})(?: ([^\0\r]*))?")
# White space before the colon is taken away, as RFC 9112 section 5.1 tells a proxy; whoever sends
# it is not trusted with another request on that connection.
HEADER_LINE = re.compile(r"(?<=\n)([!#$%&'*+.^_`|~0-9A-Za-z-]++)[ \t]*+:[ \t]*+([^\0\r\n]*)\n")
SPACED = re.compile(r"\n[^ \t\n:]+[ \t]+:")
FOLD = re.compile(r"\n[ \t]++")
LENGTH = re.compile(r"[0-9]{1,18}")
# The header lines that say something to a proxy.
TOLD = frozenset(
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
WITHOUT_BODY = frozenset({204, 304})
# An end of an event of an event stream: an empty line, whichever of the three line ends it has.
EVENT_ENDS = (b"\n\n", b"\r\r", b"\n\r\n", b"\n\r", b"\r\r\n")
EVENT_STREAM = "text/event-stream"


class Answer:
    """The head of one answer.

    `status`, `reason` and `fields` are as they came, but for what RFC 9112 tells a proxy to mend.
    `length` is the body's in bytes, None where no length frames it; `body` takes the body apart,
    None where there is none. `options` are the members of Connection, `switches` those of Upgrade,
    in lower case. `reusable` says whether the connection may carry another request after it,
    `events` whether it is a stream of events, `coded` whether something is wrapped around these,
    `dated` whether it has a Date.
    """

    __slots__ = (
        "body",
        "coded",
        "dated",
        "events",
        "fields",
        "length",
        "options",
        "reason",
        "reusable",
        "status",
        "switches",
    )

    def __init__(self, head: bytes, method: str) -> None:
        """Take apart a head, without its last empty line; `method` is the request's. Raises
        UpstreamBroken."""
        text = head.decode("latin-1").replace("\r\n", "\n") + "\n"
        end = text.index("\n")
        # A line that begins with white space goes on from the one before (RFC 9112 section 5.2),
        # but for the first, which would go on from the status line.
        if ("\n " in text or "\n\t" in text) and text[end + 1] not in " \t":
            text = text[:end] + FOLD.sub(" ", text[end:])
        line = STATUS_LINE.fullmatch(text, 0, end)
        if line is None:
            raise UpstreamBroken("The status line of the upstream's answer is malformed.")
        lines = HEADER_LINE.findall(text, end)
        if len(lines) != text.count("\n", end) - 1:
            raise UpstreamBroken("A header line of the upstream's answer is malformed.")
        self.status = int(line[2])
        self.reason = line[3] or ""
        self.fields: list[Field] = stripped(text, lines)
        self.events = self.coded = self.dated = False
        self.options: list[str] = []
        self.switches: list[str] = []
        lengths: list[str] = []
        codings: list[str] = []
        for name, value in self.fields:
            if (key := lowered(name)) not in TOLD:
                continue
            match key:
                case "date":
                    self.dated = True
                case "content-length":
                    lengths.append(value)
                case "transfer-encoding":
                    codings.append(value.lower())
                case "connection":
                    self.options += listed([value.lower()]) if "," in value else [value.lower()]
                case "content-type":
                    self.events = value.partition(";")[0].strip().lower() == EVENT_STREAM
                case "content-encoding":
                    self.coded = value.strip().lower() not in ("", "identity")
                case "upgrade":
                    self.switches += listed([value.lower()])
        self._frame(line[1], method, lengths, codings)
        if (" :" in text or "\t:" in text) and SPACED.search(text):
            self.reusable = False

    def _frame(self, version: str, method: str, lengths: list[str], codings: list[str]) -> None:
        """Decide how the body ends: not at all, by chunks, by its length, or with its connection
        (RFC 9112 section 6.3)."""
        # One length said twice is said once, and one beside chunks is not said at all; where either
        # was needed, the connection is not trusted any further.
        if len(lengths) > 1 or (lengths and "," in lengths[0]):
            lengths = listed(lengths)
        mended = len(lengths) > 1 or bool(codings and lengths)
        if lengths and (len(set(lengths)) > 1 or not LENGTH.fullmatch(lengths[0])):
            raise UpstreamBroken("The Content-Length of the upstream's answer is malformed.")
        if codings and (codings != ["chunked"] or version == "1.0"):
            raise UpstreamBroken("The Transfer-Encoding of the upstream's answer is malformed.")
        if mended:
            self._say_length(None if codings else lengths[0])
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
        persistent = "close" not in options and (version == "1.1" or "keep-alive" in options)
        # An answer that has no body but announces one may be followed by it all the same, and that
        # would be the next caller's answer.
        stray = bodiless and bool(codings or self.length)
        ends = not isinstance(self.body, UntilClose)
        self.reusable = ends and persistent and not stray and not mended

    def _say_length(self, length: str | None) -> None:
        """Leave one Content-Length line with this value, or none."""
        fields = [field for field in self.fields if lowered(field[0]) != "content-length"]
        if length is not None:
            at = next(
                at for at, (name, _) in enumerate(self.fields) if lowered(name) == "content-length"
            )
            fields.insert(at, (self.fields[at][0], length))
        self.fields = fields


def end_of_head(data: bytes, scanned: int = 0) -> tuple[int, int]:
    """Where the head of an answer ends in `data`, and where what follows begins; -1 and 0 while
    the end is not there. The first `scanned` bytes have been looked at before. Raises
    UpstreamBroken where the head is too large."""
    start = max(0, scanned - 3)
    end = data.find(b"\r\n\r\n", start)
    begin = end + 4
    # Lone line feeds are taken for line ends (RFC 9112 section 2.2); the earlier end wins.
    until = end + 1 if end >= 0 else len(data)
    bare, mixed = data.find(b"\n\n", start, until), data.find(b"\n\r\n", start, until)
    if bare >= 0 or mixed >= 0:
        end, begin = min((at, at + size) for at, size in ((bare, 2), (mixed, 3)) if at >= 0)
        if data[end - 1 : end] == b"\r":
            end -= 1
    elif end < 0:
        begin = 0
    # Of an end that is not there yet, three bytes may be.
    if (len(data) - 3 if end < 0 else end) > MAX_HEAD_BYTES:
        raise UpstreamBroken("The head of the upstream's answer is too large.")
    return end, begin
