"""A tunnel, between two sides that are not there: every state, and every event in each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from server.exchange import State as Exchanged
from server.stream import HIGH_WATER
from server.tunnel import State
from tests.harness import message
from tests.server.sides import World, client_ends, of_the_upstream, upstream_ends

SWITCHES = message(b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket")
UPGRADE = (b"Connection: upgrade", b"Upgrade: websocket")

HELLO, MASKED = b"\x81\x05hello", b"\x81\x85\0\0\0\0hello"
AWAY = b"\x88\x02\x03\xe9"


def tunnelling() -> World:
    world = World(b"GET / HTTP/1.1", *UPGRADE, slow=True).start()
    world.connect()
    world.exchange.from_upstream(SWITCHES)
    return world


def parting() -> World:
    world = tunnelling()
    world.tunnel.part()
    return world


def ended() -> World:
    world = tunnelling()
    world.client.settle()
    return world


EVENTS: dict[str, Callable[[World], object]] = {
    "bytes of the client's": lambda world: world.tunnel.from_client(b"l"),
    "client ends": client_ends,
    "client drains": lambda world: world.tunnel.client_drained(),
    "bytes": of_the_upstream(lambda world: world.tunnel.from_upstream(b"zzz")),
    "upstream ends": of_the_upstream(upstream_ends),
    "upstream fails": of_the_upstream(lambda world: world.tunnel.upstream_failed()),
    "upstream progresses": of_the_upstream(lambda world: world.tunnel.upstream_progressed()),
    "upstream drains": of_the_upstream(lambda world: world.tunnel.upstream_drained()),
    "time": lambda world: world.clock.pass_time(10_000),
    "part": lambda world: world.tunnel.part(),
    "abandon": lambda world: world.tunnel.abandon(),
    "settled": lambda world: world.client.settle(),
}
# Where a state is left by an event; in all others it stays.
LEFT: dict[Callable[[], World], dict[str, State]] = {
    tunnelling: {"time": State.ENDED, "part": State.PARTING},
    parting: {"time": State.ENDED},
    ended: {},
}
BEGUN = {tunnelling: State.TUNNELLING, parting: State.PARTING, ended: State.ENDED}


@pytest.mark.parametrize("state", BEGUN)
@pytest.mark.parametrize("event", EVENTS)
def test_every_event_in_every_state(state: Callable[[], World], event: str) -> None:
    world = state()
    tunnel = world.tunnel
    assert tunnel.state is BEGUN[state]
    EVENTS[event](world)
    always = {"abandon": State.ENDED, "settled": State.ENDED}
    assert tunnel.state is always.get(event, LEFT[state].get(event, BEGUN[state]))
    # Whatever happened: at the end nothing is held, nothing is counted, and nothing happens again.
    if tunnel.state is not State.ENDED:
        world.client.settle()
    assert tunnel.state is State.ENDED and world.exchange.state is Exchanged.ENDED
    assert (world.upstream.in_flight, world.upstream.streams) == (0, 0)
    assert world.connection is None
    assert [connection.released for connection in world.connections] == [[False]]
    told = list(world.client.told)
    world.clock.pass_time(1e6)
    tunnel.settled()
    assert world.client.told == told
    assert (world.upstream.in_flight, world.upstream.streams) == (0, 0)


def test_what_came_with_the_handshakes_comes_first() -> None:
    world = World(b"GET / HTTP/1.1", *UPGRADE).start()
    connection = world.connect()
    world.client.ahead = MASKED
    world.client.paused = True  # It had sent as much ahead as it may.
    world.exchange.from_upstream(SWITCHES + HELLO)
    assert world.client.told == [("switch", "101 Switching Protocols"), ("write", HELLO)]
    assert connection.pieces[1:] == [MASKED] and not world.client.paused


def test_a_tunnel_waits_for_the_slower_side_both_ways() -> None:
    world = tunnelling()
    connection = world.connection
    assert connection is not None
    world.client.queued = HIGH_WATER + 1
    world.tunnel.from_upstream(HELLO)
    assert connection.paused and not world.client.paused
    connection.queued = HIGH_WATER + 1
    world.tunnel.from_client(MASKED)
    assert world.client.paused
    world.client.queued = connection.queued = 0
    world.tunnel.client_drained()
    world.tunnel.upstream_drained()
    assert not connection.paused and not world.client.paused


def test_either_direction_keeps_a_tunnel_and_so_does_what_is_taken() -> None:
    world = tunnelling()
    for happens in (
        lambda: world.tunnel.from_client(MASKED),
        lambda: world.tunnel.from_upstream(HELLO),
        world.tunnel.client_drained,
        world.tunnel.upstream_drained,
    ):
        world.clock.pass_time(99)
        assert world.tunnel.state is State.TUNNELLING
        happens()
    world.clock.pass_time(99.9)
    assert world.tunnel.state is State.TUNNELLING
    world.clock.pass_time(0.2)
    assert world.client.told[-1] == ("hang up",)


def test_a_reader_that_is_slow_but_steady_is_no_silence() -> None:
    """Its upstream is not read meanwhile, and the tunnel was taken for silent."""
    world = tunnelling()
    connection = world.connection
    assert connection is not None
    world.client.queued = HIGH_WATER + 1
    world.tunnel.from_upstream(HELLO)
    assert connection.paused
    world.tunnel.from_client(MASKED)
    world.clock.pass_time(10_000)
    assert world.tunnel.state is State.TUNNELLING
    world.client.queued = 0
    world.tunnel.client_drained()
    assert not connection.paused
    world.clock.pass_time(10_000)
    assert world.tunnel.state is State.ENDED


def test_the_end_of_a_side_is_passed_on_and_both_are_the_tunnels() -> None:
    world = tunnelling()
    connection = world.connection
    assert connection is not None
    client_ends(world)
    assert connection.ending and world.tunnel.state is State.TUNNELLING
    world.tunnel.from_upstream(HELLO)
    world.client.queued = 7
    upstream_ends(world)
    assert ("end",) in world.client.told
    assert world.tunnel.state is State.TUNNELLING  # It has yet to take what was said before.
    world.client.queued = 0
    world.tunnel.client_drained()
    assert world.tunnel.state is State.ENDED and connection.released == [False]


def test_once_the_upstream_has_ended_its_half_the_client_may_be_silent_for_a_minute() -> None:
    """An application that had turned out a silent client went on paying for it for an hour."""
    world = tunnelling()
    connection = world.connection
    assert connection is not None
    world.clock.pass_time(90)
    upstream_ends(world)
    for _ in range(3):
        world.clock.pass_time(59)
        assert world.tunnel.state is State.TUNNELLING
        world.tunnel.from_client(MASKED)
    # As long as it has not taken all, it is the upstream that is slow.
    connection.queued = 7
    world.tunnel.from_client(MASKED)
    world.clock.pass_time(99)
    assert world.tunnel.state is State.TUNNELLING
    connection.queued = 0
    world.tunnel.upstream_drained()
    world.clock.pass_time(59.9)
    assert world.tunnel.state is State.TUNNELLING
    world.clock.pass_time(0.2)
    assert world.client.told[-1] == ("hang up",)
    assert (world.upstream.in_flight, world.upstream.streams) == (0, 0)


def test_once_the_client_has_ended_its_half_the_upstream_has_the_usual_time() -> None:
    world = tunnelling()
    client_ends(world)
    world.clock.pass_time(99.9)
    assert world.tunnel.state is State.TUNNELLING
    world.clock.pass_time(0.2)
    assert world.tunnel.state is State.ENDED


def test_what_an_upstream_said_before_it_was_gone_is_still_the_clients() -> None:
    for refused, event in ((False, "upstream fails"), (True, "upstream ends")):
        world = tunnelling()
        assert world.connection is not None
        world.connection.stopped_reading = refused
        world.tunnel.from_upstream(HELLO)
        EVENTS[event](world)
        assert world.client.told[-1] == ("finish", False)
        assert world.connections[0].released == [False]


def test_both_sides_get_a_close_and_a_moment() -> None:
    world = tunnelling()
    connection = world.connection
    assert connection is not None
    world.tunnel.part()
    assert world.client.told[-2:] == [("write", AWAY), ("end",)]
    assert connection.pieces[-1][:2] == b"\x88\x82"
    # What they still say is nobody's any more.
    world.tunnel.from_client(MASKED)
    world.tunnel.from_upstream(HELLO)
    assert world.client.written == AWAY and connection.pieces[-1][:2] == b"\x88\x82"
    world.clock.pass_time(0.9)
    assert world.tunnel.state is State.PARTING
    world.clock.pass_time(0.2)
    assert world.client.told[-1] == ("hang up",)


def test_a_frame_that_has_begun_is_let_through_before_the_close() -> None:
    world = tunnelling()
    connection = world.connection
    assert connection is not None
    world.tunnel.from_client(MASKED[:1])
    world.tunnel.from_upstream(HELLO[:4])
    world.tunnel.part()
    assert world.client.written == HELLO[:4] and connection.pieces[-1] == MASKED[:1]
    world.clock.pass_time(1000)
    assert world.tunnel.state is State.PARTING  # The service's own time is what ends it.
    world.tunnel.from_upstream(HELLO[4:] + HELLO)
    assert world.client.written == HELLO + AWAY
    world.clock.pass_time(1000)
    world.tunnel.from_client(MASKED[1:] + MASKED)
    assert connection.sent.endswith(MASKED + connection.pieces[-1]) and connection.pieces[-1][:2] == b"\x88\x82"  # fmt: skip
    world.clock.pass_time(1.1)
    assert world.tunnel.state is State.ENDED


def test_a_long_frame_that_is_let_through_waits_for_a_slow_side_too() -> None:
    world = tunnelling()
    connection = world.connection
    assert connection is not None
    long = b"\x82\x7f" + (1 << 30).to_bytes(8, "big")
    world.tunnel.from_upstream(long)
    world.tunnel.from_client(b"\x82\xff" + (1 << 30).to_bytes(8, "big") + b"mask")
    world.tunnel.part()
    world.client.queued = connection.queued = HIGH_WATER + 1
    world.tunnel.from_upstream(b"x")
    world.tunnel.from_client(b"x")
    assert connection.paused and world.client.paused
    world.client.queued = connection.queued = 0
    world.tunnel.client_drained()
    world.tunnel.upstream_drained()
    assert not connection.paused and not world.client.paused


def test_the_moment_begins_when_what_was_sent_is_taken() -> None:
    world = tunnelling()
    world.client.queued = 4
    world.tunnel.part()
    world.clock.pass_time(30)
    assert world.tunnel.state is State.PARTING
    world.client.queued = 0
    world.tunnel.client_drained()
    world.clock.pass_time(1.1)
    assert world.tunnel.state is State.ENDED


def test_a_side_that_ends_in_the_middle_of_its_frame_is_not_waited_for() -> None:
    for begun, ends in ((lambda w: w.tunnel.from_client(b"\x82"), client_ends), (lambda w: w.tunnel.from_upstream(b"\x82"), upstream_ends)):  # fmt: skip
        world = tunnelling()
        begun(world)
        world.tunnel.part()
        ends(world)
        world.clock.pass_time(1.1)
        assert world.tunnel.state is State.ENDED


def test_a_tunnel_that_begins_while_the_service_stops_parts_at_once() -> None:
    world = World(b"GET / HTTP/1.1", *UPGRADE).start()
    world.connect()
    world.client.draining = True
    world.exchange.from_upstream(SWITCHES)
    assert world.tunnel.state is State.PARTING and world.client.written == AWAY
