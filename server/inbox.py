"""The body of a request that is read, on a job's thread, while it arrives."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

# How much of a body may wait for its reader.
INBOX_BYTES = 262144


class Left(ConnectionResetError):
    """The client has gone: nobody wants the rest of the answer."""


class Inbox(io.RawIOBase):
    """A file to read the body from. `wanted` is called on the reader's thread when more may come,
    after the inbox had been full."""

    def __init__(self, wanted: Callable[[], None]) -> None:
        self._wanted = wanted
        self._moved = threading.Condition()
        # Not a list of the pieces: each would take forty bytes more than it has.
        self._waiting = bytearray()
        self._full = False
        self._over = False
        self._cut = False
        self.is_read = False  # whether the application wants the body at all

    def put(self, piece: bytes) -> bool:
        """Add what has arrived; False if no more should be given for now."""
        with self._moved:
            self._waiting += piece
            self._full = len(self._waiting) >= INBOX_BYTES
            self._moved.notify()
            return not self._full

    def put_end(self, *, cut: bool = False) -> None:
        """The body has ended; or it was `cut`, and its end will never come."""
        with self._moved:
            self._over = True
            self._cut = self._cut or cut
            self._moved.notify()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for what arrives. Raises Left if the client has gone before the body's end."""
        self.is_read = True
        with self._moved:
            self._moved.wait_for(lambda: self._waiting or self._over)
            if self._cut and not self._waiting:
                raise Left("the client has gone in the middle of its body")
            size = min(len(buffer), len(self._waiting))
            buffer[:size] = self._waiting[:size]
            del self._waiting[:size]
            again = self._full and len(self._waiting) < INBOX_BYTES // 2
            self._full = self._full and not again
        if again:
            self._wanted()
        return size
