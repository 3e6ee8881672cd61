"""Bodies in chunks, as both sides of the wire have them."""

from __future__ import annotations

import re

MAX_LINE_BYTES = 65536
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\0\r]*)?")
# Some servers fill the size up with spaces.
FILLED_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\0\r]*)?")
TRAILER_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0\r\n]*")


class Chunks:
    """Takes a chunked body apart (RFC 9112 section 7.1), strictly; trailers are dropped.

    A line may end with a line feed alone and a size with spaces, unless `exact`: a request that two
    readers may take for two things is refused, an answer is only read.
    """

    SIZE, DATA, END, TRAILER = range(4)

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact
        self.complete = False
        self.malformed = False
        self._state = self.SIZE
        self.left = 0  # bytes of the current chunk that are still to come
        self._trailer = 0

    def feed(self, data: bytes) -> tuple[list[bytes], bytes]:
        """The pieces of the body in `data`, and what is left of it: the start of a line that is
        not whole yet, or what follows the body."""
        pieces: list[bytes] = []
        at = 0
        while at < len(data) and not self.complete and not self.malformed:
            if self._state == self.DATA:
                piece = data[at : at + self.left]
                pieces.append(piece)
                at += len(piece)
                self.left -= len(piece)
                self._state = self.DATA if self.left else self.END
                continue
            end = data.find(b"\n", at)
            if end < 0:
                self.malformed = len(data) - at > MAX_LINE_BYTES or (
                    self._state == self.END and data[at:] != b"\r"
                )
                break
            line = data[at:end]
            self._line(line.removesuffix(b"\r"))
            self.malformed = self.malformed or (self._exact and not line.endswith(b"\r"))
            at = end + 1
        return pieces, data[at:]

    def _line(self, line: bytes) -> None:
        if self._state == self.SIZE:
            size = (CHUNK_LINE if self._exact else FILLED_LINE).fullmatch(line)
            self.malformed = size is None
            self.left = int(size[1], 16) if size else 0
            self._state = self.DATA if self.left else self.TRAILER
        elif self._state == self.END:
            self.malformed = line != b""
            self._state = self.SIZE
        else:
            self._trailer += len(line)
            field = not self._exact or not line or TRAILER_LINE.fullmatch(line)
            self.malformed = not field or self._trailer > MAX_LINE_BYTES
            self.complete = not line
