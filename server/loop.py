"""The event loop: it waits for sockets that are ready, timers that are due, and calls of threads.

One thread turns it, and that thread owns every socket. Other threads may use `call` and `wake`, and
nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import logging
import math
import os
import select
import selectors
import sys
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol

log = logging.getLogger("gatehouse")

NEVER: Final = math.inf
# How many events one turn takes at most. The others come in the next turn.
BATCH: Final = 256
# What is written to wake the loop: the number one in eight bytes, which an eventfd asks for.
ONE: Final = (1).to_bytes(8, sys.byteorder)
# One splice moves at most this many bytes: the size of the largest pipe that an ordinary user may
# have (fs.pipe-max-size).
PIPE_BYTES: Final = 1 << 20
# What may happen at a socket. LEAVING is that the peer has closed its sending half. Epoll tells it
# while earlier bytes are still unread; other systems show it only when those have been read.
READ: Final = 1  # EPOLLIN
WRITE: Final = 4  # EPOLLOUT
BROKEN: Final = 8 | 16  # EPOLLERR | EPOLLHUP
LEAVING: Final = getattr(select, "EPOLLRDHUP", 0)
# Watch for this to hear of BROKEN alone. Epoll always tells of that, but has to be asked for some
# event, and EPOLLMSG never happens. EPOLLPRI would: a client that sends urgent data could wake the
# loop at every turn.
BROKEN_ONLY: Final = getattr(select, "EPOLLMSG", 0)


class Watched(Protocol):
    """The owner of a descriptor that the loop watches."""

    def on_event(self, events: int) -> None:
        """Called with the events that have happened, of those watched for, or BROKEN."""


class Timer:
    """A deadline that may be moved often: to move it to a later time is only an assignment.

    `when` is the time at which `action` is called, in seconds on the monotonic clock, or NEVER.
    """

    __slots__ = ("_loop", "action", "queued", "when")

    def __init__(self, loop: Loop, action: Callable[[], None] | None = None) -> None:
        self._loop = loop
        self.queued = NEVER  # the time of its one valid entry in the loop's heap
        self.when = NEVER
        self.action = action

    def set(self, when: float) -> None:
        """Move the deadline."""
        self.when = when
        if when < self.queued:
            if self.queued < NEVER:
                self._loop.entry_outdated()
            self.queued = when
            self._loop.queue_timer(when, self)

    def cancel(self) -> None:
        """There is no deadline any more."""
        self.when = NEVER

    def drop(self) -> None:
        """The timer is not used any more: it keeps nothing alive, and leaves the heap in time."""
        self.when, self.action = NEVER, None
        if self.queued < NEVER:
            self.queued = NEVER
            self._loop.entry_outdated()

    def due(self, queued: float, now: float) -> None:
        """An entry of this timer has come up in the loop's heap: that of the time `queued`."""
        if queued != self.queued:
            return  # The timer was moved to an earlier time, and has already come up then.
        self.queued = NEVER
        if self.when > now:
            if self.when < NEVER:
                self.set(self.when)
            return
        self.when = NEVER
        if self.action is not None:
            self.action()

    def abandon(self) -> None:
        abandon(self.action)


class Loop:
    """`now` is the monotonic clock at the beginning of this turn, in seconds."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self.longest_turn = 0.0  # in seconds, since the reader last set it to 0
        self._poller: Any = select.epoll() if hasattr(select, "epoll") else Portable()
        self._watched: dict[int, Watched] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = 0
        self._outdated = 0  # entries of the heap that became outdated since it was last swept
        self._calls: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = SimpleQueue()
        self._soon: list[Callable[[], None]] = []
        self._closing: list[Any] = []
        self._asleep = False
        self._pipe: tuple[int, int] | None = None
        # What wakes the loop: a descriptor to read from, and one to write to.
        self._wake, self._waker = wake_descriptors()
        self._poller.register(self._wake, READ)

    # Sockets.

    def watch(self, descriptor: int, watched: Watched, before: int, events: int) -> None:
        """Watch a descriptor for `events`. Until now it was watched for the events `before`; 0 is
        for none."""
        if not before:
            self._poller.register(descriptor, events)
            self._watched[descriptor] = watched
        elif events:
            self._poller.modify(descriptor, events)
        else:
            # Epoll would report a broken connection at every turn, even if it is asked for nothing.
            self._poller.unregister(descriptor)
            del self._watched[descriptor]

    def close(self, sock: Any) -> None:
        """Close a socket that is no longer watched, at the end of this turn. If it were closed at
        once, a new connection could get its number, and with it an event of this turn that was
        meant for the old one."""
        self._closing.append(sock)

    def pipe(self) -> tuple[int, int]:
        """The two ends of a pipe, to write into and to read from, through which the kernel moves
        bytes from socket to socket. Each user leaves it empty, so that one is enough for all."""
        if self._pipe is None:
            outlet, intake = os.pipe()
            os.set_blocking(outlet, False)
            os.set_blocking(intake, False)
            with contextlib.suppress(OSError):
                fcntl.fcntl(intake, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            self._pipe = intake, outlet
        return self._pipe

    def drop_pipe(self) -> None:
        """Close the pipe, with what is left in it. The next user gets another."""
        pipe, self._pipe = self._pipe, None
        for descriptor in pipe or ():
            os.close(descriptor)

    # Time.

    def queue_timer(self, when: float, timer: Timer) -> None:
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, timer))

    def entry_outdated(self) -> None:
        """An entry of the heap is of no use any more. It would stay until its time comes, which may
        be minutes, and connections come and go by the thousand. So sweep the heap now and then."""
        self._outdated += 1
        if self._outdated > 1000 and self._outdated * 2 > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[0] == entry[2].queued]
            heapq.heapify(self._timers)
            self._outdated = 0

    # Calls.

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the loop's thread call a function; callable from any thread."""
        self._calls.put((function, arguments))
        if self._asleep:
            self._asleep = False  # One wake-up is enough, however many call until it is awake.
            self.wake()

    def soon(self, function: Callable[[], None]) -> None:
        """Call a function at the end of this turn; for the loop's own thread."""
        self._soon.append(function)

    def wake(self) -> None:
        """End the loop's sleep; callable from any thread and from a signal handler."""
        try:
            os.write(self._waker, ONE)
        except OSError:
            pass  # It has wake-ups enough already, or the loop has ended.

    def turn(self) -> None:
        """Wait for what happens next, and see to all of it."""
        self._asleep = True
        timeout = self._longest_sleep()
        events = self._poller.poll(timeout, BATCH)
        self._asleep = False
        self.now = began = time.monotonic()
        for descriptor, happened in events:
            watched = self._watched.get(descriptor)
            if watched is not None:  # else an earlier event of this turn has ended it
                self.attempt(watched.on_event, happened)
            elif descriptor == self._wake:
                self._drain_wake()
        self._take_calls()
        self._take_timers(began)
        self.turn_over()
        self.longest_turn = max(self.longest_turn, time.monotonic() - began)

    def _take_timers(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            queued, _, timer = heapq.heappop(self._timers)
            self.attempt(timer.due, queued, now)

    def turn_over(self) -> None:
        """Do what was put off to the end of the turn."""
        while self._soon:
            soon, self._soon = self._soon, []
            for function in soon:
                self.attempt(function)
        if self._closing:
            closing, self._closing = self._closing, []
            for sock in closing:
                self.attempt(sock.close)

    def _longest_sleep(self) -> float:
        # `_asleep` is set already: a call is either seen here, or comes later and wakes the loop.
        if self._calls.qsize() or self._soon:
            return 0.0
        if not self._timers:
            return 1.0
        return min(1.0, max(0.0, self._timers[0][0] - time.monotonic()))

    def _take_calls(self) -> None:
        # Only those that are here now. Otherwise quick threads could keep the sockets waiting.
        for _ in range(self._calls.qsize()):
            try:
                function, arguments = self._calls.get_nowait()
            except Empty:
                return
            self.attempt(function, *arguments)

    def _drain_wake(self) -> None:
        try:
            # If a pipe has more wake-ups than that, the rest ends the next sleep.
            os.read(self._wake, 4096)
        except BlockingIOError:
            pass

    def attempt(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a method, which should never fail. If it fails, its object may be in any state, so
        that is ended, by its `abandon`. The loop goes on."""
        try:
            function(*arguments)
        except Exception:
            log.exception("an event could not be handled")
            try:
                abandon(function)
            except Exception:
                log.exception("what the event belonged to could not be ended")

    def shut(self) -> None:
        """Close what is the loop's own."""
        for sock in self._closing:
            sock.close()
        self._closing.clear()
        descriptors = {self._wake, self._waker, *(self._pipe or ())}
        # A late `wake` must not write to what has their numbers then.
        self._wake = self._waker = -1
        for descriptor in descriptors:
            os.close(descriptor)
        self._poller.close()


def wake_descriptors() -> tuple[int, int]:
    """A descriptor to read wake-ups from, and one to write them to. On Linux both are one eventfd,
    which costs a third of what a pipe costs."""
    if hasattr(os, "eventfd"):
        counter = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return counter, counter
    outlet, intake = os.pipe()
    os.set_blocking(outlet, False)
    os.set_blocking(intake, False)
    return outlet, intake


def abandon(method: Any) -> None:
    """End what a method belongs to, if that can be."""
    end = getattr(getattr(method, "__self__", None), "abandon", None)
    if end is not None:
        end()


class Portable:
    """A poller with the methods of select.epoll, for systems without it."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.unregister = self._selector.unregister
        self.close = self._selector.close

    def register(self, descriptor: int, events: int) -> None:
        self._selector.register(descriptor, self._translated(events))

    def modify(self, descriptor: int, events: int) -> None:
        self._selector.modify(descriptor, self._translated(events))

    def _translated(self, events: int) -> int:
        # A selector has to watch for something. If nothing is asked for, that is reading.
        found = selectors.EVENT_READ if events & READ or not events & WRITE else 0
        return found | (selectors.EVENT_WRITE if events & WRITE else 0)

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        return [
            (
                key.fd,
                (READ if mask & selectors.EVENT_READ else 0)
                | (WRITE if mask & selectors.EVENT_WRITE else 0),
            )
            for key, mask in self._selector.select(timeout)
        ]
