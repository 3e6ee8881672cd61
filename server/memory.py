"""Freed memory: when the C library gives it back to the system."""

from __future__ import annotations

import contextlib
import ctypes


def give_large_pieces_back() -> None:
    """Have glibc give each piece of memory of a megabyte or more back when it is freed. By itself
    it would keep pieces of up to 32 MB, once such a piece has been freed (M_MMAP_THRESHOLD of
    mallopt(3)): forty pages of the largest users left 250 MB behind."""
    with contextlib.suppress(OSError, AttributeError):  # Another C library has no such function.
        ctypes.CDLL(None).mallopt(-3, 1 << 20)


def give_memory_back() -> None:
    """Give freed memory back to the system. glibc keeps it for the next crowd of clients, which may
    never come."""
    with contextlib.suppress(OSError, AttributeError):  # Another C library has no such function.
        ctypes.CDLL(None).malloc_trim(0)
