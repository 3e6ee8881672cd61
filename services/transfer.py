"""Many users at once: import and export, as CSV (RFC 4180) or as a line of JSON for each user.

Both work batch by batch, so that they need no more memory for more users. An import answers with a
line of JSON for each row, and a bad row stops no other.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from peewee import SQL, Cast, Select, fn

from models import User, database, statements
from postgres.casing import lowered
from postgres.statements import Lost, Statement, unknown
from postgres.table import TIMES, in_rfc_3339
from problems import DatabaseUnavailable, EmailTaken, InvalidUser, Problem
from services import users
from services.fields import FIELDS, NAMES, valid, valid_id
from services.search import (
    DEFAULT_PAGE,
    WITHIN,
    Search,
    fitting,
    matching,
    parts,
    prepared,
    until_full,
)
from services.users import TABLE
from wire.ids import new_id
from wire.rows import NDJSON, Columns, Lines, Row, rows_of

COLUMNS = Columns(
    names=("id", *NAMES, *TIMES),
    required=[one.name for one in FIELDS if one.required],
    objects=[one.name for one in FIELDS if one.kind == "jsonb"],
)
BATCH_ROWS = 500
BATCH_CHARACTERS = 1 << 20


# Export


@functools.cache
def _rows(conditions: frozenset[str]) -> Statement:
    columns: list[Any] = [User.id, *(Cast(getattr(User, name), "text") for name in NAMES)]
    columns += [in_rfc_3339(getattr(User, name)) for name in TIMES]
    columns = [column.alias(name) for column, name in zip(columns, COLUMNS.names, strict=True)]
    found = matching(User.select(*columns), conditions).order_by(User.id)
    found = found.limit(SQL("%(limit)s"))
    # CONCAT drops NULL; in lower case it would be a method of peewee's.
    size = fn.octet_length(fn.CONCAT(*(SQL(f'found."{name}"') for name in NAMES)))
    part = until_full(found, size).alias("part")
    read = Select([part], [SQL(f'part."{name}"') for name in COLUMNS.names]).where(SQL(WITHIN))
    read = read.order_by(SQL("part.id")).bind(database)
    return TABLE.statement(read, prepared=prepared(conditions))


def exported(kind: str, after: str | None, search: Search) -> Iterator[bytes]:
    """All users that match, by id, after the id `after`, in the media type `kind`.

    Each part is a statement of its own. A user that exists from the beginning to the end is
    exported once, whatever happens to others meanwhile. Raises DatabaseUnavailable; in the middle
    of an export this means that the answer ends too early.
    """
    if kind == NDJSON:
        for part in parts(sys.maxsize, after, search):
            if part.users:
                yield b"\n".join(part.users) + b"\n"
        return
    header: list[Any] = [COLUMNS.names]
    limit = DEFAULT_PAGE
    while True:
        sql = _rows(search.conditions(after))
        rows = statements.read(sql, {"limit": limit, "after": after} | search.values())
        if header or rows:
            buffer = io.StringIO(newline="")
            csv.writer(buffer).writerows([*header, *rows])
            piece = buffer.getvalue().encode()
            yield piece
        if not rows:
            return
        header, after = [], rows[-1][0]
        limit = fitting(len(rows), len(piece))


# Import


@dataclass
class Entry(Row):
    """A row of an import, and what becomes of it. `problem` says why it is refused."""

    id: str = ""
    has_id: bool = False  # whether the row named its id
    doubtful: bool = False  # whether a run whose answer was lost may have created the user
    values: dict[str, Any] = field(default_factory=dict)
    outcome: str = ""

    def check(self) -> None:
        """Make `values` of the members, or set `problem`. The members are not needed any more."""
        self.id, self.has_id = new_id(), "id" in self.members
        if self.has_id:
            with contextlib.suppress(ValueError):  # `valid` says what is wrong with it.
                self.id = valid_id(self.members["id"])
        try:
            self.values, self.members = valid(self.members, user_id=self.id), {}
        except InvalidUser as problem:
            self.refuse(problem)

    def told(self) -> str:
        """The line of the answer that says what became of the row."""
        if self.problem is None:
            status = 201 if self.outcome == "created" else 200
            return json.dumps({"line": self.line, "status": status, "id": self.id})
        described = self.problem.described()
        names = ("status", "type", "detail", "outcome", "errors")
        kept = {name: described[name] for name in names if name in described}
        return json.dumps({"line": self.line} | kept)


GIVEN = TABLE.rows_given()
# Finds out whether an address of a user that exists would change.
MOVES = Statement(
    f"SELECT FROM users JOIN {GIVEN} USING (id) WHERE users.email <> given.email LIMIT 1",
    TABLE.arrays,
    prepared=False,
)
# Finds the rows whose address another user has.
TAKEN = Statement(
    f"SELECT given.id::text FROM {GIVEN} JOIN users"
    f" ON {lowered('users.email')} = {lowered('given.email')} AND users.id <> given.id",
    TABLE.arrays,
    prepared=False,
)


def imported(kind: str, lines: Lines) -> Iterator[bytes]:
    """Create or replace the users in a file of the media type `kind`. Yields the lines of the
    answer, batch by batch. Raises BadRequest or InvalidUser, before anything is written, if the
    file has not the right columns."""
    counts = dict.fromkeys(("rows", "created", "replaced", "unchanged", "refused"), 0)
    batch: list[Entry] = []
    ids: set[str] = set()
    size = 0
    for read in rows_of(kind, lines, COLUMNS):
        row = Entry(read.line, read.members, read.problem)
        if row.problem is None:
            row.check()
        if row.has_id and row.id in ids:
            yield _done(batch, counts)  # Of two rows for one id the later one has the last word.
            batch, ids, size = [], set(), 0
        batch.append(row)
        if row.has_id:
            ids.add(row.id)
        size += sum(len(value) for value in row.values.values() if isinstance(value, str))
        if len(batch) >= BATCH_ROWS or size >= BATCH_CHARACTERS or lines.dry:
            yield _done(batch, counts)
            batch, ids, size = [], set(), 0
    yield _done(batch, counts) + json.dumps(counts).encode() + b"\n"


def _done(batch: list[Entry], counts: dict[str, int]) -> bytes:
    """Write a batch of rows; returns a line for each."""
    rows = [row for row in batch if row.problem is None]
    if rows:
        try:
            _write(rows)
        except (Problem, Lost) as error:
            problem = error if isinstance(error, Problem) else unknown()
            left = [row for row in rows if not row.outcome and row.problem is None]
            if problem.status == 409:
                # A unique index, or a constraint of the operator's own, refuses one of them. To
                # find out which one, write them one by one.
                _singly(left)
            else:
                for row in left:
                    row.refuse(unknown() if row.doubtful else problem)
    for row in batch:
        counts["rows"] += 1
        counts["refused" if row.problem else row.outcome] += 1
    return "".join(row.told() + "\n" for row in batch).encode()


def _write(rows: list[Entry]) -> None:
    if any(row.has_id for row in rows) and statements.read(MOVES, _arrays(rows)):
        # A row may take an address that another row gives up. So they are written one by one, in
        # order.
        _singly(rows)
        return
    _create(rows)
    left = [row for row in rows if not row.outcome]
    if left:
        _replace(left)
    left = [row for row in left if not row.outcome and row.problem is None]
    if left:
        taken = {user_id for (user_id,) in statements.read(TAKEN, _arrays(left))}
        for row in left:
            if row.id in taken:
                row.refuse(EmailTaken())
        _singly([row for row in left if row.problem is None])


def _singly(rows: list[Entry]) -> None:
    for row in rows:
        try:
            if row.doubtful and _created_before(row):
                row.outcome = "created"
            elif not row.has_id:
                users.insert(row.id, row.values)
                row.outcome = "created"
            else:
                before = statements.read(TABLE.get, {"id": row.id})
                found = users.replace(row.id, row.values, users.Condition())
                same = bool(before) and before[0][1] == found.version
                row.outcome = "created" if found.created else "unchanged" if same else "replaced"
        except DatabaseUnavailable as problem:
            row.refuse(unknown() if row.doubtful else problem)
        except Problem as problem:
            row.refuse(problem)


def _created_before(row: Entry) -> bool:
    """Whether a run whose answer was lost has created the user. Raises DatabaseUnavailable, outcome
    unknown, if that cannot be found out."""
    user = {**row.values, "id": row.id}
    if not row.has_id:
        return bool(users.created_before(user))
    return any(created for _, _, created in TABLE.confirmed(TABLE.same, user))


def _arrays(rows: Iterable[Entry]) -> dict[str, list[Any]]:
    columns = {name: [row.values[name] for row in rows] for name in NAMES}
    return {"id": [row.id for row in rows]} | columns


def _create(rows: list[Entry]) -> None:
    made, again = statements.write(TABLE.create_many, _arrays(rows))
    ids = {user_id for (user_id,) in made}
    for row in rows:
        if row.id in ids:
            row.outcome = "created"
        row.doubtful = again and not row.outcome


def _replace(rows: list[Entry]) -> None:
    found, again = statements.write(TABLE.replace_many, _arrays(rows))
    states = {user_id: state for user_id, *state in found}
    for row in rows:
        if row.id not in states:
            continue
        changed, same, created = states[row.id]
        if not changed and not same:
            if again:  # Somebody has changed it since the run that was lost.
                row.refuse(unknown())
            # Otherwise somebody was faster, or a trigger left it alone. It has no outcome yet, so
            # that it is written by itself next, which finds out.
        elif not row.has_id or (row.doubtful and created and same):
            # A run whose answer was lost has created it. Nobody else knows an id that was made
            # here.
            row.outcome = "created"
        else:
            row.outcome = "replaced" if changed else "unchanged"
