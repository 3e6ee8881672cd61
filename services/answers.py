"""Taking an upstream's answer apart: its head, and a body in chunks."""

from __future__ import annotations

import re

from services.errors import UpstreamBroken
from services.fields import Field

STATUS_LINE = re.compile(r"HTTP/(1\.[01]) ([1-9][0-9]{2})(?: ([^\0\r]*))?")
HEADER_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*+([^\0\r]*)")
FOLD = re.compile(r"\n[ \t]++")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\0\r]*)?")
MAX_CHUNK_LINE_BYTES = 65536


def parse_head(head: str) -> tuple[str, int, str, list[Field]]:
    """Version, status, reason and header lines of an answer. Raises UpstreamBroken."""
    first, _, rest = head.replace("\r\n", "\n").removesuffix("\r").partition("\n")
    match = STATUS_LINE.fullmatch(first)
    if match is None:
        raise UpstreamBroken("The status line of the upstream's answer is malformed.")
    fields: list[Field] = []
    # A line that begins with white space goes on from the one before (RFC 9112 section 5.2).
    for line in FOLD.sub(" ", rest).split("\n") if rest else ():
        field = HEADER_LINE.fullmatch(line)
        if field is None:
            raise UpstreamBroken("A header line of the upstream's answer is malformed.")
        fields.append((field[1], field[2].rstrip(" \t")))
    return match[1], int(match[2]), match[3] or "", fields


class Chunks:
    """Takes a chunked body apart (RFC 9112 section 7.1), strictly; trailers are dropped."""

    SIZE, DATA, END, TRAILER = range(4)

    def __init__(self) -> None:
        self.complete = False
        self.malformed = False
        self._state = self.SIZE
        self._left = 0  # bytes of the current chunk that are still to come
        self._trailer = 0

    def feed(self, data: bytes) -> tuple[list[bytes], bytes]:
        """The pieces of the body in `data`, and what is left of it: the start of a line that is
        not whole yet, or what follows the body."""
        pieces: list[bytes] = []
        at = 0
        while at < len(data) and not self.complete and not self.malformed:
            if self._state == self.DATA:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                self._state = self.DATA if self._left else self.END
                continue
            end = data.find(b"\n", at)
            if end < 0:
                self.malformed = len(data) - at > MAX_CHUNK_LINE_BYTES or (
                    self._state == self.END and data[at:] != b"\r"
                )
                break
            self._line(data[at:end].removesuffix(b"\r"))
            at = end + 1
        return pieces, data[at:]

    def _line(self, line: bytes) -> None:
        if self._state == self.SIZE:
            size = CHUNK_LINE.fullmatch(line)
            self.malformed = size is None
            self._left = int(size[1], 16) if size else 0
            self._state = self.DATA if self._left else self.TRAILER
        elif self._state == self.END:
            self.malformed = line != b""
            self._state = self.SIZE
        else:
            self._trailer += len(line)
            self.malformed = self._trailer > MAX_CHUNK_LINE_BYTES
            self.complete = not line
