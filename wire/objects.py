"""JSON objects, read strictly: no member may be there twice. A member that is an object keeps its
text."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from problems import InvalidUser, MalformedJson

SPACE = re.compile(r"[ \t\n\r]*")
# PostgreSQL's numeric keeps at most this many digits after the point.
MOST_DIGITS = 16383


class Object(dict[str, Any]):
    """A JSON object. Only one that is directly a member of a body, or a cell of a row, knows how it
    was written: the `text` of a deeper one is empty."""

    # Without this an empty one takes three times the memory, and 16 KB may have five thousand.
    __slots__ = ("text",)

    def __init__(self, members: Iterable[tuple[str, Any]] | Mapping[str, Any]) -> None:
        super().__init__(members)
        self.text = ""


class Number(float):
    """A number that has an exponent. `digits` is how many characters it takes without one, or a few
    less: 1e300 has 301."""

    __slots__ = ("digits",)
    digits: int


def parsed(body: bytes) -> dict[str, Any]:
    """The members of a JSON object. A member that is itself an object is an Object, which knows its
    text. Raises MalformedJson, or InvalidUser if it is JSON of another kind."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise MalformedJson(f"The body is not in UTF-8 (byte {error.start}).") from None
    if text.startswith("\ufeff"):
        raise MalformedJson("The body begins with a byte order mark; send it without.")
    if not text.strip(" \t\n\r"):
        raise MalformedJson("The body is empty; send a JSON object.")
    try:
        if not text.lstrip(" \t\n\r").startswith("{"):
            DECODER.decode(text)
            raise InvalidUser(errors=[("body", "must be a JSON object")])
        return _members(text)
    except RecursionError:
        raise MalformedJson("The JSON in the body is nested too deeply.") from None
    except json.JSONDecodeError as error:
        what = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
        raise MalformedJson(
            f"The body is not one JSON document: {what}, at line {error.lineno},"
            f" character {error.colno}."
        ) from None
    except ValueError as error:
        raise MalformedJson(f"{error}.") from None


def _members(text: str) -> dict[str, Any]:
    if text.count("{") == 1:  # There is no object within it, whose text would be needed.
        try:
            whole: dict[str, Any] = DECODER.decode(text)
            return whole
        except ValueError:
            pass  # What is wrong is said below.
    # json.JSONDecoder says where a value ends only if it is given one value at a time, and the text
    # of each is needed.
    members: dict[str, Any] = {}
    at = _after(text, SPACE.match(text).end(), "{")  # type: ignore[union-attr]
    if text.startswith("}", at):
        at = _after(text, at, "}")
    else:
        more = True
        while more:
            if not text.startswith('"', at):
                raise json.JSONDecodeError("a name in double quotes is missing", text, at)
            name, at = DECODER.raw_decode(text, at)
            start = _after(text, _after(text, at, ""), ":")
            value, end = DECODER.raw_decode(text, start)
            if name in members:
                raise _twice(name)
            members[name] = value
            if isinstance(value, Object):
                value.text = text[start:end]
            at = _after(text, end, "")
            more = text.startswith(",", at)
            at = _after(text, at, "," if more else "}")
    if at != len(text):
        raise json.JSONDecodeError("something follows its end", text, at)
    return members


def _after(text: str, at: int, mark: str) -> int:
    """The position in a text after a mark and the white space that follows it. Raises
    JSONDecodeError if the mark is missing."""
    if not text.startswith(mark, at):
        raise json.JSONDecodeError(f"a {mark} is missing", text, at)
    return SPACE.match(text, at + len(mark)).end()  # type: ignore[union-attr]


def _twice(name: str) -> ValueError:
    return ValueError(f"The member {json.dumps(name[:100])} is given twice; give it once")


def _unique(pairs: list[tuple[str, Any]]) -> Object:
    members = Object(pairs)
    if len(members) != len(pairs):
        raise _twice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return members


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _number(text: str) -> float:
    """A number as a float; infinite if it is too large, or too near to zero, for 64 bits, or has
    more digits than PostgreSQL keeps of one (0e-20000)."""
    mantissa, e, exponent = text.lower().partition("e")
    number = Number(text) if e else float(text)
    # Zero may have any exponent, and int() refuses thousands of digits.
    digits = len(mantissa) + int(exponent.lstrip("+-0")[:9] or 0)
    if isinstance(number, Number):
        number.digits = digits
    if digits > MOST_DIGITS or (not number and re.search("[1-9]", mantissa)):
        return math.inf
    return number


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_constant=_no_constant,
    # Numbers are only checked for their size; what is stored is the text that was sent.
    parse_int=_number,
    parse_float=_number,
)
