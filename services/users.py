"""The rules of users, and their statements.

FIELDS is the one table of what a user has. Every statement is composed once, from it and the model.
PostgreSQL makes the JSON of a user, which is passed on as it is: for one user and for a page alike.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from peewee import EXCLUDED, SQL, Case, NodeList, Query, Select, fn

from models import MAILBOX, User, database
from postgres.casing import lowered
from postgres.statements import Lost, Statement, unknown
from problems import (
    DatabaseUnavailable,
    EmailTaken,
    InvalidUser,
    NoSuchUser,
    PreconditionFailed,
    Problem,
    RefusedByDatabase,
)
from services.values import (
    CONTROL,
    SURROGATE,
    valid_email,
    valid_id,
    valid_metadata,
    valid_name,
)
from wire.fields import ANY
from wire.ids import new_id

DEFAULT_PAGE = 50
MAX_PAGE = 500
MAX_ERRORS = 20
# A searched text of at least so many characters is cut into pieces: see _pattern.
LONG = 9
PIECES = re.compile(r".{3}(?=.{3})|.+", re.DOTALL)
# What has a meaning in a pattern of LIKE.
SPECIAL = re.compile(r"[\\%_]")
TOO_SLOW = (
    "The search took longer than DB_STATEMENT_TIMEOUT. If the database has the extension pg_trgm"
    " and the index users_search, a search for three letters or more is fast; a total is not."
)


@dataclass(frozen=True)
class Field:
    """A member of a user, and the column of the same name.

    `check` takes the value that was sent and returns the one to store, or raises ValueError
    (services/values.py). A member that is not `required` may be absent or null, and is `default`
    then; a default of None is NULL in the table and null in JSON. `kind` is the SQL type. If it is
    `merged`, PATCH takes the value as a merge patch (RFC 7396), and not as the new value.
    """

    name: str
    check: Callable[[Any], Any]
    required: bool = False
    default: Any = None
    kind: str = "text"
    merged: bool = False


FIELDS = (
    Field("email", valid_email, required=True),
    Field("name", valid_name, required=True),
    Field("metadata", valid_metadata, default="{}", kind="jsonb", merged=True),
)
NAMES = {field.name: field for field in FIELDS}
UNKNOWN = f"is not a member of a user; you can set {', '.join(NAMES)}"
# Members that a GET also gives. A PUT or PATCH may therefore send them back, and they are ignored.
MADE_HERE = ("created_at", "updated_at")
# What a POST that sends one of these is told.
NOT_SENT = dict.fromkeys(MADE_HERE, "is set by Gatehouse; leave it out") | {
    "id": "is made by Gatehouse; leave it out, or choose one with PUT /users/{id}"
}


class Found(NamedTuple):
    """A user as JSON, and its version: the same until the user is changed."""

    json: str
    version: str
    created: bool = False


@dataclass(frozen=True)
class Condition:
    """A condition on the user's present version: it must be one of `match` and none of
    `none_match`. None is no condition; ANY is any version."""

    match: tuple[str, ...] | None = None
    none_match: tuple[str, ...] | None = None

    def why_not(self, absent: Problem | None) -> Callable[[list[Any]], Problem | None]:
        """A function that takes the rows of GET, and returns the Problem that is in the way of a
        write, or None. If there are no rows, that is `absent`."""

        def told(rows: list[Any]) -> Problem | None:
            if not rows:
                return absent
            _, version = rows[0]
            no_match = self.match not in (None, ANY) and version not in (self.match or ())
            refused = self.none_match == ANY or version in (self.none_match or ())
            return PreconditionFailed() if no_match or refused else None

        return told


@dataclass(frozen=True)
class Search:
    """Which users are asked for: those with the address `email`, and whose address or name contains
    `text`. None is no condition."""

    email: str | None = None
    text: str | None = None

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
    No user has either, so that nothing is found, and PostgreSQL can take it."""
    return SURROGATE.sub("\x1a", CONTROL.sub("\x1a", text))


# The parameters of statements, and their SQL types.
TYPES = {
    "id": "uuid",
    **{field.name: field.kind for field in FIELDS},
    "match": "text[]",
    "none_match": "text[]",
    "untouched": "double precision",
    "after": "uuid",
    "limit": "integer",
    "text": "text",
    "pattern": "text",
}


def given(name: str) -> SQL:
    return SQL(f"CAST(%({name})s AS {TYPES[name]})")


def statement(query: Query, *, prepared: bool = True) -> Statement:
    """Make a statement of a query. All its values are parameters by name: see TYPES."""
    sql, params = query.sql()
    assert not params, params
    types = {name: kind for name, kind in TYPES.items() if f"%({name})s" in sql}
    return Statement(sql, types, prepared=prepared)


def in_rfc_3339(column: Any) -> Any:
    """A time in RFC 3339, in UTC with microseconds."""
    utc = fn.timezone(SQL("'UTC'"), column)
    return fn.to_char(utc, SQL("""'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'"""))


def _column(field: Field) -> Any:
    return getattr(User, field.name)


def _json() -> Any:
    """A user as JSON. It takes PostgreSQL a third less than json_build_object, which looks up at
    every row how each value is written."""
    parts: list[Any] = [SQL("""'{"id": "'"""), User.id, SQL("""'"'""")]
    for field in FIELDS:
        # jsonb is JSON as it is, and asking for that costs as much as the column.
        value = _column(field) if field.kind == "jsonb" else fn.to_json(_column(field))
        if field.default is None and not field.required:  # CONCAT drops NULL.
            value = fn.coalesce(value, SQL("'null'"))
        parts += [SQL(f"""', "{field.name}": '"""), value]
    for name in MADE_HERE:
        parts += [SQL(f"""', "{name}": "'"""), in_rfc_3339(getattr(User, name)), SQL("""'"'""")]
    return fn.CONCAT(*parts, SQL("'}'"))  # In lower case it would be a method of peewee's.


JSON = _json()
_version = in_rfc_3339(User.updated_at)
THIS = User.id == given("id")
# Two changes may share a microsecond, and clocks may go back: this time is later all the same.
LATER = fn.greatest(fn.now(), User.updated_at + SQL("interval '1 microsecond'"))
# No name, address or searched text has a line feed: no match begins in one and ends in the other.
SEARCHED = fn.lower(User.name).concat(SQL("E'\\n'")).concat(fn.lower(User.email))


REPLACED = {field.name: given(field.name) for field in FIELDS}


def _differs(new: Mapping[str, Any]) -> Any:
    """SQL that says whether these values would change the user. NULL counts as a value."""
    row = fn.ROW(*(_column(field) for field in FIELDS))
    return NodeList((row, SQL("IS DISTINCT FROM"), fn.ROW(*(new[one.name] for one in FIELDS))))


def _changed(new: Mapping[str, Any]) -> dict[Any, Any]:
    columns = {_column(field): new[field.name] for field in FIELDS}
    return columns | {User.updated_at: Case(None, [(_differs(new), LATER)], User.updated_at)}


def _allowed() -> Any:
    # A condition that was not given is NULL.
    match = SQL("(%(match)s IS NULL)") | (_version == SQL("ANY(%(match)s)"))
    none = SQL("(%(none_match)s IS NULL)") | ~(_version == SQL("ANY(%(none_match)s)"))
    # A second run, if nobody knows whether the first was carried out: see Database.write.
    since = fn.now() - SQL("make_interval(secs => %(untouched)s)")
    untouched = SQL("(%(untouched)s IS NULL)") | (User.updated_at < since)
    return match & none & untouched


def _update(new: Mapping[str, Any]) -> Statement:
    query = User.update(_changed(new)).where(THIS & _allowed())
    return statement(query.returning(JSON, _version))


def _same(new: Mapping[str, Any]) -> Statement:
    """Finds the user if it looks as a write of these values would have left it. The third column
    says whether that write created it, and did not change one that was there."""
    created = SQL("created_at = updated_at AND created_at > now() - interval '1 minute'")
    unchanged = NodeList((SQL("NOT"), _differs(new)))
    # The row is locked because a lock is a write. With a synchronous standby it is answered only
    # when the standby has all writes before it. A mere read may see what a failover will undo.
    found = User.select(JSON, _version, created).where(THIS & unchanged)
    return statement(found.for_update())


_ROW = {User.id: given("id")} | {_column(field): REPLACED[field.name] for field in FIELDS}
_EXCLUDED = {field.name: getattr(EXCLUDED, field.name) for field in FIELDS}

GET = statement(User.select(JSON, _version).where(THIS))
AT_ADDRESS = SQL(MAILBOX) == SQL(lowered("CAST(%(email)s AS text)"))
HOLDER = statement(User.select(User.id).where(AT_ADDRESS))
# Only the conflict with another user's address is ignored. With any other, of an index or an
# exclusion constraint that the operator added, the database refuses the user.
_ADDRESS = next(index for index in User._meta.indexes if index._unique)._expressions
CREATE = statement(
    User.insert(_ROW)
    .on_conflict(action="IGNORE", conflict_target=_ADDRESS)
    .returning(JSON, _version)
)
PUT = statement(
    User.insert(_ROW)
    .on_conflict(conflict_target=[User.id], update=_changed(_EXCLUDED), where=_allowed())
    .returning(JSON, _version, SQL("xmax = 0"))
)
REPLACE, SAME = _update(REPLACED), _same(REPLACED)
DELETE = statement(User.delete().where(THIS & _allowed()).returning(User.id))


@functools.cache
def _patch(names: frozenset[str], merged: frozenset[str]) -> tuple[Statement, Statement]:
    """Two statements: one changes the fields `names` of a user, of which `merged` are merged into
    the values that are there; the other finds the user if it looks as the first would leave it."""
    new = {one.name: given(one.name) if one.name in names else _column(one) for one in FIELDS}
    new |= {name: fn.users_merged(_column(NAMES[name]), given(name)) for name in merged}
    return _update(new), _same(new)


def matching(query: Select, *, after: bool, email: bool, text: bool) -> Select:
    """A query of users, limited as asked to those after an id, with an address, with a text."""
    if after:
        query = query.where(User.id > given("after"))
    if email:
        query = query.where(AT_ADDRESS)
    if text:
        # The first finds them by the index, and the second leaves out what fits the pattern alone.
        query = query.where(NodeList((SEARCHED, SQL("LIKE lower(%(pattern)s)"))))
        query = query.where(NodeList((fn.strpos(SEARCHED, SQL("lower(%(text)s)")), SQL("> 0"))))
    return query


@functools.cache
def _page(after: bool, email: bool, text: bool, count: bool, default: bool) -> Statement:
    # The usual limit is part of the statement, so that PostgreSQL can keep the plan. The right plan
    # depends on how many rows are wanted: with a limit that is a parameter it is made each time.
    limit = str(DEFAULT_PAGE + 1) if default else "%(limit)s"
    found = matching(User.select(JSON.alias("line")), after=after, email=email, text=text)
    found = found.order_by(User.id).limit(SQL(limit))
    # One row with a line for each user: a row for each would cost both sides more.
    columns: list[Any] = [fn.string_agg(SQL("line"), SQL(r"E'\n'"))]
    if count:
        columns.append(
            matching(User.select(fn.count(SQL("*"))), after=False, email=email, text=text)
        )
    # Not prepared if there is a text: the right plan depends on how many users have it.
    return statement(Select([found.alias("found")], columns).bind(database), prepared=not text)


class Page(NamedTuple):
    """Users as JSON; in `last` the id after which the next page starts, None on the last page; in
    `total` how many users match in all, None if that was not asked for."""

    users: list[str]
    last: str | None
    total: int | None


def page(limit: int, after: str | None, search: Search, *, count: bool = False) -> Page:
    """At most `limit` users, by id, after the id `after`. Raises DatabaseUnavailable."""
    email, text = search.email is not None, search.text is not None
    sql = _page(after is not None, email, text, count, limit == DEFAULT_PAGE)
    values = {"limit": limit + 1, "after": after} | search.values()
    began = time.monotonic()
    try:
        [(joined, *total)] = database.read(sql, values)
    except DatabaseUnavailable:
        if (text or count) and time.monotonic() - began > database.statement_timeout:
            raise DatabaseUnavailable(TOO_SLOW) from None
        raise
    lines = joined.split("\n") if joined else []
    if len(lines) <= limit:
        return Page(lines, None, *(total or [None]))
    last = json.loads(lines[limit - 1])["id"]
    return Page(lines[:limit], last, *(total or [None]))


def valid(members: Mapping[str, Any], *, user_id: str | None = None) -> dict[str, Any]:
    """All fields of a user, checked and ready to store. A field that is absent has its default.

    With `user_id` the members may be those that a GET of that user gave. Raises InvalidUser, which
    names every error, up to MAX_ERRORS.
    """
    values, errors = checked(members, user_id)
    missing = [field.name for field in FIELDS if field.required and field.name not in members]
    errors += [(name, "is required") for name in missing]
    _raise(errors)
    return {one.name: _or_default(one, values.get(one.name)) for one in FIELDS}


def _or_default(field: Field, value: Any) -> Any:
    return field.default if value is None else value


def _raise(errors: list[tuple[str, str]]) -> None:
    if errors:
        # Missing and wrong members come before unknown ones, of which there may be thousands.
        errors.sort(key=lambda error: error[1] == UNKNOWN)
        raise InvalidUser(errors=errors[:MAX_ERRORS])


def checked(
    members: Mapping[str, Any], user_id: str | None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The fields among `members`, ready to store, and what is wrong with any of the members."""
    values: dict[str, Any] = {}
    errors: list[tuple[str, str]] = []
    for name, value in members.items():
        field = NAMES.get(name)
        try:
            if field is not None:
                nothing = value is None and not field.required
                values[name] = None if nothing else field.check(value)
            elif name == "id" and user_id is not None:
                if valid_id(value) != user_id.lower():
                    raise ValueError("must be the id in the path, or be left out")
            elif name not in MADE_HERE or user_id is None:
                raise ValueError(NOT_SENT.get(name, UNKNOWN))
        except ValueError as error:
            errors.append((name, str(error)))
    return values, errors


def get(user_id: str) -> Found:
    """The user with this id. Raises NoSuchUser."""
    rows = database.read(GET, {"id": user_id})
    if not rows:
        raise NoSuchUser
    return Found(*rows[0])


def create(members: Mapping[str, Any]) -> tuple[str, Found]:
    """Create a user; returns its id and the user. Raises InvalidUser or EmailTaken."""
    user_id = new_id()
    return user_id, insert(user_id, valid(members))


def insert(user_id: str, values: Mapping[str, Any]) -> Found:
    """Create a user from the values that `valid` returned, with a new id, which nobody else knows.
    Raises EmailTaken."""
    user = {**values, "id": user_id}
    try:
        rows, _ = _written(CREATE, user, HOLDER, _taken)
    except Lost:
        return _done_before(SAME, user)
    if not rows:  # Perhaps the work of a first run is in the way.
        rows = _confirmed(SAME, user)
        if not rows and _confirmed(GET, user):  # Somebody has changed it since.
            raise unknown()
    if not rows:
        raise _taken(database.read(HOLDER, user)) or RefusedByDatabase()
    return Found(*rows[0])


def _taken(holders: list[Any]) -> Problem | None:
    return EmailTaken() if holders else None


def put(user_id: str, members: Mapping[str, Any], condition: Condition) -> Found:
    """Create the user with this id, or replace it.

    Raises InvalidUser, EmailTaken, or PreconditionFailed. A user that does not exist has no
    version: it fulfils no `match`, not even ANY.
    """
    errors: list[tuple[str, str]] = []
    try:
        user_id = valid_id(user_id)
    except ValueError as error:
        errors.append(("id", str(error)))
    try:
        values = valid(members, user_id=user_id)
    except InvalidUser as problem:
        errors += [error for error in problem.errors if error[0] != "id" or not errors]
    _raise(errors)
    return replace(user_id, values, condition)


def replace(user_id: str, values: Mapping[str, Any], condition: Condition) -> Found:
    """Do as `put`, with the values that `valid` returned."""
    values = {**values, "id": user_id, **_asked(condition)}
    statement, absent = (PUT, None) if condition.match is None else (REPLACE, PreconditionFailed())
    try:
        try:
            rows, again = _written(statement, values, GET, condition.why_not(absent))
        except EmailTaken:
            # Several requests may create one id at once. A loser may then find the winner's row by
            # its address before it finds it by its id, and PostgreSQL reports a taken address: 3 in
            # 1,000 of twelve at once. By now that row is there, and is found by its id.
            rows, again = _written(statement, values, GET, condition.why_not(absent))
    except Lost:
        return _done_before(SAME, values)
    if again:
        return _done_before(SAME, values)
    return Found(*rows[0])


def patch(user_id: str, members: Mapping[str, Any], condition: Condition) -> Found:
    """Change some fields. Raises InvalidUser, EmailTaken, NoSuchUser or PreconditionFailed."""
    changes, errors = checked(members, user_id)
    _raise(errors)
    values = {name: _or_default(NAMES[name], value) for name, value in changes.items()}
    values |= {"id": user_id, **_asked(condition)}
    merged = [name for name in changes if NAMES[name].merged and members[name] is not None]
    update, same = _patch(frozenset(changes), frozenset(merged))
    try:
        rows, _ = _written(update, values, GET, condition.why_not(NoSuchUser()))
    except Lost:
        return _done_before(same, values)
    return Found(*rows[0]) if rows else _done_before(same, values)


def delete(user_id: str, condition: Condition) -> None:
    """Delete a user. Raises NoSuchUser or PreconditionFailed."""
    values = {"id": user_id, **_asked(condition)}
    try:
        rows, _ = _written(DELETE, values, GET, condition.why_not(NoSuchUser()))
    except Lost:
        raise unknown() from None
    if not rows:
        # It is gone. Nobody can say whether the first run deleted it, or somebody else before.
        raise unknown()


def _asked(condition: Condition) -> dict[str, Any]:
    """A condition as parameters, each a list of versions or NULL.

    `If-Match: *` needs no condition, because a statement changes only a user that exists.
    `If-None-Match: *` becomes an empty `match`: no version is in it, so that no user that exists is
    changed.
    """
    match = None if condition.match in (None, ANY) else list(condition.match or ())
    none_match = None if condition.none_match is None else list(condition.none_match)
    if condition.none_match == ANY:
        match, none_match = [], None
    return {"match": match, "none_match": none_match}


def _written(
    statement: Statement,
    values: Mapping[str, Any],
    look: Statement,
    why_not: Callable[[list[Any]], Problem | None],
) -> tuple[list[Any], bool]:
    """Run a write, and return what `Database.write` returns: the rows, and whether it was run
    again. There are no rows only if it was.

    If the statement did nothing, `why_not` is given the rows that `look` finds, and the Problem
    that it returns is raised. If it returns none, there are two cases. Somebody was faster: the
    statement is run once more. Or the database itself leaves the row as it is, by a trigger that
    returns NULL or by a policy: RefusedByDatabase is raised. It is the second case if `look` finds
    the same before and after a run, because every change makes another version.
    """
    before = None
    while True:
        rows, again = database.write(statement, values)
        if rows or again:
            return rows, again
        found = database.read(look, values)
        if problem := why_not(found):
            raise problem
        if found == before:
            break
        before = found
    database.say("refused by the database: a trigger or a policy left the row as it was")
    raise RefusedByDatabase


def _done_before(same: Statement, values: Mapping[str, Any]) -> Found:
    """The user, if it looks as a run whose answer was lost would have left it: that run, or one
    just like it, was carried out. Otherwise raises DatabaseUnavailable, outcome unknown."""
    rows = _confirmed(same, values)
    if not rows:
        raise unknown()
    return Found(*rows[0])


def _confirmed(statement: Statement, values: Mapping[str, Any]) -> list[Any]:
    """What a statement finds after a write whose answer was lost. Raises DatabaseUnavailable,
    outcome unknown, if the database cannot be asked."""
    try:
        return database.read(statement, values)
    except DatabaseUnavailable:
        raise unknown() from None
