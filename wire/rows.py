"""Rows of a file that is being sent: CSV (RFC 4180), or a line of JSON for each row.

They are read as they arrive, so that a file of any length needs no more memory than a row.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from problems import BadRequest, InvalidUser, MalformedJson, Problem
from wire import body
from wire.objects import Object, parsed

CSV, NDJSON = "text/csv", "application/x-ndjson"

# As much as the server keeps of a body for its reader (INBOX_BYTES of server/inbox.py): then
# several hundred rows come at once, and are one statement.
READ_BYTES = 262144
# A file whose Content-Length is not more than this is read whole before its first row is given.
WHOLE_BYTES = 1 << 20
# From within a quoted cell to its end; two marks in a row stand for one.
CLOSING = re.compile(rb'[^"]*+(?:""[^"]*+)*+"')
MAX_LINE = 2 * body.MAX_BYTES


class Columns(NamedTuple):
    """The columns that a CSV file may have. A cell of `objects` is a JSON object."""

    names: Collection[str]
    required: Collection[str]
    objects: Collection[str]


@dataclass
class Row:
    """A row as it was read. `line` is the number of the line where it begins; `members` are as in
    the body of a request for one thing; `problem` says why the row cannot be read."""

    line: int
    members: dict[str, Any] = field(default_factory=dict)
    problem: Problem | None = None

    def refuse(self, problem: Problem) -> None:
        """Keep why it is refused, and nothing else of it. An exception that has been raised knows
        the functions that it passed through, and all that is in them: the row, too. So the two
        would keep each other until the garbage collector comes, and a megabyte of rows takes a
        hundred in objects."""
        problem.__traceback__ = problem.__context__ = problem.__cause__ = None
        self.problem, self.members = problem, {}


class Refused(Exception):
    """A line or a row that cannot be read, and why."""


class Lines:
    """The lines of a body as they arrive, as text and with their ends. `number` is how many have
    been read; `dry` says that the next one may have yet to arrive. A line that is too long, or not
    in UTF-8, and one that makes its row too long, raises Refused; after that the next one may be
    asked for. Before each row, `begin_row` is to be called.

    Making it raises BadRequest if the file is not in UTF-8, as far as it has arrived: a line later
    on that is not in UTF-8 is refused by itself.
    """

    def __init__(self, environ: Mapping[str, Any]) -> None:
        stream = environ["wsgi.input"]
        # `read1` gives what has arrived. Another server's stream may have only `read`, which waits
        # for a whole piece.
        self._read = getattr(stream, "read1", stream.read)
        self._left = body.length_of(environ)
        self._ended = self._left == 0
        self._buffer = bytearray()
        self.number = 0
        self._row_bytes = 0  # how long the present row is so far
        self._row = bytearray()  # what has come of it, and is not followed yet
        self._followed = 0  # how many of its bytes `_follow` was given; 0 if it has yet to begin
        self._first = 1  # the number of its first line
        self._inside = False  # whether a quoted cell was open at the end of what is followed
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

    def begin_row(self) -> int:
        """A row begins. Returns the number of its first line."""
        self._row_bytes = self._followed = 0
        self._inside = False
        self._row.clear()
        self._first = self.number + 1
        return self._first

    @property
    def extent(self) -> str:
        """Words that say how far the present row goes, if it goes on after its first line."""
        return f" The row goes on to line {self.number}." if self.number > self._first else ""

    def end_row(self) -> None:
        """The present row is refused: pass over the rest of it, in which a line may look like a
        row."""
        self._follow()
        with contextlib.suppress(StopIteration):
            while self._inside:
                with contextlib.suppress(Refused):
                    next(self)
                self._follow()

    def _follow(self) -> None:
        """Follow the quotation marks in what has come of the row, to see whether a cell is open at
        its end. A mark opens a cell only where that begins (RFC 4180 section 2). What cannot be
        told yet is left: a comma, behind which a mark may come, and in a cell a mark, which may be
        the first of two."""
        row, at, left = self._row, 0, 0
        if not self._followed and row.startswith(b'"'):
            self._inside, at = True, 1
        self._followed += len(row)
        while True:
            if self._inside:
                closing = CLOSING.match(row, at)
                if closing is None:
                    break
                if closing.end() == len(row):
                    left = 1
                    break
                self._inside, at = False, closing.end()
            opening = row.find(b',"', at)
            if opening < 0:
                left = int(row.endswith(b","))
                break
            self._inside, at = True, opening + 2
        del row[: len(row) - left]

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        too_long = False
        while self.dry:
            if len(self._buffer) > MAX_LINE:
                self._row += self._buffer
                self._follow()
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
        self._row += line
        if len(self._row) > MAX_LINE:
            self._follow()
        if too_long or len(line.removesuffix(b"\n")) > MAX_LINE:
            raise Refused(f"The line is longer than {MAX_LINE} bytes.")
        self._row_bytes += len(line)
        if self._row_bytes > 2 * MAX_LINE:
            # Each line may end a quoted cell and begin another, so that a row could go on for ever.
            raise Refused(
                f"The row is longer than {2 * MAX_LINE} bytes; perhaps a quotation mark is missing."
            )
        try:
            return line.decode()
        except UnicodeDecodeError:
            raise Refused("The line is not in UTF-8.") from None


def rows_of(kind: str, lines: Lines, columns: Columns) -> Iterator[Row]:
    """The rows of a file of the media type `kind`. If it is CSV, the first `next` raises BadRequest
    or InvalidUser for a header line that does not name the columns."""
    return _csv(lines, columns) if kind == CSV else _ndjson(lines)


def _ndjson(lines: Lines) -> Iterator[Row]:
    while True:
        row = Row(lines.begin_row())
        try:
            text = next(lines)
            if not text.strip(" \t\r\n"):
                continue
            row.members = parsed(text.rstrip("\r\n").encode())
        except StopIteration:
            return
        except Refused as refused:
            row.refuse(MalformedJson(str(refused)))
        except MalformedJson as problem:
            told = problem.detail.replace("The body", "The line")
            row.refuse(MalformedJson(told.replace(" at line 1, character", " at character")))
        except Problem as problem:
            row.refuse(problem)
        yield row


def _csv(lines: Lines, columns: Columns) -> Iterator[Row]:
    csv.field_size_limit(3 * MAX_LINE)  # Of a row it is less: see Lines.
    reader = csv.reader(lines, strict=True)
    header = _header(reader, columns)
    while True:
        row = Row(lines.begin_row())
        try:
            cells = next(reader)
            if not cells:
                continue
            if len(cells) == len(header):
                row.members, errors = _members(zip(header, cells, strict=True), columns)
                if errors:
                    row.refuse(InvalidUser(errors=errors))
            else:
                told = f"The row has {len(cells)} cells, and the header {len(header)}."
                row.refuse(BadRequest(told + lines.extent))
        except StopIteration:
            return
        except (Refused, csv.Error) as error:
            text = str(error)
            if not isinstance(error, Refused):
                text = f"The row is not CSV: {_csv_words(error)}."
            # The reader has forgotten that a cell may be open.
            lines.end_row()
            row.refuse(BadRequest(text + lines.extent))
        yield row


def _csv_words(error: Exception) -> str:
    # Python's own message for this tells a programmer how to open a file.
    return "a line must end in LF or CRLF" if "new-line" in str(error) else str(error).rstrip(".")


def _header(reader: Iterator[list[str]], columns: Columns) -> list[str]:
    """The names of the columns of this file. Raises BadRequest if the line is not CSV, or
    InvalidUser, which says what is wrong with the names."""
    try:
        names = [name.strip() for name in next(reader, [])]
    except (Refused, csv.Error) as error:
        raise BadRequest(f"The header line is not CSV: {_csv_words(error)}.") from None
    missing = [name for name in columns.required if name not in names]
    errors = [(name, "is a column that is missing") for name in missing]
    for name in dict.fromkeys(names):
        if name not in columns.names:
            known = ", ".join(columns.names)
            errors.append((name, f"is no column of users; there are {known}"))
        elif names.count(name) > 1:
            errors.append((name, "is a column twice"))
    if errors:
        raise InvalidUser(
            "The first line must name the columns; see errors. Nothing was written.",
            errors=errors,
        )
    return names


def _members(
    cells: Iterable[tuple[str, str]], columns: Columns
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A row's cells, each with the name of its column, as members; and what is wrong with them. An
    empty cell counts as not given, unless its column is required."""
    members: dict[str, Any] = {}
    errors: list[tuple[str, str]] = []
    for name, cell in cells:
        if not cell and name not in columns.required:
            continue
        members[name] = cell
        if name in columns.objects:
            try:
                members[name] = Object(parsed(cell.encode()))
                members[name].text = cell
            except Problem as problem:
                text = "must be a JSON object" if problem.errors else problem.detail
                errors.append((name, text.replace("The body", "The cell")))
    return members, errors
