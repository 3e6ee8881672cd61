"""The rules of users, and their statements.

Every statement is composed once, from the model, and PostgreSQL makes the JSON: what comes back is
what is sent, whichever the number of rows.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from peewee import EXCLUDED, SQL, Case, Query, Select, fn

from models import User, database
from postgres.statements import Lost, Statement, unknown
from problems import (
    DatabaseUnavailable,
    EmailTaken,
    InvalidUser,
    NoSuchUser,
    PreconditionFailed,
)
from wire.fields import ANY

CANONICAL_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)

MAX_EMAIL = 254
# What nearly every address looks like. The library accepts all of these, as a test holds, but
# takes a third of what a create costs to do so. No part of one so short can be too long.
PLAIN_EMAIL = re.compile(
    r"[A-Za-z0-9]+(?:[._+-][A-Za-z0-9]+)*@(?:[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*\.)+[A-Za-z]{2,}"
)
MAX_PLAIN = 64
MAX_NAME = 200
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # all of Unicode's category Cc
SURROGATE = re.compile(r"[\ud800-\udfff]")
DEFAULT_PAGE = 50
MAX_PAGE = 500


class Found(NamedTuple):
    """A user as JSON."""

    json: str
    created: bool = False

    @property
    def version(self) -> str:
        """The same until the user is changed: `updated_at`, the last member of its JSON."""
        return self.json.rpartition(': "')[2].removesuffix('"}')


@dataclass(frozen=True)
class Condition:
    """What a write asks of the user's present version: one of `match`, none of `none_match`.
    None asks for nothing; ANY is any version."""

    match: tuple[str, ...] | None = None
    none_match: tuple[str, ...] | None = None

    @property
    def asks(self) -> bool:
        return self.match is not None or self.none_match is not None


# What a statement may be given, and its SQL type.
TYPES = {
    "id": "uuid",
    "email": "text",
    "name": "text",
    "match": "text[]",
    "none_match": "text[]",
    "untouched": "double precision",
    "after": "uuid",
    "limit": "integer",
}


def given(name: str) -> SQL:
    return SQL(f"%({name})s")


def statement(query: Query) -> Statement:
    """A query whose only values are given by name, composed once."""
    sql, params = query.sql()
    assert not params, params
    return Statement(sql, {name: kind for name, kind in TYPES.items() if f"%({name})s" in sql})


def _time(field: Any) -> Any:
    """A time in RFC 3339, in UTC with microseconds."""
    utc = fn.timezone(SQL("'UTC'"), field)
    return fn.to_char(utc, SQL("""'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'"""))


_version = _time(User.updated_at)
# The members of a user in their order. It takes PostgreSQL a third less than json_build_object,
# which looks up at every row how each value is written.
JSON = fn.CONCAT(  # in lower case it is a method of peewee's
    SQL("""'{"id": "'"""),
    User.id,
    SQL("""'", "email": '"""),
    fn.to_json(User.email),
    SQL("""', "name": '"""),
    fn.to_json(User.name),
    SQL("""', "created_at": "'"""),
    _time(User.created_at),
    SQL("""'", "updated_at": "'"""),
    _version,
    SQL("""'"}'"""),
)

THIS = User.id == given("id")
# Microseconds may repeat, and clocks go back: a change always makes a later time.
LATER = fn.greatest(fn.now(), User.updated_at + SQL("interval '1 microsecond'"))


def _changed(email: Any, name: Any) -> Any:
    differs = (User.email != email) | (User.name != name)
    return Case(None, [(differs, LATER)], User.updated_at)


def _allowed() -> Any:
    # A condition that is not asked for is null.
    match = SQL("(%(match)s IS NULL)") | (_version == SQL("ANY(%(match)s)"))
    none = SQL("(%(none_match)s IS NULL)") | ~(_version == SQL("ANY(%(none_match)s)"))
    # A run after one of which nobody knows whether it was carried out: see Database.write.
    since = fn.now() - SQL("make_interval(secs => %(untouched)s)")
    untouched = SQL("(%(untouched)s IS NULL)") | (User.updated_at < since)
    return match & none & untouched


_NEW_EMAIL = fn.coalesce(given("email"), User.email)
_NEW_NAME = fn.coalesce(given("name"), User.name)
_ROW = {User.id: given("id"), User.email: given("email"), User.name: given("name")}

GET = statement(User.select(JSON).where(THIS))
# The one conflict that is ignored is with another user's address: any other, with an index or an
# exclusion constraint of the operator's own, is the database's refusal.
_ADDRESS = next(index for index in User._meta.indexes if index._unique)._expressions
CREATE = statement(
    User.insert(_ROW).on_conflict(action="IGNORE", conflict_target=_ADDRESS).returning(JSON)
)
PUT = statement(
    User.insert(_ROW)
    .on_conflict(
        conflict_target=[User.id],
        update={
            User.email: EXCLUDED.email,
            User.name: EXCLUDED.name,
            User.updated_at: _changed(EXCLUDED.email, EXCLUDED.name),
        },
        where=_allowed(),
    )
    .returning(JSON, SQL("xmax = 0"))
)
UPDATE = statement(
    User.update(
        {
            User.email: _NEW_EMAIL,
            User.name: _NEW_NAME,
            User.updated_at: _changed(_NEW_EMAIL, _NEW_NAME),
        }
    )
    .where(THIS & _allowed())
    .returning(JSON)
)
DELETE = statement(User.delete().where(THIS & _allowed()).returning(User.id))


@functools.cache
def _page(after: bool, email: bool, default: bool) -> Statement:
    # The usual limit is part of the statement. For one that is only known when it is run,
    # PostgreSQL does well not to keep the plan, which depends on how many rows are wanted.
    limit = str(DEFAULT_PAGE + 1) if default else "%(limit)s"
    found = User.select(JSON.alias("line")).order_by(User.id).limit(SQL(limit))
    if after:
        found = found.where(User.id > given("after"))
    if email:
        found = found.where(fn.lower(User.email) == fn.lower(given("email")))
    # One row with a line for each user: as many rows cost both sides more.
    lines = fn.string_agg(SQL("line"), SQL(r"E'\n'"))
    return statement(Select([found.alias("found")], [lines]).bind(database))


def new_id() -> str:
    """A UUID version 7 (RFC 9562 section 5.7): milliseconds since 1970, then random bits."""
    milliseconds = f"{time.time_ns() // 1_000_000:012x}"
    random = os.urandom(10).hex()
    variant = "89ab"[int(random[18], 16) % 4]
    return (
        f"{milliseconds[:8]}-{milliseconds[8:]}-7{random[:3]}-{variant}{random[3:6]}-{random[6:18]}"
    )


def parse_id(value: str) -> str:
    """An id as it is stored. Raises ValueError unless it is a UUID in its usual form."""
    if not CANONICAL_ID.fullmatch(value):
        raise ValueError("must be a UUID")
    return value.lower()


def valid(
    members: Mapping[str, Any], *, required: Sequence[str] = ("email", "name")
) -> dict[str, str | None]:
    """The email and name in `members`, checked and made ready to store; None for one that is
    neither there nor required. Raises InvalidUser that names every problem."""
    user: dict[str, str | None] = {"email": None, "name": None}
    errors: list[tuple[str, str]] = []
    for member, value in members.items():
        if member not in CHECKS:
            errors.append((member, "is not a member of a user that can be set"))
            continue
        try:
            if not isinstance(value, str):
                raise ValueError("must be a string")
            user[member] = CHECKS[member](value)
        except ValueError as error:
            errors.append((member, str(error)))
    errors += [(member, "is required") for member in required if member not in members]
    if errors:
        raise InvalidUser(errors=errors)
    return user


def valid_email(value: str) -> str:
    """An email address as it was written. Raises ValueError that says what is wrong."""
    if len(value) > MAX_EMAIL:
        raise ValueError(f"must have at most {MAX_EMAIL} characters")
    if len(value) <= MAX_PLAIN and PLAIN_EMAIL.fullmatch(value):
        return value
    # Importing it takes an eighth of the time that the service needs to start.
    from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email

    # Internal domains such as .local and .test are as good as any; the library's own documentation
    # says to say so in this way.
    SPECIAL_USE_DOMAIN_NAMES.clear()
    try:
        validate_email(value, check_deliverability=False, strict=True)
    except EmailNotValidError as error:
        raise ValueError(f"must be an email address: {error}") from None
    except UnicodeError:
        raise ValueError("must be an email address") from None
    return value


def valid_name(value: str) -> str:
    """A name without the white space around it. Raises ValueError that says what is wrong."""
    name = value.strip()
    if not 1 <= len(name) <= MAX_NAME:
        raise ValueError(f"must have 1 to {MAX_NAME} characters besides surrounding white space")
    if CONTROL.search(name):
        raise ValueError("must not contain control characters")
    if SURROGATE.search(name):
        raise ValueError("must not contain lone surrogates")
    return name


CHECKS = {"email": valid_email, "name": valid_name}


def get(user_id: str) -> Found:
    """Raises NoSuchUser."""
    rows = database.read(GET, {"id": user_id})
    if not rows:
        raise NoSuchUser
    return Found(*rows[0])


def create(members: Mapping[str, Any]) -> tuple[str, Found]:
    """Create a user; returns its id and the user. Raises InvalidUser or EmailTaken."""
    user = valid(members) | {"id": new_id()}
    try:
        rows, again = database.write(CREATE, user)
    except Lost:
        return str(user["id"]), _done_before(user)
    if not rows and again:  # perhaps by the first run
        rows = _confirmed(SAME, user)
        if not rows and _confirmed(GET, user):  # which somebody has changed since
            raise unknown()
    if not rows:
        raise EmailTaken
    return str(user["id"]), Found(*rows[0])


def put(user_id: str, members: Mapping[str, Any], condition: Condition) -> Found:
    """Create the user with this id, or replace it.

    Raises InvalidUser, EmailTaken, or PreconditionFailed; a user that is not there matches nothing.
    """
    errors: list[tuple[str, str]] = []
    try:
        user_id = parse_id(user_id)
    except ValueError as error:
        errors.append(("id", str(error)))
    try:
        values: dict[str, Any] = valid(members) | {"id": user_id} | _asked(condition)
    except InvalidUser as problem:
        errors += problem.errors
    if errors:
        raise InvalidUser(errors=errors)
    statement = PUT if condition.match is None else UPDATE
    try:
        try:
            rows, again = database.write(statement, values)
        except EmailTaken:
            # Of several that create one id at once, one may meet the winner's row by its address
            # before it meets it by its id, and PostgreSQL then takes it for another user's: 3 in
            # 1,000 of twelve at once. By now the winner is there to be met by its id.
            rows, again = database.write(statement, values)
    except Lost:
        return _done_before(values)
    if again:
        return _done_before(values)
    if not rows:
        raise PreconditionFailed
    return Found(*rows[0])


def patch(user_id: str, members: Mapping[str, Any], condition: Condition) -> Found:
    """Change some of a user. Raises InvalidUser, EmailTaken, NoSuchUser or PreconditionFailed."""
    values = valid(members, required=()) | {"id": user_id} | _asked(condition)
    try:
        rows, again = database.write(UPDATE, values)
    except Lost:
        return _done_before(values)
    if not rows and again:
        return _done_before(values)
    if not rows:
        raise _missing(user_id, condition)
    return Found(*rows[0])


def delete(user_id: str, condition: Condition) -> None:
    """Raises NoSuchUser or PreconditionFailed."""
    try:
        rows, again = database.write(DELETE, {"id": user_id} | _asked(condition))
    except Lost:
        raise unknown() from None
    if not rows and again:
        raise unknown()  # gone, but whether by the first run or before it nobody can say
    if not rows:
        raise _missing(user_id, condition)


def page(limit: int, after: str | None, email: str | None) -> tuple[list[str], str | None]:
    """At most `limit` users as JSON, by id, after the id `after`, with the address `email`; and
    the id after which the next page starts, None where this is the last."""
    sql = _page(after is not None, email is not None, limit == DEFAULT_PAGE)
    values = {"limit": limit + 1, "after": after, "email": email}
    [(text,)] = database.read(sql, values)
    lines = text.split("\n") if text else []
    if len(lines) <= limit:
        return lines, None
    return lines[:limit], json.loads(lines[limit - 1])["id"]


def _asked(condition: Condition) -> dict[str, Any]:
    """A condition as parameters. Any version at all is what the statements ask for anyway, save
    that none at all may be asked for: the empty list of versions that would do."""
    match = None if condition.match in (None, ANY) else list(condition.match or ())
    none_match = None if condition.none_match is None else list(condition.none_match)
    if condition.none_match == ANY:
        match, none_match = [], None
    return {"match": match, "none_match": none_match}


def _missing(user_id: str, condition: Condition) -> Exception:
    if condition.asks and database.read(GET, {"id": user_id}):
        return PreconditionFailed()
    return NoSuchUser()


def _done_before(values: Mapping[str, Any]) -> Found:
    """The user, where it is what a run whose answer was lost would have made of it: that run, or
    one just like it, was carried out. Raises DatabaseUnavailable, outcome unknown, otherwise."""
    rows = _confirmed(SAME, values)
    if not rows:
        raise unknown()
    return Found(*rows[0])


def _confirmed(statement: Statement, values: Mapping[str, Any]) -> list[Any]:
    """What a statement finds after a write whose answer was lost. Raises DatabaseUnavailable,
    outcome unknown, where it cannot be asked."""
    try:
        return database.read(statement, values)
    except DatabaseUnavailable:
        raise unknown() from None


# The second: made by that run, not changed by it.
_NEW = SQL("created_at = updated_at AND created_at > now() - interval '1 minute'")
# A lock is a write: with a synchronous standby it is answered when that has all before it too,
# where a mere read may see what would be gone after a failover.
SAME = statement(
    User.select(JSON, _NEW)
    .where(THIS & (User.email == _NEW_EMAIL) & (User.name == _NEW_NAME))
    .for_update()
)
