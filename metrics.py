"""Numbers that all workers of one service share, so that `/health` and `/health/metrics` are true
of all of them, and clients are shared out among them.

They are integers in a page of memory that forked workers share. A scrape adds up what is there: no
worker is asked, so none can be late, and a worker that has died has left its counts behind.
prometheus_client can serve several processes too, but keeps a file for each process that there ever
was (its issue 568), with the gauges of the dead ones. The text format itself is a few lines.
"""

from __future__ import annotations

import itertools
import mmap
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import problems

# An outcome; 0 where nothing has been forwarded.
UP: Final = 1
DOWN: Final = 2

# The cells of a worker's row. First its gauges: what is now, and nothing once it has died.
IN_FLIGHT, STREAMS, LIMIT, CLIENTS, IN_USE, IDLE, AWAKE, STOPPING = range(8)
HEARTBEAT, TURN_MINUTE, TURN_LONGEST, TURN_BEFORE, UNHEARD = range(8, 13)
GAUGES: Final = 13
# How the last forwarded request went, and when: that stays true when the worker has died.
OUTCOME: Final = GAUGES
OUTCOME_AT: Final = GAUGES + 1
# Then its counters, which only grow, through its death as well. Each takes the next cell; another
# one goes below the last of these.
_counters = itertools.count(OUTCOME_AT + 1)
LINES_DROPPED: Final = next(_counters)
REPLACED: Final = next(_counters)

# The first words of the paths that Gatehouse answers itself.
PATHS: Final = ("users", "health")
# Whose a request may be: one of these, or the upstream's.
OWNERS: Final = (*PATHS, "proxy")
# Those of RFC 9110 section 9 and RFC 5789. Any other method counts as `other`: callers could make
# labels without end.
METHOD_LABELS: Final = (
    "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "other",
)  # fmt: skip
CLASSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx")
# The upper bounds of the histogram's buckets, in seconds. The time-outs of the upstream's answers
# are among them.
BOUNDS: Final[Sequence[float]] = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300,
)  # fmt: skip
TYPES: Final = tuple(
    sorted(
        kind.name
        for kind in vars(problems).values()
        if isinstance(kind, type) and issubclass(kind, problems.Problem)
    )
)
# Behind the counters above, one counter for each type of problem, and then those of requests.
PROBLEMS: Final = next(_counters)
REQUESTS: Final = PROBLEMS + len(TYPES)
HEADS: Final = REQUESTS + len(OWNERS) * len(METHOD_LABELS) * len(CLASSES)
# Of each owner: its buckets, that beyond the last bound, and the sum in microseconds.
HEAD_CELLS: Final = len(BOUNDS) + 2
# Rows begin at a multiple of 64 bytes, so that two workers do not write to one line of a cache.
CELLS: Final = -(-(HEADS + len(OWNERS) * HEAD_CELLS) // 8) * 8

# Metrics that are one cell's total: name, cell, what it says.
TOTALS = (
    ("requests_in_flight", IN_FLIGHT, "Requests, streams and tunnels with the upstream."),
    ("requests_in_flight_limit", LIMIT, "How many of them there may be at once."),
    ("streams", STREAMS, "Event streams and tunnels among the requests in flight."),
    ("client_connections", CLIENTS, "Connections of clients."),
    ("database_pool_in_use", IN_USE, "Database connections in use."),
    ("database_pool_idle", IDLE, "Database connections that are open and idle."),
    ("log_lines_dropped_total", LINES_DROPPED, "Lines of the logs that nobody took."),
    ("workers_replaced_total", REPLACED, "Workers that died and were replaced."),
)

# What is told of one series: its labels, and a number. With `float` alone, mypyc would make a float
# of an int, and show it as 3.0.
Sample = tuple[str, int | float]

_owner: Final = {name: number for number, name in enumerate(OWNERS)}
_method: Final = {name: number for number, name in enumerate(METHOD_LABELS)}
_type: Final = {name: number for number, name in enumerate(TYPES)}


class Board:
    """A row of integers for each worker, in memory that forked workers share, and one for the
    supervisor. A process writes its own row only, a cell at a time, and the supervisor also that of
    a worker that has died. Anyone reads them all.

    Any thread of a worker may `add`: what one adds is not lost to another. `request` is for the
    loop's thread alone.
    """

    def __init__(self, workers: int) -> None:
        self._cells = memoryview(mmap.mmap(-1, (workers + 1) * CELLS * 8)).cast("q")
        self._workers = workers
        self._row = workers * CELLS
        self._lock = threading.Lock()
        self.started = time.time()  # seconds since 1970

    def join(self, worker: int) -> None:
        """Become worker number `worker`. Its counters go on where the one before it left them."""
        self._lock = threading.Lock()  # Another's, at the moment of the fork, would stay locked.
        self._row = worker * CELLS
        self.left(worker)

    def left(self, worker: int) -> None:
        """Worker number `worker` has died, and with it all that it had under way."""
        row = worker * CELLS
        for cell in range(GAUGES):
            self._cells[row + cell] = 0

    # Writing.

    def set(self, cell: int, value: int) -> None:
        """Write a number of this worker's."""
        self._cells[self._row + cell] = value

    def add(self, cell: int, number: int = 1) -> None:
        """Count `number` more."""
        with self._lock:
            self._cells[self._row + cell] += number

    def request(self, owner: str, method: str, status: int, seconds: float) -> None:
        """Count a request. This is done before a byte of its answer is sent, so that a client that
        has the answer finds it counted.

        `owner` is one of OWNERS, `seconds` how long it took from the end of the request's head to
        the head of its answer.
        """
        number = _owner[owner]
        kind = number * len(METHOD_LABELS) + _method.get(method, len(METHOD_LABELS) - 1)
        count = self._row + REQUESTS + kind * len(CLASSES) + min(max(status // 100, 1), 5) - 1
        heads = self._row + HEADS + number * HEAD_CELLS
        cells = self._cells
        cells[count] += 1
        cells[heads + bisect_left(BOUNDS, seconds)] += 1
        cells[heads + HEAD_CELLS - 1] += int(seconds * 1e6)

    def problem(self, name: str) -> None:
        """Count an answer that told of a problem of this type."""
        self.add(PROBLEMS + _type[name])

    def forwarded(self, up: bool) -> None:
        """Note how a forwarded request went."""
        self._cells[self._row + OUTCOME] = UP if up else DOWN
        self._cells[self._row + OUTCOME_AT] = time.monotonic_ns()

    def turned(self, longest: float) -> None:
        """Note that this worker's loop turns, and the longest turn in seconds since the last note.

        What is shown is the longest of this minute and the one before, so that the next scrape
        still finds it.
        """
        now = time.monotonic_ns()
        minute, microseconds = now // 60_000_000_000 + 1, round(longest * 1e6)
        row, cells = self._row, self._cells
        cells[row + HEARTBEAT] = now
        if cells[row + TURN_MINUTE] != minute:
            follows = cells[row + TURN_MINUTE] == minute - 1
            cells[row + TURN_BEFORE] = cells[row + TURN_LONGEST] if follows else 0
            cells[row + TURN_MINUTE], cells[row + TURN_LONGEST] = minute, 0
        cells[row + TURN_LONGEST] = max(cells[row + TURN_LONGEST], microseconds)

    # Reading.

    def total(self, cell: int) -> int:
        """The sum of a number over all workers."""
        return sum(self._cells[cell::CELLS])

    def each(self, cell: int) -> tuple[int, ...]:
        """A number of each worker."""
        return tuple(self._cells[cell : self._workers * CELLS : CELLS])

    def others(self, cell: int) -> tuple[int, ...]:
        """A number of each worker but this one."""
        mine = self._row // CELLS
        return tuple(n for worker, n in enumerate(self.each(cell)) if worker != mine)

    def upstream(self) -> str:
        """How the last forwarded request of any worker went: up, down or unknown."""
        outcomes = zip(self.each(OUTCOME_AT), self.each(OUTCOME), strict=True)
        return ("unknown", "up", "down")[max(outcomes)[1]]

    def exposition(self, *, version: str, database_up: bool, pool_size: int) -> str:
        """All of it in Prometheus's text format, version 0.0.4.

        `database_up` says whether the database has just answered; `pool_size` is how many
        connections all workers may have.
        """
        return "".join(self._families(version, database_up, pool_size))

    def _families(self, version: str, database_up: bool, pool_size: int) -> Iterator[str]:
        yield from _family(
            "gatehouse_requests_total",
            "counter",
            "Requests answered, by who owns the path, method and class of status.",
            self._requests(),
        )
        yield from _family(
            "gatehouse_answer_head_seconds",
            "histogram",
            "Time from the head of a request to the head of its answer, by who owns the path.",
            self._heads(),
        )
        yield from _family(
            "gatehouse_problems_total",
            "counter",
            "Answers of Gatehouse's own that told of a problem, by its type.",
            [(f'{{type="{name}"}}', self.total(PROBLEMS + n)) for name, n in _type.items()],
        )
        for name, cell, text in TOTALS:
            kind = "counter" if name.endswith("_total") else "gauge"
            yield from _family(f"gatehouse_{name}", kind, text, [("", self.total(cell))])
        longest = max(*self.each(TURN_LONGEST), *self.each(TURN_BEFORE)) / 1e6
        serving = sum(1 for beat in self.each(HEARTBEAT) if beat)
        gauges: list[tuple[str, int | float, str]] = [
            ("database_pool_size", pool_size, "Database connections that all workers may have."),
            (
                "database_up",
                int(database_up),
                "Whether the database answered during this scrape and the role may use users.",
            ),
            ("loop_longest_turn_seconds", longest, "The longest turn of a loop in two minutes."),
            ("workers", serving, "Workers that serve."),
            ("start_time_seconds", self.started, "When the service started, since 1970."),
        ]
        for name, number, text in gauges:
            yield from _family(f"gatehouse_{name}", "gauge", text, [("", number)])
        if (upstream := self.upstream()) != "unknown":
            text = "Whether the last forwarded request was answered."
            up = int(upstream == "up")
            yield from _family("gatehouse_upstream_up", "gauge", text, [("", up)])
        text = "The version that runs."
        labels = f'{{version="{version}"}}'
        yield from _family("gatehouse_build_info", "gauge", text, [(labels, 1)])

    def _requests(self) -> Iterator[Sample]:
        cell = REQUESTS
        for owner in OWNERS:
            for method in METHOD_LABELS:
                counts = [self.total(cell + number) for number in range(len(CLASSES))]
                cell += len(CLASSES)
                # Of a method that has been seen, show all classes. Its first 5xx is then a step
                # from 0 to 1. Prometheus's increase() does not see a series that begins at 1.
                if any(counts):
                    for status, count in zip(CLASSES, counts, strict=True):
                        labels = f'owner="{owner}",method="{method}",status="{status}"'
                        yield f"{{{labels}}}", count

    def _heads(self) -> Iterator[Sample]:
        for number, owner in enumerate(OWNERS):
            cell = HEADS + number * HEAD_CELLS
            count = 0
            for bound, place in zip(
                (*BOUNDS, "+Inf"), range(cell, cell + HEAD_CELLS), strict=False
            ):
                count += self.total(place)
                yield f'_bucket{{owner="{owner}",le="{bound}"}}', count
            yield f'_sum{{owner="{owner}"}}', self.total(cell + HEAD_CELLS - 1) / 1e6
            yield f'_count{{owner="{owner}"}}', count


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for suffix, value in samples:
        yield f"{name}{suffix} {value}\n"
