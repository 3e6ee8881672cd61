"""Loads a server and measures: requests, latency, and CPU time of the server's process tree."""

from __future__ import annotations

import http.client
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import meter
from stage import BENCH, Database, Server

# A generator busier than this may be what limits the requests a second.
BUSY_LIMIT = 0.9


class Void(Exception):
    """A measurement that must not be used, and why."""


@dataclass(frozen=True)
class Sample:
    """One measurement; `amount` counts requests, or MiB of large bodies."""

    amount: float
    seconds: float
    cpu_seconds: float
    database_seconds: float = 0
    p50_ms: float = 0
    p99_ms: float = 0

    @property
    def rate(self) -> float:
        return self.amount / self.seconds

    @property
    def cpu_us(self) -> float:
        return self.cpu_seconds / self.amount * 1e6

    @property
    def database_us(self) -> float:
        return self.database_seconds / self.amount * 1e6


def generator_name() -> str:
    return "wrk" if shutil.which("wrk") else "the benchmark's own generator"


def requests(
    server: Server,
    targets: Path | None,
    seconds: int,
    connections: int = 64,
    database: Database | None = None,
) -> Sample:
    """Load `server` with GETs of the targets in a file or, where there is none, with creates.

    The CPU time of `database` is measured beside the server's. Raises Void where a request failed or the generator may have been the bottleneck.
    """
    # A new prefix each time: no email may have been used before.
    call = ["create", uuid.uuid4().hex] if targets is None else ["get", str(targets)]
    if shutil.which("wrk"):
        length = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency"]
        script = ["-s", str(BENCH / "load.lua")]
        command = ["wrk", *length, *script, f"http://127.0.0.1:{server.port}", "--", *call]
    else:
        where = [str(server.port), str(connections), str(seconds)]
        command = [sys.executable, str(BENCH / "generator.py"), *where, *call]
    before = meter.cpu_seconds(server.pid)
    database_before = meter.cpu_seconds(database.pid) if database else 0
    spent = children_seconds()
    ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    cpu_seconds = meter.cpu_seconds(server.pid) - before
    database_seconds = meter.cpu_seconds(database.pid) - database_before if database else 0
    busy = (children_seconds() - spent) / seconds
    if ran.returncode or not ran.stdout.strip():
        raise Void(f"the generator failed: {ran.stderr.strip() or ran.stdout.strip()}")
    result = json.loads(ran.stdout.strip().splitlines()[-1])
    if result["failed"] or not result["requests"]:
        raise Void(f"{result['failed']} of {result['requests']} requests failed")
    if busy > BUSY_LIMIT:
        raise Void(f"the generator was busy for {busy:.0%} of the time")
    return Sample(
        result["requests"],
        result["seconds"],
        cpu_seconds,
        database_seconds,
        result["p50_ms"],
        result["p99_ms"],
    )


def children_seconds() -> float:
    """CPU time of the generators that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def downloads(
    server: Server, target: str, size: int, connections: int = 4, times: int = 4
) -> Sample:
    """Fetch a body of `size` bytes so many times on each connection; amounts are MiB.

    Raises Void where one of them is not whole.
    """
    problems: list[str] = []

    def fetch() -> None:
        buffer = bytearray(1 << 20)
        try:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            for _ in range(times):
                connection.request("GET", target)
                answer = connection.getresponse()
                received = 0
                while count := answer.readinto(buffer):
                    received += count
                if answer.status != 200 or received != size:
                    problems.append(f"status {answer.status}, {received} bytes")
            connection.close()
        except (OSError, http.client.HTTPException) as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=fetch) for _ in range(connections)]
    before = meter.cpu_seconds(server.pid)
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    cpu_seconds = meter.cpu_seconds(server.pid) - before
    if problems:
        raise Void(f"{len(problems)} downloads failed: {problems[0]}")
    return Sample(connections * times * size / (1 << 20), seconds, cpu_seconds)
