"""An upstream that fails: before it answers (502, 504) and in the middle of a body (a cut)."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.harness import (
    DEAD_DATABASE,
    Answer,
    RawClient,
    ScriptedUpstream,
    Seen,
    Service,
    chunked,
    free_port,
    message,
    problem,
    request,
)

READ_TIMEOUT = 1.0
OK = b"HTTP/1.1 200 OK"
CHUNKED = b"Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def database() -> str:
    """No database: no proxied request may depend on one."""
    return DEAD_DATABASE


@pytest.fixture(scope="module")
def impatient(upstream: ScriptedUpstream) -> Iterator[Service]:
    with Service(UPSTREAM_URL=upstream.url, UPSTREAM_READ_TIMEOUT=READ_TIMEOUT) as running:
        yield running


def then_close(data: bytes) -> Answer:
    def answer(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(data)
        return False

    return answer


# Closed after it, so that the next request comes on a new connection: on a reused one a request
# that got no byte of an answer may be sent again.
fine = then_close(message(OK, b"Connection: close", b"Content-Length: 2", body=b"ok"))


def then_reset(data: bytes, go_on: threading.Event) -> Answer:
    """Send `data` and, once `go_on` is set, end the connection with a TCP reset."""

    def answer(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(data)
        go_on.wait(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        return False

    return answer


def test_a_refused_connection_is_502(start: Callable[..., Service]) -> None:
    port = free_port()
    service = start(UPSTREAM_URL=f"http://127.0.0.1:{port}")
    for method in ("GET", "POST"):
        document = problem(service.call(method, "/a"), 502, "upstream-unreachable")
        assert str(port) not in document["detail"]
        assert "127.0.0.1" not in document["detail"]
    assert service.exchange(request(b"HEAD /a HTTP/1.1"), "HEAD").status == 502


def test_a_host_that_does_not_resolve_is_502(start: Callable[..., Service]) -> None:
    service = start(UPSTREAM_URL="http://nowhere.invalid:8080")
    document = problem(service.call("GET", "/a"), 502, "upstream-unreachable")
    assert "nowhere" not in str(document)


def test_a_connection_that_is_not_accepted_in_time_is_504(start: Callable[..., Service]) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        # With its queue full the kernel drops what asks for a connection, as a dead host does.
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", port))
        service = start(UPSTREAM_URL=f"http://127.0.0.1:{port}", UPSTREAM_CONNECT_TIMEOUT=0.5)
        began = time.monotonic()
        problem(service.call("POST", "/a", b"x"), 504, "upstream-timeout")
        assert 0.4 < time.monotonic() - began < 4
        for sock in waiting:
            sock.close()


def test_a_service_forwards_as_soon_as_its_upstream_is_there(start: Callable[..., Service]) -> None:
    port = free_port()
    service = start(UPSTREAM_URL=f"http://127.0.0.1:{port}")
    problem(service.call("GET", "/a"), 502, "upstream-unreachable")
    with socket.create_server(("127.0.0.1", port)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(message(OK, b"Content-Length: 2", body=b"up"))

        thread = threading.Thread(target=serve)
        thread.start()
        assert service.call("GET", "/a").body == b"up"
        thread.join(10)


def lengths(*values: bytes) -> bytes:
    return message(OK, *(b"Content-Length: " + value for value in values), body=b"hello")


def coded(*values: bytes, line: bytes = OK) -> bytes:
    return message(line, *(b"Transfer-Encoding: " + value for value in values), body=chunked(b"hi"))


BROKEN = {
    "nothing": b"",
    "no http": b"garbage\r\n\r\n",
    "a tls alert": b"\x15\x03\x01\x00\x02\x02\x46",
    "smtp": b"220 mail.example ESMTP\r\n",
    "no status": b"HTTP/1.1\r\n\r\n",
    "no status but a space": b"HTTP/1.1 \r\n\r\n",
    "letters for a status": b"HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n",
    "a signed status": b"HTTP/1.1 +20 OK\r\nContent-Length: 0\r\n\r\n",
    "two spaces before the status": b"HTTP/1.1  200 OK\r\nContent-Length: 0\r\n\r\n",
    "another protocol": b"ICY 200 OK\r\nContent-Length: 0\r\n\r\n",
    "another case": b"http/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "another version": b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n",
    "a version beyond": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "http 0.9": b"<html>hello</html>",
    "a NUL in the reason": b"HTTP/1.1 200 O\x00K\r\nContent-Length: 0\r\n\r\n",
    "a bare CR in the reason": b"HTTP/1.1 200 O\rK\r\nContent-Length: 0\r\n\r\n",
    "half a status line": b"HTTP/1.1 200",
    "an end of a head alone": b"\n\nHTTP/1.1 200 OK\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A",
    "a head without its end": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n",
    "an interim answer alone": b"HTTP/1.1 100 Continue\r\n\r\n",
    "an unasked 101": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
    "a 101 after a 103": b"HTTP/1.1 103 Hints\r\n\r\nHTTP/1.1 101 Switching Protocols\r\n\r\n",
    "a malformed interim answer": b"HTTP/1.1 103 Hints\r\nbad line\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "a line without a colon": message(OK, b"bad line", b"Content-Length: 0"),
    "a last line without a colon": message(OK, b"Content-Length: 0", b"bad"),
    "a space before the colon of nothing": message(OK, b" : 1", b"Content-Length: 0"),
    "a space in a name": message(OK, b"X A: 1", b"Content-Length: 0"),
    "no name": message(OK, b": 1", b"Content-Length: 0"),
    "a control in a name": message(OK, b"X\x01A: 1", b"Content-Length: 0"),
    "a name beyond ASCII": message(OK, b"X-\xc3\xa9: 1", b"Content-Length: 0"),
    "a NUL in a value": message(OK, b"X-A: a\x00b", b"Content-Length: 0"),
    "a bare CR at the end of a head": message(OK, b"Content-Length: 5\r", body=b"hello"),
    "a bare CR in a value": message(OK, b"X-A: a\rX-B: b", b"Content-Length: 0"),
    "a fold before any line": message(OK, b" X-A: 1", b"Content-Length: 0"),
    "two lengths": lengths(b"5", b"2"),
    "one length in two spellings": lengths(b"5", b"05"),
    "a list of two lengths": lengths(b"5, 2"),
    "a list with nothing in it": lengths(b"5,"),
    "a length with an underscore": lengths(b"0_5"),
    "a length with a plus": lengths(b"+5"),
    "a negative length": lengths(b"-5"),
    "a hexadecimal length": lengths(b"0x5"),
    "a decimal point": lengths(b"5.0"),
    "a length with a space": lengths(b"0 5"),
    "an empty length": lengths(b""),
    "a length of letters": lengths(b"five"),
    "a length in other digits": lengths("٥".encode()),
    "a superscript length": lengths(b"\xb2"),
    "a length with a vertical tab": lengths(b"5\x0b"),
    "a length beyond any": lengths(b"9" * 40),
    "two lengths and a coding": message(
        OK, b"Content-Length: 12", b"Content-Length: 2", CHUNKED, body=chunked(b"hi")
    ),
    "a malformed length and a coding": message(
        OK, b"Content-Length: +2", CHUNKED, body=chunked(b"hi")
    ),
    "gzip, chunked": coded(b"gzip, chunked"),
    "chunked, gzip": coded(b"chunked, gzip"),
    "gzip": coded(b"gzip"),
    "identity": coded(b"identity"),
    "chunked twice": coded(b"chunked, chunked"),
    "two codings": coded(b"chunked", b"chunked"),
    "xchunked": coded(b"xchunked"),
    "chunked with a vertical tab": coded(b"\x0bchunked"),
    "a coding with a parameter": coded(b"chunked;q=1"),
    "an empty coding": coded(b""),
    "a coding in HTTP/1.0": coded(b"chunked", line=b"HTTP/1.0 200 OK"),
    "a head over 256 KiB": message(OK, b"X-A: " + b"a" * 263_000, b"Content-Length: 0"),
    "many lines over 256 KiB": message(OK, *[b"X-A: " + b"a" * 995] * 300, b"Content-Length: 0"),
}


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_that_is_not_valid_http_is_502(
    service: Service, upstream: ScriptedUpstream, name: str, method: str
) -> None:
    upstream.script(then_close(BROKEN[name]))
    with service.client() as client:
        # An id of its own, for one that is made may have the port's digits in it.
        lines = [b"Content-Length: 0", b"X-Request-Id: mine"]
        client.send(request(f"{method} /a HTTP/1.1".encode(), *lines))
        document = problem(client.reply(), 502, "upstream-broken")
        assert str(upstream.port) not in str(document)
        assert "127.0.0.1" not in str(document)
        assert len(upstream.seen) == 1
        # Nothing of it is left for whoever comes next.
        upstream.script(fine)
        client.send(request())
        assert client.reply().body == b"ok"


@pytest.mark.parametrize(
    "banner", [b"SSH-2.0-OpenSSH_9\r\n", b"\x15\x03\x01", b"HTTP/2 200 OK\r\n"]
)
def test_what_can_become_no_answer_is_502_at_once(
    service: Service, upstream: ScriptedUpstream, banner: bytes
) -> None:
    """Not after UPSTREAM_READ_TIMEOUT: this upstream says no more, and stays."""
    upstream.script(banner)
    problem(service.call("GET", "/"), 502, "upstream-broken")


def test_a_header_line_that_is_malformed_is_named_by_its_number(
    service: Service, upstream: ScriptedUpstream
) -> None:
    """Nobody found it otherwise. Its text may be the rest of a secret with a line feed in it."""
    for line in (b"X Old: secret", b"secret", b"X-Key: a\nsecret"):
        upstream.script(message(OK, b"X-A: 1", line, b"Content-Length: 0"))
        document = problem(service.call("GET", "/"), 502, "upstream-broken")
        number = 3 if b"\n" in line else 2
        what = f"Header line {number} of the upstream's answer is malformed."
        assert document["detail"] == what
        assert f"upstream-broken: {what} request_id={document['request_id']}" in service.log
    assert "secret" not in service.log


@pytest.mark.parametrize(
    "name", [name for name in BROKEN if b"\r\n\r\n" in BROKEN[name] and "interim" not in name]
)
def test_a_broken_head_is_refused_without_waiting_for_more(
    service: Service, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.script(BROKEN[name])
    began = time.monotonic()
    problem(service.call("GET", "/a"), 502, "upstream-broken")
    assert time.monotonic() - began < 5


MENDED = {
    "a space before a colon": (message(OK, b"X-A : 1", b"Content-Length: 2", body=b"hi"), "2"),
    "a tab before a colon": (message(OK, b"X-A\t: 1", b"Content-Length: 2", body=b"hi"), "2"),
    "a space before the length's": (message(OK, b"X-A: 1", b"Content-Length : 2", body=b"hi"), "2"),
    "a tab before the coding's": (
        message(OK, b"X-A: 1", b"Transfer-Encoding \t: chunked", body=chunked(b"hi")),
        None,
    ),
    "one length twice": (
        message(OK, b"Content-Length: 2", b"X-A: 1", b"content-length: 2", body=b"hi"),
        "2",
    ),
    "a list of one length": (message(OK, b"X-A: 1", b"Content-Length: 2,2 , 2", body=b"hi"), "2"),
    "a length beside chunks": (
        message(OK, b"Content-Length: 12", CHUNKED, b"X-A: 1", body=chunked(b"hi")),
        None,
    ),
    "chunks beside a length": (
        message(OK, CHUNKED, b"X-A: 1", b"Content-Length: 1", body=chunked(b"hi")),
        None,
    ),
    "chunks beside one length twice": (
        message(
            OK, CHUNKED, b"X-A: 1", b"Content-Length: 1", b"Content-Length: 1", body=chunked(b"hi")
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", MENDED)
def test_what_a_proxy_has_to_mend_is_mended_and_its_connection_not_used_again(
    service: Service, upstream: ScriptedUpstream, name: str
) -> None:
    """RFC 9112 sections 5.1 and 6.3. Whoever sends it may be out of step."""
    answer, length = MENDED[name]
    upstream.script(answer)
    with service.client() as client:
        for _ in range(3):
            client.send(request())
            reply = client.reply()
            assert (reply.status, reply.body, reply.complete) == (200, b"hi", True)
            assert reply.all("X-A") == ["1"]
            assert reply.all("Content-Length") == ([length] if length else [])
            assert reply.all("Transfer-Encoding") == ([] if length else ["chunked"])
            assert all(" " not in key and "\t" not in key for key, _ in reply.headers)
    assert len({seen.connection for seen in upstream.seen}) == 3


def test_head_gets_no_body_with_its_502(service: Service, upstream: ScriptedUpstream) -> None:
    upstream.script(then_close(b"garbage\r\n\r\n"))
    with service.client() as client:
        client.send(request(b"HEAD /a HTTP/1.1"))
        assert client.head().startswith(b"HTTP/1.1 502 ")
        client.send(request(b"GET /health/live HTTP/1.1"))
        assert client.reply().status == 200


def test_a_reset_instead_of_an_answer_is_502(service: Service, upstream: ScriptedUpstream) -> None:
    now = threading.Event()
    now.set()
    upstream.script(then_reset(b"", now))
    problem(service.call("POST", "/a", b"x"), 502, "upstream-broken")
    assert len(upstream.seen) == 1


def stay_silent(sock: socket.socket, seen: Seen) -> bool:
    sock.recv(1)
    return False


def stop_in_the_head(sock: socket.socket, seen: Seen) -> bool:
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Le")
    return stay_silent(sock, seen)


def trickle_the_head(sock: socket.socket, seen: Seen) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nX-A: ")
    while True:
        sock.sendall(b"a")
        time.sleep(READ_TIMEOUT / 5)


def send_interim_answers_for_ever(sock: socket.socket, seen: Seen) -> None:
    while True:
        sock.sendall(b"HTTP/1.1 102 Processing\r\n\r\n")
        time.sleep(READ_TIMEOUT / 5)


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("GET", stay_silent),
        ("POST", stay_silent),
        ("PUT", stop_in_the_head),
        ("GET", trickle_the_head),
        ("GET", send_interim_answers_for_ever),
    ],
)
def test_a_head_that_is_not_whole_in_time_is_504(
    impatient: Service, upstream: ScriptedUpstream, answer: Answer, method: str
) -> None:
    upstream.script(answer)
    began = time.monotonic()
    problem(impatient.call(method, "/a"), 504, "upstream-timeout")
    assert READ_TIMEOUT * 0.9 < time.monotonic() - began < READ_TIMEOUT + 4
    # Sent again it could happen twice: the upstream may have been at work all the time.
    assert len(upstream.seen) == 1


def test_a_head_is_late_also_while_the_body_is_still_being_sent(
    impatient: Service, upstream: ScriptedUpstream
) -> None:
    def read_on(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(b"HTTP/1.1 200 OK\r\nX-")
        while sock.recv(20_000):
            time.sleep(READ_TIMEOUT / 100)
        return False

    upstream.script(b"")
    upstream.early = read_on
    began = time.monotonic()
    problem(impatient.call("POST", "/a", b"x" * 60_000_000), 504, "upstream-timeout")
    assert time.monotonic() - began < READ_TIMEOUT + 4


def test_a_slow_body_is_not_late_as_long_as_each_piece_is_in_time(
    impatient: Service, upstream: ScriptedUpstream
) -> None:
    def answer(sock: socket.socket, seen: Seen) -> None:
        sock.sendall(message(OK, b"Content-Length: 6"))
        for _ in range(6):
            time.sleep(READ_TIMEOUT / 3)
            sock.sendall(b"x")

    upstream.script(answer)
    reply = impatient.call("GET", "/slow")
    assert (reply.body, reply.complete) == (b"xxxxxx", True)


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_an_upstream_that_waits_for_its_client_is_not_late(
    impatient: Service, upstream: ScriptedUpstream, framing: str
) -> None:
    """It has more to send, which nobody takes for longer than a piece may take."""
    body = bytes(range(256)) * 80_000
    head = {"length": [b"Content-Length: %d" % len(body)], "chunked": [CHUNKED], "close": []}

    pieces = chunked(*[body[at : at + 50_000] for at in range(0, len(body), 50_000)])
    whole = message(OK, *head[framing], body=pieces if framing == "chunked" else body)

    def answer(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(
            whole
        )  # It is made before: on a busy machine that takes as long as a piece may.
        return framing != "close"

    upstream.script(answer)
    with RawClient(impatient.port, room=4096) as client:
        client.send(request())
        came = client.head()
        threading.Event().wait(READ_TIMEOUT * 3)
        client.buffer = came + b"\r\n\r\n" + client.buffer
        reply = client.reply()
    assert (reply.complete, reply.body == body) == (True, True)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_an_upstream_that_waits_for_the_body_is_not_late(
    impatient: Service, upstream: ScriptedUpstream, framing: str
) -> None:
    """It is the client that takes its time. The upstream's begins when it has all of the body."""
    body = bytes(range(256)) * 800
    line = b"Content-Length: %d" % len(body) if framing == "length" else CHUNKED
    data = body if framing == "length" else chunked(body[:150_000], body[150_000:])
    upstream.script(fine)
    with impatient.client() as client:
        client.send(request(b"POST /a HTTP/1.1", line))
        for at in range(0, len(data), 100_000):
            client.send(data[at : at + 100_000])
            threading.Event().wait(READ_TIMEOUT * 1.5)
        assert client.reply().body == b"ok"
        assert upstream.seen[0].body == body
        upstream.script(stay_silent)
        client.send(request(b"POST /a HTTP/1.1", line) + data)
        began = time.monotonic()
        problem(client.reply(), 504, "upstream-timeout")
        assert READ_TIMEOUT * 0.9 < time.monotonic() - began < READ_TIMEOUT + 2


def test_an_upstream_that_takes_the_body_slowly_is_not_late_and_one_that_stops_is(
    impatient: Service, upstream: ScriptedUpstream
) -> None:
    """What it takes counts as a piece does."""
    total = 30_000_000
    tested = threading.Event()

    def slowly(sock: socket.socket, seen: Seen) -> bool:
        left = total - len(seen.body)
        while left > (total // 2 if seen.target == b"/stops" else 0):
            left -= len(sock.recv(min(left, 1_000_000)))
            threading.Event().wait(READ_TIMEOUT / 20)
        if left:
            tested.wait(20)
            return False
        sock.sendall(message(OK, b"Connection: close", b"Content-Length: 2", body=b"ok"))
        return False

    upstream.script(b"")
    upstream.early = slowly
    length = b"Content-Length: %d" % total
    with impatient.client(timeout=30) as client:
        began = time.monotonic()
        reply = client.converse(request(b"POST /slow HTTP/1.1", length) + bytes(total))
        assert reply.body == b"ok"
        assert time.monotonic() - began > READ_TIMEOUT * 1.3
    with impatient.client(timeout=30) as client:
        reply = client.converse(request(b"POST /stops HTTP/1.1", length) + bytes(total))
        problem(reply, 504, "upstream-timeout")
    tested.set()


CUT = {
    "no byte of its length": message(OK, b"Content-Length: 10"),
    "some of its length": message(OK, b"Content-Length: 10", body=b"012345678"),
    "no chunk": message(OK, CHUNKED),
    "in a chunk's size": message(OK, CHUNKED, body=b"5\r\nhello\r\n1"),
    "in a chunk's data": message(OK, CHUNKED, body=b"5\r\nhel"),
    "before the end of a chunk": message(OK, CHUNKED, body=b"5\r\nhello"),
    "between chunks": message(OK, CHUNKED, body=b"5\r\nhello\r\n"),
    "before the end of the last chunk": message(OK, CHUNKED, body=b"5\r\nhello\r\n0\r\n"),
    "in the trailers": message(OK, CHUNKED, body=b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n"),
}
BAD_CHUNKS = {
    "no size": b"5\r\nhello\r\n\r\n\r\n",
    "a size of letters": b"5\r\nhello\r\nxyz\r\n0\r\n\r\n",
    "a prefixed size": b"5\r\nhello\r\n0x2\r\nhi\r\n0\r\n\r\n",
    "a signed size": b"5\r\nhello\r\n+2\r\nhi\r\n0\r\n\r\n",
    "a negative size": b"5\r\nhello\r\n-2\r\nhi\r\n0\r\n\r\n",
    "a size with an underscore": b"5\r\nhello\r\n0_2\r\nhi\r\n0\r\n\r\n",
    "a size beyond any": b"5\r\nhello\r\n" + b"f" * 40 + b"\r\nhi\r\n0\r\n\r\n",
    "a size line without end": b"5\r\nhello\r\n2;" + b"a" * 300_000,
    "data longer than its size": b"5\r\nhello world\r\n0\r\n\r\n",
    "data shorter than its size": b"5\r\nhello\r\n5\r\nhi\r\n0\r\n\r\n5\r\nhello",
    "no end of data": b"5\r\nhello0\r\n\r\n",
}


@pytest.mark.parametrize("client_version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("name", CUT)
def test_a_body_that_is_cut_never_looks_whole(
    service: Service, upstream: ScriptedUpstream, name: str, client_version: bytes
) -> None:
    upstream.script(then_close(CUT[name]))
    reply = service.exchange(request(b"GET /a HTTP/" + client_version))
    assert (reply.status, reply.complete) == (200, False)
    assert b"hello".startswith(reply.body) or b"012345678".startswith(reply.body)
    assert len(upstream.seen) == 1


@pytest.mark.parametrize("client_version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_a_body_with_malformed_chunks_never_looks_whole(
    service: Service, upstream: ScriptedUpstream, name: str, client_version: bytes
) -> None:
    # The upstream leaves the connection open: the framing alone tells.
    upstream.script(message(OK, CHUNKED, body=BAD_CHUNKS[name]))
    with service.client() as client:
        client.send(request(b"GET /a HTTP/" + client_version))
        reply = client.reply()
        assert (reply.status, reply.complete) == (200, False)
        assert client.closed()
    upstream.script(fine)
    assert service.call("GET", "/next").body == b"ok"


@pytest.mark.parametrize("client_version", [b"1.1", b"1.0"])
@pytest.mark.parametrize(
    "head",
    [[OK, b"Content-Length: 10"], [OK, CHUNKED], [OK], [b"HTTP/1.0 200 OK"]],
    ids=["length", "chunked", "close", "http 1.0"],
)
def test_a_reset_in_a_body_never_looks_like_its_end(
    service: Service, upstream: ScriptedUpstream, head: list[bytes], client_version: bytes
) -> None:
    arrived = threading.Event()
    body = b"5\r\nhello\r\n" if CHUNKED in head else b"hello"
    upstream.script(then_reset(message(head[0], *head[1:], body=body), arrived))
    with service.client() as client:
        client.send(request(b"GET /a HTTP/" + client_version))
        while b"hello" not in client.buffer:
            client.buffer += client.sock.recv(65536)
        arrived.set()
        reply = client.reply()
    assert (reply.status, reply.body, reply.complete) == (200, b"hello", False)


@pytest.mark.parametrize(
    "head",
    [[OK, b"Content-Length: 10"], [OK, CHUNKED], [OK]],
    ids=["length", "chunked", "close"],
)
def test_a_body_that_stalls_is_cut(
    impatient: Service, upstream: ScriptedUpstream, head: list[bytes]
) -> None:
    def answer(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(message(*head, body=b"5\r\nhello\r\n" if CHUNKED in head else b"hello"))
        return stay_silent(sock, seen)

    upstream.script(answer)
    began = time.monotonic()
    reply = impatient.call("GET", "/a")
    assert (reply.status, reply.body, reply.complete) == (200, b"hello", False)
    assert READ_TIMEOUT * 0.9 < time.monotonic() - began < READ_TIMEOUT + 4
