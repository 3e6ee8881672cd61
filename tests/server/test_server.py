"""A worker's loop with a client, an upstream and rules that fail: what fails is ended, on both sides,
and what does not goes on."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from metrics import CLIENTS, Board
from server.client import Client
from server.exchange import Exchange, Patience
from server.options import Options
from server.server import MOST_AHEAD, Server
from tests.harness import RawClient, ScriptedUpstream, Seen, chunked, message, ok, request, wait_for
from wire.request import Head


class Rules:
    """An application whose requests are proxied, or fail with what it `raises` on another `lane`.
    `broken` names the rule that fails, for targets that begin with /bad."""

    def __init__(self) -> None:
        self.board = Board(1)
        self.broken = ""
        self.lane = "proxy"
        self.raises: type[BaseException] = AssertionError

    @property
    def rules(self) -> Rules:
        return self

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        raise self.raises("as it never should")

    def _check(self, rule: str, head: Head) -> None:
        if rule == self.broken and head.target.startswith("/bad"):
            raise ValueError("as it never should")

    def admit(self, head: Head) -> tuple[str, int]:
        self._check("admit", head)
        return self.lane, 0

    def owner(self, head: Head) -> str:
        return "proxy"

    def caller(self, head: Head, peer: str) -> str:
        self._check("caller", head)
        return peer

    def request_head(self, head: Head, peer: str, length: int | None) -> bytes:
        self._check("request_head", head)
        lines = [f"{head.method} {head.origin} HTTP/1.1", "Host: a"]
        if length is not None or head.length is not None:
            lines.append(f"Content-Length: {head.length if length is None else length}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def answer_lines(self, answer: Any, head: Head) -> bytes:
        self._check("answer_lines", head)
        return b"".join(line.text for line in answer.lines if line.key != "transfer-encoding")

    def interim_lines(self, answer: Any) -> bytes:
        return b"".join(line.text for line in answer.lines)


class Running:
    """A worker in a thread of the test's own process."""

    def __init__(self, upstream: ScriptedUpstream, shutdown_timeout: float = 30.0) -> None:
        self.rules = Rules()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        options = Options(
            upstream_url=upstream.url,
            threads={"bulk": 1},
            patience=Patience(10.0, 10.0, 0.0, 0.0),
            eager={},
            streamed=frozenset(),
            waits={},
            ca_bundle=None,
            limit=0,
            connect_timeout=5.0,
            upstream_keepalive=50.0,
            keepalive=120.0,
            client_timeout=60.0,
            shutdown_timeout=shutdown_timeout,
            access_log=False,
        )
        self.server = Server(self.rules, self.listener, options)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def start(self) -> Running:
        self.thread.start()
        return self

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.thread.join(10)
        assert not self.thread.is_alive(), "the worker did not stop"

    def at_rest(self) -> bool:
        """Nothing is with the upstream, no client is here, and no connection but kept ones."""
        upstream = self.server.upstream
        return (
            upstream.in_flight == upstream.streams == 0
            and not self.server._clients
            and upstream.open == len(upstream._idle)
        )


@pytest.fixture
def upstream() -> Iterator[ScriptedUpstream]:
    server = ScriptedUpstream()
    yield server
    server.close()


@pytest.fixture
def running(upstream: ScriptedUpstream) -> Iterator[Running]:
    with Running(upstream).start() as running:
        # With an access log, which asks the rules for the caller.
        running.server.desk.logs = True
        running.server._log = Lines()  # type: ignore[assignment]
        yield running


class Lines:
    def write(self, line: str) -> None:
        pass


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("rule", ["admit", "request_head", "answer_lines", "caller"])
def test_a_failure_in_one_exchange_ends_it_on_both_sides_and_no_other(
    running: Running,
    upstream: ScriptedUpstream,
    caplog: pytest.LogCaptureFixture,
    rule: str,
    fresh: bool,
) -> None:
    running.rules.broken = rule
    with RawClient(running.port) as other:
        other.send(request(b"GET /good HTTP/1.1"))
        assert other.reply().body == b"ok"
        if fresh:
            running.server.upstream._keepalive = -1.0  # No connection is used twice.
        for _ in range(3):
            with RawClient(running.port, 5) as bad:
                bad.send(request(b"GET /bad HTTP/1.1", b"Connection: close"))
                got = b""
                try:
                    while data := bad.sock.recv(65536):
                        got += data
                except ConnectionResetError:
                    pass
                # Whatever of it had been sent before it failed.
                assert not got or (rule == "caller" and got.endswith(b"ok")), got
            other.send(request(b"GET /good HTTP/1.1"))
            assert other.reply().body == b"ok"
        assert "as it never should" in caplog.text
    wait_for(running.at_rest, 5, "all to be let go of")


@pytest.mark.parametrize("rule", ["admit", "request_head"])
def test_a_request_that_fails_behind_another_ends_its_client(
    running: Running, upstream: ScriptedUpstream, rule: str
) -> None:
    """It begins as the answer before it ends, in an event of a connection that is nobody's by then."""
    running.rules.broken = rule
    with RawClient(running.port, 5) as client:
        client.send(request(b"GET /good HTTP/1.1") + request(b"GET /bad HTTP/1.1"))
        with pytest.raises(ConnectionResetError):
            while client.sock.recv(65536):
                pass
    wait_for(running.at_rest, 5, "all to be let go of")


def test_a_failure_in_the_middle_of_an_answer_is_no_whole_answer(
    running: Running, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = threading.Event()

    def stream(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(message(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked"))
        sock.sendall(chunked(b"first")[:-5])
        failing.wait(5)
        sock.sendall(b"6\r\nsecond\r\n")
        while sock.recv(1):
            pass
        closed.set()
        return False

    failing = threading.Event()
    upstream.script(stream)
    with RawClient(running.port) as client:
        client.send(request(b"GET /bad HTTP/1.1"))
        client.head()
        assert client.buffer or client.sock.recv(10)

        def fail(self: Exchange, data: bytes) -> None:
            raise ValueError("as it never should")

        monkeypatch.setattr(Exchange, "_answer_on", fail)
        failing.set()
        with pytest.raises(ConnectionResetError):
            while client.sock.recv(65536):
                pass
        monkeypatch.undo()
    assert closed.wait(1), "the upstream's connection is still open"
    wait_for(running.at_rest, 5, "all to be let go of")
    upstream.script(ok)
    with RawClient(running.port) as client:
        client.send(request())
        assert client.reply().body == b"ok"


class Crowded:
    """A listening socket in a process that has no descriptor to spare."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.crowded = True
        self.attempts = 0

    def accept(self) -> Any:
        if self.crowded:
            self.attempts += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self.listener.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.listener, name)


def test_a_client_for_whom_there_is_no_descriptor_waits_and_the_loop_does_not_spin(
    upstream: ScriptedUpstream,
) -> None:
    running = Running(upstream)
    crowded = Crowded(running.listener)
    running.server._listener = crowded  # type: ignore[assignment]
    turns = 0
    turn = running.server.loop.turn

    def counted() -> None:
        nonlocal turns
        turns += 1
        turn()

    running.server.loop.turn = counted  # type: ignore[method-assign]
    with running.start(), RawClient(running.port) as client:
        client.send(request())
        wait_for(lambda: crowded.attempts, 5, "the first attempt")
        turns, crowded.attempts, began = 0, 0, time.monotonic()
        wait_for(lambda: crowded.attempts >= 10, 5, "ten more attempts")
        # One each 25 milliseconds, and hardly a turn for anything else.
        assert time.monotonic() - began > 0.2 and turns < 40
        crowded.crowded = False
        assert client.reply().body == b"ok"


class Full(Crowded):
    """The same, until one of `others` is closed."""

    others: tuple[socket.socket, ...] = ()

    def accept(self) -> Any:
        self.crowded = bool(self.others) and all(other.fileno() >= 0 for other in self.others)
        return super().accept()


def test_for_a_client_without_a_descriptor_one_connection_is_closed_and_no_more(
    upstream: ScriptedUpstream,
) -> None:
    """All that were idle were closed: the worker tried again before the first was really closed."""
    running = Running(upstream)
    listener = Full(running.listener)
    running.server._listener = listener  # type: ignore[assignment]
    with running.start(), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(running.port)) for _ in range(10)]
        for client in clients:
            client.send(request())
            assert client.reply().body == b"ok"
        listener.others = tuple(client.sock for client in running.server._clients)
        last = stack.enter_context(RawClient(running.port))
        last.send(request())
        assert last.reply().body == b"ok"
        # The connection to the upstream was closed first, which helps nobody in this test.
        assert listener.attempts == 2 and len(running.server._clients) == 10


def test_as_many_as_there_may_be_are_served_and_none_is_closed_before_another_comes(
    running: Running,
) -> None:
    """Room was made before it was known whether anybody waits."""
    with contextlib.ExitStack() as stack:
        running.server._room._most = 6  # five clients, and one connection to the upstream
        for number in range(5):
            client = stack.enter_context(RawClient(running.port))
            client.send(request())
            assert client.reply().body == b"ok"
            wait_for(lambda: len(running.server._clients) == number + 1)  # noqa: B023
        assert running.server.upstream.open == 1
        another = stack.enter_context(RawClient(running.port))
        another.send(request())
        assert another.reply().body == b"ok"
        wait_for(lambda: len(running.server._clients) == 5, what="one client fewer")


def test_a_client_that_cannot_be_watched_is_closed_at_once(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Client.watch

    def fail(client: Client) -> None:
        monkeypatch.setattr(Client, "watch", watch)
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(Client, "watch", fail)
    with RawClient(running.port) as client, RawClient(running.port) as another:
        assert client.sock.recv(1) == b""
        another.send(request())
        assert another.reply().body == b"ok"


def test_a_worker_accepts_again_after_the_kernel_had_no_memory_for_watching(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never accepted anybody again."""
    server = running.server
    watch, failed = server.loop.watch, threading.Event()

    def without_memory(descriptor: int, watched: Any, before: int, events: int) -> None:
        if watched is server and events and not failed.is_set():
            failed.set()
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        watch(descriptor, watched, before, events)

    for number in range(2):
        with RawClient(running.port, 5) as client:
            client.send(request())
            assert client.reply().body == b"ok"
        if not number:
            monkeypatch.setattr(server.loop, "watch", without_memory)
            server.loop.call(server._look_again, 0.0)
            assert failed.wait(5)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_call_that_fails_is_answered_whatever_it_raises(
    running: Running, error: type[BaseException]
) -> None:
    """One that called sys.exit was never answered, and its thread was lost."""
    running.rules.lane, running.rules.raises = "bulk", error
    for _ in range(3):
        with RawClient(running.port, 5) as client:
            client.send(request())
            assert client.reply().status == 500


def test_a_worker_that_stops_accepts_only_so_many_of_a_queue_that_does_not_end(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another process has the socket too, more may come without end."""
    let_in = 0

    def one_more() -> bool:
        nonlocal let_in
        let_in += 1
        return True

    monkeypatch.setattr(running.server, "_let_in", one_more)
    with RawClient(running.port):
        running.server.stop()
        running.thread.join(10)
    assert not running.thread.is_alive() and let_in < 1000


def test_a_worker_gives_way_only_if_another_has_far_fewer_clients(running: Running) -> None:
    """Two workers that were one client apart waited for each other in turn: of new connections they
    took a tenth of what one alone took."""
    running.server.alone = False
    assert running.rules.board.others(CLIENTS) == (0,)
    with contextlib.ExitStack() as stack:
        for count in range(1, MOST_AHEAD + 2):
            stack.enter_context(RawClient(running.port))
            wait_for(lambda count=count: len(running.server._clients) == count)
            assert running.server._in_vain == 0
        stack.enter_context(RawClient(running.port))
        # The other one never comes.
        wait_for(lambda: len(running.server._clients) == MOST_AHEAD + 2)
        assert running.server._in_vain > 0


def test_an_exception_of_every_kind_of_call_is_survived(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("as it never should")

    failing: list[Callable[[], None]] = [fail, lambda: running.server.loop.soon(fail)]
    for one in failing:
        running.server.loop.call(one)
    with RawClient(running.port) as client:
        client.send(request())
        assert client.reply().body == b"ok"
    assert caplog.text.count("as it never should") >= 2


def test_a_worker_that_stops_does_not_sleep_past_the_shutdown_timeout(
    upstream: ScriptedUpstream,
) -> None:
    """It looked at the time only when something else woke it, which is once a second."""
    upstream.script(
        lambda sock, seen: sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: 9"))
    )
    with (
        Running(upstream, shutdown_timeout=2.3).start() as running,
        RawClient(running.port) as client,
    ):
        client.send(request())
        client.head()
        stopped = time.monotonic()
        running.server.stop()
        running.thread.join(10)
        assert 2.3 <= time.monotonic() - stopped < 2.7
