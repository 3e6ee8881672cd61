"""Lanes: threads that come when jobs wait, and go when there are none."""

from __future__ import annotations

import threading
import time

import pytest

from server import lanes
from server.lanes import Lane
from server.loop import Loop
from tests.harness import wait_for


def threads(name: str) -> int:
    return sum(1 for thread in threading.enumerate() if thread.name == name)


def test_a_crowd_of_quick_jobs_starts_no_crowd_of_threads() -> None:
    lane, done = Lane(Loop(), "quick", 64, eager=4), []
    for number in range(500):
        lane.add(lambda number=number: done.append(number))
    wait_for(lambda: len(done) == 500)
    assert threads("quick") <= 4


def test_jobs_that_wait_behind_others_that_are_held_up_get_threads_of_their_own() -> None:
    lane, hold, done = Lane(Loop(), "held", 64, eager=4), threading.Event(), []
    for _ in range(4):
        lane.add(lambda: hold.wait(20))
    wait_for(lambda: threads("held") == 4)
    for number in range(30):
        lane.add(lambda number=number: done.append(number))
    began = time.monotonic()
    wait_for(lambda: lane.relieve() or len(done) == 30)
    assert time.monotonic() - began < 5
    # Of those that were started together, half were counted and were not there.
    wait_for(lambda: lane._threads == threads("held"))
    hold.set()


def test_threads_that_were_started_for_a_while_end_although_there_is_more_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They went on for as long as all connections of a database were busy, and made it slower."""
    monkeypatch.setattr(lanes, "RELIEF_SECONDS", 0.1)
    lane, hold, over = Lane(Loop(), "surplus", 8, eager=2), threading.Event(), threading.Event()

    def go_on() -> None:
        if not over.is_set():
            lane.add(go_on)
            hold.wait(0.001)

    for _ in range(12):
        lane.add(lambda: hold.wait(20))
    wait_for(lambda: lane.relieve() or threads("surplus") == 8)
    for _ in range(20):
        lane.add(go_on)
    hold.set()
    wait_for(lambda: threads("surplus") == 2)
    over.set()


def test_a_job_whose_thread_could_not_be_started_gets_one_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, done = Loop(), []
    lane = Lane(loop, "later", 8)

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        lane.add(lambda: done.append(1))
    assert not done
    wait_for(lambda: loop.turn() or done)


def test_there_are_never_more_threads_than_the_limit() -> None:
    lane, hold, done = Lane(Loop(), "limited", 6, eager=2), threading.Event(), []
    for number in range(20):
        lane.add(lambda number=number: (hold.wait(20), done.append(number)))
    wait_for(lambda: lane.relieve() or threads("limited") == 6)
    assert not done
    hold.set()
    wait_for(lambda: len(done) == 20)
    assert threads("limited") <= 6


def test_threads_but_one_end_when_there_has_been_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no more threads are allowed, a lane without any did nothing ever again."""
    monkeypatch.setattr(lanes, "IDLE_SECONDS", 0.1)
    lane = Lane(Loop(), "ending", 8)
    for _ in range(3):
        hold = threading.Event()
        for _ in range(3):
            lane.add(lambda hold=hold: hold.wait(20))
        wait_for(lambda: threads("ending") == 3)
        hold.set()
        wait_for(lambda: threads("ending") == 1)
        time.sleep(0.3)
        assert threads("ending") == 1


def test_threads_that_cannot_be_started_are_told_of_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Four calls wrote twenty thousand tracebacks into the log, in ten seconds."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    lane, done = Lane(Loop(), "refused", 8), []
    with monkeypatch.context() as refused:
        refused.setattr(threading.Thread, "start", refuse)
        for number in range(4):
            lane.add(lambda number=number: done.append(number))
        for _ in range(100):
            time.sleep(lanes.STALLED_SECONDS / 10)
            lane.relieve()
    told = "can't start new thread: jobs that wait for a thread (refused): 1"
    assert [record.getMessage() for record in caplog.records] == [told] and not done
    wait_for(lambda: lane.relieve() or sorted(done) == [0, 1, 2, 3])


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_job_that_fails_does_not_take_its_thread_along(error: type[BaseException]) -> None:
    name = f"failing {error.__name__}"
    lane, done = Lane(Loop(), name, 1), []

    def fail() -> None:
        raise error("as it never should")

    lane.add(fail)
    lane.add(lambda: done.append(1))
    wait_for(lambda: done)
    assert threads(name) == 1
