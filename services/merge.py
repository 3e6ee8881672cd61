"""A JSON merge patch (RFC 7396) as one SQL expression.

PATCH is one statement, so PostgreSQL has to merge, and it has no function for more than the first
level. The expression reads nothing but the row's own column: where another writer was faster,
PostgreSQL evaluates it again on the row as that has left it. A recursive query in its place was not
evaluated again, and of sixty members that twelve writers added to one user, some were lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from peewee import SQL, Expression, fn

NOTHING = SQL("CAST('{}' AS jsonb)")
# A function of PostgreSQL's takes 100 arguments.
MEMBERS_AT_ONCE = 50


class Merge:
    """What a patch makes of a column: `sql`, and the `values` and `types` of its parameters.

    `given` is the SQL of the patch, `patch` the same as Python has it: only its names are used, and
    where it has null or an object. All other values are taken from the former, as they were sent.
    """

    def __init__(self, column: Any, given: Any, patch: Mapping[str, Any], *, prefix: str) -> None:
        self._prefix = prefix
        self.values: dict[str, Any] = {}
        self.types: dict[str, str] = {}
        self._column = column
        self._given = given
        self.sql = self._merged(patch, "strict $")

    def _parameter(self, kind: str, value: Any) -> SQL:
        name = f"{self._prefix}_{len(self.values)}"
        self.values[name], self.types[name] = value, kind
        return SQL(f"CAST(%({name})s AS {kind})")

    def _merged(self, patch: Mapping[str, Any], path: str) -> Any:
        gone = [name for name, value in patch.items() if value is None]
        objects = {name: value for name, value in patch.items() if isinstance(value, dict)}
        # What is not there, or is no object, counts as an empty one. Without `strict` a path would
        # go into arrays, whose items have no names.
        where = self._parameter("jsonpath", f'{path} ? (@.type() == "object")')
        old, new = (
            fn.coalesce(fn.jsonb_path_query_first(of, where, NOTHING, SQL("true")), NOTHING)
            for of in (self._column, self._given)
        )
        merged = Expression(old, "-", self._parameter("text[]", gone))
        plain = Expression(new, "-", self._parameter("text[]", [*gone, *objects]))
        merged = Expression(merged, "||", plain)
        names = list(objects)
        for start in range(0, len(names), MEMBERS_AT_ONCE):
            pairs: list[Any] = []
            for name in names[start : start + MEMBERS_AT_ONCE]:
                pairs.append(self._parameter("text", name))
                pairs.append(self._merged(objects[name], f"{path}.{json.dumps(name)}"))
            merged = Expression(merged, "||", fn.jsonb_build_object(*pairs))
        return merged
