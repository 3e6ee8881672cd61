"""/health/metrics: totals of the whole service, exact over its workers and through their deaths."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from metrics import LINES_DROPPED, TYPES, Board
from tests.harness import (
    ROOT,
    ScriptedUpstream,
    Seen,
    Service,
    create_user,
    message,
    ok,
    problem,
    request,
    wait_for,
)

Start = Callable[..., Service]
SAMPLE = re.compile(r"([a-z_]+(?:\{[^}]*\})?) (\S+)")
CLIENTS = 8


def scrape(service: Service) -> dict[str, float]:
    """Every sample of /health/metrics by its name and labels, as they are written."""
    reply = service.call("GET", "/health/metrics")
    assert reply.status == 200
    assert reply.get("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    found: dict[str, float] = {}
    for line in reply.body.decode().splitlines():
        if not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match and match[1] not in found, line
            found[match[1]] = float(match[2])
    return found


def answered(owner: str, method: str, status: str) -> str:
    return f'gatehouse_requests_total{{owner="{owner}",method="{method}",status="{status}"}}'


def counters(samples: dict[str, float]) -> dict[str, float]:
    """Those that may only grow."""
    return {
        name: n for name, n in samples.items() if re.search(r"(_total|_bucket|_count|_sum)\b", name)
    }


class Held:
    """An upstream's answer that waits for `go_on` where /held is asked for."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.go_on = threading.Event()

    def __call__(self, sock: socket.socket, seen: Seen) -> None:
        if seen.target == b"/held":
            self.arrived.release()
            assert self.go_on.wait(60)
        ok(sock, seen)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_wrong(service: Service, upstream: ScriptedUpstream) -> None:
    upstream.script(ok)
    service.exchange(request(b"GET / HTTP/1.1"))
    create_user(service)
    text = service.call("GET", "/health/metrics").body
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_ten_thousand_requests_are_counted_to_the_last_through_the_deaths_of_workers(
    start: Start, upstream: ScriptedUpstream
) -> None:
    """A request is under way in each worker when one of them is killed: those that die unanswered
    are the ones that are not counted."""
    held = Held()
    upstream.script(held)
    service = start(UPSTREAM_URL=upstream.url, WORKERS=2)
    supervisor = psutil.Process(service.process.pid)

    def ask(number: int) -> int:
        with service.client() as client:
            for _ in range(number):
                client.send(request(b"GET /a HTTP/1.1"))
                assert client.reply().status == 200
        return number

    wait_for(lambda: len(supervisor.children()) == 2, what="the workers")
    expected, before = 0, scrape(service)
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(10):
            expected += sum(pool.map(ask, [125] * CLIENTS))
            waiting = [service.client() for _ in range(4)]
            for client in waiting:
                client.send(request(b"GET /held HTTP/1.1"))
                assert held.arrived.acquire(timeout=10)
            workers = supervisor.children()
            os.kill(workers[0].pid, signal.SIGKILL)
            wait_for(lambda: workers[0] not in supervisor.children(), what="its end")  # noqa: B023
            wait_for(lambda: len(supervisor.children()) == 2, what="another in its place")
            held.go_on.set()
            for client in waiting:
                try:
                    assert client.reply().status == 200
                    expected += 1
                except (EOFError, OSError):
                    pass  # Its worker has died.
                client.close()
            held.go_on.clear()
            now = scrape(service)
            assert {name for name, n in counters(before).items() if now[name] < n} == set()
            assert now[answered("proxy", "GET", "2xx")] == expected
            before = now
    assert expected >= 10_000
    assert before['gatehouse_answer_head_seconds_count{owner="proxy"}'] == expected
    assert before['gatehouse_answer_head_seconds_bucket{owner="proxy",le="+Inf"}'] == expected
    assert before["gatehouse_workers_replaced_total"] == 10
    assert before["gatehouse_requests_in_flight"] == 0
    wait_for(lambda: scrape(service)["gatehouse_workers"] == 2, what="both workers to serve")


def test_requests_are_counted_by_owner_method_and_class(
    start: Start, database: str, upstream: ScriptedUpstream
) -> None:
    service = start(POSTGRES_URI=database, UPSTREAM_URL=upstream.url, WORKERS=1)
    upstream.script(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n")
    service.call("GET", "/a")
    upstream.script(ok)
    for method in ("PROPFIND", "get", "HEAD", "PUT"):
        with service.client() as client:
            client.send(
                message(f"{method} /s3cret?s3cret=1 HTTP/1.1".encode(), b"Host: s3cret.example")
            )
            client.head()
    create_user(service, "s3cret@example.com")
    service.call("GET", "/users/nobody")
    service.call("DELETE", "/health/live")
    counts = {name: n for name, n in scrape(service).items() if n and "_requests_total" in name}
    assert counts == {
        answered("proxy", "GET", "3xx"): 1,
        answered("proxy", "other", "2xx"): 2,
        answered("proxy", "HEAD", "2xx"): 1,
        answered("proxy", "PUT", "2xx"): 1,
        answered("users", "POST", "2xx"): 1,
        answered("users", "GET", "4xx"): 1,
        answered("health", "DELETE", "4xx"): 1,
    }
    assert "s3cret" not in service.call("GET", "/health/metrics").body.decode()


def test_what_is_no_request_is_counted_without_a_word_of_its_own(service: Service) -> None:
    before = scrape(service).get(answered("proxy", "other", "4xx"), 0)
    problem(service.exchange(b"s3cret\x00 / HTTP/1.1\r\n\r\n"), 400, "bad-request")
    after = scrape(service)
    assert after[answered("proxy", "other", "4xx")] == before + 1
    assert not [name for name in after if "s3cret" in name]


def test_problems_are_counted_by_type(start: Start) -> None:
    service = start()
    problem(service.call("GET", "/a"), 502, "upstream-unreachable")
    problem(service.call("GET", "/users"), 503, "database-unavailable")
    problem(service.call("GET", "/health/none"), 404, "not-found")
    problem(service.exchange(b"x\r\n\r\n"), 400, "bad-request")
    samples = scrape(service)
    counts = {kind: samples[f'gatehouse_problems_total{{type="{kind}"}}'] for kind in TYPES}
    assert {kind: n for kind, n in counts.items() if n} == {
        "upstream-unreachable": 1,
        "database-unavailable": 1,
        "not-found": 1,
        "bad-request": 1,
    }
    assert samples["gatehouse_upstream_up"] == 0


def test_the_time_to_the_head_is_in_its_bucket(start: Start, upstream: ScriptedUpstream) -> None:
    service = start(UPSTREAM_URL=upstream.url, WORKERS=1)
    held = Held()
    upstream.script(held)
    with service.client() as client:
        began = time.monotonic()
        client.send(request(b"GET /held HTTP/1.1"))
        assert held.arrived.acquire(timeout=10)
        threading.Timer(0.3, held.go_on.set).start()
        assert client.reply().status == 200
        took = time.monotonic() - began
    samples = scrape(service)

    def bucket(bound: float | str) -> float:
        return samples[f'gatehouse_answer_head_seconds_bucket{{owner="proxy",le="{bound}"}}']

    assert (bucket(0.1), bucket(0.25), bucket(300), bucket("+Inf")) == (0, 0, 1, 1)
    assert 0.25 < samples['gatehouse_answer_head_seconds_sum{owner="proxy"}'] <= took


def test_what_is_under_way_is_shown_and_over_when_it_ends(
    start: Start, upstream: ScriptedUpstream
) -> None:
    service = start(UPSTREAM_URL=upstream.url, WORKERS=1)
    held = Held()
    upstream.script(held)
    assert "gatehouse_upstream_up" not in scrape(service)
    clients = [service.client() for _ in range(3)]
    for client in clients:
        client.send(request(b"GET /held HTTP/1.1"))
        assert held.arrived.acquire(timeout=10)
    samples = scrape(service)
    assert samples["gatehouse_requests_in_flight"] == 3
    assert samples["gatehouse_client_connections"] == 4  # and that of the scrape
    held.go_on.set()
    for client in clients:
        assert client.reply().status == 200
        client.close()
    samples = scrape(service)
    assert samples["gatehouse_requests_in_flight"] == 0
    assert samples["gatehouse_upstream_up"] == 1
    wait_for(lambda: scrape(service)["gatehouse_client_connections"] == 1, what="one client")


def test_the_database_is_asked_by_the_scrape(start: Start, database: str) -> None:
    up = scrape(start(POSTGRES_URI=database, DB_POOL_SIZE=3, WORKERS=2))
    assert up["gatehouse_database_up"] == 1
    assert up["gatehouse_database_pool_idle"] == 1
    assert up["gatehouse_database_pool_in_use"] == 0
    assert up["gatehouse_database_pool_size"] == 6
    down = scrape(start())
    assert down["gatehouse_database_up"] == 0
    assert down["gatehouse_database_pool_idle"] == 0


def test_a_metric_has_no_label_but_those_that_are_documented(service: Service) -> None:
    labels = {label for name in scrape(service) for label in re.findall(r'([a-z]+)="', name)}
    assert labels <= {"owner", "method", "status", "type", "le", "version"}


def test_every_metric_is_documented_and_every_documented_one_exists(service: Service) -> None:
    service.call("GET", "/a")  # which makes the last one, about the upstream
    text = service.call("GET", "/health/metrics").body.decode()
    kinds = dict(re.findall(r"(?m)^# TYPE (\S+) (\S+)$", text))
    told = re.findall(
        r"(?m)^\| `(gatehouse_[a-z_]+)(?:\{[a-z,]+\})?` \| ([a-z]+) \|",
        (ROOT / "docs" / "operating.md").read_text(),
    )
    assert dict(told) == kinds


def test_counts_of_several_threads_are_none_lost() -> None:
    board = Board(1)
    board.join(0)
    go = threading.Barrier(8)

    def count() -> None:
        go.wait()
        for _ in range(20_000):
            board.add(LINES_DROPPED)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert board.total(LINES_DROPPED) == 160_000


def test_a_scrape_of_many_workers_holds_nobody_up() -> None:
    """It is made on a thread beside the loop's, which would wait for the interpreter's lock."""
    board = Board(16)
    for worker in range(16):
        board.join(worker)
        for owner in ("users", "health", "proxy"):
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "X"):
                board.request(owner, method, 200, 0.01)

    def seconds() -> float:
        began = time.thread_time()
        board.exposition(version="1", database_up=True, pool_size=8)
        return time.thread_time() - began

    assert min(seconds() for _ in range(20)) < 0.005


def test_the_longest_turn_is_shown_until_the_next_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is for the rest of its minute, and in the one after that."""
    board = Board(2)
    board.join(1)
    for minute, turns, longest in (
        (7, (0.25, 0.001), "0.25"),
        (8, (0.001,), "0.25"),
        (9, (0.001,), "0.001"),
        (11, (0.002,), "0.002"),
    ):
        monkeypatch.setattr(time, "monotonic_ns", lambda minute=minute: minute * 60 * 10**9)
        for seconds in turns:
            board.turned(seconds)
        text = board.exposition(version="1", database_up=True, pool_size=8)
        assert f"\ngatehouse_loop_longest_turn_seconds {longest}\n" in text
    assert "\ngatehouse_workers 1\n" in text
    board.left(1)
    text = board.exposition(version="1", database_up=True, pool_size=8)
    assert "\ngatehouse_loop_longest_turn_seconds 0.0\n" in text
