"""Whether the process, the database and the upstream are up.

The database is asked, in one round trip. The upstream is judged by how requests to it went.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from metrics import IDLE, IN_FLIGHT, IN_USE, LIMIT, STREAMS, Board
from models import User, statements
from postgres.statements import Statement
from problems import Problem, SchemaNotMigrated

log = logging.getLogger("gatehouse")

USERS = f"to_regclass('{User._meta.table_name}')"
# As Python shows this list it is one of SQL, too.
COLUMNS = [field.column_name for field in User._meta.sorted_fields]
# One round trip finds the migrations that have been applied, and whether the role has the
# privileges on the table that it needs. That is NULL if there is no table, or not all its columns.
PROBE = Statement(
    "SELECT name, NULL FROM migratehistory UNION ALL "
    f"SELECT NULL, bool_and(has_table_privilege({USERS}, privilege)) "
    "FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege "
    f"WHERE {len(COLUMNS)} = (SELECT count(*) FROM pg_attribute WHERE attrelid = {USERS} "
    f"AND attname = ANY(ARRAY{COLUMNS}))",
    {},
)
# /health may take half a second longer than DB_CONNECT_TIMEOUT. This much of that is for the probe.
MARGIN_SECONDS = 0.2


class Probe:
    """One measurement. All callers that ask before it has ended share it. `ended` is when that was,
    in seconds on the monotonic clock."""

    ended = 0.0

    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: dict[str, Any] = {"status": "down", "latency_ms": None}


class Health:
    """Makes the reports. `migrations` are the names of those that this version needs, in order;
    `started` is when the service started, in seconds on the monotonic clock."""

    def __init__(
        self, *, version: str, migrations: list[str], started: float, board: Board, pool_size: int
    ) -> None:
        self.version = version
        self.migrations = migrations
        self.started = started
        self.board = board
        self.pool_size = pool_size
        self._lock = threading.Lock()
        self._probe = Probe()
        self._probe.done.set()

    def database(self, asked: float) -> dict[str, Any]:
        """The database part. It is measured now, unless a measurement is running, or has ended
        since the caller `asked` (on the monotonic clock): it may have waited for a thread."""
        with self._lock:
            probe = self._probe
            leads = probe.done.is_set() and probe.ended <= asked
            if leads:
                probe = self._probe = Probe()
        if leads:
            try:
                probe.result = self._measure()
            finally:
                probe.ended = time.monotonic()
                probe.done.set()
        else:
            probe.done.wait(statements.connect_timeout + MARGIN_SECONDS)
        return {
            "status": probe.result["status"],
            "latency_ms": probe.result["latency_ms"],
            "pool": {
                "size": self.pool_size,
                "in_use": self.board.total(IN_USE),
                "idle": self.board.total(IDLE),
            },
            "pending_migrations": probe.result.get("pending_migrations", []),
        }

    def _measure(self) -> dict[str, Any]:
        began = time.monotonic()
        try:
            rows = statements.read(PROBE, {}, within=statements.connect_timeout + MARGIN_SECONDS)
            applied = {name for name, _ in rows}
            allowed = next(allowed for name, allowed in rows if name is None)
        except SchemaNotMigrated:
            applied, allowed = set(), None
        except Problem:
            return {"status": "down", "latency_ms": None}
        except Exception:
            log.exception("the database could not be asked how it is")
            return {"status": "down", "latency_ms": None}
        latency = round((time.monotonic() - began) * 1000, 3)
        pending = [name for name in self.migrations if name not in applied]
        if allowed is False:
            statements.say("the role may not do all of SELECT, INSERT, UPDATE and DELETE in users")
        elif allowed is None and not pending:
            statements.say("table users is not what the migrations make: `app.py check` says more")
        unmigrated = allowed is not False and (pending or allowed is None)
        return {
            "status": "unmigrated" if unmigrated else "up" if allowed else "down",
            "latency_ms": latency,
            "pending_migrations": pending,
        }

    def report(self, asked: float) -> dict[str, Any]:
        """All of /health, for a caller that `asked` at that time (on the monotonic clock)."""
        measured = self.database(asked)
        return {
            "status": "ok" if measured["status"] == "up" else "degraded",
            "version": self.version,
            "uptime_seconds": round(time.monotonic() - self.started, 3),
            "database": measured,
            "upstream": {
                "status": self.board.upstream(),
                "in_flight": self.board.total(IN_FLIGHT),
                "streams": self.board.total(STREAMS),
                "limit": self.board.total(LIMIT),
            },
        }
