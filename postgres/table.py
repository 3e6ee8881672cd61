"""A table whose rows are read as JSON, and of which each write is one statement.

PostgreSQL makes the JSON of a row, which is passed on as it is: for one row and for a page alike.
The statements are composed once, from a peewee model and the columns that callers set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from peewee import EXCLUDED, SQL, Case, Cast, NodeList, Query, fn

from postgres.statements import Row, Statement, Statements, unknown
from problems import DatabaseUnavailable, Problem, RefusedByDatabase

# Columns that no caller sets: when a row was made, and when it was last changed. The second is the
# row's version, too.
TIMES = ("created_at", "updated_at")
# The parameters of a table's own statements beside its columns, and their SQL types.
PARAMETERS = {
    "id": "uuid",
    "match": "text[]",
    "none_match": "text[]",
    "untouched": "double precision",
}
# Types whose values are compared as text. As jsonb 1 and 1.0 are equal, and are not the same JSON:
# a GET would give another answer with the same version.
AS_TEXT = {"jsonb"}


class Column(Protocol):
    """A column that callers set: its name, its SQL type, and whether it may be NULL. `merged` is 0
    if nothing is merged into its values. Otherwise it is how many bytes the result may have, as
    PostgreSQL writes it."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def nullable(self) -> bool: ...
    @property
    def merged(self) -> int: ...


class Found(NamedTuple):
    """A row as JSON, and its version: the same until the row is changed."""

    json: str
    version: str
    created: bool = False


class Patch(NamedTuple):
    """Statements that change some columns of a row, of which some are merged into the values that
    are there (RFC 7396, by the function users_merged of migration 003).

    `update` does it, unless a result would be too large. `same` finds the row if it looks as that
    would leave it. `look` does as `Table.get`, and says for each column that is merged whether the
    result would be too large.
    """

    update: Statement
    same: Statement
    look: Statement


class Table:
    """The table of a peewee `model` that has the columns `id` (a UUID) and TIMES, and `columns`.

    `get`, `create`, `put`, `replace`, `delete`, `same`, `create_many` and `replace_many` are its
    statements, and `patch` makes those of a Patch, for the names of the columns that are changed,
    and of those that are merged. `create` does nothing if another row has the same value of the
    index `unique`, which is a peewee index of the model. `json` and `version` are SQL.

    `parameters` are those of other statements that are made of it, and their SQL types.
    """

    def __init__(
        self, model: Any, columns: Sequence[Column], unique: Any, parameters: Mapping[str, str]
    ) -> None:
        self.model = model
        self.columns = columns
        kinds = {column.name: column.kind for column in columns}
        self.types = {**PARAMETERS, **parameters, **kinds}
        taken = kinds.keys() & (PARAMETERS.keys() | parameters.keys())
        assert not taken, f"statements have a parameter of this name, so no column can: {taken}"
        self.json = self._json()
        self.version = in_rfc_3339(model.updated_at)
        self._unique = unique
        self._database: Statements = model._meta.database.statements
        self._this = model.id == self.given("id")
        given = {column.name: self.given(column.name) for column in columns}
        row = {model.id: self.given("id")} | {self._of(one): given[one.name] for one in columns}
        excluded = {column.name: getattr(EXCLUDED, column.name) for column in columns}
        self.get = self.statement(model.select(self.json, self.version).where(self._this))
        # Only the conflict with that index is ignored. With any other, of an index or an exclusion
        # constraint that the operator added, the database refuses the row.
        self.create = self.statement(
            model.insert(row)
            .on_conflict(action="IGNORE", conflict_target=unique._expressions)
            .returning(self.json, self.version)
        )
        self.put = self.statement(
            model.insert(row)
            .on_conflict(
                conflict_target=[model.id], update=self._changed(excluded), where=self._allowed()
            )
            .returning(self.json, self.version, SQL("xmax = 0"))
        )
        self.replace, self.same = self._update(given), self._same(given)
        delete = model.delete().where(self._this & self._allowed())
        self.delete = self.statement(delete.returning(model.id))
        self.patch = functools.cache(self._patch)

    # Statements, and parts of them.

    def given(self, name: str) -> SQL:
        """The parameter of this name."""
        return SQL(f"CAST(%({name})s AS {self.types[name]})")

    def statement(self, query: Query, *, prepared: bool = True) -> Statement:
        """Make a statement of a query. All its values are parameters by name: see `types`."""
        sql = sql_of(query)
        types = {name: kind for name, kind in self.types.items() if f"%({name})s" in sql}
        return Statement(sql, types, prepared=prepared)

    def _of(self, column: Column) -> Any:
        return getattr(self.model, column.name)

    def _json(self) -> Any:
        """A row as JSON. This takes PostgreSQL a third less time than json_build_object, which
        looks up at every row how each value is written."""
        parts: list[Any] = [SQL("""'{"id": "'"""), self.model.id, SQL("""'"'""")]
        for column in self.columns:
            # jsonb is JSON as it is, and asking for that costs as much as the column.
            value = self._of(column)
            value = value if column.kind == "jsonb" else fn.to_json(value)
            if column.nullable:  # CONCAT drops NULL.
                value = fn.coalesce(value, SQL("'null'"))
            parts += [SQL(f"""', "{column.name}": '"""), value]
        for name in TIMES:
            time = in_rfc_3339(getattr(self.model, name))
            parts += [SQL(f"""', "{name}": "'"""), time, SQL("""'"'""")]
        return fn.CONCAT(*parts, SQL("'}'"))  # In lower case it would be a method of peewee's.

    def _differs(self, new: Mapping[str, Any]) -> Any:
        """SQL that says whether these values would change the row. NULL counts as a value."""
        old = fn.ROW(*(_compared(one, self._of(one)) for one in self.columns))
        row = fn.ROW(*(_compared(one, new[one.name]) for one in self.columns))
        return NodeList((old, SQL("IS DISTINCT FROM"), row))

    def _changed(self, new: Mapping[str, Any]) -> dict[Any, Any]:
        changed = self.model.updated_at
        # Two changes may share a microsecond, and clocks may go back: this time is later all the
        # same.
        later = fn.greatest(fn.now(), changed + SQL("interval '1 microsecond'"))
        columns = {self._of(column): new[column.name] for column in self.columns}
        return columns | {changed: Case(None, [(self._differs(new), later)], changed)}

    def _allowed(self) -> Any:
        # A condition that was not given is NULL.
        match = SQL("(%(match)s IS NULL)") | (self.version == SQL("ANY(%(match)s)"))
        none = SQL("(%(none_match)s IS NULL)") | ~(self.version == SQL("ANY(%(none_match)s)"))
        return match & none & self._untouched()

    def _untouched(self) -> Any:
        # A second run, if nobody knows whether the first was carried out: see Statements.write.
        since = fn.now() - SQL("make_interval(secs => %(untouched)s)")
        return SQL("(%(untouched)s IS NULL)") | (self.model.updated_at < since)

    def _update(self, new: Mapping[str, Any], *unless: Any) -> Statement:
        query = self.model.update(self._changed(new)).where(self._this & self._allowed())
        for condition in unless:
            query = query.where(~condition)
        return self.statement(query.returning(self.json, self.version))

    def _same(self, new: Mapping[str, Any]) -> Statement:
        """Finds the row if it looks as a write of these values would have left it. The third column
        says whether that write created it, and did not change one that was there."""
        # The row is locked because a lock is a write. With a synchronous standby it is answered
        # only when the standby has all writes before it. A mere read may see what a failover will
        # undo.
        found = self.model.select(self.json, self.version, self._created_lately())
        return self.statement(found.where(self._this & ~self._differs(new)).for_update())

    def _created_lately(self) -> Any:
        """Whether a row was created a moment ago, and not changed since."""
        created = self.model.created_at
        return (created == self.model.updated_at) & (
            created > fn.now() - SQL("interval '1 minute'")
        )

    def _patch(self, names: frozenset[str], merged: frozenset[str]) -> Patch:
        new = {column.name: self._of(column) for column in self.columns}
        too_large = []
        for column in self.columns:
            name = column.name
            if name in merged:
                new[name] = fn.users_merged(new[name], self.given(name))
                size = fn.octet_length(Cast(new[name], "text"))
                too_large.append(size > SQL(str(column.merged)))
            elif name in names:
                new[name] = self.given(name)
        look = self.model.select(self.json, self.version, *too_large).where(self._this)
        return Patch(self._update(new, *too_large), self._same(new), self.statement(look))

    # Statements that write many rows.

    @property
    def arrays(self) -> dict[str, str]:
        """The parameters of a statement that has many rows: an array for `id` and each column."""
        names = ("id", *(column.name for column in self.columns))
        return {name: f"{self.types[name]}[]" for name in names}

    def rows_given(self) -> str:
        """SQL for the rows that are given as arrays, as a table `given`."""
        rows = ", ".join(f"CAST(%({name})s AS {kind})" for name, kind in self.arrays.items())
        names = ", ".join(f'"{name}"' for name in self.arrays)
        return f"unnest({rows}) WITH ORDINALITY AS given({names}, number)"

    def _columns_given(self) -> dict[str, SQL]:
        return {name: SQL(f'given."{name}"') for name in self.arrays}

    # These two are composed when the first import comes: the service starts sooner without them.

    @functools.cached_property
    def create_many(self) -> Statement:
        """Creates rows. It leaves alone a row that exists already, and leaves out a second one of
        the same. Rows are created in the order of the index, as those of `replace_many` are locked
        in one order: otherwise two statements that create the same rows wait for each other. As in
        `create`, no other conflict is ignored: of two rows that an index of the operator's own
        keeps apart, the first one given is to be created, and not the first one of this order."""
        id_, given, unique = self.model.id, self._columns_given(), self._unique
        ids = SQL(f"CAST(%(id)s AS {self.arrays['id']})")
        there = self.model.select(id_).where(id_ == fn.ANY(ids))
        query = self.model.select(*given.values()).from_(SQL(self.rows_given()))
        insert = self.model.insert_from(
            query.where(given["id"].not_in(there)).order_by(*unique._expressions, SQL("number")),
            [getattr(self.model, name) for name in given],
        )
        ignored = {"action": "IGNORE", "conflict_target": unique._expressions}
        query = insert.on_conflict(**ignored).returning(Cast(id_, "text"))
        return Statement(sql_of(query), self.arrays, prepared=False)

    @functools.cached_property
    def replace_many(self) -> Statement:
        """Replaces rows that exist. For each of them it says whether this statement changed it,
        whether it was already as it is given, and whether it was created a moment ago."""
        id_, given, rows = self.model.id, self._columns_given(), SQL("given")
        this, differs = id_ == given["id"], self._differs(given)
        update = self.model.update(self._changed(given)).from_(rows)
        changed = update.where(this & differs & self._untouched()).returning(id_)
        # The rows are locked in one order first. Otherwise two statements that change the same rows
        # in another order wait for each other.
        locked = self.model.select(id_).from_(self.model, rows).where(this & differs)
        locked = locked.order_by(id_).for_update("FOR NO KEY UPDATE", of=self.model)
        changed = changed.where(SQL("(SELECT count(*) FROM locked) >= 0"))
        was_changed = NodeList((id_, SQL("IN (SELECT id FROM changed)")))
        told = (Cast(id_, "text"), was_changed, ~differs, self._created_lately())
        found = self.model.select(*told).from_(self.model, rows).where(this)
        return Statement(
            f"WITH given AS (SELECT * FROM {self.rows_given()}),"
            f" locked AS MATERIALIZED ({sql_of(locked)}),"
            f" changed AS ({sql_of(changed)}) {sql_of(found)}",
            self.arrays | {"untouched": self.types["untouched"]},
            prepared=False,
        )

    # Writes, and what became of them.

    def write(
        self,
        statement: Statement,
        values: Mapping[str, Any],
        look: Statement,
        why_not: Callable[[list[Row]], Problem | None],
    ) -> tuple[list[Row], bool]:
        """Run a write, and return what `Statements.write` returns: the rows, and whether it was run
        again. There are no rows only if it was.

        If the statement did nothing, `why_not` is given the rows that `look` finds, and the Problem
        that it returns is raised. If it returns none, there are two cases. Somebody was faster: the
        statement is run once more. Or the database itself leaves the row as it is, by a trigger
        that returns NULL or by a policy: RefusedByDatabase is raised. It is the second case if
        `look` finds the same before and after a run, because every change makes another version.
        """
        before = None
        while True:
            rows, again = self._database.write(statement, values)
            if rows or again:
                return rows, again
            found = self._database.read(look, values)
            if problem := why_not(found):
                raise problem
            if found == before:
                break
            before = found
        self._database.say("refused by the database: a trigger or a policy left the row as it was")
        raise RefusedByDatabase

    def done_before(self, same: Statement, values: Mapping[str, Any]) -> Found:
        """The row, if it looks as a run whose answer was lost would have left it: that run, or one
        just like it, was carried out. Otherwise raises DatabaseUnavailable, outcome unknown."""
        rows = self.confirmed(same, values)
        if not rows:
            raise unknown()
        return Found(*rows[0])

    def confirmed(self, statement: Statement, values: Mapping[str, Any]) -> list[Row]:
        """What a statement finds after a write whose answer was lost. Raises DatabaseUnavailable,
        outcome unknown, if the database cannot be asked."""
        try:
            return self._database.read(statement, values)
        except DatabaseUnavailable:
            raise unknown() from None


def _compared(column: Column, value: Any) -> Any:
    """A value of a column, as SQL, in a form that is equal only if it is written the same way."""
    return Cast(value, "text") if column.kind in AS_TEXT else value


def in_rfc_3339(column: Any) -> Any:
    """A time in RFC 3339, in UTC with microseconds, as SQL."""
    utc = fn.timezone(SQL("'UTC'"), column)
    return fn.to_char(utc, SQL("""'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'"""))


def sql_of(query: Query) -> str:
    """The SQL of a query, all of whose values are parameters by name. Raises ValueError if it has a
    value itself."""
    sql: str
    sql, params = query.sql()
    if params:
        raise ValueError(
            f"a query has the values {params}: write a constant as SQL(...), and what is given with"
            " each call as TABLE.given(name)"
        )
    return sql
