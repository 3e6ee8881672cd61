"""Entity tags, as If-Match and If-None-Match list them (RFC 9110 section 13.1)."""

from __future__ import annotations

import re

from problems import BadRequest

ENTITY_TAG = re.compile(r'(?:W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
# Stands for `*` in a list of entity tags. It cannot be a tag, because no tag has a quote in it.
ANY = ('"',)


def tags(name: str, text: str | None) -> tuple[str, ...] | None:
    """The entity tags in the header `name`, of which `text` is the value, None if it is absent. ANY
    is `*`.

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
