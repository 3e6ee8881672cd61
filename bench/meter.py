"""CPU time and memory of a process and all that it started."""

from __future__ import annotations

import contextlib

import psutil


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


def memory_bytes(pid: int) -> int:
    """Proportional set size of the tree: pages that processes share are counted once.

    Where the platform has no such thing, the resident size, which counts them for each process.
    """
    total = 0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            full = process.memory_full_info()
            total += getattr(full, "pss", full.rss)
    return total


def threads(pid: int) -> int:
    """How many threads the tree has."""
    return sum(process.num_threads() for process in tree(pid))
