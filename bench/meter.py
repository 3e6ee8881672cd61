"""CPU time, memory and threads of a process and all that it started."""

from __future__ import annotations

import contextlib
import threading

import psutil

MIB = 1 << 20


def tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """User and system time spent so far, that of children already reaped included."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_mib(pid: int) -> float:
    """Proportional set size of the tree: pages that processes share are counted once.

    Where the platform has no such thing, the resident size, which counts them for each process.
    """
    total = 0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            full = process.memory_full_info()
            total += getattr(full, "pss", full.rss)
    return total / MIB


def threads(pid: int) -> int:
    """How many threads the tree has."""
    return sum(process.num_threads() for process in tree(pid))


class Peak:
    """How far the memory of a tree rises while something goes on: `risen_mib`."""

    EVERY = 0.2  # seconds

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.before = self.highest = memory_mib(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._ended.wait(self.EVERY):
            self.highest = max(self.highest, memory_mib(self.pid))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def risen_mib(self) -> float:
        return self.highest - self.before
