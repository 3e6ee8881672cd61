"""Finding users: which of them a search is for, and page by page."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from peewee import SQL, NodeList, Select, Window, fn

from models import User, database, statements
from postgres.statements import Statement
from problems import DatabaseUnavailable
from services.fields import CONTROL, MAX_EMAIL, MAX_NAME, SURROGATE, valid_email
from services.users import AT_ADDRESS, TABLE

DEFAULT_PAGE = 50
MAX_PAGE = 500
# No statement reads more rows than this.
MOST_ROWS = 500
# A statement that may read more users than DEFAULT_PAGE stops once it has so many bytes of them.
# Thirty megabytes at once held the interpreter, and all forwarded requests, for seconds.
PART_BYTES = 1 << 20
# Whether a user of `until_full` is to be read: the first one always is.
WITHIN = f"coalesce(before, 0) < {PART_BYTES}"
# A searched text of at least this many characters is cut into pieces: see _pattern.
LONG = 9
PIECES = re.compile(r".{3}(?=.{3})|.+", re.DOTALL)
# No user has a longer text to be searched, even where a capital is three letters in lower case.
LONGEST: Final = 3 * (MAX_NAME + 1 + MAX_EMAIL)
# What has a meaning in a pattern of LIKE.
SPECIAL = re.compile(r"[\\%_]")
TOO_SLOW = (
    "The search took longer than DB_STATEMENT_TIMEOUT. If the database has the extension pg_trgm"
    " and the index users_search, a search for three letters or more is fast; a total is not."
)
# No name, address or searched text has a line feed: no match begins in one and ends in the other.
SEARCHED = fn.lower(User.name).concat(SQL("E'\\n'")).concat(fn.lower(User.email))


@dataclass(frozen=True)
class Search:
    """Which users are asked for: those with the address `email`, and whose address or name contains
    `text`. None is no condition."""

    email: str | None = None
    text: str | None = None

    def conditions(self, after: str | None) -> frozenset[str]:
        """The conditions that are given, by name; one more is that users come after an id."""
        given = {"email": self.email, "text": self.text, "after": after}
        return frozenset(name for name, value in given.items() if value is not None)

    def values(self) -> dict[str, str | None]:
        """As parameters of a statement."""
        email, text = self.email, self.text
        if email is not None:
            try:
                # A + in a query means a space, and no address has one.
                email = valid_email(email.replace(" ", "+"))
            except ValueError:
                email = _storable(email)
        text = None if text is None else _storable(text)
        return {"email": email, "text": text, "pattern": None if text is None else _pattern(text)}


def _pattern(text: str) -> str:
    """A pattern for LIKE that every text fits in which `text` is found, and few others.

    The index has a list of users for every three letters in a row (pg_trgm), and PostgreSQL reads
    that of each three in the pattern. A long text is therefore cut into threes that do not overlap:
    with 3 lists instead of 7 a search for nine letters took half as long among five million users.
    Shorter texts need all their lists to be rare, and outside ASCII `lower` may look at the letter
    after the cut.
    """
    pieces = PIECES.findall(text) if len(text) >= LONG and text.isascii() else [text]
    return "%" + "%".join(SPECIAL.sub(r"\\\g<0>", piece) for piece in pieces) + "%"


def _storable(text: str) -> str:
    """A text in which control characters and lone surrogates are replaced by one control character.
    No user has either, so that nothing is found, and PostgreSQL can take it. The same goes for a
    text that is longer than any: 64 KB of percent signs took a tenth of a second to search for."""
    if len(text) > LONGEST:
        return "\x1a"
    return SURROGATE.sub("\x1a", CONTROL.sub("\x1a", text))


def matching(query: Select, conditions: frozenset[str]) -> Select:
    """A query of users, limited to those that fit these conditions of a Search."""
    if "after" in conditions:
        query = query.where(User.id > TABLE.given("after"))
    if "email" in conditions:
        query = query.where(AT_ADDRESS)
    if "text" in conditions:
        # The first finds them by the index, and the second leaves out what fits the pattern alone.
        query = query.where(NodeList((SEARCHED, SQL("LIKE lower(%(pattern)s)"))))
        query = query.where(NodeList((fn.strpos(SEARCHED, SQL("lower(%(text)s)")), SQL("> 0"))))
    return query


def prepared(conditions: frozenset[str]) -> bool:
    """Whether PostgreSQL may keep the plan. The right one for a searched text depends on how many
    users have it."""
    return "text" not in conditions


@functools.cache
def _page(conditions: frozenset[str], count: bool, default: bool) -> Statement:
    # The usual limit is part of the statement, so that PostgreSQL can keep the plan. The right plan
    # depends on how many rows are wanted: with a limit that is a parameter it is made each time.
    limit = str(DEFAULT_PAGE + 1) if default else "%(limit)s"
    found = matching(User.select(User.id, TABLE.json.alias("line")), conditions)
    found = found.order_by(User.id).limit(SQL(limit))
    # One row with a line for each user: a row for each would cost both sides more.
    joined = fn.string_agg(SQL("line"), SQL(r"E'\n'"))
    if not default:
        found, joined = until_full(found, SQL("octet_length(line)")), joined.filter(SQL(WITHIN))
    columns: list[Any] = [joined, fn.count(SQL("*"))]
    if count:
        columns.append(matching(User.select(fn.count(SQL("*"))), conditions - {"after"}))
    read = Select([found.alias("found")], columns).bind(database)
    return TABLE.statement(read, prepared=prepared(conditions))


def until_full(found: Select, size: Any) -> Select:
    """Users that were found, by id, of which those that WITHIN is true of make PART_BYTES or one
    user more. `size` is SQL for the bytes of one."""
    before = fn.sum(size).over(
        order_by=[SQL("found.id")],
        start=Window.preceding(),
        end=Window.preceding(1),
        frame_type=Window.ROWS,
    )
    found = found.alias("found")
    return Select([found], [SQL("found.*"), before.alias("before")])


class Page(NamedTuple):
    """Users as JSON, each as bytes: a text with one emoji would take four for each character. In
    `last` is the id after which the next page starts, None on the last page; in `total` how many
    users match in all, None if that was not asked for."""

    users: list[bytes]
    last: str | None
    total: int | None


def page(limit: int, after: str | None, search: Search, *, count: bool = False) -> Page:
    """At most `limit` users, by id, after the id `after`. Raises DatabaseUnavailable."""
    read = list(parts(limit, after, search, count=count))
    return Page([user for part in read for user in part.users], read[-1].last, read[0].total)


def parts(most: int, after: str | None, search: Search, *, count: bool = False) -> Iterator[Page]:
    """The same part by part, each by a statement of its own. Only the first has a total."""
    rows = min(most, DEFAULT_PAGE)
    while True:
        part = _read(rows, after, search, count)
        yield part
        most -= len(part.users)
        if part.last is None or not most:
            return
        after, count = part.last, False
        rows = min(most, fitting(len(part.users), sum(map(len, part.users))))


def fitting(rows: int, size: int) -> int:
    """How many rows the next statement is to read, if the last `rows` had `size` bytes. What it
    reads beyond PART_BYTES is thrown away, so that this is only to save the database work."""
    return max(1, min(MOST_ROWS, rows * PART_BYTES // max(1, size)))


def _read(limit: int, after: str | None, search: Search, count: bool) -> Page:
    sql = _page(search.conditions(after), count, limit == DEFAULT_PAGE)
    values = {"limit": limit + 1, "after": after} | search.values()
    began = time.monotonic()
    try:
        [(joined, number, *total)] = statements.read(sql, values)
    except DatabaseUnavailable:
        too_slow = time.monotonic() - began > statements.statement_timeout
        if too_slow and (search.text is not None or count):
            raise DatabaseUnavailable(TOO_SLOW) from None
        raise
    lines = joined.split("\n") if joined else []
    found = [line.encode() for line in lines[:limit]]
    if number == len(found):
        return Page(found, None, *(total or [None]))
    # The id is cut out of the text, because no reader of JSON takes all that somebody may have put
    # into metadata.
    last = lines[len(found) - 1].removeprefix('{"id": "')[:36]
    return Page(found, last, *(total or [None]))
