"""What is measured, scene by scene. Everything in a scene takes turns, so that whatever else the
machine does falls on all alike."""

from __future__ import annotations

import contextlib
import resource
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import load
import meter
import stage
import verify
from contenders import Contender
from load import Sample, Void
from stage import BENCH, Database, Server, Stage

LARGE_BYTES = 64 << 20
# As many idle streams as the descriptors of this process allow: each has one here, two in a worker
# and one in the upstream. The last are for all else.
MOST_STREAMS, SPARE_DESCRIPTORS = 4000, 512


@dataclass(frozen=True)
class Plan:
    """How long to measure: `seconds` in each of `rounds`, after `warm_up` seconds."""

    rounds: int
    seconds: int
    warm_up: int
    sizes: tuple[int, ...]


@dataclass
class Row:
    """A measurement for each round, or why they must not be used."""

    samples: list[Sample] = field(default_factory=list)
    void: str | None = None

    def median(self, figure: str) -> float:
        return float(statistics.median(getattr(sample, figure) for sample in self.samples))


@dataclass(frozen=True)
class Ratio:
    median: float
    low: float
    high: float


def ratio(ours: Row, theirs: Row, figure: str) -> Ratio | None:
    """How often `theirs` goes into `ours`, round by round; None where one of them is void."""
    if ours.void or theirs.void:
        return None
    each = [
        getattr(one, figure) / max(getattr(other, figure), 1e-9)
        for one, other in zip(ours.samples, theirs.samples, strict=True)
    ]
    return Ratio(statistics.median(each), min(each), max(each))


Rows = dict[str, Row]


def in_turns(
    names: Sequence[str], rounds: int, measure: Callable[[str], Sample], what: str
) -> Rows:
    """Measure each name once in every round, beginning with another one each time."""
    rows = {name: Row() for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            if rows[name].void:
                continue
            try:
                sample = measure(name)
            except Void as problem:
                rows[name].void = str(problem)
                print(f"{what}, {name}: void: {problem}", flush=True)
                continue
            rows[name].samples.append(sample)
            print(
                f"{what}, round {number + 1}, {name}:"
                f" {sample.rate:.0f}/s, {sample.cpu_us:.0f} µs of CPU each",
                flush=True,
            )
    return rows


class Targets:
    """Files of request targets."""

    def __init__(self, folder: Path, database: Database, uri: str) -> None:
        ids = database.ids(uri, 1000)
        self.known = ids[0]
        self.user = self._write(folder / "user", [f"/users/{user}" for user in ids])
        self.page = self._write(folder / "page", ["/users?limit=50"])
        self.small = self._write(folder / "small", ["/small?page=1&sort=name"])
        # Anywhere in the table, not only at its beginning.
        self.pages = self._write(
            folder / "pages", [f"/users?limit=50&after={user}" for user in ids]
        )

    @staticmethod
    def _write(path: Path, targets: list[str]) -> Path:
        path.write_text("".join(target + "\n" for target in targets))
        return path


CALLS = ("a user by id", "a page of 50", "a create", "a proxied answer of 1 KB")


def calls(
    contenders: dict[str, tuple[Server, bool]], targets: Targets, database: Database, plan: Plan
) -> dict[str, Rows]:
    """The four calls. `contenders` tells of each whether it has /users."""
    files = dict(zip(CALLS, (targets.user, targets.page, None, targets.small), strict=True))
    results = {}
    for call, file in files.items():
        proxied = file is targets.small
        names = [name for name, (_, users) in contenders.items() if users or proxied]
        asked = None if proxied else database

        def measure(name: str, file: Path | None = file, asked: Database | None = asked) -> Sample:
            return load.requests(contenders[name][0], file, plan.seconds, database=asked)

        for name in names:
            with contextlib.suppress(Void):
                load.requests(contenders[name][0], file, plan.warm_up)
        results[call] = in_turns(names, plan.rounds, measure, call)
    return results


def large(contenders: dict[str, tuple[Server, bool]], plan: Plan) -> Rows:
    """64 MiB through the proxy, four at a time; amounts are MiB."""

    def measure(name: str) -> Sample:
        return load.downloads(contenders[name][0], "/large", LARGE_BYTES)

    for name in contenders:
        with contextlib.suppress(Void):
            measure(name)
    return in_turns(list(contenders), plan.rounds, measure, "64 MiB")


def connections(service: Server, targets: Targets, plan: Plan) -> dict[str, Rows]:
    """A user by id and a proxied answer over more and more connections."""
    counts = {f"{count}": count for count in (1, 16, 64, 256)}
    results = {}
    for call, file in ((CALLS[0], targets.user), (CALLS[3], targets.small)):

        def measure(name: str, file: Path = file) -> Sample:
            return load.requests(service, file, plan.seconds, connections=counts[name])

        results[call] = in_turns(list(counts), min(plan.rounds, 3), measure, f"{call}, connections")
    return results


def sizes(stage_: Stage, database: Database, upstream: str, plan: Plan) -> Rows:
    """A page of 50 anywhere in tables of several sizes."""
    services: dict[str, tuple[Server, Targets]] = {}
    for size in plan.sizes:
        print(f"filling a table of {size:,} users ...", flush=True)
        uri = database.create(f"users_{size}", size)
        folder = stage_.folder / str(size)
        folder.mkdir()
        service = stage.gatehouse(stage_, uri, upstream)
        services[f"{size:,}"] = service, Targets(folder, database, uri)

    def measure(name: str) -> Sample:
        service, targets = services[name]
        return load.requests(service, targets.pages, plan.seconds, database=database)

    for name in services:
        with contextlib.suppress(Void):
            measure(name)
    rows = in_turns(list(services), min(plan.rounds, 3), measure, "a page of so many users")
    for service, _ in services.values():
        stage_.stop(service)
    return rows


@dataclass(frozen=True)
class Streams:
    """Users served with and without `count` idle streams open; memory in bytes, threads of all
    workers."""

    rows: Rows
    count: int
    threads_before: int
    threads_with: int
    workers: int
    memory_before: int
    memory_with: int


@contextlib.contextmanager
def open_streams(port: int, count: int) -> Iterator[None]:
    """So many server-sent event streams, each of which has had its first event."""
    with contextlib.ExitStack() as opened:
        socks = []
        for _ in range(count):
            sock = opened.enter_context(socket.create_connection(("127.0.0.1", port), 20))
            sock.sendall(b"GET /events HTTP/1.1\r\nHost: bench\r\n\r\n")
            socks.append(sock)
        for sock in socks:
            received = b""
            while b"data: hello" not in received:
                data = sock.recv(65536)
                if not data:
                    raise RuntimeError(f"a stream ended: {received!r}")
                received += data
        yield


def most_streams() -> int:
    """How many streams can be open, with this process's descriptors raised to what it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > 65536:
        hard = 65536
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    return min(MOST_STREAMS, (hard - SPARE_DESCRIPTORS) // 2)


def streams(stage_: Stage, uri: str, targets: Targets, plan: Plan) -> Streams:
    """Idle streams beside users, in a service with default settings."""
    count = most_streams()
    upstream = stage.event_upstream(stage_)
    service = stage.gatehouse(stage_, uri, f"http://127.0.0.1:{upstream.port}")
    load.requests(service, targets.user, plan.warm_up)
    before, threads = meter.memory_bytes(service.pid), meter.threads(service.pid)
    with open_streams(service.port, count):
        open_memory, open_threads = meter.memory_bytes(service.pid), meter.threads(service.pid)

    def measure(name: str) -> Sample:
        if name == "without":
            return load.requests(service, targets.user, plan.seconds)
        with open_streams(service.port, count):
            return load.requests(service, targets.user, plan.seconds)

    rows = in_turns(["without", "with"], plan.rounds, measure, f"users, {count} streams open")
    stage_.stop(service)
    stage_.stop(upstream)
    return Streams(rows, count, threads, open_threads, stage.cpus(), before, open_memory)


@dataclass(frozen=True)
class Start:
    """Medians: seconds to the first answer, memory in bytes after it and after a load."""

    seconds: float
    memory_first: float
    memory_loaded: float


def starts(
    stage_: Stage, uri: str, upstream: str, targets: Targets, plan: Plan
) -> dict[str, Start]:
    """One process of Gatehouse, with its default settings, and one that is as bare as can be."""
    found: dict[str, list[Start]] = {"Gatehouse": [], "bare": []}
    for _ in range(plan.rounds):
        for name, measured in found.items():
            port = stage.free_port()
            environ = stage.gatehouse_environ(port, uri, upstream, WORKERS=1)
            command = stage.gatehouse_command()
            if name == "bare":
                command = [sys.executable, str(BENCH / "peers/bare/main.py")]
            begun = time.perf_counter()
            server = stage_.start(name, command, environ, port)
            status, _, _ = verify.exchange(port, "GET", "/health/live")
            seconds = time.perf_counter() - begun
            verify.expect("the first answer", status, 200)
            first = meter.memory_bytes(server.pid)
            load.requests(server, targets.small, plan.warm_up)
            measured.append(Start(seconds, first, meter.memory_bytes(server.pid)))
            stage_.stop(server)
    return {
        name: Start(
            statistics.median(one.seconds for one in measured),
            statistics.median(one.memory_first for one in measured),
            statistics.median(one.memory_loaded for one in measured),
        )
        for name, measured in found.items()
    }


def set_up(
    stage_: Stage,
    peers: Sequence[Contender],
    uri: str,
    upstream: Server,
    targets: Targets,
    peer_logs: bool,
) -> dict[str, tuple[Server, bool]]:
    """Start Gatehouse and its peers and see that each answers as it should."""
    url = f"http://127.0.0.1:{upstream.port}"
    servers = {"Gatehouse": (stage.gatehouse(stage_, uri, url), True)}
    for peer in peers:
        servers[peer.name] = (peer.start(stage_, uri, url, peer_logs), peer.users)
    for server, users in servers.values():
        try:
            if users:
                verify.check_users(server.port, targets.known)
            verify.check_proxy(server.port, upstream.port)
        except (AssertionError, OSError) as problem:
            raise RuntimeError(f"{server.name}: {problem}\n{server.tail()}") from problem
    return servers
