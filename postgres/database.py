"""The database as peewee and playhouse know it: a PooledPostgresqlDatabase whose pool is ours."""

from __future__ import annotations

from typing import Any

import peewee
from playhouse.pool import PooledPostgresqlDatabase

from postgres.statements import Statements


class Database(PooledPostgresqlDatabase):  # type: ignore[misc]
    """A deferred database; `configure` says where it is, and the first use connects.

    `statements` runs what the service asks of it. What uses peewee itself gets its connections from
    the same pool.
    """

    def __init__(self) -> None:
        super().__init__(None)
        # peewee holds its own lock while it connects, but needs it for thread-local state only.
        self._lock = peewee._NoopLock()
        self.statements = Statements()

    def configure(self, uri: str, **settings: Any) -> None:
        """Do as `Pool.configure`."""
        self.statements.configure(uri, **settings)
        self.init(self.statements.target.database)

    def close_idle(self) -> None:
        """Do as `Pool.close_idle`."""
        self.statements.close_idle()

    close_all = close_idle

    # What peewee calls.

    def _connect(self) -> Any:
        return self.statements.acquire()

    def _close(self, conn: Any, close_conn: bool = False) -> None:
        self.statements.release(conn, broken=close_conn)
