"""The logs: lines on standard output and error, whose reader may be slow, or gone."""

from __future__ import annotations

import os
import select
import stat
import threading
import time
from collections import deque
from functools import lru_cache
from json.encoder import encode_basestring_ascii as json_string
from typing import Final

from wire.request import USERINFO, Head

SAY_SECONDS: Final = 10.0
# At most this many bytes wait for a slow reader. Lines beyond that are dropped.
PENDING_BYTES: Final = 1 << 20
# A line of the access log must not be longer than PIPE_BUF: the kernel writes that much in one
# piece, so that the lines of two workers do not mix. So long methods and targets are cut to this
# many characters. One of a target may become six bytes of JSON: if the target has more than
# LONGEST_ESCAPED of these, a sixth of LONGEST_TARGET is kept.
LONGEST_METHOD: Final = 100
LONGEST_TARGET: Final = 3000
LONGEST_ESCAPED: Final = 3500


class Seldom:
    """Whether something that may happen all the time is logged once more: at most once in
    SAY_SECONDS."""

    def __init__(self) -> None:
        self._said = -SAY_SECONDS

    def due(self) -> bool:
        """Whether to log it now."""
        now = time.monotonic()
        if now - self._said < SAY_SECONDS:
            return False
        self._said = now
        return True


class Output:
    """Writes lines to a descriptor, from any thread. No thread waits for the reader.

    To ask first whether a pipe has room is not enough. Another process may fill it before the
    write, which would then wait, and with it every thread that logs. So a pipe is opened once more,
    for a descriptor on which no write ever waits.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._waits = never_waiting(descriptor)
        self._poller = writable(self._descriptor)
        self._lock = threading.Lock()
        self._pending: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self.why = ""  # why lines were dropped last
        self._writing = threading.Lock()
        self._within = False  # whether the last byte that was written is in the middle of a line
        self._torn = False  # whether the rest of that line could not be written
        # The parent writes the lines that wait at a fork; the child must not write them again.
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._pending.clear()
        self._size = self._dropped = 0

    def write(self, text: str) -> None:
        """Write lines, now or when the reader takes them."""
        data = text.encode(errors="backslashreplace")
        short = len(data) <= select.PIPE_BUF
        # The usual case: nothing waits, and the reader takes all of it.
        if short and not self._pending and self._writing.acquire(blocking=False):
            try:
                if rest := self._give(data):
                    self._keep(rest, first=True)  # Before any other line can be written.
            finally:
                self._writing.release()
        else:
            self._keep(data)
        if self._pending:
            self.flush()

    def _keep(self, data: bytes, *, first: bool = False) -> None:
        with self._lock:
            if self._size + len(data) > PENDING_BYTES:
                self._dropped += data.count(b"\n")
                self.why = "the reader is too slow"
                return
            if first:
                self._pending.appendleft(data)
            else:
                self._pending.append(data)
            self._size += len(data)

    def flush(self) -> None:
        """Write what the reader takes now."""
        # Look again after each release of the lock: another thread that could not get it has left
        # its line to this one.
        while self._pending and self._writing.acquire(blocking=False):
            try:
                while self._pending:
                    if not self._write_some():
                        return
            finally:
                self._writing.release()

    def finish(self, until: float) -> None:
        """Give the reader what is left, and wait for it until then (on the monotonic clock)."""
        while self._pending:
            self.flush()
            left = until - time.monotonic()
            if left <= 0 or not writable(self._descriptor).poll(left * 1000):
                return

    def dropped(self) -> int:
        """How many lines have been dropped since this was last asked."""
        with self._lock:
            number, self._dropped = self._dropped, 0
        return number

    def _write_some(self) -> bool:
        data = self._pending[0]
        left = self._give(data)
        with self._lock:
            self._size -= len(data) - len(left)
            if left:
                self._pending[0] = left
            else:
                self._pending.popleft()
        return len(left) < len(data)

    def _give(self, data: bytes) -> bytes:
        """Write as much of `data` as the reader takes now, and return the rest."""
        if self._waits and not self._poller.poll(0):
            return data
        try:
            if self._torn:  # End that line, so that the next one is whole.
                os.write(self._descriptor, b"\n")
                self._within = self._torn = False
            size = os.write(self._descriptor, data[: select.PIPE_BUF])
            self._within = not data[:size].endswith(b"\n")
            return data[size:]
        except BlockingIOError:
            return data
        except OSError as error:  # Nobody reads it any more, or a disk is full: serve all the same.
            with self._lock:
                self._dropped += data.count(b"\n")
                self.why = error.strerror or str(error)
            self._torn = self._within
            return b""


def never_waiting(descriptor: int) -> tuple[int, bool]:
    """A descriptor for the same output, and whether a write to it may have to wait.

    A pipe is opened anew, with O_NONBLOCK. The flag is not set on the given descriptor, because
    other processes share that. Opening it works on Linux, for a user who may write to the pipe. In
    all other cases the given descriptor is returned. A write to a file never waits.
    """
    mode = os.fstat(descriptor).st_mode
    try:
        if stat.S_ISFIFO(mode):
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK), False
    except OSError:
        pass
    return descriptor, not stat.S_ISREG(mode)


def writable(descriptor: int) -> select.poll:
    """An object that tells whether a descriptor can be written to. Two threads must not use one at
    once."""
    poller = select.poll()
    poller.register(descriptor, select.POLLOUT)
    return poller


def access_line(head: Head, status: str, size: int, seconds: float, caller: str) -> str:
    """The line of JSON in the access log for a request that has just been answered. `size` is that
    of the answer's body in bytes, `seconds` how long it took; `status` is empty if no answer was
    sent."""
    now = time.time_ns() // 1_000_000
    took = max(0, int(seconds * 1e6))
    # Where one part of an f-string has a format, mypyc formats all of its parts, one by one.
    fraction, thousandths = str(now % 1000).zfill(3), str(took % 1000).zfill(3)
    return (
        f'{{"time": "{second(now // 1000)}.{fraction}Z",'
        f' "method": "{head.method[:LONGEST_METHOD]}", "target": {quoted(head.target)},'
        f' "status": {status[:3] or "0"}, "bytes": {size}, "ms": {took // 1000}.{thousandths},'
        f' "caller": "{caller}", "request_id": "{head.id}"}}\n'
    )


def asked(head: Head) -> str:
    """A request's method and target, for a line of the error log. A query is left out: it may be
    secret, and only the access log can be turned off."""
    path, mark, _ = head.target.partition("?")
    return f"{head.method[:LONGEST_METHOD]} {quoted(path + (mark and '?...'))}"


def quoted(target: str) -> str:
    """A request target as a JSON string, without the user name and password that it may hold."""
    if not target.startswith("/"):
        target = USERINFO.sub("//", target)
    text = json_string(target)
    if len(target) > LONGEST_TARGET:
        text = json_string(target[:LONGEST_TARGET] + "…")
    if len(text) > LONGEST_ESCAPED:
        text = json_string(target[: LONGEST_TARGET // 6] + "…")
    return text


@lru_cache(2)
def second(now: int) -> str:
    """Seconds since 1970 as a date and a time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
