"""A connected socket of the loop's, plain and under TLS: nothing is lost, nothing spins, and its end
is told once."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trustme

from server.loop import LEAVING, Loop
from server.stream import SMALL_READ_BYTES, Stream


class Recorded(Stream):
    """A stream that remembers what it is told; `on_data` is called with each piece."""

    def __init__(self, loop: Loop, sock: Any, idle_events: int = 0) -> None:
        self.on_data: Callable[[bytes], None] = lambda data: None
        self.pieces: list[bytes] = []
        self.told: list[str] = []
        self.calls = 0
        super().__init__(loop, sock, idle_events)
        self.watch()

    def on_event(self, events: int) -> None:
        self.calls += 1
        super().on_event(events)

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)

    def received(self, data: bytes) -> None:
        self.pieces.append(data)
        self.on_data(data)

    def ended(self) -> None:
        self.told.append("ended")

    def drained(self) -> None:
        self.told.append("drained")

    def failed(self) -> None:
        self.told.append("failed")

    def leaving(self) -> None:
        self.told.append("leaving")

    def abandon(self) -> None:
        self.close(reset=True)


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.shut()


Pair = tuple[Recorded, socket.socket]


@pytest.fixture
def connect(loop: Loop) -> Iterator[Callable[..., Pair]]:
    """Two ends of a TCP connection: a stream of the loop's, and a socket of the test's."""
    made: list[Pair] = []

    def connect(idle_events: int = 0) -> Pair:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            far = socket.create_connection(listener.getsockname())
            near, _ = listener.accept()
        near.setblocking(False)
        far.settimeout(10)
        made.append((Recorded(loop, near, idle_events), far))
        return made[-1]

    yield connect
    for stream, far in made:
        stream.close()
        far.close()
    loop.turn_over()


def turn(loop: Loop, until: Callable[[], Any], seconds: float = 10) -> None:
    """Turn the loop until something holds."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not come to that"
        loop.call(lambda: None)
        loop.turn()


def quiet(loop: Loop, stream: Recorded) -> None:
    """The loop has nothing to tell the stream."""
    calls = stream.calls
    for _ in range(20):
        loop.call(lambda: None)
        loop.turn()
    assert stream.calls == calls, "the selector says so at every turn"


def readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_what_is_not_taken_at_once_is_sent_as_it_is(
    loop: Loop, connect: Callable[..., Pair]
) -> None:
    stream, far = connect()
    data = os.urandom(12 << 20)
    for at in range(0, len(data), 1 << 18):
        stream.send(data[at : at + (1 << 18)])
    assert 0 < stream.queued < len(data)
    received: list[bytes] = []

    def read() -> None:
        while sum(map(len, received)) < len(data):
            received.append(far.recv(1 << 20))

    reader = threading.Thread(target=read)
    reader.start()
    turn(loop, lambda: "drained" in stream.told)
    reader.join(5)
    assert b"".join(received) == data and stream.queued == 0 and stream.told == ["drained"]


def test_the_sending_half_ends_behind_what_is_queued(
    loop: Loop, connect: Callable[..., Pair]
) -> None:
    stream, far = connect()
    stream.send(bytes(12 << 20))
    stream.end()
    stream.end()
    assert stream.queued
    sizes: list[int] = []

    def read() -> None:
        while data := far.recv(1 << 20):
            sizes.append(len(data))

    reader = threading.Thread(target=read)
    reader.start()
    turn(loop, lambda: not reader.is_alive())
    assert sum(sizes) == 12 << 20
    far.send(b"still open")
    turn(loop, lambda: stream.data == b"still open")


def test_a_paused_stream_reads_nothing_and_then_all(
    loop: Loop, connect: Callable[..., Pair]
) -> None:
    stream, far = connect()
    stream.pause()
    far.send(b"hello")
    quiet(loop, stream)
    assert stream.data == b""
    stream.resume()
    turn(loop, lambda: stream.data == b"hello")


def test_what_takes_long_to_handle_is_read_in_small_pieces_for_as_long_as_it_does(
    loop: Loop, connect: Callable[..., Pair]
) -> None:
    """A quarter of a megabyte of the smallest chunks was handled in one piece, which took 50 ms, and
    as long again for each client that did the same."""
    stream, far = connect()
    slow = True

    def handle(data: bytes) -> None:
        until = time.monotonic() + len(data) * 1e-6
        while slow and time.monotonic() < until:
            pass

    stream.on_data = handle
    sender = threading.Thread(target=far.sendall, args=(bytes(16 << 20),))
    sender.start()
    turn(loop, lambda: len(stream.pieces) > 30)
    assert max(map(len, stream.pieces[5:])) <= SMALL_READ_BYTES
    slow, handled = False, len(stream.pieces)
    turn(loop, lambda: len(stream.data) == 16 << 20)
    sender.join()
    assert max(map(len, stream.pieces[handled:])) > SMALL_READ_BYTES


def test_an_end_behind_bytes_that_are_not_read_is_told_of_once_and_is_read_in_its_turn(
    loop: Loop, connect: Callable[..., Pair]
) -> None:
    stream, far = connect(LEAVING)
    stream.pause()
    far.send(b"hello")
    far.shutdown(socket.SHUT_WR)
    turn(loop, lambda: stream.told == ["leaving"])
    quiet(loop, stream)
    stream.resume()
    turn(loop, lambda: stream.told == ["leaving", "ended"])
    assert stream.data == b"hello"


def test_what_could_not_be_moved_to_the_end_is_not_left_for_the_next(
    loop: Loop, connect: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All connections share one pipe. Once there was no memory for what one side did not take, each
    client got the last bytes of the answer to the one before."""
    (source, far_source), (slow, _) = connect(), connect()
    while not slow.queued:
        slow.send(bytes(65536))
    far_source.sendall(b"not for others")
    turn(loop, lambda: readable(source.sock))

    def fail(descriptor: int, size: int) -> bytes:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("server.stream.os.read", fail)
        with pytest.raises(MemoryError):
            source.move_to(slow, 65536)
    (other, far_other), (target, far_target) = connect(), connect()
    far_other.sendall(b"for this one")
    turn(loop, lambda: readable(other.sock))
    assert other.move_to(target, 65536) == (12, b"")
    assert far_target.recv(100) == b"for this one"


def test_urgent_data_before_an_end_does_not_spin(loop: Loop, connect: Callable[..., Pair]) -> None:
    """A client that sent one urgent byte behind what was not read, and ended, had the loop turn as
    fast as it could until somebody read on."""
    stream, far = connect(LEAVING)
    stream.pause()
    far.sendall(b"abc")
    far.send(b"!", socket.MSG_OOB)
    far.shutdown(socket.SHUT_WR)
    turn(loop, lambda: stream.told == ["leaving"])
    quiet(loop, stream)
    stream.resume()
    turn(loop, lambda: "ended" in stream.told)
    assert stream.data == b"abc"
    quiet(loop, stream)


def test_a_reset_is_told_of_at_every_stage(loop: Loop, connect: Callable[..., Pair]) -> None:
    for paused in (False, True):
        for ended in (False, True):
            stream, far = connect(LEAVING)
            if paused:
                stream.pause()
            if ended:
                far.shutdown(socket.SHUT_WR)
                turn(loop, lambda stream=stream: stream.told)
            reset(far)
            turn(loop, lambda stream=stream: "failed" in stream.told, 2)
            assert stream.told.count("failed") == 1 and stream.closed


def test_an_end_in_order_of_both_halves_is_no_reset_and_does_not_spin(
    loop: Loop, connect: Callable[..., Pair]
) -> None:
    for paused in (False, True):
        stream, far = connect(LEAVING)
        if paused:
            stream.pause()
            far.send(b"unread")
        stream.end()
        assert far.recv(1) == b""
        far.shutdown(socket.SHUT_WR)
        if not paused:
            turn(loop, lambda stream=stream: stream.told == ["ended"])
        for _ in range(5):
            loop.call(lambda: None)
            loop.turn()
        quiet(loop, stream)
        assert "failed" not in stream.told
        stream.resume()
        turn(loop, lambda stream=stream: stream.told[-1:] == ["ended"])
        assert stream.data == (b"unread" if paused else b"")


def test_a_failure_is_told_of_at_the_end_of_the_turn_and_not_in_the_middle_of_sending(
    loop: Loop, connect: Callable[..., Pair]
) -> None:
    stream, far = connect()
    reset(far)
    while not stream.closed:
        stream.send(b"x")
    assert stream.told == []
    stream.send(b"more")
    loop.turn_over()
    assert stream.told == ["failed"]


def test_one_that_has_been_closed_is_told_of_nothing(
    loop: Loop, connect: Callable[..., Pair]
) -> None:
    one, far = connect()
    other, other_far = connect()
    # Each closes the other, in one turn.
    one.on_data = lambda data: other.close()
    other.on_data = lambda data: one.close()
    far.send(b"x")
    other_far.send(b"x")
    turn(loop, lambda: one.pieces or other.pieces)
    for _ in range(3):
        loop.call(lambda: None)
        loop.turn()
    assert len(one.pieces) + len(other.pieces) == 1 and one.told == other.told == []


def test_a_pause_in_the_middle_of_reading_holds(loop: Loop, connect: Callable[..., Pair]) -> None:
    stream, far = connect()
    stream.on_data = lambda data: stream.pause()
    far.sendall(bytes(300_000))
    turn(loop, lambda: stream.pieces)
    quiet(loop, stream)
    assert len(stream.pieces) == 1
    stream.on_data = lambda data: None
    stream.resume()
    turn(loop, lambda: len(stream.data) == 300_000)


# TLS.


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("upstream.example").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return client, server


class Far:
    """The other end, under TLS, which begins its handshake when it is told to: its socket, once
    that is done."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        sock.settimeout(10)
        self._wrapped: list[ssl.SSLSocket] = []
        self._thread = threading.Thread(
            target=lambda: self._wrapped.append(context.wrap_socket(sock, server_side=True))
        )

    def begin(self) -> None:
        self._thread.start()

    @property
    def shaken(self) -> bool:
        return not self._thread.is_alive()

    @property
    def sock(self) -> ssl.SSLSocket:
        self._thread.join(10)
        return self._wrapped[0]


def secure(
    loop: Loop, contexts: tuple[ssl.SSLContext, ssl.SSLContext], *, shaken: bool = True
) -> tuple[Recorded, Far]:
    """A stream under TLS and its other end; the handshake is yet to come where it is not `shaken`."""
    near, other = socket.socketpair()
    far = Far(other, contexts[1])
    if shaken:
        far.begin()
    wrapped = contexts[0].wrap_socket(
        near,
        server_hostname="upstream.example",
        do_handshake_on_connect=shaken,
        suppress_ragged_eofs=False,
    )
    wrapped.setblocking(False)
    return Recorded(loop, wrapped), far


def test_bytes_that_wait_inside_tls_are_read_when_the_stream_goes_on(
    loop: Loop, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    stream, far = secure(loop, contexts)
    # One record; the stream takes the first of it and pauses, and the socket is empty then.
    stream._read_bytes = 10
    stream.on_data = lambda data: stream.pause()
    far.sock.sendall(b"0123456789" * 3)
    turn(loop, lambda: stream.pieces)
    assert stream.sock.pending() == 20
    quiet(loop, stream)
    for number in (2, 3):
        stream._read_bytes = 10  # A pause begins anew with the usual size.
        stream.resume()
        loop.turn_over()  # No event says so.
        assert len(stream.pieces) == number
    stream.close()
    far.sock.close()


def test_records_that_came_at_once_are_all_read(
    loop: Loop, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    stream, far = secure(loop, contexts)
    sender = threading.Thread(target=lambda: far.sock.sendall(bytes(1 << 20)))
    sender.start()
    turn(loop, lambda: len(stream.data) == 1 << 20)
    sender.join()
    stream.close()
    far.sock.close()


@pytest.mark.parametrize("paused", [False, True])
def test_what_is_sent_while_tls_has_to_read_first_is_sent_all_the_same(
    loop: Loop, contexts: tuple[ssl.SSLContext, ssl.SSLContext], paused: bool
) -> None:
    stream, far = secure(loop, contexts, shaken=False)
    if paused:
        stream.pause()
    stream.send(b"hello")
    assert stream.queued == 5 and stream._write_waits_for_read
    far.begin()
    turn(loop, lambda: "drained" in stream.told)
    assert far.sock.recv(10) == b"hello" and stream.queued == 0
    far.sock.sendall(b"back")
    for _ in range(5):
        loop.call(lambda: None)
        loop.turn()
    assert stream.data == (b"" if paused else b"back")
    stream.resume()
    turn(loop, lambda: stream.data == b"back")
    stream.close()
    far.sock.close()


def test_what_is_not_sent_any_more_does_not_wait_for_tls(
    loop: Loop, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    stream, far = secure(loop, contexts, shaken=False)
    stream.send(b"hello")
    stream.stop_sending()
    far.begin()
    turn(loop, lambda: far.shaken)
    far.sock.sendall(b"back")
    turn(loop, lambda: stream.data == b"back")
    stream.close()
    far.sock.close()


def test_an_end_of_tls_is_an_end_and_a_cut_beneath_it_is_a_failure(
    loop: Loop, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    for orderly in (True, False):
        stream, far = secure(loop, contexts)
        sock = far.sock
        sock.sendall(b"hello")
        sock.settimeout(0.1)
        if orderly:
            with pytest.raises(TimeoutError):
                sock.unwrap()  # It says its end, and would wait for ours.
        sock.close()
        turn(loop, lambda stream=stream: stream.told)
        assert stream.data == b"hello"
        assert stream.told == (["ended"] if orderly else ["failed"])
        stream.close()


def test_what_tls_takes_in_pieces_arrives_as_it_is(
    loop: Loop, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    stream, far = secure(loop, contexts)
    data = os.urandom(4 << 20)
    for at in range(0, len(data), 100_000):
        stream.send(data[at : at + 100_000])
    assert stream.queued
    received: list[bytes] = []

    def read() -> None:
        while sum(map(len, received)) < len(data):
            received.append(far.sock.recv(1 << 20))

    reader = threading.Thread(target=read)
    reader.start()
    turn(loop, lambda: "drained" in stream.told)
    reader.join(5)
    assert b"".join(received) == data
    stream.close()
    far.sock.close()


def test_what_waits_in_pieces_of_two_bytes_takes_no_more_memory_than_its_bytes(
    loop: Loop, connect: Callable[..., Pair]
) -> None:
    """Each event of a stream took two hundred bytes, where its client did not read."""
    stream, far = connect()
    filled = 0
    while not stream.queued:
        stream.send(b"x" * 65536)
        filled += 65536
    tracemalloc.start()
    try:
        before = stream.queued
        for number in range(65536):
            stream.send(number.to_bytes(2, "big"))
        assert stream.queued == before + 2 * 65536
        assert tracemalloc.get_traced_memory()[0] < 4 * 65536
    finally:
        tracemalloc.stop()
    got = bytearray()

    def read() -> bool:
        far.settimeout(0.01)
        with contextlib.suppress(TimeoutError):
            got.extend(far.recv(1 << 20))
        return not stream.queued and len(got) == filled + 2 * 65536

    turn(loop, read)
    assert got[filled:] == b"".join(number.to_bytes(2, "big") for number in range(65536))
