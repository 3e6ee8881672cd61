"""One client connection: waitress's channel, replaced. The comments say what bit."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from waitress.buffers import OverflowableBuffer
from waitress.channel import ClientDisconnected, HTTPChannel

from server.parser import RequestParser
from server.task import Task

# A streamed answer gives up its thread when its client has taken nothing for this many seconds…
STALL_SECONDS = 0.1
# …and the connection of a client that has taken nothing for this many, or has waited as long for a
# place for its stream, is closed.
READER_SECONDS = 60.0
# How much of a refused request is read and thrown away, so that the refusal is not lost: closing a
# socket with unread bytes resets it, which may destroy the answer (RFC 9112 section 9.6).
LINGER_BYTES = 1 << 20
LINGER_SECONDS = 2.0
# States of a connection in Linux's tcp_info: reset, and closed by the other side.
TCP_CLOSE, TCP_CLOSE_WAIT = 7, 8


class Channel(HTTPChannel):  # type: ignore[misc]
    """One client connection.

    The event loop's thread reads and parses; a lane's thread runs `service`. A lane's thread sends
    at once what it has, and leaves to the loop only what the client does not take.
    """

    parser_class = RequestParser
    requests: list[RequestParser]
    request: RequestParser | None
    unparsed = b""  # what came with the requests that wait, and is for later ones
    held = False  # whether the next request waits until the client has taken the last answer
    kept = False  # whether the buffer has been used
    parked: Task | None = None
    resuming = False
    ended = False  # whether what else comes is no request: its last one is here, or was refused
    refused = False
    gone = False
    on_gone: Callable[[], None] | None = None
    served = 0
    lingering = 0.0
    lingered = 0

    @property
    def stalled(self) -> bool:
        """Whether the client has not yet taken all that was written."""
        return bool(self.total_outbufs_len)

    def readable(self) -> bool:
        # Read on while a request is served (waitress's lookahead), or a client that leaves in the
        # middle of one would go unnoticed.
        if self.lingering:
            return True
        return not self.gone and bool(super().readable())

    def handle_read(self) -> None:
        """Read what has arrived. An end of file while a request is under way means that the client
        has gone, though it may only have closed its sending half: the two look the same, and
        proxies take both for the former. Waitress would close at once, and an answer of ours
        that was nearly ready would be lost."""
        try:
            data = self.socket.recv(self.adj.recv_bytes)
        except BlockingIOError:
            return
        except OSError:
            self.handle_close()
            return
        if self.lingering:
            self.lingered += len(data)
            if not data or self.lingered > LINGER_BYTES:
                self.handle_close()
        elif data:
            self.received(data)
            if self.request is not None or self.requests:  # else it was empty lines
                self.last_activity = time.time()
        else:
            with self.requests_lock:  # or its thread might end in between, and nobody would close
                self.gone = bool(self.requests)
            if self.gone:
                self.leave()
            else:
                self.handle_close()

    def received(self, data: bytes) -> bool:
        """Parse requests, on the loop's thread: one more than the one under way, like waitress's
        lookahead. Waitress parses all that one read has brought, which may be thousands."""
        with self.requests_lock:
            if self.ended or self.will_close or self.close_when_flushed:
                return False
            data = self.unparsed + data
            while data and len(self.requests) <= self.adj.channel_request_lookahead:
                request = self.request = self.request or self.parser_class(self.adj)
                data = data[request.received(data) :]
                if not self.requests and self._owes_continue():
                    self.send_continue()
                if request.completed:
                    self.request, self.sent_continue = None, False
                    if request.body_unread or request.connection_close:
                        self.ended, data = True, b""
                    if not request.empty:
                        self.requests.append(request)
                        if len(self.requests) == 1:
                            self.server.add_task(self)
            self.unparsed = data
        return True

    def send_continue(self) -> None:
        """Ask for a body, on the loop's thread, which sends it when it looks at this one next."""
        assert self.request is not None
        self.request.expect_continue = False
        self.sent_continue = True
        with self.outbuf_lock:
            self._keep(memoryview(b"HTTP/1.1 100 Continue\r\n\r\n"))

    def has_left(self) -> bool:
        """Whether the client has closed its side though nobody reads from it: more requests wait
        here than one, and behind them the end of file does not show."""
        if self.gone or len(self.requests) <= self.adj.channel_request_lookahead:
            return False
        try:
            if sys.platform == "linux":
                state = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
                return state in (TCP_CLOSE, TCP_CLOSE_WAIT)
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def leave(self) -> None:
        """The client has gone: tell whoever works for it."""
        self.gone = True
        if self.on_gone is not None:
            self.on_gone()

    def handle_write(self) -> None:
        super().handle_write()
        self.advance()

    def handle_close(self) -> None:
        if not (self.will_close and self._linger()):
            super().handle_close()
            self.leave()
            self.advance()

    def _linger(self) -> bool:
        # After a refusal: see LINGER_BYTES.
        if self.lingering or not self.refused or self.gone:
            return False
        self.will_close = False
        self.lingering = time.monotonic()
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            return False
        return True

    def write_soon(self, data: bytes, patient: bool = False) -> int:
        """Send `data`; what the client does not take is kept, and the loop sends it. Where
        `patient`, wait STALL_SECONDS for the client to take more. Raises ClientDisconnected."""
        view = memoryview(data)
        while view:
            with self.outbuf_lock:
                if not self.connected:
                    raise ClientDisconnected
                if not self.total_outbufs_len:
                    view = view[self._send_now(view) :]
                kept = view and not (patient and not self.total_outbufs_len)
                if kept:
                    self._keep(view)
            if kept:
                self.server.wake(self)  # after the lock, which the loop takes while it is woken
                break
            if view and not self._writable_within(STALL_SECONDS):
                patient = False
        return len(data)

    def _send_now(self, view: memoryview) -> int:
        try:
            sent: int = self.socket.send(view)
        except BlockingIOError:
            return 0
        except OSError:
            raise ClientDisconnected from None
        self.last_activity = time.time()
        return sent

    def _keep(self, view: memoryview) -> None:
        self.kept = True
        self.outbufs[-1].append(bytes(view))
        self.total_outbufs_len += len(view)

    def _writable_within(self, seconds: float) -> bool:
        poller = select.poll()
        try:
            poller.register(self.socket, select.POLLOUT)
        except (TypeError, ValueError, OSError):  # closed by the loop meanwhile
            raise ClientDisconnected from None
        return bool(poller.poll(seconds * 1000))

    def service(self) -> None:
        """Serve the first request, or go on with it; called on a lane's thread."""
        task, self.parked = self.parked, None
        if task is None:
            task = Task(self, self.requests[0])
        if not task.run():
            self.resuming = False  # and not before, or the loop may resume it once more
            self.parked = task
            self.server.wake(self)
            return
        self.on_gone = None
        self.served += 1
        with self.requests_lock:
            if task.close_on_finish or self.gone:
                self.refused = self.requests[0].body_unread if self.requests else False
                for request in self.requests:
                    request.close()
                self.requests, self.request, self.unparsed = [], None, b""
                self.close_when_flushed = True
            else:
                if self.request is not None:
                    # A part of the next one is here already, and had to wait for this one's end.
                    self.request.started = time.monotonic()
                self.requests.pop(0).close()
                if self.requests and self.stalled:
                    self.held = True
                elif self.requests:
                    self.server.add_task(self)
        self.last_activity = time.time()
        if self.close_when_flushed or self.requests or self.request or self.stalled:
            self.server.wake(self)

    def _owes_continue(self) -> bool:
        request = self.request
        return bool(
            self.connected
            and request is not None
            and request.expect_continue
            and request.headers_finished
            and not self.sent_continue
        )

    def advance(self) -> None:
        """Do what is next, on the loop's thread: resume a stream whose client has caught up, give
        up one whose client has gone, go on to the next request, and tell the selector what to watch
        for."""
        task = self.parked
        if task is not None:
            self._go_on_with(task)
        elif not self.stalled:
            self._go_on()
        self.server.rearm(self)

    def _go_on_with(self, task: Task) -> None:
        stream: Any = task.body
        if self.connected and not self.resuming and not self.stalled:
            self.resuming = True
            stream.resume(lambda: self.server.add_task(self))
        elif not self.connected and (not self.resuming or stream.withdraw()):
            self.parked = None
            task.finish()

    def _go_on(self) -> None:
        if self.kept:
            with self.outbuf_lock:
                if not self.stalled:  # what was sent stays in the buffer
                    self.kept = False
                    self.outbufs.pop().close()
                    self.outbufs.append(OverflowableBuffer(self.adj.outbuf_overflow))
        with self.requests_lock:
            if self.held and self.connected:
                self.held = False
                self.server.add_task(self)
            elif not self.requests and self._owes_continue():
                self.send_continue()
        if self.unparsed and self.connected:
            self.received(b"")

    def reset_on_close(self) -> None:
        """Make closing the socket send a reset, not an orderly end."""
        sock = self.socket  # None once the loop has closed it
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def expired(self, now: float) -> bool:
        """Whether this connection has used up its time: idle, sending or reading too slowly."""
        if self.lingering:
            return now - self.lingering > LINGER_SECONDS
        quiet = time.time() - self.last_activity
        if self.stalled or self.parked is not None:
            return quiet > READER_SECONDS
        if self.requests:  # whatever comes after them has to wait for their answers
            return False
        if self.request is not None:
            return bool(self.request.overdue(now))
        return bool(quiet > self.adj.channel_timeout)
