"""Both sides of an exchange without a socket, and a clock that the test turns."""

from __future__ import annotations

import heapq
import types
from collections.abc import Callable
from typing import Any

from problems import Problem, UpstreamBusy
from server.exchange import Exchange, Patience
from server.loop import Timer
from server.tunnel import Tunnel
from tests.harness import request
from wire.request import Head

PATIENCE = Patience(head=10.0, stream=100.0, retry=0.0, comment=0.0)


class Clock:
    """What an exchange and a client ask of the loop; `now` moves as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = 0
        self.soon_called: list[Any] = []

    def queue_timer(self, when: float, timer: Timer) -> None:
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, timer))

    def entry_outdated(self) -> None:
        pass

    def soon(self, function: Any) -> None:
        self.soon_called.append(function)

    def pass_time(self, seconds: float) -> None:
        """So many seconds pass, and everything happens at its time."""
        until = self.now + seconds
        rung = 0
        while self._timers and self._timers[0][0] <= until:
            rung += 1
            assert rung < 10_000, "a timer rings for ever"
            when, _, timer = heapq.heappop(self._timers)
            self.now = max(self.now, when)
            timer.due(when, self.now)
        self.now = until


class Client:
    """The client's side: `told` is all that it was given, in order. One that is `slow` takes the
    end of an answer when the test says so, by `settle`."""

    def __init__(self, clock: Clock, head: Head, *, slow: bool = False) -> None:
        self.loop: Any = clock
        self.deadline = Timer(self.loop)
        self.head: Head | None = head
        self.queued = 0
        self.ended_reading = False
        self.draining = False
        self.paused = False
        self.ahead = b""
        self.told: list[tuple[Any, ...]] = []
        self.slow = slow
        self.exchange: Any = None

    def begin(self, status: str, lines: bytes, *, length: int | None, dated: bool, close: bool = False) -> None:  # fmt: skip
        self.told.append(("begin", status, length, close))

    def switch(self, status: str, lines: bytes, tunnel: Any) -> None:
        self.told.append(("switch", status))
        self.exchange = tunnel

    def interim(self, status: str, lines: bytes) -> None:
        self.told.append(("interim", status))

    def ask_for_body(self) -> None:
        if self.head is not None and self.head.expects:
            self.head.expects = False
            self.told.append(("100",))

    def write(self, piece: bytes) -> None:
        if piece:
            self.told.append(("write", piece))

    def comment(self, data: bytes) -> None:
        self.told.append(("comment", data))

    def pass_from(self, source: Any) -> None:
        raise AssertionError("there is no socket")

    def flush(self) -> None:
        pass

    def finish(self, *, more: bool = False) -> None:
        self.told.append(("finish", more))
        if not more and not self.slow:
            self.settle()

    def refuse(self, problem: Problem) -> None:
        self.told.append(("refuse", problem.name))
        if not self.slow:
            self.settle()

    def cut(self, why: str = "") -> None:
        self.told.append(("cut",))
        self.settle()

    def end(self) -> None:
        self.told.append(("end",))

    def hang_up(self, *, reset: bool = False, why: str = "") -> None:
        self.told.append(("hang up",))
        self.settle()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def take_ahead(self) -> bytes:
        ahead, self.ahead = self.ahead, b""
        return ahead

    def settle(self) -> None:
        """The answer is behind the client, as far as the exchange is concerned."""
        self.head = None
        self.exchange.settled()

    @property
    def written(self) -> bytes:
        return b"".join(one[1] for one in self.told if one[0] == "write")


class Connection:
    """The upstream's side: `sent` is all that it was sent, `released` whether it was kept."""

    tls = False
    straight = None
    client: Any = None

    def __init__(self, *, used: bool = False) -> None:
        self.used = used
        self.idle_for = 0.5
        self.stopped_reading = False
        self.queued = 0
        self.paused = False
        self.ended_reading = False
        self.ending = False
        self.exchange: Any = None
        self.pieces: list[bytes] = []
        self.released: list[bool] = []

    def send(self, data: bytes) -> None:
        if data:
            self.pieces.append(bytes(data))

    @property
    def sent(self) -> bytes:
        return b"".join(self.pieces)

    def end(self) -> None:
        self.ending = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def release(self, *, keep: bool, leaving: bool = False) -> None:
        self.exchange = None
        self.released.append(keep)
        self.leaving = leaving


class Upstream:
    """What an exchange asks of the upstream; `kept` are the connections that wait for one."""

    connect_timeout = 5.0

    def __init__(self) -> None:
        self.in_flight = self.streams = 0
        self.busy = False
        self.kept: list[Connection] = []
        self.asked: list[bool] = []  # by each that took a kept one, whether it may be sent twice
        self.connecting = 0
        self.given_up = 0
        self.outcomes: list[bool] = []
        self.learnt: list[float] = []

    def enter(self) -> None:
        if self.busy:
            raise UpstreamBusy
        self.in_flight += 1

    def leave(self) -> None:
        self.in_flight -= 1

    def count_streams(self, change: int) -> None:
        self.streams += change

    def learn(self, idle: float) -> None:
        self.learnt.append(idle)

    def outcome(self, *, up: bool) -> None:
        self.outcomes.append(up)

    def take(self, *, repeatable: bool, client: object = None) -> Connection | None:
        self.asked.append(repeatable)
        return self.kept.pop() if self.kept else None

    def connect(self, exchange: Any) -> Any:
        self.connecting += 1
        return self

    def give_up(self) -> None:
        self.given_up += 1


class Rules:
    def trusts(self, peer: str) -> bool:
        return False

    def request_head(self, head: Head, peer: str, length: int | None) -> bytes:
        return f"[{head.method} {length}]".encode()

    def answer_lines(self, answer: Any, head: Head) -> bytes:
        return b""

    def interim_lines(self, answer: Any) -> bytes:
        return b""


class World:
    """An exchange, and all around it."""

    def __init__(
        self,
        first: bytes = b"GET / HTTP/1.1",
        *lines: bytes,
        patience: Patience = PATIENCE,
        largest: int = 0,
        slow: bool = False,
    ) -> None:
        self.clock = Clock()
        head = Head(request(first, *lines)[:-4])
        assert head.problem is None
        self.client = Client(self.clock, head, slow=slow)
        self.upstream = Upstream()
        self.connections: list[Connection] = []
        anything: Any = types.SimpleNamespace(client=self.client, upstream=self.upstream)
        self.exchange = Exchange(
            anything.client, head, "127.0.0.1", anything.upstream, Rules(), patience, largest
        )
        self.client.exchange = self.exchange

    def start(self, body: bytes = b"") -> World:
        self.exchange.start()
        if body:
            self.exchange.from_client(body)
        return self

    def connect(self, *, used: bool = False) -> Connection:
        """The connection that was asked for is here."""
        connection = Connection(used=used)
        self.connections.append(connection)
        anything: Any = connection
        self.exchange.connected(anything)
        return connection

    def keep(self) -> Connection:
        """A connection that was kept waits for the exchange."""
        connection = Connection(used=True)
        self.connections.append(connection)
        self.upstream.kept.append(connection)
        return connection

    @property
    def tunnel(self) -> Tunnel:
        """What has taken the exchange's place."""
        tunnel = self.client.exchange
        assert isinstance(tunnel, Tunnel)
        return tunnel

    @property
    def connection(self) -> Connection | None:
        """The one that is the exchange's now, or the tunnel's."""
        held = [one for one in self.connections if one.exchange is self.client.exchange]
        assert len(held) <= 1
        return held[0] if held else None


def client_ends(world: World) -> None:
    world.client.ended_reading = True
    world.client.exchange.client_ended()


def of_the_upstream(event: Callable[[World], None]) -> Callable[[World], None]:
    """An event of a connection comes only to the exchange, or the tunnel, that has one."""

    def happen(world: World) -> None:
        if world.connection is not None:
            event(world)

    return happen


def upstream_ends(world: World) -> None:
    assert world.connection is not None
    world.connection.ended_reading = True
    world.client.exchange.upstream_ended()
