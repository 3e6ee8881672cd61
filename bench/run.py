"""Measures Gatehouse side by side with what else a team might run: `make bench`.

Starts all that it needs on this machine, prints a line for each measurement and then the page that
it writes, docs/performance.md, with its plot, docs/performance.svg.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import meter
import psutil
import report
import scenes
import stage
from contenders import contenders
from scenes import Plan, Targets

DEFAULT = Plan(rounds=5, seconds=5, warm_up=3, sizes=(1_000, 100_000))
QUICK = Plan(rounds=3, seconds=1, warm_up=1, sizes=(1_000, 100_000))
SEEDED = 10_000
BUSY_PERCENT = 10


def measure(plan: Plan, peer_logs: bool) -> report.Results:
    with stage.stage() as everything, stage.postgres() as database:
        uri = database.create("bench", SEEDED)
        targets = Targets(everything.folder, database, uri)
        upstream = stage.upstream(everything)
        url = f"http://127.0.0.1:{upstream.port}"
        servers = scenes.set_up(everything, contenders(), uri, upstream, targets, peer_logs)
        calls = scenes.calls(servers, targets, database, plan)
        memory = {name: meter.memory_bytes(server.pid) for name, (server, _) in servers.items()}
        large = scenes.large(servers, plan)
        ours = servers["Gatehouse"][0]
        for server, _ in servers.values():
            if server is not ours:
                everything.stop(server)
        connections = scenes.connections(ours, targets, plan)
        everything.stop(ours)
        return report.Results(
            calls,
            large,
            memory,
            connections,
            scenes.sizes(everything, database, url, plan),
            scenes.streams(everything, uri, targets, plan),
            scenes.starts(everything, uri, url, targets, plan),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three minutes, for a first look")
    parser.add_argument("--full", action="store_true", help="also a table of 5 million users")
    parser.add_argument("--peer-logs", action="store_true", help="have the others log too")
    parser.add_argument("--out", type=Path, default=stage.ROOT / "docs", metavar="DIR")
    arguments = parser.parse_args()
    # As Ctrl-C does, it ends what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan = QUICK if arguments.quick else DEFAULT
    if arguments.full:
        plan = Plan(plan.rounds, plan.seconds, plan.warm_up, (*plan.sizes, 5_000_000))
    busy = psutil.cpu_percent(interval=2)
    if busy > BUSY_PERCENT:
        print(
            f"warning: other work takes {busy:.0f}% of the CPU here, and not all servers suffer"
            " from that alike: the ratios will be off",
            file=sys.stderr,
        )
    results = measure(plan, arguments.peer_logs)
    given = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    options = " ".join(option for option in given if not option.startswith("--out"))
    command = f".venv/bin/python bench/run.py {options}" if options else "make bench"
    page = report.page(results, contenders(), plan, command, arguments.peer_logs)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "performance.md").write_text(page)
    (arguments.out / "performance.svg").write_text(report.plot(results))
    print(f"\n{page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
