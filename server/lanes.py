"""Lanes: threads for work that may have to wait. Each kind of work has threads of its own, so that
no kind waits for another."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

from server.logs import Seldom
from server.loop import NEVER, Loop, Timer

log = logging.getLogger("gatehouse")

# A thread that has had nothing to do for this many seconds ends.
IDLE_SECONDS: Final = 5.0
# A lane none of whose jobs has been taken for this many seconds gets more threads.
STALLED_SECONDS: Final = 0.05
# Those that it got then stay for at least this many seconds.
RELIEF_SECONDS: Final = 1.0


class Lane:
    """Threads for one kind of job, up to `limit`, started when none is idle and ended when there
    has been nothing to do for a while. The last one stays: another might not be allowed.

    The first `eager` of them are started as jobs come. More are only started if no job has been
    taken for a while, because all threads are held up, and they end when that is over. Many short
    jobs do not need many threads: these would take the interpreter and the processor from each
    other, and from PostgreSQL on the same machine.
    """

    def __init__(self, loop: Loop, name: str, limit: int, eager: int | None = None) -> None:
        self._loop = loop
        self.name = name
        self._limit = limit
        self._eager = limit if eager is None else min(eager, limit)
        self._relief = Timer(loop, self.relieve)
        self._relieved = 0.0  # when threads were last started because jobs waited
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._spare = 0  # idle threads minus queued jobs
        self._threads = 0
        self._unstarted = Seldom()
        self._moved = 0.0  # when a job was last taken, or came while none was waiting

    def add(self, job: Callable[[], None]) -> None:
        """Have a thread do a job; for the loop's own thread."""
        with self._lock:
            if self._spare >= 0:
                self._moved = time.monotonic()
            self._spare -= 1
            start = self._spare < 0 and self._threads < self._eager
            self._count(int(start))
        self._queue.put(job)
        if start:
            self._start(1)
        # After the start, which may have failed: then nobody else would look again.
        if self._spare < 0 and self._relief.when == NEVER:
            self._relief.set(self._loop.now + STALLED_SECONDS)

    def _start(self, number: int) -> None:
        """Start so many threads, which have been counted, or as many of them as can be."""
        started = 0
        try:
            while started < number:
                threading.Thread(target=self._work, name=self.name, daemon=True).start()
                started += 1
        except RuntimeError as error:
            with self._lock:
                self._count(started - number)
                waiting = -self._spare
            if self._unstarted.due():
                log.error("%s: jobs that wait for a thread (%s): %d", error, self.name, waiting)

    def relieve(self) -> None:
        """Start threads for all jobs that wait, if none has been taken for a while, and look again
        as long as jobs wait. The loop calls this, because the threads may all be held up."""
        with self._lock:
            waiting = -self._spare
            more = 0
            now = time.monotonic()
            if waiting > 0 and now - self._moved > STALLED_SECONDS:
                more = min(waiting, self._limit - self._threads)
                self._count(more)
                self._relieved = now
        self._start(more)
        if waiting > 0:
            self._relief.set(self._loop.now + STALLED_SECONDS)

    def _count(self, threads: int) -> None:
        self._threads += threads
        self._spare += threads

    def _work(self) -> None:
        while True:
            try:
                job = self._queue.get(timeout=IDLE_SECONDS)
            except Empty:
                with self._lock:
                    # If no thread is spare, a job has just come, and counts on this one.
                    if self._spare > 0 and self._threads > 1:
                        self._count(-1)
                        return
                continue
            self._moved = time.monotonic()
            try:
                job()
            except BaseException:
                # SystemExit too would end the thread, which counts as one that is there.
                log.exception("a job failed")
            del job  # The name would keep the job's client alive until the next job comes.
            with self._lock:
                self._spare += 1
                if self._threads > self._eager and self._relief_is_over():
                    self._count(-1)
                    return

    def _relief_is_over(self) -> bool:
        return time.monotonic() - self._relieved > RELIEF_SECONDS
