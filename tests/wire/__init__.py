"""Bytes and what they mean, without sockets: run from source, and compiled."""

from __future__ import annotations

from typing import Any


def attributes(of: Any) -> dict[str, Any]:
    """What an object with slots knows. A compiled class names its slots in a way of mypyc's."""
    kind = type(of)
    names = getattr(kind, "__mypyc_attrs__", None) or kind.__slots__
    return {name: getattr(of, name) for name in names}
