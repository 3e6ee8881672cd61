"""Media types: what a body is said to be, and which kind of answer a client prefers."""

from __future__ import annotations

import re
from functools import lru_cache

from wire.headers import SHORT_BYTES, remembering_short

UTF_8 = {"utf-8", "utf8"}
# It reads 65,000 semicolons in a millisecond; to split them took fifteen.
CHARSET = re.compile(r";[ \t]*+charset=([^;]*)")
QUALITY = re.compile(r"q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)")

# Ten times what browsers send. It is read before a token is asked for, while nobody else is served:
# 64 KB of commas took thirty milliseconds.
ACCEPT_READ = 2000


@remembering_short
def media_type(value: str) -> str:
    """The media type in a Content-Type, in lower case; empty if its charset is another than UTF-8.
    Other parameters, such as CSV's `header` (RFC 4180 section 3), do not matter here."""
    value = value.lower()
    if any(charset.strip(' \t"') not in UTF_8 for charset in CHARSET.findall(value)):
        return ""
    return value.partition(";")[0].strip(" \t")


def preferred(accept: str | None, *offers: str) -> str:
    """The media type among `offers` that an Accept header prefers (RFC 9110 section 12.5.1).
    If it prefers several, it is the first of them; if there is no such header, or it accepts none,
    it is the first of all. No more than ACCEPT_READ characters of it are looked at."""
    accept = (accept or "*/*")[:ACCEPT_READ]
    # It is asked for several times a request, and costs a tenth of a page of users to find out.
    return (_remembered if len(accept) <= SHORT_BYTES else _preferred)(accept, offers)


def _preferred(accept: str, offers: tuple[str, ...]) -> str:
    given: dict[str, float] = {}
    for item in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in item.split(";"))
        qualities = [match[1] for one in parameters if (match := QUALITY.fullmatch(one))]
        given[kind] = float(qualities[0]) if qualities else 1.0
    best, most = offers[0], 0.0
    for offer in offers:
        ranges = (offer, offer.partition("/")[0] + "/*", "*/*")
        quality = next((given[one] for one in ranges if one in given), 0.0)
        if quality > most:
            best, most = offer, quality
    return best


_remembered = lru_cache(256)(_preferred)
