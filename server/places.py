"""Places with the upstream: how many requests it has at once, and the answers that hold them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from metrics import IN_FLIGHT, Board
from problems import UpstreamBusy
from server.upstream import Answer


class Places:
    """How many requests may be with the upstream at once. One whose client does not read gives up
    its place while it waits, and gets one again when its client has caught up: there are as many
    more for those, as streams that never end may have taken all the others."""

    def __init__(self, limit: int, board: Board) -> None:
        self._limit = limit
        self._board = board
        self._lock = threading.Lock()
        self._taken = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def enter(self) -> None:
        """Take a place. Raises UpstreamBusy at once where there is none."""
        with self._lock:
            if self._taken >= self._limit:
                raise UpstreamBusy
            self._take(1)

    def leave(self) -> None:
        """Give the place back, or to one that waits for it."""
        with self._lock:
            if not self._waiting:
                self._take(-1)
                return
            ready = self._waiting.popleft()
        ready()

    def come_back(self, ready: Callable[[], None]) -> None:
        """Take a place, now or when one is free, and then call `ready`."""
        with self._lock:
            if self._taken >= 2 * self._limit:
                self._waiting.append(ready)
                return
            self._take(1)
        ready()

    def withdraw(self, ready: Callable[[], None]) -> bool:
        """Wait no longer; False where `ready` has been called, or is just about to be."""
        with self._lock:
            if ready not in self._waiting:
                return False
            self._waiting.remove(ready)
            return True

    def _take(self, number: int) -> None:
        self._taken += number
        self._board.set(IN_FLIGHT, self._taken)


class Body:
    """The body of an answer on its way to the client; holds a place until it has all arrived.
    The place is given back before the last piece is sent: who has that may ask again at once."""

    _ready: Callable[[], None]

    def __init__(self, answer: Answer, places: Places) -> None:
        self._answer = answer
        self._places = places
        self._placed = True

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._answer.pieces():
            if not self.more:
                self.pause()
            yield piece
        self.pause()

    @property
    def more(self) -> bool:
        """Whether more is to come from the upstream."""
        return self._answer.more

    def pause(self) -> None:
        """The client does not read, or all has arrived: give up the place."""
        if self._placed:
            self._placed = False
            self._places.leave()

    def resume(self, ready: Callable[[], None]) -> None:
        """The client has caught up: call `ready` as soon as there is a place again."""
        self._ready = ready
        self._places.come_back(self._resumed)

    def _resumed(self) -> None:
        self._placed = True
        self._ready()

    def withdraw(self) -> bool:
        """The client has gone: False where it is too late to take `resume` back."""
        return self._places.withdraw(self._resumed)

    def close(self) -> None:
        """Let go of the upstream's connection and of the place."""
        self._answer.close()
        self.pause()
