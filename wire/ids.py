"""Identifiers: of users and of requests."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from functools import lru_cache
from typing import Final

# The two bits of the variant (RFC 9562 section 4.1) and two others, as a hexadecimal digit.
VARIANT: Final = "89ab"
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._~+/=:@-]{1,128}")

# In compiled code it costs as much to look it up as to call it.
getrandbits: Final = random.getrandbits

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
        clock, noise = _last, os.urandom(8)
    time_, rest = hex(clock)[2:].zfill(15), noise.hex()
    variant = VARIANT[noise[0] >> 6]
    return f"{time_[:8]}-{time_[8:12]}-7{time_[12:]}-{variant}{rest[1:4]}-{rest[4:]}"


def request_id(given: list[str] | None) -> str:
    """The id that a request came with, if it is a single one and fit for the log; otherwise a UUID
    version 7 with 72 random bits. That may be easy to guess: to ask the kernel for random bytes
    costs as much as to parse a head."""
    if given and len(given) == 1 and REQUEST_ID.fullmatch(given[0]):
        return given[0]
    noise = getrandbits(72).to_bytes(9, "big").hex()
    now = _milliseconds(time.time_ns() // 1_000_000)
    return f"{now}-7{noise[:3]}-{VARIANT[0]}{noise[3:6]}-{noise[6:]}"


@lru_cache(2)
def _milliseconds(now: int) -> str:
    """Milliseconds since 1970 as the first two parts of a UUID version 7."""
    text = hex(now)[2:].zfill(12)
    return f"{text[:8]}-{text[8:]}"
