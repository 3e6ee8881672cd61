"""Identifiers: of users and of requests."""

from __future__ import annotations

import os
import random
import re
import time

# Where RFC 9562 section 5.7 has the version and the variant, and what they are.
FIXED_BITS = 0xF << 76 | 0b11 << 62
VERSION_7 = 7 << 76 | 0b10 << 62
REQUEST_ID = re.compile(r"[A-Za-z0-9._~+/=:@-]{1,128}")


def new_id() -> str:
    """A UUID version 7 (RFC 9562 section 5.7): milliseconds since 1970, then random bits."""
    return _uuid7(int.from_bytes(os.urandom(10)))


def _uuid7(bits: int) -> str:
    """Of 80 random bits, six of which give way to the version and the variant."""
    number = time.time_ns() // 1_000_000 << 80 | bits & ~FIXED_BITS | VERSION_7
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def request_id(given: list[str] | None) -> str:
    """The id that a request came with, where that is one and fit to be logged; else a new one,
    which need not be hard to guess: the kernel's random bytes cost as much as parsing a head."""
    if given and len(given) == 1 and REQUEST_ID.fullmatch(given[0]):
        return given[0]
    return _uuid7(random.getrandbits(80))
