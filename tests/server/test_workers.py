"""The supervisor, where the system does not give what it asks for."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from metrics import Board
from server.systemd import Notifier
from server.workers import START_SECONDS, STOPS, Service, Supervisor
from tests.harness import ROOT


def test_a_worker_that_cannot_be_forked_is_tried_again_and_ends_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit of processes that was reached ended the supervisor, and all workers with it."""

    def fork() -> int:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    def make() -> Any:
        raise AssertionError("there is no worker")

    with contextlib.closing(socket.socket()) as listener:
        service = Service(
            make=make,
            close=lambda: None,
            listener=listener,
            board=Board(2),
            notifier=Notifier({}),
            workers=2,
            handed_over=False,
            drain_delay=0.0,
            shutdown_timeout=30.0,
        )
        supervisor = Supervisor(service)
    monkeypatch.setattr(os, "fork", fork)
    supervisor.running[1] = 0, 0.0
    supervisor.start(1)
    assert [worker for _, worker in supervisor.due] == [1] and list(supervisor.running) == [1]
    assert supervisor.failures == 0, "the other one serves, so nobody gives up"
    assert "worker 1 cannot be started: Resource temporarily unavailable" in caplog.text
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOPS), "no signal is held back"
    for descriptor in (*supervisor.lifeline, *supervisor.signals):
        os.close(descriptor)


# Supervises, in a process of its own, workers whose servers `make` makes.
SUPERVISE = """
import errno, os, signal, socket, sys
from metrics import Board
from server.systemd import Notifier
from server.workers import Service, Supervisor

def supervise(make, workers):
    service = Service(
        make=make,
        close=None,
        listener=socket.socket(),
        board=Board(workers),
        notifier=Notifier({}),
        workers=workers,
        handed_over=False,
        drain_delay=0.0,
        shutdown_timeout=30.0,
    )
    sys.exit(Supervisor(service).run())
"""

WITHOUT_WORKERS = f"""{SUPERVISE}
def fork():
    raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

os.fork = fork
supervise(None, workers=3)
"""


def test_a_service_for_which_no_worker_can_be_forked_ends() -> None:
    """It went on for ever without a worker, so that nobody started it again."""
    command = [sys.executable, "-c", WITHOUT_WORKERS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "worker 2 cannot be started: Resource temporarily unavailable" in done.stderr
    assert done.stderr.endswith("the workers cannot start\n")


KILLED_WORKERS = f"""{SUPERVISE}
def make():
    os.kill(os.getpid(), signal.SIGKILL)

supervise(make, workers=2)
"""


def test_a_worker_that_is_killed_as_it_starts_is_started_once_a_second() -> None:
    """Under a limit of memory that was too low there were a hundred forks a second, for ever."""
    command = [sys.executable, "-c", KILLED_WORKERS]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        began = time.monotonic()
        for _ in range(3):
            for _ in range(2):
                assert process.stderr.readline().endswith("ended (signal 9)\n")
        assert time.monotonic() - began > 2 * START_SECONDS
        process.terminate()
        assert process.wait(20) == 1  # The last ones were killed while it stopped.
