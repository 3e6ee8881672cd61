"""Bytes and what they mean, without sockets: run from source, and compiled."""

from __future__ import annotations

from typing import Any

from wire.headers import Line


def attributes(of: Any) -> dict[str, Any]:
    """What an object with slots knows. A compiled class names its slots in a way of mypyc's."""
    kind = type(of)
    names = getattr(kind, "__mypyc_attrs__", None) or kind.__slots__
    return {name: comparable(getattr(of, name)) for name in names}


def comparable(value: Any) -> Any:
    """The value, with what header lines know in their place: two of them are never the same."""
    if isinstance(value, list):
        return [comparable(one) for one in value]
    return attributes(value) if isinstance(value, Line) else value
