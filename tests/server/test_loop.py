"""The loop: sockets that end in the middle of a turn, timers that move, calls from threads, and
failures that end what they belong to and nothing else."""

from __future__ import annotations

import contextlib
import gc
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from server.loop import READ, Loop, Timer


@pytest.fixture(params=["epoll", "portable"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    if request.param == "portable":  # as on a system without epoll
        monkeypatch.delattr(select, "epoll")
    loop = Loop()
    yield loop
    loop.shut()


class Socket:
    """One end of a pair, watched for reading; `act` is what it does when it is told of that."""

    def __init__(self, loop: Loop, act: Callable[[Socket], None] = lambda _: None) -> None:
        self.loop = loop
        self.act = act
        self.near, self.far = socket.socketpair()
        self.descriptor = self.near.fileno()
        self.watched = True
        self.events = 0
        self.abandoned = 0
        loop.watch(self.descriptor, self, 0, READ)

    def on_event(self, events: int) -> None:
        self.events += 1
        self.act(self)

    def end(self) -> None:
        if self.watched:
            self.watched = False
            self.loop.watch(self.descriptor, self, READ, 0)
            self.loop.close(self.near)

    def abandon(self) -> None:
        self.abandoned += 1
        self.end()


@pytest.fixture
def sockets(loop: Loop) -> Iterator[Callable[..., list[Socket]]]:
    made: list[Socket] = []

    def make(count: int, act: Callable[[Socket], None] = lambda _: None) -> list[Socket]:
        made.extend(Socket(loop, act) for _ in range(count))
        return made[-count:]

    yield make
    for one in made:
        one.end()
        one.far.close()


# Sockets.


def test_an_event_for_a_socket_that_an_earlier_one_has_closed_is_nobodys(
    loop: Loop, sockets: Callable[..., list[Socket]]
) -> None:
    opened: list[socket.socket] = []

    def end_all(one: Socket) -> None:
        for other in pair:
            other.end()
        # The numbers are still taken: a connection that is made now is not told of those events.
        opened.append(socket.socket())
        assert opened[-1].fileno() not in [other.descriptor for other in pair]

    pair = sockets(20, end_all)
    for one in pair:
        one.far.send(b"x")
    loop.turn()
    assert sum(one.events for one in pair) == 1
    assert all(one.near.fileno() == -1 for one in pair), "closed at the end of the turn"
    for sock in opened:
        sock.close()


def test_a_number_that_is_used_again_belongs_to_the_new_socket_only(
    loop: Loop, sockets: Callable[..., list[Socket]]
) -> None:
    gc.collect()  # A socket of an earlier test must not give a lower number back in the meantime.
    [old] = sockets(1)
    old.far.send(b"x")
    old.end()
    loop.turn_over()
    [new] = sockets(1)
    assert new.descriptor == old.descriptor
    new.far.send(b"x")
    loop.turn()
    assert (old.events, new.events) == (0, 1)


def test_one_that_is_watched_for_nothing_does_not_wake_the_loop(
    loop: Loop, sockets: Callable[..., list[Socket]]
) -> None:
    [one] = sockets(1)
    loop.watch(one.descriptor, one, READ, 0)
    one.far.close()  # Which is BROKEN for a descriptor that is watched at all.
    loop.call(lambda: None)
    loop.turn()
    assert one.events == 0
    loop.watch(one.descriptor, one, 0, READ)
    loop.turn()
    assert one.events == 1


# Failures.


def fail(*_: Any) -> None:
    raise ValueError("as it never should")


def test_a_failure_ends_what_it_belongs_to_and_nothing_else(
    loop: Loop, sockets: Callable[..., list[Socket]], caplog: pytest.LogCaptureFixture
) -> None:
    [bad], good = sockets(1, fail), sockets(5)
    for one in (bad, *good):
        one.far.send(b"x")
    loop.turn()
    assert bad.abandoned == 1 and bad.near.fileno() == -1
    assert [one.events for one in good] == [1] * 5 and not any(one.abandoned for one in good)
    assert "as it never should" in caplog.text
    loop.turn()
    assert bad.events == 1


class Owner:
    """Something whose method fails when the loop calls it."""

    def __init__(self, *, stubborn: bool = False) -> None:
        self.stubborn = stubborn
        self.abandoned = 0

    def fails(self, *_: Any) -> None:
        raise ValueError("as it never should")

    def abandon(self) -> None:
        self.abandoned += 1
        if self.stubborn:
            raise RuntimeError("it cannot even be ended")


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("how", ["timer", "call", "soon"])
def test_a_timer_a_call_and_what_was_put_off_end_their_owner(
    loop: Loop, caplog: pytest.LogCaptureFixture, how: str, stubborn: bool
) -> None:
    owner, after = Owner(stubborn=stubborn), []
    if how == "timer":
        Timer(loop, owner.fails).set(loop.now)
        Timer(loop, lambda: after.append(1)).set(loop.now)
    elif how == "call":
        loop.call(owner.fails, 1, 2)
        loop.call(after.append, 1)
    else:
        loop.soon(owner.fails)
        loop.soon(lambda: after.append(1))
    loop.turn()
    assert owner.abandoned == 1 and after == [1]
    assert "as it never should" in caplog.text
    assert ("it cannot even be ended" in caplog.text) is stubborn


def test_a_function_that_belongs_to_nobody_fails_alone(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    loop.call(fail)
    loop.turn()
    assert "as it never should" in caplog.text


# Timers.


class Clocked:
    """A loop's timers, with time as the test says."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.begin = loop.now
        self.rung: list[str] = []

    def timer(self, name: str) -> Timer:
        return Timer(self.loop, lambda: self.rung.append(name))

    def at(self, seconds: float) -> list[str]:
        """What has rung since, when so many seconds have passed since the beginning."""
        self.loop.now = self.begin + seconds
        self.loop._take_timers(self.loop.now)
        rung, self.rung = self.rung, []
        return rung


def test_timers_ring_in_their_order_and_once(loop: Loop) -> None:
    clock = Clocked(loop)
    for seconds in (3, 1, 2):
        clock.timer(str(seconds)).set(clock.begin + seconds)
    assert clock.at(0.9) == []
    assert clock.at(2.5) == ["1", "2"]
    assert clock.at(100) == ["3"]
    assert clock.at(200) == []


def test_a_timer_rings_where_it_was_moved_last(loop: Loop) -> None:
    clock = Clocked(loop)
    later, earlier, there, back = (clock.timer(name) for name in ("later", "earlier", "there", "back"))  # fmt: skip
    later.set(clock.begin + 1)
    later.set(clock.begin + 5)
    earlier.set(clock.begin + 5)
    earlier.set(clock.begin + 1)
    there.set(clock.begin + 4)
    there.set(clock.begin + 2)
    there.set(clock.begin + 4)
    back.set(clock.begin + 3)
    back.set(clock.begin + 6)
    back.set(clock.begin + 3)
    assert [clock.at(second) for second in range(1, 8)] == [["earlier"], [], ["back"], ["there"], ["later"], [], []]  # fmt: skip


def test_a_cancelled_timer_does_not_ring_until_it_is_set_again(loop: Loop) -> None:
    clock = Clocked(loop)
    timer = clock.timer("x")
    timer.set(clock.begin + 1)
    timer.cancel()
    assert clock.at(2) == []
    timer.set(clock.begin + 3)
    assert clock.at(3) == ["x"]
    timer.set(clock.begin + 4)
    timer.cancel()
    timer.set(clock.begin + 4)
    assert clock.at(4) == ["x"] and clock.at(10) == []


def test_a_timer_may_be_set_by_what_it_calls_and_by_another(loop: Loop) -> None:
    clock = Clocked(loop)
    repeated = Timer(loop)
    other = clock.timer("other")

    def again() -> None:
        clock.rung.append("again")
        repeated.set(loop.now + 1)
        other.cancel()

    repeated.action = again
    repeated.set(clock.begin + 1)
    other.set(clock.begin + 1.5)
    assert [clock.at(second) for second in (1, 2, 3)] == [["again"]] * 3


def test_moving_a_timer_later_leaves_nothing_in_the_heap(loop: Loop) -> None:
    timer = Timer(loop, lambda: None)
    for number in range(10_000):
        timer.set(loop.now + 100 + number)
    assert len(loop._timers) == 1


def test_moving_a_timer_to_and_fro_leaves_little_in_the_heap(loop: Loop) -> None:
    """Each request that had a short deadline within its long one left an entry for minutes."""
    timers = [Timer(loop, lambda: None) for _ in range(10)]
    for second in range(1000):
        for timer in timers:
            timer.set(loop.now + second + 1000)
            timer.set(loop.now + second)
        loop._take_timers(loop.now + second)
    assert len(loop._timers) < 2100


def test_timers_of_connections_that_have_gone_leave_the_heap(loop: Loop) -> None:
    kept = [Timer(loop, lambda: None) for _ in range(10)]
    for timer in kept:
        timer.set(loop.now + 50)
    for _ in range(10_000):
        timer = Timer(loop, lambda: None)
        timer.set(loop.now + 100)
        timer.drop()
    assert len(loop._timers) < 2100
    assert {id(entry[2]) for entry in loop._timers} >= {id(timer) for timer in kept}


def test_timers_ring_in_their_order_after_others_have_left_the_heap(loop: Loop) -> None:
    rung: list[int] = []
    timers = []
    for number in range(3000):
        timer = Timer(loop, lambda number=number: rung.append(number))
        timer.set(loop.now + number * 7919 % 3000)
        timers.append(timer)
    for number, timer in enumerate(timers):
        if number % 3:
            timer.drop()
    loop._take_timers(loop.now + 3000)
    assert rung == sorted(range(0, 3000, 3), key=lambda number: number * 7919 % 3000)


def test_a_dropped_timer_does_not_ring(loop: Loop) -> None:
    clock = Clocked(loop)
    timer = clock.timer("x")
    timer.set(clock.begin + 1)
    timer.drop()
    assert clock.at(2) == []


def test_a_turn_that_a_timer_makes_long_is_told(loop: Loop) -> None:
    def compute() -> None:
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            pass

    Timer(loop, compute).set(loop.now)
    loop.turn()
    assert loop.longest_turn >= 0.05


def test_the_loop_sleeps_until_the_next_timer(loop: Loop) -> None:
    rung: list[float] = []
    began, count = loop.now, 0
    Timer(loop, lambda: rung.append(time.monotonic())).set(began + 0.1)
    while not rung:
        loop.turn()
        count += 1
    assert 0.09 < rung[0] - began < 0.6 and count < 5
    assert loop.longest_turn < 0.09, "sleep is no part of a turn"


# Calls.


def test_a_call_from_a_thread_wakes_the_loop(loop: Loop) -> None:
    called: list[tuple[int, str]] = []
    ready = threading.Event()

    def call() -> None:
        ready.wait(5)
        # The loop has gone to sleep by now, or will find the call when it is about to.
        loop.call(lambda *arguments: called.append(arguments), threading.get_ident(), "x")

    thread = threading.Thread(target=call)
    thread.start()
    began = time.monotonic()
    ready.set()
    while not called:
        loop.turn()
    assert time.monotonic() - began < 0.9, "it slept its second out"
    assert called == [(thread.ident, "x")]
    thread.join()


def test_calls_of_many_threads_all_arrive_each_in_its_order(loop: Loop) -> None:
    called: list[tuple[int, int]] = []

    def call(thread: int) -> None:
        for number in range(500):
            loop.call(lambda *arguments: called.append(arguments), thread, number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 10
    while len(called) < 4000 and time.monotonic() < until:
        loop.turn()
    for thread in threads:
        thread.join()
    assert [[n for t, n in called if t == one] for one in range(8)] == [list(range(500))] * 8


def test_calls_without_end_do_not_keep_sockets_and_timers_waiting(
    loop: Loop, sockets: Callable[..., list[Socket]]
) -> None:
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        loop.call(again)

    rung: list[int] = []
    Timer(loop, lambda: rung.append(1)).set(loop.now)
    [one] = sockets(1)
    one.far.send(b"x")
    loop.call(again)
    loop.turn()
    loop.turn()
    assert rung and one.events and count == 2


def test_wake_ups_by_the_thousand_are_one(loop: Loop) -> None:
    for _ in range(20_000):
        loop.wake()
    began = time.monotonic()
    loop.turn()
    loop.call(lambda: None)
    loop.turn()
    assert time.monotonic() - began < 0.5


def test_a_signal_wakes_the_loop(loop: Loop) -> None:
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        seen.append(number)
        loop.wake()

    before = signal.signal(signal.SIGALRM, handle)
    try:
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        while not seen:
            loop.turn()
        assert time.monotonic() - began < 0.9
    finally:
        signal.signal(signal.SIGALRM, before)


def test_what_is_put_off_happens_before_the_turn_is_over_and_before_sockets_close(
    loop: Loop, sockets: Callable[..., list[Socket]]
) -> None:
    order: list[str] = []
    [one] = sockets(1)

    def first() -> None:
        order.append("first")
        loop.soon(lambda: order.append(f"second, with {one.near.fileno()}"))

    one.act = lambda sock: (sock.end(), loop.soon(first))[0]
    one.far.send(b"x")
    loop.turn()
    assert order == ["first", f"second, with {one.descriptor}"] and one.near.fileno() == -1


def test_a_socket_that_cannot_be_closed_keeps_no_other_open(loop: Loop) -> None:
    class Stubborn:
        def close(self) -> None:
            raise OSError("no")

    near, far = socket.socketpair()
    loop.close(Stubborn())
    loop.close(near)
    loop.turn_over()
    assert near.fileno() == -1
    with contextlib.closing(far):
        assert far.recv(1) == b""
