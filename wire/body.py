"""The body of a request, as a WSGI server hands it over (PEP 3333)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from problems import BadRequest, BodyTooLarge, UnsupportedMediaType
from wire.media_types import media_type
from wire.objects import parsed

# The largest body that is one JSON object, in bytes.
MAX_BYTES = 65536
# No body needs more digits, and int() refuses thousands of them.
LENGTH = re.compile(r"[0-9]{0,18}")


def json_members(environ: Mapping[str, Any], *media_types: str) -> dict[str, Any]:
    """The members of the JSON object in the body, whose media type has to be one of these. Raises
    UnsupportedMediaType, BodyTooLarge, BadRequest, MalformedJson, or InvalidUser if it is JSON of
    another kind."""
    if media_type(environ.get("CONTENT_TYPE", "")) not in media_types:
        raise UnsupportedMediaType(
            f"Content-Type must be {' or '.join(media_types)}, and the body in UTF-8."
        )
    return parsed(_whole(environ))


def length_of(environ: Mapping[str, Any]) -> int | None:
    """How many bytes the body has, 0 if there is none; None if it ends where its stream ends.
    Raises BadRequest."""
    length = environ.get("CONTENT_LENGTH") or ""
    if not LENGTH.fullmatch(length):
        raise BadRequest("Content-Length must be one number.")
    if not length and environ.get("wsgi.input_terminated"):
        return None
    return int(length or 0)


def _whole(environ: Mapping[str, Any]) -> bytes:
    # Bottle's own `request.body` would decode chunks that the server has decoded already
    # (`BaseRequest._body`), and it keeps a large body in a file.
    length = length_of(environ)
    body, left = b"", MAX_BYTES + 1 if length is None else length
    if length is not None and length > MAX_BYTES:
        raise BodyTooLarge(MAX_BYTES)
    while piece := environ["wsgi.input"].read(left) if left else b"":
        body, left = body + piece, left - len(piece)
    if len(body) > MAX_BYTES:
        raise BodyTooLarge(MAX_BYTES)
    return body
