"""Entity tags and JSON, out of a request: its WSGI environ (PEP 3333)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from problems import (
    BadRequest,
    BodyTooLarge,
    InvalidUser,
    MalformedJson,
    UnsupportedMediaType,
)
from wire.fields import ANY

ALLOWED_PARAMETERS = {"", "charset=utf-8", 'charset="utf-8"'}
ENTITY_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')


# The largest body of one user, in bytes.
MAX_BYTES = 65536


def tags(environ: Mapping[str, Any], name: str, *, weak: bool) -> tuple[str, ...] | None:
    """The entity tags in a header (RFC 9110 section 13.1), None where it is absent; weak ones are
    left out unless `weak`, for they match nothing in a strong comparison. ANY is `*`. Raises
    BadRequest."""
    text = environ.get(f"HTTP_{name.upper().replace('-', '_')}")
    if text is None:
        return None
    if text == "*":
        return ANY
    tags = []
    # Piece by piece: one expression for the whole list would look ahead from every comma.
    pieces = re.findall(r'"[^"]*"?|[^",]+|,', text)
    members = "".join("\n" if piece == "," else piece for piece in pieces).split("\n")
    for member in filter(None, (part.strip(" \t") for part in members)):
        match = ENTITY_TAG.fullmatch(member)
        if match is None:
            raise BadRequest(f"{name} must be * or entity tags in quotes.")
        if weak or not match[1]:
            tags.append(match[2])
    if not text.strip():
        raise BadRequest(f"{name} must be * or entity tags in quotes.")
    return tuple(tags)


def members(environ: Mapping[str, Any], *media_types: str) -> dict[str, Any]:
    """The members of the JSON object in the body. Raises UnsupportedMediaType, BodyTooLarge,
    MalformedJson, or InvalidUser where it is another kind of JSON."""
    media_type, *parameters = (environ.get("CONTENT_TYPE") or "").lower().split(";")
    others = {parameter.strip() for parameter in parameters} - ALLOWED_PARAMETERS
    if media_type.strip() not in media_types or others:
        raise UnsupportedMediaType(f"The body must be {' or '.join(media_types)}, in UTF-8.")
    try:
        body = DECODER.decode(_body(environ).decode("utf-8"))
    except (ValueError, RecursionError):
        raise MalformedJson from None
    if not isinstance(body, dict):
        raise InvalidUser(errors=[("body", "must be a JSON object")])
    return body


def _body(environ: Mapping[str, Any]) -> bytes:
    # Bottle's own `request.body` would take the chunks out of a body whose chunks the server has
    # taken out already (bottle.py:1346), and keeps what is large in a file.
    length = environ.get("CONTENT_LENGTH") or ""
    if not re.fullmatch(r"[0-9]{0,18}", length):
        raise BadRequest("Content-Length must be one number.")
    if not length and not environ.get("wsgi.input_terminated"):
        return b""  # there is no other end to read to
    body, left = b"", int(length or MAX_BYTES + 1)
    if length and left > MAX_BYTES:
        raise BodyTooLarge(f"The body is larger than {MAX_BYTES} bytes.")
    while piece := environ["wsgi.input"].read(left) if left else b"":
        body, left = body + piece, left - len(piece)
    if len(body) > MAX_BYTES:
        raise BodyTooLarge(f"The body is larger than {MAX_BYTES} bytes.")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member twice")
    return members


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_constant=_no_constant,
    parse_int=float,  # no number is ever right, so none needs to be exact
)
