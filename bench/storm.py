"""A storm: a database that is killed, restarted, frozen, blackholed and full, in random order.

Writers go on all the time and remember every answer; somebody else sends proxied requests. Exits
with 1 where an acknowledged write is lost, a refused one is there, or a proxied request failed.

    python bench/storm.py --kills 100 --writes 50000 --minutes 30
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from mishaps import of_a_database

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.harness import RawClient, ScriptedUpstream, Service, wait_for
from tests.harness.audit import Audit
from tests.harness.servers import Relay, Server


class Proxied:
    """Proxied requests one after another on one connection, in a thread of its own."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.milliseconds: list[float] = []
        self.wrong: list[str] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with RawClient(self.port) as client:
            while not self._stopping.wait(0.01):
                began = time.perf_counter()
                client.send(b"GET /elsewhere HTTP/1.1\r\nHost: a.example\r\n\r\n")
                reply = client.reply()
                self.milliseconds.append((time.perf_counter() - began) * 1000)
                if reply.status != 200 or reply.body != b"ok":
                    self.wrong.append(repr(reply))

    def __enter__(self) -> Proxied:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100, help="kills and restarts, at least")
    parser.add_argument("--writes", type=int, default=50000, help="acknowledged, at least")
    parser.add_argument("--minutes", type=float, default=30, help="of faults in random order")
    parser.add_argument("--seed", type=int, default=15)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    happened: Counter[str] = Counter()
    upstream = ScriptedUpstream()
    with Server(max_connections=40) as server, Relay(server.port) as relay:
        uri = server.uri(server.create(), port=relay.port)
        with (
            Service(
                POSTGRES_URI=uri, UPSTREAM_URL=upstream.url, WORKERS=2, ACCESS_LOG="off"
            ) as service,
            Proxied(service.port) as proxied,
            Audit(service.port, writers=8) as audit,
        ):
            possible = of_a_database(server, relay, rng)
            ends = time.monotonic() + given.minutes * 60
            while (
                time.monotonic() < ends
                or happened["crash"] + happened["restart"] < given.kills
                or audit.acknowledged < given.writes
            ):
                goal = audit.acknowledged + rng.randrange(50, 400)
                wait_for(lambda goal=goal: audit.acknowledged >= goal, 60, "writes after a fault")  # type: ignore[misc]
                name = rng.choice(list(possible))
                happened[name] += 1
                possible[name]()
            goal = audit.acknowledged + 100
            wait_for(lambda: audit.acknowledged >= goal, 60, "writes after the last fault")
            audit.stop()
            findings = audit.findings()
    upstream.close()
    ninety_nine = statistics.quantiles(proxied.milliseconds, n=100)[98]
    print(
        f"seed {given.seed}: {', '.join(f'{count} {name}' for name, count in happened.items())};\n"
        f"{audit.acknowledged} writes acknowledged, {audit.refused} refused, {audit.unknown} unknown;"
        f" lost: {len(findings['lost'])}, refused ones present: {len(findings['present'])}, false"
        f" answers: {len(audit.wrong)}, slowest {audit.slowest:.1f} s;\n"
        f"{len(proxied.milliseconds)} proxied requests meanwhile: p99 {ninety_nine:.1f} ms, worst"
        f" {max(proxied.milliseconds):.0f} ms, failed: {len(proxied.wrong)}"
    )
    problems = [*findings["lost"], *findings["present"], *audit.wrong, *proxied.wrong]
    for line in problems[:10]:
        print(f"    {line}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
