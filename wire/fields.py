"""Header fields, as both sides of the wire have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

# A header line of an answer that is made here: name and value, decoded as latin-1, byte for byte.
Field = tuple[str, str]

# So many header lines are remembered, none of which is longer than this, in bytes.
REMEMBERED, SHORT_BYTES = 1024, 256

# `*` where entity tags are listed (RFC 9110 section 13.1). It is none: no tag holds a quote.
ANY = ('"',)


class Line(NamedTuple):
    """A header line that has been read: its name in lower case, its value, decoded as latin-1, and
    all of it as it goes on, byte for byte but for the white space around the value."""

    key: str
    value: str
    text: bytes


def line(name: bytes, value: bytes) -> Line:
    """The header line of this name and value."""
    value = value.strip(b" \t")
    key = name.decode("ascii").lower()
    return Line(key, value.decode("latin-1"), b"%b: %b\r\n" % (name, value))


def remembering(read: Callable[[bytes], Line]) -> Callable[[Iterable[bytes]], list[Line]]:
    """Reads header lines by `read`, each without its end. Heads repeat nearly all of their lines,
    on the next request and on that of the next client: what has been made of a short one is
    remembered, and finding it costs a fifth of reading it again."""
    remembered = lru_cache(REMEMBERED)(read)

    def lines(raw: Iterable[bytes]) -> list[Line]:
        return [remembered(one) if len(one) <= SHORT_BYTES else read(one) for one in raw]

    return lines


def text_of(fields: Iterable[Field]) -> bytes:
    """Header lines as they are sent."""
    return "".join([f"{name}: {value}\r\n" for name, value in fields]).encode("latin-1")


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
