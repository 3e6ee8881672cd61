"""WebSocket frames: where they begin and end, and the frame that closes a connection (RFC 6455)."""

from __future__ import annotations

import os
import struct
from typing import Final

# Section 7.4.1: an endpoint is going away, such as a server going down.
GOING_AWAY: Final = 1001


class Frames:
    """Follows the frames of one direction of a tunnel, without looking into them."""

    __slots__ = ("_header", "_left")

    def __init__(self) -> None:
        self._header = b""  # the beginning of a frame's header that is not whole yet
        self._left = 0  # bytes of the current frame that are still to come

    @property
    def at_boundary(self) -> bool:
        """Whether the bytes that have passed end at the end of a frame."""
        return not self._left and not self._header

    def feed(self, data: bytes) -> None:
        """Take note of bytes that pass. A peer may send only the smallest of frames. So each
        frame is one pass of the `while`, which calls no function for a short one."""
        if self._header:
            data, self._header = self._header + data, b""
        at, end = self._left, len(data)
        while at < end:
            # A frame's header (section 5.2): two bytes, a longer length, a mask.
            length = data[at + 1] if at + 1 < end else 0x7F
            begin = at + (6 if length & 0x80 else 2)
            length &= 0x7F
            if length > 125:
                width = 2 if length == 126 else 8
                begin += width
                length = int.from_bytes(data[at + 2 : at + 2 + width], "big")
            if begin > end:
                self._header, self._left = data[at:], 0
                return
            at = begin + length
        self._left = at - end

    def until_boundary(self, data: bytes) -> int:
        """How many of these bytes belong to the frame that has begun: all if it does not end in
        them. These are taken note of, the others are not."""
        at = 0
        while at < len(data) and not self.at_boundary:
            step = min(self._left, len(data) - at) if self._left else 1
            self.feed(data[at : at + step])
            at += step
        return at


def close_frame(*, masked: bool) -> bytes:
    """A Close frame. One to the application is `masked`, as a client's frames have to be (section
    5.3): the application would answer an unmasked frame with the error 1002."""
    payload = struct.pack("!H", GOING_AWAY)
    if not masked:
        return bytes((0x88, len(payload))) + payload
    key = os.urandom(4)
    hidden = bytes(byte ^ key[at % 4] for at, byte in enumerate(payload))
    return bytes((0x88, 0x80 | len(payload))) + key + hidden
