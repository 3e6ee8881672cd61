"""A connected socket that the loop owns: reading, writing what the other side takes, and its end.

The client's side and the upstream's side of an exchange are both one of these.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import ssl
import struct
import sys
import termios
import time
from collections import deque
from typing import Any, Final

from server.loop import BROKEN, BROKEN_ONLY, LEAVING, PIPE_BYTES, READ, WRITE, Loop

# A read takes up to READ_BYTES. After one that was full, or had READ_BYTES or more, the next read
# takes four times as many, up to LARGE_READ_BYTES. If what was read took longer than SLOW_SECONDS
# to handle, the next read takes SMALL_READ_BYTES, so that others have their turn.
READ_BYTES: Final = 65536
LARGE_READ_BYTES: Final = 262144
SLOW_SECONDS: Final = 0.005
SMALL_READ_BYTES: Final = 8192
# If more bytes than this wait to be sent to one side, the other is not read until all are taken.
HIGH_WATER: Final = 262144

# Small pieces that wait are joined into pieces of up to this many bytes. An event or a message of
# two bytes costs a hundred times as much by itself: a side that did not read held 4 MB, not
# HIGH_WATER.
JOINED_BYTES: Final = 4096

# How splice(2) moves bytes: as pages if it can, without a copy, and without waiting.
SPLICES: Final = hasattr(os, "splice")
SPLICE: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK if SPLICES else 0

# The kernel asks a side from which nothing has come for KEEPIDLE seconds whether it is still there,
# and again every KEEPINTVL seconds. If nobody answers KEEPCNT questions, the connection is broken.
# Nothing else tells of a machine that has vanished while nothing is sent to it, nor of a client
# that has left while so much of what it sent is unread that its end cannot arrive. Systems differ
# in what they call the first option.
PROBING: Final = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in {
        "TCP_KEEPIDLE": 45,
        "TCP_KEEPALIVE": 45,
        "TCP_KEEPINTVL": 15,
        "TCP_KEEPCNT": 3,
    }.items()
    if hasattr(socket, name)
]

# In compiled code it costs more to look `time.monotonic` up than to call it.
clock: Final = time.monotonic

WAIT: Final = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Stream:
    """Subclasses say what is to happen in `received`, `ended`, `drained` and `failed`. The loop
    calls these, but none after `failed`, and none after `close`, except for the `failed` of a
    connection that had broken before.

    `queued` is how many bytes wait for the other side to take them.
    """

    __slots__ = (
        "_deaf",
        "_ending",
        "_events",
        "_fd",
        "_idle_events",
        "_move_bytes",
        "_pending",
        "_read_bytes",
        "_write_waits_for_read",
        "closed",
        "ended_reading",
        "loop",
        "paused",
        "queued",
        "sock",
        "tls",
    )

    def __init__(self, loop: Loop, sock: Any, idle_events: int = 0) -> None:
        """Take over a connected socket that does not block. `idle_events` are watched for even
        while this side is paused."""
        self._idle_events = idle_events
        self.loop = loop
        self.sock = sock
        self._fd = sock.fileno()
        self.tls = isinstance(sock, ssl.SSLSocket)
        self._pending: deque[memoryview] | None = None
        self.queued = 0
        self._events = 0
        self.paused = False
        self._read_bytes = READ_BYTES
        # How much `move_to` moves at once. It grows as long as the other side takes all of it,
        # because the bytes that the other side does not take are kept here.
        self._move_bytes = READ_BYTES
        self._deaf = False  # whether nothing is sent to the other side any more
        self._ending = False  # whether the sending half ends when all is sent
        self._write_waits_for_read = False
        self.ended_reading = False
        self.closed = False

    # What subclasses have to say.

    def received(self, data: bytes) -> None:
        """Bytes have arrived."""
        raise NotImplementedError

    def ended(self) -> None:
        """The other side has ended its sending half: no more bytes come."""
        raise NotImplementedError

    def drained(self) -> None:
        """All that was queued has been taken."""
        raise NotImplementedError

    def progressed(self) -> None:
        """Some of what was queued has been taken."""

    def unsendable(self) -> None:
        """Nothing more can be sent. Unless a subclass reads on, the connection is broken."""
        self._broke()

    def failed(self) -> None:
        """The connection is broken: it was reset, or cannot be written to. Called at the end of a
        turn."""
        raise NotImplementedError

    # Reading.

    def watch(self) -> None:
        """Have the loop watch for the events that this side waits for now."""
        if self.closed:
            return
        events = self._idle_events
        if self._pending and self._write_waits_for_read:
            events |= READ  # Even while it is paused: TLS has to read before it can send on.
        elif self._pending:
            events |= WRITE
        if not self.paused and not self.ended_reading:
            events |= READ
        if events != self._events:
            self.loop.watch(self._fd, self, self._events, events)
            self._events = events

    def pause(self) -> None:
        """Read no more for now."""
        if not self.paused:
            self.paused = True
            self._read_bytes = min(self._read_bytes, READ_BYTES)
            self.watch()

    def resume(self) -> None:
        """Read again. TLS may have read bytes from the socket already, which no selector sees."""
        if self.paused:
            self.paused = False
            self.watch()
            if self.tls:
                self.loop.soon(self._read_on)

    def _read_on(self) -> None:
        if not self.closed and not self.paused and not self.ended_reading:
            self._read()

    def on_event(self, events: int) -> None:
        if self._pending and (events & WRITE or self._write_waits_for_read):
            self._write_waits_for_read = False
            self._write()
            if self.closed:
                return
        if events & (READ | BROKEN) and not self.paused and not self.ended_reading:
            self._read()
        elif events & BROKEN:
            self._hung_up()
        elif events & LEAVING and self.paused:
            self._idle_events = BROKEN_ONLY  # Or the selector would report it at every turn.
            self.watch()
            self.leaving()

    def leaving(self) -> None:
        """The other side has ended its sending half, but bytes before that are not read yet."""

    def _hung_up(self) -> None:
        """The connection was reset, or both halves have ended in order. Only SO_ERROR tells the two
        apart. After an orderly end there may be bytes that are not read yet: they stay."""
        if self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._broke()
        else:
            self._idle_events = 0
            self.watch()

    def _read(self) -> None:
        while True:
            began = clock()
            try:
                data = self.sock.recv(self._read_bytes)
            except WAIT:
                return
            except OSError:
                # It was reset; or it ended without TLS's own end, and nobody knows how much is
                # missing.
                self._broke()
                return
            if not data:
                self._end_reading()
                return
            self.received(data)
            if clock() - began > SLOW_SECONDS:
                self._read_bytes = SMALL_READ_BYTES
            elif len(data) >= min(self._read_bytes, READ_BYTES):
                self._read_bytes = min(4 * self._read_bytes, LARGE_READ_BYTES)
            else:
                self._read_bytes = min(self._read_bytes, READ_BYTES)
            # No selector shows bytes that the TLS layer has read ahead.
            if not self.tls or self.closed or self.paused or not self.sock.pending():
                return

    def _end_reading(self) -> None:
        self.ended_reading = True
        self._idle_events = BROKEN_ONLY
        self.watch()
        self.ended()

    # Writing.

    def send(self, data: bytes) -> None:
        """Send `data`: now as much as the other side takes, and the rest when it takes more."""
        if self.closed or self._deaf or not data:
            return
        sent = 0
        if not self._pending:
            try:
                sent = self.sock.send(data)
            except WAIT as wait:
                self._write_waits_for_read = isinstance(wait, ssl.SSLWantReadError)
            except OSError:
                self.unsendable()
                return
            if sent == len(data):
                return
            if self._pending is None:
                self._pending = deque()
        assert self._pending is not None
        view = memoryview(data)[sent:]
        self.queued += len(view)
        if self._pending and len(self._pending[-1]) + len(view) <= JOINED_BYTES:
            view = memoryview(b"".join((self._pending.pop(), view)))
        self._pending.append(view)
        self.watch()

    def _write(self) -> None:
        pending = self._pending
        assert pending is not None
        began = self.queued
        try:
            while pending:
                sent = self.sock.send(pending[0])
                self.queued -= sent
                if sent < len(pending[0]):
                    pending[0] = pending[0][sent:]
                    break
                pending.popleft()
        except WAIT as wait:
            self._write_waits_for_read = isinstance(wait, ssl.SSLWantReadError)
        except OSError:
            self.unsendable()
            return
        if self.queued < began:
            self.progressed()
        if self.closed:
            return
        if not pending:
            self._pending = None
            self.watch()
            if self._ending:
                self._end_sending()
            if not self.closed:
                self.drained()
        else:
            self.watch()

    def stop_sending(self) -> None:
        """Drop what is queued, and all that is sent from now on."""
        self._deaf = True
        self._pending, self.queued = None, 0
        self.watch()

    def end(self) -> None:
        """End the sending half when all is sent."""
        if self._ending or self.closed:
            return
        self._ending = True
        if not self._pending:
            self._end_sending()

    def _end_sending(self) -> None:
        try:
            # Not SSLSocket.shutdown: it removes the TLS layer, which the bytes that still arrive
            # need. Nor is TLS's own end sent first: SSLSocket.unwrap then reads that of the other
            # side, and breaks the connection if it finds data instead.
            socket.socket.shutdown(self.sock, socket.SHUT_WR)
        except OSError:
            self._broke()

    def move_to(self, other: Stream, most: int) -> tuple[int, bytes] | None:
        """Have the kernel move bytes that have arrived, `most` of them at most, to another side's
        socket, without a copy into this process and out of it. Returns how many bytes were read,
        and those of them that the other side did not take; None if the end was read. Raises OSError
        if there is nothing to read, or if the connection is broken."""
        source, target = self._fd, other._fd
        intake, outlet = self.loop.pipe()
        taken = os.splice(source, intake, min(most, self._move_bytes), flags=SPLICE)
        if not taken:
            return None
        given = 0
        rest = b""
        try:
            # If the other side has failed, the next write to it, of the rest, finds that out.
            with contextlib.suppress(OSError):
                while given < taken:
                    given += os.splice(outlet, target, taken - given, flags=SPLICE)
            while len(rest) < taken - given:
                rest += os.read(outlet, taken - given)
        except BaseException:  # There may be no memory. The next client must not get what is left.
            self.loop.drop_pipe()
            raise
        self._move_bytes = READ_BYTES if rest else min(self._move_bytes + READ_BYTES, PIPE_BYTES)
        return taken, rest

    def untaken(self) -> int:
        """How many bytes the kernel holds that the other side has not acknowledged yet. Only Linux
        tells: elsewhere it is 0."""
        if sys.platform != "linux":
            return 0
        try:
            answer = fcntl.ioctl(self._fd, termios.TIOCOUTQ, bytes(4))
        except OSError:
            return 0
        return int.from_bytes(answer, sys.byteorder)

    # The end.

    def _broke(self) -> None:
        # `failed` is not called at once: the caller may be in the middle of sending or reading, and
        # would find itself ended.
        if self.closed:
            return
        if self._events:
            self.loop.watch(self._fd, self, self._events, 0)
            self._events = 0
        self._pending, self.queued = None, 0
        self.closed = True
        self.loop.close(self.sock)
        self.loop.soon(self.failed)

    def abandon(self) -> None:
        """A method of this connection failed, which never should happen: end the connection and
        all that belongs to it. The loop calls this."""
        raise NotImplementedError

    def close(self, *, reset: bool = False) -> None:
        """Close the connection. With `reset` the other side sees a reset instead of an orderly end,
        and bytes that it has not taken are dropped."""
        if self.closed:
            return
        self.closed = True
        self._pending, self.queued = None, 0
        if self._events:
            self.loop.watch(self._fd, self, self._events, 0)
            self._events = 0
        if reset:
            reset_at_close(self.sock)
        self.loop.close(self.sock)


def reset_at_close(sock: Any) -> None:
    """Have the end of a socket be a reset. Then its port is free at once."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
