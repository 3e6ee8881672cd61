"""A soak: one service for hours, with traffic of every kind, and faults in random order.

Two workers, writers that remember every answer, readers, imports and exports, forwarded requests
small, large, up, streamed and as WebSockets, clients that leave, bad requests, scrapes. Meanwhile
the database, the application and a worker are killed, frozen and slowed, and beside it a service
with a socket that is handed over goes from one instance to the next.

Exits with 1 where an acknowledged write is lost, an answer is wrong, a counter is not what clients
have counted, or memory, descriptors, threads or the time of a request have grown: the last quarter
of the time is compared with the second.

    python bench/soak.py --minutes 240
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from mishaps import of_a_database

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.harness import (
    RawClient,
    Reply,
    ScriptedUpstream,
    Seen,
    Service,
    chunked,
    free_port,
    message,
    ok,
    request,
    wait_for,
)
from tests.harness.audit import Audit
from tests.harness.handover import Listener, Told
from tests.harness.servers import Relay, Server

MIB = 1 << 20
LARGE_BYTES = 4 * MIB
UPLOAD_BYTES = 1 * MIB
EVENTS = 20
IMPORTED = 200
# How much more the last quarter may have than the second: of its value, and beyond that.
TOLERANCES = {
    "memory, MiB": (0.10, 8.0),
    "descriptors": (0.10, 16.0),
    "threads": (0.10, 8.0),
    "a forwarded request, ms": (1.00, 5.0),
}
# Not fork: this process has threads by then.
spawn = multiprocessing.get_context("spawn")


# The application.


def application(port: int, delay: Any) -> None:
    """What is behind Gatehouse, in a process of its own, which may be killed. It waits for `delay`
    seconds before each answer."""

    begun = threading.Event()

    def answer(sock: Any, seen: Seen) -> bool | None:
        begun.wait()
        upstream.seen.clear()
        time.sleep(delay.value)
        if seen.target == b"/large":
            sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: %d" % LARGE_BYTES))
            sock.sendall(bytes(LARGE_BYTES))
        elif seen.target == b"/up":
            said = b"%d" % len(seen.body)
            sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(said), body=said))
        elif seen.target == b"/events":
            kind = b"Content-Type: text/event-stream"
            sock.sendall(message(b"HTTP/1.1 200 OK", kind, b"Transfer-Encoding: chunked"))
            for number in range(EVENTS):
                sock.sendall(chunked(b"data: %d\n\n" % number)[:-5])
                time.sleep(0.05)
            sock.sendall(b"0\r\n\r\n")
        elif seen.target == b"/socket":
            agrees = (b"Connection: upgrade", b"Upgrade: websocket")
            sock.sendall(message(b"HTTP/1.1 101 Switching Protocols", *agrees))
            while data := sock.recv(65536):
                sock.sendall(data)
            return False
        else:
            ok(sock, seen)
        return None

    # From its first request on it answers in this way: callers wait for it while it starts.
    upstream = ScriptedUpstream(answer, port=port)
    begun.set()
    threading.Event().wait()


class Application:
    """That process."""

    def __init__(self) -> None:
        # It keeps the port while the process is killed: another program would take it.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._place.bind(("127.0.0.1", free_port()))
        self.port = self._place.getsockname()[1]
        self.delay = spawn.Value("d", 0.0)
        self._start()

    def _start(self) -> None:
        self._process = spawn.Process(target=application, args=(self.port, self.delay), daemon=True)
        self._process.start()
        wait_for(self._answers, 30, "the application to answer")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, EOFError), RawClient(self.port, timeout=5) as client:
            client.send(request())
            return client.reply().status == 200
        return False

    def mishaps(self, rng: random.Random) -> dict[str, Callable[[], None]]:
        """What may happen to it, by name; each is over when it returns."""

        def kill_application() -> None:
            self._process.kill()
            self._process.join()
            time.sleep(rng.uniform(0, 1))
            self._start()

        def freeze_application() -> None:
            process = psutil.Process(self._process.pid)
            process.suspend()
            time.sleep(rng.uniform(0.5, 3))
            process.resume()

        def slow_application() -> None:
            self.delay.value = rng.uniform(0.1, 0.5)
            time.sleep(rng.uniform(1, 5))
            self.delay.value = 0.0

        every = (kill_application, freeze_application, slow_application)
        return {each.__name__: each for each in every}

    def close(self) -> None:
        self._process.kill()
        self._process.join()


# Clients.


class Wrong(Exception):
    """An answer that can never be right here."""


@dataclass
class Tally:
    """What clients have counted: requests `answered` by owner, and those of which nobody can say,
    for the client left, or its connection was cut."""

    answered: Counter[str] = field(default_factory=Counter)
    unsure: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    milliseconds: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=5000))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, owner: str, *, sure: bool) -> None:
        with self.lock:
            (self.answered if sure else self.unsure)[owner] += 1

    def note(self, kind: str, wrong: str = "") -> None:
        with self.lock:
            self.kinds[kind] += 1
            if wrong:
                self.wrong.append(f"{kind}: {wrong}")


class Callers:
    """Threads of which each asks for one kind of thing again and again."""

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.tally = Tally()
        self._stopping = threading.Event()
        kinds: list[tuple[Callable[[random.Random], None], float]] = [
            (self.forwarded, 0.01),
            (self.large, 0.2),
            (self.upload, 0.1),
            (self.events, 0.1),
            (self.tunnel, 0.1),
            (self.leave, 0.1),
            (self.bad, 0.05),
            (self.read, 0.02),
            (self.import_many, 1.0),
            (self.export_many, 1.0),
            (self.health, 1.0),
        ]
        self._threads = [
            threading.Thread(target=self._go_on, args=(each, pause, random.Random(seed + number)))
            for number, (each, pause) in enumerate(kinds)
        ]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let each finish what it has begun."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a caller still waits for an answer"

    def _go_on(
        self, call: Callable[[random.Random], None], pause: float, rng: random.Random
    ) -> None:
        while not self._stopping.wait(rng.uniform(0, 2 * pause)):
            wrong = ""
            try:
                call(rng)
            except (ConnectionError, EOFError):
                pass  # A worker was killed, or an answer was cut: it is counted as unsure.
            except Exception as error:
                wrong = repr(error)
            self.tally.note(call.__name__, wrong)

    def ask(self, client: RawClient, owner: str, data: bytes, *allowed: int) -> Reply:
        """Send a request and count its answer. Raises Wrong where its status is none of `allowed`,
        nor one that a fault accounts for."""
        sure = False
        try:
            client.send(data)
            reply = client.reply(data.partition(b" ")[0].decode())
            sure = True
        finally:
            self.tally.count(owner, sure=sure)
        faults = (502, 503, 504) if owner == "proxy" else (503,)
        if reply.status not in (*allowed, *faults):
            raise Wrong(repr(reply))
        if not reply.complete:
            raise ConnectionError("the answer was cut")
        return reply

    def forwarded(self, rng: random.Random) -> None:
        with RawClient(self.port, timeout=60) as client:
            for _ in range(20):
                began = time.monotonic()
                reply = self.ask(client, "proxy", request(b"GET /small HTTP/1.1"), 200)
                self.tally.milliseconds.append((began, (time.monotonic() - began) * 1000))
                if reply.status == 200 and reply.body != b"ok":
                    raise Wrong(repr(reply))
                time.sleep(rng.uniform(0, 0.02))

    def large(self, rng: random.Random) -> None:
        with RawClient(self.port, timeout=60) as client:
            reply = self.ask(client, "proxy", request(b"GET /large HTTP/1.1"), 200)
            if reply.status == 200 and reply.body != bytes(LARGE_BYTES):
                raise Wrong(f"{len(reply.body)} bytes")

    def upload(self, rng: random.Random) -> None:
        body = bytes(rng.randrange(UPLOAD_BYTES))
        framing, data = b"Content-Length: %d" % len(body), body
        if rng.random() < 0.5:
            framing, data = b"Transfer-Encoding: chunked", chunked(*([body] if body else []))
        head = request(b"PUT /up HTTP/1.1", framing)
        with RawClient(self.port, timeout=60) as client:
            reply = self.ask(client, "proxy", head + data, 200)
            if reply.status == 200 and reply.body != b"%d" % len(body):
                raise Wrong(repr(reply))

    def events(self, rng: random.Random) -> None:
        with RawClient(self.port, timeout=60) as client:
            reply = self.ask(client, "proxy", request(b"GET /events HTTP/1.1"), 200)
            if reply.status == 200 and reply.body.count(b"\n\n") != EVENTS:
                raise Wrong(repr(reply))

    def tunnel(self, rng: random.Random) -> None:
        asks = (b"Connection: upgrade", b"Upgrade: websocket")
        with RawClient(self.port, timeout=60) as client:
            sure = False
            try:
                client.send(request(b"GET /socket HTTP/1.1", *asks))
                status = int(client.head().split(b" ")[1])
                sure = True
            finally:
                self.tally.count("proxy", sure=sure)
            if status != 101:
                if status not in (502, 503, 504):
                    raise Wrong(str(status))
                return
            for _ in range(20):
                frame = b"\x82\xfd" + bytes(4) + rng.randbytes(125)
                client.send(frame)
                while len(client.buffer) < len(frame):
                    data = client.sock.recv(65536)
                    if not data:
                        return
                    client.buffer += data
                if client.buffer != frame:
                    raise Wrong(repr(client.buffer))
                client.buffer = b""

    def leave(self, rng: random.Random) -> None:
        """Go in the middle of something: of a head, a body, an answer, a stream."""
        what = rng.choice(
            [
                b"GET /large HT",
                request(b"GET /large HTTP/1.1"),
                request(b"GET /events HTTP/1.1"),
                request(b"PUT /up HTTP/1.1", b"Content-Length: 1000000", body=bytes(90000)),
                request(b"GET /users HTTP/1.1", b"Accept: text/csv"),
                request(b"POST /users HTTP/1.1", b"Content-Type: text/csv", b"Content-Length: 99")
                + b"email,name\n",
            ]
        )
        owner = "users" if b"/users" in what else "proxy"
        self.tally.count(owner, sure=False)
        with RawClient(self.port, timeout=5) as client:
            client.send(what)
            with contextlib.suppress(TimeoutError):
                client.sock.settimeout(rng.uniform(0.01, 0.3))
                client.sock.recv(rng.randrange(1, 20000))

    def bad(self, rng: random.Random) -> None:
        owner, data, status = rng.choice(
            [
                ("proxy", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
                ("proxy", b"nonsense\r\n\r\n", 400),
                ("proxy", request(b"CONNECT a:1 HTTP/1.1"), 405),
                ("users", request(b"PATCH /users HTTP/1.1"), 405),
                ("users", request(b"GET /users?nonsense=1 HTTP/1.1"), 422),
                ("users", request(b"GET /users/nobody HTTP/1.1"), 404),
                ("users", request(b"POST /users HTTP/1.1", b"Content-Length: 2", body=b"{}"), 415),
                ("health", request(b"GET /health/nothing HTTP/1.1"), 404),
            ]
        )
        with RawClient(self.port, timeout=30) as client:
            self.ask(client, owner, data, status)

    def read(self, rng: random.Random) -> None:
        target = rng.choice(["?limit=20", "?limit=5&count=true", "?q=first", "?email=a@b.example"])
        with RawClient(self.port, timeout=30) as client:
            reply = self.ask(client, "users", request(f"GET /users{target} HTTP/1.1".encode()), 200)
            if reply.status == 200:
                for user in reply.json()["users"][:3]:
                    line = f"GET /users/{user['id']} HTTP/1.1".encode()
                    self.ask(client, "users", request(line), 200, 404)

    def import_many(self, rng: random.Random) -> None:
        """The same users again and again, under other names."""
        rows = [
            {"id": str(uuid.UUID(int=n + 1)), "email": f"imported-{n}@example.com", "name": name}
            for name in (f"Imported {rng.randrange(10)}",)
            for n in range(IMPORTED)
        ]
        body = "".join(json.dumps(row) + "\n" for row in rows).encode()
        lines = (b"Content-Type: application/x-ndjson", b"Content-Length: %d" % len(body))
        with RawClient(self.port, timeout=60) as client:
            reply = self.ask(
                client, "users", request(b"POST /users HTTP/1.1", *lines, body=body), 200
            )
            if reply.status == 200:
                counts = json.loads(reply.body.splitlines()[-1])
                if counts["rows"] != IMPORTED:
                    raise Wrong(repr(counts))

    def export_many(self, rng: random.Random) -> None:
        kind = rng.choice([b"text/csv", b"application/x-ndjson"])
        with RawClient(self.port, timeout=60) as client:
            self.ask(
                client,
                "users",
                request(b"GET /users?q=imported HTTP/1.1", b"Accept: " + kind),
                200,
            )

    def health(self, rng: random.Random) -> None:
        with RawClient(self.port, timeout=30) as client:
            for target in ("/health", "/health/live", "/health/ready", "/health/metrics"):
                self.ask(client, "health", request(f"GET {target} HTTP/1.1".encode()), 200)


# A service with a socket that is handed over.


class Generations:
    """Instances of a service, one after the other on one socket, and a client that must not notice:
    each of its requests, on a connection of its own, is answered with 200."""

    def __init__(self, upstream: str, folder: Path) -> None:
        self._upstream = upstream
        self._listener = Listener()
        self._told = Told(folder)
        self._running: Any = None
        self.wrong: list[str] = []
        self.asked = self.count = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def next(self) -> None:
        """Start the next instance, and when that is ready stop the last one by SIGHUP."""
        last = self._running
        self._running = self._listener.hand_over(
            UPSTREAM_URL=self._upstream,
            WORKERS=2,
            NOTIFY_SOCKET=self._told.path,
            SHUTDOWN_TIMEOUT=10,
        )
        self.count += 1
        while self._told.next(60) != "READY=1":
            pass
        if last is not None:
            last.send_signal(signal.SIGHUP)
            output, _ = last.communicate(timeout=30)
            if last.returncode != 0:
                self.wrong.append(f"exit {last.returncode}: {output[-500:]!r}")

    def _ask(self) -> None:
        while not self._stopping.wait(0.02):
            self.asked += 1
            try:
                with RawClient(self._listener.port, timeout=30) as client:
                    client.send(request(b"GET /health/live HTTP/1.1"))
                    reply = client.reply()
                if reply.status != 200:
                    self.wrong.append(repr(reply))
            except (OSError, EOFError) as error:
                self.wrong.append(repr(error))

    def __enter__(self) -> Generations:
        self.next()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(60)
        self._running.send_signal(signal.SIGTERM)
        self._running.communicate(timeout=30)


# What is measured.


@dataclass
class Series:
    """Samples of the worker that nobody kills, each with its time."""

    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def take(self, process: psutil.Process, tally: Tally, since: float) -> None:
        recent = [taken for began, taken in list(tally.milliseconds) if began >= since]
        with process.oneshot():
            sample = {
                "memory, MiB": process.memory_full_info().uss / MIB,
                "descriptors": float(process.num_fds()),
                "threads": float(process.num_threads()),
            }
        if recent:
            sample["a forwarded request, ms"] = statistics.median(recent)
        self.samples.append((time.monotonic(), sample))

    def quarter(self, number: int, name: str) -> float:
        """The lower quartile in a quarter of the time, of which the first is number 0: what it is
        between the faults, and between the moments in which the machine does something else."""
        began, ended = self.samples[0][0], self.samples[-1][0]
        length = (ended - began) / 4
        low, high = began + number * length, began + (number + 1) * length
        return statistics.quantiles(
            [
                sample[name]
                for when, sample in self.samples
                if low <= when <= high and name in sample
            ],
            n=4,
        )[0]

    def grown(self) -> Iterator[tuple[str, float, float, bool]]:
        """Of each number its value in the second and in the last quarter, and whether it grew."""
        for name, (share, beyond) in TOLERANCES.items():
            second, last = self.quarter(1, name), self.quarter(3, name)
            yield name, second, last, last > second * (1 + share) + beyond


def workers(service: Service) -> list[psutil.Process]:
    """The oldest first."""
    return sorted(service.processes[1:], key=lambda process: process.create_time())


def counted(port: int) -> tuple[Counter[str], dict[str, float]]:
    """Requests by owner as the metrics have them, and all other numbers."""
    with RawClient(port) as client:
        client.send(request(b"GET /health/metrics HTTP/1.1"))
        text = client.reply().body.decode()
    owners: Counter[str] = Counter()
    others: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("gatehouse_requests_total{"):
            owners[name.partition('owner="')[2].partition('"')[0]] += int(value)
        elif not line.startswith("#"):
            others[name] = float(value)
    return owners, others


def compared(metrics: Counter[str], tally: Tally, audit: Audit, scrapes: int) -> Iterator[str]:
    """What of the service's counters is not what clients have counted."""
    tally.answered["health"] += scrapes
    tally.answered["users"] += audit.acknowledged + audit.refused + audit.unknown
    tally.unsure["users"] += audit.cut
    for owner in ("users", "health", "proxy"):
        least = tally.answered[owner]
        most = least + tally.unsure[owner]
        print(f"  {owner}: {metrics[owner]} counted, {least} answered, {most - least} cut or left")
        if not least <= metrics[owner] <= most:
            yield f"{owner}: {metrics[owner]} counted, {least} to {most} asked for"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=240)
    parser.add_argument("--seed", type=int, default=19)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    happened: Counter[str] = Counter()
    series = Series()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(max_connections=60))
        relay = stack.enter_context(Relay(server.port))
        behind = Application()
        stack.callback(behind.close)
        url = f"http://127.0.0.1:{behind.port}"
        uri = server.uri(server.create(), port=relay.port)
        service = stack.enter_context(
            Service(POSTGRES_URI=uri, UPSTREAM_URL=url, WORKERS=2, ACCESS_LOG="off")
        )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gatehouse-soak-")))
        generations = stack.enter_context(Generations(url, folder))
        callers = stack.enter_context(Callers(service.port, given.seed))
        audit = stack.enter_context(Audit(service.port, writers=3, may_be_cut=True))
        survivor = workers(service)[0]

        def kill_worker() -> None:
            others = [worker for worker in workers(service) if worker != survivor]
            if others:  # else the next one is just being started
                others[-1].kill()
                wait_for(lambda: len(workers(service)) == 2, 30, "the worker to be replaced")

        possible = {
            **of_a_database(server, relay, rng),
            **behind.mishaps(rng),
            "kill_worker": kill_worker,
            "hand_over": generations.next,
        }
        sampling = threading.Event()

        def sample() -> None:
            since = time.monotonic()
            while not sampling.wait(max(1.0, given.minutes * 60 / 480)):
                series.take(survivor, callers.tally, since)
                since = time.monotonic()

        sampler = threading.Thread(target=sample)
        sampler.start()
        stack.callback(sampler.join)
        stack.callback(sampling.set)
        ends = time.monotonic() + given.minutes * 60
        while time.monotonic() < ends:
            time.sleep(min(rng.uniform(1, 6), max(0.0, ends - time.monotonic())))
            name = rng.choice(list(possible))
            happened[name] += 1
            possible[name]()
        sampling.set()
        sampler.join()
        goal = audit.acknowledged + 100
        wait_for(lambda: audit.acknowledged >= goal, 60, "writes after the last fault")
        audit.stop()
        callers.stop()
        problems = [*audit.wrong, *callers.tally.wrong, *generations.wrong]
        scrapes = 0

        def calm() -> bool:
            nonlocal scrapes
            scrapes += 1
            _, others = counted(service.port)
            gauges = ("gatehouse_requests_in_flight", "gatehouse_streams")
            return all(others[name] == 0 for name in gauges)

        wait_for(calm, 30, "everything under way to be over")
        metrics, others = counted(service.port)
        print(f"After {given.minutes:g} minutes, seed {given.seed}:")
        problems += compared(metrics, callers.tally, audit, scrapes)
        replaced = int(others["gatehouse_workers_replaced_total"])
        if replaced > happened["kill_worker"]:
            problems.append(f"{replaced} workers were replaced: {happened['kill_worker']} killed")
        findings = audit.findings()
        problems += [*findings["lost"], *findings["present"]]
        if "Traceback" in service.log:
            problems.append(f"a traceback: {service.log[service.log.index('Traceback') :][:2000]}")
        asked = sum(callers.tally.kinds.values())
        print(
            f"  {sum(happened.values())} faults:"
            f" {', '.join(f'{count} {name}' for name, count in sorted(happened.items()))}\n"
            f"  {asked} rounds: {dict(callers.tally.kinds)}\n"
            f"  {audit.acknowledged} writes acknowledged, {audit.refused} refused,"
            f" {audit.unknown} unknown, {audit.cut} cut; lost: {len(findings['lost'])}, refused ones"
            f" present: {len(findings['present'])}\n"
            f"  {generations.count} instances on one socket, {generations.asked} requests"
        )
    for name, second, last, grew in series.grown():
        print(f"  {name}: {second:.1f} in the second quarter, {last:.1f} in the last")
        if grew:
            problems.append(f"{name} grew from {second:.1f} to {last:.1f}")
    for line in problems[:20]:
        print(f"    {line}")
    print("nothing was found" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    os.nice(5)
    sys.exit(main())
