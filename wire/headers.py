"""Header lines, as both sides of the wire have them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

# A header line of an answer that is made here: name and value, decoded as latin-1, byte for byte.
Header = tuple[str, str]

# How many header lines, and how many other texts, a function remembers, and how long each may be.
REMEMBERED_LINES: Final = 1024
REMEMBERED: Final = 256
SHORT_BYTES: Final = 256

# A member of a list of challenges or credentials (RFC 9110 sections 11.3 and 11.4) whose scheme
# authenticates the connection instead of the request (RFC 4559 section 6).
OF_CONNECTIONS: Final = re.compile(
    r"(?:\A|,)[ \t]*+(?:negotiate|ntlm)(?:[ \t]|,|\Z)", re.IGNORECASE
)

# The same with what the server answers to the client's first credentials: a log-in that goes on.
GOING_ON: Final = re.compile(
    r"(?:\A|,)[ \t]*+(?:negotiate|ntlm)[ \t]++[A-Za-z0-9+/]", re.IGNORECASE
)

T = TypeVar("T", bytes, str)
R = TypeVar("R")


class Line:
    """A header line that has been read: its name in lower case; its value, decoded as latin-1; and
    the whole line to send on, byte for byte except for the white space around the value."""

    __slots__ = ("key", "text", "value")

    def __init__(self, key: str, value: str, text: bytes) -> None:
        self.key = key
        self.value = value
        self.text = text


def line(name: bytes, value: bytes) -> Line:
    """The header line of this name and value."""
    value = value.strip(b" \t")
    key = name.decode("ascii").lower()
    return Line(key, value.decode("latin-1"), b"%b: %b\r\n" % (name, value))


def remembering_short(read: Callable[[T], R], most: int = REMEMBERED) -> Callable[[T], R]:
    """A function of a text that remembers its results, but none for a long text: hundreds of hosts
    of 64 KB would stay for ever. When there are `most` of them it forgets them all, and soon has
    those again that are asked for often. functools.lru_cache drops the oldest instead, and takes
    four times as long to find one."""
    remembered: dict[T, R] = {}

    def recall(text: T) -> R:
        found = remembered.get(text)
        if found is None:
            found = read(text)
            if len(text) <= SHORT_BYTES:
                if len(remembered) >= most:
                    remembered.clear()
                remembered[text] = found
        return found

    return recall


def remembering(read: Callable[[bytes], Line]) -> Callable[[list[bytes]], list[Line]]:
    """A function that reads header lines, without their ends, each by `read`. The next request, and
    that of the next client, has nearly all of the same lines: so those are remembered."""
    recall = remembering_short(read, REMEMBERED_LINES)

    def lines(raw: list[bytes]) -> list[Line]:
        return [recall(one) for one in raw]

    return lines


def text_of(headers: Iterable[Header]) -> bytes:
    """Header lines as they are sent."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers]).encode("latin-1")


def listed(values: Iterable[str]) -> list[str]:
    """The members of a comma-separated header that may stand on several lines."""
    return [member.strip(" \t") for value in values for member in value.split(",")]


def authenticates_connection(values: Iterable[str]) -> bool:
    """Whether one of these headers, of challenges or of credentials, has such a scheme."""
    return any(OF_CONNECTIONS.search(value) for value in values)


def answers_credentials(challenges: Iterable[str]) -> bool:
    """Whether one of these challenges goes on with a log-in of such a scheme."""
    return any(GOING_ON.search(value) for value in challenges)


@remembering_short
def lowered(name: str) -> str:
    """A header's name in lower case. Names repeat, and to remember one costs less than to make
    it."""
    return name.lower()
