"""The supervisor, where the system does not give what it asks for."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from typing import Any

import pytest

from metrics import Board
from server.systemd import Notifier
from server.workers import STOPS, Service, Supervisor


def test_a_worker_that_cannot_be_forked_is_tried_again_and_ends_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit of processes that was reached ended the supervisor, and all workers with it."""

    def fork() -> int:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    def make(_: int) -> Any:
        raise AssertionError("there is no worker")

    with contextlib.closing(socket.socket()) as listener:
        service = Service(make, lambda: None, listener, Board(2), Notifier({}), workers=2)
        supervisor = Supervisor(service)
    monkeypatch.setattr(os, "fork", fork)
    supervisor.start(1)
    assert [worker for _, worker in supervisor.due] == [1] and not supervisor.running
    assert "worker 1 cannot be started: Resource temporarily unavailable" in caplog.text
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOPS), "no signal is held back"
    for descriptor in (*supervisor.lifeline, *supervisor.signals):
        os.close(descriptor)
