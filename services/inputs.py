"""Reads entity tags, media types and JSON out of a request, from its WSGI environ (PEP 3333)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from problems import (
    BadRequest,
    BodyTooLarge,
    InvalidUser,
    MalformedJson,
    UnsupportedMediaType,
)
from services.values import Object
from wire.fields import ANY

UTF_8 = {"utf-8", "utf8"}
ENTITY_TAG = re.compile(r'(?:W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
SPACE = re.compile(r"[ \t\n\r]*")
QUALITY = re.compile(r"q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)")

# Ten times what browsers send. It is read before a token is asked for, while nobody else is served:
# 64 KB of commas took thirty milliseconds.
ACCEPT_READ = 2000

# The largest body of one user, in bytes.
MAX_BYTES = 65536


def tags(environ: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """The entity tags in a header (RFC 9110 section 13.1), None if it is absent. ANY is `*`.

    A weak tag counts as the strong one: all that Gatehouse makes are strong, and a proxy in front
    that compresses answers makes them weak (nginx does). Raises BadRequest.
    """
    text = environ.get(f"HTTP_{name.upper().replace('-', '_')}")
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


def media_type(value: str | None) -> str:
    """The media type in a Content-Type, in lower case; empty if its charset is another than UTF-8.
    Other parameters, such as CSV's `header` (RFC 4180 section 3), do not matter here."""
    kind, _, rest = (value or "").lower().partition(";")
    parameters = rest.split(";") if "charset" in rest else []
    for name, _, text in (parameter.strip().partition("=") for parameter in parameters):
        if name == "charset" and text.strip('"') not in UTF_8:
            return ""
    return kind.strip()


def preferred(accept: str | None, *offers: str) -> str:
    """The media type among `offers` that an Accept header prefers (RFC 9110 section 12.5.1).
    Among equals it is the first, and so it is if the header accepts none. No more than
    ACCEPT_READ characters of it are looked at."""
    given: dict[str, float] = {}
    for item in (accept or "*/*")[:ACCEPT_READ].lower().split(","):
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


def members(environ: Mapping[str, Any], *media_types: str) -> dict[str, Any]:
    """The members of the JSON object in the body, whose media type has to be one of these. Raises
    UnsupportedMediaType, BodyTooLarge, BadRequest, MalformedJson, or InvalidUser if it is JSON of
    another kind."""
    if media_type(environ.get("CONTENT_TYPE")) not in media_types:
        raise UnsupportedMediaType(
            f"Content-Type must be {' or '.join(media_types)}, and the body in UTF-8."
        )
    return parsed(_body(environ))


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
        what = error.msg[:1].lower() + error.msg[1:]
        raise MalformedJson(
            f"The body is not one JSON document: {what}, at line {error.lineno},"
            f" character {error.colno}."
        ) from None
    except ValueError as error:
        raise MalformedJson(f"{error}.") from None


def _members(text: str) -> dict[str, Any]:
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


def body_length(environ: Mapping[str, Any]) -> int | None:
    """How many bytes the body has; None if it ends where its stream ends. Without a length or such
    an end there is no body. Raises BadRequest."""
    length = environ.get("CONTENT_LENGTH") or ""
    # No body needs more digits, and int() refuses thousands of them.
    if not re.fullmatch(r"[0-9]{0,18}", length):
        raise BadRequest("Content-Length must be one number.")
    if not length and environ.get("wsgi.input_terminated"):
        return None
    return int(length or 0)


def _body(environ: Mapping[str, Any]) -> bytes:
    # Bottle's own `request.body` would decode chunks that the server has decoded already
    # (bottle.py:1346), and it keeps a large body in a file.
    length = body_length(environ)
    body, left = b"", MAX_BYTES + 1 if length is None else length
    if length is not None and length > MAX_BYTES:
        raise BodyTooLarge(f"The body is larger than {MAX_BYTES} bytes.")
    while piece := environ["wsgi.input"].read(left) if left else b"":
        body, left = body + piece, left - len(piece)
    if len(body) > MAX_BYTES:
        raise BodyTooLarge(f"The body is larger than {MAX_BYTES} bytes.")
    return body


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
    """A number as a float; infinite if it is too large, or too near to zero, for 64 bits."""
    number = float(text)
    return number if number or not re.search("[1-9]", text.lower().partition("e")[0]) else math.inf


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_constant=_no_constant,
    # Numbers are only checked for their size; what is stored is the text that was sent.
    parse_int=_number,
    parse_float=_number,
)
