"""Jobs: the body that is gathered for one, the inbox that it is read from while it arrives, and how
much of an answer may wait."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import pytest

from problems import Problem
from server.inbox import INBOX_BYTES, Inbox
from server.jobs import Job
from tests.harness import request
from wire.request import Head


def test_a_body_in_pieces_of_two_bytes_takes_no_more_memory_than_a_whole_one() -> None:
    """Each piece took fifty bytes, so that one body of 64 KiB, which asks for no token, took 2 MB."""
    head = request(b"POST /health HTTP/1.1", b"Content-Length: 65536").removesuffix(b"\r\n\r\n")
    nobody: Any = None
    job = Job(
        nobody, Head(head), nobody, nobody, largest=65536, streamed=False, holds=False, arrived=0.0
    )
    tracemalloc.start()
    try:
        for number in range(32000):
            job.from_client(number.to_bytes(2, "big"))
        assert tracemalloc.get_traced_memory()[0] < 2 * 65536
    finally:
        tracemalloc.stop()


def test_what_waits_to_be_read_in_pieces_of_two_bytes_takes_no_more_memory_than_its_bytes() -> None:
    inbox = Inbox(lambda: None)
    tracemalloc.start()
    try:
        sent = b""
        for number in range(INBOX_BYTES // 2):
            assert inbox.put(
                number.to_bytes(2, "big", signed=False) if number < 65536 else b"zz"
            ) is (number < INBOX_BYTES // 2 - 1)
        assert tracemalloc.get_traced_memory()[0] < 2 * INBOX_BYTES
    finally:
        tracemalloc.stop()
    inbox.put_end()
    while piece := inbox.read(100_000):
        sent += piece
    assert sent.startswith(b"\0\0\0\1\0\2") and len(sent) == INBOX_BYTES


def test_a_body_that_is_cut_is_read_to_where_it_was_cut() -> None:
    inbox = Inbox(lambda: None)
    inbox.put(b"some")
    inbox.put_end(cut=True)
    assert inbox.read(10) == b"some"
    with pytest.raises(ConnectionError):
        inbox.read(10)


class Crammed:
    """A client with a megabyte of its answer before it."""

    queued = 1 << 20
    held = 0
    draining = False

    def __init__(self) -> None:
        self.loop = self

    def write(self, piece: bytes, *, hold: bool = False) -> None:
        pass

    def refuse(self, problem: Problem) -> None:
        pass


def test_much_of_an_answer_waits_only_where_the_body_is_read_meanwhile() -> None:
    """Each export with a body that never ended had 32 MB of its answer wait."""
    client: Any = Crammed()
    nobody: Any = None
    head = Head(request(b"POST /users HTTP/1.1", b"Content-Length: 5").removesuffix(b"\r\n\r\n"))
    job = Job(client, head, nobody, nobody, largest=0, streamed=True, holds=False, arrived=0.0)
    job._taken = threading.Event()
    job.from_client(b"ab")
    job.give_piece(b"1")
    assert not job._taken.is_set()
    assert job.input.read1(1) == b"a"
    job.give_piece(b"2")
    assert job._taken.is_set()


def test_a_job_that_was_refused_meanwhile_does_not_begin() -> None:
    client: Any = Crammed()
    nobody: Any = None
    head = Head(
        request(b"POST /users HTTP/1.1", b"Transfer-Encoding: chunked").removesuffix(b"\r\n\r\n")
    )
    job = Job(client, head, nobody, nobody, largest=0, streamed=True, holds=False, arrived=0.0)
    job.from_client(b"no chunk\r\n")
    job._run()
    assert job.over and not job._begun
