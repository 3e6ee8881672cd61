"""Identifiers: of users and of requests."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from typing import Final

# Where RFC 9562 section 5.7 has the version and the variant, and what they are.
FIXED_BITS: Final = 0xF << 76 | 0b11 << 62
VERSION_7: Final = 7 << 76 | 0b10 << 62
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._~+/=:@-]{1,128}")

_lock = threading.Lock()
_last = 0


def new_id() -> str:
    """A UUID version 7 (RFC 9562 section 5.7): milliseconds since 1970, parts of a millisecond
    (section 6.2, method 3), then random bits. Each is greater than the one before it in this
    process, whatever the clock does. So users that are listed by id are in the order in which they
    were created: with only random bits after the milliseconds an imported file came back
    shuffled."""
    global _last
    ms, ns = divmod(time.time_ns(), 1_000_000)
    random_bits = int.from_bytes(os.urandom(8))
    with _lock:
        _last = max(_last + 1, ms << 12 | (ns << 12) // 1_000_000)
        return _uuid7(_last >> 12, (_last & 0xFFF) << 64 | random_bits)


def _uuid7(ms: int, bits: int) -> str:
    """A UUID of the milliseconds and 80 bits, six of which give way to the version and variant."""
    text = (ms << 80 | bits & ~FIXED_BITS | VERSION_7).to_bytes(16, "big").hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def request_id(given: list[str] | None) -> str:
    """The id that a request came with, if it is a single one and fit for the log; otherwise a new
    one. That may be easy to guess: to ask the kernel for random bytes costs as much as to parse a
    head."""
    if given and len(given) == 1 and REQUEST_ID.fullmatch(given[0]):
        return given[0]
    return _uuid7(time.time_ns() // 1_000_000, random.getrandbits(80))
