"""Bodies, as both sides of the wire frame them: by a length, in chunks, or by the connection's end
(RFC 9112 section 6).

All readers have one shape. `feed` takes bytes that have arrived, and returns those that belong to
the body and those that follow it. `complete` says that the body has ended, `malformed` that its end
can no longer be found.
"""

from __future__ import annotations

import re
from typing import Final

from problems import BadRequest, BodyTooLarge, Problem

MAX_LINE_BYTES: Final = 65536
CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\0\r]*)?")
# Some servers pad the size with spaces.
PADDED_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\0\r]*)?")
TRAILER_LINE: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0\r\n]*")
# Chunk extensions and trailers are dropped. So that no client can send them without end, it may
# send this many bytes of framing for each byte of body, and this many in addition.
FRAMING_FOR_EACH_BYTE: Final = 16
FRAMING_BYTES: Final = 2 * MAX_LINE_BYTES


def chunk(piece: bytes) -> bytes:
    """A piece of a body as one chunk; the piece may not be empty, which would end the body."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


LAST_CHUNK: Final = b"0\r\n\r\n"


class Sized:
    """Takes a body of `length` bytes out of what arrives."""

    __slots__ = ("announced", "left")

    malformed = False

    def __init__(self, length: int) -> None:
        self.left = length
        self.announced = length

    @property
    def complete(self) -> bool:
        return not self.left

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        if len(data) <= self.left:
            self.left -= len(data)
            return data, b""
        left, self.left = self.left, 0
        return data[:left], data[left:]


class UntilClose:
    """Takes a body that ends when its connection ends."""

    __slots__ = ()

    malformed = False
    complete = False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        return data, b""


class Chunks:
    """Takes a chunked body apart (RFC 9112 section 7.1); trailers are dropped.

    If it is `exact`, as for requests, what two readers may understand in two ways is malformed: a
    line that ends with a line feed alone, and a size with spaces. `announced` is how many bytes the
    body has at least, by the chunks that have begun so far.
    """

    __slots__ = (
        "_exact",
        "_left",
        "_partial",
        "_state",
        "_trailer",
        "_framing",
        "announced",
        "complete",
        "malformed",
    )

    SIZE = 0
    DATA = 1
    END = 2
    TRAILER = 3

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact
        self.complete = False
        self.malformed = False
        self.announced = 0
        self._state = self.SIZE
        self._left = 0  # bytes of the current chunk that are still to come
        self._partial = b""  # the beginning of a line that is not whole yet
        self._trailer = 0
        self._framing = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        if self._state == self.DATA and len(data) < self._left:
            self._left -= len(data)
            return data, b""
        if self._partial:
            data, self._partial = self._partial + data, b""
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
                self._partial = data[at:]
                self.malformed = len(self._partial) > MAX_LINE_BYTES or (
                    self._state == self.END and self._partial != b"\r"
                )
                at = len(data)
                break
            line = data[at:end]
            self._framing += len(line)
            self._line(line.removesuffix(b"\r"))
            if len(line) > MAX_LINE_BYTES or (
                self._exact
                and (
                    not line.endswith(b"\r")
                    or self._framing > FRAMING_FOR_EACH_BYTE * self.announced + FRAMING_BYTES
                )
            ):
                self.malformed = True
            at = end + 1
        return b"".join(pieces), data[at:]

    def _line(self, line: bytes) -> None:
        if self._state == self.SIZE:
            size = (CHUNK_LINE if self._exact else PADDED_LINE).fullmatch(line)
            self.malformed = size is None
            self._left = int(size[1], 16) if size else 0
            self.announced += self._left
            self._state = self.DATA if self._left else self.TRAILER
        elif self._state == self.END:
            self.malformed = line != b""
            self._state = self.SIZE
        else:
            self._trailer += len(line)
            field = not self._exact or not line or TRAILER_LINE.fullmatch(line)
            self.malformed = not field or self._trailer > MAX_LINE_BYTES
            self.complete = not line


def fault_of(body: Sized | Chunks, largest: int) -> Problem | None:
    """What is wrong with a request's body as far as it has come, if anything is. `largest` is how
    many bytes it may have (0: any number)."""
    if body.malformed:
        return BadRequest("The chunked body is malformed.")
    if largest and body.announced > largest:
        return BodyTooLarge(largest)
    return None
