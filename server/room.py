"""Room for one more connection: which of those that nobody waits for is closed."""

from __future__ import annotations

import heapq
import time

from server.client import Client
from server.upstream import Upstream

# To make room, no client is closed that has connected, or begun its head, less than this many
# seconds ago.
GRACE_SECONDS = 0.1
# A search for clients to close finds at most SPARE_AT_ONCE. These are used for SPARE_SECONDS, or
# longer if the search took long, but for MOST_SPARE_SECONDS at most.
SPARE_AT_ONCE = 4096
SPARE_SECONDS = 0.025
MOST_SPARE_SECONDS = 2.0


class Room:
    """Room among `most` connections: those of the `clients`, and those to the upstream."""

    def __init__(self, clients: set[Client], upstream: Upstream, most: int) -> None:
        self._clients = clients
        self._upstream = upstream
        self._most = most
        # Clients that may be closed, the last one first, as the last search found them.
        self._spare: list[tuple[tuple[int, float], Client]] = []
        self._more = False  # whether the search has left some out
        self._until = 0.0  # until when what was found is used

    @property
    def full(self) -> bool:
        """Whether there are as many connections as there may be."""
        return len(self._clients) + self._upstream.open >= self._most

    def make(self) -> None:
        """If there are as many connections as there may be, close one, if one can be."""
        if self.full:
            self.drop_one()

    def drop_one(self) -> bool:
        """Close a connection that nobody waits for: first one that is kept to the upstream, then a
        client's, in the order of `Client.spare`, and last one on which a client has logged in to
        the upstream. False if there is none.

        To look through ten thousand clients takes tens of milliseconds, and a flood of connections
        would do that each time. So what was found is used again: for SPARE_SECONDS, or for ten
        times as long as the search took, so that searching takes a tenth of the time at most.
        """
        if self._upstream.drop_one():
            return True
        now = time.monotonic()
        if now >= self._until or (self._more and not self._spare):
            found = [(spare, client) for client in self._clients if (spare := client.spare)]
            self._spare = heapq.nsmallest(SPARE_AT_ONCE, found, key=lambda one: one[0])[::-1]
            self._more = len(found) > SPARE_AT_ONCE
            took = time.monotonic() - now
            self._until = now + min(max(SPARE_SECONDS, 10 * took), MOST_SPARE_SECONDS)
        while self._spare:
            spare, client = self._spare.pop()
            # A client that was just accepted may have sent its request, which is not read yet.
            old_enough = not spare[0] or spare[1] <= now - GRACE_SECONDS
            if old_enough and client.spare == spare:
                client.hang_up()
                return True
        return self._upstream.drop_one(own=True)

    def forget_closed(self) -> None:
        """Let go of clients whose connections are closed: they would be kept alive."""
        self._spare = [one for one in self._spare if not one[1].closed]
