"""What may happen to a database while somebody uses it, for the programs that have it happen."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.harness.servers import Relay, Server


def of_a_database(
    server: Server, relay: Relay, rng: random.Random
) -> dict[str, Callable[[], None]]:
    """What may happen to the database, by name; each is over when it returns."""

    def crash() -> None:
        server.crash()
        time.sleep(rng.uniform(0, 1))
        server.start()

    def restart() -> None:
        server.stop()
        time.sleep(rng.uniform(0, 1))
        server.start()

    def freeze() -> None:
        with server.frozen():
            time.sleep(rng.uniform(0.5, 4))

    def blackhole() -> None:
        relay.blackhole()
        time.sleep(rng.uniform(0.5, 4))
        relay.heal()

    def refuse() -> None:
        relay.refuse()
        time.sleep(rng.uniform(0, 1))
        relay.heal()

    def fill() -> None:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(psycopg2.OperationalError):
                while True:
                    stack.callback(psycopg2.connect(server.uri()).close)
            time.sleep(rng.uniform(0.5, 2))

    return {each.__name__: each for each in (crash, restart, freeze, blackhole, refuse, fill)}
