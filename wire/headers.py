"""What the headers of a request for Gatehouse itself say: entity tags and media types."""

from __future__ import annotations

import re
from functools import lru_cache

from problems import BadRequest
from wire.fields import ANY, SHORT_BYTES, remembering_short

UTF_8 = {"utf-8", "utf8"}
# It reads 65,000 semicolons in a millisecond; to split them took fifteen.
CHARSET = re.compile(r";[ \t]*+charset=([^;]*)")
ENTITY_TAG = re.compile(r'(?:W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
QUALITY = re.compile(r"q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)")

# Ten times what browsers send. It is read before a token is asked for, while nobody else is served:
# 64 KB of commas took thirty milliseconds.
ACCEPT_READ = 2000


def tags(name: str, text: str | None) -> tuple[str, ...] | None:
    """The entity tags in the header `name` (RFC 9110 section 13.1), of which `text` is the value,
    None if it is absent. ANY is `*`.

    A weak tag counts as the strong one: all that Gatehouse makes are strong, and a proxy in front
    that compresses answers makes them weak (nginx does). Raises BadRequest.
    """
    if text is None:
        return None
    if text == "*":
        return ANY
    tags = []
    # Read it piece by piece: one expression for the whole list would look ahead from every comma.
    pieces = re.findall(r'"[^"]*"?|[^",]+|,', text)
    members = "".join("\n" if piece == "," else piece for piece in pieces).split("\n")
    for member in filter(None, (part.strip(" \t") for part in members)):
        match = ENTITY_TAG.fullmatch(member)
        if match is None:
            raise BadRequest(_no_tags(name))
        tags.append(match[1])
    if not tags:
        raise BadRequest(_no_tags(name))
    return tuple(tags)


def _no_tags(name: str) -> str:
    return f"{name} must be * or what an ETag header said, with its double quotes."


@remembering_short
def media_type(value: str) -> str:
    """The media type in a Content-Type, in lower case; empty if its charset is another than UTF-8.
    Other parameters, such as CSV's `header` (RFC 4180 section 3), do not matter here."""
    value = value.lower()
    if any(charset.strip(' \t"') not in UTF_8 for charset in CHARSET.findall(value)):
        return ""
    return value.partition(";")[0].strip()


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
