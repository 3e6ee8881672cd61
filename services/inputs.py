"""Entity tags and JSON, out of a request."""

from __future__ import annotations

import json
import re
from typing import Any

from problems import (
    BadRequest,
    InvalidUser,
    MalformedJson,
    UnsupportedMediaType,
)
from server.parser import RequestParser
from wire.fields import ANY

ALLOWED_PARAMETERS = {"", "charset=utf-8", 'charset="utf-8"'}
ENTITY_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')


def tags(request: RequestParser, name: str, *, weak: bool) -> tuple[str, ...] | None:
    """The entity tags in a header (RFC 9110 section 13.1), None where it is absent; weak ones are
    left out unless `weak`, for they match nothing in a strong comparison. ANY is `*`. Raises
    BadRequest."""
    values = request.values.get(name.lower())
    if not values:
        return None
    text = ", ".join(values)
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
    if not tags and not values[0].strip():
        raise BadRequest(f"{name} must be * or entity tags in quotes.")
    return tuple(tags)


def members(request: RequestParser, *media_types: str) -> dict[str, Any]:
    """The members of the JSON object in the body. Raises UnsupportedMediaType, MalformedJson, or
    InvalidUser where it is another kind of JSON."""
    values = request.values.get("content-type", [])
    media_type, *parameters = (values[0] if len(values) == 1 else "").lower().split(";")
    others = {parameter.strip() for parameter in parameters} - ALLOWED_PARAMETERS
    if media_type.strip() not in media_types or others:
        raise UnsupportedMediaType(f"The body must be {' or '.join(media_types)}, in UTF-8.")
    try:
        body = DECODER.decode(request.get_body_stream().read().decode("utf-8"))
    except (ValueError, RecursionError):
        raise MalformedJson from None
    if not isinstance(body, dict):
        raise InvalidUser(errors=[("body", "must be a JSON object")])
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
