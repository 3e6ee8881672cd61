"""A few numbers that the workers of one service share, so that /health is true of all of them, and
clients are shared out among them."""

from __future__ import annotations

import mmap
import time

UP, DOWN = 1, 2  # an outcome; 0 where nothing has been forwarded
IN_FLIGHT, IN_USE, IDLE, OUTCOME, OUTCOME_AT, CLIENTS, AWAKE, STREAMS, LIMIT = range(9)
CELLS = 16


class Board:
    """A row of integers for each worker, in memory that forked workers share. A worker writes its
    own row only, a cell at a time; anyone reads them all."""

    def __init__(self, workers: int) -> None:
        self._cells = memoryview(mmap.mmap(-1, workers * CELLS * 8)).cast("q")
        self._workers = workers
        self._row = 0

    def join(self, worker: int) -> None:
        """Become worker number `worker`; its row starts from nothing."""
        self._row = worker * CELLS
        for cell in range(CELLS):
            self._cells[self._row + cell] = 0

    def set(self, cell: int, value: int) -> None:
        """Write a number of this worker's."""
        self._cells[self._row + cell] = value

    def total(self, cell: int) -> int:
        """The sum of a number over all workers."""
        return sum(self._cells[cell::CELLS])

    def others(self, cell: int) -> tuple[int, ...]:
        """A number of each worker but this one."""
        mine = self._row // CELLS
        return tuple(n for worker, n in enumerate(self._cells[cell::CELLS]) if worker != mine)

    def forwarded(self, up: bool) -> None:
        """Note how a forwarded request went."""
        self._cells[self._row + OUTCOME] = UP if up else DOWN
        self._cells[self._row + OUTCOME_AT] = time.monotonic_ns()

    def upstream(self) -> str:
        """How the last forwarded request of any worker went: up, down or unknown."""
        rows = range(0, self._workers * CELLS, CELLS)
        latest = max(rows, key=lambda row: self._cells[row + OUTCOME_AT])
        return ("unknown", "up", "down")[self._cells[latest + OUTCOME]]
