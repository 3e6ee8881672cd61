"""A client connection, with a real socket and whoever answers it not there."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import server.client
from problems import NotFound, Problem
from server.client import (
    AHEAD_BYTES,
    HEAD_SECONDS,
    MIN_BYTES_PER_SECOND,
    READER_LOOK_SECONDS,
    REQUESTS_AT_ONCE,
    STILL_SECONDS,
    Client,
    Phase,
)
from server.loop import Loop
from tests.harness import request
from wire.request import Head, end_of_head

# How long a client may send nothing of its body, or take nothing of an answer.
CLIENT_SECONDS = 60.0
# A client that waits to be asked for its body.
EXPECTING = request(b"POST / HTTP/1.1", b"Content-Length: 3", b"Expect: 100-continue")


class Responder:
    """Whoever answers: what it is told is remembered, and the test answers."""

    def __init__(self, client: Client, head: Head) -> None:
        self.client = client
        self.head = head
        self.body = head.body()
        self.tunnel = False
        self.data = b""
        self.told: list[str] = []
        self.fails = False
        self.patient = False

    @property
    def wants_body(self) -> bool:
        return self.tunnel or (self.body is not None and not self.body.complete)

    @property
    def hurries_client(self) -> bool:
        return self.wants_body and not (self.patient or self.tunnel)

    def from_client(self, data: bytes) -> bytes:
        if self.fails:
            raise ValueError("as it never should")
        if self.tunnel:
            self.data += data
            return b""
        assert self.body is not None
        if data:
            self.head.expects = False
        piece, rest = self.body.feed(data)
        self.data += piece
        return rest

    def client_drained(self) -> None:
        self.told.append("drained")

    def client_ended(self) -> None:
        self.told.append("ended")

    def settled(self) -> None:
        self.told.append("settled")

    def answer(self, body: bytes = b"ok") -> None:
        self.client.begin("200 OK", b"Content-Length: %d\r\n" % len(body), length=len(body), dated=True)  # fmt: skip
        self.client.write(body)
        self.client.finish()

    def switch(self) -> None:
        self.tunnel = True
        self.client.switch("101 Switching Protocols", b"", self)


class Desk:
    """What lets a client in: it gives each request to a responder of the test's."""

    keepalive = 120.0
    client_timeout = CLIENT_SECONDS

    def __init__(self) -> None:
        self.loop = Loop()
        self.draining = False
        self.responders: list[Responder] = []
        self.lines: list[str] = []
        self.gone: list[Client] = []
        self.refused_with: list[str] = []
        self.log_fails = False

    def respond(self, client: Client, head: Head) -> None:
        responder = Responder(client, head)
        anything: Any = responder
        client.responder = anything
        self.responders.append(responder)

    def begun(self, client: Client, head: Head, status: int, seconds: float) -> None:
        assert seconds >= 0

    def answered(self, client: Client, head: Head) -> None:
        if self.log_fails:
            raise ValueError("as it never should")
        self.lines.append(f"{head.method} {head.target} {client.status[:3]}")

    def refused(self, problem: Problem) -> None:
        self.refused_with.append(problem.name)

    def left(self, client: Client) -> None:
        self.gone.append(client)

    def turn(self, until: Callable[[], Any] = lambda: True) -> None:
        for _ in range(1000):
            self.loop.call(lambda: None)
            self.loop.turn()
            if until():
                return
        raise AssertionError("it did not come to that")

    def pass_time(self, seconds: float) -> None:
        """So many seconds pass; the real clock comes back with the next turn."""
        self.loop.now += seconds
        self.loop._take_timers(self.loop.now)
        self.loop.turn_over()


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.loop.shut()


Pair = tuple[Client, socket.socket]


@pytest.fixture
def let_in(desk: Desk) -> Iterator[Callable[[], Pair]]:
    made: list[Pair] = []

    def let_in() -> Pair:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            far = socket.create_connection(listener.getsockname())
            near, _ = listener.accept()
        near.setblocking(False)
        far.settimeout(5)
        anything: Any = desk
        made.append((Client(anything, near, ("127.0.0.1", 1)), far))
        return made[-1]

    yield let_in
    for client, far in made:
        client.hang_up()
        far.close()
    desk.loop.turn_over()


def test_a_request_is_one_wherever_it_is_split(desk: Desk, let_in: Callable[[], Pair]) -> None:
    data = request(b"POST /a HTTP/1.1", b"Content-Length: 5", body=b"hello") + request(b"GET /b HTTP/1.1")  # fmt: skip
    for at in range(1, len(data)):
        client, far = let_in()
        client.received(data[:at])
        client.received(data[at:])
        first = desk.responders[-1]
        assert (first.head.target, first.data) == ("/a", b"hello"), at
        first.answer()
        second = desk.responders[-1]
        assert second is not first and second.head.target == "/b", at
        second.answer(b"done")
        assert first.told == second.told == ["settled"]
        assert client.phase is Phase.READING and client.idle
        client.hang_up()
        far.close()


def fill(client: Client) -> None:
    """Write until the client does not take it any more."""
    while not client.queued:
        client.write(bytes(65536))


def empty(desk: Desk, client: Client, far: socket.socket) -> None:
    """Read at the other end until all has been taken."""
    far.setblocking(False)
    for _ in range(10_000):
        try:
            far.recv(1 << 20)
        except BlockingIOError:
            if not client.queued:
                return
        desk.turn()
    raise AssertionError("it is never taken")


def test_no_clock_of_a_request_is_that_of_a_tunnel(desk: Desk, let_in: Callable[[], Pair]) -> None:
    """A tunnel in which either side had once made the other wait was cut after half a minute."""
    client, far = let_in()
    client.received(request())
    responder = desk.responders[0]
    responder.switch()
    # The client has been slow once, and has once been made to wait.
    fill(client)
    empty(desk, client, far)
    client.pause()
    client.resume()
    for _ in range(10):
        desk.pass_time(READER_LOOK_SECONDS)
        desk.pass_time(HEAD_SECONDS)
    assert client.phase is Phase.ANSWERING and desk.gone == []
    far.setblocking(True)
    far.send(b"still here")
    desk.turn(lambda: responder.data == b"still here")


def test_a_client_that_takes_nothing_of_a_tunnel_is_cut_all_the_same(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    client, _ = let_in()
    client.received(request())
    desk.responders[0].switch()
    fill(client)
    for _ in range(6):
        desk.pass_time(READER_LOOK_SECONDS)
    assert desk.gone == [client] and desk.responders[0].told == ["settled"]


@pytest.mark.parametrize("tunnel", [False, True])
def test_a_client_that_trickles_and_takes_nothing_is_cut(
    desk: Desk, let_in: Callable[[], Pair], tunnel: bool
) -> None:
    """A byte a minute was sign of life enough, so that it was served for ever."""
    client, _ = let_in()
    if tunnel:
        client.received(request())
        desk.responders[0].switch()
    else:
        client.received(request(b"POST / HTTP/1.1", b"Content-Length: 100", body=b"x"))
        desk.responders[0].patient = True
        client.begin("200 OK", b"", length=None, dated=True, close=True)
    fill(client)
    for _ in range(6):
        desk.pass_time(READER_LOOK_SECONDS)
        client.received(b"x")
    assert desk.gone == [client] and desk.responders[0].told == ["settled"]


def test_a_client_may_take_nothing_for_as_long_as_it_sends_steadily(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """Many read only after they have sent all."""
    client, _ = let_in()
    client.received(request(b"POST / HTTP/1.1", b"Content-Length: 1000000", body=b"x"))
    desk.responders[0].patient = True
    client.begin("200 OK", b"", length=None, dated=True, close=True)
    fill(client)
    for _ in range(20):
        desk.pass_time(READER_LOOK_SECONDS)
        client.received(bytes(int(READER_LOOK_SECONDS * MIN_BYTES_PER_SECOND)))
    assert desk.gone == []
    for _ in range(6):
        desk.pass_time(READER_LOOK_SECONDS)
    assert desk.gone == [client]


def has_a_whole_time(desk: Desk, client: Client) -> None:
    """The client is cut when all the time that it may send nothing in is over, and not before."""
    seconds = CLIENT_SECONDS if client.responder is not None else HEAD_SECONDS
    desk.pass_time(seconds - 1)
    assert desk.gone == []
    desk.pass_time(2)
    assert desk.gone == [client]


def test_a_body_that_stops_is_cut_however_much_of_it_has_come(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """Its time grew with its bytes: a hundred megabytes held a place for two days."""
    client, _ = let_in()
    client.received(request(b"POST / HTTP/1.1", b"Content-Length: 100000000", body=b"x"))
    client.received(bytes(10_000_000))
    has_a_whole_time(desk, client)
    assert desk.responders[0].told == ["settled"]


def test_a_body_may_come_as_slowly_as_it_likes_if_it_comes_steadily(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """Whoever sent less than 500 bytes a second was cut, and not by the application itself."""
    client, _ = let_in()
    client.received(request(b"POST / HTTP/1.1", b"Content-Length: 100", body=b"x"))
    for _ in range(20):
        desk.pass_time(CLIENT_SECONDS - 1)
        client.received(b"x")
    assert desk.gone == []
    has_a_whole_time(desk, client)


def test_a_body_has_its_clock_again_after_its_client_was_made_to_wait(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """A body that had once been paused for long could stall for ever."""
    client, _ = let_in()
    client.received(request(b"POST / HTTP/1.1", b"Content-Length: 100", body=b"x"))
    client.pause()
    desk.pass_time(2 * CLIENT_SECONDS)
    assert desk.gone == []
    client.resume()
    has_a_whole_time(desk, client)
    assert desk.responders[0].told == ["settled"]


def test_a_request_is_given_no_time_for_the_pause_before_it(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """One whose first bytes came before the pause had that much more time."""
    client, _ = let_in()
    first = request(b"POST / HTTP/1.1", b"Content-Length: 2", body=b"ab")
    client.received(first + b"GET / HT")
    client.pause()
    desk.pass_time(2 * CLIENT_SECONDS)
    desk.responders[0].answer()
    has_a_whole_time(desk, client)


def test_a_body_has_its_clock_anew_after_a_conversation(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """The client had used up its time in it, and the rest of the body was not read."""
    client, _ = let_in()
    client.received(request(b"POST / HTTP/1.1", b"Content-Length: 100", body=b"x"))
    desk.responders[0].patient = True
    client.begin("200 OK", b"Content-Length: 2\r\n", length=2, dated=True, close=True)
    desk.pass_time(2 * CLIENT_SECONDS)
    assert desk.gone == []
    desk.responders[0].patient = False
    client.write(b"ok")
    client.finish(more=True)
    has_a_whole_time(desk, client)
    assert desk.responders[0].told == ["settled"]


def test_a_client_that_still_takes_its_answer_is_not_hurried_for_its_body(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """Its answer was cut, and the log said that all of it was sent."""
    client, far = let_in()
    client.received(request(b"POST / HTTP/1.1", b"Content-Length: 100", body=b"x"))
    client.begin("200 OK", b"", length=None, dated=True)
    for _ in range(20):
        client.write(bytes(1 << 20))
    client.finish(more=True)
    for _ in range(20):
        desk.pass_time(CLIENT_SECONDS / 4)
        assert far.recv(1 << 17)
    assert client.queued and desk.gone == []
    empty(desk, client, far)
    desk.pass_time(CLIENT_SECONDS - 1)
    assert desk.gone == []
    desk.pass_time(100 * CLIENT_SECONDS)
    assert desk.gone == [client]


def test_a_client_that_ends_while_it_is_answered_is_closed_after_that(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """It stayed for as long as an idle connection is kept, though no request could come any more."""
    client, far = let_in()
    client.received(request())
    client.begin("200 OK", b"Content-Length: 2\r\n", length=2, dated=True)
    far.shutdown(socket.SHUT_WR)
    desk.turn(lambda: desk.responders[0].told == ["ended"])
    client.write(b"ok")
    client.finish()
    assert desk.gone == [client]


def test_the_end_of_a_tunnels_client_is_told_behind_its_bytes(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    client, far = let_in()
    client.received(request())
    responder = desk.responders[0]
    responder.switch()
    client.pause()
    far.send(b"last")
    far.shutdown(socket.SHUT_WR)
    for _ in range(5):
        desk.turn()
    assert responder.told == [] and responder.data == b""
    client.resume()
    desk.turn(lambda: responder.told == ["ended"])
    assert responder.data == b"last"


def test_the_end_of_another_client_is_told_at_once(desk: Desk, let_in: Callable[[], Pair]) -> None:
    client, far = let_in()
    client.received(request())
    client.pause()
    far.send(b"ahead")
    far.shutdown(socket.SHUT_WR)
    desk.turn(lambda: desk.responders[0].told == ["ended"])


def test_a_failure_while_a_client_is_read_ends_it_and_no_other(
    desk: Desk, let_in: Callable[[], Pair], caplog: pytest.LogCaptureFixture
) -> None:
    bad, bad_far = let_in()
    good, good_far = let_in()
    for far in (bad_far, good_far):
        far.send(request(b"POST / HTTP/1.1", b"Content-Length: 5"))
    desk.turn(lambda: len(desk.responders) == 2)
    failing, fine = sorted(desk.responders, key=lambda one: one.client is good)
    failing.fails = True
    failing.client.begin("200 OK", b"", length=None, dated=True)
    failing.client.write(b"half of an answer")
    for far in (bad_far, good_far):
        far.send(b"hello")
    desk.turn(lambda: desk.gone == [bad] and fine.data == b"hello")
    assert failing.told == ["settled"] and "as it never should" in caplog.text
    with pytest.raises(ConnectionResetError):
        while bad_far.recv(65536):
            pass
    fine.answer()
    assert b"200 OK" in good_far.recv(65536)


def test_a_log_that_fails_leaves_neither_a_connection_nor_an_answer_open(
    desk: Desk, let_in: Callable[[], Pair], caplog: pytest.LogCaptureFixture
) -> None:
    client, far = let_in()
    far.send(request())
    desk.turn(lambda: desk.responders)
    desk.log_fails = True
    far.close()
    desk.responders[0].fails = True
    desk.loop.soon(desk.responders[0].client.abandon)
    desk.turn(lambda: desk.gone == [client])
    assert desk.responders[0].told[-1] == "settled" and client.closed
    assert "as it never should" in caplog.text


def refused_at_once(desk: Desk, let_in: Callable[[], Pair]) -> Pair:
    """A client that has sent two hundred requests in one piece, each of which is refused."""

    def refuse(client: Client, head: Head) -> None:
        raise NotFound

    desk.respond = refuse  # type: ignore[method-assign]
    client, far = let_in()
    client.received(request(b"GET /1 HTTP/1.1") * 200)
    return client, far


def test_of_many_requests_that_are_refused_at_once_others_have_their_turn_between(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """10,000 in one piece took half a second, in which nobody else was served."""

    client, far = refused_at_once(desk, let_in)
    assert len(desk.refused_with) == REQUESTS_AT_ONCE
    assert client.paused  # What is here is taken first: more would only pile up.
    seen = []
    while len(desk.refused_with) < 200:
        before = len(desk.refused_with)
        desk.turn()
        seen.append(len(desk.refused_with) - before)
    assert max(seen) <= 2 * REQUESTS_AT_ONCE
    assert not client.paused and client.idle
    got = b""
    while got.count(b"HTTP/1.1 404") < 200:
        got += far.recv(65536)


def test_of_many_requests_that_are_refused_none_is_forgotten_when_the_client_ends_its_half(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """All but the first 32 were."""
    _, far = refused_at_once(desk, let_in)
    far.shutdown(socket.SHUT_WR)
    desk.turn(lambda: desk.gone)
    got = b""
    while piece := far.recv(65536):
        got += piece
    assert len(desk.refused_with) == got.count(b"HTTP/1.1 404") == 200


def test_an_answer_that_is_complete_is_not_cut_when_its_client_ends_its_half(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """Also one that ends with the connection, as HTTP/1.0 has it, while more of the request is
    passed on."""
    client, far = let_in()
    client.received(request(b"POST / HTTP/1.0", b"Content-Length: 9", body=b"ab"))
    client.begin("200 OK", b"", length=None, dated=True)
    client.write(b"all of it")
    client.finish(more=True)
    client.cut()
    far.shutdown(socket.SHUT_WR)
    desk.turn(lambda: desk.gone)
    got = b""
    while piece := far.recv(65536):  # A reset would be an error.
        got += piece
    assert got.endswith(b"\r\n\r\nall of it")


@pytest.mark.parametrize("body", [b"", b"ab"])
def test_a_client_is_not_read_while_more_waits_than_it_may_send_ahead(
    desk: Desk, let_in: Callable[[], Pair], body: bytes
) -> None:
    """Each answer let a quarter of a megabyte more in, whatever waited: five clients that asked for
    ever cost 200 MB in half a minute."""
    client, _ = let_in()
    lines = [b"Content-Length: 2"] if body else []
    one = request(b"POST / HTTP/1.1", *lines, body=body)
    number = 2 * AHEAD_BYTES // len(one)
    client.received(one * number)
    for answered in range(number):
        assert client.paused == ((number - answered - 1) * len(one) > AHEAD_BYTES)
        desk.responders[-1].answer()
    assert client.idle and not client.paused


@pytest.mark.parametrize("first", [b"\r", b"\r\n\r\n\r"])
def test_a_head_that_begins_with_a_lone_cr_is_not_searched_anew_for_every_byte(
    let_in: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    """Twenty such clients with 1,500 bytes a second took nearly a whole processor."""
    searched: list[int] = []

    def noted(data: bytes, scanned: int = 0) -> int:
        searched.append(len(data) - scanned)
        return end_of_head(data, scanned)

    monkeypatch.setattr(server.client, "end_of_head", noted)
    client, _ = let_in()
    client.received(first + bytes(60_000).replace(b"\0", b"a"))
    for _ in range(100):
        client.received(b"a")
    assert searched[1:] == [1] * 100


def test_empty_lines_before_a_head_earn_it_no_time(desk: Desk, let_in: Callable[[], Pair]) -> None:
    """They are dropped, so that a client could send them for ever."""
    client, _ = let_in()
    client.received(b"\r")
    for _ in range(29):
        desk.pass_time(1)
        client.received(b"\n\r" * 400)
    assert desk.gone == []
    desk.pass_time(3)
    assert desk.gone == [client]


def test_a_client_that_stops_in_the_middle_of_a_body_makes_room_last(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """Some hundred of them, with a byte every minute, kept everybody else out."""
    client, _ = let_in()
    client.received(request(b"POST / HTTP/1.1", b"Content-Length: 3", body=b"x"))
    assert client.spare is None
    stopped = desk.loop.now
    desk.pass_time(STILL_SECONDS + 0.1)
    assert client.spare == (3, stopped)
    client.received(b"x")
    assert client.spare is None
    desk.pass_time(STILL_SECONDS + 0.1)
    client.pause()
    assert client.spare is None, "it is made to wait"
    client.resume()
    client.received(b"x")
    desk.pass_time(STILL_SECONDS + 0.1)
    assert client.spare is None, "it waits for its answer"


def test_a_client_that_has_its_answer_and_stops_in_its_body_makes_room(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    client, _ = let_in()
    client.received(request(b"POST / HTTP/1.1", b"Content-Length: 3", body=b"x"))
    client.begin("200 OK", b"Content-Length: 2\r\n", length=2, dated=True)
    desk.pass_time(STILL_SECONDS + 0.1)
    assert client.spare is None, "it takes an answer"
    client.write(b"ok")
    client.finish(more=True)
    assert client.spare is None
    desk.pass_time(STILL_SECONDS + 0.1)
    assert client.spare is not None


def test_a_client_that_waits_to_be_asked_for_its_body_makes_no_room(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    client, _ = let_in()
    client.received(EXPECTING)
    desk.pass_time(STILL_SECONDS + 0.1)
    assert client.spare is None
    client.ask_for_body()
    assert client.spare is None
    desk.pass_time(STILL_SECONDS + 0.1)
    assert client.spare is not None


def test_a_client_may_wait_to_be_asked_for_its_body_for_as_long_as_that_takes(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """It was cut after CLIENT_SECONDS, while a refused upstream was still tried again."""
    client, _ = let_in()
    client.received(EXPECTING)
    desk.pass_time(2 * CLIENT_SECONDS)
    assert desk.gone == []
    client.ask_for_body()
    has_a_whole_time(desk, client)


def test_a_client_that_does_not_wait_to_be_asked_has_its_clock_too(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    client, _ = let_in()
    client.received(EXPECTING)
    desk.pass_time(2 * CLIENT_SECONDS)
    client.received(b"x")
    has_a_whole_time(desk, client)


def test_a_comment_is_no_part_of_the_body_that_the_log_counts(let_in: Callable[[], Pair]) -> None:
    client, far = let_in()
    client.received(request())
    client.begin("200 OK", b"", length=None, dated=True)
    client.write(b"data: 1\n\n")
    client.comment(b": keep-alive\n\n")
    assert client.sent == len(b"data: 1\n\n")
    assert far.recv(4096).endswith(b"\r\n: keep-alive\n\n\r\n")


def test_clients_that_are_yet_to_send_a_body_are_few_objects(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    """Five thousand of them, with 190 header lines each, stopped the loop for two seconds: the
    garbage collector looks through all objects."""
    lines = [b"A%d: b" % number for number in range(190)]
    head = request(b"POST / HTTP/1.1", b"Content-Length: 1", *lines)
    first, *clients = [let_in()[0] for _ in range(21)]
    first.received(head)  # Its lines are remembered.
    gc.collect()
    before = len(gc.get_objects())
    for client in clients:
        client.received(head)
    gc.collect()
    assert len(desk.responders) == 21
    assert len(gc.get_objects()) - before < 20 * 10


def test_a_client_that_leaves_while_its_requests_wait_their_turn_is_gone(
    desk: Desk, let_in: Callable[[], Pair]
) -> None:
    client, far = refused_at_once(desk, let_in)
    client.hang_up()
    desk.turn()
    assert len(desk.refused_with) == REQUESTS_AT_ONCE
    assert desk.gone == [client]
