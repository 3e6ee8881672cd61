"""Identifiers: of users and of requests."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from typing import Final

# The two bits of the variant (RFC 9562 section 4.1) and two random ones, as a hexadecimal digit.
VARIANT: Final = "89ab"
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
    with _lock:
        _last = max(_last + 1, ms << 12 | (ns << 12) // 1_000_000)
        return _uuid7(_last, os.urandom(8))


def _uuid7(clock: int, noise: bytes) -> str:
    """A UUID of the 60 bits of `clock`, of which 48 are milliseconds since 1970, and of 62 of the
    64 bits of `noise`."""
    # To shift and mask one number of 128 bits takes longer than to put these texts together.
    time_, rest = hex(clock)[2:].zfill(15), noise.hex()
    variant = VARIANT[noise[0] >> 6]
    return f"{time_[:8]}-{time_[8:12]}-7{time_[12:]}-{variant}{rest[1:4]}-{rest[4:]}"


def request_id(given: list[str] | None) -> str:
    """The id that a request came with, if it is a single one and fit for the log; otherwise a new
    one. That may be easy to guess: to ask the kernel for random bytes costs as much as to parse a
    head."""
    if given and len(given) == 1 and REQUEST_ID.fullmatch(given[0]):
        return given[0]
    noise = random.getrandbits(76)
    clock = time.time_ns() // 1_000_000 << 12 | noise & 0xFFF
    return _uuid7(clock, (noise >> 12).to_bytes(8, "big"))
