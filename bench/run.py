"""Measures Gatehouse side by side with what else a team might run: `make bench`.

Starts all that it needs on this machine, on 127.0.0.1, and stops it. A line is printed for each
measurement, then the page. A run of all scenes that is no smoke run also writes bench/results.json,
docs/performance.md and its picture; `--out` writes the three elsewhere, of any run.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
import traceback
from pathlib import Path

import crowds
import load
import psutil
import report
import stage
from contenders import OURS, contenders
from rounds import Rows
from scenes import SCENES, Bench, Plan

PLANS = {
    "full": Plan("full", 5, 3, 1, users=5_000_000, rows=100_000, idle=20_000),
    "quick": Plan("quick", 3, 1, 1, users=1_000_000, rows=100_000, idle=4_000),
    "smoke": Plan("smoke", 2, 1, 1, users=20_000, rows=2_000, idle=200),
}
HELP = {
    "full": "5 rounds of 3 s, 5 million users, as many idle connections as descriptors allow:"
    " about 25 minutes on two quiet cores, and 10 GB below TMPDIR",
    "quick": "3 rounds of 1 s, a million users, 4,000 idle connections: about 8 minutes; the"
    " default",
    "smoke": "2 rounds of 1 s, all of it small: shows that each scene works, and nothing else",
}


def measure(
    plan: Plan, names: list[str], commit: str | None, made: report.Made
) -> dict[str, dict[str, Rows]]:
    with contextlib.ExitStack() as stack:
        bench = Bench(stack, plan, contenders(), commit)
        found = {}
        for name in names:
            begun = time.monotonic()
            try:
                found[name] = SCENES[name](bench)
            except Exception:  # the others have been measured, or can be
                traceback.print_exc()
                print(f"{name} failed", file=sys.stderr)
            print(f"{name}: took {time.monotonic() - begun:.0f} s", flush=True)
        made.postgres = sorted({database.version for database in bench.databases})
        return found


def main() -> int:
    told = "".join(f"  {name:12}{scene.__doc__}\n" for name, scene in SCENES.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"scenes:\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    amount = parser.add_mutually_exclusive_group()
    for name, text in HELP.items():
        amount.add_argument(
            f"--{name}", dest="plan", action="store_const", const=PLANS[name], help=text
        )
    parser.add_argument(
        "--only", action="append", choices=SCENES, metavar="SCENE",
        help="this scene alone; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="COMMIT",
        help="also the four calls beside Gatehouse as it was at a commit: two minutes more",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="write them there")
    parser.set_defaults(plan=PLANS["quick"])
    given = parser.parse_args()
    if given.only == ["against"] and not given.against:
        parser.error("--only against needs --against COMMIT")
    commit = stage.hash_of(given.against) if given.against else None
    # As Ctrl-C does, it ends what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    crowds.most()  # so that all that is started may have as many descriptors
    options = [f"--{given.plan.name}", *(f"--only {name}" for name in given.only or ())]
    options += [f"--against {commit}"] if commit else []
    begun = time.monotonic()
    made = report.Made(
        f"bench/run.py {' '.join(options)}",
        given.plan,
        stage.cpus(),
        load.generator_name(),
        psutil.cpu_percent(interval=2),
        {peer.name: peer.made_of for peer in contenders() if peer.name != OURS},
        stage.grouped(),
        runs=stage.how_it_runs(),
        python=stage.python(),
        against=stage.story_of(commit) if commit else "",
    )
    if made.is_busy:
        print(f"warning: {made.warning()}", file=sys.stderr)
    scenes = measure(given.plan, given.only or list(SCENES), commit, made)
    made.minutes = (time.monotonic() - begun) / 60
    results = report.Results(made, scenes)
    whole = len(scenes) == len(SCENES)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        results.write(given.out / "results.json")
        report.write(given.out / "results.json", given.out)
    elif whole and given.plan is not PLANS["smoke"]:
        results.write(report.RESULTS)
        report.write(report.RESULTS, report.DOCS)
    print(f"\n{report.page(results)}")
    return 0 if len(scenes) == len(given.only or SCENES) else 1


if __name__ == "__main__":
    sys.exit(main())
