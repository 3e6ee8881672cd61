"""The query of GET /users, checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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


def checked(query: str, checks: Mapping[str, Callable[[str], object]]) -> dict[str, str]:
    """The parameters in the query of a call, as it came. `checks` has a function for each that the
    call knows, which raises ValueError for a wrong value. Raises InvalidQuery, which names every
    bad parameter, up to 20 of them."""
    given: dict[str, str] = {}
    errors: list[tuple[str, str]] = []
    # Octets that should have been percent-encoded are read as if they were.
    query = query.encode("latin-1").decode("utf-8", errors="replace")
    for name, value in parse_qsl(query, keep_blank_values=True, errors="replace"):
        check = checks.get(name)
        try:
            if name in given:
                raise ValueError("is given more than once")
            given[name] = value
            if check is None:
                raise ValueError("is not a parameter of this call")
            check(value)
        except ValueError as error:
            errors.append((name[:100], str(error)))
    if errors:
        raise InvalidQuery(errors=errors)
    return given


def read(query: str, *, export: bool) -> PageQuery:
    """Reads the query of GET /users; `export` says whether the answer is one. Raises
    InvalidQuery."""
    given = checked(query, OF_AN_EXPORT if export else OF_A_PAGE)
    after = given.pop("after", None)
    return PageQuery(
        limit=int(given.pop("limit", DEFAULT_PAGE)),
        after=after and valid_id(after),
        search=Search(given.get("email"), given.get("q")),
        total=given.get("count") == "true",
        given=given,
    )


def _limit(value: str) -> None:
    digits = len(str(MAX_PAGE))
    if not re.fullmatch(f"[0-9]{{1,{digits}}}", value) or not 1 <= int(value) <= MAX_PAGE:
        raise ValueError(f"must be a whole number from 1 to {MAX_PAGE}")


def _switch(value: str) -> None:
    if value not in ("true", "false"):
        raise ValueError("must be true or false")


# The parameters of GET /users, each with its check.
OF_AN_EXPORT: dict[str, Callable[[str], object]] = {"after": valid_id, "email": str, "q": str}
OF_A_PAGE = OF_AN_EXPORT | {"limit": _limit, "count": _switch}
