"""How much a caller may ask for: sizes, lines, time, and what a hostile caller costs the others."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import statistics
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from server.client import HEAD_SECONDS
from tests.harness import (
    RawClient,
    Reply,
    ScriptedUpstream,
    Seen,
    Service,
    message,
    ok,
    problem,
    request,
    wait_for,
)
from tests.harness.upstream import read_chunks

USERS_LIMIT = 65536
PROXY_LIMIT = 100_000
HEAD_LIMIT = 65536
LINE_LIMIT = 200
MIB = 1 << 20


@pytest.fixture(scope="module")
def limited(database: str, upstream: ScriptedUpstream) -> Iterator[Service]:
    """Gatehouse with a limit on proxied bodies that is not the one on /users."""
    with Service(
        POSTGRES_URI=database, UPSTREAM_URL=upstream.url, MAX_BODY_BYTES=PROXY_LIMIT
    ) as running:
        yield running


def user_of_size(size: int) -> bytes:
    """A valid user, padded with white space to `size` bytes."""
    body = json.dumps({"email": f"{uuid.uuid4().hex}@example.com", "name": "Ann"}).encode()
    return body + b" " * (size - len(body))


def chunked(body: bytes, pieces: int = 7) -> bytes:
    size = -(-len(body) // pieces)
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def send_chunked(service: Service, method: str, target: str, body: bytes) -> Reply:
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    data = (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + chunked(body)
    return service.exchange(data)


def send_plain(service: Service, method: str, target: str, body: bytes) -> Reply:
    return service.call(method, target, body, {"Content-Type": "application/json"})


BY_LENGTH_AND_CHUNKED = pytest.mark.parametrize("send", [send_plain, send_chunked])
Send = Callable[[Service, str, str, bytes], Reply]


@BY_LENGTH_AND_CHUNKED
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_a_users_body_may_have_exactly_65536_bytes(
    limited: Service, send: Send, method: str
) -> None:
    """Whatever MAX_BODY_BYTES says: that one is for proxied requests."""
    target = "/users" if method == "POST" else f"/users/{uuid.uuid4()}"
    if method == "PATCH":
        assert send(limited, "PUT", target, user_of_size(100)).status == 201
    reply = send(limited, method, target, user_of_size(USERS_LIMIT))
    assert reply.status == (200 if method == "PATCH" else 201), reply
    refused = send(limited, method, target, user_of_size(USERS_LIMIT + 1))
    problem(refused, 413, "body-too-large")


@BY_LENGTH_AND_CHUNKED
def test_a_proxied_body_may_have_exactly_max_body_bytes(
    limited: Service, upstream: ScriptedUpstream, send: Send
) -> None:
    upstream.script(ok)
    body = bytes(range(256)) * (PROXY_LIMIT // 256) + b"x" * (PROXY_LIMIT % 256)
    assert send(limited, "POST", "/upload", body).body == b"ok"
    assert [seen.body for seen in upstream.seen] == [body]
    problem(send(limited, "POST", "/upload", body + b"x"), 413, "body-too-large")
    assert len(upstream.seen) == 1


@pytest.mark.parametrize(("target", "limit"), [("/users", USERS_LIMIT), ("/upload", PROXY_LIMIT)])
@pytest.mark.parametrize("length", [None, "9" * 18, "9" * 19, "9" * 40, "9" * 5000])
def test_a_declared_length_over_the_limit_is_refused_before_the_body(
    limited: Service, target: str, limit: int, length: str | None
) -> None:
    """A length that no counter of bytes holds may as well be called malformed."""
    head = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Expect: 100-continue\r\nContent-Length: {length or limit + 1}\r\n\r\n"
    with limited.client() as client:
        client.send(head.encode())
        reply = client.reply()
        if length and len(length) > 18:
            assert reply.status in (400, 413), reply
        else:
            problem(reply, 413, "body-too-large")
        assert client.closed()


def test_a_chunked_body_over_the_limit_is_refused_before_its_end(limited: Service) -> None:
    head = b"POST /users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body = b"x" * (USERS_LIMIT + 1)
    with limited.client() as client:
        client.send(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (1 << 40) + body)
        problem(client.reply(), 413, "body-too-large")
        assert client.closed()


def test_a_refused_body_that_keeps_coming_does_not_cost_the_answer(limited: Service) -> None:
    """A connection closed with unread bytes in it is reset, and a reset can overtake the answer."""
    for _ in range(5):
        body = b"x" * 700_000
        problem(send_plain(limited, "POST", "/users", body), 413, "body-too-large")


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_nothing_of_a_body_is_kept_on_a_disk(upstream: ScriptedUpstream, framing: str) -> None:
    """200 MB pass through a service whose files may not grow by a byte, which is how a process sees
    a full disk. While the upstream does not read, its client has to wait."""
    block, count = bytes(1_000_000), 200
    piece, end, line = block, b"", b"Content-Length: %d" % (len(block) * count)
    if framing == "chunked":
        piece, end, line = chunked(block, 1)[:-5], b"0\r\n\r\n", b"Transfer-Encoding: chunked"
    reads = threading.Event()

    def read_late(sock: socket.socket, seen: Seen) -> bool:
        assert reads.wait(30)
        left = len(piece) * count + len(end) - len(seen.body)
        while left and framing == "length":
            left -= len(sock.recv(MIB))
        if framing == "chunked":
            assert len(read_chunks(sock, seen.body)[0]) == len(block) * count
        ok(sock, seen)
        return False

    upstream.script(b"")
    upstream.early = read_late
    settings = {"WORKERS": 1, "ACCESS_LOG": "off"}
    with (
        Service(UPSTREAM_URL=upstream.url, **settings) as service,
        service.client(timeout=60) as client,
    ):
        process = psutil.Process(service.process.pid)
        assert service.call("GET", "/health/live").status == 200
        process.rlimit(psutil.RLIMIT_FSIZE, (0, process.rlimit(psutil.RLIMIT_FSIZE)[1]))
        written = process.io_counters().write_bytes
        client.send(message(b"POST /upload HTTP/1.1", b"Host: x", line))
        client.sock.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 50 * len(piece):
                sent += client.sock.send(piece[sent % len(piece) :])
        assert 0 < sent < 32 * MIB  # what two kernels and Gatehouse hold
        reads.set()
        client.sock.settimeout(60)
        client.send(piece[sent % len(piece) :])
        for _ in range(count - sent // len(piece) - 1):
            client.send(piece)
        client.send(end)
        assert client.reply().body == b"ok"
        assert process.io_counters().write_bytes == written
        assert "Traceback" not in service.log


@pytest.mark.parametrize("size", [HEAD_LIMIT - 100, HEAD_LIMIT + 100])
@pytest.mark.parametrize("place", ["target", "one line", "many lines"])
@pytest.mark.parametrize("owned", [True, False])
def test_a_head_may_have_64_kib(
    limited: Service, upstream: ScriptedUpstream, size: int, place: str, owned: bool
) -> None:
    upstream.script(ok)
    first, lines = ("/health/live" if owned else "/x"), b""
    room = size - len(f"GET {first} HTTP/1.1\r\nHost: x\r\n\r\n")
    if place == "target":
        first += "?" + "q" * (room - 1)
    elif place == "one line":
        lines = b"X-Long: " + b"v" * (room - 10) + b"\r\n"
    else:
        lines = b"".join(b"X-%03d: %b\r\n" % (i, b"v" * (room // 100 - 9)) for i in range(100))
        lines = lines[:-2] + b"v" * (room - len(lines)) + b"\r\n"
    data = f"GET {first} HTTP/1.1\r\nHost: x\r\n".encode() + lines + b"\r\n"
    assert len(data) == size
    with limited.client() as client:
        client.send(data)
        reply = client.reply()
        if size < HEAD_LIMIT:
            assert reply.status == 200
            assert len(upstream.seen) == (0 if owned else 1)
        else:
            problem(reply, 400, "bad-request")
            assert client.closed()
            assert upstream.seen == []


@pytest.mark.parametrize("target", ["/health/live", "/x"])
def test_a_head_may_have_200_lines(
    limited: Service, upstream: ScriptedUpstream, target: str
) -> None:
    upstream.script(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    for count in (LINE_LIMIT, LINE_LIMIT + 1):
        lines = "".join(f"X-Line: {i}\r\n" for i in range(count - 1))
        with limited.client() as client:
            client.send(f"GET {target} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
            if count == LINE_LIMIT:
                assert client.reply().status == 200
            else:
                problem(client.reply(), 400, "bad-request")
                assert client.closed()
    if target == "/x":
        (seen,) = upstream.seen
        assert seen.all("X-Line") == [str(i) for i in range(LINE_LIMIT - 1)]


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "request line": (b"", b"G"),
    "target": (b"GET /", b"a"),
    "header line": (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ", b"a"),
    "header lines": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"X-Many: 1\r\n"),
    "chunk size": (CHUNKED, b"0"),
    "chunk extension": (CHUNKED + b"1;", b"a"),
    "trailer": (CHUNKED + b"0\r\n", b"T: 1\r\n"),
    "tiny chunks": (CHUNKED, b"1;" + b"e" * 500 + b"\r\nx\r\n"),
    "zeros": (CHUNKED, b"\0"),
}


@pytest.mark.parametrize("part", ENDLESS)
def test_no_part_of_a_request_may_go_on_for_ever(
    limited: Service, upstream: ScriptedUpstream, part: str
) -> None:
    upstream.script(ok)
    start, more = ENDLESS[part]
    piece = more * (65536 // len(more))
    sent = 0
    with limited.client(timeout=5) as client:
        client.send(start)
        with contextlib.suppress(ConnectionError):
            while sent < 8 * MIB and not select.select([client.sock], [], [], 0)[0]:
                client.send(piece)
                sent += len(piece)
        problem(client.reply(), 400, "bad-request")
    assert upstream.seen == []


def test_empty_lines_before_a_request_do_not_go_on_for_ever_for_free(limited: Service) -> None:
    """RFC 9112 section 2.2 has them ignored; they must not pile up in memory."""
    with limited.client() as client:
        before = limited.memory
        with contextlib.suppress(ConnectionError):
            for _ in range(512):
                client.send(b"\r\n" * 32768)
        assert limited.memory - before < 8 * MIB


def test_pipelined_requests_take_no_more_memory_than_their_bytes(
    database: str, upstream: ScriptedUpstream
) -> None:
    """Each was taken apart as soon as it was there, at 45 times its size."""
    held = threading.Event()

    def answer(sock: socket.socket, seen: Seen) -> None:
        held.wait(30)
        ok(sock, seen)

    upstream.script(answer)
    requests = b"GET / HTTP/1.1\r\nHost:a\r\n\r\n" * 2300
    with (
        Service(POSTGRES_URI=database, UPSTREAM_URL=upstream.url) as service,
        contextlib.ExitStack() as stack,
    ):
        before = service.memory
        clients = [stack.enter_context(service.client()) for _ in range(20)]
        for client in clients:
            client.send(requests)
        wait_for(lambda: len(upstream.seen) == len(clients))
        threading.Event().wait(0.5)
        assert service.memory - before < 20 * MIB
        held.set()
        for _ in range(2300):
            assert clients[0].reply().status == 200


HOSTILE = [
    b"\0" * 1000,
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\xff" * 500,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nBroken\r\n\r\n",
    b"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n" + b"x" * 70000,
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nthen gone",
    b"GET /" + b"a" * 70000,
    b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n" * 100,
    # Against expressions that look at a run of white space from each of its characters.
    b"GET / HTTP/1.1\r\nHost: x\r\nX:" + b" " * 65000 + b"\0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a" * 65000 + b"\r\n\r\n",
]


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: repr(data[:30]))
@pytest.mark.parametrize("reset", [False, True])
def test_a_hostile_caller_costs_its_own_connection_only(
    limited: Service, upstream: ScriptedUpstream, data: bytes, reset: bool
) -> None:
    upstream.script(ok)
    with limited.client() as bystander:
        bystander.send(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
        assert bystander.reply().body == b"ok"
        hostile = limited.client()
        with contextlib.suppress(ConnectionError):
            hostile.send(data)
        if reset:
            hostile.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        hostile.close()
        for target, status in (("/x", 200), ("/users", 200), ("/health", 200)):
            bystander.send(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert bystander.reply().status == status


@pytest.mark.parametrize("pause", ["sends", "takes"])
def test_a_client_that_pauses_for_longer_than_it_may_is_cut(
    start: Callable[..., Service], upstream: ScriptedUpstream, pause: str
) -> None:
    upstream.script(message(b"HTTP/1.1 200 OK", b"Content-Length: 80000000", body=bytes(80000000)))
    service = start(UPSTREAM_URL=upstream.url, CLIENT_TIMEOUT=1)
    with service.client() as client:
        body = request(b"PUT /a HTTP/1.1", b"Content-Length: 9", body=b"x")
        client.send(body if pause == "sends" else request())
        told = f"the client {'sent' if pause == 'sends' else 'took'} nothing for 1 s"
        wait_for(lambda: told in service.log, what="the line of the log")


@pytest.mark.slow
def test_a_client_that_has_vanished_leaves_its_place(
    start: Callable[..., Service], database: str
) -> None:
    """So much of what it sent is unread that its end never arrives, and its kernel gives up without
    a word: nothing comes of it, and nothing is sent to it."""

    def quiet(sock: socket.socket, seen: Seen) -> None:
        sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Type: text/event-stream"))
        left.wait(150)

    left = threading.Event()
    upstream = ScriptedUpstream(quiet)
    service = start(POSTGRES_URI=database, UPSTREAM_URL=upstream.url)
    client = service.client()
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000)  # milliseconds
    client.send(request())
    assert b"event-stream" in client.sock.recv(4096)
    client.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.sock.sendall(b"GET /" + b"x" * 16 * MIB)
    client.close()

    def in_flight() -> int:
        return int(service.call("GET", "/health").json()["upstream"]["in_flight"])

    assert in_flight() == 1
    wait_for(lambda: not in_flight(), 120, what="the place")
    left.set()
    upstream.close()


def latency(service: Service, target: str, times: int = 40) -> float:
    """Median seconds of a request on a new connection; each must be 200."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        assert service.call("GET", target).status == 200
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


SLOW_SENDERS = [
    b"",
    b"G",
    b"GET /x HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    b"GET /users HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    b"PUT /users/x HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{",
    b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\nx",
    b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
]
TARGETS = ("/health", "/users", "/small")


def test_slow_senders_and_readers_that_never_read_cost_the_others_nothing(
    start: Callable[..., Service], database: str
) -> None:
    """500 and 50 of them. Each reader asks for 32 MiB, 1.6 GB in all."""
    piece = b"x" * MIB
    sent = []

    def answer(sock: socket.socket, seen: Seen) -> None:
        if seen.target != b"/big":
            return ok(sock, seen)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (32 * MIB))
        for _ in range(32):
            sock.sendall(piece)
            sent.append(MIB)
        return None

    upstream = ScriptedUpstream(answer)
    service = start(POSTGRES_URI=database, UPSTREAM_URL=upstream.url)
    before = {target: latency(service, target) for target in TARGETS}
    small = service.memory
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        stack.callback(upstream.close)
        senders = [stack.enter_context(service.client()) for _ in range(500)]
        for index, sender in enumerate(senders):
            sender.send(SLOW_SENDERS[index % len(SLOW_SENDERS)])
        for _ in range(50):
            stack.enter_context(reader_that_never_reads(service))
        trickle = threading.Thread(target=trickle_into, args=(senders, stop), daemon=True)
        trickle.start()
        stack.callback(trickle.join)
        stack.callback(stop.set)
        during = {target: latency(service, target) for target in TARGETS}
        grown = service.memory - small
    for target in TARGETS:
        assert during[target] < 4 * before[target] + 0.02, (before, during)
    assert grown < 64 * MIB
    # Nor has it gone to a disk: the upstream is held back. Half is what kernels may hold at most.
    assert sum(sent) < 50 * 16 * MIB
    wait_for(lambda: latency(service, "/health/live", 1) < 1, what="life afterwards")


def reader_that_never_reads(service: Service) -> RawClient:
    """A connection on which 32 MiB have begun to arrive and stay unread."""
    client = RawClient(service.port, room=4096)
    client.send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.sock.recv(15, socket.MSG_PEEK) == b"HTTP/1.1 200 OK"
    return client


@pytest.mark.parametrize("digits", [b"1152921504606846976", b"9" * 26, b"9" * 5000])
def test_a_length_beyond_all_bodies_is_refused_without_a_limit_too(
    service: Service, upstream: ScriptedUpstream, digits: bytes
) -> None:
    """Another number was sent on in its place."""
    upstream.script(ok)
    with service.client() as client:
        client.send(request(b"POST / HTTP/1.1", b"Content-Length: " + digits, body=b"abc"))
        problem(client.reply(), 413, "body-too-large")
    assert upstream.seen == []


def trickle_into(senders: list[RawClient], stop: threading.Event) -> None:
    """A byte to each now and then, so that none of them is idle."""
    while not stop.wait(0.5):
        for sender in senders:
            with contextlib.suppress(OSError):
                sender.send(b"a")


@pytest.mark.slow
def test_the_time_of_a_request_is_counted_while_it_may_arrive(
    database: str, upstream: ScriptedUpstream
) -> None:
    """Half a minute is what a request has to arrive in. It was counted for the next one, or for an
    empty line, while Gatehouse itself made that wait: what was under way was cut then."""
    seconds = HEAD_SECONDS + 3
    post = b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
    expects = b"PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"

    def answer(sock: socket.socket, seen: Seen) -> None:
        if seen.target == b"/slow":
            threading.Event().wait(seconds)
        if seen.target == b"/stream":
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
            threading.Event().wait(seconds)
            sock.sendall(b"ok")
        else:
            ok(sock, seen)

    def empty_line(client: RawClient) -> None:
        client.send(post + b"\r\n")
        assert client.reply().body == b"ok"

    def empty_line_behind_a_stream(client: RawClient) -> None:
        client.send(post.replace(b"slow", b"stream") + b"\r\n")
        reply = client.reply()
        assert (reply.body, reply.complete) == (b"ok", True)

    def one_that_waits_to_be_asked_for_its_body(client: RawClient) -> None:
        client.send(post + expects)
        assert client.reply().body == b"ok"
        assert client.head() == b"HTTP/1.1 100 Continue"
        client.send(b"hi")
        assert client.reply().body == b"ok"

    def one_whose_body_is_not_read_yet(client: RawClient) -> None:
        client.send(post + post.replace(b"slow", b"fast") + post[:-2].replace(b"slow", b"fast"))
        client.send(b"hi")
        for _ in range(3):
            assert client.reply().body == b"ok"

    def nothing_but_empty_lines(client: RawClient) -> None:
        client.send(b"\r\n")
        threading.Event().wait(seconds)
        client.send(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.reply().body == b"ok"

    def a_head_that_is_never_whole(client: RawClient) -> None:
        began = time.monotonic()
        client.send(b"GET /x HTTP/1.1\r\nHo")
        assert client.closed(HEAD_SECONDS + 8)
        assert time.monotonic() - began > HEAD_SECONDS

    def try_one(sends: Callable[[RawClient], None]) -> None:
        with service.client(timeout=seconds + 10) as client:
            sends(client)

    upstream.script(answer)
    ways = [
        empty_line,
        empty_line_behind_a_stream,
        one_that_waits_to_be_asked_for_its_body,
        one_whose_body_is_not_read_yet,
        nothing_but_empty_lines,
        a_head_that_is_never_whole,
    ]
    with (
        Service(POSTGRES_URI=database, UPSTREAM_URL=upstream.url) as service,
        ThreadPoolExecutor(len(ways)) as threads,
    ):
        list(threads.map(try_one, ways))


def test_one_who_is_answered_meanwhile_may_send_slowly(
    start: Callable[..., Service], upstream: ScriptedUpstream
) -> None:
    """The application has chosen to talk with this client, and its own silence has a limit. Such a
    conversation was cut when the time of an ordinary request was up."""

    def talk(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: 2"))
        left = int(seen.get("Content-Length") or 0) - len(seen.body)
        while left and (data := sock.recv(65536)):
            left -= len(data)
        sock.sendall(b"ok" if not left else b"")
        return False

    upstream.early = talk
    service = start(UPSTREAM_URL=upstream.url, CLIENT_TIMEOUT=2)
    # A body that is larger than what is gathered: the application is asked at once.
    head = request(b"POST /talk HTTP/1.1", b"Content-Length: 70000")
    with service.client() as client:
        client.send(head + b"hi")
        assert client.head().startswith(b"HTTP/1.1 200 ")
        assert not client.closed(5)
        client.sock.settimeout(15)
        client.send(bytes(70000 - 2))
        assert client.sock.recv(2, socket.MSG_WAITALL) == b"ok"
