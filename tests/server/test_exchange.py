"""An exchange, between two sides that are not there: every state, and every event in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from problems import UpstreamTimeout, UpstreamUnreachable
from server.exchange import GATHERED_BYTES, INTERIM_BYTES, KEEP_ALIVE, Patience, State
from server.stream import HIGH_WATER
from tests.harness import chunked, message
from tests.server.sides import PATIENCE, World, client_ends, of_the_upstream, upstream_ends

OK = b"HTTP/1.1 200 OK"
SWITCHES = message(b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket")
UPGRADE = (b"Connection: upgrade", b"Upgrade: websocket")
CHUNKED = b"Transfer-Encoding: chunked"
LARGE = GATHERED_BYTES + 1


# Every state, and every event in each.


def gathering() -> World:
    return World(b"POST / HTTP/1.1", CHUNKED, slow=True).start(b"5\r\nhel")


def connecting() -> World:
    return World(slow=True).start()


def retrying() -> World:
    world = World(patience=Patience(10.0, 100.0, 1.0, 0.0), slow=True).start()
    world.exchange.unconnected(UpstreamUnreachable(), True)
    return world


def asking() -> World:
    world = connecting()
    world.connect()
    return world


def answering() -> World:
    world = asking()
    world.exchange.from_upstream(message(OK, b"Content-Length: 10", body=b"abc"))
    return world


def delivering() -> World:
    world = World(b"POST / HTTP/1.1", b"Content-Length: %d" % LARGE, slow=True).start(b"x")
    world.connect()
    world.exchange.from_upstream(message(OK, b"Content-Length: 2", body=b"ok"))
    return world


def failed() -> World:
    world = connecting()
    world.exchange.unconnected(UpstreamUnreachable(), False)
    return world


def ended() -> World:
    world = connecting()
    world.client.settle()
    return world


def body(world: World) -> None:
    if world.exchange.wants_body:
        world.exchange.from_client(b"l")


EVENTS: dict[str, Callable[[World], None]] = {
    "body": body,
    "client ends": client_ends,
    "client drains": lambda world: world.exchange.client_drained(),
    "bytes": of_the_upstream(lambda world: world.exchange.from_upstream(b"HTT")),
    "upstream ends": of_the_upstream(upstream_ends),
    "upstream fails": of_the_upstream(lambda world: world.exchange.upstream_failed()),
    "upstream progresses": of_the_upstream(lambda world: world.exchange.upstream_progressed()),
    "upstream drains": of_the_upstream(lambda world: world.exchange.upstream_drained()),
    "connected": lambda world: world.connect() and None,
    "unconnected": lambda world: world.exchange.unconnected(UpstreamTimeout(), False),
    "time": lambda world: world.clock.pass_time(10_000),
    "abandon": lambda world: world.exchange.abandon(),
    "settled": lambda world: world.client.settle(),
}
# Where a state is left by an event; in all others it stays. The client here takes the end of an
# answer late, so that what is to be told it and what has been taken are two states.
LEFT: dict[Callable[[], World], dict[str, State]] = {
    gathering: {"client ends": State.ENDED},
    connecting: {
        "client ends": State.ENDED,
        "connected": State.ASKING,
        "unconnected": State.FAILED,
        "time": State.FAILED,
    },
    retrying: {"client ends": State.ENDED, "time": State.FAILED},
    asking: {
        "client ends": State.ENDED,
        "upstream ends": State.FAILED,
        "upstream fails": State.FAILED,
        "time": State.FAILED,
    },
    answering: {
        "client ends": State.ENDED,
        "upstream ends": State.ENDED,
        "upstream fails": State.ENDED,
        "time": State.ENDED,
    },
    delivering: {"client ends": State.ENDED},
    failed: {"client ends": State.ENDED},
    ended: {},
}
BEGUN = {
    gathering: State.GATHERING,
    connecting: State.CONNECTING,
    retrying: State.RETRYING,
    asking: State.ASKING,
    answering: State.ANSWERING,
    delivering: State.DELIVERING,
    failed: State.FAILED,
    ended: State.ENDED,
}
# One attempt to connect is under way at most. What is made of one that was given up is thrown away;
# that it failed is told, though.
AWAITED = {"connected": (connecting,), "unconnected": (connecting, failed, ended)}


@pytest.mark.parametrize(
    "state, event",
    [
        pytest.param(state, event, id=f"{state.__name__}-{event}")
        for state in BEGUN
        for event in EVENTS
        if state in AWAITED.get(event, BEGUN)
    ],
)
def test_every_event_in_every_state(state: Callable[[], World], event: str) -> None:
    world = state()
    exchange = world.exchange
    assert exchange.state is BEGUN[state]
    EVENTS[event](world)
    always = {"abandon": State.ENDED, "settled": State.ENDED}
    expected = always.get(event, LEFT[state].get(event, BEGUN[state]))
    assert exchange.state is (State.ENDED if state is ended else expected)
    # Whatever happened: at the end nothing is held, nothing is counted, and nothing happens again.
    if exchange.state is not State.ENDED:
        world.client.settle()
    assert exchange.state is State.ENDED
    assert (world.upstream.in_flight, world.upstream.streams) == (0, 0)
    assert world.connection is None
    assert all(len(connection.released) == 1 for connection in world.connections)
    told = list(world.client.told)
    world.clock.pass_time(1e6)
    exchange.settled()
    assert world.client.told == told
    assert (world.upstream.in_flight, world.upstream.streams) == (0, 0)


@pytest.mark.parametrize("state", [asking, answering, delivering])
@pytest.mark.parametrize("event", ["client ends", "abandon", "settled"])
def test_a_connection_in_the_middle_of_something_is_not_kept(
    state: Callable[[], World], event: str
) -> None:
    world = state()
    EVENTS[event](world)
    if world.exchange.state is not State.ENDED:
        world.client.settle()
    assert [connection.released for connection in world.connections] == [[False]]


# The request arrives.


def test_a_request_without_a_body_is_asked_at_once() -> None:
    world = World().start()
    assert world.exchange.state is State.CONNECTING and world.upstream.connecting == 1
    assert world.connect().sent == b"[GET None]"


def test_a_small_body_is_gathered_before_the_upstream_is_asked() -> None:
    world = World(b"POST / HTTP/1.1", b"Content-Length: 5").start(b"he")
    world.exchange.from_client(b"l")
    assert world.exchange.state is State.GATHERING and world.upstream.in_flight == 0
    assert world.exchange.from_client(b"lo, and more") == b", and more"
    assert world.exchange.state is State.CONNECTING and world.upstream.in_flight == 1
    assert world.connect().sent == b"[POST None]hello"


def test_chunks_that_were_gathered_have_a_length() -> None:
    world = World(b"POST / HTTP/1.1", CHUNKED).start(chunked(b"hel", b"lo"))
    assert world.connect().sent == b"[POST 5]hello"


def test_a_large_body_streams_on_as_it_arrives() -> None:
    world = World(b"POST / HTTP/1.1", b"Content-Length: %d" % LARGE).start(b"a")
    assert world.exchange.state is State.CONNECTING
    connection = world.connect()
    assert connection.sent == b"[POST None]a"
    world.exchange.from_client(b"b")
    assert connection.pieces[-1] == b"b"


def test_chunks_beyond_what_is_gathered_stream_on_as_chunks() -> None:
    world = World(b"POST / HTTP/1.1", CHUNKED).start(b"%x\r\n" % LARGE + bytes(LARGE))
    connection = world.connect()
    assert connection.sent == b"[POST None]%x\r\n" % LARGE + bytes(LARGE) + b"\r\n"
    world.exchange.from_client(b"\r\n1\r\nx\r\n")
    assert connection.pieces[-1] == b"1\r\nx\r\n"
    world.exchange.from_client(b"0\r\n\r\n")
    assert connection.pieces[-1] == b"0\r\n\r\n"


def test_a_body_that_is_too_large_or_malformed_is_refused_at_any_stage() -> None:
    for stage in ("gathering", "streaming"):
        for data, problem in ((b"zz\r\n", "bad-request"), (b"fffff\r\n", "body-too-large")):
            first = b"%x\r\n" % LARGE + bytes(LARGE) + b"\r\n"
            world = World(b"POST / HTTP/1.1", CHUNKED, largest=2 * LARGE)
            world.start(first if stage == "streaming" else b"1\r\nx\r\n")
            if stage == "streaming":
                world.connect()
            world.exchange.from_client(data)
            assert world.client.told == [("refuse", problem)]
            assert [one.released for one in world.connections] == [[False]] * len(world.connections)


def test_the_rest_of_a_body_that_is_malformed_takes_nothing_from_the_answer_before_it() -> None:
    """The log told of an answer that was cut, which the client had had long since."""
    world = World(b"POST / HTTP/1.1", CHUNKED, slow=True)
    connection = world.start(b"%x\r\n" % LARGE + bytes(LARGE) + b"\r\n").connect()
    world.exchange.from_upstream(message(OK, b"Content-Length: 2", body=b"ok"))
    assert world.exchange.state is State.DELIVERING
    world.exchange.from_client(b"zz\r\n")
    assert world.client.told[-2:] == [("finish", True), ("finish", False)]
    assert connection.released == [False]


def test_a_client_that_is_closed_to_make_room_for_its_own_connection_gives_that_up() -> None:
    """It asked again in RETRYING, was the one that made room, and left a connection that nobody
    owned."""
    world = retrying()
    connect = world.upstream.connect

    def make_room(exchange: Any) -> Any:
        world.client.hang_up(reset=True)
        return connect(exchange)

    world.upstream.connect = make_room  # type: ignore[method-assign]
    world.clock.pass_time(1.0)
    assert world.exchange.state is State.ENDED and world.upstream.given_up == 1


def test_no_more_than_a_body_in_memory_is_taken_while_there_is_no_connection() -> None:
    world = World(b"POST / HTTP/1.1", b"Content-Length: 1000000").start(bytes(LARGE))
    assert not world.client.paused  # It was asked for with this piece.
    world.exchange.from_client(b"x")
    assert world.client.paused
    world.connect()
    assert not world.client.paused


def test_the_client_is_read_as_fast_as_the_upstream_takes_it() -> None:
    world = World(b"POST / HTTP/1.1", b"Content-Length: 1000000").start(b"x")
    connection = world.connect()
    connection.queued = HIGH_WATER + 1
    world.exchange.from_client(b"y")
    assert world.client.paused
    connection.queued = 0
    world.exchange.upstream_drained()
    assert not world.client.paused


def test_the_upstream_that_has_all_places_taken_is_busy() -> None:
    world = World()
    world.upstream.busy = True
    world.start()
    assert world.client.told == [("refuse", "upstream-busy")]
    assert world.upstream.in_flight == 0


# 100 and other interim answers.


def test_a_small_body_is_asked_for_at_once_and_a_large_one_when_the_upstream_asks() -> None:
    expect = b"Expect: 100-continue"
    small = World(b"POST / HTTP/1.1", b"Content-Length: 5", expect).start()
    assert small.client.told == [("100",)]


def test_interim_answers_are_skipped_but_for_early_hints() -> None:
    world = asking()
    for status in (b"100 Continue", b"102 Processing", b"103 Early Hints", b"199 What"):
        world.exchange.from_upstream(message(b"HTTP/1.1 " + status))
    assert world.client.told == [("interim", "103 Early Hints")]


def test_a_client_that_does_not_keep_up_does_without_hints() -> None:
    world = asking()
    hints = message(b"HTTP/1.1 103 Early Hints", b"Link: </a.css>; rel=preload")
    world.client.queued = 1
    world.exchange.from_upstream(hints * 1000)
    assert world.client.told == []
    world.client.queued = 0
    world.exchange.from_upstream(hints)
    assert world.client.told == [("interim", "103 Early Hints")]
    world.exchange.from_upstream(message(OK, b"Content-Length: 0"))
    assert ("begin", "200 OK", 0, False) in world.client.told


# The answer.


def test_an_answer_passes_piece_by_piece_and_its_connection_is_kept() -> None:
    world = asking()
    for piece in (b"HTTP/1.1 200", b" OK\r\nContent-Le", b"ngth: 5\r\n\r\nhe", b"l", b"lo"):
        world.exchange.from_upstream(piece)
    assert world.client.written == b"hello"
    assert [one[0] for one in world.client.told] == ["begin", "write", "write", "write", "finish"]
    assert world.connections[0].released == [True]
    assert world.upstream.outcomes == [True]


@pytest.mark.parametrize(
    "answer",
    [
        message(OK, b"Content-Length: 2", body=b"ok!"),
        message(OK, b"Content-Length: 0", body=b"!"),
        message(OK, b"Transfer-Encoding: chunked", body=chunked(b"ok") + b"!"),
        message(OK, b"Content-Length: 2", b"Connection: close", body=b"ok"),
    ],
)
def test_a_connection_with_more_on_it_than_the_answer_is_not_kept(answer: bytes) -> None:
    world = asking()
    world.exchange.from_upstream(answer)
    assert world.client.told[-1] == ("finish", False)
    assert world.connections[0].released == [False]


def test_an_answer_until_the_end_is_whole_only_where_it_ends_in_order() -> None:
    world = asking()
    world.exchange.from_upstream(message(OK, body=b"some"))
    upstream_ends(world)
    assert world.client.told[-1] == ("finish", False)
    world = asking()
    world.exchange.from_upstream(message(OK, body=b"some"))
    world.exchange.upstream_failed()
    assert world.client.told[-1] == ("cut",)
    # Its end may be that of a request it would not take, with the rest of the answer lost.
    world = asking()
    world.exchange.from_upstream(message(OK, body=b"some"))
    world.connections[0].stopped_reading = True
    upstream_ends(world)
    assert world.client.told[-1] == ("cut",)


def test_an_answer_that_is_malformed_in_its_body_is_cut() -> None:
    world = asking()
    world.exchange.from_upstream(message(OK, CHUNKED, body=b"1\r\nx\r\nzz\r\n"))
    assert world.client.told[-1] == ("cut",) and world.client.written == b"x"


def test_an_answer_that_is_malformed_in_its_head_is_a_502() -> None:
    world = asking()
    world.exchange.from_upstream(b"HTTP/1.1 what\r\n\r\n")
    assert world.client.told == [("refuse", "upstream-broken")]
    assert world.upstream.outcomes == [False]


def test_the_upstream_waits_for_a_client_that_does_not_keep_up_and_is_not_late_meanwhile() -> None:
    world = asking()
    connection = world.connections[0]
    world.client.queued = HIGH_WATER + 1
    world.exchange.from_upstream(message(OK, b"Content-Length: 9", body=b"a"))
    assert connection.paused
    world.clock.pass_time(10_000)
    assert world.exchange.state is State.ANSWERING
    world.client.queued = 0
    world.exchange.client_drained()
    assert not connection.paused
    world.clock.pass_time(PATIENCE.head + 0.1)
    assert world.client.told[-1] == ("cut",)


# An answer before the end of the request.


def test_the_rest_of_a_request_is_delivered_after_its_answer() -> None:
    world = delivering()
    assert world.client.told == [("begin", "200 OK", 2, True), ("write", b"ok"), ("finish", True)]
    connection = world.connection
    assert connection is not None and connection.released == []
    world.exchange.from_client(bytes(LARGE - 1))
    assert connection.released == [True]
    assert world.client.told[-1] == ("finish", False)


def test_an_upstream_that_takes_nothing_of_the_rest_is_given_up() -> None:
    world = delivering()
    connection = world.connection
    assert connection is not None
    connection.queued = 1
    world.exchange.from_client(b"x")
    world.clock.pass_time(PATIENCE.head + 0.1)
    assert connection.released == [False]
    assert world.client.told[-1] == ("finish", False)


# Deadlines.


def test_a_connection_has_its_time() -> None:
    world = World().start()
    world.clock.pass_time(4.9)
    assert world.exchange.state is State.CONNECTING
    world.clock.pass_time(0.2)
    assert world.client.told == [("refuse", "upstream-timeout")]


def test_the_whole_head_of_an_answer_has_one_time_however_it_trickles() -> None:
    world = asking()
    for byte in b"HTTP/1.1 ":
        world.clock.pass_time(1)
        world.exchange.from_upstream(bytes([byte]))
    assert world.exchange.state is State.ASKING
    world.clock.pass_time(1.1)
    assert world.client.told == [("refuse", "upstream-timeout")]


@pytest.mark.parametrize("at_once", [1, 1000])
def test_interim_answers_without_an_end_are_refused(at_once: int) -> None:
    """They went on for UPSTREAM_READ_TIMEOUT, and each quarter of a megabyte of them held everybody
    else up for a third of a second."""
    world = asking()
    interim = message(b"HTTP/1.1 102 Processing") * at_once
    sent = 0
    while world.exchange.state is State.ASKING:
        world.exchange.from_upstream(interim)
        sent += len(interim)
        assert sent < INTERIM_BYTES + 2 * len(interim)
    assert sent > INTERIM_BYTES
    assert world.client.told == [("refuse", "upstream-broken")]


def test_interim_answers_do_not_give_the_upstream_more_time() -> None:
    world = asking()
    for _ in range(9):
        world.clock.pass_time(1)
        world.exchange.from_upstream(message(b"HTTP/1.1 102 Processing"))
    world.clock.pass_time(1.1)
    assert world.client.told == [("refuse", "upstream-timeout")]


def test_each_piece_of_a_body_has_its_time() -> None:
    world = answering()
    for _ in range(3):
        world.clock.pass_time(9.9)
        world.exchange.from_upstream(b"x")
    assert world.exchange.state is State.ANSWERING
    world.clock.pass_time(10.1)
    assert world.client.told[-1] == ("cut",)


def test_framing_without_an_end_gives_no_piece_more_time() -> None:
    """A chunk's extension of 64 KiB, byte by byte, could last for hours."""
    world = asking()
    world.exchange.from_upstream(message(OK, CHUNKED, body=b"1;"))
    for _ in range(3):
        world.clock.pass_time(3)
        world.exchange.from_upstream(b"a")
    assert world.exchange.state is State.ANSWERING
    world.clock.pass_time(1.1)
    assert world.client.told[-1] == ("cut",)


def test_while_the_client_sends_its_body_the_upstream_is_not_late() -> None:
    world = World(b"POST / HTTP/1.1", b"Content-Length: 1000000").start(b"x")
    connection = world.connect()
    world.clock.pass_time(1000)
    assert world.exchange.state is State.ASKING
    # It is, where it does not take what has come.
    connection.queued = 10
    world.exchange.from_client(b"y")
    world.clock.pass_time(9)
    connection.queued = 5
    world.exchange.upstream_progressed()
    world.clock.pass_time(9)
    assert world.exchange.state is State.ASKING
    world.clock.pass_time(1.1)
    assert world.client.told == [("refuse", "upstream-timeout")]


EVENTS_HEAD = message(OK, b"Content-Type: text/event-stream", CHUNKED)


def test_an_upstream_that_answers_before_it_has_the_body_is_not_late_while_that_comes() -> None:
    """It says nothing until it has all of an upload, which may take longer than it may be silent."""
    world = World(b"POST / HTTP/1.1", b"Content-Length: 1000000").start(b"x")
    world.connect()
    world.exchange.from_upstream(message(OK, CHUNKED, body=b"2\r\nok\r\n"))
    for _ in range(5):
        world.clock.pass_time(9.9)
        world.exchange.from_client(b"x")
    assert world.exchange.state is State.ANSWERING
    world.clock.pass_time(10.1)
    assert world.client.told[-1] == ("cut",)


def test_a_piece_of_an_event_stream_has_a_time_of_its_own_and_is_counted() -> None:
    world = asking()
    world.exchange.from_upstream(EVENTS_HEAD)
    assert world.upstream.streams == 1
    world.clock.pass_time(99)
    assert world.exchange.state is State.ANSWERING
    world.clock.pass_time(1.1)
    assert world.client.told[-1] == ("cut",) and world.upstream.streams == 0


# Sending again.


def kept(first: bytes = b"GET / HTTP/1.1", *lines: bytes, body: bytes = b"") -> World:
    world = World(first, *lines)
    world.keep()
    return world.start(body)


def test_a_request_is_sent_again_where_a_kept_connection_ended_without_a_byte() -> None:
    for event in (upstream_ends, lambda world: world.exchange.upstream_failed()):
        world = kept()
        assert world.connections[0].sent == b"[GET None]" and world.upstream.connecting == 0
        event(world)
        # Not on another that was kept: it may have died of the same cause.
        assert world.upstream.connecting == 1 and world.exchange.state is State.CONNECTING
        assert world.connect().sent == b"[GET None]"
        assert world.connections[0].released == [False] and world.client.told == []


def test_it_is_sent_again_once() -> None:
    world = kept()
    upstream_ends(world)
    world.connect(used=True)
    upstream_ends(world)
    assert world.client.told == [("refuse", "upstream-broken")]
    # That says how long it keeps idle connections at most.
    assert world.upstream.learnt == [0.5, 0.5]


def test_the_end_of_a_connection_with_a_log_in_says_nothing_of_the_others() -> None:
    world = kept()
    world.connections[0].client = world.client
    upstream_ends(world)
    assert world.upstream.connecting == 1 and world.upstream.learnt == []


def test_a_body_that_is_still_here_is_sent_again_with_it() -> None:
    world = kept(b"PUT / HTTP/1.1", b"Content-Length: 5", body=b"hello")
    upstream_ends(world)
    assert world.connect().sent == b"[PUT None]hello"


@pytest.mark.parametrize(
    "world",
    [
        lambda: kept(b"POST / HTTP/1.1"),
        lambda: kept(b"PATCH / HTTP/1.1", b"Content-Length: 1", body=b"x"),
        lambda: kept(b"PUT / HTTP/1.1", b"Content-Length: %d" % LARGE, body=b"x"),
        lambda: kept(b"PUT / HTTP/1.1", b"Content-Length: %d" % LARGE, body=bytes(LARGE)),
    ],
)
def test_what_is_not_safe_to_send_again_is_not(world: Callable[[], World]) -> None:
    one = world()
    if one.exchange.wants_body:
        one.exchange.from_client(bytes(LARGE - 1))
    upstream_ends(one)
    if one.upstream.asked == [True]:
        # All of it was here at once, and none was let go of: it is as good as a small one.
        assert one.upstream.connecting == 1
    else:
        assert one.client.told == [("refuse", "upstream-broken")] and one.upstream.connecting == 0


def test_nothing_is_sent_again_on_a_first_use_or_after_a_byte() -> None:
    world = asking()
    upstream_ends(world)
    assert world.client.told == [("refuse", "upstream-broken")]
    world = kept()
    world.exchange.from_upstream(b"H")
    upstream_ends(world)
    assert world.client.told == [("refuse", "upstream-broken")]


def test_only_what_may_be_sent_twice_takes_a_connection_that_has_long_been_idle() -> None:
    assert kept().upstream.asked == [True]
    assert kept(b"POST / HTTP/1.1").upstream.asked == [False]
    assert kept(b"DELETE / HTTP/1.1").upstream.asked == [True]


# A refused connection is tried again.


def test_a_refused_connection_is_tried_again_for_as_long_as_is_set() -> None:
    world = World(patience=Patience(10.0, 100.0, 1.0, 0.0)).start()
    attempts = 0
    while not world.client.told:
        attempts += 1
        assert world.upstream.connecting == attempts
        world.exchange.unconnected(UpstreamUnreachable(), True)
        world.clock.pass_time(0.25)
    assert attempts == 5  # At 0, 0.25, 0.5, 0.75 and 1 second.
    assert world.client.told == [("refuse", "upstream-unreachable")]


def test_a_refused_connection_is_tried_a_last_time_when_the_time_is_over() -> None:
    world = World(patience=Patience(10.0, 100.0, 0.3, 0.0)).start()
    for attempts, seconds in ((1, 0.25), (2, 0.06)):
        assert world.upstream.connecting == attempts
        world.exchange.unconnected(UpstreamUnreachable(), True)
        world.clock.pass_time(seconds)
    assert world.upstream.connecting == 3
    world.exchange.unconnected(UpstreamUnreachable(), True)
    assert world.client.told == [("refuse", "upstream-unreachable")]


def test_a_refused_connection_that_is_made_at_last_serves() -> None:
    world = retrying()
    world.clock.pass_time(0.25)
    assert world.upstream.connecting == 2
    assert world.connect().sent == b"[GET None]"


def test_no_other_failure_is_tried_again() -> None:
    world = World(patience=Patience(10.0, 100.0, 60.0, 0.0)).start()
    world.exchange.unconnected(UpstreamUnreachable(), False)
    assert world.client.told == [("refuse", "upstream-unreachable")]
    assert connecting().exchange.state is State.CONNECTING  # Nor is any, where nothing is set:
    world = connecting()
    world.exchange.unconnected(UpstreamUnreachable(), True)
    assert world.client.told == [("refuse", "upstream-unreachable")]


# Comments in an event stream.


def stream(*lines: bytes, comment: float = 15.0) -> World:
    world = World(patience=Patience(10.0, 100.0, 0.0, comment)).start()
    world.connect()
    world.exchange.from_upstream(message(OK, b"Content-Type: text/event-stream", *lines))
    return world


@pytest.mark.parametrize("what", ["answer_lines", "switch"])
def test_a_switch_that_fails_is_counted_off_once(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was counted off by the exchange and by the tunnel: then there was a place too many."""

    def fail(*arguments: Any) -> bytes:
        raise ValueError("as it never should")

    world = World(b"GET / HTTP/1.1", *UPGRADE).start()
    connection = world.connect()
    rules = world.exchange._rules
    monkeypatch.setattr(*((rules, what) if what == "answer_lines" else (world.client, what)), fail)
    with pytest.raises(ValueError, match="as it never should"):
        world.exchange.from_upstream(SWITCHES)
    connection.exchange.abandon()
    assert (world.upstream.in_flight, world.upstream.streams) == (0, 0)
    assert connection.released == [False]


def comments(world: World) -> int:
    return world.client.told.count(("comment", KEEP_ALIVE))


def test_a_silent_stream_has_a_comment_now_and_then_and_the_upstream_is_late_all_the_same() -> None:
    world = stream()
    world.clock.pass_time(14.9)
    assert comments(world) == 0
    world.clock.pass_time(0.2)
    assert comments(world) == 1
    world.clock.pass_time(75)
    assert comments(world) == 6
    world.clock.pass_time(20)
    assert world.client.told[-1] == ("cut",)


@pytest.mark.parametrize(
    "data, at_its_end",
    [
        (b"data: 1\n\n", True),
        (b"data: 1\r\n\r\n", True),
        (b"data: 1\r\r", True),
        (b"data: 1\n", False),
        (b"data: \xe2\x82", False),
        (b"data: 1\n\ndata", False),
    ],
)
def test_a_comment_stands_at_an_events_end_only(data: bytes, at_its_end: bool) -> None:
    for pieces in ([data], [data[at : at + 1] for at in range(len(data))]):
        world = stream()
        for piece in pieces:
            world.exchange.from_upstream(piece)
        world.clock.pass_time(20)
        assert comments(world) == (1 if at_its_end else 0)


def test_no_comment_where_it_would_not_fit_or_is_not_asked_for() -> None:
    for world in (stream(b"Content-Length: 1000"), stream(b"Content-Encoding: gzip"), stream(comment=0.0)):  # fmt: skip
        world.clock.pass_time(9.9)
        world.clock.pass_time(80)
        assert comments(world) == 0


def test_no_comment_waits_behind_what_the_client_does_not_take() -> None:
    world = stream()
    world.client.queued = HIGH_WATER + 1
    world.exchange.from_upstream(b"data: 1\n\n")
    world.clock.pass_time(1000)
    assert comments(world) == 0
    world.client.queued = 0
    world.exchange.client_drained()
    world.clock.pass_time(15.1)
    assert comments(world) == 1


def test_an_exchange_that_cannot_be_ended_by_its_client_ends_all_the_same() -> None:
    world = answering()

    def broken(*, reset: bool = False) -> None:
        raise RuntimeError

    world.client.hang_up = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        world.exchange.abandon()
    assert world.exchange.state is State.ENDED and world.upstream.in_flight == 0
    assert world.connections[0].released == [False]


@pytest.mark.parametrize(
    ("lines", "leaving"),
    [
        ((b"HTTP/1.1 200 OK", b"Content-Length: 2", b"Connection: close"), True),
        ((b"HTTP/1.0 200 OK", b"Content-Length: 2"), True),
        ((b"HTTP/1.1 200 OK", b"Content-Length: 2"), False),
    ],
)
def test_an_announced_end_of_the_connection_is_waited_for(
    lines: tuple[bytes, ...], leaving: bool
) -> None:
    world = asking()
    connection = world.connection
    assert connection is not None
    world.exchange.from_upstream(message(*lines, body=b"ok"))
    assert connection.released == [not leaving] and connection.leaving is leaving
