"""Many users at once: import and export, as CSV (RFC 4180) or as a line of JSON for each user.

Both work batch by batch, so that they need no more memory for more users. An import answers with a
line of JSON for each row, and a bad row stops no other.
"""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from peewee import SQL, Cast

from models import User, database
from postgres.casing import lowered
from postgres.statements import Lost, Statement, unknown
from problems import (
    BadRequest,
    EmailTaken,
    InvalidUser,
    MalformedJson,
    Problem,
)
from services import inputs, users
from services.users import FIELDS, MADE_HERE, NAMES, Search
from services.values import Object, valid_id
from wire.ids import new_id

CSV, NDJSON = "text/csv", "application/x-ndjson"
COLUMNS = ["id", *NAMES, *MADE_HERE]

BATCH_ROWS = 500
BATCH_BYTES = 1 << 20
READ_BYTES = 65536
# A file whose Content-Length is not more than this is read whole before anything is written.
WHOLE_BYTES = 1 << 20
MAX_LINE = 2 * inputs.MAX_BYTES


# Export


@functools.cache
def _rows(after: bool, email: bool, text: bool) -> Statement:
    columns = [Cast(getattr(User, name), "text") for name in ("id", *NAMES)]
    columns += [users.in_rfc_3339(getattr(User, name)) for name in MADE_HERE]
    found = users.matching(User.select(*columns), after=after, email=email, text=text)
    found = found.order_by(User.id).limit(SQL(str(BATCH_ROWS)))
    return users.statement(found, prepared=not text)


def exported(kind: str, after: str | None, search: Search) -> Iterator[bytes]:
    """All users that match, by id, after the id `after`, in the media type `kind`.

    Each batch is a statement of its own. A user that exists from the beginning to the end is
    exported once, whatever happens to others meanwhile. Raises DatabaseUnavailable; in the middle
    of an export this means that the answer ends too early.
    """
    if kind == NDJSON:
        more = True
        while more:
            page = users.page(users.MAX_PAGE, after, search)
            if page.users:
                yield ("\n".join(page.users) + "\n").encode()
            after, more = page.last, page.last is not None
        return
    header: list[Any] = [COLUMNS]
    while header or after is not None:
        sql = _rows(after is not None, search.email is not None, search.text is not None)
        rows = database.read(sql, {"after": after} | search.values())
        buffer = io.StringIO(newline="")
        csv.writer(buffer).writerows([*header, *rows])
        yield buffer.getvalue().encode()
        header, after = [], rows[-1][0] if len(rows) == BATCH_ROWS else None


# Import: reading


class Refused(Exception):
    """A row that cannot be read, and why."""


class Lines:
    """The lines of a body as they arrive, as text and with their ends. `number` is how many have
    been read; `dry` says that the next one has not arrived yet. A line that is too long, or not in
    UTF-8, raises Refused; after that the next one may be asked for."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        stream = environ["wsgi.input"]
        # `read1` gives what has arrived. Another server's stream may have only `read`, which waits
        # for a whole piece.
        self._read = getattr(stream, "read1", stream.read)
        self._left = inputs.body_length(environ)
        self._ended = self._left == 0
        self._buffer = bytearray()
        self.number = 0
        self.row = 0  # bytes of the present row so far
        short = self._left is not None and self._left <= WHOLE_BYTES
        self._fill()
        # The first three bytes may be a byte order mark, which may arrive in pieces.
        while not self._ended and (short or len(self._buffer) < 3):
            self._fill()
        if self._buffer.startswith(b"\xef\xbb\xbf"):
            del self._buffer[:3]
        try:
            self._buffer.decode()
        except UnicodeDecodeError as error:
            if self._ended or error.end < len(self._buffer):
                line = self._buffer.count(b"\n", 0, error.start) + 1
                raise BadRequest(
                    f"The file is not in UTF-8 (line {line}). Save it as UTF-8, and send it again."
                ) from None

    def _fill(self) -> None:
        wanted = READ_BYTES if self._left is None else min(READ_BYTES, self._left)
        piece = self._read(wanted) if wanted else b""
        self._buffer += piece
        if self._left is not None:
            self._left -= len(piece)
        self._ended = not piece or self._left == 0

    @property
    def dry(self) -> bool:
        return not self._ended and b"\n" not in self._buffer

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        too_long = False
        while self.dry:
            if len(self._buffer) > MAX_LINE:
                self._buffer.clear()
                too_long = True
            self._fill()
        # To take bytes off the front of a bytearray does not copy the rest. With such copies a
        # megabyte of empty lines took 15 seconds.
        line = self._buffer[: self._buffer.find(b"\n") + 1 or len(self._buffer)]
        del self._buffer[: len(line)]
        if not line and not too_long:
            raise StopIteration
        self.number += 1
        if too_long or len(line.removesuffix(b"\n")) > MAX_LINE:
            raise Refused(f"The line is longer than {MAX_LINE} bytes.")
        self.row += len(line)
        if self.row > 2 * MAX_LINE:
            # Each line may end a quoted cell and begin another, so that a row could go on for ever.
            raise Refused(f"The row is longer than {2 * MAX_LINE} bytes.")
        try:
            return line.decode()
        except UnicodeDecodeError:
            raise Refused("The line is not in UTF-8.") from None


@dataclass
class Row:
    """A row of an import, and what becomes of it. `number` is that of the line where the row
    begins; `members` are as in a request's body; `problem` says why the row is refused."""

    number: int
    members: dict[str, Any] = field(default_factory=dict)
    problem: Problem | None = None
    id: str = ""
    asked: bool = False  # whether the row named its id
    values: dict[str, Any] = field(default_factory=dict)
    outcome: str = ""

    def check(self) -> None:
        """Make `values` of the members, or set `problem`."""
        members = {key: value for key, value in self.members.items() if key not in MADE_HERE}
        errors: list[tuple[str, str]] = []
        self.id = new_id()
        try:
            if "id" in members:
                self.asked, self.id = True, valid_id(members.pop("id"))
        except ValueError as error:
            errors.append(("id", str(error)))
        try:
            self.values = users.valid(members)
        except InvalidUser as problem:
            errors += problem.errors
        if errors:
            self.problem = InvalidUser(errors=errors)

    def line(self) -> str:
        """The line of the answer that says what became of the row."""
        if self.problem is None:
            status = 201 if self.outcome == "created" else 200
            return json.dumps({"line": self.number, "status": status, "id": self.id})
        document = json.loads(self.problem.document(""))
        told = ("status", "type", "detail", "outcome", "errors")
        kept = {name: document[name] for name in told if name in document}
        return json.dumps({"line": self.number} | kept)


def _read_ndjson(lines: Lines) -> Iterator[Row]:
    while True:
        row = Row(lines.number + 1)
        lines.row = 0
        try:
            text = next(lines)
            if not text.strip():
                continue
            row.members = inputs.parsed(text.encode())
        except StopIteration:
            return
        except Refused as refused:
            row.problem = MalformedJson(str(refused))
        except Problem as problem:
            row.problem = problem
        yield row


def _read_csv(lines: Lines) -> Iterator[Row]:
    reader = csv.reader(lines, strict=True)
    header = _header(reader)
    while True:
        row = Row(lines.number + 1)
        lines.row = 0
        try:
            cells = next(reader)
            if not cells:
                continue
            if len(cells) != len(header):
                raise Refused(f"The row has {len(cells)} cells, and the header {len(header)}.")
            row.members, errors = _members(dict(zip(header, cells, strict=True)))
            if errors:
                row.problem = InvalidUser(errors=errors)
        except StopIteration:
            return
        except (Refused, csv.Error) as error:
            text = str(error)
            if not isinstance(error, Refused):
                text = f"The row is not CSV: {_csv_words(error)}."
            row.problem = BadRequest(text)
        yield row


def _csv_words(error: Exception) -> str:
    # Python's own message for this tells a programmer how to open a file.
    return "a line must end in LF or CRLF" if "new-line" in str(error) else str(error).rstrip(".")


def _header(reader: Iterator[list[str]]) -> list[str]:
    """The names of the columns. Raises BadRequest if the line is not CSV, or InvalidUser, which
    says what is wrong with the names."""
    try:
        names = [name.strip() for name in next(reader, [])]
    except (Refused, csv.Error) as error:
        raise BadRequest(f"The header line is not CSV: {_csv_words(error)}.") from None
    errors = [(one.name, "is a column that is missing") for one in FIELDS if one.required]
    errors = [error for error in errors if error[0] not in names]
    for name in dict.fromkeys(names):
        if name not in COLUMNS:
            errors.append((name, f"is no column of users; there are {', '.join(COLUMNS)}"))
        elif names.count(name) > 1:
            errors.append((name, "is a column twice"))
    if errors:
        raise InvalidUser(
            "The first line must name the columns; see errors. Nothing was written.",
            errors=errors[: users.MAX_ERRORS],
        )
    return names


def _members(cells: Mapping[str, str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A row's cells as members of a user, and what is wrong with them. An empty cell counts as not
    given, unless its column is required."""
    members: dict[str, Any] = {}
    errors: list[tuple[str, str]] = []
    for name, cell in cells.items():
        known = NAMES.get(name)
        if not cell and (known is None or not known.required):
            continue
        members[name] = cell
        if known is not None and known.kind == "jsonb":
            try:
                members[name] = Object(inputs.parsed(cell.encode(errors="replace")))
                members[name].text = cell
            except Problem as problem:
                text = "must be a JSON object" if problem.errors else problem.detail
                errors.append((name, text.replace("The body", "The cell")))
    return members, errors


# Import: writing

_GIVEN = ", ".join(f"CAST(%({name})s AS {users.TYPES[name]}[])" for name in ("id", *NAMES))
_NAMES = ", ".join(f'"{name}"' for name in ("id", *NAMES))
_OLD = ", ".join(f'users."{name}"' for name in NAMES)
_NEW = ", ".join(f'given."{name}"' for name in NAMES)
_SET = ", ".join(f'"{name}" = given."{name}"' for name in NAMES)
_TYPES = {name: f"{users.TYPES[name]}[]" for name in ("id", *NAMES)}

# Finds out whether an address of a user that exists would change.
MOVES = Statement(
    f"SELECT FROM users JOIN unnest({_GIVEN}) AS given({_NAMES}) USING (id)"
    " WHERE users.email <> given.email LIMIT 1",
    _TYPES,
    prepared=False,
)
# Finds the rows whose address another user has.
TAKEN = Statement(
    f"SELECT given.id::text FROM unnest({_GIVEN}) AS given({_NAMES}) JOIN users"
    f" ON {lowered('users.email')} = {lowered('given.email')} AND users.id <> given.id",
    _TYPES,
    prepared=False,
)
# Creates users. It leaves alone a user that exists already, by id or by address, and leaves out a
# second row for the same user.
CREATE_MANY = Statement(
    f"INSERT INTO users ({_NAMES}) SELECT {_NAMES} FROM unnest({_GIVEN}) WITH ORDINALITY"
    f" AS given({_NAMES}, number) ORDER BY number ON CONFLICT DO NOTHING RETURNING id::text",
    _TYPES,
    prepared=False,
)
# Replaces users that exist. For each of them it says whether this statement changed it, and whether
# it was already as the row has it.
REPLACE_MANY = Statement(
    f"WITH given AS (SELECT * FROM unnest({_GIVEN}) AS given({_NAMES})), changed AS ("
    f"UPDATE users SET {_SET},"
    " updated_at = greatest(now(), users.updated_at + interval '1 microsecond')"
    f" FROM given WHERE users.id = given.id AND ROW({_OLD}) IS DISTINCT FROM ROW({_NEW})"
    " AND (%(untouched)s IS NULL OR"
    " users.updated_at < now() - make_interval(secs => %(untouched)s)) RETURNING users.id)"
    " SELECT users.id::text, users.id IN (SELECT id FROM changed),"
    f" ROW({_OLD}) IS NOT DISTINCT FROM ROW({_NEW}) FROM users JOIN given USING (id)",
    _TYPES | {"untouched": "double precision"},
    prepared=False,
)


def imported(kind: str, environ: Mapping[str, Any]) -> Iterator[bytes]:
    """Create or replace the users in a body of the media type `kind`. Yields the lines of the
    answer, batch by batch. Raises BadRequest or InvalidUser, before anything is written, for a file
    that has not the right columns or is not in UTF-8, as far as it has arrived: a line later on
    that is not in UTF-8 is refused by itself."""
    lines = Lines(environ)
    counts = dict.fromkeys(("rows", "created", "replaced", "unchanged", "refused"), 0)
    batch: list[Row] = []
    asked: set[str] = set()
    size = 0
    for row in _read_csv(lines) if kind == CSV else _read_ndjson(lines):
        if row.problem is None:
            row.check()
        if row.asked and row.id in asked:
            yield _done(batch, counts)  # Of two rows for one id the later one has the last word.
            batch, asked, size = [], set(), 0
        batch.append(row)
        if row.asked:
            asked.add(row.id)
        size += sum(len(value) for value in row.values.values() if isinstance(value, str))
        if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES or lines.dry:
            yield _done(batch, counts)
            batch, asked, size = [], set(), 0
    yield _done(batch, counts) + json.dumps(counts).encode() + b"\n"


def _done(batch: list[Row], counts: dict[str, int]) -> bytes:
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
                    row.problem = problem
    for row in batch:
        counts["rows"] += 1
        counts["refused" if row.problem else row.outcome] += 1
    return "".join(row.line() + "\n" for row in batch).encode()


def _write(rows: list[Row]) -> None:
    if any(row.asked for row in rows) and database.read(MOVES, _arrays(rows)):
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
        taken = {user_id for (user_id,) in database.read(TAKEN, _arrays(left))}
        for row in left:
            row.problem = EmailTaken() if row.id in taken else None
        _singly([row for row in left if row.problem is None])


def _singly(rows: list[Row]) -> None:
    for row in rows:
        try:
            if not row.asked:
                users.insert(row.id, row.values)
                row.outcome = "created"
                continue
            before = database.read(users.GET, {"id": row.id})
            found = users.replace(row.id, row.values, users.Condition())
            same = bool(before) and before[0][1] == found.version
            row.outcome = "created" if found.created else "unchanged" if same else "replaced"
        except Problem as problem:
            row.problem = problem


def _arrays(rows: Iterable[Row]) -> dict[str, list[Any]]:
    columns = {name: [row.values[name] for row in rows] for name in NAMES}
    return {"id": [row.id for row in rows]} | columns


def _create(rows: list[Row]) -> None:
    made, _ = database.write(CREATE_MANY, _arrays(rows))
    ids = {user_id for (user_id,) in made}
    for row in rows:
        if row.id in ids:
            row.outcome = "created"


def _replace(rows: list[Row]) -> None:
    found, again = database.write(REPLACE_MANY, _arrays(rows))
    states = {user_id: (changed, same) for user_id, changed, same in found}
    for row in rows:
        if row.id not in states:
            continue
        changed, same = states[row.id]
        if not changed and not same:
            if again:  # Somebody has changed it since the run that was lost.
                row.problem = unknown()
            # Otherwise somebody was faster, or a trigger left it alone. It has no outcome yet, so
            # that it is written by itself next, which finds out.
        elif not row.asked:
            # A run whose answer was lost has created it: nobody else knows the id.
            row.outcome = "created"
        else:
            row.outcome = "replaced" if changed else "unchanged"
