"""Connections to the upstream that are kept, counted and let go of, with real sockets; and the
attempts to make one."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from metrics import Board
from problems import Problem, UpstreamBusy, UpstreamTimeout, UpstreamUnreachable
from server.connector import Attempt, UpstreamConnector, was_refused
from server.loop import Loop
from server.upstream import (
    ENDED_FIRST,
    FRESH_SECONDS,
    LEAVING_SECONDS,
    PORT_SECONDS,
    WARY_SECONDS,
    Connection,
    Upstream,
)
from tests.harness.servers import unanswered_port

KEEPALIVE = 50.0


class Lane:
    """A lane whose jobs the test does."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def add(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)


class Exchange:
    """What is told of a connection."""

    def __init__(self) -> None:
        self.over = False
        self.told: list[Any] = []
        self.connection: Connection | None = None

    def connected(self, connection: Connection) -> None:
        self.connection = connection
        connection.exchange = self  # type: ignore[assignment]
        self.told.append("connected")

    def unconnected(self, problem: Problem, refused: bool) -> None:
        self.told.append((type(problem), refused))

    def from_upstream(self, data: bytes) -> None:
        self.told.append(data)

    def upstream_ended(self) -> None:
        self.told.append("ended")

    def upstream_failed(self) -> None:
        self.told.append("failed")

    def upstream_progressed(self) -> None:
        pass

    def upstream_drained(self) -> None:
        pass

    def abandon(self) -> None:
        self.told.append("abandoned")


class Place:
    """An upstream that listens, its connections, and a loop."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.loop = Loop()
        self.lane: Any = Lane()
        self.board = Board(1)
        url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.upstream = Upstream(
            self.loop,
            self.lane,
            UpstreamConnector(url),
            limit=2,
            connect_timeout=5.0,
            keepalive=KEEPALIVE,
            board=self.board,
        )

    def attempt(self, exchange: Exchange) -> None:
        """Ask for a connection, and do what a helper thread does."""
        anything: Any = exchange
        attempt = self.upstream.connect(anything)
        if exchange.over:
            attempt.give_up()
        for job in self.lane.jobs:
            job()
        self.lane.jobs.clear()
        self.turn()

    def connect(self) -> tuple[Exchange, Connection, socket.socket]:
        exchange = Exchange()
        self.attempt(exchange)
        assert exchange.told == ["connected"] and exchange.connection is not None
        far, _ = self.listener.accept()
        far.settimeout(5)
        return exchange, exchange.connection, far

    def keep(self) -> tuple[Connection, socket.socket]:
        _, connection, far = self.connect()
        connection.release(keep=True)
        return connection, far

    def turn(self, until: Callable[[], Any] = lambda: True) -> None:
        for _ in range(1000):
            self.loop.call(lambda: None)
            self.loop.turn()
            if until():
                return
        raise AssertionError("it did not come to that")

    def take(self, *, repeatable: bool = True) -> Connection | None:
        return self.upstream.take(repeatable=repeatable)

    def pass_time(self, seconds: float) -> None:
        self.loop.now += seconds
        self.loop._take_timers(self.loop.now)
        self.loop.turn_over()


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.upstream.close()
    place.loop.turn_over()
    place.loop.shut()
    place.listener.close()


def was_reset(far: socket.socket) -> bool:
    """Whether the other side of `far` has been reset, and not closed in order."""
    try:
        return far.recv(1) != b""
    except ConnectionResetError:
        return True


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_a_kept_connection_is_the_next_ones_and_the_last_kept_is_the_first_taken(
    place: Place,
) -> None:
    first, first_far = place.keep()
    second, second_far = place.keep()
    assert place.upstream.open == 2
    assert place.take() is second and place.take() is first and place.take() is None
    assert first.used and second.used
    first_far.close()
    second_far.close()


def test_one_that_the_upstream_has_ended_is_closed_and_never_taken(place: Place) -> None:
    for ending in (socket.socket.close, reset, lambda far: far.send(b"unasked")):
        _, far = place.keep()
        ending(far)
        place.turn(lambda: place.upstream.open == 0)
        assert place.take() is None
        far.close()


def test_one_that_has_been_idle_for_too_long_is_closed_and_not_taken(place: Place) -> None:
    _, far = place.keep()
    place.pass_time(KEEPALIVE - 1)
    assert place.upstream.open == 1
    place.pass_time(2)
    assert place.upstream.open == 0 and far.recv(1) == b""
    far.close()


def test_one_clients_own_is_taken_by_nobody_else_and_is_closed_when_idle_for_too_long(
    place: Place,
) -> None:
    ann, bob = object(), object()
    _, own, own_far = place.connect()
    own.client = ann
    own.release(keep=True)
    assert place.take() is None and place.upstream.take(repeatable=True, client=bob) is None
    place.loop.now += FRESH_SECONDS + 0.1
    # There is no other on which its client has said who it is.
    assert place.upstream.take(repeatable=False, client=ann) is own and own.used
    own.release(keep=True)
    place.pass_time(KEEPALIVE - 1)
    assert place.upstream.open == 1
    place.pass_time(2)
    assert place.upstream.open == 0 and own_far.recv(1) == b""
    assert place.upstream.take(repeatable=True, client=ann) is None
    own_far.close()


def test_those_that_are_each_for_one_client_count_as_requests(place: Place) -> None:
    """A header was enough to have a connection of one's own, and idle clients could take all that
    the upstream has."""
    assert place.upstream.limit == 2
    owners, fars = [object() for _ in range(4)], []
    for owner in owners:
        place.upstream.enter()
        assert place.upstream.take(repeatable=True, client=owner) is None
        _, own, far = place.connect()
        own.client = owner
        own.release(keep=True)
        place.upstream.leave()
        fars.append(far)
        assert place.upstream.open <= place.upstream.limit
    # One that was kept for its client is the client's even at the limit.
    place.upstream.enter()
    assert place.upstream.take(repeatable=True, client=owners[-1]) is own
    for far in fars:
        far.close()


def test_those_that_are_each_for_one_client_make_room_by_themselves(place: Place) -> None:
    _, own, own_far = place.connect()
    own.client = object()
    own.release(keep=True)
    _, other, far = place.connect()
    other.release(keep=True)
    assert place.upstream.drop_one() and (own.closed, other.closed) == (False, True)
    assert not place.upstream.drop_one()
    assert place.upstream.drop_one(own=True) and own.closed
    assert not place.upstream.drop_one(own=True)
    own_far.close()
    far.close()


def test_one_clients_own_is_closed_when_its_client_leaves(place: Place) -> None:
    ann, bob = object(), object()
    for leaving, left in ((bob, 1), (ann, 0)):
        _, own, far = place.connect()
        own.client = ann
        own.release(keep=True)
        place.upstream.forget(leaving)
        assert place.upstream.open == left
        place.upstream.forget(ann)
        place.turn()
        assert place.upstream.open == 0 and far.recv(1) == b""
        far.close()


def test_what_must_not_be_sent_twice_goes_on_a_fresh_one_only(place: Place) -> None:
    connection, _ = place.keep()
    place.loop.now += FRESH_SECONDS + 0.1
    assert place.take(repeatable=False) is None
    assert place.take(repeatable=True) is connection
    connection.release(keep=True)
    assert place.take(repeatable=False) is connection


def test_of_an_upstream_that_closes_idle_ones_early_none_is_taken_for_what_may_go_once(
    place: Place,
) -> None:
    """With a keep-alive of none that it did not announce, one POST in ten was 502."""
    _, far = place.keep()
    far.close()
    place.turn(lambda: place.upstream.open == 0)
    connection, far = place.keep()
    assert place.take(repeatable=False) is None and place.take(repeatable=True) is connection
    place.loop.now += WARY_SECONDS
    connection.release(keep=True)
    assert place.take(repeatable=False) is connection
    far.close()


def test_one_on_which_nothing_ever_came_is_waited_for_no_longer_than_it_is_there(
    place: Place,
) -> None:
    """Idle connections were closed for the sake of requests that were long over."""
    _, connection, far = place.connect()
    connection.release(keep=False)
    idle, kept = place.keep()
    place.upstream.heard(idle)
    place.loop.now += 10
    place.upstream.look()
    assert place.upstream.open == 1
    far.close()
    kept.close()


def test_an_end_that_is_seen_only_as_it_is_taken_counts_as_well(place: Place) -> None:
    _, far = place.keep()
    far.close()
    assert place.take(repeatable=False) is None and place.upstream.open == 0
    assert place.upstream.is_wary()


def test_one_that_was_idle_for_longer_than_a_second_may_be_closed(place: Place) -> None:
    connection, far = place.keep()
    connection.idle_since -= FRESH_SECONDS + 0.1
    far.close()
    place.turn(lambda: place.upstream.open == 0)
    assert not place.upstream.is_wary()


def test_an_upstream_is_trusted_again_once_it_has_kept_one_for_longer(place: Place) -> None:
    """A restart closes all connections, at any age. Each POST of ten minutes cost one then."""
    fars = []
    place.upstream.limit = 10
    place.upstream.learn(0.2)
    for _ in range(4):  # They do not pile up meanwhile, and the oldest stays.
        _, far = place.keep()
        fars.append(far)
        assert place.upstream.open <= 2 and place.upstream.is_wary()
    oldest = next(iter(place.upstream._idle))
    oldest.idle_since -= FRESH_SECONDS + 0.1
    assert not place.upstream.is_wary()
    # Or once one has answered after it was idle for longer than the one that was closed.
    place.upstream.learn(0.2)
    oldest.idle_since = place.loop.now - 0.1
    for seconds, wary in ((0.1, True), (0.3, False)):
        connection = place.take(repeatable=True)
        assert connection is not None
        connection.idle_for = seconds
        connection.release(keep=True)
        assert place.upstream.is_wary() is wary
    for far in fars:
        far.close()


@pytest.mark.parametrize(("answered", "closed"), [(False, 2), (True, 1)])
def test_an_idle_one_is_closed_for_each_request_that_waits_or_one_if_others_are_answered(
    place: Place, answered: bool, closed: int
) -> None:
    place.upstream.limit = 10
    place.board.join(0)
    connected = [place.connect() for _ in range(5)]
    for exchange, connection, far in connected[:3]:
        far.sendall(b"x")
        place.turn(lambda told=exchange.told: b"x" in told)
        connection.release(keep=True)
    place.upstream.look()
    assert place.upstream.open == 5
    place.loop.now += 1.1
    if answered:
        place.upstream.outcome(up=True)
    place.upstream.look()
    assert place.upstream.open == 5 - closed
    for _, _, far in connected:
        far.close()


def test_a_new_one_takes_the_place_of_one_that_it_was_not_sent_on(place: Place) -> None:
    """Each such request made one more, and all were kept: a few of them every second took all the
    connections that the upstream has."""
    for _ in range(4):
        place.loop.now += FRESH_SECONDS + 0.1
        assert place.take(repeatable=False) is None
        place.keep()
        assert place.upstream.open == 1


def test_those_that_are_kept_count_to_the_limit(place: Place) -> None:
    assert place.upstream.limit == 2
    kept = [place.connect() for _ in range(2)]
    for _, connection, _ in kept:
        connection.release(keep=True)
    place.upstream.enter()
    place.connect()
    assert place.upstream.open == 2
    place.upstream.enter()
    place.connect()
    assert place.upstream.open == 2 and not place.upstream.drop_one()


def test_those_that_the_upstream_is_to_end_count_to_the_limit_and_go_first(place: Place) -> None:
    """An application that announced the end of each connection, and was slow to end it, had
    thousands of them open, until no descriptor was left."""
    kept, _far = place.keep()
    _, leaving, _other = place.connect()
    leaving.release(keep=False, leaving=True)
    assert place.upstream.open == place.upstream.limit == 2 and not leaving.closed
    place.upstream.enter()
    place.connect()
    assert leaving.closed and not kept.closed and place.upstream.open == 2


def test_for_a_request_that_waits_an_idle_one_is_closed_and_not_one_that_ends_anyway(
    place: Place,
) -> None:
    kept, _far = place.keep()
    _, leaving, _other = place.connect()
    leaving.release(keep=False, leaving=True)
    _waits = place.connect()
    place.loop.now += 1.1
    place.upstream.look()
    assert kept.closed and not leaving.closed


def test_one_that_cannot_be_watched_is_told_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(*arguments: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(place.loop, "watch", watch)
    exchange = Exchange()
    place.attempt(exchange)
    assert exchange.told == [(UpstreamUnreachable, False)] and place.upstream.open == 0


def test_one_that_breaks_as_it_is_let_go_of_is_counted_off_once(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """The count decides who is let in, and it went below what is there."""
    _, staying = place.keep()
    for how in ("released", "dropped", "expired", "taken"):
        exchange, connection, far = place.connect()
        if how != "released":
            connection.release(keep=True)
        reset(far)
        # The end is read in this turn, and told of at the end of it.
        while not connection.closed:
            connection._read()
        if how == "released":
            connection.release(keep=False)
        elif how == "dropped":
            place.upstream.discard(connection)
        elif how == "expired":
            connection.idle_since -= 2 * KEEPALIVE
            idle = place.upstream._idle
            others = [one for one in idle if one is not connection]
            idle.clear()
            idle.update(dict.fromkeys([connection, *others]))
            place.upstream._expire()
        else:
            other = place.take()
            assert other is not connection and other is not None
            other.release(keep=True)
        place.loop.turn_over()
        assert place.upstream.open == 1, how
        assert exchange.told == ["connected"]
    assert caplog.text == ""
    staying.close()


def test_no_connection_with_something_on_it_is_kept(place: Place) -> None:
    for spoil in (
        lambda one: setattr(one, "stopped_reading", True),
        lambda one: one.pause(),
        lambda one: setattr(one, "queued", 1),
        lambda one: setattr(one, "ended_reading", True),
        lambda one: one.close(),
    ):
        _, connection, far = place.connect()
        spoil(connection)
        connection.release(keep=True)
        assert place.take() is None and place.upstream.open == 0
        far.close()


def test_no_thread_connects_for_an_exchange_that_has_given_up(place: Place) -> None:
    exchange = Exchange()
    exchange.over = True
    place.attempt(exchange)
    assert exchange.told == [] and place.upstream.open == 0


def test_a_connection_that_was_made_for_one_that_has_given_up_since_is_closed(place: Place) -> None:
    """It was kept, beyond the limit, and as one on which a request waits: once a second a good one
    was closed for it."""
    kept, far_kept = place.keep()
    place.upstream.heard(kept)
    anything: Any = Exchange()
    attempt = place.upstream.connect(anything)
    place.lane.jobs.pop()()
    far, _ = place.listener.accept()
    far.settimeout(5)
    attempt.give_up()
    place.turn()
    assert anything.told == [] and place.upstream.open == 1
    assert was_reset(far), "its port is to be free at once"
    place.pass_time(1.5)
    place.upstream.look()
    assert place.take() is kept
    far_kept.close()


def test_connections_are_closed_when_they_have_been_idle_for_too_long(place: Place) -> None:
    """Of both kinds, each when its own time is over."""
    _, own, far_own = place.connect()
    own.client = object()
    own.release(keep=True)
    kept, far_kept = place.keep()
    kept.idle_since += 10
    place.pass_time(KEEPALIVE + 1)
    assert own.closed and not kept.closed
    place.pass_time(10)
    assert kept.closed and place.upstream.open == 0
    far_own.close()
    far_kept.close()


def test_a_failure_of_whom_a_connection_is_for_ends_that(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Exchange):
        def connected(self, connection: Connection) -> None:
            raise ValueError("as it never should")

    exchange = Failing()
    place.attempt(exchange)
    assert exchange.told == ["abandoned"] and "as it never should" in caplog.text


def test_nobody_listening_is_told_from_other_failures(place: Place) -> None:
    place.listener.close()
    exchange = Exchange()
    place.attempt(exchange)
    assert exchange.told == [(UpstreamUnreachable, True)]
    assert not was_refused(UpstreamTimeout()) and not was_refused(UpstreamUnreachable())


def test_no_more_are_with_the_upstream_than_may_be_and_the_log_says_so_once(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.upstream.enter()
    place.upstream.enter()
    for _ in range(3):
        with pytest.raises(UpstreamBusy):
            place.upstream.enter()
    assert caplog.text.count("2 requests are with the upstream") == 1
    place.upstream.leave()
    place.upstream.enter()
    assert place.upstream.in_flight == 2


def test_a_connection_that_is_made_to_itself_is_a_refused_one() -> None:
    """Where the upstream's port is one that outgoing connections are given, and nobody listens: one
    knock in 28,000 was answered by itself, with the request for an answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    connector = UpstreamConnector(f"http://127.0.0.1:{port}")
    connector._pool.conn_kw["source_address"] = ("127.0.0.1", port)
    with pytest.raises(UpstreamUnreachable) as caught:
        connector.connect(5.0, Attempt())
    assert was_refused(caught.value)


def test_each_address_of_a_name_has_its_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one had all of it. If that does not answer, the second was never reached."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        look_up = socket.getaddrinfo

        def two_addresses(host: str, *rest: Any) -> list[Any]:
            hosts = ["127.0.0.2", "127.0.0.1"] if host == "two.example" else [host]
            return [found for one in hosts for found in look_up(one, *rest)]

        monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
        with unanswered_port("127.0.0.2", port):
            began = time.monotonic()
            sock = UpstreamConnector(f"http://two.example:{port}").connect(1.0, Attempt())
            assert time.monotonic() - began < 1
            assert sock.getpeername() == ("127.0.0.1", port)
            sock.close()
            with pytest.raises(UpstreamTimeout):
                UpstreamConnector(f"http://127.0.0.2:{port}").connect(0.3, Attempt())


def let_go(place: Place, connection: Connection) -> None:
    connection.release(keep=False)


def leave(place: Place, connection: Connection) -> None:
    connection.client = object()
    connection.release(keep=True)
    place.upstream.forget(connection.client)


def grow_old(place: Place, connection: Connection) -> None:
    connection.release(keep=True)
    place.upstream.drop_one()


def end_a_half(place: Place, connection: Connection) -> None:
    connection.end()
    connection.release(keep=False)


@pytest.mark.parametrize("part", [let_go, leave, grow_old, end_a_half])
def test_of_many_that_we_end_first_most_are_reset(
    place: Place, part: Callable[[Place, Connection], None]
) -> None:
    """Each one that is ended in order keeps its port for a minute. Clients that asked with HEAD, or
    logged in with NTLM, or left before they were answered, or left a WebSocket, used up all ports
    to an application on another machine."""
    assert place.upstream._ended_first.maxlen == ENDED_FIRST
    place.upstream._ended_first = deque(maxlen=8)
    for later in (0, PORT_SECONDS, 2 * PORT_SECONDS):
        made = [place.connect() for _ in range(16)]
        place.loop.now += later
        for _, connection, _ in made:
            part(place, connection)
        place.loop.turn_over()
        ends = [was_reset(far) for _, _, far in made]
        assert ends == [False] * 8 + [True] * 8
        for _, _, far in made:
            far.close()


def test_an_upstream_that_has_announced_the_end_may_end_first(place: Place) -> None:
    """Whoever ends first keeps the port: an application that keeps no connection had its answers'
    connections reset, at 234 requests a second."""
    place.upstream._ended_first = deque([place.loop.now], maxlen=1)
    _, ending, far = place.connect()
    ending.release(keep=False, leaving=True)
    place.turn()
    assert not ending.closed
    far.shutdown(socket.SHUT_WR)
    place.turn(lambda: ending.closed)
    assert not was_reset(far) and place.upstream.open == 0
    _, staying, far = place.connect()
    staying.release(keep=False, leaving=True)
    place.pass_time(LEAVING_SECONDS + 0.1)
    assert was_reset(far) and place.upstream.open == 0


def test_the_kernel_asks_whether_the_upstream_is_still_there(place: Place) -> None:
    _, connection, far = place.connect()
    assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    far.close()
