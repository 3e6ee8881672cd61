"""Loads a server and measures: how many a second, latency, and CPU time of its process tree.

Each function returns a sample for `rounds.in_turns`, or raises Void where a request failed or the
generator may have been the bottleneck.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import meter
from rounds import Sample, Void
from stage import BENCH, Database, Server, cpus

CONNECTIONS = 64
# A generator busier than this, of one core, may be what limits the requests a second.
BUSY_LIMIT = 0.9
PIECE = 1 << 20


def generator_name() -> str:
    return "wrk" if shutil.which("wrk") else "the benchmark's own generator"


class Spent:
    """CPU time of a server and of a database, between entering and `sample`."""

    def __init__(self, server: Server, database: Database | None = None) -> None:
        self.pids = {"cpu_us": server.pid} | ({"database_us": database.pid} if database else {})
        self.before = self._now()
        self.start = time.perf_counter()

    def _now(self) -> dict[str, float]:
        return {figure: meter.cpu_seconds(pid) for figure, pid in self.pids.items()}

    def sample(self, amount: float, seconds: float | None = None, **more: float) -> Sample:
        """Figures for so many in so many seconds; those since the start where not given."""
        rate = amount / (seconds or time.perf_counter() - self.start)
        now = self._now()
        spent = {name: (now[name] - self.before[name]) / amount * 1e6 for name in now}
        return {"rate": rate, **spent, **more}


def requests(
    server: Server,
    targets: Path | None,
    seconds: int,
    connections: int = CONNECTIONS,
    database: Database | None = None,
) -> Sample:
    """GETs of the targets in a file or, where there is none, creates."""
    # A new prefix each time: no email may have been used before.
    call = ["create", uuid.uuid4().hex] if targets is None else ["get", str(targets)]
    if shutil.which("wrk"):
        length = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency"]
        script = ["-s", str(BENCH / "load.lua")]
        command = ["wrk", *length, *script, f"http://127.0.0.1:{server.port}", "--", *call]
    else:
        command = own_generator(server, connections, seconds, *call)
    return generated(server, [command], seconds, database)


def echoes(server: Server, size: int, seconds: int) -> Sample:
    """WebSocket messages of `size` bytes that come back, one under way on each connection."""
    # One process for each CPU: one alone would be the bottleneck.
    each = own_generator(server, CONNECTIONS // cpus(), seconds, "echo", str(size))
    return generated(server, [each] * cpus(), seconds)


def own_generator(server: Server, connections: int, seconds: int, *call: str) -> list[str]:
    where = [str(server.port), str(connections), str(seconds)]
    return [sys.executable, str(BENCH / "generator.py"), *where, *call]


def generated(
    server: Server, commands: list[list[str]], seconds: int, database: Database | None = None
) -> Sample:
    """What generators that run at once have measured together."""
    busy_before = children_seconds()
    spent = Spent(server, database)
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=seconds + 60) for process in running]
    finally:
        for process in running:
            process.kill()
    results = []
    for process, (output, errors) in zip(running, outputs, strict=True):
        if process.returncode or not output.strip():
            raise Void(f"the generator failed: {(errors or output).strip().splitlines()[-1:]}")
        results.append(json.loads(output.strip().splitlines()[-1]))
    amount, failed = (sum(result[name] for result in results) for name in ("requests", "failed"))
    if failed or not amount:
        raise Void(f"{failed} of {amount} requests failed")
    busy = (children_seconds() - busy_before) / seconds / len(commands)
    if busy > BUSY_LIMIT:
        raise Void(f"the generator was busy for {busy:.0%} of the time")
    return spent.sample(
        amount,
        max(result["seconds"] for result in results),
        p50_ms=statistics.median(result["p50_ms"] for result in results),
        p99_ms=max(result["p99_ms"] for result in results),
        generator=busy,
    )


def children_seconds() -> float:
    """CPU time of the generators that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def downloads(
    server: Server, target: str, size: int, connections: int = 4, times: int = 4
) -> Sample:
    """Bodies of `size` bytes, so many on each connection; amounts are MiB. Raises Void where one of
    them is not whole."""
    problems: list[str] = []

    def fetch() -> None:
        buffer = bytearray(PIECE)
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
    own, spent = time.process_time(), Spent(server)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - spent.start
    # The threads read without Python's lock, so that one core is no limit to this.
    busy = (time.process_time() - own) / seconds
    sample = spent.sample(connections * times * size / (1 << 20), seconds, generator=busy)
    if problems:
        raise Void(f"{len(problems)} downloads failed: {problems[0]}")
    return sample


@contextlib.contextmanager
def exchange(
    server: Server, method: str, headers: dict[str, str], body: bytes = b""
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request for /users, read while the body is still being sent."""
    lines = {"Host": "127.0.0.1", "Connection": "close", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    request = f"{method} /users HTTP/1.1\r\n{head}\r\n".encode() + body

    def send() -> None:
        with contextlib.suppress(OSError):  # the answer tells
            sock.sendall(request)

    sender = threading.Thread(target=send)
    try:
        with socket.create_connection(("127.0.0.1", server.port), 120) as sock:
            sender.start()
            answer = http.client.HTTPResponse(sock, method=method)
            answer.begin()
            if answer.status != 200:
                raise Void(f"status {answer.status}: {answer.read(200)!r}")
            yield answer
            sender.join()
    except (OSError, http.client.HTTPException) as problem:
        raise Void(repr(problem)) from problem


def export(server: Server, media_type: str, database: Database, users: int) -> Sample:
    """All users, in one answer."""
    memory = meter.Peak(server.pid)
    spent = Spent(server, database)
    lines = 0
    with memory, exchange(server, "GET", {"Accept": media_type}) as answer:
        while piece := answer.read(PIECE):
            lines += piece.count(b"\n")
    sample = spent.sample(users)
    if lines - (media_type == "text/csv") != users:
        raise Void(f"{lines} lines of {users} users")
    return sample | {"memory_mib": memory.risen_mib}


def import_(server: Server, database: Database, rows: int) -> Sample:
    """So many new users, in one request."""
    prefix = uuid.uuid4().hex
    text = "email,name\n" + "".join(
        f"{prefix}-{number}@example.com,A new user\n" for number in range(rows)
    )
    headers = {"Content-Type": "text/csv", "Content-Length": str(len(text))}
    memory = meter.Peak(server.pid)
    spent = Spent(server, database)
    with memory, exchange(server, "POST", headers, text.encode()) as answer:
        [last] = collections.deque(answer, maxlen=1)
    sample = spent.sample(rows)
    if json.loads(last).get("created") != rows:
        raise Void(f"the import ended with {last!r}")
    return sample | {"memory_mib": memory.risen_mib}
