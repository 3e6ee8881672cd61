"""Lanes: threads for each kind of request, so that no kind waits for another's."""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue

from server.channel import Channel

log = logging.getLogger("gatehouse")


class Lane:
    """Threads that serve one kind of request, started when none is idle, up to a limit. The kinds
    do not wait for each other's threads."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._queue: SimpleQueue[Channel] = SimpleQueue()
        self._lock = threading.Lock()
        self._spare = 0  # idle threads less queued channels
        self._threads = 0

    def add(self, channel: Channel) -> None:
        with self._lock:
            self._spare -= 1
            start = self._spare < 0 and self._threads < self._limit
            self._count(int(start))
        self._queue.put(channel)
        if start:
            try:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            except RuntimeError:
                log.exception("no thread can be started; the request waits for another")
                with self._lock:
                    self._count(-1)

    def _count(self, threads: int) -> None:
        self._threads += threads
        self._spare += threads

    def _work(self) -> None:
        while True:
            channel = self._queue.get()
            try:
                channel.service()
            except Exception:
                log.exception("a request could not be served")
                channel.will_close = True
            with self._lock:
                self._spare += 1
