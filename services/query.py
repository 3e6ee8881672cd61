"""The query of GET /users, checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import parse_qsl

from problems import InvalidQuery
from services.fields import valid_id
from services.search import DEFAULT_PAGE, MAX_PAGE, Search


class PageQuery(NamedTuple):
    """Which page of users is asked for. `given` are the parameters that the link to the next page
    repeats."""

    limit: int
    after: str | None
    search: Search
    total: bool
    given: dict[str, str]


def read(query: str, *, export: bool) -> PageQuery:
    """Reads the query of GET /users, as it came; `export` says whether the answer is one. Raises
    InvalidQuery, which names every bad parameter, up to 20 of them."""
    given: dict[str, str] = {}
    errors: list[tuple[str, str]] = []
    # Octets that should have been percent-encoded are read as if they were.
    query = query.encode("latin-1").decode("utf-8", errors="replace")
    for name, value in parse_qsl(query, keep_blank_values=True, errors="replace"):
        check = PARAMETERS.get(name)
        try:
            if name in given:
                raise ValueError("is given more than once")
            given[name] = value
            if check is None or (export and name in PAGE_PARAMETERS):
                raise ValueError("is not a parameter of this call")
            check(value)
        except ValueError as error:
            errors.append((name[:100], str(error)))
    if errors:
        raise InvalidQuery(errors=errors)
    after = given.pop("after", None)
    return PageQuery(
        limit=int(given.pop("limit", DEFAULT_PAGE)),
        after=after and valid_id(after),
        search=Search(given.get("email"), given.get("q")),
        total=given.get("count") == "true",
        given=given,
    )


def _limit(value: str) -> None:
    if not re.fullmatch(r"[0-9]{1,3}", value) or not 1 <= int(value) <= MAX_PAGE:
        raise ValueError(f"must be a whole number from 1 to {MAX_PAGE}")


def _switch(value: str) -> None:
    if value not in ("true", "false"):
        raise ValueError("must be true or false")


# Parameters of a page, which an export does not have.
PAGE_PARAMETERS = {"limit", "count"}
# The parameters of GET /users, each with its check, which raises ValueError for a wrong value.
PARAMETERS: dict[str, Callable[[str], object]] = {
    "limit": _limit,
    "after": valid_id,
    "email": str,
    "q": str,
    "count": _switch,
}
