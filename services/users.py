"""What each call for one user does: get, create, put, patch and delete.

The statements are composed from services/fields.py and the model, by postgres/table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peewee import SQL

from models import MAILBOX, MAILBOXES, User, statements
from postgres.casing import lowered
from postgres.statements import Lost, unknown
from postgres.table import Found, Table
from problems import (
    EmailTaken,
    InvalidUser,
    NoSuchUser,
    PreconditionFailed,
    Problem,
    RefusedByDatabase,
)
from services.fields import FIELDS, NAMES, checked, or_default, raise_for, valid, valid_id
from wire.ids import new_id
from wire.tags import ANY

TOO_LARGE = "would have more than {} bytes, with what is there already"
# The parameters of searches, and their SQL types: see services/search.py.
SEARCHES = {"after": "uuid", "limit": "integer", "text": "text", "pattern": "text"}


@dataclass(frozen=True)
class Condition:
    """A condition on the user's present version: it must be one of `match` and none of
    `none_match`. None is no condition; ANY is any version."""

    match: tuple[str, ...] | None = None
    none_match: tuple[str, ...] | None = None

    def unmatched(self, version: str) -> bool:
        """Whether it has to be another version because of `match`."""
        return self.match not in (None, ANY) and version not in (self.match or ())

    def excluded(self, version: str) -> bool:
        """Whether it has to be another version because of `none_match`."""
        return self.none_match == ANY or version in (self.none_match or ())

    def why_not(self, absent: Problem | None) -> Callable[[list[Any]], Problem | None]:
        """A function that takes the rows of `TABLE.get`, and returns the Problem that is in the way
        of a write, or None; `absent` is what it returns if there is no such user."""

        def told(rows: list[Any]) -> Problem | None:
            if not rows:
                return absent
            version = rows[0][1]
            refused = self.unmatched(version) or self.excluded(version)
            return PreconditionFailed() if refused else None

        return told

    def values(self) -> dict[str, Any]:
        """As parameters of a statement, each a list of versions or NULL.

        `If-Match: *` needs no condition, because a statement changes only a user that exists.
        `If-None-Match: *` becomes an empty `match`: no version is in it, so that no user that
        exists is changed.
        """
        match = None if self.match in (None, ANY) else list(self.match or ())
        none_match = None if self.none_match is None else list(self.none_match)
        if self.none_match == ANY:
            match, none_match = [], None
        return {"match": match, "none_match": none_match}


TABLE = Table(User, FIELDS, MAILBOXES, SEARCHES)
# Finds out who has an address.
AT_ADDRESS = SQL(MAILBOX) == SQL(lowered("CAST(%(email)s AS text)"))
HOLDER = TABLE.statement(User.select(User.id).where(AT_ADDRESS))


def get(user_id: str) -> Found:
    """The user with this id. Raises NoSuchUser."""
    rows = statements.read(TABLE.get, {"id": user_id})
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
        rows, _ = TABLE.write(TABLE.create, user, HOLDER, _taken)
    except Lost:
        return TABLE.done_before(TABLE.same, user)
    if not rows:  # Perhaps the work of a first run is in the way.
        rows = created_before(user)
    if not rows:
        raise _taken(statements.read(HOLDER, user)) or RefusedByDatabase()
    return Found(*rows[0])


def created_before(user: Mapping[str, Any]) -> list[Any]:
    """The user, if a run whose answer was lost has created it; nobody else knows its id. Raises
    DatabaseUnavailable, outcome unknown, if somebody has changed it since."""
    rows = TABLE.confirmed(TABLE.same, user)
    if not rows and TABLE.confirmed(TABLE.get, user):
        raise unknown()
    return rows


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
    raise_for(errors)
    return replace(user_id, values, condition)


def replace(user_id: str, values: Mapping[str, Any], condition: Condition) -> Found:
    """Do as `put`, with the values that `valid` returned."""
    values = {**values, "id": user_id, **condition.values()}
    statement, absent = TABLE.put, None
    if condition.match is not None:
        statement, absent = TABLE.replace, PreconditionFailed()
    try:
        try:
            rows, again = TABLE.write(statement, values, TABLE.get, condition.why_not(absent))
        except EmailTaken:
            # Several requests may create one id at once. A loser may then find the winner's row by
            # its address before it finds it by its id, and PostgreSQL reports a taken address: 3 in
            # 1,000 of twelve at once. By now that row is there, and is found by its id.
            rows, again = TABLE.write(statement, values, TABLE.get, condition.why_not(absent))
    except Lost:
        return TABLE.done_before(TABLE.same, values)
    if again:
        return TABLE.done_before(TABLE.same, values)
    return Found(*rows[0])


def patch(user_id: str, members: Mapping[str, Any], condition: Condition) -> Found:
    """Change some fields. Raises InvalidUser, EmailTaken, NoSuchUser or PreconditionFailed."""
    changes, errors = checked(members, user_id)
    raise_for(errors)
    values = {name: or_default(NAMES[name], value) for name, value in changes.items()}
    values |= {"id": user_id, **condition.values()}
    merged = [one.name for one in FIELDS if one.merged and members.get(one.name) is not None]
    patching = TABLE.patch(frozenset(changes), frozenset(merged))

    def why_not(rows: list[Any]) -> Problem | None:
        too_large = dict(zip(merged, rows[0][2:], strict=True)) if rows else {}
        errors = [
            (name, TOO_LARGE.format(NAMES[name].merged))
            for name, is_so in too_large.items()
            if is_so
        ]
        return condition.why_not(NoSuchUser())(rows) or (
            InvalidUser(errors=errors) if errors else None
        )

    try:
        rows, _ = TABLE.write(patching.update, values, patching.look, why_not)
    except Lost:
        return TABLE.done_before(patching.same, values)
    return Found(*rows[0]) if rows else TABLE.done_before(patching.same, values)


def delete(user_id: str, condition: Condition) -> None:
    """Delete a user. Raises NoSuchUser or PreconditionFailed."""
    values = {"id": user_id, **condition.values()}
    try:
        rows, _ = TABLE.write(TABLE.delete, values, TABLE.get, condition.why_not(NoSuchUser()))
    except Lost:
        raise unknown() from None
    if not rows:
        # It is gone. Nobody can say whether the first run deleted it, or somebody else before.
        raise unknown()
