"""What a worker is told by the settings."""

from __future__ import annotations

from dataclasses import dataclass

from server.exchange import Patience


@dataclass(frozen=True)
class Options:
    """How a worker serves. Times are in seconds.

    `threads` says how many each lane may have, `eager` how many it starts as jobs come, if not
    all. A lane that is `streamed` reads bodies while they arrive. `waits` says how long a job of a
    lane may wait for a thread, if there is a bound. `limit` is how many requests may be with the
    upstream at once, 0 for as many as there are descriptors for.
    """

    upstream_url: str
    threads: dict[str, int]
    patience: Patience
    eager: dict[str, int]
    streamed: frozenset[str]
    waits: dict[str, float]
    ca_bundle: str | None
    limit: int
    connect_timeout: float
    upstream_keepalive: float
    keepalive: float
    client_timeout: float
    shutdown_timeout: float
    access_log: bool
