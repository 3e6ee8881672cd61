"""WebSocket frames: where they begin and end, and the frame that says goodbye (RFC 6455)."""

from __future__ import annotations

import os
import struct

# Section 7.4.1: an endpoint is going away, such as a server going down.
GOING_AWAY = 1001


class Frames:
    """Follows the frames of one direction of a tunnel, without looking into them."""

    __slots__ = ("_header", "_left")

    def __init__(self) -> None:
        self._header = b""  # of a frame whose header is not whole yet
        self._left = 0  # bytes of the current frame that are still to come

    @property
    def at_boundary(self) -> bool:
        """Whether what has passed ends where a frame ends."""
        return not self._left and not self._header

    def feed(self, data: bytes) -> None:
        """Take note of bytes that pass."""
        at = 0
        while at < len(data):
            if self._left:
                step = min(self._left, len(data) - at)
                self._left -= step
                at += step
                continue
            header = self._header + data[at : at + 14 - len(self._header)]
            size = _header_size(header)
            if size is None or len(header) < size:
                self._header = header
                return
            at += size - len(self._header)
            self._header = b""
            self._left = _payload_size(header)

    def until_boundary(self, data: bytes) -> int:
        """How many of these bytes belong to the frame that has begun; all where it goes on. They
        are taken note of, the others are not."""
        at = 0
        while at < len(data) and not self.at_boundary:
            step = min(self._left, len(data) - at) if self._left else 1
            self.feed(data[at : at + step])
            at += step
        return at


def _header_size(header: bytes) -> int | None:
    """How long a frame's header is (section 5.2); None while too little of it is there."""
    if len(header) < 2:
        return None
    length, masked = header[1] & 0x7F, header[1] & 0x80
    return 2 + (2 if length == 126 else 8 if length == 127 else 0) + (4 if masked else 0)


def _payload_size(header: bytes) -> int:
    length = header[1] & 0x7F
    if length == 126:
        return int.from_bytes(header[2:4], "big")
    if length == 127:
        return int.from_bytes(header[2:10], "big")
    return length


def close_frame(*, masked: bool, code: int = GOING_AWAY) -> bytes:
    """A Close frame. One towards the application is `masked`, as a client's has to be (section
    5.3): it refuses any other with 1002."""
    payload = struct.pack("!H", code)
    if not masked:
        return bytes((0x88, len(payload))) + payload
    key = os.urandom(4)
    hidden = bytes(byte ^ key[at % 4] for at, byte in enumerate(payload))
    return bytes((0x88, 0x80 | len(payload))) + key + hidden
