"""Identifiers: of users and of requests."""

from __future__ import annotations

import os
import random
import re
import time

REQUEST_ID = re.compile(r"[A-Za-z0-9._~+/=:@-]{1,128}")


def new_id() -> str:
    """A UUID version 7 (RFC 9562 section 5.7): milliseconds since 1970, then random bits."""
    return _uuid7(os.urandom(10).hex())


def _uuid7(bits: str) -> str:
    ms = f"{time.time_ns() // 1_000_000:012x}"
    variant = "89ab"[int(bits[18], 16) % 4]
    return f"{ms[:8]}-{ms[8:]}-7{bits[:3]}-{variant}{bits[3:6]}-{bits[6:18]}"


def request_id(given: list[str] | None) -> str:
    """The id that a request came with, where that is one and fit to be logged; else a new one,
    which need not be hard to guess: the kernel's random bytes cost as much as parsing a head."""
    if given and len(given) == 1 and REQUEST_ID.fullmatch(given[0]):
        return given[0]
    return _uuid7(f"{random.getrandbits(80):020x}")
