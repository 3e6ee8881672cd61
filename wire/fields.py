"""Header fields, as both sides of the wire have them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

# A header line: name and value, decoded as latin-1, byte for byte.
Field = tuple[str, str]

# `*` where entity tags are listed (RFC 9110 section 13.1). It is none: no tag holds a quote.
ANY = ('"',)


def field_values(fields: Iterable[Field], name: str) -> list[str]:
    """The values of the header lines of this lower-case name, in their order."""
    return [value for key, value in fields if key.lower() == name]


def listed(values: Iterable[str]) -> list[str]:
    """The members of a comma-separated header that may stand on several lines."""
    return [member.strip(" \t") for value in values for member in value.split(",")]


def authenticates_connection(values: Iterable[str]) -> bool:
    """Whether a challenge or credentials (RFC 9110 sections 11.3 and 11.4) are of a scheme by which
    not the request but the connection that it came on is somebody's: RFC 4559 section 6."""
    return any(
        member.partition(" ")[0].lower() in ("negotiate", "ntlm") for member in listed(values)
    )


@lru_cache(1024)
def lowered(name: str) -> str:
    """A header's name in lower case. Names repeat, and a look-up costs less than the work."""
    return name.lower()


def stripped(text: str, lines: list[Field]) -> list[Field]:
    """Header lines without the white space at their ends, where the `text` that they are from has
    any: nearly none has."""
    if " \r" in text or "\t\r" in text or " \n" in text or "\t\n" in text:
        return [(name, value.rstrip(" \t")) for name, value in lines]
    return lines
