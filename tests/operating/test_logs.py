"""The logs: whoever reads them slowly, or not at all, delays nobody."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from server.logs import LONGEST_TARGET, Output, quoted
from tests.harness import (
    DEAD_DATABASE,
    RawClient,
    ScriptedUpstream,
    call,
    checkout,
    free_port,
    ok,
    wait_for,
)

Run = Callable[..., tuple[subprocess.Popen[bytes], int]]
# As docs/troubleshooting.md explains it.
LINES_DROPPED = rb"(\d+) lines? of the access log (?:was|were) dropped, for nobody took them"


@pytest.fixture
def run() -> Iterator[Run]:
    """Start Gatehouse with pipes for its standard output and error, which nobody reads from yet."""
    processes = []

    def run(
        output: int | IO[bytes] = subprocess.PIPE, **settings: str
    ) -> tuple[subprocess.Popen[bytes], int]:
        port = free_port()
        environ = {"POSTGRES_URI": DEAD_DATABASE, "PORT": str(port), "PATH": os.environ["PATH"]}
        process = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=checkout(),
            env=environ | settings,
            stdout=output,
            stderr=output,
        )
        processes.append(process)

        wait_for(lambda: answers(port) or process.poll(), 20, "the service to answer")
        assert process.poll() is None
        return process, port

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def answers(port: int) -> bool:
    try:
        return call(port, "GET", "/health/live").status == 200
    except OSError:
        return False


def ask(port: int, targets: list[str], status: int) -> None:
    """Ask for each target on one connection, and count on an answer."""
    with RawClient(port, timeout=10) as client:
        for target in targets:
            client.send(f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert client.reply().status == status


def read_line(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    return stream.readline()


workers = pytest.mark.parametrize("workers", ["1", "2"])


@workers
def test_lines_that_nobody_takes_yet_are_kept(
    run: Run, upstream: ScriptedUpstream, workers: str
) -> None:
    upstream.script(ok)
    process, port = run(UPSTREAM_URL=upstream.url, WORKERS=workers)
    targets = [f"/{number}/{'x' * 200}" for number in range(1000)]  # some five pipes full
    ask(port, targets, 200)
    told = []
    while len(told) < len(targets):
        target = json.loads(read_line(process.stdout))["target"]
        if target != "/health/live":
            told.append(target)
    assert told == targets


def test_lines_beyond_a_mebibyte_are_dropped_and_counted(
    run: Run, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    process, port = run(UPSTREAM_URL=upstream.url)
    targets = [f"/{number}/{'x' * 2900}" for number in range(600)]
    ask(port, targets, 200)
    process.terminate()
    out, err = process.communicate(timeout=20)
    told = [json.loads(line)["target"] for line in out.splitlines()]
    told = [target for target in told if target != "/health/live"]
    dropped = sum(int(number) for number in re.findall(LINES_DROPPED, err))
    assert b"nobody took them: the reader is too slow\n" in err
    assert dropped > 100 and told == targets[: len(targets) - dropped]


def dropped_lines(port: int) -> int:
    text = call(port, "GET", "/health/metrics").body.decode()
    return int(re.findall(r"(?m)^gatehouse_log_lines_dropped_total (\d+)$", text)[0])


def test_dropped_lines_are_in_the_metrics(run: Run, upstream: ScriptedUpstream) -> None:
    upstream.script(ok)
    _, port = run(UPSTREAM_URL=upstream.url)
    ask(port, [f"/{number}/{'x' * 2900}" for number in range(600)], 200)
    wait_for(lambda: dropped_lines(port) > 100, what="the metric to count them")


def test_lines_of_which_the_reader_has_gone_are_counted(
    run: Run, upstream: ScriptedUpstream
) -> None:
    """The metric said that nothing was lost."""
    upstream.script(ok)
    process, port = run(UPSTREAM_URL=upstream.url)
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    before = dropped_lines(port)
    ask(port, [f"/{number}" for number in range(100)], 200)
    wait_for(lambda: dropped_lines(port) >= before + 100, what="the metric to count them")
    # What is said of that is lost too, and is no loss of its own. Only each scrape writes a line.
    seen = [dropped_lines(port)]
    for _ in range(4):
        time.sleep(1.5)
        seen.append(dropped_lines(port))
    assert seen[-1] - seen[1] <= 4


def test_after_a_full_disk_the_log_tells_of_all_that_was_lost(
    run: Run, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """It told of the last second: what it said before could not be written either."""
    upstream.script(ok)
    path = tmp_path / "log"
    with path.open("ab") as file:
        process, port = run(file, UPSTREAM_URL=upstream.url)
    _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    # Python ignores the signal for a file that is too large.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (path.stat().st_size, most))
    for _ in range(3):
        ask(port, [f"/{number}" for number in range(10)], 200)
        time.sleep(1.2)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))
    wait_for(lambda: re.search(LINES_DROPPED, path.read_bytes()), what="the log to tell of it")
    assert b"nobody took them: File too large\n" in path.read_bytes()
    [dropped] = re.findall(LINES_DROPPED, path.read_bytes())
    assert 30 <= int(dropped) == dropped_lines(port)


def test_a_line_that_is_taken_in_pieces_is_whole_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's line got between."""
    with (tmp_path / "log").open("wb") as file:
        output = Output(file.fileno())
        write = os.write

        def three_bytes(descriptor: int, data: bytes) -> int:
            monkeypatch.undo()
            output.write("another\n")  # as another thread does, which cannot write now
            return write(descriptor, data[:3])

        monkeypatch.setattr("server.logs.os.write", three_bytes)
        output.write("one line\n")
    assert (tmp_path / "log").read_text() == "one line\nanother\n"


def test_a_line_that_a_full_disk_cuts_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        output = Output(file.fileno())
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # Python ignores SIGXFSZ.
        try:
            for number in range(3):
                output.write(f"{number} {'x' * 60}\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert output.dropped() == 2
        output.write("after\n")
    lines = path.read_text().splitlines()
    assert [line[:2] for line in lines] == ["0 ", "1 ", "af"] and lines[-1] == "after"


@pytest.mark.parametrize("character", ["x", '"', "\\", "\xe9"])
@pytest.mark.parametrize("length", [2000, 40_000])
def test_a_line_is_one_write_however_long_its_target(
    run: Run, upstream: ScriptedUpstream, character: str, length: int
) -> None:
    upstream.script(ok)
    process, port = run(UPSTREAM_URL=upstream.url)
    target = "/" + character * length
    with RawClient(port) as client:
        client.send(b"M" * 1000 + f" {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode("latin-1"))
        assert client.reply().status == 200
    line = read_line(process.stdout)
    while b"/health/live" in line:
        line = read_line(process.stdout)
    assert len(line) <= select.PIPE_BUF
    told = json.loads(line)
    assert told["method"] == "M" * 100
    whole = told["target"] == target
    assert whole or (told["target"][-1] == "…" and target.startswith(told["target"][:-1]))
    assert len(told["target"]) >= 500 and (whole or (length, character) != (2000, "x"))


def test_a_line_that_tells_of_a_cut_answer_is_no_longer(
    run: Run, upstream: ScriptedUpstream
) -> None:
    """It had the whole of a method of 60 KB, as often as somebody wished."""
    upstream.script(lambda sock, seen: sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n") or False)  # fmt: skip
    process, port = run(UPSTREAM_URL=upstream.url)
    with RawClient(port) as client:
        client.send(b"M" * 30000 + b" /" + b"x" * 30000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert not client.reply().complete
    process.terminate()
    _, err = process.communicate(timeout=20)
    [line] = [line for line in err.splitlines() if b" cut: " in line]
    assert len(line) < select.PIPE_BUF


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_only_a_target_that_was_cut_ends_like_one(more: int) -> None:
    target = "/" + "x" * (LONGEST_TARGET - 1 + more)
    whole = json.loads(quoted(target))
    assert whole == (target if more < 1 else target[:LONGEST_TARGET] + "…")


def test_a_query_is_in_no_line_but_those_of_the_access_log(
    run: Run, upstream: ScriptedUpstream
) -> None:
    """ACCESS_LOG=off is for whoever has secrets in targets."""
    upstream.script(lambda sock, seen: sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n") or False)  # fmt: skip
    process, port = run(UPSTREAM_URL=upstream.url, ACCESS_LOG="off")
    with RawClient(port) as client:
        client.send(b"GET /reset?token=s3cret HTTP/1.1\r\nHost: a\r\n\r\n")
        assert not client.reply().complete
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert b"s3cret" not in out + err
    assert b'GET "/reset?..." cut: ' in err


def test_a_password_in_a_target_is_not_logged(run: Run, upstream: ScriptedUpstream) -> None:
    upstream.script(ok)
    process, port = run(UPSTREAM_URL=upstream.url)
    ask(port, ["http://ann:s3cret@other.example/@x"], 200)
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert b"s3cret" not in out + err
    assert json.loads(out.splitlines()[-1])["target"] == "http://other.example/@x"


@workers
def test_an_error_log_that_nobody_reads_delays_nobody(run: Run, workers: str) -> None:
    process, port = run(UPSTREAM_URL="http://127.0.0.1:1", WORKERS=workers, ACCESS_LOG="off")
    ask(port, ["/"] * 1000, 502)
    assert process.poll() is None
    # And when somebody reads, all of it comes, without anything more to say.
    assert process.stderr is not None
    text = b""
    while text.count(b"upstream-unreachable: ") < 1000:
        assert select.select([process.stderr], [], [], 10)[0], text[-300:]
        text += os.read(process.stderr.fileno(), 65536)


def test_another_writer_that_is_quicker_makes_nobody_wait(run: Run) -> None:
    """The room that was there is gone when the line is written: one thread then waited for the
    reader, and all others that had something to say for that thread."""
    process, port = run(UPSTREAM_URL="http://127.0.0.1:1", ACCESS_LOG="off")
    assert process.stderr is not None
    other = os.open(f"/proc/{process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    stop = threading.Event()

    def fill() -> None:
        room = select.poll()
        room.register(other, select.POLLOUT)
        while not stop.is_set():
            if room.poll(50):
                with contextlib.suppress(BlockingIOError):
                    os.write(other, b"f" * select.PIPE_BUF)

    def read(reader: IO[bytes]) -> None:
        for _ in range(400):  # a little at a time, so that both go after each free page
            reader.read1(select.PIPE_BUF)  # type: ignore[attr-defined]
            stop.wait(0.002)

    def keep_asking(reading: Future[None]) -> None:
        while not reading.done():
            ask(port, ["/" + "a" * 300] * 20, 502)
        ask(port, ["/"] * 20, 502)

    with ThreadPoolExecutor(6) as threads:
        try:
            reading = threads.submit(read, process.stderr)
            threads.submit(fill)
            asking = [threads.submit(keep_asking, reading) for _ in range(4)]
            for one in asking:
                one.result()
        finally:
            stop.set()
            os.close(other)
    process.terminate()
    assert process.wait(20) == 0


@workers
def test_descriptors_that_were_closed_are_not_the_next_socket_s(
    upstream: ScriptedUpstream, workers: str
) -> None:
    """A connection to the upstream had the number of standard output, and got the access log."""
    upstream.script(ok)
    port = free_port()
    environ = {"POSTGRES_URI": DEAD_DATABASE, "PATH": os.environ["PATH"], "WORKERS": workers}
    process = subprocess.Popen(
        ["/bin/sh", "-c", 'exec "$0" app.py <&- >&- 2>&-', sys.executable],
        cwd=checkout(),
        env=environ | {"PORT": str(port), "UPSTREAM_URL": upstream.url},
    )
    try:
        wait_for(lambda: answers(port), 20, "the service to answer")
        for number in range(3):
            assert Path(f"/proc/{process.pid}/fd/{number}").readlink() == Path(os.devnull)
        ask(port, ["/a"] * 5, 200)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert len(upstream.seen) == 5


def test_an_output_that_was_closed_stops_nothing(run: Run, upstream: ScriptedUpstream) -> None:
    upstream.script(ok)
    process, port = run(UPSTREAM_URL=upstream.url)
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    ask(port, ["/"] * 20, 200)
    process.terminate()
    assert process.wait(20) == 0
